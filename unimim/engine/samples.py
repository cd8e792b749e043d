"""Pictures of masks, of what is reconstructed and of orders; training is left as it was."""

from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from unimim.engine.state import Training

IMAGES = 4  # of the training data, the same in every epoch
PICTURES = "masks_and_predictions"  # their name at a tracker
TIMES = 20  # how often in a run, so that a long one has not more to show than a short one
MASKED_GRAY = 128


def is_due(epoch: int, epochs: int) -> bool:
    """Return whether images are drawn after this epoch: some 20 times in a run, and at its end."""
    every = max(1, epochs // TIMES)
    return (epoch + 1) % every == 0 or epoch + 1 == epochs


def is_evaluated(args: Namespace, epoch: int) -> bool:
    """Return whether --eval_every judges the encoder after this epoch, which comes with images."""
    every = getattr(args, "eval_every", 0)
    return bool(every) and ((epoch + 1) % every == 0 or epoch + 1 == args.epochs)


def sample_images(run: Training, whole: nn.Module | None = None) -> Tensor | None:
    """Return rows of panels, uint8 [3, H, W]: image, visible patches, prediction, both combined.

    A method that does not predict pixels has the image, what the student sees and the teacher's
    view, if any. Where patches are predicted in an order of each image, the last panel shows it,
    the earlier the brighter. `whole`: a copy of a task whose weights are sharded (ZeRO stage 3).
    None: there is nothing to show, or no such copy.
    """
    task = run.task if whole is None else whole
    is_sharded = whole is None and getattr(run.runner, "stage", 0) == 3
    if is_sharded or not hasattr(task, "predicts_pixels"):
        return None
    dataset = run.loader.dataset
    count = min(IMAGES, len(dataset))
    batch = default_collate([dataset[0, k * len(dataset) // count] for k in range(count)])
    with (
        unchanged(task),
        torch.autocast(
            run.context.device.type, run.runner.dtype, enabled=run.runner.dtype is not None
        ),
    ):
        panels = panels_of(run, task, batch)
    return grid(panels) if panels else None


def panels_of(run: Training, task: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    """Return the panels of a pre-training method, uint8 [B, 3, H, W] each."""
    prepared = run.prepare(batch)
    order = task.orders(prepared)
    if task.predicts_pixels:
        mean, std = run.normalize.mean, run.normalize.std
        panels = [to_pixels(panel, mean, std) for panel in task.reconstruct(prepared)]
    elif order is None:
        hidden = task.hide(prepared).get("mask")
        panels = [] if hidden is None else masked_panels(batch | {"mask": hidden.cpu()})
    else:
        panels = [image_panel(batch)]
    if order is not None:
        panels.append(order_panel(order, task.patch_embed.grid_size, panels[0].shape[-2:]))
    return panels


@contextmanager
def unchanged(network: nn.Module) -> Iterator[None]:
    """Evaluate inside; give every module its mode and torch its random state back."""
    modes = {module: module.training for module in network.modules()}
    with torch.random.fork_rng(), torch.no_grad():
        network.eval()
        try:
            yield
        finally:
            for module, training in modes.items():
                module.training = training


def image_panel(batch: dict[str, Tensor]) -> Tensor:
    """Return the images of a batch of the loader as uint8 [B, 3, H, W]."""
    images = batch["image"]
    if images.is_floating_point():
        return to_pixels(images, torch.zeros(1), torch.ones(1))
    return images


def masked_panels(batch: dict[str, Tensor]) -> list[Tensor]:
    """Return the images, what the student sees of them, and the teacher's view, if any."""
    images = image_panel(batch)
    panels = [images, hide(images, batch["mask"])]
    return [*panels, batch["image_strong"]] if "image_strong" in batch else panels


def order_panel(order: Tensor, grid_size: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Return order values [B, N] as uint8 [B, 3, H, W]: white is the first patch, black the
    last."""
    ranks = order.argsort(dim=1, stable=True).argsort(dim=1)
    brightness = 255 - ranks * 255 // max(ranks.shape[1] - 1, 1)
    panel = brightness.to(torch.uint8).unflatten(1, grid_size).unsqueeze(1)
    height, width = (whole // cells for whole, cells in zip(size, grid_size, strict=True))
    panel = panel.repeat_interleave(height, 2).repeat_interleave(width, 3)
    return panel.expand(-1, 3, -1, -1)


def hide(images: Tensor, mask: Tensor) -> Tensor:
    """Return images [B, 3, H, W] whose patches are gray where mask [B, gh, gw] is True."""
    height = images.shape[-2] // mask.shape[-2]
    width = images.shape[-1] // mask.shape[-1]
    pixels = mask.repeat_interleave(height, 1).repeat_interleave(width, 2)
    return images.masked_fill(pixels.unsqueeze(1), MASKED_GRAY)


def to_pixels(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return normalized images [B, N, H, W] as uint8 [B, 3, H, W]: the first three channels, or
    the first as gray."""
    pixels = (images.float() * std + mean).clamp(0, 1).mul(255).round().byte()
    pixels = pixels[:, :3] if pixels.shape[1] >= 3 else pixels[:, :1]
    return pixels.expand(-1, 3, -1, -1)


def grid(panels: Sequence[Tensor]) -> Tensor:
    """Return panels [B, 3, H, W] side by side, a row for each image: [3, B * H, panels * W]."""
    rows = torch.cat([panel.cpu() for panel in panels], dim=3)
    return torch.cat(list(rows), dim=1)
