"""What docker-compose.yml and the Dockerfile promise, as far as it can be read; scripts/check-compose runs them."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.limits import _REQUEST_ID
from service.metrics import Metrics
from service.serve import CLOSE_S, HARD_STOP_S
from service.settings import Settings

ROOT = Path(__file__).parent.parent
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
DOCKERFILES = {path.name: path.read_text().replace("\\\n", " ") for path in ROOT.glob("docker/*.Dockerfile")}
BUILT = {name: DOCKERFILES[Path(of["build"]["dockerfile"]).name] for name, of in SERVICES.items() if "build" in of}
NGINX = (ROOT / "docker/nginx/nginx.conf").read_text()
OBSERVABILITY = ROOT / "docker/observability"
DASHBOARD = json.loads((OBSERVABILITY / "reposer.json").read_text())
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
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
    assert "healthcheck" in SERVICES[name] or "\nHEALTHCHECK" in BUILT[name]


@pytest.mark.parametrize("name", ["service", "service-gpu"])
def test_replicas_do_not_fill_new_volumes_at_once(name: str) -> None:
    assert SERVICES[name]["depends_on"] == {"new-volumes": {"condition": "service_completed_successfully"}}
    assert SERVICES["new-volumes"]["volumes"] == SERVICES[name]["volumes"]


@pytest.mark.parametrize("image", re.findall(r"\$\{\w*(?:IMAGE):-([^}]+)\}", (ROOT / "docker-compose.yml").read_text()))
def test_images_have_a_version(image: str) -> None:
    tag = image.partition(":")[2]
    assert re.match(r"v?\d", tag), f"expected a version, got {image}"


@pytest.mark.parametrize("name", BUILT)
def test_the_images_of_the_dockerfile_are_those_of_the_compose_file(name: str) -> None:
    arguments = dict(re.findall(r"^ARG (\w+_IMAGE)=(\S+)$", BUILT[name], re.MULTILINE))
    given = SERVICES[name]["build"]["args"]
    assert {argument: f"${{{argument}:-{default}}}" for argument, default in arguments.items()}.items() <= given.items()
    stages = re.findall(r"^FROM (\S+)(?: AS (\S+))?$", BUILT[name], re.MULTILINE)
    known = {f"${{{argument}}}" for argument in arguments} | {stage for _, stage in stages}
    assert all(base in known for base, _ in stages)


@pytest.mark.parametrize("name", BUILT)
def test_what_is_built_runs_as_the_user_of_the_compose_file(name: str) -> None:
    stages = re.split(r"^FROM ", BUILT[name], flags=re.MULTILINE)[1:]
    target = SERVICES[name]["build"].get("target")
    (stage,) = [stage for stage in stages if stage.splitlines()[0].endswith(f" AS {target}")] if target else stages[-1:]
    if "\nUSER" not in stage:
        base = stage.split()[0]
        (stage,) = [stage for stage in stages if stage.splitlines()[0].endswith(f" AS {base}")]
    assert re.findall(r"^USER (\S+)$", stage, re.MULTILINE)[-1] == SERVICES[name]["user"]
    assert f"{SERVICES[name]['user'].partition(':')[0]} " in BUILT[name].split("useradd")[1]


@pytest.mark.parametrize("name", BUILT)
def test_images_say_what_they_are_and_hold(name: str) -> None:
    for label in ("title", "licenses", "version", "revision"):
        assert f"org.opencontainers.image.{label}=" in BUILT[name]
    assert re.search(r"^COPY --from=\S+ /opt/reposer/sbom.json /usr/share/doc/reposer/$", BUILT[name], re.MULTILINE)


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_every_install_is_pinned(dockerfile: str) -> None:
    installs = re.findall(r"pip [^\n&]*install[^\n&]*", DOCKERFILES[dockerfile])
    assert installs
    assert all("-c constraints.txt" in install for install in installs)
    assert "npm ci" in (ROOT / "scripts/build-viewer").read_text()


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_the_build_sees_what_the_dockerfile_copies(dockerfile: str) -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILES[dockerfile], re.MULTILINE):
        for source in [word for word in line.split() if not word.startswith("--")][:-1]:
            assert source in allowed
            assert (ROOT / source).exists()


@pytest.mark.parametrize("name", ["service", "service-gpu", "nginx"])
def test_there_is_time_to_drain(name: str) -> None:
    needed_s = Settings.model_fields["drain_grace_s"].default + CLOSE_S + HARD_STOP_S
    assert seconds(SERVICES[name]["stop_grace_period"]) > needed_s


def test_what_is_published_is_published_on_this_machine() -> None:
    ports = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert ports.keys() == {"nginx", "grafana"}
    assert all(port.startswith("${BIND_ADDRESS:-127.0.0.1}:") for port in ports["nginx"])
    assert all(port.startswith("127.0.0.1:") for port in ports["grafana"])


def test_nobody_else_has_a_way_out_and_only_nginx_and_prometheus_reach_the_replicas() -> None:
    networks = {name: set(service.get("networks", ())) for name, service in SERVICES.items()}
    assert {name for name in networks if not networks[name]} == {
        name for name, service in SERVICES.items() if service.get("network_mode") == "none"
    }
    assert [name for name in networks if "front" in networks[name]] == ["nginx", "grafana"]
    assert {name for name in networks if "back" in networks[name]} == {
        *("service", "service-gpu", "redis", "nginx", "prometheus"),
    }
    assert all(COMPOSE["networks"][name]["internal"] for name in ("back", "watch"))


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


def test_every_replica_is_watched() -> None:
    (job,) = yaml.safe_load((OBSERVABILITY / "prometheus.yml").read_text())["scrape_configs"]
    (found,) = job["dns_sd_configs"]
    assert (found["type"], found["port"]) == ("A", 8000)
    for name in ("service", "service-gpu"):
        assert SERVICES[name]["networks"] == {"back": {"aliases": found["names"]}}


def test_traces_can_be_switched_on() -> None:
    installs = re.findall(r'"\.\[(\w+),tracing\]"', DOCKERFILES["service.Dockerfile"])
    assert installs == ["cpu", "gpu"]
    for name in ("service", "service-gpu"):
        environment = SERVICES[name]["environment"]
        assert environment["OTEL_SERVICE_NAME"] == "reposer"
        assert {"FASTAPI_OTEL_AUTO_CONFIGURE", "OTEL_EXPORTER_OTLP_ENDPOINT"} <= environment.keys()


def test_prometheus_needs_no_key_and_nobody_else_gets_the_metrics() -> None:
    (job,) = yaml.safe_load((OBSERVABILITY / "prometheus.yml").read_text())["scrape_configs"]
    assert job.get("metrics_path", "/metrics") == "/metrics"
    assert "authorization" not in job
    for name in ("service", "service-gpu"):
        assert SERVICES[name]["environment"]["REPOSER_PUBLIC_METRICS"] == "true"
        assert "ports" not in SERVICES[name]
    # An exact match, which comes before all others.
    assert re.findall(r"location = /metrics (\{.*?\})", NGINX) == ["{ return 404; }"]


def test_the_dashboard_shows_what_the_service_exports_and_all_of_it() -> None:
    suffixes = {"histogram": ("_bucket", "_sum", "_count"), "counter": ("_total",), "gauge": ("",)}
    families = Metrics().registry.collect()
    exported = {family.name + suffix: family.name for family in families for suffix in suffixes[family.type]}
    used = {name for query in QUERIES for name in re.findall(r"\breposer_\w+", query)}
    assert used <= exported.keys()
    assert {exported[name] for name in used} == set(exported.values())


def test_the_dashboard_reads_from_the_prometheus_that_grafana_is_told_of() -> None:
    (source,) = yaml.safe_load((OBSERVABILITY / "datasource.yml").read_text())["datasources"]
    assert all(panel["datasource"] == {"type": source["type"], "uid": source["uid"]} for panel in DASHBOARD["panels"])
    assert source["url"] == "http://prometheus:9090"
    (provider,) = yaml.safe_load((OBSERVABILITY / "dashboards.yml").read_text())["providers"]
    mounted = dict(volume.split(":")[:2] for volume in SERVICES["grafana"]["volumes"])
    assert Path(mounted["./docker/observability/reposer.json"]).parent == Path(provider["options"]["path"])


def test_panels_have_places_of_their_own() -> None:
    taken = [
        (column, row)
        for place in (panel["gridPos"] for panel in DASHBOARD["panels"])
        for column in range(place["x"], place["x"] + place["w"])
        for row in range(place["y"], place["y"] + place["h"])
    ]
    assert len(taken) == len(set(taken))
    assert max(column for column, _ in taken) < 24


@pytest.mark.parametrize("name", SERVICES)
def test_what_is_mounted_is_there(name: str) -> None:
    for source in (volume.partition(":")[0] for volume in SERVICES[name].get("volumes", ())):
        assert (ROOT / source).is_file() if source.startswith("./") else source in COMPOSE["volumes"]


def test_fault_24_nginx_limits_headers_and_their_time() -> None:
    assert re.search(r"client_header_timeout 10s;", NGINX)
    assert re.search(r"client_body_timeout 10s;", NGINX)
    assert re.search(r"large_client_header_buffers 4 16k;", NGINX)


def test_nginx_and_the_replicas_log_a_request_by_the_same_name() -> None:
    assert '"request_id":"$name_of_request"' in NGINX
    # Said once, for all places: one that set a header of its own would lose those of the server.
    (server, *places) = re.split(r"^ +location ", NGINX.partition("\n    server {")[2], flags=re.MULTILINE)
    assert "proxy_set_header X-Request-Id $name_of_request;" in server
    assert "proxy_set_header" not in "".join(places)
    (names,) = re.findall(r"map \$http_x_request_id \$name_of_request \{(.+?)\n    \}", NGINX, re.DOTALL)
    (given,) = re.findall(r'"~\^(.+)\$" +\$http_x_request_id;', names)
    assert given.encode() == _REQUEST_ID.pattern
    assert re.search(r"default +\$request_id;", names)


def test_nginx_lets_through_what_the_service_takes() -> None:
    poses, bundles = (int(number) << 20 for number in re.findall(r"client_max_body_size (\d+)m;", NGINX))
    assert poses > Settings.model_fields["max_npz_bytes"].default
    assert bundles > Settings.model_fields["max_bundle_bytes"].default


@pytest.mark.parametrize("script", ["docker/nginx/watch.sh", "scripts/check-compose", "scripts/roll"])
def test_scripts_are_shell(script: str) -> None:
    shell = (ROOT / script).read_text().splitlines()[0].split()[-1].rpartition("/")[2]
    subprocess.run([shell, "-n", ROOT / script], check=True)


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_hadolint_finds_nothing(dockerfile: str) -> None:
    linted = subprocess.run(
        [Path(sys.executable).parent / "hadolint", ROOT / "docker" / dockerfile], capture_output=True, text=True
    )
    assert linted.returncode == 0, linted.stdout
