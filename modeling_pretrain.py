"""Every pre-training method of the repository, top-down: mask, encode, (decode,) loss.

A method is a `PretrainMethod`: it names the batch keys it reads (`views`), computes a loss from a
batch, and may move a teacher after each optimizer step. It knows nothing of flags, data sets,
optimizers, devices and engines. Shapes in comments: B images, N patches, T = 1 + N tokens, C
channels, M masked patches an image, D projected width; L tokens that take part, P = patch height *
patch width * 3 numbers of a patch; n class tokens, V visible patches, K visual tokens.
"""

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from masking_generator import (
    MASKS,
    ORDERS_WITH_TIES,
    ORDERS_WITHOUT_NOISE,
    PATCH_ORDERS,
    Noise,
    NoiseMask,
    SquareMask,
    common_count,
    patch_order,
    stretched,
    visible_patches,
)
from modeling_backbones import (
    TIMM_BACKBONES,
    CellNeck,
    MaskToken,
    PixelNeck,
    build_backbone,
    enlarged,
    family_of,
    is_listed_by_timm,
    map_of,
    mean_filled,
    place_of,
)
from modeling_finetune import (
    MAE_SIZES,
    MIM_VIT_SIZES,
    VIT_SIZES,
    Attention,
    Block,
    Mlp,
    RotaryViT,
    VisionTransformer,
    check_choice,
    drop_path_rates,
    own_options,
    positions_of,
    register,
    register_family,
    sincos_pos_embed,
    take,
    unpatchify,
)
from modeling_targets import (
    PREDICTED_FEATURES,
    TARGETS,
    TEACHERS,
    FocalFrequencyLoss,
    OwnFeatures,
    Pixels,
    ReconstructionLoss,
    Regression,
    Shape,
    Target,
    check_rgb,
    load_teacher,
    put,
)
from unimim.checkpoint.names import timm_vit_arguments
from unimim.engine.ema import MovingAverage
from unimim.engine.task import Task
from unimim.errors import OptionError, refused
from unimim.flag import Flag
from unimim.sizes import to_pair


class Reconstruction(NamedTuple):
    """Images [B, 3, H, W] in the units of the normalized images; what one does not show is 0, the
    mean color.

    masked: the known patches; predicted: what is predicted of each; pasted: the known patches and
    what is predicted elsewhere.
    """

    original: Tensor
    masked: Tensor
    predicted: Tensor
    pasted: Tensor


