"""Long lists of files in arrays: what map files list and what zip archives hold, read without an
object for each line.

Workers that fork share arrays; Python's strings are copied as they are counted, and take several
times the memory.
"""

import mmap
import os
import re
import struct
import zipfile
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
ARRAY_EXTENSION = ".npy"  # images in a folder that has no others
BLOCK_BYTES, BLOCK_ROWS = 2**24, 2**18  # what is worked on at a time
LONGEST_LABEL = 6  # digits that are read quickly
LARGEST_LABEL = 10**LONGEST_LABEL - 1  # a list of classes is made up to the largest
_BOM = b"\xef\xbb\xbf"
_TAB, _NEWLINE, _SPACE, _HASH, _ZERO, _SLASH, _DOT = b"\t\n #0/."
_NONE32 = 0xFFFFFFFF  # a zip's field of 32 bits whose value is in the zip64 extra field


class PathTable:
    """A list of strings in two arrays, which forked workers share: the bytes of all, and where each
    one ends."""

    def __init__(self, paths: Iterable[str]):
        encoded = [os.fsencode(path) for path in paths]
        self.ends = np.cumsum([len(path) for path in encoded], dtype=np.int64)
        self.text = np.frombuffer(b"".join(encoded), dtype=np.uint8)

    @classmethod
    def of_arrays(cls, text: np.ndarray, ends: np.ndarray) -> "PathTable":
        """The strings whose bytes are `text` [bytes] uint8 and that end before `ends` [N] int64."""
        table = cls.__new__(cls)
        table.text, table.ends = text, ends
        return table

    @property
    def starts(self) -> np.ndarray:
        return self.ends - np.diff(self.ends, prepend=0)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        start = self.ends[index - 1] if index else 0
        return os.fsdecode(self.text[start : self.ends[index]].tobytes())


def _cut_out(data: np.ndarray, begin: np.ndarray, end: np.ndarray) -> np.ndarray:
    """The bytes of the spans begin ... end - 1, one after another; spans ascend, and no two begin
    or end together."""
    mark = np.zeros(len(data) + 1, dtype=np.int8)
    mark[begin] += 1
    mark[end] -= 1
    return data[np.cumsum(mark[:-1], dtype=np.int8).view(bool)]


def _table_of_spans(data: np.ndarray, begin: np.ndarray, end: np.ndarray) -> PathTable:
    pieces = []
    for first in range(0, len(begin), BLOCK_ROWS):
        b, e = begin[first : first + BLOCK_ROWS], end[first : first + BLOCK_ROWS]
        pieces.append(_cut_out(data[b[0] : e[-1]], b - b[0], e - b[0]))
    text = np.concatenate([np.empty(0, dtype=np.uint8), *pieces])
    return PathTable.of_arrays(text, np.cumsum(end - begin, dtype=np.int64))


def _strip(data: np.ndarray, begin: np.ndarray, end: np.ndarray, bytes_: tuple[int, ...]) -> None:
    """Narrow the spans, in place, as long as they begin or end with one of the bytes."""
    drop = np.zeros(256, dtype=bool)
    drop[list(bytes_)] = True
    for edge, offset, step in ((begin, 0, 1), (end, -1, -1)):
        rows = np.flatnonzero(begin < end)
        while len(rows := rows[drop[data[edge[rows] + offset]]]):
            edge[rows] += step
            rows = rows[begin[rows] < end[rows]]


# --- map files ------------------------------------------------------------------------------------


