"""The command `reposer`: serve avatars, repose one over HTTP, look into a bundle.  Needs no torch."""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# Nothing of the server up here: `reposer repose` needs the client's dependencies only.
from tqdm import tqdm

from service.client import Client, ClientError, ConnectionLost
from service.client.calls import MEDIA_TYPES, Applied


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    parsed = _parser().parse_args(arguments)
    try:
        return parsed.run(parsed)
    except ModuleNotFoundError as error:
        return _fail(f"there is no module {error.name}: this command needs reposer[cpu] or reposer[gpu]")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="reposer", description=__doc__)
    commands = parser.add_subparsers(
        required=True, metavar="serve | repose | avatars | convert | bake | keys | inspect"
    )

    serve = commands.add_parser("serve", help="serve the avatars of a folder over HTTP until Ctrl-C")
    serve.add_argument("--bundles", type=Path, default=Path("avatars"), help="folder of avatars (default: avatars)")
    serve.add_argument("--host", default="127.0.0.1", help="default: this machine only")
    serve.add_argument("--port", type=int, default=8000)
    serve.add_argument("--keys", type=Path, help="file of API keys, as `reposer keys` makes it")
    serve.add_argument("--cpu", action="store_true", help="stay on the CPU even where CUDA is there")
    serve.set_defaults(run=_serve)

    service = argparse.ArgumentParser(add_help=False)
    service.add_argument("--url", default="http://127.0.0.1:8000")
    service.add_argument("--key", default=os.environ.get("REPOSER_KEY"), help="API key; default: $REPOSER_KEY")
    help_text = "post poses to a running service and save its answer"
    repose = commands.add_parser("repose", parents=[service], help=help_text)
    repose.add_argument("avatar", help="id of the avatar")
    repose.add_argument("poses", type=Path, help=".npz (AMASS, CAPE, SMPL), .smpl or .json")
    repose.add_argument(
        "-o", "--output", type=Path, required=True, help=f"what to write, by its name: {', '.join(MEDIA_TYPES)}"
    )
    repose.add_argument("--lod", help="preview, standard or high")
    repose.add_argument("--up-axis", choices=("y", "z"), help="up axis of the poses; AMASS has z")
    repose.add_argument("--units", choices=("m", "cm"), help="units of the translations")
    repose.add_argument("--fps", type=float, help="frames a second of the poses")
    repose.add_argument("--rotation", choices=("axis_angle", "matrix", "quat_wxyz", "6d"), help="what the poses hold")
    repose.add_argument("--frame", choices=("world", "camera"), help="camera: y down and z away, as in OpenCV")
    repose.add_argument("--every", type=int, help="use each n-th frame only")
    repose.add_argument("--target-fps", type=float, help="resample to this rate")
    repose.add_argument(
        "--normalize", action="store_true", default=None, help="take the nearest rotation of what is none"
    )
    how = repose.add_mutually_exclusive_group()
    how.add_argument("--timeout", type=float, dest="timeout_s", help="seconds that the service may take")
    how.add_argument(
        "--job",
        action="store_true",
        help="in the background, for what is too long for one request; the same command again takes it up",
    )
    repose.set_defaults(run=_repose)

    avatars = commands.add_parser("avatars", help="list, upload or delete the avatars of a running service")
    actions = avatars.add_subparsers(required=True, metavar="list | upload | delete")
    listing = actions.add_parser("list", parents=[service], help="every avatar, its state and its levels of detail")
    listing.set_defaults(run=_avatars, act=_list)
    upload = actions.add_parser("upload", parents=[service], help="make or replace an avatar")
    upload.add_argument("avatar", help="id of the avatar")
    upload.add_argument("bundle", type=Path, help="folder, .zip or .tar")
    upload.add_argument("--only-new", action="store_true", help="refuse if there is such an avatar already")
    upload.set_defaults(run=_avatars, act=_upload)
    delete = actions.add_parser("delete", parents=[service], help="remove an avatar and its older versions")
    delete.add_argument("avatar", help="id of the avatar")
    delete.set_defaults(run=_avatars, act=_delete)
    for action in (upload, delete):
        action.add_argument("--if-match", metavar="DIGEST", help="refuse if the avatar is at another version")

    if find_spec("pydantic"):
        from service import keys
        from service.convert import command as convert

        keys.add_commands(commands)
        convert.add_parser(commands)
    if find_spec("onnxruntime"):
        from service import bake_command

        bake_command.add_parser(commands)

    inspect = commands.add_parser("inspect", help="verify a bundle and say what is in it")
    inspect.add_argument("bundle", type=Path, help="folder of one avatar")
    inspect.set_defaults(run=_inspect)
    return parser


