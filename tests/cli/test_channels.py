"""--mean, --std, --in_chans and --freeze_blocks; statistics of checkpoints that are evaluated."""

import math
from pathlib import Path

import pytest
import torch
from helpers import FINETUNE, METHODS, PRETRAIN, TINY, own_signals, start, train_steps

import run_class_finetuning
from modeling_finetune import create_model
from optim_factory import freeze_blocks, param_groups
from unimim.checkpoint.files import load_checkpoint, save_checkpoint
from unimim.checkpoint.loading import load_pretrained
from unimim.cli.models import build_method
from unimim.cli.options import parse
from unimim.data.views import MEAN_STD, image_mean_std
from unimim.engine.state import Normalize
from unimim.evaluation.features import warn_of_other_mean_std
from unimim.evaluation.flags import parse_knn

CPU = torch.device("cpu")
VIT = {"embed_dim": 32, "depth": 3, "num_heads": 2, "input_size": 16, "patch_size": 4}


def mean_std(*flags: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return image_mean_std(parse("finetune", [*FINETUNE, *flags]))


def test_mean_and_std_of_the_flags() -> None:
    own = ["--mean", "0.1", "0.2", "0.3", "--std", "0.4", "0.5", "0.6"]
    assert mean_std(*own) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert mean_std(*own[:4]) == ((0.1, 0.2, 0.3), MEAN_STD["imagenet"][1])
    mean, std = mean_std("--in_chans", "1")
    assert mean == pytest.approx((0.45888,), abs=1e-4) and len(std) == 1
    assert mean_std("--in_chans", "1", "--mean", "0.5", "--std", "0.25") == ((0.5,), (0.25,))
    with pytest.raises(ValueError, match="--mean has 1 values, --in_chans is 3"):
        mean_std("--mean", "0.5")
    assert mean_std("--in_chans", "4", "--no_imagenet_default_mean_and_std")[0] == (0.5,) * 4
    with pytest.raises(ValueError, match="--in_chans 4: ImageNet's --mean is that of RGB; give 4"):
        mean_std("--in_chans", "4", "--imagenet_default_mean_and_std")
    with pytest.raises(ValueError, match="use --in_chans 1"):
        build_method(parse("pretrain", [*PRETRAIN, "--model_kwargs", "in_chans=1"]))


def test_gray_images_are_the_luminance_of_colors() -> None:
    images = torch.randint(256, (2, 3, 4, 4), dtype=torch.uint8)
    gray = Normalize(((0.5,), (0.25,)), CPU)({"image": images})["image"]
    red, green, blue = images.double().unbind(1)
    expected = ((0.299 * red + 0.587 * green + 0.114 * blue) / 255 - 0.5) / 0.25
    assert gray.shape == (2, 1, 4, 4)
    torch.testing.assert_close(gray[:, 0].double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("model", "options"),
    [("vit_tiny_patch16_224", VIT), ("beit_tiny_patch16_224", VIT),
     ("resnet18", {"input_size": 32}), ("convnext_tiny", {"input_size": 32})],
)  # fmt: skip
@pytest.mark.parametrize("channels", [1, 4])
def test_weights_of_colors_load_into_other_channels(model, options, channels, capfd, caplog):
    torch.manual_seed(0)
    whole = create_model(model, **options, num_classes=3).eval()
    other = create_model(model, **options, num_classes=3, in_chans=channels).eval()
    with caplog.at_level("INFO", logger="unimim"):
        report = load_pretrained(other, {"model": whole.state_dict()})
    assert len(report.rechanneled) == 1 and "rechanneled" in str(report)
    way = "summed for 1" if channels == 1 else "repeated, times 3 / the number of channels for 4"
    assert way in caplog.text
    # an image whose colors are equal looks the same to both
    side = options["input_size"]
    gray = torch.randn(1, 1, side, side)
    if channels == 1:
        torch.testing.assert_close(other(gray), whole(gray.expand(-1, 3, -1, -1)))
    assert other(gray.expand(-1, channels, -1, -1)).shape == (1, 3)


@pytest.mark.parametrize(
    "name", ["conmim", "mae", "semmae", "semaim", "a2mim_vit", "a2mim_resnet", "maskfeat"]
)
def test_methods_pretrain_on_gray_images(name: str, tmp_path: Path) -> None:
    flags = [*METHODS.get(name, ()), "--in_chans", "1", "--epochs", "1"]
    if name == "semaim":
        flags += ["--gaussian_kernel_size", "3", "--gaussian_sigma", "1"]
    run, _ = start("pretrain", tmp_path, *flags)
    (metrics,) = train_steps(run, 0, 1)
    assert math.isfinite(metrics["loss"])
    first = next(p for p in run.task.parameters() if p.ndim == 4)
    assert first.shape[1] == 1


def test_encoder_of_gray_images_is_built_by_timm(tmp_path: Path) -> None:
    method = build_method(parse("pretrain", [*PRETRAIN, *METHODS["mae"], "--in_chans", "1"]))
    assert method.timm_arguments(method.encoder_state_dict())["in_chans"] == 1


# --------------------------------------------------------------------------------------------------
# Partial fine-tuning


def trained_of(model: torch.nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_last_blocks_norm_and_head_are_trained() -> None:
    """MAE, section 5: the last blocks are fine-tuned while the others are frozen."""
    model = create_model("vit_tiny_patch16_224", **VIT, num_classes=3, drop_path=0.5)
    freeze_blocks(model, 2)
    assert {name.split(".")[0] for name in trained_of(model)} == {"blocks", "fc_norm", "head"}
    assert all(name.startswith("blocks.2.") for name in trained_of(model) if "blocks" in name)
    assert [block.drop_path.drop_prob for block in model.blocks] == [0.0, 0.0, 0.5]
    grouped = [p for group in param_groups(model, 0.05, 0.65) for p in group["params"]]
    assert len(grouped) == len(trained_of(model))
    freeze_blocks(model, 3)
    assert {name.split(".")[0] for name in trained_of(model)} == {"fc_norm", "head"}


@pytest.mark.parametrize(
    ("name", "kept"),
    [("swin_tiny_patch4_window7_224", "layers.3."), ("convnext_tiny", "stages.3.")],
)
def test_other_networks_are_frozen_by_their_layers(name: str, kept: str) -> None:
    model = create_model(name, num_classes=3)
    blocks = 10 if name.startswith("swin") else 5
    freeze_blocks(model, blocks)
    assert all(n.startswith((kept, "head", "norm")) for n in trained_of(model))
    assert any(n.startswith(f"{kept}blocks.1.") for n in trained_of(model))


def test_what_cannot_be_frozen_is_refused() -> None:
    model = create_model("vit_tiny_patch16_224", **VIT, num_classes=3)
    with pytest.raises(ValueError, match="--freeze_blocks 4: the model has 3 blocks"):
        freeze_blocks(model, 4)
    with pytest.raises(ValueError, match="is for ViT, Swin and ConvNeXt"):
        freeze_blocks(create_model("resnet18", num_classes=3), 1)


def test_frozen_blocks_do_not_change_in_a_run(tmp_path: Path) -> None:
    flags = ["--freeze_blocks", "1", "--epochs", "1", "--output_dir", str(tmp_path), "--mixup", "0"]
    args = parse("finetune", [*FINETUNE, *flags, "--batch_size", "700"])
    with own_signals():
        run_class_finetuning.main(args)
    torch.manual_seed(args.seed)
    start_weights = run_class_finetuning.build_classifier(args).state_dict()
    end = load_checkpoint(str(tmp_path / "checkpoint-0.pth"))["model"]
    changed = {name for name in end if not torch.equal(end[name], start_weights[name])}
    assert changed and not any(name.startswith(("blocks.0.", "patch_embed.")) for name in changed)
    assert any(name.startswith("blocks.1.") for name in changed)


# --------------------------------------------------------------------------------------------------
# Evaluation


def test_a_classifier_is_evaluated_with_its_own_mean_and_std(tmp_path: Path, capsys) -> None:
    model = create_model("beit_tiny_patch16_224", **VIT, num_classes=10)
    official = tmp_path / "beit_base_patch16_224_pt22k_ft22kto1k.pth"
    save_checkpoint(official, {"model": model.state_dict()})
    flags = {"imagenet_default_mean_and_std": True, "mean": None, "std": None}
    save_checkpoint(tmp_path / "own.pth", {"model": model.state_dict(), "args": flags})
    size = [f"{name}={VIT[name]}" for name in ("embed_dim", "depth", "num_heads")]
    words = ["--model", "beit_base_patch16_224", *TINY, "--model_kwargs", *size, "--eval"]

    def used(*more: str) -> tuple[float, ...]:
        args = parse("finetune", [*words, *more])
        with own_signals():
            run_class_finetuning.main(args)
        return image_mean_std(args)[0]

    assert used("--resume", str(official)) == (0.5, 0.5, 0.5)
    flags |= {"mean": [0.1, 0.2, 0.3]}
    save_checkpoint(tmp_path / "mean.pth", {"model": model.state_dict(), "args": flags})
    assert used("--resume", str(tmp_path / "mean.pth")) == (0.1, 0.2, 0.3)
    warn_of_other_mean_std(parse_knn(["--finetune", str(tmp_path / "mean.pth")]))
    own = "its own mean and std: give --mean 0.1 0.2 0.3 --std 0.229 0.224 0.225"
    assert own in capsys.readouterr().out
    assert used("--resume", str(tmp_path / "own.pth")) == MEAN_STD["imagenet"][0]
    asked = used("--resume", str(official), "--imagenet_default_mean_and_std")
    assert asked == MEAN_STD["imagenet"][0]
