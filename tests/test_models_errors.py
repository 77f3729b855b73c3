"""Loading: what is said about what doesn't fit, and what a failure leaves."""

from __future__ import annotations

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from models_fixtures import edit, load, save
from models_hf import build

from pplx_jax import models
from pplx_jax.models import loading
from pplx_jax.models.loading import from_pretrained


def test_every_wrong_tensor_is_listed(copy):
    arrays = load(copy)
    del arrays["model.norm.weight"]
    del arrays["model.layers.1.mlp.experts.3.up_proj.weight"]
    arrays["model.layers.0.extra"] = np.zeros(3, np.float32)
    arrays["lm_head.weight"] = arrays["lm_head.weight"][:5]
    save(copy / "model.safetensors", arrays)
    with pytest.raises(models.CheckpointError, match="4 differences") as raised:
        from_pretrained(copy)
    assert len(str(raised.value).splitlines()) == 1 + 4
    for line in (
        "missing: model.norm.weight [64]",
        "missing: model.layers.1.mlp.experts.3.up_proj.weight [32, 64]",
        "surplus: model.layers.0.extra",
        "misshapen: lm_head.weight is [5, 64], the model needs [128, 64]",
    ):
        assert line in str(raised.value)


@pytest.mark.parametrize("modules, allowed", [(None, 1), (1, 1), (2, 2), (0, 0)])
def test_multi_token_prediction_modules(copy, modules, allowed):
    """Layers after the last, as many as config.json says; others are surplus."""
    raw = json.loads((copy / "config.json").read_text())
    raw.pop("num_nextn_predict_layers", None)
    if modules is not None:
        raw["num_nextn_predict_layers"] = modules
    (copy / "config.json").write_text(json.dumps(raw))
    arrays = load(copy)
    for layer in range(2, 2 + allowed):
        arrays[f"model.layers.{layer}.eh_proj.weight"] = np.zeros((64, 128), np.float32)
        arrays[f"model.layers.{layer}.mlp.experts.0.up_proj.weight"] = np.zeros((32, 64), np.float32)
    save(copy / "model.safetensors", arrays)
    from_pretrained(copy)
    arrays[f"model.layers.{2 + allowed}.eh_proj.weight"] = np.zeros((64, 128), np.float32)
    save(copy / "model.safetensors", arrays)
    with pytest.raises(models.CheckpointError, match=f"surplus: model.layers.{2 + allowed}.eh_proj.weight"):
        from_pretrained(copy)


def test_a_missing_fused_tensor_is_one_difference(tmp_path):
    plain, fused = tmp_path / "plain", tmp_path / "fused"
    build("mixtral", plain).save_pretrained(fused, save_original_format=False)
    arrays = load(fused)
    del arrays["model.layers.1.mlp.experts.gate_up_proj"]
    save(fused / "model.safetensors", arrays)
    with pytest.raises(
        models.CheckpointError, match=r"; 1 differences:\n  missing: \S+gate_up_proj \[\S+ .*\]$"
    ):
        from_pretrained(fused)


def test_the_group_is_closed_if_loading_fails(saved):
    """Nobody else could: peers would wait for it."""

    class Broken(Exception):
        pass

    groups = []

    def fail(progress):
        raise Broken

    mesh = Mesh(np.array(jax.devices()[:2]), ("ep",))
    make = loading.placement_of

    def remember(*arguments, **options):
        placement = make(*arguments, **options)
        placement.ep.connect()
        groups.append(placement.ep)
        return placement

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "placement_of", remember)
        with pytest.raises(Broken):
            from_pretrained(saved[0], mesh=mesh, name="broken", progress=fail)
    assert groups[0].stats()["state"] == "closed"


@pytest.mark.parametrize(
    "spoil, match",
    [
        (lambda data: data[:-7], "truncated: tensor .* ends at byte"),
        (lambda data: data[:5], "too few for a safetensors file"),
        (lambda data: data[:200], "truncated or no safetensors file"),
        (lambda data: b"\xff" * 8 + data[8:], "truncated or no safetensors file"),
        (lambda data: data[:8] + b"!" + data[9:], "corrupt header"),
        (lambda data: data.replace(b'"F32"', b'"F64"', 1), "corrupt header .* bytes for F64"),
        (lambda data: data.replace(b'"shape"', b'"shade"', 1), "corrupt header"),
    ],
)
def test_spoiled_files(copy, spoil, match):
    path = copy / "model.safetensors"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(models.CheckpointError, match=match) as raised:
        from_pretrained(copy)
    assert "download the file again" in str(raised.value)


