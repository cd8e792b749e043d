"""Segmentation: configurations, windows, transforms, and a tiny training that learns, resumes and
is evaluated."""

import json
import shutil
import zipfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import in_ranks, launcher, run_command
from PIL import Image
from tiny_segmentation import CONFIGS, VAL, evaluate_and_leave, tiny_flags, write_images

from scripts.experiments import compare_transfer
from semantic_segmentation import demo, prepare_ade20k
from semantic_segmentation.task import TASK
from unimim.checkpoint.files import load_checkpoint
from unimim.data.shapes import write_shapes
from unimim.openmmlab import runner

runner.prepare(TASK, "none")

from mmengine.config import Config  # noqa: E402
from mmengine.registry import init_default_scope  # noqa: E402
from mmseg.models import EncoderDecoder  # noqa: E402
from mmseg.registry import MODELS  # noqa: E402
from seg_ext.segmentor import WindowedEncoderDecoder, window_starts  # noqa: E402
from seg_ext.transforms import ResizeShortestAtLeast  # noqa: E402

METHODS = sorted(CONFIGS.glob("[a-z]*/*_160k_*.py"))
BEIT = str(CONFIGS / "beit" / "beit_upernet_base_512_160k_ade20k_pt.py")
SHAPES = str(CONFIGS / "shapes" / "upernet_tiny_shapes.py")
FCN = str(CONFIGS / "a2mim" / "a2mim_fcn_r50_512_160k_ade20k.py")


@pytest.fixture(autouse=True)
def mmsegs_names():
    """Other tests of this process may have built detectors."""
    init_default_scope("mmseg")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("ade") / "ADEChallengeData2016")


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> tuple[Path, float]:
    """Folder of a run of 60 iterations, and the mIoU it ended with."""
    work = tmp_path_factory.mktemp("work")
    flags = tiny_flags(data, work)
    flags.append("default_hooks.checkpoint.interval=30")
    run = runner.train(TASK, [BEIT, "--pretrained", "none", *flags])
    return work, float(run.message_hub.get_scalar("val/mIoU").current())


# --------------------------------------------------------------------------------------------------
# Configurations


@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.stem)
def test_configurations_agree_with_themselves(path):
    cfg = Config.fromfile(str(path))
    crop, model = cfg.train_pipeline[4].crop_size, cfg.model
    assert (
        model.data_preprocessor.size == tuple(crop)
        and cfg.train_dataloader.dataset.pipeline == cfg.train_pipeline
    )
    assert cfg.test_pipeline[1].scale == cfg.train_pipeline[3].scale == (4 * crop[0], crop[0])
    assert {step.min_short for step in cfg.tta_pipeline[1].transforms[0]} == {crop[0]}
    assert cfg.param_scheduler[-1].end == cfg.train_cfg.max_iters
    assert {hook.type for hook in cfg.custom_hooks} == {"SafeCheckpointHook", "SeedStepHook"}
    assert cfg.get("tta", False) == path.stem.endswith("_ms")
    if model.backbone.type == "VisionTransformerBackbone":
        assert (
            f"_{model.backbone.size}_{crop[0]}_" in path.stem
            and model.backbone.input_size == crop[0]
        )
        assert (
            model.test_cfg.crop_size == crop
            and model.test_cfg.stride[0] == {512: 341, 640: 426}[crop[0]]
        )
    updates = cfg.train_cfg.max_iters // cfg.optim_wrapper.get("accumulative_counts", 1)
    gpus = 4 if "fcn" in path.stem else 8
    images = (
        gpus * cfg.train_dataloader.batch_size * cfg.optim_wrapper.get("accumulative_counts", 1)
    )
    assert updates == 160000 and images == cfg.auto_scale_lr.base_batch_size


@pytest.mark.parametrize(
    ("name", "rate", "decay"),
    [
        ("beit/beit_upernet_base_512_160k_ade20k_pt", 7e-4, 0.65),
        ("beit/beit_upernet_base_640_160k_ade20k", 3e-5, 0.9),
        ("beit/beit_upernet_large_640_160k_ade20k", 2e-5, 0.95),
        ("mae/mae_upernet_base_512_160k_ade20k", 1e-4, 0.65),
        ("a2mim/a2mim_upernet_base_512_160k_ade20k", 4e-4, 0.65),
        ("semanticmim/semanticmim_beit_upernet_base_640_160k_ade20k", 3e-5, 0.9),
    ],
)  # fmt: skip
def test_published_rates(name, rate, decay):
    cfg = Config.fromfile(str(CONFIGS / f"{name}.py"))
    assert (cfg.optim_wrapper.optimizer.lr, cfg.optim_wrapper.paramwise_cfg.layer_decay) == (
        rate,
        decay,
    )


