"""Generating: failed exchanges, prompts of many lengths, chunks that memory bounds, reports, options."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from test_multiprocess import error_of

import pplx_jax
from pplx_jax import models
from pplx_jax.models.generation import chunk_and_cache, stream
from pplx_jax.models.mixtral import MixtralConfig
from pplx_jax.models.programs import Programs
from pplx_jax.models.registry import PUBLISHED
from pplx_jax.models.sharding import Placement
from pplx_jax.models.sizes import PREFILL_BYTES, prefill_chunk, score_bytes

CONFIG = dataclasses.replace(
    MixtralConfig.mixtral_8x7b(),
    vocab_size=32,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    num_experts=4,
    intermediate_size=16,
    moe_intermediate_size=16,
    max_position_embeddings=64,
)


def new_model():
    """A model whose programs no other test has compiled."""
    return models.from_config(CONFIG, dtype=jnp.float32)


@pytest.fixture(scope="module")
def model():
    return new_model()


def test_failed_exchanges_are_raised():
    """An exchange with too many rows raises nothing when it runs, and leaves NaN: the choice of a token, or
    whoever looks at logits, would not see it."""
    mesh = Mesh(np.array(jax.devices()[:2]), ("ep",))
    spread = models.from_config(CONFIG, mesh=mesh, dtype=jnp.float32, name="tight", exchange={"rows": 1})
    prompt = np.arange(8).reshape(2, 4)
    with spread.placement.ep:
        with pytest.raises(pplx_jax.RoutingError, match="row"):
            models.generate(spread, prompt, max_new_tokens=1)
        with pytest.raises(pplx_jax.RoutingError, match="row"):
            spread(prompt)


def test_a_failure_in_another_group_is_raised():
    """With several groups of experts NaN is told from a token, whatever this process's check() says."""
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("dp", "ep"))
    spread = models.from_config(CONFIG, mesh=mesh, dtype=jnp.float32, name="elsewhere", exchange={"rows": 1})
    prompt = np.arange(16).reshape(4, 4)
    ep = spread.placement.ep

    def settles(self, sync=False):
        """Of what failed, on all four ranks here, nothing is told."""
        while error_of(lambda: self._membership.check(sync))[0] == "RoutingError":
            pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(ep), "check", settles)
        for temperature in (0.0, 0.7):
            with pytest.raises(pplx_jax.PplxError, match="logits are NaN"):
                models.generate(spread, prompt, max_new_tokens=1, temperature=temperature)
        with pytest.raises(pplx_jax.PplxError, match="logits are NaN"):
            spread(prompt)
    ep.close()


def test_a_failure_for_other_tokens_than_the_last_is_raised():
    """Tokens of one sequence lie on all groups: in the last layer others than the last may have failed."""
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("dp", "ep"))
    spread = models.from_config(CONFIG, mesh=mesh, dtype=jnp.float32, name="earlier", exchange={"rows": 6})
    told = []

    def settles(self, sync=False):
        while (found := error_of(lambda: self._membership.check(sync)))[0] != "nothing":
            told.append(found)

    failed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(spread.placement.ep), "check", settles)
        for first in range(0, CONFIG.vocab_size, 4):
            # The four tokens of one group, alike, may all want one rank; those of the other differ.
            prompt = np.array([[first] * 4 + [15, 22, 28, 2]])
            told.clear()
            kind, text, *_ = error_of(lambda p=prompt: models.generate(spread, p, max_new_tokens=1))
            assert kind == ("PplxError" if told else "nothing"), (first, kind, text, told)
            failed.append(bool(told))
    assert any(failed)
    assert not all(failed)
    spread.placement.ep.close()


@pytest.mark.parametrize("error", [jax.errors.JaxRuntimeError, ValueError])
def test_an_execution_that_fails_says_why(error):
    """After a peer's death the runtime raises what it knows; the group knows more."""
    mesh = Mesh(np.array(jax.devices()[:2]), ("ep",))
    spread = models.from_config(CONFIG, mesh=mesh, dtype=jnp.float32, name="said why")
    prompt = np.arange(8).reshape(2, 4)
    failure = [pplx_jax.PeerError("rank 1 died")]

    def check(self, sync=False):
        if failure:
            raise failure[0]

    def failing(*args, **kwargs):
        raise error("the execution failed")

    programs = Programs.of(spread)
    with spread.placement.ep as ep, pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(ep), "check", check)
        patch.setattr(programs, "_step", failing)
        patch.setattr(programs, "_forward", failing)
        for run in (lambda: models.generate(spread, prompt, max_new_tokens=1), lambda: spread(prompt)):
            with pytest.raises(pplx_jax.PeerError, match="died"):
                run()
        failure.clear()
        with pytest.raises(error, match="the execution failed"):
            spread(prompt)


