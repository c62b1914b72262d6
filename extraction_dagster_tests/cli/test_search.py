"""What `extraction search` refuses before anything is loaded, and what it writes."""

import json
from io import StringIO

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from extraction_dagster.cli import search
from extraction_dagster.cli.main import app
from extraction_dagster.errors import PartitionKeyError
from extraction_dagster.errors.embed import QueryVideoError, TextSearchError
from extraction_dagster.stages.embed.models import registry
from extraction_dagster.stages.index.moments import Moment, SharedSpan
from extraction_dagster.stages.index.protocol import Hit
from extraction_dagster.stages.index.search import VideoHit

FRAME = Hit(7, 30, 1.0, 0.9, "insta", None, "a.mp4")


def invoke(*words):
    return CliRunner().invoke(app, ["search", *words], env={"COLUMNS": "200", "NO_COLOR": "1"})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "give --image or --text, or both, or --video alone"),
        (("--image", "a.jpg", "--video", "a.mp4"), "give --image or --text, or both, or --video alone"),
        (("--not", "a.jpg"), "give --image or --text, or both, or --video alone"),
        (("--video", "a.mp4", "--not", "a.jpg"), "--not goes with --image or --text"),
        (("--video", "a.mp4", "--moments"), "--moments goes with --image or --text"),
        (("--video", "a.mp4", "--diverse"), "--diverse goes with --image or --text"),
        (("--image", "a.jpg", "--diverse", "--moments"), "give --moments or --diverse, not both"),
        (("--video", "a.mp4", "--frames"), "--frames goes with --image or --text"),
        (("--image", "a.jpg", "--after", "yesterday"), "--after is 'yesterday', expected for example 2026-01-31"),
        (("--image", "a.jpg", "--after", "2026-02-01", "--before", "2026-02-01"), "nothing lies between them"),
        (("--image", "a.jpg", "--min-score", "2"), "Invalid value for '--min-score'"),
        (("--image", "a.jpg", "--limit", "0"), "Invalid value for '--limit'"),
    ],
)
def test_wrong_usage_is_said_and_ends_with_2(words, message):
    result = invoke(*words)
    assert result.exit_code == 2
    assert message in result.output


def test_a_range_that_is_none_is_refused():
    result = invoke("--image", "a.jpg", "--ids", "9-1")
    assert isinstance(result.exception, PartitionKeyError)


def test_a_model_without_words_and_a_file_that_is_no_video_are_said(tmp_path):
    assert isinstance(invoke("--text", "a cat").exception, TextSearchError)
    (tmp_path / "page.mp4").write_text("<html>")
    for name, why in (("none.mp4", "there is no such file."), ("page.mp4", "Video '")):
        error = invoke("--video", name).exception
        assert isinstance(error, QueryVideoError)
        assert f"Video '{name}' can't be searched for: {why}" in str(error)
        assert "Nothing was written" not in str(error)


def test_a_days_begin_is_meant_in_utc():
    assert search._moment("2026-01-31", "--after").isoformat() == "2026-01-31T00:00:00+00:00"
    assert search._moment("2026-01-31T12:00:00+02:00", "--after").isoformat() == "2026-01-31T12:00:00+02:00"
    assert search._moment(None, "--after") is None


def test_what_the_table_of_videos_says_is_shown_letter_for_letter():
    shown = Console(file=StringIO(), width=100)
    shown.print(search.hits_table([Hit(7, 30, 1.0, 0.9, "[bold]", "[/x]\x1b[2J", "videos/[old]/a[1]\n.mp4")]))
    (row,) = [line for line in shown.file.getvalue().splitlines() if "0.9000" in line]
    assert row.replace(" ", "") == "│0.9000│7│1.00│[bold]│[/x]\\x1b[2J│videos/[old]/a[1]\\n.mp4│"


def test_a_video_hit_in_json_says_its_score_votes_and_best_frame():
    assert json.loads(json.dumps(search._plain(VideoHit(7, 0.5, 2, 3, FRAME)))) == {
        "record_id": 7,
        "frame_number": 30,
        "frame_second": 1.0,
        "score": 0.5,
        "platform": "insta",
        "video_code": None,
        "path": "a.mp4",
        "votes": 2,
        "query_frames": 3,
        "best_score": 0.9,
        "span": None,
    }


def test_a_moment_and_a_shared_span_are_told_in_the_table_and_in_json():
    moment, video = Moment(61.4, 75.0, 12, FRAME), VideoHit(7, 0.5, 2, 3, FRAME)
    assert search._told(moment, {}) == {"moment": "1:01 - 1:15", "frames": "12"}
    assert search._plain(moment)["begin_seconds"] == 61.4
    spans = {7: SharedSpan(0.0, 9.6, 3600.0, 3609.6, 10, 0.95)}
    assert search._told(video, spans) == {"votes": "2 of 3", "yours": "0:00 - 0:10", "is its": "60:00 - 60:10"}
    assert search._plain(video, spans)["span"] == {
        "begin_seconds": 0.0,
        "end_seconds": 9.6,
        "other_begin_seconds": 3600.0,
        "other_end_seconds": 3609.6,
        "num_frames": 10,
        "score": 0.95,
    }
    assert search._told(video, {7: None}) == {"votes": "2 of 3", "yours": "-", "is its": "-"}


class KnowsWords:
    """A model that makes a picture's vector of its first pixel, and of words their number."""

    name, fingerprint, dim, device = "words", "f", 3, "cpu"

    def embed_images(self, images):
        return np.array([image[0, 0] for image in images], np.float32)

    def embed_text(self, texts):
        return np.array([[0, 0, len(text.split())] for text in texts], np.float32)


def test_pictures_and_words_are_searched_for_as_one(tmp_path, monkeypatch, settings):
    import cv2

    for name, colour in (("red", (255, 0, 0)), ("green", (0, 255, 0))):
        cv2.imwrite(str(tmp_path / f"{name}.png"), np.full((8, 8, 3), colour[::-1], np.uint8))
    monkeypatch.setattr(registry, "load_model", lambda *_, **__: KnowsWords())
    red, green = tmp_path / "red.png", tmp_path / "green.png"

    def asked(**words):
        query = search._query(settings(), **{"images": [], "unlike": [], "video": None, "text": None, **words})
        assert query.vectors.shape == (1, 3)
        return [round(value, 3) for value in query.vectors[0].tolist()], query.kind, query.shown

    assert asked(text="two cats") == ([0, 0, 1], "text", "two cats")
    assert asked(images=[red]) == ([1, 0, 0], "image", str(red))
    assert asked(images=[red], text="cats") == ([0.707, 0, 0.707], "image", f"{red} and cats")
    vector, _, shown = asked(images=[red, green], unlike=[green])
    assert vector == [1, 0, 0]
    assert shown == f"{red} and {green}, not like {green}"
