"""A small discrete VAE in the form of DALL-E's (arXiv 2102.12092, sections 2.1 and A), which learns
visual tokens, and the metrics of tokens.

Shapes in comments: B images, V visual tokens of the vocabulary, h x w tokens of an image.
"""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modeling_targets import DalleEncoder, dalle_pixels
from unimim.checkpoint.names import StateDict
from unimim.engine.task import Task

DECODER_INPUT = 128  # channels between a token and the decoder's first group, at most


class DecoderBlock(nn.Module):
    """Residual block of DALL-E's decoder: [B, dim_in, h, w] to [B, dim_out, h, w]."""

    def __init__(self, dim_in: int, dim_out: int, gain: float):
        super().__init__()
        hidden = dim_out // 4
        self.gain = gain
        self.id_path = nn.Identity() if dim_in == dim_out else nn.Conv2d(dim_in, dim_out, 1)
        self.res_path = nn.Sequential(
            *(nn.ReLU(), nn.Conv2d(dim_in, hidden, 1)),
            *(nn.ReLU(), nn.Conv2d(hidden, hidden, 3, padding=1)),
            *(nn.ReLU(), nn.Conv2d(hidden, hidden, 3, padding=1)),
            *(nn.ReLU(), nn.Conv2d(hidden, dim_out, 3, padding=1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.id_path(x) + self.gain * self.res_path(x)


class DalleDecoder(nn.Module):
    """DALL-E's decoder, the mirror image of its encoder: probabilities of tokens [B, V, h, w] to
    images [B, 3, stride * h, stride * w] in (0, 1), in the encoder's range of values."""

    def __init__(self, n_hid: int, blocks_per_group: int, vocab_size: int, groups: int):
        super().__init__()
        gain = (groups * blocks_per_group) ** -2
        first = min(DECODER_INPUT, n_hid * 2 ** (groups - 1))
        widths = [first] + [n_hid * 2**group for group in reversed(range(groups))]
        layers: list[nn.Module] = [nn.Conv2d(vocab_size, first, 1)]
        for group, (dim_in, dim_out) in enumerate(pairwise(widths)):
            if group:
                layers.append(nn.Upsample(scale_factor=2))
            layers.append(DecoderBlock(dim_in, dim_out, gain))
            layers += [DecoderBlock(dim_out, dim_out, gain) for _ in range(blocks_per_group - 1)]
        self.layers = nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(n_hid, 3, 1))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layers(tokens).sigmoid()


class DiscreteVAE(Task):
    """A discrete VAE: images to tokens to images.

    Training decodes a relaxed sample of the tokens, a softmax of logits and Gumbel noise, whose
    temperature falls from `tau[0]` to `tau[1]`. The loss is the mean squared error of pixels in
    [0, 1] plus `kl_weight` times the divergence of the tokens' distribution from the uniform one,
    a weight that rises from 0. Either follows a cosine over its fraction of the run.
    """

    raw_views = ("image",)

    def __init__(
        self,
        *,
        vocab_size: int,
        patch_size: int,
        n_hid: int,
        blocks_per_group: int,
        tau: tuple[float, float],
        tau_fraction: float,
        kl_weight: float,
        kl_fraction: float,
    ):
        super().__init__()
        groups = patch_size.bit_length()  # a group more than halvings
        sizes = {"n_hid": n_hid, "blocks_per_group": blocks_per_group, "vocab_size": vocab_size}
        self.encoder = DalleEncoder(**sizes, groups=groups)
        self.decoder = DalleDecoder(**sizes, groups=groups)
        self.vocab_size = vocab_size
        self.tau_range = tau
        self.tau_fraction = tau_fraction
        self.kl_peak = kl_weight
        self.kl_fraction = kl_fraction
        self.apply(init_convolution)
        self.after_step(0.0)

    def no_weight_decay(self) -> set[str]:
        return set()

    def after_step(self, progress: float, applied: float | Tensor = 1.0) -> None:
        """Set temperature and weight of the divergence for the next step."""
        self.tau = cosine_between(*self.tau_range, progress / self.tau_fraction)
        self.kl_weight = cosine_between(0.0, self.kl_peak, progress / self.kl_fraction)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Losses of uint8 images [B, 3, H, W]; `mse` is of relaxed tokens, `perplexity` of the
        batch's most probable ones."""
        logits = self.logits(batch["image"])
        with torch.autocast(logits.device.type, enabled=False):
            relaxed = F.gumbel_softmax(logits, self.tau, dim=1)
            kl = divergence_from_uniform(logits)
        mse = F.mse_loss(self.decode(relaxed), batch["image"].float() / 255)
        return {
            "loss": mse + self.kl_weight * kl,
            "mse": mse.detach(),
            "kl": kl.detach(),
            "perplexity": perplexity(token_counts(logits.argmax(1), self.vocab_size)),
        }

    def logits(self, images: Tensor) -> Tensor:
        """Return the logits, float32 [B, V, h, w], of the tokens of uint8 images [B, 3, H, W]."""
        features = self.encoder(dalle_pixels(images))
        return self.encoder.blocks["output"]["conv"](features).float()

    def tokens(self, images: Tensor) -> Tensor:
        """Return the most probable tokens, int64 [B, h * w], of uint8 images [B, 3, H, W]."""
        return self.logits(images).argmax(1).flatten(1)

    def decode(self, tokens: Tensor) -> Tensor:
        """Return images in [0, 1], float32, of probabilities of tokens [B, V, h, w]."""
        return (self.decoder(tokens).float() - 0.1) / 0.8

    def reconstruct(self, ids: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return images in [0, 1], float32, of tokens int64 [B, h * w]."""
        one_hot = F.one_hot(ids, self.vocab_size).float().transpose(1, 2)
        return self.decode(one_hot.unflatten(2, grid)).clamp(0, 1)


def init_convolution(module: nn.Module) -> None:
    """Start a convolution as DALL-E does: it keeps the variance of its input."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
        nn.init.zeros_(module.bias)


def cosine_between(start: float, end: float, progress: float) -> float:
    """Return `start` at progress 0, `end` from 1 on, half a cosine between them."""
    return end + (start - end) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2


def divergence_from_uniform(logits: Tensor) -> Tensor:
    """Return the mean over all positions of KL(softmax of logits [B, V, h, w] || uniform)."""
    log_q = logits.log_softmax(1)
    return (log_q.exp() * (log_q + math.log(logits.shape[1]))).sum(1).mean()


def token_counts(ids: Tensor, vocab_size: int) -> Tensor:
    """Return how often each token occurs, float32 [V]."""
    ids = ids.flatten()
    counts = torch.zeros(vocab_size, device=ids.device)
    return counts.index_add_(0, ids, torch.ones_like(ids, dtype=torch.float32))


def perplexity(counts: Tensor) -> Tensor:
    """Return the exponential of the entropy of tokens with these counts [V]: how many are in use,
    if all were used equally."""
    q = counts / counts.sum()
    return torch.special.entr(q).sum().exp()


def openai_names(encoder: StateDict) -> StateDict:
    """Return the encoder's tensors under the names of OpenAI's file."""
    return {
        name.replace(".weight", ".w").replace(".bias", ".b"): value
        for name, value in encoder.items()
    }
