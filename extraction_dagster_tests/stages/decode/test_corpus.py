"""Real and hostile files, where a collection of them is at hand: EXTRACTION_TEST_CORPUS, or ../shared/corpus.

Its MANIFEST.csv says of each file what is in it and whether a full decode succeeds. Of the files that are alike there
(folder, codec, container, pixels, class and soundness) the smallest stands for the others; the full profile, which the
nightly workflow runs, takes every file.
"""

import csv
import os
from fractions import Fraction
from pathlib import Path

import hypothesis
import numpy as np
import pytest

from extraction_dagster.stages.decode.decoders.container import open_file, open_video
from extraction_dagster.stages.decode.decoders.decoder import DecodeLimits
from extraction_dagster.stages.decode.decoders.pictures import Pictures
from extraction_dagster.stages.decode.decoders.pyav import decode_with_pyav
from extraction_dagster.stages.decode.sampling import Sampling
from extraction_dagster.stages.decode.task import DecodeJob
from extraction_dagster.stages.decode.workers.pool import PoolOptions, decode_as_ready

CHECKOUT = Path(__file__).resolve().parents[3]
CORPUS = Path(os.environ.get("EXTRACTION_TEST_CORPUS") or CHECKOUT.parent / "shared" / "corpus").resolve()
IS_THERE = (CORPUS / "MANIFEST.csv").is_file()
pytestmark = [
    pytest.mark.corpus,
    *([pytest.mark.slow] if IS_THERE else []),  # where there is no such folder, its absence breaks no promise to run
    pytest.mark.skipif(not IS_THERE, reason="EXTRACTION_TEST_CORPUS is not there"),
]

# Too much work for a test: minutes of 8K, and two of six minutes each.
TOO_MUCH = ("WebGL__Test.webm", "media__long_")
# Healthy, and yet not decoded: containers that are never opened, and what libavcodec 62 can't do any more.
NOT_OPENED = ("file-type__fixture-realmedia-video.rm",)
UPSTREAM = ("WebGL__transparent-2frames.mp4",)
MICROSECOND = 1e-6  # a difference of two clocks
SMALL = 40_000_000  # pixels of all frames together
GOOD = "real/dinotool__nasa.mp4"
# Not healthy by ffmpeg 5.1, and yet neither an error nor flagged.
DECODES_BY_NOW = ("media__sample_vvc.mp4",)
NOTHING_IS_MISSING = ("WebGL__npot-video.mp4", "mediabunny__no-aud.ts", "mp4parse-rust__alpha_video_moov_is_moop.avif")
CODEC_IS_SILENT = ("wuffs__",)  # damage within a GIF's picture reaches the library's log alone
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
    entries = [entry for entry in entries if not small or pixels(entry) <= SMALL]
    return entries if hypothesis.settings.get_current_profile_name() == "full" else one_of_each_kind(entries)


def one_of_each_kind(entries):
    kinds = {}
    for entry in sorted(entries, key=lambda entry: (pixels(entry), int(entry["bytes"] or 0))):
        alike = [entry[name] for name in ("codec", "container", "pix_fmt", "rotation", "class", "decodes_ok")]
        kinds.setdefault((entry["path"].partition("/")[0], *alike), entry)
    return list(kinds.values())


def pixels(entry):
    return int(entry["width"] or 0) * int(entry["height"] or 0) * int(entry["n_frames"] or 0)


def healthy(entry):
    return entry["decodes_ok"] == "yes" and not any(name in entry["path"] for name in NOT_OPENED + UPSTREAM)


def kind(outcome):
    if outcome.failure is not None:
        return outcome.failure.error_type
    return "partial" if outcome.frames.partial else "frames"


