"""`extraction preview`: what a person sees of one record or file, and that nothing is written."""

import base64
import json
import re
import sqlite3
import zlib

import numpy as np
import pytest
from typer.testing import CliRunner

from extraction_dagster.cli import console, preview
from extraction_dagster.cli.main import app

HOSTILE = "a<script>alert(1)</script>[red]\x1b]0;owned\x07.mp4"


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """Two seconds of H.264."""
    import av

    path = tmp_path_factory.mktemp("video") / "video.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.width, stream.height, stream.pix_fmt = 160, 112, "yuv420p"
        for number in range(48):
            frame = av.VideoFrame.from_ndarray(np.full((112, 160, 3), 5 * number, np.uint8), format="rgb24")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.fixture
def photo():
    import cv2

    picture = np.full((48, 64, 3), (30, 60, 200), np.uint8)
    done, content = cv2.imencode(".png", picture)
    assert done
    return content.tobytes()


@pytest.fixture
def table(tmp_path, photo):
    """Rows 3 and -3 with a file each, row 4 without one."""
    videos = tmp_path / ".extraction" / "videos"
    videos.mkdir(parents=True)
    (videos / HOSTILE.replace("/", "_")).write_bytes(photo)
    with sqlite3.connect(tmp_path / ".extraction" / "source.db") as connection:
        marks = "is_extracted BOOLEAN, is_embedded BOOLEAN"
        connection.execute(f"CREATE TABLE insta_content (id INTEGER PRIMARY KEY, platform, code, path TEXT, {marks})")
        rows = [(3, HOSTILE.replace("/", "_")), (-3, HOSTILE.replace("/", "_")), (4, "gone.mp4")]
        connection.executemany("INSERT INTO insta_content (id, path) VALUES (?, ?)", rows)
    connection.close()


def extraction(*arguments, code=0):
    done = CliRunner().invoke(app, ["preview", *map(str, arguments)])
    assert done.exit_code == code, done.output
    return done


