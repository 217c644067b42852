"""Jobs: the same request is the same job, workers may die, the disk may be full, and a result is whole or not there."""

import asyncio
import errno
import io
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from redis.exceptions import ResponseError

from service import job_store, jobs
from service.answers import FRAMES, FRAMES_Q16, NPZ
from service.errors import InsufficientStorage, JobNotFound, Overloaded
from service.job_store import Job, JobStore
from service.poses import PoseSequence
from service.redis_link import RedisLink
from service.security import add_key

pytestmark = pytest.mark.anyio


def body(motion: Any) -> bytes:
    file = io.BytesIO()
    np.savez(file, **motion)
    return file.getvalue()


async def post(client: httpx.AsyncClient, motion: Any, accept: str = FRAMES, to: str = "jobs") -> httpx.Response:
    headers = {"Content-Type": "application/x-npz", "Accept": accept}
    return await client.post(f"/avatars/tiny/{to}", content=body(motion), headers=headers)


async def ended(client: httpx.AsyncClient, job_id: str) -> dict[str, Any]:
    async with asyncio.timeout(60):
        while True:
            job = (await client.get(f"/jobs/{job_id}")).json()
            if job["state"] in ("done", "failed", "cancelled"):
                return job
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("accept", [FRAMES, FRAMES_Q16, NPZ])
async def test_a_job_gives_what_a_request_would_have_given(serve: Any, motion: Any, accept: str) -> None:
    async with serve() as client:
        answer = await post(client, motion, accept, to="repose")
        posted = await post(client, motion, accept)
        assert posted.status_code == 202
        job = await ended(client, posted.json()["id"])
        assert (job["state"], job["frames_done"], job["media_type"]) == ("done", 7, accept)
        result = await client.get(f"{posted.headers['location']}/result")
        assert result.content == answer.content
        assert result.headers["content-type"] == accept
        assert result.headers["reposer-frames"] == "7"
        assert job["result_bytes"] == len(result.content)


async def test_the_same_request_is_the_same_job(serve: Any, engine: Any, motion: Any) -> None:
    async with serve(make_engine=lambda _: engine) as client:
        first = await post(client, motion)
        await ended(client, first.json()["id"])
        computed = sum(engine.batches)
        again = await post(client, motion)
        assert (again.status_code, again.json()["id"]) == (200, first.json()["id"])
        assert again.json()["state"] == "done"
        assert sum(engine.batches) == computed
        other = await post(client, motion | {"trans": motion["trans"] + 1})
        assert other.json()["id"] != first.json()["id"]
        assert (await post(client, motion, NPZ)).status_code == 202


async def test_a_job_may_be_longer_than_a_request(serve: Any, motion: Any) -> None:
    long = {"poses": np.zeros((60, 72), np.float32)}
    async with serve(max_frames=50, max_job_frames=100) as client:
        refused = await post(client, long, to="repose")
        assert (refused.status_code, refused.json()["limit_frames"]) == (413, 50)
        assert "/avatars/tiny/jobs" in refused.json()["detail"]
        assert (await post(client, long)).status_code == 202
        assert (await post(client, {"poses": np.zeros((101, 72))})).status_code == 413


