"""What a frame's vector costs: CPU milliseconds, beside the floor that this machine's matrix product sets.

    python benchmarks/embed.py [--rounds 20] [--videos 40] [--home FOLDER] [--device cuda]

Each part runs in a process of its own, started by this one. CPU is user and system time of all threads. What is
compared is measured in turn, round by round in one process; the least of the rounds is what the machine can do while
its other tenants are quiet. A home that stays is compiled in once. With --device cuda, `gpu` stands for `model`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import simplejpeg

from extraction_dagster.records import EncodedFrames, IdRange
from extraction_dagster.settings import Settings
from extraction_dagster.shards.embedding_store import EmbeddingStore
from extraction_dagster.stages.embed.models.registry import load_model
from extraction_dagster.stages.embed.runtime import batch_size, import_torch
from extraction_dagster.stages.embed.stage import embed_shards

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

KINDS = ("off", "onnxruntime")
GFLOP_PER_FRAME = 0.768
FRAMES_PER_VIDEO = 10
_STARTS = 3


@dataclass(frozen=True)
class Shard:
    """A frame shard of synthetic videos, 224x398, as the decode stage keeps them."""

    name: str
    records: tuple[EncodedFrames, ...]


class Source:
    """Hands out a shard's records."""

    def read(self, shard: Shard, *, only: Collection[int]) -> tuple[EncodedFrames, ...]:
        """The records that are wanted."""
        return tuple(record for record in shard.records if record.record_id in only)


def _video(record_id: int) -> EncodedFrames:
    rng = np.random.default_rng(record_id)
    base = rng.integers(0, 256, (25, 14, 3), dtype=np.uint8).repeat(16, 0)[:398].repeat(16, 1)
    numbers = np.arange(FRAMES_PER_VIDEO)
    jpegs = [
        simplejpeg.encode_jpeg(np.ascontiguousarray(np.roll(base, n * 7, 0)), 95, "RGB", "444")
        for n in numbers.tolist()
    ]
    seconds = numbers.astype(np.float64)
    return EncodedFrames(record_id, "1", jpegs, seconds, seconds, numbers.astype(np.int64), 224, 398)


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _peak_mb() -> float:
    """Of this process alone: what `getrusage` says begins at its parent's."""
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def measure_torch() -> dict[str, float]:
    """What the process has spent when torch is there: this is in every start."""
    import_torch()
    return {"start_cpu_seconds": _cpu_seconds(), "start_mb": _peak_mb()}


def measure_start(settings: Settings) -> dict[str, float]:
    """From the start of the interpreter to the first vector; what has to be compiled has been."""
    load_model(settings).embed_images([np.full((398, 224, 3), 100, np.uint8)])
    return {"start_cpu_seconds": _cpu_seconds(), "start_mb": _peak_mb()}


def measure_model(settings: Settings, rounds: int) -> dict[str, float]:
    """A pass, by every way to run it, and a matrix product in the same process for the floor."""
    import_torch()
    import torch

    models: dict[str, Any] = {kind: load_model(settings.model_copy(update={"compile": kind})) for kind in KINDS}
    size = batch_size(settings, "cpu")
    pixels = np.random.default_rng(0).integers(0, 256, (size, 224, 224, 3), dtype=np.uint8)
    square = torch.randn(1024, 1024)
    work: dict[str, Callable[[], object]] = {
        kind: (lambda model=model: model.embed_prepared(pixels)) for kind, model in models.items()
    }
    work["gemm"] = lambda: [torch.mm(square, square) for _ in range(10)]
    costs: dict[str, list[float]] = {name: [] for name in work}
    for number in range(rounds + 1):
        for name, call in work.items():
            start = _cpu_seconds()
            call()
            if number:  # the first round warms up
                costs[name].append(_cpu_seconds() - start)
    gflops = 2 * 1024**3 * 10 / min(costs.pop("gemm")) / 1e9
    figures = {"threads": torch.get_num_threads(), "gflops": gflops, "floor_ms": GFLOP_PER_FRAME / gflops * 1e3}
    for name, taken in costs.items():
        figures |= {name: min(taken) / size * 1e3, f"{name}_median": float(np.median(taken)) / size * 1e3}
    return figures


def measure_gpu(settings: Settings, rounds: int) -> dict[str, float]:
    """Frames a second on a GPU, beside what its matrix product and its copies allow."""
    import torch

    from extraction_dagster.stages.embed.batching import BatchEmbedder  # noqa: PLC0415 - only here

    model = load_model(settings)
    size = batch_size(settings, model.device)
    pixels = np.random.default_rng(0).integers(0, 256, (size, 224, 224, 3), dtype=np.uint8)

    def rate(call: Callable[[], object], amount: float) -> float:
        call()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(rounds):
            call()
        torch.cuda.synchronize()
        return amount * rounds / (time.perf_counter() - start)

    def overlapping() -> None:
        embedder = BatchEmbedder(model, size)
        for _ in range(16):
            list(embedder.push(pixels))
        list(embedder.finish())

    square = torch.randn(8192, 8192, device=model.device, dtype=getattr(torch, settings.embed_dtype))
    page_locked = torch.from_numpy(pixels).pin_memory()
    tflops = rate(lambda: square @ square, 2 * 8192**3) / 1e12
    copies = rate(lambda: page_locked.to(model.device, non_blocking=True), page_locked.nbytes) / 1e9
    return {
        "frames_per_second": rate(overlapping, 16 * size),
        "frames_per_second_one_by_one": rate(lambda: model.embed_prepared(pixels), size),
        "gemm_tflops": tflops,
        "frames_per_second_by_flop": tflops * 1e3 / GFLOP_PER_FRAME,
        "copies_gb_per_second": copies,
        "frames_per_second_by_copies": copies * 1e9 / pixels[0].nbytes,
        "peak_device_mb": torch.cuda.max_memory_allocated() / 2**20,
    }


