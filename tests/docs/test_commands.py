"""Every command of README and docs: run scripts dry-run on small stand-ins for their data and
checkpoints, other scripts parse their flags, recipes exist."""

import argparse
import importlib
import os
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
from helpers import ROOT, TOKENIZER, imagenet_stand_in, in_ranks
from safetensors.torch import save_file

from modeling_finetune import create_model
from unimim.checkpoint.files import save_checkpoint
from unimim.cli import options
from unimim.cli.models import build_classifier, build_method
from unimim.recipes import by_name

EXAMPLE = ROOT / "docs/adding_a_method.md"  # whose commands have a test of their own
PAGES = [ROOT / "README.md", *sorted({*(ROOT / "docs").rglob("*.md")} - {EXAMPLE})]
BLOCK = re.compile(r"^```(bash|sh|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SHELL = {
    "printf", "source", "exit", "if", "#!/bin/bash", "#SBATCH", "export", "df", "docker", "podman",
    "mount", "ulimit", "uname", "echo",
}  # lines that start nothing of ours  # fmt: skip
LAUNCHERS = {"python", "torchrun", "deepspeed", "srun", "python3", "for"}
STAGES = {
    "run_pretraining.py": "pretrain",
    "run_class_finetuning.py": "finetune",
    "run_knn.py": "knn",
    "run_linear_probing.py": "linear",
    "run_part_learning.py": "parts",
    "run_tokenizer.py": "tokenizer",
}
WITHOUT_MODEL = ("parts", "tokenizer")  # no --model, and nothing to start from
PARSED_BY_OPTIONS = ("pretrain", "finetune")


@dataclass(frozen=True)
class Command:
    """A command of a page: what is started, and the words after it."""

    page: str
    program: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}: {self.program} {' '.join(self.words)}"


def lines_of(text: str) -> Iterator[str]:
    """The commands of a page's shell blocks, continuation lines joined; of a console's block those
    with a prompt."""
    for kind, block in BLOCK.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            prompt = "$ " if kind == "console" else ""
            if line.startswith(prompt) and line.strip():
                yield line.removeprefix(prompt)


def command_of(page: str, line: str) -> Command | None:
    """What a line starts; None for a line of a shell script that starts nothing of ours."""
    words = shlex.split(line.split("||")[0], comments=not line.startswith("#"))
    if not words or words[0] in SHELL:
        return None
    for at, word in enumerate(words):
        if word.endswith((".py", ".sh")) and word != "scripts/slurm.sh":  # it starts the next word
            return Command(page, word, tuple(words[at + 1 :]))
    while "=" in words[0] and len(words) > 1:
        words = words[1:]
    return None if "=" in words[0] else Command(page, words[0], tuple(words[1:]))


def commands() -> list[Command]:
    found = []
    for page in PAGES:
        name = str(page.relative_to(ROOT))
        found += [command_of(name, line) for line in lines_of(page.read_text())]
    return [command for command in found if command is not None]


COMMANDS = commands()
OTHERS = [command for command in COMMANDS if command.program not in STAGES]


def test_the_pages_have_commands_of_every_run_script():
    assert {command.program for command in COMMANDS} >= set(STAGES)
    pages = {command.page for command in COMMANDS}
    assert {"README.md", "docs/data.md", "docs/engine.md", "docs/evaluation.md"} <= pages


# --------------------------------------------------------------------------------------------------
# Run scripts


def small(command: Command, folder: Path) -> list[str]:
    """The command's flags with paths below `folder`, one block in its transformers, and stand-ins
    for what cannot be had here."""
    words = list(command.words)
    for at, flag in enumerate(words):
        if flag in ("--data_path", "--eval_data_path", "--finetune", "--resume", "--output_dir"):
            words[at + 1] = str(folder / words[at + 1].lstrip("/$"))
        elif flag == "--discrete_vae_weight_path":
            words[at + 1] = str(TOKENIZER)
        elif flag == "--teacher" and words[at + 1].endswith(".safetensors"):
            words[at + 1] = "vit_small_patch14_dinov2"
        elif flag == "--part_maps":
            words[at : at + 2] = ["--part_source", "random"]
        elif flag in ("--num_parts", "--layer_indices"):
            raise AssertionError(f"{flag} needs a rule here")
    model = words[words.index("--model") + 1] if "--model" in words else ""
    if (
        not re.search(r"resnet|regnet|swin|convnext", model)
        and STAGES[command.program] not in WITHOUT_MODEL
    ):
        shallow = ["depth=1"]
        shallow += ["decoder_depth=1"] if re.match(r"(sem)?mae_", model) else []
        shallow += ["query_depth=1"] if re.match(r"(sem|s)aim_|igpt_", model) else []
        shallow += ["vocab_size=64"] if re.match(r"beit_.*vocab|semanticmim_beit", model) else []
        at = words.index("--model_kwargs") + 1 if "--model_kwargs" in words else len(words)
        words[at:at] = shallow if "--model_kwargs" in words else ["--model_kwargs", *shallow]
    if command.program == "run_part_learning.py":
        words += ["--allow_random_teacher", "--teacher_kwargs", "depth=1"]
    words += ["--device", "cpu", "--batch_size", "2", "--dry_run"]
    if command.program != "run_knn.py":
        words += ["--update_freq", "1"]
    return words


