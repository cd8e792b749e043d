"""BEiT, MaskFeat and SemanticMIM: what the bottleneck lets through, masks of any counts, losses and
work in numbers."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import METHODS, TOKENIZER, arguments
from torch import Tensor, nn

from modeling_finetune import create_model, list_models
from modeling_pretrain import (
    BEiT,
    MaskFeat,
    SemanticBEiT,
    SemanticMIM,
)
from modeling_targets import VisualTokenHead, VisualTokenLoss
from optim_factory import param_groups
from scripts.benchmarks.benchmark import LivingBytes
from scripts.benchmarks.published import make_straightforward
from unimim.cli.models import build_method
from unimim.data.pretraining import build_data
from unimim.data.views import MEAN_STD
from unimim.engine.monitor import count_flops
from unimim.engine.state import Normalize, with_mask_counts

SIZE = {"input_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
FORMS = {"beit": (SemanticBEiT, {"vocab_size": 24, "init_values": 0.1}), "maskfeat": (MaskFeat, {})}
each_form = pytest.mark.parametrize("form", FORMS)


def build(form: str, **options) -> SemanticMIM:
    cls, own = FORMS[form]
    torch.manual_seed(0)
    model = cls(**{**SIZE, "num_cls_tokens": 3, **own, **options})
    for parameter in model.parameters():  # away from a start at which little is mixed
        parameter.data.add_(0.1 * torch.randn(parameter.shape))
    return model.double()


@each_form
def test_no_projection_has_a_bias_without_qkv_bias(form):
    """Nor do those of the mask tokens' blocks
    (docs/methods/beit_maskfeat_semanticmim.md#two-forms)."""

    def biased(**options) -> set[str]:
        names = [name for name, _ in build(form, **options).named_parameters()]
        return {
            name.split(".")[0] for name in names if name.endswith(("qkv.bias", "q_bias", "v_bias"))
        }

    assert biased() == {"blocks", "mask_blocks"} and biased(qkv_bias=False) == set()


def masks(count: int, batch: int = 2, cells: int = 16, seed: int = 0) -> Tensor:
    order = torch.rand(batch, cells, generator=torch.Generator().manual_seed(seed)).argsort(1)
    side = math.isqrt(cells)
    return (
        torch.zeros(batch, cells, dtype=torch.bool)
        .scatter_(1, order[:, :count], True)
        .view(batch, side, side)
    )


def batch_of(count: int = 10, seed: int = 1, **more: Tensor) -> dict[str, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    words = torch.randint(0, 24, (2, 16), generator=draws)
    return {
        "image": torch.randn(2, 3, 32, 32, generator=draws).double(),
        "mask": masks(count),
        "target_ids": words,
        **more,
    }


def mask_tokens(model: SemanticMIM, batch: dict[str, Tensor], classes: list[Tensor] | None = None):
    """Mask tokens and the class tokens after each encoder block, which `classes` replace on their
    way if given."""
    num_cls, seen, handles = model.num_prefix_tokens, [], []
    front = model.mask_blocks is None  # where the class tokens stand

    def swap(block: nn.Module, given: tuple, out: Tensor) -> Tensor:
        rest = out[:, num_cls:] if front else out[:, :-num_cls]
        own = out[:, :num_cls] if front else out[:, -num_cls:]
        if block is model.blocks[-1] and front:
            return out  # mask tokens only
        seen.append(own)
        if classes is None:
            return out
        own = classes[len(seen) - 1]
        return torch.cat((own, rest) if front else (rest, own), 1)

    handles = [block.register_forward_hook(swap) for block in model.blocks]
    tokens = model.encode(batch["image"], *model.patch_positions(batch))
    for handle in handles:
        handle.remove()
    return tokens, seen


# --------------------------------------------------------------------------------------------------
# The bottleneck


@each_form
@pytest.mark.parametrize("use_bottleneck", [True, False])
def test_what_mask_tokens_learn_of_the_image_passes_the_class_tokens(form, use_bottleneck):
    """Another image under the first one's class tokens: with the bottleneck nothing changes,
    without it does."""
    model = build(form, use_bottleneck=use_bottleneck)
    first, second = batch_of(seed=1), batch_of(seed=2)
    with torch.no_grad():
        tokens, classes = mask_tokens(model, first)
        other, _ = mask_tokens(model, second)
        swapped, _ = mask_tokens(model, second, classes)
    assert (tokens - other).abs().max() > 1e-2
    assert torch.equal(swapped, tokens) is use_bottleneck
    if not use_bottleneck:
        assert (swapped - tokens).abs().max() > 1e-2


@each_form
@pytest.mark.parametrize("use_bottleneck", [True, False])
def test_gradient_of_visible_pixels_without_the_class_tokens(form, use_bottleneck):
    model = build(form, use_bottleneck=use_bottleneck)
    batch = batch_of()
    batch["image"].requires_grad_(True)
    _, classes = mask_tokens(model, batch)
    tokens, _ = mask_tokens(model, batch, [c.detach() for c in classes])
    tokens.square().sum().backward()
    assert (
        bool((batch["image"].grad is not None) and batch["image"].grad.any()) is not use_bottleneck
    )
    batch["image"].grad = None
    mask_tokens(model, batch)[0].square().sum().backward()
    visible = ~batch["mask"].repeat_interleave(8, 1).repeat_interleave(8, 2)
    seen = batch["image"].grad.abs().sum(1) > 0
    assert torch.equal(seen, visible), "every visible pixel counts, and no hidden one"


def test_the_encoder_never_sees_a_mask_token():
    model = build("maskfeat", separate_mask=True)
    streams = []
    for seed, count in ((3, 4), (4, 9)):
        batch = batch_of(target_mask=masks(count, seed=seed))
        streams.append(mask_tokens(model, batch)[1])
    assert all(torch.equal(a, b) for a, b in zip(*streams, strict=True))


@each_form
@pytest.mark.parametrize("num_cls_tokens", [1, 16])
@pytest.mark.parametrize("use_bottleneck", [True, False])
def test_every_parameter_is_trained(form, num_cls_tokens, use_bottleneck):
    """DDP would wait for a parameter without a gradient."""
    model = build(form, num_cls_tokens=num_cls_tokens, use_bottleneck=use_bottleneck)
    assert model.cls_token.shape == (1, num_cls_tokens, 32) and model.pos_embed.shape == (
        1,
        num_cls_tokens + 16,
        32,
    )
    model(batch_of())["loss"].backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert (model.mask_blocks is None) is not use_bottleneck


@each_form
def test_drop_path_and_checkpointing(form):
    model = build(form, drop_path=0.5)
    rates = [
        [block.drop_path.drop_prob for block in blocks]
        for blocks in (model.blocks, model.mask_blocks)
    ]
    assert rates == [[0.0, 0.25, 0.5]] * 2
    losses = []
    for checkpointing in (False, True):
        model.grad_checkpointing = checkpointing
        torch.manual_seed(5)
        losses.append(model(batch_of())["loss"])
        losses[-1].backward()
    assert torch.equal(*losses)


# --------------------------------------------------------------------------------------------------
# Masks


@each_form
def test_masks_drawn_apart(form):
    """Predicted patches may be visible, hidden ones may be left out; the loss is that of the listed
    ones."""
    model = build(form, separate_mask=True)
    assert "target_mask" in model.views and model.views.index("mask") < model.views.index(
        "target_mask"
    )
    target = masks(7, seed=9)
    batch = batch_of(10, target_mask=target)
    assert (target & ~batch["mask"]).any() and (batch["mask"] & ~target).any()
    visible, predicted = model.patch_positions(batch)
    assert visible.shape == (2, 6) and predicted.shape == (2, 7)
    tokens = model.encode(batch["image"], visible, predicted)
    if form == "maskfeat":
        wanted = model.target.hog(batch["image"])[target.flatten(1)]
        expected = (model.hog_head(tokens).flatten(0, 1) - wanted).square().mean()
    else:
        logits = F.linear(tokens.flatten(0, 1), model.lm_head.weight, model.lm_head.bias)
        expected = F.cross_entropy(logits, batch["target_ids"][target.flatten(1)])
    torch.testing.assert_close(model(batch)["loss"].double(), expected, rtol=1e-6, atol=1e-6)


@each_form
def test_unequal_counts_are_refused(form):
    """Published code would mix patches of different images where the sum divides by the batch."""
    model = build(form)
    batch = batch_of()
    batch["mask"] = torch.stack((masks(4)[0], masks(8)[0]))
    with pytest.raises(
        ValueError,
        match=r"mask selects 4 patches of one image and 8 of another.*use random",
    ):
        model(batch)
    batch = batch_of(target_mask=torch.stack((masks(4)[0], masks(8)[0])))
    with pytest.raises(ValueError, match="target_mask selects 4 patches"):
        model(batch)


def test_counts_come_from_the_host():
    raw = {
        "image": torch.zeros(2, 3, 32, 32, dtype=torch.uint8),
        "mask": masks(10),
        "target_mask": masks(7),
    }
    raw["image_second"] = torch.full((2, 3, 32, 32), 255, dtype=torch.uint8)
    normalize = Normalize(MEAN_STD["imagenet"], torch.device("cpu"), raw=("image_second",))
    batch = normalize(with_mask_counts(raw))
    assert (batch["mask_counts"], batch["target_mask_counts"], batch["max_masked"]) == (
        (10, 10),
        (7, 7),
        10,
    )
    assert (
        torch.equal(batch["image_second"], raw["image_second"])
        and batch["image"].is_floating_point()
    )
    model = build("maskfeat", separate_mask=True).float()
    assert torch.equal(
        model(batch)["loss"], model({k: v for k, v in batch.items() if "count" not in k})["loss"]
    )


# --------------------------------------------------------------------------------------------------
# Losses


@pytest.mark.parametrize("counted", [True, False])
def test_word_loss_is_the_cross_entropy(monkeypatch, counted):
    monkeypatch.setattr(VisualTokenLoss, "rows", 5)
    torch.manual_seed(0)
    head, words = VisualTokenHead(16, 30), torch.randint(0, 30, (3, 7))
    tokens = torch.randn(3, 7, 16, requires_grad=True)
    counts = torch.rand(3, 7) < 0.6 if counted else None
    rows = torch.ones(3, 7, dtype=torch.bool) if counts is None else counts
    loss, hits = head(tokens, words, counts)
    (3 * loss).backward()
    found = [tokens.grad, head.weight.grad, head.bias.grad]
    tokens.grad = None
    head.zero_grad()
    logits = F.linear(tokens, head.weight, head.bias)[rows]
    expected = F.cross_entropy(logits, words[rows])
    (3 * expected).backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(hits, (logits.argmax(-1) == words[rows]).float().mean())
    torch.testing.assert_close(found, [tokens.grad, head.weight.grad, head.bias.grad])


def test_word_loss_never_holds_all_logits(monkeypatch):
    monkeypatch.setattr(VisualTokenLoss, "rows", 32)
    rows, words = 1024, 2048
    head = VisualTokenHead(8, words)
    tokens = torch.randn(1, rows, 8, requires_grad=True)
    targets = torch.randint(0, words, (1, rows))
    with LivingBytes() as chunked:
        head(tokens, targets)[0].backward()
    with LivingBytes() as whole:
        F.cross_entropy(
            F.linear(tokens, head.weight, head.bias).flatten(0, 1), targets.flatten()
        ).backward()
    assert chunked.peak < rows * words * 4 / 4 < whole.peak


def test_word_loss_in_half_precision():
    torch.manual_seed(0)
    head, tokens = VisualTokenHead(64, 256), torch.randn(2, 50, 64, requires_grad=True)
    words = torch.randint(0, 256, (2, 50))
    head(tokens, words)[0].backward()
    exact = head.weight.grad.clone()
    head.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = head(tokens, words)
    loss.backward()
    assert loss.dtype == head.weight.grad.dtype == torch.float32
    assert 0 < (head.weight.grad - exact).norm() / exact.norm() < 0.02


def test_beits_last_block_computes_masked_patches_only():
    """Of different numbers in each image; the rest is what all tokens would give."""
    torch.manual_seed(0)
    model = BEiT(**SIZE, vocab_size=24, rel_pos_bias="shared", init_values=0.1).double()
    mask = torch.stack((masks(3)[0], masks(9)[1]))
    batch = batch_of(mask=mask)
    out = model(batch)
    tokens = model.encode_masked(batch["image"], mask)[:, 1:][mask.flatten(1)]
    logits = F.linear(tokens, model.lm_head.weight, model.lm_head.bias)
    expected = F.cross_entropy(logits, batch["target_ids"][mask.flatten(1)])
    torch.testing.assert_close(out["loss"].double(), expected, rtol=1e-6, atol=1e-6)
    out["loss"].backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert torch.equal(model(batch | {"max_masked": 9})["loss"], out["loss"])


# --------------------------------------------------------------------------------------------------
# Work


@pytest.mark.parametrize(
    ("name", "hidden"), [("semanticmim_maskfeat", 157), ("semanticmim_beit", 118)]
)
def test_a_step_takes_at_most_nine_tenths_of_the_plain_form(name, hidden):
    model = create_model(f"{name}_tiny_patch16_224", depth=4)
    batch = {"image": torch.randn(1, 3, 224, 224), "mask": masks(hidden, 1, 196)}
    batch["target_ids"] = torch.randint(0, 8192, (1, 196))
    ours = count_flops(lambda: model(batch)["loss"].backward())
    make_straightforward(model)
    assert ours < 0.9 * count_flops(lambda: model(batch)["loss"].backward())


@each_form
@pytest.mark.parametrize("use_bottleneck", [True, False])
def test_the_plain_variant_computes_the_same(form, use_bottleneck):
    model, batch = build(form, use_bottleneck=use_bottleneck), batch_of(10)
    out = model(batch)
    out["loss"].backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    make_straightforward(model)
    plain = model(batch)["loss"]
    plain.backward()
    torch.testing.assert_close(plain, out["loss"])
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, grads[name], rtol=1e-5, atol=1e-7, msg=name)


# --------------------------------------------------------------------------------------------------
# Start, groups, construction


def test_start_of_beits_form():
    """The standard deviations that the published initialization has."""
    torch.manual_seed(0)
    model = create_model("semanticmim_beit_small_patch16_224", depth=2, num_cls_tokens=8)
    for name in (
        "cls_token",
        "pos_embed",
        "patch_embed.proj.weight",
        "blocks.1.attn.qkv.weight",
        "lm_head.weight",
    ):
        assert model.get_parameter(name).std().item() == pytest.approx(0.02, rel=0.05), name
    assert model.pos_embed.abs().max() > 0.05, "not cut at one deviation, as the original BEiT is"
    xavier = math.sqrt(2 / (384 + 1536))
    for blocks in (model.blocks, model.mask_blocks):
        for layer, block in enumerate(blocks, 1):
            assert block.attn.proj.weight.std().item() == pytest.approx(
                0.02 / math.sqrt(2 * layer), rel=0.05
            )
            assert block.mlp.fc1.weight.std().item() == pytest.approx(xavier, rel=0.05)
            assert block.mlp.fc2.weight.std().item() == pytest.approx(
                xavier / math.sqrt(2 * layer), rel=0.05
            )
            assert 0 < block.mlp.fc1.bias.std() < 2e-6 and block.gamma_1[0].item() == pytest.approx(
                0.1
            )
            assert not block.attn.q_bias.any() and not block.attn.proj.bias.any()
    assert not model.patch_embed.proj.bias.any()


def test_start_of_maskfeats_form():
    torch.manual_seed(0)
    model = create_model("semanticmim_maskfeat_small_patch16_224", depth=2)
    names = (
        "cls_token",
        "patch_embed.proj.weight",
        "blocks.1.attn.proj.weight",
        "mask_blocks.1.mlp.fc2.weight",
    )
    for name in (*names, "hog_head.weight"):
        assert model.get_parameter(name).std().item() == pytest.approx(0.02, rel=0.05), name
    assert model.patch_embed.proj.bias.any() and model.blocks[0].gamma_1 is None
    assert not model.blocks[0].mlp.fc1.bias.any() and not model.hog_head.bias.any()
    assert model.num_prefix_tokens == 8 and model.target.width == 108


def test_the_original_initialization_is_cut_at_one_std():
    torch.manual_seed(0)
    model = create_model("beit_small_patch16_224_8k_vocab", depth=1)
    assert model.lm_head.weight.abs().max() <= 0.02 and model.lm_head.out_features == 8192
    assert not model.lm_head.bias.any()


def test_weight_decay_of_either_form():
    """BEiT's decays the mask token, MaskFeat's the class tokens and positions (3.1)."""
    for form, exempt in (("beit", {"cls_token", "pos_embed"}), ("maskfeat", {"mask_token"})):
        model = build(form)
        groups = {g["group_name"]: {id(p) for p in g["params"]} for g in param_groups(model, 0.05)}
        kept = {
            name
            for name, p in model.named_parameters()
            if p.ndim > 1 and id(p) in groups["no_decay"]
        }
        assert kept == exempt
        assert all(p.ndim > 1 for _, p in model.named_parameters() if id(p) in groups["decay"])


def test_registered_models():
    names = (
        "beit_{}_patch16_224_8k_vocab",
        "maskfeat_{}_patch16_224",
        "semanticmim_beit_{}_patch16_224",
        "semanticmim_maskfeat_{}_patch16_224",
    )
    assert {
        name.format(size) for name in names for size in ("tiny", "small", "base", "large")
    } <= set(list_models())


def test_the_tokenizer_is_no_part_of_the_network(tmp_path):
    method = build_method(arguments("pretrain", tmp_path, *METHODS["semanticmim_beit"]))
    assert method.target.tokenizer.vocab_size == 64 and method.second_size == (32, 32)
    assert method.frozen is method.target.tokenizer.encoder
    assert not any(
        "conv" in name for name in [*method.state_dict(), *dict(method.named_parameters())]
    )
    assert not any(p.requires_grad for p in method.frozen.parameters())
    own = {
        name for name in method.encoder_state_dict() if not name.startswith(("blocks.", "norm."))
    }
    assert own == {"cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}


def test_what_is_refused(tmp_path, capsys):
    def said(method: str, *flags: str) -> str:
        args = arguments("pretrain", tmp_path, *METHODS[method], *flags)
        with pytest.raises(ValueError) as error:
            build_data(args, build_method(args))
        return str(error.value)

    assert "has 64 visual tokens, the model 8192; use --model_kwargs vocab_size=64" in said(
        "beit", "--model_kwargs"
    )
    assert "--second_input_size 112 does not give one visual token per patch; use (32, 32)" in said(
        "beit", "--second_input_size", "112"
    )
    assert "--color_jitter is 1.5" in said("beit", "--color_jitter", "1.5")
    for flags in (
        ("--separate_mask_ratio", "1.5"),
        ("--separate_mask_ratio", "0.5", "--mask_type", "block"),
    ):
        with pytest.raises(SystemExit):
            said("semanticmim_beit", *flags)
        assert "--separate_mask_ratio" in capsys.readouterr().err
    assert "--num_cls_tokens 2 is not an option of mae_tiny" in said("mae", "--num_cls_tokens", "2")
    args = arguments("pretrain", tmp_path, "--model", "beit_tiny_patch16_224_8k_vocab")
    args.model_kwargs = []
    with pytest.raises(ValueError, match="needs --discrete_vae_weight_path"):
        build_data(args, build_method(args))
    with pytest.raises(ValueError, match="num_cls_tokens=2 must be"):
        create_model("beit_tiny_patch16_224", num_cls_tokens=2)
    assert TOKENIZER.is_file()
