"""Images of any size made into the pixels that a network takes: squashed, or as a transformers processor does it."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from itertools import groupby
from typing import TYPE_CHECKING, Any, Final

from extraction_dagster.late import np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from extraction_dagster.settings import Settings

# What `squash` and `ProcessorPixels.prepare` do; part of every fingerprint, so change them whenever the pixels change.
SQUASH: Final = "squash-bicubic-antialias"
AS_PROCESSOR: Final = "as-processor"
# Pillow's numbers for the filters that torch's uint8 kernel has too.
_FILTERS: Final = {2: "bilinear", 3: "bicubic"}
_MOST_SIDE_PX: Final = 4096
_STEPS: Final = ("preprocess", "_preprocess_image_like_inputs", "_preprocess", "resize", "center_crop")
_AS_ARRAYS: Final = {"input_data_format": "channels_last", "return_tensors": "np"}
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
    none = np.empty((0, height_px, width_px, 3), np.uint8)
    return _by_size(images, lambda same: resize(same, height_px, width_px, mode="bicubic", device=device), none=none)


def _by_size(
    images: Sequence[np.ndarray] | np.ndarray, work: Callable[[np.ndarray], np.ndarray], *, none: np.ndarray
) -> np.ndarray:
    """Work on neighbours of one size together; gives `none` when there are no images."""
    done = [work(np.stack(list(same))) for _, same in groupby(images, key=lambda image: image.shape)]
    return np.concatenate(done) if len(done) > 1 else (*done, none)[0]


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


class ProcessorPixels:
    """What a processor does to an image, split in two: resizing and cropping in uint8 here, the rest on the device.

    Where the processor's steps are transformers' common ones, torch's uint8 kernel takes the place of Pillow's: within
    1 step of 255 (2 in a pixel of ten thousand, at hard edges), at a tenth of the cost. Any other processor does the
    resizing itself.

    Args:
        processor: An image processor of transformers.
        device: Where images are resized, in float32; on the CPU in uint8 when unset.

    Raises:
        ValueError: Its images don't have one size, or its numbers are out of bounds.

    Attributes:
        scale: With `offset`, what a pixel of each channel becomes: `pixel * scale + offset`.
        offset: See `scale`.
        fast: Whether torch's kernel does the resizing.
    """

    def __init__(self, processor: Any, device: str | None = None) -> None:  # noqa: ANN401 - they share no typed base
        self._processor, self._device = processor, device
        factor = float(processor.rescale_factor) if processor.do_rescale else 1.0
        mean = np.array(processor.image_mean if processor.do_normalize else (0.0,), np.float64)
        std = np.array(processor.image_std if processor.do_normalize else (1.0,), np.float64)
        self.scale = np.broadcast_to(factor / std, 3).astype(np.float32)
        self.offset = np.broadcast_to(-mean / std, 3).astype(np.float32)
        if not (np.isfinite(self.scale).all() and np.isfinite(self.offset).all()):
            message = f"image_mean {mean.tolist()} and image_std {std.tolist()}"
            raise ValueError(message)
        self._edge_px = _positive(processor.size, "shortest_edge") if processor.do_resize else None
        self._crop_px = _pair(processor.crop_size) if getattr(processor, "do_center_crop", None) else None
        self._size_px = _pair(processor.size) if processor.do_resize else None
        self.fast = self._steps_are_known() and self._agrees(fast=True)
        if not self.fast and not self._agrees(fast=False):
            message = f"{type(processor).__name__} does more than resize, crop, rescale and normalize"
            raise ValueError(message)

    def prepare(self, images: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
        """Resize and crop uint8 (H, W, 3) RGB images to uint8 (N, h, w, 3); safe in any thread."""
        none = np.empty((0, 1, 1, 3), np.uint8)
        return _by_size(images, lambda same: self._ready(same, fast=self.fast), none=none)

    def _ready(self, images: np.ndarray, *, fast: bool) -> np.ndarray:
        return self._resize_and_crop(images) if fast else self._by_processor(images)

    def _agrees(self, *, fast: bool) -> bool:
        """Whether a picture comes out as the whole processor makes it, within 2 steps of 255."""
        image = np.random.default_rng(0).integers(0, 256, (1, 5, 7, 3), np.uint8).repeat(24, 1).repeat(24, 2)
        whole = self._processor(images=list(image), **_AS_ARRAYS)
        expected = np.asarray(whole["pixel_values"], np.float64).transpose(0, 2, 3, 1)
        got = self._ready(image, fast=fast) * self.scale.astype(np.float64) + self.offset
        return got.shape == expected.shape and bool((np.abs(got - expected) <= 2.01 * np.abs(self.scale)).all())

    def _steps_are_known(self) -> bool:
        from transformers.image_processing_backends import PilBackend, TorchvisionBackend

        processor, kind = self._processor, type(self._processor)
        own = any(
            getattr(kind, step, None) not in {getattr(PilBackend, step, None), getattr(TorchvisionBackend, step, None)}
            for step in _STEPS
        )
        if own or getattr(processor, "do_pad", None) or int(processor.resample or 2) not in _FILTERS:
            return False
        if self._edge_px is None:
            return self._size_px is not None and self._crop_px is None
        # A crop that is larger than the resized image would be padded.
        return self._crop_px is not None and max(self._crop_px) <= self._edge_px and processor.size.longest_edge is None

    def _resize_and_crop(self, images: np.ndarray) -> np.ndarray:
        height, width = self._resized_px(*images.shape[1:3])
        how = _FILTERS[int(self._processor.resample or 2)]
        images = resize(images, height, width, mode=how, device=self._device)
        if self._crop_px is not None:
            top, left = (height - self._crop_px[0]) // 2, (width - self._crop_px[1]) // 2
            images = images[:, top : top + self._crop_px[0], left : left + self._crop_px[1]]
        return np.ascontiguousarray(images)

    def _resized_px(self, height: int, width: int) -> tuple[int, int]:
        """With the shortest edge 224, 720x1280 becomes 224x398: the long side is rounded down."""
        if self._edge_px is None:
            return self._size_px or (height, width)
        short, long = min(height, width), max(height, width)
        longer = int(self._edge_px * long / short)
        return (self._edge_px, longer) if height <= width else (longer, self._edge_px)

    def _by_processor(self, images: np.ndarray) -> np.ndarray:
        done = self._processor(images=list(images), do_rescale=False, do_normalize=False, **_AS_ARRAYS)
        pixels: np.ndarray[Any, Any] = np.asarray(done["pixel_values"])
        if pixels.ndim != 4 or pixels.shape[1] != 3 or pixels.dtype != np.uint8:  # noqa: PLR2004 - NCHW
            message = f"pixels {pixels.dtype} {pixels.shape} from {type(self._processor).__name__}"
            raise ValueError(message)
        return np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))


def _positive(size: Any, name: str) -> int | None:  # noqa: ANN401 - as above
    value = getattr(size, name, None)
    if value is None:
        return None
    if not 1 <= int(value) <= _MOST_SIDE_PX:
        message = f"{name} of {value} px"
        raise ValueError(message)
    return int(value)


def _pair(size: Any) -> tuple[int, int] | None:  # noqa: ANN401 - as above
    height, width = _positive(size, "height"), _positive(size, "width")
    return None if height is None or width is None else (height, width)
