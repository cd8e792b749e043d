"""Read the published projects' commands: their flags and model names become ours.

The tables say all there is to know of them; nothing else in this repository knows these names. A
parser of ours that has a flag of that name keeps it. `--help` shows none of them, the log says what
each became.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

TRAINING = ("pretrain", "finetune", "linear")
EVERYWHERE = (*TRAINING, "knn", "voc")


class Alias(NamedTuple):
    """What a published flag becomes in the scripts of `stages`.

    becomes: words of ours, in which {} stands for the flag's values and {NAME} for the value of
    --NAME, without which the words are left out; empty for a flag that has nothing to say here.
    why: what the log adds, for instance why there is nothing to say.
    """

    stages: tuple[str, ...]
    becomes: str
    why: str = ""


FLAGS: Mapping[str, Alias] = {
    # MAE, SemMAE, SemAIM, SAIM
    "accum_iter": Alias(TRAINING, "--update_freq {}"),
    "saveckp_freq": Alias(TRAINING, "--save_ckpt_freq {}"),
    "not_use_fp16": Alias(TRAINING, "--precision fp32"),
    "experiment": Alias(
        TRAINING,
        "--output_dir {output_dir}/{} --log_dir {log_dir}/{}",
        "every experiment has a folder of its own",
    ),
    "global_pool": Alias(("finetune",), "--use_mean_pooling"),
    "cls_token": Alias(("finetune",), "--use_cls"),
    "dist_eval": Alias(EVERYWHERE, "", "images are always shared among the processes"),
    "dist_backend": Alias(EVERYWHERE, "", "it is nccl on GPUs and gloo on CPUs"),
    "setting": Alias(("pretrain",), "", "the model's name says it"),
    # what starts MAE's scripts on a cluster
    "job_dir": Alias(TRAINING, "--output_dir {}"),
    "nodes": Alias(TRAINING, "", "scripts/launch.sh starts the processes, NNODES says how many"),
    "ngpus": Alias(TRAINING, "", "scripts/launch.sh starts the processes, NPROC says how many"),
    "timeout": Alias(TRAINING, "", "it is the scheduler's"),
    "partition": Alias(TRAINING, "", "it is the scheduler's"),
    "comment": Alias(TRAINING, "", "it is the scheduler's"),
    "use_volta32": Alias(TRAINING, "", "it is the scheduler's"),
    # SemAIM's k-NN, SemanticMIM's segmentation probe
    "batch_size_per_gpu": Alias(("knn", "voc"), "--batch_size {}"),
    "checkpoint_key": Alias(("finetune", "linear", "knn", "voc"), "--model_key {}"),
    "nb_knn": Alias(("knn",), "--knn_k {}"),
    "use_cuda": Alias(("knn",), "", "the features stay on the device of --device"),
    "dump_features": Alias(("knn",), "--feature_cache {}"),
    "load_features": Alias(("knn",), "--feature_cache {}"),
    "avgpool_patchtokens": Alias(("knn",), "", "it had no effect"),
    "method": Alias(("knn",), "", "it had no effect"),
    "num_classes": Alias(("voc",), "--nb_classes {}"),
    "num_cls_tokens": Alias(("voc",), "", "it is read from the checkpoint"),
    "evaluate": Alias(("voc",), "--eval"),
    "head_type": Alias(("voc",), "", "the head is linear"),
}

_CLASSIFIERS = {
    f"vit_{size}_patch{patch}": f"vit_{size}_patch{patch}_224"
    for size, patch in (
        ("small", 16), ("base", 16), ("base", 8), ("large", 16), ("large", 8), ("huge", 14),
    )
}  # fmt: skip
_MAE_SIZES = (("base", 16), ("large", 16), ("huge", 14))
_METHODS = {
    **{
        f"mae_vit_{size}_patch{patch}": f"mae_{size}_patch{patch}_224" for size, patch in _MAE_SIZES
    },
    **{
        f"mae_vit_{size}_patch{patch}_dec512d8b": f"mae_{size}_patch{patch}_224"
        for size, patch in _MAE_SIZES
    },
    **{f"mae_vit_{size}_patch8": f"semmae_{size}_patch8_224" for size in ("base", "large")},
    **{
        f"mae_vit_{size}_patch8_dec512d8b": f"semmae_{size}_patch8_224"
        for size in ("base", "large")
    },
    **{f"aim_{size}": f"semaim_{size}_patch16_224" for size in ("base", "large", "huge")},
    **{f"saim_{size}": f"saim_{size}_patch16_224" for size in ("base", "large")},
}
# stage -> published name -> ours
MODELS: Mapping[str, Mapping[str, str]] = {
    "pretrain": _METHODS,
    **dict.fromkeys(("finetune", "linear", "knn", "voc"), _CLASSIFIERS),
}
# SemMAE's models have MAE's names; its own flag tells them apart
MODELS_WITH_FLAG: Mapping[str, Mapping[str, str]] = {
    "setting": {
        "mae_vit_base_patch16": "semmae_base_patch16_224",
        "mae_vit_large_patch16": "semmae_large_patch16_224",
    }
}


class Defaults(NamedTuple):
    """What a published script takes for flags that its command leaves out.

    stage: of our script. flags: published flags that only that script has. models: beginnings of
    published model names that only it has. values: by our flag's name. needs, without: published
    flags that the command must have, or must not.
    """

    script: str
    stage: str
    values: Mapping[str, Any]
    flags: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    without: tuple[str, ...] = ()

    def hold(self, stage: str | None, flags: Collection[str], model: str) -> bool:
        """Tell whether a command with these published flags and this model is the script's."""
        if stage != self.stage or not set(self.needs) <= set(flags):
            return False
        if set(self.without) & set(flags):
            return False
        return bool(set(self.flags) & set(flags)) or model.startswith(self.models)


