#!/usr/bin/env python3
"""Runs a command in QEMU guests whose kernel has Soft-RoCE, on this machine's file system.

``guest.py [--guests N] [--loss PERCENT] COMMAND...`` boots N guests (one by default), runs the command in
each and ends with the largest exit status. Every guest sees the root file system read-only, has a fresh
``/dev/shm`` (its ``TMPDIR``), and an RDMA device ``rxe0`` with the address 10.9.0.1, 10.9.0.2, ... in
``GUEST_ADDRESS``; its number is in ``GUEST``. Two guests share a network. The processor is emulated, as CI
machines rarely have another way: expect a tenth of the speed.

Needs the packages of the section soft-roce of requirements/apt.txt, and apt's lists to fetch a kernel image
from. Kernel and modules stay in ``build/soft-roce``.

``PPLX_TEST_TIME_SCALE=3`` multiplies every time limit by 3, here and in the tests that run in the guests: for
machines that emulate slowly.
"""

from __future__ import annotations

import argparse
import functools
import gzip
import lzma
import math
import os
import re
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "build" / "soft-roce"
MODULES = (
    "crc32_generic",
    "virtio_pci",
    "virtio_net",
    "9p",
    "9pnet_virtio",
    "ib_uverbs",
    "rdma_rxe",
    "dummy",
    "sch_netem",
)
APPLETS = ("sh", "mount", "insmod", "mkdir", "chroot", "poweroff")

SCALE = "PPLX_TEST_TIME_SCALE"  # proxy/tests/support.h reads it as well
MARK = f"guest-{secrets.token_hex(8)}-ended"  # the last line of a guest, with the command's exit status

INIT = """#!/bin/sh
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
for module in $(/bin/busybox cat /modules/order); do insmod /modules/$module; done
mount -t 9p -o trans=virtio,version=9p2000.L,msize=262144,ro,cache=loose root /root
for folder in proc sys dev; do mount --bind /$folder /root/$folder; done
/bin/busybox ln -s /proc/self/fd /root/dev/fd
mkdir -p /root/dev/shm
mount -t tmpfs shm /root/dev/shm
/bin/busybox cp /job /root/dev/shm/job
chroot /root /bin/bash /dev/shm/job
poweroff -f
"""

JOB = """
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/dev/shm TMPDIR=/dev/shm
export GUEST={number} GUEST_ADDRESS=10.9.0.{host} {scale_name}={scale:g}
hostname guest-{number}
set -e  # of the whole script: within a condition it would be ignored
trap 'echo {mark} 100' EXIT
ip link set lo up
{link}
ip address add $GUEST_ADDRESS/24 dev {device}
ip link set {device} up
rdma link add rxe0 type rxe netdev {device}
{loss}
ulimit -l unlimited
cd {folder}
trap - EXIT
set +e
{command}
echo {mark} $?
"""


class Missing(Exception):
    """This machine cannot run guests; the text says what is missing."""


def time_scale() -> float:
    """What time limits are multiplied by."""
    text = os.environ.get(SCALE, "").strip() or "1"
    try:
        scale = float(text)
    except ValueError:
        scale = math.nan
    if not 1 <= scale <= 100:
        raise SystemExit(f"{SCALE}: must be a number from 1 to 100, is {text!r}")
    return scale


def tool(name: str) -> str:
    path = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if path is None:
        raise Missing(f"{name} is missing")
    return path


# ---- the kernel --------------------------------------------------------------------------------------------


def kernel_package() -> str:
    """The distribution's current kernel for virtual machines."""
    for meta in ("linux-image-amd64", "linux-image-virtual", "linux-image-generic"):
        listed = subprocess.run(["apt-cache", "depends", meta], capture_output=True, text=True, check=False)
        for line in listed.stdout.splitlines():
            if match := re.match(r"\s*Depends: (linux-image-\S+)", line):
                return match[1]
    raise Missing("apt knows no kernel image (apt-get update)")