def read_map_file(path: Path, allow_outside: bool = False) -> tuple[PathTable, np.ndarray]:
    """Return the names and int64 labels of a map file: one "path label" a line, separated by a tab
    or by the last white space.

    Paths may hold spaces; blank lines and lines that start with # are skipped, as is a byte order
    mark. Absolute paths and those with ".." are read only where `allow_outside` is set.

    Raises:
        ValueError: naming file and line: no file, no lines, not two columns, a label that is no
            class number, or a path that leads out of the images' folder.
    """
    text, lengths, labels, line = bytearray(), [], [], 1
    try:
        with open(path, "rb") as file:
            while block := file.read(BLOCK_BYTES) + file.readline():
                block = block.removeprefix(_BOM) if line == 1 else block
                if b"\r" in block:
                    block = block.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
                data = np.frombuffer(block, dtype=np.uint8)
                begin, end, numbers = _map_rows(block, data, path, line, allow_outside)
                text += _cut_out(data, begin, end).data
                lengths.append(end - begin)
                labels.append(numbers)
                line += block.count(b"\n")
    except OSError as error:
        raise ValueError(f"map file {path} cannot be read: {error.strerror}") from error
    if not text:
        raise ValueError(f"map file {path} lists no image; each line must be 'path label'")
    ends = np.cumsum(np.concatenate(lengths), dtype=np.int64)
    return PathTable.of_arrays(np.frombuffer(text, dtype=np.uint8), ends), np.concatenate(labels)


