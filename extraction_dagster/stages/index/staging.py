"""Change the model without a pause: load another collection beside the one in use, verify it, put it in use.

stage       video_frames-<new> is created, empty; searches use video_frames-<old>
load        runs with the new settings write into it; the ledger says which records have
publish     every record that is done is there, with all its points; searches use it from now on
drop        video_frames-<old> is removed
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from extraction_dagster.errors.index import CollectionNotReadyError
from extraction_dagster.stages.index.compare import WHOLE, compare_points, expected_points, finished, windows

if TYPE_CHECKING:
    from extraction_dagster.records import IdRange
    from extraction_dagster.stages.catalog.catalog import Catalog
    from extraction_dagster.stages.index.protocol import CollectionSpec, PointStore

_WINDOW_RECORDS = 1000
_RANGES_SHOWN = 5


@dataclass(frozen=True, slots=True)
class CollectionInfo:
    """A collection under a name.

    Attributes:
        fingerprint: Of the embedding that it holds.
        in_use: Whether searches use it.
        dim: Length of its vectors.
        points: How many it holds.
    """

    fingerprint: str
    in_use: bool
    dim: int
    points: int


def list_collections(store: PointStore, name: str) -> list[CollectionInfo]:
    """Every collection under a name, the one in use first."""
    found = []
    for fingerprint, in_use in store.collections(name).items():
        spec = store.open_collection(name, fingerprint=fingerprint)
        found.append(CollectionInfo(fingerprint, in_use, spec.dim, store.count()))
    return sorted(found, key=lambda item: (not item.in_use, item.fingerprint))


def stage_collection(store: PointStore, spec: CollectionSpec) -> bool:
    """Create a collection beside the one in use; safe to repeat.

    Returns:
        Whether it is beside another; False when it is the one in use, or the first one, which is in use at once.
    """
    beside = any(
        in_use for fingerprint, in_use in store.collections(spec.name).items() if fingerprint != spec.fingerprint
    )
    store.ensure_collection(spec, staged=beside)
    return beside


def publish_collection(store: PointStore, catalog: Catalog, *, name: str, fingerprint: str, force: bool = False) -> int:
    """Put a collection in use, once every record that is done is in it with all its points.

    Args:
        store: The store.
        catalog: The source table and the ledger.
        name: The name by which the collection is asked for.
        fingerprint: Which one is put in use.
        force: Publish it as it is.

    Returns:
        The records that were verified.

    Raises:
        CollectionNotReadyError: Records are missing.
        CollectionMissingError: There is no such collection.
    """
    store.open_collection(name, fingerprint=fingerprint)
    records, missing = 0, dict[str, int]()
    for window in () if force else windows(catalog, WHOLE, _WINDOW_RECORDS):
        done, absent = _verify(store, catalog, window, fingerprint)
        records += len(done)
        if absent:
            missing[f"{min(absent)}-{max(absent)}"] = len(absent)
    if missing:
        more = f" and {len(missing) - _RANGES_SHOWN} more" if len(missing) > _RANGES_SHOWN else ""
        shown = "ids " + ", ".join(list(missing)[:_RANGES_SHOWN]) + more
        raise CollectionNotReadyError(
            f"{name}-{fingerprint}", repr(store), missing=sum(missing.values()), records=records, ranges=shown
        )
    store.publish()
    return records


def _verify(store: PointStore, catalog: Catalog, window: IdRange, fingerprint: str) -> tuple[list[int], set[int]]:
    """The records of a window that are done, and those of them that are not in the collection as they should be."""
    entries = catalog.ledger.entries(window)
    rows = {row.video.record_id: row for row in catalog.source.rows_of(entries)}
    done = finished(catalog, rows, entries)
    expected = {key: expected_points(entries[key]) for key in done if entries[key].embedding_fingerprint == fingerprint}
    found = compare_points(store, expected, within=window)
    return done, {key for key in done if key not in expected} | set(found.lost) | set(found.stale)
