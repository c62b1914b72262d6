"""The worked examples of CONTRIBUTING.md: each is applied to a copy of the package and does what the page promises."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MOST_LINES = 40
# "### Add a sampler", then one or more diffs, then the program that shows that it works.
EXAMPLE = re.compile(r"^### Add (an? [a-z -]+)\n(.*?)(?=^##|\Z)", re.MULTILINE | re.DOTALL)
BLOCK = re.compile(r"^```(diff|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"^\+\+\+ b/(\S+)\n(.*?)(?=^--- |\Z)", re.MULTILINE | re.DOTALL)
EXAMPLES = {name: BLOCK.findall(body) for name, body in EXAMPLE.findall((ROOT / "CONTRIBUTING.md").read_text())}


@pytest.fixture
def checkout(tmp_path):
    """A copy of the package that an example may change."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "extraction_dagster", tmp_path / "extraction_dagster", ignore=ignored)
    return tmp_path


def apply(diff, folder):
    """Apply a diff as a reader does: where its lines stand, whatever their numbers are."""
    for name, hunks in FILE.findall(diff):
        path = folder / name
        for hunk in re.split(r"^@@.*@@\n", hunks, flags=re.MULTILINE)[1:]:
            lines = [(line[:1] or " ", line[1:] + "\n") for line in hunk.splitlines()]
            old = "".join(line for kind, line in lines if kind in " -")
            new = "".join(line for kind, line in lines if kind in " +")
            text = path.read_text() if path.exists() else ""
            assert not old or text.count(old) == 1, f"{name} has these lines {text.count(old)} times:\n{old}"
            path.write_text(text.replace(old, new) if old else new)


def test_the_page_shows_each_kind_of_addition():
    assert sorted(EXAMPLES) == ["a check", "a decoder", "a model", "a sampler", "a store"]


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_takes_few_lines(name):
    text = "".join(text for kind, text in EXAMPLES[name] if kind == "diff")
    added = [line for line in text.splitlines() if line.startswith("+") and not line.startswith("+++")]
    assert 0 < len(added) < MOST_LINES


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_works_as_the_page_says(name, checkout):
    (first, diff), (second, program) = EXAMPLES[name]
    assert (first, second) == ("diff", "python")
    apply(diff, checkout)
    done = subprocess.run(  # the folder of `-c` comes first on the path: the copy is imported, not the package
        [sys.executable, "-c", program], cwd=checkout, capture_output=True, text=True, check=False, timeout=300
    )
    assert (done.returncode, done.stdout) == (0, "works\n"), done.stderr