def fetch_kernel() -> Path:
    """Unpacks a kernel image and its modules; returns the folder."""
    folder = CACHE / "kernel"
    if (folder / "complete").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    image = kernel_package()
    packages = [image]
    modules = image.replace("linux-image-", "linux-modules-extra-")
    if subprocess.run(["apt-cache", "show", modules], capture_output=True, check=False).returncode == 0:
        packages += [image.replace("linux-image-", "linux-modules-"), modules]  # as Ubuntu splits them
    got = subprocess.run(
        ["apt-get", "download", "-qq", *packages], cwd=folder, capture_output=True, text=True, check=False
    )
    if got.returncode != 0:
        raise Missing(f"apt-get download {' '.join(packages)}: {got.stderr.strip() or got.returncode}")
    for package in folder.glob("*.deb"):
        unpacked = subprocess.run(
            ["dpkg", "-x", package, folder], capture_output=True, text=True, check=False
        )
        if unpacked.returncode != 0:
            raise Missing(f"dpkg -x {package.name}: {unpacked.stderr.strip()}")
        package.unlink()
    release = module_folder(folder).name
    subprocess.run([tool("depmod"), "-b", folder, release], check=True, capture_output=True)
    (folder / "complete").touch()
    return folder


def module_folder(kernel: Path) -> Path:
    for base in (kernel / "lib" / "modules", kernel / "usr" / "lib" / "modules"):
        for found in sorted(base.glob("*")):
            return found
    raise Missing("the kernel image has no modules")


def modules_in_order(kernel: Path) -> list[Path]:
    """The files of MODULES and of all they depend on, dependencies first."""
    folder = module_folder(kernel)
    needs: dict[str, tuple[str, list[str]]] = {}
    for line in (folder / "modules.dep").read_text().splitlines():
        path, _, depends = line.partition(":")
        needs[module_name(path)] = (path, depends.split())
    order: dict[str, None] = {}

    def add(path: str) -> None:
        if path not in order:
            for dependency in reversed(needs[module_name(path)][1]):
                add(dependency)
            order[path] = None

    for name in MODULES:
        if name.replace("-", "_") in needs:  # otherwise it is built in
            add(needs[name.replace("-", "_")][0])
    if "rdma_rxe" not in needs:
        raise Missing(f"the kernel {folder.name} has no Soft-RoCE")
    return [folder / path for path in order]


def read_module(path: Path) -> bytes:
    """A kernel module; distributions compress them, and busybox's insmod takes plain ones."""
    data = path.read_bytes()
    if path.suffix == ".xz":
        return lzma.decompress(data)
    if path.suffix == ".gz":
        return gzip.decompress(data)
    if path.suffix != ".zst":
        return data
    done = subprocess.run([tool("zstd"), "-dcq"], input=data, capture_output=True, check=False)
    if done.returncode != 0:
        raise Missing(f"zstd cannot decompress {path.name}: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout


def module_name(path: str) -> str:
    return Path(path).name.split(".")[0].replace("-", "_")


# ---- the initial file system -------------------------------------------------------------------------------


def entry(number: int, name: str, mode: int, data: bytes) -> bytes:
    """One file of a "newc" cpio archive (Documentation/driver-api/early-userspace/buffer-format.rst)."""
    label = name.encode() + b"\0"
    fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(label), 0)
    head = b"070701" + b"".join(b"%08x" % field for field in fields) + label
    return head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)


@functools.cache
def common_entries() -> tuple[tuple[str, int, bytes], ...]:
    busybox = Path(tool("busybox"))
    if b"libc.so" in busybox.read_bytes()[:65536]:
        raise Missing("busybox is not the static one (apt-get install busybox-static)")
    modules = modules_in_order(fetch_kernel())
    entries: list[tuple[str, int, bytes]] = [
        (folder, 0o040755, b"") for folder in ("bin", "dev", "modules", "proc", "root", "sys")
    ]
    entries.append(("bin/busybox", 0o100755, busybox.read_bytes()))
    entries += [(f"bin/{applet}", 0o120777, b"busybox") for applet in APPLETS]
    names = [f"{module_name(path.name)}.ko" for path in modules]
    entries += [
        (f"modules/{name}", 0o100644, read_module(path)) for name, path in zip(names, modules, strict=True)
    ]
    entries.append(("modules/order", 0o100644, "\n".join(names).encode()))
    entries.append(("init", 0o100755, INIT.encode()))
    return tuple(entries)


def make_initrd(path: Path, job: str) -> None:
    files = [*common_entries(), ("job", 0o100644, job.encode()), ("TRAILER!!!", 0, b"")]
    archive = b"".join(entry(number, *file) for number, file in enumerate(files, 1))
    path.write_bytes(gzip.compress(archive, 1))


# ---- guests ------------------------------------------------------------------------------------------------


