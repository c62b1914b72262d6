"""Models of the Hugging Face hub, each pinned to a commit and kept in the hub's own cache."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

from extraction_dagster.errors.embed import EmbeddingModelError, ModelFilesError, ModelLibraryError
from extraction_dagster.stages.embed.models.folder import (
    CONFIG,
    PREPROCESSORS,
    TOKENIZER_FILES,
    WEIGHTS,
    WEIGHTS_INDEX,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from extraction_dagster.stages.embed.models.folder import ModelFolder

SHOWN: Final = "organisation/name@commit of the hub, all 40 digits"
_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_FILES: Final = [CONFIG, *PREPROCESSORS, *TOKENIZER_FILES, WEIGHTS, WEIGHTS_INDEX, "model-*.safetensors", "*.py"]


def answers_for(name: str) -> bool:
    """Whether a name is a hub model's, pinned or not."""
    return _ID.fullmatch(name.partition("@")[0]) is not None


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
        raise EmbeddingModelError(name, why, SHOWN)


def fetched(name: str, look: Callable[[Path], ModelFolder]) -> ModelFolder:
    """A pinned model's files, looked through: out of the cache when they are there, else fetched.

    Raises:
        ModelLibraryError: huggingface_hub is not installed.
        ModelFilesError: The files can't be fetched, or are refused.
    """
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
    return Path(snapshot_download(repository, revision=commit, allow_patterns=_FILES, local_files_only=local_only))
