"""Laws of the whole pipeline: identity when untrained, to_deformed undoes to_canonical, gradients reach everything."""

import pytest
import torch
from torch import Tensor, nn

from model.ins import INS, OUTSIDE_LOGIT, CarriedWeights, Grids
from model.skinning import linear_blend_skinning


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(23)


@pytest.fixture(scope="module")
def ins(randomise, parents) -> INS:
    torch.manual_seed(29)
    network = INS(parents).double()
    rng = torch.Generator().manual_seed(29)
    for part, scale in (("pose_encoder", 0.1), ("h_d", 0.02), ("skinning_field", 0.02), ("h_c", 0.02)):
        randomise(getattr(network, part), rng, scale)
    return randomise(network, rng, 1e-3)


def points(rng: torch.Generator, *shape: int) -> Tensor:
    return 0.5 * torch.randn(*shape, 3, generator=rng, dtype=torch.float64)


def test_parameter_counts_are_those_of_table_4(parents) -> None:
    counts = INS(parents).parameter_counts()
    paper = {"ins": 1.80e6, "pin": 0.41e6, "occupancy": 0.46e6, "skinning_field": 53e3, "pose_encoder": 0.46e6}
    assert counts == {name: pytest.approx(count, rel=0.1) for name, count in paper.items()}
    assert counts["ins"] == sum(counts.values()) - counts["ins"] + counts["pin"]


@pytest.mark.parametrize("pose_inputs", ["bone", "joint"])
def test_untrained_in_the_canonical_pose_it_returns_its_input(parents, rng, pose_inputs) -> None:
    network, x = INS(parents, pose_inputs=pose_inputs).double(), points(rng, 2, 30)
    canonical = torch.eye(4, dtype=torch.float64).repeat(2, 24, 1, 1)
    assert torch.equal(network.pose_encoder(canonical), torch.zeros(2, 120, dtype=torch.float64))
    torch.testing.assert_close(network.to_deformed(x, canonical), x, rtol=0, atol=1e-12)
    candidates, valid = network.to_canonical(x, canonical)
    assert valid[:, :, 0].all()
    assert not valid[:, :, 1:].any()  # nine starts, one root
    torch.testing.assert_close(candidates[:, :, 0], x, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "search_m", "tolerance_m"), [(torch.float64, 1e-12, 1e-9), (torch.float32, 2e-6, 1e-5)]
)
def test_to_deformed_undoes_to_canonical(ins, random_bones, parents, rng, dtype, search_m, tolerance_m) -> None:
    network = INS(parents).to(dtype)
    network.load_state_dict(ins.state_dict())
    bones = random_bones(rng, 2).to(dtype)
    x_d = network.to_deformed(points(rng, 2, 50).to(dtype), bones).detach()
    candidates, valid = network.to_canonical(x_d, bones, max_steps=50, tolerance=search_m)
    assert valid.any(-1).float().mean() > 0.95
    assert (candidates[valid] - x_d[:, :, None].expand_as(candidates)[valid]).norm(dim=-1).mean() > 0.1
    back = network.to_deformed(candidates.flatten(1, 2), bones).view(candidates.shape)
    expected = x_d[:, :, None].expand_as(back)
    torch.testing.assert_close(back[valid], expected[valid], rtol=0, atol=tolerance_m)


@pytest.fixture
def own_weights(randomise, parents) -> INS:
    """An INS whose weights are read in the canonical frame, far from the identity."""
    torch.manual_seed(31)
    rng = torch.Generator().manual_seed(31)
    low, high = torch.tensor([-1.5, -1.5, -1.5]), torch.tensor([1.5, 1.5, 1.5])
    made = INS(parents, correctives="field", code_width=12, skinning="voxel", use_h_d=False,
               grids=Grids(low, high, 0.12, 0.2), skinning_at="canonical")  # fmt: skip
    made.h_c.cover(torch.rand(2000, 3, generator=rng) * 2 - 1, 0.1)
    for part, scale in (("h_c", 0.05), ("skinning_field", 1.0)):
        randomise(getattr(made, part), rng, scale)
    made.pose_encoder.basis.copy_(torch.randn(made.pose_encoder.basis.shape, generator=rng) / 10)
    return made.double()


def test_weights_of_the_canonical_frame_are_the_points_own(own_weights, random_bones, rng) -> None:
    """The same in every pose, so that reposing is linear in the bones' translations."""
    x_c, bones = points(rng, 30), random_bones(rng, 2)
    q_c, q_d, _ = own_weights.trace(x_c, bones)
    assert (q_c - x_c).norm(dim=-1).mean() > 0.02
    weights = own_weights.skinning_field(x_c).expand(2, -1, -1)
    torch.testing.assert_close(q_d, linear_blend_skinning(q_c, weights, bones), rtol=0, atol=1e-12)
    moved = bones.clone()
    moved[:, 5, :3, 3] += 1.0
    torch.testing.assert_close(own_weights.to_deformed(x_c, moved) - q_d, weights[..., 5:6].expand(-1, -1, 3))


