"""docs/formats.md speaks of every format; that its commands run is seen by tests/test_docs.py."""

from pathlib import Path

from service import answers
from service.convert.sources import SOURCES

TEXT = (Path(__file__).parents[2] / "docs" / "formats.md").read_text()


def test_it_lists_every_format_and_every_source() -> None:
    for row in answers.TABLE.values():
        assert f"`{row.suffix}`" in TEXT, row.suffix
        assert f"`{row.media_type}`" in TEXT, row.media_type
    for source in ("AMASS", "CAPE", ".smpl", "BVH", ".npy", *SOURCES):
        assert source.lower() in TEXT.lower(), source
