"""Frames and vectors of a few records, and a place for them on each kind of file system."""

import os
import signal
from dataclasses import dataclass
from itertools import count
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from extraction_dagster.records import EmbeddingBatch, EncodedFrames, IdRange
from extraction_dagster.shards.embedding_store import EmbeddingStore
from extraction_dagster.shards.frame_store import FrameStore
from extraction_dagster.shards.store import ShardRecord


class RenamingMemory(MemoryFileSystem):
    """A file system that is neither local nor known to store objects atomically: files must be renamed into place."""

    protocol = "renamingmemory"
    store = {}  # noqa: RUF012 - MemoryFileSystem keeps its files on the class; this one must not share them
    pseudo_dirs = [""]  # noqa: RUF012 - as above


def kill_at(owner, name, number):
    """Let SIGKILL end this process, a test's child, before the call of a function after so many that it survives."""
    function, calls = getattr(owner, name), count()

    def counted(*arguments, **options):
        if next(calls) >= number:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)

    setattr(owner, name, counted)


fsspec.register_implementation("renamingmemory", RenamingMemory, clobber=True)


@dataclass(frozen=True)
class Kind:
    """One of the two kinds of shards, written and read without a decoder or a model."""

    name: str
    store_class: type
    setting: str

    def open(self, root, fingerprint="f1", source=None):
        return self.store_class(str(root), fingerprint, source=source)

    def write(self, store, *record_ids, partition=IdRange(1, 1000), version="v1", claim=0, address="", name=None):  # noqa: B008, PLR0913 - it is frozen
        """One frame for each record."""
        zeros, numbers, name = np.zeros(1), np.zeros(1, np.int64), name or store.next_name()
        of = {"address": address, "claim": claim}
        if self.name == "frame":
            videos = [EncodedFrames(key, version, [b"jpeg"], zeros, zeros, numbers, 8, 8, **of) for key in record_ids]
            return store.write_shard(partition, videos, name=name)
        count = len(record_ids)
        batch = EmbeddingBatch(
            np.ones((count, 4), np.float16), np.array(record_ids, np.int64), np.zeros(count, np.int64), np.zeros(count)
        )
        return store.write(partition, name, batch, records=[ShardRecord(key, version, 1, **of) for key in record_ids])

    def read(self, store, shard) -> Any:
        read = store.read(shard)
        return [video.record_id for video in read] if self.name == "frame" else read.record_id.tolist()


KINDS = {
    "frame": Kind("frame", FrameStore, "EXTRACTION_FRAMES_URI"),
    "embedding": Kind("embedding", EmbeddingStore, "EXTRACTION_EMBEDDINGS_URI"),
}


@pytest.fixture(params=list(KINDS))
def kind(request):
    """Frames and vectors in turn."""
    return KINDS[request.param]


@pytest.fixture
def said(caplog):
    """`said()`: our own warnings so far; the S3 API of the tests logs every request."""
    return lambda: [record.getMessage() for record in caplog.records if record.name.startswith("extraction_dagster")]


@pytest.fixture(params=["folder", "memory", "renamingmemory", "s3"])
def any_root(request, tmp_path):
    """A place for shards on each kind of file system."""
    if request.param == "s3":
        return f"{request.getfixturevalue('s3_root')}/shards"
    if request.param == "folder":
        return str(tmp_path / "shards with space")
    return f"{request.param}://{tmp_path.name}-{request.param}/shards"
