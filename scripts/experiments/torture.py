"""Damages files, kills runs and breaks their surroundings, and counts what is answered in order.

    python scripts/experiments/torture.py --minutes 15

Every kind of trial is described by a function below; what it must answer is in its docstring. Runs
are the real commands in children of this interpreter, which has the imports done; launchers are
started as a user starts them. What is random follows from --seed, but for the moments of kills,
which depend on the machine's speed, too. Prints a table: kind, tried, held, failed; the exit status
is 1 if anything failed.
"""

import argparse
import copy
import io
import json
import os
import pickle
import random
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import deepspeed  # noqa: F401  (runs are forked with it)
import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import modeling_pretrain  # noqa: F401  (registers the methods)
from unimim.checkpoint.files import load_checkpoint, save_checkpoint, save_encoder
from unimim.cli.options import parse
from unimim.data.file_index import read_map_file
from unimim.data.jpeg import BrokenImageError, decode, open_picture
from unimim.data.part_maps import SCORES, PartMaps, PartMapWriter, PartMeta
from unimim.data.sources import map_source
from unimim.engine.deepspeed import read_deepspeed_config
from unimim.engine.distributed import free_port
from unimim.evaluation.features import read_cache

HANG_SECONDS = 60  # of one damaged input; a run has ten times that
MORE_MEMORY = 2**31  # bytes that a damaged input may take
STOPPED = 75  # what runs end with that a signal stopped, as they are told


def words(text: str) -> list[str]:
    return text.split()


TINY = words(
    "--model mae_tiny_patch16_224 --data_set digits --input_size 16 --patch_size 4 --device cpu "
    "--batch_size 64 --epochs 2 --warmup_epochs 0 --save_ckpt_steps 4 --save_ckpt_freq 1 "
    f"--log_every 4 --stop_status {STOPPED} --model_kwargs embed_dim=32 depth=2 num_heads=2 "
    "decoder_embed_dim=24 decoder_depth=1 decoder_num_heads=2"
)
TEACHER = words(
    "--model conmim_tiny_patch16_224 --data_set digits --input_size 16 --patch_size 4 --device cpu "
    "--batch_size 64 --epochs 2 --warmup_epochs 0 --save_ckpt_steps 4 --save_ckpt_freq 1 "
    f"--log_every 4 --stop_status {STOPPED} --mask_type random --mask_ratio 0.5 "
    "--model_kwargs embed_dim=32 depth=2 num_heads=2 projector_hidden_dim=32"
)
LINEAR = words(
    "--model vit_tiny_patch16_224 --data_set digits --input_size 16 --patch_size 4 --device cpu "
    "--batch_size 64 --epochs 2 --warmup_epochs 0 --save_ckpt_steps 4 --save_ckpt_freq 1 "
    f"--log_every 4 --stop_status {STOPPED} --lr 0.1 "
    "--model_kwargs embed_dim=32 depth=2 num_heads=2"
)
FINETUNE = words(
    "--model beit_tiny_patch16_224 --data_set digits --input_size 16 --patch_size 4 --device cpu "
    "--batch_size 64 --epochs 2 --warmup_epochs 0 --save_ckpt_steps 4 --save_ckpt_freq 1 "
    f"--log_every 4 --stop_status {STOPPED} --model_ema --mixup 0.8 "
    "--model_kwargs embed_dim=32 depth=2 num_heads=2"
)


# What a launcher starts: the script, which leaves its log and its exit status in files.
RANK = """
import os, runpy, sys
rank, folder, own, end_at_once = os.environ["RANK"], {folder!r}, os.getpid(), os._exit

def note(code):
    with open(folder + f"/code-{{rank}}", "w") as file:
        file.write(str(code))

def end(code):
    if os.getpid() == own:  # no worker
        note(code)
    end_at_once(code)

log = os.open(folder + f"/rank-{{rank}}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
os.dup2(log, 1)
os.dup2(log, 2)
os._exit = end
sys.argv[0] = {root!r} + "/run_pretraining.py"
sys.path.insert(0, {root!r})
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
    note(0)
except SystemExit as found:
    note(found.code or 0)
    raise
"""
SAVED = "epoch 0 [ 8/"


@dataclass
class Tally:
    """What became of the trials of one kind; `failures` names them."""

    kind: str
    tried: int = 0
    failures: list[str] = field(default_factory=list)

    def add(self, problem: str | None) -> None:
        self.tried += 1
        if problem:
            self.failures.append(problem)
            print(f"FAILED {self.kind}: {problem}", flush=True)

    def row(self) -> str:
        """Return the counts as a row of the table."""
        failed = len(self.failures)
        return f"| {self.kind} | {self.tried} | {self.tried - failed} | {failed} |"


