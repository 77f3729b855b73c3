#!/usr/bin/env python3
"""Writes the machines of this folder as hwloc XML (2.x), from what is known of their layout.

p5.48xlarge: 2 NUMA nodes of 48 cores with 2 threads, 8 GPUs, each behind a PCIe switch with 4 EFA devices and
an NVMe drive. dgx-h100: 2 x 56 cores, 8 GPUs, each behind a switch with a ConnectX-7, and 2 ConnectX-7 of two
ports for storage at host bridges of their own. pairs: 64 cores, 4 GPUs in pairs behind switches with 3
ConnectX-7 each; a fourth NIC is on each host bridge. flat: a virtual machine that shows no bridges: 4 GPUs,
2 NICs.
"""

from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree

FOLDER = Path(__file__).resolve().parent
EFA, NVIDIA, MELLANOX, SAMSUNG, BROADCOM = "1d0f:efa2", "10de:2330", "15b3:1021", "144d:a80a", "1000:c030"
OPENFABRICS, NETWORK, BLOCK = "3", "2", "0"


class Machine:
    def __init__(self, nodes: int, cores: int, threads: int) -> None:
        self.ids = 0
        self.buses = 0x10
        # Threads of a core are `cores * nodes` apart, as Linux numbers them.
        total = nodes * cores
        everything = range(total * threads)
        self.root = self.object(None, "Machine", everything, range(nodes))
        self.packages = []
        for node in range(nodes):
            own = [node * cores + core for core in range(cores)]
            cpus = sorted(first + thread * total for first in own for thread in range(threads))
            package = self.object(self.root, "Package", cpus, [node], os_index=str(node))
            self.object(package, "NUMANode", cpus, [node], os_index=str(node), local_memory=str(1 << 40))
            for first in own:
                pus = [first + thread * total for thread in range(threads)]
                core = self.object(package, "Core", pus, [node], os_index=str(first))
                for pu in pus:
                    self.object(core, "PU", [pu], [node], os_index=str(pu))
            self.packages.append(package)

    def element(self, parent, kind: str, **attributes: str):
        self.ids += 1
        values = {"type": kind, "gp_index": str(self.ids), **attributes}
        if parent is None:
            return ElementTree.Element("object", values)
        return ElementTree.SubElement(parent, "object", values)

    def object(self, parent, kind: str, cpus, nodes, **attributes: str):
        sets = {}  # 32 bits a word, the highest first
        for name, numbers in (("cpuset", cpus), ("nodeset", nodes)):
            bits = sum(1 << number for number in numbers)
            words = []
            while bits:
                words.insert(0, f"0x{bits & 0xFFFFFFFF:08x}")
                bits >>= 32
            sets[name] = sets[f"complete_{name}"] = ",".join(words)
            if parent is None:
                sets[f"allowed_{name}"] = sets[name]
        return self.element(parent, kind, **sets, **attributes)

    def bus(self) -> int:
        self.buses += 1
        return self.buses - 1

    def host_bridge(self, package, buses: int):
        first = self.buses
        return self.element(
            package,
            "Bridge",
            bridge_type="0-1",
            depth="0",
            bridge_pci=f"0000:[{first:02x}-{first + buses - 1:02x}]",
        )

    def bridge(self, parent, depth: int, buses: int):
        bus = self.bus()
        return self.element(
            parent,
            "Bridge",
            bridge_type="1-1",
            depth=str(depth),
            bridge_pci=f"0000:[{bus + 1:02x}-{bus + buses:02x}]",
            pci_busid=f"0000:{bus:02x}:00.0",
            pci_type=f"0604 [{BROADCOM}] [0000:0000] 00",
            pci_link_speed="63.015385",
        )

    def device(
        self, parent, kind: str, ids: str, names: dict[str, str], function: int = 0, bus: int | None = None
    ):
        bus = self.bus() if bus is None else bus
        device = self.element(
            parent,
            "PCIDev",
            pci_busid=f"0000:{bus:02x}:00.{function}",
            pci_type=f"{kind} [{ids}] [{ids}] 00",
            pci_link_speed="63.015385",
        )
        for name, osdev in names.items():
            self.element(device, "OSDev", name=name, osdev_type=osdev)
        return bus

    def switch(self, parent, devices) -> None:
        """An upstream port, a downstream port a device."""
        upstream = self.bridge(parent, 1, 2 * len(devices) + 1)
        for kind, ids, names in devices:
            self.device(self.bridge(upstream, 2, 1), kind, ids, names)

    def xml(self) -> str:
        topology = ElementTree.Element("topology", version="2.0")
        topology.append(self.root)
        ElementTree.indent(topology, " ")
        head = '<?xml version="1.0" encoding="UTF-8"?>\n<!DOCTYPE topology SYSTEM "hwloc2.dtd">\n'
        return head + ElementTree.tostring(topology, encoding="unicode") + "\n"


