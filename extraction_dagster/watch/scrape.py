"""A scrape: the newest figures and the newest census, each taken by a thread of its own.

A database that does not answer, or a census of a hundred million rows, holds up nobody who asks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from extraction_dagster.watch.exposition import Exposition
from extraction_dagster.watch.latest import Latest
from extraction_dagster.watch.meter import Meter, census_seconds

if TYPE_CHECKING:
    from collections.abc import Callable

    from extraction_dagster.settings import Settings
    from extraction_dagster.watch.figures import Census, Figures, InstanceFigures

_CACHE_SECONDS = 5.0
_SCRAPE_SECONDS = 5.0  # Prometheus gives up after 10
_FIRST_CENSUS_SECONDS = 2.0
_PATIENT_SECONDS = 60.0


class Scrape:
    """Answers scrapes, however many come at once."""

    def __init__(self, settings: Settings, read_instance: Callable[[], InstanceFigures]) -> None:
        """Nothing is opened before the first scrape.

        Args:
            settings: Where everything is.
            read_instance: Asks Dagster's instance.
        """
        # Two meters: what one thread closes after a fault must not be in another's hands.
        self._meter, self._counter = Meter(settings, read_instance), Meter(settings, read_instance)
        self._after_id: int | None = None
        self._figures: Latest[Figures] = Latest(self._meter.measure, fresh_seconds=lambda _: _CACHE_SECONDS)
        self._census: Latest[Census] = Latest(self._count, fresh_seconds=census_seconds)

    def close(self) -> None:
        """Give the connections back."""
        self._meter.close()
        self._counter.close()

    def now(self) -> Exposition:
        """Everything, waited for: for a file or a terminal."""
        return self._expose(_PATIENT_SECONDS, _PATIENT_SECONDS)

    def soon(self) -> Exposition:
        """What there is within seconds: for an endpoint. The census before is shown while one is taken."""
        return self._expose(_SCRAPE_SECONDS, _FIRST_CENSUS_SECONDS)

    def _expose(self, seconds: float, census_seconds: float) -> Exposition:
        figures, is_fresh = self._figures.get(wait_seconds=seconds)
        if figures is None or not is_fresh:
            return Exposition(None)
        if not figures.parts["table"]:
            return Exposition(figures)
        if figures.table is not None:
            bounds = (figures.table.last_processed_id, figures.table.floor_id)
            self._after_id = max((bound for bound in bounds if bound is not None), default=None)
        known, _ = self._census.get(wait_seconds=0.0)
        census = known or self._census.get(wait_seconds=census_seconds)[0]
        return Exposition(figures, census)

    def _count(self) -> Census:
        try:
            return self._counter.count(self._after_id)
        except BaseException:
            self._counter.close()
            raise
