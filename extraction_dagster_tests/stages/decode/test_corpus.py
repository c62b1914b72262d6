"""Real and hostile files, where a collection of them is at hand: EXTRACTION_TEST_CORPUS, or ../shared/corpus.

Its MANIFEST.csv says of each file what is in it and whether a full decode succeeds.
"""

import csv
import os
from pathlib import Path

import numpy as np
import pytest

from extraction_dagster.stages.decode.decoder import DecodeLimits
from extraction_dagster.stages.decode.geometry import Geometry
from extraction_dagster.stages.decode.pool import PoolOptions, decode_all
from extraction_dagster.stages.decode.pyav_decoder import PyAVDecoder
from extraction_dagster.stages.decode.sampling import Sampling
from extraction_dagster.stages.decode.task import DecodeJob

CHECKOUT = Path(__file__).resolve().parents[3]
CORPUS = Path(os.environ.get("EXTRACTION_TEST_CORPUS") or CHECKOUT.parent / "shared" / "corpus")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CORPUS / "MANIFEST.csv").is_file(), reason="EXTRACTION_TEST_CORPUS is not there"),
]

# Too much work for a test: minutes of 8K, and two of six minutes each.
TOO_MUCH = ("WebGL__Test.webm", "media__long_")
# Healthy, and yet not decoded: containers that are never opened, and what libavcodec 62 can't do any more.
NOT_OPENED = (
    "file-type__fixture-realmedia-video.rm",
    "file-type__fixture.apng",
    "syn__jpeg_renamed",
    "syn__raw_annexb",
)
UPSTREAM = ("WebGL__transparent-2frames.mp4",)
SMALL = 40_000_000  # pixels of all frames together
EXPECTED_ERRORS = {
    "NoVideoStreamError",
    "VideoDecodeError",
    "VideoEncryptedError",
    "VideoFormatError",
    "VideoOpenError",
}


def manifest(*, small=False):
    with (CORPUS / "MANIFEST.csv").open(encoding="utf-8") as file:
        entries = [entry for entry in csv.DictReader(file) if not any(name in entry["path"] for name in TOO_MUCH)]
    return [entry for entry in entries if not small or pixels(entry) <= SMALL]


def pixels(entry):
    return int(entry["width"] or 0) * int(entry["height"] or 0) * int(entry["n_frames"] or 0)


def healthy(entry):
    return entry["decodes_ok"] == "yes" and not any(name in entry["path"] for name in NOT_OPENED + UPSTREAM)


def test_a_run_over_every_file_ends_each_in_frames_or_a_known_error_and_loses_no_good_one():
    entries = manifest()
    sampling = Sampling("uniform", num_frames=3)
    jobs = [DecodeJob(n, "", str(CORPUS / entry["path"]), sampling=sampling) for n, entry in enumerate(entries)]
    options = PoolOptions(workers=2, timeout_seconds=120.0, memory_bytes=2**32)
    outcomes = {decoded.outcome.record_id: decoded.outcome for decoded in decode_all(jobs, options)}
    assert sorted(outcomes) == list(range(len(entries)))
    odd = {
        entries[number]["path"]: outcome.failure
        for number, outcome in outcomes.items()
        if outcome.failure and (healthy(entries[number]) or outcome.failure.error_type not in EXPECTED_ERRORS)
    }
    assert odd == {}


def test_pixels_and_times_equal_those_of_a_full_decode():
    compared, different = 0, []
    for entry in manifest(small=True):
        if healthy(entry):
            outcome = compare(CORPUS / entry["path"])
            compared += outcome is not None
            if outcome is False:
                different.append(entry["path"])
    print(f"{compared} files compared")
    assert different == []
    assert compared > 0


def compare(path):
    """Whether the sampled frames are those of a full decode; None when the file's own times contradict each other."""
    import av
    from av.video.reformatter import VideoReformatter

    sampling = Sampling("uniform", num_frames=12)
    video = PyAVDecoder().decode(path, sampling=sampling, short_side_px=96, limits=DecodeLimits())
    ticks = [at for at, _ in everything(path)]
    if None in ticks or len(set(ticks)) < len(ticks) or (np.diff(ticks) < 0).any():
        return None
    with av.open(str(path)) as container:
        base = largest(container).time_base
    seconds = np.array([float((at - ticks[0]) * base) for at in ticks])
    numbers = video.frames.frame_number
    expected = [max(n for n, at in enumerate(seconds) if at <= t + 1e-6) for t in video.frames.target_seconds]
    if numbers.tolist() != expected or video.frames.pts_seconds.tolist() != seconds[expected].tolist():
        return False
    scaler, geometry = VideoReformatter(), None
    wanted = {number: place for place, number in enumerate(expected)}
    for number, (_, frame) in enumerate(everything(path)):
        if number in wanted:
            with av.open(str(path)) as container:
                aspect = float(largest(container).sample_aspect_ratio or 1)
            geometry = geometry or Geometry.of(frame, sample_aspect=aspect, short_side_px=96)
            if not np.array_equal(geometry.show(frame, scaler), video.frames.data[wanted[number]]):
                return False
    return True


def largest(container):
    playable = [stream for stream in container.streams.video if stream.codec_context is not None and stream.frames != 0]
    playable = playable or [stream for stream in container.streams.video if stream.codec_context is not None]
    return max(playable, key=lambda stream: stream.codec_context.width * stream.codec_context.height)


def everything(path):
    """Every frame of a file from beginning to end, with its time in ticks."""
    import av

    with av.open(str(path)) as container:
        stream = largest(container)
        stream.codec_context.thread_count = 1
        for packet in container.demux(stream):
            if packet.size or packet.dts is None:
                for frame in packet.decode():
                    yield frame.pts, frame
