"""The decoder `decord`, which many know.

It seeks by its own index, which is wrong on open groups of pictures, MPEG-TS and streams cut without re-encoding; see
docs/adr/0001. The container's whitelist and the limits are the same as for the default decoder: PyAV looks first.
"""

from __future__ import annotations

import itertools
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from extraction_dagster.errors.decode import DecoderMissingError, VideoDecodeError, VideoFormatError, VideoTooLongError
from extraction_dagster.stages.decode.decoders.container import open_file, open_video, packets_of, raise_out_of_memory
from extraction_dagster.stages.decode.decoders.decoder import DecodedVideo, DecodeLimits, shortfall
from extraction_dagster.stages.decode.decoders.geometry import Geometry
from extraction_dagster.stages.decode.sampling import Sampling, select_frames

if TYPE_CHECKING:
    from pathlib import Path

    from extraction_dagster.stages.decode.decoders.container import OpenVideo, VideoFile

# Matroska and WebM, Flash, Ogg, ASF, GIF, MXF.
_MAGIC = (b"\x1a\x45\xdf\xa3", b"FLV\x01", b"OggS", b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", b"GIF8", b"\x06\x0e\x2b\x34")
_SOURCE_LINE = re.compile(r"^(\[[0-9:]+\] \S+: )+")


def decode_with_decord(
    video: Path,
    *,
    sampling: Sampling,
    short_side_px: int,
    limits: DecodeLimits,
    tone_map: bool = True,  # noqa: ARG001 - decord converts colours by itself
) -> DecodedVideo:
    """Decode the frames that decord takes for those shown at the sampled times; see `Decoder`."""
    decord = _import_decord()
    with open_file(video) as file:
        return _decode(decord, file, sampling, short_side_px, limits)


def _decode(
    decord: Any,  # noqa: ANN401 - decord has no types
    file: VideoFile,
    sampling: Sampling,
    short_side_px: int,
    limits: DecodeLimits,
) -> DecodedVideo:
    with open_video(file, limits) as opened:
        (width, height), first = _first_frame(opened, short_side_px)
        late, notes = opened.late_seconds(first), opened.notes(0.0)
        claimed = opened.claimed_seconds(first, late_seconds=late)
    _require_firm_magic(file)  # after the look by PyAV, which says what else it is
    try:
        reader = decord.VideoReader(
            file.alias, ctx=decord.cpu(0), width=width, height=height, num_threads=1, fault_tol=-1
        )
        spans = np.asarray(reader.get_frame_timestamp(np.arange(len(reader))), np.float64)
        pts_seconds = np.maximum.accumulate(spans[:, 0] - spans[0, 0])
        _check_length(file.path, float(pts_seconds[-1]), claimed, limits)
        keyframe = np.isin(np.arange(len(reader)), reader.get_key_indices()) if sampling.needs_keyframes else None
        selection = select_frames(pts_seconds, sampling, keyframe)
        limits.check_batch(file.path, num_frames=len(selection), width_px=width, height_px=height)
        data = reader.get_batch(selection.frame_number).asnumpy()
    except (decord.DECORDError, RuntimeError, AssertionError) as error:
        raise VideoDecodeError(str(file.path), listed_frames=0, why=_first_line(error)) from error
    covered = float(spans[:, 1].max() - spans[0, 0])
    frames = selection.batch(data, pts_seconds, start_seconds=late)
    return DecodedVideo(frames, claimed, shortfall(covered_seconds=covered, claimed_seconds=claimed), notes)


def _require_firm_magic(file: VideoFile) -> None:
    """Refuse what does not begin as its kind always does: decord takes no list of formats, and guesses by itself."""
    begin = file.reading().read(16)
    if begin[4:8] == b"ftyp" or begin.startswith(_MAGIC) or (begin[:4] == b"RIFF" and begin[8:12] == b"AVI "):
        return
    raise VideoFormatError(str(file.path), "mp4, mov, matroska, webm, avi, flv, ogg, asf or mxf, for decord")


def _import_decord() -> Any:  # noqa: ANN401 - decord has no types
    try:
        import decord
    except ImportError as error:
        raise DecoderMissingError("decord", str(error)) from error
    decord.logging.set_level(decord.logging.ERROR)
    return decord


def _first_frame(video: OpenVideo, short_side_px: int) -> tuple[tuple[int, int], int]:
    """Width and height of the frames as shown, which decord wants before it has seen one, and the first one's tick."""
    import av

    try:
        decode = video.stream.codec_context.decode
        for frame in itertools.chain.from_iterable(map(decode, itertools.chain(packets_of(video), [None]))):
            geometry = Geometry.of(frame, sample_aspect=video.sample_aspect, short_side_px=short_side_px)
            return geometry.shown_size, frame.pts if frame.pts is not None else video.stream.start_time or 0
        why = "no packet gave a frame"
    except av.error.FFmpegError as error:
        raise_out_of_memory(error)
        why = error.strerror or type(error).__name__
    raise VideoDecodeError(str(video.path), listed_frames=video.stream.frames, why=why)


def _check_length(video: Path, seconds: float, claimed: float | None, limits: DecodeLimits) -> None:
    if seconds <= limits.max_duration_seconds:
        return
    if claimed is not None and claimed <= limits.max_duration_seconds:
        why = f"decord spreads its {claimed:.1f} s over {seconds:.0f} s, as it does where packets carry no time"
        raise VideoDecodeError(str(video), listed_frames=0, why=why)
    raise VideoTooLongError(str(video), seconds=seconds, max_seconds=limits.max_duration_seconds)


def _first_line(error: Exception) -> str:
    """The first line of a message that begins with a C++ source line and goes on with a stack."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return _SOURCE_LINE.sub("", line)