GPU = ("0302", NVIDIA, {})


def mellanox(number: int, interface: str):
    return ("0207", MELLANOX, {interface: NETWORK, f"mlx5_{number}": OPENFABRICS})


def p5() -> Machine:
    machine = Machine(2, 48, 2)
    for gpu in range(8):
        host = machine.host_bridge(machine.packages[gpu // 4], 14)
        names = [f"rdmap{machine.buses + 2 + 2 * nic}s0" for nic in range(4)]
        efa = [("0200", EFA, {name: OPENFABRICS}) for name in names]
        machine.switch(host, [*efa, GPU, ("0108", SAMSUNG, {f"nvme{gpu}n1": BLOCK})])
    host = machine.host_bridge(machine.packages[0], 1)
    machine.device(host, "0200", "1d0f:ec20", {"ens5": NETWORK})
    machine.device(host, "0300", "1d0f:1111", {}, function=1, bus=machine.buses - 1)
    return machine


def dgx_h100() -> Machine:
    machine = Machine(2, 56, 2)
    compute, storage = iter((0, 3, 4, 5, 6, 9, 10, 11)), iter((1, 2, 7, 8))
    for gpu in range(8):
        host = machine.host_bridge(machine.packages[gpu // 4], 8)
        machine.switch(host, [mellanox(next(compute), f"ibp{gpu}"), GPU, ("0108", SAMSUNG, {})])
    for node in range(2):
        host = machine.host_bridge(machine.packages[node], 2)
        bus = machine.bus()
        for port in range(2):
            kind, ids, names = mellanox(next(storage), f"ens{node}p{port}")
            machine.device(host, kind, ids, names, function=port, bus=bus)
    machine.device(
        machine.host_bridge(machine.packages[0], 1), "0300", "1a03:2000", {}
    )  # the board's own display
    return machine


def pairs() -> Machine:
    machine = Machine(1, 64, 1)
    for pair in range(2):
        host = machine.host_bridge(machine.packages[0], 13)
        nics = [mellanox(4 * pair + number, f"ens{pair}{number}") for number in range(3)]
        machine.switch(host, [GPU, *nics, GPU])
        kind, ids, names = mellanox(4 * pair + 3, f"ens{pair}3")
        machine.device(host, kind, ids, names)
    return machine


def flat() -> Machine:
    machine = Machine(1, 16, 2)
    host = machine.host_bridge(machine.packages[0], 6)
    for _ in range(4):
        machine.device(host, *GPU)
    for number in range(2):
        machine.device(host, *mellanox(number, f"eth{number}"))
    return machine


MACHINES = {"p5.48xlarge": p5, "dgx-h100": dgx_h100, "pairs": pairs, "flat": flat}


if __name__ == "__main__":
    for name, make in MACHINES.items():
        path, text = FOLDER / f"{name}.xml", make().xml()
        if sys.argv[1:] == ["--check"]:
            assert path.read_text() == text, f"{path.name} is not what {Path(__file__).name} writes"
        else:
            path.write_text(text)
