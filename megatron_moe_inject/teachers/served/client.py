"""One connection to a server: JSON over HTTP, with what can go wrong told apart. No torch.

A connection is kept open from one request to the next and belongs to one thread. Redirects are not
followed, so that nothing, and no credentials, goes to a host that the recipe does not name; proxies
of the environment are not used. What a server says in an error is shown in one short line, without
the key if it repeats that.
"""

from __future__ import annotations

import http.client
import json
import os
import ssl
import time
from collections.abc import Mapping
from typing import Any

from megatron_moe_inject.host.errors import fail, one_line
from megatron_moe_inject.host.version import VERSION
from megatron_moe_inject.teachers.served.address import Address

_SHOWN = 240
_CHUNK = 1 << 18
_MOST = 1 << 31
"""Bytes of an answer."""
_BUSY = (408, 425, 429)


class Fault(Exception):
    """Why there is no answer; the message is a sentence about the server, without its name.

    Attributes:
        lasting: asking this server again would not help: it has another model, or refuses the key.
        of_text: it is this text that the server refuses.
        wait: seconds that the server wants to be left alone.
    """

    def __init__(
        self, message: str, *, lasting: bool = False, of_text: bool = False, wait: float = 0.0
    ) -> None:
        super().__init__(message)
        self.lasting = lasting
        self.of_text = of_text
        self.wait = wait


def api_key(variable: str | None, key: str) -> str | None:
    """The key that an environment variable holds.

    Args:
        variable: its name; None for no key.
        key: of the recipe, for the error.

    Raises:
        RecipeError: it is not set, or holds what no header can.
    """
    if variable is None:
        return None
    value = os.environ.get(variable, "").strip()
    if not value or not value.isascii() or not value.isprintable():
        raise fail(
            key, variable, "is no environment variable with a key on this machine",
            "export it where the job starts, or remove the key",
        )  # fmt: skip
    return value


class Connection:
    """To one server.

    Args:
        address: of it.
        timeout: seconds for one answer, from the first byte that is sent to the last that comes.
        key: sent as ``Authorization: Bearer``; None for none.
    """

    def __init__(self, address: Address, timeout: float, key: str | None = None) -> None:
        self.address = address
        self._timeout = timeout
        self._key = key
        self._http: http.client.HTTPConnection | None = None

    def get(self, path: str) -> Any:
        """The JSON value at a path.

        Raises:
            Fault: there is none.
        """
        return self._json("GET", path, None)

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The JSON value that is the answer to another.

        Raises:
            Fault: there is none.
        """
        return self._json("POST", path, json.dumps(body).encode())

    def close(self) -> None:
        """Close it; the next request opens it again."""
        if self._http is not None:
            self._http.close()
            self._http = None

    def _json(self, method: str, path: str, body: bytes | None) -> Any:
        content = self._exchange(method, path, body)
        try:
            return json.loads(content)
        except (ValueError, RecursionError):
            raise Fault(f"answered {len(content)} bytes that are no JSON") from None

    def _exchange(self, method: str, path: str, body: bytes | None) -> bytes:
        reused = self._http is not None
        try:
            return self._once(method, path, body)
        except (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError) as error:
            self.close()
            if not reused:
                raise Fault(f"closed the connection ({_name(error)})") from None
        except (OSError, http.client.HTTPException) as error:
            self.close()
            raise self._fault(error) from None
        # What was kept open had been closed by the server meanwhile.
        try:
            return self._once(method, path, body)
        except (OSError, http.client.HTTPException) as error:
            self.close()
            raise self._fault(error) from None

    def _fault(self, error: Exception) -> Fault:
        if isinstance(error, TimeoutError):
            return Fault(f"gave no answer within {self._timeout:g} s")
        if isinstance(error, ssl.SSLCertVerificationError):
            return Fault(f"has a certificate that is not trusted ({_name(error)})", lasting=True)
        if isinstance(error, http.client.IncompleteRead):
            return Fault(f"ended its answer after {len(error.partial)} bytes")
        return Fault(f"cannot be spoken to ({_name(error)})")

    def _once(self, method: str, path: str, body: bytes | None) -> bytes:
        until = time.monotonic() + self._timeout
        if self._http is None:
            self._http = self._opened()
        connection = self._http
        headers = {"Accept": "application/json", "User-Agent": f"megatron_moe_inject/{VERSION}"}
        if body is not None:
            headers["Content-Type"] = "application/json"
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        if connection.sock is not None:
            connection.sock.settimeout(self._timeout)
        connection.request(method, self.address.prefix + path, body, headers)
        response = connection.getresponse()
        content = self._read(response, until)
        if response.will_close:
            self.close()
        if response.status == 200:
            return content
        raise self._refusal(response, content, path)

    def _opened(self) -> http.client.HTTPConnection:
        host, port, timeout = self.address.host, self.address.port, self._timeout
        if self.address.scheme == "https":
            context = ssl.create_default_context()
            return http.client.HTTPSConnection(host, port, timeout=timeout, context=context)
        return http.client.HTTPConnection(host, port, timeout=timeout)

    def _read(self, response: http.client.HTTPResponse, until: float) -> bytes:
        """The whole body; a server that sends a little now and then has no more time than
        another."""
        parts, size = [], 0
        socket = None if self._http is None else self._http.sock
        while True:
            left = until - time.monotonic()
            if left <= 0:
                raise TimeoutError
            if socket is not None:
                socket.settimeout(left)
            part = response.read1(_CHUNK)
            if not part:
                break
            parts.append(part)
            size += len(part)
            if size > _MOST:
                self.close()
                raise Fault(f"sent more than {_MOST >> 30} GiB")
        if response.length:  # of Content-Length, what did not come
            raise http.client.IncompleteRead(b"".join(parts), response.length)
        response.close()
        return b"".join(parts)

    def _refusal(self, response: http.client.HTTPResponse, content: bytes, path: str) -> Fault:
        status, told = response.status, self._told(content)
        if 300 <= status < 400:
            where = one_line(str(response.getheader("Location")), 120)
            return Fault(f"sends on to {where}; name that URL", lasting=True)
        if status in (401, 403):
            return Fault(f"refuses the key, or wants one (HTTP {status}{told})", lasting=True)
        if status == 404:
            return Fault(f"has no {path} for this model (HTTP 404{told})", lasting=True)
        if status in _BUSY or status >= 500:
            wait = response.getheader("Retry-After") or ""
            seconds = float(wait) if wait.isdigit() else 0.0
            return Fault(f"says HTTP {status}{told}", wait=min(seconds, 300.0))
        return Fault(f"refuses it (HTTP {status}{told})", of_text=True)

    def _told(self, content: bytes) -> str:
        text = content[:4096].decode("utf-8", "replace")
        try:
            value = json.loads(content)
            value = value.get("error", value.get("detail", value)) if _is_object(value) else value
            value = value.get("message", value) if _is_object(value) else value
            text = value if isinstance(value, str) else json.dumps(value)
        except (ValueError, RecursionError):
            pass
        if self._key is not None:
            text = text.replace(self._key, "***")
        text = one_line("".join(c if c.isprintable() else " " for c in text), _SHOWN)
        return f": {text}" if text else ""


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _name(error: Exception) -> str:
    return one_line(f"{type(error).__name__}: {error}", 160)
