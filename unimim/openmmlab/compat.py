"""Run OpenMMLab's libraries without compiling: substitute operators, and check versions.

Call `install_operators` before anything imports mmcv.ops.
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
    """Return the indices of the boxes [K, 4] to keep, best first: int64 [M]."""
    if offset:
        raise NotImplementedError("the substitute for mmcv's nms supports offset=0 only")
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
    """Write RoIAlign of maps [B, C, H, W] to `output` [K, C, aligned_height, aligned_width].

    `rois` is [K, 5]: the image's index, then the box.
    """
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
    """Write the gradient of `roi_align_forward` to `grad_input` [B, C, H, W]."""
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
        raise NotImplementedError(
            "the substitute for mmcv's RoIAlign supports pool_mode 'avg' only"
        )


class _Operators(ModuleType):
    """A substitute for mmcv's extension module.

    mmcv looks up every operator on import but calls few; the others raise an error when called.
    """

    def __getattr__(self, name: str) -> Callable:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*args, **kwargs):
            raise NotImplementedError(
                f"mmcv's operator {name} has no substitute here and this mmcv is not compiled; "
                "see unimim/openmmlab/compat.py"
            )

        return missing


def has_compiled_operators() -> bool:
    """Tell whether the installed mmcv has compiled operators; it must be installed."""
    found = sys.modules.get(EXTENSION)
    return (
        not isinstance(found, _Operators)
        and (found or importlib.util.find_spec(EXTENSION)) is not None
    )


def install_operators() -> bool:
    """Install the substitute unless mmcv has compiled operators; return whether it is in use."""
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
    """Return the pinned versions of requirements-downstream.txt: {"mmengine": "==0.10.7", ...}."""
    lines = (line.partition("#")[0].strip() for line in REQUIREMENTS.read_text().splitlines())
    return dict(
        re.match(r"([\w-]+)(.*)", line).groups()
        for line in lines
        if line and not line.startswith("-")
    )


def installed(name: str) -> str | None:
    """Return the version of a distribution, or None; a compiled mmcv counts as mmcv-lite."""
    for candidate in (name, *(["mmcv"] if name == "mmcv-lite" else [])):
        try:
            return importlib.metadata.version(candidate)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def problems() -> list[str]:
    """Return one sentence per package that is missing or has another version."""
    sentences = []
    for name, pin in pins().items():
        version = installed(name)
        if version is None:
            sentences.append(f"{name}{pin} is not installed.")
        elif not _satisfies(version, pin):
            sentences.append(f"{name} is {version}, {pin} is needed.")
    return sentences


def _satisfies(version: str, pin: str) -> bool:
    """Tell whether a version satisfies a pin: "==1.2.3", "<82" or ""."""
    operator, wanted = re.fullmatch(r"(==|<|)(.*)", pin).groups()
    numbers = _numbers(version)
    limit = _numbers(wanted)
    return numbers == limit if operator == "==" else not operator or numbers < limit


def _numbers(version: str) -> list[int]:
    """Return the first three numbers of a version."""
    return [int(number) for number in re.findall(r"\d+", version)[:3]]


def require(*names: str) -> None:
    """Exit with one sentence unless these modules can be imported."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(f"{' and '.join(missing)} cannot be imported: {INSTALL}")


def prepare(*names: str) -> None:
    """Check that all modules are installed and give mmcv operators; entry scripts do this first."""
    require("mmengine", "mmcv", *names)
    importlib.import_module("mmcv")
    install_operators()


# --------------------------------------------------------------------------------------------------
# Processes


def init_process_group(launcher: str) -> None:
    """Join the launcher's processes on a CPU, which mmengine cannot do; on GPUs it does."""
    if launcher != "none" and not torch.cuda.is_available() and not dist.is_initialized():
        # imported first: its imports take an existing group for default arguments
        importlib.import_module("mmengine.runner")
        dist.init_process_group("gloo")
