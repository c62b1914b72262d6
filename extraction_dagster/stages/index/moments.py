"""Variety, moments, and what two videos share: what to make of many frames that are alike.

Frames that were found next to each other become one moment:

    frames found     0 s ●   1 s ●   2 s ●               9 s ●  10 s ●
    moments          ├───────────────────┤               ├──────────┤

A stretch that two videos share lies at one offset: what is at second 3 of the one is at 13 of the other, 4 at 14. Pairs
of frames that are alike vote for their offset; still pictures are like everything, and are outvoted by the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from extraction_dagster.stages.index.points import PointFilter, point_id
from extraction_dagster.stages.index.protocol import Hit, PointStore
from extraction_dagster.stages.index.search import search_images

if TYPE_CHECKING:
    from collections.abc import Sequence

GAP_SECONDS = 2.5  # between neighbours: one missing frame of a video sampled once a second
TOLERANCE_SECONDS = 1.0  # of an offset: both frames stand for up to half a second
ALIKE = 0.8  # cosine from which two frames may show the same
_LIKENESS = 0.5  # how much being like the query counts against being unlike what was chosen before
_CANDIDATES = 10  # looked at for each frame that is chosen
_FRAMES_PER_MOMENT = 16
_MOST_FRAMES = 8192  # looked at for one answer


@dataclass(frozen=True, slots=True)
class Moment:
    """A stretch of a video that was found.

    Attributes:
        begin_seconds: When its first frame is shown.
        end_seconds: When its last one is.
        num_frames: How many were found in it.
        best: The one most alike.
    """

    begin_seconds: float
    end_seconds: float
    num_frames: int
    best: Hit

    @property
    def score(self) -> float:
        """The cosine of the best frame."""
        return self.best.score


@dataclass(frozen=True, slots=True)
class SharedSpan:
    """What two videos share: a stretch of each.

    Attributes:
        begin_seconds: Where it begins in the first video.
        end_seconds: Where it ends there: its last frame that has a like.
        other_begin_seconds: Where it begins in the other one.
        other_end_seconds: Where it ends there.
        num_frames: Frames of the first video that have their like in the other at that offset.
        score: Mean cosine of these pairs.
    """

    begin_seconds: float
    end_seconds: float
    other_begin_seconds: float
    other_end_seconds: float
    num_frames: int
    score: float


def search_diverse(
    store: PointStore,
    query_vector: np.ndarray,
    *,
    limit: int = 10,
    filters: PointFilter | None = None,
    score_threshold: float | None = None,
) -> list[Hit]:
    """Frames near to a vector that are unlike each other (maximal marginal relevance), in the order they were chosen.

    The first is the nearest; each further one has the most of its cosine with the query, less the highest of its
    cosines with those before, out of ten times as many frames. Arguments and errors as `search_images`.
    """
    most = min(_CANDIDATES * limit, max(_MOST_FRAMES, limit))
    found = search_images(store, query_vector, limit=most, filters=filters, score_threshold=score_threshold)
    vectors = _vectors_of(store, found)
    found = [hit for hit in found if _key(hit) in vectors]  # one that was removed in between is no hit
    if not found:
        return []
    matrix, scores = np.stack([vectors[_key(hit)] for hit in found]), np.array([hit.score for hit in found])
    chosen, likest = [0], matrix @ matrix[0]  # the best comes first
    while len(chosen) < min(limit, len(found)):
        worth = _LIKENESS * scores - (1 - _LIKENESS) * likest
        worth[chosen] = -np.inf
        chosen.append(int(worth.argmax()))
        likest = np.maximum(likest, matrix @ matrix[chosen[-1]])
    return [found[index] for index in chosen]


def _key(hit: Hit) -> tuple[int, int]:
    return hit.record_id, hit.frame_number


def _vectors_of(store: PointStore, hits: Sequence[Hit]) -> dict[tuple[int, int], np.ndarray]:
    if not hits:
        return {}
    pages = store.read(PointFilter(point_ids=[point_id(*_key(hit)) for hit in hits]))
    return {
        (int(payload["record_id"]), int(payload["frame_number"])): vector
        for page in pages
        for payload, vector in zip(page.payloads, page.vectors, strict=True)
    }


def search_moments(
    store: PointStore,
    query_vector: np.ndarray,
    *,
    limit: int = 10,
    filters: PointFilter | None = None,
    score_threshold: float | None = None,
) -> list[Moment]:
    """The moments whose best frames are nearest to a vector. Arguments and errors as `search_images`.

    A long one can fill any number of hits: more frames are looked at, up to 8,192, until there are enough moments.
    """
    most = _FRAMES_PER_MOMENT * limit
    while True:
        found = search_images(store, query_vector, limit=most, filters=filters, score_threshold=score_threshold)
        moments = to_moments(found, limit=limit)
        if len(moments) == limit or len(found) < most or most >= _MOST_FRAMES:
            return moments
        most *= 4


def find_span(store: PointStore, record_id: int, vectors: np.ndarray, seconds: np.ndarray) -> SharedSpan | None:
    """The stretch that a query video shares with a record; arguments as the first two of `shared_span`."""
    pages = list(store.read(PointFilter(record_ids=[record_id])))
    if not pages:
        return None
    others = np.concatenate([page.vectors for page in pages]).astype(np.float32)
    times = np.array([float(payload["frame_second"]) for page in pages for payload in page.payloads])
    return shared_span(vectors, seconds, others, times)


def to_moments(hits: Sequence[Hit], *, limit: int, gap_seconds: float = GAP_SECONDS) -> list[Moment]:
    """Join neighbouring hits of a video; best first, equal ones by record and time.

    Args:
        hits: Frames of any videos, in any order.
        limit: Most moments.
        gap_seconds: Frames that far apart, or less, are neighbours.
    """
    moments, group = list[Moment](), list[Hit]()
    for hit in sorted(hits, key=lambda hit: (hit.record_id, hit.frame_second)):
        last = group[-1] if group else None
        if last and (last.record_id != hit.record_id or hit.frame_second - last.frame_second > gap_seconds):
            moments.append(_moment(group))
            group = []
        group.append(hit)
    if group:
        moments.append(_moment(group))
    return sorted(moments, key=lambda moment: moment.best.order)[:limit]


def _moment(group: Sequence[Hit]) -> Moment:
    best = min(group, key=lambda hit: hit.order)
    return Moment(group[0].frame_second, group[-1].frame_second, len(group), best)


def shared_span(  # noqa: PLR0913 - two videos, and what counts
    vectors: np.ndarray,
    seconds: np.ndarray,
    other_vectors: np.ndarray,
    other_seconds: np.ndarray,
    *,
    alike: float = ALIKE,
    gap_seconds: float = GAP_SECONDS,
) -> SharedSpan | None:
    """The longest stretch that two videos share at one offset; None when no two frames are alike.

    A copy that runs faster or slower has no single offset: only a part of it is found.

    Args:
        vectors: float32, shape (N, dim), length 1, the first video's frames.
        seconds: float64, shape (N,), when each is shown.
        other_vectors: float32, shape (M, dim), length 1.
        other_seconds: float64, shape (M,).
        alike: The least cosine of a pair.
        gap_seconds: A longer gap between pairs ends a stretch, but for one frame of the first video that has no like.
    """
    cosines = vectors @ other_vectors.T
    frames, others = np.nonzero(cosines >= alike)
    if not len(frames):
        return None
    scores, offsets = cosines[frames, others], other_seconds[others] - seconds[frames]
    kept = _at_one_offset(frames, scores, offsets)
    frames, others, scores = frames[kept], others[kept], scores[kept]
    steps = np.diff(np.sort(seconds))
    longest_gap = max(gap_seconds, 2.5 * float(np.median(steps))) if len(steps) else gap_seconds
    first, last = _longest_run(seconds[frames], longest_gap)
    run = slice(first, last + 1)
    return SharedSpan(
        float(seconds[frames[first]]),
        float(seconds[frames[last]]),
        float(other_seconds[others[run]].min()),
        float(other_seconds[others[run]].max()),
        last + 1 - first,
        float(scores[run].mean()),
    )


def _at_one_offset(frames: np.ndarray, scores: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Indices of the pairs at the offset that most frames agree on: the best pair of each frame, in their order."""
    order = np.argsort(offsets, kind="stable")
    ordered, step = offsets[order], TOLERANCE_SECONDS / 2
    begins = np.unique(np.floor(ordered / step)) * step  # windows overlap by a half: none is cut in every one of them
    best, chosen = (0, 0.0), np.empty(0, dtype=int)
    for begin, end in zip(*(np.searchsorted(ordered, begins + by) for by in (0.0, TOLERANCE_SECONDS)), strict=True):
        window = order[begin:end]
        by_score = window[np.lexsort((-scores[window], frames[window]))]
        pairs = by_score[np.unique(frames[by_score], return_index=True)[1]]
        weight = len(pairs), float(scores[pairs].sum())
        if weight > best:
            best, chosen = weight, pairs
    return chosen


def _longest_run(seconds: np.ndarray, gap_seconds: float) -> tuple[int, int]:
    """Indices of the first and the last of the most moments in a row without a longer gap; the moments ascend."""
    breaks = np.flatnonzero(np.diff(seconds) > gap_seconds)
    begins, ends = [0, *(breaks + 1).tolist()], [*breaks.tolist(), len(seconds) - 1]
    return max(zip(begins, ends, strict=True), key=lambda run: (run[1] - run[0], -run[0]))
