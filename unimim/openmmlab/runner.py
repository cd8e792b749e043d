"""The command lines of segmentation and detection: a configuration, the flags over it, and
mmengine's runner."""

import argparse
import logging
import os
import pickle
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from unimim.checkpoint.files import load_checkpoint
from unimim.engine.distributed import leave_process_group
from unimim.engine.monitor import keep_freed_memory
from unimim.logs import setup_logging
from unimim.openmmlab import compat
from unimim.openmmlab.checkpoint import class_tokens, read

log = logging.getLogger("unimim")

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
RANDOM = "none"  # --pretrained none: random weights on purpose


@dataclass(frozen=True)
class Task:
    """library: mmseg or mmdet. folder: of the scripts, where configurations find their modules.

    save_predictions: sets a configuration up so that testing writes its predictions to the path of
    --out.
    """

    library: str
    folder: Path
    save_predictions: Callable[[Any, str], None]


# --------------------------------------------------------------------------------------------------
# Flags


def _parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("config", help="a Python file below configs/")
    parser.add_argument(
        "--work-dir", default=None, help="folder for checkpoints and logs; default output/CONFIG"
    )
    parser.add_argument(
        "--data-root", default=None, help="the data set's folder, in place of the configuration's"
    )
    parser.add_argument("--trust-checkpoint", action="store_true",
                        help="run the code of pickled checkpoints: only for files whose origin you trust")  # fmt: skip
    parser.add_argument(
        "--launcher", choices=("none", "pytorch"), default="none", help="pytorch: under torchrun"
    )
    parser.add_argument(
        "--local-rank", "--local_rank", type=int, default=0, help="set by old launchers"
    )
    parser.add_argument("--cfg-options", nargs="+", default=[], metavar="KEY=VALUE",
                        help="anything of the configuration: optim_wrapper.optimizer.lr=1e-4")  # fmt: skip
    return parser


def parse_train(argv: Sequence[str] | None, description: str) -> Namespace:
    parser = _parser(description)
    parser.add_argument("--pretrained", default=None, metavar="FILE",
                        help="pre-trained weights of the backbone; 'none' starts from random ones")  # fmt: skip
    parser.add_argument("--resume", nargs="?", const="auto", default=None, metavar="FILE",
                        help="go on from a checkpoint, by default the last one of --work-dir")  # fmt: skip
    parser.add_argument("--amp", nargs="?", const="float16", default=None, choices=("float16", "bfloat16"),
                        help="mixed precision, on GPUs")  # fmt: skip
    parser.add_argument(
        "--auto-scale-lr", action="store_true", help="scale the rate to the total batch"
    )
    parser.add_argument("--seed", type=int, default=None, help="default: the configuration's")
    return parser.parse_args(argv)


def parse_test(argv: Sequence[str] | None, description: str) -> Namespace:
    parser = _parser(description)
    parser.add_argument("checkpoint", help="weights of the whole network, as training saves them")
    parser.add_argument("--tta", "--ms", action="store_true", help="several scales, and flips")
    parser.add_argument("--out", default=None, metavar="PATH", help="write the predictions")
    return parser.parse_args(argv)


# --------------------------------------------------------------------------------------------------
# The configuration


def prepare(task: Task, launcher: str) -> None:
    """Before anything imports the library: operators, the folder of the configurations' modules,
    processes."""
    compat.prepare(task.library)
    if str(task.folder) not in sys.path:
        sys.path.insert(0, str(task.folder))
    setup_logging(int(os.environ.get("RANK", 0)))
    compat.init_process_group(launcher)


def load_config(args: Namespace):
    """The configuration with the flags over it. ValueError: a file that is missing."""
    from mmengine.config import Config, DictAction

    if not Path(args.config).is_file():
        raise ValueError(f"{args.config} does not exist")
    wrong = [pair for pair in args.cfg_options if "=" not in pair]
    if wrong:
        raise ValueError(f"--cfg-options {wrong[0]} is no KEY=VALUE")
    cfg, options = Config.fromfile(args.config), Namespace()
    if args.data_root:
        _move(cfg._cfg_dict, cfg.data_root, args.data_root)
    DictAction("--cfg-options", "values")(None, options, args.cfg_options)
    cfg.merge_from_dict(options.values)
    cfg.launcher = args.launcher
    cfg.work_dir = (
        args.work_dir or cfg.get("work_dir") or str(Path("output") / Path(args.config).stem)
    )
    if not torch.cuda.is_available():
        run_on_cpu(cfg)
    return cfg


def _move(value: Any, old: str, new: str) -> None:
    """Paths that begin with `old` begin with `new`, everywhere in nested dicts and lists."""
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(item, str) and item.startswith(old):
            value[key] = new + item.removeprefix(old)
        elif isinstance(item, (dict, list)):
            _move(item, old, new)


def check_data(cfg) -> None:
    """ValueError: the folder of the data is not there."""
    if "data_root" in cfg and not Path(cfg.data_root).is_dir():
        raise ValueError(
            f"the data's folder {cfg.data_root} does not exist: name it with --data-root"
        )


def run_on_cpu(cfg) -> None:
    """What mmengine takes for granted of GPUs: synchronized batch norms, nccl, and a device for
    each process."""
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
    """`key`: `old` becomes `key`: `new` everywhere in nested dicts and lists."""
    for item in (
        value.values()
        if isinstance(value, dict)
        else value
        if isinstance(value, (list, tuple))
        else ()
    ):
        _replace(item, key, old, new)
    if isinstance(value, dict) and value.get(key) == old:
        value[key] = new


