"""k-NN accuracy of a pre-trained network's features; `--help` lists the flags.

The features come from unimim/evaluation/features.py, the votes from unimim/evaluation/knn.py.
"""

from argparse import Namespace

import modeling_pretrain  # noqa: F401  (registers the methods)
from unimim.engine.setup import launch
from unimim.evaluation.flags import parse_knn
from unimim.evaluation.knn import KnnRow, evaluate_features


def main(args: Namespace) -> list[KnnRow]:
    return evaluate_features(args)


if __name__ == "__main__":
    launch(main, parse_knn())
