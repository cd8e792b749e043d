"""Saves and resumes a run: its checkpoints, its position, and the clean encoder.

A checkpoint holds plain tensors and dicts: model, teacher or averaged model, optimizer, loss scale,
epoch and step (the position of schedules and data; all randomness follows from it and the seed),
the meters of the epoch, the flags, and what tells whether another run sees the same images.
Weights and the optimizer's state are whole, in float32, and go by the parameters' names, so that
every engine resumes what any engine saved, on any number of ranks. It is written in a thread.

With --deepspeed_shards DeepSpeed's own shards stand in for the optimizer's state, in the folder of
the same name: for as many ranks and the same ZeRO stage only.
"""

import json
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from datasets import fingerprint
from unimim.checkpoint.files import (
    begin_deepspeed_folder,
    check_checkpoint,
    deepspeed_folder,
    encoder_file,
    finish_deepspeed_folder,
    latest_valid_checkpoint,
    list_checkpoints,
    load_checkpoint,
    prune_checkpoints,
    remove_deepspeed_folder,
    save_checkpoint,
    save_encoder,
    shard_checksums,
    sync_deepspeed_folder,
    timm_arguments_of,
)
from unimim.checkpoint.loading import restore
from unimim.checkpoint.names import to_timm
from unimim.checkpoint.published import finished_epochs, optimizer_names
from unimim.cli.options import as_config, effective_batch
from unimim.data.views import image_mean_std
from unimim.engine.deepspeed import DeepSpeedRunner, wrong_shard
from unimim.engine.distributed import barrier, from_first_rank, gathered
from unimim.engine.ema import MovingAverage
from unimim.engine.monitor import StepMonitor
from unimim.engine.optimizer_state import Named, by_name, misshapen, renamed, without_params
from unimim.engine.runner import Runner
from unimim.engine.task import Task
from unimim.engine.writing import Writer, on_host
from unimim.logs import log

# What the flags say of a group of parameters; the rest of a group is the optimizer's own state.
HYPER_PARAMETERS = ("betas", "eps", "momentum", "nesterov", "lr_scale", "warmup_scale")
GROUP_SETTINGS = (*HYPER_PARAMETERS, "weight_decay", "decay", "group_name")
# Flags that may change at a resume without a word: they say where things are, how fast a run is or
# what it writes, or their change is noticed otherwise. A change of any other is at least logged.
UNNOTICED = {
    "allow_outside", "attn", "auto_resume", "batch_size", "compile", "data_path", "data_set",
    "deepspeed_config", "deepspeed_shards", "device", "dist_eval", "dist_on_itp",
    "dist_timeout", "dist_url", "enable_deepspeed", "epochs", "eval", "eval_data_path",
    "eval_every", "eval_images", "evaluate", "extract", "feature_cache", "finetune",
    "grad_checkpointing", "init", "keep_checkpoints", "log_dir", "log_every", "max_bad_images",
    "max_image_pixels", "max_nonfinite", "model", "momentum", "num_workers", "offload", "opt",
    "opt_betas", "opt_eps", "output_dir", "pin_mem", "recipe", "recompute_gelu", "resume",
    "resume_copy", "save_ckpt", "save_ckpt_freq", "save_ckpt_steps", "start_epoch", "stop_status",
    "strict_data", "tracker", "update_freq", "visualize", "visualize_images", "wandb", "zero_stage",
}  # fmt: skip


@dataclass
class Position:
    """The position of a run: `step` optimizer steps of `epoch` are done.

    `best` and `best_average`, of the ema, are the best validation accuracies so far in percent.
    """

    epoch: int = 0
    step: int = 0
    best: float = 0.0
    best_average: float = 0.0


