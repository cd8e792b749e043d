"""k-NN against brute force, also with ties; features and their cache; runs of run_knn.py on one and
two ranks."""

import csv
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import SIZE, TINY, in_ranks
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import run_knn
from modeling_finetune import create_model
from unimim.checkpoint.files import save_checkpoint, save_encoder
from unimim.engine.setup import launch, set_up
from unimim.evaluation import features as feature_rows
from unimim.evaluation import knn
from unimim.evaluation.features import Features, build_backbone, evaluation_images, extract
from unimim.evaluation.flags import parse_knn
from unimim.evaluation.knn import Accuracy, KnnRow, evaluate_knn

BASE = ["--model", "vit_tiny_patch16_224", *TINY, "--model_kwargs", *SIZE]


def parse(*flags: str):
    return parse_knn([*BASE, *flags])


def tied_features(count: int, classes: int, seed: int) -> Features:
    """Unit vectors of 16 numbers +-1/4, few of them different: similarities are exact, and most of
    them are tied."""
    rng = np.random.default_rng(seed)
    signs = np.sign(rng.standard_normal((6, 16)))
    vectors = torch.from_numpy(signs[rng.integers(6, size=count)] / 4).float()
    return Features(vectors, torch.from_numpy(rng.integers(classes, size=count)))


def brute_force(
    bank: Features, queries: Features, k: int, temperature: float, classes: int
) -> Accuracy:
    """Query by query: neighbors by (similarity, lower index), classes by (votes, lower class),
    none without votes."""
    firsts = []
    for query, label in zip(queries.vectors, queries.labels.tolist(), strict=True):
        similarity = [
            math.fsum((a * b for a, b in zip(query.tolist(), row, strict=True)))
            for row in bank.vectors.tolist()
        ]
        neighbors = sorted(range(len(bank)), key=lambda i: (-similarity[i], i))[:k]
        votes = dict.fromkeys(range(classes), 0.0)
        for i in neighbors:
            votes[int(bank.labels[i])] += math.exp(similarity[i] / temperature)
        order = sorted((c for c in votes if votes[c] > 0), key=lambda c: (-votes[c], c))
        firsts.append(order.index(label) if label in order else classes + 5)
    return Accuracy(
        k,
        temperature,
        *(100 * sum(first < top for first in firsts) / len(firsts) for top in (1, 5)),
    )


def close(ours: list[Accuracy], theirs: list[Accuracy]) -> bool:
    return [vars(a) for a in ours] == [pytest.approx(vars(b), rel=1e-12) for b in theirs]


# --------------------------------------------------------------------------------------------------
# The vote


@pytest.mark.parametrize("at_once", [2**26, 7 * 60], ids=["whole", "chunks"])
def test_ties_go_to_the_lower_index_and_the_lower_class(monkeypatch, at_once):
    monkeypatch.setattr(knn, "SIMILARITIES_AT_ONCE", at_once)
    bank, queries = tied_features(60, 8, seed=0), tied_features(41, 8, seed=1)
    ks, temperatures = [1, 3, 10, 60], [0.07, 1.0]
    expected = [brute_force(bank, queries, k, t, 8) for k in ks for t in temperatures]
    assert close(evaluate_knn(bank, queries, ks, temperatures, 8), expected)


def test_equals_brute_force_on_features_of_any_length():
    torch.manual_seed(0)
    features = [
        Features(torch.randn(n, 12) * torch.rand(n, 1) * 9, torch.randint(7, (n,)))
        for n in (80, 30)
    ]
    unit = [Features(F.normalize(f.vectors.double()), f.labels) for f in features]
    expected = [brute_force(*unit, k, 0.2, 7) for k in (20, 5)]  # not in ascending order
    assert close(evaluate_knn(*features, [20, 5], [0.2], 7), expected)


def test_a_low_temperature_is_the_nearest_neighbour():
    """exp(1 / T) itself would overflow."""
    bank, queries = tied_features(50, 6, seed=2), tied_features(20, 6, seed=3)
    torch.manual_seed(0)
    bank.vectors += 0.1 * torch.randn_like(bank.vectors)
    one, cold = evaluate_knn(bank, queries, [1, 30], [1e-4], 6)
    assert one.acc1 == cold.acc1


