"""Questions about triangle meshes: distances, winding numbers, edges, openings, components, volume."""

from typing import Any

import igl
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, sparse
from scipy.sparse.csgraph import connected_components


def distances(
    vertices: NDArray[np.floating], faces: NDArray[np.integer], points: NDArray[np.floating]
) -> NDArray[np.float64]:
    """(N,): distance from points (N, 3) to the surface."""
    return np.sqrt(igl.point_mesh_squared_distance(_f8(points), _f8(vertices), _i8(faces))[0])


def winding_numbers(
    vertices: NDArray[np.floating], faces: NDArray[np.integer], points: NDArray[np.floating]
) -> NDArray[np.float64]:
    """(N,): generalised winding numbers of the surface at points (N, 3)."""
    return np.atleast_1d(np.asarray(igl.fast_winding_number(_f8(vertices), _i8(faces), _f8(points))))


def connected_regions(mask: NDArray[np.bool_]) -> NDArray[np.int32]:
    """A number from 1 for every connected region of a grid's marked nodes, 0 for the others."""
    return np.asarray(ndimage.label(mask)[0], np.int32)  # pyright: ignore[reportIndexIssue]


def directed_edges(faces: NDArray[np.integer]) -> NDArray[np.int64]:
    """(3 T, 2)"""
    return np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]).astype(np.int64)


def edges_of(faces: NDArray[np.integer]) -> NDArray[np.int64]:
    """(E, 2): every edge once."""
    return np.unique(np.sort(directed_edges(faces), axis=1), axis=0)


def is_closed(faces: NDArray[np.integer]) -> bool:
    """Whether every directed edge occurs once and its opposite once: watertight, manifold at edges, oriented."""
    edges = directed_edges(faces)
    size = int(faces.max()) + 1
    forward, backward = np.sort(edges[:, 0] * size + edges[:, 1]), np.sort(edges[:, 1] * size + edges[:, 0])
    return bool((forward == backward).all() and (np.diff(forward) > 0).all())


def boundary_loops(faces: NDArray[np.integer]) -> list[NDArray[np.int64]]:
    """The openings of a mesh, each as its vertices in order."""
    edges = directed_edges(faces)
    size = int(faces.max()) + 1
    forward, backward = edges[:, 0] * size + edges[:, 1], edges[:, 1] * size + edges[:, 0]
    free = edges[~np.isin(forward, backward)]
    following = dict(free.tolist())
    loops = []
    while following:
        start, at = following.popitem()
        loop = [start]
        while at != start and at in following:
            loop.append(at)
            at = following.pop(at)
        loops.append(np.array(loop))
    return loops


def compact(vertices: NDArray[Any], faces: NDArray[np.integer]) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """The mesh without the vertices that no face uses."""
    used, inverse = np.unique(faces, return_inverse=True)
    return vertices[used], inverse.reshape(faces.shape).astype(np.int64)


def component_count(vertex_count: int, faces: NDArray[np.integer]) -> tuple[int, NDArray[np.int64]]:
    """Number of connected components and (V,) the component of each vertex."""
    edges = directed_edges(faces)
    graph = sparse.coo_array((np.ones(len(edges), bool), (edges[:, 0], edges[:, 1])), shape=(vertex_count,) * 2)
    count, labels = connected_components(graph, directed=False)
    return int(count), labels


def largest_component(vertices: NDArray[Any], faces: NDArray[np.integer]) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """The connected component with the most vertices."""
    _, labels = component_count(len(vertices), faces)
    keep = labels == np.bincount(labels).argmax()
    return compact(vertices, faces[keep[faces[:, 0]]])


def volume(vertices: NDArray[np.floating], faces: NDArray[np.integer]) -> float:
    """Enclosed volume of a closed mesh, positive when its faces look outwards."""
    a, b, c = np.moveaxis(np.asarray(vertices, np.float64)[faces], 1, 0)
    return float(np.einsum("ta,ta->", a, np.cross(b, c)) / 6)


def laplacian(faces: NDArray[np.integer], vertex_count: int) -> sparse.coo_array:
    """(V, V) uniform Laplacian: mean of the neighbours minus the vertex."""
    edges = edges_of(faces)
    both = np.concatenate([edges, edges[:, ::-1]])
    graph = sparse.csr_array((np.ones(len(both)), (both[:, 0], both[:, 1])), (vertex_count, vertex_count))
    degree = np.asarray(graph.sum(axis=1)).ravel().clip(min=1)
    matrix = sparse.diags_array(1 / degree) @ graph - sparse.eye_array(vertex_count)
    return sparse.coo_array(matrix.astype(np.float32))


def _f8(array: NDArray[Any]) -> NDArray[np.float64]:
    return np.ascontiguousarray(array, np.float64)


def _i8(array: NDArray[Any]) -> NDArray[np.int64]:
    return np.ascontiguousarray(array, np.int64)
