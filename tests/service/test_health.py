"""Probes, `/info`, `/metrics`: they say what is the case, and cost little."""

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from service import reposing
from service.errors import AvatarUnavailable, EngineFailed
from service.lifecycle import Traffic

pytestmark = pytest.mark.anyio
POSES = {"poses": [[0.1] * 72]}
URL = "/avatars/tiny/repose"


async def samples(client: Any) -> dict[str, float]:
    text = (await client.get("/metrics")).text
    found = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {sample.name + "".join(f":{value}" for value in sample.labels.values()): sample.value for sample in found}


async def test_probes_by_both_names(serve: Any) -> None:
    async with serve() as client:
        for paths, status in (
            (("/livez", "/v2/health/live"), "alive"),
            (("/readyz", "/v2/health/ready", "/v2/models/tiny/ready", "/avatars/tiny/ready"), "ready"),
            (("/startupz",), "started"),
        ):
            for path in paths:
                answer = await client.get(path)
                assert (answer.status_code, answer.json()) == (200, {"status": status}), path
        assert (await client.get("/v2/models/nobody/ready")).status_code == 404
        client.app.state.store.forget("tiny")
        stored = await client.get("/v2/models/tiny/ready")
        assert (stored.status_code, stored.json()["code"]) == (503, "not-ready")
        # A probe does not load; but what is on the disk can be served, so the process is ready.
        assert (await client.get("/readyz")).status_code == 200


async def test_startup_waits_for_the_avatars(serve: Any) -> None:
    async with serve() as client:
        client.app.state.store.preloaded.clear()
        answer = await client.get("/startupz")
        assert (answer.status_code, answer.json()["code"]) == (503, "not-ready")


async def test_info_says_where_it_runs(serve: Any) -> None:
    async with serve(max_frames=77) as client:
        info = (await client.get("/info")).json()
    assert info["device"] in ("cpu", "cuda")
    assert info["providers"]
    assert info["limits"]["max_frames"] == 77
    assert (info["avatars_in_memory"], info["version"]) == (1, "0.1.0")


async def test_fault_26_an_engine_that_does_not_come_back_is_not_ready_at_once(serve: Any, engine: Any) -> None:
    broken = False

    def make_engine(graph: bytes) -> Any:
        if broken:
            raise AvatarUnavailable("no session can be made")
        return engine

    def fail(vertices: Any) -> Any:
        raise EngineFailed("the device is lost")

    async with serve(make_engine=make_engine, readiness_interval_s=300) as client:
        assert (await client.get("/readyz")).status_code == 200  # and that would be remembered for minutes
        engine.spoil, broken = fail, True
        answer = await client.post(URL, json=POSES)
        assert (answer.status_code, answer.json()["code"]) == (503, "engine-failed")
        assert (await client.get("/readyz")).status_code == 503
        assert (await client.get("/livez")).status_code == 200
        assert client.app.state.room.gave_up.is_set()


async def test_fault_26_a_service_whose_engine_is_rebuilt_is_not_ready_meanwhile(serve: Any) -> None:
    async with serve(readiness_interval_s=300) as client:
        assert (await client.get("/readyz")).status_code == 200  # and that would be remembered for minutes
        avatar = client.app.state.store.in_memory("tiny")
        avatar.rebuilding = True
        assert (await client.get("/readyz")).status_code == 503
        refused = await client.post(URL, json=POSES)
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "2")
        avatar.rebuilding = False
        assert (await client.get("/readyz")).status_code == 200


async def test_draining_refuses_work_but_answers_probes(serve: Any) -> None:
    async with serve() as client:
        await client.app.state.lifecycle.drain(grace_s=1)
        for answer in (await client.post(URL, json=POSES), await client.get("/avatars")):
            assert (answer.status_code, answer.json()["code"]) == (503, "draining")
            assert (answer.headers["connection"], answer.headers["retry-after"]) == ("close", "1")
        assert (await client.get("/readyz")).json()["code"] == "draining"
        assert (await client.get("/livez")).status_code == 200


async def test_fault_17_a_flood_of_requests_is_refused_before_it_is_read(serve: Any) -> None:
    async with serve(max_requests=3) as client:
        client.app.state.lifecycle.in_flight = 3
        assert (await samples(client))["reposer_requests_in_flight"] == 3
        answer = await client.post(URL, content=b"not even JSON", headers={"Content-Type": "application/json"})
        assert (answer.status_code, answer.json()["code"]) == (503, "overloaded")
        assert answer.headers["retry-after"] == "1"
        assert (await client.get("/livez")).status_code == 200
        client.app.state.lifecycle.in_flight = 2
        assert (await client.post(URL, json=POSES)).status_code == 200


