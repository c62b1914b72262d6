"""One clock out of stamps that are missing, wrong, repeated, shuffled or begin anew."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from extraction_dagster.stages.decode.decoders.clock import display_times, has_jump


def times(*stamps, jump=1000, guessed=False):
    ticks, first = display_times(list(stamps), gap_ticks=5, jump_ticks=jump, guessed=guessed)
    return ticks.tolist(), first


def test_a_clock_that_starts_again_goes_on():
    assert times(50, 55, 0, 5) == ([0, 5, 10, 15], 50)


def test_pieces_whose_clocks_step_back_by_little_keep_their_frames_in_order():
    assert times(0, 5, 10, 8, 13, 18) == ([0, 5, 6.5, 8, 13, 18], 0)
    assert times(0, 5, 10, 15, 10, 15, 20) == ([0, 5, 10, 15, 20, 25, 30], 0)
    assert times(0, 5, 10, 10, 15, 20) == ([0, 5, 10, 12.5, 15, 20], 0)
    assert times(0, 5, 10, 15, 7, 12, 17) == ([0, 5, 10, 15, 20, 25, 30], 0)


def test_pieces_of_three_frames_follow_each_other():
    assert times(*[0, 5, 10] * 4) == ([0, 5, 10, 15, 20, 25, 30, 35, 40, 45, 50, 55], 0)


@pytest.mark.parametrize("wrong", [9999, 400, 25, 2, -5000])
def test_one_wrong_stamp_costs_nothing_but_itself(wrong):
    assert times(0, 5, 10, wrong, 20, 25, 30) == ([0, 5, 10, 15, 20, 25, 30], 0)


def test_a_jump_of_the_clock_is_closed():
    assert times(0, 5, 9999, 10004) == ([0, 5, 10, 15], 0)
    assert times(0, 5, 10, 9999) == ([0, 5, 10, 15], 0)
    assert times(0, 5, 9999, 10004, 20, 25) == ([0, 5, 10, 15, 20, 25], 0)


def test_a_first_stamp_that_is_wrong_does_not_say_when_the_video_starts():
    assert times(9999, 5, 10, 15) == ([0, 5, 10, 15], 0)
    assert times(0, 7000, 7005, 7010) == ([0, 5, 10, 15], 6995)


def test_long_stills_stay_and_so_does_one_frame_an_hour():
    assert times(0, 5, 900, 905) == ([0, 5, 900, 905], 0)
    assert times(0, 4000, 8000, 12000) == ([0, 4000, 8000, 12000], 0)


def test_stamps_in_the_order_of_decoding_are_dealt_out_in_the_order_of_showing():
    assert times(5, 15, 20, 10, 30, 35, 25) == ([0, 5, 10, 15, 20, 25, 30], 5)
    assert times(1, 100, 7, guessed=True) == ([0, 6, 99], 1)


def test_frames_without_a_time_follow_at_the_streams_rate():
    assert times(None, None, 10, None) == ([0, 5, 10, 15], 0)
    assert times(None, None) == ([0, 5], 0)
    assert times(0, 5, None, 15) == ([0, 5, 10, 15], 0)


def test_frames_without_a_time_at_the_beginning_come_before_the_first_that_has_one():
    assert times(None, None, None, 0, 5) == ([0, 5, 10, 15, 20], -15)


def test_frames_with_one_stamp_share_the_time_until_the_next():
    assert times(0, 0, 0, 0) == ([0, 5, 10, 15], 0)
    assert times(0, 4, 4, 8) == ([0, 4, 6, 8], 0)


@given(st.lists(st.none() | st.integers(-(2**40), 2**40), min_size=1, max_size=40), st.booleans())
def test_whatever_the_stamps_say_every_frame_has_a_time_and_none_goes_back(stamps, guessed):
    ticks, first = display_times(stamps, gap_ticks=5, jump_ticks=1000, guessed=guessed)
    assert len(ticks) == len(stamps)
    assert ticks[0] == 0
    assert np.isfinite(ticks).all()
    assert np.isfinite(first)
    assert (np.diff(ticks) >= 0).all()


@given(st.lists(st.integers(1, 900), min_size=1, max_size=40), st.integers(-(2**40), 2**40))
def test_stamps_that_only_go_forward_are_taken_as_they_are(steps, first):
    stamps = np.cumsum([first, *steps])
    ticks, start = display_times(stamps.tolist(), gap_ticks=5, jump_ticks=1000)
    assert start == first
    assert ticks.tolist() == (stamps - first).tolist()


def test_a_jump_is_a_gap_much_longer_than_the_others():
    assert has_jump(np.array([0, 5, 10, 2000]), jump_ticks=1000)
    assert not has_jump(np.array([0, 5, 10, 900]), jump_ticks=1000)
    assert not has_jump(np.array([0, 4000, 8000]), jump_ticks=1000)
    assert not has_jump(np.array([7]), jump_ticks=1000)
