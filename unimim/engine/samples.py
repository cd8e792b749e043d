"""Images of masks and of what is reconstructed, for TensorBoard; training is left as it was."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from unimim.engine.state import Training

IMAGES = 4  # of the training data, the same in every epoch
TIMES = 20  # how often in a run, so that a long one has not more to show than a short one
MASKED_GRAY = 128


def is_due(epoch: int, epochs: int) -> bool:
    """Return whether images are drawn after this epoch: some 20 times in a run, and at its end."""
    every = max(1, epochs // TIMES)
    return (epoch + 1) % every == 0 or epoch + 1 == epochs


def sample_images(run: Training) -> Tensor | None:
    """Return rows of panels, uint8 [3, H, W]: image, visible patches, prediction, both combined.

    A method that does not predict pixels has the image, what the student sees and the teacher's
    view, if any. None: a task without masks, or weights that are sharded (ZeRO stage 3).
    """
    task = run.task
    predicts_pixels = getattr(task, "predicts_pixels", False)
    if getattr(run.runner, "stage", 0) == 3 or not (
        predicts_pixels or "mask" in getattr(task, "views", ())
    ):
        return None
    dataset = run.loader.dataset
    count = min(IMAGES, len(dataset))
    batch = default_collate([dataset[0, k * len(dataset) // count] for k in range(count)])
    if not predicts_pixels:
        return grid(masked_panels(batch))
    with (
        unchanged(task),
        torch.autocast(
            run.context.device.type, run.runner.dtype, enabled=run.runner.dtype is not None
        ),
    ):
        panels = task.reconstruct(run.prepare(batch))
    mean, std = run.normalize.mean, run.normalize.std
    return grid([to_pixels(panel, mean, std) for panel in panels])


@contextmanager
def unchanged(task: nn.Module) -> Iterator[None]:
    """Evaluate inside; give the task's mode and torch's random state back."""
    training = task.training
    with torch.random.fork_rng(), torch.no_grad():
        task.eval()
        try:
            yield
        finally:
            task.train(training)


def masked_panels(batch: dict[str, Tensor]) -> list[Tensor]:
    """Return the images, what the student sees of them, and the teacher's view, if any."""
    images = batch["image"]
    if images.is_floating_point():
        images = to_pixels(images, torch.zeros(1), torch.ones(1))
    panels = [images, hide(images, batch["mask"])]
    return [*panels, batch["image_strong"]] if "image_strong" in batch else panels


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
