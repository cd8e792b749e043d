"""run_tokenizer.py: what it learns, the file that it writes, and the methods that read it."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import SIZE, differing, in_ranks, own_signals, run_command, script, start
from safetensors.torch import load_file, save_file
from torch import Tensor

import modeling_pretrain  # noqa: F401  (registers the methods)
import run_tokenizer
from modeling_targets import ClusterTokenizer, VisualTokenizer, load_tokenizer
from unimim.checkpoint.files import load_checkpoint, load_metadata
from unimim.data.views import MEAN_STD
from unimim.tokenizer.clusters import first_centers, lloyd_step
from unimim.tokenizer.files import TokenizerInfo
from unimim.tokenizer.flags import parse_tokenizer
from unimim.tokenizer.learning import DiscreteVAE, divergence_from_uniform, perplexity
from unimim.tokenizer.training import build_vae, scored_images

TINY = [
    "--data_set", "digits", "--input_size", "16", "--patch_size", "4", "--vocab_size", "32",
    "--num_workers", "0", "--device", "cpu", "--batch_size", "64",
]  # fmt: skip
VAE = [
    *TINY, "--n_hid", "8", "--blocks_per_group", "1", "--epochs", "3", "--lr", "1e-2",
    "--kl_weight", "5e-3", "--save_ckpt_steps", "8",
]  # fmt: skip
KMEANS = [
    *TINY, "--kind", "kmeans", "--kmeans_patches", "2000", "--imagenet_default_mean_and_std",
]  # fmt: skip


def train(folder: Path, words: list[str]) -> Path:
    """Run the script in this process and return the file that it writes."""
    with own_signals():
        run_tokenizer.main(parse_tokenizer([*words, "--output_dir", str(folder)]))
    return folder / "tokenizer.safetensors"


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """A tokenizer of either kind, by its kind."""
    folder = tmp_path_factory.mktemp("tokenizers")
    return {
        "dvae": train(folder / "dvae", VAE),
        "kmeans": train(folder / "kmeans", KMEANS),
    }


def images() -> Tensor:
    return scored_images(parse_tokenizer([*TINY, "--dry_run"]))


# --------------------------------------------------------------------------------------------------
# The discrete VAE


def tiny_vae(**options) -> DiscreteVAE:
    torch.manual_seed(0)
    sizes = {"vocab_size": 12, "patch_size": 4, "n_hid": 8, "blocks_per_group": 1}
    schedules = {"tau": (1.0, 0.25), "tau_fraction": 0.5, "kl_weight": 0.1, "kl_fraction": 0.2}
    return DiscreteVAE(**sizes | schedules | options)


def test_loss_is_the_formula():
    """Gumbel noise is -log of an exponential variable; KL(q || uniform) is sum q log(V q)."""
    vae = tiny_vae()
    vae.after_step(0.3)
    batch = {"image": images()[:4]}
    torch.manual_seed(7)
    out = vae(batch)
    logits = vae.logits(batch["image"])
    torch.manual_seed(7)
    noise = -torch.empty_like(logits).exponential_().log()
    scores = ((logits + noise) / vae.tau).exp()
    painted = vae.decoder(scores / scores.sum(1, keepdim=True))
    error = ((painted - 0.1) / 0.8 - batch["image"] / 255).square().mean()
    q = logits.exp() / logits.exp().sum(1, keepdim=True)
    kl = (q * (12 * q).log()).sum(1).mean()
    torch.testing.assert_close(out["mse"], error)
    torch.testing.assert_close(out["kl"], kl)
    torch.testing.assert_close(out["loss"], error + 0.1 * kl)
    assert divergence_from_uniform(torch.zeros(1, 12, 2, 2)).abs() < 1e-6
    one = F.one_hot(torch.zeros(1, 2, 2, dtype=torch.long), 12).permute(0, 3, 1, 2) * 100.0
    torch.testing.assert_close(divergence_from_uniform(one), torch.tensor(math.log(12)))


def test_schedules_begin_and_end_where_the_flags_say():
    vae = tiny_vae()
    seen = []
    for progress in (0.0, 0.1, 0.25, 0.5, 0.9):
        vae.after_step(progress)
        seen.append((vae.tau, vae.kl_weight))
    assert [tau for tau, _ in seen] == pytest.approx([1.0, 0.92838, 0.625, 0.25, 0.25], abs=1e-5)
    assert [weight for _, weight in seen] == pytest.approx([0.0, 0.05, 0.1, 0.1, 0.1])


def test_perplexity_counts_tokens_in_use():
    assert perplexity(torch.tensor([5.0, 5.0, 0.0, 5.0])).item() == pytest.approx(3)
    assert perplexity(torch.tensor([0.0, 9.0])).item() == pytest.approx(1)


def test_reconstruction_improves(files):
    lines = (files["dvae"].parent / "log.txt").read_text().splitlines()
    first, *_, last = (json.loads(line) for line in lines)
    assert last["train_mse"] < 0.75 * first["train_mse"]
    assert last["hard_mse"] < 0.75 * first["hard_mse"]
    assert last["used_tokens"] >= last["hard_perplexity"] > 2


def test_file_gives_the_tokens_of_the_trained_network(files):
    tokenizer = load_tokenizer(str(files["dvae"]))
    vae = build_vae(parse_tokenizer([*VAE, "--dry_run"])).eval()
    vae.load_state_dict(load_checkpoint(files["dvae"].parent / "checkpoint-2.pth")["model"])
    with torch.no_grad():
        expected = vae.tokens(images())
    assert isinstance(tokenizer, VisualTokenizer) and len(expected.unique()) > 1
    assert torch.equal(tokenizer(images()), expected)
    positions = torch.tensor([[3, 15, 0]]).expand(len(expected), -1)
    assert torch.equal(tokenizer(images(), positions), expected.gather(1, positions))
    assert (tokenizer.vocab_size, tokenizer.patch, tokenizer.grid) == (32, (4, 4), (4, 4))
    info = TokenizerInfo.from_metadata(load_metadata(files["dvae"]))
    pixel = (1.0 - info.mean[0]) / info.std[0], (0.0 - info.mean[0]) / info.std[0]
    assert info.kind == "dvae" and pixel == pytest.approx((0.9, 0.1))


def test_run_resumes_bit_exactly(files, tmp_path):
    """From a checkpoint in mid-epoch, as a stopped run leaves it."""
    whole = files["dvae"].parent
    shutil.copy(whole / "checkpoint-1-8.pth", tmp_path)
    lines = (whole / "log.txt").read_text().splitlines(keepends=True)
    (tmp_path / "log.txt").write_text(lines[0])
    resumed = train(tmp_path, VAE)
    states = [load_checkpoint(folder / "checkpoint-2.pth") for folder in (whole, tmp_path)]
    for state in states:
        del state["args"]["output_dir"]
    assert differing(*states) == []
    assert (tmp_path / "log.txt").read_text() == (whole / "log.txt").read_text()
    assert resumed.read_bytes() == files["dvae"].read_bytes()


# --------------------------------------------------------------------------------------------------
# Clusters


def patches_of(pictures: Tensor) -> Tensor:
    """Normalized patches [B, 16, 48] of uint8 images of 16 pixels."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in MEAN_STD["imagenet"])
    normalized = (pictures / 255 - mean) / std
    cut = normalized.unflatten(3, (4, 4)).unflatten(2, (4, 4))  # [B, 3, rows, 4, columns, 4]
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def test_tokens_of_clusters_are_the_nearest_centers(files):
    tokenizer = load_tokenizer(str(files["kmeans"]))
    assert isinstance(tokenizer, ClusterTokenizer)
    distances = torch.cdist(patches_of(images()).double(), tokenizer.encoder.centers.double())
    found = tokenizer(images())
    assert len(found.unique()) > 16
    chosen = distances.gather(2, found[..., None])[..., 0]
    torch.testing.assert_close(chosen, distances.amin(2), rtol=0, atol=1e-3)
    assert (found == distances.argmin(2)).float().mean() > 0.999
    positions = torch.tensor([[3, 15, 0]]).expand(len(found), -1)
    assert torch.equal(tokenizer(images(), positions), found.gather(1, positions))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tokenizer(images()), found)


