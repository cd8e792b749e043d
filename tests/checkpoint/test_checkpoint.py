"""Checkpoints: atomic, plain, found and pruned by name, refused when damaged; weights fitted to
models and to timm."""

import argparse
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from helpers import Payload
from safetensors.torch import save_file
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer as TimmViT
from torch import nn

from modeling_finetune import VisionTransformer
from modeling_pretrain import ConMIM
from unimim.checkpoint.files import (
    _download,
    begin_deepspeed_folder,
    check_checkpoint,
    deepspeed_folder,
    encoder_file,
    finish_deepspeed_folder,
    latest_valid_checkpoint,
    list_checkpoints,
    load_checkpoint,
    metadata_of,
    prune_checkpoints,
    save_checkpoint,
    save_encoder,
    sync_deepspeed_folder,
)
from unimim.checkpoint.loading import _fold_blocks, load_pretrained, unwrapped
from unimim.checkpoint.names import to_timm
from unimim.checkpoint.resizing import (
    geometric_ratio,
    interpolate_pos_embed,
    interpolate_rel_pos_bias,
    source_coordinates,
)

SIZE = {"patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2}
ROOT = Path(__file__).resolve().parents[2]


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter away from its initial zeros and ones, so that a lost one shows."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def vit(input_size=16, **options) -> VisionTransformer:
    return randomized(
        VisionTransformer(**{**SIZE, "input_size": input_size, "num_classes": 0} | options)
    )


def conmim(seed: int = 0, **options) -> ConMIM:
    form = {
        "rel_pos_bias": "shared",
        "init_values": 0.1,
        "projector_hidden_dim": 8,
        "projector_out_dim": 4,
    }
    model = randomized(ConMIM(**{**SIZE, "input_size": 16, **form} | options), seed)
    randomized(model.teacher, seed + 1)
    return model


def images(size: int | tuple[int, int] = 16) -> torch.Tensor:
    size = (size, size) if isinstance(size, int) else size
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(3))


def write(folder: Path, *names: str) -> list[Path]:
    for name in names:
        save_checkpoint(folder / name, {"model": {"w": torch.arange(1000.0)}, "name": name})
    return [folder / name for name in names]


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


# --------------------------------------------------------------------------------------------------
# Writing


def test_a_training_state_comes_back_as_it_was(tmp_path):
    layer = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = {
        "model": layer.state_dict(),
        "optimizer": optimizer.state_dict(),
        "teacher": None,
        "rng": {
            "numpy": 2**127 + 1,
            "python": list(random.Random(0).getstate()),
            "torch": torch.get_rng_state(),
        },
        "position": [3, 0.5, True, "x", (1, 2)],
        "half": torch.ones(2, dtype=torch.bfloat16),
    }
    save_checkpoint(tmp_path / "new" / "checkpoint-0.pth", state)
    loaded = load_checkpoint(tmp_path / "new" / "checkpoint-0.pth")
    plain = {"teacher", "position"}
    assert {key: loaded[key] for key in plain} == {key: state[key] for key in plain}
    for key in state.keys() - plain:
        torch.testing.assert_close(loaded[key], state[key], rtol=0, atol=0)
    assert loaded["rng"]["numpy"] == 2**127 + 1
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["checkpoint-0.pth"]


@pytest.mark.parametrize(
    ("value", "named"),
    [(np.float64(1.0), "numpy.float64"), (argparse.Namespace(), "argparse.Namespace"),
     ({1}, "builtins.set"),
     (Path("x"), "PosixPath"), (np.zeros(2), "numpy.ndarray"), (len, "builtin_function_or_method")],
)  # fmt: skip
def test_what_would_not_read_back_is_refused_before_anything_is_written(tmp_path, value, named):
    (path,) = write(tmp_path, "checkpoint-0.pth")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=re.escape("state['a'][1]['b'] is a ") + f".*{named}"):
        save_checkpoint(path, {"a": [0, OrderedDict(b=value)]})
    with pytest.raises(ValueError, match="key of type tuple"):
        save_checkpoint(path, {"a": {(1, 2): 0}})
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


KILLED = """
import sys, torch
from unimim.checkpoint.files import save_checkpoint
big = torch.zeros(60_000_000)
while True:
    save_checkpoint(sys.argv[1], {"model": {"w": big}})
"""


