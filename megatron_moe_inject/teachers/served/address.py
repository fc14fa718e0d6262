"""Where servers are: the URLs behind ``server:``, without credentials. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

from megatron_moe_inject.host.errors import Failure

_PORTS = {"http": 80, "https": 443}
_HERE = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Address:
    """One server.

    Attributes:
        scheme: ``http`` or ``https``.
        host: its name, an IPv6 address without brackets.
        port: of it.
        prefix: path before those of the protocol, without a slash at its end.
    """

    scheme: str
    host: str
    port: int
    prefix: str = ""

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}{self.prefix}"

    @property
    def in_the_clear(self) -> bool:
        """Whether what is sent there can be read on the way."""
        return self.scheme == "http" and self.host not in _HERE


def parse_addresses(text: str, failure: Failure) -> list[Address]:
    """The servers of one or several URLs with commas between them.

    Args:
        text: what stands behind ``server:``.
        failure: makes the error of what is wrong.

    Raises:
        RecipeError: a URL that is none, or holds what does not belong there. It does not show the
            text where that may hold credentials.
    """
    found: list[Address] = []
    for part in text.split(","):
        url = part.strip()
        remedy = "write such as server:http://host:8000"
        try:
            pieces = urlsplit(url)
            port = pieces.port
        except ValueError as error:
            raise failure(f"is no URL ({error})", remedy) from None
        if pieces.scheme not in _PORTS or not pieces.hostname:
            raise failure("is no URL with http:// or https:// and a host", remedy)
        if pieces.query or pieces.fragment:
            raise failure("has a query or a fragment behind a URL", remedy)
        port = _PORTS[pieces.scheme] if port is None else port
        prefix = pieces.path.rstrip("/").removesuffix("/v1")
        address = Address(pieces.scheme, pieces.hostname, port, prefix)
        if address in found:
            raise failure(f"names {address} twice", "name each server once")
        found.append(address)
    return found


def holds_credentials(text: str) -> bool:
    """Whether a URL in it has a user or a password, which must appear in no message."""
    return any("@" in part.partition("//")[2].partition("/")[0] for part in text.split(","))
