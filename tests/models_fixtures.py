"""Checkpoints for tests: written, read and changed by hand; one that transformers wrote, and copies of it."""

from __future__ import annotations

import json
import shutil
import struct

import numpy as np
import pytest
from models_hf import build


def save(path, arrays):
    """A safetensors file, by hand: numpy has no float8 of its own."""
    from pplx_jax.models.checkpoint import DTYPES

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
    """All tensors of a checkpoint by name."""
    from pplx_jax.models.checkpoint import Checkpoint

    with Checkpoint(folder) as checkpoint:
        return {name: checkpoint.read(name) for name in checkpoint.tensors}


def edit(folder, **changes):
    """Change fields of ``config.json``."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture(scope="session")
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
