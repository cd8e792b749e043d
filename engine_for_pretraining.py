"""The training loop, for every method and for fine-tuning alike.

What is trained is a `Task` (unimim/engine/task.py): a pre-training method, or a classifier with its
criterion (engine_for_finetuning.py).
"""

from collections.abc import Iterable, Iterator
from itertools import islice

import torch
from torch import Tensor
from torch.utils.data import Dataset

from datasets import BadImagesError, ImageDataset
from optim_factory import set_schedule
from unimim.engine.distributed import gathered, has_peers, seed_step
from unimim.engine.monitor import Progress, clock, memory_gib
from unimim.engine.samples import PICTURES, is_due, is_evaluated, sample_images
from unimim.engine.session import Position
from unimim.engine.state import Interrupted, Stopped, Training
from unimim.logs import log


def train_one_epoch(run: Training, position: Position) -> dict[str, float]:
    """Train from `position` to the end of its epoch and return the epoch's means.

    Raises Stopped after a signal, NonFiniteError after too many skipped steps.
    """
    args = run.args
    epoch = position.epoch

    # the loader begins where a checkpoint stopped
    run.task.train()
    run.task.before_epoch(epoch, args.epochs)
    run.loader.batch_sampler.set_position(epoch, position.step * args.update_freq)
    progress = Progress(
        f"epoch {epoch}", run.steps_per_epoch, position.step, every=args.log_every, rank=args.rank
    )
    run.throughput.restart()
    try:
        for micro_batches in grouped(run.throughput.timed(run.loader), args.update_freq):
            train_one_step(run, epoch * run.steps_per_epoch + position.step, micro_batches)
            position.step += 1
            progress.advance()
            if progress.due(position.step):
                show(run, progress, position)
                share_bad_images(run.loader.dataset)
            save_if_due(run, position)
    finally:
        progress.close()
    run.monitor.read()
    return run.monitor.means()


def train_one_step(run: Training, update: int, micro_batches: list[dict[str, Tensor]]) -> None:
    """Make update number `update` of the run: schedules, micro-batches, optimizer, ema."""
    # lr, weight decay and random numbers are functions of the update alone
    set_schedule(run.runner.optimizer, run.lr[update], run.weight_decay[update])
    seed_step(run.args.seed, run.args.rank, update)
    outs = [
        run.runner.micro_step(run.prepare(batch), last=k == len(micro_batches))
        for k, batch in enumerate(micro_batches, 1)
    ]

    # a skipped step does not move the teacher
    result = run.runner.step()
    on_host = result["applied"].device.type == "cpu"
    run.task.after_step(
        update / run.total_steps, float(result["applied"]) if on_host else result["applied"]
    )
    metrics = {
        name: torch.stack([out[name].detach().float() for out in outs]).mean() for name in outs[0]
    }
    run.monitor.push(update, [batch["index"] for batch in micro_batches], metrics | result)
    run.throughput.steps += 1
    if on_host:  # reading costs no wait there
        run.monitor.read()


def grouped(batches: Iterable, size: int) -> Iterator[list]:
    """Yield lists of `size` batches; the loader's length is a multiple of it."""
    batches = iter(batches)
    while group := list(islice(batches, size)):
        assert len(group) == size, "the sampler must yield whole optimizer steps"
        yield group


def show(run: Training, progress: Progress, position: Position) -> None:
    """Show one line of metrics, and send them to tensorboard and W&B."""
    recent = run.monitor.read()
    speed = run.throughput.metrics()
    if not recent:
        return

    # the line on the screen
    lrs = [group["lr"] for group in run.runner.optimizer.param_groups]
    update = position.epoch * run.steps_per_epoch + position.step
    memory = memory_gib(run.context.device)
    text = {
        "loss": f"{recent['loss']:.4f}",
        "lr": f"{max(lrs):.2e}",
        "grad": f"{recent['grad_norm']:.2f}",
        "img/s": f"{speed['images_per_s']:.1f}",
        "data": f"{speed['data_wait']:.0f}%",
        "mem": f"{memory:.1f}G",
        "eta": clock((run.total_steps - update) * speed["s_per_step"]),
    }
    if "mfu" in speed:
        text["mfu"] = f"{speed['mfu']:.0f}%"
    progress.show(position.step, text)

    # the curves
    decays = [g["weight_decay"] for g in run.runner.optimizer.param_groups if g["weight_decay"] > 0]
    optimizer = {
        "opt/lr": max(lrs),
        "opt/min_lr": min(lrs),
        "opt/weight_decay": decays[-1] if decays else 0.0,
    }
    metrics = {f"train/{name}": value for name, value in recent.items() if name != "applied"}
    run.run_log.step(
        metrics | optimizer | {f"perf/{k}": v for k, v in speed.items()} | {"perf/memory": memory},
        update,
    )


