"""What training minimises: the paper's losses (section 3.3), and the explicit one of stage `forward`."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional


def occupancy_bce(logits: Float[Tensor, "*S"], inside: Bool[Tensor, "*S"]) -> Tensor:
    """Binary cross-entropy of predicted occupancy (eq. 18)."""
    return functional.binary_cross_entropy_with_logits(logits, inside.to(logits.dtype))


def equal_joint_weights(weights_at_joints: Float[Tensor, "J B"], parents: tuple[int, ...]) -> Tensor:
    """Auxiliary loss: at a joint its own bone and its parent's weigh one half each (section 3.3, after SNARF).

    Args:
        weights_at_joints: skinning weights at each canonical joint.
        parents: index of each bone's parent, -1 for the root.
    """
    children = [child for child, parent in enumerate(parents) if parent >= 0]
    own = weights_at_joints[children, children]
    above = weights_at_joints[children, [parents[child] for child in children]]
    return (own - 0.5).square().mean() + (above - 0.5).square().mean()


def distance_loss(distances: Float[Tensor, "*S"], huber: float, level: float = 0.5) -> Tensor:
    """Huber loss of signed distances to the scan, metres; quadratic up to `huber` metres.

    Args:
        level: below 0.5 it costs less to lie outside the scan than inside: where the surface is uncertain it settles
            where a point is inside with this probability.
    """
    loss = functional.huber_loss(distances, torch.zeros_like(distances), delta=huber, reduction="none") / huber
    return (2 * torch.where(distances > 0, level, 1 - level) * loss).mean()


def field_loss(logits: Float[Tensor, "*S"], distances: Float[Tensor, "*S"], metres_per_logit: float) -> Tensor:
    """How far the occupancy logits are from minus the (clamped) signed distance over `metres_per_logit`."""
    return functional.smooth_l1_loss(logits, -distances / metres_per_logit)