async def test_requests_that_are_refused_are_in_nobody_s_way(serve: Any) -> None:
    """Not of others, not of streams, and the end does not wait for them."""
    async with serve(max_requests=3) as client:
        lifecycle = client.app.state.lifecycle
        lifecycle.in_flight = 3

        async def endless() -> AsyncIterator[bytes]:
            yield b"P"
            await asyncio.sleep(30)

        refused = asyncio.create_task(client.post(URL, content=endless()))
        await asyncio.sleep(0.1)
        assert lifecycle.in_flight == 3
        refused.cancel()
        await asyncio.wait([refused])
        assert lifecycle.in_flight == 3
        served: list[str] = []

        async def app(scope: Any, receive: Any, send: Any) -> None:
            served.append(scope["type"])

        traffic = Traffic(app, lifecycle, client.app.state.metrics, 3)
        await traffic({"type": "websocket", "path": "/avatars/tiny/stream"}, None, None)  # type: ignore[arg-type]
        assert served == ["websocket"]


async def test_metrics_count_what_happens(serve: Any) -> None:
    async with serve() as client:
        before = await samples(client)
        body = {"poses": [[0.1] * 72] * 9}
        assert (await client.post(URL, json=body)).status_code == 200
        assert (await client.post(URL, json=body)).headers["x-cache"] == "hit"
        await asyncio.sleep(0.25)
        after = await samples(client)
    assert after["reposer_frames_total:bulk"] - before.get("reposer_frames_total:bulk", 0) == 9
    assert after["reposer_infer_seconds_count"] > before["reposer_infer_seconds_count"]
    assert after["reposer_queue_seconds_count"] > before["reposer_queue_seconds_count"]
    assert after["reposer_encode_seconds_count"] > before["reposer_encode_seconds_count"]
    assert (after["reposer_cache_total:hit"], after["reposer_cache_total:miss"]) == (1, 1)
    assert after["reposer_http_seconds_count:200"] == 2
    assert after["reposer_send_seconds_count"] >= 2
    assert after["reposer_avatars_loaded"] == 1
    assert after["reposer_avatar_bytes"] > 0
    assert after["reposer_loop_lag_seconds_count"] > 0
    assert not any("tiny" in name for name in after)


async def test_fault_33_large_json_is_refused_and_the_loop_never_parses(
    serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = []

    def parse(*arguments: Any, **options: Any) -> Any:
        threads.append(threading.current_thread())
        return parse_json(*arguments, **options)

    parse_json = reposing.parse_json
    monkeypatch.setattr(reposing, "parse_json", parse)
    async with serve() as client:
        body = json.dumps({"poses": np.zeros((10_000, 72)).tolist()})
        answer = await client.post(URL, content=body, headers={"Content-Type": "application/json"})
        assert (answer.status_code, answer.json()["code"]) == (413, "body-too-large")
        assert (await client.post(URL, json=POSES)).status_code == 200
    assert len(threads) == 1
    assert threads[0] is not threading.current_thread()


async def test_fault_20_who_goes_before_the_answer_is_written_down_as_499(
    serve: Any, engine: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async with serve(make_engine=lambda _: engine) as client:
        engine.spoil = lambda vertices: (time.sleep(0.05), vertices)[1]
        with caplog.at_level("INFO", "service.access"):
            task = asyncio.create_task(client.post(URL, json=POSES))
            while not client.app.state.lifecycle.in_flight:
                await asyncio.sleep(0.001)
            task.cancel()
            await asyncio.wait([task])
        assert [vars(record)["status"] for record in caplog.records if record.name == "service.access"] == [499]
        assert (await samples(client))["reposer_http_seconds_count:499"] == 1


async def test_a_fault_of_ours_is_written_down_as_500(
    serve: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with serve() as client:
        monkeypatch.setattr(client.app.state.reposing, "answer", lambda *_: 1 / 0)
        with caplog.at_level("INFO", "service.access"):
            assert (await client.post(URL, json=POSES)).status_code == 500
        assert [vars(record)["status"] for record in caplog.records if record.name == "service.access"] == [500]
        assert (await samples(client))["reposer_http_seconds_count:500"] == 1


async def test_fault_20_a_request_whose_client_has_gone_frees_its_place(serve: Any) -> None:
    async with serve() as client:
        for _ in range(20):
            task = asyncio.create_task(client.post(URL, json={"poses": [[0.1] * 72] * 200}))
            await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        async with asyncio.timeout(20):
            while client.app.state.room._sequences:
                await asyncio.sleep(0.01)
        assert client.app.state.lifecycle.in_flight == 0
        async with client.app.state.store.lease("tiny") as avatar:
            assert avatar.pins == 1
