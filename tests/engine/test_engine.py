"""One process: steps, skipped steps, moving averages, batch statistics, evaluation, DeepSpeed's
configuration."""

import copy
import json
import math
import platform
import sys
from argparse import Namespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    METHODS,
    arguments,
    average_weights,
    column,
    differing,
    own_signals,
    run_command,
    start,
    train_steps,
)
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from datasets import EvalBatchSampler, ImageDataset, build_dataset, build_loader
from engine_for_finetuning import evaluate_classifier
from engine_for_pretraining import train
from optim_factory import create_optimizer, param_groups
from run_class_finetuning import ClassificationEvaluator
from unimim.checkpoint.files import load_checkpoint
from unimim.cli.models import build_method
from unimim.cli.options import resolve_precision
from unimim.data.pretraining import build_data
from unimim.data.views import MEAN_STD, build_finetune_transform
from unimim.engine import runner
from unimim.engine.batch_norm import BatchStatistics
from unimim.engine.deepspeed import deepspeed_config, run_with_rounded_weights
from unimim.engine.ema import MovingAverage
from unimim.engine.monitor import NonFiniteError, StepMonitor, peak_tflops
from unimim.engine.runner import (
    GradientCheck,
    RevocableStep,
    TorchRunner,
    check_precision,
    step_on_device,
)
from unimim.engine.setup import flops_per_image, set_up, start_training
from unimim.engine.state import Normalize, RunContext
from unimim.engine.task import Task
from unimim.evaluation.accuracy import tally
from unimim.logs import log

CPU = torch.device("cpu")

# --------------------------------------------------------------------------------------------------
# Steps


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_every_trainable_parameter_gets_a_gradient(tmp_path, stage):
    run, _ = start(stage, tmp_path)
    run.loader.batch_sampler.set_position(0)
    run.runner.micro_step(run.normalize(next(iter(run.loader))), last=True)
    without = [
        name for name, p in run.task.named_parameters() if p.requires_grad and p.grad is None
    ]
    assert without == []
    assert sum(p.requires_grad for p in run.task.parameters()) == sum(
        len(g["params"]) for g in run.runner.optimizer.param_groups
    )


def test_step_is_clipped_adamw_on_the_mean_gradient(tmp_path):
    """Two micro-batches by the runner against the same by hand."""
    flags = ("--update_freq", "2", "--clip_grad", "0.5", "--weight_decay", "0.1", "--lr", "1e-2")
    run, _ = start("pretrain", tmp_path, *flags)
    run.loader.batch_sampler.set_position(0)
    batches = [run.normalize(batch) for batch, _ in zip(run.loader, range(2), strict=False)]
    twin = copy.deepcopy(run.task)
    losses = [twin(batch)["loss"] for batch in batches]
    (sum(losses) / 2).backward()
    gradients = {name: p.grad for name, p in twin.named_parameters()}
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
    expected = {}
    for name, p in twin.named_parameters():
        decay = 0.0 if p.ndim == 1 or name == "cls_token" else 0.1
        step = gradients[name] * (0.5 / (norm + 1e-6))
        expected[name] = p.detach() * (1 - 1e-2 * decay) - 1e-2 * step / (step.abs() + 1e-8)

    figures = train_steps(run, 0, 1)[0]

    assert norm > 0.5
    assert figures["loss"] == pytest.approx((sum(losses) / 2).item(), abs=1e-6)
    assert figures["grad_norm"] == pytest.approx(norm, rel=1e-5)
    for name, p in run.task.named_parameters():
        clear = (
            gradients[name].abs() > 1e-5 * norm
        )  # elsewhere Adam's first step is the sign of rounding noise
        torch.testing.assert_close(p.detach()[clear], expected[name][clear], atol=1e-4, rtol=0)


def test_schedules_reach_the_optimizer(tmp_path):
    run, _ = start("finetune", tmp_path, "--warmup_epochs", "1", "--weight_decay_end", "0.5")
    train_steps(run, 0, 3)
    groups = {group["group_name"]: group for group in run.runner.optimizer.param_groups}
    assert (
        groups["layer_3_decay"]["lr"]
        == run.lr[2]
        == pytest.approx(1e-3 * 2 / (run.steps_per_epoch - 1))
    )
    assert groups["layer_0_decay"]["lr"] == pytest.approx(run.lr[2] * 0.75**3)
    assert groups["layer_1_decay"]["weight_decay"] == run.weight_decay[2] > 0.05
    assert groups["layer_1_no_decay"]["weight_decay"] == 0


# --------------------------------------------------------------------------------------------------
# What is not finite

