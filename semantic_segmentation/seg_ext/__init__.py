"""What the configurations name beyond mmseg's own: a segmentor and a transform; imported by `custom_imports`."""

from mmseg.registry import MODELS, TRANSFORMS

import downstream.register  # noqa: F401
from seg_ext.segmentor import WindowedEncoderDecoder
from seg_ext.transforms import ResizeShortestAtLeast

MODELS.register_module(module=WindowedEncoderDecoder)
TRANSFORMS.register_module(module=ResizeShortestAtLeast)
