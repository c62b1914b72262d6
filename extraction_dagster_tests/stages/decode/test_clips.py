"""The rendered videos are what their names say: without that, an exact decode of them would prove little."""

import itertools

import pytest


@pytest.fixture
def look(clip_path):
    """A clip's stream, and when and how its packets are shown, in decode order."""

    def open_clip(name):
        import av

        with av.open(str(clip_path(name))) as container:
            stream = container.streams.video[0]
            packets = [packet for packet in container.demux(stream) if packet.size]
            context = stream.codec_context
            return {
                "codec": context.name,
                "container": container.format.name.split(",")[0],
                "pix_fmt": context.pix_fmt,
                "size": (context.width, context.height),
                "start": stream.start_time,
                "pts": [packet.pts for packet in packets],
                "keyframes": [number for number, packet in enumerate(packets) if packet.is_keyframe],
                "discarded": sum(packet.is_discard for packet in packets),
            }

    return open_clip


@pytest.mark.parametrize(
    ("name", "codec", "container", "pix_fmt"),
    [
        ("h264 open GOP in TS", "h264", "mpegts", "yuv420p"),
        ("h264 open GOP in Matroska", "h264", "matroska", "yuv420p"),
        ("h264 10-bit", "h264", "mov", "yuv420p10le"),
        ("h264 4:4:4 odd size", "h264", "matroska", "yuv444p"),
        ("hevc 10-bit", "hevc", "mov", "yuv420p10le"),
        ("vp8 with hidden frames", "vp8", "matroska", "yuv420p"),
        ("vp9", "vp9", "matroska", "yuv420p"),
        ("vp9 4:4:4", "vp9", "matroska", "yuv444p"),
        ("av1", "libdav1d", "mov", "yuv420p"),
        ("mpeg2 in a program stream", "mpeg2video", "mpeg", "yuv420p"),
        ("mpeg4 with B-frames in AVI", "mpeg4", "avi", "yuv420p"),
        ("mjpeg in AVI", "mjpeg", "avi", "yuvj420p"),
        ("gif", "gif", "gif", "bgra"),
    ],
)
def test_codecs_containers_and_pixels(name, codec, container, pix_fmt, look):
    found = look(name)
    assert (found["codec"], found["container"], found["pix_fmt"]) == (codec, container, pix_fmt)


@pytest.mark.parametrize("name", ["h264 4:4:4 odd size", "vp9 odd size", "mpeg4 odd size"])
def test_odd_sizes_are_odd(name, look):
    assert look(name)["size"] == (161, 97)


def leading(found):
    """Packets that come after a keyframe and are shown before it."""
    pts, keyframes = found["pts"], found["keyframes"]
    return [at for number, at in enumerate(pts) if any(key < number and at < pts[key] for key in keyframes)]


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("h264 open GOP", 9),
        ("h264 open GOP in TS", 9),
        ("h264 open GOP in Matroska", 9),
        ("hevc open GOP", 9),
        ("hevc open GOP in TS", 9),
        ("mpeg2 with B-frames in TS", 7),
        ("h264 with B-frames", 0),
    ],
)
def test_in_open_groups_frames_lead_their_keyframe(name, count, look):
    assert len(leading(look(name))) == count


@pytest.mark.parametrize("name", ["h264 cut out of a longer video", "h264 cut out of a longer TS"])
def test_cut_streams_show_frames_first_that_need_what_was_cut_off(name, look):
    found = look(name)
    assert found["keyframes"][0] == 0
    assert min(found["pts"]) < found["pts"][0]


def test_one_stream_begins_in_the_middle_of_a_group(look):
    assert look("h264 begins without a keyframe")["keyframes"][0] == 7


def test_starts_lie_where_their_names_say(look):
    assert look("h264 negative start in TS")["start"] < 0 < max(look("h264 negative start in TS")["pts"])
    assert look("h264 late start")["start"] == 10_000
    assert look("h264 without times at first")["pts"][:6] == [None, None, None, None, None, 0]
    assert (look("h264 edit list")["discarded"], min(look("h264 edit list")["pts"])) == (5, -2560)


def test_frames_come_at_uneven_times_in_a_variable_frame_rate(look):
    pts = sorted(look("h264 variable frame rate")["pts"])
    assert len({after - before for before, after in itertools.pairwise(pts)}) > 3


def test_a_fragmented_file_has_its_index_in_pieces(clip_path):
    assert clip_path("h264 fragmented").read_bytes().count(b"moof") == 5
    assert clip_path("h264").read_bytes().count(b"moof") == 0


def test_frames_for_reference_alone_have_packets_of_their_own(look, truth_of):
    assert len(look("vp8 with hidden frames")["pts"]) == 48 + 9
    assert len(truth_of("vp8 with hidden frames").seconds) == 48


def test_packets_that_are_not_coded_give_no_frame(look, truth_of):
    assert len(look("mpeg4 with frames not coded")["pts"]) == 48
    assert len(truth_of("mpeg4 with frames not coded").seconds) == 42
