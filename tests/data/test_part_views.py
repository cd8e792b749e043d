"""Part maps on the way to a method: cropped and flipped as their images are, read for the image
that is really used."""

import json
import math
import signal
from argparse import Namespace

import numpy as np
import pytest
import torch

import run_pretraining
from datasets import ImageDataset
from modeling_pretrain import SemMAE
from optim_factory import cosine_at
from unimim.cli.options import parse, resolve_lr
from unimim.data.crops import ViewDraws, crop_map, majority
from unimim.data.part_maps import PartMapWriter, PartMeta, RandomParts
from unimim.data.pretraining import open_parts
from unimim.data.sources import ArraySource
from unimim.data.views import build_pretrain_transform
from unimim.engine.distributed import StopSignal
from unimim.engine.setup import schedules

PALETTE = np.array(
    [[250, 30, 30], [30, 220, 40], [40, 60, 230], [230, 220, 40], [30, 30, 30]], dtype=np.uint8
)


def painted(
    rng: np.random.Generator, cells: tuple[int, int], pixels: int
) -> tuple[np.ndarray, np.ndarray]:
    """A part map of blobs and the picture whose colors show it, `pixels` for each cell."""
    parts = rng.integers(len(PALETTE), size=(cells[0] // 3 + 1, cells[1] // 3 + 1), dtype=np.uint8)
    parts = parts.repeat(3, 0).repeat(3, 1)[: cells[0], : cells[1]]
    return parts, PALETTE[parts].repeat(pixels, 0).repeat(pixels, 1)


@pytest.mark.parametrize("pipeline", ["fast", "reference"])
def test_the_map_stays_on_the_image(pipeline):
    """Where a patch lies within one part, it shows that part's color; checked after random crops
    and flips."""
    rng = np.random.default_rng(0)
    transform = build_pretrain_transform(
        ("image", "part_ids"),
        input_size=(48, 64),
        grid=(6, 8),
        pipeline=pipeline,
        crop_scale=(0.2, 1.0),
    )
    checked = 0
    for _ in range(40):
        parts, picture = painted(rng, (11, 17), 9)
        sample = transform(picture, rng, {"part_ids": parts})
        assert sample["part_ids"].shape == (6, 8) and sample["part_ids"].dtype == torch.uint8
        patches = sample["image"].numpy().reshape(3, 6, 8, 8, 8).transpose(1, 3, 2, 4, 0)
        color = np.median(patches.reshape(6, 8, 64, 3), axis=2)
        nearest = np.abs(color[:, :, None] - PALETTE.astype(float)).sum(-1)
        inside = nearest.min(-1) == 0
        assert (nearest.argmin(-1) == sample["part_ids"].numpy())[inside].all()
        checked += inside.sum()
    assert checked > 1000


@pytest.mark.parametrize("flip", [False, True])
def test_the_rule_point_by_point(flip):
    """docs/methods/mae_semmae.md#part-maps-and-crops, written out."""
    rng = np.random.default_rng(1)
    parts = rng.integers(4, size=(9, 5), dtype=np.uint8)
    (height, width), (rows, columns) = (40, 60), (3, 4)
    top, left, h, w = 5, 11, 30, 28
    expected = np.zeros((rows, columns), dtype=np.uint8)
    for u in range(rows):
        for v in range(columns):
            votes = [0] * 4
            for a in range(4):
                for b in range(4):
                    y, x = (
                        top + (u + (a + 0.5) / 4) / rows * h,
                        left + (v + (b + 0.5) / 4) / columns * w,
                    )
                    votes[
                        parts[min(8, math.floor(y / height * 9)), min(4, math.floor(x / width * 5))]
                    ] += 1
            expected[u, v] = votes.index(max(votes))
    box = (top, width - left - w if flip else left, h, w)  # of the picture after the flip
    draws = ViewDraws(flip, box, "bicubic", None)
    found = majority(crop_map(parts, draws, (height, width), (rows, columns)))
    assert np.array_equal(found, expected[:, ::-1] if flip else expected)


def test_ties_go_to_the_smallest_part():
    points = np.array([[[3, 3, 1, 1], [2, 2, 2, 0], [4, 0, 4, 0]]])
    assert majority(points).tolist() == [[1, 2, 0]]


def test_scores_are_averaged():
    transform = build_pretrain_transform(
        ("image", "part_scores"), input_size=8, grid=(2, 2), crop_scale=(1.0, 1.0)
    )
    scores = np.arange(16, dtype=np.float16).reshape(4, 4)
    rng = np.random.default_rng(0)
    found = transform(np.zeros((8, 8, 3), dtype=np.uint8), rng, {"part_scores": scores})[
        "part_scores"
    ]
    assert found.dtype == torch.float32
    assert found.flatten().sort().values.tolist() == [2.5, 4.5, 10.5, 12.5]


def test_the_image_is_the_same_with_and_without_its_map():
    picture = np.random.default_rng(0).integers(256, size=(30, 40, 3), dtype=np.uint8)
    plain = build_pretrain_transform(("image",), input_size=16)
    mapped = build_pretrain_transform(("image", "part_ids"), input_size=16, grid=(4, 4))
    first = plain(picture, np.random.default_rng(3))
    second = mapped(
        picture, np.random.default_rng(3), {"part_ids": np.zeros((7, 7), dtype=np.uint8)}
    )
    assert torch.equal(first["image"], second["image"])


def test_a_replacement_brings_its_own_map():
    images = np.zeros((4, 8, 8, 3), dtype=np.uint8)
    transform = build_pretrain_transform(("image", "part_ids"), input_size=8, grid=(2, 2))
    maps = {"part_ids": lambda index: np.full((3, 3), index, dtype=np.uint8)}
    source = ArraySource("zeros", images, [0] * 4, ["0"])
    dataset = ImageDataset(source, transform, seed=0, maps=maps)
    assert dataset[0, 2]["part_ids"].unique().tolist() == [2]
    dataset.bad.add(2)
    sample = dataset[0, 2]
    assert sample["index"] != 2
    assert sample["part_ids"].unique().tolist() == [sample["index"]]


def test_random_parts_are_an_images_own():
    parts = RandomParts(5, (14, 14), seed=3)
    assert np.array_equal(parts.read(7), parts.read(7)) and not np.array_equal(
        parts.read(7), parts.read(8)
    )
    counts = np.bincount(np.stack([parts.read(i) for i in range(50)]).ravel(), minlength=5)
    assert len(counts) == 5 and counts.min() > 0.9 * 50 * 196 / 5
    assert parts.read(7).dtype == np.uint8


# --------------------------------------------------------------------------------------------------
# Runs and flags


def test_a_run_moves_the_weight_from_epoch_to_epoch(tmp_path):
    flags = (
        "--model semmae_tiny_patch16_224 --part_source random --num_parts 4 --input_size 16 "
        "--patch_size 4 --device cpu --model_kwargs embed_dim=16 depth=1 num_heads=1 "
        "--data_set digits --num_workers 0 "
        "--batch_size 512 --epochs 3 --warmup_epochs 0 --no_save_ckpt"
    )
    args = parse("pretrain", [*flags.split(), "--output_dir", str(tmp_path)])
    handlers = {number: signal.getsignal(number) for number in StopSignal.signals}
    run_pretraining.main(args)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    lines = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert [line["train_mask_lambda"] for line in lines] == pytest.approx(
        [1 - 1 / 9, 1 - 4 / 9, 0.0]
    )
    assert lines[-1]["train_loss"] < lines[0]["train_loss"]


def part_flags(**given) -> Namespace:
    known = {
        "model": "semmae_tiny_patch16_224",
        "part_source": "maps",
        "part_maps": None,
        "data_path": None,
        "seed": 0,
    }
    return Namespace(**known | given)


def method_of(parts: int) -> SemMAE:
    return SemMAE(
        num_parts=parts,
        input_size=16,
        patch_size=4,
        embed_dim=8,
        depth=1,
        num_heads=1,
        decoder_embed_dim=8,
        decoder_num_heads=1,
        decoder_depth=1,
    )


def test_opening_part_maps(tmp_path):
    source = ArraySource("zeros", np.zeros((4, 8, 8, 3), dtype=np.uint8), [0] * 4, ["0"])
    PartMapWriter.create(
        tmp_path / "maps", PartMeta(num_parts=6, grid=(2, 2), num_images=4, part_source="kmeans")
    )
    writer = PartMapWriter(tmp_path / "maps")
    for index in range(4):
        writer.write(index, np.full((2, 2), index, dtype=np.uint8))
    writer.flush()
    given = part_flags(part_maps=str(tmp_path / "maps"))
    assert open_parts(given, source, method_of(7)).read(3).tolist() == [[3, 3], [3, 3]]
    same = part_flags(part_maps=given.part_maps, part_source="kmeans")
    assert open_parts(same, source, method_of(7)).read(1).tolist() == [[1, 1], [1, 1]]
    with pytest.raises(
        ValueError,
        match="holds kmeans parts, not attention_heads; make those with run_part_learning",
    ):
        open_parts(
            part_flags(part_maps=given.part_maps, part_source="attention_heads"),
            source,
            method_of(7),
        )
    with pytest.raises(ValueError, match="has 6 parts; use --num_parts 6"):
        open_parts(given, source, method_of(5))
    with pytest.raises(ValueError, match="needs --part_maps"):
        open_parts(part_flags(), source, method_of(7))
    with pytest.raises(ValueError, match="has 4 part maps, the data set has 3 images"):
        open_parts(given, ArraySource("zeros", source.images[:3], [0] * 3, ["0"]), method_of(7))
    assert open_parts(part_flags(part_source="random"), source, method_of(4)).read(0).max() < 4


def test_either_rate_replaces_the_other(tmp_path):
    def rates(*flags: str) -> tuple[float, float | None]:
        args = parse("pretrain", ["--batch_size", "64", "--update_freq", "2", *flags])
        args.world_size = 4
        resolve_lr(args)
        return args.lr, args.blr

    recipe = ("--model", "mae_base_patch16_224")
    assert rates(*recipe) == (pytest.approx(1.5e-4 * 2), 1.5e-4)
    assert rates(*recipe, "--lr", "1e-2") == (1e-2, None)
    assert rates(*recipe, "--lr", "1e-2", "--blr", "1e-3") == (pytest.approx(2e-3), 1e-3)
    assert rates("--model", "conmim_base_patch16_224") == (1.5e-3, None)
    assert rates("--model", "conmim_base_patch16_224", "--blr", "1e-3") == (
        pytest.approx(2e-3),
        1e-3,
    )
    (tmp_path / "lr.yaml").write_text("lr: 0.25\n")
    assert rates(*recipe, "--config", str(tmp_path / "lr.yaml")) == (0.25, None)


def test_the_schedule_follows_fractional_epochs():
    args = Namespace(
        lr_schedule="mae", lr=1.0, min_lr=0.1, epochs=10, warmup_epochs=2, warmup_steps=-1,
        weight_decay=0.05, weight_decay_end=None,
    )  # fmt: skip
    lr, _ = schedules(args, 5)
    assert len(lr) == 50
    assert lr[:11] == pytest.approx(np.arange(11) / 10)
    assert lr[30] == pytest.approx(0.55), "half way down"
    args.warmup_steps = 5
    assert schedules(args, 5)[0][5] == 1.0
    with pytest.raises(ValueError, match="--warmup_epochs 10 leaves nothing"):
        cosine_at(np.arange(3), 1.0, 0.0, 10, 10)
