"""Run segmentation and detection: configuration, overriding flags, and mmengine's runner."""

import argparse
import logging
import os
import pickle
import sys
import traceback
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed import is_torchelastic_launched

from unimim.checkpoint.files import load_checkpoint
from unimim.checkpoint.loading import check_finite
from unimim.engine.distributed import exit_at_once, leave_process_group
from unimim.engine.monitor import keep_freed_memory
from unimim.errors import explain
from unimim.logs import setup_logging
from unimim.openmmlab import compat
from unimim.openmmlab.checkpoint import class_tokens
from unimim.processes import has_peers

log = logging.getLogger("unimim")

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
RANDOM = "none"  # --pretrained none: random weights on purpose


@dataclass(frozen=True)
class Task:
    """What the runner has to know of segmentation or detection.

    `library` is mmseg or mmdet; `folder` is that of the scripts, where configurations find their
    modules; `save_predictions(cfg, path)` makes testing write its predictions to `path`.
    """

    library: str
    folder: Path
    save_predictions: Callable[[Any, str], None]


# --------------------------------------------------------------------------------------------------
# Flags


def _parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with the flags that all entry scripts share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("config", help="a Python file below configs/")
    parser.add_argument(
        "--work-dir",
        default=None,
        help="folder for checkpoints and logs (default: output/CONFIG)",
    )
    parser.add_argument(
        "--data-root",
        default=None,
        help="folder of the data set (default: the configuration's)",
    )
    parser.add_argument(
        "--trust-checkpoint",
        action="store_true",
        help="allow pickled checkpoints to run code: only for files whose origin you trust",
    )
    parser.add_argument(
        "--launcher",
        choices=("none", "pytorch"),
        default="pytorch" if is_torchelastic_launched() else "none",
        help="pytorch under torchrun and scripts/launch.sh, where it is the default",
    )
    parser.add_argument(
        "--local-rank", "--local_rank", type=int, default=0, help="set by old launchers"
    )
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="override any entry of the configuration: optim_wrapper.optimizer.lr=1e-4",
    )
    return parser


def parse_train(argv: Sequence[str] | None, description: str) -> Namespace:
    """Parse the flags of training."""
    parser = _parser(description)
    parser.add_argument(
        "--pretrained",
        default=None,
        metavar="FILE",
        help="pre-trained weights of the backbone; 'none' starts from random weights",
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        default=None,
        metavar="FILE",
        help="resume from a checkpoint, by default from the last one in --work-dir",
    )
    parser.add_argument(
        "--amp",
        nargs="?",
        const="float16",
        default=None,
        choices=("float16", "bfloat16"),
        help="train in mixed precision (GPUs only)",
    )
    parser.add_argument(
        "--auto-scale-lr", action="store_true", help="scale the lr with the total batch"
    )
    parser.add_argument(
        "--seed", type=int, default=None, help="random seed (default: the configuration's)"
    )
    return parser.parse_args(argv)


def parse_test(argv: Sequence[str] | None, description: str) -> Namespace:
    """Parse the flags of testing."""
    parser = _parser(description)
    parser.add_argument("checkpoint", help="weights of the whole network, as training saves them")
    parser.add_argument(
        "--tta", "--ms", action="store_true", help="test-time augmentation: several scales, flips"
    )
    parser.add_argument("--out", default=None, metavar="PATH", help="write the predictions here")
    return parser.parse_args(argv)


# --------------------------------------------------------------------------------------------------
# The configuration


def prepare(task: Task, launcher: str) -> None:
    """Set up operators, module paths, logging and processes, before the library is imported."""
    compat.prepare(task.library)
    if str(task.folder) not in sys.path:
        sys.path.insert(0, str(task.folder))
    setup_logging(int(os.environ.get("RANK", 0)))
    compat.init_process_group(launcher)


def load_config(args: Namespace):
    """Return the configuration, overridden by the flags; raise ValueError if it is missing."""
    from mmengine.config import Config, DictAction

    if not Path(args.config).is_file():
        raise ValueError(f"{args.config} does not exist")
    wrong = [pair for pair in args.cfg_options if "=" not in pair]
    if wrong:
        raise ValueError(f"--cfg-options {wrong[0]} is not KEY=VALUE")
    cfg = Config.fromfile(args.config)
    options = Namespace()
    if args.data_root:
        _move(cfg._cfg_dict, cfg.data_root, args.data_root)
    DictAction("--cfg-options", "values")(None, options, args.cfg_options)
    cfg.merge_from_dict(options.values)
    cfg.launcher = args.launcher
    default_dir = str(Path("output") / Path(args.config).stem)
    cfg.work_dir = args.work_dir or cfg.get("work_dir") or default_dir
    if not torch.cuda.is_available():
        run_on_cpu(cfg)
    return cfg


def _move(value: Any, old: str, new: str) -> None:
    """Replace the prefix `old` of strings by `new` in nested dicts and lists."""
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(item, str) and item.startswith(old):
            value[key] = new + item.removeprefix(old)
        elif isinstance(item, (dict, list)):
            _move(item, old, new)