def use_pretrained(cfg, path: str) -> None:
    """The file for each part of the model that configurations list in `pretrained_parts`, by
    default the backbone.

    A ViT takes as many class tokens as the file has.
    """
    for part in cfg.get("pretrained_parts", ["backbone"]):
        cfg.merge_from_dict({f"model.{part}.pretrained": path})
    use_class_tokens(cfg, path)


def use_class_tokens(cfg, path: str) -> None:
    if cfg.model.backbone.type == "VisionTransformerBackbone":
        cfg.model.backbone.num_cls_tokens = class_tokens(path)


def set_start(cfg, args: Namespace) -> None:
    """Where the weights come from. ValueError: nowhere, and --pretrained does not say that this is
    meant."""
    from mmengine.runner import find_latest_checkpoint

    if args.resume:
        found = find_latest_checkpoint(cfg.work_dir) if args.resume == "auto" else args.resume
        if found is None:
            log.warning("--resume: %s holds no checkpoint yet", cfg.work_dir)
        else:
            check_loads(found, args.trust_checkpoint)
            cfg.resume, cfg.load_from = True, str(found)
            use_class_tokens(cfg, found)
            return
    if args.pretrained == RANDOM:
        log.warning("--pretrained none: the backbone starts from random weights")
    elif args.pretrained:
        use_pretrained(cfg, args.pretrained)
    elif not cfg.get("load_from") and not cfg.model.backbone.get("pretrained"):
        raise ValueError(
            "--pretrained is missing: name a checkpoint, or 'none' to start from random weights"
        )


def check_batch(cfg, world_size: int) -> None:
    """Says so where the total batch is not the one that the recipe's rate is for."""
    recipe = (cfg.get("auto_scale_lr") or {}).get("base_batch_size")
    each, times = cfg.train_dataloader.batch_size, cfg.optim_wrapper.get("accumulative_counts", 1)
    total = each * world_size * times
    if recipe and total != recipe and not cfg.auto_scale_lr.get("enable"):
        log.warning(
            "the total batch is %d (%d a process x %d processes x %d accumulated), the recipe's is %d: results will "
            "differ; --auto-scale-lr scales the rate, optim_wrapper.accumulative_counts the batch",
            total, each, world_size, times, recipe,
        )  # fmt: skip


def use_tta(cfg) -> None:
    """ValueError: the configuration has no `tta_pipeline` and `tta_model`."""
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
    """ValueError unless the safe default reads the file, or it is trusted, which concerns the rest
    of the process."""
    if trusted:
        os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
        return
    try:
        load_checkpoint(path)
    except ValueError as error:
        hint = (
            "; --trust-checkpoint runs it"
            if isinstance(error.__cause__, pickle.UnpicklingError)
            else ""
        )
        raise ValueError(f"{error}{hint}") from error


def load_network(runner, path: str) -> None:
    """All weights of the network. ValueError: any is missing or left over."""
    try:
        runner.load_checkpoint(path, strict=True)
    except RuntimeError as error:
        raise ValueError(
            f"{path} is not a checkpoint of this configuration's network: {error}"
        ) from error


# --------------------------------------------------------------------------------------------------
# Entry points


def train(task: Task, argv: Sequence[str] | None = None, description: str = ""):
    """Trains; returns mmengine's runner."""
    args = parse_train(argv, description)
    prepare(task, args.launcher)
    from mmengine.runner import Runner

    cfg = load_config(args)
    check_data(cfg)
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
    """Evaluates a checkpoint; returns the metrics."""
    args = parse_test(argv, description)
    prepare(task, args.launcher)
    from mmengine.runner import Runner

    cfg = load_config(args)
    check_data(cfg)
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
    """`add_flags` adds those of one task."""
    parser = _parser(description)
    if add_flags:
        add_flags(parser)
    parser.add_argument("checkpoint", help="weights of the whole network, as training saves them")
    parser.add_argument("images", help="a folder of images, or one image")
    parser.add_argument(
        "--out",
        required=True,
        metavar="FOLDER",
        help="where pictures are written, under their names",
    )
    return parser.parse_args(argv)


def demo_network(task: Task, args: Namespace):
    """The configuration, and the network with the checkpoint's weights on the device there is, to
    look at images.

    Of the checkpoint only tensors are read.
    """
    prepare(task, "none")
    from mmengine.device import get_device
    from mmengine.model import revert_sync_batchnorm
    from mmengine.registry import MODELS, init_default_scope

    cfg = load_config(args)
    use_class_tokens(cfg, args.checkpoint)
    init_default_scope(cfg.default_scope)
    network = revert_sync_batchnorm(MODELS.build(cfg.model))
    state = read(args.checkpoint)
    try:
        network.load_state_dict(state.get("state_dict", state))
    except RuntimeError as error:
        raise ValueError(
            f"{args.checkpoint} is not a checkpoint of this configuration's network: {error}"
        ) from error
    return cfg, network.to(get_device()).eval()


def pictures(place: str) -> list[Path]:
    """The images of a folder, or the one image. ValueError: there is none."""
    path = Path(place)
    found = (
        sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGES) if path.is_dir() else [path]
    )
    if not found or not found[0].is_file():
        raise ValueError(f"{place} holds no image ({', '.join(IMAGES)})")
    return found


def predict(cfg, network, path: Path):
    """mmengine's data sample of one image, as for tests but without labels."""
    from mmengine.dataset import Compose, pseudo_collate

    steps = [
        step for step in cfg.test_dataloader.dataset.pipeline if step.type != "LoadAnnotations"
    ]
    data = Compose(steps)({"img_path": str(path), "img_id": 0, "reduce_zero_label": False})
    with torch.no_grad():
        return network.test_step(pseudo_collate([data]))[0]


def launch(main: Callable[[], Any]) -> None:
    """Runs an entry point; what is wrong with flags or files ends in one line."""
    try:
        main()
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    finally:
        leave_process_group()
