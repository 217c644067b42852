"""Cloth put on a body in any pose: extended position based dynamics, small steps, one iteration a step.

Scalar code throughout: inside numba, vector products on 3-vectors allocate and are seven times slower.
Reference: Macklin, Müller, Chentanez, "XPBD", 2016; Macklin et al., "Small steps in physics simulation", 2019.
"""

import math
from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray
from scipy import sparse
from scipy.spatial import KDTree

from training.data.body import Body, skin
from training.data.garment import Garment
from training.data.mesh import edges_of

STEPS = 90
GOING_SHARE = 0.8
STEP_S = 1 / 60
SUBSTEPS = 15
STRETCH_COMPLIANCE = 1e-9
BEND_COMPLIANCE = 1e-5
DAMPING_PER_S = 20.0
SPEED_LIMIT_M_S = 4.0
THICKNESS_M = 0.005
FRICTION = 0.05
PIN_PULL = 0.5
IGNORED_JOINTS = (20, 21, 22, 23)
"""Wrists and hands do not touch the cloth: hands at the hips would otherwise pull the skirt up."""


@dataclass
class Cloth:
    """A garment and the body that wears it."""

    garment: Garment
    body: Body

    def __post_init__(self) -> None:
        rng = np.random.default_rng(0)  # the order of the constraints, so the same for every pose
        garment, body = self.garment, self.body
        edges, bends = edges_of(garment.faces), _opposite_vertices(garment.faces)
        pairs = np.concatenate([edges, bends])
        compliance = np.repeat([STRETCH_COMPLIANCE, BEND_COMPLIANCE], [len(edges), len(bends)])
        order = rng.permutation(len(pairs))
        self._edges, self._edge_length = edges, _lengths(garment.vertices, edges)
        self._pairs = pairs[order]
        self._rest = _lengths(garment.vertices, self._pairs)
        self._compliance = compliance[order] / (STEP_S / SUBSTEPS) ** 2
        solid = body.weights[:, IGNORED_JOINTS].sum(1) < 0.5
        self._solid = np.flatnonzero(solid)
        self._fan_start, self._fan = _fans(body.faces, len(body.vertices))
        self._pinned = np.flatnonzero(garment.pinned)
        self._pin_weights = sparse.csr_array(garment.weights[self._pinned])

    def dress(
        self, pose: NDArray[np.floating], translation: NDArray[np.floating], steps: int = STEPS
    ) -> NDArray[np.float64]:
        """(N, 3): the garment put on in the T-pose, gone to the pose (24, 3) in four fifths of the steps, then rested.

        What comes out depends on nothing but the pose, and changes little from a pose to one close by: for that the
        air is thick and the body slippery.
        """
        position = self.garment.vertices + translation
        velocity = np.zeros_like(position)
        body_before, pin_before = self.body.vertices + translation, position[self._pinned]
        share = np.clip(np.arange(1, steps + 1) / (GOING_SHARE * steps), 0.0, 1.0)
        for amount in share * share * (3 - 2 * share):
            transforms = self.body.transforms(amount * pose[None], translation[None])[0]
            body = self.body.posed(transforms)
            pin = skin(self.garment.vertices[self._pinned], self._pin_weights, transforms)
            near = self._solid[KDTree(body[self._solid]).query(position, k=2)[1]]
            corners, shares = _contacts(position, body, near, self._fan_start, self._fan, self.body.faces)
            start, end, normal = (
                np.einsum("nk,nkx->nx", shares, values[corners])
                for values in (body_before, body, _vertex_normals(body, self.body.faces))
            )
            normal /= np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-9)
            _advance(
                position, velocity, self._pairs, self._rest, self._compliance, start, end, normal,
                self._pinned, pin_before, pin,
            )  # fmt: skip
            body_before, pin_before = body, pin
        return position

    def stretch(self, position: NDArray[np.float64]) -> NDArray[np.float64]:
        """(E,): length of every edge over its length at rest."""
        return _lengths(position, self._edges) / self._edge_length


