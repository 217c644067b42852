"""Every setting of a training run, with the reasons for the values that are not the paper's.

A run is a list of stages; a recipe says which, and how long each takes.  `staged` is ours and trains on two CPU
cores; `paper` is the paper's own training, root finding in every step, for reference.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Network:
    """Sizes and switches of the INS (table 4)."""

    correctives: Literal["coupling", "field", "linear"] = "field"
    """H_c: "coupling" is the paper's PIN; "field" is ours, invertible and linear in the pose; "linear" is linear pose
    correctives, the baseline, not invertible."""
    skinning: Literal["mlp", "voxel"] = "voxel"
    """"mlp" is the paper's weight field, "voxel" a grid that is ten times cheaper."""
    skinning_at: Literal["moved", "canonical"] = "canonical"
    """Where a point's weights are read: where H_c carried it, as in the paper, or where it lies in the canonical frame,
    so that they are the same in every pose: reposing then costs a fifth."""
    use_h_d: bool = False
    nearest_starts: bool = True
    """Search canonical roots from the nearest bones; otherwise from SNARF's nine, as the paper does."""
    code_width: int = 64
    """Principal components of the training poses that fields depend on."""
    field_spacing_m: float = 0.04
    field_reach_m: float = 0.04
    """Fields reach this far from the voted surface."""
    skinning_spacing_m: float = 0.04
    pose_inputs: Literal["bone", "joint"] = "joint"
    """Of the coupling PIN.  "bone" is the paper's (Euler angles and translation of B_j).  "joint" sees each joint's own
    turn only: poses not seen in training are then combinations of turns that were."""
    pin_layers: int = 18
    omega0: float = 30.0


@dataclass(frozen=True)
class Weights:
    """Stage `weights`: skinning weights by bone distance, so that other stages start with limbs that move.

    A voxel field is set to them; the network learns them in these steps.
    """

    steps: int = 600
    points: int = 4096
    learning_rate: float = 2e-3
    bone_radius_m: float = 0.045
    """Weights fall off with the squared distance to the bones over twice this, squared."""


@dataclass(frozen=True)
class Vote:
    """Stage `vote`: the canonical surface on which the scans agree, seen through the skinning field alone."""

    spacing_m: float = 0.008
    reach_m: float = 0.25
    """Voxels further than this from every bone are outside."""
    bone_radius_m: float = 0.045
    """As in stage `weights`, for the posed bones."""
    max_frames: int = 45


@dataclass(frozen=True)
class Forward:
    """Stage `forward`: canonical surface points are reposed and compared with the scans' distance fields.

    The explicit direction: no search, no implicit gradient.  It teaches the PINs, the skinning field and the surface.
    """

    steps: int = 3000
    frames: int = 8
    points: int = 4096
    field_learning_rate: float = 2e-3
    """Of a field PIN's coefficients, metres per unit of the pose code."""
    pin_learning_rate: float = 5e-4
    """Of coupling PINs and their pose encoder."""
    voxel_learning_rate: float = 0.02
    skinning_learning_rate: float = 3e-4
    """Of the network of an MLP skinning field."""
    surface_learning_rate: float = 3e-4
    pose_noise_rad: float = 0.0
    """Standard deviation of random turns of each bone that the pose code sees; between a bone and its parent it is 1.4
    times that.  Coupling PINs remember poses without it; fields have the ridge."""
    huber_m: float = 0.005
    level: float = 0.4
    """Probability of being inside at which an uncertain surface is drawn.  IoU is largest below one half: with an
    expected IoU of J, at J / (1 + J)."""
    coverage: float = 0.5
    """On the distance from points of the scan to the surface; 0: none."""
    coverage_points: int = 1024
    """Of a scan in a step."""
    coverage_vertices: int = 8192
    """Of the surface, among which the nearest is searched."""
    ridge: float = 5.0
    """On the mean squared coefficient of the fields."""
    locality_m: float = 0.25
    """Further than about this from a joint, the ridge on its turn grows with the squared distance; 0: nowhere."""
    mirrored_share: float = 0.4
    """Of the frames that are seen in the mirror: bodies and clothes are nearly symmetric, poses seldom are."""
    displacement_penalty: float = 0.2
    """On the squared metres by which the PINs move a point."""
    laplacian_penalty: float = 300.0
    """On the squared Laplacian of the surface's offsets."""