@pytest.mark.parametrize(("size", "millions"), [("base", 163), ("large", 441)])
def test_published_parameter_counts(size, millions):
    cfg = Config.fromfile(str(CONFIGS / "beit" / f"beit_upernet_{size}_640_160k_ade20k.py"))
    with torch.device("meta"):
        model = MODELS.build(cfg.model)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions


def test_fcn_runs_on_the_plain_resnet():
    cfg = Config.fromfile(FCN).model
    runner._replace(cfg, "type", "SyncBN", "BN")
    cfg.backbone.update(name="resnet18", sync_bn=False)
    cfg.decode_head.in_channels, cfg.auxiliary_head.in_channels = 512, 256
    model = MODELS.build(cfg)
    assert model.backbone.network.conv1.kernel_size == (7, 7)
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 150, 8, 8)


# --------------------------------------------------------------------------------------------------
# Windows and transforms


def tiny_model(cls: type, **test_cfg):
    cfg = Config.fromfile(BEIT)
    cfg.merge_from_dict({
        "model.backbone": {"embed_dim": 48, "depth": 2, "num_heads": 4, "out_indices": [0, 0, 1, 1],
                           "input_size": 32,
                           "patch_size": 8}, "model.neck": {"width": 48, "patch_size": 8},
        "model.decode_head": {"in_channels": [48] * 4, "channels": 16},
        "model.auxiliary_head": {"in_channels": 48, "channels": 16},
        "model.test_cfg": {"crop_size": (32, 32), "stride": (21, 21), **test_cfg},
    })  # fmt: skip
    cfg.model.backbone.update(depth=4, out_indices=[0, 1, 2, 3])
    runner._replace(cfg.model, "type", "SyncBN", "BN")
    torch.manual_seed(0)
    cfg.model.type = cls
    model = MODELS.build(cfg.model).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("table"):
            torch.nn.init.normal_(parameter)
    return model


@torch.no_grad()
def test_windows_together_equal_mmsegs_one_by_one():
    images = torch.randn(2, 3, 50, 75)
    expected = tiny_model(EncoderDecoder).slide_inference(images, [{}, {}])
    for several in (1, 3, 100):
        model = tiny_model(WindowedEncoderDecoder, window_batch=several)
        metas = [{"img_shape": (50, 75)}]
        torch.testing.assert_close(
            model.slide_inference(images, metas), expected, atol=1e-5, rtol=1e-4
        )
        assert metas == [{"img_shape": (50, 75)}]


@torch.no_grad()
def test_small_images_are_padded_to_the_window():
    model = tiny_model(WindowedEncoderDecoder)
    image = torch.randn(1, 3, 20, 40)
    whole = torch.nn.functional.pad(image, (0, 0, 0, 12))
    logits = model.slide_inference(image, [{}])
    assert logits.shape == (1, 150, 20, 40)
    assert torch.equal(logits, model.slide_inference(whole, [{}])[:, :, :20])


@pytest.mark.parametrize(
    ("side", "crop", "stride"), [(32, 32, 21), (33, 32, 21), (100, 32, 21), (95, 32, 21)]
)
def test_windows_are_multiples_of_the_stride_and_cover_everything(side, crop, stride):
    starts = window_starts(side, crop, stride)
    assert all(start == number * stride for number, start in enumerate(starts[:-1]))
    assert starts[-1] == side - crop and all(b - a <= stride for a, b in pairwise(starts))


@pytest.mark.parametrize(
    ("ratio", "size", "expected"),
    [
        (0.5, (300, 600), (512, 1024)),
        (0.75, (600, 300), (1024, 512)),
        (1.5, (100, 1000), (768, 7680)),
    ],
)
def test_short_sides_never_fall_below_the_crop_and_long_sides_have_no_limit(ratio, size, expected):
    resize = ResizeShortestAtLeast((2048, 512), ratio, 512)
    results = resize({"img": np.zeros((*size, 3), dtype=np.uint8), "img_shape": size})
    assert results["img"].shape[:2] == results["img_shape"] == expected


