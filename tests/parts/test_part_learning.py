"""SemMAE's stage 1: teachers of every naming, the learner and its losses, hard maps, metrics, and
whole runs."""

import json
import signal
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import run_part_learning
from modeling_finetune import VisionTransformer
from unimim.checkpoint.files import save_encoder
from unimim.data.part_maps import MISSING, PartMaps, PartMapWriter
from unimim.data.pretraining import crop_loader, open_parts
from unimim.data.shapes import cached_shapes, make_scene
from unimim.data.sources import build_source
from unimim.data.views import MEAN_STD
from unimim.engine.distributed import StopSignal
from unimim.engine.state import RunContext
from unimim.parts import extraction
from unimim.parts.flags import parse_parts
from unimim.parts.learning import (
    PartLearner,
    PartLearning,
    TeacherFeatures,
    attention_head_maps,
    balance_loss,
    blur,
    diversity_loss,
    foreground,
    hard_maps,
    kmeans_maps,
    load_teacher,
    random_maps,
    temperature_at,
    without_single_cells,
)
from unimim.parts.metrics import PartQuality, best_union_iou, nmi, overlap

TINY = {"patch_size": 8, "depth": 2}
TIMM = "vit_tiny_patch16_224"


@pytest.fixture(autouse=True)
def signals_as_before():
    before = {number: signal.getsignal(number) for number in StopSignal.signals}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def tiny_timm(**options) -> torch.nn.Module:
    torch.manual_seed(0)
    vit = timm.create_model(TIMM, img_size=48, num_classes=0, **{**TINY, **options}).eval()
    for parameter in vit.parameters():  # biases and norms, too, must matter
        parameter.data += 0.05 * torch.randn_like(parameter)
    return vit


def random_teacher(size: int = 48):
    torch.manual_seed(0)
    return load_teacher(TIMM, image_size=size, allow_random=True, model_kwargs=TINY)


def random_features(count: int = 2, dim: int = 16, grid=(4, 4)) -> TeacherFeatures:
    torch.manual_seed(1)
    cells = grid[0] * grid[1]
    attention = torch.rand(count, 3, cells).softmax(-1)
    return TeacherFeatures(torch.randn(count, dim), torch.randn(count, cells, dim), attention)


def some_scenes(count: int, side: int) -> torch.Tensor:
    """Normalized images [count, 3, side, side]."""
    images = [
        Image.fromarray(make_scene("train", i).image).resize((side, side)) for i in range(count)
    ]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in MEAN_STD["imagenet"])
    return (torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255 - mean) / std


# --- teachers -------------------------------------------------------------------------------------


def wrapped(state: dict, prefix: str, **more) -> dict:
    return {**{prefix + name: value for name, value in state.items()}, **more}


HEAD = torch.zeros(3)
NAMINGS = {
    "bare": lambda state: state,
    "dino": lambda state: {
        "student": wrapped(
            state, "module.backbone.", **{"module.backbone.cls_token": torch.zeros(1, 1, 192)}
        ),
        "teacher": wrapped(state, "backbone.", **{"head.mlp.0.bias": HEAD}),
        "epoch": 3,
    },
    "ibot": lambda state: {
        "state_dict": wrapped(state, "module.backbone.", **{"module.backbone.masked_embed": HEAD})
    },
    "mae": lambda state: {"model": {**state, "mask_token": HEAD, "decoder_pred.bias": HEAD}},
}


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("by_name", [True, False], ids=["timm_name", "file_alone"])
def test_every_naming_gives_the_same_features(tmp_path, naming, by_name):
    vit = tiny_timm()
    path = str(tmp_path / "teacher.pth")
    torch.save(NAMINGS[naming](vit.state_dict()), path)
    if by_name:
        teacher = load_teacher(TIMM, image_size=48, checkpoint=path, model_kwargs=TINY)
    else:
        teacher = load_teacher(path, image_size=48)
    images = some_scenes(2, 48)
    with torch.no_grad():
        tokens = vit.forward_features(images)
    features = teacher.look(images)
    assert (teacher.grid, teacher.width, teacher.num_heads) == ((6, 6), 192, 3)
    torch.testing.assert_close(features.cls, tokens[:, 0])
    torch.testing.assert_close(features.patches, tokens[:, 1:])


