"""Train many subjects at once on Ray: over the cores and GPUs of one machine, or over a cluster that shares its disk.

One subject is one Ray task in a process of its own, with its own share of cores and GPUs.  A worker that is lost is
started again and goes on from the run's checkpoint; a run that is finished is left as it is; and a subject that fails
is reported and ends nothing else.  So the same command may be given again until all are trained.
"""

import contextlib
import json
import logging
import os
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from training.checkpoint import read_words, write_file
from training.config import Recipe
from training.data.subject import Subject


class FleetError(ValueError):
    """The fleet cannot be started, or not all of it could be trained."""


@dataclass
class Outcome:
    """One subject's row of `fleet.json`."""

    subject: str
    run: str
    outcome: str = "waiting"
    """`waiting`, `trained`, `already trained` or `failed`."""
    reason: str = ""
    """Why it failed."""


def read_fleet(path: Path) -> list[Path]:
    """The subject folders that a folder holds, or that a JSON list names, relative to its own place.

    Raises:
        FleetError: there is none, or two would share a run folder.
    """
    if path.is_dir():
        subjects = sorted(found.parent for found in path.glob("*/subject.json"))
    else:
        try:
            names = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise FleetError(
                f"{path}: expected a folder of subjects or a JSON list of their folders: {error}"
            ) from error
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise FleetError(f"{path}: expected a JSON list of subject folders, got something else")
        subjects = [path.parent / name for name in names]
    if not subjects:
        raise FleetError(f"{path}: expected subjects, got none")
    runs = [subject.resolve().name for subject in subjects]
    twice = sorted({name for name in runs if runs.count(name) > 1})
    if twice:
        raise FleetError(f"{path}: expected subject folders of different names, got {', '.join(twice)} twice")
    return subjects


def train_fleet(
    subjects: Sequence[Path],
    out: Path,
    recipe: Recipe,
    *,
    cpus: int = 1,
    gpus: float | None = None,
    address: str = "local",
    retries: int = 3,
) -> list[Outcome]:
    """Train every subject into `out/<its folder's name>`, and keep `out/fleet.json` up to date on the way.

    What a training prints is in `out/<name>.log`.

    Args:
        cpus: threads of each training.  The weights depend on them: a run keeps to those it began with.
        gpus: share of a GPU for each training; None: a whole one where there are any.
        address: a Ray cluster's (`auto`, `host:port`), whose machines see `subjects` and `out` under the same names;
            `local` starts one on this machine.
        retries: how often a training whose worker was lost is started again.

    Raises:
        FleetError: Ray is missing, or no machine has room for one training.
    """
    out.mkdir(parents=True, exist_ok=True)
    outcomes = [Outcome(str(path), str(out / path.resolve().name)) for path in subjects]
    for row in outcomes:
        if _is_trained(row, recipe):
            row.outcome = "already trained"
    _write(out, outcomes)
    waiting = [row for row in outcomes if row.outcome == "waiting"]
    if not waiting:
        return outcomes
    with _cluster(address, retries) as ray:
        task = _task(ray, cpus, gpus, retries)
        under_way = {
            task.remote(str(Path(row.subject).resolve()), str(Path(row.run).resolve()), recipe.as_dict(), cpus): row
            for row in waiting
        }
        while under_way:
            (done,), _ = ray.wait(list(under_way), num_returns=1)
            row = under_way.pop(done)
            try:
                row.outcome, row.reason = ray.get(done)
            except ray.exceptions.RayError as error:  # lost more often than it may be
                row.outcome, row.reason = "failed", f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            _write(out, outcomes)
            print(f"{row.subject}: {row.outcome} {row.reason}".rstrip(), flush=True)
    return outcomes


def table(outcomes: Sequence[Outcome]) -> str:
    """One line for each subject: its outcome and, where it failed, why."""
    width = max(len(row.subject) for row in outcomes)
    return "\n".join(f"{row.subject:<{width}}  {row.outcome:<15}  {row.reason}".rstrip() for row in outcomes)


def _is_trained(row: Outcome, recipe: Recipe) -> bool:
    """Whether the run is at its end, with this recipe, on the subject as it is now."""
    from training.loop import _digest

    try:
        words = read_words(Path(row.run) / "checkpoint.safetensors")
        if words["stage"] < len(recipe.stages) or Recipe.from_dict(words["recipe"]) != recipe:
            return False
        return words["subject_sha256"] == _digest(Subject.open(row.subject))
    except ValueError:  # no checkpoint yet, or nothing that can be read: training it says what is wrong
        return False


def _train_one(subject: str, run: str, recipe: dict[str, Any], threads: int) -> tuple[str, str]:
    """Train one subject, in a worker; returns its outcome and reason."""
    import torch

    from training.loop import train

    with open(f"{run}.log", "a", buffering=1) as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        try:
            torch.set_num_threads(threads)
            train(Subject.open(subject), Path(run), Recipe.from_dict(recipe))
        except Exception as error:  # whatever ends one training, the others go on
            traceback.print_exc()
            return "failed", f"{type(error).__name__}: {error}"
    return "trained", ""


@contextlib.contextmanager
def _cluster(address: str, retries: int) -> Iterator[Any]:
    """Ray, connected to a cluster; one that was started here ends with it."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # read when Ray is imported: nothing is reported to anybody
    os.environ["RAY_task_oom_retries"] = str(retries)  # noqa: SIM112  Ray's name; its default is to try for ever
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise FleetError("expected Ray, on which fleets are trained, got none: pip install 'reposer[fleet]'") from error
    dashboard = False if address == "local" else None  # of a cluster that others started, it is theirs
    ray.init(address=address, include_dashboard=dashboard, log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield ray
    finally:
        ray.shutdown()


def _task(ray: Any, cpus: int, gpus: float | None, retries: int) -> Any:
    """`_train_one` as a Ray task with its share of one machine."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if gpus is None:
        gpus = 1.0 if any(node.get("GPU", 0) >= 1 for node in nodes) else 0.0
    _check_room(nodes, cpus, gpus)
    # A process trains one subject and ends: nothing of it, no GPU memory either, is left to the next.
    return ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=retries, max_calls=1)(_train_one)


def _check_room(nodes: Sequence[Mapping[str, float]], cpus: int, gpus: float) -> None:
    """Ray waits for ever for what no machine has."""
    if not any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus for node in nodes):
        have = "; ".join(f"{node.get('CPU', 0):g} and {node.get('GPU', 0):g}" for node in nodes)
        raise FleetError(f"expected a machine with {cpus} CPUs and {gpus:g} GPUs for each training, got {have}")


def _write(out: Path, outcomes: Sequence[Outcome]) -> None:
    write_file(out / "fleet.json", json.dumps({"subjects": [asdict(row) for row in outcomes]}, indent=1).encode())
