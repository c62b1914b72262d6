import pytest

from extraction_dagster.stages.decode.geometry import _turn, scaled_size


@pytest.mark.parametrize(
    ("size", "sample_aspect", "short_side_px", "expected"),
    [
        ((1280, 720), 1.0, 224, (398, 224)),
        ((720, 1280), 1.0, 224, (224, 398)),
        ((160, 90), 1.0, 224, (160, 90)),
        ((640, 360), 2.0, 224, (796, 224)),
        ((120, 270), 4.0, 224, (398, 224)),
        ((1, 1), 1.0, 224, (1, 1)),
        ((60_000, 16), 1.0, 224, (16_384, 4)),
    ],
)
def test_the_short_side_is_scaled_in_square_pixels_and_never_up(size, sample_aspect, short_side_px, expected):
    assert scaled_size(*size, sample_aspect=sample_aspect, short_side_px=short_side_px) == expected


@pytest.mark.parametrize(
    ("matrix", "turn"),
    [
        ((65536, 0, 0, 65536), (False, False, False)),
        ((0, 65536, -65536, 0), (True, True, False)),
        ((-65536, 0, 0, -65536), (False, True, True)),
        ((0, -65536, 65536, 0), (True, False, True)),
        ((-65536, 0, 0, 65536), (False, True, False)),
        ((65536, 0, 0, -65536), (False, False, True)),
        ((0, 65536, 65536, 0), (True, False, False)),
        ((0, 0, 0, 0), (False, False, False)),
    ],
)
def test_a_display_matrix_turns_and_mirrors(matrix, turn):
    assert _turn(matrix) == turn