def test_class_attention_is_that_of_the_last_block(tmp_path):
    vit = tiny_timm()
    torch.save(vit.state_dict(), tmp_path / "teacher.pth")
    images, last = some_scenes(2, 48), vit.blocks[-1]
    seen = []
    last.norm1.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    with torch.no_grad():
        vit.forward_features(images)
        q, k, _ = last.attn.qkv(seen[0]).chunk(3, dim=-1)
    heads = [slice(0, 64), slice(64, 128), slice(128, 192)]
    scores = [torch.einsum("bd,btd->bt", q[:, 0, head], k[:, :, head]) / 8 for head in heads]
    wanted = torch.stack(scores, dim=1).softmax(-1)[:, :, 1:]
    for teacher in (
        load_teacher(str(tmp_path / "teacher.pth"), image_size=48),
        load_teacher(
            TIMM, image_size=48, checkpoint=str(tmp_path / "teacher.pth"), model_kwargs=TINY
        ),
    ):
        torch.testing.assert_close(teacher.look(images).attention, wanted)


def test_our_own_encoders_teach_at_any_size(tmp_path):
    torch.manual_seed(0)
    options = {
        "patch_size": 8,
        "embed_dim": 64,
        "depth": 2,
        "num_heads": 4,
        "num_classes": 0,
        "global_pool": "token",
    }
    vit = VisionTransformer(input_size=48, rel_pos_bias="shared", init_values=0.1, **options).eval()
    torch.nn.init.normal_(vit.rel_pos_bias.relative_position_bias_table)
    path = tmp_path / "encoder-1.safetensors"
    save_encoder(path, vit.state_dict(), {"model": "conmim_tiny_patch16_224"})
    teacher, images = load_teacher(str(path), image_size=48), some_scenes(2, 48)
    with torch.no_grad():
        tokens = vit.norm(vit.forward_features(images))
    torch.testing.assert_close(teacher.look(images).patches, tokens[:, 1:])
    torch.testing.assert_close(
        teacher.look(images).attention, vit.attention_maps(images)[:, :, 0, 1:]
    )
    assert load_teacher(str(path), image_size=64).look(some_scenes(1, 64)).patches.shape == (
        1,
        64,
        64,
    )


def test_a_teacher_stays_frozen():
    teacher = random_teacher()
    assert not teacher.tower.training
    assert not any(parameter.requires_grad for parameter in teacher.tower.parameters())


def test_teachers_that_do_not_fit_are_refused(tmp_path):
    state, path = tiny_timm().state_dict(), str(tmp_path / "x.pth")
    torch.save({k: v for k, v in state.items() if k != "norm.weight"}, path)
    with pytest.raises(ValueError, match=r"x\.pth does not fit --teacher: norm\.weight is missing"):
        load_teacher(path, image_size=48)
    torch.save({**state, "blocks.0.ls1.gamma": torch.ones(192)}, path)
    with pytest.raises(ValueError, match=r"blocks\.0\.ls1\.gamma has no place"):
        load_teacher(TIMM, image_size=48, checkpoint=path, model_kwargs=TINY)
    torch.save({"fc.weight": torch.ones(2)}, path)
    with pytest.raises(
        ValueError, match=r"x\.pth holds no ViT with a class token; its tensors are fc\.weight"
    ):
        load_teacher(path, image_size=48)
    with pytest.raises(
        ValueError, match="--teacher no_such_model is neither a file nor a model that timm knows"
    ):
        load_teacher("no_such_model", image_size=48)
    with pytest.raises(ValueError, match="must be a vision transformer"):
        load_teacher("resnet18", image_size=48, allow_random=True, model_kwargs={"img_size": None})


