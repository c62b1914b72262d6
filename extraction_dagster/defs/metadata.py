"""What a materialization shows: numbers that Dagster plots over time, and failures as a table."""

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import dagster as dg

from extraction_dagster.addresses import scrubbed
from extraction_dagster.records import Failure

if TYPE_CHECKING:
    from extraction_dagster.stages.catalog.ledger import LedgerEntry

MOST_FAILURES_SHOWN = 100
_LONGEST_MESSAGE = 400
# The UI breaks lines between words only: a path would push the table out of the page.
_LONG_WORD = re.compile(r"[^\s'\"]{20,}")
_WORD_END = 18
_COLUMNS = dg.TableSchema(
    columns=[
        dg.TableColumn("record", "int", description="The row's id"),
        dg.TableColumn("stage", "string", description="The step that failed: catalog, fetch, decode, embed, index"),
        dg.TableColumn("type", "string", description="The error's class; extraction retry --error takes it"),
        dg.TableColumn("message", "string", description="What was got, what was expected"),
    ]
)


class Stopwatch:
    """Wall and CPU seconds of a step, phase by phase; CPU seconds of worker processes are added by hand."""

    def __init__(self) -> None:
        """Start."""
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        self._phases: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the CPU seconds of this process towards a phase."""
        before = time.process_time()
        try:
            yield
        finally:
            self.add(name, time.process_time() - before)

    def add(self, name: str, cpu_seconds: float) -> None:
        """Count CPU seconds towards a phase."""
        self._phases[name] = self._phases.get(name, 0.0) + cpu_seconds

    def numbers(self, *, own: Sequence[str] = (), num_frames: int = 0) -> dict[str, float]:
        """`seconds`, `cpu_seconds`, one `cpu_seconds_<phase>` each, and `frames_per_second` when there are frames.

        Args:
            own: The phases that this process spent itself; the rest of its time is the phase `other`.
            num_frames: Frames of this run.
        """
        wall, process = time.perf_counter() - self._wall, time.process_time() - self._cpu
        other = process - sum(self._phases.get(name, 0.0) for name in own)
        phases = {**self._phases, "other": max(other, 0.0)}
        rate = {"frames_per_second": round(num_frames / wall, 3)} if num_frames and wall > 0 else {}
        return {
            "seconds": round(wall, 3),
            "cpu_seconds": round(sum(phases.values()), 3),
            **{f"cpu_seconds_{name}": round(seconds, 3) for name, seconds in phases.items()},
            **rate,
        }


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
    """Numbers as numbers, for a chart needs them so; texts that say something."""
    shown: dict[str, dg.MetadataValue] = {
        name: dg.MetadataValue.int(value) if isinstance(value, int) else dg.MetadataValue.float(value)
        for name, value in numbers.items()
    }
    return {**shown, **{name: dg.MetadataValue.text(text) for name, text in texts.items() if text}}


def in_table(message: str) -> str:
    """A message as a table's cell shows it: no secret, the ends of long words, not too much of it.

    The whole of it is in `extraction errors`.
    """
    text = _LONG_WORD.sub(lambda found: f"…{found[0][-_WORD_END:]}", scrubbed(message))
    return text if len(text) <= _LONGEST_MESSAGE else f"{text[:_LONGEST_MESSAGE]}…"
