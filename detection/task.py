"""What the shared runner has to know of detection."""

from pathlib import Path
from typing import Any

from unimim.openmmlab.runner import Task


def save_predictions(cfg: Any, path: str) -> None:
    """--out PREFIX writes PREFIX.bbox.json and PREFIX.segm.json in COCO's format of results."""
    cfg.test_evaluator.outfile_prefix = str(Path(path).absolute())


TASK = Task("mmdet", Path(__file__).resolve().parent, save_predictions)
