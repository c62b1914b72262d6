import numpy as np
import simplejpeg

from extraction_dagster.records import FrameBatch
from extraction_dagster.stages.decode.decoders.decoder import DecodedVideo
from extraction_dagster.stages.decode.jpeg import decode_frames, encode_frames, shrink_jpeg


def video(partial=None):
    y, x = np.mgrid[0:48, 0:64]
    data = np.stack([np.stack([4 * x, 5 * y, (x + y + 40 * n) % 256], axis=-1) for n in range(3)]).astype(np.uint8)
    # Turned pictures are views with odd strides; they must encode as they look.
    frames = FrameBatch(data[:, :, ::-1], np.array([0.0, 0.5, 1.0]), np.array([0.0, 0.6, 1.2]), np.array([0, 12, 24]))
    return DecodedVideo(frames, 1.5, partial)


def test_frames_survive_as_jpeg_in_full_colour():
    encoded = encode_frames(video("half is missing"), record_id=7, content_version="v1", quality=95)
    assert (encoded.record_id, encoded.content_version, encoded.partial) == (7, "v1", "half is missing")
    assert (encoded.width_px, encoded.height_px, encoded.duration_seconds) == (64, 48, 1.5)
    assert simplejpeg.decode_jpeg_header(encoded.jpegs[0]) == (48, 64, "YCbCr", "444")
    back = decode_frames(encoded)
    assert np.abs(back.data.astype(int) - video().frames.data).mean() < 2.0
    assert back.pts_seconds.tolist() == [0.0, 0.5, 1.0]
    assert back.target_seconds.tolist() == [0.0, 0.6, 1.2]
    assert back.frame_number.tolist() == [0, 12, 24]


def test_a_lower_quality_is_smaller():
    high = encode_frames(video(), record_id=7, content_version="", quality=95)
    low = encode_frames(video(), record_id=7, content_version="", quality=40)
    assert sum(map(len, low.jpegs)) < sum(map(len, high.jpegs))


def test_a_shrunk_picture_keeps_its_shape_and_is_never_enlarged():
    (jpeg, *_) = encode_frames(video(), record_id=7, content_version="", quality=95).jpegs
    small = shrink_jpeg(jpeg, longest_px=32, quality=70)
    assert simplejpeg.decode_jpeg_header(small)[:2] == (24, 32)
    assert len(small) < len(jpeg)
    assert simplejpeg.decode_jpeg_header(shrink_jpeg(jpeg, longest_px=500, quality=70))[:2] == (48, 64)


def test_what_is_no_picture_can_not_be_shrunk():
    assert shrink_jpeg(b"no jpeg", longest_px=32, quality=70) is None
