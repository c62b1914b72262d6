"""Which points: one description, translated to each engine's own filter."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from extraction_dagster.errors.base import RecordShapeError
from extraction_dagster.stages.index.points import rfc3339

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping
    from datetime import datetime

    from extraction_dagster.records import IdRange


@dataclass(frozen=True, slots=True)
class PointFilter:
    """Which points; every condition that is given must hold.

    Attributes:
        record_ids: Points of these records.
        exclude_record_ids: No points of these records.
        record_id_range: Points of records in this range.
        platform: Points of this platform.
        created_from: Points written at or after this moment.
        created_before: Points written before this moment.
        point_ids: These points.
        generations: Points of these records that carry their record's generation given here.
        stale: Turn `generations` round: points of these records that carry any other generation.
    """

    record_ids: Collection[int] | None = None
    exclude_record_ids: Collection[int] = ()
    record_id_range: IdRange | None = None
    platform: str | None = None
    created_from: datetime | None = None
    created_before: datetime | None = None
    point_ids: Collection[str] | None = None
    generations: Mapping[int, str] | None = None
    stale: bool = False

    def __post_init__(self) -> None:
        """Refuse an empty list: engines differ in whether it means none or all."""
        for name in ("record_ids", "point_ids", "generations"):
            if getattr(self, name) is not None and len(getattr(self, name)) == 0:
                raise RecordShapeError(record="PointFilter", why=f"{name} must not be empty", shapes="length 0")

    @classmethod
    def current(cls, generations: Mapping[int, str]) -> PointFilter:
        """Points of these records that carry their record's generation."""
        return cls(generations=generations)

    @classmethod
    def stale_points(cls, generations: Mapping[int, str]) -> PointFilter:
        """Points of these records that carry any other generation."""
        return cls(generations=generations, stale=True)

    @property
    def names_points(self) -> bool:
        """Whether records or points are named at all: deleting by anything wider is refused."""
        return any(
            part is not None for part in (self.record_ids, self.record_id_range, self.point_ids, self.generations)
        )


@dataclass(frozen=True, slots=True)
class Dialect:
    """An engine's own classes for filters; `qdrant_edge` and `qdrant_client.models` name them alike."""

    filter: Callable[..., Any]
    field: Callable[..., Any]
    match_any: Callable[..., Any]
    match_value: Callable[..., Any]
    number_range: Callable[..., Any]
    datetime_range: Callable[..., Any]
    has_ids: Callable[[Collection[str]], Any]


def translate(filters: PointFilter | None, dialect: Dialect) -> Any | None:  # noqa: ANN401 - an engine's own filter
    """The engine's filter, or None for every point."""
    if filters is None:
        return None
    must: list[Any] = []
    must_not: list[Any] = []
    if filters.record_ids is not None:
        must.append(_records(filters.record_ids, dialect))
    if filters.exclude_record_ids:
        must_not.append(_records(filters.exclude_record_ids, dialect))
    if filters.point_ids is not None:
        must.append(dialect.has_ids(filters.point_ids))
    if filters.platform is not None:
        must.append(dialect.field(key="platform", match=dialect.match_value(value=filters.platform)))
    if filters.created_from is not None or filters.created_before is not None:
        must.append(_created(filters, dialect))
    if filters.record_id_range is not None:
        _add_range(filters.record_id_range, dialect, must, must_not)
    if filters.generations is not None:
        _add_generations(filters.generations, dialect, must, must_not if filters.stale else None)
    return dialect.filter(must=must or None, must_not=must_not or None) if must or must_not else None


def _records(record_ids: Collection[int], dialect: Dialect) -> Any:  # noqa: ANN401 - an engine's own condition
    return dialect.field(key="record_id", match=dialect.match_any(any=sorted(set(record_ids))))


def _created(filters: PointFilter, dialect: Dialect) -> Any:  # noqa: ANN401 - an engine's own condition
    bounds = {
        "gte": rfc3339(filters.created_from) if filters.created_from else None,
        "lt": rfc3339(filters.created_before) if filters.created_before else None,
    }
    return dialect.field(key="created_at", range=dialect.datetime_range(**bounds))


def _add_generations(
    generations: Mapping[int, str], dialect: Dialect, must: list[Any], must_not: list[Any] | None
) -> None:
    """Records of one generation share a condition.

    `{1: "a", 2: "a", 3: "b"}` gives (record 1 or 2, and generation a) or (record 3, and generation b); turned round,
    record 1, 2 or 3, and neither of those two.
    """
    by_generation: dict[str, list[int]] = defaultdict(list)
    for record_id, name in generations.items():
        by_generation[name].append(record_id)
    groups = [
        dialect.filter(
            must=[
                _records(record_ids, dialect),
                dialect.field(key="generation", match=dialect.match_value(value=name)),
            ]
        )
        for name, record_ids in by_generation.items()
    ]
    must.append(_records(generations, dialect))
    if must_not is None:
        must.append(dialect.filter(should=groups))
    else:
        must_not.extend(groups)


def _add_range(ids: IdRange, dialect: Dialect, must: list[Any], must_not: list[Any]) -> None:
    """An engine's range is of float64, which can't tell ids above 2**53 apart.

    The range is widened to the next float64 at each end, and the few ids that come with it are excluded by name:
    from 2**60 + 1 on is "from 2**60 on, but not 2**60 itself" (at most 3,072 ids at an end, near 2**63).
    """
    low, high = _float_at_most(ids.first_id), -_float_at_most(-ids.last_id)
    must.append(dialect.field(key="record_id", range=dialect.number_range(gte=low, lte=high)))
    extra = [
        *range(int(low) - _slack(low), ids.first_id),
        *range(ids.last_id + 1, int(high) + _slack(high) + 1),
    ]
    extra = [record_id for record_id in extra if -(2**63) <= record_id < 2**63]
    if extra:
        must_not.append(_records(extra, dialect))


def _float_at_most(value: int) -> float:
    number = float(value)
    return number if int(number) <= value else math.nextafter(number, -math.inf)


def _slack(bound: float) -> int:
    """Ids beyond the bound that still round to it."""
    return int(math.ulp(bound)) if math.ulp(bound) >= 2 else 0  # noqa: PLR2004 - below, float64 holds every integer
