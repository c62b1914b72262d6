import ipaddress

import pytest

from extraction_dagster.errors.catalog import AddressForbiddenError, SchemeError
from extraction_dagster.stages.catalog.fetch.cache import PassingFaultError
from extraction_dagster.stages.catalog.fetch.guard import NetworkGuard, Target, is_public

PUBLIC = "93.184.215.14"


def guard(*hosts, addresses=(PUBLIC,), **options):
    return NetworkGuard(hosts or ("media.example.com",), resolve=lambda _host, _port: list(addresses), **options)


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0",  # noqa: S104 - an address to be refused
        "10.0.0.1",
        "100.64.0.1",
        "127.0.0.1",
        "127.255.255.254",
        "168.63.129.16",
        "169.254.169.254",
        "172.16.0.1",
        "172.31.255.255",
        "192.0.0.10",
        "192.0.0.170",
        "192.88.99.1",
        "192.168.1.1",
        "198.18.0.1",
        "224.0.0.1",
        "239.255.255.250",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "::7f00:1",
        "::ffff:127.0.0.1",
        "64:ff9b::10.0.0.1",
        "64:ff9b::169.254.169.254",
        "64:ff9b:1::8.8.8.8",
        "100::1",
        "2001::1",
        "2001:0:4136:e378:8000:63bf:3fff:fdd2",
        "2001:db8::1",
        "2002:7f00:1::1",
        "2002:0808:0808::1",
        "2600::5efe:10.0.0.1",
        "2600::200:5efe:192.168.0.1",
        "3fff::1",
        "fc00::1",
        "fd00:ec2::254",
        "fe80::1",
        "fec0::1",
        "ff02::1",
        "ff0e::1",
    ],
)
def test_what_is_not_the_public_internet_is_refused(address):
    assert not is_public(ipaddress.ip_address(address))
    with pytest.raises(AddressForbiddenError, match=r"which is not public\. Nothing was read from it") as raised:
        guard(addresses=(address,)).vet("https://media.example.com/a.mp4")
    assert raised.value.permanent


@pytest.mark.parametrize(
    "address", [PUBLIC, "8.8.8.8", "2606:2800:21f:cb07:6820:80da:af6b:8b2c", "64:ff9b::8.8.8.8", "::ffff:8.8.8.8"]
)
def test_public_addresses_are_let_through(address):
    target = guard(addresses=(address,)).vet("https://media.example.com/a.mp4")
    assert target.addresses == (address,)


def test_one_private_address_among_public_ones_is_enough_to_refuse():
    with pytest.raises(AddressForbiddenError, match=r"has the address 10\.0\.0\.5, which is not public"):
        guard(addresses=(PUBLIC, "10.0.0.5")).vet("https://media.example.com/a.mp4")


def test_a_private_network_is_let_through_where_it_was_allowed_by_name():
    inside = guard(addresses=("10.1.2.3",), networks=("10.1.0.0/16",))
    assert inside.vet("https://media.example.com/").addresses == ("10.1.2.3",)
    with pytest.raises(AddressForbiddenError, match=r"10\.2\.0\.1, which is not public"):
        guard(addresses=("10.2.0.1",), networks=("10.1.0.0/16",)).vet("https://media.example.com/")


def test_a_private_network_can_be_allowed_for_one_host_alone():
    networks = ("media.example.com=10.1.0.0/16", "*.cdn.example.com=10.3.0.0/16")
    hosts = ("media.example.com", "other.example.com", "*.cdn.example.com", "media.example.com:8443")

    def vet(url, address):
        return guard(*hosts, addresses=(address,), networks=networks).vet(url)

    assert vet("https://media.example.com/", "10.1.2.3").addresses == ("10.1.2.3",)
    assert vet("https://a.cdn.example.com/", "10.3.2.3").addresses == ("10.3.2.3",)
    for url, address in (
        ("https://other.example.com/", "10.1.2.3"),
        ("https://media.example.com/", "10.3.2.3"),
        ("https://media.example.com:8443/", "10.1.2.3"),  # another server than the one that was named
        ("https://a.cdn.example.com/", "10.1.2.3"),
    ):
        with pytest.raises(AddressForbiddenError, match="which is not public"):
            vet(url, address)


@pytest.mark.parametrize("host", ["a" * 300, "a." * 200 + "com", "é" * 300, "." * 500, "a." * 400_000])
def test_a_host_longer_than_a_name_can_be_is_none(host, least_seconds):
    def vet():
        with pytest.raises(AddressForbiddenError, match=r"names no server|no name"):
            guard("*.example.com").vet(f"https://{host}/")

    assert least_seconds(vet) < 1


