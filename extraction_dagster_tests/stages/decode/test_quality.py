"""The four steps after sampling, on pictures made by hand and on rendered videos."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from extraction_dagster.errors.decode import FramesRejectedError
from extraction_dagster.records import FrameBatch
from extraction_dagster.settings import Settings
from extraction_dagster.stages.decode.decoders.decoder import DecodedVideo
from extraction_dagster.stages.decode.fingerprint import frames_fingerprint
from extraction_dagster.stages.decode.jpeg import decode_frames
from extraction_dagster.stages.decode.quality import (
    Quality,
    deviations,
    distinct,
    first_of_scenes,
    picture_box,
    refine,
)
from extraction_dagster.stages.decode.sampling import Sampling
from extraction_dagster.stages.decode.task import DecodeJob, decode_job

BLACK, WHITE, RED, BLUE = (0, 0, 0), (255, 255, 255), (200, 30, 30), (30, 30, 200)
SIZE = (96, 160)  # height, width


def solid(colour):
    return np.full((*SIZE, 3), colour, np.uint8)


def scene(seed, shift=0, noise=0):
    """A patchwork of colours; `shift` moves it by pixels, `noise` adds grain."""
    random = np.random.default_rng(seed)
    image = random.integers(40, 250, (6, 10, 3), dtype=np.uint8).repeat(16, 0).repeat(16, 1)
    grain = random.integers(-noise, noise + 1, image.shape)
    return np.clip(np.roll(image, shift, axis=1) + grain, 0, 255).astype(np.uint8)


def barred(image, *, top=0, bottom=0, left=0, right=0, level=0):  # noqa: PLR0913 - four sides
    """`image` with bars painted over its sides."""
    image = image.copy()
    height, width = image.shape[:2]
    image[:top] = image[height - bottom :] = level
    image[:, :left] = image[:, width - right :] = level
    return image


def video(*pictures):
    count = len(pictures)
    seconds = np.arange(count) / 2
    numbers = np.arange(count, dtype=np.int64) * 15
    return DecodedVideo(FrameBatch(np.stack(pictures), seconds, seconds, numbers), 9.0, "cut short")


def kept(decoded, **steps):
    """The places of the pictures that are kept: frame number 15 is place 1."""
    frames = refine(decoded, Quality(**steps), path="a.mp4").frames
    assert frames.pts_seconds.tolist() == (frames.frame_number / 30).tolist()
    assert frames.target_seconds.tolist() == (frames.frame_number / 30).tolist()
    return (frames.frame_number // 15).tolist()


def test_without_a_step_nothing_is_touched():
    decoded = video(solid(BLACK), solid(BLACK))
    assert refine(decoded, Quality(), path="a.mp4") is decoded


@pytest.mark.parametrize("colour", [BLACK, WHITE, RED, (20, 20, 20)])
def test_a_frame_of_a_single_colour_is_left_out(colour):
    assert kept(video(scene(1), solid(colour), scene(2)), solid_deviation=6.0) == [0, 2]


def test_grain_does_not_save_a_solid_frame_and_a_caption_does():
    grain = np.random.default_rng(3).integers(14, 22, (*SIZE, 3), dtype=np.uint8)
    caption = solid(BLACK)
    caption[40:50, 20:140] = 255
    assert kept(video(grain, caption), solid_deviation=6.0) == [1]


def test_colours_of_one_brightness_are_not_solid():
    image = solid((128, 64, 64))
    image[:, 80:] = (64, 96, 64)
    assert deviations(np.stack([image]))[0] == 32.0


def test_the_bars_are_those_that_are_black_in_every_picture():
    pictures = [barred(scene(1), top=12, bottom=20), barred(scene(2), top=16, bottom=12), solid(BLACK)]
    assert picture_box(np.stack(pictures)) == (12, 84, 0, 160)


def test_bars_at_the_sides_and_bars_that_are_nearly_black_are_cut():
    assert picture_box(np.stack([barred(scene(1), left=30, right=25, level=18)])) == (0, 96, 30, 135)


def test_a_bright_spot_in_a_bar_is_part_of_the_picture():
    image = barred(scene(1), top=20, bottom=20)
    image[8, 50] = (0, 0, 90)
    assert picture_box(np.stack([image])) == (8, 76, 0, 160)


@pytest.mark.parametrize(
    "image", [solid(BLACK), barred(scene(1), top=44, bottom=44), barred(scene(1), top=30, bottom=30, left=60, right=60)]
)
def test_what_would_leave_little_is_not_cut(image):
    assert picture_box(np.stack([image])) == (0, 96, 0, 160)


def test_one_crop_holds_for_the_whole_video_and_keeps_every_frame():
    pictures = [barred(scene(1), top=12, bottom=12), barred(scene(2), top=30, bottom=30), solid(BLACK)]
    decoded = refine(video(*pictures), Quality(crop_bars=True), path="a.mp4")
    assert decoded.frames.data.shape == (3, 72, 160, 3)
    assert decoded.frames.frame_number.tolist() == [0, 15, 30]
    assert np.array_equal(decoded.frames.data[0], scene(1)[12:84])
    assert (decoded.duration_seconds, decoded.partial) == (9.0, "cut short")


def test_a_solid_picture_between_bars_is_seen_once_they_are_cut():
    pictures = video(barred(scene(1), top=20, bottom=20), barred(solid(WHITE), top=20, bottom=20))
    assert kept(pictures, solid_deviation=6.0) == [0, 1]
    assert kept(pictures, solid_deviation=6.0, crop_bars=True) == [0]


def test_a_scene_is_kept_by_its_first_picture():
    pictures = [scene(1), scene(1, shift=16), scene(2), scene(2, noise=2), scene(1)]
    assert first_of_scenes(np.stack(pictures), 0.3).tolist() == [0, 2, 4]


def test_the_distance_of_scenes_is_the_share_of_pixels_that_change_colour():
    half = solid(RED)
    half[:, 80:] = BLUE
    pictures = np.stack([solid(RED), half])
    assert first_of_scenes(pictures, 0.5).tolist() == [0, 1]
    assert first_of_scenes(pictures, 0.51).tolist() == [0]


def test_duplicates_are_left_out_wherever_they_come():
    pictures = [scene(1), scene(1, noise=6), scene(2), scene(1), scene(2, noise=6), scene(3)]
    assert distinct(np.stack(pictures), 6).tolist() == [0, 2, 5]
    assert kept(video(*pictures), duplicate_bits=6) == [0, 2, 5]


def test_like_shapes_in_other_colours_are_no_duplicates():
    red, blue = solid(RED), solid(BLUE)
    red[:, 80:], blue[:, 80:] = WHITE, WHITE
    assert distinct(np.stack([red, blue]), 6).tolist() == [0, 1]


def test_more_bits_count_more_as_duplicates():
    pictures = np.stack([scene(1), scene(1, shift=12)])
    assert distinct(pictures, 0).tolist() == [0, 1]
    pictures[1] = pictures[0]
    pictures[1, 0:12, 0:18] = 255 - pictures[1, 0:12, 0:18]  # one of 72 cells: two bits at most
    assert distinct(pictures, 2).tolist() == [0]


def test_the_fewest_frames_come_back_solid_ones_last_the_most_telling_first():
    faint = solid(BLACK)
    faint[:10] = 12
    pictures = video(scene(1), scene(1), solid(BLACK), faint, scene(1))
    steps = {"solid_deviation": 6.0, "duplicate_bits": 6}
    assert kept(pictures, **steps) == [0]
    assert kept(pictures, **steps, min_frames=2) == [0, 1]
    assert kept(pictures, **steps, min_frames=4) == [0, 1, 3, 4]
    assert kept(pictures, **steps, min_frames=99) == [0, 1, 2, 3, 4]


def test_a_video_of_solid_frames_keeps_one_unless_none_is_asked_for():
    pictures = video(solid(BLACK), solid(RED))
    assert kept(pictures, solid_deviation=6.0) == [0]
    with pytest.raises(FramesRejectedError, match=r"'a\.mp4' kept 0 of 2 sampled frames.*EXTRACTION_MIN_FRAMES=1") as e:
        refine(pictures, Quality(solid_deviation=6.0, min_frames=0), path="a.mp4")
    assert e.value.permanent


@given(
    seeds=st.lists(st.integers(0, 4), min_size=1, max_size=9),
    crop=st.booleans(),
    deviation=st.sampled_from([None, 6.0]),
    distance=st.sampled_from([None, 0.3]),
    bits=st.sampled_from([None, 0, 6]),
    min_frames=st.integers(1, 6),
)
def test_whatever_is_on_a_kept_frame_keeps_its_number_times_and_picture(  # noqa: PLR0913, PLR0917 - what is drawn
    seeds, crop, deviation, distance, bits, min_frames
):
    pictures = [barred(scene(seed) if seed else solid(BLACK), top=10) for seed in seeds]
    decoded = video(*pictures)
    frames = refine(decoded, Quality(crop, deviation, distance, bits, min_frames), path="a.mp4").frames
    assert len(frames) >= min(min_frames, len(seeds))
    places = frames.frame_number // 15
    assert frames.pts_seconds.tolist() == decoded.frames.pts_seconds[places].tolist()
    cut = 10 if crop and any(seeds) else 0
    assert np.array_equal(frames.data, decoded.frames.data[places][:, cut:])


ALL = {"crop_bars": True, "reject_solid": True, "drop_duplicates": True}


@pytest.mark.parametrize(
    ("changed", "same"),
    [
        ({"solid_deviation": 9.0, "duplicate_bits": 1, "scene_distance": 0.5}, True),  # of steps that are off
        ({"min_frames": 0}, True),  # nothing is dropped
        ({"min_frames": 2}, False),
        ({"crop_bars": True}, False),
        ({"reject_solid": True}, False),
        ({"drop_duplicates": True}, False),
        ({"sampling": "scene"}, False),
    ],
)
def test_the_fingerprint_follows_the_steps_that_are_on(changed, same):
    assert (frames_fingerprint(Settings(**changed)) == frames_fingerprint(Settings())) is same


@pytest.mark.parametrize("changed", [{"solid_deviation": 9.0}, {"duplicate_bits": 1}, {"min_frames": 0}])
def test_a_steps_own_setting_is_part_of_the_fingerprint_once_it_is_on(changed):
    assert frames_fingerprint(Settings(**ALL, **changed)) != frames_fingerprint(Settings(**ALL))


def test_the_steps_are_off_unless_switched_on():
    assert Quality.from_settings(Settings()).identity == {}
    assert Quality.from_settings(Settings(**ALL, sampling="scene", min_frames=3)) == Quality(True, 6.0, 0.3, 6, 3)  # noqa: FBT003 - the record's order


@pytest.fixture(scope="module")
def slideshow(tmp_path_factory):
    """Eight seconds at 4 frames a second between bars: two scenes, a black second, the first scene again."""
    import av

    path = tmp_path_factory.mktemp("quality") / "slides.mp4"
    seconds = [scene(1), scene(1), scene(2), scene(2), solid(BLACK), scene(1), scene(3), scene(3)]
    with av.open(str(path), "w") as sink:
        stream = sink.add_stream("libx264", rate=4, options={"crf": "18", "x264-params": "keyint=4:scenecut=0"})
        stream.width, stream.height, stream.pix_fmt = 160, 96, "yuv420p"
        for number in range(32):
            image = barred(seconds[number // 4], top=16, bottom=16)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 4)
            sink.mux(stream.encode(frame))
        sink.mux(stream.encode(None))
    return path


# Colours have half the rows: interpolated, they reach a row into each bar; decord repeats them instead.
REACHED_ROWS = {"pyav": 2, "decord": 0}


@pytest.mark.parametrize("decoder", ["pyav", "decord"])
@pytest.mark.parametrize(
    ("sampling", "quality", "numbers", "height"),
    [
        (Sampling("keyframes"), Quality(), [0, 4, 8, 12, 16, 20, 24, 28], 96),
        (Sampling("scene"), Quality(scene_distance=0.3), [0, 8, 16, 20, 24], 96),
        (Sampling("fps"), Quality(crop_bars=True, solid_deviation=6.0), [0, 4, 8, 12, 20, 24, 28], 64),
        (Sampling("fps"), Quality(duplicate_bits=6), [0, 8, 16, 24], 96),
        (Sampling("scene"), Quality(True, 6.0, 0.3, 6), [0, 8, 24], 64),  # noqa: FBT003 - the record's order
        (Sampling("scene"), Quality(True, 6.0, 0.3, 6, min_frames=5), [0, 4, 8, 20, 24], 64),  # noqa: FBT003
    ],
)
def test_a_job_applies_the_steps_to_what_its_decoder_gives(slideshow, decoder, sampling, quality, numbers, height):  # noqa: PLR0913, PLR0917 - a table
    job = DecodeJob(7, "v1", str(slideshow), decoder=decoder, sampling=sampling, quality=quality)
    frames = decode_job(job)
    height += REACHED_ROWS[decoder] if quality.crop_bars else 0
    assert frames.frame_number.tolist() == numbers
    assert frames.pts_seconds.tolist() == [number / 4 for number in numbers]
    assert (frames.width_px, frames.height_px) == (160, height)
    assert decode_frames(frames).data.shape == (len(numbers), height, 160, 3)
