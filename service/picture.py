"""Pictures of meshes without a GPU or a window: a small rasteriser in NumPy.

One key light with a shadow map, a fill light from the other side, light from the sky and the floor, smooth
normals, and twice as many pixels in both directions as the picture has.  Frames: y up, metres.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from service.bundle.glb import Mesh, linear_light

Floats = NDArray[np.float64]
CLOTH = (0.30, 0.42, 0.60)
BACKDROP = np.array([0.84, 0.86, 0.89])
KEY_DIRECTION = np.array([-0.45, 0.80, 0.55])  # towards the light, as seen from the camera's side
FILL_DIRECTION = np.array([0.85, 0.25, 0.45])
FIELD_OF_VIEW_DEG = 24.0
SHADOW_PIXELS = 768
SAMPLES_AT_ONCE = 2_000_000


def render(
    vertices: NDArray[np.floating],
    faces: NDArray[np.integer],
    size: tuple[int, int] = (480, 640),
    *,
    azimuth_deg: float = 25.0,
    elevation_deg: float = 8.0,
    target: Sequence[float] | None = None,
    span_m: float | None = None,
    colors: NDArray[np.uint8] | None = None,
    texture: tuple[NDArray[np.uint8], NDArray[np.floating]] | None = None,
    ground_y: float | None = None,
) -> NDArray[np.uint8]:
    """A picture (H, W, 3) of one mesh.

    Args:
        vertices: (V, 3), metres.
        faces: (T, 3); both sides are drawn.
        size: width and height of the picture.
        azimuth_deg: 0 looks the subject in the face (it looks along z), 90 sees it from its left.
        elevation_deg: of the camera above the target.
        target: the point in the middle of the picture; by default the middle of the mesh.
        span_m: metres from the upper to the lower edge at the target; by default the mesh fits.
        colors: (V, 3), sRGB; by default one colour of cloth.
        texture: an sRGB picture (H, W, 3), and where in it the corners of each face are, (T, 3, 2), (0, 0) being its
            upper left corner and (1, 1) its lower right one; it goes before the colors.
        ground_y: height of a floor that takes the shadow; None draws none.
    """
    points = np.asarray(vertices, np.float64)
    faces = np.asarray(faces, np.int64)
    low, high = points.min(axis=0), points.max(axis=0)
    middle = np.asarray(target if target is not None else (low + high) / 2, np.float64)
    width, height = 2 * size[0], 2 * size[1]
    if span_m is None:
        span_m = 1.08 * float(max(high[1] - low[1], np.hypot(*(high - low)[[0, 2]]) * height / width, 1e-6))
    camera = _Camera.orbit(middle, span_m, azimuth_deg, elevation_deg, width, height)
    # The lights go round with the camera, so that every side of the subject is lit alike.
    key, fill = (_unit(_turn_y(azimuth_deg) @ direction) for direction in (KEY_DIRECTION, FILL_DIRECTION))
    shadow = _ShadowMap(points, faces, key)

    hit = rasterize(camera.project(points), faces, width, height)
    image = camera.backdrop()
    if ground_y is not None:
        _paint_ground(image, camera, ground_y, middle, span_m, shadow)
    inside = hit.face >= 0
    corners, weights = faces[hit.face[inside]], hit.weights[inside]
    normals = _unit(np.einsum("pk,pkc->pc", weights, vertex_normals(points, faces)[corners]))
    places = np.einsum("pk,pkc->pc", weights, points[corners])
    albedo: Floats = np.broadcast_to(np.array(CLOTH), places.shape)
    if texture is not None:
        image_of, corner_uv = texture
        at = np.einsum("pk,pkc->pc", weights, corner_uv[hit.face[inside]]).clip(0, 1 - 1e-6)
        column, row = (at * image_of.shape[1::-1]).astype(int).T
        albedo = linear_light(image_of[row, column])
    elif colors is not None:
        albedo = np.einsum("pk,pkc->pc", weights, linear_light(colors)[corners])
    towards = _unit(camera.eye - places)
    normals *= np.where((normals * towards).sum(axis=1) < 0, -1.0, 1.0)[:, None]
    image[inside] = _shade(albedo, normals, places, towards, key, fill, shadow)

    srgb = np.clip(image, 0, 1) ** (1 / 2.2)
    small = srgb.reshape(size[1], 2, size[0], 2, 3).mean(axis=(1, 3))
    return (255 * small + 0.5).astype(np.uint8)


def texture_of(mesh: Mesh) -> tuple[NDArray[np.uint8], NDArray[np.float32]] | None:
    """The mesh's texture as `render` takes it; None where it has none."""
    if mesh.texture is None or mesh.uv is None:
        return None
    with Image.open(io.BytesIO(mesh.texture)) as file:
        return np.asarray(file.convert("RGB")), mesh.uv[mesh.faces]


