"""An upload changes all or nothing; what was served goes on until the new bundle has run."""

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anyio
import httpx
import numpy as np
import onnx
import pytest
from starlette.requests import ClientDisconnect

from service.app import create_app
from service.avatars import AvatarStore
from service.bundle.files import read_bundle
from service.errors import UploadConflict
from service.settings import Settings
from service.uploads import Conditions, Uploads

pytestmark = pytest.mark.anyio
ZIP = {"Content-Type": "application/zip"}
POSES = {"poses": [[0.1] * 72]}


def work_left(folder: Path) -> list[str]:
    return [path.name for path in (folder / ".uploads").iterdir()] if (folder / ".uploads").exists() else []


async def iou_of(client: httpx.AsyncClient, avatar_id: str = "tiny") -> float:
    return (await client.get(f"/avatars/{avatar_id}")).json()["metrics"]["iou"]


def evil_graph(make_graph: Any) -> bytes:
    model = onnx.load_from_string(make_graph())
    model.graph.node.append(onnx.helper.make_node("RandomNormalLike", ["unit"], ["more"]))
    return model.SerializeToString()


async def test_fault_10_a_refused_bundle_leaves_the_old_one(
    serve: Any, folder: Path, make_bundle: Any, zip_of: Any, make_graph: Any
) -> None:
    bodies = {
        "operator": zip_of(make_bundle(iou=0.1, repose_onnx=evil_graph(make_graph))),
        "not finite": zip_of(make_bundle(iou=0.2, repose_onnx=make_graph(scale=np.nan))),
        "checkpoint": zip_of(make_bundle(iou=0.3, checkpoint=b"\x80\x04.")),
        "SHA-256": zip_of(make_bundle(iou=0.4), {"repose.onnx": make_graph()[:-1] + b"\0"}),
        "holds the avatar": zip_of(make_bundle("other", iou=0.6)),
        "missing files": zip_of(make_bundle(iou=0.7), {"repose.other.onnx": b""}),
        "not a zip": b"no zip",
    }
    async with serve(bundle_dir=folder) as client:
        before = (await client.get("/avatars/tiny")).json()
        for message, body in bodies.items():
            answer = await client.put("/avatars/tiny", content=body, headers=ZIP)
            assert (answer.status_code, answer.json()["code"]) == (422, "bundle-invalid"), answer.text
            assert message in answer.json()["detail"]
            assert str(folder) not in answer.text
        assert (
            await client.put("/avatars/tiny", content=b"", headers={"Content-Type": "text/plain"})
        ).status_code == 415
        assert (await client.get("/avatars/tiny")).json() == before
        assert (await client.post("/avatars/tiny/repose", json=POSES)).status_code == 200
        assert len((await client.get("/avatars/tiny/versions")).json()["versions"]) == 1
    assert not work_left(folder)


BAD_IDS = [
    "..%2ftiny",
    "%2e%2e",
    "%2e%2e%2ftiny",
    "tiny%00",
    "a" * 300,
    "t%C3%AFny",
    "TINY",
    ".versions",
    "-a",
    "a%20b",
]


@pytest.mark.parametrize("avatar_id", BAD_IDS)
async def test_fault_13_ids_are_no_paths(serve: Any, folder: Path, zip_of: Any, avatar_id: str) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    async with serve(bundle_dir=folder) as client:
        for method, path, body in (
            ("GET", "", None),
            ("GET", "/mesh", None),
            ("GET", "/versions", None),
            ("PUT", "", zip_of(folder / "tiny")),
            ("DELETE", "", None),
            ("POST", "/repose", b'{"poses": [[0]]}'),
            ("POST", "/load", None),
            ("POST", "/unload", None),
        ):
            kind = ZIP if method == "PUT" else {"Content-Type": "application/json"}
            answer = await client.request(method, f"/avatars/{avatar_id}{path}", content=body, headers=kind)
            assert answer.status_code in (404, 405, 422), (method, path)
            assert answer.headers["content-type"] == "application/problem+json"
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and ".locks" not in path.parts}
    assert after == before
    assert {path.name for path in folder.parent.iterdir()} <= {"avatars", "jobs"}


