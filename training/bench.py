"""`make bench`: what training costs and reaches, written to `out/bench/train.json`.

The paper's plain form (root finding in every step, MLP weights, nine starts) and ours train on the same scans in the
same run, on the same cores.  The plain form is favoured: small batches and a short warm-up, since with the paper's
own (60 000 points, 2 400 steps) it would see a handful of steps.
"""

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model.ins import INS
from service.bench import row, write_report
from service.bundle.glb import Mesh
from training.checkpoint import read_checkpoint
from training.config import RECIPES, Recipe
from training.data.subject import Subject
from training.evaluate import Through, evaluate, score_frame, summary
from training.export import canonical_meshes, rounded
from training.frames import Frames
from training.loop import CHECKPOINT, make_ins, restore, train
from training.stages import State, make_stage

PLAIN = ["paper.frames=4", "paper.points=1000", "paper.warm_up_steps=100", "paper.surface_points_per_frame=20000",
         "paper.box_points_per_frame=20000", "checkpoint_every_s=30"]  # fmt: skip
BUDGETS = {
    "coarse": ["forward.steps=30", "field_spacing_m=0.015", "vote.max_frames=20"],
    "100_steps": ["forward.steps=100"],
    "300_steps": ["forward.steps=300"],
}
"""In the race, from little to more; each is a whole training with its own schedule."""
LEVELS = (55, 60, 65, 70)
TARGETS = {
    "clothed": {"iou_surface": 75.0, "iou_bbox": 93.0, "point_to_surface_mm": 5.0},
    "body": {"iou_surface": 90.0, "iou_bbox": 97.0, "point_to_surface_mm": None},
    "capture": {"iou_surface": 72.0, "iou_bbox": None, "point_to_surface_mm": None},
}


