"""A method's class declares its flags; the command line needs no line of its own for them."""

import re

import pytest
import torch
from torch import Tensor

import modeling_finetune
import run_pretraining  # noqa: F401  (registers the methods)
from modeling_finetune import check_choice, entry_of, register, registered_flags
from modeling_pretrain import MaskedImageModel
from unimim.cli.flags import build_parser, options_as_flags
from unimim.cli.models import build_method
from unimim.cli.options import parse
from unimim.errors import OptionError
from unimim.flag import Flag

SIZE = ("--input_size", "32", "--patch_size", "8")
TINY = (*SIZE, "--model_kwargs", "embed_dim=32", "depth=1", "num_heads=2")


class MeanColor(MaskedImageModel):
    """Predicts the mean color of each masked patch."""

    flags = (
        Flag("color_norm", "norm", choices=("l1", "l2"), help="norm of the error"),
        Flag("no_head_bias", "head_bias", type=int, convert=lambda given, run: run.mean_std[0][0]),
    )

    def __init__(self, *, norm: str = "l2", head_bias: float = 0.0, **vit):
        super().__init__(**vit)
        check_choice("norm", norm, ("l1", "l2"))
        self.norm_name = norm
        self.head_bias = head_bias
        self.color = torch.nn.Linear(self.embed_dim, 3)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"loss": self.color(self.encode_masked(batch["image"], batch["mask"])).sum()}


@pytest.fixture
def mean_color(monkeypatch):
    monkeypatch.setattr(modeling_finetune, "_MODELS", dict(modeling_finetune._MODELS))
    register("meancolor_tiny_patch16_224", MeanColor, embed_dim=192, depth=12, num_heads=3)
    return ["--model", "meancolor_tiny_patch16_224"]


def test_a_new_method_needs_its_class_only(mean_color):
    flags = ["--color_norm", "l1", "--no_head_bias", "1"]
    method = build_method(parse("pretrain", [*mean_color, *TINY, *flags]))
    assert (method.norm_name, method.head_bias) == ("l1", 0.5)
    method = build_method(parse("pretrain", [*mean_color, *TINY]))
    assert (method.norm_name, method.head_bias) == ("l2", 0.0), "None keeps the model's own"
    help_of_class = build_parser("pretrain").format_help().partition("\nMeanColor:\n")[2]
    assert "--color_norm {l1,l2}" in help_of_class.partition("\nengine:\n")[0]
    assert "color_norm" not in build_parser("finetune").format_help()


def test_its_choices_are_checked_and_its_mistakes_name_the_flag(mean_color, capsys):
    with pytest.raises(SystemExit):
        parse("pretrain", [*mean_color, "--color_norm", "l3"])
    assert "--color_norm" in capsys.readouterr().err
    args = parse("pretrain", [*mean_color, *TINY])
    args.color_norm = "l3"
    with pytest.raises(ValueError, match=r"^--color_norm l3 is unknown; take one of l1, l2$"):
        build_method(args)


def test_other_methods_refuse_its_flags(mean_color):
    other = ["--model", "conmim_tiny_patch16_224", *TINY, "--color_norm", "l1"]
    with pytest.raises(ValueError, match=r"^--color_norm l1 is not an option of conmim_tiny"):
        build_method(parse("pretrain", other))


def test_what_published_commands_carry_for_other_methods_is_ignored():
    given = ["--discrete_vae_weight_path", "x", "--mask_ratio", "0.6"]
    build_method(parse("pretrain", ["--model", "conmim_tiny_patch16_224", *TINY, *given]))


def test_help_names_the_methods_that_share_a_flag_once():
    text = build_parser("pretrain").format_help()
    assert len(re.findall(r"^  --norm_pix_loss ", text, re.MULTILINE)) == 1
    title = text[: text.index("  --norm_pix_loss ")].rpartition(":\n  None:")[0].split("\n")[-1]
    assert {"MAE", "SemMAE", "SemAIM"} <= set(title.split(", "))
    assert text.count("\nSemAIM, FeatureSemAIM:\n") == 1
    assert len(re.findall(r"^  --temp ", text, re.MULTILINE)) == 1


def test_flags_of_one_name_are_one_flag():
    """Two records of one name would give the parser the first and the methods both."""
    names = [flag.name for flag in registered_flags()]
    assert len(names) == len(set(names))


def test_entries_say_what_a_model_is():
    kinds = {
        name: entry_of(name).kind
        for name in (
            "conmim_tiny_patch16_224",
            "a2mim_resnet10t",
            "beit_tiny_patch16_224",
            "resnet18",
            "vgg11",
        )
    }
    assert list(kinds.values()) == ["method", "method", "classifier", "timm", "timm"]
    assert entry_of("beit_tiny_patch16_384").input_size == 384
    assert entry_of("a2mim_nothing") is None


@pytest.mark.parametrize(
    ("error", "plain", "on_the_command_line"),
    [
        (
            OptionError("temperature", 0, "is not positive"),
            "temperature=0 is not positive",
            "--temp 0 is not positive",
        ),
        (
            OptionError("hog_pool", 3, "does not divide 8"),
            "hog_pool=3 does not divide 8",
            "--model_kwargs hog_pool=3 does not divide 8",
        ),
        (
            OptionError("init_values", None, "give pos_embed or mask_ratio", "mask_ratio"),
            "init_values: give pos_embed or mask_ratio",
            "--layer_scale_init_value: give pos_embed or --mask_ratio",
        ),
    ],
)
def test_an_error_names_the_option_and_on_the_command_line_the_flag(
    error, plain, on_the_command_line
):
    assert str(error) == plain
    with pytest.raises(ValueError) as raised, options_as_flags():
        raise error
    assert str(raised.value) == on_the_command_line
