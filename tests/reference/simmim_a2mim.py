"""Adapters of the cases of SimMIM and A2MIM: losses, neck, masks, schedules, names of weights."""

import importlib
from collections.abc import Container
from dataclasses import replace

import numpy as np
import timm
import torch
from torch import Tensor, nn

from masking_generator import SimMIMMask
from modeling_backbones import PixelNeck, mean_filled
from modeling_finetune import VisionTransformer
from modeling_pretrain import A2MIM, SimMIM
from modeling_targets import ReconstructionLoss
from optim_factory import annealing, by_rules, layer_scales, layers_of, set_schedule
from reference.case import Case
from reference.common import gradients, load_weights, mlp_ratio, position_options
from unimim.checkpoint.names import from_openmixup


def given_matrix(case: Case, variant: str) -> Tensor | None:
    """The weights of frequencies of a variant that is given them, in whichever way its case does
    so.

    The option `matrix` says whether, which input it is, or its numbers; without a word of it in any
    variant, all take what the inputs have. An input may belong to one variant, whose name is in its
    own.
    """
    variants = case.config["variants"]
    stated = variants[variant].get(
        "matrix", not any("matrix" in options for options in variants.values())
    )
    if isinstance(stated, list):
        return torch.tensor(stated)
    inputs = case.inputs()
    if isinstance(stated, str):
        return inputs[stated.removeprefix("inputs/")]
    return inputs.get(f"{variant}/matrix", inputs.get("matrix")) if stated else None


def focal_frequency_loss(case: Case) -> dict[str, Tensor]:
    """And where no matrix is given, the same again from the weights of all frequencies as one."""
    inputs, computed = case.inputs(), {}
    for name, options in case.config["variants"].items():
        predicted = inputs["pred"].clone().requires_grad_()
        matrix = given_matrix(case, name)
        options = options | {"matrix": matrix, "spectrum_alpha": options.get("alpha", 1.0)}
        weight = options.pop("loss_weight", 1.0)
        options.pop("alpha", None)
        criterion = loss_of_a2mim(**options).focal
        loss = weight * criterion(predicted - inputs["target"])
        loss.backward()
        computed |= {f"{name}/loss": loss, f"{name}/grad/pred": predicted.grad}
        if matrix is not None:
            continue
        difference = (predicted - inputs["target"]).detach()
        spectrum = torch.fft.fft2(
            difference.mean(0, keepdim=True) if criterion.ave_spectrum else difference, norm="ortho"
        )
        given = replace(criterion, matrix=criterion.weights(spectrum.abs() ** 2))
        torch.testing.assert_close(weight * given(difference), loss.detach())
    return computed


def loss_of_a2mim(**options) -> ReconstructionLoss:
    """The loss of the method with these options, whose network does not matter."""
    tiny = {"input_size": 16, "patch_size": 8, "embed_dim": 4, "depth": 2, "num_heads": 1}
    return A2MIM(backbone="vit_tiny", **tiny, **options).loss


def reconstruction_loss(head: dict, matrix: Tensor | None = None) -> ReconstructionLoss:
    """Of a published configuration of a head: SimMIM's has no options but the number of colors."""
    loss = dict(head.get("loss", {"mode": "l1_loss"}))
    assert loss.get("loss_weight", 1.0) == 1.0
    focal = {
        name: loss[name] for name in ("activate", "alpha", "gamma", "residual") if name in loss
    }
    names = (
        "unmask_weight",
        "fft_weight",
        "fft_focal",
        "fft_unmask_weight",
        "fft_unmask_replace",
        "fft_reweight",
    )
    options = {name: head[name] for name in names if name in head}
    options |= {f"focal_{name}": value for name, value in focal.items()}
    return loss_of_a2mim(pixel_loss=loss["mode"].removesuffix("_loss"), matrix=matrix, **options)


def a2mim_head(case: Case) -> dict[str, Tensor]:
    inputs, computed = case.inputs(), {}
    for name, head in case.config["variants"].items():
        predicted = inputs["pred"].clone().requires_grad_()
        criterion = reconstruction_loss(head, given_matrix(case, name))
        out = criterion(predicted, inputs["image"], inputs["mask"])
        out["loss"].backward()
        computed |= {
            f"{name}/{key}": value for key, value in (out | {"grad/pred": predicted.grad}).items()
        }
    return computed


NECK_NAMES = (
    ("decoder_pred.0.", "pred."), ("decoder.0.", "pred."),
    ("decoder.conv.0.conv.", "decoder.conv."), ("decoder.conv.0.ln.", "decoder.ln."),
)  # fmt: skip


def neck_name(name: str) -> str:
    for theirs, ours in NECK_NAMES:
        name = name.replace(theirs, ours)
    return name


