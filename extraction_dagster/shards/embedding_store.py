"""Vectors between embedding and indexing: float16 in Parquet, a file for each frame shard that vectors were made of.

Its name says when they were made: whether a record has vectors, and which are its newest, is asked of records.
"""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from extraction_dagster.errors import one_line
from extraction_dagster.errors.decode import EmbeddingShardError, EmbeddingStoreError
from extraction_dagster.records import EmbeddingBatch, Failure
from extraction_dagster.shards.checked_parquet import CheckedParquet, Layout
from extraction_dagster.shards.store import MOST_BYTES, Shard, ShardRecord, ShardStore

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    import pyarrow as pa

    from extraction_dagster.records import IdRange

FORMAT_VERSION = 1
_MOST_DIM = 65_536
_MOST_MOVES = 8  # how often the shards that are read may be merged meanwhile


@dataclass(frozen=True, slots=True)
class EmbeddingShard(Shard):
    """One file of vectors.

    Attributes:
        dim: Length of each vector.
        failures: Records of the frame shard that have none, and why.
    """

    dim: int
    failures: tuple[Failure, ...]


class EmbeddingStore(ShardStore[EmbeddingShard]):
    """The embedding shards of one fingerprint under a root.

    The fingerprint must name everything that the vectors depend on: the model, and how the frames were made.
    """

    kind, footer_key = "embedding", b"extraction_dagster.embedding_shard"
    store_error = EmbeddingStoreError
    # zstd saves what float16 leaves to save; a dictionary or statistics of vectors would cost time and space.
    parquet_options: ClassVar = {
        "compression": "zstd",
        "use_dictionary": False,
        "write_statistics": False,
        "write_page_checksum": True,
    }

    def write(
        self,
        partition: IdRange,
        name: str,
        batch: EmbeddingBatch,
        *,
        records: Sequence[ShardRecord],
        failures: Sequence[Failure] = (),
    ) -> EmbeddingShard:
        """Write vectors, replacing an earlier file of that name.

        Args:
            partition: The partition.
            name: Of the file; `next_name` gives one that is later than all others.
            batch: The vectors.
            records: Whose they are, in the batch's order.
            failures: Records that have none, and why.
        """
        if "/" in name or name.startswith("."):
            raise EmbeddingShardError(name, "a name with a folder or a leading dot", "a plain file name")
        footer = {
            "format_version": FORMAT_VERSION,
            "fingerprint": self.fingerprint,
            "partition": partition.partition_key,
            "name": name,
            "dim": batch.dim,
            "records": [_as_footer(record) for record in records],
            "failures": [asdict(failure) for failure in failures],
        }
        path, _ = self._write(partition, name, _table(batch), footer)
        return EmbeddingShard(name, path, batch.vectors.nbytes, tuple(records), batch.dim, tuple(failures))

    def read(self, shard: EmbeddingShard, *, only: Collection[int] | None = None) -> EmbeddingBatch:
        """Read a shard's vectors; those of a shard that was merged away come from where they are now.

        Args:
            shard: As it was listed, however long ago.
            only: The records that are wanted; all when None.

        Raises:
            EmbeddingShardError: The file is gone or damaged.
            EmbeddingStoreError: The store failed.
        """
        wanted = {record.record_id for record in shard.records if only is None or record.record_id in only}
        parts = [(shard, wanted)]
        batches = [_none(shard.dim)]
        for _ in range(_MOST_MOVES):
            moved = list[tuple[EmbeddingShard, set[int]]]()
            for part, ids in parts:
                try:
                    batches.append(self._read_file(part, ids))
                except EmbeddingShardError as error:
                    again = self._moved(part, ids) if error.gone else []
                    if {record_id for _, found in again for record_id in found} != ids or not ids:
                        raise
                    moved += again
            parts = moved
        if parts:
            raise EmbeddingShardError(shard.path, "a shard that is merged again and again", "one that stays", gone=True)
        return batches[1] if len(batches) == 2 else _joined(batches)  # noqa: PLR2004 - it was one file

    def _read_file(self, shard: EmbeddingShard, only: Collection[int]) -> EmbeddingBatch:
        self.require_source()
        try:
            with self._reaching():
                data = io.BytesIO(self._fs.cat_file(shard.path))
        except FileNotFoundError as error:
            raise EmbeddingShardError(shard.path, type(error).__name__, "a whole Parquet file", gone=True) from error
        try:
            batch = _read_batch(data, shard)
        except Exception as error:  # whatever comes of bytes that somebody else wrote
            got = f"{type(error).__name__}: {one_line(' '.join(str(error).split()))}"
            raise EmbeddingShardError(shard.path, got, "a whole Parquet file") from error
        return batch if len(only) == len(shard.records) else batch.of_records(only)

    def merge(self, partition: IdRange, parts: Sequence[tuple[EmbeddingShard, Collection[int]]], name: str) -> None:
        """Write one shard with some records of several, and with the failures of all."""
        batches = [self._read_file(shard, kept) for shard, kept in parts]
        records = [record for shard, kept in parts for record in shard.records if record.record_id in kept]
        failures = {failure.record_id: failure for shard, _ in parts for failure in shard.failures}
        self.write(partition, name, _joined(batches), records=records, failures=list(failures.values()))

    def _described(
        self,
        footer: dict[str, Any],
        path: str,
        partition: IdRange,
        size_bytes: int,  # noqa: ARG002 - it tells the vectors' own
    ) -> EmbeddingShard:
        expected = {"format_version": FORMAT_VERSION, "fingerprint": self.fingerprint, "partition": str(partition)}
        got = {key: footer[key] for key in expected}
        if got != expected:
            raise ValueError(f"it has {got}, expected {expected}")
        if path.rsplit("/", 1)[-1].removesuffix(".parquet") != footer["name"].removesuffix(".parquet"):
            raise ValueError(f"it was called {footer['name']}")
        if type(footer["dim"]) is not int or not 1 <= footer["dim"] <= _MOST_DIM:
            raise ValueError(f"its vectors have {footer['dim']!r:.20} numbers")
        records = tuple(
            ShardRecord(*record[:3], **dict(zip(("address", "claim"), record[3:], strict=False)))
            for record in footer["records"]
        )
        of_vectors = 2 * footer["dim"] * sum(record.num_frames for record in records)
        if of_vectors > MOST_BYTES:
            raise ValueError(f"its vectors have {of_vectors} bytes")
        failures = tuple(Failure(**failure) for failure in footer["failures"])
        if not all(map(_is_sound, failures)):
            raise ValueError("its failures are not of this format")
        return EmbeddingShard(footer["name"], path, of_vectors, records, footer["dim"], failures)


