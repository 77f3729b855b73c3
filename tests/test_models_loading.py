"""Loading: what is read, float8 weights, and what is said about what doesn't fit."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import struct
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh
from models_hf import TOLERANCE, build, compute, difference

from pplx_jax import models
from pplx_jax.models import loading
from pplx_jax.models.checkpoint import DTYPES, Checkpoint
from pplx_jax.models.loading import from_config, from_pretrained, read_config
from pplx_jax.models.quantized import block_of
from pplx_jax.models.registry import FAMILIES, PUBLISHED, PUBLISHED_FLOAT8, family_of
from pplx_jax.models.rope import Rope, Yarn
from pplx_jax.models.sources import Source

BLOCK = (16, 8)


def save(path, arrays):
    """A safetensors file, by hand: numpy has no float8 of its own."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, place = {"__metadata__": {"format": "np"}}, 0
    for name, array in arrays.items():
        end = place + array.nbytes
        header[name] = {
            "dtype": names[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [place, end],
        }
        place = end
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for array in arrays.values():
            file.write(np.ascontiguousarray(array).tobytes())


def load(folder):
    with Checkpoint(folder) as checkpoint:
        return {name: checkpoint.read(name) for name in checkpoint.tensors}


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A DeepSeek checkpoint in one file, its model and tensors."""
    folder = tmp_path_factory.mktemp("saved")
    return folder, build("deepseek_v3", folder)


@pytest.fixture
def copy(saved, tmp_path):
    """A copy to spoil."""
    folder = tmp_path / "copy"
    shutil.copytree(saved[0], folder)
    return folder


@pytest.fixture(scope="module")
def float8(saved, tmp_path_factory):
    """The checkpoint with its matrices in float8, and what transformers computes with just these values."""
    import torch

    folder = tmp_path_factory.mktemp("float8")
    shutil.copy(saved[0] / "config.json", folder)
    edit(folder, quantization_config={"quant_method": "fp8", "weight_block_size": list(BLOCK)})
    stored, plain = {}, {}
    for name, value in load(saved[0]).items():
        if not name.endswith("_proj.weight") and "kv_a_proj" not in name:
            stored[name] = plain[name] = value
            continue
        rows, columns = value.shape
        scales = np.zeros((math.ceil(rows / BLOCK[0]), math.ceil(columns / BLOCK[1])), np.float32)
        whole = np.zeros_like(value)
        quantized = np.zeros(value.shape, DTYPES["F8_E4M3"])
        for i in range(0, rows, BLOCK[0]):
            for j in range(0, columns, BLOCK[1]):
                part = np.s_[i : i + BLOCK[0], j : j + BLOCK[1]]
                scale = np.abs(value[part]).max() / np.float32(448)
                scales[i // BLOCK[0], j // BLOCK[1]] = scale
                quantized[part] = (value[part] / scale).astype(quantized.dtype)
                whole[part] = quantized[part].astype(np.float32) * scale
        stored[name], stored[f"{name}_scale_inv"], plain[name] = quantized, scales, whole
    # DeepSeek-V3's multi-token prediction module, and Kimi K2's frequencies: passed over.
    stored["model.layers.2.eh_proj.weight"] = np.zeros((64, 128), np.float32)
    stored["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)
    save(folder / "model.safetensors", stored)
    values = {name: torch.tensor(value) for name, value in plain.items()}
    twin = tmp_path_factory.mktemp("twin")
    shutil.copy(saved[0] / "config.json", twin)
    save(twin / "model.safetensors", plain)
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(twin).eval()
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, values["model.layers.0.mlp.up_proj.weight"])
    return compute(model, folder)


# ---- float8 ------------------------------------------------------------------------------------------------


def test_float8_dequantised(float8):
    model = from_pretrained(float8.folder, dtype=jnp.float32)
    assert difference(model(float8.tokens), float8.logits) < TOLERANCE
    assert model.layers[1].moe.experts.up[...].dtype == jnp.float32
    with Checkpoint(float8.folder) as checkpoint:
        total = sum(
            info.shape[0] * math.prod(info.shape[1:]) * DTYPES[info.dtype].itemsize
            for name, info in checkpoint.tensors.items()
            if "layers.2" not in name and "inv_freq" not in name
        )
    read = []
    from_pretrained(float8.folder, dtype=jnp.float32, progress=read.append)
    assert read[-1].bytes_read == total
    assert read[-1].done == read[-1].total == len(read)


def test_float8_kept(float8):
    """The weights stay float8; products are those of the weights that they stand for."""
    model = from_pretrained(float8.folder, dtype=jnp.float8_e4m3fn)
    layer = model.layers[1]
    assert layer.moe.experts.up[...].dtype == jnp.float8_e4m3fn
    assert layer.moe.shared.down[...].dtype == jnp.float8_e4m3fn
    assert layer.attention.kv_up.kernel[...].dtype == jnp.float8_e4m3fn
    assert layer.moe.expert_scales.up[...].shape == (16, 64 // BLOCK[1], 32 // BLOCK[0])
    assert difference(model(float8.tokens), float8.logits) < TOLERANCE


def test_float8_kept_on_a_mesh(float8):
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("ep", "tp"))
    model = from_pretrained(float8.folder, dtype=jnp.float8_e4m3fn, mesh=mesh, name="float8")
    with model.placement.ep:
        assert difference(model(float8.tokens), float8.logits) < TOLERANCE


# ---- what is read ------------------------------------------------------------------------------------------


def test_shards_with_an_index(saved, tmp_path):
    saved[1].save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    one, many = from_pretrained(saved[0]), from_pretrained(tmp_path)
    for a, b in zip(jax.tree.leaves(nnx.state(one)), jax.tree.leaves(nnx.state(many)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe", "mixtral"])
def test_fused_experts(family, tmp_path):
    """As transformers saves what it has in memory: a layer's experts in two tensors."""
    plain, fused = tmp_path / "plain", tmp_path / "fused"
    build(family, plain).save_pretrained(fused, save_original_format=False)
    with Checkpoint(fused) as checkpoint:
        assert any(name.endswith("mlp.experts.gate_up_proj") for name in checkpoint.tensors)
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("ep", "tp"))
    for options in ({}, {"mesh": mesh, "name": f"fused-{family}"}):
        one, other = (nnx.state(from_pretrained(folder, **options)) for folder in (plain, fused))
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float8_e4m3fn])
def test_fused_float8_experts(float8, tmp_path, dtype):
    shutil.copy(float8.folder / "config.json", tmp_path)
    arrays = load(float8.folder)
    for suffix in ("", "_scale_inv"):
        name = "model.layers.1.mlp.experts"
        parts = {
            part: np.stack(
                [arrays.pop(f"{name}.{expert}.{part}_proj.weight{suffix}") for expert in range(16)]
            )
            for part in ("gate", "up", "down")
        }
        arrays[f"{name}.gate_up_proj{suffix}"] = np.concatenate([parts["gate"], parts["up"]], axis=1)
        arrays[f"{name}.down_proj{suffix}"] = parts["down"]
    save(tmp_path / "model.safetensors", arrays)
    one, other = (nnx.state(from_pretrained(folder, dtype=dtype)) for folder in (float8.folder, tmp_path))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


