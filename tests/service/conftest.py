"""A tiny avatar for the service's tests: a few hundred vertices around the bones, skinned by a hand-made graph."""

import contextlib
import itertools
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import safetensors.numpy
import uvicorn
from numpy.typing import NDArray
from onnx import TensorProto, checker, helper, numpy_helper

from service.app import create_app
from service.bundle.files import write_bundle
from service.bundle.glb import Mesh, strongest_bones
from service.bundle.skeleton import SMPL_PARENTS, Skeleton
from service.serve import HttpProtocol
from service.settings import Settings

REST_JOINTS = np.array(
    [
        [0.01, -0.23, 0.03], [0.07, -0.32, 0.02], [-0.05, -0.32, 0.02], [0.01, -0.12, 0.00], [0.11, -0.69, 0.02],
        [-0.09, -0.69, 0.02], [0.01, 0.02, 0.01], [0.09, -1.09, -0.02], [-0.08, -1.09, -0.02], [0.01, 0.07, 0.03],
        [0.13, -1.15, 0.10], [-0.11, -1.15, 0.10], [0.00, 0.28, -0.01], [0.08, 0.19, -0.01], [-0.08, 0.19, -0.01],
        [0.01, 0.37, 0.04], [0.18, 0.23, -0.02], [-0.17, 0.23, -0.02], [0.43, 0.21, -0.05], [-0.42, 0.21, -0.05],
        [0.68, 0.22, -0.05], [-0.67, 0.22, -0.05], [0.76, 0.21, -0.06], [-0.75, 0.21, -0.06],
    ],
    np.float32,
)  # fmt: skip
SHARPNESS = 200.0


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def skeleton() -> Skeleton:
    return Skeleton.smpl(REST_JOINTS)


def boxes_around_bones(skeleton: Skeleton, cuts: int) -> Mesh:
    """A closed box along every bone of the canonical pose, `cuts` rings of four vertices each."""
    joints, vertices, faces = skeleton.canonical_joints(), [], []
    for joint, parent in list(enumerate(SMPL_PARENTS))[1:]:
        along = joints[joint] - joints[parent]
        side = np.cross(along, [0.3, 0.2, 1.0])
        side *= 0.04 / np.linalg.norm(side)
        other = np.cross(along, side)
        other *= 0.04 / np.linalg.norm(other)
        start = len(vertices)
        for t in np.linspace(0.1, 0.9, cuts):
            middle = joints[parent] + t * along
            vertices += [middle + side, middle + other, middle - side, middle - other]
        for ring, corner in itertools.product(range(cuts - 1), range(4)):
            a, b = start + 4 * ring + corner, start + 4 * ring + (corner + 1) % 4
            faces += [[a, b, b + 4], [a, b + 4, a + 4]]
        end = start + 4 * (cuts - 1)
        faces += [[start, start + 2, start + 1], [start, start + 3, start + 2]]
        faces += [[end, end + 1, end + 2], [end, end + 2, end + 3]]
    points = np.array(vertices, np.float32)
    joints_of, weights_of = strongest_bones(skinning_weights(skeleton, points))
    colors = np.clip(127 + 200 * points, 0, 255).astype(np.uint8)
    return Mesh(points, np.array(faces, np.int32), None, colors, joints_of, weights_of)


def skinning_weights(skeleton: Skeleton, points: NDArray[np.float32]) -> NDArray[np.float64]:
    """(V, 24), smooth and never zero: what `lbs_graph` computes, in float64."""
    squared = ((points[:, None].astype(np.float64) - skeleton.canonical_joints()) ** 2).sum(axis=-1)
    weights = np.exp(-SHARPNESS * (squared - squared.min(axis=1, keepdims=True)))
    return weights / weights.sum(axis=1, keepdims=True)


