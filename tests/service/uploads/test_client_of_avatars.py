"""Both Python clients change the avatars of the real service."""

import asyncio
import io
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from service.__main__ import main
from service.app import create_app
from service.bundle.files import read_bundle
from service.client import AsyncClient, Client, ConnectionLost, Refused
from service.client.calls import upload_call
from service.settings import Settings

Run = Callable[..., Any]
POSES = np.zeros((2, 72), np.float32)


@pytest.fixture
def url(folder: Path, tmp_path: Path, run_server: Any) -> Iterator[str]:
    """A service of its own over HTTP; it looks at the avatars as it is started."""
    app = create_app(Settings(bundle_dir=folder, threads=1, jobs_dir=tmp_path / "jobs"))
    with run_server(app) as (host, port):
        yield f"http://{host}:{port}"


def caller(kind: str, url: str, **more: Any) -> Run:
    """`run(method, ...)` of the sync or the async client."""

    def run(method: str, *arguments: Any, **options: Any) -> Any:
        if kind == "sync":
            with Client(url, **more) as client:
                return getattr(client, method)(*arguments, **options)

        async def call() -> Any:
            async with AsyncClient(url, **more) as client:
                return await getattr(client, method)(*arguments, **options)

        return asyncio.run(call())

    return run


@pytest.fixture(params=["sync", "async"])
def run(request: pytest.FixtureRequest, url: str) -> Run:
    return caller(request.param, url)


def refusal(run: Run, *arguments: Any, **options: Any) -> tuple[int, str]:
    with pytest.raises(Refused) as refused:
        run(*arguments, **options)
    return refused.value.status, refused.value.code


def test_an_uploaded_folder_is_served_until_it_is_deleted(run: Run, url: str, make_bundle: Any, tmp_path: Path) -> None:
    bundle = make_bundle("new-one")
    made = run("upload", "new-one", bundle, only_new=True)
    assert (made["id"], made["bundle_digest"]) == ("new-one", read_bundle(bundle).digest)
    assert [avatar["id"] for avatar in run("avatars")] == ["new-one", "tiny"]
    assert run("export", "new-one", POSES, tmp_path / "out.npz").vertices == 368
    assert refusal(run, "upload", "new-one", bundle, only_new=True) == (412, "precondition-failed")
    run("delete", "new-one")
    assert refusal(run, "avatar", "new-one") == (404, "avatar-not-found")
    assert refusal(run, "delete", "new-one") == (404, "avatar-not-found")
    assert refusal(run, "versions", "new-one") == (404, "avatar-not-found")


@pytest.mark.usefixtures("no_vetting")
def test_versions_are_replaced_on_condition_and_gone_back_to(run: Run, make_bundle: Any, zip_of: Any) -> None:
    first = run("avatar", "tiny")["bundle_digest"]
    second = run("upload", "tiny", zip_of(make_bundle(iou=0.1)), if_match=first)["bundle_digest"]
    assert second != first
    assert refusal(run, "upload", "tiny", make_bundle(iou=0.2), if_match=first) == (412, "precondition-failed")
    assert refusal(run, "delete", "tiny", if_match=first) == (412, "precondition-failed")
    assert refusal(run, "load", "tiny", first, if_match=first) == (412, "precondition-failed")
    assert [(version["digest"], version["replaced_at"] is None) for version in run("versions", "tiny")] == [
        (second, True),
        (first, False),
    ]
    assert run("load", "tiny", first, if_match=f'"{second}"')["bundle_digest"] == first
    assert refusal(run, "load", "tiny", "0" * 64) == (404, "version-not-found")
    run("delete", "tiny", if_match="*")
    assert run("avatars") == []


def test_what_is_no_bundle_is_refused_and_what_was_served_goes_on(run: Run, make_bundle: Any, tmp_path: Path) -> None:
    (bundle := make_bundle()).joinpath("mesh.standard.glb").write_bytes(b"no mesh")
    assert refusal(run, "upload", "tiny", bundle) == (422, "bundle-invalid")
    assert refusal(run, "upload", "tiny", b"no archive") == (422, "bundle-invalid")
    assert refusal(run, "upload", "No Name", bundle) == (422, "bundle-invalid")
    assert [version["replaced_at"] for version in run("versions", "tiny")] == [None]
    (tmp_path / "walk.npz").touch()
    with pytest.raises(ValueError, match=r"walk\.npz"):
        run("upload", "tiny", tmp_path / "walk.npz")
    for missing in ("nowhere", "nowhere.zip"):
        with pytest.raises(FileNotFoundError, match=missing):
            run("upload", "tiny", tmp_path / missing)


