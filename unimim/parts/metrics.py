"""How good part maps are: whether they follow the objects of an image and use all parts.

Everything comes from one table of an image, the number of pixels that each part fractions with each
object.
"""

from collections.abc import Iterable

import numpy as np

from unimim.data.part_maps import PartMaps


def overlap(parts: np.ndarray, mask: np.ndarray, num_parts: int, num_objects: int) -> np.ndarray:
    """Return how many pixels part k and object c have in common, int64 [num_parts, num_objects].

    `parts` [Hp, Wp] covers the whole image of the `mask` [H, W]; each pixel takes the cell that
    its center lies in.
    """
    rows, columns = (
        ((np.arange(side) + 0.5) * cells / side).astype(int)
        for side, cells in zip(mask.shape, parts.shape, strict=True)
    )
    pairs = parts[rows][:, columns].astype(np.int64) * num_objects + mask
    return np.bincount(pairs.ravel(), minlength=num_parts * num_objects).reshape(
        num_parts, num_objects
    )


def best_union_iou(table: np.ndarray, wanted: int) -> float:
    """Return the largest intersection over union of any union of parts with object `wanted`.

    The best union consists of the parts that lie in the object to the largest fraction, so prefixes
    of that order do.
    """
    table = table[table.sum(1) > 0]
    inside, sizes = table[:, wanted], table.sum(1)
    order = np.argsort(-inside / sizes, kind="stable")
    hits, covered = np.cumsum(inside[order]), np.cumsum(sizes[order])
    return float((hits / (covered + inside.sum() - hits)).max())


def nmi(table: np.ndarray) -> float:
    """Return the normalized mutual information 2 I / (H + H') of parts and objects, in [0, 1].

    It is 1 if there is one of each.
    """
    joint = table / table.sum()
    part, wanted = joint.sum(1), joint.sum(0)
    total = entropy(part) + entropy(wanted)
    return 1.0 if total == 0 else max(2 * (total - entropy(joint.ravel())) / total, 0.0)


def entropy(fractions: np.ndarray) -> float:
    """Return the entropy in nats of fractions that sum to 1."""
    fractions = fractions[fractions > 0]
    return float(-(fractions * np.log(fractions)).sum())


class PartQuality:
    """Means over images, from one `overlap` table each; object 0 is the background.

    miou: of `best_union_iou` over all objects of all images; foreground_iou: the same for all
    objects together; nmi: image by image; nmi_pooled: over the pixels of all images together, so
    that ids must mean the same everywhere; evenness: entropy of the parts' mean fractions, 1 where
    all are used alike.
    """

    def __init__(self, num_parts: int, num_objects: int):
        self.pooled = np.zeros((num_parts, num_objects), dtype=np.int64)
        self.fractions = np.zeros(num_parts)
        self.ious: list[float] = []
        self.foreground: list[float] = []
        self.nmis: list[float] = []

    def add(self, table: np.ndarray) -> None:
        self.pooled += table
        self.fractions += table.sum(1) / table.sum()
        self.nmis.append(nmi(table))
        present = [c for c in range(1, table.shape[1]) if table[:, c].any()]
        self.ious += [best_union_iou(table, c) for c in present]
        if present:
            self.foreground.append(
                best_union_iou(np.stack((table[:, 0], table[:, 1:].sum(1)), axis=1), 1)
            )

    def metrics(self) -> dict[str, float]:
        return {
            "miou": float(np.mean(self.ious)),
            "foreground_iou": float(np.mean(self.foreground)),
            "nmi": float(np.mean(self.nmis)),
            "nmi_pooled": nmi(self.pooled),
            "evenness": entropy(self.fractions / len(self.nmis)) / np.log(len(self.fractions)),
        }


def usage(maps: PartMaps, rows: Iterable[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return each part's mean fraction of the patches, and the fraction of images that have it."""
    counts = np.stack(
        [np.bincount(maps.read(row).ravel(), minlength=maps.num_parts) for row in rows]
    )
    return (counts / counts.sum(1, keepdims=True)).mean(0), (counts > 0).mean(0)
