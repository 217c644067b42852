"""From a trained state to a bundle: the canonical mesh, extracted once, and the graph that reposes it."""

import copy
import warnings
from pathlib import Path
from typing import Any, Literal

import manifold3d
import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from model.extraction import extract_mesh
from model.fast_repose import FastRepose
from model.field_pin import FieldPIN
from model.ins import INS
from model.repose import Repose
from model.skinning import NearSkinningField, VoxelSkinningField
from service.bundle.files import write_bundle
from service.bundle.glb import Mesh, strongest_bones
from service.bundle.manifest import INPUTS, SKINNING_WEIGHTS, Manifest
from service.bundle.skeleton import Skeleton, axis_angle_to_matrix
from service.engine import OnnxEngine
from service.errors import EngineFailed
from training.checkpoint import encode_checkpoint
from training.data.mesh import largest_component
from training.graph import compact, joined
from training.stages import State

LODS = {"high": 30_000, "standard": 10_000, "preview": 4_000}
"""Vertices aimed at."""
MAX_PARITY_MM = 0.01
"""Largest distance of the graph's plain form from torch that may be exported."""
MAX_FAST_ERROR_MM = 0.1
"""The same for the fast form."""
ERROR_POSES = 512
"""Poses in which the fast form is measured."""
COARSE_CELLS, LEVELS = 40, 4
MARGIN_M = 0.3
MeshSource = Literal["surface", "field"]


class ExportError(ValueError):
    """The trained state does not make an avatar that may be served."""


def rounded(ins: INS) -> INS:
    """Round every number of the state to the nearest half-precision number, in place; the arithmetic stays float32.

    The checkpoint in the bundle is half as large for it.  Mesh, graph and figures are all made after the rounding, so
    all of them belong to the same state.
    """
    with torch.no_grad():
        for value in ins.state_dict().values():
            if value.is_floating_point():
                value.copy_(value.half().float())
    return ins


def canonical_meshes(state: State, skeleton: Skeleton, source: MeshSource | None = None) -> dict[str, Mesh]:
    """The canonical surface, simplified to every level of detail.

    Args:
        source: "field" extracts the level set of the occupancy network (MISE), as the paper does; "surface" takes the
            surface that stage `forward` refined, the default where a run has one: it was extracted once as well, by
            stage `vote`, and holds fingers and faces that the occupancy network learns much more slowly.

    Raises:
        ExportError: the surface is not closed, or the run has none.
    """
    if source is None:
        source = "field" if state.surface is None else "surface"
    if source == "field":
        joints = torch.from_numpy(skeleton.canonical_joints()).float()
        corners = joints.amin(0) - MARGIN_M, joints.amax(0) + MARGIN_M
        vertices, faces = extract_mesh(state.ins.occupancy, *corners, COARSE_CELLS, LEVELS)
    elif state.surface is not None:
        vertices, faces = state.surface.vertices().detach(), state.surface.faces
    else:
        raise ExportError("there is no surface in this checkpoint: extract the field")
    single, triangles = largest_component(vertices.numpy().astype(np.float32), faces.numpy())
    solid = manifold3d.Manifold(manifold3d.Mesh(single, triangles.astype(np.uint32)))
    if solid.status() != manifold3d.Error.NoError or solid.is_empty():
        raise ExportError(f"the canonical surface is not closed: {solid.status()}")
    return {lod: _with_skin(state.ins, *_simplified(solid, count)) for lod, count in LODS.items()}


def repose_onnx(ins: INS, vertices: NDArray[np.float32]) -> bytes:
    """All forms of the network as one self-contained ONNX file; frames and vertices stay free.

    The fast form (`model.fast_repose`) runs unless the optional input `plain` is true: then the reference
    (`model.repose`) does.  Where weights do not depend on the pose, the optional input `skinning_weights` makes it
    faster still.  They share their constants, so the file is little larger than with one of them.
    """
    near = _near_field(ins)
    forms = {"plain": Repose(ins if near is None else _with_weights(ins, near)), "fast": FastRepose(ins, near)}
    example = (
        torch.from_numpy(vertices[:50]),
        torch.eye(4).repeat(3, ins.bone_count, 1, 1),
        torch.eye(4).repeat(3, 1, 1),
    )
    graphs = {name: _graph(form.eval(), example) for name, form in forms.items()}
    if ins.weights_are_fixed:
        given = torch.softmax(torch.rand(len(example[0]), ins.bone_count), -1)
        graphs["given"] = _graph(forms["fast"], (*example, given))
    model = joined(**graphs)
    compact(model)
    return model.SerializeToString()


