"""How the address of a file is shown in messages and payloads: never with a password or a signature."""

from __future__ import annotations

import re

_REMOTE = re.compile(r"(?!file://)([A-Za-z][A-Za-z0-9+.-]*://)", re.IGNORECASE)
_PORT = re.compile(r":(\d*)$")
_IN_TEXT = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>]+")


def shown_address(address: str) -> str:
    """An address without user, password, query and fragment; a path or `file://` URI stays as it is.

    Examples:
        `https://me:secret@host/a.mp4?sig=x` becomes `https://host/a.mp4?…`.
    """
    scheme = _REMOTE.match(address)
    if scheme is None:
        return address
    rest, *cut = re.split(r"[?#]", address[scheme.end() :], maxsplit=1)
    authority = re.split(r"[/\\]", rest, maxsplit=1)[0]
    # 'me:se/cret@host' has its password across the slash: its first part has a colon, and no port after it.
    if "@" in authority or ("@" in rest and ":" in authority and not _PORT.search(authority)):
        rest = rest.rpartition("@")[2]
    return f"{scheme[1]}{rest}{'?…' if cut else ''}"


def scrubbed(text: str) -> str:
    """A text in which every address is shown without user, password, query and fragment.

    A second safeguard, for texts that many people read; messages use `shown_address` for their own addresses.

    Examples:
        `Can't open 'https://me:secret@host/a.mp4'` becomes `Can't open 'https://host/a.mp4'`.
    """
    return _IN_TEXT.sub(lambda found: shown_address(found[0]), text)
