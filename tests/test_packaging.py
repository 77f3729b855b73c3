"""What an install holds, the command line, and the files that the two commands read."""

import ast
import importlib
import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pplx_jax
from pplx_jax import _core

pytestmark = pytest.mark.smoke

ROOT = Path(__file__).resolve().parent.parent


def is_editable():
    text = importlib.metadata.distribution("pplx-jax").read_text("direct_url.json")
    return bool(text) and json.loads(text).get("dir_info", {}).get("editable", False)


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "pplx_jax", *arguments], capture_output=True, text=True, timeout=120
    )


def test_version():
    assert importlib.metadata.version("pplx-jax") == pplx_jax.__version__


def test_public_names_exist():
    for name in pplx_jax.__all__:
        assert getattr(pplx_jax, name) is not None


@pytest.mark.parametrize("module", ["models", "testing", "engine", "flax", "linen", "balance"])
def test_modules_import(module):
    assert importlib.import_module(f"pplx_jax.{module}").__name__ == f"pplx_jax.{module}"


def test_an_install_is_one_package():
    if is_editable():
        # New files count at once: modules come from the source tree.
        assert Path(pplx_jax.__file__).parent == ROOT / "pplx_jax"
        assert Path(importlib.import_module("pplx_jax.models").__file__).resolve().parent == ROOT / "models"
        return
    files = [str(file) for file in importlib.metadata.files("pplx-jax")]
    assert {file.split("/")[0] for file in files if not file.startswith("..")} <= {
        "pplx_jax",
        f"pplx_jax-{pplx_jax.__version__}.dist-info",
    }
    assert "pplx_jax/py.typed" in files
    assert "pplx_jax/_core.pyi" in files
    for path in [
        *ROOT.glob("models/**/*.py"),
        *ROOT.glob("pplx_jax/*.py"),
        *ROOT.glob("pplx_jax/testing/*.py"),
    ]:
        relative = path.relative_to(ROOT)
        installed = relative if relative.parts[0] == "pplx_jax" else Path("pplx_jax") / relative
        assert str(installed) in files


def test_the_stub_describes_the_extension():
    tree = ast.parse((ROOT / "pplx_jax" / "_core.pyi").read_text())
    described = {node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    assert described == {name for name in dir(_core) if not name.startswith("_")}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            members = {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
            missing = {name for name in members if not hasattr(getattr(_core, node.name), name)}
            assert not missing, f"{node.name} has no {missing}"


@pytest.mark.multiprocess
def test_doctor():
    done = command("doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    for word in ("jaxlib", "local", "sim", "tcp", "shm", "memlock"):
        assert word in done.stdout


@pytest.mark.multiprocess
def test_command_line_errors():
    assert "demo" in command("--help").stdout
    done = command("demo", "--processes", "0")
    assert done.returncode == 2
    assert "--processes" in done.stderr


def test_ci_runs_make_test():
    assert (ROOT / ".ci" / "run").read_text().rstrip().endswith("exec make test")


def test_apt_packages_are_in_one_file():
    lines = (ROOT / "requirements" / "apt.txt").read_text().splitlines()
    packages = [line for line in lines if line and not line.startswith("#")]
    assert len(set(packages)) == len(packages) > 4
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9+.-]+", package) for package in packages)
    for name in ("scripts/dev.sh", "Makefile", ".ci/run"):
        assert "libfabric-dev" not in (ROOT / name).read_text()
