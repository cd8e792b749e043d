"""Resizing for tests at several scales (specs/downstream.md 4.6)."""

from typing import Any

from mmcv.transforms import BaseTransform, Resize


class ResizeShortestAtLeast(BaseTransform):
    """The short side becomes `ratio` times that of `scale`, but no less than `min_short`; the long
    side follows."""

    def __init__(self, scale: tuple[int, int], ratio: float, min_short: int):
        self.short = max(int(min(scale) * ratio), min_short)

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        height, width = results["img"].shape[:2]
        long = self.short * max(height, width) / min(height, width)
        return Resize(scale=(long, self.short), keep_ratio=True)(results)


class MergeObjects(BaseTransform):
    """Every class but 0 becomes 1: objects against ground."""

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        results["gt_seg_map"] = (results["gt_seg_map"] > 0).astype("uint8")
        return results
