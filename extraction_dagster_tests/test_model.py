"""The model check: whatever people and machines do, in any order, the collection says what the table says.

A Hypothesis state machine does what can happen to a deployment: rows, files, addresses, settings, operators' commands,
moments in which the table is empty, processes that are killed, frozen and thawed between any two of their writes, lost
points, damaged shards, merges. An oracle knows what the collection must hold. The tables (SQLite), the catalog, the
ticks, the ranges, the shards and the reconciliation are the real ones, with windows, budgets and shards far smaller
than the data; fetching, decoding and the model alone are stand-ins, whose vectors say what they were made from.
The store of points is an exact one in memory, as a server that many write to; the last test uses the embedded engine.

Long because the world, the oracle and the events are one thing: each event needs both of the others.
"""

import contextlib
import copy
import functools
import hashlib
import importlib
import itertools
import os
import shutil
import sqlite3
import sys
import tempfile
import zlib
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import sqlalchemy as sa
from fsspec.implementations.memory import MemoryFileSystem
from greenlet import getcurrent, greenlet
from hypothesis import HealthCheck, currently_in_test_context, note
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from pydantic import SecretStr

from extraction_dagster.errors import ExtractionError
from extraction_dagster.errors.catalog import FileUnavailableError
from extraction_dagster.errors.decode import StoredFrameError
from extraction_dagster.errors.index import CollectionInUseError, CollectionMissingError
from extraction_dagster.ranges import decode as ranges_decode
from extraction_dagster.ranges import embed as ranges_embed
from extraction_dagster.ranges import index as ranges_index
from extraction_dagster.ranges import work as ranges_work
from extraction_dagster.records import EncodedFrames, IdRange, Outcome, fingerprint
from extraction_dagster.settings import Settings
from extraction_dagster.shards import compaction
from extraction_dagster.stages.catalog import catalog as catalog_module
from extraction_dagster.stages.catalog import changes, database
from extraction_dagster.stages.catalog.fetch.fetching import Fetched
from extraction_dagster.stages.catalog.identity import source_identity
from extraction_dagster.stages.decode import stage as decode_stage
from extraction_dagster.stages.decode.workers.pool import Decoded
from extraction_dagster.stages.embed import stage as embed_stage
from extraction_dagster.stages.embed.models import registry
from extraction_dagster.stages.index import reconcile as reconcile_module
from extraction_dagster.stages.index import stage as index_stage
from extraction_dagster.stages.index import staging
from extraction_dagster.stages.index.edge.store import EdgeStore
from extraction_dagster.stages.index.points import Dialect, PointFilter, point_id
from extraction_dagster.stages.index.protocol import CollectionSpec, PointStore
from extraction_dagster.ticks import looks, newest
from extraction_dagster.ticks import tick as tick_module
from extraction_dagster.ticks.cursor import CursorState, Requests
from extraction_dagster.ticks.looks import Round
from extraction_dagster.ticks.memory import recall, remember
from extraction_dagster.ticks.places import History, Outcomes

DIM = 8
PURGE_AFTER = timedelta(hours=1)
BEGIN = datetime(2026, 1, 5, tzinfo=UTC)
NAMES = ("a.mp4", "b.mp4", "c.mp4")
ROOTS = ("/one", "/two")
IDS = st.integers(1, 8)
RANGES = st.sampled_from([IdRange(1, 4), IdRange(5, 8), IdRange(3, 6), IdRange(1, 8), IdRange(2, 2)])
WHOLE = IdRange(1, 99)
STEPS = {"decode": ranges_decode.decode_range, "embed": ranges_embed.embed_range, "index": ranges_index.index_range}
ALL_STEPS = tuple(STEPS)
OF_AN_ENTRY = (
    "record_id",
    "state",
    "source_version",
    "frames_fingerprint",
    "embedding_fingerprint",
    "num_frames",
    "num_points",
    "address",
    "claim",
    "updated_at",
)


# What processes are: each runs until it ends, or until it is stopped before one of its writes.


class Killed(BaseException):
    """SIGKILL: from here on nothing that the process does has an effect."""


STOPS = {
    "killed": {"write", "transaction", "commit"},
    "interrupted": {"write", "transaction", "commit"},
    "frozen": {"write", "transaction", "read"},
    "frozen before it writes": {"write", "transaction"},
    "stumbles": {"read"},
}


class Process:
    """Work that can be stopped before any of its writes: killed, interrupted (Ctrl+C), frozen, or its store stumbles.

    It runs in a greenlet: a frozen one keeps its whole stack, and goes on where it stopped.
    """

    alive: ClassVar = {}

    def __init__(self, kind, work, *, skew=timedelta(0)):
        self.kind, self.skew, self._work = kind, skew, work
        self.left, self.how, self.is_dead, self.has_looked = None, "", False, True
        self.error, self.result, self.num_transactions = None, None, 0
        self._greenlet = greenlet(self._main)
        self.alive[self._greenlet] = self

    def _main(self):
        try:
            self.result = self._work()
        except (Killed, KeyboardInterrupt, ExtractionError, OSError) as error:
            self.error = error
        finally:
            self.alive.pop(self._greenlet, None)

    def go(self, how="", after=None):
        """Until it ends, or is stopped before its write number `after` from now. Returns whether it has ended."""
        self.left, self.how = (after, how) if how else (None, "")
        self._greenlet.switch()
        return self._greenlet.dead

    def end(self):
        """Unwind what is frozen, without any effect."""
        if not self._greenlet.dead:
            self.is_dead = True
            self._greenlet.throw(Killed)

    def before(self, what):
        if self.is_dead:
            raise Killed
        holds = self.how.startswith("frozen") and self.num_transactions  # it would only make everybody wait
        if self.left is not None and what in STOPS[self.how] and not holds:
            self.left -= 1
            if self.left < 0:
                self.left = None
                self._stop()
        if what in {"look", "transaction"}:
            self.has_looked = True

    def _stop(self):
        if self.how.startswith("frozen"):
            self.has_looked = False
            self._greenlet.parent.switch()
            if self.is_dead:
                raise Killed
        elif self.how == "killed":
            self.is_dead = True
            raise Killed
        elif self.how == "interrupted":
            raise KeyboardInterrupt
        else:
            raise PermissionError(13, "Permission denied")

    @classmethod
    def current(cls):
        return cls.alive.get(getcurrent())


def before(what):
    """A process is about to do something.

    `write` or `read` a store of shards or points, `look` into a database, begin a `transaction` there, or `commit` it.
    """
    if World.now is not None:
        World.now.look_at_marks()
    process = Process.current()
    if process is not None:
        process.before(what)


# What videos are: their frames and vectors say which file, which version of it, and how they were made.


@functools.cache
def frame_numbers(path, version, fps):
    """Not every version has as many frames as the one before."""
    return tuple(int(30 / fps) * number for number in range(1 + (zlib.crc32(path.encode()) + version + int(fps)) % 3))


@functools.cache
def picture(path, version, fps, number):
    """A stored frame: bytes that can't be changed without notice."""
    said = f"{path}|{version}|{fps:g}|{number}".encode()
    return said + b"|%08x" % zlib.crc32(said)


@functools.cache
def vector_of(model, said):
    """What a model makes of a picture."""
    raw = np.frombuffer(hashlib.sha256(model.encode() + said).digest()[:DIM], np.uint8).astype(np.float32) - 127.5
    return raw / np.linalg.norm(raw)


class StandInFetcher:
    """Reads the world's disk in place of files."""

    def __init__(self, settings):
        self.root = settings.allowed_roots[0]

    @staticmethod
    def is_remote(row):  # noqa: ARG004 - the interface
        return False

    def release(self, record_id, *, keep):
        """Nothing is cached."""

    def close(self):
        """Nothing is open."""


def stand_in_fetch(rows, fetcher, *, threads):  # noqa: ARG001 - the interface
    for row in rows:
        path = str(Path(fetcher.root) / row.uri)
        if row.address:
            World.now.path_of[row.address] = path
        if path in World.now.missing:
            yield Fetched(row, error=FileUnavailableError(row.uri, "No such file or directory"))
        else:
            yield Fetched(row, path=Path(path))


def stand_in_decode(jobs, options):  # noqa: ARG001 - the interface
    for job in jobs:
        if job is None or isinstance(job, Decoded):
            yield job
            continue
        version, fps = World.now.disk[job.path], job.sampling.fps
        numbers = np.array(frame_numbers(job.path, version, fps), np.int64)
        jpegs = [picture(job.path, version, fps, number) for number in numbers.tolist()]
        times = numbers / 30.0
        frames = EncodedFrames(job.record_id, job.content_version, jpegs, times, times, numbers, 8, 8)
        yield Decoded(Outcome(job.record_id, frames=frames))