def test_a_class_without_votes_is_no_guess():
    """With one neighbor there is one guess, so top-5 is top-1."""
    bank, queries = tied_features(30, 10, seed=4), tied_features(30, 10, seed=5)
    (found,) = evaluate_knn(bank, queries, [1], [0.07], 10)
    assert found.acc5 == found.acc1 < 100


def test_ranks_answer_each_query_once():
    bank, queries = tied_features(60, 8, seed=0), tied_features(41, 8, seed=1)
    parts = [
        evaluate_knn(bank, Features(queries.vectors[r::3], queries.labels[r::3]), [5], [0.07], 8)
        for r in range(3)
    ]
    shared = [
        evaluate_knn(bank, queries, [5], [0.07], 8, rank=r, world_size=3) for r in range(3)
    ]  # without a group
    sizes = [len(queries.labels[r::3]) for r in range(3)]
    for part, share, size in zip(parts, shared, sizes, strict=True):
        assert part[0].acc1 * size == pytest.approx(share[0].acc1 * len(queries))


# --------------------------------------------------------------------------------------------------
# Features


def classifier_file(path: Path, pool: str, **more) -> str:
    """A classifier whose norms, like everything else, are not as initialized."""
    torch.manual_seed(3)
    options = {"input_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
    vit = create_model("vit_tiny_patch16_224", **options, global_pool=pool, num_classes=0)
    for parameter in vit.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    save_checkpoint(path, {"model": vit.state_dict() | more})
    return str(path)


def features_by_hand(file: str, pool: str, norm: str | None) -> torch.Tensor:
    """Of three images: tokens of the last block, normalized (with which norm, before or after
    pooling) and pooled."""
    state = torch.load(file)["model"]
    vit = build_backbone(parse("--finetune", file)).vit
    tokens = vit.forward_features(images())
    if norm == "norm":
        tokens = F.layer_norm(tokens, [32], state["norm.weight"], state["norm.bias"], eps=1e-6)
    vector = tokens[:, 0] if pool == "cls" else tokens[:, 1:].mean(1)
    if norm == "fc_norm":
        vector = F.layer_norm(
            vector, [32], state["fc_norm.weight"], state["fc_norm.bias"], eps=1e-6
        )
    return F.layer_norm(vector, [32], eps=1e-6) if norm == "plain" else vector


def images() -> torch.Tensor:
    return torch.linspace(-2, 2, 3 * 3 * 16 * 16).view(3, 3, 16, 16).sin()


@pytest.mark.parametrize(
    ("trained_with", "pool", "norm", "expected"),
    [
        ("token", "cls_token", "trained", "norm"),
        ("token", "global_pool", "trained", "norm"),
        ("avg", "global_pool", "trained", "fc_norm"),
        ("avg", "cls_token", "trained", None),
        ("token", "cls_token", "plain", "plain"),
        ("token", "global_pool", "plain", "plain"),
        ("token", "cls_token", "none", None),
        ("avg", "global_pool", "none", None),
    ],
)
def test_no_untrained_norm_is_used(tmp_path, trained_with, pool, norm, expected):
    file = classifier_file(tmp_path / "a.pth", trained_with)
    backbone = build_backbone(parse("--finetune", file, f"--{pool}", "--feature_norm", norm))
    short = {"cls_token": "cls", "global_pool": "avg"}[pool]
    torch.testing.assert_close(backbone(images()), features_by_hand(file, short, expected))
    assert not backbone.training and not any(p.requires_grad for p in backbone.parameters())


def test_a_checkpoint_with_a_gap_is_refused(tmp_path):
    file = classifier_file(tmp_path / "a.pth", "token")
    state = torch.load(file)["model"]
    del state["blocks.1.mlp.fc2.bias"]
    save_checkpoint(file, {"model": state})
    with pytest.raises(
        ValueError, match=r"100% are needed: the model has blocks\.1\.mlp\.fc2\.bias"
    ):
        build_backbone(parse("--finetune", file))


@pytest.mark.parametrize(
    ("method", "classifier"),
    [
        ("conmim_tiny_patch16_224", "beit_tiny_patch16_224"),
        ("mae_tiny_patch16_224", "vit_tiny_patch16_224"),
        ("semmae_tiny_patch16_224", "vit_tiny_patch16_224"),
    ],
)
@pytest.mark.parametrize("form", ["checkpoint.pth", "encoder.safetensors"])
def test_features_of_every_method(tmp_path, method, classifier, form):
    """The tokens of its encoder (ConMIM's teacher), all seen, behind its final norm."""
    torch.manual_seed(3)
    network = create_model(method, input_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2)
    for parameter in network.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    encoder, file = network.teacher or network, tmp_path / form
    if form == "checkpoint.pth":
        teacher = {"teacher": network.teacher.state_dict()} if network.teacher else {}
        save_checkpoint(file, {"model": network.state_dict(), **teacher})
    else:
        save_encoder(file, network.encoder_state_dict(), {"format": "timm"})
    with torch.no_grad():
        tokens = encoder.norm(encoder.eval().forward_features(images()))
    for flag, expected in (("--cls_token", tokens[:, 0]), ("--global_pool", tokens[:, 1:].mean(1))):
        backbone = build_backbone(parse("--model", classifier, "--finetune", str(file), flag))
        torch.testing.assert_close(backbone(images()), expected, rtol=1e-4, atol=1e-5)


def test_broken_images_have_no_features(tmp_path):
    for name in ("train", "val"):
        for number in range(6):
            path = tmp_path / name / f"class{number % 2}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((20, 20, 3), 40 * number, dtype=np.uint8)).save(path)
    (tmp_path / "val/class1/3.png").write_bytes(b"no image")
    args = parse("--data_set", "image_folder", "--data_path", str(tmp_path), "--batch_size", "4")
    context, backbone = set_up(args), build_backbone(args)
    dataset = evaluation_images(args, backbone, train=False)
    features = extract(context, dataset, backbone, "val")
    assert features.labels.tolist() == [0, 0, 0, 1, 1]
    pictures = [
        torch.from_numpy(np.full((3, 16, 16), 40 * n, dtype=np.uint8)) for n in (0, 2, 4, 1, 5)
    ]
    expected = backbone(context.normalize({"image": torch.stack(pictures)})["image"])
    torch.testing.assert_close(features.vectors, expected)
    # in the memory of the sums, where the broken image has a row
    assert features.vectors.untyped_storage().nbytes() == 4 * len(dataset) * backbone.dim


class Allocations(TorchDispatchMode):
    """Sizes in bytes of the memory that operators return and that they were not given."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        given = {storage.data_ptr() for storage in storages((args, kwargs))}
        self.sizes += [s.nbytes() for s in storages(found) if s.data_ptr() not in given]
        return found


def storages(values) -> list[torch.UntypedStorage]:
    return [v.untyped_storage() for v in tree_leaves(values) if isinstance(v, torch.Tensor)]


def test_means_need_no_second_copy_of_the_features(monkeypatch):
    """Rows in several chunks, with and without images, some of them seen twice."""
    monkeypatch.setattr(feature_rows, "CHUNK_ROWS", 16)
    sums = torch.randn(1000, 64)
    times = torch.randint(0, 3, (1000,)).float()
    expected = (sums / times[:, None])[times > 0]
    with Allocations() as made:
        means = feature_rows.means_in_place(sums, times)
    assert torch.equal(means, expected) and 0 < len(means) < 1000
    assert means.data_ptr() == sums.data_ptr()
    assert max(made.sizes) <= 16 * 64 * 4 < sums.nbytes / 10
    for value in (math.nan, math.inf):
        sums = torch.ones(40, 3)
        sums[20, 1] = value
        assert feature_rows.means_in_place(sums, torch.ones(40)) is None


# --------------------------------------------------------------------------------------------------
# Runs


def run_here(folder: Path, *flags: str) -> list[KnnRow]:
    return run_knn.main(parse("--knn_k", "5", "20", "--output_dir", str(folder), *flags))


def test_the_cache_gives_the_same_and_belongs_to_its_settings(tmp_path):
    file, cache = (
        classifier_file(tmp_path / "a.pth", "token"),
        ["--feature_cache", str(tmp_path / "cache")],
    )
    fresh = run_here(tmp_path / "a", "--finetune", file)
    assert run_here(tmp_path / "b", "--finetune", file, *cache) == fresh
    stored = torch.load(tmp_path / "cache/train.pth")
    stored["labels"] = stored["labels"].roll(1)  # to see whether it is read
    save_checkpoint(tmp_path / "cache/train.pth", stored)
    assert run_here(tmp_path / "c", "--finetune", file, *cache)[0].acc1 < fresh[0].acc1
    for name, value, says in (
        ("labels", stored["labels"][1:], "does not hold a vector and a label for each image"),
        ("vectors", stored["vectors"] * float("nan"), "holds features that are not finite"),
    ):
        save_checkpoint(tmp_path / "cache/train.pth", {**stored, name: value})
        with pytest.raises(ValueError, match=rf"--feature_cache: .*train\.pth {says}"):
            run_here(tmp_path / "d", "--finetune", file, *cache)
    other = classifier_file(tmp_path / "b.pth", "avg")
    save_checkpoint(tmp_path / "cache/train.pth", stored)
    for flags in (
        ["--global_pool"],
        ["--label_fraction", "0.5"],
        ["--crop_pct", "1"],
        ["--finetune", other],
    ):
        with pytest.raises(
            ValueError, match=r"--feature_cache: .*train\.pth holds features of another run"
        ):
            run_here(tmp_path / "d", "--finetune", file, *cache, *flags)


def test_the_table_holds_every_evaluation(tmp_path):
    results = run_here(tmp_path, "--temperature", "0.07", "0.5", "--label_fraction", "0.2")
    rows = list(csv.DictReader((tmp_path / "knn.csv").open()))
    assert [(row["k"], row["temperature"]) for row in rows] == [
        ("5", "0.07"),
        ("5", "0.5"),
        ("20", "0.07"),
        ("20", "0.5"),
    ]
    assert [float(row["acc1"]) for row in rows] == [result.acc1 for result in results]
    assert (
        rows[0]["pool"] == "cls"
        and int(rows[0]["val_images"]) == 355
        and int(rows[0]["train_images"]) < 300
    )


@pytest.mark.slow
def test_two_ranks_find_what_one_finds(tmp_path):
    """355 images of validation are an odd number: one rank's share is padded. What two cache, one
    can read."""
    cache = ("--feature_cache", str(tmp_path / "cache"))
    one = run_here(tmp_path / "one")
    two = in_ranks(2, run_here, tmp_path / "two", *cache)
    assert two[0] == two[1] == one == run_here(tmp_path / "read", *cache)
    assert (tmp_path / "two/knn.csv").read_text() == (tmp_path / "one/knn.csv").read_text()


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--knn_k 0", "--knn_k must be positive, not 0"),
        ("--knn_k 5000", "--knn_k 5000 is more than the 1442 training images"),
        ("--temperature 0", "--temperature must be positive, not 0.0"),
        ("--batch_size 0", "--batch_size must be at least 1, not 0"),
        ("--cls_token --global_pool", "--global_pool: not allowed with argument --cls_token"),
        ("--finetune nowhere.pth", "checkpoint nowhere.pth does not exist"),
        ("--nb_classes 3", "--nb_classes 3 is too few"),
        ("--model nope", "--model nope is unknown"),
        ("--model mae_tiny_patch16_224", "evaluated as --model vit_tiny_patch16_224"),
        ("--output_dir /proc/none", "--output_dir /proc/none is not a folder"),
        ("--knn 3", "did you mean --knn_k?"),
    ],
)
def test_mistake_is_named_in_one_line(capfd, flags, named):
    with pytest.raises(SystemExit):
        launch(run_knn.main, parse(*flags.split()))
    said = capfd.readouterr()
    lines = [line for line in (said.out + said.err).splitlines() if "error: " in line]
    assert len(lines) == 1 and named in lines[0]


def test_configuration_file_sets_the_pooling(tmp_path):
    (tmp_path / "run.yaml").write_text("pool: avg\nknn_k: [3]\n")
    args = parse("--config", str(tmp_path / "run.yaml"))
    assert args.pool == "avg" and args.knn_k == [3]
