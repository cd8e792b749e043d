"""The quick start of the front page: its commands as printed, and what they are said to print."""

import contextlib
import io
import multiprocessing
import os
import re
import shlex
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from helpers import ROOT
from PIL import Image

LINE = re.compile(r"(train_loss|top-1|acc1) ([\d.]+)")
BOUNDS = {"train_loss": 0.1, "top-1": 8.0, "acc1": 6.0}  # how far a run may be from what is printed


def section() -> str:
    """The text of the quick start."""
    return (ROOT / "README.md").read_text().partition("### Quick start")[2].partition("\n## ")[0]


def block(kind: str) -> str:
    return re.search(rf"^```{kind}\n(.*?)^```", section(), re.MULTILINE | re.DOTALL)[1]


def steps() -> list[tuple[str, str]]:
    """Each command with the line that it is said to print, or an empty one."""
    found = []
    for line in block("console").splitlines():
        if line.startswith("$ python "):
            found.append((line.removeprefix("$ python "), ""))
        else:
            found[-1] = (found[-1][0], line)
    return found


def run_all(folder: Path) -> list[str]:
    """Run the commands and the Python lines in this process; what each command printed."""
    import torch

    from analysis import visualize
    from scripts.experiments.demo import programs

    torch.set_num_threads(1)
    os.chdir(folder)
    printed = []
    for command, _ in steps():
        program, *words = shlex.split(command)
        with contextlib.redirect_stdout(io.StringIO()) as output:
            if program == "analysis/visualize.py":
                visualize.main(words)
            else:
                read, main = programs()[program]
                main(read(words))
        printed.append(output.getvalue())
    names = {}
    exec(block("python"), names)
    assert names["features"].shape == (1, 96) and names["features"].isfinite().all()
    return printed


@pytest.mark.slow
def test_commands_give_what_is_printed_beside_them(tmp_path):
    sys.path.insert(0, str(ROOT))  # of the process that is started
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        printed = pool.submit(run_all, tmp_path).result()
    compared = []
    for (command, expected), output in zip(steps(), printed, strict=True):
        if not expected:
            continue
        name, value = LINE.search(expected).groups()
        found = [match[1] for match in re.findall(rf"({name}) ([\d.]+)", output)]
        assert abs(float(found[-1]) - float(value)) < BOUNDS[name], (command, found[-1], value)
        compared.append(float(found[-1]))
    _, knn, random_knn, linear, random_linear = compared
    assert knn > random_knn + 10 and linear > random_linear + 20
    with Image.open(tmp_path / "out/mae.png") as picture:
        assert min(picture.size) > 200
