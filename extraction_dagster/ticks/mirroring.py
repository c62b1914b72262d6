"""Keep a mirror equal to the cursor, whatever state it is found in; adopt it when the cursor is lost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from extraction_dagster.errors.ticks import LostCursorError, MirrorError

if TYPE_CHECKING:
    from datetime import datetime

    from extraction_dagster.ticks.mirrors import Mirror


@dataclass(frozen=True, slots=True)
class Notice:
    """Something that a person should read in the log."""

    level: Literal["info", "warning", "error"]
    text: str


def follow(mirror: Mirror, last_processed_id: int | None, *, now: datetime) -> list[Notice]:
    """Make the mirror say what the cursor says; the cursor wins. A mirror that fails never stops a tick."""
    try:
        return _follow(mirror, last_processed_id, now=now)
    except MirrorError as error:
        return [Notice("warning", str(error))]


def _follow(mirror: Mirror, last_processed_id: int | None, *, now: datetime) -> list[Notice]:
    reading, notices = mirror.read(), []
    if reading.state == "corrupt":
        kept = mirror.quarantine(now=now)
        notices.append(Notice("error", f"Checkpoint mirror {mirror.name} was corrupt: {reading.why}. Kept as {kept}."))
    elif reading.last_processed_id == last_processed_id and (reading.state == "ok" or last_processed_id is None):
        return []
    elif _ahead(reading.last_processed_id, last_processed_id):
        text = f"Checkpoint mirror {mirror.name} said {reading.last_processed_id}, ahead of the cursor: rewritten."
        notices.append(Notice("warning", text))
    mirror.write(last_processed_id, now=now)
    return notices


def adopt(mirror: Mirror) -> int | None:
    """The watermark to start from when the cursor store has none.

    Raises:
        LostCursorError: The mirror is corrupt: with both lost, nobody but the operator can say where to start.
        MirrorError: The mirror can't be reached.
    """
    reading = mirror.read()
    if reading.state == "corrupt":
        raise LostCursorError(mirror.name, reading.why)
    return reading.last_processed_id


def _ahead(mirrored: int | None, actual: int | None) -> bool:
    return mirrored is not None and (actual is None or mirrored > actual)
