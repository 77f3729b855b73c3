#!/usr/bin/env python3
"""Writes the project of a CUDA plugin wheel: ``generate.py 12 FOLDER``, then ``pip wheel FOLDER``.

One template for all CUDA versions: they differ in their name, and will in the compiler of their kernels.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
SUPPORTED = ("12", "13")


def generate(cuda: str, folder: Path) -> None:
    """Write the project for a CUDA major version into an empty or missing folder."""
    if cuda not in SUPPORTED:
        raise ValueError(f"CUDA {cuda}: plugins exist for {' and '.join(SUPPORTED)}")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty")
    found = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    abi = re.search(r"^ABI = (\d+)$", (ROOT / "pplx_jax" / "plugins.py").read_text(), re.MULTILINE)
    assert found
    assert abi
    values = {"@CUDA@": cuda, "@VERSION@": found[1], "@ABI@": abi[1]}
    package = folder / f"pplx_jax_cuda{cuda}"
    package.mkdir(parents=True)
    for source, target in (
        ("pyproject.toml.in", folder / "pyproject.toml"),
        ("plugin.py.in", package / "__init__.py"),
    ):
        text = (HERE / source).read_text()
        for name, value in values.items():
            text = text.replace(name, value)
        target.write_text(text)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    generate(sys.argv[1], Path(sys.argv[2]))
