"""What `evaluate` leaves behind: the figures as JSON and CSV, their course as a plot, and a sheet of pictures."""

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from model.ins import INS
from service.bundle.glb import Mesh
from service.picture import contact_sheet, png, render
from training.checkpoint import write_file
from training.evaluate import FIGURES, FrameScore, posed_vertices, summary
from training.frames import Frames
from training.metrics import closest

Scores = Mapping[str, list[FrameScore]]
"""The frames' scores through `mesh`, `field` or both."""
Picture = NDArray[np.uint8]
FULL_SCALE_MM = 20.0
"""Where the sheet's colours end; the same on every sheet, so that sheets compare."""
TILE = (250, 300)
AZIMUTH_DEG = 25.0
LINES = {
    "point_to_surface_mm": "model to scan",
    "scan_to_model_mm": "scan to model",
    "correspondence_mm": "correspondence",
}


def write_tables(folder: Path, about: Mapping[str, Any], scores: Scores) -> None:
    """`evaluation.json`: `about`, and for each way its means, sequences and frames; `evaluation.csv`: the frames."""
    report = {
        **about,
        **{way: {**summary(rows), "per_frame": [asdict(row) for row in rows]} for way, rows in scores.items()},
    }
    write_file(folder / "evaluation.json", json.dumps(report, indent=1, allow_nan=False).encode())
    text = io.StringIO()
    table = csv.DictWriter(text, ("through", "sequence", "frame", *FIGURES))
    table.writeheader()
    table.writerows({"through": way, **asdict(row)} for way, rows in scores.items() for row in rows)
    write_file(folder / "evaluation.csv", text.getvalue().encode())


def write_plot(folder: Path, scores: Scores) -> None:
    """`evaluation.png`: distances and IoU over the frames of each sequence."""
    rows = next(iter(scores.values()))
    names = list(dict.fromkeys(row.sequence for row in rows))
    figure = Figure(figsize=(2 + 2.6 * len(names), 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(names), sharex="col", sharey="row", squeeze=False)
    for column, name in enumerate(names):
        distance, iou = axes[:, column]
        for way, all_rows in scores.items():
            chosen = [row for row in all_rows if row.sequence == name]
            frames = [row.frame for row in chosen]
            for key, label in LINES.items():
                values = [getattr(row, key) for row in chosen]
                if None not in values:
                    distance.plot(frames, values, marker=".", label=label)
            iou.plot(frames, [row.iou_surface for row in chosen], marker=".", label=f"surface, {way}")
            iou.plot(frames, [row.iou_bbox for row in chosen], marker=".", label=f"box, {way}")
        distance.set_title(name)
        iou.set_xlabel("frame")
        for axis in (distance, iou):
            axis.grid(alpha=0.3)
            axis.xaxis.get_major_locator().set_params(integer=True)
    # Once all is drawn: a limit set earlier would freeze the other one, for every column.
    axes[0, 0].set_ylim(bottom=0)
    axes[1, 0].set_ylim(top=100)
    for (first, last), what in zip(axes[:, [0, -1]], ("distance, mm", "IoU, %"), strict=True):
        first.set_ylabel(what)
        if last.get_legend_handles_labels()[0]:
            last.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.02, 1))
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110, metadata={"Software": None})
    write_file(folder / "evaluation.png", content.getvalue())


def write_sheet(folder: Path, ins: INS, mesh: Mesh, frames: Frames, scores: list[FrameScore]) -> None:
    """`evaluation-sheet.png`: of each sequence the best, median and worst frame by surface IoU, one sequence a row.

    A frame shows the scan, the prediction, and the prediction in the colours of its distance to the scan.
    """
    places = {name: place for place, name in enumerate(frames.names)}
    tiles: list[Picture] = []
    names = list(dict.fromkeys(score.sequence for score in scores))
    for name in names:
        shown = _best_median_worst([score for score in scores if score.sequence == name])
        for rank, score in shown:
            tiles.append(_frame_tile(ins, mesh, frames, places[score.sequence, score.frame], rank, score))
        tiles += [np.full((TILE[1] + 44, 3 * TILE[0], 3), 255, np.uint8)] * (3 - len(shown))
    sheet = contact_sheet(tiles, columns=3)
    write_file(folder / "evaluation-sheet.png", png(np.concatenate([sheet, _legend(sheet.shape[1])])))


def _best_median_worst(scores: list[FrameScore]) -> list[tuple[str, FrameScore]]:
    order = sorted(scores, key=lambda score: (-score.iou_surface, score.frame))
    ranks: dict[int, list[str]] = {}
    for rank, place in (("best", 0), ("median", len(order) // 2), ("worst", len(order) - 1)):
        ranks.setdefault(place, []).append(rank)
    return [(" = ".join(names), order[place]) for place, names in ranks.items()]


def _frame_tile(ins: INS, mesh: Mesh, frames: Frames, place: int, rank: str, score: FrameScore) -> Picture:
    scan, posed = frames.scan(place), posed_vertices(ins, mesh, frames, place)
    low, high = scan.vertices.min(0), scan.vertices.max(0)
    turn = np.radians(AZIMUTH_DEG)
    across = np.ptp(scan.vertices @ [np.cos(turn), 0, -np.sin(turn)]) * TILE[1] / TILE[0]
    view = {"target": ((low + high) / 2).tolist(), "span_m": 1.15 * float(max(high[1] - low[1], across))}
    distance, _ = closest(scan.vertices, scan.faces, posed)
    error = 1000 * distance
    pictures = [
        render(scan.vertices, scan.faces, TILE, azimuth_deg=AZIMUTH_DEG, **view),
        render(posed, mesh.faces, TILE, azimuth_deg=AZIMUTH_DEG, **view),
        render(posed, mesh.faces, TILE, azimuth_deg=AZIMUTH_DEG, colors=_error_colours(error), **view),
    ]
    figures = f"IoU {score.iou_surface:.1f} / {score.iou_bbox:.1f} %, model to scan {error.mean():.1f} mm"
    strip = Image.new("RGB", (3 * TILE[0], 44), "white")
    drawing = ImageDraw.Draw(strip)
    drawing.text((8, 4), f"{score.sequence} {score.frame}, {rank}: {figures}", "black", ImageFont.load_default(15))
    for column, what in enumerate(("ground truth", "prediction", "error")):
        drawing.text((TILE[0] * (column + 0.5), 26), what, "dimgray", ImageFont.load_default(13), anchor="ma")
    return np.concatenate([np.asarray(strip), np.concatenate(pictures, axis=1)])


def _error_colours(millimetres: NDArray[np.floating]) -> Picture:
    """(N, 3) sRGB"""
    colours = matplotlib.colormaps["turbo"](np.asarray(millimetres) / FULL_SCALE_MM)
    return (255 * np.asarray(colours)[..., :3] + 0.5).astype(np.uint8)


def _legend(width: int) -> Picture:
    bar_width = min(500, width // 2)
    picture = Image.new("RGB", (width, 60), "white")
    bar = _error_colours(np.linspace(0, FULL_SCALE_MM, bar_width))
    left = (width - bar_width) // 2
    picture.paste(Image.fromarray(np.repeat(bar[None], 16, axis=0)), (left, 10))
    drawing = ImageDraw.Draw(picture)
    for part in range(5):
        text = f"{part * FULL_SCALE_MM / 4:g} mm" + (" and more" if part == 4 else "")
        drawing.text((left + bar_width * part / 4, 30), text, "black", ImageFont.load_default(14), anchor="ma")
    drawing.text((left - 12, 10), "distance to the scan", "black", ImageFont.load_default(14), anchor="ra")
    return np.asarray(picture)
