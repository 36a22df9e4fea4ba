"""Values: what is wrong is refused with its name, and the README lists what there is."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any, get_args

import pytest
import yaml
from chart_support import CHART, ROOT, refusal
from chart_values import WRONG
from pydantic.fields import FieldInfo

from disagg.config import EngineConfig, ModelConfig, RouterConfig, TransferConfig


@pytest.mark.parametrize(("values", "message"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_value_is_refused_with_its_name(values: dict[str, Any], message: str) -> None:
    assert message in refusal(values)


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "helm" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by name.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


values_table = _load("values_table")


def _values() -> str:
    return (CHART / "values.yaml").read_text()


def test_the_table_in_the_readme_is_current() -> None:
    readme = (CHART / "README.md").read_text()
    assert values_table.with_table(readme, _values()) == readme, "run helm/values_table.py"


def test_every_value_has_a_description() -> None:
    assert values_table.undescribed(_values()) == []
    assert values_table.undescribed("a:\n  b: 1\n  # -- C.\n  c: 2\n") == ["a.b"]


def test_a_row_has_path_default_and_the_whole_comment() -> None:
    text = "a:\n  # -- First\n  # second | third.\n  b: [1, 2]  # not this\n# -- Four.\nc: {d: 5}\n"
    found = [(row.path, row.default, row.description) for row in values_table.rows(text)]
    assert found == [("a.b", "[1, 2]", "First second | third."), ("c", '{"d": 5}', "Four.")]
    assert "third" in values_table.table(text) and "\\|" in values_table.table(text)


def test_a_readme_without_the_marks_is_told() -> None:
    with pytest.raises(ValueError, match="marks"):
        values_table.with_table("# Chart", "a: 1")


def _leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, (*path, key))
    else:
        yield path


def _schema_properties(schema: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    node = schema
    for key in path:
        node = node["properties"][key]
        while "$ref" in node:
            node = schema["definitions"][node["$ref"].rpartition("/")[2]]
    return node


def test_the_schema_knows_exactly_the_keys_of_the_values() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load(_values())

    def compare(value: dict[str, Any], path: tuple[str, ...]) -> None:
        node = _schema_properties(schema, path)
        if "properties" not in node:
            return  # free-form: security contexts, selectors, annotations
        known = set(node["properties"]) - ({"global"} if not path else set())
        assert known == set(value), path
        assert node["additionalProperties"] is False, path
        for key, inner in value.items():
            if isinstance(inner, dict):
                compare(inner, (*path, key))

    compare(values, ())


@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("router.policy", RouterConfig.model_fields["policy"]),
        ("transfer.kvTransport", TransferConfig.model_fields["kv_transport"]),
        ("model.dtype", ModelConfig.model_fields["dtype"]),
        ("engine.kernels", EngineConfig.model_fields["kernels"]),
    ],
)
def test_the_schema_offers_the_choices_that_the_program_has(path: str, field: FieldInfo) -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    node = _schema_properties(schema, tuple(path.split(".")))
    assert set(node["enum"]) == set(get_args(field.annotation))


def test_the_contract_s_top_level_keys_are_there() -> None:
    values = yaml.safe_load(_values())
    wanted = {
        "model",
        "prefill",
        "decode",
        "router",
        "frontend",
        "apiKey",
        "metrics",
        "networkPolicy",
        "image",
    }
    assert wanted <= set(values)
    pool = {"replicas", "minReplicas", "maxReplicas", "tensorParallelSize", "resources"}
    assert pool <= set(values["prefill"]) and pool <= set(values["decode"])
    assert {"enabled", "existingSecret"} <= set(values["apiKey"])
    # Two tables that are read side by side.
    assert list(_leaves(values["prefill"])) == list(_leaves(values["decode"]))