def _graph(form: torch.nn.Module, example: tuple[torch.Tensor, ...]) -> onnx.ModelProto:
    frame, vertex = torch.export.Dim("F"), torch.export.Dim("V")
    with warnings.catch_warnings():
        # The exporter's own use of deprecated interfaces; nothing here can act on it.
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            form,
            example,
            input_names=[*(tensor.name for tensor in INPUTS), SKINNING_WEIGHTS][: len(example)],
            output_names=["vertices"],
            dynamic_shapes=({0: vertex}, {0: frame}, {0: frame}, {0: vertex})[: len(example)],
            opset_version=18,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    if program is None:
        raise ExportError("torch.onnx returned no program")
    return program.model_proto


def _near_field(ins: INS) -> NearSkinningField | None:
    """The voxel field without the skinning weights of places that the network carries no vertex to.

    A field PIN is increasing along each axis and the identity at nodes without coefficients, so whatever the pose no
    point leaves the cells around its active nodes: the weights of those are all that is ever asked for.
    """
    pin, skinning = ins.h_c, ins.skinning_field
    if type(pin) is not FieldPIN or not isinstance(skinning, VoxelSkinningField):
        return None
    return NearSkinningField(skinning, pin.node_positions(), pin.spacing)


def _with_weights(ins: INS, field: NearSkinningField) -> INS:
    """The same network with other skinning weights."""
    near = copy.copy(ins)
    near._modules = {**ins._modules, "skinning_field": field}
    return near


def varied_poses(real: NDArray[np.floating], count: int, seed: int = 0) -> NDArray[np.float64]:
    """(count, 24, 3, 3): real poses as far as they go, blends of two of them, and in every eighth place extreme ones.

    Args:
        real: (P, 24, 3), axis-angle; P may be zero, then all the others are drawn as well.
    """
    rng = np.random.default_rng(seed)
    poses = np.empty((count, 24, 3))
    for number in range(count):
        if number % 8 == 7:
            poses[number] = rng.normal(0, rng.uniform(0.3, 0.8), (24, 3))
        elif not len(real):
            poses[number] = rng.normal(0, rng.uniform(0.05, 0.3), (24, 3))
        elif number < len(real):
            poses[number] = real[number]
        else:
            first, second = real[rng.choice(len(real), 2, replace=len(real) < 2)]
            share = rng.random((24, 1))  # each joint its own
            poses[number] = (1 - share) * first + share * second
    return axis_angle_to_matrix(poses)


def errors_mm(
    ins: INS,
    graph: bytes,
    meshes: dict[str, Mesh],
    skeleton: Skeleton,
    rotations: NDArray[np.floating],
    plain: bool = False,
) -> float:
    """Largest distance, mm, between ONNX Runtime and the reference, `model.repose` in float64, NaN if any is.

    The smallest mesh goes through all poses, every other one through the last eight.

    Args:
        plain: measure the plain form of the graph, not the fast one.
    """
    engine = OnnxEngine(graph, cpu_only=True, plain=plain)  # as the service runs it
    translation = np.random.default_rng(0).normal(0, 1, (len(rotations), 3))
    reference, worst = Repose(copy.deepcopy(ins)).eval().double(), []
    smallest = min(meshes, key=lambda lod: len(meshes[lod].vertices))
    for lod, mesh in meshes.items():
        first, size = (0, 8) if lod == smallest else (max(0, len(rotations) - 8), 2)
        for start in range(first, len(rotations), size):
            part = slice(start, start + size)
            bones = skeleton.bone_transforms(rotations[part])
            inputs = mesh.vertices, bones, skeleton.root_transforms(rotations[part], translation[part])
            try:
                answer = engine.repose(*inputs)
            except EngineFailed:  # the fast form finds no node next to a NaN
                return float("nan")
            with torch.no_grad():
                expected = reference(*(torch.from_numpy(value).double() for value in inputs)).numpy()
            worst.append(1000 * np.linalg.norm(answer - expected, axis=-1).max())
    return float(np.max(worst))


