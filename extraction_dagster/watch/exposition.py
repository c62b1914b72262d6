"""Figures under their Prometheus names: the only place where a metric is named, described and given a unit.

Prometheus' conventions: a prefix, base units in the name, `_total` for what only grows; moments as timestamps, so that
`time() - x` is an age however old the file or the scrape is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import exposition
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.openmetrics import exposition as openmetrics

from extraction_dagster import __version__

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from prometheus_client.metrics_core import Metric

    from extraction_dagster.watch.meter import Census, Figures, InstanceFigures
    from extraction_dagster.watch.progress import Progress

_PREFIX = "extraction_"  # of every metric
_MIRROR_STATES = ("ok", "missing", "behind", "ahead", "corrupt", "unreachable")


class Exposition:
    """Figures as Prometheus' client takes them; None for what could not be taken in time."""

    def __init__(self, figures: Figures | None, census: Census | None = None) -> None:
        self._figures, self._census = figures, census

    def collect(self) -> Iterator[Metric]:
        """Every metric family that there is a figure for."""
        figures, census = self._figures, self._census
        yield InfoMetricFamily("extraction_build", "The version of the package.", value={"version": __version__})
        parts = dict(figures.parts) if figures else {}
        if census is not None:
            parts["collection"] = census.collection_is_up
        is_up = figures is not None and all(parts.values())
        yield _gauge("up", "Whether everything could be read; 0 says that something is down.", float(is_up))
        if figures is None:
            return
        yield _by("part_up", "Whether a part could be read.", "part", dict(sorted(parts.items())))
        yield _gauge("scrape_duration_seconds", "Time that these figures took.", figures.seconds)
        if figures.progress is not None:
            yield from _of_progress(figures.progress, census)
        if figures.instance is not None:
            yield from _of_instance(figures.instance)
        if figures.mirror is not None:
            about = "The mirror of the checkpoint beside the cursor: 1 for its state."
            yield _by(
                "mirror_state", about, "state", {state: state == figures.mirror.state for state in _MIRROR_STATES}
            )
            yield from _known(("mirror_watermark_id", "What the mirror says.", figures.mirror.last_processed_id))
        if census is not None:
            yield from _of_census(census)

    def openmetrics(self) -> str:
        """The OpenMetrics text."""
        return str(openmetrics.generate_latest(self), "utf-8")  # type: ignore[no-untyped-call]  # the client's own

    def classic(self) -> str:
        """The text format that was before OpenMetrics: the one that node_exporter reads from files."""
        return str(exposition.generate_latest(self), "utf-8")

    def negotiated(self, accept: str) -> tuple[bytes, str]:
        """The text in the form that an Accept header asks for, and its content type."""
        encode, content_type = exposition.choose_encoder(accept)
        return encode(self), content_type


def _of_progress(progress: Progress, census: Census | None) -> Iterator[Metric]:
    lag = progress.lag_rows if progress.is_lag_counted else census.lag_rows if census else None
    moved_at, stalled = progress.moved_at.timestamp(), progress.stalled_seconds
    stopped = {"failed": progress.failed_records, "parked": progress.parked_records}
    yield from _known(
        ("watermark_id", "The last processed ID: rows up to it are done or parked.", progress.last_processed_id),
        ("frontier_id", "The end of the last range that was handed out.", progress.frontier_id),
        ("floor_id", "The operator's floor: rows at or below are left alone.", progress.floor_id),
        ("newest_id", "The greatest eligible id.", progress.newest_id),
        ("lag_rows", "Eligible rows above the watermark and the floor, not done, not parked.", lag),
        ("due_rows", "Pending rows above the watermark and the floor, up to 20,000.", progress.pending_rows),
        ("waiting_rows", "Failed rows that wait for their next try.", progress.waiting_rows),
        ("watermark_moved_timestamp_seconds", "When something last moved, or nothing was pending.", moved_at),
        ("watermark_stalled_seconds", "Time since then while rows were pending; 0 when none is.", stalled),
    )
    yield _by(
        "rows", "Eligible rows; done is the number of videos.", "state", {**(census.rows if census else {}), **stopped}
    )


def _of_instance(instance: InstanceFigures) -> Iterator[Metric]:
    yield _by("runs", "Runs that have not ended.", "status", instance.runs)
    yield _by("recent_runs", "Runs that ended within the last hour.", "status", instance.ended_runs)
    yield _by("daemon_up", "Whether a daemon of Dagster's has given a heartbeat lately.", "daemon", instance.daemons)
    began = "When a daemon last began a tick of the sensor."
    yield from _known(
        ("sensor_last_tick_timestamp_seconds", began, instance.last_tick_at),
        ("sensor_enabled", "Whether the sensor is on: it was not stopped.", instance.is_switched_on),
    )
    for name in ("frames", "points", "videos"):
        help_text = f"The {name} made a second by the newest runs; 0 when none has ended lately."
        yield _gauge(f"{name}_per_second", help_text, instance.rates.get(name, 0.0))


def _of_census(census: Census) -> Iterator[Metric]:
    errors = CounterMetricFamily(
        "extraction_errors", "Errors of records, those that later went well included.", labels=("stage", "type")
    )
    for labels, number in sorted(census.errors.items()):
        errors.add_metric(labels, number)
    yield errors
    counted_at = census.collection_counted_at
    yield from _known(
        ("frames", "Stored frames of the rows that are done.", census.frames),
        ("points", "Verified points of the rows that are done.", census.points),
        ("collection_points", "Points in the collection in use.", census.collection_points),
        ("collection_counted_timestamp_seconds", "When the collection was last counted.", counted_at),
        ("census_timestamp_seconds", "When every row was last counted.", census.taken_at),
        ("census_duration_seconds", "Time that counting every row took.", census.seconds),
    )


def _gauge(name: str, help_text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"{_PREFIX}{name}", help_text, value=float(value), unit=_unit(name))


def _by(name: str, help_text: str, label: str, values: Mapping[str, float]) -> Metric:
    family = GaugeMetricFamily(f"{_PREFIX}{name}", help_text, labels=(label,), unit=_unit(name))
    for key, value in values.items():
        family.add_metric((key,), float(value))
    return family


def _known(*metrics: tuple[str, str, float | None]) -> Iterable[Metric]:
    """Those that have a value: a metric without one is left out, not shown as zero."""
    return (_gauge(name, help_text, value) for name, help_text, value in metrics if value is not None)


def _unit(name: str) -> str:
    return "seconds" if name.endswith("_seconds") else ""
