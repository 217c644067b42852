"""Who may call: API keys with planes, hashed at rest, and the origins a browser may come from.

A key is 256 random bits, so one SHA-256 hides it; a slow hash is for passwords.  Keys lie in a JSON file that is looked
at again when it changes: a key that was taken out stops working at once.
"""

import base64
import binascii
import hashlib
import hmac
import ipaddress
import json
import logging
import os
import secrets
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from service.errors import Forbidden, OriginRefused, Unauthorized

log = logging.getLogger(__name__)
Plane = Literal["data", "admin"]
"""`data` reposes and reads; `admin` uploads, deletes, loads and unloads."""
BEARER_SUBPROTOCOL = "bearer."
"""Browsers cannot set headers on a WebSocket: they offer `bearer.<base64url of the key>` beside the real protocol."""


@dataclass(frozen=True)
class Principal:
    """Who calls."""

    name: str
    planes: frozenset[Plane]

    def require(self, plane: Plane) -> None:
        """Raises `Forbidden` where this caller's key is not for `plane`."""
        if plane not in self.planes:
            raise Forbidden(f"expected a key for the {plane} plane, got one for {', '.join(sorted(self.planes))}")


ANONYMOUS = Principal("anonymous", frozenset({"data", "admin"}))
"""Everybody, where no keys are configured."""


class KeyRecord(BaseModel):
    """One key, without the key."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    planes: Annotated[tuple[Plane, ...], Field(min_length=1)]


class _KeyFile(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    keys: tuple[KeyRecord, ...]


class KeyFileError(ValueError):
    """The file of keys cannot be read, or not be changed in the way asked for."""


def read_keys(path: Path) -> tuple[KeyRecord, ...]:
    """The keys of a file.

    Raises:
        KeyFileError: it is not there, or not a file of keys.
    """
    try:
        return _KeyFile.model_validate_json(path.read_bytes()).keys
    except (OSError, ValidationError) as error:
        raise KeyFileError(f"{path} is not a file of keys: {error}") from error


def add_key(path: Path, name: str, planes: tuple[Plane, ...]) -> str:
    """Add a key to the file, which is made where it is missing, and return it: only its hash is kept.

    Raises:
        KeyFileError: the name is taken or not made of a-z, 0-9, _ and -; the file is damaged.
    """
    keys = read_keys(path) if path.exists() else ()
    if any(key.name == name for key in keys):
        raise KeyFileError(f"there is a key named {name!r} already")
    token = secrets.token_urlsafe(32)
    try:
        record = KeyRecord(name=name, sha256=_sha256(token), planes=planes)
    except ValidationError as error:
        raise KeyFileError(f"expected a name of a-z, 0-9, _ and -, and planes; got {name!r}, {planes}") from error
    _write_keys(path, (*keys, record))
    return token


def remove_key(path: Path, name: str) -> None:
    """Take a key out of the file.

    Raises:
        KeyFileError: there is none of that name.
    """
    keys = read_keys(path)
    if all(key.name != name for key in keys):
        raise KeyFileError(f"there is no key named {name!r}")
    _write_keys(path, tuple(key for key in keys if key.name != name))


def _write_keys(path: Path, keys: tuple[KeyRecord, ...]) -> None:
    text = json.dumps(_KeyFile(keys=keys).model_dump(mode="json"), indent=1) + "\n"
    descriptor, fresh = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # readable by the owner only
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
        os.replace(fresh, path)
    except OSError:
        os.unlink(fresh)
        raise


class Guard:
    """Decides who calls, and from which pages a browser may call."""

    def __init__(self, keys_file: Path | None, allowed_origins: tuple[str, ...] = (), *, open_access: bool = False):
        """Read the keys.

        Args:
            keys_file: None lets everybody in.
            allowed_origins: pages of other hosts that may call, such as `https://viewer.example`.
            open_access: without keys, let in pages that came under another name than this machine's own.

        Raises:
            KeyFileError: the file is missing or damaged.
        """
        self._path, self._origins = keys_file, frozenset(origin.lower().rstrip("/") for origin in allowed_origins)
        self._any_own_name = open_access or keys_file is not None
        self._keys: tuple[KeyRecord, ...] = ()
        self._stamp: tuple[int, int] | None = None
        if keys_file is not None:
            self._keys, self._stamp = read_keys(keys_file), _stamp(keys_file)

    def principal(self, headers: Mapping[str, str]) -> Principal:
        """Who calls, by `Authorization: Bearer` or the bearer subprotocol of a WebSocket.

        Args:
            headers: names in lower case.

        Raises:
            Unauthorized: no key, or one that is not known.
        """
        if self._path is None:
            return ANONYMOUS
        token = _bearer_token(headers)
        if token is None:
            raise Unauthorized("expected a key: Authorization: Bearer <key>")
        digest, found = _sha256(token), None
        # All of them are compared, each in constant time: the time says nothing about which came close.
        for key in self._current_keys(self._path):
            if hmac.compare_digest(digest, key.sha256):
                found = key
        if found is None:
            raise Unauthorized("the key is not known")
        return Principal(found.name, frozenset(found.planes))

    def check_origin(self, headers: Mapping[str, str]) -> None:
        """Refuse pages of foreign hosts.  Callers that are no browsers send no Origin and pass.

        Raises:
            OriginRefused: the page is neither ours nor on the list.
        """
        origin = headers.get("origin")
        if origin is None or origin.lower() in self._origins:
            return
        try:
            page = urlsplit(origin)
            own = page.scheme in ("http", "https") and page.netloc.lower() == headers.get("host", "").lower()
            # Without keys nothing but the name keeps out a page whose host was made to resolve to this machine.
            if own and (self._any_own_name or is_loopback(page.hostname or "")):
                return
        except ValueError:
            pass
        raise OriginRefused("the origin of the calling page is not allowed")

    def _current_keys(self, path: Path) -> tuple[KeyRecord, ...]:
        stamp = _stamp(path)
        if stamp != self._stamp:
            try:
                self._keys, self._stamp = read_keys(path), stamp
            except KeyFileError as error:
                log.error("the keys stay as they were: %s", error)
                self._stamp = stamp
        return self._keys


def check_binding(host: str, keys_file: Path | None, *, open_access: bool) -> None:
    """Refuse to let the whole network in by accident.

    Raises:
        KeyFileError: `host` is not this machine alone, and there are neither keys nor the wish to do without.
    """
    if keys_file is None and not open_access and not is_loopback(host):
        raise KeyFileError(
            f"without keys, only this machine may call, and {host} is open to others: "
            "make a key with `reposer keys add` and serve with --keys, or set REPOSER_OPEN_ACCESS=true"
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server bound to `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _bearer_token(headers: Mapping[str, str]) -> str | None:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        return token.strip()
    for offered in headers.get("sec-websocket-protocol", "").split(","):
        offered = offered.strip()
        if offered.startswith(BEARER_SUBPROTOCOL):
            encoded = offered.removeprefix(BEARER_SUBPROTOCOL)
            try:
                return base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4)).decode()
            except (binascii.Error, ValueError):
                return None
    return None


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino


def _sha256(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
