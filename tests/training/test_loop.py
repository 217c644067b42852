"""Laws of the training loop: it goes on exactly where it was killed, and no run folder is taken over by another run."""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from training import loop
from training.checkpoint import CheckpointError, encode_checkpoint, read_checkpoint, read_words, write_file
from training.config import RECIPES, Recipe, chosen_recipe
from training.data.subject import Subject
from training.loop import train

CHILD = """
import sys, json, torch
from pathlib import Path
torch.set_num_threads(1)
from training.config import Recipe
from training.data.subject import Subject
from training.loop import train
train(Subject.open(sys.argv[1]), Path(sys.argv[2]), Recipe.from_dict(json.loads(sys.argv[3])))
"""


@pytest.fixture(scope="module")
def unbroken(tiny_subject: Subject, tiny_recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "unbroken"
    train(tiny_subject, run, tiny_recipe)
    return run


def test_stages_lower_their_losses_and_leave_a_checkpoint(unbroken: Path, tiny_recipe: Recipe) -> None:
    board = EventAccumulator(str(unbroken / "tensorboard"))
    board.Reload()
    values = [scalar.value for scalar in board.Scalars("occupancy/field")]
    assert values[-1] < 0.7 * values[0]
    tensors, words = read_checkpoint(unbroken / "checkpoint.safetensors")
    assert words["stage"] == len(tiny_recipe.stages)
    assert not any(name.startswith("optimizer") for name in tensors)
    assert tensors["surface.base"].shape[0] > 1000
    assert tensors["surface.offsets"].abs().max() > 0


def test_the_skinning_network_learns_the_weights_of_the_skeleton(
    tiny_subject: Subject, coupling_recipe: Recipe, tmp_path: Path
) -> None:
    train(tiny_subject, tmp_path / "run", coupling_recipe.with_settings(["stages=weights"]))
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    board.Reload()
    values = [scalar.value for scalar in board.Scalars("weights/weights")]
    assert values[-1] < 0.7 * values[0]


def test_killed_training_ends_with_the_weights_of_the_unbroken_run(
    unbroken: Path, tiny_subject: Subject, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    """kill -9 five times, in every stage that has steps, at moments that nobody chose."""
    run = tmp_path / "killed"
    arguments = [sys.executable, "-W", "ignore", "-c", CHILD, str(tiny_subject.path), str(run)]
    arguments.append(json.dumps({**tiny_recipe.as_dict(), "checkpoint_every_s": 0.0}))
    checkpoint, killed_in = run / "checkpoint.safetensors", []
    while True:
        with subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as child:
            try:
                while child.poll() is None:
                    time.sleep(0.01)
                    stage, step = _progress(checkpoint)
                    if len(killed_in) < 5 and step and killed_in.count(stage) < 2:
                        time.sleep(random.uniform(0, 0.05))
                        killed_in.append(stage)
                        break
            finally:
                child.send_signal(signal.SIGKILL)
            _, complaint = child.communicate()
        assert child.returncode in (0, -signal.SIGKILL), complaint.decode()
        if child.returncode == 0:
            break
    assert len(killed_in) == 5, f"too quick to be killed: {killed_in} proves nothing"
    assert len(set(killed_in)) >= 3, killed_in
    expected, _ = read_checkpoint(unbroken / "checkpoint.safetensors")
    found, _ = read_checkpoint(checkpoint)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name


def test_the_papers_recipe_trains_through_roots(tiny_subject: Subject, tiny_recipe: Recipe, tmp_path: Path) -> None:
    paper = dataclasses.asdict(RECIPES["paper"].network)
    settings = {**tiny_recipe.as_dict(), "name": "paper", "stages": ("paper",), "decay_from": 1.0, "network": paper}
    torch.manual_seed(0)
    recipe = Recipe.from_dict(settings)
    before = {key: value.clone() for key, value in _fresh(tiny_subject, recipe).items()}
    state = train(tiny_subject, tmp_path / "paper", recipe)
    moved = [key for key, value in state.ins.state_dict().items() if not torch.equal(value, before[key])]
    # The encoder's gradient passes the zero-initialised last layers: it first moves in the second step.
    for part in ("h_c", "h_d", "skinning_field", "occupancy", "pose_encoder"):
        assert any(key.startswith(part) for key in moved), f"the paper's loss never reached {part}"


def test_a_run_folder_is_not_taken_over(unbroken: Path, tiny_subject: Subject, tiny_recipe: Recipe) -> None:
    other = tiny_recipe.with_settings(["seed=7"])
    with pytest.raises(CheckpointError, match="other settings"):
        train(tiny_subject, unbroken, other)


def test_a_half_written_checkpoint_is_never_read(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    content = encode_checkpoint({"a": torch.arange(1000.0)}, {"stage": 1})
    write_file(path, content)
    assert read_checkpoint(path)[1] == {"stage": 1}
    for cut in (0, 7, 100, len(content) - 1):
        path.write_bytes(content[:cut])
        with pytest.raises(CheckpointError):
            read_checkpoint(path)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name], "a temporary file was left behind"
    assert os.access(path, os.R_OK)


def test_a_loss_that_is_not_finite_stops_training_and_spoils_nothing(
    tiny_subject: Subject, coupling_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from training.stages import WeightsStage

    honest = WeightsStage.loss

    def poisoned(stage: WeightsStage, step: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        named = honest(stage, step, generator)
        if step == 5:  # the loss is finite and its gradient is not
            named["bad"] = (next(iter(stage.state.ins.skinning_field.parameters())).sum() * 0).sqrt()
        return named

    monkeypatch.setattr(WeightsStage, "loss", poisoned)
    recipe = Recipe.from_dict({**coupling_recipe.as_dict(), "checkpoint_every_s": 0.0})
    with pytest.raises(RuntimeError, match="non-finite"):
        train(tiny_subject, tmp_path / "run", recipe)
    tensors, words = read_checkpoint(tmp_path / "run" / "checkpoint.safetensors")
    assert words["step"] == 5
    assert all(torch.isfinite(value).all() for value in tensors.values())


def test_a_subject_made_anew_is_another_subject(tiny_subject: Subject, tiny_recipe: Recipe, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_subject.path, copy)
    recipe = tiny_recipe.with_settings(["stages=weights"])
    train(tiny_subject, tmp_path / "run", recipe)
    train(Subject.open(copy), tmp_path / "run", recipe)  # the same content elsewhere: nothing to do
    meta = json.loads((copy / "subject.json").read_text())
    (copy / "subject.json").write_text(json.dumps({**meta, "provenance": {"seed": 1}}))
    with pytest.raises(CheckpointError, match="another subject"):
        train(Subject.open(copy), tmp_path / "run", recipe)


def test_two_trainings_do_not_share_a_run_folder(tiny_subject: Subject, tiny_recipe: Recipe, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with loop._locked(run), pytest.raises(CheckpointError, match="under way"):
        train(tiny_subject, run, tiny_recipe)


def test_learning_rates_warm_up_hold_and_fall() -> None:
    ours, paper = RECIPES["staged"], RECIPES["paper"]
    rates = [loop._schedule(step, 1000, "forward", ours) for step in range(1000)]
    assert rates[0] == pytest.approx(1 / ours.warm_up_steps)
    assert rates[100:600] == [1.0] * 500
    assert all(a > b for a, b in pairwise(rates[600:]))
    assert rates[-1] < 1e-4
    # Table 4, rows 15 and 16: from a fifth of the rate to all of it in 2400 iterations, then no decay.
    assert loop._schedule(0, 10_000, "paper", paper) == pytest.approx(0.2, abs=1e-3)
    assert loop._schedule(2400, 10_000, "paper", paper) == loop._schedule(9999, 10_000, "paper", paper) == 1.0


@pytest.mark.parametrize(
    "text", ["stages=weights,vot", "stages=", "stages=bce", "forward.points=-1", "forward.steps.x.y=1"]
)
def test_settings_that_could_only_fail_later_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        Recipe().with_settings([text])


@pytest.mark.parametrize("text", ["forward.stepz=3", "stepz=3", "forward=3", "forward.steps=many", "forward.steps"])
def test_unknown_settings_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        Recipe().with_settings([text])


def test_choices_of_the_command_line() -> None:
    assert chosen_recipe("staged") == RECIPES["staged"]
    assert chosen_recipe("staged", method="linear").network.correctives == "linear"
    assert chosen_recipe("staged", skinning="mlp").network.skinning == "mlp"
    assert chosen_recipe("paper", init="skeleton").stages == ("weights", "vote", "occupancy", "paper")
    assert chosen_recipe("paper", init="none") == RECIPES["paper"]
    for wrong in ({"name": "staged", "init": "none"}, {"name": "paper", "method": "linear"}):
        with pytest.raises(ValueError, match="--recipe"):
            chosen_recipe(**wrong)


def test_settings_survive_json_and_are_applied() -> None:
    recipe = Recipe().with_settings(["forward.steps=7", "network.use_h_d=true", "stages=weights,vote"])
    assert (recipe.forward.steps, recipe.network.use_h_d, recipe.stages) == (7, True, ("weights", "vote"))
    assert Recipe.from_dict(recipe.as_dict()) == recipe


def test_recipes_from_before_there_was_the_choice_read_weights_where_h_c_leads() -> None:
    settings = Recipe().as_dict()
    del settings["network"]["skinning_at"]
    assert Recipe.from_dict(settings).network.skinning_at == "moved"


def _progress(checkpoint: Path) -> tuple[int, int]:
    """Stage and step, without reading a tensor."""
    if not checkpoint.exists():
        return 0, 0
    words = read_words(checkpoint)
    return words["stage"], words["step"]


def _fresh(subject: Subject, recipe: Recipe) -> dict[str, torch.Tensor]:
    from training.loop import make_ins

    torch.manual_seed(recipe.seed)
    return make_ins(recipe.network, subject.skeleton).state_dict()
