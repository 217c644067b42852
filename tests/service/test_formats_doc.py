"""docs/formats.md speaks of every format, and its commands are commands."""

import re
import shlex
from pathlib import Path

import pytest

from service import answers
from service.__main__ import _parser
from service.convert.sources import SOURCES

TEXT = (Path(__file__).parents[2] / "docs" / "formats.md").read_text()
COMMANDS = re.findall(r"^reposer .*$", TEXT, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_its_commands_are_understood(command: str) -> None:
    assert callable(_parser().parse_args(shlex.split(command)[1:]).run)


def test_it_lists_every_format_and_every_source() -> None:
    assert COMMANDS
    for row in answers.TABLE.values():
        assert f"`{row.suffix}`" in TEXT, row.suffix
        assert f"`{row.media_type}`" in TEXT, row.media_type
    for source in ("AMASS", "CAPE", ".smpl", "BVH", ".npy", *SOURCES):
        assert source.lower() in TEXT.lower(), source
