"""Twelve patches and a number, drawn by the standards' formulas, come back through every way to say what they mean."""

import itertools
import struct
from fractions import Fraction

import numpy as np
import pytest

from extraction_dagster.settings import Settings
from extraction_dagster.stages.decode.decoders.colours import Colours, Said, _ease, _light, _srgb
from extraction_dagster.stages.embed.models.registry import load_model
from extraction_dagster.stages.embed.passes import normalise

CONTAINERS = {
    "h264": ("mp4", "mkv", "ts", "mov", "avi", "flv"),
    "hevc": ("mp4", "mkv", "ts", "mov"),
    "vp9": ("webm", "mkv", "mp4"),
    "av1": ("mp4", "webm", "mkv"),
    "mpeg2": ("ts", "mpg", "mkv", "mov", "mp4"),
    "prores": ("mov", "mkv"),
    "ffv1": ("mkv", "mov", "avi"),
}
PIXELS = {
    "h264": ("yuv420p", "yuv422p", "yuv444p", "yuv420p10le", "yuv422p10le", "yuv444p10le"),
    "hevc": ("yuv420p", "yuv422p", "yuv444p", "yuv420p10le", "yuv422p10le", "yuv444p12le"),
    "vp9": ("yuv420p", "yuv444p"),
    "av1": ("yuv420p", "yuv420p10le"),
    "mpeg2": ("yuv420p", "yuv422p"),
    "prores": ("yuv422p10le", "yuv444p10le"),
    "ffv1": ("yuv420p", "yuv444p16le"),
}
# The matrices that a stream of the codec can name; an AVI's or a raw stream's container names none.
MATRICES = {
    "h264": (1, 4, 5, 6, 7, 8, 9, 10, 12),
    "hevc": (1, 4, 5, 6, 7, 8, 9, 10, 12),
    "vp9": (1, 5, 6, 7, 9),
    "av1": (1, 4, 5, 6, 7, 9, 10, 12),
    "mpeg2": (1, 4, 5, 6, 7),
    "prores": (1, 6, 9),
}
TRANSFERS = (1, 4, 5, 6, 7, 13, 14, 15)
NEVER_FULL = {"mpeg2", "prores"}
HDR = {"h264": "yuv420p10le", "hevc": "yuv420p10le", "av1": "yuv420p10le", "prores": "yuv422p10le"}
SILENT_HEVC = "log-level=none:qp=4:pools=none:frame-threads=1:colormatrix=unknown:colorprim=unknown:transfer=unknown"
UNSAID_BY_THE_STREAM = {
    "hevc": {"x265-params": SILENT_HEVC},
    "h264": {"x264-params": "colormatrix=undef:colorprim=undef:transfer=undef"},
}
REWRITTEN = {
    "av1": "av1_metadata=color_primaries=2:transfer_characteristics=2:matrix_coefficients=2",
    "vp9": "vp9_metadata=color_space=unknown",
    "mpeg2": "mpeg2_metadata=colour_primaries=2:transfer_characteristics=2:matrix_coefficients=2",
    "prores": "prores_metadata=color_primaries=unknown:color_trc=unknown:colorspace=unknown",
}


def sdr_ways():
    """Every codec with every matrix, range, pixel format, container and transfer, each value beside all others once."""
    for codec, matrices in MATRICES.items():
        ranges = (False,) if codec in NEVER_FULL else (False, True)
        pixels, containers = itertools.cycle(PIXELS[codec]), itertools.cycle(CONTAINERS[codec])
        transfers = itertools.cycle(TRANSFERS)
        for matrix, full in itertools.product(matrices, ranges):
            yield codec, next(containers), next(pixels), matrix, full, next(transfers)


def every_sdr_way():
    """Every combination of codec, container, pixel format, matrix and range; the transfers in turn."""
    transfers = itertools.cycle(TRANSFERS)
    for codec, matrices in MATRICES.items():
        ranges = (False,) if codec in NEVER_FULL else (False, True)
        for way in itertools.product((codec,), CONTAINERS[codec], PIXELS[codec], matrices, ranges):
            yield *way, next(transfers)


