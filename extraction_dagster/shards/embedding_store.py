"""Vectors between embedding and indexing: float16 in Parquet, one file for each frame shard, under its name.

A merged shard has a name of its own: whether a record has vectors is asked of records, not of names.
"""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from extraction_dagster.errors.decode import EmbeddingShardError, EmbeddingStoreError
from extraction_dagster.records import EmbeddingBatch, Failure
from extraction_dagster.shards.store import Shard, ShardRecord, ShardStore

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    import pyarrow as pa

    from extraction_dagster.records import IdRange

FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True)
class EmbeddingShard(Shard):
    """One file of vectors, under the frame shard's name.

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
        records = tuple(ShardRecord(record_id, version, counts[record_id]) for record_id, version in versions)
        footer = {
            "format_version": FORMAT_VERSION,
            "fingerprint": self.fingerprint,
            "partition": partition.partition_key,
            "name": name,
            "dim": batch.dim,
            "records": [[record.record_id, record.content_version, record.num_frames] for record in records],
            "failures": [asdict(failure) for failure in failures],
        }
        path, _ = self._write(partition, name, _table(batch), footer)
        return EmbeddingShard(name, path, batch.vectors.nbytes, records, batch.dim, tuple(failures))

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
        names = [item.name for item in fields(EmbeddingBatch)]
        whole = EmbeddingBatch(*(np.concatenate([getattr(batch, name) for batch in batches]) for name in names))
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
        records = tuple(ShardRecord(*record) for record in footer["records"])
        of_vectors = 2 * footer["dim"] * sum(record.num_frames for record in records)
        failures = tuple(Failure(**failure) for failure in footer["failures"])
        return EmbeddingShard(footer["name"], path, of_vectors, records, footer["dim"], failures)


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
