"""Find the files of a data set of the Hugging Face hub (--data_set hf): parquet files, arrow files
as the library `datasets` writes them, or a data set in the hub's cache on this machine."""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from unimim.data.shards import matching
from unimim.logs import log

SPLITS = {True: (("train",),), False: (("validation", "valid", "val", "dev"), ("test",))}
SUFFIXES = (".parquet", ".arrow")
BESIDE_IMAGES = "metadata.parquet"  # tells of the images in its folder, and holds none
STATE, SPLIT_LIST = "state.json", "dataset_dict.json"  # of datasets.save_to_disk
INDICES = ("_indices_files", "_indices_data_files")  # in the state of older versions
_MAPPED = re.compile(r"cache-.*\.arrow")  # what Dataset.map and others keep beside the files
_REPOSITORY = re.compile(r"([\w-][\w.-]*)/([\w-][\w.-]*)((?:/.*)?)")
_DOWNLOAD = "hf download --repo-type dataset"


# --------------------------------------------------------------------------------------------------
# The hub's cache


def located(data_path: str) -> str:
    """Return where a data set of the hub, USER/NAME or USER/NAME/INSIDE, lies in the hub's cache.

    Whatever is a path, or is not there, is returned as it is; nothing is downloaded.
    """
    found = _repository(data_path)
    if found is None:
        return data_path
    folder = hub_cache() / f"datasets--{found[1]}--{found[2]}"
    try:
        revision = (folder / "refs/main").read_text().strip()
    except OSError:
        return data_path
    snapshot = folder / "snapshots" / revision
    return f"{snapshot}{found[3]}" if revision and snapshot.is_dir() else data_path


def _repository(data_path: str) -> re.Match[str] | None:
    """Return the parts USER, NAME and /INSIDE of a path that may be in the hub; None for others."""
    found = _REPOSITORY.fullmatch(data_path)
    if found is None or found[2].endswith((*SUFFIXES, ".tar")):
        return None
    return None if os.path.exists(f"{found[1]}/{found[2]}") else found


def hub_cache() -> Path:
    """Return the folder in which the hub's own tools keep what they downloaded."""
    set_to = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    if not set_to:
        caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        home = os.environ.get("HF_HOME") or os.path.join(caches, "huggingface")
        set_to = os.path.join(home, "hub")
    return Path(os.path.expandvars(os.path.expanduser(set_to)))


def missing(data_path: str) -> str:
    """Return what is added to "--data_path X does not exist": how it is downloaded, if it may be a
    data set of the hub."""
    found = _repository(data_path)
    if found is None:
        return ""
    name = f"{found[1]}/{found[2]}"
    return f", nor does {name} in the hub's cache {hub_cache()}; download it by: {_DOWNLOAD} {name}"


# --------------------------------------------------------------------------------------------------
# Which files


def files_of(data_path: str, *, train: bool) -> list[Path]:
    """Return the files that --data_path names, in order: a file, a pattern, or a folder.

    A folder may be divided by the beginnings of the files' names (train-00000-of-00128.parquet), or
    into folders of the splits; else all of its files are for training. A repository of the hub,
    whose files lie in `data`, is such a folder, too, and so is what `datasets.save_to_disk` writes.
    ValueError: there are none, or they are of two kinds.
    """
    if os.path.isdir(data_path):
        files = _in_folder(Path(data_path), train=train)
    else:
        advice = missing(data_path) or (
            f"; a data set of the hub is downloaded by: {_DOWNLOAD} NAME --local-dir FOLDER"
        )
        files = matching(data_path, advice)
    if len({file.suffix == ".arrow" for file in files}) > 1:
        raise ValueError(
            f"--data_path {data_path} names parquet files and arrow files; name those of one kind, "
            f"as by '{files[0].parent}/*{files[0].suffix}'"
        )
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file} is a link to a file that is gone; download it again")
    return files


def _in_folder(root: Path, *, train: bool) -> list[Path]:
    """Return the files of a folder for training, or for evaluation; ValueError if it has none."""
    for folder in (root, root / "data"):
        for names in SPLITS[train]:
            found = _of_split(folder, names)
            if found:
                _warn_of_missing(found)
                return found
        plain = _tables_in(folder)
        if plain and train and not any(_of_split(folder, names) for names in SPLITS[False]):
            return plain
    known = [name for names in SPLITS[train] for name in names]
    use = "" if train else "; name some with --eval_data_path"
    if saved := sorted(state.parent.name for state in root.glob(f"*/{STATE}")):
        raise ValueError(
            f"--data_path {root} holds the splits {', '.join(saved)}, and none of "
            f"{', '.join(known)}{use or '; name one of them, as by --data_path FOLDER/SPLIT'}"
        )
    names = ", ".join(f"{name}*.parquet" for name in known)
    raise ValueError(f"--data_path {root} holds no files {names}{use}")


def _of_split(folder: Path, names: Sequence[str]) -> list[Path]:
    """Return the files of a split: those in a folder of one of its names, or that are named so.

    Names begin with that of the split; in the cache of `datasets` that of the data set precedes.
    """
    for name in names:
        found = _tables_in(folder / name)
        if not found:
            named = re.compile(rf"{name}[-_.]|.*-{name}(-\d+-of-\d+)?\.arrow$")
            found = [file for file in _tables_in(folder) if named.match(file.name)]
        if found:
            return found
    return []


def _tables_in(folder: Path) -> list[Path]:
    """Return the parquet and arrow files in a folder, sorted; of arrow files that
    `datasets.save_to_disk` wrote, those that its state lists."""
    arrow = sorted(file for file in folder.glob("*.arrow") if not _MAPPED.fullmatch(file.name))
    if arrow and (folder / STATE).is_file():
        arrow = _saved_files(folder)
    return [*sorted(folder.glob("*.parquet")), *arrow]


def _saved_files(folder: Path) -> list[Path]:
    """Return the files of a data set that `datasets.save_to_disk` wrote, in order.

    ValueError: one is missing, or their rows are chosen or ordered by another file.
    """
    try:
        state = json.loads((folder / STATE).read_text())
        files = [folder / Path(listed["filename"]).name for listed in state["_data_files"]]
        chosen = any(state.get(name) for name in INDICES)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{folder / STATE} is not what datasets.save_to_disk writes; write the folder again"
        ) from error
    if chosen:
        raise ValueError(
            f"{folder} was saved with a list of chosen rows, as of a data set that was shuffled or "
            "filtered; write these rows alone, by "
            f"datasets.load_from_disk('{folder}').flatten_indices().save_to_disk('NEW FOLDER')"
        )
    for file in files:
        if not file.is_file():
            raise ValueError(f"{folder / STATE} lists {file.name}, which is missing; copy it again")
    return files


def _warn_of_missing(files: Sequence[Path]) -> None:
    """Log where the names say that there are more files: a download may have been cut short."""
    stated = re.search(r"-of-(\d+)\.(parquet|arrow)$", files[-1].name)
    if stated and int(stated[1]) > len(files):
        log.warning("%s: there are %d of %d files", files[0].parent, len(files), int(stated[1]))


def holds_tables(root: Path) -> bool:
    """Return whether a folder, or that of its data or training files, holds parquet or arrow
    files."""
    folders = (root, root / "data", root / "train")
    found = (file for folder in folders for end in SUFFIXES for file in folder.glob(f"*{end}"))
    return any(file.name != BESIDE_IMAGES for file in found) or (root / SPLIT_LIST).is_file()


def is_one_split(root: Path) -> bool:
    """Return whether `datasets.save_to_disk` wrote a folder for one data set without splits."""
    return (root / STATE).is_file() and any(root.glob("*.arrow"))