def hdr_ways():
    for codec, pixels in HDR.items():
        for container in CONTAINERS[codec]:
            for transfer, matrix in itertools.product((16, 18), (9,) if codec == "prores" else (9, 14)):
                yield codec, container, pixels, matrix, transfer


FEW_SDR = list(sdr_ways())
FEW_HDR = [way for way in hdr_ways() if way[1] == CONTAINERS[way[0]][0]]


def look_at_sdr(way, draw, decode, farthest, drawn_number):
    codec, container, pixels, matrix, full, transfer = way
    said = (matrix, 1 if matrix == 12 else 2, transfer, 2 if full else 1)
    path = draw(codec=codec, name=f"sdr.{container}", pix_fmt=pixels, planes=matrix, full=full, said=said)
    video = decode(path)
    assert [drawn_number(picture) for picture in video.frames.data] == [0, 1, 2, 3]
    assert max(map(farthest, video.frames.data)) <= 3


def look_at_hdr(way, draw, decode, patches, drawn_number):
    codec, container, pixels, matrix, transfer = way
    path = draw(
        codec=codec, name=f"hdr.{container}", pix_fmt=pixels, planes=matrix, hdr=transfer, said=(matrix, 9, transfer, 1)
    )
    video = decode(path)
    assert [drawn_number(picture) for picture in video.frames.data] == [0, 1, 2, 3]
    red, green, blue, yellow, cyan, magenta, white, black, grey, skin, leaf, sea = itertools.chain(
        *patches(video.frames.data[1])
    )
    assert white == pytest.approx((249, 249, 249), abs=2)
    assert (black, grey) == (pytest.approx((0, 0, 0), abs=3), pytest.approx((128, 128, 128), abs=3))
    for colour, expected in (
        (red, (249, 0, 0)),
        (green, (0, 249, 0)),
        (blue, (0, 0, 249)),
        (yellow, (249, 249, 0)),
        (cyan, (0, 249, 249)),
        (magenta, (249, 0, 249)),
    ):
        assert colour == pytest.approx(
            expected, abs=24
        )  # a step of 10 bits, next to nothing in light, is that much of sRGB
        assert max(abs(got - wanted) for got, wanted in zip(colour, expected, strict=True) if wanted) <= 3
    assert skin == pytest.approx((200, 120, 90), abs=3)
    assert leaf == pytest.approx((60, 120, 60), abs=3)
    assert sea == pytest.approx((30, 60, 140), abs=3)


@pytest.mark.parametrize("way", FEW_SDR, ids=lambda way: "-".join(map(str, way)))
def test_patches_come_back_from_each_matrix_and_range(way, draw, decode, farthest, drawn_number):
    look_at_sdr(way, draw, decode, farthest, drawn_number)


@pytest.mark.parametrize("way", FEW_HDR, ids=lambda way: "-".join(map(str, way)))
def test_hdr_comes_out_as_the_sdr_that_it_was_made_of(way, draw, decode, patches, drawn_number):
    look_at_hdr(way, draw, decode, patches, drawn_number)


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_patches_come_back_from_every_combination(draw, decode, farthest, drawn_number):
    ways = list(every_sdr_way())
    for way in ways:
        look_at_sdr(way, draw, decode, farthest, drawn_number)
    print(f"{len(ways)} combinations of codec, container, pixel format, matrix and range")


@pytest.mark.soak
@pytest.mark.parametrize(
    "way", [way for way in hdr_ways() if way not in FEW_HDR], ids=lambda way: "-".join(map(str, way))
)
def test_hdr_comes_out_right_from_every_container(way, draw, decode, patches, drawn_number):
    look_at_hdr(way, draw, decode, patches, drawn_number)


