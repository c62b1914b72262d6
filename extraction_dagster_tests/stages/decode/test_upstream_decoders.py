"""What we rely on in PyAV, libav and decord: a failure here reads "the dependency changed"."""

import errno
import struct

import numpy as np
import pytest


def packets(path):
    import av

    with av.open(str(path)) as container:
        return [packet for packet in container.demux(video=0) if packet.size]


def test_libavformat_refuses_a_format_off_the_whitelist_with_einval(clip_path):
    import av

    with pytest.raises(av.error.ArgumentError, match="Invalid argument") as raised:
        av.open(f"file:{clip_path('h264')}", options={"format_whitelist": "matroska,webm"})
    assert raised.value.errno == errno.EINVAL


def test_libavformat_marks_packets_outside_of_the_edit_list(clip_path):
    # 17 frames are cut away; those before the keyframe at 12 are not even read.
    found = packets(clip_path("h264 edit list"))
    assert sum(packet.is_discard for packet in found) == 5
    assert all(packet.pts < 0 for packet in found if packet.is_discard)


def test_libavformat_marks_the_keyframes_of_open_groups(clip_path):
    found = packets(clip_path("h264 open GOP"))
    assert [packet.pts // 512 for packet in found if packet.is_keyframe] == [0, 12, 24, 36]


def test_vp8_hides_frames_in_packets_of_their_own_whose_bit_4_says_so(clip_path):
    found = packets(clip_path("vp8 with hidden frames"))
    assert len(found) > 48
    assert sum(memoryview(packet)[0] >> 4 & 1 for packet in found) == 48


@pytest.mark.parametrize(
    "clip", ["h264 with B-frames", "hevc open GOP", "mpeg2 with B-frames in TS", "mpeg4 with B-frames"]
)
def test_libavcodec_skips_frames_without_referrers_and_gives_the_others_unchanged(clip, clip_path):
    import av

    pictures = []
    for skip in ("DEFAULT", "NONREF"):
        with av.open(str(clip_path(clip))) as container:
            context = container.streams.video[0].codec_context
            context.thread_count, context.skip_frame = 1, skip
            pictures.append({frame.pts: frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)})
    every, referred = pictures
    assert 0 < len(referred) < len(every) == 48
    assert all(np.array_equal(picture, every[pts]) for pts, picture in referred.items())


def test_libavcodec_takes_a_pixel_limit_as_a_codec_option(clip_path):
    import av

    with av.open(str(clip_path("h264"))) as container:
        stream = container.streams.video[0]
        stream.codec_context.options = {"max_pixels": "1000"}
        with pytest.raises(av.error.FFmpegError, match=r"Invalid|result|range"):
            list(container.decode(stream))


def test_pyav_gives_the_display_matrix_with_each_frame(clip_path):
    import av

    with av.open(str(clip_path("h264 turned by 90"))) as container:
        frame = next(container.decode(video=0))
    matrix = np.frombuffer(bytes(frame.side_data.get("DISPLAYMATRIX")), np.int32)
    assert matrix[:5].tolist() == [0, 65536, 0, -65536, 0]
    assert frame.rotation == -90


def reader(path, **fields):
    import decord

    return decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1, **fields)


def test_decord_counts_time_from_the_first_frame_in_single_precision(clip_path):
    spans = np.asarray(reader(clip_path("h264 late start")).get_frame_timestamp([0, 1]))
    assert spans.dtype == np.float32
    assert spans[:, 0].tolist() == pytest.approx([0.0, 1 / 24], abs=2e-3)


def test_decord_turns_and_scales_to_the_size_as_shown(clip_path):
    turned = reader(clip_path("h264 turned by 90"), width=56, height=80).get_batch([0]).asnumpy()
    assert turned.shape == (1, 80, 56, 3)


def test_decord_refuses_some_narrow_frames(clip_path):
    import decord

    said = []
    for width in (16, 48, 96):  # the width of the CPU's vectors decides which
        try:
            reader(clip_path("h264"), width=width, height=64).get_batch([0])
        except decord.DECORDError as error:
            said.append(str(error))
    assert said
    assert all("size must exactly match" in one for one in said)


@pytest.mark.parametrize("matrix", range(1, 19))
def test_libswscale_converts_few_matrices_and_any_where_one_is_named(matrix):
    import av

    frame = av.VideoFrame(64, 48, "yuv420p")
    frame.colorspace, frame.color_range = matrix, 1
    if matrix in {1, 2, 4, 5, 6, 7, 9}:
        frame.reformat(format="gbrp")
    else:
        with pytest.raises(OSError, match="Operation not supported"):
            frame.reformat(format="gbrp")
    assert frame.reformat(format="gbrp", src_colorspace=1).format.name == "gbrp"


def test_libavformat_tells_of_cropping_in_words_alone(tmp_path, clip_path):
    import av
    import av.logging

    content = bytearray(clip_path("h264").read_bytes())
    box = struct.pack(">I4s8i", 40, b"clap", 100, 1, 80, 1, 20, 2, -8, 2)  # of 160x112: 40 left, 20 right, 12 and 20
    at, end = 0, len(content)
    for name, head in (
        (b"moov", 8),
        (b"trak", 8),
        (b"mdia", 8),
        (b"minf", 8),
        (b"stbl", 8),
        (b"stsd", 16),
        (b"avc1", 86),
    ):
        while content[at + 4 : at + 8] != name:
            at += struct.unpack_from(">I", content, at)[0]
        size = struct.unpack_from(">I", content, at)[0]
        struct.pack_into(">I", content, at, size + len(box))
        at, end = at + head, at + size
    content[end:end] = box
    path = tmp_path / "clap.mp4"
    path.write_bytes(content)
    av.logging.set_level(av.logging.INFO)
    try:
        with av.open(str(path)) as container:
            words = container.dumps_format()
            frame = next(container.decode(video=0))
    finally:
        av.logging.set_level(None)
    assert "\n      Frame Cropping: 40/20/12/20\n" in words
    assert words.count("  Stream #0:0[") == 1
    assert (frame.width, frame.height) == (160, 112)
