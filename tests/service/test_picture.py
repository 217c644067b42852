"""The picture maker: what is nearer hides what is farther, and a shape covers the pixels it should."""

import io

import numpy as np
from PIL import Image

from service.bundle.glb import Mesh, welded_faces
from service.picture import BACKDROP, contact_sheet, render, texture_of


def sphere(
    radius: float, centre: tuple[float, float, float] = (0, 0, 0), rings: int = 40
) -> tuple[np.ndarray, np.ndarray]:
    theta, phi = np.meshgrid(np.linspace(0, np.pi, rings), np.linspace(0, 2 * np.pi, 2 * rings), indexing="ij")
    points = np.stack([np.sin(theta) * np.sin(phi), np.cos(theta), np.sin(theta) * np.cos(phi)], -1).reshape(-1, 3)
    grid = np.arange(len(points)).reshape(rings, 2 * rings)
    a, b, c, d = (g.ravel() for g in (grid[:-1, :-1], grid[1:, :-1], grid[1:, 1:], grid[:-1, 1:]))
    return radius * points + centre, np.concatenate([np.stack([a, b, c], 1), np.stack([a, c, d], 1)])


def paint(count: int, color: tuple[int, int, int]) -> np.ndarray:
    return np.full((count, 3), color, np.uint8)


def test_a_sphere_covers_its_disc_without_holes() -> None:
    points, faces = sphere(0.5)
    picture = render(points, faces, (200, 200), span_m=2.0, elevation_deg=0, colors=paint(len(points), (255, 0, 0)))
    red = picture[..., 0].astype(int) > picture[..., 2].astype(int) + 20
    y, x = np.mgrid[0:200, 0:200] - 99.5
    distance = np.hypot(x, y)
    assert red[distance < 48].all()  # radius 50 pixels, a little more in perspective
    assert not red[distance > 53].any()


def test_the_nearer_sphere_is_seen_from_each_side() -> None:
    (front, faces), (back, _) = sphere(0.3, (0, 0, 1)), sphere(0.3, (0, 0, -1))
    points = np.concatenate([front, back])
    both = np.concatenate([faces, faces + len(front)])
    colors = np.concatenate([paint(len(front), (255, 0, 0)), paint(len(back), (0, 0, 255))])
    for azimuth, channel in ((0, 0), (180, 2)):
        centre = render(points, both, (60, 60), azimuth_deg=azimuth, elevation_deg=0, colors=colors)[30, 30]
        assert centre.argmax() == channel


def test_the_subject_s_left_is_on_the_right_when_it_looks_at_us() -> None:
    points, faces = sphere(0.2, (0.5, 0, 0))
    picture = render(points, faces, (60, 60), target=(0, 0, 0), span_m=2, azimuth_deg=0, elevation_deg=0)
    changed = np.abs(picture.astype(int) - 255 * BACKDROP ** (1 / 2.2)).sum(axis=-1) > 120
    assert changed[:, 30:].any()
    assert not changed[:, :30].any()


def test_the_floor_takes_a_shadow() -> None:
    points, faces = sphere(0.3, (0, 0.3, 0))
    without, with_floor = (
        render(points, faces, (80, 80), target=(0, 0.2, 0), span_m=2, elevation_deg=20, ground_y=ground).astype(int)
        for ground in (None, 0.0)
    )
    assert (without - with_floor).sum(axis=-1).max() > 150


def test_contact_sheet_places_pictures_row_by_row() -> None:
    pictures = [np.full((4, 6, 3), n, np.uint8) for n in range(5)]
    sheet = contact_sheet(pictures, columns=3)
    assert sheet.shape == (8, 18, 3)
    assert [sheet[0, 0, 0], sheet[0, 12, 0], sheet[4, 6, 0], sheet[4, 12, 0]] == [0, 2, 4, 255]


def test_a_texture_lies_where_its_coordinates_say() -> None:
    """A square that looks at us shows the picture itself, upright."""
    corners = np.array([[-0.5, 0.5, 0], [0.5, 0.5, 0], [0.5, -0.5, 0], [-0.5, -0.5, 0]])
    faces = np.array([[0, 2, 1], [0, 3, 2]])
    uv = np.array([[0, 0], [1, 0], [1, 1], [0, 1]])
    image = np.zeros((2, 2, 3), np.uint8)
    image[0, 0], image[0, 1], image[1, 0] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    view = {"target": (0, 0, 0), "span_m": 1.0, "azimuth_deg": 0, "elevation_deg": 0}
    picture = render(corners, faces, (80, 80), texture=(image, uv[faces]), **view).astype(int)
    for row, column, channel in ((20, 20, 0), (20, 60, 1), (60, 20, 2)):
        assert picture[row, column].argmax() == channel
    assert picture[60, 60].max() < 100


def test_a_seam_of_the_texture_is_not_seen_in_the_light() -> None:
    """Every face a chart of its own: welded, the ball is lit like the whole one."""
    points, faces = sphere(0.5, rings=12)
    corners, apart = points[faces].reshape(-1, 3).astype(np.float32), np.arange(3 * len(faces)).reshape(-1, 3)
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 90, 40)).save(stream, format="JPEG", quality=100)
    uv = np.random.default_rng(0).random((len(corners), 2)).astype(np.float32)
    mesh = Mesh(corners, apart.astype(np.int32), uv=uv, texture=stream.getvalue())
    texture = texture_of(mesh)
    assert texture is not None
    np.testing.assert_array_equal(texture[1].reshape(-1, 2), uv)
    plain = paint(len(points), tuple(texture[0][4, 4]))
    whole = render(points.astype(np.float32), welded_faces(Mesh(points.astype(np.float32), faces.astype(np.int32))),
                   (60, 60), colors=plain)  # fmt: skip
    np.testing.assert_allclose(
        render(mesh.vertices, welded_faces(mesh), (60, 60), texture=texture), whole.astype(int), atol=2
    )
    facets = render(mesh.vertices, mesh.faces, (60, 60), texture=texture)
    assert np.abs(facets.astype(int) - whole).max() > 10


def test_a_shade_comes_out_as_bright_as_its_light() -> None:
    points, faces = sphere(0.5)
    grey, white = (
        render(points, faces, (20, 20), span_m=1, colors=paint(len(points), (value,) * 3))[10, 10].mean()
        for value in (188, 255)
    )
    assert 0.45 < (grey / white) ** 2.2 < 0.6  # 188 is half the light of 255
