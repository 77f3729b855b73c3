"""KV-cache pages moved layer by layer from a prefill process to a decode process that joins later.

    python examples/kv_cache.py [--fabric tcp] [--layers 4] [--pages 64]

The prefill process computes a request's cache, layer after layer, and keeps it in pages. The decode process
starts later, finds the prefill process by its address (here a file, otherwise whatever a scheduler knows),
and asks for a request: which of its own pages are free, and where they are. From then on each layer's pages
are written, one sided, as soon as they are computed, and decode begins on a layer when that layer's immediate
has been counted. A request that is dropped is cancelled: pages that have not left are taken back, and decode
may reuse its pages as soon as it has been told that nothing is under way any more. Immediates are numbered by
request and layer; those of a request that is over are released, so that they never run out.

Messages are small and typed by their first field; pages never pass through Python.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import multiprocessing
import pathlib
import tempfile
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from pplx_jax.engine import Address, Pages, RegionDescriptor, RemoteRegion, Transfer, TransferEngine
from pplx_jax.errors import CancelledError


@dataclasses.dataclass(frozen=True)
class CacheShape:
    """A paged cache: ``layers`` arrays of ``pages`` pages of ``page_bytes``."""

    layers: int = 4
    pages: int = 64
    page_bytes: int = 32 << 10

    @property
    def layer_bytes(self) -> int:
        """From one layer's page 0 to the next one's."""
        return self.pages * self.page_bytes

    @property
    def nbytes(self) -> int:
        """All of it."""
        return self.layers * self.layer_bytes


def page_of(seed: int, layer: int, index: int, nbytes: int) -> npt.NDArray[np.uint8]:
    """What stands for keys and values here: bytes that tell request, layer and page."""
    return np.random.default_rng((seed, layer, index)).integers(0, 256, nbytes, np.uint8)


def _bytes(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode()


@dataclasses.dataclass
class _Order:
    """A request of a decode process, as prefill serves it."""

    decoder: Address
    request: int
    target: RemoteRegion
    imm: int
    source_pages: list[int]
    target_pages: list[int]
    transfers: list[Transfer]
    cancelled: bool = False


class Prefill:
    """Holds caches and serves decode processes.

    Args:
        engine: this process's engine.
        shape: of the cache, equal on both sides.
    """

    def __init__(self, engine: TransferEngine, shape: CacheShape) -> None:
        self.engine = engine
        self.shape = shape
        self.cache = engine.empty((shape.layers, shape.pages, shape.page_bytes), np.uint8)
        self._orders: dict[tuple[Address, int], _Order] = {}
        self._requests: collections.deque[tuple[Address, dict[str, Any]]] = collections.deque()

    def accept(self, timeout: float) -> tuple[int, _Order]:
        """Wait for a decode process's request; returns its seed and the order."""
        deadline = time.monotonic() + timeout
        while not self._requests:
            sender, payload = self.engine.recv(max(0.0, deadline - time.monotonic()))
            self._handle(sender, json.loads(payload))
        sender, message = self._requests.popleft()
        target = self.engine.open(RegionDescriptor(bytes.fromhex(message["descriptor"])))
        if target.nbytes != self.shape.nbytes:
            raise ValueError(f"the decode process's cache has {target.nbytes} bytes, not {self.shape.nbytes}")
        pages = list(message["pages"])
        order = _Order(sender, message["request"], target, message["imm"], list(range(len(pages))), pages, [])
        self._orders[sender, message["request"]] = order
        return message["seed"], order

    def _handle(self, sender: Address, message: dict[str, Any]) -> None:
        if message["type"] == "request":
            self._requests.append((sender, message))
            return
        number = message["request"]
        order = self._orders.pop((sender, number), None)
        answer: dict[str, Any] = {"type": "cancelled", "request": number, "taken_back": 0}
        waiting = [one for one in self._requests if (one[0], one[1]["request"]) == (sender, number)]
        if waiting:
            self._requests.remove(waiting[0])
            answer["sent"] = []
        elif order is None:
            answer["sent"] = list(range(self.shape.layers))  # it had been finished
        else:
            order.cancelled = True
            answer["taken_back"] = sum(transfer.cancel() for transfer in order.transfers)
            # What had begun ends first.
            ends = [transfer.exception(self.engine_timeout) for transfer in order.transfers]
            if any(error is not None and not isinstance(error, CancelledError) for error in ends):
                return  # it may still be written, and so no answer lets its pages be used again
            answer["sent"] = [layer for layer, error in enumerate(ends) if error is None]
        self.engine.send(sender, _bytes(answer)).result(self.engine_timeout)

    engine_timeout = 30.0

    def poll(self) -> None:
        """Look for messages, without waiting."""
        while True:
            try:
                sender, payload = self.engine.recv(0)
            except TimeoutError:
                return
            self._handle(sender, json.loads(payload))

    def run(self, seed: int, order: _Order, seconds_a_layer: float = 0.0) -> None:
        """Compute the request's cache layer by layer, each layer's pages leaving as it is done."""
        shape = self.shape
        for layer in range(shape.layers):
            for index in order.source_pages:
                self.cache.array[layer, index] = page_of(seed, layer, index, shape.page_bytes)
            time.sleep(seconds_a_layer)
            self.poll()
            if order.cancelled:
                return
            order.transfers.append(
                self.engine.paged_write(
                    self.cache,
                    order.target,
                    shape.page_bytes,
                    Pages(order.source_pages, offset=layer * shape.layer_bytes),
                    Pages(order.target_pages, offset=layer * shape.layer_bytes),
                    imm=order.imm + layer,
                )
            )

    def finish(self, order: _Order) -> None:
        """Wait until all of an order has left, or was taken back."""
        while not all(transfer.done() for transfer in order.transfers):
            self.poll()
            time.sleep(0.001)
        for transfer in order.transfers:
            try:
                transfer.result()
            except CancelledError:
                assert order.cancelled
        self._orders.pop((order.decoder, order.request), None)


