"""Expert parallelism for JAX: MoE dispatch and combine as XLA custom calls over any RDMA network."""

from pplx_jax.config import ExchangeConfig, Memory
from pplx_jax.engine import Address, RegionDescriptor, SimOptions, TransferEngine, VerbsOptions
from pplx_jax.errors import (
    FabricError,
    GroupClosedError,
    MismatchError,
    PeerError,
    PplxError,
    RoutingError,
    TimeoutError,  # noqa: A004 - the field's name for it
)
from pplx_jax.expert_parallel import Batch, ExpertParallel, Route, SentCombine, SentDispatch
from pplx_jax.ops import export_checks
from pplx_jax.remat import moe_remat
from pplx_jax.version import __version__ as __version__

__all__ = [
    "Address",
    "Batch",
    "ExchangeConfig",
    "ExpertParallel",
    "FabricError",
    "GroupClosedError",
    "Memory",
    "MismatchError",
    "PeerError",
    "PplxError",
    "RegionDescriptor",
    "Route",
    "RoutingError",
    "SentCombine",
    "SentDispatch",
    "SimOptions",
    "TimeoutError",
    "TransferEngine",
    "VerbsOptions",
    "export_checks",
    "moe_remat",
]
