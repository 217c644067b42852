"""`POST /avatars/{id}/repose`: the same motion is the same surface, and every bad request its own problem."""

import asyncio
import errno
import io
import json
import threading
from typing import Any

import httpx
import numpy as np
import pytest

from service import reposing
from service.answers import FRAMES, FRAMES_Q16, FRAMES_Q16D, GLB, NDJSON, NPZ, SKINNED
from service.bundle.glb import read_mesh
from service.bundle.skeleton import axis_angle_to_matrix
from service.errors import Overloaded
from service.formats.morph import read_animated_glb
from service.frames import decode_stream

pytestmark = pytest.mark.anyio
URL = "/avatars/tiny/repose"


def npz(**arrays: Any) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


async def post_npz(client: httpx.AsyncClient, query: str = "", accept: str = FRAMES, **arrays: Any) -> httpx.Response:
    headers = {"Content-Type": "application/x-npz", "Accept": accept}
    return await client.post(URL + query, content=npz(**arrays), headers=headers)


def surface(answer: httpx.Response) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    return np.stack([frame.vertices for frame in decode_stream([answer.content])])


async def test_vertices_are_those_of_an_independent_skinning(
    serve: Any, skeleton: Any, engine: Any, motion: Any
) -> None:
    rotations = axis_angle_to_matrix(motion["poses"].reshape(-1, 24, 3))
    async with serve() as client:
        vertices = surface(await post_npz(client, **motion))
        mesh = read_mesh((await client.get("/avatars/tiny/mesh")).content)
    bones, roots = skeleton.bone_transforms(rotations), skeleton.root_transforms(rotations, motion["trans"])
    np.testing.assert_allclose(vertices, engine.repose(mesh.vertices, bones, roots), rtol=0, atol=1e-5)


async def test_the_same_motion_is_the_same_surface(serve: Any, skeleton: Any, motion: Any) -> None:
    poses, trans = motion["poses"], motion["trans"]
    matrices = axis_angle_to_matrix(poses.reshape(-1, 24, 3))
    back = np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0]])  # y up -> z up
    pelvis = skeleton.rest_joints[0].astype(np.float64)
    z_matrices, z_trans = matrices.copy(), (trans + pelvis) @ back.T - pelvis
    z_matrices[:, 0] = back @ matrices[:, 0]
    async with serve(cache_bytes=0) as client:
        expected = surface(await post_npz(client, **motion))
        others = {
            "json": {"poses": poses.tolist(), "translations": trans.tolist()},
            "by joint": {"poses": poses.reshape(-1, 24, 3).tolist(), "translations": trans.tolist()},
            "matrices": {"poses": matrices.tolist(), "translations": trans.tolist(), "rotation": "matrix"},
            "centimetres": {"poses": poses.tolist(), "translations": (100 * trans).tolist(), "units": "cm"},
            "z up": {"poses": z_matrices.tolist(), "translations": z_trans.tolist(), "up_axis": "z"},
        }
        for name, document in others.items():
            found = surface(await client.post(URL, json=document))
            np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5, err_msg=name)
        z_up = await post_npz(client, "?up_axis=z&units=cm", poses=z_matrices, trans=100 * z_trans)
        np.testing.assert_allclose(surface(z_up), expected, rtol=0, atol=2e-5)
        applied = {name: z_up.headers[f"reposer-{name}"] for name in ("up-axis", "units", "rotation", "frames", "fps")}
    assert applied == {"up-axis": "z", "units": "cm", "rotation": "matrix", "frames": "7", "fps": "30"}


