"""What the chart makes: valid objects, a configuration that the program takes, pods that are locked down."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from chart_support import (
    CHART,
    EXAMPLES,
    check_object,
    of_kind,
    pod_specs,
    pod_templates,
    render,
    run_helm,
    serve_config,
    the,
)
from chart_values import VARIED

from disagg.config import AdmissionConfig, ClusterConfig, SLOConfig, parse_config

_cases = [pytest.param(values, (), id=name) for name, values in VARIED.items()] + [
    pytest.param({}, (path,), id=path.name) for path in EXAMPLES
]


@pytest.mark.parametrize(("values", "files"), _cases)
def test_every_object_is_valid_and_locked_down(values: dict[str, Any], files: tuple[Path, ...]) -> None:
    objects = render(values, files=files)
    for item in objects:
        check_object(item)
        assert len(item["metadata"]["name"]) <= 63
    names = [(item["kind"], item["metadata"]["name"]) for item in objects]
    assert len(names) == len(set(names))
    for name, spec in pod_specs(objects):
        _check_pod(name, spec)
    _check_references(objects)


def _check_pod(name: str, spec: dict[str, Any]) -> None:
    assert spec["securityContext"]["runAsNonRoot"] is True, name
    head_of_autoscaler = spec["containers"][0]["name"] == "ray-head" and "serviceAccountName" not in spec
    assert spec["automountServiceAccountToken"] is head_of_autoscaler, name
    volumes = {volume["name"] for volume in spec.get("volumes", [])}
    for container in [*spec.get("initContainers", []), *spec["containers"]]:
        assert container["securityContext"]["readOnlyRootFilesystem"] is True, name
        assert container["resources"], name
        mounts = {mount["name"] for mount in container.get("volumeMounts", [])}
        assert mounts <= volumes, name
    used = {
        mount["name"]
        for container in [*spec.get("initContainers", []), *spec["containers"]]
        for mount in container.get("volumeMounts", [])
    }
    assert volumes == used, name


def _check_references(objects: list[dict[str, Any]]) -> None:
    """Everything of the release that an object names is there."""
    made = {(item["kind"], item["metadata"]["name"]) for item in objects}
    for _, spec in pod_specs(objects):
        for volume in spec.get("volumes", []):
            if "configMap" in volume:
                assert ("ConfigMap", volume["configMap"]["name"]) in made
    for scaled in of_kind(objects, "ScaledObject"):
        assert ("Deployment", scaled["spec"]["scaleTargetRef"]["name"]) in made


@pytest.mark.parametrize(("values", "files"), _cases)
def test_the_program_takes_the_serve_config(values: dict[str, Any], files: tuple[Path, ...]) -> None:
    objects = render(values, files=files)
    (application,) = serve_config(objects)["applications"]
    assert application["import_path"] == "disagg.frontend.app:build"
    config = parse_config(application["args"])
    # On several nodes loopback reaches nobody.
    assert config.network.host == "auto"
    # Every actor takes what exactly one group offers.
    offered = _offered_resources(objects)
    for group, resources in {
        "head": config.router.resources,
        "frontend": config.frontend.resources,
        "prefill": config.prefill.resources,
        "decode": config.decode.resources,
    }.items():
        (name,) = resources
        assert [other for other, offers in offered.items() if name in offers] == [group]
        assert resources[name] <= offered[group][name]


def _offered_resources(objects: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    cluster = the(objects, "RayService")["spec"]["rayClusterConfig"]
    groups = {"head": cluster["headGroupSpec"]}
    groups |= {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    # KubeRay pastes the parameter into a shell command, hence a string in a string.
    return {
        name: json.loads(json.loads(group["rayStartParams"]["resources"])) for name, group in groups.items()
    }


def config_of(values: dict[str, Any]) -> ClusterConfig:
    return parse_config(serve_config(render(values))["applications"][0]["args"])


def test_each_value_reaches_the_configuration() -> None:
    config = config_of(
        {
            "model": {
                "source": "volume",
                "path": "qwen3",
                "servedModelName": "mine",
                "dtype": "bfloat16",
                "maxModelLen": 32768,
                "quantization": "int8",
            },
            "engine": {
                "blockSize": 32,
                "maxNumSeqs": 7,
                "maxNumBatchedTokens": 300,
                "kvCacheMemory": 0.5,
                "maxWaiting": 9,
                "enablePrefixCaching": False,
                "kernels": "torch",
            },
            "transfer": {"kvTransport": "grpc", "leaseSeconds": 2.5, "pullTimeoutSeconds": 4},
            "prefill": {"replicas": 3, "threads": 5, "pinThreads": True, "maxNumBatchedTokens": 4096},
            "decode": {"replicas": 2, "gpu": {"enabled": True}},
            "router": {
                "policy": "round_robin",
                "heartbeatSeconds": 0.25,
                "deadAfterSeconds": 2,
                "maxResumes": 1,
            },
            "frontend": {
                "replicas": 4,
                "port": 8001,
                "grpcPort": 9001,
                "maxBodyBytes": 2048,
                "requestTimeoutSeconds": 30,
            },
        }
    )
    model: dict[str, Any] = {"path": "/models/qwen3", "served_model_name": "mine", "dtype": "bfloat16"}
    model |= {"max_model_len": 32768, "quantization": "int8"}
    assert model.items() <= config.model.model_dump().items()
    engine = {
        "block_size": 32,
        "max_num_seqs": 7,
        "max_num_batched_tokens": 300,
        "kv_cache_memory": 0.5,
        "max_waiting": 9,
        "enable_prefix_caching": False,
        "kernels": "torch",
    }
    assert engine.items() <= config.engine.model_dump().items()
    assert config.transfer.kv_transport == "grpc"
    assert (config.transfer.lease_s, config.transfer.pull_timeout_s) == (2.5, 4)
    assert (config.prefill.replicas, config.prefill.threads, config.prefill.pin_threads) == (3, 5, True)
    assert config.prefill.max_num_batched_tokens == 4096
    assert (config.decode.replicas, config.decode.num_gpus, config.prefill.num_gpus) == (2, 1, 0)
    router = config.router
    assert (router.policy, router.heartbeat_s, router.dead_after_s) == ("round_robin", 0.25, 2)
    assert router.max_resumes == 1
    front = config.frontend
    assert (front.replicas, front.port, front.grpc_port) == (4, 8001, 9001)
    assert (front.max_body_bytes, front.request_timeout_s) == (2048, 30)


def test_objectives_and_admission_reach_the_program() -> None:
    objects = render(VARIED["objectives and admission"])
    config = parse_config(serve_config(objects)["applications"][0]["args"])
    assert (config.slo.ttft_s, config.slo.tpot_s) == (1, 0.05)
    assert config.admission == AdmissionConfig(
        max_queue=64,
        max_wait_s=5,
        tier_max_wait_s={"flex": 300, "priority": 2.5},
        backlog_s=0,
        reserve=0.5,
        tenant_weights={"acme": 3},
    )


def test_the_chart_s_own_objectives_and_admission_are_the_program_s() -> None:
    config = parse_config(serve_config(render({}))["applications"][0]["args"])
    assert (config.slo, config.admission) == (SLOConfig(), AdmissionConfig())


def test_bounds_of_a_pool_are_those_of_its_group() -> None:
    objects = render(VARIED["our autoscaler"])
    config = parse_config(serve_config(objects)["applications"][0]["args"])
    assert (config.autoscaler.enabled, config.autoscaler.max_workers) == (True, 12)
    assert config.autoscaler.slo_ttft_s == 0.5
    groups = the(objects, "RayService")["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    decode = next(group for group in groups if group["groupName"] == "decode")
    assert (decode["minReplicas"], decode["maxReplicas"]) == (1, 8)
    assert (config.decode.min_replicas, config.decode.max_replicas) == (1, 8)


@pytest.mark.parametrize(
    ("resources", "threads"),
    [
        ({"requests": {"cpu": "1"}, "limits": {"cpu": "6"}}, 6),
        ({"limits": {"cpu": "2500m"}}, 2),
        ({"limits": {"cpu": "300m"}}, 1),
        ({"requests": {"cpu": 3}, "limits": None}, 3),
        ({"requests": None, "limits": None}, 1),
    ],
)
def test_a_worker_has_as_many_threads_as_its_pod_has_cores(resources: dict[str, Any], threads: int) -> None:
    assert config_of({"decode": {"resources": resources}}).decode.threads == threads


def test_further_configuration_lies_over_what_the_chart_made() -> None:
    config = config_of({"extraConfig": {"engine": {"num_kv_blocks": 99}, "transfer": {"lease_s": 1}}})
    assert (config.engine.num_kv_blocks, config.engine.block_size) == (99, 16)
    assert config.transfer.lease_s == 1


def test_a_large_cache_is_not_written_in_scientific_notation() -> None:
    assert config_of({"engine": {"kvCacheMemory": 137438953472}}).engine.kv_cache_memory == 137438953472


def test_a_gpu_pool_asks_for_its_gpus_on_nodes_of_its_type() -> None:
    gpu = {"enabled": True, "product": "NVIDIA-H100-80GB-HBM3"}
    objects = render({"prefill": {"gpu": gpu, "tensorParallelSize": 4, "nodeSelector": {"pool": "fast"}}})
    spec = pod_templates(objects)["prefill"]["spec"]
    assert spec["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 4
    assert spec["nodeSelector"] == {"pool": "fast", "nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}
    assert serve_config(objects)["applications"][0]["args"]["prefill"]["num_gpus"] == 4
    assert "nodeSelector" not in pod_templates(objects)["decode"]["spec"]


def test_any_change_of_the_configuration_makes_a_new_ray_cluster_and_nothing_else_does() -> None:
    def cluster(values: dict[str, Any]) -> Any:
        return the(render(values), "RayService")["spec"]["rayClusterConfig"]

    # Pools read their configuration once, so KubeRay must see a changed pod template.
    assert cluster({}) == cluster({})
    assert cluster({})["headGroupSpec"] != cluster({"engine": {"maxNumSeqs": 65}})["headGroupSpec"]
    assert cluster({}) == cluster({"metrics": {"serviceMonitor": {"enabled": True}}})


def test_the_api_key_is_nowhere_but_in_its_secret_and_only_front_ends_mount_it() -> None:
    objects = render({})
    secret = the(objects, "Secret")
    assert secret["metadata"]["name"] == "t-disagg-api-key"
    (key,) = secret["data"].values()
    rest = json.dumps([item for item in objects if item is not secret])
    assert key not in rest
    mounting = {name for name, spec in pod_specs(objects) if "t-disagg-api-key" in json.dumps(spec)}
    assert mounting == {"frontend", "t-disagg-check"}


def test_a_secret_of_the_operator_is_used_and_none_is_made() -> None:
    objects = render({"apiKey": {"existingSecret": "mine", "key": "the.key"}})
    assert not of_kind(objects, "Secret")
    volume = next(v for v in pod_templates(objects)["frontend"]["spec"]["volumes"] if v["name"] == "api-key")
    assert volume["secret"]["secretName"] == "mine"
    assert volume["secret"]["items"] == [{"key": "the.key", "path": "api-key"}]


def test_without_a_key_nothing_asks_for_one() -> None:
    assert "api-key" not in json.dumps(render({"apiKey": {"enabled": False}}))


def test_probes_of_front_ends_ask_ready_then_health_and_those_of_workers_their_raylet() -> None:
    templates = pod_templates(render({"frontend": {"startupTimeoutSeconds": 95}}))
    container = templates["frontend"]["spec"]["containers"][0]
    asked = {name: container[name]["exec"]["command"][-1] for name in container if name.endswith("Probe")}
    assert asked == {
        "startupProbe": "http://127.0.0.1:8000/ready",
        "livenessProbe": "http://127.0.0.1:8000/health",
        "readinessProbe": "http://127.0.0.1:8000/health",
    }
    startup = container["startupProbe"]
    assert startup["failureThreshold"] * startup["periodSeconds"] >= 95
    for name in ("prefill", "decode", "head"):
        container = templates[name]["spec"]["containers"][0]
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            assert "http://127.0.0.1:52365/api/local_raylet_healthz" in container[probe]["exec"]["command"]


def test_the_hub_token_is_seen_by_the_download_only() -> None:
    values = VARIED["gated model"]
    for name, spec in pod_specs(render(values)):
        assert "HF_TOKEN" not in json.dumps(spec["containers"]), name
        has_token = "HF_TOKEN" in json.dumps(spec.get("initContainers", []))
        assert has_token is (name in ("frontend", "prefill", "decode"))


def test_the_model_is_writable_for_the_download_only() -> None:
    for values in (VARIED["gated model"], VARIED["model on a volume"]):
        for name in ("frontend", "prefill", "decode"):
            spec = pod_templates(render(values))[name]["spec"]
            mounts = {mount["name"]: mount for mount in spec["containers"][0]["volumeMounts"]}
            assert mounts["models"]["readOnly"] is True


def test_every_process_of_ours_has_the_certificates() -> None:
    objects = render(VARIED["tls"])
    tls = parse_config(serve_config(objects)["applications"][0]["args"]).tls
    assert tls is not None and tls.mutual and tls.server_name == "disagg"
    for name, template in pod_templates(objects).items():
        mounts = {mount["name"]: mount for mount in template["spec"]["containers"][0]["volumeMounts"]}
        assert tls.certificate.startswith(mounts["tls"]["mountPath"] + "/"), name


def test_a_claim_of_the_chart_outlives_the_release() -> None:
    claim = the(render(VARIED["model from the hub"]), "PersistentVolumeClaim")
    assert claim["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
    assert not of_kind(render(VARIED["model on a volume"]), "PersistentVolumeClaim")


# -- network ---------------------------------------------------------------------------------------


def test_policies_select_every_ray_pod_and_deny_both_ways() -> None:
    deny = the(render({}), "NetworkPolicy", "t-disagg-deny")["spec"]
    assert deny["policyTypes"] == ["Ingress", "Egress"]
    assert "ingress" not in deny and "egress" not in deny
    templates = pod_templates(render({}))
    wanted = deny["podSelector"]["matchLabels"]
    for name, template in templates.items():
        labels = template["metadata"]["labels"]
        assert wanted.items() <= labels.items()
        assert (
            labels["app.kubernetes.io/component"] in deny["podSelector"]["matchExpressions"][0]["values"]
        ), name


def test_no_policy_has_a_rule_that_admits_everyone() -> None:
    for values in [*VARIED.values()]:
        for policy in of_kind(render(values), "NetworkPolicy"):
            for rule in policy["spec"].get("ingress", []):
                # A rule without peers, or with an empty list of them, is a rule for all of them.
                assert rule.get("from"), policy["metadata"]["name"]
                assert {} not in rule["from"]


def test_ports_of_clients_and_of_the_operator_are_the_only_open_ones() -> None:
    policies = {item["metadata"]["name"]: item["spec"] for item in of_kind(render({}), "NetworkPolicy")}
    clients = policies["t-disagg-clients"]
    assert clients["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "frontend"
    assert [[port["port"] for port in rule["ports"]] for rule in clients["ingress"]] == [[8000, 9000], [8000]]
    assert [port["port"] for port in policies["t-disagg-operator"]["ingress"][0]["ports"]] == [8265, 8000]


def test_redis_and_the_api_server_are_reached_from_the_head_only() -> None:
    policy = the(render(VARIED["redis with tls and a user"]), "NetworkPolicy", "t-disagg-head")["spec"]
    assert policy["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "head"
    assert policy["egress"] == [
        {"ports": [{"protocol": "TCP", "port": 6380}], "to": [{"ipBlock": {"cidr": "192.0.2.1/32"}}]}
    ]


# -- metrics ---------------------------------------------------------------------------------------


def test_all_front_ends_become_one_target_with_the_key() -> None:
    objects = render({"metrics": {"serviceMonitor": {"enabled": True}}})
    monitor = the(objects, "ServiceMonitor")["spec"]
    service = the(objects, "Service")
    assert monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    (endpoint,) = monitor["endpoints"]
    assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
    relabelled = {rule["targetLabel"]: rule for rule in endpoint["relabelings"] if "targetLabel" in rule}
    assert relabelled["__address__"]["replacement"] == "t-disagg-serve-svc.llm.svc:8000"
    assert endpoint["authorization"]["credentials"] == {"name": "t-disagg-api-key", "key": "api-key"}


@pytest.fixture
def chart_copy(tmp_path: Path) -> Path:
    """A copy of the chart, without whatever dashboards and rules it has."""
    copy = tmp_path / "disagg"
    shutil.copytree(CHART, copy)
    for folder in ("dashboards", "rules"):
        shutil.rmtree(copy / folder, ignore_errors=True)
    return copy


_ALL = {"metrics": {name: {"enabled": True} for name in ("prometheusRule", "dashboards")}}


def test_without_dashboards_and_rules_there_are_no_objects_of_them(chart_copy: Path) -> None:
    objects = render(_ALL, chart=chart_copy)
    assert not of_kind(objects, "PrometheusRule")
    assert [item["metadata"]["name"] for item in of_kind(objects, "ConfigMap")] == ["t-disagg-scripts"]


def test_dashboards_and_rules_are_mounted_as_they_are(chart_copy: Path) -> None:
    (chart_copy / "dashboards").mkdir()
    (chart_copy / "rules").mkdir()
    # Braces in both mean something to Prometheus and Grafana, and must mean nothing to Helm.
    dashboard = {"title": "{{role}}", "uid": "x"}
    (chart_copy / "dashboards" / "over_view.json").write_text(json.dumps(dashboard))
    rule = {"alert": "A", "expr": "up == 0", "annotations": {"summary": "{{ $labels.role }} is down"}}
    for name in ("a", "b"):
        (chart_copy / "rules" / f"{name}.yaml").write_text(
            json.dumps({"groups": [{"name": name, "rules": [rule]}]})
        )
    objects = render(_ALL, chart=chart_copy)
    config_map = the(objects, "ConfigMap", "t-disagg-over-view")
    assert json.loads(config_map["data"]["over_view.json"]) == dashboard
    assert config_map["metadata"]["labels"]["grafana_dashboard"] == "1"
    groups = the(objects, "PrometheusRule")["spec"]["groups"]
    assert [group["name"] for group in groups] == ["a", "b"]
    assert groups[0]["rules"] == [rule]
    for item in objects:
        check_object(item)


# -- the rest --------------------------------------------------------------------------------------


def test_lint_is_strict_clean_with_every_example() -> None:
    for path in EXAMPLES:
        done = run_helm("lint", "--strict", str(CHART), f"--values={path}")
        assert done.returncode == 0, done.stdout


def test_placeholders_take_the_place_of_a_worker_and_are_not_selected_with_them() -> None:
    objects = render(VARIED["warm capacity"])
    deployment = the(objects, "Deployment")["spec"]
    worker = pod_templates(objects)["prefill"]["spec"]
    placeholder = deployment["template"]["spec"]
    assert placeholder["containers"][0]["resources"] == worker["containers"][0]["resources"]
    assert placeholder["nodeSelector"] == worker["nodeSelector"]
    assert placeholder["priorityClassName"] == the(objects, "PriorityClass")["metadata"]["name"]
    budgets = of_kind(objects, "PodDisruptionBudget")
    labels = deployment["template"]["metadata"]["labels"]
    assert not any(b["spec"]["selector"]["matchLabels"].items() <= labels.items() for b in budgets)


def test_budgets_select_the_pods_of_their_pool() -> None:
    objects = render({})
    templates = pod_templates(objects)
    for budget in of_kind(objects, "PodDisruptionBudget"):
        selector = budget["spec"]["selector"]["matchLabels"]
        chosen = [n for n, t in templates.items() if selector.items() <= t["metadata"]["labels"].items()]
        assert [f"t-disagg-{name}" for name in chosen] == [budget["metadata"]["name"]]


def test_two_releases_in_one_namespace_do_not_meet() -> None:
    one, two = render({}, release="one"), render({}, release="two")
    assert not {(i["kind"], i["metadata"]["name"]) for i in one} & {
        (i["kind"], i["metadata"]["name"]) for i in two
    }


def test_notes_tell_how_to_ask_and_warn_of_what_is_open(chart_copy: Path) -> None:
    # `helm template` leaves the notes out and `helm install` wants a cluster, so an object carries them here.
    shutil.move(chart_copy / "templates" / "NOTES.txt", chart_copy / "notes.txt")
    (chart_copy / "templates" / "notes.yaml").write_text(
        'kind: Notes\nmetadata: {name: notes}\ntext: {{ tpl (.Files.Get "notes.txt") . | quote }}\n'
    )

    def notes(values: dict[str, Any]) -> str:
        text: str = the(render(values, chart=chart_copy), "Notes")["text"]
        return text

    text = notes({})
    assert "svc/t-disagg-serve-svc 8000" in text and "Authorization: Bearer" in text
    assert "WARNING" not in text
    opened = notes(
        {
            "apiKey": {"enabled": False},
            "networkPolicy": {"enabled": False},
            "ray": {"tokenAuth": {"enabled": False}},
        }
    )
    assert opened.count("WARNING") == 3
    assert "Authorization" not in opened
