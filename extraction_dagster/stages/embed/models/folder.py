"""A folder with a transformers model, looked through before any of it is loaded; needs neither torch nor transformers.

What is refused here could run code (pickles, Python files and kernels that the configuration names), read files
elsewhere (links that lead out of the folder, weights and adapters beside those that were looked at), take all memory
(huge numbers, huge JSON), or make vectors of no meaning (weights that are missing or cut off).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, NoReturn

from extraction_dagster.errors.embed import ModelFilesError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

CONFIG: Final = "config.json"
WEIGHTS: Final = "model.safetensors"
WEIGHTS_INDEX: Final = "model.safetensors.index.json"
PREPROCESSORS: Final = ("preprocessor_config.json", "processor_config.json")
TOKENIZER_FILES: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "tokenizer.model",
)
# Every file that may be read of a model.
FILES: Final = [CONFIG, *PREPROCESSORS, *TOKENIZER_FILES, WEIGHTS, WEIGHTS_INDEX, "model-*.safetensors", "*.py"]
# transformers' names for the architectures whose vectors are known to be good for search.
MODEL_TYPES: Final = ("clip", "siglip", "dinov2", "dinov2_with_registers")
# Nothing of these but their tokens is read, and that by the tokenizers' library; a big one would take a lot of memory.
_VOCABULARIES: Final = ("tokenizer.json", "vocab.json")
_ADAPTER: Final = "adapter_config.json"
_PICKLES = re.compile(r".*\.(bin|pt|pth|ckpt|pkl|pickle|msgpack|h5)")
_SHARD = re.compile(r"[A-Za-z0-9][\w.-]*\.safetensors")
_LAYERS = "num_hidden_layers"
_MOST_LAYERS = 1024
_LARGEST_NUMBER = 2**24
_MOST_JSON_BYTES = 4 * 2**20
_MOST_TOKENIZER_JSON_BYTES = 16 * 2**20
_MOST_VOCABULARY_BYTES = 256 * 2**20
# The tensor whose first side is the length of a vector.
_OUTPUTS: Final = {
    "clip": "visual_projection.weight",
    "siglip": "vision_model.embeddings.patch_embedding.weight",
    "dinov2": "embeddings.patch_embeddings.projection.weight",
    "dinov2_with_registers": "embeddings.patch_embeddings.projection.weight",
}
_PROJECTED: Final = {"clip": ("", "projection_dim", 512), "siglip": ("vision_config", "hidden_size", 768)}
_CODE: Final = {"auto_map", "custom_pipelines"}
_ATTENTION: Final = {"attn_implementation", "_attn_implementation"}
# transformers would read weights from another file than is looked at; compute in another type than was set; fetch
# kernels, which are code, from the hub, if the package for that is there.
_ELSEWHERE: Final = {"transformers_weights", "quantization_config", *_ATTENTION}
_OWN_ATTENTION: Final = {"eager", "sdpa"}
# A safetensors file is: length of the header (8 bytes), header (JSON), tensors.
_MOST_HEADER_BYTES: Final = 64 * 2**20
_LENGTH_BYTES: Final = 8


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A folder that was looked through.

    Attributes:
        model: The model's name, as it was set.
        path: The folder.
        config: Its config.json.
        files: Every file that is read of it, by name.
        num_weights: Numbers in its weights.
    """

    model: str
    path: Path
    config: Mapping[str, Any]
    files: Mapping[str, Path]
    num_weights: int

    @property
    def model_type(self) -> str:
        """The architecture, by transformers' name for it."""
        return str(self.config.get("model_type"))

    @property
    def dim(self) -> int | None:
        """Length of its vectors, as the configuration says; None for an architecture that is not known."""
        if self.model_type not in MODEL_TYPES:
            return None
        return int(self.declared_dim[1])

    @property
    def declared_dim(self) -> tuple[str, Any]:
        """Where a known architecture's configuration says how long its vectors are, and what it says."""
        part, name, default = _PROJECTED.get(self.model_type, ("", "hidden_size", 768))
        inner = self.config.get(part, {}) if part else self.config
        return name, inner.get(name, default)

    @property
    def has_text(self) -> bool:
        """Whether it has a text tower and the tokenizer for it."""
        return "text_config" in self.config and bool(self.files.keys() & set(TOKENIZER_FILES))

    def sha256(self) -> dict[str, str]:
        """The sha256 of each file."""
        return {name: sha256_of(path) for name, path in sorted(self.files.items())}


def inspect_folder(model: str, path: Path, *, trusted: bool = False) -> ModelFolder:
    """Look a folder through.

    Args:
        model: What to call the model in an error.
        path: The folder.
        trusted: Its own Python code may run, and its architecture need not be one that is known.

    Raises:
        ModelFilesError: Something is missing, damaged or refused.
    """
    if not path.is_dir():
        raise ModelFilesError(model, str(path), "no such folder", "a folder saved by transformers", _CHECK_PATH)
    return _Inspection(model, path, trusted=trusted).result()