def graph_errors(
    ins: INS, graph: bytes, meshes: dict[str, Mesh], skeleton: Skeleton, real_poses: NDArray[np.floating]
) -> dict[str, float]:
    """Both forms' largest errors, as they go into the manifest.

    Raises:
        ExportError: one of them is too large, or no number.
    """
    poses = varied_poses(real_poses, ERROR_POSES)
    measured = {
        "onnx_parity_mm": errors_mm(ins, graph, meshes, skeleton, poses[-16:], plain=True),
        "fast_max_error_mm": errors_mm(ins, graph, meshes, skeleton, poses),
    }
    for name, allowed in (("onnx_parity_mm", MAX_PARITY_MM), ("fast_max_error_mm", MAX_FAST_ERROR_MM)):
        if not measured[name] <= allowed:
            raise ExportError(f"{name}: torch and ONNX Runtime differ by {measured[name]:.4f} mm, more than {allowed}")
    return measured


def export_bundle(
    ins: INS,
    skeleton: Skeleton,
    meshes: dict[str, Mesh],
    path: Path,
    provenance: dict[str, Any],
    metrics: dict[str, float],
    words: dict[str, Any],
    real_poses: NDArray[np.floating] | None = None,
) -> Manifest:
    """Write the avatar's folder `path`, named after the avatar; `words` go with the checkpoint, as in a run.

    Args:
        real_poses: (P, 24, 3), axis-angle: poses of the subject, through which the graph's errors are measured too.

    Raises:
        ExportError: ONNX Runtime is off by more than 0.01 mm in the plain form, or 0.1 mm in the fast one.
        BundleError: the service would not accept the bundle.
    """
    graph = repose_onnx(ins, meshes["standard"].vertices)
    measured = graph_errors(ins, graph, meshes, skeleton, np.zeros((0, 24, 3)) if real_poses is None else real_poses)
    halves = {
        f"ins.{name}": value.half() if value.is_floating_point() else value for name, value in ins.state_dict().items()
    }
    return write_bundle(
        path,
        avatar_id=path.name,
        skeleton=skeleton,
        meshes=meshes,
        repose_onnx=graph,
        checkpoint=encode_checkpoint(halves, words),
        provenance=provenance,
        metrics={**metrics, **measured},
    )


def _simplified(solid: manifold3d.Manifold, count: int) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """The solid with at most `count` vertices, or as few as it gets: by the smallest tolerance that does it.

    A body is curved everywhere, so the tolerance also bounds the triangles: 1 mm on a thigh allows edges of 3 cm.
    """
    best = solid
    for tolerance in np.geomspace(1e-5, 1e-2, 40):  # metres; beyond, the number of vertices grows again
        candidate = solid.simplify(float(tolerance))
        if candidate.num_vert() < best.num_vert():
            best = candidate
        if best.num_vert() <= count:
            break
    # Simplifying may pinch off a tip of a thin part.
    largest = max(best.decompose(), key=lambda part: part.num_vert())
    mesh = largest.to_mesh()
    return np.array(mesh.vert_properties[:, :3], np.float32), np.array(mesh.tri_verts, np.int32)


def _with_skin(ins: INS, vertices: NDArray[np.float32], faces: NDArray[np.int32]) -> Mesh:
    with torch.no_grad():
        weights = ins.skinning_field(torch.from_numpy(vertices)).numpy()
    joints, strongest = strongest_bones(weights)
    return Mesh(vertices, faces, skin_joints=joints, skin_weights=strongest)