def _map_rows(
    block: bytes, data: np.ndarray, path: Path, first_line: int, allow_outside: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return where the names of a block of lines begin and end, and their labels.

    Lines of printable ASCII with one tab or with a space before their label are done together. All
    others, those with a mistake among them, are left to `_map_fields`.
    """
    breaks = np.flatnonzero(data == _NEWLINE)
    begin, end = np.concatenate(([0], breaks + 1)), np.concatenate((breaks, [len(data)]))
    odd = (data >= 127) | ((data < _SPACE) & (data != _TAB) & (data != _NEWLINE))
    special = np.zeros(len(begin), dtype=bool)
    special[np.searchsorted(breaks, np.flatnonzero(odd))] = True
    del odd
    if not allow_outside:
        dots = np.flatnonzero((data[:-1] == _DOT) & (data[1:] == _DOT))
        special[np.searchsorted(breaks, dots)] = True
    _strip(data, begin, end, (_SPACE, _TAB))
    lines = np.flatnonzero(begin < end)
    lines = lines[data[begin[lines]] != _HASH]
    begin, end, special = begin[lines], end[lines], special[lines]
    if not allow_outside:
        special |= data[begin] == _SLASH

    # the separator: a tab, else the last space
    tabs = np.append(np.flatnonzero(data == _TAB), len(data))
    spaces = np.append(-1, np.flatnonzero(data == _SPACE))
    tab = np.searchsorted(tabs, begin)
    count = np.searchsorted(tabs, end) - tab
    separator = np.where(count > 0, tabs[tab], spaces[np.searchsorted(spaces, end) - 1])
    special |= (count > 1) | (separator < begin)
    separator[special] = begin[special]
    name_end, label_begin = separator.copy(), np.minimum(separator + 1, end)
    _strip(data, begin.copy(), name_end, (_SPACE,))
    _strip(data, label_begin, end.copy(), (_SPACE,))

    # what ends in a number might be a name and a second column
    ends_in_digit = ~special & (data[name_end - 1] - _ZERO <= 9)
    with_space = np.searchsorted(spaces, name_end) > np.searchsorted(spaces, begin)
    special |= ends_in_digit & with_space

    length = end - label_begin
    special |= length > LONGEST_LABEL
    labels = np.zeros(len(begin), dtype=np.int64)
    rows = np.flatnonzero(~special)
    for place in range(int(length[rows].max(initial=0))):
        rows = rows[length[rows] > place]
        digit = data[label_begin[rows] + place] - _ZERO  # wraps around: what is no digit is above 9
        special[rows[digit > 9]] = True
        labels[rows] = 10 * labels[rows] + digit

    used = np.ones(len(begin), dtype=bool)
    for row in np.flatnonzero(special):
        text = block[begin[row] : end[row]].decode("utf-8", "surrogateescape")
        if not text.strip() or text.lstrip().startswith("#"):
            used[row] = False
            continue
        try:
            name, labels[row] = _map_fields(text.strip(), allow_outside)
        except ValueError as error:
            raise ValueError(f"{path}, line {first_line + lines[row]}: {error}") from error
        begin[row] += len(text[: len(text) - len(text.lstrip())].encode("utf-8", "surrogateescape"))
        name_end[row] = begin[row] + len(name.encode("utf-8", "surrogateescape"))
    return begin[used], name_end[used], labels[used]


def _map_fields(line: str, allow_outside: bool = False) -> tuple[str, int]:
    if "\0" in line:
        raise ValueError("a zero byte; the file must be text in UTF-8 (UTF-16 has such bytes)")
    fields = [field.strip() for field in line.split("\t")] if "\t" in line else line.rsplit(None, 1)
    if len(fields) == 1:
        raise ValueError(f"'{line}' has no label; write 'path label'")
    if len(fields) > 2 or _ends_in_number(fields[0]):
        raise ValueError(f"'{line}' has a third column; write 'path label'")
    name, label = fields
    digits = label.lstrip("0") or label[-1:]
    if not (label.isascii() and label.isdigit()):
        raise ValueError(f"label '{label[:40]}' of '{name}' is not an integer from 0 on")
    if len(digits) > LONGEST_LABEL:
        raise ValueError(
            f"label {digits[:40]} of '{name}' is above {LARGEST_LABEL}; labels are class numbers"
        )
    if not allow_outside and (name.startswith("/") or ".." in name.split("/")):
        raise ValueError(
            f"'{name}' leads out of the folder of the images; write paths below it, or give "
            "--allow_outside"
        )
    return name, int(digits)


def _ends_in_number(name: str) -> bool:
    """Whether a complete image name is followed by a number, which is then a column and not part of
    the name."""
    head, _, tail = name.rpartition(" ")
    return tail.strip().isdigit() and head.rstrip().lower().endswith(IMAGE_EXTENSIONS)


def split_archive(map_file: Path, names: PathTable) -> tuple[Path | None, PathTable]:
    """The archive that the lines name by an `x.zip@/` prefix (None without one) and the names
    inside it.

    Raises:
        ValueError: lines that name different archives, or of which only some name one.
    """
    if re.search(rb"\.zip@", names.text) is None:
        return None, names
    prefix = os.fsencode(names[0]).partition(b"@")[0] + b"@"
    begin, end = names.starts, names.ends.copy()
    alike = prefix.endswith(b".zip@") and bool((end - begin >= len(prefix)).all())
    if alike and all(
        (names.text[begin + place] == byte).all() for place, byte in enumerate(prefix)
    ):
        begin += len(prefix)
        _strip(names.text, begin, end, (_SLASH,))
        return map_file.parent / os.fsdecode(prefix[:-1]), _table_of_spans(names.text, begin, end)
    listed = [names[index] for index in range(len(names))]
    archives = {name.partition("@")[0] if ".zip@" in name else "" for name in listed}
    if archives == {""}:  # the end of one name and the beginning of the next
        return None, names
    if len(archives) > 1:
        raise ValueError(
            f"{map_file} mixes images of several places: {sorted(archives)[:3]}; keep to one"
        )
    inside = PathTable(name.partition("@")[2].strip("/") for name in listed)
    return map_file.parent / archives.pop(), inside


# --- zip archives ---------------------------------------------------------------------------------


@dataclass
class ZipMembers:
    """What a zip's central directory says of its members, in order; all arrays int64 [N]."""

    names: PathTable
    offset: np.ndarray  # of the local header
    packed_size: np.ndarray
    size: np.ndarray
    method: np.ndarray
    crc: np.ndarray  # CRC-32 of the unpacked bytes


def zip_members(archive: Path) -> ZipMembers:
    """The members of a zip archive; ValueError if there is none."""
    try:
        with (
            open(archive, "rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            first, size, shift = _central_directory(content)
            directory = np.frombuffer(content[first : first + size], dtype=np.uint8)
        return _read_directory(directory, shift)
    except (OSError, ValueError, zipfile.BadZipFile) as error:  # an empty file cannot be mapped
        raise ValueError(f"{archive} cannot be read as a zip archive: {error}") from error


def _central_directory(content: mmap.mmap) -> tuple[int, int, int]:
    """Where it begins, its size, and how far everything lies behind where it says (bytes before the
    archive)."""
    end = len(content) - 22
    if (
        end < 0 or content[end : end + 4] != b"PK\5\6" or content[-2:] != b"\0\0"
    ):  # there is a comment
        end = content.rfind(b"PK\5\6", max(0, end - 65535))
    if end < 0 or end + 22 > len(content):
        raise zipfile.BadZipFile("File is not a zip file")
    size, offset = struct.unpack_from("<2L", content, end + 12)
    after = end
    if (
        end >= 76
        and content[end - 20 : end - 16] == b"PK\6\7"
        and content[end - 76 : end - 72] == b"PK\6\6"
    ):
        if struct.unpack_from("<L", content, end - 4)[0] > 1:
            raise zipfile.BadZipFile("zipfiles that span multiple disks are not supported")
        size, offset = struct.unpack_from("<2Q", content, end - 36)
        after = end - 76
    first = after - size
    if first < 0:
        raise zipfile.BadZipFile("Bad offset for central directory")
    return first, size, first - offset


def _read_directory(directory: np.ndarray, shift: int) -> ZipMembers:
    at = _entries(directory)

    def field(offset: int, width: int, of: np.ndarray = at) -> np.ndarray:
        """The little-endian number at this offset of each entry."""
        parts = (directory[of + (offset + k)].astype(np.int64) << (8 * k) for k in range(width))
        return sum(parts, start=np.zeros(len(of), dtype=np.int64))

    name_length, extra_length = field(28, 2), field(30, 2)
    sizes = {"size": field(24, 4), "packed_size": field(20, 4), "offset": field(42, 4)}

    # zip64: what does not fit into 32 bits comes in this order in the extra field with the number 1
    missing = sum((values == _NONE32).astype(np.int64) for values in sizes.values())
    extra = at + 46 + name_length
    place = np.zeros(len(at), dtype=np.int64)
    rows = np.flatnonzero((missing > 0) & (extra_length >= 4 + 8 * missing))
    first = (field(0, 2, extra[rows]) == 1) & (field(2, 2, extra[rows]) >= 8 * missing[rows])
    first &= field(2, 2, extra[rows]) + 4 <= extra_length[rows]
    place[rows[first]] = extra[rows[first]] + 4
    for row in np.flatnonzero((missing > 0) & (place == 0)):  # it comes after others
        place[row] = _zip64_field(
            directory, int(extra[row]), int(extra_length[row]), 8 * int(missing[row])
        )
    for values in sizes.values():
        rows = np.flatnonzero((values == _NONE32) & (place > 0))
        values[rows] = field(0, 8, place[rows])
        place[rows] += 8
    sizes["offset"] += shift
    names = _table_of_spans(directory, at + 46, at + 46 + name_length)
    return ZipMembers(_decoded(names, field(8, 2)), method=field(10, 2), crc=field(16, 4), **sizes)


def _entries(directory: np.ndarray) -> np.ndarray:
    """Where each entry begins: every one tells its length, so they are gone through one by one."""
    head, found, at = struct.Struct("<4s24x3H"), array("q"), 0
    content = memoryview(directory)
    while at < len(content):
        if at + 46 > len(content):
            raise zipfile.BadZipFile("Truncated central directory")
        magic, *lengths = head.unpack_from(content, at)
        if magic != b"PK\1\2":
            raise zipfile.BadZipFile("Bad magic number for central directory")
        found.append(at)
        at += 46 + sum(lengths)
    if at > len(content):
        raise zipfile.BadZipFile("Truncated central directory")
    return np.array(found, dtype=np.int64)


def _zip64_field(directory: np.ndarray, at: int, length: int, needed: int) -> int:
    """Where the numbers of an entry's zip64 field begin, 0 where it has none."""
    end = at + length
    while at + 4 <= end:
        kind, size = struct.unpack_from("<2H", directory, at)
        if kind == 1:
            if size < needed or at + 4 + size > end:
                raise zipfile.BadZipFile("Corrupt zip64 extra field")
            return at + 4
        at += 4 + size
    return 0


def _decoded(names: PathTable, flags: np.ndarray) -> PathTable:
    """Name as UTF-8: without the flag for it they are code page 437. A zero byte ends a name."""
    unusual = np.flatnonzero((names.text >= 128) | (names.text == 0))
    rows = np.unique(np.searchsorted(names.ends, unusual, side="right"))
    starts, pieces, lengths, done = names.starts, [], np.diff(names.ends, prepend=0), 0
    for row in rows:
        raw = names.text[starts[row] : names.ends[row]].tobytes()
        name = os.fsencode(
            (raw if flags[row] & 0x800 else raw.decode("cp437").encode()).partition(b"\0")[0]
        )
        pieces += [names.text[done : starts[row]], np.frombuffer(name, dtype=np.uint8)]
        lengths[row], done = len(name), names.ends[row]
    if not pieces:
        return names
    return PathTable.of_arrays(
        np.concatenate([*pieces, names.text[done:]]), np.cumsum(lengths, dtype=np.int64)
    )


# --- looking up -----------------------------------------------------------------------------------


def locate(names: PathTable, wanted: PathTable) -> np.ndarray:
    """The number of each wanted name among `names`, -1 where there is none; of equal names the
    last. int64 [wanted]."""
    if not len(names):
        return np.full(len(wanted), -1)
    hashes, asked = _hashes(names), _hashes(wanted)
    order = np.argsort(hashes, kind="stable")
    hashes = hashes[order]
    last = np.searchsorted(hashes, asked, side="right") - 1
    found = np.where((last >= 0) & (hashes[last] == asked), order[last], -1)
    rows = np.flatnonzero(found >= 0)
    for row in rows[~_equal(names, found[rows], wanted, rows)]:  # another name with this hash
        place = last[row]
        while place >= 0 and hashes[place] == asked[row] and names[order[place]] != wanted[row]:
            place -= 1
        found[row] = order[place] if place >= 0 and hashes[place] == asked[row] else -1
    return found


def _hashes(table: PathTable) -> np.ndarray:
    """FNV-1a of every name, uint64 [N]."""
    starts, ends = table.starts, table.ends
    found = np.full(len(table), 0xCBF29CE484222325, dtype=np.uint64)
    prime = np.uint64(0x100000001B3)
    for first in range(0, len(table), BLOCK_ROWS):
        at, end, part = (
            values[first : first + BLOCK_ROWS].copy() for values in (starts, ends, found)
        )
        rows = np.flatnonzero(at < end)
        while len(rows):
            part[rows] = (part[rows] ^ table.text[at[rows]]) * prime
            at[rows] += 1
            rows = rows[at[rows] < end[rows]]
        found[first : first + BLOCK_ROWS] = part
    return found


def _equal(a: PathTable, rows_a: np.ndarray, b: PathTable, rows_b: np.ndarray) -> np.ndarray:
    """Whether names `rows_a` of a are names `rows_b` of b, bool [rows]."""
    at_a, at_b, end = a.starts[rows_a], b.starts[rows_b], a.ends[rows_a]
    same = end - at_a == b.ends[rows_b] - at_b
    rows = np.flatnonzero(same & (at_a < end))
    while len(rows):
        same[rows] = a.text[at_a[rows]] == b.text[at_b[rows]]
        at_a[rows] += 1
        at_b[rows] += 1
        rows = rows[same[rows] & (at_a[rows] < end[rows])]
    return same
