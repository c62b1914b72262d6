"""What one decoding process holds after so many videos: `python benchmarks/decode_memory.py [--videos 2000]`.

One worker that is never replaced decodes ten kinds of clips, whole and damaged, with both decoders and every sampling;
the rooms' own default replaces a worker after 200 videos. A leak shows as a line that rises to the end.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import psutil
from fuzz import CLIPS, EVERY_STEP, SAMPLINGS, mutate, render

from extraction_dagster.stages.decode.quality import Quality
from extraction_dagster.stages.decode.task import DecodeJob
from extraction_dagster.stages.decode.workers.pool import PoolOptions, decode_as_ready

MIB = 2**20
DAMAGED_OF_EACH = 5


def main() -> None:
    """Render, decode, print what is held along the way."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--videos", type=int, default=2000)
    parser.add_argument("--decoder", choices=["pyav", "decord", "both"], default="both")
    parser.add_argument(
        "videos_of", type=Path, nargs="*", metavar="FILE", help="decode these instead of rendered clips"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files = [path.resolve() for path in options.videos_of] or _clips(Path(folder))
        jobs = (_job(number, files, options.decoder) for number in range(options.videos))
        pool = PoolOptions(workers=1, timeout_seconds=300.0, memory_bytes=2**32, max_tasks=options.videos + 1)
        held: list[int] = []
        workers: set[int] = set()
        for _ in filter(None, decode_as_ready(jobs, pool)):
            (worker,) = psutil.Process().children()
            workers.add(worker.pid)
            held.append(worker.memory_info().rss)
    for number in sorted({n for n in (1, 50, 100, 200, 500, 1000, 1500, 2000, options.videos) if n <= len(held)}):
        print(f"after {number:5} videos {held[number - 1] / MIB:7.1f} MiB")
    half = len(held) // 2
    print(f"largest in the first half {max(held[:half]) / MIB:.1f} MiB, in the second {max(held[half:]) / MIB:.1f} MiB")
    print(f"worker processes {len(workers)}")


def _clips(folder: Path) -> list[Path]:
    """Each kind of clip whole, and a few times damaged."""
    whole = {name: render(folder / name) for name in CLIPS}
    files = [folder / name for name in CLIPS]
    random = np.random.default_rng(3)
    for name, content in whole.items():
        for number in range(DAMAGED_OF_EACH):
            path = folder / f"{number}-{name}"
            path.write_bytes(mutate(content, content, random))
            files.append(path)
    return files


def _job(number: int, files: list[Path], decoder: str) -> DecodeJob:
    sampling = SAMPLINGS[number % len(SAMPLINGS)]
    chosen = ("pyav", "pyav", "decord")[number % 3] if decoder == "both" else decoder
    quality = EVERY_STEP if sampling.mode == "scene" else Quality()
    return DecodeJob(number, "", str(files[number % len(files)]), decoder=chosen, sampling=sampling, quality=quality)


if __name__ == "__main__":
    main()
