"""Adapters of SemMAE's cases: pre-training, semantic masks, mirrored samples, fine-tuning."""

import torch
import torch.nn.functional as F
from torch import Tensor

from masking_generator import mask_lambda_schedule, others_first, semantic_mask
from modeling_finetune import patchify, take, unpatchify
from modeling_pretrain import SemMAE
from modeling_targets import put
from reference.case import Case
from reference.common import gradients, load_weights, mae_classifier, normalized
from reference.mae import autoencoder_parts, mae_options


def semmae(case: Case) -> dict[str, Tensor]:
    """On the ordinary image and part map, and the same again on the tokens that upstream's layout
    lists."""
    config, inputs = case.config, case.inputs()
    options = {"num_parts": config["num_parts"], "mask_lambda": config["mask_lambda"]}
    model = SemMAE(**mae_options(config), **options)
    load_weights(model, case.inputs("weights/"))
    cells, noise = inputs["sorted_index"], (inputs["noise_tokens"], inputs["noise_parts"])
    batch = {"image": normalized(inputs["image"]), "part_ids": inputs["part_map"]}
    if cells.tolist() != [list(range(model.patch_embed.num_patches))] * len(cells):
        batch["cells"] = cells
    loss = model(batch, noise)["loss"]
    loss.backward()
    computed, order, visible = autoencoder_parts(model, batch, noise)
    masks = semantic_mask(
        inputs["part_ids"], config["mask_ratio"], config["mask_lambda"], config["num_parts"], *noise
    )
    assert torch.equal(order, cells.gather(1, masks.order)) and masks.visible == visible
    packed_image = unpack(inputs["packed"], model.patch_embed.grid_size, config)
    shown = cells.unsqueeze(-1).expand(-1, -1, computed["pred"].shape[-1])
    torch.testing.assert_close(model(batch | {"image": packed_image}, noise)["loss"], loss)
    return (
        {
            "loss": loss.view(1),
            "latent": computed["latent"],
            "pred": computed["pred"].gather(1, shown),
        }
        | {"mask": masks.mask, "sorted_index_shuffled": cells.gather(1, masks.shuffle)}
        | in_shuffled_order(masks)
        | gradients(model)
    )


def unpack(packed: Tensor, grid: tuple[int, int], config: dict) -> Tensor:
    """The listed patches of upstream's samples at their cells of an image that is 0 elsewhere."""
    first = packed.shape[-1] - 3 * config["patch_size"] ** 2
    pixels, cells = packed[..., first:], packed[..., first - 1].long()
    canvas = torch.zeros(len(packed), grid[0] * grid[1], pixels.shape[-1])
    return unpatchify(put(canvas, cells, pixels), grid, (config["patch_size"],) * 2)


def in_shuffled_order(masks) -> dict[str, Tensor]:
    """The published outputs refer to positions in the shuffled order of the tokens."""
    ids_shuffle = others_first(masks.selected)
    ids_restore = ids_shuffle.argsort(1)
    return {
        "mask_shuffled": (ids_restore >= masks.visible).float(),
        "ids_keep": ids_shuffle[:, : masks.visible],
        "ids_restore": ids_restore,
    }


def semmae_mask(case: Case) -> dict[str, Tensor]:
    config, inputs = case.config, case.inputs()
    masks = semantic_mask(
        inputs["part_ids"], config["mask_ratio"], config["mask_lambda"], config["num_parts"],
        inputs["noise_tokens"], inputs["noise_parts"],
    )  # fmt: skip
    return in_shuffled_order(masks) | {
        "token_perm": masks.shuffle,
        "part_perm": masks.part_order,
        "intra_count": masks.intra,
        "inter_count": masks.inter,
        "mask_count": masks.count,
        "selected": masks.selected.float(),
        "mask": masks.mask,
        "kept_tokens": masks.order[:, : masks.visible],
    }


def semmae_flip(case: Case) -> dict[str, Tensor]:
    """A packed sample flipped as our data path does it: the whole image and the grid of cells are
    mirrored."""
    config, packed = case.config, case.inputs()["packed"]
    side, patch = config["grid"], config["patch_size"]
    first_pixel = packed.shape[-1] - 3 * patch * patch
    cells, pixels = packed[None, :, first_pixel - 1].long(), packed[None, :, first_pixel:]
    canvas = put(torch.zeros(1, side * side, pixels.shape[-1]), cells, pixels)
    mirrored = unpatchify(canvas, (side, side), (patch, patch)).flip(-1)
    seat = torch.arange(side * side).view(side, side).flip(-1).flatten()[cells]
    pixels = take(patchify(mirrored, (patch, patch)), seat)
    return {
        "packed_flipped": torch.cat(
            (packed[:, : first_pixel - 1], seat[0, :, None].float(), pixels[0]), 1
        )
    }


def semmae_finetune_tokens(case: Case) -> dict[str, Tensor]:
    inputs = case.inputs()
    model = mae_classifier(case.config, pos_embed="sincos")
    load_weights(model, case.inputs("weights/"))
    logits = model(normalized(inputs["image"]), cells=inputs["sorted_index"])
    loss = F.cross_entropy(logits, inputs["target"])
    loss.backward()
    return {"logits": logits, "loss": loss.view(1)} | gradients(model)


def lambda_schedule(case: Case) -> dict[str, Tensor]:
    config, epoch = case.config, case.inputs()["epoch"].numpy()
    total = config["total_epochs"]
    values = {
        f"power_{power}".replace(".", "p"): mask_lambda_schedule(epoch, total, power)
        for power in config["powers"]
    }
    values |= {
        kind: mask_lambda_schedule(epoch, total, kind=kind) for kind in ("increasing", "cosine")
    }
    return {name: torch.from_numpy(value) for name, value in values.items()}


# the folder of cases: its adapter
ADAPTERS = {
    "semmae": semmae,
    "semmae_mask": semmae_mask,
    "semmae_flip": semmae_flip,
    "semmae_finetune_tokens": semmae_finetune_tokens,
    "mask_lambda_schedule": lambda_schedule,
}