def main() -> None:
    """Race the two forms, train both subjects to the end, write the file."""
    parser = argparse.ArgumentParser(prog="python -m training.bench", description=__doc__)
    parser.add_argument("--clothed", type=Path, default=Path("subjects/open"))
    parser.add_argument("--body", type=Path, default=Path("subjects/body"))
    parser.add_argument(
        "--capture", type=Path, default=Path("subjects/crane"), help="a real capture, where there is one"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--out", type=Path, default=Path("out/bench"))
    parser.add_argument("--plain-minutes", type=float, default=60.0, help="how long the plain form may train")
    parser.add_argument("--race-frames", type=int, default=6, help="held-out frames that the race looks at")
    parsed = parser.parse_args()
    subjects = {"clothed": _made(parsed.clothed, "tunic"), "body": _made(parsed.body, "none")}
    rows = _throughput(subjects["clothed"])
    rows += _race(subjects["clothed"], parsed.runs / "race", parsed.plain_minutes, parsed.race_frames)
    for name, subject in subjects.items():
        rows += _to_the_end(name, subject, parsed.runs / subject.path.name, RECIPES["staged"])
    if parsed.capture.exists():
        rows += _to_the_end("capture", Subject.open(parsed.capture), parsed.runs / "capture", RECIPES["capture"])
    else:
        rows.append(row("iou_surface_capture", None, "%", TARGETS["capture"]["iou_surface"]))
    write_report(parsed.out / "train.json", rows)


def _made(path: Path, garment: str) -> Subject:
    if not path.exists():
        command = [sys.executable, "-m", "training", "demo-data", str(path), "--garment", garment]
        subprocess.run(command, check=True)
    return Subject.open(path)


def _throughput(subject: Subject, steps: int = 4) -> list[dict[str, Any]]:
    """Points that one second of steps sees, forward, backward and update."""
    frames, rows = Frames(subject, "train"), []
    plain = RECIPES["paper"].with_settings(
        [*PLAIN, "paper.surface_points_per_frame=2000", "paper.box_points_per_frame=500"]
    )
    for name, recipe, stages in (
        ("plain", plain, ("paper",)),
        ("ours", RECIPES["staged"], ("weights", "vote", "forward")),
    ):
        torch.manual_seed(recipe.seed)
        state = State(make_ins(recipe.network, subject.skeleton))
        for before in stages[:-1]:
            make_stage(before, state, frames, recipe).finish()
        stage = make_stage(stages[-1], state, frames, recipe)
        stage.begin()
        groups = stage.parameter_groups()
        optimizer, times = torch.optim.Adam(groups), []
        # The plain form's first epoch has two losses more; what follows is timed.
        first = len(frames) // recipe.paper.frames if name == "plain" else 0
        for step in range(first, first + steps + 1):
            started = time.perf_counter()
            loss = torch.stack(list(stage.loss(step, torch.Generator().manual_seed(step)).values())).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            times.append(time.perf_counter() - started)
        settings = recipe.paper if name == "plain" else recipe.forward
        second = float(np.median(times[1:]))
        rows.append(row(f"seconds_an_iteration_{name}", second, "s"))
        rows.append(row(f"points_per_s_{name}", settings.frames * settings.points / second, "points/s"))
    return rows


def _race(subject: Subject, folder: Path, plain_minutes: float, frame_count: int) -> list[dict[str, Any]]:
    """How long each takes to the same held-out surface IoU, from scans and poses alone."""
    shutil.rmtree(folder, ignore_errors=True)
    reached: list[tuple[float, float]] = []
    for name, settings in BUDGETS.items():
        # As a newcomer starts: without the distance fields that an earlier run left behind.
        shutil.rmtree(subject.path / "cache", ignore_errors=True)
        recipe = RECIPES["staged"].with_settings(["stages=weights,vote,forward", *settings])
        state = train(subject, folder / f"ours-{name}", recipe)
        _, words = read_checkpoint(folder / f"ours-{name}" / CHECKPOINT)
        mesh = canonical_meshes(state, subject.skeleton)["standard"]
        reached.append((words["seconds"], _iou(state.ins, mesh, subject, frame_count, "mesh")))
    plain_seconds, plain = _plain(subject, folder / "plain", plain_minutes)
    plain_iou = _iou(plain, mesh, subject, frame_count, "field")  # it has no mesh; that of ours is not looked at
    rows = [row(f"iou_surface_ours_{name}", iou, "%") for name, (_, iou) in zip(BUDGETS, reached, strict=True)]
    rows += [row(f"seconds_ours_{name}", seconds, "s") for name, (seconds, _) in zip(BUDGETS, reached, strict=True)]
    for level in LEVELS:
        enough = [seconds for seconds, iou in reached if iou >= level]
        if enough:
            rows.append(row(f"seconds_ours_to_iou_{level}", min(enough), "s"))
    rows += [row("seconds_plain", plain_seconds, "s"), row("iou_surface_plain", plain_iou, "%")]
    enough = [seconds for seconds, iou in reached if iou >= plain_iou]
    rows.append(row("speedup_to_same_iou", plain_seconds / min(enough) if enough else 0.0, "ratio", 10.0))
    return rows


def _plain(subject: Subject, run: Path, minutes: float) -> tuple[float, INS]:
    """Train the plain form in a process of its own, end it after its time; its last checkpoint and how old that was."""
    command = [sys.executable, "-m", "training", "train", str(subject.path), "--run", str(run), "--recipe", "paper"]
    with subprocess.Popen([*command, *(part for setting in PLAIN for part in ("--set", setting))]) as process:
        try:
            process.wait(60 * minutes)
        except subprocess.TimeoutExpired:
            process.kill()
    tensors, words = read_checkpoint(run / CHECKPOINT)
    return words["seconds"], restore(tensors, words, subject.skeleton).ins


def _to_the_end(name: str, subject: Subject, run: Path, recipe: Recipe) -> list[dict[str, Any]]:
    """The whole recipe, or what was trained by it before, scored as exported."""
    state = train(subject, run, recipe)
    _, words = read_checkpoint(run / CHECKPOINT)
    frames = Frames(subject, "test")
    scores = summary(evaluate(rounded(state.ins), canonical_meshes(state, subject.skeleton)["high"], frames))
    rows = [row(f"training_seconds_{name}", words["seconds"], "s", 3600.0, at_least=False)]
    for key, target in TARGETS[name].items():
        unit = "mm" if key.endswith("_mm") else "%"
        rows.append(row(f"{key}_{name}", scores[key], unit, target, at_least=unit == "%"))
    return rows


def _iou(ins: INS, mesh: Mesh, subject: Subject, count: int, through: Through) -> float:
    """Mean surface IoU, percent, on some of the held-out frames."""
    frames = Frames(subject, "test")
    numbers = np.linspace(0, len(frames) - 1, count).astype(int).tolist()
    with torch.no_grad():
        return float(np.mean([score_frame(ins, mesh, frames, n, through).iou_surface for n in numbers]))


if __name__ == "__main__":
    main()
