from __future__ import annotations

import struct
import zlib

import cv2  # noqa: TID253 - writes the files
import numpy as np
import pytest

from extraction_dagster.errors.embed import QueryImageError
from extraction_dagster.stages.embed.query import embed_query_image, load_query_image


def _written(path, image, *options):
    assert cv2.imwrite(str(path), np.ascontiguousarray(image[:, :, ::-1]), options)
    return path


LOSSLESS_WEBP = (cv2.IMWRITE_WEBP_QUALITY, 101)


@pytest.mark.parametrize(("suffix", "options"), [(".png", ()), (".bmp", ()), (".webp", LOSSLESS_WEBP)])
def test_a_lossless_image_is_read_as_rgb(tmp_path, make_picture, suffix, options):
    path = _written(tmp_path / f"query{suffix}", make_picture(1), *options)

    assert np.array_equal(load_query_image(path), make_picture(1))


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_a_lossy_image_is_read_close_to_what_was_written(tmp_path, suffix):
    image = np.full((64, 96, 3), (200, 60, 20), np.uint8)

    read = load_query_image(_written(tmp_path / f"query{suffix}", image))

    assert read.shape == (64, 96, 3)
    assert read.dtype == np.uint8
    assert np.abs(read.astype(int) - image).mean() < 4


def test_gray_and_transparent_images_become_rgb(tmp_path):
    cv2.imwrite(str(tmp_path / "gray.png"), np.full((20, 30), 77, np.uint8))
    cv2.imwrite(str(tmp_path / "alpha.png"), np.full((20, 30, 4), (1, 2, 3, 255), np.uint8))

    assert load_query_image(tmp_path / "gray.png").tolist() == [[[77, 77, 77]] * 30] * 20
    assert load_query_image(tmp_path / "alpha.png").tolist() == [[[3, 2, 1]] * 30] * 20


def test_a_photo_taken_sideways_is_turned_upright(tmp_path, make_picture):
    plain = _written(tmp_path / "plain.jpg", make_picture(2)).read_bytes()
    tiff = b"II*\x00" + struct.pack("<IHHHIHHI", 8, 1, 0x0112, 3, 1, 6, 0, 0)  # orientation 6: turn right by 90
    exif = b"Exif\x00\x00" + tiff
    (tmp_path / "turned.jpg").write_bytes(plain[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + plain[2:])

    upright = load_query_image(tmp_path / "plain.jpg")

    assert np.array_equal(load_query_image(tmp_path / "turned.jpg"), np.rot90(upright, -1))


def _png_bomb(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


def test_too_many_pixels_are_refused_from_the_header(tmp_path, make_picture):
    (tmp_path / "bomb.png").write_bytes(_png_bomb(100_000, 100_000))
    with pytest.raises(QueryImageError, match="got 100000x100000 pixels, expected 1 to 100000000 pixels in all"):
        load_query_image(tmp_path / "bomb.png")

    for suffix in (".jpg", ".webp", ".bmp", ".gif"):
        path = _written(tmp_path / f"small{suffix}", make_picture(1))
        with pytest.raises(QueryImageError, match="got 96x64 pixels, expected 1 to 6143 pixels in all"):
            load_query_image(path, max_pixels=6143)
    path = _written(tmp_path / "lossless.webp", make_picture(1), *LOSSLESS_WEBP)
    with pytest.raises(QueryImageError, match="got 96x64 pixels"):
        load_query_image(path, max_pixels=6143)


@pytest.mark.parametrize(
    "data", [b"", b"hello, this is no image at all", b"\xff\xd8\xff", b"RIFF1234WEBPjunk" + b"0" * 40]
)
def test_a_file_that_is_no_image_is_an_error_that_names_it(tmp_path, data):
    (tmp_path / "holiday.jpg").write_bytes(data)

    with pytest.raises(QueryImageError, match=r"holiday\.jpg' can't be searched for: got a file that starts with b"):
        load_query_image(tmp_path / "holiday.jpg")


def test_a_damaged_image_is_an_error(tmp_path):
    (tmp_path / "half.png").write_bytes(_png_bomb(90, 90)[:60])

    with pytest.raises(QueryImageError, match="damaged data"):
        load_query_image(tmp_path / "half.png")


def test_a_missing_file_and_a_folder_are_errors(tmp_path):
    with pytest.raises(QueryImageError, match="No such file or directory, expected a file that can be read"):
        load_query_image(tmp_path / "absent.png")
    with pytest.raises(QueryImageError, match="Is a directory"):
        load_query_image(tmp_path)


def test_a_query_vector_has_length_one_and_is_nearest_to_its_own_frame(tmp_path, model, make_picture):
    vectors = np.stack([embed_query_image(model, make_picture(n)) for n in range(4)])
    degraded = load_query_image(_written(tmp_path / "q.jpg", make_picture(2), cv2.IMWRITE_JPEG_QUALITY, 40))

    query = embed_query_image(model, degraded)

    assert vectors.dtype == np.float32
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert int((vectors @ query).argmax()) == 2


def test_a_query_without_a_usable_vector_is_an_error(model, make_picture, monkeypatch):
    monkeypatch.setattr(model, "embed_images", lambda images: np.full((len(images), 1280), np.nan, np.float32))

    with pytest.raises(QueryImageError, match=r"'a\.png' can't be searched for: got a vector with NaN from model"):
        embed_query_image(model, make_picture(1), shown="a.png")
