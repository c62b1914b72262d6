"""What it costs to load points: `python benchmarks/index.py [--records 2000] [--frames 20] [--dim 512]`.

Prints CPU seconds (user and system, this process), for:

- `edge`: replace_records into the embedded engine, from nothing and then over older points: building, writing,
  counting, removing stale ones, comparing ids, flushing. Vectors are made beforehand.
- `grpc`: building and writing over gRPC to a process that answers at once and keeps nothing: our side of the wire.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from extraction_dagster.records import EmbeddingBatch, VideoRow
from extraction_dagster.settings import Settings
from extraction_dagster.stages.index.edge.store import EdgeStore
from extraction_dagster.stages.index.points import build_points
from extraction_dagster.stages.index.protocol import CollectionSpec
from extraction_dagster.stages.index.server.store import ServerStore
from extraction_dagster.stages.index.stage import replace_records

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

_SHARD = 64


def main() -> None:
    """Run both and print a line each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=2000)
    parser.add_argument("--frames", type=int, default=20)
    parser.add_argument("--dim", type=int, default=512)
    options = parser.parse_args()
    shards = _shards(options.records, options.frames, options.dim)
    points = options.records * options.frames
    for name, seconds in {**_edge(shards, options.dim), **_grpc(shards, options.dim)}.items():
        print(
            f"{name:28} {points} points, dim {options.dim}: {seconds:6.2f} CPU s, "
            f"{1e6 * seconds / points:6.1f} us a point, {points / seconds:8.0f} points a CPU s"
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


def _edge(shards: list[EmbeddingBatch], dim: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder, EdgeStore(Path(folder)) as store:
        store.ensure_collection(CollectionSpec("bench", dim, "bench"))

        def load(name: str) -> None:
            for shard in shards:
                rows = _rows(shard)
                replace_records(store, shard, rows=rows, generations=dict.fromkeys(rows, name))

        return {
            "edge, from nothing, verified": _cpu_seconds(lambda: load("a")),
            "edge, replacing, verified": _cpu_seconds(lambda: load("b")),
        }


def _grpc(shards: list[EmbeddingBatch], dim: int) -> dict[str, float]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    server = context.Process(target=_serve, args=(theirs,), daemon=True)
    server.start()
    settings = Settings(qdrant_url="http://127.0.0.1:1", qdrant_grpc_port=ours.recv())
    with ServerStore.connect(settings) as store:
        # The server that keeps nothing knows no collections: go straight to one.
        store._spec, store._target = CollectionSpec("bench", dim, "bench"), "bench"  # noqa: SLF001 - see above
        batches = []

        def build() -> None:
            for shard in shards:
                rows = _rows(shard)
                batches.append(build_points(shard, rows=rows, generations=dict.fromkeys(rows, "a")))

        def write() -> None:
            for batch in batches:
                store.upsert(batch)

        store.upsert(build_points(shards[0], rows=_rows(shards[0]), generations=dict.fromkeys(_rows(shards[0]), "a")))
        seconds = {"building points": _cpu_seconds(build), "grpc, writing": _cpu_seconds(write)}
    ours.send("stop")
    server.join()
    return seconds


def _serve(pipe: Connection) -> None:
    import grpc  # noqa: PLC0415 - in the other process alone
    from qdrant_client import grpc as q

    class Points(q.PointsServicer):  # type: ignore[misc,name-defined,unused-ignore] - generated code
        def Upsert(self, request: object, context: object) -> object:  # noqa: ARG002, N802 - the protocol's
            return q.PointsOperationResponse(result=q.UpdateResult(status=q.UpdateStatus.Completed))

    options = [("grpc.max_receive_message_length", -1)]
    server = grpc.server(ThreadPoolExecutor(1), options=options)
    q.add_PointsServicer_to_server(Points(), server)
    pipe.send(server.add_insecure_port("127.0.0.1:0"))
    server.start()
    pipe.recv()
    server.stop(None)


def _cpu_seconds(function: Callable[[], None]) -> float:
    before = resource.getrusage(resource.RUSAGE_SELF)
    function()
    after = resource.getrusage(resource.RUSAGE_SELF)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
