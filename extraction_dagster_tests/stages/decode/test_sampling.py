from typing import get_args, get_type_hints

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from extraction_dagster.settings import Settings
from extraction_dagster.stages.decode.sampling import SAMPLERS, Sampler, Sampling, Selection, select_frames


def select(pts, **fields):
    selection = select_frames(np.array(pts, float), Sampling(**fields))
    return selection.frame_number.tolist(), selection.target_seconds.tolist()


def test_a_target_selects_the_frame_that_is_shown_then_not_the_nearest():
    assert select([0.0, 0.4, 0.8, 1.2, 1.6], fps=1.0) == ([0, 2], [0.0, 1.0])


def test_a_frame_that_starts_exactly_at_the_target_is_shown():
    assert select([0.0, 0.5, 1.0, 1.5, 2.0], fps=1.0) == ([0, 2, 4], [0.0, 1.0, 2.0])


def test_a_rounding_error_past_the_target_does_not_count():
    assert select([0.0, 1 / 3 + 1e-9, 2 / 3 + 1e-9], fps=3.0)[0] == [0, 1, 2]


def test_a_frame_that_answers_several_targets_is_kept_once_with_its_first_target():
    assert select([0.0, 2.5], fps=1.0) == ([0], [0.0])
    assert select([0.0, 2.5, 5.0], fps=1.0) == ([0, 1, 2], [0.0, 3.0, 5.0])


def test_fps_above_the_videos_own_rate_gives_every_frame_once():
    assert select([0.0, 0.5, 1.0], fps=10.0)[0] == [0, 1, 2]


def test_the_cap_thins_evenly_and_keeps_the_first_frame():
    assert select([float(second) for second in range(10)], fps=1.0, max_frames=4) == (
        [0, 2, 5, 7],
        [0.0, 2.0, 5.0, 7.0],
    )


def test_a_cap_of_one_keeps_the_first_frame():
    assert select([0.0, 1.0, 2.0], fps=1.0, max_frames=1) == ([0], [0.0])


def test_uniform_takes_the_middles_of_equal_parts():
    assert select([0.0, 1.0, 2.0, 3.0], mode="uniform", num_frames=2) == ([1, 3], [1.0, 3.0])
    assert select([0.0, 1.0, 2.0, 3.0], mode="uniform", num_frames=4) == ([0, 1, 2, 3], [0.5, 1.5, 2.5, 3.5])


def test_one_frame_is_selected_once_whatever_the_mode():
    assert select([0.0], mode="uniform", num_frames=16) == ([0], [0.0])
    assert select([0.0], fps=5.0) == ([0], [0.0])


def test_frames_that_share_a_time_give_the_last_of_them():
    assert select([0.0, 0.0, 0.0], fps=1.0) == ([2], [0.0])


def test_no_frame_gives_no_selection():
    assert select([], fps=1.0) == ([], [])


def select_key(keys, count=10, **fields):
    keyframe = np.isin(np.arange(count), keys)
    selection = select_frames(np.arange(count) / 2, Sampling(**fields), keyframe)
    return selection.frame_number.tolist(), selection.target_seconds.tolist()


@pytest.mark.parametrize("mode", ["keyframes", "scene"])
def test_keyframes_are_all_taken_with_their_own_times(mode):
    assert select_key([0, 4, 7], mode=mode) == ([0, 4, 7], [0.0, 2.0, 3.5])


def test_without_a_keyframe_the_first_frame_is_taken():
    assert select_key([], mode="keyframes") == ([0], [0.0])


def test_the_cap_thins_keyframes_evenly():
    assert select_key(range(10), mode="keyframes", max_frames=4)[0] == [0, 2, 5, 7]


def test_a_choice_of_fewer_is_filled_up_evenly_to_the_fewest_frames():
    assert select_key([0], mode="keyframes", min_frames=3) == ([0, 1, 5], [0.0, 0.8333333333333334, 2.5])
    assert select([0.0, 0.5, 1.0, 1.5], fps=0.1, min_frames=2) == ([0, 1], [0.0, 0.5])


