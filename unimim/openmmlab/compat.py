"""OpenMMLab's libraries from wheels alone: a stand-in for compiled operators, versions, and clear
words on what lacks.

Source: specs/downstream.md 1.4 and 2.5. `install_operators` comes before anything imports mmcv.ops.
"""

import importlib
import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import torch
import torch.distributed as dist
import torchvision
from torch import Tensor

REQUIREMENTS = Path(__file__).resolve().parents[2] / "requirements-downstream.txt"
INSTALL = "pip install -r requirements-downstream.txt"
EXTENSION = "mmcv._ext"

# --------------------------------------------------------------------------------------------------
# Operators


def nms(bboxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Kept rows of boxes [K, 4], best first: int64 [M]."""
    if offset:
        raise NotImplementedError(
            "the stand-in for mmcv's nms counts no pixel as width 1: offset must be 0"
        )
    return torchvision.ops.nms(bboxes, scores, iou_threshold)


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Fills `output` [K, C, aligned_height, aligned_width] from maps [B, C, H, W]; rois [K, 5]
    begin with the image."""
    _check_average(pool_mode)
    size = (aligned_height, aligned_width)
    output.copy_(
        torchvision.ops.roi_align(input, rois, size, spatial_scale, sampling_ratio, aligned)
    )


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Fills `grad_input` [B, C, H, W] from `grad_output` [K, C, aligned_height, aligned_width]."""
    _check_average(pool_mode)
    grad = torch.ops.torchvision._roi_align_backward(
        grad_output,
        rois,
        spatial_scale,
        aligned_height,
        aligned_width,
        *grad_input.shape,
        sampling_ratio,
        aligned,
    )
    grad_input.copy_(grad)


def _check_average(pool_mode: int) -> None:
    if pool_mode != 1:
        raise NotImplementedError("the stand-in for mmcv's RoIAlign knows pool_mode 'avg' only")


class _Operators(ModuleType):
    """mmcv asks for every operator on import and calls few: the others say their name once they are
    called."""

    def __getattr__(self, name: str) -> Callable:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*args, **kwargs):
            raise NotImplementedError(
                f"mmcv's operator {name} has no stand-in here and this mmcv is not compiled: see "
                "unimim/openmmlab/compat.py"
            )

        return missing


def has_compiled_operators() -> bool:
    """Whether the installed mmcv brings its own. ModuleNotFoundError without mmcv."""
    found = sys.modules.get(EXTENSION)
    return (
        not isinstance(found, _Operators)
        and (found or importlib.util.find_spec(EXTENSION)) is not None
    )


def install_operators() -> bool:
    """Puts the stand-in in place of mmcv's compiled operators unless there are some. Returns
    whether it is in place."""
    if has_compiled_operators():
        return False
    if EXTENSION not in sys.modules:
        module = _Operators(EXTENSION)
        module.__spec__ = ModuleSpec(EXTENSION, None)
        vars(module).update(
            nms=nms, roi_align_forward=roi_align_forward, roi_align_backward=roi_align_backward
        )
        sys.modules[EXTENSION] = module
    return True


# --------------------------------------------------------------------------------------------------
# What is installed


def pins() -> dict[str, str]:
    """Names and versions of requirements-downstream.txt: {"mmengine": "==0.10.7", ...}."""
    lines = (line.partition("#")[0].strip() for line in REQUIREMENTS.read_text().splitlines())
    return dict(
        re.match(r"([\w-]+)(.*)", line).groups()
        for line in lines
        if line and not line.startswith("-")
    )


def installed(name: str) -> str | None:
    """The version of a distribution, or None. A compiled mmcv does for mmcv-lite."""
    for candidate in (name, *(["mmcv"] if name == "mmcv-lite" else [])):
        try:
            return importlib.metadata.version(candidate)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def problems() -> list[str]:
    """One sentence on each package that is missing or of another version."""
    found = []
    for name, pin in pins().items():
        version = installed(name)
        if version is None:
            found.append(f"{name}{pin} is not installed.")
        elif not _satisfies(version, pin):
            found.append(f"{name} is {version}, {pin} is needed.")
    return found


def _satisfies(version: str, pin: str) -> bool:
    operator, wanted = re.fullmatch(r"(==|<|)(.*)", pin).groups()
    numbers, limit = ([int(n) for n in re.findall(r"\d+", text)[:3]] for text in (version, wanted))
    return numbers == limit if operator == "==" else not operator or numbers < limit


def require(*names: str) -> None:
    """Leaves the process with one sentence unless these modules can be imported."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(f"{' and '.join(missing)} cannot be imported: {INSTALL}")


def prepare(*names: str) -> None:
    """What the entry scripts do first: everything is there, and mmcv has operators."""
    require("mmengine", "mmcv", *names)
    importlib.import_module("mmcv")
    install_operators()


# --------------------------------------------------------------------------------------------------
# Processes


def init_process_group(launcher: str) -> None:
    """Joins the launcher's processes on a CPU, which mmengine cannot; with a GPU it does that
    itself."""
    if launcher != "none" and not torch.cuda.is_available() and not dist.is_initialized():
        importlib.import_module(
            "mmengine.runner"
        )  # what it imports takes the group there is as default arguments
        dist.init_process_group("gloo")
