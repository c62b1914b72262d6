"""What points cost: `python benchmarks/index.py [--only compare] [--records 2000] [--frames 20] [--dim 512]`.

Prints CPU seconds (user and system, this process), for:

- `write`: replace_records into the embedded engine, from nothing and then over older points: building, writing,
  counting, removing stale ones, comparing ids, flushing. Vectors are made beforehand. And building and writing over
  gRPC to a process that answers at once and keeps nothing: our side of the wire.
- `read`: every point with its vector and payload (`points export`, `points copy`), and only whose they are and what
  they are made from (comparing), from the embedded engine and over gRPC, from a process that has its answers ready.
- `compare`: 1,000 records of 2, 10 and 30 points that share a generation, and with a generation each, as with a version
  column; embedded.
- `search`: a query among all points without quantization, and with `scalar` as its int8 estimates order them, rescored,
  and rescored out of twice as many: cost, the range of a stored vector's score for itself, and how many of the ten
  nearest are found. Random vectors have no neighbours to speak of: the worst case.
- `change`: one changed row in a range of 10 done ones and in one of 1,000, ten points each: every step but the work of
  decoding it.

Long because its parts share what they load, and the process that answers.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import resource
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import sqlalchemy as sa

from extraction_dagster.ranges.decode import decode_range
from extraction_dagster.ranges.embed import embed_range
from extraction_dagster.ranges.index import index_range
from extraction_dagster.ranges.work import open_range
from extraction_dagster.records import EmbeddingBatch, IdRange, VideoRow
from extraction_dagster.settings import Settings
from extraction_dagster.shards.store import ShardRecord
from extraction_dagster.stages.index.compare import ExpectedPoints, compare_points
from extraction_dagster.stages.index.edge.store import EdgeStore
from extraction_dagster.stages.index.points import build_points
from extraction_dagster.stages.index.protocol import CollectionSpec
from extraction_dagster.stages.index.server.store import ServerStore
from extraction_dagster.stages.index.stage import replace_records

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from multiprocessing.connection import Connection

    from extraction_dagster.ranges.work import RangeWork
    from extraction_dagster.stages.index.protocol import PointStore, Quantization

_SHARD = 64
_PAGE = 2048
_COPIED = ("record_id", "content_version", "address", "claim")


def main() -> None:
    """Run what is asked for, and print a line for each figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=_PARTS, default=list(_PARTS))
    parser.add_argument("--records", type=int, default=2000)
    parser.add_argument("--frames", type=int, default=20)
    parser.add_argument("--dim", type=int, default=512)
    options = parser.parse_args()
    for name in options.only:
        _PARTS[name](options)


def _print_points(name: str, seconds: float, points: int) -> None:
    print(
        f"{name:38} {points} points: {seconds:6.2f} CPU s, "
        f"{1e6 * seconds / points:6.1f} us a point, {points / seconds:8.0f} points a CPU s",
        flush=True,
    )


