"""`extraction search`: which frames, or which videos, look like this."""

from collections.abc import Mapping, Sequence
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
from extraction_dagster.stages.index.moments import Moment, SharedSpan, find_span, search_diverse, search_moments
from extraction_dagster.stages.index.points import PointFilter
from extraction_dagster.stages.index.protocol import CollectionSpec, Hit
from extraction_dagster.stages.index.search import (
    VideoHit,
    combine_examples,
    open_for_search,
    require_place,
    search_images,
    search_videos,
    why_nothing,
)
from extraction_dagster.stages.index.stage import open_point_store

_MOST_QUERY_PICTURES = 8
_QUERY_PX = 1024  # of the query's picture in a gallery
_MOST_FRAMES = 128  # of a query video, to say which stretch of it was found
Found = Hit | VideoHit | Moment


@dataclass(frozen=True, slots=True)
class _Query:
    """What is searched with: one vector, or one for each frame of a video, of which a few vote.

    Attributes:
        vectors: float32, shape (N, dim).
        jpegs: Pictures of the query; of a video, the frames that vote.
        seconds: Of a video, float64, shape (N,): when each frame is shown.
        voters: Of a video, the places of the frames that vote.
    """

    kind: str
    shown: str
    vectors: np.ndarray
    jpegs: tuple[bytes, ...]
    spec: CollectionSpec
    seconds: np.ndarray | None = None
    voters: np.ndarray | None = None


