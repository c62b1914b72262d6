"""Models of transformers: CLIP, SigLIP, SigLIP 2 and DINOv2, out of a local folder or the Hugging Face hub.

Only safetensors are read, and no Python code of a model runs unless the model is named in `trust_remote_code`. A model
of the hub is pinned to a commit and kept in the hub's own cache. With the files there, nothing here needs a network.
"""

from __future__ import annotations

import re
import warnings
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from extraction_dagster.errors import ExtractionError
from extraction_dagster.errors.embed import EmbeddingModelError, ModelFilesError, ModelLibraryError
from extraction_dagster.stages.embed.models.folder import FILES, inspect_folder
from extraction_dagster.stages.embed.models.interface import EmbeddingModel, ModelFamily
from extraction_dagster.stages.embed.models.preprocess import AS_PROCESSOR, ProcessorPixels, arithmetic
from extraction_dagster.stages.embed.passes import normalise
from extraction_dagster.stages.embed.runtime import autocast, open_device, resize_device

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import numpy as np
    import torch

    from extraction_dagster.settings import Settings
    from extraction_dagster.stages.embed.models.folder import ModelFolder

_CHOOSE: Final = "Fetch the model's files again, or choose another model."
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}(@.*)?", re.DOTALL)
_HUB_NAMES: Final = "organisation/name@commit of the hub, all 40 digits"
_COMMIT = re.compile(r"[0-9a-f]{40}")


def is_folder(name: str) -> bool:
    """Whether a name is a folder's: it starts with /, ./, ../ or ~; any other is a hub model's."""
    return re.match(r"(/|\.{1,2}/|~)", name) is not None


def settings_identity(settings: Settings) -> dict[str, object]:
    """What changes the vectors, as far as can be told without opening a file.

    Raises:
        EmbeddingModelError: A hub model is not pinned.
    """
    if not is_folder(settings.model):
        check_pinned(settings.model)
    return {
        "model": str(_folder(settings)) if is_folder(settings.model) else settings.model,
        "pixels": f"{AS_PROCESSOR}-{arithmetic(settings)}",
        "feature": "pooled",
        "compute_dtype": settings.embed_dtype,
    }


def identity(settings: Settings) -> dict[str, object]:
    """What changes the vectors: a folder by the sha256 of its files, wherever it lies; a hub model by its commit.

    Raises:
        ModelFilesError: A folder's files are missing, damaged or refused.
    """
    if not is_folder(settings.model):  # the commit names every byte of the files
        return settings_identity(settings)
    return {**settings_identity(settings), "model": inspect(settings).sha256()}


def declared_dim(settings: Settings) -> int | None:
    """Length of the vectors as a folder's configuration says it; None for a hub model."""
    return inspect(settings).dim if is_folder(settings.model) else None


def inspect(settings: Settings) -> ModelFolder:
    """Look through the model's files; a hub model's are fetched first when they are not in the cache.

    Raises:
        ModelFilesError: They are missing, damaged or refused.
    """
    look = partial(inspect_folder, settings.model, trusted=settings.model in settings.trust_remote_code)
    return look(_folder(settings)) if is_folder(settings.model) else _fetched(settings.model, look)


def check_pinned(name: str) -> None:
    """Refuse a hub model without the commit: its owner could change what the name means.

    Raises:
        EmbeddingModelError: It is not pinned.
    """
    repository, _, commit = name.partition("@")
    if not _COMMIT.fullmatch(commit):
        got = f"{commit!r} is not a commit's 40 hexadecimal digits" if commit else "it names no commit"
        why = (
            f"{got}, and what a branch or tag means can change. Write {repository}@COMMIT with the 40 digits that the "
            f"hub shows under 'Files and versions', 'History'; a folder is written ./{repository}"
        )
        raise EmbeddingModelError(name, why, _HUB_NAMES)


def _fetched(name: str, look: Callable[[Path], ModelFolder]) -> ModelFolder:
    """A pinned model's files, looked through: out of the cache when they are there, else fetched."""
    check_pinned(name)
    try:
        return look(_snapshot(name, local_only=True))
    except (ModelFilesError, FileNotFoundError) as in_cache:
        try:
            path = _snapshot(name, local_only=False)
        except Exception as error:  # the client's own errors, the HTTP library's, the file system's
            if isinstance(in_cache, ModelFilesError):
                raise in_cache from error
            fix = (
                "Check the name and the network; a private model needs HF_TOKEN. Without a network, fetch it elsewhere "
                "and set EXTRACTION_MODEL to the folder."
            )
            got = f"nothing ({type(error).__name__})"
            raise ModelFilesError(name, "the hub", got, "its files, or a copy in the hub's cache", fix) from error
        return look(path)


