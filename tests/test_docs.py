"""The pages say what is true: every command of README.md and docs/ is run, or, where it cannot be, parsed.

A fenced block of `sh`, `bash` or `python` is run, line by line, in one folder that looks like the repository to a
reader; a command that two pages share is run once.  A block marked ```` ```bash no-run: needs docker ```` is not
run: its reason must be one of `REASONS`, and its commands must be ones that exist.  A block marked `text output` is
what the block before it prints.
"""

import json
import os
import pickle
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import manifold3d
import numpy as np
import pytest
import torch
import trimesh
import yaml

from service import demo
from service.__main__ import _parser as service_parser
from training.__main__ import _parser as training_parser
from training.data.body import open_body
from training.data.motion import make_motions
from training.data.smpl_file import read_smpl_file

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
REASONS = {
    "needs docker",
    "needs Blender",
    "needs a GPU",
    "needs a browser",
    "needs a cluster",
    "takes long",
    "a load test",
    "has tests of its own",
    "part of make test",
}
SETTINGS = (
    "stages=weights,vote,forward field_spacing_m=0.03 network.code_width=3 network.field_spacing_m=0.08 "
    "network.skinning_spacing_m=0.06 weights.steps=10 vote.spacing_m=0.02 forward.steps=4 forward.points=512"
)
SHORTER = " ".join(f"--set {setting}" for setting in SETTINGS.split())
SUBSTITUTIONS = [
    # The service of the tests is not on port 8000.
    (r"http://127\.0\.0\.1:8000", "{url}"),
    (r"\breposer repose ", "reposer repose --url {url} "),
    (r"\breposer avatars (\w+)", r"reposer avatars \1 --url {url}"),
    (r"^make serve\b", "make serve PORT={port}"),
    # Minutes become seconds: every stage happens, little is learned.
    (r"\breposer-train train ", f"reposer-train train {SHORTER} "),
    # An export compares 512 poses with float64; `tests/training/test_export.py` does that.
    (r" --bundle avatars/me\b", ""),
    (r"\breposer bake ", "reposer bake --poses 40 --lod preview "),
]
STAYS_OPEN = re.compile(r"make serve\b")
"""Waited for until it is ready, then ended by Ctrl-C."""
LIMIT_S = 400
MOTION_FRAMES = 2
"""Of assets/demo-motion.npz and of the reader's motions, here."""
FENCE = re.compile(r"^```(\S*)[ ]?(.*?)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block of commands."""

    page: str
    line: int
    language: str
    reason: str
    """Why it is not run; empty where it is."""
    commands: tuple[str, ...]
    printed: str
    """What the page says that it prints."""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def read_blocks(page: Path) -> list[Block]:
    text, blocks = page.read_text(), []
    fences = list(FENCE.finditer(text))
    for n, fence in enumerate(fences):
        language, words, body = fence.groups()
        if language not in ("sh", "bash", "python"):
            continue
        printed = "".join(after[3] for after in fences[n + 1 : n + 2] if after.group(1, 2) == ("text", "output"))
        lines = body.replace("\\\n", " ").splitlines()
        commands = (body,) if language == "python" else tuple(line for line in lines if line.strip())
        assert not words or words.startswith("no-run: "), f"{page.name}: expected 'no-run: <reason>', got {words!r}"
        line = text[: fence.start()].count("\n") + 1
        name, reason = page.relative_to(ROOT).as_posix(), words.removeprefix("no-run: ")
        blocks.append(Block(name, line, language, reason, commands, printed))
    return blocks


BLOCKS = [block for page in PAGES for block in read_blocks(page)]
RUN = [block for block in BLOCKS if not block.reason]
PARSED = [block for block in BLOCKS if block.reason]


def test_what_is_not_run_has_a_good_reason(capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(f"\n{len(RUN)} blocks of the documentation are run, {len(PARSED)} are only parsed:")
        for block in PARSED:
            print(f"  {block}: {block.reason}: {block.commands[0]}")
    assert {block.reason for block in PARSED} <= REASONS


# What is run.


@dataclass
class Reader:
    """Somebody who has cloned the repository, keeps their files in it, and has the service running."""

    folder: Path
    environment: dict[str, str]
    url: str
    done: dict[str, str] = field(default_factory=dict)
    """Commands and what they printed."""

    def runs(self, command: str, language: str) -> str:
        """What it prints; fails if it does, or if a file that it was to write is not there."""
        key = command if language == "python" else " ".join(shlex.split(command, comments=True))
        if key in self.done:
            return self.done[key]
        port = free_port()
        line = command
        for pattern, replacement in SUBSTITUTIONS:
            line = re.sub(pattern, replacement.replace("{url}", self.url).replace("{port}", str(port)), line)
        arguments = ["python", "-c", line] if language == "python" else ["bash", "-euo", "pipefail", "-c", line]
        process = subprocess.Popen(
            arguments, cwd=self.folder, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, start_new_session=True,
        )  # fmt: skip
        try:
            if STAYS_OPEN.match(command):
                wait_until_ready(f"http://127.0.0.1:{port}/readyz", process)
                os.killpg(process.pid, signal.SIGINT)
            printed, _ = process.communicate(timeout=LIMIT_S)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        assert process.returncode == 0 or STAYS_OPEN.match(command), f"{line}\n{printed}"
        for name in re.findall(r" -o (\S+)", command):
            assert (self.folder / name).stat().st_size > 0, line
        self.done[key] = printed
        return printed


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    folder = tmp_path_factory.mktemp("clone")
    for path in ROOT.iterdir():
        if path.name not in ("assets", "avatars", "out", "runs", "subjects", ".git"):
            (folder / path.name).symlink_to(path)
    shutil.copytree(ROOT / "avatars" / "open", folder / "avatars" / "open")
    (folder / "assets").mkdir()
    give_motions(folder)
    give_scans(folder / "my-scans")
    give_licensed_data(folder)
    # The .venv and the viewer are there, whatever their time stamps say: nothing is installed by a test.
    shim = folder / "bin" / "make"
    shim.parent.mkdir()
    kept = " ".join(f"-o {name}" for name in (".venv/.service", ".venv/.develop", "viewer/dist/index.html"))
    shim.write_text(f'#!/bin/sh\nexec {shutil.which("make")} MAKE="$0" {kept} "$@"\n')
    shim.chmod(0o755)
    # Ray's sockets bear no long names.
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as short:
        path = f"{shim.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        more = {"PATH": path, "HOME": short, "RAY_TMPDIR": short, "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1"}
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("REPOSER_JOBS_DIR", str(folder / "jobs"))
            with demo.running_server(folder / "avatars") as url:
                yield Reader(folder, os.environ | more, url)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", sorted({block.page for block in RUN}))
def test_commands_of(page: str, reader: Reader) -> None:
    for block in RUN:
        if block.page != page:
            continue
        printed = "".join(reader.runs(command, block.language) for command in block.commands)
        for line in block.printed.splitlines():
            assert line in printed, f"{block}: not printed: {line}\n{printed}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until_ready(url: str, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        try:
            if httpx.get(url, timeout=30).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.1)
    raise AssertionError(f"{url} does not answer")


def give_motions(folder: Path) -> None:
    """The demonstration's motion, shorter; three of the reader's own; and what GVHMR writes."""
    with np.load(ROOT / "assets" / "demo-motion.npz") as motion:
        arrays: dict[str, Any] = {name: motion[name] for name in motion.files}
    for n, name in enumerate(("assets/demo-motion", "walk", "squat", "dance")):
        part = slice(20 * n, 20 * n + MOTION_FRAMES)
        short = arrays | {"poses": arrays["poses"][part], "trans": arrays["trans"][part]}
        np.savez(folder / f"{name}.npz", **short)
    poses, trans = torch.from_numpy(arrays["poses"][:40]).float(), torch.from_numpy(arrays["trans"][:40]).float()
    part = {"global_orient": poses[:, :3], "body_pose": poses[:, 3:66], "transl": trans, "betas": torch.zeros(40, 10)}
    torch.save({"smpl_params_global": part, "smpl_params_incam": part}, folder / "hmr4d_results.pt")


def give_scans(folder: Path) -> None:
    """Two sequences of the open body as scans."""
    body = open_body()
    motions = {motion.name: motion for motion in make_motions(body.skeleton, frames=5)}
    folder.mkdir()
    np.save(folder / "rest_joints.npy", body.skeleton.rest_joints)
    for name, motion, rows in (("walk1", "walk", [0, 2]), ("walk2", "squat", [2])):
        pose, translation = motions[motion].pose, motions[motion].translation
        np.savez(folder / f"{name}.npz", poses=pose.reshape(-1, 72), trans=translation, mocap_framerate=30.0)
        (folder / name).mkdir()
        for row, transforms in zip(rows, body.transforms(pose[rows], translation[rows]), strict=True):
            scan = simplified(body.posed(transforms), body.faces, 0.003)
            trimesh.Trimesh(*scan, process=False).export(folder / name / f"{row:05d}.ply")


def give_licensed_data(folder: Path) -> None:
    """A model file in SMPL's layout, one outfit in CAPE's and one person in AMASS's; nothing in them is of those."""
    body = open_body()
    vertices, faces = simplified(body.vertices, body.faces, 0.01)
    near = np.linalg.norm(vertices[:, None] - body.vertices[None, ::5], axis=2).argmin(1)
    of_joints = np.linalg.norm(body.skeleton.rest_joints[:, None] - vertices, axis=2).argmin(1)
    parents = np.array(body.skeleton.parents) % 2**32  # the root's is -1, unsigned
    smpl = {
        "v_template": vertices, "f": faces.astype(np.uint32), "weights": body.weights[::5][near],
        "J_regressor": np.eye(len(vertices))[of_joints], "shapedirs": np.zeros((len(vertices), 3, 10)),
        "posedirs": np.zeros((len(vertices), 3, 207)),
        "kintree_table": np.stack([parents, np.arange(24)]).astype(np.uint32),
    }  # fmt: skip
    (folder / "SMPL_MALE.pkl").write_bytes(pickle.dumps(smpl, protocol=2))
    (folder / "smplh" / "male").mkdir(parents=True)
    np.savez(folder / "smplh" / "male" / "model.npz", **smpl)
    model = read_smpl_file(folder / "SMPL_MALE.pkl")
    minimal = folder / "cape_release" / "minimal_body_shape" / "00096" / "00096_minimal.npy"
    minimal.parent.mkdir(parents=True)
    np.save(minimal, vertices)
    people = folder / "DFaust_67" / "50002"
    people.mkdir(parents=True)
    for n, motion in enumerate(("shortlong_hips", "shortlong_walk")):
        sequence = folder / "cape_release" / "sequences" / "00096" / motion
        sequence.mkdir(parents=True)
        pose = np.zeros((24, 3))
        pose[16, 2] = -0.3 * n
        frame = {"v_posed": model.posed(vertices, pose, np.zeros(3)), "v_cano": vertices}
        np.savez(sequence / f"{motion}.000001.npz", pose=pose.ravel(), transl=np.zeros(3), **frame)
    for name in ("50002_chicken_wings", "50002_hips"):
        poses = {"poses": np.zeros((1, 156)), "trans": np.zeros((1, 3)), "betas": np.zeros(16)}
        np.savez(people / f"{name}_poses.npz", gender="male", mocap_framerate=60.0, **poses)


def simplified(vertices: np.ndarray, faces: np.ndarray, tolerance_m: float) -> tuple[np.ndarray, np.ndarray]:
    solid = manifold3d.Manifold(manifold3d.Mesh(vertices.astype(np.float32), faces.astype(np.uint32)))
    mesh = solid.simplify(tolerance_m).to_mesh()
    return np.array(mesh.vert_properties[:, :3], np.float64), np.array(mesh.tri_verts, np.int64)


# What is only parsed.


@pytest.mark.parametrize("block", PARSED, ids=str)
def test_what_is_not_run_exists(block: Block) -> None:
    for line in block.commands:
        for words in commands_of(line):
            check_exists(words)


def commands_of(line: str) -> Iterator[list[str]]:
    """The words of each command of a line, the variables that it sets checked and taken off."""
    for part in re.split(r"&&|\|", line):
        words = shlex.split(re.sub(r"^\w+=\$\((.*)\)", r"\1", part.strip()), comments=True)
        exports = words[:1] == ["export"]
        while words and (exports or re.match(r"\w+=", words[0])):
            name = words.pop(0).partition("=")[0]
            variable = re.compile(rf"^(# )?{name}=", re.MULTILINE)
            assert name == "export" or variable.search((ROOT / ".env.example").read_text()), f"{name}: .env.example?"
        yield words


def check_exists(words: list[str]) -> None:
    """The command is one of ours, or speaks of what there is.

    Raises:
        AssertionError, SystemExit: it is not.
    """
    match words:
        case ["docker", "compose", *rest]:
            check_compose(rest)
        case ["docker", "stop" | "rm", *_] | []:
            pass
        case ["make", target]:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target
        case ["reposer", *rest]:
            service_parser().parse_args(rest)
        case ["reposer-train", *rest]:
            training_parser().parse_args(rest)
        case ["npm", "test"]:
            assert "npm test" in (ROOT / "scripts" / "check").read_text()
        case ["npm", "run", script, "-w", workspace]:
            package = json.loads((ROOT / "viewer/package.json").read_text())
            assert package["name"] == workspace
            assert script in package["scripts"]
        case ["blender", *rest] | [".venv/bin/python", "-m", "pytest", *rest] | ["kubectl", *rest]:
            ours = [word for word in rest if "/" in word]
            assert ours
            assert all((ROOT / word).exists() for word in ours), words
        case [script, *_]:
            assert script.startswith("scripts/"), f"expected a command that is known here, got {script}"
            assert os.access(ROOT / script, os.X_OK), script


def check_compose(words: list[str]) -> None:
    """Files, profiles and services are there; what runs inside of one of ours is a command of it."""
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    profiles = {profile for service in services.values() for profile in service.get("profiles", ())}
    rest = deque(words)
    while rest[0] in ("-f", "--profile"):
        option, value = rest.popleft(), rest.popleft()
        assert (ROOT / value).is_file() if option == "-f" else value in profiles, value
    command = rest.popleft()
    assert command in ("up", "down", "build", "ps", "run", "exec", "restart", "logs", "pull"), command
    named = []
    while rest and not (named and command in ("run", "exec")):
        word = rest.popleft()
        if word == "-v":
            rest.popleft()
        elif word == "--scale":
            named.append(rest.popleft().partition("=")[0])
        elif not word.startswith("-"):
            named.append(word)
    assert set(named) <= services.keys(), words
    if command == "run":
        build = services[named[0]].get("build", {})
        images = (ROOT / build["dockerfile"]).read_text() if build else ""
        inside = services[named[0]].get("entrypoint") or json.loads(re.findall(r"^ENTRYPOINT (.*)$", images, re.M)[-1])
        check_exists([*inside, *rest])
