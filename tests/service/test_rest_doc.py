"""docs/rest.md speaks of all there is, and of nothing else; that its commands run is seen by tests/test_docs.py."""

import re
from pathlib import Path
from typing import Any

import pytest

from service.app import create_app
from service.errors import AvatarServiceError
from service.headers import ANSWER_HEADERS, REQUEST_HEADERS
from service.pose_values import LAYOUTS, SHAPES
from service.reposing import JSON_TYPES, NPZ_TYPES
from service.routes.avatars import ARCHIVES
from service.schemas import ReposeQuery
from service.settings import Settings

TEXT = (Path(__file__).parents[2] / "docs" / "rest.md").read_text()
HIDDEN = {"GET /", "GET /viewer/{name}", "GET /metrics"}
"""Not in the description of the API."""


def rows(section: str) -> list[list[str]]:
    """The cells of all tables of a section, without their heads."""
    part = re.split(r"^#+ ", TEXT.partition(f"# {section}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]
    tables = re.findall(r"^\|[-|]+\|\n((?:\|.*\n)+)", part, re.MULTILINE)
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for table in tables for line in table.splitlines()]


def quoted(text: str) -> set[str]:
    return set(re.findall(r"`([^`]+)`", text))


def test_it_lists_every_endpoint(bundle_dir: Path) -> None:
    paths = create_app(Settings(bundle_dir=bundle_dir)).openapi()["paths"]
    served = {f"{method.upper()} {path}" for path, item in paths.items() for method in item}
    assert {each for row in rows("Endpoints") for each in quoted(row[0])} == served | HIDDEN


def test_it_lists_every_option_body_and_header() -> None:
    options = {row[0].strip("`"): row for row in rows("Query")}
    assert options.keys() == ReposeQuery.model_fields.keys()
    for name, field in ReposeQuery.model_fields.items():
        said = options[name][2].strip("`")
        if field.default is not None:
            assert said == str(field.default).lower(), name
    kinds, rotations = rows("Body")[:3], rows("Body")[3:]
    assert {kind for row in kinds for kind in quoted(row[0])} == {*JSON_TYPES, *NPZ_TYPES}
    assert [row[0].strip("`") for row in rotations] == list(SHAPES)
    for joints in LAYOUTS:
        assert re.search(rf"\b{3 * joints}\b", TEXT), joints
    headers = {each for row in rows("Answer") for each in quoted(row[0])}
    assert headers == {*ANSWER_HEADERS, "X-Request-Id"}
    for parameter in REQUEST_HEADERS:
        assert f"`{parameter['name']}" in TEXT, parameter["name"]
    for kind in set(ARCHIVES) - {"application/x-zip-compressed"}:
        assert f"`{kind}`" in TEXT, kind


def test_it_lists_every_problem_of_a_request(bundle_dir: Path) -> None:
    described = {code for row in rows("Errors") for code in quoted(row[1])} - {"Content-Encoding"}
    statuses = {code: row[0] for row in rows("Errors") for code in quoted(row[1])}
    of_requests = {
        error.code: error.status for error in tree(AvatarServiceError) if "streaming" not in error.__module__
    }
    # The framework's own; no class of ours.
    assert described == of_requests.keys() | {"method-not-allowed"}
    for code, status in of_requests.items():
        assert str(status) in statuses[code], code


def tree(root: type[AvatarServiceError]) -> list[type[AvatarServiceError]]:
    return [root] + [error for child in root.__subclasses__() for error in tree(child)]


def test_it_lists_every_setting_with_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {row[0].strip("`"): row[1] for row in rows("Settings")}
    assert list(table) == [f"REPOSER_{name.upper()}" for name in Settings.model_fields]
    assert all(len(row) == 3 and row[2].endswith(".") for row in rows("Settings"))
    # What the page says is a default is one if it can be set, and changes nothing.
    said: dict[str, Any] = {}
    for name, field in Settings.model_fields.items():
        variable = f"REPOSER_{name.upper()}"
        monkeypatch.delenv(variable, raising=False)
        if table[variable] in ("none", "required"):
            assert field.is_required() == (table[variable] == "required"), name
            assert field.is_required() or field.default is None, name
        else:
            said[name] = table[variable].strip("`")
    plain = Settings(bundle_dir=Path("avatars")).model_dump()
    for name, value in said.items():
        monkeypatch.setenv(f"REPOSER_{name.upper()}", value)
    written = Settings(bundle_dir=Path("avatars")).model_dump()
    # The folder for temporary files is the system's.
    assert (written.pop("jobs_dir").name, "reposer-jobs") == (plain.pop("jobs_dir").name, "reposer-jobs")
    assert written == plain