# --------------------------------------------------------------------------------------------------
# Damage


def damaged(rng: random.Random, content: bytes) -> bytes:
    """Return the bytes with one kind of damage, which changes at least one of them."""
    data = bytearray(content)
    at = rng.randrange(len(data))
    length = rng.choice((1, 4, 64, 1000))
    way = rng.choice(("bit", "bit", "bit", "bytes", "cut", "zeros", "insert", "swap", "end"))
    if way == "bit":
        data[at] ^= 1 << rng.randrange(8)
    elif way == "bytes":
        data[at : at + length] = rng.randbytes(len(data[at : at + length]))
    elif way == "cut":
        del data[at:]
    elif way == "zeros":
        data[at : at + length] = bytes(len(data[at : at + length]))
    elif way == "insert":
        data[at:at] = rng.randbytes(length)
    elif way == "swap":
        other = rng.randrange(len(data))
        data[at], data[other] = data[other], data[at]
    else:
        del data[at : at + length]
    return bytes(data)


def pictures() -> dict[str, bytes]:
    """Return one small picture in each format that is read."""
    rng = np.random.default_rng(0)
    pixels = np.kron(rng.integers(0, 255, (9, 11, 3)), np.ones((5, 5, 1))).astype(np.uint8)
    found = {}
    for kind in ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM"):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, kind)
        found[kind] = file.getvalue()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", progressive=True)
    return found | {"JPEG progressive": file.getvalue()}


def try_image(rng: random.Random, folder: Path) -> str | None:
    """An image is decoded, or is a BrokenImageError; its format has no checksum."""
    raw = damaged(rng, rng.choice(list(pictures().values())))
    for read in (decode, lambda raw: open_picture(raw)[1](8)):
        with suppress(BrokenImageError):
            read(raw)
    return None


def try_zip(rng: random.Random, folder: Path) -> str | None:
    """Members of a zip are as they were, or broken images, or the zip is refused by name."""
    members = {f"{kind} {n}.png": raw for n, (kind, raw) in enumerate(pictures().items())}
    path = folder / "train.zip"
    method = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, raw in members.items():
            archive.writestr(name, raw)
    (folder / "train_map.txt").write_text("".join(f"{name}\t0\n" for name in members))
    path.write_bytes(damaged(rng, path.read_bytes()))
    try:
        source = map_source(folder, "train")
    except ValueError as error:
        return None if str(path) in str(error) else f"zip not named: {error}"
    for index, raw in enumerate(members.values()):
        try:
            if source.read(index) != raw:
                return "a member's bytes changed silently"
        except BrokenImageError:
            pass
    return None


def try_map_file(rng: random.Random, folder: Path) -> str | None:
    """A map file is read, or refused with its name; it has no checksum."""
    path = folder / "train_map.txt"
    lines = [f"class {n % 5}/image {n}.jpg\t{n % 5}\n" for n in range(40)]
    path.write_bytes(damaged(rng, "".join(lines).encode()))
    try:
        _, labels = read_map_file(path)
    except ValueError as error:
        return None if str(path) in str(error) else f"map file not named: {error}"
    return None if labels.max() < 10**6 else "a label without limit"


