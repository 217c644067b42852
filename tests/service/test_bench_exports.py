"""The benchmark of exports: a few frames in every format, from a real server; what it weighs is that server."""

from pathlib import Path

import numpy as np
import pytest

from service import answers
from service.bench_exports import export_rows


def test_every_format_that_holds_the_motion_has_a_peak_with_its_target(
    bundle_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "MAX_GLB_FRAMES", 8)
    rng = np.random.default_rng(3)
    motion = tmp_path / "motion.npz"
    np.savez(motion, poses=rng.normal(0, 0.3, (5, 72)).astype(np.float32), trans=np.zeros((5, 3), np.float32))
    rows = {entry["name"]: entry for entry in export_rows(bundle_dir / "tiny", motion, 9)}
    suffixes = [form.suffix for form in answers.TABLE.values() if form.media_type != answers.GLB]
    assert list(rows) == [f"export{suffix}_{what}" for suffix in suffixes for what in ("peak", "size", "time")]
    assert {rows[f"export{suffix}_peak"]["target"] for suffix in suffixes} == {500.0}
    for suffix in suffixes:
        assert 50 < rows[f"export{suffix}_peak"]["value"] < 500, "the server, not its launcher"
        assert rows[f"export{suffix}_size"]["value"] > 0
