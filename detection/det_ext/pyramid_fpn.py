"""The neck of plain ViTs: a pyramid of their maps of one stride, then an FPN."""

from mmdet.models.necks import FPN
from mmdet.registry import MODELS
from torch import Tensor

from unimim.openmmlab.pyramid import BeitPyramid


@MODELS.register_module()
class PyramidFPN(FPN):
    """Turn four maps [B, C, h, w] of one stride into an FPN's of strides 4, 8, 16, 32 and 64.

    The stride is `patch_size` (16 or 8). `pyramid_norm_cfg` is the norm of the pyramid, `norm_cfg`
    that of the FPN.
    """

    def __init__(
        self, *, in_channels: list[int], pyramid_norm_cfg: dict, patch_size: int = 16, **fpn
    ):
        super().__init__(in_channels=in_channels, **fpn)
        self.pyramid = BeitPyramid(in_channels[0], patch_size, pyramid_norm_cfg)

    def forward(self, maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return super().forward(self.pyramid(maps))