def command(  # noqa: PLR0913 - the options of the command
    *,
    image: Annotated[
        list[Path] | None,
        typer.Option(
            "--image", help="Picture to search with; several, or words beside them, count as one.", metavar="FILE"
        ),
    ] = None,
    unlike: Annotated[
        list[Path] | None,
        typer.Option("--not", help="Picture of what is not wanted, beside --image or --text.", metavar="FILE"),
    ] = None,
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
    moments: Annotated[
        bool, typer.Option("--moments", help="Stretches of videos: neighbouring frames that were found, as one.")
    ] = False,
    diverse: Annotated[
        bool, typer.Option("--diverse", help="Frames that are unlike each other, though like the query.")
    ] = False,
    min_score: Annotated[
        float | None, typer.Option("--min-score", min=-1, max=1, help="Only hits with at least this score.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="OUT", help="Write a gallery with thumbnails to this file.")
    ] = None,
    as_json: console.AsJson = False,
) -> None:
    """Search the collection for what looks like a picture or a video; 1 is the same, and more is more alike.

    A video is compared frame by frame: the score is the mean over its frames of the best match in the found video, and
    the stretch that both share is shown as it lies in yours and in it.

    For example: extraction search --image photo.jpg --platform insta --min-score 0.5, or
    extraction search --image beach.jpg --image surfer.jpg --not crowd.jpg --moments
    """
    _check_usage(image, unlike, video, text, frames=not group, moments=moments, diverse=diverse)
    since, until = _moment(after, "--after"), _moment(before, "--before")
    if since and until and since >= until:
        raise typer.BadParameter(f"--after {after} is not earlier than --before {before}: nothing lies between them")
    if html is not None:
        require_place(html)
    filters = PointFilter(record_id_range=ids, platform=platform, created_from=since, created_before=until)
    settings = load_settings()
    query = _query(settings, images=image or [], unlike=unlike or [], video=video, text=text)
    with open_point_store(settings) as store:
        open_for_search(store, query.spec)
        asked: dict[str, Any] = {"limit": limit, "filters": filters, "score_threshold": min_score}
        hits: Sequence[Found]
        spans: dict[int, SharedSpan | None] = {}
        if query.seconds is not None:
            hits = videos = search_videos(store, query.vectors[query.voters], **asked)
            spans = {hit.record_id: find_span(store, hit.record_id, query.vectors, query.seconds) for hit in videos}
        elif moments:
            hits = search_moments(store, query.vectors[0], **asked)
        elif diverse:
            hits = search_diverse(store, query.vectors[0], **asked)
        else:
            hits = search_images(store, query.vectors[0], group_by_video=group, **asked)
        notes = [] if hits else why_nothing(store, filters, score_threshold=min_score)
    if html is not None:
        _write_gallery(settings, query, hits, spans, html)
    if as_json:
        found = {"query": query.shown, "kind": query.kind, "hits": [_plain(hit, spans) for hit in hits]}
        console.print_json({**found, "notes": notes})
        return
    if not hits:
        console.out.print(" ".join(["Nothing was found.", *notes]), markup=False)
    else:
        console.out.print(hits_table(hits, spans), soft_wrap=False)
    if html is not None:
        console.out.print(f"Gallery: {html}", markup=False)


def search_image(settings: Settings, image: Path, *, limit: int) -> list[Hit]:
    """The frames most like a picture, one per video, best first."""
    query = _query(settings, images=[image], unlike=[], video=None, text=None)
    with open_point_store(settings) as store:
        open_for_search(store, query.spec)
        return search_images(store, query.vectors[0], limit=limit, group_by_video=True)


def hits_table(hits: Sequence[Found], spans: Mapping[int, SharedSpan | None] | None = None) -> Table:
    """Hits as a table; `spans` are the stretches that videos share with the query."""
    told = [_told(item, spans or {}) for item in hits]
    table = Table("score", *(told[0] if told else {}), "record", "second", "platform", "code")
    table.add_column("path", overflow="fold")
    for item, more in zip(hits, told, strict=True):
        hit = _frame(item)
        texts = [_cell(text) for text in (hit.platform, hit.video_code, hit.path)]
        table.add_row(f"{item.score:.4f}", *more.values(), str(hit.record_id), f"{hit.frame_second:.2f}", *texts)
    return table


def _told(item: Found, spans: Mapping[int, SharedSpan | None]) -> dict[str, str]:
    """What is said of a hit beside its best frame, by the heading of its column."""
    if isinstance(item, Moment):
        return {"moment": _stretch(item.begin_seconds, item.end_seconds), "frames": str(item.num_frames)}
    if isinstance(item, Hit):
        return {}
    span = spans.get(item.record_id)
    yours = _stretch(span.begin_seconds, span.end_seconds) if span else "-"
    theirs = _stretch(span.other_begin_seconds, span.other_end_seconds) if span else "-"
    return {"votes": f"{item.votes} of {item.query_frames}", "yours": yours, "is its": theirs}


def _stretch(begin: float, end: float) -> str:
    return f"{_clock(begin)} - {_clock(end)}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(max(0, round(seconds)), 60)
    return f"{minutes}:{rest:02}"


def _cell(text: str | None) -> Text:
    """A text letter for letter: brackets are no markup, and control characters are shown by their numbers."""
    return Text(console.plain_line(text or "-"))


def _check_usage(  # noqa: PLR0913 - the options of the command
    images: list[Path] | None,
    unlike: list[Path] | None,
    video: Path | None,
    text: str | None,
    *,
    frames: bool,
    moments: bool,
    diverse: bool,
) -> None:
    is_picture = bool(images) or text is not None
    if is_picture == (video is not None):
        raise typer.BadParameter("give --image or --text, or both, or --video alone")
    if unlike and not is_picture:
        raise typer.BadParameter("--not goes with --image or --text")
    for is_given, name in ((frames, "--frames"), (moments, "--moments"), (diverse, "--diverse")):
        if is_given and video is not None:
            raise typer.BadParameter(f"{name} goes with --image or --text; a search by video finds videos")
    if moments and diverse:
        raise typer.BadParameter("give --moments or --diverse, not both")


def _query(
    settings: Settings, *, images: Sequence[Path], unlike: Sequence[Path], video: Path | None, text: str | None
) -> _Query:
    from extraction_dagster.stages.embed.models.registry import load_model
    from extraction_dagster.stages.embed.query import (
        MAX_QUERY_FRAMES,
        embed_query_image,
        embed_query_video,
        load_query_image,
        spread,
    )

    paths = [*images, *unlike]
    pictures = [load_query_image(path) for path in paths]  # a wrong file is refused before the model is loaded
    model = load_model(settings, may_compile=False)
    spec = CollectionSpec(settings.collection_name, model.dim, model.fingerprint)
    if video is not None:
        found = embed_query_video(model, video, settings, max_frames=_MOST_FRAMES)
        voters = spread(len(found.vectors), MAX_QUERY_FRAMES)
        jpegs = tuple(found.jpegs[index] for index in voters.tolist())
        return _Query("video", str(video), found.vectors, jpegs, spec, found.pts_seconds, voters)
    vectors = [
        embed_query_image(model, picture, shown=str(path)) for picture, path in zip(pictures, paths, strict=True)
    ]
    wanted = vectors[: len(images)] + ([] if text is None else [_embed_text(model, text)])
    vector = combine_examples(wanted, vectors[len(images) :])
    shown = " and ".join([*map(str, images), *([] if text is None else [text])])
    if unlike:
        shown += f", not like {' or '.join(map(str, unlike))}"
    jpegs = tuple(encode_small(picture, longest_px=_QUERY_PX) for picture in pictures[: len(images)])
    return _Query("image" if images else "text", shown, vector[None], jpegs, spec)


def _embed_text(model: EmbeddingModel, text: str) -> np.ndarray:
    if not isinstance(model, TextEmbeddingModel):
        raise TextSearchError(model.name)
    if not text.strip():
        raise typer.BadParameter("--text is empty")
    vector: np.ndarray = normalise(model.embed_text([text]))[0][0]
    return vector


def _moment(date: str | None, option: str) -> datetime | None:
    if date is None:
        return None
    try:
        moment = datetime.fromisoformat(date)
    except ValueError:
        raise typer.BadParameter(f"{option} is {date!r}, expected for example 2026-01-31") from None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _frame(item: Found) -> Hit:
    return item if isinstance(item, Hit) else item.best


def _plain(item: Found, spans: Mapping[int, SharedSpan | None] | None = None) -> dict[str, Any]:
    if isinstance(item, Hit):
        return asdict(item)
    if isinstance(item, Moment):
        stretch = {"begin_seconds": item.begin_seconds, "end_seconds": item.end_seconds, "num_frames": item.num_frames}
        return {**asdict(item.best), **stretch}
    votes = {"votes": item.votes, "query_frames": item.query_frames, "best_score": item.best.score}
    span = (spans or {}).get(item.record_id)
    return {**asdict(item.best), "score": item.score, **votes, "span": asdict(span) if span else None}


def _write_gallery(
    settings: Settings, query: _Query, hits: Sequence[Found], spans: Mapping[int, SharedSpan | None], path: Path
) -> None:
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
        more = [f"{name} {told}" for name, told in _told(item, spans).items()]
        of = " · ".join(part for part in (hit.platform, hit.video_code) if part)
        lines = [f"record {hit.record_id} at {hit.frame_second:.2f} s", *more, of, hit.path]
        cards.append(Card(f"{item.score:.4f}", lines, pictures.get((hit.record_id, hit.frame_number))))
    title = f"What looks like {query.shown}"
    write_gallery(path, render_gallery(title, query_jpegs=query.jpegs[:_MOST_QUERY_PICTURES], cards=cards))
