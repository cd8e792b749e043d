"""Losses of reconstructed pixels, spatial and in the frequency domain, and of visual tokens.

Shapes in comments: B images, c colors, H x W pixels; h x w a mask's elements; V = W // 2 + 1
columns of the half spectrum that a real image has, of which the other columns are mirror images.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from modeling_finetune import check_choice

REPLACEMENTS = ("target", "prediction", "mean", "mixed")


def enlarged(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Return a mask [B, h, w] of any dtype at `size`, [B, H, W]: repeated, or by the nearest
    element where the size is not a multiple."""
    (rows, columns), (height, width) = mask.shape[-2:], size
    if height % rows == 0 and width % columns == 0:
        return mask.repeat_interleave(height // rows, dim=-2).repeat_interleave(
            width // columns, dim=-1
        )
    return F.interpolate(mask.unsqueeze(1).float(), size, mode="nearest").squeeze(1).to(mask.dtype)


def mean_filled(images: Tensor, mask: Tensor) -> Tensor:
    """Return images [B, c, H, W] whose masked pixels have the mean of all pixels, of each image
    and color by itself (docs/methods/simmim_a2mim.md#filling)."""
    hidden = enlarged(mask, images.shape[-2:]).unsqueeze(1).bool()
    return torch.where(hidden, images.mean((2, 3), keepdim=True), images)


@dataclass(frozen=True)
class Regression:
    """Element-wise loss of a distance: the distance itself ("l1"), or weighted up where it is large
    ("focal_l1").

    The weight is tanh(alpha * d / 2) or tanh(alpha * d), for `activate` "sigmoid" and "tanh", to
    the power `gamma`; it is part of what is differentiated. `residual` adds the distance itself.
    The options are those of the published `RegressionLoss`.
    """

    mode: str = "l1"
    activate: str = "sigmoid"
    alpha: float = 0.2
    gamma: float = 1.0
    residual: bool = False

    def __post_init__(self):
        check_choice("pixel_loss", self.mode, ("l1", "focal_l1"))
        check_choice("focal_activate", self.activate, ("sigmoid", "tanh"))

    def __call__(self, distance: Tensor) -> Tensor:
        """Distances, none negative, of any shape to losses of that shape."""
        if self.mode == "l1":
            return distance
        # 2 sigmoid(z) - 1 = tanh(z / 2)
        steepness = self.alpha / 2 if self.activate == "sigmoid" else self.alpha
        loss = distance * torch.tanh(steepness * distance) ** self.gamma
        return loss + distance if self.residual else loss


def spatial_loss(
    predicted: Tensor,
    target: Tensor,
    mask: Tensor,
    regression: Regression,
    unmask_weight: float = 0.0,
) -> Tensor:
    """Loss of masked pixels, and by `unmask_weight` of the others; one mean over the whole batch.

    predicted, target [B, c, H, W]; mask [B, H, W], 1 = masked.
    """
    weight = (mask + (1 - mask) * unmask_weight).unsqueeze(1)
    loss = regression((predicted - target).abs())
    return (loss * weight).sum() / (weight.sum() + 1e-5) / predicted.shape[1]


# --------------------------------------------------------------------------------------------------
# Frequencies


def half_spectrum(images: Tensor) -> Tensor:
    """Return the orthonormal spectrum of real images [..., H, W]: complex [..., H, V]."""
    return torch.fft.rfft2(images, norm="ortho")


def whole_mean(values: Tensor, width: int) -> Tensor:
    """Return the mean over the whole spectrum, W columns wide, of values [..., H, V] that are
    equal for mirrored frequencies.

    Every column stands for two, but for the first and, where the width is even, the last, which
    mirror themselves.
    """
    alone = values[..., 0].sum() + (values[..., -1].sum() if width % 2 == 0 else 0)
    return (2 * values.sum() - alone) / (values[..., 0].numel() * width)


