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

    from extraction_dagster.watch.figures import Census, Figures, InstanceFigures, MirrorFigures, TableFigures

CONTENT_TYPE = openmetrics.CONTENT_TYPE_LATEST
_MIRROR_STATES = ("ok", "missing", "behind", "ahead", "corrupt", "unreachable")


class Exposition:
    """Figures as Prometheus' client takes them."""

    def __init__(self, figures: Figures | None, census: Census | None = None) -> None:
        """Show these; None for what could not be taken in time."""
        self._figures, self._census = figures, census

    def collect(self) -> Iterator[Metric]:
        """Every metric family that there is a figure for."""
        figures, census = self._figures, self._census
        yield _info("extraction_build", "The version of the package.", {"version": __version__})
        parts = dict(figures.parts) if figures else {}
        if census is not None:
            parts["collection"] = census.collection_is_up
        is_up = figures is not None and all(parts.values())
        yield _gauge("extraction_up", "Whether everything could be read; 0 says that something is down.", float(is_up))
        if figures is None:
            return
        readable = {part: float(up) for part, up in sorted(parts.items())}
        yield _by("extraction_part_up", "Whether a part could be read.", "part", readable)
        yield _gauge("extraction_scrape_duration_seconds", "Time that these figures took.", figures.seconds)
        if figures.table is not None:
            yield from _of_table(figures.table, census)
        if figures.instance is not None:
            yield from _of_instance(figures.instance)
        if figures.mirror is not None:
            yield from _of_mirror(figures.mirror)
        if census is not None:
            yield from _of_census(census)

    def openmetrics(self) -> str:
        """The OpenMetrics text."""
        text: bytes = openmetrics.generate_latest(self)  # type: ignore[no-untyped-call]  # the client's own function
        return text.decode()

    def classic(self) -> str:
        """The text format that was before OpenMetrics: the one that node_exporter reads from files."""
        text: bytes = exposition.generate_latest(self)
        return text.decode()

    def negotiated(self, accept: str) -> tuple[bytes, str]:
        """The text in the form that an Accept header asks for, and its content type."""
        encode, content_type = exposition.choose_encoder(accept)
        return encode(self), content_type


def _of_table(table: TableFigures, census: Census | None) -> Iterator[Metric]:
    yield from _known(
        (
            "extraction_watermark_id",
            "The last processed ID: every eligible row up to it is done or parked.",
            table.last_processed_id,
        ),
        ("extraction_frontier_id", "The end of the last range that was handed out.", table.frontier_id),
        ("extraction_floor_id", "The operator's floor: rows at or below are left alone.", table.floor_id),
        ("extraction_newest_id", "The greatest eligible id.", table.newest_id),
    )
    lag = table.lag_rows if table.lag_rows is not None else census.lag_rows if census else None
    yield from _known(("extraction_lag_rows", "Eligible rows above the watermark.", lag))
    yield _gauge("extraction_due_rows", "Rows above the watermark that may be processed now.", table.due_rows)
    yield _gauge("extraction_waiting_rows", "Failed rows that wait for their next try.", table.waiting_rows)
    yield _gauge(
        "extraction_watermark_moved_timestamp_seconds",
        "When something was last seen to move, or nothing was left to do.",
        table.moved_at,
    )
    yield _gauge(
        "extraction_watermark_stalled_seconds",
        "Time since anything last moved while rows were due; 0 when none is.",
        table.stalled_seconds,
    )
    rows = {**(census.rows if census else {}), **table.stopped}
    yield _by("extraction_rows", "Eligible rows; done is the number of videos.", "state", rows)


def _of_instance(instance: InstanceFigures) -> Iterator[Metric]:
    yield _by("extraction_runs", "Runs that have not ended.", "status", instance.runs)
    yield _by("extraction_recent_runs", "Runs that ended within the last hour.", "status", instance.ended_runs)
    yield from _known(
        (
            "extraction_sensor_last_tick_timestamp_seconds",
            "When a daemon last began a tick of the sensor.",
            instance.last_tick_at,
        )
    )
    yield _gauge("extraction_sensor_enabled", "Whether nobody has stopped the sensor.", instance.is_switched_on)
    yield _by("extraction_daemon_up", "Whether a daemon of Dagster's says that it lives.", "daemon", instance.daemons)
    for name, rate in sorted(instance.rates.items()):
        help_text = f"The {name} made in the last quarter of an hour, a second."
        yield _gauge(f"extraction_{name}_per_second", help_text, rate)


def _of_mirror(mirror: MirrorFigures) -> Iterator[Metric]:
    states = {state: state == mirror.state for state in _MIRROR_STATES}
    yield _by(
        "extraction_mirror_state", "The mirror of the checkpoint beside the cursor: 1 for its state.", "state", states
    )
    yield from _known(("extraction_mirror_watermark_id", "What the mirror says.", mirror.last_processed_id))


def _of_census(census: Census) -> Iterator[Metric]:
    yield _gauge("extraction_frames", "Stored frames of the rows that are done.", census.frames)
    yield _gauge("extraction_points", "Verified points of the rows that are done.", census.points)
    errors = CounterMetricFamily(
        "extraction_errors", "Errors of records, those that later went well included.", labels=("stage", "type")
    )
    for labels, number in sorted(census.errors.items()):
        errors.add_metric(labels, number)
    yield errors
    yield from _known(
        ("extraction_collection_points", "Points in the collection in use.", census.collection_points),
        (
            "extraction_collection_counted_timestamp_seconds",
            "When the collection was last counted.",
            census.collection_counted_at,
        ),
        ("extraction_census_timestamp_seconds", "When every row was last counted.", census.taken_at),
        ("extraction_census_duration_seconds", "Time that counting every row took.", census.seconds),
    )


def _gauge(name: str, help_text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, help_text, value=float(value), unit=_unit(name))


def _by(name: str, help_text: str, label: str, values: Mapping[str, float]) -> Metric:
    family = GaugeMetricFamily(name, help_text, labels=(label,), unit=_unit(name))
    for key, value in values.items():
        family.add_metric((key,), float(value))
    return family


def _info(name: str, help_text: str, values: Mapping[str, str]) -> Metric:
    return InfoMetricFamily(name, help_text, value=dict(values))


def _known(*metrics: tuple[str, str, float | None]) -> Iterable[Metric]:
    """Those that have a value: a metric without one is left out, not shown as zero."""
    return (_gauge(name, help_text, value) for name, help_text, value in metrics if value is not None)


def _unit(name: str) -> str:
    return "seconds" if name.endswith("_seconds") else ""
