"""One opening, no links: what was judged is what is decoded."""

import os
from pathlib import Path

import pytest

from extraction_dagster.errors.decode import VideoCodecError, VideoFormatError, VideoOpenError
from extraction_dagster.settings import COMMON_CODECS, Settings
from extraction_dagster.stages.decode.decoders.container import open_file
from extraction_dagster.stages.decode.decoders.decoder import DecodeLimits
from extraction_dagster.stages.decode.decoders.decord import _require_firm_magic
from extraction_dagster.stages.decode.sampling import Sampling
from extraction_dagster.stages.decode.task import DECODERS


def decode(decoder, path):
    sampling = Sampling("uniform", num_frames=4)
    return DECODERS[decoder](path, sampling=sampling, short_side_px=56, limits=DecodeLimits())


@pytest.fixture
def place(tmp_path, clip_path):
    """A folder with a video, and a secret outside of it."""
    (tmp_path / "root" / "folder").mkdir(parents=True)
    (tmp_path / "secret").mkdir()
    for name in ("root/folder", "secret"):
        (tmp_path / name / "video.mp4").write_bytes(clip_path("h264").read_bytes())
    return tmp_path


@pytest.mark.parametrize("decoder", ["pyav", "decord"])
def test_a_file_that_became_a_link_is_never_read(decoder, place):
    path = place / "root" / "folder" / "video.mp4"
    path.unlink()
    path.symlink_to(place / "secret" / "video.mp4")
    with pytest.raises(VideoOpenError, match=r"folder/video\.mp4' can't be opened: a link leads to it, or it was repl"):
        decode(decoder, path)


@pytest.mark.parametrize("decoder", ["pyav", "decord"])
def test_a_folder_that_became_a_link_leads_nowhere(decoder, place):
    (place / "root" / "folder").rename(place / "root" / "moved")
    (place / "root" / "folder").symlink_to(place / "secret")
    with pytest.raises(VideoOpenError, match="a link leads to it, or it was replaced meanwhile"):
        decode(decoder, place / "root" / "folder" / "video.mp4")


@pytest.mark.parametrize("decoder", ["pyav", "decord"])
def test_a_pipe_in_the_files_place_makes_nobody_wait(decoder, place):
    path = place / "root" / "folder" / "video.mp4"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(VideoOpenError, match=r"video\.mp4' can't be opened: it is no regular file"):
        decode(decoder, path)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("missing.mp4", "No such file or directory"),
        (".", "it is no regular file"),
        ("video.mp4/more", "a link leads to it, or it was replaced meanwhile"),
        ("nul\0.mp4", "embedded null byte"),
        ("x" * 300, "File name too long"),
    ],
)
def test_what_can_not_be_opened_says_why(name, why, place):
    with (
        pytest.raises(VideoOpenError, match=f"can't be opened: {why}"),
        open_file(Path(f"{place}/root/folder/{name}")),
    ):
        pytest.fail("it was opened")


def test_a_relative_path_is_taken_from_where_we_are(place, monkeypatch):
    monkeypatch.chdir(place / "root")
    with open_file(Path("folder/video.mp4")) as file:
        assert file.path == place / "root" / "folder" / "video.mp4"


def test_a_file_that_is_replaced_while_it_is_open_stays_the_one_that_was_opened(place, clip_path):
    path = place / "root" / "folder" / "video.mp4"
    content = clip_path("h264").read_bytes()
    with open_file(path) as file:
        (place / "other").write_bytes(b"something else")
        (place / "other").replace(path)
        assert file.reading().read(len(content) + 1) == content
        assert Path(file.alias).read_bytes() == content


def test_readings_of_one_file_are_independent(place):
    (place / "root" / "digits").write_bytes(b"0123456789")
    with open_file(place / "root" / "digits") as file:
        one, two = file.reading(), file.reading()
        assert one.read(4) == b"0123"
        assert two.seek(-2, os.SEEK_END) == 8
        assert one.seek(1, os.SEEK_CUR) == 5
        assert (one.read(100), one.read(1), two.read(1)) == (b"56789", b"", b"8")
        assert (one.tell(), two.tell()) == (10, 9)


def test_no_descriptor_stays_open(place):
    path = place / "root" / "folder" / "video.mp4"
    decode("pyav", path)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(5):
        decode("pyav", path)
        with pytest.raises(VideoOpenError, match="no regular file"):
            decode("pyav", path.parent)
        with pytest.raises(VideoOpenError, match="replaced meanwhile"):
            decode("pyav", path / "more")
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_codec_that_is_not_listed_is_not_opened(clip_path):
    limits = DecodeLimits(codecs="hevc,vp9")
    for decoder in DECODERS:
        with pytest.raises(VideoCodecError, match="its codec 'h264' is not one of EXTRACTION_VIDEO_CODECS") as refused:
            DECODERS[decoder](clip_path("h264"), sampling=Sampling(), short_side_px=56, limits=limits)
        assert refused.value.permanent


def test_the_limits_know_the_codecs_of_the_settings():
    assert DecodeLimits.from_settings(Settings()).codecs.split(",") == [*COMMON_CODECS]
    assert DecodeLimits.from_settings(Settings(video_codecs="h264, cinepak")).codecs == "h264,cinepak"
    import av

    assert set(COMMON_CODECS) <= av.codecs_available


@pytest.mark.parametrize("begin", [b"#EXTM3U\n", b"ffconcat version 1.0\n", b"\x47" + bytes(187), b"", b"RIFFxxxxWAVE"])
def test_decord_opens_nothing_that_does_not_begin_as_its_kind_does(begin, tmp_path):
    path = tmp_path / "video.mp4"
    path.write_bytes(begin)
    with pytest.raises(VideoFormatError, match="for decord"), open_file(path) as file:
        _require_firm_magic(file)


def test_decord_opens_what_begins_as_its_kind_does(clip_path):
    with open_file(clip_path("h264")) as file:
        _require_firm_magic(file)
