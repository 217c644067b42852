"""From a trained state to a bundle that the service accepts, and figures that mean what they say."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

import training.evaluate as evaluation
from model.ins import INS, Grids
from service.bundle.files import read_bundle
from service.bundle.glb import Mesh
from service.bundle.skeleton import axis_angle_to_matrix
from service.engine import OnnxEngine
from training import export
from training.__main__ import main
from training.checkpoint import encode_checkpoint, read_checkpoint
from training.config import Recipe
from training.data.body import open_body
from training.data.mesh import component_count, is_closed
from training.data.subject import Subject
from training.evaluate import evaluate, summary
from training.frames import Frames
from training.loop import restore, train
from training.metrics import intersection_over_union


@pytest.fixture(scope="module")
def run(tiny_subject: Subject, tiny_recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    stages = "stages=weights,vote,forward,occupancy"
    settings = [stages, "network.skinning_at=canonical", "occupancy.steps=400"]
    train(tiny_subject, folder, tiny_recipe.with_settings(settings))
    return folder


@pytest.fixture(scope="module", autouse=True)
def _coarse_extraction() -> Iterator[None]:
    """A quarter of the resolution: the surface of a body that trained for seconds has no fine detail."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "LEVELS", 2)
        patch.setattr(export, "ERROR_POSES", 24)
        patch.setattr(export, "LODS", {"high": 6500, "standard": 5500, "preview": 5000})
        patch.setattr(evaluation, "SURFACE_POINTS", 4000)
        patch.setattr(evaluation, "BOX_POINTS", 4000)
        yield