@pytest.mark.parametrize("temperature", [1e-310, 1e-46, 1e-38, 1e-31])
def test_the_coldest_sampling_takes_the_likeliest(model, temperature):
    prompt = np.arange(8).reshape(2, 4)
    greedy, cold = (
        np.asarray(models.generate(model, prompt, max_new_tokens=3, temperature=one))
        for one in (0.0, temperature)
    )
    np.testing.assert_array_equal(cold, greedy)


def test_tokens_outside_of_the_vocabulary(model):
    for bad in (32, 999_999, -1):
        tokens = np.array([[1, 2, bad]])
        for given in (tokens, jnp.asarray(tokens)):
            with pytest.raises(models.ModelError, match=r"tokens must be from 0 to 31, got .*tokenizer"):
                model(given)
    assert np.isfinite(model(np.array([[0, 31]]))).all()


def test_prompts_of_many_lengths_share_programs():
    model = new_model()
    whole = np.arange(12)[None] % 32
    programs = Programs.of(model)
    # Causal: logits of the longest are those of the others too.
    following = np.asarray(model(whole)).argmax(axis=-1)
    for size in (5, 6, 7, 9, 11, 12):
        found = models.generate(model, whole[:, :size], max_new_tokens=3, cache_length=20)
        np.testing.assert_array_equal(found[:, 0], following[:, size - 1])
    # Chunks of 8 and of 16 tokens, and the step of one.
    assert programs._step._cache_size() == 3
    assert programs._caches._cache_size() == 1


@pytest.mark.parametrize("limit", [None, 1, 3, 7, 8])
def test_chunks_fit_into_the_cache(limit):
    """Padding must not be written past the end; and the cache's length must not depend on the prompt's."""
    for length in range(1, 40):
        found = [
            chunk_and_cache(CONFIG, Placement(), 2, size, length, limit) for size in range(1, length + 1)
        ]
        assert len({cache for _, cache in found}) == 1
        for size, (chunk, cache) in enumerate(found, 1):
            assert -(-size // chunk) * chunk <= cache
            assert limit is None or chunk <= limit
        assert length <= found[0][1] < 2 * length


def test_default_chunks_bound_attention_scores():
    kimi = PUBLISHED["kimi-k2"]()
    for batch, length, tp, chunk in (
        (1, 4096, 1, 512),
        # 131072 positions of 64 heads are 32 MiB a query.
        (1, 131072, 1, 32),
        (1, 131072, 8, 256),
        (8, 131072, 1, 4),
        (1024, 131072, 1, 1),
    ):
        assert prefill_chunk(kimi, batch, length, tp=tp) == chunk
        assert chunk == 1 or chunk * score_bytes(kimi, batch, length, tp=tp) <= PREFILL_BYTES
        if tp == 1:
            assert chunk_and_cache(kimi, Placement(), batch, length, length, None) == (chunk, length)
    assert chunk_and_cache(kimi, Placement(), 1, 131072, 131072, 512) == (512, 131072)


def test_reports_of_every_chunk(model):
    """A prompt of 11 tokens in chunks of 4, then four steps; two experts a token."""
    reports = []
    prompt = np.arange(22).reshape(2, 11)
    list(stream(model, prompt, max_new_tokens=5, prefill_chunk=4, report=reports.append))
    assert [int(layers[0].loads.sum()) for layers in reports] == [16, 16, 12] + 4 * [4]


@pytest.mark.parametrize(
    "options",
    [
        {"seed": 2**63},
        {"seed": -(2**63) - 1},
        {"seed": 1.5},
        {"prefill_chunk": 0},
        {"top_p": 1.5},
        {"max_new_tokens": True},
    ],
)
def test_unsuitable_options(model, options):
    (name,) = options
    with pytest.raises(models.ModelError, match=f"{name} must be"):
        models.generate(model, np.array([[1]]), **{"max_new_tokens": 1, "temperature": 1.0, **options})
