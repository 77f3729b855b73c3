"""Loading: what is read, and float8 weights."""

from __future__ import annotations

import math
import shutil
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh
from models_fixtures import edit, load, save
from models_hf import TOLERANCE, build, compute, difference

from pplx_jax import models
from pplx_jax.models import loading
from pplx_jax.models.checkpoint import DTYPES, Checkpoint
from pplx_jax.models.loading import from_pretrained
from pplx_jax.models.sources import Source

BLOCK = (16, 8)


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


def test_float8_without_scales(float8, tmp_path):
    shutil.copy(float8.folder / "config.json", tmp_path)
    arrays = load(float8.folder)
    name = "model.layers.0.self_attn.o_proj.weight_scale_inv"
    save(tmp_path / "model.safetensors", {key: value for key, value in arrays.items() if key != name})
    # The scales of a tensor that is kept are a parameter too: still one difference.
    for dtype in (None, jnp.float8_e4m3fn):
        with pytest.raises(models.CheckpointError, match=rf"; 1 differences:\n  missing: {name} \[4, 8\]$"):
            from_pretrained(tmp_path, dtype=dtype)


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
