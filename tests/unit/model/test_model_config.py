from __future__ import annotations

import json

import pytest
from model_support import CASES, LLAMA3, SMALL, YARN

from disagg.errors import ConfigError
from disagg.model.config import RopeSpec, read_spec

LLAMA = {**SMALL, "architectures": ["LlamaForCausalLM"]}


def spec_of(folder, **changes):
    config = {**LLAMA, **changes}
    config = {key: value for key, value in config.items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(config))
    return read_spec(folder)


@pytest.mark.parametrize("name", CASES)
def test_what_transformers_saves_is_read(checkpoint, name):
    model, folder = checkpoint(name)
    spec, theirs = read_spec(folder), model.config
    assert spec.num_kv_heads == theirs.num_key_value_heads
    assert spec.head_dim == getattr(theirs, "head_dim", 12)
    assert spec.tie_word_embeddings == theirs.tie_word_embeddings
    assert spec.rms_norm_eps == theirs.rms_norm_eps
    assert spec.rope.type == theirs.rope_parameters["rope_type"]
    assert spec.rope.theta == theirs.rope_parameters["rope_theta"]
    assert (spec.bos_token_id, spec.eos_token_ids, spec.dtype) == (1, (2,), "float32")


def test_family_defaults(tmp_path):
    llama = spec_of(tmp_path, num_key_value_heads="absent", rms_norm_eps="absent")
    assert llama.num_kv_heads == llama.num_heads == 4
    assert llama.rms_norm_eps == 1e-6
    assert llama.rope == RopeSpec()
    assert llama.sliding_window == (None, None, None)
    mistral = ["MistralForCausalLM"]
    assert spec_of(tmp_path, architectures=mistral, sliding_window="absent").sliding_window == (4096,) * 3
    assert spec_of(tmp_path, architectures=mistral, sliding_window=None).sliding_window == (None,) * 3
    heads = {"num_attention_heads": 16, "head_dim": 4, "num_key_value_heads": "absent"}
    wide = spec_of(tmp_path, architectures=mistral, **heads)
    assert wide.num_kv_heads == 8


def test_llama_ignores_a_sliding_window(tmp_path):
    assert spec_of(tmp_path, sliding_window=7).sliding_window == (None, None, None)


def test_qwen_windows_by_layer(tmp_path):
    qwen = {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 9}
    assert spec_of(tmp_path, **qwen).sliding_window == (None, None, None)
    qwen["use_sliding_window"] = True
    assert spec_of(tmp_path, **qwen, max_window_layers=2).sliding_window == (None, None, 9)
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    assert spec_of(tmp_path, **qwen, layer_types=types).sliding_window == (9, None, 9)


def test_lengths_by_rope_type(tmp_path):
    assert spec_of(tmp_path).max_model_len == 128
    assert spec_of(tmp_path, rope_scaling={"type": "linear", "factor": 2.5}).max_model_len == 320
    assert spec_of(tmp_path, rope_parameters={**YARN, "factor": 16.0}).max_model_len == 256
    assert spec_of(tmp_path, rope_parameters=YARN).max_model_len == 128
    assert spec_of(tmp_path, rope_scaling={"type": "dynamic", "factor": 4.0}).max_model_len == 128
    assert spec_of(tmp_path, rope_parameters=LLAMA3).max_model_len == 128


def test_old_and_new_spelling_of_rope(tmp_path):
    old = {key: value for key, value in LLAMA3.items() if key not in ("rope_theta", "rope_type")}
    new_spec = spec_of(tmp_path, rope_parameters={**LLAMA3, "rope_theta": 5e5})
    assert spec_of(tmp_path, rope_theta=5e5, rope_scaling={**old, "type": "llama3"}).rope == new_spec.rope
    assert (
        spec_of(tmp_path, rope_theta=5e5, rope_scaling={**old, "rope_type": "llama3"}).rope == new_spec.rope
    )
    assert new_spec.rope.theta == 5e5


def test_end_tokens_of_both_files(tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 2]}))
    assert spec_of(tmp_path).eos_token_ids == (2, 9)
    assert spec_of(tmp_path, eos_token_id=None).eos_token_ids == (9, 2)


def test_dtype_spellings(tmp_path):
    assert spec_of(tmp_path, torch_dtype="bfloat16").dtype == "bfloat16"
    assert spec_of(tmp_path, dtype="torch.float16").dtype == "float16"


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architectures"),
        ({"architectures": None}, "architectures"),
        ({"vocab_size": "absent"}, "vocab_size"),
        ({"hidden_size": "48"}, "hidden_size"),
        ({"hidden_size": 50}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_attention_heads": True}, "num_attention_heads"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 7}, "head_dim"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps"),
        ({"rope_theta": "big"}, "rope_theta"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "mrope"}}, "rope_parameters"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_scaling": {"type": "llama3", "factor": 2.0, "low_freq_factor": 1.0}}, "high_freq_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"attention_bias": "yes"}, "attention_bias"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"dtype": "float8_e4m3fn"}, "dtype"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 0}, "sliding_window"),
        (
            {
                "architectures": ["Qwen3ForCausalLM"],
                "use_sliding_window": True,
                "layer_types": ["chunked"] * 3,
            },
            "layer_types",
        ),
    ],
    ids=str,
)
def test_errors_name_the_field(tmp_path, changes, param):
    with pytest.raises(ConfigError) as caught:
        spec_of(tmp_path, **changes)
    assert caught.value.param == param
    assert param in caught.value.message or param == "architectures"


def test_a_folder_without_a_config(tmp_path):
    with pytest.raises(ConfigError, match="can't read"):
        read_spec(tmp_path)
    (tmp_path / "config.json").write_text("{broken")
    with pytest.raises(ConfigError, match="no valid JSON"):
        read_spec(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="object"):
        read_spec(tmp_path)


def test_the_length_to_serve(tmp_path):
    spec = spec_of(tmp_path)
    assert (spec.limit_model_len(None), spec.limit_model_len(50)) == (128, 50)
    for length in (0, 129):
        with pytest.raises(ConfigError) as caught:
            spec.limit_model_len(length)
        assert caught.value.param == "max_model_len"
