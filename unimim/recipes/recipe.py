"""Define a recipe: how one model was, or should be, trained or evaluated in one stage."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

OURS = "UniMIM"

# The script of each stage, relative to the root of the repository.
PROGRAMS = {
    "pretrain": "run_pretraining.py",
    "finetune": "run_class_finetuning.py",
    "linear": "run_linear_probing.py",
    "knn": "run_knn.py",
    "parts": "run_part_learning.py",
    "tokenizer": "run_tokenizer.py",
    "voc": "semantic_segmentation/voc_linear_probe.py",
}
ACTIVITIES = {
    "pretrain": "pre-training",
    "finetune": "fine-tuning",
    "linear": "linear probing",
    "knn": "k-NN on the features",
    "parts": "part learning on the features",
    "tokenizer": "training",
    "voc": "linear segmentation of Pascal VOC on the features",
}

# The flag that takes a recipe's `model`; --model in the other stages.
MODEL_FLAGS = {"parts": "teacher", "tokenizer": "kind"}
WITHOUT_LABELS = ("pretrain", "parts", "tokenizer")

# Flags whose negation is not "no_" and their name.
_OFF = {"use_mean_pooling": "use_cls", "use_bottleneck": "no_bottleneck"}


@dataclass(frozen=True)
class Recipe:
    """How one model was, or should be, trained or evaluated in one stage.

    `flags` maps command-line flags to values. `lr` is the peak, not scaled by the batch;
    `batch_size` counts the images per GPU and micro-batch; False switches a flag off, and None
    leaves it at its default. `published` is the top-1 on `data`, in percent, that the recipe leads
    to; for pre-training, that of the fine-tuned model. `also` states published results of other
    settings, `note` what is not published.
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
    # flag -> (environment variable that names the file, its default)
    files: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    @property
    def is_published(self) -> bool:
        """Whether the recipe has a published source."""
        return self.source != OURS

    @property
    def program(self) -> str:
        """The script that runs the recipe, relative to the root of the repository."""
        return PROGRAMS[self.stage]

    @property
    def model_flag(self) -> str:
        """The flag that takes `model`, without dashes."""
        return MODEL_FLAGS.get(self.stage, "model")

    @property
    def epochs(self) -> int | None:
        """The number of training epochs; None if nothing is trained."""
        return self.flags.get("epochs")

    @property
    def effective_batch(self) -> int:
        """The images per optimizer step on the published number of GPUs."""
        return self.gpus * self.flags["batch_size"] * self.flags.get("update_freq", 1)

    @property
    def peak_lr(self) -> float | None:
        """The peak lr on the published number of GPUs; None if nothing is trained."""
        if self.flags.get("blr") is not None:
            return self.flags["blr"] * self.effective_batch / 256
        return self.flags.get("lr")

    @property
    def hardware(self) -> str:
        """GPUs, images per GPU, accumulation and their product, in one line."""
        batch = self.flags["batch_size"]
        update_freq = self.flags.get("update_freq")
        gpus = f"{self.gpus} GPU{'s' if self.gpus > 1 else ''}"
        if update_freq is None:  # nothing is trained
            return f"{gpus} x batch {batch} = {self.effective_batch}"
        return f"{gpus} x batch {batch} x update_freq {update_freq} = {self.effective_batch}"

    @property
    def title(self) -> str:
        """The method, stage, network and epochs, in one line."""
        plural = "" if self.epochs == 1 else "s"
        epochs = f", {self.epochs} epoch{plural}" if self.epochs else ""
        return f"{self.method}: {ACTIVITIES[self.stage]} of {self.network}{epochs}"

    @property
    def starts_from(self) -> str | None:
        """The recipe whose checkpoint this one starts from; None for random weights."""
        if self.stage in WITHOUT_LABELS:
            return None
        if self.name.endswith("_384"):  # after fine-tuning at 224 px
            return self.name.removesuffix("_384")
        return re.split("_(?:finetune|linear|knn|voc)", self.name)[0] + "_pretrain"

    def words(self) -> list[str]:
        """Return the flags as command-line arguments."""
        words = []
        for name, value in self.flags.items():
            if value is None:
                continue
            if value is False:
                words.append(f"--{_OFF.get(name, f'no_{name}')}")
            elif value is True:
                words.append(f"--{name}")
            else:
                values = value if isinstance(value, tuple) else (value,)
                words += [f"--{name}", *map(str, values)]
        return words
