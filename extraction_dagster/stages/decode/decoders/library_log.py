"""What the codec library says in words: its errors, and what it knows of a stream."""

from __future__ import annotations

import re
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from extraction_dagster.stages.decode.decoders.container import OpenVideo

_STREAM = re.compile(r"^ *Stream #\d+:(\d+)", re.MULTILINE)
_errors_are_written = threading.Event()


def write_errors() -> None:
    """Have the library write its errors to stderr from now on; by default PyAV drops them."""
    import av.logging

    _errors_are_written.set()
    av.logging.restore_default_callback()
    av.logging.set_libav_level(av.logging.ERROR)


def described(video: OpenVideo) -> str:
    """What libavformat knows of a video's stream, side data among it, which PyAV 18 hands out in no other way.

    Source:
        libavformat `av_dump_format`; the lines relied on are held by test_upstream_decoders.py.
    """
    import av.logging

    av.logging.set_level(av.logging.INFO)
    try:
        words: str = video.container.dumps_format()  # type: ignore[attr-defined] # its stub lacks it
    finally:
        av.logging.set_level(None)
        if _errors_are_written.is_set():
            write_errors()
    parts = _STREAM.split(words)
    return dict(zip(parts[1::2], parts[2::2], strict=True)).get(str(video.stream.index), "")
