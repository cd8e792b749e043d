"""benchmark.py index: what it says of a short list."""

import re

from scripts.benchmarks import benchmark


def test_it_reports_seconds_bytes_and_the_memory_of_workers(capsys):
    benchmark.main(["index", "--images", "20000", "--workers", "1", "--lookups", "2000"])
    said = capsys.readouterr().out
    assert "map file: 20,000 lines" in said
    held = float(re.search(r"held: ([\d.]+) bytes an image", said)[1])
    assert 40 < held < 100
    extra = float(re.search(r"lookups: ([\d.]+) MiB", said)[1])
    assert extra < 8  # the list is shared: an object for each name would be more than 1 MiB
    # the order of a long list is computed, not held
    mebibytes = re.findall(r"order of [\d,]+ images: [\d.]+ s, ([\d.]+) MiB", said)
    assert mebibytes == ["0.1", "0.0"]
