from __future__ import annotations

import numpy as np
import pytest
import torch  # noqa: TID253 - its error is injected
from hypothesis import given
from hypothesis import strategies as st

from extraction_dagster.errors.embed import EmbeddingMemoryError, ModelOutputError
from extraction_dagster.stages.embed.batching import BatchEmbedder, embed_pieces
from extraction_dagster.stages.embed.passes import Finished


class Counting:
    """Gives each frame its first pixel as a vector; can run out of memory above a batch size."""

    name = "counting"
    dim = 2
    device = "cpu"
    fingerprint = "0"

    def __init__(self, fits=1000, error=RuntimeError, says="CUDA out of memory. Tried to allocate 2 GiB"):
        self.seen = []
        self.fits, self.error, self.says = fits, error, says

    def start(self, pixels):
        return Finished(self.embed_prepared(pixels))

    def embed_prepared(self, pixels):
        self.seen.append(len(pixels))
        if len(pixels) > self.fits:
            raise self.error(self.says)
        value = pixels[:, 0, 0, :1].astype(np.float32)
        return np.concatenate([value, value + 0.5], axis=1)


def _pieces(*sizes):
    start = 0
    for tag, size in enumerate(sizes):
        values = np.arange(start, start + size, dtype=np.uint8)
        start += size
        yield tag, np.repeat(values, 12).reshape(size, 2, 2, 3)


def _values(results):
    return [(tag, vectors[:, 0].tolist()) for tag, vectors in results]


def test_full_batches_cross_the_borders_of_pieces():
    model = Counting()

    results = _values(embed_pieces(_pieces(5, 2, 6), BatchEmbedder(model, 4)))

    assert results == [(0, [0, 1, 2, 3, 4]), (1, [5, 6]), (2, [7, 8, 9, 10, 11, 12])]
    assert model.seen == [4, 4, 4, 1]


def test_a_mark_comes_out_after_everything_before_it():
    model = Counting()

    assert _values(embed_pieces(_pieces(1, 0, 1, 0, 0), BatchEmbedder(model, 8))) == [
        (0, [0]),
        (1, []),
        (2, [1]),
        (3, []),
        (4, []),
    ]


def test_a_finished_piece_is_handed_on_before_the_stream_ends():
    stream = embed_pieces(_pieces(2, 0, 2), BatchEmbedder(Counting(), 2))

    assert next(stream)[0] == 0
    assert next(stream)[0] == 1


@given(st.lists(st.integers(0, 9), max_size=12), st.integers(1, 7), st.integers(1, 7))
def test_every_frame_gets_its_own_vector_whatever_the_batch_and_memory(sizes, batch_size, fits):
    results = list(embed_pieces(_pieces(*sizes), BatchEmbedder(Counting(fits), batch_size)))

    assert [tag for tag, _ in results] == list(range(len(sizes)))
    assert [len(vectors) for _, vectors in results] == sizes
    assert [v for _, vectors in results for v in vectors[:, 0].tolist()] == list(range(sum(sizes)))


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (RuntimeError, "CUDA out of memory. Tried to allocate 2 GiB"),
        (RuntimeError, "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        (RuntimeError, "MPS backend out of memory"),
        (RuntimeError, "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        (RuntimeError, "cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        (torch.OutOfMemoryError, "no words that tell"),
        (MemoryError, ""),
    ],
)
def test_the_batch_is_halved_for_good_when_memory_runs_out(error, says, caplog):
    model = Counting(3, error, says)

    results = _values(embed_pieces(_pieces(8, 8), BatchEmbedder(model, 8)))

    assert results == [(0, list(range(8))), (1, list(range(8, 16)))]
    assert model.seen == [8, 4, 2, 2, 2, 2, 2, 2, 2, 2]
    assert "Out of memory on cpu with 8 frames a batch; going on with 4" in caplog.text


def test_memory_for_not_even_one_frame_is_a_clear_error():
    with pytest.raises(EmbeddingMemoryError, match="'counting' ran out of memory on cpu with a batch of 1 frame"):
        list(BatchEmbedder(Counting(0), 4).push(np.zeros((4, 2, 2, 3), np.uint8)))


def test_any_other_error_of_the_model_passes_through():
    with pytest.raises(RuntimeError, match="shape mismatch"):
        list(BatchEmbedder(Counting(0, RuntimeError, "shape mismatch"), 4).push(np.zeros((4, 2, 2, 3), np.uint8)))