def neck_options(config: dict) -> dict[str, int]:
    decoder = config.get("decoder_cfg")
    return {
        "kernel": config.get("kernel_size", 1),
        "decoder_kernel": decoder and decoder["kernel_size"],
    }


def mim_neck(case: Case) -> dict[str, Tensor]:
    config, inputs = case.config, case.inputs()
    neck = PixelNeck(config["in_channels"], config["encoder_stride"], **neck_options(config))
    weights = {name.removeprefix("neck."): value for name, value in case.inputs("weights/").items()}
    load_weights(neck, {neck_name(name): value for name, value in weights.items()})
    x = inputs["x"].requires_grad_()
    output = neck(x)
    output.backward(inputs["cotangent"])
    return {"output": output, "grad/x": x.grad}


def blockwise_mask(case: Case) -> dict[str, Tensor]:
    """The generator by what the case says of its masks, and by the permutations that it gives."""
    computed, inputs = {}, case.inputs()
    for number, expected in enumerate(case.config["invariants"]):
        config = expected["config"]
        side, cell = (
            config[key] // config["model_patch_size"] for key in ("input_size", "mask_patch_size")
        )
        generator = SimMIMMask((side, side), config["mask_ratio"], cell)
        mask = generator(np.random.default_rng(number))
        assert list(mask.shape) == expected["mask_shape"] and mask.sum() == expected["ones_in_mask"]
        coarse = mask[:: expected["upsample"], :: expected["upsample"]]
        assert (
            coarse.shape == (expected["coarse_grid"],) * 2
            and coarse.sum() == expected["masked_coarse_cells"]
        )
        if f"c{number}/image" in inputs:
            order, image = inputs[f"c{number}/permutation"], inputs[f"c{number}/image"]
            mask = torch.from_numpy(generator.mask_first(order.numpy()))
            assert torch.equal(mask, inputs[f"c{number}/mask"].bool())
            filled = mean_filled(image[None], mask[None])[0]
            computed[f"c{number}/image_out"] = filled if config["mask_color"] == "mean" else image
    return computed


def backbone_options(config: dict) -> dict:
    """A published configuration of a backbone in this repository's and timm's words."""
    arch = config.get("arch", {})
    if config["type"].endswith("ResNet"):
        channels = [config["base_channels"] * 2**stage for stage in range(4)]
        return {"backbone": f"resnet{config['depth']}", "channels": channels}
    if config["type"].endswith("ConvNeXt"):
        return {"backbone": "convnext_tiny", "depths": arch["depths"], "dims": arch["channels"]}
    names = {"embed_dims": "embed_dim", "num_layers": "depth"}
    sizes = {
        names.get(key, key): value for key, value in arch.items() if key != "feedforward_channels"
    }
    if config["type"].endswith("SwinTransformer"):
        window = config["stage_cfgs"]["block_cfgs"]["window_size"]
        return {"backbone": "swin_tiny_patch4_window7_224", "window_size": window, **sizes}
    return {
        "backbone": "vit_base",
        "patch_size": config["patch_size"],
        "mlp_ratio": mlp_ratio(arch["feedforward_channels"], arch["embed_dims"]),
        "init_values": config["init_values"],
        "qkv_bias": config["qkv_bias"],
        "rel_pos_bias": "per_block" if config["use_window"] else "none",
        "k_bias": not config["use_window"],
        **sizes,
    }


def reconstruction_model(case: Case) -> SimMIM:
    config, backbone = case.config, case.config["backbone"]
    names = ("replace", "detach", "mask_layer", "mask_token", "mask_init")
    model = (A2MIM if config["method"] == "a2mim" else SimMIM)(
        **backbone_options(backbone),
        **{name: backbone[name] for name in names if name in backbone},
        **neck_options(config["neck"]),
        input_size=tuple(case.inputs()["image"].shape[-2:]),
    )
    model.loss = reconstruction_loss(config["head"])
    model.mean_residual = config.get("residual", False)
    return model


def by_published_names(
    weights: dict[str, Tensor], own: Container[str]
) -> dict[str, tuple[str, Tensor]]:
    """Our name of each published tensor, and where in it each number of ours is, flat.

    Of mask token and gamma only those that are our `own`: a token that is a mean is no parameter
    here.
    """
    places = {
        name: torch.arange(value.numel()).view(value.shape) for name, value in weights.items()
    }
    inside = {
        name: value
        for name, value in places.items()
        if name.startswith("backbone.") and ".mask_" not in name
    }
    found = {
        theirs: (f"backbone.{ours}", value)
        for theirs, (ours, value) in zip(inside, from_openmixup(inside).items(), strict=True)
    }
    for name, value in places.items():
        if name.startswith("neck."):
            found[name] = neck_name(name), value
        elif name.removeprefix("backbone.") in own:
            found[name] = name.replace("backbone.", "inject."), value
    return found


