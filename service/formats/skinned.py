"""Skinned GLB with a clip: bones and four weights a vertex, for engines that play nothing else.

It is an approximation and says so in the file (`fidelity: lbs`): linear blend skinning of the canonical mesh, without
the networks that make cloth move.
Reference: Khronos glTF 2.0 specification, sections 3.7.3 (skins) and 3.11 (animations).
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.bundle.glb import FLOAT, GlbBuilder, Mesh
from service.bundle.skeleton import Skeleton, axis_angle_to_matrix
from service.engine import Batch
from service.errors import NotAcceptable
from service.formats.clip import Clip, VertexNormals
from service.poses import PoseSequence
from service.rotations import quaternions

SKINNED_MEDIA_TYPE = "application/vnd.reposer.skinned+gltf-binary"
FIDELITY = "lbs: linear blend skinning only, an approximation of what the avatar's networks give"


def encode_skinned(batches: Iterator[Batch], clip: Clip) -> Iterator[bytes]:
    """One GLB; takes no batch.

    Raises:
        NotAcceptable: the avatar's mesh has no skinning weights.
    """
    if clip.mesh.skin_joints is None:
        raise NotAcceptable("this avatar has no skinning weights, so no skinned file can be made of it")
    assert clip.skeleton is not None
    assert clip.poses is not None
    builder = GlbBuilder()
    primitive = skinned_primitive(builder, clip.mesh)
    add_skeleton(builder, clip.name, clip.skeleton)
    samplers, channels = joint_tracks(builder, clip.skeleton, clip.poses, clip.fps)
    builder.document["meshes"] = [{"name": clip.name, "primitives": [primitive], "extras": {"fidelity": FIDELITY}}]
    builder.document["animations"] = [
        {"name": "motion", "samplers": samplers, "channels": channels, "extras": {"fidelity": FIDELITY}}
    ]
    builder.document["asset"]["extras"] = {"fidelity": "lbs"}
    yield builder.finish()


def skinned_primitive(builder: GlbBuilder, mesh: Mesh) -> dict[str, Any]:
    """The canonical mesh with its normals, bones and weights, and its material."""
    still = replace(mesh, normals=VertexNormals(mesh)(mesh.vertices))
    attributes, indices = builder.add_mesh_arrays(still)
    builder.add_material(still)
    return {"attributes": attributes, "indices": indices, "material": 0}


def add_skeleton(builder: GlbBuilder, name: str, skeleton: Skeleton) -> None:
    """The scene: node 0 is the mesh, node 1 + j is joint j in the canonical pose; and the one skin."""
    turned = axis_angle_to_matrix(skeleton.canonical_pose)
    rest = skeleton.rest_joints.astype(np.float64)
    places = [rest[joint] - (rest[parent] if parent >= 0 else 0) for joint, parent in enumerate(skeleton.parents)]
    joints: list[dict[str, Any]] = [
        {"name": joint, "translation": place.tolist(), "rotation": turn.tolist()}
        for joint, place, turn in zip(skeleton.joint_names, places, quaternions(turned), strict=True)
    ]
    for joint, parent in enumerate(skeleton.parents):
        if parent >= 0:
            joints[parent].setdefault("children", []).append(1 + joint)
    inverse = np.linalg.inv(joint_transforms(skeleton, turned[None], np.zeros((1, 3)))[0])
    columns = inverse.transpose(0, 2, 1).reshape(-1, 16).astype(np.float32)  # glTF goes down the columns
    builder.document |= {
        "scenes": [{"nodes": [0, 1]}],
        "nodes": [{"mesh": 0, "skin": 0, "name": name}, *joints],
        "skins": [
            {
                "name": "SMPL joints",
                "skeleton": 1,
                "joints": list(range(1, 1 + len(joints))),
                "inverseBindMatrices": builder.add_array(columns, FLOAT, kind="MAT4"),
            }
        ],
    }


def joint_transforms(
    skeleton: Skeleton, rotations: NDArray[np.floating], translation: NDArray[np.floating]
) -> NDArray[np.float64]:
    """(F, J, 4, 4): joint's own frame -> world, for rotations (F, J, 3, 3) and translation (F, 3)."""
    rest, result = skeleton.rest_joints.astype(np.float64), np.tile(np.eye(4), (*rotations.shape[:2], 1, 1))
    for joint, parent in enumerate(skeleton.parents):
        local = np.tile(np.eye(4), (len(rotations), 1, 1))
        local[:, :3, :3] = rotations[:, joint]
        local[:, :3, 3] = rest[joint] + translation if parent < 0 else rest[joint] - rest[parent]
        result[:, joint] = local if parent < 0 else result[:, parent] @ local
    return result


def joint_tracks(
    builder: GlbBuilder, skeleton: Skeleton, poses: PoseSequence, fps: float
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Samplers and channels that turn the joints, and move the root."""
    times = builder.add_array((np.arange(len(poses)) / fps).astype(np.float32), FLOAT, bounds=True)
    turns = quaternions(poses.rotations)
    # Of the two quaternions of a rotation the one nearer to the last frame's: players do not all look.
    flips = np.where((turns[1:] * turns[:-1]).sum(-1) < 0, -1.0, 1.0)
    turns[1:] *= np.cumprod(flips, axis=0)[..., None]
    tracks = [(1 + joint, "rotation", turns[:, joint]) for joint in range(skeleton.joint_count)]
    tracks.append((1, "translation", skeleton.rest_joints[0].astype(np.float64) + poses.translation))
    samplers = [
        {"input": times, "output": builder.add_array(values.astype(np.float32), FLOAT), "interpolation": "LINEAR"}
        for _, _, values in tracks
    ]
    channels = [{"sampler": n, "target": {"node": node, "path": path}} for n, (node, path, _) in enumerate(tracks)]
    return samplers, channels