def contact_sheet(pictures: Sequence[NDArray[np.uint8]], columns: int) -> NDArray[np.uint8]:
    """Pictures of equal size side by side, `columns` to a row; empty places are white."""
    height, width, _ = pictures[0].shape
    rows = -(-len(pictures) // columns)
    sheet = np.full((rows * height, columns * width, 3), 255, np.uint8)
    for n, picture in enumerate(pictures):
        row, column = divmod(n, columns)
        sheet[row * height : (row + 1) * height, column * width : (column + 1) * width] = picture
    return sheet


def save_png(picture: NDArray[np.uint8], path: str) -> None:
    """Write a picture as PNG."""
    Path(path).write_bytes(png(picture))


def png(picture: NDArray[np.uint8]) -> bytes:
    """A picture (H, W, 3) as PNG."""
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, format="PNG", optimize=True)
    return stream.getvalue()


def vertex_normals(points: Floats, faces: NDArray[np.int64]) -> Floats:
    """(V, 3), unit length, weighted by the area of the faces around."""
    a, b, c = (points[faces[:, k]] for k in range(3))
    across = np.cross(b - a, c - a)
    flat = np.zeros((3, len(points)))
    for axis in range(3):
        for corner in range(3):
            flat[axis] += np.bincount(faces[:, corner], across[:, axis], len(points))
    return _unit(flat.T)


@dataclass(frozen=True)
class _Camera:
    eye: Floats
    axes: Floats
    """Rows: right, up, backward."""
    focal: float
    width: int
    height: int

    @classmethod
    def orbit(
        cls, middle: Floats, span_m: float, azimuth_deg: float, elevation_deg: float, width: int, height: int
    ) -> "_Camera":
        elevation = np.radians(elevation_deg)
        backward = _turn_y(azimuth_deg) @ np.array([0.0, np.sin(elevation), np.cos(elevation)])
        right = _unit(np.cross([0.0, 1.0, 0.0], backward))
        distance = 0.5 * span_m / np.tan(np.radians(FIELD_OF_VIEW_DEG) / 2)
        focal = height * distance / span_m
        return cls(
            middle + distance * backward, np.stack([right, np.cross(backward, right), backward]), focal, width, height
        )

    def project(self, points: Floats) -> Floats:
        """(V, 3): pixel x, pixel y, inverse depth (0 or less behind the camera)."""
        x, y, back = ((points - self.eye) @ self.axes.T).T
        near = np.where(-back > 1e-3, 1 / np.maximum(-back, 1e-3), -1.0)
        return np.stack([self.width / 2 + self.focal * x * near, self.height / 2 - self.focal * y * near, near], axis=1)

    def rays(self) -> Floats:
        """(H, W, 3): direction through each pixel, not of unit length."""
        x = (np.arange(self.width) + 0.5 - self.width / 2) / self.focal
        y = (self.height / 2 - np.arange(self.height) - 0.5) / self.focal
        return x[None, :, None] * self.axes[0] + y[:, None, None] * self.axes[1] - self.axes[2]

    def backdrop(self) -> Floats:
        """(H, W, 3): a plain wall, a little darker towards the corners."""
        x = np.linspace(-1, 1, self.width)[None, :]
        y = np.linspace(-1, 1, self.height)[:, None]
        return BACKDROP * (1 - 0.10 * (x**2 + y**2))[..., None]