OPTIMIZERS = ["adamw", "sgd", "lamb", "lars", "lookahead_adamw", "adafactor"]


def snapshot(run):
    return copy.deepcopy(
        (run.task.state_dict(), average_weights(run), list(run.runner.optimizer.state.values()))
    )


def nan_images(update, micro_batches):
    for name in ("image", "image_strong"):
        micro_batches[-1][name] = micro_batches[-1][name].float() * float("nan")


@pytest.mark.parametrize("opt", OPTIMIZERS)
def test_nonfinite_step_leaves_no_trace(tmp_path, opt):
    run, _ = start("pretrain", tmp_path, "--opt", opt, "--update_freq", "2")
    train_steps(run, 0, 2)
    before = snapshot(run)
    train_steps(run, 2, 3, nan_images)
    hook = run.task.projectors[3].weight.register_hook(lambda grad: grad * float("inf"))
    train_steps(run, 3, 4)
    hook.remove()
    assert differing(before, snapshot(run)) == []
    assert train_steps(run, 4, 5)[0]["applied"] == 1.0
    assert "/0/blocks.0.attn.qkv.weight" in differing(before, snapshot(run))


def test_infinite_loss_with_finite_gradients_is_skipped(tmp_path):
    run, _ = start("pretrain", tmp_path)
    train_steps(run, 0, 1)
    before, compare = snapshot(run), run.task.compare
    run.task.compare = lambda *args: {"loss": compare(*args)["loss"] + math.inf}
    train_steps(run, 1, 2)
    assert differing(before, snapshot(run)) == [] and run.monitor.streak == 1


def test_nonfinite_first_step_leaves_no_trace(tmp_path):
    run, _ = start("pretrain", tmp_path / "spoilt")
    initial = copy.deepcopy(run.task.state_dict())
    train_steps(run, 0, 1, nan_images)
    assert differing(initial, run.task.state_dict()) == []
    twin, _ = start("pretrain", tmp_path / "twin")
    assert column(train_steps(run, 1, 3), "loss") == column(train_steps(twin, 1, 3), "loss")


class Lines(nn.Module):
    """Squared outputs of one to three linear maps in a row, of which `cut` get no gradient."""

    def __init__(self, cut: int = 0):
        super().__init__()
        self.lines = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.cut = cut

    def forward(self, batch):
        x = batch["image"]
        for number, line in enumerate(self.lines, 1):
            x = line(x).detach() if number <= self.cut else line(x)
        return {"loss": x.square().mean()}


def lines_runner(network: nn.Module, precision: str = "fp32") -> TorchRunner:
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, fused=True)
    return TorchRunner(
        network, optimizer, device=CPU, precision=precision, update_freq=1, clip_grad=None
    )


def test_a_scaled_first_step_that_is_skipped_leaves_no_trace():
    """At its first scales fp16 overflows; fused SGD would keep a momentum of whatever the memory
    held."""
    network = Lines()
    twin = copy.deepcopy(network)
    batch = {"image": torch.randn(8, 4)}
    runner, unspoilt = lines_runner(network, "fp16"), lines_runner(twin, "fp16")
    hook = network.lines[0].weight.register_hook(lambda grad: grad * math.inf)
    runner.micro_step(batch, last=True)
    assert runner.step()["applied"] == 0
    hook.remove()
    assert runner.scaler.get_scale() == 2**15
    assert not any(
        state.get("momentum_buffer") is not None for state in runner.optimizer.state.values()
    )
    unspoilt.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**15)
    for _ in range(3):
        for each in (runner, unspoilt):
            each.micro_step(batch, last=True)
            assert each.step()["applied"] == 1
    assert differing(network.state_dict(), twin.state_dict()) == []


@pytest.mark.parametrize("cut", [0, 1, 2])
def test_tensors_without_gradients_are_named(monkeypatch, cut):
    """One of three layers is named, two are an error; a last layer that starts at zero is
    neither."""
    network = Lines(cut)
    for tensor in network.lines[2].parameters():
        nn.init.zeros_(tensor)
    nn.init.ones_(network.lines[2].bias)  # of squares, or the loss is at its minimum
    said = []  # by way of the method, whatever state other tests have left the logger in
    monkeypatch.setattr(log, "warning", lambda text, *values: said.append(text % values))
    runner, batch = lines_runner(network), {"image": torch.randn(8, 4)}
    spoilt = 2  # a skipped step does not count, and what is not finite is no gradient
    for step in range(GradientCheck.steps):
        runner.micro_step(
            {"image": batch["image"] * (math.nan if step == spoilt else 1)}, last=True
        )
        runner.step()
    assert runner.gradients.hooks and not said
    runner.micro_step(batch, last=True)
    if cut == 2:
        with pytest.raises(
            ValueError, match=r"4 of 6 trainable tensors had no gradient .*lines\.0\.weight"
        ):
            runner.step()
        return
    runner.step()
    named = "2 of 6 trainable tensors had no gradient in 5 steps: lines.0.weight, lines.0.bias"
    assert said == ([named] if cut else [])


