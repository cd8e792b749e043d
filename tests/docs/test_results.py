"""The accuracies of docs/results.md: every method, three seeds, and tables made from the CSV."""

from helpers import ROOT

from scripts.benchmarks.gpu_learns import PRETRAINED, RANDOM
from scripts.experiments import plot_comparison
from scripts.experiments.compare_methods import METHODS

PAGE = ROOT / "docs" / "results.md"
TABLE = ROOT / "docs" / "results" / "cifar10.csv"
# SemMAE with parts that are not learned
PART_ABLATIONS = {"semmae_kmeans", "semmae_random", "semmae_strong"}
TO_BE_RUN = {"random_pixio", "pixio", "random_nepa", "nepa"}  # of which the table has no rows yet


def test_every_method_has_three_seeds_of_the_same_length():
    rows = plot_comparison.of_length(plot_comparison.read_rows(TABLE, "cifar10", None), "7")
    assert set(METHODS) - PART_ABLATIONS == {*PRETRAINED, *RANDOM}
    assert not TO_BE_RUN & {row["method"] for row in rows}
    for key in {*PRETRAINED, *RANDOM} - TO_BE_RUN:
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
