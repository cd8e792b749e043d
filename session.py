"""What a run keeps on disk: its checkpoints, the position to resume from, and the clean encoder.

A checkpoint holds plain tensors and dicts: model, teacher or averaged model, optimizer, scaler, epoch and step (the
position of schedules and data; all randomness follows from it and the seed), the meters of the epoch and the flags.
A DeepSpeed run keeps optimizer shards in the folder of the same name, for an exact resume on as many ranks.
"""

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import checkpoint
import utils
from ema import MovingAverage
from options import as_config, effective_batch
from parallel import DeepSpeedRunner, Runner
from utils import StepMonitor, log


@dataclass
class Position:
    """`step` optimizer steps of `epoch` are done; `best` is the best validation accuracy so far in percent."""

    epoch: int = 0
    step: int = 0
    best: float = 0.0
    best_average: float = 0.0


class Session:
    """Saves and resumes one run. `network` is the model whose names the checkpoint carries."""

    def __init__(
        self,
        args: Namespace,
        runner: Runner,
        network: nn.Module,
        monitor: StepMonitor,
        *,
        average: MovingAverage | None,
        average_key: str,
        steps_per_epoch: int,
    ):
        self.args, self.runner, self.network, self.monitor = args, runner, network, monitor
        self.average, self.average_key, self.steps_per_epoch = average, average_key, steps_per_epoch
        self.folder = Path(args.output_dir) if args.output_dir and args.save_ckpt else None
        self.sharded = isinstance(runner, DeepSpeedRunner)

    # -- saving

    def save(self, position: Position, *, finished: bool) -> None:
        """Writes checkpoint-<epoch>.pth of a finished epoch, else checkpoint-<epoch>-<step>.pth; all ranks call it."""
        if self.folder is None:
            return
        stem = f"checkpoint-{position.epoch}" if finished else f"checkpoint-{position.epoch}-{position.step}"
        state = self._state(position) | self._progress(position)
        if self.sharded:
            self._save_shards(stem)
        if self.args.rank == 0:
            self._save_encoder(stem, state[self.average_key] or state["model"])
            self._write(stem, state)
            checkpoint.prune_checkpoints(self.folder, self.args.keep_checkpoints, self.folder / f"{stem}.pth")
        utils.barrier()

    def save_best(self, position: Position, *, of_average: bool) -> None:
        """Writes checkpoint-best.pth, or checkpoint-best-ema.pth whose model is the average; all ranks must call."""
        if self.folder is None:
            return
        state = self._state(position)
        if of_average:
            state["model"] = state[self.average_key]
        if self.args.rank == 0:
            self._write("checkpoint-best-ema" if of_average else "checkpoint-best", state | {self.average_key: None})

    def _write(self, stem: str, state: dict[str, Any]) -> None:
        checkpoint.save_checkpoint(self.folder / f"{stem}.pth", state)
        log.info("saved %s", self.folder / f"{stem}.pth")

    def _state(self, position: Position) -> dict[str, Any]:
        weights, prefix = self.runner.full_state_dict(), self._prefix()
        return {
            "model": {k.removeprefix(prefix): v for k, v in weights.items()},
            self.average_key: None if self.average is None else dict(self.average.module.state_dict()),
            "args": as_config(self.args),
            "engine": self._engine(),
            **vars(position),
        }

    def _progress(self, position: Position) -> dict[str, Any]:
        """What only a resumed run needs. All random draws are functions of the seed and the number of updates done."""
        updates = position.epoch * self.steps_per_epoch + position.step
        progress = {"rng": {"seed": self.args.seed, "updates": updates}, "monitor": self.monitor.state()}
        return progress if self.sharded else progress | self.runner.state_dict()

    def _prefix(self) -> str:
        """The runner may wrap the network in a task; the checkpoint carries the network's own names."""
        names = (name for name, module in self.runner.network.named_modules() if module is self.network)
        return "".join(f"{name}." for name in names if name)

    def _engine(self) -> dict[str, Any]:
        kind = {"kind": "deepspeed", "zero_stage": self.runner.stage} if self.sharded else {"kind": "torch"}
        return kind | {"world_size": self.args.world_size, "global_batch": effective_batch(self.args)}

    def _save_shards(self, stem: str) -> None:
        if self.args.rank == 0:
            checkpoint.begin_deepspeed_folder(self.folder / stem)
        utils.barrier()
        self.runner.save(str(self.folder), stem)
        checkpoint.sync_deepspeed_folder(self.folder / stem)
        utils.barrier()
        if self.args.rank == 0:
            checkpoint.finish_deepspeed_folder(self.folder / stem)

    def _save_encoder(self, stem: str, weights: dict[str, Tensor]) -> None:
        """`weights` are whole ones: an engine may have sharded or rounded the network's own."""
        if hasattr(self.network, "encoder_state_dict"):
            path = checkpoint.encoder_file(self.folder / f"{stem}.pth")
            metadata = {"model": self.args.model, "format": "timm"}
            checkpoint.save_encoder(path, self.network.encoder_state_dict(weights), metadata)

    # -- resuming

    def resume(self, origin: "Origin | None") -> Position:
        """The position after `origin`, whose weights are in the network already; restores optimizer and meters."""
        if origin is None:
            return Position(epoch=self.args.start_epoch)
        if origin.published:
            epoch = int(origin.state.get("epoch", -1)) + 1
            log.warning("%s is a published checkpoint: weights only, from epoch %d", origin.path, epoch)
            return Position(epoch=epoch)
        position = self._position(origin)
        self._load_optimizer(origin)
        log.info(
            "resumed %s: at epoch %d, step %d of %d", origin.path, position.epoch, position.step, self.steps_per_epoch
        )
        return position

    def _position(self, origin: "Origin") -> Position:
        state = origin.state
        if "rng" not in state:
            raise ValueError(f"{origin.path} holds weights only: give it to --finetune, or to --eval with --resume")
        position = Position(**{name: state[name] for name in vars(Position())})
        if (
            origin.path.stem == f"checkpoint-{position.epoch}"
        ):  # a finished epoch, however many steps it has in this run
            return Position(position.epoch + 1, 0, position.best, position.best_average)
        batch, ours = state["engine"]["global_batch"], effective_batch(self.args)
        if batch != ours:
            raise ValueError(
                f"{origin.path} was saved in mid-epoch with an effective batch of {batch}, this run has {ours}: keep "
                "--batch_size x --update_freq x processes the same, or resume from the end of an epoch"
            )
        self.monitor.load(state["monitor"])
        return position

    def _load_optimizer(self, origin: "Origin") -> None:
        """Each engine resumes its own optimizer state; from another engine only the weights come along."""
        engine, path = origin.state["engine"], origin.path
        if self.sharded and engine["kind"] == "deepspeed":
            for key, ours in (("zero_stage", self.runner.stage), ("world_size", self.args.world_size)):
                if engine[key] != ours:
                    raise ValueError(
                        f"{path} was written by DeepSpeed with {key} {engine[key]}, this run has {ours}: its optimizer "
                        "shards cannot be read. Run it the same way, or without --enable_deepspeed to take the weights"
                    )
            checkpoint.check_checkpoint(path)
            if not checkpoint.deepspeed_folder(path).is_dir():
                raise ValueError(f"{path} was written by DeepSpeed and needs the folder {path.stem} beside it")
            self.runner.load(str(path.parent), path.stem)
        elif not self.sharded and engine["kind"] == "torch":
            self.runner.load_state_dict(origin.state)
        else:
            log.warning("%s was written by another engine: weights are resumed, the optimizer starts afresh", path)


