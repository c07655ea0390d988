"""The README keeps its word: its Python runs as it stands, and the commands and files it names exist."""

import contextlib
import io
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from experiments.cli import cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_example_prints_an_area_and_its_derivative():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(code, "README.md", "exec"), {})
    area, slope = map(float, said.getvalue().split())
    # rabi_scale_2 = 1.05 leaves the area near that of the ideal device, 0.272 at a window of 10.5 of 40 cycles.
    assert area == pytest.approx(0.272, abs=0.01)
    assert 0 < slope < 0.02


def test_named_commands_and_files_exist():
    verbs = set(re.findall(r"^iontwin +(\w+)", README, re.MULTILINE))
    assert verbs == set(cli.commands)
    for config in re.findall(r"experiments/configs/\w+\.toml", README):
        assert (ROOT / config).is_file(), config
    block = re.search(r"## The house\n\n```\n(.*?)```", README, re.DOTALL).group(1)
    folder = None
    for line in block.splitlines():
        if match := re.match(r"^(\w+)/", line):
            folder = match.group(1)
        else:
            for name in re.findall(r"\w+\.py", line):
                assert (ROOT / folder / name).is_file(), f"{folder}/{name}"


def test_no_placeholder_is_left():
    """A word in capitals that has a line of its own is where a table or a number was to be put."""
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        assert not re.findall(r"^\s*[A-Z]{4,}\s*$", page.read_text(encoding="utf-8"), re.MULTILINE), page.name


def test_help_runs():
    assert CliRunner().invoke(cli, ["--help"]).exit_code == 0
