# ruff: noqa: PLR0913, PLR0917 - fixtures are arguments
from __future__ import annotations

import signal
import sys
import threading
import time
from itertools import count

import numpy as np
import pytest

from extraction_dagster.errors.decode import FrameShardError
from extraction_dagster.errors.embed import EmbeddingMemoryError
from extraction_dagster.records import Failure, IdRange, VideoRow
from extraction_dagster.shards.embedding_store import EmbeddingStore
from extraction_dagster.shards.store import ShardRecord, newest_copies
from extraction_dagster.stages.embed.models.registry import load_model
from extraction_dagster.stages.embed.passes import Finished
from extraction_dagster.stages.embed.stage import embed_shards, prefetch

RANGE = IdRange(1, 100)


class Faulty:
    """The real model, but it gives bad values for chosen frames and runs out of memory above a batch size."""

    def __init__(self, model, *, spoil=(), value=np.nan, fits=1000):
        self.name, self.dim, self.device, self.fingerprint = model.name, model.dim, model.device, model.fingerprint
        self._model, self._value, self._fits = model, value, fits
        self._spoil = [image.tobytes() for image in spoil]
        self.batches = []

    def prepare(self, images):
        return self._model.prepare(images)

    def start(self, pixels):
        return Finished(self.embed_prepared(pixels))

    def embed_prepared(self, pixels):
        self.batches.append(len(pixels))
        if len(pixels) > self._fits:
            message = "DefaultCPUAllocator: can't allocate memory"
            raise RuntimeError(message)
        vectors = self._model.embed_prepared(pixels)
        for n, image in enumerate(pixels):
            if image.tobytes() in self._spoil:
                vectors[n] = 0 if self._value == 0 else np.where(np.arange(self.dim) == 5, self._value, vectors[n])
        return vectors

    def pixels_of(self, video, n):
        import simplejpeg  # noqa: PLC0415 - only here

        return self.prepare([simplejpeg.decode_jpeg(video.jpegs[n], colorspace="RGB")])[0]


@pytest.fixture
def store(tmp_path):
    return EmbeddingStore(str(tmp_path / "embeddings"), "f00d")


def whole(shards):
    return [(shard, [record.record_id for record in shard.records]) for shard in shards]


def ids(embedded):
    """The records of each embedding shard."""
    return [[record.record_id for record in one.shard.records] if one.shard else None for one in embedded]


@pytest.fixture
def run(model, cpu_settings, frames, store):
    def run(shards, *, model=model, batch_size=4, store=store, parts=None, **options):
        settings = cpu_settings.model_copy(update={"embed_batch_size": batch_size})
        embedded = embed_shards(
            parts or whole(shards),
            frames=frames,
            store=store,
            model=model,
            partition=RANGE,
            settings=settings,
            **options,
        )
        return list(embedded)

    return run


@pytest.fixture
def shards(make_shard, make_video):
    return [
        make_shard("0001", [make_video(1, 3), make_video(2, 1), make_video(5, 6)]),
        make_shard("0002", [make_video(11, 2)]),
        make_shard("0003", [make_video(12, 2), make_video(13, 5)]),
    ]


def _failure(record_id, error_type, message):
    return Failure(record_id, "v1", "embed", error_type, message)


def test_each_frame_shard_gets_its_embedding_shard_with_every_frame_in_order(run, shards, store):
    done = run(shards)

    assert [(e.num_frames, e.failures) for e in done] == [(10, ()), (2, ()), (7, ())]
    assert all(e.cpu_seconds > 0 and e.wall_seconds > 0 for e in done)
    assert store.shards(RANGE) == [e.shard for e in done]
    first = store.read(done[0].shard)
    assert first.record_id.tolist() == [1, 1, 1, 2, 5, 5, 5, 5, 5, 5]
    assert first.frame_number.tolist() == [0, 30, 60, 0, 0, 30, 60, 90, 120, 150]
    assert first.pts_seconds.tolist() == [0, 1, 2, 0, 0, 1, 2, 3, 4, 5]
    assert done[0].shard.records == (ShardRecord(1, "v1", 3), ShardRecord(2, "v1", 1), ShardRecord(5, "v1", 6))


def test_vectors_are_each_frames_own_normalised_features(run, shards, store, model):
    (_, _, last) = run(shards)
    direct = Faulty(model)
    pixels = np.stack([direct.pixels_of(video, n) for video in shards[2].videos for n in range(len(video))])
    raw = np.concatenate([model.embed_prepared(pixels[n : n + 1]) for n in range(len(pixels))]).astype(np.float64)
    expected = raw / np.linalg.norm(raw, axis=1, keepdims=True)

    vectors = store.read(last.shard).vectors.astype(np.float64)

    assert np.abs(vectors - expected).max() < 1e-4
    assert np.abs(np.linalg.norm(vectors, axis=1) - 1).max() < 1e-3