_KNN = ("batch_size_per_gpu", "checkpoint_key", "nb_knn", "use_cuda")
_PROBE = {
    "batch_size": 512, "epochs": 90, "lr": None, "blr": 0.1, "min_lr": 0.0, "weight_decay": 0.0,
    "warmup_epochs": 10,
}  # fmt: skip
# where these scripts save a run that does not say where; MAE's begin anew there
_FOLDER = {"output_dir": "output_dir"}
_ANEW = _FOLDER | {"auto_resume": False}
_NAMED = ("output_dir", "job_dir")
_PLAIN = {"feature_norm": "plain"}  # the published norm is new, and frozen as it is initialized
_MAE_PROBE = {"flags": ("dist_eval", "accum_iter", "job_dir"), "models": ("vit_",)}
DEFAULTS: Sequence[Defaults] = (
    Defaults("SemAIM's main_knn.py", "knn", {"knn_k": [10, 20, 30]}, flags=_KNN),
    Defaults("SemAIM's main_knn.py", "knn", _PLAIN, flags=_KNN, needs=("global_pool",)),
    Defaults(
        "SemAIM's main_linprobe.py", "linear",
        _PROBE | _FOLDER | {"opt": "momentum", "train_crop": "short_side"},
        flags=("experiment",),
    ),
    Defaults(
        "SemAIM's main_linprobe.py", "linear", _PLAIN | {"pool": "avg"}, flags=("experiment",),
        without=("cls_token",),
    ),
    Defaults(
        "MAE's main_linprobe.py", "linear", _PROBE | {"opt": "lars"}, without=("experiment",),
        **_MAE_PROBE,
    ),
    Defaults(
        "MAE's main_linprobe.py", "linear", _ANEW, without=("experiment", *_NAMED), **_MAE_PROBE,
    ),
    Defaults(
        "MAE's main_linprobe.py", "linear", _PLAIN, needs=("global_pool",),
        without=("experiment",), **_MAE_PROBE,
    ),
    Defaults(
        "MAE's main_finetune.py", "finetune",
        {
            "batch_size": 64, "epochs": 50, "lr": None, "blr": 1e-3, "lr_schedule": "mae",
            "min_lr": 1e-6, "warmup_epochs": 5, "weight_decay": 0.05, "layer_decay": 0.75,
            "clip_grad": None, "opt_betas": [0.9, 0.999], "drop_path": 0.1, "smoothing": 0.1,
            "reprob": 0.25, "mixup": 0.0, "cutmix": 0.0, "imagenet_default_mean_and_std": True,
        },
        models=("vit_",),
    ),
    Defaults(
        "MAE's main_finetune.py", "finetune", _ANEW, models=("vit_",), without=("eval", *_NAMED),
    ),
    Defaults(
        "MAE's main_pretrain.py", "pretrain",
        {
            "batch_size": 64, "epochs": 400, "lr": None, "blr": 1e-3, "warmup_epochs": 40,
            "mask_ratio": 0.75, "norm_pix_loss": False,
        },
        models=("mae_vit_",), without=("setting",),
    ),
    Defaults(
        "SemMAE's main_pretrain_setting3.py", "pretrain",
        {
            "batch_size": 32, "epochs": 1, "lr": None, "blr": 1e-3, "warmup_epochs": 40,
            "mask_ratio": 0.6, "norm_pix_loss": False,
        },
        models=("mae_vit_",), needs=("setting",),
    ),
    Defaults("MAE's main_pretrain.py", "pretrain", _ANEW, models=("mae_vit_",), without=_NAMED),
    Defaults(
        "SemAIM's main_pretrain.py", "pretrain",
        _FOLDER | {
            "batch_size": 64, "epochs": 800, "lr": None, "blr": 2e-4, "warmup_epochs": 30,
            "weight_decay": 0.05, "clip_grad": None, "norm_pix_loss": False,
            "permutation_type": "stochastic", "attention_type": "cls",
            "gaussian_kernel_size": None, "gaussian_sigma": None,
        },
        models=("aim_", "saim_"),
    ),
)  # fmt: skip