def test_memory_and_what_the_service_says_of_itself(run: Run) -> None:
    assert run("load", "tiny")["status"] == "ready"
    assert run("info")["avatars_in_memory"] == 1
    run("unload", "tiny")
    assert (run("info")["avatars_in_memory"], run("avatars")[0]["status"]) == (0, "stored")
    assert refusal(run, "unload", "nobody") == (404, "avatar-not-found")
    assert run("jobs") == []


def test_a_folder_travels_as_tar_and_an_archive_as_it_is(make_bundle: Any, zip_of: Any, tmp_path: Path) -> None:
    folder, packed = make_bundle(), zip_of(make_bundle())
    call = upload_call("tiny", folder, None, False)
    assert call.headers == {"Content-Type": "application/x-tar"}
    assert call.body == upload_call("tiny", str(folder), None, False).body == b"".join(call.pieces())
    with tarfile.open(fileobj=io.BytesIO(call.body)) as tar:
        names = {path.name: path.read_bytes() for path in folder.iterdir()}
        assert {member.name: tar.extractfile(member).read() for member in tar} == names  # type: ignore[union-attr]
    for name, kind, body in (("a.zip", "application/zip", packed), ("a.tar", "application/x-tar", call.body)):
        (tmp_path / name).write_bytes(body)
        for bundle in (tmp_path / name, body):
            sent = upload_call("tiny", bundle, "f00", False)
            assert (sent.body, sent.headers) == (body, {"Content-Type": kind, "If-Match": '"f00"'})


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_only_what_was_put_off_is_sent_again(kind: str) -> None:
    """An upload, whole, after 503; and nothing whose answer was lost."""
    body, seen = bytes(600_000), []
    busy = {"status": 503, "code": "overloaded", "title": "busy"}
    replies: list[httpx.Response | Exception] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        if isinstance(reply := replies.pop(0), Exception):
            raise reply
        return reply

    async def soon(_: float) -> None:
        await asyncio.sleep(0)

    sleep = (lambda _: None) if kind == "sync" else soon
    run = caller(kind, "http://it", transport=httpx.MockTransport(answer), sleep=sleep)
    replies += [httpx.Response(503, json=busy), httpx.Response(201, json={"id": "tiny"})]
    assert run("upload", "tiny", body) == {"id": "tiny"}
    assert [request.content for request in seen] == [body, body]
    assert {request.headers["content-length"] for request in seen} == {"600000"}
    assert not any("transfer-encoding" in request.headers for request in seen)
    for call in (("upload", "tiny", body), ("delete", "tiny")):
        replies.append(httpx.ReadError("gone"))
        with pytest.raises(ConnectionLost, match="gone"):
            run(*call)
    replies += [httpx.Response(503, json=busy), httpx.Response(200, json={"id": "tiny"})]
    assert run("load", "tiny", "f00", if_match="f01") == {"id": "tiny"}
    assert not replies


def test_the_command_lists_uploads_and_deletes(
    url: str, make_bundle: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = make_bundle("new-one")
    for words, printed in (
        (["upload", "new-one", str(bundle), "--only-new"], read_bundle(bundle).digest),
        (["list"], "new-one: ready, preview 184 vertices, standard 368 vertices\ntiny: "),
        (["delete", "new-one"], "new-one: deleted"),
    ):
        assert main(["avatars", *words, "--url", url]) == 0
        assert printed in capsys.readouterr().out
    for words, failure in (
        (["delete", "new-one"], "404 avatar-not-found"),
        (["delete", "tiny", "--if-match", "f00"], "412 precondition-failed"),
        (["upload", "tiny", str(tmp_path / "nowhere")], "nowhere"),
    ):
        assert main(["avatars", *words, "--url", url]) == 1
        assert failure in capsys.readouterr().err