@pytest.fixture
def address(folder: Path, run_server: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    app = create_app(Settings(bundle_dir=folder, threads=1, jobs_dir=tmp_path_factory.mktemp("jobs")))
    with run_server(app) as address:
        yield address


def test_fault_16_of_fifty_uploads_one_is_taken(address: Any, make_bundle: Any, zip_of: Any, folder: Path) -> None:
    body, together = zip_of(make_bundle("new-one")), threading.Barrier(50)

    def put(_: int) -> int:
        with httpx.Client(base_url=f"http://{address[0]}:{address[1]}", timeout=250) as client:
            together.wait(60)
            return client.put("/avatars/new-one", content=body, headers=ZIP | {"If-None-Match": "*"}).status_code

    with ThreadPoolExecutor(50) as pool:
        statuses = list(pool.map(put, range(50)))
    assert statuses.count(201) == 1
    assert set(statuses) <= {201, 409, 412}
    assert statuses.count(409) > 0
    read_bundle(folder / "new-one")
    assert not work_left(folder)


@pytest.mark.usefixtures("no_vetting")
async def test_fault_16_readers_see_one_version_or_the_other(
    serve: Any, folder: Path, make_bundle: Any, zip_of: Any
) -> None:
    bodies = [zip_of(make_bundle(iou=iou)) for iou in (0.1, 0.2)]
    seen: set[float] = set()
    async with serve(bundle_dir=folder) as client:
        await client.put("/avatars/tiny", content=bodies[1], headers=ZIP)
        running = True

        async def read() -> None:
            while running:
                answer = await client.get("/avatars/tiny")
                assert answer.status_code == 200, answer.text
                seen.add(answer.json()["metrics"]["iou"])
                assert (await client.post("/avatars/tiny/repose", json=POSES)).status_code == 200

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(read)
            tasks.start_soon(read)
            for turn in range(6):
                assert (await client.put("/avatars/tiny", content=bodies[turn % 2], headers=ZIP)).status_code == 200
            running = False
    assert seen == {0.1, 0.2}


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.usefixtures("no_vetting")
@pytest.mark.parametrize("step", ["os.fsync", "os.rename", "pathlib.Path.mkdir"])
async def test_fault_30_a_full_disk_is_507_and_leaves_the_old_bundle(
    serve: Any, folder: Path, make_bundle: Any, zip_of: Any, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    body = zip_of(make_bundle())
    async with serve(bundle_dir=folder) as client:
        with monkeypatch.context() as patched:
            patched.setattr(step, full)
            answer = await client.put("/avatars/tiny", content=body, headers=ZIP)
        assert (answer.status_code, answer.json()["code"]) == (507, "insufficient-storage")
        assert str(folder) not in answer.text
        assert not work_left(folder)
        assert await iou_of(client) == 0.5
        assert (await client.post("/avatars/tiny/repose", json=POSES)).status_code == 200
        assert (await client.put("/avatars/tiny", content=body, headers=ZIP)).status_code == 200


@pytest.mark.usefixtures("no_vetting")
async def test_fault_30_a_replacement_that_fails_half_way_is_taken_back(
    serve: Any, folder: Path, make_bundle: Any, zip_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = os.rename

    def no_new_folder(source: Path, target: Path) -> None:
        if ".uploads" in Path(source).parts:
            full()
        rename(source, target)

    digest = read_bundle(folder / "tiny").digest
    async with serve(bundle_dir=folder) as client:
        monkeypatch.setattr(os, "rename", no_new_folder)
        assert (await client.put("/avatars/tiny", content=zip_of(make_bundle()), headers=ZIP)).status_code == 507
        assert await iou_of(client) == 0.5
    assert read_bundle(folder / "tiny").digest == digest


async def test_fault_30_room_is_looked_for_before_the_body_is_read(
    serve: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    async with serve(bundle_dir=folder) as client:
        answer = await client.put("/avatars/tiny", content=bytes(600), headers=ZIP)
    assert answer.status_code == 507


async def test_what_is_larger_than_allowed_is_413(serve: Any, folder: Path, make_bundle: Any, zip_of: Any) -> None:
    async with serve(bundle_dir=folder, max_bundle_bytes=1000) as client:
        for body in (bytes(1001), zip_of(make_bundle())):
            answer = await client.put("/avatars/tiny", content=body, headers=ZIP)
            assert (answer.status_code, answer.json()["code"]) == (413, "body-too-large")
        chunked = await client.put("/avatars/tiny", content=chunks(bytes(100), 11), headers=ZIP)
        assert chunked.status_code == 413
    assert not work_left(folder)


async def chunks(chunk: bytes, count: int) -> AsyncIterator[bytes]:
    for _ in range(count):
        yield chunk


@pytest.mark.usefixtures("no_vetting")
async def test_an_avatar_larger_than_the_memory_is_refused(
    serve: Any, folder: Path, make_bundle: Any, zip_of: Any
) -> None:
    async with serve(bundle_dir=folder, avatar_bytes=1000) as client:
        answer = await client.put("/avatars/tiny", content=zip_of(make_bundle()), headers=ZIP)
    assert (answer.status_code, answer.json()["code"]) == (422, "bundle-invalid")


def make_uploads(folder: Path, engine: Any) -> Uploads:
    async def announce(_: str) -> None:
        return

    store = AvatarStore(folder, lambda _: engine)
    return Uploads(store, announce, max_bytes=10**9, max_avatar_bytes=10**9, kept_versions=3)


async def test_a_client_that_leaves_leaves_nothing(folder: Path, engine: Any) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield b"PK"
        raise ClientDisconnect

    uploads = make_uploads(folder, engine)
    with pytest.raises(ClientDisconnect):
        await uploads.put("tiny", broken(), "zip", Conditions())
    with anyio.move_on_after(0.1):
        await uploads.put("tiny", endless(), "zip", Conditions())
    assert not work_left(folder)
    await uploads.delete("tiny", Conditions())  # nobody holds the lock any more


async def endless() -> AsyncIterator[bytes]:
    yield b"PK"
    await anyio.sleep(60)


async def test_another_process_s_change_is_waited_for(folder: Path, engine: Any) -> None:
    uploads = make_uploads(folder, engine)
    (folder / ".locks").mkdir()
    with open(folder / ".locks" / "tiny", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UploadConflict):
            await uploads.delete("tiny", Conditions())
    await uploads.delete("tiny", Conditions())


UPLOADER = """
    import sys
    from pathlib import Path
    import anyio
    from service.avatars import AvatarStore
    from service.uploads import Conditions, Uploads

    async def body():
        yield b"PK"
        print("half", flush=True)
        await anyio.sleep(60)

    async def announce(_):
        pass

    store = AvatarStore(Path(sys.argv[1]), None)
    uploads = Uploads(store, announce, max_bytes=10**9, max_avatar_bytes=10**9, kept_versions=3)
    anyio.run(uploads.put, "tiny", body(), "zip", Conditions())
"""


async def test_fault_32_a_kill_in_the_middle_is_swept_at_the_next_start(serve: Any, folder: Path) -> None:
    before = read_bundle(folder / "tiny").digest
    command = [sys.executable, "-c", textwrap.dedent(UPLOADER), str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "half\n"
        (place,) = work_left(folder)
        async with serve(bundle_dir=folder) as client:
            # Its process lives: nobody takes its work away, or the avatar it works on.
            assert work_left(folder) == [place]
            assert (await client.delete("/avatars/tiny")).status_code == 409
        process.send_signal(signal.SIGKILL)
        process.wait(20)
    assert work_left(folder) == [place]
    async with serve(bundle_dir=folder) as client:
        assert not work_left(folder)
        assert (await client.post("/avatars/tiny/repose", json=POSES)).status_code == 200
        assert (await client.get("/avatars/tiny")).headers["etag"] == f'"{before}"'


def test_fault_32_a_kill_between_two_renames_gives_the_old_avatar_back(folder: Path, engine: Any) -> None:
    digest = read_bundle(folder / "tiny").digest
    (folder / ".versions" / "tiny").mkdir(parents=True)
    (folder / "tiny").rename(folder / ".versions" / "tiny" / digest)
    make_uploads(folder, engine).sweep()
    assert read_bundle(folder / "tiny").digest == digest


def test_versions_are_listed_while_others_replace_them(folder: Path, engine: Any) -> None:
    digest, uploads = read_bundle(folder / "tiny").digest, make_uploads(folder, engine)
    kept, ended = folder / ".versions" / "tiny", threading.Event()

    def churn() -> None:
        while not ended.is_set():
            (kept / "older").mkdir(parents=True)
            shutil.rmtree(kept)

    other = threading.Thread(target=churn)
    other.start()
    try:
        for _ in range(2000):
            assert uploads.versions("tiny")[0].digest == digest
    finally:
        ended.set()
        other.join()


def test_a_folder_that_cannot_be_written_is_served_all_the_same(
    folder: Path, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    make_uploads(folder, engine).sweep()
    assert [path.name for path in folder.iterdir()] == ["tiny"]


def test_the_sweep_touches_nothing_else(folder: Path, engine: Any) -> None:
    (folder / ".tiny.new-0123").mkdir()  # a trainer's export at work
    (folder / ".uploads" / "left").mkdir(parents=True)
    make_uploads(folder, engine).sweep()
    assert {path.name for path in folder.iterdir()} == {"tiny", ".tiny.new-0123", ".uploads", ".locks"}
    assert not work_left(folder)
