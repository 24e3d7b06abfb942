"""What the pages say runs, and what a reader is told to type exists."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import shardkit as sk
from shardkit.cli import _main as entry
from shardkit.config import load_config, shipped_configs
from shardkit.parallel.pipeline._schedule import schedule
from shardkit.step._layout import resolve_layout

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [*(ROOT / f"{name}.md" for name in ("README", "CHANGELOG", "CONTRIBUTING")), *DOCS]
# These take a few seconds each; the others are slow.
_QUICK = {"install.md", "mesh.md", "processes.md", "how_it_works.md"}


def blocks(text: str, language: str) -> list[str]:
    """Fenced code of one language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def programs():
    """Every page with Python code; its blocks are one program, as a reader types them."""
    for path in (ROOT / "README.md", *DOCS):
        if blocks(path.read_text(), "python"):
            marks = () if path.name in _QUICK else (pytest.mark.slow,)
            yield pytest.param(path, marks=marks, id=str(path.relative_to(ROOT)))


@pytest.mark.parametrize("path", list(programs()))
def test_the_code_of_a_page_runs_in_a_fresh_process(path, tmp_path):
    (tmp_path / "tests").symlink_to(ROOT / "tests")  # some pages read its data
    page = tmp_path / "page.py"
    page.write_text("\n".join(blocks(path.read_text(), "python")))
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    # The package under test: the installed wheel in `.ci/run`, else the checkout.
    installed = str(Path(sk.__file__).parents[1])
    environment |= {"PYTHONPATH": installed, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "error::DeprecationWarning:__main__", page]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]


def test_the_site_lists_every_page_and_every_public_name():
    listed = re.findall(r"[\w/]+\.md", (ROOT / "mkdocs.yml").read_text().split("nav:")[1])
    assert sorted(listed) == sorted(str(page.relative_to(ROOT / "docs")) for page in DOCS)
    assert len(listed) >= 25
    notebooks = re.findall(r"\w+\.ipynb", (ROOT / "mkdocs.yml").read_text())
    assert sorted(notebooks) == sorted(path.name for path in (ROOT / "docs").glob("*.ipynb"))
    reference = "".join(path.read_text() for path in DOCS if path.parent.name == "api")
    named = set(re.findall(r"^::: shardkit\.(\S+)$", reference, re.M))
    expected = set(sk.__all__) - {"ShardkitError", "nn", "testing"}
    assert expected | {f"nn.{name}" for name in sk.nn.__all__} <= named
    assert set(sk.errors.__all__) <= set(re.findall(r"^\| `(\w+)` \|", reference, re.M))


def test_the_chart_of_a_schedule_is_what_the_code_draws():
    page = (ROOT / "docs" / "choose" / "parallelism.md").read_text()
    for name in ("gpipe", "1f1b"):
        assert str(schedule(name, stages=4, micro_batches=4)) in page


def drawn(names):
    code = f"import json, sys, pictures as p; print(json.dumps({names}))"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'benchmarks'}"}
    environment |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8", "XLA_FLAGS": ""}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "code",
    ["p.pictures()", pytest.param("{'timeline.svg': p.draw_timeline()}", marks=pytest.mark.slow)],
)
def test_the_pictures_are_what_the_code_draws(code):
    for name, text in drawn(code).items():
        assert (ROOT / "docs" / "pictures" / name).read_text() == text, "benchmarks/pictures.py"
        assert any(f"pictures/{name})" in page.read_text() for page in DOCS), name


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150


def test_the_readme_has_code_and_two_commands():
    assert len(blocks(README, "python")) == 1
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
    """Every `shardkit ...` line that a page, a config or a help text shows."""
    sources = [*PAGES, *sorted((ROOT / "configs").glob("*.py"))]
    found = [line for command in entry.COMMANDS for line in command.examples]
    for path in sources:
        for line in re.findall(r"(?:^ *|/|`)(shardkit [^\n`]+)", path.read_text(), re.M):
            words = line.split()
            if len(words) > 2 and words[1] in {command.name for command in entry.COMMANDS}:
                found.append(line.strip())
    return sorted(set(found))


@pytest.mark.parametrize("line", commands())
def test_a_command_that_is_shown_can_be_typed(line):
    words = shlex.split(re.split(" [#>]", line)[0])[1:]
    placeholders = {"CONFIG", "..."}
    arguments = entry.parser().parse_args([w for w in words if w not in placeholders])
    config = vars(arguments).get("config")  # not every command is about one
    if config and not config.endswith((".json", "my_config.py")) and ":" not in config:
        assert config in {file.stem for file in shipped_configs()} or (ROOT / config).is_file()
        if on_this_machine(words):
            for mesh in vars(arguments).get("mesh") or [None]:  # `verify` takes several
                lay_out(config, [*arguments.overrides, *([f"mesh={mesh}"] if mesh else [])])


def on_this_machine(words):
    """Whether the command makes a step on devices of this machine from files that are there."""
    others = ("--target", "data.path", "data.tokenizer", "devices=", "finetune_llama")
    return words[0] in ("train", "report", "verify") and not any(
        other in word for other in others for word in words
    )


def lay_out(name, overrides):
    """Fails with the errors that the command would end with before it compiles."""
    config = load_config(name, overrides)
    devices = jax.devices()
    if -1 not in config.mesh.axes.values():
        devices = devices[: config.mesh.size]
    resolve_layout(config.step_spec(), config.mesh.build(devices=devices))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_the_shell_understands_what_is_shown(path):
    for block in blocks(path.read_text(), "(?:sh|bash)"):
        subprocess.run(["bash", "-n"], input=block, text=True, check=True)


def test_commands_are_found():
    assert {"shardkit train configs/nano.py", "shardkit config show nano"} <= set(commands())


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