# --------------------------------------------------------------------------------------------------
# Training


def test_a_tiny_training_learns_and_its_file_gives_the_same_value(data, trained):
    work, miou = trained
    assert miou > 70
    flags = tiny_flags(data, work)
    metrics = runner.test(
        TASK, [BEIT, str(work / "iter_60.pth"), "--out", str(work / "out"), *flags]
    )
    assert metrics["mIoU"] == pytest.approx(miou, abs=1e-3)
    predicted = np.asarray(Image.open(work / "out" / "ADE_valid_00000000.png"))
    assert predicted.shape == VAL and set(np.unique(predicted)) <= set(range(1, 151))
    several = runner.test(TASK, [BEIT, str(work / "iter_60.pth"), "--tta", *flags])
    assert several["mIoU"] > 70 and several["mIoU"] != metrics["mIoU"]


def test_checkpoints_hold_nothing_but_plain_values(trained):
    saved = load_checkpoint(trained[0] / "iter_60.pth")  # weights_only
    assert saved["meta"]["iter"] == 60 and saved["optimizer"]["param_groups"][0][
        "group_name"
    ].startswith("layer_")


def test_a_resumed_run_equals_one_that_never_stopped(data, trained, tmp_path):
    work, miou = trained
    shutil.copy(work / "iter_30.pth", tmp_path)
    (tmp_path / "last_checkpoint").write_text(str(tmp_path / "iter_30.pth"))
    flags = [*tiny_flags(data, tmp_path), "train_dataloader.num_workers=1"]
    run = runner.train(TASK, [BEIT, "--resume", *flags])
    assert run.iter == 60 and float(run.message_hub.get_scalar("val/mIoU").current()) == miou
    ours, theirs = (
        load_checkpoint(folder / "iter_60.pth")["state_dict"] for folder in (tmp_path, work)
    )
    assert all(map(torch.equal, ours.values(), theirs.values()))


def test_the_start_is_never_random_unnoticed(data, tmp_path, caplog):
    flags = tiny_flags(data, tmp_path)
    with pytest.raises(ValueError, match="--pretrained is missing"):
        runner.train(TASK, [BEIT, *flags])
    with pytest.raises(ValueError, match="--pretrained is missing"):
        runner.train(TASK, [BEIT, "--resume", *flags])
    torch.save({"model": {"blocks.0.weight": torch.ones(1)}}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"--pretrained .*other\.pth.*0% of the encoder"):
        runner.train(TASK, [BEIT, "--pretrained", str(tmp_path / "other.pth"), *flags])
    with pytest.raises(ValueError, match="--data-root"):
        runner.train(TASK, [BEIT, "--data-root", "nowhere"])
    with pytest.raises(ValueError, match=r"images/training does not exist; set --data-root"):
        runner.train(TASK, [BEIT, "--data-root", str(tmp_path)])


def test_wrong_or_unsafe_files_are_refused_by_name(data, trained, tmp_path, monkeypatch):
    flags = tiny_flags(data, tmp_path)
    saved = load_checkpoint(trained[0] / "iter_60.pth")
    partial = {
        k: v for k, v in saved["state_dict"].items() if not k.startswith("decode_head.conv_seg")
    }
    torch.save({"state_dict": partial, "meta": {}}, tmp_path / "partial.pth")
    with pytest.raises(
        ValueError, match=r"(?s)partial\.pth is not a checkpoint of this.*decode_head\.conv_seg"
    ):
        runner.test(TASK, [BEIT, str(tmp_path / "partial.pth"), *flags])
    broken = saved["state_dict"] | {"decode_head.conv_seg.bias": torch.full((150,), torch.nan)}
    torch.save({"state_dict": broken, "meta": {}}, tmp_path / "broken.pth")
    with pytest.raises(ValueError, match=r"broken\.pth holds values.*not finite.*conv_seg\.bias"):
        runner.test(TASK, [BEIT, str(tmp_path / "broken.pth"), *flags])
    raw = bytearray((trained[0] / "iter_60.pth").read_bytes())
    raw[len(raw) // 2] ^= 1
    (tmp_path / "flipped.pth").write_bytes(raw)
    start = [*flags, f"load_from={tmp_path / 'flipped.pth'}"]
    for refused in (
        lambda: runner.test(TASK, [BEIT, str(tmp_path / "flipped.pth"), *flags]),
        lambda: runner.train(TASK, [BEIT, "--resume", str(tmp_path / "flipped.pth"), *flags]),
        lambda: runner.train(TASK, [BEIT, *start]),
    ):
        with pytest.raises(ValueError, match=r"flipped\.pth is damaged"):
            refused()
    torch.save({**saved, "message_hub": Path("code")}, tmp_path / "unsafe.pth")
    with pytest.raises(ValueError, match=r"unsafe\.pth is refused.*--trust-checkpoint"):
        runner.test(TASK, [BEIT, str(tmp_path / "unsafe.pth"), *flags])
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "0")  # for its value to come back
    metrics = runner.test(TASK, [BEIT, str(tmp_path / "unsafe.pth"), "--trust-checkpoint", *flags])
    assert metrics["mIoU"] == pytest.approx(trained[1], abs=1e-3)