def _snapshot(name: str, *, local_only: bool) -> Path:
    try:
        from huggingface_hub import snapshot_download  # noqa: PLC0415 - only a hub model needs it
    except ImportError as error:
        raise ModelLibraryError(name, "huggingface_hub", "transformers") from error
    repository, _, commit = name.partition("@")
    return Path(snapshot_download(repository, revision=commit, allow_patterns=FILES, local_files_only=local_only))


def _folder(settings: Settings) -> Path:
    return Path(settings.model).expanduser().absolute()


class TransformersModel(EmbeddingModel):
    """A model of transformers.

    Args:
        name: The model's name.
        network: In evaluation mode, on the device.
        pixels: What its processor does.
        where: device, fingerprint and dtype.

    Raises:
        ModelFilesError: Its vector of a plain picture is not finite, or has no length.
    """

    network: torch.nn.Module

    def __init__(self, name: str, network: torch.nn.Module, pixels: ProcessorPixels, **where: str) -> None:
        import torch

        super().__init__(name, network, device=where["device"], fingerprint=where["fingerprint"])
        self._torch, self._pixels, self._dtype = torch, pixels, where["dtype"]
        self._scale, self._offset = (
            torch.from_numpy(part).to(self.device)[None, :, None, None] for part in (pixels.scale, pixels.offset)
        )
        self.network_dim = self._try()

    def _try(self) -> int:
        """The length of its vectors, once two pictures have got sound ones."""
        import numpy as np  # noqa: PLC0415 - only where a model is loaded

        # A wide and a tall one: a model whose vectors for both come out, and alike in size, takes every frame.
        pictures = [np.full((64, 96, 3), 128, np.uint8), np.full((96, 64, 3), 64, np.uint8)]
        vectors = self.embed_prepared(self.prepare(pictures))
        if fault := next(filter(None, normalise(vectors)[1]), None):
            got = f"weights that give a plain picture a vector with {fault}, computed in {self._dtype}"
            fix = (
                _CHOOSE if self._dtype == "float32" else "Set EXTRACTION_EMBED_DTYPE=float32, or choose another model."
            )
            raise ModelFilesError(self.name, self.name, got, "finite values and a length above zero", fix)
        return int(vectors.shape[1])

    def prepare(self, images: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
        """Resize and crop to what the network takes, uint8 (N, h, w, 3); safe in any thread."""
        return self._pixels.prepare(images)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 (N, h, w, 3) on the device to (N, dim) there."""
        x = pixels.permute(0, 3, 1, 2).float().mul(self._scale).add_(self._offset)
        with autocast(self.device, self._dtype):
            return _features(self.network, "get_image_features", pixel_values=x)


class TransformersTextModel(TransformersModel):
    """A `TransformersModel` that puts texts beside images; `tokenize` makes texts into tokens."""

    def __init__(self, *args: Any, tokenize: Callable[[list[str]], Any], **where: Any) -> None:  # noqa: ANN401 - handed on
        super().__init__(*args, **where)
        self._tokenize = tokenize

    def embed_text(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors of texts, float32 (N, dim), not normalised; what is longer than the model reads is cut off."""
        with self._torch.inference_mode(), autocast(self.device, self._dtype):
            tokens = self._tokenize(list(texts)).to(self.device)
            vectors: np.ndarray[Any, Any] = _features(self.network, "get_text_features", **tokens).float().cpu().numpy()
            return vectors[:, : self.dim]


def load(settings: Settings, fingerprint: str) -> TransformersModel:
    """Load a model of transformers onto the configured device.

    Raises:
        ModelLibraryError: transformers is not installed.
        ModelFilesError: The files are missing, damaged, refused, or don't fit each other.
        EmbeddingDeviceError: The device is not there.
    """
    device = open_device(settings)
    _need_library(settings.model)
    folder = inspect(settings)
    where = {"device": device, "fingerprint": fingerprint, "dtype": settings.embed_dtype}
    options = {"trust_remote_code": settings.model in settings.trust_remote_code, "local_files_only": True}
    with _as_refusal(folder), _quiet():
        network = _read_network(folder, options).to(device)
        pixels = _read_pixels(folder, options, resize_device(settings, device))
        if not folder.has_text or not hasattr(network, "get_text_features"):
            return TransformersModel(settings.model, network, pixels, **where)
        tokenize = _Tokenize(folder, options)
        return TransformersTextModel(settings.model, network, pixels, tokenize=tokenize, **where)


class _Tokenize:
    """The model's tokenizer, padding as it was trained with; loaded when the first text comes."""

    def __init__(self, folder: ModelFolder, options: Mapping[str, Any]) -> None:
        text = folder.config["text_config"]
        self._is_siglip = "siglip" in folder.model_type
        # SigLIP saw every text padded to its full length; CLIP's padding is masked.
        self._padding = "max_length" if self._is_siglip else True
        self._length = int(text.get("max_position_embeddings", 64 if self._is_siglip else 77))
        self._folder, self._options = folder, options
        self._tokenizer: Any = None

    def __call__(self, texts: list[str]) -> Any:  # noqa: ANN401 - transformers' BatchEncoding
        import transformers

        if self._tokenizer is None:
            with _as_refusal(self._folder), _quiet():
                self._tokenizer = transformers.AutoTokenizer.from_pretrained(self._folder.path, **self._options)
        if self._is_siglip and "Gemma" in type(self._tokenizer).__name__:
            # SigLIP 2 learnt from lower case alone; the tokenizer that its files name, Gemma's, keeps capitals.
            texts = [text.lower() for text in texts]
        return self._tokenizer(
            texts, padding=self._padding, max_length=self._length, truncation=True, return_tensors="pt"
        )


def _read_network(folder: ModelFolder, options: Mapping[str, Any]) -> torch.nn.Module:
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder.path, **options)
    with torch.device("meta"):  # counts the parameters, takes no memory
        bare = transformers.AutoModel.from_config(config, trust_remote_code=options["trust_remote_code"])
    wanted = sum(parameter.numel() for parameter in bare.parameters())
    if wanted > folder.num_weights:
        got = f"weights with {folder.num_weights} numbers"
        raise ModelFilesError(folder.model, str(folder.path), got, f"{wanted}, as its config.json asks for", _CHOOSE)
    network, said = transformers.AutoModel.from_pretrained(
        folder.path, config=config, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **options
    )
    if lacking := sorted(said["missing_keys"]):  # transformers would fill them with random numbers
        got = f"weights without {len(lacking)} tensors, the first {lacking[0]}"
        raise ModelFilesError(folder.model, str(folder.path), got, "all of them", _CHOOSE)
    return network.eval().requires_grad_(requires_grad=False)  # type: ignore[no-any-return] # AutoModel is untyped


