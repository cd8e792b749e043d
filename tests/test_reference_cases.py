"""Runs every reference case below the folder REFERENCE_CASES (default: tests/reference_cases)
against this repository.

A case is `<kind>/<case>/case.json` + `tensors.safetensors`: numbers that a published
implementation produced. The adapter of its kind (tests/reference, one module a family of methods)
takes a `Case` and returns what this repository computes, under the names of the case's outputs;
`check` compares with the tolerances that the case states. A kind without an adapter fails.
"""

import os
from pathlib import Path

import pytest
from reference import (
    beit_maskfeat_semanticmim,
    conmim,
    evaluation,
    mae,
    pixio_nepa,
    semaim,
    semmae,
    simmim_a2mim,
)
from reference.case import OWN_CASES, Case, check, load

__all__ = ["ADAPTERS", "FOLDERS", "Case", "check", "load"]

CASES = Path(os.environ.get("REFERENCE_CASES", OWN_CASES))
FOLDERS = sorted(file.parent for file in CASES.glob("*/*/case.json"))
ADAPTERS = {
    **conmim.ADAPTERS,
    **mae.ADAPTERS,
    **pixio_nepa.ADAPTERS,
    **semmae.ADAPTERS,
    **semaim.ADAPTERS,
    **beit_maskfeat_semanticmim.ADAPTERS,
    **simmim_a2mim.ADAPTERS,
    **evaluation.ADAPTERS,
}


def test_there_are_cases():
    assert FOLDERS, f"no case.json below {CASES}"


@pytest.mark.parametrize(
    "folder", FOLDERS, ids=lambda folder: f"{folder.parent.name}/{folder.name}"
)
def test_reference_case(folder: Path):
    case, method = load(folder), folder.parent.name
    assert method in ADAPTERS, f"no adapter for {method}: the method of {folder} is not implemented"
    check(case, ADAPTERS[method](case))
