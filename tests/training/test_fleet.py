"""Laws of the fleet: a lost worker costs no weights, a failed subject ends nothing else, what is done stays done."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
import torch

from training.__main__ import main
from training.checkpoint import encode_checkpoint, read_checkpoint, read_words
from training.config import RECIPES
from training.data.subject import Subject
from training.fleet import FleetError, Outcome, _check_room, _is_trained, read_fleet

STEPS = 60
WITHOUT_DASHBOARD = """
import sys
sys.modules["ray.dashboard.optional_deps"] = None  # its agents take longer to start than all the rest
from training.__main__ import main
sys.exit(main(sys.argv[1:]))
"""
SETTINGS = ["stages=weights", f"weights.steps={STEPS}", "weights.points=256", "checkpoint_every_s=0.0"]


@pytest.fixture(scope="module")
def subjects(tiny_subject: Subject, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two subjects and one that has lost a scan."""
    folder = tmp_path_factory.mktemp("fleet") / "subjects"
    for name in ("anna", "boris", "clara"):
        shutil.copytree(tiny_subject.path, folder / name)
    next((folder / "clara" / "scans").rglob("*.npz")).unlink()
    (folder / "notes").mkdir()  # no subject, and not taken for one
    return folder


@pytest.fixture(scope="module", autouse=True)
def _ray_leaves_nothing():
    """Ray keeps a token in the home folder and logs in the temporary one; its sockets bear no long names."""
    temporary = tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True)
    with temporary as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", folder)
        patch.setenv("RAY_TMPDIR", folder)
        yield


@pytest.fixture(scope="module")
def killed(subjects: Path) -> tuple[Path, int, int]:
    """A fleet with one worker killed while it trained: its runs, the exit code, and the step it was killed after."""
    out = subjects.parent / "runs"
    steps: list[int] = []
    ended = threading.Event()
    killer = threading.Thread(target=lambda: steps.extend(_kill_the_trainer_of(out / "anna", ended)))
    killer.start()
    try:
        # In a process of its own: Ray starts no second cluster in one that has had another.
        code = subprocess.run(
            [sys.executable, "-c", WITHOUT_DASHBOARD, *_command(subjects, out)], timeout=240
        ).returncode
    finally:
        ended.set()
        killer.join()
    return out, code, sum(steps)


def test_a_lost_worker_costs_no_weights(killed: tuple[Path, int, int]) -> None:
    """The two subjects are the same; the training of one was broken, that of the other was not."""
    out, _, step = killed
    assert 0 < step < STEPS
    (broken, words), (unbroken, _) = (
        read_checkpoint(out / name / "checkpoint.safetensors") for name in ("anna", "boris")
    )
    assert words["stage"] == 1
    assert broken.keys() == unbroken.keys()
    assert all(torch.equal(broken[key], unbroken[key]) for key in unbroken)
    assert "Traceback" not in (out / "anna.log").read_text()


def test_a_failed_subject_is_reported_and_ends_nothing_else(killed: tuple[Path, int, int], subjects: Path) -> None:
    out, code, _ = killed
    assert code == 1
    rows = {Path(row["run"]).name: row for row in json.loads((out / "fleet.json").read_text())["subjects"]}
    assert {name: row["outcome"] for name, row in rows.items()} == {
        "anna": "trained", "boris": "trained", "clara": "failed",
    }  # fmt: skip
    assert rows["clara"]["subject"] == str(subjects / "clara")
    assert "SubjectError: sequence" in rows["clara"]["reason"]
    assert "first missing" in (out / "clara.log").read_text()
    assert not list(out.glob(".*"))