def test_a_model_that_gives_too_few_vectors_is_refused():
    model = Counting()
    model.embed_prepared = lambda pixels: np.zeros((len(pixels) - 1, 2), np.float32)

    with pytest.raises(ModelOutputError, match=r"gave float32 \(3, 2\), expected float32 \(4, 2\)"):
        list(BatchEmbedder(model, 4).push(np.zeros((4, 2, 2, 3), np.uint8)))


def test_a_large_piece_is_embedded_as_it_comes_and_not_hoarded():
    model = Counting()
    seen_when_drawn = []

    def pieces():
        for piece in _pieces(10, 2):
            seen_when_drawn.append(list(model.seen))
            yield piece

    list(embed_pieces(pieces(), BatchEmbedder(model, 4)))

    assert seen_when_drawn == [[], [4, 4]]


# Passes that go on while the next batch is made, as on a GPU


class Overlapping(Counting):
    """Each pass is done when its result is asked for; two may be under way. Memory may run out at either end."""

    def __init__(self, *, fits=1000, at_result=False):
        super().__init__(fits, torch.OutOfMemoryError, "CUDA out of memory")
        self.log, self.at_result, self.under_way = [], at_result, 0

    def start(self, pixels):
        self.log.append(f"start {len(pixels)}")
        if not self.at_result:
            self._reserve(pixels)
        self.under_way += 1
        return Pass(self, pixels)

    def embed_prepared(self, pixels):
        return self.start(pixels).result()

    def _reserve(self, pixels):
        if len(pixels) > self.fits:
            raise self.error(self.says)


class Pass:
    def __init__(self, model, pixels):
        self.model, self.pixels = model, pixels

    def done(self):
        return False

    def result(self):
        self.model.log.append(f"result {len(self.pixels)}")
        self.model.under_way -= 1
        if self.model.at_result:
            self.model._reserve(self.pixels)
        return Counting.embed_prepared(self.model, self.pixels)


def test_the_next_pass_is_started_before_the_result_of_the_one_under_way_is_asked_for():
    model = Overlapping()

    results = _values(embed_pieces(_pieces(6, 5), BatchEmbedder(model, 3)))

    assert results == [(0, [0, 1, 2, 3, 4, 5]), (1, [6, 7, 8, 9, 10])]
    assert model.log == [
        "start 3",
        "start 3",
        "result 3",
        "start 3",
        "result 3",
        "start 2",
        "result 3",
        "result 2",
    ]


@pytest.mark.parametrize("at_result", [False, True])
def test_memory_that_runs_out_beside_another_pass_loses_no_frame_and_no_order(at_result, caplog):
    model = Overlapping(at_result=at_result)
    embedder = BatchEmbedder(model, 8)
    pixels = np.arange(24, dtype=np.uint8).repeat(12).reshape(24, 2, 2, 3)

    got = [*embedder.push(pixels[:8])]
    model.fits = 3
    got += [*embedder.push(pixels[8:]), *embedder.finish()]

    assert np.concatenate(got)[:, 0].tolist() == list(range(24))
    assert (embedder.batch_size, model.under_way) == (2, 0)
    assert "Out of memory on cpu with 8 frames a batch; going on with 4" in caplog.text


def test_memory_for_one_frame_is_given_up_only_when_no_other_pass_holds_any():
    model = Overlapping()
    model.fits = 1
    embedder = BatchEmbedder(model, 1)
    reserve = model._reserve
    model._reserve = lambda _: reserve(np.zeros(1 + model.under_way))
    pixels = np.arange(3, dtype=np.uint8).repeat(12).reshape(3, 2, 2, 3)

    assert np.concatenate([*embedder.push(pixels), *embedder.finish()])[:, 0].tolist() == [0, 1, 2]

    model.fits = 0
    with pytest.raises(EmbeddingMemoryError, match="on cpu with a batch of 1 frame"):
        list(embedder.push(pixels))


@given(st.lists(st.integers(0, 9), max_size=8), st.integers(1, 7), st.integers(1, 7), st.booleans())
def test_overlapping_passes_give_every_frame_its_own_vector(sizes, batch_size, fits, at_result):
    results = list(
        embed_pieces(_pieces(*sizes), BatchEmbedder(Overlapping(fits=fits, at_result=at_result), batch_size))
    )

    assert [tag for tag, _ in results] == list(range(len(sizes)))
    assert [len(vectors) for _, vectors in results] == sizes
    assert [v for _, vectors in results for v in vectors[:, 0].tolist()] == list(range(sum(sizes)))
