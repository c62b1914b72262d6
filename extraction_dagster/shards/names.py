"""The names of shards: when a shard was written, so that a later name holds what is newer.

20260102T030405000006Z-0a1b2c3d4e5f.parquet      2 January 2026, 03:04:05.000006 UTC, and twelve digits
"""

from __future__ import annotations

import hashlib
import secrets
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

_TIME, _TICK = "%Y%m%dT%H%M%S%f", timedelta(microseconds=1)


def new_name() -> str:
    """The name of a shard that is written now."""
    return _name(datetime.now(UTC), secrets.token_hex(6))


def merged_name(names: Sequence[str]) -> str:
    """The name of the shard that takes the place of some: just after the last of them, the same whoever merges them."""
    return _name(written_at(max(names)) + _TICK, hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()[:12])


def written_at(name: str) -> datetime:
    """When a shard was written.

    Raises:
        ValueError: It has no such name.
    """
    return datetime.strptime(name.partition("Z-")[0], _TIME).replace(tzinfo=UTC)


def _name(moment: datetime, digits: str) -> str:
    return f"{moment:{_TIME}}Z-{digits}.parquet"
