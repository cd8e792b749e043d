"""The space mask x encoder form x target: every cell trains a step or refuses in one sentence."""

import json
import math
import re
import shutil
import traceback
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from helpers import (
    DECODER,
    METHODS,
    SIZE,
    TOKENIZER,
    WITH_TOKENIZER,
    arguments,
    average_weights,
    column,
    differing,
    imagenet_stand_in,
    in_ranks,
    start,
    train_steps,
    whole_weights,
)
from torch import Tensor

from masking_generator import MASKS
from modeling_finetune import create_model, entry_of
from modeling_targets import TARGETS, Pixels, Shape
from optim_factory import param_groups
from scripts.benchmarks.benchmark import random_batch
from unimim.cli.models import build_method
from unimim.cli.options import parse
from unimim.cli.space import forms, table
from unimim.engine.setup import start_training
from unimim.engine.state import Training
from unimim.errors import OptionError
from unimim.recipes import neighbors

CPU = torch.device("cpu")
VIT = {"input_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
NARROW = {"decoder_embed_dim": 24, "decoder_depth": 2, "decoder_num_heads": 2}
CNN = {"input_size": 64, "channels": [8, 8, 16, 16], "mask_layer": 2}
NETWORKS = {  # a tiny network of each form, and CNNs and Swin beside the ViT's
    "mae": ("mae_tiny_patch16_224", VIT | NARROW),
    "mae_bottleneck": ("mae_tiny_patch16_224", VIT | NARROW | {"use_bottleneck": True}),
    "pixio": ("pixio_tiny_patch16_256", VIT | NARROW | {"num_cls_tokens": 2, "mask_grid": 2}),
    "beit": ("beit_tiny_patch16_224_8k_vocab", VIT),
    "semanticmim": ("semanticmim_maskfeat_tiny_patch16_224", VIT | {"num_cls_tokens": 3}),
    "semaim": ("semaim_tiny_patch16_224", VIT | {"query_depth": 2}),
    "simmim_vit": ("simmim_vit_tiny_patch16_224", VIT),
    "simmim_resnet": ("simmim_resnet18", CNN),
    "a2mim": ("a2mim_vit_tiny_patch16_224", VIT),
    "simmim_swin": (
        "simmim_swin_tiny",
        {"input_size": 64, "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1]},
    ),
}
TARGET_OPTIONS = {
    "tokens": {"vocab_size": 64},
    "contrast": {"projector_hidden_dim": 16, "projector_out_dim": 8},
}
Cell = tuple[str, str, str]  # network, mask, target


def form_of(network: str) -> type:
    return entry_of(NETWORKS[network][0]).classes[0]


def cells(*, refused: bool) -> list[Cell]:
    """Return the cells that run, or those that are refused: each of the table once, the networks
    of a form taking turns."""
    found = []
    for form in forms():
        networks = [name for name in NETWORKS if form_of(name).form_name == form]
        for i, mask in enumerate(MASKS):
            for j, target in enumerate(TARGETS):
                network = networks[(i + j) % len(networks)]
                if bool(form_of(network).refusal(mask, target)) is refused:
                    found.append((network, mask, target))
    return found


@pytest.fixture(scope="module")
def teachers(tmp_path_factory) -> dict[str, str]:
    """Files of tiny frozen networks, CLIP's form and DINO's."""
    folder = tmp_path_factory.mktemp("teachers")
    files = {}
    for kind in ("clip", "dino"):
        torch.manual_seed(0)
        vit = timm.models.VisionTransformer(
            img_size=32, patch_size=4, embed_dim=64, depth=1, num_heads=1, num_classes=0,
            pre_norm=kind == "clip",
        )  # fmt: skip
        files[kind] = str(folder / f"{kind}.pth")
        torch.save(vit.state_dict(), files[kind])
    return files


def build(network: str, mask: str, target: str, teachers: dict[str, str], **more):
    name, options = NETWORKS[network]
    options = options | TARGET_OPTIONS.get(target, {}) | {"mask_ratio": 0.5}
    if target in teachers:
        options["target_model"] = teachers[target]
    torch.manual_seed(0)
    return create_model(name, mask_type=mask, target=target, **options | more)


def batch_for(method, mask: str = "random") -> dict[str, Tensor]:
    """A batch of the method's views, under `block` with more hidden patches in one image."""
    torch.manual_seed(1)
    batch = random_batch(method, 4, CPU, 0.5)
    if mask == "block" and "mask" in batch:
        batch["mask"][0, 0] = True
        counts = batch["mask"].flatten(1).sum(1)
        batch["mask_counts"] = int(counts.min()), int(counts.max())
        batch["max_masked"] = batch["mask_counts"][1]
    return batch


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("target", TARGETS)
def test_every_cell_trains_a_step_or_refuses(network, target, teachers):
    for mask in MASKS:
        refusal = form_of(network).refusal(mask, target)
        if refusal:
            with pytest.raises(OptionError, match=f"^mask_type={mask} hides"):
                build(network, mask, target, teachers)
            continue
        method = build(network, mask, target, teachers)
        out = method(batch_for(method, mask))
        assert out["loss"].isfinite() and out["loss"].dtype == torch.float32, mask
        out["loss"].backward()
        without = [
            name
            for name, parameter in method.named_parameters()
            if parameter.requires_grad and parameter.grad is None
        ]
        assert without == [], (mask, without)
        before = None if method.ema is None else method.teacher.state_dict()
        before = before and {name: value.clone() for name, value in before.items()}
        torch.optim.SGD(method.parameters(), lr=0.1).step()
        method.after_step(0.5)
        if before is not None:
            assert any(
                not torch.equal(before[k], v) for k, v in method.teacher.state_dict().items()
            )


@pytest.mark.parametrize("mask", [mask for mask in MASKS if mask != "none"])
@pytest.mark.parametrize("network", ["mae", "beit", "simmim_resnet"])
def test_as_many_patches_are_hidden_as_the_method_asks_for(network, mask, teachers):
    if mask == "block":
        return
    method = build(network, mask, "pixels", teachers)
    batch = batch_for(method)
    hidden = method.hide(batch)["mask"] if network != "mae" else None
    count = math.prod(method.cell_grid)
    if network == "mae":
        order, visible = method.visible_first(batch)
        assert visible == count // 2 and order.sort(1).values.equal(
            torch.arange(count).expand(4, -1)
        )
    else:
        assert hidden.shape[1:] == method.cell_grid
        assert hidden.flatten(1).sum(1).eq(count // 2).all()


@pytest.mark.parametrize("network", ["beit", "mae", "simmim_resnet"])
def test_attention_is_hidden_from_the_highest_or_the_lowest(network, teachers):
    """Without noise exactly; the noise of the batch decides in between, and nothing else does."""
    hidden = {}
    for kind in ("attention_high", "attention_low"):
        for teacher in (None, teachers["dino"]):
            own = {} if teacher is None else {"mask_teacher": teacher}
            method = build(network, kind, "hog", teachers, attention_noise=0.0, **own)
            assert (method.ema is None) == (teacher is not None)
            batch = batch_for(method)
            attention = method.attention_to_patches(batch)
            order, visible = method.visible_first(batch)
            hidden = attention.gather(1, order[:, visible:])
            seen = attention.gather(1, order[:, :visible])
            if kind == "attention_high":
                assert (hidden.min(1).values >= seen.max(1).values - 1e-6).all()
            else:
                assert (hidden.max(1).values <= seen.min(1).values + 1e-6).all()
    noisy = build(network, "attention_high", "hog", teachers, attention_noise=1e6)
    noise = torch.rand(4, noisy.noise_size)
    order, _ = noisy.visible_first(batch_for(noisy), noise)
    assert torch.equal(order, noise.argsort(1))


def test_semmae_is_mae_with_masks_from_parts():
    options = VIT | NARROW | {"num_parts": 3, "norm_pix_loss": True}
    methods = []
    for name, more in (("semmae", {}), ("mae", {"mask_type": "parts"})):
        torch.manual_seed(0)
        methods.append(create_model(f"{name}_tiny_patch16_224", **options, **more))
    semmae, mae = methods
    assert semmae.views == mae.views and semmae.noise_size == mae.noise_size
    batch = batch_for(semmae)
    for method in methods:
        method.before_epoch(1, 4)
    theirs, ours = semmae(batch), mae(batch)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for out in (ours, theirs):
        out["loss"].backward()
    for (name, a), b in zip(semmae.named_parameters(), mae.parameters(), strict=True):
        assert (a.grad is None and b.grad is None) or torch.equal(a.grad, b.grad), name


def test_beit_with_contrast_is_conmim():
    methods = []
    options = VIT | TARGET_OPTIONS["contrast"]
    for name, more in (("conmim_tiny_patch16_224", {}),
                       ("beit_tiny_patch16_224_8k_vocab", {"target": "contrast"})):  # fmt: skip
        torch.manual_seed(0)
        methods.append(create_model(name, **options, **more))
    batch = batch_for(methods[0])
    losses = [method(batch)["loss"] for method in methods]
    assert torch.equal(*losses)
    assert methods[1].encoder_state_dict().keys() == methods[0].encoder_state_dict().keys()
    assert not any("projectors" in name for name in methods[1].encoder_state_dict())


def test_a_copy_of_a_cnn_has_a_mask_token_of_its_own(teachers):
    """The ema sees whole images, whatever its student was shown last."""
    method = build("simmim_resnet", "random", "ema", teachers)
    images = torch.randn(4, 3, 64, 64)
    before = method.teacher.whole(images)
    method.features(images, torch.ones(4, *method.cell_grid, dtype=torch.bool))
    torch.testing.assert_close(method.teacher.whole(images), before)


def test_the_bottleneck_of_a_decoder_lets_the_class_token_through_only(teachers):
    for bottleneck in (True, False):
        method = build("mae", "random", "pixels", teachers, use_bottleneck=bottleneck)
        latent = torch.randn(2, 9, 32)
        order = torch.rand(2, 16).argsort(1)
        changed = torch.cat((latent[:, :1], torch.randn(2, 8, 32)), 1)
        outputs = [method.forward_decoder(x, order, 8) for x in (latent, changed)]
        assert outputs[0].shape == (2, 8, 48)
        assert torch.equal(*outputs) is bottleneck


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("network", ["mae", "beit", "semanticmim", "semaim", "simmim_vit", "a2mim"])
def test_spectra_of_any_pixels(network, normalized, teachers):
    mask = "none" if network == "semaim" else "random"
    options = {"norm_pix_loss": normalized}
    plain, both = (
        build(network, mask, "pixels", teachers, fft_weight=weight, **options)
        for weight in (0.0, 0.5)
    )
    batch = batch_for(plain)
    ours, theirs = both(batch), plain(batch)
    expected = theirs["loss"] + 0.5 * ours["loss_freq"]
    torch.testing.assert_close(ours["loss"], expected)
    assert ours["loss_freq"] > 0


def test_spectra_are_those_of_the_error_where_patches_are_predicted():
    """Against the transform of the image of errors, made patch by patch."""
    target = Pixels(Shape((2, 2), (4, 4), 8), fft_weight=1.0)
    images, tokens = torch.randn(3, 3, 8, 8), torch.randn(3, 2, 48)
    positions = torch.tensor([[0, 3], [1, 2], [3, 1]])
    counts = torch.tensor([[True, True], [True, False], [True, True]])
    wanted = target.of({"image": images}, positions)
    out = target.score(torch.nn.Identity(), tokens, wanted, positions, counts)
    error = torch.zeros(3, 3, 8, 8)
    for image in range(3):
        for place, shown, counted in zip(
            positions[image].tolist(), (tokens - wanted)[image], counts[image], strict=True
        ):
            top, left = 4 * (place // 2), 4 * (place % 2)
            if counted:
                error[image, :, top : top + 4, left : left + 4] = shown.view(4, 4, 3).permute(
                    2, 0, 1
                )
    spectrum = torch.fft.fft2(error.mean(0), norm="ortho").abs()
    weights = spectrum.log1p() / spectrum.log1p().max()
    torch.testing.assert_close(out["loss_freq"], (weights * spectrum.square()).mean())


def test_a_cnn_can_predict_pixels_under_another_loss_than_simmims(teachers):
    method = build("simmim_resnet", "random", "pixels", teachers, loss_type="L2")
    batch = batch_for(method)
    predicted = method.pixel_head(method.neck(method.features(batch["image"], batch["mask"])))
    errors = (predicted - method.target.of(batch)).square().mean(-1)
    torch.testing.assert_close(method(batch)["loss"], errors[batch["mask"].flatten(1)].mean())


@pytest.mark.parametrize("kept", [False, True])
def test_the_ema_of_semaims_target_has_the_momentum_of_the_target_unless_it_is_kept(kept, teachers):
    options = {"t_momentum": 0.0, "use_ema_model": kept}
    method = build("semaim", "none", "contrast", teachers, **options)
    with torch.no_grad():
        method.cls_token += 1
    method.after_step(0.0)
    assert torch.equal(method.teacher.cls_token, method.cls_token) is not kept


# --------------------------------------------------------------------------------------------------
# The command line


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            "--model semanticmim_maskfeat_tiny_patch16_224 --mask_type block",
            r"^--mask_type block hides more patches .* this --model cannot take; use random",
        ),
        (
            "--model semaim_tiny_patch16_224 --mask_type parts",
            r"^--mask_type parts hides patches, but this --model .*; use --permutation_type$",
        ),
        (
            "--model mae_tiny_patch16_224 --mask_type none",
            r"^--mask_type none hides nothing, but this --model predicts what is hidden",
        ),
        (
            "--model mae_tiny_patch16_224 --target hog --fft_weight 0.1",
            r"^--fft_weight 0.1 compares the spectra of pixels; use --target pixels$",
        ),
        (
            "--model mae_tiny_patch16_224 --temp 0.2",
            r"^--temp 0.2 is not an option of --target pixels, but of contrast$",
        ),
        (
            "--model mae_tiny_patch16_224 --num_parts 3",
            r"^--num_parts 3 is not an option of --mask_type random, but of parts$",
        ),
        (
            "--model beit_tiny_patch16_224_8k_vocab --target clip",
            r"^--target clip needs --target_model",
        ),
    ],
)
def test_what_does_not_go_together_is_said_in_one_sentence(flags, said):
    with pytest.raises(ValueError, match=said) as error:
        build_method(parse("pretrain", flags.split()))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("cell", cells(refused=True), ids="-".join)