@pytest.fixture(scope="module")
def bundle_folder(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("avatars") / "tiny"
    assert main(["export", str(run), str(folder)]) == 0
    return folder


def test_bundle_meshes_are_closed_and_of_the_sizes_aimed_at(bundle_folder: Path) -> None:
    bundle = read_bundle(bundle_folder)
    for lod, count in export.LODS.items():
        mesh = bundle.meshes[lod]
        assert is_closed(mesh.faces)
        assert component_count(len(mesh.vertices), mesh.faces)[0] == 1
        assert 0.5 * count < len(mesh.vertices) <= count, lod
    assert bundle.manifest.metrics["onnx_parity_mm"] <= export.MAX_PARITY_MM
    assert bundle.manifest.metrics["fast_max_error_mm"] <= export.MAX_FAST_ERROR_MM
    assert bundle.manifest.metrics["standard_iou_bbox"] > 50
    assert bundle.manifest.provenance["split"]["test"] == ["lunge"]


@pytest.mark.parametrize(("plain", "tolerance"), [(True, 2e-6), (False, 2e-5)])
def test_root_motion_commutes_with_the_exported_graph(bundle_folder: Path, plain: bool, tolerance: float) -> None:
    bundle = read_bundle(bundle_folder)
    session = onnxruntime.InferenceSession(bundle.repose_onnx, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    rotations = axis_angle_to_matrix(rng.normal(0, 0.4, (4, 24, 3)))
    moved = rotations.copy()
    moved[:, 0] = axis_angle_to_matrix(rng.normal(0, 2, (4, 3)))
    shift = rng.normal(0, 2, (4, 3))
    skeleton, vertices = bundle.skeleton, bundle.meshes["preview"].vertices

    def repose(rotations: np.ndarray, translation: np.ndarray) -> np.ndarray:
        feeds = {
            "canonical_vertices": vertices,
            "bone_transforms": skeleton.bone_transforms(rotations),
            "root_transforms": skeleton.root_transforms(rotations, translation),
            "plain": np.array(plain),
        }
        return np.asarray(session.run(None, feeds)[0])

    turn = moved[:, 0] @ np.swapaxes(rotations[:, 0], -1, -2)
    pelvis = skeleton.rest_joints[0]
    expected = np.einsum("fab,fvb->fva", turn, repose(rotations, np.zeros((4, 3))) - pelvis) + pelvis + shift[:, None]
    # The fast form lets the root go through the bones, metres away: float32 rounds to a hundredth of a millimetre.
    np.testing.assert_allclose(repose(moved, shift), expected, atol=tolerance)


@pytest.mark.parametrize(("change", "wrong"), [(2e-5, r"differ by 0\.0[12]"), (float("nan"), "differ by nan")])
def test_export_refuses_a_graph_that_differs_from_torch(
    change: float, wrong: str, bundle_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skeleton, meshes = read_bundle(bundle_folder).skeleton, read_bundle(bundle_folder).meshes
    ins = INS(skeleton.parents, pin_layers=2).eval()
    genuine = export.repose_onnx

    def moved(ins: INS, vertices: np.ndarray) -> bytes:
        last = ins.h_c.layers[0].maps.last[0]
        with torch.no_grad():
            last.bias += change
        graph = genuine(ins, vertices)
        torch.nn.init.zeros_(last.bias)
        return graph

    monkeypatch.setattr(export, "repose_onnx", moved)
    with pytest.raises(export.ExportError, match=wrong):
        export.export_bundle(ins, skeleton, meshes, tmp_path / "tiny", {}, {}, {})
    assert not (tmp_path / "tiny").exists()


def test_export_refuses_a_fast_form_that_differs_from_the_plain_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plain form is right, so only the measurement of the fast one can see it."""
    skeleton = open_body().skeleton
    joints = skeleton.canonical_joints().astype(np.float32)
    meshes = {"standard": Mesh(joints, np.array([[0, 1, 2]], np.int32))}
    ins = INS(skeleton.parents, pin_layers=2, use_h_d=False).eval()
    genuine = export.FastRepose

    def moved(ins: INS, near: object) -> torch.nn.Module:
        ins = copy.deepcopy(ins)
        with torch.no_grad():
            ins.h_c.layers[0].maps.last[0].bias += 2e-4
        return genuine(ins, near)

    monkeypatch.setattr(export, "FastRepose", moved)
    with pytest.raises(export.ExportError, match=r"fast_max_error_mm: .* differ by 0\.[23]"):
        export.export_bundle(ins, skeleton, meshes, tmp_path / "tiny", {}, {}, {})
    assert not (tmp_path / "tiny").exists()


def test_the_poses_of_the_measurement_are_the_real_ones_blends_and_extremes() -> None:
    real = np.full((3, 24, 3), 0.1) * np.arange(1, 4)[:, None, None]
    poses = export.varied_poses(real, 40)
    np.testing.assert_allclose(poses[:3], axis_angle_to_matrix(real))
    angles = np.arccos(np.clip((np.trace(poses, axis1=-2, axis2=-1) - 1) / 2, -1, 1))
    extreme = np.arange(40) % 8 == 7
    assert angles[~extreme].max() < 0.6 < angles[extreme].max(axis=-1).min()
    assert len(np.unique(poses.round(6), axis=0)) == 40


def test_a_run_that_has_not_ended_is_not_exported(run: Path, tmp_path: Path, capsys) -> None:
    tensors, words = read_checkpoint(run / "checkpoint.safetensors")
    (tmp_path / "run").mkdir()
    content = encode_checkpoint(tensors, {**words, "stage": 2})
    (tmp_path / "run" / "checkpoint.safetensors").write_bytes(content)
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "tiny")]) == 1
    assert "is at stage 'forward': train it to its end first" in capsys.readouterr().err
    assert not (tmp_path / "tiny").exists()


def test_a_name_that_no_avatar_may_have_is_refused_before_the_work(tiny_subject: Subject, tmp_path: Path) -> None:
    assert main(["train", str(tiny_subject.path), "--run", str(tmp_path / "run"), "--bundle", "avatars/Me!"]) == 1
    assert not (tmp_path / "run").exists()


def test_the_bundles_checkpoint_is_the_network_that_its_graph_runs(bundle_folder: Path) -> None:
    bundle = read_bundle(bundle_folder)
    tensors, words = read_checkpoint(bundle_folder / "checkpoint.safetensors")
    ins = restore(tensors, words, bundle.skeleton).ins.eval()
    poses = export.varied_poses(np.zeros((0, 24, 3)), 8, seed=5)
    for plain, allowed in ((True, export.MAX_PARITY_MM), (False, export.MAX_FAST_ERROR_MM)):
        error = export.errors_mm(ins, bundle.repose_onnx, bundle.meshes, bundle.skeleton, poses, plain)
        assert 0 < error <= allowed


@pytest.mark.parametrize("count", [1, 15, 16, 17, 50])
def test_the_graph_takes_any_number_of_vertices(bundle_folder: Path, count: int) -> None:
    bundle = read_bundle(bundle_folder)
    session = onnxruntime.InferenceSession(bundle.repose_onnx, providers=["CPUExecutionProvider"])
    rotations = axis_angle_to_matrix(np.random.default_rng(0).normal(0, 0.4, (2, 24, 3)))
    skeleton, vertices = bundle.skeleton, bundle.meshes["preview"].vertices[:200]
    feeds = {
        "bone_transforms": skeleton.bone_transforms(rotations),
        "root_transforms": skeleton.root_transforms(rotations, np.zeros((2, 3))),
    }
    whole, part = (
        np.asarray(session.run(None, feeds | {"canonical_vertices": some})[0]) for some in (vertices, vertices[:count])
    )
    assert part.shape == (2, count, 3)
    np.testing.assert_allclose(part, whole[:, :count], atol=2e-6)


@pytest.fixture(scope="module")
def own_weights() -> tuple[INS, Mesh]:
    """A network whose weights are read in the canonical frame, and points to repose with it."""
    rng = torch.Generator().manual_seed(3)
    low, high = torch.tensor([-1.0, -1.3, -0.5]), torch.tensor([1.0, 0.8, 0.5])
    ins = INS(open_body().skeleton.parents, correctives="field", code_width=6, skinning="voxel", use_h_d=False,
              grids=Grids(low, high, 0.1, 0.1), skinning_at="canonical").eval()  # fmt: skip
    points = torch.rand(3000, 3, generator=rng) * (high - low) * 0.7 + low * 0.7
    with torch.no_grad():
        ins.h_c.cover(points, 0.1)
        ins.h_c.coefficients.copy_(0.02 * torch.randn(ins.h_c.coefficients.shape, generator=rng))
        ins.pose_encoder.basis.copy_(0.3 * torch.randn(ins.pose_encoder.basis.shape, generator=rng))
        ins.skinning_field.grid.copy_(3 * torch.randn(ins.skinning_field.grid.shape, generator=rng))
    return ins, Mesh(points.numpy(), np.array([[0, 1, 2]], np.int32))


def test_a_graph_with_weights_of_its_own_tells_them_and_takes_them(own_weights: tuple[INS, Mesh]) -> None:
    ins, mesh = own_weights
    skeleton = open_body().skeleton
    graph = export.repose_onnx(ins, mesh.vertices)
    engine = OnnxEngine(graph, threads=2)
    held = engine._hold(mesh.vertices)._arrays["skinning_weights"]
    with torch.no_grad():
        np.testing.assert_allclose(held, ins.skinning_field(torch.from_numpy(mesh.vertices)).numpy(), atol=2e-6)
    poses = export.varied_poses(np.zeros((0, 24, 3)), 16)
    for plain in (True, False):
        assert 0 < export.errors_mm(ins, graph, {"standard": mesh}, skeleton, poses, plain) < 0.02
    # Unfed, as anyone else may run it, the graph reads them itself.
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    feeds = {
        "canonical_vertices": mesh.vertices,
        "bone_transforms": skeleton.bone_transforms(poses[:3]),
        "root_transforms": skeleton.root_transforms(poses[:3], np.zeros((3, 3))),
    }
    answer = engine.repose(*feeds.values())
    np.testing.assert_allclose(np.asarray(session.run(None, feeds)[0]), answer, atol=1e-5)
    other = session.run(None, feeds | {"skinning_weights": held[:, ::-1].copy()})[0]
    assert np.abs(np.asarray(other) - answer).mean() > 0.02


def test_evaluate_command_writes_figures_and_a_picture(run: Path) -> None:
    assert main(["evaluate", str(run), "--mesh", "field", "--lod", "preview", "--through", "both"]) == 0
    report = json.loads((run / "evaluation.json").read_text())
    assert report["mesh"]["sequences"].keys() == {"lunge"}
    # Two ways to ask the same avatar: the reposed mesh, and the field through its roots.
    assert abs(report["mesh"]["iou_bbox"] - report["field"]["iou_bbox"]) < 8
    assert (run / "evaluation.png").stat().st_size > 10_000


def test_a_perfect_prediction_scores_one_and_a_shifted_one_less(tiny_subject: Subject) -> None:
    """An identity INS given the scan itself as its canonical mesh is right in every figure."""

    class Perfect(INS):
        def to_deformed(self, x_c, bone_transforms):
            return x_c[None]

    frames = Frames(tiny_subject, "test")
    scan = frames.scan(0)
    perfect = Perfect(open_body().skeleton.parents)
    scores = summary(evaluate(perfect, Mesh(scan.vertices, scan.faces), frames))
    assert scores["iou_surface"] > 99.9
    assert scores["iou_bbox"] > 99.9
    assert scores["point_to_surface_mm"] < 0.01
    shifted = summary(evaluate(perfect, Mesh(scan.vertices + np.float32(0.004), scan.faces), frames))
    assert 60 < shifted["iou_surface"] < 85
    assert 2 < shifted["point_to_surface_mm"] < 7


def test_intersection_over_union() -> None:
    a, b = np.array([True, True, False, False]), np.array([True, False, True, False])
    assert intersection_over_union(a, b) == 1 / 3
    assert intersection_over_union(a, a) == 1
    assert intersection_over_union(~a & a, ~a & a) == 1
