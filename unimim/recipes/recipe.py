"""One recipe: how one model was, or should be, trained or evaluated in one stage."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

OURS = "UniMIM"

# The program of each stage, from the root of the repository.
PROGRAMS = {
    "pretrain": "run_pretraining.py",
    "finetune": "run_class_finetuning.py",
    "linear": "run_linear_probing.py",
    "knn": "run_knn.py",
    "parts": "run_part_learning.py",
    "voc": "semantic_segmentation/voc_linear_probe.py",
}
ACTIVITIES = {
    "pretrain": "pre-training",
    "finetune": "fine-tuning",
    "linear": "linear probing",
    "knn": "k-NN on the features",
    "parts": "part learning on the features",
    "voc": "linear segmentation of Pascal VOC on the features",
}

# Flags that are switched off by another name than "no_" and theirs.
_OFF = {"use_mean_pooling": "use_cls", "use_bottleneck": "no_bottleneck"}


@dataclass(frozen=True)
class Recipe:
    """How one model was, or should be, trained or evaluated in one stage.

    `flags` maps command-line names to values: `lr` is the peak, never scaled by the batch,
    `batch_size` the images per GPU and micro-batch, False switches a flag off, and None leaves it
    at its default. `published` is the top-1 on `data` in percent that the recipe leads to; for
    pre-training, that of the fine-tuned model. `also` says what other settings of it are published
    to reach, `note` what is not published.
    """

    name: str
    stage: str
    model: str
    gpus: int
    flags: Mapping[str, Any]
    source: str
    published: float | None = None
    note: str = ""
    also: str = ""
    method: str = ""
    network: str = ""
    data: str = "ImageNet-1K"
    # flag: (environment variable that names the file, its default)
    files: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    @property
    def is_published(self) -> bool:
        """Whether the recipe has another source than ourselves."""
        return self.source != OURS

    @property
    def program(self) -> str:
        """The script that runs the recipe, from the root of the repository."""
        return PROGRAMS[self.stage]

    @property
    def epochs(self) -> int | None:
        """Epochs of training; None where nothing is trained."""
        return self.flags.get("epochs")

    @property
    def effective_batch(self) -> int:
        """Images per optimizer step on the published number of GPUs."""
        return self.gpus * self.flags["batch_size"] * self.flags.get("update_freq", 1)

    @property
    def peak_lr(self) -> float | None:
        """The peak of the learning rate on the published number of GPUs; None where nothing is
        trained."""
        if self.flags.get("blr") is not None:
            return self.flags["blr"] * self.effective_batch / 256
        return self.flags.get("lr")

    @property
    def hardware(self) -> str:
        """GPUs, images per GPU, accumulation and their product in one line."""
        batch, update_freq = self.flags["batch_size"], self.flags.get("update_freq")
        gpus = f"{self.gpus} GPU{'s' if self.gpus > 1 else ''}"
        if update_freq is None:  # nothing is trained
            return f"{gpus} x batch {batch} = {self.effective_batch}"
        return f"{gpus} x batch {batch} x update_freq {update_freq} = {self.effective_batch}"

    @property
    def title(self) -> str:
        """What the recipe does, in one line."""
        epochs = f", {self.epochs} epochs" if self.epochs else ""
        return f"{self.method}: {ACTIVITIES[self.stage]} of {self.network}{epochs}"

    @property
    def starts_from(self) -> str | None:
        """The name of the recipe whose checkpoint this one takes; None where it starts from random
        weights."""
        if self.stage in ("pretrain", "parts"):
            return None
        if self.name.endswith("_384"):  # after fine-tuning at 224 px
            return self.name.removesuffix("_384")
        return re.split("_(?:finetune|linear|knn|voc)", self.name)[0] + "_pretrain"

    def words(self) -> list[str]:
        """The flags as words of a command line."""
        words = []
        for name, value in self.flags.items():
            if value is None:
                continue
            words.append(f"--{_OFF.get(name, f'no_{name}')}" if value is False else f"--{name}")
            if not isinstance(value, bool):
                values = value if isinstance(value, tuple) else (value,)
                words += [str(each) for each in values]
        return words
