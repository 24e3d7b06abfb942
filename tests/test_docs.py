"""What the pages say runs, and what a reader is told to type exists."""

import re
import shlex
from pathlib import Path

import pytest

from shardkit.cli import _main as entry

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(text: str, language: str) -> list[str]:
    """Fenced code of one language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


@pytest.mark.parametrize("number", range(len(blocks(README, "python"))))
def test_a_python_block_of_the_readme_runs(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = compile(blocks(README, "python")[number], f"README.md, block {number}", "exec")
    exec(code, {"__name__": "readme"})


def test_the_readme_has_code_and_two_commands():
    assert len(blocks(README, "python")) >= 1
    first, second = blocks(README, "sh")[:2]
    assert "shardkit train" in first
    assert "pytest" in second


def test_ci_reads_the_test_command_from_the_readme():
    marker = "<!-- the test command -->"
    assert README.count(marker) == 1
    behind = README.split(marker)[1]
    assert 'pytest -n 2 --dist loadfile -m "not slow"' in blocks(behind, "sh")[0]
    script = (ROOT / ".ci" / "run").read_text()
    assert marker in script
    assert blocks(behind, "sh")[0].strip() not in script


def commands() -> list[str]:
    """Every `shardkit ...` line that a page or a config shows."""
    sources = [*PAGES, *sorted((ROOT / "configs").glob("*.py"))]
    found = []
    for path in sources:
        for line in re.findall(r"(?:^ *|/|`)(shardkit [^\n`]+)", path.read_text(), re.M):
            if line.split()[1] in {command.name for command in entry.COMMANDS}:
                found.append(line.strip())
    return sorted(set(found))


@pytest.mark.parametrize("line", commands())
def test_a_command_that_is_shown_can_be_typed(line):
    words = shlex.split(line.split(" #")[0])[1:]
    placeholders = {"CONFIG", "..."}
    arguments = entry.parser().parse_args([w for w in words if w not in placeholders])
    config = vars(arguments).get("config")  # not every command is about one
    if config is not None:
        assert (ROOT / config).is_file()


def test_commands_are_found():
    assert "shardkit train configs/nano.py" in commands()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_between_pages_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), target


def test_the_changelog_has_its_four_headings():
    text = (ROOT / "CHANGELOG.md").read_text()
    for heading in ("### New", "### Breaking", "### Deprecated", "### Fixed"):
        assert heading in text


def test_constraints_name_versions_and_no_addresses():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = [line for line in lines if line and not line.startswith("#")]
    for line in pinned:
        assert re.fullmatch(r'[\w.-]+==[\w.]+(; python_version (<|>=) "3\.12")?', line), line
    for name in ("jax", "flax", "optax", "numpy", "rich", "pytest"):
        assert any(line.startswith(f"{name}==") for line in pinned)
