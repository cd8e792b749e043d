"""--init: pre-training from weights of another shape, naming or method."""

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import DECODER, METHODS, SIZE, differing, own_signals, start, train_steps
from reference.case import OWN_CASES, load

import run_pretraining
from modeling_finetune import create_model
from unimim.checkpoint.files import encoder_file, list_checkpoints, load_checkpoint, save_checkpoint
from unimim.checkpoint.initial import load_initial, resized_projection
from unimim.checkpoint.resizing import interpolate_pos_embed
from unimim.cli.options import parse
from unimim.engine.session import Position

VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2}
SMALL = VIT | {"decoder_embed_dim": 24, "decoder_depth": 2, "decoder_num_heads": 2}


@pytest.fixture
def mae(tmp_path):
    """A checkpoint and an encoder of a MAE of 16 px, patches of 4 px, after two steps."""
    run, _ = start("pretrain", tmp_path / "mae", *METHODS["mae"])
    train_steps(run, 0, 2)
    run.session.save(Position(), finished=True)
    return list_checkpoints(tmp_path / "mae")[0]


def test_mae_goes_on_from_an_encoder_alone_at_another_size(tmp_path, mae, capfd):
    """24 px, patches of 3 px, a decoder of another depth: through the script, then resumed."""
    flags = ["--model", "mae_tiny_patch16_224", "--data_set", "digits", "--num_workers", "0"]
    flags += ["--device", "cpu", "--input_size", "24", "--patch_size", "3", "--epochs", "1"]
    flags += [
        "--batch_size",
        "512",
        "--warmup_epochs",
        "0",
        "--lr",
        "1e-3",
        "--save_ckpt_freq",
        "1",
    ]
    flags += ["--model_kwargs", *SIZE, *DECODER[:1], "decoder_depth=1", *DECODER[2:]]
    flags += ["--init", str(encoder_file(mae)), "--output_dir", str(tmp_path / "larger")]
    capfd.readouterr()
    with own_signals():
        run_pretraining.main(parse("pretrain", flags))
    said = capfd.readouterr().out
    resized = said.partition("resized (2): ")[2].splitlines()[0]
    assert set(resized.split(", ")) == {"pos_embed", "patch_embed.proj.weight"}
    fresh = said.partition("fresh (20): ")[2].splitlines()[0]
    assert fresh.split(", ") == [
        *("mask_token", "decoder_pos_embed", "decoder_embed (2)", "decoder_blocks (12)"),
        *("decoder_norm (2)", "decoder_pred (2)"),
    ]
    made = load_checkpoint(tmp_path / "larger/checkpoint-0.pth")["model"]
    encoder = load_checkpoint(encoder_file(mae))
    moved = interpolate_pos_embed(encoder["pos_embed"], (8, 8), 1)
    torch.testing.assert_close(made["pos_embed"], moved)  # fixed, so as it was loaded
    block = "blocks.1.mlp.fc1.weight"
    assert 0 < (made[block] - encoder[block]).abs().max() < 0.02  # a few steps away
    (tmp_path / "mae").rename(tmp_path / "gone")  # a resumed run does not need it
    with own_signals():
        run_pretraining.main(parse("pretrain", [*flags, "--epochs", "2"]))
    said = capfd.readouterr().out
    assert "starting from" not in said and "resumed" in said


def test_a_whole_file_gives_the_decoder_too_and_the_same_shapes_are_equal(mae):
    saved = load_checkpoint(mae)["model"]
    network = create_model("mae_tiny_patch16_224", input_size=16, patch_size=4, **SMALL)
    report = load_initial(network, None, str(mae))
    assert not report.fresh and not report.resized and not report.ignored
    assert differing(dict(network.state_dict()), saved) == []
    larger = create_model("mae_tiny_patch16_224", input_size=32, patch_size=4, **SMALL)
    report = load_initial(larger, None, str(mae))
    assert report.resized == ["pos_embed", "decoder_pos_embed"] and not report.fresh
    five = create_model("mae_tiny_patch16_224", input_size=16, patch_size=4, in_chans=5, **SMALL)
    report = load_initial(five, None, str(mae))
    assert report.resized == ["patch_embed.proj.weight"]
    assert report.fresh == ["decoder_pred.weight", "decoder_pred.bias"]


