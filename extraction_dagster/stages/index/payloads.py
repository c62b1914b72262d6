"""Payloads that no longer say what their row says: found by comparing, written without touching a vector.

A changed title or platform changes no frame. With a version column its row is done again; without one, a reconciliation
finds it here and, on repair, writes the payload alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from extraction_dagster.errors import ExtractionError
from extraction_dagster.stages.index.points import PointFilter, row_payload

if TYPE_CHECKING:
    from collections.abc import Mapping

    from extraction_dagster.records import VideoRow
    from extraction_dagster.stages.index.protocol import PointStore

_RECORDS_AT_ONCE = 200


def changed_payloads(store: PointStore, rows: Mapping[int, VideoRow]) -> dict[int, dict[str, Any]]:
    """What the payload of records should say, of those that have a point which says otherwise.

    Args:
        store: With its collection open.
        rows: The rows of records that are done; one whose payload has no JSON form is left to the run that fails it.
    """
    wanted = {key: payload for key, row in rows.items() if (payload := _payload_of(row)) is not None}
    changed, ids = dict[int, dict[str, Any]](), sorted(wanted)
    names = sorted({name for payload in wanted.values() for name in payload})
    for start in range(0, len(ids), _RECORDS_AT_ONCE):
        chosen = PointFilter(record_ids=tuple(ids[start : start + _RECORDS_AT_ONCE]))
        for found in store.payloads(chosen, ["record_id", *names]):
            record_id = int(found["record_id"])
            right = wanted.get(record_id, {})
            if any(found.get(name) != value for name, value in right.items()):
                changed[record_id] = right
    return changed


def write_payloads(store: PointStore, payloads: Mapping[int, Mapping[str, Any]]) -> None:
    """Write what the payload of each record should say to all its points; their vectors and other keys stay."""
    for record_id, payload in payloads.items():
        store.set_payload(payload, PointFilter(record_ids=(record_id,)))


def _payload_of(row: VideoRow) -> dict[str, Any] | None:
    try:
        return row_payload(row)
    except ExtractionError:
        return None