def test_tokens_of_a_teachers_clusters_are_the_nearest_centers_of_its_features(tmp_path):
    torch.manual_seed(0)
    vit = timm.models.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=64, depth=1, num_heads=1, num_classes=0
    )
    torch.save(vit.state_dict(), tmp_path / "dino.pth")
    teacher = ["--kmeans_teacher", str(tmp_path / "dino.pth")]
    path = train(tmp_path, [*KMEANS, *teacher, "--kmeans_iterations", "4"])
    lines = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    losses = [line["train_loss"] for line in lines]
    assert losses == sorted(losses, reverse=True) and "hard_mse" not in lines[0]
    tokenizer = load_tokenizer(str(path))
    assert tokenizer.encoder.centers.shape == (32, 64) and tokenizer.grid == (4, 4)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in MEAN_STD["imagenet"])
    with torch.no_grad():
        features = vit.eval().forward_features((images() / 255 - mean) / std)[:, 1:]
    distances = torch.cdist(F.normalize(features, dim=-1), tokenizer.encoder.centers)
    found = tokenizer(images())
    assert (found == distances.argmin(2)).float().mean() > 0.99
    positions = torch.tensor([[3, 15, 0]]).expand(len(found), -1)
    assert torch.equal(tokenizer(images(), positions), found.gather(1, positions))