async def test_all_formats_hold_the_same_surface(serve: Any, motion: Any) -> None:
    async with serve() as client:
        stream = surface(await post_npz(client, **motion))
        as_npz = await post_npz(client, accept=NPZ, mocap_framerate=25, **motion)
        as_glb = await post_npz(client, accept=GLB, mocap_framerate=25, **motion)
        still = read_mesh((await client.get("/avatars/tiny/mesh")).content)
    with np.load(io.BytesIO(as_npz.content), allow_pickle=False) as arrays:
        np.testing.assert_array_equal(arrays["vertices"], stream)
        np.testing.assert_array_equal(arrays["faces"], still.faces)
        assert arrays["fps"] == 25
    mesh, vertices, times = read_animated_glb(as_glb.content)
    np.testing.assert_array_equal(mesh.faces, still.faces)
    np.testing.assert_array_equal(mesh.vertices, still.vertices)
    np.testing.assert_allclose(vertices, stream, rtol=0, atol=1e-6)
    np.testing.assert_allclose(np.diff(times), 1 / 25, atol=1e-6)


async def test_hands_and_face_are_left_out_with_a_warning(serve: Any, motion: Any) -> None:
    wide = np.concatenate([motion["poses"][:, :66], np.full((7, 90), np.nan)], axis=1)  # what is not used may be NaN
    flat = motion["poses"].copy()
    flat[:, 66:] = 0
    async with serve() as client:
        answer = await post_npz(client, poses=wide)
        np.testing.assert_array_equal(surface(answer), surface(await post_npz(client, poses=flat)))
        assert "SMPL-H" in answer.headers["warning"]


@pytest.mark.parametrize(
    ("accept", "given"),
    [
        (None, FRAMES),
        ("*/*", FRAMES),
        ("application/*", FRAMES),
        ("model/*", GLB),
        ("text/html, model/gltf-binary;q=0.5, application/x-npz;q=0.8", NPZ),
        ("*/*, application/vnd.reposer.frames;q=0", NPZ),
        ("MODEL/GLTF-BINARY", GLB),
        (f"{FRAMES};codec=q16", FRAMES_Q16),
        (f"{FRAMES}; codec=q16d", FRAMES_Q16D),
        (f"{FRAMES};codec=f32", FRAMES),
        (f"{FRAMES};codec=q16;q=0.1, {NPZ};q=0.2", NPZ),
        (f"{FRAMES};codec=q8, {NDJSON}", NDJSON),
    ],
)
async def test_accept_chooses_the_format(serve: Any, motion: Any, accept: str | None, given: str) -> None:
    async with serve() as client:
        client.headers.pop("accept")
        headers = {"Content-Type": "application/octet-stream"} | ({"Accept": accept} if accept else {})
        answer = await client.post(URL, content=npz(**motion), headers=headers)
        assert (answer.status_code, answer.headers["content-type"]) == (200, given)


def pose_with(value: Any, frame: int = 1, column: int = 10) -> list[list[Any]]:
    poses: list[list[Any]] = [[0.0] * 72 for _ in range(3)]
    poses[frame][column] = value
    return poses


