"""Search over every store. The gallery: everything escaped, nothing fetched, seen in a real browser."""

import functools
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import simplejpeg

from extraction_dagster.errors import RecordShapeError
from extraction_dagster.errors.index import CollectionMismatchError, GalleryError
from extraction_dagster.records import IdRange, VideoRow
from extraction_dagster.stages.index.points import PointBatch, PointFilter, build_points, point_id
from extraction_dagster.stages.index.protocol import CollectionSpec, Hit
from extraction_dagster.stages.index.search import (
    Card,
    VideoHit,
    open_for_search,
    render_gallery,
    search_images,
    search_videos,
    why_nothing,
    write_gallery,
)
from extraction_dagster.stages.index.stage import replace_records


def _towards(cosine):
    return [cosine, float(np.sqrt(1 - cosine**2)), 0, 0, 0, 0, 0, 0]


@pytest.fixture
def scored(opened):
    """`scored({(7, 0): 0.9})`: points whose cosine to the query is known."""

    def write(cosines, *, platforms=None, created="2026-01-01T00:00:00Z"):
        payloads = [
            {
                "record_id": record_id,
                "platform": (platforms or {}).get(record_id, "insta"),
                "video_code": f"c{record_id}",
                "frame_number": number,
                "frame_second": number / 30,
                "path": f"/videos/{record_id}.mp4",
                "created_at": created,
                "generation": "a",
            }
            for record_id, number in cosines
        ]
        vectors = np.array([_towards(cosine) for cosine in cosines.values()], np.float32)
        opened.upsert(PointBatch([point_id(*key) for key in cosines], vectors, payloads))
        return opened

    return write


QUERY = np.array([2.0, 0, 0, 0, 0, 0, 0, 0])


def _found(hits):
    return [(hit.record_id, hit.frame_number) for hit in hits]


def test_the_best_come_first_with_their_cosine(scored):
    store = scored({(7, 0): 0.5, (8, 30): 0.9, (9, 0): -0.2})
    assert search_images(store, QUERY, limit=2) == [
        Hit(8, 30, 1.0, pytest.approx(0.9, abs=2e-3), "insta", "c8", "/videos/8.mp4"),
        Hit(7, 0, 0.0, pytest.approx(0.5, abs=2e-3), "insta", "c7", "/videos/7.mp4"),
    ]


def test_equal_scores_come_by_record_then_frame_even_at_the_limit(scored):
    cosines = {(record_id, number): 0.5 for record_id in (9, 3, 7, 5) for number in (60, 0, 30)}
    store = scored(cosines)
    assert _found(search_images(store, QUERY, limit=4)) == [(3, 0), (3, 30), (3, 60), (5, 0)]


def test_filters_and_threshold_combine(scored):
    store = scored({(7, 0): 0.9, (8, 0): 0.8, (9, 0): 0.7, (9, 1): 0.1}, platforms={8: "tiktok"})
    assert _found(search_images(store, QUERY, filters=PointFilter(record_id_range=IdRange(8, 9)))) == [
        (8, 0),
        (9, 0),
        (9, 1),
    ]
    assert _found(search_images(store, QUERY, filters=PointFilter(platform="insta"), score_threshold=0.5)) == [
        (7, 0),
        (9, 0),
    ]
    assert search_images(store, QUERY, filters=PointFilter(created_from=datetime(2026, 1, 2, tzinfo=UTC))) == []
    assert len(search_images(store, QUERY, filters=PointFilter(created_before=datetime(2026, 1, 2, tzinfo=UTC)))) == 4


def test_a_hit_of_exactly_the_threshold_is_found(scored):
    store = scored({(7, 0): 0.5, (8, 30): 0.9, (9, 0): 0.9})
    for hit in search_images(store, QUERY):
        at_least = search_images(store, QUERY, score_threshold=hit.score)
        assert hit in at_least
        assert min(found.score for found in at_least) == hit.score
    assert _found(search_images(store, QUERY, score_threshold=0.95)) == []


def test_grouping_finds_videos_behind_one_that_fills_every_page(scored):
    crowd = {(1, number): 0.9 - number / 1000 for number in range(200)}
    store = scored({**crowd, (5, 0): 0.3, (5, 1): 0.4, (6, 0): 0.2, (4, 0): 0.1})
    hits = search_images(store, QUERY, limit=3, group_by_video=True)
    assert _found(hits) == [(1, 0), (5, 1), (6, 0)]
    assert _found(search_images(store, QUERY, limit=9, group_by_video=True)) == [(1, 0), (5, 1), (6, 0), (4, 0)]


