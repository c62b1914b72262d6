"""What a file is by its first bytes, whatever its name: what is opened in which way, and what is refused by its name.

A table of videos holds photos, web pages with an error, playlists and archives as well. What begins like a container of
videos is left to the library, which looks closer.

Long because it is tables: each kind of content that its beginning gives away.
"""

from __future__ import annotations

import codecs
import os
import re
import struct
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_HEAD_BYTES = 4096
_SHOWN_BYTES = 60
_CHUNK_BYTES = 2**20
_MOST_JPEG_BYTES = 2**28
# Steps through a file that is made of nothing but tiny pieces.
_MOST_SEGMENTS, _MOST_BOXES, _MOST_BRANDS = 10_000, 2_000, 32
_INDEX_HEAD_BYTES = 2**18  # of a Matroska: where its tracks are, as a rule
_EBML = b"\x1a\x45\xdf\xa3"
_MATROSKA_CODEC = re.compile(rb"\x86[\x80-\xff]([VASB]_[A-Za-z0-9_/.]{1,40})")
_MOST_INDEX_BYTES = 2**25  # of an MP4's index that is searched for names
# A box's head: size and name.
_BOX, _BOX_BYTES = struct.Struct(">I4s"), 8
PICTURE_BRANDS = frozenset({b"heic", b"heix", b"hevc", b"mif1", b"msf1", b"avif"})
# An NAL unit's type is the lower 5 bits in H.264, and 6 bits in the middle of the first byte in HEVC.
_H264_BEGINS = frozenset({0x67, 0x47, 0x27, 0x09, 0x06})  # parameter set, delimiter, information
_HEVC_BEGINS = frozenset({0x40, 0x42, 0x46, 0x4E})
_MPEG_VIDEO_BEGINS = 0xB3
_MPEG4_BEGINS = 0xB0  # a sequence of objects; an object may come first as well


@dataclass(frozen=True, slots=True)
class Kind:
    """What a file is.

    Attributes:
        words: For a person, with an article.
        format: The library's name for a format that must be named to it; None for those that it finds out.
        is_photo: Its first picture is all that it shows.
        is_foreign: No picture can ever be in it.
        is_cut: Its end is missing.
        num_bytes: What belongs to it; None for all of the file.
    """

    words: str
    format: str | None = None
    is_photo: bool = False
    is_foreign: bool = False
    is_cut: bool = False
    num_bytes: int | None = None