ZEROS = [[0.0] * 72] * 3
BAD_JSON: dict[str, tuple[Any, int, str]] = {
    "NaN": ({"poses": pose_with(float("nan"))}, 422, "pose-not-finite"),
    "Infinity": ({"poses": pose_with(float("-inf"))}, 422, "pose-not-finite"),
    "1e999": (json.dumps({"poses": pose_with(7.25)}).replace("7.25", "1e999"), 422, "pose-not-finite"),
    "10**400": ({"poses": pose_with(10**400)}, 422, "pose-not-finite"),
    "NaN translation": ({"poses": ZEROS, "translations": [[0, 0, float("nan")]] * 3}, 422, "pose-not-finite"),
    "text": ({"poses": pose_with("1.5")}, 422, "pose-not-number"),
    "true": ({"poses": pose_with(True)}, 422, "pose-not-number"),
    "null": ({"poses": pose_with(None)}, 422, "pose-not-number"),
    "object": ({"poses": pose_with({})}, 422, "pose-not-number"),
    "poses as text": ({"poses": "zeros"}, 422, "pose-not-number"),
    "poses as a number": ({"poses": 1.0}, 422, "pose-shape-invalid"),
    "width 71": ({"poses": [[0.0] * 71]}, 422, "pose-shape-invalid"),
    "width 75": ({"poses": [[0.0] * 75]}, 422, "pose-shape-invalid"),
    "one flat row": ({"poses": [0.0] * 72}, 422, "pose-shape-invalid"),
    "25 joints": ({"poses": np.zeros((2, 25, 3)).tolist()}, 422, "pose-shape-invalid"),
    "zero quaternions": ({"poses": np.zeros((2, 24, 4)).tolist()}, 422, "pose-not-rotation"),
    "zero columns": ({"poses": np.zeros((2, 24, 6)).tolist()}, 422, "pose-not-rotation"),
    "five numbers a joint": ({"poses": np.zeros((2, 24, 5)).tolist()}, 422, "pose-shape-invalid"),
    "said quaternions": ({"poses": ZEROS, "rotation": "quat_wxyz"}, 422, "pose-shape-invalid"),
    "euler": ({"poses": ZEROS, "rotation": "euler"}, 422, "option-invalid"),
    "body frame": ({"poses": ZEROS, "frame": "body"}, 422, "option-invalid"),
    "ragged": ({"poses": [[0.0] * 72, [0.0] * 69]}, 422, "pose-shape-invalid"),
    "ragged depth": ({"poses": [[0.0] * 72, 0.0]}, 422, "pose-shape-invalid"),
    "five deep": ({"poses": np.zeros((1, 1, 24, 3, 3)).tolist()}, 422, "pose-shape-invalid"),
    "other length of translations": ({"poses": ZEROS, "translations": [[0, 0, 0]]}, 422, "pose-shape-invalid"),
    "said matrix": ({"poses": ZEROS, "rotation": "matrix"}, 422, "pose-shape-invalid"),
    "no frames": ({"poses": []}, 422, "pose-empty"),
    "frames of nothing": ({"poses": [[], []]}, 422, "pose-shape-invalid"),
    "too many frames": ({"poses": [[0.0] * 63] * 51}, 413, "too-many-frames"),
    "body too large": ({"poses": [[0.123456789] * 72] * 200}, 413, "body-too-large"),
    "scaled matrix": ({"poses": (2 * np.tile(np.eye(3), (1, 24, 1, 1))).tolist()}, 422, "pose-not-rotation"),
    "mirror": ({"poses": (-np.tile(np.eye(3), (1, 24, 1, 1))).tolist()}, 422, "pose-not-rotation"),
    "huge matrix": ({"poses": (1e300 * np.tile(np.eye(3), (1, 24, 1, 1))).tolist()}, 422, "pose-not-rotation"),
    "angle above 4 pi": ({"poses": pose_with(12.6)}, 422, "pose-out-of-range"),
    "angle of 1e308": ({"poses": pose_with(1e308)}, 422, "pose-out-of-range"),
    "far away": ({"poses": ZEROS, "translations": [[0, 0, 10_001]] * 3}, 422, "pose-out-of-range"),
    "fps 0": ({"poses": ZEROS, "fps": 0}, 422, "option-invalid"),
    "fps 1e9": ({"poses": ZEROS, "fps": 1e9}, 422, "option-invalid"),
    "fps NaN": ({"poses": ZEROS, "fps": float("nan")}, 422, "option-invalid"),
    "fps true": ({"poses": ZEROS, "fps": True}, 422, "option-invalid"),
    "x up": ({"poses": ZEROS, "up_axis": "x"}, 422, "option-invalid"),
    "unhashable axis": ({"poses": ZEROS, "up_axis": ["y"]}, 422, "option-invalid"),
    "feet": ({"poses": ZEROS, "units": "ft"}, 422, "option-invalid"),
    "unknown key": ({"poses": ZEROS, "pose": ZEROS}, 422, "option-invalid"),
    "no poses": ({"translations": [[0, 0, 0]]}, 422, "pose-invalid"),
    "a list": (ZEROS, 422, "pose-invalid"),
    "broken": ('{"poses": [[0.0', 400, "json-broken"),
    "nothing": ("", 400, "json-broken"),
    "not UTF-8": (b"\xff\xfe\xfa", 400, "json-broken"),
    "deep": ("[" * 100_000, 400, "json-broken"),
    "a number of 5,000 digits": ('{"poses": [[' + "9" * 5000 + "]]}", 400, "json-broken"),
}


