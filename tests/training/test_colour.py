"""Colour: a painted person comes out in its own colours, and the texture lies where the surface is."""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage
from torch import nn

import training.__main__ as commands
from service.bundle.glb import Mesh, linear_light, read_mesh, srgb, welded_faces, write_mesh
from training import colour, export
from training.colour import bake, median_colour, observe, painted, unwrap
from training.data.body import open_body
from training.data.subject import Scan, Subject, SubjectWriter
from training.frames import Frames
from training.stages import State, Surface

RADIUS = 0.3
BALL = trimesh.creation.icosphere(3, RADIUS)
FINE = trimesh.creation.icosphere(5, RADIUS)


class Still(nn.Module):
    """Leaves everything where it is."""

    def to_deformed(self, x_c, bone_transforms):
        return x_c.expand(len(bone_transforms), -1, -1)

    def skinning_field(self, x_c):
        return torch.eye(24)[0].expand(len(x_c), -1)


def mesh_of(ball: trimesh.Trimesh) -> Mesh:
    return Mesh(np.asarray(ball.vertices, np.float32), np.asarray(ball.faces, np.int32))


def pattern(points: np.ndarray) -> np.ndarray:
    """(N, 3) sRGB: waves of about 20 cm, another along each axis."""
    return srgb(0.5 + 0.4 * np.sin(10 * np.asarray(points) + [0, 1, 2]))


@pytest.fixture(autouse=True, scope="module")
def _small() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(colour, "TEXTURE_PIXELS", {"standard": 256})
        patch.setattr(colour, "POINTS", 15_000)
        yield


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """A painted ball that stands still, five times."""
    scans = [Scan(FINE.vertices, FINE.faces, pattern(FINE.vertices))] * 5
    return make_subject(tmp_path_factory.mktemp("subjects") / "ball", scans)


@pytest.fixture(scope="module")
def painted_ball(subject: Subject) -> Mesh:
    return painted({"standard": mesh_of(BALL)}, Still(), Frames(subject, "train"))["standard"]


def make_subject(path: Path, scans: list[Scan], elbow_rad: Sequence[float] = (0.0,)) -> Subject:
    """Scans given in the root frame, in the canonical pose but for a turn of an elbow."""
    skeleton = open_body().skeleton
    writer = SubjectWriter(path, name="ball", rest_joints=skeleton.rest_joints, fps=30, licence="CC0-1.0")
    with writer:
        pose = np.tile(skeleton.canonical_pose, (len(scans), 1, 1)).astype(np.float32)
        pose[:, 18, 1] += np.asarray(elbow_rad, np.float32)
        translation = np.arange(3.0 * len(scans)).reshape(-1, 3)
        writer.add_sequence("walk", "train", pose, translation)
        for frame, scan in enumerate(scans):
            vertices = np.asarray(scan.vertices) + translation[frame]
            writer.add_scan("walk", frame, Scan(vertices.astype(np.float32), scan.faces.astype("i4"), scan.colours))
    return Subject.open(path)


def off(colours: np.ndarray, expected: np.ndarray) -> float:
    """The 99th percentile of the difference, of 255."""
    return float(np.percentile(np.abs(colours.astype(int) - expected), 99))


def test_a_painted_ball_keeps_its_colours(painted_ball: Mesh) -> None:
    assert painted_ball.colors is not None
    assert off(painted_ball.colors, pattern(painted_ball.vertices)) <= 5


def test_the_texture_shows_at_each_place_what_is_there(painted_ball: Mesh) -> None:
    seen = trimesh.load_scene(io.BytesIO(write_mesh(painted_ball)), file_type="glb", process=False)
    (loaded,) = seen.geometry.values()
    np.testing.assert_array_equal(loaded.faces, painted_ball.faces)
    # In the middle of each face, through a reader that is not ours, which counts v from below.
    middle = loaded.visual.uv[loaded.faces].mean(axis=1)
    image = np.asarray(loaded.visual.material.baseColorTexture)
    column, row = (np.stack([middle[:, 0], 1 - middle[:, 1]]) * 256).astype(int)
    assert off(image[row, column], pattern(BALL.triangles_center)) <= 12


def test_one_wrong_frame_changes_nothing(subject: Subject, tmp_path: Path) -> None:
    right = Scan(FINE.vertices, FINE.faces, pattern(FINE.vertices))
    wrong = Scan(FINE.vertices, FINE.faces, np.full_like(pattern(FINE.vertices), 255))
    mixed = make_subject(tmp_path / "mixed", [right, wrong, right, right, wrong])
    clean, found = (observe(Still(), mesh_of(BALL), Frames(one, "train")) for one in (subject, mixed))
    assert clean is not None
    assert found is not None
    np.testing.assert_allclose(found.light, clean.light, atol=1e-4)


