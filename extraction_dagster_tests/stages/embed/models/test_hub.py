"""Models of the hub: pinned or refused, out of the cache without a network, one line when they can't be fetched."""

from __future__ import annotations

import time

import huggingface_hub.constants
import numpy as np
import pytest

from extraction_dagster.errors import SettingsError
from extraction_dagster.errors.embed import EmbeddingModelError, ModelFilesError
from extraction_dagster.settings import Settings
from extraction_dagster.stages.embed.models.registry import (
    embedding_fingerprint,
    embedding_settings_fingerprint,
    load_model,
)

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = f"acme/tiny-clip@{COMMIT}"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and a hub that nobody answers for."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(time, "sleep", lambda _seconds: None)  # the client waits 23 s between its tries
    return tmp_path / "hub"


def fill(cache, folder, *, leave_out=()):
    """Put a model into the cache, laid out as the hub's client does it."""
    model = cache / "models--acme--tiny-clip"
    snapshot, blobs = model / "snapshots" / COMMIT, model / "blobs"
    for made in (snapshot, blobs):
        made.mkdir(parents=True)
    for number, path in enumerate(sorted(folder.iterdir())):
        if path.name not in leave_out:
            (blobs / str(number)).write_bytes(path.read_bytes())
            (snapshot / path.name).symlink_to(f"../../blobs/{number}")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("google/siglip2-base-patch16-224", r"it names no commit, and what a branch or tag means can change"),
        ("google/siglip2-base-patch16-224@main", r"'main' is not a commit's 40 hexadecimal digits"),
        ("google/siglip2-base-patch16-224@0123abc", r"'0123abc' is not a commit's 40 hexadecimal digits"),
        (f"google/siglip2-base-patch16-224@{COMMIT.upper()}", r"is not a commit's 40 hexadecimal digits"),
    ],
)
def test_a_model_that_is_not_pinned_is_refused_with_how_to_pin_it(name, words):
    for ask in (embedding_settings_fingerprint, embedding_fingerprint, load_model):
        with pytest.raises(EmbeddingModelError, match=words) as refused:
            ask(Settings(model=name))
        assert "Write google/siglip2-base-patch16-224@COMMIT with the 40 digits" in str(refused.value)
        assert "a folder is written ./google/siglip2-base-patch16-224" in str(refused.value)


def test_a_cached_model_loads_without_a_network(cache, saved_models):
    fill(cache, saved_models("clip"))
    image = np.full((40, 50, 3), 90, np.uint8)

    model = load_model(Settings(model=NAME, device="cpu"))

    assert (model.name, model.dim) == (NAME, 24)
    same = load_model(Settings(model=str(saved_models("clip")), device="cpu"))
    assert np.array_equal(model.embed_images([image]), same.embed_images([image]))


def test_a_model_that_cannot_be_fetched_is_an_error_that_says_how_to_go_on(cache):
    with pytest.raises(
        ModelFilesError, match=r"loaded from the hub: got nothing \(\w+\).*EXTRACTION_MODEL to the folder"
    ):
        load_model(Settings(model=NAME, device="cpu"))
    assert not (cache / "models--acme--tiny-clip" / "snapshots").exists()


def test_a_model_cached_in_part_names_what_is_missing(cache, saved_models):
    fill(cache, saved_models("clip"), leave_out=("model.safetensors",))

    with pytest.raises(ModelFilesError, match=r"model\.safetensors: got no such file"):
        load_model(Settings(model=NAME, device="cpu"))


def test_the_fingerprint_is_the_commit_and_asks_nobody(cache):
    fingerprint = embedding_fingerprint(Settings(model=NAME))

    assert fingerprint == embedding_fingerprint(Settings(model=NAME, embed_batch_size=3))
    assert fingerprint != embedding_fingerprint(Settings(model=NAME.replace("0123", "3210", 1)))
    assert fingerprint != embedding_fingerprint(Settings(model=NAME, embedding_dim=8))
    assert not cache.exists()


def test_too_many_numbers_are_refused_once_the_model_is_known(cache, saved_models):
    fill(cache, saved_models("clip"))

    with pytest.raises(SettingsError, match="EXTRACTION_EMBEDDING_DIM is 25, expected at most 24"):
        load_model(Settings(model=NAME, device="cpu", embedding_dim=25))
