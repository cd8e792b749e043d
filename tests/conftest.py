"""Test set-up: the repository root on the path, one thread per process, a seed and a log of its own
for each test."""

import logging
import os
import random
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)
pytest.register_assert_rewrite("helpers", "reference")  # a failed assertion shows its values


LOG = logging.getLogger("unimim")
PRISTINE = LOG.handlers[:], LOG.level, LOG.propagate, LOG.disabled


def pytest_configure(config):
    """Make several processes take the files in their order, not by the number of their tests."""
    if hasattr(config.option, "loadscopereorder"):  # of pytest-xdist
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(config, items):
    """Put files with slow tests first where processes share them: a long file must not come last,
    when the other processes have nothing left to do."""
    if hasattr(config, "workerinput"):
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: item.path not in slow)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """Before any fixture, those of modules too: what a test draws, and what it finds in the log,
    must not depend on the tests before it.

    A script that runs in this process sets the log up for itself.
    """
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    LOG.handlers[:], level, LOG.propagate, LOG.disabled = PRISTINE
    LOG.setLevel(level)  # which also forgets which levels were enabled; an assignment does not
