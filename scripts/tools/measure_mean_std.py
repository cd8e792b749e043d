"""Measure mean and std of each channel of a data set's training images, for --mean and --std.

    python scripts/tools/measure_mean_std.py --data_path /data/images [--images 10000]

Images are read as a run reads them and resized to --size, so that each counts alike; values are
those of images in [0, 1]. Of images that are not 8-bit RGB the run's --in_chans, and its
--keep_channels if it has that, are given too; floats count as the files have them.
"""

import argparse
import sys
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from unimim.data.channels import decode_channels, kept_channels
from unimim.data.jpeg import BrokenImageError, decode
from unimim.data.preparation import ALPHAS, DROP, Preparation, preparation
from unimim.data.sources import DATA_SETS, Source, build_source
from unimim.logs import log


def measure(
    source: Source,
    images: int,
    size: int,
    channels: int | None = None,
    prepare: Preparation | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and std, float64 [channels], of at most `images` images spread over the source.

    `channels`: how many are kept at their own depth, None for 8-bit RGB. `prepare` composites
    images. Unreadable images are left out and counted in the log; ValueError: no image can be read.
    """
    chosen = np.linspace(0, len(source) - 1, min(images, len(source))).round().astype(int)
    count, total, squares = 0, 0.0, 0.0
    broken = []
    chosen = np.unique(chosen).tolist()
    for index in tqdm(chosen, unit="image", disable=None):
        try:
            raw = source.read(index)
            raw = raw if prepare is None else prepare(raw)
            pixels = decode(raw) if channels is None else decode_channels(raw, channels)
        except BrokenImageError as error:
            broken.append(f"{source.path(index)}: {error}")
            continue
        # one channel after the other: OpenCV resizes at most four at once
        planes = [
            cv2.resize(np.ascontiguousarray(plane), (size, size), interpolation=cv2.INTER_AREA)
            for plane in pixels.transpose(2, 0, 1)
        ]
        values = np.stack(planes, axis=-1).reshape(size * size, -1).astype(np.float64)
        values = values / 255 if channels is None else values
        count += len(values)
        total = total + values.sum(0)
        squares = squares + np.square(values).sum(0)
    if not count:
        raise ValueError(f"no image can be read, such as {broken[0]}")
    if broken:
        log.warning(
            "%d of %d images cannot be read and are left out, such as %s",
            len(broken), len(chosen), broken[0],
        )  # fmt: skip
    mean = total / count
    return mean, np.sqrt(np.maximum(squares / count - mean**2, 0))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data_path", default=None, help="as for training")
    parser.add_argument("--data_set", default=None, choices=DATA_SETS, help="as for training")
    parser.add_argument("--images", type=int, default=10000, help="most images that are read")
    parser.add_argument("--size", type=int, default=64, help="side to which images are resized")
    parser.add_argument("--in_chans", type=int, default=None, help="as for training")
    parser.add_argument("--keep_channels", action="store_true", help="as for training")
    parser.add_argument("--alpha", choices=ALPHAS, default=DROP, help="as for training")
    args = parser.parse_args(argv)
    if args.images < 1 or args.size < 1:
        parser.error("--images and --size must be at least 1")
    try:
        source = build_source(args.data_set, args.data_path, train=True, need_labels=False)
        mean, std = measure(source, args.images, args.size, kept_channels(args), preparation(args))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"--mean {' '.join(f'{value:.4f}' for value in mean)}", end=" ")
    print(f"--std {' '.join(f'{value:.4f}' for value in std)}")


if __name__ == "__main__":
    main()