@pytest.mark.parametrize(
    ("case", "name", "options"),
    [
        ("mae/normpix", "mae_tiny_patch16_224", {}),
        ("conmim/shared_rel_bias_layer_scale", "conmim_tiny_patch16_224", {}),
        ("pixio/grid4_cls8_normpix", "pixio_tiny_patch16_256", {"mask_grid": 2}),
        ("nepa/gelu_qknorm_eval", "nepa_tiny_patch14_224", {"qk_norm": "plain"}),
    ],
)
def test_published_files_begin_a_run_at_another_size(tmp_path, case, name, options):
    found = load(OWN_CASES / case)
    config, weights = found.config, found.inputs("weights/")
    student = {key.removeprefix("student/"): value for key, value in weights.items()}
    save_checkpoint(tmp_path / "published.pth", {"model": student})
    names = ("embed_dim", "depth", "num_heads", "mlp_ratio", "patch_size", "init_values",
             "decoder_embed_dim", "decoder_depth", "decoder_num_heads")  # fmt: skip
    options = options | {key: config[key] for key in names if key in config}
    if name.startswith("nepa"):
        options |= {"embed_dim": 48, "depth": 3, "num_heads": 3, "mlp_ratio": 128.5 / 48}
    size = config.get("img_size", config.get("image_size"))
    size = size if isinstance(size, int) else size[0]
    network = create_model(name, input_size=2 * size, **options)
    report = load_initial(network, None, str(tmp_path / "published.pth"))
    encoder = [key for key in network.state_dict() if not key.startswith(network.not_exported)]
    fresh = set(report.fresh) & set(encoder)
    assert not {key for key in fresh if "_norm." not in key}, fresh
    assert all(key.endswith(("pos_embed", "_table")) for key in report.resized)


def test_a_teacher_begins_as_the_network_or_as_the_files(tmp_path):
    run, _ = start("pretrain", tmp_path / "conmim")
    train_steps(run, 0, 2)
    run.session.save(Position(), finished=True)
    file = list_checkpoints(tmp_path / "conmim")[0]
    saved = load_checkpoint(file)
    again, _ = start("pretrain", tmp_path / "whole", "--init", str(file))
    teacher = dict(again.task.teacher.state_dict())
    assert differing(teacher, saved["teacher"]) == []
    assert differing(dict(again.task.network.state_dict()), saved["model"]) == []
    encoder = str(encoder_file(file))
    alone, _ = start("pretrain", tmp_path / "alone", "--init", encoder)
    assert differing(dict(alone.task.teacher.state_dict()), dict(alone.task.state_dict())) == []


def test_class_tokens_that_the_file_lacks_stay_fresh(mae):
    options = {"input_size": 32, "patch_size": 4, "mask_grid": 2, "num_cls_tokens": 3}
    network = create_model("pixio_tiny_patch16_256", **options, **SMALL)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    load_initial(network, None, str(mae))
    saved = load_checkpoint(mae)["model"]
    assert torch.equal(network.cls_token[:, :1], saved["cls_token"])
    assert torch.equal(network.cls_token[:, 1:], before["cls_token"][:, 1:])
    assert torch.equal(network.pos_embed[:, 1:3], before["pos_embed"][:, 1:3])
    moved = interpolate_pos_embed(saved["pos_embed"], (8, 8), 1)
    torch.testing.assert_close(network.pos_embed[:, 3:], moved[:, 1:])


def test_a_cnn_begins_with_timms_weights(tmp_path):
    network = timm.create_model("resnet18")
    torch.save(network.state_dict(), tmp_path / "resnet18.pth")
    method = create_model("a2mim_resnet18", input_size=64)
    report = load_initial(method, None, str(tmp_path / "resnet18.pth"))
    assert torch.equal(method.backbone.layer4[1].conv2.weight, network.layer4[1].conv2.weight)
    assert set(report.ignored) == {"fc.weight", "fc.bias"}
    assert all(key.startswith(("inject.", "neck.")) for key in report.fresh)


def test_a_resampled_projection_gives_the_tokens_of_the_resized_image():
    torch.manual_seed(0)
    weight = torch.randn(8, 3, 4, 4)
    patch = torch.randn(5, 3, 4, 4)
    larger = F.interpolate(patch, scale_factor=2, mode="bilinear")
    made = resized_projection(weight, torch.empty(8, 3, 8, 8))
    torch.testing.assert_close(F.conv2d(larger, made), F.conv2d(patch, weight), rtol=0, atol=1e-3)
    gray = patch[:, :1]
    five = resized_projection(weight, torch.empty(8, 5, 4, 4))
    expected = F.conv2d(gray.expand(-1, 3, -1, -1), weight)
    torch.testing.assert_close(F.conv2d(gray.expand(-1, 5, -1, -1), five), expected)


def test_weights_of_another_network_are_refused(tmp_path, mae):
    wide = create_model(
        "mae_tiny_patch16_224", input_size=16, patch_size=4, **SMALL | {"embed_dim": 48}
    )
    with pytest.raises(
        ValueError, match=r"--init .* fits 0 of the encoder's 30 tensors.*--model\?"
    ):
        load_initial(wide, None, str(mae))
