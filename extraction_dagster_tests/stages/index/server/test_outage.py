"""A run of a range whose server goes away in its midst, for EXTRACTION_TEST_OUTAGE_SECONDS."""

import os
import threading
import time

import numpy as np
import pytest

from extraction_dagster.errors.index import StoreRefusedError
from extraction_dagster.ranges.decode import decode_range
from extraction_dagster.ranges.index import index_range
from extraction_dagster.ranges.work import open_range
from extraction_dagster.records import EmbeddingBatch, IdRange
from extraction_dagster.shards.store import ShardRecord
from extraction_dagster.stages.catalog.catalog import open_catalog
from extraction_dagster.stages.decode import stage

SECONDS = float(os.environ.get("EXTRACTION_TEST_OUTAGE_SECONDS", "5"))
RANGE = IdRange(1, 400)


@pytest.fixture
def aimed(sqlite_database, stand_in):
    """Settings of a table with 400 rows, and of a server."""
    sqlite_database.create(ids=range(1, 401))
    return sqlite_database.settings(
        qdrant_url=stand_in.url, qdrant_grpc_port=stand_in.port, qdrant_retry_seconds=SECONDS + 60
    )


def store_vectors(work):
    ids = np.array(sorted(work.plan), np.int64)
    vectors = np.zeros((len(ids), 8), np.float16)
    vectors[:, 0] = 1
    zeros = np.zeros(len(ids), np.int64)
    records = [
        ShardRecord(key, planned.video.content_version, 1, address=planned.video.address, claim=planned.video.claim)
        for key, planned in sorted(work.plan.items())
    ]
    batch = EmbeddingBatch(vectors, ids, zeros, zeros / 1.0)
    work.embedding_store.write(RANGE, "20260102T030405000006Z-0a1b2c3d4e5f.parquet", batch, records=records)


@pytest.mark.slow
def test_a_run_goes_on_within_three_seconds_of_the_servers_return(aimed, stand_in):
    with open_range(aimed, RANGE, begins=True) as work:
        store_vectors(work)
    is_mid, written, moments = threading.Event(), [], {}
    real = stand_in.rules._after

    def watch(method, request, answer, key):
        if method == "Upsert":
            written.append(time.monotonic())
            if len(written) == 3:
                is_mid.set()
                time.sleep(0.3)  # its answer is lost with the connection
        return real(method, request, answer, key)

    def interrupt():
        is_mid.wait(60)
        with stand_in.outage():
            time.sleep(SECONDS)
        moments["back"] = time.monotonic()

    stand_in.rules._after = watch
    interruption = threading.Thread(target=interrupt)
    interruption.start()
    with open_range(aimed, RANGE) as work:
        assert index_range(work).num_points == dict.fromkeys(range(1, 401), 1)
    interruption.join()
    resumed = next(moment for moment in written if moment > moments["back"]) - moments["back"]
    print(f"resumed {resumed:.2f} s after an outage of {SECONDS:.0f} s")
    assert resumed < 3
    with open_catalog(aimed) as catalog:
        assert {entry.state for entry in catalog.ledger.entries(RANGE).values()} == {"done"}


def test_no_video_is_fetched_for_a_server_that_would_not_take_its_points(aimed, stand_in, monkeypatch):
    stand_in.engine.create_collection("theirs", {})
    stand_in.rules.in_recovery = True
    fetched = []
    monkeypatch.setattr(stage, "decode_rows", lambda rows, **_: fetched.append(rows) or iter(()))
    with (
        open_range(aimed, RANGE, begins=True) as work,
        pytest.raises(StoreRefusedError, match="recovery mode and reads nothing"),
    ):
        decode_range(work)
    assert fetched == []