def test_tensors_without_gradients_are_found_without_a_wait(monkeypatch):
    """Tensors on a GPU that pretends to be there refuse to be read: the counts are sent to the
    host, and judged a step later."""
    monkeypatch.setattr(torch.cuda, "current_stream", mock.Mock())
    said = []
    monkeypatch.setattr(log, "warning", lambda text, *values: said.append(text % values))
    with FakeTensorMode():
        check = GradientCheck(nn.Linear(2, 3, device="cuda"))
        applied = torch.ones((), device="cuda")
        for _ in range(check.steps):
            assert check.counts is None
            check.after_step(applied)
        assert check.counts.device == CPU and check.counts.shape == (3,)
        assert check.arrived is not None and check.hooks
        check.counts = None
        check.after_step(applied)  # sends them again, as after steps that were skipped
        assert check.counts.device == CPU
    arrived = check.arrived
    check.counts = torch.tensor([check.steps, 4.0, 0.0])
    check.after_step(applied)
    arrived.synchronize.assert_called_once()
    assert said == ["1 of 2 trainable tensors had no gradient in 5 steps: bias"]
    assert not check.hooks


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounded_weights_leave_the_contrast_in_float32(tmp_path, dtype):
    """DeepSpeed's sections fp16 and bf16 round the network: batch statistics, similarity and loss
    of ConMIM stay in float32."""
    run, _ = start("pretrain", tmp_path)
    method, seen = run.task, {}
    target = method.target
    similarity, contrast = target.similarity, target.contrast

    def remember_inputs(queries, keys):
        seen["inputs"] = queries.detach().float(), keys.detach().float()
        return similarity(queries, keys)

    def remember_logits(logits, *rest):
        seen["logits"] = logits
        return contrast(logits, *rest)

    target.similarity, target.contrast = remember_inputs, remember_logits
    batch = run.normalize(next(iter(run.loader)))
    exact = method(batch)["loss"]
    for parameter in method.parameters():
        parameter.data = parameter.data.to(dtype)
    run_with_rounded_weights(method, CPU, dtype)
    loss = method(batch)["loss"]
    assert loss.dtype == seen["logits"].dtype == torch.float32
    queries, keys = (nn.functional.normalize(x, dim=-1) for x in seen["inputs"])
    assert torch.equal(seen["logits"], queries @ keys.transpose(1, 2) / target.temperature)
    assert {b.dtype for b in method.buffers() if b.is_floating_point()} == {torch.float32}
    assert loss.item() == pytest.approx(exact.item(), rel=8 * torch.finfo(dtype).eps)


def test_statistics_on_the_host_take_a_flag_from_the_device():
    """--model_ema_force_cpu: weights on a GPU, which pretends to be there, and their average on the
    host."""
    with FakeTensorMode():
        statistics = BatchStatistics(nn.BatchNorm1d(3, device="cuda"), nn.BatchNorm1d(3))
        statistics.keep()
        statistics.put_back_unless(torch.ones((), device="cuda"))
        assert {buffer.device.type for buffer in statistics.buffers} == {"cpu", "cuda"}


def test_precision_auto_takes_no_emulation(monkeypatch):
    """A V100 has no bf16, but torch computes it there all the same."""
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation
    )
    args = Namespace(precision="auto")
    resolve_precision(args, torch.device("cuda"))
    assert args.precision == "fp32"
    with pytest.raises(ValueError, match="--precision bf16 is not supported by this GPU"):
        check_precision("bf16", torch.device("cuda"))


@pytest.mark.parametrize("opt", OPTIMIZERS)
def test_skipping_on_the_device_equals_skipping_on_the_host(tmp_path, monkeypatch, opt):
    """On a GPU fused optimizers are told to skip, and the steps of others are taken back; the same
    happens to tensors on the CPU."""

    def on_device(optimizer, applied, revocable):
        if opt in ("adamw", "sgd"):
            step_on_device(optimizer, applied)
        else:
            assert revocable.is_possible()
            revocable.take(applied)

    spoilt = {2, 3, 6}  # the last one too: the checkpoint holds what is settled
    ways = {}
    for way in ("host", "device"):
        run, _ = start("pretrain", tmp_path / way, "--opt", opt)
        train_steps(run, 0, 2)
        if way == "device":
            monkeypatch.setattr(runner, "step_unless_nonfinite", on_device)
        train_steps(
            run,
            2,
            7,
            lambda update, batches: nan_images(update, batches) if update in spoilt else None,
        )
        ways[way] = (copy.deepcopy(run.runner.state_dict()), *snapshot(run))
    assert differing(ways["host"], ways["device"]) == []