async def test_a_job_is_accepted_work_so_it_waits_for_its_turn_and_shuts_nobody_out(
    serve: Any, engine: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(jobs, "BEAT_S", 0.02)
    async with serve(make_engine=lambda _: engine, batch_vertex_frames=1, queue_ms=0) as client:
        engine.spoil = lambda v: (time.sleep(0.003), v)[1]
        numbers = itertools.count(1)

        async def request(frames: int) -> int:
            return (await post(client, {"poses": np.full((frames, 72), 0.01 * next(numbers))}, to="repose")).status_code

        async def job(frames: int) -> str:
            return (await post(client, {"poses": np.full((frames, 72), 0.01 * next(numbers))})).json()["id"]

        async def under_way(job_id: str) -> None:
            async with asyncio.timeout(30):
                while not (await client.get(f"/jobs/{job_id}")).json()["frames_done"]:
                    await asyncio.sleep(0.01)

        assert await request(20) == 200  # from now on its speed is known
        two = [asyncio.create_task(request(300)) for _ in range(2)]
        await asyncio.sleep(0.1)
        assert await request(300) == 503  # a third one would have to wait for longer than it takes itself
        beside = await job(300)
        await under_way(beside)
        assert not any(task.done() for task in two)
        assert (await ended(client, beside))["state"] == "done"
        assert await asyncio.gather(*two) == [200, 200]

        running = await job(400)
        await under_way(running)
        two = [asyncio.create_task(request(200)) for _ in range(2)]  # with the job, it would be three
        assert await asyncio.gather(*two) == [200, 200]
        assert (await client.get(f"/jobs/{running}")).json()["state"] == "running"
        assert (await ended(client, running))["state"] == "done"


async def test_a_job_that_is_not_wanted_any_more_stops(serve: Any, engine: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(jobs, "BEAT_S", 0.02)
    async with serve(make_engine=lambda _: engine, batch_vertex_frames=1) as client:
        engine.spoil = lambda v: (time.sleep(0.01), v)[1]
        job_id = (await post(client, {"poses": np.zeros((5000, 72), np.float32)})).json()["id"]
        async with asyncio.timeout(30):
            while not (await client.get(f"/jobs/{job_id}")).json()["frames_done"]:
                await asyncio.sleep(0.01)
        early = await client.get(f"/jobs/{job_id}/result")
        assert (early.status_code, early.json()["code"]) == (409, "job-not-finished")
        assert (await client.delete(f"/jobs/{job_id}")).status_code == 204
        assert (await client.get(f"/jobs/{job_id}")).json()["state"] == "cancelled"
        async with asyncio.timeout(30):
            while client.app.state.jobs._working:
                await asyncio.sleep(0.01)
        computed = sum(engine.batches)
        await asyncio.sleep(0.1)
        assert sum(engine.batches) == computed < 5000
        folder = client.app.state.jobs.store.result(job_id).parent
        assert not list(folder.glob("result*"))
        gone = await client.get(f"/jobs/{job_id}/result")
        assert (gone.status_code, gone.json()["code"]) == (409, "job-failed")
        assert (await client.delete(f"/jobs/{job_id}")).status_code == 204
        assert (await client.get(f"/jobs/{job_id}")).status_code == 404


async def test_a_job_that_fails_says_why_and_may_be_asked_for_again(serve: Any, engine: Any, motion: Any) -> None:
    async with serve(make_engine=lambda _: engine) as client:
        far = motion | {"trans": motion["trans"] + 20}
        engine.spoil = lambda v: v * np.float32(np.nan) if v.max() > 10 else v
        job_id = (await post(client, far)).json()["id"]
        job = await ended(client, job_id)
        assert (job["state"], job["error"]) == ("failed", "model-output-invalid")
        engine.spoil = lambda v: v
        assert (await post(client, far)).status_code == 202
        assert (await ended(client, job_id))["state"] == "done"


async def test_a_job_that_there_is_no_room_for_waits_until_there_is(
    serve: Any, engine: Any, motion: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(jobs, "AGAIN_S", (0.01, 0.01))
    tried: list[int] = []

    def no_memory(vertices: Any) -> Any:
        tried.append(len(vertices))
        if len(tried) in refused:
            raise Overloaded("the device has no memory left")
        return vertices

    async with serve(make_engine=lambda _: engine, batch_vertex_frames=1) as client:
        expected = (await post(client, motion, to="repose")).content
        engine.spoil = no_memory
        # At its beginning, and in the middle of what is written then.
        refused = {1, 5}
        job_id = (await post(client, motion)).json()["id"]
        job = await ended(client, job_id)
        assert (job["state"], job["frames_done"]) == ("done", 7)
        assert (await client.get(f"/jobs/{job_id}/result")).content == expected
        assert len(tried) >= 5 + 7
        # But not for ever.
        refused = set(range(1000))
        tried.clear()
        job = await ended(client, (await post(client, motion, NPZ)).json()["id"])
        assert (job["state"], job["error"]) == ("failed", "overloaded")
        assert 3 <= len(tried) <= 9  # two frames are asked for ahead


async def test_a_job_is_its_owners(serve: Any, motion: Any, tmp_path: Path) -> None:
    keys = {name: add_key(tmp_path / "keys", name, planes) for name, planes in PLANES.items()}
    bearer = {name: {"Authorization": f"Bearer {key}"} for name, key in keys.items()}
    headers = {"Content-Type": "application/x-npz", "Accept": FRAMES}
    async with serve(keys_file=tmp_path / "keys") as client:
        ids = {}
        for name in ("one", "two"):
            posted = await client.post("/avatars/tiny/jobs", content=body(motion), headers=headers | bearer[name])
            assert posted.status_code == 202
            ids[name] = posted.json()["id"]
            again = await client.post("/avatars/tiny/jobs", content=body(motion), headers=headers | bearer[name])
            assert again.json()["id"] == ids[name]
        assert ids["one"] != ids["two"]
        for name, seen in {"one": {"one"}, "two": {"two"}, "boss": {"one", "two"}, "reader": set()}.items():
            found = (await client.get("/jobs", headers=bearer[name])).json()["jobs"]
            assert {job["id"] for job in found} == {ids[other] for other in seen}
            for other in ids:
                expected = 200 if other in seen else 404
                assert (await client.get(f"/jobs/{ids[other]}", headers=bearer[name])).status_code == expected
                result = await client.get(f"/jobs/{ids[other]}/result", headers=bearer[name])
                assert result.status_code in ({200, 409} if other in seen else {404})
        assert (await client.delete(f"/jobs/{ids['one']}", headers=bearer["two"])).status_code == 404
        assert (await client.get(f"/jobs/{ids['one']}", headers=bearer["one"])).json()["state"] != "cancelled"
        assert (await client.delete(f"/jobs/{ids['one']}", headers=bearer["boss"])).status_code == 204


PLANES: dict[str, Any] = {"one": ("data",), "two": ("data",), "reader": ("data",), "boss": ("data", "admin")}


def test_a_claim_that_was_given_back_is_nobodys_obstacle(tmp_path: Path) -> None:
    """Whoever was given up for dead may give its claim back long after another has taken the job."""
    store = JobStore(tmp_path, 1 << 20)
    store.add(job_of("a"), STILL)
    first = store.claim(job_of("a").id)
    assert first is not None
    os.utime(first, (0, 0))
    second = store.claim(job_of("a").id)
    assert second is not None
    first.unlink()
    os.utime(second, (0, 0))
    assert list(store.waiting()) == [job_of("a").id]
    assert store.claim(job_of("a").id) is not None


@pytest.mark.parametrize("job_id", ["0" * 64, "x", "0" * 63, "A" * 64, "..%2f" + "0" * 64])
async def test_a_job_that_is_not_there(serve: Any, job_id: str) -> None:
    async with serve() as client:
        for answer in (await client.get(f"/jobs/{job_id}"), await client.delete(f"/jobs/{job_id}")):
            assert answer.status_code in (404, 405, 422)


async def test_fault_30_a_full_disk_ends_the_job_and_nothing_else(serve: Any, motion: Any, monkeypatch: Any) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    async with serve() as client:
        with monkeypatch.context() as patch:
            patch.setattr(jobs, "_write", full)
            job = await ended(client, (await post(client, motion)).json()["id"])
            assert (job["state"], job["error"]) == ("failed", "insufficient-storage")
            assert not list(client.app.state.jobs.store.folder.glob("*/result*"))
            patch.setattr(job_store, "write_whole", full)
            answer = await post(client, motion, NPZ)
            assert (answer.status_code, answer.json()["code"]) == (507, "insufficient-storage")
            assert not list(client.app.state.jobs.store.folder.glob(".new-*"))
            assert (await post(client, motion, to="repose")).status_code == 200
        assert (await post(client, motion, NPZ)).status_code == 202


def job_of(name: str, **changes: Any) -> Job:
    fields = {"id": name, "avatar": "tiny", "bundle": "d", "lod": "preview", "media_type": FRAMES, "frames": 2,
              "fps": 30.0, "created_s": 1.0, "applied": {}}  # fmt: skip
    return Job(**fields | changes)


STILL = PoseSequence(
    np.tile(np.eye(3, dtype=np.float32), (2, 24, 1, 1)), np.zeros((2, 3), np.float32), 30.0, "y", "m", "matrix"
)


def test_the_oldest_results_make_room(tmp_path: Path) -> None:
    store = JobStore(tmp_path / "jobs", 100_000)
    for n, name in enumerate("abc"):
        job, is_new = store.add(job_of(name, created_s=float(n)), STILL)
        assert is_new
        store.save(job.model_copy(update={"state": "running" if name == "a" else "done"}))
        store.result(name).write_bytes(bytes(25_000))
    store.make_room(40_000)
    assert store.get("a").state == "running"
    with pytest.raises(JobNotFound):
        store.get("b")
    assert store.get("c").state == "done"
    with pytest.raises(InsufficientStorage):
        store.make_room(90_000)
    store.add(job_of("d"), STILL)
    np.testing.assert_array_equal(store.poses(store.get("d")).rotations, STILL.rotations)


def test_room_is_counted_while_others_write_and_remove(tmp_path: Path) -> None:
    store = JobStore(tmp_path / "jobs", 10_000_000)
    stays, _ = store.add(job_of("a"), STILL)
    ended = threading.Event()

    def churn() -> None:
        while not ended.is_set():
            store.save(stays)
            store.add(job_of("b"), STILL)
            store.remove("b")

    other = threading.Thread(target=churn)
    other.start()
    try:
        for _ in range(300):
            store.make_room(1)
            assert "a" in store.waiting()
    finally:
        ended.set()
        other.join()
    assert store.get("a") == stays


def test_a_folder_that_may_not_be_read_is_no_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = JobStore(tmp_path / "jobs", 100_000)
    store.add(job_of("a"), STILL)
    (tmp_path / "jobs" / "lost+found").mkdir()  # as a volume has it
    (tmp_path / "jobs" / "a stray file").touch()
    seen = Path.iterdir

    def iterdir(path: Path) -> Any:
        if path.name == "lost+found":
            raise PermissionError(errno.EACCES, "Permission denied")
        return seen(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    assert store.add(job_of("b"), STILL)[1]
    assert sorted(store.waiting()) == ["a", "b"]
    with pytest.raises(InsufficientStorage):
        store.make_room(100_000)


def test_fault_32_a_job_is_claimed_by_one_and_again_once(tmp_path: Path) -> None:
    store, other = (JobStore(tmp_path / "jobs", 1 << 20) for _ in range(2))
    store.add(job_of("a"), STILL)
    assert list(other.waiting()) == ["a"]
    claim = store.claim("a")
    assert claim is not None
    assert other.claim("a") is None
    assert list(other.waiting()) == []
    old = time.time() - 2 * job_store.STALE_S
    os.utime(claim, (old, old))
    assert list(other.waiting()) == ["a"]
    second = other.claim("a")
    assert second is not None
    os.utime(second, (old, old))
    assert list(store.waiting()) == []
    assert store.claim("a") is None
    assert (store.get("a").state, store.get("a").error) == ("failed", "worker-lost")


WORKER = """
import asyncio, sys, time
from pathlib import Path
import numpy as np
from service.app import create_app
from service.engine import OnnxEngine
from service.settings import Settings

class Slow(OnnxEngine):
    def repose(self, *inputs):
        time.sleep(0.05)
        return super().repose(*inputs)

async def main():
    settings = Settings(bundle_dir=sys.argv[1], jobs_dir=sys.argv[2], threads=1, batch_vertex_frames=1)
    app = create_app(settings, lambda graph: Slow(graph, threads=1))
    async with app.router.lifespan_context(app):
        await app.state.jobs.work(sys.argv[3])

asyncio.run(main())
"""


async def test_fault_32_a_killed_workers_job_is_done_by_another(
    serve: Any, bundle_dir: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(jobs.Jobs, "_wake", lambda *_: asyncio.sleep(0))
    monkeypatch.setattr(jobs, "LOOK_S", 1000)
    long = {"poses": np.zeros((200, 72), np.float32)}
    async with serve() as client:
        job_id = (await post(client, long)).json()["id"]
        folder = client.app.state.jobs.store.result(job_id).parent
        worker = subprocess.Popen([sys.executable, "-c", WORKER, bundle_dir, folder.parent, job_id])
        try:
            async with asyncio.timeout(60):
                while not list(folder.glob("result.*.part")):
                    await asyncio.sleep(0.02)
        finally:
            worker.send_signal(signal.SIGKILL)
            worker.wait()
        assert not (folder / "result").exists()
        await client.app.state.jobs.work(job_id)  # the claim is fresh: left alone
        assert len(list(folder.glob("claim.*"))) == 1
        old = time.time() - 2 * job_store.STALE_S
        os.utime(folder / "claim.1", (old, old))
        assert list(client.app.state.jobs.store.waiting()) == [job_id]
        await client.app.state.jobs.work(job_id)
        assert (await client.get(f"/jobs/{job_id}")).json()["state"] == "done"
        result = await client.get(f"/jobs/{job_id}/result")
        assert result.content == (await post(client, long, to="repose")).content
        assert sorted(path.name for path in folder.glob("claim.*")) == ["claim.1", "claim.2"]


async def test_a_process_that_ends_in_good_order_leaves_its_job_to_others(
    serve: Any, engine: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(jobs, "LOOK_S", 0.05)
    long = {"poses": np.zeros((200, 72), np.float32)}
    async with serve(make_engine=lambda _: engine, batch_vertex_frames=1) as client:
        engine.spoil = lambda v: (time.sleep(0.01), v)[1]
        job_id = (await post(client, long)).json()["id"]
        store = client.app.state.jobs.store
        async with asyncio.timeout(30):
            while not list(store.result(job_id).parent.glob("result.*.part")):
                await asyncio.sleep(0.01)
    assert not list(store.result(job_id).parent.glob("claim.*"))
    async with serve() as client:
        assert (await ended(client, job_id))["state"] == "done"


async def test_with_redis_another_replica_is_woken_up(
    serve: Any, redis_server: Any, motion: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(jobs, "LOOK_S", 1000)
    async with serve(redis_url=redis_server.url) as one, serve(redis_url=redis_server.url) as two:
        async with asyncio.timeout(30):  # until both listen
            while len(await groups(redis_server)) < 1:
                await asyncio.sleep(0.05)
        for n in range(4):
            posted = await post(one, motion | {"trans": motion["trans"] + n})
            assert (await ended(two, posted.json()["id"]))["state"] == "done"


async def groups(redis_server: Any) -> list[Any]:
    link = RedisLink(redis_server.url, 5.0)
    try:
        return await link.call("XINFO", "GROUPS", jobs.QUEUE)
    except ResponseError:
        return []
    finally:
        await link.aclose()


async def test_a_job_whose_message_was_lost_is_found(
    serve: Any, redis_server: Any, motion: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(jobs, "LOOK_S", 0.1)
    redis_server.stop()
    async with serve(redis_url=redis_server.url) as client:
        posted = await post(client, motion)
        assert (await ended(client, posted.json()["id"]))["state"] == "done"