@dataclass(frozen=True)
class Occupancy:
    """Stage `occupancy`: the occupancy network learns the canonical surface that `forward` found."""

    steps: int = 1500
    points: int = 8192
    learning_rate: float = 1e-3
    near_points: int = 300_000
    far_points: int = 60_000
    """The pool that steps draw from: around the surface, and in its box."""
    metres_per_logit: float = 0.005
    """The logit is minus the signed distance over this, up to the band."""
    band_m: float = 0.03


@dataclass(frozen=True)
class Bce:
    """Stage `bce`: the paper's loss (eq. 18) through roots found once, for the occupancy network and H_c.

    Roots depend on the skinning field and H_d only; while those two rest, no search is needed.
    """

    steps: int = 800
    frames: int = 4
    points: int = 2048
    surface_points_per_frame: int = 4000
    box_points_per_frame: int = 1000
    start_bones: int = 3
    pin_learning_rate: float = 1e-4
    learning_rate: float = 2e-4
    pose_noise_rad: float = 0.1
    anchor_weight: float = 0.1
    """Of the `occupancy` stage's loss, which holds the field where no scan point ever lands."""


@dataclass(frozen=True)
class Paper:
    """Stage `paper`: the paper's training (section 3.3, app. A.2, table 4).

    What differs: surface samples are spread evenly by area, not by Poisson disks; and the pose code is zero in the
    canonical pose (see `model.pose_encoder`), as the paper says of its purpose but not of its network.
    """

    epochs: int = 250
    frames: int = 8
    points: int = 7500
    """Per frame; 8 x 7 500 = the paper's 60 000 a batch."""
    surface_points_per_frame: int = 100_000
    box_points_per_frame: int = 100_000
    pin_learning_rate: float = 1e-4
    learning_rate: float = 1e-3
    warm_up_steps: int = 2400
    warm_up_factor: float = 0.2
    bone_points: int = 1024
    """Points on the bones, inside by definition, in the first epoch's auxiliary losses."""


OLDER = {"network": {"skinning_at": "moved"}}
"""What recipes meant that were written before there was the setting."""
STAGES = {"weights": Weights, "vote": Vote, "forward": Forward, "occupancy": Occupancy, "bce": Bce, "paper": Paper}
StageName = Literal["weights", "vote", "forward", "occupancy", "bce", "paper"]


@dataclass(frozen=True)
class Recipe:
    """What to train and how."""

    name: str = "staged"
    stages: tuple[StageName, ...] = ("weights", "vote", "forward", "occupancy")
    seed: int = 0
    clip_norm: float = 4.0
    """Largest L2 norm of a gradient (table 4)."""
    decay_from: float = 0.6
    """Share of a stage's steps after which its learning rates fall to zero along a cosine; 1: never (the paper)."""
    warm_up_steps: int = 50
    checkpoint_every_s: float = 60.0
    field_spacing_m: float = 0.01
    """Of the scans' distance grids."""
    network: Network = field(default_factory=Network)
    weights: Weights = field(default_factory=Weights)
    vote: Vote = field(default_factory=Vote)
    forward: Forward = field(default_factory=Forward)
    occupancy: Occupancy = field(default_factory=Occupancy)
    bce: Bce = field(default_factory=Bce)
    paper: Paper = field(default_factory=Paper)

    def __post_init__(self) -> None:
        """Refuse what would fail only after the first stages have trained.

        Raises:
            ValueError: a stage that does not exist, or a size below its least.
        """
        unknown = [name for name in self.stages if name not in STAGES]
        if unknown or not self.stages:
            raise ValueError(f"expected stages among {', '.join(STAGES)}, got {', '.join(unknown) or 'none'}")
        for section in (self, *(getattr(self, name) for name in ("network", *STAGES))):
            for setting in dataclasses.fields(section):
                value = getattr(section, setting.name)
                if isinstance(value, int | float) and not isinstance(value, bool) and value < 0:
                    raise ValueError(f"expected {setting.name} of at least 0, got {value}")
        if self.network.skinning_at == "canonical" and {"bce", "paper"} & set(self.stages):
            raise ValueError('expected network.skinning_at="moved" with the stages bce and paper, which search roots')

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> "Recipe":
        """Undo `as_dict`.

        Raises:
            ValueError: there is no such setting.
        """
        sections = {"network": Network, **STAGES}
        try:
            named = {key: {**OLDER.get(key, {}), **settings[key]} for key in sections if key in settings}
            parts = {key: sections[key](**values) for key, values in named.items()}
            rest = {key: value for key, value in settings.items() if key not in sections}
            return cls(**{**rest, "stages": tuple(rest.get("stages", cls.stages)), **parts})
        except TypeError as error:
            raise ValueError(f"unknown setting: {error}") from error

    def with_settings(self, assignments: list[str]) -> "Recipe":
        """A copy with `section.setting=value` applied, such as `forward.steps=500`.

        Raises:
            ValueError: an assignment names no setting, or its value is of the wrong type.
        """
        settings = self.as_dict()
        for assignment in assignments:
            path, _, text = assignment.partition("=")
            *parents, last = path.split(".")
            section = settings
            for parent in parents:
                section = section.get(parent) if isinstance(section, dict) else None
            if not isinstance(section, dict) or last not in section or isinstance(section[last], dict):
                raise ValueError(f"expected section.setting=value with a known setting, got {assignment!r}")
            section[last] = _parsed(text, section[last], assignment)
        return Recipe.from_dict(settings)