# --- the learner ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("background", "maps", "ids"), [("token", 7, 7), ("attention", 6, 7), ("none", 6, 6)]
)
def test_background_modes(background, maps, ids):
    features = random_features(grid=(4, 6))
    learner = PartLearner(16, (4, 6), background=background, widths=(8, 8))
    learner.temperature = 0.2
    soft, _ = learner.soft_maps(features)
    assert soft.shape == (2, maps, 4, 6) and learner.num_ids == ids
    torch.testing.assert_close(soft.sum(1), torch.ones(2, 4, 6))
    assert learner.maps(features).shape == (2, ids, 4, 6)
    assert learner.reconstruct(features).shape == (2, 3, 8, 12)
    if background == "attention":
        outside = ~foreground(features.attention, (4, 6))
        assert torch.equal(hard_maps(learner.maps(features), clean=False) == 0, outside)


def test_size_of_the_published_setting():
    learner = PartLearner(384, (14, 14))
    count = {
        name: sum(p.numel() for p in module.parameters())
        for name, module in learner.named_modules()
    }
    assert count["embed"] == 6 * 384 * 385
    assert count["decoder.convs"] == 9 * (7 * 256 + 256 * 128 + 128 * 64 + 64 * 32) + 480
    assert count["decoder.adain"] == 2 * 480 * 385
    assert learner.reconstruct(random_features(1, 384, (14, 14))).shape == (1, 3, 112, 112)


def test_soft_maps_by_hand():
    learner = PartLearner(2, (1, 2), num_parts=2, background="none", widths=(4,))
    learner.embed.weight.data.zero_()
    learner.embed.bias.data = torch.tensor(
        [3.0, 0.0, 0.0, 5.0]
    )  # the parts look along the two axes
    learner.temperature = 0.5
    features = TeacherFeatures(
        torch.zeros(1, 2), torch.tensor([[[2.0, 0.0], [3.0, 4.0]]]), torch.ones(1, 1, 2)
    )
    wanted = torch.tensor([[1.0, 0.6], [0.0, 0.8]]).div(0.5).softmax(0).view(1, 2, 1, 2)
    torch.testing.assert_close(learner.soft_maps(features)[0], wanted)


def test_gradients_reach_parts_and_background_but_not_the_teacher():
    teacher = random_teacher()
    learner = PartLearner(192, teacher.grid, widths=(8, 8))
    task = PartLearning(learner, teacher, MEAN_STD["imagenet"], (0.2, 0.07))
    task({"image": some_scenes(2, 48)})["loss"].backward()
    for parameter in (learner.bg_token, *learner.parameters()):
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in teacher.tower.parameters())
    assert not any("teacher" in name for name in task.state_dict())


def test_loss_falls():
    teacher, images = random_teacher(), some_scenes(16, 48)
    torch.manual_seed(0)
    learner = PartLearner(192, teacher.grid, widths=(32, 24, 16))
    task = PartLearning(learner, teacher, MEAN_STD["imagenet"], (0.2, 0.07))
    learner.standardize([teacher.look(images)])
    optimizer, losses = torch.optim.AdamW(learner.parameters(), lr=3e-3), []
    for step in range(60):
        task.after_step(step / 60)
        out = task({"image": images})
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        losses.append(float(out["reconstruction"]))
    assert losses[-1] < 0.5 * losses[0]


def test_standardize_gives_mean_zero_and_std_one():
    features = random_features(count=8)
    scaled = TeacherFeatures(features.cls * 3 + 5, features.patches * 0.2 - 1, features.attention)
    learner = PartLearner(16, (4, 4), widths=(8,))
    learner.standardize(
        [TeacherFeatures(*(x[:3] for x in scaled)), TeacherFeatures(*(x[3:] for x in scaled))]
    )
    patches = (scaled.patches - learner.feat_mean) / learner.feat_std
    torch.testing.assert_close(patches.mean((0, 1)), torch.zeros(16), atol=1e-5, rtol=0)
    torch.testing.assert_close(patches.flatten(0, 1).std(0, correction=0), torch.ones(16))
    torch.testing.assert_close(learner.cls_mean, scaled.cls.mean(0))


