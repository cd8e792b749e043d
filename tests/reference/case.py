"""What a reference case is, how it is read, and how computed values are compared with it."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

OWN_CASES = Path(__file__).parent.parent / "reference_cases"


@dataclass
class Case:
    """The contents of a case's two files: `case.json` and its tensors, float16 ones as float32."""

    spec: dict
    tensors: dict[str, Tensor]

    @property
    def config(self) -> dict:
        return self.spec["config"]

    def inputs(self, prefix: str = "inputs/") -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}


def load(folder: Path) -> Case:
    tensors = load_file(folder / "tensors.safetensors")
    floats = {k: v.float() if v.dtype == torch.float16 else v for k, v in tensors.items()}
    return Case(json.loads((folder / "case.json").read_text()), floats)


def check(case: Case, computed: dict[str, Tensor]) -> None:
    """Every output that the case states must be there and agree."""
    for name, expected in case.inputs("outputs/").items():
        tolerance = case.spec["outputs"][name]
        actual = torch.as_tensor(computed[name]).detach()
        assert actual.shape == expected.shape, (
            f"{name}: shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
        )
        torch.testing.assert_close(
            actual.double(),
            expected.double(),
            rtol=tolerance["rtol"],
            atol=tolerance["atol"],
            msg=lambda text, name=name: f"{name}: {text}",
        )
