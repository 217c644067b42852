"""GLB as a player plays it: morph clips are the surface, the skinned file is linear blend skinning, and says so."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from service import answers
from service.bundle.skeleton import axis_angle_to_matrix
from service.engine import Batch
from service.errors import NotAcceptable
from service.formats import morph
from service.formats.clip import VertexNormals
from tests.service.formats.player import Player
from tests.service.formats.test_formats import encoded, members


def test_a_morph_clip_plays_the_reposed_surface_and_its_normals(rich: Any) -> None:
    player = Player(encoded(rich, answers.GLB))
    np.testing.assert_allclose(player.times, np.arange(len(rich.vertices)) / 24, atol=1e-6)
    normals_of = VertexNormals(rich.clip.mesh)
    base = player.array(player.primitive["attributes"]["NORMAL"], "VEC3")
    for n, vertices in enumerate(rich.vertices):
        np.testing.assert_allclose(player.vertices(n), vertices, rtol=0, atol=1e-6)
        turned = base + player.array(player.primitive["targets"][n]["NORMAL"], "VEC3")
        np.testing.assert_allclose(turned, normals_of(vertices), rtol=0, atol=1e-6)
    assert "TEXCOORD_0" in player.primitive["attributes"]
    assert player.document["images"][0]["mimeType"] == "image/jpeg"


def test_longer_motion_is_cut_into_clips_that_leave_out_no_frame(rich: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(morph, "MAX_GLB_FRAMES", 4)
    files = members(encoded(rich, answers.GLB_ZIP))
    listed = json.loads(files.pop("clips.json"))
    assert listed["fps"] == 24
    assert [(clip["first_frame"], clip["frames"]) for clip in listed["clips"]] == [(0, 4), (4, 4), (8, 1)]
    assert [clip["file"] for clip in listed["clips"]] == list(files)
    for clip in listed["clips"]:
        player = Player(files[clip["file"]])
        assert player.document["meshes"][0]["extras"]["first_frame"] == clip["first_frame"]
        for n in range(clip["frames"]):
            expected = rich.vertices[clip["first_frame"] + n]
            np.testing.assert_allclose(player.vertices(n), expected, rtol=0, atol=1e-6)


def test_the_skinned_file_is_linear_blend_skinning_and_says_so(rich: Any) -> None:
    clip, never = rich.clip, iter([Batch(0, np.zeros((0, 0, 3), np.float32), np.zeros((0, 3), np.float32), 0.0)])
    player = Player(b"".join(answers.encode(answers.SKINNED, never, clip)))
    assert next(never).start == 0  # no batch was taken
    bones = clip.skeleton.bone_transforms(clip.poses.rotations).astype(np.float64)
    roots = clip.skeleton.root_transforms(clip.poses.rotations, clip.poses.translation).astype(np.float64)
    mesh = clip.mesh
    points = np.concatenate([mesh.vertices, np.ones((len(mesh.vertices), 1))], axis=1)
    for n in range(len(bones)):
        expected = np.einsum("ab,vk,vkbc,vc->va", roots[n], mesh.skin_weights, bones[n][mesh.skin_joints], points)
        np.testing.assert_allclose(player.vertices(n), expected[:, :3], rtol=0, atol=2e-5)
    names = [player.document["nodes"][node]["name"] for node in player.document["skins"][0]["joints"]]
    assert tuple(names) == clip.skeleton.joint_names
    assert player.document["asset"]["extras"]["fidelity"] == "lbs"


def test_neighbouring_keys_of_a_rotation_are_near(rich: Any) -> None:
    angles = np.linspace(0, 6, len(rich.vertices))[:, None] * [0, 1.0, 0]  # nearly once around: the sign must turn
    turns = np.array(rich.clip.poses.rotations)
    turns[:, 4] = axis_angle_to_matrix(angles)
    clip = replace(rich.clip, poses=replace(rich.clip.poses, rotations=turns))
    player = Player(b"".join(answers.encode(answers.SKINNED, iter(()), clip)))
    knee = player.tracks[5, "rotation"]
    np.testing.assert_allclose((knee[1:] * knee[:-1]).sum(axis=1), np.cos(0.375), rtol=0, atol=1e-5)


def test_at_rest_the_skinned_file_shows_the_canonical_mesh(rich: Any) -> None:
    player = Player(encoded(rich, answers.SKINNED))
    player.tracks = {}
    np.testing.assert_allclose(player.vertices(0), rich.clip.mesh.vertices, rtol=0, atol=1e-6)


def test_without_skinning_weights_there_is_no_skinned_file(rich: Any) -> None:
    bare = replace(rich.clip, mesh=replace(rich.clip.mesh, skin_joints=None, skin_weights=None))
    with pytest.raises(NotAcceptable, match="no skinning weights"):
        b"".join(answers.encode(answers.SKINNED, iter(()), bare))
