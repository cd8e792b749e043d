"""Attention kernels, checkpointed and compiled blocks, published sizes, and what ConMIM's student
and teacher see."""

import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from timm.layers import drop_path as timm_drop_path
from torch import nn
from torch._dynamo.testing import CompileCounter

from modeling_finetune import (
    ActivatedLinear,
    Attention,
    DropPath,
    LinearOfGelu,
    add_scaled,
    create_model,
    flexible,
    relative_position_index,
    table_rows,
)
from modeling_pretrain import ConMIM, masked_positions, take
from unimim.engine.compiling import compile_blocks

KERNELS = ("eager", "sdpa", "auto")
SIZE = {"embed_dim": 32, "depth": 2, "num_heads": 2, "input_size": (16, 24), "patch_size": 4}
GRID = (4, 6)


def classifier(**options) -> nn.Module:
    torch.manual_seed(0)
    model = create_model(
        "beit_tiny_patch16_224", **{**SIZE, "num_classes": 5, "init_scale": 1.0, **options}
    )
    return randomized(model)


def conmim(**options) -> ConMIM:
    torch.manual_seed(0)
    sizes = {**SIZE, "projector_hidden_dim": 32, "projector_out_dim": 16}
    return randomized(create_model("conmim_tiny_patch16_224", **{**sizes, **options}))