def run_over(paths, decoder):
    """What became of each file, and of a good one that follows it."""
    sampling = Sampling("uniform", num_frames=3)
    every = [path for hostile in paths for path in (hostile, GOOD)]
    jobs = [DecodeJob(n, "", str(CORPUS / path), decoder, sampling) for n, path in enumerate(every)]
    options = PoolOptions(workers=2, timeout_seconds=120.0, memory_bytes=2**32)
    outcomes = [decoded.outcome for decoded in filter(None, decode_as_ready(jobs, options))]
    kinds = {outcome.record_id: kind(outcome) for outcome in outcomes}
    assert sorted(outcome.record_id for outcome in outcomes) == list(range(len(jobs)))
    assert {kinds[n] for n in range(1, len(jobs), 2)} == {"frames"}
    return {path: kinds[2 * n] for n, path in enumerate(paths)}


def test_every_healthy_file_gives_frames_and_every_other_one_an_error_or_a_flag():
    kinds = run_over([entry["path"] for entry in manifest()], "pyav")
    known = EXPECTED_ERRORS | {"frames", "partial"}
    assert {path: found for path, found in kinds.items() if found not in known} == {}
    lost = [entry["path"] for entry in manifest() if healthy(entry) and kinds[entry["path"]] in EXPECTED_ERRORS]
    assert lost == []
    silent = [entry["path"] for entry in manifest() if not sound(entry) and kinds[entry["path"]] == "frames"]
    assert silent == []


def sound(entry):
    """Whether frames without a flag are what is due."""
    fine = DECODES_BY_NOW + NOTHING_IS_MISSING + CODEC_IS_SILENT
    return entry["decodes_ok"] == "yes" or any(name in entry["path"] for name in fine)


def test_no_hostile_file_harms_a_good_one_where_decord_decodes():
    kinds = run_over([entry["path"] for entry in manifest() if entry["path"].startswith("hostile/")], "decord")
    assert set(kinds.values()) <= EXPECTED_ERRORS | {"frames", "partial"}


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

    sampling = Sampling("uniform", num_frames=12)
    video = decode_with_pyav(path, sampling=sampling, short_side_px=96, limits=DecodeLimits())
    ticks = [at for at, _ in everything(path)]
    if None in ticks or len(set(ticks)) < len(ticks) or (np.diff(ticks) < 0).any():
        return None
    with av.open(str(path)) as container:
        base, start = largest(container).time_base, start_of_sound(container)
    late = 0 if start is None else max(0, ticks[0] * base - start)
    late = late if late >= Fraction(1, 1000) else 0  # clocks of two bases differ by as much
    seconds = np.array([float((at - ticks[0]) * base) for at in ticks]) + float(late)
    numbers = video.frames.frame_number
    expected = [max(n for n, at in enumerate(seconds) if at <= t + 1e-6) for t in video.frames.target_seconds]
    if numbers.tolist() != expected or np.abs(video.frames.pts_seconds - seconds[expected]).max() > MICROSECOND:
        return False
    if not late and video.frames.pts_seconds.tolist() != seconds[expected].tolist():
        return False
    wanted = {number: place for place, number in enumerate(expected)}
    with open_file(path) as file, open_video(file, DecodeLimits()) as opened:
        painter = Pictures(opened, short_side_px=96, limits=DecodeLimits(), tone_map=True)
        for number, (_, frame) in enumerate(everything(path)):
            if number in wanted:
                shown = painter.together([painter.show(frame, num_frames=12)])[0]
                if shown.shape == video.frames.data.shape[1:] and not np.array_equal(
                    shown, video.frames.data[wanted[number]]
                ):
                    return False
    return True


def largest(container):
    playable = [stream for stream in container.streams.video if stream.codec_context is not None and stream.frames != 0]
    playable = playable or [stream for stream in container.streams.video if stream.codec_context is not None]
    return max(playable, key=lambda stream: stream.codec_context.width * stream.codec_context.height)


def start_of_sound(container):
    """Where sound begins on the file's clock, by its first packet; None without sound. Before zero none is heard."""
    packets = container.demux(*container.streams.audio) if container.streams.audio else ()
    known = (max(0, packet.pts) * packet.time_base for packet in packets if packet.pts is not None)
    return next(known, None)


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
