"""Configurations: published ones, transformers' and those of checkpoints; random models of them."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from models_fixtures import edit

from pplx_jax import models
from pplx_jax.models.loading import from_config, read_config
from pplx_jax.models.quantized import block_of
from pplx_jax.models.registry import FAMILIES, PUBLISHED, PUBLISHED_FLOAT8, family_of
from pplx_jax.models.rope import Rope, Yarn


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
