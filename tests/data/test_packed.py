"""SemMAE's packed samples: read back, converted, and trained on in place."""

import numpy as np
import pytest
import torch
from helpers import DECODER, SIZE, differing, packed_table, start, train_steps, write_packed
from PIL import Image

from datasets import ImageDataset
from engine_for_pretraining import grouped
from scripts.tools.convert_packed_parts import convert
from unimim.data.packed import packed_source, read_packed
from unimim.data.part_maps import MISSING, PartMaps
from unimim.data.sources import build_source, detect, is_divided
from unimim.engine.session import Position

NAMES = [f"{folder}/{number}" for folder in ("cat", "dog") for number in range(24)]
SEMMAE = (
    "--model", "semmae_tiny_patch16_224",
    "--model_kwargs", *SIZE, *DECODER, "token_share=0.5", "token_selection=score",
)  # fmt: skip


def test_packed_samples_become_images_and_maps_again(tmp_path):
    rng = np.random.default_rng(1)
    image = rng.integers(0, 256, (16, 16, 3)).astype(np.uint8)
    parts, cells = rng.integers(0, 7, (4, 4)), rng.permutation(16)[:9]
    np.save(tmp_path / "x.npy", packed_table(image, parts, cells))
    sample = read_packed(tmp_path / "x.npy", image_size=16)
    listed = np.isin(np.arange(16), cells).reshape(4, 4)
    assert np.array_equal(sample.parts, np.where(listed, parts, 0))
    assert np.array_equal(np.argsort(-sample.scores.ravel(), kind="stable")[:9], cells)
    wanted = np.where(listed.repeat(4, 0).repeat(4, 1)[..., None], image, [124, 116, 104])
    assert np.array_equal(sample.image, wanted)


def test_packed_samples_that_contradict_themselves_are_refused(tmp_path):
    file, image, parts = tmp_path / "x.npy", np.zeros((16, 16, 3)), np.ones((4, 4), dtype=int)
    good = packed_table(image, parts, np.arange(8))
    for column, message in (
        (1, "must count the tokens"),
        (7, "must be one-hot"),
        (14, "distinct patch indices from 0 to 15"),
    ):
        bad = good.copy()
        bad[0, column] += 1
        np.save(file, bad)
        with pytest.raises(ValueError, match=rf"x\.npy: .*{message}"):
            read_packed(file, image_size=16)
    np.save(file, good[:, :-1])
    with pytest.raises(ValueError, match=r"x\.npy is \(8, 62\); a packed sample is"):
        read_packed(file, image_size=16)


def test_a_folder_of_packed_samples_becomes_a_data_set(tmp_path):
    rng = np.random.default_rng(2)
    maps = rng.integers(0, 7, (3, 4, 4))
    for name, parts in zip(("b/2", "a/1", "a/10"), maps, strict=True):
        file = tmp_path / "packed" / f"{name}.npy"
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(
            file,
            packed_table(rng.integers(0, 256, (16, 16, 3)).astype(np.uint8), parts, np.arange(16)),
        )
    assert convert(tmp_path / "packed", tmp_path / "out", num_parts=7, image_size=16) == 3
    found = PartMaps.open(tmp_path / "out/parts", paths=["a/1.png", "a/10.png", "b/2.png"])
    assert np.array_equal(np.stack([found.read(index) for index in range(3)]), maps[[1, 2, 0]])
    assert np.asarray(Image.open(tmp_path / "out/images/a/10.png")).shape == (16, 16, 3)
    assert MISSING not in found.read(0)


# --- in place -------------------------------------------------------------------------------------


def test_a_run_on_packed_samples_is_the_run_on_converted_ones_and_resumes_exactly(tmp_path):
    """The same batches with the same parts and scores, by workers too; then in mid-epoch."""
    write_packed(tmp_path / "packed/train", NAMES)
    convert(tmp_path / "packed/train", tmp_path / "out", num_parts=7, image_size=224)
    packed = (*SEMMAE, "--data_set", "packed", "--data_path", str(tmp_path / "packed"))
    converted, _ = start(
        "pretrain", tmp_path / "converted", *SEMMAE, "--data_set", "image_folder",
        "--data_path", str(tmp_path / "out/images"), "--part_maps", str(tmp_path / "out/parts"),
    )  # fmt: skip
    whole, _ = start("pretrain", tmp_path / "whole", *packed, "--num_workers", "1")
    for run in (converted, whole):
        run.loader.batch_sampler.set_position(1, 0)
    for ours, theirs in zip(grouped(whole.loader, 1), grouped(converted.loader, 1), strict=True):
        assert "part_scores" in ours[0] and differing(ours[0], theirs[0]) == []
    assert train_steps(converted, 0, 6) == train_steps(whole, 0, 6)
    first, _ = start("pretrain", tmp_path / "resumed", *packed)
    train_steps(first, 0, 3)
    first.session.save(Position(0, 3), finished=False)
    second, position = start("pretrain", tmp_path / "resumed", *packed)
    assert (position.epoch, position.step) == (0, 3)
    train_steps(second, 3, 6)
    wanted = dict(whole.task.state_dict())
    assert differing(dict(second.task.state_dict()), wanted) == []


def test_a_folder_of_packed_samples_is_known_by_its_files(tmp_path):
    write_packed(tmp_path / "data/train", NAMES[:3])
    assert detect(str(tmp_path / "data")) == "packed"
    assert not is_divided("packed", str(tmp_path / "data"))
    source = build_source(None, str(tmp_path / "data"), train=True, need_labels=True)
    assert source.path(2).endswith("data/train/cat/2.npy") and source.classes == ["cat"]
    # arrays beside images are not samples
    Image.new("RGB", (8, 8)).save(tmp_path / "data/train/cat/3.png")
    assert detect(str(tmp_path / "data")) == "image_folder"


def test_what_is_not_a_packed_sample_is_named_and_counted_as_broken(tmp_path):
    write_packed(tmp_path, NAMES[:4])
    source = packed_source(tmp_path, need_labels=False)
    cut, unsafe = tmp_path / f"{NAMES[1]}.npy", tmp_path / f"{NAMES[2]}.npy"
    cut.write_bytes(cut.read_bytes()[:-100])
    np.save(unsafe, np.array([[print]]), allow_pickle=True)
    dataset = ImageDataset(source, lambda raw, rng: {"image": torch.from_numpy(raw)}, seed=0)
    for index in (1, 2):
        assert dataset[0, index]["index"] in (0, 3)
    assert dataset.bad.sorted() == [1, 2]
    with pytest.raises(ValueError, match=r"2\.npy cannot be read as an array: .* object"):
        read_packed(unsafe)
    # the first file says whether the folder holds such samples at all
    first = tmp_path / f"{NAMES[0]}.npy"
    np.save(first, np.zeros((10, 20)))
    with pytest.raises(ValueError, match=r"cat/0\.npy is \(10, 20\); a packed sample is"):
        packed_source(tmp_path, need_labels=False)


def test_a_header_of_an_enormous_array_takes_no_memory(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((196, 783), dtype=np.float32))
    data = (tmp_path / "x.npy").read_bytes()
    padded, enormous = b"(196, 783), }" + 12 * b" ", b"(196" + 12 * b"0" + b", 783), }"
    assert padded in data
    (tmp_path / "x.npy").write_bytes(data.replace(padded, enormous))
    with pytest.raises(ValueError, match=r"x\.npy cannot be read as an array"):
        read_packed(tmp_path / "x.npy")
