"""Configuration: files, dotted keys and flags end in one frozen object, and bad keys are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from disagg.config import EngineConfig, expand_dotted, load_config, parse_config
from disagg.errors import ConfigError
from disagg.types import Role

ROOT = Path(__file__).resolve().parents[2]


def test_defaults_are_one_worker_each() -> None:
    config = parse_config({})
    assert [config.pool(role).replicas for role in Role] == [1, 1, 0]
    assert config.model.name == "disagg-tiny"
    assert config.frontend.host == "127.0.0.1"


TLS = {"certificate": "c.pem", "key": "k.pem", "ca": "ca.pem"}


@pytest.mark.parametrize(
    ("data", "param"),
    [
        ({"prefil": {}}, "prefil"),
        ({"prefill": {"replicas": -1}}, "prefill.replicas"),
        ({"engine": {"block_size": "many"}}, "engine.block_size"),
        ({"engine": {"kv_cache_memory": 1.5}}, "engine.kv_cache_memory"),
        ({"engine": {"kv_cache_memory": 0}}, "engine.kv_cache_memory"),
        ({"frontend": {"port": 70000}}, "frontend.port"),
        ({"frontend": {"api_key": "  "}}, "frontend.api_key"),
        ({"frontend": {"api_key": "k", "api_key_file": "f"}}, "frontend"),
        ({"network": {"host": ""}}, "network.host"),
        ({"prefill": {"resources": {"GPU": 1}}}, "prefill.resources"),
        ({"router": {"resources": {"slot": 0}}}, "router.resources"),
        ({"transfer": {"kv_transport": "pigeon"}}, "transfer.kv_transport"),
        ({"transfer": {"kv_transport": "nixl"}, "tls": TLS}, "kv_transport"),
        ({"transfer": {"kv_transport": "nccl"}, "tls": TLS}, "kv_transport"),
        ({"model": {"quantization": "int3"}}, "model.quantization"),
        ({"decode": {"tensor_parallel_size": 0}}, "decode.tensor_parallel_size"),
        ({"decode": {"tensor_parallel_size": 2}, "model": {"quantization": "int8"}}, "quantization"),
    ],
)
def test_bad_values_are_named(data: dict[str, Any], param: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(data)
    assert caught.value.param == param


def test_dotted_keys_become_nested_and_meet_nested_ones() -> None:
    data = expand_dotted({"prefill.replicas": 2, "engine": {"block_size": 32}, "engine.max_num_seqs": 8})
    assert data == {"prefill": {"replicas": 2}, "engine": {"block_size": 32, "max_num_seqs": 8}}


def test_a_value_that_is_a_folder_too_is_refused() -> None:
    with pytest.raises(ConfigError):
        expand_dotted({"prefill": 2, "prefill.replicas": 2})


def test_memory_is_bytes_or_a_fraction() -> None:
    assert EngineConfig(kv_cache_memory=0.5).kv_cache_memory == 0.5
    assert EngineConfig(kv_cache_memory=1e9).kv_cache_memory == 10**9


def test_a_pool_overrides_the_common_budget() -> None:
    config = parse_config({"prefill": {"max_num_batched_tokens": 2048}})
    assert config.engine_for(Role.PREFILL).max_num_batched_tokens == 2048
    assert config.engine_for(Role.DECODE).max_num_batched_tokens == 512


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing\.yaml"):
        load_config(tmp_path / "missing.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="mapping"):
        load_config(tmp_path / "list.yaml")


def test_the_serve_example_is_a_valid_configuration() -> None:
    example = yaml.safe_load((ROOT / "deploy" / "serve.yaml").read_text())
    parse_config(expand_dotted(example["applications"][0]["args"]))


def test_an_api_key_is_not_printed() -> None:
    assert "sesame" not in repr(parse_config({"frontend": {"api_key": "sesame"}}))


def test_the_key_of_a_file_is_read_without_its_line_end_and_kept_out_of_repr(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("sesame\n")
    front = parse_config({"frontend": {"api_key_file": str(tmp_path / "key")}}).frontend
    assert front.with_key_read().api_key == "sesame"
    assert "sesame" not in repr(front.with_key_read())


@pytest.mark.parametrize("content", [None, "", " \n", b"\xff\xfe"])
def test_a_key_file_without_a_key_is_refused_rather_than_serving_everyone(
    tmp_path: Path, content: str | bytes | None
) -> None:
    path = tmp_path / "key"
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ConfigError) as error:
        parse_config({"frontend": {"api_key_file": str(path)}}).frontend.with_key_read()
    assert error.value.param == "api_key_file"


def test_without_a_key_file_the_front_end_stays_as_it_is() -> None:
    front = parse_config({"frontend": {"api_key": "sesame"}}).frontend
    assert front.with_key_read() is front
