"""Vectors between embedding and indexing: float16 in Parquet, one file for each frame shard, under its name.

A merged shard has a name of its own: whether a record has vectors is asked of records, not of names.
"""

from __future__ import annotations

import io
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from extraction_dagster.errors.decode import EmbeddingShardError, EmbeddingStoreError
from extraction_dagster.records import EmbeddingBatch, Failure
from extraction_dagster.shards.store import ShardStore

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    import pyarrow as pa

    from extraction_dagster.records import IdRange

FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True)
class EmbeddedRecord:
    """A record of a shard: of which version, and how many vectors."""

    record_id: int
    content_version: str
    num_frames: int


@dataclass(frozen=True, slots=True)
class EmbeddingShard:
    """One file of vectors, as its footer describes it.

    Attributes:
        name: The frame shard's name.
        path: Where the file lies in its file system.
        dim: Length of each vector.
        records: Records with vectors, in the frame shard's order.
        failures: Records of the frame shard that have none, and why.
    """

    name: str
    path: str
    dim: int
    records: tuple[EmbeddedRecord, ...]
    failures: tuple[Failure, ...]

    @property
    def num_frames(self) -> int:
        """Vectors in the file."""
        return sum(record.num_frames for record in self.records)

    @property
    def size_bytes(self) -> int:
        """Size of the vectors, uncompressed."""
        return self.num_frames * self.dim * 2


class EmbeddingStore(ShardStore[EmbeddingShard]):
    """The embedding shards of one fingerprint under a root.

    The fingerprint must name everything that the vectors depend on: the model, and how the frames were made.
    """

    kind, footer_key = "embedding", b"extraction_dagster.embedding_shard"
    store_error = EmbeddingStoreError

    def write(
        self,
        partition: IdRange,
        name: str,
        batch: EmbeddingBatch,
        *,
        versions: Sequence[tuple[int, str]],
        failures: Sequence[Failure],
    ) -> EmbeddingShard:
        """Write a frame shard's vectors, replacing an earlier file of that name.

        Args:
            partition: The partition.
            name: The frame shard's name.
            batch: The vectors, records in the frame shard's order.
            versions: record_id and content_version of each record with vectors, in the batch's order.
            failures: The frame shard's other records.
        """
        if "/" in name or name.startswith("."):
            raise EmbeddingShardError(name, "a name with a folder or a leading dot", "a plain file name")
        counts = dict(zip(*(part.tolist() for part in np.unique(batch.record_id, return_counts=True)), strict=True))
        records = tuple(EmbeddedRecord(record_id, version, counts[record_id]) for record_id, version in versions)
        footer = {
            "format_version": FORMAT_VERSION,
            "fingerprint": self.fingerprint,
            "partition": partition.partition_key,
            "name": name,
            "dim": batch.dim,
            "records": [[record.record_id, record.content_version, record.num_frames] for record in records],
            "failures": [asdict(failure) for failure in failures],
        }
        path = self._write(partition, name, _to_parquet(batch, footer))
        return EmbeddingShard(name, path, batch.dim, records, tuple(failures))

    def read(self, shard: EmbeddingShard) -> EmbeddingBatch:
        """Read a shard's vectors.

        Raises:
            EmbeddingShardError: The file is gone or damaged.
        """
        import pyarrow as pa  # noqa: PLC0415 - 0.3 s that importing the room need not pay
        import pyarrow.parquet as pq  # noqa: PLC0415 - as above

        try:
            with self._reaching():
                data = io.BytesIO(self._fs.cat_file(shard.path))
            table = pq.read_table(data, page_checksum_verification=True).combine_chunks()
        except (OSError, pa.ArrowException) as error:
            got = f"{type(error).__name__}: {error}".splitlines()[0]
            raise EmbeddingShardError(shard.path, got, "a whole Parquet file") from error
        if table.num_rows != shard.num_frames:
            expected = f"{shard.num_frames}, as its footer says"
            raise EmbeddingShardError(shard.path, f"{table.num_rows} vectors", expected)
        return EmbeddingBatch(
            vectors=_float16_rows(table["vector"], shard.dim),
            record_id=table["record_id"].to_numpy(),
            frame_number=table["frame_number"].to_numpy(),
            pts_seconds=table["pts_seconds"].to_numpy(),
        )

    def merge(self, partition: IdRange, parts: Sequence[tuple[EmbeddingShard, Collection[int]]], name: str) -> None:
        """Write one shard with some records of several, and with the failures of all."""
        batches = [self.read(shard).of_records(kept) for shard, kept in parts]
        versions = [
            (record.record_id, record.content_version)
            for shard, kept in parts
            for record in shard.records
            if record.record_id in kept
        ]
        failures = {failure.record_id: failure for shard, _ in parts for failure in shard.failures}
        whole = EmbeddingBatch(
            vectors=np.concatenate([batch.vectors for batch in batches]),
            record_id=np.concatenate([batch.record_id for batch in batches]),
            frame_number=np.concatenate([batch.frame_number for batch in batches]),
            pts_seconds=np.concatenate([batch.pts_seconds for batch in batches]),
        )
        self.write(partition, name, whole, versions=versions, failures=list(failures.values()))

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
        return EmbeddingShard(
            name=footer["name"],
            path=path,
            dim=footer["dim"],
            records=tuple(EmbeddedRecord(*record) for record in footer["records"]),
            failures=tuple(Failure(**failure) for failure in footer["failures"]),
        )


def _to_parquet(batch: EmbeddingBatch, footer: dict[str, object]) -> bytes:
    """A shard's file. Each vector is a fixed-size binary: a tenth of the CPU of a list of float16, the same size."""
    import pyarrow as pa  # noqa: PLC0415 - as above
    import pyarrow.parquet as pq  # noqa: PLC0415 - as above

    data = np.ascontiguousarray(batch.vectors, dtype="<f2")
    rows = pa.Array.from_buffers(pa.binary(batch.dim * 2), len(data), [None, pa.py_buffer(data)])
    columns = {
        "record_id": pa.array(batch.record_id),
        "frame_number": pa.array(batch.frame_number),
        "pts_seconds": pa.array(batch.pts_seconds),
        "vector": rows,
    }
    table = pa.table(columns).replace_schema_metadata({EmbeddingStore.footer_key: json.dumps(footer).encode()})
    buffer = io.BytesIO()
    # zstd saves what float16 leaves to save; a dictionary or statistics of vectors would cost time and space.
    pq.write_table(
        table, buffer, compression="zstd", use_dictionary=False, write_statistics=False, write_page_checksum=True
    )
    return buffer.getvalue()


def _float16_rows(column: pa.ChunkedArray, dim: int) -> np.ndarray:
    """N fixed-size binary values as float16 (N, dim)."""
    array = column.combine_chunks()
    data = array.buffers()[1] if len(array) else b""
    offset = array.offset * dim * 2
    values = np.frombuffer(data, "<f2", count=len(array) * dim, offset=offset if len(array) else 0)
    return values.astype(np.float16, copy=False).reshape(len(array), dim)
