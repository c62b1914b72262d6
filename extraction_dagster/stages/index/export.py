"""Take points elsewhere: into one file, or into another store."""

from __future__ import annotations

import contextlib
import errno
import gzip
import json
import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from extraction_dagster.errors.index import ExportError, PointsMissingError
from extraction_dagster.files import replacing
from extraction_dagster.settings import RESERVED_PAYLOAD_KEYS
from extraction_dagster.stages.index.point_files import (
    ENDINGS,
    POINTS_PER_GROUP,
    Head,
    ending_of,
    parquet_schema,
)
from extraction_dagster.stages.index.stage import wrong_counts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from extraction_dagster.stages.index.points import PointBatch
    from extraction_dagster.stages.index.protocol import CollectionSpec, PointStore


def export_points(
    store: PointStore, spec: CollectionSpec, path: Path, *, on_written: Callable[[int], None] | None = None
) -> int:
    """Write every point of the open collection to a file, in the format of its ending: whole, or not at all.

    Parquet has the columns `id`, `record_id`, `frame_number`, `frame_second`, `platform`, `video_code`, `path`,
    `created_at`, `generation`, `payload` (further columns, as JSON; null when there are none) and `vector` (float32,
    dim). Lines of JSON have `id`, `payload` and `vector`. The file says which embedding made it, of which source table.

    Args:
        store: With its collection open.
        spec: What it holds.
        path: The file, of an ending in `ENDINGS`; one that is there is replaced.
        on_written: Told the number of points written so far.

    Returns:
        The number of points, which was compared with the store's own count.

    Raises:
        ExportError: The file can't be written, or points came or went meanwhile.
    """
    if path.is_dir():
        raise ExportError(str(path), os.strerror(errno.EISDIR))
    try:
        with replacing(path, mode=None, durable=False) as beside:
            head, batches = Head.of(spec, points=store.count()), store.read(batch_size=POINTS_PER_GROUP)
            written = _write_points(beside, ending_of(path) or ENDINGS[0], head, batches, on_written=on_written)
            expected = store.count()
            if not written == expected == head.points:
                why = f"{written} points were written, and the store holds {expected}: try again"
                raise ExportError(str(path), why)
    except OSError as error:
        raise ExportError(str(path), error.strerror or type(error).__name__) from error
    return written


def copy_points(source: PointStore, target: PointStore, *, on_copied: Callable[[int], None] | None = None) -> int:
    """Write every point of one store into another, and see that each record has as many there.

    It can be repeated: a point that is there already is written over. Points that only the target has are left alone,
    unless their record is in the source: then they are counted and refused.

    Args:
        source: With its collection open.
        target: With its collection open, of the same embedding.
        on_copied: Told the number of points copied so far.

    Returns:
        The number of points copied.

    Raises:
        PointsMissingError: A record has more or fewer points in the target.
    """
    copied = 0
    for batch in source.read():
        target.upsert(batch)
        copied += len(batch)
        if on_copied is not None:
            on_copied(copied)
    wanted, there = source.count_by_record(), target.count_by_record()
    found = {record_id: there.get(record_id, 0) for record_id in wanted}
    if found != wanted:
        got, records = sum(found.values()), wrong_counts(found, wanted)
        raise PointsMissingError("in the target after copying them", expected=copied, got=got, records=records)
    target.flush()
    return copied


def _write_points(
    path: Path,
    ending: str,
    head: Head,
    batches: Iterable[PointBatch],
    *,
    on_written: Callable[[int], None] | None = None,
) -> int:
    """Write points to a file in the format of an ending; returns how many there were."""
    written = 0
    with _parquet_writer(path, head) if ending == ".parquet" else _lines_writer(path, ending, head) as write:
        for batch in batches:
            write(batch)
            written += len(batch)
            if on_written is not None:
                on_written(written)
    return written


@contextlib.contextmanager
def _parquet_writer(path: Path, head: Head) -> Iterator[Callable[[PointBatch], None]]:
    about = {key: value for key, value in asdict(head).items() if key != "points"} | {"dim": str(head.dim)}
    schema = parquet_schema(head).with_metadata({"extraction": json.dumps(about)})
    with pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True) as writer:
        yield lambda batch: writer.write_table(_table(batch, schema), row_group_size=POINTS_PER_GROUP)


@contextlib.contextmanager
def _lines_writer(path: Path, ending: str, head: Head) -> Iterator[Callable[[PointBatch], None]]:
    with gzip.open(path, "wt", compresslevel=6) if ending.endswith(".gz") else path.open("w") as file:

        def write(batch: PointBatch) -> None:
            for point_id, payload, vector in zip(batch.ids, batch.payloads, batch.vectors.tolist(), strict=True):
                file.write(json.dumps({"id": point_id, "payload": payload, "vector": vector}) + "\n")

        file.write(json.dumps({"extraction": asdict(head)}) + "\n")
        yield write


def _table(batch: PointBatch, schema: pa.Schema) -> pa.Table:
    columns: dict[str, Any] = {"id": list(batch.ids)}
    columns |= {key: [payload.get(key) for payload in batch.payloads] for key in RESERVED_PAYLOAD_KEYS}
    extras = [{key: payload[key] for key in payload.keys() - set(RESERVED_PAYLOAD_KEYS)} for payload in batch.payloads]
    columns["payload"] = [json.dumps(extra, sort_keys=True) if extra else None for extra in extras]
    flat = pa.array(batch.vectors.astype("float32").reshape(-1), pa.float32())
    columns["vector"] = pa.FixedSizeListArray.from_arrays(flat, batch.dim)
    return pa.Table.from_pydict(columns, schema=schema)
