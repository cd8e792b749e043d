"""SemMAE's masks against the rule written out token by token, for any parts, ratio and weight
(docs/methods/mae_semmae.md#masks-from-parts)."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from masking_generator import mask_lambda_schedule, num_visible, others_first, semantic_mask
from scripts.benchmarks.published import semantic_mask_of_one

cases = st.tuples(
    st.integers(2, 80),  # tokens
    st.integers(1, 9),  # parts
    st.floats(0.05, 0.95),
    st.floats(0, 1),
    st.integers(0, 2**31),
)


def drawn(tokens: int, parts: int, seed: int, images: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Part ids of uneven sizes, among them empty parts and parts that hold nearly everything; and
    the two noises."""
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet(np.full(parts, rng.choice([0.1, 1.0, 10.0])), size=images)
    ids = np.stack([rng.choice(parts, size=tokens, p=share) for share in shares])
    noises = (
        torch.from_numpy(rng.random((images, size)).astype(np.float32)) for size in (tokens, parts)
    )
    return torch.from_numpy(ids), *noises


@settings(max_examples=60, deadline=None)
@example((46, 7, 0.5, 0.0, 113276))  # two tokens with the same noise
@given(cases)
def test_masks_follow_the_rule(case):
    tokens, parts, ratio, weight, seed = case
    if not 0 < int(tokens * (1 - ratio)) < tokens:
        return
    ids, noise_tokens, noise_parts = drawn(tokens, parts, seed)
    found = semantic_mask(ids, ratio, weight, parts, noise_tokens, noise_parts)
    for row in range(len(ids)):
        counts, visible, masked = semantic_mask_of_one(
            ids[row], ratio, weight, noise_tokens[row], noise_parts[row]
        )
        assert found.count[row].tolist() == counts
        assert found.order[row].tolist() == visible + masked
        assert sorted(found.mask[row].nonzero().flatten().tolist()) == sorted(masked)


@settings(max_examples=60, deadline=None)
@given(cases)
def test_apportioned_counts_are_exact(case):
    """They add up to what is hidden, stay near the wanted mean and below the sizes; so nothing is
    mended."""
    tokens, parts, ratio, weight, seed = case
    if not 0 < int(tokens * (1 - ratio)) < tokens:
        return
    ids, noise_tokens, noise_parts = drawn(tokens, parts, seed)
    found = semantic_mask(
        ids, ratio, weight, parts, noise_tokens, noise_parts, count_fix="apportion"
    )
    sizes = torch.nn.functional.one_hot(ids, parts).sum(1).double()
    masked = torch.zeros(ids.shape).scatter_(1, found.order[:, found.visible :], 1.0)
    assert torch.equal(
        found.count.double(), torch.zeros_like(sizes).scatter_add_(1, ids, masked.double())
    )
    assert found.mask.sum(1).tolist() == [tokens - int(tokens * (1 - ratio))] * len(ids)
    assert (found.count <= sizes).all()
    wanted = weight * ratio * sizes + (1 - weight) * found.inter.double()
    assert (found.count - wanted > -1).all() and (found.count - wanted < 2).all()


@pytest.mark.parametrize(("count_fix", "first"), [("apportion", 38), ("parity", 37)])
def test_one_part_gives_plain_random_masking(count_fix, first):
    """Visible is a stretch of the random order; 'parity' counts 37 of the 38 and hides the last
    token in addition."""
    _, noise_tokens, noise_parts = drawn(50, 4, seed=1)
    found = semantic_mask(
        torch.full((3, 50), 2), 0.75, 0.4, 4, noise_tokens, noise_parts, count_fix=count_fix
    )
    assert torch.equal(found.order[:, :12], noise_tokens.argsort(1)[:, first : first + 12])


def test_the_ends_of_the_schedule():
    """Weight 1 hides a share of every part, weight 0 whole parts and a piece of one."""
    ids, noise_tokens, noise_parts = drawn(196, 7, seed=3, images=20)
    sizes = torch.nn.functional.one_hot(ids, 7).sum(1)
    shares, wholes = (
        semantic_mask(ids, 0.75, w, 7, noise_tokens, noise_parts, count_fix="apportion").count
        for w in (1.0, 0.0)
    )
    assert (shares - 0.75 * sizes).abs().max() < 1
    assert (((wholes > 0) & (wholes < sizes)).sum(1) <= 1).all()
    assert torch.equal(wholes, semantic_mask(ids, 0.75, 0.0, 7, noise_tokens, noise_parts).inter)
    outside = semantic_mask(ids, 0.75, 1.7, 7, noise_tokens, noise_parts)
    assert torch.equal(
        outside.order, semantic_mask(ids, 0.75, 1.0, 7, noise_tokens, noise_parts).order
    )


def test_noise_is_drawn_for_tokens_and_then_for_parts():
    ids = drawn(30, 5, seed=0)[0]
    torch.manual_seed(4)
    noises = torch.rand(3, 30), torch.rand(3, 5)
    torch.manual_seed(4)
    assert torch.equal(
        semantic_mask(ids, 0.6, 0.5, 5).order, semantic_mask(ids, 0.6, 0.5, 5, *noises).order
    )


def test_ids_may_be_bytes():
    ids, *noises = drawn(30, 5, seed=0)
    assert torch.equal(
        semantic_mask(ids.byte(), 0.6, 0.5, 5, *noises).order,
        semantic_mask(ids, 0.6, 0.5, 5, *noises).order,
    )


def test_others_first_is_a_stable_sort():
    selected = torch.rand(50, 33) < torch.rand(50, 1)
    assert torch.equal(others_first(selected), selected.byte().argsort(dim=1, stable=True))


def test_the_number_of_visible_tokens_is_truncated_in_double_precision():
    assert [num_visible(*case) for case in ((196, 0.75), (100, 0.8), (196, 0.6), (16, 0.75))] == [
        49,
        19,
        78,
        4,
    ]
    for tokens, ratio in ((4, 0.9), (196, 0.0), (196, 1.0)):
        with pytest.raises(ValueError, match="--mask_ratio"):
            num_visible(tokens, ratio)


def test_schedules_of_the_weight():
    epochs = np.arange(10)
    assert mask_lambda_schedule(epochs, 10)[[0, 4, 9]] == pytest.approx([0.99, 0.75, 0.0])
    assert mask_lambda_schedule(epochs, 10)[9] == 0
    assert mask_lambda_schedule(3, 10, power=0.5) == pytest.approx(1 - math.sqrt(0.4))
    assert mask_lambda_schedule(epochs, 10, kind="increasing")[[0, 9]] == pytest.approx([0.1, 1.0])
    assert mask_lambda_schedule(epochs, 10, kind="cosine")[[4, 9]] == pytest.approx([0.5, 0.0])
    assert mask_lambda_schedule(np.array([10, 20]), 10).tolist() == [0, 0], (
        "clipped where a run goes on"
    )
    with pytest.raises(ValueError, match="power, increasing, cosine"):
        mask_lambda_schedule(0, 10, kind="linear")
    with pytest.raises(ValueError, match="--mask_lambda_power is 0"):
        mask_lambda_schedule(0, 10, power=0)


def test_what_is_refused():
    ids = torch.zeros(2, 16, dtype=torch.int64)
    with pytest.raises(ValueError, match="count_fix=exact is unknown"):
        semantic_mask(ids, 0.75, 0.5, 2, count_fix="exact")
    with pytest.raises(ValueError, match=r"--mask_ratio 0\.99 leaves 0 of 16"):
        semantic_mask(ids, 0.99, 0.5, 2)
