import struct

import numpy as np
import pytest

from extraction_dagster.stages.decode.decoders.decoder import DecodeLimits
from extraction_dagster.stages.decode.decoders.geometry import Geometry, _turn, scaled_size
from extraction_dagster.stages.decode.decoders.pyav import decode_with_pyav
from extraction_dagster.stages.decode.sampling import Sampling


def coloured(width, height, *, seed=1):
    """A frame of soft noise in planes of 4:2:0, each of the colours as sharp as its plane allows."""
    import av
    import cv2

    noise = np.random.default_rng(seed).integers(0, 255, (max(2, height // 8), max(2, width // 8), 3), np.uint8)
    image = cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
    return av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format="yuv420p")


def shown(frame, short_side_px):
    from av.video.reformatter import VideoReformatter

    return Geometry.of(frame, sample_aspect=1.0, short_side_px=short_side_px).show(frame, VideoReformatter())


def test_pixels_are_the_means_of_their_area_in_every_colour():
    import cv2

    frame = coloured(1280, 720)
    planes = frame.to_ndarray()[:720], *frame.to_ndarray()[720:].reshape(2, 360, 640)
    luma, blue, red = (cv2.resize(plane.astype(float), (398, 224), interpolation=cv2.INTER_AREA) for plane in planes)
    light, blue, red = (luma - 16) * 255 / 219, (blue - 128) * 255 / 224, (red - 128) * 255 / 224
    ideal = np.stack([light + 1.402 * red, light - 0.344136 * blue - 0.714136 * red, light + 1.772 * blue], -1)
    assert np.abs(shown(frame, 224) - ideal.clip(0, 255)).max() < 1.5


@pytest.mark.parametrize("width", [*range(33, 71), 398])
def test_every_column_is_written_where_the_size_stays(width):
    frame = coloured(width, 64)
    first = shown(frame, 224)
    for value in (0, 85, 255):
        _ = np.full(400_000, value, np.uint8)  # what the next picture's memory holds before
        assert np.array_equal(shown(frame, 224), first)


@pytest.mark.parametrize(
    ("size", "sample_aspect", "short_side_px", "expected"),
    [
        ((1280, 720), 1.0, 224, (398, 224)),
        ((720, 1280), 1.0, 224, (224, 398)),
        ((160, 90), 1.0, 224, (160, 90)),
        ((640, 360), 2.0, 224, (796, 224)),
        ((120, 270), 4.0, 224, (398, 224)),
        ((1, 1), 1.0, 224, (1, 1)),
        ((60_000, 16), 1.0, 224, (16_384, 4)),
    ],
)
def test_the_short_side_is_scaled_in_square_pixels_and_never_up(size, sample_aspect, short_side_px, expected):
    assert scaled_size(*size, sample_aspect=sample_aspect, short_side_px=short_side_px) == expected


@pytest.mark.parametrize(
    ("matrix", "turn"),
    [
        ((65536, 0, 0, 65536), (False, False, False)),
        ((0, 65536, -65536, 0), (True, True, False)),
        ((-65536, 0, 0, -65536), (False, True, True)),
        ((0, -65536, 65536, 0), (True, False, True)),
        ((-65536, 0, 0, 65536), (False, True, False)),
        ((65536, 0, 0, -65536), (False, False, True)),
        ((0, 65536, 65536, 0), (True, False, False)),
        ((0, 0, 0, 0), (False, False, False)),
    ],
)
def test_a_display_matrix_turns_and_mirrors(matrix, turn):
    assert _turn(matrix) == turn


def write_motion_jpeg(path, source, orientation):
    """Copy a Motion JPEG video with an Exif header in every picture, as cameras write it; 1 is upright."""
    import av

    tag = struct.pack("<HHIHH", 0x0112, 3, 1, orientation, 0)
    body = b"Exif\0\0" + b"II*\0" + struct.pack("<IH", 8, 1) + tag + struct.pack("<I", 0)
    header = b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body
    with av.open(str(source)) as read, av.open(str(path), "w") as written:
        stream = written.add_stream_from_template(read.streams.video[0])
        for number, packet in enumerate(packet for packet in read.demux(video=0) if packet.size):
            jpeg = bytes(packet)
            copy = av.Packet(jpeg[:2] + header + jpeg[2:])
            copy.stream, copy.time_base, copy.pts, copy.dts = stream, packet.time_base, number, number
            written.mux(copy)


# What an Exif orientation asks for: mirrored left to right or not, then counterclockwise quarter turns.
@pytest.mark.parametrize(
    ("orientation", "mirrored", "turns"),
    [
        (1, False, 0),
        (2, True, 0),
        (3, False, 2),
        (4, True, 2),
        (5, True, 1),
        (6, False, -1),
        (7, True, -1),
        (8, False, 1),
    ],
)
def test_a_turn_is_kept_where_pyav_can_not_name_a_frames_other_side_data(
    orientation, mirrored, turns, clip_path, tmp_path
):
    import av

    path = tmp_path / "camera.avi"
    write_motion_jpeg(path, clip_path("mjpeg in AVI"), orientation)
    with av.open(str(path)) as container, pytest.raises(ValueError, match="is not a valid Type"):
        _ = next(container.decode(video=0)).side_data

    def shown(video):
        return decode_with_pyav(video, sampling=Sampling(), short_side_px=500, limits=DecodeLimits()).frames.data

    upright = [picture[:, ::-1] if mirrored else picture for picture in shown(clip_path("mjpeg in AVI"))]
    expected = np.stack([np.rot90(picture, turns) for picture in upright])
    assert np.array_equal(shown(path), expected)