class Session:
    """Saves and resumes one run. The names in a checkpoint are those of `task.network`."""

    def __init__(
        self,
        args: Namespace,
        runner: Runner,
        task: Task,
        monitor: StepMonitor,
        *,
        steps_per_epoch: int,
        dataset: Dataset,
    ):
        self.args = args
        self.runner = runner
        self.monitor = monitor
        self.network = task.network
        self.ema = task.ema
        self.ema_key = task.ema_key
        self.steps_per_epoch = steps_per_epoch
        self.dataset = dataset
        self.reads_masks = "mask" in getattr(task, "views", ())
        self.folder = Path(args.output_dir) if args.output_dir and args.save_ckpt else None
        self.keeps_shards = bool(args.deepspeed_shards)
        self.writer = Writer()

    # -- saving

    def save(self, position: Position, *, finished: bool, wait: bool = True) -> None:
        """Write checkpoint-<epoch>.pth of a finished epoch, else checkpoint-<epoch>-<step>.pth.

        All ranks call. Without `wait` it returns when everything is copied to the host, and a
        thread writes; DeepSpeed's shards are always waited for.
        """
        if self.folder is None:
            return
        self.writer.wait()
        stem = (
            f"checkpoint-{position.epoch}"
            if finished
            else f"checkpoint-{position.epoch}-{position.step}"
        )
        state = self._state(position) | self._progress(position)
        if self.keeps_shards:
            state["shards"] = self._save_shards(stem)
        if self.args.rank == 0:
            self.writer.start(str(self.folder / f"{stem}.pth"), lambda: self._write(stem, state))
        if wait:
            self.finish()
            barrier()

    def save_best(self, position: Position, *, of_ema: bool, wait: bool = True) -> None:
        """Write checkpoint-best.pth, or checkpoint-best-ema.pth whose model is the ema.

        All ranks call; for `wait` see `save`.
        """
        if self.folder is None:
            return
        self.writer.wait()
        state = self._state(position)
        if of_ema:
            state["model"] = state[self.ema_key]
        if self.args.rank == 0:
            path = self.folder / ("checkpoint-best-ema.pth" if of_ema else "checkpoint-best.pth")
            weights = state | {self.ema_key: None}
            self.writer.start(str(path), lambda: _save_and_log(path, weights))
        if wait:
            self.finish()

    def finish(self) -> None:
        """Wait until all that was saved is on the disk; ValueError if it could not be written."""
        self.writer.wait()

    def check(self) -> None:
        """Raise the error of a thread that could not write, if there is one by now."""
        self.writer.check()

    def _write(self, stem: str, state: dict[str, Any]) -> None:
        """Write a checkpoint and its encoder, then delete old ones."""
        path = self.folder / f"{stem}.pth"
        self._save_encoder(stem, state[self.ema_key] or state["model"])
        _save_and_log(path, state)
        if not self.keeps_shards:
            remove_deepspeed_folder(deepspeed_folder(path))
        prune_checkpoints(self.folder, self.args.keep_checkpoints, path)

    def _state(self, position: Position) -> dict[str, Any]:
        """Return weights and position; the tensors are copies on the host of rank 0."""
        weights = self.runner.full_state_dict()
        prefix = self._prefix()
        average = None
        if self.ema is not None and self.args.rank == 0:
            average = on_host(dict(self.ema.module.state_dict()))
        return {
            "model": {k.removeprefix(prefix): v for k, v in weights.items()},
            self.ema_key: average,
            "args": as_config(self.args),
            "engine": self._engine(),
            **vars(position),
        }

    def _progress(self, position: Position) -> dict[str, Any]:
        """Return what only a resumed run needs.

        All random numbers are functions of the seed and the number of updates done.
        """
        progress = {
            "rng": {"seed": self.args.seed, "updates": self._updates(position)},
            "monitor": self.monitor.state(),
            "skipped_steps": self.monitor.skipped,
            "data": self._data,
        }
        if self.keeps_shards:
            return progress
        state = self.runner.state_dict()
        if state["optimizer"]:
            names = {name: short for short, name in self._full_names().items()}
            state["optimizer"] = renamed(state["optimizer"], names)
        return progress | state

    def _updates(self, position: Position) -> int:
        """Return how many steps of the optimizer are done, skipped ones included."""
        return position.epoch * self.steps_per_epoch + position.step

    @cached_property
    def _data(self) -> dict[str, Any]:
        """Describe which images an epoch goes through, in how many steps."""
        return {
            "images": len(self.dataset),
            "fingerprint": fingerprint(self.dataset),
            "steps_per_epoch": self.steps_per_epoch,
        }

    def _prefix(self) -> str:
        """Return what the names in the wrapped task have before the network's own names."""
        for name, module in self.runner.network.named_modules():
            if module is self.network:
                return f"{name}." if name else ""
        raise AssertionError("the network is a part of what the runner trains")

    def _engine(self) -> dict[str, Any]:
        return self.runner.engine | {
            "world_size": self.args.world_size,
            "global_batch": effective_batch(self.args),
        }

    def _save_shards(self, stem: str) -> dict[str, str]:
        """Write DeepSpeed's shards, and return their checksums by file name; all ranks call."""
        folder = self.folder / stem
        if self.args.rank == 0:
            begin_deepspeed_folder(folder)
        barrier()
        self.runner.save(str(self.folder), stem)
        sync_deepspeed_folder(folder)
        barrier()
        checksums = self._shard_checksums(folder)
        if self.args.rank == 0:
            finish_deepspeed_folder(folder)
        return checksums

    def _shard_checksums(self, folder: Path) -> dict[str, str]:
        """Return the checksums of all shards, of which each rank reads some; all ranks call."""
        own = shard_checksums(folder, rank=self.args.rank, ranks=self.args.world_size)
        together = {}
        for checksums in gathered(own):
            together |= checksums
        return dict(sorted(together.items()))

    def _save_encoder(self, stem: str, weights: dict[str, Tensor]) -> None:
        """Write the clean encoder in `weights`, which are whole float32 ones."""
        if hasattr(self.network, "encoder_state_dict"):
            path = encoder_file(self.folder / f"{stem}.pth")
            encoder = to_timm(self.network.encoder_state_dict(weights))
            arguments = json.dumps(self.network.timm_arguments(encoder), default=str)
            metadata = {"model": self.args.model, "format": "timm", "timm": arguments}
            mean, std = image_mean_std(self.args)
            metadata |= {"mean": json.dumps(mean), "std": json.dumps(std)}
            save_encoder(path, encoder, metadata)

    def log_encoder(self) -> None:
        """Log the line of Python that gives the newest encoder as timm's model."""
        if self.folder is None or self.args.rank or not (found := list_checkpoints(self.folder)):
            return
        path = encoder_file(found[-1])
        if path.is_file() and (arguments := timm_arguments_of(path)):
            words = [f"{name}={value!r}" for name, value in arguments.items()]
            log.info("the encoder in Python: timm.create_model(%s)", ", ".join(words))
            mean, std = image_mean_std(self.args)
            log.info("for images in [0, 1] less the mean %s, divided by the std %s", mean, std)

    # -- resuming

    def resume(self, origin: "Origin | None") -> Position:
        """Return the position after `origin`, and restore optimizer and metrics.

        Its weights are in the network already.
        """
        if origin is None:
            return Position(epoch=self.args.start_epoch)
        if origin.published:
            epoch = finished_epochs(origin.state)
            whole = self._load_published_optimizer(origin)
            log.warning(
                "%s is a published checkpoint: %s, from epoch %d",
                origin.path,
                "weights and optimizer" if whole else "weights only, the optimizer begins afresh",
                epoch,
            )
            return Position(epoch=epoch)
        position = self._position(origin)
        self._load_optimizer(origin)
        if "skipped_steps" in origin.state:
            self.monitor.skipped = origin.state["skipped_steps"]
            self.runner.count_steps(self._updates(position), self.monitor.skipped)
        log.info(
            "resumed %s: at epoch %d, step %d of %d",
            origin.path,
            position.epoch,
            position.step,
            self.steps_per_epoch,
        )
        return position

    def _position(self, origin: "Origin") -> Position:
        state = origin.state
        if "rng" not in state:
            raise ValueError(
                f"{origin.path} holds weights only: give it to --finetune, or to --eval with "
                "--resume"
            )
        position = Position(**{name: state[name] for name in vars(Position())})
        # a finished epoch, however many steps it has in this run
        if origin.path.stem == f"checkpoint-{position.epoch}":
            for change in self._changes(state):
                log.warning("%s was saved with %s", origin.path, change)
            return Position(position.epoch + 1, 0, position.best, position.best_average)
        batch, ours = state["engine"]["global_batch"], effective_batch(self.args)
        if batch != ours:
            raise ValueError(
                f"{origin.path} was saved in mid-epoch with an effective batch of {batch}, "
                f"this run has {ours}: keep --batch_size x --update_freq x processes the same, "
                "or resume from the end of an epoch"
            )
        for change in self._changes(state):
            if change.of_order:
                raise ValueError(
                    f"{origin.path} was saved in mid-epoch with {change}: the rest of the "
                    "epoch would be of other samples; keep it the same, or resume from the end "
                    "of an epoch"
                )
            log.warning("%s was saved with %s", origin.path, change)
        if position.step > self.steps_per_epoch:
            raise ValueError(
                f"{origin.path} was saved at step {position.step} of an epoch, which has "
                f"{self.steps_per_epoch} steps in this run: give the same --data_path, or resume "
                "from the end of an epoch"
            )
        self.monitor.load(state["monitor"])
        return position

    def _changes(self, state: dict[str, Any]) -> "Iterator[Change]":
        """Yield what the run that wrote `state` did otherwise, as far as the file says."""
        there, ours = state["args"], as_config(self.args)
        for name in sorted(there.keys() & ours.keys()):
            if name == "mask_type" and not self.reads_masks:
                continue  # it is made of the noise that comes with an image, or there is none
            of_order = name in ("seed", "aug_repeats") or "mask" in name
            if there[name] != ours[name] and (of_order or name not in UNNOTICED):
                yield Change(f"--{name}", there[name], ours[name], of_order)
        data = state.get("data", {})
        if data and data["images"] != self._data["images"]:
            yield Change(
                "--data_path: number of images", data["images"], self._data["images"], True
            )
        elif data and data["fingerprint"] != self._data["fingerprint"]:
            yield Change(
                "--data_path: list of images", data["fingerprint"], self._data["fingerprint"], True
            )
        steps = data.get("steps_per_epoch", self.steps_per_epoch)
        schedules = (
            f"{there['epochs']} x {steps} steps",
            f"{ours['epochs']} x {self.steps_per_epoch} steps",
        )
        if schedules[0] != schedules[1]:
            yield Change("--epochs: a schedule of", *schedules, False)

    def _load_optimizer(self, origin: "Origin") -> None:
        """Restore the optimizer's state, which any engine may have saved.

        Hyper-parameters are those of this run's flags, whatever the file says.
        """
        state = origin.state
        path = origin.path
        ours = self.args.opt
        there = state["args"].get("opt", ours)
        in_shards = "optimizer" not in state
        fits_shards = isinstance(self.runner, DeepSpeedRunner) and in_shards
        settings = [dict(group) for group in self.runner.optimizer.param_groups]
        if there.lower() != ours.lower():
            if fits_shards:
                raise ValueError(
                    f"{path} holds shards of --opt {there}, which --opt {ours} cannot use: keep "
                    f"--opt {there}"
                )
            log.warning(
                "%s holds the state of --opt %s: that of --opt %s starts afresh", path, there, ours
            )
            self.runner.load_weights(self._inside(state.get("model") or {}))
            return
        if fits_shards:
            self._load_shards(origin)
        elif in_shards:
            log.warning(
                "%s holds DeepSpeed's shards, which --enable_deepspeed resumes: weights are "
                "resumed, the optimizer starts afresh",
                path,
            )
            return
        else:
            self.runner.load_weights(self._inside(state.get("model") or {}))
            self.runner.load_optimizer_state(self._optimizer_state(origin))
            self.runner.load_scaler_state(state.get("scaler") or {})
        self._put_back(settings, path)

    def _load_published_optimizer(self, origin: "Origin") -> bool:
        """Take the moments of a published AdamW, if this run has one and the parameters agree."""
        if self.args.opt.lower() != "adamw":
            return False
        groups = self.runner.optimizer.param_groups
        ours = self._full_names()
        decayed = {}
        for names, group in zip(self.runner.names, groups, strict=True):
            decayed |= dict.fromkeys(names, group["decay"])
        decayed = {short: decayed[name] for short, name in ours.items()}
        there = optimizer_names(origin.state, self._whole_shapes(), decayed)
        if there is None:
            return False

        # its moments, this run's settings
        found = by_name(origin.state["optimizer"], there)["state"]
        state = {name: value for name, value in found.items() if name in decayed}
        settings = []
        for names, group in zip(self.runner.names, groups, strict=True):
            settings.append({"names": names, **without_params(group)})
        self.runner.load_optimizer_state(
            {**renamed({"state": state, "groups": []}, ours), "groups": settings}
        )
        return True

    def _whole_shapes(self) -> dict[str, Tensor]:
        """Return the network's state with parameters of their whole shapes, whoever holds them."""
        state = {}
        for name, value in self.network.state_dict(keep_vars=True).items():
            whole = getattr(value, "ds_shape", None)  # ZeRO stage 3 leaves parts in the network
            state[name] = value if whole is None else torch.empty(whole, device="meta")
        return state

    def _full_names(self) -> dict[str, str]:
        """Return the trained parameters' names in the wrapped task by those in the file."""
        prefix = self._prefix()
        names = [name for own in self.runner.names for name in own]
        return {name.removeprefix(prefix): name for name in names}

    def _inside(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return weights under the names that they have in the wrapped task."""
        prefix = self._prefix()
        return {prefix + name: value for name, value in weights.items()}

    def _optimizer_state(self, origin: "Origin") -> Named:
        """Return the file's optimizer state by the names in the wrapped task."""
        saved = origin.state["optimizer"]
        ours = self._full_names()
        if "groups" not in saved:  # an older file: in numbers, with names or by position
            names = origin.state.get("param_names", self.runner.names)
            sizes = [len(group["params"]) for group in saved["param_groups"]]
            if sizes != [len(own) for own in names]:
                raise ValueError(
                    f"{origin.path} does not say which parameters its optimizer had, and this run "
                    "has other ones: give the same flags of the model and --layer_decay"
                )
            saved = by_name(saved, names)
        saved = renamed(saved, ours)
        parameters = self.runner.network.named_parameters()
        shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in parameters}  # ZeRO 3's whole
        if wrong := misshapen(saved, shapes):
            raise ValueError(
                f"{origin.path} does not fit the optimizer of these flags: {wrong} has another "
                "shape than the parameter"
            )
        held = {name for group in saved["groups"] for name in group["names"]}
        if new := [name for name in ours if ours[name] not in held]:
            log.warning(
                "%s has no optimizer state of %d parameters, such as %s",
                origin.path,
                len(new),
                new[0],
            )
        return saved

    def _load_shards(self, origin: "Origin") -> None:
        """Restore DeepSpeed's shards, if they are whole and this run can use them."""
        path = origin.path
        engine = origin.state["engine"]
        for key, ours in (
            ("zero_stage", self.runner.stage),
            ("world_size", self.args.world_size),
        ):
            if engine[key] != ours:
                raise ValueError(
                    f"{path} was written by DeepSpeed with {key} {engine[key]}, this run has "
                    f"{ours}: its optimizer shards cannot be read. Run it the same way, or "
                    "without --enable_deepspeed to take the weights"
                )
        folder = deepspeed_folder(path)
        check_checkpoint(path)
        if not folder.is_dir():
            raise ValueError(
                f"{path} was written by DeepSpeed and needs the folder {path.stem} beside it"
            )
        checksums = origin.state.get("shards") or {}
        wrong = wrong_shard(folder, checksums, self.args.rank, self.args.world_size)
        # on all ranks alike, before DeepSpeed lets them wait for each other
        for text in gathered(wrong):
            if text:
                raise ValueError(text)
        self.runner.load(str(path.parent), path.stem)

    def _put_back(self, settings: list[dict[str, Any]], path: Path) -> None:
        """Give the optimizer's groups this run's settings, and log each that differs in the
        file."""
        differing: dict[str, str] = {}
        for group, ours in zip(self.runner.optimizer.param_groups, settings, strict=True):
            for name in GROUP_SETTINGS:
                if name not in ours:
                    continue
                there = group.get(name, ours[name])
                if name in HYPER_PARAMETERS and plain(there) != plain(ours[name]):
                    differing.setdefault(
                        name, f"{name} {plain(there)}, this run takes {plain(ours[name])}"
                    )
                group[name] = ours[name]
        for text in differing.values():
            log.warning("%s was saved with %s", path, text)


