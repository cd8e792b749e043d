"""Write a seeded list of training images, as many of every class, for --label_list.

    python scripts/tools/make_subset.py --data_path DATA --fraction 0.01 --seed 0 1percent.txt
    python scripts/tools/make_subset.py --data_path DATA --per_class 13 13shot.txt

Of each class a random part is taken, at least one image; the number is rounded. Lines are
FOLDER/NAME of the files, sorted; the same seed gives the same list on every machine.
"""

import argparse
import os
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from unimim.data.sources import DATA_SETS, build_source
from unimim.files import write_text


def choose(
    labels: np.ndarray, *, fraction: float | None, per_class: int | None, seed: int
) -> np.ndarray:
    """Return the ascending indices of a random part of each class in `labels` [N].

    Raises:
        ValueError: the fraction is outside (0, 1], or a class has fewer than `per_class` images.
    """
    if (fraction is None) == (per_class is None):
        raise ValueError("give --fraction or --per_class, one of them")
    if fraction is not None and not 0 < fraction <= 1:
        raise ValueError(f"--fraction {fraction} is not above 0 and at most 1")
    if per_class is not None and per_class < 1:
        raise ValueError(f"--per_class must be at least 1, not {per_class}")
    kept = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = per_class if fraction is None else max(1, round(fraction * len(members)))
        if count > len(members):
            raise ValueError(
                f"--per_class {count} is more than the {len(members)} images of class {label}"
            )
        # a stream for each class: another class's size changes nothing
        rng = np.random.default_rng((seed, int(label)))
        kept.append(rng.permutation(members)[:count])
    return np.sort(np.concatenate(kept))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, help="file to write")
    parser.add_argument("--data_path", required=True, help="root of the training data")
    parser.add_argument("--data_set", default=None, choices=DATA_SETS, help="None: inferred")
    parser.add_argument("--fraction", type=float, default=None, help="of each class")
    parser.add_argument("--per_class", type=int, default=None, help="images of each class")
    parser.add_argument("--seed", type=int, default=0, help="of the choice")
    args = parser.parse_args()
    try:
        source = build_source(args.data_set, args.data_path, train=True, need_labels=True)
        chosen = choose(
            source.labels, fraction=args.fraction, per_class=args.per_class, seed=args.seed
        )
    except ValueError as error:
        sys.exit(f"error: {error}")
    names = [source.path(index).replace(os.sep, "/").split("/")[-2:] for index in chosen]
    write_text(args.output, "".join(f"{line}\n" for line in sorted(map("/".join, names))))
    print(f"{args.output}: {len(chosen)} of {len(source)} images of {len(source.classes)} classes")


if __name__ == "__main__":
    main()
