"""The training loop: stages one after the other, resumable at any moment.

A run is a folder: `recipe.json`, `checkpoint.safetensors`, `tensorboard/`.  A checkpoint holds everything that
training changes; the randomness of a step is a function of seed, stage and step alone.  So a run that was killed, even
while it wrote, ends with the weights of an unbroken run (same machine, same number of threads).
"""

import contextlib
import fcntl
import hashlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from model.ins import INS, Grids
from service.bundle.skeleton import Skeleton
from training.checkpoint import CheckpointError, code_version, encode_checkpoint, read_checkpoint, write_file
from training.config import Network, Recipe
from training.data.subject import Subject
from training.frames import Frames
from training.roots import find_roots
from training.stages import Stage, State, Surface, make_stage
from training.start import bone_centres, canonical_box

CHECKPOINT = "checkpoint.safetensors"
LOG_EVERY = 20


def train(subject: Subject, run: Path, recipe: Recipe) -> State:
    """Train on the subject's train split, or go on with what the run folder holds.

    Raises:
        CheckpointError: the run folder belongs to another subject or other settings.
    """
    identity = {"subject": subject.name, "subject_sha256": _digest(subject), "recipe": recipe.as_dict()}
    run.mkdir(parents=True, exist_ok=True)
    with _locked(run):
        _claim(run, identity)
        return _train(subject, run, recipe, identity)


def _train(subject: Subject, run: Path, recipe: Recipe, identity: dict[str, Any]) -> State:
    torch.backends.cuda.matmul.allow_tf32 = True
    frames = Frames(subject, "train")
    checkpoint = run / CHECKPOINT
    if checkpoint.exists():
        tensors, words = read_checkpoint(checkpoint)
        state = restore(tensors, words, subject.skeleton)
    else:
        tensors, words = {}, {"stage": 0, "step": 0, "seconds": 0.0, "code_version": code_version()}
        torch.manual_seed(recipe.seed)
        state = State(make_ins(recipe.network, subject.skeleton))
    words = {**words, **identity, "subject_folder": str(subject.path.resolve())}
    with SummaryWriter(str(run / "tensorboard")) as board:
        for index in range(words["stage"], len(recipe.stages)):
            _run_stage(index, state, frames, recipe, tensors, words, board, checkpoint)
            tensors, words = {}, {**words, "stage": index + 1, "step": 0}
            write_file(checkpoint, _encode(state, None, words))
    return state


def make_ins(network: Network, skeleton: Skeleton) -> INS:
    """An untrained INS of these sizes."""
    ins = INS(
        skeleton.parents,
        pose_inputs=network.pose_inputs,
        pin_layers=network.pin_layers,
        omega0=network.omega0,
        use_h_d=network.use_h_d,
        bone_centres=bone_centres(skeleton) if network.nearest_starts else None,
        correctives=network.correctives,
        code_width=network.code_width,
        skinning=network.skinning,
        skinning_at=network.skinning_at,
        grids=Grids(*canonical_box(skeleton), network.field_spacing_m, network.skinning_spacing_m),
    )
    ins.search = find_roots
    return ins


def restore(tensors: dict[str, Tensor], words: dict[str, Any], skeleton: Skeleton) -> State:
    """The state that a checkpoint holds: a run's, or the one in a bundle.

    Raises:
        CheckpointError: its tensors are not those of its settings.
    """
    recipe = Recipe.from_dict(words["recipe"])
    state = State(make_ins(recipe.network, skeleton))
    if "surface.base" in tensors:
        state.surface = Surface(tensors["surface.base"], tensors["surface.faces"])
    try:
        for name, module in state.modules().items():
            module.load_state_dict(_below(tensors, name))
    except RuntimeError as error:
        raise CheckpointError(f"the checkpoint does not fit its own settings: {error}") from error
    return state