def test_clustering_lowers_the_error_and_repeats_itself(files, tmp_path):
    log = files["kmeans"].parent / "log.txt"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    losses = [line["train_loss"] for line in lines]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.8 * losses[0]
    assert lines[-1]["hard_mse"] < 0.9 * lines[0]["hard_mse"]
    assert 32 >= lines[-1]["used_tokens"] >= lines[-1]["hard_perplexity"] > 8
    again = train(tmp_path, KMEANS)
    assert again.read_bytes() == files["kmeans"].read_bytes()
    assert (tmp_path / "log.txt").read_text() == log.read_text()


def test_first_centers_differ_and_a_center_without_patches_stays():
    patches = torch.tensor([[1.0, 1], [1, 1], [5, 5], [1, 1], [2, 2], [9, 9]])
    centers = first_centers(patches, 3)
    assert centers.tolist() == [[1, 1], [5, 5], [2, 2]]
    moved, sizes = lloyd_step(patches[:4], centers)
    assert moved.tolist() == [[1, 1], [5, 5], [2, 2]] and sizes.tolist() == [3, 1, 0]
    with pytest.raises(ValueError, match="4 different patches are too few for 5 visual tokens"):
        first_centers(patches, 5)


def both_kinds(folder: Path) -> list[bytes]:
    epochs = ["--epochs", "1", "--save_ckpt_steps", "0"]
    paths = [train(folder / "dvae", [*VAE, *epochs]), train(folder / "kmeans", KMEANS)]
    torch.distributed.barrier()
    return [path.read_bytes() for path in paths]