def everything_under(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_file_is_shown_with_its_times_and_notes(video):
    said = extraction(video).stdout
    assert "2 frames of 160x112; the container claims 2.000 s" in said
    assert "mov: h264, 160x112" in said
    assert "colours: BT.601" in said
    assert re.search(r"24 +\S? +1\.000 +\S? +1\.000", said)
    assert "\x1b" not in said


def test_json_is_one_document_with_the_same_facts(video):
    document = json.loads(extraction(video, "--json").stdout)
    assert {
        name: document[name] for name in ("record_id", "width_px", "height_px", "duration_seconds", "partial", "html")
    } == {
        "record_id": None,
        "width_px": 160,
        "height_px": 112,
        "duration_seconds": 2.0,
        "partial": None,
        "html": None,
    }
    assert [(f["frame_number"], f["pts_seconds"], f["target_seconds"]) for f in document["frames"]] == [
        (0, 0, 0),
        (24, 1, 1),
    ]
    assert "mov: h264, 160x112" in document["notes"]


@pytest.mark.parametrize("record_id", [3, -3])
@pytest.mark.usefixtures("table")
def test_a_record_is_shown_and_nothing_is_written_anywhere(record_id, tmp_path):
    before = everything_under(tmp_path)
    document = json.loads(extraction(record_id, "--json").stdout)
    assert (document["record_id"], document["width_px"], len(document["frames"])) == (record_id, 64, 1)
    assert document["notes"][0] == "a PNG: png, 64x48"
    assert everything_under(tmp_path) == before


@pytest.mark.usefixtures("table")
def test_hostile_names_reach_neither_the_terminal_nor_the_page(tmp_path):
    said = extraction(3, "--html", tmp_path / "out.html").stdout
    assert "\x1b" not in said
    assert "\x07" not in said
    assert "<script>alert(1)<_script>[red]" in said  # letter for letter
    page = (tmp_path / "out.html").read_text()
    assert "<script>" not in page
    assert "\x1b" not in page
    assert "&lt;script&gt;" in page
    assert page.count("data:image/jpeg;base64,") == 1
    assert "default-src 'none'" in page


@pytest.mark.usefixtures("table")
def test_open_shows_the_page_in_a_browser(monkeypatch):
    opened = []
    monkeypatch.setattr(preview.webbrowser, "open", opened.append)
    said = extraction(3, "--open").stdout
    (address,) = opened
    assert address.startswith("file:///")
    assert address.removeprefix("file://") in said


@pytest.mark.parametrize(
    ("what", "why"),
    [
        (4, r"gone\.mp4"),
        (5, r"No preview of record 5: the source table has no eligible row of that id"),
        ("missing.mp4", r"No preview of 'missing\.mp4': there is no such file\. Nothing was written anywhere\."),
        (
            "page.mp4",
            r"No preview of 'page\.mp4': Video '.*page\.mp4' can't be opened: it is a web page .* Nothing was",
        ),
    ],
)
@pytest.mark.usefixtures("table")
def test_what_can_not_be_shown_is_told_in_one_line(what, why, tmp_path):
    (tmp_path / "page.mp4").write_text("<html>not found</html>")
    done = CliRunner().invoke(app, ["preview", str(what)])
    assert done.exit_code == 1
    assert re.search(why, str(done.exception))
    assert "\n" not in str(done.exception)


def test_an_animated_webp_is_decoded_in_the_workers_cage_too(tmp_path):
    import cv2

    moving = cv2.Animation()
    moving.frames = [np.full((48, 64, 4), (grey, grey, grey, 255), np.uint8) for grey in (20, 220)]
    moving.durations = [1000, 1000]
    assert cv2.imwriteanimation(str(tmp_path / "a.webp"), moving)
    document = json.loads(extraction(tmp_path / "a.webp", "--json").stdout)
    assert [frame["pts_seconds"] for frame in document["frames"]] == [0.0, 1.0]
    assert document["notes"][0] == "an animated WebP: webp, 64x48"


def test_cropped_bars_and_frames_left_out_are_noted(tmp_path, monkeypatch):
    monkeypatch.setenv("EXTRACTION_CROP_BARS", "true")
    monkeypatch.setenv("EXTRACTION_DROP_DUPLICATES", "true")
    import cv2

    moving = cv2.Animation()
    picture = np.zeros((64, 96, 4), np.uint8)
    picture[8:56] = np.random.default_rng(0).integers(60, 255, (48, 96, 4), np.uint8)
    picture[..., 3] = 255
    moving.frames, moving.durations = [picture.copy() for _ in range(3)], [1000] * 3
    for number, frame in enumerate(moving.frames):
        frame[20, 20 + number] = 255  # no two are the same to the last pixel
    assert cv2.imwriteanimation(str(tmp_path / "a.png"), moving)
    notes = json.loads(extraction(tmp_path / "a.png", "--json").stdout)["notes"]
    assert "black bars cut off: 96x48 of 96x64, from 0,8 on" in notes
    assert "1 of 3 sampled frames kept" in notes, notes


@pytest.fixture
def terminal(monkeypatch):
    """Makes stdout a terminal of a kind."""

    def be(**environment):
        for name in ("TERM", "TERM_PROGRAM", "LC_TERMINAL"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(type(console.out), "is_terminal", property(lambda _: True))

    return be


@pytest.mark.parametrize(
    ("environment", "begins"),
    [
        ({"TERM": "xterm-kitty"}, "\x1b_Ga=T,f=24,o=z,s="),
        ({"TERM": "xterm", "TERM_PROGRAM": "WezTerm"}, "\x1b_Ga=T,f=24,o=z,s="),
        ({"TERM": "xterm", "TERM_PROGRAM": "iTerm.app"}, "\x1b]1337;File=inline=1;size="),
        ({"TERM": "foot"}, "\x1bPq#"),
        ({"TERM": "xterm-256color"}, None),
    ],
)
def test_terminals_that_show_pictures_are_given_a_strip(environment, begins, video, terminal):
    terminal(**environment)
    said = extraction(video).stdout
    assert (begins in said) if begins else ("\x1b_G" not in said and "\x1b]" not in said and "\x1bP" not in said)


PICTURE = np.random.default_rng(1).integers(0, 256, (30, 40, 3), np.uint8)


def test_kitty_gets_every_pixel():
    chunks = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", preview.kitty(PICTURE))
    assert chunks[0][0] == f"a=T,f=24,o=z,s=40,v=30,m={int(len(chunks) > 1)}"
    assert all(len(data) <= 4096 for _, data in chunks)
    assert chunks[-1][0].endswith("m=0")
    assert zlib.decompress(base64.b64decode("".join(data for _, data in chunks))) == PICTURE.tobytes()


def test_iterm2_gets_a_jpeg():
    import cv2

    found = re.fullmatch(r"\x1b\]1337;File=inline=1;size=(\d+):(.*)\x07", preview.iterm2(PICTURE))
    jpeg = base64.b64decode(found[2])
    assert len(jpeg) == int(found[1])
    assert cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR).shape == (30, 40, 3)


def drawn(text):
    """A picture that sixels draw, by another way than the code's: letter by letter."""
    palette = {int(n): (int(r), int(g), int(b)) for n, r, g, b in re.findall(r"#(\d+);2;(\d+);(\d+);(\d+)", text)}
    picture = np.zeros((30, 40, 3), np.uint8)
    for band, lines in enumerate(re.sub(r"#\d+;2;\d+;\d+;\d+", "", text[3:-2]).split("-")):
        for line in lines.split("$"):
            colour, letters = re.fullmatch(r"#(\d+)([?-~]+)", line).groups()
            for column, letter in enumerate(letters):
                for row in range(6):
                    if ord(letter) - 63 >> row & 1:
                        picture[band * 6 + row, column] = [round(part * 2.55) for part in palette[int(colour)]]
    return picture


def test_sixels_draw_the_picture_in_216_colours():
    assert np.abs(drawn(preview.sixel(PICTURE)).astype(int) - PICTURE).max() <= 26


@pytest.mark.usefixtures("table")
def test_an_address_is_shown_without_its_signature_and_a_failure_without_the_cache(
    s3_root, photo, tmp_path, monkeypatch
):
    import s3fs  # noqa: PLC0415 - lazy: slow to import

    bucket, key = s3fs.S3FileSystem(skip_instance_cache=True), "a #1?X-Amz-Signature=canary4711"
    bucket.pipe_file(f"{s3_root}/{key}", photo)
    bucket.pipe_file(f"{s3_root}/b?.mp4", b"no video")
    monkeypatch.setenv("EXTRACTION_ALLOWED_BUCKETS", s3_root)
    with sqlite3.connect(tmp_path / ".extraction" / "source.db") as connection:
        rows = [(5, f"{s3_root}/{key}"), (6, f"{s3_root}/b?.mp4")]
        connection.executemany("INSERT INTO insta_content (id, path) VALUES (?, ?)", rows)
    connection.close()
    said = extraction(5).output
    assert f"record 5 ('{s3_root}/a #1?…')" in said
    assert "canary4711" not in said
    failed = str(extraction(6, code=1).exception)
    assert failed.startswith(f"No preview of record 6 ('{s3_root}/b?.mp4'): ")
    assert "cache" not in failed
