"""What a sampled frame costs: CPU milliseconds, JPEG included, of each decoder beside the codec library alone.

    python benchmarks/decode.py [--seconds 10] [--rounds 3] [--corpus FOLDER]

- `pyav`, `decord`: the whole of a worker's task, from the file to JPEGs.
- `limit`: what the library itself needs for `pyav`'s own plan: libavformat opens the file and reads its packets once,
  libavcodec decodes those that the plan feeds. No planning, no scaling, no JPEG.
- `output`: what libswscale and libjpeg-turbo need to scale the sampled frames and to write them.

All of them run in turn, on the same file, and the least of the rounds counts. Clips are rendered; a folder of real
videos, with a MANIFEST.csv, is measured too where it is at hand. CPU is user and system time on one thread.
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
import simplejpeg

from extraction_dagster.errors import ExtractionError
from extraction_dagster.media import SUBSAMPLING
from extraction_dagster.stages.decode.decoders.container import open_file, open_video
from extraction_dagster.stages.decode.decoders.decoder import DecodeLimits
from extraction_dagster.stages.decode.decoders.geometry import Geometry
from extraction_dagster.stages.decode.decoders.packets import read_packets
from extraction_dagster.stages.decode.decoders.pyav import _SKIPS_NONREF, _display_order, _seconds, decode_with_pyav
from extraction_dagster.stages.decode.quality import Quality, refine
from extraction_dagster.stages.decode.sampling import Sampling, select_frames
from extraction_dagster.stages.decode.task import DecodeJob, decode_job
from extraction_dagster.stages.decode.workers.process import ENVIRONMENT

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
Costs = tuple[float, float, float, float]  # of pyav, decord, limit, output


def main() -> None:
    """Run all and print a line each."""
    options = _options()
    _as_in_a_worker()
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


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=int, default=10, help="length of a rendered clip")
    parser.add_argument("--rounds", type=int, default=3)
    beside = Path(__file__).resolve().parents[1].parent / "shared" / "corpus"
    parser.add_argument("--corpus", type=Path, default=Path(os.environ.get("EXTRACTION_TEST_CORPUS") or beside))
    return parser.parse_args()


def _as_in_a_worker() -> None:
    """Start anew with a worker's environment, which counts for all that is measured."""
    if not ENVIRONMENT.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ENVIRONMENT})  # noqa: S606 - ourselves


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
    columns = " ".join(f"{name:>8}" for name in ("pyav", "decord", "limit", "output"))
    print(f"{'':10} {'frames':>6} {columns}   pyav/limit  pyav/(limit+output)  decord/pyav")
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
    pyav, decord, limit, output = costs
    ratios = f"{pyav / limit:10.2f}  {pyav / (limit + output):19.2f}  {decord / pyav:11.2f}"
    print(f"{name:10} {count:6} " + " ".join(f"{cost:8.2f}" for cost in costs) + f"   {ratios}  {unit}", flush=True)


def _means(rows: list[Costs]) -> Costs:
    """Geometric means: their ratios are the means of the ratios."""
    pyav, decord, limit, output = (
        math.exp(sum(map(math.log, column)) / len(rows)) for column in zip(*rows, strict=True)
    )
    return pyav, decord, limit, output


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
    pyav, decord, limit, output = (1000 * max(one, 1e-6) / count for one, count in zip(least, counts, strict=True))
    return frames["pyav"], (pyav, decord, limit, output)


def _limit(path: Path, sampling: Sampling) -> tuple[float, float]:
    """CPU seconds of opening, reading and decoding the packets that the planner feeds; of scaling and writing."""

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
        sampled = []

        def feed() -> None:
            for run in runs:
                for number in range(run.first, run.last + 1):
                    context.skip_frame = "NONREF" if skips and number not in targets else "DEFAULT"
                    sampled.extend(context.decode(packets[number])[:1] if number in targets else [])
                    if number not in targets:
                        context.decode(packets[number])
                sampled.extend(context.decode(None)[:1])
                context.flush_buffers()

        codec = _cpu_seconds(feed)
        return _cpu_seconds(read) + codec, _output(sampled[: len(targets)], video.sample_aspect) * len(targets)


def _output(frames: list[Any], aspect: float) -> float:
    """CPU seconds of one frame."""
    from av.video.reformatter import VideoReformatter

    def write() -> None:
        reformatter = VideoReformatter()
        geometry = Geometry.of(frames[0], sample_aspect=aspect, short_side_px=224)
        for frame in frames:
            picture = np.ascontiguousarray(geometry.show(frame, reformatter))
            simplejpeg.encode_jpeg(picture, quality=95, colorspace="RGB", colorsubsampling=SUBSAMPLING)

    return _cpu_seconds(write) / len(frames)


def _steps(path: Path, rounds: int = 20) -> None:
    """Each step alone, then all; none leaves anything out, so that all of them see every frame."""
    sampling = Sampling("uniform", num_frames=16)
    video = decode_with_pyav(path, sampling=sampling, short_side_px=224, limits=LIMITS)
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


def _cpu_seconds(function: Callable[[], object]) -> float:
    before = resource.getrusage(resource.RUSAGE_SELF)
    function()
    after = resource.getrusage(resource.RUSAGE_SELF)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
