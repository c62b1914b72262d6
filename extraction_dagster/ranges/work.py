"""What each step of a range begins with, fixed for as long as it takes; and what it reports at the end.

Settings can change at any moment: `.env` is a file. So they are read once, before `open_range`, and with them all that
follows from them: the fingerprints, and the stores that are named by the fingerprints. What a step stores and what it
marks always agree.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any

from extraction_dagster.errors.catalog import EmptyRangeError
from extraction_dagster.records import Failure
from extraction_dagster.shards.embedding_store import EmbeddingStore
from extraction_dagster.shards.frame_store import FrameStore
from extraction_dagster.shards.place import Source
from extraction_dagster.shards.store import Copy, S, newest_copies
from extraction_dagster.stages.catalog.catalog import Fingerprints, open_catalog
from extraction_dagster.stages.catalog.error_retention import prune_errors
from extraction_dagster.stages.decode.fingerprint import frames_fingerprint
from extraction_dagster.stages.embed.models.registry import embedding_fingerprint

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from extraction_dagster.records import IdRange
    from extraction_dagster.settings import Settings
    from extraction_dagster.shards.store import ShardRecord, ShardStore
    from extraction_dagster.stages.catalog.catalog import Catalog, PlannedRow
    from extraction_dagster.stages.catalog.ledger import LedgerEntry

_log = logging.getLogger(__name__)  # managed by Dagster: these lines are in the run's events too
_MOST_TOLD, _MOST_KINDS = 50, 5


@dataclass(frozen=True, slots=True)
class RangeWork:
    """A range that a step works on.

    Attributes:
        settings: Those with which the step began.
        fingerprints: What frames and vectors are made with under these settings.
        catalog: Open.
        frame_store: The frames of this fingerprint.
        embedding_store: The vectors of this fingerprint, made of these frames.
        id_range: The partition.
        plan: Its rows above the operator's floor, as they were when the step began.
        run_id: Whose claims hold; for the errors table.
        force: Whether rows that are done are embedded and indexed again.
        retries: Whether a forced run goes on with what an earlier one made.
    """

    settings: Settings
    fingerprints: Fingerprints
    catalog: Catalog
    frame_store: FrameStore
    embedding_store: EmbeddingStore
    id_range: IdRange
    plan: Mapping[int, PlannedRow]
    run_id: str
    force: bool
    retries: bool = False
    told: _Told = field(default_factory=lambda: _Told(), compare=False, repr=False)  # noqa: PLW0108 - it comes below

    @property
    def pending(self) -> dict[int, PlannedRow]:
        """The rows to be processed."""
        return {
            record_id: planned
            for record_id, planned in self.plan.items()
            if planned.status == "todo" and planned.row.problem is None and self._is_ours(planned)
        }

    @property
    def selected(self) -> dict[int, PlannedRow]:
        """The pending rows, and in a forced run those as well that this project has done."""
        statuses = {"todo", "done"} if self.force else {"todo"}
        return {
            record_id: planned
            for record_id, planned in self.plan.items()
            if planned.status in statuses
            and (planned.entry is not None or planned.status == "todo")
            and planned.row.problem is None
            and self._is_ours(planned)
        }

    def _is_ours(self, planned: PlannedRow) -> bool:
        """Whether no other run has claimed a row since this one did; a caller without a run takes what it finds."""
        return not self.run_id or planned.entry is None or planned.entry.claimed_by in {None, self.run_id}

    @property
    def unreadable(self) -> list[Failure]:
        """Why rows that were to be processed are not: a value of theirs can't be read."""
        return [
            Failure(record_id, planned.content_version, "catalog", type(problem).__name__, str(problem))
            for record_id, planned in self.plan.items()
            if planned.status == "todo" and (problem := planned.row.problem) is not None
        ]

    def entries(self) -> dict[int, LedgerEntry]:
        """The ledger of the whole range, as it is now."""
        return self.catalog.ledger.entries(self.id_range)

    def stored(self, store: ShardStore[S], rows: Mapping[int, PlannedRow]) -> dict[int, Copy[S]]:
        """The newest copy of each of these rows, where it is of the row's present version and address.

        Ranges may have been cut differently when it was made: folders of other ranges are looked at as well, but only
        for rows of which the ledger says that they have a copy, and which this range's folder lacks.
        """
        own = store.shards(self.id_range)
        found = _of_rows(own, rows)
        lacking = [key for key, planned in rows.items() if key not in found and self._was_stored(store, planned)]
        if not lacking:
            return found
        others = [
            store.shards(partition)
            for partition in store.partitions()
            if partition != self.id_range and any(key in partition for key in lacking)
        ]
        return _of_rows(chain(own, *others), rows)

    def _was_stored(self, store: ShardStore[Any], planned: PlannedRow) -> bool:
        """Whether the ledger says that a row, as it is now, has frames, or vectors, of today's settings."""
        entry = planned.entry
        if entry is None or entry.content_version != planned.content_version:
            return False
        if entry.address not in {None, planned.address} or entry.frames_fingerprint != self.fingerprints.frames:
            return False
        return store is self.frame_store or entry.embedding_fingerprint == self.fingerprints.embedding

    def record_failures(self, failures: Iterable[Failure]) -> None:
        """Write failures to the errors table, and log each with the state that its record is in now.

        Each of the first ones of a step, that is: a table of dead links would fill Dagster's event log otherwise.
        """
        failures = list(failures)
        if not failures:
            return
        states = self.catalog.record_failures(self.plan, failures, run_id=self.run_id)
        for failure in failures:
            if failure.record_id in states:  # else others have claimed it since: the catalog has said so
                self.told.tell(failure, states[failure.record_id])