def test_a_search_that_finds_nothing_says_which_filter_names_what_is_not_there(scored):
    store = scored({(7, 0): 0.9, (8, 0): 0.8, (2**60 + 1, 0): 0.7}, platforms={8: "tiktok"})
    of = functools.partial(why_nothing, store)
    assert of(PointFilter(platform="instaa")) == ["No frame is of platform 'instaa'; there is 'insta', 'tiktok'."]
    assert of(PointFilter(record_id_range=IdRange(9, 2**60))) == [f"No frame is of a record from 9 to {2**60}."]
    late = datetime(2030, 1, 1, tzinfo=UTC)
    assert of(PointFilter(created_from=late)) == ["No frame was indexed in that time."]
    assert of(PointFilter(platform="x", record_id_range=IdRange(1, 6), created_before=late)) == [
        "No frame is of platform 'x'; there is 'insta', 'tiktok'.",
        "No frame is of a record from 1 to 6.",
    ]
    assert of(PointFilter(platform="tiktok", record_id_range=IdRange(7, 7))) == [
        "Each filter has frames that meet it, and no frame meets all of them."
    ]
    assert of(PointFilter(platform="insta"), score_threshold=0.99) == [
        "2 frames meet the filters; none of them has a score of 0.99 or more."
    ]
    assert of(PointFilter()) == []


def test_an_empty_collection_and_one_without_platforms_say_so(opened, embeddings):
    assert why_nothing(opened, PointFilter(platform="insta")) == ["The collection has no frames yet."]
    replace_records(opened, embeddings({7: [0]}), rows={7: VideoRow(7, "v.mp4")}, generations={7: "a"})
    assert why_nothing(opened, PointFilter(platform="insta")) == [
        "No frame is of platform 'insta', and none has a platform."
    ]


def test_a_missing_platform_and_code_come_back_as_none(opened, embeddings):
    batch = embeddings({7: [0]})
    opened.upsert(build_points(batch, rows={7: VideoRow(7, "v.mp4")}, generations={7: "a"}))
    (hit,) = search_images(opened, batch.vectors[0])
    assert (hit.platform, hit.video_code, hit.path) == (None, None, "v.mp4")


@pytest.mark.parametrize(
    ("vector", "limit"), [(np.zeros(8), 1), (np.full(8, np.nan), 1), (np.ones((1, 8)), 1), (QUERY, 0)]
)
def test_what_can_not_be_searched_with_is_refused(scored, vector, limit):
    with pytest.raises(RecordShapeError, match="search refused: it needs a vector"):
        search_images(scored({(7, 0): 0.5}), vector, limit=limit)


# The cosine of a frame at `angle` with the query's frame 1 is cos(angle); frames 2 and 3 are at 0.5 and 1 rad.
FRAMES = np.array([[np.cos(angle), np.sin(angle), 0, 0, 0, 0, 0, 0] for angle in (0.0, 0.5, 1.0)])


def test_a_video_that_is_like_the_query_from_end_to_end_beats_one_with_the_best_frame(scored):
    # 7 has exactly frame 1 and nothing near the others; 8 is 0.2 rad off every one of them.
    store = scored({(7, 0): 1.0, (8, 0): np.cos(0.2), (8, 30): np.cos(0.7), (8, 60): np.cos(1.2)})
    first, second = search_videos(store, FRAMES, limit=5)
    assert first == VideoHit(
        8,
        pytest.approx(np.cos(0.2), abs=0.01),  # frame 2 is nearest to the one at 0.7, frame 3 to the one at 1.2
        votes=2,
        query_frames=3,
        best=Hit(8, first.best.frame_number, first.best.frame_second, first.best.score, "insta", "c8", "/videos/8.mp4"),
    )
    assert (second.record_id, second.votes, second.best.frame_number) == (7, 1, 0)
    assert second.score == pytest.approx((1 + np.cos(0.5) + np.cos(1.0)) / 3, abs=0.01)


def test_a_frame_that_did_not_vote_for_a_video_counts_as_nothing(scored, monkeypatch):
    monkeypatch.setattr("extraction_dagster.stages.index.search._VOTES_PER_FRAME", 1)
    store = scored({(7, 0): 1.0, **{(record_id, 0): np.cos(0.75) for record_id in (8, 9, 10, 11)}})
    hits = search_videos(store, FRAMES, limit=1)
    assert (hits[0].record_id, hits[0].votes) == (8, 2)
    only_7 = PointFilter(record_id_range=IdRange(7, 7))
    scores = {hit.record_id: hit.score for hit in search_videos(store, FRAMES, limit=1, filters=only_7)}
    assert scores == {7: pytest.approx((1 + np.cos(0.5) + np.cos(1.0)) / 3, abs=0.01)}


def test_filters_and_threshold_hold_for_videos(scored):
    store = scored({(7, 0): 1.0, (8, 0): 0.9, (9, 0): 0.1}, platforms={8: "tube"})
    assert [hit.record_id for hit in search_videos(store, FRAMES[:1], filters=PointFilter(platform="insta"))] == [7, 9]
    assert [hit.record_id for hit in search_videos(store, FRAMES[:1], score_threshold=0.5)] == [7, 8]
    assert [hit.record_id for hit in search_videos(store, FRAMES[:1], limit=1)] == [7]
    with pytest.raises(RecordShapeError, match="it needs vectors"):
        search_videos(store, FRAMES[0])


def test_a_query_of_another_model_is_refused(opened, spec):
    open_for_search(opened, spec)
    with pytest.raises(CollectionMismatchError, match="fingerprint abc123, but the settings give dim 8, fingerprint x"):
        open_for_search(opened, CollectionSpec(spec.name, 8, "x"))


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
