"""The union of several processes' Prometheus expositions, and the same numbers under vLLM's names.

Works on lines rather than on parsed families: all of it was written by prometheus_client, and the front end
that merges is also carrying streams (a thousand workers' lines cost some 100 ms parsed, and a tenth so).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

_SAMPLE = re.compile(r"^([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})? (\S+)$")
_ROLE = re.compile(r'(?:^|,)role="([^"]*)"')
_OUTCOME = re.compile(r'(?:^|,)outcome="([^"]*)"')


@dataclass(slots=True)
class Family:
    """One metric: its HELP and TYPE lines, and its samples as lines without line ends."""

    name: str
    header: list[str] = field(default_factory=list)
    samples: list[str] = field(default_factory=list)


def read_families(exposition: bytes, process: str = "") -> Iterator[Family]:
    """Yield the families of a text exposition, each sample labelled with the process if one is given.

    Times of creation are left out: they double the size, and Prometheus does not need them.
    """
    family = Family("")
    for line in exposition.decode().split("\n"):
        if line.startswith("# HELP "):
            if family.samples:
                yield family
            family = Family(line.split(" ", 3)[2], [line])
        elif line.startswith("# TYPE "):
            family.header.append(line)
        elif line and not line.startswith("#") and not family.name.endswith("_created"):
            family.samples.append(_with_process(line, process) if process else line)
    if family.samples:
        yield family


def _with_process(line: str, process: str) -> str:
    if "{" not in line:
        name, _, value = line.partition(" ")
        return f'{name}{{process="{process}"}} {value}'
    end = line.rfind("}")
    return f'{line[:end]},process="{process}"{line[end:]}'


def merge_expositions(parts: Iterable[tuple[str, bytes]], *, vllm_model: str | None = None) -> bytes:
    """Return one exposition from (process, exposition) pairs; families of one name are joined.

    Every sample gets a `process` label, so no two processes expose the same series. vllm_model: the model's
    name, to add vLLM's names for what vLLM has too.
    """
    families: dict[str, Family] = {}
    for process, exposition in parts:
        for family in read_families(exposition, process):
            known = families.setdefault(family.name, family)
            if known is not family:
                known.samples.extend(family.samples)
    merged = list(families.values())
    if vllm_model is not None:
        merged += _vllm_aliases(families, vllm_model)
    lines = [line for family in merged for line in (*family.header, *family.samples)]
    return ("\n".join(lines) + "\n").encode()


# -- vLLM's names ----------------------------------------------------------------------------------------

_SAME = {
    "disagg_time_to_first_token_seconds": ("vllm:time_to_first_token_seconds",),
    "disagg_inter_token_latency_seconds": ("vllm:inter_token_latency_seconds",),
    # The older and the newer name of one histogram.
    "disagg_time_per_output_token_seconds": (
        "vllm:time_per_output_token_seconds",
        "vllm:request_time_per_output_token_seconds",
    ),
    "disagg_e2e_request_latency_seconds": ("vllm:e2e_request_latency_seconds",),
    "disagg_request_queue_seconds": ("vllm:request_queue_time_seconds",),
    "disagg_request_prefill_seconds": ("vllm:request_prefill_time_seconds",),
    "disagg_request_decode_seconds": ("vllm:request_decode_time_seconds",),
    "disagg_prompt_tokens_total": ("vllm:prompt_tokens_total",),
    "disagg_generation_tokens_total": ("vllm:generation_tokens_total",),
    "disagg_preemptions_total": ("vllm:num_preemptions_total",),
}
_PREFIX_CACHE = {
    "disagg_prefix_cache_queries_total": "vllm:prefix_cache_queries_total",
    "disagg_prefix_cache_hits_total": "vllm:prefix_cache_hits_total",
}
_FINISHED = ("stop", "length", "abort")


def _vllm_aliases(families: dict[str, Family], model: str) -> Iterator[Family]:
    """Yield vLLM's families. Counters and histograms stay one series a process, since a sum over processes
    would fall when one leaves and look like a restart; gauges are one series for the whole cluster, since
    gateways read only one.
    """
    label = f'model_name="{_escaped(model)}",engine="0"'
    for name, aliases in _SAME.items():
        for alias in aliases:
            yield from _renamed(families, name, alias, label)
    for name, alias in _PREFIX_CACHE.items():
        # Decode looks every request up once more; prompts are counted where they are prefilled.
        yield from _renamed(families, name, alias, label, lambda labels: _role(labels) != "decode")
    yield from _finished_requests(families, label)
    for state in ("running", "waiting"):
        values = _values(families, f"disagg_num_requests_{state}", lambda labels: True)
        yield _gauge(f"vllm:num_requests_{state}", f"Requests {state}, all workers.", label, sum(values))
    usage = "disagg_kv_cache_usage_ratio"
    decoding = _values(families, usage, lambda labels: _role(labels) != "prefill")
    fullest = max(decoding or _values(families, usage, lambda labels: True), default=0.0)
    for alias in ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"):
        yield _gauge(alias, "KV use of the fullest decode worker, 0 to 1.", label, fullest)


def _renamed(
    families: dict[str, Family],
    name: str,
    alias: str,
    label: str,
    keep: Callable[[str], bool] = lambda labels: True,
) -> Iterator[Family]:
    source = families.get(name)
    if source is None:
        return
    header = [line.replace(f" {name} ", f" {alias} ", 1) for line in source.header]
    samples = [
        f"{line[: len(name)].replace(name, alias)}{line[len(name) :].replace('{', '{' + label + ',', 1)}"
        for line in source.samples
        if keep(line[line.find("{") + 1 :])
    ]
    yield Family(alias, header, samples)


def _finished_requests(families: dict[str, Family], label: str) -> Iterator[Family]:
    source = families.get("disagg_requests_total")
    if source is None:
        return
    alias = "vllm:request_success_total"
    samples = []
    for line in source.samples:
        outcome = _OUTCOME.search(line.partition("{")[2])
        if outcome is not None and outcome[1] in _FINISHED:
            tail = line.partition("{")[2].replace(outcome[0].lstrip(","), f'finished_reason="{outcome[1]}"')
            samples.append(f"{alias}{{{label},{tail}")
    header = [f"# HELP {alias} Requests that ended, by reason.", f"# TYPE {alias} counter"]
    yield Family(alias, header, samples)


def _values(families: dict[str, Family], name: str, keep: Callable[[str], bool]) -> list[float]:
    matches = (_SAMPLE.match(line) for line in families.get(name, Family(name)).samples)
    return [float(match[3]) for match in matches if match is not None and keep(match[2] or "")]


def _gauge(name: str, text: str, label: str, value: float) -> Family:
    header = [f"# HELP {name} {text}", f"# TYPE {name} gauge"]
    return Family(name, header, [f"{name}{{{label}}} {float(value)}"])


def _role(labels: str) -> str:
    match = _ROLE.search(labels)
    return "" if match is None else match[1]


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
