from __future__ import annotations

import json
import shutil

import pytest
import torch
from model_support import make_model, runner_for, save
from safetensors.torch import load_file, save_file

from disagg.errors import ConfigError
from disagg.model.weights import fingerprint

DOWN = "model.layers.2.mlp.down_proj.weight"


@pytest.fixture
def folder(checkpoint, tmp_path):
    return shutil.copytree(checkpoint("llama_gqa_tied")[1], tmp_path / "copy")


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def load_error(folder):
    with pytest.raises(ConfigError) as caught:
        runner_for(folder)
    return caught.value


def test_missing_tensor(folder):
    rewrite(folder, lambda tensors: tensors.pop(DOWN))
    error = load_error(folder)
    assert error.param == DOWN
    assert "lacks" in error.message


def test_untied_checkpoint_without_a_head(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    assert load_error(folder).param == "lm_head.weight"


def test_surplus_tensor(folder):
    rewrite(folder, lambda tensors: tensors.update({"model.layers.3.extra": torch.zeros(2)}))
    assert load_error(folder).param == "model.layers.3.extra"


def test_tensors_that_may_be_there(folder):
    extra = {"lm_head.weight": torch.zeros(3), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(6)}
    rewrite(folder, lambda tensors: tensors.update(extra))
    assert runner_for(folder).num_blocks == 64


def test_wrong_shape(folder):
    rewrite(folder, lambda tensors: tensors.update({DOWN: tensors[DOWN].T.contiguous()}))
    error = load_error(folder)
    assert error.param == DOWN
    assert "[48, 64]" in error.message
    assert "[64, 48]" in error.message


def test_integer_weights_are_refused(folder):
    rewrite(folder, lambda tensors: tensors.update({DOWN: torch.zeros(48, 64, dtype=torch.int8)}))
    error = load_error(folder)
    assert error.param == DOWN
    assert "I8" in error.message


@pytest.mark.parametrize("keep", [0, 4, 8, 200, -100])
def test_a_file_cut_off(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert "cut off" in load_error(folder).message


@pytest.mark.parametrize(
    "header",
    [b"not json", b"[1, 2]", b'{"a": 1}', b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4]}}'],
)
def test_a_corrupted_header(folder, header):
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    error = load_error(folder)
    assert "no safetensors file" in error.message or "malformed" in error.message


def test_offsets_that_do_not_fit_the_shape(folder):
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    start, end = header[DOWN]["data_offsets"]
    header[DOWN]["data_offsets"] = [start, end - 4]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    assert load_error(folder).param == DOWN


def test_a_folder_without_weights(folder):
    (folder / "model.safetensors").unlink()
    assert "neither" in load_error(folder).message


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", 3])
def test_an_index_that_leaves_its_folder(folder, name):
    index = {"weight_map": {DOWN: name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert load_error(folder).param == "weight_map"


def test_a_missing_shard(tmp_path):
    folder = save(make_model("qwen2"), tmp_path, max_shard_size="30KB")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    assert shard.name in load_error(folder).message


def test_fingerprint_of_a_copy_is_equal(checkpoint, folder):
    original = checkpoint("llama_gqa_tied")[1]
    assert fingerprint(folder) == fingerprint(original)
    config = json.loads((folder / "config.json").read_text())
    config.update(_name_or_path="/elsewhere", transformers_version="0.0")
    (folder / "config.json").write_text(json.dumps(config))
    assert fingerprint(folder) == fingerprint(original)
    assert len(fingerprint(folder)) == 32


def test_fingerprint_tells_weights_apart(folder):
    before = fingerprint(folder)
    rewrite(folder, lambda tensors: tensors.update({DOWN: tensors[DOWN] * 1.001}))
    assert fingerprint(folder) != before


def test_fingerprint_tells_configs_apart(folder):
    before = fingerprint(folder)
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 5000.0
    (folder / "config.json").write_text(json.dumps(config))
    assert fingerprint(folder) != before


def test_loading_leaves_no_second_copy(folder):
    """Every parameter but the packed ones has its own memory, fused ones included, and no more than that."""
    model = runner_for(folder, kernels="torch").model
    layer = model.layers[0]
    stored = load_file(folder / "model.safetensors")
    prefix = "model.layers.0.self_attn."
    parts = [stored[f"{prefix}{name}_proj.weight"] for name in "qkv"]
    assert torch.equal(layer.qkv_proj.weight, torch.cat(parts))
    assert layer.qkv_proj.weight.untyped_storage().nbytes() == sum(part.nbytes for part in parts)
    assert model.lm_head.weight is model.embed_tokens
