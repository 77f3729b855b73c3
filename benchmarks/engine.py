"""What the TransferEngine adds to a bare libfabric loop, over shm and tcp, between two processes.

    python benchmarks/engine.py [shm|tcp|PROVIDER]... [--repeats N]

Builds ``bench_engine`` in build/bench unless ``--binary`` names one, and runs it. The last column, plain
memcpy, is the floor that no copying transport passes.
"""

from __future__ import annotations

import argparse
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent


def build() -> pathlib.Path:
    folder = ROOT / "build" / "bench"
    options = ["-DPPLX_BUILD_BENCHMARKS=ON", "-DPPLX_BUILD_TESTS=OFF", "-DCMAKE_BUILD_TYPE=Release"]
    subprocess.run(
        ["cmake", "-S", ROOT / "proxy", "-B", folder, *options], check=True, stdout=subprocess.DEVNULL
    )
    subprocess.run(
        ["cmake", "--build", folder, "--target", "bench_engine", "-j2"], check=True, stdout=subprocess.DEVNULL
    )
    return folder / "benchmarks" / "bench_engine"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "fabrics", nargs="*", default=["shm", "tcp"], help="libfabric providers (default: shm tcp)"
    )
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--binary", type=pathlib.Path, help="an existing bench_engine")
    args = parser.parse_args()
    binary = args.binary or build()
    return subprocess.run([binary, *args.fabrics, "--repeats", str(args.repeats)]).returncode


if __name__ == "__main__":
    sys.exit(main())
