"""One watertight scan of a dressed body: the union of body and cloth, meshed from a field in a narrow band.

Inside is where the winding number of the body or that of the cloth exceeds one half.  The cloth is open at neck,
sleeves and hem; near an opening its winding number itself serves as the field, which closes it smoothly, as a
scanner's surface reconstruction does.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import igl
import manifold3d
import numpy as np
from numpy.typing import NDArray
from skimage.measure import marching_cubes

from training.data.mesh import (
    compact,
    component_count,
    connected_regions,
    distances,
    is_closed,
    largest_component,
    volume,
    winding_numbers,
)
from training.data.subject import Scan

SPACING_M = 0.008
TOLERANCE_M = 7e-4
CAP_SLOPE_M = 0.1
"""Metres of field per unit of winding number at the openings."""
VOLUME_RANGE_M3 = (0.055, 0.12)
STRETCH_LIMIT = 1.3
INSIDE_LIMIT = 0.01
Sheet = tuple[NDArray[np.float64], NDArray[np.int64]]


@dataclass(frozen=True)
class Layer:
    """What a scan can lie on, and its colours, which stay with the material."""

    sheet: Sheet
    """As it was scanned."""
    rest_vertices: NDArray[np.float64]
    """(N, 3), the same vertices in the T-pose."""
    colours: Callable[[NDArray[np.float64]], NDArray[np.uint8]]
    """(P, 3) sRGB of points (P, 3) of the T-pose."""


@dataclass(frozen=True)
class Quality:
    """What is measured on a frame before it is kept."""

    closed: bool
    components: int
    volume_m3: float
    stretch_p99: float
    cloth_inside_share: float

    def faults(self, expected_volume: tuple[float, float] = VOLUME_RANGE_M3) -> list[str]:
        """Why the frame is not fit to learn from; empty if it is."""
        low, high = expected_volume
        checks = {
            "not watertight": not self.closed,
            f"{self.components} components": self.components != 1,
            f"volume {self.volume_m3:.4f} m3": not low <= self.volume_m3 <= high,
            f"stretch p99 {self.stretch_p99:.2f}": not self.stretch_p99 <= STRETCH_LIMIT,
            f"{self.cloth_inside_share:.1%} of the cloth inside the body": not self.cloth_inside_share <= INSIDE_LIMIT,
        }
        return [fault for fault, found in checks.items() if found]


def scan_of(body: Sheet, cloth: Sheet | None, spacing: float = SPACING_M, tolerance: float = TOLERANCE_M) -> Scan:
    """The outer surface of body and cloth as one closed mesh, its largest component."""
    points = body[0] if cloth is None else np.concatenate([body[0], cloth[0]])
    block = 4 * spacing
    low = points.min(0) - 2 * block
    blocks = np.ceil((points.max(0) + 2 * block - low) / block).astype(int)
    # Three grids, each asked only where the coarser one comes near the surface: steps 4, 2 and 1.
    field = np.full(blocks + 1, np.inf)
    wanted = np.ones(field.shape, bool)
    for step in (4, 2, 1):
        if step < 4:
            # A distance changes by at most the way between two nodes, so the coarser neighbours tell how close to the
            # surface a node can be; a corner of a crossed cell is within a diagonal.  The slope of the openings is a
            # little above 1.
            bound = 1.1 * step * spacing * (np.sqrt(3) + _steps_to_coarser(2 * np.array(field.shape) - 1))
            wanted = _refined(np.abs(field), np.maximum) < bound
            field = _refined(field, lambda a, b: (a + b) / 2)
        field[wanted] = _union(low, step * spacing, wanted, body, cloth)
    vertices, faces, _, _ = marching_cubes(field, 0.0, allow_degenerate=False)
    vertices = (low + spacing * vertices.astype(np.float64)).astype(np.float32)
    solid = manifold3d.Manifold(manifold3d.Mesh(vertices, faces.astype(np.uint32)))
    simple = solid.simplify(tolerance).to_mesh()
    vertices, faces = compact(np.asarray(simple.vert_properties)[:, :3], np.asarray(simple.tri_verts))
    vertices, faces = largest_component(vertices, faces)  # marching cubes leaves crumbs
    return Scan(vertices.astype(np.float32), faces.astype(np.int32))


def painted(scan: Scan, layers: Sequence[Layer]) -> Scan:
    """The scan with the colours of the layers, at each vertex those of the closest point on any of them."""
    vertices = scan.vertices.astype(np.float64)
    nearest = np.full(len(vertices), np.inf)
    colours = np.zeros(vertices.shape, np.uint8)
    for layer in layers:
        posed, faces = layer.sheet
        squared, face, closest = map(np.asarray, igl.point_mesh_squared_distance(vertices, posed, faces))
        corners = faces[face]
        shares = igl.barycentric_coordinates(closest, *(np.ascontiguousarray(posed[corners[:, k]]) for k in range(3)))
        at_rest = np.einsum("pk,pkx->px", np.asarray(shares), layer.rest_vertices[corners])
        closer = squared < nearest
        colours[closer] = layer.colours(at_rest[closer])
        nearest[closer] = squared[closer]
    return Scan(scan.vertices, scan.faces, colours)


def quality_of(scan: Scan, body: Sheet, cloth: NDArray[np.float64] | None, stretch: NDArray[np.float64]) -> Quality:
    """Measure a frame; `stretch` is that of the cloth's edges, empty without cloth."""
    inside = 0.0
    if cloth is not None:
        inside = float((winding_numbers(*body, cloth) > 0.5).mean())
    return Quality(
        closed=is_closed(scan.faces),
        components=component_count(len(scan.vertices), scan.faces)[0],
        volume_m3=volume(scan.vertices, scan.faces),
        stretch_p99=float(np.percentile(stretch, 99)) if len(stretch) else 1.0,
        cloth_inside_share=inside,
    )