def lbs_graph(skeleton: Skeleton, scale: float = 1.0, opset: int = 18, output: str = "vertices") -> bytes:
    """Plain linear blend skinning with the inputs and outputs of a bundle; weights fall off from the joints."""
    constants = {
        "joints": skeleton.canonical_joints().astype(np.float32)[None],
        "sharpness": np.array(-SHARPNESS, np.float32),
        "one": np.array(1, np.int64).reshape(1),
        "last": np.array([-1], np.int64),
        "flat": np.array([0, 24, 16], np.int64),
        "square": np.array([0, 0, 4, 4], np.int64),
        "zero": np.array([0], np.int64),
        "three": np.array([3], np.int64),
        "two_axis": np.array([2], np.int64),
        "pad": np.array([0, 0, 0, 1], np.int64),
        "unit": np.array(scale, np.float32),
    }
    node = helper.make_node
    nodes = [
        node("Unsqueeze", ["canonical_vertices", "one"], ["points"]),
        node("Sub", ["points", "joints"], ["offsets"]),
        node("ReduceSumSquare", ["offsets", "last"], ["squared"], keepdims=0),
        node("Mul", ["squared", "sharpness"], ["logits"]),
        node("Softmax", ["logits"], ["weights"], axis=-1),
        node("Reshape", ["bone_transforms", "flat"], ["bones"]),
        node("MatMul", ["weights", "bones"], ["blended_flat"]),
        node("Reshape", ["blended_flat", "square"], ["blended"]),
        node("Pad", ["canonical_vertices", "pad", "unit"], ["homogeneous_row"]),
        node("Unsqueeze", ["homogeneous_row", "last"], ["homogeneous"]),
        node("MatMul", ["blended", "homogeneous"], ["moved"]),
        node("Unsqueeze", ["root_transforms", "one"], ["roots"]),
        node("MatMul", ["roots", "moved"], ["world"]),
        node("Slice", ["world", "zero", "three", "two_axis"], ["world_points"]),
        node("Squeeze", ["world_points", "last"], [output]),
    ]
    float32 = TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "lbs",
        [
            helper.make_tensor_value_info("canonical_vertices", float32, ["V", 3]),
            helper.make_tensor_value_info("bone_transforms", float32, ["F", 24, 4, 4]),
            helper.make_tensor_value_info("root_transforms", float32, ["F", 4, 4]),
        ],
        [helper.make_tensor_value_info(output, float32, ["F", "V", 3])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    checker.check_model(made)
    return made.SerializeToString()


class NumpyEngine:
    """An engine without ONNX Runtime that remembers what it was asked."""

    device, provider, alone_up_to = "cpu", "numpy", 0

    def __init__(self, skeleton: Skeleton) -> None:
        self.skeleton = skeleton
        self.batches: list[int] = []
        self.spoil: Callable[[NDArray[np.float32]], NDArray[Any]] = lambda vertices: vertices

    def repose(
        self, canonical_vertices: NDArray[np.float32], bones: NDArray[np.float32], roots: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        self.batches.append(len(bones))
        weights = skinning_weights(self.skeleton, canonical_vertices)
        points = np.concatenate([canonical_vertices, np.ones((len(canonical_vertices), 1))], axis=1)
        world = np.einsum("fab,vj,fjbc,vc->fva", roots.astype(np.float64), weights, bones.astype(np.float64), points)
        return self.spoil(world[..., :3].astype(np.float32))


@pytest.fixture
def engine(skeleton: Skeleton) -> NumpyEngine:
    return NumpyEngine(skeleton)


@pytest.fixture(scope="session")
def make_graph(skeleton: Skeleton) -> Callable[..., bytes]:
    """`lbs_graph` for tests that change it."""
    return partial(lbs_graph, skeleton)


@pytest.fixture(scope="session")
def bundle_parts(skeleton: Skeleton) -> dict[str, Any]:
    """Arguments of `write_bundle`, less the path and the id."""
    return {
        "skeleton": skeleton,
        "meshes": {"preview": boxes_around_bones(skeleton, 2), "standard": boxes_around_bones(skeleton, 4)},
        "repose_onnx": lbs_graph(skeleton),
        "checkpoint": safetensors.numpy.save({"nothing": np.zeros(3, np.float32)}),
        "provenance": {"data_set": "boxes", "split": "none", "seed": 0, "settings": {"cuts": 4}},
        "metrics": {"iou": 0.5},
    }


@pytest.fixture(scope="session")
def bundle_dir(tmp_path_factory: pytest.TempPathFactory, bundle_parts: dict[str, Any]) -> Path:
    """A folder with the avatar `tiny`.  Shared by all tests: not to be written to."""
    folder = tmp_path_factory.mktemp("avatars")
    write_bundle(folder / "tiny", avatar_id="tiny", **bundle_parts)
    return folder


ClientFactory = Callable[..., AbstractAsyncContextManager[httpx.AsyncClient]]


@pytest.fixture
def serve(bundle_dir: Path, tmp_path: Path) -> ClientFactory:
    """`async with serve() as client`: the application in this process, started and stopped."""

    @asynccontextmanager
    async def started(make_engine: Any = None, **settings: Any) -> AsyncIterator[httpx.AsyncClient]:
        app = create_app(
            Settings(**{"bundle_dir": bundle_dir, "threads": 1, "jobs_dir": tmp_path / "jobs"} | settings), make_engine
        )
        async with app.router.lifespan_context(app):
            await app.state.store.preloaded.wait()
            # A 500 must come back as an answer, as it would over the wire.
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://reposer") as client:
                client.app = app  # type: ignore[attr-defined]
                yield client

    return started


@pytest.fixture(scope="session")
def run_server() -> Callable[[Any], AbstractContextManager[tuple[str, int]]]:
    """`with run_server(app) as (host, port)`: a real server, for what the parsers below the application do."""

    @contextmanager
    def running(app: Any) -> Iterator[tuple[str, int]]:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            # The loop and the parser of `service.serve`.
            config = uvicorn.Config(
                app, loop="asyncio", http=HttpProtocol, log_level="critical", timeout_graceful_shutdown=1, ws="none"
            )
            server = uvicorn.Server(config)
            thread = threading.Thread(target=server.run, args=([listener],))
            thread.start()
            while not server.started and thread.is_alive():
                threading.Event().wait(0.01)
            try:
                yield listener.getsockname()
            finally:
                server.should_exit = True
                thread.join(20)
                assert not thread.is_alive()

    return running


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real Redis of the tests' own; it keeps nothing on the disk."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = str(tmp_path_factory.mktemp("redis"))
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", folder]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
        for _ in range(500):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(0.02)
        yield f"redis://127.0.0.1:{port}/0"
        server.terminate()


@pytest.fixture(scope="session")
def motion() -> dict[str, NDArray[np.float64]]:
    """Seven frames in which every joint and the root move: poses (7, 72), trans (7, 3)."""
    rng = np.random.default_rng(5)
    return {"poses": rng.normal(0, 0.4, (7, 72)), "trans": rng.normal(0, 1.0, (7, 3))}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class RedisServer:
    """A redis-server of our own."""

    def __init__(self, folder: Path) -> None:
        program = shutil.which("redis-server")
        assert program, "redis-server is missing; `make test` installs it"
        self.port, self._folder, self._program = free_port(), folder, program
        self.url = f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        command = [self._program, "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--dir", self._folder]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except OSError:
                time.sleep(0.02)
        raise AssertionError("redis-server does not start")

    def stop(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait()


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path)
    server.start()
    yield server
    server.stop()
