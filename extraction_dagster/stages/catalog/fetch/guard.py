"""Which servers may be asked, and at which addresses.

An address in the table must not turn this project into a door to the network that it runs in. A host must be on the
list; every address that its name stands for must be public, or lie in a network that was allowed by name; and the
connection goes to an address judged here, so that a name that changes its mind in between gains nothing.
"""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, quote, urlsplit

from extraction_dagster.addresses import brief_address
from extraction_dagster.errors.catalog import AddressForbiddenError, SchemeError
from extraction_dagster.stages.catalog.fetch.cache import PassingFaultError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    _Network = ipaddress.IPv4Network | ipaddress.IPv6Network
    Refuse = Callable[[str, str], AddressForbiddenError]  # why, and how it is put right

_LONGEST_HOST = 253  # characters of a name, as DNS has it
_PORTS = {"https": 443, "http": 80}
_IN_A_PATH = "/%:@!$&'()*+,;=~-._"
# `ipaddress.is_global` differs between Python's releases and calls some of these global: the registries' own lists.
_SPECIAL_V4 = tuple(
    ipaddress.IPv4Network(network)
    for network in (
        "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24",
        "192.0.2.0/24", "192.31.196.0/24", "192.52.193.0/24", "192.88.99.0/24", "192.168.0.0/16", "192.175.48.0/24",
        "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4",
        "168.63.129.16/32",  # a cloud's own services, under an address that looks public
    )
)  # fmt: skip
_PUBLIC_V6 = ipaddress.IPv6Network("2000::/3")
_SPECIAL_V6 = tuple(
    ipaddress.IPv6Network(network)
    for network in ("2001::/23", "2001:db8::/32", "2002::/16", "2620:4f:8000::/48", "3fff::/20")
)
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_ISATAP = (0x00005EFE, 0x02005EFE)


@dataclass(frozen=True, slots=True)
class Target:
    """A request that may be made.

    Attributes:
        url: The address as it was asked for; may hold a signature: never print it.
        scheme: https, or http where that is allowed.
        host: The server's name in ASCII: what the certificate must be for.
        port: The server's port.
        path: Path and query as they are sent.
        addresses: Numeric addresses, all judged; nothing else may be connected to.
    """

    url: str
    scheme: str
    host: str
    port: int
    path: str
    addresses: tuple[str, ...]


def resolve_host(host: str, port: int) -> list[str]:
    """The numeric addresses that the system knows for a name."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether an address belongs to the public internet, and so does each IPv4 address inside it.

    Examples:
        `64:ff9b::a00:1` is 10.0.0.1 behind a translator, hence not public; `64:ff9b::808:808` is 8.8.8.8.
    """
    if isinstance(address, ipaddress.IPv4Address):
        return address.is_global and not address.is_multicast and not any(address in net for net in _SPECIAL_V4)
    number = int(address)
    last_four = ipaddress.IPv4Address(number & 0xFFFFFFFF)
    if address in _NAT64:
        return is_public(last_four)
    if number >> 32 & 0xFFFFFFFF in _ISATAP and not is_public(last_four):
        return False
    return address in _PUBLIC_V6 and address.is_global and not any(address in net for net in _SPECIAL_V6)


def is_text(address: str) -> bool:
    """Whether an address can be written down: half a surrogate pair can't."""
    try:
        address.encode()
    except UnicodeEncodeError:
        return False
    return True


