"""Rows of the fault table about what is posted: each fault is provoked over HTTP, and the next request is served."""

import gzip
import io
import json
import struct
import threading
import tracemalloc
import zipfile
from typing import Any

import httpx
import numpy as np
import pytest

from service.answers import FRAMES

pytestmark = pytest.mark.anyio
URL = "/avatars/tiny/repose"
GOOD = {"poses": [[0.0] * 72] * 3}
JSON, NPZ = {"Content-Type": "application/json"}, {"Content-Type": "application/x-npz"}


def npz(**arrays: Any) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def claiming(shape: str, content: bytes = b"", members: int = 1) -> bytes:
    """An archive whose `poses` says it has `shape`, deflated."""
    header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}".encode()
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("poses.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + content)
        for n in range(1, members):
            archive.writestr(f"{n}.npy", b"")
    return file.getvalue()


async def refused(
    client: httpx.AsyncClient, content: Any, kind: dict[str, str], status: int, code: str, query: str = ""
) -> dict[str, Any]:
    """Post it, see the problem, and see that nothing else has changed."""
    answer = await client.post(URL + query, content=content, headers=kind)
    problem = answer.json()
    assert (answer.status_code, problem["code"]) == (status, code), problem
    assert answer.headers["content-type"] == "application/problem+json"
    after = await client.post(URL, json=GOOD)
    assert (after.status_code, len(after.content)) == (200, 3 * (48 + 12 * 368))
    return problem


def pose_with(value: Any) -> dict[str, Any]:
    return {"poses": [[0.0] * 72, [0.0] * 30 + [value] + [0.0] * 41]}


async def test_fault_01_a_number_that_is_not_finite(serve: Any) -> None:
    spoilt = np.zeros((2, 72))
    spoilt[1, 30] = np.inf
    async with serve() as client:
        for content, kind in (
            (json.dumps(pose_with(float("nan"))), JSON),
            (json.dumps(pose_with(7.25)).replace("7.25", "1e999"), JSON),
            (npz(poses=spoilt), NPZ),
        ):
            problem = await refused(client, content, kind, 422, "pose-not-finite")
            assert (problem["frame"], problem["joint"]) == (1, 10)
        far = json.dumps(GOOD | {"translations": [[0, 0, 0], [0, float("nan"), 0], [0, 0, 0]]})
        assert (await refused(client, far, JSON, 422, "pose-not-finite"))["frame"] == 1


@pytest.mark.parametrize("shape", [(2, 71), (2, 75), (2, 25, 3), (2, 24, 3, 2), (72,), (2, 1, 24, 3)])
async def test_fault_02_a_shape_that_is_not_accepted(serve: Any, shape: tuple[int, ...]) -> None:
    async with serve() as client:
        problem = await refused(
            client, json.dumps({"poses": np.zeros(shape).tolist()}), JSON, 422, "pose-shape-invalid"
        )
        assert "63|66|69|72|156|165" in problem["detail"]


async def test_fault_02_ragged_rows(serve: Any) -> None:
    async with serve() as client:
        await refused(client, json.dumps({"poses": [[0.0] * 72, [0.0] * 69]}), JSON, 422, "pose-shape-invalid")


@pytest.mark.parametrize(
    ("poses", "code"),
    [
        (2 * np.tile(np.eye(3), (2, 24, 1, 1)), "pose-not-rotation"),
        (np.zeros((2, 24, 4)), "pose-not-rotation"),
        (np.ones((2, 24, 6)), "pose-not-rotation"),
        (np.full((2, 72), 12.0), "pose-out-of-range"),
    ],
)
async def test_fault_03_numbers_that_are_no_rotations(serve: Any, poses: Any, code: str) -> None:
    async with serve() as client:
        assert (await refused(client, npz(poses=poses), NPZ, 422, code))["frame"] == 0
        normalised = await client.post(URL + "?normalize=true", content=npz(poses=poses), headers=NPZ)
        nothing_to_go_by = poses.shape[2:] in ((4,), (6,))
        assert normalised.status_code == (422 if nothing_to_go_by else 200)


async def test_fault_03_a_translation_of_more_than_10_km(serve: Any) -> None:
    async with serve() as client:
        far = npz(poses=np.zeros((2, 72)), trans=np.array([[0, 0, 0], [0, 1.1e4, 0]]))
        assert (await refused(client, far, NPZ, 422, "pose-out-of-range"))["frame"] == 1


async def test_fault_04_no_frames(serve: Any) -> None:
    async with serve() as client:
        await refused(client, '{"poses": []}', JSON, 422, "pose-empty")
        await refused(client, npz(poses=np.zeros((0, 72))), NPZ, 422, "pose-empty")


async def test_fault_05_more_frames_than_a_request_may_have(serve: Any) -> None:
    async with serve(max_frames=5) as client:
        problem = await refused(client, npz(poses=np.zeros((6, 72))), NPZ, 413, "too-many-frames")
        assert problem["limit_frames"] == 5
        assert "/jobs" in problem["detail"]
        await refused(client, npz(poses=np.zeros((4, 72)), fps=30), NPZ, 413, "too-many-frames", "?target_fps=60")


async def test_fault_05_frames_that_are_not_wanted_take_no_memory(serve: Any) -> None:
    body = npz(poses=np.zeros((100_000, 72), np.float16))
    async with serve(max_frames=100) as client:
        tracemalloc.start()
        await refused(client, body, NPZ, 413, "too-many-frames")
        few = await client.post(URL + "?every=1000", content=body, headers=NPZ)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert few.headers["reposer-frames"] == "100"
    assert peak < 6 * len(body)  # float64 matrices of all frames would be 170 times the body


async def test_fault_06_bodies_that_are_too_long_or_compressed(serve: Any) -> None:
    sent = 0

    async def flood() -> Any:
        nonlocal sent
        while sent < 10**7:
            sent += 1000
            yield b" " * 1000

    async with serve(max_npz_bytes=100_000, max_json_bytes=50_000) as client:
        await refused(client, flood(), NPZ, 413, "body-too-large")
        assert sent <= 110_000
        await refused(client, b" " * 100_001, NPZ, 413, "body-too-large")
        bomb = gzip.compress(bytes(10**7))
        await refused(client, bomb, JSON | {"Content-Encoding": "gzip"}, 415, "unsupported-media-type")


async def test_fault_07_pickles(serve: Any) -> None:
    class Malice:
        def __reduce__(self) -> Any:
            return pytest.fail, ("unpickled",)

    file = io.BytesIO()
    np.savez(file, poses=np.array([Malice()], dtype=object))
    async with serve() as client:
        await refused(client, file.getvalue(), NPZ, 422, "npz-unsafe")
        await refused(client, b"\x80\x04N.", NPZ, 422, "npz-unsafe")


@pytest.mark.parametrize(
    ("archive", "status", "code"),
    [
        (claiming("(1099511627775, 1)"), 413, "body-too-large"),
        (claiming("(3, 72)", bytes(10**8)), 422, "npz-invalid"),
        (claiming("(3, 72)", bytes(8 * 3 * 72), members=20_000), 422, "npz-invalid"),
    ],
)
async def test_fault_08_archives_that_claim_or_hold_too_much(
    serve: Any, archive: bytes, status: int, code: str
) -> None:
    async with serve(max_npz_bytes=4 << 20) as client:
        tracemalloc.start()
        await refused(client, archive, NPZ, status, code)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 30 << 20


async def test_fault_09_members_with_a_path_are_not_looked_at(serve: Any) -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("../../poses.npy", b"\x80\x04N.")
    async with serve() as client:
        await refused(client, file.getvalue(), NPZ, 422, "pose-invalid")
        with zipfile.ZipFile(file, "a") as archive:
            array = io.BytesIO()
            np.save(array, np.zeros((3, 72)))
            archive.writestr("poses.npy", array.getvalue())
        assert (await client.post(URL, content=file.getvalue(), headers=NPZ)).status_code == 200


async def test_fault_33_json_above_2_mb_is_refused_before_it_is_parsed(serve: Any, monkeypatch: Any) -> None:
    async with serve() as client:
        monkeypatch.setattr("service.reposing.parse_json", lambda *_, **__: pytest.fail("parsed"))
        answer = await client.post(URL, content=b" " * (2 << 20) + b"{}", headers=JSON)
        assert (answer.status_code, answer.json()["code"]) == (413, "body-too-large")


async def test_fault_33_json_is_parsed_in_a_worker_thread(serve: Any, monkeypatch: Any) -> None:
    threads: list[str] = []
    loads = json.loads

    def remembering(body: bytes) -> Any:
        threads.append(threading.current_thread().name)
        return loads(body)

    async with serve() as client:
        monkeypatch.setattr("service.poses.json.loads", remembering)
        await client.post(URL, content=json.dumps(GOOD), headers=JSON | {"Accept": FRAMES})
    assert threads
    assert "MainThread" not in threads


async def test_fault_34_deep_json(serve: Any) -> None:
    async with serve() as client:
        await refused(client, "[" * 100_000, JSON, 400, "json-broken")
        await refused(client, '{"poses":' * 100_000, JSON, 400, "json-broken")
        await refused(client, '{"poses":' + "[" * 500 + "]" * 500 + "}", JSON, 422, "pose-shape-invalid")


@pytest.mark.parametrize("fps", ["0", "-1", "1e9", "nan", "inf", "thirty", ""])
async def test_fault_37_a_rate_that_is_none(serve: Any, fps: str) -> None:
    async with serve() as client:
        for name in ("fps", "target_fps"):
            await refused(client, json.dumps(GOOD), JSON, 422, "option-invalid", f"?{name}={fps}")
        number = {"nan": "NaN", "inf": "Infinity", "thirty": '"30"', "": "true"}.get(fps, fps)
        await refused(client, json.dumps(GOOD)[:-1] + f', "fps": {number}}}', JSON, 422, "option-invalid")
