"""Compiled models: real exporters, networks, processes and locks. One compilation serves most tests."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from extraction_dagster.settings import Settings
from extraction_dagster.stages.embed.compiled import compiling
from extraction_dagster.stages.embed.models import registry
from extraction_dagster.stages.embed.models.registry import load_model
from extraction_dagster.stages.embed.passes import normalise


def networks(home):
    return sorted((home / compiling.FOLDER).glob("*.onnx"))


def cosines_of(left, right):
    (one, _), (two, _) = normalise(left), normalise(right)
    return (one * two).sum(1)


@pytest.fixture(scope="session")
def cosines():
    return cosines_of


@pytest.fixture(scope="session")
def compiled_home(tmp_path_factory):
    """A data folder in which the packaged model has been compiled; read it only."""
    home = tmp_path_factory.mktemp("compiled")
    load_model(Settings(home=home, device="cpu", compile="onnxruntime", embed_threads=1))
    assert len(networks(home)) == 1
    return home


@pytest.fixture(autouse=True)
def _no_resident_model(monkeypatch):
    monkeypatch.setattr(registry, "_resident", {})


@pytest.fixture
def home(tmp_path):
    return tmp_path / "home"


@pytest.fixture
def copied_home(compiled_home, home):
    shutil.copytree(compiled_home, home)
    return home


@pytest.fixture
def load(home):
    def load(*, may_compile=True, **overrides):
        wanted = {"home": home, "device": "cpu", "compile": "onnxruntime", "embed_threads": 1, **overrides}
        return load_model(Settings(**wanted), may_compile=may_compile)

    return load


@pytest.fixture
def compiling_copies(monkeypatch, compiled_home):
    """In place of the exporter: a copy of what it made before. Holds how often it was called."""
    calls = []

    def copy(work, _settings, name):
        calls.append(name)
        return Path(shutil.copy(networks(compiled_home)[0], work / "network.onnx"))

    monkeypatch.setattr(compiling, "compile_in", copy)
    return calls


@pytest.fixture
def pixels():
    return np.random.default_rng(8).integers(0, 256, (32, 224, 224, 3), np.uint8)


@pytest.fixture
def model_vectors(cpu_settings, pixels):
    return load_model(cpu_settings).embed_prepared(pixels)
