"""`python -m pplx_jax doctor`: what it finds, what it makes of it, and its exit code."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from pplx_jax import doctor, doctor_devices, topology
from pplx_jax.errors import PplxError

pytestmark = pytest.mark.multiprocess
ROOT = Path(__file__).resolve().parent.parent
#: Of a job: reports go to others.
TOKEN = "kept to ourselves"


def run(*arguments, **variables):
    return subprocess.run(
        [sys.executable, "-m", "pplx_jax", "doctor", *arguments],
        env=dict(os.environ, **variables),
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
    )


def test_json():
    done = run("--json", PPLX_JOB=TOKEN)
    report = json.loads(done.stdout)
    assert report["environment"]["PPLX_JOB"] == "set"
    assert TOKEN not in done.stdout + done.stderr
    assert done.returncode == 0, report["problems"]
    assert report["versions"]["jax"]
    assert report["libraries"]["libfabric"]["path"].startswith("/")
    assert all(report["fabrics"][name]["works"] for name in ("local", "sim", "tcp", "shm"))
    assert not report["fabrics"]["efa"]["works"] or report["rdma_devices"]
    assert "lo" in {one["name"] for one in report["interfaces"]}
    assert report["cpu"]["cores"] == len(os.sched_getaffinity(0))
    assert report["limits"]["shm"]["size"] > 0
    assert isinstance(report["gpus"], list)


def test_tables_do_not_touch_jax_devices():
    done = run(JAX_PLATFORMS="no such platform", PPLX_JOB=TOKEN)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PPLX_JOB=set" in done.stdout
    assert TOKEN not in done.stdout + done.stderr
    for word in ("libfabric", "Fabrics", "lo", "127.0.0.1", "memlock", "/dev/shm", "Cores", "GPUs"):
        assert word in done.stdout


@pytest.mark.parametrize(
    ("name", "value", "what", "fix"),
    [
        ("PPLX_FABRIC", "efa", "PPLX_FABRIC=efa does not work", "one that works: local, sim, tcp, shm"),
        ("PPLX_SOCKET_IFNAME", "nosuch", "no interface", "unset it"),
        ("PPLX_LOG_LEVEL", "shout", "PPLX_LOG_LEVEL", "unset it"),
        ("PPLX_LIBFABRIC", "libnosuch.so.1", "libfabric cannot be loaded", "apt-get install libfabric1"),
    ],
)
def test_errors(name, value, what, fix):
    if (name, value) == ("PPLX_FABRIC", "efa") and Path("/sys/class/infiniband").exists():
        pytest.skip("this machine has RDMA devices: efa may work")
    done = run("--json", **{name: value})
    assert done.returncode == 1, done.stderr
    errors = [problem for problem in json.loads(done.stdout)["problems"] if problem["severity"] == "error"]
    assert any(what in error["what"] and fix in error["fix"] for error in errors), errors


def test_nics_are_for_the_fabric_that_is_asked_for():
    report = json.loads(run("--json", PPLX_NICS="rdmap16s27").stdout)
    assert report["fabrics"]["tcp"]["works"]


def test_a_wrong_variable_is_told_once():
    report = json.loads(run("--json", PPLX_TIMEOUT="abc").stdout)
    assert report["fabrics"]["tcp"]["text"] == "not tried: see the environment"
    (problem,) = [one for one in report["problems"] if one["severity"] == "error"]
    assert "PPLX_TIMEOUT" in problem["what"]


def test_warnings_leave_the_exit_code():
    done = run("--json", PPLX_FABRICS="tcp")
    assert done.returncode == 0
    (warning,) = [p for p in json.loads(done.stdout)["problems"] if "PPLX_FABRICS" in p["what"]]
    assert warning["severity"] == "warning"
    assert "PPLX_FABRIC," in warning["fix"]


def test_rdma_devices(tmp_path):
    device = tmp_path / "mlx5_0"
    (device / "ports" / "1").mkdir(parents=True)
    for name, text in (("state", "4: ACTIVE"), ("rate", "400 Gb/sec (4X NDR)"), ("link_layer", "InfiniBand")):
        (device / "ports" / "1" / name).write_text(text + "\n")
    (device / "device").mkdir()
    (device / "device" / "numa_node").write_text("1\n")
    (found,) = doctor._rdma_devices(tmp_path)
    assert found["name"] == "mlx5_0"
    assert found["numa_node"] == "1"
    assert found["ports"] == [
        {"port": "1", "state": "ACTIVE", "rate": "400 Gb/sec (4X NDR)", "link_layer": "InfiniBand"}
    ]
    assert doctor._rdma_devices(tmp_path / "nothing") == []


def test_memlock_matters_with_rdma(monkeypatch):
    monkeypatch.setattr(doctor.resource, "getrlimit", lambda _: (8 << 20, 8 << 20))
    for devices, expected in (([], []), ([{"name": "mlx5_0"}], ["error"])):
        problems = []
        limits = doctor._limits({"rdma_devices": devices}, problems)
        assert limits["memlock"] == 8 << 20
        assert [p.severity for p in problems if "locked memory" in p.what] == expected


def test_stale_segments(tmp_path):
    free = next(pid for pid in range(4_000_000, 100, -7) if not Path(f"/proc/{pid}").exists())
    for name in (f"{free}:0:0", f"{os.getpid()}:0:0", "other", f"{free}:0:0:x"):
        (tmp_path / name).touch()
    assert doctor._stale_segments(tmp_path) == [tmp_path / f"{free}:0:0"]


def test_gpus(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")

    def smi(*arguments, **options):
        line = "0, NVIDIA H200, 570.86.10, 00000000:19:00.0\n"
        return subprocess.CompletedProcess(arguments, 0, stdout=line, stderr="")

    assert doctor._gpus(smi) == [
        {"index": "0", "name": "NVIDIA H200", "driver": "570.86.10", "pci": "00000000:19:00.0"}
    ]

    def broken(*arguments, **options):
        return subprocess.CompletedProcess(arguments, 9, stdout="", stderr="no driver")

    monkeypatch.setattr(doctor.Path, "glob", lambda *_: [])
    assert doctor._gpus(broken) == []


def testranges():
    assert doctor.ranges([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"
    assert doctor.ranges([]) == ""


def test_show_escapes_markup():
    """Texts of others may hold what looks like rich's markup."""
    report = doctor.examine()
    report["problems"] = [{"severity": "error", "what": "a [red] thing", "fix": "pip install pplx-jax[demo]"}]
    stream = io.StringIO()
    doctor.show(report, Console(file=stream, width=200))
    assert "a [red] thing" in stream.getvalue()
    assert "pplx-jax[demo]" in stream.getvalue()
    assert doctor.exit_code(report) == 1


