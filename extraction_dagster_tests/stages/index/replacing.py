"""Processes that replace the points of 60 records round after round, to be killed; and a searcher that watches.

`python replacing.py` takes lines `ROUND HOME [URL PORT]` and forks a process for each, one after the other: it works on
the embedded engine under HOME, or on the server at URL. It prints `go PID`, then a line for each step that is behind
it, `done` after each round, `missed …` if a search missed a record; and its parent `ended STATUS`, once it has.
"""

import contextlib
import os
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from extraction_dagster.records import EmbeddingBatch, VideoRow
from extraction_dagster.settings import Settings
from extraction_dagster.stages.index.edge.store import EdgeStore
from extraction_dagster.stages.index.protocol import CollectionSpec
from extraction_dagster.stages.index.search import search_images
from extraction_dagster.stages.index.server.retry import RetryPolicy
from extraction_dagster.stages.index.server.store import ServerStore
from extraction_dagster.stages.index.stage import replace_records

SPEC = CollectionSpec("frames", dim=32, fingerprint="abc123")
RECORDS = range(1, 61)


def open_store(home, url="", port="0"):
    """The embedded engine, or the server at an address."""
    if not url:
        return EdgeStore(Path(home))
    settings = Settings(home=Path(home), qdrant_url=url, qdrant_grpc_port=int(port), qdrant_timeout_seconds=10)
    retry = RetryPolicy(attempts=12, base_seconds=0.02, longest_seconds=0.5, longest_retry_after_seconds=0.01)
    return ServerStore.connect(settings, retry=retry)


def replace_round(store, round_number):
    """Each record gets 3 to 7 frames, numbered from the round on: some stay, some go, some come."""
    first = round_number % 5
    frames = {record_id: range(first, first + 3 + record_id % 5) for record_id in RECORDS}
    record_ids = np.array([record_id for record_id, part in frames.items() for _ in part], np.int64)
    numbers = np.array([number for part in frames.values() for number in part], np.int64)
    vectors = np.random.default_rng(round_number).standard_normal((len(numbers), 32))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    replace_records(
        store,
        EmbeddingBatch(vectors.astype(np.float16), record_ids, numbers, numbers / 30.0),
        rows={record_id: VideoRow(record_id, "v") for record_id in frames},
        generations=dict.fromkeys(frames, f"g{round_number}"),
    )
    return {record_id: [(number, f"g{round_number}") for number in part] for record_id, part in frames.items()}


def held(store):
    """What is in the store: frame and generation of each point, by record."""
    found = {}
    for page in store.read():
        for payload in page.payloads:
            found.setdefault(payload["record_id"], []).append((payload["frame_number"], payload["generation"]))
    return {record_id: sorted(frames) for record_id, frames in sorted(found.items())}


def missed(store, record_ids=RECORDS, *, dim=SPEC.dim):
    """The records that a search does not find, of which it asks for as many as there are."""
    found = search_images(store, np.ones(dim), limit=len(record_ids), group_by_video=True)
    return set(record_ids) - {hit.record_id for hit in found}


def say(line):
    """Print a line in one write, so that a kill never leaves half of it."""
    os.write(sys.stdout.fileno(), f"{line}\n".encode())


class Watched:
    """A store that prints each of its steps, and is searched after those that change something."""

    def __init__(self, store):
        self._store = store

    def __getattr__(self, name):
        method = getattr(self._store, name)

        def step(*args, **kwargs):
            result = method(*args, **kwargs)
            if name in ("upsert", "delete") and (gone := missed(self._store)):
                say(f"missed {sorted(gone)} after {name}")
            say(name)
            time.sleep(0.003)  # else most kills would hit the step that takes longest
            return result

        return step


@dataclass
class Seen:
    """What a searcher saw: how often it searched, and which records it ever missed."""

    searches: int = 0
    missed: set[int] = field(default_factory=set)


@contextlib.contextmanager
def searching(store, record_ids=RECORDS, *, dim=SPEC.dim):
    """Search again and again in another thread, from before the block until after it; yields what is seen."""
    seen, begun, over = Seen(), threading.Event(), threading.Event()

    def search():
        try:
            while not over.wait(0.05):  # leaves the processor to whoever is watched
                seen.missed |= missed(store, record_ids, dim=dim)
                seen.searches += 1
                begun.set()
        finally:
            begun.set()

    with ThreadPoolExecutor(1) as pool:
        searcher = pool.submit(search)
        try:
            assert begun.wait(60), "no search came to its end"
            yield seen
        finally:
            over.set()
        searcher.result(60)


def replace_for_ever(round_number, *place):
    """Replace round after round, until killed."""
    with open_store(*place) as store:
        store.ensure_collection(SPEC)
        say(f"go {os.getpid()}")
        for number in range(int(round_number), 10**6):
            replace_round(Watched(store), number)
            say("done")


def main():
    """Import what costs seconds once, and fork: a process that is to be killed then begins at once."""
    import grpc  # noqa: F401, PLC0415 - see above
    import qdrant_client  # noqa: F401
    import qdrant_edge  # noqa: F401

    for line in sys.stdin:
        process = os.fork()
        if not process:
            try:
                replace_for_ever(*line.split())
            except BaseException:  # noqa: BLE001 - the child must not go on as its parent does
                traceback.print_exc()
            os._exit(1)
        say(f"ended {os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])}")


if __name__ == "__main__":
    main()