def stand_in_picture(frames, n):
    said, _, sum_ = bytes(frames.jpegs[n]).rpartition(b"|")
    if b"%08x" % zlib.crc32(said) != sum_:
        raise StoredFrameError(frames.record_id, int(frames.frame_number[n]), "it is damaged")
    return np.frombuffer(bytes(frames.jpegs[n]).ljust(64), np.uint8).reshape(1, 64, 1)


@contextlib.contextmanager
def stand_in_prefetch(items, work, *, depth, threads=1):  # noqa: ARG001 - the interface
    yield map(work, items)


class StandInModel:
    """Makes vectors of pictures by what they say."""

    device, dim, network_dim = "cpu", DIM, DIM

    def __init__(self, settings):
        self.name, self.fingerprint = settings.model, model_fingerprint(settings)

    def prepare(self, images):
        return np.stack(images)

    def start(self, pixels):
        said = [bytes(image.tobytes()).rstrip() for image in pixels]
        vectors = np.stack([vector_of(self.name, item) for item in said]).astype(np.float32)
        return SimpleNamespace(done=lambda: True, result=lambda: vectors)


@functools.cache
def _fingerprint_of(model):
    return fingerprint(model=model)


def model_fingerprint(settings):
    return _fingerprint_of(settings.model)


# The store of points: exact, in memory, open to many at once.


@dataclass
class Part:
    """A condition, or what one matches: whatever an engine's own classes would hold."""

    must: list | None = None
    must_not: list | None = None
    should: list | None = None
    key: str | None = None
    match: "Part | None" = None
    range: "Part | None" = None
    any: list | None = None
    value: object = None
    gte: object = None
    gt: object = None
    lte: object = None
    lt: object = None
    ids: object = None

    def holds(self, identity, payload):
        if self.ids is not None:
            return identity in self.ids
        if self.key is None:
            return (
                all(part.holds(identity, payload) for part in self.must or ())
                and not any(part.holds(identity, payload) for part in self.must_not or ())
                and (not self.should or any(part.holds(identity, payload) for part in self.should))
            )
        value = payload.get(self.key)
        if self.match is not None:
            return value in self.match.any if self.match.any is not None else value == self.match.value
        limits = self.range
        return value is not None and not (
            (limits.gte is not None and value < limits.gte)
            or (limits.gt is not None and value <= limits.gt)
            or (limits.lte is not None and value > limits.lte)
            or (limits.lt is not None and value >= limits.lt)
        )


MODELS = SimpleNamespace(Filter=Part, FieldCondition=Part, MatchAny=Part, MatchValue=Part)


@dataclass
class Held:
    """A collection: its points by id, each a vector and a payload."""

    spec: CollectionSpec
    points: dict = field(default_factory=dict)

    def of(self, record_id):
        return {key: vector for key, (vector, payload) in self.points.items() if payload["record_id"] == record_id}


class MemoryPoints(PointStore):
    """A connection to the world's server."""

    def __init__(self, source=""):
        self._held, self._source = None, source

    def __repr__(self):
        return "MemoryPoints()"

    @property
    def _server(self):
        return World.now.server

    def ensure_collection(self, spec, *, staged=False):
        before("write")
        there, current = self._server.setdefault(spec.name, {}), World.now.in_use.get(spec.name)
        if current is not None:
            self._require_own(there[current].spec)
            if not staged:
                spec.require_same_vectors(there[current].spec, "memory")
        self._held = there.setdefault(spec.fingerprint, Held(replace(spec, source=self._source)))
        self._claim()
        if current is None and not staged:
            World.now.in_use[spec.name] = spec.fingerprint

    def open_collection(self, name, *, fingerprint=None):
        before("read")
        chosen = fingerprint or World.now.in_use.get(name)
        if chosen is None or chosen not in self._server.get(name, {}):
            raise CollectionMissingError(name, "memory")
        self._require_own(self._server[name][chosen].spec)
        self._held = self._server[name][chosen]
        return self._held.spec

    def publish(self):
        before("write")
        World.now.in_use[self._held.spec.name] = self._held.spec.fingerprint

    def collections(self, name):
        return {key: key == World.now.in_use.get(name) for key in self._server.get(name, {})}

    def drop(self, name, fingerprint):
        before("write")
        if World.now.in_use.get(name) == fingerprint:
            raise CollectionInUseError(f"{name}-{fingerprint}", "memory")
        self._require_own(self._server[name][fingerprint].spec)
        del self._server[name][fingerprint]

    def optimize(self):
        """Nothing to do."""

    def flush(self):
        """Nothing to do."""

    def close(self):
        """Nothing to do."""

    _dialect = Dialect(MODELS, number_range=Part, datetime_range=Part, has_ids=lambda ids: Part(ids=set(ids)))

    def _open(self, operation):  # noqa: ARG002 - the interface
        return (self._held.spec,)

    def _note_source(self, source):
        before("write")
        self._held.spec = replace(self._held.spec, source=source)
        return True

    def _chosen(self, condition):
        return [
            key
            for key, (_, payload) in sorted(self._held.points.items())
            if condition is None or condition.holds(key, payload)
        ]

    def _write(self, batch):
        before("write")
        with World.now.watching({payload["record_id"] for payload in batch.payloads}):
            rows = zip(batch.ids, batch.vectors, batch.payloads, strict=True)
            self._held.points.update({key: (vector, dict(payload)) for key, vector, payload in rows})

    def _set_payload(self, values, condition):
        before("write")
        for key in self._chosen(condition):
            self._held.points[key][1].update(values)

    def _remove(self, condition):
        before("write")
        chosen = self._chosen(condition)
        with World.now.watching({self._held.points[key][1]["record_id"] for key in chosen}):
            for key in chosen:
                del self._held.points[key]

    def _count(self, condition):
        before("read")
        return len(self._chosen(condition))

    def _nearest(self, vector, limit, condition, score_threshold):
        raise NotImplementedError

    def _page(self, condition, size, offset, *, payload, vectors):  # noqa: ARG002 - all of it, always
        before("read")
        chosen = [key for key in self._chosen(condition) if offset is None or key >= offset]
        page = [
            SimpleNamespace(id=key, vector=v, payload=p) for key in chosen[:size] for v, p in [self._held.points[key]]
        ]
        return page, chosen[size] if len(chosen) > size else None


# The world.


@dataclass(frozen=True)
class Kind:
    """What the table and the deployment are like.

    Attributes:
        has_version: Whether a column says that a row's file has changed.
        has_marks: Whether the table says by itself which rows are done.
        grows: Whether each version is greater than all before it, and an index shows the newest; but for late commits.
        stamps: Whether a trigger changes the version with each change of a row, our own marks included.
        one_database: Whether the ledger lies beside the table.
        keep_frames: The setting.
        mirror: The setting.
    """

    has_version: bool = True
    has_marks: bool = True
    grows: bool = False
    stamps: bool = False
    one_database: bool = True
    keep_frames: str = "all"
    mirror: str = "none"

    @property
    def folder(self):
        is_so = (self.has_version, self.has_marks, self.grows, self.stamps, self.one_database)
        flags = "".join("ny"[value] for value in is_so)
        return World.folder / f"{flags}-{self.keep_frames}-{self.mirror}"


@dataclass(frozen=True)
class Options:
    """What an operator may change: settings, by name."""

    fps: float = 1.0
    model: str = "m1"
    root: str = ROOTS[0]
    predicate: str = "wanted"
    batch_size: int = 4


