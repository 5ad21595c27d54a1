"""Take the address of a server apart, so that its credentials go to that server and nowhere else."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from ernie_accel.common.text import one_line
from ernie_accel.core.errors import ErnieAccelError

HIDDEN = "***"
"""What stands in the place of a secret."""

_MIN_SECRET = 4  # a shorter one would be found in every other word
_PATH_SAFE = "/%:@!$&'()*+,;=~"


@dataclass(frozen=True)
class Address:
    """A server's base address.

    Attributes:
        shown: The address without user, password and query: the only form for messages, logs and files.
        scheme: "http" or "https".
        host: Name or IP address, IPv6 without brackets.
        port: The port.
        netloc: Host and port as given, without user and password: the Host header.
        path: What goes before each path of the API; percent-encoded.
        query: What goes after each of them, with its question mark; percent-encoded.
        headers: What this server gets with every request: the credentials.
        secrets: Every form in which a credential could come back in the server's own words, longest first.
    """

    shown: str
    scheme: str
    host: str
    port: int
    netloc: str
    path: str
    query: str = field(repr=False)
    headers: Mapping[str, str] = field(repr=False)
    secrets: tuple[str, ...] = field(repr=False)

    def without_secrets(self, text: str) -> str:
        """Return a text of the server's with the credentials hidden that it may have echoed."""
        for secret in self.secrets:
            text = text.replace(secret, HIDDEN)
        return text


def redacted(address: str) -> str:
    """Return an address as given, but for what could be a credential; it need not be a valid one."""
    before, at, after = address.rpartition("@")
    if at:
        scheme = re.match(r"\s*[A-Za-z][A-Za-z0-9+.-]*://", before)
        address = f"{scheme.group() if scheme else ''}{HIDDEN}@{after}"
    elif "[" not in address:  # what stands where a port should may be a password: http://user:password
        address = re.sub(r"(://[^/:]*):(?!\d{1,5}(/|$))[^/?#]*", rf"\1:{HIDDEN}", address)
    return one_line(re.sub(r"[?#].*", f"?{HIDDEN}", address, flags=re.DOTALL))


def parse_address(text: str, *, key: str | None = None) -> Address:
    """Return the parts of a base address; a trailing "/v1" is understood.

    Args:
        text: Such as "http://10.0.0.7:30000" or "https://user:password@host/images".
        key: An API key for this server, sent as a bearer token.

    Raises:
        ErnieAccelError: It is not an HTTP address, or there are two credentials for one header; the text hides them.
    """

    def refuse(reason: str) -> ErnieAccelError:
        return ErnieAccelError(f"endpoint {redacted(text)!r} {reason}; expected one like http://host:30000")

    if not text.lower().startswith(("http://", "https://")):
        raise refuse("is not an HTTP address")
    if any(character.isspace() or not character.isprintable() for character in text):
        raise refuse("has spaces or control characters")
    try:
        parts = urlsplit(text)
        host = (parts.hostname or "").encode("ascii" if ":" in (parts.hostname or "") else "idna").decode("ascii")
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    except ValueError:  # a bad port, a bad IPv6 address, a name that DNS has no form for; its text may hold a password
        raise refuse("is not an HTTP address") from None
    if not host:
        raise refuse("names no host")
    if parts.fragment:
        raise refuse("has a fragment (#), which no server gets")
    user = None if parts.username is None else f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    if user is not None and key is not None:
        raise refuse("holds a user and password, and there is an API key as well: one header cannot carry both")
    path = quote(parts.path, safe=_PATH_SAFE).rstrip("/").removesuffix("/v1").rstrip("/")
    netloc = (f"[{host}]" if ":" in host else host) + ("" if parts.port is None else f":{port}")
    headers: dict[str, str] = {}
    secrets = [value for _, value in parse_qsl(parts.query)] + [parts.query]
    if user is not None:
        token = base64.b64encode(user.encode()).decode()
        headers["Authorization"] = f"Basic {token}"
        secrets += [token, user, unquote(parts.password or ""), parts.password or ""]
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
        secrets.append(key)
    return Address(
        shown=f"{parts.scheme}://{netloc}{path}",
        scheme=parts.scheme,
        host=host,
        port=port,
        netloc=netloc,
        path=path,
        query=f"?{quote(parts.query, safe=_PATH_SAFE + '?')}" if parts.query else "",
        headers=headers,
        secrets=_forms(secrets),
    )


def check_key(key: str | None, whose: str) -> None:
    """Refuse an API key that no HTTP header can carry, without repeating it.

    Raises:
        ErnieAccelError: It is empty, or has spaces, line breaks or characters outside ASCII.
    """
    if key is not None and not (key and key.isascii() and key.isprintable() and " " not in key):
        found = "is empty" if not key else f"({len(key)} characters) has spaces, line breaks or other than ASCII"
        raise ErnieAccelError(f"the API key of {whose} {found}; expected visible ASCII, such as sk-1234: copy it again")


def _forms(secrets: list[str]) -> tuple[str, ...]:
    forms = {form for each in secrets for form in (each, quote(each, safe=""), json.dumps(each)[1:-1])}
    return tuple(sorted((form for form in forms if len(form) >= _MIN_SECRET), key=len, reverse=True))