def half_of_weights(weights: Tensor) -> Tensor:
    """Weights of all frequencies [..., H, W] as those of the half spectrum [..., H, V] that give
    the same sum."""
    mirrored = weights.flip((-2, -1)).roll((1, 1), (-2, -1))
    return (0.5 * (weights + mirrored))[..., : weights.shape[-1] // 2 + 1]


@dataclass(frozen=True, eq=False)
class FocalFrequencyLoss:
    """Squared distance of two spectra, frequencies weighted by how far apart they are
    (docs/methods/simmim_a2mim.md#spectra).

    ave_spectrum: of the mean images of the batch on this device. The gradient is then nearly the
    same for every image, and its size depends on the images a device and micro-step. log_matrix:
    the logarithm of the weights. batch_matrix: weights are divided by the largest of all, else by
    the largest of their image and color, where the published code crashes. matrix: weights [...,
    H, W] in [0, 1] of all frequencies, which take the place of the distances'; they need not be
    symmetric, and no gradient goes through them.
    """

    alpha: float = 1.0
    ave_spectrum: bool = True
    log_matrix: bool = True
    batch_matrix: bool = True
    matrix: Tensor | None = None

    def __post_init__(self):
        if self.matrix is not None and not ((self.matrix >= 0) & (self.matrix <= 1)).all():
            raise ValueError(
                "matrix has values outside [0, 1]; use weights within, as matrix / matrix.max()"
            )

    def __call__(self, difference: Tensor) -> Tensor:
        """Loss of the difference [B, c, H, W] of two images: a transform is linear, so that one
        does for both."""
        if self.ave_spectrum:
            difference = difference.mean(0, keepdim=True)
        distance = half_spectrum(difference)
        square = distance.real.square() + distance.imag.square()
        weights = (
            self.weights(square.detach()) if self.matrix is None else self.given_weights(difference)
        )
        return whole_mean(weights * square, difference.shape[-1])

    def given_weights(self, images: Tensor) -> Tensor:
        """The matrix as weights [..., H, V] of the half spectrum of images [B, c, H, W]."""
        if self.matrix.shape[-2:] != images.shape[-2:]:
            theirs, ours = (tuple(x.shape[-2:]) for x in (images, self.matrix))
            raise ValueError(
                f"matrix is of {ours} frequencies; use one of the images' size {theirs}"
            )
        return half_of_weights(self.matrix.detach().to(images))

    def weights(self, square: Tensor) -> Tensor:
        """Return the weights of squared spectral distances [B, c, H, V]."""
        weights = square ** (self.alpha / 2)
        if self.log_matrix:
            weights = weights.log1p()
        largest = weights.max() if self.batch_matrix else weights.amax((-2, -1), keepdim=True)
        return (weights / largest).nan_to_num(nan=0.0).clamp(0, 1)


@dataclass(frozen=True)
class ReconstructionLoss:
    """A2MIM's loss; with `fft_weight` 0 and "l1" it is SimMIM's.

    fft_unmask_weight: what a visible pixel of the prediction counts for among the frequencies; the
    rest of it is replaced by fft_unmask_replace: the target, the prediction itself without its
    gradient, the target's mean color, or half of each of the first two ("mixed"); None is the
    target. fft_focal: the loss above, else the regression on the distance of spectra; fft_reweight:
    which then weighs itself.
    """

    regression: Regression = Regression()
    unmask_weight: float = 0.0
    fft_weight: float = 0.0
    fft_focal: bool = True
    fft_unmask_weight: float = 0.0
    fft_unmask_replace: str | None = "mixed"
    fft_reweight: bool = False
    focal: FocalFrequencyLoss = FocalFrequencyLoss()

    def __post_init__(self):
        if self.fft_unmask_replace is not None:
            check_choice("fft_unmask_replace", self.fft_unmask_replace, REPLACEMENTS)

    def __call__(self, predicted: Tensor, target: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """predicted, target [B, c, H, W], mask [B, h, w], 1 = masked: {"loss", "loss_spatial"[,
        "loss_freq"]}."""
        with torch.autocast(predicted.device.type, enabled=False):
            predicted, target = predicted.float(), target.float()
            mask = enlarged(mask, target.shape[-2:]).float()
            spatial = spatial_loss(predicted, target, mask, self.regression, self.unmask_weight)
            if not self.fft_weight:
                return {"loss": spatial, "loss_spatial": spatial.detach()}
            frequency = self.frequency_loss(
                self.seen(predicted, target, mask.unsqueeze(1)) - target
            )
            loss = spatial + self.fft_weight * frequency
            return {"loss": loss, "loss_spatial": spatial.detach(), "loss_freq": frequency.detach()}

    def seen(self, predicted: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        """The prediction with most of its visible pixels replaced, [B, c, H, W]; mask [B, 1, H,
        W]."""
        if self.fft_unmask_weight >= 1:
            return predicted
        ratio = mask + (1 - mask) * self.fft_unmask_weight
        return predicted * ratio + self.replacement(predicted.detach(), target) * (1 - ratio)

    def replacement(self, predicted: Tensor, target: Tensor) -> Tensor:
        match self.fft_unmask_replace:
            case "prediction":
                return predicted
            case "mean":
                return target.mean((2, 3), keepdim=True)
            case "mixed":
                return 0.5 * predicted + 0.5 * target
            case _:
                return target

    def frequency_loss(self, difference: Tensor) -> Tensor:
        """Return the loss of the difference [B, c, H, W] of two images, before `fft_weight`."""
        if self.fft_focal:
            return self.focal(difference)
        loss = self.regression(half_spectrum(difference).abs())
        return whole_mean(loss.detach() * loss if self.fft_reweight else loss, difference.shape[-1])


# --------------------------------------------------------------------------------------------------
# Visual tokens


class VisualTokenLoss(torch.autograd.Function):
    """Sum of the cross entropies of linear(x), and how many tokens are hit, without the logits of
    all rows at once.

    x [R, C], weight [K, C], bias [K], targets int64 [R], counts float32 [R]: 0 leaves a row out.
    The gradients are made with the logits of a few rows at a time, which costs no more products
    than keeping the logits.
    """

    rows = 4096

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, counts: Tensor
    ) -> tuple[Tensor, Tensor]:
        total, hits = counts.new_zeros(()), counts.new_zeros(())
        wanted = any(ctx.needs_input_grad)
        grads = [
            torch.empty_like(x),
            *(torch.zeros_like(p, dtype=torch.float32) for p in (weight, bias)),
        ]
        for start in range(0, len(x), VisualTokenLoss.rows):
            # logits [rows, vocabulary] of a few rows: those of a whole batch would not fit
            few = slice(start, start + VisualTokenLoss.rows)
            logits = F.linear(x[few], weight, bias)
            dtype = logits.dtype
            target = targets[few, None]
            count = counts[few, None]
            hits += ((logits.argmax(-1, keepdim=True) == target) * count).sum()

            # cross-entropy
            slope = logits.float().log_softmax(-1)
            del logits
            total -= (slope.gather(1, target) * count).sum()

            # its gradient is softmax - one_hot, made in place while the logits are here
            if wanted:
                slope = (
                    slope.exp_()
                    .scatter_add_(1, target, torch.full_like(count, -1.0))
                    .mul_(count)
                    .to(dtype)
                )
                grads[0][few] = slope @ weight.to(dtype)
                grads[1] += slope.T @ x[few].to(dtype)
                grads[2] += slope.sum(0)
        ctx.save_for_backward(*(grads if wanted else ()))
        ctx.mark_non_differentiable(hits)
        return total, hits

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, _) -> tuple[Tensor | None, ...]:
        return (
            *(
                g * grad if n else None
                for g, n in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)
            ),
            None,
            None,
        )
