"""What train.py, test.py and demo.py are to `downstream.runner`."""

from pathlib import Path

from unimim.openmmlab.runner import Task


def save_predictions(cfg, path: str) -> None:
    """Testing writes a PNG of ADE20K's numbers (1 + class) for each image to the folder `path`."""
    cfg.test_evaluator.output_dir = path


TASK = Task("mmseg", Path(__file__).resolve().parent, save_predictions)