def test_what_is_trained_is_not_trained_again(
    killed: tuple[Path, int, int], subjects: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out, _, _ = killed
    files = [out / name / "checkpoint.safetensors" for name in ("anna", "boris")]
    before = [path.stat().st_mtime_ns for path in files]
    (subjects.parent / "list.json").write_text(json.dumps(["subjects/anna", "subjects/boris"]))
    assert main(_command(subjects.parent / "list.json", out)) == 0
    assert [path.stat().st_mtime_ns for path in files] == before
    *_, anna, boris = capfd.readouterr().out.splitlines()
    assert anna.split() == [str(subjects / "anna"), "already", "trained"]
    assert boris.split() == [str(subjects / "boris"), "already", "trained"]


def test_a_run_of_another_subject_or_recipe_is_not_this_one_trained(
    killed: tuple[Path, int, int], subjects: Path, tmp_path: Path
) -> None:
    run = str(killed[0] / "anna")
    recipe = RECIPES["paper"].with_settings(SETTINGS)
    anew = shutil.copytree(subjects / "anna", tmp_path / "anna")
    assert _is_trained(Outcome(str(anew), run), recipe)  # the same content elsewhere
    assert not _is_trained(Outcome(str(anew), run), recipe.with_settings(["seed=1"]))
    meta = json.loads((anew / "subject.json").read_text())
    (anew / "subject.json").write_text(json.dumps({**meta, "fps": 31.0}))
    assert not _is_trained(Outcome(str(anew), run), recipe)
    tensors, words = read_checkpoint(Path(run, "checkpoint.safetensors"))
    (tmp_path / "unfinished").mkdir()
    checkpoint = encode_checkpoint(tensors, {**words, "stage": 0})
    (tmp_path / "unfinished/checkpoint.safetensors").write_bytes(checkpoint)
    assert not _is_trained(Outcome(str(subjects / "anna"), str(tmp_path / "unfinished")), recipe)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "expected a folder of subjects or a JSON list"),
        ("{nonsense", "expected a folder of subjects or a JSON list"),
        ('{"a": 1}', "expected a JSON list of subject folders"),
        ("[1]", "expected a JSON list of subject folders"),
        ("[]", "expected subjects, got none"),
        ('["a/open", "b/open", "c"]', "of different names, got open twice"),
    ],
)
def test_other_lists_are_refused(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "list.json").write_text(content)
    with pytest.raises(FleetError, match=message):
        read_fleet(tmp_path / "list.json")


def test_a_folder_without_subjects_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FleetError, match="expected subjects, got none"):
        read_fleet(tmp_path)


def test_room_is_that_of_one_machine() -> None:
    nodes = [{"CPU": 4.0}, {"CPU": 2.0, "GPU": 1.0}]
    _check_room(nodes, 4, 0)
    _check_room(nodes, 2, 0.5)
    with pytest.raises(FleetError, match="with 4 CPUs and 1 GPUs for each training, got 4 and 0; 2 and 1"):
        _check_room(nodes, 4, 1)


def test_without_ray_the_message_says_what_to_install(
    subjects: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(_command(subjects, tmp_path / "runs")) == 1
    assert "reposer[fleet]" in capsys.readouterr().err


def _command(subjects: Path, out: Path) -> list[str]:
    return [
        "fleet",
        str(subjects),
        "--out",
        str(out),
        "--recipe",
        "paper",
        *(part for setting in SETTINGS for part in ("--set", setting)),
    ]


def _kill_the_trainer_of(run: Path, ended: threading.Event) -> list[int]:
    """SIGKILL to the process that holds the run's lock, once it has left a checkpoint; returns that one's step."""
    trainer = None
    while not ended.wait(0.01):
        if trainer is None and (run / ".lock").exists():
            trainer = _holder(run / ".lock")
        if trainer and (run / "checkpoint.safetensors").exists():
            os.kill(trainer, signal.SIGKILL)
            return [read_words(run / "checkpoint.safetensors")["step"]]
    return []


def _holder(file: Path) -> int | None:
    """The process that has a file open."""
    for descriptors in Path("/proc").glob("[0-9]*/fd"):
        try:
            if str(file) in [os.readlink(descriptor) for descriptor in descriptors.iterdir()]:
                return int(descriptors.parent.name)
        except OSError:  # ended meanwhile
            continue
    return None
