"""Writes checkpoint files whole or not at all, finds and prunes them, reads them without running
code."""

import argparse
import hashlib
import json
import logging
import math
import pickle
import re
import shutil
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from unimim import files
from unimim.checkpoint.names import StateDict, to_timm
from unimim.checkpoint.tensor_files import check_tensors, write_tensors

log = logging.getLogger("unimim")

_NAME = re.compile(r"checkpoint-(\d+)(?:-(\d+))?\.pth")
_COMPLETE = "complete"
SafeGlobal = type | tuple[Callable[..., Any], str]  # what a pickle may name, as torch takes it

# --------------------------------------------------------------------------------------------------
# Writing


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    """Write `state` so that `path` is at any moment the old file or the whole new one.

    `state` holds tensors, dicts, lists, tuples, strings, numbers and None: what
    `torch.load(weights_only=True)` reads back. For anything else a ValueError names its place, and
    nothing is written.
    """
    _check_plain(state, "state")
    try:
        files.write_atomically(path, lambda file: torch.save(state, file))
    except RuntimeError as error:  # torch's words for what the disk said before
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def save_encoder(path: str | Path, state_dict: StateDict, metadata: dict[str, str]) -> None:
    """Write a clean encoder (native names) as safetensors in timm's names, atomically and with a
    checksum; see `to_timm`."""
    if not all(isinstance(text, str) for text in [*metadata, *metadata.values()]):
        raise ValueError(f"safetensors metadata are strings only, got {metadata}")
    # clones, because the blocks' tables share memory, which safetensors refuses
    tensors = {
        key: value.detach().cpu().contiguous().clone() for key, value in to_timm(state_dict).items()
    }
    write_tensors(path, tensors, metadata)


def _check_plain(value: Any, place: str) -> None:
    # exact types: a subclass such as numpy.float64 is pickled by its own name
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():
            if type(key) not in (str, int):
                raise ValueError(
                    f"{place} has a key of type {type(key).__name__}; checkpoints take str and int"
                )
            _check_plain(item, f"{place}[{key!r}]")
    elif type(value) in (list, tuple):
        for index, item in enumerate(value):
            _check_plain(item, f"{place}[{index}]")
    elif type(value) not in (Tensor, nn.Parameter, str, int, float, bool, type(None)):
        raise ValueError(
            f"{place} is a {type(value).__module__}.{type(value).__qualname__}; "
            "checkpoints hold only tensors, dicts, lists, strings and numbers"
        )


# --------------------------------------------------------------------------------------------------
# Finding and pruning


def list_checkpoints(folder: str | Path) -> list[Path]:
    """Return the training checkpoints in `folder`, oldest first; not checkpoint-best.pth."""
    found = [path for path in Path(folder).glob("checkpoint-*.pth") if _NAME.fullmatch(path.name)]
    return sorted(found, key=_position)


def latest_valid_checkpoint(folder: str | Path) -> Path | None:
    """Return the newest checkpoint that reads back whole, or None.

    Each newer one that does not is named in a warning.
    """
    for path in reversed(list_checkpoints(folder)):
        try:
            check_checkpoint(path)
        except ValueError as error:
            log.warning("skipping %s: %s", path, error)
        else:
            return path
    return None


def check_checkpoint(path: str | Path) -> None:
    """Raise a ValueError unless the file is whole and its DeepSpeed folder, if any, is
    complete."""
    path = Path(path)
    folder = deepspeed_folder(path)
    if folder.is_dir() and not (folder / _COMPLETE).exists():
        raise ValueError(f"the DeepSpeed folder {folder} is incomplete")
    if not files.begins_as_zip(path):  # this repository's are
        raise ValueError(f"{path} is damaged or incomplete")
    _read_pickle(path, mmap=True)


def prune_checkpoints(
    folder: str | Path, keep_last: int | None, written: str | Path | None = None
) -> None:
    """Delete all but the newest `keep_last` checkpoints with their encoders and DeepSpeed folders.

    None keeps all.

    The newest valid checkpoint stays, however many damaged ones are newer; so does `written`, which
    this process has just written and which is therefore not read again. DeepSpeed folders whose
    checkpoint was never written go too.
    """
    if keep_last is None:
        return
    if keep_last < 1:
        raise ValueError(f"--keep_checkpoints must be at least 1, got {keep_last}")
    written = None if written is None else Path(written)
    found = list_checkpoints(folder)
    old = found[:-keep_last]
    # a whole one among those that stay: no need to look for another
    known = written in found[-keep_last:]
    newest_valid = latest_valid_checkpoint(folder) if old and not known else None
    for path in old:
        if path not in (newest_valid, written):
            _delete_checkpoint(path)
    for orphan in _orphans(Path(folder)):
        shutil.rmtree(orphan)


