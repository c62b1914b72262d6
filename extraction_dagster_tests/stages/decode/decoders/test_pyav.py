import logging
from contextlib import contextmanager

import numpy as np
import pytest

from extraction_dagster.errors.decode import VideoTooLargeError
from extraction_dagster.stages.decode.decoders import pyav as pyav_decoder
from extraction_dagster.stages.decode.decoders.container import open_file, open_video
from extraction_dagster.stages.decode.decoders.decoder import DecodeLimits
from extraction_dagster.stages.decode.decoders.packets import read_packets
from extraction_dagster.stages.decode.decoders.pyav import decode_with_pyav
from extraction_dagster.stages.decode.decoders.sequential import decode_sequentially
from extraction_dagster.stages.decode.sampling import Sampling

UPRIGHT = {"h264 turned by 90": -1, "h264 turned by 180": 2, "h264 turned by 270": 1}
FROM_THE_BEGINNING = {
    "h264 intra refresh in TS",
    "h264 without times at first",
    "mpeg4 with frames not coded",
}
KEYFRAMES_ONLY_ONCE_DECODED = {"ffv1 in Matroska", "gif"}


def decode(path, *, sampling=None, short_side_px=500, **limits):
    return decode_with_pyav(
        path,
        sampling=sampling or Sampling("uniform", num_frames=16),
        short_side_px=short_side_px,
        limits=DecodeLimits(**limits),
    )


def assert_exact(video, truth, turn=0):
    """Times and every pixel equal those of a full decode."""
    frames = video.frames
    shown = [truth.shown_at(target) for target in frames.target_seconds]
    assert frames.frame_number.tolist() == shown
    assert frames.pts_seconds.tolist() == truth.seconds[shown].tolist()
    expected = np.stack([np.rot90(truth.pictures[number], turn) for number in shown])
    assert frames.data.shape == expected.shape
    assert np.array_equal(frames.data, expected)


@pytest.mark.parametrize(
    "sampling", [Sampling("uniform", num_frames=16), Sampling("fps", fps=5.0)], ids=lambda s: s.mode
)
def test_pixels_and_times_equal_those_of_a_full_decode(sampling, clip_name, clip_path, truth_of):
    video = decode(clip_path(clip_name), sampling=sampling)
    assert_exact(video, truth_of(clip_name), UPRIGHT.get(clip_name, 0))


def test_decoding_from_the_beginning_gives_the_same_frames(mechanism, clip_path, truth_of):
    sampling = Sampling("uniform", num_frames=16)
    with open_file(clip_path(mechanism)) as file:
        video = decode_sequentially(file, sampling, 500, DecodeLimits())
    assert_exact(video, truth_of(mechanism), UPRIGHT.get(mechanism, 0))


def test_every_single_frame_can_be_had_alone(mechanism, clip_path, truth_of, number_in):
    truth = truth_of(mechanism)
    video = decode(clip_path(mechanism), sampling=Sampling("fps", fps=1e6))
    assert video.frames.frame_number.tolist() == list(range(len(truth.seconds)))
    if mechanism not in UPRIGHT:
        numbers = [number_in(image) for image in video.frames.data]
        assert numbers == [number_in(image) for image in truth.pictures]


def test_scaling_is_by_area_in_one_step(clip_path, picture_of):
    import av

    path = clip_path("h264 wide pixels")
    video = decode(path, sampling=Sampling("uniform", num_frames=1), short_side_px=56)
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    number = int(video.frames.frame_number[0])
    assert np.array_equal(video.frames.data[0], picture_of(frames[number], 160, 56))


def test_an_mp4_of_a_common_codec_is_opened_without_decoding_its_first_frames(clip_path, monkeypatch):
    probed = []

    @contextmanager
    def noting(file, limits, *, probe=True):
        probed.append(probe)
        with open_video(file, limits, probe=probe) as video:
            yield video

    monkeypatch.setattr(pyav_decoder, "open_video", noting)
    for name in ("h264", "h264 fragmented", "hevc 10-bit", "mpeg4 odd size"):
        decode(clip_path(name))
    assert probed == [False] * 4
    decode(clip_path("vp9"))
    assert probed[4:] == [True]


def test_the_pixel_aspect_is_found_where_the_codec_alone_knows_it(clip_path, tmp_path):
    content = clip_path("h264 wide pixels").read_bytes()
    assert content.count(b"pasp") == 1
    path = tmp_path / "no_pasp.mp4"
    path.write_bytes(content.replace(b"pasp", b"free"))
    sampling = Sampling("uniform", num_frames=3)
    expected = decode(clip_path("h264 wide pixels"), sampling=sampling).frames.data
    assert np.array_equal(decode(path, sampling=sampling).frames.data, expected)


