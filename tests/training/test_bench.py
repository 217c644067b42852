"""The training benchmark runs end to end, at the smallest sizes, and computes its verdicts."""

import dataclasses
import json
from pathlib import Path

import pytest

from service.bench import row, write_report
from training import bench
from training.config import RECIPES, Recipe
from training.data.subject import Subject


@pytest.mark.parametrize(
    ("value", "at_least", "met"), [(2.0, True, True), (0.5, True, False), (2.0, False, False), (0.5, False, True)]
)
def test_a_verdict_is_computed(value: float, at_least: bool, met: bool) -> None:
    assert row("x", value, "s", 1.0, at_least)["met"] is met
    assert row("x", value, "s")["met"] is None


def test_both_forms_are_measured_and_raced(
    tiny_subject: Subject, tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paper = dataclasses.replace(RECIPES["paper"], paper=tiny_recipe.paper, field_spacing_m=0.02)
    monkeypatch.setattr(bench, "RECIPES", {"staged": tiny_recipe, "paper": paper})
    monkeypatch.setattr(bench, "PLAIN", ["paper.frames=2", "paper.points=100"])
    budgets = {"short": ["forward.steps=2"], "long": ["forward.steps=4"]}
    monkeypatch.setattr(bench, "BUDGETS", budgets)
    monkeypatch.setattr(bench, "_plain", lambda subject, run, minutes: (1e6, _untrained(subject, paper)))
    rows = bench._throughput(tiny_subject, steps=1) + bench._race(tiny_subject, tmp_path / "race", 1.0, 1)
    write_report(tmp_path / "train.json", rows)
    found = {entry["name"]: entry for entry in json.loads((tmp_path / "train.json").read_text())["rows"]}
    assert found["points_per_s_ours"]["value"] > found["points_per_s_plain"]["value"] > 0
    assert found["iou_surface_ours_long"]["value"] > 40
    # An untrained plain form is beaten by the shortest of ours, so the ratio is its time over the shortest time.
    shortest = min(found[f"seconds_ours_{name}"]["value"] for name in budgets)
    assert found["speedup_to_same_iou"]["value"] == pytest.approx(1e6 / shortest)
    assert found["speedup_to_same_iou"]["met"] is True


def _untrained(subject: Subject, recipe: Recipe):
    return bench.make_ins(recipe.network, subject.skeleton)
