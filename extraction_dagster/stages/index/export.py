"""Take points elsewhere: into one Parquet file, or into another store."""

from __future__ import annotations

import errno
import json
import os
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from extraction_dagster.errors.index import ExportError, PointsMissingError
from extraction_dagster.files import replacing
from extraction_dagster.settings import RESERVED_PAYLOAD_KEYS
from extraction_dagster.stages.index.stage import wrong_counts

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from extraction_dagster.stages.index.points import PointBatch
    from extraction_dagster.stages.index.protocol import CollectionSpec, PointStore

_POINTS_PER_GROUP = 2048


def export_points(
    store: PointStore, spec: CollectionSpec, path: Path, *, on_written: Callable[[int], None] | None = None
) -> int:
    """Write every point of the open collection to a Parquet file: whole, or not at all.

    Columns: `id`, `record_id`, `frame_number`, `frame_second`, `platform`, `video_code`, `path`, `created_at`,
    `generation`, `payload` (further columns, as JSON; null when there are none) and `vector` (float32, dim). The file's
    metadata says which embedding made it.

    Args:
        store: With its collection open.
        spec: What it holds.
        path: The file; one that is there is replaced.
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
            written = _write(store, spec, beside, on_written)
            expected = store.count()
            if written != expected:
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


def _write(store: PointStore, spec: CollectionSpec, path: Path, on_written: Callable[[int], None] | None) -> int:
    written = 0
    schema = _schema(spec)
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for batch in store.read(batch_size=_POINTS_PER_GROUP):
            writer.write_table(_table(batch, schema))
            written += len(batch)
            if on_written is not None:
                on_written(written)
    return written


def _schema(spec: CollectionSpec) -> pa.Schema:
    types = {"record_id": pa.int64(), "frame_number": pa.int64(), "frame_second": pa.float64()}
    fields = [("id", pa.string()), *((key, types.get(key, pa.string())) for key in RESERVED_PAYLOAD_KEYS)]
    metadata = {"collection": spec.name, "dim": str(spec.dim), "fingerprint": spec.fingerprint}
    vector = pa.list_(pa.float32(), spec.dim)
    return pa.schema(
        [*fields, ("payload", pa.string()), ("vector", vector)], metadata={"extraction": json.dumps(metadata)}
    )


def _table(batch: PointBatch, schema: pa.Schema) -> pa.Table:
    columns: dict[str, Any] = {"id": list(batch.ids)}
    columns |= {key: [payload.get(key) for payload in batch.payloads] for key in RESERVED_PAYLOAD_KEYS}
    extras = [{key: payload[key] for key in payload.keys() - set(RESERVED_PAYLOAD_KEYS)} for payload in batch.payloads]
    columns["payload"] = [json.dumps(extra, sort_keys=True) if extra else None for extra in extras]
    flat = pa.array(batch.vectors.astype("float32").reshape(-1), pa.float32())
    columns["vector"] = pa.FixedSizeListArray.from_arrays(flat, batch.dim)
    return pa.Table.from_pydict(columns, schema=schema)
