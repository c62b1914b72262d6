"""A compiled network gives the vectors of its model, whatever it is given."""

from __future__ import annotations

import os
import threading
import time

import numpy as np
import pytest
import torch  # noqa: TID253 - its threads are set

from extraction_dagster.settings import Settings
from extraction_dagster.stages.embed.compiled.compiling import FOLDER
from extraction_dagster.stages.embed.compiled.network import CompiledPasses
from extraction_dagster.stages.embed.models.interface import TextEmbeddingModel
from extraction_dagster.stages.embed.models.registry import load_model
from extraction_dagster.stages.embed.passes import HostPasses


@pytest.mark.usefixtures("copied_home")
def test_compiled_vectors_are_those_of_the_model_in_any_batch(load, model_vectors, pixels, cosines):
    fast = load()

    assert isinstance(fast.passes, CompiledPasses)
    assert isinstance(fast.passes._uncompiled, HostPasses)
    for count in (1, 7, 32):
        vectors = fast.embed_prepared(pixels[:count])
        assert (vectors.shape, vectors.dtype) == ((count, 1280), np.float32)
        assert cosines(vectors, model_vectors[:count]).min() > 0.999999
        assert np.abs(vectors - model_vectors[:count]).max() < 1e-4


@pytest.mark.usefixtures("copied_home")
def test_compiling_moves_no_fingerprint_and_cut_vectors_are_cut(load, model_vectors, pixels, cpu_settings):
    plain = load_model(cpu_settings).fingerprint
    assert load().fingerprint == plain

    cut = load(embedding_dim=64, may_compile=False)  # of the same compiled network

    assert isinstance(cut.passes, CompiledPasses)
    assert np.abs(cut.embed_prepared(pixels) - model_vectors[:, :64]).max() < 1e-4


@pytest.mark.usefixtures("copied_home")
def test_a_compiled_network_uses_the_threads_of_the_process_that_runs_it(load, pixels):
    one = load().embed_prepared(pixels)
    before = torch.get_num_threads()
    try:
        two = load(embed_threads=2).embed_prepared(pixels)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)

    assert np.abs(one - two).max() < 1e-4


@pytest.mark.usefixtures("copied_home")
def test_other_threads_run_while_a_compiled_pass_does(load, pixels):
    fast, over, naps = load(), threading.Event(), []

    def nap():
        while not over.is_set():
            time.sleep(0.001)
            naps.append(1)

    thread = threading.Thread(target=nap, daemon=True)
    thread.start()
    most = 0
    try:
        for _ in range(50):  # on a busy machine the other thread may not get its turn in the first
            before = len(naps)
            fast.embed_prepared(np.concatenate([pixels, pixels]))
            most = max(most, len(naps) - before)
            if most > 10:
                break
    finally:
        over.set()
        thread.join(timeout=60)

    # A pass that kept Python's lock would let the other thread nap twice at most.
    assert most > 10


@pytest.mark.usefixtures("copied_home")
def test_what_the_compiled_network_was_not_made_for_runs_uncompiled(load, pixels, cosines):
    fast = load()
    small = np.ascontiguousarray(pixels[:2, :192, :192])

    assert np.array_equal(fast.embed_prepared(small), fast.passes._uncompiled.start(small).result())
    turned = pixels[:2].transpose(0, 2, 1, 3)  # not contiguous
    assert cosines(fast.embed_prepared(turned), fast.passes._uncompiled.start(turned).result()).min() > 0.999999


class OutOfMemory:
    def run(self, *_):
        raise RuntimeError("Failed to allocate memory for requested buffer of size 1")


@pytest.mark.usefixtures("copied_home")
def test_a_pass_that_fails_is_run_uncompiled_so_that_its_error_has_a_name(load, pixels, monkeypatch):
    fast = load()
    expected = fast.passes._uncompiled.start(pixels[:2]).result()
    monkeypatch.setattr(fast.passes._network, "_session", OutOfMemory())

    assert np.array_equal(fast.embed_prepared(pixels[:2]), expected)


# One model in `make test`; the others have the same way to a graph, and go it each night.
_KINDS = ["siglip", "clip", "dinov2"][: 3 if os.environ.get("EXTRACTION_TEST_PROFILE") == "full" else 1]


@pytest.mark.parametrize("kind", _KINDS)
def test_models_of_transformers_are_compiled_with_the_same_vectors_in_any_batch(
    saved_models, load, home, cosines, kind
):
    folder = str(saved_models(kind))
    plain = load_model(Settings(model=folder, device="cpu", embed_threads=1))
    pictures = [np.random.default_rng(n).integers(0, 256, (60, 50 + n, 3), np.uint8) for n in range(9)]
    expected = plain.embed_images(pictures)
    texts = plain.embed_text(["two cats"]) if isinstance(plain, TextEmbeddingModel) else None

    fast = load(model=folder)

    assert isinstance(fast.passes, CompiledPasses)
    for count in (1, 4, 9):
        vectors = fast.embed_images(pictures[:count])
        assert (vectors.shape, vectors.dtype) == (expected[:count].shape, np.float32)
        assert cosines(vectors, expected[:count]).min() > 0.999999
    assert fast.fingerprint == plain.fingerprint
    assert texts is None or np.array_equal(fast.embed_text(["two cats"]), texts)
    assert [path.suffix for path in sorted((home / FOLDER).iterdir())] == [".onnx", ".lock"]