@njit(cache=True)
def _advance(x, v, pairs, rest, compliance, start, end, normal, pinned, pin_before, pin_after):
    """One step: each vertex stays above the plane through its contact, which moves from `start` to `end`."""
    h = STEP_S / SUBSTEPS
    count = x.shape[0]
    before = np.empty_like(x)
    keep = 1.0 - DAMPING_PER_S * h
    for substep in range(SUBSTEPS):
        t0, t1 = substep / SUBSTEPS, (substep + 1) / SUBSTEPS
        for i in range(count):
            v[i, 1] -= 9.81 * h
            speed = math.sqrt(v[i, 0] ** 2 + v[i, 1] ** 2 + v[i, 2] ** 2)
            scale = keep
            if speed * keep > SPEED_LIMIT_M_S:
                scale = SPEED_LIMIT_M_S / speed
            for k in range(3):
                v[i, k] *= scale
                before[i, k] = x[i, k]
                x[i, k] += h * v[i, k]
        for c in range(pairs.shape[0]):
            i, j = pairs[c, 0], pairs[c, 1]
            dx, dy, dz = x[i, 0] - x[j, 0], x[i, 1] - x[j, 1], x[i, 2] - x[j, 2]
            length = math.sqrt(dx * dx + dy * dy + dz * dz)
            if length < 1e-9:
                continue
            s = (rest[c] - length) / (2.0 + compliance[c]) / length
            x[i, 0] += s * dx
            x[i, 1] += s * dy
            x[i, 2] += s * dz
            x[j, 0] -= s * dx
            x[j, 1] -= s * dy
            x[j, 2] -= s * dz
        for i in range(count):
            _collide(x, before, i, start, end, normal, t0, t1)
        for p in range(pinned.shape[0]):
            i = pinned[p]
            for k in range(3):
                target = pin_before[p, k] + t1 * (pin_after[p, k] - pin_before[p, k])
                x[i, k] += PIN_PULL * (target - x[i, k])
        for i in range(count):
            for k in range(3):
                v[i, k] = (x[i, k] - before[i, k]) / h


@njit(cache=True, inline="always")
def _collide(x, before, i, start, end, normal, t0, t1):
    """Push vertex i out of the body along the normal of its contact, and rub it along."""
    nx, ny, nz = normal[i, 0], normal[i, 1], normal[i, 2]
    ex, ey, ez = end[i, 0] - start[i, 0], end[i, 1] - start[i, 1], end[i, 2] - start[i, 2]
    px, py, pz = x[i, 0], x[i, 1], x[i, 2]
    above = (px - start[i, 0] - t1 * ex) * nx + (py - start[i, 1] - t1 * ey) * ny + (pz - start[i, 2] - t1 * ez) * nz
    depth = THICKNESS_M - above
    if depth <= 0.0:
        return
    px, py, pz = px + depth * nx, py + depth * ny, pz + depth * nz
    # Friction: take back the part of the motion along the body that the push can hold.
    dx = (px - before[i, 0]) - (t1 - t0) * ex
    dy = (py - before[i, 1]) - (t1 - t0) * ey
    dz = (pz - before[i, 2]) - (t1 - t0) * ez
    along = dx * nx + dy * ny + dz * nz
    dx, dy, dz = dx - along * nx, dy - along * ny, dz - along * nz
    slide = math.sqrt(dx * dx + dy * dy + dz * dz)
    if slide > 1e-12:
        share = min(1.0, FRICTION * depth / slide)
        px, py, pz = px - share * dx, py - share * dy, pz - share * dz
    x[i, 0], x[i, 1], x[i, 2] = px, py, pz


@njit(cache=True)
def _contacts(x, body, near, fan_start, fan, faces):
    """The closest point of the body to each vertex, looked for around the body vertices near it.

    Returns:
        The corners of its triangle (N, 3) and its barycentric coordinates (N, 3).
    """
    corners = np.empty((len(x), 3), np.int64)
    shares = np.empty((len(x), 3))
    for i in range(len(x)):
        px, py, pz = x[i, 0], x[i, 1], x[i, 2]
        best = 1e9
        for n in range(near.shape[1]):
            vertex = near[i, n]
            for f in range(fan_start[vertex], fan_start[vertex + 1]):
                a, b, c = faces[fan[f], 0], faces[fan[f], 1], faces[fan[f], 2]
                u, v, w = _closest(
                    px, py, pz, body[a, 0], body[a, 1], body[a, 2], body[b, 0], body[b, 1], body[b, 2],
                    body[c, 0], body[c, 1], body[c, 2],
                )  # fmt: skip
                distance = 0.0
                for k in range(3):
                    distance += (u * body[a, k] + v * body[b, k] + w * body[c, k] - x[i, k]) ** 2
                if distance < best:
                    best = distance
                    corners[i, 0], corners[i, 1], corners[i, 2] = a, b, c
                    shares[i, 0], shares[i, 1], shares[i, 2] = u, v, w
    return corners, shares


