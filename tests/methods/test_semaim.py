"""SemAIM: orders on any grid, no patch sees what is not earlier, and the sorted form computes what
the masks do."""

import math

import numpy as np
import pytest
import timm
import torch
from torch import Tensor

from analysis import visualize
from masking_generator import ORDERS_WITHOUT_NOISE, PATCH_ORDERS, patch_order, visible_patches
from modeling_finetune import create_model, list_models, patchify, take, unpatchify
from modeling_pretrain import SemAIM, build_semaim
from modeling_targets import pixel_statistics
from scripts.benchmarks.published import make_straightforward
from unimim.checkpoint.files import load_checkpoint, save_encoder
from unimim.checkpoint.loading import load_pretrained
from unimim.engine.monitor import count_flops

GRIDS = [(side, side) for side in range(6, 21)] + [(6, 9), (14, 7)]
SMALL = {
    "input_size": (16, 24),
    "patch_size": 4,
    "embed_dim": 32,
    "depth": 4,
    "num_heads": 2,
    "query_depth": 2,
}
BLUR = {"gaussian_kernel_size": 5, "gaussian_sigma": 1.0}
VARIANTS = {
    "pixels": BLUR,
    "as_many_query_blocks": {"query_depth": 4, "prediction_head_type": "LINEAR", "loss_type": "L1"},
    "shared_weights": {"share_weight": True, "norm_pix_loss": False},
    "own_features": {"predict_feature": "inference", "attention_type": "gap"},
    "of_the_average": {"use_ema_model": True, "predict_feature": "ema", "attention_type": "self"},
    "given_features": {"predict_feature": "clip", "out_dim": 20},
}


def small(**options) -> SemAIM:
    torch.manual_seed(0)
    model = build_semaim(**{**SMALL, **options})
    networks = [model] if model.teacher is None else [model, model.teacher]
    for network in networks:  # away from what the start makes equal: zeros, ones
        for name, parameter in network.named_parameters():
            if name != "pos_embed":
                draws = torch.Generator().manual_seed(len(name))
                parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=draws))
    return model


def pictures(count: int = 3, size: tuple[int, int] = (16, 24)) -> Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1))


def batch_for(model: SemAIM, count: int = 3) -> dict[str, Tensor]:
    """Draw far enough apart that rounding makes no two order values equal."""
    generator = torch.Generator().manual_seed(2)
    noise = torch.rand(count, model.noise_size, generator=generator).argsort(1) / max(
        model.noise_size, 1
    )
    tokens = torch.randn(count, 25, 20, generator=generator)
    return {"image": pictures(count), "noise": noise, "target_tokens": tokens}


