"""The limits that a collection's strict mode sets (Qdrant 1.13 and later), and how requests are kept within them.

filter_max_conditions 9     (record 1 or 2 or ... 8, of 4 generations): 1 + 4 * 2 conditions, one call
8 generations would be 17 conditions: two calls with 4 records each
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

from extraction_dagster.stages.index.protocol import MAX_POINTS_PER_CALL

if TYPE_CHECKING:
    from extraction_dagster.stages.index.points import PointFilter

_LISTS = ("generations", "record_ids", "point_ids")
_SHOWN = {
    "upsert_max_batchsize",
    "max_query_limit",
    "filter_max_conditions",
    "condition_max_size",
    "search_allow_exact",
    "search_max_oversampling",
    "max_payload_index_count",
    "max_resident_memory_percent",
    "max_timeout",
    "read_rate_limit",
    "write_rate_limit",
    "max_points_count",
    "max_collection_vector_size_bytes",
    "max_collection_payload_size_bytes",
    "unindexed_filtering_retrieve",
    "unindexed_filtering_update",
}


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """What one request may ask for; None where the server sets no limit.

    Attributes:
        points: Points in one write.
        page: Points in one answer.
        conditions: Conditions of a filter, nested ones included.
        values: Values of one condition.
        seconds: The longest time that a request may ask for.
        exact: Whether exact counts are allowed.
    """

    points: int = MAX_POINTS_PER_CALL
    page: int | None = None
    conditions: int | None = None
    values: int | None = None
    seconds: int | None = None
    exact: bool = True

    @classmethod
    def of(cls, config: Any) -> Self:  # noqa: ANN401 - the client's own record
        """Read a collection's configuration."""
        strict = _strict_mode(config)
        if strict is None:
            return cls()
        writes = (strict.upsert_max_batchsize, strict.write_rate_limit)  # a larger one would be refused for ever
        return cls(
            points=min([MAX_POINTS_PER_CALL, *(limit for limit in writes if limit)]),
            page=strict.max_query_limit,
            conditions=strict.filter_max_conditions,
            values=strict.condition_max_size,
            seconds=strict.max_timeout,
            exact=strict.search_allow_exact is not False,
        )

    def at_most(self, seconds: int) -> int:
        """The time that a request may ask for, when it would like so long."""
        return min(seconds, self.seconds or seconds)

    def parts(self, filters: PointFilter | None) -> list[PointFilter | None]:
        """Filters that select the same points together, none twice, each small enough where that can be."""
        if filters is None:
            return [None]
        size = self.values
        if filters.generations is not None and self.conditions is not None:
            fixed = sum(
                part is not None
                for part in (filters.record_ids, filters.point_ids, filters.platform, filters.record_id_range)
            )
            fixed += bool(filters.exclude_record_ids) + bool(filters.created_from or filters.created_before)
            size = min(size or len(filters.generations), max(1, (self.conditions - fixed - 1) // 2))
        return list(_cut(filters, size))


def halves(filters: PointFilter | None) -> list[PointFilter | None]:
    """Two filters that select the same points together; none where it can't be cut."""
    longest = max(len(getattr(filters, name, None) or ()) for name in _LISTS)
    return list(_cut(filters, -(-longest // 2))) if filters is not None and longest > 1 else []


def shown(config: Any) -> str:  # noqa: ANN401 - the client's own record
    """The limits that concern us, by the server's names."""
    strict = _strict_mode(config)
    if strict is None:
        return "no strict mode"
    found = ((name, getattr(strict, name, None)) for name in sorted(_SHOWN))
    return "strict mode: " + (", ".join(f"{name} {value}" for name, value in found if value is not None) or "no limit")


def _strict_mode(config: Any) -> Any | None:  # noqa: ANN401 - the client's own records
    strict = getattr(config, "strict_mode_config", None)
    return strict if strict is not None and strict.enabled else None


def _cut(filters: PointFilter, size: int | None) -> list[PointFilter | None]:
    choices: list[list[dict[str, Any]]] = []
    for name in _LISTS:
        values = getattr(filters, name)
        if size is not None and values is not None and len(values) > size:
            items = sorted(values.items(), key=lambda item: (item[1], item[0])) if name == "generations" else [*values]
            parts = (items[start : start + size] for start in range(0, len(items), size))
            choices.append([{name: dict(part) if name == "generations" else tuple(part)} for part in parts])
    merged = ({key: value for part in chosen for key, value in part.items()} for chosen in itertools.product(*choices))
    return [replace(filters, **fields) for fields in merged]
