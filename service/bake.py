"""`reposer bake`: an avatar as one skinned GLB with corrective blend shapes and a small network that weighs them.

For engines that cannot call a service.  In the canonical pose every vertex gets the displacement that makes plain
skinning land where the avatar's own graph does; over many poses these displacements are compressed to blend shapes
(principal components), and a network of one hidden layer gives their weights from the joints' rotations.  Both are
fitted by least squares on what the graph answers, so this needs numpy and ONNX Runtime only.

The network is JSON in the mesh's `extras` (docs/formats.md); `evaluate` is its reference.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.bundle.glb import BYTE, FLOAT, VERTEX_DATA, GlbBuilder, Mesh, read_array, read_chunks
from service.bundle.skeleton import SMPL_JOINT_NAMES, SMPL_PARENTS, Skeleton, axis_angle_to_matrix
from service.engine import Engine
from service.formats.skinned import add_skeleton, joint_tracks, joint_transforms, skinned_primitive
from service.poses import PoseSequence

SHAPES, HIDDEN, RIDGE = 80, 256, 10.0
DAMPING = 1e-3
"""Of the inverse of a vertex's skinning matrix, which in a candy wrapper is singular."""
LOWER_BODY = (1, 2, 4, 5, 7, 8)
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
class Network:
    """weights = constant + f linear + tanh(f hidden + bias) output, with f the features of a pose."""

    before: NDArray[np.float64]
    """(23, 3, 3): world rotation of each joint's parent in the canonical pose; feature j is before R_j after - 1."""
    after: NDArray[np.float64]
    """(23, 3, 3): that of the joint itself, transposed."""
    hidden: NDArray[np.float64]
    """(207, H)"""
    bias: NDArray[np.float64]
    linear: NDArray[np.float64]
    """(207, K)"""
    output: NDArray[np.float64]
    """(H, K)"""
    constant: NDArray[np.float64]

    def __call__(self, rotations: NDArray[np.floating]) -> NDArray[np.float64]:
        """(F, 24, 3, 3), each joint relative to its parent -> (F, K), the weights of the shapes."""
        f = self.features(rotations)
        return self.constant + f @ self.linear + np.tanh(f @ self.hidden + self.bias) @ self.output

    def features(self, rotations: NDArray[np.floating]) -> NDArray[np.float64]:
        """(F, 207)"""
        turns = self.before @ np.asarray(rotations, np.float64)[:, 1:] @ self.after
        return (turns - np.eye(3)).reshape(len(turns), -1)

    def to_json(self) -> dict[str, Any]:
        """Rows of numbers with six digits."""
        return {name: np.char.mod("%.6g", value).astype(float).tolist() for name, value in vars(self).items()}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> "Network":
        return cls(**{name: np.array(record[name], np.float64) for name in cls.__dataclass_fields__})


@dataclass(frozen=True)
class Baked:
    """What a baked file holds, less the skeleton."""

    mesh: Mesh
    """The canonical mesh, moved by the mean correction; vertex order unchanged."""
    shapes: NDArray[np.float32]
    """(K, V, 3), metres; weights are about -3 to 3."""
    network: Network


def plausible_poses(count: int, library: NDArray[np.floating] | None, seed: int = 0) -> NDArray[np.float64]:
    """Rotations (count, 24, 3, 3) to fit on.

    Args:
        library: rotations of motions (F, 24, 3, 3); upper and lower bodies of its frames are mixed and shaken a
            little.  None: joints turn independently, within what people do.
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
    upper, lower = (library[rng.integers(len(library), size=count)].astype(np.float64) for _ in range(2))
    upper[:, LOWER_BODY] = lower[:, LOWER_BODY]
    shake = rng.normal(0, 0.1, (count, 24, 3)) * (rng.random((count, 1, 1)) < 0.8)
    shake[:, STILL] = 0
    mixed = upper @ axis_angle_to_matrix(shake)
    mixed[:, STILL] = np.eye(3)
    return mixed


def fit(engine: Engine, skeleton: Skeleton, mesh: Mesh, rotations: NDArray[np.floating], seed: int = 0) -> Baked:
    """Shapes and network that reproduce `engine` on poses like these, (F, 24, 3, 3).

    Raises:
        ValueError: the mesh has no skinning weights.
    """
    if mesh.skin_joints is None:
        raise ValueError("the mesh has no skinning weights")
    moved = np.concatenate(list(_corrections(engine, skeleton, mesh, rotations))).reshape(len(rotations), -1)
    mean = moved.mean(axis=0)
    moved -= mean
    # Principal components by the small side: frames against frames.
    values, vectors = np.linalg.eigh((moved @ moved.T).astype(np.float64))
    order = np.argsort(-values)[: min(SHAPES, len(rotations) - 1)]
    order = order[values[order] > 1e-9 * max(values.max(), 1e-12)]
    deviation = np.sqrt(values[order] / len(rotations))
    shapes = (vectors[:, order].T @ moved) / np.sqrt(values[order])[:, None] * deviation[:, None]
    weights = vectors[:, order] * np.sqrt(len(rotations))
    network = _fit_network(skeleton, rotations, weights, seed)
    base = replace(mesh, vertices=(mesh.vertices + mean.reshape(-1, 3)).astype(np.float32))
    return Baked(base, shapes.reshape(-1, *mesh.vertices.shape).astype(np.float32), network)


def _corrections(
    engine: Engine, skeleton: Skeleton, mesh: Mesh, rotations: NDArray[np.floating]
) -> Iterator[NDArray[np.float32]]:
    """(f, V, 3) of some frames: displacements before skinning that give the engine's surface after it."""
    assert mesh.skin_joints is not None
    for start in range(0, len(rotations), 8):
        bones = skeleton.bone_transforms(rotations[start : start + 8])
        at_rest = np.tile(np.eye(4, dtype=np.float32), (len(bones), 1, 1))
        surface = engine.repose(mesh.vertices, bones, at_rest)
        for vertices, transforms in zip(surface, bones, strict=True):
            turn, shift = _blended(mesh, transforms)
            missing = vertices - np.einsum("vab,vb->va", turn, mesh.vertices) - shift
            back = turn.swapaxes(1, 2)
            solved = np.linalg.solve(back @ turn + DAMPING * np.eye(3), back @ missing[..., None])[..., 0]
            yield solved[None].astype(np.float32)


