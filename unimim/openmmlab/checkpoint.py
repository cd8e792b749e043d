"""Loads pre-trained weights into a backbone, through the repository's one loader."""

import logging
import pickle
from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import nn

from unimim.checkpoint import loading
from unimim.checkpoint.files import load_checkpoint, load_module_state
from unimim.checkpoint.loading import LoadReport, load_pretrained, unwrapped

log = logging.getLogger("unimim")

KEYS = ("model", "module", "state_dict")
NETWORK = "backbone.network."  # of a segmentor or detector whose backbone is one of timm's


def read(path: str | Path) -> dict[str, Any]:
    """A checkpoint's content; of one that would run code, such as mmengine's own files, the tensors
    alone."""
    try:
        return load_checkpoint(path)
    except ValueError as error:
        if not isinstance(error.__cause__, pickle.UnpicklingError):
            raise
    return unwrapped(load_module_state(path), (), [f"{key}." for key in KEYS])


def load_backbone(model: nn.Module, path: str | Path, *, new: Collection[str] = ()) -> LoadReport:
    """Copies the weights of any file that `checkpoint.load_pretrained` knows into a backbone, and
    logs the report.

    Raises ValueError, with the model untouched, where less than 90 % of its parameter tensors are
    found, without those whose names contain one of `new`.
    """
    content = read(path)
    names = unwrapped(content, KEYS)
    prefix = NETWORK if any(name.startswith(NETWORK) for name in names) else ""
    try:
        report = load_pretrained(model, content, prefix=prefix, new=new)
    except ValueError as error:
        raise ValueError(f"--pretrained {path}: {error}") from error
    report.source = str(path)
    log.info("%s", report)
    return report


def class_tokens(path: str | Path) -> int:
    """How many class tokens the weights of a file have; 1 for those that have none."""
    return loading.class_tokens(read(path)) or 1