# ---- who says it
@pytest.mark.parametrize(
    ("size", "matrix"),
    [((320, 240), 6), ((1278, 576), 6), ((1280, 536), 1), ((1280, 720), 1), ((720, 1280), 1), ((576, 1024), 1)],
    ids=str,
)
def test_the_size_decides_where_nothing_else_does(size, matrix, draw, decode, farthest):
    assert farthest(decode(draw(size=size, planes=matrix, frames=2)).frames.data[0]) <= 3


@pytest.mark.parametrize("container", ["mp4", "mkv", "mov"])
@pytest.mark.parametrize("codec", ["hevc", "h264"])
def test_what_the_container_alone_says_counts(codec, container, draw, decode, farthest):
    import av

    path = draw(codec=codec, name=f"a.{container}", planes=1, said=(1, 1, 1, 1), options=UNSAID_BY_THE_STREAM[codec])
    assert farthest(decode(path).frames.data[0]) <= 3
    with av.open(str(path)) as opened:
        assert opened.streams.video[0].codec_context.colorspace == 1
        assert next(opened.decode(video=0)).colorspace == (2 if codec == "hevc" else 1)


@pytest.mark.parametrize(
    ("codec", "container", "pixels"),
    [
        ("av1", "mp4", "yuv420p"),
        ("av1", "mkv", "yuv420p"),
        ("vp9", "mp4", "yuv420p"),
        ("vp9", "webm", "yuv420p"),
        ("mpeg2", "mkv", "yuv420p"),
        ("mpeg2", "mov", "yuv420p"),
        ("prores", "mov", "yuv422p10le"),
        ("prores", "mkv", "yuv422p10le"),
    ],
)
def test_what_the_container_alone_says_counts_where_the_stream_was_rewritten(  # noqa: PLR0913, PLR0917 - fixtures
    codec, container, pixels, draw, decode, farthest
):
    import av

    path = draw(
        codec=codec, name=f"a.{container}", pix_fmt=pixels, planes=1, said=(1, 1, 1, 1), rewrite=REWRITTEN[codec]
    )
    with av.open(str(path)) as opened:
        assert next(opened.decode(video=0)).colorspace in {0, 2}
    assert farthest(decode(path).frames.data[0]) <= 3


def test_colours_that_change_in_mid_file_are_those_of_each_frame(draw, decode, farthest, tmp_path):
    parts = [
        draw(name="a.ts", planes=1, said=(1, 1, 1, 1), options={"bf": "0"}),
        draw(name="b.ts", planes=8, said=(8, 1, 1, 1), options={"bf": "0"}, first=4),
        draw(name="c.ts", planes=6, full=True, said=(6, 1, 1, 2), options={"bf": "0"}, first=8),
    ]
    path = tmp_path / "joined.ts"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    video = decode(path)
    assert len(video.frames) == 12
    assert max(map(farthest, video.frames.data)) <= 3
    assert [note for note in video.notes if note.startswith("colours")] == [
        "colours: BT.709, limited range",
        "colours: YCgCo, limited range",
        "colours: BT.601, full range",
    ]


@pytest.mark.parametrize(("pixels", "full"), [("gbrp", True), ("gbrp", False), ("gbrp10le", True), ("gbrp10le", False)])
def test_planes_of_red_green_and_blue_have_a_range_too(pixels, full, draw, decode, farthest):
    path = draw(codec="hevc", name="a.mkv", pix_fmt=pixels, planes=0, full=full, said=(0, 1, 1, 2 if full else 1))
    assert farthest(decode(path).frames.data[0]) <= 3


def test_full_range_that_the_container_alone_says_counts(draw, decode, farthest, box_inserted):
    import av

    path = draw(codec="hevc", planes=1, full=True)
    box_inserted(path, b"hev1", struct.pack(">I4s4sHHHB", 19, b"colr", b"nclx", 1, 1, 1, 0x80))
    with av.open(str(path)) as opened:
        assert next(opened.decode(video=0)).color_range == 1  # by default
    assert farthest(decode(path).frames.data[0]) <= 3