def _serve(parsed: argparse.Namespace) -> int:
    from service.security import KeyFileError, check_binding
    from service.serve import serve
    from service.settings import Settings

    if not parsed.bundles.is_dir():
        return _fail(f"there is no folder {parsed.bundles}")
    # Without the flag the environment decides, so it is not passed as False.
    given: dict[str, Any] = {"cpu_only": True} if parsed.cpu else {}
    given |= {"keys_file": parsed.keys} if parsed.keys else {}
    settings = Settings(bundle_dir=parsed.bundles, **given)
    try:
        check_binding(parsed.host, settings.keys_file, open_access=settings.open_access)
        return serve(settings, parsed.host, parsed.port)
    except KeyFileError as error:
        return _fail(str(error))


_OPTIONS = (
    "lod",
    "up_axis",
    "units",
    "fps",
    "rotation",
    "frame",
    "every",
    "target_fps",
    "normalize",
)


def _repose(parsed: argparse.Namespace) -> int:
    wanted = parsed.avatar, parsed.poses, parsed.output
    options = {name: getattr(parsed, name) for name in _OPTIONS}
    unit = " frames" if parsed.job else "B"
    try:
        with Client(parsed.url, parsed.key) as client, _Progress(parsed.output.name, unit) as progress:
            if parsed.job:
                job = client.submit(*wanted, **options)
                applied = _fetch(client, job.id, parsed.output, progress)
            else:
                applied = client.export(*wanted, progress=progress.show, timeout_s=parsed.timeout_s, **options)
    except (ClientError, OSError, ValueError) as error:
        return _fail(str(error))
    print(
        f"{parsed.output}: frames {applied.frames}, vertices {applied.vertices}, up-axis {applied.up_axis}, "
        f"units {applied.units}, fps {applied.fps:g}"
    )
    if applied.warning:
        print(f"warning: {applied.warning}", file=sys.stderr)
    return 0


def _fetch(client: Client, job_id: str, output: Path, progress: "_Progress") -> Applied:
    try:
        return client.fetch(job_id, output, progress=progress.show)
    except (ConnectionLost, KeyboardInterrupt) as error:
        why = str(error) or "interrupted"
        raise ConnectionLost(f"{why}; the job {job_id} goes on, and the same command takes it up") from error


def _avatars(parsed: argparse.Namespace) -> int:
    try:
        with Client(parsed.url, parsed.key) as client:
            parsed.act(client, parsed)
    except (ClientError, OSError, ValueError) as error:
        return _fail(str(error))
    return 0


def _list(client: Client, parsed: argparse.Namespace) -> None:
    for avatar in client.avatars():
        levels = [f"{lod} {level['vertices']} vertices" for lod, level in avatar["levels_of_detail"].items()]
        print(f"{avatar['id']}: {', '.join([avatar['status'], *levels])}")


def _upload(client: Client, parsed: argparse.Namespace) -> None:
    made = client.upload(parsed.avatar, parsed.bundle, if_match=parsed.if_match, only_new=parsed.only_new)
    print(f"{made['id']}: uploaded, digest {made['bundle_digest']}")


def _delete(client: Client, parsed: argparse.Namespace) -> None:
    client.delete(parsed.avatar, if_match=parsed.if_match)
    print(f"{parsed.avatar}: deleted")


class _Progress(tqdm):
    """A bar of what has come; none where nobody watches."""

    def __init__(self, name: str, unit: str) -> None:
        super().__init__(desc=name, unit=unit, unit_scale=True, leave=False, disable=None)

    def show(self, done: int, total: int | None) -> None:
        self.total = total
        self.update(done - self.n)


def _inspect(parsed: argparse.Namespace) -> int:
    from service.bundle.files import BundleError, read_bundle

    try:
        bundle = read_bundle(parsed.bundle.resolve())
    except BundleError as error:
        return _fail(f"{parsed.bundle}: {error}")
    manifest = bundle.manifest
    print(f"{manifest.id}: whole and unharmed, format {manifest.format_version}, digest {bundle.digest}")
    print(f"  {manifest.up_axis} up, {manifest.units}, {len(manifest.skeleton.parents)} joints")
    for lod, level in manifest.levels_of_detail.items():
        print(f"  {lod}: {level.vertices} vertices, {level.faces} faces")
    for name, record in manifest.files.items():
        print(f"  {name}: {record.bytes} bytes, sha256 {record.sha256[:16]}...")
    for title, values in (("provenance", manifest.provenance), ("metrics", manifest.metrics)):
        for name, value in values.items():
            print(f"  {title} {name}: {value}")
    return 0


def _fail(message: str) -> int:
    print(f"reposer: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
