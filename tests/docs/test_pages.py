"""What README and docs refer to is there: files, headings, recipes, flags; the site builds without
a warning."""

import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from helpers import ROOT

import modeling_pretrain  # noqa: F401  (registers the methods, and their flags)
from unimim.cli.flags import build_parser
from unimim.recipes import all_recipes

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"^```.*?^```|`[^`\n]+`", re.MULTILINE | re.DOTALL)
CITATION = re.compile(r"docs/[\w/]+\.md(?:#[\w-]+)?")
EFFECT = re.compile(r"crash|wrong number|speed|taste|missing part")
# flags of programs that are not ours
FOREIGN = {
    "--rdzv_backend", "--rdzv_endpoint", "--rdzv_id", "--rdzv_conf", "--max_restarts",
    "--hostfile", "--launcher", "--num_gpus", "--nproc_per_node", "--nnodes", "--node_rank",
    "--master_addr", "--master_port", "--gpus", "--signals-to-handle", "--standalone", "--shm-size",
    "--ipc", "--help", "--iters_per_epoch", "--force-reinstall", "--local_addr",
    "--no-deps", "--repo-type", "--nodes", "--ntasks-per-node", "--gpus-per-node",
}  # fmt: skip


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@cache
def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    found = set()
    for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        shown = LINK.sub(lambda link: link[0].partition("]")[0][1:], heading)
        kept = re.sub(r"[^\w\- ]", "", shown.lower())
        found.add(kept.strip().replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for target in LINK.findall(CODE.sub("", page.read_text())):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert file.is_relative_to(ROOT), target
        if anchor:
            assert anchor in anchors(file), target


def test_citations_in_the_code_lead_somewhere():
    files = [
        file for file in ROOT.rglob("*.py") if not {".venv", "output", "out"} & set(file.parts)
    ]
    for file in [*files, *ROOT.glob("scripts/**/*.sh")]:
        for citation in CITATION.findall(file.read_text()):
            path, _, anchor = citation.partition("#")
            assert (ROOT / path).is_file(), f"{file}: {citation}"
            assert not anchor or anchor in anchors(ROOT / path), f"{file}: {citation}"


def test_no_page_refers_to_folders_that_users_do_not_have():
    for page in PAGES:
        assert not re.search(r"\.\./share[d]|\bspec[s]/", page.read_text()), page


def test_every_page_is_reached_from_the_readme_and_the_index():
    for start in ("README.md", "docs/index.md"):
        page = ROOT / start
        linked = {
            (page.parent / target.partition("#")[0]).resolve()
            for target in LINK.findall(page.read_text())
        }
        assert linked >= set(PAGES) - {ROOT / "README.md", ROOT / "docs/index.md"}, start


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_recipes_and_flags_are_those_of_the_code(page):
    text = page.read_text()
    known = {recipe.name for recipe in all_recipes()}
    known |= set(re.findall(r'^ +"(\w+)",$', text, re.MULTILINE))  # of the worked example
    for name in re.findall(r"(?:recipe\.sh|--recipe) ([a-z0-9_]+)", text):
        assert name in known, name
    if page.name == "coming_from.md":
        text = re.sub(r"^\| [^|]*\|", "|", text, flags=re.MULTILINE)  # the published commands
    text = re.sub(r"^#SBATCH .*$", "", text, flags=re.MULTILINE)
    for code in CODE.findall(text):
        flags = {flag.rstrip("-") for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", code)}
        unknown = flags - FOREIGN - all_flags()
        assert not unknown, f"{unknown} in {code}"


@cache
def all_flags() -> set[str]:
    """The flags of pre-training and fine-tuning, and those in the text of everything else."""
    files = [*ROOT.glob("*.py")]
    for folder in ("unimim", "analysis", "scripts", "semantic_segmentation", "detection"):
        files += (ROOT / folder).rglob("*.py")
    text = "\n".join(file.read_text() for file in files)
    actions = [*build_parser("pretrain")._actions, *build_parser("finetune")._actions]
    names = [name for action in actions for name in action.option_strings]
    names += re.findall(r'"--(\w+)"', text)
    return {f"--{name.removeprefix('--')}" for name in names}


def tables(text: str) -> list[list[list[str]]]:
    """The tables of a page: rows of cells, the header first, without the ruler."""
    found = []
    for block in re.findall(r"(?:^\|.*\|\n)+", text + "\n", re.MULTILINE):
        rows = [[c.strip() for c in line.strip("|").split("|")] for line in block.splitlines()]
        found.append([rows[0], *rows[2:]])
    return found


def test_every_difference_from_published_code_has_an_effect():
    methods = sorted((ROOT / "docs/methods").glob("*.md"))
    # what stands between the methods has no published code
    pages = [*(page for page in methods if page.name != "space.md"), ROOT / "docs/engine.md"]
    for page in pages:
        section = page.read_text().partition("## Differences from the published code")[2]
        (header, *rows) = tables(section)[0]
        assert header == ["published code", "here", "effect"], page
        assert len(rows) >= 7, page
        for row in rows:
            assert len(row) == 3 and EFFECT.search(row[2]), f"{page}: {row}"


def test_every_failure_has_a_cause_and_a_remedy():
    text = (ROOT / "docs/faq.md").read_text()
    titles = re.findall(r"^### (\d+)\. ", text, re.MULTILINE)
    assert titles == [str(number) for number in range(1, 22)]
    for entry in re.split(r"^### ", text, flags=re.MULTILINE)[1:]:
        assert "**Cause:**" in entry and "**Remedy:**" in entry, entry.splitlines()[0]


def test_the_front_page_is_short_and_its_picture_small():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 160
    assert (ROOT / "docs/overview.jpg").stat().st_size <= 400_000


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    command += ["--config-file", "scripts/tools/mkdocs.yml", "--site-dir", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert result.returncode == 0, result.stdout + result.stderr
    for page in PAGES[1:]:
        assert (tmp_path / page.relative_to(ROOT / "docs").with_suffix(".html")).is_file()