@dataclass(frozen=True)
class Hits:
    """What `rasterize` found at each pixel."""

    face: NDArray[np.int32]
    """(H, W), -1 where there is none."""
    weights: NDArray[np.float32]
    """(H, W, 3), barycentric."""
    nearness: NDArray[np.float32]
    """(H, W), inverse depth; 0 where there is nothing."""


def rasterize(screen: Floats, faces: NDArray[np.int64], width: int, height: int) -> Hits:
    """The nearest face at each pixel centre.  Faces of like size are tested together, on squares of 2^k pixels.

    Args:
        screen: (V, 3): column, row and nearness; what is not above zero in nearness is not drawn.
    """
    face_at = np.full(width * height, -1, np.int32)
    weights_at = np.zeros((width * height, 3), np.float32)
    nearest = np.zeros(width * height, np.float32)
    corners = screen[faces]  # (T, 3, 3)
    low = np.floor(corners[..., :2].min(axis=1)).clip(0)
    high = np.ceil(corners[..., :2].max(axis=1)).clip(max=(width, height))
    extent = (high - low).max(axis=1)
    a, b, c = corners[:, 0], corners[:, 1], corners[:, 2]
    twice_area = (b[:, 0] - a[:, 0]) * (c[:, 1] - a[:, 1]) - (b[:, 1] - a[:, 1]) * (c[:, 0] - a[:, 0])
    drawn = ((high - low) > 0).all(axis=1) & (np.abs(twice_area) > 1e-12) & (corners[..., 2] > 0).all(axis=1)
    level = np.ceil(np.log2(np.maximum(extent, 1))).astype(int)
    for k in np.unique(level[drawn]):
        side = 2**k
        offsets = np.stack(np.meshgrid(np.arange(side), np.arange(side), indexing="xy"), axis=-1).reshape(-1, 2) + 0.5
        members = np.flatnonzero(drawn & (level == k))
        step = max(1, SAMPLES_AT_ONCE // side**2)
        for part in (members[n : n + step] for n in range(0, len(members), step)):
            at = (low[part, None] + offsets).astype(np.float32)  # (n, side^2, 2)
            tri, area = corners[part].astype(np.float32)[:, None], twice_area[part, None].astype(np.float32)
            w1 = ((at[..., 0] - tri[..., 0, 0]) * (tri[..., 2, 1] - tri[..., 0, 1])) - (
                (at[..., 1] - tri[..., 0, 1]) * (tri[..., 2, 0] - tri[..., 0, 0])
            )
            w2 = ((at[..., 1] - tri[..., 0, 1]) * (tri[..., 1, 0] - tri[..., 0, 0])) - (
                (at[..., 0] - tri[..., 0, 0]) * (tri[..., 1, 1] - tri[..., 0, 1])
            )
            w1, w2 = w1 / area, w2 / area
            w0 = 1 - w1 - w2
            # A hair's breadth of overlap, or rounding would leave holes between neighbours.
            covered = (np.minimum(np.minimum(w0, w1), w2) >= -1e-4) & (at < (width, height)).all(axis=-1)
            n, m = np.nonzero(covered)
            weights = np.stack([w0[n, m], w1[n, m], w2[n, m]], axis=1)
            near = (weights * tri[n, 0, :, 2]).sum(axis=1)
            x, y = at[n, m].astype(np.int64).T
            pixel = y * width + x
            np.maximum.at(nearest, pixel, near)
            wins = near >= nearest[pixel]
            face_at[pixel[wins]], weights_at[pixel[wins]] = part[n[wins]], weights[wins]
    shape = (height, width)
    return Hits(face_at.reshape(shape), weights_at.reshape(*shape, 3), nearest.reshape(shape))


class _ShadowMap:
    """Which points the key light reaches: the mesh seen from the light, in parallel projection."""

    def __init__(self, points: Floats, faces: NDArray[np.int64], direction: Floats) -> None:
        right = _unit(np.cross([0.0, 1.0, 0.0], direction))
        self.axes = np.stack([right, np.cross(direction, right), direction])
        local = points @ self.axes.T
        self.low, self.high = local.min(axis=0) - 0.02, local.max(axis=0) + 0.02
        self.scale = SHADOW_PIXELS / float((self.high - self.low)[:2].max())
        self.map = rasterize(self._place(points), faces, SHADOW_PIXELS, SHADOW_PIXELS).nearness.reshape(-1)

    def _place(self, points: Floats) -> Floats:
        local = points @ self.axes.T - self.low
        # Nearer to the light is larger, and all of the mesh is above zero.
        return np.concatenate([local[..., :2] * self.scale, local[..., 2:] + 1.0], axis=-1)

    def lit(self, points: Floats, softness_px: float) -> Floats:
        """(P,): the share of the key light that arrives at (P, 3), from 25 samples around each."""
        place = self._place(points)
        share = np.ones(len(points))
        near = ((place[:, :2] > -softness_px) & (place[:, :2] < SHADOW_PIXELS + softness_px)).all(axis=1)
        x, y, depth = place[near].T
        total = np.zeros(len(depth))
        steps = np.linspace(-softness_px, softness_px, 5)
        columns = [np.floor(x + step).astype(np.int64).clip(0, SHADOW_PIXELS - 1) for step in steps]
        for step in steps:
            row = np.floor(y + step).astype(np.int64).clip(0, SHADOW_PIXELS - 1) * SHADOW_PIXELS
            for column in columns:
                # The rim of the map is empty, so what lies outside is lit.
                blocker = self.map[row + column]
                total += (blocker == 0) | (blocker < depth + 0.018)
        share[near] = total / 25
        return share


def _shade(
    albedo: Floats, normals: Floats, places: Floats, towards: Floats, key: Floats, fill: Floats, shadow: _ShadowMap
) -> Floats:
    arrives = shadow.lit(places + 0.006 * normals, 2.5)
    diffuse = np.clip(normals @ key, 0, None) * arrives
    filled = np.clip(0.35 + 0.65 * (normals @ fill), 0, None)
    sky = 0.5 + 0.5 * normals[:, 1]
    light = (
        0.95 * diffuse[:, None] * np.array([1.0, 0.97, 0.92])
        + 0.20 * filled[:, None] * np.array([0.85, 0.92, 1.0])
        + 0.26 * sky[:, None] * np.array([0.90, 0.95, 1.0])
        + 0.07 * (1 - sky)[:, None] * np.array([1.0, 0.95, 0.9])
    )
    half = _unit(key + towards)
    gloss = 0.07 * np.clip((normals * half).sum(axis=1), 0, None) ** 24 * arrives
    edge = 0.10 * (1 - np.clip((normals * towards).sum(axis=1), 0, 1)) ** 3 * sky
    return albedo * light + (gloss + edge)[:, None]


def _paint_ground(
    image: Floats, camera: _Camera, ground_y: float, middle: Floats, span_m: float, shadow: _ShadowMap
) -> None:
    rays = camera.rays()
    below = rays[..., 1] < -1e-6
    reach = (ground_y - camera.eye[1]) / np.where(below, rays[..., 1], -1.0)
    below &= reach > 0
    places = camera.eye + reach[below][:, None] * rays[below]
    away = np.linalg.norm(places[:, [0, 2]] - middle[[0, 2]], axis=1) / span_m
    fade = np.clip(1.6 - away, 0, 1) ** 2  # the floor has no edge: it runs into the wall
    shaded = 1 - 0.50 * (1 - shadow.lit(places, 7.0)) * fade
    contact = 1 - 0.10 * np.exp(-((away / 0.35) ** 2))
    image[below] = image[below] * (shaded * contact)[:, None]


def _turn_y(degrees: float) -> Floats:
    angle = np.radians(degrees)
    return np.array([[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]])


def _unit(vectors: Floats) -> Floats:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
