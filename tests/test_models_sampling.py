"""Drawing tokens, seeds, ends of texts; caches and masks; a model that learns after it was loaded."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pplx_jax import models
from pplx_jax.models.cache import LayerCache, causal_mask
from pplx_jax.models.generation import Progress, stream
from pplx_jax.models.mixtral import MixtralConfig
from pplx_jax.models.sampling import candidates, sample
from pplx_jax.models.tokenizer import TextStream


def draw(logits, count=20_000, temperature=1.0, top_p=1.0):
    rows = jnp.tile(jnp.asarray(logits, jnp.float32), (count, 1))
    chosen = sample(rows, jax.random.key(0), jnp.float32(temperature), jnp.float32(top_p))
    return np.bincount(np.asarray(chosen), minlength=rows.shape[1]) / count


def test_drawing_follows_the_distribution():
    logits = np.log([0.5, 0.1, 0.3, 0.1])
    np.testing.assert_allclose(draw(logits), [0.5, 0.1, 0.3, 0.1], atol=0.015)
    hot = np.array([0.5, 0.1, 0.3, 0.1]) ** 0.5
    np.testing.assert_allclose(draw(logits, temperature=2.0), hot / hot.sum(), atol=0.015)
    assert draw(logits, temperature=0.01)[0] == 1


def test_top_p_keeps_the_likeliest():
    logits = np.log([0.1, 0.5, 0.3, 0.1])
    # 0.5 is less than 0.6, so the token that reaches it, of 0.3, is a candidate too.
    np.testing.assert_allclose(draw(logits, top_p=0.6), [0, 5 / 8, 3 / 8, 0], atol=0.015)
    np.testing.assert_allclose(draw(logits, top_p=0.4), [0, 1, 0, 0])
    np.testing.assert_allclose(draw(logits, top_p=1e-9), [0, 1, 0, 0])


def test_masks():
    full = causal_mask(2, 3, 6)
    np.testing.assert_array_equal(full, np.arange(6) <= np.arange(2, 5)[:, None])
    window = np.asarray(causal_mask(jnp.int32(2), 3, 6, window=2))
    np.testing.assert_array_equal(window.sum(axis=1), [2, 2, 2])
    np.testing.assert_array_equal(window.argmax(axis=1), [1, 2, 3])


def test_caches_are_written_in_place():
    cache = LayerCache(jnp.zeros((2, 5, 3)), jnp.zeros((2, 5, 1)))
    cache = cache.write(jnp.ones((2, 2, 3)), jnp.ones((2, 2, 1)), jnp.int32(1))
    np.testing.assert_array_equal(cache.first[0, :, 0], [0, 1, 1, 0, 0])
    np.testing.assert_array_equal(cache.second[1, :, 0], [0, 1, 1, 0, 0])
    assert cache.length == 5


@pytest.fixture(scope="module")
def model():
    config = dataclasses.replace(
        MixtralConfig.mixtral_8x7b(),
        vocab_size=32,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        intermediate_size=32,
        moe_intermediate_size=32,
        max_position_embeddings=64,
    )
    return models.from_config(config, dtype=jnp.float32)


def test_seeds(model):
    prompt = np.arange(8).reshape(2, 4)

    def drawn(**options):
        return np.asarray(models.generate(model, prompt, max_new_tokens=12, cache_length=20, **options))

    hot = drawn(temperature=1.0, seed=1)
    np.testing.assert_array_equal(hot, drawn(temperature=1.0, seed=1))
    assert (hot != drawn(temperature=1.0, seed=2)).any()
    greedy = drawn()
    np.testing.assert_array_equal(greedy, drawn(temperature=1.0, top_p=1e-9))
    assert greedy.shape == (2, 12)


def test_the_end_of_a_text(model):
    prompt = np.arange(8).reshape(2, 4)
    whole = np.asarray(models.generate(model, prompt, max_new_tokens=12, cache_length=20))
    progress = Progress()
    reports = []
    steps = stream(
        model,
        prompt,
        max_new_tokens=12,
        cache_length=20,
        stop_tokens=(int(whole[0, 2]), int(whole[1, 4])),
        progress=progress,
        report=reports.append,
    )
    found = np.stack(list(steps), axis=1)
    # It goes on until the last sequence has had one of them.
    done = np.isin(whole, [whole[0, 2], whole[1, 4]])
    end = int(done.argmax(axis=1).max()) + 1
    np.testing.assert_array_equal(found, whole[:, :end])
    assert (progress.prompt_tokens, progress.new_tokens) == (4, end)
    # One for the prompt, one for each token after the first.
    assert len(reports) == end
    (report,) = reports[-1]
    # Two sequences, two experts a token; without ranks each token is one row.
    assert int(report.loads.sum()) == 4
    assert int(report.copies) == 2
    assert int(report.ok) == 1


def test_changed_parameters_count(model):
    """Compiled programs take the parameters that a model has now."""
    tokens = np.arange(8).reshape(2, 4)
    before = np.asarray(model(tokens))
    kernel = model.head.kernel
    value = kernel[...]
    try:
        kernel[...] = -value
        np.testing.assert_allclose(model(tokens), -before, rtol=1e-6)
    finally:
        kernel[...] = value
    np.testing.assert_array_equal(model(tokens), before)


def test_gradients(model):
    """It can be fine-tuned: every parameter has a gradient that is finite, and not zero."""
    tokens = jnp.arange(8).reshape(2, 4)

    @nnx.jit
    def gradient(model, tokens):
        def loss(model):
            return -jax.nn.log_softmax(model(tokens)[:, :-1])[..., 1].mean()

        return nnx.grad(loss)(model)

    for path, leaf in nnx.to_flat_state(gradient(model, tokens)):
        assert np.isfinite(leaf[...]).all(), path
        assert np.abs(leaf[...]).max() > 0, path


class Bytes:
    """Tokens are bytes."""

    def encode(self, text):
        return list(text.encode())

    def decode(self, tokens):
        return bytes(tokens).decode(errors="replace")


def test_text_comes_by_characters():
    stream = TextStream(Bytes())
    parts = [stream.add(token) for token in "aé€b".encode()]
    assert parts == ["a", "", "é", "", "", "€", "b"]
    assert stream.add(0xC3) == ""
    assert stream.end() == "�"


class Metaspace:
    """As Llama's and Mixtral's tokenizers decode: "▁" is a space, and a text's first one is dropped."""

    words = ("▁Once", "▁upon", "▁a", "▁time", "s", ",", "▁")

    def __init__(self):
        self.decoded = 0

    def decode(self, tokens):
        self.decoded += len(tokens)
        return "".join(self.words[token] for token in tokens).replace("▁", " ").removeprefix(" ")


