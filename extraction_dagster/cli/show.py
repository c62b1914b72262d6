"""`extraction show`: everything that is known of one record."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from extraction_dagster.cli import console
from extraction_dagster.errors.catalog import RecordUnknownError
from extraction_dagster.errors.index import CollectionMissingError
from extraction_dagster.records import IdRange
from extraction_dagster.settings import Settings, load_settings
from extraction_dagster.stages.catalog.catalog import Catalog, open_catalog
from extraction_dagster.stages.index.points import PointFilter
from extraction_dagster.stages.index.stage import open_point_store

if TYPE_CHECKING:
    from extraction_dagster.stages.catalog.ledger import LedgerEntry
    from extraction_dagster.stages.catalog.source_rows import SourceRow

_MOST_ERRORS = 20
# What these two say is of use to programs alone.
_NOT_SHOWN = {"claim", "address"}


def command(
    record_id: Annotated[int, typer.Argument(metavar="ID", parser=console.parse_id, help="The record.")],
    *,
    as_json: console.AsJson = False,
) -> None:
    """Show all of one record: its row, state, tries, frames, points in the collection, errors and runs.

    For example: extraction show 12345
    """
    settings = load_settings()
    with open_catalog(settings) as catalog:
        document = _of_record(catalog, record_id)
    document["points"] = _points(settings, record_id)
    if as_json:
        console.print_json(document)
        return
    values = [(name.replace("_", " "), document[name]) for name in ("status", "address", "points")]
    values += [(f"row: {name}", value) for name, value in document["row"].items()]
    values += [(name.replace("_", " "), value) for name, value in document["ledger"].items() if name not in _NOT_SHOWN]
    console.print_values(values, title=f"Record {record_id}")
    for error in document["errors"]:
        console.out.print(f"{error['occurred_at']} {error['stage']}, {error['error_type']}, run {error['run_id']}")
        console.out.print(f"  {error['error_message']}", markup=False)


def _of_record(catalog: Catalog, record_id: int) -> dict[str, Any]:
    entry = catalog.ledger.entries(IdRange(record_id, record_id)).get(record_id)
    row = next(iter(catalog.source.rows_of([record_id])), None)
    errors = catalog.ledger.errors_of(record_id, limit=_MOST_ERRORS)
    if entry is None and row is None and not errors:
        is_there = bool(catalog.source.existing([record_id]))
        raise RecordUnknownError(record_id, catalog.source.name, is_there=is_there)
    known = {} if entry is None else asdict(entry)
    runs = [known.get("claimed_by"), *(error.run_id for error in errors)]
    return {
        "record_id": record_id,
        "status": _status(catalog, row, entry),
        "address": catalog.source.shown_addresses([record_id]).get(record_id),
        "row": {} if row is None else _row(row),
        "ledger": known,
        "runs": list(dict.fromkeys(filter(None, runs))),
        "errors": [{**asdict(error), "occurred_at": f"{error.occurred_at:%Y-%m-%d %H:%M:%S} UTC"} for error in errors],
    }


def _status(catalog: Catalog, row: SourceRow | None, entry: LedgerEntry | None) -> str:
    if row is None:
        return "gone, or not eligible"
    return catalog.status_of(row, entry, None, now=datetime.now(UTC))


def _row(row: SourceRow) -> dict[str, Any]:
    video = row.video
    marks = {"extracted": row.extracted, "embedded": row.embedded}
    own = {"platform": video.platform, "code": video.code, "version": video.content_version or None}
    return {**own, **marks, **{name: console.as_json_value(value) for name, value in video.payload.items()}}


def _points(settings: Settings, record_id: int) -> int | None:
    """How many points the collection in use has of a record; None where there is none yet."""
    if settings.qdrant_url is None and not (settings.home / "qdrant").exists():
        return None
    with open_point_store(settings) as store:
        try:
            store.open_collection(settings.collection_name)
        except CollectionMissingError:
            return None
        return store.count(PointFilter(record_ids=(record_id,)))