def _run_stage(
    index: int,
    state: State,
    frames: Frames,
    recipe: Recipe,
    tensors: dict[str, Tensor],
    words: dict[str, Any],
    board: SummaryWriter,
    checkpoint: Path,
) -> None:
    """Run one stage from `words["step"]` to its end; `tensors` hold the optimiser when it was under way."""
    name = recipe.stages[index]
    started, before = time.monotonic(), words["seconds"]
    stage = make_stage(name, state, frames, recipe)
    device = torch.device("cuda" if stage.on_gpu and torch.cuda.is_available() else "cpu")
    state.to(device)
    frames.to(device)
    if stage.steps:
        stage.begin()
        parameters = stage.parameter_groups()
        # The paper names Adam and no betas: torch's.  The short stages of ours forget faster.
        optimizer = torch.optim.Adam(parameters, betas=(0.9, 0.999 if name == "paper" else 0.99))
        if words["step"]:
            _restore_optimizer(optimizer, _below(tensors, "optimizer"))
        rates = [group["lr"] for group in parameters]
        saved = time.monotonic()
        progress = tqdm(range(words["step"], stage.steps), desc=name, initial=words["step"], total=stage.steps)
        for step in progress:
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * _schedule(step, stage.steps, name, recipe)
            named = _step(
                stage, optimizer, step, torch.Generator().manual_seed(_seed(recipe.seed, index, step)), recipe
            )
            if step % LOG_EVERY == 0 or step + 1 == stage.steps:
                progress.set_postfix({key: f"{value:.4f}" for key, value in named.items()}, refresh=False)
                for key, value in named.items():
                    board.add_scalar(f"{name}/{key}", value, step)
            now = time.monotonic()
            if now - saved > recipe.checkpoint_every_s and step + 1 < stage.steps:
                words |= {"step": step + 1, "seconds": before + now - started}
                write_file(checkpoint, _encode(state, optimizer, words))
                saved = now
    stage.finish()
    state.to(torch.device("cpu"))
    frames.to(torch.device("cpu"))
    words["seconds"] = before + time.monotonic() - started


def _step(
    stage: Stage, optimizer: torch.optim.Optimizer, step: int, generator: torch.Generator, recipe: Recipe
) -> dict[str, float]:
    """One optimisation step; returns the named losses."""
    named = stage.loss(step, generator)
    loss = torch.stack(list(named.values())).sum()
    if not torch.isfinite(loss):
        raise RuntimeError(f"step {step}: the loss is {loss.item()}")
    optimizer.zero_grad()
    loss.backward()
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    # Refused here, an infinite gradient never reaches the weights, nor the checkpoint.
    nn.utils.clip_grad_norm_(weights, recipe.clip_norm, error_if_nonfinite=True)
    optimizer.step()
    return {key: value.item() for key, value in named.items()}


def _schedule(step: int, steps: int, stage: str, recipe: Recipe) -> float:
    """Factor on the learning rates: linear warm-up, then constant, then (ours) a cosine to zero."""
    if stage == "paper":
        warm_up, start = recipe.paper.warm_up_steps, recipe.paper.warm_up_factor
    else:
        warm_up, start = recipe.warm_up_steps, 0.0
    warm = start + (1 - start) * min((step + 1) / max(warm_up, 1), 1.0)
    done = step / steps
    if done <= recipe.decay_from:
        return warm
    return warm * 0.5 * (1 + math.cos(math.pi * (done - recipe.decay_from) / (1 - recipe.decay_from)))


def _seed(seed: int, stage: int, step: int) -> int:
    return (seed * 1000 + stage) * 10_000_000 + step


def _encode(state: State, optimizer: torch.optim.Optimizer | None, words: dict[str, Any]) -> bytes:
    tensors = {
        f"{name}.{key}": value for name, module in state.modules().items() for key, value in module.state_dict().items()
    }
    if optimizer is not None:
        for index, moments in optimizer.state_dict()["state"].items():
            tensors.update({f"optimizer.{index}.{key}": value for key, value in moments.items()})
    return encode_checkpoint(tensors, words)


def _restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        moments.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{prefix}."): value for key, value in tensors.items() if key.startswith(f"{prefix}.")}


def _digest(subject: Subject) -> str:
    """SHA-256 of what the subject says of itself and of its poses: a subject made anew is another one."""
    digest = hashlib.sha256()
    for path in (subject.path / "subject.json", *(subject.path / "sequences" / f"{n}.npz" for n in subject.sequences)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


@contextlib.contextmanager
def _locked(run: Path) -> Iterator[None]:
    """Keep a second training out of the run folder; the lock goes with the process, however it ends."""
    with (run / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(f"another training is under way in {run}") from error
        yield


def _claim(run: Path, identity: dict[str, Any]) -> None:
    """Make the run folder this recipe's and this subject's, or check that it is."""
    for left_over in run.glob(".*.tmp"):  # by a run that was killed while it wrote
        left_over.unlink()
    path = run / "recipe.json"
    text = json.dumps(identity, indent=1)
    if not path.exists():
        write_file(path, text.encode())
    elif path.read_text() != text:
        raise CheckpointError(f"{run} belongs to another subject or other settings: see {path}")
