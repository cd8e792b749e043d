"""A tiny segmentor and images in ADE20K's layout, for tests and for whoever wants to see a
configuration run."""

from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "semantic_segmentation" / "configs"
TRAIN, VAL = (64, 64), (80, 96)


def write_images(root: Path, train: int = 8, val: int = 4) -> Path:
    """Two colored rectangles on gray, as classes 3 and 150, in ADE20K's folders."""
    rng = np.random.default_rng(0)
    for split, count, size in (("training", train, TRAIN), ("validation", val, VAL)):
        folders = [root / kind / split for kind in ("images", "annotations")]
        for folder in folders:
            folder.mkdir(parents=True)
        for number in range(count):
            image, labels = scene(rng, size)
            name = f"ADE_{split[:5]}_{number:08d}"
            Image.fromarray(image).save(folders[0] / f"{name}.jpg", quality=95)
            Image.fromarray(labels).save(folders[1] / f"{name}.png")
    return root


def scene(rng: np.random.Generator, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    image = np.full((*size, 3), 128, dtype=np.uint8) + rng.integers(
        0, 20, (*size, 3), dtype=np.uint8
    )
    labels = np.zeros(size, dtype=np.uint8)
    for label, color in ((3, (220, 40, 40)), (150, (40, 40, 220))):
        top, left = (int(rng.integers(0, side // 2)) for side in size)
        box = np.s_[top : top + size[0] // 2, left : left + size[1] // 2]
        image[box], labels[box] = color, label
    return image, labels


def tiny_flags(data: Path, work: Path, iterations: int = 60) -> list[str]:
    """What makes any ViT configuration of 512 px tiny: crops of 64 px, width 48, depth 4."""
    pipelines = "train_dataloader.dataset.pipeline"
    sizes = [
        "model.data_preprocessor.size=(64,64)", "model.backbone.input_size=64",
        "model.test_cfg.crop_size=(64,64)", "model.test_cfg.stride=(42,42)",
        f"{pipelines}.3.scale=(256,64)", f"{pipelines}.4.crop_size=(64,64)",
        "test_dataloader.dataset.pipeline.1.scale=(256,64)",
        "val_dataloader.dataset.pipeline.1.scale=(256,64)",
    ]  # fmt: skip
    for k in range(6):
        place = f"tta_pipeline.1.transforms.0.{k}"
        sizes += [f"{place}.scale=(256,64)", f"{place}.min_short=64"]
    network = [
        "model.backbone.embed_dim=48", "model.backbone.depth=4", "model.backbone.num_heads=4",
        "model.backbone.out_indices=[0,1,2,3]", "model.neck.width=48",
        "model.decode_head.in_channels=[48,48,48,48]", "model.decode_head.channels=48",
        "model.auxiliary_head.in_channels=48", "model.auxiliary_head.channels=32",
    ]  # fmt: skip
    loaders = [
        f"{stage}_dataloader.{key}"
        for stage in ("train", "val", "test")
        for key in ("num_workers=0", "persistent_workers=False")
    ]
    schedule = [
        "optim_wrapper.optimizer.lr=2e-3", "param_scheduler.0.end=5", "param_scheduler.1.begin=5",
        f"param_scheduler.1.end={iterations}", f"train_cfg.max_iters={iterations}",
        f"train_cfg.val_interval={iterations}", f"default_hooks.checkpoint.interval={iterations}",
        "default_hooks.logger.interval=10",
    ]  # fmt: skip
    options = [*sizes, *network, *loaders, *schedule]
    return ["--data-root", str(data), "--work-dir", str(work), "--cfg-options", *options]


def evaluate_and_leave(work: Path, config: str, network: str, flags: list[str]) -> tuple[int, int]:
    """Gloo's threads before and after the rank leaves its group.

    It is here, and imports here, since mmengine must come in as late as in the scripts.
    """
    from helpers import gloo_threads

    from semantic_segmentation.task import TASK
    from unimim.engine.distributed import leave_process_group
    from unimim.openmmlab import runner

    runner.test(TASK, [config, network, "--launcher", "pytorch", *flags])
    before = gloo_threads()
    leave_process_group()
    return before, gloo_threads()
