"""Tell the shared runner about detection."""

from pathlib import Path
from typing import Any

from unimim.openmmlab.runner import Task


def save_predictions(cfg: Any, path: str) -> None:
    """Make --out PREFIX write PREFIX.bbox.json and PREFIX.segm.json in COCO's results format."""
    cfg.test_evaluator.outfile_prefix = str(Path(path).absolute())


TASK = Task("mmdet", Path(__file__).resolve().parent, save_predictions)