def test_blur_keeps_the_sum_and_spreads_one_patch():
    spot = torch.zeros(1, 2, 5, 5)
    spot[0, 1, 2, 2] = 16
    assert torch.equal(
        blur(spot)[0, 1, 1:4, 1:4], torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]])
    )
    assert blur(spot)[0, 0].abs().sum() == 0
    torch.testing.assert_close(blur(torch.ones(1, 3, 4, 4)), torch.ones(1, 3, 4, 4))


def test_diversity_and_balance_by_hand():
    left = torch.tensor([[1.0, 0.0]]).view(1, 1, 2)
    maps = torch.stack(
        (left, left, 1 - left), dim=1
    )  # two equal parts and one that shares nothing with them
    torch.testing.assert_close(diversity_loss(maps), torch.tensor(2 * 0.9 / 6))
    shares = torch.tensor([0.97, 0.03, 0.015]).view(1, 3, 1, 1).expand(2, 3, 2, 2)
    torch.testing.assert_close(balance_loss(shares), torch.tensor(0.5 / 3))


def test_temperature_falls_geometrically_and_then_stays():
    assert temperature_at(0.0, 0.2, 0.05) == pytest.approx(0.2)
    assert temperature_at(0.35, 0.2, 0.05) == pytest.approx(0.1)
    assert temperature_at(0.7, 0.2, 0.05) == temperature_at(1.0, 0.2, 0.05) == pytest.approx(0.05)


# --- hard maps ------------------------------------------------------------------------------------


def test_the_smallest_id_wins_a_tie():
    assert hard_maps(torch.ones(1, 4, 3, 3)).unique().tolist() == [0]


def test_single_patches_take_their_neighbors_id():
    parts = torch.tensor([[1, 1, 2, 2], [1, 3, 2, 2], [1, 1, 0, 4]])[None]
    # 3: five neighbors of part 1, two of 2. 0: two of 2, one of 1, and two that stand alone. 4:
    # two of 2.
    assert without_single_cells(parts, 5).tolist() == [[[1, 1, 2, 2], [1, 1, 2, 2], [1, 1, 2, 2]]]
    diagonal = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 0]])[None]
    assert torch.equal(
        without_single_cells(diagonal, 2), diagonal
    )  # two cells that touch at a corner


def test_finer_maps_are_interpolated_before_the_argmax():
    maps = torch.tensor([[0.9, 0.2], [0.1, 0.8]]).view(1, 2, 1, 2)
    assert hard_maps(maps, (1, 8), clean=False).tolist() == [[[0, 0, 0, 0, 1, 1, 1, 1]]]
    maps = torch.tensor([[0.9, 0.4], [0.1, 0.6]]).view(1, 2, 1, 2)
    assert hard_maps(maps, (1, 8), clean=False).tolist() == [[[0, 0, 0, 0, 0, 1, 1, 1]]]


def test_foreground_holds_the_mass_and_drops_specks():
    attention = torch.full((1, 2, 6, 6), 0.39 / 26)
    attention[:, :, 1:4, 1:4] = 0.06
    attention[:, :, 5, 5] = 0.07  # the heaviest cell, but alone
    inside = foreground(attention.flatten(2), (6, 6))
    assert inside[0].nonzero().tolist() == [
        [1, 2],
        [2, 1],
        [2, 2],
        [2, 3],
        [3, 2],
    ]  # corners have four votes of nine
    heads = attention_head_maps(TeacherFeatures(None, None, attention.flatten(2)), (6, 6))
    assert torch.equal(heads.argmax(1) == 0, ~inside)


def test_kmeans_finds_separate_clusters():
    torch.manual_seed(0)
    truth = torch.randint(0, 4, (3, 36))
    patches = 10 * torch.eye(4, 8)[truth] + 0.1 * torch.randn(3, 36, 8)
    found = hard_maps(
        kmeans_maps(TeacherFeatures(None, patches, None), (6, 6), 4), clean=False
    ).flatten(1)
    for wanted, ids in zip(truth, found, strict=True):
        assert len({(int(a), int(b)) for a, b in zip(wanted, ids, strict=True)}) == 4


def test_random_maps_depend_on_the_image_only():
    together = random_maps([3, 8], (4, 4), 5, seed=1)
    assert torch.equal(random_maps([8], (4, 4), 5, seed=1)[0], together[1])
    assert not torch.equal(random_maps([8], (4, 4), 5, seed=2)[0], together[1])


