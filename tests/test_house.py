"""Who may import whom: entry points are on top, the package below them, and there is no circle."""

import ast
import graphlib
from pathlib import Path

from helpers import ROOT

PRODUCT = ("unimim", "analysis", "semantic_segmentation", "detection")
ABOVE_THE_PACKAGE = ("run_", "engine_for_", "modeling_pretrain")


def product_files() -> list[Path]:
    files = list(ROOT.glob("*.py"))
    for folder in PRODUCT:
        files += (ROOT / folder).rglob("*.py")
    return files


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


def imported(path: Path, *, everywhere: bool) -> set[str]:
    """Name of modules that a file imports, when it is loaded or, with `everywhere`, in functions
    too."""
    tree = ast.parse(path.read_text())
    found = set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_nothing_imports_an_entry_point():
    for path in (*product_files(), *(ROOT / "scripts").rglob("*.py")):
        entries = [name for name in imported(path, everywhere=True) if name.startswith("run_")]
        assert not entries, path


def test_the_package_knows_no_loop_and_no_method():
    for path in (ROOT / "unimim").rglob("*.py"):
        above = [
            name for name in imported(path, everywhere=True) if name.startswith(ABOVE_THE_PACKAGE)
        ]
        assert not above, path


def test_there_is_no_circle():
    modules = {module_name(path): path for path in product_files()}
    graph = {}
    for name, path in modules.items():
        graph[name] = imported(path, everywhere=False) & modules.keys() - {name}
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert len(order) == len(modules)


def test_the_top_floor_stays_small():
    entries = [
        path
        for path in ROOT.iterdir()
        if not path.name.startswith((".", "__")) and path.name not in ("out", "output", "wandb")
    ]
    assert len(list(ROOT.glob("*.py"))) <= 16
    assert len(entries) <= 31
