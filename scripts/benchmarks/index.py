"""Measure what a long list of images costs: seconds to read it, bytes an image, workers' memory.

A map file of --images lines is generated, in ImageNet's style, and read as a run reads it. Workers
are forked and look images up at random; what they then hold alone is read from /proc.
"""

import argparse
import itertools
import multiprocessing
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from datasets import TrainBatchSampler
from unimim.data.sources import FileSource, map_source

BLOCK = 10**6  # lines that are written at a time
CLASSES = 1000
BATCH, ORDER_BATCHES = 256, 200


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=int, default=10**7, help="lines of the map file")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--order_images", type=int, default=10**8, help="of the order of an epoch, without a list"
    )
    parser.add_argument("--lookups", type=int, default=10**5, help="of each worker")


def write_map(root: Path, images: int) -> int:
    """Write `train_map.txt` of names such as class0007/class0007_00001234.JPEG; return its size."""
    (root / "train").mkdir()
    file = root / "train_map.txt"
    with file.open("w") as lines:
        for first in range(0, images, BLOCK):
            numbers = range(first, min(first + BLOCK, images))
            lines.writelines(
                f"class{n % CLASSES:04d}/class{n % CLASSES:04d}_{n:08d}.JPEG\t{n % CLASSES}\n"
                for n in numbers
            )
    return file.stat().st_size


def array_bytes(source: FileSource) -> int:
    """Return the bytes of everything that a list of images holds."""
    names = source.files.names
    return names.text.nbytes + names.ends.nbytes + source.labels.nbytes


def own_memory() -> int:
    """Return the bytes of this process that no other process shares."""
    text = Path("/proc/self/smaps_rollup").read_text()
    private = [line.split() for line in text.splitlines() if line.startswith("Private_")]
    return 1024 * sum(int(fields[1]) for fields in private)


def look_up(source: FileSource, count: int, seed: int, result: Connection) -> None:
    """In a worker: look images up at random and send what that added to its private memory."""
    before = own_memory()
    for index in np.random.default_rng(seed).integers(len(source), size=count).tolist():
        source.path(index), int(source.labels[index])
    result.send(own_memory() - before)


def workers_memory(source: FileSource, workers: int, lookups: int) -> list[int]:
    """Return the bytes that each forked worker holds alone after its lookups."""
    context = multiprocessing.get_context("fork")
    found = []
    for seed in range(workers):
        ours, theirs = context.Pipe()
        worker = context.Process(target=look_up, args=(source, lookups, seed, theirs))
        worker.start()
        found.append(ours.recv())
        worker.join()
    return found


def run(args: argparse.Namespace) -> None:
    """Generate the list, read it, and print a line for each measurement."""
    with tempfile.TemporaryDirectory() as folder:
        size = write_map(Path(folder), args.images)
        print(f"map file: {args.images:,} lines, {size / 2**20:,.0f} MiB")
        begin = time.perf_counter()
        source = map_source(Path(folder), "train")
        print(f"read in {time.perf_counter() - begin:.1f} s")
        held = array_bytes(source)
        print(f"held: {held / args.images:.1f} bytes an image, {held / 2**20:,.0f} MiB in all")
        found = workers_memory(source, args.workers, args.lookups)
        print(f"workers' own memory after {args.lookups:,} lookups: "
              + ", ".join(f"{extra / 2**20:.1f} MiB" for extra in found))  # fmt: skip
    for images in (args.images, args.order_images):
        measure_order(images)


def measure_order(images: int) -> None:
    """Print what the order of an epoch takes of the process that trains; no worker holds it."""
    sampler = TrainBatchSampler(images, BATCH)
    begin = time.perf_counter()
    order = sampler.order(0)
    made = time.perf_counter() - begin
    batches = iter(sampler)
    next(batches)  # makes the order again
    begin = time.perf_counter()
    taken = sum(1 for _ in itertools.islice(batches, ORDER_BATCHES))  # a short list has fewer
    seconds = (time.perf_counter() - begin) / max(1, taken)
    print(
        f"order of {images:,} images: {made:.1f} s, {order.nbytes / 2**20:,.1f} MiB, "
        f"{1e3 * seconds:.2f} ms a batch of {BATCH}"
    )


if __name__ == "__main__":
    command_line = argparse.ArgumentParser(description=__doc__)
    add_arguments(command_line)
    run(command_line.parse_args())