def small_optimizer(name: str, device: str = "cpu") -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 6, device=device), nn.Linear(6, 3, device=device))
    parameters = list(network.parameters())
    groups = [
        {"params": parameters[::2], "weight_decay": 0.05},
        {"params": parameters[1::2], "weight_decay": 0.0},
    ]
    args = Namespace(opt=name, lr=0.01, momentum=0.9, opt_eps=None, opt_betas=None)
    return network, create_optimizer(args, groups, device)


def small_steps(name: str, *, take_back: bool) -> tuple[dict, dict, int]:
    """Weights and optimizer state after 14 steps, four of them not finite, and how many of them
    could be taken back."""
    network, optimizer = small_optimizer(name)
    revocable, possible = RevocableStep(optimizer), 0
    for step in range(14):
        loss = network(torch.linspace(-1, 1, 32).view(8, 4) + step).square().mean()
        gradients = torch.autograd.grad(loss, list(network.parameters()))
        spoil = {3: math.nan, 5: math.inf, 6: math.nan, 11: math.nan}.get(step, 1.0)
        for parameter, gradient in zip(network.parameters(), gradients, strict=True):
            parameter.grad = gradient * spoil
        applied = torch.tensor(float(spoil == 1.0))
        possible += revocable.is_possible()
        if take_back and revocable.is_possible():
            revocable.take(applied)
        elif applied:
            optimizer.step()
    revocable.settle()
    return copy.deepcopy(network.state_dict()), copy.deepcopy(optimizer.state_dict()), possible


@pytest.mark.parametrize(
    "name", ["adan", "lion", "madgrad", "nadamw", "radamlegacy", "rmsproptf", "lookahead_lamb"]
)
def test_counters_and_slow_weights_are_taken_back(name):
    """All state, on the host too, is that of a host that skips; only first steps are looked at."""
    *skipped, possible = small_steps(name, take_back=False)
    *undone, _ = small_steps(name, take_back=True)
    assert differing(skipped, undone) == []
    assert possible == 13


def test_state_that_cannot_be_put_back_is_left_to_the_host():
    """A list cannot be chosen on the device."""
    network, optimizer = small_optimizer("lamb")
    network(torch.ones(2, 4)).sum().backward()
    revocable = RevocableStep(optimizer)
    assert not revocable.is_possible(), "there is no state yet"
    optimizer.step()
    assert revocable.is_possible()
    optimizer.state[network[0].weight]["kept"] = []
    assert not revocable.is_possible()


def test_taking_a_step_back_asks_no_device(monkeypatch):
    """Tensors on a GPU that pretends to be there refuse to be read."""
    monkeypatch.setattr(torch.cuda, "current_stream", mock.Mock())
    with FakeTensorMode():
        network, optimizer = small_optimizer("lars", "cuda")
        for parameter in network.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()  # the first one, for which the host has to look
        revocable = RevocableStep(optimizer)
        applied = torch.ones((), device="cuda")
        runner.step_unless_nonfinite(optimizer, applied, revocable)
        assert revocable.flag.device == CPU and revocable.arrived is not None
        with pytest.raises(DataDependentOutputException):
            runner.step_unless_nonfinite(optimizer, applied)


def test_ema_takes_the_flag_from_the_device():
    """There `applied` is a tensor that the host has not read: the same up to rounding, and a
    skipped step is none."""
    source = nn.Linear(3, 2)
    ours, theirs = MovingAverage(source), MovingAverage(source)
    with torch.no_grad():
        source.weight.add_(1.0)
    for applied in (1.0, 0.0, 1.0):
        before = {name: value.clone() for name, value in theirs.module.state_dict().items()}
        ours.update(0.9, applied)
        theirs.update(0.9, torch.tensor(applied))
        if applied == 0.0:
            assert differing(before, dict(theirs.module.state_dict())) == []
    torch.testing.assert_close(
        ours.module.state_dict(), theirs.module.state_dict(), rtol=1e-6, atol=1e-7
    )
    assert torch.allclose(ours.module.weight, source.weight - 0.81)


