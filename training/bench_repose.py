"""`python -m training.bench_repose`: the benchmark of reposing with plain torch beside it, and the paper's own network.

Writes `out/bench/repose.json` in one run.  The paper's network is untrained: its weights are drawn far from the
identity, which costs what trained ones do.
"""

import argparse
from typing import Any

import numpy as np
import torch

from model.ins import INS
from model.repose import Repose
from service.bench import (
    Form,
    add_arguments,
    measure,
    motion_transforms,
    repose_rows,
    row,
    vertices_of_size,
    write_report,
)
from service.bundle.files import Bundle, read_bundle
from service.engine import OnnxEngine
from training.checkpoint import read_checkpoint
from training.export import errors_mm, repose_onnx, varied_poses
from training.loop import restore

PAPER_SIZES = {"10k": 10_000, "30k": 30_000}
PAPER_POSES = 16
SPREAD = 0.02
"""Standard deviation of what is added to every weight of an untrained network."""


def main() -> None:
    """Measure and write the file."""
    parser = argparse.ArgumentParser(prog="python -m training.bench_repose", description=__doc__)
    add_arguments(parser)
    parser.add_argument("--without-paper", action="store_true", help="leave the paper's network out")
    parsed = parser.parse_args()
    bundle = read_bundle(parsed.bundle)
    tensors, words = read_checkpoint(parsed.bundle / "checkpoint.safetensors")
    ins = restore(tensors, words, bundle.skeleton).ins.eval()
    rows = repose_rows(parsed.bundle, parsed.motion, {"plain_torch": _torch_form(ins)})
    if not parsed.without_paper:
        rows += _paper_rows(bundle, *motion_transforms(bundle, parsed.motion))
    write_report(parsed.out / "repose.json", rows)


def _paper_rows(bundle: Bundle, bones: np.ndarray, roots: np.ndarray) -> list[dict[str, Any]]:
    """Two PINs of 18 coupling layers and an MLP of skinning weights."""
    ins = untrained(bundle.skeleton.parents)
    graph = repose_onnx(ins, bundle.meshes["standard"].vertices)
    engine, reference = OnnxEngine(graph), OnnxEngine(graph, plain=True)
    forms: dict[str, Form] = {
        "fast_onnx": engine.repose, "plain_onnx": reference.repose, "plain_torch": _torch_form(ins)
    }  # fmt: skip
    rows = []
    for size, count in PAPER_SIZES.items():
        seconds = measure(forms, vertices_of_size(bundle, count), bones, roots, (1,))
        rows += [
            row(f"paper_{engine.device}_{size}_batch{batch}_{form}", value, "s/frame")
            for (batch, form), value in seconds.items()
        ]
        ratio = seconds[1, "plain_onnx"] / seconds[1, "fast_onnx"]
        rows.append(row(f"paper_{engine.device}_{size}_fast_over_plain", ratio, "ratio"))
    mesh = {"preview": bundle.meshes["preview"]}
    error = errors_mm(ins, graph, mesh, bundle.skeleton, varied_poses(np.zeros((0, 24, 3)), PAPER_POSES))
    return [*rows, row("paper_fast_max_error_mm", error, "mm", 0.1, at_least=False)]


def untrained(parents: tuple[int, ...], seed: int = 0) -> INS:
    """The paper's network, far from the identity that it starts as."""
    torch.manual_seed(seed)
    ins = INS(parents).eval()
    with torch.no_grad():
        for weight in ins.parameters():
            weight += SPREAD * torch.randn_like(weight)
    return ins


def _torch_form(ins: INS) -> Form:
    repose = Repose(ins).eval()

    def run(*inputs: np.ndarray) -> torch.Tensor:
        with torch.inference_mode():
            return repose(*(torch.from_numpy(value) for value in inputs))

    return run


if __name__ == "__main__":
    main()