# ---- devices that are not here -----------------------------------------------------------------------------

TOPOLOGIES = ROOT / "tests" / "topology"


def test_the_test_machines_are_what_their_generator_writes():
    done = subprocess.run([sys.executable, str(TOPOLOGIES / "generate.py"), "--check"], capture_output=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("machine", "gpus", "nics", "each"),
    [("p5.48xlarge", 8, 32, 4), ("dgx-h100", 8, 12, 1), ("pairs", 4, 8, 1)],
)
def test_topology_of_a_machine(machine, gpus, nics, each):
    seen = topology.discover(str(TOPOLOGIES / f"{machine}.xml"))
    assert (len(seen.gpus), len(seen.nics)) == (gpus, nics)
    used = [nic for placement in seen.placements for nic in placement.nics]
    assert len(used) == len(set(used)) == gpus * each
    for index, (gpu, placement) in enumerate(zip(seen.gpus, seen.placements, strict=True)):
        assert placement.distance == "PIX"
        assert not placement.shared
        assert set(placement.cores) <= set(gpu.cpus)
        assert {seen.nics[nic].numa_node for nic in placement.nics} == {gpu.numa_node}
        assert all(seen.distances[index][nic] == "PIX" for nic in placement.nics)
    cores = [core for placement in seen.placements for core in placement.cores]
    assert len(cores) == len(set(cores)) == seen.num_cores
    assert seen.gpu("0000" + seen.gpus[1].pci.upper()) == 1
    assert seen.gpu(seen.gpus[1].pci.removeprefix("0000:")) == 1
    assert seen.gpu("ff:00.0") is None