def test_a_size_that_the_container_gets_wrong_is_the_codecs(clip_path, tmp_path):
    content = bytearray(clip_path("h264").read_bytes())
    at = content.index(b"avc1", content.index(b"stsd")) + 28  # width and height of the sample entry
    content[at : at + 4] = (16).to_bytes(2, "big") * 2
    path = tmp_path / "small.mp4"
    path.write_bytes(content)
    with open_file(path) as file:
        expected = decode_sequentially(file, Sampling("uniform", num_frames=16), 500, DecodeLimits())
    assert np.array_equal(decode(path).frames.data, expected.frames.data)
    with pytest.raises(VideoTooLargeError):
        decode(path, max_pixels=5_000)


def test_ordinary_videos_are_planned_and_odd_ones_decoded_from_their_beginning(clip_name, clip_path, caplog):
    caplog.set_level(logging.DEBUG, logger="extraction_dagster")
    decode(clip_path(clip_name))
    assert bool(caplog.messages) is (clip_name in FROM_THE_BEGINNING)


def test_streams_that_only_decode_from_their_beginning_are_decoded_twice_for_their_keyframes_alone(
    clip_name, clip_path, caplog
):
    caplog.set_level(logging.DEBUG, logger="extraction_dagster")
    decode(clip_path(clip_name), sampling=Sampling("keyframes"))
    assert bool(caplog.messages) is (clip_name in FROM_THE_BEGINNING | KEYFRAMES_ONLY_ONCE_DECODED)


@pytest.mark.parametrize(("clip", "name"), [("ffv1 in Matroska", "torn.mkv"), ("gif", "torn.gif")])
def test_a_stream_decoded_as_a_whole_of_which_a_packet_is_no_frame_is_that_of_a_full_decode(
    clip, name, clip_path, tmp_path
):
    import av

    with av.open(str(clip_path(clip))) as source, av.open(str(tmp_path / name), "w") as sink:
        stream = sink.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(packet for packet in source.demux(video=0) if packet.size):
            empty = av.Packet(b"\x3b")
            empty.pts, empty.dts, empty.time_base = packet.pts, packet.dts, packet.time_base
            written = empty if number == 20 else packet
            written.stream = stream
            sink.mux(written)
    sampling = Sampling("fps", fps=24.0)
    video = decode(tmp_path / name, sampling=sampling)
    with open_file(tmp_path / name) as file:
        full = decode_sequentially(file, sampling, 500, DecodeLimits())
    assert len(full.frames) < 48
    assert video.partial == full.partial
    assert video.frames.frame_number.tolist() == full.frames.frame_number.tolist()
    assert np.array_equal(video.frames.data, full.frames.data)


def test_a_file_too_large_to_keep_is_read_twice_with_the_same_result(mechanism, clip_path):
    kept, reread = decode(clip_path(mechanism)), decode(clip_path(mechanism), max_packet_bytes=1)
    assert np.array_equal(kept.frames.data, reread.frames.data)
    assert kept.frames.pts_seconds.tolist() == reread.frames.pts_seconds.tolist()