def check_problem(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert answer.headers["content-type"] == "application/problem+json"
    problem = json.loads(answer.content, parse_constant=lambda text: pytest.fail(f"{text} in a problem"))
    assert (answer.status_code, problem["status"], problem["code"]) == (status, status, code), problem
    assert problem["type"] == f"urn:reposer:problem:{code}"
    assert problem["title"]
    return problem


@pytest.mark.parametrize("fault", BAD_JSON)
async def test_bad_json_has_its_own_problem_and_is_not_cached(serve: Any, fault: str) -> None:
    document, status, code = BAD_JSON[fault]
    body = document if isinstance(document, str | bytes) else json.dumps(document)
    async with serve(max_frames=50, max_json_bytes=130_000) as client:
        for _ in range(2):
            answer = await client.post(URL, content=body, headers={"Content-Type": "application/json"})
            problem = check_problem(answer, status, code)
            assert problem["detail"]
            assert "x-cache" not in answer.headers
            assert answer.headers["cache-control"] == "no-store"
        assert len(client.app.state.reposing.cache) == 0


async def test_a_nan_is_located(serve: Any) -> None:
    async with serve() as client:
        answer = await client.post(URL, content=json.dumps({"poses": pose_with(float("nan"), frame=2, column=55)}),
                                   headers={"Content-Type": "application/json"})  # fmt: skip
    problem = check_problem(answer, 422, "pose-not-finite")
    assert (problem["frame"], problem["joint"]) == (2, 18)
    assert "left_elbow" in problem["detail"]


BAD_REQUESTS: dict[str, tuple[str, dict[str, str], int, str]] = {
    "unknown avatar": ("/avatars/nobody/repose", {}, 404, "avatar-not-found"),
    "traversal": ("/avatars/..%2ftiny/repose", {}, 404, "not-found"),
    "dots": ("/avatars/%2e%2e/repose", {}, 404, "avatar-not-found"),
    "NUL": ("/avatars/tiny%00/repose", {}, 404, "not-found"),
    "long": (f"/avatars/{'a' * 300}/repose", {}, 404, "avatar-not-found"),
    "unicode": ("/avatars/t%C3%AFny/repose", {}, 404, "not-found"),
    "unknown lod": (URL + "?lod=ultra", {}, 404, "lod-not-found"),
    "axis of the query": (URL + "?up_axis=x", {}, 422, "option-invalid"),
    "fps of the query": (URL + "?fps=nan", {}, 422, "option-invalid"),
    "fps at infinity": (URL + "?fps=1e999", {}, 422, "option-invalid"),
    "every 0": (URL + "?every=0", {}, 422, "option-invalid"),
    "misspelt option": (URL + "?up_axs=z", {}, 422, "option-invalid"),
    "html": (URL, {"Accept": "text/html"}, 406, "not-acceptable"),
    "q=0": (URL, {"Accept": "*/*;q=0"}, 406, "not-acceptable"),
    "a form": (URL, {"Content-Type": "application/x-www-form-urlencoded"}, 415, "unsupported-media-type"),
    "no type": (URL, {"Content-Type": ""}, 415, "unsupported-media-type"),
    "gzip": (URL, {"Content-Encoding": "gzip"}, 415, "unsupported-media-type"),
}


@pytest.mark.parametrize("fault", BAD_REQUESTS)
async def test_bad_requests_have_their_own_problem(serve: Any, fault: str) -> None:
    url, headers, status, code = BAD_REQUESTS[fault]
    async with serve() as client:
        body = json.dumps({"poses": ZEROS})
        answer = await client.post(url, content=body, headers={"Content-Type": "application/json"} | headers)
        check_problem(answer, status, code)
        assert len(client.app.state.reposing.cache) == 0


async def test_a_pickle_in_an_npz_is_refused_and_not_run(serve: Any) -> None:
    class Malice:
        def __reduce__(self) -> Any:
            return pytest.fail, ("unpickled",)

    async with serve() as client:
        file = io.BytesIO()
        np.savez(file, poses=np.array([Malice(), 0], dtype=object))
        for body in (file.getvalue(), b"\x80\x04N."):
            answer = await client.post(URL, content=body, headers={"Content-Type": "application/octet-stream"})
            check_problem(answer, 422, "npz-unsafe")


async def test_a_body_without_length_is_counted_while_it_is_read(serve: Any) -> None:
    sent = 0

    async def long() -> Any:
        nonlocal sent
        while sent < 10**6:
            sent += 1000
            yield b" " * 1000

    async with serve(max_npz_bytes=50_000) as client:
        answer = await client.post(URL, content=long(), headers={"Content-Type": "application/x-npz"})
    check_problem(answer, 413, "body-too-large")
    assert sent <= 52_000


async def test_a_glb_of_more_than_255_frames_is_refused_with_a_hint(serve: Any) -> None:
    async with serve() as client:
        for count, status in ((255, 200), (256, 413)):
            answer = await post_npz(client, accept=GLB, poses=np.zeros((count, 72)))
            assert answer.status_code == status
        assert "every=2" in check_problem(answer, 413, "too-many-frames")["detail"]
        answer = await post_npz(client, "?every=2", accept=GLB, poses=np.zeros((256, 72)))
        assert answer.headers["reposer-frames"] == "128"


async def test_other_paths_and_methods_are_problems_too(serve: Any) -> None:
    async with serve() as client:
        check_problem(await client.get("/nothing"), 404, "not-found")
        answer = await client.get(URL)
        check_problem(answer, 405, "method-not-allowed")
        assert answer.headers["allow"] == "POST"


async def test_answers_are_cached_by_what_they_mean(serve: Any, engine: Any, motion: Any) -> None:
    async with serve(make_engine=lambda _: engine) as client:
        first = await post_npz(client, **motion)
        computed = len(engine.batches)
        as_json = {"poses": motion["poses"].tolist(), "translations": motion["trans"].tolist()}
        again = await client.post(URL, json=as_json)
        assert (first.headers["x-cache"], again.headers["x-cache"]) == ("miss", "hit")
        assert first.content == again.content
        assert len(engine.batches) == computed
        moved = motion | {"trans": motion["trans"] + 1e-5}
        for query, accept, arrays in (("?lod=preview", FRAMES, motion), ("", NPZ, motion), ("", FRAMES, moved)):
            assert (await post_npz(client, query, accept, **arrays)).headers["x-cache"] == "miss"
        faster = await post_npz(client, accept=NPZ, fps=60, **motion)
        assert faster.headers["x-cache"] == "miss"


@pytest.mark.parametrize(
    ("spoil", "status", "code"),
    [
        (lambda v: np.where(v == v[0, 5, 1], np.float32(np.nan), v), 500, "model-output-invalid"),
        (lambda v: v[:, :-1], 500, "model-output-invalid"),
        (lambda v: v.astype(np.float64), 500, "model-output-invalid"),
        (lambda v: 1 // 0, 503, "engine-failed"),
    ],
)
async def test_a_failing_engine_is_a_5xx_without_its_secrets(
    serve: Any, engine: Any, motion: Any, spoil: Any, status: int, code: str
) -> None:
    far = motion | {"trans": motion["trans"] + 20}
    async with serve(make_engine=lambda _: engine) as client:
        engine.spoil = lambda v: spoil(v) if v.max() > 10 else v  # the engine is sound when it is looked at
        for accept in (FRAMES, NPZ, GLB):
            problem = check_problem(await post_npz(client, accept=accept, **far), status, code)
            assert "detail" not in problem
        engine.spoil = lambda vertices: vertices
        assert (await post_npz(client, **far)).headers["x-cache"] == "miss"


async def test_only_a_short_npz_is_parsed_on_the_event_loop(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []

    def parse(*arguments: Any, **options: Any) -> Any:
        try:
            return parse_npz(*arguments, **options)
        finally:
            threads.append(threading.current_thread() is threading.main_thread())

    parse_npz = reposing.parse_npz
    monkeypatch.setattr(reposing, "parse_npz", parse)
    still, packed = np.zeros((400, 72), np.float32), io.BytesIO()
    np.savez_compressed(packed, poses=still)
    assert len(packed.getvalue()) < reposing.SHORT_BYTES < still.nbytes
    async with serve() as client:

        async def where(body: bytes, query: str = "") -> list[bool]:
            threads.clear()
            answer = await client.post(
                f"{URL}?{query}", content=body, headers={"Content-Type": "application/x-npz", "Accept": FRAMES}
            )
            assert answer.status_code == 200, answer.text
            return list(threads)

        assert await where(npz(poses=still[:60])) == [True]
        assert await where(npz(poses=still)) == [False]
        assert await where(packed.getvalue()) == [True, False]  # looked at, and left to a thread
        assert await where(npz(poses=still[:3]), "fps=1&target_fps=120") == [False]


async def test_a_refusal_asks_neither_redis_nor_another_replica(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise Overloaded("others are served")

    async def asked(*_: Any) -> None:
        raise AssertionError("Redis was asked")

    still = np.zeros((2, 72), np.float32)
    async with serve() as client:
        assert (await post_npz(client, poses=still)).status_code == 200
        monkeypatch.setattr(client.app.state.room, "check_admission", full)
        # What is at hand, and what is made from the poses alone, is given however much waits.
        assert (await post_npz(client, poses=still)).headers["X-Cache"] == "hit"
        assert (await post_npz(client, poses=still, accept=SKINNED)).status_code == 200
        monkeypatch.setattr(client.app.state.reposing.cache, "get", asked)
        assert (await post_npz(client, poses=still + 0.1)).status_code == 503


class _FullDisk(io.BytesIO):
    """A file on a disk that has room for the first frames only."""

    def write(self, data: Any) -> int:
        if self.tell() > 10_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data)


async def test_fault_30_a_file_that_the_disk_has_no_room_for_is_507(
    serve: Any, motion: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serve() as client:
        with monkeypatch.context() as full:
            full.setattr("service.formats.morph.tempfile.TemporaryFile", _FullDisk)
            answer = await post_npz(client, accept=GLB, **motion)
        assert (answer.status_code, answer.json()["code"]) == (507, "insufficient-storage")
        assert (await post_npz(client, accept=GLB, **motion)).status_code == 200


async def test_a_file_that_cannot_be_finished_is_refused_and_not_broken_off(
    serve: Any, engine: Any, motion: Any
) -> None:
    async with serve(make_engine=lambda _: engine, batch_vertex_frames=1) as client:
        engine.spoil = lambda v: v * np.float32(np.nan) if len(engine.batches) >= len(motion["poses"]) else v
        engine.batches.clear()
        answer = await post_npz(client, accept=GLB, **motion)
        assert (answer.status_code, answer.json()["code"]) == (500, "model-output-invalid")


async def test_fault_20_a_file_is_made_for_nobody_who_has_gone(
    serve: Any, engine: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async with serve(make_engine=lambda _: engine, batch_vertex_frames=1) as client:
        computed = len(engine.batches)
        messages = [{"type": "http.request", "body": npz(poses=np.zeros((200, 72), np.float32))}]

        async def receive() -> Any:
            if messages:
                return messages.pop()
            while len(engine.batches) - computed <= 5:
                await asyncio.sleep(0.001)
            return {"type": "http.disconnect"}

        async def send(_: Any) -> None: ...

        headers = [(b"content-type", b"application/x-npz"), (b"accept", GLB.encode())]
        scope = {"type": "http", "method": "POST", "path": URL, "query_string": b"", "headers": headers}
        scope |= {"asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": "http", "root_path": "", "state": {}}
        with caplog.at_level("INFO", "service.access"):
            await client.app(scope, receive, send)
        assert 5 < len(engine.batches) - computed < 50
        assert not client.app.state.room._sequences
        assert [vars(record)["status"] for record in caplog.records if record.name == "service.access"] == [499]


@pytest.mark.parametrize("sizes", [[], [0], [1], [10, 0, 20], [400_000] * 17, [1, 3_000_000, 5], [600_000, 0]])
async def test_what_is_kept_lies_in_blocks(sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = [np.random.default_rng(n).bytes(size) for n, size in enumerate(sizes)]
    copy, copied_here = reposing._apart, []

    def apart(pieces: list[bytes]) -> memoryview:
        if threading.current_thread() is threading.main_thread():
            copied_here.append(sum(map(len, pieces)))
        return copy(pieces)

    monkeypatch.setattr(reposing, "_apart", apart)
    kept = reposing._Kept(sum(sizes))
    for piece in pieces:
        await kept.add(piece)
    blocks = kept.blocks()
    assert blocks is not None
    assert b"".join(blocks) == b"".join(pieces)
    # The event loop has but the end to copy.
    assert sum(copied_here) < 2 * reposing.BLOCK_BYTES + max(sizes, default=0)
    assert len(copied_here) <= 1
    # A system has room for some ten thousand that lie apart: a short answer is none of them.
    large = [len(block) >= reposing.BLOCK_BYTES for block in blocks]
    assert [isinstance(block, memoryview) and block.readonly for block in blocks] == large
    assert all(large) or len(blocks) == 1


@pytest.mark.parametrize("sizes", [[], [1], [10], [11, 1], [0, 20, 21, 9]])
async def test_what_was_kept_leaves_whole_and_in_slices(sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reposing, "SLICE_BYTES", 10)
    blocks = tuple(np.random.default_rng(n).bytes(size) for n, size in enumerate(sizes))
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    await reposing._Whole(blocks, "a/b", {"ETag": "x"})({"type": "http"}, send, send)
    start, *bodies = sent
    headers = {b"etag": b"x", b"content-type": b"a/b", b"content-length": str(sum(sizes)).encode()}
    assert (start["type"], start["status"], dict(start["headers"])) == ("http.response.start", 200, headers)
    assert b"".join(body["body"] for body in bodies) == b"".join(blocks)
    assert max(len(body["body"]) for body in bodies) <= 10
    assert [body.get("more_body", False) for body in bodies] == [True] * (len(bodies) - 1) + [False]


async def test_an_answer_that_cannot_be_kept_is_given_all_the_same(
    serve: Any, motion: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []

    def full(pieces: list[bytes]) -> memoryview:
        tried.append(len(pieces))
        raise MemoryError

    async with serve() as client:
        whole = (await post_npz(client, **motion)).content
    monkeypatch.setattr(reposing, "_apart", full)
    monkeypatch.setattr(reposing, "BLOCK_BYTES", 1)
    async with serve(batch_vertex_frames=1) as client:
        for n in (1, 2):
            answer = await post_npz(client, **motion)
            assert (answer.headers["X-Cache"], answer.content) == ("miss", whole)
            assert len(tried) == n
    kept = reposing._Kept(100)
    await kept.add(b"all of it")  # and no memory only at the end
    assert kept.blocks() is None


@pytest.mark.parametrize("expected", [0, 51])
async def test_what_is_too_long_is_not_kept(expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[int] = []
    monkeypatch.setattr(reposing, "BLOCK_BYTES", 10)
    monkeypatch.setattr(reposing, "_apart", lambda pieces: copied.append(len(pieces)))
    kept = reposing._Kept(50, expected)
    for _ in range(6):
        await kept.add(bytes(10))
    assert kept.blocks() is None
    # Whose length is known before is not even copied.
    assert len(copied) == (0 if expected else 4)
