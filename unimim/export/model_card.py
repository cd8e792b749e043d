"""Model cards: what a checkpoint and the files beside it say of the run."""

import csv
import json
from pathlib import Path
from typing import Any

from unimim.export.source import Source
from unimim.recipes import by_name

_PAGES = {  # beginnings of models' names -> page of the method
    "conmim": "conmim", "mae": "mae_semmae", "semmae": "mae_semmae", "semaim": "semaim",
    "beit": "beit_maskfeat_semanticmim", "maskfeat": "beit_maskfeat_semanticmim",
    "semanticmim": "beit_maskfeat_semanticmim", "simmim": "simmim_a2mim", "a2mim": "simmim_a2mim",
}  # fmt: skip
_SHOWN = (
    "data_set", "data_path", "input_size", "epochs", "batch_size", "update_freq", "opt", "lr",
    "blr", "weight_decay", "mask_type", "mask_ratio", "layer_decay", "drop_path", "nb_classes",
    "seed",
)  # fmt: skip
_METRICS = ("acc", "loss", "knn", "top")


def write_card(source: Source, command: str, loading: str) -> str:
    """Return README.md: method, recipe, data, commands and results, as far as they are known."""
    flags = vars(source.args)
    model = flags.get("model", "")
    recipe = by_name(flags["recipe"]) if flags.get("recipe") else None
    page = _PAGES.get(model.partition("_")[0])
    tags = ["image-classification" if source.num_classes else "image-feature-extraction"]
    lines = ["---", f"pipeline_tag: {tags[0]}", "tags:", "- masked-image-modeling", "---", ""]
    lines += [f"# {model}", "", f"Exported by UniMIM from `{Path(source.path).name}`."]
    method = type(source.network).__name__ if source.is_method else "a classifier"
    described = f"{method} ({model})" + (f"; docs/methods/{page}.md" if page else "")
    lines += ["", "## Method", "", described, "", "## Recipe", ""]
    lines += [recipe.name if recipe else "none named in the checkpoint"]
    lines += ["", "## Data and flags", "", "| flag | value |", "|---|---|"]
    shown = {name: flags[name] for name in _SHOWN if flags.get(name) not in (None, "", [])}
    lines += [f"| `--{name}` | {value} |" for name, value in shown.items()]
    lines += ["", "## Commands", "", "```bash"]
    lines += [training_command(source), command, "```", "", "```python", loading, "```"]
    lines += ["", "## Results", "", *results_beside(Path(source.path))]
    return "\n".join(lines) + "\n"


def training_command(source: Source) -> str:
    """Return the command of the run, by its recipe where it has one."""
    flags = vars(source.args)
    script = "run_pretraining.py" if source.is_method else "run_class_finetuning.py"
    words = ["python", script, "--model", str(flags.get("model", ""))]
    if flags.get("recipe"):
        words += ["--recipe", flags["recipe"]]
    return " ".join([*words, "--config", "config.yaml"])


def results_beside(path: Path) -> list[str]:
    """Return a table of what the log and the tables in a checkpoint's folder say."""
    folder = path.parent
    rows = last_metrics(folder / "log.txt")
    for table in sorted(folder.glob("*.csv")):
        with table.open(newline="") as file:
            for row in csv.DictReader(file):
                cells = ", ".join(f"{name} {value}" for name, value in row.items() if value)
                rows.append((table.name, cells))
    if not rows:
        return ["There were none beside the checkpoint."]
    return ["| from | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]


def last_metrics(log: Path) -> list[tuple[str, Any]]:
    """Return the metrics in the last line of a run's log; none if there is no such file."""
    if not log.is_file():
        return []
    lines = [line for line in log.read_text().splitlines() if line.startswith("{")]
    last = json.loads(lines[-1]) if lines else {}
    kept = {name: value for name, value in last.items() if any(m in name for m in _METRICS)}
    return [(f"log.txt: {name}", value) for name, value in kept.items()]
