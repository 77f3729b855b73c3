"""Texts to tokens and back, with whichever library is installed."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from pplx_jax.models.errors import ModelError


class Tokenizer(Protocol):
    """What `load_tokenizer` gives."""

    def encode(self, text: str) -> list[int]:
        """A prompt's tokens, with those that the checkpoint puts at the start."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Their text, without special tokens."""


class _Fast:
    def __init__(self, path: Path) -> None:
        library: Any = importlib.import_module("tokenizers")
        try:
            self._tokenizer = library.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain ones
            raise ModelError(f"{path} can't be read ({error}): download it again") from error

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))


class _Transformers:
    def __init__(self, folder: Path) -> None:
        try:
            library: Any = importlib.import_module("transformers")
            self._tokenizer = library.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except ImportError as error:
            raise ModelError(
                f"transformers needs another package to read the tokenizer of {folder}: install it, or give "
                f"tokens. It said: {' '.join(str(error).split())}"
            ) from error
        except (ValueError, OSError) as error:
            raise ModelError(
                f"transformers can't make a tokenizer of {folder} without running the checkpoint's own code, "
                f"which is never run here: convert it to a tokenizer.json, or give tokens. It said: {error}"
            ) from error

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text))

    def chat(self, text: str) -> list[int]:
        """The tokens of a conversation that begins with this, up to where the answer starts."""
        if not getattr(self._tokenizer, "chat_template", None):
            raise ModelError("the checkpoint's tokenizer has no chat template: give the text as it is")
        message = [{"role": "user", "content": text}]
        try:
            prompt = self._tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # whatever a template does: it is a program, if one in a sandbox
            raise ModelError(
                f"the checkpoint's chat template failed: {error!r}; give the whole text"
            ) from error
        return list(self._tokenizer.encode(prompt, add_special_tokens=False))

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))


def chat_tokens(folder: str | os.PathLike[str], text: str) -> list[int]:
    """The tokens of a user's message in the checkpoint's chat template, up to where the answer starts.

    Raises:
      ModelError: ``transformers``, which reads templates, isn't installed, or the checkpoint has none.
    """
    if importlib.util.find_spec("transformers") is None:
        raise ModelError(
            "chat templates need transformers: `pip install transformers`, or give the whole text"
        )
    return _Transformers(Path(folder)).chat(text)


def load_tokenizer(folder: str | os.PathLike[str]) -> Tokenizer:
    """The checkpoint's tokenizer: its tokenizer.json through ``tokenizers``, else through ``transformers``.

    Raises:
      ModelError: there is none, or no library that reads it; says what to install or to give instead.
    """
    folder = Path(folder)
    fast = folder / "tokenizer.json"
    if fast.exists() and importlib.util.find_spec("tokenizers") is not None:
        return _Fast(fast)
    others = [
        name for name in ("tokenizer.model", "tiktoken.model", "tokenizer.json") if (folder / name).exists()
    ]
    if not others:
        raise ModelError(f"{folder} has no tokenizer.json: download it, or give tokens in place of a text")
    if importlib.util.find_spec("transformers") is None:
        what = "tokenizers" if fast.exists() else "transformers"
        raise ModelError(f"{folder} has {others[0]}: `pip install {what}` to read it, or give tokens")
    return _Transformers(folder)


class TextStream:
    """Text as its tokens come in: what is known for certain so far.

    What a token adds depends on those before it: many decoders drop the space in front of a text's first
    word. So a short window of tokens is decoded, with and without the new ones, at the same cost however long
    the text is.

    Args:
      tokenizer: that of the model.
      prompt: tokens before the first one, which are not shown.
    """

    # Tokens of the prompt that are decoded with the first new one.
    _CONTEXT = 8
    # As many more where those start inside of a character, of at most 4 tokens: some decoders (ByteFallback)
    # make garbage of all bytes in a row then, the new ones included.
    _FURTHER = 3
    # Tokens that an incomplete character may keep back: UTF-8 needs 4, and what has more is garbage.
    _HELD = 16

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        for context in range(self._CONTEXT, self._CONTEXT + self._FURTHER + 1):
            self._window = list(prompt[-context:])
            if len(prompt) <= context or not tokenizer.decode(self._window).startswith("�"):
                break
        self._shown = len(self._window)

    def add(self, token: int) -> str:
        """The text that this token adds; empty while a character is incomplete."""
        self._window.append(token)
        return self._new(complete=True)

    def end(self) -> str:
        """What is left."""
        return self._new(complete=False)

    def _new(self, *, complete: bool) -> str:
        text = self._tokenizer.decode(self._window)
        before = self._tokenizer.decode(self._window[: self._shown])
        held = len(self._window) - self._shown
        if len(text) <= len(before) or (complete and text.endswith("�") and held < self._HELD):
            return ""
        # What was new is the context of what comes next.
        self._window = self._window[self._shown :]
        self._shown = len(self._window)
        return text[len(before) :]
