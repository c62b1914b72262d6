"""The project's definitions with two steps replaced: no video is decoded and no model is loaded.

Sensor, job, partitions, ledger, marks, embedding shards and the whole of `qdrant_points` are the real ones. Faults come
from files in the folder EXTRACTION_TEST_STUBS: `poison` names the records that can't be decoded, one id a line.
"""

import os
import time
from pathlib import Path

import dagster as dg  # noqa: TID251 - the definitions of a code location
import numpy as np

from extraction_dagster.defs.assets import qdrant_points
from extraction_dagster.defs.jobs import extraction_job
from extraction_dagster.defs.notify import run_failure_notices
from extraction_dagster.defs.partitions import id_ranges
from extraction_dagster.defs.reconcile import points_agree_with_table
from extraction_dagster.defs.resources import Extraction, open_step
from extraction_dagster.defs.sensors import extraction_sensor
from extraction_dagster.records import EmbeddingBatch, Failure
from extraction_dagster.shards.store import ShardRecord

DIM = 8
_SHARD = 250


def _poisoned():
    file = Path(os.environ["EXTRACTION_TEST_STUBS"]) / "poison"
    return {int(line) for line in file.read_text().split()} if file.exists() else set()


def _shards(items):
    return [items[start : start + _SHARD] for start in range(0, len(items), _SHARD)]


def _unfinished(plan):
    return [item for item in plan.values() if item.status == "todo"]


@dg.asset(partitions_def=id_ranges, group_name="extraction", pool="decode")
def video_frames(context: dg.AssetExecutionContext, extraction: Extraction) -> None:
    """Mark rows as extracted, shard by shard, as if they had been decoded."""
    with open_step(context, extraction, begins=True) as work:
        poisoned = _poisoned()
        fresh = [
            item for item in _unfinished(work.plan) if item.entry is None or item.entry.state in {"todo", "failed"}
        ]
        for shard in _shards(fresh):
            time.sleep(0.02)
            good = {item.video.record_id: 1 for item in shard if item.video.record_id not in poisoned}
            if good:
                work.catalog.mark_extracted(work.plan, good, work.fingerprints.frames)
            bad = [item.video for item in shard if item.video.record_id not in good]
            work.record_failures(
                Failure(
                    row.record_id, row.content_version, "decode", "PoisonError", f"Record {row.record_id} is poison."
                )
                for row in bad
            )


@dg.asset(partitions_def=id_ranges, group_name="extraction", pool="gpu", deps=[video_frames])
def frame_embeddings(context: dg.AssetExecutionContext, extraction: Extraction) -> None:
    """Write one vector for each extracted row that has none yet."""
    with open_step(context, extraction) as work:
        store, id_range = work.embedding_store, work.id_range
        there = {
            (record.record_id, record.content_version) for shard in store.shards(id_range) for record in shard.records
        }
        pending = _unfinished(work.plan)
        extracted = [item for item in pending if item.entry and item.entry.state in {"extracted", "embedded"}]
        wanted = [item for item in extracted if (item.video.record_id, item.video.content_version) not in there]
        for shard in _shards(wanted):
            _write(store, id_range, [item.video for item in shard], context.run_id)
        work.catalog.mark_embedded([item.video.record_id for item in extracted], work.fingerprints.embedding)


def _write(store, id_range, rows, run_id):
    ids = np.array([row.record_id for row in rows], np.int64)
    vectors = np.random.default_rng(int(ids[0])).standard_normal((len(ids), DIM)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    zeros = np.zeros(len(ids))
    store.write(
        id_range,
        f"{ids[0]}-{ids[-1]}-{run_id[:8]}",
        EmbeddingBatch(vectors.astype(np.float16), ids, zeros.astype(np.int64), zeros),
        records=[
            ShardRecord(row.record_id, row.content_version, 1, address=row.address, claim=row.claim) for row in rows
        ],
    )


defs = dg.Definitions(
    assets=[video_frames, frame_embeddings, qdrant_points],
    asset_checks=[points_agree_with_table],
    jobs=[extraction_job],
    sensors=[extraction_sensor, run_failure_notices],
    resources={"extraction": Extraction()},
    executor=dg.in_process_executor,
)