def test_run_stops_after_too_many_and_not_before(tmp_path):
    run, _ = start("pretrain", tmp_path, "--max_nonfinite", "2")
    before = snapshot(run)
    train_steps(run, 0, 2, nan_images)
    train_steps(run, 2, 3)  # a good step ends the streak
    assert run.monitor.streak == 0
    after = snapshot(run)
    assert differing(before, after) != []
    with pytest.raises(NonFiniteError, match=r"3 optimizer steps in a row.*--max_nonfinite 2"):
        train_steps(run, 3, 9, nan_images)
    assert differing(after, snapshot(run)) == []
    assert sorted(path.name for path in tmp_path.glob("nonfinite-*")) == [
        f"nonfinite-{step}-rank0.json" for step in (0, 1, 3, 4, 5)
    ]


def test_indices_of_the_bad_batch_are_written(tmp_path):
    run, _ = start("pretrain", tmp_path, "--update_freq", "2")
    seen = []
    train_steps(
        run, 0, 1, lambda update, batches: seen.extend(batches) or nan_images(update, batches)
    )
    report = json.loads((tmp_path / "nonfinite-0-rank0.json").read_text())
    assert report["indices"] == torch.cat([batch["index"] for batch in seen]).tolist()
    assert report["loss"] == "nan" and len(set(report["indices"])) == 16


def figures(loss: float, applied: float) -> dict:
    return {
        name: torch.tensor(v)
        for name, v in {"loss": loss, "grad_norm": 1.0, "applied": applied}.items()
    }


def test_monitor_averages_applied_steps_only():
    monitor = StepMonitor(folder="", rank=0, max_nonfinite=3)
    for step, (loss, applied) in enumerate([(1.0, 1), (math.nan, 0), (4.0, 1)]):
        monitor.push(step, [], figures(loss, applied))
    assert monitor.read()["loss"] == 2.5
    monitor.push(3, [], figures(7.0, 1))
    assert monitor.read()["loss"] == 7.0
    assert monitor.means() == {"loss": 4.0, "grad_norm": 1.0}
    other = StepMonitor(folder="", rank=0, max_nonfinite=3)
    other.load(json.loads(json.dumps(monitor.state())))
    assert other.means() == monitor.means()


def test_monitor_lets_a_loss_scale_come_down():
    """fp16 starts with a scale that overflows; that is no reason to stop, a loss that is not finite
    is."""
    monitor = StepMonitor(folder="", rank=0, max_nonfinite=1, scaled=True)
    for step in range(17):
        monitor.push(step, [], figures(2.0, 0))
    monitor.read()
    monitor.push(17, [], figures(2.0, 0))
    with pytest.raises(NonFiniteError, match="18 optimizer steps"):
        monitor.read()
    monitor = StepMonitor(folder="", rank=0, max_nonfinite=1, scaled=True)
    for step in range(2):
        monitor.push(step, [], figures(math.nan, 0))
    with pytest.raises(NonFiniteError, match="2 optimizer steps"):
        monitor.read()


# --------------------------------------------------------------------------------------------------
# Averages and evaluation