def randomized(model: nn.Module) -> nn.Module:
    """Biases and tables that start at zero would hide mistakes."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1 or name.endswith("_table"):
                p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return model


def images(count: int = 3, seed: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, 16, 24, generator=torch.Generator().manual_seed(seed))


def batch(masked: tuple[int, ...] = (12, 12, 12)) -> dict:
    """Images and masks with so many masked patches each."""
    generator = torch.Generator().manual_seed(3)
    mask = torch.zeros(len(masked), 24, dtype=torch.bool)
    for row, count in zip(mask, masked, strict=True):
        row[torch.randperm(24, generator=generator)[:count]] = True
    count = len(masked)
    return {
        "image": images(count),
        "image_strong": images(count, seed=4),
        "mask": mask.view(count, *GRID),
    }


def loss_and_gradients(model: nn.Module, inputs) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    out = model(inputs)
    loss = out["loss"] if isinstance(out, dict) else out.square().mean()
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad.clone() for name, p in model.named_parameters()}}


def assert_close(ours: dict, theirs: dict, atol: float) -> None:
    for name in ours:
        torch.testing.assert_close(
            ours[name], theirs[name], atol=atol, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


# --------------------------------------------------------------------------------------------------
# Attention


@pytest.mark.parametrize("bias", ["none", "shared", "per_block"])
def test_kernels_agree(bias):
    results = [
        loss_and_gradients(classifier(attn=kernel, rel_pos_bias=bias).double(), images().double())
        for kernel in KERNELS
    ]
    for result in results[1:]:
        assert_close(result, results[0], atol=1e-12)
    single = [
        loss_and_gradients(classifier(attn=kernel, rel_pos_bias=bias), images())
        for kernel in KERNELS
    ]
    for result in single:
        assert_close({k: v.double() for k, v in result.items()}, results[0], atol=1e-5)


def test_flex_attention_under_a_bias(monkeypatch):
    """The numbers and gradients of the explicit form, the bias's too. torch refuses gradients on
    CPUs, where its formulas are the same and only the kernel lacks."""
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_validate_device", lambda *args: None)
    torch.manual_seed(0)
    attention = randomized(
        Attention(32, 2, qkv_bias=True, k_bias=False, attn_drop=0, proj_drop=0, grid=GRID)
    )
    q, k, v = attention.project(torch.randn(3, 25, 32))
    inputs = [t.detach().requires_grad_() for t in (q, k, v)] + [
        attention.relative_position_bias_table
    ]
    bias, weight = attention.position_bias(None), torch.randn(3, 2, 25, 16)
    found = []
    for out in (
        flexible(*inputs[:3], bias),
        attention.probabilities(*inputs[:2], bias) @ inputs[2],
    ):
        found.append((out, *torch.autograd.grad((out * weight).sum(), inputs, retain_graph=True)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_where_flex_attention_is_taken():
    """Not without a bias, under a causal or dense mask, with dropout in training, or on a CPU."""
    attention = Attention(
        32, 2, qkv_bias=True, k_bias=False, attn_drop=0.1, proj_drop=0, kernel="flex"
    ).eval()
    q = torch.empty(3, 2, 25, 16, device="meta")
    bias = torch.empty(2, 25, 25, device="meta", requires_grad=True)
    assert attention.choose_kernel(q, bias) == "flex"
    assert attention.choose_kernel(q, None) == attention.choose_kernel(q, bias[None]) == "sdpa"
    assert (
        attention.choose_kernel(q, bias, causal=True)
        == attention.train().choose_kernel(q, bias)
        == "sdpa"
    )
    assert attention.choose_kernel(torch.empty(3, 2, 25, 16), bias) == "eager"


def test_attention_is_the_softmax_form():
    torch.manual_seed(0)
    attention = randomized(
        Attention(8, 2, qkv_bias=True, k_bias=False, attn_drop=0, proj_drop=0, grid=(2, 2))
    )
    x = torch.randn(1, 5, 8)
    rows = attention.qkv.weight @ x[0].T  # [24, 5]
    bias = torch.cat((attention.q_bias, torch.zeros(8), attention.v_bias))
    q, k, v = (rows + bias[:, None]).view(3, 2, 4, 5)
    heads = []
    for head in range(2):
        scores = q[head].T @ k[head] / 4**0.5
        scores = (
            scores + attention.relative_position_bias_table[relative_position_index((2, 2)), head]
        )
        heads.append(scores.softmax(-1) @ v[head].T)
    expected = F.linear(torch.cat(heads, dim=1), attention.proj.weight, attention.proj.bias)
    torch.testing.assert_close(attention(x)[0], expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_bf16_is_close(kernel):
    model = classifier(attn=kernel)
    whole = model(images())
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(images()).float()
    assert 0 < (whole - rounded).abs().max() < 0.05 * whole.abs().max()


def test_both_position_biases_add():
    model = classifier(rel_pos_bias="per_block")
    both = copy.deepcopy(model)
    for block in both.blocks:
        block.attn.relative_position_bias_table.data.sub_(
            1.5 * model.blocks[0].attn.relative_position_bias_table.data
        )
    shared = classifier(rel_pos_bias="shared")
    table = 1.5 * model.blocks[0].attn.relative_position_bias_table.data
    shared.rel_pos_bias.relative_position_bias_table.data.copy_(table)
    both.rel_pos_bias = shared.rel_pos_bias
    torch.testing.assert_close(both(images()), model(images()), atol=1e-5, rtol=1e-4)


def test_index_of_the_smallest_grid():
    """Written out for 1 x 2 patches: offsets -1, 0, 1, then class-to-patch, patch-to-class,
    class-to-class."""
    assert table_rows((1, 2)) == 6
    assert relative_position_index((1, 2)).tolist() == [[5, 3, 3], [4, 1, 0], [4, 2, 1]]


@pytest.mark.parametrize("layer", [0, 1, -1])
def test_attention_maps(layer):
    model = classifier().eval()
    maps = model.attention_maps(images(), layer)
    assert maps.shape == (3, 2, 25, 25)
    torch.testing.assert_close(maps.sum(-1), torch.ones(3, 2, 25))
    seen = []
    block = model.blocks[layer]
    block.attn.kernel = "eager"
    original = block.attn.probabilities
    block.attn.probabilities = lambda *args: seen.append(original(*args)) or seen[-1]
    model(images())
    torch.testing.assert_close(maps, seen[0])


# --------------------------------------------------------------------------------------------------
# The same numbers in other ways


@pytest.mark.parametrize("make", [classifier, conmim])
def test_checkpointed_blocks_give_the_same(make):
    inputs = images() if make is classifier else batch()
    plain, recomputed = make(drop_path=0.5), make(drop_path=0.5, grad_checkpointing=True)
    results = []
    for model in (plain, recomputed):
        torch.manual_seed(7)
        results.append(loss_and_gradients(model, inputs))
    assert_close(*results, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gelu_is_made_again_in_the_backward_pass(dtype):
    """The very gradients of torch's own functions, without keeping what the GELU gave."""
    torch.manual_seed(0)
    layer, x = ActivatedLinear(12, 7), torch.randn(3, 5, 12, dtype=dtype, requires_grad=True)
    kept, found = [], []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        for act in (F.gelu, partial(F.gelu)):
            layer.act = act
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                out = layer(x)
            found.append((out, *torch.autograd.grad(out.square().sum(), (x, *layer.parameters()))))
            kept.append(None)
    assert [layer.recomputes(t) for t in (x, x.to("meta"))] == [False, False], "of another function"
    layer.act, wanted = F.gelu, []
    for layer.recompute in ("auto", "on", "off"):
        wanted += [layer.recomputes(t) for t in (x, x.to("meta"))]
    assert wanted == [True, False, True, True, False, False]
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    lean, usual = (
        {t.data_ptr() for t in part if t.numel() == x.numel()} for part in split_at_none(kept)
    )
    assert lean == {x.data_ptr()} and len(usual) == 2


