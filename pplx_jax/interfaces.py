"""Network interfaces of this host, as the kernel names them (Linux)."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import ipaddress
import socket
import struct
from pathlib import Path

_SIOCGIFADDR = 0x8915
_SIOCGIFFLAGS = 0x8913
_UP, _LOOPBACK = 0x1, 0x8


@dataclasses.dataclass(frozen=True)
class Interface:
    """One interface; ``mtu`` and ``speed`` (Mbit/s) are None where the kernel does not say."""

    name: str
    addresses: tuple[str, ...]
    up: bool
    loopback: bool
    mtu: int | None = None
    speed: int | None = None
    numa_node: int | None = None


def _number(path: Path) -> int | None:
    try:
        value = int(path.read_text())
    except (OSError, ValueError):  # virtual interfaces have no speed, and reading it fails
        return None
    return value if value >= 0 else None


def _ipv6() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            packed, _, _, _, _, name = line.split()
            address = ipaddress.IPv6Address(bytes.fromhex(packed))
            if not address.is_link_local:  # useless without a scope
                found.setdefault(name, []).append(str(address))
    return found


def interfaces() -> list[Interface]:
    """All of them, in the kernel's order; IPv4 addresses come before IPv6 ones."""
    ipv6 = _ipv6()
    result = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:

        def ask(request: int, name: str) -> bytes | None:
            try:
                return fcntl.ioctl(probe.fileno(), request, struct.pack("256s", name.encode()[:15]))
            except OSError:
                return None

        for _, name in socket.if_nameindex():
            flags = ask(_SIOCGIFFLAGS, name)
            bits = struct.unpack("H", flags[16:18])[0] if flags else 0
            ipv4 = ask(_SIOCGIFADDR, name)
            addresses = [socket.inet_ntoa(ipv4[20:24])] if ipv4 else []
            sysfs = Path("/sys/class/net") / name
            result.append(
                Interface(
                    name=name,
                    addresses=(*addresses, *ipv6.get(name, ())),
                    up=bool(bits & _UP),
                    loopback=bool(bits & _LOOPBACK),
                    mtu=_number(sysfs / "mtu"),
                    speed=_number(sysfs / "speed"),
                    numa_node=_number(sysfs / "device" / "numa_node"),
                )
            )
    return result


def select(pattern: str, among: list[Interface]) -> Interface | None:
    """The first interface that is up, has an address and fits ``pattern``; None where none does.

    A pattern is prefixes of names, separated by commas; ``=name`` fits that name only. After a leading ``^``
    the prefixes are those not to use, and loopback is not used either.
    """
    excluding = pattern.startswith("^")
    items = [item.strip() for item in pattern.removeprefix("^").split(",")]

    def fits(name: str) -> bool:
        return any(name == item[1:] if item.startswith("=") else name.startswith(item) for item in items)

    for one in among:
        if not one.up or not one.addresses:
            continue
        if (not fits(one.name) and not one.loopback) if excluding else fits(one.name):
            return one
    return None
