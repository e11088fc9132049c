"""The manifests for Kubernetes and the image: valid by their schemas, closed, and in agreement with this code."""

from __future__ import annotations

import copy
import importlib.metadata
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from cluster.cli import build_parser
from cluster.config import load_run_config
from cluster.jobs import STOP_GRACE_S
from cluster.planning import check_placement
from cluster.topology import NodeCapacity
from rlhf.config import parse_yaml
from tests.cluster.kuberay_schema import schema_of

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "cluster" / "manifests"
FILES = sorted(FOLDER.glob("*.yaml"))
IMAGE_HOME = "/opt/rlhf"


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def find(kind: str) -> dict[str, Any]:
    [found] = [document for path in FILES for document in documents(path) if document["kind"] == kind]
    return found


def cluster_of(document: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = document["spec"]
    key = {"RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}.get(document["kind"])
    return spec if key is None else spec[key]


RAY = ["RayCluster", "RayJob", "RayService"]


def groups(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def pods() -> Iterator[tuple[str, dict[str, Any]]]:
    for kind in RAY:
        for group in groups(cluster_of(find(kind))):
            yield f"{kind} {group.get('groupName', 'head')}", group["template"]["spec"]
    yield "redis", find("StatefulSet")["spec"]["template"]["spec"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_manifests_are_valid(path: Path) -> None:
    found = documents(path)
    assert found
    for document in found:
        kind = jsonschema.validators.validator_for(schema_of(document))
        assert [error.message for error in kind(schema_of(document)).iter_errors(document)] == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "authOption"), {"mode": "token"}),
        (("spec", "authOptions", "mode"), "tokens"),
        (("spec", "headGroupSpec", "template", "spec", "containers", 0, "imagee"), "x"),
        (("spec", "workerGroupSpecs", 0, "template", "spec", "securityContext", "runAsRoot"), True),
        (("spec", "workerGroupSpecs", 0, "replicas"), "2"),
        (("spec", "gcsFaultToleranceOptions", "redis"), "x"),
        (("spec", "headGroupSpec", "template", "spec", "containers", 0, "resources", "requests", "memory"), "16 GB"),
    ],
)
def test_the_schema_notices(path: tuple[str | int, ...], value: object) -> None:
    document: Any = copy.deepcopy(find("RayCluster"))
    *above, last = path
    node = document
    for part in above:
        node = node[part]
    node[last] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, schema_of(document))


def test_every_cluster_asks_for_a_token_and_has_the_installed_version_of_ray() -> None:
    for kind in RAY:
        cluster = cluster_of(find(kind))
        assert cluster["authOptions"] == {"mode": "token"}, kind
        assert cluster["rayVersion"] == importlib.metadata.version("ray"), kind


@pytest.mark.parametrize(("name", "pod"), list(pods()), ids=[name for name, _ in pods()])
def test_no_pod_runs_as_root_or_gains_rights(name: str, pod: dict[str, Any]) -> None:
    security = pod["securityContext"]
    assert security["runAsNonRoot"] and security["runAsUser"] > 0
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in pod["containers"]:
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert container["resources"]["requests"] and container["resources"]["limits"]["memory"]
    volumes = {volume["name"] for volume in pod.get("volumes", [])} | {"data"}
    assert {mount["name"] for part in pod["containers"] for mount in part["volumeMounts"]} <= volumes


def test_no_secret_stands_in_a_manifest() -> None:
    for path in FILES:
        for document in documents(path):
            assert document["kind"] != "Secret", path
        for line in path.read_text(encoding="utf-8").splitlines():
            assert not re.match(r"\s*(- name: \w*(KEY|TOKEN|PASSWORD)\s*value:|password:)", line), line