class World:
    """A deployment, what is true of its videos, and what was done to it.

    Attributes:
        rows: By id, what is true of the table, also in a moment in which it shows something else: its uri, and whether
            it is wanted.
        disk: By path, the file's version.
        missing: Paths whose file can't be read now.
    """

    now: "World | None" = None
    folder: Path
    catalogs: ClassVar = {}
    engines: ClassVar = {}

    def __init__(self, kind=None):
        World.now = None
        self.kind = kind or Kind()
        self.options, self.clock, self.collection = Options(), BEGIN, "video_frames"
        self.beats = itertools.count(0, 0.1)
        self.rows, self.missing, self.number = {}, set(), 0
        self.disk = {f"{root}/{name}": 0 for root in ROOTS for name in NAMES}
        self.server, self.in_use, self.path_of, self.writers = {}, {}, {}, {}
        self.stored, self.floor = None, None
        self.ranges, self.running, self.histories, self.ended, self.broken = set(), {}, {}, {}, set()
        self.frozen, self.moment, self.looks, self.marked = [], "", [], {}
        self.spoiled, self.has_damage, self.has_ledger, self.has_written = set(), False, False, True
        self.has_unknown = self.is_fresh = self.has_late = False
        self.objection = ""
        self.fps_of, self.model_of, self.remade = {}, {}, set()
        MemoryFileSystem.store.clear()
        MemoryFileSystem.pseudo_dirs[:] = [""]
        self._restore()
        self.source = sqlite3.connect(self.kind.folder / "source.db", isolation_level=None)
        self.state = sqlite3.connect(self.state_file, isolation_level=None)
        self.has_ledger = True
        World.now = self

    @property
    def state_file(self):
        return self.kind.folder / ("source.db" if self.kind.one_database else "state.db")

    def close(self):
        for process in self.frozen:
            process.end()
        self.frozen.clear()
        self.source.close()
        self.state.close()
        World.now = None

    def _restore(self):
        """A table without rows and fresh state tables; made once for each kind."""
        folder = self.kind.folder
        if not (folder / "fresh").exists():
            (folder / "fresh").mkdir(parents=True)
            with contextlib.closing(sqlite3.connect(folder / "source.db")) as connection:
                for statement in _table(self.kind):
                    connection.execute(statement)
                connection.commit()
            World.now = self
            self.catalog()
            World.now = None
            for file in folder.glob("*.db"):
                shutil.copyfile(file, folder / "fresh" / file.name)
        (folder / "neighbour.db").unlink(missing_ok=True)
        for engine in self.engines.values():
            engine.dispose()
        for file in (folder / "fresh").iterdir():
            shutil.copyfile(file, folder / file.name)
        (folder / "checkpoint").unlink(missing_ok=True)

    def settings(self, **changes):
        return _settings(self.kind, replace(self.options, **changes))

    def connect(self, settings=None, **_options):
        """A connection to the server, as `open_point_store` gives it."""
        return MemoryPoints(source_identity(settings or self.settings()))

    def held(self):
        """What each collection holds, by fingerprint."""
        return self.server.get(self.collection, {})

    def used(self):
        """The fingerprint of the collection that searches use."""
        return self.in_use.get(self.collection)

    def take_points(self, record_id):
        """Points are gone, and nobody of ours removed them."""
        for held in self.held().values():
            for key in held.of(record_id):
                del held.points[key]

    def catalog(self, settings=None):
        settings = settings or self.settings()
        key = (settings.source_url, settings.source_table, settings.source_predicate, settings.allowed_roots)
        if key not in self.catalogs:
            self.catalogs[key] = catalog_module.Catalog(settings)
        catalog = copy.copy(self.catalogs[key])
        catalog.settings = settings
        return catalog

    # What people do to the table and the files.

    def add_row(self, record_id, name):
        if record_id not in self.rows:
            self.rows[record_id] = SimpleNamespace(uri=name, wanted=True)
            values = (record_id, name, self.next_version())
            self.source.execute("INSERT INTO videos (id, path, version, wanted) VALUES (?, ?, ?, 1)", values)

    def remove_row(self, record_id):
        if self.rows.pop(record_id, None):
            self.has_unknown = True  # what is stored of it stays for a day
            self.source.execute("DELETE FROM videos WHERE id = ?", (record_id,))

    def want(self, record_id, *, wanted):
        if record_id in self.rows:
            self.rows[record_id].wanted = wanted
            self.source.execute("UPDATE videos SET wanted = ? WHERE id = ?", (wanted, record_id))

    def change_file(self, path, *, late=False):
        """Without a version column nobody sees it: an operator says so.

        A late one commits with a version that is older than what was seen since. Of rows that the ledger does not know
        what an earlier ledger's frames say counts, so that lost state tables can be made anew out of what is stored:
        only a forced run decodes them again, and here nobody asks for one.
        """
        ids = [record_id for record_id, row in self.rows.items() if self.path(row) == path]
        if not self.kind.has_version and self.is_fresh and not self.entries("true").keys() >= set(ids):
            return
        self.disk[path] += 1
        if self.kind.has_version:
            for record_id in ids:
                version = f"v0-{self.next_number()}" if late and self.kind.grows else self.next_version()
                self.has_late = self.has_late or late
                self.source.execute("UPDATE videos SET version = ? WHERE id = ?", (version, record_id))
        elif ids:
            self.reprocess(min(ids) - 1)

    def change_address(self, record_id, name):
        if record_id in self.rows:
            self.rows[record_id].uri = name
            self.source.execute("UPDATE videos SET path = ? WHERE id = ?", (name, record_id))

    def clear_mark(self, record_id):
        if self.kind.has_marks:
            self.source.execute("UPDATE videos SET is_extracted = 0, is_embedded = 0 WHERE id = ?", (record_id,))

    def spoil(self, record_id):
        """A row's text is none: nobody can read it."""
        if record_id in self.rows:
            self.spoiled.add(record_id)
            self.source.execute("UPDATE videos SET code = CAST(x'ff' AS TEXT) WHERE id = ?", (record_id,))

    def correct(self):
        for record_id in self.spoiled:
            self.source.execute("UPDATE videos SET code = 'c' WHERE id = ?", (record_id,))
        self.spoiled.clear()

    def begin_moment(self, moment, ids=()):
        """The table shows less than there is: it is empty, some rows are not there, or the predicate is mistyped."""
        self.moment = moment
        if moment == "mistyped":
            self.options = replace(self.options, predicate="NOT wanted")
            return
        gone = list(self.rows) if moment == "empty" else [key for key in self.rows if key in ids]
        for record_id in gone:
            self.source.execute("INSERT INTO aside SELECT * FROM videos WHERE id = ?", (record_id,))
            self.source.execute("DELETE FROM videos WHERE id = ?", (record_id,))

    def end_moment(self):
        self.moment, self.options = "", replace(self.options, predicate="wanted")
        self.source.execute("INSERT INTO videos SELECT * FROM aside")
        self.source.execute("DELETE FROM aside")

    def visible(self):
        return {key for (key,) in self.source.execute(f"SELECT id FROM videos WHERE {self.options.predicate}")}

    def next_number(self):
        self.number += 1
        return self.number

    def next_version(self):
        """As the trigger makes them, where they grow."""
        if not self.kind.grows:
            return f"v{self.next_number()}"
        self.source.execute("UPDATE stamps SET number = number + 1")
        return self.source.execute("SELECT printf('v%06d', number) FROM stamps").fetchone()[0]

    def path(self, row):
        return f"{self.options.root}/{row.uri}"

    # What operators do.

    def reprocess(self, after_id, how="", after=None):
        """`extraction checkpoint set ID --reprocess`, without its request for the cursor."""
        self.remade |= {key for key in self.rows if key > after_id}
        process = Process("operator", lambda: self.catalog().reprocess_after(after_id))
        process.go(how, after)
        if process.is_dead:  # whoever typed it types it again
            self.reprocess(after_id)

    def set_floor(self, value):
        """`extraction checkpoint set` and `reset`."""
        Requests(self.catalog().state_engine).add("reset" if value is None else "set", value)
        self.floor = value

    def retry(self):
        self.catalog().ledger.retry(record_ids=None, error_type=None)

    def change_model(self, model):
        """`extraction collection stage` with the settings of another model."""
        self.options = replace(self.options, model=model)
        with self.connect() as store:
            spec = CollectionSpec.of(self.settings(), dim=DIM, fingerprint=model_fingerprint(self.settings()))
            staging.stage_collection(store, spec)

    def publish(self):
        with self.connect() as store:
            wanted = model_fingerprint(self.settings())
            if wanted in store.collections(self.collection):
                staging.publish_collection(store, self.catalog(), name=self.collection, fingerprint=wanted)
            for key, in_use in store.collections(self.collection).items():
                if not in_use:
                    store.drop(self.collection, key)

    def make_fresh_ledger(self):
        """Somebody starts over: state tables, cursor and mirror are new, everything that is stored stays."""
        if not self.kind.has_version and any(entry.state != "done" for entry in self.entries("true").values()):
            return  # the ledger alone knew that a file is to be decoded again
        for process in self.frozen:
            process.end()
        self.frozen.clear()
        self.pass_time(timedelta(minutes=10))
        catalog, self.has_ledger = self.catalog(), False
        for name in ("ledger", "errors", "requests", "meta", "gone"):
            self.state.execute(f"DROP TABLE extraction_{name}")
        catalog_module.prepare(catalog.state_engine, catalog.source.identity)
        self.has_ledger = self.is_fresh = self.has_unknown = True
        (self.kind.folder / "checkpoint").unlink(missing_ok=True)
        self.state.execute("DROP TABLE IF EXISTS extraction_checkpoint")
        self.stored, self.floor, self.marked = None, None, {}
        self.ranges, self.running, self.histories, self.ended = set(), {}, {}, {}

    def lose_cursor(self):
        self.stored = None

    def pass_time(self, delta):
        self.clock += delta

    # What machines do.

    def act(self, process, how="", after=None):
        """Let a process run, or stop it on its way. Returns it."""
        ended = process.go(how, after)
        self.look_at_marks()
        assert not self.objection, self.objection
        if not ended:
            self.frozen.append(process)
        return process

    def thaw(self, position, how="", after=None):
        process = self.frozen.pop(position)
        self.act(process, how, after)
        if process.kind == "run" and process.error is None and not self.frozen:
            self.check_what_it_wrote(process)
        return process

    def check_what_it_wrote(self, process):
        """Whoever was late and came to an end has seen to it that what is done is right."""
        versions = self.versions()
        for record_id, entry in self.entries().items():
            is_present = versions.get(record_id, entry.source_version) == entry.source_version
            if self.writers.get(record_id) is process and record_id in self.rows and is_present:
                wrong = self.verdict(record_id, entry)
                assert not wrong, f"a late run has ended, and {wrong}"

    def run(  # noqa: PLR0913 - a run, and what becomes of it
        self, id_range, how="", after=None, *, force=False, steps=ALL_STEPS, floor=None, skew=0
    ):
        """A run of a range, as the job does it: each step opens the range again."""
        settings = self.settings()
        made_with = ranges_work.fingerprints_of(settings)
        self.fps_of[made_with.frames], self.model_of[made_with.embedding] = settings.fps, settings.model
        low = id_range.first_id if floor is None else min(max(id_range.first_id, floor + 1), id_range.last_id)
        run_id = f"run-{self.next_number()}"
        self.ranges.add(id_range)
        if force:
            self.remade |= {key for key in self.rows if key in id_range}

        def work():
            if any(record_id in id_range for record_id in self.broken):
                raise OSError(5, "this range fails for a reason of its own")
            for step in steps:
                with ranges_work.open_range(
                    settings,
                    id_range,
                    within=IdRange(low, id_range.last_id),
                    begins=step == "decode",
                    claims=step == steps[0],
                    force=force,
                    fingerprints=made_with,
                    run_id=run_id,
                ) as opened:
                    STEPS[step](opened)

        process = self.act(Process("run", work, skew=timedelta(minutes=skew)), how, after)
        self.running.pop(id_range, None)
        self.note_end(id_range, failed=process.error is not None or bool(how))
        if process.error is not None and currently_in_test_context():
            note(f"# {id_range}: {type(process.error).__name__}: {process.error}")
        return process

    def note_end(self, id_range, *, failed):
        old = self.histories.get(id_range, History())
        self.histories[id_range] = History(old.failures_in_a_row + 1 if failed else 0, self.clock)
        self.ended["failed_at" if failed else "succeeded_at"] = self.clock

    def tick(self, how="", after=None, *, impatient=False, whole=None):
        """The sensor's tick, or that of `extraction run`; its runs are active from then on."""

        def work():
            catalog = self.catalog()
            memory = recall(catalog.state_engine)
            keep = functools.partial(remember, catalog.state_engine, memory)
            ticked = tick_module.tick(
                catalog, self, self.stored, memory, now=self.clock, impatient=impatient, whole=whole, keep=keep
            )
            keep()
            before("write")
            for request in ticked.requests:
                self.ranges.add(request.id_range)
                self.running[request.id_range] = ticked.cursor.floor_id
            before("write")
            self.stored = ticked.cursor.to_json()
            return ticked

        process = self.act(Process("tick", work), "killed" if how == "frozen" else how, after)
        if process.error is None:
            floor = CursorState.from_json(self.stored, source=self.catalog().source.identity).floor_id
            assert floor == self.floor, f"the operator's floor is {self.floor}, the cursor's {floor}"
        return process

    def run_requested(self, how="", after=None, **options):
        """The runs that ticks asked for; the first of them is stopped as told."""
        for id_range, floor in sorted(self.running.items()):
            self.run(id_range, how, after, floor=floor, **options)
            how, after = "", None

    def reconcile(self, how="", after=None, *, repair=True, force=False):
        settings = self.settings()
        self.looks.append((self.clock, frozenset(self.visible())))
        process = Process(
            "reconcile",
            lambda: reconcile_module.reconcile(
                self.catalog(settings),
                self.connect,
                collection_name=self.collection,
                embedding=model_fingerprint(settings),
                repair=repair,
                window_records=2,
                force=force,
            ),
        )
        process.force = force
        return self.act(process, how, after)

    # What ticks ask of runs.

    def active(self):
        return list(self.running)

    def backfilled(self):
        return []

    def partitions(self, record_ids):  # noqa: ARG002 - the interface
        return set(self.ranges)

    def history(self, id_range):
        return self.histories.get(id_range, History())

    def outcomes(self):
        return Outcomes(**self.ended)

    # What breaks.

    def lose_points(self, record_id):
        self.take_points(record_id)
        self.writers[record_id] = None

    def damage(self, position, how):
        """Cut a shard short, or change a byte in the middle of it."""
        self.has_damage = True
        files = sorted(name for name in MemoryFileSystem.store if name.endswith(".parquet"))
        if not files:
            return
        file = MemoryFileSystem.store[files[position % len(files)]]
        content = bytearray(file.getvalue())
        if how == "cut":
            content = content[: len(content) // 2]
        else:
            content[len(content) // 8] ^= 0xFF
        file.seek(0)
        file.truncate()
        file.write(bytes(content))
        file.seek(0)

    # The oracle.

    def entries(self, condition="state = 'done'"):
        rows = self.state.execute(f"SELECT {', '.join(OF_AN_ENTRY)} FROM extraction_ledger WHERE {condition}")
        return {row[0]: SimpleNamespace(**dict(zip(OF_AN_ENTRY, row, strict=True))) for row in rows}

    def versions(self):
        return dict(self.source.execute("SELECT id, version FROM videos")) if self.kind.has_version else {}

    def expected(self, record_id, path, fps, model):
        """The points of a record: made of the present version of a file, with these settings."""
        version = self.disk[path]
        return {
            point_id(record_id, number): vector_of(model, picture(path, version, fps, number))
            for number in frame_numbers(path, version, fps)
        }

    def wrong(self, record_id, path, fps, model):
        """How the points of a record differ from those that it should have; nothing when they do not."""
        held = self.held().get(_fingerprint_of(model))
        found = held.of(record_id) if held is not None else {}
        wanted = self.expected(record_id, path, fps, model)
        if found.keys() == wanted.keys() and all(np.abs(found[key] - wanted[key]).max() < 0.01 for key in wanted):
            return ""
        made_of = sorted({self.made_of(vector) for vector in found.values()})
        return (
            f"record {record_id} has {len(found)} points of {made_of}, expected {len(wanted)} of version "
            f"{self.disk[path]} of {path} at {fps:g} fps by {model}"
        )

    def made_of(self, vector):
        """What a stored vector was made from."""
        for path, latest in self.disk.items():
            for version in range(latest + 1):
                for fps in (1.0, 2.0):
                    for model in ("m1", "m2"):
                        for number in frame_numbers(path, version, fps):
                            if np.abs(vector - vector_of(model, picture(path, version, fps, number))).max() < 0.01:
                                return f"version {version} of {path} at {fps:g} fps by {model}"
        return "nothing known"

    def verdict(self, record_id, entry):
        """What is wrong with the points of a record that is marked as done; None when it can't be said."""
        path = self.path(self.rows[record_id])
        if entry.address is not None:
            path = self.path_of.get(entry.address)
        if path is None or entry.frames_fingerprint not in self.fps_of:
            return None
        return self.wrong(
            record_id, path, self.fps_of[entry.frames_fingerprint], self.model_of[entry.embedding_fingerprint]
        )

    def is_good(self, record_id):
        """Whether a record is done, in its present version, and its points are right."""
        entry = self.entries(f"state = 'done' AND record_id = {record_id}").get(record_id)
        if entry is None or record_id not in self.rows:
            return False
        version = self.versions().get(record_id, entry.source_version)
        return version == entry.source_version and self.verdict(record_id, entry) == ""

    def is_of_today(self, record_id):
        """Whether a record has points, all of them made of the present file, whatever the settings.

        Of two runs with different settings that are both right the one that ends last wins.
        """
        path, found = self.path(self.rows[record_id]), 0
        for key, held in self.held().items():
            model = next(model for model in ("m1", "m2") if _fingerprint_of(model) == key)
            good = [v for fps in (1.0, 2.0) for v in self.expected(record_id, path, fps, model).values()]
            vectors = held.of(record_id).values()
            found += len(vectors)
            if not all(any(np.abs(vector - other).max() < 0.01 for other in good) for vector in vectors):
                return False
        return found > 0

    @contextlib.contextmanager
    def watching(self, record_ids):
        """Points are about to change: no good ones may go."""
        process = Process.current()
        purges = process is not None and process.kind == "reconcile"
        if purges:  # the ledger has forgotten them already: whatever belongs to a row that there is counts
            good = {record_id for record_id in record_ids if record_id in self.rows and self.rows[record_id].wanted}
        else:
            good = {record_id for record_id in record_ids if self.is_good(record_id)}
        yield
        for record_id in record_ids:
            self.writers[record_id] = process
        if process is None or not process.has_looked:
            return  # between its last look and its write it was frozen: nobody can help that, the next look finds it
        if purges:
            harmed = {record_id for record_id in good if not self._may_purge(record_id, process)}
        else:
            harmed = {record_id for record_id in good if not self.is_of_today(record_id)}
        if harmed:
            self.object_to(f"a {process.kind} spoiled the good points of records {sorted(harmed)}")

    def _may_purge(self, record_id, process):
        """Whether a row that is there was gone for so long that it had to be taken for deleted."""
        visible = self.visible()
        if record_id in visible or not visible:
            return False
        since = None
        for moment, seen in self.looks:
            since = None if record_id in seen else (since or moment)
        if since is None or self.clock - since < PURGE_AFTER:
            return False
        return process.force or len(self.rows) - len(visible) <= len(self.rows) / 2  # of a small table half are few

    def object_to(self, what):
        """Note what is wrong: raised in the middle of a process, its own handling of errors would hide it."""
        self.objection = self.objection or what

    def look_at_marks(self):
        """At the moment in which a row is marked as done its points are right."""
        if not self.has_ledger or not self.has_written:
            return
        self.has_written = False
        known = self.marked
        self.marked = {}
        process = Process.current()
        versions = None
        for record_id, entry in self.entries().items():
            mark = self.marked[record_id] = (entry.claim, entry.updated_at)
            if known.get(record_id) == mark or record_id not in self.rows or self.moment:
                continue
            if process is None or self.writers.get(record_id) is not process:
                continue  # somebody who was late has written in between, or points were lost: later looks find that
            versions = self.versions() if versions is None else versions
            if versions.get(record_id, entry.source_version) == entry.source_version:
                wrong = self.verdict(record_id, entry)
                if wrong:
                    self.object_to(f"it was marked as done, and {wrong}")

    def settle(self, *, without_files=False, patiently=False):
        """Let everything come to rest, and see that the collection says what the table says."""
        self._let_nothing_stand_in_the_way()
        if self.has_late:  # the round comes to them
            self.drain()
        (self.drain if patiently else self.drain_at_once)()
        for _ in range(2):
            done = self.reconcile(force=True)
            assert done.error is None, done.error
            self.pass_time(2 * PURGE_AFTER)
        if self.has_work():
            self.drain_at_once()
        if self.floor is not None:
            self.check(above=self.floor)
            self.set_floor(None)
            self.drain_at_once()
        self.check()
        if self.has_old_settings():  # a changed setting alone makes no row pending
            for id_range in [*sorted(self.ranges), WHOLE]:
                if any(record_id in id_range for record_id in self.of_old_settings()):
                    self.run(id_range)
            self.publish()
            self.check(of_today=True)
            self.check_former_frames_are_gone()
        found = self.reconcile(repair=False)
        assert found.error is None, found.error
        assert found.result.remaining == 0, found.result.summary
        if without_files and not self.has_damage:
            self.check_repair_without_files()

    def _let_nothing_stand_in_the_way(self):
        """Whoever is frozen goes on; what fails for reasons of its own holds up nobody else, and is mended then."""
        if self.moment:
            self.end_moment()
        while self.frozen:
            self.thaw(0)
        if self.broken or self.spoiled:
            self.drain(most=16)
            self.check_others_are_done()
            self.broken.clear()
            self.correct()
        self.missing.clear()
        self.retry()
        if not self.rows:
            self.add_row(1, NAMES[0])

    def check_repair_without_files(self):
        """Every point is lost, every file is gone: what is stored is enough."""
        for record_id in self.rows:
            self.lose_points(record_id)
        self.missing |= set(self.disk)
        assert self.reconcile().error is None
        self.drain_at_once()
        self.check()

    def has_work(self):
        """Whether a row is not done."""
        entries, marks = self.entries("true"), self.marks()
        wanted = [record_id for record_id, row in self.rows.items() if row.wanted]
        unknown = [record_id for record_id in wanted if record_id not in entries]
        return any(entry.state != "done" for entry in entries.values()) or not all(
            marks.get(record_id, record_id not in unknown) for record_id in wanted
        )

    def check_former_frames_are_gone(self):
        """Of former settings nothing is kept that nobody needs."""
        if self.kind.keep_frames == "all" or self.has_unknown or self.has_damage:
            return
        today = ranges_work.fingerprints_of(self.settings()).frames
        former = [name for name in MemoryFileSystem.store if name.startswith("/model/frames/") and today not in name]
        assert former in ([], ["/model/frames/source.json"]), f"frames of former settings stay: {former}"

    def has_old_settings(self):
        in_use = self.used() in {None, _fingerprint_of(self.options.model)}
        return not in_use or bool(self.of_old_settings())

    def of_old_settings(self):
        today = (self.options.fps, self.options.model)
        return [
            record_id
            for record_id, entry in self.entries().items()
            if (self.fps_of.get(entry.frames_fingerprint), self.model_of.get(entry.embedding_fingerprint)) != today
        ]

    def drain(self, *, most=60):
        """Tick and run until nothing is due, as the sensor does."""
        idle = 0
        for _ in range(most):
            self.pass_time(timedelta(hours=2))
            self.tick()
            idle = 0 if self.running else idle + 1
            if idle > 4 + len(self.rows) // 3:  # a tick looks at a part of the rows
                return
            self.run_requested()
        assert self.broken or self.spoiled, "there is always something due"

    def drain_at_once(self, *, most=60):
        """The same as `extraction run` does it."""
        whole = None
        for _ in range(most):
            self.pass_time(timedelta(hours=2))
            self.tick(impatient=True, whole=whole)
            if self.running:
                self.run_requested()
            elif whole is None:
                whole = Round(recall(self.catalog().state_engine).sweep_after_id)
            elif whole.is_over:
                return
        assert self.broken or self.spoiled, "there is always something due"

    def neighbour_comes(self, shares):
        """Another table's deployment is set to the same folders, or to the same collection: it is refused."""
        files = [name for name in MemoryFileSystem.store if name.startswith("/model/")]
        if not (files if shares == "folders" else self.held()):
            return  # nobody has claimed them yet
        own = "other" if shares == "collection" else "model"
        settings = _neighbour(self.settings(), own, self.collection if shares == "collection" else "others")
        before_it = self.everything_stored()

        def work():
            for step, take in STEPS.items():
                with ranges_work.open_range(settings, WHOLE, begins=step == "decode") as opened:
                    take(opened)

        process = Process("neighbour", work)
        process.go()
        assert isinstance(process.error, ExtractionError), "another table's deployment was let in"
        assert self.everything_stored() == before_it, "another table's deployment changed what is not its own"

    def everything_stored(self):
        files = {name: file.getvalue() for name, file in MemoryFileSystem.store.items() if name.startswith("/model/")}
        points = {key: dict(held.points) for key, held in self.held().items()}
        return files, {key: sorted(held) for key, held in points.items()}

    def check_others_are_done(self):
        blocked = [part for part in self.ranges if any(key in part for key in self.broken)]
        states, marks = self.entries("true"), self.marks()
        left = [
            key
            for key, row in self.rows.items()
            if row.wanted
            and key not in self.spoiled
            and self.path(row) not in self.missing
            and not self.is_none_of_ours(key, states, marks)
            and (self.floor is None or key > self.floor)
            and not any(key in part for part in blocked)
            and (key not in states or states[key].state not in {"done", "parked"})
        ]
        assert not left, f"records {left} wait for ranges that fail: {sorted(map(str, blocked))}"

    def check(self, *, above=-1, of_today=False):
        """What the collection holds, against what is true."""
        entries, versions, marks = self.entries("true"), self.versions(), self.marks()
        for record_id, row in self.rows.items():
            if not row.wanted or record_id <= above:
                continue
            entry = entries.get(record_id)
            if self.is_none_of_ours(record_id, entries, marks):
                continue
            assert entry is not None, f"record {record_id} was forgotten"
            assert entry.state == "done", f"record {record_id} is {entry.state}"
            assert versions.get(record_id, entry.source_version) == entry.source_version, f"{record_id} has changed"
            assert marks.get(record_id, True), f"record {record_id} is done and not marked"
            fps, model = self.fps_of[entry.frames_fingerprint], self.model_of[entry.embedding_fingerprint]
            if of_today:
                assert (fps, model) == (self.options.fps, self.options.model), f"{record_id} is of other settings"
            wrong = self.wrong(record_id, self.path(row), fps, model)
            assert not wrong, wrong
            number = len(frame_numbers(self.path(row), self.disk[self.path(row)], fps))
            said = {entry.num_frames, entry.num_points}
            assert said == {number}, f"record {record_id} has {number} frames, the ledger says {said}"
        good = {key for key, row in self.rows.items() if row.wanted}
        held = self.held().get(self.used())
        others = {payload["record_id"] for _, payload in held.points.values()} - good if held else set()
        assert above >= 0 or not others, f"records {sorted(others)} are gone and have points"

    def is_none_of_ours(self, record_id, entries, marks):
        """Whether a row was done before this ledger was there."""
        return record_id not in entries and marks.get(record_id, False) and self.is_fresh

    def marks(self):
        if not self.kind.has_marks:
            return {}
        rows = self.source.execute("SELECT id, is_extracted AND is_embedded FROM videos")
        return {key: bool(mark) for key, mark in rows}


def _table(kind):
    """The statements that make the table."""
    columns = "id INTEGER PRIMARY KEY, path TEXT, version TEXT, wanted BOOLEAN NOT NULL, code TEXT"
    marks = ", is_extracted BOOLEAN NOT NULL DEFAULT 0, is_embedded BOOLEAN NOT NULL DEFAULT 0"
    for name in ("videos", "aside"):
        yield f"CREATE TABLE {name} ({columns}{marks if kind.has_marks else ''})"
    yield "CREATE TABLE others (id INTEGER PRIMARY KEY, path TEXT, code TEXT)"
    yield "INSERT INTO others (id, path) VALUES (1, 'c.mp4'), (2, 'a.mp4'), (30, 'b.mp4')"
    yield "CREATE TABLE stamps (number INTEGER)"
    yield "INSERT INTO stamps VALUES (0)"
    if kind.stamps:
        version = "printf('v%06d', number)" if kind.grows else "'s' || number"
        yield f"""CREATE TRIGGER stamp AFTER UPDATE ON videos WHEN NEW.version = OLD.version BEGIN
            UPDATE stamps SET number = number + 1;
            UPDATE videos SET version = (SELECT {version} FROM stamps) WHERE id = NEW.id; END"""
    if kind.grows:
        yield "CREATE INDEX by_version ON videos (version)"


@functools.cache
def _settings(kind, options):
    folder = kind.folder
    mark = "is_{}" if kind.has_marks else ""
    return Settings(
        home=folder / "home",
        source_url=f"sqlite:///{folder}/source.db",
        state_url=None if kind.one_database else f"sqlite:///{folder}/state.db",
        source_table="videos",
        source_platform_column="",
        source_predicate=options.predicate,
        source_version_column="version" if kind.has_version else "",
        source_version_grows="on" if kind.grows else "auto",
        source_extracted_column=mark.format("extracted"),
        source_embedded_column=mark.format("embedded"),
        frames_uri="memory://model/frames",
        embeddings_uri="memory://model/embeddings",
        allowed_roots=(options.root,),
        fps=options.fps,
        model=options.model,
        batch_size=options.batch_size,
        shard_records=2,
        max_in_flight=2,
        max_attempts=2,
        max_wait_seconds=60,
        sweep_every_ticks=2,
        keep_frames=kind.keep_frames,
        checkpoint_mirror=kind.mirror,
        checkpoint_path=folder / "checkpoint",
        contact_sheet_frames=0,
        decode_workers=1,
    )


@functools.cache
def _neighbour(settings, own, collection):
    """Settings of another table's deployment that are half those of ours."""
    url = settings.source_url.get_secret_value().replace("source.db", "neighbour.db")
    changes = {
        "source_table": "others",
        "source_predicate": None,
        "source_version_column": None,
        "source_extracted_column": None,
        "source_embedded_column": None,
        "state_url": SecretStr(url),
        "frames_uri": f"memory://{own}/frames",
        "embeddings_uri": f"memory://{own}/embeddings",
        "collection_name": collection,
    }
    return settings.model_copy(update=changes)


def _make_engine(url, *, setting, state_schema=None):
    """Connections are kept, which is a quarter of the cost, and so are the statements."""
    if url not in World.engines:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sa, "NullPool", sa.QueuePool)
            patch.setattr(database, "_begin_sqlite", _begins)
            engine = World.engines[url] = database.make_engine(url, setting=setting, state_schema=state_schema)
        sa.event.listen(engine, "commit", _commits)
        sa.event.listen(engine, "rollback", lambda connection: _count(connection, -1))
    return World.engines[url]


def _writes(connection):
    return connection.get_execution_options().get("writes", False)


def _begins(connection):
    before("transaction" if _writes(connection) else "look")
    begin_sqlite(connection)
    _count(connection, 1)


def _commits(connection):
    if _writes(connection):
        before("commit")
        World.now.has_written = True
    _count(connection, -1)


def _count(connection, number):
    process = Process.current()
    if process is not None and _writes(connection):
        process.num_transactions += number


begin_sqlite = database._begin_sqlite


class _AnyMoment(type(datetime)):
    def __instancecheck__(cls, value):
        return isinstance(value, datetime)


class WorldTime(datetime, metaclass=_AnyMoment):
    """The world's clock; each process reads it a little wrong, and no two readings are the same."""

    @classmethod
    def now(cls, tz=None):
        world = World.now
        if world is None:
            return datetime.now(tz)
        world.clock += timedelta(milliseconds=1)
        process = Process.current()
        return world.clock + (process.skew if process is not None else timedelta(0))


def _hooked(name, what):
    original = getattr(MemoryFileSystem, name)

    @functools.wraps(original)
    def method(self, path, *arguments, **options):
        before(what)
        return original(self, path, *arguments, **options)

    return method


@pytest.fixture(scope="module", autouse=True)
def _stand_ins():
    """The world in place of the clock, the disk, the model and the server, for as long as this file's tests run."""
    patch = pytest.MonkeyPatch()
    memory = Path("/dev/shm")  # noqa: S108 - if there is one; the folder in it is our own
    with tempfile.TemporaryDirectory(prefix="model-", dir=memory if os.access(memory, os.W_OK) else None) as folder:
        World.folder = Path(folder)
        World.catalogs, World.engines = {}, {}
        importlib.import_module("extraction_dagster.stages.index.reconcile")
        for name, module in list(sys.modules.items()):
            if name.startswith("extraction_dagster.") and vars(module).get("datetime") is datetime:
                patch.setattr(module, "datetime", WorldTime)
        for name in ("pipe_file", "cp_file", "rm_file", "ls", "_open", "cat_file"):
            what = "write" if name in {"pipe_file", "cp_file", "rm_file"} else "read"
            patch.setattr(MemoryFileSystem, name, _hooked(name, what))
        patch.setattr(catalog_module, "make_engine", _make_engine)
        patch.setattr(ranges_work, "open_catalog", lambda settings: contextlib.nullcontext(World.now.catalog(settings)))
        patch.setattr(ranges_work, "embedding_fingerprint", model_fingerprint)
        patch.setattr(registry, "load_model", StandInModel)
        patch.setattr(decode_stage, "Fetcher", StandInFetcher)
        patch.setattr(decode_stage, "fetch_ahead", stand_in_fetch)
        patch.setattr(decode_stage, "decode_as_ready", stand_in_decode)
        patch.setattr(embed_stage, "_decode", stand_in_picture)
        patch.setattr(embed_stage, "prefetch", stand_in_prefetch)
        patch.setattr(index_stage, "open_point_store", lambda settings, **_options: World.now.connect(settings))
        small = compaction.CompactionOptions(2, 2)
        for name, number in {"_STEP": 3, "_BUDGET": 6, "_ADDRESSES": 3}.items():
            patch.setattr(looks, name, number)
        for name, number in {"_PAGE": 2, "_BUDGET": 4, "_BUDGET_ELSEWHERE": 2, "_PAGE_ONCE_MORE": 2}.items():
            patch.setattr(newest, name, number)
        patch.setattr(changes, "_NUMBER_OF_NEWEST", 2)
        for module in (looks, newest):  # a few steps a look
            patch.setattr(module, "time", SimpleNamespace(monotonic=lambda: next(World.now.beats)))
        patch.setattr(compaction.CompactionOptions, "from_settings", lambda _settings: small)
        yield
        World.now = None
        for engine in World.engines.values():
            engine.dispose()
    patch.undo()


# The same on the embedded engine, which one process holds at a time: nobody is frozen there.


class WatchedEdge(EdgeStore):
    """The embedded engine, whose process can be stopped before its writes."""

    def _write(self, batch):
        before("write")
        super()._write(batch)

    def _remove(self, condition):
        before("write")
        super()._remove(condition)


class EdgeWorld(World):
    """A deployment on the embedded engine."""

    def __init__(self, kind=None):
        shutil.rmtree((kind or Kind()).folder / "edge", ignore_errors=True)
        self._known = None
        super().__init__(kind)

    def connect(self, settings=None, **_options):
        return WatchedEdge(self.kind.folder / "edge", source=source_identity(settings or self.settings()))

    def held(self):
        if self._known is not None:
            return self._known
        found = self._known = {}
        with self.connect() as store:
            for key in store.collections(self.collection):
                held = found[key] = Held(store.open_collection(self.collection, fingerprint=key))
                for page in store.read():
                    held.points.update(zip(page.ids, zip(page.vectors, page.payloads, strict=True), strict=True))
        return found

    def used(self):
        with self.connect() as store:
            return next((key for key, in_use in store.collections(self.collection).items() if in_use), None)

    def take_points(self, record_id):
        self._known = None
        with self.connect() as store:
            for key in store.collections(self.collection):
                store.open_collection(self.collection, fingerprint=key)
                store.delete(PointFilter(record_ids=(record_id,)))

    def act(self, process, how="", after=None):
        self._known = None
        return super().act(process, "killed" if how == "frozen" else how, after)

    def look_at_marks(self):
        """A run may hold the engine just now."""


# The events.

HOW = st.sampled_from(["", "", "", "killed", "frozen", "frozen", "interrupted", "stumbles"])
AFTER = st.integers(0, 30)
KINDS = st.sampled_from(
    [
        Kind(),
        Kind(stamps=True, keep_frames="none"),
        Kind(stamps=True, one_database=False, mirror="table"),
        Kind(grows=True),
        Kind(grows=True, stamps=True, one_database=False, keep_frames="none"),
        Kind(grows=True, has_marks=False),
        Kind(has_version=False),
        Kind(has_version=False, one_database=False, keep_frames="none"),
        Kind(has_marks=False, keep_frames="none", mirror="table"),
        Kind(has_marks=False, has_version=False),
        Kind(has_marks=False, stamps=True, one_database=False),
    ]
)


def _calm(machine):
    return not machine.world.moment


def _unmoved(machine):
    """Whether no frozen reconciliation has looked at the table already."""
    return all(process.kind != "reconcile" for process in machine.world.frozen)


class Model(RuleBasedStateMachine):
    """What can happen, in any order."""

    world_class = World

    @initialize(
        kind=KINDS,
        patiently=st.sampled_from([False, False, True]),
        without_files=st.sampled_from([False, False, True]),
        rows=st.dictionaries(IDS, st.sampled_from(NAMES), min_size=2, max_size=8),
    )
    def begin(self, kind, patiently, without_files, rows):
        self.end = {"patiently": patiently, "without_files": without_files}
        self.world = self.world_class(kind)
        for record_id, name in sorted(rows.items()):
            self.world.add_row(record_id, name)

    @precondition(_calm)
    @rule(record_id=IDS, name=st.sampled_from(NAMES))
    def a_row_comes(self, record_id, name):
        self.world.add_row(record_id, name)

    @precondition(_calm)
    @rule(record_id=IDS)
    def a_row_goes(self, record_id):
        self.world.remove_row(record_id)

    @precondition(_calm)
    @rule(record_id=IDS, wanted=st.booleans())
    def a_row_is_wanted_or_not(self, record_id, wanted):
        self.world.want(record_id, wanted=wanted)

    @precondition(_calm)
    @rule(name=st.sampled_from(NAMES), late=st.booleans())
    def a_file_changes(self, name, late):
        self.world.change_file(f"{self.world.options.root}/{name}", late=late)

    @precondition(_calm)
    @rule(record_id=IDS, name=st.sampled_from(NAMES))
    def an_address_changes(self, record_id, name):
        self.world.change_address(record_id, name)

    @precondition(_calm)
    @rule(record_id=IDS)
    def a_mark_is_cleared(self, record_id):
        self.world.clear_mark(record_id)

    @rule(name=st.sampled_from(NAMES), there=st.booleans())
    def a_file_is_missing_or_back(self, name, there):
        (self.world.missing.discard if there else self.world.missing.add)(f"{self.world.options.root}/{name}")

    @precondition(lambda self: _calm(self) and _unmoved(self))
    @rule(moment=st.sampled_from(["empty", "smaller", "mistyped"]), ids=st.sets(IDS, min_size=1))
    def a_moment_begins(self, moment, ids):
        self.world.begin_moment(moment, ids)

    @precondition(lambda self: not _calm(self) and _unmoved(self))
    @rule()
    def a_moment_ends(self):
        self.world.end_moment()

    @rule(fps=st.sampled_from([1.0, 2.0]), root=st.sampled_from(ROOTS), batch_size=st.sampled_from([2, 4]))
    def settings_change(self, fps, root, batch_size):
        self.world.options = replace(self.world.options, fps=fps, root=root, batch_size=batch_size)

    @rule(model=st.sampled_from(["m1", "m2"]))
    def the_model_changes(self, model):
        self.world.change_model(model)

    @rule(after_id=st.integers(0, 8), how=HOW, after=AFTER)
    def rows_are_to_be_processed_again(self, after_id, how, after):
        self.world.reprocess(after_id, "killed" if how else "", after)

    @rule(value=st.none() | st.integers(0, 8))
    def the_operator_sets_or_resets(self, value):
        self.world.set_floor(value)

    @rule()
    def failed_rows_get_their_tries_back(self):
        self.world.retry()

    @rule(how=HOW, after=AFTER, impatient=st.booleans())
    def a_tick(self, how, after, impatient):
        self.world.tick(how, after, impatient=impatient)

    @precondition(lambda self: self.world.running)
    @rule(how=HOW, after=AFTER, skew=st.sampled_from([0, 0, -120, 120]))
    def the_runs_that_were_requested(self, how, after, skew):
        self.world.run_requested(how, after, skew=skew)

    @rule(
        id_range=RANGES,
        how=HOW,
        after=AFTER,
        force=st.booleans(),
        steps=st.sampled_from([ALL_STEPS, ALL_STEPS, ALL_STEPS[1:], ALL_STEPS[2:]]),
        skew=st.sampled_from([0, 0, -120, 120]),
    )
    def somebody_launches_a_range(self, id_range, how, after, force, steps, skew):  # noqa: PLR0913, PLR0917
        self.world.run(id_range, how, after, force=force, steps=steps, skew=skew)

    @precondition(_calm)
    @rule(
        id_range=RANGES,
        after=st.integers(0, 60),
        name=st.sampled_from(NAMES),
        then=st.sampled_from(["file", "address", "reprocess", "retry", "settings"]),
        returns=st.booleans(),
    )
    def a_run_is_frozen_and_overtaken(self, id_range, after, name, then, returns):
        world = self.world
        process = world.run(id_range, "frozen", after)
        if then == "file":
            world.change_file(f"{world.options.root}/{name}")
        elif then == "address":
            world.change_address(id_range.first_id, name)
        elif then == "reprocess":
            world.reprocess(id_range.first_id - 1)
        elif then == "retry":
            world.retry()
        else:
            world.options = replace(world.options, fps=3.0 - world.options.fps)
        world.run(id_range)
        if returns and process in world.frozen:
            world.thaw(world.frozen.index(process))

    @precondition(lambda self: self.world.frozen)
    @rule(position=st.integers(0, 3), how=HOW, after=AFTER)
    def what_was_frozen_goes_on(self, position, how, after):
        self.world.thaw(position % len(self.world.frozen), how, after)

    @rule(how=HOW, after=AFTER, repair=st.booleans(), force=st.booleans())
    def a_reconciliation(self, how, after, repair, force):
        self.world.reconcile(how, after, repair=repair, force=force)

    @rule(minutes=st.sampled_from([1, 50, 70, 2000]))
    def time_passes(self, minutes):
        self.world.pass_time(timedelta(minutes=minutes))

    @precondition(_calm)
    @rule(record_id=IDS)
    def a_row_is_spoiled(self, record_id):
        self.world.spoil(record_id)

    @precondition(lambda self: _calm(self) and self.world.spoiled)
    @rule()
    def spoiled_rows_are_corrected(self):
        self.world.correct()

    @rule(shares=st.sampled_from(["folders", "collection"]))
    def another_table_is_set_to_the_same_place(self, shares):
        self.world.neighbour_comes(shares)

    @rule(record_id=IDS)
    def points_are_lost(self, record_id):
        self.world.lose_points(record_id)

    @rule(position=st.integers(0, 20), how=st.sampled_from(["cut", "changed"]))
    def a_shard_is_damaged(self, position, how):
        self.world.damage(position, how)

    @rule(record_id=IDS)
    def a_range_fails_from_now_on(self, record_id):
        self.world.broken.add(record_id)

    @precondition(lambda self: self.world.broken)
    @rule()
    def ranges_fail_no_more(self):
        self.world.broken.clear()

    @rule()
    def the_cursor_store_is_lost(self):
        self.world.lose_cursor()

    @rule()
    def the_ledger_is_made_anew(self):
        self.world.make_fresh_ledger()

    def teardown(self):
        if hasattr(self, "world"):
            try:
                if sys.exc_info()[0] is None:
                    self.world.settle(**self.end)
            finally:
                self.world.close()


QUIET = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]