def _is_sound(failure: Failure) -> bool:
    texts = (failure.content_version, failure.stage, failure.error_type, failure.message, failure.details)
    numbers = type(failure.record_id) is int and abs(failure.record_id) < 2**63
    return numbers and type(failure.permanent) is bool and all(isinstance(text, str) for text in texts)


def _read_batch(data: io.BytesIO, shard: EmbeddingShard) -> EmbeddingBatch:
    """A file's vectors; ValueError when they are not those of the listed records."""
    import pyarrow as pa  # noqa: PLC0415 - 0.3 s that importing the room need not pay

    numbers = [("record_id", pa.int64()), ("frame_number", pa.int64()), ("pts_seconds", pa.float64())]
    schema = pa.schema([*numbers, ("vector", pa.binary(2 * shard.dim))])
    unpacked = shard.num_frames * (2 * shard.dim + 3 * 8)
    parquet = CheckedParquet(data, Layout(schema, "ZSTD", max_bytes=unpacked + unpacked // 8 + 2**20))
    if sum(parquet.group_rows) != shard.num_frames:
        raise ValueError(f"{sum(parquet.group_rows)} vectors, expected {shard.num_frames}, as its footer says")
    groups = [parquet.read(group) for group in range(len(parquet.group_rows))]
    table = pa.concat_tables([schema.empty_table(), *groups]).combine_chunks()
    batch = EmbeddingBatch(
        vectors=_float16_rows(table["vector"], shard.dim),
        record_id=table["record_id"].to_numpy(),
        frame_number=table["frame_number"].to_numpy(),
        pts_seconds=table["pts_seconds"].to_numpy(),
    )
    listed = np.array([record.record_id for record in shard.records], np.int64)
    if not np.array_equal(batch.record_id, np.repeat(listed, [record.num_frames for record in shard.records])):
        raise ValueError("its rows are not those of the records that it lists")
    is_next = np.diff(batch.record_id) == 0  # of the same record as the row before
    if np.any(batch.frame_number < 0) or np.any(np.diff(batch.frame_number)[is_next] <= 0):
        raise ValueError("its frame numbers do not ascend")
    if not np.all(np.isfinite(batch.pts_seconds)):
        raise ValueError("it has times that are not finite")
    return batch


def _as_footer(record: ShardRecord) -> list[Any]:
    """A record as the footer has it; without what is not known of it, as earlier releases wrote it."""
    known = [record.address, record.claim] if record.address or record.claim else []
    return [record.record_id, record.content_version, record.num_frames, *known]


def _none(dim: int) -> EmbeddingBatch:
    numbers = np.empty(0, np.int64)
    return EmbeddingBatch(np.empty((0, dim), np.float16), numbers, numbers, np.empty(0, np.float64))


def _joined(batches: Sequence[EmbeddingBatch]) -> EmbeddingBatch:
    names = [item.name for item in fields(EmbeddingBatch)]
    return EmbeddingBatch(*(np.concatenate([getattr(batch, name) for batch in batches]) for name in names))


def _table(batch: EmbeddingBatch) -> pa.Table:
    """A shard's rows. Each vector is a fixed-size binary: a tenth of the CPU of a list of float16, the same size."""
    import pyarrow as pa  # noqa: PLC0415 - as above

    data = np.ascontiguousarray(batch.vectors, dtype="<f2")
    return pa.table(
        {
            "record_id": pa.array(batch.record_id),
            "frame_number": pa.array(batch.frame_number),
            "pts_seconds": pa.array(batch.pts_seconds),
            "vector": pa.Array.from_buffers(pa.binary(batch.dim * 2), len(data), [None, pa.py_buffer(data)]),
        }
    )


def _float16_rows(column: pa.ChunkedArray, dim: int) -> np.ndarray:
    """N fixed-size binary values as float16 (N, dim)."""
    array = column.combine_chunks()
    data = array.buffers()[1] if len(array) else b""
    offset = array.offset * dim * 2
    values = np.frombuffer(data, "<f2", count=len(array) * dim, offset=offset if len(array) else 0)
    return values.astype(np.float16, copy=False).reshape(len(array), dim)
