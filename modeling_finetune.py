"""The vision transformer of the repository and the classifiers built on it.

One `Attention`, one `Block` and one `VisionTransformer` cover BEiT's form (query and value bias,
relative position tables, layer scale, mean pooling) and MAE's form (full bias, sine-cosine
positions, class token or mean pooling). Shapes in comments: B images, N patches, T = 1 + N tokens
(class token first), C channels, h heads, d = C / h. There may be n class tokens; T is n + N then.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from inspect import Parameter, signature
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import checkpoint

from unimim.errors import OptionError, check_choice, did_you_mean
from unimim.flag import Flag
from unimim.sizes import to_pair

VIT_SIZES = {
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
}
MAE_SIZES = VIT_SIZES | {"huge": {"embed_dim": 1280, "depth": 32, "num_heads": 16}}
# SimMIM's and A2MIM's; the published ViT-S is wide and shallow
# (docs/methods/simmim_a2mim.md#vits-sizes)
MIM_VIT_SIZES = {
    "vit_tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "vit_small": {"embed_dim": 768, "depth": 8, "num_heads": 8, "mlp_ratio": 3.0},
    "vit_base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "vit_large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
    "deit_small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
}
ATTENTION_KERNELS = ("auto", "sdpa", "eager", "flex")
# one stage of the pipeline: with more, the gradient of the bias does not fit into an H100's shared
# memory
FLEX_OPTIONS = {"num_stages": 1}


# --------------------------------------------------------------------------------------------------
# Models by name


@dataclass(frozen=True)
class ModelEntry:
    """What is known of a registered model before it is built.

    build: takes options by name and returns the model.
    classes: of which one is built; none for a classifier of timm.
    kind: "method" (pre-training), "classifier" or "timm" (a classifier with timm's options).
    input_size: the side of the images that it is for, unless it is told another.
    flags: command-line flags of its classes.
    classifier: the model as which a method's encoder is fine-tuned; "" for a classifier.
    """

    build: Callable[..., nn.Module]
    classes: tuple[type, ...]
    kind: str
    input_size: int
    flags: tuple[Flag, ...]
    classifier: str = ""


_MODELS: dict[str, ModelEntry] = {}
_FAMILIES: dict[str, ModelEntry] = {}


def register(
    name: str,
    build: Callable[..., nn.Module],
    *,
    classes: tuple[type, ...] = (),
    classifier: str = "",
    **defaults,
) -> None:
    """Make `build(**defaults)` the model called `name` here, and in timm too where timm has no
    model of that name.

    `classes`: what a `build` that is a function returns one of. `classifier`: the model as which a
    method's encoder is fine-tuned.
    """
    _MODELS[name] = replace(_entry(build, classes, defaults), classifier=classifier)
    if not timm.is_model(name):
        named = partial(_MODELS[name].build)
        named.__name__ = name
        named.__module__ = __name__
        timm.models.register_model(named)


def register_family(prefix: str, build: Callable[..., nn.Module], **defaults) -> None:
    """Make `build(backbone=rest, **defaults)` the model called `prefix` + rest, for each model of
    timm called rest."""
    _FAMILIES[prefix] = _entry(build, (), defaults)


def _entry(build: Callable, classes: tuple[type, ...], defaults: dict) -> ModelEntry:
    classes = classes or ((build,) if isinstance(build, type) else ())
    flags = dict.fromkeys(flag for cls in classes for flag in getattr(cls, "flags", ()))
    kind = "timm"
    if classes:
        kind = "method" if hasattr(classes[0], "views") else "classifier"
    size = defaults.get("input_size", 224)
    return ModelEntry(partial(build, **defaults), classes, kind, size, tuple(flags))


def entry_of(name: str) -> ModelEntry | None:
    """Return the entry of the model of that name; None if there is no such model."""
    if name in _MODELS:
        return _MODELS[name]
    for prefix, entry in _FAMILIES.items():
        backbone = name.removeprefix(prefix)
        if name.startswith(prefix) and timm.is_model(backbone):
            classifier = backbone if entry.kind == "method" else ""
            build = partial(entry.build, backbone=backbone)
            return replace(entry, build=build, classifier=classifier)
    return None


def list_models(prefix: str = "") -> list[str]:
    return sorted(name for name in _MODELS if name.startswith(prefix))


def models_by_purpose() -> str:
    """Return a table of the registered models: methods with their classifiers, then
    classifiers."""
    methods = {name: entry.classifier for name, entry in _MODELS.items() if entry.kind == "method"}
    width = max(map(len, methods)) + 2
    lines = [f"{'pre-training (run_pretraining.py)':{width + 2}}encoder is fine-tuned as"]
    lines += [f"  {name:{width}}{methods[name]}" for name in sorted(methods)]
    lines += ["", "classification (run_class_finetuning.py, run_linear_probing.py, run_knn.py)"]
    lines += [f"  {name}" for name in list_models() if name not in methods]
    others = ", ".join(f"{prefix}NAME" for prefix in _FAMILIES if prefix)
    lines += ["", f"and by its name any other network of timm; {others} pre-train its CNNs"]
    return "\n".join(lines)


def registered_flags() -> dict[Flag, list[str]]:
    """Return the flags of all registered models, each with the names of the classes that list
    it."""
    users: dict[Flag, list[str]] = {}
    for entry in (*_MODELS.values(), *_FAMILIES.values()):
        for cls in entry.classes:
            for flag in getattr(cls, "flags", ()):
                names = users.setdefault(flag, [])
                if cls.__name__ not in names:
                    names.append(cls.__name__)
    return users


def create_model(name: str, **kwargs) -> nn.Module:
    """Build a registered model of this repository.

    Raises:
        ValueError: an unknown name, or an option that the model does not take.
    """
    entry = entry_of(name)
    if entry is None:
        raise OptionError(
            "model",
            name,
            f"is unknown here{did_you_mean(name, _MODELS)} --list_models shows the models",
        )
    try:
        return entry.build(**kwargs)
    except TypeError as error:
        wrong = wrong_option(error, kwargs)
        if wrong is None:
            raise
        known = own_options(*entry.classes or (entry.build.func,)) | getattr(error, "known", set())
        known -= {"backbone", "num_classes"} if entry.kind == "method" else {"backbone"}
        raise OptionError(
            wrong,
            kwargs[wrong],
            f"is not an option of {name}{did_you_mean(wrong, known)} there are: "
            f"{', '.join(sorted(known))}",
        ) from error


class UnknownOptionError(TypeError):
    """A constructor inside another does not take an option; `known` are those that it takes."""

    def __init__(self, error: TypeError, known: set[str]):
        super().__init__(str(error))
        self.known = known


def wrong_option(error: TypeError, options: Mapping[str, Any]) -> str | None:
    """Return which of the options a constructor did not take; None if the error is another."""
    found = re.search(r"(?:unexpected keyword|multiple values for.*) argument '(\w+)'", str(error))
    return found[1] if found and found[1] in options else None


def own_options(*builders: type | Callable) -> set[str]:
    """Return the names of the options of constructors, with those that they pass to their bases,
    or of functions."""
    names: set[str] = set()
    for builder in builders:
        for cls in getattr(builder, "__mro__", (builder,)):
            names |= set(vars(cls).get("chosen_options", ())) if isinstance(cls, type) else set()
            init = vars(cls).get("__init__") if isinstance(cls, type) else cls
            if init is None:
                continue
            parameters = signature(init).parameters.values()
            named = (Parameter.KEYWORD_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
            names |= {one.name for one in parameters if one.kind in named}
            if not any(one.kind is Parameter.VAR_KEYWORD for one in parameters):
                break
    return names - {"self"}


def input_size_of(name: str) -> int:
    """Return the side of the images that a model is for, unless it is told another; 0 for an
    unknown model."""
    entry = entry_of(name)
    return entry.input_size if entry else 0


# --------------------------------------------------------------------------------------------------
# Pieces


def drop_path_rates(last: float, depth: int) -> list[float]:
    """Return the rate of stochastic depth of each block, rising evenly from 0 to `last`."""
    return torch.linspace(0, last, depth, device="cpu").tolist()


def patchify(images: Tensor, patch: tuple[int, int]) -> Tensor:
    """Images [B, c, H, W] cut into patches of ph x pw pixels: [B, N, ph * pw * c], in the order
    row, column, color."""
    ph, pw = patch
    cut = images.unflatten(3, (-1, pw)).unflatten(2, (-1, ph))  # [B, c, gh, ph, gw, pw]
    return cut.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(patches: Tensor, grid: tuple[int, int], patch: tuple[int, int]) -> Tensor:
    """The inverse of `patchify`: patches [B, N, ph * pw * c] of a grid (rows, columns) to images
    [B, c, H, W]."""
    cut = patches.unflatten(1, grid).unflatten(3, (*patch, -1))  # [B, gh, gw, ph, pw, c]
    return cut.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def take(tokens: Tensor, positions: Tensor) -> Tensor:
    """Rows of tokens [B, N, D] at positions [B, M]: [B, M, D]."""
    return tokens.gather(1, positions.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


class PatchProjection(nn.Conv2d):
    """The patches' convolution, which also takes patches [B, M, p * p * c] that `patchify` has cut
    already."""

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 4:
            return super().forward(x)
        return F.linear(x, self.weight.permute(0, 2, 3, 1).flatten(1), self.bias)


class PatchEmbed(nn.Module):
    """Cuts images [B, 3, H, W] into patches and projects them: [B, N, C], row-major."""

    def __init__(self, img_size, patch_size, in_chans: int, embed_dim: int):
        super().__init__()
        self.img_size, self.patch_size = to_pair(img_size), to_pair(patch_size)
        if any(side % patch for side, patch in zip(self.img_size, self.patch_size, strict=True)):
            raise OptionError(
                "input_size",
                self.img_size,
                f"is not a multiple of patch_size {self.patch_size}",
                "patch_size",
            )
        self.grid_size = tuple(
            side // patch for side, patch in zip(self.img_size, self.patch_size, strict=True)
        )
        self.num_patches = math.prod(self.grid_size)
        self.proj = PatchProjection(in_chans, embed_dim, self.patch_size, stride=self.patch_size)

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        return self.proj(x).flatten(2).transpose(1, 2)

    @property
    def numbers(self) -> int:
        """Numbers of a patch: its pixels times the images' channels."""
        return self.proj.in_channels * math.prod(self.patch_size)

    def cut(self, x: Tensor) -> Tensor:
        """The patches themselves, [B, N, p * p * 3], which `proj` takes too."""
        self.check(x)
        return patchify(x, self.patch_size)

    def check(self, x: Tensor) -> None:
        if x.shape[-2:] != self.img_size:
            raise OptionError(
                "input_size",
                self.img_size,
                f"is what the model was built for; the images are {tuple(x.shape[-2:])}",
            )


def relative_position_index(grid: tuple[int, int]) -> Tensor:
    """Row of the bias table for each pair (query, key) of 1 + gh * gw tokens: int64 [T, T]
    (docs/methods/conmim.md#attention-and-position-bias)."""
    gh, gw = grid
    y, x = (
        axis.flatten() for axis in torch.meshgrid(torch.arange(gh), torch.arange(gw), indexing="ij")
    )
    rows = table_rows(grid)
    index = torch.empty(1 + gh * gw, 1 + gh * gw, dtype=torch.int64)
    index[1:, 1:] = (y[:, None] - y + gh - 1) * (2 * gw - 1) + (x[:, None] - x + gw - 1)
    index[0, 1:], index[1:, 0], index[0, 0] = rows - 3, rows - 2, rows - 1
    return index


def table_rows(grid: tuple[int, int]) -> int:
    """Offsets between two patches of the grid, and three rows for class-to-patch, patch-to-class,
    class-to-class."""
    return (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3


def bias_of(table: Tensor, index: Tensor) -> Tensor:
    """Look the table [R, h] up at index [T, T]: bias [h, T, T]."""
    return table.index_select(0, index.flatten()).view(*index.shape, -1).permute(2, 0, 1)


class RelativePositionBias(nn.Module):
    """One relative position table for all blocks; forward() returns the bias [h, T, T]."""

    def __init__(self, grid: tuple[int, int], num_heads: int):
        super().__init__()
        self.relative_position_bias_table = nn.Parameter(torch.zeros(table_rows(grid), num_heads))
        self.register_buffer(
            "relative_position_index", relative_position_index(grid), persistent=False
        )

    def forward(self) -> Tensor:
        return bias_of(self.relative_position_bias_table, self.relative_position_index)


class QKVLinear(nn.Linear):
    """The joint projection to queries, keys and values, each [B, T, C].

    `bias` overrides the layer's own; BEiT passes one that is zero for the keys. With `last`,
    queries are made of that many last tokens only.
    """

    def forward(
        self, x: Tensor, bias: Tensor | None = None, last: int | None = None
    ) -> tuple[Tensor, ...]:
        bias = self.bias if bias is None else bias
        if last is None:
            return F.linear(x, self.weight, bias).chunk(3, dim=-1)
        dims = [self.in_features, 2 * self.in_features]
        biases = (None, None) if bias is None else bias.split(dims)
        query_weight, other_weight = self.weight.split(dims)
        return F.linear(x[:, -last:], query_weight, biases[0]), *F.linear(
            x, other_weight, biases[1]
        ).chunk(2, dim=-1)


class Attention(nn.Module):
    """Multi-head self-attention with BEiT's query and value bias and an additive position bias
    (docs/methods/conmim.md#attention-and-position-bias).

    `kernel`: "eager" is the explicit softmax; "sdpa" is scaled_dot_product_attention; "flex" is
    torch's FlexAttention for a position bias on a GPU, slower there than "sdpa" so far
    (docs/benchmarks.md#flexattention); "auto" takes the faster of the first two for the device, the
    dtype and the bias at hand.
    """

    def __init__(
        self, dim, num_heads, *, qkv_bias, k_bias, attn_drop, proj_drop, grid=None, kernel="auto"
    ):
        super().__init__()
        check_choice("attn", kernel, ATTENTION_KERNELS)
        self.num_heads = num_heads
        self.kernel = kernel
        self.attn_drop = attn_drop
        self.q_bias = self.v_bias = self.relative_position_bias_table = None
        if qkv_bias and not k_bias:
            self.q_bias = nn.Parameter(torch.zeros(dim))
            self.v_bias = nn.Parameter(torch.zeros(dim))
        if grid is not None:
            self.relative_position_bias_table = nn.Parameter(
                torch.zeros(table_rows(grid), num_heads)
            )
            self.register_buffer(
                "relative_position_index", relative_position_index(grid), persistent=False
            )
        self.qkv = QKVLinear(dim, 3 * dim, bias=qkv_bias and k_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(
        self,
        x: Tensor,
        bias: Tensor | None = None,
        last: int | None = None,
        *,
        causal: bool = False,
    ) -> Tensor:
        return self.attend(*self.project(x, last), bias, causal)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool = False
    ) -> Tensor:
        """Queries, keys and values, each [B, h, T, d], to tokens [B, T, C]; `causal` ones take no
        bias."""
        bias = self.position_bias(bias)
        kernel = self.choose_kernel(q, bias, causal)
        if kernel == "flex":
            x = flexible(q, k, v, bias)
        elif kernel == "sdpa":
            x = self.fused(q, k, v, bias, causal)
        else:
            if causal:
                bias = causal_mask(q)
            x = (
                F.dropout(self.probabilities(q, k, bias), self.attn_drop, self.training).to(v.dtype)
                @ v
            )
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))

    def project(self, x: Tensor, last: int | None = None) -> list[Tensor]:
        """Tokens [B, T, C] to queries (of the `last` ones, if that is given), keys, values, each
        [B, h, T, d]."""
        bias = None
        if self.q_bias is not None:
            bias = torch.cat(
                (self.q_bias, torch.zeros_like(self.v_bias, requires_grad=False), self.v_bias)
            )
        return [self.split_heads(t) for t in self.qkv(x, bias, last)]

    def split_heads(self, x: Tensor) -> Tensor:
        """[B, T, C] to [B, h, T, d]."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def position_bias(self, shared: Tensor | None) -> Tensor | None:
        """The block's own bias plus the shared one, as far as they exist: [h, T, T]."""
        if self.relative_position_bias_table is None:
            return shared
        own = bias_of(self.relative_position_bias_table, self.relative_position_index)
        return own if shared is None else own + shared

    def choose_kernel(self, q: Tensor, bias: Tensor | None, causal: bool = False) -> str:
        """On a CPU the fused kernel pays only in fp32 and without a gradient of the bias
        (docs/engine.md#attention-kernels).

        FlexAttention has no dropout and, on a CPU, no gradient: "flex" is "auto" there, and
        wherever there is no bias.
        """
        if self.kernel in ("sdpa", "eager"):
            return self.kernel
        trains_bias = torch.is_grad_enabled() and bias is not None and bias.requires_grad
        drops = self.attn_drop > 0 and self.training
        can_flex = (
            bias is not None
            and bias.ndim == 3
            and not causal
            and not drops
            and q.device.type != "cpu"
        )
        if can_flex and self.kernel == "flex":
            return "flex"
        return (
            "eager"
            if q.device.type == "cpu" and (trains_bias or q.dtype != torch.float32)
            else "sdpa"
        )

    def fused(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool) -> Tensor:
        mask = None
        if bias is not None:
            # dense along the keys: the fused kernels refuse other strides, and torch then takes the
            # explicit form
            mask = bias.to(q.dtype).contiguous()[
                (None,) * (4 - bias.ndim)
            ]  # [1 or B, h or 1, T, T]
        dropout = self.attn_drop if self.training else 0.0
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal
        )

    def probabilities(self, q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
        """softmax(q k^T / sqrt(d) + bias) over keys: [B, h, T, T]. The bias is [h, T, T], or a mask
        [B, 1, T, T]."""
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        return (scores if bias is None else scores + bias).softmax(-1)


def causal_mask(q: Tensor) -> Tensor:
    """Return 0 where a query of [B, h, T, d] may see a key, else -inf: [T, T]."""
    return torch.full(q.shape[2:3] * 2, -math.inf, device=q.device, dtype=q.dtype).triu(1)


def flexible(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """FlexAttention of [B, h, T, d] under a bias [h, T, T], which gets its gradient; outside of
    compiled blocks it is compiled by itself."""
    if torch.compiler.is_compiling() or q.device.type == "cpu":
        return attention_under_bias(q, k, v, bias)
    return compiled_flex()(q, k, v, bias)


@lru_cache(maxsize=1)
def compiled_flex() -> Callable[..., Tensor]:
    return torch.compile(attention_under_bias, dynamic=False)


def attention_under_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    def add_bias(score: Tensor, image: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + bias[head, query, key]

    return flex_attention(q, k, v, score_mod=add_bias, kernel_options=FLEX_OPTIONS)


class DropPath(nn.Module):
    """Stochastic depth: for each image the factor of what a block adds, 0 or 1 / (1 - rate).

    The draws are timm's. `share_graph` is for compiled blocks: torch.compile makes a graph for each
    number that it reads, and so for each rate; a tensor is the same graph with another input.
    """

    def __init__(self, drop_prob: float = 0.0):
        super().__init__()
        self.drop_prob = drop_prob
        self.register_buffer("keep", None, persistent=False)

    def share_graph(self, device: torch.device) -> None:
        """From now on a compiled forward has the same graph at any rate, 0 included."""
        self.keep = torch.tensor(1.0 - self.drop_prob, device=device)

    def factor(self, x: Tensor) -> Tensor | None:
        """[B, 1, ...] for x [B, ...]; None where nothing is dropped."""
        shape = (x.shape[0], *(1,) * (x.ndim - 1))
        if torch.compiler.is_compiling() and self.keep is not None:
            if not self.training:
                return None
            kept = torch.rand(shape, device=x.device) < self.keep
            return (kept / self.keep).to(x.dtype)
        if self.drop_prob == 0.0 or not self.training:
            return None
        keep = 1 - self.drop_prob
        factor = x.new_empty(shape).bernoulli_(keep)
        return factor.div_(keep) if keep > 0.0 else factor

    def forward(self, x: Tensor) -> Tensor:
        factor = self.factor(x)
        return x if factor is None else x * factor

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:.3f}"


class LinearOfGelu(torch.autograd.Function):
    """linear(gelu(x)) that keeps x and not gelu(x), a fifth of what a block keeps: the backward
    pass makes it again."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(F.gelu(x), weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows, grads = grad.flatten(0, -2), [None, None, None]
        with torch.autocast(x.device.type, enabled=False):  # DeepSpeed's is still on here
            if ctx.needs_input_grad[0]:
                grads[0] = torch.ops.aten.gelu_backward(grad @ weight, x)
            if ctx.needs_input_grad[1]:
                grads[1] = rows.T @ F.gelu(x).flatten(0, -2)
            if ctx.needs_input_grad[2]:
                grads[2] = rows.sum(0)
        return tuple(grads)


class ActivatedLinear(nn.Linear):
    """A linear layer with an activation in front, by default an exact GELU: [..., in_features] to
    [..., D].

    `recompute`: keep less and make the GELU again in the backward pass, with equal numbers. "auto"
    does so on a CPU; on a GPU it is a thirtieth of a step for a fifth of the memory. Compiled
    graphs decide that by themselves.
    """

    act = staticmethod(F.gelu)
    recompute = "auto"

    def recomputes(self, x: Tensor) -> bool:
        if self.act is not F.gelu or torch.compiler.is_compiling():
            return False
        return x.device.type == "cpu" if self.recompute == "auto" else self.recompute == "on"

    def forward(self, x: Tensor) -> Tensor:
        if not self.recomputes(x):
            return super().forward(self.act(x))
        # x has autocast's dtype, which a function of our own has to bring about for the weights
        return LinearOfGelu.apply(
            x, *(None if p is None else p.to(x.dtype) for p in (self.weight, self.bias))
        )


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between; dropout comes after the second only
    (docs/methods/conmim.md#attention-and-position-bias)."""

    def __init__(self, dim: int, hidden_dim: int, drop: float, out_dim: int | None = None):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = ActivatedLinear(hidden_dim, out_dim or dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block with layer scale (`init_values` > 0) and stochastic depth.

    With `last` only that many tokens at the end are computed and returned; of the others only keys
    and values are. With `rows` int64 [B, M] only those tokens go through the MLP and are returned.
    With `causal` no token sees a later one.
    """

    attention = Attention

    def __init__(self, dim, num_heads, *, mlp_ratio, drop, drop_path, init_values, **attention):
        super().__init__()
        self.gamma_1 = self.gamma_2 = None
        if init_values is not None and init_values > 0:
            self.gamma_1 = nn.Parameter(torch.full((dim,), float(init_values)))
            self.gamma_2 = nn.Parameter(torch.full((dim,), float(init_values)))
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = self.attention(dim, num_heads, proj_drop=drop, **attention)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop)

    def forward(
        self,
        x: Tensor,
        bias: Tensor | None = None,
        last: int | None = None,
        *,
        rows: Tensor | None = None,
        causal: bool = False,
    ) -> Tensor:
        attended = self.attn(self.norm1(x), bias, last, causal=causal)
        if rows is not None:
            return self.add(take(x, rows), take(attended, rows))
        return self.add(x if last is None else x[:, -last:], attended)

    def add(self, x: Tensor, attended: Tensor) -> Tensor:
        """The rest of the block after its attention, both [B, T, C]."""
        x = add_scaled(x, attended, self.gamma_1, self.drop_path.factor(x))
        return add_scaled(x, self.mlp(self.norm2(x)), self.gamma_2, self.drop_path.factor(x))


def add_scaled(x: Tensor, branch: Tensor, gamma: Tensor | None, factor: Tensor | None) -> Tensor:
    """x + branch * gamma [C] * factor [B, 1, 1] in one kernel, which reads each in its own
    dtype."""
    scales = [scale for scale in (gamma, factor) if scale is not None]
    if not scales:
        return x + branch
    with torch.autocast(
        x.device.type, enabled=False
    ):  # it would write a wider copy of the branch first
        return torch.addcmul(x, branch, math.prod(scales[1:], start=scales[0]))


def sincos_pos_embed(embed_dim: int, grid: tuple[int, int]) -> Tensor:
    """MAE's fixed 2-D positions with a zero row for the class token: [1, 1 + gh * gw, C]. Columns
    first, then rows."""
    if embed_dim % 4:
        raise ValueError(f"sine-cosine positions need embed_dim divisible by 4, not {embed_dim}")
    omega = 10000.0 ** (-torch.arange(embed_dim // 4, dtype=torch.float64) / (embed_dim / 4))
    y, x = torch.meshgrid(
        *(torch.arange(side, dtype=torch.float64) for side in grid), indexing="ij"
    )
    angles = [axis.flatten()[:, None] * omega for axis in (x, y)]
    table = torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)
    return F.pad(table, (0, 0, 1, 0)).float().unsqueeze(0)


def positions_of(table: Tensor, patches: Tensor, num_cls: int = 1) -> Tensor:
    """Return the rows [B, n + M, C] of a table [1, n + N, C] for n class tokens and the patches of
    these numbers [B, M]."""
    first = torch.arange(num_cls, device=patches.device).expand(len(patches), -1)
    return table[0, torch.cat((first, patches + num_cls), dim=1)]


# --------------------------------------------------------------------------------------------------
# The model


class VisionTransformer(nn.Module):
    """A ViT with a class token whose options give BEiT's or MAE's form.

    num_cls_tokens: how many class tokens there are, each with a position of its own, if there are
    learned ones. pos_embed: "none", "learned", "sincos" (fixed) or "sincos_trainable".
    rel_pos_bias: "none", "shared" (one table, BEiT pre-training), "per_block" (BEiT fine-tuning) or
    "both", added. k_bias: keys have a bias too (MAE's form); without it only queries and values do
    (BEiT's form). global_pool: "avg" (mean of patch tokens, then `fc_norm`), "token" (class token,
    or the mean of several; `norm`). num_classes 0 leaves the head out: `forward` then returns the
    pooled vector [B, C].
    """

    block = Block

    def __init__(
        self,
        *,
        input_size=224,
        patch_size=16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        num_cls_tokens: int = 1,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        k_bias: bool = False,
        init_values: float | None = None,
        pos_embed: str = "none",
        rel_pos_bias: str = "none",
        global_pool: str = "avg",
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        init_scale: float = 0.001,
        attn: str = "auto",
        grad_checkpointing: bool = False,
    ):
        super().__init__()
        check_choice("pos_embed", pos_embed, ("none", "learned", "sincos", "sincos_trainable"))
        check_choice("rel_pos_bias", rel_pos_bias, ("none", "shared", "per_block", "both"))
        check_choice("global_pool", global_pool, ("avg", "token"))
        if embed_dim % num_heads:
            raise OptionError("embed_dim", embed_dim, f"is not a multiple of num_heads={num_heads}")
        if num_cls_tokens < 1 or (num_cls_tokens > 1 and rel_pos_bias != "none"):
            raise OptionError(
                "num_cls_tokens",
                num_cls_tokens,
                "must be 1 or more, and 1 with a relative position bias",
            )
        self.embed_dim = embed_dim
        self.num_prefix_tokens = num_cls_tokens
        self.global_pool = global_pool
        self.grad_checkpointing = grad_checkpointing
        self.patch_embed = PatchEmbed(input_size, patch_size, in_chans, embed_dim)
        grid = self.patch_embed.grid_size
        self.cls_token = nn.Parameter(torch.zeros(1, num_cls_tokens, embed_dim))
        self.pos_embed = self._make_pos_embed(pos_embed)
        self.pos_drop = nn.Dropout(drop)
        self.rel_pos_bias = (
            RelativePositionBias(grid, num_heads) if rel_pos_bias in ("shared", "both") else None
        )
        block = partial(
            self.block, embed_dim, num_heads, mlp_ratio=mlp_ratio, drop=drop,
            init_values=init_values, qkv_bias=qkv_bias, k_bias=k_bias, attn_drop=attn_drop,
            kernel=attn, grid=grid if rel_pos_bias in ("per_block", "both") else None,
        )  # fmt: skip
        rates = drop_path_rates(drop_path, depth)
        self.blocks = nn.ModuleList(block(drop_path=rate) for rate in rates)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6) if global_pool == "token" else nn.Identity()
        self.fc_norm = nn.LayerNorm(embed_dim, eps=1e-6) if global_pool == "avg" else nn.Identity()
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        self.init_weights(init_scale)

    def _make_pos_embed(self, kind: str) -> nn.Parameter | None:
        if kind == "none":
            return None
        if kind == "learned":
            return nn.Parameter(
                torch.zeros(
                    1, self.num_prefix_tokens + self.patch_embed.num_patches, self.embed_dim
                )
            )
        table = sincos_pos_embed(self.embed_dim, self.patch_embed.grid_size)
        table = F.pad(table, (0, 0, self.num_prefix_tokens - 1, 0))
        return nn.Parameter(table, requires_grad=kind == "sincos_trainable")

    # -- initialization (docs/methods/conmim.md#initialization)

    def init_weights(self, init_scale: float) -> None:
        self.apply(self._init_module)
        self._init_token(self.cls_token)
        if self.pos_embed is not None and not self.pos_embed.any():
            self._init_token(self.pos_embed)
        self._rescale(self.blocks)
        if isinstance(self.head, nn.Linear):
            self.head.weight.data.mul_(init_scale)
            self.head.bias.data.mul_(init_scale)

    def _init_module(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            self._init_token(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def _init_token(self, weight: Tensor) -> None:
        nn.init.trunc_normal_(weight, std=0.02)

    def _rescale(self, blocks: nn.ModuleList) -> None:
        """The deeper a block, the less it adds at the start."""
        for layer, block in enumerate(blocks, 1):
            block.attn.proj.weight.data.div_(math.sqrt(2 * layer))
            block.mlp.fc2.weight.data.div_(math.sqrt(2 * layer))

    # -- what optimizers, loaders and exporters ask

    def no_weight_decay(self) -> set[str]:
        return {"cls_token", "pos_embed"}

    # -- forward

    def forward(self, x: Tensor, cells: Tensor | None = None) -> Tensor:
        """Images [B, 3, H, W] to logits [B, num_classes]; with `cells` int64 [B, M] only those
        patches are seen."""
        return self.head(self.pool(self.forward_features(x, cells)))

    def forward_features(self, x: Tensor, cells: Tensor | None = None) -> Tensor:
        """Images to the last block's tokens [B, T, C], before any final norm."""
        patches = self.patch_embed(x)
        if cells is None:
            return self.run_blocks(self.embed(patches, self.pos_embed))
        assert self.pos_embed is not None and self.rel_pos_bias is None, (
            "listed patches need absolute positions only"
        )
        # the class token goes without a position, as published; the row of a sine-cosine table is 0
        # anyway
        prefix = self.num_prefix_tokens
        listed = F.pad(self.pos_embed[0, prefix + cells], (0, 0, prefix, 0))
        return self.run_blocks(self.embed(take(patches, cells), listed))

    def embed(self, patches: Tensor, positions: Tensor | None) -> Tensor:
        """Put the class tokens in front of patch embeddings [B, M, C] and add positions [1 or B,
        n + M, C]."""
        x = torch.cat((self.cls_token.expand(patches.shape[0], -1, -1), patches), dim=1)
        return self.pos_drop(x if positions is None else x + positions)

    def position_bias(self) -> Any:
        """What positions are to the attention of every block: a bias [h, T, T], or None."""
        return None if self.rel_pos_bias is None else self.rel_pos_bias()

    def run_blocks(self, x: Tensor, **last_options) -> Tensor:
        """Tokens [B, T, C] after all blocks; the options are those of the last block's forward."""
        bias = self.position_bias()
        *blocks, last_block = self.blocks
        for block in blocks:
            x = self._run_block(block, x, bias)
        return self._run_block(last_block, x, bias, **last_options)

    def _run_block(self, block: Block, x: Tensor, bias: Tensor | None = None, **options) -> Tensor:
        if self.grad_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(block, x, bias, use_reentrant=False, **options)
        return block(x, bias, **options)

    def pool(self, x: Tensor) -> Tensor:
        """Tokens [B, T, C] to the vector the head sees [B, C]."""
        if self.global_pool == "avg":
            return self.fc_norm(x[:, self.num_prefix_tokens :].mean(1))
        return self.norm(x[:, : self.num_prefix_tokens].mean(1))

    # -- looking inside

    @torch.no_grad()
    def attention_maps(self, x: Tensor, layer: int = -1) -> Tensor:
        """Attention probabilities of one block: [B, h, T, T]. ValueError: no such block."""
        if not -len(self.blocks) <= layer < len(self.blocks):
            raise OptionError(
                "layer",
                layer,
                f"is none of the {len(self.blocks)} blocks; count from 0 or, with -1, from the end",
            )
        bias = self.position_bias()
        layer %= len(self.blocks)
        x = self.embed(self.patch_embed(x), self.pos_embed)
        for block in self.blocks[:layer]:
            x = block(x, bias)
        block = self.blocks[layer]
        q, k, _ = block.attn.project(block.norm1(x))
        return block.attn.probabilities(q, k, block.attn.position_bias(bias))


# --------------------------------------------------------------------------------------------------
# The model with rotary positions

ACTIVATIONS = {"gelu": F.gelu, "silu": F.silu, "relu": F.relu}
QK_NORMS = ("none", "plain", "weight", "affine")


class Rotation(NamedTuple):
    """Cosine and sine [1 or B, 1, N, d] of the angles by which queries and keys of N patches are
    rotated."""

    cos: Tensor
    sin: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Rotate the last tokens of x [B, h, T, d], those of patches, in float32."""
        count = min(x.shape[2], self.cos.shape[2])
        cos, sin = self.cos[:, :, -count:], self.sin[:, :, -count:]
        rest, patches = x.split((x.shape[2] - count, count), dim=2)
        first, second = patches.float().chunk(2, dim=-1)
        turned = patches.float() * cos + torch.cat((-second, first), dim=-1) * sin
        return torch.cat((rest, turned.to(x.dtype)), dim=2)


class PositionChanges(NamedTuple):
    """What is done to the coordinates of each image's patches, in this order; None: nothing.

    shift [B, 2] is added, jitter [B, 2] and rescale [B, 1] are factors; rows come first.
    """

    shift: Tensor | None = None
    jitter: Tensor | None = None
    rescale: Tensor | None = None


class RotaryPositions(nn.Module):
    """Rotary positions of the patches of a grid, those of DINOv3
    (docs/methods/nepa.md#positions).

    theta: the largest wave length of a coordinate, in halves of the image. shift, jitter, rescale:
    ranges of random changes in training, see `draw`; None: no change.
    """

    def __init__(
        self,
        grid: tuple[int, int],
        dim: int,
        theta: float,
        shift: float | None,
        jitter: float | None,
        rescale: float | None,
    ):
        super().__init__()
        if dim % 4:
            raise OptionError(
                "num_heads", None, f"gives heads of {dim} channels; rotary positions need fours"
            )
        self.grid, self.dim, self.theta = grid, dim, theta
        self.shift, self.jitter, self.rescale = shift, jitter, rescale
        self.sizes = [0 if shift is None else 2, 0 if jitter is None else 2]
        self.sizes.append(0 if rescale is None else 1)
        self.noise_size = sum(self.sizes)

    def draw(self, noise: Tensor) -> PositionChanges:
        """Return the changes that noise [B, noise_size] in [0, 1) stands for: a shift of at most
        `shift`, and factors between a number and its inverse, even in their logarithm."""
        shift, jitter, rescale = (2 * noise.float() - 1).split(self.sizes, dim=1)
        return PositionChanges(
            None if self.shift is None else shift * self.shift,
            None if self.jitter is None else (jitter * math.log(self.jitter)).exp(),
            None if self.rescale is None else (rescale * math.log(self.rescale)).exp(),
        )

    def forward(self, device: torch.device, changes: PositionChanges | None = None) -> Rotation:
        with torch.autocast(device.type, enabled=False):
            axes = [
                2 * (torch.arange(side, device=device, dtype=torch.float32) + 0.5) / side - 1
                for side in self.grid
            ]
            places = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)[None]
            shift, jitter, rescale = changes or PositionChanges()
            places = places if shift is None else places + shift[:, None]
            for factor in (jitter, rescale):
                places = places if factor is None else places * factor[:, None]
            quarter = self.dim // 4
            powers = torch.arange(quarter, device=device, dtype=torch.float32) / quarter
            angles = 2 * math.pi * places.unsqueeze(-1) * self.theta**-powers  # [1 or B, N, 2, d/4]
            angles = angles.flatten(2).repeat(1, 1, 2).unsqueeze(1)
            return Rotation(angles.cos(), angles.sin())


class RotaryAttention(Attention):
    """Attention of rotated queries and keys, each head normalized first unless `qk_norm` is "none".

    qk_norm: "plain" is a layer norm without weights, "weight" one with, "affine" one with bias too.
    """

    def __init__(self, dim: int, num_heads: int, *, qk_norm: str, **options):
        super().__init__(dim, num_heads, **options)
        check_choice("qk_norm", qk_norm, QK_NORMS)
        self.q_norm, self.k_norm = (self.head_norm(qk_norm, dim // num_heads) for _ in range(2))

    def head_norm(self, kind: str, width: int) -> nn.Module:
        """Return the norm of a head's queries or keys; what it does not train stays 1 or 0."""
        if kind == "none":
            return nn.Identity()
        norm = nn.LayerNorm(width, eps=1e-6)
        norm.weight.requires_grad_(kind != "plain")
        norm.bias.requires_grad_(kind == "affine")
        return norm

    def project(self, x: Tensor, last: int | None = None) -> list[Tensor]:
        q, k, v = super().project(x, last)
        return [self.q_norm(q), self.k_norm(k), v]

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Rotation, causal: bool = False
    ) -> Tensor:
        return super().attend(bias(q), bias(k), v, None, causal)

    def probabilities(self, q: Tensor, k: Tensor, bias: Rotation | Tensor | None) -> Tensor:
        """As `Attention.probabilities`; with a rotation of queries and keys as they are
        projected."""
        if isinstance(bias, Rotation):
            q, k, bias = bias(q), bias(k), None
        return super().probabilities(q, k, bias)


class GatedMlp(nn.Module):
    """An activation of one linear layer times another, then a third: SwiGLU with "silu"."""

    def __init__(self, dim: int, hidden_dim: int, drop: float, act: str):
        super().__init__()
        self.act = ACTIVATIONS[act]
        self.fc1_g = nn.Linear(dim, hidden_dim)
        self.fc1_x = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.act(self.fc1_g(x)) * self.fc1_x(x)))


class RotaryBlock(Block):
    """A block of `RotaryAttention`, whose MLP has any activation and may be gated."""

    attention = RotaryAttention

    def __init__(self, dim, num_heads, *, mlp_ratio, drop, act, gated_mlp, **options):
        super().__init__(dim, num_heads, mlp_ratio=mlp_ratio, drop=drop, **options)
        check_choice("act", act, tuple(ACTIVATIONS))
        if gated_mlp:
            self.mlp = GatedMlp(dim, int(dim * mlp_ratio), drop, act)
        else:
            self.mlp.fc2.act = ACTIVATIONS[act]


class RotaryViT(VisionTransformer):
    """A ViT without position embeddings, whose attention rotates queries and keys of patches
    (docs/methods/nepa.md).

    qk_norm: see `RotaryAttention`. act: "gelu", "silu" or "relu"; gated_mlp: see
    `GatedMlp`. rope_theta, pos_shift, pos_jitter, pos_rescale: see `RotaryPositions`. The mean of
    patch tokens is taken of normed ones. freeze_patch_embed: the projection of the patches is not
    trained.
    """

    # published files leave norms without weights out
    may_be_missing = (".q_norm.", ".k_norm.")

    def __init__(
        self,
        *,
        qk_norm: str = "none",
        act: str = "gelu",
        gated_mlp: bool = False,
        rope_theta: float = 100.0,
        pos_shift: float | None = None,
        pos_jitter: float | None = None,
        pos_rescale: float | None = None,
        freeze_patch_embed: bool = False,
        **vit,
    ):
        self.block = partial(RotaryBlock, qk_norm=qk_norm, act=act, gated_mlp=gated_mlp)
        super().__init__(**vit, k_bias=True, pos_embed="none", rel_pos_bias="none")
        self.norm = nn.LayerNorm(self.embed_dim, eps=1e-6)
        self.rope = RotaryPositions(
            self.patch_embed.grid_size, self.embed_dim // self.blocks[0].attn.num_heads,
            rope_theta, pos_shift, pos_jitter, pos_rescale,
        )  # fmt: skip
        self.patch_embed.requires_grad_(not freeze_patch_embed)

    def position_bias(self) -> Rotation:
        return self.rope(self.cls_token.device)

    def run_blocks(
        self, x: Tensor, changes: PositionChanges | None = None, *, causal: bool = False
    ) -> Tensor:
        """Tokens [B, T, C] after all blocks; `causal`: no token sees a later one. `changes` of the
        positions are drawn here in training if they are not given."""
        if changes is None and self.training and self.rope.noise_size:
            changes = self.rope.draw(torch.rand(len(x), self.rope.noise_size, device=x.device))
        rotation = self.rope(x.device, changes)
        for block in self.blocks:
            x = self._run_block(block, x, rotation, causal=causal)
        return x

    def pool(self, x: Tensor) -> Tensor:
        return super().pool(self.norm(x) if self.global_pool == "avg" else x)

    def no_weight_decay(self) -> set[str]:
        return set()  # the class token is decayed

    def _init_module(self, module: nn.Module) -> None:
        super()._init_module(module)
        if isinstance(module, nn.Conv2d):
            self._init_token(module.weight)
            nn.init.zeros_(module.bias)

    def _rescale(self, blocks: nn.ModuleList) -> None:
        """Leave the blocks as they are, unlike BEiT."""


# --------------------------------------------------------------------------------------------------
# Registered classifiers


for _size, _options in VIT_SIZES.items():
    for _input_size in (224, 384):
        # BEiT's: a relative position table in each block, layer scale, mean pooling
        # (docs/methods/conmim.md#fine-tuning)
        _beit = {
            **_options,
            "input_size": _input_size,
            "rel_pos_bias": "per_block",
            "init_values": 0.1,
        }
        register(f"beit_{_size}_patch16_{_input_size}", VisionTransformer, **_beit)
        # SemanticMIM's in that form: absolute positions
        # (docs/methods/beit_maskfeat_semanticmim.md#two-forms)
        _beit |= {"rel_pos_bias": "none", "pos_embed": "learned"}
        register(f"beit_{_size}_patch16_{_input_size}_abs_pos", VisionTransformer, **_beit)

for _size, _options in MAE_SIZES.items():
    for _patch_size in (16, 14, 8):
        # MAE's: sine-cosine positions that train on, keys with a bias; the head's std is 0.02 *
        # `init_scale` (docs/methods/mae_semmae.md#fine-tuning)
        _vit = {
            **_options,
            "patch_size": _patch_size,
            "k_bias": True,
            "pos_embed": "sincos_trainable",
        }
        register(f"vit_{_size}_patch{_patch_size}_224", VisionTransformer, **_vit)

for _size, _options in MIM_VIT_SIZES.items():
    # BEiT's with learned positions (docs/methods/simmim_a2mim.md#classifiers)
    _mim = {"rel_pos_bias": "per_block", "pos_embed": "learned", "init_values": 0.1}
    register(f"mim_{_size}_patch16_224", VisionTransformer, **_options, **_mim)

for _size, _options in VIT_SIZES.items():
    # NEPA's (docs/methods/nepa.md#fine-tuning)
    _rotary = {"qk_norm": "weight", "init_values": 1e-5, "pos_rescale": 2.0}
    register(f"rope_vit_{_size}_patch14_224", RotaryViT, **_options, **_rotary, patch_size=14)