def split_at_none(values: list) -> list[list]:
    """The stretches before each None."""
    ends = [k for k, value in enumerate(values) if value is None]
    return [values[begin + 1 : end] for begin, end in zip([-1, *ends], ends, strict=False)]


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_stochastic_depth_draws_as_timm_does(rate):
    """Bit for bit, so that runs of older versions go on with the same numbers."""
    x, drop = torch.randn(64, 3, 5), DropPath(rate)
    torch.manual_seed(3)
    expected = timm_drop_path(x, rate, training=True)
    torch.manual_seed(3)
    assert torch.equal(drop(x), expected)
    assert torch.equal(drop.eval()(x), x)


def test_branches_are_added_in_one_kernel():
    """With layer scale, stochastic depth, both and neither, also where autocast has made the branch
    bf16."""
    torch.manual_seed(0)
    x, gamma, factor = (
        torch.randn(4, 5, 8),
        torch.rand(8),
        torch.tensor([0.0, 2.0, 2.0, 0.0]).view(4, 1, 1),
    )
    for branch in (torch.randn(4, 5, 8), torch.randn(4, 5, 8).bfloat16()):
        for scales in ((None, None), (gamma, None), (None, factor), (gamma, factor)):
            expected = x + branch.float() * math.prod(
                scale for scale in scales if scale is not None
            )
            with torch.autocast("cpu", torch.bfloat16):
                found = add_scaled(x, branch, *scales)
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def test_second_derivatives_of_the_activated_linear():
    torch.manual_seed(0)
    inputs = [
        torch.randn(*size, dtype=torch.float64, requires_grad=True)
        for size in ((2, 3, 4), (5, 4), (5,))
    ]
    assert torch.autograd.gradcheck(LinearOfGelu.apply, inputs)
    assert torch.autograd.gradgradcheck(LinearOfGelu.apply, inputs)


@pytest.mark.slow
def test_compiled_blocks_give_the_same():
    model = conmim()
    compiled = copy.deepcopy(model)
    compile_blocks(compiled, compiled.teacher)
    ours, theirs = loss_and_gradients(compiled, batch()), loss_and_gradients(model, batch())
    torch.testing.assert_close(ours["loss"], theirs["loss"])
    largest = max(float(gradient.abs().max()) for gradient in theirs.values())
    assert_close(ours, theirs, atol=1e-5 * largest)
    assert compiled.state_dict().keys() == model.state_dict().keys()


DEEP = {"embed_dim": 16, "depth": 12, "num_heads": 2, "input_size": (16, 24), "patch_size": 4}
DECODER = {"decoder_embed_dim": 16, "decoder_depth": 9, "decoder_num_heads": 2}


