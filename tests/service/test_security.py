"""Keys, planes and origins: who gets in, and that the key itself is nowhere."""

import base64
import json
import stat
from pathlib import Path
from typing import Any

import pytest

from service.__main__ import main
from service.errors import Forbidden, OriginRefused, Unauthorized
from service.security import (
    ANONYMOUS,
    Guard,
    KeyFileError,
    add_key,
    is_loopback,
    read_keys,
    remove_key,
)
from service.settings import Settings

pytestmark = pytest.mark.anyio


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


def test_the_file_holds_no_key(keys_file: Path) -> None:
    token = add_key(keys_file, "studio", ("data",))
    assert token not in keys_file.read_text()
    assert stat.S_IMODE(keys_file.stat().st_mode) == 0o600
    assert [path.name for path in keys_file.parent.iterdir()] == ["keys.json"]
    assert Guard(keys_file).principal(bearer(token)).name == "studio"


def test_keys_are_independent(keys_file: Path) -> None:
    tokens = {name: add_key(keys_file, name, planes) for name, planes in {"a": ("data",), "b": ("admin",)}.items()}
    guard = Guard(keys_file)
    assert {name: guard.principal(bearer(token)).name for name, token in tokens.items()} == {"a": "a", "b": "b"}
    remove_key(keys_file, "a")
    with pytest.raises(Unauthorized):
        guard.principal(bearer(tokens["a"]))
    assert guard.principal(bearer(tokens["b"])).planes == {"admin"}


def test_a_damaged_file_locks_nobody_out_later_and_nobody_in_at_the_start(keys_file: Path) -> None:
    token = add_key(keys_file, "a", ("data",))
    guard = Guard(keys_file)
    for text in ("{", '{"keys": [{"name": "a"}]}', "[]"):
        keys_file.write_text(text)
        assert guard.principal(bearer(token)).name == "a"
        with pytest.raises(Unauthorized):
            guard.principal(bearer("other"))
        with pytest.raises(KeyFileError):
            Guard(keys_file)
    keys_file.unlink()
    assert guard.principal(bearer(token)).name == "a"
    with pytest.raises(KeyFileError):
        Guard(keys_file)


@pytest.mark.parametrize(("name", "planes"), [("A", ("data",)), ("a\n", ("data",)), ("", ("data",)), ("a", ())])
def test_keys_of_other_forms_are_refused(keys_file: Path, name: str, planes: Any) -> None:
    with pytest.raises(KeyFileError):
        add_key(keys_file, name, planes)
    assert not keys_file.exists()


def test_names_are_taken_once(keys_file: Path) -> None:
    add_key(keys_file, "a", ("data",))
    before = keys_file.read_bytes()
    with pytest.raises(KeyFileError, match="already"):
        add_key(keys_file, "a", ("admin",))
    with pytest.raises(KeyFileError, match="no key"):
        remove_key(keys_file, "b")
    assert keys_file.read_bytes() == before
    assert [key.name for key in read_keys(keys_file)] == ["a"]


def test_browsers_bring_the_key_as_a_subprotocol(keys_file: Path) -> None:
    token = add_key(keys_file, "a", ("data",))
    guard = Guard(keys_file)
    encoded = base64.urlsafe_b64encode(token.encode()).decode()
    for offered in (f"bearer.{encoded}, avatar.v1.q16", f"avatar.v1.q16,bearer.{encoded.rstrip('=')}"):
        assert guard.principal({"sec-websocket-protocol": offered}).name == "a"
    for offered in ("avatar.v1.q16", f"bearer.{token}", "bearer.", "bearer.////", f"bearer {encoded}"):
        with pytest.raises(Unauthorized):
            guard.principal({"sec-websocket-protocol": offered})


def test_no_keys_let_everybody_in() -> None:
    assert Guard(None).principal({}) == ANONYMOUS


BAD_AUTHORIZATION = ["", "Bearer", "Bearer ", "Basic {key}", "{key}", "Bearer x{key}", "Bearer {half}", "Bearer {hash}"]


