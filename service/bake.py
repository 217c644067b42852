"""`reposer bake`: an avatar as one skinned GLB with corrective blend shapes and a small network that weighs them.

For engines that cannot call a service.  In the canonical pose every vertex gets the displacement that makes plain
skinning land where the avatar's own graph does; over many poses these displacements are compressed to blend shapes
(principal components), and a small network gives their weights from the joints' rotations.  Both are fitted to what the
graph answers, so this needs numpy and ONNX Runtime only.

docs/formats.md says how the network lies in the file; `evaluate` is the reference.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from service.bake_network import FLOAT32, Network, fit_network
from service.bundle.glb import (
    BYTE,
    FLOAT,
    SIGNED_BYTE,
    VERTEX_DATA,
    GlbBuilder,
    Mesh,
    read_array,
    read_chunks,
    read_view,
)
from service.bundle.skeleton import SMPL_JOINT_NAMES, SMPL_PARENTS, Skeleton, axis_angle_to_matrix
from service.engine import Engine
from service.formats.skinned import add_skeleton, joint_tracks, joint_transforms, skinned_primitive
from service.poses import PoseSequence

SHAPES, HIDDEN, EPOCHS = 240, (512, 512), 60
SHAPE_POSES = 2000
"""The shapes are those of so many poses; of the others only some vertices are computed, enough to weigh the shapes."""
VERTICES_A_SHAPE = 8
CORRECTED_AT_ONCE = 50_000
"""Vertices of all frames together."""
SINGULAR = 0.01
"""Determinant of a vertex's skinning matrix, as in a candy wrapper, at which its correction is halved."""
QUANTIZATION = "KHR_mesh_quantization"
LEFT_LEG, RIGHT_LEG = (1, 4, 7), (2, 5, 8)
LEGS_APART = 0.3
"""How often the legs are those of different frames."""
SHAKE = 0.22
"""Deviation at most, radians, of the turns about each axis that are added to every joint."""
STILL = (0, 10, 11, 22, 23)
"""The root, which no correction depends on; toes and hands, which hardly move cloth."""
# Where people's joints are and how far they turn about x, y, z: radians, mean and deviation.
_HABITS = {
    "hip": ((-0.3, 0, 0), (0.5, 0.15, 0.15)), "knee": ((0.5, 0, 0), (0.45, 0.05, 0.05)),
    "ankle": ((0, 0, 0), (0.2, 0.1, 0.1)), "spine": ((0, 0, 0), (0.15, 0.12, 0.1)),
    "collar": ((0, 0, 0), (0.1, 0.1, 0.1)), "shoulder": ((0, -0.2, -0.6), (0.3, 0.35, 0.5)),
    "elbow": ((0, -0.6, 0), (0.15, 0.45, 0.15)), "wrist": ((0, 0, 0), (0.2, 0.2, 0.2)),
    "neck": ((0, 0, 0), (0.15, 0.2, 0.1)), "head": ((0, 0, 0), (0.15, 0.2, 0.1)),
}  # fmt: skip


@dataclass(frozen=True)
class Baked:
    """What a baked file holds, less the skeleton."""

    mesh: Mesh
    """The canonical mesh, moved by the mean correction; vertex order unchanged."""
    shapes: NDArray[np.int8]
    """(K, V, 3), in 127ths of a metre for a weight of 1; the largest number of each is 127."""
    network: Network


def plausible_poses(count: int, library: NDArray[np.floating] | None, seed: int = 0) -> NDArray[np.float64]:
    """Rotations (count, 24, 3, 3) to fit on.

    Args:
        library: rotations of motions (F, 24, 3, 3); bodies and legs of its frames and of their mirror images are
            mixed, and shaken a little.  None: joints turn independently, within what people do.
    """
    rng = np.random.default_rng(seed)
    if library is None:
        vectors = np.zeros((count, 24, 3))
        for joint, name in enumerate(SMPL_JOINT_NAMES):
            habit = _HABITS.get(name.rpartition("_")[2].rstrip("123"))
            if habit is not None:
                mean, deviation = np.array(habit)
                mirror = np.array([1, -1, -1]) if name.startswith("right") else 1
                vectors[:, joint] = mirror * mean + deviation * rng.normal(size=(count, 3))
        return axis_angle_to_matrix(vectors)
    library = np.concatenate([library, _mirrored(library)]).astype(np.float64)
    upper, lower, other = (library[rng.integers(len(library), size=count)] for _ in range(3))
    apart = rng.random((count, 1, 1, 1)) < LEGS_APART
    upper[:, LEFT_LEG] = lower[:, LEFT_LEG]
    upper[:, RIGHT_LEG] = np.where(apart, other[:, RIGHT_LEG], lower[:, RIGHT_LEG])
    shake = rng.normal(0, SHAKE, (count, 24, 3)) * rng.random((count, 1, 1))
    shake[:, STILL] = 0
    mixed = upper @ axis_angle_to_matrix(shake)
    mixed[:, STILL] = np.eye(3)
    return mixed