def _refined(
    array: NDArray[np.float64], between: Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]]
) -> NDArray[np.float64]:
    """Insert a node between any two, along each axis in turn, with a value made of theirs."""
    for axis in range(3):
        array = np.moveaxis(array, axis, 0)
        finer = np.empty((2 * len(array) - 1, *array.shape[1:]))
        finer[::2], finer[1::2] = array, between(array[:-1], array[1:])
        array = np.moveaxis(finer, 0, axis)
    return np.ascontiguousarray(array)


def _steps_to_coarser(shape: NDArray[np.int64]) -> NDArray[np.float64]:
    """How far each node of a refined grid is from the coarser nodes around it, in its own steps."""
    odd = [np.arange(size) % 2 for size in shape]
    return np.sqrt(odd[0][:, None, None] + odd[1][:, None] + odd[2])


def _union(
    low: NDArray[np.float64], step: float, wanted: NDArray[np.bool_], body: Sheet, cloth: Sheet | None
) -> NDArray[np.float64]:
    """The field at the wanted nodes of a grid, negative inside either."""
    index = np.argwhere(wanted)
    nodes = low + step * index
    field = np.full(len(nodes), np.inf)
    if cloth is not None:
        margin = 0.05
        near = ((nodes > cloth[0].min(0) - margin) & (nodes < cloth[0].max(0) + margin)).all(1)
        field[near] = _cloth_field(nodes[near], cloth)
    asked = field > -0.01  # deeper inside the cloth the body changes nothing
    field[asked] = np.minimum(field[asked], _body_field(nodes[asked], index[asked], wanted.shape, step, body))
    return field


def _body_field(
    nodes: NDArray[np.float64], index: NDArray[np.int64], shape: tuple[int, ...], step: float, body: Sheet
) -> NDArray[np.float64]:
    distance = distances(*body, nodes)
    # Neighbours further than half a step from the surface have none between them, so a connected region of such
    # nodes has one sign; winding numbers are asked once a region and at the nodes closer by, as they are dear.
    far = distance > 0.501 * step
    grid = np.zeros(shape, bool)
    grid[tuple(index[far].T)] = True
    region = connected_regions(grid)[tuple(index.T)]
    _, first = np.unique(region[far], return_index=True)
    asked = np.concatenate([np.flatnonzero(far)[first], np.flatnonzero(~far)])
    answers = winding_numbers(*body, nodes[asked]) > 0.5
    inside = np.concatenate([[False], answers[: len(first)]])[region]
    inside[~far] = answers[len(first) :]
    return np.where(inside, -distance, distance)


def _cloth_field(nodes: NDArray[np.float64], cloth: Sheet) -> NDArray[np.float64]:
    distance = distances(*cloth, nodes)
    depth = 0.5 - winding_numbers(*cloth, nodes)
    return np.sign(depth) * np.minimum(distance, CAP_SLOPE_M * np.abs(depth))