@njit(cache=True, inline="always")
def _closest(px, py, pz, ax, ay, az, bx, by, bz, cx, cy, cz):
    """Barycentric coordinates of the point of a triangle closest to p (Ericson, 2004, 5.1.5)."""
    abx, aby, abz = bx - ax, by - ay, bz - az
    acx, acy, acz = cx - ax, cy - ay, cz - az
    apx, apy, apz = px - ax, py - ay, pz - az
    d1 = abx * apx + aby * apy + abz * apz
    d2 = acx * apx + acy * apy + acz * apz
    if d1 <= 0.0 and d2 <= 0.0:
        return 1.0, 0.0, 0.0
    bpx, bpy, bpz = px - bx, py - by, pz - bz
    d3 = abx * bpx + aby * bpy + abz * bpz
    d4 = acx * bpx + acy * bpy + acz * bpz
    if d3 >= 0.0 and d4 <= d3:
        return 0.0, 1.0, 0.0
    vc = d1 * d4 - d3 * d2
    if vc <= 0.0 and d1 >= 0.0 and d3 <= 0.0:
        t = d1 / (d1 - d3)
        return 1.0 - t, t, 0.0
    cpx, cpy, cpz = px - cx, py - cy, pz - cz
    d5 = abx * cpx + aby * cpy + abz * cpz
    d6 = acx * cpx + acy * cpy + acz * cpz
    if d6 >= 0.0 and d5 <= d6:
        return 0.0, 0.0, 1.0
    vb = d5 * d2 - d1 * d6
    if vb <= 0.0 and d2 >= 0.0 and d6 <= 0.0:
        t = d2 / (d2 - d6)
        return 1.0 - t, 0.0, t
    va = d3 * d6 - d5 * d4
    if va <= 0.0 and d4 - d3 >= 0.0 and d5 - d6 >= 0.0:
        t = (d4 - d3) / ((d4 - d3) + (d5 - d6))
        return 0.0, 1.0 - t, t
    total = va + vb + vc
    if total == 0.0:
        return 1.0, 0.0, 0.0
    return va / total, vb / total, vc / total


def _lengths(points: NDArray[np.float64], pairs: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.linalg.norm(points[pairs[:, 0]] - points[pairs[:, 1]], axis=1)


def _opposite_vertices(faces: NDArray[np.int64]) -> NDArray[np.int64]:
    """(B, 2): the two vertices across each inner edge."""
    corners = faces[:, [0, 1, 2, 1, 2, 0, 2, 0, 1]].reshape(-1, 3)  # edge and the corner across it
    key = np.sort(corners[:, :2], axis=1)
    order = np.lexsort(key.T)
    key, across = key[order], corners[order, 2]
    same = (key[1:] == key[:-1]).all(1)
    return np.stack([across[:-1][same], across[1:][same]], 1)


def _fans(faces: NDArray[np.int64], vertex_count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The faces around each vertex: those of vertex i are fan[start[i] : start[i + 1]]."""
    flat = faces.ravel()
    order = np.argsort(flat, kind="stable")
    start = np.concatenate([[0], np.cumsum(np.bincount(flat, minlength=vertex_count))])
    return start, order // 3


def _vertex_normals(vertices: NDArray[np.float64], faces: NDArray[np.int64]) -> NDArray[np.float64]:
    a, b, c = np.moveaxis(vertices[faces], 1, 0)
    normal = np.cross(b - a, c - a)  # weighted by area
    total = np.stack(
        [np.bincount(faces.ravel(), np.repeat(normal[:, k], 3), minlength=len(vertices)) for k in range(3)], 1
    )
    return total / np.maximum(np.linalg.norm(total, axis=1, keepdims=True), 1e-12)
