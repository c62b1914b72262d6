"""What a materialization shows: numbers that Dagster plots, failures as a table; and what makes a range stale."""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import dagster as dg

from extraction_dagster.addresses import capped, scrubbed
from extraction_dagster.records import Failure, fingerprint
from extraction_dagster.settings import Settings
from extraction_dagster.stages.decode.fingerprint import frames_fingerprint
from extraction_dagster.stages.embed.models.registry import embedding_settings_fingerprint

if TYPE_CHECKING:
    from extraction_dagster.stages.catalog.ledger import LedgerEntry

CODE_VERSION_TAG = "dagster/code_version"
MOST_FAILURES_SHOWN = 100
_LONGEST_MESSAGE = 400
_LONGEST_LOOKED_AT = 16_000
# The UI breaks lines between words only: a path would push the table out of the page.
_LONG_WORD = re.compile(r"[^\s'\"]{20,}")
_WORD_END = 18
# The states of a record that has what the asset makes.
_STATES_WITH = {
    "video_frames": {"extracted", "embedded", "done"},
    "frame_embeddings": {"embedded", "done"},
    "qdrant_points": {"done"},
}
_COLUMNS = dg.TableSchema(
    columns=[
        dg.TableColumn("record", "int", description="The row's id"),
        dg.TableColumn("stage", "string", description="The step that failed: catalog, fetch, decode, embed, index"),
        dg.TableColumn("type", "string", description="The error's class; extraction retry --error takes it"),
        dg.TableColumn("message", "string", description="What was got, what was expected"),
    ]
)


def failures_table(failures: Sequence[Failure]) -> dict[str, dg.TableMetadataValue]:
    """The failures as a table, the first ones of many; nothing when there is none."""
    if not failures:
        return {}
    records = [
        dg.TableRecord(
            {
                "record": item.record_id,
                "stage": item.stage,
                "type": item.error_type,
                "message": in_table(item.message.removeprefix(f"Record {item.record_id}: ")),
            }
        )
        for item in failures[:MOST_FAILURES_SHOWN]
    ]
    return {"failures_table": dg.MetadataValue.table(records, schema=_COLUMNS)}


def stopped_table(name: str, entries: Sequence["LedgerEntry"]) -> dict[str, dg.TableMetadataValue]:
    """Records that are failed or parked, as a table of this name; nothing when there is none."""
    if not entries:
        return {}
    return {name: dg.MetadataValue.table([_stopped(entry) for entry in entries[:MOST_FAILURES_SHOWN]])}


def _stopped(entry: "LedgerEntry") -> dg.TableRecord:
    kind, _, message = (entry.last_error or "").partition(": ")
    return dg.TableRecord(
        {
            "record": entry.record_id,
            "state": entry.state,
            "tries": entry.attempts,
            "type": kind,
            "message": in_table(message.removeprefix(f"Record {entry.record_id}: ")),
        }
    )


def as_metadata(numbers: Mapping[str, float], texts: Mapping[str, str]) -> dict[str, dg.MetadataValue]:
    """Numbers as numbers, since a chart needs them so; texts unless they are empty."""
    shown: dict[str, dg.MetadataValue] = {
        name: dg.MetadataValue.int(value) if isinstance(value, int) else dg.MetadataValue.float(value)
        for name, value in numbers.items()
    }
    return {**shown, **{name: dg.MetadataValue.text(text) for name, text in texts.items() if text}}


def in_table(message: str) -> str:
    """A message as a table's cell shows it: no secret, the ends of long words, not too much of it.

    The whole of it is in `extraction errors`.
    """
    text = _LONG_WORD.sub(lambda found: f"…{found[0][-_WORD_END:]}", scrubbed(capped(message, _LONGEST_LOOKED_AT)))
    return text if len(text) <= _LONGEST_MESSAGE else f"{text[:_LONGEST_MESSAGE]}…"


def code_versions(settings: Settings) -> dict[str, str]:
    """The code version of each asset: the settings that decide what it holds, and no other.

    Dagster does not pass staleness downstream; so the versions of vectors and points hold the choice of frames as well.
    """
    frames, embedding = frames_fingerprint(settings), embedding_settings_fingerprint(settings)
    vectors = fingerprint(frames=frames, embedding=embedding)
    return {"video_frames": frames, "frame_embeddings": vectors, "qdrant_points": vectors}


def data_version(asset: str, entries: Mapping[int, "LedgerEntry"]) -> dg.DataVersion:
    """Names what a range of an asset holds: changes with any record, stays when a run finds nothing to do."""
    held = [
        [entry.record_id, entry.content_version, entry.frames_fingerprint, entry.num_frames]
        + ([] if asset == "video_frames" else [entry.embedding_fingerprint])
        for _, entry in sorted(entries.items())
        if entry.state in _STATES_WITH[asset]
    ]
    return dg.DataVersion(fingerprint(asset=asset, records=held))
