"""BEiT's feature pyramid: maps of strides 4, 8, 16 and 32 from a ViT's maps of one stride."""

from mmcv.cnn import build_norm_layer
from torch import Tensor, nn


class BeitPyramid(nn.Module):
    """Resample four maps [B, C, h, w] of stride `patch_size` (16 or 8) to strides 4, 8, 16, 32.

    Deconvolutions enlarge, max pooling reduces.
    """

    def __init__(self, width: int, patch_size: int = 16, norm_cfg: dict | None = None):
        super().__init__()
        if patch_size not in (8, 16):
            raise ValueError(
                f"model.neck.patch_size={patch_size}: the pyramid is for patches of 8 or 16 pixels"
            )
        double = nn.Sequential(deconvolution(width))
        if patch_size == 16:
            norm = build_norm_layer(norm_cfg or {"type": "SyncBN"}, width)[1]
            quadruple = nn.Sequential(deconvolution(width), norm, nn.GELU(), deconvolution(width))
            self.levels = nn.ModuleList([quadruple, double, nn.Identity(), nn.MaxPool2d(2)])
        else:
            self.levels = nn.ModuleList([double, nn.Identity(), nn.MaxPool2d(2), nn.MaxPool2d(4)])

    def forward(self, maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the resampled maps."""
        return tuple(level(x) for level, x in zip(self.levels, maps, strict=True))


def deconvolution(width: int) -> nn.ConvTranspose2d:
    """Return a deconvolution that doubles the resolution."""
    return nn.ConvTranspose2d(width, width, kernel_size=2, stride=2)
