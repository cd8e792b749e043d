"""--eval_every: the encoder is judged while it trains, and training does not notice."""

import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import METHODS, ROOT, arguments, board, differing, in_ranks, own_signals, start
from PIL import Image

import run_pretraining
from unimim.checkpoint.files import list_checkpoints, load_checkpoint
from unimim.data.sources import digits_source
from unimim.engine.session import Position
from unimim.engine.state import Stopped
from unimim.evaluation.features import Features
from unimim.evaluation.online import (
    OnlineEvaluation,
    held_out,
    labeled_images,
    linear_accuracy,
    spread,
)

FEW = ["--eval_images", "300", "--batch_size", "256", "--epochs", "2", "--save_ckpt_freq", "1"]
NAMES = {"knn_acc1", "linear_acc1", "effective_rank", "attention_entropy"}


def run_of(folder: Path, *flags: str) -> list[dict]:
    """Train through the script; returns the lines of log.txt."""
    args = arguments("pretrain", folder, *flags, *FEW)
    with own_signals():
        run_pretraining.main(args)
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


@pytest.mark.parametrize(
    "method", [(), METHODS["nepa"], METHODS["semaim"], METHODS["a2mim_resnet"]]
)
def test_the_loss_curve_and_the_weights_are_bit_equal_with_and_without(tmp_path, method):
    """ConMIM with its teacher, dropout of paths, and noise that is drawn in the forward pass."""
    flags = (*method, *(() if method else ("--drop_path", "0.3")))
    plain = run_of(tmp_path / "plain", *flags)
    shown = ["--log_dir", str(tmp_path / "board")]
    judged = run_of(tmp_path / "judged", *flags, "--eval_every", "1", *shown)
    assert len(plain) == len(judged) == 2
    for without, row in zip(plain, judged, strict=True):
        assert without == {name: row[name] for name in without}
    files = [list_checkpoints(tmp_path / name)[-1] for name in ("plain", "judged")]
    ours, theirs = (load_checkpoint(file) for file in files)
    for key in ("model", "teacher", "optimizer", "rng", "monitor"):
        assert differing(ours[key], theirs[key]) == [], key
    names = NAMES - {"attention_entropy"} if "a2mim_resnet18" in method else NAMES
    with_teacher = ours["teacher"] is not None
    expected = names | {f"teacher_{name}" for name in names if with_teacher} | {"eval_seconds"}
    assert judged[0].keys() - plain[0].keys() == expected
    assert with_teacher == ("a2mim_resnet18" not in method)
    for row in judged:
        assert 10 < row["knn_acc1"] <= 100 and 10 < row["linear_acc1"] <= 100
        assert row["effective_rank"] >= 1 and row["eval_seconds"] > 0
        assert 0 < row.get("attention_entropy", 0.5) <= 1
    logged = board(tmp_path / "board")
    for name in expected:
        assert logged[f"epoch/{name}"] == pytest.approx([row[name] for row in judged]), name
    check_pictures(tmp_path / "judged/pictures", logged, method)


def test_a_signal_ends_the_evaluation_which_is_made_when_the_run_goes_on(tmp_path, monkeypatch):
    after_epoch = OnlineEvaluation.after_epoch

    def signaled(evaluation, position):
        evaluation.run.stop.received = "SIGTERM"
        return after_epoch(evaluation, position)

    folder = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(OnlineEvaluation, "after_epoch", signaled)
        with pytest.raises(Stopped, match="SIGTERM during an evaluation"):
            run_of(folder, "--eval_every", "1")
    (saved,) = folder.glob("checkpoint-*.pth")
    assert saved.stem == f"checkpoint-0-{load_checkpoint(saved)['data']['steps_per_epoch']}"
    rows = [run_of(tmp_path / name, "--eval_every", "1") for name in ("stopped", "whole")]
    for row in (*rows[0], *rows[1]):
        row.pop("eval_seconds")
    assert rows[0] == rows[1] and len(rows[0]) == 2
    states = [
        load_checkpoint(tmp_path / name / "checkpoint-1.pth") for name in ("stopped", "whole")
    ]
    assert differing(states[0]["model"], states[1]["model"]) == []


def check_pictures(folder: Path, logged: dict, method: tuple[str, ...]) -> None:
    """Each evaluation has written what it has sent; NEPA, which hides nothing, has none."""
    sent = logged.get("masks_and_predictions", [])
    found = [np.asarray(Image.open(folder / f"epoch-{k}.png")) for k in range(len(sent))]
    assert len(sent) == (0 if method == METHODS["nepa"] else 2)
    for ours, theirs in zip(found, sent, strict=True):
        assert np.array_equal(ours, theirs)
    assert len(list(folder.glob("*"))) == len(sent)


def test_it_comes_every_so_many_epochs_and_after_the_last(tmp_path, capsys):
    run, _ = start(
        "pretrain", tmp_path, "--eval_every", "2", "--eval_images", "50", "--epochs", "5"
    )
    evaluation = OnlineEvaluation(run.context, run.task)
    evaluation.follow(run)
    evaluation.metrics = lambda network: {"seen": 1.0}
    due = [bool(evaluation.after_epoch(Position(epoch=epoch))) for epoch in range(5)]
    assert due == [False, True, False, True, True]
    written = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert written == ["epoch-1.png", "epoch-3.png", "epoch-4.png"]
    with pytest.raises(SystemExit):
        start("pretrain", tmp_path, "--eval_every", "-1")
    assert "--eval_every must be at least 0" in capsys.readouterr().err


