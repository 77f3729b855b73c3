"""What the TransferEngine adds to a bare loop on the same provider, from 8 bytes to 64 MiB, over 1 to 8 NICs.

    python benchmarks/engine.py [local|sim|shm|tcp|verbs|efa|PROVIDER]... [--nics 1,2,4,8] [--names NIC,NIC]
    python benchmarks/engine.py --epoch [FABRIC]

Builds ``bench_engine`` in build/bench unless ``--binary`` names one, and runs it: between two processes, but
for the fabrics of one process. The last column, plain memcpy, is the floor that no copying transport passes.
``--epoch`` runs ``bench_epoch`` on a GPU instead: the time from a kernel's epoch to the write that the engine
posts for it (needs a CUDA compiler).
"""

from __future__ import annotations

import argparse
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent


def build(target: str) -> pathlib.Path:
    folder = ROOT / "build" / "bench"
    options = ["-DPPLX_BUILD_BENCHMARKS=ON", "-DPPLX_BUILD_TESTS=OFF", "-DCMAKE_BUILD_TYPE=Release"]
    subprocess.run(
        ["cmake", "-S", ROOT / "proxy", "-B", folder, *options], check=True, stdout=subprocess.DEVNULL
    )
    subprocess.run(
        ["cmake", "--build", folder, "--target", target, "-j2"], check=True, stdout=subprocess.DEVNULL
    )
    return folder / "benchmarks" / target


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("fabrics", nargs="*", help="fabrics (default: shm tcp; with --epoch local)")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--longest", type=int, default=64 << 20, help="bytes")
    parser.add_argument("--nics", default="1", help="numbers of NICs, 1 to 8, separated by commas")
    parser.add_argument("--names", help="the NICs' names, separated by commas")
    parser.add_argument("--epoch", action="store_true", help="from a kernel's epoch to the posted write")
    parser.add_argument("--binary", type=pathlib.Path, help="an existing bench_engine")
    args = parser.parse_args()
    binary = args.binary or build("bench_epoch" if args.epoch else "bench_engine")
    command = [binary, *args.fabrics, "--repeats", str(args.repeats)]
    if not args.epoch:
        command += ["--longest", str(args.longest), "--nics", args.nics]
        command += ["--names", args.names] if args.names else []
    return subprocess.run(command).returncode


if __name__ == "__main__":
    sys.exit(main())
