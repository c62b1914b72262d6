"""JSON as it is written by us: no key twice, no NaN; whatever else stands there was written by somebody else."""

from __future__ import annotations

import json
from typing import Any


def parse_strictly(data: str | bytes) -> Any:  # noqa: ANN401 - any JSON document
    """Parse a document.

    Raises:
        ValueError: It is no JSON, has a key twice, a number that is none, or is nested beyond reason.
    """
    try:
        return json.loads(data, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key stands twice")
    return values


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number")
