"""The demonstration behind `make demo`: a real server, a real motion, the real API, a file and a picture.

Ends with 0 only if everything held: the frames came in order, all with the mesh's own vertices and faces.
"""

import argparse
import contextlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
from numpy.typing import NDArray

from service.answers import FRAMES, GLB
from service.bundle.glb import Mesh, read_mesh, welded_faces
from service.bundle.skeleton import axis_angle_to_matrix
from service.formats.morph import MAX_GLB_FRAMES, read_animated_glb
from service.frames import decode_stream
from service.picture import contact_sheet, render, save_png, texture_of

START_TIMEOUT_S = 120.0
ANSWER_TIMEOUT_S = 900.0
PICTURES, COLUMNS, PICTURE_SIZE = 8, 4, (360, 480)
AGREEMENT_M = 1e-5


class DemoError(Exception):
    """Something did not hold; the message says what."""


@dataclass(frozen=True)
class Streamed:
    """What the frame stream gave."""

    vertices: NDArray[np.float32]
    """(F, V, 3), metres."""
    first_frame_s: float
    total_s: float


def main() -> int:
    """Run the demonstration; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m service.demo", description=__doc__)
    parser.add_argument("motion", type=Path, help=".npz with poses (F, 72), trans, mocap_framerate")
    parser.add_argument("--bundles", type=Path, default=Path("avatars"))
    parser.add_argument("--avatar", help="by default the first one")
    parser.add_argument("--lod", default="standard")
    parser.add_argument("--up-axis", choices=("y", "z"), default="y", help="of the motion")
    parser.add_argument("--out", type=Path, default=Path("out"))
    parsed = parser.parse_args()
    try:
        with running_server(parsed.bundles) as url, httpx.Client(base_url=url, timeout=ANSWER_TIMEOUT_S) as client:
            demonstrate(client, parsed)
    except (DemoError, OSError, httpx.HTTPError, ValueError) as error:
        print(f"demo failed: {error}", file=sys.stderr)
        return 1
    return 0


def demonstrate(client: httpx.Client, parsed: argparse.Namespace) -> None:
    """Post the motion twice, compare the answers, and write the .glb and the picture."""
    body = parsed.motion.read_bytes()
    with np.load(parsed.motion, allow_pickle=False) as motion:  # our own file, not an upload
        poses = motion["poses"].astype(np.float64)
    every = -(-len(poses) // MAX_GLB_FRAMES)
    rotations = axis_angle_to_matrix(poses[::every, :66].reshape(-1, 22, 3))
    if parsed.up_axis == "z":
        rotations[:, 0] = axis_angle_to_matrix(np.array([-np.pi / 2, 0, 0])) @ rotations[:, 0]

    avatars = {avatar["id"]: avatar for avatar in _checked(client.get("/avatars")).json()["avatars"]}
    avatar_id = parsed.avatar or next(iter(avatars), None)
    if avatar_id not in avatars:
        raise DemoError(f"no avatar {avatar_id or ''} in {parsed.bundles}")
    device, provider = avatars[avatar_id]["device"], avatars[avatar_id]["provider"]
    print(f"avatar {avatar_id} on {device} ({provider}), motion {parsed.motion.name} of {len(rotations)} frames")

    mesh = read_mesh(_checked(client.get(f"/avatars/{avatar_id}/mesh", params={"lod": parsed.lod})).content)
    query = {"lod": parsed.lod, "up_axis": parsed.up_axis, "every": every}
    url, kind = f"/avatars/{avatar_id}/repose", {"Content-Type": "application/x-npz"}
    streamed = _stream(client, url, query, body, kind)
    if streamed.vertices.shape != (len(rotations), *mesh.vertices.shape):
        raise DemoError(f"expected {len(rotations)} frames of {len(mesh.vertices)} vertices")
    answer = _checked(client.post(url, params=query, content=body, headers=kind | {"Accept": GLB}))
    _check_topology(answer.content, mesh, streamed)

    parsed.out.mkdir(parents=True, exist_ok=True)
    (parsed.out / "demo.glb").write_bytes(answer.content)
    save_png(_picture(streamed.vertices, mesh, rotations), str(parsed.out / "demo.png"))
    steady_s = max(streamed.total_s - streamed.first_frame_s, 1e-9)
    rate = (len(rotations) - 1) / steady_s if len(rotations) > 1 else 1 / streamed.total_s
    print(f"vertices       {len(mesh.vertices)}")
    print(f"faces          {len(mesh.faces)}, the same in every frame")
    print(f"frames         {len(rotations)}")
    print(f"frames/s       {rate:.1f}")
    print(f"first frame    {1000 * streamed.first_frame_s:.0f} ms")
    print(f"written        {parsed.out / 'demo.glb'} ({len(answer.content) / 1e6:.1f} MB), {parsed.out / 'demo.png'}")


@contextlib.contextmanager
def running_server(bundles: Path) -> Iterator[str]:
    """`reposer serve` in a process of its own, ready to answer; yields its URL and stops it in the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "service", "serve", "--bundles", str(bundles), "--port", str(port)]
    server = subprocess.Popen(command)
    try:
        _wait_until_ready(server, url)
        yield url
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _wait_until_ready(server: subprocess.Popen[bytes], url: str) -> None:
    deadline, said = time.monotonic() + START_TIMEOUT_S, "no answer"
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise DemoError(f"the server ended with status {server.returncode}")
        try:
            answer = httpx.get(f"{url}/readyz", timeout=30)
            if answer.status_code == 200:
                return
            said = answer.text
            if answer.status_code == 503:
                raise DemoError(f"the server has nothing to serve: {said}")
        except httpx.TransportError:
            time.sleep(0.1)
    raise DemoError(f"the server is not ready after {START_TIMEOUT_S:.0f} s: {said}")


