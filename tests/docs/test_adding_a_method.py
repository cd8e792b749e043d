"""The worked example of docs/adding_a_method.md, put into a copy of the repository and run."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, TINY

from unimim.checkpoint.files import load_checkpoint

PAGE = (ROOT / "docs/adding_a_method.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# ([\w/]+\.py)\n")  # the first line of a block that belongs into a file
SMALL = ["depth=1", "embed_dim=32", "num_heads=2"]


@pytest.fixture(scope="module")
def changed(tmp_path_factory) -> Path:
    """A copy of the repository with the page's blocks in their files."""
    copy = tmp_path_factory.mktemp("changed")
    for file in ROOT.glob("*.py"):
        shutil.copy(file, copy)
    shutil.copytree(ROOT / "unimim", copy / "unimim")
    for kind, block in BLOCKS:
        named = FILE.match(block)
        if kind == "python" and named:
            put_into(copy / named[1], block[named.end() :])
    return copy


def put_into(file: Path, block: str) -> None:
    """Append a block to its file or write a new one; in a package's __init__ it replaces the
    statements that begin like its lines."""
    if not file.exists():
        file.write_text(block)
    elif file.name != "__init__.py":
        file.write_text(f"{file.read_text()}\n\n{block}")
    else:
        text = file.read_text()
        for node in ast.parse(block).body:
            statement = ast.get_source_segment(block, node)
            begin = re.match(r"from \S+ import |\w+:", statement)[0]
            text, count = re.subn(f"^{re.escape(begin)}.*$", statement, text, count=1, flags=re.M)
            assert count == 1, f"{file} has no line {begin!r}"
        file.write_text(text)


def run(copy: Path, *words: str) -> str:
    result = subprocess.run(
        [sys.executable, *words],
        cwd=copy, env={**os.environ, "PYTHONPATH": str(copy)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout
    return result.stdout


def test_the_example_is_short():
    blocks = [block for kind, block in BLOCKS if kind == "python"]
    lines = [[line for line in block.splitlines() if line.strip()] for block in blocks]
    assert lines[0][0] == "# modeling_targets.py" and len(lines[0]) - 1 <= 30
    assert 40 <= sum(map(len, lines)) <= 75


def test_the_class_takes_a_step(changed):
    tried = next(block for kind, block in BLOCKS if kind == "python" and not FILE.match(block))
    run(
        changed,
        "-c",
        f"import torch, modeling_pretrain\n{tried}\nassert method.mask_token.grad.any()",
    )
    help_text = run(changed, "run_pretraining.py", "--help")
    assert "--color_loss" in help_text and "contrast,color}" in help_text
    assert "| color |" in run(changed, "run_pretraining.py", "--list_space")


def test_its_target_goes_with_every_form_of_the_encoder(changed):
    """A CNN and MAE's decoder are trained to predict colors, under masks from noise."""
    step = """
import torch
import modeling_pretrain
from modeling_finetune import create_model
vit = dict(input_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2)
for name, options in (
    ("mae_tiny_patch16_224", vit), ("simmim_resnet18", dict(input_size=64, mask_layer=2)),
):
    method = create_model(name, target="color", mask_type="attention_low", **options)
    assert method.head_of_target.out_features == 3
    images = torch.randn(2, 3, *method.image_size)
    method({"image": images})["loss"].backward()
"""
    run(changed, "-c", step)


@pytest.mark.slow
def test_its_commands_train_and_fine_tune(changed):
    block = next(block for kind, block in BLOCKS if kind == "bash")
    for line in block.splitlines():
        words = shlex.split(line)[1:]
        at = words.index("--input_size")
        words[at : at + 4] = [*TINY, "--batch_size", "128", "--model_kwargs", *SMALL]
        printed = run(changed, *words)
    assert "100% of the encoder matched" in printed
    args = load_checkpoint(changed / "out/meancolor/checkpoint-1.pth")["args"]
    assert args["recipe"] == "meancolor_tiny_pretrain" and args["color_loss"] == "l1"
