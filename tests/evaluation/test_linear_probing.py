"""Linear probing: the head, its crops, heads trained side by side, and whole runs on one and two
ranks."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from helpers import SIZE, TINY, differing, in_ranks, own_signals

import run_linear_probing
from datasets import TrainBatchSampler
from optim_factory import cosine_at
from unimim.data.crops import draw_clipped_crop, draw_short_side_crop
from unimim.data.views import ProbeTransform
from unimim.engine.setup import launch, set_up
from unimim.evaluation.features import build_backbone, evaluation_images, extract
from unimim.evaluation.flags import parse_linear
from unimim.evaluation.linear_probe import LinearHead
from unimim.evaluation.probing import ProbeRow

BASE = [
    *("--model", "vit_tiny_patch16_224", *TINY, "--model_kwargs", *SIZE),
    *("--batch_size", "128", "--epochs", "3", "--warmup_epochs", "1", "--blr", "0.6"),
]
SWEEP = ("--lr_sweep", "0.1", "1.0", "0.3")


def parse(folder: Path | str, *flags: str):
    return parse_linear([*BASE, "--output_dir", str(folder), *flags])


def run_here(folder: Path, *flags: str) -> list[ProbeRow]:
    with own_signals():
        return run_linear_probing.main(parse(folder, *flags))


def heads_of(folder: Path, stem: str = "checkpoint-2") -> dict[str, torch.Tensor]:
    return torch.load(folder / f"{stem}.pth")["model"]


# --------------------------------------------------------------------------------------------------
# The head


def test_the_head_by_hand():
    torch.manual_seed(0)
    head, x = LinearHead(300, 200), 3 * torch.randn(50, 300) + 1
    assert list(head.state_dict()) == [
        *("0.running_mean", "0.running_var", "0.num_batches_tracked"), "1.weight", "1.bias",
    ]  # fmt: skip
    assert head[1].weight.std().item() == pytest.approx(0.01, rel=0.02) and not head[1].bias.any()
    mean, var = x.mean(0), x.var(0, unbiased=False)
    expected = (x - mean) / (var + 1e-6).sqrt() @ head[1].weight.T
    torch.testing.assert_close(head(x), expected)
    running_mean, running_var = 0.1 * mean, 0.9 + 0.1 * x.var(0)
    expected = (x - running_mean) / (running_var + 1e-6).sqrt() @ head[1].weight.T
    torch.testing.assert_close(head.eval()(x), expected)
    plain = LinearHead(300, 200, batch_norm=False)
    assert list(plain.state_dict()) == ["1.weight", "1.bias"]
    torch.testing.assert_close(plain(x), x @ plain[1].weight.T)


# --------------------------------------------------------------------------------------------------
# Views


def test_crops_are_drawn_once_and_cut_to_the_image():
    rng = np.random.default_rng(0)
    boxes = np.array([draw_clipped_crop(rng, (400, 90), (0.08, 1.0)) for _ in range(4000)])
    top, left, height, width = boxes.T
    assert (
        (top + height <= 400).all()
        and (left + width <= 90).all()
        and min(top.min(), left.min()) == 0
    )
    narrow = width < 90
    # a square-like crop of more than a quarter of so tall a picture is too wide: its width is cut,
    # its height stays
    assert 0.7 < (~narrow).mean() < 0.9
    assert height[~narrow].max() == pytest.approx(np.sqrt(400 * 90 * 4 / 3), abs=2)
    shares = height * width / (400 * 90)
    assert shares[narrow].min() == pytest.approx(0.08, abs=0.005)
    ratios = np.log(width / height)[narrow]
    assert ratios.min() > np.log(3 / 4) - 0.03 and ratios.max() < np.log(4 / 3) + 0.03


def test_square_crops_have_uniform_areas():
    rng = np.random.default_rng(1)
    boxes = np.array([draw_clipped_crop(rng, (500, 500), (0.08, 0.7)) for _ in range(4000)])
    shares = np.sort(boxes[:, 2] * boxes[:, 3] / 500**2)
    assert np.abs(shares - np.linspace(0.08, 0.7, 4000)).max() < 0.03


@pytest.mark.parametrize(
    ("target", "sides"), [((16, 16), (30, 30)), ((16, 24), (20, 30)), ((24, 8), (40, 13))]
)
def test_crops_of_the_short_side(target, sides):
    rng = np.random.default_rng(2)
    boxes = np.array([draw_short_side_crop(rng, (40, 30), (0.08, 1.0), target) for _ in range(400)])
    assert (boxes[:, 2:] == sides).all()
    for start, side, length in zip(boxes[:, :2].T, sides, (40, 30), strict=True):
        assert sorted(set(start)) == list(range(length - side + 1))
    picture = np.arange(40 * 30 * 3, dtype=np.uint8).reshape(40, 30, 3)
    view = ProbeTransform((30, 30), crop="short_side")(picture, np.random.default_rng(3))[
        "image"
    ].permute(1, 2, 0)
    assert any(torch.equal(view, torch.from_numpy(turned[top : top + 30].copy()))
               for turned in (picture, picture[:, ::-1]) for top in range(11))  # fmt: skip


def test_views_follow_from_the_generator():
    picture = np.random.default_rng(0).integers(256, size=(40, 30, 3), dtype=np.uint8)
    transform = ProbeTransform((16, 24), crop_scale=(1.0, 1.0))
    views = [transform(picture, np.random.default_rng(seed))["image"] for seed in (0, 0, 1)]
    assert views[0].shape == (3, 16, 24) and views[0].dtype == torch.uint8
    assert torch.equal(views[0], views[1]) and not torch.equal(views[0], views[2])


# --------------------------------------------------------------------------------------------------
# Runs


def test_heads_side_by_side_are_those_of_separate_runs(tmp_path):
    together = run_here(tmp_path / "sweep", *SWEEP)
    heads = heads_of(tmp_path / "sweep")
    for number, (rate, head) in enumerate((("0.1", "lr_0p1"), ("0.3", "lr_0p3"), ("1.0", "lr_1"))):
        (alone,) = run_here(tmp_path / rate, "--lr", rate)
        for name, value in heads_of(tmp_path / rate).items():
            torch.testing.assert_close(
                heads[name.replace("head", head)], value, rtol=1e-6, atol=1e-7
            )
        assert together[number].lr == alone.lr == float(rate)
        assert (
            together[number].loss == pytest.approx(alone.loss, rel=1e-6)
            and together[number].acc1 == alone.acc1
        )
    rows = list(csv.DictReader((tmp_path / "sweep/linear.csv").open()))
    assert [(float(row["lr"]), float(row["acc1"]), row["epoch"]) for row in rows] == [
        (r.lr, r.acc1, "2") for r in together
    ]


@pytest.mark.parametrize("opt", ["momentum", "lars"])
def test_without_augmentation_it_is_plain_training_on_features(tmp_path, opt):
    """Against a loop by hand: MAE's schedule, torch's SGD or the LARS of the reference cases, no
    decay."""
    flags = ("--no_aug", "--global_pool", "--opt", opt, "--momentum", "0.8")
    (result,) = run_here(tmp_path, *flags)
    args = parse("", *flags)
    context, backbone = set_up(args), build_backbone(args)
    train, val = (
        extract(context, evaluation_images(args, backbone, train=is_train), backbone, "")
        for is_train in (True, False)
    )
    torch.manual_seed(0)
    head = LinearHead(32, 10)
    sampler, momenta = (
        TrainBatchSampler(len(train), 128),
        {p: torch.zeros_like(p) for p in head.parameters()},
    )
    steps = len(sampler)
    for step in range(3 * steps):
        if step % steps == 0:
            sampler.set_position(step // steps)
            batches = iter(sampler)
        rows = [index for _, index in next(batches)]
        head.zero_grad()
        F.cross_entropy(head(train.vectors[rows]), train.labels[rows]).backward()
        rate = float(cosine_at(np.array(step / steps), 0.6 * 128 / 256, 0.0, 3, 1))
        for parameter, momentum in momenta.items():
            trust = 1.0
            if opt == "lars" and parameter.ndim > 1:
                trust = 1e-3 * parameter.norm() / parameter.grad.norm()
            momentum.mul_(0.8).add_(parameter.grad * trust)
            parameter.data -= rate * momentum
    saved = heads_of(tmp_path)
    for name, value in head.state_dict().items():
        torch.testing.assert_close(saved[f"head.{name}"], value, rtol=1e-4, atol=1e-6)
    right = head.eval()(val.vectors).argmax(1) == val.labels
    assert result.acc1 == pytest.approx(100 * right.double().mean().item())


def test_cached_features_train_the_same_heads(tmp_path):
    flags = ("--no_aug", *SWEEP)
    cache = ("--feature_cache", str(tmp_path / "cache"))
    run_here(tmp_path / "a", *flags)
    run_here(tmp_path / "b", *flags, *cache)
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["train.pth", "val.pth"]
    run_here(tmp_path / "c", *flags, *cache)
    assert differing(heads_of(tmp_path / "a"), heads_of(tmp_path / "b")) == []
    assert differing(heads_of(tmp_path / "a"), heads_of(tmp_path / "c")) == []


@pytest.mark.parametrize("kept", ["checkpoint-0", "checkpoint-1-7"])
def test_a_resumed_run_ends_as_the_whole_one(tmp_path, kept):
    flags = (*SWEEP, "--save_ckpt_freq", "1", "--save_ckpt_steps", "7")
    whole = run_here(tmp_path, *flags)
    state = torch.load(tmp_path / "checkpoint-2.pth")
    assert {name.split(".")[0] for name in state["model"]} == {
        "lr_0p1",
        "lr_0p3",
        "lr_1",
    }  # no backbone
    for path in tmp_path.glob("checkpoint-*.pth"):
        if path.stem != kept:
            path.unlink()
    again = run_here(tmp_path, *flags)
    assert again == whole
    for key in ("model", "optimizer", "best"):
        assert differing(state[key], torch.load(tmp_path / "checkpoint-2.pth")[key], key) == []


def test_a_finished_run_and_eval_say_the_same(tmp_path):
    results = run_here(tmp_path, *SWEEP)
    assert run_here(tmp_path, *SWEEP) == results  # nothing left to train
    assert (
        run_here(
            tmp_path / "other", *SWEEP, "--eval", "--resume", str(tmp_path / "checkpoint-2.pth")
        )
        == results
    )
    with pytest.raises(ValueError, match="does not fit the model"):
        run_here(
            tmp_path / "other",
            "--lr",
            "0.1",
            "--eval",
            "--resume",
            str(tmp_path / "checkpoint-2.pth"),
        )


def test_saved_configuration_gives_the_same_run(tmp_path):
    args = parse(tmp_path, *SWEEP, "--global_pool", "--dry_run")
    with own_signals():
        run_linear_probing.main(args)
        again = parse_linear(["--config", str(tmp_path / "config.yaml"), "--dry_run"])
        saved = yaml.safe_load((tmp_path / "config.yaml").read_text())
        run_linear_probing.main(again)
    assert saved["pool"] == "avg" and saved["lr"] == 1.0
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == saved


# --------------------------------------------------------------------------------------------------
# Ranks


@pytest.mark.slow
@pytest.mark.parametrize(
    ("zero_stage", "opt", "more"),
    [
        (None, "momentum", ()),
        ("0", "lars", ()),
        ("3", "momentum", ("--no_batch_norm", "--lr_sweep", "0.01", "0.03")),
    ],
)
def test_two_ranks_train_and_evaluate_as_one(tmp_path, zero_stage, opt, more):
    """One process that accumulates the ranks' batches; 355 images of validation cannot be
    halved."""
    flags = ("--batch_size", "64", *SWEEP, "--no_auto_resume", "--opt", opt, *more)
    engine = ("--enable_deepspeed", "--zero_stage", zero_stage) if zero_stage else ()
    run_here(tmp_path / "one", *flags, "--update_freq", "2")
    first, second = in_ranks(2, run_here, tmp_path / "two", *flags, *engine)
    assert first == second
    alone, heads = heads_of(tmp_path / "one"), heads_of(tmp_path / "two")
    for name in (name for name in alone if name.endswith(("weight", "bias"))):
        torch.testing.assert_close(heads[name], alone[name], rtol=1e-5, atol=1e-6)
    # the checkpoint has rank 0's statistics: with others on rank 1 its half of the images would
    # score otherwise
    saved = str(tmp_path / "two" / "checkpoint-2.pth")
    single = run_here(tmp_path / "check", *SWEEP, *more, "--eval", "--resume", saved)
    for ours, theirs in zip(single, first, strict=True):
        assert (ours.acc1, ours.acc5) == (theirs.acc1, theirs.acc5)
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-6)


# --------------------------------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--lr_sweep 0.1 0", "--lr_sweep takes different positive learning rates"),
        ("--lr_sweep 0.1 0.1", "--lr_sweep takes different positive learning rates"),
        ("--lr_sweep 0.1 0.3 --lr 2", "--lr_sweep [0.1, 0.3] says every lr: leave --lr 2 out"),
        (
            "--lr_sweep 0.1 0.3 --clip_grad 3",
            "--clip_grad would clip the heads of --lr_sweep together",
        ),
        ("--crop_scale 0.5 0.2", "--crop_scale 0.5 0.2 must be the smallest"),
        (
            "--feature_cache out",
            "--feature_cache holds features of images without augmentation: give --no_aug too",
        ),
        ("--eval", "--eval needs a checkpoint: --resume FILE"),
        ("--nb_classes 3", "--nb_classes 3 is too few"),
        ("--epochs 0", "--epochs must be at least 1"),
        ("--batch_size 5000", "--batch_size"),
        ("--opt lars --enable_deepspeed", "--opt lars needs whole matrices: use --zero_stage 0"),
        ("--opt nope", "--opt nope is unknown"),
        ("--finetune nowhere.pth", "checkpoint nowhere.pth does not exist"),
        ("--warmup_epochs 3", "--warmup_epochs 3 leaves nothing of --epochs 3"),
        ("--cls_token --global_pool", "--global_pool: not allowed with argument --cls_token"),
    ],
)
def test_mistake_is_named_in_one_line(tmp_path, capfd, flags, named):
    with own_signals(), pytest.raises(SystemExit):
        launch(run_linear_probing.main, parse(tmp_path, *flags.split()))
    said = capfd.readouterr()
    lines = [line for line in (said.out + said.err).splitlines() if "error: " in line]
    assert len(lines) == 1 and named in lines[0]