class WithBuffers(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.frozen = nn.Linear(4, 4), nn.Parameter(torch.ones(2), requires_grad=False)
        self.register_buffer("statistic", torch.zeros(3))
        self.register_buffer("index", torch.arange(3))


def test_ema_equals_a_plain_loop():
    source = WithBuffers()
    average = MovingAverage(source, copy_buffers=True)
    expected = {name: value.double().clone() for name, value in source.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    for step in range(20):
        momentum = 0.9 + 0.005 * step
        with torch.no_grad():
            for value in (source.linear.weight, source.linear.bias, source.statistic):
                value.copy_(torch.randn(value.shape, generator=generator))
            source.index.add_(7)
        for name in ("linear.weight", "linear.bias"):
            expected[name] = (
                momentum * expected[name] + (1 - momentum) * source.state_dict()[name].double()
            )
        average.update(momentum)
    state = average.module.state_dict()
    for name in ("linear.weight", "linear.bias", "frozen"):
        torch.testing.assert_close(state[name].double(), expected[name], atol=1e-6, rtol=0)
    assert torch.equal(state["index"], source.index) and torch.equal(
        state["statistic"], source.statistic
    )
    assert not any(p.requires_grad for p in average.module.parameters())


def test_ema_follows_replaced_buffers():
    """A change of dtype or device puts new buffers in the place of the old ones."""
    source = WithBuffers()
    average = MovingAverage(source, copy_buffers=True)
    for module in (source, average.module):
        module.statistic, module.index = module.statistic.double(), module.index.int()
    source.statistic.fill_(1.0)
    source.index.fill_(5)
    average.update(0.75)
    assert (
        average.module.statistic.tolist() == [1.0] * 3 and average.module.index.tolist() == [5] * 3
    )


def test_ema_stays_in_float32():
    average = MovingAverage(nn.Linear(3, 2).bfloat16())
    assert {p.dtype for p in average.module.parameters()} == {torch.float32}


@pytest.mark.parametrize("flags", [(), ("--model_ema_force_cpu",)])
def test_ema_of_a_classifier_follows_and_is_evaluated(tmp_path, flags):
    run, position = start("finetune", tmp_path, "--model_ema", "--model_ema_decay", "0.5", *flags)
    expected = {name: p.detach().double().clone() for name, p in run.task.model.named_parameters()}
    for step in range(3):
        train_steps(run, step, step + 1)
        for name, p in run.task.model.named_parameters():
            expected[name] = 0.5 * expected[name] + 0.5 * p.detach().double()
    for name, p in run.task.ema.module.named_parameters():
        torch.testing.assert_close(p.double(), expected[name], atol=1e-6, rtol=0)

    evaluator = ClassificationEvaluator(run, eval_loader(run.args))
    position.step = 3
    found = evaluator.after_epoch(position, run.session)
    for name, model in (("test_loss", run.task.model), ("test_ema_loss", run.task.ema.module)):
        assert found[name] == pytest.approx(
            evaluate_classifier(model, eval_loader(run.args), run.context)["loss"]
        )
    assert found["test_loss"] != found["test_ema_loss"]
    run.session.save(position, finished=False)
    resumed, _ = start("finetune", tmp_path, "--model_ema", "--model_ema_decay", "0.5", *flags)
    assert differing(average_weights(run), average_weights(resumed)) == []


def test_ema_that_a_checkpoint_lacks_starts_from_its_weights(tmp_path):
    run, position = start("finetune", tmp_path)
    train_steps(run, 0, 2)
    position.step = 2
    run.session.save(position, finished=False)
    resumed, _ = start("finetune", tmp_path, "--model_ema")
    assert differing(dict(run.task.model.state_dict()), average_weights(resumed)) == []


def test_without_augmentation_training_sees_what_evaluation_sees(tmp_path):
    augmented, _ = start("finetune", tmp_path / "augmented", "--reprob", "1")
    plain, _ = start("finetune", tmp_path / "plain", "--reprob", "1", "--no_aug")
    expected = ImageDataset(
        plain.loader.dataset.source, build_finetune_transform(plain.args, train=False), seed=0
    )
    for epoch, index in ((0, 3), (1, 3), (2, 50)):
        picture = plain.loader.dataset[epoch, index]["image"]
        assert torch.equal(picture, expected[0, index]["image"])
        assert not torch.equal(picture, augmented.loader.dataset[epoch, index]["image"])
    assert plain.task.erase is None and augmented.task.erase is not None


def eval_loader(args, size: int = 101):
    transform = build_finetune_transform(args, train=False)
    dataset = build_dataset(args, train=False, transform=transform, need_labels=True)
    return build_loader(dataset, EvalBatchSampler(size, 12), num_workers=0, pin_mem=False)


class Scripted(nn.Module):
    """Answers with the logits of the images in their order."""

    def __init__(self, logits):
        super().__init__()
        self.logits, self.seen = logits, 0

    def forward(self, images):
        self.seen += len(images)
        return self.logits[self.seen - len(images) : self.seen]


def test_evaluation_counts_hits_and_ignores_padding():
    logits = torch.randn(7, 10, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([3, 1, 4, 1, 5, 9, 2])
    index = torch.tensor([0, 2, 4, 6, 8, -1, -3])
    image = torch.zeros(7, 3, 4, 4, dtype=torch.uint8)
    loader = [
        {"image": image[part], "label": labels[part], "index": index[part]}
        for part in (slice(0, 4), slice(4, 7))
    ]
    context = RunContext(Namespace(imagenet_default_mean_and_std=False), CPU, 0, 1)
    result = evaluate_classifier(Scripted(logits), loader, context)
    ranks = [(logits[i] > logits[i, labels[i]]).sum().item() for i in range(5)]
    assert result["acc1"] == pytest.approx(100 * sum(rank < 1 for rank in ranks) / 5)
    assert result["acc5"] == pytest.approx(100 * sum(rank < 5 for rank in ranks) / 5)
    assert result["loss"] == pytest.approx(F.cross_entropy(logits[:5], labels[:5]).item())


def test_tally_waits_for_no_device():
    """Without values on the meta device, a shape that depends on them raises: on a GPU it is a
    wait."""
    logits, labels, counts = (torch.empty(s, dtype=d, device="meta") for s, d in (
        ((5, 10), torch.float32), ((5,), torch.int64), ((5,), torch.bool)))  # fmt: skip
    assert tally(logits, labels, counts).shape == (4,)


def test_raw_views_are_only_moved():
    batch = {"image": torch.full((1, 3, 2, 2), 255, dtype=torch.uint8), "count": 3}
    moved = Normalize(MEAN_STD["inception"], CPU, raw=("image",))(batch)
    assert torch.equal(moved["image"], batch["image"]) and moved["count"] == 3


def test_a_task_needs_nothing_but_a_loss(tmp_path):
    """Everything else of the contract has a default: what is saved is the task, without an ema."""

    class Mean(Task):
        def __init__(self):
            super().__init__()
            self.level = nn.Parameter(torch.zeros(3))

        def forward(self, batch):
            return {"loss": (batch["image"].mean((2, 3)) - self.level).square().mean()}

    args = arguments("pretrain", tmp_path, "--epochs", "1")
    with own_signals():
        context = set_up(args)
        loader = build_data(args, build_method(args))
        task = Mean()
        run, position = start_training(context, task, loader, param_groups(task, 0.0))
        train(run, position, after_epoch=lambda position: {})
    saved = load_checkpoint(tmp_path / "checkpoint-0.pth")
    assert saved["model"].keys() == {"level"} and saved["model"]["level"].abs().sum() > 0
    assert saved["average"] is None


def test_normalize_is_the_published_one():
    batch = {
        "image": torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2).expand(1, 3, 1, 2),
        "index": 0,
    }
    moved = Normalize(MEAN_STD["imagenet"], CPU)(batch)
    assert moved.keys() == {"image"}
    low = [-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225]
    assert moved["image"][0, :, 0, 0].tolist() == pytest.approx(low)
    assert Normalize(MEAN_STD["inception"], CPU)(batch)["image"].unique().tolist() == [-1.0, 1.0]


# --------------------------------------------------------------------------------------------------
# DeepSpeed's configuration


def deepspeed_args(tmp_path, given: dict | None = None, *flags: str):
    extra = []
    if given is not None:
        file = tmp_path / "ds.json"
        file.write_text(json.dumps(given))
        extra = ["--deepspeed_config", str(file)]
    return arguments("pretrain", tmp_path, "--enable_deepspeed", *extra, *flags)


@pytest.mark.parametrize("clip", ["0.0", "0.7"])
@pytest.mark.parametrize("given", [None, {"zero_optimization": {"overlap_comm": False}}])
def test_clipping_is_always_written(tmp_path, clip, given):
    config = deepspeed_config(
        deepspeed_args(tmp_path, given, "--clip_grad", clip, "--zero_stage", "2")
    )
    assert config["gradient_clipping"] == float(clip)
    assert config["zero_optimization"]["stage"] == 2, (
        "a section without a stage must not fall back to stage 0"
    )


def test_configuration_follows_the_flags(tmp_path):
    config = deepspeed_config(
        deepspeed_args(tmp_path, None, "--update_freq", "3", "--zero_stage", "3")
    )
    assert (
        config["train_micro_batch_size_per_gpu"] == 8 and config["gradient_accumulation_steps"] == 3
    )
    assert config["zero_optimization"] == {"stage": 3} and config["gradient_clipping"] == 3.0
    assert not {"bf16", "fp16", "torch_autocast"} & config.keys()
    bf16 = deepspeed_config(deepspeed_args(tmp_path, None, "--precision", "bf16"))
    assert (
        bf16["torch_autocast"]["enabled"]
        and bf16["torch_autocast"]["dtype"] == "bfloat16"
        and "bf16" not in bf16
    )
    fp16 = deepspeed_config(deepspeed_args(tmp_path, None, "--precision", "fp16"))
    assert fp16["fp16"]["loss_scale"] == 0 and "torch_autocast" not in fp16


@pytest.mark.parametrize(
    ("parameters", "bucket"),
    [(22_000_000, 3 * 2**20), (86_000_000, 11 * 2**20), (5_000_000_000, 500_000_000)],
)
def test_buckets_follow_the_network(tmp_path, parameters, bucket):
    """Eight to a network, so that most of it is sent before backward ends; what the user's file
    says stays."""
    args = deepspeed_args(tmp_path, {"zero_optimization": {"allgather_bucket_size": 7}})
    args.device = "cuda"
    found = deepspeed_config(args, parameters)["zero_optimization"]
    assert found == {
        "stage": 1,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": 7,
        "overlap_comm": True,
    }


@pytest.mark.parametrize("place", ["flag", "file"])
def test_offload_lets_this_optimizer_through(tmp_path, place):
    """DeepSpeed refuses every optimizer but its own there, unless it is told not to."""
    given = (
        {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}} if place == "file" else None
    )
    args = deepspeed_args(tmp_path, given, *(("--offload", "optimizer") if place == "flag" else ()))
    config = deepspeed_config(args)
    assert config["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert config["zero_force_ds_cpu_optimizer"] is False
    assert "zero_force_ds_cpu_optimizer" not in deepspeed_config(deepspeed_args(tmp_path, None))


def test_compile_refuses_the_stage_of_the_file(tmp_path):
    args = deepspeed_args(tmp_path, {"zero_optimization": {"stage": 3}}, "--compile")
    with pytest.raises(ValueError, match="--compile does not work with ZeRO stage 3"):
        deepspeed_config(args)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"gradient_cliping": 1.0}, "gradient_cliping"),
        ({"bf16": {"enabled": True}, "zero_optimization": {"stage": 0}}, "stage 0"),
        (
            {"train_micro_batch_size_per_gpu": 16},
            "train_micro_batch_size_per_gpu 16, the flags say 8",
        ),
        ({"train_batch_size": 64}, "train_batch_size 64, the flags say 8"),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps 4, the flags say 1"),
        ({"gradient_clipping": 1.0}, "gradient_clipping 1.0, --clip_grad is 3.0"),
        ({"optimizer": {"type": "Adam"}}, "optimizer, which comes from the flags"),
        ({"torch_autocast": {"enabled": True, "dtype": "float16"}}, "section fp16"),
        ([], "one JSON object"),
    ],
)
def test_unusable_configuration_is_refused(tmp_path, given, says):
    with pytest.raises(ValueError, match=r"ds\.json.*") as caught:
        deepspeed_config(deepspeed_args(tmp_path, given))
    assert says in str(caught.value)


