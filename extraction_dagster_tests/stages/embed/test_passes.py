"""What passes give, checked; on a GPU, the order of their steps (a stand-in for CUDA), and vectors of a real one."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest
import torch  # noqa: TID253 - what the passes call

from extraction_dagster.settings import Settings
from extraction_dagster.stages.embed.batching import BatchEmbedder, embed_pieces
from extraction_dagster.stages.embed.models.registry import load_model
from extraction_dagster.stages.embed.passes import CudaPasses, count_unnormalised, normalise

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")]


class Cuda:
    """Stands in for `torch.cuda`: everything runs on the CPU at once, and each call is written down."""

    def __init__(self, monkeypatch):
        self.log, self.filled = [], False
        empty, log = torch.empty, self.log
        monkeypatch.setattr(torch.cuda, "Stream", lambda _: Stream("copies", log))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream("compute", log))
        monkeypatch.setattr(torch.cuda, "Event", lambda: Event(self))
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: self.within(stream.name))
        monkeypatch.setattr(torch.cuda, "device", self.within)
        monkeypatch.setattr(torch, "empty", lambda shape, pin_memory: self.said(f"vectors {pin_memory}", empty(shape)))
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: self.said("page-lock the pixels", tensor))
        monkeypatch.setattr(torch.Tensor, "to", self.to)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda _, stream: self.said(f"kept for {stream.name}"))

    def said(self, what, value=None):
        self.log.append(what)
        return value

    @contextmanager
    def within(self, name):
        self.log.append(f"{name} {{")
        yield
        self.log.append("}")

    @property
    def to(self):
        return lambda tensor, device, *, non_blocking: self.said(f"copy to {device}, wait: {not non_blocking}", tensor)

    def forward(self, pixels):
        self.log.append("forward")
        return pixels.float().mean((1, 2)).half()


class Stream:
    def __init__(self, name, log):
        self.name, self.log = name, log

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")


class Event:
    def __init__(self, cuda):
        self.cuda = cuda

    def record(self, stream):
        self.cuda.log.append(f"event on {stream.name}")

    def query(self):
        return self.cuda.filled

    def synchronize(self):
        self.cuda.log.append("wait for the event")


def test_pixels_are_copied_on_a_stream_of_their_own_and_waited_for_only_by_the_device(monkeypatch):
    cuda = Cuda(monkeypatch)
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3)

    pending = CudaPasses(cuda.forward, "cuda:3").start(pixels)

    assert cuda.log == [
        "cuda:3 {",
        "page-lock the pixels",
        "copies {",
        "copy to cuda:3, wait: False",
        "}",
        "compute waits for copies",
        "kept for compute",
        "forward",
        "vectors True",
        "event on compute",
        "}",
    ]
    assert pending.done() is False
    cuda.filled = True
    assert pending.done() is True
    vectors = pending.result()
    assert cuda.log[-1] == "wait for the event"
    assert (vectors.dtype, vectors.tolist()) == (np.float32, [[4.5, 5.5, 6.5], [16.5, 17.5, 18.5]])


def test_a_result_is_a_copy_of_the_page_locked_memory(monkeypatch):
    cuda = Cuda(monkeypatch)
    pending = CudaPasses(cuda.forward, "cuda:0").start(np.zeros((1, 2, 2, 3), np.uint8))

    first = pending.result()
    first += 1

    assert pending.result().tolist() == [[0, 0, 0]]


# On a real device


@pytest.fixture(scope="module")
def on_gpu():
    return load_model(Settings(device="cuda"))


@pytest.fixture
def pixels():
    return np.random.default_rng(4).integers(0, 256, (50, 224, 224, 3), np.uint8)


class TestOnARealDevice:
    pytestmark = GPU

    def test_vectors_are_those_of_the_cpu(self, on_gpu, cpu_settings, pixels):
        expected, _ = normalise(load_model(cpu_settings).embed_prepared(pixels[:20]))

        got, _ = normalise(on_gpu.embed_prepared(pixels[:20]))

        assert (got * expected).sum(1).min() > 0.99999

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_shorter_types_give_nearly_the_same_vectors(self, on_gpu, pixels, dtype):
        expected, _ = normalise(on_gpu.embed_prepared(pixels))

        got, faults = normalise(load_model(Settings(device="cuda", embed_dtype=dtype)).embed_prepared(pixels))

        assert faults == [None] * 50
        assert (got * expected).sum(1).min() > (0.9995 if dtype == "float16" else 0.99)

    def test_passes_that_overlap_give_each_frame_its_own_vector_in_order(self, on_gpu, pixels):
        alone = np.concatenate([on_gpu.embed_prepared(pixels[n : n + 1]) for n in range(50)])
        pieces = [(start, pixels[start : start + 3]) for start in range(0, 50, 3)]

        done = list(embed_pieces(iter(pieces), BatchEmbedder(on_gpu, 4)))

        assert [tag for tag, _ in done] == list(range(0, 50, 3))
        assert np.abs(np.concatenate([vectors for _, vectors in done]) - alone).max() < 1e-4

    def test_memory_that_really_runs_out_halves_the_batch(self, on_gpu, pixels, caplog):
        expected = on_gpu.embed_prepared(pixels[:4])
        many = np.concatenate([pixels[:4]] * 64)
        torch.cuda.empty_cache()
        # One activation of 256 frames alone, 96 channels of 112x112, takes 1.2 GB; of 64 frames all take 0.5.
        allowed = torch.cuda.memory_reserved() + 1.0e9
        torch.cuda.set_per_process_memory_fraction(allowed / torch.cuda.get_device_properties(0).total_memory)
        try:
            embedder = BatchEmbedder(on_gpu, 256)
            vectors = np.concatenate([*embedder.push(many), *embedder.finish()])
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)

        assert "Out of memory on cuda:0 with 256 frames a batch; going on with 128" in caplog.text
        assert embedder.batch_size < 256
        assert np.abs(vectors - np.concatenate([expected] * 64)).max() < 1e-4


def test_vectors_are_scaled_to_length_one():
    unit, faults = normalise(np.array([[3, 4], [0, -2]], np.float32))

    assert unit.dtype == np.float32
    assert np.allclose(unit, [[0.6, 0.8], [0, -1]], atol=1e-7)
    assert faults == [None, None]


def test_each_bad_vector_is_named_and_the_good_ones_between_are_kept():
    raw = np.array([[1, 0], [np.nan, 1], [0, 2], [np.inf, 1], [0, 0], [-np.inf, np.nan]], np.float32)

    unit, faults = normalise(raw)

    assert faults == [None, "NaN", None, "an infinite value", "length zero", "NaN"]
    assert unit.tolist() == [[1, 0], [0, 0], [0, 1], [0, 0], [0, 0], [0, 0]]


def test_a_vector_whose_square_overflows_float32_is_kept():
    unit, faults = normalise(np.array([[3e30, 4e30]], np.float32))

    assert faults == [None]
    assert np.allclose(unit, [[0.6, 0.8]], atol=1e-6)


def test_no_vectors_are_no_fault():
    unit, faults = normalise(np.empty((0, 5), np.float32))

    assert unit.shape == (0, 5)
    assert faults == []


def test_stored_vectors_of_another_length_than_one_are_counted():
    unit = np.array([[0.6, 0.8], [1, 0]], np.float16)
    assert count_unnormalised(unit) == 0
    assert count_unnormalised(unit * np.array([[1.005], [0.995]], np.float16)) == 0
    assert count_unnormalised(np.array([[0.6, 0.8], [0, 0], [2, 0], [np.nan, 1]], np.float16)) == 3
    assert count_unnormalised(np.empty((0, 2), np.float16)) == 0
