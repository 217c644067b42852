"""What docker-compose.yml and the Dockerfile promise, as far as it can be read; scripts/check-compose runs them."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.serve import CLOSE_S, HARD_STOP_S
from service.settings import Settings

ROOT = Path(__file__).parent.parent
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
DOCKERFILE = (ROOT / "docker/service.Dockerfile").read_text().replace("\\\n", " ")
NGINX = (ROOT / "docker/nginx/nginx.conf").read_text()
EVERY = pytest.mark.parametrize("name", SERVICES)
LASTING = [name for name, service in SERVICES.items() if service["restart"] != "no"]


def seconds(duration: str) -> float:
    return float(duration.removesuffix("s"))


@EVERY
def test_nobody_is_root_or_can_become_it(name: str) -> None:
    user, _, group = SERVICES[name]["user"].partition(":")
    assert int(user) > 0
    assert int(group) > 0
    assert SERVICES[name]["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in SERVICES[name]["security_opt"]


@EVERY
def test_roots_are_read_only_and_what_can_be_written_is_bounded(name: str) -> None:
    assert SERVICES[name]["read_only"] is True
    assert all("size=" in mount for mount in SERVICES[name].get("tmpfs", ()))
    limits = SERVICES[name]["deploy"]["resources"]["limits"]
    assert limits["memory"]
    assert limits["pids"] > 0
    assert SERVICES[name]["logging"]["options"].keys() == {"max-size", "max-file"}


@pytest.mark.parametrize("name", LASTING)
def test_what_lasts_is_restarted_and_probed(name: str) -> None:
    assert SERVICES[name]["restart"] == "unless-stopped"
    assert "healthcheck" in SERVICES[name] or ("build" in SERVICES[name] and "HEALTHCHECK" in DOCKERFILE)


@pytest.mark.parametrize("image", re.findall(r"\$\{\w*(?:IMAGE):-([^}]+)\}", (ROOT / "docker-compose.yml").read_text()))
def test_images_have_a_version(image: str) -> None:
    tag = image.partition(":")[2]
    assert re.match(r"\d", tag), f"expected a version, got {image}"


def test_the_images_of_the_dockerfile_are_those_of_the_compose_file() -> None:
    arguments = dict(re.findall(r"^ARG (\w+_IMAGE)=(\S+)$", DOCKERFILE, re.MULTILINE))
    given = SERVICES["service"]["build"]["args"]
    assert {name: f"${{{name}:-{default}}}" for name, default in arguments.items()}.items() <= given.items()
    stages = re.findall(r"^FROM (\S+)(?: AS (\S+))?$", DOCKERFILE, re.MULTILINE)
    assert all(base in {f"${{{name}}}" for name in arguments} | {stage for _, stage in stages} for base, _ in stages)


def test_targets_exist_and_run_as_the_user_of_the_compose_file() -> None:
    stages = re.findall(r"^FROM \S+ AS (\S+)$", DOCKERFILE, re.MULTILINE)
    for name in ("service", "service-gpu"):
        assert SERVICES[name]["build"]["target"] in stages
        assert f"USER {SERVICES[name]['user']}\n" in DOCKERFILE


def test_every_install_is_pinned() -> None:
    installs = re.findall(r"pip [^\n&]*install[^\n&]*", DOCKERFILE)
    assert installs
    assert all("-c constraints.txt" in install for install in installs)
    assert "npm ci" in (ROOT / "scripts/build-viewer").read_text()


def test_the_build_sees_what_the_dockerfile_copies() -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.MULTILINE):
        for source in [word for word in line.split() if not word.startswith("--")][:-1]:
            assert source in allowed
            assert (ROOT / source).exists()


@pytest.mark.parametrize("name", ["service", "service-gpu", "nginx"])
def test_there_is_time_to_drain(name: str) -> None:
    needed_s = Settings.model_fields["drain_grace_s"].default + CLOSE_S + HARD_STOP_S
    assert seconds(SERVICES[name]["stop_grace_period"]) > needed_s


def test_only_nginx_is_published_and_only_on_this_machine() -> None:
    for name, service in SERVICES.items():
        if name != "nginx":
            assert "ports" not in service
            assert service.get("network_mode") == "none" or service["networks"] == ["back"]
    assert all(port.startswith("${BIND_ADDRESS:-127.0.0.1}:") for port in SERVICES["nginx"]["ports"])
    assert COMPOSE["networks"]["back"]["internal"] is True


def test_the_cache_forgets_what_was_not_used_for_longest() -> None:
    command = SERVICES["redis"]["command"]
    assert "--maxmemory-policy allkeys-lru" in command
    megabytes = int(re.findall(r"--maxmemory (\d+)mb", command)[0])
    assert megabytes < int(SERVICES["redis"]["deploy"]["resources"]["limits"]["memory"].removesuffix("m"))


def test_what_is_passed_on_are_settings() -> None:
    names = {name for name in SERVICES["service"]["environment"] if name.startswith("REPOSER_")}
    assert names <= {f"REPOSER_{name.upper()}" for name in Settings.model_fields}


def test_every_variable_is_described_with_its_default() -> None:
    described = dict(re.findall(r"^#? ?([A-Z_]+)=(\S+)", (ROOT / ".env.example").read_text(), re.MULTILINE))
    used: dict[str, str] = {}
    for file in ("docker-compose.yml", "docker/tls.yml"):
        for name, default in re.findall(r"\$\{(\w+)(?::-([^}]*))?", (ROOT / file).read_text()):
            used[name] = default
    passed_on = {name for name, value in SERVICES["service"]["environment"].items() if value is None}
    assert used.keys() | passed_on == described.keys()
    assert {name: described[name] for name, default in used.items() if default} == {
        name: default for name, default in used.items() if default
    }


def test_fault_24_nginx_limits_headers_and_their_time() -> None:
    assert re.search(r"client_header_timeout 10s;", NGINX)
    assert re.search(r"client_body_timeout 10s;", NGINX)
    assert re.search(r"large_client_header_buffers 4 16k;", NGINX)


def test_nginx_lets_through_what_the_service_takes() -> None:
    poses, bundles = (int(number) << 20 for number in re.findall(r"client_max_body_size (\d+)m;", NGINX))
    assert poses > Settings.model_fields["max_npz_bytes"].default
    assert bundles > Settings.model_fields["max_bundle_bytes"].default


@pytest.mark.parametrize("script", ["docker/nginx/watch.sh", "scripts/check-compose"])
def test_scripts_are_shell(script: str) -> None:
    shell = (ROOT / script).read_text().splitlines()[0].split()[-1].rpartition("/")[2]
    subprocess.run([shell, "-n", ROOT / script], check=True)


def test_hadolint_finds_nothing() -> None:
    linted = subprocess.run(
        [Path(sys.executable).parent / "hadolint", ROOT / "docker/service.Dockerfile"], capture_output=True, text=True
    )
    assert linted.returncode == 0, linted.stdout
