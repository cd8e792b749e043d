"""Upload of the next batch while the device computes."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

Batch = dict[str, Tensor]


def upload_ahead(
    batches: Iterable[Batch], normalize: Callable[[Batch], Batch], device: torch.device
) -> Iterator[tuple[Batch, Batch]]:
    """Yields pairs of a loader's batch and what `normalize` makes of it on the device.

    On a GPU the copy of each batch is queued on a stream of its own before the batch in front of it
    is handed out: it runs during that one's step. Pinned memory is needed for that.
    """
    if device.type != "cuda":
        yield from ((batch, normalize(batch)) for batch in batches)
        return
    side = torch.cuda.Stream(device)
    ahead = None
    for batch in batches:
        with torch.cuda.stream(side):
            moved = normalize(batch)
            done = side.record_event()
        if ahead is not None:
            yield hand_over(*ahead)
        ahead = batch, moved, done
    if ahead is not None:
        yield hand_over(*ahead)


def hand_over(batch: Batch, moved: Batch, done: torch.cuda.Event) -> tuple[Batch, Batch]:
    """Lets the computing stream wait for an upload, and keeps its memory until that stream has read
    it."""
    stream = torch.cuda.current_stream()
    stream.wait_event(done)
    for value in moved.values():
        if isinstance(value, Tensor):
            value.record_stream(stream)
    return batch, moved
