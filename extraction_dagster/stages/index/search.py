"""Search the collection: which frames, or which videos, look like this one."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from extraction_dagster.errors import RecordShapeError
from extraction_dagster.stages.index.points import PointFilter
from extraction_dagster.stages.index.protocol import Hit

if TYPE_CHECKING:
    from extraction_dagster.stages.index.protocol import CollectionSpec, PointStore

__all__ = ["Hit", "VideoHit", "open_for_search", "search_images", "search_videos"]

# Frames asked for beyond the limit, so that up to so many equal scores at its edge come out in the same order.
_TIES = 32
_FRAMES_PER_VIDEO = 8
# Videos for which each frame of a query video votes, at least.
_VOTES_PER_FRAME = 50


@dataclass(frozen=True, slots=True)
class VideoHit:
    """A video that a search by video found.

    Attributes:
        record_id: The row's id.
        score: Mean over the query's frames of the best cosine with a frame of this video.
        votes: Frames of the query that found this video first.
        query_frames: Frames of the query.
        best: The pair of frames most alike: the video's frame, with their cosine.
    """

    record_id: int
    score: float
    votes: int
    query_frames: int
    best: Hit


def open_for_search(store: PointStore, spec: CollectionSpec) -> None:
    """Open the collection in use, and see that it holds vectors of the query's model.

    Raises:
        CollectionMissingError: There is none.
        CollectionMismatchError: It holds others.
        StoreBusyError: Another process holds the embedded store.
    """
    spec.require_same_vectors(store.open_collection(spec.name), repr(store))


def search_images(  # noqa: PLR0913 - what a person may combine
    store: PointStore,
    query_vector: np.ndarray,
    *,
    limit: int = 10,
    filters: PointFilter | None = None,
    group_by_video: bool = False,
    score_threshold: float | None = None,
) -> list[Hit]:
    """The frames nearest to a vector by cosine, best first; equal scores by record, then frame.

    Args:
        store: With its collection open.
        query_vector: Float, shape (dim,), finite and not zero; it need not be normalised.
        limit: Most hits.
        filters: Only these points.
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
    unit = vector / norm
    if group_by_video:
        return _best_of_videos(store, unit, limit=limit, filters=filters, score_threshold=score_threshold)
    found = store.search(unit, limit=limit + _TIES, filters=filters, score_threshold=score_threshold)
    return found[:limit]


def search_videos(
    store: PointStore,
    query_vectors: np.ndarray,
    *,
    limit: int = 10,
    filters: PointFilter | None = None,
    score_threshold: float | None = None,
) -> list[VideoHit]:
    """The videos most like a video, by a vote of its frames.

    Each frame of the query votes for the 50 videos (or four times the limit) nearest to it, with the cosine of the
    best frame of each. A video's score is the mean of those cosines over all frames of the query; a frame that did
    not vote for it counts as 0. Three frames of a query and two videos:

        frame 1     A 0.9  B 0.7
        frame 2     A 0.8  B 0.9
        frame 3     A 0.7             score of A 0.80 with 2 votes, of B 0.53 with 1

    So a video wins by being like the query from end to end, not by one frame that happens to be; an excerpt of a
    video finds the whole. Nothing is left out: a video in the collection finds itself.

    Args:
        store: With its collection open.
        query_vectors: Float, shape (N, dim), one row a frame; finite and not zero.
        limit: Most hits.
        filters: Only these points.
        score_threshold: Only videos with at least this score.

    Raises:
        RecordShapeError: The vectors or the limit can't be searched with.
    """
    if query_vectors.ndim != 2 or not len(query_vectors):  # noqa: PLR2004 - (N, dim)
        raise RecordShapeError(
            record="search", why="it needs vectors (N, dim)", shapes=f"vectors {query_vectors.shape}"
        )
    ballots: dict[int, list[Hit]] = defaultdict(list)
    votes: dict[int, int] = defaultdict(int)
    for vector in query_vectors:
        most = max(_VOTES_PER_FRAME, 4 * limit)
        found = search_images(store, vector, limit=most, filters=filters, group_by_video=True)
        for place, hit in enumerate(found):
            ballots[hit.record_id].append(hit)
            votes[hit.record_id] += place == 0
    number = len(query_vectors)
    hits = [
        VideoHit(key, sum(hit.score for hit in cast) / number, votes[key], number, min(cast, key=lambda hit: hit.order))
        for key, cast in ballots.items()
    ]
    wanted = [hit for hit in hits if score_threshold is None or hit.score >= score_threshold]
    return sorted(wanted, key=lambda hit: (-hit.score, hit.record_id))[:limit]


def _best_of_videos(
    store: PointStore, unit: np.ndarray, *, limit: int, filters: PointFilter | None, score_threshold: float | None
) -> list[Hit]:
    """Ask again without the videos already found, until there are enough.

    One long video can fill any number of hits; excluding it by its id makes room for the others.
    """
    best: dict[int, Hit] = {}
    while len(best) < limit:
        asked = _FRAMES_PER_VIDEO * (limit - len(best)) + _TIES
        others = replace(filters or PointFilter(), exclude_record_ids=tuple(best))
        page = store.search(unit, limit=asked, filters=others, score_threshold=score_threshold)
        for hit in page:
            best.setdefault(hit.record_id, hit)
        if len(page) < asked:
            break
    return sorted(best.values(), key=lambda hit: hit.order)[:limit]