def _shards(records: int, frames: int, dim: int) -> list[EmbeddingBatch]:
    random = np.random.default_rng(1)
    shards = []
    for start in range(1, records + 1, _SHARD):
        record_ids = np.arange(start, min(start + _SHARD, records + 1), dtype=np.int64)
        vectors = random.standard_normal((len(record_ids) * frames, dim), dtype=np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        numbers = np.tile(np.arange(frames, dtype=np.int64) * 30, len(record_ids))
        shards.append(
            EmbeddingBatch(vectors.astype(np.float16), np.repeat(record_ids, frames), numbers, numbers / 30.0)
        )
    return shards


def _rows(shard: EmbeddingBatch) -> dict[int, VideoRow]:
    return {
        record_id: VideoRow(record_id, f"s3://bucket/insta/{record_id}/video.mp4", "insta", f"code{record_id}")
        for record_id in set(shard.record_id.tolist())
    }


def _write(options: argparse.Namespace) -> None:
    shards = _shards(options.records, options.frames, options.dim)
    points = options.records * options.frames
    with _edge_store(options.dim) as store:
        _print_points("edge, from nothing, verified", _cpu_seconds(lambda: _load(store, shards, "a")), points)
        _print_points("edge, replacing, verified", _cpu_seconds(lambda: _load(store, shards, "b")), points)
    batches = []

    def build() -> None:
        for shard in shards:
            rows = _rows(shard)
            batches.append(build_points(shard, rows=rows, generations=dict.fromkeys(rows, "a")))

    def write() -> None:
        for batch in batches:
            store.upsert(batch)

    _print_points("building points", _cpu_seconds(build), points)
    with _grpc_store(options) as store:
        store.upsert(batches[0])
        _print_points("grpc, writing", _cpu_seconds(write), points)


def _read(options: argparse.Namespace) -> None:
    points = options.records * options.frames
    with _edge_store(options.dim) as edge:
        _load(edge, _shards(options.records, options.frames, options.dim), "a")
        _print_reading("edge", edge, points)
    with _grpc_store(options) as remote:
        _print_reading("grpc", remote, points)


def _print_reading(name: str, store: PointStore, points: int) -> None:
    def read() -> None:
        _require(holds=sum(map(len, store.read(batch_size=_PAGE))) == points)

    def count() -> None:
        _require(holds=store.count_by_generation().total() == points)

    next(store.read(batch_size=1))
    _print_points(f"{name}, reading points", _cpu_seconds(read), points)
    _print_points(f"{name}, records and generations", _cpu_seconds(count), points)


def _compare(_options: argparse.Namespace) -> None:
    for frames in (2, 10, 30):
        costs = {}
        for name in ("shared", "own"):
            with _edge_store(64) as store:
                expected = {}
                for shard in _shards(1000, frames, 64):
                    rows = _rows(shard)
                    generations = {key: "g" * 32 if name == "shared" else f"{key:032}" for key in rows}
                    replace_records(store, shard, rows=rows, generations=generations)
                    expected |= {key: ExpectedPoints(frames, generations[key]) for key in rows}

                def compare(store: PointStore = store, expected: dict[int, ExpectedPoints] = expected) -> None:
                    _require(holds=compare_points(store, expected, within=IdRange(1, 1000)).agrees)

                costs[name] = min(_cpu_seconds(compare) for _ in range(3))
        print(
            f"comparing 1000 records of {frames} points: shared generation {costs['shared']:.3f} CPU s, "
            f"own {costs['own']:.3f}, {costs['own'] / costs['shared']:.2f} times",
            flush=True,
        )


def _search(options: argparse.Namespace) -> None:
    import qdrant_edge as edge

    shards = _shards(options.records, options.frames, options.dim)
    queries = np.concatenate([shard.vectors[::_SHARD] for shard in shards])[:200].astype(np.float32)
    true = _nearest(queries, np.concatenate([shard.vectors for shard in shards]).astype(np.float32), options.frames)
    for quantization in ("none", "scalar"):
        with _edge_store(options.dim, quantization) as store:
            _load(store, shards, "a")
            store.optimize()
            ways: dict[str, dict[str, Any]] = {"": {}}
            if quantization == "scalar":
                ways = {"int8": {"rescore": False}, "rescored": {"rescore": True}}
                ways["rescored of twice as many"] = {"rescore": True, "oversampling": 2.0}
            for name, how in ways.items():
                params = edge.SearchParams(quantization=edge.QuantizationSearchParams(**how))
                _print_search(f"{quantization} {name}", store._engine, params, queries, true)  # noqa: SLF001 - see above


def _print_search(name: str, engine: Any, params: Any, queries: np.ndarray, true: list[set[tuple[int, int]]]) -> None:  # noqa: ANN401 - the engine's own classes
    import qdrant_edge as edge

    found = []

    def search() -> None:
        for query in queries.tolist():
            asked = edge.QueryRequest(limit=10, query=edge.Query.Nearest(query), with_payload=True, params=params)
            found.append(engine.query(asked))

    seconds = _cpu_seconds(search)
    own = [hits[0].score for hits in found]
    right = sum(
        len({(hit.payload["record_id"], hit.payload["frame_number"]) for hit in hits} & wanted)
        for hits, wanted in zip(found, true, strict=True)
    )
    print(
        f"search, {name:34} {1e3 * seconds / len(queries):6.2f} CPU ms a query, itself {min(own):.4f} to "
        f"{max(own):.4f}, {right / (10 * len(queries)):.3f} of the ten nearest",
        flush=True,
    )


def _change(_options: argparse.Namespace) -> None:
    costs = {records: _changed_row(records) for records in (10, 1000)}
    for step, small in costs[10].items():
        large = costs[1000][step]
        print(
            f"one changed row of 10, {step:8} {small:.3f} CPU s; of 1000 {large:.3f}, {large / small:.2f} times",
            flush=True,
        )


def _changed_row(records: int, rounds: int = 5) -> dict[str, float]:
    """CPU seconds of a changed row by step, the median of some rounds; of `decode` this process alone."""
    with tempfile.TemporaryDirectory() as folder:
        settings = _table(Path(folder))
        engine = sa.create_engine(f"sqlite:///{folder}/source.db")
        id_range = IdRange(1, 1000)
        _run(settings, id_range)
        with engine.begin() as connection:
            connection.execute(
                sa.text("INSERT INTO insta_content (id, platform, code, path) VALUES (:id, 'insta', 'a', '1.avi')"),
                [{"id": record_id} for record_id in range(2, records + 1)],
            )
        with open_range(settings, id_range, begins=True) as work:
            _copy_stored(work)
            decode_range(work)  # finds the frames, and marks the rows; so do the next two
            embed_range(work)
        _run(settings, id_range)
        costs = []
        for number in range(rounds + 1):
            with engine.begin() as connection:
                connection.execute(
                    sa.text("UPDATE insta_content SET code = :code WHERE id = 1"), {"code": f"b{number}"}
                )
            costs.append(_run(settings, id_range))
        return {step: float(np.median([cost[step] for cost in costs[1:]])) for step in costs[0]}


def _run(settings: Settings, id_range: IdRange) -> dict[str, float]:
    costs = {}

    def step(name: str, function: Callable[[Any], object], *, begins: bool = False) -> None:
        def whole() -> None:
            with open_range(settings, id_range, begins=begins) as work:
                function(work)

        costs[name] = _cpu_seconds(whole)

    step("decode", decode_range, begins=True)
    step("embed", embed_range)
    step("index", index_range)
    return {**costs, "all": sum(costs.values())}


def _table(folder: Path) -> Settings:
    """A table with one row, whose file is ten seconds of noise, and a version column."""
    import av

    with av.open(str(folder / "1.avi"), "w") as container:
        stream: Any = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        for number in range(50):
            image = np.random.default_rng(number // 5).integers(0, 256, (96, 128, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    url = f"sqlite:///{folder}/source.db"
    with sa.create_engine(url).begin() as connection:
        flags = "".join(f", {name} BOOLEAN NOT NULL DEFAULT 0" for name in ("is_extracted", "is_embedded"))
        connection.execute(
            sa.text(f"CREATE TABLE insta_content (id INTEGER PRIMARY KEY, platform TEXT, code TEXT, path TEXT{flags})")
        )
        connection.execute(sa.text("INSERT INTO insta_content VALUES (1, 'insta', 'a', '1.avi', 0, 0)"))
    return Settings(
        home=folder,
        source_url=url,
        source_version_column="code",
        allowed_roots=(str(folder),),
        decode_workers=1,
        keep_frames="all",
    )


def _copy_stored(work: RangeWork) -> None:
    """Store the frames and vectors of the first row again, for each pending one."""
    (video,) = work.frame_store.read(work.frame_store.shards(work.id_range)[0])
    vectors = work.embedding_store.read(work.embedding_store.shards(work.id_range)[0])
    rows = [planned.video for planned in work.pending.values()]
    for start in range(0, len(rows), _SHARD):
        part, name = rows[start : start + _SHARD], work.frame_store.next_name()
        of_rows = [
            {
                "record_id": row.record_id,
                "content_version": row.content_version,
                "address": row.address,
                "claim": row.claim,
            }
            for row in part
        ]
        work.frame_store.write_shard(work.id_range, [replace(video, **values) for values in of_rows], name=name)
        batch = EmbeddingBatch(
            np.tile(vectors.vectors, (len(part), 1)),
            np.repeat(np.array([row.record_id for row in part], np.int64), len(vectors)),
            np.tile(vectors.frame_number, len(part)),
            np.tile(vectors.pts_seconds, len(part)),
        )
        records = [ShardRecord(num_frames=len(vectors), **values) for values in of_rows]
        work.embedding_store.write(work.id_range, name, batch, records=records)


def _nearest(queries: np.ndarray, vectors: np.ndarray, frames: int) -> list[set[tuple[int, int]]]:
    """Record and frame number of the ten nearest to each."""
    best = np.argpartition(-(queries @ vectors.T), 10, axis=1)[:, :10]
    return [{(int(index) // frames + 1, int(index) % frames * 30) for index in row} for row in best]


def _load(store: PointStore, shards: list[EmbeddingBatch], generation: str) -> None:
    for shard in shards:
        rows = _rows(shard)
        replace_records(store, shard, rows=rows, generations=dict.fromkeys(rows, generation))


@contextlib.contextmanager
def _edge_store(dim: int, quantization: Quantization = "none") -> Iterator[EdgeStore]:
    with tempfile.TemporaryDirectory() as folder, EdgeStore(Path(folder)) as store:
        store.ensure_collection(CollectionSpec("bench", dim, "bench", quantization=quantization))
        yield store


@contextlib.contextmanager
def _grpc_store(options: argparse.Namespace) -> Iterator[ServerStore]:
    """The store on a process that takes every point, and has `records` times `frames` of them to read."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    server = context.Process(target=_serve, args=(theirs, options.records * options.frames, options.dim), daemon=True)
    server.start()
    settings = Settings(qdrant_url="http://127.0.0.1:1", qdrant_grpc_port=ours.recv())
    with ServerStore.connect(settings) as store:
        # A server that keeps nothing knows no collections: go straight to one.
        store._spec, store._target = CollectionSpec("bench", options.dim, "bench"), "bench"  # noqa: SLF001 - see above
        yield store
    ours.send("stop")
    server.join()


def _serve(pipe: Connection, points: int, dim: int) -> None:
    import functools  # noqa: PLC0415 - in the other process alone, as those below

    import grpc  # noqa: PLC0415
    from qdrant_client import grpc as q
    from qdrant_client.conversions.conversion import json_to_value

    (shard,) = _shards(1, _PAGE * 2, dim)
    ready = build_points(shard, rows=_rows(shard), generations={1: "a" * 32})

    @functools.cache
    def page(size: int, fields: tuple[str, ...], *, payload: bool, vectors: bool) -> Any:  # noqa: ANN401 - generated
        answer = q.ScrollResponse()
        for number in range(size):
            point = answer.result.add()
            point.id.uuid = ready.ids[number]
            for key, value in ready.payloads[number].items() if payload else ():
                if not fields or key in fields:
                    point.payload[key].CopyFrom(json_to_value(value))
            if vectors:
                point.vectors.vector.dense.data.extend(ready.vectors[number].tolist())
        return answer

    class Points(q.PointsServicer):  # type: ignore[misc,name-defined,unused-ignore] - generated code
        def Upsert(self, request: object, context: object) -> object:  # noqa: ARG002, N802 - the protocol's
            return q.PointsOperationResponse(result=q.UpdateResult(status=q.UpdateStatus.Completed))

        def Scroll(self, request: Any, context: object) -> object:  # noqa: ANN401, ARG002, N802 - as above
            size, begin = min(request.limit, points - request.offset.num), request.offset.num
            wanted = request.with_payload
            fields = tuple(wanted.include.fields)
            answer = q.ScrollResponse()
            answer.CopyFrom(
                page(size, fields, payload=wanted.enable or bool(fields), vectors=request.with_vectors.enable)
            )
            if begin + size < points:
                answer.next_page_offset.num = begin + size
            return answer

    options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    server = grpc.server(ThreadPoolExecutor(1), options=options)
    q.add_PointsServicer_to_server(Points(), server)
    pipe.send(server.add_insecure_port("127.0.0.1:0"))
    server.start()
    pipe.recv()
    server.stop(None)


def _require(*, holds: bool) -> None:
    if not holds:
        raise SystemExit("what was counted is wrong")


def _cpu_seconds(function: Callable[[], None]) -> float:
    before = resource.getrusage(resource.RUSAGE_SELF)
    function()
    after = resource.getrusage(resource.RUSAGE_SELF)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


_PARTS = {"write": _write, "read": _read, "compare": _compare, "search": _search, "change": _change}

if __name__ == "__main__":
    main()
