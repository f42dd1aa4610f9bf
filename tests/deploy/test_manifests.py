"""The manifests of deploy/ are what their schemas allow, and start what our flags mean."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest
from lightkube import codecs

from lightllm.api.routes import ENDPOINTS
from lightllm.cli import parse
from lightllm.config import Config
from lightllm.config_server.app import HEALTH
from lightllm.env import read_environment
from lightllm.resolution import Machine, Resolution, resolve
from lightllm.server.advertise import bind_address
from lightllm.server.supervisor import EXIT_GRACE_S
from tests.deploy.manifests import (
    COMPOSE,
    KUBERNETES,
    ROOT,
    STACKS,
    Container,
    compose_documents,
    containers,
    kubernetes_documents,
    merged,
)

CONTAINERS = containers()
DOCKERFILE = ROOT / "deploy/Dockerfile"


def resolved(container: Container, folder: Path) -> Resolution:
    """What its flags and variables mean, with its secrets in a folder in the place of /run/secrets."""
    for secret in container.secrets:
        file = folder / secret.removeprefix("/run/secrets/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("a secret that is long enough\n".replace(" ", "-"))

    def local(text: str) -> str:
        return text.replace("@/run/secrets", f"@{folder}")

    environ = {name: local(text) for name, text in container.environ.items()}
    machine = Machine(num_cores=8, num_physical_cores=8, num_gpus=container.num_gpus)
    args = parse([local(text) for text in container.args], environ)
    return resolve(args, read_environment(environ, num_cores=8), machine, None)


def test_every_file_is_looked_at() -> None:
    assert {name for stack in STACKS for name in stack} == {path.name for path in COMPOSE.iterdir()}
    assert set(kubernetes_documents()) == {path.name for path in KUBERNETES.iterdir()}
    assert len(CONTAINERS) == 2 * 1 + 2 * 5 + 1 + 4


@pytest.mark.parametrize("path", sorted(COMPOSE.iterdir()), ids=lambda path: path.name)
def test_compose_files_follow_the_compose_specification(path: Path, tmp_path: Path) -> None:
    def check(file: Path) -> int:
        command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
        return subprocess.run([*command, str(file)], capture_output=True, timeout=60).returncode

    assert check(path) == 0
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(path.read_text().replace(" deploy:", " deployed:").replace(" init:", " innit:"))
    assert check(wrong) == 1


def check_object(document: Any) -> None:
    """A Kubernetes object has the fields and types of its kind's schema, and no others."""
    made = codecs.from_dict(document)
    assert without_none(msgspec.to_builtins(made)) == document


def without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    return [without_none(item) for item in value] if isinstance(value, list) else value


OBJECTS = [
    pytest.param(document, id=f"{name}:{document['kind']}:{document['metadata']['name']}")
    for name, documents in kubernetes_documents().items()
    for document in documents
]


@pytest.mark.parametrize("document", OBJECTS)
def test_kubernetes_objects_follow_their_schemas(document: Any) -> None:
    check_object(document)


def test_wrong_objects_are_found() -> None:
    [deployment] = [d for d in kubernetes_documents()["single.yaml"] if d["kind"] == "Deployment"]
    text = msgspec.json.encode(deployment).decode()
    for right, wrong in (
        ('"containerPort":8000', '"containerPort":"8000"'),
        ('"enableServiceLinks"', '"serviceLinks"'),
        ('"httpGet":', '"httpget":'),
        ('"terminationGracePeriodSeconds":155', '"terminationGracePeriodSeconds":"155s"'),
    ):
        assert right in text
        with pytest.raises((msgspec.ValidationError, AssertionError)):
            check_object(msgspec.json.decode(text.replace(right, wrong)))


@pytest.mark.parametrize("container", CONTAINERS, ids=lambda container: container.place)
def test_commands_mean_what_they_should(container: Container, tmp_path: Path) -> None:
    resolution = resolved(container, tmp_path)
    config = resolution.config
    assert resolution.not_built == []
    # The one node of compose is published on loopback only, so it needs no key.
    assert [w for w in resolution.warnings if "without --api_key" not in w] == []
    assert config.security.api_key or "single" in container.place
    assert config.security.cluster_token or config.server.run_mode == "normal"
    host, port = bind_address(config)
    assert host == "0.0.0.0"
    assert container.ports <= {port}
    assert {probe.port for probe in container.probes} == {port}
    assert config.parallel.tp == max(1, container.num_gpus)
    computes = config.server.run_mode in ("normal", "prefill", "decode")
    assert container.num_gpus == 0 or computes
    assert (config.engine.device == "cuda") == (container.num_gpus > 0)


