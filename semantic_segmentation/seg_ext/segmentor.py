"""mmseg's encoder-decoder with batched sliding-window inference."""

import torch
import torch.nn.functional as F
from mmseg.models import EncoderDecoder
from torch import Tensor


def window_starts(side: int, crop: int, stride: int) -> list[int]:
    """Return where windows start along a side: multiples of the stride, the last moved back."""
    count = -(-(side - crop) // stride) + 1
    return [min(number * stride, side - crop) for number in range(count)]


class WindowedEncoderDecoder(EncoderDecoder):
    """Run n windows at a time: test_cfg=dict(mode="slide", crop_size, stride, window_batch=n).

    Windows always have the crop's size, for which bias tables were made: smaller images are padded
    with zeros, which is the mean color.
    """

    def slide_inference(self, inputs: Tensor, batch_img_metas: list[dict]) -> Tensor:
        """Return logits [B, K, H, W] of images [B, 3, H, W], averaged over overlapping windows."""
        height, width = inputs.shape[2:]
        rows, columns = self.test_cfg.crop_size
        padded = F.pad(inputs, (0, max(columns - width, 0), 0, max(rows - height, 0)))
        stride_y, stride_x = self.test_cfg.stride
        tops = window_starts(padded.shape[2], rows, stride_y)
        lefts = window_starts(padded.shape[3], columns, stride_x)
        corners = [(top, left) for top in tops for left in lefts]
        sums = padded.new_zeros(len(padded), self.out_channels, *padded.shape[2:])
        counts = padded.new_zeros(1, 1, *padded.shape[2:])
        batch_size = self.test_cfg.get("window_batch", 1)
        for first in range(0, len(corners), batch_size):
            batch = corners[first : first + batch_size]
            windows = torch.cat(
                [padded[..., top : top + rows, left : left + columns] for top, left in batch]
            )
            logits = self.encode_decode(windows, [{"img_shape": windows.shape[2:]}])
            for (top, left), part in zip(batch, logits.split(len(padded)), strict=True):
                sums[..., top : top + rows, left : left + columns] += part
                counts[..., top : top + rows, left : left + columns] += 1
        return (sums / counts)[..., :height, :width]