def test_missing_files(copy, tmp_path):
    with pytest.raises(models.CheckpointError, match="no folder: give the folder"):
        from_pretrained(tmp_path / "nowhere")
    with pytest.raises(models.CheckpointError, match=r"config\.json is missing"):
        from_pretrained(tmp_path)
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(models.CheckpointError, match=r"lacks 2 of the 2 files .* download them"):
        from_pretrained(copy)
    index["weight_map"]["a"] = "../elsewhere.safetensors"
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(models.CheckpointError, match="outside of the folder"):
        from_pretrained(copy)
    (copy / "model.safetensors.index.json").unlink()
    (copy / "model.safetensors").unlink()
    with pytest.raises(models.CheckpointError, match="holds neither"):
        from_pretrained(copy)


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "model_type='llama'.*supported are"),
        ({"model_type": None}, "supported are deepseek_v3, kimi_k2"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"kv_lora_rank": None}, "lacks kv_lora_rank"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be an int of at least 1"),
        ({"scoring_func": "softmax"}, "scoring_func='softmax' is not supported"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "type 'llama3'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "lacks factor"),
        (
            {"quantization_config": {"quant_method": "compressed-tensors"}},
            "quantised as compressed-tensors, which is not supported",
        ),
        (
            {
                "quantization_config": {  # Kimi K2 Thinking's
                    "quant_method": "compressed-tensors",
                    "format": "pack-quantized",
                    "config_groups": {
                        "group_0": {"weights": {"type": "int", "num_bits": 4, "group_size": 32}},
                    },
                }
            },
            r"compressed-tensors \(format='pack-quantized', INT4 in groups of 32\), .* dequantise this one",
        ),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}},
            r"gptq \(bits=4, group_size=128\)",
        ),
        ({"quantization_config": {"quant_method": "fp8", "fmt": "e4m3"}}, r"fp8 \(fmt='e4m3'\)"),
        (
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [0, 128]}},
            r"weight_block_size=\[0, 128\]",
        ),
        ({"quantization_config": ["fp8"]}, r"quantised as \['fp8'\]"),
        ({"attention_bias": True}, "attention_bias"),
        ({"max_position_embeddings": "long"}, "max_position_embeddings='long', which must be a number"),
        ({"rms_norm_eps": [1]}, r"rms_norm_eps=\[1\], which must be a number"),
        ({"hidden_size": "64"}, "hidden_size='64', which must be an int"),
        ({"eos_token_id": "</s>"}, "config.json has eos_token_id='</s>', which must be an int or a list"),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": "4", "rope_theta": 1e4}},
            "factor='4', which must be a number",
        ),
        ({"rope_parameters": {"rope_theta": "big"}}, "rope_theta='big', which must be a number"),
    ],
)
def test_unsuitable_configurations(copy, changes, match):
    edit(copy, **changes)
    with pytest.raises(models.ModelError, match=match):
        from_pretrained(copy)


@pytest.mark.parametrize(
    "axes, match",
    [
        ({"ep": 3}, "ep=3, which doesn't divide the model's 16 experts: choose one of 1, 2, 4"),
        (
            {"ep": 1, "tp": 8},
            "tp=8, which doesn't divide the model's 4 attention heads: choose one of 1, 2, 4",
        ),
        ({"tp": 2}, "no 'ep' for the experts: add one"),
        ({"ep": 2, "model": 2}, "axis 'model'; models know dp, ep and tp"),
    ],
)
def test_unsuitable_meshes(saved, axes, match):
    count = math.prod(axes.values())
    mesh = Mesh(np.array(jax.devices()[:count]).reshape(tuple(axes.values())), tuple(axes))
    with pytest.raises(models.ModelError, match=match):
        from_pretrained(saved[0], mesh=mesh)


def test_unsuitable_dtypes(saved):
    with pytest.raises(models.ModelError, match="has none: give another dtype"):
        from_pretrained(saved[0], dtype=jnp.float8_e4m3fn)
    with pytest.raises(models.ModelError, match="dtype must be float32, bfloat16 or float16"):
        from_pretrained(saved[0], dtype=jnp.int8)


def test_unsuitable_prompts(saved):
    model = from_pretrained(saved[0])
    prompt = np.zeros((1, 250), np.int32)
    with pytest.raises(models.ModelError, match="257 tokens exceed the model's context of 256"):
        models.generate(model, prompt, max_new_tokens=7)
    with pytest.raises(models.ModelError, match="exceed cache_length=252: make it at least 255"):
        models.generate(model, prompt, max_new_tokens=5, cache_length=252)
    with pytest.raises(models.ModelError, match=r"tokens must be integers \[B, S\], got float32 \[1, 2\]"):
        models.generate(model, np.zeros((1, 2), np.float32), max_new_tokens=1)
    with pytest.raises(models.ModelError, match=r"integers \[B, S\]"):
        model(np.zeros(3, np.int32))
    with pytest.raises(models.ModelError, match="at least one sequence of one token"):
        model(np.zeros((1, 0), np.int32))
    with pytest.raises(models.ModelError, match="from 0 to 127, got 0 to 128: do they come from"):
        models.generate(model, np.array([[0, 128]]), max_new_tokens=1)
    for bad in ({"max_new_tokens": -1}, {"temperature": -1.0}, {"temperature": "hot"}, {"top_p": 0.0}):
        with pytest.raises(models.ModelError, match=next(iter(bad))):
            models.generate(model, prompt[:, :2], **{"max_new_tokens": 1, **bad})
    assert models.generate(model, prompt[:, :2], max_new_tokens=0).shape == (1, 0)
