"""The viewer's files and the poses it plays; what the page does in a browser is in `tests/viewer/`."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.bundle.skeleton import axis_angle_to_matrix
from service.routes.viewer import HEADERS

pytestmark = pytest.mark.anyio


@pytest.fixture
def built(tmp_path: Path) -> Path:
    """A built viewer, and a file beside it that is nobody's business."""
    (tmp_path / "dist/viewer").mkdir(parents=True)
    (tmp_path / "dist/index.html").write_text("<p>the page</p>")
    (tmp_path / "dist/viewer/index-1a2b.js").write_text("0")
    (tmp_path / "secret.txt").write_text("secret")
    return tmp_path / "dist"


async def test_page_is_asked_for_again_and_files_are_kept(serve: Callable[..., Any], built: Path) -> None:
    async with serve(viewer_dir=built) as client:
        page, script = await client.get("/"), await client.get("/viewer/index-1a2b.js")
    assert page.text == "<p>the page</p>"
    assert page.headers["cache-control"] == "no-cache"
    assert script.text == "0"
    assert script.headers["content-type"].startswith("text/javascript")
    assert "immutable" in script.headers["cache-control"]


async def test_nothing_inline_or_foreign_may_run(serve: Callable[..., Any], built: Path) -> None:
    async with serve(viewer_dir=built) as client:
        for path in ("/", "/viewer/index-1a2b.js"):
            headers = (await client.get(path)).headers
            assert {name: headers[name] for name in HEADERS} == HEADERS
            policy = dict(part.strip().partition(" ")[::2] for part in headers["content-security-policy"].split(";"))
            assert policy["default-src"] == "'none'"
            assert policy["script-src"] == "'self'"


@pytest.mark.parametrize("name", ["..%2F..%2Fsecret.txt", "%2e%2e/secret.txt", "../index.html", "missing.js", ""])
async def test_only_files_of_the_viewer_are_given(serve: Callable[..., Any], built: Path, name: str) -> None:
    async with serve(viewer_dir=built) as client:
        answer = await client.get(f"/viewer/{name}")
    assert answer.status_code == 404


async def test_viewer_that_was_not_built_is_a_clear_page(serve: Callable[..., Any], tmp_path: Path) -> None:
    async with serve(viewer_dir=tmp_path) as client:
        page = await client.get("/")
    assert page.status_code == 404
    assert "scripts/build-viewer" in page.text


def rows_of(content: bytes) -> np.ndarray:
    return np.frombuffer(content, "<f4").reshape(-1, 75)


async def test_poses_come_back_in_the_form_that_is_played(
    serve: Callable[..., Any], motion: dict[str, np.ndarray]
) -> None:
    archive = io.BytesIO()
    np.savez(archive, **motion, mocap_framerate=60.0)
    async with serve() as client:
        headers = {"Content-Type": "application/x-npz"}
        answer = await client.post("/avatars/tiny/poses", content=archive.getvalue(), headers=headers)
    rows = rows_of(answer.content)
    assert (answer.headers["reposer-fps"], answer.headers["reposer-frames"]) == ("60", "7")
    posted = axis_angle_to_matrix(motion["poses"].reshape(7, 24, 3))
    np.testing.assert_allclose(axis_angle_to_matrix(rows[:, :72].reshape(7, 24, 3)), posted, atol=1e-5)
    np.testing.assert_allclose(rows[:, 72:], motion["trans"], atol=1e-6)


async def test_npy_and_json_are_the_same_poses(serve: Callable[..., Any], motion: dict[str, np.ndarray]) -> None:
    file = io.BytesIO()
    np.save(file, motion["poses"])
    async with serve() as client:
        bodies = {
            "npy": await client.post(
                "/avatars/tiny/poses?up_axis=z", content=file.getvalue(), headers={"Content-Type": "application/x-npy"}
            ),
            "json": await client.post("/avatars/tiny/poses?up_axis=z", json={"poses": motion["poses"].tolist()}),
        }
    assert {answer.headers["reposer-up-axis"] for answer in bodies.values()} == {"z"}
    np.testing.assert_allclose(rows_of(bodies["npy"].content), rows_of(bodies["json"].content), atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "body", "status"),
    [
        ("text/plain", b"hello", 415),
        ("application/x-npy", b"hello", 422),
        ("application/x-npz", b"hello", 422),
        ("application/json", b"{", 400),
        ("application/json", b'{"poses": [[1]]}', 422),
    ],
)
async def test_what_is_no_pose_file_is_refused(serve: Callable[..., Any], kind: str, body: bytes, status: int) -> None:
    async with serve() as client:
        answer = await client.post("/avatars/tiny/poses", content=body, headers={"Content-Type": kind})
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
