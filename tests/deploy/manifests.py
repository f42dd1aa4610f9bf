"""What a container of deploy/ is started with, read from compose files and Kubernetes manifests alike."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "deploy/compose"
KUBERNETES = ROOT / "deploy/kubernetes"
# What each file is laid over; compose merges the two.
STACKS = (("single.yaml",), ("single.yaml", "single.gpu.yaml"), ("pd.yaml",), ("pd.yaml", "pd.gpu.yaml"))
_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")
_SECONDS = {"s": 1, "m": 60, "h": 3600}


class Probe(NamedTuple):
    """What is asked to see whether a container is well; `kind` as in Kubernetes, `health` in compose."""

    kind: str
    path: str
    port: int


class Container(NamedTuple):
    """One container; `names` are those by which others of its file find it, `check` is compose's command."""

    place: str
    names: tuple[str, ...]
    args: tuple[str, ...]
    environ: Mapping[str, str]
    secrets: frozenset[str]
    probes: tuple[Probe, ...]
    check: tuple[str, ...]
    ports: frozenset[int]
    grace_s: int
    pause_s: int
    num_gpus: int


def compose_documents() -> dict[str, Any]:
    """File name -> content."""
    return {path.name: yaml.safe_load(path.read_text()) for path in sorted(COMPOSE.glob("*.yaml"))}


def kubernetes_documents() -> dict[str, list[Any]]:
    """File name -> its objects."""
    return {
        path.name: list(yaml.safe_load_all(path.read_text())) for path in sorted(KUBERNETES.glob("*.yaml"))
    }


def containers() -> list[Container]:
    """Every container of every file."""
    found = [c for stack in STACKS for c in _of_stack(stack)]
    return found + [c for name, objects in kubernetes_documents().items() for c in _of_objects(name, objects)]


# ---------------------------------------------------------------- compose


def merged(stack: tuple[str, ...]) -> Any:
    """Compose files laid over each other: mappings are joined, all else is replaced."""
    documents = compose_documents()
    whole: Any = {}
    for name in stack:
        whole = _join(whole, documents[name])
    return whole


def _join(below: Any, above: Any) -> Any:
    if isinstance(below, dict) and isinstance(above, dict):
        return below | {key: _join(below.get(key), value) for key, value in above.items()}
    return above


def _of_stack(stack: tuple[str, ...]) -> Iterator[Container]:
    for name, service in merged(stack)["services"].items():
        devices = service.get("deploy", {}).get("resources", {}).get("reservations", {}).get("devices", [])
        asked = re.search(r"http://127\.0\.0\.1:(\d+)(/\w+)", service["healthcheck"]["test"][-1])
        assert asked is not None
        yield Container(
            place=f"compose/{stack[-1]}:{name}",
            names=(name,),
            args=tuple(service["command"]),
            environ={key: _expanded(text) for key, text in service.get("environment", {}).items()},
            secrets=frozenset(f"/run/secrets/{secret}" for secret in service.get("secrets", ())),
            probes=(Probe("health", asked[2], int(asked[1])),),
            check=tuple(service["healthcheck"]["test"][1:]),
            ports=frozenset(int(port.rpartition(":")[2]) for port in service.get("ports", ())),
            grace_s=_seconds(service["stop_grace_period"]),
            pause_s=0,
            num_gpus=sum(len(device["device_ids"]) for device in devices),
        )


def _expanded(text: str) -> str:
    return _VARIABLE.sub(lambda match: match[2] or "", text)


def _seconds(text: str) -> int:
    return int(text[:-1]) * _SECONDS[text[-1]]


# ---------------------------------------------------------------- Kubernetes


def _of_objects(file: str, objects: list[Any]) -> Iterator[Container]:
    settings = {o["metadata"]["name"]: o["data"] for o in objects if o["kind"] == "ConfigMap"}
    services = [o for o in objects if o["kind"] == "Service"]
    for workload in (o for o in objects if o["kind"] == "Deployment"):
        template = workload["spec"]["template"]
        labels, pod = template["metadata"]["labels"], template["spec"]
        for container in pod["containers"]:
            environ: dict[str, str] = {}
            for source in container.get("envFrom", ()):
                environ |= settings[source["configMapRef"]["name"]]
            environ |= {variable["name"]: variable["value"] for variable in container.get("env", ())}
            stop = (
                container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", ["sleep", 0])
            )
            yield Container(
                place=f"kubernetes/{file}:{workload['metadata']['name']}",
                names=tuple(s["metadata"]["name"] for s in services if _selects(s, labels)),
                args=tuple(container["args"]),
                environ=environ,
                secrets=frozenset(_secret_paths(pod, container)),
                probes=tuple(_probes(container)),
                check=(),
                ports=frozenset(port["containerPort"] for port in container["ports"]),
                grace_s=pod["terminationGracePeriodSeconds"],
                pause_s=int(stop[1]),
                num_gpus=int(container["resources"].get("limits", {}).get("nvidia.com/gpu", 0)),
            )


def _selects(service: Any, labels: Mapping[str, str]) -> bool:
    selector: dict[str, str] = service["spec"]["selector"]
    return selector.items() <= labels.items()


def _secret_paths(pod: Any, container: Any) -> Iterator[str]:
    """Files of secrets: what the commands at the head of a file put into each is known to `secret_keys`."""
    kept = {v["name"]: v["secret"]["secretName"] for v in pod["volumes"] if "secret" in v}
    for mount in container["volumeMounts"]:
        if mount["name"] in kept:
            yield from (f"{mount['mountPath']}/{key}" for key in secret_keys(kept[mount["name"]]))


def secret_keys(secret: str) -> set[str]:
    """The keys that `kubectl create secret generic NAME` gets, as the head of a file shows it."""
    found: set[str] = set()
    for path in KUBERNETES.glob("*.yaml"):
        head = path.read_text().replace("\\\n#", "")
        for line in re.findall(rf"kubectl create secret generic {secret} (.*)", head):
            found.update(re.findall(r"--from-literal=(\w+)=", line))
    return found


def _probes(container: Any) -> Iterator[Probe]:
    named = {port["name"]: port["containerPort"] for port in container["ports"]}
    for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
        if kind in container:
            asked = container[kind]["httpGet"]
            yield Probe(kind, asked["path"], named[asked["port"]])
