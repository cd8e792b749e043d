"""One run at a time in an output folder: refused by name, taken over from what has ended."""

import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from unimim.engine import lock as locks
from unimim.engine.lock import FolderLock, Owner, lock_folder, locks_allowed, lost_folder


def write(folder: Path, owner: Owner) -> None:
    (folder / locks.NAME).write_text(json.dumps(vars(owner)))


@pytest.fixture
def other():
    """Another process of this machine, that goes on until the test's end."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield replace(Owner.here(), pid=process.pid, started=locks._start_of(process.pid), token="a")
    process.communicate(b"\n")


def test_a_second_run_is_refused_with_the_first_ones_host_and_process(tmp_path, other):
    write(tmp_path, other)
    says = rf"--output_dir {tmp_path} is in use by another run: process {other.pid} on {other.host}"
    with pytest.raises(ValueError, match=says):
        FolderLock(tmp_path).acquire()
    assert [path.name for path in tmp_path.iterdir()] == [locks.NAME]


@pytest.mark.parametrize("change", [{"started": "1"}, {"boot": "an earlier one"}, {"pid": 2**22}])
def test_a_lock_of_what_has_ended_is_taken_over(tmp_path, other, change, caplog):
    write(tmp_path, replace(other, **change))
    mine = FolderLock(tmp_path)
    mine.acquire()
    assert mine.held() and f"taken over from process {change.get('pid', other.pid)}" in caplog.text
    mine.release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", "[]", "{}", "not JSON"])
def test_a_damaged_lock_is_no_obstacle(tmp_path, text):
    (tmp_path / locks.NAME).write_text(text)
    mine = FolderLock(tmp_path)
    mine.acquire()
    assert mine.held()
    mine.release()


@pytest.mark.parametrize("alive", [True, False])
def test_another_hosts_run_counts_as_long_as_it_touches_its_lock(
    tmp_path, other, alive, monkeypatch
):
    write(tmp_path, replace(other, host="node7", machine="elsewhere"))
    monkeypatch.setattr(locks, "SILENT_SECONDS", 3)
    sleep = locks.time.sleep

    def seen(seconds):
        sleep(seconds)
        if alive:
            os.utime(tmp_path / locks.NAME, (1, 1))

    monkeypatch.setattr(locks.time, "sleep", seen)
    mine = FolderLock(tmp_path)
    if alive:
        with pytest.raises(ValueError, match=rf"process {other.pid} on node7"):
            mine.acquire()
    else:
        mine.acquire()
        assert mine.held()
        mine.release()


def test_a_lock_is_a_commands_and_its_loss_ends_it(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(locks, "TOUCH_SECONDS", 0.05)
    monkeypatch.setattr(locks.log, "propagate", True)
    asked = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    folder = tmp_path / "out"
    folder.mkdir()
    lock_folder(folder)  # a call within a larger program
    assert not list(folder.iterdir())
    try:
        with locks_allowed():
            lock_folder(folder)
            assert (folder / locks.NAME).exists()
            assert not asked.wait(0.2) and not lost_folder()
            folder.rename(tmp_path / "moved")
            folder.mkdir()
            assert asked.wait(10) and lost_folder()
            assert f"--output_dir {folder} was removed, moved or taken" in caplog.text
        assert list(folder.iterdir()) == [] and not lost_folder()
    finally:
        signal.signal(signal.SIGTERM, before)


def test_file_systems_without_links(tmp_path, other, monkeypatch):
    def no_links(*_):
        raise PermissionError

    monkeypatch.setattr(os, "link", no_links)
    mine = FolderLock(tmp_path)
    mine.acquire()
    assert mine.held()
    mine.release()
    write(tmp_path, other)
    with pytest.raises(ValueError, match="in use by another run"):
        FolderLock(tmp_path).acquire()
