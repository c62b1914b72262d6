"""What decord does not do about pictures: each a strict expected failure, so that an improvement upstream shows up."""

import numpy as np
import pytest

from extraction_dagster.stages.decode.decoders.decoder import DecodeLimits
from extraction_dagster.stages.decode.decoders.decord import decode_with_decord
from extraction_dagster.stages.decode.sampling import Sampling

UNKNOWN = "log-level=none:qp=4:pools=none:frame-threads=1:colormatrix=unknown:colorprim=unknown:transfer=unknown"
TEN_BITS = {"codec": "hevc", "pix_fmt": "yuv420p10le", "planes": 9}
WRONG = {
    "BT.601 is assumed whatever the size": {"planes": 1, "size": (1280, 720)},
    "what only the container says of HEVC is lost": {
        "codec": "hevc",
        "planes": 1,
        "said": (1, 1, 1, 1),
        "options": {"x265-params": UNKNOWN},
    },
    "a matrix that libswscale refuses loses the video": {"planes": 8, "said": (8, 2, 2, 1)},
    "PQ is shown as if it were SDR": {**TEN_BITS, "hdr": 16, "said": (9, 9, 16, 1)},
    "HLG is shown as if it were SDR": {**TEN_BITS, "hdr": 18, "said": (9, 9, 18, 1)},
    "wide primaries are taken for BT.709's": {**TEN_BITS, "wide": True, "said": (9, 9, 14, 1)},
}
RIGHT = {
    "BT.601": {"planes": 6, "said": (6, 2, 2, 1)},
    "BT.709": {"planes": 1, "said": (1, 2, 2, 1)},
    "full range": {"planes": 6, "full": True, "said": (6, 2, 2, 2)},
}


def pictures(path):
    sampling = Sampling("fps", 10.0)
    return decode_with_decord(path, sampling=sampling, short_side_px=224, limits=DecodeLimits()).frames.data


@pytest.mark.parametrize("name", RIGHT)
def test_decord_reads_the_colours_that_streams_say(name, draw, farthest):
    assert farthest(pictures(draw(**RIGHT[name]))[0]) <= 3


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.xfail(reason=name)) for name in WRONG])
def test_decord_understands_colours(name, draw, farthest):
    assert farthest(pictures(draw(**WRONG[name]))[0]) < 20


@pytest.mark.xfail(reason="decord shows what the container says is cut off")
def test_decord_cuts_out_a_clean_aperture(clean_aperture_clip):
    assert pictures(clean_aperture_clip).shape[1:3] == (160, 240)


@pytest.mark.xfail(reason="decord weaves the fields of interlaced frames")
def test_decord_takes_fields_apart(interlaced_clip):
    bar = pictures(interlaced_clip)[2][60:160, :, 0].astype(int)
    assert np.abs(np.diff(bar, axis=0)).max() < 30


@pytest.mark.xfail(reason="decord shows the colour that pixels have under full transparency")
def test_decord_puts_what_is_transparent_on_black(transparent_clip):
    assert pictures(transparent_clip)[1][32, 80].tolist() == pytest.approx([0, 0, 0], abs=3)
