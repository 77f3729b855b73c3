"""Names of fabrics: ``"auto"``, ``"local"``, ``"sim"``, ``"tcp"``, ``"shm"``, ``"verbs"`` or a libfabric
provider, with options after a colon."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

from pplx_jax.verbs import VerbsOptions

_VERBS_OPTIONS = ("ack_timeout", "gid_index", "retries", "send_depth", "service_level", "traffic_class")
_SIM_OPTIONS = {"seed": 0, "reorder": 1, "max_delay": 8, "max_pieces": 3, "stall_every": 0}


@dataclasses.dataclass(frozen=True)
class Fabric:
    """A parsed fabric.

    ``"tcp:endpoints=4"`` sprays writes over four endpoints a peer, so that immediates arrive out of order.
    ``"sim:seed=7,max_delay=8,max_pieces=3,reorder=1,stall_every=0"`` is the in-process network that
    reorders, delays and splits; every output is the same for every seed.
    ``"verbs:traffic_class=106,gid_index=3"`` is RoCE or InfiniBand by libibverbs, with options of
    :class:`pplx_jax.VerbsOptions`.
    """

    name: str
    endpoints: int = 1
    sim: tuple[tuple[str, int], ...] = ()
    verbs: tuple[tuple[str, int], ...] = ()

    @classmethod
    def parse(cls, text: str) -> Fabric:
        """Raises TypeError or ValueError for anything that is not a fabric."""
        if not isinstance(text, str):
            raise TypeError(f"fabric must be a string like 'auto', 'tcp' or 'shm', got {text!r}")
        name, _, rest = text.partition(":")
        if not name:
            raise ValueError(f"fabric has no name: {text!r}")
        own = {"sim": _SIM_OPTIONS, "verbs": _VERBS_OPTIONS}.get(name, ())
        allowed = {"endpoints", *own}
        options: dict[str, int] = {}
        for item in filter(None, rest.split(",")):
            key, _, value = item.partition("=")
            if key not in allowed or not value.isdecimal():
                raise ValueError(
                    f"fabric option {item!r} in {text!r}: allowed are {', '.join(sorted(allowed))}, each =N"
                )
            options[key] = int(value)
        endpoints = options.pop("endpoints", 1)
        if not 1 <= endpoints <= 16:
            raise ValueError(f"endpoints must be in 1..16, got {endpoints}")
        sim = tuple(sorted({**_SIM_OPTIONS, **options}.items())) if name == "sim" else ()
        if name == "verbs":
            VerbsOptions(**cast("dict[str, Any]", options))  # checks them
        return cls(name, endpoints, sim, tuple(sorted(options.items())) if name == "verbs" else ())

    def __str__(self) -> str:
        options = ([f"endpoints={self.endpoints}"] if self.endpoints > 1 else []) + [
            f"{key}={value}" for key, value in (*self.sim, *self.verbs)
        ]
        return f"{self.name}:{','.join(options)}" if options else self.name

    @property
    def in_process(self) -> bool:
        """Whether it reaches only ranks of the same process."""
        return self.name in ("local", "sim")