class PretrainMethod(Task):
    """A task (unimim/engine/task.py) that pre-trains; its other base is the network it trains.

    `views`: the batch keys that `forward` reads. `flags`: the command-line flags that set options
    of its constructor. `noise_size`: how much uniform noise the view
    "noise" [B, noise_size] holds for each image, so that what is random follows from seed, epoch
    and image, not from processes and batches. `not_exported`: beginnings of the names of what is
    no part of the encoder. `predicts_pixels`: whether `reconstruct` can show what is predicted.
    `finer_patches`: what a message about masks adds, on how patches become smaller. `most_masked`:
    what lists of masked patches are filled up to, so that compiled blocks see one
    length; None: the batch's largest number. Its ema is the teacher.
    """

    views: tuple[str, ...] = ("image",)
    flags: tuple[Flag, ...] = ()
    noise_size: int = 0
    not_exported: tuple[str, ...] = ()
    predicts_pixels: bool = False
    finer_patches: str = ""
    most_masked: int | None = None
    ema_key = "teacher"

    def pad_masks_to(self, count: int) -> None:
        """Fill lists of masked patches up to `count`, so that compiled blocks see one length."""
        self.most_masked = count

    def reconstruct(self, batch: dict[str, Tensor], noise: Noise = None) -> Reconstruction:
        """Return images of what is predicted of a batch, by a method that `predicts_pixels`;
        `noise` as for `forward`."""
        raise NotImplementedError

    def hide(self, batch: dict[str, Tensor], noise: Noise = None) -> dict[str, Tensor]:
        """Return the batch with "mask" [B, gh, gw], if patches are hidden; `noise` as for
        `forward`."""
        return batch

    def orders(self, batch: dict[str, Tensor]) -> Tensor | None:
        """Return order values [B, N], smaller is earlier, in which the patches of each image are
        predicted; None: all at once, or in one order for all images."""
        return None

    def noise_of(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the noise [B, noise_size] that came with the images, drawn here if there is
        none."""
        images = batch["image"]
        return (
            batch["noise"]
            if "noise" in batch
            else torch.rand(len(images), self.noise_size, device=images.device)
        )

    @property
    def teacher(self) -> nn.Module | None:
        return None if self.ema is None else self.ema.module

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the images."""
        return self.patch_embed.img_size

    @property
    def cell_size(self) -> tuple[int, int]:
        """(height, width) in pixels of one element of a mask, a part map or noise."""
        return self.patch_embed.patch_size

    def encoder_state_dict(self, weights: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Return the clean encoder in `weights`, by default in what the published recipe
        fine-tunes: the teacher, if any."""
        if weights is None:
            weights = (self if self.teacher is None else self.teacher).state_dict()
        return {k: v for k, v in weights.items() if not k.startswith(self.not_exported)}

    def timm_arguments(self, encoder: dict[str, Tensor]) -> dict[str, Any]:
        """Return the arguments of `timm.create_model` for an exported encoder in timm's names."""
        return timm_vit_arguments(encoder, self.image_size, self.blocks[0].attn.num_heads)


@cache
def options_of(part: type | None) -> frozenset[str]:
    """Return the names of the options of a target's or a mask's constructor; none for None."""
    return frozenset() if part is None else frozenset(own_options(part) - {"shape", "grid"})


def selected(options: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Return the options of these names."""
    return {name: value for name, value in options.items() if name in names}


_PARTS = (*TARGETS.values(), *MASKS.values())
SPACE_FLAGS = (
    Flag(
        "target", choices=tuple(TARGETS), group="what is predicted",
        help="what is predicted of the patches; docs/methods/space.md says what goes together",
    ),
    Flag("mask_type", optional=True),
    Flag("mask_ratio", optional=True),
    *dict.fromkeys(flag for part in _PARTS for flag in part.flags),
)  # fmt: skip


class Predictor(PretrainMethod):
    """A form of the encoder in the space mask x form x target (docs/methods/space.md).

    The constructor of a form passes its options through `take_options`, which keeps those of mask
    and target, builds its network, calls `make_target` and `add_head`, and `finish` last. Its
    `forward` takes the batch from `hide` and returns what `compare` does.

    form_name: in the table. own_target, own_mask: those of the published method; without a target
    of its own a subclass computes its loss itself. target_options: what the published method sets
    of a target's options. targets, masks: what --target and --mask_type choose from. equal_counts:
    as many patches must be hidden of every image. in_order: it predicts in an order and hides
    nothing. leaves_out: patches may take no part at all. ignored: options that published commands
    carry for other methods. head_name: the attribute that holds the head; by default the target's.
    """

    flags = SPACE_FLAGS
    form_name = ""
    own_target: str | None = None
    own_mask = "block"
    target_options: ClassVar[dict[str, Any]] = {}
    targets = TARGETS
    masks = MASKS
    equal_counts = False
    in_order = False
    leaves_out = False
    ignored = frozenset(("discrete_vae_weight_path", "mask_ratio"))
    head_name = ""
    t_momentum = 1.0

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        own = options_of(cls.targets.get(cls.own_target)) | options_of(cls.masks[cls.own_mask])
        cls.chosen_options = {"target", "mask_type"} | own
        heads = [part.head_name for part in cls.targets.values()] + [cls.head_name]
        names = [f"{name}." for name in heads if name]
        cls.not_exported = tuple(dict.fromkeys((*cls.not_exported, *names)))

    @classmethod
    def refusal(cls, mask_type: str, target: str | None) -> OptionError | None:
        """Return why this form does not go with a mask and a target; None if it does."""
        hides = cls.masks[mask_type] is not MASKS["none"]
        problem = ""
        if hides and cls.in_order:
            problem = (
                "hides patches, but this model predicts them in an order; use permutation_type"
            )
        elif not hides and not cls.in_order:
            problem = "hides nothing, but this model predicts what is hidden; use random"
        elif cls.equal_counts and not cls.masks[mask_type].equal_counts:
            problem = (
                "hides more patches of one image than of another, which this model cannot take; "
                "use random or random_mps32"
            )
        others = ("model", "permutation_type")
        return OptionError("mask_type", mask_type, problem, *others) if problem else None

    def take_options(self, options: dict[str, Any]) -> dict[str, Any]:
        """Keep the options of a constructor that are of mask and target and return the others.

        Options of the published method's own mask and target are accepted with any other too, so
        that its recipe goes with them.
        """
        target = options.get("target") or self.own_target
        mask_type = options.get("mask_type") or self.own_mask
        if target is not None:
            check_choice("target", target, self.targets)
        check_choice("mask_type", mask_type, self.masks)
        if refusal := self.refusal(mask_type, target):
            raise refusal
        if options.get("fft_weight") and target != "pixels":
            problem = "compares the spectra of pixels; use target pixels"
            raise OptionError("fft_weight", options["fft_weight"], problem, "target")

        # the target needs the encoder's width and the mask its grid: both are made later
        target_class, mask_class = self.targets.get(target), self.masks[mask_type]
        own = selected(self.target_options | options, options_of(target_class))
        self._make_target = target_class and partial(target_class, **own)
        self._make_mask = partial(mask_class, **selected(options, options_of(mask_class)))
        kept = self.chosen_options | self.ignored | options_of(target_class)
        left = {k: v for k, v in options.items() if k not in kept | options_of(mask_class)}
        self.check_not_of_others(left, target, mask_type)
        return left

    def check_not_of_others(
        self, options: dict[str, Any], target: str | None, mask_type: str
    ) -> None:
        """Raise an OptionError for an option of a target or a mask that was not chosen."""
        axes = (("target", self.targets, target), ("mask_type", self.masks, mask_type))
        for name, value in options.items():
            for axis, known, chosen in axes:
                if owners := [word for word, part in known.items() if name in options_of(part)]:
                    problem = f"is not an option of {axis} {chosen}, but of {' and '.join(owners)}"
                    raise OptionError(name, value, problem, axis)

    def make_target(self, width: int) -> None:
        """Make the target; `width` is that of the encoder's own features."""
        shape = Shape(self.cell_grid, tuple(self.cell_size), width, self.image_channels)
        self.target = self._make_target and self._make_target(shape)

    def add_head(self, dim: int) -> nn.Module:
        """Add and return the head of the target on tokens [B, M, dim]."""
        self.head_name = self.head_name or self.target.head_name
        self.add_module(self.head_name, self.build_head(dim))
        return self.head_of_target

    def build_head(self, dim: int) -> nn.Module:
        return self.target.head(dim)

    @property
    def head_of_target(self) -> nn.Module:
        return self.get_submodule(self.head_name)

    def finish(self) -> None:
        """Load what the target needs, make the masks and, where one of the two needs it, the ema:
        the end of a form's constructor."""
        self.masking = self._make_mask(self.cell_grid)
        del self._make_target, self._make_mask
        if self.masking.chooses and not self.leaves_out:
            problem = "leaves patches out, which only a model with a decoder can; use 1"
            raise OptionError("token_share", None, problem)
        if self.masking.teacher is not None:
            check_rgb(self.image_channels, "mask_teacher")
            self.masking.teacher = load_teacher(
                None, self.masking.teacher, self.cell_grid, option="mask_teacher"
            )
        own_views = ()
        parts = [self.masking]
        if self.target is not None:
            self.target.load()
            own_views = self.target.views
            parts.append(self.target)
        self.views = ("image", *own_views, *self.masking.views)
        self.noise_size = self.masking.noise_size
        for part in parts:
            if part.uses_ema:
                self.t_momentum = part.t_momentum
        if any(part.uses_ema for part in parts):
            self.ema = MovingAverage(self)
            without_dropout(self.teacher)

    # -- what engines, data and exporters ask

    @property
    def cell_grid(self) -> tuple[int, int]:
        """(rows, columns) of masks, part maps and targets."""
        return tuple(
            side // cell for side, cell in zip(self.image_size, self.cell_size, strict=True)
        )

    @property
    def image_channels(self) -> int:
        return self.patch_embed.proj.in_channels

    @property
    def num_parts(self) -> int:
        return self.masking.num_parts

    @property
    def second_size(self) -> tuple[int, int]:
        return self.target.second_size

    @property
    def frozen(self) -> nn.Module | None:
        return self.target and self.target.frozen

    @property
    def raw_views(self) -> tuple[str, ...]:
        return self.target.raw_views if self.target else ()

    def before_epoch(self, epoch: int, epochs: int) -> None:
        self.masking.before_epoch(epoch, epochs)

    def after_step(self, progress: float, applied: float | Tensor = 1.0) -> None:
        """Update the ema by a momentum that goes from `t_momentum` to 1 as a cosine over the run
        (docs/methods/conmim.md#teacher)."""
        if self.ema is not None:
            momentum = 1.0 + 0.5 * (self.t_momentum - 1.0) * (1.0 + math.cos(math.pi * progress))
            self.ema.update(momentum, applied)

    # -- masks and targets of a batch

    def visible_first(self, batch: dict[str, Tensor], noise: Noise = None) -> tuple[Tensor, int]:
        """Return positions of the patches that take part, int64 [B, L], visible ones first, and how
        many those are. `noise` replaces the view "noise"."""
        if noise is None and self.noise_size:
            noise = self.noise_of(batch)
        order = self.masking.order(batch, noise, self.attention_to_patches(batch))
        return order, self.masking.num_visible(batch, order.shape[1])

    @torch.no_grad()
    def attention_to_patches(self, batch: dict[str, Tensor]) -> Tensor | None:
        """Return how much each patch is attended to, [B, N]; None where masks do not ask."""
        if self.masking.teacher is not None:
            return self.masking.teacher.look(batch["image"]).attention.mean(1)
        if not self.masking.uses_ema:
            return None
        patches = self.teacher.whole(batch["image"])[:, -math.prod(self.cell_grid) :]
        return similarity(patches.mean(1, keepdim=True), patches)

    def hide(self, batch: dict[str, Tensor], noise: Noise = None) -> dict[str, Tensor]:
        """Return the batch with "mask" [B, gh, gw], where it does not come with it, and how many
        patches that hides."""
        if "mask" in batch or "mask" in self.masking.views:
            return batch
        order, visible = self.visible_first(batch, noise)
        mask = torch.zeros_like(order, dtype=torch.bool).scatter_(1, order[:, visible:], True)
        count = order.shape[1] - visible
        counts = {"mask_counts": (count, count), "max_masked": count}
        return {**batch, "mask": mask.unflatten(1, self.cell_grid), **counts}

    def whole(self, images: Tensor) -> Tensor:
        """Return normed tokens [B, T, C] of images of which nothing is hidden."""
        return self.norm(self.run_blocks(self.embed(self.patch_embed(images), self.pos_embed)))

    def compare(
        self,
        tokens: Tensor,
        batch: dict[str, Tensor],
        positions: Tensor,
        counts: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return the loss of tokens [B, M, C] of the patches at positions [B, M], and metrics."""
        with torch.no_grad():
            target = self.target.of(batch, positions, self)
        out = self.target.score(self.head_of_target, tokens, target, positions, counts)
        return out | self.masking.metrics(out["loss"])


class MaskedImageModel(Predictor, VisionTransformer):
    """The form of BEiT: a ViT that sees every patch, the masked ones as a learned token."""

    form_name = "mask tokens"
    not_exported = ("mask_token",)

    def __init__(self, **options):
        vit = self.take_options(options)
        super().__init__(**{**vit, "num_classes": 0, "global_pool": "token"})
        self.mask_token = nn.Parameter(torch.zeros(1, 1, self.embed_dim))
        self._init_token(self.mask_token)
        self.make_target(self.embed_dim)
        if self.target is not None:
            self.add_head(self.embed_dim).apply(self._init_module)
        self.finish()

    def forward(self, batch: dict[str, Tensor], noise: Noise = None) -> dict[str, Tensor]:
        """Return loss and metrics; `noise` replaces the view "noise" of masks made here."""
        batch = self.hide(batch, noise)
        mask = batch["mask"].flatten(1)
        positions, counts = masked_positions(mask, self.most_masked or batch.get("max_masked"))
        rows = None if self.target.sees_all else positions + self.num_prefix_tokens
        tokens = self.norm(self.run_blocks(self.embed_masked(batch["image"], mask), rows=rows))
        return self.compare(tokens, batch, positions, counts)

    def encode_masked(self, images: Tensor, mask: Tensor | None) -> Tensor:
        """Return normed tokens [B, T, C] of images [B, 3, H, W], with the mask token where mask
        [B, gh, gw] is True."""
        return self.norm(self.run_blocks(self.embed_masked(images, mask)))

    def embed_masked(self, images: Tensor, mask: Tensor | None) -> Tensor:
        """Return the tokens [B, T, C] that the first block sees."""
        x = self.patch_embed(images)
        if mask is not None:
            x = torch.where(mask.flatten(1).unsqueeze(-1), self.mask_token.to(x.dtype), x)
        return self.embed(x, self.pos_embed)

    # pre-training cuts the normal distribution at one standard deviation, the convolution's too

    def _init_module(self, module: nn.Module) -> None:
        super()._init_module(module)
        if isinstance(module, nn.Conv2d):
            self._init_token(module.weight)
            nn.init.zeros_(module.bias)

    def _init_token(self, weight: Tensor) -> None:
        nn.init.trunc_normal_(weight, std=0.02, a=-0.02, b=0.02)


def masked_positions(mask: Tensor, count: int | None = None) -> tuple[Tensor, Tensor]:
    """Return the positions int64 [B, M] where mask [B, N] is True, in row-major order, and which
    of them count, bool [B, M].

    M is `count`, the largest number of masked patches in the batch; when it is not given it is read
    from the mask, which on a GPU waits for the device. Images with fewer are filled up with
    positions that do not count.
    """
    count = int(mask.sum(1).max()) if count is None else count
    positions = mask.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :count]
    return positions, mask.gather(1, positions)


# --------------------------------------------------------------------------------------------------
# ConMIM


class ConMIM(MaskedImageModel):
    """Masked image modeling with denoising contrast (ICLR 2023, arXiv 2205.09616).

    The student sees a weakly augmented image with masked patches, the teacher a strongly augmented
    one in full; each masked patch must pick its own teacher feature among all patches of the same
    image: the target `Contrast`. Differences from the published code: no unused `lm_head`; the
    teacher's dropout and stochastic depth are off; only masked rows enter the similarity (same
    loss); the similarity and softmax are in float32; any grid.
    """

    own_target = "contrast"

    def project(self, images: Tensor, mask: Tensor | None) -> Tensor:
        """Return projected patch tokens [B, N, D]. The class token passes through too: it counts
        in the batch statistics."""
        tokens = self.target.project(self.projectors, self.encode_masked(images, mask))
        return tokens[:, self.num_prefix_tokens :]


def without_dropout(module: nn.Module) -> None:
    """Switch dropout and stochastic depth off and leave the training mode, with its batch
    statistics, on."""
    for part in module.modules():
        for name in ("p", "drop_prob", "attn_drop"):
            if isinstance(getattr(part, name, None), float):
                setattr(part, name, 0.0)


# --------------------------------------------------------------------------------------------------
# MAE


class PlainViT(PretrainMethod, VisionTransformer):
    """The form of MAE: fixed sine-cosine positions, keys with a bias, and its initialization
    (docs/methods/mae_semmae.md#initialization-and-weight-decay)."""

    form: ClassVar[dict[str, Any]] = {"pos_embed": "sincos", "num_cls_tokens": 1}

    def __init__(self, **vit):
        shared = {"rel_pos_bias": "none", "k_bias": True, "global_pool": "token", "num_classes": 0}
        super().__init__(**vit, **shared, **self.form)

    def panels(self, images: Tensor, known: Tensor, predicted: Tensor) -> Reconstruction:
        """Return the images of predicted patches [B, N, P], those at positions `known` [B, V]
        being known."""
        patches = self.patch_embed.cut(images)
        seen = take(patches, known)
        masked = put(torch.zeros_like(patches), known, seen)
        pasted = put(predicted, known, seen)
        grid, patch = self.patch_embed.grid_size, self.patch_embed.patch_size
        panels = (unpatchify(panel, grid, patch) for panel in (masked, predicted, pasted))
        return Reconstruction(images, *panels)

    def no_weight_decay(self) -> set[str]:
        # the class and the mask token are decayed, the positions are not trained
        return set()

    def init_weights(self, init_scale: float) -> None:
        self.apply(self._init_module)
        nn.init.normal_(self.cls_token, std=0.02)

    def _init_module(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight.data.flatten(1))
        # the bias of the convolution keeps torch's default
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


USE_BOTTLENECK = Flag(
    "use_bottleneck", off="no_bottleneck",
    help="mask tokens attend to the class tokens only; without, the baseline of SemanticMIM",
)  # fmt: skip


class MAE(Predictor, PlainViT):
    """Masked autoencoder (CVPR 2022, arXiv 2111.06377).

    The encoder sees the visible patches only; a narrow decoder predicts the pixels of the others.
    Differences from the published code, all without effect on the numbers: only visible patches are
    projected; tokens carry their positions, so that the decoder takes them in the shuffled order
    and nothing is put back; its last block computes the masked tokens only, the others being keys
    and values; any grid, also one that is not square.

    use_bottleneck: the decoder gets of the encoder's tokens the class token only, as SemanticMIM's
    mask tokens do; this is ours.
    """

    form_name = "visible only + decoder"
    flags = (*Predictor.flags, USE_BOTTLENECK)
    own_target = "pixels"
    own_mask = "random"
    masks = MASKS | {"random": NoiseMask}
    equal_counts = True
    leaves_out = True
    head_name = "decoder_pred"
    not_exported = ("mask_token", "decoder_")
    predicts_pixels = True

    def __init__(
        self,
        *,
        use_bottleneck: bool = False,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        attn: str = "auto",
        **options,
    ):
        vit = self.take_options(options)
        super().__init__(mlp_ratio=mlp_ratio, qkv_bias=qkv_bias, attn=attn, **vit)
        self.use_bottleneck = use_bottleneck
        self.decoder_embed = nn.Linear(self.embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        self.decoder_pos_embed = self.decoder_positions(decoder_embed_dim)
        block = partial(
            Block, decoder_embed_dim, decoder_num_heads, mlp_ratio=mlp_ratio, qkv_bias=qkv_bias,
            k_bias=True, kernel=attn, drop=0.0, attn_drop=0.0, drop_path=0.0, init_values=None,
        )  # fmt: skip
        self.decoder_blocks = nn.ModuleList(block() for _ in range(decoder_depth))
        self.decoder_norm = nn.LayerNorm(decoder_embed_dim, eps=1e-6)
        self.make_target(self.embed_dim)
        self.add_head(decoder_embed_dim)
        for decoder in (self.decoder_embed, self.decoder_blocks, self.decoder_pred):
            decoder.apply(self._init_module)
        nn.init.normal_(self.mask_token, std=0.02)
        self.predicts_pixels = isinstance(self.target, Pixels)
        self.finish()
        self.mask_ratio = self.masking.mask_ratio

    def decoder_positions(self, width: int) -> nn.Parameter:
        """Return the decoder's positions [1, n + N, width]."""
        positions = sincos_pos_embed(width, self.patch_embed.grid_size)
        return nn.Parameter(positions, requires_grad=False)

    def forward(self, batch: dict[str, Tensor], noise: Noise = None) -> dict[str, Tensor]:
        """Return loss and metrics; `noise` replaces the view "noise" of the masks."""
        patches, order, visible = self.mask_patches(batch, noise)
        latent = self.forward_encoder(take(patches, order[:, :visible]), order[:, :visible])
        tokens = self.decode(latent, order, order.shape[1] - visible)
        return self.compare(tokens, {**batch, "patches": patches}, order[:, visible:])

    def mask_patches(
        self, batch: dict[str, Tensor], noise: Noise = None
    ) -> tuple[Tensor, Tensor, int]:
        """Return patches [B, N, P], positions of the tokens that take part [B, L], visible ones
        first, and how many those are."""
        return self.patch_embed.cut(batch["image"]), *self.visible_first(batch, noise)

    def random_masking(self, batch: dict[str, Tensor], noise: Noise = None) -> Tensor:
        """Return positions of the patches that take part, int64 [B, L], visible ones first."""
        return self.visible_first(batch, noise)[0]

    def forward_encoder(self, patches: Tensor, positions: Tensor) -> Tensor:
        """Return normed tokens [B, n + V, C] of visible patches [B, V, P] at positions [B, V]."""
        rows = positions_of(self.pos_embed, positions, self.num_prefix_tokens)
        return self.norm(self.run_blocks(self.embed(self.patch_embed.proj(patches), rows)))

    def forward_decoder(self, latent: Tensor, positions: Tensor, count: int) -> Tensor:
        """Return predictions [B, count, P] for the last `count` of the tokens at positions [B, L],
        the visible ones first."""
        return self.decoder_pred(self.decode(latent, positions, count))

    def decode(self, latent: Tensor, positions: Tensor, count: int) -> Tensor:
        """Return the tokens [B, count, D] that these predictions are made of."""
        if self.use_bottleneck:
            latent = latent[:, : self.num_prefix_tokens]
            positions = positions[:, -count:]
        x = self.decoder_embed(latent)
        rows = positions_of(self.decoder_pos_embed, positions, self.num_prefix_tokens)
        masked = self.mask_token.to(x.dtype).expand(len(x), rows.shape[1] - x.shape[1], -1)
        x = torch.cat((x, masked), dim=1) + rows
        *blocks, last_block = self.decoder_blocks
        for block in blocks:
            x = self._run_block(block, x)
        return self.decoder_norm(self._run_block(last_block, x, last=count))

    @torch.no_grad()
    def reconstruct(self, batch: dict[str, Tensor], noise: Noise = None) -> Reconstruction:
        """Predict every patch. Predictions of normalized pixels get the mean and std of the true
        patch."""
        patches, order, visible = self.mask_patches(batch, noise)
        latent = self.forward_encoder(take(patches, order[:, :visible]), order[:, :visible])
        predicted = self.forward_decoder(latent, order, order.shape[1]).float()
        predicted = self.target.restored(predicted, self.target.patches(batch["image"], order))
        predicted = put(torch.zeros_like(patches), order, predicted)
        return self.panels(batch["image"], order[:, :visible], predicted)


# --------------------------------------------------------------------------------------------------
# Pixio

NUM_CLS_TOKENS = Flag(
    "num_cls_tokens", type=int, help="number of class tokens; of SemanticMIM: the bottleneck"
)


class Pixio(MAE):
    """MAE with larger masked squares, several class tokens and a deep decoder (CVPR 2026,
    arXiv 2512.15715).

    Patches are masked in squares of `mask_grid` x `mask_grid`; each class token is trained, and
    encoder and decoder see all of them; the positions of both are learned. Differences from the
    published code, all without effect on the numbers: MAE's here; a grid need not be square.
    """

    form: ClassVar[dict[str, Any]] = {"pos_embed": "learned"}
    flags = (*MAE.flags, *SquareMask.flags, NUM_CLS_TOKENS)
    masks = MAE.masks | {"random": SquareMask}
    target_options: ClassVar[dict[str, Any]] = {"norm_pix_loss": True}

    def __init__(self, *, num_cls_tokens: int = 8, decoder_depth: int = 32, **mae):
        super().__init__(num_cls_tokens=num_cls_tokens, decoder_depth=decoder_depth, **mae)

    def decoder_positions(self, width: int) -> nn.Parameter:
        positions = nn.Parameter(torch.empty(1, self.pos_embed.shape[1], width))
        self._init_token(positions)
        return positions

    def init_weights(self, init_scale: float) -> None:
        super().init_weights(init_scale)
        self._init_token(self.pos_embed)


# --------------------------------------------------------------------------------------------------
# SemMAE


class SemMAE(MAE):
    """MAE with masks that follow semantic parts (NeurIPS 2022, arXiv 2206.10207): `PartMask`.

    Differences from the published code: images and part maps in place of packed tokens, so that
    crops are possible; any patch size and grid; the schedule's length is the run's, not 800; the
    sort that mends the counts is stable; `count_fix` "apportion" needs no mending.
    """

    own_mask = "parts"


# --------------------------------------------------------------------------------------------------
# SemAIM, SAIM, ViT-iGPT

ATTENTION_MAPS = ("cls", "gap", "self")
ORDER_PRECISIONS = ("fp32", "auto")
PREDICTION_HEADS = ("MLP", "LINEAR")


class QueryAttention(Attention):
    """Attention with three projections in place of the joint one, so that keys and values can come
    from elsewhere."""

    def __init__(self, dim: int, num_heads: int, **options):
        super().__init__(dim, num_heads, **options)
        del self.qkv
        self.q, self.k, self.v = (nn.Linear(dim, dim) for _ in range(3))

    def forward(
        self, x: Tensor, context: Tensor, mask: Tensor | None = None, *, causal: bool = False
    ) -> Tensor:
        return self.attend(*self.project(x, context=context), mask, causal)

    def project(
        self, x: Tensor, last: int | None = None, context: Tensor | None = None
    ) -> list[Tensor]:
        queries, context = x if last is None else x[:, -last:], x if context is None else context
        return [self.split_heads(t) for t in (self.q(queries), self.k(context), self.v(context))]


class QueryBlock(Block):
    """A block whose tokens [B, T, C] attend to `context` [B, S, C], by default themselves; both
    pass the same norm."""

    attention = QueryAttention

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        last: int | None = None,
        *,
        context: Tensor | None = None,
        causal: bool = False,
    ) -> Tensor:
        keys = self.norm1(x if context is None else context)
        x = x if last is None else x[:, -last:]
        queries = keys[:, -x.shape[1] :] if context is None else self.norm1(x)
        return self.add(x, self.attn(queries, keys, mask, causal=causal))


USE_EMA_MODEL = Flag(
    "use_ema_model",
    off="no_use_ema_model",
    help="keep an ema of the network; SemAIM's attention map comes from it",
)


class TwoStreams(PlainViT):
    """A ViT with two streams over an order of the patches (two-stream attention, arXiv 1906.08237).

    A patch of the content stream h attends to itself and to what is earlier; one of the query
    stream g begins as its position alone and attends to what of h is earlier. All see the class
    token, which sees itself only.

    query_depth: number of query blocks; one follows every k-th encoder block, and encoder blocks
        after the last of these are frozen.
    share_weight: the encoder blocks serve as query blocks.
    """

    flags = (
        Flag("query_depth", type=int, help="number of query blocks"),
        Flag("share_weight", off="no_share_weight", help="use the encoder blocks as query blocks"),
    )
    not_exported = ("query_blocks.",)

    def __init__(
        self,
        *,
        query_depth: int = 12,
        share_weight: bool = False,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        attn: str = "auto",
        **vit,
    ):
        super().__init__(mlp_ratio=mlp_ratio, drop_path=drop_path, attn=attn, **vit)
        depth = len(self.blocks)
        self.share_weight = share_weight
        self.blocks_per_query = blocks_per_query(depth, query_depth)
        block = partial(
            QueryBlock, self.embed_dim, self.blocks[0].attn.num_heads, mlp_ratio=mlp_ratio,
            drop=0.0, attn_drop=0.0, init_values=None, qkv_bias=True, k_bias=True, kernel=attn,
        )  # fmt: skip
        rates = drop_path_rates(drop_path, depth)
        rates = rates if share_weight else rates[:query_depth]
        blocks = nn.ModuleList(block(drop_path=rate) for rate in rates).apply(self._init_module)
        if share_weight:
            self.blocks = blocks
        else:
            self.query_blocks = blocks
        self.blocks[self.blocks_per_query * query_depth :].requires_grad_(False)

    def causal_streams(self, images: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return h [B, N, C] of the class token and all patches but the last, and g [B, N, C], of
        patches sorted by the order: `positions` [B, N].

        Row r of h is the r-th patch, 0 the class token, and row r of g the (r + 1)-th: both see
        rows 0 ... r of h. The last patch is seen by none.
        """
        seen = positions[:, :-1]
        patches = take(self.patch_embed.cut(images), seen)
        h = self.embed(self.patch_embed.proj(patches), positions_of(self.pos_embed, seen))
        return self.run_streams(h, self.pos_embed[0, 1 + positions])

    def masked_streams(self, images: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
        """Return h and g, each [B, T, C], in row-major order, by explicit masks made of order
        values [B, N]; patches of equal values see each other in h only."""
        h = self.embed(self.patch_embed(images), self.pos_embed)
        mask_h = additive_mask(visible_patches(order, itself=True))
        mask_g = additive_mask(visible_patches(order, itself=False))
        return self.run_streams(h, self.pos_embed.expand_as(h), mask_h, mask_g)

    def run_streams(
        self, h: Tensor, g: Tensor, mask_h: Tensor | None = None, mask_g: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return both streams after the last block, without norm; masks [B, 1, T, T], None for
        causal attention."""
        query_blocks = self.blocks if self.share_weight else self.query_blocks
        for depth, block in enumerate(self.blocks, 1):
            h = self._run_block(block, h, mask_h, causal=mask_h is None)
            query, rest = divmod(depth, self.blocks_per_query)
            if rest == 0:
                query_block = query_blocks[query - 1]
                g = self._run_block(query_block, g, mask_g, context=h, causal=mask_g is None)
        return h, g


class SemAIM(Predictor, TwoStreams):
    """Semantic-aware autoregressive image modelling (AAAI 2024, arXiv 2312.10457).

    Each image has an order of its patches, and each patch is predicted from its position and all
    earlier patches, all of them at once by two streams. The order follows the network's attention,
    so that patches of one object come together; SAIM is the order "stochastic", ViT-iGPT "zigzag".

    permutation_type: the order; those with "attention" follow the attention map.
    attention_type: the map: similarity of the patches to the class token ("cls") or to their mean
        ("gap"), or the last block's self-attention from the class token ("self").
    order_precision: "fp32", or "auto", which lets the pass for the map be autocast.
    use_ema_model: keep an ema of the network; it gives the map.
    prediction_head_type: "MLP" or "LINEAR".
    attn: with "eager", and with orders in which ties are the rule, the streams run under explicit
        masks; otherwise tokens are sorted by the order, which makes the attention causal.

    Differences from the published code: docs/methods/semaim.md#differences-from-the-published-code.
    """

    flags = (
        Flag(
            "permutation_type", choices=PATCH_ORDERS,
            help="order of the patches; zigzag is row-major, raster serpentine; attention_center "
            "is SemAIM's",
        ),
        Flag(
            "attention_type", choices=ATTENTION_MAPS,
            help="attention map of the order: similarity to the class token or to the mean, or "
            "self-attention",
        ),
        Flag(
            "order_precision", choices=ORDER_PRECISIONS,
            help="precision of the pass for the attention map; auto: --precision",
        ),
        USE_EMA_MODEL,
        *TwoStreams.flags,
        Flag("prediction_head_type", choices=PREDICTION_HEADS, help="a layer or an MLP"),
        *Predictor.flags,
    )  # fmt: skip
    form_name = "two causal streams"
    own_target = "pixels"
    own_mask = "none"
    in_order = True
    target_options: ClassVar[dict[str, Any]] = {"norm_pix_loss": True, "mean_by_patch": True}
    ignored = Predictor.ignored | {"target_precision", "image_mean_std", "out_dim"}
    head_name = "prediction_head"
    not_exported = (*TwoStreams.not_exported, "gaussian_blur.")
    predicts_pixels = True
    known_ratio = 0.25  # of the patches in `reconstruct`, as many as MAE's encoder sees

    def __init__(
        self,
        *,
        permutation_type: str = "attention_center",
        attention_type: str = "cls",
        order_precision: str = "fp32",
        use_ema_model: bool = False,
        prediction_head_type: str = "MLP",
        mlp_ratio: float = 4.0,
        attn: str = "auto",
        **options,
    ):
        streams = self.take_options(options)
        super().__init__(mlp_ratio=mlp_ratio, attn=attn, **streams)
        check_choice("permutation_type", permutation_type, PATCH_ORDERS)
        check_choice("attention_type", attention_type, ATTENTION_MAPS)
        check_choice("order_precision", order_precision, ORDER_PRECISIONS)
        check_choice("prediction_head_type", prediction_head_type, PREDICTION_HEADS)
        self.permutation_type = permutation_type
        self.attention_type = attention_type
        self.order_precision = order_precision
        self.prediction_head_type = prediction_head_type
        self.explicit_masks = attn == "eager" or permutation_type in ORDERS_WITH_TIES
        self.make_target(self.embed_dim)
        self.predicts_pixels = isinstance(self.target, Pixels)
        self.gaussian_blur = self.target.blur if self.predicts_pixels else None
        self.add_head(self.embed_dim).apply(self._init_module)
        self.finish()
        self.use_ema_model = use_ema_model
        self.noise_sizes = order_noise_sizes(permutation_type, self.patch_embed.num_patches)
        self.noise_size = sum(self.noise_sizes)
        self.views = (*self.views, "noise") if self.noise_size else self.views
        if use_ema_model and self.ema is None:
            self.ema = MovingAverage(self)
        self.before_epoch(0, 1)

    def build_head(self, dim: int) -> nn.Module:
        """Build the target's head; where that is a linear layer, `prediction_head_type` counts."""
        if self.prediction_head_type == "LINEAR" or type(self.target).head is not Target.head:
            return self.target.head(dim)
        return Mlp(dim, self.blocks[0].mlp.fc1.out_features, 0.0, self.target.width)

    def forward(self, batch: dict[str, Tensor], noise: Noise = None) -> dict[str, Tensor]:
        """Return loss and metrics; `noise` replaces the random noise of `order_values`."""
        attention, target = self.attention_and_target(batch)
        order = self.order_values(batch, attention, noise)  # [B, N], smaller is earlier
        tokens, positions = self.predicting(batch["image"], order)
        if positions is not None:
            target = self.target.at(target, positions)
        return self.target.score(self.prediction_head, tokens, target, positions)

    def predicting(self, images: Tensor, order: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return normed tokens [B, N, C] that patches are predicted from, and the positions [B, N]
        of these patches, None for row-major order."""
        if self.explicit_masks:
            positions = None
            g = self.masked_streams(images, order)[1][:, 1:]
        else:
            positions = order.argsort(dim=1, stable=True)
            g = self.causal_streams(images, positions)[1]
        return self.norm(g), positions

    # -- the order

    @torch.no_grad()
    def attention_and_target(self, batch: dict[str, Tensor]) -> tuple[Tensor | None, Tensor]:
        """Return the attention map [B, N], None for orders without one, and the target [B, N, P],
        both of the unmasked image."""
        return self.attention_map(batch["image"]), self.target.of(batch, None, self)

    @torch.no_grad()
    def attention_map(self, images: Tensor) -> Tensor | None:
        """Return the map [B, N] that the order follows, None for orders without one."""
        if not self.permutation_type.startswith("attention"):
            return None
        network = self if self.teacher is None else self.teacher
        # weights that an engine has rounded stay as they are
        weight = network.patch_embed.proj.weight
        exact = self.order_precision == "fp32" and weight.dtype == torch.float32
        with evaluating(network), disabled_autocast(weight.device) if exact else nullcontext():
            return network.own_attention(images)

    def own_attention(self, images: Tensor) -> Tensor:
        """Return the network's own map [B, N], computing of the last block what it takes."""
        x = self.before_last_block(images)
        if self.attention_type == "self":
            return class_attention(self.blocks[-1], x)
        patches_only = self.patch_embed.num_patches if self.attention_type == "gap" else None
        return self.similarity_map(self.norm(self.blocks[-1](x, last=patches_only)))

    def before_last_block(self, images: Tensor) -> Tensor:
        """Return the tokens [B, T, C] of unmasked images that the last block sees."""
        x = self.embed(self.patch_embed(images), self.pos_embed)
        for block in self.blocks[:-1]:
            x = block(x)
        return x

    def similarity_map(self, tokens: Tensor) -> Tensor:
        """Return the similarity [B, N] of normed patch tokens to the class token or their mean."""
        patches = tokens[:, -self.patch_embed.num_patches :]
        query = patches.mean(1, keepdim=True) if self.attention_type != "cls" else tokens[:, :1]
        return similarity(query, patches).softmax(-1)

    def order_values(
        self, batch: dict[str, Tensor], attention: Tensor | None, noise: Noise = None
    ) -> Tensor:
        """Return order values [B, N]. `noise`: uniform noise [B, N], for "stochastic_center" a
        pair with noise [B, 2] of the center."""
        images = batch["image"]
        if noise is None and self.noise_size:
            noise = self.noise_of(batch).split(self.noise_sizes, dim=1)
        if not isinstance(noise, tuple):
            noise = (noise,)
        noise_patches, noise_center = (*noise, None, None)[:2]
        order = patch_order(
            self.permutation_type, self.patch_embed.grid_size, noise_patches, attention,
            noise_center, images.device,
        )  # fmt: skip
        return order.to(images.device).expand(len(images), -1)

    def orders(self, batch: dict[str, Tensor]) -> Tensor:
        return self.order_values(batch, self.attention_and_target(batch)[0])

    # -- what is predicted

    @torch.no_grad()
    def reconstruct(self, batch: dict[str, Tensor], noise: Noise = None) -> Reconstruction:
        """Predict every patch, each from all earlier ones; the first `known_ratio` of the order
        counts as known.

        The predictions are of the blurred image, and of normalized pixels they get the blurred
        patch's own statistics.
        """
        assert self.predicts_pixels, type(self).__name__
        images = batch["image"]
        order = self.order_values(batch, self.attention_map(images), noise)
        tokens, positions = self.predicting(images, order)
        predicted = self.prediction_head(tokens).float()
        if positions is not None:
            predicted = put(torch.zeros_like(predicted), positions, predicted)
        predicted = self.target.restored(predicted, self.target.patches(images))
        known = order.argsort(dim=1, stable=True)[:, : round(self.known_ratio * order.shape[1])]
        return self.panels(images, known, predicted)

    # -- the ema

    def before_epoch(self, epoch: int, epochs: int) -> None:
        """Raise the decay of the ema for a hundred epochs, however long the run
        (docs/methods/semaim.md#moving-average)."""
        self.ema_decay = 0.999 + 0.0009 * min(epoch / 100, 1.0)

    def after_step(self, progress: float, applied: float | Tensor = 1.0) -> None:
        """Update the ema that `use_ema_model` keeps by this decay, one of the target alone by its
        own momentum."""
        if self.use_ema_model:
            self.ema.update(self.ema_decay, applied)
        else:
            super().after_step(progress, applied)


class PresentFeatures(OwnFeatures):
    """Features of the network itself, as it is."""

    uses_ema = False


class FeatureSemAIM(SemAIM):
    """SemAIM that predicts the features of an unmasked image in place of its pixels.

    The options of pixels have no effect. With "dino" and "clip" the order follows the similarity of
    that model's patch tokens to its class token, and `attention_type` has no effect.

    predict_feature: "inference" and "ema" are the normed tokens of the network or of its ema,
        "dino" and "clip" those of `target_model`; see `TeacherTokens` for its options.
    """

    flags = (
        *SemAIM.flags,
        Flag(
            "predict_feature", choices=PREDICTED_FEATURES,
            help="predict features in place of pixels: of the network, its ema, a DINO or a CLIP "
            "model",
        ),
    )  # fmt: skip
    targets = TARGETS | {"inference": PresentFeatures}
    target_options: ClassVar[dict[str, Any]] = {}

    def __init__(self, *, predict_feature: str, use_ema_model: bool = False, **semaim):
        check_choice("predict_feature", predict_feature, PREDICTED_FEATURES)
        if predict_feature == "ema" and not use_ema_model:
            raise OptionError(
                "predict_feature", "ema", "needs the ema that use_ema_model keeps", "use_ema_model"
            )
        source = semaim.get("target_model")
        if predict_feature not in TEACHERS:
            check_no_target_model(semaim.pop("target_model", None))
        elif source is None and semaim.get("out_dim") is None:
            problem = "needs target_model: a file or timm's name"
            raise OptionError("predict_feature", predict_feature, problem, "target_model")
        self.predict_feature = predict_feature
        super().__init__(use_ema_model=use_ema_model, **semaim | {"target": predict_feature})

    @torch.no_grad()
    def attention_and_target(self, batch: dict[str, Tensor]) -> tuple[Tensor | None, Tensor]:
        if self.predict_feature in TEACHERS:
            tokens = self.target.tokens(batch)
            return stretched(similarity(tokens[:, :1], tokens[:, 1:])), tokens[:, 1:]
        network = self.teacher if self.predict_feature == "ema" else self
        with evaluating(network):
            attention, tokens = network.attention_and_tokens(batch["image"])
        return attention, tokens[:, 1:]

    def attention_and_tokens(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the network's own map [B, N] and normed tokens [B, T, C] from one pass."""
        x = self.before_last_block(images)
        tokens = self.norm(self.blocks[-1](x))
        if self.attention_type == "self":
            return class_attention(self.blocks[-1], x), tokens
        return self.similarity_map(tokens), tokens


def build_semaim(*, predict_feature: str = "none", target: str | None = None, **semaim) -> SemAIM:
    """Build SemAIM, or FeatureSemAIM for any other `predict_feature` than "none", which says the
    same as `target` for features."""
    if target is not None:
        predict_feature = target if target in PREDICTED_FEATURES else "none"
    if predict_feature == "none":
        check_no_target_model(semaim.pop("target_model", None))
        return SemAIM(target=target, **semaim)
    if target == "ema":
        semaim["use_ema_model"] = True
    return FeatureSemAIM(predict_feature=predict_feature, **semaim)


def check_no_target_model(source: str | None) -> None:
    """Raise an OptionError if a target model is given that nothing is predicted of."""
    if source is not None:
        problem = f"is of no use without predict_feature {' or '.join(TEACHERS)}"
        raise OptionError("target_model", source, problem, "predict_feature")


def order_noise_sizes(kind: str, patches: int) -> tuple[int, ...]:
    """Return how much noise an order takes for each image: for its patches, and for the row and
    column of its center."""
    if kind in ORDERS_WITHOUT_NOISE:
        return ()
    return (patches, 2) if kind == "stochastic_center" else (patches,)


def blocks_per_query(depth: int, query_depth: int) -> int:
    """Return how many encoder blocks lie between two query blocks, which must not outnumber
    them."""
    step = depth // query_depth if query_depth > 0 else 0
    if step == 0 or depth // step > query_depth:
        raise OptionError(
            "query_depth", query_depth, f"does not divide {depth} blocks; use a divisor of {depth}"
        )
    return step


def class_attention(block: Block, x: Tensor) -> Tensor:
    """Return how much the class token of x [B, T, C] attends to each patch in this block, mean over
    heads: [B, N]."""
    q, k, _ = block.attn.project(
        block.norm1(x.roll(-1, dims=1)), last=1
    )  # the class token comes last
    return block.attn.probabilities(q, k, None)[:, :, 0, :-1].mean(1)


def similarity(query: Tensor, patches: Tensor) -> Tensor:
    """Return the cosine of [B, 1, C] with each of [B, N, C]: [B, N], in float32."""
    return (F.normalize(query.float(), dim=-1) * F.normalize(patches.float(), dim=-1)).sum(-1)


def disabled_autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, enabled=False)


def additive_mask(visible: Tensor) -> Tensor:
    """Return 0 where bool [B, T, T] is True, else -inf, for all heads: [B, 1, T, T]."""
    return (
        torch.zeros_like(visible, dtype=torch.float32)
        .masked_fill_(~visible, -math.inf)
        .unsqueeze(1)
    )


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Switch dropout and stochastic depth off inside. A network that has neither is left alone."""
    training = network.training
    if not (training and is_random(network)):
        yield
        return
    network.eval()
    try:
        yield
    finally:
        network.train(training)


def is_random(network: nn.Module) -> bool:
    """Return whether a ViT drops something in training: all blocks are built with the same rates of
    dropout."""
    rates = [network.pos_drop.p]
    for block in network.blocks:
        rates += [
            block.attn.attn_drop,
            block.attn.proj_drop.p,
            block.mlp.drop.p,
            block.drop_path.drop_prob,
        ]
    return any(rates)


# --------------------------------------------------------------------------------------------------
# NEPA


class NEPA(PretrainMethod, RotaryViT):
    """Next-embedding prediction (arXiv 2512.16922).

    A causal ViT reads the class token and the patches row by row; what it returns at each token is
    compared with the embedding of the next patch, as it enters the first block. There is no mask,
    decoder, teacher or pixel target. use_ema_model: keep an ema of the network, which is exported.
    causal: off, every token sees all. `forward_features` is that of the exported encoder, not
    causal.
    Differences from the published code: docs/methods/nepa.md#differences-from-the-published-code.
    """

    flags = (USE_EMA_MODEL,)
    ema_decay = 0.9999

    def __init__(
        self,
        *,
        use_ema_model: bool = False,
        causal: bool = True,
        init_values: float | None = 1e-5,
        pos_rescale: float | None = 2.0,
        **vit,
    ):
        # a second class token would be the target of the first
        form = {"num_classes": 0, "global_pool": "token", "num_cls_tokens": 1}
        super().__init__(init_values=init_values, pos_rescale=pos_rescale, **vit, **form)
        self.causal = causal
        self.noise_size = self.rope.noise_size
        self.views = ("image", "noise") if self.noise_size else ("image",)
        self.ema = MovingAverage(self) if use_ema_model else None
        if self.ema is not None:
            self.teacher.eval()

    def forward(self, batch: dict[str, Tensor], noise: Tensor | None = None) -> dict[str, Tensor]:
        """Return loss and metrics; `noise` [B, noise_size] replaces that of the positions, which
        only training has."""
        changes = None
        if self.training and self.noise_size:
            changes = self.rope.draw(self.noise_of(batch) if noise is None else noise)
        embeddings = self.embed(self.patch_embed(batch["image"]), None)  # [B, 1 + N, C]
        predicted = self.norm(self.run_blocks(embeddings, changes, causal=self.causal))
        return self.compare(predicted[:, :-1], embeddings[:, 1:].detach())

    def compare(self, predicted: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return minus the mean cosine of [B, N, C] with [B, N, C] in float32, and the mean cosine
        of targets of different images: 1 after a collapse."""
        with torch.autocast(predicted.device.type, enabled=False):
            predicted, target = (
                F.normalize(x.float(), dim=-1, eps=1e-12) for x in (predicted, target)
            )
            loss = -(predicted * target).sum(-1).mean()
            images = len(target)
            pairs = target.sum(0).square().sum(-1).mean() - images
        return {"loss": loss, "target_cos": pairs / max(images * (images - 1), 1)}

    def after_step(self, progress: float, applied: float | Tensor = 1.0) -> None:
        """Update the ema, which begins as a copy after the first step."""
        if self.ema is not None:
            self.ema.update(self.ema_decay if progress > 0 else 0.0, applied)

    def timm_arguments(self, encoder: dict[str, Tensor]) -> dict[str, Any]:
        """Return the arguments of `timm.create_model` for an exported encoder, which timm's `Eva`
        loads strictly; it is not causal."""
        block = self.blocks[0]
        gated = hasattr(block.mlp, "fc1_g")
        return {
            "model_name": "eva_giant_patch14_224",
            "img_size": list(self.patch_embed.img_size),
            "patch_size": list(self.patch_embed.patch_size),
            "in_chans": self.patch_embed.proj.in_channels,
            "embed_dim": self.embed_dim,
            "depth": len(self.blocks),
            "num_heads": block.attn.num_heads,
            "num_classes": 0,
            "global_pool": "token",
            "mlp_ratio": (block.mlp.fc2.in_features + 0.5) / self.embed_dim,
            "swiglu_mlp": gated,
            "swiglu_align_to": int(gated),  # the form with separate layers
            "qkv_bias": block.attn.qkv.bias is not None,
            "qk_norm": isinstance(block.attn.q_norm, nn.LayerNorm),
            "init_values": None if block.gamma_1 is None else 1e-5,
            "attn_type": "rope",
            "use_abs_pos_emb": False,
            "use_rot_pos_emb": True,
            "rope_type": "dinov3",
            "rope_rotate_half": True,
            "rope_temperature": self.rope.theta,
        }


# --------------------------------------------------------------------------------------------------
# BEiT


class BEiT(MaskedImageModel):
    """BERT pre-training of image transformers (ICLR 2022, arXiv 2106.08254).

    Every patch passes the blocks, the masked ones as a mask token; of these the visual token is
    predicted. Differences from the published code, without effect on the numbers: the MLP of the
    last block, the last norm and the head see masked patches only; so does the tokenizer's last
    layer.
    """

    own_target = "tokens"


# --------------------------------------------------------------------------------------------------
# SemanticMIM and its baselines


class SemanticMIM(Predictor, VisionTransformer):
    """Masked image modelling through a bottleneck (arXiv 2406.10673): what its two forms share
    (docs/methods/beit_maskfeat_semanticmim.md#two-forms).

    The encoder sees class tokens and visible patches. With `use_bottleneck` mask tokens pass blocks
    of their own, in which they attend to the class tokens, of the encoder's block of the same
    depth, and to each other: image information reaches them only through the class tokens. Without
    it all tokens pass the same blocks, which is the baseline. Where "mask" [B, gh, gw] is True a
    patch is not visible; predicted are the same patches or, with `separate_mask`, those of
    "target_mask". Every image must have as many of either. Differences from the published code,
    without effect on the numbers: only visible patches are projected; the encoder's last block
    computes no more than what is looked at; stochastic depth acts once on the MLP, not twice; any
    grid.
    """

    form_name = "class-token bottleneck"
    own_mask = "random"
    equal_counts = True
    flags = (
        *Predictor.flags,
        Flag("separate_mask_ratio", "separate_mask", convert=lambda ratio, run: True),
        NUM_CLS_TOKENS,
        USE_BOTTLENECK,
    )
    not_exported = ("mask_token", "mask_blocks.")

    def __init__(
        self,
        *,
        use_bottleneck: bool = True,
        separate_mask: bool = False,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path: float = 0.0,
        init_values: float | None = None,
        attn: str = "auto",
        **options,
    ):
        vit = self.take_options(options)
        form = {
            "pos_embed": "learned",
            "rel_pos_bias": "none",
            "global_pool": "token",
            "num_classes": 0,
        }
        shared = {"mlp_ratio": mlp_ratio, "qkv_bias": qkv_bias, "init_values": init_values}
        super().__init__(drop_path=drop_path, attn=attn, **shared, **vit, **form)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, self.embed_dim))
        self._init_token(self.mask_token)
        self.mask_blocks = None
        if use_bottleneck:
            own = self.blocks[0].attn
            block = partial(
                Block, self.embed_dim, own.num_heads, drop=0.0, attn_drop=0.0, kernel=attn,
                k_bias=own.q_bias is None, **shared,
            )  # fmt: skip
            rates = drop_path_rates(drop_path, len(self.blocks))
            self.mask_blocks = nn.ModuleList(block(drop_path=rate) for rate in rates).apply(
                self._init_module
            )
            self._rescale(self.mask_blocks)
        self.make_target(self.embed_dim)
        self.add_head(self.embed_dim).apply(self._init_module)
        self.finish()
        self.views = (*self.views, "target_mask") if separate_mask else self.views

    def forward(self, batch: dict[str, Tensor], noise: Noise = None) -> dict[str, Tensor]:
        """Return loss and metrics; `noise` replaces the view "noise" of masks made here."""
        batch = self.hide(batch, noise)
        visible, predicted = self.patch_positions(batch)
        return self.compare(self.encode(batch["image"], visible, predicted), batch, predicted)

    def patch_positions(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return positions of the visible patches, int64 [B, V], and of those that are predicted,
        [B, M], in row-major order."""
        hidden, count = common_count(batch, "mask")
        visible, _ = masked_positions(~hidden, hidden.shape[1] - count)
        predicted, _ = masked_positions(
            *common_count(batch, "target_mask" if "target_mask" in batch else "mask")
        )
        return visible, predicted

    def encode(self, images: Tensor, visible: Tensor, predicted: Tensor) -> Tensor:
        """Return normed mask tokens [B, M, C] at the positions `predicted`, from the patches at
        the positions `visible`."""
        patches = self.patch_embed.proj(take(self.patch_embed.cut(images), visible))
        x = self.embed(patches, positions_of(self.pos_embed, visible, self.num_prefix_tokens))
        masked = self.mask_token + self.pos_embed[0, self.num_prefix_tokens + predicted]
        if self.mask_blocks is None:
            return self.norm(self.run_blocks(torch.cat((x, masked), dim=1), last=masked.shape[1]))
        return self.norm(self.run_bottleneck(x, masked))

    def run_bottleneck(self, x: Tensor, masked: Tensor) -> Tensor:
        """Return the mask tokens [B, M, C] after the last block, of class and visible tokens [B, n
        + V, C] and mask tokens [B, M, C].

        Inside, the class tokens come last among the visible ones and first among the mask tokens,
        so that in both streams what is wanted of a block is at the end.
        """
        num_cls, count = self.num_prefix_tokens, masked.shape[1]
        x, last_block = x.roll(-num_cls, dims=1), self.blocks[-1]
        for block, mask_block in zip(self.blocks, self.mask_blocks, strict=True):
            x = self._run_block(block, x, last=num_cls if block is last_block else None)
            masked = self._run_block(
                mask_block, torch.cat((x[:, -num_cls:], masked), dim=1), last=count
            )
        return masked


class SemanticBEiT(SemanticMIM):
    """SemanticMIM and its baseline in BEiT's form: layer scale, keys without a bias, visual
    tokens."""

    own_target = "tokens"

    def _init_module(self, module: nn.Module) -> None:
        super()._init_module(module)
        if isinstance(module, nn.Conv2d):
            self._init_token(module.weight)
            nn.init.zeros_(module.bias)
        if isinstance(module, Mlp):  # after its layers, whose start it replaces
            for layer in (module.fc1, module.fc2):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.normal_(layer.bias, std=1e-6)


class MaskFeat(SemanticMIM):
    """Masked feature prediction (CVPR 2022, arXiv 2112.09133), the baseline, and SemanticMIM in its
    form: keys with a bias, no layer scale, histograms of oriented gradients of the normalized image
    (docs/methods/beit_maskfeat_semanticmim.md#hog)."""

    own_target = "hog"

    def __init__(self, **semantic):
        super().__init__(**semantic, k_bias=True)

    def no_weight_decay(self) -> set[str]:
        return {"mask_token"}  # class tokens and positions are decayed

    def _init_module(self, module: nn.Module) -> None:
        super()._init_module(module)
        if isinstance(module, nn.Conv2d):  # its bias keeps torch's start
            self._init_token(module.weight)

    def _rescale(self, blocks: nn.ModuleList) -> None:
        """Leave the blocks as they are, unlike BEiT."""


# --------------------------------------------------------------------------------------------------
# SimMIM and A2MIM

_UNDECAYED = {"weight_decay": 0.0}
_NORM_NAMES = r"(bn|ln|gn)(\d+)?.(weight|bias)"
# What the published optimizers exempt, by a search in the names; the token's and gamma's rules
# follow (docs/methods/simmim_a2mim.md#weight-decay).
_RULES = {
    "vit": (_NORM_NAMES, "norm", "bias", "pos_embed", "cls_token", "gamma"),
    "swin": ("norm", "bias", "absolute_pos_embed", "relative_position_bias_table"),
    "convnext": (_NORM_NAMES, "bias", "gamma"),
    "cnn": (_NORM_NAMES, "bias"),
}


class SimMIM(Predictor):
    """Predicts the pixels of masked squares from the other features of any backbone
    (docs/methods/simmim_a2mim.md).

    A token takes the place of masked features in between two stages of the backbone; a neck of one
    convolution makes pixels of its last map. `backbone` is one of `MIM_VIT_SIZES` or a name of
    timm; options not named here are its own. mask_layer, mask_token, replace, mask_init, detach,
    token_std: see `MaskToken`, and `Place` of the backbone. kernel, decoder_kernel: see
    `PixelNeck`. token_lr, gamma_lr: factors of the learning rate of token and gamma; with gamma_lr
    None gamma has no rule of its own, and is decayed unless the backbone's rules say otherwise.
    Pixels as they are, under the L1 loss, come from `PixelNeck` and pass `ReconstructionLoss`; any
    other target is that of each of the patches which a mask hides or shows, of tokens from
    `CellNeck`.
    """

    form_name = "token between stages"
    own_target = "pixels"
    target_options: ClassVar[dict[str, Any]] = {"loss_type": "L1"}
    not_exported = ("inject.", "neck.")
    predicts_pixels = True
    fills_input = False

    def __init__(
        self,
        *,
        backbone: str,
        input_size=224,
        mask_layer: int = 0,
        mask_token: str = "learnable",
        replace: bool = True,
        mask_init: float = 0.0,
        detach: bool = False,
        token_std: float = 0.02,
        kernel: int = 1,
        decoder_kernel: int | None = None,
        token_lr: float = 1.0,
        gamma_lr: float | None = None,
        drop_path: float = 0.0,
        attn: str = "auto",
        grad_checkpointing: bool = False,
        **options,
    ):
        options = self.take_options(options)
        super().__init__()
        self.token_lr, self.gamma_lr, self.input_size = token_lr, gamma_lr, to_pair(input_size)
        self.channels = options.get("in_chans", 3)
        self.backbone = build_backbone(
            backbone,
            self.input_size,
            drop_path=drop_path,
            attn=attn,
            grad_checkpointing=grad_checkpointing,
            **options,
        )
        width, stride = map_of(self.backbone)
        if any(side % stride for side in self.input_size):
            raise OptionError(
                "input_size",
                self.input_size,
                f"is not a multiple of {stride}, the backbone's last stride",
            )
        self.inject = MaskToken(
            place_of(self.backbone, mask_layer), kind=mask_token, replace=replace,
            mask_init=mask_init, detach=detach, token_std=token_std,
        )  # fmt: skip
        self.inject.attach(self.backbone)
        self.check_place(backbone)
        finer = CellNeck.ratio(stride, self.inject.place.stride)
        self.make_target(CellNeck.width_of(width, finer))
        self.predicts_pixels = isinstance(self.target, Pixels) and self.target.is_plain
        if self.predicts_pixels:
            self.neck = PixelNeck(
                width, stride, channels=self.channels, kernel=kernel, decoder_kernel=decoder_kernel
            )
            self.loss = ReconstructionLoss(fft_weight=self.target.fft_weight)
        else:
            self.neck = CellNeck(width, finer)
            self.add_head(self.neck.width).apply(self._init_module)
        self.finish()

    @torch.no_grad()
    def check_place(self, name: str) -> None:
        """Raise an OptionError if the features where the token goes in are not a map, as in some
        of timm's networks."""
        if not is_listed_by_timm(self.backbone):
            return
        place, training = self.inject.place, self.training
        mask = torch.ones(1, *(side // place.stride for side in self.input_size))
        problem = f"there is no place for a mask token after {place.module} of {name}"
        with refused(OptionError("backbone", None, problem)):
            self.eval().features(torch.zeros(1, self.channels, *self.input_size), mask)
        self.train(training)
        self.inject.mask = None

    @property
    def image_size(self) -> tuple[int, int]:
        return self.input_size

    @property
    def image_channels(self) -> int:
        return self.channels

    @property
    def cell_size(self) -> tuple[int, int]:
        return (self.inject.place.stride,) * 2

    @property
    def finer_patches(self) -> str:
        """Say how a CNN's patches, as large as the stride where the token goes in, get smaller."""
        side = self.inject.place.stride
        if isinstance(self.backbone, VisionTransformer) or side <= 8:
            return ""
        return (
            f"; a patch of this backbone is {side}x{side} pixels, the stride where the mask token "
            "goes in: --model_kwargs output_stride=8 makes it 8x8 in ResNets, RegNets and "
            "ConvNeXts, and --mask_patch_size can be 8 then"
        )

    def _init_module(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)

    def forward(self, batch: dict[str, Tensor], noise: Noise = None) -> dict[str, Tensor]:
        """Return loss and metrics; `noise` replaces the view "noise" of masks made here."""
        batch = self.hide(batch, noise)
        images, mask = batch["image"], batch["mask"]
        features = self.features(images, mask)
        if self.predicts_pixels:
            out = self.loss(self.predict(features, images), images, mask)
            return out | self.masking.metrics(out["loss"])
        positions, counts = masked_positions(
            mask.flatten(1).bool(), self.most_masked or batch.get("max_masked")
        )
        return self.compare(take(self.neck(features), positions), batch, positions, counts)

    def whole(self, images: Tensor) -> Tensor:
        """Return features [B, N, D] of each patch that a mask hides or shows."""
        features = self.features(images, None)
        if not self.predicts_pixels:
            return self.neck(features)
        return F.interpolate(features, self.cell_grid, mode="nearest").flatten(2).transpose(1, 2)

    def features(self, images: Tensor, mask: Tensor | None) -> Tensor:
        """Return the last map [B, C, h, w] of images [B, 3, H, W] masked by [B, rows, columns], or
        whole ones."""
        self.inject.mask = mask
        return family_of(self.backbone).feature_map(self.backbone, self.seen(images, mask))

    def seen(self, images: Tensor, mask: Tensor | None) -> Tensor:
        """Return the images that the backbone gets."""
        return mean_filled(images, mask) if self.fills_input and mask is not None else images

    def predict(self, features: Tensor, images: Tensor) -> Tensor:
        """Return predicted pixels [B, 3, H, W]."""
        return self.neck(features)

    @torch.no_grad()
    def reconstruct(self, batch: dict[str, Tensor], noise: Noise = None) -> Reconstruction:
        batch = self.hide(batch, noise)
        images, mask = batch["image"], batch["mask"]
        predicted = self.predict(self.features(images, mask), images).float()
        hidden = enlarged(mask, images.shape[-2:]).bool().unsqueeze(1)
        return Reconstruction(
            images, images.masked_fill(hidden, 0), predicted, torch.where(hidden, predicted, images)
        )

    # -- what optimizers and exporters ask

    def param_rules(self) -> dict[str, dict[str, float]]:
        """Return the published rules of decay and learning rate, by what is found in a parameter's
        name."""
        rules = dict.fromkeys(_RULES[family_of(self.backbone).rules], _UNDECAYED)
        rules["mask_token"] = _UNDECAYED | {"lr_mult": self.token_lr}
        return (
            rules
            if self.gamma_lr is None
            else rules | {"mask_gamma": _UNDECAYED | {"lr_mult": self.gamma_lr}}
        )

    def encoder_state_dict(self, weights: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Return the backbone under its own names, which are timm's for timm's networks."""
        kept = super().encoder_state_dict(weights)
        return {name.removeprefix("backbone."): value for name, value in kept.items()}

    def timm_arguments(self, encoder: dict[str, Tensor]) -> dict[str, Any]:
        if isinstance(self.backbone, VisionTransformer):
            heads = self.backbone.blocks[0].attn.num_heads
            return timm_vit_arguments(encoder, self.image_size, heads)
        return self.backbone.timm_arguments


class A2MIM(SimMIM):
    """Architecture-agnostic masked image modelling (ICML 2023, arXiv 2205.13943).

    Masked pixels are given the image's mean color; deep in the backbone a token is added to their
    features; the loss also compares the spectra of prediction and image. See `ReconstructionLoss`,
    `Regression` and `FocalFrequencyLoss`. mean_residual: the image's mean color is added to the
    prediction. Differences from the published code, without effect on the numbers: one real
    transform of the mean difference in place of two complex ones of whole batches.
    """

    fills_input = True

    def __init__(
        self,
        *,
        replace: bool = False,
        pixel_loss: str = "l1",
        focal_activate: str = "sigmoid",
        focal_alpha: float = 0.2,
        focal_gamma: float = 1.0,
        focal_residual: bool = False,
        unmask_weight: float = 0.0,
        fft_weight: float = 0.0,
        fft_focal: bool = True,
        fft_unmask_weight: float = 0.0,
        fft_unmask_replace: str = "mixed",
        fft_reweight: bool = False,
        ave_spectrum: bool = True,
        spectrum_alpha: float = 1.0,
        log_matrix: bool = True,
        batch_matrix: bool = True,
        matrix: Tensor | None = None,
        mean_residual: bool = False,
        **simmim,
    ):
        has_pixels = simmim.get("target") in (None, "pixels")
        spectra = {"fft_weight": fft_weight} if has_pixels else {}
        super().__init__(replace=replace, **spectra, **simmim)
        self.mean_residual = mean_residual
        self.loss = ReconstructionLoss(
            regression=Regression(
                pixel_loss, activate=focal_activate, alpha=focal_alpha, gamma=focal_gamma,
                residual=focal_residual,
            ),
            unmask_weight=unmask_weight,
            fft_weight=fft_weight,
            fft_focal=fft_focal,
            fft_unmask_weight=fft_unmask_weight,
            fft_unmask_replace=fft_unmask_replace,
            fft_reweight=fft_reweight,
            focal=FocalFrequencyLoss(
                alpha=spectrum_alpha, ave_spectrum=ave_spectrum, log_matrix=log_matrix,
                batch_matrix=batch_matrix, matrix=matrix,
            ),
        )  # fmt: skip

    def predict(self, features: Tensor, images: Tensor) -> Tensor:
        predicted = self.neck(features)
        return predicted + images.mean((2, 3), keepdim=True) if self.mean_residual else predicted


# --------------------------------------------------------------------------------------------------
# Registered methods

# The published decoder has 8 blocks of width 512; those of the small encoders are ours, with its 32
# channels a head.
_DECODERS = {
    "tiny": {"decoder_embed_dim": 96, "decoder_depth": 2, "decoder_num_heads": 3},
    "small": {"decoder_embed_dim": 256, "decoder_depth": 4, "decoder_num_heads": 8},
}


def _semaim(name: str, size: str, **options) -> None:
    register(
        f"{name}_{size}_patch16_224", build_semaim, classes=(SemAIM, FeatureSemAIM),
        classifier=f"vit_{size}_patch16_224", **options,
    )  # fmt: skip


for _size, _options in VIT_SIZES.items():
    _beit = {**_options, "init_values": 0.1}
    _shared = {**_beit, "rel_pos_bias": "shared", "classifier": f"beit_{_size}_patch16_224"}
    register(f"conmim_{_size}_patch16_224", ConMIM, **_shared)
    register(f"beit_{_size}_patch16_224_8k_vocab", BEiT, **_shared)
    _beit["classifier"] = f"beit_{_size}_patch16_224_abs_pos"
    register(f"semanticmim_beit_{_size}_patch16_224", SemanticBEiT, **_beit)
    _vit = {**_options, "classifier": f"vit_{_size}_patch16_224"}
    register(f"semanticmim_maskfeat_{_size}_patch16_224", MaskFeat, **_vit, num_cls_tokens=8)
    register(f"maskfeat_{_size}_patch16_224", MaskFeat, **_vit, use_bottleneck=False)
    register(f"semmae_{_size}_patch16_224", SemMAE, **_vit, **_DECODERS.get(_size, {}))
    # the norms of the published ViT-B's queries and keys have no weights, those of ViT-L have
    register(
        f"nepa_{_size}_patch14_224", NEPA, **_options, patch_size=14,
        qk_norm="plain" if _size == "base" else "weight",
        classifier=f"rope_vit_{_size}_patch14_224",
    )  # fmt: skip

for _size, _options in MAE_SIZES.items():
    _patch_size = 14 if _size == "huge" else 16
    register(
        f"mae_{_size}_patch{_patch_size}_224",
        MAE,
        **_options,
        patch_size=_patch_size,
        classifier=f"vit_{_size}_patch{_patch_size}_224",
        **_DECODERS.get(_size, {}),
    )

    # the published decoder has 32 blocks; those of the small encoders are as many as theirs
    _small = _DECODERS.get(_size, {})
    register(
        f"pixio_{_size}_patch16_256", Pixio, input_size=256, **_options,
        **_small | ({"decoder_depth": _options["depth"]} if _small else {}),
        classifier=f"vit_{_size}_patch16_224",
    )  # fmt: skip

# SemAIM, its ancestors, and its variant with CLIP's features as target
for _size, _options in MAE_SIZES.items():
    # the published query stream has 12 blocks; they do not divide the huge encoder's 32
    _depth = 16 if _size == "huge" else 12
    _semaim("semaim", _size, **_options, query_depth=_depth)
for _size, _options in VIT_SIZES.items():
    _semaim("saim", _size, **_options, permutation_type="stochastic")
    _semaim("igpt", _size, **_options, permutation_type="zigzag")
    _semaim("semaim_clip", _size, **_options, predict_feature="clip")

for _size in (
    "base",
    "large",
):  # a quarter of the 28 x 28 patches, as many tokens as with patches of 16 pixels
    register(
        f"semmae_{_size}_patch8_224", SemMAE, **VIT_SIZES[_size], patch_size=8, token_share=0.25,
        classifier=f"vit_{_size}_patch8_224",
    )  # fmt: skip

# SimMIM's and A2MIM's published backbones, A2MIM with the token and losses of its recipes
# (docs/methods/simmim_a2mim.md#options)
_DEEP_TOKEN = {"mask_layer": 3, "mask_init": 1e-6, "token_lr": 0.1}  # before the last stage
_CNN_LOSS = {"pixel_loss": "focal_l1", "fft_unmask_weight": 1e-3}
_SPECTRA = {  # published weights; those of ResNet-18 and 34 are ours, as of ResNet-50
    **{f"resnet{depth}": {"fft_weight": 0.5} for depth in (18, 34, 50)},
    **{f"resnet{depth}": {"fft_weight": 0.1, "fft_focal": False} for depth in (101, 152)},
    "resnet200": {"fft_focal": False},
}

for _name in MIM_VIT_SIZES:
    _vit = {"backbone": _name, "classifier": f"mim_{_name}_patch16_224"}
    register(f"simmim_{_name}_patch16_224", SimMIM, **_vit)
    register(f"a2mim_{_name}_patch16_224", A2MIM, **_vit, fft_weight=0.1)
for _name, _timm_name in TIMM_BACKBONES.items():
    _network = {"backbone": _timm_name, "classifier": _name}
    if _name.startswith("swin"):
        register(f"simmim_{_name}", SimMIM, **_network)
        register(f"a2mim_{_name}", A2MIM, **_network, fft_weight=0.5)
        continue
    # the published ConvNeXt never initializes its token; SimMIM's adds it, ResNet's puts it in
    _convnext = _name.startswith("convnext")
    _token = {"token_std": 0.0} if _convnext else {}
    _gamma = {"gamma_lr": 0.1} if _convnext else {}
    register(f"simmim_{_name}", SimMIM, **_network, replace=not _convnext, **_token)
    register(
        f"a2mim_{_name}", A2MIM, **_network,
        **_DEEP_TOKEN, **_CNN_LOSS, **_SPECTRA.get(_name, {}), **_token, **_gamma,
    )  # fmt: skip

register_family("simmim_", SimMIM)  # any other convolutional network of timm by its name
register_family("a2mim_", A2MIM, **_DEEP_TOKEN | {"mask_layer": -1}, **_CNN_LOSS, fft_weight=0.5)