def _is_full():
    return hypothesis_settings.default.max_examples >= 500  # the profile of the nightly workflow


def _check(machine, examples):
    options = {"stateful_step_count": 30, "deadline": None, "suppress_health_check": QUIET}
    run_state_machine_as_test(machine, settings=hypothesis_settings(max_examples=examples, **options))


@pytest.mark.parametrize("part", range(20 if _is_full() else 1))  # each well within the time that a test has
def test_whatever_happens_the_collection_says_what_the_table_says(part):  # noqa: ARG001 - to tell them apart
    _check(Model, 100)


class ModelOnTheEmbeddedEngine(Model):
    """The same events; points that are gone or wrong show at the end."""

    world_class = EdgeWorld


def test_whatever_happens_the_embedded_engine_says_what_the_table_says():
    _check(ModelOnTheEmbeddedEngine, 100 if _is_full() else 3)


# What chance finds seldom, written out: the kinds of mistakes that the machine is there for, one by one.


def _world(*ids, **kind):
    world = World(Kind(**kind))
    for record_id in ids or range(1, 7):
        world.add_row(record_id, NAMES[record_id % 3])
    return world


def another_table_in_the_same_folders():
    world = _world()
    world.drain()
    world.neighbour_comes("folders")
    return world


def another_table_on_the_same_collection():
    world = _world()
    world.drain()
    world.neighbour_comes("collection")
    return world


