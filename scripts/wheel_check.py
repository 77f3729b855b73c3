#!/usr/bin/env python3
"""Checks a repaired wheel: ``wheel_check.py RAW REPAIRED``. It must carry no library, and link to none but
those that manylinux promises: libfabric and libibverbs are opened at run time, where they are."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

#: From PEP 600's list; and the dynamic loader.
ALLOWED = re.compile(
    r"(libc|libm|libdl|librt|libpthread|libgcc_s|libstdc\+\+|ld-linux-x86-64|ld-linux-aarch64)\.so\.\d"
)
#: Newer than this and Debian 12 or Ubuntu 22.04 could not install it.
NEWEST_GLIBC = (2, 35)


def check(raw: Path, repaired: Path) -> str:
    """One line about the wheel; raises ValueError for what is wrong."""
    tags = re.findall(r"manylinux_(\d+)_(\d+)", repaired.name)
    if not tags:
        raise ValueError(f"{repaired.name} has no manylinux tag")
    glibc = min((int(major), int(minor)) for major, minor in tags)
    if glibc > NEWEST_GLIBC:
        raise ValueError(f"{repaired.name} needs glibc {glibc}, at most {NEWEST_GLIBC} is wanted")
    with zipfile.ZipFile(raw) as before, zipfile.ZipFile(repaired) as after:
        added = {name for name in after.namelist() if ".so" in name} - set(before.namelist())
        if added:
            raise ValueError(f"auditwheel bundled {', '.join(sorted(added))}: open it at run time instead")
        extensions = [name for name in after.namelist() if ".so" in name]
        needed: set[str] = set()
        with tempfile.TemporaryDirectory() as folder:
            for name in extensions:
                path = after.extract(name, folder)
                dynamic = subprocess.run(
                    ["readelf", "-d", path], capture_output=True, text=True, check=True
                ).stdout
                needed |= set(re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic))
                if re.search(r"\((RPATH|RUNPATH)\)", dynamic):
                    raise ValueError(f"{name} looks for libraries in a folder of the build machine")
    foreign = sorted(library for library in needed if not ALLOWED.fullmatch(library))
    if foreign or len(extensions) != 1:
        raise ValueError(f"{repaired.name}: {extensions} link to {foreign}")
    return f"{repaired.name}: glibc {glibc[0]}.{glibc[1]} or newer; needs {', '.join(sorted(needed))}"


if __name__ == "__main__":
    print(check(Path(sys.argv[1]), Path(sys.argv[2])))
