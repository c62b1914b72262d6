"""`extraction search`: which frames, or which videos, look like this."""

from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.table import Table
from rich.text import Text

from extraction_dagster.cli import console
from extraction_dagster.errors.embed import TextSearchError
from extraction_dagster.records import IdRange
from extraction_dagster.settings import Settings, load_settings
from extraction_dagster.stages.decode.jpeg import encode_small
from extraction_dagster.stages.embed.models.interface import EmbeddingModel, TextEmbeddingModel
from extraction_dagster.stages.embed.passes import normalise
from extraction_dagster.stages.index.points import PointFilter
from extraction_dagster.stages.index.protocol import CollectionSpec, Hit
from extraction_dagster.stages.index.search import (
    VideoHit,
    open_for_search,
    require_place,
    search_images,
    search_videos,
    why_nothing,
)
from extraction_dagster.stages.index.stage import open_point_store

_MOST_QUERY_PICTURES = 8
_QUERY_PX = 1024  # of the query's picture in a gallery


@dataclass(frozen=True, slots=True)
class _Query:
    """What is searched with: one vector, or one for each frame of a video."""

    kind: str
    shown: str
    vectors: np.ndarray
    jpegs: tuple[bytes, ...]
    spec: CollectionSpec


def command(  # noqa: PLR0913 - the options of the command
    *,
    image: Annotated[Path | None, typer.Option("--image", help="Picture to search with.", metavar="FILE")] = None,
    video: Annotated[Path | None, typer.Option("--video", help="Video to search with.", metavar="FILE")] = None,
    text: Annotated[str | None, typer.Option("--text", help="Words to search with, if the model knows words.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Most hits shown, best first.")] = 10,
    platform: Annotated[str | None, typer.Option("--platform", help="Only videos of this platform.")] = None,
    ids: Annotated[
        IdRange | None,
        typer.Option("--ids", metavar="FIRST-LAST", parser=IdRange.parse, help="Only videos of these ids."),
    ] = None,
    after: Annotated[
        str | None, typer.Option("--after", metavar="DATE", help="Only frames indexed at or after this date (UTC).")
    ] = None,
    before: Annotated[
        str | None, typer.Option("--before", metavar="DATE", help="Only frames indexed before this date (UTC).")
    ] = None,
    group: Annotated[
        bool, typer.Option("--group/--frames", help="One hit a video, its best frame; or every frame by itself.")
    ] = True,
    min_score: Annotated[
        float | None, typer.Option("--min-score", min=-1, max=1, help="Only hits with at least this score.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="OUT", help="Write a gallery with thumbnails to this file.")
    ] = None,
    as_json: console.AsJson = False,
) -> None:
    """Search the collection for what looks like a picture or a video; 1 is the same, and more is more alike.

    A video is compared frame by frame: the score is the mean over its frames of the best match in the found video.

    For example: extraction search --image photo.jpg --platform insta --min-score 0.5
    """
    if sum(item is not None for item in (image, video, text)) != 1:
        raise typer.BadParameter("give exactly one of --image, --video and --text")
    if video is not None and not group:
        raise typer.BadParameter("--frames goes with --image or --text; a search by video finds videos")
    since, until = _moment(after, "--after"), _moment(before, "--before")
    if since and until and since >= until:
        raise typer.BadParameter(f"--after {after} is not earlier than --before {before}: nothing lies between them")
    if html is not None:
        require_place(html)
    filters = PointFilter(record_id_range=ids, platform=platform, created_from=since, created_before=until)
    settings = load_settings()
    query = _query(settings, image=image, video=video, text=text)
    with open_point_store(settings) as store:
        open_for_search(store, query.spec)
        asked: dict[str, Any] = {"limit": limit, "filters": filters, "score_threshold": min_score}
        hits: list[Hit] | list[VideoHit] = (
            search_videos(store, query.vectors, **asked)
            if query.kind == "video"
            else search_images(store, query.vectors[0], group_by_video=group, **asked)
        )
        notes = [] if hits else why_nothing(store, filters, score_threshold=min_score)
    if html is not None:
        _write_gallery(settings, query, hits, html)
    if as_json:
        found = {"query": query.shown, "kind": query.kind, "hits": [_plain(hit) for hit in hits]}
        console.print_json({**found, "notes": notes})
        return
    if not hits:
        console.out.print(" ".join(["Nothing was found.", *notes]), markup=False)
    else:
        console.out.print(hits_table(hits), soft_wrap=False)
    if html is not None:
        console.out.print(f"Gallery: {html}", markup=False)


def search_image(settings: Settings, image: Path, *, limit: int) -> list[Hit]:
    """The frames most like a picture, one per video, best first."""
    query = _query(settings, image=image, video=None, text=None)
    with open_point_store(settings) as store:
        open_for_search(store, query.spec)
        return search_images(store, query.vectors[0], limit=limit, group_by_video=True)


def hits_table(hits: list[Hit] | list[VideoHit]) -> Table:
    """Hits as a table."""
    by_video = any(isinstance(hit, VideoHit) for hit in hits)
    table = Table("score", *(["votes"] if by_video else []), "record", "second", "platform", "code")
    table.add_column("path", overflow="fold")
    for item in hits:
        hit = _frame(item)
        votes = [f"{item.votes} of {item.query_frames}"] if isinstance(item, VideoHit) else []
        texts = [_cell(text) for text in (hit.platform, hit.video_code, hit.path)]
        table.add_row(f"{item.score:.4f}", *votes, str(hit.record_id), f"{hit.frame_second:.2f}", *texts)
    return table


def _cell(text: str | None) -> Text:
    """A text letter for letter: brackets are no markup, and control characters are shown by their numbers."""
    return Text(console.plain_line(text or "-"))


def _query(settings: Settings, *, image: Path | None, video: Path | None, text: str | None) -> _Query:
    from extraction_dagster.stages.embed.models.registry import load_model
    from extraction_dagster.stages.embed.query import embed_query_image, embed_query_video, load_query_image

    picture = None if image is None else load_query_image(image)  # a wrong file is refused before the model is loaded
    model = load_model(settings, may_compile=False)
    spec = CollectionSpec(settings.collection_name, model.dim, model.fingerprint)
    if image is not None and picture is not None:
        vector = embed_query_image(model, picture, shown=str(image))
        return _Query("image", str(image), vector[None], (encode_small(picture, longest_px=_QUERY_PX),), spec)
    if video is not None:
        found = embed_query_video(model, video, settings)
        return _Query("video", str(video), found.vectors, found.jpegs, spec)
    return _Query("text", text or "", _embed_text(model, text or ""), (), spec)


def _embed_text(model: EmbeddingModel, text: str) -> np.ndarray:
    if not isinstance(model, TextEmbeddingModel):
        raise TextSearchError(model.name)
    if not text.strip():
        raise typer.BadParameter("--text is empty")
    return normalise(model.embed_text([text]))[0]


def _moment(date: str | None, option: str) -> datetime | None:
    if date is None:
        return None
    try:
        moment = datetime.fromisoformat(date)
    except ValueError:
        raise typer.BadParameter(f"{option} is {date!r}, expected for example 2026-01-31") from None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _frame(hit: Hit | VideoHit) -> Hit:
    return hit.best if isinstance(hit, VideoHit) else hit


def _plain(hit: Hit | VideoHit) -> dict[str, Any]:
    if isinstance(hit, Hit):
        return asdict(hit)
    votes = {"votes": hit.votes, "query_frames": hit.query_frames, "best_score": hit.best.score}
    return {**asdict(hit.best), "score": hit.score, **votes}


def _write_gallery(settings: Settings, query: _Query, hits: list[Hit] | list[VideoHit], path: Path) -> None:
    from extraction_dagster.shards.frame_export import find_frames
    from extraction_dagster.shards.frame_store import FrameStore
    from extraction_dagster.shards.place import Source
    from extraction_dagster.stages.decode.fingerprint import frames_fingerprint
    from extraction_dagster.stages.index.search import Card, render_gallery, write_gallery

    source = Source.for_reading(settings)
    frames = FrameStore(settings.resolved_frames_uri, frames_fingerprint(settings), source=source)
    pictures = find_frames(frames, [(_frame(hit).record_id, _frame(hit).frame_number) for hit in hits])
    cards = []
    for item in hits:
        hit = _frame(item)
        votes = [f"{item.votes} of {item.query_frames} frames found it first"] if isinstance(item, VideoHit) else []
        of = " · ".join(part for part in (hit.platform, hit.video_code) if part)
        lines = [f"record {hit.record_id} at {hit.frame_second:.2f} s", *votes, of, hit.path]
        cards.append(Card(f"{item.score:.4f}", lines, pictures.get((hit.record_id, hit.frame_number))))
    title = f"What looks like {query.shown}"
    write_gallery(path, render_gallery(title, query_jpegs=query.jpegs[:_MOST_QUERY_PICTURES], cards=cards))
