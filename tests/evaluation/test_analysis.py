"""The analyses on functions whose answer is known, and their commands on tiny networks of every
kind."""

import csv
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import METHODS, SIZE, arguments
from torch import Tensor, nn

from analysis import attention_distance, cka, common, effective_rank, fourier, interaction
from modeling_finetune import VisionTransformer, create_model
from unimim.checkpoint.files import save_checkpoint, save_encoder
from unimim.checkpoint.runs import MEAN_STD_FLAGS
from unimim.cli.models import build_method
from unimim.cli.options import as_config
from unimim.data.views import MEAN_STD
from unimim.engine.setup import launch

CPU = torch.device("cpu")
VIT = {
    "input_size": 16,
    "patch_size": 4,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 0,
}
SWIN = {
    "img_size": 64,
    "window_size": 2,
    "embed_dim": 8,
    "depths": (1, 1, 2, 1),
    "num_heads": (1, 1, 2, 2),
}
DIGITS = ["--data_set", "digits", "--num_workers", "0", "--device", "cpu"]
VIT_FLAGS = [
    "--model",
    "vit_tiny_patch16_224",
    "--input_size",
    "16",
    "--patch_size",
    "4",
    "--model_kwargs",
    *SIZE,
]
COMMANDS = {
    "fourier": fourier, "cka": cka, "effective_rank": effective_rank,
    "attention_distance": attention_distance, "interaction": interaction,
}  # fmt: skip


def scrambled(network: nn.Module) -> nn.Module:
    torch.manual_seed(3)
    for parameter in network.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return network.eval()


def images(size: int, count: int = 2) -> Tensor:
    return torch.linspace(-2, 2, count * 3 * size**2).view(count, 3, size, size).sin()


# --------------------------------------------------------------------------------------------------
# Layers


