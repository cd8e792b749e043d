"""Convert SemMAE's packed samples (.npy in class folders) to ordinary images and part maps.

    python scripts/tools/convert_packed_parts.py PACKED OUTPUT [--image_size 224] [--num_parts 7]

Pre-training reads the published samples as they are (--data_set packed); this is for samples of
other sizes or numbers of parts, and for programs that need images.

Writes OUTPUT/images/CLASS/NAME.png and OUTPUT/parts (parts.npy, parts.json, scores.npy). Train with
--data_set image_folder --data_path OUTPUT/images --part_maps OUTPUT/parts
"""

import argparse
import sys
from pathlib import Path

from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from unimim.data.packed import PUBLISHED_PARTS, PUBLISHED_SIDE, PackedSample, read_packed
from unimim.data.part_maps import SCORES, PartMapWriter, PartMeta, names_sha256, png_names


def convert(packed: Path, output: Path, *, num_parts: int, image_size: int) -> int:
    """Convert every `.npy` below `packed` and return their number; resume an interrupted call.

    Raises:
        ValueError: there are no samples, one is invalid, or their patch sizes differ.
    """
    files = sorted(
        packed.rglob("*.npy"), key=lambda file: str(file.relative_to(packed).with_suffix(".png"))
    )
    if not files:
        raise ValueError(f"{packed} holds no .npy files")
    names = png_names([file.relative_to(packed).as_posix() for file in files])
    grid = read_packed(files[0], num_parts=num_parts, image_size=image_size).parts.shape
    meta = PartMeta(
        num_parts,
        grid,
        len(files),
        part_source="packed",
        names_sha256=names_sha256(names),
        scores=SCORES,
    )
    PartMapWriter.create(output / "parts", meta)
    writer = PartMapWriter(output / "parts")
    for index in tqdm(writer.missing().tolist(), desc="samples", disable=None):
        sample = read_packed(files[index], num_parts=num_parts, image_size=image_size)
        if sample.parts.shape != grid:
            raise ValueError(
                f"{files[index]} has a grid of {sample.parts.shape}, {files[0]} one of {grid}"
            )
        write_image(output / "images" / names[index], sample)
        writer.write(index, sample.parts, sample.scores)
    writer.flush()
    writer.seal()
    return len(files)


def write_image(path: Path, sample: PackedSample) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sample.image).save(path)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("packed", type=Path, help="folder of class folders of .npy samples")
    parser.add_argument("output", type=Path, help="new folder for images and part maps")
    parser.add_argument(
        "--num_parts", type=int, default=PUBLISHED_PARTS, help="part columns of a sample"
    )
    parser.add_argument(
        "--image_size", type=int, default=PUBLISHED_SIDE, help="side of the images in pixels"
    )
    args = parser.parse_args(argv)
    try:
        count = convert(
            args.packed, args.output, num_parts=args.num_parts, image_size=args.image_size
        )
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"converted {count} samples into {args.output}")


if __name__ == "__main__":
    main()