def test_a_refused_cell_says_so_in_a_sentence_that_names_two_flags(cell, teachers, tmp_path):
    args = arguments("pretrain", tmp_path, *flags_of(cell, teachers))
    with pytest.raises(ValueError, match=rf"^--mask_type {cell[1]} hides ") as error:
        build_method(args)
    assert len(set(re.findall(r"--\w+", str(error.value)))) >= 2
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            "--target clip --target_model {dino}",
            r"^--target_model \S+ is not of the kind that --target clip needs; use --target dino$",
        ),
        (
            "--target dino --target_model {clip}",
            r"^--target_model \S+ is not of the kind that --target dino needs; use --target clip$",
        ),
        (
            "--mask_type attention_low --mask_teacher no.pth",
            r"^--mask_teacher no.pth is neither a file nor the name of a model of timm$",
        ),
    ],
)
def test_a_wrong_frozen_network_is_refused_by_the_flag_that_names_it(flags, said, teachers):
    command = f"--model mae_tiny_patch16_224 {flags.format(**teachers)}"
    with pytest.raises(ValueError, match=said):
        build_method(parse("pretrain", command.split()))


def test_flags_reach_target_and_mask(tmp_path):
    flags = "--target contrast --temp 0.2 --mask_type parts --num_parts 3 --part_source random"
    own = [
        *METHODS["mae"],
        *flags.split(),
        "--model_kwargs",
        *SIZE,
        *DECODER,
        "projector_hidden_dim=8",
    ]
    args = arguments("pretrain", tmp_path, *own)
    method = build_method(args)
    assert (method.target.temperature, method.masking.num_parts) == (0.2, 3)
    assert method.views == ("image", "image_strong", "part_ids", "noise")