@pytest.mark.parametrize("batch_size", [1, 7, 32])
@pytest.mark.parametrize("how", ["off", "onnxruntime"])
def test_vectors_do_not_depend_on_the_batch_size(
    shards, frames, store, model, cpu_settings, tmp_path, fast_home, how, batch_size
):
    settings = cpu_settings.model_copy(update={"compile": how, "home": fast_home})
    chosen = load_model(settings) if how != "off" else model
    other = EmbeddingStore(str(tmp_path / "other"), "f00d")

    def vectors(into, size):
        wanted = settings.model_copy(update={"embed_batch_size": size})
        done = embed_shards(whole(shards), frames=frames, store=into, model=chosen, partition=RANGE, settings=wanted)
        return np.concatenate([into.read(e.shard).vectors for e in done])

    one, two = vectors(store, 16), vectors(other, batch_size)

    # Sums in another order may round a number to its other side: one step of float16, of few numbers.
    steps = np.abs(one.astype(np.float32) - two.astype(np.float32)) / np.spacing(np.maximum(one, two))
    assert (one.shape, steps.max() <= 1) == ((19, 1280), True)
    assert (steps > 0).mean() < 0.02


@pytest.fixture(scope="module")
def fast_home(tmp_path_factory):
    """Where a compiled model is kept for this module's tests."""
    return tmp_path_factory.mktemp("home")


def test_batches_are_filled_across_videos_and_shards(run, shards, model):
    faulty = Faulty(model)

    run(shards, model=faulty, batch_size=8)

    assert faulty.batches == [8, 8, 3]


def test_vectors_are_made_under_the_claim_of_their_row_and_their_name_says_now(run, shards, store):
    (before,) = run(shards[1:2])
    rows = {12: VideoRow(12, "12.mp4", content_version="v1", address="a" * 16, claim=7)}

    (again,) = run([], parts=[(shards[2], [12])], rows=rows)
    (stored, later) = store.shards(RANGE)

    assert stored == before.shard
    assert later == again.shard
    assert later.records == (ShardRecord(12, "v1", 2, address="a" * 16, claim=7),)
    assert later.name > before.shard.name


def test_only_the_records_that_are_wanted_are_embedded(run, shards, model):
    faulty = Faulty(model)

    done = run([], parts=[(shards[0], [1, 5]), (shards[2], [13])], model=faulty)

    assert ids(done) == [[1, 5], [13]]
    assert sum(faulty.batches) == 14


@pytest.mark.parametrize(
    ("value", "word"),
    [(np.nan, "NaN"), (np.inf, "an infinite value"), (-np.inf, "an infinite value"), (0, "length zero")],
)
def test_a_bad_vector_fails_its_record_alone(run, shards, store, model, value, word):
    faulty = Faulty(model, value=value)
    faulty._spoil = [faulty.pixels_of(shards[0].videos[2], 4).tobytes()]

    done = run(shards, model=faulty)

    assert [e.failures for e in done] == [
        (
            _failure(
                5,
                "InvalidVectorError",
                f"Frame 120 of record 5 got a vector with {word} from model 'efficientnet-lite0', expected finite "
                "values and a length above zero. No vector of the record was kept; the range goes on. "
                "'extraction retry 5' tries it again.",
            ),
        ),
        (),
        (),
    ]
    assert [r.record_id for r in done[0].shard.records] == [1, 2]
    assert store.read(done[0].shard).record_id.tolist() == [1, 1, 1, 2]


def test_the_next_shards_are_read_while_one_is_embedded(model, cpu_settings, shards, frames, store):
    settings = cpu_settings.model_copy(update={"embed_batch_size": 1})
    running = embed_shards(whole(shards), frames=frames, store=store, model=model, partition=RANGE, settings=settings)

    assert ids([next(running)]) == [[1, 2, 5]]
    deadline = time.monotonic() + 60
    while "0003" not in frames.asked and time.monotonic() < deadline:
        time.sleep(0.01)

    assert frames.asked == ["0001", "0002", "0003"]
    running.close()
    assert [shard.num_frames for shard in store.shards(RANGE)] == [10]


