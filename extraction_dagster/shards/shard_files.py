"""Parquet files that are whole or not there, with a JSON description in their footer, on any fsspec path."""

from __future__ import annotations

import io
import json
import logging
import os
import posixpath
import struct
import uuid
from typing import TYPE_CHECKING, Any

import fsspec
import numpy as np
from fsspec.implementations.local import LocalFileSystem

from extraction_dagster.errors.shards import EmbeddingShardError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import pyarrow as pa

_log = logging.getLogger(__name__)
_KEY = b"extraction_dagster.embedding_shard"
_TEMPORARY = ".tmp-"
_MAGIC = b"PAR1"
_TAIL_BYTES = 64 * 1024
# Storing an object is atomic there, and a rename would be a copy and a deletion.
_ATOMIC_PUT = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "memory"})


class ShardFiles:
    """The files of one fingerprint under a root: `<root>/<fingerprint>/<folder>/<name>`."""

    def __init__(self, root_uri: str, fingerprint: str) -> None:
        """Point at a root, which need not exist."""
        self._fs, root = fsspec.core.url_to_fs(root_uri)
        self._root = posixpath.join(root, fingerprint)
        protocol = self._fs.protocol
        self._protocols = {protocol} if isinstance(protocol, str) else set(protocol)

    def path(self, folder: str, name: str) -> str:
        """Where a file of that name lies."""
        if name != posixpath.basename(name) or name.startswith("."):
            raise EmbeddingShardError(name, "a name with a folder or a leading dot", "a plain file name")
        return posixpath.join(self._root, folder, name)

    def paths(self, folder: str, suffix: str) -> list[str]:
        """The folder's files with that suffix; none when there is no such folder."""
        return [path for path in self._listed(folder) if path.endswith(suffix) and not _is_temporary(path)]

    def folders(self) -> list[str]:
        """The names of the folders there are."""
        return sorted(posixpath.basename(path.rstrip("/")) for path in self._listed(""))

    def footer(self, path: str) -> dict[str, Any] | None:
        """The description in a file's footer, or None when it is no whole file of ours; costs one short read."""
        try:
            return _description(self._tail(path))
        except FileNotFoundError:
            return None
        except (_NotOursError, ValueError) as error:  # Arrow's and json's errors are ValueErrors
            _log.warning("%s is no embedding shard (%s); it is left out", path, error)
            return None

    def read_table(self, path: str) -> pa.Table:
        """Read a file.

        Raises:
            EmbeddingShardError: It is gone or damaged.
        """
        import pyarrow as pa  # noqa: PLC0415 - 0.3 s that importing the room need not pay
        import pyarrow.parquet as pq  # noqa: PLC0415 - as above

        try:
            data = io.BytesIO(self._fs.cat_file(path))
            return pq.read_table(data, page_checksum_verification=True).combine_chunks()
        except (OSError, pa.ArrowException) as error:
            got = f"{type(error).__name__}: {error}".splitlines()[0]
            raise EmbeddingShardError(path, got, "a whole Parquet file") from error

    def write_table(self, path: str, table: pa.Table, description: Mapping[str, object]) -> None:
        """Write a file so that it is seen whole or not at all, also by whoever looks after a crash."""
        import pyarrow.parquet as pq  # noqa: PLC0415 - as above

        buffer = io.BytesIO()
        described = table.replace_schema_metadata({_KEY: json.dumps(description).encode()})
        # zstd saves what float16 leaves to save; a dictionary or statistics of vectors would cost time and space.
        pq.write_table(
            described,
            buffer,
            compression="zstd",
            use_dictionary=False,
            write_statistics=False,
            write_page_checksum=True,
        )
        self._publish(path, buffer.getvalue())

    def delete(self, path: str) -> None:
        """Delete a file."""
        self._fs.rm_file(path)

    def sweep(self, folder: str) -> None:
        """Delete temporary files that killed writers left; the folder must have no writer at work."""
        for path in self._listed(folder):
            if _is_temporary(path):
                self._fs.rm_file(path)

    def _listed(self, folder: str) -> Iterator[str]:
        try:
            self._fs.invalidate_cache()
            yield from self._fs.ls(posixpath.join(self._root, folder), detail=False)
        except FileNotFoundError:
            return

    def _publish(self, path: str, data: bytes) -> None:
        if self._protocols & _ATOMIC_PUT:
            self._fs.pipe_file(path, data)
            return
        folder, name = posixpath.split(path)
        temporary = posixpath.join(folder, f"{_TEMPORARY}{uuid.uuid4().hex}-{name}")
        self._fs.makedirs(folder, exist_ok=True)
        try:
            if isinstance(self._fs, LocalFileSystem):
                _rename_durably(temporary, path, data)
            else:
                self._fs.pipe_file(temporary, data)
                self._fs.mv(temporary, path)
        except BaseException:
            if self._fs.exists(temporary):
                self._fs.rm_file(temporary)
            raise

    def _tail(self, path: str) -> bytes:
        """The last bytes of a file, at least the whole footer: `... | footer | its length, 4 bytes | PAR1`."""
        tail: bytes = self._fs.tail(path, _TAIL_BYTES)
        if len(tail) < len(_MAGIC) + 4 or not tail.endswith(_MAGIC):
            message = "it does not end as a Parquet file does"
            raise _NotOursError(message)
        (length,) = struct.unpack("<I", tail[-8:-4])
        return tail if length + 8 <= len(tail) else self._fs.tail(path, length + 8)


class _NotOursError(Exception):
    """A file is no whole file of ours."""


def _description(tail: bytes) -> dict[str, Any]:
    import pyarrow.parquet as pq  # noqa: PLC0415 - as above

    metadata = pq.read_metadata(io.BytesIO(tail)).metadata or {}
    if _KEY not in metadata:
        message = "its footer does not describe one"
        raise _NotOursError(message)
    described = json.loads(metadata[_KEY])
    if not isinstance(described, dict):
        message = "its footer's description is no object"
        raise _NotOursError(message)
    return described


def _is_temporary(path: str) -> bool:
    return posixpath.basename(path).startswith(_TEMPORARY)


def _rename_durably(temporary: str, path: str, data: bytes) -> None:
    with open(temporary, "xb") as file:  # noqa: PTH123 - fsspec hands out strings
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)  # noqa: PTH105 - as above
    folder = os.open(posixpath.dirname(path), os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def fixed_size_rows(vectors: np.ndarray) -> pa.Array:
    """float16 (N, dim) as N fixed-size binary values: a tenth of the CPU of a list of float16, the same size."""
    import pyarrow as pa  # noqa: PLC0415 - as above

    data = np.ascontiguousarray(vectors, dtype="<f2")
    return pa.Array.from_buffers(pa.binary(vectors.shape[1] * 2), len(data), [None, pa.py_buffer(data)])


def float16_rows(column: pa.ChunkedArray, dim: int) -> np.ndarray:
    """N fixed-size binary values as float16 (N, dim)."""
    array = column.combine_chunks()
    data = array.buffers()[1] if len(array) else b""
    offset = array.offset * dim * 2
    values = np.frombuffer(data, "<f2", count=len(array) * dim, offset=offset if len(array) else 0)
    return values.astype(np.float16, copy=False).reshape(len(array), dim)