def _mirrored(rotations: NDArray[np.floating]) -> NDArray[np.floating]:
    """Left for right, (F, 24, 3, 3)."""
    opposite = {"left": "right", "right": "left"}
    sides = (name.partition("_") for name in SMPL_JOINT_NAMES)
    twins = [SMPL_JOINT_NAMES.index(opposite.get(side, side) + dash + name) for side, dash, name in sides]
    flip = np.diag([-1.0, 1.0, 1.0])
    return flip @ rotations[:, twins] @ flip


def fit(engine: Engine, skeleton: Skeleton, mesh: Mesh, rotations: NDArray[np.floating], seed: int = 0) -> Baked:
    """Shapes and network that reproduce `engine` on poses like these, (F, 24, 3, 3).

    Raises:
        ValueError: the mesh has no skinning weights.
    """
    rng = np.random.default_rng(seed)
    first, rest = rotations[:SHAPE_POSES], rotations[SHAPE_POSES:]
    everywhere = np.arange(len(mesh.vertices))
    moved = np.concatenate([f.reshape(len(f), -1) for f in _corrections(engine, skeleton, mesh, everywhere, first)])
    mean = moved.mean(axis=0)
    moved -= mean
    shapes = _principal_components(moved)
    # As they will be in the file: weights and network then make up for the rounding.
    largest = np.maximum(np.abs(shapes).max(axis=1, keepdims=True), 1e-12)
    rounded = np.rint(127 / largest * shapes).astype(np.int8)
    shapes = (largest / 127 * rounded).astype(np.float32)
    weights = [np.linalg.lstsq(shapes @ shapes.T, shapes @ moved.T)[0].T]
    some = rng.permutation(everywhere)[: VERTICES_A_SHAPE * len(shapes)]
    there = shapes.reshape(len(shapes), -1, 3)[:, some].reshape(len(shapes), -1)
    back = np.linalg.pinv(there)
    middle = mean.reshape(-1, 3)[some].reshape(-1)
    weights += [(f.reshape(len(f), -1) - middle) @ back for f in _corrections(engine, skeleton, mesh, some, rest)]
    canonical = axis_angle_to_matrix(skeleton.canonical_pose)
    world = joint_transforms(skeleton, canonical[None], np.zeros((1, 3)))[0, :, :3, :3].astype(np.float32)
    before, after = world[list(SMPL_PARENTS[1:])], world[1:].transpose(0, 2, 1)
    known = np.concatenate(weights).astype(np.float32)
    network = fit_network(before, after, rotations, known, HIDDEN, EPOCHS, seed)
    base = replace(mesh, vertices=(mesh.vertices + mean.reshape(-1, 3)).astype(np.float32))
    metres = largest[:, 0].astype(np.float32)
    return Baked(base, rounded.reshape(-1, *mesh.vertices.shape), network.scaled(metres))


def _principal_components(moved: FLOAT32) -> FLOAT32:
    """(K, 3 V), orthonormal, of (F, 3 V)."""
    # By the small side: frames against frames.
    values, vectors = np.linalg.eigh((moved @ moved.T).astype(np.float64))
    count = min(SHAPES, max(1, int((values > 1e-9 * max(values[-1], 1e-12)).sum())))
    shapes = vectors[:, ::-1][:, :count].T.astype(np.float32) @ moved
    return shapes / np.maximum(np.linalg.norm(shapes, axis=1, keepdims=True), 1e-12)


