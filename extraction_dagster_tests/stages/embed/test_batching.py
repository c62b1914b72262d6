from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from extraction_dagster.errors import EmbeddingMemoryError, ModelOutputError
from extraction_dagster.stages.embed.batching import BatchEmbedder, embed_pieces


class Counting:
    """Gives each frame its first pixel as a vector; can run out of memory above a batch size."""

    name = "counting"
    dim = 2
    device = "cpu"
    fingerprint = "0"

    def __init__(self, fits=1000, error=RuntimeError, says="CUDA out of memory. Tried to allocate 2 GiB"):
        self.seen = []
        self.fits, self.error, self.says = fits, error, says

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
        BatchEmbedder(Counting(0), 4).embed(np.zeros((4, 2, 2, 3), np.uint8))


def test_any_other_error_of_the_model_passes_through():
    with pytest.raises(RuntimeError, match="shape mismatch"):
        BatchEmbedder(Counting(0, RuntimeError, "shape mismatch"), 4).embed(np.zeros((4, 2, 2, 3), np.uint8))


def test_a_model_that_gives_too_few_vectors_is_refused():
    model = Counting()
    model.embed_prepared = lambda pixels: np.zeros((len(pixels) - 1, 2), np.float32)

    with pytest.raises(ModelOutputError, match=r"gave float32 \(3, 2\), expected float32 \(4, 2\)"):
        BatchEmbedder(model, 4).embed(np.zeros((4, 2, 2, 3), np.uint8))


def test_a_large_piece_is_embedded_as_it_comes_and_not_hoarded():
    model = Counting()
    seen_when_drawn = []

    def pieces():
        for piece in _pieces(10, 2):
            seen_when_drawn.append(list(model.seen))
            yield piece

    list(embed_pieces(pieces(), BatchEmbedder(model, 4)))

    assert seen_when_drawn == [[], [4, 4]]
