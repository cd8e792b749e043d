"""The accuracies of docs/results.md: every method, three seeds, and tables made from the CSV."""

import csv

from helpers import ROOT

from scripts.benchmarks.gpu_learns import PRETRAINED, RANDOM
from scripts.experiments import demo_claims, plot_comparison
from scripts.experiments.compare_methods import METHODS

PAGE = ROOT / "docs" / "results.md"
TABLE = ROOT / "docs" / "results" / "cifar10.csv"
# SemMAE with parts that are not learned
PART_ABLATIONS = {"semmae_kmeans", "semmae_random", "semmae_strong"}


def test_every_method_has_three_seeds_of_the_same_length():
    rows = plot_comparison.of_length(plot_comparison.read_rows(TABLE, "cifar10", None), "7")
    assert set(METHODS) - PART_ABLATIONS == {*PRETRAINED, *RANDOM}
    for key in {*PRETRAINED, *RANDOM}:
        own = [row for row in rows if row["method"] == key]
        assert sorted(row["seed"] for row in own) == ["0", "1", "2"], key
        assert {row["steps"] for row in own} == {"0" if key in RANDOM else "546"}, key
        for column in plot_comparison.COLUMNS:
            assert all(10 < float(row[column]) < 100 for row in own), (key, column)


def test_the_tables_of_the_page_are_those_of_the_csv():
    text = PAGE.read_text()
    found = plot_comparison.tables(plot_comparison.read_rows(TABLE, None, None))
    command = "plot_comparison.py docs/results/cifar10.csv docs/results/cifar10.png --page"
    assert plot_comparison.fill_in(text, found) == text, f"stale; run {command} docs/results.md"
    for name in (
        "accuracies 7 epochs",
        "gains 7 epochs",
        "claims 7 epochs",
        "accuracies 30 epochs",
    ):
        assert f"<!-- plot_comparison.py: {name} -->" in text
    assert "(results/cifar10.png)" in text and (PAGE.parent / "results/cifar10.png").is_file()


def claims_rows() -> list[demo_claims.Row]:
    kinds = demo_claims.Row.__annotations__
    with (ROOT / "docs/results/claims_mnist5k.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    return [demo_claims.Row(**{key: kinds[key](row[key]) for key in kinds}) for row in rows]


def test_the_tables_of_the_small_claims_are_those_of_the_csv():
    rows, text = claims_rows(), PAGE.read_text()
    for key in {row.arm for row in rows}:
        assert sorted(row.seed for row in rows if row.arm == key) == list(demo_claims.SEEDS), key
    assert demo_claims.tables(rows) in text


def test_arms_of_a_small_claim_differ_in_one_flag(tmp_path):
    """Both are pre-trained by the same recipe but for one flag, and judged by the same commands."""
    for key, other in demo_claims.CLAIMS:
        ours, theirs = (
            [*demo_claims.commands(tmp_path, demo_claims.ARMS[name], 1).values()]
            for name in (key, other)
        )
        if len(ours) == len(theirs):
            assert ours[1:] == theirs[1:], key
            flags = set(theirs[0].split()) - set(ours[0].split())
            assert flags in ({"--no_bottleneck"}, {"--fft_weight", "0"})
