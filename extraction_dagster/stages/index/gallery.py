"""What a search found as one HTML file that needs nothing else: thumbnails inside, no script, nothing fetched."""

from __future__ import annotations

import base64
import errno
import html
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from extraction_dagster.errors.index import GalleryError
from extraction_dagster.files import write_atomically
from extraction_dagster.stages.decode.jpeg import shrink_jpeg

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_THUMBNAIL_PX = 200
_THUMBNAIL_QUALITY = 80
# The policy keeps the file harmless even where a text would slip through unescaped.
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.4 system-ui, sans-serif; margin: 1.5rem; color: #222; background: #fafafa; }}
.query, ol {{ display: flex; flex-wrap: wrap; gap: 1rem; padding: 0; list-style: none; }}
li, figure {{ margin: 0; width: 220px; background: #fff; border: 1px solid #ddd; border-radius: 6px; padding: 8px; }}
img, .none {{ width: 100%; height: 200px; object-fit: contain; background: #eee; display: block; }}
.none {{ line-height: 200px; text-align: center; color: #777; }}
b {{ font-size: 1.1em; }}
p {{ margin: .3rem 0 0; overflow-wrap: anywhere; }}
</style>
</head>
<body>
<h1>{title}</h1>
<div class="query">{query}</div>
<h2>{count} found</h2>
<ol>
{cards}
</ol>
</body>
</html>
"""


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
    return _PAGE.format(
        title=html.escape(title),
        query="".join(f"<figure>{_image(jpeg, 'query')}</figure>" for jpeg in query_jpegs),
        count=len(cards),
        cards="\n".join(map(_card, cards)),
    )


def write_gallery(path: Path, page: str) -> None:
    """Write the page: whole, or not at all.

    Raises:
        GalleryError: It can't be written there.
    """
    if path.is_dir():
        raise GalleryError(str(path), os.strerror(errno.EISDIR))
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
