"""What is known of pictures and videos before a decoder gets them: a JPEG's header, which must fit, and common codecs.

Loads nothing else, since each decoding worker loads it.
"""

from __future__ import annotations

from typing import Final

_START: Final = b"\xff\xd8\xff"
# Baseline alone: what this project writes. A progressive file of a few kilobytes may take seconds, scan by scan.
_BASELINE: Final = 0xC0
_FRAMES: Final = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # how a picture is coded; the three are tables
_WITHOUT_LENGTH: Final = frozenset({0x01, *range(0xD0, 0xDA)})
MAX_STORED_PIXELS: Final = 2**26
# How frames are made and kept, in a word each for fingerprints: how they are scaled, the colour resolution of their
# JPEGs (4:2:0 would blur what an embedding model sees), the layout of their shards.
SCALING: Final = "area, full chroma"
SUBSAMPLING: Final = "444"
FRAMES_LAYOUT: Final = 1
# What players and cameras write today, and what archives are full of.
COMMON_CODECS: Final = (
    *("h264", "hevc", "libdav1d", "av1", "vp8", "vp9", "mpeg4", "mpeg2video", "mpeg1video", "mpegvideo", "h263"),
    *("mjpeg", "msmpeg4v1", "msmpeg4v2", "msmpeg4", "wmv1", "wmv2", "wmv3", "vc1", "flv", "theora", "prores", "dnxhd"),
    *("dvvideo", "ffv1", "rawvideo", "gif", "png", "apng", "webp"),
)


def jpeg_size_px(jpeg: bytes, *, only_baseline: bool = True) -> tuple[int, int] | None:
    """Width and height from a JPEG's header; None when it is no JPEG, or not a baseline one.

    Looks at the segments before the picture, of which there are as many as fit into the first 64 KiB.
    """
    if not jpeg.startswith(_START):
        return None
    at, end = 2, min(len(jpeg), 65_536)
    while at + 9 <= end and jpeg[at] == 0xFF:  # noqa: PLR2004 - what begins a segment
        kind = jpeg[at + 1]
        if kind == 0xFF:  # noqa: PLR2004 - filled up
            at += 1
        elif kind in _FRAMES:
            height, width = (int.from_bytes(jpeg[at + part : at + part + 2], "big") for part in (5, 7))
            is_wanted = kind == _BASELINE or not only_baseline
            return (width, height) if is_wanted and width and height else None
        elif kind in _WITHOUT_LENGTH:
            return None
        else:
            at += 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
    return None


def stored_jpeg_fault(jpeg: bytes, *, width_px: int, height_px: int) -> str | None:
    """Why a stored frame is not to be decoded; None for nothing.

    Args:
        jpeg: As it was stored.
        width_px: Its width, as its shard lists it.
        height_px: Its height.
    """
    found = jpeg_size_px(jpeg)
    if found is None:
        return "it does not begin as a baseline JPEG does"
    if found != (width_px, height_px):
        return f"it is {found[0]}x{found[1]}, and its shard says {width_px}x{height_px}"
    if width_px * height_px > MAX_STORED_PIXELS:
        return f"it has more than {MAX_STORED_PIXELS} pixels"
    return None
