"""Load pre-trained weights into a backbone, through the repository's one loader."""

import logging
from collections.abc import Collection
from pathlib import Path

from torch import nn

from unimim.checkpoint import loading
from unimim.checkpoint.files import load_checkpoint
from unimim.checkpoint.loading import LoadReport, load_pretrained, unwrapped

log = logging.getLogger("unimim")

KEYS = ("model", "module", "state_dict")
NETWORK = "backbone.network."  # of a segmentor or detector whose backbone is one of timm's


def load_backbone(model: nn.Module, path: str | Path, *, new: Collection[str] = ()) -> LoadReport:
    """Load any file that `load_pretrained` knows into a backbone, and log the report.

    Raises:
        ValueError: less than 90 % of the parameter tensors are found, not counting those whose
            names contain one of `new`. The model is unchanged then.
    """
    content = load_checkpoint(path)
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
    """Return the number of class tokens in a file, 1 if it has none."""
    return loading.class_tokens(path) or 1
