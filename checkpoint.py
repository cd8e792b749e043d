"""Checkpoints: written atomically, found, pruned, read without running their code, fitted to a model, exported to timm.

A training checkpoint is `checkpoint-<epoch>.pth` (the end of that epoch) or `checkpoint-<epoch>-<step>.pth` (the epoch
is in progress, `step` of its updates are done). Beside it may lie `encoder-<same>.safetensors` and the DeepSpeed folder
of the same stem, which is complete once it holds the marker file written last.
"""

import argparse
import hashlib
import logging
import math
import pickle
import re
import shutil
import warnings
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from scipy.interpolate import make_interp_spline
from torch import Tensor, nn

import files

log = logging.getLogger("unimim")

StateDict = dict[str, Tensor]
PUBLISHED_KEYS = "model|module"  # the published default of --model_key

_NAME = re.compile(r"checkpoint-(\d+)(?:-(\d+))?\.pth")
_COMPLETE = "complete"
_HEADS = ("head.", "fc.", "classifier.")  # head.norm is ConvNeXt's last norm, which pre-training trains too
_NO_BACKBONE = (*_HEADS, "neck.", "ema_", "inject.", "mask_token", "mask_gamma")
_TABLE = "relative_position_bias_table"
_SHARED_TABLE = f"rel_pos_bias.{_TABLE}"

# ---------------------------------------------------------------------------------------------------------------------
# Writing


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    """Writes `state` so that `path` is at any moment the old file or the whole new one.

    `state` holds tensors, dicts, lists, tuples, strings, numbers and None: what `torch.load(weights_only=True)` reads
    back. For anything else a ValueError names its place, and nothing is written.
    """
    _check_plain(state, "state")
    try:
        files.write_atomically(path, lambda file: torch.save(state, file))
    except RuntimeError as error:  # torch's words for what the disk said before
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def save_encoder(path: str | Path, state_dict: StateDict, metadata: dict[str, str]) -> None:
    """Writes a clean encoder (native names) as safetensors in timm's names, atomically; see `to_timm`."""
    if not all(isinstance(text, str) for text in [*metadata, *metadata.values()]):
        raise ValueError(f"safetensors metadata are strings only, got {metadata}")
    # clones, because the blocks' tables share memory, which safetensors refuses
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in to_timm(state_dict).items()}
    files.write_atomically(path, lambda file: file.write(safetensors.torch.save(tensors, metadata)))


