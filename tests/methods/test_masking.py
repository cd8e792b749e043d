"""Masks: published counts and distributions, any grid, and what is refused
(docs/methods/conmim.md#masks)."""

import numpy as np
import pytest

from masking_generator import BlockwiseMask, RandomMask, SimMIMMask, build_mask_generator


def draws(generator, count, seed=0):
    rng = np.random.default_rng(seed)
    return np.stack([generator(rng) for _ in range(count)])


def test_block_counts_follow_the_published_distribution():
    masks = draws(
        build_mask_generator("block", input_size=224, patch_size=16, mask_ratio=0.75), 3000
    )
    counts = masks.sum(axis=(1, 2))
    assert masks.shape[1:] == (14, 14) and masks.dtype == bool
    assert counts.max() == 75 and counts.min() >= 60
    assert abs(counts.mean() - 74.5) < 0.1  # measured with the published code: 74.47
    assert abs((counts == 75).mean() - 0.667) < 0.03  # and 0.667


def test_block_masks_are_made_of_rectangles():
    # one block that fills the target is a full rectangle: its bounding box holds masked patches
    # only
    for mask in draws(BlockwiseMask((14, 14), 30, min_block=30), 200):
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        if mask.sum() in (30, box.size) and box.all():
            break
    else:
        pytest.fail("no single rectangle in 200 masks")
    clustered = draws(BlockwiseMask((14, 14), 75, 16), 300)
    neighbors = (clustered[:, :, 1:] & clustered[:, :, :-1]).sum() / clustered[:, :, 1:].sum()
    assert neighbors > 0.75  # scattered patches would give 75 / 196 = 0.38


def test_block_covers_the_grid_evenly_at_mirrored_places():
    share = draws(BlockwiseMask((14, 14), 75, 16), 4000).mean(axis=0)
    assert np.abs(share - share[::-1]).max() < 0.05 and np.abs(share - share[:, ::-1]).max() < 0.05
    assert np.abs(share - share.T).max() < 0.05
    assert share[7, 7] > share[0, 0] + 0.2  # uniform places of blocks favour the middle


@pytest.mark.parametrize("kind", ["block", "random", "random_mps32"])
def test_the_most_that_a_mask_hides(kind):
    generator = build_mask_generator(kind, input_size=64, patch_size=8, mask_ratio=0.6)
    assert draws(generator, 200).sum((1, 2)).max() == generator.most


def test_block_respects_the_largest_block():
    mask = draws(BlockwiseMask((6, 9), 5, min_block=1, max_block=1), 50)
    assert (mask.sum(axis=(1, 2)) == 5).all() and mask.shape == (50, 6, 9)


@pytest.mark.parametrize(
    "size, patch, target", [(32, 4, 24), (384, 16, 220), ((64, 96), 8, 36), (64, 16, 6)]
)
def test_block_target_scales_with_the_grid(size, patch, target):
    counts = draws(
        build_mask_generator("block", input_size=size, patch_size=patch, mask_ratio=0.5), 200
    ).sum((1, 2))
    assert counts.max() == target and counts.min() > target / 2


def test_block_is_never_empty_where_no_rectangle_fits():
    # on 2 x 2 patches a block must be a single patch, which areas around 3 never give
    masks = draws(BlockwiseMask((2, 2), 3, min_block=3), 100)
    assert (masks.sum(axis=(1, 2)) >= 1).all()
    assert (masks.sum(axis=(1, 2)) == 3).any()


@pytest.mark.parametrize(
    "size, patch, ratio, count", [(224, 16, 0.75, 147), (32, 4, 0.6, 38), ((32, 64), 8, 0.5, 16)]
)
def test_random_hides_exactly_the_floor(size, patch, ratio, count):
    masks = draws(
        build_mask_generator("random", input_size=size, patch_size=patch, mask_ratio=ratio), 50
    )
    assert (masks.sum(axis=(1, 2)) == count).all()


def test_random_is_uniform():
    share = draws(RandomMask((6, 6), 0.5), 4000).mean(axis=0)
    assert np.abs(share - 0.5).max() < 0.04


@pytest.mark.parametrize(
    "size, patch, cell, ratio, grid, count",
    [
        (224, 16, 32, 0.75, (14, 14), 148),
        (224, 16, None, 0.6, (14, 14), 120),
        (224, 4, 32, 0.6, (56, 56), 1920),
        (224, 32, 32, 0.6, (7, 7), 30),
        ((64, 96), 8, 32, 0.5, (8, 12), 48),
    ],
)
def test_simmim_counts_and_patches(size, patch, cell, ratio, grid, count):
    generator = build_mask_generator(
        "random_mps32", input_size=size, patch_size=patch, mask_ratio=ratio, mask_patch_size=cell
    )
    side = (cell or 2 * patch) // patch
    for mask in draws(generator, 20):
        assert mask.shape == grid and mask.sum() == count
        cells = mask.reshape(grid[0] // side, side, grid[1] // side, side)
        assert (cells.all(axis=(1, 3)) == cells.any(axis=(1, 3))).all()


def test_simmim_rounds_up():
    assert (
        draws(SimMIMMask((4, 4), 0.3, unit=2), 1).sum() == 8
    )  # ceil(4 * 0.3) = 2 units of 4 patches


def test_a_mask_follows_from_its_generator_alone():
    generator = build_mask_generator("block", input_size=224, patch_size=16, mask_ratio=0.75)
    first, again, other = (generator(np.random.default_rng(seed)) for seed in (5, 5, 6))
    assert (first == again).all() and (first != other).any()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"mask_type": "blocks"}, "--mask_type is 'blocks'"),
        ({"input_size": 225}, "--input_size 225x225 is not a multiple of --patch_size 16x16"),
        ({"mask_type": "random", "mask_ratio": 1.0}, "--mask_ratio is 1.0"),
        ({"mask_type": "random", "mask_ratio": 0.001}, "--mask_ratio hides 0 of 196"),
        ({"num_mask_patches": 196}, "--num_mask_patches hides 196 of 196"),
        ({"num_mask_patches": 0}, "--num_mask_patches hides 0 of 196"),
        ({"min_mask_patches_per_block": 0}, "--min_mask_patches_per_block is 0"),
        ({"max_mask_patches_per_block": 0}, "--max_mask_patches_per_block is 0"),
        (
            {"mask_type": "random_mps32", "mask_patch_size": 24},
            "--mask_patch_size 24 is not a multiple",
        ),
        (
            {"mask_type": "random_mps32", "input_size": 240},
            "not a multiple of --mask_patch_size 32, two patches, which is the default; use "
            "--mask_patch_size 16, one patch",
        ),
        (
            {"mask_type": "random_mps32", "input_size": 32, "mask_ratio": 0.9},
            "--mask_ratio hides 1 of 1 .* --mask_patch_size 32 is the whole image; use "
            "--mask_patch_size 16",
        ),
    ],
)
def test_impossible_masks_are_refused(options, message):
    defaults = {"mask_type": "block", "input_size": 224, "patch_size": 16, "mask_ratio": 0.75}
    with pytest.raises(ValueError, match=message):
        build_mask_generator(**(defaults | options))
