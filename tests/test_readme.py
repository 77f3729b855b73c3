"""The README's example runs as it stands, and computes what it should."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

README = Path(__file__).parent.parent / "README.md"


def test_example():
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names = {}
    exec(compile(example, "README.md", "exec"), names)
    x, indices, w = names["x"], names["indices"], names["w"]
    expected = sum(0.5 * np.einsum("th,thk->tk", x, w[indices[:, k]]) for k in range(2))
    np.testing.assert_allclose(names["out"], expected, rtol=1e-4, atol=1e-4)


def test_links():
    for target in re.findall(r"\]\(([^)#]+)\)", README.read_text()):
        assert (README.parent / target).exists(), target
