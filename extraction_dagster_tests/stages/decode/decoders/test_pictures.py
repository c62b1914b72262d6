"""Cropping, fields, transparency, and what changes in mid-file: each frame as a player shows it."""

import struct
from fractions import Fraction

import numpy as np
import pytest

from extraction_dagster.errors.decode import DolbyVisionError
from extraction_dagster.stages.decode.decoders.decoder import DecodeLimits
from extraction_dagster.stages.decode.decoders.pictures import _cropping, _dolby_vision

IN_ORDER = {"qp": "10", "bf": "0"}


def corner(picture):
    """Width and height of the red corner at the upper left."""
    red = (picture[..., 0] > 150) & (picture[..., 1] < 90) & (picture[..., 2] < 90)
    return int(red.any(0).sum()), int(red.any(1).sum())


def cornered(width, height):
    """A grey picture whose upper left quarter of a quarter is red."""
    image = np.full((height, width, 3), 90, np.uint8)
    image[: height // 4, : width // 4] = (255, 0, 0)
    return image


def dolby_vision(profile, compatibility):
    content = (
        bytes((1, 0)) + struct.pack(">H", profile << 9 | 6 << 3 | 0b101) + bytes((compatibility << 4,)) + bytes(19)
    )
    return struct.pack(">I4s", 8 + len(content), b"dvcC" if profile < 8 else b"dvvC") + content


# ---- cropping
@pytest.mark.parametrize(
    ("box", "size", "left_top"),
    [
        ((240, 160, 0, 0), (160, 240), (40, 40)),
        ((280, 200, 40, -40), (200, 280), (40, 0)),
        ((320, 240, 0, 0), (240, 320), (0, 0)),
    ],
    ids=["the middle", "upper right", "all of it"],
)
def test_a_clean_aperture_is_cut_out(box, size, left_top, tmp_path, decode, encoded, box_inserted, aperture):  # noqa: PLR0913, PLR0917 - fixtures
    y, x = np.mgrid[0:240, 0:320]
    image = np.stack([x * 0.7, y, np.zeros_like(x)], -1).astype(np.uint8)
    path = box_inserted(encoded(tmp_path / "clap.mp4", [image] * 3, options={"qp": "4"}), b"avc1", aperture(*box))
    picture = decode(path, short_side_px=500).frames.data[1].astype(int)
    assert picture.shape[:2] == size
    left, top = left_top
    expected = image[top : top + size[0], left : left + size[1]].astype(int)
    assert np.abs(picture - expected).mean() < 2


def test_cropping_that_leaves_nothing_is_not_done():
    class Context:
        width, height = 64, 48

    assert _cropping("      Frame Cropping: 40/40/0/0\n", Context()) is None
    assert _cropping("    Metadata:\n      title           : Frame Cropping: 1/1/1/1\n", Context()) is None
    assert _cropping("      Frame Cropping: 2/4/6/8\n", Context()) == (2, 6, 58, 34)


@pytest.mark.parametrize("crop", [(4, 2, 8, 6), (32, 0, 0, 0), (10, 0, 0, 0), (0, 10, 0, 0)], ids=str)
def test_a_streams_own_cropping_is_exact_at_every_edge(crop, tmp_path, decode, encoded):
    left, top, right, bottom = crop
    y, x = np.mgrid[0:96, 0:160]
    image = np.stack([x, y, np.zeros_like(x)], -1).astype(np.uint8)
    options = {"qp": "4", "x264-params": f"crop-rect={left},{top},{right},{bottom}"}
    picture = decode(encoded(tmp_path / "sps.mp4", [image] * 3, options=options)).frames.data[1].astype(int)
    expected = image[top : 96 - bottom, left : 160 - right].astype(int)
    assert picture.shape == expected.shape
    assert np.abs(picture - expected).mean() < 2


# ---- what changes in mid-file
def joined(tmp_path, *parts):
    path = tmp_path / "joined.ts"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    return path


def test_a_phone_that_is_turned_in_mid_recording_stays_in_proportion(tmp_path, decode, encoded):
    lying = encoded(tmp_path / "lying.ts", [cornered(320, 180)] * 20, options=IN_ORDER)
    standing = encoded(tmp_path / "standing.ts", [cornered(180, 320)] * 10, first=20, options=IN_ORDER)
    video = decode(joined(tmp_path, lying, standing))
    assert video.frames.data.shape == (30, 180, 320, 3)
    assert corner(video.frames.data[0]) == pytest.approx((80, 45), abs=1)
    assert corner(video.frames.data[-1]) == pytest.approx((25, 45), abs=1)
    assert video.frames.data[-1][:, :100].max() < 20  # beside it: black
    assert "size or turning changes: 320x180, 180x320 fitted into one" in video.notes


def test_the_size_that_most_frames_have_is_kept(tmp_path, decode, encoded):
    small = encoded(tmp_path / "small.ts", [cornered(160, 90)] * 5, options=IN_ORDER)
    large = encoded(tmp_path / "large.ts", [cornered(320, 180)] * 15, first=5, options=IN_ORDER)
    video = decode(joined(tmp_path, small, large))
    assert video.frames.data.shape == (20, 180, 320, 3)
    assert [corner(picture) for picture in video.frames.data[[1, -1]]] == [pytest.approx((80, 45), abs=1)] * 2


@pytest.mark.parametrize("reordered", [0, 2])
def test_an_aspect_that_changes_in_mid_file_is_that_of_each_frame(reordered, tmp_path, decode, encoded):
    parts = [
        encoded(
            tmp_path / f"{number}.ts",
            [cornered(160, 120)] * count,
            first=first,
            options={"qp": "10", "x264-params": f"bframes={reordered}:b-adapt=0"},
            of_context={"sample_aspect_ratio": Fraction(aspect, 1)},
        )
        for number, (first, count, aspect) in enumerate(((0, 12, 2), (20, 9, 1)))
    ]
    video = decode(joined(tmp_path, *parts))
    assert video.frames.data.shape == (21, 120, 320, 3)
    wide = [corner(picture)[0] for picture in video.frames.data]
    assert wide == [pytest.approx(80, abs=1)] * 12 + [pytest.approx(40, abs=1)] * 9


# ---- fields
@pytest.mark.parametrize(
    ("codec", "name", "options", "top_first"),
    [
        ("libx264", "a.mp4", {"qp": "4", "x264-params": "tff=1"}, True),
        ("libx264", "a.mp4", {"qp": "4", "x264-params": "bff=1"}, False),
        ("libx264", "a.ts", {"qp": "4", "x264-params": "tff=1"}, True),
        # FFmpeg writes the order in which fields are stored, and reads it as that in which they are shown.
        ("libx264", "a.mkv", {"qp": "4", "x264-params": "tff=1"}, True),
        ("prores_ks", "a.mov", {"flags": "+ildct"}, True),
        ("prores_ks", "a.mov", {"flags": "+ildct"}, False),
        ("mpeg2video", "a.mpg", {"flags": "+ilme+ildct", "b": "8M", "qmin": "1"}, False),
    ],
    ids=lambda value: value if isinstance(value, (str, bool)) else "",
)
def test_interlaced_frames_show_their_first_field(  # noqa: PLR0913, PLR0917 - fixtures
    codec, name, options, top_first, tmp_path, decode, encoded, weave, moments
):
    import av

    path = tmp_path / name
    pairs = zip(moments[::2], moments[1::2], strict=True)
    images = [weave(first, second, top_first=top_first) for first, second in pairs]
    kept_apart = {"field_order": 4 if top_first else 5} if name.endswith(("mkv", "mov")) else {}
    pixels = {"pix_fmt": "yuv422p10le"} if codec == "prores_ks" else {}
    order = "tff" if top_first else "bff"
    encoded(path, images, codec=codec, rate=25, options=options, first_field=order, of_context=kept_apart, **pixels)
    with av.open(str(path)) as container:
        assert next(container.decode(video=0)).interlaced_frame
    video = decode(path, fps=25.0)
    assert "interlaced: one field of each frame" in video.notes
    for number, picture in enumerate(video.frames.data[2:10], 2):
        bar = np.abs(np.diff(picture[60:160, :, 0].astype(int), axis=0)).max()
        assert bar < 30  # no comb
        columns = np.flatnonzero(picture[110, :, 0] > 150)
        left = columns.min() * 360 / picture.shape[1]
        assert left == pytest.approx(24 * number, abs=3)  # the moment of the first field


def test_which_field_is_first_is_said_by_each_frame(tmp_path, decode, encoded, weave, moments):
    pairs = list(zip(moments[::2], moments[1::2], strict=True))
    parts = []
    for number, order in enumerate(("tff", "bff")):
        images = [weave(*pair, top_first=order == "tff") for pair in pairs[6 * number : 6 * number + 6]]
        options = {"qp": "4", "bf": "0", "x264-params": f"{order}=1"}
        parts.append(
            encoded(
                tmp_path / order, images, rate=25, first=6 * number, options=options, first_field=order, form="mpegts"
            )
        )
    pictures = decode(joined(tmp_path, *parts), fps=25.0).frames.data
    left = [np.flatnonzero(picture[110, :, 0] > 150).min() * 360 / picture.shape[1] for picture in pictures]
    assert left == pytest.approx([24 * number for number in range(12)], abs=3)


def test_progressive_frames_keep_all_their_rows(tmp_path, decode, encoded, moments):
    path = encoded(tmp_path / "progressive.mp4", moments[:6], rate=25)
    assert not any("interlaced" in note for note in decode(path).notes)


# ---- transparency
@pytest.mark.parametrize(
    ("codec", "name", "pix_fmt", "options"),
    [
        ("qtrle", "a.mov", "argb", {}),
        ("png", "a.mov", "rgba", {}),
        ("png", "a.mov", "rgba64be", {}),
        ("prores_ks", "a.mov", "yuva444p10le", {"profile": "4444", "qscale": "2"}),
        ("ffv1", "a.mkv", "yuva420p", {}),
        ("ffv1", "a.mkv", "bgra", {}),
        ("utvideo", "a.avi", "gbrap", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_transparent_comes_out_on_black(  # noqa: PLR0913, PLR0917 - fixtures
    codec, name, pix_fmt, options, tmp_path, decode, encoded, transparent_image
):
    path = encoded(
        tmp_path / name, [transparent_image] * 3, codec=codec, pix_fmt=pix_fmt, options=options, source="rgba"
    )
    video = decode(path, limits=DecodeLimits(codecs=codec if codec != "prores_ks" else "prores"))
    seen = [video.frames.data[1][24:40, x : x + 10].reshape(-1, 3).mean(0).round().tolist() for x in (10, 43, 80)]
    assert seen == [
        pytest.approx([200, 100, 50], abs=4),
        pytest.approx([100, 50, 25], abs=5),
        pytest.approx([0, 0, 0], abs=3),
    ]
    assert "transparency: on black" in video.notes


def test_opaque_pictures_with_an_alpha_channel_are_what_they_are_without(tmp_path, decode, encoded):
    image = np.full((64, 96, 4), 255, np.uint8)
    image[..., :3] = np.random.default_rng(3).integers(0, 255, (64, 96, 3))
    path = encoded(tmp_path / "opaque.mov", [image] * 3, codec="png", pix_fmt="rgba", options={}, source="rgba")
    video = decode(path)
    assert np.array_equal(video.frames.data[1], image[..., :3])
    assert not any("transparency" in note for note in video.notes)


# ---- Dolby Vision
@pytest.mark.parametrize(("profile", "compatibility"), [(5, 0), (10, 0)])
def test_dolby_vision_without_a_layer_for_others_is_refused_by_name(profile, compatibility, draw, decode, box_inserted):
    path = draw(codec="hevc", pix_fmt="yuv420p10le", planes=9, hdr=16, said=(9, 9, 16, 1))
    with pytest.raises(
        DolbyVisionError, match=rf"Dolby Vision profile {profile} without a compatible base layer"
    ) as raised:
        decode(box_inserted(path, b"hev1", dolby_vision(profile, compatibility)))
    assert str(path) in str(raised.value)


@pytest.mark.parametrize(("profile", "compatibility", "hdr"), [(7, 6, 16), (8, 1, 16), (8, 4, 18)])
def test_dolby_vision_with_a_layer_for_others_shows_that(  # noqa: PLR0913, PLR0917 - fixtures
    profile, compatibility, hdr, draw, decode, farthest, box_inserted
):
    path = draw(codec="hevc", pix_fmt="yuv420p10le", planes=9, hdr=hdr, said=(9, 9, hdr, 1))
    video = decode(box_inserted(path, b"hev1", dolby_vision(profile, compatibility)))
    assert farthest(video.frames.data[1]) < 24


def test_what_libavformat_says_of_dolby_vision_is_read():
    line = "      DOVI configuration record: version: 1.0, profile: 8, level: 6, rpu flag: 1, el flag: 0, bl flag: 1"
    line += ", compatibility id: 4, compression: 0\n"
    assert _dolby_vision("    Side data:\n" + line) == (8, 4)
    assert _dolby_vision("") is None
