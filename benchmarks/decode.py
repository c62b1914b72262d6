"""What a sampled frame costs: CPU milliseconds, JPEG included, of each decoder beside the codec library alone.

    python benchmarks/decode.py [--seconds 10] [--rounds 3] [--videos 200] [--corpus FOLDER]

- `pyav`, `decord`: the whole of a worker's task, from the file to JPEGs.
- `limit`: what the library itself needs for `pyav`'s own plan: libavformat opens the file and reads its packets once,
  libavcodec decodes those that the plan feeds. No planning, no scaling, no JPEG.
- `codec`: libavcodec's share of it, on packets that lie in memory already.

All of them run in turn, on the same file, and the least of the rounds counts. Clips are rendered; a folder of real
videos, with a MANIFEST.csv, is measured too where it is at hand. CPU is user and system time on one thread. Last, one
worker process decodes `--videos` videos, and its memory is printed along the way.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import resource
import sys
import tempfile
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil

from extraction_dagster.errors import ExtractionError
from extraction_dagster.stages.decode.container import open_video
from extraction_dagster.stages.decode.decoder import DecodeLimits
from extraction_dagster.stages.decode.packets import read_packets
from extraction_dagster.stages.decode.pool import PoolOptions, decode_all
from extraction_dagster.stages.decode.pyav_decoder import _SKIPS_NONREF, PyAVDecoder, _display_order, _seconds
from extraction_dagster.stages.decode.quality import Quality, refine
from extraction_dagster.stages.decode.sampling import Sampling, select_frames
from extraction_dagster.stages.decode.task import DecodeJob, decode_job
from extraction_dagster.stages.decode.video_file import open_file

if TYPE_CHECKING:
    from collections.abc import Callable

LIMITS = DecodeLimits()
X264 = "keyint=60:min-keyint=60:scenecut=0:bframes=3"
CLIPS: dict[str, tuple[str, str, dict[str, str]]] = {
    "h264": ("libx264", "mp4", {"preset": "medium", "crf": "26", "x264-params": X264}),
    "hevc": ("libx265", "mp4", {"preset": "fast", "crf": "28", "x265-params": f"log-level=none:{X264}"}),
    "vp9": ("libvpx-vp9", "webm", {"deadline": "realtime", "cpu-used": "7", "b": "2M"}),
    "mpeg4": ("mpeg4", "mp4", {"bf": "2", "b": "4M"}),
}
SIZE, RATE, GOP = (1280, 720), 30, 60
MOST_PIXELS = 200_000_000  # of a real file's frames together: seconds, not minutes
MIB = 2**20
Costs = tuple[float, float, float, float]  # of pyav, decord, limit, codec


def main() -> None:
    """Run all and print a line each."""
    options = _options()
    _silence()
    with tempfile.TemporaryDirectory() as folder:
        clips = {name: render(Path(folder) / f"{name}.{CLIPS[name][1]}", name, options.seconds) for name in CLIPS}
        for mode in (Sampling("fps", 1.0), Sampling("uniform", num_frames=16)):
            print(
                f"\nrendered, 1280x720, {options.seconds} s, sampling {mode.mode}; CPU ms a sampled frame", flush=True
            )
            _compare(clips, mode, options.rounds)
        if (options.corpus / "MANIFEST.csv").is_file():
            print("\nreal videos, sampling fps")
            _compare(_real(options.corpus), Sampling("fps", 1.0), options.rounds, each=False)
        print("\nquality steps, 16 frames of 398x224; CPU ms a frame")
        _steps(clips["h264"])
        print(f"\nmemory of one worker over {options.videos} videos")
        _memory(list(clips.values()), options.videos)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=int, default=10, help="length of a rendered clip")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--videos", type=int, default=200, help="how many one worker decodes, for its memory")
    beside = Path(__file__).resolve().parents[1].parent / "shared" / "corpus"
    parser.add_argument("--corpus", type=Path, default=Path(os.environ.get("EXTRACTION_TEST_CORPUS") or beside))
    return parser.parse_args()


def _silence() -> None:
    """Codecs complain about odd files straight to stderr; keep Python's own way to it."""
    sys.stderr = os.fdopen(os.dup(2), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def render(path: Path, name: str, seconds: int) -> Path:
    """A textured background that pans, patches that cross it, and a little grain."""
    import av

    codec, _, options = CLIPS[name]
    random = np.random.default_rng(7)
    coarse = random.integers(0, 256, (60, 100, 3), dtype=np.uint8)
    ground = coarse.repeat(18, 0).repeat(18, 1) // 2 + random.integers(0, 96, (1080, 1800, 3), dtype=np.uint8)
    grain = random.integers(0, 6, (2 * SIZE[1], 2 * SIZE[0], 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=RATE, options=options)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = *SIZE, "yuv420p", GOP
        for number in range(seconds * RATE):
            x, y = number % 500, (number // 2) % 340
            image = (
                ground[y : y + SIZE[1], x : x + SIZE[0]] + grain[number * 37 % 720 :, number * 91 % 1280 :][:720, :1280]
            )
            at = 9 * number % 1100
            image[200:380, at : at + 180] = (30 + number % 200, 200, 90)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, RATE)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def _real(corpus: Path) -> dict[str, Path]:
    with (corpus / "MANIFEST.csv").open(encoding="utf-8") as file:
        entries = [entry for entry in csv.DictReader(file) if entry["path"].startswith("real/")]
    return {
        entry["path"]: corpus / entry["path"]
        for entry in entries
        if entry["decodes_ok"] == "yes"
        and int(entry["width"] or 0) * int(entry["height"] or 0) * int(entry["n_frames"] or 0) <= MOST_PIXELS
    }


def _compare(files: dict[str, Path], sampling: Sampling, rounds: int, *, each: bool = True) -> None:
    columns = " ".join(f"{name:>8}" for name in ("pyav", "decord", "limit", "codec"))
    print(f"{'':10} {'frames':>6} {columns}   pyav/limit  pyav/codec  decord/pyav")
    found: dict[str, list[Costs]] = {}
    for name, path in files.items():
        try:
            frames, costs = _cost(path, sampling, rounds)
        except ExtractionError as error:
            print(f"{name}: left out, {type(error).__name__}")
            continue
        found.setdefault(_codec(path), []).append(costs)
        if each:
            _print(name, frames, costs)
    if not each:
        for codec, rows in sorted(found.items()):
            _print(codec, len(rows), _means(rows), unit="files")
    _print("all", sum(map(len, found.values())), _means([row for rows in found.values() for row in rows]), unit="files")


def _print(name: str, count: int, costs: Costs, *, unit: str = "") -> None:
    pyav, decord, limit, codec = costs
    ratios = f"{pyav / limit:10.2f}  {pyav / codec:10.2f}  {decord / pyav:11.2f}"
    print(f"{name:10} {count:6} " + " ".join(f"{cost:8.2f}" for cost in costs) + f"   {ratios}  {unit}", flush=True)


def _means(rows: list[Costs]) -> Costs:
    """Geometric means: their ratios are the means of the ratios."""
    pyav, decord, limit, codec = (
        math.exp(sum(map(math.log, column)) / len(rows)) for column in zip(*rows, strict=True)
    )
    return pyav, decord, limit, codec


def _cost(path: Path, sampling: Sampling, rounds: int) -> tuple[int, Costs]:
    """Frames, and CPU milliseconds a frame."""
    jobs = {name: DecodeJob(1, "", str(path), decoder=name, sampling=sampling) for name in ("pyav", "decord")}
    frames = {name: len(decode_job(job)) for name, job in jobs.items()}
    least = [math.inf] * 4
    for _ in range(rounds):
        seconds = (
            _cpu_seconds(lambda: decode_job(jobs["pyav"])),
            _cpu_seconds(lambda: decode_job(jobs["decord"])),
            *_limit(path, sampling),
        )
        least = [min(pair) for pair in zip(least, seconds, strict=True)]
    counts = (frames["pyav"], frames["decord"], frames["pyav"], frames["pyav"])
    pyav, decord, limit, codec = (1000 * max(one, 1e-6) / count for one, count in zip(least, counts, strict=True))
    return frames["pyav"], (pyav, decord, limit, codec)


def _limit(path: Path, sampling: Sampling) -> tuple[float, float]:
    """CPU seconds of opening, reading and decoding, and of decoding alone, the packets that the planner feeds."""

    def read() -> None:
        with open_file(path) as file, open_video(file, LIMITS) as video:
            for _ in video.container.demux(video.stream):
                pass

    with open_file(path) as file, open_video(file, LIMITS) as video:
        index = read_packets(video, LIMITS)
        display = _display_order(video, index, LIMITS)
        ticks = index.pts[display]
        selection = select_frames(_seconds(ticks - ticks[0], video), sampling)
        targets = set(display[selection.frame_number].tolist())
        runs, packets, context = index.runs(sorted(targets)), index.kept or (), video.stream.codec_context
        skips = context.name in _SKIPS_NONREF

        def feed() -> None:
            for run in runs:
                for number in range(run.first, run.last + 1):
                    context.skip_frame = "NONREF" if skips and number not in targets else "DEFAULT"
                    context.decode(packets[number])
                context.decode(None)
                context.flush_buffers()

        codec = _cpu_seconds(feed)
    return _cpu_seconds(read) + codec, codec


def _steps(path: Path, rounds: int = 20) -> None:
    """Each step alone, then all; none leaves anything out, so that all of them see every frame."""
    sampling = Sampling("uniform", num_frames=16)
    video = PyAVDecoder().decode(path, sampling=sampling, short_side_px=224, limits=LIMITS)
    steps = {
        "crop_bars": Quality(crop_bars=True),
        "reject_solid": Quality(solid_deviation=1e-9),
        "scene": Quality(scene_distance=1e-9),
        "drop_duplicates": Quality(duplicate_bits=0),
        "all": Quality(True, 1e-9, 1e-9, 0),  # noqa: FBT003 - the record's order
    }
    for name, quality in steps.items():
        least = min(_cpu_seconds(lambda: refine(video, quality, path=str(path))) for _ in range(rounds))  # noqa: B023 - called at once
        print(f"{name:16} {1000 * least / len(video.frames):.3f}")


def _codec(path: Path) -> str:
    with open_file(path) as file, open_video(file, LIMITS) as video:
        return video.stream.codec_context.name


def _memory(files: list[Path], videos: int) -> None:
    """One worker that is never replaced; what it holds after each tenth of the videos."""
    jobs = (DecodeJob(number, "", str(files[number % len(files)])) for number in range(videos))
    options = PoolOptions(workers=1, timeout_seconds=300.0, memory_bytes=2**32, max_tasks=videos + 1)
    held: list[int] = []
    for _ in decode_all(jobs, options):
        held += [child.memory_info().rss for child in psutil.Process().children()]
    tenth = max(1, len(held) // 10)
    print("after each tenth, MiB: " + " ".join(f"{rss / MIB:.0f}" for rss in held[tenth - 1 :: tenth]))
    first, second = held[tenth : len(held) // 2], held[len(held) // 2 :]
    if first and second:
        print(f"largest in the first half {max(first) / MIB:.1f} MiB, in the second {max(second) / MIB:.1f} MiB")


def _cpu_seconds(function: Callable[[], object]) -> float:
    before = resource.getrusage(resource.RUSAGE_SELF)
    function()
    after = resource.getrusage(resource.RUSAGE_SELF)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
