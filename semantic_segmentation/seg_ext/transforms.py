"""Transforms that our segmentation configurations need."""

from typing import Any

from mmcv.transforms import BaseTransform, Resize


class ResizeShortestAtLeast(BaseTransform):
    """Resize the short side to `ratio` times that of `scale`, at least `min_short`.

    The aspect ratio is kept; this is for tests at several scales.
    """

    def __init__(self, scale: tuple[int, int], ratio: float, min_short: int):
        self.short = max(int(min(scale) * ratio), min_short)

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        height, width = results["img"].shape[:2]
        long = self.short * max(height, width) / min(height, width)
        return Resize(scale=(long, self.short), keep_ratio=True)(results)


class MergeObjects(BaseTransform):
    """Merge all classes but 0 into 1: objects against background.

    An image without a mask, as in the demo, is returned as it is.
    """

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        if "gt_seg_map" in results:
            results["gt_seg_map"] = (results["gt_seg_map"] > 0).astype("uint8")
        return results
