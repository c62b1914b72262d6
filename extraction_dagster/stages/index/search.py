"""Search the collection: which frames, or which videos, look like this one.

What was found can be shown as one HTML file that needs nothing else: thumbnails inside, no script, nothing fetched.
"""

from __future__ import annotations

import base64
import difflib
import errno
import html
import itertools
import os
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from extraction_dagster.errors import RecordShapeError, one_line
from extraction_dagster.errors.index import GalleryError
from extraction_dagster.files import write_atomically
from extraction_dagster.stages.decode.jpeg import shrink_jpeg
from extraction_dagster.stages.index.points import PointFilter

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from extraction_dagster.stages.index.protocol import CollectionSpec, Hit, PointStore

# Frames asked for beyond the limit, so that up to so many equal scores at its edge come out in the same order.
_TIES = 32
_FRAMES_PER_VIDEO = 8
# Videos for which each frame of a query video votes, at least.
_VOTES_PER_FRAME = 50
_AWAY = 0.5  # as far as a query moves away from what it must not be like
_NOTHING_LEFT = 1e-3
_FRAMES_LOOKED_AT = 4096  # for the platforms that there are
_PLATFORMS_SHOWN = 5
_THUMBNAIL_PX = 200
_THUMBNAIL_QUALITY = 80
# The policy keeps a page harmless even where a text would slip through unescaped.
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.4 system-ui, sans-serif; margin: 1.5rem; color: #222; background: #fafafa; }}
{style}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""
_GALLERY_STYLE = """.query, ol { display: flex; flex-wrap: wrap; gap: 1rem; padding: 0; list-style: none; }
li, figure { margin: 0; width: 220px; background: #fff; border: 1px solid #ddd; border-radius: 6px; padding: 8px; }
img, .none { width: 100%; height: 200px; object-fit: contain; background: #eee; display: block; }
.none { line-height: 200px; text-align: center; color: #777; }
b { font-size: 1.1em; }
p { margin: .3rem 0 0; overflow-wrap: anywhere; }"""


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


def combine_examples(examples: Sequence[np.ndarray], counter_examples: Sequence[np.ndarray] = ()) -> np.ndarray:
    """One vector to search with: the mean of the examples, moved away from the counter-examples by half of theirs.

    Args:
        examples: Each float32, shape (dim,), length 1; at least one.
        counter_examples: Of the same kind.

    Returns:
        float32, shape (dim,), length 1; the examples' own mean where the two cancel out.
    """
    mean = np.mean(examples, axis=0)
    vector = mean - _AWAY * np.mean(counter_examples, axis=0) if len(counter_examples) else mean
    norm = float(np.linalg.norm(vector))
    if norm < _NOTHING_LEFT:
        vector, norm = mean, float(np.linalg.norm(mean))
    return np.asarray(vector / norm, dtype=np.float32) if norm else np.asarray(examples[0], dtype=np.float32)


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
        shapes = f"vectors {query_vectors.shape}"
        raise RecordShapeError(record="search", why="it needs vectors (N, dim)", shapes=shapes)
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


def why_nothing(store: PointStore, filters: PointFilter, *, score_threshold: float | None = None) -> list[str]:
    """Say of a search that found nothing which of its filters no frame of the collection meets."""
    if not store.count():
        return ["The collection has no frames yet."]
    ids, times = filters.record_id_range, (filters.created_from, filters.created_before)
    said = []
    if filters.platform is not None and not store.count(PointFilter(platform=filters.platform)):
        said.append(f"No frame is of platform {filters.platform!r}{_platforms(store, filters.platform)}.")
    if ids is not None and not store.count(PointFilter(record_id_range=ids)):
        said.append(f"No frame is of a record from {ids.first_id} to {ids.last_id}.")
    if any(times) and not store.count(PointFilter(created_from=times[0], created_before=times[1])):
        said.append("No frame was indexed in that time.")
    if said:
        return said
    number = store.count(filters)
    if number and score_threshold is not None:
        return [f"{number} frames meet the filters; none of them has a score of {score_threshold:g} or more."]
    return [] if number else ["Each filter has frames that meet it, and no frame meets all of them."]


def _platforms(store: PointStore, wanted: str) -> str:
    """The platforms of some frames, those that are spelled alike first."""
    some = itertools.islice(store.payloads(None, ["platform"]), _FRAMES_LOOKED_AT)
    names = sorted({str(name) for payload in some if (name := payload.get("platform")) is not None})
    alike = difflib.get_close_matches(wanted, names, n=1)
    shown = ", ".join(map(repr, [*alike, *(name for name in names if name not in alike)][:_PLATFORMS_SHOWN]))
    return f"; there is {one_line(shown)}" if names else ", and none has a platform"


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


@dataclass(frozen=True, slots=True)
class Card:
    """One hit.

    Attributes:
        heading: The score, say.
        lines: What to say of it.
        jpeg: Its picture, or None.
    """

    heading: str
    lines: Sequence[str]
    jpeg: bytes | None = None


def render_gallery(title: str, *, query_jpegs: Sequence[bytes], cards: Sequence[Card]) -> str:
    """The page; every text is escaped."""
    query = "".join(f"<figure>{_image(jpeg, 'query')}</figure>" for jpeg in query_jpegs)
    found = "\n".join(map(_card, cards))
    body = f'<div class="query">{query}</div>\n<h2>{len(cards)} found</h2>\n<ol>\n{found}\n</ol>'
    return render_page(title, style=_GALLERY_STYLE, body=body)


def render_page(title: str, *, style: str, body: str) -> str:
    """A page that may load nothing and run nothing; the title is escaped, whoever makes the body escapes its texts."""
    return _PAGE.format(title=html.escape(title), style=style, body=body)


def require_place(path: Path) -> None:
    """See that a page could be written there, before there is one.

    Raises:
        GalleryError: It is a folder, or there is no folder for it.
    """
    if path.is_dir():
        raise GalleryError(str(path), os.strerror(errno.EISDIR))
    if not path.absolute().parent.is_dir():
        raise GalleryError(str(path), os.strerror(errno.ENOENT))


def write_gallery(path: Path, page: str) -> None:
    """Write a page: whole, or not at all.

    Raises:
        GalleryError: It can't be written there.
    """
    require_place(path)
    try:
        write_atomically(path, page.encode(), mode=None, durable=False)
    except OSError as error:
        raise GalleryError(str(path), error.strerror or type(error).__name__) from error


def _card(card: Card) -> str:
    lines = "".join(f"<p>{html.escape(line)}</p>" for line in card.lines)
    return f"<li>{_image(card.jpeg, card.heading)}<p><b>{html.escape(card.heading)}</b></p>{lines}</li>"


def _image(jpeg: bytes | None, alt: str) -> str:
    small = shrink_jpeg(jpeg, longest_px=_THUMBNAIL_PX, quality=_THUMBNAIL_QUALITY) if jpeg is not None else None
    if small is None:
        return '<div class="none">no stored frame</div>'
    data = base64.b64encode(small).decode("ascii")
    return f'<img alt="{html.escape(alt)}" src="data:image/jpeg;base64,{data}">'