@pytest.mark.parametrize("container", CONTAINERS, ids=lambda container: container.place)
def test_a_drain_may_finish(container: Container, tmp_path: Path) -> None:
    config = resolved(container, tmp_path).config
    if config.server.run_mode == "config_server":
        return  # nothing runs there
    assert "--drain_timeout" in " ".join(container.args)
    assert container.grace_s >= container.pause_s + config.server.drain_timeout + 2 * EXIT_GRACE_S


@pytest.mark.parametrize("container", CONTAINERS, ids=lambda container: container.place)
def test_probes_ask_what_the_role_serves(container: Container, tmp_path: Path) -> None:
    mode = resolved(container, tmp_path).config.server.run_mode
    served = set(HEALTH) if mode == "config_server" else {endpoint.path for endpoint in ENDPOINTS}
    paths = {probe.kind: probe.path for probe in container.probes}
    assert set(paths.values()) <= served
    if "health" in paths:
        assert paths == {"health": "/readiness"}
    elif mode == "config_server":
        assert paths == {"livenessProbe": "/liveness", "readinessProbe": "/readiness"}
    else:
        health = {"startupProbe": "/health", "livenessProbe": "/health"}
        assert paths == {**health, "readinessProbe": "/readiness"}


FILES = sorted({container.place.partition(":")[0] for container in CONTAINERS})


@pytest.mark.parametrize("file", [name for name in FILES if "/pd" in name])
def test_roles_find_each_other(file: str, tmp_path: Path) -> None:
    group = [c for c in CONTAINERS if c.place.startswith(f"{file}:")]
    configs: dict[str, Config] = {c.place: resolved(c, tmp_path / c.place).config for c in group}
    modes = {config.server.run_mode for config in configs.values()}
    assert modes == {"config_server", "pd_master", "prefill", "decode"}
    [directory] = [c for c in group if configs[c.place].server.run_mode == "config_server"]
    assert len({config.model.model_dir for config in configs.values()}) == 1
    for place, config in configs.items():
        assert config.config_server.config_server_port == 60088
        if place != directory.place:
            assert config.config_server.config_server_host in directory.names


def test_kubernetes_names_meet() -> None:
    for documents in kubernetes_documents().values():
        pods = [d["spec"]["template"] for d in documents if d["kind"] == "Deployment"]
        for deployment in (d for d in documents if d["kind"] == "Deployment"):
            template = deployment["spec"]["template"]
            assert deployment["spec"]["selector"]["matchLabels"] == template["metadata"]["labels"]
            assert template["spec"]["enableServiceLinks"] is False
            volumes = {volume["name"] for volume in template["spec"]["volumes"]}
            for container in template["spec"]["containers"]:
                assert {mount["name"] for mount in container["volumeMounts"]} == volumes
        for service in (d for d in documents if d["kind"] == "Service"):
            selector = service["spec"]["selector"].items()
            [template] = [pod for pod in pods if selector <= pod["metadata"]["labels"].items()]
            named = {p["name"] for c in template["spec"]["containers"] for p in c["ports"]}
            assert {port["targetPort"] for port in service["spec"]["ports"]} <= named
        assert not [d for d in documents if d["kind"] == "Secret"]  # a secret is made, not copied


def test_compose_names_meet() -> None:
    for stack in STACKS:
        whole = merged(stack)
        for service in whole["services"].values():
            assert set(service.get("depends_on", ())) <= set(whole["services"])
            assert {v.partition(":")[0] for v in service["volumes"]} <= set(whole["volumes"])
            assert set(service.get("secrets", ())) <= set(whole.get("secrets", ()))
            assert (COMPOSE / service["build"]["context"] / service["build"]["dockerfile"]).samefile(
                DOCKERFILE
            )
    assert set(compose_documents()) == {name for stack in STACKS for name in stack}


def test_the_image_has_what_it_needs() -> None:
    text = DOCKERFILE.read_text().replace("\\\n", " ")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    [extras] = re.findall(r'^ARG EXTRAS="(.*)"', text, re.MULTILINE)
    assert set(extras.split(",")) <= set(project["optional-dependencies"])
    [model] = re.findall(r'^ARG MODEL="(.*)"', text, re.MULTILINE)
    assert f"DEFAULT_MODEL := {model}\n" in (ROOT / "Makefile").read_text()
    [entry] = re.findall(r"^ENTRYPOINT (.*)", text, re.MULTILINE)
    assert msgspec.json.decode(entry) == ["python", "-m", "lightllm.server.api_server"]
    [command] = re.findall(r"^CMD (.*)", text, re.MULTILINE)
    parse(msgspec.json.decode(command), {})
    copied = {word for line in re.findall(r"^COPY (.*)", text, re.MULTILINE) for word in line.split()[:-1]}
    assert all((ROOT / name).exists() for name in copied)
    kept = (ROOT / "deploy/Dockerfile.dockerignore").read_text().splitlines()
    assert copied == {line[1:] for line in kept if line.startswith("!")}
