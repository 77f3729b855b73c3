"""Examples of README and guide run as they stand, links lead somewhere, the API reference is up to date."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def run_blocks(path):
    """Runs the document's Python blocks one after the other; the names that they leave."""
    names = {"__name__": "__main__"}
    blocks = re.finditer(r"^```python\n(.*?)^```$", path.read_text(), re.DOTALL | re.MULTILINE)
    for block in blocks:
        line = path.read_text()[: block.start(1)].count("\n")
        exec(compile("\n" * line + block[1], str(path), "exec"), names)
    return names


def test_readme():
    names = run_blocks(ROOT / "README.md")
    x, indices, w = names["x"], names["indices"], names["w"]
    expected = sum(0.5 * np.einsum("th,thk->tk", x, w[indices[:, k]]) for k in range(2))
    np.testing.assert_allclose(names["out"], expected, rtol=1e-4, atol=1e-4)


def test_guide():
    names = run_blocks(ROOT / "docs" / "guide.md")
    assert len(names["losses"]) == 5
    assert names["stats"]["ranks"][0]["exchanges"] > 20
    assert names["ep"].stats()["state"] == "closed"


def test_models():
    names = run_blocks(ROOT / "docs" / "models.md")
    assert names["new"].shape == (1, 4)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links(path):
    for target in re.findall(r"\]\(([^)]+)\)", path.read_text()):
        file, _, anchor = target.partition("#")
        if file.startswith(("http://", "https://")):
            continue
        linked = path.parent / file if file else path
        assert linked.exists(), f"{path.name}: {target}"
        if anchor and linked.suffix == ".md":
            headings = re.findall(r"^#+ (.+)$", linked.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{path.name}: {target}"


def test_the_api_reference_is_up_to_date():
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "api_docs.py", "--check"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
