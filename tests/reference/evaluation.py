"""Adapters of the cases of k-NN, linear probing and analyses."""

import math
from argparse import Namespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from analysis import fourier, interaction
from optim_factory import LARS, create_optimizer
from reference.case import Case
from reference.common import load_weights
from semantic_segmentation.voc_linear_probe import class_iou, confusion_matrix
from unimim.evaluation.features import Features
from unimim.evaluation.knn import evaluate_knn
from unimim.evaluation.linear_probe import LinearHead, head_groups


def knn(case: Case) -> dict[str, Tensor]:
    config, inputs = case.config, case.inputs()
    bank, queries = (
        Features(inputs[f"{name}_features"], inputs[f"{name}_labels"]) for name in ("train", "test")
    )
    found = evaluate_knn(bank, queries, config["k"], config["temperature"], config["num_classes"])
    shape = len(config["k"]), len(config["temperature"])
    tables = {
        top: torch.tensor([getattr(f, f"acc{top}") for f in found], dtype=torch.float64)
        for top in (1, 5)
    }
    return {f"top{top}": table.view(shape) for top, table in tables.items()}


def probe_optimizer(config: dict, groups: list[dict]) -> torch.optim.Optimizer:
    """`sgd` is plain momentum upstream."""
    name = {"sgd": "momentum"}.get(config["optimizer"], config["optimizer"])
    args = Namespace(opt=name, lr=config["lr"], momentum=0.9, opt_eps=None, opt_betas=None)
    return create_optimizer(args, groups, "cpu")


def linprobe_head(case: Case) -> dict[str, Tensor]:
    config, inputs = case.config, case.inputs()
    head = LinearHead(config["embed_dim"], config["num_classes"])
    weights = {name.removeprefix("head."): value for name, value in case.inputs("weights/").items()}
    load_weights(head, weights)
    optimizer = probe_optimizer(config, head_groups([head], [config["lr"]], config["weight_decay"]))
    losses = []
    for features, labels in zip(inputs["features"], inputs["labels"], strict=True):
        losses.append(F.cross_entropy(head(features), labels))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    logits = head.eval()(inputs["features"][0])
    final = {f"final/{name}": value for name, value in head.state_dict().items()}
    return {"losses": torch.stack(losses), "eval_logits": logits} | final


def lars(case: Case) -> dict[str, Tensor]:
    """Two families state the same rule with other names for parameters, gradients and results."""
    config, inputs = case.config, case.inputs()
    prefix = "param_" if any(name.startswith("param_") for name in inputs) else ""
    first = {
        name.removeprefix(prefix): value
        for name, value in inputs.items()
        if not name.startswith("grad")
    }
    parameters = {name: nn.Parameter(value.clone()) for name, value in first.items()}
    names = ("lr", "weight_decay", "momentum", "trust_coefficient")
    optimizer = LARS(parameters.values(), **{name: config[name] for name in names})
    computed = {}
    seen = len({name.partition("_")[0] for name in inputs if name.startswith("grad")})
    for step in range(config.get("steps", seen)):
        for name, parameter in parameters.items():
            parameter.grad = inputs.get(f"grad{step}_{name}")
        optimizer.step()
        for name, parameter in parameters.items():
            computed[f"step{step}_{name}"] = computed[f"param_{name}_after{step + 1}"] = (
                parameter.detach().clone()
            )
    return computed | {
        f"momentum_{name}": optimizer.state[p]["momentum_buffer"] for name, p in parameters.items()
    }


def voc_miou(case: Case) -> dict[str, Tensor]:
    config, inputs = case.config, case.inputs()
    batches = zip(
        *(inputs[name].chunk(config["num_updates"]) for name in ("label", "pred")), strict=True
    )
    confusion = sum(confusion_matrix(*batch, config["num_classes"]) for batch in batches)
    iou = class_iou(confusion)
    return {"miou": iou.mean(), "confusion": confusion, "class_iou": iou}


def fourier_analysis(case: Case) -> dict[str, Tensor]:
    """Tokens [B, N, C] are of a square grid."""
    latents = [case.inputs()[f"latent{k}"] for k in range(len(case.inputs()))]
    maps = [
        x if x.ndim == 4 else x.transpose(1, 2).unflatten(2, (math.isqrt(x.shape[1]), -1))
        for x in latents
    ]
    curves = {
        f"rel_log_amp{k}": fourier.relative(fourier.log_amplitudes(x)) for k, x in enumerate(maps)
    }
    return curves | {"variance": torch.stack([fourier.spatial_variance(x) for x in maps])}


def multi_order_interaction(case: Case) -> dict[str, Tensor]:
    """All rewards of every ratio, those of the same order too; without contexts in the case they
    are empty."""
    config, inputs = case.config, case.inputs()
    shape = (config["pairs_number"], config["samples_number_of_s"], 0)
    found: dict[str, list[Tensor]] = {}
    computed = {}
    for ratio in config["ratios"]:
        percent = round(100 * ratio)
        contexts = inputs.get(
            f"context_{percent}", torch.zeros(len(inputs["image"]), *shape)
        ).long()
        assert contexts.shape[-1] == interaction.order_of(ratio, config["grid_size"] ** 2)
        logits = torch.stack(
            [quadratic_logits(case, k, contexts[k]) for k in range(len(contexts))]
        )  # [I, P, S, 4, K]
        computed[f"logits_{percent}"] = logits.flatten(1, 3)[:, :8]
        for kind in interaction.REWARDS:
            values = [
                interaction.reward(logits[k], int(label), kind)
                for k, label in enumerate(inputs["label"])
            ]
            found.setdefault(kind, []).append(interaction.second_difference(torch.stack(values)))
    for kind, of_ratios in found.items():
        computed[f"interaction_{kind}"] = torch.stack(of_ratios)
        strengths = computed[f"interaction_{kind}"].mean(-1).abs().mean((1, 2))
        computed[f"J_{kind}"] = interaction.normalized(strengths)
    return computed


def quadratic_logits(case: Case, number: int, contexts: Tensor) -> Tensor:
    """Of the case's model, which sees means of cells, on one image with contexts [P, S, m]: [P, S,
    4, classes]."""
    config, weights = case.config, case.inputs("weights/")
    grid, image = config["grid_size"], case.inputs()["image"][number]

    def model(images: Tensor) -> Tensor:
        cells = F.avg_pool2d(images, images.shape[-1] // grid).flatten(1)  # [K, c * g * g]
        quadratic = torch.einsum("bi,kij,bj->bk", cells, weights["Q"], cells)
        ranks = torch.arange(config["num_classes"])
        return cells @ weights["W"].T + quadratic + 0.3 * ranks * cells.sum(1, keepdim=True).tanh()

    present = interaction.coalitions(case.inputs()["pairs"][number].long(), contexts, grid**2)
    return interaction.masked_logits(model, image, present.flatten(0, 2), 7).unflatten(
        0, present.shape[:3]
    )


# the folder of cases: its adapter
ADAPTERS = {
    "knn": knn,
    "linprobe_head": linprobe_head,
    "lars": lars,
    "mae_lars": lars,
    "voc_miou": voc_miou,
    "fourier_analysis": fourier_analysis,
    "interaction": multi_order_interaction,
}
