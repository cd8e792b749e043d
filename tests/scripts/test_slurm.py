"""scripts/slurm.sh with stand-ins for Slurm's programs, and the Dockerfile."""

import os
import re
import subprocess
from pathlib import Path

import pytest
from helpers import ROOT


def program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def slurm(folder: Path, status: int, *words: str, **environment: str):
    """Run a copy of the script, as Slurm does; srun ends with `status`."""
    program(folder / "bin/srun", f'echo "srun $PWD $@"; exit {status}')
    program(folder / "bin/scontrol", 'echo "scontrol $@"')
    (folder / "env/bin").mkdir(parents=True, exist_ok=True)
    (folder / "env/bin/activate").write_text("echo activated\n")
    copy = folder / "slurm_script"
    copy.write_text((ROOT / "scripts/slurm.sh").read_text())
    environment = {"PATH": f"{folder}/bin:{os.defpath}", "VENV": str(folder / "env")} | environment
    command = ["bash", str(copy), *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(("status", "queued"), [(0, False), (1, False), (75, True)])
def test_a_stopped_run_is_queued_again_and_no_other(tmp_path, status, queued):
    job = {"SLURM_JOB_ID": "12", "SLURM_SUBMIT_DIR": str(ROOT)}
    done = slurm(tmp_path, status, "run_pretraining.py", "--seed", "a b", **job)
    lines = done.stdout.splitlines()
    assert done.returncode == status, done.stderr
    assert lines[:2] == [
        "activated",
        f"srun {ROOT} --kill-on-bad-exit=1 python run_pretraining.py --seed a b --stop_status 75",
    ]
    assert lines[2:] == (["scontrol requeue 12"] if queued else [])


def test_only_what_trains_is_told_a_status(tmp_path):
    job = {"SLURM_JOB_ID": "12", "SLURM_SUBMIT_DIR": str(ROOT)}
    judges = ("run_knn.py", "run_robustness.py")
    trains = {path.name for path in ROOT.glob("run_*.py")}.difference(judges)
    for script in (*trains, "semantic_segmentation/voc_linear_probe.py"):
        done = slurm(tmp_path, 0, script, **job)
        assert done.stdout.endswith(f"python {script} --stop_status 75\n")
    for script in (*judges, "semantic_segmentation/train.py", "analysis/cka.py"):
        assert slurm(tmp_path, 0, script, **job).stdout.endswith(f"python {script}\n")


def test_it_says_how_it_is_started(tmp_path):
    assert "start this script by sbatch" in slurm(tmp_path, 0, "run_pretraining.py").stderr
    job = {"SLURM_JOB_ID": "12", "SLURM_SUBMIT_DIR": str(ROOT)}
    assert "name a script and its flags" in slurm(tmp_path, 0, **job).stderr


def test_the_dockerfile_takes_the_versions_of_the_requirements():
    """What it copies before the code is all that "make venv" reads; torch, which may come from
    another index, is the required one."""
    text = (ROOT / "scripts/tools/Dockerfile").read_text()
    copied = re.search(r"^COPY --chown=unimim (Makefile .*) \./$", text, re.M)[1].split()
    stamp = re.search(r"^\$\(STAMP\): (.*)$", (ROOT / "Makefile").read_text(), re.M)[1].split()
    assert sorted(copied) == sorted(["Makefile", *stamp])
    command = re.search(r"\$\((grep .*?)\)", text)[1]
    done = subprocess.run(["sh", "-c", command], cwd=ROOT, capture_output=True, text=True)
    first, second = done.stdout.splitlines()
    assert first.startswith("torch~=") and second.startswith("torchvision~=")
    ignored = (ROOT / "scripts/tools/Dockerfile.dockerignore").read_text().splitlines()
    assert ".venv" in ignored and not {"requirements.txt", "tests", ".git"} & set(ignored)


@pytest.mark.parametrize(
    ("chosen", "asked"),
    [("", "test JOBS=3"), ("not slow", "-m 'not slow' test JOBS=3"), ("none", "")],
)
def test_the_dockerfile_runs_make_test(chosen, asked, tmp_path):
    """Its own command, with programs that only print what they are asked for."""
    (tmp_path / ".venv").mkdir()
    for name, line in (("make", 'echo "$PYTEST_ADDOPTS $*"'), ("nproc", "echo 3")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    text = (ROOT / "scripts/tools/Dockerfile").read_text()
    command = re.search(r"^RUN (touch .*?fi)$", text, re.M | re.S)[1].replace("\\\n", " ")
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "TESTS": chosen}
    done = subprocess.run(
        ["sh", "-c", command], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout.strip()) == (0, asked), done.stderr