def _orphans(folder: Path) -> list[Path]:
    """Return DeepSpeed folders without a checkpoint, whose save was killed.

    They hold nothing but shards and markers.
    """
    named = [
        path
        for path in folder.glob("checkpoint-*")
        if path.is_dir() and _NAME.fullmatch(f"{path.name}.pth")
    ]
    alone = [path for path in named if not (folder / f"{path.name}.pth").exists()]
    return [path for path in alone if all(_is_shard(part.name) for part in path.iterdir())]


def _is_shard(name: str) -> bool:
    return name.endswith("_states.pt") or name.lstrip(".").startswith(
        _COMPLETE
    )  # the marker, or a draft of it


def deepspeed_folder(path: str | Path) -> Path:
    """Return the folder of DeepSpeed's shards that belongs to `checkpoint-*.pth`."""
    return Path(path).with_suffix("")


def encoder_file(path: str | Path) -> Path:
    """Return the exported encoder that belongs to `checkpoint-*.pth`."""
    path = Path(path)
    return path.with_name(path.name.replace("checkpoint", "encoder", 1)).with_suffix(".safetensors")


def begin_deepspeed_folder(folder: str | Path) -> None:
    """Mark a folder as incomplete, before DeepSpeed writes its shards."""
    (Path(folder) / _COMPLETE).unlink(missing_ok=True)


def sync_deepspeed_folder(folder: str | Path) -> None:
    """Wait until this rank's shards are on the disk, which DeepSpeed does not do."""
    for shard in Path(folder).glob("*_states.pt"):
        files.fsync(shard)


def finish_deepspeed_folder(folder: str | Path) -> None:
    """Mark a folder as complete, after the shards of all ranks are on the disk."""
    files.fsync(folder)
    files.write_text(Path(folder) / _COMPLETE, "")
    files.fsync(Path(folder).parent)


def shard_checksums(folder: str | Path, *, rank: int = 0, ranks: int = 1) -> dict[str, str]:
    """Return the SHA-256 of DeepSpeed's shards by file name, of those that fall to this rank."""
    shards = sorted(Path(folder).glob("*_states.pt"))
    return {shard.name: files.file_sha256(shard) for shard in shards[rank::ranks]}


def remove_deepspeed_folder(folder: str | Path) -> None:
    """Remove what an earlier run left under the name of a checkpoint that has no shards."""
    folder = Path(folder)
    if folder.is_dir() and all(_is_shard(part.name) for part in folder.iterdir()):
        shutil.rmtree(folder)


def _position(path: Path) -> tuple[int, float]:
    epoch, step = _NAME.fullmatch(path.name).groups()
    return int(epoch), math.inf if step is None else int(step)


def _delete_checkpoint(path: Path) -> None:
    # the .pth goes last, so that an interrupted deletion is taken up again by the next pruning
    folder = deepspeed_folder(path)
    if folder.is_dir():
        begin_deepspeed_folder(folder)
        shutil.rmtree(folder)
    encoder_file(path).unlink(missing_ok=True)
    path.unlink()


# --------------------------------------------------------------------------------------------------
# Reading


def load_checkpoint(path: str | Path, *, mmap: bool = False, inert: bool = True) -> dict[str, Any]:
    """Read a checkpoint of any project onto the CPU without running its code.

    It is a file or an https address, in torch's formats or `.safetensors`.

    `args` stored as an argparse.Namespace, as published files have it, becomes a dict. Objects of
    other classes (mmengine's history, yacs' configuration, NumPy's scalars) become dicts of what
    they hold or None, a pickled module its state dict; with `inert` False they are refused. With
    `mmap` tensors are read from the file when they are used, if its format allows: for a look at
    names and shapes. Raises ValueError for a file that is missing, damaged, or holds no tensors
    but objects that would run code when unpickled; damaged is one whose bytes do not have their
    checksums, which torch's zips and this repository's `.safetensors` files hold.
    """
    if str(path).startswith("https://"):
        path = _download(str(path))
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"checkpoint {path} does not exist or is not a file")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    mmap = mmap and files.begins_as_zip(path)  # torch's old format cannot be mapped
    try:
        checkpoint = _read_pickle(path, mmap=mmap)
    except ValueError as error:
        if not inert or not isinstance(error.__cause__, pickle.UnpicklingError):
            raise
        checkpoint = _read_inert(path, mmap=mmap)
        if not _tensors(checkpoint):
            raise
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} holds a {type(checkpoint).__name__}; a checkpoint is a dict")
    if isinstance(checkpoint.get("args"), argparse.Namespace):
        checkpoint["args"] = vars(checkpoint["args"])
    return checkpoint