_PNG = b"\x89PNG\r\n\x1a\n"
JPEG = Kind("a JPEG", "jpeg_pipe", is_photo=True)
MOTION_JPEG = Kind("a motion JPEG stream", "jpeg_pipe")
ANIMATED_WEBP = Kind("an animated WebP")
# Each beginning, and where it stands.
_MAGIC: tuple[tuple[int, bytes, Kind], ...] = (
    (0, b"\xff\xd8\xff", JPEG),
    (0, _PNG, Kind("a PNG", "png_pipe", is_photo=True)),
    (8, b"WEBP", Kind("a WebP", "webp_pipe", is_photo=True)),
    (0, b"YUV4MPEG2 ", Kind("a y4m stream", "yuv4mpegpipe")),
    (0, b"DKIF", Kind("an IVF stream", "ivf")),
    (0, b"\x12\0\x0a", Kind("a raw AV1 stream", "obu")),  # a delimiter without content, then the sequence's header
    (0, b"%PDF-", Kind("a PDF", is_foreign=True)),
    (0, b"PK\x03\x04", Kind("a ZIP archive", is_foreign=True)),
    (0, b"PK\x05\x06", Kind("an empty ZIP archive", is_foreign=True)),
    (0, b"Rar!", Kind("a RAR archive", is_foreign=True)),
    (0, b"7z\xbc\xaf\x27\x1c", Kind("a 7z archive", is_foreign=True)),
    (0, b"\x1f\x8b", Kind("gzip data", is_foreign=True)),
    (0, b"BZh", Kind("bzip2 data", is_foreign=True)),
    (0, b"\xfd7zXZ\0", Kind("xz data", is_foreign=True)),
    (0, b"\x28\xb5\x2f\xfd", Kind("zstd data", is_foreign=True)),
    (257, b"ustar", Kind("a tar archive", is_foreign=True)),
    (0, b"\x7fELF", Kind("a program", is_foreign=True)),
    (0, b"MZ", Kind("a program", is_foreign=True)),
    (0, b"II*\0", Kind("a TIFF picture", is_foreign=True)),
    (0, b"MM\0*", Kind("a TIFF picture", is_foreign=True)),
    (0, b"8BPS", Kind("a Photoshop picture", is_foreign=True)),
    (0, b"\xff\x0a", Kind("a JPEG XL picture", is_foreign=True)),
    (4, b"JXL ", Kind("a JPEG XL picture", is_foreign=True)),
    (4, b"jP  ", Kind("a JPEG 2000 picture", is_foreign=True)),
    (0, b"ID3", Kind("an MP3 file, sound only", is_foreign=True)),
    (0, b"\xff\xfb", Kind("an MP3 file, sound only", is_foreign=True)),
    *((0, bytes((0xFF, second)), Kind("an MP3 file, sound only")) for second in (0xF2, 0xF3, 0xFA)),
    *((0, bytes((0xFF, second)), Kind("an AAC file, sound only")) for second in (0xF0, 0xF1, 0xF8, 0xF9)),
    (0, b"#!AMR", Kind("an AMR file, sound only", is_foreign=True)),
    (0, b"MThd", Kind("a MIDI file, no pictures", is_foreign=True)),
    (8, b"AIFF", Kind("an AIFF file, sound only", is_foreign=True)),
    (0, b"fLaC", Kind("a FLAC file, sound only", is_foreign=True)),
    (8, b"WAVE", Kind("a WAV file, sound only", is_foreign=True)),
    (0, b"ffconcat", Kind("a playlist (ffconcat script)", is_foreign=True)),
    (0, b".RMF", Kind("a RealMedia file", is_foreign=True)),
    (0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", Kind("an Office document", is_foreign=True)),
    *((0, letter + b"WS", Kind("a Flash program (SWF)", is_foreign=True)) for letter in (b"F", b"C", b"Z")),
    (0, b"SQLite format 3", Kind("an SQLite database", is_foreign=True)),
)
# Texts, by how they begin once white space, a byte order mark and what precedes the first element are gone.
_TEXTS: tuple[tuple[re.Pattern[bytes], Kind], ...] = tuple(
    (re.compile(pattern, re.IGNORECASE | re.DOTALL), kind)
    for pattern, kind in (
        (rb"#EXTM3U", Kind("a playlist (HLS)", is_foreign=True)),
        (rb"<(\w{1,20}:)?MPD\b", Kind("a playlist (DASH manifest)", is_foreign=True)),
        (rb"<(asx|smil|playlist|SmoothStreamingMedia)\b|\[playlist\]", Kind("a playlist", is_foreign=True)),
        (rb"<svg\b", Kind("an SVG drawing", is_foreign=True)),
        (
            rb"<(!doctype html|html|head|body|title|meta|link|style|script|noscript|iframe|h[1-6]|div|p|span|center)\b",
            Kind("a web page"),
        ),
        (rb"<Error>", Kind("an XML document")),
        (rb"\{\s*[\"}]|\[\s*[\[\]{\"]", Kind("a JSON document")),
        (rb"version https://git-lfs", Kind("a Git LFS pointer")),
        (rb"BM.{4}\0{4}", Kind("a BMP picture", is_foreign=True)),
    )
)
_XML = Kind("an XML document")
_PROLOGUE = ((b"<?xml", b"?>"), (b"<!--", b"-->"))
_MOST_COMMENTS = 16
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")
# Codecs without a decoder, by the code that a container gives them.
_CODECS = {
    "encv": "encrypted",
    "bvc1": "ByteDance",
    "bvc2": "ByteDance",
    "vvc1": "H.266",
    "vvi1": "H.266",
    "evc1": "EVC",
    "lvc1": "LCEVC",
    "avs3": "AVS3",
    "cav3": "AVS3",
    "rv60": "RealVideo",
}


class Reading:
    """A reading of a file from its beginning, with what a library that reads through Python asks for.

    Attributes:
        name: The file's name; its ending helps to tell containers apart.
    """

    def __init__(self, descriptor: int, name: str, *, start: int, end: int) -> None:
        self.name = name
        self._descriptor, self._start, self._size, self._at = descriptor, start, end - start, 0

    def read(self, size: int) -> bytes:
        """The next bytes, `size` at most; none at the end."""
        found = os.pread(self._descriptor, max(0, min(size, self._size - self._at)), self._start + self._at)
        self._at += len(found)
        return found

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a place, and say where that is."""
        bases = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}
        self._at = max(0, bases[whence] + offset)
        return self._at

    def tell(self) -> int:
        """Where the reading is."""
        return self._at


def kind_of(reading: Reading) -> Kind | None:
    """What a file is; None where its beginning says nothing, or that of a container for videos.

    Args:
        reading: At the file's beginning; it is moved.
    """
    head = reading.read(_HEAD_BYTES)
    if not head:
        return Kind("empty (0 bytes)")
    if head[4:8] == b"ftyp":
        return None
    if head.startswith(b"\xff\xd8\xff"):
        return _jpeg(reading)
    for at, magic, kind in _MAGIC:
        if head[at : at + len(magic)] == magic:
            return _looked_into(reading, head, kind)
    return _raw_stream(head) or _text(head)


def shown(head: bytes) -> str:
    """The beginning of a text, in one line and without control characters."""
    text = head[:_SHOWN_BYTES].decode("utf-8", "replace")
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


def _looked_into(reading: Reading, head: bytes, kind: Kind) -> Kind:
    """Whether a picture moves, and whether its end is there."""
    size = reading.seek(0, 2)
    if kind.format == "png_pipe":
        if b"acTL" in head[: head.find(b"IDAT") if b"IDAT" in head else None]:
            return Kind("an animated PNG", "apng")
        return replace(kind, is_cut=find(reading, b"IEND", len(_PNG)) is None)
    if kind.format == "webp_pipe":
        if head[12:16] == b"VP8X" and head[20] & 0x02:
            return ANIMATED_WEBP
        return replace(kind, is_cut=size < _BOX_BYTES + int.from_bytes(head[4:8], "little"))
    return kind


def _raw_stream(head: bytes) -> Kind | None:
    """A stream without a container: 00 00 01 and a unit that may stand first."""
    start = head.find(b"\0\0\1")
    if not 0 <= start <= 1 or any(head[:start]):
        return None
    first, second = head[start + 3 : start + 4], head[start + 4 : start + 5]
    if not second:
        return None
    if first[0] in _HEVC_BEGINS and second[0] == 1:
        return Kind("a raw HEVC stream", "hevc")
    if first[0] in _H264_BEGINS:
        return Kind("a raw H.264 stream", "h264")
    if first[0] == _MPEG4_BEGINS or (first[0] == 0 and head[start + 4 : start + 7] == b"\0\0\1"):
        return Kind("a raw MPEG-4 stream", "m4v")
    return Kind("a raw MPEG video stream", "mpegvideo") if first[0] == _MPEG_VIDEO_BEGINS else None


def _text(head: bytes) -> Kind | None:
    if head.startswith(_UTF_16):
        head = head.decode("utf-16", "ignore").encode()
    text = head.removeprefix(b"\xef\xbb\xbf").strip()
    content = _after_prologue(text)
    found = next((kind for pattern, kind in _TEXTS if pattern.match(content)), None)
    if found is None and text.startswith(b"<?xml"):
        found = _XML
    if found is None and _is_text(text):
        found = Kind("text")
    if found is None:
        return None if any(head) else Kind(f"nothing but zeros in its first {len(head)} bytes")
    return found if found.is_foreign else replace(found, words=f"{found.words} ({shown(text)!r})")


def _after_prologue(text: bytes) -> bytes:
    """What follows an XML declaration and comments, as far as that is in the beginning that was read."""
    for _ in range(_MOST_COMMENTS):
        ending = next((after for before, after in _PROLOGUE if text.startswith(before)), None)
        if ending is None:
            break
        text = text.partition(ending)[2].lstrip()
    return text


def _is_text(text: bytes) -> bool:
    """Whether it is UTF-8, cut off anywhere, without control characters."""
    try:
        letters, _ = codecs.utf_8_decode(text, "strict", False)  # noqa: FBT003 - its third is not named
    except UnicodeDecodeError:
        return False
    return bool(letters) and all(letter.isprintable() or letter in "\t\r\n\f" for letter in letters)


def _jpeg(reading: Reading) -> Kind:
    """A photo; a stream of them where another begins at once, which no photo's own second picture announces."""
    end, announces_more = jpeg_end(reading)
    if end is not None and not announces_more:
        reading.seek(end)
        if reading.read(3) == b"\xff\xd8\xff":
            return MOTION_JPEG
    return replace(JPEG, is_cut=end is None, num_bytes=end)


def jpeg_end(reading: Reading) -> tuple[int | None, bool]:
    """Where a JPEG ends, None when it does not, and whether it announces further pictures of its own (MPF).

    Segments are stepped over, since thumbnails in them have an end of their own; after the first scan, an end is one.
    """
    at, has_more = 2, False
    for _ in range(_MOST_SEGMENTS):
        reading.seek(at)
        head = reading.read(8)
        if len(head) < 8 or head[0] != 0xFF:  # noqa: PLR2004 - marker, length, beginning
            return None, has_more
        if head[1] == 0xFF:  # noqa: PLR2004 - padding
            at += 1
            continue
        has_more = has_more or (head[1] == 0xE2 and head[4:8] == b"MPF\0")  # noqa: PLR2004 - APP2
        at += 2 + int.from_bytes(head[2:4])
        if head[1] == 0xDA:  # noqa: PLR2004 - start of scan
            found = find(reading, b"\xff\xd9", at)
            return (None if found is None else found + 2), has_more
    return None, has_more


def find(reading: Reading, wanted: bytes, start: int) -> int | None:
    """Where `wanted` stands first, from `start` on; None when it does not, in what is searched."""
    at = start
    while at < start + _MOST_JPEG_BYTES:
        reading.seek(at)
        chunk = reading.read(_CHUNK_BYTES + len(wanted) - 1)
        if (place := chunk.find(wanted)) >= 0:
            return at + place
        if len(chunk) < len(wanted) or len(chunk) < _CHUNK_BYTES:
            return None
        at += _CHUNK_BYTES
    return None


def motion_part(reading: Reading) -> int | None:
    """Where the video of a motion photo begins: an MP4 behind a JPEG, or in a box of its own in a HEIC; else None.

    Phones say in metadata of several kinds where it is; it is looked for instead.
    """
    head = reading.read(12)
    if head.startswith(b"\xff\xd8\xff"):
        end, _ = jpeg_end(reading)
        return None if end is None else _mp4_from(reading, end)
    if head[4:8] == b"ftyp" and head[8:12] in PICTURE_BRANDS:
        return next((at + _BOX_BYTES for name, at, _ in boxes(reading) if name == b"mpvd"), None)
    return None


def _mp4_from(reading: Reading, start: int) -> int | None:
    at = start
    for _ in range(_MOST_BRANDS):
        found = find(reading, b"ftyp", at)
        if found is None:
            return None
        if {b"moov", b"mdat"} <= {name for name, _, _ in boxes(reading, found - 4)}:
            return found - 4
        at = found + 4
    return None


def boxes(reading: Reading, at: int = 0) -> Iterator[tuple[bytes, int, int]]:
    """The outermost boxes of an MP4, a MOV, a HEIC: name, where it begins, where it ends, as far as that is sound."""
    end = reading.seek(0, 2)
    for _ in range(_MOST_BOXES):
        if at + _BOX_BYTES > end:
            return
        reading.seek(at)
        head = reading.read(_BOX_BYTES)
        if len(head) < _BOX_BYTES:  # it was cut off meanwhile
            return
        size, name = _BOX.unpack(head)
        if size == 1:
            size = int.from_bytes(reading.read(8))
        elif size == 0:
            size = end - at
        if size < _BOX_BYTES:
            return
        yield name, at, min(at + size, end)
        at += size


def index_faults(reading: Reading) -> str | None:
    """What is wrong with an MP4 whose index is missing; None where it has one, or is no MP4."""
    size = reading.seek(0, os.SEEK_END)
    found = {name: (start, end) for name, start, end in boxes(reading)}
    names = found.keys()
    if b"moov" in names:
        start, end = found[b"moov"]
        reading.seek(start)
        is_cut = end == size < start + int.from_bytes(reading.read(4))
        return "an MP4 whose index is cut off" if is_cut else None
    if not names & {b"ftyp", b"styp", b"mdat", b"moof"}:
        return None
    if b"moof" in names or b"styp" in names:
        return "a fragment of a stream without its beginning (no moov box)"
    if b"meta" in names:
        return None
    return "an MP4 without its index (no moov box): cut off, or still being written"


def is_index_alone(reading: Reading) -> bool:
    """Whether it is an MP4's index without any pictures: a stream's first part, or a file that is cut off behind it."""
    found = {name: end - start for name, start, end in boxes(reading)}
    return b"moov" in found and b"moof" not in found and found.get(b"mdat", 0) <= 2 * _BOX_BYTES


def codes_in_index(reading: Reading) -> list[str]:
    """The codes of the codecs that an MP4's or a Matroska's index names, track by track; empty for any other."""
    begin = reading.read(_INDEX_HEAD_BYTES)
    if begin.startswith(_EBML):
        return [name.decode() for name in _MATROSKA_CODEC.findall(begin)]
    codes = []
    for track in _index(reading).split(b"trak")[1:]:
        at = track.find(b"stsd")
        codes.append(_printable(track[at + 16 : at + 20]) if at >= 0 else "")
    return codes


def encryption_scheme(reading: Reading) -> str | None:
    """How an MP4 says that it is encrypted (cenc, cbcs …); None where it does not say it."""
    index = _index(reading)
    at = index.find(b"schm")
    return _printable(index[at + 8 : at + 12]) if at >= 0 else None


def named_codec(code: str) -> str:
    """A code as a person may know it: `bvc2 (ByteDance)`."""
    maker = _CODECS.get(code)
    return f"{code} ({maker})" if maker else code


def _index(reading: Reading) -> bytes:
    for name, start, end in boxes(reading):
        if name == b"moov":
            reading.seek(start)
            return reading.read(min(end - start, _MOST_INDEX_BYTES))
    return b""


def _printable(code: bytes) -> str:
    return "".join(chr(byte) if 0x20 < byte < 0x7F else "?" for byte in code)  # noqa: PLR2004 - ASCII
