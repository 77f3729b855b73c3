"""Kernels that come in wheels of their own: how they are found, and whether they fit.

A plugin is a distribution such as ``pplx-jax-cuda12`` with an entry point in the group ``pplx_jax.plugins``,
which names a function that returns a dict, so that a plugin imports nothing of this package:

* ``abi``: the number ``ABI`` that it was built for;
* ``version``: its own version, which must be this package's, as kernels and Python agree on every array;
* ``platform``: the XLA platform of its kernels, and ``cuda``: the CUDA major version that it needs;
* ``registrations``: custom-call targets by name, as ``jax.ffi.register_ffi_target`` takes them;
* ``extension``: name of the module with the plugin's groups, of ``pplx_jax._cuda``'s interface; "" where the
  plugin was built without kernels.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Iterable, Mapping
from typing import Any

from pplx_jax.version import __version__

#: Of the dict above and of the targets' signatures.
ABI = 2
GROUP = "pplx_jax.plugins"


@dataclasses.dataclass(frozen=True)
class Plugin:
    """An installed plugin. ``problem`` says why it cannot be used; None: it fits."""

    name: str
    version: str = ""
    platform: str = ""
    cuda: int = 0
    registrations: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    extension: str = ""
    problem: str | None = None


def discover(own_version: str | None = None) -> list[Plugin]:
    """All installed plugins, by name. Loads them, but touches neither JAX nor a device."""
    found = [
        _load(point, own_version or __version__) for point in importlib.metadata.entry_points(group=GROUP)
    ]
    return _alone(sorted(found, key=lambda plugin: plugin.name))


def _load(point: importlib.metadata.EntryPoint, own_version: str) -> Plugin:
    try:
        described = point.load()()
        plugin = Plugin(
            name=point.name,
            version=str(described["version"]),
            platform=str(described["platform"]),
            cuda=int(described["cuda"]),
            registrations=dict(described["registrations"]),
            extension=str(described["extension"]),
        )
        abi = described["abi"]
    except Exception as error:  # whatever a foreign module does, this package must still import
        text = f"loading {point.value} failed with {type(error).__name__}: {error}"
        return Plugin(point.name, problem=text)
    if abi != ABI or plugin.version != own_version:
        return dataclasses.replace(
            plugin,
            problem=f"it is version {plugin.version} (ABI {abi}), pplx-jax is {own_version} (ABI {ABI}): "
            "install equal versions of both",
        )
    return plugin


def _alone(plugins: Iterable[Plugin]) -> list[Plugin]:
    """A process has one CUDA runtime: of two plugins for different ones none is used."""
    checked = list(plugins)
    versions = {plugin.cuda for plugin in checked if plugin.problem is None}
    if len(versions) <= 1:
        return checked
    names = ", ".join(plugin.name for plugin in checked if plugin.problem is None)
    text = f"plugins for several CUDA versions are installed ({names}): uninstall all but the one of your jax"
    return [p if p.problem else dataclasses.replace(p, problem=text) for p in checked]
