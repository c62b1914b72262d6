"""What confining the decoding workers costs: CPU seconds of the same videos with the cage and without, in turn.

    python benchmarks/cage_cost.py [--seconds 10] [--rounds 7]

Each round decodes every clip once in a confined worker and once in one that is not, which goes first by turns; the
least of the rounds counts. CPU is user and system time of the worker, from its job to its report.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from decode import CLIPS, render

from extraction_dagster.stages.decode.sampling import Sampling
from extraction_dagster.stages.decode.task import DecodeJob, decode_job
from extraction_dagster.stages.decode.workers import worker
from extraction_dagster.stages.decode.workers.cage import Confinement
from extraction_dagster.stages.decode.workers.pool import PoolOptions, decode_as_ready

TASKS = {"with": "extraction_dagster.stages.decode.task:decode_job", "without": "cage_cost:decode_job"}
__all__ = ["decode_job"]  # what a worker without the cage runs

if __name__ == "cage_cost":  # in that worker
    worker.confine = lambda **_: Confinement()


def main() -> None:
    """Measure, and print a line for each clip, and the sum."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=int, default=10, help="length of a clip")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    costs: dict[tuple[str, str], list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        clips = [render(Path(folder) / f"{name}.{CLIPS[name][1]}", name, options.seconds) for name in CLIPS]
        for number in range(options.rounds):
            for way in sorted(TASKS, reverse=bool(number % 2)):
                for name, seconds in _decode(clips, TASKS[way]):
                    costs[name, way].append(seconds)
    for name in CLIPS:
        _tell(name, {way: min(costs[name, way]) for way in TASKS})
    _tell("all", {way: sum(min(costs[name, way]) for name in CLIPS) for way in TASKS})


def _decode(clips: list[Path], task: str) -> list[tuple[str, float]]:
    """Each clip twice in one worker, and the cost of the second time: the first meets what is not warm yet."""
    jobs = [DecodeJob(number, "", str(clip), sampling=Sampling("fps", 1.0)) for number, clip in enumerate(clips * 2)]
    pool = PoolOptions(1, 600.0, 2**32, task=task)
    done = {item.outcome.record_id: item for item in decode_as_ready(jobs, pool) if item is not None}
    if any(item.outcome.frames is None for item in done.values()):
        sys.exit(f"a clip was not decoded: {done}")
    return [(clip.stem, done[number + len(clips)].cpu_seconds) for number, clip in enumerate(clips)]


def _tell(name: str, seconds: dict[str, float]) -> None:
    ratio = seconds["with"] / seconds["without"]
    print(f"{name:6} with {1000 * seconds['with']:8.1f} ms  without {1000 * seconds['without']:8.1f} ms  {ratio:.3f}")


if __name__ == "__main__":
    main()
