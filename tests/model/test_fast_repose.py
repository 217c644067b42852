"""The fast form is the plain one: for every kind of network, far from the identity, in float64 and in float32."""

import copy

import pytest
import torch
from torch import Tensor

from model.fast_repose import CURVE_NODES, FastRepose
from model.field_pin import STEEPEST, FieldPIN
from model.ins import INS, Grids
from model.repose import Repose
from model.skinning import NearSkinningField, VoxelSkinningField

BOX = Grids(torch.tensor([-0.6, -0.7, -0.5]), torch.tensor([0.6, 0.7, 0.5]), field_spacing=0.1, skinning_spacing=0.1)
OTHER_BOX = Grids(BOX.low, BOX.high, field_spacing=0.1, skinning_spacing=0.07)


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(51)


@pytest.fixture(params=["field", "field, two grids", "field, own weights", "linear", "coupling"])
def ins(request, randomise, parents) -> INS:
    rng = torch.Generator().manual_seed(53)
    if request.param == "coupling":
        return randomise(INS(parents, pin_layers=6), rng, 0.03).eval()
    kind = "linear" if request.param == "linear" else "field"
    box = OTHER_BOX if "two" in request.param else BOX
    made = INS(parents, correctives=kind, code_width=5, use_h_d=False, skinning="voxel", grids=box,
               skinning_at="canonical" if "own" in request.param else "moved")  # fmt: skip
    pin, skinning = made.h_c, made.skinning_field
    assert isinstance(pin, FieldPIN)
    assert isinstance(skinning, VoxelSkinningField)
    pin.cover(0.25 * torch.randn(300, 3, generator=rng), 0.1)
    with torch.no_grad():
        made.pose_encoder.basis.copy_(0.3 * torch.randn(made.pose_encoder.basis.shape, generator=rng))
        pin.coefficients.copy_(0.03 * torch.randn(pin.coefficients.shape, generator=rng))
        skinning.grid.copy_(4 * torch.randn(skinning.grid.shape, generator=rng))
    return made.eval()


def both(ins: INS, *inputs: Tensor, near: NearSkinningField | None = None) -> tuple[Tensor, Tensor]:
    """Of the fast form, and of the plain one in float64."""
    with torch.no_grad():
        wide = [tensor.double() for tensor in inputs]
        return FastRepose(ins, near)(*inputs), Repose(copy.deepcopy(ins).double())(*wide)


def drawn(random_bones, rng: torch.Generator, n_frames: int, n_vertices: int) -> tuple[Tensor, Tensor, Tensor]:
    """Vertices within and outside of the box, turned bones and roots."""
    root = random_bones(rng, n_frames, angle=1.0)[:, 5].float()
    return 0.3 * torch.randn(n_vertices, 3, generator=rng), random_bones(rng, n_frames, 0.4).float(), root


@pytest.mark.parametrize(("n_frames", "n_vertices"), [(1, 1), (1, 300), (4, 50)])
def test_agrees_with_the_plain_form(ins, random_bones, rng, n_frames: int, n_vertices: int) -> None:
    fast, plain = both(ins, *drawn(random_bones, rng, n_frames, n_vertices))
    torch.testing.assert_close(fast.double(), plain, rtol=0, atol=2e-5)  # float32; a hundredth of a millimetre


def test_the_correctives_of_these_tests_move_much_and_are_limited(ins, random_bones, rng) -> None:
    """Else the law above would prove little."""
    vertices, bones, _ = drawn(random_bones, rng, 4, 300)
    with torch.no_grad():
        q_c, _, _ = ins.trace(vertices, bones)
        assert (q_c - vertices).norm(dim=-1).mean() > 0.01
        if type(ins.h_c) is FieldPIN:
            code = ins.pose_encoder(bones)
            raw = torch.nn.functional.pad(torch.einsum("bk,cak->bca", code, ins.h_c.coefficients), (0, 1))
            assert (ins.h_c.limiter(raw[:, 1], 1) < STEEPEST).any()


def test_frames_do_not_see_each_other(ins, random_bones, rng) -> None:
    vertices, bones, root = drawn(random_bones, rng, 3, 60)
    fast, order = FastRepose(ins), torch.tensor([2, 0, 1])
    with torch.no_grad():
        together, turned = fast(vertices, bones, root), fast(vertices, bones[order], root[order])
        alone = fast(vertices, bones[1:2], root[1:2])
    torch.testing.assert_close(turned, together[order], rtol=0, atol=5e-6)
    torch.testing.assert_close(alone, together[1:2], rtol=0, atol=5e-6)


def test_the_canonical_pose_is_the_canonical_mesh(parents, rng) -> None:
    """A PIN is one rigid motion there; fresh layers are none at all."""
    vertices, still = 0.3 * torch.randn(80, 3, generator=rng), torch.eye(4)
    for kind in ("coupling", "field"):
        ins = INS(parents, correctives=kind, code_width=5 if kind == "field" else 120, skinning="voxel", grids=BOX,
                  use_h_d=kind == "coupling", pin_layers=6)  # fmt: skip
        with torch.no_grad():
            posed = FastRepose(ins)(vertices, still.repeat(2, 24, 1, 1), still.repeat(2, 1, 1))
        torch.testing.assert_close(posed, vertices.expand(2, -1, -1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("ins", ["field", "field, two grids"], indirect=True)
def test_the_near_part_of_a_skinning_field_is_all_it_needs(ins, random_bones, rng) -> None:
    pin = ins.h_c
    near = NearSkinningField(ins.skinning_field, pin.node_positions(), pin.spacing)
    _, bones, root = drawn(random_bones, rng, 3, 1)
    inner = pin.node_positions()[::3] + 0.08 * (torch.rand(len(pin.active[::3]), 3, generator=rng) - 0.5)
    fast, plain = both(ins, inner, bones, root, near=near)
    torch.testing.assert_close(fast.double(), plain, rtol=0, atol=2e-5)
    first = ins.skinning_field._cells(pin.node_positions() - pin.spacing)[0].min()
    assert FastRepose(ins, near).weights.needed[0] == first  # the slot that all other nodes share


@pytest.mark.parametrize("ins", ["field, own weights"], indirect=True)
def test_weights_that_are_given_are_the_fields_own(ins, random_bones, rng) -> None:
    vertices, bones, root = drawn(random_bones, rng, 3, 70)
    with torch.no_grad():
        weights = ins.skinning_field(vertices)
        given = FastRepose(ins)(vertices, bones, root, weights)
        # And they are what counts: other ones lead elsewhere.
        other = FastRepose(ins)(vertices, bones, root, weights.flip(-1))
    torch.testing.assert_close(given.double(), both(ins, vertices, bones, root)[1], rtol=0, atol=2e-5)
    assert (other - given).norm(dim=-1).mean() > 0.05


def test_a_flat_set_of_points_has_curves_too(randomise, parents, random_bones, rng) -> None:
    ins = randomise(INS(parents, pin_layers=6), rng, 0.03).eval()
    vertices, bones, root = drawn(random_bones, rng, 2, CURVE_NODES // 8)
    vertices[:, 1] = 0.25
    fast, plain = both(ins, vertices, bones, root)
    torch.testing.assert_close(fast.double(), plain, rtol=0, atol=2e-5)