def test_a_request_says_all_that_is_sent():
    url = "HTTPS://Media.Example.com./a b/ü.mp4?sig=x/y==&z=%20#part".replace(" ", "%20")
    assert guard().vet(url) == Target(
        url, "https", "media.example.com", 443, "/a%20b/%C3%BC.mp4?sig=x/y==&z=%20", (PUBLIC,)
    )


@pytest.mark.parametrize(
    ("entry", "host", "allowed"),
    [
        ("media.example.com", "media.example.com", True),
        ("media.example.com", "MEDIA.example.com.", True),
        ("media.example.com", "media.example.com:443", True),
        ("media.example.com", "media.example.com:8443", False),
        ("media.example.com", "media.example.com.evil.com", False),
        ("media.example.com", "evil-media.example.com", False),
        ("media.example.com", "a.media.example.com", False),
        ("media.example.com:8443", "media.example.com:8443", True),
        ("media.example.com:8443", "media.example.com", False),
        ("*.example.com", "a.b.example.com", True),
        ("*.example.com", "example.com", False),
        ("*.example.com", "badexample.com", False),
        ("xn--bcher-kva.example", "bücher.example", True),
        ("[2606:2800:21f::1]", "[2606:2800:21f::1]", True),
        ("media.example.com", "93.184.215.14", False),
        ("media.example.com", "0x5db8d70e", False),
        ("media.example.com", "1572395790", False),
        ("media.example.com", "0135.0270.0327.016", False),
    ],
)
def test_only_hosts_on_the_list_are_asked(entry, host, allowed):
    if allowed:
        assert guard(entry).vet(f"https://{host}/").addresses == (PUBLIC,)
    else:
        with pytest.raises(AddressForbiddenError, match=r"is not an allowed host.*EXTRACTION_ALLOWED_HOSTS"):
            guard(entry).vet(f"https://{host}/")


@pytest.mark.parametrize(
    "host", ["2130706433", "0x7f000001", "0177.0.0.1", "127.1", "0", "[::1]", "[::]", "[::ffff:127.0.0.1]", "localhost"]
)
def test_every_spelling_of_this_machine_is_judged_by_where_it_leads(host):
    with pytest.raises((AddressForbiddenError, PassingFaultError), match=r"which is not public|has no address"):
        NetworkGuard((host,)).vet(f"https://{host}/")


def test_half_a_surrogate_pair_is_no_address():
    with pytest.raises(AddressForbiddenError, match="it is no text"):
        guard().vet("https://media.example.com/\ud800.mp4")


def test_no_host_is_allowed_unless_it_is_listed():
    with pytest.raises(AddressForbiddenError, match=r"media\.example\.com is not an allowed host"):
        NetworkGuard(()).vet("https://media.example.com/")


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("https://me:canary-4711@media.example.com/", "it holds a user or a password"),
        ("https://evil.com\\@media.example.com/", "a backslash"),
        ("https://media.example.com/a\r\nHost: evil.com", "a control character"),
        ("https:///a.mp4", "it names no server"),
        ("https://media.example.com:99999/", "it names no server"),
        ("https://media.example.com:0/", "it names no server"),
        ("https://[::1/", "it names no server"),
        (f"https://{'a' * 70}.com/", "its host is no name"),
    ],
)
def test_addresses_made_to_confuse_are_refused(url, why):
    with pytest.raises(AddressForbiddenError, match=why) as raised:
        guard().vet(url)
    assert "canary" not in str(raised.value)


def test_http_needs_a_decision():
    with pytest.raises(AddressForbiddenError, match=r"it is not encrypted.*EXTRACTION_ALLOW_HTTP=true"):
        guard().vet("http://media.example.com/")
    target = guard(allow_http=True).vet("http://media.example.com/")
    assert (target.scheme, target.port) == ("http", 80)


def test_a_redirect_never_gives_up_encryption():
    open_guard = guard(allow_http=True)
    first = open_guard.vet("https://media.example.com/")
    with pytest.raises(
        AddressForbiddenError, match=r"redirects to 'http://media\.example\.com/\?…': that would give up"
    ):
        open_guard.vet("http://media.example.com/?sig=x", redirected_from=first, asked=first.url)


@pytest.mark.parametrize("url", ["ftp://media.example.com/", "file:///etc/passwd", "gopher://media.example.com/"])
def test_a_redirect_to_another_scheme_is_refused(url):
    first = guard().vet("https://media.example.com/")
    with pytest.raises((SchemeError, AddressForbiddenError), match=r"has scheme|names no server"):
        guard().vet(url, redirected_from=first, asked=first.url)


def test_a_name_that_is_not_known_now_may_be_later():
    def fail(_host, _port):
        raise OSError(-2, "Name or service not known")

    for unknown in (NetworkGuard(("a.example",), resolve=fail), guard("a.example", addresses=())):
        with pytest.raises(PassingFaultError, match="its host has no address now"):
            unknown.vet("https://a.example/v.mp4")