def test_the_model_chooses_the_mask_unless_the_flag_does():
    for model, mask in (
        ("mae_tiny_patch16_224", "random"),
        ("semmae_tiny_patch16_224", "parts"),
        ("beit_large_patch16_224_8k_vocab", "block"),
        ("semanticmim_maskfeat_large_patch16_224", "random"),
        ("maskfeat_base_patch16_224", "random_mps32"),
        ("semaim_tiny_patch16_224", "none"),
    ):
        assert parse("pretrain", ["--model", model]).mask_type == mask, model


def test_the_table_is_the_pages():
    page = (Path(__file__).parents[2] / "docs/methods/space.md").read_text()
    assert table().strip() in page, "write the table of run_pretraining.py --list_space there"
    for form, cls in forms().items():
        for mask in cls.masks:
            refused = bool(cls.refusal(mask, "pixels"))
            line = f"| {form} | {mask} |"
            assert refused or line in table()


def test_neighbors_say_what_they_are_after():
    page = (Path(__file__).parents[2] / "docs/methods/space.md").read_text()
    for recipe in neighbors.RECIPES:
        said = r"Ours, after .*arXiv \d{4}\.\d{5}.*; not checked against its code\. "
        assert re.match(said, recipe.note), recipe.name
        assert f"`{recipe.name}`" in page


