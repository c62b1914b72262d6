"""The gallery: everything escaped, nothing fetched, seen in a real browser."""

from pathlib import Path

import numpy as np
import pytest
import simplejpeg

from extraction_dagster.errors.index import GalleryError
from extraction_dagster.stages.index.gallery import Card, render_gallery, write_gallery

EVIL = "<script>document.title='owned'</script>\" onerror=\"document.title='owned'"


def picture(red, width_px=640, height_px=360):
    pixels = np.zeros((height_px, width_px, 3), np.uint8)
    pixels[..., 0] = red
    return simplejpeg.encode_jpeg(pixels, quality=90)


CARDS = [Card("0.9100", [EVIL, "a/ü.mp4"], picture(250)), Card("0.8000", ["no picture"]), Card(EVIL, [], b"no jpeg")]


def test_every_text_is_escaped_and_a_missing_or_damaged_picture_is_said():
    page = render_gallery(EVIL, query_jpegs=[picture(100)], cards=CARDS)
    assert "<script" not in page
    assert 'onerror="' not in page
    assert page.count("&lt;script&gt;document.title=&#x27;owned&#x27;&lt;/script&gt;") == 4  # title twice, line, card
    assert page.count('src="data:image/jpeg;base64,') == 2
    assert page.count("no stored frame") == 2
    assert page.count("http") == 1  # the policy's own name


def test_a_thumbnail_is_small():
    assert len(render_gallery("t", query_jpegs=[], cards=[Card("1", [], picture(9, 4000, 3000))])) < 10_000


def test_a_gallery_that_can_not_be_written_leaves_nothing(tmp_path):
    with pytest.raises(GalleryError, match=r"nowhere/g.html' can't be written: No such file"):
        write_gallery(tmp_path / "nowhere" / "g.html", "page")
    (tmp_path / "g.html").mkdir()
    with pytest.raises(GalleryError, match="Is a directory"):
        write_gallery(tmp_path / "g.html", "page")
    with pytest.raises(GalleryError, match=r"Gallery '\.' can't be written: Is a directory"):
        write_gallery(Path(), "page")
    write_gallery(tmp_path / "h.html", "page")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["g.html", "h.html"]
    assert (tmp_path / "h.html").read_text() == "page"


@pytest.mark.browser
def test_a_browser_shows_the_pictures_and_runs_nothing(browser, tmp_path):
    write_gallery(tmp_path / "g.html", render_gallery(EVIL, query_jpegs=[picture(100)], cards=CARDS))
    page = browser.new_page()
    requests = []
    page.on("request", lambda request: requests.append(request.url.partition(":")[0]))
    page.goto(f"file://{tmp_path}/g.html")
    assert page.evaluate("[...document.images].map(i => [i.naturalWidth, i.naturalHeight])") == [[200, 112], [200, 112]]
    assert page.title() == EVIL
    assert page.get_by_text("no stored frame").count() == 2
    assert page.get_by_text("a/ü.mp4").is_visible()
    assert set(requests) <= {"file", "data"}
    page.close()