def test_a_record_that_fails_twice_keeps_its_first_error(run, make_shard, make_video, model):
    broken = make_video(2, 9, broken_frame=6)
    faulty = Faulty(model)
    faulty._spoil = [faulty.pixels_of(broken, 1).tobytes()]

    (done,) = run([make_shard("0001", [make_video(1, 2), broken])], model=faulty)

    assert [(f.record_id, f.error_type) for f in done.failures] == [(2, "InvalidVectorError")]


@pytest.mark.parametrize("readers", [1, 3])
def test_several_readers_keep_every_order(shards, frames, store, model, cpu_settings, readers):
    settings = cpu_settings.model_copy(update={"embed_readers": readers, "embed_batch_size": 2})

    done = list(
        embed_shards(whole(shards), frames=frames, store=store, model=model, partition=RANGE, settings=settings)
    )

    assert [store.read(e.shard).record_id.tolist() for e in done] == [
        [1, 1, 1, 2, 5, 5, 5, 5, 5, 5],
        [11, 11],
        [12, 12, 13, 13, 13, 13, 13],
    ]
    assert frames.asked == ["0001", "0002", "0003"]


def test_a_frame_that_is_no_jpeg_fails_its_record_alone_and_sets_it_aside(run, make_shard, make_video, store, frames):
    videos = [make_video(1, 2), make_video(2, 9, broken_frame=6), make_video(3, 1, broken_frame=0), make_video(4, 2)]

    (done,) = run([make_shard("0001", videos)])

    assert [(f.record_id, f.error_type) for f in done.failures] == [(2, "StoredFrameError"), (3, "StoredFrameError")]
    assert done.failures[0].message.startswith("Stored frame 180 of record 2 is no readable JPEG (")
    assert store.read(done.shard).record_id.tolist() == [1, 1, 4, 4]
    assert frames.aside == [("0001", [2, 3])]


def test_a_shard_that_is_damaged_half_way_fails_its_other_records_and_is_set_aside(run, shards, store, frames):
    read = frames.read

    def broken(shard, *, only):
        for video in read(shard, only=only):
            if video.record_id == 2:
                raise FrameShardError("0001", "it is damaged")
            yield video

    frames.read = broken
    done = run(shards)

    assert ids(done) == [[1], [11], [12, 13]]
    assert [(f.record_id, f.error_type, f.permanent) for f in done[0].failures] == [
        (2, "FrameShardError", False),
        (5, "FrameShardError", False),
    ]
    assert frames.aside == [("0001", None)]
    assert [shard.num_frames for shard in store.shards(RANGE)] == [3, 2, 7]


def test_a_shard_of_which_no_record_gives_vectors_writes_nothing(run, make_shard, make_video, store):
    (done,) = run([make_shard("0001", [make_video(3, 1, broken_frame=0)])])

    assert (done.shard, done.num_frames, [f.record_id for f in done.failures]) == (None, 0, [3])
    assert store.shards(RANGE) == []


def test_memory_that_runs_out_halves_the_batch_and_loses_nothing(run, shards, store, model):
    faulty = Faulty(model, fits=3)

    done = run(shards, model=faulty, batch_size=8)

    assert faulty.batches[:3] == [8, 4, 2]
    assert max(faulty.batches[2:]) == 2
    assert [e.num_frames for e in done] == [10, 2, 7]
    assert store.read(done[2].shard).record_id.tolist() == [12, 12, 13, 13, 13, 13, 13]


def test_no_memory_at_all_ends_with_a_clear_error_and_no_shard(run, shards, store, model):
    with pytest.raises(EmbeddingMemoryError, match="ran out of memory on cpu with a batch of 1 frame"):
        run(shards, model=Faulty(model, fits=0))

    assert store.shards(RANGE) == []


def test_no_shards_are_no_work(run):
    assert run([]) == []


def test_a_run_that_is_dropped_half_way_leaves_its_finished_shards_and_no_thread(
    model, cpu_settings, shards, frames, store
):
    before = threading.active_count()
    running = embed_shards(
        whole(shards), frames=frames, store=store, model=model, partition=RANGE, settings=cpu_settings
    )

    assert ids([next(running)]) == [[1, 2, 5]]
    running.close()

    assert [shard.num_frames for shard in store.shards(RANGE)] == [10]
    assert threading.active_count() == before


def test_a_store_that_fails_ends_the_run_and_keeps_what_was_before_it(run, shards, store, frames):
    read = frames.read

    def broken(shard, *, only):
        if shard.name == "0003":
            message = "frame shard 0003 is torn"
            raise OSError(message)
        return read(shard, only=only)

    frames.read = broken
    with pytest.raises(OSError, match="0003 is torn"):
        run(shards, batch_size=1)

    assert [shard.num_frames for shard in store.shards(RANGE)] == [10, 2]