def test_the_size_of_an_avif_decides_nothing(draw, decode, farthest):
    path = draw(codec="av1", name="a.avif", size=(1280, 144), planes=6, full=True, said=(2, 2, 2, 2), frames=2)
    assert farthest(decode(path).frames.data[0]) <= 3


def test_vp8_can_not_contradict_its_container(draw, decode, farthest):
    path = draw(codec="vp8", name="a.webm", planes=1, said=(1, 1, 1, 1))
    assert farthest(decode(path).frames.data[0]) <= 4


@pytest.mark.parametrize("colour_range", [1, 2], ids=["limited", "full"])
@pytest.mark.parametrize(
    ("codec", "options"), [("ffv1", {}), ("libx265", {"x265-params": "log-level=none:qp=4:bframes=0"})]
)
def test_grey_pictures_have_a_range_too(codec, options, colour_range, tmp_path, decode, encoded):  # noqa: PLR0913, PLR0917 - fixtures
    levels = np.array([0, 64, 128, 255])
    stored = levels if colour_range == 2 else (levels / 255 * 219 + 16).round()
    image = np.repeat(stored, 24).astype(np.uint8) * np.ones((72, 1), np.uint8)
    path = tmp_path / "grey.mkv"
    encoded(
        path,
        [image],
        codec=codec,
        pix_fmt="gray",
        source="gray",
        options=options,
        of_context={"color_range": colour_range},
    )
    seen = decode(path).frames.data[0][:, 12::24].mean(axis=(0, 2))
    assert seen == pytest.approx(levels, abs=2)


@pytest.mark.parametrize("transfer", [14, 1, 2], ids=["BT.2020", "BT.709", "unsaid"])
def test_wide_sdr_is_brought_to_the_primaries_that_screens_have(transfer, draw, decode, farthest):
    path = draw(codec="hevc", pix_fmt="yuv422p10le", planes=9, wide=True, said=(9, 9, transfer, 1))
    assert farthest(decode(path).frames.data[0]) <= 5


def test_hdr_without_a_word_on_matrix_and_primaries_is_bt2020(draw, decode, farthest):
    path = draw(codec="hevc", pix_fmt="yuv420p10le", planes=9, hdr=16, said=(2, 2, 16, 1))
    assert farthest(decode(path).frames.data[0]) < 24


def test_without_tone_mapping_the_signal_is_taken_as_it_is(draw, decode, patches):
    path = draw(codec="hevc", pix_fmt="yuv420p10le", planes=9, hdr=16, said=(9, 9, 16, 1))
    assert patches(decode(path, tone_map=False).frames.data[0])[1][2] == pytest.approx((148, 148, 148), abs=2)
    path = draw(codec="hevc", pix_fmt="yuv420p10le", planes=14, hdr=16, said=(14, 9, 16, 1))
    assert patches(decode(path, tone_map=False).frames.data[0])[1][2] == pytest.approx((148, 148, 148), abs=2)
    path = draw(codec="hevc", pix_fmt="yuv420p10le", planes=9, hdr=18, said=(9, 9, 18, 1))
    assert patches(decode(path, tone_map=False).frames.data[0])[1][2] == pytest.approx((191, 191, 191), abs=2)


