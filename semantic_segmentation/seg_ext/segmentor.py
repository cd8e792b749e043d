"""mmseg's encoder and decoder with sliding windows that go through the network several at a
time."""

import torch
import torch.nn.functional as F
from mmseg.models import EncoderDecoder
from torch import Tensor


def window_starts(side: int, crop: int, stride: int) -> list[int]:
    """Where windows begin along a side of at least `crop`: multiples of the stride, the last one
    shifted back."""
    count = -(-(side - crop) // stride) + 1
    return [min(number * stride, side - crop) for number in range(count)]


class WindowedEncoderDecoder(EncoderDecoder):
    """test_cfg = dict(mode="slide", crop_size=(h, w), stride=(y, x), window_batch=n): n windows at
    a time.

    Windows are always of the crop's size, which bias tables were made for: smaller images are
    padded with zeros, that is with the mean color (specs/downstream.md 4.5).
    """

    def slide_inference(self, inputs: Tensor, batch_img_metas: list[dict]) -> Tensor:
        """Images [B, 3, H, W] to logits [B, K, H, W], the mean of all windows at each place."""
        height, width = inputs.shape[2:]
        rows, columns = self.test_cfg.crop_size
        padded = F.pad(inputs, (0, max(columns - width, 0), 0, max(rows - height, 0)))
        tops, lefts = (
            window_starts(side, crop, stride)
            for side, crop, stride in zip(
                padded.shape[2:], (rows, columns), self.test_cfg.stride, strict=True
            )
        )
        corners = [(top, left) for top in tops for left in lefts]
        sums = padded.new_zeros(len(padded), self.out_channels, *padded.shape[2:])
        counts = padded.new_zeros(1, 1, *padded.shape[2:])
        for some in torch.arange(len(corners)).split(self.test_cfg.get("window_batch", 1)):
            chosen = [corners[number] for number in some]
            windows = torch.cat(
                [padded[..., top : top + rows, left : left + columns] for top, left in chosen]
            )
            logits = self.encode_decode(windows, [{"img_shape": windows.shape[2:]}])
            for (top, left), part in zip(chosen, logits.split(len(padded)), strict=True):
                sums[..., top : top + rows, left : left + columns] += part
                counts[..., top : top + rows, left : left + columns] += 1
        return (sums / counts)[..., :height, :width]
