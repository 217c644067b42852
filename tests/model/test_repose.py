"""The exported graph: root motion commutes, and ONNX Runtime agrees with torch at sizes it has not seen."""

import io
import warnings

import jaxtyping
import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor

from model.ins import INS
from model.repose import Repose

INPUTS = ("canonical_vertices", "bone_transforms", "root_transforms")


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(31)


@pytest.fixture(scope="module", params=["bone", "joint"])
def repose(request, randomise, parents) -> Repose:
    # Six layers hold every kind of layer on every axis, and export in seconds.
    ins = INS(parents, pose_inputs=request.param, pin_layers=6)
    return Repose(randomise(ins, torch.Generator().manual_seed(37), 0.03)).eval()


@pytest.fixture
def inputs(random_bones, rng):
    def draw(n_frames: int, n_vertices: int) -> tuple[Tensor, Tensor, Tensor]:
        vertices = 0.5 * torch.randn(n_vertices, 3, generator=rng)
        root = random_bones(rng, n_frames, angle=1.0)[:, 5].float()
        return vertices, random_bones(rng, n_frames).float(), root

    return draw


def test_root_motion_commutes_with_reposing(repose, inputs) -> None:
    vertices, bones, root = inputs(3, 20)
    still = repose(vertices, bones, torch.eye(4).repeat(3, 1, 1))
    expected = (root[:, None, :3, :3] @ still[..., None])[..., 0] + root[:, None, :3, 3]
    torch.testing.assert_close(repose(vertices, bones, root), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(still, repose.ins.to_deformed(vertices, bones), rtol=0, atol=1e-7)


@pytest.fixture(scope="module")
def session(repose, random_bones):
    rng = torch.Generator().manual_seed(41)
    example = (torch.randn(7, 3), random_bones(rng, 3).float(), random_bones(rng, 3)[:, 5].float())
    frames = torch.export.Dim("frames")
    shapes = {INPUTS[0]: {0: torch.export.Dim("vertices")}, INPUTS[1]: {0: frames}, INPUTS[2]: {0: frames}}
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as monkeypatch:
        # torch 2.13 copies its own deprecated tree specs, and names the shared frame axis once for both inputs.
        warnings.filterwarnings("ignore", "`isinstance", FutureWarning)
        warnings.filterwarnings("ignore", "# The axis name: frames will not be used", UserWarning)
        # Where the shapes are checked at run time, the checks would bind the frame axis to the example's.
        monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
        program = torch.onnx.export(
            repose, example, dynamo=True, dynamic_shapes=shapes, input_names=INPUTS, output_names=["vertices"],
            opset_version=18, external_data=False, verbose=False,
        )  # fmt: skip
    graph = io.BytesIO()
    program.save(graph)
    return onnxruntime.InferenceSession(graph.getvalue(), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(("n_frames", "n_vertices"), [(1, 1), (1, 40), (2, 50), (5, 777)])  # not seen at export
def test_onnx_agrees_with_torch(repose, session, inputs, n_frames: int, n_vertices: int) -> None:
    tensors = inputs(n_frames, n_vertices)
    (vertices,) = session.run(["vertices"], {name: x.numpy() for name, x in zip(INPUTS, tensors, strict=True)})
    expected = repose(*tensors).detach().numpy()
    assert vertices.shape == (n_frames, n_vertices, 3)
    np.testing.assert_allclose(vertices, expected, rtol=0, atol=1e-5)  # 10 micrometres