def _read_pixels(folder: ModelFolder, options: Mapping[str, Any], device: str | None) -> ProcessorPixels:
    import transformers

    processor = transformers.AutoImageProcessor.from_pretrained(folder.path, backend="pil", **options)
    return ProcessorPixels(processor, device)


def _features(network: Any, method: str, **inputs: torch.Tensor) -> torch.Tensor:  # noqa: ANN401 - any architecture
    """The vector by which the architecture compares: projected where it has texts, else the pooled one."""
    done = getattr(network, method)(**inputs) if hasattr(network, method) else network(**inputs)
    pooled: torch.Tensor = done.pooler_output if hasattr(done, "pooler_output") else done
    return pooled


def _need_library(model: str) -> None:
    try:
        import PIL  # noqa: F401, PLC0415 - transformers' processors need it
        import transformers  # noqa: F401 - for its presence
    except ImportError as error:
        raise ModelLibraryError(model, str(error.name), "transformers") from error


@contextmanager
def _as_refusal(folder: ModelFolder) -> Iterator[None]:
    """Whatever transformers raises over a model's files becomes the one clear line."""
    try:
        yield
    except ExtractionError:
        raise
    except Exception as error:  # transformers and torch name no family for what odd files raise
        said = " ".join(str(error).split())[:300]
        got = f"files that transformers can't use ({type(error).__name__}: {said})"
        raise ModelFilesError(folder.model, str(folder.path), got, "files that fit each other", _CHOOSE) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars and remarks; what matters is checked here and raised."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


FAMILY: Final = ModelFamily(
    shown=f"./folder or /folder, saved by transformers; {_HUB_NAMES}",
    answers_for=lambda name: is_folder(name) or _HUB_NAME.fullmatch(name) is not None,
    settings_identity=settings_identity,
    identity=identity,
    dim=declared_dim,
    load=load,
)
