"""The JavaScript client before the real service."""

import json
import subprocess

import pytest

from service.bundle.files import read_bundle
from tests.viewer.conftest import ROOT, Service


@pytest.mark.timeout(300)
def test_every_codec_gives_the_same_vertices_over_http_and_websocket(service: Service) -> None:
    command = ["node", "tests/viewer/client.mjs", service.url]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["vertices"] == len(read_bundle(ROOT / "avatars" / "open").meshes["preview"].vertices)
    assert result["moved"] > 0.01
    for codec, most in (("f32", 1e-5), ("q16", 3e-5), ("q16d", 3e-5)):
        assert result[codec]["answer"] < most
        assert result[codec]["stream"] < most
    assert result["refused"] == ["Problem", 404, "avatar-not-found"]