@pytest.mark.parametrize(("transfer", "without"), [(16, 0.95), (18, 0.98)], ids=["HDR10", "HLG"])
def test_a_frame_of_the_sdr_master_finds_its_hdr_version(transfer, without, draw, decode):
    model = load_model(Settings(device="cpu", embed_threads=1))
    ways = {
        "sdr": ({"planes": 1, "said": (1, 1, 1, 1)}, True),
        "hdr": ({"planes": 9, "hdr": transfer, "said": (9, 9, transfer, 1)}, True),
        "as it is": ({"planes": 9, "hdr": transfer, "said": (9, 9, transfer, 1)}, False),
    }
    vectors = {}
    for name, (fields, tone_map) in ways.items():
        path = draw(codec="hevc", size=(640, 360), pix_fmt="yuv420p10le", scene=True, **fields)
        vectors[name], faults = normalise(model.embed_images(decode(path, tone_map=tone_map).frames.data))
        assert not any(faults)
    assert (vectors["sdr"] * vectors["hdr"]).sum(axis=1).min() >= 0.98
    assert (vectors["sdr"] * vectors["as it is"]).sum(axis=1).min() < without


# ---- the curves
def test_light_over_white_is_eased_and_keeps_its_hue():
    light = np.array([[0.5, 1.0, 2.0, 5.0, 50.0], [0.5, 1.0, 1.0, 2.5, 5.0], [0.2, 1.0, 0.2, 0.5, 0.0]], np.float32)
    before = light.copy()
    _ease(light)
    assert light.max(axis=0) == pytest.approx([0.5, 0.9507, 0.9935, 1.0, 1.0], abs=2e-3)
    assert light / light.max(axis=0) == pytest.approx(before / before.max(axis=0), abs=1e-6)


def test_the_tables_hold_what_the_standards_say():
    nits = _light(16) * 203
    assert nits[[0, round(0.5081 * 4095), round(0.5807 * 4095), 4095]] == pytest.approx([0, 100, 203, 10_000], rel=0.01)
    assert _light(18)[[0, round(0.5 * 4095), round(0.75 * 4095), 4095]] == pytest.approx(
        [0, 1 / 12, 0.2650, 1], rel=0.01
    )
    assert _srgb()[[0, round(0.215861 * 16_383), 16_383]].tolist() == [0, 128, 255]


@pytest.mark.parametrize(
    ("own", "opened", "expected"),
    [
        ((2, 2, 2, 0), Said(), (6, 2, 2, None)),
        ((2, 2, 2, 0), Said(1, 1, 1, 2), (1, 1, 1, True)),
        ((6, 2, 2, 1), Said(1, 1, 1, 2), (6, 1, 1, False)),
        ((3, 3, 3, 0), Said(), (6, 2, 2, None)),
        ((0, 2, 2, 0), Said(), (6, 2, 2, None)),
        ((99, 99, 99, 0), Said(9, 9, 14, 1), (9, 9, 14, False)),
        ((2, 2, 16, 1), Said(), (9, 9, 16, False)),
        ((14, 2, 2, 1), Said(), (14, 9, 16, False)),
        ((14, 2, 18, 1), Said(), (14, 9, 18, False)),
    ],
)
def test_the_frame_says_first_then_the_stream_as_it_was_opened_then_the_size(own, opened, expected):
    import av

    frame = av.VideoFrame(320, 240, "yuv420p")
    frame.colorspace, frame.color_primaries, frame.color_trc, frame.color_range = own
    assert Colours.of(frame, opened) == Colours(*expected)


def test_reversible_ycgco_is_read_with_its_bits_to_spare(tmp_path, decode):
    import av

    # 8 bits of R, G and B need 10 of Y, Cg and Co: red 200, green 120, blue 90.
    co, t = 200 - 90, 90 + (200 - 90) // 2
    cg, y = 120 - t, t + (120 - t) // 2
    frame = av.VideoFrame(64, 48, "yuv444p10le")
    for plane, value in zip(frame.planes, (y, cg + 512, co + 512), strict=True):
        plane.update(np.full(plane.buffer_size // 2, value, np.uint16).tobytes())
    frame.colorspace, frame.color_range, frame.pts, frame.time_base = 16, 2, 0, Fraction(1, 10)
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv444p10le"
        stream.codec_context.colorspace, stream.codec_context.color_range = 16, 2
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert decode(path).frames.data[0, 24, 32].tolist() == pytest.approx([200, 120, 90], abs=2)