def same(ours: object, theirs: object) -> bool:
    """Return whether nested dicts and lists of tensors are equal to the last bit."""
    if isinstance(ours, torch.Tensor):
        if not isinstance(theirs, torch.Tensor):
            return False
        kinds = (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        return kinds and ours.numpy().tobytes() == theirs.numpy().tobytes()
    if isinstance(ours, dict):
        keys = isinstance(theirs, dict) and ours.keys() == theirs.keys()
        return keys and all(same(value, theirs[key]) for key, value in ours.items())
    if isinstance(ours, (list, tuple)):
        pairs = type(ours) is type(theirs) and len(ours) == len(theirs)
        return pairs and all(map(same, ours, theirs))
    return ours == theirs


def try_file(
    rng: random.Random, path: Path, read: Callable[[Path], object], damage: Path | None = None
) -> str | None:
    """What is read of a damaged file is as it was, or the file is refused by name."""
    damage = damage or path
    whole = damage.read_bytes()
    expected = copy.deepcopy(read(path))  # tensors may be mapped
    damage.write_bytes(damaged(rng, whole))
    try:
        found = read(path)
        unchanged = same(found, expected)
    except ValueError as error:
        return None if str(path.parent) in str(error) else f"file not named: {error}"
    finally:
        damage.write_bytes(whole)
    return None if unchanged else "content changed silently"


def try_checkpoint(rng: random.Random, folder: Path) -> str | None:
    """A checkpoint has checksums."""
    path = folder / "checkpoint-1.pth"
    state = {"model": {"w": torch.arange(400.0), "b": torch.ones(3)}, "epoch": 1}
    save_checkpoint(path, state)
    mmap = rng.random() < 0.5
    return try_file(rng, path, lambda path: load_checkpoint(path, mmap=mmap))


def try_encoder(rng: random.Random, folder: Path) -> str | None:
    """An encoder has a checksum in its metadata."""
    path = folder / "encoder-1.safetensors"
    save_encoder(path, {"w": torch.arange(400.0), "b": torch.ones(3)}, {"model": "x"})
    return try_file(rng, path, load_checkpoint)


def try_cache(rng: random.Random, folder: Path) -> str | None:
    """A feature cache has checksums."""
    path = folder / "train.pth"
    about = {"weights": "1234"}
    vectors = torch.randn(30, 8)
    save_checkpoint(path, {"vectors": vectors, "labels": torch.arange(30), "about": about})

    def read(path: Path) -> object:
        return vars(read_cache(path, about, torch.device("cpu")))

    return try_file(rng, path, read)


def try_parts(rng: random.Random, folder: Path) -> str | None:
    """Part maps and their metadata have checksums beside them."""
    folder = folder / "parts"
    shutil.rmtree(folder, ignore_errors=True)
    PartMapWriter.create(folder, PartMeta(7, (3, 4), 20, scores=SCORES))
    writer = PartMapWriter(folder)
    for index in range(20):
        writer.write(index, np.full((3, 4), index % 7, np.uint8), np.ones((3, 4), np.float16))
    writer.flush()
    writer.seal()

    def read(_path: Path) -> object:
        maps = PartMaps.open(folder)
        return [(maps.read(n).tolist(), maps.read_scores(n).tolist()) for n in range(20)]

    return try_file(rng, folder / "x", read, rng.choice(sorted(folder.iterdir())))


def try_config(rng: random.Random, folder: Path) -> str | None:
    """A config is read, or refused with its name; it has no checksum."""
    path = folder / "config.yaml"
    text = "model: mae_tiny_patch16_224\nepochs: 3\nlr: 0.001\ncrop_scale: [0.2, 1.0]\nblr: null\n"
    path.write_bytes(damaged(rng, text.encode()))
    stderr, sys.stderr = sys.stderr, io.StringIO()
    try:
        parse("pretrain", ["--config", str(path)])
    except SystemExit:
        said = sys.stderr.getvalue()
        return None if "config.yaml" in said or "error: --" in said else f"not named: {said}"
    except ValueError as error:
        return None if "--" in str(error) else f"not named: {error}"
    finally:
        sys.stderr = stderr
    return None


def try_deepspeed_json(rng: random.Random, folder: Path) -> str | None:
    """DeepSpeed's configuration is read, or refused with its name; it has no checksum."""
    path = folder / "ds.json"
    text = json.dumps({"zero_optimization": {"stage": 2}, "gradient_clipping": 1.0}, indent=1)
    path.write_bytes(damaged(rng, text.encode()))
    try:
        read_deepspeed_config(str(path))
    except ValueError as error:
        return None if str(path) in str(error) else f"not named: {error}"
    return None


class _Payload:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


def try_pickle(rng: random.Random, folder: Path) -> str | None:
    """An object in a checkpoint, of any format, does not run: it is refused, or read as inert."""
    mark = folder / "ran"
    path = folder / "checkpoint-1.pth"
    content = {"model": {"w": torch.ones(3)}, rng.choice(("args", "x")): _Payload(mark)}
    if rng.random() < 0.3:
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=rng.random() < 0.5)
    mark.unlink(missing_ok=True)
    try:
        load_checkpoint(path)
    except ValueError as error:
        if str(path) not in str(error):
            return f"not named: {error}"
    return "code ran" if mark.exists() else None


INPUTS = {
    "image bytes": try_image,
    "zip of images": try_zip,
    "map file": try_map_file,
    "checkpoint": try_checkpoint,
    "encoder": try_encoder,
    "feature cache": try_cache,
    "part maps": try_parts,
    "config.yaml": try_config,
    "DeepSpeed JSON": try_deepspeed_json,
    "objects in .pth": try_pickle,
}