def a_fresh_ledger_over_an_old_home():
    world = _world(has_marks=False)
    world.drain()
    world.change_file("/one/a.mp4")
    world.run(WHOLE, "killed", 12)
    world.make_fresh_ledger()
    world.change_file("/one/a.mp4")
    return world


def a_corrected_address():
    world = _world(has_version=False, keep_frames="none")
    world.drain()
    world.change_address(2, "a.mp4")
    world.drain()
    world.check()
    return world


def another_first_root():
    world = _world(has_version=False, has_marks=False)
    world.drain()
    world.options = replace(world.options, root=ROOTS[1])
    world.drain()
    return world


def a_table_that_is_empty_for_a_moment():
    world = _world()
    world.drain()
    world.begin_moment("empty")
    for _ in range(3):
        world.reconcile(force=True)
        world.pass_time(2 * PURGE_AFTER)
    world.end_moment()
    world.check()
    return world


def a_table_that_is_smaller_for_a_moment():
    world = _world()
    world.drain()
    world.begin_moment("smaller", {1, 2})
    world.reconcile(force=True)
    world.pass_time(PURGE_AFTER / 2)
    world.reconcile(force=True)
    world.end_moment()
    world.check()
    return world


def a_table_that_is_smaller_for_a_day():
    world = _world()
    world.drain()
    world.begin_moment("smaller", {1, 2})
    for _ in range(2):
        world.reconcile(force=True)
        world.pass_time(2 * PURGE_AFTER)
    assert not {1, 2} & world.entries("true").keys()
    world.end_moment()
    world.reconcile()
    world.drain()
    world.check()
    return world


