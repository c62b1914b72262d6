"""Images of any size made into the pixels that a network takes."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from itertools import groupby
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from extraction_dagster.settings import Settings

# Names what `squash` does to the pixels; part of every fingerprint, so change it whenever the pixels change.
SQUASH: Final = "squash-bicubic-antialias"
_threads = threading.local()


def arithmetic(settings: Settings) -> str:
    """The type in which resizing computes, part of every fingerprint: on a GPU torch has no kernel for uint8."""
    return "uint8" if settings.resize_on == "cpu" else "float32"


def squash(
    images: Sequence[np.ndarray] | np.ndarray, *, height_px: int, width_px: int, device: str | None = None
) -> np.ndarray:
    """Resize whole images to one size, whatever their shape: nothing is cropped, proportions are not kept.

    Bicubic and antialiased: within 1 step of 255 of Pillow's, at a tenth of its cost. Neighbours of the same size (the
    frames of one video) are resized together.

    Args:
        images: uint8, each of shape (H, W, 3), RGB; or one array of shape (N, H, W, 3).
        height_px: Height of the result.
        width_px: Width of the result.
        device: Where it is done, in float32; on the CPU in uint8 when unset.

    Returns:
        uint8, shape (N, height_px, width_px, 3).
    """
    groups = [np.stack(list(group)) for _, group in groupby(images, key=lambda image: image.shape)]
    resized = [resize(group, height_px, width_px, mode="bicubic", device=device) for group in groups]
    if not resized:
        return np.empty((0, height_px, width_px, 3), np.uint8)
    return resized[0] if len(resized) == 1 else np.concatenate(resized)


def resize(images: np.ndarray, height_px: int, width_px: int, *, mode: str, device: str | None) -> np.ndarray:
    """Resize images of one size, uint8 (N, H, W, 3), antialiased, to uint8 (N, height_px, width_px, 3).

    Args:
        images: The images.
        height_px: Height of the result.
        width_px: Width of the result.
        mode: bicubic or bilinear.
        device: As for `squash`.
    """
    if images.shape[1:3] == (height_px, width_px):
        return images
    small = _resized(images, height_px, width_px, mode, device)
    if small is not None:
        return small
    halves = np.array_split(images, 2)
    return np.concatenate([resize(half, height_px, width_px, mode=mode, device=device) for half in halves])


def _resized(images: np.ndarray, height_px: int, width_px: int, mode: str, device: str | None) -> np.ndarray | None:
    """The resized images; None where the device has no memory for so many at once, but perhaps for fewer."""
    import torch
    from torch.nn.functional import interpolate

    # NHWC seen as NCHW is torch's channels_last, for which the uint8 kernel is fastest.
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    try:
        with torch.inference_mode(), _own_stream(device):
            if device is None:
                small = interpolate(pixels, (height_px, width_px), mode=mode, antialias=True)
            else:
                small = pixels.to(device).float()
                # Across, then down, whole numbers of 0 to 255 in between, as the kernel for uint8 and Pillow do it: at
                # hard edges both at once would be up to 8 steps away.
                for size in ((images.shape[1], width_px), (height_px, width_px)):
                    small = interpolate(small, size, mode=mode, antialias=True).round_().clamp_(0, 255)
                small = small.to(torch.uint8)
            return np.ascontiguousarray(small.permute(0, 2, 3, 1).cpu().numpy())
    except torch.OutOfMemoryError:
        if len(images) == 1:
            raise
        return None


def _own_stream(device: str | None) -> AbstractContextManager[object]:
    """On a GPU, a stream of this thread's own: on the one that computes, resizing would wait for the pass before it."""
    if device is None or not device.startswith("cuda"):
        return nullcontext()
    import torch

    if not hasattr(_threads, "stream"):
        _threads.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call] # torch does not type it
    return torch.cuda.stream(_threads.stream)