def test_parts_of_tensors(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "matrix": rng.standard_normal((40, 3000)).astype(np.float32),
        "narrow": rng.standard_normal((33, 20)).astype(DTYPES["BF16"]),
        "cube": rng.standard_normal((3, 4, 5)).astype(np.float16),
        "empty": np.zeros((0, 4), np.float32),
    }
    save(tmp_path / "model.safetensors", arrays)
    with Checkpoint(tmp_path) as checkpoint:
        for name, index, most in (
            ("matrix", np.s_[7:19], 12 * 3000 * 4),
            ("matrix", np.s_[7:19, 100:2000], 12 * 1900 * 4),
            ("matrix", np.s_[:, 5:9], 40 * 3000 * 4),  # too short a run to be worth a read each
            ("narrow", np.s_[3:5, 2:19], 2 * 20 * 2),
            ("cube", np.s_[1:3, 2:3, 1:4], 2 * 5 * 2),
            ("cube", np.s_[1:2], 20 * 2),
            ("empty", np.s_[:, 1:2], 0),
        ):
            before = checkpoint.bytes_read
            index = index if isinstance(index, tuple) else (index,)
            np.testing.assert_array_equal(checkpoint.read(name, index), arrays[name][index])
            assert checkpoint.bytes_read - before <= most