def _corrections(
    engine: Engine, skeleton: Skeleton, mesh: Mesh, vertices: NDArray[np.integer], rotations: NDArray[np.floating]
) -> Iterator[FLOAT32]:
    """(f, N, 3) of some frames: displacements of vertices before skinning that give the engine's surface after it."""
    points, weights = mesh.vertices[vertices], _dense_weights(mesh)[vertices]
    size = max(1, CORRECTED_AT_ONCE // len(points))
    # A bar where somebody watches.
    for start in tqdm(range(0, len(rotations), size), desc="poses", leave=False, disable=None):
        bones = skeleton.bone_transforms(rotations[start : start + size])
        at_rest = np.tile(np.eye(4, dtype=np.float32), (len(bones), 1, 1))
        surface = engine.repose(points, bones, at_rest)
        turn, shift = _blended(weights, bones)
        missing = surface - np.einsum("fvab,vb->fva", turn, points) - shift
        x, y, z = (turn[..., axis] for axis in range(3))
        yz = np.cross(y, z)
        determinant = (x * yz).sum(axis=-1, keepdims=True)
        adjugate = np.stack([yz, np.cross(z, x), np.cross(x, y)], axis=-2)
        yield np.einsum("fvab,fvb->fva", adjugate, missing) * determinant / (determinant**2 + SINGULAR**2)


def _dense_weights(mesh: Mesh) -> FLOAT32:
    """(V, 24)"""
    if mesh.skin_joints is None or mesh.skin_weights is None:
        raise ValueError("the mesh has no skinning weights")
    weights = np.zeros((len(mesh.vertices), len(SMPL_PARENTS)), np.float32)
    np.add.at(weights, (np.arange(len(weights))[:, None], mesh.skin_joints), mesh.skin_weights)
    return weights


def _blended(weights: FLOAT32, bones: FLOAT32) -> tuple[FLOAT32, FLOAT32]:
    """(F, V, 3, 3) and (F, V, 3): each vertex's skinning matrix under bone transforms (F, J, 4, 4)."""
    matrices = (weights @ bones[..., :3, :].reshape(len(bones), -1, 12)).reshape(len(bones), -1, 3, 4)
    return matrices[..., :3], matrices[..., 3]


def write(baked: Baked, skeleton: Skeleton, name: str, clip: PoseSequence | None = None) -> bytes:
    """The GLB; with a clip, joints and weights play it in any viewer, without the network being run."""
    builder = GlbBuilder()
    primitive = skinned_primitive(builder, baked.mesh)
    primitive["targets"] = [{"POSITION": _add_shape(builder, shape)} for shape in baked.shapes]
    add_skeleton(builder, name, skeleton)

    def add(array: FLOAT32) -> dict[str, Any]:
        return {"accessor": builder.add_array(array.reshape(-1), FLOAT), "shape": array.shape}

    net = baked.network
    parts = ("before", "after", "linear", "output", "constant")
    record: dict[str, Any] = {part: add(getattr(net, part)) for part in parts}
    record["hidden"] = [{"matrix": add(matrix), "bias": add(bias)} for matrix, bias in net.hidden]
    extras = {"fidelity": "baked", "network": record, "joints": list(skeleton.joint_names)}
    zeros = [0.0] * len(baked.shapes)
    builder.document["meshes"] = [{"name": name, "primitives": [primitive], "weights": zeros, "extras": extras}]
    builder.document["asset"]["extras"] = {"fidelity": "baked"}
    builder.document |= {"extensionsUsed": [QUANTIZATION], "extensionsRequired": [QUANTIZATION]}
    if clip is not None:
        samplers, channels = joint_tracks(builder, skeleton, clip, clip.fps)
        weights = net(clip.rotations).reshape(-1)
        track = {"input": samplers[0]["input"], "output": builder.add_array(weights, FLOAT), "interpolation": "LINEAR"}
        channels.append({"sampler": len(samplers), "target": {"node": 0, "path": "weights"}})
        builder.document["animations"] = [{"name": "motion", "samplers": [*samplers, track], "channels": channels}]
    return builder.finish()


def _add_shape(builder: GlbBuilder, shape: NDArray[np.int8]) -> int:
    """Vertices begin at multiples of four bytes, so the fourth of each is nothing."""
    view = builder.add_view(np.pad(shape, ((0, 0), (0, 1))), SIGNED_BYTE, VERTEX_DATA, stride=4)
    return builder.add_accessor(view, 0, shape, SIGNED_BYTE, bounds=True, normalized=True)


def read(data: bytes) -> Baked:
    """What `write` wrote, as far as `evaluate` needs it."""
    document, binary = read_chunks(data)
    mesh_record = document["meshes"][0]
    primitive = mesh_record["primitives"][0]
    attributes = primitive["attributes"]
    mesh = Mesh(
        read_array(document, binary, attributes["POSITION"], FLOAT, "VEC3"),
        np.array([[0, 1, 2]], np.int32),
        skin_joints=read_array(document, binary, attributes["JOINTS_0"], BYTE, "VEC4"),
        skin_weights=read_array(document, binary, attributes["WEIGHTS_0"], FLOAT, "VEC4"),
    )
    views = [document["accessors"][target["POSITION"]]["bufferView"] for target in primitive["targets"]]
    shapes = [np.frombuffer(read_view(document, binary, view), np.int8).reshape(-1, 4)[:, :3] for view in views]

    def array(entry: dict[str, Any]) -> FLOAT32:
        return read_array(document, binary, entry["accessor"], FLOAT, "SCALAR").reshape(entry["shape"])

    record = mesh_record["extras"]["network"]
    parts = {part: array(entry) for part, entry in record.items() if part != "hidden"}
    hidden = tuple((array(layer["matrix"]), array(layer["bias"])) for layer in record["hidden"])
    return Baked(mesh, np.stack(shapes), Network(**parts, hidden=hidden))


def evaluate(data: bytes, skeleton: Skeleton, poses: PoseSequence) -> Iterator[FLOAT32]:
    """Each frame's vertices (V, 3) from nothing but a baked file and its skeleton: what every evaluator must give."""
    baked = read(data)
    skinning_weights = _dense_weights(baked.mesh)
    shapes = baked.shapes.reshape(len(baked.shapes), -1) / np.float32(127)
    bones = skeleton.bone_transforms(poses.rotations)
    roots = skeleton.root_transforms(poses.rotations, poses.translation)
    for weights, transforms, root in zip(baked.network(poses.rotations), bones, roots, strict=True):
        (turn,), (shift,) = _blended(skinning_weights, transforms[None])
        points = np.einsum("vab,vb->va", turn, baked.mesh.vertices + (weights @ shapes).reshape(-1, 3)) + shift
        yield points @ root[:3, :3].T + root[:3, 3]
