"""Register our segmentor and transforms with mmseg; imported by `custom_imports`."""

from mmseg.registry import MODELS, TRANSFORMS

import unimim.openmmlab.register  # noqa: F401
from seg_ext.segmentor import WindowedEncoderDecoder
from seg_ext.transforms import MergeObjects, ResizeShortestAtLeast

MODELS.register_module(module=WindowedEncoderDecoder)
for _transform in (ResizeShortestAtLeast, MergeObjects):
    TRANSFORMS.register_module(module=_transform)