def test_every_module_gets_its_mode_back(tmp_path):
    run, _ = start("pretrain", tmp_path, "--eval_every", "1", "--eval_images", "50")
    run.task.blocks[0].eval()
    modes = [module.training for module in (*run.task.modules(), *run.task.teacher.modules())]
    evaluation = OnlineEvaluation(run.context, run.task)
    evaluation.follow(run)
    evaluation.after_epoch(Position())
    after = [module.training for module in (*run.task.modules(), *run.task.teacher.modules())]
    assert modes == after
    assert all(p.requires_grad for p in run.task.blocks.parameters())


def test_the_probe_separates_what_a_line_separates():
    torch.manual_seed(0)
    centers = 4 * torch.randn(3, 8)
    labels = torch.arange(300) % 3
    vectors = centers[labels] + torch.randn(300, 8)
    bank, queries = Features(vectors[:200], labels[:200]), Features(vectors[200:], labels[200:])
    assert linear_accuracy(bank, queries, 3) > 95
    state = torch.get_rng_state()
    shuffled = Features(vectors[200:], labels[200:].roll(1))
    assert linear_accuracy(bank, shuffled, 3) < 10
    assert torch.equal(state, torch.get_rng_state())


def folder_of_digits(folder: Path, *, split: bool) -> None:
    source = digits_source(train=True)
    for index in range(60):
        part = ("val" if index % 3 == 0 else "train") if split else ""
        place = folder / part / f"class{source.labels[index]}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(source.read(index)).save(place / f"{index}.png")


def test_labels_are_the_datas_own_or_those_of_another_folder(tmp_path):
    folder_of_digits(tmp_path / "one", split=False)
    folder_of_digits(tmp_path / "two", split=True)
    flat = tmp_path / "flat"
    flat.mkdir()
    Image.new("RGB", (16, 16)).save(flat / "a.png")

    def of(path: Path, **changes) -> tuple:
        args = Namespace(data_set=None, data_path=str(path), eval_data_path=None, eval_images=40,
                         seed=0, max_bad_images=1, strict_data=False)  # fmt: skip
        vars(args).update(changes)
        return labeled_images(args, (16, 16))

    known, asked = of(tmp_path / "two")
    assert (len(known), len(asked)) == (40, 20)
    names = {known.source.path(k) for k in range(40)} & {asked.source.path(k) for k in range(20)}
    assert not names and known[0, 0]["image"].shape == (3, 16, 16)
    known, asked = of(tmp_path / "one")  # every fifth image of each class is held out
    assert 0 < len(asked) <= 12 and len(known) == 40
    known, asked = of(flat, data_set="image_folder", eval_data_path=str(tmp_path / "two"))
    assert (len(known), len(asked)) == (40, 20)
    with pytest.raises(ValueError, match="needs labeled images, which --eval_data_path can name"):
        of(flat)
    with pytest.raises(ValueError, match=r": --eval_data_path .*none does not exist"):
        of(flat, eval_data_path=str(tmp_path / "none"))


def test_held_out_and_spread_images():
    source = digits_source(train=True)
    known, asked = held_out(source)
    assert sorted([*known.chosen, *asked.chosen]) == list(range(len(source)))
    assert (np.bincount(asked.labels) == np.bincount(source.labels) // 5).all()
    few = spread(source, 7)
    assert len(few) == 7 and few.chosen[0] == 0 and few.chosen[-1] == len(source) - 1
    assert spread(source, len(source)) is source


def judged(folder: Path) -> dict[str, float]:
    run, _ = start("pretrain", folder, "--eval_every", "1", "--eval_images", "101")
    evaluation = OnlineEvaluation(run.context, run.task)
    evaluation.follow(run)
    return evaluation.metrics(run.task)


def judged_and_trained(folder: Path) -> dict[str, float]:
    """Judge a run, and train with DDP, and then with weights that no rank has whole."""
    found = judged(folder / "judged")
    flags = ["--lr", "1e-2", "--eval_every", "2"]
    config = ROOT / "tests/engine/zero3_partitioned.json"
    sharded = ["--enable_deepspeed", "--deepspeed_config", str(config)]
    run_of(folder / "ddp", *METHODS["mae"], *flags)
    run_of(folder / "zero3", *METHODS["mae"], *flags, *sharded)
    return found


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Path, list[dict]]:
    """The folder of two ranks, and what each judged."""
    folder = tmp_path_factory.mktemp("pair")
    return folder, in_ranks(2, judged_and_trained, folder)


@pytest.mark.slow
def test_two_ranks_find_what_one_process_finds(tmp_path, pair):
    alone = judged(tmp_path)
    for found in pair[1]:
        assert found == pytest.approx(alone, rel=1e-4)


@pytest.mark.slow
def test_sharded_weights_are_judged_as_whole_ones(pair):
    folder = pair[0]
    ddp, zero3 = (
        json.loads((folder / name / "log.txt").read_text().splitlines()[-1])
        for name in ("ddp", "zero3")
    )
    assert zero3["train_loss"] == pytest.approx(ddp["train_loss"], rel=1e-4)
    assert zero3["knn_acc1"] == pytest.approx(ddp["knn_acc1"], abs=2)
    for name in ("effective_rank", "attention_entropy"):
        assert zero3[name] == pytest.approx(ddp[name], rel=1e-3), name
    pictures = [Image.open(folder / name / "pictures/epoch-1.png") for name in ("ddp", "zero3")]
    ours, theirs = (np.asarray(picture).astype(int) for picture in pictures)
    assert ours.shape == (4 * 16, 4 * 16, 3) and np.abs(ours - theirs).max() <= 2