def test_a_save_killed_in_the_middle_leaves_the_old_file_and_is_cleaned_up_by_the_next(tmp_path):
    (path,) = write(tmp_path, "checkpoint-1.pth")
    before = path.read_bytes()
    writer = subprocess.Popen([sys.executable, "-c", KILLED, path], cwd=ROOT)
    deadline = time.monotonic() + 60
    while not any(p.stat().st_size for p in set(tmp_path.iterdir()) - {path}):
        assert writer.poll() is None and time.monotonic() < deadline, "the writer wrote nothing"
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2, "the save was over before it was killed"
    assert list_checkpoints(tmp_path) == [path] and latest_valid_checkpoint(tmp_path) == path
    write(tmp_path, "checkpoint-2.pth")
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint-1.pth", "checkpoint-2.pth"}


def test_a_save_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    (path,) = write(tmp_path, "checkpoint-1.pth")

    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
        with pytest.raises(OSError, match="File too large"):
            save_checkpoint(path, {"w": torch.zeros(10**6)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == [path] and load_checkpoint(path)["name"] == path.name


def test_the_bytes_are_on_the_disk_before_the_name(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(
        os, "fsync", lambda fd: (calls.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd))
    )
    monkeypatch.setattr(
        Path, "replace", lambda self, to: (calls.append("rename"), replace(self, to))
    )
    write(tmp_path, "checkpoint-1.pth")
    names = [Path(call).name for call in calls]
    assert names[0].startswith(".checkpoint-1.pth.") and names[1:] == ["rename", tmp_path.name]


def test_others_may_read_what_the_user_lets_them(tmp_path):
    before = os.umask(0o027)
    try:
        write(tmp_path, "checkpoint-1.pth")
        save_encoder(tmp_path / "encoder-1.safetensors", {"weight": torch.zeros(2)}, {})
    finally:
        os.umask(before)
    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {
        "checkpoint-1.pth": 0o640,
        "encoder-1.safetensors": 0o640,
    }


# --------------------------------------------------------------------------------------------------
# Reading


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, zipped):
    torch.save(
        {"model": Payload(tmp_path / "ran")},
        tmp_path / "x.pth",
        _use_new_zipfile_serialization=zipped,
    )
    with pytest.raises(ValueError, match=r"x.pth is refused: unpickling it would run \S+$"):
        load_checkpoint(tmp_path / "x.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_published_files_with_a_namespace_load(tmp_path, zipped):
    args = argparse.Namespace(lr=0.1, betas=[0.9, 0.98], output_dir="x")
    torch.save(
        {"model": {"w": torch.ones(2)}, "args": args},
        tmp_path / "x.pth",
        _use_new_zipfile_serialization=zipped,
    )
    loaded = load_checkpoint(tmp_path / "x.pth")
    assert loaded["args"] == {"lr": 0.1, "betas": [0.9, 0.98], "output_dir": "x"}
    assert loaded["model"]["w"].tolist() == [1, 1]


@pytest.mark.parametrize("name", ["checkpoint-1.pth", "encoder-1.safetensors"])
@pytest.mark.parametrize("change", ["half", "empty", "text", "missing"])
def test_a_damaged_file_is_one_clear_error(tmp_path, name, change):
    path = tmp_path / name
    if name.endswith(".pth"):
        write(tmp_path, name)
    else:
        save_file({"w": torch.ones(1000)}, path)
    data = path.read_bytes()
    if change == "missing":
        path.unlink()
    else:
        path.write_bytes(
            {"half": data[: len(data) // 2], "empty": b"", "text": b"<html>404</html>" * 99}[change]
        )
    with pytest.raises(ValueError, match=rf"{name} (is damaged|does not exist)"):
        load_checkpoint(path)


def test_a_file_that_is_no_dict_is_refused(tmp_path):
    torch.save([1, 2], tmp_path / "x.pth")
    with pytest.raises(ValueError, match="holds a list"):
        load_checkpoint(tmp_path / "x.pth")


def test_downloads_are_checked_against_the_hash_in_their_name(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    for name in ("encoder-0123456789abcdef.pth", "checkpoint_copy-799.pth"):
        save_checkpoint(tmp_path / name, {"name": name})
    with pytest.raises(ValueError, match=r"cannot be downloaded.*hash"):
        _download((tmp_path / "encoder-0123456789abcdef.pth").as_uri())
    # an epoch is no hash, and a file fetched once is not fetched again
    url = (tmp_path / "checkpoint_copy-799.pth").as_uri()
    fetched = _download(url)
    (tmp_path / "checkpoint_copy-799.pth").unlink()
    assert (
        load_checkpoint(_download(url)) == {"name": "checkpoint_copy-799.pth"}
        and "hub" in fetched.parts
    )


# --------------------------------------------------------------------------------------------------
# Finding and pruning


def test_checkpoints_are_listed_in_training_order(tmp_path):
    names = [
        "checkpoint-0.pth",
        "checkpoint-2-5.pth",
        "checkpoint-2-40.pth",
        "checkpoint-2.pth",
        "checkpoint-10-1.pth",
    ]
    paths = write(tmp_path, *reversed(names), "checkpoint-best.pth", "other-3.pth")
    (tmp_path / ".checkpoint-11.pth.tmp").touch()
    (tmp_path / "checkpoint-12").mkdir()
    assert [p.name for p in list_checkpoints(tmp_path)] == names
    assert latest_valid_checkpoint(tmp_path) == paths[0]
    assert (
        list_checkpoints(tmp_path / "absent") == []
        and latest_valid_checkpoint(tmp_path / "absent") is None
    )


def test_damaged_newer_checkpoints_are_skipped_and_named(tmp_path, caplog):
    good, flipped, empty = write(
        tmp_path, "checkpoint-1.pth", "checkpoint-2-7.pth", "checkpoint-3.pth"
    )
    damage(flipped)  # one bit in a tensor, which torch.load does not notice
    assert torch.load(flipped, weights_only=True)["name"] == "checkpoint-2-7.pth"
    empty.write_bytes(b"")
    assert latest_valid_checkpoint(tmp_path) == good
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert "checkpoint-3.pth" in caplog.messages[0] and "checkpoint-2-7.pth" in caplog.messages[1]


@pytest.mark.parametrize("mmap", [False, True])
def test_any_changed_bit_is_either_noticed_or_harmless(tmp_path, mmap):
    (path,) = write(tmp_path, "checkpoint-1.pth")
    whole, expected, noticed = path.read_bytes(), load_checkpoint(path), 0
    places = range(0, len(whole), 7)
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            found = load_checkpoint(path, mmap=mmap)
        except ValueError as error:
            assert str(path) in str(error)
            assert latest_valid_checkpoint(tmp_path) is None
            noticed += 1
        else:
            torch.testing.assert_close(found["model"], expected["model"], rtol=0, atol=0)
    assert noticed > len(places) / 2  # the rest is padding and time stamps


def test_any_changed_bit_of_an_encoder_is_noticed(tmp_path):
    path = tmp_path / "encoder-1.safetensors"
    about = {"model": "tiny", "mean": "[0.5]", "näme": 'a "b"'}
    save_encoder(path, {"b": torch.randn(40), "a.weight": torch.zeros(2, 3).half()}, about)
    whole, expected = path.read_bytes(), load_checkpoint(path)
    metadata = metadata_of(path)
    assert about.items() <= metadata.items()
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            found = load_checkpoint(path)
        except ValueError as error:
            assert str(path) in str(error)
        else:  # the name "sha256" itself, or the spaces after the header
            assert metadata_of(path).keys() != metadata.keys() or metadata_of(path) == metadata
            torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_equal_encoders_are_equal_files(tmp_path):
    tensors = {name: torch.full((3,), float(len(name))) for name in ("b", "a", "cc")}
    about = {name: name for name in "qwertyuiop"}
    command = (
        "import sys, torch; from unimim.checkpoint.files import save_encoder; "
        "save_encoder(sys.argv[1], "
        f"{{n: torch.full((3,), float(len(n))) for n in {list(tensors)}}}, "
        f"{dict(reversed(about.items()))})"
    )
    save_encoder(tmp_path / "here.safetensors", dict(reversed(tensors.items())), about)
    subprocess.run(
        [sys.executable, "-c", command, tmp_path / "there.safetensors"], check=True, cwd=ROOT
    )
    here, there = (tmp_path / f"{name}.safetensors" for name in ("here", "there"))
    assert here.read_bytes() == there.read_bytes()
    assert safetensors.torch.load_file(here).keys() == tensors.keys()


def test_a_deepspeed_folder_counts_only_with_its_marker(tmp_path, caplog):
    older, newer = write(tmp_path, "checkpoint-1.pth", "checkpoint-2.pth")
    folder = deepspeed_folder(newer)
    folder.mkdir()
    assert latest_valid_checkpoint(tmp_path) == older and "incomplete" in caplog.text
    finish_deepspeed_folder(folder)
    assert latest_valid_checkpoint(tmp_path) == newer
    begin_deepspeed_folder(folder)
    assert latest_valid_checkpoint(tmp_path) == older


def test_pruning_keeps_the_newest_and_takes_what_belongs_to_the_others(tmp_path):
    paths = write(
        tmp_path,
        "checkpoint-0.pth",
        "checkpoint-1-4.pth",
        "checkpoint-1.pth",
        "checkpoint-best.pth",
    )
    for path in paths[:3]:
        save_file({"w": torch.ones(1)}, encoder_file(path))
        deepspeed_folder(path).mkdir()
        finish_deepspeed_folder(deepspeed_folder(path))
    prune_checkpoints(tmp_path, None)
    assert len(list(tmp_path.iterdir())) == 10
    prune_checkpoints(tmp_path, 2)
    assert {p.name for p in tmp_path.iterdir()} == {
        "checkpoint-1-4.pth", "encoder-1-4.safetensors", "checkpoint-1-4",
        "checkpoint-1.pth", "encoder-1.safetensors", "checkpoint-1", "checkpoint-best.pth",
    }  # fmt: skip
    with pytest.raises(ValueError, match="--keep_checkpoints"):
        prune_checkpoints(tmp_path, 0)


def test_pruning_does_not_read_what_was_just_written(tmp_path):
    _, middle, new = write(tmp_path, "checkpoint-0.pth", "checkpoint-1.pth", "checkpoint-2.pth")
    damage(new)  # so that reading it would show
    prune_checkpoints(tmp_path, 2, new)
    assert list_checkpoints(tmp_path) == [middle, new]
    prune_checkpoints(tmp_path, 1)
    assert list_checkpoints(tmp_path) == [middle, new]
    prune_checkpoints(tmp_path, 1, new)
    assert list_checkpoints(tmp_path) == [new]
    # a run that starts over in the folder of a longer one keeps what it has just written
    (again,) = write(tmp_path, "checkpoint-0.pth")
    prune_checkpoints(tmp_path, 1, again)
    assert list_checkpoints(tmp_path)[0] == again


def test_shards_without_a_checkpoint_are_pruned_and_nothing_else(tmp_path):
    (path,) = write(tmp_path, "checkpoint-1.pth")
    for name in (
        "checkpoint-1",
        "checkpoint-2-5",
        "checkpoint-3",
        "checkpoint-4",
        "checkpoint-best",
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "zero_pp_rank_0_mp_rank_00_optim_states.pt").touch()
    finish_deepspeed_folder(tmp_path / "checkpoint-3")
    (tmp_path / "checkpoint-4" / "notes.txt").touch()  # somebody's own
    prune_checkpoints(tmp_path, None)
    assert len(list(tmp_path.iterdir())) == 6
    prune_checkpoints(tmp_path, 1, path)
    left = {"checkpoint-1", "checkpoint-1.pth", "checkpoint-4", "checkpoint-best"}
    assert {p.name for p in tmp_path.iterdir()} == left


def test_shards_are_on_the_disk_before_their_marker(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(
        os, "fsync", lambda fd: (calls.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd))
    )
    monkeypatch.setattr(
        Path, "replace", lambda self, to: (calls.append(str(to)), replace(self, to))
    )
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    shard = folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    shard.write_bytes(b"x")
    sync_deepspeed_folder(folder)
    finish_deepspeed_folder(folder)
    calls = [call for call in calls if not call.endswith(".tmp")]
    assert calls == list(map(str, (shard, folder, folder / "complete", folder, tmp_path)))


def test_an_interrupted_deletion_leaves_no_checkpoint_that_looks_whole(tmp_path, monkeypatch):
    old, new = write(tmp_path, "checkpoint-0.pth", "checkpoint-1.pth")
    deepspeed_folder(old).mkdir()
    finish_deepspeed_folder(deepspeed_folder(old))

    def interrupted(folder):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", interrupted)
        prune_checkpoints(tmp_path, 1)
    with pytest.raises(ValueError, match="incomplete"):
        check_checkpoint(old)
    prune_checkpoints(tmp_path, 1)
    assert list(tmp_path.iterdir()) == [new]


def test_pruning_never_deletes_the_newest_valid_checkpoint(tmp_path):
    oldest, valid, *damaged = write(tmp_path, *(f"checkpoint-{epoch}.pth" for epoch in range(4)))
    for path in damaged:
        damage(path)
    prune_checkpoints(tmp_path, 1)
    assert list_checkpoints(tmp_path) == [valid, damaged[-1]] and not oldest.exists()


# --------------------------------------------------------------------------------------------------
# Resizing


def test_the_ratio_spans_the_new_window_and_coordinates_are_its_powers():
    ratio = geometric_ratio(14, 24)
    assert sum(ratio**i for i in range(13)) == pytest.approx(23, abs=1e-3)
    assert geometric_ratio(4, 14) == pytest.approx(1.5, abs=1e-5)
    assert geometric_ratio(14, 7) == pytest.approx(1.01, abs=1e-5)
    np.testing.assert_allclose(source_coordinates(4, 2.0), [-7, -3, -1, 0, 1, 3, 7])


@pytest.mark.parametrize("dst", [(6, 6), (3, 3), (6, 5), (4, 6)])
def test_tables_that_are_cubic_in_the_offsets_are_resized_exactly(dst):
    def cubic(y, x):  # unlike in y and x, so that swapped axes show
        y, x = (torch.as_tensor(v, dtype=torch.float64) for v in (y, x))
        y, x = y[:, None], x[None, :]
        return torch.stack(
            [0.1 * y**3 - x**2 + x * y, 3 + x - 0.5 * y**2 + 0.01 * x**3], -1
        ).flatten(0, 1)

    def coordinates(size):
        return source_coordinates(4, geometric_ratio(4, size) if size != 4 else 1.0)

    extra = torch.tensor([[1.0, 2], [3, 4], [5, 6]])
    source = torch.cat([cubic(coordinates(dst[0]), coordinates(dst[1])), extra]).double()
    resized = interpolate_rel_pos_bias(source, 4, dst)
    offsets = [np.clip(np.arange(1 - d, d), coordinates(d)[0], coordinates(d)[-1]) for d in dst]
    torch.testing.assert_close(
        resized, torch.cat([cubic(*offsets), extra.double()]), rtol=1e-9, atol=1e-9
    )


def test_targets_outside_the_source_range_repeat_its_edge():
    table = torch.randn(7 * 7 + 3, 1, generator=torch.Generator().manual_seed(0))
    grid = interpolate_rel_pos_bias(table, 4, 14)[:-3].view(27, 27)
    assert (
        torch.equal(grid[0], grid[8])
        and torch.equal(grid[:, 0], grid[:, 8])
        and not torch.equal(grid[8], grid[9])
    )
    torch.testing.assert_close(grid[0, 0], table[0, 0])


def test_small_windows_are_resized_through_their_points():
    for src in (1, 2):
        table = torch.arange((2 * src - 1) ** 2 + 3.0).unsqueeze(1)
        resized = interpolate_rel_pos_bias(table, src, 4)
        center = (2 * src - 1) ** 2 // 2
        assert resized.shape == (52, 1) and resized[24, 0] == pytest.approx(center)
        assert torch.equal(resized[-3:], table[-3:])


def test_positions_are_resized_along_the_right_axes_and_the_class_row_stays():
    rows = torch.arange(4.0).repeat_interleave(4)  # the patch's row number
    source = torch.stack(
        [torch.cat([torch.tensor([9.0]), rows]), torch.ones(17)], dim=-1
    ).unsqueeze(0)
    resized = interpolate_pos_embed(source, (8, 6), 1)
    assert resized.shape == (1, 49, 2) and resized[0, 0].tolist() == [9, 1]
    grid = resized[0, 1:].view(8, 6, 2)
    torch.testing.assert_close(grid[..., 1], torch.ones(8, 6))
    torch.testing.assert_close(grid[..., 0], grid[:, :1, 0].expand(8, 6))
    # row 3 of 8 lies at 3.5 / 2 - 0.5 = 1.25 of 4; Keys' cubic with a = -0.75 weighs
    # rows 0 ... 3 there by
    # -0.10546875, 0.87890625, 0.26171875, -0.03515625
    torch.testing.assert_close(grid[3:5, 0, 0], torch.tensor([1.296875, 3 - 1.296875]))
    assert interpolate_pos_embed(source, 4, 1) is source
    with pytest.raises(ValueError, match="15 patches"):
        interpolate_pos_embed(source[:, :-1], 4, 1)


# --------------------------------------------------------------------------------------------------
# Loading into a model


def test_a_conmim_checkpoint_gives_the_teacher_with_its_table_in_every_block():
    model = conmim()
    classifier = vit(rel_pos_bias="per_block", init_values=0.5, num_classes=5)
    head = classifier.head.weight.clone()
    checkpoint = {"model": model.state_dict(), "teacher": model.teacher.state_dict(), "epoch": 3}
    report = load_pretrained(classifier, checkpoint)
    tables = [f"blocks.{i}.attn.relative_position_bias_table" for i in range(3)]
    assert report.expanded == tables and set(tables) < set(report.loaded)
    assert report.missing == ["fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"]
    assert report.interpolated == [] and report.matched == 1.0
    assert {k.split(".")[0] for k in report.ignored} == {"mask_token", "norm", "projectors"}
    assert set(report.loaded) | set(report.missing) == set(classifier.state_dict())
    torch.testing.assert_close(
        classifier.forward_features(images()), model.teacher.forward_features(images())
    )
    assert torch.equal(classifier.head.weight, head)
    assert (
        len({table.data_ptr() for name, table in classifier.named_parameters() if name in tables})
        == 3
    )


def test_the_report_folds_blocks(tmp_path):
    save_checkpoint(
        tmp_path / "checkpoint-7.pth", {"model": {}, "teacher": conmim().teacher.state_dict()}
    )
    report = load_pretrained(
        vit(rel_pos_bias="per_block", init_values=0.1), tmp_path / "checkpoint-7.pth"
    )
    lines = str(report).splitlines()
    assert lines[0].endswith("checkpoint-7.pth[teacher]: 100% of the encoder matched")
    assert lines[1].startswith("  loaded (") and lines[1].endswith("patch_embed (2), blocks (48)")
    assert max(map(len, lines)) < 400  # names are folded and cut short
    assert lines[2] == "  expanded (3): blocks.0-2.attn.relative_position_bias_table"
    assert [line.split()[0] for line in lines[3:]] == ["ignored", "missing"]
    assert _fold_blocks(["a", "blocks.0.x", "blocks.1.x", "blocks.4.x", "blocks.3.y"]) == [
        "a",
        "blocks.0-1,4.x",
        "blocks.3.y",
    ]


def test_model_key_chooses_the_weights():
    model = conmim()
    state = {"model": model.state_dict(), "teacher": model.teacher.state_dict(), "ema": {}}
    for key, expected in (("model", model), ("teacher", model.teacher), ("nothing|model", model)):
        target = vit(rel_pos_bias="shared", init_values=0.1)
        report = load_pretrained(target, state, model_key=key)
        assert torch.equal(target.cls_token, expected.cls_token) and report.source.endswith(
            f"[{key.split('|')[-1]}]"
        )
    without = load_pretrained(target, {"model": model.state_dict(), "teacher": None})
    assert without.source == "a state dict[model]" and torch.equal(
        target.cls_token, model.cls_token
    )
    with pytest.raises(
        ValueError, match="no weights under --model_key other; it holds model, teacher, ema"
    ):
        load_pretrained(target, state, model_key="other")


@pytest.mark.parametrize("wrap", ["bare", "model", "module", "ddp", "compiled", "both"])
def test_published_wrappings_are_recognized(wrap):
    source = vit(rel_pos_bias="per_block", init_values=0.1)
    state = source.state_dict()
    state |= {"blocks.0.attn.relative_position_index": torch.zeros(17, 17, dtype=torch.int64)}
    prefix = {"ddp": "module.", "compiled": "_orig_mod.", "both": "module._orig_mod."}.get(wrap, "")
    state = {prefix + key: value for key, value in state.items()}
    target = randomized(vit(rel_pos_bias="per_block", init_values=0.1), seed=5)
    report = load_pretrained(
        target, {wrap: state, "optimizer": {}} if wrap in ("model", "module") else state
    )
    assert report.missing == [] and report.ignored == ["blocks.0.attn.relative_position_index"]
    torch.testing.assert_close(target(images()), source(images()), rtol=0, atol=0)


def test_model_prefix_selects_the_keys_under_it():
    source, target = vit(), randomized(vit(), seed=5)
    state = {f"backbone.{k}": v for k, v in source.state_dict().items()} | {
        "neck.weight": torch.ones(1)
    }
    report = load_pretrained(target, state, prefix="backbone.")
    assert report.ignored == ["neck.weight"] and report.missing == []
    assert torch.equal(target.cls_token, source.cls_token)
    with pytest.raises(ValueError, match=r"no tensor under --model_prefix 'encoder\.'"):
        load_pretrained(target, state, prefix="encoder.")


def test_both_kinds_of_tables_add_up():
    """Into a table for each block; a model that has both takes them as they are."""
    source = vit(rel_pos_bias="both").eval()
    images = torch.randn(2, 3, 16, 16)
    for kind in ("both", "per_block"):
        target = vit(rel_pos_bias=kind).eval()
        report = load_pretrained(target, source.state_dict())
        assert report.matched == 1 and bool(report.expanded) == (kind == "per_block")
        torch.testing.assert_close(target.forward_features(images), source.forward_features(images))
    no_table = vit().eval()
    load_pretrained(no_table, source.state_dict())
    assert (no_table.forward_features(images) - source.forward_features(images)).abs().max() > 1e-3


def test_parts_of_blocks_that_a_model_lacks_are_a_warning(caplog):
    """All that it has is found, but it would compute something else."""
    source = vit(rel_pos_bias="per_block", init_values=0.1)
    load_pretrained(vit(rel_pos_bias="per_block", init_values=0.1), source.state_dict())
    assert caplog.messages == []
    report = load_pretrained(vit(init_values=0.1), source.state_dict())
    assert report.matched == 1 and len(report.ignored) == 3
    assert "parts of the blocks in a state dict have no place in this --model" in caplog.text


def test_tables_and_positions_are_resized_for_another_grid():
    source = vit(rel_pos_bias="per_block", pos_embed="learned")
    for size, grid in ((24, (6, 6)), ((16, 24), (4, 6))):
        target = vit(size, rel_pos_bias="per_block", pos_embed="learned")
        report = load_pretrained(target, source.state_dict())
        assert report.interpolated == ["pos_embed"] + [
            f"blocks.{i}.attn.relative_position_bias_table" for i in range(3)
        ]
        table = source.blocks[1].attn.relative_position_bias_table
        expected = interpolate_rel_pos_bias(table, 4, grid)
        assert torch.equal(target.blocks[1].attn.relative_position_bias_table, expected)
        assert torch.equal(target.pos_embed, interpolate_pos_embed(source.pos_embed, grid, 1))


def test_positions_that_the_model_has_no_place_for_are_dropped():
    source, target = vit(rel_pos_bias="per_block", pos_embed="learned"), vit()
    report = load_pretrained(target, source.state_dict())
    assert report.ignored == ["pos_embed"] + [
        f"blocks.{i}.attn.relative_position_bias_table" for i in range(3)
    ]


def test_a_head_of_another_shape_stays_and_one_of_the_same_shape_is_loaded():
    source = vit(num_classes=7)
    other, same = vit(num_classes=5), randomized(vit(num_classes=7), seed=5)
    report = load_pretrained(other, source.state_dict())
    assert report.ignored == report.missing == ["head.weight", "head.bias"]
    load_pretrained(same, source.state_dict())
    assert torch.equal(same.head.weight, source.head.weight)


def test_a_shape_that_no_rule_repairs_is_fatal_and_nothing_is_loaded():
    target = vit()
    before = {k: v.clone() for k, v in target.state_dict().items()}
    state = randomized(vit(), seed=5).state_dict() | {
        "blocks.1.mlp.fc1.weight": torch.zeros(32, 16)
    }
    with pytest.raises(
        ValueError,
        match=r"blocks.1.mlp.fc1.weight has shape \(32, 16\), the model wants \(64, 16\)",
    ):
        load_pretrained(target, state)
    torch.testing.assert_close(target.state_dict(), before, rtol=0, atol=0)


def test_under_ninety_percent_of_the_encoder_is_an_error_with_names_of_both_sides():
    target = vit(rel_pos_bias="per_block", init_values=0.1)
    total = len([n for n, _ in target.named_parameters() if not n.startswith("fc_norm.")])
    state = target.state_dict()
    lost = {k: v for k, v in state.items() if "mlp" not in k} | {
        "encoder.mlp.weight": torch.ones(1)
    }
    share = 1 - 12 / total
    with pytest.raises(
        ValueError,
        match=f"only {share:.0%} .*model has blocks.0-2.mlp.*file has encoder.mlp.weight",
    ):
        load_pretrained(target, lost)
    assert load_pretrained(target, lost, min_matched=0.5).matched == pytest.approx(share)
    few = {k: v for k, v in state.items() if k not in ("blocks.0.gamma_1", "blocks.0.gamma_2")}
    assert load_pretrained(target, few).missing == ["blocks.0.gamma_1", "blocks.0.gamma_2"]


# --------------------------------------------------------------------------------------------------
# Export to timm


def features(model: VisionTransformer, x: torch.Tensor) -> torch.Tensor:
    return model.norm(model.forward_features(x))


def export(model: VisionTransformer, path: Path) -> dict[str, torch.Tensor]:
    state = (
        model.encoder_state_dict() if hasattr(model, "encoder_state_dict") else model.state_dict()
    )
    save_encoder(path, state, {"model": "tiny", "epoch": "3"})
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata()["epoch"] == "3"
    return load_checkpoint(path)


TIMM_SIZE = {"img_size": 16, **SIZE, "num_classes": 0, "global_pool": ""}


def test_the_exported_conmim_teacher_is_timms_beit(tmp_path):
    model = conmim()
    beit = Beit(**TIMM_SIZE, init_values=0.1, use_abs_pos_emb=False, use_rel_pos_bias=True).eval()
    beit.load_state_dict(export(model, tmp_path / "encoder-3.safetensors"), strict=True)
    torch.testing.assert_close(
        beit.forward_features(images()), features(model.teacher, images()), rtol=0, atol=1e-5
    )


def test_tables_in_the_blocks_and_a_shared_one_add_up_in_timms_beit(tmp_path):
    form = {
        "rel_pos_bias": "per_block",
        "pos_embed": "learned",
        "init_values": 0.1,
        "global_pool": "token",
    }
    model = vit(**form)
    beit = Beit(**TIMM_SIZE, init_values=0.1, use_rel_pos_bias=True).eval()
    beit.load_state_dict(export(model, tmp_path / "a.safetensors"), strict=True)
    own = beit.forward_features(images())
    torch.testing.assert_close(own, features(model, images()), rtol=0, atol=1e-5)

    shared = torch.randn(52, 2, generator=torch.Generator().manual_seed(1))
    beit.load_state_dict(
        to_timm(model.state_dict() | {"rel_pos_bias.relative_position_bias_table": shared})
    )
    for block in model.blocks:
        block.attn.relative_position_bias_table.data += shared
    both = beit.forward_features(images())
    assert (both - own).abs().max() > 1e-3
    torch.testing.assert_close(both, features(model, images()), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("k_bias", "init_values"), [(False, None), (True, None), (True, 0.1)])
def test_an_exported_plain_vit_is_timms_and_loads_back(tmp_path, k_bias, init_values):
    form = {
        "pos_embed": "learned",
        "global_pool": "token",
        "k_bias": k_bias,
        "init_values": init_values,
    }
    model = vit(**form)
    state = export(model, tmp_path / "encoder-3.safetensors")
    timm_vit = TimmViT(**TIMM_SIZE, init_values=init_values).eval()
    timm_vit.load_state_dict(state, strict=True)
    torch.testing.assert_close(
        timm_vit.forward_features(images()), features(model, images()), rtol=0, atol=1e-5
    )

    for back_k_bias in (False, True):  # without key biases nothing changes: softmax drops them
        back = randomized(vit(**form | {"k_bias": back_k_bias}), seed=5)
        report = load_pretrained(back, tmp_path / "encoder-3.safetensors")
        assert report.missing == [] and report.ignored == [] and report.matched == 1.0
        torch.testing.assert_close(
            features(back, images()), features(model, images()), rtol=0, atol=1e-5
        )


def test_export_gives_keys_no_bias_and_drops_published_index_buffers():
    state = vit().state_dict() | {
        "blocks.0.attn.relative_position_index": torch.zeros(17, 17, dtype=torch.int64)
    }
    converted = to_timm(state)
    query, key, value = converted["blocks.0.attn.qkv.bias"].chunk(3)
    assert torch.equal(query, state["blocks.0.attn.q_bias"]) and torch.equal(
        value, state["blocks.0.attn.v_bias"]
    )
    assert not key.any() and "blocks.0.attn.relative_position_index" not in converted


def test_an_exported_encoder_fine_tunes_like_its_checkpoint(tmp_path):
    model = conmim()
    export(model, tmp_path / "encoder-3.safetensors")
    save_checkpoint(
        tmp_path / "checkpoint-3.pth",
        {"model": model.state_dict(), "teacher": model.teacher.state_dict()},
    )
    outputs = []
    for name in ("encoder-3.safetensors", "checkpoint-3.pth"):
        classifier = vit(24, rel_pos_bias="per_block", init_values=0.1)
        load_pretrained(classifier, tmp_path / name)
        outputs.append(classifier(images(24)))
    assert torch.equal(*outputs)


def test_export_takes_only_strings_as_metadata_and_leaves_converted_dicts_alone(tmp_path):
    with pytest.raises(ValueError, match="strings only"):
        save_encoder(tmp_path / "e.safetensors", vit().state_dict(), {"epoch": 3})
    for model in (
        vit(rel_pos_bias="per_block", init_values=0.1),
        vit(init_values=None),
        vit(k_bias=True, init_values=1.0),
    ):
        once = to_timm(model.state_dict())
        torch.testing.assert_close(to_timm(once), once, rtol=0, atol=0)


def test_unwrapping_takes_off_keys_and_prefixes():
    one, two = torch.ones(1), torch.zeros(1)
    wrapped = {"module.backbone.x": one, "module.head.y": two, "module.epoch": 3}
    found = unwrapped({"state_dict": wrapped}, ("model", "state_dict"), ("module.", "backbone."))
    assert found.keys() == {"x"} and found["x"] is one  # beside a backbone nothing else stays
    assert unwrapped(wrapped, ("model",)).keys() == {"module.backbone.x", "module.head.y"}
