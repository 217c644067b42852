"""The commands against a real server in a process of its own."""

import io
import json
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from service import __main__ as command
from service import demo
from service.answers import GLB
from service.client.calls import Call
from service.client.sync import Client
from service.formats.morph import read_animated_glb
from service.frames import decode_stream
from service.schemas import ReposeQuery


@pytest.fixture(scope="module")
def url(bundle_dir: Path) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as jobs:
        patch.setenv("REPOSER_JOBS_DIR", jobs)
        with demo.running_server(bundle_dir) as address:
            yield address


@pytest.fixture
def motion_file(tmp_path: Path, motion: Any) -> Path:
    np.savez(tmp_path / "motion.npz", mocap_framerate=30.0, **motion)
    return tmp_path / "motion.npz"


def test_a_real_server_streams_frames(url: str) -> None:
    body = {"poses": np.zeros((40, 72)).tolist()}
    with httpx.stream("POST", f"{url}/avatars/tiny/repose", json=body) as answer:
        frames = list(decode_stream(answer.iter_raw()))
    assert [frame.frame for frame in frames] == list(range(40))
    assert answer.headers["reposer-frames"] == "40"


def test_a_real_server_answers_a_bad_body_with_a_problem(url: str) -> None:
    answer = httpx.post(f"{url}/avatars/tiny/repose", json={"poses": []})
    assert (answer.status_code, answer.json()["code"]) == (422, "pose-empty")
    large = httpx.post(
        f"{url}/avatars/tiny/repose", content=b" " * (5 << 20), headers={"Content-Type": "application/json"}
    )
    assert (large.status_code, large.json()["code"]) == (413, "body-too-large")