@dataclass(frozen=True)
class Change:
    """A setting that a resumed run changes; `of_order`: it decides which images a step sees."""

    name: str
    there: Any
    ours: Any
    of_order: bool

    def __str__(self) -> str:
        return f"{self.name} {self.there}, this run has {self.ours}"


def plain(value: Any) -> Any:
    """Return tuples as lists, for comparison and for the log."""
    return list(value) if isinstance(value, tuple) else value


def _save_and_log(path: Path, state: dict[str, Any]) -> None:
    save_checkpoint(path, state)
    log.info("saved %s", path)


@dataclass
class Origin:
    """The checkpoint that a run resumes from, read before the engine wraps the network."""

    path: Path
    state: dict[str, Any]

    @classmethod
    def find(cls, args: Namespace) -> "Origin | None":
        """Return --resume, else with --auto_resume the newest whole checkpoint of the output
        folder.

        None if there is neither.
        """
        path = args.resume
        if not path and args.auto_resume and args.output_dir:
            path = latest_valid_checkpoint(args.output_dir) if args.rank == 0 else None
            # the others may see the folder at another time
            path = from_first_rank(path and str(path))
        if not path:
            return None
        # mapped: the processes of a node share the pages, and read only what they use
        origin = cls(Path(path), load_checkpoint(path, mmap=True))
        origin.check(getattr(args, "model", ""))  # parts are learned without one
        return origin

    @property
    def published(self) -> bool:
        return "engine" not in self.state

    def check(self, model: str) -> None:
        """Raise ValueError unless a file of this repository has all its parts and is of `model`."""
        if self.published:
            return
        numbers = (int, float)
        parts = {
            "model": dict, "args": dict, "engine": dict, "epoch": int, "step": int,
            "best": numbers, "best_average": numbers,
        }  # fmt: skip
        if "rng" in self.state:  # what only a resumed run needs
            parts |= {"monitor": dict}
        wrong = [name for name, kind in parts.items() if not isinstance(self.state.get(name), kind)]
        if not wrong:
            place = {"kind": str, "world_size": int, "global_batch": int}
            engine = self.state["engine"]
            wrong = [
                f"engine {n}" for n, kind in place.items() if not isinstance(engine.get(n), kind)
            ]
        if not wrong:
            wrong = [name for name in ("epoch", "step") if self.state[name] < 0]
        if wrong:
            raise ValueError(
                f"{self.path} is no checkpoint that can be resumed: its {', '.join(wrong)} is "
                "missing or damaged"
            )
        there = self.state["args"].get("model", model)
        if there != model:
            raise ValueError(
                f"{self.path} was saved by --model {there}, this run has --model {model}: keep it, "
                "or start from its weights with --finetune in a new --output_dir"
            )

    def load_weights(
        self, network: nn.Module, ema: MovingAverage | None, ema_key: str, copy: str = ""
    ) -> None:
        """Put the checkpoint's weights into the network and its ema.

        A published file holds one network; the teacher is `copy` (--resume_copy), or the student
        where none is given. An ema that the file lacks starts from the weights.
        """
        weights = self.state.get("model")
        ema_weights = self.state.get(ema_key) or weights
        if self.published:
            weights = self.state
            average = self.state.get("ema_state_dict")  # SemAIM's
            ema_weights = load_checkpoint(copy) if copy else average or self.state
        if weights is not None:
            published = self.published
            restore(network, weights, str(self.path), published=published, whole=not published)
        if ema is not None and ema_weights is not None:
            restore(ema.module, ema_weights, str(self.path), published=self.published)