@pytest.mark.parametrize("text", BAD_AUTHORIZATION)
async def test_fault_35_no_key_or_a_wrong_one_is_401(serve: Any, keys_file: Path, text: str) -> None:
    token = add_key(keys_file, "a", ("data", "admin"))
    record = json.loads(keys_file.read_text())["keys"][0]
    sent = text.format(key=token, half=token[: len(token) // 2], hash=record["sha256"])
    async with serve(keys_file=keys_file) as client:
        for method, path in (("GET", "/avatars"), ("POST", "/avatars/tiny/repose"), ("DELETE", "/avatars/tiny")):
            answer = await client.request(method, path, headers={"Authorization": sent})
            assert (answer.status_code, answer.json()["code"]) == (401, "unauthorized")
            assert answer.headers["www-authenticate"].startswith("Bearer")
            assert token not in answer.text
        assert (await client.get("/avatars", headers=bearer(token))).status_code == 200
        assert (await client.get("/livez")).status_code == 200


async def test_metrics_need_a_key_unless_a_setting_says_otherwise(serve: Any, keys_file: Path) -> None:
    token = add_key(keys_file, "prometheus", ("data",))
    async with serve(keys_file=keys_file) as client:
        assert (await client.get("/metrics")).status_code == 401
        assert (await client.get("/metrics", headers=bearer(token))).status_code == 200
    async with serve(keys_file=keys_file, public_metrics=True) as client:
        answer = await client.get("/metrics")
        assert (answer.status_code, "reposer_frames_total" in answer.text) == (200, True)
        # A proxy that keeps `/metrics` to itself knows it by this name only.
        for method, path in (("GET", "/metrics/"), ("GET", "/Metrics"), ("POST", "/metrics"), ("GET", "/info")):
            assert (await client.request(method, path)).status_code == 401, (method, path)


async def test_whether_an_avatar_is_ready_is_told_to_those_with_a_key(serve: Any, keys_file: Path) -> None:
    token = add_key(keys_file, "prober", ("data",))
    async with serve(keys_file=keys_file) as client:
        assert (await client.get("/v2/health/ready")).status_code == 200
        for path in ("/v2/models/tiny/ready", "/avatars/tiny/ready", "/v2/models/nobody/ready"):
            assert (await client.get(path)).status_code == 401, path
        assert (await client.get("/v2/models/tiny/ready", headers=bearer(token))).status_code == 200


async def test_fault_35_a_data_key_does_not_change_avatars(serve: Any, keys_file: Path) -> None:
    data, admin = add_key(keys_file, "user", ("data",)), add_key(keys_file, "operator", ("admin",))
    async with serve(keys_file=keys_file) as client:
        for method, path in (
            ("PUT", "/avatars/tiny"),
            ("DELETE", "/avatars/tiny"),
            ("POST", "/avatars/tiny/load"),
            ("POST", "/avatars/tiny/unload"),
        ):
            answer = await client.request(method, path, headers=bearer(data))
            assert (answer.status_code, answer.json()["code"]) == (403, "forbidden"), (method, path)
        assert (await client.get("/avatars/tiny", headers=bearer(data))).status_code == 200
        poses = {"poses": [[0.0] * 72]}
        answer = await client.post("/avatars/tiny/repose", json=poses, headers=bearer(admin))
        assert (answer.status_code, answer.json()["code"]) == (403, "forbidden")


def test_every_key_is_compared_in_constant_time(keys_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = [add_key(keys_file, name, ("data",)) for name in "abc"]
    compared: list[str] = []

    def compare(one: str, other: str) -> bool:
        compared.append(other)
        return one == other

    monkeypatch.setattr("service.security.hmac.compare_digest", compare)
    guard = Guard(keys_file)
    for token in tokens:
        compared.clear()
        guard.principal(bearer(token))
        assert compared == [key.sha256 for key in read_keys(keys_file)]


ORIGINS = {
    "null": False,
    "https://evil.example": False,
    "http://reposer.evil.example": False,
    "http://reposer:81": False,
    "file://reposer": False,
    "http://[": False,
    "https://viewer.example": True,
    "https://Viewer.Example": True,
    "http://reposer": True,
}


@pytest.mark.parametrize("origin", ORIGINS)
def test_origins(keys_file: Path, origin: str) -> None:
    add_key(keys_file, "a", ("data",))
    guard = Guard(keys_file, ("https://viewer.example/",))
    if ORIGINS[origin]:
        guard.check_origin({"host": "reposer", "origin": origin})
    else:
        with pytest.raises(OriginRefused):
            guard.check_origin({"host": "reposer", "origin": origin})


def test_without_keys_a_name_that_was_bent_to_this_machine_is_refused() -> None:
    bent = {"host": "evil.example:8000", "origin": "http://evil.example:8000"}
    with pytest.raises(OriginRefused):
        Guard(None).check_origin(bent)
    Guard(None, open_access=True).check_origin(bent)
    Guard(None).check_origin({"host": "127.0.0.1:8000", "origin": "http://127.0.0.1:8000"})
    Guard(None).check_origin({"host": "localhost:8000", "origin": "http://localhost:8000"})
    Guard(None).check_origin({"host": "evil.example"})


async def test_foreign_pages_cannot_post(serve: Any) -> None:
    async with serve(allowed_origins=("https://viewer.example",)) as client:
        statuses = {
            origin: (await client.get("/avatars", headers={"Origin": origin})).status_code
            for origin in ("https://viewer.example", "https://evil.example")
        }
    assert statuses == {"https://viewer.example": 200, "https://evil.example": 403}


def test_planes_are_required() -> None:
    ANONYMOUS.require("admin")
    with pytest.raises(Forbidden, match="admin plane, got one for data"):
        type(ANONYMOUS)("a", frozenset({"data"})).require("admin")


LOOPBACK = ["127.0.0.1", "127.9.9.9", "::1", "localhost"]
OPEN = ["0.0.0.0", "::", "10.0.0.1", "reposer.local", "localhost.evil.example", ""]


@pytest.mark.parametrize(("host", "loopback"), [*((h, True) for h in LOOPBACK), *((h, False) for h in OPEN)])
def test_loopback(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


async def test_fault_36_pages_of_other_hosts_open_no_stream(serve: Any, keys_file: Path) -> None:
    token = add_key(keys_file, "a", ("data",))
    path, key = "/avatars/tiny/stream", base64.urlsafe_b64encode(token.encode()).decode().rstrip("=")
    async with serve(keys_file=keys_file, allowed_origins=("https://viewer.example",)) as client:
        evil = await shake_hands(
            client.app, path, origin="https://evil.example", protocols=f"avatar.v1.q16, bearer.{key}"
        )
        assert evil == (403, "origin-refused")
        assert await shake_hands(client.app, path, origin="https://viewer.example", protocols="avatar.v1.q16") == (
            401,
            "unauthorized",
        )


def test_fault_35_planes_hold_for_streams_too(keys_file: Path) -> None:
    admin = add_key(keys_file, "operator", ("admin",))
    with pytest.raises(Forbidden):
        Guard(keys_file).principal(bearer(admin)).require("data")


async def shake_hands(app: Any, path: str, origin: str, protocols: str) -> tuple[int, str]:
    """The status and code a WebSocket handshake is denied with."""
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = {"host": "reposer", "origin": origin, "sec-websocket-protocol": protocols}
    scope = {
        "type": "websocket", "scheme": "ws", "http_version": "1.1", "path": path, "query_string": b"", "root_path": "",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()], "client": ("10.0.0.9", 1),
        "server": ("reposer", 80), "subprotocols": [], "extensions": {"websocket.http.response": {}},
    }  # fmt: skip
    await app(scope, receive, send)
    assert [message["type"] for message in sent] == ["websocket.http.response.start", "websocket.http.response.body"]
    return sent[0]["status"], json.loads(sent[1]["body"])["code"]


def test_the_network_is_not_let_in_by_accident(
    keys_file: Path, bundle_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []

    def start(settings: Settings, host: str, port: int) -> int:
        Guard(settings.keys_file)
        started.append(host)
        return 0

    monkeypatch.setattr("service.serve.serve", start)
    serve = ["serve", "--bundles", str(bundle_dir), "--host"]
    assert main([*serve, "0.0.0.0"]) == 1
    assert "make a key" in capsys.readouterr().err
    assert main([*serve, "127.0.0.1"]) == 0
    add_key(keys_file, "a", ("data",))
    assert main([*serve, "0.0.0.0", "--keys", str(keys_file)]) == 0
    assert main([*serve, "127.0.0.1", "--keys", str(keys_file) + ".missing"]) == 1
    monkeypatch.setenv("REPOSER_OPEN_ACCESS", "true")
    assert main([*serve, "0.0.0.0"]) == 0
    assert started == ["127.0.0.1", "0.0.0.0", "0.0.0.0"]


def test_the_command_shows_a_key_once(keys_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = ["keys", "--file", str(keys_file)]
    assert main([*keys, "add", "studio", "--plane", "data", "--plane", "admin"]) == 0
    token = capsys.readouterr().out.strip()
    assert Guard(keys_file).principal(bearer(token)).planes == {"data", "admin"}
    assert main([*keys, "list"]) == 0
    assert capsys.readouterr().out == "studio: data, admin\n"
    assert main([*keys, "add", "studio"]) == 1
    assert main([*keys, "remove", "studio"]) == 0
    assert main([*keys, "remove", "studio"]) == 1
    assert "no key named" in capsys.readouterr().err