# --- metrics --------------------------------------------------------------------------------------


def test_metrics_of_perfect_useless_and_half_right_maps():
    mask = np.zeros((8, 8), dtype=np.uint8)
    mask[:, 4:] = 2
    halves = np.array([[0, 1], [0, 1]], dtype=np.uint8)
    perfect = overlap(halves, mask, 3, 4)
    assert perfect.tolist() == [[32, 0, 0, 0], [0, 0, 32, 0], [0, 0, 0, 0]]
    assert (best_union_iou(perfect, 2), nmi(perfect)) == (1.0, pytest.approx(1.0))
    across = overlap(halves.T.copy(), mask, 3, 4)
    assert (best_union_iou(across, 2), nmi(across)) == (0.5, pytest.approx(0.0))
    # a quarter of the picture too much: 32 of 48
    three = overlap(np.array([[0, 1, 1, 1]], dtype=np.uint8), mask[:, 0:8], 3, 4)
    assert best_union_iou(three, 2) == pytest.approx(32 / 48)


def test_the_best_union_is_the_best_of_all_unions():
    rng = np.random.default_rng(0)
    for _ in range(20):
        table = rng.integers(0, 20, (5, 3))
        unions = [[k for k in range(5) if number >> k & 1] for number in range(1, 32)]
        ious = [
            table[u, 1].sum() / (table[u].sum() + table[:, 1].sum() - table[u, 1].sum())
            for u in unions
        ]
        assert best_union_iou(table, 1) == pytest.approx(max(ious))


def test_quality_pools_images_and_measures_evenness():
    quality = PartQuality(2, 3)
    mask = np.array([[0, 1], [0, 1]], dtype=np.uint8)
    quality.add(overlap(np.array([[0, 1]], dtype=np.uint8), mask, 2, 3))
    quality.add(
        overlap(np.array([[1, 0]], dtype=np.uint8), mask, 2, 3)
    )  # as good, with the ids the other way round
    figures = quality.metrics()
    assert (figures["miou"], figures["foreground_iou"]) == (1.0, 1.0)
    assert figures["nmi"] == pytest.approx(1.0) and figures["nmi_pooled"] == pytest.approx(0.0)
    assert figures["evenness"] == pytest.approx(1.0)


# --- whole runs -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return cached_shapes(tmp_path_factory.mktemp("data") / "shapes", train=21, val=6)


def parse(data: Path, folder: Path, *flags: str):
    tiny = [
        "--teacher",
        TIMM,
        "--teacher_kwargs",
        "patch_size=8",
        "depth=2",
        "--allow_random_teacher",
    ]
    tiny += [
        "--input_size",
        "32",
        "--decoder_widths",
        "8",
        "8",
        "--device",
        "cpu",
        "--num_workers",
        "0",
    ]
    tiny += ["--data_set", "shapes", "--data_path", str(data), "--batch_size", "4", "--epochs", "2"]
    return parse_parts([*tiny, "--output_dir", str(folder), *flags])


def test_crops_are_jittered_as_the_flag_says(data, tmp_path):
    crops = []
    for jitter in ("0", "0.1", "0.9"):
        args = parse(data, tmp_path, "--color_jitter", jitter)
        args.rank = 0
        args.world_size = 1
        crops.append(next(iter(crop_loader(args)))["image"].float())
    plain, weak, strong = crops
    assert 0 < (weak - plain).abs().mean() < (strong - plain).abs().mean()


def run(data: Path, folder: Path, *flags: str) -> None:
    run_part_learning.main(parse(data, folder, *flags))


def test_the_saved_configuration_can_be_given_again(data, tmp_path):
    run(data, tmp_path, "--dry_run", "--num_parts", "3", "--tau_end", "0.1")
    again = parse_parts(["--config", str(tmp_path / "config.yaml")])
    assert (again.num_parts, again.tau_end, again.teacher, again.epochs) == (3, 0.1, TIMM, 2)