def check_data(cfg, *stages: str) -> None:
    """Raise ValueError if a folder or file that the data sets of `stages` read does not exist."""
    if "data_root" in cfg and not Path(cfg.data_root).is_dir():
        raise ValueError(f"the data folder {cfg.data_root} does not exist; set --data-root")
    for stage in stages:
        dataset = cfg[f"{stage}_dataloader"].dataset
        root = dataset.get("data_root") or ""
        parts = [dataset.get("ann_file") or "", *(dataset.get("data_prefix") or {}).values()]
        for path in (Path(root, part) for part in parts):
            if not path.exists():
                raise ValueError(
                    f"{path} does not exist; set --data-root to a folder that holds it"
                )


def run_on_cpu(cfg) -> None:
    """Replace what mmengine supports on GPUs only: synchronized batch norm, devices for DDP."""
    keep_freed_memory()
    _replace(cfg.model, "type", "SyncBN", "BN")
    _replace(cfg.model, "sync_bn", True, False)
    if cfg.launcher != "none":
        wrapper = {
            "type": "MMDistributedDataParallel",
            "device_ids": None,
            "broadcast_buffers": False,
        }
        cfg.model_wrapper_cfg = wrapper | dict(cfg.get("model_wrapper_cfg") or {})


def _replace(value: Any, key: str, old: Any, new: Any) -> None:
    """Replace the value `old` of entries `key` by `new` in nested dicts and lists."""
    if isinstance(value, dict):
        for item in value.values():
            _replace(item, key, old, new)
        if value.get(key) == old:
            value[key] = new
    elif isinstance(value, (list, tuple)):
        for item in value:
            _replace(item, key, old, new)


def use_pretrained(cfg, path: str) -> None:
    """Set the pre-trained file of the model parts in `pretrained_parts`, by default the backbone.

    A ViT gets as many class tokens as the file has.
    """
    for part in cfg.get("pretrained_parts", ["backbone"]):
        cfg.merge_from_dict({f"model.{part}.pretrained": path})
    use_class_tokens(cfg, path)


def use_class_tokens(cfg, path: str) -> None:
    """Give a ViT backbone as many class tokens as the file has."""
    if cfg.model.backbone.type == "VisionTransformerBackbone":
        cfg.model.backbone.num_cls_tokens = class_tokens(path)


def set_start(cfg, args: Namespace) -> None:
    """Set where the weights come from; raise ValueError if no flag says so."""
    from mmengine.runner import find_latest_checkpoint

    if args.resume:
        latest = find_latest_checkpoint(cfg.work_dir) if args.resume == "auto" else args.resume
        if latest is None:
            log.warning("--resume: %s holds no checkpoint yet", cfg.work_dir)
        else:
            check_loads(latest, args.trust_checkpoint)
            cfg.resume = True
            cfg.load_from = str(latest)
            use_class_tokens(cfg, latest)
            return
    if cfg.get("load_from"):
        check_loads(cfg.load_from, args.trust_checkpoint)
    if args.pretrained == RANDOM:
        log.warning("--pretrained none: the backbone starts from random weights")
    elif args.pretrained:
        use_pretrained(cfg, args.pretrained)
    elif not cfg.get("load_from") and not cfg.model.backbone.get("pretrained"):
        raise ValueError(
            "--pretrained is missing; use a checkpoint, or 'none' to start from random weights"
        )


def check_batch(cfg, world_size: int) -> None:
    """Warn if the total batch is not the one that the recipe's lr is for."""
    recipe = (cfg.get("auto_scale_lr") or {}).get("base_batch_size")
    per_process = cfg.train_dataloader.batch_size
    accumulated = cfg.optim_wrapper.get("accumulative_counts", 1)
    total = per_process * world_size * accumulated
    if recipe and total != recipe and not cfg.auto_scale_lr.get("enable"):
        log.warning(
            "the total batch is %d (%d per process x %d processes x %d accumulated), the recipe's "
            "is %d: results will differ; --auto-scale-lr scales the lr, "
            "optim_wrapper.accumulative_counts the batch",
            total,
            per_process,
            world_size,
            accumulated,
            recipe,
        )


def use_tta(cfg) -> None:
    """Switch to test-time augmentation; raise ValueError if the configuration has none."""
    if "tta_pipeline" not in cfg or "tta_model" not in cfg:
        raise ValueError("--tta: this configuration has no tta_pipeline and tta_model")
    cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
    cfg.test_dataloader.batch_size = 1
    cfg.custom_hooks = [
        *cfg.get("custom_hooks", []),
        {"type": "PrepareTTAHook", "tta_cfg": cfg.tta_model},
    ]


# --------------------------------------------------------------------------------------------------
# Checkpoints of whole networks


def check_loads(path: str, trusted: bool) -> None:
    """Raise ValueError unless the file loads safely or is trusted, for the rest of the process."""
    if trusted:
        os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
        return
    try:
        load_checkpoint(path, inert=False)
    except ValueError as error:
        pickled = isinstance(error.__cause__, pickle.UnpicklingError)
        hint = "; --trust-checkpoint runs it" if pickled else ""
        raise ValueError(f"{error}{hint}") from error


