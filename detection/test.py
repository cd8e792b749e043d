"""Box and mask AP of a trained detector on COCO's validation images; `--help` lists flags.

python detection/test.py detection/configs/mimdet/mimdet_base_sr0p5_3x.py output/mimdet_base_sr0p5_3x/epoch_36.pth
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from detection.task import TASK
from downstream import runner


def main(argv: list[str] | None = None) -> dict[str, float]:
    return runner.test(TASK, argv, __doc__)


if __name__ == "__main__":
    runner.launch(main)
