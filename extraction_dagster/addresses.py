"""The address of a file: how it is shown, never with a password or a signature, and what tells it from another.

Addresses and texts are others', and as long as they like: each function here takes time in proportion to their length.
"""

from __future__ import annotations

import hashlib
import os.path
import re
import string
from urllib.parse import unquote

_REMOTE = re.compile(r"(?!file://)([A-Za-z][A-Za-z0-9+.-]*://)", re.IGNORECASE)
_PORT = re.compile(r":(\d*)$")
_MARK = "://"
_NO_LETTERS = string.digits + "+.-"  # in a scheme, but never its first
_SCHEME_LETTERS = string.ascii_letters + _NO_LETTERS
_ADDRESS_END = re.compile(r"[\s'\"<>]")
_HEAD, _TAIL = 200, 90  # characters of a long address that an error shows
_FILE = re.compile(r"file://(?:localhost)?(?=/)", re.IGNORECASE)
_BUCKETS = ("s3://", "gs://")
_BUCKET_USER = re.compile(r"^[^/@]*@")
_USER = re.compile(r"(?<=://)[^/?#@]*@")
# What a signed URL carries and the next one for the same file carries otherwise.
_SIGNATURE = re.compile(
    r"(?<=[?&])(?:X-Amz-[^=&#?]*|X-Goog-[^=&#?]*|AWSAccessKeyId|GoogleAccessId|Signature|Expires|Key-Pair-Id|Policy"
    r"|sig|se|st|ske|skt)=[^&#]*&?",
    re.IGNORECASE,
)


def shown_address(address: str) -> str:
    """An address without user, password, query and fragment; a path or `file://` URI stays as it is.

    A bucket's key is shown whole: in it, `?` and `#` are characters as others.

    Examples:
        `https://me:secret@host/a.mp4?sig=x` becomes `https://host/a.mp4?…`.
    """
    scheme = _REMOTE.match(address)
    if scheme is None:
        return address
    if scheme[1].lower() in _BUCKETS:
        return f"{scheme[1]}{_BUCKET_USER.sub('', _SIGNATURE.sub('…', address[scheme.end() :]))}"
    rest, *cut = re.split(r"[?#]", address[scheme.end() :], maxsplit=1)
    authority = re.split(r"[/\\]", rest, maxsplit=1)[0]
    # 'me:se/cret@host' has its password across the slash: its first part has a colon, and no port after it.
    if "@" in authority or ("@" in rest and ":" in authority and not _PORT.search(authority)):
        rest = rest.rpartition("@")[2]
    return f"{scheme[1]}{rest}{'?…' if cut else ''}"


def brief_address(address: str) -> str:
    """`shown_address`, without the middle of a long one."""
    shown = shown_address(address)
    return shown if len(shown) <= _HEAD + _TAIL else f"{shown[:_HEAD]}…{shown[-_TAIL:]}"


def capped(text: str, most: int) -> str:
    """A text cut to a length; an address that the cut goes through is left out, since half of it may be a password.

    Examples:
        Cut after `https://me:sec`, a text ends in `https://…`.
    """
    if len(text) <= most:
        return text
    text = text[:most]
    mark = text.rfind(_MARK)
    if mark >= 0 and _ADDRESS_END.search(text, mark) is None:
        token = max(text.rfind(end, 0, mark) for end in " \n\t\"'<>") + 1
        text = text[: text.find(_MARK, token) + len(_MARK)]
    return f"{text}…"


def scrubbed(text: str) -> str:
    """A text in which every address is shown without user, password, query and fragment.

    A second safeguard, for texts that many people read; messages use `shown_address` for their own addresses.

    Examples:
        `Can't open 'https://me:secret@host/a.mp4'` becomes `Can't open 'https://host/a.mp4'`.
    """
    parts, done, floor = list[str](), 0, 0
    while (mark := text.find(_MARK, floor)) >= 0:
        before = text[floor:mark]
        scheme = before[len(before.rstrip(_SCHEME_LETTERS)) :].lstrip(_NO_LETTERS)
        floor = mark + len(_MARK)
        if not scheme:
            continue
        found = _ADDRESS_END.search(text, floor)
        end = found.start() if found else len(text)
        if end > floor:
            parts += text[done : mark - len(scheme)], shown_address(text[mark - len(scheme) : end])
            done = floor = end
    return "".join([*parts, text[done:]])


def address_hash(address: str, root: str) -> str:
    """16 hex digits that name the file behind an address; empty for an empty address.

    A relative path is taken from the first root as it is configured, `file://` means a path, and of a remote address
    neither user nor signature count: a URL that is signed once more leads to the same file.

    Examples:
        `a.mp4` and `file:///videos/a.mp4` are one address where the first root is `/videos`.
    """
    if not address:
        return ""
    if address[:5].lower() in _BUCKETS:
        plain = _USER.sub("", address)  # a key may hold anything
    elif _REMOTE.match(address):
        plain = _SIGNATURE.sub("", _USER.sub("", address)).rstrip("?&")
    else:
        file = _FILE.match(address)
        path = unquote(address[file.end() :]) if file else address
        plain = os.path.normpath(path if path.startswith("/") else f"{root}/{path}")
    return hashlib.sha256(plain.encode("utf-8", "surrogatepass")).hexdigest()[:16]