# --------------------------------------------------------------------------------------------------
# Translation


@dataclass
class Command:
    """A command line in our words.

    notes: a line for each published name, which says what it became. defaults: values of flags that
    the command leaves out, where the published script's are not ours.
    """

    words: list[str]
    notes: list[str] = field(default_factory=list)
    defaults: dict[str, Any] = field(default_factory=dict)


def translate(stage: str | None, words: Sequence[str], known: Collection[str]) -> Command:
    """Return the command with the published names replaced.

    `known` are the option strings of the parser that reads the result. Defaults of a published
    script give way to --recipe.
    """
    groups = list(_by_flag(words))
    given = {flag: values[-1] for flag, values in groups if flag and values}
    command = Command([])
    last: list[str] = []
    flags = set()
    model = ""
    for flag, values in groups:
        flags.add(flag)
        if flag == "model" and _ours(stage, groups, values) not in (None, *values):
            model = values[0]
            name = _ours(stage, groups, values)
            command.words += ["--model", name]
            command.notes.append(f"--model {model} is {name} here")
            continue
        alias = FLAGS.get(flag)
        if alias is None or stage not in alias.stages or f"--{flag}" in known:
            command.words += [f"--{flag}"] if flag else []
            command.words += values
            continue
        became = list(_filled(alias.becomes, values, given))
        # what extends another flag's value stands after that flag
        (last if "_dir}" in alias.becomes else command.words).extend(became)
        published = " ".join([f"--{flag}", *values])
        said = f"is {' '.join(became)} here" if became else "is accepted and changes nothing here"
        command.notes.append(f"{published} {said}{f': {alias.why}' if alias.why else ''}")
    command.words += last
    if "recipe" not in flags:
        _add_defaults(command, stage, flags, model)
    return command


def _by_flag(words: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield each flag, without dashes, with its values; "" for values before the first flag."""
    flag = ""
    values: list[str] = []
    for word in words:
        if word.startswith("--"):
            if flag or values:
                yield flag, values
            flag, equals, value = word[2:].partition("=")
            values = [value] if equals else []
        else:
            values.append(word)
    if flag or values:
        yield flag, values


def _ours(
    stage: str | None, groups: Sequence[tuple[str, list[str]]], name: list[str]
) -> str | None:
    """Return our name of a published model; None if it is not one."""
    if len(name) != 1:
        return None
    for flag, models in MODELS_WITH_FLAG.items():
        if name[0] in models and any(flag == other for other, _ in groups):
            return models[name[0]]
    return MODELS.get(stage or "", {}).get(name[0])


def _filled(template: str, values: list[str], given: Mapping[str, str]) -> Iterator[str]:
    """Yield the words of a template; a flag whose value names another flag that is not given is
    left out."""
    pairs = template.replace(" --", "\n--").splitlines()
    for pair in pairs:
        flag, _, value = pair.partition(" ")
        named = [name for name in ("output_dir", "log_dir") if f"{{{name}}}" in value]
        if any(name not in given for name in named):
            continue
        yield flag
        if value == "{}":
            yield from values
        elif value and (values or "{}" not in value):
            yield value.format(*values, **given)


def _add_defaults(command: Command, stage: str | None, flags: Collection[str], model: str) -> None:
    """Set the command's defaults to those of the published script that it was written for."""
    ours = {flag for flag, _ in _by_flag(command.words)}
    for row in DEFAULTS:
        if not row.hold(stage, flags, model):
            continue
        values = {name: value for name, value in row.values.items() if name not in ours}
        if ours & {"lr", "blr"}:
            values = {name: value for name, value in values.items() if name not in ("lr", "blr")}
        shown = ", ".join(f"{name} {value}" for name, value in values.items() if value is not None)
        if shown:
            command.notes.append(f"left out, so as in {row.script}: {shown}")
        command.defaults |= values
