"""`reposer keys add | list | remove`: the file of API keys that `reposer serve --keys` reads."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from service.security import KeyFileError, Plane, add_key, read_keys, remove_key


def add_commands(commands: Any) -> None:
    """Add `keys` to the sub-commands of an argument parser."""
    keys = commands.add_parser("keys", help="add, list or remove API keys")
    keys.add_argument(
        "--file", type=Path, default=Path(os.environ.get("REPOSER_KEYS_FILE", "keys.json")), help="default: %(default)s"
    )
    actions = keys.add_subparsers(required=True, metavar="add | list | remove")
    add = actions.add_parser("add", help="make a key and print it, once: only its hash is kept")
    add.add_argument("name", help="of a-z, 0-9, _ and -")
    add.add_argument(
        "--plane",
        action="append",
        choices=get_args(Plane),
        help="data: repose and read (the default); admin: upload, delete, load and unload; may be given twice",
    )
    add.set_defaults(run=_reporting(_add))
    actions.add_parser("list", help="names and planes").set_defaults(run=_reporting(_list))
    remove = actions.add_parser("remove", help="a running service refuses the key at once")
    remove.add_argument("name")
    remove.set_defaults(run=_reporting(lambda parsed: remove_key(parsed.file, parsed.name)))


def _add(parsed: argparse.Namespace) -> None:
    print(add_key(parsed.file, parsed.name, tuple(parsed.plane or ("data",))))


def _list(parsed: argparse.Namespace) -> None:
    for key in read_keys(parsed.file):
        print(f"{key.name}: {', '.join(key.planes)}")


def _reporting(action: Callable[[argparse.Namespace], None]) -> Callable[[argparse.Namespace], int]:
    def run(parsed: argparse.Namespace) -> int:
        try:
            action(parsed)
        except (KeyFileError, OSError) as error:
            print(f"reposer: {error}", file=sys.stderr)
            return 1
        return 0

    return run
