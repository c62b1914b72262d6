"""What benchmarks/mutants.py plants each night can be planted: its texts and its tests are there."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("mutants", ROOT / "benchmarks/mutants.py")
MUTANTS = importlib.util.module_from_spec(SPEC)
SOURCES = [path.read_text() for path in (ROOT / "extraction_dagster").rglob("*.py")]
NAMES = [
    name
    for path in (ROOT / "extraction_dagster_tests").rglob("test_*.py")
    for name in re.findall(r"^ *def (test_\w+)", path.read_text(), re.MULTILINE)
]


@pytest.fixture(scope="module", autouse=True)
def _loaded():
    sys.modules["mutants"] = MUTANTS  # its dataclasses look for their module
    SPEC.loader.exec_module(MUTANTS)
    yield
    del sys.modules["mutants"]


def test_every_text_stands_once_in_the_package():
    texts = [text for mutant in MUTANTS.MUTANTS for text, _ in mutant.edits]
    assert len(texts) > 20
    assert {text: sum(source.count(text) for source in SOURCES) for text in texts} == dict.fromkeys(texts, 1)


def test_every_test_that_is_named_is_there():
    wanted = {name for mutant in MUTANTS.MUTANTS for name in mutant.tests}
    assert sorted(name for name in wanted if not any(there.startswith(name) for there in NAMES)) == []