@pytest.mark.parametrize("name", ["out.glb", "out.npz", "out.frames"])
def test_repose_writes_what_was_asked_for(
    url: str, motion_file: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = motion_file.with_name(name)
    assert command.main(["repose", "tiny", str(motion_file), "-o", str(output), "--url", url, "--up-axis", "z"]) == 0
    assert "frames 7, vertices 368, up-axis z" in capsys.readouterr().out
    if name == "out.glb":
        assert read_animated_glb(output.read_bytes())[1].shape == (7, 368, 3)
    elif name == "out.npz":
        with np.load(output, allow_pickle=False) as arrays:
            assert arrays["vertices"].shape == (7, 368, 3)
    else:
        assert len(list(decode_stream([output.read_bytes()]))) == 7


def test_repose_takes_json(url: str, tmp_path: Path) -> None:
    (tmp_path / "poses.json").write_text(json.dumps({"poses": [[0.0] * 72]}))
    arguments = ["repose", "tiny", str(tmp_path / "poses.json"), "-o", str(tmp_path / "out.glb"), "--url", url]
    assert command.main(arguments) == 0


def test_every_option_of_the_query_has_a_flag_that_reaches_the_server(
    url: str, motion_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: dict[str, str] = {
        "lod": "preview", "up_axis": "z", "units": "cm", "fps": "60.0", "rotation": "axis_angle", "frame": "world",
        "every": "2", "target_fps": "15.0", "normalize": "true",
    }  # fmt: skip
    calls: list[Call] = []
    save = Client._save

    def remember(self: Client, method: str, call: Call, *rest: Any) -> Any:
        calls.append(call)
        return save(self, method, call, *rest)

    monkeypatch.setattr(Client, "_save", remember)
    poses = motion_file.with_name("motion.json")
    with np.load(motion_file) as arrays:
        poses.write_text(json.dumps({"poses": arrays["poses"].tolist()}))
    output = motion_file.with_name("out.npz")
    command_line = ["repose", "tiny", str(poses), "-o", str(output), "--url", url]
    assert command.main(command_line) == 0
    wanted: list[dict[str, str]] = [{}]
    # The two exclude each other.  At 60 a second, each second frame is 30 a second: of 7 frames 4, or as 15 a second 2.
    for without, frames, fps in (("target_fps", 4, 30.0), ("every", 2, 15.0)):
        flags = {name: value for name, value in said.items() if name != without}
        wanted.append(flags)
        words = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", value)]
        words.remove("true")
        assert command.main([*command_line, *words, "--timeout", "60"]) == 0
        with np.load(output, allow_pickle=False) as arrays:
            assert (len(arrays["vertices"]), float(arrays["fps"])) == (frames, fps)
    assert [call.query for call in calls] == wanted
    assert said.keys() == ReposeQuery.model_fields.keys()
    assert [call.headers.get("Request-Timeout") for call in calls] == [None, "60.0", "60.0"]


def test_repose_gives_up_when_its_time_is_over(url: str, motion_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = str(motion_file.with_name("out.npz"))
    for seconds, message in (("0.0000001", "504 deadline"), ("0", "422 option-invalid")):
        words = ["repose", "tiny", str(motion_file), "-o", output, "--url", url, "--timeout", seconds]
        assert command.main(words) == 1
        assert message in capsys.readouterr().err


def test_repose_as_a_job_writes_the_same_file(
    url: str, motion_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    words = ["repose", "tiny", str(motion_file), "--url", url, "--lod", "preview", "-o"]
    outputs = [motion_file.with_name(name) for name in ("at-once.npz", "later.npz", "again.npz")]
    assert command.main([*words, str(outputs[0])]) == 0
    shown: list[tuple[int, int | None]] = []
    monkeypatch.setattr(command._Progress, "show", lambda _, *done: shown.append(done))
    with monkeypatch.context() as patch:
        patch.setattr(Client, "job", interrupted)
        assert command.main([*words, str(outputs[1]), "--job"]) == 1
    said = capsys.readouterr().err
    for output in outputs[1:]:
        assert command.main([*words, str(output), "--job"]) == 0
        assert f"{output}: frames 7, vertices 184" in capsys.readouterr().out
        assert shown[-1] == (7, 7)
    assert len({output.read_bytes() for output in outputs}) == 1
    with Client(url) as client:
        (job,) = client.jobs()  # the same command is the same job
    assert (job.avatar, job.state, job.frames) == ("tiny", "done", 7)
    assert f"interrupted; the job {job.id} goes on" in said
    assert command.main([*words, str(outputs[0]), "--job", "--every", "0"]) == 1
    assert "option-invalid" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main([*words, str(outputs[0]), "--job", "--timeout", "1"])


class Terminal(io.StringIO):
    """Somebody watches."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("avatar", ["tiny", "nobody"])
def test_the_bar_is_gone_at_the_end_and_is_not_there_where_nobody_watches(
    url: str, motion_file: Path, avatar: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = motion_file.with_name("out.npz")
    words = ["repose", avatar, str(motion_file), "-o", str(output), "--url", url]
    for watcher in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", watcher)
        assert command.main(words) == (0 if avatar == "tiny" else 1)
        text = watcher.getvalue()
        assert ("out.npz:" in text) == watcher.isatty()
        # What is left on the last line: nothing, or why it failed.
        rest = text.rpartition("\r")[2].strip()
        assert rest == "" if avatar == "tiny" else rest.startswith("reposer: 404 avatar-not-found")


def test_repose_explains_failures_and_writes_nothing(
    url: str, motion_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = str(motion_file.with_name("out.glb"))
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{closed.getsockname()[1]}"
        for arguments, message in (
            (["nobody", str(motion_file), "-o", output, "--url", url], "404 avatar-not-found"),
            (["tiny", str(motion_file), "-o", output, "--url", url, "--lod", "high"], "404 lod-not-found"),
            (["tiny", str(motion_file), "-o", "out.fbx", "--url", url], "expected a name that ends with"),
            (["tiny", "missing.npz", "-o", output, "--url", url], "missing.npz"),
            (["tiny", str(motion_file), "-o", output, "--url", nobody], nobody),
        ):
            assert command.main(["repose", *arguments]) == 1
            assert message in capsys.readouterr().err
    assert [path.name for path in motion_file.parent.iterdir()] == ["motion.npz"]


def test_inspect_verifies(bundle_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["inspect", str(bundle_dir / "tiny")]) == 0
    assert "standard: 368 vertices, 644 faces" in capsys.readouterr().out
    assert command.main(["inspect", str(tmp_path)]) == 1
    assert "avatar.json" in capsys.readouterr().err


def test_serve_wants_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["serve", "--bundles", str(tmp_path / "nowhere")]) == 1
    assert "nowhere" in capsys.readouterr().err


def test_demo_writes_its_file_and_its_picture(
    bundle_dir: Path, motion_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "PICTURE_SIZE", (60, 80))
    out = motion_file.with_name("out")
    monkeypatch.setattr("sys.argv", ["demo", str(motion_file), "--bundles", str(bundle_dir), "--out", str(out)])
    assert demo.main() == 0
    printed = capsys.readouterr().out
    assert "vertices       368" in printed
    assert "frames         7" in printed
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert read_animated_glb((out / "demo.glb").read_bytes())[1].shape == (7, 368, 3)


def test_demo_fails_without_an_avatar(
    tmp_path: Path, motion_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "none").mkdir()
    monkeypatch.setattr("sys.argv", ["demo", str(motion_file), "--bundles", str(tmp_path / "none")])
    assert demo.main() == 1
    assert "nothing to serve" in capsys.readouterr().err


def test_demo_sees_a_changed_topology(url: str, bundle_dir: Path, motion: Any) -> None:
    content = httpx.post(
        f"{url}/avatars/tiny/repose", json={"poses": motion["poses"].tolist()}, headers={"Accept": GLB}
    ).content
    mesh, vertices, _ = read_animated_glb(content)
    demo._check_topology(content, mesh, demo.Streamed(vertices, 0.1, 0.2))
    swapped = type(mesh)(mesh.vertices, mesh.faces[:, ::-1])
    for other_mesh, other in ((swapped, vertices), (mesh, vertices[1:]), (mesh, vertices + 1e-4)):
        with pytest.raises(demo.DemoError):
            demo._check_topology(content, other_mesh, demo.Streamed(other, 0.1, 0.2))


def test_the_poses_shown_are_far_apart() -> None:
    rotations = np.tile(np.eye(3), (100, 24, 1, 1))
    for frame, joint in ((10, 4), (40, 17), (70, 18)):
        rotations[frame, joint] = np.diag([-1, -1, 1])
    assert set(demo.different_poses(rotations, 4)) > {10, 40, 70}
    assert demo.different_poses(rotations[:2], 4) == [0, 1]