def _blended(mesh: Mesh, transforms: NDArray[np.floating]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(V, 3, 3) and (V, 3): each vertex's skinning matrix under bone transforms (J, 4, 4)."""
    assert mesh.skin_joints is not None
    assert mesh.skin_weights is not None
    matrices = np.einsum("vk,vkab->vab", mesh.skin_weights, transforms[mesh.skin_joints][..., :3, :].astype(np.float64))
    return matrices[..., :3], matrices[..., 3]


def _fit_network(
    skeleton: Skeleton, rotations: NDArray[np.floating], weights: NDArray[np.float64], seed: int
) -> Network:
    """Ridge regression on the features and on random hidden units of them (an extreme learning machine)."""
    canonical = axis_angle_to_matrix(skeleton.canonical_pose)
    world = joint_transforms(skeleton, canonical[None], np.zeros((1, 3)))[0, :, :3, :3]
    zero = np.zeros((0, 0))
    network = Network(world[list(SMPL_PARENTS[1:])], world[1:].transpose(0, 2, 1), zero, zero, zero, zero, zero)
    f, rng = network.features(rotations), np.random.default_rng(seed)
    hidden = rng.normal(size=(f.shape[1], HIDDEN)) / max(np.sqrt((f**2).sum(axis=1).mean()), 1e-9)
    bias = rng.uniform(-1, 1, HIDDEN)
    columns = np.concatenate([f, np.tanh(f @ hidden + bias)], axis=1)
    middle, spread = columns.mean(axis=0), columns.std(axis=0) + 1e-3
    scaled = (columns - middle) / spread
    # Fewer poses than columns is usual: the small system is that of the poses.
    solution = scaled.T @ np.linalg.solve(scaled @ scaled.T + RIDGE * np.eye(len(scaled)), weights) / spread[:, None]
    split = f.shape[1]
    return replace(
        network, hidden=hidden, bias=bias, linear=solution[:split], output=solution[split:],
        constant=weights.mean(axis=0) - middle @ solution,
    )  # fmt: skip


def write(baked: Baked, skeleton: Skeleton, name: str, clip: PoseSequence | None = None) -> bytes:
    """The GLB; with a clip, joints and weights play it in any viewer, without the network being run."""
    builder = GlbBuilder()
    primitive = skinned_primitive(builder, baked.mesh)
    primitive["targets"] = [
        {"POSITION": builder.add_array(shape, FLOAT, VERTEX_DATA, bounds=True)} for shape in baked.shapes
    ]
    add_skeleton(builder, name, skeleton)
    extras = {"fidelity": "baked", "network": baked.network.to_json(), "joints": list(skeleton.joint_names)}
    zeros = [0.0] * len(baked.shapes)
    builder.document["meshes"] = [{"name": name, "primitives": [primitive], "weights": zeros, "extras": extras}]
    builder.document["asset"]["extras"] = {"fidelity": "baked"}
    if clip is not None:
        samplers, channels = joint_tracks(builder, skeleton, clip, clip.fps)
        weights = baked.network(clip.rotations).astype(np.float32).reshape(-1)
        track = {"input": samplers[0]["input"], "output": builder.add_array(weights, FLOAT), "interpolation": "LINEAR"}
        channels.append({"sampler": len(samplers), "target": {"node": 0, "path": "weights"}})
        builder.document["animations"] = [{"name": "motion", "samplers": [*samplers, track], "channels": channels}]
    return builder.finish()


def evaluate(data: bytes, skeleton: Skeleton, poses: PoseSequence) -> Iterator[NDArray[np.float64]]:
    """Each frame's vertices (V, 3) from nothing but a baked file and its skeleton: what every evaluator must give."""
    document, binary = read_chunks(data)
    mesh_record = document["meshes"][0]
    primitive = mesh_record["primitives"][0]
    attributes = primitive["attributes"]
    base = Mesh(
        read_array(document, binary, attributes["POSITION"], FLOAT, "VEC3"),
        np.array([[0, 1, 2]], np.int32),
        skin_joints=read_array(document, binary, attributes["JOINTS_0"], BYTE, "VEC4"),
        skin_weights=read_array(document, binary, attributes["WEIGHTS_0"], FLOAT, "VEC4"),
    )
    shapes = [read_array(document, binary, target["POSITION"], FLOAT, "VEC3") for target in primitive["targets"]]
    stacked = np.stack(shapes).reshape(len(shapes), -1)
    network = Network.from_json(mesh_record["extras"]["network"])
    bones = skeleton.bone_transforms(poses.rotations)
    roots = skeleton.root_transforms(poses.rotations, poses.translation).astype(np.float64)
    for weights, transforms, root in zip(network(poses.rotations), bones, roots, strict=True):
        turn, shift = _blended(base, transforms)
        points = np.einsum("vab,vb->va", turn, base.vertices + (weights @ stacked).reshape(-1, 3)) + shift
        yield points @ root[:3, :3].T + root[:3, 3]
