"""The index stage: vectors in, verified points and failures out."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from extraction_dagster.errors.index import CollectionMissingError, PayloadError, VectorNormError
from extraction_dagster.records import Failure
from extraction_dagster.stages.index.replace import replace_records

if TYPE_CHECKING:
    from collections.abc import Mapping

    from extraction_dagster.records import EmbeddingBatch, VideoRow
    from extraction_dagster.stages.index.protocol import CollectionSpec, PointStore


@dataclass(frozen=True, slots=True)
class Indexed:
    """What became of some records.

    Attributes:
        num_points: Verified points by record.
        failures: The records that can't become points; the points that they had stay.
    """

    num_points: Mapping[int, int]
    failures: tuple[Failure, ...]


def index_records(
    store: PointStore, embeddings: EmbeddingBatch, *, rows: Mapping[int, VideoRow], generations: Mapping[int, str]
) -> Indexed:
    """Replace the points of these records; a record that can't become points fails alone.

    Raises:
        PointStoreError: The store failed; no record is to blame.
    """
    left, failures = set(embeddings.record_id.tolist()), list[Failure]()
    while True:
        try:
            written = replace_records(store, embeddings.of_records(left), rows=rows, generations=generations)
        except (PayloadError, VectorNormError) as error:
            left.discard(error.record_id)
            failures.append(_failure(rows[error.record_id], error))
        else:
            return Indexed(written, tuple(failures))


def open_for_writing(store: PointStore, spec: CollectionSpec) -> None:
    """Open the collection that takes these vectors: the one in use, or the one that was staged beside it.

    Raises:
        CollectionMismatchError: The one in use holds other vectors, and none was staged for these.
    """
    there = store.collections(spec.name)
    others_in_use = any(in_use for fingerprint, in_use in there.items() if fingerprint != spec.fingerprint)
    store.ensure_collection(spec, staged=others_in_use and spec.fingerprint in there)


def open_for_reading(store: PointStore, name: str, fingerprint: str) -> bool:
    """Open the collection of these vectors, in use or staged, if there is one. Returns whether there is."""
    for chosen in (None, fingerprint):
        with contextlib.suppress(CollectionMissingError):
            if store.open_collection(name, fingerprint=chosen).fingerprint == fingerprint:
                return True
    return False


def _failure(row: VideoRow, error: PayloadError | VectorNormError) -> Failure:
    return Failure(row.record_id, row.content_version, "index", type(error).__name__, str(error), error.permanent)
