"""run.json, the list of runs, and where --tracker sends the metrics."""

import csv
import json
import sys
from types import SimpleNamespace

import pytest
from helpers import arguments, own_signals

import run_pretraining
from scripts.tools import runs
from unimim import __version__
from unimim.engine.monitor import RunLog
from unimim.engine.run_record import RunRecord, git_commit

FEW = ("--batch_size", "512", "--epochs", "2", "--save_ckpt_freq", "1")


def train(folder, *flags):
    args = arguments("pretrain", folder, *FEW, *flags)
    with own_signals():
        run_pretraining.main(args)
    return json.loads((folder / "run.json").read_text())


def test_a_run_says_how_it_was_made_and_how_well_it_came(tmp_path):
    record = train(tmp_path / "run")
    log = [json.loads(line) for line in (tmp_path / "run/log.txt").read_text().splitlines()]
    assert record["command"] and record["host"] and record["version"] == __version__
    assert record["commit"] == git_commit() and record["model"] == "conmim_tiny_patch16_224"
    assert record["start"] <= record["end"] and record["epochs_done"] == record["epochs"] == 2
    lowest = min(log, key=lambda row: row["train_loss"])
    assert record["best"]["train_loss"] == {"value": lowest["train_loss"], "epoch": lowest["epoch"]}
    highest = max(row["train_contrast_acc"] for row in log)
    assert record["best"]["train_contrast_acc"]["value"] == highest
    assert not {"train_lr", "n_parameters", "train_grad_norm"} & record["best"].keys()
    again = train(tmp_path / "run", "--epochs", "3", "--warmup_epochs", "0")
    assert again["start"] == record["start"] and again["command"] == record["command"]
    assert len(again["resumed"]) == 1 and again["epochs_done"] == again["epochs"] == 3
    assert again["best"]["train_loss"]["value"] <= record["best"]["train_loss"]["value"]


def test_a_new_run_in_an_old_folder_begins_a_new_record(tmp_path):
    args = SimpleNamespace(auto_resume=False, resume="", epochs=3, model="a")
    first = RunRecord(tmp_path, args)
    first.epoch({"epoch": 0, "train_loss": 0.1})
    second = RunRecord(tmp_path, args)
    assert second.record["best"] == {} and second.record["resumed"] == []
    (tmp_path / "run.json").write_text("{half")
    args.auto_resume = True
    assert RunRecord(tmp_path, args).record["resumed"] == []


def test_runs_are_listed_with_their_best_metrics(tmp_path, capsys):
    def record(name, done, end, **best):
        (tmp_path / name).mkdir(parents=True)
        values = {key: {"value": value, "epoch": 1} for key, value in best.items()}
        content = {"model": "mae", "epochs": 4, "epochs_done": done, "end": end, "best": values}
        content |= {"start": "2026-01-01T10:00:00+00:00", "commit": "abcdef12-dirty"}
        (tmp_path / name / "run.json").write_text(json.dumps(content))

    record("b/one", 4, "2026-01-01T11:02:03+00:00", train_loss=0.5, knn_acc1=40.0)
    record("a", 2, "2026-01-01T10:00:09+00:00", train_loss=0.4)
    record("c", 1, None, train_loss=0.6, knn_acc1=50.0, effective_rank=7.5)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/run.json").write_text("{")
    runs.main([str(tmp_path), "--csv", str(tmp_path / "runs.csv")])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == [
        "run",
        "model",
        "epochs",
        "state",
        "took",
        "commit",
        "knn_acc1",
        "train_loss",
    ]
    assert lines[1] == ["a", "mae", "2/4", "stopped", "0:00:09", "abcdef12-dirty", "0.4"]
    assert lines[2] == ["b/one", "mae", "4/4", "finished", "1:02:03", "abcdef12-dirty", "40", "0.5"]
    assert lines[3] == ["c", "mae", "1/4", "running", "abcdef12-dirty", "50", "0.6"]
    with (tmp_path / "runs.csv").open() as file:
        assert [row["effective_rank"] for row in csv.DictReader(file)] == ["", "", "7.5"]
    for metric, order in (("knn_acc1", ["c", "b/one", "a"]), ("train_loss", ["a", "b/one", "c"])):
        runs.main([str(tmp_path), "--sort", metric])
        assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == order
    with pytest.raises(SystemExit):
        runs.main([str(tmp_path), "--sort", "acc"])
    assert "--sort acc: no run has it; there are" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit):
        runs.main([str(tmp_path / "empty")])
    assert "holds no run" in capsys.readouterr().err


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_trackers_get_every_metric(tmp_path, monkeypatch, tracker):
    asked, sent = [], []
    made = SimpleNamespace(
        log=lambda metrics, step: sent.append((metrics, step)), finish=sent.clear
    )
    module = SimpleNamespace(init=lambda **how: asked.append(how) or made)
    monkeypatch.setitem(sys.modules, tracker, module)
    args = arguments("pretrain", tmp_path / "named", "--tracker", tracker)
    args.rank = 0
    (tmp_path / "named").mkdir()
    log = RunLog(args, {"lr": 1})
    log.epoch({"epoch": 0, "train_loss": 0.5}, 7)
    assert sent == [({"epoch/epoch": 0, "epoch/train_loss": 0.5}, 7)]
    log.close()
    assert sent == [] and asked[0]["project"] == "unimim"
    # trackio would go on with another run of the same name
    own = (tmp_path / "named/wandb_id.txt").read_text().strip()
    assert asked[0]["name"] == (f"named-{own}" if tracker == "trackio" else "named")
    assert asked[0].get("id", own) == own
    monkeypatch.setitem(sys.modules, tracker, None)
    with pytest.raises(ValueError, match=f"--tracker {tracker} needs the package {tracker}: pip"):
        RunLog(args, {})


def test_tensorboard_is_written_to_the_output_folder(tmp_path):
    args = arguments("pretrain", tmp_path, "--tracker", "tensorboard")
    args.rank = 0
    log = RunLog(args, {})
    log.step({"a": 1.0}, 1)
    log.close()
    assert list(tmp_path.glob("events.*"))
    args.output_dir = args.log_dir = ""
    with pytest.raises(ValueError, match="--tracker tensorboard needs a folder"):
        RunLog(args, {})