def test_half_written_configuration_is_refused(tmp_path):
    args = deepspeed_args(tmp_path, {})
    (tmp_path / "ds.json").write_text('{"bf16": ')
    with pytest.raises(ValueError, match=r"--deepspeed_config .*ds\.json is not JSON"):
        deepspeed_config(args)


# --------------------------------------------------------------------------------------------------
# Speed


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989), ("NVIDIA GH200 480GB", 989), ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312), ("NVIDIA L4", 121), ("NVIDIA L40", 181),
        ("NVIDIA L40S", 362), ("NVIDIA A10", 125), ("NVIDIA A10G", 70),
        ("Tesla V100-PCIE-16GB", 112), ("Tesla T4", 65), ("NVIDIA GeForce RTX 3090", 71),
        ("NVIDIA GeForce RTX 3090 Ti", None), ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A1000", None), ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
    ],
)  # fmt: skip
def test_peak_is_that_of_the_device_and_of_no_namesake(name, tflops):
    assert peak_tflops(name) == tflops


@pytest.mark.parametrize("network", [(), METHODS["a2mim_resnet"]], ids=["vit", "resnet"])
def test_recomputation_is_no_work_of_the_model(tmp_path, network):
    runs = [
        start("pretrain", tmp_path, *network, *flags)[0]
        for flags in ((), ("--grad_checkpointing",))
    ]
    plain, recomputing = (
        flops_per_image(run.task, run.loader.dataset, run.normalize) for run in runs
    )
    assert plain == recomputing > 0
    again = [
        module.grad_checkpointing
        for module in runs[1].task.modules()
        if hasattr(module, "grad_checkpointing")
    ]
    assert any(again), "the run itself no longer recomputes"


PAGE_FAULTS = """
import resource
import torch
from unimim.engine import monitor

def page_faults(tensors):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(tensors):
        torch.zeros(2**24)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

page_faults(5)
by_default = page_faults(5)
monitor.keep_freed_memory()
page_faults(20)  # until the heap has settled
print(by_default, page_faults(5))
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="another C library has no such setting"
)
def test_freed_memory_is_kept():
    """In a process of its own: the holes that other tests leave in the heap would be kept either
    way."""
    result = run_command([sys.executable, "-c", PAGE_FAULTS])
    assert result.returncode == 0, result.stdout
    by_default, kept = map(int, result.stdout.splitlines()[-1].split())
    huge_page = 2**21  # the largest that a kernel hands out unasked
    assert by_default >= 5 * 2**26 // huge_page
    assert kept < by_default / 10
