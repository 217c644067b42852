"""The list, the details, the meshes, health; and one damaged avatar among healthy ones."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from service.bundle.files import write_bundle
from service.bundle.glb import read_mesh
from service.engine import OnnxEngine
from service.errors import AvatarUnavailable

pytestmark = pytest.mark.anyio
POSES = {"poses": [[0.1] * 72]}


async def test_list_says_where_each_avatar_runs(serve: Any) -> None:
    async with serve() as client:
        (avatar,) = (await client.get("/avatars")).json()["avatars"]
    assert (avatar["id"], avatar["status"]) == ("tiny", "ready")
    cuda = avatar["device"] == "cuda"
    assert avatar["provider"] == ("CUDAExecutionProvider" if cuda else "CPUExecutionProvider")
    assert cuda <= ("CUDAExecutionProvider" in onnxruntime.get_available_providers())
    assert avatar["levels_of_detail"]["standard"] == {"file": "mesh.standard.glb", "vertices": 368, "faces": 644}


async def test_details_are_the_bundle_s(serve: Any, bundle_parts: Any) -> None:
    async with serve() as client:
        avatar = (await client.get("/avatars/tiny")).json()
        missing = await client.get("/avatars/nobody")
    assert avatar["provenance"] == bundle_parts["provenance"]
    assert avatar["metrics"] == bundle_parts["metrics"]
    np.testing.assert_array_equal(np.array(avatar["rest_joints"], np.float32), bundle_parts["skeleton"].rest_joints)
    assert (missing.status_code, missing.json()["code"]) == (404, "avatar-not-found")


async def test_meshes_come_once(serve: Any, bundle_parts: Any) -> None:
    async with serve() as client:
        tags = {}
        for lod, mesh in bundle_parts["meshes"].items():
            answer = await client.get(f"/avatars/tiny/mesh?lod={lod}")
            assert (answer.status_code, answer.headers["content-type"]) == (200, "model/gltf-binary")
            read = read_mesh(answer.content)
            np.testing.assert_array_equal(read.vertices, mesh.vertices)
            np.testing.assert_array_equal(read.faces, mesh.faces)
            tags[lod] = answer.headers["etag"]
        assert tags["preview"] != tags["standard"]
        for known in (tags["standard"], f'"other", W/{tags["standard"]}', "*"):
            answer = await client.get("/avatars/tiny/mesh", headers={"If-None-Match": known})
            assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", tags["standard"])
        for known in (tags["preview"], "", "*x"):
            assert (await client.get("/avatars/tiny/mesh", headers={"If-None-Match": known})).status_code == 200
        assert (await client.get("/avatars/tiny/mesh?lod=ultra")).json()["code"] == "lod-not-found"


@pytest.fixture
def mixed_dir(bundle_dir: Path, tmp_path: Path, bundle_parts: Any, make_graph: Any) -> Path:
    """A healthy avatar, damaged ones, and things that are no avatars."""
    shutil.copytree(bundle_dir / "tiny", tmp_path / "tiny")
    shutil.copytree(bundle_dir / "tiny", tmp_path / "flipped")
    manifest = json.loads((tmp_path / "flipped/avatar.json").read_text()) | {"id": "flipped"}
    (tmp_path / "flipped/avatar.json").write_text(json.dumps(manifest))
    with open(tmp_path / "flipped/repose.onnx", "r+b") as file:
        file.seek(300)
        byte = file.read(1)
        file.seek(300)
        file.write(bytes([byte[0] ^ 4]))
    (tmp_path / "empty").mkdir()
    graphs = {"no-graph": b"not a graph", "wrong-output": make_graph(output="surface"), "nan": make_graph(scale=np.nan)}
    for avatar_id, graph in graphs.items():
        write_bundle(tmp_path / avatar_id, avatar_id=avatar_id, **bundle_parts | {"repose_onnx": graph})
    (tmp_path / ".tiny.new-0123").mkdir()
    (tmp_path / "README").write_text("no avatar")
    return tmp_path


async def test_a_damaged_avatar_is_503_and_the_others_serve(serve: Any, mixed_dir: Path) -> None:
    damaged = {"empty", "flipped", "no-graph", "wrong-output", "nan"}
    async with serve(bundle_dir=mixed_dir) as client:
        listed = {avatar["id"]: avatar["status"] for avatar in (await client.get("/avatars")).json()["avatars"]}
        assert listed == dict.fromkeys(damaged, "unavailable") | {"tiny": "ready"}
        for avatar_id in damaged:
            for answer in (
                await client.get(f"/avatars/{avatar_id}"),
                await client.get(f"/avatars/{avatar_id}/mesh"),
                await client.post(f"/avatars/{avatar_id}/repose", json=POSES),
            ):
                problem = answer.json()
                assert (answer.status_code, problem["code"]) == (503, "avatar-unavailable")
                assert 1 <= int(answer.headers["retry-after"]) <= 30
                assert str(mixed_dir) not in answer.text
        assert (await client.post("/avatars/tiny/repose", json=POSES)).status_code == 200
        assert (await client.get("/readyz")).status_code == 200


async def test_ready_is_a_real_inference(serve: Any, engine: Any, tmp_path: Path) -> None:
    async with serve(make_engine=lambda _: engine, readiness_interval_s=0) as client:
        before = len(engine.batches)
        assert (await client.get("/readyz")).json() == {"status": "ready"}
        assert len(engine.batches) == before + 1
        engine.spoil = lambda vertices: vertices * np.float32(np.nan)
        answer = await client.get("/readyz")
        assert (answer.status_code, answer.json()["code"]) == (503, "not-ready")
        assert (await client.get("/livez")).json() == {"status": "alive"}
    async with serve(bundle_dir=tmp_path) as client:
        assert (await client.get("/readyz")).json()["code"] == "not-ready"


async def test_readiness_is_remembered_for_a_while(serve: Any, engine: Any) -> None:
    async with serve(make_engine=lambda _: engine, readiness_interval_s=60) as client:
        await client.get("/readyz")
        computed = len(engine.batches)
        await client.get("/readyz")
        assert len(engine.batches) == computed


async def test_openapi_describes_the_routes(serve: Any) -> None:
    async with serve() as client:
        document = (await client.get("/openapi.json")).json()
    one = "/avatars/{avatar_id}"
    assert set(document["paths"]) >= {"/livez", "/readyz", "/avatars", one, f"{one}/mesh", f"{one}/repose"}
    repose = document["paths"]["/avatars/{avatar_id}/repose"]["post"]
    assert "application/x-npz" in repose["requestBody"]["content"]
    assert "application/vnd.reposer.frames" in repose["responses"]["200"]["content"]


def test_the_engine_refuses_graphs_of_other_forms(make_graph: Any, tmp_path: Path) -> None:
    good = onnx.load_from_string(make_graph())
    fixed_frames, other_rank, external = (onnx.ModelProto.FromString(make_graph()) for _ in range(3))
    fixed_frames.graph.input[1].type.tensor_type.shape.dim[0].dim_value = 1
    other_rank.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 4
    (tmp_path / "weights").write_bytes(bytes(4 * 72))
    tensor = external.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=str(tmp_path / "weights"))
    changed = [graph.SerializeToString() for graph in (fixed_frames, other_rank, external)]
    for graph in (*changed, make_graph(output="surface"), b"", b"not a graph"):
        with pytest.raises(AvatarUnavailable):
            OnnxEngine(graph, threads=1)
    assert OnnxEngine(good.SerializeToString(), threads=1, cpu_only=True).device == "cpu"


@pytest.mark.parametrize("target", ["service.app", "service.__main__", "service.demo"])
def test_the_service_needs_no_torch(target: str) -> None:
    code = (
        f"import sys, {target}\n"
        "found = {'torch', 'onnx', 'model', 'training', 'safetensors'} & {name.split('.')[0] for name in sys.modules}\n"
        "sys.exit(f'imported {found}' if found else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_bundle_needs_numpy_and_pydantic_only() -> None:
    code = (
        "import sys, service.bundle.files\n"
        "heavy = {'fastapi', 'starlette', 'onnxruntime', 'httpx', 'uvicorn', 'trimesh', 'PIL', 'torch'}\n"
        "found = heavy & {name.split('.')[0] for name in sys.modules}\n"
        "sys.exit(f'imported {found}' if found else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