def a_predicate_that_is_mistyped_for_a_day():
    world = _world()
    world.drain()
    world.add_row(9, NAMES[0])
    world.want(9, wanted=False)
    world.begin_moment("mistyped")
    for _ in range(3):
        world.reconcile()
        world.pass_time(2 * PURGE_AFTER)
    world.end_moment()
    world.drain()
    world.check()
    return world


def a_row_that_comes_back_while_it_is_purged():
    world = _world()
    world.drain()
    world.remove_row(3)
    world.reconcile()
    world.pass_time(2 * PURGE_AFTER)
    world.reconcile("frozen", 30)
    world.add_row(3, NAMES[1])
    return world


def ranges_that_fail_for_ever():
    world = _world(*range(1, 13))
    world.options = replace(world.options, batch_size=2)
    world.broken = {1, 3, 5}
    return world


def a_row_that_nobody_can_read():
    world = _world(one_database=False)
    world.spoil(2)
    return world


def a_floor_and_a_lost_cursor():
    world = _world()
    world.set_floor(2)
    world.tick()
    world.tick()
    world.lose_cursor()
    world.tick()
    return world


def vectors_that_are_forced_after_a_merge():
    world = _world(keep_frames="all")
    for record_id in world.rows:
        world.run(IdRange(1, 6), steps=ALL_STEPS, force=record_id % 2 == 1, skew=120)
        world.pass_time(timedelta(hours=3))
    world.run(IdRange(1, 6), steps=ALL_STEPS[1:], force=True, skew=-120)
    world.change_file("/one/b.mp4")
    world.run(IdRange(1, 6), force=True, skew=-240)
    return world