class Decode:
    """Asks for caches and waits for them, layer by layer.

    Args:
        engine: this process's engine.
        prefill: where the prefill process is.
        shape: of the cache, equal on both sides.
    """

    def __init__(self, engine: TransferEngine, prefill: Address, shape: CacheShape) -> None:
        self.engine = engine
        self.prefill = prefill
        self.shape = shape
        self.cache = engine.empty((shape.layers, shape.pages, shape.page_bytes), np.uint8)
        self._free = list(range(shape.pages))
        self._pages: dict[int, list[int]] = {}

    def _imm(self, request: int, layer: int = 0) -> int:
        return request * self.shape.layers + layer

    def request(self, request: int, seed: int, pages: int) -> list[int]:
        """Ask for ``pages`` pages of a prompt's cache; returns where they will be."""
        if pages > len(self._free):
            raise MemoryError(f"{pages} pages wanted, {len(self._free)} are free")
        # Scattered on purpose: a cache that has served for a while has no runs of free pages.
        chosen = self._free[::2][:pages]
        chosen += [page for page in self._free if page not in chosen][: pages - len(chosen)]
        self._free = [page for page in self._free if page not in chosen]
        self._pages[request] = chosen
        message = {
            "type": "request",
            "request": request,
            "seed": seed,
            "imm": self._imm(request),
            "pages": chosen,
            "descriptor": bytes(self.cache.descriptor).hex(),
        }
        self.engine.send(self.prefill, _bytes(message)).result(30)
        return chosen

    def wait_layer(self, request: int, layer: int, timeout: float | None = None) -> npt.NDArray[np.uint8]:
        """Block until a layer is here; returns its pages, in the prompt's order."""
        self.engine.imm_counter(self._imm(request, layer)).wait(1, timeout)
        return self.cache.array[layer, self._pages[request]]

    def release(self, request: int, layers: Iterable[int] | None = None) -> None:
        """Free the pages of a request once all its layers, or those of it that were sent, are here."""
        for layer in range(self.shape.layers) if layers is None else layers:
            self.engine.imm_counter(self._imm(request, layer)).wait(1)
        # A value that is released while an arrival is under way would be taken up again.
        for layer in range(self.shape.layers):
            self.engine.release_immediate(self._imm(request, layer))
        self._free += self._pages.pop(request)

    def cancel(self, request: int) -> int:
        """Drop a request; when this returns its pages are written no more. Returns layers taken back."""
        self.engine.send(self.prefill, _bytes({"type": "cancel", "request": request})).result(30)
        while True:
            _, payload = self.engine.recv()
            message = json.loads(payload)
            if message["type"] == "cancelled" and message["request"] == request:
                self.release(request, message["sent"])
                return int(message["taken_back"])


def decode_process(fabric: str, shape: CacheShape, rendezvous: str) -> None:
    """Join late, take one request to its end and drop another."""
    path = pathlib.Path(rendezvous)
    while not path.exists():
        time.sleep(0.01)
    with TransferEngine(fabric) as engine:
        decode = Decode(engine, Address(path.read_bytes()), shape)
        decode.request(0, seed=7, pages=shape.pages // 2)
        for layer in range(shape.layers):
            began = time.perf_counter()
            got = decode.wait_layer(0, layer, timeout=60)
            waited = time.perf_counter() - began
            for index, page in enumerate(got):
                np.testing.assert_array_equal(page, page_of(7, layer, index, shape.page_bytes))
            print(f"decode: layer {layer} is here and right, waited {waited * 1e3:.1f} ms", flush=True)
        decode.release(0)
        decode.request(1, seed=8, pages=shape.pages // 4)
        decode.wait_layer(1, 0, timeout=60)
        taken = decode.cancel(1)
        print(f"decode: request 1 dropped after its first layer, {taken} layers taken back", flush=True)


def main() -> None:
    """Prefill here, decode in a process that starts later."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fabric", default="tcp", help="of both processes (default: tcp)")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--pages", type=int, default=64)
    args = parser.parse_args()
    shape = CacheShape(args.layers, args.pages)
    with tempfile.TemporaryDirectory() as folder, TransferEngine(args.fabric) as engine:
        rendezvous = pathlib.Path(folder) / "prefill"
        prefill = Prefill(engine, shape)
        child = multiprocessing.get_context("spawn").Process(
            target=decode_process, args=(args.fabric, shape, str(rendezvous))
        )
        child.start()
        ready = rendezvous.with_suffix(".new")
        ready.write_bytes(bytes(engine.address))
        ready.rename(rendezvous)
        for _ in range(2):
            seed, order = prefill.accept(timeout=60)
            prefill.run(seed, order, seconds_a_layer=0.05)
            prefill.finish(order)
        while child.is_alive():
            prefill.poll()
            child.join(0.01)
        stats = engine.stats()["peers"][0]
        print(f"prefill: {stats['write_bytes'] / 2**20:.1f} MiB in {stats['writes']} writes", flush=True)
        if child.exitcode != 0:
            raise SystemExit(f"the decode process ended with {child.exitcode}")


if __name__ == "__main__":
    main()
