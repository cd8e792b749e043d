"""What a run leaves for the eye: images in tensorboard, and encoders that timm loads by
themselves."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from helpers import METHODS, board, own_signals, start
from PIL import Image

import modeling_pretrain  # noqa: F401  (registers the methods)
from engine_for_pretraining import train
from unimim.checkpoint.files import encoder_file, list_checkpoints, timm_arguments_of
from unimim.data.views import image_mean_std
from unimim.engine.samples import MASKED_GRAY, is_due, order_panel, sample_images
from unimim.engine.session import Position

CONMIM: tuple[str, ...] = ()


@pytest.fixture
def few_images(tmp_path) -> tuple[str, ...]:
    """Return the flags of a folder of 16 images."""
    noise = np.random.default_rng(0).integers(0, 256, (16, 64, 64, 3), dtype=np.uint8)
    (tmp_path / "images").mkdir()
    for number, pixels in enumerate(noise):
        Image.fromarray(pixels).save(tmp_path / f"images/{number}.png")
    return ("--data_set", "image_folder", "--data_path", str(tmp_path / "images"))


def run_of(folder: Path, *flags: str):
    run, position = start("pretrain", folder, "--epochs", "2", *flags)
    with own_signals():
        train(run, position, after_epoch=lambda position: {})
    return run


@pytest.mark.parametrize(
    ("flags", "panels"),
    [(CONMIM, 3), (METHODS["mae"], 4), (METHODS["semaim"], 5), (METHODS["a2mim_resnet"], 4)],
)
def test_images_in_tensorboard_leave_training_as_it_is(tmp_path, few_images, flags, panels):
    flags = (*flags, *few_images)
    run_of(tmp_path / "without", *flags)
    run = run_of(tmp_path / "with", *flags, "--log_dir", str(tmp_path / "board"))
    assert (tmp_path / "without/log.txt").read_text() == (tmp_path / "with/log.txt").read_text()
    images = board(tmp_path / "board")["masks_and_predictions"]
    height, width = run.task.image_size
    assert len(images) == 2 and images[0].shape == (4 * height, panels * width, 3)
    first = run.loader.dataset[0, 0]["image"].permute(1, 2, 0).numpy()
    assert np.abs(images[0][:height, :width].astype(int) - first).max() <= 1
    assert (images[0][:, width : 2 * width] != images[0][:, :width]).any()  # masked


def test_what_is_not_masked_has_no_images(tmp_path):
    assert sample_images(start("finetune", tmp_path)[0]) is None
    assert sample_images(start("pretrain", tmp_path, *METHODS["nepa"])[0]) is None


def test_masks_that_the_network_draws_are_shown_without_pixels_too(tmp_path):
    run, _ = start("pretrain", tmp_path, *METHODS["mae"], "--target", "hog")
    images = sample_images(run)
    assert images.shape == (3, 4 * 16, 2 * 16)
    gray = (images[:, :16, 16:] == MASKED_GRAY).all(0).unflatten(0, (4, 4)).unflatten(2, (4, 4))
    assert gray.all(3).all(1).sum() == 8  # of 16 patches, --mask_ratio 0.5


def test_the_order_of_patches_is_from_white_to_black():
    panel = order_panel(torch.tensor([[0.5, 0.1, 0.9, 0.7]]), (2, 2), (4, 6))
    assert panel.shape == (1, 3, 4, 6)
    assert panel[0, 0, ::2, ::3].tolist() == [[170, 255], [0, 85]]
    assert (panel[0, :, :2, :3] == 170).all()


def test_images_come_some_twenty_times():
    assert [epoch for epoch in range(5) if is_due(epoch, 5)] == [0, 1, 2, 3, 4]
    due = [epoch for epoch in range(805) if is_due(epoch, 805)]
    assert len(due) == 21 and due[:2] == [39, 79] and due[-1] == 804


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (CONMIM, "beit_base_patch16_224"),
        (METHODS["mae"], "vit_base_patch16_224"),
        (METHODS["pixio"], "vit_base_patch16_224"),
        (METHODS["nepa"], "eva_giant_patch14_224"),
        (METHODS["semanticmim_beit"], "vit_base_patch16_224"),
        (METHODS["a2mim_vit"], "beit_base_patch16_224"),
        (METHODS["a2mim_resnet"], "resnet18"),
    ],
)
def test_the_encoder_says_how_timm_makes_it(tmp_path, flags, name, capfd):
    """By what the file says alone, strictly, with equal features."""
    run, _ = start("pretrain", tmp_path, *flags)
    network = run.task.network
    for parameter in network.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    if network.teacher is not None:
        network.teacher.load_state_dict(network.state_dict(), strict=False)
    run.session.save(Position(), finished=True)
    capfd.readouterr()
    run.session.log_encoder()
    said, normalized = capfd.readouterr().out.strip().splitlines()
    said = said.removeprefix("the encoder in Python: ")
    assert str(image_mean_std(run.args)[0]) in normalized
    arguments = timm_arguments_of(encoder_file(list_checkpoints(tmp_path)[0]))
    assert arguments["model_name"] == name
    assert said == f"timm.create_model({', '.join(f'{k}={v!r}' for k, v in arguments.items())})"
    made = eval(said, {"timm": timm}).eval()
    images = torch.randn(2, 3, *network.image_size)
    network.eval()
    with torch.no_grad():
        if hasattr(network, "features"):
            tokens, theirs = network.features(images, None), made.forward_features(images)
            if theirs.ndim == 3:
                theirs = theirs[:, 1:].transpose(1, 2).unflatten(2, tokens.shape[2:])
        else:
            own = network if network.teacher is None else network.teacher
            tokens, theirs = own.norm(own.forward_features(images)), made.forward_features(images)
    torch.testing.assert_close(theirs, tokens, rtol=0, atol=1e-4)


def test_a_finished_run_says_what_to_do(tmp_path, few_images, capfd):
    run_of(tmp_path / "run", *few_images)
    capfd.readouterr()
    run_of(tmp_path / "run", *few_images)
    assert "nothing left to do: all 2 epochs are done; raise --epochs" in capfd.readouterr().out
