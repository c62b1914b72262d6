"""Which stream of a file is its pictures: what a player shows, else the one with more frames, else the larger."""

import numpy as np
import pytest

from extraction_dagster.stages.decode.decoders.decoder import DecodeLimits
from extraction_dagster.stages.decode.decoders.pyav import decode_with_pyav
from extraction_dagster.stages.decode.sampling import Sampling


@pytest.fixture
def make(tmp_path):
    """Writes tracks of one grey each, given as (size, frames, grey, default)."""
    import av
    from av.stream import Disposition

    def write(name, *tracks):
        with av.open(str(tmp_path / name), "w") as sink:
            streams = []
            for size, *_, default in tracks:
                stream = sink.add_stream("libx264", rate=24, options={"qp": "10"})
                stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
                stream.disposition = Disposition.default if default else Disposition(0)
                streams.append(stream)
            packets = []
            for stream, (size, frames, grey, _) in zip(streams, tracks, strict=True):
                picture = np.full((size[1], size[0], 3), grey, np.uint8)
                for number in range(frames):
                    frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                    frame.pts = number
                    packets += stream.encode(frame)
                packets += stream.encode(None)
            for packet in packets:
                sink.mux(packet)
        return tmp_path / name

    return write


def grey_of(path):
    video = decode_with_pyav(path, sampling=Sampling(), short_side_px=112, limits=DecodeLimits())
    return round(float(video.frames.data.mean()) / 10) * 10


SMALL, LARGE = (96, 64), (192, 128)


@pytest.mark.parametrize("name", ["tracks.mp4", "tracks.mkv"])
@pytest.mark.parametrize("default", [0, 1])
def test_the_enabled_track_is_shown_whatever_its_size(name, default, make):
    tracks = [(LARGE, 24, 40, default == 0), (SMALL, 24, 200, default == 1)]
    assert grey_of(make(name, *tracks)) == [40, 200][default]


@pytest.mark.parametrize("name", ["tracks.mp4", "tracks.mkv"])
def test_of_enabled_tracks_the_one_with_more_frames_is_shown(name, make):
    assert grey_of(make(name, (LARGE, 12, 40, True), (SMALL, 48, 200, True))) == 200


def test_of_tracks_with_as_many_frames_the_larger_is_shown(make):
    assert grey_of(make("tracks.mp4", (SMALL, 24, 40, True), (LARGE, 24, 200, True))) == 200
    assert grey_of(make("tracks.ts", (SMALL, 24, 40, False), (LARGE, 24, 200, False))) == 200


def test_a_track_too_small_to_be_seen_is_not_what_a_player_is_meant_to_show(make):
    assert grey_of(make("tracks.mp4", ((16, 16), 24, 40, True), (LARGE, 24, 200, False))) == 200
    assert grey_of(make("only.mp4", ((16, 16), 24, 40, True))) == 40


@pytest.mark.parametrize("name", ["cover.mkv", "cover.mp4"])
def test_a_still_that_is_not_marked_as_cover_art_is_no_video(name, clip_path, tmp_path, number_in):
    import av

    path = tmp_path / name
    with av.open(str(clip_path("h264"))) as source, av.open(str(path), "w") as sink:
        cover = sink.add_stream("mjpeg", rate=24)
        cover.width, cover.height, cover.pix_fmt = 640, 480, "yuvj420p"
        real = sink.add_stream_from_template(source.streams.video[0])
        still = av.VideoFrame.from_ndarray(np.full((480, 640, 3), 128, np.uint8), format="rgb24")
        still.pts = 0
        sink.mux(cover.encode(still.reformat(format="yuvj420p")) + cover.encode(None))
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = real
                sink.mux(packet)
    video = decode_with_pyav(path, sampling=Sampling("fps", fps=1e6), short_side_px=500, limits=DecodeLimits())
    assert [number_in(picture) for picture in video.frames.data] == list(range(48))


def test_an_animated_avif_is_its_track_and_not_its_still(tmp_path):
    import cv2

    moving = cv2.Animation()
    moving.frames = [np.full((64, 96, 4), (grey, grey, grey, 255), np.uint8) for grey in (40, 120, 200)]
    moving.durations = [100, 100, 100]
    assert cv2.imwriteanimation(str(tmp_path / "moving.avif"), moving)
    video = decode_with_pyav(
        tmp_path / "moving.avif", sampling=Sampling("fps", fps=10.0), short_side_px=112, limits=DecodeLimits()
    )
    assert video.frames.data.mean(axis=(1, 2, 3)) == pytest.approx([40, 120, 200], abs=4)
