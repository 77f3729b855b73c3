#!/usr/bin/env python3
"""Writes the project of a CUDA plugin wheel: ``generate.py 12 FOLDER``, then ``pip wheel FOLDER``.

One template for all CUDA versions: they differ in their name and in the compiler of their kernels, the nvcc
of that version, which must be on PATH (or in CUDACXX) when the wheel is built. The project compiles this
source tree. With ``--no-kernels`` as last argument the wheel only makes itself known, and needs no compiler.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
SUPPORTED = ("12", "13")


KERNELS = """wheel.py-api = ""
install.components = ["cuda"]
build.targets = ["_cuda"]
cmake.version = ">=3.25"
cmake.build-type = "Release"
cmake.source-dir = "@ROOT@"

[tool.scikit-build.cmake.define]
PPLX_CUDA = "ON"
PPLX_CUDA_MAJOR = "@CUDA@"
PPLX_CUDA_DESTINATION = "pplx_jax_cuda@CUDA@"
PPLX_WERROR = "OFF"
# With the code of the newest also in a form that later GPUs' drivers compile.
CMAKE_CUDA_ARCHITECTURES = "80-real;90"
"""
NO_KERNELS = """# Nothing is compiled, so the wheel is the same for every Python and machine.
wheel.cmake = false
wheel.platlib = false
wheel.py-api = "py3"
"""


def generate(cuda: str, folder: Path, kernels: bool = True) -> None:
    """Write the project for a CUDA major version into an empty or missing folder."""
    if cuda not in SUPPORTED:
        raise ValueError(f"CUDA {cuda}: plugins exist for {' and '.join(SUPPORTED)}")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty")
    found = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    abi = re.search(r"^ABI = (\d+)$", (ROOT / "pplx_jax" / "plugins.py").read_text(), re.MULTILINE)
    assert found
    assert abi
    package_name = f"pplx_jax_cuda{cuda}"
    values = {
        "@BUILD@": KERNELS if kernels else NO_KERNELS,
        "@IMPORT@": f"from {package_name} import _cuda\n" if kernels else "",
        "@REGISTRATIONS@": "_cuda.registrations()" if kernels else "{}",
        "@EXTENSION@": f"{package_name}._cuda" if kernels else "",
        "@REQUIRES@": ', "nanobind>=2.4", "jaxlib>=0.10"' if kernels else "",
        "@CUDA@": cuda,
        "@VERSION@": found[1],
        "@ABI@": abi[1],
        "@ROOT@": str(ROOT),
    }
    package = folder / package_name
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
    arguments = sys.argv[1:]
    with_kernels = "--no-kernels" not in arguments[2:]
    if len(arguments) != (2 if with_kernels else 3):
        sys.exit(__doc__)
    generate(arguments[0], Path(arguments[1]), with_kernels)