SLOW_RUN = """
import faulthandler
faulthandler.dump_traceback_later(300, exit=True)  # the test must not wait for a line for ever
import sys
sys.path.insert(0, sys.argv[2])
from conftest import MemoryFrames, MemoryShard, video
from extraction_dagster.records import IdRange
from extraction_dagster.settings import Settings
from extraction_dagster.shards.embedding_store import EmbeddingStore
from extraction_dagster.stages.embed.models.registry import load_model
from extraction_dagster.stages.embed.stage import embed_shards
settings = Settings(device="cpu", embed_batch_size=2, embed_threads=1)
parts = [(MemoryShard(f"{n:04d}", [video(n, 6)]), [n]) for n in range(1, 21)]
for done in embed_shards(parts, frames=MemoryFrames(), store=EmbeddingStore(sys.argv[1], "f00d"),
                         model=load_model(settings), partition=IdRange(1, 100), settings=settings):
    print(done.shard.records[0].record_id, flush=True)
"""


def test_after_kill_9_only_unfinished_shards_are_embedded_and_nothing_is_torn(
    run, make_shard, make_video, store, frames, tmp_path, request, commands
):
    folder = str(request.path.parent)
    with commands.start([sys.executable, "-c", SLOW_RUN, str(tmp_path / "embeddings"), folder]) as worker:
        reported = [worker.stdout.readline().strip() for _ in range(3)]
        worker.send_signal(signal.SIGKILL)
    there = newest_copies(store.shards(RANGE)).keys()
    assert reported == ["1", "2", "3"]
    assert {1, 2, 3} <= there
    assert len(there) < 20

    run([make_shard(f"{n:04d}", [make_video(n, 6)]) for n in range(1, 21) if n not in there])

    assert frames.asked == [f"{n:04d}" for n in range(1, 21) if n not in there]
    assert [shard.num_frames for shard in store.shards(RANGE)] == [6] * 20


# Reading ahead


def same(item):
    return item


def test_items_come_in_order_and_from_another_thread():
    def items():
        for n in range(50):
            yield n, threading.current_thread() is threading.main_thread()

    with prefetch(items(), same, depth=3) as drawn:
        assert list(drawn) == [(n, False) for n in range(50)]


def test_an_error_is_raised_at_its_place_in_the_order():
    def items():
        yield 1
        yield 2
        message = "third"
        raise OSError(message)

    seen = []
    with pytest.raises(OSError, match="third"), prefetch(items(), same, depth=5) as drawn:
        seen.extend(drawn)

    # extend takes nothing from an iterator that raises half-way but what it already took
    assert seen == [1, 2]


def test_the_reader_never_runs_further_ahead_than_the_depth():
    started = []
    waiting = threading.Semaphore(0)

    def items():
        for n in count():
            started.append(n)
            waiting.release()
            yield n

    with prefetch(items(), same, depth=2) as drawn:
        next(drawn)  # frees one place: items 0, 1, 2 may be drawn, a fourth may not
        for _ in range(3):
            assert waiting.acquire(timeout=10)
        assert not waiting.acquire(timeout=0.2)
        assert started == [0, 1, 2]


def test_leaving_early_ends_the_thread():
    before = threading.active_count()

    with prefetch(count(), same, depth=2) as drawn:
        assert next(drawn) == 0

    assert threading.active_count() == before


def test_leaving_by_an_interrupt_ends_the_thread():
    before = threading.active_count()

    def interrupted():
        with prefetch(count(), same, depth=2):
            message = "now"
            raise KeyboardInterrupt(message)

    with pytest.raises(KeyboardInterrupt, match="now"):
        interrupted()

    assert threading.active_count() == before


def test_items_are_worked_on_at_once_and_still_come_in_order():
    both = threading.Barrier(2)

    def work(n):
        both.wait(timeout=30)  # never passes unless another thread works too
        return n * 10

    with prefetch(range(8), work, depth=4, threads=2) as done:
        assert list(done) == [0, 10, 20, 30, 40, 50, 60, 70]


def test_an_error_of_the_work_is_raised_in_its_place():
    def work(n):
        if n == 2:
            message = "third"
            raise OSError(message)
        return n

    seen = []
    with pytest.raises(OSError, match="third"), prefetch(count(), work, depth=5, threads=3) as done:
        seen.extend(done)

    assert seen == [0, 1]
