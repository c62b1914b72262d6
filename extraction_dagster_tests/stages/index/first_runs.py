"""A process that makes first runs on stores that are empty, at the same moment as others do.

`python first_runs.py RECORD_ID` takes lines `NAME HOME [URL PORT]`; for each it opens the store as a run does, writes
two points of its record, and prints `ok` or what went wrong.
"""

import sys
from pathlib import Path

import numpy as np

from extraction_dagster.records import EmbeddingBatch, VideoRow
from extraction_dagster.settings import Settings
from extraction_dagster.stages.index.protocol import CollectionSpec
from extraction_dagster.stages.index.stage import open_for_writing, open_point_store, replace_records, require_store

FINGERPRINT = "0123456789abcdef"


def run_first(record_id, name, home, url=None, port="6334"):
    """What a run does to the store, from before its first video to its last point."""
    settings = Settings(home=Path(home), qdrant_url=url, qdrant_grpc_port=int(port), collection_name=name)
    require_store(settings, FINGERPRINT)
    vectors = np.eye(2, 8, dtype=np.float16)
    frames = np.array([0, 1], np.int64)
    batch = EmbeddingBatch(vectors, np.array([record_id] * 2, np.int64), frames, frames / 1.0)
    with open_point_store(settings, wait_seconds=60) as store:
        open_for_writing(store, CollectionSpec(name, 8, FINGERPRINT))
        replace_records(
            store, batch, rows={record_id: VideoRow(record_id, "v.mp4")}, generations={record_id: f"g{record_id}"}
        )


def main():
    """Serve lines until there are no more."""
    record_id = int(sys.argv[1])
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        try:
            run_first(record_id, *line.split())
            said = "ok"
        except Exception as error:  # noqa: BLE001 - told to the parent
            said = f"{type(error).__name__}: {error}"
        sys.stdout.write(" ".join(said.split()) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
