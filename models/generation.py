"""Continuing texts: prefill in chunks, then a compiled step for each token."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pplx_jax.models.config import DecoderConfig
from pplx_jax.models.decoder import Decoder, LayerReport, check_range, check_tokens
from pplx_jax.models.errors import ModelError
from pplx_jax.models.programs import Programs, failed_elsewhere
from pplx_jax.models.sharding import Placement
from pplx_jax.models.sizes import prefill_chunk as default_chunk


@dataclasses.dataclass
class Progress:
    """What a generation has done so far; seconds include compilation where it happened.

    Attributes:
      prompt_tokens, new_tokens: of each sequence.
      prefill_seconds: until the first new token.
      decode_seconds: since then.
    """

    prompt_tokens: int = 0
    new_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0


def _check(name: str, value: Any, kinds: tuple[type, ...], good: Callable[[Any], bool], allowed: str) -> None:
    if isinstance(value, bool) or not isinstance(value, kinds) or not good(value):
        raise ModelError(f"{name} must be {allowed}, got {value!r}")


def check_options(
    *,
    max_new_tokens: int = 0,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    prefill_chunk: int | None = None,
) -> None:
    """Whether these are options of `generate`; they need no model.

    Raises:
      ModelError: one has a wrong type or range; says which are allowed.
    """
    integer, number = (int, np.integer), (int, float, np.integer, np.floating)
    _check("max_new_tokens", max_new_tokens, integer, lambda n: n >= 0, "an int of at least 0")
    _check("temperature", temperature, number, lambda t: 0 <= t < float("inf"), "a number of at least 0")
    _check("top_p", top_p, number, lambda p: 0 < p <= 1, "above 0 and at most 1")
    _check("seed", seed, integer, lambda s: -(2**63) <= s < 2**63, "an int of at most 64 bits")
    if prefill_chunk is not None:
        _check("prefill_chunk", prefill_chunk, integer, lambda n: n >= 1, "an int of at least 1")


def chunk_and_cache(
    config: DecoderConfig,
    placement: Placement,
    batch: int,
    prompt: int,
    length: int,
    prefill_chunk: int | None,
) -> tuple[int, int]:
    """Tokens of a prompt that go through the model at once, and the positions of its caches.

    A shorter prompt is padded to a power of two, so that prompts of many lengths share few programs; the
    cache's length doesn't depend on the prompt's at all, and has room for every chunk's padding.

    Args:
      config, placement: the model's.
      batch: B.
      prompt: S.
      length: positions that are needed, S and those to come.
      prefill_chunk: most tokens at once; None: what `pplx_jax.models.sizes.prefill_chunk` says.
    """
    local = batch // placement.size("dp", "ep") if placement.batch(batch) is not None else batch
    most = prefill_chunk or default_chunk(config, local, length, tp=placement.size("tp"))
    most = min(most, placement.longest(batch) or most)
    largest = min(most, _power_of_two(length))
    return min(most, _power_of_two(prompt)), -(-length // largest) * largest


def _power_of_two(count: int) -> int:
    """The smallest one that isn't less."""
    return 1 << (count - 1).bit_length()