def _stream(client: httpx.Client, url: str, query: dict[str, object], body: bytes, kind: dict[str, str]) -> Streamed:
    frames, first_s = [], 0.0
    began = time.perf_counter()
    headers = kind | {"Accept": FRAMES}
    with client.stream("POST", url, params=query, content=body, headers=headers) as answer:  # type: ignore[arg-type]
        if answer.status_code != 200:
            answer.read()
        for frame in decode_stream(_checked(answer).iter_bytes()):
            first_s = first_s or time.perf_counter() - began
            frames.append(frame.vertices)
    total_s = time.perf_counter() - began
    if len({vertices.shape for vertices in frames}) != 1:
        raise DemoError("the number of vertices changes within the stream")
    return Streamed(np.stack(frames), first_s, total_s)


def _check_topology(glb: bytes, mesh: Mesh, streamed: Streamed) -> None:
    still, vertices, _ = read_animated_glb(glb)
    if not np.array_equal(still.faces, mesh.faces) or not np.array_equal(still.vertices, mesh.vertices):
        raise DemoError("the animated .glb has not the faces and vertices of the mesh")
    if vertices.shape != streamed.vertices.shape:
        raise DemoError(f"the .glb has {vertices.shape}, the stream {streamed.vertices.shape}")
    off = float(np.abs(vertices - streamed.vertices).max())
    if not off < AGREEMENT_M:
        raise DemoError(f"the .glb and the stream are {1000 * off:.3f} mm apart")


def _checked(answer: httpx.Response) -> httpx.Response:
    if answer.status_code != 200:
        raise DemoError(f"{answer.request.url}: {answer.status_code} {answer.text}")
    return answer


def different_poses(rotations: NDArray[np.float64], count: int) -> list[int]:
    """Frames that differ most in body pose, in their own order: farthest-point choice, the root left out."""
    body = rotations[:, 1:].reshape(len(rotations), -1)
    chosen = [int(np.linalg.norm(body - body.mean(axis=0), axis=1).argmax())]
    distance = np.full(len(body), np.inf)
    while len(chosen) < min(count, len(body)):
        distance = np.minimum(distance, np.linalg.norm(body - body[chosen[-1]], axis=1))
        distance[chosen] = -1.0  # a motion that stands still has frames all the same
        chosen.append(int(distance.argmax()))
    return sorted(chosen)


def _picture(vertices: NDArray[np.float32], mesh: Mesh, rotations: NDArray[np.float64]) -> NDArray[np.uint8]:
    chosen = different_poses(rotations, PICTURES)
    shown = vertices[chosen]
    floor = float(shown[..., 1].min())
    texture = texture_of(mesh)
    faces = welded_faces(mesh)  # or the light would break at the seams of a texture
    # One scale for all, so that the figures can be compared.
    span = 1.2 * float(shown[..., 1].max() - floor)
    pictures = []
    for n, (frame, figure) in enumerate(zip(chosen, shown, strict=True)):
        x, _, z = (figure.min(axis=0) + figure.max(axis=0)) / 2
        facing = rotations[frame, 0] @ np.array([0.0, 0.0, 1.0])
        heading = float(np.degrees(np.arctan2(facing[0], facing[2])))
        pictures.append(
            render(
                figure,
                faces,
                PICTURE_SIZE,
                azimuth_deg=heading + (25 if n % 2 else -25),
                target=(float(x), floor + 0.44 * span, float(z)),
                span_m=span,
                colors=mesh.colors,
                texture=texture,
                ground_y=floor,
            )
        )
    return contact_sheet(pictures, COLUMNS)


if __name__ == "__main__":
    sys.exit(main())
