"""Linear probing of a frozen network, for one learning rate or several at once; `--help` lists the
flags.

The heads are a task in unimim/evaluation/linear_probe.py, trained by the loop that pre-trains; the
run is put together in unimim/evaluation/probing.py.
"""

from argparse import Namespace

if __name__ == "__main__":
    from unimim.early import end_on_signals

    end_on_signals()

import modeling_pretrain  # noqa: F401  (registers the methods)
from engine_for_pretraining import train
from unimim.engine.setup import launch
from unimim.evaluation.flags import parse_linear
from unimim.evaluation.probing import ProbeRow, run_probe


def main(args: Namespace) -> list[ProbeRow]:
    return run_probe(args, train)


if __name__ == "__main__":
    launch(main, parse_linear())
