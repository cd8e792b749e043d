"""Files that appear whole or not at all: many writers in one folder, killed ones, and what these
leave behind."""

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from unimim import files

ROOT = Path(__file__).resolve().parents[2]
WRITER = """
import sys
from unimim import files
name, count, text = sys.argv[1], int(sys.argv[2]), sys.argv[3]
for _ in range(count):
    files.write_text(name, text * 1000)
"""


def run_writer(path: Path, count: int, text: str) -> subprocess.Popen:
    command = [sys.executable, "-c", WRITER, str(path), str(count), text]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def ended_process() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_writers_of_one_folder_and_of_one_name_do_not_touch_each_other(tmp_path):
    writers = [
        run_writer(tmp_path / name, 150, text)
        for name, text in (("a", "1"), ("b", "2"), ("a", "3"))
    ]
    assert [(writer.communicate()[1], writer.returncode) for writer in writers] == [("", 0)] * 3
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}
    assert (tmp_path / "a").read_text() in ("1" * 1000, "3" * 1000) and (
        tmp_path / "b"
    ).read_text() == "2" * 1000


def test_only_drafts_that_nobody_writes_any_more_are_removed(tmp_path):
    here, gone, two_days_ago = files.machine(), ended_process(), time.time() - 2 * 24 * 3600
    stay = [
        f".a.pth.{here}-{os.getpid()}-00000000.tmp",
        f".a.pth.00000000-{gone}-00000000.tmp",
        ".other.tmp",
        "b.tmp",
    ]
    go = [
        f".a.pth.{here}-{gone}-00000001.tmp",
        f".a.pth.00000000-{gone}-00000001.tmp",
        ".a.pth.tmp",
    ]
    for name in (*stay, *go):
        (tmp_path / name).touch()
    for name in (*go[1:], "b.tmp"):
        os.utime(tmp_path / name, (two_days_ago, two_days_ago))
    (tmp_path / f".folder.{here}-{gone}-00000002.tmp" / "inside").mkdir(parents=True)
    files.write_text(tmp_path / "new", "")
    assert {path.name for path in tmp_path.iterdir()} == {*stay, "new"}


@dataclass
class Row:
    name: str
    value: float


def test_text_and_rows_come_back(tmp_path):
    files.write_text(tmp_path / "sub" / "a.txt", "ü\n")
    assert (tmp_path / "sub" / "a.txt").read_bytes() == b"\xc3\xbc\n"
    files.write_rows(tmp_path / "rows.csv", [Row("a,b", 0.5), Row("c", 1.0)])
    assert (tmp_path / "rows.csv").read_text() == 'name,value\n"a,b",0.5\nc,1.0\n'


def test_a_folder_that_could_not_be_finished_is_not_there(tmp_path):
    def half(draft: Path) -> None:
        (draft / "first").touch()
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        files.write_folder(tmp_path / "data", half)
    assert list(tmp_path.iterdir()) == []
    files.write_folder(tmp_path / "data", lambda draft: (draft / "first").touch())
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["first"]


def test_checksums(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert files.file_sha256(tmp_path / "abc").startswith("ba7816bf8f01cfea")
    with pytest.raises(ValueError, match="absent cannot be read: No such file"):
        files.file_sha256(tmp_path / "absent")