def masked_reconstruction(case: Case) -> dict[str, Tensor]:
    """One training forward and its gradients, of a backbone, token, neck and head in published
    names."""
    config, inputs = case.config, case.inputs()
    model = reconstruction_model(case).train(config.get("train_mode", True))
    weights = case.inputs("weights/")
    weights = {
        name: value
        for name, value in weights.items()
        if not name.endswith(("position_index", "attn_mask"))
    }
    names = by_published_names(weights, dict(model.inject.named_parameters()))
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    load_weights(
        model,
        {
            ours: weights[name].flatten()[at].view(shapes[ours])
            for name, (ours, at) in names.items()
        },
    )
    features = model.features(inputs["image"], inputs["mask"])
    predicted = model.predict(features, inputs["image"])
    loss = model.loss(predicted, inputs["image"], inputs["mask"])["loss"]
    loss.backward()
    computed = {"loss": loss, "features": features, "reconstruction_0": predicted[:1]}
    # a published token that is no parameter here is not trained there either
    computed |= {
        f"grad/{name}": torch.zeros_like(value)
        for name, value in weights.items()
        if name not in names
    }
    if "image_filled_0" in inputs:
        torch.testing.assert_close(
            model.seen(inputs["image"], inputs["mask"])[:1], inputs["image_filled_0"]
        )
    gradient_of, state = gradients(model), model.state_dict()
    for name, (ours, at) in names.items():
        for kind, values in (("grad", gradient_of.get(f"grad/{ours}")), ("after", state[ours])):
            if values is not None:
                computed[f"{kind}/{name}"] = values.flatten()[at.flatten().argsort()].view(at.shape)
    return computed


ANNEALING_NAMES = {
    ("StepFixCosineAnnealing", False): "stepfix_cosine", ("CosineAnnealing", False): "cosine_iters",
    ("CosineAnnealing", True): "cosine_epochs", ("step", True): "step",
}  # fmt: skip


def a2mim_lr_schedule(case: Case) -> dict[str, Tensor]:
    """Upstream's schedules go by epochs unless they say otherwise; a step does so in any case."""
    computed = {}
    for name, config in case.config["variants"].items():
        by_epoch = config.get("by_epoch", True) or config["policy"] == "step"
        kind, steps = ANNEALING_NAMES[config["policy"], by_epoch], config["iters_per_epoch"]
        warmup = config.get("warmup_iters", 0) if config.get("warmup") else 0
        rates = annealing(
            kind, config["base_lrs"][0], config.get("min_lr", 0.0), config["epochs"], steps,
            warmup * (steps if config.get("warmup_by_epoch") else 1),
            warmup_ratio=config.get("warmup_ratio", 0.1), milestones=config.get("step", ()),
            gamma=config.get("gamma", 0.1),
        )  # fmt: skip
        scales = [rate / config["base_lrs"][0] for rate in config["base_lrs"]]
        optimizer = torch.optim.SGD(
            [{"params": [torch.zeros(1)], "lr_scale": scale} for scale in scales]
        )
        rows = []
        for rate in rates:
            set_schedule(optimizer, rate, 0.0)
            rows.append([group["lr"] for group in optimizer.param_groups])
        computed[name] = torch.tensor(rows, dtype=torch.float64)
    return computed


def a2mim_param_groups(case: Case) -> dict[str, Tensor]:
    """The given rules on the published names; layers by the names that these tensors have here."""
    config, optimizer = case.config, case.config["optimizer"]
    names = config["param_names"]
    values = [
        by_rules(
            name,
            optimizer.get("paramwise_options") or {},
            optimizer["lr"],
            optimizer["weight_decay"],
        )
        for name in names
    ]
    scales = np.ones(len(names))
    if "model_type" in optimizer:
        ours = list(from_openmixup({name: torch.zeros(1, 4) for name in names}))
        layers, last = layers_of(ours, config.get("depths") or [config["depth"]])
        scales = [layer_scales(optimizer["layer_decay"], last - 1)[layers[name]] for name in ours]
    return {
        "lr": torch.tensor(
            [lr * scale for (lr, _), scale in zip(values, scales, strict=True)], dtype=torch.float64
        ),
        "weight_decay": torch.tensor([decay for _, decay in values], dtype=torch.float64),
    }