@pytest.mark.slow
def test_two_processes_make_one_tokenizer(files, tmp_path):
    """Centers are the means of the patches of both, so that the error is that of one process."""
    ours, theirs = in_ranks(2, both_kinds, tmp_path)
    assert ours == theirs
    assert load_tokenizer(str(tmp_path / "dvae/tokenizer.safetensors")).vocab_size == 32
    losses = []
    for folder in (tmp_path / "kmeans", files["kmeans"].parent):
        lines = (folder / "log.txt").read_text().splitlines()
        losses.append(json.loads(lines[-1])["train_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=0.1)


# --------------------------------------------------------------------------------------------------
# Pre-training


def beit(tokenizer: Path, *flags: str, vocab_size: int = 32) -> list[str]:
    model = ["--model", "beit_tiny_patch16_224_8k_vocab", "--mask_type", "block"]
    path = ["--discrete_vae_weight_path", str(tokenizer)]
    return [*model, *path, *flags, "--model_kwargs", *SIZE, f"vocab_size={vocab_size}"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dvae", "kmeans"])
def test_beit_learns_from_either_file(files, tmp_path, kind):
    command = script(
        "pretrain", tmp_path, *beit(files[kind], "--epochs", "1", "--batch_size", "16")
    )
    result = run_command(command)
    assert result.returncode == 0, result.stdout
    (line,) = (tmp_path / "log.txt").read_text().splitlines()
    means = json.loads(line)
    assert means["train_loss"] < math.log(32) and means["train_mlm_acc"] > 3 / 32


@pytest.mark.parametrize("kind", ["dvae", "kmeans"])
def test_methods_ask_for_images_that_give_a_token_for_each_patch(files, tmp_path, kind):
    run, _ = start("pretrain", tmp_path, *beit(files[kind]))
    batch = next(iter(run.loader))
    assert batch["image_second"].shape[1:] == (3, 16, 16)
    expected = load_tokenizer(str(files[kind]))(batch["image_second"])
    positions = torch.arange(16).expand(len(expected), -1)
    assert torch.equal(run.task.target.of(run.prepare(batch), positions), expected)


# --------------------------------------------------------------------------------------------------
# What is refused


def rewritten(source: Path, target: Path, **changes: Any) -> Path:
    """Copy a tokenizer with other metadata; None leaves one out."""
    held = json.loads(load_metadata(source)["tokenizer"]) | changes
    kept = {name: value for name, value in held.items() if value is not None}
    save_file(load_file(source), target, {"tokenizer": json.dumps(kept)})
    return target


@pytest.mark.parametrize("kind", ["dvae", "kmeans"])
def test_another_vocabulary_or_grid_is_refused(files, tmp_path, kind):
    with pytest.raises(
        ValueError, match=r"has 32 visual tokens, the model 64; use .*vocab_size=32"
    ):
        start("pretrain", tmp_path, *beit(files[kind], vocab_size=64))
    message = r"was trained for 4 x 4 visual tokens of an image, the model has 8 x 8 patches"
    with pytest.raises(ValueError, match=message):
        start("pretrain", tmp_path, *beit(files[kind], "--input_size", "32"))


def test_files_of_another_kind_are_refused(files, tmp_path):
    path = rewritten(files["kmeans"], tmp_path / "a.safetensors", kind="gan")
    with pytest.raises(ValueError, match="is no tokenizer: is of kind gan; use one of dvae, kmean"):
        load_tokenizer(str(path))
    path = rewritten(files["kmeans"], tmp_path / "b.safetensors", std=None)
    with pytest.raises(ValueError, match="is no tokenizer: has metadata that cannot be read"):
        load_tokenizer(str(path))
    path = rewritten(files["kmeans"], tmp_path / "c.safetensors", patch_size=[2, 2])
    with pytest.raises(ValueError, match=r"is not whole: its centers have the shape \(32, 48\)"):
        load_tokenizer(str(path))
    with pytest.raises(ValueError, match=r"holds no encoder of DALL-E: .* use OpenAI's encoder"):
        load_tokenizer(str(files["dvae"].parent / "checkpoint-2.pth"))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--patch_size", "3", "--input_size", "15"), "--patch_size 3 is not a power of 2"),
        (("--patch_size", "5"), "--input_size 16 is not a multiple of --patch_size 5"),
        (("--tau_end", "2"), "--tau_end 2.0 must be positive and at most --tau_start 1.0"),
        (("--n_hid", "6"), "--n_hid 6 is not a multiple of 4"),
        (("--kind", "kmeans", "--kmeans_patches", "9"), "9 are too few for --vocab_size 32"),
        ((), "--output_dir is not set; the tokenizer is written there"),
    ],
)
def test_flags_that_cannot_work_are_refused(flags, said, capsys):
    with pytest.raises(SystemExit):
        parse_tokenizer([*TINY, *flags])
    assert said in capsys.readouterr().err