def test_layers_of_a_vit_are_the_sums_after_its_attention_and_its_mlp():
    """Layer scale included, which the published tool leaves out; the class token is not."""
    vit = scrambled(
        VisionTransformer(**VIT, init_values=0.1, rel_pos_bias="shared", pos_embed="learned")
    )
    found = common.look(vit, images(16), common.layers_of(vit), lambda maps: maps)
    assert list(found) == ["embedding", "blocks.0.attn", "blocks.0", "blocks.1.attn", "blocks.1"]
    x = vit.embed(vit.patch_embed(images(16)), vit.pos_embed)
    for name, block in zip(("blocks.0", "blocks.1"), vit.blocks, strict=True):
        attended = x + block.gamma_1 * block.attn(block.norm1(x), vit.rel_pos_bias())
        x = block(x, vit.rel_pos_bias())
        for layer, tokens in ((f"{name}.attn", attended), (name, x)):
            torch.testing.assert_close(
                found[layer], tokens[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
            )


@pytest.mark.parametrize(
    ("name", "options", "shapes"),
    [
        (
            "resnet18", {"channels": [4, 8, 12, 16]},
            [(64, 16), *2 * [(4, 16)], *2 * [(8, 8)], *2 * [(12, 4)], *2 * [(16, 2)]],
        ),
        (
            "convnext_tiny", {"dims": [4, 8, 12, 16], "depths": [1, 1, 2, 1]},
            [*2 * [(4, 16)], (8, 8), *2 * [(12, 4)], (16, 2)],
        ),
        (
            "swin_tiny_patch4_window7_224", SWIN,
            [(8, 16), *2 * [(8, 16)], *2 * [(16, 8)], *4 * [(32, 4)], *2 * [(64, 2)]],
        ),
        ("mobilenetv2_050", {}, [(8, 32), (16, 16), (16, 8), (48, 4), (160, 2)]),
    ],
)  # fmt: skip
def test_layers_of_other_networks_come_out_as_maps(name, options, shapes):
    network = timm.create_model(name, num_classes=0, **options).eval()
    found = common.look(
        network, images(64), common.layers_of(network), lambda maps: tuple(maps.shape)
    )
    assert list(found.values()) == [(2, channels, side, side) for channels, side in shapes]


def test_swin_and_timm_vits_give_what_their_blocks_make():
    swin = scrambled(timm.create_model("swin_tiny_patch4_window7_224", num_classes=0, **SWIN))
    found = common.look(swin, images(64), common.layers_of(swin), lambda maps: maps)
    last = swin.norm(found["layers.3.blocks.0"].movedim(1, -1))
    torch.testing.assert_close(last, swin.forward_features(images(64)))
    small = {
        "img_size": 16,
        "patch_size": 4,
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 2,
        "num_classes": 0,
    }
    vit = scrambled(timm.create_model("vit_tiny_patch16_224", **small, init_values=0.1))
    found = common.look(vit, images(16), common.layers_of(vit), lambda maps: maps)
    last = vit.norm(found["blocks.1"].flatten(2).transpose(1, 2))
    torch.testing.assert_close(last, vit.forward_features(images(16))[:, 1:])


def test_a_decoder_is_no_layer_of_the_encoder():
    mae = create_model(
        "mae_tiny_patch16_224", input_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2
    )
    names = list(common.look(mae.eval(), images(16), common.layers_of(mae), lambda maps: None))
    assert names == ["embedding", "blocks.0.attn", "blocks.0", "blocks.1.attn", "blocks.1"]


# --------------------------------------------------------------------------------------------------
# Fourier


@pytest.mark.parametrize(("height", "width", "k"), [(8, 8, 2), (9, 9, 3), (6, 12, 1), (14, 14, 6)])
def test_a_wave_has_one_frequency(height, width, k):
    """cos has half of all places' sum at +-k; along a rectangle's diagonal columns turn as often as
    rows."""
    y, x = torch.meshgrid(torch.arange(height) / height, torch.arange(width) / width, indexing="ij")
    columns = round(k * width / height)
    wave = torch.cos(2 * math.pi * (k * y + columns * x)).double().expand(2, 3, -1, -1)
    found = fourier.log_amplitudes(wave)
    assert len(found) == height - height // 2
    assert found[k] == pytest.approx(math.log(height * width / 2), abs=1e-4)
    assert max(a for place, a in enumerate(found.tolist()) if place != k) < math.log(1e-3)


def test_a_point_has_all_frequencies_alike():
    point = torch.zeros(1, 1, 7, 7)
    point[..., 2, 3] = 5.0
    assert fourier.relative(fourier.log_amplitudes(point)).abs().max() < 1e-5


def test_half_the_spectrum_is_the_published_form():
    torch.manual_seed(0)
    for side in (1, 6, 7):
        maps = torch.randn(3, 2, side, side)
        shifted = (
            (torch.fft.fft2(maps).abs() + 1e-6)
            .log()
            .roll((side // 2, side // 2), (2, 3))
            .mean((0, 1))
        )
        torch.testing.assert_close(fourier.log_amplitudes(maps), shifted.diag()[side // 2 :])


def test_variance_is_over_places_and_of_one_place_none():
    maps = torch.tensor([0.0, 2.0, 0.0, 2.0]).view(1, 1, 2, 2).repeat(2, 2, 1, 1)
    assert fourier.spatial_variance(maps) == pytest.approx(4 / 3)
    assert fourier.spatial_variance(maps[..., :1, :1]) == 0


# --------------------------------------------------------------------------------------------------
# Interaction


class Product(nn.Module):
    """Logits 0 and the product of the means of some cells of a grid."""

    def __init__(self, grid: int, cells: list[int]):
        super().__init__()
        self.grid, self.cells = grid, cells

    def forward(self, images: Tensor) -> Tensor:
        cells = F.adaptive_avg_pool2d(images, self.grid).mean(1).flatten(1)
        value = cells[:, self.cells].prod(1)
        return torch.stack((torch.zeros_like(value), value), dim=1)


def test_factors_of_a_product_interact_by_it_and_others_do_not():
    pairs, rng = torch.tensor([[5, 6], [5, 1], [9, 10]]), np.random.default_rng(0)
    image = torch.arange(16.0).view(1, 4, 4).repeat_interleave(2, 1).repeat_interleave(2, 2)
    for order in (0, 4, 14):
        contexts = interaction.draw_contexts(pairs, 16, order, 20, rng)
        found = interaction.interactions(Product(4, [5, 6]), image, 1, pairs, contexts, 16, "yi", 7)
        assert torch.equal(
            found,
            torch.tensor([[30.0], [0], [0]]).double().expand(-1, 1 if order in (0, 14) else 20),
        )


def test_a_third_factor_must_be_in_the_context():
    """Which it is in a share m / (n - 2) of them."""
    pairs, image = torch.tensor([[5, 6]]), torch.ones(1, 4, 4)
    contexts = interaction.draw_contexts(pairs, 16, 7, 4000, np.random.default_rng(0))
    found = interaction.interactions(
        Product(4, [5, 6, 0]), image, 1, pairs, contexts, 16, "yi", 500
    )
    assert torch.equal(found[0], (contexts[0] == 0).any(1).double())
    assert found.mean() == pytest.approx(0.5, abs=0.03)


def test_rewards_by_hand():
    logits = torch.tensor([1.0, 2.0, 4.0])
    assert interaction.reward(logits, 1, "yi") == 2
    assert interaction.reward(logits, 1, "modified") == pytest.approx(
        2 - math.log(math.e + math.e**4)
    )
    assert interaction.reward(logits, 1, "normal") == pytest.approx(
        2 - math.log(math.e + math.e**2 + math.e**4)
    )


def test_pairs_are_different_neighbours_and_all_of_them_can_be_had():
    steps = {
        pair: np.subtract(*(divmod(cell, 3) for cell in pair))
        for pair in itertools.combinations(range(9), 2)
    }
    near = {frozenset(pair) for pair, step in steps.items() if abs(step).max() == 1}
    pairs = interaction.draw_pairs(3, len(near), 1, np.random.default_rng(0))
    assert {frozenset(pair) for pair in pairs.tolist()} == near
    with pytest.raises(
        ValueError, match=r"--pairs 21 is more than the 20 pairs that --grid 3 has in --reach 1"
    ):
        interaction.draw_pairs(3, 21, 1, np.random.default_rng(0))


def test_contexts_are_uniform_sets_of_the_others():
    pairs = torch.tensor([[4, 2], [0, 8]])
    contexts = interaction.draw_contexts(pairs, 9, 3, 3000, np.random.default_rng(0))
    for pair, sets in zip(pairs.tolist(), contexts, strict=True):
        assert all(len(set(cells)) == 3 for cells in sets.tolist())
        counts = torch.bincount(sets.flatten(), minlength=9)
        others = [cell for cell in range(9) if cell not in pair]
        assert not counts[pair].any() and (counts[others] / 3000 - 3 / 7).abs().max() < 0.04


def test_ratios_of_one_order_are_computed_once():
    args = interaction.parse(["--model", "vit_tiny_patch16_224", "--grid", "4"])
    assert interaction.orders(args) == [0, 1, 2, 4, 5, 7, 8, 9, 11, 12, 13, 14]
    found = {order: torch.full((3, 2), float(order)) for order in interaction.orders(args)}
    rows = interaction.tabulate(args, "a", found)
    assert [row.order for row in rows][:3] == [0, 0, 1] and len(rows) == 13
    assert sum(row.share for row in rows) == pytest.approx(13)


# --------------------------------------------------------------------------------------------------
# CKA


def test_a_rotated_and_scaled_matrix_is_the_same_to_cka():
    torch.manual_seed(0)
    features = torch.randn(20, 6).double()
    rotation = torch.linalg.qr(torch.randn(6, 6).double()).Q
    grams = torch.stack(
        [cka.gram(x) for x in (features, 3 * features @ rotation + 5, features[:, :1])]
    )
    found = cka.cka(cka.unbiased_hsic(grams))
    torch.testing.assert_close(found[:2, :2], torch.ones(2, 2).double())
    assert 0 < found[0, 2] < 0.9 and torch.equal(found, found.T)


def test_minibatches_estimate_the_same_hsic():
    """It is a U-statistic: its mean over all subsets is its value on the whole, and that of all
    permutations is 0."""
    torch.manual_seed(0)
    grams = torch.stack([cka.gram(torch.randn(7, d)) for d in (3, 5)])
    subsets = [list(chosen) for chosen in itertools.combinations(range(7), 4)]
    parts = torch.stack([cka.unbiased_hsic(grams[:, s][:, :, s]) for s in subsets])
    torch.testing.assert_close(parts.mean(0), cka.unbiased_hsic(grams))
    orders = [list(order) for order in itertools.permutations(range(5))]
    first, second = grams[0, :5, :5], grams[1, :5, :5]
    mixed = [cka.unbiased_hsic(torch.stack((first, second[o][:, o])))[0, 1] for o in orders]
    assert sum(mixed) / len(mixed) == pytest.approx(0, abs=1e-12)


# --------------------------------------------------------------------------------------------------
# Attention distance


def test_distances_of_known_attention():
    """Uniform: the mean of all distances; to itself: 0; to the right: a patch. A class token does
    not count."""
    distances = attention_distance.patch_distances((1, 4), (8, 8))
    assert distances[0].tolist() == [0, 8, 16, 24]
    uniform = torch.full((4, 4), 0.25)
    right = torch.eye(4).roll(1, 1)
    right[3] = torch.eye(4)[2]  # the last one looks to the left
    attention = F.pad(0.6 * torch.stack((uniform, torch.eye(4), right)), (1, 0, 1, 0), value=0.4)[
        None
    ]
    assert attention_distance.attention_distance(attention, distances)[0].tolist() == pytest.approx(
        [10, 0, 8]
    )


@pytest.mark.parametrize("kind", ["own", "own_shared", "timm", "swin"])
def test_without_queries_attention_is_uniform(kind):
    """In Swin within a window of 2 x 2 patches, of 4, 8, 16 and 32 pixels; its shifted windows look
    among fewer."""
    if kind.startswith("own"):
        network = VisionTransformer(
            **VIT, rel_pos_bias="shared" if kind == "own_shared" else "none", k_bias=True
        )
    elif kind == "timm":
        small = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
        network = timm.create_model("vit_tiny_patch16_224", **small, num_classes=0)
    else:
        network = timm.create_model("swin_tiny_patch4_window7_224", num_classes=0, **SWIN)
    for name, parameter in scrambled(network).named_parameters():
        if name.endswith(("qkv.weight", "qkv.bias", "relative_position_bias_table")):
            parameter.data.zero_()
    found: dict[str, Tensor] = {}

    def see(attending, attention):
        between = attention_distance.patch_distances(attending.grid, attending.stride)
        found[attending.name] = (
            attention_distance.attention_distance(attention, between) / between.mean()
        )

    attentions = attention_distance.attentions_of(network)
    attention_distance.observe(network, images(64 if kind == "swin" else 16), attentions, see)
    assert list(found) == [attending.name for attending in attentions]
    for name, relative in found.items():
        if name != "layers.2.blocks.1":
            torch.testing.assert_close(relative, torch.ones_like(relative))
    if kind == "swin":
        assert [round(a.stride[0]) for a in attentions] == [4, 8, 16, 16, 32]
        assert 0 < found["layers.2.blocks.1"].mean() < 1


def test_attention_is_what_the_network_uses():
    """Biases included: of BEiT's form the same as `attention_maps`."""
    vit = scrambled(VisionTransformer(**VIT, init_values=0.1, rel_pos_bias="per_block"))
    seen = []
    attention_distance.observe(
        vit, images(16), attention_distance.attentions_of(vit), lambda _, a: seen.append(a)
    )
    for layer, attention in enumerate(seen):
        torch.testing.assert_close(attention, vit.attention_maps(images(16), layer))


# --------------------------------------------------------------------------------------------------
# Effective rank


def test_rank_of_known_spectra():
    assert effective_rank.effective_rank(torch.tensor([4.0, 4, 4, 0, 0]).double()) == pytest.approx(
        3
    )
    values = torch.tensor([0.5, 0.25, 0.25]).double()
    assert effective_rank.effective_rank(9 * values**2) == pytest.approx(
        math.exp(1.5 * math.log(2))
    )
    assert effective_rank.effective_rank(torch.zeros(3).double()) == 0


def test_rank_of_features_with_a_known_spectrum_in_parts():
    """Three centerd orthogonal directions of equal length among eight channels, far from the
    origin."""
    torch.manual_seed(0)
    directions = torch.linalg.qr(torch.randn(8, 3).double()).Q
    rows = torch.linalg.qr(F.pad(torch.randn(50, 3).double(), (1, 0), value=1.0)).Q[:, 1:]
    features = (rows @ directions.T + 3).float()
    moments = effective_rank.Moments()
    for part in features.split(7):
        moments.add(part)
    torch.testing.assert_close(moments.spectrum()[-3:].float(), torch.ones(3), rtol=1e-4, atol=1e-4)
    moments = effective_rank.Moments()
    moments.add(rows @ directions.T + 3)
    assert effective_rank.effective_rank(moments.spectrum()) == pytest.approx(3, rel=1e-5)


# --------------------------------------------------------------------------------------------------
# Commands


def method_file(folder: Path, method: str) -> Path:
    """A checkpoint of pre-training, with the flags of its run, and the encoder beside it."""
    args = arguments("pretrain", folder, *METHODS[method])
    network = scrambled(build_method(args))
    folder.mkdir(parents=True, exist_ok=True)
    save_checkpoint(
        folder / "checkpoint-1.pth", {"model": network.state_dict(), "args": as_config(args)}
    )
    save_encoder(folder / "encoder-1.safetensors", network.encoder_state_dict(), {"format": "timm"})
    return folder / "checkpoint-1.pth"


def classifier_file(path: Path) -> Path:
    network = scrambled(
        create_model("vit_tiny_patch16_224", **VIT | {"num_classes": 10}, global_pool="token")
    )
    save_checkpoint(path, {"model": network.state_dict()})
    return path


def flags_of(folder: Path, *flags: str) -> list[str]:
    return [*DIGITS, "--images", "12", "--batch_size", "6", "--output_dir", str(folder), *flags]


def table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open()))


INTERACTION = [
    "--grid",
    "4",
    "--pairs",
    "2",
    "--contexts",
    "3",
    "--images",
    "2",
    "--batch_size",
    "64",
]


@pytest.mark.parametrize("name", ["fourier", "cka", "effective_rank", "attention_distance"])
def test_checkpoint_and_encoder_are_the_same_network_and_random_weights_another(tmp_path, name):
    file = method_file(tmp_path / "mae", "mae")
    flags = flags_of(
        tmp_path, "--checkpoint", str(file), str(file.with_name("encoder-1.safetensors")), "random",
        *VIT_FLAGS, "--model", "", *2 * ["vit_tiny_patch16_224"],
    )  # fmt: skip
    COMMANDS[name].main(COMMANDS[name].parse(flags))
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    rows = table(tmp_path / f"{name}.csv")
    labels = ["mae/checkpoint-1", "mae/encoder-1", "vit_tiny_patch16_224 (random)"]
    assert sorted({row["label"] for row in rows}) == labels
    value = {"fourier": "relative_log_amplitude"}.get(
        name, {"attention_distance": "distance"}.get(name, name)
    )
    if name == "cka":
        last = [row for row in rows if row["layer"] == row["other_layer"] == "blocks.1"]
        same = {row["other_label"]: float(row["cka"]) for row in last if row["label"] == labels[0]}
        assert same[labels[0]] == pytest.approx(1) and same[labels[1]] == pytest.approx(1, abs=1e-4)
        assert same[labels[2]] < 0.9
        return
    numbers = [
        np.array([float(row[value]) for row in rows if row["label"] == label]) for label in labels
    ]
    np.testing.assert_allclose(numbers[0], numbers[1], rtol=1e-4, atol=1e-5)
    assert abs(numbers[0] - numbers[2]).max() > 1e-2


def test_a_checkpoint_says_itself_what_it_holds(tmp_path):
    """Of different architectures in one picture, in the order of the flags."""
    files = [str(method_file(tmp_path / name, name)) for name in ("a2mim_resnet", "a2mim_vit")]
    _, layers = fourier.main(fourier.parse(flags_of(tmp_path, "--checkpoint", *files)))
    assert [(row.label, row.layer) for row in layers if row.depth in (0, 1)] == [
        ("a2mim_resnet/checkpoint-1", "embedding"), ("a2mim_resnet/checkpoint-1", "layer4.1"),
        ("a2mim_vit/checkpoint-1", "embedding"), ("a2mim_vit/checkpoint-1", "blocks.1"),
    ]  # fmt: skip


def test_minibatches_and_precision_hardly_change_cka_and_rank(tmp_path):
    file = ["--checkpoint", str(method_file(tmp_path / "mae", "mae"))]
    whole = cka.main(
        cka.parse([*flags_of(tmp_path, *file), "--images", "80", "--batch_size", "80"])
    )
    parts = cka.main(
        cka.parse([*flags_of(tmp_path, *file), "--images", "80", "--batch_size", "20"])
    )
    assert max(abs(a.cka - b.cka) for a, b in zip(whole, parts, strict=True)) < 0.03
    fp32 = effective_rank.main(
        effective_rank.parse(flags_of(tmp_path, *file, "--features", "place"))
    )
    bf16 = effective_rank.main(
        effective_rank.parse(
            flags_of(tmp_path, *file, "--features", "place", "--precision", "bf16")
        )
    )
    for a, b in zip(fp32, bf16, strict=True):
        assert (
            a.effective_rank == pytest.approx(b.effective_rank, rel=0.02)
            and a.effective_rank != b.effective_rank
        )


def interaction_flags(folder: Path, *flags: str) -> list[str]:
    return flags_of(folder, *VIT_FLAGS, "global_pool=token", *INTERACTION, *flags)


def test_interactions_go_on_from_what_is_finished(tmp_path, monkeypatch):
    """Interrupted in the middle of an image: finished orders are not computed again, and the
    numbers are the same."""
    file = ["--checkpoint", str(classifier_file(tmp_path / "a" / "best.pth"))]
    args = interaction.parse(interaction_flags(tmp_path / "whole", *file))
    whole = interaction.main(args)
    computed, compute = [], interaction.interactions

    def stop_at_the_sixth(*arguments):
        computed.append(arguments)
        if len(computed) == 6:
            raise KeyboardInterrupt
        return compute(*arguments)

    monkeypatch.setattr(interaction, "interactions", stop_at_the_sixth)
    args = interaction.parse(interaction_flags(tmp_path / "cut", *file))
    with pytest.raises(KeyboardInterrupt):
        interaction.main(args)
    assert interaction.main(args) == whole
    assert len(computed) == 1 + 2 * len(interaction.orders(args))
    rows = table(tmp_path / "cut" / "interaction.csv")
    assert [float(row["strength"]) for row in rows] == [row.strength for row in whole] and whole[
        3
    ].strength > 0
    with pytest.raises(
        ValueError,
        match=r"image-\d+/orders\.pth holds interactions of another run: contexts 3 there, 5 now",
    ):
        interaction.main(
            interaction.parse(interaction_flags(tmp_path / "cut", *file, "--contexts", "5"))
        )


def test_ranks_share_the_images(tmp_path):
    """What two ranks would compute one after the other, without a group, is what one computes."""
    file = ["--checkpoint", str(classifier_file(tmp_path / "a" / "best.pth"))]
    whole = interaction.main(interaction.parse(interaction_flags(tmp_path / "whole", *file)))
    args = interaction.parse(interaction_flags(tmp_path / "shared", *file))
    network = common.load_networks(args, 10)[0]
    for args.rank, args.world_size in ((1, 2), (0, 2)):
        try:
            found = interaction.strengths_of(args, network, CPU)
        except KeyError:  # the other rank has not been there yet
            assert args.rank == 1
    assert interaction.tabulate(args, network.label, found) == whole


def test_images_are_normalized_as_in_the_run_unless_the_flags_say_otherwise(tmp_path):
    """Also by a mean and std of one's own, of checkpoints and of exported encoders."""
    own = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    values = tuple(own["mean"]), tuple(own["std"])
    flags = {"imagenet_default_mean_and_std": True, "mean": None, "std": None}
    run, half, export = (str(tmp_path / name) for name in ("a.pth", "b.pth", "c.safetensors"))
    save_checkpoint(run, {"model": {}, "args": flags | own})
    save_checkpoint(half, {"model": {}, "args": flags | {MEAN_STD_FLAGS[0]: False}})
    save_encoder(export, {}, {name: json.dumps(value) for name, value in own.items()})
    plain = fourier.parse(["--model", "x"])
    assert common.mean_std(plain, run) == common.mean_std(plain, export) == values
    assert common.mean_std(plain, half) == MEAN_STD["inception"]
    assert common.mean_std(plain, common.RANDOM) == MEAN_STD["imagenet"]
    asked = fourier.parse(["--model", "x", "--mean", "0.7", "0.8", "0.9"])
    assert common.mean_std(asked, run) == ((0.7, 0.8, 0.9), MEAN_STD["imagenet"][1])
    asked = fourier.parse(["--model", "x", "--no_imagenet_default_mean_and_std"])
    assert common.mean_std(asked, run) == MEAN_STD["inception"]


def test_only_images_classified_right(tmp_path):
    file = ["--checkpoint", str(classifier_file(tmp_path / "best.pth"))]
    args = interaction.parse(interaction_flags(tmp_path, *file, "--correct_only", "--images", "5"))
    network = common.load_networks(args, 10)[0]
    dataset = common.image_set(args, network, need_labels=True)
    normalize = interaction.Normalize(network.mean_std, CPU)
    chosen = list(interaction.chosen_images(args, network, dataset, normalize))
    assert chosen and all(
        int(network.model(image[None]).argmax()) == label for _, image, label in chosen
    )


@pytest.mark.parametrize(
    ("name", "flags", "named"),
    [
        ("fourier", "", "random weights need --model"),
        (
            "fourier",
            "--model nope",
            "--model nope is neither a model of this repository nor of timm",
        ),
        ("fourier", "--checkpoint nowhere.pth", "checkpoint nowhere.pth does not exist"),
        (
            "fourier",
            "--model vit_tiny_patch16_224 resnet18",
            "--model takes one name or one for each of the 1",
        ),
        (
            "fourier",
            "--model vit_tiny_patch16_224 --labels a b",
            "--labels must be one for each of the 1 checkpoints",
        ),
        ("fourier", "--model resnet18 --checkpoint random random", "--labels must differ"),
        ("fourier", "--model resnet18 --images 0", "--images must be at least 1, not 0"),
        ("cka", "--model resnet18 --batch_size 3", "--batch_size and --images must be at least 4"),
        (
            "attention_distance",
            "--model resnet18",
            "resnet18 (random): ResNet has no known attention module",
        ),
        (
            "interaction",
            "--model vit_tiny_patch16_224 --grid 15",
            "--grid 15 does not divide the images of",
        ),
        ("interaction", "--model mae_tiny_patch16_224", "has no trained classifier"),
        (
            "interaction",
            "--model vit_tiny_patch16_224 --ratios 2",
            "--ratios are from 0 to 1, not 2.0",
        ),
    ],
)
def test_mistake_is_named_in_one_line(tmp_path, capfd, name, flags, named):
    with pytest.raises(SystemExit):
        launch(
            COMMANDS[name].main,
            COMMANDS[name].parse([*DIGITS, "--output_dir", str(tmp_path), *flags.split()]),
        )
    said = capfd.readouterr()
    lines = [line for line in (said.out + said.err).splitlines() if "error: " in line]
    assert len(lines) == 1 and named in lines[0]


def test_a_file_without_flags_must_be_named(tmp_path):
    file = classifier_file(tmp_path / "best.pth")
    with pytest.raises(
        ValueError, match=r"best\.pth does not say which model it holds: name it with --model"
    ):
        common.load_networks(fourier.parse(flags_of(tmp_path, "--checkpoint", str(file))))
