"""The command `reposer`: serve avatars, repose one over HTTP, look into a bundle.  Needs no torch."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import httpx
import uvicorn

from service.answers import FRAMES, GLB, NPZ
from service.app import create_app
from service.bundle.files import BundleError, read_bundle
from service.settings import Settings

MEDIA_TYPES = {".glb": GLB, ".npz": NPZ, ".frames": FRAMES}
GRACE_S = 10


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    parsed = _parser().parse_args(arguments)
    return parsed.run(parsed)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="reposer", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="serve | repose | inspect")

    serve = commands.add_parser("serve", help="serve the avatars of a folder over HTTP until Ctrl-C")
    serve.add_argument("--bundles", type=Path, default=Path("avatars"), help="folder of avatars (default: avatars)")
    serve.add_argument("--host", default="127.0.0.1", help="default: this machine only")
    serve.add_argument("--port", type=int, default=8000)
    serve.add_argument("--cpu", action="store_true", help="stay on the CPU even where CUDA is there")
    serve.set_defaults(run=_serve)

    repose = commands.add_parser("repose", help="post poses to a running service and save its answer")
    repose.add_argument("avatar", help="id of the avatar")
    repose.add_argument("poses", type=Path, help=".npz (AMASS, CAPE, SMPL) or .json")
    repose.add_argument("-o", "--output", type=Path, required=True, help="what to write: .glb, .npz or .frames")
    repose.add_argument("--url", default="http://127.0.0.1:8000")
    repose.add_argument("--lod", help="preview, standard or high")
    repose.add_argument("--up-axis", choices=("y", "z"), help="up axis of the poses; AMASS has z")
    repose.add_argument("--units", choices=("m", "cm"), help="units of the translations")
    repose.add_argument("--fps", type=float, help="frames a second of the poses")
    repose.add_argument("--every", type=int, help="use each n-th frame only")
    repose.set_defaults(run=_repose)

    inspect = commands.add_parser("inspect", help="verify a bundle and say what is in it")
    inspect.add_argument("bundle", type=Path, help="folder of one avatar")
    inspect.set_defaults(run=_inspect)
    return parser


def _serve(parsed: argparse.Namespace) -> int:
    if not parsed.bundles.is_dir():
        return _fail(f"there is no folder {parsed.bundles}")
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    # Without the flag the environment decides, so it is not passed as False.
    settings = Settings(bundle_dir=parsed.bundles, **({"cpu_only": True} if parsed.cpu else {}))
    # A client that does not read would otherwise keep the process from ending (uvicorn 0.54).
    uvicorn.run(
        create_app(settings),
        host=parsed.host,
        port=parsed.port,
        timeout_graceful_shutdown=GRACE_S,
        ws="none",
        server_header=False,
    )
    return 0


def _repose(parsed: argparse.Namespace) -> int:
    media_type = MEDIA_TYPES.get(parsed.output.suffix)
    if media_type is None:
        return _fail(f"expected an output named .glb, .npz or .frames, got {parsed.output.name}")
    names = ("lod", "up_axis", "units", "fps", "every")
    query = {name: str(getattr(parsed, name)) for name in names if getattr(parsed, name) is not None}
    kind = "application/json" if parsed.poses.suffix == ".json" else "application/x-npz"
    part = parsed.output.with_name(parsed.output.name + ".part")
    try:
        body = parsed.poses.read_bytes()
        url = f"{parsed.url.rstrip('/')}/avatars/{parsed.avatar}/repose"
        headers = {"Content-Type": kind, "Accept": media_type}
        timeout = httpx.Timeout(10.0, read=None)
        with httpx.stream("POST", url, params=query, content=body, headers=headers, timeout=timeout) as answer:
            if answer.status_code != 200:
                return _fail(_explain(answer))
            # A broken answer must not look like a file.
            with open(part, "wb") as file:
                for chunk in answer.iter_bytes():
                    file.write(chunk)
        part.replace(parsed.output)
    except OSError as error:
        return _fail(str(error))
    except httpx.HTTPError as error:
        return _fail(f"{parsed.url}: {error}")
    finally:
        part.unlink(missing_ok=True)
    applied = {name: answer.headers[f"reposer-{name}"] for name in ("frames", "vertices", "up-axis", "units", "fps")}
    print(f"{parsed.output}: " + ", ".join(f"{name} {value}" for name, value in applied.items()))
    if "warning" in answer.headers:
        print(f"warning: {answer.headers['warning']}", file=sys.stderr)
    return 0


def _explain(answer: httpx.Response) -> str:
    answer.read()
    try:
        problem = answer.json()
        return f"{problem['status']} {problem['code']}: {problem.get('detail') or problem['title']}"
    except (ValueError, KeyError, TypeError):
        return f"{answer.status_code} from something that is not Reposer"


def _inspect(parsed: argparse.Namespace) -> int:
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
