"""A process that works on ranges as a run does, to be killed, stopped and thawed between any two instructions.

It prints `ready`, takes lines `FIRST-LAST` or `FIRST-LAST force`, and prints a line for each: `done`, or `failed` and
why. The settings are those of its environment. A video is a text file that holds its version; frames and vectors say of
which version they are. Everything else is real: fetching, the plan, ledger and marks, shards, points, merges.
"""

import hashlib
import random
import sys
import time
import uuid
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from extraction_dagster.errors import ExtractionError
from extraction_dagster.ranges.decode import decode_range
from extraction_dagster.ranges.embed import embed_range
from extraction_dagster.ranges.index import index_range
from extraction_dagster.ranges.work import fingerprints_of, open_range
from extraction_dagster.records import EncodedFrames, IdRange, Outcome
from extraction_dagster.settings import load_settings
from extraction_dagster.stages.decode import stage as decode_stage
from extraction_dagster.stages.decode.workers.pool import Decoded
from extraction_dagster.stages.embed import stage as embed_stage
from extraction_dagster.stages.embed.models import registry

DIM = 8
_PAUSE_SECONDS = 0.02


def num_frames(version):
    """Not every version has as many frames as the one before."""
    return 1 + version % 3


def vector_of(record_id, version, number):
    """The vector of a frame."""
    said = f"{record_id}|{version}|{number}".encode()
    raw = np.frombuffer(hashlib.sha256(said).digest()[:DIM], np.uint8).astype(np.float32) - 127.5
    return raw / np.linalg.norm(raw)


def _decode(jobs, options):  # noqa: ARG001 - the interface
    for job in jobs:
        if job is None or isinstance(job, Decoded):
            yield job
            continue
        version = int(Path(job.path).read_text())
        time.sleep(random.uniform(0, _PAUSE_SECONDS))
        numbers = np.arange(num_frames(version), dtype=np.int64)
        jpegs = [f"{job.record_id}|{version}|{number}".encode() for number in numbers]
        times = numbers * 1.0
        frames = EncodedFrames(job.record_id, job.content_version, jpegs, times, times, numbers, 8, 8)
        yield Decoded(Outcome(job.record_id, frames=frames))


class _Model:
    """Makes the vector that a frame names."""

    name, device, dim = "stand-in", "cpu", DIM

    def __init__(self, settings):
        self.fingerprint = registry.embedding_fingerprint(settings)

    def prepare(self, images):
        return np.stack(images)

    def start(self, pixels):
        time.sleep(random.uniform(0, _PAUSE_SECONDS))
        said = [bytes(image.tobytes()).rstrip().decode().split("|") for image in pixels]
        vectors = np.stack([vector_of(*map(int, item)) for item in said])
        return SimpleNamespace(done=lambda: True, result=lambda: vectors)


def _picture(frames, n):
    return np.frombuffer(bytes(frames.jpegs[n]).ljust(48), np.uint8).reshape(1, 48, 1)


def process(id_range, *, force):
    """A run of a range: each step opens it again, under the run's own name, as Dagster's runs do."""
    settings, run_id = load_settings(), uuid.uuid4().hex
    made_with = fingerprints_of(settings)
    for step in (decode_range, embed_range, index_range):
        options = {"begins": step is decode_range, "force": force, "fingerprints": made_with, "run_id": run_id}
        with open_range(settings, id_range, **options) as work:
            step(work)


def _main():
    decode_stage.decode_as_ready, embed_stage._decode, registry.load_model = _decode, _picture, _Model
    print("ready", flush=True)
    for line in sys.stdin:
        key, _, force = line.strip().partition(" ")
        try:
            process(IdRange.parse(key), force=bool(force))
            print("done", flush=True)
        except (ExtractionError, OSError) as error:
            print(f"failed {type(error).__name__}: {error}".splitlines()[0], flush=True)


if __name__ == "__main__":
    _main()
