"""The distribution itself: one owner of the three package names, and pins for everything it asks for."""

import re
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_three_package_names_are_ours_alone() -> None:
    owners = packages_distributions()
    for name in ("service", "model", "training"):
        assert set(owners[name]) == {"reposer"}


def test_everything_asked_for_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(item for extra in project["optional-dependencies"].values() for item in extra),
    ]
    # Extras may be made of extras of our own.
    names = {re.split(r"[<>=!~\[; ]", item, maxsplit=1)[0].lower() for item in wanted} - {"reposer"}
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {line.partition("==")[0].lower() for line in lines if "==" in line}
    assert names <= pins, f"not in constraints.txt: {sorted(names - pins)}"
