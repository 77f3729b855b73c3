"""Models agree with Hugging Face transformers: in one go, prefilled in chunks, and step by step."""

from __future__ import annotations

import re

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh
from models_hf import TOLERANCE, VARIANTS, VOCAB, build, chunked, compute, difference

from pplx_jax import models
from pplx_jax.models.programs import Programs


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    """Each variant's reference, made when it is first asked for."""
    made = {}

    def get(variant):
        if variant not in made:
            folder = tmp_path_factory.mktemp(variant)
            made[variant] = compute(build(variant, folder), folder)
        return made[variant]

    return get


def mesh_of(**axes):
    count = int(np.prod(list(axes.values())))
    return Mesh(np.array(jax.devices()[:count]).reshape(tuple(axes.values())), tuple(axes))


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_device(references, variant):
    reference = references(variant)
    assert reference.margin > 1e-3, "the test's model hesitates: greedy tokens would be a matter of rounding"
    model = models.from_pretrained(reference.folder)
    assert model.placement.dtype == np.float32
    logits = model(reference.tokens)
    assert logits.shape == reference.logits.shape
    assert logits.dtype == np.float32
    assert difference(logits, reference.logits) < TOLERANCE
    new = reference.continuation.shape[1]
    found = models.generate(model, reference.tokens, max_new_tokens=new, prefill_chunk=16)
    np.testing.assert_array_equal(found, reference.continuation)


@pytest.mark.parametrize("variant", ["deepseek_v3", "qwen3_moe", "mixtral"])
@pytest.mark.parametrize("chunk", [16, 1])
def test_chunks(references, variant, chunk):
    """Prefill in chunks, of which the last is padded, and every token by itself from the first on."""
    reference = references(variant)
    model = models.from_pretrained(reference.folder)
    assert difference(chunked(model, reference.tokens, chunk), reference.logits) < TOLERANCE


@pytest.mark.parametrize(
    "variant, axes",
    [
        ("deepseek_v3", {"dp": 2, "ep": 2, "tp": 2}),
        ("qwen3_moe", {"ep": 2, "tp": 4}),
        ("mixtral", {"ep": 8}),
    ],
)
def test_meshes(references, variant, axes):
    reference = references(variant)
    model = models.from_pretrained(reference.folder, mesh=mesh_of(**axes), name=f"meshes-{variant}")
    with model.placement.ep:
        assert difference(model(reference.tokens), reference.logits) < TOLERANCE
        new = reference.continuation.shape[1]
        # One sequence: no axis divides it, and its tokens are padded.
        found = models.generate(model, reference.tokens[1:2], max_new_tokens=new, prefill_chunk=16)
        np.testing.assert_array_equal(found, reference.continuation[1:2])
        held = nnx.state(model).layers[1].moe.experts.up[...].addressable_shards[0].data.shape
        config = model.config
        assert held[0] == config.num_experts // axes["ep"]
        assert held[2] == config.moe_intermediate_size // axes.get("tp", 1)


@pytest.mark.parametrize("axes, most", [({"ep": 4}, 8), ({"dp": 2, "ep": 2, "tp": 2}, 8 * VOCAB)])
def test_collectives_of_decoding(references, axes, most):
    """Besides dispatch and combine: the tokens; and with tp sums of partial results, but never weights."""
    reference = references("deepseek_v3")
    model = models.from_pretrained(reference.folder, mesh=mesh_of(**axes), name="collectives")
    programs, state = Programs.of(model), nnx.state(model)
    lowered = programs.lowered_step(state, programs.caches(model, 8, 64), np.zeros((8, 1), np.int32))
    pattern = r"= \(?\w+\[([\d,]*)\]\S* (?:all-\w+|reduce-scatter|collective-permute|ragged-all-to-all)\("
    found = re.findall(pattern, lowered.compile().as_text())
    assert found
    assert max(np.prod([int(size) for size in shape.split(",") if size]) for shape in found) <= most
    if "tp" not in axes:
        assert len(found) == 1


def test_more_tokens_than_a_rank_takes(references):
    """A smaller max_tokens: generate goes in smaller chunks, a whole forward pass says what to do."""
    reference = references("mixtral")
    model = models.from_pretrained(reference.folder, mesh=mesh_of(ep=2), name="few", max_tokens=11)
    with model.placement.ep:
        with pytest.raises(
            models.ModelError, match=r"are 74 on each rank.*give from_pretrained max_tokens=74"
        ):
            model(reference.tokens)
        found = models.generate(model, reference.tokens, max_new_tokens=3)
        np.testing.assert_array_equal(found, reference.continuation[:, :3])
        with pytest.raises(models.ModelError, match="23 sequences are more than"):
            models.generate(model, np.zeros((23, 2), np.int32), max_new_tokens=1)


def test_under_jit(references):
    reference = references("mixtral")
    model = models.from_pretrained(reference.folder)
    logits = nnx.jit(lambda model, tokens: model(tokens))(model, reference.tokens)
    assert difference(logits, reference.logits) < TOLERANCE


def test_low_precision_is_close(references):
    reference = references("deepseek_v3")
    model = models.from_pretrained(reference.folder, dtype="bfloat16")
    # Some tokens' experts change with rounding, so only most agree.
    found = np.asarray(model(reference.tokens))
    wrong = np.abs(found - reference.logits).max(axis=-1) / np.abs(reference.logits).max()
    assert np.median(wrong) < 0.05
