"""MAE and SemMAE: the short way computes what the straightforward one does; sizes, start, pictures,
checkpoints."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from masking_generator import semantic_mask
from modeling_finetune import create_model, list_models, patchify, take, unpatchify
from modeling_pretrain import MAE, SemMAE
from modeling_targets import pixel_statistics
from optim_factory import param_groups
from scripts.benchmarks.published import StraightforwardMAE
from unimim.checkpoint.files import load_checkpoint, save_encoder
from unimim.checkpoint.loading import load_pretrained
from unimim.engine.monitor import count_flops

SMALL = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
DECODER = {"decoder_embed_dim": 24, "decoder_depth": 2, "decoder_num_heads": 3}


def small(cls=MAE, **options) -> MAE:
    torch.manual_seed(0)
    model = cls(**{"input_size": (16, 24), **SMALL, **DECODER, **options})
    for (
        name,
        parameter,
    ) in model.named_parameters():  # away from what the start makes equal: zeros, ones
        if parameter.requires_grad:
            parameter.data.add_(
                0.05
                * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
            )
    return model


def pictures(count: int = 3, size: tuple[int, int] = (16, 24)) -> Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1))


def straightforward(model: MAE, images: Tensor, noise: Tensor) -> Tensor:
    """The loss by the published course of things."""
    return StraightforwardMAE.forward(model, {"image": images}, noise)["loss"]


def gradients(loss: Tensor, model: MAE) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("norm_pix_loss", [False, True])
@pytest.mark.parametrize("depth", [1, 2])
def test_less_work_gives_the_same_numbers(norm_pix_loss, depth):
    model = small(norm_pix_loss=norm_pix_loss, decoder_depth=depth)
    images, noise = pictures(), torch.rand(3, 24)
    ours, theirs = model({"image": images}, noise)["loss"], straightforward(model, images, noise)
    assert torch.equal(ours, model({"image": images, "noise": noise})["loss"])
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    ours, theirs = gradients(ours, model), gradients(theirs, model)
    assert (
        ours.keys()
        == theirs.keys()
        == {name for name, p in model.named_parameters() if p.requires_grad}
    )
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_less_work_is_less():
    model, images, noise = small(), pictures(), torch.rand(3, 24)
    ours = count_flops(lambda: model({"image": images}, noise)["loss"].backward())
    theirs = count_flops(lambda: straightforward(model, images, noise).backward())
    assert ours < 0.95 * theirs


def test_recomputed_activations_change_nothing():
    images, noise = pictures(), torch.rand(3, 24)
    plain, saving = small(), small(grad_checkpointing=True)
    ours, theirs = (gradients(m({"image": images}, noise)["loss"], m) for m in (saving, plain))
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, msg=name)


@pytest.mark.parametrize(
    ("name", "total", "encoder"),
    [
        ("mae_base_patch16_224", 111_655_680, 85_647_360),
        ("mae_large_patch16_224", 329_239_296, 303_099_904),
        ("mae_huge_patch14_224", 656_613_964, 630_435_840),
        ("semmae_base_patch16_224", 111_655_680, 85_647_360),
    ],
)
def test_published_sizes(name, total, encoder):
    with torch.device("meta"):
        model = create_model(name)
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    assert sum(trained.values()) == total
    assert (
        sum(n for name, n in trained.items() if not name.startswith(("decoder_", "mask_token")))
        == encoder
    )
    assert model.decoder_pos_embed.shape == (1, 257 if "huge" in name else 197, 512)


def test_every_published_name_is_there():
    mae = {f"mae_{size}_patch16_224" for size in ("tiny", "small", "base", "large")} | {
        "mae_huge_patch14_224"
    }
    semmae = {f"semmae_{size}_patch16_224" for size in ("tiny", "small", "base", "large")} | {
        "semmae_base_patch8_224"
    }
    vit = {
        f"vit_{size}_patch{p}_224"
        for size in ("tiny", "small", "base", "large", "huge")
        for p in (16, 14, 8)
    }
    assert mae | semmae | vit <= set(list_models())


def test_starting_values():
    """Xavier with the joint projection as one matrix, the convolution's bias
    as torch draws it."""
    torch.manual_seed(0)
    model = MAE(input_size=32, patch_size=8, embed_dim=128, depth=1, num_heads=2, **DECODER)
    for module, fan in ((model.blocks[0].attn.qkv, 4 * 128), (model.blocks[0].mlp.fc1, 5 * 128)):
        assert float(module.weight.detach().abs().max()) == pytest.approx(
            math.sqrt(6 / fan), rel=1e-3
        )
        assert not module.bias.any()
    projection = model.patch_embed.proj
    assert float(projection.weight.detach().abs().max()) == pytest.approx(
        math.sqrt(6 / (128 + 192)), rel=1e-3
    )
    assert 0.9 / math.sqrt(192) < projection.bias.abs().max() <= 1 / math.sqrt(192)
    for token in (model.cls_token, model.mask_token):
        assert 0.01 < token.std() < 0.03
    assert not model.pos_embed.requires_grad and not model.decoder_pos_embed.requires_grad


def test_tokens_are_decayed_and_positions_left_alone():
    model = small()
    decayed = {
        id(p) for group in param_groups(model, 0.05) if group["decay"] for p in group["params"]
    }
    grouped = {id(p) for group in param_groups(model, 0.05) for p in group["params"]}
    assert {id(model.cls_token), id(model.mask_token)} <= decayed
    assert not {id(model.pos_embed), id(model.decoder_pos_embed)} & grouped
    assert id(model.decoder_blocks[0].norm1.weight) in grouped - decayed


def test_patches_and_back():
    images = pictures()
    patches = patchify(images, (4, 8))
    assert patches.shape == (3, 12, 96)
    assert torch.equal(patches[1, 4].view(4, 8, 3), images[1, :, 4:8, 8:16].permute(1, 2, 0))
    assert torch.equal(unpatchify(patches, (4, 3), (4, 8)), images)


# --------------------------------------------------------------------------------------------------
# Pictures


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_reconstruction(norm_pix_loss):
    model, images, noise = small(norm_pix_loss=norm_pix_loss), pictures(), torch.rand(3, 24)
    original, masked, predicted, pasted = model.reconstruct({"image": images}, noise)
    assert original is images
    seen = torch.ones(3, 24, 48).scatter_(1, noise.argsort(1)[:, 6:, None].expand(-1, -1, 48), 0.0)
    seen = unpatchify(seen, (4, 6), (4, 4))
    assert torch.equal(masked, images * seen)
    assert torch.equal(pasted, images * seen + predicted * (1 - seen))
    patches, target = patchify(predicted, (4, 4)), patchify(images, (4, 4))
    if norm_pix_loss:  # in units of the true patch, the error is the loss
        mean, deviation = pixel_statistics(target)
        patches, target = (patches - mean) / deviation, (target - mean) / deviation
    hidden = noise.argsort(1)[:, 6:]
    error = F.mse_loss(take(patches, hidden), take(target, hidden))
    torch.testing.assert_close(error, model({"image": images}, noise)["loss"], rtol=1e-5, atol=1e-5)


def test_reconstruction_leaves_tokens_out_that_take_no_part():
    model = small(SemMAE, token_share=0.5)
    cells = torch.arange(0, 24, 2).expand(3, -1)
    batch = {
        "image": pictures(),
        "part_ids": torch.zeros(3, 4, 6, dtype=torch.uint8),
        "cells": cells,
    }
    pasted = patchify(model.reconstruct(batch).pasted, (4, 4))
    assert (pasted[:, ::2] != 0).all() and not pasted[:, 1::2].any()


# --------------------------------------------------------------------------------------------------
# SemMAE


def parts_of(count: int = 3, parts: int = 5) -> Tensor:
    return torch.randint(
        parts, (count, 4, 6), generator=torch.Generator().manual_seed(2), dtype=torch.uint8
    )


def test_masks_follow_the_parts():
    model = small(SemMAE, num_parts=5, mask_lambda=0.0)
    noise = torch.rand(3, 24), torch.rand(3, 5)
    order = model.random_masking({"part_ids": parts_of()}, noise)
    assert torch.equal(order, semantic_mask(parts_of().flatten(1), 0.75, 0.0, 5, *noise).order)
    hidden = torch.zeros(3, 24).scatter_(1, order[:, 6:], 1.0)
    for ids, mask, parts in zip(parts_of().flatten(1), hidden, noise[1].argsort(1), strict=True):
        assert mask[ids == parts[0]].all(), "the first part in the random order is hidden whole"


def test_the_weight_falls_over_the_runs_own_epochs():
    model = small(SemMAE, mask_lambda_power=0.5)
    weights = []
    for epoch in range(4):
        model.before_epoch(epoch, 4)
        weights.append(model.masking.mask_lambda)
    assert weights == pytest.approx([0.5, 1 - math.sqrt(0.5), 1 - math.sqrt(0.75), 0.0])
    out = model({"image": pictures(), "part_ids": parts_of()})
    assert out["mask_lambda"] == 0 and not out["mask_lambda"].requires_grad
    constant = small(SemMAE, mask_lambda=0.3)
    constant.before_epoch(3, 4)
    assert constant.masking.mask_lambda == 0.3


def test_choosing_tokens():
    scores = torch.rand(3, 4, 6)
    best = small(SemMAE, token_share=0.5, token_selection="score")
    assert {"part_ids", "part_scores"} <= set(best.views)
    order = best.random_masking(
        {"image": pictures(), "part_ids": parts_of(), "part_scores": scores}
    )
    assert torch.equal(order.sort(1).values, scores.flatten(1).topk(12).indices.sort(1).values)
    some = small(SemMAE, token_share=0.5)
    noise = torch.rand(3, 12), torch.rand(3, 7), torch.rand(3, 24)
    batch = {"image": pictures(), "part_ids": parts_of()}
    order = some.random_masking(batch, noise)
    assert torch.equal(order.sort(1).values, noise[2].argsort(1)[:, :12].sort(1).values)
    listed = batch | {"cells": noise[2].argsort(1)[:, :12]}
    assert torch.equal(some.random_masking(listed, noise[:2]), order)
    assert torch.equal(some.random_masking(batch | {"noise": torch.cat(noise, 1)}), order)
    assert some.noise_size == 12 + 7 + 24 and best.noise_size == 12 + 7
    changed = batch["image"].clone()
    left_out = unpatchify(
        torch.ones(3, 24, 48).scatter_(1, order[..., None].expand(-1, -1, 48), 0.0), (4, 6), (4, 4)
    )
    changed += left_out
    assert torch.equal(
        some(listed, noise[:2])["loss"], some(listed | {"image": changed}, noise[:2])["loss"]
    )


def test_the_published_setting_of_small_patches():
    with torch.device("meta"):
        model = create_model("semmae_base_patch8_224")
    assert (model.masking.num_tokens, model.pos_embed.shape[1]) == (196, 785)


@pytest.mark.parametrize(
    ("cls", "options", "said"),
    [
        (MAE, {"mask_ratio": 1.0}, "--mask_ratio is 1.0"),
        (MAE, {"mask_ratio": 0.97}, "leaves 0 of 24"),
        (SemMAE, {"token_share": 0.1}, "leaves 0 of 2"),
        (SemMAE, {"mask_lambda": 1.5}, "mask_lambda=1.5 does not lie between 0 and 1"),
        (SemMAE, {"count_fix": "none"}, "count_fix=none is unknown"),
        (SemMAE, {"token_selection": "best"}, "token_selection=best is unknown"),
        (SemMAE, {"lambda_schedule": "linear"}, "mask_lambda_schedule=linear is unknown"),
    ],
)
def test_what_is_refused(cls, options, said):
    with pytest.raises(ValueError, match=said):
        small(cls, **options)


def test_options_of_another_variant_are_refused():
    for options in ({"rel_pos_bias": "shared"}, {"pos_embed": "learned"}, {"temperature": 0.1}):
        with pytest.raises(ValueError, match=f"^{next(iter(options))}=.* is not an option of"):
            create_model("mae_tiny_patch16_224", **options)


# --------------------------------------------------------------------------------------------------
# Checkpoints


def test_the_exported_encoder_is_timms(tmp_path):
    model = small(input_size=16).eval()
    save_encoder(tmp_path / "encoder.safetensors", model.encoder_state_dict(), {"format": "timm"})
    sizes = {
        "img_size": 16,
        "patch_size": 4,
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 2,
        "num_classes": 0,
    }
    theirs = timm.models.VisionTransformer(**sizes).eval()
    theirs.load_state_dict(load_checkpoint(tmp_path / "encoder.safetensors"), strict=True)
    images = pictures(size=(16, 16))
    cells = torch.arange(16).expand(3, -1)
    ours = model.forward_encoder(patchify(images, (4, 4)), cells)
    torch.testing.assert_close(ours, theirs.forward_features(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pool", ["avg", "token"])
def test_a_published_file_is_fine_tuned(pool):
    """The file holds the whole autoencoder under `model`, on a grid of its own."""
    model = small(SemMAE, input_size=32)
    options = {**SMALL, "input_size": 16, "num_classes": 5, "global_pool": pool}
    classifier = create_model("vit_tiny_patch16_224", **options)
    report = load_pretrained(classifier, {"model": model.state_dict(), "epoch": 99})
    assert report.matched == 1.0
    assert report.interpolated == ["pos_embed"]
    missing = ["head.weight", "head.bias"]
    assert report.missing == (
        ["fc_norm.weight", "fc_norm.bias", *missing] if pool == "avg" else missing
    )
    assert torch.equal(classifier.blocks[1].attn.qkv.bias, model.blocks[1].attn.qkv.bias)
    assert classifier.pos_embed.requires_grad
    assert float(classifier.head.weight.detach().std()) == pytest.approx(2e-5, rel=0.3)


def test_listed_patches_are_all_that_a_classifier_sees():
    classifier = create_model(
        "vit_tiny_patch16_224", **SMALL, input_size=16, num_classes=5, init_scale=1.0
    ).eval()
    images, cells = pictures(size=(16, 16)), torch.tensor([[3, 0, 9], [1, 2, 3], [15, 7, 4]])
    every = torch.stack([torch.randperm(16) for _ in images])
    torch.testing.assert_close(classifier(images, every), classifier(images))
    patches = patchify(images, (4, 4))
    patches = torch.randn_like(patches).scatter(
        1, cells[..., None].expand(-1, -1, 48), take(patches, cells)
    )
    elsewhere = unpatchify(patches, (4, 4), (4, 4))
    torch.testing.assert_close(classifier(elsewhere, cells), classifier(images, cells))
