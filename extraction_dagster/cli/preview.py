"""`extraction preview`: what would be stored of one record or one file, to look at; nothing is written anywhere."""

import base64
import html
import os
import re
import sys
import tempfile
import webbrowser
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.table import Table
from rich.text import Text

from extraction_dagster.addresses import brief_address
from extraction_dagster.cli import console
from extraction_dagster.errors.decode import PreviewError
from extraction_dagster.records import EncodedFrames, VideoRow
from extraction_dagster.settings import Settings, load_settings

_ID = re.compile(r"-?[0-9]{1,19}")
_MOST_IN_STRIP = 24
_THUMBNAIL_PX, _COLUMN_PX = 96, 8
_KITTY_CHUNK = 4096  # bytes of base64 in one escape sequence
_SIXEL_LEVELS = 6  # of each colour
_COLUMNS = ("frame", "second", "asked for", "bytes")
_STYLE = """ol { display: flex; flex-wrap: wrap; gap: 1rem; padding: 0; list-style: none; }
figure { margin: 0; background: #fff; border: 1px solid #ddd; border-radius: 6px; padding: 8px; }
img { display: block; max-width: 100%; }
h1, li { overflow-wrap: anywhere; }"""


@dataclass(frozen=True, slots=True)
class _Shown:
    """What is shown: of what, and what would be stored."""

    what: str
    row: VideoRow
    frames: EncodedFrames

    @property
    def facts(self) -> list[str]:
        """All that is said of it, one line each."""
        frames = self.frames
        claimed = "no duration" if frames.duration_seconds is None else f"{frames.duration_seconds:.3f} s"
        stored = f"{len(frames)} frames of {frames.width_px}x{frames.height_px}; the container claims {claimed}"
        return [stored, *frames.notes, *([f"partial: {frames.partial}"] if frames.partial else [])]


def preview(
    what: Annotated[str, typer.Argument(metavar="ID|FILE", help="A record's id, or a local file.")],
    *,
    html_file: Annotated[
        Path | None, typer.Option("--html", metavar="OUT", help="Write a page with every frame to this file.")
    ] = None,
    open_page: Annotated[
        bool, typer.Option("--open", help="Show that page in a browser; without --html, from a temporary file.")
    ] = False,
    as_json: console.AsJson = False,
) -> None:
    """Decode one record or file and show what a run would store of it.

    Nothing is stored and no mark is set. The pictures are shown in terminals that can show them.

    For example: extraction preview 12345, or extraction preview clip.mp4 --open
    """
    if html_file is not None:
        from extraction_dagster.stages.index.search import require_place

        require_place(html_file)
    shown = _decode(what, load_settings())
    page = _write_page(shown, html_file) if html_file is not None or open_page else None
    if as_json:
        console.print_json(_document(shown, page))
    else:
        _print(shown)
        if page is not None:
            console.out.print(f"Page: {page}", markup=False)
    if open_page and page is not None:
        webbrowser.open(page.resolve().as_uri())


def _decode(what: str, settings: Settings) -> _Shown:
    """What a run would make of it, by a worker like a run's."""
    from extraction_dagster.stages.catalog.fetch.fetching import Fetcher
    from extraction_dagster.stages.decode.stage import named_by_address
    from extraction_dagster.stages.decode.task import DecodeJob
    from extraction_dagster.stages.decode.workers.pool import PoolOptions, decode_as_ready

    with _file(what, settings) as (name, row, path):
        job = DecodeJob.of(row, path, settings)
        (decoded,) = filter(None, decode_as_ready([job], replace(PoolOptions.from_settings(settings), workers=1)))
    decoded = named_by_address(decoded, row, str(path) if Fetcher.is_remote(row) else "")
    failure, frames = decoded.outcome.failure, decoded.outcome.frames
    if frames is None:
        said = failure.message if failure else "it gave no frame."
        # The rest of the sentence is about a run.
        raise PreviewError(name, said.partition(": ")[2].partition(" Nothing was written")[0])
    return _Shown(name, row, frames)


