"""A contact sheet stays small, whatever a run decoded."""

import re

import numpy as np
import simplejpeg

from extraction_dagster.ranges.contact_sheet import MAX_BYTES, ContactSheet
from extraction_dagster.stages.decode.stage import Preview


def noise(seed, width=320, height=180):
    image = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return simplejpeg.encode_jpeg(image, quality=95)


def shown(markdown):
    return [int(record) for record in re.findall(r"!\[(\d+) at", markdown)]


def test_nothing_decoded_gives_no_sheet():
    assert ContactSheet(12).markdown() is None


def test_a_limit_of_none_keeps_no_picture():
    sheet = ContactSheet(0)
    sheet.add([Preview(1, 0.0, noise(1))])
    assert sheet.markdown() is None


def test_rows_of_four_with_a_caption_under_each_picture():
    sheet = ContactSheet(12)
    sheet.add(Preview(record, 1.25, noise(record, 32, 18)) for record in (5, 3, 1, 4, 2))
    lines = sheet.markdown().splitlines()
    assert shown(sheet.markdown()) == [1, 2, 3, 4, 5]
    assert lines[1] == "| --- | --- | --- | --- |"
    assert lines[2] == "| 1 at 1.2 s | 2 at 1.2 s | 3 at 1.2 s | 4 at 1.2 s |"
    assert lines[4] == "| 5 at 1.2 s |  |  |  |"


def test_of_many_videos_a_few_are_shown_from_beginning_to_end():
    sheet = ContactSheet(12)
    jpeg = noise(0, 32, 18)
    for record in range(1000):
        sheet.add([Preview(record, 0.0, jpeg)])
    records = shown(sheet.markdown())
    assert len(records) == 12
    assert records[0] < 100
    assert records[-1] > 800
    assert max(np.diff(records)) < 200


def test_a_sheet_never_exceeds_its_bytes_even_of_pictures_that_hardly_compress():
    sheet = ContactSheet(24)
    sheet.add(Preview(record, 0.0, noise(record, 300, 300)) for record in range(24))
    markdown = sheet.markdown()
    assert len(markdown) <= MAX_BYTES
    assert 4 <= len(shown(markdown)) < 24


def test_a_damaged_picture_leaves_its_place_empty():
    sheet = ContactSheet(12)
    sheet.add([Preview(1, 0.0, b"no jpeg"), Preview(2, 0.0, noise(2, 32, 18))])
    markdown = sheet.markdown()
    assert "(damaged)" in markdown
    assert shown(markdown) == [2]