def trained(folder: Path):
    """Teacher and learner of a finished run, built and loaded without the script."""
    torch.manual_seed(0)
    teacher = load_teacher(TIMM, image_size=32, allow_random=True, model_kwargs=TINY)
    learner = PartLearner(192, teacher.grid, widths=(8, 8))
    learner.load_state_dict(torch.load(folder / "checkpoint-1.pth")["model"])
    learner.temperature = 0.07
    return teacher, learner


def rows_of(folder: Path, count: int = 21) -> np.ndarray:
    maps = PartMaps.open(folder)
    return np.stack([maps.read(index) for index in range(count)])


def test_a_run_trains_extracts_measures_and_shows(data, tmp_path):
    flags = [
        "--extract",
        str(tmp_path / "parts"),
        "--save_scores",
        "--part_grid",
        "8",
        "--split",
        "val",
    ]
    run(
        data,
        tmp_path,
        *flags,
        "--evaluate",
        str(tmp_path / "q.csv"),
        "--visualize",
        str(tmp_path / "sheet.png"),
    )
    source = extraction.build_dataset(
        parse(data, tmp_path), train=False, transform=None, need_labels=False
    ).source
    maps = PartMaps.open(
        tmp_path / "parts", paths=extraction.image_names(source), map_file=data / "val_map.txt"
    )
    assert (len(maps), maps.grid, maps.num_parts, maps.meta.background_id) == (6, (8, 8), 7, 0)
    teacher, learner = trained(tmp_path)
    image = Image.open(data / "images/validation/000004.png").resize(
        (32, 32), Image.Resampling.BICUBIC
    )
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in MEAN_STD["imagenet"])
    features = teacher.look(
        ((torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 - mean) / std)[None]
    )
    assert np.array_equal(maps.read(4), hard_maps(learner.maps(features), (8, 8))[0].numpy())
    assert maps.read_scores(4).shape == (8, 8) and 0 < maps.read_scores(4).min() < 1
    table = (tmp_path / "q.csv").read_text().splitlines()
    assert table[0] == "part_source,parts,miou,foreground_iou,nmi,nmi_pooled,evenness"
    assert [line.split(",")[:2] for line in table[1:]] == [
        ["learned", "7"], ["attention_heads", "4"], ["kmeans", "7"], ["random", "7"],
    ]  # fmt: skip
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    panel = extraction.PANEL
    assert sheet.shape == (16 + 6 * panel, 4 * panel, 3)
    assert np.array_equal(sheet[16 + 4 * panel : 16 + 5 * panel : 5, :panel:5], np.asarray(image))


def test_extraction_goes_on_where_it_stopped(data, tmp_path):
    folder = tmp_path / "parts"
    flags = ["--part_source", "kmeans", "--extract", str(folder)]
    run(data, tmp_path, *flags)
    whole = rows_of(folder)
    rows = np.lib.format.open_memmap(folder / "parts.npy", mode="r+")
    rows[[2, 20]] = MISSING
    rows[5] = 6  # a row that is there is not made again
    rows.flush()
    run(data, tmp_path, *flags)
    again = rows_of(folder)
    assert (again[5] == 6).all()
    assert np.array_equal(np.delete(again, 5, axis=0), np.delete(whole, 5, axis=0))


def test_two_ranks_write_what_one_writes(data, tmp_path):
    teacher, device = random_teacher(32), run_part_learning.set_up(parse(data, tmp_path)).device
    task = PartLearning(
        PartLearner(192, teacher.grid, widths=(8,)), teacher, MEAN_STD["imagenet"], (0.2, 0.07)
    )
    folders = tmp_path / "one", tmp_path / "two"
    for folder, ranks in zip(folders, (1, 2), strict=True):
        for rank in range(ranks):
            args = parse(data, tmp_path, "--extract", str(folder), "--batch_size", "3")
            extraction.extract(RunContext(args, device, rank, ranks), task)
            if (rank, ranks) == (0, 2):
                assert PartMapWriter(folder).missing().tolist() == list(range(1, 21, 2))
    assert np.array_equal(rows_of(folders[0]), rows_of(folders[1]))


