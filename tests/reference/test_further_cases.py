"""What further cases may state or leave out."""

import json
from pathlib import Path

import pytest
import test_reference_cases as runner
import torch
from safetensors.torch import save_file
from torch import Tensor

from reference.case import OWN_CASES, Case, check, load
from reference.simmim_a2mim import a2mim_head, focal_frequency_loss, resnet_key_map


def crafted(
    tmp_path: Path, source: str, config: dict, inputs: dict, outputs: dict[str, Tensor]
) -> Case:
    """The case `source` written and read again with other configuration, more inputs and no outputs
    but these."""
    case = load(OWN_CASES / source)
    kept = {name: value for name, value in case.tensors.items() if not name.startswith("outputs/")}
    given = {f"inputs/{name}": value for name, value in inputs.items()}
    expected = {f"outputs/{name}": value.contiguous() for name, value in outputs.items()}
    save_file(kept | given | expected, tmp_path / "tensors.safetensors")
    tolerances = {name: {"rtol": 1e-4, "atol": 1e-7} for name in outputs}
    (tmp_path / "case.json").write_text(
        json.dumps(case.spec | {"config": config, "outputs": tolerances})
    )
    return load(tmp_path)


def test_a_folder_without_an_adapter_fails(tmp_path):
    folder = tmp_path / "unheard_of" / "case"
    folder.mkdir(parents=True)
    crafted(folder, "mask_lambda_schedule/t800", {}, {}, {})
    with pytest.raises(AssertionError, match="no adapter for unheard_of"):
        runner.test_reference_case(folder)


@pytest.mark.parametrize(
    ("source", "backbone", "parameter"),
    [
        ("mae/normpix", {}, "decoder_pos_embed"),
        ("semaim/saim_share_weight", {}, "pos_embed"),
        ("a2mim_vit/l2_gamma", {"mask_token": "randn"}, "backbone.mask_token"),
        ("a2mim_vit/l2_gamma", {"mask_token": "mean"}, "backbone.mask_token"),
        ("a2mim_vit/l2_gamma", {"mask_token": "none"}, "backbone.mask_gamma"),
    ],
)
def test_no_gradient_is_one_of_zeros(tmp_path, source, backbone, parameter):
    original = load(OWN_CASES / source)
    config = original.config
    if backbone:
        config["backbone"] |= backbone
    zeros = torch.zeros_like(original.tensors[f"weights/{parameter}"])
    case = crafted(tmp_path, source, config, {}, {f"grad/{parameter}": zeros})
    computed = runner.ADAPTERS[source.partition("/")[0]](case)
    check(case, computed)
    case.tensors[f"outputs/grad/{parameter}"] += 1
    with pytest.raises(AssertionError, match=parameter):
        check(case, computed)


def weighted_spectrum(
    predicted: Tensor, target: Tensor, matrix: Tensor, ave_spectrum: bool
) -> tuple[Tensor, Tensor]:
    """Mean of weighted squared distances of whole complex spectra, and its gradient."""
    predicted = predicted.clone().requires_grad_()
    spectrum = torch.fft.fft2(predicted, norm="ortho") - torch.fft.fft2(target, norm="ortho")
    spectrum = spectrum.mean(0, keepdim=True) if ave_spectrum else spectrum
    loss = (matrix * spectrum.abs().square()).mean()
    loss.backward()
    return loss.detach(), predicted.grad


@pytest.mark.parametrize("stated", ["input", "option", "name", "numbers", "of one variant"])
def test_a_case_may_give_the_weights_of_frequencies(tmp_path, stated):
    """In any of the ways in which it can be stated; a variant that is given none has weights of its
    own."""
    source = "focal_frequency_loss/options_24"
    original, matrix = load(OWN_CASES / source), torch.rand(24, 24)
    variants = {name: original.config["variants"][name] for name in ("default", "no_ave")}
    option = {"option": True, "name": "inputs/matrix", "numbers": matrix.tolist()}.get(stated)
    if option:
        variants["no_ave"] |= {"matrix": option}
    inputs = {"of one variant": {"no_ave/matrix": matrix}, "numbers": {}}.get(
        stated, {"matrix": matrix}
    )
    pictures = original.inputs()["pred"], original.inputs()["target"]
    outputs = {}
    for name in variants:
        if name == "no_ave" or stated == "input":
            loss, grad = weighted_spectrum(*pictures, matrix, ave_spectrum=name == "default")
        else:
            loss, grad = (
                original.inputs("outputs/")[f"{name}/{key}"] for key in ("loss", "grad/pred")
            )
        outputs |= {f"{name}/loss": loss, f"{name}/grad/pred": grad}
    case = crafted(tmp_path, source, {"variants": variants}, inputs, outputs)
    check(case, focal_frequency_loss(case))


def test_a_heads_loss_takes_the_weights_of_frequencies(tmp_path):
    source = "a2mim_head/fft_focal_modes"
    original, matrix = load(OWN_CASES / source), torch.rand(3, 24, 24)
    head = original.config["variants"]["focal_target_w0p0"] | {"fft_unmask_weight": 1.0}
    inputs = original.inputs()
    loss, _ = weighted_spectrum(inputs["pred"], inputs["image"], matrix, ave_spectrum=True)
    case = crafted(
        tmp_path, source, {"variants": {"all": head}}, {"matrix": matrix}, {"all/loss_freq": loss}
    )
    check(case, a2mim_head(case))


@pytest.mark.parametrize(
    "left_out", [{"resnet50_full_shapes"}, {"resnet50_full_shapes", "resnet50_full_key_map"}]
)
def test_a_key_map_needs_no_list_of_shapes(tmp_path, left_out):
    source = "resnet_key_map/r18_tiny"
    original = load(OWN_CASES / source)
    config = {name: value for name, value in original.config.items() if name not in left_out}
    case = crafted(tmp_path, source, config, {}, original.inputs("outputs/"))
    check(case, resnet_key_map(case))
    if "resnet50_full_key_map" in config:
        config["resnet50_full_key_map"].popitem()
        with pytest.raises(AssertionError):
            resnet_key_map(crafted(tmp_path, source, config, {}, original.inputs("outputs/")))
