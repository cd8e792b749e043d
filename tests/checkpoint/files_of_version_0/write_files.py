"""Wrote the files of this folder, run in a checkout of commit 07c2547 with its tests/ on the path:
one training checkpoint of each kind, an encoder, part maps in their three forms, cached features.

The test beside this folder shows that today's code takes them. `expected.json` holds each run's
flags and what its next steps gave. Not to be run again: the files' age is their purpose.

    PYTHONPATH=.:tests python write_files.py FOLDER
"""

import io
import json
import os
import random
import shutil
import sys
import zipfile
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"

import numpy as np
import torch
from helpers import FINETUNE, PRETRAIN, TINY, in_ranks, start, train_steps
from part_maps import PartMaps
from PIL import Image

import run_knn
import run_linear_probing
import run_part_learning

SIZE = ["embed_dim=8", "depth=2", "num_heads=2"]
RUNS = {
    "pretraining": (
        "pretrain",
        [*PRETRAIN, "--model_kwargs", *SIZE, "projector_hidden_dim=8", "projector_out_dim=8"],
    ),
    "finetuning": (
        "finetune",
        [
            *(*FINETUNE, "--model_kwargs", *SIZE, "init_scale=1.0", "--model_ema"),
            *("--model_ema_decay", "0.9", "--mixup", "0.8", "--drop_path", "0.1"),
        ],
    ),
}
RUNS["deepspeed"] = ("pretrain", [*RUNS["pretraining"][1], "--enable_deepspeed"])
RUNS["deepspeed"][1].extend(["--zero_stage", "1"])
EVALUATED = ["--model", "beit_tiny_patch16_224", *TINY, "--model_kwargs", *SIZE]
PARTS = ["--input_size", "16", "--data_set", "digits", "--num_workers", "0", "--device", "cpu"]
PARTS += ["--num_parts", "3", "--decoder_widths", "8", "8", "--batch_size", "128", "--epochs", "2"]


def training(folder: Path, stage: str, flags: list[str]) -> list[dict]:
    """A checkpoint after three steps, and the metrics of the next three."""
    run, position = start(stage, folder, *flags)
    train_steps(run, 0, 3)
    position.step = 3
    run.session.save(position, finished=False)
    return train_steps(run, 3, 6)


def sharded(folder: Path, stage: str, flags: list[str]) -> list[dict]:
    torch.manual_seed(0)
    return training(folder, stage, flags)


def last_line(folder: Path) -> dict:
    """The log of the last of two epochs; of the checkpoints the first is kept."""
    lines = (folder / "log.txt").read_text().splitlines()
    for path in folder.iterdir():
        if path.name != "checkpoint-0.pth":
            path.unlink()
    return json.loads(lines[-1])


def write_pngs(array: Path, folder: Path) -> None:
    """The maps of an array as PNGs, in a folder and in a zip."""
    maps = PartMaps.open(array)
    meta = {"num_parts": maps.num_parts, "grid": list(maps.grid), "num_images": 5}
    files = {"parts_meta.json": json.dumps(meta).encode()}
    for index in range(5):
        content = io.BytesIO()
        Image.fromarray(maps.read(index)).save(content, "PNG")
        files[f"class0/{index}.png"] = content.getvalue()
    with zipfile.ZipFile(folder / "parts.zip", "w") as file:
        for name, content in files.items():
            file.writestr(name, content)
            path = folder / "parts_folder" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def main(folder: Path) -> None:
    expected = {}
    for name, (stage, flags) in RUNS.items():
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        if name == "deepspeed":
            (steps,) = in_ranks(1, sharded, folder / name, stage, flags)
            for extra in ("result-0.pt", "zero_to_fp32.py", "zero_to_torch.py"):
                (folder / name / extra).unlink()
        else:
            steps = training(folder / name, stage, flags)
        expected[name] = {"flags": flags, "next": steps}
    encoder = folder / "pretraining" / "encoder-0-3.safetensors"

    flags = [*EVALUATED, "--finetune", str(encoder), "--output_dir", str(folder / "knn")]
    flags += ["--feature_cache", str(folder / "features"), "--knn_k", "5"]
    found = run_knn.main(run_knn.parse(flags))
    shutil.rmtree(folder / "knn")
    expected["knn"] = {"flags": flags[: flags.index("--finetune")], "acc1": found[0].acc1}

    flags = [*EVALUATED, "--batch_size", "128", "--epochs", "2", "--warmup_epochs", "0"]
    flags += ["--lr_sweep", "0.1", "1.0", "--save_ckpt_freq", "1"]
    there = ["--finetune", str(encoder), "--output_dir", str(folder / "probing")]
    run_linear_probing.main(run_linear_probing.parse([*flags, *there]))
    expected["probing"] = {"flags": flags, "next": last_line(folder / "probing")}

    flags = [*PARTS, "--save_ckpt_freq", "1"]
    there = ["--teacher", str(encoder), "--output_dir", str(folder / "part_learning")]
    there += ["--extract", str(folder / "parts_array"), "--split", "val", "--save_scores"]
    run_part_learning.main(run_part_learning.parse([*flags, *there]))
    expected["part_learning"] = {"flags": flags, "next": last_line(folder / "part_learning")}
    write_pngs(folder / "parts_array", folder)
    maps = PartMaps.open(folder / "parts_array")
    expected["parts"] = [maps.read(index).tolist() for index in range(5)]
    (folder / "expected.json").write_text(json.dumps(expected))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