def test_a_resumed_run_ends_with_the_same_weights(data, tmp_path):
    run(data, tmp_path)
    whole = torch.load(tmp_path / "checkpoint-1.pth")["model"]
    (tmp_path / "checkpoint-1.pth").unlink()
    run(data, tmp_path)
    again = torch.load(tmp_path / "checkpoint-1.pth")["model"]
    assert whole.keys() == again.keys() and all(
        torch.equal(whole[name], again[name]) for name in whole
    )


def test_maps_of_another_learner_are_not_mixed_in(data, tmp_path):
    flags = ["--part_source", "random", "--extract", str(tmp_path / "parts")]
    run(data, tmp_path, *flags)
    assert json.loads((tmp_path / "parts/parts.json").read_text())["part_source"] == "random"
    with pytest.raises(
        ValueError, match=r"holds part maps of another run .*part_source random there, kmeans now"
    ):
        run(data, tmp_path, "--part_source", "kmeans", *flags[2:])


def test_an_unreadable_image_has_no_map(data, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for index in range(5):
        (images / f"{index}.png").write_bytes(
            (data / f"images/training/{index:06d}.png").read_bytes()
        )
    (images / "3.png").write_bytes(b"no image")
    folder = tmp_path / "parts"
    flags = ["--data_set", "image_folder", "--data_path", str(images), "--part_source", "kmeans"]
    run(data, tmp_path, *flags, "--extract", str(folder))
    assert PartMapWriter(folder).missing().tolist() == [3]


def test_maps_of_turned_images_are_those_that_training_sees(data, tmp_path):
    """Images that EXIF turns, with the flag, get the maps of the same images stored upright."""
    (tmp_path / "stored").mkdir()
    (tmp_path / "upright").mkdir()
    for index in range(4):
        image = Image.open(data / f"images/training/{index:06d}.png")
        image = image.crop((0, 0, 64, 40))
        exif = Image.Exif()
        exif[0x0112] = 6
        image.save(tmp_path / f"stored/{index}.png", exif=exif)
        image.transpose(Image.Transpose.ROTATE_270).save(tmp_path / f"upright/{index}.png")

    def maps(images: str, *flags: str) -> np.ndarray:
        folder = tmp_path / f"{images}{len(flags)}"
        flags = ("--data_set", "image_folder", "--data_path", str(tmp_path / images), *flags)
        run(data, tmp_path, *flags, "--part_source", "kmeans", "--extract", str(folder))
        return np.load(folder / "parts.npy")

    turned, upright = maps("stored", "--exif_orientation"), maps("upright")
    assert (turned == upright).all() and (turned != maps("stored")).any()

    # Training takes the maps of images that it sees in the same way, and no others.
    source = build_source("image_folder", str(tmp_path / "stored"), train=True, need_labels=False)
    method = Namespace(num_parts=7)
    for flag, folder, refusal in (
        (True, "stored1", None),
        (False, "stored0", None),
        (True, "stored0", "--exif_orientation turns images, but --part_maps .* leave it out"),
        (False, "stored1", "made of upright images; use --exif_orientation"),
    ):
        given = Namespace(
            part_source="maps", part_maps=str(tmp_path / folder), data_path=None, seed=0,
            exif_orientation=flag,
        )  # fmt: skip
        if refusal is None:
            maps_there = np.load(tmp_path / folder / "parts.npy")
            assert (open_parts(given, source, method).read(2) == maps_there[2]).all()
        else:
            with pytest.raises(ValueError, match=refusal):
                open_parts(given, source, method)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--exif_orientation", "--evaluate", "q.csv"], "not the masks of --evaluate"),
        (["--num_parts", "0"], "--num_parts must be at least 1, not 0"),
        (["--tau_end", "0.5"], "--tau_end 0.5 must be positive and at most --tau_start 0.2"),
        (["--data_set", "digits", "--evaluate", "q.csv"], "give --mask_path, or --data_set shapes"),
    ],
)
def test_wrong_flags_are_refused_in_one_sentence(flags, message, capsys):
    with pytest.raises(SystemExit):
        parse_parts(flags)
    assert message in capsys.readouterr().err
