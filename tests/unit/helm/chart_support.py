"""Render the chart with the real `helm`, and check objects against their schemas.

Core objects are checked against Kubernetes' own schemas (package kubernetes-validate). For custom resources
DISAGG_SPECS may name a folder with the CRDs (`kuberay/`, `prometheus-operator/`, `keda/`); without it, small
schemas of what the chart uses stand in.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

ROOT = Path(__file__).resolve().parents[3]
CHART = ROOT / "helm" / "disagg"
EXAMPLES = sorted((CHART / "examples").glob("*.yaml"))
HELM = Path(sys.executable).parent / "helm"
KUBERNETES = "1.31"

Object = dict[str, Any]
Values = dict[str, Any]

_CRD_FILES = {
    "RayService": "kuberay/ray.io_rayservices.yaml",
    "ServiceMonitor": "prometheus-operator/monitoring.coreos.com_servicemonitors.yaml",
    "PodMonitor": "prometheus-operator/monitoring.coreos.com_podmonitors.yaml",
    "PrometheusRule": "prometheus-operator/monitoring.coreos.com_prometheusrules.yaml",
    "ScaledObject": "keda/keda.sh_scaledobjects.yaml",
}


def run_helm(*arguments: str, values: Values | None = None) -> subprocess.CompletedProcess[str]:
    """Run `helm`; values are given on standard input."""
    assert HELM.exists(), f"{HELM} is missing: pip install -e '.[dev]'"
    command = [str(HELM), *arguments]
    if values is not None:
        command += ["--values", "-"]
    text = None if values is None else json.dumps(values)
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=60, check=False)


def render(
    values: Values | None = None, *, files: tuple[Path, ...] = (), chart: Path = CHART, release: str = "t"
) -> list[Object]:
    """Return every object of the release. Raises AssertionError with helm's message."""
    text = json.dumps(values or {})
    # A copy of the chart may change between calls; the chart itself does not.
    rendered = (_render_once if chart == CHART else _render)(text, files, chart, release)
    return [document for document in yaml.load_all(rendered, Loader=_loader()) if document]


def _render(text: str, files: tuple[Path, ...], chart: Path, release: str) -> str:
    flags = [f"--values={file}" for file in files]
    done = run_helm("template", release, str(chart), "--namespace", "llm", *flags, values=json.loads(text))
    assert done.returncode == 0, done.stderr
    return done.stdout


_render_once = functools.cache(_render)


def refusal(values: Values) -> str:
    """Return helm's message for values that it must not take."""
    done = run_helm("template", "t", str(CHART), values=values)
    assert done.returncode != 0, "helm took these values"
    return done.stderr


def of_kind(objects: list[Object], kind: str) -> list[Object]:
    return [item for item in objects if item["kind"] == kind]


def the(objects: list[Object], kind: str, name: str | None = None) -> Object:
    """Return the one object of a kind (and name)."""
    found = [item for item in of_kind(objects, kind) if name in (None, item["metadata"]["name"])]
    assert len(found) == 1, [item["metadata"]["name"] for item in of_kind(objects, kind)]
    return found[0]


def serve_config(objects: list[Object]) -> Object:
    """Return what stands in the RayService's serveConfigV2."""
    config: Object = yaml.safe_load(the(objects, "RayService")["spec"]["serveConfigV2"])
    return config