def measure_stage(settings: Settings, videos: int) -> dict[str, float]:
    """The whole stage: JPEG, resizing, forward pass, normalising, writing shards."""
    numbers = [range(start, min(start + 20, videos)) for start in range(0, videos, 20)]
    parts = [(Shard(f"{some[0]:04d}", tuple(_video(n) for n in some)), some) for some in numbers]
    model = load_model(settings)
    model.embed_images([np.zeros((224, 224, 3), np.uint8)])
    with tempfile.TemporaryDirectory() as root:
        store = EmbeddingStore(root, model.fingerprint)
        partition = IdRange(0, videos)
        start, clock = _cpu_seconds(), time.perf_counter()
        done = list(
            embed_shards(parts, frames=Source(), store=store, model=model, partition=partition, settings=settings)
        )
        cpu, wall = _cpu_seconds() - start, time.perf_counter() - clock
        size = sum(path.stat().st_size for path in Path(root).rglob("*.parquet"))
    frames = sum(shard.num_frames for shard in done)
    return {
        "cpu_ms_per_frame": cpu * 1e3 / frames,
        "frames_per_second": frames / wall,
        "peak_mb": _peak_mb(),
        "bytes_per_vector": size / frames,
    }


def _in_a_process(arguments: argparse.Namespace, part: str, **settings: object) -> dict[str, float]:
    """One part's figures; also printed."""
    chosen = {"home": arguments.home, "device": arguments.device, **settings}
    options = {"part": part, "rounds": arguments.rounds, "videos": arguments.videos, "settings": chosen}
    command = [sys.executable, __file__, "--job", json.dumps(options)]
    figures: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    shown = ", ".join(f"{name} {value:.5g}" for name, value in figures.items())
    what = " ".join(f"{name}={value}" for name, value in settings.items() if value is not None)
    print(f"{part:6}{what:37}{shown}", flush=True)
    return figures


def _work(job: dict[str, Any]) -> dict[str, float]:
    settings = Settings(**job["settings"])
    if job["part"] == "torch":
        return measure_torch()
    if job["part"] == "start":
        return measure_start(settings)
    if job["part"] == "stage":
        return measure_stage(settings, job["videos"])
    return (measure_gpu if job["part"] == "gpu" else measure_model)(settings, job["rounds"])


def _measure(arguments: argparse.Namespace) -> None:
    """Every part, each in its own process, and how the figures lie to their targets."""
    if arguments.device != "cpu":
        for dtype in ("float32", "bfloat16", "float16"):
            _in_a_process(arguments, "gpu", embed_dtype=dtype)
        _in_a_process(arguments, "stage")
        return
    _in_a_process(arguments, "start", compile="onnxruntime")  # compiles
    print()
    one = _in_a_process(arguments, "model", embed_threads=1)
    _in_a_process(arguments, "model", embed_threads=1, embed_batch_size=16)
    _in_a_process(arguments, "model")
    starts: dict[str, list[float]] = {}
    for _ in range(_STARTS):
        for part, kind in (("torch", None), *(("start", kind) for kind in KINDS)):
            taken = _in_a_process(arguments, part, **({"compile": kind} if kind else {}))["start_cpu_seconds"]
            starts.setdefault(kind or part, []).append(taken)
    torch_alone, start = min(starts.pop("torch")), max(min(taken) for taken in starts.values())
    peaks = [_in_a_process(arguments, "stage", compile=kind)["peak_mb"] for kind in KINDS]
    print("one thread:")
    _target("eager, CPU ms a frame", one["off"], 18)
    print(f"  eager beside the matrix product's floor of {one['floor_ms']:.1f} ms: {one['off'] / one['floor_ms']:.2f}")
    print(f"  eager beside ONNX Runtime: {one['off'] / one['onnxruntime']:.2f}")
    print("default threads:")
    _target("start to first vector, CPU s, the most", start, 3)
    print(f"  start to first vector beside the {torch_alone:.2f} s until torch is imported: {start / torch_alone:.2f}")
    _target("peak memory, MB, eager", peaks[0], 600)
    _target("peak memory, MB, the most", max(peaks), 600)


def _target(what: str, got: float, at_most: float) -> None:
    print(f"  {what}: {got:.2f}, at most {at_most}: {'reached' if got <= at_most else 'MISSED'}")


def main() -> None:
    """Print a line for each part, then the targets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--videos", type=int, default=40)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--home", help="where compiled models are kept; a temporary folder when unset")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        print(json.dumps(_work(json.loads(arguments.job))))
        return
    with tempfile.TemporaryDirectory() as folder:
        arguments.home = os.path.abspath(arguments.home or folder)  # noqa: PTH100 - a string, for JSON
        _measure(arguments)


if __name__ == "__main__":
    main()
