"""Pixio and NEPA beyond their reference cases: sizes, masks, positions, what they hand on."""

import pytest
import timm
import torch
from helpers import METHODS, SIZE, arguments, start
from reference.case import OWN_CASES, load
from timm.layers.pos_embed_sincos import RotaryEmbeddingDinoV3

from masking_generator import squares_of
from modeling_finetune import RotaryPositions, RotaryViT, create_model
from modeling_pretrain import NEPA, Pixio
from optim_factory import param_groups
from unimim.checkpoint.files import encoder_file, list_checkpoints, timm_arguments_of
from unimim.checkpoint.loading import load_pretrained
from unimim.checkpoint.names import to_timm
from unimim.cli.models import build_classifier
from unimim.engine.session import Position

VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2}
DECODER = {"decoder_embed_dim": 24, "decoder_depth": 2, "decoder_num_heads": 2}
NEPA_VIT = VIT | {"input_size": 16, "patch_size": 4, "qk_norm": "weight"}


def small_pixio(**options) -> Pixio:
    return Pixio(**{"input_size": (32, 48), "patch_size": 4, **VIT, **DECODER, **options})


def trained(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


# --------------------------------------------------------------------------------------------------
# Pixio


def test_pixio_is_as_large_as_published():
    with torch.device("meta"):
        model = create_model("pixio_huge_patch16_256")
    encoder = model.encoder_state_dict(model.state_dict())
    assert sum(value.numel() for value in encoder.values()) == 631_013_120
    assert trained(model) == 733_075_968


def test_pixio_hides_whole_squares_and_decays_its_positions():
    model = small_pixio(mask_grid=4, mask_ratio=0.6)  # 2 x 3 squares, 2 of them visible
    assert model.noise_size == 6 and model.cls_token.shape == (1, 8, 32)
    _, order, visible = model.mask_patches({"image": torch.randn(5, 3, 32, 48)})
    assert visible == 2 * 16 and torch.equal(order.sort(1)[0], torch.arange(96).expand(5, -1))
    hidden = torch.ones(5, 96).scatter(1, order[:, :visible], 0.0)
    squares = hidden[:, squares_of((8, 12), 4)]  # [B, squares, patches]
    assert torch.equal(squares.amin(2), squares.amax(2)) and (squares.mean(2).sum(1) == 4).all()
    decayed, plain = sorted(param_groups(model, 0.1), key=lambda group: -group["weight_decay"])
    tables = {id(model.pos_embed), id(model.decoder_pos_embed), id(model.cls_token)}
    assert tables <= {id(p) for p in decayed["params"]} and plain["weight_decay"] == 0
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.decoder_pos_embed.std().item() == pytest.approx(0.02, rel=0.1)


def test_a_square_that_does_not_divide_the_grid_is_refused():
    with pytest.raises(ValueError, match="mask_grid=3 does not divide the grid of 8 x 12 patches"):
        small_pixio(mask_grid=3)


def test_pixio_shows_what_it_predicts():
    model = small_pixio(mask_grid=2, num_cls_tokens=3)
    images = torch.randn(2, 3, 32, 48)
    shown = model.reconstruct({"image": images})
    known = shown.masked != 0
    assert torch.equal(shown.pasted[known], images[known]) and 0 < known.float().mean() < 0.3


# --------------------------------------------------------------------------------------------------
# NEPA


@pytest.mark.parametrize(("size", "count"), [("base", 85_527_552), ("large", 302_967_808)])
def test_nepa_is_as_large_as_published(size, count):
    with torch.device("meta"):
        assert trained(create_model(f"nepa_{size}_patch14_224")) == count


def test_positions_are_those_of_dinov3():
    positions = RotaryPositions((3, 5), 16, 100.0, None, None, None)
    theirs = RotaryEmbeddingDinoV3(16, temperature=100.0, rotate_half=True, grid_indexing="ij")
    sin, cos = theirs.get_embed((3, 5)).chunk(2, dim=-1)
    ours = positions(torch.device("cpu"))
    torch.testing.assert_close(ours.cos[0, 0], cos, rtol=0, atol=1e-6)
    torch.testing.assert_close(ours.sin[0, 0], sin, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="heads of 6 channels"):
        RotaryPositions((3, 5), 6, 100.0, None, None, None)


def test_changes_of_positions_keep_their_ranges_and_follow_the_noise():
    positions = RotaryPositions((2, 2), 8, 100.0, 0.4, 1.5, 2.0)
    ends = torch.tensor([[0.0] * 5, [0.5] * 5, [1.0] * 5])
    shift, jitter, rescale = positions.draw(ends)
    assert shift[:, 0].tolist() == pytest.approx([-0.4, 0, 0.4])
    assert jitter[:, 1].tolist() == pytest.approx([1 / 1.5, 1, 1.5])
    assert rescale[:, 0].tolist() == pytest.approx([0.5, 1, 2])
    model = NEPA(**NEPA_VIT)
    batch = {"image": torch.randn(2, 3, 16, 16), "noise": torch.tensor([[0.1], [0.8]])}
    losses = [model(batch)["loss"], model(batch)["loss"], model(batch, torch.rand(2, 1))["loss"]]
    assert losses[0] == losses[1] != losses[2]
    model.eval()
    assert model(batch)["loss"] == model(batch, torch.rand(2, 1))["loss"]


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_no_token_of_nepa_sees_a_later_one_and_the_encoder_sees_all(kernel):
    images = torch.randn(1, 3, 16, 16)
    other = images.clone()
    other[:, :, 8:] += 1  # the last two rows of patches
    model = NEPA(**NEPA_VIT, attn=kernel, init_values=1.0).eval()
    tokens = [model.embed(model.patch_embed(x), None) for x in (images, other)]
    for causal in (True, False):
        first, second = (model.run_blocks(x, causal=causal) for x in tokens)
        moved = (first - second).abs().amax(-1)[0]
        assert (moved[:9] < 1e-6).all() == causal and (moved[9:] > 1e-6).all()
    assert torch.equal(model.forward_features(other), second)
    probabilities = model.attention_maps(images)
    assert (probabilities > 0).all() and torch.allclose(probabilities.sum(-1), torch.ones(1))
    predictions = []
    model.compare = lambda predicted, target: predictions.append(predicted) or {}
    for x in (images, other):
        model({"image": x})
    moved = (predictions[0] - predictions[1]).abs().amax(-1)[0]
    assert (moved[:9] < 1e-6).all() and (moved[9:] > 1e-6).all()


def test_the_target_is_the_next_embedding_and_gets_no_gradient_itself():
    model = NEPA(**NEPA_VIT, pos_rescale=None)
    predicted = torch.randn(2, 4, 32, requires_grad=True)
    target = torch.randn(2, 4, 32)
    out = model.compare(predicted, target)
    cosine = torch.cosine_similarity(predicted, target, dim=-1)
    assert out["loss"].item() == pytest.approx(-cosine.mean().item(), abs=1e-6)
    between = torch.cosine_similarity(target[0], target[1], dim=-1).mean()
    assert float(out["target_cos"]) == pytest.approx(float(between), abs=1e-6)
    same = model.compare(predicted, target[:1].expand(2, -1, -1))["target_cos"]
    assert float(same) == pytest.approx(1, abs=1e-5)
    batch = {"image": torch.randn(2, 3, 16, 16)}
    seen = []
    model.compare = lambda predicted, target: seen.append((predicted, target)) or {}
    model(batch)
    (predicted, target), embeddings = seen[0], model.patch_embed(batch["image"])
    assert torch.equal(target, embeddings) and not target.requires_grad
    assert predicted.shape == target.shape and predicted.requires_grad
    with pytest.raises(ValueError, match=r"num_cls_tokens.* is not an option of nepa_tiny"):
        create_model("nepa_tiny_patch14_224", num_cls_tokens=2)


def test_the_ema_begins_as_a_copy_after_the_first_step():
    model = NEPA(**NEPA_VIT, use_ema_model=True)
    model.cls_token.data += 1
    model.after_step(0.0)
    assert torch.equal(model.teacher.cls_token, model.cls_token)
    model.cls_token.data += 1
    model.after_step(0.1)
    moved = model.cls_token - model.teacher.cls_token
    assert moved.mean().item() == pytest.approx(0.9999, abs=1e-5)


@pytest.mark.parametrize("gated", [False, True])
def test_timm_loads_nepas_encoder_strictly_with_equal_features(gated):
    act = "silu" if gated else "gelu"
    model = NEPA(**NEPA_VIT, gated_mlp=gated, act=act).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    encoder = to_timm(model.encoder_state_dict())
    theirs = timm.create_model(**model.timm_arguments(encoder)).eval()
    theirs.load_state_dict(encoder)
    form = {"global_pool": "token", "num_classes": 0, "init_values": 1e-5}
    ours = RotaryViT(**NEPA_VIT, gated_mlp=gated, act=act, **form)
    ours.eval().load_state_dict(encoder)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        tokens = ours.norm(ours.forward_features(images))
        torch.testing.assert_close(theirs.forward_features(images), tokens, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("method", "model"), [("pixio", "vit"), ("nepa", "rope_vit")])
def test_the_encoder_is_fine_tuned_whole(tmp_path, method, model):
    run, _ = start("pretrain", tmp_path, *METHODS[method])
    run.session.save(Position(), finished=True)
    file = list_checkpoints(tmp_path)[0]
    patch = {"vit": "16", "rope_vit": "14"}[model]
    flags = ["--model", f"{model}_tiny_patch{patch}_224", "--model_kwargs", *SIZE]
    for path in (file, encoder_file(file)):
        args = arguments("finetune", tmp_path, *flags, "--finetune", str(path))
        args.nb_classes = 10
        network = build_classifier(args)
        report = load_pretrained(network, path, min_matched=1.0)
        assert {name.partition(".")[0] for name in report.missing} == {"fc_norm", "head"}
    assert network.num_prefix_tokens == (2 if method == "pixio" else 1)
    assert timm_arguments_of(encoder_file(file))["depth"] == 2
    frozen = RotaryViT(**NEPA_VIT, freeze_patch_embed=True)
    assert not any(p.requires_grad for p in frozen.patch_embed.parameters())


def test_published_weights_without_norms_of_queries_load_into_a_classifier():
    """The released ViT-B was trained without weights in these norms and is fine-tuned with."""
    case = load(OWN_CASES / "nepa/gelu_qknorm_eval")
    config = case.config
    network = RotaryViT(
        input_size=config["image_size"], patch_size=config["patch_size"], embed_dim=48, depth=3,
        num_heads=3, mlp_ratio=128.5 / 48, init_values=1e-5, qk_norm="weight",
    )  # fmt: skip
    report = load_pretrained(network, case.inputs("weights/"), min_matched=1.0)
    assert not report.ignored
    norms = {
        f"blocks.{i}.attn.{k}_norm.{w}" for i in range(3) for k in "qk" for w in ("weight", "bias")
    }
    assert norms <= set(report.missing)
    assert set(report.missing) - norms == {
        "fc_norm.weight",
        "fc_norm.bias",
        "head.weight",
        "head.bias",
    }