def test_frames_near_the_canonical_pose_speak_for_the_others(tmp_path: Path) -> None:
    """A pattern that slides with the pose stays sharp: two near frames outvote four far ones."""
    here, there = (
        Scan(FINE.vertices, FINE.faces, pattern(FINE.vertices + shift)) for shift in ([0.0, 0, 0], [0.1, 0, 0])
    )
    turned = [1.0, 0.1, 1.2, 1.4, 0.2, 0.9]
    scans = [here if angle < 0.5 else there for angle in turned]
    found = observe(Still(), mesh_of(BALL), Frames(make_subject(tmp_path / "s", scans, turned), "train"))
    assert found is not None
    assert off(srgb(found.light), pattern(found.points)) <= 4


@pytest.mark.parametrize("why", ["far", "turned"])
def test_what_is_far_or_looks_elsewhere_is_not_believed(why: str, tmp_path: Path) -> None:
    """Most frames are white scans that must not count: 2 cm outside the ball, or the inner side of a hollow one."""
    scale, faces = (1 + 0.02 / RADIUS, FINE.faces) if why == "far" else (0.99, FINE.faces[:, ::-1])
    white = Scan(FINE.vertices * scale, faces, np.full_like(pattern(FINE.vertices), 255))
    right = Scan(FINE.vertices, FINE.faces, pattern(FINE.vertices))
    found = observe(Still(), mesh_of(BALL), Frames(make_subject(tmp_path / "s", [white, right, white]), "train"))
    assert found is not None
    assert off(srgb(found.light), pattern(found.points)) <= 4


def test_what_no_frame_saw_takes_its_neighbours_colour(tmp_path: Path) -> None:
    colours = np.where(FINE.vertices[:, :1] > 0, [[200, 30, 30]], [[20, 30, 180]]).astype(np.uint8)
    upper = FINE.faces[(FINE.vertices[FINE.faces][..., 1] > -0.05).all(axis=1)]
    # The second scan is black and too far away to be believed, even about what no other frame saw.
    scans = [Scan(FINE.vertices, upper, colours), Scan(2 * FINE.vertices, FINE.faces, np.zeros_like(colours))]
    frames = Frames(make_subject(tmp_path / "half", scans), "train")
    found = observe(Still(), mesh_of(BALL), frames)
    assert found is not None
    unseen = found.points[:, 1] < -0.07
    assert unseen.sum() > 1000
    for side, expected in ((found.points[:, 0] > 0.05, [200, 30, 30]), (found.points[:, 0] < -0.05, [20, 30, 180])):
        chosen = unseen & side & (found.points[:, 1] > -0.15)
        assert off(srgb(found.light[chosen]), np.array(expected)) <= 2


def test_scans_without_colours_leave_the_meshes_as_they_were(tmp_path: Path) -> None:
    meshes = {"standard": mesh_of(BALL)}
    frames = Frames(make_subject(tmp_path / "grey", [Scan(FINE.vertices, FINE.faces)] * 2), "train")
    assert painted(meshes, Still(), frames) == meshes


def test_colours_nowhere_near_the_avatar_are_an_error(tmp_path: Path) -> None:
    scan = Scan(FINE.vertices * 2, FINE.faces, pattern(FINE.vertices))
    with pytest.raises(ValueError, match="comes near the avatar's surface"):
        observe(Still(), mesh_of(BALL), Frames(make_subject(tmp_path / "big", [scan]), "train"))


def test_unwrapping_moves_nothing_and_doubles_only_at_seams() -> None:
    mesh = mesh_of(BALL)
    whole = Mesh(mesh.vertices, mesh.faces, colors=pattern(mesh.vertices))
    split = unwrap(whole)
    assert split.uv is not None
    assert split.colors is not None
    count = len(whole.vertices)
    assert count < len(split.vertices) < 1.6 * count
    np.testing.assert_array_equal(split.vertices[:count], whole.vertices)
    np.testing.assert_array_equal(split.vertices[split.faces], whole.vertices[whole.faces])
    np.testing.assert_array_equal(split.colors, pattern(split.vertices))
    np.testing.assert_array_equal(welded_faces(split), whole.faces)
    assert (split.uv >= 0).all()
    assert (split.uv <= 1).all()


