"""Embedding shards: one Parquet file per frame shard, on any fsspec path.

    <root>/<fingerprint>/<partition key>/<frame shard's name>

A file appears under its name only when it is whole. Its footer says what it is and what became of each record, so a
listing reads footers only; a file without that footer (torn, foreign, of another fingerprint) is no shard.
"""

from __future__ import annotations

import contextlib
import logging
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from extraction_dagster.errors.shards import EmbeddingShardError
from extraction_dagster.records import EmbeddingBatch, Failure
from extraction_dagster.shards import shard_files

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    import pyarrow as pa

    from extraction_dagster.records import IdRange

_log = logging.getLogger(__name__)
FORMAT_VERSION = 1
_SUFFIX = ".parquet"


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


class EmbeddingStore:
    """The embedding shards of one fingerprint under a root.

    The fingerprint must name everything that the vectors depend on: the model, and how the frames were made.
    """

    def __init__(self, root_uri: str, fingerprint: str) -> None:
        """Point at a root, which need not exist: a local folder or any fsspec URI."""
        self._files = shard_files.ShardFiles(root_uri, fingerprint)
        self._fingerprint = fingerprint

    def shards(self, partition: IdRange) -> list[EmbeddingShard]:
        """Every whole shard of a partition, by name; reads footers only."""
        found = (self._described(path, partition) for path in self._files.paths(partition.partition_key, _SUFFIX))
        return sorted((shard for shard in found if shard is not None), key=lambda shard: shard.name)

    def partition_keys(self) -> list[str]:
        """The names of the partitions that have a folder."""
        return self._files.folders()

    def has(self, partition: IdRange, name: str) -> bool:
        """Whether the frame shard of that name has its embedding shard."""
        return self._described(self._path(partition, name), partition) is not None

    def read(self, shard: EmbeddingShard) -> EmbeddingBatch:
        """Read a shard's vectors.

        Raises:
            EmbeddingShardError: The file is gone or damaged.
        """
        table = self._files.read_table(shard.path)
        if table.num_rows != shard.num_frames:
            raise EmbeddingShardError(
                shard.path, f"{table.num_rows} vectors", f"{shard.num_frames}, as its footer says"
            )
        return EmbeddingBatch(
            vectors=shard_files.float16_rows(table["vector"], shard.dim),
            record_id=table["record_id"].to_numpy(),
            frame_number=table["frame_number"].to_numpy(),
            pts_seconds=table["pts_seconds"].to_numpy(),
        )

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
        counts = dict(zip(*(part.tolist() for part in np.unique(batch.record_id, return_counts=True)), strict=True))
        records = tuple(EmbeddedRecord(record_id, version, counts[record_id]) for record_id, version in versions)
        shard = EmbeddingShard(name, self._path(partition, name), batch.dim, records, tuple(failures))
        self._files.write_table(
            shard.path,
            _table(batch),
            {
                "format_version": FORMAT_VERSION,
                "fingerprint": self._fingerprint,
                "partition": partition.partition_key,
                "name": name,
                "dim": batch.dim,
                "records": [[record.record_id, record.content_version, record.num_frames] for record in records],
                "failures": [asdict(failure) for failure in failures],
            },
        )
        return shard

    def remove(self, shard: EmbeddingShard) -> None:
        """Remove a shard; one that is gone already is no matter."""
        with contextlib.suppress(FileNotFoundError):
            self._files.delete(shard.path)

    def prune(self, partition: IdRange, keep: Collection[str]) -> int:
        """Delete a partition's shards whose frame shard is no more, and leftovers of killed writers.

        Args:
            partition: The partition.
            keep: Names of the frame shards there are.

        Returns:
            Shards deleted.
        """
        stale = [shard for shard in self.shards(partition) if shard.name not in keep]
        for shard in stale:
            self._files.delete(shard.path)
        self._files.sweep(partition.partition_key)
        return len(stale)

    def _path(self, partition: IdRange, name: str) -> str:
        return self._files.path(partition.partition_key, name.removesuffix(_SUFFIX) + _SUFFIX)

    def _described(self, path: str, partition: IdRange) -> EmbeddingShard | None:
        footer = self._files.footer(path)
        if footer is None:
            return None
        expected = (FORMAT_VERSION, self._fingerprint, partition.partition_key)
        if (footer.get("format_version"), footer.get("fingerprint"), footer.get("partition")) != expected:
            _log.warning("%s is not of this store (format, fingerprint or partition differ); it is left out", path)
            return None
        return EmbeddingShard(
            name=footer["name"],
            path=path,
            dim=footer["dim"],
            records=tuple(EmbeddedRecord(*record) for record in footer["records"]),
            failures=tuple(Failure(**failure) for failure in footer["failures"]),
        )


def _table(batch: EmbeddingBatch) -> pa.Table:
    import pyarrow as pa  # noqa: PLC0415 - 0.3 s that importing the room need not pay

    return pa.table(
        {
            "record_id": pa.array(batch.record_id),
            "frame_number": pa.array(batch.frame_number),
            "pts_seconds": pa.array(batch.pts_seconds),
            "vector": shard_files.fixed_size_rows(batch.vectors),
        }
    )
