"""Files that were written before the code moved into `unimim` resume and load as they did then.

`files_of_version_0` holds one of each kind, with the flags of its run and what the next steps
gave (`write_files.py` there tells how). Numbers are compared up to the rounding in which CPUs
differ.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import differing, in_ranks, own_signals, start, train_steps

import run_knn
import run_linear_probing
import run_part_learning
from unimim.checkpoint.files import load_checkpoint
from unimim.data.part_maps import PartMaps

FILES = Path(__file__).parent / "files_of_version_0"
EXPECTED = json.loads((FILES / "expected.json").read_text())
ENCODER = FILES / "pretraining" / "encoder-0-3.safetensors"
ROUNDING = 1e-5


def own_copy(name: str, folder: Path) -> Path:
    """A folder that a run may write to, without what is not needed to resume."""
    return Path(shutil.copytree(FILES / name, folder / name))


def assert_close(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Old names and values; a newer log may hold more. Rounding may decide a near tie."""
    for name, value in expected.items():
        ties = 0.05 if name.endswith("_acc") else 1e-8
        assert found[name] == pytest.approx(value, rel=ROUNDING, abs=ties), name


def next_steps(folder: Path, stage: str, flags: list[str]) -> list[dict]:
    """What steps 3 to 6 give after resuming the file of step 3."""
    run, position = start(stage, folder, *flags)
    assert (position.epoch, position.step) == (0, 3)
    return train_steps(run, 3, 6)


@pytest.mark.parametrize(
    ("name", "stage"), [("pretraining", "pretrain"), ("finetuning", "finetune")]
)
def test_an_old_training_checkpoint_goes_on_as_its_own_run_did(tmp_path, name, stage):
    expected = EXPECTED[name]
    steps = next_steps(own_copy(name, tmp_path), stage, expected["flags"])
    for found, wanted in zip(steps, expected["next"], strict=True):
        assert_close(found, wanted)


@pytest.mark.slow
def test_old_shards_of_deepspeed_go_on_as_their_own_run_did(tmp_path):
    expected = EXPECTED["deepspeed"]
    folder = own_copy("deepspeed", tmp_path)
    (steps,) = in_ranks(1, next_steps, folder, "pretrain", expected["flags"])
    for found, wanted in zip(steps, expected["next"], strict=True):
        assert_close(found, wanted)


def test_an_old_encoder_gives_its_old_features(tmp_path):
    """Those that lie in the cache, which is of this encoder and is taken as such."""
    flags = [*EXPECTED["knn"]["flags"], "--finetune", str(ENCODER), "--knn_k", "5"]
    flags += ["--output_dir", str(tmp_path / "run")]
    for cache in (FILES / "features", tmp_path / "features"):
        (result,) = run_knn.main(run_knn.parse_knn([*flags, "--feature_cache", str(cache)]))
        assert result.acc1 == pytest.approx(EXPECTED["knn"]["acc1"], abs=0.3)
    for split in ("train", "val"):
        old, new = (
            load_checkpoint(folder / f"{split}.pth")
            for folder in (FILES / "features", tmp_path / "features")
        )
        torch.testing.assert_close(new["vectors"], old["vectors"], rtol=ROUNDING, atol=ROUNDING)
        assert differing(new["labels"], old["labels"]) == []
        assert new["about"] == old["about"]


@pytest.mark.parametrize(
    ("name", "script", "parse", "given"),
    [
        ("probing", run_linear_probing, run_linear_probing.parse_linear, "--finetune"),
        ("part_learning", run_part_learning, run_part_learning.parse_parts, "--teacher"),
    ],
    ids=["probing", "part_learning"],
)
def test_an_old_epoch_of_probing_and_part_learning_goes_on(tmp_path, name, script, parse, given):
    folder = own_copy(name, tmp_path)
    flags = [*EXPECTED[name]["flags"], given, str(ENCODER), "--output_dir", str(folder)]
    with own_signals():
        script.main(parse(flags))
    (line,) = (folder / "log.txt").read_text().splitlines()
    assert_close(json.loads(line), EXPECTED[name]["next"])


@pytest.mark.parametrize("form", ["parts_array", "parts_folder", "parts.zip"])
def test_old_part_maps_of_every_form_are_read(form):
    names = None if form == "parts_array" else [f"class0/{index}.jpeg" for index in range(5)]
    maps = PartMaps.open(FILES / form, paths=names)
    found = np.stack([maps.read(index) for index in range(5)])
    assert found.tolist() == EXPECTED["parts"]
    if form == "parts_array":
        assert maps.read_scores(0).shape == (4, 4)
        assert maps.meta.background_id == 0 and len(maps) == 355