def _parsed(text: str, current: Any, assignment: str) -> Any:
    """The text as a value of the current value's type."""
    try:
        if isinstance(current, bool):
            return {"true": True, "false": False}[text.lower()]
        if isinstance(current, tuple):
            return tuple(text.split(","))
        return type(current)(text)
    except (KeyError, ValueError) as error:
        raise ValueError(f"expected a {type(current).__name__} in {assignment!r}") from error


_COUPLING = Network(correctives="coupling", skinning="mlp", skinning_at="moved", use_h_d=True)
RECIPES = {
    "staged": Recipe(),
    "capture": Recipe(
        name="capture",
        stages=("weights", "vote", "forward"),
        network=Network(field_spacing_m=0.03, skinning_spacing_m=0.03),
        forward=Forward(steps=1500, ridge=9.0, locality_m=0.3, mirrored_share=0.25, coverage=0.0),
    ),
    "coupling": Recipe(
        name="coupling",
        network=_COUPLING,
        forward=Forward(frames=4, points=1536, pose_noise_rad=0.1, displacement_penalty=2.0, huber_m=0.02, level=0.5),
    ),
    "paper": Recipe(
        name="paper",
        stages=("paper",),
        decay_from=1.0,
        network=dataclasses.replace(_COUPLING, pose_inputs="bone", nearest_starts=False),
    ),
}
"""`staged` is ours, and `capture` the same for real captures: finer grids, a stiffer ridge, and no pull on noisy scans'
points, which scored better on capture `crane` and worse on the open subject; and no occupancy network, which meshes do
not use.  `coupling` trains the paper's two PINs in
the same stages; `paper` does as the paper."""


def chosen_recipe(
    name: str,
    method: Literal["ins", "linear"] = "ins",
    skinning: Literal["mlp", "voxel"] | None = None,
    init: Literal["skeleton", "none"] | None = None,
    assignments: list[str] | None = None,
) -> Recipe:
    """A recipe with the choices of the command line.

    Args:
        method: "linear" puts linear pose correctives in the PINs' place.
        skinning: the skinning field; the recipe's where None.
        init: "skeleton" starts weights and occupancy from the fitted skeleton and the voted surface, as all recipes but
            `paper` do; "none" from random networks, as `paper` does.
        assignments: see `Recipe.with_settings`.

    Raises:
        ValueError: the choices do not go together, or an assignment is wrong.
    """
    recipe = RECIPES[name]
    network = recipe.network
    if method == "linear":
        if name != "staged":
            raise ValueError(f"expected --recipe staged with --method linear, got {name!r}")
        network = dataclasses.replace(network, correctives="linear")
    if skinning is not None:
        network = dataclasses.replace(network, skinning=skinning)
    stages = recipe.stages
    if init == "none" and name != "paper":
        raise ValueError(f"recipe {name!r} starts from the skeleton: --init none goes with --recipe paper")
    if init == "skeleton" and name == "paper":
        stages = ("weights", "vote", "occupancy", *stages)
    return dataclasses.replace(recipe, network=network, stages=stages).with_settings(assignments or [])