def test_no_two_places_share_a_texel() -> None:
    """As much of the texture is covered as the faces' areas in it add up to."""
    split = unwrap(mesh_of(BALL))
    assert split.uv is not None
    a, b, c = np.moveaxis(split.uv[split.faces].astype(float), 1, 0)
    areas = np.abs((b - a)[:, 0] * (c - a)[:, 1] - (b - a)[:, 1] * (c - a)[:, 0]) / 2
    flat = np.concatenate([1024 * split.uv, np.ones((len(split.uv), 1))], axis=1)
    covered = (colour.rasterize(flat, split.faces.astype(np.int64), 1024, 1024).face >= 0).mean()
    assert covered == pytest.approx(areas.sum(), rel=0.01)
    assert covered > 0.3


def test_wrinkles_do_not_cut_the_atlas_to_pieces() -> None:
    ball = trimesh.creation.icosphere(4, RADIUS)
    wrinkled = ball.vertices * (1 + 0.02 * np.random.default_rng(0).normal(size=(len(ball.vertices), 1)))
    split = unwrap(Mesh(wrinkled.astype(np.float32), ball.faces.astype(np.int32)))
    assert len(split.vertices) < 1.15 * len(wrinkled)


def test_colours_go_on_around_the_charts(painted_ball: Mesh) -> None:
    """Filtering and smaller copies of the texture look there."""
    mesh = painted_ball
    assert mesh.uv is not None
    assert mesh.texture is not None
    flat = np.concatenate([256 * mesh.uv, np.ones((len(mesh.uv), 1))], axis=1)
    inside = colour.rasterize(flat, mesh.faces.astype(np.int64), 256, 256).face >= 0
    distance, (row, column) = ndimage.distance_transform_edt(~inside, return_indices=True)
    with Image.open(io.BytesIO(mesh.texture)) as file:
        image = np.asarray(file)
    around = ~inside & (distance < 4)
    assert np.abs(image[around].astype(int) - image[row, column][around]).mean() < 6


def test_painting_twice_gives_the_same_bytes(subject: Subject, painted_ball: Mesh) -> None:
    again = painted({"standard": mesh_of(BALL)}, Still(), Frames(subject, "train"))["standard"]
    assert write_mesh(again) == write_mesh(painted_ball)


def test_a_texture_of_noise_stays_below_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(colour, "MAX_TEXTURE_BYTES", 40_000)
    mesh = unwrap(mesh_of(BALL))
    rng = np.random.default_rng(0)
    paint = colour.Paint(np.asarray(FINE.vertices), rng.random((len(FINE.vertices), 3)))
    content = bake(mesh, paint, 256)
    assert len(content) <= 40_000
    with Image.open(io.BytesIO(content)) as image:
        assert image.size == (256, 256)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 5)), min_size=1, max_size=9))
def test_the_median_has_half_the_weight_on_either_side(pairs: list[tuple[int, int]]) -> None:
    values, weights = (np.array(column, float) for column in zip(*pairs, strict=True))
    found, *others = median_colour(np.repeat(values[:, None, None], 3, axis=2), weights[:, None])[0]
    assert found in values
    assert others == [found, found]
    assert weights[values < found].sum() <= weights.sum() / 2
    assert weights[values > found].sum() <= weights.sum() / 2


def test_the_median_of_colours_is_one_of_them() -> None:
    light = np.array([[[0.9, 0.1, 0.1]], [[0.1, 0.5, 0.9]], [[0.8, 0.6, 0.0]]])
    assert median_colour(light, np.ones((3, 1)))[0].tolist() == [0.1, 0.5, 0.9]


def test_linear_light_and_back_is_exact() -> None:
    every = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(srgb(linear_light(every)), every)
    assert linear_light(np.array([188], np.uint8))[0] == pytest.approx(0.5, abs=0.005)  # half the light


def test_export_paints_what_was_scanned_in_colour(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ball = mesh_of(FINE)
    state = State(Still(), Surface(torch.from_numpy(ball.vertices), torch.from_numpy(ball.faces)))
    words = {"seconds": 1.0, "recipe": {"seed": 0}}
    monkeypatch.setattr(commands, "_trained", lambda run, subject_: (state, subject, words))
    monkeypatch.setattr(export, "LODS", {"standard": 600})
    written: dict[str, Mesh] = {}

    class Manifest:
        levels_of_detail, metrics = {}, {}

    def capture(ins, skeleton, meshes, *rest):
        written.update(meshes)
        return Manifest

    monkeypatch.setattr(export, "export_bundle", capture)
    assert commands.main(["export", "run", str(tmp_path / "me")]) == 0
    mesh = written["standard"]
    assert mesh.colors is not None
    assert off(mesh.colors, pattern(mesh.vertices)) <= 12  # the coarse mesh lies inside the ball
    assert mesh.texture is not None
    assert mesh.skin_joints is not None
    assert read_mesh(write_mesh(mesh)).texture == mesh.texture
