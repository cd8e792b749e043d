"""Evaluates a segmentor: `python semantic_segmentation/test.py CONFIG CHECKPOINT [--tta]`; `--help`
lists flags."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from semantic_segmentation.task import TASK
from unimim.openmmlab import runner

if __name__ == "__main__":
    runner.launch(lambda: runner.test(TASK, description=__doc__))
