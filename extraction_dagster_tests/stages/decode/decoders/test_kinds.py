"""What a file is by its content, whatever its name: photos are one frame, and the rest is refused by what it is."""

import io
import struct
import zipfile

import numpy as np
import pytest

from extraction_dagster.errors.decode import (
    NoVideoStreamError,
    VideoDecodeError,
    VideoEncryptedError,
    VideoFormatError,
    VideoOpenError,
)
from extraction_dagster.stages.decode.decoders.container import open_file
from extraction_dagster.stages.decode.decoders.decoder import DecodeLimits
from extraction_dagster.stages.decode.decoders.decord import decode_with_decord
from extraction_dagster.stages.decode.decoders.pyav import decode_with_pyav
from extraction_dagster.stages.decode.sampling import Sampling

EVERY_FRAME = Sampling("fps", fps=1e6)


def decode(path, sampling=EVERY_FRAME, **limits):
    return decode_with_pyav(path, sampling=sampling, short_side_px=112, limits=DecodeLimits(**limits))


@pytest.fixture
def numbers_of(number_in):
    return lambda video: [number_in(picture) for picture in video.frames.data]


@pytest.fixture(scope="module")
def photo(clip_path):
    """Writes frame 0 of a clip as a photo, by OpenCV."""
    import av
    import cv2

    with av.open(str(clip_path("h264"))) as container:
        picture = next(container.decode(video=0)).to_ndarray(format="bgr24")

    def write(ending):
        done, content = cv2.imencode(ending, picture)
        assert done
        return content.tobytes()

    return write


@pytest.mark.parametrize("name", ["photo.mp4", "photo.jpg", "photo"])
@pytest.mark.parametrize(
    ("ending", "what"), [(".jpg", "a JPEG"), (".png", "a PNG"), (".webp", "a WebP"), (".avif", "mov")]
)
def test_a_photo_is_one_frame_under_any_name(  # noqa: PLR0913, PLR0917 - fixtures
    ending, what, name, photo, tmp_path, numbers_of
):
    (tmp_path / name).write_bytes(photo(ending))
    video = decode(tmp_path / name)
    assert numbers_of(video) == [0]
    assert (video.frames.pts_seconds.tolist(), video.duration_seconds, video.partial) == ([0.0], None, None)
    assert video.frames.data.shape == (1, 112, 160, 3)
    assert video.notes[0].startswith(f"{what}: ")


def test_a_second_picture_behind_a_photo_is_no_frame_of_it(photo, tmp_path, numbers_of):
    jpeg = photo(".jpg")
    announced = b"MPF\0" + bytes(20)
    ultra = jpeg[:2] + b"\xff\xe2" + struct.pack(">H", len(announced) + 2) + announced + jpeg[2:] + jpeg
    for content in (ultra, jpeg + b"\0\0trailer of a phone" * 50):
        (tmp_path / "photo.jpg").write_bytes(content)
        video = decode(tmp_path / "photo.jpg")
        assert (numbers_of(video), video.partial) == ([0], None)


def test_jpegs_one_after_the_other_are_a_video(photo, tmp_path):
    (tmp_path / "camera.mjpeg").write_bytes(photo(".jpg") * 5)
    video = decode(tmp_path / "camera.mjpeg")
    assert video.frames.frame_number.tolist() == [0, 1, 2, 3, 4]
    assert video.notes[0].startswith("a motion JPEG stream: ")


