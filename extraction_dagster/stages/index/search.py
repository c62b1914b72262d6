"""Ask the collection: which frames, or which videos, look like this one."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from extraction_dagster.errors import RecordShapeError
from extraction_dagster.stages.index.filters import PointFilter
from extraction_dagster.stages.index.point_store import Hit

if TYPE_CHECKING:
    from datetime import datetime

    from extraction_dagster.records import IdRange
    from extraction_dagster.stages.index.point_store import PointStore

__all__ = ["Hit", "search_images"]

# Frames asked for beyond the limit, so that up to so many equal scores at its edge come out in the same order.
_TIES = 32
_FRAMES_PER_VIDEO = 8


def search_images(  # noqa: PLR0913 - the filters that a person may combine
    store: PointStore,
    query_vector: np.ndarray,
    *,
    limit: int = 10,
    record_id_range: IdRange | None = None,
    platform: str | None = None,
    created_from: datetime | None = None,
    created_before: datetime | None = None,
    group_by_video: bool = False,
    score_threshold: float | None = None,
) -> list[Hit]:
    """The frames nearest to a vector by cosine, best first; equal scores by record, then frame.

    Args:
        store: With its collection open.
        query_vector: Float, shape (dim,), finite and not zero; its length does not matter.
        limit: Most hits.
        record_id_range: Only videos of these ids.
        platform: Only videos of this platform.
        created_from: Only frames indexed at or after this moment.
        created_before: Only frames indexed before this moment.
        group_by_video: One hit a video: its best frame.
        score_threshold: Only hits with at least this cosine.

    Raises:
        RecordShapeError: The vector or the limit can't be searched with.
    """
    vector = np.asarray(query_vector, dtype=np.float32)
    norm = float(np.linalg.norm(vector)) if vector.ndim == 1 else 0.0
    if not 0 < norm < float("inf") or limit < 1:
        raise RecordShapeError(
            record="search",
            why="it needs a vector (dim,), finite and not zero, and a limit of 1 or more",
            shapes=f"vector {vector.shape} of norm {norm}, limit {limit}",
        )
    filters = PointFilter(
        record_id_range=record_id_range, platform=platform, created_from=created_from, created_before=created_before
    )
    unit = vector / norm
    if group_by_video:
        return _best_of_videos(store, unit, limit=limit, filters=filters, score_threshold=score_threshold)
    found = store.search(unit, limit=limit + _TIES, filters=filters, score_threshold=score_threshold)
    return found[:limit]


def _best_of_videos(
    store: PointStore, unit: np.ndarray, *, limit: int, filters: PointFilter, score_threshold: float | None
) -> list[Hit]:
    """Ask again without the videos already found, until there are enough.

    One long video can fill any number of hits; excluding it by id brings the others in, whatever their number.
    """
    best: dict[int, Hit] = {}
    while len(best) < limit:
        asked = _FRAMES_PER_VIDEO * (limit - len(best)) + _TIES
        page = store.search(
            unit,
            limit=asked,
            filters=replace(filters, exclude_record_ids=tuple(best)),
            score_threshold=score_threshold,
        )
        for hit in page:
            best.setdefault(hit.record_id, hit)
        if len(page) < asked:
            break
    return sorted(best.values(), key=lambda hit: hit.order)[:limit]
