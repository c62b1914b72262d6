"""Frames and images for the embed stage's tests; the model is the real one."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import simplejpeg

from extraction_dagster.records import EncodedFrames
from extraction_dagster.settings import Settings
from extraction_dagster.stages.embed.models.registry import load_model


@pytest.fixture(scope="session")
def cpu_settings():
    return Settings(device="cpu", embed_batch_size=4, embed_threads=1)


@pytest.fixture(scope="session")
def model(cpu_settings):
    return load_model(cpu_settings)


def picture(seed, width_px=96, height_px=64):
    """A coarse random pattern: smooth enough for JPEG, different for each seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (height_px // 16, width_px // 16, 3), dtype=np.uint8)
    return np.ascontiguousarray(coarse.repeat(16, 0).repeat(16, 1))


@pytest.fixture(scope="session")
def make_picture():
    return picture


def video(record_id, num_frames=3, *, version="v1", broken_frame=None):
    """A record of the frame store: a frame a second at 30 frames per second."""
    jpegs = [simplejpeg.encode_jpeg(picture(1000 * record_id + n), 95, "RGB", "444") for n in range(num_frames)]
    if broken_frame is not None:
        jpegs[broken_frame] = b"\xff\xd8\xff\xe0 no more than a beginning"
    seconds = np.arange(num_frames, dtype=np.float64)
    numbers = np.arange(num_frames, dtype=np.int64) * 30
    return EncodedFrames(record_id, version, jpegs, seconds, seconds, numbers, 96, 64)


@pytest.fixture(scope="session")
def make_video():
    return video


@dataclass
class MemoryShard:
    """A frame shard as the stage sees it."""

    name: str
    videos: list[EncodedFrames]

    @property
    def records(self):
        return [StoredRecord(v.record_id, v.content_version, len(v)) for v in self.videos]


@dataclass(frozen=True)
class StoredRecord:
    record_id: int
    content_version: str
    num_frames: int


@dataclass
class MemoryFrames:
    """A frame source that remembers which shards it was asked for, and what was set aside."""

    asked: list[str] = field(default_factory=list)
    aside: list[tuple[str, list[int] | None]] = field(default_factory=list)

    def read(self, shard, *, only):
        self.asked.append(shard.name)
        yield from (video for video in shard.videos if video.record_id in only)

    def set_aside(self, shard, _why, *, records=None):
        self.aside.append((shard.name, records))


@pytest.fixture
def frames():
    return MemoryFrames()


@pytest.fixture(scope="session")
def make_shard():
    return MemoryShard


@pytest.fixture
def copied_model(saved_models, tmp_path):
    """A tiny model's folder of the test's own, to be broken."""

    def copy(kind="clip"):
        return Path(shutil.copytree(saved_models(kind), tmp_path / "model"))

    return copy


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    """A model that is asked for over the network fails at once instead of leaving the machine."""
    monkeypatch.setitem(os.environ, "HF_HUB_DISABLE_TELEMETRY", "1")
    monkeypatch.setitem(os.environ, "HF_ENDPOINT", "http://127.0.0.1:9")