def pod_templates(objects: list[Object]) -> dict[str, Object]:
    """Return the pod template of each Ray group by the group's name."""
    cluster = the(objects, "RayService")["spec"]["rayClusterConfig"]
    groups = {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
    return {"head": cluster["headGroupSpec"]["template"], **groups}


def pod_specs(objects: list[Object]) -> Iterator[tuple[str, Object]]:
    """Yield (name, pod spec) of all pods that the release makes, hooks included."""
    for name, template in pod_templates(objects).items():
        yield name, template["spec"]
    for item in objects:
        if item["kind"] == "Pod":
            yield item["metadata"]["name"], item["spec"]
        elif item["kind"] == "Deployment":
            yield item["metadata"]["name"], item["spec"]["template"]["spec"]


# -- schemas ---------------------------------------------------------------------------------------


def check_object(item: Object) -> None:
    """Raise jsonschema.ValidationError, or ValueError for a kind of which nothing is known."""
    _check_text(json.dumps(item, sort_keys=True))


@functools.cache
def _check_text(text: str) -> None:
    item = json.loads(text)
    kind = item["kind"]
    if kind in _CRD_FILES:
        _crd_validator(kind, item["apiVersion"].partition("/")[2]).validate(item)
    elif kind == "HTTPRoute":
        jsonschema.Draft202012Validator(_SMALL["HTTPRoute"]).validate(item)
    else:
        # The program's own types are strict: fields that Kubernetes would drop are mistakes.
        kubernetes_validate.validate(item, KUBERNETES, strict=True)


@functools.cache
def _crd_validator(kind: str, version: str) -> jsonschema.Draft202012Validator:
    folder = os.environ.get("DISAGG_SPECS")
    if folder is None:
        return jsonschema.Draft202012Validator(_SMALL[kind])
    crd = yaml.load((Path(folder) / _CRD_FILES[kind]).read_text(), Loader=_loader())
    for offered in crd["spec"]["versions"]:
        if offered["name"] == version:
            return jsonschema.Draft202012Validator(_strict(offered["schema"]["openAPIV3Schema"]))
    raise ValueError(f"{kind} has no version {version}")


def _loader() -> Any:
    # The C loader takes a second for a CRD of a megabyte, the Python one ten.
    return getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def _strict(schema: Any, *, top: bool = True) -> Any:
    """Return JSON Schema from a CRD's: unknown fields, which Kubernetes would drop, are errors."""
    if isinstance(schema, list):
        return [_strict(item, top=False) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    new = {
        key: {name: _strict(inner, top=False) for name, inner in value.items()}
        if key == "properties"
        else _strict(value, top=False)
        for key, value in schema.items()
        if not key.startswith("x-")
    }
    open_ended = schema.get("x-kubernetes-preserve-unknown-fields") or schema.get(
        "x-kubernetes-embedded-resource"
    )
    if "properties" in new and not open_ended and "additionalProperties" not in new:
        new["additionalProperties"] = False
    if top:
        # A CRD says nothing about what the API server itself checks.
        new["properties"] |= {
            "apiVersion": {"type": "string"},
            "metadata": {"type": "object", "required": ["name"]},
        }
    return new


def _object(required: list[str], **properties: Any) -> Object:
    return {
        "type": "object",
        "required": required,
        "properties": properties,
        "additionalProperties": False,
    }


def _resource(spec: Object) -> Object:
    return _object(
        ["apiVersion", "kind", "metadata", "spec"],
        apiVersion={"type": "string"},
        kind={"type": "string"},
        metadata={"type": "object", "required": ["name"]},
        spec=spec,
    )


_TEXT: Object = {"type": "string"}
_COUNT: Object = {"type": "integer", "minimum": 0}
_TEXTS: Object = {"type": "object", "additionalProperties": _TEXT}
_ANY: Object = {"type": "object"}
_POD = _object(["spec"], metadata=_ANY, spec={"type": "object", "required": ["containers"]})
_RELABELINGS: Object = {
    "type": "array",
    "items": _object(
        [], sourceLabels={"type": "array"}, targetLabel=_TEXT, replacement=_TEXT, action=_TEXT, regex=_TEXT
    ),
}
_ENDPOINT = _object(
    ["port"],
    **{name: _TEXT for name in ("port", "path", "interval", "scrapeTimeout")},
    authorization=_ANY,
    relabelings=_RELABELINGS,
)
_SMALL: dict[str, Object] = {
    "RayService": _resource(
        _object(
            ["serveConfigV2", "rayClusterConfig"],
            serveConfigV2=_TEXT,
            excludeHeadPodFromServeSvc={"type": "boolean"},
            rayClusterDeletionDelaySeconds=_COUNT,
            upgradeStrategy=_object(["type"], type=_TEXT, clusterUpgradeOptions=_ANY),
            serveService=_ANY,
            rayClusterConfig=_object(
                ["headGroupSpec", "workerGroupSpecs", "rayVersion"],
                rayVersion=_TEXT,
                authOptions=_object([], mode={"enum": ["disabled", "token"]}, secretName=_TEXT),
                enableInTreeAutoscaling={"type": "boolean"},
                autoscalerOptions=_ANY,
                gcsFaultToleranceOptions=_ANY,
                headGroupSpec=_object(
                    ["template", "rayStartParams"], template=_POD, rayStartParams=_TEXTS, serviceType=_TEXT
                ),
                workerGroupSpecs={
                    "type": "array",
                    "items": _object(
                        ["groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"],
                        groupName=_TEXT,
                        replicas=_COUNT,
                        minReplicas=_COUNT,
                        maxReplicas=_COUNT,
                        rayStartParams=_TEXTS,
                        template=_POD,
                    ),
                },
            ),
        )
    ),
    "ServiceMonitor": _resource(
        _object(
            ["selector", "endpoints"],
            selector=_ANY,
            namespaceSelector=_ANY,
            endpoints={"type": "array", "minItems": 1, "items": _ENDPOINT},
        )
    ),
    "PodMonitor": _resource(
        _object(
            ["selector", "podMetricsEndpoints"],
            selector=_ANY,
            namespaceSelector=_ANY,
            podMetricsEndpoints={"type": "array", "minItems": 1, "items": _ENDPOINT},
        )
    ),
    "PrometheusRule": _resource(
        _object(
            ["groups"],
            groups={
                "type": "array",
                "minItems": 1,
                "items": {"type": "object", "required": ["name", "rules"]},
            },
        )
    ),
    "ScaledObject": _resource(
        _object(
            ["scaleTargetRef", "triggers"],
            scaleTargetRef=_object(["name"], name=_TEXT),
            minReplicaCount=_COUNT,
            maxReplicaCount=_COUNT,
            triggers={
                "type": "array",
                "minItems": 1,
                "items": _object(["type", "metadata"], type=_TEXT, metadata=_TEXTS),
            },
        )
    ),
    # The Gateway API's CRDs are in no package; this much of them is used.
    "HTTPRoute": _resource(
        _object(
            ["parentRefs", "rules"],
            parentRefs={
                "type": "array",
                "minItems": 1,
                "items": _object(["name"], name=_TEXT, namespace=_TEXT, sectionName=_TEXT),
            },
            hostnames={"type": "array", "items": _TEXT},
            rules={
                "type": "array",
                "items": _object(
                    ["backendRefs"],
                    matches={"type": "array"},
                    timeouts=_object([], request=_TEXT),
                    backendRefs={
                        "type": "array",
                        "items": _object(["name", "port"], name=_TEXT, port={"type": "integer"}),
                    },
                ),
            },
        )
    ),
}