@contextmanager
def _file(what: str, settings: Settings) -> Iterator[tuple[str, VideoRow, Path]]:
    """The local file of what was named; a download stays in the cache, as after a run."""
    from extraction_dagster.stages.catalog.fetch.fetching import Fetcher, fetch_local

    if _ID.fullmatch(what) is None:
        path = Path(what).absolute()
        if not path.is_file():
            raise PreviewError(repr(what), "it is no regular file." if path.exists() else "there is no such file.")
        yield repr(what), VideoRow(0, str(path)), path.resolve()
        return
    row = _row(int(what), settings)
    name = f"record {row.record_id} ({brief_address(row.uri)!r})"
    if not Fetcher.is_remote(row):
        yield name, row, fetch_local(row, settings.resolved_allowed_roots)
        return
    with closing(Fetcher(settings)) as fetcher:
        yield name, row, fetcher.fetch(row)


def _row(record_id: int, settings: Settings) -> VideoRow:
    """The record's row, from the source table alone: no state table is made or looked at."""
    from extraction_dagster.stages.catalog.database import make_engine
    from extraction_dagster.stages.catalog.source_table import SourceTable

    engine = make_engine(settings.resolved_source_url, setting="EXTRACTION_SOURCE_URL")
    try:
        found = next(SourceTable(engine, settings).rows_of([record_id]), None)
    finally:
        engine.dispose()
    if found is None:
        why = "the source table has no eligible row of that id (EXTRACTION_SOURCE_PREDICATE says which are eligible)."
        raise PreviewError(f"record {record_id}", why)
    if found.problem is not None:
        raise found.problem
    return found.video


def _document(shown: _Shown, page: Path | None) -> dict[str, Any]:
    frames = shown.frames
    return {
        "what": shown.what,
        "record_id": shown.row.record_id if shown.what.startswith("record ") else None,
        "width_px": frames.width_px,
        "height_px": frames.height_px,
        "duration_seconds": frames.duration_seconds,
        "partial": frames.partial,
        "notes": list(frames.notes),
        "frames": [
            dict(zip(("frame_number", "pts_seconds", "target_seconds", "bytes"), row, strict=True))
            for row in _rows(frames)
        ],
        "html": None if page is None else str(page),
    }


def _rows(frames: EncodedFrames) -> list[tuple[int, float, float, int]]:
    times = (frames.frame_number.tolist(), frames.pts_seconds.tolist(), frames.target_seconds.tolist())
    return list(zip(*times, map(len, frames.jpegs), strict=True))


def _print(shown: _Shown) -> None:
    console.out.print(console.plain_line(shown.what), markup=False)
    for fact in shown.facts:
        console.out.print(f"  {console.plain_line(fact)}", markup=False)
    show = _picture_protocol()
    if show is not None:
        sys.stdout.write(show(_strip(shown.frames)) + "\n")
    table = Table(*_COLUMNS)
    for number, second, target, size in _rows(shown.frames):
        table.add_row(str(number), f"{second:.3f}", f"{target:.3f}", Text(str(size)))
    console.out.print(table, soft_wrap=False)


def _write_page(shown: _Shown, out: Path | None) -> Path:
    from extraction_dagster.stages.index.search import render_page, write_gallery

    figures = "\n".join(
        f'<li><figure><img alt="frame {number}" src="data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}">'
        f"<figcaption>{second:.3f} s, frame {number}</figcaption></figure></li>"
        for (number, second, *_), jpeg in zip(_rows(shown.frames), shown.frames.jpegs, strict=True)
    )
    notes = "\n".join(f"<li>{html.escape(fact)}</li>" for fact in shown.facts)
    body = f"<ul>\n{notes}\n</ul>\n<ol>\n{figures}\n</ol>"
    page = render_page(f"Preview of {shown.what}", style=_STYLE, body=body)
    if out is None:
        out = Path(tempfile.mkdtemp(prefix="extraction-preview-")) / "preview.html"
    write_gallery(out, page)
    return out


