"""What methods predict, as far as it is more than cutting an image into patches: blurred pixels, teachers' features.

Shapes in comments: B images, T = 1 + N tokens (class token first), C channels of the tower, D of what it gives.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GaussianBlur(nn.Module):
    """Blurs images [B, 3, H, W] with zeros around them (specs/semaim.md 5.1)."""

    def __init__(self, kernel_size: int, sigma: float):
        super().__init__()
        if kernel_size % 2 == 0 or kernel_size < 1 or sigma <= 0:
            raise ValueError(f"--gaussian_kernel_size {kernel_size} must be odd and --gaussian_sigma {sigma} positive")
        offsets = torch.arange(kernel_size) - kernel_size // 2
        row = torch.exp(-offsets.square() / (2 * sigma**2))
        kernel = torch.outer(row, row)
        self.register_buffer("weight", (kernel / kernel.sum()).expand(3, 1, -1, -1).clone())

    def forward(self, images: Tensor) -> Tensor:
        weight = self.weight.to(images.dtype)
        return F.conv2d(images, weight, padding=weight.shape[-1] // 2, groups=len(weight))


def build_blur(kernel_size: int | None, sigma: float | None) -> GaussianBlur | None:
    """None without a blur.

    Raises:
        ValueError: only one of the two is given, or a value that cannot be.
    """
    if (kernel_size is None) != (sigma is None):
        raise ValueError("--gaussian_kernel_size and --gaussian_sigma are given together or not at all")
    return None if kernel_size is None else GaussianBlur(kernel_size, sigma)


TEACHERS = ("dino", "clip")
PREDICTED_FEATURES = ("none", "inference", "ema", *TEACHERS)
TARGET_PRECISIONS = ("auto", "fp32", "bf16", "fp16")


class Teacher:
    width: int


def build_target(*a):
    return None
