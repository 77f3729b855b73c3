"""The part of tests/soft_roce that needs no guest."""

from __future__ import annotations

import gzip
import importlib.util
import lzma
import shutil
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytestmark = pytest.mark.smoke


@pytest.fixture(scope="module")
def guest() -> Any:
    path = Path(__file__).parent / "soft_roce" / "guest.py"
    spec = importlib.util.spec_from_file_location("soft_roce_guest", path)
    assert spec is not None
    assert spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("suffix", "pack"), [(".ko", bytes), (".ko.xz", lzma.compress), (".ko.gz", gzip.compress)]
)
def test_modules_are_decompressed(guest, tmp_path, suffix, pack):
    path = tmp_path / f"rdma_rxe{suffix}"
    path.write_bytes(pack(b"a module"))
    assert guest.read_module(path) == b"a module"
    assert guest.module_name(path.name) == "rdma_rxe"


def test_modules_of_ubuntu_are_decompressed(guest, tmp_path):
    if shutil.which("zstd") is None:
        pytest.skip("zstd is not installed")
    path = tmp_path / "rdma_rxe.ko.zst"
    path.write_bytes(
        subprocess.run(["zstd", "-cq"], input=b"a module", capture_output=True, check=True).stdout
    )
    assert guest.read_module(path) == b"a module"
    path.write_bytes(b"no archive")
    with pytest.raises(guest.Missing, match=r"zstd cannot decompress rdma_rxe\.ko\.zst"):
        guest.read_module(path)


def test_without_zstd_that_is_the_reason(guest, tmp_path, monkeypatch):
    path = tmp_path / "rdma_rxe.ko.zst"
    path.write_bytes(b"")
    monkeypatch.setattr(guest.shutil, "which", lambda *_, **__: None)
    with pytest.raises(guest.Missing, match="zstd is missing"):
        guest.read_module(path)


def test_time_limits_grow_together(guest, monkeypatch):
    monkeypatch.delenv(guest.SCALE, raising=False)
    assert guest.time_scale() == 1
    monkeypatch.setenv(guest.SCALE, "2.5")
    assert guest.time_scale() == 2.5
    assert f"{guest.SCALE}=2.5\n" in guest.job_of(0, 1, 0.0, ["true"])
    for bad in ("0.5", "-1", "fast", "nan"):
        monkeypatch.setenv(guest.SCALE, bad)
        with pytest.raises(SystemExit, match=f"{guest.SCALE}: must be a number from 1 to 100"):
            guest.time_scale()
