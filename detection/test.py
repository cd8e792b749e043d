"""Box and mask AP of a trained detector: `python detection/test.py CONFIG CHECKPOINT`; `--help`
lists flags."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from detection.task import TASK
from unimim.openmmlab import runner

if __name__ == "__main__":
    runner.launch(lambda: runner.test(TASK, description=__doc__))
