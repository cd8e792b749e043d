"""Trains a detector of detection/configs on COCO (specs/downstream.md 6 to 8, 10); `--help` lists flags.

python detection/train.py detection/configs/mimdet/mimdet_base_sr0p5_3x.py --pretrained mae_pretrain_vit_base_full.pth
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from detection.task import TASK
from downstream import runner


def main(argv: list[str] | None = None):
    return runner.train(TASK, argv, __doc__)


if __name__ == "__main__":
    runner.launch(main)
