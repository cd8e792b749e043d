"""Evaluates a segmentor: `python semantic_segmentation/test.py CONFIG CHECKPOINT [--tta]`; `--help` lists flags."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from downstream import runner
from semantic_segmentation.task import TASK

if __name__ == "__main__":
    runner.launch(lambda: runner.test(TASK, description=__doc__))