@pytest.fixture
def counter():
    """A backend that counts the graphs it gets and runs them as they are."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield CompileCounter()
    assert not torch._dynamo.utils.counters["graph_break"]
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("name", "options", "graphs"),
    [
        (
            "conmim_tiny_patch16_224",
            {"projector_hidden_dim": 8, "drop_path": 0.1},
            2,
        ),  # student and teacher
        ("mae_tiny_patch16_224", DECODER, 3),  # encoder, decoder and its last block
        (
            "semaim_tiny_patch16_224",
            {"query_depth": 12},
            4,
        ),  # two streams, the map's pass and its last block
        (
            "beit_tiny_patch16_224_8k_vocab",
            {"vocab_size": 8, "drop_path": 0.1},
            2,
        ),  # and the last block
    ],
)
def test_twelve_blocks_share_their_graphs(counter, name, options, graphs):
    """At any depth and rate, and for as many masked patches as there are in a batch."""
    torch.manual_seed(0)
    model = create_model(name, **DEEP, **options)
    model.pad_masks_to(12)
    compile_blocks(model, model.teacher, backend=counter)
    for masked in ((12, 12, 9), (11, 8, 10)):
        inputs = batch(masked) | {
            "target_ids": torch.randint(0, 8, (3, *GRID)),
            "max_masked": max(masked),
        }
        model(inputs)["loss"].backward()
    assert counter.frame_count == graphs
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_classifier_is_compiled_twice(counter):
    """For training, at any rate of stochastic depth, and for evaluation, whose last batch is
    smaller."""
    torch.manual_seed(0)
    model = create_model("beit_tiny_patch16_224", **DEEP, num_classes=5, drop_path=0.3)
    plain = copy.deepcopy(model).eval()
    compile_blocks(model, backend=counter)
    for _ in range(2):
        model(images()).sum().backward()
    assert counter.frame_count == 1
    with torch.no_grad():
        for count in (3, 2):
            torch.testing.assert_close(model.eval()(images(count)), plain(images(count)))
    assert counter.frame_count == 2


def test_blocks_of_convolutional_networks_are_compiled(counter):
    """The first block of a stage and the others; timm's stochastic depth must not make one of
    each."""
    torch.manual_seed(0)
    model = create_model(
        "convnext_tiny",
        num_classes=5,
        input_size=32,
        drop_path=0.3,
        depths=(2, 6, 1, 1),
        dims=(8,) * 4,
    )
    plain = copy.deepcopy(model).eval()
    compile_blocks(model, backend=counter)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert counter.frame_count <= 6
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model.eval()(x), plain(x))


def test_stochastic_depth_in_a_compiled_graph(counter):
    drop = DropPath(0.3)
    drop.share_graph(torch.device("cpu"))
    torch.manual_seed(0)
    kept = torch.compile(drop, backend=counter)(torch.ones(20_000, 1, 2))
    assert set(kept[:, 0, 0].unique().tolist()) == {
        0.0,
        float(torch.tensor(1.0) / torch.tensor(1 - 0.3)),
    }
    assert torch.equal(kept[..., 0], kept[..., 1]), "one draw for each image"
    assert abs(float((kept[:, 0, 0] > 0).float().mean()) - 0.7) < 0.015


def test_last_block_output_is_what_is_pooled():
    model = classifier().eval()
    tokens = model.forward_features(images())
    assert tokens.shape == (3, 25, 32)
    torch.testing.assert_close(model.head(model.fc_norm(tokens[:, 1:].mean(1))), model(images()))


def test_class_token_pooling():
    model = classifier(global_pool="token").eval()
    torch.testing.assert_close(
        model.head(model.norm(model.forward_features(images()))[:, 0]), model(images())
    )
    assert {
        "norm.weight",
        "norm.bias",
    } <= model.state_dict().keys() and "fc_norm.weight" not in model.state_dict()


def test_wrong_image_size_is_refused():
    with pytest.raises(ValueError, match=r"input_size=\(16, 24\) .*the images are \(24, 16\)"):
        classifier()(images().transpose(2, 3))


# --------------------------------------------------------------------------------------------------
# Published sizes (docs/methods/conmim.md#projector, #initialization)


@pytest.fixture
def on_meta(monkeypatch):
    """Build models without memory; the drop rates alone are numbers that construction reads."""
    monkeypatch.setattr(torch, "linspace", partial(torch.linspace, device="cpu"))
    with torch.device("meta"):
        yield


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("size", "total", "lm_head", "projector"),
    [
        ("small", 44_168_360, 3_153_920, 19_415_040),
        ("base", 112_953_680, 6_299_648, 20_987_904),
        ("large", 333_570_496, 8_396_800, 22_036_480),
    ],
)
def test_published_pretraining_sizes(on_meta, size, total, lm_head, projector):
    """All but the dead lm_head of the published model."""
    model = create_model(f"conmim_{size}_patch16_224")
    assert parameters(model) == total - lm_head
    assert parameters(model.projectors) == projector


@pytest.mark.parametrize(
    ("size", "total"), [("small", 22_032_328), ("base", 86_530_984), ("large", 304_430_568)]
)
def test_published_classifier_sizes(on_meta, size, total):
    assert parameters(create_model(f"beit_{size}_patch16_224")) == total


# --------------------------------------------------------------------------------------------------
# ConMIM


def reference_loss(model: ConMIM, inputs: dict) -> torch.Tensor:
    """All N x N similarities, then the masked rows (docs/methods/conmim.md)."""
    mask = inputs["mask"].flatten(1)
    with torch.no_grad():
        keys = F.normalize(model.teacher.project(inputs["image_strong"], None), dim=-1)
    queries = F.normalize(model.project(inputs["image"], mask), dim=-1)
    logits = queries @ keys.transpose(1, 2) / 0.1
    labels = torch.arange(24).expand(len(mask), -1)
    return F.cross_entropy(logits[mask], labels[mask])


@pytest.mark.parametrize("masked", [(12, 12, 12), (1, 24, 5), (3, 0, 7)])
def test_loss_is_over_the_masked_rows(masked):
    """Images with fewer masked patches are padded, and padding must not count."""
    model, inputs = conmim(), batch(masked)
    expected = reference_loss(copy.deepcopy(model), inputs)
    for count in ({}, {"max_masked": max(masked)}, {"max_masked": 24}):
        found = copy.deepcopy(model)(inputs | count)["loss"]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_masked_positions():
    mask = torch.tensor([[0, 1, 0, 1], [1, 0, 0, 0]]).bool()
    positions, counts = masked_positions(mask)
    assert positions[counts].tolist() == [1, 3, 0] and counts.sum(1).tolist() == [2, 1]
    assert take(torch.arange(8.0).view(2, 4, 1), positions)[..., 0][counts].tolist() == [
        1.0,
        3.0,
        4.0,
    ]


def test_student_does_not_see_masked_patches():
    model, inputs = conmim(), batch()
    hidden = inputs["mask"].repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
    changed = torch.where(hidden, torch.full_like(inputs["image"], 9.0), inputs["image"])
    assert torch.equal(
        model(inputs)["loss"], copy.deepcopy(model)(inputs | {"image": changed})["loss"]
    )
    visible = torch.where(hidden, inputs["image"], torch.full_like(inputs["image"], 9.0))
    assert model(inputs)["loss"] != model(inputs | {"image": visible})["loss"]


def test_teacher_is_apart():
    model = conmim()
    state = model.state_dict()
    assert state.keys() == model.teacher.state_dict().keys()
    assert not any("teacher" in name or "average" in name for name in state)
    mine = {id(p) for p in model.parameters()}
    assert not mine & {id(p) for p in model.teacher.parameters()}
    assert all(
        torch.equal(state[name], value)
        for name, value in conmim().teacher.state_dict().items()
        if "mask" in name
    )
    model(batch())["loss"].backward()
    assert all(p.grad is None and not p.requires_grad for p in model.teacher.parameters())


def test_teacher_starts_equal_and_moves_by_the_schedule():
    torch.manual_seed(0)
    model = create_model("conmim_tiny_patch16_224", **SIZE, projector_hidden_dim=8, t_momentum=0.9)
    for name, value in model.teacher.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    start = model.teacher.cls_token.clone()
    with torch.no_grad():
        model.cls_token.add_(1.0)
    model.after_step(0.5)  # half way from 0.9 to 1
    torch.testing.assert_close(model.teacher.cls_token, start + 0.05)
    model.after_step(0.5, applied=0.0)
    torch.testing.assert_close(model.teacher.cls_token, start + 0.05)


def test_ema_by_a_weight_on_the_device():
    """A GPU's form of the same update, which must leave the average as it is where a step was
    skipped."""
    model = conmim(t_momentum=0.9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    other = copy.deepcopy(model)
    before = copy.deepcopy(model.teacher.state_dict())
    model.ema.update(0.9)
    other.ema.update(0.9, torch.tensor(0.0))
    assert all(
        torch.equal(value, before[name]) for name, value in other.teacher.state_dict().items()
    )
    other.ema.update(0.9, torch.tensor(1.0))
    for name, value in other.teacher.state_dict().items():
        torch.testing.assert_close(value, model.teacher.state_dict()[name], rtol=3e-7, atol=3e-7)


def test_teacher_has_no_dropout_but_batch_statistics():
    model = conmim(drop_path=0.9, drop=0.5, attn_drop=0.5)
    assert model.teacher.training
    features = [copy.deepcopy(model.teacher).project(images(), None) for _ in range(2)]
    assert torch.equal(*features)
    plain = conmim().teacher
    plain.load_state_dict(model.teacher.state_dict())
    torch.testing.assert_close(plain.project(images(), None), features[0])
    # every image is normalized with the others: not what running statistics would do
    alone = copy.deepcopy(model.teacher).project(images()[:1], None)
    assert (alone - features[0][:1]).abs().max() > 0.01


def test_encoder_is_the_teachers():
    model = conmim()
    with torch.no_grad():
        model.cls_token.add_(1.0)
    encoder = model.encoder_state_dict()
    assert torch.equal(encoder["cls_token"], model.teacher.cls_token)
    assert "mask_token" not in encoder and not any(
        name.startswith("projectors") for name in encoder
    )
    assert "rel_pos_bias.relative_position_bias_table" in encoder