def loss_and_gradients(model: SemAIM, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(batch)["loss"]
    loss.backward()
    return loss.detach(), {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


def draws_for(kind: str, grid: tuple[int, int], count: int = 4) -> dict[str, Tensor]:
    generator, cells = torch.Generator().manual_seed(grid[0]), math.prod(grid)
    return {
        "noise": torch.rand(count, cells, generator=generator),
        "attention": torch.rand(count, cells, generator=generator),
        "center_noise": torch.rand(count, 2, generator=generator),
    }


# --------------------------------------------------------------------------------------------------
# Orders


def places(order: Tensor, grid: tuple[int, int]) -> np.ndarray:
    """Row and column of the patches of one image, earliest first: [N, 2]."""
    return np.stack(np.unravel_index(order.argsort(stable=True).numpy(), grid), axis=1)


@pytest.mark.parametrize("grid", GRIDS)
def test_fixed_orders(grid):
    assert patch_order("zigzag", grid).flatten().tolist() == list(range(math.prod(grid)))
    walk = places(patch_order("raster", grid)[0], grid)
    assert (np.abs(np.diff(walk, axis=0)).sum(1) == 1).all(), (
        "each patch is a neighbor of the one before"
    )
    assert walk[0].tolist() == [0, 0] and (np.diff(walk[:, 0]) >= 0).all()


@pytest.mark.parametrize("grid", GRIDS)
def test_random_and_attention_orders(grid):
    draws = draws_for("stochastic", grid)
    assert torch.equal(patch_order("stochastic", grid, draws["noise"]), draws["noise"])
    attention = (draws["attention"] * 8).round() / 8
    order = patch_order("attention", grid, attention=attention)
    assert torch.equal(order, 1 - attention)
    visible = visible_patches(order, itself=True)
    tied = attention[:, :, None] == attention[:, None]
    assert (
        visible[:, 1:, 1:][tied].all()
        and not visible_patches(order, itself=False)[:, 1:, 1:][tied].any()
    )


@pytest.mark.parametrize("grid", GRIDS)
def test_distance_orders(grid):
    """Nearer to the maximum is earlier; at equal distance the noise decides, up to what float32
    tells apart."""
    draws = draws_for("attention_center", grid)
    orders = patch_order("attention_center", grid, **draws)
    for order, attention, noise in zip(orders, draws["attention"], draws["noise"], strict=True):
        walk, center = places(order, grid), np.unravel_index(int(attention.argmax()), grid)
        squared = ((walk - np.array(center)) ** 2).sum(1)
        assert squared[0] == 0 and (np.diff(squared) >= 0).all()
        draw = noise.view(grid).numpy()[tuple(walk.T)]
        same = np.diff(squared) == 0
        assert (np.diff(draw)[same] > -0.003).all()


# The published table (docs/methods/semaim.md#windows-on-the-grid-of-14)
TABLE = {
    2: (0, 0, 0, 2, 3, 4, 5, 6, 7, 8, 9, 11, 11, 11),
    6: (0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 7, 7, 7),
    10: (0, 0, 0, 0, 0, 0, 1, 2, 3, 3, 3, 3, 3, 3),
}


def counted(grid: tuple[int, int], center: tuple[int, int]) -> np.ndarray:
    """Windows that hold each patch, patch by patch."""
    count = np.zeros(grid)
    for width in (2, 6, 10):
        if width >= max(grid):
            continue
        corner = [
            TABLE[width][c] if side == 14 else min(max(c - width // 2, 0), max(side - width, 0))
            for c, side in zip(center, grid, strict=True)
        ]
        for row, column in np.ndindex(*grid):
            count[row, column] += all(
                0 <= x - first < width for x, first in zip((row, column), corner, strict=True)
            )
    return count


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("kind", ["stochastic_center", "attention_guided"])
def test_windows_around_a_centre(kind, grid):
    draws = draws_for(kind, grid)
    orders = patch_order(kind, grid, **draws)
    for image, (order, noise) in enumerate(zip(orders, draws["noise"], strict=True)):
        if kind == "attention_guided":
            center = np.unravel_index(int(draws["attention"][image].argmax()), grid)
        else:
            center = tuple(
                int(u * (side - 1))
                for u, side in zip(draws["center_noise"][image], grid, strict=True)
            )
        count = torch.from_numpy(counted(grid, center)).float().flatten()
        torch.testing.assert_close(order, noise - count)


@pytest.mark.parametrize("grid", GRIDS)
def test_windows_around_the_middle(grid):
    noise = draws_for("center2out", grid)["noise"]
    count = torch.zeros(grid)
    for reach in (1, 3, 5):
        rows, columns = (slice(max(side // 2 - reach, 0), side // 2 + reach) for side in grid)
        count[rows, columns] += 1
    torch.testing.assert_close(patch_order("center2out", grid, noise), noise - count.flatten())
    first = places(patch_order("center2out", grid, noise)[0], grid)[:4]
    assert sorted(map(tuple, first.tolist())) == [
        (r, c) for r in (grid[0] // 2 - 1, grid[0] // 2) for c in (grid[1] // 2 - 1, grid[1] // 2)
    ]


def test_every_centre_of_the_published_table():
    for cell in range(196):
        attention = torch.zeros(1, 196)
        attention[0, cell] = 1.0
        count = -patch_order("attention_guided", (14, 14), torch.zeros(1, 196), attention)
        assert torch.equal(
            count.view(14, 14).double(), torch.from_numpy(counted((14, 14), divmod(cell, 14)))
        )


def test_the_class_token_sees_itself_and_is_seen():
    order = torch.tensor([[0.5, 0.1, 0.5]])
    content, query = (
        visible_patches(order, itself=itself)[0].int().tolist() for itself in (True, False)
    )
    assert content == [[1, 0, 0, 0], [1, 1, 1, 1], [1, 0, 1, 0], [1, 1, 1, 1]]
    assert query == [[1, 0, 0, 0], [1, 0, 1, 0], [1, 0, 0, 0], [1, 0, 1, 0]]


# --------------------------------------------------------------------------------------------------
# Two forms, one method


@pytest.mark.parametrize("kind", PATCH_ORDERS)
def test_sorted_tokens_compute_what_masks_do_for_every_order(kind):
    equal_in_loss_and_gradients(permutation_type=kind)


@pytest.mark.parametrize("variant", VARIANTS)
def test_sorted_tokens_compute_what_masks_do_for_every_target(variant):
    equal_in_loss_and_gradients(**VARIANTS[variant])


def equal_in_loss_and_gradients(**options) -> None:
    swift, dense = small(**options), small(**options, attn="eager")
    batch = batch_for(swift)
    assert (
        dense.order_values(batch, dense.attention_and_target(batch)[0]).sort(1).values.diff(dim=1)
        > 0
    ).all(), "no ties"
    loss, found = loss_and_gradients(swift, batch)
    expected_loss, expected = loss_and_gradients(dense, batch)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-6)
    assert (
        found.keys()
        == expected.keys()
        == {name for name, p in swift.named_parameters() if p.requires_grad}
    )
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-4, atol=2e-6, msg=lambda text, name=name: name + text
        )


@pytest.mark.parametrize("attention_type", ["cls", "gap", "self"])
def test_the_plain_variant_of_the_benchmark_computes_the_same(attention_type):
    swift, plain = (
        small(attention_type=attention_type, **options, **BLUR)
        for options in ({}, {"attn": "eager"})
    )
    make_straightforward(plain)
    batch = batch_for(swift)
    (loss, gradients), (plain_loss, plain_gradients) = (
        loss_and_gradients(m, batch) for m in (swift, plain)
    )
    torch.testing.assert_close(loss, plain_loss, rtol=1e-6, atol=1e-6)
    assert gradients.keys() == plain_gradients.keys()
    for name, gradient in plain_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    assert count_flops(lambda: swift(batch)) < count_flops(lambda: plain(batch))


def test_reduced_precision_keeps_the_causal_form():
    """On a CPU bf16 takes the explicit kernel, with one small mask for all images and heads."""
    swift = small()
    batch = batch_for(swift)
    exact, _ = loss_and_gradients(swift, batch)
    with torch.autocast("cpu", torch.bfloat16):
        rounded, found = loss_and_gradients(swift, batch)
    assert 0 < abs(exact - rounded) < 0.02 * exact
    assert found.keys() == {name for name, p in swift.named_parameters() if p.requires_grad}
    attention, x = swift.blocks[0].attn, torch.randn(2, 9, 32)
    fused = attention(x, causal=True)
    attention.kernel = "eager"
    torch.testing.assert_close(attention(x, causal=True), fused)
    torch.testing.assert_close(attention(x[:, :5], causal=True), fused[:, :5])


def test_recomputed_activations_change_nothing():
    plain, saving = small(), small(grad_checkpointing=True)
    for name, gradient in loss_and_gradients(plain, batch_for(plain))[1].items():
        torch.testing.assert_close(
            loss_and_gradients(saving, batch_for(plain))[1][name], gradient, msg=name
        )


def test_no_mask_and_no_probabilities_are_made():
    """The fused form needs no [B, 1, T, T] mask and keeps no [B, h, T, T] probabilities for the
    backward pass."""
    sizes = {}
    for attn in ("auto", "eager"):
        model, largest = (
            small(attn=attn, permutation_type="zigzag", input_size=48, embed_dim=8, num_heads=1),
            [],
        )

        def keep(tensor: Tensor, largest=largest) -> Tensor:
            largest.append(tensor.numel() if tensor.shape[-1:] == tensor.shape[-2:-1] else 0)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model({"image": pictures(size=(48, 48))})
        sizes[attn] = max(largest)
    assert sizes["eager"] >= 144**2 > sizes["auto"]


def predictions(model: SemAIM, images: Tensor, order: Tensor) -> Tensor:
    """Of the patches in row-major order, [B, N, P]."""
    if model.explicit_masks:
        return model.prediction_head(model.norm(model.masked_streams(images, order)[1]))[:, 1:]
    cells = order.argsort(dim=1, stable=True)
    predicted = model.prediction_head(model.norm(model.causal_streams(images, cells)[1]))
    return take(predicted, cells.argsort(1))


@pytest.mark.parametrize("attn", ["auto", "eager"])
@pytest.mark.parametrize("kind", PATCH_ORDERS)
@torch.no_grad()
def test_no_prediction_depends_on_what_is_not_earlier(kind, attn):
    """Each patch in turn is changed, one in every image of a batch."""
    model = small(attn=attn, query_depth=4, depth=4)
    draws = {name: value[:1] for name, value in draws_for(kind, (4, 6)).items()}
    order = patch_order(kind, (4, 6), **draws).expand(25, -1)
    patches = patchify(pictures(1), (4, 4)).repeat(25, 1, 1)
    for cell in range(24):
        patches[1 + cell, cell] += 1.0
    predicted = predictions(model, unpatchify(patches, (4, 6), (4, 4)), order)
    moved = (predicted[1:] - predicted[:1]).abs().amax(-1)  # [changed patch, predicted patch]
    changed, seen = order[0, :, None], order[:1]
    assert (changed < seen).sum() == 24 * 23 / 2, "no ties among these"
    assert moved[changed >= seen].max() < 1e-6
    assert moved[changed < seen].min() > 1e-5


@pytest.mark.parametrize("options", [{"attn": "eager"}, {"permutation_type": "attention"}])
@torch.no_grad()
def test_tied_patches_do_not_predict_one_another_under_masks(options):
    model = small(**options)
    order = torch.zeros(1, 24)
    order[:, 12:] = 1.0
    images, changed = pictures(1), pictures(1)
    changed[..., 8:, :] = 0.0  # rows 2 and 3 of the patches
    assert torch.equal(predictions(model, images, order), predictions(model, changed, order))


# --------------------------------------------------------------------------------------------------
# The map


def test_the_map_takes_no_more_of_the_last_block_than_it_needs():
    flops = {}
    for kind in ("cls", "gap", "self"):
        model = small(attention_type=kind)
        flops[kind] = count_flops(lambda model=model: model.attention_map(pictures()))
    block = count_flops(lambda: model.blocks[-1](torch.zeros(3, 25, 32)))
    assert flops["self"] < flops["gap"] < flops["cls"]
    assert flops["cls"] - flops["self"] > 0.7 * block
    assert flops["cls"] < 4.3 * block, "four blocks once, patches and norm"


def test_precision_of_the_map():
    maps = {}
    for precision in ("fp32", "auto"):
        model = small(order_precision=precision)
        with torch.autocast("cpu", torch.bfloat16):
            maps[precision] = model.attention_map(pictures())
        maps["plain"] = model.attention_map(pictures())
    assert torch.equal(maps["fp32"], maps["plain"])
    assert not torch.equal(maps["auto"], maps["plain"])
    torch.testing.assert_close(maps["auto"], maps["plain"], rtol=1e-2, atol=1e-3)


def test_the_map_is_made_without_dropout_and_training_goes_on():
    model = small(drop_path=0.5, drop=0.3).train()
    maps = [model.attention_map(pictures()) for _ in range(2)]
    assert torch.equal(*maps) and not maps[0].requires_grad
    assert model.training and model.blocks[1].training
    assert [block.drop_path.drop_prob for block in model.query_blocks] == pytest.approx(
        [0.0, 0.5 / 3]
    )


def test_the_ema_gives_the_map_if_there_is_one():
    model, alone = small(use_ema_model=True), small()
    for parameter in alone.parameters():
        parameter.data.add_(
            0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5))
        )
    model.load_state_dict(alone.state_dict())
    batch = {"image": pictures()}
    assert torch.equal(model.attention_and_target(batch)[0], small().attention_and_target(batch)[0])
    assert not torch.equal(
        model.attention_and_target(batch)[0], alone.attention_and_target(batch)[0]
    )


def test_features_that_are_predicted():
    batch = batch_for(small())
    model = small(predict_feature="inference", permutation_type="zigzag")
    _, target = model.attention_and_target(batch)
    with torch.no_grad():
        tokens = model.norm(model.forward_features(batch["image"]))
    torch.testing.assert_close(target, tokens[:, 1:])
    given = small(predict_feature="dino", out_dim=20)
    attention, target = given.attention_and_target(batch)
    features = batch["target_tokens"]
    assert torch.equal(target, features[:, 1:]) and given.prediction_head.fc2.out_features == 20
    cosine = torch.cosine_similarity(features[:, :1], features[:, 1:], dim=-1)
    torch.testing.assert_close(attention.min(1).values, torch.zeros(3))
    assert torch.equal(attention.argsort(1), cosine.argsort(1))
    assert small(predict_feature="clip", out_dim=20, permutation_type="raster").noise_size == 0


# --------------------------------------------------------------------------------------------------
# Pictures


@pytest.mark.parametrize(
    "options", [BLUR, {"norm_pix_loss": False}, {"permutation_type": "raster", "loss_type": "L1"}]
)
def test_the_error_of_a_reconstruction_is_the_loss(options):
    model = small(**options)
    batch = batch_for(model)
    original, known, predicted, pasted = model.reconstruct(batch)
    assert original is batch["image"]
    blurred = original if model.gaussian_blur is None else model.gaussian_blur(original)
    patches, target = patchify(predicted, (4, 4)), patchify(blurred, (4, 4))
    if model.target.norm_pix_loss:
        mean, deviation = pixel_statistics(target)
        patches, target = (patches - mean) / deviation, (target - mean) / deviation
    error = (
        (patches - target).abs() if model.target.loss_type == "L1" else (patches - target).square()
    )
    torch.testing.assert_close(error.mean(), model(batch)["loss"].detach(), rtol=1e-4, atol=1e-5)
    order = model.order_values(batch, model.attention_and_target(batch)[0])
    first = torch.zeros(3, 24, 48).scatter_(
        1, order.argsort(1)[:, :6, None].expand(-1, -1, 48), 1.0
    )
    first = unpatchify(first, (4, 6), (4, 4))
    assert torch.equal(known, original * first) and torch.equal(
        pasted, original * first + predicted * (1 - first)
    )


@pytest.mark.parametrize("kind", PATCH_ORDERS)
def test_both_variants_make_the_same_images(kind):
    pictures_of = [small(permutation_type=kind, attn=attn, **BLUR) for attn in ("auto", "eager")]
    batch = batch_for(pictures_of[0])
    for ours, theirs in zip(*(model.reconstruct(batch) for model in pictures_of), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_which_methods_can_be_visualized():
    assert [small(**VARIANTS[name]).predicts_pixels for name in VARIANTS] == [True] * 3 + [
        False
    ] * 3


@pytest.mark.parametrize("attention_type", ["cls", "gap", "self"])
def test_visualized_orders_are_those_of_the_method(attention_type):
    model = small(attention_type=attention_type).eval()
    maps = visualize.order_maps(model, pictures())
    expected = model.attention_map(pictures())
    assert torch.equal(maps[attention_type].argsort(1), expected.argsort(1))
    draws = torch.Generator().manual_seed(7)
    noise, center_noise = torch.rand(3, 24, generator=draws), torch.rand(3, 2, generator=draws)
    for kind in PATCH_ORDERS:
        order = patch_order(kind, (4, 6), noise, expected, center_noise).expand(3, -1)
        places = visualize.ranks(kind, (4, 6), maps[attention_type], seed=7)
        assert torch.equal(places.argsort(1, descending=True), order.argsort(dim=1, stable=True))
        assert torch.equal(places.sort(1).values, torch.arange(1, 25).expand(3, -1))


# --------------------------------------------------------------------------------------------------
# Draws, average, sizes, start


def test_noise_comes_with_the_sample():
    for kind in PATCH_ORDERS:
        model = small(permutation_type=kind)
        size = 0 if kind in ORDERS_WITHOUT_NOISE else 24 + 2 * (kind == "stochastic_center")
        assert (model.noise_size, "noise" in model.views) == (size, size > 0)
    model, batch = small(permutation_type="stochastic_center"), {"image": pictures()}
    noise, center_noise = torch.rand(3, 24), torch.rand(3, 2)
    loss = model(batch, (noise, center_noise))["loss"]
    assert torch.equal(loss, model(batch | {"noise": torch.cat((noise, center_noise), 1)})["loss"])
    assert not torch.equal(loss, model(batch)["loss"])


def test_the_ema_follows_by_the_published_ramp():
    model = small(use_ema_model=True)
    decays = []
    for epoch in (0, 1, 50, 99, 100, 799):
        model.before_epoch(epoch, 800)
        decays.append(model.ema_decay)
    assert decays == pytest.approx([0.999, 0.999009, 0.99945, 0.999891, 0.9999, 0.9999], abs=1e-12)
    before = model.teacher.query_blocks[0].attn.q.weight.clone()
    model.query_blocks[0].attn.q.weight.data.add_(1.0)
    model.after_step(0.5, applied=0.0)
    assert torch.equal(model.teacher.query_blocks[0].attn.q.weight, before)
    model.after_step(0.5)
    torch.testing.assert_close(
        model.teacher.query_blocks[0].attn.q.weight, before + 1e-4, rtol=0, atol=2e-6
    )


@pytest.mark.parametrize(
    ("name", "options", "trained", "frozen"),
    [
        ("semaim_base_patch16_224", {}, 175_424_256, 151_296),
        ("semaim_large_patch16_224", {}, 461_599_488, 201_728),
        ("semaim_base_patch16_224", {"share_weight": True}, 90_521_088 - 151_296, 151_296),
    ],
)
def test_published_sizes(name, options, trained, frozen):
    with torch.device("meta"):
        model = create_model(name, **options)
    counts = [
        sum(p.numel() for p in model.parameters() if p.requires_grad == state)
        for state in (True, False)
    ]
    assert counts == [trained, frozen]


def test_every_published_name_is_there():
    semaim = {f"semaim_{size}_patch16_224" for size in ("tiny", "small", "base", "large")}
    assert semaim | {"semaim_huge_patch16_224"} <= set(list_models())
    with torch.device("meta"):
        assert len(create_model("semaim_huge_patch16_224").query_blocks) == 16


def test_starting_values():
    """Xavier, the joint projection as one matrix and the separate ones as three
    (docs/methods/semaim.md#initialization)."""
    torch.manual_seed(0)
    model = SemAIM(input_size=32, patch_size=8, embed_dim=128, depth=1, num_heads=2, query_depth=1)
    for module, fan in (
        (model.blocks[0].attn.qkv, 4 * 128),
        (model.query_blocks[0].attn.k, 2 * 128),
        (model.query_blocks[0].mlp.fc1, 5 * 128),
        (model.prediction_head.fc2, 512 + 192),
    ):
        assert float(module.weight.detach().abs().max()) == pytest.approx(
            math.sqrt(6 / fan), rel=1e-3
        )
        assert not module.bias.any()
    assert 0.01 < model.cls_token.std() < 0.03 and not model.pos_embed.requires_grad


@pytest.mark.parametrize(
    ("depth", "query_depth", "step"), [(12, 12, 1), (12, 6, 2), (24, 12, 2), (7, 3, 2), (5, 2, 2)]
)
def test_query_blocks_share_out_the_encoder(depth, query_depth, step):
    model = small(depth=depth, query_depth=query_depth)
    assert model.blocks_per_query == step
    _, found = loss_and_gradients(model, batch_for(model))
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    idle = {
        name.split(".")[1]
        for name, p in model.named_parameters()
        if name.startswith("blocks.") and p.grad is None
    }
    assert idle == {str(block) for block in range(step * query_depth, depth)}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"query_depth": 5}, "query_depth=5 does not divide 4 blocks"),
        ({"query_depth": 3}, "query_depth=3 does not divide 4 blocks"),
        ({"query_depth": 0}, "query_depth=0 does not divide 4 blocks"),
        ({"permutation_type": "saliency"}, "permutation_type=saliency is unknown"),
        ({"attention_type": "map"}, "attention_type=map is unknown"),
        ({"predict_feature": "ema"}, "predict_feature=ema needs the ema that use_ema_model keeps"),
        ({"predict_feature": "clip"}, "predict_feature=clip needs target_model"),
        ({"gaussian_sigma": 1.0}, "give it together with gaussian_sigma"),
        ({"gaussian_kernel_size": 4, "gaussian_sigma": 1.0}, "must be odd"),
    ],
)
def test_what_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        small(**options)


@pytest.mark.parametrize("share_weight", [False, True])
def test_the_exported_encoder_is_timms(tmp_path, share_weight):
    model = small(input_size=16, share_weight=share_weight, query_depth=4).eval()
    save_encoder(tmp_path / "encoder.safetensors", model.encoder_state_dict(), {"format": "timm"})
    sizes = {
        "img_size": 16,
        "patch_size": 4,
        "embed_dim": 32,
        "depth": 4,
        "num_heads": 2,
        "num_classes": 0,
    }
    theirs = timm.models.VisionTransformer(**sizes).eval()
    theirs.load_state_dict(load_checkpoint(tmp_path / "encoder.safetensors"), strict=True)
    images = pictures(size=(16, 16))
    ours = model.norm(model.forward_features(images))
    torch.testing.assert_close(ours, theirs.forward_features(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("share_weight", [False, True])
@pytest.mark.parametrize("published", [False, True])
def test_a_checkpoint_is_fine_tuned(share_weight, published):
    """The published file names the model's factory under `model` and has the weights as DDP names
    them."""
    model = small(input_size=16, share_weight=share_weight)
    options = {
        "patch_size": 4,
        "embed_dim": 32,
        "depth": 4,
        "num_heads": 2,
        "input_size": 16,
        "num_classes": 5,
    }
    classifier = create_model("vit_tiny_patch16_224", **options)
    state = {"model": model.state_dict()}
    if published:
        wrapped = {f"module.{name}": value for name, value in model.state_dict().items()}
        state = {"epoch": 800, "state_dict": wrapped, "model": "aim_base"}
    report = load_pretrained(classifier, state)
    assert report.matched == 1.0
    own = model.blocks[2].attn
    expected = (
        torch.cat((own.q.weight, own.k.weight, own.v.weight)) if share_weight else own.qkv.weight
    )
    assert torch.equal(classifier.blocks[2].attn.qkv.weight, expected)