@pytest.mark.parametrize("ending", [".jpg", ".png", ".webp"])
def test_a_photo_that_is_cut_off_is_flagged_or_refused_by_what_it_is(ending, photo, tmp_path):
    content = photo(ending)
    (tmp_path / "photo").write_bytes(content[: len(content) * 3 // 4])
    try:
        assert "whose end is missing" in (decode(tmp_path / "photo").partial or "")
    except VideoDecodeError as error:
        assert ": it is a " in str(error)  # noqa: PT017 - whether a part can be shown is the codec's affair


def test_a_damaged_photo_is_refused_by_what_it_is(photo, tmp_path):
    (tmp_path / "a.mp4").write_bytes(photo(".jpg")[:200] + bytes(500))
    with pytest.raises(VideoDecodeError, match=r"a\.mp4' decoded 0 frames, expected at least 1: it is a JPEG; "):
        decode(tmp_path / "a.mp4")


@pytest.mark.parametrize("place", ["behind a JPEG", "behind a JPEG and a trailer", "in a box of a HEIC"])
def test_a_motion_photo_gives_its_video(place, photo, clip_path, tmp_path, numbers_of):
    clip = clip_path("h264").read_bytes()
    before = {
        "behind a JPEG": photo(".jpg"),
        "behind a JPEG and a trailer": photo(".jpg") + b"\0\0ftyp\0MotionPhoto_Data",
        "in a box of a HEIC": struct.pack(">I4s4sI4s", 20, b"ftyp", b"heic", 0, b"mif1")
        + struct.pack(">I4s", 8 + len(clip), b"mpvd"),
    }[place]
    (tmp_path / "photo.jpg").write_bytes(before + clip)
    video = decode(tmp_path / "photo.jpg")
    assert numbers_of(video) == list(range(48))
    assert video.notes[0] == "the video of a motion photo (mov): h264, 160x112"


def test_a_motion_photo_whose_video_is_cut_off_is_a_photo(photo, clip_path, tmp_path, numbers_of):
    (tmp_path / "photo.jpg").write_bytes(photo(".jpg") + clip_path("h264").read_bytes()[:2000])
    assert numbers_of(decode(tmp_path / "photo.jpg")) == [0]


def animation(path, pictures, milliseconds):
    import cv2

    moving = cv2.Animation()
    moving.frames, moving.durations = pictures, milliseconds
    assert cv2.imwriteanimation(str(path), moving)
    return path


@pytest.mark.parametrize("name", ["moving.webp", "moving.png", "moving.gif", "moving.avif"])
def test_an_animated_picture_is_a_video_with_its_own_times(name, tmp_path):
    levels = [0, 80, 160, 240]
    path = animation(
        tmp_path / name,
        [np.full((48, 64, 4), (level,) * 3 + (255,), np.uint8) for level in levels],
        [100, 300, 200, 400],
    )
    video = decode(path)
    assert video.frames.frame_number.tolist() == [0, 1, 2, 3]
    assert video.frames.pts_seconds.tolist() == pytest.approx([0.0, 0.1, 0.4, 0.6], abs=0.002)
    assert video.frames.data.mean(axis=(1, 2, 3)) == pytest.approx(levels, abs=4)


def test_an_animated_webp_is_shown_on_black_and_kept_within_limits(tmp_path):
    half = np.full((48, 64, 4), (200, 200, 200, 128), np.uint8)
    path = animation(tmp_path / "moving.webp", [np.full((48, 64, 4), 255, np.uint8), half], [100, 100])
    assert decode(path).frames.data[1].mean() == pytest.approx(100, abs=2)
    content = path.read_bytes()
    for limits, error in (
        ({"max_pixels": 48 * 64 - 1}, "VideoTooLargeError"),
        ({"max_duration_seconds": 0.1}, "VideoTooLongError"),
        ({"max_batch_bytes": len(content) + 100}, "FramesTooManyError"),
    ):
        with pytest.raises(Exception, match=r"moving\.webp") as raised:
            decode(path, **limits)
        assert type(raised.value).__name__ == error
    path.write_bytes(content[: len(content) * 3 // 4])
    with pytest.raises(VideoDecodeError, match="it is an animated WebP; "):
        decode(path)


def test_a_y4m_stream_has_times_of_its_own(render, tmp_path, numbers_of):
    import av

    source = render(tmp_path / "a.mp4", frames=24, options={"bf": "0", "qp": "10"})
    with av.open(str(source)) as container:
        planes = [frame.to_ndarray().tobytes() for frame in container.decode(video=0)]
    head = b"YUV4MPEG2 W160 H112 F24:1 Ip A1:1 C420jpeg\n"
    (tmp_path / "a.y4m").write_bytes(head + b"".join(b"FRAME\n" + frame for frame in planes))
    video = decode(tmp_path / "a.y4m")
    assert numbers_of(video) == list(range(24))
    assert video.frames.pts_seconds == pytest.approx(np.arange(24) / 24)


def test_an_ivf_stream_has_times_of_its_own(render, tmp_path, numbers_of):
    fast = {"cpu-used": "8", "deadline": "realtime"}
    video = decode(render(tmp_path / "a.ivf", codec="libvpx-vp9", frames=24, options=fast))
    assert numbers_of(video) == list(range(24))
    assert video.frames.pts_seconds == pytest.approx(np.arange(24) / 24)


def zipped():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("video.mp4", b"none")
    return file.getvalue()


FOREIGN = {
    "a PDF": b"%PDF-1.7\n%",
    "a ZIP archive": zipped(),
    "a RAR archive": b"Rar!\x1a\x07\x01\0",
    "gzip data": b"\x1f\x8b\x08\0" + bytes(20),
    "a playlist (HLS)": b"#EXTM3U\n#EXTINF:3,\nhttp://127.0.0.1/a.ts\n",
    "a playlist (DASH manifest)": b'<?xml version="1.0"?>\n<!-- made -->\n<MPD xmlns="urn:mpeg:dash:schema:mpd:2011"/>',
    "a playlist (ffconcat script)": b"ffconcat version 1.0\nfile a.mp4\n",
    "an SVG drawing": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    "a TIFF picture": b"II*\0" + bytes(30),
    "an MP3 file, sound only": b"ID3\x04\0\0" + bytes(30),
    "a WAV file, sound only": b"RIFF\x24\0\0\0WAVEfmt ",
    "a program": b"\x7fELF" + bytes(30),
    "a playlist": b'<asx version="3.0"><entry/></asx>',
    "a BMP picture": b"BM\xe8\x03\0\0\0\0\0\0\x36\0\0\0\x28\0\0\0" + bytes(900),
    "an Office document": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(500),
    "a Flash program (SWF)": b"CWS\x0a" + bytes(50),
    "an AMR file, sound only": b"#!AMR\n" + bytes(50),
    "a MIDI file, no pictures": b"MThd\0\0\0\6" + bytes(50),
    "an AIFF file, sound only": b"FORM\0\0\1\0AIFF" + bytes(50),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_what_can_hold_no_picture_is_refused_for_good_and_by_name(what, tmp_path):
    (tmp_path / "video.mp4").write_bytes(FOREIGN[what])
    with pytest.raises(VideoFormatError, match=r"Video '.*video\.mp4' is refused: it is ") as raised:
        decode(tmp_path / "video.mp4")
    assert f"it is {what}. Its content" in str(raised.value)
    assert raised.value.permanent


# What a server sends in place of a video may pass, so that another try is worth it.
PASSING = {
    "empty (0 bytes)": b"",
    "a web page ('<!DOCTYPE html><html> <p>404</p>')": b"\xef\xbb\xbf\n<!DOCTYPE html><html>\n<p>404</p>",
    "a web page ('<html><body>Log in</body></html>')": b"<html><body>Log in</body></html>",
    "a web page ('<!-- a --><!-- b --><script>go()</script>')": b"<!-- a --><!-- b --><script>go()</script>",
    "a web page ('<div>Nicht verfügbar</div>')": "<div>Nicht verfügbar</div>".encode(),
    "a web page ('<html>x</html>')": "<html>x</html>".encode("utf-16"),
    "text ('Zugriff verweigert: für alle')": "Zugriff verweigert: für alle".encode(),
    "an XML document ('<?xml version=\"1.0\"?><list/>')": b'<?xml version="1.0"?><list/>',
    "nothing but zeros in its first 4096 bytes": bytes(20_000),
    "an MP3 file, sound only": b"\xff\xf3\x90\x64" + bytes(500),
    "an AAC file, sound only": b"\xff\xf1\x50\x80\x02\x1f\xfc" + bytes(500),
    "a JSON document ('{\"error\": 404}')": b'{"error": 404}',
    "an XML document ('<Error><Code>AccessDenied</Code></Error>')": b"<Error><Code>AccessDenied</Code></Error>",
    "text ('Too many requests')": b"Too many requests\n",
    "a Git LFS pointer ('version https://git-lfs.github.com/spec/v1')": b"version https://git-lfs.github.com/spec/v1\n",
    "an MP4 without its index (no moov box): cut off, or still being written": (
        b"\0\0\0\x10ftypisom\0\0\0\0" + b"\0\0\x10\0mdat" + bytes(50)
    ),
    "a fragment of a stream without its beginning (no moov box)": b"\0\0\0\x10stypmsdh\0\0\0\0\0\0\0\x10moof"
    + bytes(8),
}


@pytest.mark.parametrize("what", PASSING)
def test_what_stands_in_place_of_a_video_is_told_and_tried_again(what, tmp_path):
    (tmp_path / "video.mp4").write_bytes(PASSING[what])
    with pytest.raises(VideoOpenError, match="can't be opened: it is ") as raised:
        decode(tmp_path / "video.mp4")
    assert f"it is {what}. Expected" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not raised.value.permanent


def test_control_characters_of_a_page_do_not_reach_the_message(tmp_path):
    (tmp_path / "video.mp4").write_bytes(b"<html>\x1b]0;owned\x07\r\n\x00</html>")
    with pytest.raises(VideoOpenError, match="a web page") as raised:
        decode(tmp_path / "video.mp4")
    assert str(raised.value).isprintable()


def test_a_codec_without_a_decoder_is_named(clip_path, tmp_path):
    (tmp_path / "video.mp4").write_bytes(clip_path("h264").read_bytes().replace(b"avc1", b"bvc2"))
    match = r"found video \(codec bvc2 \(ByteDance\): no decoder\), expected at least one"
    with pytest.raises(NoVideoStreamError, match=match):
        decode(tmp_path / "video.mp4")


def test_a_codec_of_matroska_without_a_decoder_is_named(clip_path, tmp_path):
    import av

    with av.open(str(clip_path("h264"))) as there, av.open(str(tmp_path / "a.mkv"), "w") as here:
        copy = here.add_stream_from_template(there.streams.video[0])
        for packet in there.demux(video=0):
            if packet.size:
                packet.stream = copy
                here.mux(packet)
    content = (tmp_path / "a.mkv").read_bytes()
    (tmp_path / "a.mkv").write_bytes(content.replace(b"V_MPEG4/ISO/AVC", b"V_MPEG4/ISO/NEW"))
    with pytest.raises(NoVideoStreamError, match=r"found video \(codec V_MPEG4/ISO/NEW: no decoder\), expected"):
        decode(tmp_path / "a.mkv")


def test_an_index_that_is_cut_off_is_told(clip_path, tmp_path):
    content = clip_path("h264").read_bytes()
    (tmp_path / "a.mp4").write_bytes(content[: (content.index(b"moov") + len(content)) // 2])
    with pytest.raises(VideoOpenError, match="it is an MP4 whose index is cut off"):
        decode(tmp_path / "a.mp4")


def test_an_index_without_pictures_is_told(clip_path, tmp_path):
    content = clip_path("h264").read_bytes()
    (tmp_path / "a.mp4").write_bytes(content[:32] + content[content.index(b"moov") - 4 :])
    with pytest.raises(VideoDecodeError, match="it is an MP4's index without pictures: the first part of a stream"):
        decode(tmp_path / "a.mp4")


@pytest.mark.parametrize(
    ("codec", "form", "what"), [("libsvtav1", "obu", "a raw AV1 stream"), ("mpeg4", "m4v", "a raw MPEG-4 stream")]
)
def test_raw_streams_of_newer_and_older_codecs_are_videos(codec, form, what, tmp_path, encoded):
    options = {"preset": "12", "svtav1-params": "lp=1"} if codec == "libsvtav1" else {"q:v": "2"}
    images = [np.full((64, 96, 3), 20 * number, np.uint8) for number in range(12)]
    video = decode(encoded(tmp_path / "camera.mp4", images, codec=codec, form=form, options=options))
    assert video.frames.data.mean(axis=(1, 2, 3)) == pytest.approx([20 * number for number in range(12)], abs=4)
    assert video.notes[0].startswith(what)


@pytest.mark.parametrize("fragments", [{}, {"movflags": "frag_keyframe+empty_moov"}], ids=["whole", "fragments"])
def test_an_encrypted_file_says_how(fragments, clip_path, tmp_path):
    import av

    key = {"encryption_scheme": "cenc-aes-ctr", "encryption_key": "00" * 16, "encryption_kid": "11" * 16}
    path = tmp_path / "video.mp4"
    with (
        av.open(str(clip_path("h264"))) as there,
        av.open(str(path), "w", options=key | fragments) as here,
    ):
        stream = here.add_stream_from_template(there.streams.video[0])
        for packet in there.demux(video=0):
            if packet.size:
                packet.stream = stream
                here.mux(packet)
    with pytest.raises(VideoEncryptedError, match=r"video\.mp4' is encrypted \(cenc\): its frames would be noise"):
        decode(path)


WITHOUT_B = "log-level=none:keyint=12:bframes=0:pools=none:frame-threads=1"


def grid(tile, property_box, *, tiles):
    """A HEIC whose photo is put together of `tiles` items side by side, as phones write it."""

    def box(name, *parts):
        content = b"".join(parts)
        return struct.pack(">I4s", 8 + len(content), name) + content

    def full(name, *parts, version=0):
        return box(name, struct.pack(">I", version << 24), *parts)

    def build(offset):
        ids = range(2, 2 + tiles)
        location = ">HHHHII"
        where = [
            struct.pack(location, 1, 1, 0, 1, 0, 8),
            *(struct.pack(location, n, 0, 0, 1, offset, len(tile)) for n in ids),
        ]
        names = [(1, b"grid"), *((n, b"hvc1") for n in ids)]
        items = [full(b"infe", struct.pack(">HH4s", n, 0, name), b"\0", version=2) for n, name in names]
        sizes = [full(b"ispe", struct.pack(">II", 160, 112)), full(b"ispe", struct.pack(">II", 160 * tiles, 112))]
        belongs = [struct.pack(">HBB", 1, 1, 3), *(struct.pack(">HBBB", n, 2, 0x81, 2) for n in ids)]
        meta = full(
            b"meta",
            full(b"hdlr", bytes(4), b"pict", bytes(13)),
            full(b"pitm", struct.pack(">H", 1)),
            full(b"iloc", struct.pack(">BBH", 0x44, 0, tiles + 1), *where, version=1),
            full(b"iinf", struct.pack(">H", tiles + 1), *items),
            full(b"iref", box(b"dimg", struct.pack(f">HH{tiles}H", 1, tiles, *ids))),
            box(b"iprp", box(b"ipco", property_box, *sizes), full(b"ipma", struct.pack(">I", tiles + 1), *belongs)),
            box(b"idat", struct.pack(">BBBBHH", 0, 0, 0, tiles - 1, 160 * tiles, 112)),
        )
        return box(b"ftyp", b"heic", bytes(4), b"mif1heic") + meta

    head = build(0)
    return build(len(head) + 8) + box(b"mdat", tile)


def test_a_photo_in_tiles_is_refused_and_never_shown_as_one_of_them(render, tmp_path):
    import av

    source = render(tmp_path / "a.mp4", codec="libx265", frames=12, options={"x265-params": WITHOUT_B})
    content = source.read_bytes()
    at = content.index(b"hvcC") - 4
    with av.open(str(source)) as container:
        tile = bytes(next(packet for packet in container.demux(video=0) if packet.size))
    (tmp_path / "photo.heic").write_bytes(
        grid(tile, content[at : at + struct.unpack_from(">I", content, at)[0]], tiles=3)
    )
    with pytest.raises(
        NoVideoStreamError, match=r"found a photo in 3 tiles \(HEIC or AVIF\), which are not put together"
    ):
        decode(tmp_path / "photo.heic")


def test_a_file_of_which_nothing_is_known_is_left_to_the_library(clip_path):
    for path in (clip_path("h264"), clip_path("h264 open GOP in TS"), clip_path("vp9")):
        with open_file(path) as file:
            assert (file.kind, file.is_motion_photo) == (None, False)


DECORD_IS_WRONG = {
    ".jpg": "decord needs a duration",
    ".png": "decord needs a duration",
    "motion": "decord is given the whole file, and sees the photo",
    "moving.png": "decord needs a duration",
    "moving.webp": "libavcodec decodes no animated WebP",
}


@pytest.mark.parametrize("what", DECORD_IS_WRONG)
@pytest.mark.parametrize("decoder", [decode_with_pyav, decode_with_decord], ids=["pyav", "decord"])
def test_photos_are_opened_by_the_default_decoder_alone(  # noqa: PLR0913, PLR0917 - fixtures
    decoder, what, photo, clip_path, tmp_path, request
):
    if decoder is decode_with_decord:
        request.applymarker(pytest.mark.xfail(reason=DECORD_IS_WRONG[what], strict=True))
    path = tmp_path / what
    if what == "motion":
        path.write_bytes(photo(".jpg") + clip_path("h264").read_bytes())
    elif what.startswith("moving"):
        animation(path, [np.full((48, 64, 4), 255, np.uint8), np.zeros((48, 64, 4), np.uint8)], [100, 100])
    else:
        path.write_bytes(photo(what))
    assert len(decoder(path, sampling=Sampling(), short_side_px=112, limits=DecodeLimits()).frames) >= 1


@pytest.mark.parametrize("piece", [b"\xff\xe0\0\0", b"\xff", b"\xff\xe0\0\2"], ids=["empty", "padding", "shortest"])
def test_a_jpeg_of_nothing_but_tiny_segments_is_given_up_soon(piece, tmp_path, least_seconds):
    (tmp_path / "a.jpg").write_bytes(b"\xff\xd8" + piece * (2**22 // len(piece)))

    def look():
        with open_file(tmp_path / "a.jpg") as file:
            assert file.kind is not None
            assert file.kind.is_cut

    assert least_seconds(look) < 2


def test_boxes_and_brands_without_end_are_given_up_soon(photo, tmp_path, least_seconds):
    (tmp_path / "a.jpg").write_bytes(photo(".jpg") + b"\0\0\0\x08ftyp" * 2**19)
    (tmp_path / "a.heic").write_bytes(struct.pack(">I4s4s", 12, b"ftyp", b"heic") + b"\0\0\0\x08free" * 2**19)

    def look():
        for name in ("a.jpg", "a.heic"):
            with open_file(tmp_path / name) as file:
                assert not file.is_motion_photo

    assert least_seconds(look) < 2