class _Told:
    """The failures of a step as they are logged: so many one by one, the others together at the end."""

    def __init__(self) -> None:
        self.number = 0
        self._others = Counter[str]()

    def tell(self, failure: Failure, state: str) -> None:
        self.number += 1
        if self.number <= _MOST_TOLD:
            _log.warning("%s (%s)", failure.message, state)
        else:
            self._others[failure.error_type] += 1

    def sum_up(self) -> None:
        if self._others:
            kinds = ", ".join(f"{number} {name}" for name, number in self._others.most_common(_MOST_KINDS))
            more = ", …" if len(self._others) > _MOST_KINDS else ""
            said = "%d more records failed (%s%s); 'extraction errors' lists them"
            _log.warning(said, self._others.total(), kinds, more)


@contextmanager
def open_range(  # noqa: PLR0913 - the range, and what a run may want otherwise, each by name
    settings: Settings,
    id_range: IdRange,
    *,
    within: IdRange | None = None,
    begins: bool = False,
    claims: bool = False,
    force: bool = False,
    retries: bool = False,
    fingerprints: Fingerprints | None = None,
    run_id: str = "",
) -> Iterator[RangeWork]:
    """Open the catalog and the stores of a range, and plan what is to be done with its rows.

    Args:
        settings: Read once, for the whole step.
        id_range: The partition.
        within: The part of it that the operator's floor leaves; all of it by default.
        begins: It is the first step: rows that are asked for again get their new revision, with `force` every row.
            What is to be done is claimed, and rows that can't be read are written down as failed.
        claims: It is the first step of a run that begins with stored frames or vectors: as above, without revisions.
        force: Do rows again that are done.
        retries: A forced run goes on where an earlier one broke off.
        fingerprints: Those of the settings, where the caller has them already.
        run_id: Claims the rows, and stands beside each failure in the errors table. The steps of a run share it; one
            that has none works on rows whoever has claimed them since.

    Raises:
        EmptyRangeError: The first step finds no eligible row.
        EmbeddingModelError, ModelFilesError: The settings' model can't be used; nothing was opened.
        OtherSourceError: The stored frames or vectors are of another source table; nothing was planned.
    """
    made_with = fingerprints or fingerprints_of(settings)
    planned = within or id_range
    with open_catalog(settings) as catalog:
        frames, vectors = open_stores(settings, made_with, Source(catalog.source.identity, catalog.source.name))
        if begins or claims:
            plan = catalog.begin(planned, made_with, force=force, revises=begins, retries=retries, run_id=run_id)
        else:
            plan = catalog.plan(planned, made_with)
        if begins and not plan:
            raise EmptyRangeError(id_range.partition_key, catalog.source.name, catalog.source.extent())
        work = RangeWork(
            settings=settings,
            fingerprints=made_with,
            catalog=catalog,
            frame_store=frames,
            embedding_store=vectors,
            id_range=id_range,
            plan=plan,
            run_id=run_id,
            force=force,
            retries=retries,
        )
        try:
            if begins or claims:
                work.record_failures(work.unreadable)
            yield work
        finally:
            work.told.sum_up()
        if work.told.number:  # what adds errors removes old ones
            prune_errors(catalog.state_engine, keep_days=settings.keep_errors_days)