class Guest:
    """A running guest; prints what it prints."""

    def __init__(self, process: subprocess.Popen[str], folder: Path, prefix: str) -> None:
        self.process = process
        self.status = 125  # it never came to its end
        self._folder = folder
        self._prefix = prefix
        self._printer = threading.Thread(target=self._print)
        self._printer.start()

    def _print(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            text = line.replace("\r", "").rstrip("\n")
            if match := re.search(rf"{MARK} (\d+)$", text):
                self.status = int(match[1])
            elif not re.match(r"\[ *\d+\.\d+\] ", text):  # what the kernel says is none of the command's
                print(self._prefix + text, flush=True)

    def end(self) -> None:
        """Kills it if it still runs."""
        self.process.kill()
        self.process.wait()
        self._printer.join()
        shutil.rmtree(self._folder, ignore_errors=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def job_of(number: int, guests: int, loss: float, command: Sequence[str]) -> str:
    device = "roce" if guests == 1 else "eth0"
    return JOB.format(
        number=number,
        host=number + 1,
        device=device,
        link="ip link add roce type dummy" if guests == 1 else "",
        loss=f"tc qdisc add dev {device} root netem loss {loss}%" if loss else "",
        folder=shlex.quote(str(Path.cwd())),
        command=shlex.join(command),
        mark=MARK,
        scale_name=SCALE,
        scale=time_scale(),
    )


def boot(number: int, guests: int, port: int, args: argparse.Namespace) -> Guest:
    kernel = fetch_kernel()
    image = next(iter(sorted((kernel / "boot").glob("vmlinuz-*"))), None)
    if image is None:
        raise Missing("the kernel package has no image")
    folder = CACHE / f"guest-{os.getpid()}-{number}"
    folder.mkdir(parents=True, exist_ok=True)
    make_initrd(folder / "initrd.gz", job_of(number, guests, args.loss, args.command))
    # fmt: off
    command = [
        tool("qemu-system-x86_64"), "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", str(args.cpus),
        "-m", str(args.memory), "-nodefaults", "-no-reboot", "-display", "none",
        "-serial", "stdio",
        "-kernel", str(image), "-initrd", str(folder / "initrd.gz"),
        "-append", "console=ttyS0 quiet panic=-1 mitigations=off net.ifnames=0",
        "-virtfs", "local,path=/,mount_tag=root,security_model=none,readonly=on,multidevs=remap",
        "-device", "virtio-rng-pci",
    ]
    # fmt: on
    if guests > 1:
        role = "listen" if number == 0 else "connect"
        command += [
            "-netdev", f"socket,id=net0,{role}=127.0.0.1:{port}",
            "-device", f"virtio-net-pci,netdev=net0,mac=52:54:00:09:00:{number + 1:02x}",
        ]  # fmt: skip
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    return Guest(process, folder, f"[{number}] " if guests > 1 else "")


def run(args: argparse.Namespace) -> int:
    """Boots the guests and waits for all; the largest exit status, 124 after the time limit."""
    port = free_port()
    limit = args.timeout * time_scale()
    deadline = time.monotonic() + limit
    guests: list[Guest] = []
    try:
        for number in range(args.guests):
            guests.append(boot(number, args.guests, port, args))
            if args.guests > 1 and number == 0:
                time.sleep(0.5 * time_scale())  # until it listens
        for guest in guests:
            guest.process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        print(f"guests: not done within {limit:g} s ({SCALE} gives slow machines more)", file=sys.stderr)
        return 124
    finally:
        for guest in guests:
            guest.end()
    return max(guest.status for guest in guests)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--guests", type=int, default=1, choices=(1, 2))
    parser.add_argument(
        "--loss", type=float, default=0.0, help="percent of packets that each guest's interface loses"
    )
    parser.add_argument("--cpus", type=int, default=2)
    parser.add_argument("--memory", type=int, default=2048, help="MiB")
    parser.add_argument("--timeout", type=float, default=300, help=f"seconds, times {SCALE}")
    parser.add_argument("--check", action="store_true", help="only see whether guests can run here")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    try:
        for name in ("qemu-system-x86_64", "busybox", "depmod", "rdma", "ip", "tc", "apt-get", "dpkg"):
            tool(name)
        if os.uname().machine != "x86_64":
            raise Missing(f"the guests are x86_64, this machine is {os.uname().machine}")
        common_entries()
        return 0 if args.check else run(args)
    except Missing as missing:
        print(f"Soft-RoCE guests cannot run here: {missing}", file=sys.stderr)
        return 77


if __name__ == "__main__":
    sys.exit(main())
