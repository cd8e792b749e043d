"""The section `learns` of gpu_check.py."""

from scripts.gpu_check import Checks


def run(checks: Checks) -> None:
    """Runs the section."""
