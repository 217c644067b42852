"""`reposer-train`: from scans to an avatar.

reposer-train demo-data subjects/open                 make the open subject
reposer-train prepare scans FOLDER subjects/me        bring your own scans
reposer-train train subjects/open --bundle avatars/open    train, evaluate, export
reposer-train fleet subjects --out runs               train many, on the cores and GPUs of one machine or several
reposer-train evaluate runs/open                      score the held-out sequences
reposer-train export runs/open avatars/open           extract the mesh and write the bundle
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from service.bundle.files import BundleError
from service.bundle.manifest import MANIFEST_FILE, is_avatar_id
from training.checkpoint import CheckpointError, code_version, read_checkpoint
from training.config import RECIPES, Recipe, chosen_recipe
from training.data.subject import Subject, SubjectError

if TYPE_CHECKING:
    from training.export import MeshSource

MESH_HELP = "canonical mesh: the surface of stage `forward` (default where there is one), or the occupancy's level set"


def main(arguments: list[str] | None = None) -> int:
    """Run one command; 0 when it is done, 1 with a message on standard error when it cannot be."""
    parsed = _parser().parse_args(arguments)
    try:
        parsed.run_command(parsed)
    except (SubjectError, CheckpointError, BundleError, ValueError, OSError) as error:
        print(f"reposer-train: {error}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        # A loss or gradient that is not finite comes again on the same way: another seed or rate is another way.
        print(f"reposer-train: {error}; a new run with a lower learning rate may help", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("reposer-train: stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def _demo_data(parsed: argparse.Namespace) -> None:
    from training.data.demo_subject import make_open_subject

    started = time.monotonic()
    subject = make_open_subject(parsed.out, parsed.garment, parsed.seed, parsed.frames, parsed.workers)
    print(f"{parsed.out}: {len(subject.frames('train'))} frames to train on, {len(subject.frames('test'))} held out, "
          f"{(time.monotonic() - started) / 60:.1f} minutes")  # fmt: skip


def _prepare_scans(parsed: argparse.Namespace) -> None:
    from training.data.importers import import_scans

    import_scans(
        parsed.folder, parsed.out, test=parsed.test, up_axis=parsed.up_axis, units=parsed.units, licence=parsed.licence
    )


def _prepare_cape(parsed: argparse.Namespace) -> None:
    from training.data.gated import import_cape

    import_cape(
        parsed.folder, parsed.out, subject=parsed.subject, smpl=parsed.smpl, clothing=parsed.clothing,
        minimal_shape=parsed.minimal_shape, test=parsed.test, every=parsed.every,
    )  # fmt: skip


def _prepare_amass(parsed: argparse.Namespace) -> None:
    from training.data.gated import import_amass

    import_amass(
        parsed.folder, parsed.out, smpl=parsed.smpl, test=parsed.test, held_out=parsed.held_out, every=parsed.every
    )


def _prepare_capture(parsed: argparse.Namespace) -> None:
    from training.data.importers import import_capture

    import_capture(parsed.npz, parsed.out)


def _train(parsed: argparse.Namespace) -> None:
    from training.loop import train

    if parsed.bundle:
        _check_id(parsed.bundle)
    subject = Subject.open(parsed.subject)
    recipe = _recipe(parsed)
    run = parsed.run or Path("runs") / parsed.subject.resolve().name
    train(subject, run, recipe)
    print(f"{run}: trained")
    if parsed.bundle:
        _bundle(run, subject, parsed.bundle)


def _recipe(parsed: argparse.Namespace) -> Recipe:
    return chosen_recipe(parsed.recipe, parsed.method, parsed.skinning_field, parsed.init, parsed.set)


def _add_recipe(command: argparse.ArgumentParser) -> None:
    command.add_argument("--recipe", choices=sorted(RECIPES), default="staged")
    command.add_argument("--method", choices=("ins", "linear"), default="ins", help="linear: LBS + pose correctives")
    command.add_argument("--skinning-field", choices=("mlp", "voxel"), help="(default: the recipe's)")
    command.add_argument("--init", choices=("skeleton", "none"), help="where weights and occupancy start from")
    command.add_argument("--set", action="append", default=[], metavar="SECTION.SETTING=VALUE")


def _fleet(parsed: argparse.Namespace) -> None:
    from training.fleet import FleetError, read_fleet, table, train_fleet

    recipe = _recipe(parsed)
    outcomes = train_fleet(
        read_fleet(parsed.subjects), parsed.out, recipe, cpus=parsed.cpus, gpus=parsed.gpus, address=parsed.address
    )
    print(table(outcomes))
    failed = sum(row.outcome == "failed" for row in outcomes)
    if failed:
        raise FleetError(
            f"{failed} of {len(outcomes)} subjects failed; what they printed is in {parsed.out}/<name>.log"
        )


def _evaluate(parsed: argparse.Namespace) -> None:
    import torch

    from training.evaluate import evaluate, summary
    from training.export import canonical_meshes, rounded
    from training.frames import Frames
    from training.report import write_plot, write_sheet, write_tables

    state, subject, words = _trained(parsed.run, parsed.subject)
    ins = rounded(state.ins).eval()
    frames = Frames(subject, "test")
    mesh = canonical_meshes(state, subject.skeleton, parsed.mesh)[parsed.lod]
    about: dict[str, Any] = {
        "subject": subject.name, "mesh_source": parsed.mesh, "lod": parsed.lod, "training_seconds": words["seconds"]
    }  # fmt: skip
    ways = ("mesh", "field") if parsed.through == "both" else (parsed.through,)
    with torch.no_grad():
        scores = {through: evaluate(ins, mesh, frames, through) for through in ways}
    # A bundle with other files in it is no bundle any more.
    own = Path("out", "evaluation", parsed.run.resolve().name) if (parsed.run / MANIFEST_FILE).exists() else parsed.run
    folder = parsed.out or own
    folder.mkdir(parents=True, exist_ok=True)
    write_tables(folder, about, scores)
    write_plot(folder, scores)
    write_sheet(folder, ins, mesh, frames, scores[ways[0]])
    print(json.dumps(about | {through: summary(rows) for through, rows in scores.items()}, indent=1))


def _export(parsed: argparse.Namespace) -> None:
    _check_id(parsed.bundle)
    _bundle(parsed.run, parsed.subject, parsed.bundle, parsed.mesh)


def _check_id(path: Path) -> None:
    """Before an hour of work, not after it."""
    if not is_avatar_id(path.name):
        raise BundleError(f"expected a folder name of lower-case letters, digits, - and _, got {path.name!r}")


def _bundle(run: Path, subject: Subject | Path | None, path: Path, source: "MeshSource | None" = None) -> None:
    """Extract, evaluate on the test split where there is one, and write the bundle."""
    import numpy as np

    from training.colour import painted
    from training.evaluate import evaluate, summary
    from training.export import canonical_meshes, export_bundle, rounded
    from training.frames import Frames

    state, subject, words = _trained(run, subject)
    ins = rounded(state.ins).eval()
    meshes = canonical_meshes(state, subject.skeleton, source)
    metrics: dict[str, float] = {"training_seconds": words["seconds"]}
    if subject.frames("test"):
        frames = Frames(subject, "test")
        for lod, mesh in meshes.items():
            scores = summary(evaluate(ins, mesh, frames))
            metrics |= {f"{lod}_{key}": scores[key] for key in ("iou_surface", "iou_bbox", "point_to_surface_mm")}
    provenance = {
        "data_set": subject.name,
        "data_provenance": subject.provenance,
        "licence": subject.licence,
        "mesh_source": source or ("field" if state.surface is None else "surface"),
        "split": {split: sorted({name for name, _ in subject.frames(split)}) for split in ("train", "test")},
        "recipe": words["recipe"],
        "seed": words["recipe"]["seed"],
        "trained_by": words.get("code_version", "unknown"),
        "exported_by": code_version(),
    }
    kept = {key: value for key, value in words.items() if key != "subject_folder"}
    meshes = painted(meshes, ins, Frames(subject, "train"))
    poses = np.concatenate([subject.sequence(name).pose for name in subject.sequences])
    manifest = export_bundle(ins, subject.skeleton, meshes, path, provenance, metrics, kept, poses)
    sizes = ", ".join(f"{lod} {level.vertices}" for lod, level in manifest.levels_of_detail.items())
    print(f"{path}: vertices {sizes}; {json.dumps(manifest.metrics)}")


def _trained(run: Path, subject: Subject | Path | None) -> tuple[Any, Subject, dict[str, Any]]:
    """State, subject and words of a finished run; the subject is the one the run names unless given."""
    from training.loop import restore

    tensors, words = read_checkpoint(run / "checkpoint.safetensors")
    recipe = Recipe.from_dict(words["recipe"])
    if words["stage"] < len(recipe.stages):
        raise CheckpointError(f"{run} is at stage {recipe.stages[words['stage']]!r}: train it to its end first")
    if not isinstance(subject, Subject):
        folder = subject or words.get("subject_folder")
        if folder is None:
            raise CheckpointError(f"{run} does not say where its subject is: name it with --subject")
        subject = Subject.open(folder)
    return restore(tensors, words, subject.skeleton), subject, words


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("reposer-train", description="Train clothed avatars from scans and SMPL poses.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("demo-data", help="make the open subject: a synthetic person in a simulated tunic")
    command.add_argument("out", type=Path)
    command.add_argument("--garment", choices=("tunic", "none"), default="tunic")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--frames", type=int, default=19, help="recorded frames of each sequence")
    command.add_argument("--workers", type=int, default=2)
    command.set_defaults(run_command=_demo_data)

    prepare = commands.add_parser("prepare", help="bring your own scans").add_subparsers(required=True, metavar="KIND")
    command = prepare.add_parser("scans", help="a folder of .ply/.obj scans with .npz poses")
    command.add_argument("folder", type=Path)
    command.add_argument("out", type=Path)
    command.add_argument("--test", action="append", default=[], metavar="SEQUENCE", help="hold this sequence out")
    command.add_argument("--up-axis", choices=("y", "z"), default="y")
    command.add_argument("--units", choices=("m", "cm"), default="m")
    command.add_argument("--licence", default="unknown")
    command.set_defaults(run_command=_prepare_scans)
    command = prepare.add_parser("capture", help="a registered performance capture (crane.npz)")
    command.add_argument("npz", type=Path)
    command.add_argument("out", type=Path)
    command.set_defaults(run_command=_prepare_capture)
    command = prepare.add_parser("cape", help="one person in one outfit of your copy of CAPE")
    command.add_argument("folder", type=Path, help="the folder that holds sequences/ and minimal_body_shape/")
    command.add_argument("out", type=Path)
    command.add_argument("--subject", required=True, help="number of the person, as 00096")
    command.add_argument("--clothing", help="outfit, as shortlong; needed where the person has several")
    command.add_argument("--smpl", type=Path, required=True, help="your SMPL model file, .pkl or .npz, of their gender")
    command.add_argument("--minimal-shape", type=Path, help=".npy or .ply (default: at its place in the folder)")
    command.add_argument("--test", action="append", default=[], metavar="SEQUENCE", help="hold this sequence out")
    command.add_argument("--every", type=int, default=1, metavar="N", help="keep every N-th frame")
    command.set_defaults(run_command=_prepare_cape)
    command = prepare.add_parser("amass", help="one person of your copy of AMASS (DFAUST, PosePrior), unclothed")
    command.add_argument("folder", type=Path, help="a folder of <name>_poses.npz")
    command.add_argument("out", type=Path)
    command.add_argument(
        "--smpl", type=Path, required=True, help="your SMPL-H model file, .npz or .pkl, of their gender"
    )
    command.add_argument("--test", action="append", default=[], metavar="SEQUENCE", help="hold this sequence out")
    command.add_argument("--held-out", type=Path, help="folder of another person, whose poses are all held out")
    command.add_argument("--every", type=int, default=1, metavar="N", help="keep every N-th frame")
    command.set_defaults(run_command=_prepare_amass)

    command = commands.add_parser("train", help="train; a run that was stopped goes on where it was")
    command.add_argument("subject", type=Path)
    command.add_argument("--run", type=Path, help="run folder (default: runs/<subject>)")
    _add_recipe(command)
    command.add_argument("--bundle", type=Path, help="then evaluate and export the avatar to this folder")
    command.set_defaults(run_command=_train)

    command = commands.add_parser("fleet", help="train many subjects at once, on Ray; goes on where it was stopped")
    command.add_argument("subjects", type=Path, help="a folder of subjects, or a JSON list of their folders")
    command.add_argument("--out", type=Path, default=Path("runs"), help="folder of the runs (default: runs)")
    _add_recipe(command)
    command.add_argument("--cpus", type=int, default=1, help="threads of each training (default: 1)")
    command.add_argument(
        "--gpus", type=float, help="share of a GPU for each (default: a whole one, where there are any)"
    )
    command.add_argument(
        "--address", default="local", help="a Ray cluster, `auto` or host:port (default: this machine)"
    )
    command.set_defaults(run_command=_fleet)

    command = commands.add_parser("evaluate", help="score the held-out sequences")
    command.add_argument("run", type=Path, help="a run folder, or a bundle's")
    command.add_argument("--subject", type=Path, help="the subject's folder, where it has moved")
    command.add_argument("--through", choices=("mesh", "field", "both"), default="mesh")
    command.add_argument("--lod", choices=("preview", "standard", "high"), default="high")
    command.add_argument("--mesh", choices=("surface", "field"), help=MESH_HELP)
    command.add_argument("--out", type=Path, help="default: the run folder; out/evaluation/<id> for a bundle")
    command.set_defaults(run_command=_evaluate)

    command = commands.add_parser("export", help="extract the canonical mesh and write the bundle")
    command.add_argument("run", type=Path)
    command.add_argument("bundle", type=Path)
    command.add_argument("--subject", type=Path, help="the subject's folder, where it has moved")
    command.add_argument("--mesh", choices=("surface", "field"), help=MESH_HELP)
    command.set_defaults(run_command=_export)
    return parser


if __name__ == "__main__":
    sys.exit(main())