def test_points_with_weights_of_their_own_are_found_again(own_weights, random_bones, rng) -> None:
    """The search goes through H_c: every candidate is carried to the query, and the point is mostly among them."""
    x_c, bones = points(rng, 40), random_bones(rng, 2)
    x_d = own_weights.to_deformed(x_c, bones).detach()
    candidates, valid = own_weights.to_canonical(x_d, bones, max_steps=50, tolerance=1e-11)
    back = own_weights.to_deformed(candidates.flatten(1, 2), bones).view(candidates.shape)
    torch.testing.assert_close(back[valid], x_d[:, :, None].expand_as(back)[valid], rtol=0, atol=1e-9)
    nearest = (candidates - x_c[:, None]).norm(dim=-1).masked_fill(~valid, 9.0).amin(-1)
    assert (nearest < 1e-6).double().mean() > 0.6


def test_carried_weights_know_their_derivatives(own_weights, random_bones, rng) -> None:
    x_c, bones = points(rng, 50), random_bones(rng, 1)
    code = own_weights.pose_encoder(bones)
    carried = CarriedWeights(own_weights.skinning_field, own_weights.h_c, code)
    q_c = own_weights.h_c.to_deformed(x_c[None], code).detach()
    torch.testing.assert_close(carried(q_c), own_weights.skinning_field(x_c)[None], rtol=0, atol=1e-9)
    rows, step = carried.with_derivatives(q_c), 1e-6
    for axis, shift in enumerate(step * torch.eye(3, dtype=torch.float64)):
        measured = (carried(q_c + shift) - carried(q_c - shift)) / (2 * step)
        apart = (rows[..., axis + 1, :] - measured).abs().amax(-1)
        assert (apart < 1e-4).double().mean() > 0.9  # the others lie on the border of a cell


def test_one_set_of_points_serves_all_frames(ins, random_bones, rng) -> None:
    bones, x_c = random_bones(rng, 3), points(rng, 10)
    assert torch.equal(ins.to_deformed(x_c, bones), ins.to_deformed(x_c.expand(3, -1, -1), bones))


def test_the_way_stations_are_those_of_equation_19(ins, random_bones, rng) -> None:
    bones, x_c = random_bones(rng, 2), points(rng, 2, 10)
    code = ins.pose_encoder(bones)
    q_c, q_d, x_d = ins.trace(x_c, bones)
    torch.testing.assert_close(ins.h_c.to_canonical(q_c, code), x_c, rtol=0, atol=1e-9)
    torch.testing.assert_close(linear_blend_skinning(q_c, ins.skinning_field(q_c), bones), q_d, rtol=0, atol=1e-12)
    torch.testing.assert_close(ins.h_d.to_canonical(x_d, code), q_d, rtol=0, atol=1e-9)
    assert torch.equal(x_d, ins.to_deformed(x_c, bones))
    other = ins.trace(x_c, bones, pose_code=2 * code)[0]
    torch.testing.assert_close(ins.h_c.to_canonical(other, 2 * code), x_c, rtol=0, atol=1e-9)


class TwoSides(nn.Module):
    """Bone 1 carries the side x > 0, bone 2 the other."""

    def forward(self, x_c: Tensor) -> Tensor:
        share = torch.sigmoid(40 * x_c[..., 0])
        weights = x_c.new_zeros(*x_c.shape[:-1], 24)
        weights[..., 1], weights[..., 2] = share, 1 - share
        return weights

    def with_derivatives(self, x_c: Tensor) -> Tensor:
        weights = self(x_c)
        derivatives = weights.new_zeros(*weights.shape[:-1], 4, 24)
        derivatives[..., 0, :] = weights
        slope = 40 * weights[..., 1] * weights[..., 2]
        derivatives[..., 1, 1], derivatives[..., 1, 2] = slope, -slope
        return derivatives


@pytest.fixture
def folded(randomise, parents) -> tuple[INS, Tensor]:
    """An INS and two poses that push the two sides of the canonical space 60 cm into each other."""
    rng = torch.Generator().manual_seed(43)
    network = randomise(INS(parents, pin_layers=6).double(), rng, 0.02)
    network.skinning_field = TwoSides()
    bones = torch.eye(4, dtype=torch.float64).repeat(2, 24, 1, 1)
    bones[:, 1, 0, 3], bones[:, 2, 0, 3] = -0.3, 0.3
    return network, bones