def share_bad_images(dataset: Dataset) -> None:
    """Mark on every rank the images that any rank found broken; all ranks call.

    BadImagesError: the whole run has more than --max_bad_images. Each rank by itself stops there at
    once.
    """
    if not has_peers() or not isinstance(dataset, ImageDataset):
        return
    found = gathered(dataset.bad.sorted())
    broken = sorted({index for own in found for index in own})
    for index in broken:
        dataset.bad.add(index)
    if len(broken) > dataset.max_bad_images:
        listed = ", ".join(dataset.source.path(index) for index in broken[:10])
        raise BadImagesError(
            f"{len(broken)} of {len(dataset)} images are broken, of all ranks "
            f"({dataset.max_bad_images} allowed by --max_bad_images or --strict_data): "
            f"{listed}{' ...' * (len(broken) > 10)}"
        )


def save_if_due(run: Training, position: Position) -> None:
    """Save within an epoch, and stops all ranks together after a signal on any of them."""
    args = run.args
    stop = run.stop.agreed(last=position.step == run.steps_per_epoch)
    due = args.save_ckpt_steps and position.step % args.save_ckpt_steps == 0
    run.session.check()
    if stop or due:
        run.monitor.read()
        run.session.save(position, finished=False, wait=stop)
    if stop:
        raise Stopped(f"{run.stop.reason} after step {position.step} of epoch {position.epoch}")


def save_at_epoch_end(run: Training, position: Position) -> None:
    """Save every --save_ckpt_freq epochs and at the end of the run."""
    done = position.epoch + 1
    if done % run.args.save_ckpt_freq == 0 or done == run.args.epochs:
        run.session.save(position, finished=True, wait=done == run.args.epochs)


def show_images(run: Training, position: Position) -> None:
    """Send images of masks and reconstructions to the trackers, every few epochs; --eval_every
    sends its own."""
    is_shown = run.run_log.shows_images and is_due(position.epoch, run.args.epochs)
    if not is_shown or is_evaluated(run.args, position.epoch):
        return
    images = sample_images(run)
    if images is not None:
        run.run_log.images(PICTURES, images, (position.epoch + 1) * run.steps_per_epoch)


def train(run: Training, position: Position, after_epoch) -> None:
    """Train epoch after epoch.

    `after_epoch(position)` evaluates, and the metrics that it returns go into log.txt.
    """
    if position.epoch >= run.args.epochs:
        log.info("nothing left to do: all %d epochs are done; raise --epochs", run.args.epochs)
    run.run_log.forget_from(position.epoch)
    try:
        while position.epoch < run.args.epochs:
            train_and_report(run, position, after_epoch)
            position.epoch, position.step = position.epoch + 1, 0
    finally:
        run.run_log.close()
        run.session.finish()


def train_and_report(run: Training, position: Position, after_epoch) -> None:
    """Finish one epoch: evaluation, the line in log.txt, checkpoint."""
    means = train_one_epoch(run, position)
    lr = max(group["lr"] for group in run.runner.optimizer.param_groups)
    try:
        evaluation = after_epoch(position)
    except Interrupted:  # its epoch is evaluated when the run goes on
        run.session.save(position, finished=False)
        raise
    metrics = {f"train_{k}": v for k, v in means.items()} | {"train_lr": lr} | evaluation
    metrics |= {"epoch": position.epoch, "n_parameters": run.n_parameters}
    # before the checkpoint: a run killed in between does the epoch again, and its line with it
    run.run_log.epoch(metrics, (position.epoch + 1) * run.steps_per_epoch)
    save_at_epoch_end(run, position)
    show_images(run, position)
    log.info(
        "epoch %d: %s",
        position.epoch,
        "  ".join(f"{k} {v:.4g}" for k, v in metrics.items() if k != "epoch"),
    )
    run.monitor.reset()