def test_a_choice_of_enough_is_not_filled_up():
    assert select_key([0, 4, 7], mode="keyframes", min_frames=3)[0] == [0, 4, 7]


def test_a_video_with_fewer_frames_gives_all_that_it_has():
    assert select([0.0, 1.0, 2.0], fps=0.1, min_frames=50)[0] == [0, 1, 2]


@given(
    keys=st.sets(st.integers(0, 59), max_size=20),
    count=st.integers(1, 60),
    max_frames=st.integers(1, 30),
    min_frames=st.integers(1, 30),
)
def test_filling_up_keeps_what_was_chosen_and_goes_no_further_than_asked(keys, count, max_frames, min_frames):
    pts, keyframe = np.arange(count) / 7, np.isin(np.arange(count), list(keys))
    plain = select_frames(pts, Sampling("keyframes", max_frames=max_frames), keyframe)
    filled = select_frames(pts, Sampling("keyframes", max_frames=max_frames, min_frames=min_frames), keyframe)
    assert set(plain.frame_number.tolist()) <= set(filled.frame_number.tolist())
    assert np.all(np.diff(filled.frame_number) > 0)
    assert len(filled) == max(len(plain), min(min_frames, count))


@given(
    gaps=st.lists(st.floats(0, 3), max_size=60),
    fps=st.sampled_from([0.2, 0.5, 1.0, 2.0, 7.0]),
    max_frames=st.integers(1, 50),
)
def test_every_selected_frame_is_the_one_shown_at_its_target(gaps, fps, max_frames):
    pts = np.concatenate([[0.0], np.cumsum(gaps)])
    selection = select_frames(pts, Sampling("fps", fps, max_frames))
    assert 1 <= len(selection) <= max_frames
    assert np.all(np.diff(selection.frame_number) > 0)
    for frame, target in zip(selection.frame_number, selection.target_seconds, strict=True):
        assert frame == max(number for number, at in enumerate(pts) if at <= target + 1e-6)


def test_the_settings_decide_the_sampling():
    settings = Settings(sampling="uniform", fps=2.0, max_frames=7, num_frames=5, min_frames=3)
    assert Sampling.from_settings(settings) == Sampling("uniform", 2.0, 7, 5, 3)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (Sampling("fps", 1.0, 600, 16), Sampling("fps", 1.0, 600, 99), True),
        (Sampling("fps", 1.0, 600, 16), Sampling("fps", 1.0, 601, 16), False),
        (Sampling("uniform", 1.0, 600, 16), Sampling("uniform", 2.0, 1, 16), True),
        (Sampling("uniform", 1.0, 600, 16), Sampling("uniform", 1.0, 600, 17), False),
        (Sampling("keyframes", 1.0, 600, 16), Sampling("keyframes", 2.0, 600, 17), True),
        (Sampling("keyframes", 1.0, 600, 16), Sampling("keyframes", 1.0, 601, 16), False),
        (Sampling("keyframes"), Sampling("scene"), False),
        (Sampling(min_frames=1), Sampling(min_frames=2), False),
    ],
)
def test_only_fields_that_the_mode_uses_identify_a_sampling(one, other, same):
    assert (one.identity == other.identity) is same


def test_the_setting_names_every_sampler():
    assert get_args(get_type_hints(Settings)["sampling"]) == tuple(SAMPLERS) == ("fps", "uniform", "keyframes", "scene")


def test_a_sampler_is_a_function_and_an_entry(monkeypatch):
    def odd(pts_seconds, _keyframe, _sampling):
        return Selection(np.arange(1, len(pts_seconds), 2), pts_seconds[1::2])

    monkeypatch.setitem(SAMPLERS, "odd", Sampler(odd, uses=("max_frames",)))
    selection = select_frames(np.arange(10) / 2, Sampling("odd", max_frames=3))
    assert selection.frame_number.tolist() == [1, 3, 7]
    assert Sampling("odd", fps=9.0, max_frames=3).identity == {"mode": "odd", "max_frames": 3}
    assert repr(selection) == "Selection(3 frames)"