def ranges_that_are_cut_anew():
    world = _world(keep_frames="all")
    world.drain()
    world.missing |= set(world.disk)
    for record_id in (1, 4):
        world.run(IdRange(record_id, record_id + 2), steps=ALL_STEPS[1:], force=True)
    world.check()
    return world


def changes_that_are_found_by_their_versions():
    world = _world(*range(1, 9), grows=True)
    world.drain_at_once()
    world.change_file("/one/a.mp4")
    world.want(1, wanted=False)
    world.tick()
    world.run_requested()
    world.change_file("/one/b.mp4")
    world.drain_at_once()
    world.check(above=0)  # the points of the row that is not wanted stay for a while
    world.want(1, wanted=True)
    world.drain_at_once()
    world.check()
    world.set_floor(4)
    world.change_file("/one/c.mp4")
    world.drain_at_once()
    world.set_floor(None)
    world.drain_at_once()
    world.check()
    return world


def a_late_change_below_what_was_seen():
    world = _world(*range(1, 9), grows=True, stamps=True, one_database=False)
    world.drain_at_once()
    world.change_file("/one/a.mp4", late=True)
    world.drain()
    world.check()
    return world


STORIES = [
    changes_that_are_found_by_their_versions,
    a_late_change_below_what_was_seen,
    another_table_in_the_same_folders,
    another_table_on_the_same_collection,
    a_fresh_ledger_over_an_old_home,
    a_corrected_address,
    another_first_root,
    a_table_that_is_empty_for_a_moment,
    a_table_that_is_smaller_for_a_moment,
    a_table_that_is_smaller_for_a_day,
    a_predicate_that_is_mistyped_for_a_day,
    a_row_that_comes_back_while_it_is_purged,
    ranges_that_fail_for_ever,
    a_row_that_nobody_can_read,
    a_floor_and_a_lost_cursor,
    vectors_that_are_forced_after_a_merge,
    ranges_that_are_cut_anew,
]