@pytest.mark.parametrize("stored, kept", [("F32", "BF16"), ("F8_E4M3", "BF16"), ("F8_E4M3", "F8_E4M3")])
@pytest.mark.parametrize("part", [np.s_[:, :], np.s_[100:900, 333:777]])
def test_memory_of_a_conversion(tmp_path, monkeypatch, stored, kept, part):
    """What is converted and turned takes the target's memory and a window's, and is the same as in one go."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((800, 1024)).astype(DTYPES[stored])
    scales = rng.random((math.ceil(800 / 128), 8), np.float32)
    save(tmp_path / "model.safetensors", {"a.weight": values, "a.weight_scale_inv": scales})
    wide = values.astype(np.float32)
    if stored != kept and stored == "F8_E4M3":
        wide *= np.repeat(np.repeat(scales, 128, axis=0)[:800], 128, axis=1)
    expected = wide.T[part].astype(DTYPES[kept])
    monkeypatch.setattr(loading, "_WINDOW", 1 << 16)
    source = Source(("a.weight",), transposed=True)
    with Checkpoint(tmp_path) as checkpoint:
        reader = loading._Reader(checkpoint, source, (1024, 800), DTYPES[kept], (128, 128))
        tracemalloc.start()
        try:
            found = reader(part)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    np.testing.assert_array_equal(found.astype(np.float32), expected.astype(np.float32))
    # Windows are whole blocks of 128 rows; float32, its factors and what was read live at once.
    widest = DTYPES[kept].itemsize if stored == kept else 4
    assert peak < expected.nbytes + 4 * 128 * 1024 * widest


def test_the_safetensors_library_agrees(saved):
    library = pytest.importorskip("safetensors.numpy")
    theirs = library.load_file(saved[0] / "model.safetensors")
    ours = load(saved[0])
    assert theirs.keys() == ours.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value)


# ---- what doesn't fit --------------------------------------------------------------------------------------


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


def test_float8_without_scales(float8, tmp_path):
    shutil.copy(float8.folder / "config.json", tmp_path)
    arrays = load(float8.folder)
    name = "model.layers.0.self_attn.o_proj.weight_scale_inv"
    save(tmp_path / "model.safetensors", {key: value for key, value in arrays.items() if key != name})
    # The scales of a tensor that is kept are a parameter too: still one difference.
    for dtype in (None, jnp.float8_e4m3fn):
        with pytest.raises(models.CheckpointError, match=rf"; 1 differences:\n  missing: {name} \[4, 8\]$"):
            from_pretrained(tmp_path, dtype=dtype)


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


# ---- configurations ----------------------------------------------------------------------------------------


def test_published_configurations():
    """Parameter counts of the models' cards, in billions: all of them, and those that a token meets.

    Cards differ in whether the embedding counts among the latter.
    """
    from pplx_jax.models.sizes import parameters

    for name, (total, active) in {
        "deepseek-v3": (671, 37),
        "kimi-k2": (1026, 32),
        "qwen3-30b-a3b": (30.5, 3.3),
        "qwen3-235b-a22b": (235, 22),
        "qwen3-coder-480b-a35b": (480, 35),
        "mixtral-8x7b": (46.7, 12.9),
        "mixtral-8x22b": (141, 39),
    }.items():
        counts = parameters(PUBLISHED[name]())
        assert counts.total / 1e9 == pytest.approx(total, rel=0.01), name
        assert counts.active / 1e9 == pytest.approx(active, rel=0.08), name


def test_configurations_from_transformers():
    """Our figures of a checkpoint against transformers' own defaults, which are that checkpoint's."""
    transformers = pytest.importorskip("transformers")
    theirs = FAMILIES["mixtral"].from_hf(transformers.MixtralConfig().to_dict())
    ours = PUBLISHED["mixtral-8x7b"]()
    assert theirs.rope == ours.rope
    for field in ("hidden_size", "num_hidden_layers", "moe_intermediate_size", "num_experts", "vocab_size"):
        assert getattr(theirs, field) == getattr(ours, field)
    theirs = FAMILIES["deepseek_v3"].from_hf(transformers.DeepseekV3Config().to_dict())
    ours = PUBLISHED["deepseek-v3"]()
    for field in ("hidden_size", "num_experts", "kv_lora_rank", "n_group", "first_k_dense_replace", "router"):
        assert getattr(theirs, field) == getattr(ours, field)


def test_nulls_are_as_good_as_nothing(copy):
    edit(copy, max_position_embeddings=None, rms_norm_eps=None, rope_parameters=None, rope_scaling=None)
    config = read_config(copy)[1]
    assert (config.max_position_embeddings, config.rms_norm_eps, config.rope) == (4096, 1e-6, Rope())


@pytest.mark.parametrize(
    "content, expected",
    [
        ({"eos_token_id": [5, 7]}, (5, 7)),
        ({"eos_token_id": 9}, (9,)),
        ({"eos_token_id": None, "temperature": 0.6}, (3,)),
        ({}, (3,)),
        (None, (3,)),
    ],
)
def test_ends_of_texts(copy, content, expected):
    """Chat models end a turn with a token that only generation_config.json names."""
    edit(copy, eos_token_id=3)
    path = copy / "generation_config.json"
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_text(json.dumps(content))
    assert read_config(copy)[1].eos_token_ids == expected


def test_unsuitable_ends_of_texts(copy):
    path = copy / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": ["</s>"]}))
    with pytest.raises(models.ModelError, match=r"generation_config.json has eos_token_id=\['</s>'\]"):
        read_config(copy)
    path.write_text("{")
    with pytest.raises(models.CheckpointError, match="download it again"):
        read_config(copy)


def test_contexts_that_yarn_stretches(tmp_path):
    """As Qwen3's cards say to do it; DeepSeek's and Kimi's own contexts are the stretched ones already."""
    transformers = pytest.importorskip("transformers")
    raw = transformers.Qwen3MoeConfig(max_position_embeddings=40960).to_dict()
    raw.pop("rope_parameters", None)
    from_hf = FAMILIES["qwen3_moe"].from_hf
    assert from_hf(raw).max_position_embeddings == 40960
    raw["rope_scaling"] = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    assert from_hf(raw).max_position_embeddings == 131072
    for name in ("deepseek-v3", "kimi-k2", "kimi-k2-0905"):
        config = PUBLISHED[name]()
        yarn = config.rope.yarn
        assert config.max_position_embeddings == yarn.factor * yarn.original_max_position_embeddings


