"""Names of classes: ImageNet's WordNet ids, the subsets of its variants, and lists in files."""

from importlib.resources import files
from pathlib import Path

from timm.data import ImageNetInfo

IMAGENET = "imagenet"  # the word for ImageNet's own list


def imagenet_synsets() -> list[str]:
    """Return the WordNet ids of ImageNet's 1,000 classes, in the order of every published model."""
    return ImageNetInfo("imagenet-1k").label_names()


def imagenet_names() -> list[str]:
    """Return ImageNet's 1,000 classes in words."""
    info = ImageNetInfo("imagenet-1k")
    return [info.index_to_description(index) for index in range(info.num_classes())]


def subset_synsets(suite: str) -> list[str]:
    """Return the WordNet ids of imagenet_a or imagenet_r; of another suite all of ImageNet's."""
    if suite not in ("imagenet_a", "imagenet_r"):
        return imagenet_synsets()
    return files("timm.data").joinpath("_info", f"{suite}_synsets.txt").read_text().split()


def read_classes(flag: str, path: str) -> list[str]:
    """Return the classes that a file lists, one a line, in the order of the model's outputs.

    The word "imagenet" stands for ImageNet's WordNet ids. Raises ValueError, which names the flag,
    for a file that is missing or empty, or a name that is there twice.
    """
    if path == IMAGENET:
        return imagenet_synsets()
    if not Path(path).is_file():
        raise ValueError(f"{flag} {path} does not exist; use a file with one class a line")
    names = [line.strip() for line in Path(path).read_text().splitlines() if line.strip()]
    if not names:
        raise ValueError(f"{flag} {path} is empty; write one class a line")
    if len(set(names)) < len(names):
        double = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{flag} {path} lists '{double}' twice; each class has one line")
    return names
