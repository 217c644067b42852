"""The benchmark of reposing: sizes are what they say, slow forms are left out where they would take hours."""

import json
from pathlib import Path

import numpy as np
import pytest

from service import bench
from service.bundle.files import read_bundle


def test_points_of_any_size_lie_on_the_canonical_surface(bundle_dir: Path) -> None:
    bundle = read_bundle(bundle_dir / "tiny")
    largest = bundle.meshes["standard"]
    smaller = bench.vertices_of_size(bundle, 20)
    assert {tuple(point) for point in smaller} <= {tuple(point) for point in bundle.meshes["preview"].vertices}
    middles = largest.vertices[largest.faces[:, [0, 1]]].mean(axis=1)
    more = bench.vertices_of_size(bundle, len(largest.vertices) + 30)
    assert len(more) == len(largest.vertices) + 30
    near = np.linalg.norm(more[:, None] - np.concatenate([largest.vertices, middles]), axis=-1).min(axis=1)
    assert np.median(near) < 1e-6


def test_forms_take_turns_and_slow_ones_are_spared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "SLOW_LIMIT", 100)
    monkeypatch.setattr(bench, "WARM_UP_S", 0.0)
    calls: list[tuple[str, int]] = []
    forms = {name: (lambda v, b, r, name=name: calls.append((name, len(b)))) for name in ("fast_onnx", "plain_onnx")}
    many = np.zeros((30, 24, 4, 4), np.float32)
    seconds = bench.measure(forms, np.zeros((10, 3), np.float32), many, many[:, 0], (1, 20))
    assert seconds.keys() == {(1, "fast_onnx"), (1, "plain_onnx"), (20, "fast_onnx")}
    assert calls[:4] == [("fast_onnx", 1), ("plain_onnx", 1)] * 2
    assert ("plain_onnx", 20) not in calls


def test_a_figure_that_could_not_be_taken_is_absent_by_name(tmp_path: Path, capsys) -> None:
    bench.write_report(tmp_path / "repose.json", [bench.row("gpu_10k_batch64_ms", None, "ms", 0.5, at_least=False)])
    (found,) = json.loads((tmp_path / "repose.json").read_text())["rows"]
    assert (found["value"], found["target"], found["met"]) == (None, 0.5, None)
    assert "absent" in capsys.readouterr().out
