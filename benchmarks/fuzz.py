"""Damage small videos at random and decode them: `python benchmarks/fuzz.py [--mutations 1000] [--seed 1] [--json]`.

Ten clips of as many codecs and containers are rendered; each mutation takes one and flips bits, overwrites, cuts out,
repeats, swaps or splices parts of it. All go through the worker pool, both decoders and every sampling, with an intact
clip after each nine. Exit code 1 when something escapes:

- a video without an outcome, or with two,
- a failure that is no error of this project's: an accident in our own code,
- an intact clip that does not give its frames.

A video that ends at its time or memory limit, or takes its worker down with it, is held: it is counted by name. The
same seed gives the same files.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import sys
import tempfile
import time
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from extraction_dagster.errors import ExtractionError
from extraction_dagster.errors import decode as decode_errors
from extraction_dagster.stages.decode.quality import Quality
from extraction_dagster.stages.decode.sampling import Sampling
from extraction_dagster.stages.decode.task import DecodeJob
from extraction_dagster.stages.decode.workers.pool import PoolOptions, decode_as_ready

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from extraction_dagster.records import Outcome

CLIPS: dict[str, tuple[str, str, dict[str, str]]] = {
    "h264.mp4": ("libx264", "yuv420p", {"bf": "2", "g": "12"}),
    "h264.ts": ("libx264", "yuv420p", {"x264-params": "open-gop=1:bframes=3:keyint=12"}),
    "h264.mkv": ("libx264", "yuv444p", {"g": "12"}),
    "hevc.mp4": ("libx265", "yuv420p", {"x265-params": "log-level=none:keyint=12:pools=none:frame-threads=1"}),
    "vp8.webm": ("libvpx", "yuv420p", {"cpu-used": "8", "deadline": "realtime"}),
    "vp9.webm": ("libvpx-vp9", "yuv420p", {"cpu-used": "8", "deadline": "realtime"}),
    "mpeg4.avi": ("mpeg4", "yuv420p", {"bf": "2", "b": "1M"}),
    "mpeg2.mpg": ("mpeg2video", "yuv420p", {"bf": "2", "b": "2M"}),
    "mjpeg.avi": ("mjpeg", "yuvj420p", {"b": "4M"}),
    "gif.gif": ("gif", "rgb8", {}),
}
SAMPLINGS = (Sampling("fps", 5.0), Sampling("uniform", num_frames=8), Sampling("keyframes"), Sampling("scene"))
EVERY_STEP = Quality(True, 6.0, 0.3, 6)  # noqa: FBT003 - the record's order
KNOWN = {name for name, kind in inspect.getmembers(decode_errors, inspect.isclass) if issubclass(kind, ExtractionError)}
INTACT_EVERY = 10
FRAMES = 24


def main() -> None:
    """Render, damage, decode, count."""
    options = _options()
    started = time.monotonic()
    escapes, found, jobs = list[str](), Counter[str](), dict[int, DecodeJob]()
    with tempfile.TemporaryDirectory() as folder:
        clips = {name: render(Path(folder) / name) for name in CLIPS}
        pool = PoolOptions(options.workers, options.timeout_seconds, memory_bytes=2**30)
        drawn = _drawn(_jobs(Path(folder), clips, options.mutations, options.seed), jobs, started + options.seconds)
        for decoded in filter(None, decode_as_ready(drawn, pool)):
            outcome = decoded.outcome
            job = jobs.pop(outcome.record_id, None)
            if job is None:
                escapes.append(f"video {outcome.record_id} has two outcomes")
                continue
            escapes += _escapes(job, outcome)
            found[_kind(outcome)] += 1
            found["intact"] += job.content_version == "intact"
            if job.content_version == "damaged":
                Path(job.path).unlink()
    escapes += [f"video {left} has no outcome" for left in jobs]
    intact = found.pop("intact")
    document = {"mutations": found.total() - intact, "seed": options.seed, "outcomes": dict(found.most_common())}
    document |= {"intact": intact, "escapes": escapes}
    if options.json:
        print(json.dumps(document))
    else:
        for name, value in document.items():
            print(f"{name:10} {value}")
        print(f"{'seconds':10} {time.monotonic() - started:.0f}")
    sys.exit(1 if escapes else 0)


def _drawn(jobs: Iterator[DecodeJob], under_way: dict[int, DecodeJob], until: float) -> Iterator[DecodeJob]:
    """Note each job as it is drawn, and draw none when the time is up."""
    for job in jobs:
        if time.monotonic() > until:
            return
        under_way[job.record_id] = job
        yield job


def _kind(outcome: Outcome) -> str:
    if outcome.failure:
        return outcome.failure.error_type
    return "partial" if outcome.frames and outcome.frames.partial else "frames"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mutations", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=math.inf, help="damage no more videos after this time")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--timeout-seconds", type=float, default=30.0)
    parser.add_argument("--json", action="store_true", help="one JSON document")
    return parser.parse_args()


def render(path: Path) -> bytes:
    """A clip of two dozen small frames."""
    import av

    codec, pix_fmt, options = CLIPS[path.name]
    y, x = np.mgrid[0:96, 0:128]
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=20, options=options)
        stream.width, stream.height, stream.pix_fmt = 128, 96, pix_fmt
        stream.codec_context.thread_count = 1
        for number in range(FRAMES):
            image = np.stack([x + 5 * number, 2 * y + 3 * number, (x * y) // 16 + number], axis=-1).astype(np.uint8)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 20)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path.read_bytes()


def _jobs(folder: Path, clips: dict[str, bytes], mutations: int, seed: int) -> Iterator[DecodeJob]:
    """The damaged videos, with an intact one after each nine; each is written when it is drawn."""
    names, count = list(clips), 0
    for number in range(mutations):
        if count % INTACT_EVERY == INTACT_EVERY - 1:
            yield DecodeJob(count, "intact", str(folder / names[number % len(names)]), sampling=SAMPLINGS[1])
            count += 1
        random = np.random.default_rng((seed, number))
        name = names[number % len(names)]
        path = folder / f"{number}-{name}"
        path.write_bytes(mutate(clips[name], clips[names[int(random.integers(len(names)))]], random))
        decoder = "decord" if random.random() < 0.25 else "pyav"  # noqa: PLR2004 - a quarter
        sampling = SAMPLINGS[int(random.integers(len(SAMPLINGS)))]
        quality = EVERY_STEP if sampling.mode == "scene" else Quality()
        yield DecodeJob(count, "damaged", str(path), decoder=decoder, sampling=sampling, quality=quality)
        count += 1


def mutate(content: bytes, other: bytes, random: np.random.Generator) -> bytes:
    """One to three kinds of damage, one after the other."""
    kinds: list[Callable[[bytearray, bytes, np.random.Generator], bytearray]] = [
        _flip, _flip_head, _overwrite, _blank, _cut_out, _cut_off, _repeat, _swap, _splice,
    ]  # fmt: skip
    damaged = bytearray(content)
    for kind in random.choice(len(kinds), size=int(random.integers(1, 4)), replace=False):
        damaged = kinds[int(kind)](damaged, other, random)
    return bytes(damaged)


def _part(content: bytes | bytearray, random: np.random.Generator) -> slice:
    """A part of a file: most are short."""
    start = int(random.integers(len(content) or 1))
    return slice(start, start + int(2 ** random.uniform(0, 12)))


def _flip(content: bytearray, _other: bytes, random: np.random.Generator, head: int | None = None) -> bytearray:
    for _ in range(int(2 ** random.uniform(0, 7))):
        at = int(random.integers(min(len(content), head or len(content)) or 1))
        content[at : at + 1] = bytes([content[at] ^ (1 << int(random.integers(8)))]) if content else b""
    return content


def _flip_head(content: bytearray, other: bytes, random: np.random.Generator) -> bytearray:
    return _flip(content, other, random, head=1024)


def _overwrite(content: bytearray, _other: bytes, random: np.random.Generator) -> bytearray:
    part = _part(content, random)
    content[part] = random.bytes(len(content[part]))
    return content


def _blank(content: bytearray, _other: bytes, random: np.random.Generator) -> bytearray:
    part = _part(content, random)
    content[part] = bytes([int(random.choice([0, 255]))]) * len(content[part])
    return content


def _cut_out(content: bytearray, _other: bytes, random: np.random.Generator) -> bytearray:
    del content[_part(content, random)]
    return content


def _cut_off(content: bytearray, _other: bytes, random: np.random.Generator) -> bytearray:
    return content[: int(random.integers(len(content) + 1))]


def _repeat(content: bytearray, _other: bytes, random: np.random.Generator) -> bytearray:
    part = _part(content, random)
    content[part.start : part.start] = content[part] * int(random.integers(1, 9))
    return content


def _swap(content: bytearray, _other: bytes, random: np.random.Generator) -> bytearray:
    middle = int(random.integers(len(content) + 1))
    start = int(random.integers(middle + 1))
    return content[:start] + content[middle:] + content[start:middle]


def _splice(content: bytearray, other: bytes, random: np.random.Generator) -> bytearray:
    part = _part(content, random)
    content[part] = other[_part(other, random)]
    return content


def _escapes(job: DecodeJob, outcome: Outcome) -> list[str]:
    """What should never be, in words."""
    name = f"video {job.record_id} ({Path(job.path).name}, {job.decoder}, {job.sampling.mode})"
    failure, frames = outcome.failure, outcome.frames
    escapes = []
    if failure is not None and failure.error_type not in KNOWN:
        escapes.append(f"{name}: {failure.error_type}: {failure.message}")
    if job.content_version == "intact" and (frames is None or frames.partial or len(frames) != SAMPLINGS[1].num_frames):
        escapes.append(f"{name} is intact and gave {failure or frames}"[:500])
    return escapes


if __name__ == "__main__":
    main()