def load_metadata(path: str | Path) -> dict[str, str]:
    """Return the strings beside the tensors of a `.safetensors` file or address; empty for any
    other file."""
    path = _download(str(path)) if str(path).startswith("https://") else Path(path)
    if path.suffix != ".safetensors" or not path.is_file():
        return {}
    try:
        with safetensors.safe_open(path, "pt") as file:
            return dict(file.metadata() or {})
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or incomplete ({error})") from error


def _read_safetensors(path: Path) -> StateDict:
    try:
        _check_once(path, check_tensors)
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or incomplete ({error})") from error


def load_plain(path: str | Path, classes: Sequence[SafeGlobal] = ()) -> Any:
    """Read what torch saved onto the CPU, without running its code.

    It may hold objects of `classes` beside tensors and plain values; a pair is a function and the
    name in the file that it stands for. Raises ValueError for a file that is missing, damaged, or
    would run code when unpickled.
    """
    return _read_pickle(Path(path), classes=classes)


def _check_zip(path: Path) -> None:
    # torch.load compares no checksums
    if files.begins_as_zip(path) and not files.is_intact_zip(path):
        raise ValueError(f"{path} is damaged or incomplete: its bytes have other checksums")


_checked: set[tuple[Any, ...]] = set()


def _check_once(path: Path, check: Callable[[Path], None]) -> None:
    """Call `check(path)` unless this process has done so since the file was written.

    A look at a file's names or flags reads little of it; its checksums take a second a gigabyte.
    """
    found = path.stat()
    state = (str(path), found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    if state not in _checked:
        check(path)
        _checked.add(state)


def _read_pickle(path: Path, mmap: bool = False, classes: Sequence[SafeGlobal] = ()) -> Any:
    _check_once(path, _check_zip)
    try:
        with torch.serialization.safe_globals([argparse.Namespace, *classes]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except MemoryError:
        raise
    except Exception as error:  # damaged bytes raise anything
        code = (
            re.search(r"GLOBAL (\S+)", str(error))
            if isinstance(error, pickle.UnpicklingError)
            else None
        )
        if code:
            raise ValueError(
                f"{path} is refused: unpickling it would run {code.group(1)}"
            ) from error
        raise ValueError(
            f"{path} is damaged, incomplete or no checkpoint ({type(error).__name__})"
        ) from error


def metadata_of(path: str | Path) -> dict[str, str]:
    """Return what a safetensors file says beside its tensors; empty for any other file."""
    if not str(path).endswith(".safetensors") or not Path(path).is_file():
        return {}
    try:
        with safetensors.safe_open(path, "pt") as file:
            return file.metadata() or {}
    except safetensors.SafetensorError:  # loading says what is wrong
        return {}


def model_named_in(path: str | Path) -> str:
    """Return the name of the model that a file of this repository holds; "" if it does not
    say."""
    if str(path).endswith(".safetensors"):
        return metadata_of(path).get("model", "")
    flags = load_checkpoint(path, mmap=True).get("args")
    return str(flags.get("model", "")) if isinstance(flags, dict) else ""


# what a classifier of BEiT has, and no other file without flags
BEIT_CLASSIFIER = {
    "blocks.0.attn.q_bias",
    "blocks.0.attn.relative_position_bias_table",
    "fc_norm.weight",
    "head.weight",
}


def takes_imagenet_mean_std(path: str | Path) -> bool | None:
    """Return whether a file's images were normalized by ImageNet's mean and std, not by 0.5.

    None: it does not say. The official classifiers of BEiT, which do not either, are known by
    their tensors, its other files by their names: they were trained with 0.5.
    """
    if (mean := metadata_of(path).get("mean")) is not None:
        return tuple(json.loads(mean)) != (0.5, 0.5, 0.5)
    checkpoint = load_checkpoint(path, mmap=True)
    flags = checkpoint.get("args")
    if isinstance(flags, dict) and "imagenet_default_mean_and_std" in flags:
        return bool(flags["imagenet_default_mean_and_std"])
    state = checkpoint.get("model")
    if not flags and isinstance(state, dict) and state.keys() >= BEIT_CLASSIFIER:
        return False
    return False if re.match(r"beitv?2?_.*(pt22k|ft22k|in22k)", Path(path).name) else None


def timm_arguments_of(path: str | Path) -> dict[str, Any]:
    """Return the arguments with which `timm.create_model` gives an exported encoder with its
    weights; empty for a file that does not say."""
    arguments = metadata_of(path).get("timm")
    return json.loads(arguments) | {"checkpoint_path": str(path)} if arguments else {}


def load_module_state(path: str | Path) -> StateDict:
    """Return the tensors of a file, or of a pickled module, by their names in it.

    Raises ValueError as `load_checkpoint` does.
    """
    return _tensors(load_checkpoint(path))


def _read_inert(path: Path, mmap: bool = False) -> Any:
    """Return a pickle's tensors and plain values; of objects of other classes see `_plain`.

    Nothing of the pickle is executed: of what it names, only tensors are made.
    """
    try:
        with warnings.catch_warnings():  # that records are not the classes they stand for
            warnings.simplefilter("ignore", torch.serialization.SourceChangeWarning)
            found = torch.load(
                path, map_location="cpu", weights_only=False, pickle_module=_InertPickle, mmap=mmap
            )
    except MemoryError:
        raise
    except Exception as error:  # damaged bytes raise anything
        raise ValueError(
            f"{path} is damaged, incomplete or no checkpoint ({type(error).__name__})"
        ) from error
    return _plain(found)


class _Record:
    """Stands for an object of any class in a pickle: keeps what it would be given, does nothing.

    items: of a subclass of dict; state: its attributes.
    """

    dump_patches = False  # torch's old format asks modules' classes

    def __new__(cls, *args, **kwargs):
        # here, as an object is not initialized where its class has a __reduce__ of its own
        record = object.__new__(cls)
        record.items = {}
        record.state = {}
        return record

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state if isinstance(state, dict) else {}

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items[key] = value

    def __call__(self, *args, **kwargs) -> "_Record":
        return _Record()  # what a pickled method of an object would be asked for

    def append(self, value: Any) -> None:
        pass

    extend = add = append


def _plain(value: Any) -> Any:
    """Return nested values with records as dicts: a module's is its state dict.

    A record that holds nothing is None.
    """
    if isinstance(value, _Record):
        if "_parameters" in value.state:
            return _tensors(value)
        value = value.items or value.state or None
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if isinstance(key, str | int)}
    if isinstance(value, list | tuple):
        return type(value)(_plain(item) for item in value)
    # of what the pickle names only tensors are objects: a class or function that stands alone is
    # no value
    return None if callable(value) and not isinstance(value, Tensor) else value


_TENSOR_MAKERS = {
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    ("collections", "OrderedDict"): OrderedDict,
}


class _InertUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name.endswith("Storage"):
            return getattr(torch, name, _Record)
        return _TENSOR_MAKERS.get((module, name), _Record)


class _InertPickle:
    """What torch.load asks of a pickle module."""

    Unpickler = _InertUnpickler

    @staticmethod
    def load(file: Any, **options: Any) -> Any:
        return _InertUnpickler(file, **options).load()


def _tensors(value: Any, name: str = "") -> StateDict:
    """Return every tensor in nested dicts and modules' records, by the names of a state dict."""
    if isinstance(value, Tensor):
        return {name: value.detach()}
    parts = (value.items or value.state) if isinstance(value, _Record) else value
    if not isinstance(parts, dict):
        return {}
    found: StateDict = {}
    for key, part in parts.items():
        inner = (
            name if key in ("_parameters", "_buffers", "_modules") else f"{name}.{key}".lstrip(".")
        )
        found |= _tensors(part, inner)
    return found


def _download(url: str) -> Path:
    """Return the file at `url`, fetched once into torch.hub's cache.

    A name like x-0123abcd.pth states its SHA-256.
    """
    name = Path(url.split("?")[0]).name
    # `-799.pth` is an epoch: torch.hub's own rule takes it for a hash
    stated = re.search(r"-([0-9a-f]{8,})\.", name)
    # one name at two addresses is two files
    path = (
        Path(torch.hub.get_dir())
        / "checkpoints"
        / f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{name}"
    )
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(
                url, str(path), stated and stated.group(1), progress=False
            )
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{url} cannot be downloaded: {error}") from error
    return path
