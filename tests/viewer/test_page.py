"""What the page does: each test goes on where the one before left it."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Download, Page, expect

from service.bundle.glb import read_mesh
from service.formats.morph import read_animated_glb
from tests.viewer.conftest import ROOT, Service, until

Shoot = Callable[[str], None]
pytestmark = pytest.mark.timeout(600)


def picture(page: Page) -> np.ndarray:
    """The stage as it is drawn, (H, W, 3), once it has stood still for a while: a frame may be on its way."""
    last, same = None, 0
    for _ in range(80):
        shot = np.asarray(Image.open(io.BytesIO(page.screenshot(clip=stage_box(page)))).convert("RGB"), np.int16)
        same = same + 1 if last is not None and np.array_equal(shot, last) else 0
        if same == 6:
            return shot
        last = shot
        page.wait_for_timeout(200)
    raise AssertionError("the picture never stands still")


def stage_box(page: Page) -> dict[str, float]:
    """The middle of the stage, where the avatar is and no card."""
    box = page.locator("#view").bounding_box()
    assert box is not None
    return {"x": box["x"] + 8, "y": box["y"] + 124, "width": box["width"] - 16, "height": box["height"] - 124 - 80}


def changed(before: np.ndarray, after: np.ndarray) -> float:
    """Share of the pixels that differ visibly."""
    return float((np.abs(before - after).max(axis=-1) > 12).mean())


def set_value(page: Page, selector: str, value: int) -> None:
    """Move a slider as a hand would."""
    page.locator(selector).evaluate(
        "(slider, value) => { slider.value = value; slider.dispatchEvent(new Event('input', {bubbles: true})) }", value
    )


def test_loads_and_shows_the_avatar(page: Page, shoot: Shoot) -> None:
    shoot("loads")
    expect(page.locator("#avatar")).to_have_value("open")
    assert changed(picture(page), picture(page)) == 0.0
    middle = picture(page).reshape(-1, 3)
    assert len(np.unique(middle // 16, axis=0)) > 30, "only a background is to be seen"
    expect(page.locator("#notice")).to_be_hidden()


def test_plays_the_sample_motion(page: Page, shoot: Shoot) -> None:
    before = picture(page)
    page.keyboard.press("Space")
    expect(page.locator("#play")).to_have_attribute("aria-label", "Pause")
    until(page, "Number(document.getElementById('time').value) > 20")
    until(page, "Number(document.getElementById('rate').textContent) > 0")
    assert page.locator("#delay").inner_text().endswith("ms")
    shoot("plays")
    page.keyboard.press("Space")
    assert changed(before, picture(page)) > 0.01


def test_slider_poses_live(page: Page, shoot: Shoot) -> None:
    page.locator("summary", has_text="Left arm").click()
    before = picture(page)
    set_value(page, "input[name='left_shoulder.z']", 60)
    page.wait_for_timeout(500)
    after = picture(page)
    shoot("slider")
    assert changed(before, after) > 0.005
    set_value(page, "input[name='left_shoulder.z']", 60)
    assert changed(after, picture(page)) == 0.0, "the same pose is the same picture"
    page.locator("summary", has_text="Left arm").click()


@pytest.mark.parametrize("view", ["shaded", "wireframe", "weights", "displacement"])
def test_views_differ(page: Page, shoot: Shoot, view: str) -> None:
    page.locator("#view-texture").check(force=True)
    before = picture(page)
    page.locator(f"#view-{view}").check(force=True)
    assert changed(before, picture(page)) > 0.01
    expect(page.locator("#legend")).to_be_visible(visible=view == "displacement")
    shoot(view)


def test_plain_skinning_stands_beside(page: Page, shoot: Shoot) -> None:
    page.locator("#view-shaded").check(force=True)
    page.locator("#compare").check()
    expect(page.get_by_text("Plain skinning", exact=True)).to_be_visible()
    both = picture(page)
    shoot("compare")
    half = both.shape[1] // 2
    left, right = both[:, :half], both[:, half : 2 * half]
    background = both[2, 2]
    assert all((np.abs(side - background).max(axis=-1) > 40).mean() > 0.02 for side in (left, right))
    assert changed(left, right) > 0.001, "the networks add something"
    page.locator("#compare").uncheck()


def test_dropped_file_is_played(page: Page, shoot: Shoot, tmp_path: Path) -> None:
    poses = np.zeros((12, 72))
    poses[:, 50] = np.linspace(0, 1.5, 12)
    text = json.dumps({"poses": poses.tolist(), "fps": 12})
    data = page.evaluate_handle(
        "text => { const data = new DataTransfer(); data.items.add(new File([text], 'raise.json')); return data }", text
    )
    page.dispatch_event("#view", "dragover", {"dataTransfer": data})
    expect(page.locator("#drop")).to_be_visible()
    page.dispatch_event("#view", "drop", {"dataTransfer": data})
    expect(page.locator("#drop")).to_be_hidden()
    expect(page.locator("#applied")).to_have_text("raise.json: 12 frames, 12 a second, y up, m")
    expect(page.locator("#time")).to_have_attribute("max", "11")
    page.keyboard.press("Space")
    shoot("dropped")


def test_file_that_is_no_motion_is_explained(page: Page, shoot: Shoot) -> None:
    file = {"name": "broken.npz", "mimeType": "application/octet-stream", "buffer": b"no archive"}
    page.locator("#file").set_input_files(file)
    expect(page.locator("#toast.bad")).to_have_class("card shown bad")
    assert page.locator("#toast").inner_text()
    expect(page.locator("#applied")).to_contain_text("raise.json")
    shoot("refused")


def test_records_what_was_seen(page: Page, shoot: Shoot, tmp_path: Path) -> None:
    downloads: list[Download] = []
    page.on("download", lambda download: downloads.append(download))
    page.locator("#record").click()
    recorded = "parseFloat(document.querySelector('#record span').textContent)"
    until(page, f"{recorded} > 0.1")
    set_value(page, "input[name='right_elbow.y']", 80)
    page.evaluate(f"window.before = {recorded}")
    until(page, f"!({recorded} <= window.before + 0.2)")
    shoot("recording")
    # On a slow machine it is full by now, and has stopped by itself.
    page.evaluate("document.querySelector('#record[aria-pressed=true]')?.click()")
    while not downloads:
        page.wait_for_timeout(100)
    file = tmp_path / "recorded.glb"
    downloads[0].save_as(file)
    assert downloads[0].suggested_filename == "open.glb"
    mesh, vertices, times = read_animated_glb(file.read_bytes())
    assert len(mesh.vertices) == len(read_mesh((ROOT / "avatars/open/mesh.preview.glb").read_bytes()).vertices)
    assert len(times) > 5
    assert np.abs(vertices[-1] - vertices[0]).max() > 0.1, "the elbow moved"


def test_service_that_goes_away_and_comes_back(page: Page, shoot: Shoot, service: Service) -> None:
    service.kill()
    notice = page.locator("#notice")
    expect(notice).to_contain_text("The service has gone away.")
    expect(page.locator("#connection")).to_have_text("No connection")
    expect(page.locator("#retry")).to_be_visible()
    shoot("gone")
    service.start()
    expect(page.locator("#connection")).to_have_attribute("data-state", "open")
    expect(notice).to_be_hidden()
    before = picture(page)
    set_value(page, "input[name='left_hip.x']", -70)
    page.wait_for_timeout(500)
    picture(page)
    shoot("back")
    assert changed(before, picture(page)) > 0.005, "it poses again"


def test_arrow_keys_turn_the_view(page: Page) -> None:
    before = picture(page)
    page.locator("#view").focus()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    turned = picture(page)
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert changed(before, turned) > 0.005
    assert changed(before, picture(page)) < 0.002


def test_every_control_can_be_reached_by_keyboard(page: Page) -> None:
    page.locator("#avatar").focus()
    reached = set()
    for _ in range(40):
        reached.add(page.evaluate("document.activeElement.id"))
        page.keyboard.press("Tab")
    controls = "avatar lod panel-toggle view sample up open view-shaded compare rest play time speed record"
    assert set(controls.split()) <= reached


def test_dark_and_phone(page: Page, shoot: Shoot) -> None:
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.emulate_media(color_scheme="dark", reduced_motion="reduce")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != light
    shoot("dark")
    page.set_viewport_size({"width": 390, "height": 760})
    picture(page)
    shoot("phone")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390, "nothing is cut off at the side"
    for control in ("#play", "#record", "#panel-toggle", "#sample"):
        box = page.locator(control).bounding_box()
        assert box is not None
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 390
        assert box["height"] >= 40, f"{control} is large enough for a thumb"


def test_page_complained_of_nothing(complaints: list[str]) -> None:
    assert complaints == []