def _check_plain(value: Any, place: str) -> None:
    # exact types: a subclass such as numpy.float64 is pickled by its own name
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():
            if type(key) not in (str, int):
                raise ValueError(f"{place} has a key of type {type(key).__name__}; checkpoints take str and int")
            _check_plain(item, f"{place}[{key!r}]")
    elif type(value) in (list, tuple):
        for index, item in enumerate(value):
            _check_plain(item, f"{place}[{index}]")
    elif type(value) not in (Tensor, nn.Parameter, str, int, float, bool, type(None)):
        raise ValueError(
            f"{place} is a {type(value).__module__}.{type(value).__qualname__}; "
            "checkpoints hold only tensors, dicts, lists, strings and numbers"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Finding and pruning


def list_checkpoints(folder: str | Path) -> list[Path]:
    """The training checkpoints in `folder`, oldest first; `checkpoint-best.pth` and temporary files are none."""
    found = [path for path in Path(folder).glob("checkpoint-*.pth") if _NAME.fullmatch(path.name)]
    return sorted(found, key=_position)


def latest_valid_checkpoint(folder: str | Path) -> Path | None:
    """The newest checkpoint that reads back whole, or None; each newer one that does not is named in a warning."""
    for path in reversed(list_checkpoints(folder)):
        try:
            check_checkpoint(path)
        except ValueError as error:
            log.warning("skipping %s: %s", path, error)
        else:
            return path
    return None


def check_checkpoint(path: str | Path) -> None:
    """ValueError unless the file has every byte it was written with and its DeepSpeed folder, if any, is complete."""
    path = Path(path)
    folder = deepspeed_folder(path)
    if folder.is_dir() and not (folder / _COMPLETE).exists():
        raise ValueError(f"the DeepSpeed folder {folder} is incomplete")
    if not files.is_intact_zip(path):  # torch.load compares no checksums
        raise ValueError(f"{path} is damaged or incomplete")
    _read_pickle(path, mmap=True)


def prune_checkpoints(folder: str | Path, keep_last: int | None, written: str | Path | None = None) -> None:
    """Deletes all but the newest `keep_last` checkpoints with their encoders and DeepSpeed folders; None keeps all.

    The newest valid checkpoint stays, however many damaged ones are newer; so does `written`, which this process has
    just written and which is therefore not read again. DeepSpeed folders whose checkpoint was never written go too.
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
    """DeepSpeed folders, of nothing but shards and markers, that no checkpoint belongs to: the save was killed."""
    named = [path for path in folder.glob("checkpoint-*") if path.is_dir() and _NAME.fullmatch(f"{path.name}.pth")]
    alone = [path for path in named if not (folder / f"{path.name}.pth").exists()]
    return [path for path in alone if all(_is_shard(part.name) for part in path.iterdir())]


def _is_shard(name: str) -> bool:
    return name.endswith("_states.pt") or name.lstrip(".").startswith(_COMPLETE)  # the marker, or a draft of it


def deepspeed_folder(path: str | Path) -> Path:
    """The folder of DeepSpeed's shards that belongs to `checkpoint-*.pth`."""
    return Path(path).with_suffix("")


def encoder_file(path: str | Path) -> Path:
    """The exported encoder that belongs to `checkpoint-*.pth`."""
    path = Path(path)
    return path.with_name(path.name.replace("checkpoint", "encoder", 1)).with_suffix(".safetensors")


def begin_deepspeed_folder(folder: str | Path) -> None:
    """Before DeepSpeed writes its shards: from now on the folder counts as incomplete."""
    (Path(folder) / _COMPLETE).unlink(missing_ok=True)


def sync_deepspeed_folder(folder: str | Path) -> None:
    """After this rank has written its shards: returns when they are on the disk, which DeepSpeed does not wait for."""
    for shard in Path(folder).glob("*_states.pt"):
        files.fsync(shard)


def finish_deepspeed_folder(folder: str | Path) -> None:
    """After every rank's shards are on the disk: the folder counts as complete."""
    files.fsync(folder)
    files.write_text(Path(folder) / _COMPLETE, "")
    files.fsync(Path(folder).parent)


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


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def load_checkpoint(path: str | Path, *, mmap: bool = False) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU: a file or https address, torch's formats or `.safetensors`, without its code.

    `args` stored as an argparse.Namespace, as published files have it, becomes a dict. With `mmap` tensors are read
    from the file when they are used, if its format allows: for a look at names and shapes.
    Raises ValueError for a file that is missing, damaged, or would run code when unpickled.
    """
    if str(path).startswith("https://"):
        path = _download(str(path))
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"checkpoint {path} does not exist or is not a file")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    checkpoint = _read_pickle(path, mmap=mmap and zipfile.is_zipfile(path))  # torch's old format cannot be mapped
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} holds a {type(checkpoint).__name__}; a checkpoint is a dict")
    if isinstance(checkpoint.get("args"), argparse.Namespace):
        checkpoint["args"] = vars(checkpoint["args"])
    return checkpoint


def _read_safetensors(path: Path) -> StateDict:
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or incomplete ({error})") from error


def _read_pickle(path: Path, mmap: bool = False) -> Any:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except MemoryError:
        raise
    except Exception as error:  # damaged bytes raise anything
        code = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if code:
            raise ValueError(f"{path} is refused: unpickling it would run {code.group(1)}") from error
        raise ValueError(f"{path} is damaged, incomplete or no checkpoint ({type(error).__name__})") from error


def load_module_state(path: str | Path) -> StateDict:
    """The tensors of a file that `load_checkpoint` reads, or of a pickled module, by their names in it.

    Nothing of a pickled module is executed: of what its pickle names, only tensors are made, everything else becomes an
    inert record. Raises ValueError for a file that is missing or damaged.
    """
    try:
        return _tensors(load_checkpoint(path))
    except ValueError as error:
        if not isinstance(error.__cause__, pickle.UnpicklingError):
            raise
    path = _download(str(path)) if str(path).startswith("https://") else path
    try:
        with warnings.catch_warnings():  # that records are not the classes they stand for
            warnings.simplefilter("ignore", torch.serialization.SourceChangeWarning)
            found = torch.load(path, map_location="cpu", weights_only=False, pickle_module=_InertPickle)
    except MemoryError:
        raise
    except Exception as error:  # damaged bytes raise anything
        raise ValueError(f"{path} is damaged, incomplete or no checkpoint ({type(error).__name__})") from error
    return _tensors(found)


class _Record:
    """Stands for an object of any class in a pickle: keeps what the object would have been given, and does nothing."""

    dump_patches = False  # torch's old format asks modules' classes

    def __new__(cls, *args, **kwargs):
        return object.__new__(cls)

    def __init__(self, *args, **kwargs):
        self.items: dict[Any, Any] = {}

    def __setstate__(self, state: Any) -> None:
        self.items = state if isinstance(state, dict) else {}

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items[key] = value

    def append(self, value: Any) -> None:
        pass

    extend = add = append


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
    """Every tensor in nested dicts and modules' records; names of records are those of their state dict."""
    if isinstance(value, Tensor):
        return {name: value.detach()}
    parts = value.items if isinstance(value, _Record) else value
    if not isinstance(parts, dict):
        return {}
    found: StateDict = {}
    for key, part in parts.items():
        inner = name if key in ("_parameters", "_buffers", "_modules") else f"{name}.{key}".lstrip(".")
        found |= _tensors(part, inner)
    return found


def _download(url: str) -> Path:
    """The file behind `url`, fetched once into torch.hub's cache; a name like x-0123abcd.pth states its SHA-256."""
    name = Path(url.split("?")[0]).name
    # `-799.pth` is an epoch: torch.hub's own rule takes it for a hash
    stated = re.search(r"-([0-9a-f]{8,})\.", name)
    # one name at two addresses is two files
    path = Path(torch.hub.get_dir()) / "checkpoints" / f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{name}"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), stated and stated.group(1), progress=False)
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{url} cannot be downloaded: {error}") from error
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Loading pre-trained weights into a model


@dataclass
class LoadReport:
    """What `load_pretrained` did. Names are the model's, in `ignored` the checkpoint's.

    loaded: every tensor copied; expanded: those of them that came from the shared bias table; interpolated: those
    resized; ignored: checkpoint tensors not used; missing: model tensors left as they were; matched: fraction of the
    encoder's parameter tensors that were loaded.
    """

    source: str
    loaded: list[str] = field(default_factory=list)
    expanded: list[str] = field(default_factory=list)
    interpolated: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    matched: float = 0.0

    def __str__(self) -> str:
        lines = [f"weights from {self.source}: {self.matched:.0%} of the encoder matched"]
        for kind in ("loaded", "expanded", "interpolated", "ignored", "missing"):
            names = getattr(self, kind)
            if names:
                lines.append(f"  {kind} ({len(names)}): {', '.join(_listed(names))}")
        return "\n".join(lines)


def load_pretrained(
    model: nn.Module,
    path_or_state: str | Path | dict[str, Any],
    *,
    model_key: str = PUBLISHED_KEYS,
    prefix: str = "",
    min_matched: float = 0.9,
    new: Collection[str] = (),
) -> LoadReport:
    """Copies the pre-trained weights of a file, https address or loaded dict into `model` (spec ConMIM 6.1).

    Which weights: the first key of `model_key` (split at "|") that the checkpoint has, else the checkpoint itself. With
    the default key a checkpoint of this repository that has a `teacher` gives the teacher, which is what the published
    recipe fine-tunes, and SemAIM's "state_dict" is a key too. `prefix` selects the keys under it. The naming is
    recognised by content; a shared bias table is copied into every block, bias tables and positions are resized, a head
    of another shape is left out.

    Raises ValueError, with the model untouched, for a shape that no rule repairs and where less than `min_matched` of
    the encoder's parameter tensors (all but head.*, fc.*, classifier.*, fc_norm.*, norm.*) are found. Those whose names
    contain one of `new` need not be: they may start as they are.
    """
    from_file = not isinstance(path_or_state, dict)
    checkpoint = load_checkpoint(path_or_state) if from_file else path_or_state
    name = str(path_or_state) if from_file else "a state dict"
    key, state = _select_weights(checkpoint, model_key, name)
    report = LoadReport(source=f"{name}[{key}]" if key else name)
    target = model.state_dict()
    state = _to_native(_below(state, prefix, report), target)
    if "pos_embed" in state and "pos_embed" not in target:
        log.warning(
            "the positions in %s are not used: this --model has none, --abs_pos_emb gives it some", report.source
        )
    fitted = _fit(_expand_to_blocks(state, target, report), model, target, report)
    _check_matched(model, state, min_matched, new, report)
    lost = [key for key in report.ignored if key.startswith("blocks.") and not key.endswith("relative_position_index")]
    if lost:
        log.warning(
            "parts of the blocks in %s have no place in this --model, which computes something else: %s", report.source,
            _examples(lost),
        )  # fmt: skip
    model.load_state_dict(fitted, strict=False)
    return report


def class_tokens(
    path_or_state: str | Path | dict[str, Any], *, model_key: str = PUBLISHED_KEYS, prefix: str = ""
) -> int | None:
    """How many class tokens these weights have, for a model that is to take them; None: one, as usual, or none.

    A model with fewer would lose them and the positions (spec SemanticMIM 3.4). Arguments and errors are those of
    `load_pretrained`.
    """
    from_file = not isinstance(path_or_state, dict)
    name = str(path_or_state) if from_file else "a state dict"
    checkpoint = load_checkpoint(path_or_state, mmap=True) if from_file else path_or_state
    _, state = _select_weights(checkpoint, model_key, name)
    token = _to_native(_below(state, prefix, LoadReport(name)), ()).get("cls_token")
    return token.shape[1] if token is not None and token.ndim == 3 and token.shape[1] > 1 else None


def _select_weights(checkpoint: dict[str, Any], model_key: str, name: str) -> tuple[str, dict[str, Any]]:
    if model_key == PUBLISHED_KEYS and checkpoint.get("teacher"):
        return "teacher", checkpoint["teacher"]
    # SemAIM's files have the weights under a key of its own
    for key in (*model_key.split("|"), *(["state_dict"] if model_key == PUBLISHED_KEYS else [])):
        if isinstance(checkpoint.get(key), dict):
            return key, checkpoint[key]
    if not any(isinstance(value, Tensor) for value in checkpoint.values()):
        found = ", ".join(map(str, checkpoint)) or "nothing"
        raise ValueError(f"{name} has no weights under --model_key {model_key}; it holds {found}")
    return "", checkpoint


def backbone_weights(checkpoint: dict[str, Any], name: str, model_key: str = PUBLISHED_KEYS) -> StateDict:
    """What is not classifier, neck, decoder or token of a loaded checkpoint, under native names.

    Of OpenMixup's files and of classifiers; of a pre-training method's it is what the method exports itself.
    ValueError: there is nothing else.
    """
    _, state = _select_weights(checkpoint, model_key, name)
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    inside = {key: value for key, value in tensors.items() if re.match(r"(module\.)?backbone\.", key)}
    native = _to_native(inside or tensors, ())
    kept = {key: v for key, v in native.items() if key.startswith("head.norm.") or not key.startswith(_NO_BACKBONE)}
    if not kept:
        raise ValueError(f"{name} holds no backbone, only {_examples(sorted(native))}")
    return kept


def _below(state: dict[str, Any], prefix: str, report: LoadReport) -> StateDict:
    """The tensors whose names begin with `prefix`, without it."""
    inside = [key for key, value in state.items() if key.startswith(prefix) and isinstance(value, Tensor)]
    if not inside:
        raise ValueError(f"{report.source} has no tensor under --model_prefix '{prefix}'")
    report.ignored += [key for key in state if key not in inside]
    return {key.removeprefix(prefix): state[key] for key in inside}


def _expand_to_blocks(state: StateDict, target: StateDict, report: LoadReport) -> StateDict:
    """The shared bias table in every block of a model that has one table a block."""
    tables = [key for key in target if key.startswith("blocks.") and key.endswith(_TABLE)]
    if _SHARED_TABLE not in state or _SHARED_TABLE in target or not tables:
        return state
    report.expanded = tables
    return _expand_shared_table(state, len(tables))


def _fit(state: StateDict, model: nn.Module, target: StateDict, report: LoadReport) -> StateDict:
    """The tensors that the model has a place for, in its shapes; fills the report's lists."""
    fitted = {}
    for key, value in state.items():
        if key not in target or (key.startswith(_HEADS) and value.shape != target[key].shape):
            report.ignored.append(key)
            continue
        fitted[key] = _resize(key, value, target[key].shape, model)
        if fitted[key] is not value:
            report.interpolated.append(key)
        if fitted[key].shape != target[key].shape:
            raise ValueError(
                f"{report.source}: {key} has shape {tuple(value.shape)}, the model wants {tuple(target[key].shape)}"
            )
    report.loaded = list(fitted)
    report.missing = [key for key in target if key not in fitted]
    return fitted


def _resize(key: str, value: Tensor, shape: torch.Size, model: nn.Module) -> Tensor:
    if key.endswith(_TABLE) and value.shape[0] != shape[0]:
        extra = 3 if hasattr(model, "cls_token") else 0  # rows of a ViT's class token; a Swin has none
        side = math.isqrt(value.shape[0] - extra)
        if side**2 + extra != value.shape[0] or side % 2 == 0:
            raise ValueError(f"{key} with {value.shape[0]} rows is not of a square window and cannot be resized")
        window = model.patch_embed.grid_size if extra else (math.isqrt(shape[0]) + 1) // 2
        return interpolate_rel_pos_bias(value, (side + 1) // 2, window, extra)
    if key.endswith("pos_embed") and value.shape[1] != shape[1]:  # the decoder's too
        return interpolate_pos_embed(value, model.patch_embed.grid_size, model.num_prefix_tokens)
    return value


def _check_matched(
    model: nn.Module, state: StateDict, min_matched: float, new: Collection[str], report: LoadReport
) -> None:
    outside = (*_HEADS, "fc_norm.", "norm.")
    encoder = [key for key, _ in model.named_parameters() if not key.startswith(outside)]
    encoder = [key for key in encoder if key in report.loaded or not any(part in key for part in new)]
    unmatched = sorted(set(encoder) - set(report.loaded))
    report.matched = 1 - len(unmatched) / len(encoder)
    if report.matched < min_matched:
        ignored = sorted(set(state) - set(report.loaded))
        raise ValueError(
            f"{report.source} matches only {report.matched:.0%} of the encoder, {min_matched:.0%} are needed: the "
            f"model has {_examples(unmatched)}; the file has {_examples(ignored)}; is it for this --model, "
            "--model_prefix and --model_key?"
        )


def _examples(names: list[str], limit: int = 4) -> str:
    folded = _fold_blocks(names)
    return ", ".join(folded[:limit]) + (", ..." if len(folded) > limit else "") or "nothing else"


def _listed(names: Collection[str], limit: int = 40) -> list[str]:
    """Blocks in one line; of networks that have none, how many names begin alike."""
    folded = _fold_blocks(names)
    if len(folded) <= limit:
        return folded
    counts = Counter(re.match(r"(?:backbone\.)?[^.]+", name)[0] for name in names)
    return [f"{start}.* ({count})" for start, count in counts.items()]


def _fold_blocks(names: Collection[str]) -> list[str]:
    """blocks.0.x, blocks.1.x, blocks.2.x, blocks.5.x -> blocks.0-2,5.x"""
    numbers: dict[str, list[int]] = {}
    for name in names:
        found = re.search(r"blocks\.(\d+)\.", name)
        pattern = name if found is None else f"{name[: found.start(1)]}{{}}{name[found.end(1) :]}"
        numbers.setdefault(pattern, []).extend([] if found is None else [int(found.group(1))])
    return [pattern.format(_ranges(blocks)) if blocks else pattern for pattern, blocks in numbers.items()]


def _ranges(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


# ---------------------------------------------------------------------------------------------------------------------
# Names: to native on loading, to timm's on export


def to_timm(state_dict: StateDict) -> StateDict:
    """An encoder in native names under timm's: `Beit` for the BEiT form, else `VisionTransformer`; both load strictly.

    The BEiT form (bias tables, or query and value biases with layer scale) gets one bias table a block; a plain ViT
    gets whole qkv biases and timm's layer-scale names, as does any with several class tokens, which are timm's class
    token and `reg_tokens` registers. The features are the same. A converted dict stays as it is.
    """
    state = {key: value for key, value in state_dict.items() if not key.endswith("relative_position_index")}
    if not any(key.startswith("blocks.") for key in state):  # no plain transformer: Swin, or a convolutional network
        return state
    state = fuse_qkv(state)
    several = "cls_token" in state and state["cls_token"].shape[1] > 1
    if several:
        state["cls_token"], state["reg_token"] = state["cls_token"].tensor_split([1], dim=1)
    if (
        not several
        and "reg_token" not in state
        and (_has(state, _TABLE) or (_has(state, ".q_bias") and _has(state, ".gamma_1")))
    ):
        depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
        return _expand_shared_table(_split_qkv_bias(state), depth)
    return _rename(_fuse_qkv_bias(state), r"\.gamma_(\d)$", r".ls\1.gamma")


def _to_native(state: StateDict, target: Collection[str]) -> StateDict:
    """The state under the model's names: every converter that recognises the names it meets is applied, in order."""
    for recognise, convert in _CONVERTERS:
        if recognise(state, target):
            state = convert(state)
    return state


def _has(names: Collection[str], part: str) -> bool:
    return any(part in name for name in names)


def _has_encoder(names: Collection[str]) -> bool:
    return any(name.startswith("encoder.patch_embed.") for name in names)


def _inside(state: StateDict, prefix: str) -> StateDict:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _rename(state: StateDict, pattern: str, replacement: str) -> StateDict:
    return {re.sub(pattern, replacement, key): value for key, value in state.items()}


def _expand_shared_table(state: StateDict, depth: int) -> StateDict:
    """Gives each block the shared bias table, added to the block's own if any: the two biases add in attention."""
    state = dict(state)
    shared = state.pop(_SHARED_TABLE, None)
    if shared is not None:
        for block in range(depth):
            key = f"blocks.{block}.attn.{_TABLE}"
            state[key] = state[key] + shared if key in state else shared
    return state


def _split_qkv_bias(state: StateDict) -> StateDict:
    """Query and value biases from whole ones. A key bias adds the same to all scores of a query: softmax drops it."""
    split = {}
    for key, value in state.items():
        if key.endswith("attn.qkv.bias"):
            stem = key.removesuffix("qkv.bias")
            split[f"{stem}q_bias"], _, split[f"{stem}v_bias"] = value.chunk(3)
        else:
            split[key] = value
    return split


def _join_registers(state: StateDict) -> StateDict:
    """timm's class token and registers as class tokens."""
    joined = {key: value for key, value in state.items() if key != "reg_token"}
    return joined | {"cls_token": torch.cat((state["cls_token"], state["reg_token"]), dim=1)}


def _fuse_qkv_bias(state: StateDict) -> StateDict:
    """Whole qkv biases from query and value biases, with zeros for the keys."""
    fused = {key: value for key, value in state.items() if not key.endswith((".q_bias", ".v_bias"))}
    for key, query in state.items():
        if key.endswith(".q_bias"):
            stem = key.removesuffix("q_bias")
            fused[f"{stem}qkv.bias"] = torch.cat((query, torch.zeros_like(query), state[f"{stem}v_bias"]))
    return fused


def fuse_qkv(state: StateDict) -> StateDict:
    """SAIM's separate projections to queries, keys and values of the encoder's blocks as joint ones."""
    fused = {}
    for key, value in state.items():
        found = re.fullmatch(r"(blocks\.\d+\.attn\.)([qkv])\.(weight|bias)", key)
        if found is None:
            fused[key] = value
        elif found[2] == "q":
            fused[f"{found[1]}qkv.{found[3]}"] = torch.cat([state[f"{found[1]}{part}.{found[3]}"] for part in "qkv"])
    return fused


def from_mmpretrain(state: StateDict) -> StateDict:
    """OpenMMLab's names of a ViT, and SemanticMIM's, as native ones (spec SemanticMIM 8)."""
    native: StateDict = {}
    for name, value in state.items():
        if _is_openmixup_extra(name) and not name.startswith("neck.fc."):  # which is MaskFeat's head
            continue
        for pattern, replacement in _MMPRETRAIN_NAMES:
            name = re.sub(pattern, replacement, name)
        native[name] = value
    return _join_key_values(native)


_MMPRETRAIN_NAMES = (
    (r"^backbone\.", ""), (r"^extra_layers\.", "mask_blocks."), (r"^layers\.", "blocks."),
    (r"(blocks\.\d+)\.ln(\d)\.", r"\1.norm\2."), (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
    (r"\.ffn\.layers\.1\.", ".mlp.fc2."), (r"^patch_embed\.projection\.", "patch_embed.proj."), (r"^ln1\.", "norm."),
    (r"^ln2\.", "fc_norm."), (r"^head\.cls_head\.", "lm_head."), (r"^neck\.fc\.", "hog_head."),
    (r"^head\.fc\.", "head."),
)  # fmt: skip


def _join_key_values(state: StateDict) -> StateDict:
    """A projection to queries and one to keys and values (`q` and `kv`, `q_proj` and `kv_proj`) as one to all three."""
    joined = {}
    for name, value in state.items():
        found = re.fullmatch(r"(.*\.attn\.)(q|kv)(_proj)?\.(weight|bias)", name)
        if found is None:
            joined[name] = value
        elif found[2] == "q":
            others = state[f"{found[1]}kv{found[3] or ''}.{found[4]}"]
            joined[f"{found[1]}qkv.{found[4]}"] = torch.cat((value, others))
    return joined


# OpenMixup's names (specs/a2mim.md 6): what its ViT, Swin and ConvNeXt are known by, and how their names change into
# timm's, one rule after another. Its ResNet has timm's names but for the classifier.
_OPENMIXUP_NAMES: dict[str, tuple[tuple[str, str | Callable[[re.Match], str]], ...]] = {
    ".ln1.weight": (
        (r"^patch_embed\.projection\.", "patch_embed.proj."), (r"^layers\.", "blocks."), (r"\.ln(\d)\.", r".norm\1."),
        (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."), (r"\.ffn\.layers\.1\.", ".mlp.fc2."), (r"^ln1\.", "norm."),
        (r"^head\.fc\.", "head."),
    ),
    ".w_msa.": (
        (r"^patch_embed\.projection\.", "patch_embed.proj."), (r"\.attn\.w_msa\.", ".attn."),
        (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."), (r"\.ffn\.layers\.1\.", ".mlp.fc2."), (r"^norm3\.", "norm."),
        (r"^stages\.(\d+)\.downsample\.", lambda found: f"layers.{int(found[1]) + 1}.downsample."),
        (r"^stages\.", "layers."),
    ),
    ".depthwise_conv.": (
        (r"^downsample_layers\.0\.", "stem."), (r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample."),
        (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."), (r"\.depthwise_conv\.", ".conv_dw."),
        (r"\.pointwise_conv(\d)\.", r".mlp.fc\1."), (r"^norm3\.", "head.norm."),
    ),
    "layer1.0.conv1.": ((r"^head\.fc\.", "fc."),),
}  # fmt: skip


def openmixup_rules(names: Collection[str]) -> tuple[tuple[str, str | Callable[[re.Match], str]], ...]:
    """The rules for a model of these names, which have no "backbone." in front; none for another naming."""
    return next((rules for mark, rules in _OPENMIXUP_NAMES.items() if _has(names, mark)), ())


def from_openmixup(state: StateDict) -> StateDict:
    """OpenMixup's ViT, Swin, ConvNeXt or ResNet, "backbone." in front or not, under timm's names.

    A neck, averages, indices and masks are left out, a classifier is kept. Swin's patch merging is brought into timm's
    order of columns.
    """
    inside = {name.removeprefix("backbone."): value for name, value in state.items() if not _is_openmixup_extra(name)}
    converted = inside
    for pattern, replacement in openmixup_rules(inside):
        converted = _rename(converted, pattern, replacement)
    if not _has(inside, ".w_msa."):
        return converted
    merging = re.compile(r"\.downsample\.(norm\.(weight|bias)|reduction\.weight)$")
    return {name: _columns_first(value) if merging.search(name) else value for name, value in converted.items()}


def _is_openmixup_extra(name: str) -> bool:
    is_index = name.endswith(("relative_position_index", "attn_mask"))
    return is_index or name.startswith(("neck.", "ema_")) or "momentum" in name


def _columns_first(value: Tensor) -> Tensor:
    """The last axis of patch merging from (C, row, column) to (column, row, C)."""
    return value.unflatten(-1, (-1, 2, 2)).movedim(-3, -1).transpose(-3, -2).flatten(-3)


# (recognise(names, names the model has), convert): a further naming is one more line
_CONVERTERS: tuple[tuple[Callable[[Collection[str], Collection[str]], bool], Callable[[StateDict], StateDict]], ...] = (
    # DistributedDataParallel and torch.compile
    (lambda names, _: all(name.startswith("module.") for name in names), lambda s: _rename(s, r"^module\.", "")),
    (lambda names, _: all(name.startswith("_orig_mod.") for name in names), lambda s: _rename(s, r"^_orig_mod\.", "")),
    # OpenMMLab's ViTs
    (lambda names, _: any(re.match(r"(backbone\.)?layers\.0\.ln1\.", name) for name in names), from_mmpretrain),
    # SimMIM's own files: the encoder among others
    (lambda names, wanted: _has_encoder(names) and not _has_encoder(wanted), lambda s: _inside(s, "encoder.")),
    # OpenMixup's files, whole or the backbone alone, and those of SimMIM and A2MIM, whose backbones have timm's names
    (
        lambda names, wanted: (
            not _has(wanted, "backbone.")
            and (any(name.startswith("backbone.") for name in names) or bool(openmixup_rules(names)))
        ),
        from_openmixup,
    ),
    # SAIM's blocks
    (lambda names, wanted: _has(names, ".attn.q.weight") and _has(wanted, ".attn.qkv.weight"), fuse_qkv),
    # timm's ViT, our own export among them
    (lambda names, wanted: "reg_token" in names and "reg_token" not in wanted, _join_registers),
    (
        lambda names, wanted: _has(names, ".ls1.gamma") and _has(wanted, ".gamma_1"),
        lambda s: _rename(s, r"\.ls(\d)\.gamma$", r".gamma_\1"),
    ),
    (lambda names, wanted: _has(names, ".attn.qkv.bias") and _has(wanted, ".attn.q_bias"), _split_qkv_bias),
    (lambda names, wanted: _has(names, ".attn.q_bias") and _has(wanted, ".attn.qkv.bias"), _fuse_qkv_bias),
)

# ---------------------------------------------------------------------------------------------------------------------
# Resizing


def interpolate_rel_pos_bias(
    table: Tensor, src_window: int | tuple[int, int], dst_window: int | tuple[int, int], num_extra: int = 3
) -> Tensor:
    """Resizes a relative position table for another window (spec ConMIM 6.2, BEiT's geometric positions).

    `table` is [(2 h - 1) (2 w - 1) + num_extra, heads] for a window of h x w patches; an int means a square. Along each
    axis the rows are put at the geometrically spaced `source_coordinates`, a not-a-knot cubic spline (of lower degree
    through fewer than four points) is laid through them in float64, and read at the whole offsets of the new window,
    clamped to the source's range. The last `num_extra` rows are copied. Returns the table's dtype.
    """
    src, dst = _pair(src_window), _pair(dst_window)
    if src == dst:
        return table
    offsets, extra = table.detach().split([table.shape[0] - num_extra, num_extra])
    values = offsets.cpu().double().numpy().reshape(2 * src[0] - 1, 2 * src[1] - 1, -1)
    for axis in (0, 1):
        values = resample(values, axis, src[axis], dst[axis])
    return torch.cat([torch.from_numpy(values).flatten(0, 1).to(table), extra])


def geometric_ratio(src_window: int, dst_window: int) -> float:
    """Ratio q in [1.01, 1.5] for which 1 + q + q^2 + ..., src_window - 1 terms, comes nearest to dst_window - 1.

    The last midpoint of a bisection down to 1e-6, as published.
    """
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        ratio = (low + high) / 2
        if (1 - ratio ** (src_window - 1)) / (1 - ratio) > dst_window - 1:
            high = ratio
        else:
            low = ratio
    return ratio


def source_coordinates(src_window: int, ratio: float) -> np.ndarray:
    """0, +-1, +-(1 + q), +-(1 + q + q^2), ... in ascending order: float64 [2 * src_window - 1]."""
    positive = np.cumsum(ratio ** np.arange(src_window - 1))
    return np.concatenate([-positive[::-1], [0.0], positive])


def interpolate_pos_embed(pos_embed: Tensor, dst_grid: int | tuple[int, int], num_prefix: int) -> Tensor:
    """Resizes absolute positions [1, num_prefix + g * g, C] to a grid of patches, bicubic (spec ConMIM 6.3).

    The prefix rows (class token) are copied. Returns [1, num_prefix + dst_h * dst_w, C] in the dtype of `pos_embed`.
    """
    dst = _pair(dst_grid)
    prefix, patches = pos_embed.detach().split([num_prefix, pos_embed.shape[1] - num_prefix], dim=1)
    side = math.isqrt(patches.shape[1])
    if side**2 != patches.shape[1]:
        raise ValueError(f"pos_embed of {patches.shape[1]} patches is not of a square grid and cannot be resized")
    if dst == (side, side):
        return pos_embed
    grid = patches.float().transpose(1, 2).unflatten(2, (side, side))
    resized = F.interpolate(grid, size=dst, mode="bicubic", align_corners=False)
    return torch.cat([prefix, resized.flatten(2).transpose(1, 2).to(prefix)], dim=1)


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def resample(values: np.ndarray, axis: int, src_window: int, dst_window: int) -> np.ndarray:
    """One axis of offsets, 2 * src_window - 1, read at those of another window; linear in `values`."""
    if src_window == dst_window:
        return values
    coordinates = source_coordinates(src_window, geometric_ratio(src_window, dst_window))
    targets = np.arange(1 - dst_window, dst_window).clip(coordinates[0], coordinates[-1])
    return make_interp_spline(coordinates, values, k=min(3, len(coordinates) - 1), axis=axis)(targets)
