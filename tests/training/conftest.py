"""A subject small enough to train on in a test: the open body itself, posed, without a garment."""

import dataclasses
from pathlib import Path

import manifold3d
import numpy as np
import pytest
import torch

from training.config import RECIPES, Bce, Forward, Network, Occupancy, Paper, Recipe, Vote, Weights
from training.data.body import open_body
from training.data.motion import make_motions
from training.data.subject import Scan, Subject, SubjectWriter


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """So that sums are in one order, whatever the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """Three frames to train on and one held out, 3 K vertices each."""
    folder: Path = tmp_path_factory.mktemp("subjects") / "tiny"
    body = open_body()
    motions = {motion.name: motion for motion in make_motions(body.skeleton, frames=5)}
    writer = SubjectWriter(
        folder, name="tiny", rest_joints=body.skeleton.rest_joints, fps=30.0, licence="CC0-1.0", provenance={}
    )
    with writer:
        for name, split, rows in (("walk", "train", [0, 2]), ("squat", "train", [2]), ("lunge", "test", [4])):
            pose = motions[name].pose[rows].astype(np.float32)
            translation = motions[name].translation[rows].astype(np.float32)
            writer.add_sequence(name, split, pose, translation)
            for frame, transforms in enumerate(body.transforms(pose, translation)):
                writer.add_scan(name, frame, _coarse(body.posed(transforms), body.faces))
    return Subject.open(folder)


@pytest.fixture(scope="session")
def tiny_recipe() -> Recipe:
    """Every stage of the staged recipe in seconds: sizes that learn something, no more."""
    return Recipe(
        stages=("weights", "vote", "forward", "occupancy", "bce", "occupancy"),
        field_spacing_m=0.02,
        network=Network(code_width=3, field_spacing_m=0.08, skinning_spacing_m=0.06, skinning_at="moved"),
        weights=Weights(steps=100, points=1024),
        vote=Vote(spacing_m=0.02),
        forward=Forward(steps=12, frames=2, points=512),
        occupancy=Occupancy(steps=100, points=1024, near_points=20_000, far_points=5_000),
        bce=Bce(steps=8, frames=2, points=256, surface_points_per_frame=400, box_points_per_frame=100),
        paper=Paper(epochs=2, frames=2, points=200, surface_points_per_frame=400, box_points_per_frame=400),
    )


@pytest.fixture(scope="session")
def coupling_recipe(tiny_recipe: Recipe) -> Recipe:
    """The same stages with the paper's networks."""
    return dataclasses.replace(tiny_recipe, network=RECIPES["coupling"].network)


def _coarse(vertices: np.ndarray, faces: np.ndarray) -> Scan:
    solid = manifold3d.Manifold(manifold3d.Mesh(vertices.astype(np.float32), faces.astype(np.uint32)))
    mesh = solid.simplify(0.003).to_mesh()
    return Scan(np.array(mesh.vert_properties[:, :3], np.float32), np.array(mesh.tri_verts, np.int32))