_CHECK_PATH = "Correct EXTRACTION_MODEL; a relative folder is written ./folder."
_FETCH_AGAIN = "Fetch the model's files again, whole."
_CONVERT = (
    "Save it as safetensors, on a machine where its pickle may run: "
    "AutoModel.from_pretrained(FOLDER).save_pretrained(FOLDER)."
)
_MERGE = "Merge it into the weights (merge_and_unload() of peft), or take it away."


class _Inspection:
    """One look through a folder; every refusal names the file."""

    def __init__(self, model: str, path: Path, *, trusted: bool) -> None:
        self.model, self.path, self.trusted = model, path, trusted
        # A snapshot in the hub's cache is a folder of links: snapshots/<commit>/config.json -> ../../blobs/<hash>.
        cached = path.parent.name == "snapshots" and (path.parent.parent / "blobs").is_dir()
        self.roots = (path.resolve(), *([(path.parent.parent / "blobs").resolve()] if cached else []))

    def result(self) -> ModelFolder:
        config = self.read_json(self.need(CONFIG, "config.json, as transformers saves it"))
        self.check_architecture(config)
        files = {CONFIG: self.path / CONFIG}
        files |= {name: self.vetted(self.path / name) for name in PREPROCESSORS if self.there(name)}
        if len(files) == 1:
            self.refuse(PREPROCESSORS[0], "no such file", "the sizes and means that the model was trained with")
        files |= {name: self.vetted(self.path / name) for name in TOKENIZER_FILES if self.there(name)}
        for name, path in files.items():
            self.check_text_file(name, path)
        if self.there(_ADAPTER):
            self.refuse(_ADAPTER, "an adapter, which changes the weights", "weights alone", _MERGE)
        if self.trusted:
            code = sorted(self.path.rglob("*.py"))
            files |= {path.relative_to(self.path).as_posix(): self.vetted(path) for path in code}
        weights = self.weights()
        shapes = {
            name: shape
            for file, path in weights.items()
            if file != WEIGHTS_INDEX
            for name, shape in self.shapes(path).items()
        }
        folder = ModelFolder(self.model, self.path, config, files | weights, sum(map(math.prod, shapes.values())))
        self.check_dim(folder, shapes)
        return folder

    def refuse(self, name: str, got: str, expected: str, fix: str = _FETCH_AGAIN) -> NoReturn:
        raise ModelFilesError(self.model, str(self.path / name), got, expected, fix)

    def there(self, name: str) -> bool:
        return (self.path / name).is_symlink() or (self.path / name).exists()

    def need(self, name: str, expected: str) -> Path:
        if not self.there(name):
            self.refuse(name, "no such file", expected)
        return self.vetted(self.path / name)

    def vetted(self, path: Path) -> Path:
        """A regular file that lies in the folder, links followed."""
        target = path.resolve()
        if not any(target.is_relative_to(root) for root in self.roots):
            self.refuse(path.name, "a link that leads out of the folder", "a file in it", "Copy the file itself there.")
        if not target.is_file():
            self.refuse(path.name, "no regular file", "a file")
        return path

    def read_json(self, path: Path, most_bytes: int = _MOST_JSON_BYTES) -> dict[str, Any]:
        size = path.stat().st_size
        if size > most_bytes:
            self.refuse(path.name, f"{size} bytes", f"at most {most_bytes}")
        try:
            value = json.loads(path.read_text("utf-8"))
        except (ValueError, RecursionError, OSError) as error:
            self.refuse(path.name, f"no JSON ({type(error).__name__})", "a JSON object")
        if not isinstance(value, dict):
            self.refuse(path.name, f"JSON of type {type(value).__name__}", "a JSON object")
        return value

    def check_architecture(self, config: Mapping[str, Any]) -> None:
        kind = config.get("model_type")
        if not self.trusted and kind not in MODEL_TYPES and not _code_names(config):
            fixed = " (SigLIP 2 at a fixed resolution has the type siglip)" if kind == "siglip2" else ""
            self.refuse(
                CONFIG, f"model_type {kind!r}", f"one of {', '.join(MODEL_TYPES)}{fixed}", "Choose another model."
            )
        for name, value in _leaves(config):
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                continue
            most = _MOST_LAYERS if name == _LAYERS else _LARGEST_NUMBER
            if not -most <= value <= most:
                self.refuse(CONFIG, f"{name} {str(value)[:20]}", f"at most {most}")
        if asked := _asks_elsewhere(config):
            expected = f"plain weights in {WEIGHTS} and torch's own attention"
            self.refuse(CONFIG, f"{asked[0]} {asked[1]!r}", expected, f"Take {asked[0]} out, or choose another model.")
        for part in ("vision_config", "text_config"):
            if not isinstance(config.get(part, {}), dict):
                self.refuse(CONFIG, f"{part} of type {type(config[part]).__name__}", "a JSON object")

    def check_text_file(self, name: str, path: Path) -> None:
        if not name.endswith(".json") or name in _VOCABULARIES:
            if path.stat().st_size > _MOST_VOCABULARY_BYTES:
                self.refuse(name, f"{path.stat().st_size} bytes", f"at most {_MOST_VOCABULARY_BYTES}")
            return
        most = _MOST_TOKENIZER_JSON_BYTES if name in TOKENIZER_FILES else _MOST_JSON_BYTES
        code = _code_names(self.read_json(path, most))
        if code and not self.trusted:
            fix = f"Read that code; to let it run, set EXTRACTION_TRUST_REMOTE_CODE={self.model}."
            own = f"Python code of the model's own ({code[:200]})"
            self.refuse(name, own, "an architecture of transformers itself", fix)
        if "--" in code:  # organisation/name--module.Class
            fix = f"Put those files into the folder, and name them in {name} without the part before '--'."
            self.refuse(name, f"Python code of another repository ({code[:200]})", "code that lies in the folder", fix)

    def weights(self) -> dict[str, Path]:
        if self.there(WEIGHTS):
            return {WEIGHTS: self.vetted(self.path / WEIGHTS)}
        if not self.there(WEIGHTS_INDEX):
            pickles = sorted(path.name for path in self.path.iterdir() if _PICKLES.fullmatch(path.name))
            if pickles:
                self.refuse(pickles[0], "a pickle, which can run code when it is read", WEIGHTS, _CONVERT)
            self.refuse(WEIGHTS, "no such file", "the model's weights as safetensors")
        index = self.read_json(self.vetted(self.path / WEIGHTS_INDEX))
        parts = index.get("weight_map")
        names = list(parts.values()) if isinstance(parts, dict) else []
        if not names or not all(isinstance(name, str) and _SHARD.fullmatch(name) for name in names):
            expected = "weight_map, with plain names of safetensors files"
            self.refuse(WEIGHTS_INDEX, "no map of tensors to files", expected)
        shards = {name: self.need(name, f"the part that {WEIGHTS_INDEX} names") for name in sorted(set(names))}
        return {WEIGHTS_INDEX: self.path / WEIGHTS_INDEX, **shards}

    def shapes(self, path: Path) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor in a safetensors file, by name."""
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(_LENGTH_BYTES)
            length = struct.unpack("<Q", start)[0] if len(start) == _LENGTH_BYTES else 0
            if not len("{}") <= length <= min(size - _LENGTH_BYTES, _MOST_HEADER_BYTES):
                self.refuse(path.name, f"a header of {length} bytes in a file of {size}", "a safetensors file")
            header = file.read(length)
        try:
            tensors = {name: part for name, part in json.loads(header).items() if name != "__metadata__"}
            end = max((_whole(part["data_offsets"])[1] for part in tensors.values()), default=0)
            shapes = {name: _whole(part["shape"]) for name, part in tensors.items()}
        except (ValueError, RecursionError, AttributeError, KeyError, TypeError, IndexError) as error:
            self.refuse(path.name, f"no readable header ({type(error).__name__})", "a safetensors file")
        if end != size - _LENGTH_BYTES - length:
            self.refuse(path.name, f"{size} bytes", f"{end + _LENGTH_BYTES + length}, as its header says")
        return shapes

    def check_dim(self, folder: ModelFolder, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """The tensor that makes vectors makes them as long as the configuration says."""
        last = _OUTPUTS.get(folder.model_type)
        if last is None:
            return
        said, dim = folder.declared_dim
        if type(dim) is not int:
            self.refuse(CONFIG, f"{said} {dim!r}", "a whole number")
        for name, shape in shapes.items():
            if name.endswith(last) and shape[:1] != (dim,):
                self.refuse(CONFIG, f"vectors of {dim} numbers", f"{(*shape, 'none')[0]}, as {name} in the weights has")


def sha256_of(path: Path) -> str:
    """The sha256 of a file; read again only when its size or its time has changed."""
    found = path.stat()
    return _sha256(path, found.st_size, found.st_mtime_ns)


@lru_cache(maxsize=256)
def _sha256(path: Path, size: int, mtime_ns: int) -> str:  # noqa: ARG001 - a changed file is hashed again
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _code_names(described: Mapping[str, Any]) -> str:
    """The Python code that a file asks for; empty for none."""
    return ", ".join(str(value) for name, value in _leaves(described) if name in _CODE)


def _asks_elsewhere(config: Mapping[str, Any]) -> tuple[str, object] | None:
    """The first thing in a configuration that would have more read, or run, than the folder's plain weights."""
    for name, value in _leaves(config):
        own = name in _ATTENTION and isinstance(value, str) and value in _OWN_ATTENTION
        if name in _ELSEWHERE and value is not None and not own:
            return name, value
    return None


def _leaves(described: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    """Every value with its name, in order; what is asked for stays whole."""
    # A list instead of recursion: a hostile file may be nested deeper than Python's stack.
    waiting: list[tuple[str, object]] = [("", described)]
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, dict) and name not in _CODE | _ELSEWHERE:
            waiting += reversed(value.items())
        elif isinstance(value, list):
            waiting += [(name, part) for part in reversed(value)]
        else:
            yield name, value


def _whole(numbers: list[int]) -> tuple[int, ...]:
    if not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise ValueError(numbers)
    return tuple(numbers)