def _strip(frames: EncodedFrames) -> np.ndarray:
    """Some of the frames side by side, in rows as wide as the terminal: uint8, shape (H, W, 3), RGB."""
    import cv2

    from extraction_dagster.stages.decode.jpeg import decode_frames
    from extraction_dagster.stages.decode.sampling import evenly

    pictures = decode_frames(frames).data[evenly(len(frames), min(len(frames), _MOST_IN_STRIP))]
    scale = min(1.0, _THUMBNAIL_PX / min(pictures.shape[1:3]))
    size = (max(1, round(pictures.shape[2] * scale)), max(1, round(pictures.shape[1] * scale)))
    small = [cv2.resize(picture, size, interpolation=cv2.INTER_AREA) for picture in pictures]
    across = max(1, min(len(small), console.out.width * _COLUMN_PX // size[0]))
    small += [np.zeros_like(small[0])] * (-len(small) % across)
    return np.vstack([np.hstack(small[start : start + across]) for start in range(0, len(small), across)])


def _picture_protocol() -> Callable[[np.ndarray], str] | None:
    """How this terminal shows pictures; None where it shows none, or says nothing of it, or is a pipe."""
    if not console.out.is_terminal:
        return None
    term, program = os.environ.get("TERM", ""), os.environ.get("TERM_PROGRAM", "")
    if "kitty" in term or "ghostty" in term or program in {"ghostty", "WezTerm"}:
        return kitty
    if program == "iTerm.app" or os.environ.get("LC_TERMINAL") == "iTerm2":
        return iterm2
    return sixel if "sixel" in term or term in {"foot", "foot-extra", "mlterm", "contour"} else None


def kitty(picture: np.ndarray) -> str:
    """A picture in kitty's graphics protocol: compressed RGB, in chunks."""
    data = base64.b64encode(zlib.compress(np.ascontiguousarray(picture).tobytes())).decode()
    chunks = [data[at : at + _KITTY_CHUNK] for at in range(0, len(data), _KITTY_CHUNK)]
    head = f"a=T,f=24,o=z,s={picture.shape[1]},v={picture.shape[0]},"
    return "".join(
        f"\033_G{head if not number else ''}m={int(number < len(chunks) - 1)};{chunk}\033\\"
        for number, chunk in enumerate(chunks)
    )


def iterm2(picture: np.ndarray) -> str:
    """A picture in iTerm2's inline images protocol: a JPEG file."""
    import simplejpeg

    jpeg = simplejpeg.encode_jpeg(np.ascontiguousarray(picture), quality=90, colorspace="RGB")
    return f"\033]1337;File=inline=1;size={len(jpeg)}:{base64.b64encode(jpeg).decode()}\a"


def sixel(picture: np.ndarray) -> str:
    """A picture as sixels, in 216 colours: bands of six rows, colour by colour."""
    levels = (picture.astype(np.uint16) * (_SIXEL_LEVELS - 1) + 127) // 255
    colours = levels[..., 0] * _SIXEL_LEVELS**2 + levels[..., 1] * _SIXEL_LEVELS + levels[..., 2]
    colours = np.pad(colours, ((0, -len(colours) % 6), (0, 0)), mode="edge")
    used = np.unique(colours).tolist()
    percent = 100 // (_SIXEL_LEVELS - 1)
    palette = "".join(
        f"#{colour};2;{colour // 36 * percent};{colour // 6 % 6 * percent};{colour % 6 * percent}" for colour in used
    )
    return f"\033Pq{palette}{'-'.join(map(_band, colours.reshape(-1, 6, colours.shape[1])))}\033\\"


def _band(rows: np.ndarray) -> str:
    """Six rows: for each colour a line of characters whose bits say which of the six pixels have it."""
    weights = (1 << np.arange(6))[:, None]
    lines = []
    for colour in np.unique(rows).tolist():
        letters = ((rows == colour) * weights).sum(axis=0) + 63
        lines.append(f"#{colour}{bytes(letters.astype(np.uint8)).decode('ascii')}")
    return "$".join(lines)