@pytest.mark.parametrize("story", STORIES, ids=lambda story: story.__name__)
def test_a_story_ends_well(story):
    _end(story(), without_files=True)


def _end(world, **options):
    try:
        world.settle(**options)
    finally:
        world.close()


PLAIN, APART = Kind(), Kind(stamps=True, one_database=False)


@pytest.mark.parametrize("kind", [PLAIN, APART, Kind(has_version=False)], ids=["plain", "apart", "no version"])
def test_a_frozen_writer_that_is_overtaken_leaves_no_trace(kind):
    every = 1 if kind == PLAIN or _is_full() else 4
    for after in itertools.count(0, every):
        world = _world(1, 2, 4, **vars(kind))
        process = world.run(IdRange(1, 4), "frozen before it writes", after)
        is_over = not world.frozen
        if not is_over:
            world.change_file("/one/b.mp4")
            world.run(IdRange(1, 4))
            world.thaw(world.frozen.index(process))
        _end(world)
        if is_over:
            break
    assert after > 10


@pytest.mark.parametrize("how", ["killed", "interrupted", "stumbles"])
@pytest.mark.parametrize("kind", [PLAIN, APART], ids=["plain", "apart"])
def test_a_run_that_is_stopped_anywhere_costs_nothing(kind, how):
    every = 1 if _is_full() else 6
    for after in itertools.count(1, every):
        world = _world(1, 2, 4, **vars(kind))
        process = world.run(IdRange(1, 4), how, after)
        _end(world)
        if process.error is None:
            break
    assert after > (5 if how == "stumbles" else 10)  # reads are fewer than writes


@pytest.mark.parametrize("how", ["cut", "changed"])
def test_a_damaged_shard_holds_nobody_up(how):
    for after in range(5, 26, 4):
        world = _world(1, 2, 3, 4, keep_frames="none")
        world.run(IdRange(1, 4), "killed", after)
        world.damage(0, how)
        _end(world)