# --------------------------------------------------------------------------------------------------
# Engines


def flags_of(cell: Cell, teachers: dict[str, str]) -> list[str]:
    """Return the command line of a cell; what is attended to least is that of a frozen network."""
    network, mask, target = cell
    model, options = NETWORKS[network]
    options = {"patch_size": None} | options | TARGET_OPTIONS.get(target, {})
    flags = ["--model", model, "--input_size", str(options.pop("input_size"))]
    flags += ["--mask_type", mask, "--target", target]
    if target == "tokens":
        flags += ["--discrete_vae_weight_path", str(TOKENIZER)]
    if target in teachers:
        flags += ["--target_model", teachers[target]]
    if mask == "parts":
        flags += ["--part_source", "random", "--num_parts", "3"]
    if mask == "attention_low":
        flags += ["--mask_teacher", teachers["dino"]]
    return [*flags, "--model_kwargs", *(f"{name}={json.dumps(v)}" for name, v in options.items())]


def begun_again(run: Training, **flags) -> Training:
    """Return the run as it starts from its folder, with some flags changed."""
    args = Namespace(**vars(run.args) | flags)
    method = build_method(args)
    context = replace(run.context, args=args)
    groups = param_groups(method, args.weight_decay)
    return start_training(context, method, run.loader, groups)[0]


