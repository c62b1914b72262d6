"""From a row to a local file that may be read.

A row's address comes from a table that others write: it is trusted with nothing. Links are followed first and judged
by where they end.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from extraction_dagster.errors import FileForbiddenError, FileUnavailableError, SchemeError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from extraction_dagster.records import VideoRow

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def fetch_local(row: VideoRow, roots: Sequence[Path]) -> Path:
    """The local file behind a row.

    Args:
        row: Its `uri` is a path or a `file://` URI; a relative path is taken from the first root.
        roots: Folders from which files may be read.

    Returns:
        Path: absolute, without links, inside one of the roots; a readable regular file with content.

    Raises:
        SchemeError: The address has another scheme.
        FileForbiddenError: The address leads out of the roots, or to what is no regular file.
        FileUnavailableError: The file is missing, empty or unreadable now.
    """
    allowed = ", ".join(str(root) for root in roots)
    resolved = _resolve(row.uri, roots, allowed)
    try:
        status = resolved.stat()
    except OSError as error:
        raise FileUnavailableError(row.uri, error.strerror or type(error).__name__) from error
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "no regular file")
        raise FileForbiddenError(row.uri, f"it is {kind}", roots=allowed)
    if status.st_size == 0:
        raise FileUnavailableError(row.uri, "it is empty")
    if not os.access(resolved, os.R_OK):
        raise FileUnavailableError(row.uri, "permission denied")
    return resolved


def _resolve(uri: str, roots: Sequence[Path], allowed: str) -> Path:
    if not uri:
        raise FileUnavailableError(uri, "the address is empty")
    path = _path_of(uri, allowed)
    if "\0" in path:
        raise FileForbiddenError(uri, "it holds a NUL byte", roots=allowed)
    if ".." in Path(path).parts:
        raise FileForbiddenError(uri, "it holds '..'", roots=allowed)
    try:
        resolved = (roots[0] / path).resolve()
        inside = any(resolved.is_relative_to(root.resolve()) for root in roots)
    except (OSError, RuntimeError) as error:  # a loop of links, a name that is too long
        raise FileForbiddenError(uri, str(error), roots=allowed) from error
    if not inside:
        raise FileForbiddenError(uri, "it leads out of the folders that may be read", roots=allowed)
    return resolved


def _path_of(uri: str, allowed: str) -> str:
    scheme = _SCHEME.match(uri)
    if scheme is None:
        return uri
    if scheme[1].lower() != "file":
        raise SchemeError(uri, scheme[1])
    parts = urlsplit(uri)
    if parts.netloc not in {"", "localhost"}:
        raise FileForbiddenError(uri, f"it names another machine ({parts.netloc})", roots=allowed)
    return unquote(parts.path)
