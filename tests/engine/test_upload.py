"""Batches on the device one step ahead, and weights in channels-last order: the same training."""

import torch
from helpers import start
from torch import nn

from engine_for_pretraining import train_one_step
from unimim.engine.memory_format import channels_last_weights
from unimim.engine.upload import upload_ahead


def test_uploaded_batches_are_those_of_the_loader():
    batches = [{"image": torch.full((1,), float(k))} for k in range(3)]
    pairs = list(
        upload_ahead(iter(batches), lambda b: {"image": b["image"] + 1}, torch.device("cpu"))
    )
    assert [host["image"].item() for host, _ in pairs] == [0, 1, 2]
    assert [moved["image"].item() for _, moved in pairs] == [1, 2, 3]


def test_channels_last_weights_train_alike(tmp_path):
    flags = (
        *("--model", "a2mim_resnet18", "--input_size", "64", "--lr_schedule", "stepfix_cosine"),
        *("--mask_type", "random_mps32", "--mask_patch_size", "32"),
        *("--model_kwargs", "patch_size=null", "channels=[8,8,16,16]"),
    )
    runs = [start("pretrain", tmp_path / str(k), *flags, "--opt_eps", "1e-3")[0] for k in range(2)]
    convolutions = sum(
        isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)) for m in runs[0].task.modules()
    )
    assert channels_last_weights(runs[0].task) == convolutions > 10
    losses = []
    for run in runs:
        run.loader.batch_sampler.set_position(0, 0)
        run.task.train()
        found = []
        for update, batch in zip(range(3), run.loader, strict=False):
            train_one_step(run, update, [batch])
            found.append(run.monitor.recent["loss"])
        losses.append(found)
    torch.testing.assert_close(*losses, rtol=1e-4, atol=0)
