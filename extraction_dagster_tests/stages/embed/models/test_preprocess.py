from __future__ import annotations

import numpy as np
import pytest
import torch  # noqa: TID253 - says whether there is a GPU

from extraction_dagster.stages.embed.models.preprocess import squash


def _cubic(x):
    x = abs(x)
    if x < 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


def _resize_rows(image, size):
    """Antialiased bicubic as Pillow defines it, in float64, written out: the independent side of the comparison."""
    scale = len(image) / size
    width = max(scale, 1.0)
    rows = []
    for n in range(size):
        centre = (n + 0.5) * scale
        taps = range(max(0, int(centre - 2 * width + 0.5)), min(len(image), int(centre + 2 * width + 0.5)))
        weights = np.array([_cubic((tap - centre + 0.5) / width) for tap in taps])
        rows.append(np.tensordot(weights / weights.sum(), image[list(taps)], 1))
    return np.clip(np.round(np.array(rows)), 0, 255)


@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize(("width_px", "height_px"), [(398, 224), (224, 398), (90, 50), (1000, 61)])
def test_squash_is_pillows_antialiased_bicubic_written_in_float64(width_px, height_px, device):
    noise = np.random.default_rng(5).integers(0, 256, (height_px, width_px, 3), dtype=np.uint8)
    across = _resize_rows(noise.transpose(1, 0, 2).astype(np.float64), 224).transpose(1, 0, 2)
    expected = _resize_rows(across, 224)

    got = squash([noise], height_px=224, width_px=224, device=device)

    assert got.dtype == np.uint8
    assert got.shape == (1, 224, 224, 3)
    steps = np.abs(got[0].astype(np.int64) - expected)
    # White noise is the worst case for weights of 16 bits: a second step, on fewer than one value in ten thousand.
    assert steps.max() <= 2
    assert (steps > 1).mean() < 1e-4


def test_squash_keeps_the_order_of_images_of_mixed_sizes():
    values = (10, 20, 30, 40)
    sizes = ((30, 40), (30, 40), (80, 20), (30, 40))
    images = [np.full((*size, 3), value, np.uint8) for value, size in zip(values, sizes, strict=True)]

    assert squash(images, height_px=8, width_px=8)[:, 3, 3, 0].tolist() == [10, 20, 30, 40]


def test_squash_of_one_image_is_the_same_alone_and_among_others(make_picture):
    images = [make_picture(n) for n in range(3)]

    alone = np.concatenate([squash([image], height_px=224, width_px=224) for image in images])

    assert np.array_equal(squash(images, height_px=224, width_px=224), alone)
    assert np.array_equal(squash(np.stack(images), height_px=224, width_px=224), alone)


def test_squash_leaves_an_image_of_the_right_size_alone_and_takes_none():
    image = np.random.default_rng(1).integers(0, 256, (224, 224, 3), dtype=np.uint8)

    assert np.array_equal(squash([image], height_px=224, width_px=224)[0], image)
    assert squash([], height_px=224, width_px=224).shape == (0, 224, 224, 3)


def test_a_device_without_memory_for_all_images_resizes_fewer_at_once(make_picture, monkeypatch):
    images = np.stack([make_picture(n) for n in range(7)])
    expected = squash(images, height_px=224, width_px=224, device="cpu")
    interpolate, seen = torch.nn.functional.interpolate, []

    def fits_two(pixels, *args, **options):
        seen.append(len(pixels))
        if len(pixels) > 2:
            message = "CUDA out of memory"
            raise torch.OutOfMemoryError(message)
        return interpolate(pixels, *args, **options)

    monkeypatch.setattr(torch.nn.functional, "interpolate", fits_two)

    assert np.array_equal(squash(images, height_px=224, width_px=224, device="cpu"), expected)
    assert seen == [7, 4, 2, 2, 2, 2, 3, 2, 2, 1, 1]

    monkeypatch.setattr(
        torch.nn.functional, "interpolate", lambda pixels, *_, **__: fits_two(pixels.repeat(3, 1, 1, 1))
    )
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        squash(images, height_px=224, width_px=224, device="cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_a_gpu_squashes_as_the_cpu_does_in_float32(make_picture):
    images = [make_picture(n, 398, 224) for n in range(5)]

    on_gpu = squash(images, height_px=224, width_px=224, device="cuda:0")

    steps = np.abs(on_gpu.astype(int) - squash(images, height_px=224, width_px=224, device="cpu").astype(int))
    assert steps.max() <= 1
    assert (steps > 0).mean() < 1e-3