def test_another_total_batch_is_warned_about(caplog):
    runner.log.propagate = True
    cfg = Config.fromfile(BEIT)
    runner.check_batch(cfg, world_size=8)
    assert not caplog.records
    runner.check_batch(cfg, world_size=1)
    assert "total batch is 2" in caplog.text and "recipe's is 16" in caplog.text
    caplog.clear()
    cfg.optim_wrapper.accumulative_counts = 8
    runner.check_batch(cfg, world_size=1)
    assert not caplog.records


def test_class_tokens_come_from_the_file(tmp_path):
    config = CONFIGS / "semanticmim" / "semanticmim_beit_upernet_base_640_160k_ade20k.py"
    cfg = Config.fromfile(str(config))
    torch.save({"model": {"cls_token": torch.zeros(1, 8, 768)}}, tmp_path / "eight.pth")
    runner.use_pretrained(cfg, str(tmp_path / "eight.pth"))
    assert cfg.model.backbone.num_cls_tokens == 8 and cfg.model.backbone.pretrained == str(
        tmp_path / "eight.pth"
    )
    segmentor = {
        "backbone.cls_token": torch.zeros(1, 5, 768),
        "decode_head.conv_seg.bias": torch.zeros(150),
    }
    torch.save({"meta": {}, "state_dict": segmentor}, tmp_path / "five.pth")
    runner.use_class_tokens(cfg, str(tmp_path / "five.pth"))
    assert cfg.model.backbone.num_cls_tokens == 5


def test_the_demo_draws_over_images(data, trained, tmp_path):
    images = data / "images" / "validation"
    flags = tiny_flags(data, tmp_path)
    demo.main(
        [
            BEIT,
            str(trained[0] / "iter_60.pth"),
            str(images),
            "--out",
            str(tmp_path / "drawn"),
            *flags,
        ]
    )
    drawn = sorted((tmp_path / "drawn").iterdir())
    assert [path.stem for path in drawn] == sorted(path.stem for path in images.iterdir())
    picture, image = (
        np.asarray(Image.open(drawn[0])),
        np.asarray(Image.open(images / f"{drawn[0].stem}.jpg")),
    )
    assert picture.shape == image.shape and not np.array_equal(picture, image)
    with pytest.raises(ValueError, match="holds no image"):
        runner.image_files(str(tmp_path))


def test_the_configuration_of_shapes_trains_and_its_demo_needs_no_masks(tmp_path):
    scenes, work = tmp_path / "scenes", tmp_path / "work"
    write_shapes(scenes, train=8, val=2)
    where = ["--data-root", str(scenes), "--work-dir", str(work)]
    keys = ("train_cfg.max_iters", "train_cfg.val_interval", "default_hooks.checkpoint.interval")
    short = ["--cfg-options", *(f"{key}=2" for key in keys), "val_dataloader.dataset.indices=2"]
    run = runner.train(TASK, [SHAPES, "--pretrained", "none", *where, *short])
    assert float(run.message_hub.get_scalar("val/mIoU").current()) > 0

    images = scenes / "images" / "validation"
    network = str(work / "iter_2.pth")
    demo.main([SHAPES, network, str(images), "--out", str(tmp_path / "drawn"), *where])
    drawn = sorted((tmp_path / "drawn").iterdir())
    assert [path.name for path in drawn] == ["000000.png", "000001.png"]
    assert Image.open(drawn[0]).size == Image.open(images / "000000.png").size