def test_topology_is_shown():
    done = run(PPLX_TOPOLOGY=str(TOPOLOGIES / "dgx-h100.xml"), COLUMNS="200")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "mlx5_10" in done.stdout
    assert "NICs that no GPU uses: mlx5_1, mlx5_2, mlx5_7, mlx5_8." in done.stdout
    assert "opens mlx5_0: nearest to GPU" in done.stdout
    chosen = run(PPLX_TOPOLOGY=str(TOPOLOGIES / "dgx-h100.xml"), PPLX_NICS="mlx5_1", COLUMNS="200")
    assert "opens mlx5_1: PPLX_NICS." in chosen.stdout
    assert "GPUDirect RDMA: dma-buf" in done.stdout


def test_far_and_shared_nics():
    found = []
    report = run("--json", PPLX_TOPOLOGY=str(TOPOLOGIES / "flat.xml"))
    seen = json.loads(report.stdout)["topology"]
    assert [placement["shared"] for placement in seen["placements"]] == [True] * 4
    assert [placement["distance"] for placement in seen["placements"]] == ["PHB"] * 4
    assert found == []


def test_without_hwloc(monkeypatch):
    done = run("--json", PPLX_HWLOC="libnosuch.so.15")
    report = json.loads(done.stdout)
    assert done.returncode == 0
    assert "hwloc was not found" in report["topology"]["error"]
    assert report["fabrics"]["tcp"]["works"]

    def absent():
        raise PplxError("hwloc was not found\nTried: ...")

    monkeypatch.setattr(doctor_devices.topology, "discover", absent)
    for devices in (False, True):
        problems = []
        doctor_devices.examine_topology(lambda *problem: problems.append(problem), devices=devices)  # noqa: B023
        assert len(problems) == devices
    assert "libhwloc15" in problems[0][2]


def test_a_topology_file_that_is_none():
    done = run("--json", PPLX_TOPOLOGY="/proc/self/status")
    assert "/proc/self/status" in json.loads(done.stdout)["topology"]["error"]


def test_gpudirect(tmp_path, monkeypatch):
    report = {"gpus": [{"pci": "1"}], "rdma_devices": [{"name": "mlx5_0"}]}
    problems = []

    def found(*problem):
        problems.append(problem)

    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(doctor_devices.topology, "cuda_attributes", list)
    direct = doctor_devices.examine_gpudirect(report, found, tmp_path, missing)
    assert direct["peermem"] is None
    assert direct["dma_buf"] is None
    assert [severity for severity, _, _ in problems] == ["warning"] * 2
    assert "modprobe nvidia_peermem" in problems[0][2]

    problems.clear()
    (tmp_path / "sys/module/nvidia_peermem").mkdir(parents=True)
    (tmp_path / "sys/module/gdrdrv").mkdir()
    (tmp_path / "sys/module/gdrdrv/version").write_text("2.4\n")
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/gdrdrv").touch()
    direct = doctor_devices.examine_gpudirect(report, found, tmp_path, lambda name: None)
    assert direct["peermem"] == "nvidia_peermem"
    assert direct["gdrcopy"] == {"device": True, "module": "2.4", "library": True, "off": False}
    assert not problems

    loaded = []
    monkeypatch.setenv("PPLX_GDRCOPY", "libmine.so")
    doctor_devices.examine_gpudirect(report, found, tmp_path, loaded.append)
    assert loaded == ["libmine.so"]
    monkeypatch.setenv("PPLX_GDRCOPY", "off")
    direct = doctor_devices.examine_gpudirect(report, found, tmp_path, loaded.append)
    assert direct["gdrcopy"]["off"]
    assert not direct["gdrcopy"]["library"]
    assert not problems
    monkeypatch.delenv("PPLX_GDRCOPY")

    monkeypatch.setattr(doctor_devices.topology, "cuda_attributes", lambda: [{"dma_buf": 1}])
    assert doctor_devices.examine_gpudirect(report, found, tmp_path / "empty", lambda name: None)["dma_buf"]
    assert [what for _, what, _ in problems if "GPU memory" in what] == []