def open_stores(settings: Settings, made_with: Fingerprints, source: Source) -> tuple[FrameStore, EmbeddingStore]:
    """The stored frames and vectors of some fingerprints, once both roots are seen to hold the source's.

    Raises:
        OtherSourceError: One holds another's; nothing else of it was read.
    """
    frames = FrameStore(settings.resolved_frames_uri, made_with.frames, source=source)
    vectors = EmbeddingStore(settings.resolved_embeddings_uri, vectors_fingerprint(made_with), source=source)
    frames.require_source()
    vectors.require_source()
    return frames, vectors


def fingerprints_of(settings: Settings) -> Fingerprints:
    """What frames and vectors are made with under these settings; reads the model's files."""
    return Fingerprints(frames=frames_fingerprint(settings), embedding=embedding_fingerprint(settings))


def vectors_fingerprint(made_with: Fingerprints) -> str:
    """Names all that stored vectors depend on: how their frames were made, and the model."""
    return f"{made_with.frames}-{made_with.embedding}"


@dataclass(slots=True)
class Report:
    """What a step did.

    Attributes:
        numbers: To be plotted.
        failures: Records that gave nothing.
        contact_sheet: Thumbnails of what was decoded, as Markdown, if there are any.
        num_points: Verified points by record.
        unnormalised: Stored vectors whose length is not 1.
        verified: Points of the whole range, counted in the store.
    """

    numbers: dict[str, float] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    contact_sheet: str | None = None
    num_points: dict[int, int] = field(default_factory=dict)
    unnormalised: int = 0
    verified: int = 0


class Stopwatch:
    """Wall and CPU seconds of a step, phase by phase; CPU seconds of worker processes are added by hand."""

    def __init__(self) -> None:
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

        The phases that this process spent itself are its `own`; the rest of its time is the phase `other`.
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


def _of_rows(shards: Iterable[S], rows: Mapping[int, PlannedRow]) -> dict[int, Copy[S]]:
    """The copies that count, of those of these rows that are of the row's present file."""
    return {key: copy for key, copy in newest_copies(shards).items() if key in rows and _is_of(copy.record, rows[key])}


def _is_of(record: ShardRecord, planned: PlannedRow) -> bool:
    """Whether a copy is of a row's present file; one that an earlier release made says no address."""
    if record.content_version != planned.content_version:
        return False
    known = planned.entry.address if planned.entry else None
    return record.address == planned.address if record.address else known in {None, "", planned.address}


def was_done(planned: PlannedRow) -> bool:
    """Whether a row was done in its present version and from its present address, with whatever settings."""
    entry = planned.entry
    if entry is None or entry.state != "done" or entry.source_version != planned.source_version:
        return False
    return entry.address is None or planned.address in {"", entry.address}
