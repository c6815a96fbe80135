"""Where this service may connect to on somebody else's word.

A URL that a client names is judged twice. `admit_url` reads its text when it is
submitted and again before each request: scheme, port, spelling, address
literals. What counts is judged at the moment of the connection, in
`utils.pinned`: the addresses of its host.

Refused are the ranges of the IANA special-purpose registries (RFC 6890) and what
clouds put beside them. IPv6 is refused by default: only `2000::/3` is unicast
that IANA has given out (RFC 4291 section 2.4), so a new or forgotten range is
closed rather than open. Nothing here asks `ipaddress` whether an address is
global: its answers change between patch releases of Python.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import NamedTuple, Self

from pydantic import HttpUrl, TypeAdapter, ValidationError

from app.core import config

IPAddress = IPv4Address | IPv6Address
IPNetwork = IPv4Network | IPv6Network

URL_LIMIT = 2048
"""Characters of a URL, before and after it is normalised."""
PORTS = frozenset({443, 8443})

_DENIED_V4 = tuple(
    IPv4Network(text)
    for text in (
        "0.0.0.0/8",  # this network
        "10.0.0.0/8",
        "100.64.0.0/10",  # carrier-grade NAT; also Alibaba's metadata, 100.100.100.200
        "127.0.0.0/8",
        "168.63.129.16/32",  # Azure's host agent: a public address that answers from the inside
        "169.254.0.0/16",  # link-local: the metadata of most clouds
        "172.16.0.0/12",
        "192.0.0.0/24",  # IETF protocol assignments; also Oracle's metadata
        "192.0.2.0/24",  # documentation
        "192.31.196.0/24",  # AS112
        "192.52.193.0/24",  # automatic multicast tunnelling
        "192.88.99.0/24",  # 6to4 relays
        "192.168.0.0/16",
        "192.175.48.0/24",  # AS112
        "198.18.0.0/15",  # benchmarking
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, and the broadcast address
    )
)
_ALLOWED_V6 = IPv6Network("2000::/3")
_DENIED_V6 = tuple(
    IPv6Network(text)
    for text in (
        "2001::/23",  # Teredo, ORCHID, benchmarking
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4: an IPv4 address in disguise
        "2620:4f:8000::/48",  # AS112
        "3fff::/20",  # documentation
    )
)
_PRIVATE_SUFFIXES = (".internal", ".local", ".localhost", ".svc", ".cluster.local", ".home.arpa")
_LEFT_OUT = "?…"
"""What stands where a URL is shown in place of its query (`schemas.shown_url`). Nobody means it."""
_LABEL = re.compile(r"[^.]{1,63}")
_HTTP_URL: TypeAdapter[HttpUrl] = TypeAdapter(HttpUrl)


class Origin(NamedTuple):
    """Scheme, host (without brackets or a trailing dot) and port, as WHATWG normalises them."""

    scheme: str
    host: str
    port: int


@dataclass(frozen=True, kw_only=True)
class EgressRules:
    """What the operator allows beyond the public internet, and what not even there.

    Attributes:
        allow_private: development: http, any port and private addresses are fine.
        allowed_origins: exempt from every rule about scheme, port, name and address.
        blocked_cidrs: the operator's own ranges, refused also with `allow_private`.
    """

    allow_private: bool = False
    allowed_origins: frozenset[Origin] = frozenset()
    blocked_cidrs: tuple[IPNetwork, ...] = ()

    @classmethod
    def from_settings(cls, settings: config.Settings) -> Self:
        """The rules that the settings spell.

        Raises:
            ValueError: if an allowed origin is no http(s) URL.
        """
        return cls(
            allow_private=settings.webhook_allow_private,
            allowed_origins=frozenset(_origin(_parse(text)) for text in settings.webhook_allowed_origins),
            blocked_cidrs=tuple(ip_network(text) for text in settings.webhook_blocked_cidrs),
        )

    @cached_property
    def exempt_peers(self) -> frozenset[tuple[str, int]]:
        """Host and port of each allowed origin; its scheme is checked with the URL."""
        return frozenset((origin.host, origin.port) for origin in self.allowed_origins)

    def refusal(self, ip: IPAddress) -> str | None:
        """Why nobody may connect to this address, or None if anybody may."""
        if self.allow_private:
            return _listed(ip.ipv4_mapped or ip if isinstance(ip, IPv6Address) else ip, self.blocked_cidrs)
        return blocked(ip, self.blocked_cidrs)


class ForbiddenUrlError(ValueError):
    """The URL is a good one, but it leads where this service does not go."""


def blocked(ip: IPAddress, extra: Sequence[IPNetwork] = ()) -> str | None:
    """Why this address is not one of the public internet, or None if it is.

    Args:
        ip: the address, of either version. An IPv4 address inside IPv6
            (RFC 4291 section 2.5.5.2) is judged as the IPv4 address.
        extra: the operator's own ranges, refused besides the built-in ones.

    Returns:
        The range or the reason, for a log.
    """
    if isinstance(ip, IPv4Address):
        return _listed(ip, (*_DENIED_V4, *extra))
    if ip.scope_id is not None:
        return "an address with a zone"
    if ip.ipv4_mapped is not None:
        return blocked(ip.ipv4_mapped, extra)
    if ip not in _ALLOWED_V6:
        return f"outside {_ALLOWED_V6}"
    return _listed(ip, (*_DENIED_V6, *extra))


def _listed(ip: IPAddress, networks: Iterable[IPNetwork]) -> str | None:
    return next((str(network) for network in networks if ip in network), None)


def admit_url(text: str, rules: EgressRules) -> str:
    """The URL in its one normal spelling, if this service would call it.

    The WHATWG parser turns every spelling of an address (`127.1`, `0x7f.1`,
    `2130706433`, full-width digits) into the usual one. Only the returned text may
    be stored and used: another parser may read the original another way.

    Args:
        text: what a client sent.
        rules: what the operator allows.

    Raises:
        ForbiddenUrlError: if the rules refuse its scheme, port, host or address.
        ValueError: if it is no URL that can be called. Neither message repeats the URL.
    """
    if len(text) > URL_LIMIT:
        raise ValueError(f"must not be longer than {URL_LIMIT} characters")
    if text.endswith(_LEFT_OUT):
        raise ValueError("must be whole: this is how it is shown, without its query")
    url = _without_trailing_dot(_parse(text))
    _check_shape(url)
    origin = _origin(url)
    if origin not in rules.allowed_origins:
        _check_target(origin, rules)
    return str(url)


def _parse(text: str) -> HttpUrl:
    try:
        return _HTTP_URL.validate_python(text)
    except ValidationError:
        raise ValueError("must be an http or https URL with a host") from None


def _without_trailing_dot(url: HttpUrl) -> HttpUrl:
    """`https://example.com./` as `https://example.com/`: SNI has no final dot (RFC 6066)."""
    host = url.host or ""
    if not host.endswith("."):
        return url
    return _parse(str(url).replace(host, host.removesuffix("."), 1))


def _origin(url: HttpUrl) -> Origin:
    host = (url.host or "").removeprefix("[").removesuffix("]")
    return Origin(url.scheme, host, url.port or 0)


def literal(host: str) -> IPAddress | None:
    """The address that this text is, or None if it is a name."""
    try:
        return ip_address(host)
    except ValueError:
        return None


def _check_shape(url: HttpUrl) -> None:
    host = _origin(url).host
    if len(str(url)) > URL_LIMIT:
        raise ValueError(f"must not be longer than {URL_LIMIT} characters")
    if url.username is not None or url.password is not None:
        raise ValueError("must not contain a user name or a password")
    if url.fragment is not None:
        raise ValueError("must not contain a fragment")
    if not url.port:
        raise ValueError("must not name port 0")
    if literal(host) is None and not all(_LABEL.fullmatch(label) for label in host.split(".")):
        raise ValueError("must name a host whose labels have 1 to 63 characters")


def _check_target(origin: Origin, rules: EgressRules) -> None:
    ip = literal(origin.host)
    if ip is not None and rules.refusal(ip) is not None:
        raise ForbiddenUrlError("must not lead to a private or special address")
    if rules.allow_private:
        return
    if origin.scheme != "https":
        raise ForbiddenUrlError("must be an https URL")
    if origin.port not in PORTS:
        raise ForbiddenUrlError(f"must use port {' or '.join(map(str, sorted(PORTS)))}")
    if ip is None and ("." not in origin.host or origin.host.endswith(_PRIVATE_SUFFIXES)):
        raise ForbiddenUrlError("must name a host of the public internet")
