"""Options of ``fabric="verbs"``: how queue pairs use a ConnectX or another RDMA NIC."""

from __future__ import annotations

import dataclasses

from pplx_jax.engine_types import integer, seconds, typed


@dataclasses.dataclass(frozen=True)
class VerbsOptions:
    """How ``fabric="verbs"`` uses its NIC; what exceeds the device's limits is lowered to them.

    Attributes:
        gid_index: entry of the port's GID table; -1 chooses: RoCE v2 over IPv4 first, then over IPv6, RoCE v1
            last; on InfiniBand the first.
        traffic_class: of RoCE, 0..255: differentiated services and congestion notification bits. Lossless
            networks want the class that their switches are set up for.
        service_level: of InfiniBand, and the priority of RoCE in VLANs, 0..15.
        send_depth: work requests that one queue pair holds; more are queued in the engine.
        outstanding: work requests that all queue pairs of a NIC hold together.
        receives: receives posted for arriving immediates. Senders wait where there are none.
        ack_timeout: a packet without an answer is sent again after 4.096 us * 2**ack_timeout, 1..31.
        retries: so many times, 0..7; then the connection is broken, and made anew.
        relaxed_ordering: let PCIe reorder the bytes of a write, where the device can; completions stay behind
            them.
        connect_timeout: seconds after which a NIC that answers no handshake counts as gone.
    """

    gid_index: int = -1
    traffic_class: int = 0
    service_level: int = 0
    send_depth: int = 128
    outstanding: int = 4096
    receives: int = 4096
    ack_timeout: int = 16
    retries: int = 7
    relaxed_ordering: bool = True
    connect_timeout: float = 10.0

    def __post_init__(self) -> None:
        for name, (low, high) in _RANGES.items():
            integer(f"VerbsOptions.{name}", getattr(self, name), low, high)
        typed("VerbsOptions.relaxed_ordering", self.relaxed_ordering, bool, "a bool")
        seconds("VerbsOptions.connect_timeout", self.connect_timeout)


_RANGES = {
    "gid_index": (-1, 255),
    "traffic_class": (0, 255),
    "service_level": (0, 15),
    "send_depth": (2, 65536),
    "outstanding": (16, 1 << 22),
    "receives": (8, 1 << 20),
    "ack_timeout": (1, 31),
    "retries": (0, 7),
}
