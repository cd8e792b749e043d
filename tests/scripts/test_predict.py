"""Classes of photographs from a tiny classifier: as evaluation sees them, named, in a CSV."""

import csv

import pytest
import torch
from helpers import arguments
from PIL import Image

from scripts import predict
from unimim.checkpoint.files import save_checkpoint
from unimim.cli.models import build_classifier
from unimim.cli.options import as_config
from unimim.data.sources import digits_source
from unimim.data.views import EvalTransform


@pytest.fixture
def classifier(tmp_path):
    args = arguments("finetune", tmp_path, "--imagenet_default_mean_and_std")
    args.rank, args.nb_classes = 0, 10
    model = build_classifier(args).eval()
    torch.nn.init.normal_(model.head.weight)
    save_checkpoint(
        tmp_path / "checkpoint-best.pth", {"model": model.state_dict(), "args": as_config(args)}
    )
    photos = tmp_path / "photos"
    (photos / "more").mkdir(parents=True)
    source = digits_source(train=False)
    for name, index in (("b.png", 0), ("a.png", 5), ("more/c.png", 9)):
        Image.fromarray(source.read(index)).save(photos / name)
    return model, tmp_path / "checkpoint-best.pth", photos


def predictions(text: str, photos) -> list[str]:
    """The lines with classes, without those of the log."""
    lines = [line for line in text.splitlines() if line.startswith(f"{photos}/")]
    return [line for line in lines if "cannot be read" not in line]


def run(*words: object) -> None:
    predict.main([str(word) for word in words])


def test_probabilities_are_those_of_the_model_on_the_images_of_evaluation(
    classifier, tmp_path, capsys
):
    model, path, photos = classifier
    run(
        "--checkpoint",
        path,
        photos,
        "--top_k",
        3,
        "--output",
        tmp_path / "out.csv",
        "--batch_size",
        2,
    )
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows[::3]] == [
        str(photos / n) for n in ("a.png", "b.png", "more/c.png")
    ]
    image = EvalTransform((16, 16), None)((photos / "a.png").read_bytes(), None)["image"] / 255
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
    expected = model(((image - mean) / std)[None]).softmax(-1)[0].topk(3)
    assert [int(row["index"]) for row in rows[:3]] == expected.indices.tolist()
    found = torch.tensor([float(row["probability"]) for row in rows[:3]])
    torch.testing.assert_close(found, expected.values, atol=1e-5, rtol=1e-4)
    shown = predictions(capsys.readouterr().out, photos)
    assert len(shown) == 3 and shown[0].startswith(f"{photos / 'a.png'}: {rows[0]['name']} ")


def test_classes_have_names(classifier, tmp_path, capsys):
    _, path, photos = classifier
    names = [f"digit {number}" for number in range(10)]
    (tmp_path / "names.txt").write_text("\n".join(names))
    run(
        "--checkpoint",
        path,
        photos / "a.png",
        "--top_k",
        10,
        "--class_names",
        tmp_path / "names.txt",
    )
    shown = capsys.readouterr().out
    assert all(name in shown for name in names)
    (tmp_path / "names.txt").write_text("one\ntwo\n")
    with pytest.raises(SystemExit, match="lists 2 classes, the checkpoint has 10"):
        run("--checkpoint", path, photos, "--class_names", tmp_path / "names.txt")


def test_broken_images_are_named_and_the_others_classified(classifier, capsys, caplog):
    _, path, photos = classifier
    (photos / "broken.png").write_bytes((photos / "a.png").read_bytes()[:60])
    run("--checkpoint", path, photos)
    streams = capsys.readouterr()
    assert len(predictions(streams.out, photos)) == 3
    assert f"{photos / 'broken.png'} cannot be read" in streams.out + streams.err + caplog.text
    with pytest.raises(SystemExit, match="none of the images can be read"):
        run("--checkpoint", path, photos / "broken.png")
    with pytest.raises(SystemExit, match=r"absent\.png does not exist"):
        run("--checkpoint", path, photos / "absent.png")


def test_a_file_without_a_head_is_refused(classifier, tmp_path):
    model, path, photos = classifier
    kept = {name: v for name, v in model.state_dict().items() if not name.startswith("head.")}
    args = predict.rebuild(path)[1]
    save_checkpoint(tmp_path / "headless.pth", {"model": kept, "args": as_config(args)})
    with pytest.raises(SystemExit, match=r"has no head\.weight"):
        run("--checkpoint", tmp_path / "headless.pth", photos)