def test_packets_past_the_limit_are_not_kept(clip_path):
    size = clip_path("h264").stat().st_size
    for max_bytes, kept in ((size + 48 * 2048, 48), (size // 2, None)):
        limits = DecodeLimits(max_packet_bytes=max_bytes)
        with open_file(clip_path("h264")) as file, open_video(file, limits) as video:
            index = read_packets(video, limits)
        assert len(index) == 48
        assert (None if index.kept is None else len(index.kept)) == kept


def test_damaged_frames_are_those_of_a_full_decode_and_flagged(clip_path, tmp_path, picture_of):
    import av

    content = bytearray(clip_path("h264").read_bytes())
    at = content.index(b"mdat")
    for place in range(at + 3000, at + 3400, 40):
        content[place] ^= 0x55
    path = tmp_path / "flipped.mp4"
    path.write_bytes(content)
    shown = []
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        context.thread_count = 1
        for packet in container.demux(video=0):
            try:
                shown += [picture_of(frame) for frame in context.decode(packet)]
            except av.error.InvalidDataError:
                continue
    video = decode(path, sampling=Sampling("fps", fps=24.0))
    assert video.partial is not None
    assert "damaged" in video.partial
    assert np.array_equal(video.frames.data, np.stack(shown))


def flip_until_one_frame_is_damaged(path, wanted):
    """Flip one bit of an H.264 video, so that its codec refuses no packet and calls one frame damaged."""
    import av

    content = path.read_bytes()
    for at in range(content.index(b"mdat") + 1500, len(content), 7):
        wanted.write_bytes(content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :])
        try:
            with av.open(str(wanted)) as container:
                container.streams.video[0].codec_context.thread_count = 1
                damaged = [frame.is_corrupt for frame in container.decode(video=0)]
        except av.error.FFmpegError:
            continue
        if len(damaged) == 48 and sum(damaged) == 1:
            return damaged.index(True)
    pytest.fail("no bit does it")


def test_a_frame_that_the_codec_calls_damaged_is_flagged_though_every_packet_decodes(clip_path, tmp_path):
    path = tmp_path / "bit.mp4"
    number = flip_until_one_frame_is_damaged(clip_path("h264"), path)
    video = decode(path, sampling=Sampling("fps", fps=24.0))
    assert video.partial == "1 of 48 sampled frames are damaged"
    with open_file(path) as file:
        full = decode_sequentially(file, Sampling("fps", fps=24.0), 500, DecodeLimits())
    assert np.array_equal(video.frames.data[number], full.frames.data[number])


def test_cover_art_is_no_video_and_the_largest_track_is_the_video(tmp_path, clip_path, number_in):
    import av
    from av.stream import Disposition

    path = tmp_path / "tracks.mp4"
    with av.open(str(clip_path("h264"))) as source, av.open(str(path), "w") as sink:
        dummy = sink.add_stream("libx264", rate=24)
        dummy.width, dummy.height, dummy.pix_fmt = 16, 16, "yuv420p"
        real = sink.add_stream_from_template(source.streams.video[0])
        cover = sink.add_stream("mjpeg", rate=24)
        cover.width, cover.height, cover.pix_fmt = 640, 480, "yuvj420p"
        cover.disposition = Disposition.attached_pic
        gray = av.VideoFrame.from_ndarray(np.full((480, 640, 3), 128, np.uint8), format="rgb24")
        gray.pts = 0
        sink.mux(cover.encode(gray) + cover.encode(None))
        for number in range(48):
            small = av.VideoFrame.from_ndarray(np.full((16, 16, 3), 128, np.uint8), format="rgb24")
            small.pts = number
            sink.mux(dummy.encode(small))
        sink.mux(dummy.encode(None))
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = real
                sink.mux(packet)
    video = decode(path, sampling=Sampling("fps", fps=1e6))
    assert [number_in(image) for image in video.frames.data] == list(range(48))


def test_a_change_of_resolution_and_clock_in_mid_stream_goes_on(tmp_path, render, number_in):
    first = render(tmp_path / "a.ts", frames=36)
    second = render(tmp_path / "b.ts", frames=36, size=(320, 224))
    joined = tmp_path / "joined.ts"
    joined.write_bytes(first.read_bytes() + second.read_bytes())
    video = decode(joined, sampling=Sampling("fps", fps=24.0))
    assert len({image.shape for image in video.frames.data}) == 1
    numbers = [number_in(image) for image in video.frames.data]
    assert numbers == [*range(36), *range(36)]
    assert video.frames.pts_seconds[-1] == pytest.approx(71 / 24, abs=0.1)


def test_pictures_that_grow_past_the_limit_in_mid_stream_are_never_decoded(tmp_path, render):
    first = render(tmp_path / "a.ts", frames=36)
    second = render(tmp_path / "b.ts", frames=36, size=(320, 224))
    joined = tmp_path / "joined.ts"
    joined.write_bytes(first.read_bytes() + second.read_bytes())
    try:
        video = decode(joined, sampling=Sampling("fps", fps=24.0), max_pixels=200 * 120)
    except VideoTooLargeError as error:
        assert "is 320x224" in str(error)  # noqa: PT017 - which of the two sizes the probe sees first is its own affair
        return
    assert video.frames.frame_number.tolist() == list(range(36))
    assert "packets did not decode" in (video.partial or "")


def test_a_still_that_lasts_as_long_as_claimed_is_not_partial(tmp_path):
    import av

    path = tmp_path / "still.mkv"
    with av.open(str(path), "w") as sink:
        stream = sink.add_stream("libx264", rate=24)
        stream.width, stream.height, stream.pix_fmt = 160, 112, "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.zeros((112, 160, 3), np.uint8), format="rgb24")
        frame.pts = 0
        for packet in stream.encode(frame) + stream.encode(None):
            packet.duration = round(60 / packet.time_base)
            sink.mux(packet)
    video = decode(path)
    assert (len(video.frames), video.duration_seconds, video.partial) == (1, 60.0, None)
