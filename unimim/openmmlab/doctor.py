"""Print what segmentation and detection need and what is installed.

Usage: python -m unimim.openmmlab.doctor
"""

import platform
import sys

from unimim.openmmlab import compat

SHARED = ("torch", "torchvision", "timm", "numpy", "scipy")


def operators() -> str:
    """Return where mmcv's operators come from."""
    if compat.installed("mmcv-lite") is None:
        return "none: mmcv is missing"
    if compat.has_compiled_operators():
        return "compiled, of mmcv"
    return "torchvision's, through unimim/openmmlab/compat.py"


def report() -> list[str]:
    """Return one line per version, then one on the operators."""
    versions = {"python": platform.python_version()}
    versions |= {name: compat.installed(name) or "missing" for name in (*SHARED, *compat.pins())}
    lines = [f"{name:20s} {version}" for name, version in versions.items()]
    return [*lines, f"{'operators':20s} {operators()}"]


def main() -> int:
    """Print the report and what to do; return 1 if anything is missing."""
    print("\n".join(report()))
    problems = compat.problems()
    if problems:
        print(" ".join([*problems, f"Repair it with: {compat.INSTALL}"]))
    else:
        print("Everything needed is there.")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