@dataclass
class Origin:
    """A checkpoint to go on from, read before the engine wraps the network."""

    path: Path
    state: dict[str, Any]

    @classmethod
    def find(cls, args: Namespace) -> "Origin | None":
        """--resume, else with --auto_resume the newest whole checkpoint of the output folder, else None."""
        path = args.resume
        if not path and args.auto_resume and args.output_dir:
            path = checkpoint.latest_valid_checkpoint(args.output_dir) if args.rank == 0 else None
            path = utils.from_first_rank(path and str(path))  # the others may see the folder at another time
        return cls(Path(path), checkpoint.load_checkpoint(path)) if path else None

    @property
    def published(self) -> bool:
        return "engine" not in self.state

    def load_weights(self, network: nn.Module, average: MovingAverage | None, average_key: str, copy: str = "") -> None:
        """Puts the checkpoint's weights into the network and its average.

        A published file holds one network; the teacher is `copy` (--resume_copy), or the student where none is given.
        An average that the file lacks starts from the weights.
        """
        states = [self.state.get("model"), self.state.get(average_key) or self.state.get("model")]
        if self.published:
            states = [self.state, checkpoint.load_checkpoint(copy) if copy else self.state]
        for module, state in zip((network, average and average.module), states, strict=True):
            if module is not None and state is not None:
                fill(module, state, self.path)


def fill(module: nn.Module, state: dict[str, Any], path: Path) -> None:
    """Loads every tensor of the module by name. Keys that it has no use for are left out: published files have some."""
    weights: dict[str, Tensor] = state.get("model", state.get("module", state))
    weights = {k.removeprefix("module."): v for k, v in weights.items()}
    own = module.state_dict()
    if wrong := [k for k in own if k not in weights or own[k].shape != weights[k].shape]:
        raise ValueError(
            f"{path} does not fit the model that these flags build: {len(wrong)} of its tensors are missing there or "
            f"have another shape, among them {', '.join(wrong[:3])}"
        )
    module.load_state_dict({k: weights[k] for k in own})
