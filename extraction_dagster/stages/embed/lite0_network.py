"""EfficientNet-Lite0 as a network for inference: BatchNorm folded into the convolutions.

Imports torch at its top: nothing imports this module before a model is loaded.

Source:
    The layers and TensorFlow's SAME padding of `efficientnet_lite_pytorch`, whose checkpoint this loads; a test holds
    the two networks' features equal.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch  # noqa: TID253 - imported lazily as a whole, see above
from torch import nn  # noqa: TID253 - as above
from torch.nn import functional as fn  # noqa: TID253 - as above

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

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


class SameConv(nn.Conv2d):
    """A convolution with a bias and TensorFlow's SAME padding, for even input sizes where the stride is 2.

    At stride 2, SAME pads one pixel more at the end than at the start, which a torch convolution can't do, and padding
    apart from it costs a copy of the largest activations. So it pads both sides alike, two more than SAME does at the
    start: that adds one leading row and column to the output, which are cut off. Kernel 3 over four pixels abcd:

        SAME pads 0 and 1    abcd_         windows abc cd_
        here 2 and 2         __abcd__      windows __a abc cd_    the first is cut off
    """

    def __init__(self, inputs: int, outputs: int, *, kernel: int = 1, stride: int = 1, groups: int = 1) -> None:
        """Lay out the weights, unset."""
        padding = kernel // 2 if stride == 1 else (kernel - 2) // 2 + 2
        super().__init__(inputs, outputs, kernel, stride, padding, groups=groups, device="meta")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Float (N, inputs, H, W) to (N, outputs, H / stride, W / stride)."""
        y: torch.Tensor = super().forward(x)
        return y if self.stride == (1, 1) else y[:, :, 1:, 1:]


class _Block(nn.Module):
    """Expand, filter each channel, project; add the input where the shape is kept."""

    def __init__(self, inputs: int, outputs: int, *, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = inputs * expansion
        self.expand = SameConv(inputs, inner) if expansion > 1 else None
        self.depthwise = SameConv(inner, inner, kernel=kernel, stride=stride, groups=inner)
        self.project = SameConv(inner, outputs)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = x if self.expand is None else fn.relu6(self.expand(x), inplace=True)
        y = self.project(fn.relu6(self.depthwise(y), inplace=True))
        return y.add_(x) if self.residual else y


class Lite0(nn.Module):
    """The network up to its pooled features; the checkpoint's ImageNet classifier is left out."""

    def __init__(self) -> None:
        """Lay out the layers, weights unset."""
        super().__init__()
        self.stem = SameConv(3, _STEM_CHANNELS, kernel=3, stride=2)
        self.blocks = nn.ModuleList(_blocks())
        self.head = SameConv(_STAGES[-1][-1], NUM_FEATURES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Float32 (N, 3, 224, 224) of (pixel - 127) / 128, channels_last, to features (N, 1280)."""
        x = fn.relu6(self.stem(x), inplace=True)
        for block in self.blocks:
            x = block(x)
        return fn.relu6(self.head(x), inplace=True).mean((2, 3))

    def named_convolutions(self) -> Iterator[tuple[SameConv, str, str]]:
        """Each convolution with the checkpoint's name for it and for the BatchNorm behind it."""
        yield self.stem, "_conv_stem", "_bn0"
        for n, block in enumerate(self.blocks):
            for layer, conv, norm in (
                (block.expand, "_expand_conv", "_bn0"),
                (block.depthwise, "_depthwise_conv", "_bn1"),
                (block.project, "_project_conv", "_bn2"),
            ):
                if isinstance(layer, SameConv):
                    yield layer, f"_blocks.{n}.{conv}", f"_blocks.{n}.{norm}"
        yield self.head, "_conv_head", "_bn1"


def _blocks() -> Iterator[_Block]:
    inputs = _STEM_CHANNELS
    for blocks, kernel, stride, expansion, outputs in _STAGES:
        for n in range(blocks):
            yield _Block(inputs, outputs, kernel=kernel, stride=1 if n else stride, expansion=expansion)
            inputs = outputs


def checkpoint_shapes(network: Lite0) -> dict[str, tuple[int, ...]]:
    """Every tensor that the checkpoint must hold, with its shape: no more and no fewer."""
    shapes: dict[str, tuple[int, ...]] = {"_fc.weight": (1000, NUM_FEATURES), "_fc.bias": (1000,)}
    for layer, conv, norm in network.named_convolutions():
        shapes[f"{conv}.weight"] = tuple(layer.weight.shape)
        for name in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{norm}.{name}"] = (layer.out_channels,)
        shapes[f"{norm}.num_batches_tracked"] = ()
    return shapes


def fold(network: Lite0, state: Mapping[str, torch.Tensor]) -> Lite0:
    """Set the network's weights from the checkpoint's, each BatchNorm folded into its convolution, in float64."""
    for layer, conv, norm in network.named_convolutions():
        scale, shift, mean, variance = (
            state[f"{norm}.{name}"].double() for name in ("weight", "bias", "running_mean", "running_var")
        )
        scale = scale / torch.sqrt(variance + BN_EPSILON)
        weight = state[f"{conv}.weight"].double() * scale[:, None, None, None]
        layer.weight = nn.Parameter(weight.float().contiguous(memory_format=torch.channels_last), requires_grad=False)
        layer.bias = nn.Parameter((shift - mean * scale).float(), requires_grad=False)
    return network.eval()