def test_text_continues_its_prompt():
    prompt, new = [0, 1], [2, 3, 4, 5, 6, 6, 2, 3]
    stream = TextStream(Metaspace(), prompt)
    text = "Once upon" + "".join(map(stream.add, new)) + stream.end()
    assert text == Metaspace().decode(prompt + new) == "Once upon a times,   a time"
    # At the start of a text there is no space to show.
    assert TextStream(Metaspace()).add(2) == "a"


class ByteFallback(Bytes):
    """Tokens are bytes, all of them replaced where they are no text: as Llama's decoder makes of a run."""

    def decode(self, tokens):
        try:
            return bytes(tokens).decode()
        except UnicodeDecodeError:
            return "�" * len(tokens)


@pytest.mark.parametrize("after", range(4))
def test_no_text_is_lost_after_a_prompt_of_long_characters(after):
    """Whichever byte of a character the window of the prompt would start with."""
    prompt = ("a" * 3 + "😀" * 5 + "b" * after).encode()
    stream = TextStream(ByteFallback(), list(prompt))
    assert "".join(map(stream.add, "😀 é".encode())) + stream.end() == "😀 é"


def test_long_texts_cost_no_more_by_token():
    tokenizer = Metaspace()
    stream = TextStream(tokenizer, [0] * 1000)
    for number in range(1000):
        assert stream.add(3) == " time", number
    assert tokenizer.decoded < 5 * 1000


def test_garbage_is_not_kept_back():
    """Bytes that never make a character come out as such, not only at the end."""
    stream = TextStream(Bytes())
    shown = "".join(stream.add(0xFF) for _ in range(100))
    assert len(shown) > 80
    assert shown + stream.end() == "�" * 100


def test_of_all_tokens_none_is_lost():
    """Sums of 160000 probabilities reach 1 before the last of them by rounding."""
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((1, 160_000)) * 3, jnp.float32)
    ranked = -jnp.sort(-logits)
    probs = jax.nn.softmax(ranked)
    lost = jnp.cumsum(probs, axis=-1) - probs >= 1
    assert lost.sum() > 100
    assert candidates(ranked, jnp.float32(1.0)).all()
    assert not candidates(ranked, jnp.float32(0.999)).all()