@pytest.mark.parametrize("soft", [True, False])
def test_occupancy_is_merged_from_the_candidates(folded, rng, soft: bool) -> None:
    """Eq. 17, from the candidates of to_canonical one point at a time."""
    ins, bones = folded
    x_d = 0.6 * points(rng, 2, 40)
    x_d[1, 0] = float("nan")
    starts = [0, 1, 2]
    candidates, valid = ins.to_canonical(x_d, bones, start_bones=starts)
    assert {0, 1, 2} <= set(valid.sum(-1).flatten().tolist())
    merged = ins.occupancy_at(x_d, bones, soft=soft, start_bones=starts)
    for frame, point in [(b, n) for b in range(2) for n in range(40)]:
        logits = ins.occupancy(candidates[frame, point][valid[frame, point]])
        if len(logits) == 0:
            expected = torch.tensor(OUTSIDE_LOGIT, dtype=torch.float64)
        else:
            expected = (torch.softmax(5 * logits, 0) * logits).sum() if soft else logits.max()
        torch.testing.assert_close(merged[frame, point], expected, rtol=0, atol=1e-9)


def test_soft_occupancy_approaches_hard(folded, rng) -> None:
    ins, bones = folded
    x_d = 0.6 * points(rng, 2, 40)
    hard = ins.occupancy_at(x_d, bones, soft=False)
    assert (ins.occupancy_at(x_d, bones, soft=True) <= hard + 1e-12).all()
    torch.testing.assert_close(ins.occupancy_at(x_d, bones, soft=True, softness=1e6), hard, rtol=0, atol=1e-4)


def test_points_without_correspondence_are_outside(ins, random_bones, rng) -> None:
    x_d = points(rng, 1, 5)
    x_d[0, 2] = float("nan")
    for soft in (True, False):
        logits = ins.occupancy_at(x_d, random_bones(rng, 1), soft=soft)
        assert logits[0, 2] == OUTSIDE_LOGIT
        assert (logits[0, [0, 1, 3, 4]] != OUTSIDE_LOGIT).any()


def test_known_bone_centres_choose_the_starts(ins, random_bones, parents, rng) -> None:
    centres = points(rng, 24)
    network = INS(parents, bone_centres=centres).double()
    network.load_state_dict(ins.state_dict())
    _, valid = network.to_canonical(points(rng, 2, 6), random_bones(rng, 2))
    assert valid.shape == (2, 6, 4)


@pytest.mark.parametrize("soft", [True, False])
def test_gradients_agree_with_finite_differences(ins, random_bones, rng, soft: bool) -> None:
    """Through both PINs, the implicit root and the occupancy, along a random direction of each part's parameters."""
    bones, x_d = random_bones(rng, 2), points(rng, 2, 4)
    readout = torch.randn(2, 4, generator=rng, dtype=torch.float64)

    def loss() -> Tensor:
        return (ins.occupancy_at(x_d, bones, soft=soft, max_steps=60, tolerance=1e-12) * readout).sum()

    ins.zero_grad()
    loss().backward()
    for name, part in ins.named_children():
        parameters = list(part.parameters())
        directions = [torch.randn(p.shape, generator=rng, dtype=torch.float64) for p in parameters]
        expected = sum((p.grad * d).sum() for p, d in zip(parameters, directions, strict=True) if p.grad is not None)
        originals, values = [p.detach().clone() for p in parameters], []
        for sign in (1, -1):
            for p, original, d in zip(parameters, originals, directions, strict=True):
                p.data.copy_(original + sign * 1e-8 * d)
            with torch.no_grad():
                values.append(loss().item())
        for p, original in zip(parameters, originals, strict=True):
            p.data.copy_(original)
        difference = (values[0] - values[1]) / 2e-8
        assert abs(difference) > 1e-4, name
        assert expected.item() == pytest.approx(difference, rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize(("use_h_c", "use_h_d"), [(False, True), (True, False), (False, False)])
def test_ablated_pipelines_invert_too(randomise, random_bones, parents, rng, use_h_c: bool, use_h_d: bool) -> None:
    network = randomise(INS(parents, use_h_c=use_h_c, use_h_d=use_h_d).double(), rng, 0.02)
    bones = random_bones(rng, 1)
    x_d = network.to_deformed(points(rng, 1, 10), bones).detach()
    candidates, valid = network.to_canonical(x_d, bones, max_steps=50, tolerance=1e-12)
    back = network.to_deformed(candidates.flatten(1, 2), bones).view(candidates.shape)
    assert valid.any()
    torch.testing.assert_close(back[valid], x_d[:, :, None].expand_as(back)[valid], rtol=0, atol=1e-9)