def resnet_key_map(case: Case) -> dict[str, Tensor]:
    """Published names are timm's: of the whole ResNet-50, where they or their shapes are listed,
    and of a small network with its features.
    """
    config = case.config
    shapes, names = config.get("resnet50_full_shapes"), config.get("resnet50_full_key_map")
    resnet50 = timm.create_model("resnet50", num_classes=0).state_dict() if shapes or names else {}
    if shapes:
        assert {name: list(value.shape) for name, value in resnet50.items()} == shapes
    if names:
        ours = list(from_openmixup({f"backbone.{name}": torch.zeros(1) for name in names}))
        assert ours == list(names.values()) and set(ours) == resnet50.keys()
    channels = [config["base_channels"] * 2**stage for stage in range(4)]
    resnet = timm.create_model(f"resnet{config['depth']}", num_classes=0, channels=channels)
    load_weights(resnet, from_openmixup(case.inputs("weights/")))
    x = resnet.eval().maxpool(resnet.act1(resnet.bn1(resnet.conv1(case.inputs()["image"]))))
    computed = {}
    for stage in range(1, 5):
        x = getattr(resnet, f"layer{stage}")(x)
        computed[f"stage{stage}"] = x if stage > 2 else x[:1, :, :4, :4]
    return computed


def a2mim_key_map(case: Case) -> dict[str, Tensor]:
    """Strictly into timm's classes, and our ViT: equal features."""
    config, image = case.config, case.inputs()["image"]
    weights = from_openmixup(case.inputs("weights/"))
    assert from_openmixup(dict.fromkeys(config["key_map"], torch.zeros(1, 4))).keys() == set(
        config["key_map"].values()
    )
    heads = [
        value for name, value in weights.items() if name.endswith(("head.weight", "head.fc.weight"))
    ]
    network = timm_network(config, tuple(image.shape[-2:]), len(heads[0]) if heads else 0)
    load_weights(network, weights)
    network.eval()
    features = network.forward_features(image)
    computed = {
        "pooled": network.forward_head(features, pre_logits=True),
        "logits": network.forward_head(features),
    }
    if config["timm_class"].endswith("ConvNeXt"):
        return computed | {"features": network.head.norm(features)}
    if config["timm_class"].endswith("SwinTransformer"):
        return computed | {"features": features.permute(0, 3, 1, 2)}
    arch = config["arch"]
    own = VisionTransformer(
        input_size=config["img_size"], patch_size=config["patch_size"],
        embed_dim=arch["embed_dims"], depth=arch["num_layers"], num_heads=arch["num_heads"],
        init_values=config["init_values"],
        mlp_ratio=mlp_ratio(arch["feedforward_channels"], arch["embed_dims"]),
        **position_options(config), num_classes=network.num_classes,
        global_pool="token" if config["final_norm"] else "avg",
    ).eval()  # fmt: skip
    load_weights(own, weights)
    torch.testing.assert_close(
        own.norm(own.forward_features(image)), features, rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(own(image), computed["logits"], rtol=1e-4, atol=1e-5)
    return computed | {"tokens": features}


def timm_network(config: dict, size: tuple[int, int], num_classes: int) -> nn.Module:
    """The class that a case names, with its sizes."""
    module, _, name = config["timm_class"].rpartition(".")
    arch, cls = config["arch"], getattr(importlib.import_module(module), name)
    if name == "ConvNeXt":
        return cls(
            depths=arch["depths"],
            dims=arch["channels"],
            norm_eps=config["norm_eps"],
            num_classes=num_classes,
        )
    if name == "SwinTransformer":
        sizes = {
            "embed_dim": arch["embed_dims"],
            "depths": arch["depths"],
            "num_heads": arch["num_heads"],
        }
        return cls(
            img_size=size, window_size=config["window_size"], num_classes=num_classes, **sizes
        )
    return cls(
        img_size=size, patch_size=config["patch_size"], embed_dim=arch["embed_dims"],
        depth=arch["num_layers"], num_heads=arch["num_heads"],
        mlp_ratio=mlp_ratio(arch["feedforward_channels"], arch["embed_dims"]),
        init_values=config["init_values"], use_abs_pos_emb=config["use_abs_pos_embed"],
        num_classes=num_classes, use_rel_pos_bias=config["use_rel_pos_bias"],
        global_pool="token" if config["final_norm"] else "avg",
    )  # fmt: skip


# the folder of cases: its adapter
ADAPTERS = {
    "a2mim_resnet": masked_reconstruction,
    "a2mim_vit": masked_reconstruction,
    "a2mim_convnext": masked_reconstruction,
    "simmim": masked_reconstruction,
    "focal_frequency_loss": focal_frequency_loss,
    "a2mim_head": a2mim_head,
    "mim_neck": mim_neck,
    "blockwise_mask": blockwise_mask,
    "a2mim_lr_schedule": a2mim_lr_schedule,
    "a2mim_param_groups": a2mim_param_groups,
    "resnet_key_map": resnet_key_map,
    "a2mim_key_map": a2mim_key_map,
}
