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
        library: Any = importlib.import_module("transformers")
        try:
            self._tokenizer = library.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except (ValueError, OSError) as error:
            raise ModelError(
                f"transformers can't make a tokenizer of {folder} without running the checkpoint's own code, "
                f"which is never run here: convert it to a tokenizer.json, or give tokens. It said: {error}"
            ) from error

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text))

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))


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

    Args:
      tokenizer: that of the model.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._shown = 0

    def add(self, token: int) -> str:
        """The text that this token adds; empty while a character is incomplete."""
        self._tokens.append(token)
        text = self._tokenizer.decode(self._tokens)
        if text.endswith("�"):
            return ""
        new, self._shown = text[self._shown :], len(text)
        return new

    def end(self) -> str:
        """What is left."""
        text = self._tokenizer.decode(self._tokens)
        new, self._shown = text[self._shown :], len(text)
        return new