def train_and_resume_cell(folder: Path, flags: list[str]) -> str:
    """Train a cell under ZeRO 2, under plain torch, and from a checkpoint; return what is wrong."""
    zero_2, position = start("pretrain", folder, *flags, *ENGINES["zero2"])
    torch_only = begun_again(zero_2, enable_deepspeed=False)
    losses = column(train_steps(zero_2, 0, 1), "loss")
    position.step = 1
    zero_2.session.save(position, finished=False)
    losses += column(train_steps(zero_2, 1, 2), "loss")
    resumed = begun_again(zero_2)
    again = column(train_steps(resumed, 1, 2), "loss")
    states = [(whole_weights(run), average_weights(run)) for run in (zero_2, resumed)]
    wrong = [f"{name} differs after a resume" for name in differing(*states)]
    if again != losses[1:]:
        wrong.append(f"the second loss is {losses[1]}, after a resume {again[0]}")
    plain = column(train_steps(torch_only, 0, 2), "loss")
    if plain != pytest.approx(losses, rel=1e-4):
        wrong.append(f"the losses are {losses}, under plain torch {plain}")
    if not all(map(math.isfinite, losses)):
        wrong.append(f"the losses are {losses}")
    return "\n".join(wrong)


def train_and_resume_cells(folder: Path, commands: dict[Cell, list[str]]) -> dict[Cell, str]:
    """Return what is wrong with each cell, an error included: the others are tried all the same."""
    images = folder / "images"
    imagenet_stand_in(images)
    data = ["--data_set", "IMNET", "--data_path", str(images)]
    wrong = {}
    for cell, flags in commands.items():
        own = folder / "-".join(cell)
        try:
            wrong[cell] = train_and_resume_cell(own, [*data, *flags])
        except Exception:
            wrong[cell] = traceback.format_exc()
        shutil.rmtree(own, ignore_errors=True)
    return wrong