@pytest.mark.slow
def test_two_processes_train_and_evaluate(data, trained, tmp_path):
    def launched(script: str, *arguments: str) -> str:
        done = run_command([*launcher(2), f"semantic_segmentation/{script}", *arguments])
        assert done.returncode == 0, done.stdout[-3000:]
        return done.stdout

    flags = tiny_flags(data, tmp_path, 6)
    assert "mIoU" in launched("train.py", BEIT, "--pretrained", "none", *flags)
    assert load_checkpoint(tmp_path / "iter_6.pth")["meta"]["iter"] == 6
    out = launched("test.py", BEIT, str(trained[0] / "iter_60.pth"), *flags)
    assert f"mIoU: {trained[1]:.4f}" in out


@pytest.mark.slow
def test_leaving_the_group_ends_its_threads(data, trained, tmp_path):
    """Else up to one run in four aborted after its last word."""
    network = str(trained[0] / "iter_60.pth")
    for before, after in in_ranks(
        2, evaluate_and_leave, tmp_path, BEIT, network, tiny_flags(data, tmp_path)
    ):
        assert before > 0 and after == 0


def test_the_comparison_reads_the_last_validation_and_finished_runs(tmp_path):
    logs = tmp_path / "20260101" / "vis_data"
    logs.mkdir(parents=True)
    rows = [{"loss": 2.0}, {"mIoU": 50.0, "aAcc": 80.0}, {"mIoU": 61.5, "aAcc": 82.0}]
    (logs / "scalars.json").write_text("\n".join(map(json.dumps, rows)))
    assert compare_transfer.last_metrics(tmp_path) == rows[-1]
    (tmp_path / "results.json").write_text(json.dumps(rows[1]))
    assert compare_transfer.train(tmp_path, tmp_path, "none", 0, []) == (50.0, 80.0)
    rows = [
        ("random", 0, 50.0, 80.0),
        ("mae", 0, 60.0, 81.0),
        ("random", 1, 52.0, 80.0),
        ("mae", 1, 61.0, 81.0),
    ]
    results = [compare_transfer.TransferRow(*row, "") for row in rows]
    assert compare_transfer.table(results).splitlines()[2:] == [
        "| random weights | 51.0 ± 1.4 | 80.0 ± 0.0 | 50.0 | 52.0 |",
        "| MAE | 60.5 ± 0.7 | 81.0 ± 0.0 | 60.0 | 61.0 |",
    ]


# --------------------------------------------------------------------------------------------------
# ADE20K


def test_the_data_sets_check_names_what_is_wrong(data, tmp_path, capsys):
    counts = {"training": 8, "validation": 4}
    assert prepare_ade20k.check(data, counts) == []
    assert (
        prepare_ade20k.main([str(data)]) == 1
        and "holds 8 images, not 20210" in capsys.readouterr().out
    )
    broken = tmp_path / "broken"
    shutil.copytree(data, broken)
    names = sorted((broken / "annotations" / "training").iterdir())
    names[0].unlink()
    Image.fromarray(np.full((64, 64), 151, dtype=np.uint8)).save(names[1])
    Image.fromarray(np.zeros((64, 63), dtype=np.uint8)).save(names[2])
    names[3].write_bytes(b"no picture")
    problems = prepare_ade20k.check(broken, counts)
    for number, words in enumerate(
        ("1 without image or labels", "class 151 of 150", "(63, 64) pixels", "cannot identify")
    ):
        assert words in problems[number]
    assert len(problems) == 4


def test_the_archive_is_unpacked_and_may_not_write_elsewhere(data, tmp_path):
    with zipfile.ZipFile(tmp_path / "ade.zip", "w") as archive:
        for path in data.rglob("*.*"):
            archive.write(path, Path("ADEChallengeData2016") / path.relative_to(data))
    root = prepare_ade20k.unpack(tmp_path / "ade.zip", tmp_path / "out")
    assert prepare_ade20k.check(root, {"training": 8, "validation": 4}) == []
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
        archive.writestr("ADE/../../x", "")
    with pytest.raises(ValueError, match="not one folder"):
        prepare_ade20k.unpack(tmp_path / "bad.zip", tmp_path / "out")
    (tmp_path / "no.zip").write_text("no")
    with pytest.raises(ValueError, match="is not a zip"):
        prepare_ade20k.unpack(tmp_path / "no.zip", tmp_path / "out")
