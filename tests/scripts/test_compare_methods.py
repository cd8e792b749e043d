"""The comparison of methods: what its flags make of the runs, and the picture of its table."""

import csv

import pytest

from scripts.experiments import compare_methods, plot_comparison
from scripts.experiments.compare_methods import METHODS, Comparison, Schedule


def test_one_budget_on_cifar10_and_a_short_one_for_trying(tmp_path, monkeypatch):
    data = tmp_path / "my images"
    full = Comparison("cifar10", 0, tmp_path, "bf16", 1, data_path=data)
    quick = Comparison("cifar10", 0, tmp_path, "bf16", 1, data_path=data, epochs=1, quick=True)
    commands = []
    monkeypatch.setattr(Comparison, "run", lambda self, command, folder: commands.append(command))
    full.pretrain("semaim")
    quick.pretrain("semaim")
    command, quick_command = commands
    assert f"--data_path '{data}'" in command and "--epochs 7 --warmup_steps 54" in command
    assert "--epochs 1 --warmup_steps 8" in quick_command
    assert quick.linear.endswith("--epochs 5") and quick.data.finetune.endswith("--warmup_epochs 0")
    assert set(full.data.schedules.values()) == {Schedule(7, 54)}


def test_parts_of_a_strong_teacher_come_from_its_file_at_its_size(tmp_path, monkeypatch):
    teacher = tmp_path / "a vit.safetensors"
    one = Comparison("cifar10", 0, tmp_path, "bf16", 1, data_path=tmp_path, teacher=teacher)
    commands = []

    def run(self, command, folder):
        commands.append(command)
        return folder

    monkeypatch.setattr(Comparison, "run", run)
    folder = one.pretrain("semmae_strong")
    stage1, pretraining = commands  # no MAE comes before
    assert f"--teacher '{teacher}' --part_source kmeans" in stage1
    # 8 x 8 patches of 14 pixels, as many as the method's of 4; the last flag counts
    assert stage1.split("--input_size ")[-1].startswith("112 ")
    maps = folder.parent.parent / "parts_kmeans_strong" / "maps"
    assert f"--extract {maps}" in stage1
    assert f"--part_maps {maps} --part_source kmeans" in pretraining


def test_a_strong_teacher_has_to_be_given(tmp_path, capsys):
    with pytest.raises(SystemExit):
        compare_methods.main(["--data_path", str(tmp_path), "--methods", "semmae_strong"])
    assert "--methods semmae_strong needs --teacher FILE; scripts/" in capsys.readouterr().err


def test_the_images_have_to_be_given(capsys):
    with pytest.raises(SystemExit):
        compare_methods.main([])
    assert "--data_path is missing; scripts/tools/make_cifar10_subset.py" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        compare_methods.main(["--data_path", "/no/such/folder"])
    assert "/no/such/folder, which is no folder" in capsys.readouterr().err


@pytest.fixture
def table(tmp_path):
    rows = [("random", seed, 0, 30.0 + seed) for seed in (0, 1)]
    rows += [("mae", seed, epochs, epochs + 40.0 + seed) for epochs in (7, 30) for seed in (0, 1)]
    rows += [("a2mim_resnet18", 0, 7, 50.0)]
    names = ("knn_acc1", "linear_acc1", "finetune_acc1")
    with (tmp_path / "learns.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("data", "method", "seed", "pretrain_loss", "epochs", *names))
        for method, seed, epochs, accuracy in rows:
            writer.writerow(("cifar10", method, seed, 0.5, epochs, *[accuracy] * 3))
    return tmp_path / "learns.csv"


def test_the_picture_shows_the_lengths_beside_random_weights_of_the_network(
    table, tmp_path, capsys
):
    rows = plot_comparison.read_rows(table, None, [7])
    assert [(row["method"], row["epochs"]) for row in rows] == [
        ("random", "0"), ("random", "0"), ("mae", "7"), ("mae", "7"), ("a2mim_resnet18", "7")
    ]  # fmt: skip
    assert plot_comparison.groups_of(rows) == [("random", ["mae"]), (None, ["a2mim_resnet18"])]
    assert plot_comparison.mean_and_error([47.0, 48.0]) == pytest.approx((47.5, 0.5))
    picture = tmp_path / "picture.png"
    plot_comparison.main([str(table), str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")
    every = plot_comparison.read_rows(table, None, None)
    labels = [entry.get_label() for entry in plot_comparison.legend_entries(every)]
    # the table of compare_methods.py names no steps
    assert labels == ["mean and standard error of 2 seeds"] * 2 + ["random weights"]
    with pytest.raises(SystemExit):
        plot_comparison.main([str(table), str(picture), "--epochs", "8"])
    assert "has no rows of that kind" in capsys.readouterr().err


def test_tables_are_written_into_a_page_and_differences_are_paired(table, tmp_path, capsys):
    page = tmp_path / "page.md"
    begin = "<!-- plot_comparison.py: gains 30 epochs -->"
    page.write_text(f"# Title\n\n{begin}\nold\n<!-- end -->\n\nmore\n")
    plot_comparison.main([str(table), "--page", str(page)])
    lines = page.read_text().splitlines()
    # 70 and 71 against 30 and 31: the seeds differ, their differences do not
    gain = " | ".join(["**+40.0 ± 0.0**"] * 3)
    assert lines[:2] == ["# Title", ""] and lines[-2:] == ["", "more"] and "old" not in lines
    assert lines[2] == begin and f"| MAE | random weights | {gain} |" in lines
    capsys.readouterr()
    page.write_text("<!-- plot_comparison.py: nothing -->\n<!-- end -->\n")
    with pytest.raises(SystemExit):
        plot_comparison.main([str(table), "--page", str(page)])
    assert "no table is called 'nothing'; use accuracies 7 epochs" in capsys.readouterr().err


def test_unpublished_points_stand_in_tables_of_their_own_beside_what_differs_in_one_choice(table):
    rows = plot_comparison.read_rows(table, None, [7])
    row = {"knn_acc1": "49", "linear_acc1": "46", "finetune_acc1": "47", "pretrain_loss": "0.5"}
    rows.append({"data": "cifar10", "method": "mae_spectra", "seed": "0", "epochs": "7"} | row)
    before = plot_comparison.tables(plot_comparison.published(rows))
    found = plot_comparison.tables(rows)
    assert found["unpublished 7 epochs"].splitlines()[2:] == [
        "| MAE, spectra | 1 | 0.500 | 49.0 | 46.0 | 47.0 |"
    ]
    # the other seed of MAE has no partner
    assert found["neighbors 7 epochs"].splitlines()[2:] == [
        "| MAE, spectra | MAE | +2.0 | -1.0 | +0.0 |"
    ]
    assert {name: found[name] for name in before} == before


def test_every_network_has_random_weights_to_compare_with():
    random = {method.classifier for method in METHODS.values() if not method.pretrain}
    assert {method.classifier for method in METHODS.values()} == random