@pytest.fixture(scope="module")
def wrong_of_cells(request, teachers, tmp_path_factory) -> dict[Cell, str]:
    """What is wrong with each of the chosen cells, which go through one process."""
    chosen = [
        item.callspec.params["cell"]
        for item in request.session.items
        if request.fixturename in item.fixturenames
    ]
    commands = {cell: flags_of(cell, teachers) for cell in chosen}
    return in_ranks(1, train_and_resume_cells, tmp_path_factory.mktemp("cells"), commands)[0]


@pytest.mark.slow
@pytest.mark.parametrize("cell", cells(refused=False), ids="-".join)
def test_every_cell_trains_under_both_engines_and_resumes(cell, wrong_of_cells):
    if wrong := wrong_of_cells[cell]:
        pytest.fail(wrong, pytrace=False)


PARTS = "--mask_type parts --part_source random"
CELLS = {  # flags over those of PRETRAIN; one of each form, mask made here, and target
    "mae_hog": (*METHODS["mae"], "--target", "hog", "--mask_type", "attention_high"),
    "mae_contrast": (
        *METHODS["mae"], *f"--target contrast {PARTS} --model_kwargs".split(), *SIZE, *DECODER,
        "projector_hidden_dim=16", "projector_out_dim=8",
    ),
    "beit_ema": (*METHODS["beit"], "--target", "ema", "--mask_type", "attention_low"),
    "semanticmim_pixels": (
        *METHODS["semanticmim_maskfeat"], *f"--target pixels --fft_weight 0.1 {PARTS}".split(),
    ),
    "simmim_contrast": (
        *METHODS["a2mim_resnet"],
        *["--target", "contrast", "--mask_type", "attention_high"],
        *["--model_kwargs", "patch_size=null"],
        "channels=[8,8,16,16]", "projector_hidden_dim=16", "projector_out_dim=8",
    ),
    "semaim_tokens": (
        *METHODS["semaim"], *f"--target tokens {WITH_TOKENIZER} --model_kwargs".split(), *SIZE,
        "query_depth=2", "vocab_size=64",
    ),
}  # fmt: skip
ENGINES = {"torch": (), "zero2": ("--enable_deepspeed", "--zero_stage", "2")}


def train_and_resume(folder: Path) -> dict[str, dict]:
    """Four steps of each cell under both engines, and the last two again from a checkpoint."""
    found = {}
    for cell, flags in CELLS.items():
        for engine, own in ENGINES.items():
            run, position = start("pretrain", folder / cell / engine, *flags, *own)
            losses = column(train_steps(run, 0, 2), "loss")
            position.step = 2
            run.session.save(position, finished=False)
            losses += column(train_steps(run, 2, 4), "loss")
            resumed, _ = start("pretrain", folder / cell / engine, *flags, *own)
            again = column(train_steps(resumed, 2, 4), "loss")
            states = [(whole_weights(each), average_weights(each)) for each in (run, resumed)]
            found[f"{cell} {engine}"] = {
                "losses": losses,
                "again": again,
                "differing": differing(*states),
            }
    return found


@pytest.mark.slow
def test_cells_train_and_resume_on_two_ranks_under_plain_torch_and_zero_2(tmp_path):
    for rank, found in enumerate(in_ranks(2, train_and_resume, tmp_path)):
        for cell in CELLS:
            runs = [found[f"{cell} {engine}"] for engine in ENGINES]
            for run in runs:
                assert run["again"] == run["losses"][2:], cell
                # a checkpoint has the running batch statistics of the first rank
                assert rank or run["differing"] == [], cell
            assert runs[1]["losses"] == pytest.approx(runs[0]["losses"], rel=1e-3), cell