def save_weights(args: argparse.Namespace, trained: dict[str, argparse.Namespace]) -> None:
    """Write what a command reads: the checkpoint of the run before it, or one of its own kind."""
    file = args.finetune or getattr(args, "resume", "")
    if not file:
        return
    before = trained.get(str(Path(file).parent))
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    if not args.finetune:
        args.nb_classes = args.nb_classes or 10
        own = argparse.Namespace(**{**vars(args), "resume": ""})
        state = {"model": build_classifier(own).state_dict(), "engine": {}}
    elif before is None:
        weights = create_model(args.model, **options.model_kwargs(args)).state_dict()
        encoder = {name: value for name, value in weights.items() if "head" not in name}
        state = {"model": encoder}
    else:
        method = build_method(before)
        teacher = {} if method.teacher is None else {"teacher": method.teacher.state_dict()}
        state = {"model": method.state_dict(), **teacher}
        encoder = method.encoder_state_dict()
    if file.endswith(".safetensors"):
        save_file({name: value.contiguous() for name, value in encoder.items()}, file)
    else:
        save_checkpoint(file, state)


def parser_of(script: ModuleType, stage: str) -> Callable[[list[str]], argparse.Namespace]:
    """What a script parses its command line with."""
    if stage in PARSED_BY_OPTIONS:
        return partial(options.parse, stage)
    return getattr(script, f"parse_{stage}")


def dry_run_all(folder: Path) -> list[str]:
    """Dry-runs the run scripts of all pages in this process: what the failing ones said."""
    os.chdir(folder)
    os.environ["UNIMIM_CACHE"] = str(folder / "cache")
    failures, trained = [], {}
    for command in COMMANDS:
        if command.program not in STAGES:
            continue
        try:
            script = importlib.import_module(command.program.removesuffix(".py"))
            stage = STAGES[command.program]
            words = small(command, folder / Path(command.page).stem)
            args = parser_of(script, stage)(words)
            for path in filter(None, (args.data_path, getattr(args, "eval_data_path", None))):
                imagenet_stand_in(Path(path))
            if stage not in ("pretrain", *WITHOUT_MODEL):
                save_weights(args, trained)
            script.main(args)
            if stage == "pretrain":
                trained[args.output_dir] = args
        except (Exception, SystemExit) as error:
            failures.append(f"{command}: {error!r}")
    return failures


@pytest.mark.slow
def test_every_run_command_dry_runs(tmp_path):
    assert in_ranks(1, dry_run_all, tmp_path) == [[]]


# --------------------------------------------------------------------------------------------------
# Everything else


@pytest.mark.parametrize("command", OTHERS, ids=str)
def test_every_other_command_is_there_and_takes_its_flags(command):
    program, words = command.program, list(command.words)
    if program == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words[0] in targets
    elif program == "pip":
        assert (ROOT / words[words.index("-r") + 1]).is_file()
    elif program == "scripts/recipe.sh":
        assert words[0] in ("--list", "--print") or by_name(words[0])
    elif program in LAUNCHERS:
        assert words[0] == "-m"
        importlib.import_module(words[1])
    elif program == "run_robustness.py" or re.match(
        "(analysis|semantic_segmentation)/.*py$", program
    ):
        importlib.import_module(program.removesuffix(".py").replace("/", ".")).parse(words)
    else:
        text = (ROOT / program).read_text()
        if program == "scripts/launch.sh":
            script, config = words[:2]
            assert (ROOT / script).is_file()
            assert (ROOT / config).is_file() or config.startswith("$")
            text += (ROOT / "unimim/openmmlab/runner.py").read_text()
        named = [word for word in words if word.startswith("--")]
        assert all(flag in text for flag in named), named
