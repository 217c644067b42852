"""The pages of the documentation lead to each other, and say the bundled avatar's own numbers."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text())
    for target in re.findall(r"\]\(([^)#\s]*(?:#[^)\s]*)?)\)", text):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        other = (page.parent / name).resolve() if name else page
        assert other.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", FENCE.sub("", other.read_text()), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}, target


def test_the_index_has_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    for page in PAGES:
        assert page.name == "README.md" or f"({page.name})" in index, page.name


def test_results_are_those_of_the_bundled_avatar() -> None:
    manifest = json.loads((ROOT / "avatars" / "open" / "avatar.json").read_text())
    metrics, text = manifest["metrics"], (ROOT / "docs" / "results.md").read_text()
    for lod, level in manifest["levels_of_detail"].items():
        surface, box, distance = (
            metrics[f"{lod}_{name}"] for name in ("iou_surface", "iou_bbox", "point_to_surface_mm")
        )
        assert f"`{lod}` | {surface:.1f} % | {box:.1f} % | {distance:.1f} mm |" in text
        vertices = level["vertices"]
        counts = f"{vertices:,} | {level['faces']:,}".replace(",", " ")
        sizes = f"{(12 * vertices + 48) / 1000:.0f} KB | {(6 * vertices + 48) / 1000:.0f} KB"
        assert f"| `{lod}` | {counts} | {sizes} |" in text
    assert f"{metrics['training_seconds'] / 60:.0f} minutes" in text
    for name in ("onnx_parity_mm", "fast_max_error_mm"):
        bound = re.search(rf"below ([\d.]+) mm \|.*`{name}`", text)
        assert bound, name
        assert metrics[name] < float(bound[1])