def test_learners_are_on_demand_and_stateless_roles_on_spot_nodes() -> None:
    labels = {group["groupName"]: group["labels"] for group in find("RayCluster")["spec"]["workerGroupSpecs"]}
    assert labels["learner"]["ray.io/market-type"] == "on-demand"
    assert labels["generation"]["ray.io/market-type"] == labels["judge"]["ray.io/market-type"] == "spot"
    for group in find("RayCluster")["spec"]["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        capacity = group["template"]["spec"]["nodeSelector"]["karpenter.sh/capacity-type"]
        assert capacity == group["labels"]["ray.io/market-type"]


def test_the_state_of_a_cluster_that_stays_outlives_its_head() -> None:
    service = find("Service")["metadata"]["name"]
    for kind in ("RayCluster", "RayService"):
        options = cluster_of(find(kind))["gcsFaultToleranceOptions"]
        assert options["redisAddress"] == f"{service}:6379"
        secret = options["redisPassword"]["valueFrom"]["secretKeyRef"]
        [container] = find("StatefulSet")["spec"]["template"]["spec"]["containers"]
        [variable] = container["env"]
        assert variable["valueFrom"]["secretKeyRef"] == secret


def test_all_nodes_of_a_cluster_mount_the_runs() -> None:
    claim = find("PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for name, pod in pods():
        if name == "redis":
            continue
        [volume] = [item for item in pod["volumes"] if "persistentVolumeClaim" in item]
        assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"], name
        assert {"name": volume["name"], "mountPath": "/runs"}.items() <= {
            key: value
            for mount in pod["containers"][0]["volumeMounts"]
            if mount["name"] == volume["name"]
            for key, value in mount.items()
        }.items()


def test_the_network_policy_covers_every_pod_of_ray() -> None:
    [policy] = [
        document for document in documents(FOLDER / "network_policy.yaml") if document["metadata"]["name"] == "rlhf-ray"
    ]
    chosen = policy["spec"]["podSelector"]["matchLabels"].items()
    for kind in RAY:
        for group in groups(cluster_of(find(kind))):
            assert chosen <= group["template"]["metadata"]["labels"].items()


def test_the_job_runs_a_recipe_that_fits_its_workers() -> None:
    job = find("RayJob")["spec"]
    words = shlex.split(job["entrypoint"])
    assert words[0] == "rlhf"
    parsed = build_parser().parse_args(words[1:])
    recipe = ROOT / Path(parsed.config).relative_to(IMAGE_HOME)
    config = load_run_config(recipe, parsed.overrides)
    assert str(config.directory).startswith("/runs/") and config.ray.address == "auto"
    nodes = [
        NodeCapacity(group["groupName"], float(part["resources"]["requests"]["cpu"]), 0.0)
        for group in job["rayClusterSpec"]["workerGroupSpecs"]
        for part in group["template"]["spec"]["containers"]
        for _ in range(group["replicas"])
    ]
    check_placement(config, config.stages, nodes)
    environment = parse_yaml(job["runtimeEnvYAML"], "runtimeEnvYAML")
    assert environment == {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_GRACE_S)}}


@pytest.mark.filterwarnings("ignore:Using extra keyword arguments")
def test_the_service_is_one_that_ray_serve_can_build() -> None:
    serve_config = yaml.safe_load(find("RayService")["spec"]["serveConfigV2"])
    from ray.serve.schema import ServeDeploySchema

    [application] = ServeDeploySchema(**serve_config).applications
    assert application.import_path == "ray.serve.llm:build_openai_app"
    [model] = application.args["llm_configs"]
    assert model["engine_kwargs"] == {"trust_remote_code": False}
    assert model["model_loading_config"]["model_source"].startswith("/runs/")


# The image


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions, continued lines joined, in order."""
    text = (FOLDER / "Dockerfile").read_text(encoding="utf-8")
    lines = re.sub(r"\\\n", " ", re.sub(r"(?m)^#.*\n", "", text)).splitlines()
    return [(word, rest.strip()) for line in lines if line.strip() for word, _, rest in [line.strip().partition(" ")]]


def test_the_image_has_both_kinds_of_base_and_ends_as_a_user_without_rights() -> None:
    found = instructions()
    stages = [rest.split(" AS ") for word, rest in found if word == "FROM"]
    named = {stage[1]: stage[0] for stage in stages if len(stage) == 2}
    assert named["base-cpu"] == "${CPU_IMAGE}" and named["base-cuda"] == "${CUDA_IMAGE}"
    assert stages[-1] == ["base-${DEVICE}"]
    assert [rest for word, rest in found if word == "USER"] == ["10001:10001"]
    uids = {pod["securityContext"]["runAsUser"] for name, pod in pods() if name != "redis"}
    assert uids == {10001}, "the manifests run the user that the image makes"
    assert "--uid 10001" in next(rest for word, rest in found if word == "RUN" and "useradd" in rest)


def test_the_bases_fit_the_pinned_packages() -> None:
    images = dict(rest.split("=", 1) for word, rest in instructions() if word == "ARG" and "IMAGE=" in rest)
    python = re.match(r"python:3\.(\d+)-", images["CPU_IMAGE"])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert python is not None and f"3.{python[1]}" in ("3.11", "3.12")
    assert project["requires-python"] == ">=3.11,<3.13"
    runtime = re.search(r"^nvidia-cuda-runtime==(\d+\.\d+)", (ROOT / "constraints-cuda.txt").read_text(), re.MULTILINE)
    assert runtime is not None and f"cuda:{runtime[1]}." in images["CUDA_IMAGE"]


def test_everything_that_the_image_copies_is_there_and_not_ignored() -> None:
    allowed = set((FOLDER / "Dockerfile.dockerignore").read_text(encoding="utf-8").split("\n"))
    assert "*" in allowed
    for word, rest in instructions():
        if word == "COPY" and not rest.startswith("--from"):
            *sources, _ = rest.split()
            for source in sources:
                assert (ROOT / source).exists(), source
                assert f"!{source.split('/')[0]}" in allowed, source


def test_the_image_is_set_up_as_any_machine_is() -> None:
    import setup_env

    [run] = [rest for word, rest in instructions() if word == "RUN" and "setup_env.py" in rest]
    assert run == "python3 setup_env.py"
    assert ("ENV", "RLHF_DEVICE=${DEVICE} PIP_NO_CACHE_DIR=1 UV_NO_CACHE=1") in instructions()
    assert setup_env.choose_device("cuda", "", False)[0] == "cuda", "where no GPU is seen while an image is built"