def check_prompt(config: DecoderConfig, prompt: np.ndarray[Any, Any], max_new_tokens: int) -> None:
    """Whether a model of this configuration can continue a prompt [B, S] by so many tokens.

    Raises:
      ModelError: the prompt isn't tokens of its vocabulary, or they are too many; says what to do.
    """
    check_tokens(config, prompt, prompt.shape[1] + max_new_tokens if prompt.ndim == 2 else 0)
    check_range(config, prompt)


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
    prefill_chunk: int | None = None,
    progress: Progress | None = None,
    report: Callable[[list[LayerReport]], None] | None = None,
) -> Iterator[np.ndarray[Any, np.dtype[np.int32]]]:
    """The new tokens one after the other; arguments as in `generate`.

    Args:
      progress: is kept up to date.
      report: is called after each program, one for every chunk of the prompt and every step, with what its
        exchanges did: a `LayerReport` for each MoE layer.

    Yields:
      int32 [B], for each step.
    """
    prompt = np.asarray(tokens)
    check_options(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        prefill_chunk=prefill_chunk,
    )
    check_prompt(model.config, prompt, max_new_tokens)
    needed = prompt.shape[1] + max_new_tokens
    if cache_length is not None and cache_length < needed:
        raise ModelError(
            f"a prompt of {prompt.shape[1]} tokens and max_new_tokens={max_new_tokens} exceed "
            f"cache_length={cache_length}: make it at least {needed}, or shorten the prompt"
        )
    if model.placement.longest(prompt.shape[0]) == 0:
        raise ModelError(
            f"{prompt.shape[0]} sequences are more than the model was loaded for: give from_pretrained a "
            f"larger max_tokens, or take fewer at a time"
        )
    chunk, length = chunk_and_cache(
        model.config,
        model.placement,
        prompt.shape[0],
        prompt.shape[1],
        cache_length or needed,
        prefill_chunk,
    )
    return _stream(
        model,
        prompt.astype(np.int32),
        max_new_tokens,
        (temperature, top_p, seed),
        frozenset(stop_tokens),
        length,
        chunk,
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
    report: Callable[[list[LayerReport]], None] | None,
) -> Iterator[np.ndarray[Any, np.dtype[np.int32]]]:
    if not count:
        return
    programs, state = Programs.of(model), nnx.state(model)
    options = programs.sampling_options(*sampling)
    batch, size = prompt.shape
    caches = programs.caches(model, batch, length)

    def run(
        tokens: np.ndarray[Any, Any], position: int, num_tokens: int | None = None
    ) -> np.ndarray[Any, np.dtype[np.int32]]:
        nonlocal caches
        with model.placement.checking():
            chosen, caches, reports = programs.step(
                state,
                caches,
                tokens,
                position,
                num_tokens=num_tokens,
                options=options,
                report=report is not None,
            )
            # Waits, too: programs queued without a pause can starve each other of threads on CPU.
            token = np.asarray(chosen)
        if (token < 0).any():
            raise failed_elsewhere()
        if report is not None:
            report(reports)
        return token

    began = time.monotonic()
    for start in range(0, size, chunk):
        # The last chunk is padded, and its padding written too: a write past the end would move back.
        part = prompt[:, start : start + chunk]
        live = part.shape[1]
        token = run(np.pad(part, ((0, 0), (0, chunk - live))), start, live)
    done = np.zeros(batch, bool)
    progress.prompt_tokens, progress.prefill_seconds = size, time.monotonic() - began
    began = time.monotonic()
    for position in range(size, size + count):
        progress.new_tokens += 1
        progress.decode_seconds = time.monotonic() - began
        yield token
        done |= np.isin(token, list(stop))
        if done.all() or position + 1 == size + count:
            return
        token = run(token[:, None], position)


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
    prefill_chunk: int | None = None,
) -> jax.Array:
    """Continues each sequence. Every process of the model's mesh calls it alike, and gets the same result.

    Args:
      model: of `from_pretrained`.
      tokens: integers [B, S], a prompt of S tokens in each row.
      max_new_tokens: how many to add, at least 0.
      temperature: divides the logits; 0 takes the likeliest token.
      top_p: only the likeliest tokens that make up this much of the probability are candidates; 1: all.
      seed: of the sampling, of at most 64 bits; the same seed gives the same tokens.
      stop_tokens: end once every sequence has had one, such as ``model.config.eos_token_ids``.
      cache_length: positions that caches have, at least S + max_new_tokens, which is the default; rounded up
        to whole chunks. Programs are compiled for it: keep it where prompts vary, and only the powers of two
        that prompts shorter than a chunk are padded to compile more.
      prefill_chunk: most tokens of a prompt that go through the model at once. None: 512, or the power of two
        whose attention scores, ``B * heads * prefill_chunk * cache_length`` float32 on a device, take at
        most 1 GiB.

    Returns:
      int32 [B, N], the new tokens: N is max_new_tokens, or less where every sequence had a stop token.

    Raises:
      ModelError: an argument has a wrong type or range, or the prompt exceeds the context or the cache.
      PplxError: an exchange failed, see `pplx_jax.ExpertParallel.check`; on all processes, where the mesh
        has several groups of experts, if data of one was wrong.
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
