"""deploy/rayservice.yaml against the schema that it is for, and against what it names here.

The schema is a part of KubeRay's `ray.io/v1` (ray-operator/config/crd/bases/ray.io_rayservices.yaml, and the API
reference of 1.7.1): the fields that the manifest uses, strict, as `kubectl --validate=strict` is.
"""

import copy
import importlib
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator
from ray.serve.schema import ServeDeploySchema

from service.ray.settings import RaySettings
from service.security import KeyFileError

ROOT = Path(__file__).parent.parent
MANIFEST: dict[str, Any] = yaml.safe_load((ROOT / "deploy/rayservice.yaml").read_text())
CLUSTER: dict[str, Any] = MANIFEST["spec"]["rayClusterConfig"]
SERVE: dict[str, Any] = yaml.safe_load(MANIFEST["spec"]["serveConfigV2"])
ARGS: dict[str, Any] = SERVE["applications"][0]["args"]
GROUPS = {group["groupName"]: group for group in CLUSTER["workerGroupSpecs"]}
PODS = {name: group["template"]["spec"] for name, group in {"head": CLUSTER["headGroupSpec"], **GROUPS}.items()}


def strict(required: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    return {
        "type": "object", "additionalProperties": False, "properties": properties, "required": list(required),
    }  # fmt: skip


def many(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


STRING, BOOLEAN, INT = {"type": "string"}, {"type": "boolean"}, {"type": "integer"}
STRINGS = {"type": "object", "additionalProperties": STRING}
QUANTITY = r"^(\+|-)?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))(([KMGTPE]i)|[numkMGTPE]|([eE](\+|-)?[0-9]+))?$"
QUANTITIES = {"type": "object", "additionalProperties": {"type": ["string", "integer"], "pattern": QUANTITY}}
MOUNT = strict(("mountPath", "name"), mountPath=STRING, name=STRING, subPath=STRING, readOnly=BOOLEAN)
CONTAINER = strict(
    ("name",),
    name={"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"},
    image=STRING,
    env=many(strict(("name",), name=STRING, value=STRING)),
    resources=strict(requests=QUANTITIES, limits=QUANTITIES),
    ports=many(strict(("containerPort",), name={"type": "string", "maxLength": 15}, containerPort=INT)),
    volumeMounts=many(MOUNT),
    securityContext=strict(allowPrivilegeEscalation=BOOLEAN, capabilities=strict(drop=many(STRING))),
)
VOLUME = strict(
    ("name",),
    name=STRING,
    persistentVolumeClaim=strict(("claimName",), claimName=STRING),
    secret=strict(secretName=STRING),
)
USER = strict(runAsNonRoot=BOOLEAN, runAsUser=INT, runAsGroup=INT, fsGroup=INT)
TEMPLATE = strict(spec=strict(("containers",), containers=many(CONTAINER), volumes=many(VOLUME), securityContext=USER))
WORKERS = strict(
    ("groupName", "maxReplicas", "minReplicas", "rayStartParams", "template"),
    groupName=STRING,
    replicas=INT,
    minReplicas=INT,
    maxReplicas=INT,
    rayStartParams=STRINGS,
    template=TEMPLATE,
)
RAY_CLUSTER = strict(
    ("headGroupSpec",),
    rayVersion=STRING,
    authOptions=strict(mode={"enum": ["disabled", "token"]}),
    enableInTreeAutoscaling=BOOLEAN,
    autoscalerOptions=strict(idleTimeoutSeconds=INT),
    headGroupSpec=strict(("rayStartParams", "template"), rayStartParams=STRINGS, template=TEMPLATE),
    workerGroupSpecs=many(WORKERS),
)
RAY_SERVICE = strict(
    ("apiVersion", "kind", "metadata", "spec"),
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayService"},
    metadata=strict(("name",), name=STRING),
    spec=strict(serveConfigV2=STRING, rayClusterConfig=RAY_CLUSTER),
)


def test_the_manifest_fits_the_schema() -> None:
    Draft202012Validator.check_schema(RAY_SERVICE)
    assert [error.message for error in Draft202012Validator(RAY_SERVICE).iter_errors(MANIFEST)] == []


@pytest.mark.parametrize(
    "spoil",
    [
        lambda spec: spec.update(serveConfig=spec.pop("serveConfigV2")),
        lambda spec: spec["rayClusterConfig"].pop("headGroupSpec"),
        lambda spec: spec["rayClusterConfig"]["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}),
        lambda spec: spec["rayClusterConfig"]["workerGroupSpecs"][0].pop("groupName"),
        lambda spec: spec["rayClusterConfig"]["authOptions"].update(mode="tokens"),
    ],
)
def test_the_schema_refuses_what_kubernetes_would(spoil: Callable[[Any], Any]) -> None:
    spoilt = copy.deepcopy(MANIFEST)
    spoil(spoilt["spec"])
    assert not Draft202012Validator(RAY_SERVICE).is_valid(spoilt)


def test_serve_takes_the_configuration(tmp_path: Path) -> None:
    config = ServeDeploySchema.model_validate(SERVE)
    (named,) = config.applications
    module, _, builder = named.import_path.partition(":")
    settings = RaySettings.model_validate(named.args)
    assert settings.model_fields_set >= named.args.keys()
    application = getattr(importlib.import_module(module), builder)(settings)
    assert application._bound_deployment.name == "Front"
    without_keys = {name: value for name, value in named.args.items() if name != "keys_file"}
    with pytest.raises(KeyFileError):
        getattr(importlib.import_module(module), builder)(RaySettings.model_validate(without_keys))


def test_shares_of_the_gpu_reach_ray() -> None:
    from service.ray.app import app

    front = app(RaySettings.model_validate(ARGS))._bound_deployment
    (engines,) = [argument for argument in front.init_args if hasattr(argument, "_bound_deployment")]
    assert engines._bound_deployment.name == "Engines"
    assert engines._bound_deployment.ray_actor_options == {"num_cpus": 0.0, "num_gpus": 0.25}
    scaling = engines._bound_deployment._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (1, 16)


def test_each_deployment_has_its_machines() -> None:
    """Fronts need a CPU and the volumes, engines a share of a GPU and nothing else."""
    cpus = {name: int(group["rayStartParams"]["num-cpus"]) for name, group in GROUPS.items()}
    gpus = {
        name: int(pod["containers"][0]["resources"]["limits"].get("nvidia.com/gpu", 0)) for name, pod in PODS.items()
    }
    assert CLUSTER["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert cpus["engines"] == ARGS["engine_cpus"] == gpus["fronts"] == gpus["head"] == 0
    assert cpus["fronts"] * GROUPS["fronts"]["minReplicas"] >= ARGS["fronts"]
    assert gpus["engines"] * GROUPS["engines"]["maxReplicas"] >= ARGS["max_engines"] * ARGS["engine_gpus"]
    mounts = {mount["mountPath"] for mount in PODS["fronts"]["containers"][0]["volumeMounts"]}
    assert {ARGS["bundle_dir"], ARGS["jobs_dir"], str(Path(ARGS["keys_file"]).parent)} == mounts
    volumes = {volume["name"] for volume in PODS["fronts"]["volumes"]}
    assert volumes == {mount["name"] for mount in PODS["fronts"]["containers"][0]["volumeMounts"]}


@pytest.mark.parametrize("name", PODS)
def test_nobody_is_root_or_can_become_it(name: str) -> None:
    assert PODS[name]["securityContext"]["runAsNonRoot"] is True
    for container in PODS[name]["containers"]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]},
        }  # fmt: skip


def test_versions_agree() -> None:
    pinned = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned
    assert CLUSTER["rayVersion"] == pinned[1]
    dockerfile = (ROOT / "deploy/ray.Dockerfile").read_text()
    (image,) = {container["image"] for pod in PODS.values() for container in pod["containers"]}
    assert f"-t {image} " in dockerfile
    users = re.findall(r"^USER (\d+)", dockerfile, re.MULTILINE)
    assert users[-1] == str(PODS["head"]["securityContext"]["runAsUser"])


def test_hadolint_finds_nothing() -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([hadolint, ROOT / "deploy/ray.Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
