"""Continuing texts: prefill in chunks, then a compiled step for each token."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pplx_jax.models.config import DecoderConfig
from pplx_jax.models.decoder import Decoder, LayerReport, check_tokens
from pplx_jax.models.errors import ModelError
from pplx_jax.models.programs import Programs

#: Tokens of a prompt that go through the model at once.
PREFILL_CHUNK = 512


@dataclasses.dataclass
class Progress:
    """What a generation has done so far; seconds include compilation where it happened.

    Attributes:
      prompt_tokens, new_tokens: of each sequence.
      prefill_seconds: until the first new token.
      decode_seconds: since then.
      reports: of the last step's exchanges, a `LayerReport` for each MoE layer, if they were asked for.
    """

    prompt_tokens: int = 0
    new_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    reports: list[LayerReport] = dataclasses.field(default_factory=list)


def _check(name: str, value: Any, kinds: tuple[type, ...], good: bool, allowed: str) -> None:
    if isinstance(value, bool) or not isinstance(value, kinds) or not good:
        raise ModelError(f"{name} must be {allowed}, got {value!r}")


def check_prompt(config: DecoderConfig, prompt: np.ndarray[Any, Any], max_new_tokens: int) -> None:
    """Whether a model of this configuration can continue a prompt [B, S] by so many tokens.

    Raises:
      ModelError: the prompt isn't tokens of its vocabulary, or they are too many; says what to do.
    """
    check_tokens(config, prompt, prompt.shape[1] + max_new_tokens if prompt.ndim == 2 else 0)
    if prompt.min() < 0 or prompt.max() >= config.vocab_size:
        raise ModelError(
            f"tokens must be from 0 to {config.vocab_size - 1}, got {prompt.min()} to {prompt.max()}: "
            f"do they come from this model's tokenizer?"
        )


def stream(
    model: Decoder,
    tokens: Any,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_tokens: Sequence[int] = (),
    cache_length: int | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
    progress: Progress | None = None,
    report: bool = False,
) -> Iterator[np.ndarray[Any, np.dtype[np.int32]]]:
    """The new tokens one after the other; arguments as in `generate`.

    Args:
      progress: is kept up to date.
      report: whether ``progress.reports`` says what the layers' exchanges did.

    Yields:
      int32 [B], for each step.
    """
    prompt = np.asarray(tokens)
    _check("max_new_tokens", max_new_tokens, (int, np.integer), True, "an int of at least 0")
    _check("max_new_tokens", max_new_tokens, (int, np.integer), max_new_tokens >= 0, "an int of at least 0")
    number = (int, float, np.floating)
    _check("temperature", temperature, number, True, "a number of at least 0")
    _check("temperature", temperature, number, 0 <= temperature < float("inf"), "a number of at least 0")
    _check("top_p", top_p, number, True, "above 0 and at most 1")
    _check("top_p", top_p, number, 0 < top_p <= 1, "above 0 and at most 1")
    _check("prefill_chunk", prefill_chunk, (int,), True, "an int of at least 1")
    _check("prefill_chunk", prefill_chunk, (int,), prefill_chunk >= 1, "an int of at least 1")
    check_prompt(model.config, prompt, max_new_tokens)
    needed = prompt.shape[1] + max_new_tokens
    if cache_length is not None and cache_length < needed:
        raise ModelError(
            f"a prompt of {prompt.shape[1]} tokens and max_new_tokens={max_new_tokens} exceed "
            f"cache_length={cache_length}: make it at least {needed}, or shorten the prompt"
        )
    most = model.placement.longest(prompt.shape[0])
    if most == 0:
        raise ModelError(
            f"{prompt.shape[0]} sequences are more than the model was loaded for: give from_pretrained a "
            f"larger max_tokens, or take fewer at a time"
        )
    return _stream(
        model,
        prompt.astype(np.int32),
        max_new_tokens,
        (temperature, top_p, seed),
        frozenset(stop_tokens),
        cache_length or needed,
        min(prefill_chunk, prompt.shape[1], most or prefill_chunk),
        progress or Progress(),
        report,
    )


def _stream(
    model: Decoder,
    prompt: np.ndarray[Any, np.dtype[np.int32]],
    count: int,
    sampling: tuple[float, float, int],
    stop: frozenset[int],
    length: int,
    chunk: int,
    progress: Progress,
    report: bool,
) -> Iterator[np.ndarray[Any, np.dtype[np.int32]]]:
    if not count:
        return
    programs, state = Programs.of(model), nnx.state(model)
    options = programs.sampling_options(*sampling)
    batch, size = prompt.shape
    # The last chunk is padded, and its padding written too: a write past the end would move back.
    chunks = -(-size // chunk)
    caches = programs.caches(model, batch, max(length, chunks * chunk))
    began = time.monotonic()
    chosen: jax.Array | None = None
    for start in range(0, size, chunk):
        part = prompt[:, start : start + chunk]
        live = part.shape[1]
        part = np.pad(part, ((0, 0), (0, chunk - live)))
        chosen, caches, progress.reports = programs.step(
            state, caches, part, start, num_tokens=live, options=options, report=report
        )
        # Programs queued without a pause can starve each other of threads on CPU.
        jax.block_until_ready(chosen)
    assert chosen is not None
    done = np.zeros(batch, bool)
    token = np.asarray(chosen)
    progress.prompt_tokens, progress.prefill_seconds = size, time.monotonic() - began
    began = time.monotonic()
    for position in range(size, size + count):
        progress.new_tokens += 1
        progress.decode_seconds = time.monotonic() - began
        yield token
        done |= np.isin(token, list(stop))
        if done.all() or position + 1 == size + count:
            return
        chosen, caches, progress.reports = programs.step(
            state, caches, token[:, None], position, options=options, report=report
        )
        token = np.asarray(chosen)


def generate(
    model: Decoder,
    tokens: Any,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_tokens: Sequence[int] = (),
    cache_length: int | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
) -> jax.Array:
    """Continues each sequence. Every process of the model's mesh calls it alike, and gets the same result.

    Args:
      model: of `from_pretrained`.
      tokens: integers [B, S], a prompt of S tokens in each row.
      max_new_tokens: how many to add, at least 0.
      temperature: divides the logits; 0 takes the likeliest token.
      top_p: only the likeliest tokens that make up this much of the probability are candidates; 1: all.
      seed: of the sampling; the same seed gives the same tokens.
      stop_tokens: end once every sequence has had one, such as ``model.config.eos_token_ids``.
      cache_length: positions that caches have, at least S + max_new_tokens, which is the default. Programs
        are compiled for it: keep it where prompts vary.
      prefill_chunk: tokens of the prompt that go through the model at once.

    Returns:
      int32 [B, N], the new tokens: N is max_new_tokens, or less where every sequence had a stop token.

    Raises:
      ModelError: an argument has a wrong type or range, or the prompt exceeds the context or the cache.
    """
    steps = list(
        stream(
            model,
            tokens,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            stop_tokens=stop_tokens,
            cache_length=cache_length,
            prefill_chunk=prefill_chunk,
        )
    )
    if not steps:
        return jnp.zeros((np.asarray(tokens).shape[0], 0), jnp.int32)
    return jnp.asarray(np.stack(steps, axis=1))