def try_inputs(tally: Tally, trial: Callable, seed: int, first: int, last: int) -> None:
    """Make trials first ... last - 1 in one child; what ends the child is a failure too."""
    while first < last:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            _make_trials(trial, seed, first, last, writer)
        os.close(writer)
        with os.fdopen(reader) as answers:
            for line in answers:
                problem = json.loads(line)
                tally.add(problem and f"trial {first}: {problem}")
                first += 1
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if first < last:
            hung = " (hung)" if status == -signal.SIGALRM else ""
            tally.add(f"trial {first} ended the process with {status}{hung}")
            first += 1


def _make_trials(trial: Callable, seed: int, first: int, last: int, writer: int) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MORE_MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # whoever imported this may have its own
    with tempfile.TemporaryDirectory() as folder:
        for number in range(first, last):
            signal.alarm(HANG_SECONDS)
            rng = random.Random(f"{seed} {trial.__name__} {number}")
            try:
                problem = trial(rng, Path(folder))
            except BaseException as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                problem = f"{type(error).__name__}: {error} ({where.filename}:{where.lineno})"
            os.write(writer, (json.dumps(problem and problem[:500]) + "\n").encode())
    os._exit(0)


# --------------------------------------------------------------------------------------------------
# Runs


class Run:
    """One run of a script in children of this process, a group of their own, on `ranks` ranks."""

    count = 0

    def __init__(
        self, script: str, flags: list[str], folder: Path, *, ranks: int = 1, before: Callable = int
    ):
        Run.count += 1
        self.log = folder.with_name(f"{folder.name}.{Run.count}.log")
        self.started = time.monotonic()
        self.pids: list[int] = []
        port = free_port()
        for rank in range(ranks):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
            pid = os.fork()
            if pid == 0:
                os.setpgid(0, self.pids[0] if self.pids else 0)
                self._be(script, [*flags, "--output_dir", str(folder)], place, ranks, before)
            self.pids.append(pid)

    def _be(self, script: str, flags: list[str], place: dict, ranks: int, before: Callable) -> None:
        output = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        if ranks > 1:
            os.environ.update({name: str(value) for name, value in place.items()})
            os.environ["MASTER_ADDR"] = "127.0.0.1"
        code = 1
        try:
            before()
            sys.argv = [script, *flags]
            runpy.run_path(str(ROOT / script), run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def kill(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.pids[0], number)

    def wait(self, seconds: float = 10 * HANG_SECONDS) -> list[int | None]:
        """Return the exit statuses of all ranks, None of one that had to be killed."""
        end = time.monotonic() + seconds
        codes: dict[int, int | None] = {}
        while len(codes) < len(self.pids):
            for pid in set(self.pids) - codes.keys():
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    codes[pid] = os.waitstatus_to_exitcode(status)
            if time.monotonic() > end:
                for pid in set(self.pids) - codes.keys():
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                    codes[pid] = None
            time.sleep(0.02)
        self.kill(signal.SIGKILL)  # workers that are left
        found = [codes[pid] for pid in self.pids]
        # a signal before the script's first line ends it as any program
        unborn = not self.output()
        return [STOPPED if code == -signal.SIGTERM and unborn else code for code in found]

    def waits_for(self, happened: Callable[[], object], seconds: float) -> None:
        """Wait until something has happened, a rank has ended, or the time is over."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and not happened() and all(stat_of(pid) for pid in self.pids):
            time.sleep(0.003)

    def reaches(self, text: str, seconds: float = 2 * HANG_SECONDS) -> bool:
        """Wait until the log has a text; return whether it came."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if text in self.output():
                return True
            time.sleep(0.02)
        return False

    def output(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""


def unlike(ours: Path, theirs: Path) -> str | None:
    """Return what differs between the last checkpoints of two runs and their logs, or None."""
    states = [load_checkpoint(folder / "checkpoint-1.pth") for folder in (ours, theirs)]
    for state in states:
        state.pop("args")
    if not same(*states):
        return "the last checkpoints differ"
    if (ours / "log.txt").read_text() != (theirs / "log.txt").read_text():
        return "log.txt differs"
    left = [path.name for path in ours.iterdir() if path.name.endswith((".tmp", ".lock"))]
    return f"left behind: {left}" if left else None


def disorder(run: Run, codes: list[int | None], number: int) -> str | None:
    """Return what was wrong with how a run ended after a signal, or None."""
    if None in codes:
        return "still there after 30 seconds"
    if number == signal.SIGTERM and not set(codes) <= {0, STOPPED}:
        return f"exit status {codes}: {run.output()[-300:]}"
    return f"traceback: {run.output()[-600:]}" if "Traceback" in run.output() else None


def in_one_sentence(run: Run, codes: list[int | None], *words: str) -> str | None:
    """Return why a run did not end with status 1 and one sentence that has the words, or None."""
    output = run.output()
    if set(codes) != {1}:
        return f"exit status {codes}: {output[-300:]}"
    if "Traceback" in output:
        return f"traceback: {output[-600:]}"
    said = [line for line in output.splitlines() if "error: " in line]
    if not said or not any(all(word in line for word in words) for line in said):
        return f"no sentence with {words}: {output[-300:]}"
    return None


class Laboratory:
    """Folders, data and uninterrupted runs that trials compare with."""

    def __init__(self, folder: Path, seed: int):
        self.folder = folder
        self.rng = random.Random(seed)
        self.count = 0
        self.whole: dict[str, tuple[Path, float]] = {}
        self.flags = {
            "pretrain": ("run_pretraining.py", [*TINY, "--num_workers", "0"], 1),
            "pretrain, 2 workers": ("run_pretraining.py", [*TINY, "--num_workers", "2"], 1),
            "pretrain, a teacher": ("run_pretraining.py", [*TEACHER, "--num_workers", "0"], 1),
            "fine-tune": ("run_class_finetuning.py", [*FINETUNE, "--num_workers", "1"], 1),
            "linear probe": ("run_linear_probing.py", [*LINEAR, "--num_workers", "0"], 1),
            "pretrain, 2 ranks": ("run_pretraining.py", [*TINY, "--num_workers", "0"], 2),
            "pretrain, ZeRO 2 on 2 ranks": (
                "run_pretraining.py",
                [*TINY, "--num_workers", "0", "--enable_deepspeed", "--zero_stage", "2"],
                2,
            ),
        }
        self.data = folder / "data"
        self.data.mkdir()
        members = {f"{n}.png": pictures()["PNG"] for n in range(640)}
        with zipfile.ZipFile(self.data / "whole.zip", "w") as archive:
            for name, raw in members.items():
                archive.writestr(name, raw)
        (self.data / "train_map.txt").write_text("".join(f"{name}\t0\n" for name in members))

    def new(self) -> Path:
        self.count += 1
        return self.folder / f"run{self.count}"

    def start(self, kind: str, folder: Path, *more: str, before: Callable = int) -> Run:
        script, flags, ranks = self.flags[kind]
        return Run(script, [*flags, *more], folder, ranks=ranks, before=before)

    def uninterrupted(self, kind: str) -> tuple[Path, float]:
        """Return the folder of a run that nothing disturbed, and how many seconds it took.

        ValueError if it fails.
        """
        if kind not in self.whole:
            folder = self.new()
            run = self.start(kind, folder)
            codes = run.wait()
            if set(codes) != {0}:
                raise ValueError(f"undisturbed, it ends with {codes}: {run.output()[-600:]}")
            self.whole[kind] = folder, time.monotonic() - run.started
        return self.whole[kind]

    # -- kills and signals

    def kills(self, kind: str, count: int, number: int = signal.SIGKILL) -> Iterator[str | None]:
        """A run that is killed up to four times, or asked to stop, ends as one that was not.

        Yields an outcome for each signal that came before the end of its run, `count` in all.
        """
        try:
            whole, seconds = self.uninterrupted(kind)
        except ValueError as error:
            yield str(error)
            return
        while count > 0:
            folder = self.new()
            hits = 0
            problem = None
            for _ in range(min(4, count)):
                run = self.start(kind, folder)
                self.await_moment(run, folder, seconds)
                run.kill(number)
                codes = run.wait(30)
                problem = disorder(run, codes, number)
                if problem or set(codes) == {0}:
                    break
                hits += 1
            if not problem:
                run = self.start(kind, folder)
                codes = run.wait()
                problem = unlike(folder, whole) if set(codes) == {0} else run.output()[-600:]
            count -= max(hits, 1)
            yield from [None] * (hits - 1)
            if hits or problem:
                yield problem
            if not problem:
                shutil.rmtree(folder)

    def await_moment(self, run: Run, folder: Path, seconds: float) -> None:
        """Wait for any moment of a run, or for one of those at which much happens."""
        temporary = set(folder.glob(".*.tmp"))
        saved = set(folder.glob("*.pth"))
        last = r"\[ *(\d+)/\1[\] ]"
        moments = {
            "any": lambda: False,
            "start": lambda: False,
            "while saving": lambda: set(folder.glob(".*.tmp")) - temporary,
            "after a save": lambda: set(folder.glob("*.pth")) - saved,
            "end of an epoch": lambda: re.search(last, run.output()),
        }
        moment = self.rng.choice(list(moments))
        shares = {"any": (0.0, 0.7), "start": (0.0, 0.3)}
        limit = self.rng.uniform(*shares[moment]) if moment in shares else 2
        run.waits_for(moments[moment], 0.02 + limit * seconds)
        time.sleep(self.rng.choice((0, 0.002, 0.02)))

    def rank_killed(self) -> str | None:
        """When one of two ranks is killed, the other one says so and ends within 60 seconds."""
        folder = self.new()
        run = self.start("pretrain, 2 ranks", folder, "--epochs", "500")
        if not run.reaches("epoch 0 [ 4/"):
            return run.output()[-300:]
        dead = self.rng.randrange(2)
        os.kill(run.pids[dead], signal.SIGKILL)
        codes = run.wait(60)
        if codes[1 - dead] != 1:
            return f"exit status {codes}: {run.output()[-300:]}"
        said = f"rank {dead} (" in run.output() and "has ended" in run.output()
        return None if said and "Traceback" not in run.output() else run.output()[-600:]

    # -- surroundings

    def worker_killed(self) -> str | None:
        """A loader worker that is killed ends the run in a sentence."""
        run = self.start("pretrain, 2 workers", self.new(), "--epochs", "500")
        if not run.reaches("epoch 0 [ 4/"):
            return run.output()[-300:]
        children = Path(f"/proc/{run.pids[0]}/task/{run.pids[0]}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        return in_one_sentence(run, run.wait(), "a worker that loads images")

    def zip_cut(self) -> str | None:
        """A zip that is cut under a run ends it in a sentence."""
        shutil.copy(self.data / "whole.zip", self.data / "train.zip")
        workers = self.rng.choice(("0", "2"))
        data = ("--data_set", "IMNET", "--data_path", str(self.data), "--num_workers", workers)
        run = self.start("pretrain", self.new(), *data, "--epochs", "500")
        if not run.reaches("epoch 0 [ 4/"):
            return run.output()[-300:]
        os.truncate(self.data / "train.zip", self.rng.choice((0, 100, 30000)))
        return in_one_sentence(run, run.wait(), "images are broken", "train.zip")

    def folder_lost(self) -> str | None:
        """A run whose output folder is removed or moved ends in a sentence, and saves before."""
        folder = self.new()
        run = self.start("pretrain", folder, "--epochs", "500")
        if not run.reaches("epoch 0 [ 8/"):
            return run.output()[-300:]
        folder.rename(self.new())
        problem = in_one_sentence(run, run.wait(), "was removed, moved")
        return problem or (None if list(folder.glob("checkpoint-*.pth")) else "nothing was saved")

    def second_run(self) -> str | None:
        """A second run in one folder is refused with the first one's process."""
        folder = self.new()
        first = self.start("pretrain", folder, "--epochs", "500")
        if not first.reaches("epoch 0 [ 4/"):
            return first.output()[-300:]
        second = Run("run_pretraining.py", [*TINY, "--num_workers", "0"], folder)
        second.wait()
        problem = None
        if f"in use by another run: process {first.pids[0]} on" not in second.output():
            problem = second.output()[-300:]
        first.kill(signal.SIGTERM)
        codes = first.wait()
        return problem or (None if codes == [STOPPED] else f"first run: {codes}")

    def not_writable(self) -> str | None:
        """An output folder that is a file is refused in a sentence that names the flag."""
        folder = self.new()
        folder.write_text("")
        run = self.start("pretrain", folder)
        return in_one_sentence(run, run.wait(), "--output_dir", str(folder))

    def disk_full(self) -> str | None:
        """A disk that fills up is named, and files that were whole stay so."""
        folder = self.new()
        folder.mkdir()
        mounted = ["mount", "-t", "tmpfs", "-o", f"size={self.rng.randrange(300, 1500)}k"]
        can = subprocess.run([*mounted, "unimim", str(folder)], capture_output=True)
        if can.returncode:
            return "no right to mount a small disk: run as root"
        try:
            run = self.start("pretrain", folder)
            problem = in_one_sentence(run, run.wait(), "the disk is full")
            for path in folder.glob("checkpoint-*.pth"):
                load_checkpoint(path)
            return problem
        finally:
            subprocess.run(["umount", str(folder)], check=True)

    def few_open_files(self) -> str | None:
        """A limit of open files that is too low for the workers is named."""

        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (48, 48))

        run = self.start("pretrain", self.new(), "--num_workers", "16", before=limit)
        return in_one_sentence(run, run.wait(), "too many open files")

    # -- launchers

    def launched(
        self, launcher: str, whom: str, number: int = signal.SIGTERM, *, at_start: bool = False
    ) -> str | None:
        """A signal to a launcher, to its group or to one rank: saved, the ranks end with 0, and all
        processes are gone in 30 seconds.

        At the start there is nothing to save. The status of the launcher's own command is printed.
        """
        folder = self.new()
        folder.mkdir()
        program = folder / "rank.py"
        program.write_text(RANK.format(root=str(ROOT), folder=str(folder)))
        flags = [*TINY, "--num_workers", "1", "--epochs", "500", "--output_dir", str(folder)]
        flags += ["--stop_status", "0"]
        commands = {
            "torchrun": ["-m", "torch.distributed.run", "--nproc_per_node=2"],
            "deepspeed": ["-m", "deepspeed.launcher.runner", "--num_gpus", "2"],
        }
        port = ["--master_port", str(free_port())]
        zero = ["--enable_deepspeed", "--zero_stage", "1"] if launcher == "deepspeed" else []
        command = [sys.executable, *commands[launcher], *port, str(program)]
        log = folder.with_name(f"{folder.name}.log")
        logs = [folder / f"rank-{rank}.log" for rank in range(2)]

        def said() -> str:
            return "".join(log.read_text(errors="replace") for log in logs if log.exists())

        bin_folder = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        with open(log, "w") as output:
            process = subprocess.Popen(
                [*command, *flags, *zero], stdout=output, stderr=output, cwd=ROOT,
                start_new_session=True,
                env=os.environ | {"PYTHONUNBUFFERED": "1", "PATH": bin_folder},
            )  # fmt: skip
        tree = {}
        try:
            end = time.monotonic() + 180
            began = (lambda: all(map(Path.exists, logs))) if at_start else lambda: SAVED in said()
            while not began():
                if process.poll() is not None or time.monotonic() > end:
                    return f"did not start: {log.read_text(errors='replace')[-300:]}{said()[-300:]}"
                time.sleep(0.1)
            time.sleep(self.rng.uniform(0, 4 if at_start else 0.5))
            tree = tree_of(process.pid)
            ranks = ranks_of(tree)
            if len(ranks) != 2:
                return f"ranks {ranks} among {tree}"
            if whom == "launcher":
                process.send_signal(number)
            elif whom == "group":
                os.killpg(process.pid, number)
            else:
                os.kill(self.rng.choice(ranks), number)
            end = time.monotonic() + 30
            while left := left_of(tree):
                process.poll()
                if time.monotonic() > end:
                    return f"still there: {left}: {said()[-300:]}"
                time.sleep(0.1)
            notes = [folder / f"code-{rank}" for rank in range(2)]
            codes = [note.read_text() if note.exists() else "none" for note in notes]
            print(
                f"{launcher}, {signal.Signals(number).name} to the {whom}: ranks {codes}, "
                f"the command {process.wait()}",
                flush=True,
            )
            if ("stopped by" if at_start else "after step") not in said():
                return f"no orderly stop: {said()[-600:]}"
            if "Traceback" in said() or codes != ["0", "0"]:
                return f"ranks end with {codes}: {said()[-600:]}"
            saved = at_start or list(folder.glob("checkpoint-0-*.pth"))
            return None if saved else "nothing was saved"
        finally:
            for pid in left_of(tree or tree_of(process.pid)):
                os.kill(pid, signal.SIGKILL)
            process.wait()


def stat_of(pid: int) -> list[str]:
    """Return the fields of a process after its name, empty for one that has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
    return [] if fields[0] in "ZX" else fields


def tree_of(root: int) -> dict[int, str]:
    """Return a process and all below it, each with the time of its start."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (fields := stat_of(int(entry.name))):
            parents[int(entry.name)] = int(fields[1])
    found = {root}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return {pid: stat_of(pid)[19] for pid in found if stat_of(pid)}


def left_of(tree: dict[int, str]) -> list[int]:
    """Return the processes of a tree that have not ended."""
    return [pid for pid, start in tree.items() if (found := stat_of(pid)) and found[19] == start]


def ranks_of(tree: dict[int, str]) -> list[int]:
    """Return the training processes among those of a launcher, without their workers."""

    def trains(pid: int) -> bool:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
        return any(word.endswith("rank.py") for word in words[1:4])

    return [pid for pid in left_of(tree) if trains(pid) and not trains(int(stat_of(pid)[1]))]


# --------------------------------------------------------------------------------------------------
# All of it


def trials_of_runs(
    laboratory: Laboratory, kills: int
) -> dict[str, Callable[[], Iterator[str | None]]]:
    """Return what gives the outcomes of a round of trials, by the kinds of the table."""
    each = -(-kills // len(laboratory.flags))

    def once(trial: Callable, *arguments: object, **options: object) -> Callable:
        return lambda: iter([trial(*arguments, **options)])

    found: dict[str, Callable[[], Iterator[str | None]]] = {}
    for kind in laboratory.flags:
        found[f"SIGKILL: {kind}"] = lambda kind=kind: laboratory.kills(kind, each)
    for kind in laboratory.flags:
        found[f"SIGTERM: {kind}"] = lambda kind=kind: laboratory.kills(kind, 3, signal.SIGTERM)
    found |= {
        "one of 2 ranks killed": once(laboratory.rank_killed),
        "a worker killed": once(laboratory.worker_killed),
        "zip cut while read": once(laboratory.zip_cut),
        "output folder moved": once(laboratory.folder_lost),
        "second run in a folder": once(laboratory.second_run),
        "output_dir is a file": once(laboratory.not_writable),
        "disk full": once(laboratory.disk_full),
        "too many open files": once(laboratory.few_open_files),
    }
    for launcher in ("torchrun", "deepspeed"):
        for whom in ("launcher", "group", "rank"):
            name = f"SIGTERM: {launcher}, to the {whom}"
            found[name] = once(laboratory.launched, launcher, whom)
        found[f"SIGINT: {launcher}, to the group"] = once(
            laboratory.launched, launcher, "group", signal.SIGINT
        )
        found[f"SIGTERM at the start: {launcher}, to the launcher"] = once(
            laboratory.launched, launcher, "launcher", at_start=True
        )
    return found


@contextmanager
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="torture-") as folder:
        yield Path(folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=60, help="after which nothing new begins")
    parser.add_argument("--inputs", type=int, default=2000, help="damaged inputs, of all kinds")
    parser.add_argument("--kills", type=int, default=28, help="of runs in a round, of all kinds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only",
        nargs="+",
        default=[""],
        metavar="TEXT",
        help="only kinds whose names contain one of these",
    )
    parser.add_argument("--rounds", type=int, default=1000, help="of runs, at most")
    args = parser.parse_args()
    torch.set_num_threads(1)
    end = time.monotonic() + 60 * args.minutes
    tallies = torture(args, end)
    print(table(tallies))
    sys.exit(1 if any(tally.failures for tally in tallies) else 0)


def torture(args: Namespace, end: float) -> list[Tally]:
    """Return the tallies of all kinds; first damaged inputs, then rounds of runs until `end`."""

    def chosen(kind: str) -> bool:
        return any(text in kind for text in args.only)

    tallies = {}
    inputs = {kind: trial for kind, trial in INPUTS.items() if chosen(kind)}
    for kind, trial in inputs.items():
        tallies[kind] = Tally(kind)
        each = -(-args.inputs // len(inputs))
        for first in range(0, each, 100):
            if time.monotonic() < end:
                try_inputs(tallies[kind], trial, args.seed, first, min(first + 100, each))
        print(tallies[kind].row(), flush=True)
    with scratch() as folder:
        runs = trials_of_runs(Laboratory(folder, args.seed), args.kills)
        runs = {kind: trials for kind, trials in runs.items() if chosen(kind)}
        for _ in range(args.rounds if runs else 0):
            for kind, trials in runs.items():
                if time.monotonic() > end:
                    return list(tallies.values())
                for problem in trials():
                    tallies.setdefault(kind, Tally(kind)).add(problem)
                    if time.monotonic() > end:
                        break
                print(tallies[kind].row(), flush=True)
    return list(tallies.values())


def table(tallies: list[Tally]) -> str:
    """Return the counts as a table in Markdown, with a row of sums."""
    lines = ["| kind | tried | held | failed |", "|---|---|---|---|"]
    lines += [tally.row() for tally in tallies]
    tried = sum(tally.tried for tally in tallies)
    failed = sum(len(tally.failures) for tally in tallies)
    return "\n".join([*lines, f"| all | {tried} | {tried - failed} | {failed} |"])


if __name__ == "__main__":
    main()
