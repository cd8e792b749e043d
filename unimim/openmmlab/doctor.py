"""`python -m unimim.openmmlab.doctor`: what segmentation and detection need, what is there, and
what to do if not."""

import platform
import sys

from unimim.openmmlab import compat

SHARED = ("torch", "torchvision", "timm", "numpy", "scipy")


def operators() -> str:
    if compat.installed("mmcv-lite") is None:
        return "none: mmcv is missing"
    if compat.has_compiled_operators():
        return "compiled, of mmcv"
    return "torchvision's, through the stand-in of unimim/openmmlab/compat.py"


def report() -> list[str]:
    """A line for each version, then for each thing that is wrong."""
    versions = {"python": platform.python_version()}
    versions |= {name: compat.installed(name) or "missing" for name in (*SHARED, *compat.pins())}
    lines = [f"{name:20s} {version}" for name, version in versions.items()]
    return [*lines, f"{'operators':20s} {operators()}"]


def main() -> int:
    print("\n".join(report()))
    problems = compat.problems()
    print(
        " ".join(
            [*problems, f"Repair it with: {compat.INSTALL}"]
            if problems
            else ["Everything needed is there."]
        )
    )
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