def test_later_checkpoints():
    """What differs from the checkpoint that each one's sizes are those of."""
    for name, other, changes in (
        ("deepseek-v3.1", "deepseek-v3", {}),
        ("qwen3-30b-a3b-2507", "qwen3-30b-a3b", {"max_position_embeddings": 262144, "rope": Rope(1e7)}),
        ("qwen3-235b-a22b-2507", "qwen3-235b-a22b", {"max_position_embeddings": 262144, "rope": Rope(5e6)}),
        ("mixtral-8x22b-instruct", "mixtral-8x22b", {"vocab_size": 32768}),
    ):
        assert PUBLISHED[name]() == dataclasses.replace(PUBLISHED[other](), **changes)
    assert "deepseek-v3.1" in PUBLISHED_FLOAT8
    quantization = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    }
    assert block_of({"quantization_config": quantization}) == (128, 128)


def test_kimi_k2_from_its_config():
    """The fields of moonshotai/Kimi-K2-Instruct's config.json, as transformers 4 wrote them."""
    raw = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "kimi_k2",
        "attention_bias": False,
        "bos_token_id": 163584,
        "eos_token_id": 163585,
        "first_k_dense_replace": 1,
        "hidden_act": "silu",
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "kv_lora_rank": 512,
        "max_position_embeddings": 131072,
        "moe_intermediate_size": 2048,
        "moe_layer_freq": 1,
        "n_group": 1,
        "n_routed_experts": 384,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 64,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 61,
        "num_key_value_heads": 64,
        "num_nextn_predict_layers": 0,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
        "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "beta_fast": 1.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
            "type": "yarn",
        },
        "rope_theta": 50000.0,
        "routed_scaling_factor": 2.827,
        "scoring_func": "sigmoid",
        "tie_word_embeddings": False,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16",
        "v_head_dim": 128,
        "vocab_size": 163840,
    }
    assert family_of(raw).from_hf(raw) == PUBLISHED["kimi-k2"]()
    assert block_of(raw) == (128, 128)


def test_yarn_against_transformers():
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for theta, factor, fast, slow, mscale in (
        (10_000.0, 40.0, 32, 1, 1.0),
        (50_000.0, 32.0, 1, 1, 1.0),
        (10_000.0, 4.0, 8, 2, 0.707),
    ):
        yarn = Yarn(factor, 4096, fast, slow, mscale, 1.0)
        config = transformers.DeepseekV3Config(
            rope_theta=theta,
            max_position_embeddings=int(4096 * factor),
            rope_scaling={
                "type": "yarn",
                "factor": factor,
                "original_max_position_embeddings": 4096,
                "beta_fast": fast,
                "beta_slow": slow,
                "mscale": mscale,
                "mscale_all_dim": 1.0,
            },
        )
        frequencies, amplitude = ROPE_INIT_FUNCTIONS["yarn"](config)
        ours = Rope(theta, yarn)
        np.testing.assert_allclose(ours.frequencies(64), frequencies.numpy(), rtol=1e-5)
        assert ours.amplitude == pytest.approx(amplitude)
        assert Rope.from_hf(config.to_dict()) == ours


def test_random_models():
    """A slice of a published model, with other sizes, on a mesh and on one device: the same weights."""
    config = dataclasses.replace(
        PUBLISHED["kimi-k2"](),
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=1,
        first_k_dense_replace=0,
        num_attention_heads=2,
        num_experts=8,
        intermediate_size=32,
        moe_intermediate_size=16,
        q_lora_rank=16,
        kv_lora_rank=16,
    )
    mesh = Mesh(np.array(jax.devices()[:2]), ("ep",))
    one = from_config(config, dtype=jnp.float32)
    two = from_config(config, dtype=jnp.float32, mesh=mesh, name="random")
    tokens = np.arange(12).reshape(2, 6)
    with two.placement.ep:
        np.testing.assert_allclose(one(tokens), two(tokens), rtol=1e-3, atol=1e-4)