class NetworkGuard:
    """Judges addresses before anything is sent to them.

    Args:
        hosts: `name`, `*.name` or `name:port`; without a port, the scheme's own.
        networks: Where besides the public internet an allowed host may lie: `10.1.0.0/16`, or `host=10.1.0.0/16` for
            that host alone, which is written as in `hosts`.
        allow_http: Whether http is allowed beside https.
        resolve: Gives the numeric addresses of a name.
    """

    def __init__(
        self,
        hosts: Sequence[str],
        *,
        networks: Sequence[str] = (),
        allow_http: bool = False,
        resolve: Callable[[str, int], Sequence[str]] = resolve_host,
    ) -> None:
        self._hosts = frozenset(hosts)
        named = [network.rpartition("=") for network in networks]
        self._networks = tuple((host, ipaddress.ip_network(network)) for host, _, network in named)
        self._allow_http = allow_http
        self._resolve = resolve

    def vet(self, url: str, *, redirected_from: Target | None = None, asked: str = "") -> Target:
        """Judge an address.

        Args:
            url: The address.
            redirected_from: The request whose answer led here.
            asked: The row's own address, when the answer to it led here.

        Raises:
            SchemeError: It is neither https nor http.
            AddressForbiddenError: It may not be read.
            PassingFaultError: Its host has no address now.
        """

        def refuse(why: str, fix: str) -> AddressForbiddenError:
            led = f"it redirects to {brief_address(url)!r}: " if redirected_from else ""
            return AddressForbiddenError(asked or url, led + why, fix)

        parts = _split(url, refuse)
        if parts.scheme == "http" and (redirected_from and redirected_from.scheme == "https"):
            raise refuse("that would give up encryption", "Correct the server.")
        if parts.scheme == "http" and not self._allow_http:
            raise refuse("it is not encrypted", "Use https://, or set EXTRACTION_ALLOW_HTTP=true if that is meant.")
        if parts.scheme not in _PORTS:
            raise SchemeError(url, parts.scheme)
        host = _ascii_host(parts, refuse)
        port = parts.port or _PORTS[parts.scheme]
        if not self._is_listed(host, port, parts.scheme):
            fix = "Correct the row, or add the host to EXTRACTION_ALLOWED_HOSTS."
            raise refuse(f"{_with_port(host, port, parts.scheme)} is not an allowed host", fix)
        path = quote(parts.path or "/", safe=_IN_A_PATH)
        query = f"?{quote(parts.query, safe=_IN_A_PATH + '?')}" if parts.query else ""
        networks = self._networks_of(host, port, parts.scheme)
        return Target(url, parts.scheme, host, port, path + query, self._addresses(host, port, networks, refuse))

    def _is_listed(self, host: str, port: int, scheme: str) -> bool:
        return not self._hosts.isdisjoint(_spellings(host, port, scheme))

    def _networks_of(self, host: str, port: int, scheme: str) -> list[_Network]:
        names = {"", *_spellings(host, port, scheme)}
        return [network for name, network in self._networks if name in names]

    def _addresses(self, host: str, port: int, networks: Sequence[_Network], refuse: Refuse) -> tuple[str, ...]:
        try:
            found = tuple(self._resolve(host.strip("[]"), port))
        except OSError as error:
            raise PassingFaultError(f"its host has no address now ({error.strerror or type(error).__name__})") from None
        except UnicodeError:
            raise refuse("its host is no name", "Correct the row.") from None
        for text in found:
            address = ipaddress.ip_address(text.partition("%")[0])
            address = getattr(address, "ipv4_mapped", None) or address
            if not is_public(address) and not any(address in network for network in networks):
                fix = "Correct the row; if the host is meant, add its network to EXTRACTION_ALLOWED_NETWORKS."
                raise refuse(f"{host} has the address {text}, which is not public", fix)
        if not found:
            raise PassingFaultError("its host has no address now")
        return found


def _split(url: str, refuse: Refuse) -> SplitResult:
    if any(character <= " " or character in "\x7f\\" for character in url):  # urlsplit would drop some in silence
        raise refuse("it holds a blank, a control character or a backslash", "Correct the row.")
    if not is_text(url):
        raise refuse("it is no text", "Correct the row.")
    try:
        parts = urlsplit(url)
        usable = bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable or len(parts.hostname or "") > _LONGEST_HOST:
        raise refuse("it names no server that could be asked", "Correct the row.")
    if "@" in parts.netloc:
        raise refuse("it holds a user or a password", "Correct the row; a signed query is the way to give a right.")
    return parts


def _ascii_host(parts: SplitResult, refuse: Refuse) -> str:
    host = (parts.hostname or "").rstrip(".")
    if ":" in host:
        return f"[{host}]"
    try:
        return host.encode("idna").decode().lower()
    except UnicodeError:
        raise refuse("its host is no name", "Correct the row.") from None


def _spellings(host: str, port: int, scheme: str) -> set[str]:
    """How a list may name a host: `a.b.c`, `*.b.c`, `*.c`, each with its port, or without where it is the scheme's."""
    labels = host.split(".")
    names = [host, *("*." + ".".join(labels[cut:]) for cut in range(1, len(labels)))]
    return {spelt for name in names for spelt in (_with_port(name, port, scheme), f"{name}:{port}")}


def _with_port(host: str, port: int, scheme: str) -> str:
    return host if port == _PORTS[scheme] else f"{host}:{port}"
