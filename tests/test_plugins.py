"""Plugin wheels: generated, built, installed, discovered; and refused where they don't fit."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import pplx_jax
from pplx_jax import doctor, plugins

pytestmark = pytest.mark.multiprocess
ROOT = Path(__file__).resolve().parent.parent
GENERATE = ROOT / "xla_ffi" / "cuda_plugin" / "generate.py"
DISCOVER = """
import dataclasses, json, sys
sys.path[:0] = sys.argv[1:]
from pplx_jax import plugins
assert "jax_plugins" not in sys.modules
print(json.dumps([dataclasses.asdict(plugin) for plugin in plugins.discover()]))
"""


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """The wheel of each CUDA version, unpacked: what an install leaves in site-packages."""
    folder = tmp_path_factory.mktemp("plugins")
    installed = {}
    for cuda in ("12", "13"):
        project, built = folder / f"project{cuda}", folder / f"wheel{cuda}"
        subprocess.run([sys.executable, GENERATE, cuda, project, "--no-kernels"], check=True, timeout=60)
        command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
        subprocess.run([*command, "-w", built, project], check=True, timeout=120)
        (wheel,) = built.glob("*.whl")
        assert wheel.name == f"pplx_jax_cuda{cuda}-{pplx_jax.__version__}-py3-none-any.whl"
        installed[cuda] = folder / f"site{cuda}"
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(installed[cuda])
    return installed


def discover(*folders):
    done = subprocess.run(
        [sys.executable, "-c", DISCOVER, *map(str, folders)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        check=True,
    )
    return json.loads(done.stdout)


def test_none():
    assert discover() == []


@pytest.mark.parametrize("cuda", ["12", "13"])
def test_one_is_found(wheels, cuda):
    (found,) = discover(wheels[cuda])
    assert found == {
        "name": f"cuda{cuda}",
        "version": pplx_jax.__version__,
        "platform": "CUDA",
        "cuda": int(cuda),
        "registrations": {},
        "extension": "",
        "problem": None,
    }


def test_two_are_refused(wheels):
    found = discover(wheels["12"], wheels["13"])
    assert [plugin["name"] for plugin in found] == ["cuda12", "cuda13"]
    for plugin in found:
        assert "several CUDA versions are installed (cuda12, cuda13)" in plugin["problem"]


@pytest.mark.parametrize(
    ("line", "replaced", "says"),
    [
        (f'"abi": {plugins.ABI}', '"abi": 99', "ABI 99), pplx-jax is"),
        (f'"version": "{pplx_jax.__version__}"', '"version": "9.9.9"', "it is version 9.9.9"),
        ('"cuda": 12', '"cuba": 12', "KeyError: 'cuda'"),
        ("from typing", "from nowhere_at_all", "ModuleNotFoundError"),
    ],
)
def test_handshake(wheels, tmp_path, line, replaced, says):
    package = wheels["12"]
    for file in package.rglob("*"):
        if file.is_file():
            target = tmp_path / file.relative_to(package)
            target.parent.mkdir(parents=True, exist_ok=True)
            text = file.read_text()
            target.write_text(text.replace(line, replaced) if file.name == "__init__.py" else text)
    (found,) = discover(tmp_path)
    assert says in found["problem"]


def test_the_project_compiles_this_tree(tmp_path):
    """What it compiles is the extension of a build in the source tree; the compiler takes minutes."""
    subprocess.run([sys.executable, GENERATE, "13", tmp_path / "new"], check=True, timeout=60)
    build = tomllib.loads((tmp_path / "new" / "pyproject.toml").read_text())["tool"]["scikit-build"]
    assert Path(build["cmake"]["source-dir"]) == ROOT
    assert build["install"]["components"] == ["cuda"]
    assert build["cmake"]["define"]["PPLX_CUDA_DESTINATION"] == "pplx_jax_cuda13"
    text = (tmp_path / "new" / "pplx_jax_cuda13" / "__init__.py").read_text()
    assert '"extension": "pplx_jax_cuda13._cuda"' in text
    compile(text, "plugin", "exec")


@pytest.mark.parametrize(
    ("arguments", "says"), [(["11", "new"], "CUDA 11"), (["12", ROOT], "not empty"), ([], "generate.py")]
)
def test_generator_errors(tmp_path, arguments, says):
    command = [sys.executable, GENERATE, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode != 0
    assert says in done.stderr


def test_doctor_reports_plugins(monkeypatch):
    good = plugins.Plugin("cuda12", "0.1.0", "CUDA", 12)
    bad = plugins.Plugin("cuda13", problem="it does not fit")
    monkeypatch.setattr(plugins, "discover", lambda: [good, bad])
    problems = []
    assert doctor._plugins(problems) == [
        {"name": "cuda12", "version": "0.1.0", "kernels": 0},
        {"name": "cuda13", "version": "", "kernels": 0},
    ]
    assert [problem.severity for problem in problems] == ["error"]
    assert "it does not fit" in problems[0].what