def load_network(runner, path: str) -> None:
    """Load all weights of the network; raise ValueError if any are missing, left over or not
    finite."""
    try:
        runner.load_checkpoint(path, strict=True)
    except RuntimeError as error:
        raise ValueError(
            f"{path} is not a checkpoint of this configuration's network: {error}"
        ) from error
    check_finite(runner.model, path)


# --------------------------------------------------------------------------------------------------
# Entry points


def train(task: Task, argv: Sequence[str] | None = None, description: str = ""):
    """Train, and return mmengine's runner."""
    args = parse_train(argv, description)
    prepare(task, args.launcher)
    from mmengine.runner import Runner

    cfg = load_config(args)
    check_data(cfg, "train", "val")
    set_start(cfg, args)
    if args.amp:
        if not torch.cuda.is_available():
            raise ValueError("--amp needs a GPU")
        cfg.optim_wrapper.update(type="AmpOptimWrapper", loss_scale="dynamic", dtype=args.amp)
    if args.seed is not None:
        cfg.merge_from_dict({"randomness.seed": args.seed})
    if args.auto_scale_lr:
        cfg.merge_from_dict({"auto_scale_lr.enable": True})
    check_batch(cfg, int(os.environ.get("WORLD_SIZE", 1)) if args.launcher != "none" else 1)
    runner = Runner.from_cfg(cfg)
    runner.train()
    return runner


def test(task: Task, argv: Sequence[str] | None = None, description: str = "") -> dict[str, float]:
    """Evaluate a checkpoint, and return the metrics."""
    args = parse_test(argv, description)
    prepare(task, args.launcher)
    from mmengine.runner import Runner

    cfg = load_config(args)
    check_data(cfg, "test")
    check_loads(args.checkpoint, args.trust_checkpoint)
    use_class_tokens(cfg, args.checkpoint)
    if args.tta or cfg.get("tta"):
        use_tta(cfg)
    if args.out:
        task.save_predictions(cfg, args.out)
    runner = Runner.from_cfg(cfg)
    load_network(runner, args.checkpoint)
    return {name: float(value) for name, value in runner.test().items()}


def parse_demo(
    argv: Sequence[str] | None,
    description: str,
    add_flags: Callable[[argparse.ArgumentParser], None] | None = None,
) -> Namespace:
    """Parse the flags of the demo; `add_flags` adds those of one task."""
    parser = _parser(description)
    if add_flags:
        add_flags(parser)
    parser.add_argument("checkpoint", help="weights of the whole network, as training saves them")
    parser.add_argument("images", help="a folder of images, or one image")
    parser.add_argument(
        "--out",
        required=True,
        metavar="FOLDER",
        help="folder for the output images, which keep their names",
    )
    return parser.parse_args(argv)


def demo_network(task: Task, args: Namespace):
    """Return the configuration and the network with the checkpoint's weights, in eval mode.

    Only tensors are read from the checkpoint.
    """
    prepare(task, "none")
    from mmengine.device import get_device
    from mmengine.model import revert_sync_batchnorm
    from mmengine.registry import MODELS, init_default_scope

    cfg = load_config(args)
    use_class_tokens(cfg, args.checkpoint)
    init_default_scope(cfg.default_scope)
    network = revert_sync_batchnorm(MODELS.build(cfg.model))
    state = load_checkpoint(args.checkpoint)
    try:
        network.load_state_dict(state.get("state_dict", state))
    except RuntimeError as error:
        raise ValueError(
            f"{args.checkpoint} is not a checkpoint of this configuration's network: {error}"
        ) from error
    check_finite(network, args.checkpoint)
    return cfg, network.to(get_device()).eval()


def image_files(source: str) -> list[Path]:
    """Return the images of a folder, or the one image; raise ValueError if there are none."""
    path = Path(source)
    images = [path]
    if path.is_dir():
        images = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGES)
    if not images or not images[0].is_file():
        raise ValueError(f"{source} holds no image ({', '.join(IMAGES)})")
    return images


def predict(cfg, network, path: Path):
    """Return mmengine's data sample of one image, predicted as in testing but without labels."""
    from mmengine.dataset import Compose, pseudo_collate

    steps = [
        step for step in cfg.test_dataloader.dataset.pipeline if step.type != "LoadAnnotations"
    ]
    data = Compose(steps)({"img_path": str(path), "img_id": 0, "reduce_zero_label": False})
    with torch.no_grad():
        return network.test_step(pseudo_collate([data]))[0]


def launch(main: Callable[[], Any]) -> None:
    """Run an entry point; report errors of flags or files in one line.

    After an error among several ranks the process ends at once: the others may wait in the group,
    and to leave it would wait for them.
    """
    try:
        main()
    except Exception as error:
        sentence = str(error) if isinstance(error, ValueError) else explain(error)
        if has_peers():
            if sentence:
                log.error("error: %s", sentence)
            else:
                traceback.print_exc()
            exit_at_once(1)
        leave_process_group()
        if sentence:
            raise SystemExit(f"error: {sentence}") from error
        raise
    leave_process_group()
