"""From a trained state to a bundle: the canonical mesh, extracted once, and the graph that reposes it."""

import copy
import warnings
from pathlib import Path
from typing import Any, Literal

import manifold3d
import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray

from model.extraction import extract_mesh
from model.field_pin import FieldPIN
from model.ins import INS
from model.repose import Repose
from model.skinning import NearSkinningField, VoxelSkinningField
from service.bundle.files import write_bundle
from service.bundle.glb import Mesh, strongest_bones
from service.bundle.manifest import Manifest
from service.bundle.skeleton import Skeleton, axis_angle_to_matrix
from training.checkpoint import encode_checkpoint
from training.data.mesh import largest_component
from training.stages import State

LODS = {"high": 30_000, "standard": 10_000, "preview": 4_000}
"""Vertices aimed at."""
MAX_PARITY_MM = 0.01
"""Largest difference between torch and ONNX Runtime that may be exported."""
COMPACT_FROM = 4096
"""Values of a constant from which its size matters."""
COARSE_CELLS, LEVELS = 40, 4
MARGIN_M = 0.3
MeshSource = Literal["surface", "field"]


class ExportError(ValueError):
    """The trained state does not make an avatar that may be served."""


def rounded(ins: INS) -> INS:
    """Round every weight to the nearest half-precision number, in place; the arithmetic stays float32.

    The checkpoint in the bundle is half as large for it.  Mesh, graph and figures are all made after the rounding, so
    all of them belong to the same weights.
    """
    with torch.no_grad():
        for weight in ins.parameters():
            weight.copy_(weight.half().float())
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
    """The graph of `model.repose` as one self-contained ONNX file; frames and vertices stay free."""
    example = (
        torch.from_numpy(vertices[:50]),
        torch.eye(4).repeat(3, ins.bone_count, 1, 1),
        torch.eye(4).repeat(3, 1, 1),
    )
    frame, vertex = torch.export.Dim("F"), torch.export.Dim("V")
    with warnings.catch_warnings():
        # The exporter's own use of deprecated interfaces; nothing here can act on it.
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            Repose(_near_only(ins)).eval(),
            example,
            input_names=["canonical_vertices", "bone_transforms", "root_transforms"],
            output_names=["vertices"],
            dynamic_shapes=({0: vertex}, {0: frame}, {0: frame}),
            opset_version=18,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    if program is None:
        raise ExportError("torch.onnx returned no program")
    graph = program.model_proto
    # The exporter notes where in the source each node came from: a megabyte of paths that serve nobody.
    for entry in (graph, graph.graph, *graph.graph.node, *graph.graph.value_info, *graph.graph.initializer):
        del entry.metadata_props[:]
    del graph.graph.value_info[:]
    _compact(graph)
    return graph.SerializeToString()


def _near_only(ins: INS) -> INS:
    """The same network without the skinning weights of places that it carries no vertex to.

    A field PIN is increasing along each axis and the identity at nodes without coefficients, so whatever the pose no
    point leaves the cells around its active nodes: the weights of those are all that is ever asked for.
    """
    pin, skinning = ins.h_c, ins.skinning_field
    if type(pin) is not FieldPIN or not isinstance(skinning, VoxelSkinningField):
        return ins
    near = copy.copy(ins)
    near._modules = {**ins._modules, "skinning_field": NearSkinningField(skinning, pin.node_positions(), pin.spacing)}
    return near


def _compact(graph: onnx.ModelProto) -> None:
    """Store large constants in half their bytes where that loses nothing; ONNX Runtime widens them once, at load."""
    kinds = {
        np.dtype(np.float32): (np.float16, onnx.TensorProto.FLOAT),
        np.dtype(np.int64): (np.int32, onnx.TensorProto.INT64),
    }
    for tensor in graph.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        narrow, wide = kinds.get(values.dtype, (None, None))
        if narrow is None or values.size < COMPACT_FROM or not np.array_equal(values.astype(narrow), values):
            continue
        name = tensor.name
        tensor.CopyFrom(onnx.numpy_helper.from_array(values.astype(narrow), f"{name}.narrow"))
        graph.graph.node.insert(0, onnx.helper.make_node("Cast", [f"{name}.narrow"], [name], to=wide))


def parity_mm(ins: INS, graph: bytes, meshes: dict[str, Mesh], skeleton: Skeleton, seed: int = 0) -> float:
    """Largest distance, mm, between torch and ONNX Runtime over random poses, some of them extreme, on every mesh."""
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(seed)
    repose, errors = Repose(ins).eval(), []
    for frames, mesh in zip((1, 2, 5), meshes.values(), strict=False):
        rotations = axis_angle_to_matrix(rng.normal(0, 0.6, (frames, skeleton.joint_count, 3)))
        feeds = {
            "canonical_vertices": mesh.vertices,
            "bone_transforms": skeleton.bone_transforms(rotations),
            "root_transforms": skeleton.root_transforms(rotations, rng.normal(0, 1, (frames, 3))),
        }
        (answer,) = session.run(None, feeds)
        with torch.no_grad():
            expected = repose(*(torch.from_numpy(value) for value in feeds.values())).numpy()
        errors.append(1000 * np.linalg.norm(np.asarray(answer) - expected, axis=-1).max())
    return float(np.max(errors))  # NaN if any is


def export_bundle(
    ins: INS,
    skeleton: Skeleton,
    meshes: dict[str, Mesh],
    path: Path,
    provenance: dict[str, Any],
    metrics: dict[str, float],
    words: dict[str, Any],
) -> Manifest:
    """Write the avatar's folder `path`, named after the avatar; `words` go with the checkpoint, as in a run.

    Raises:
        ExportError: torch and ONNX Runtime disagree by more than 0.01 mm.
        BundleError: the service would not accept the bundle.
    """
    graph = repose_onnx(ins, meshes["standard"].vertices)
    worst = parity_mm(ins, graph, meshes, skeleton)
    if not worst <= MAX_PARITY_MM:
        raise ExportError(f"torch and ONNX Runtime differ by {worst:.4f} mm; at most {MAX_PARITY_MM} mm is allowed")
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
        metrics={**metrics, "onnx_parity_mm": worst},
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
