"""One process of the demo: the corpus, the training loop of a rank, and the dense run that checks it."""

from __future__ import annotations

import dataclasses
import json
import os
import sysconfig
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

# A line of standard output that starts so is an event for the parent; the rest is log.
EVENT_MARK = "@pplx-demo "
_MIN_CORPUS = 100_000


@dataclasses.dataclass(frozen=True)
class DemoConfig:
    """What to train; see `run` for the meaning of its arguments.

    Attributes:
      batch: sequences a step, over all processes.
      window: bytes a sequence.
      learning_rate: AdamW's peak, reached after a tenth of the steps; then it falls by a cosine.
      eval_every: steps between two validations on eval_batches batches.
      sample: bytes of text to generate.
      proof_steps: steps that the dense layer repeats in one process.
      tolerance: largest difference of their losses, in nats per byte. Both compute in float32 and add up in
        different orders; a token whose two best experts nearly tie may then choose the other one.
      seed: of everything random.
    """

    processes: int = 4
    steps: int = 180
    fabric: str = "auto"
    batch: int = 16
    window: int = 128
    hidden: int = 128
    layers: int = 2
    heads: int = 4
    intermediate: int = 256
    num_experts: int = 8
    top_k: int = 2
    learning_rate: float = 3e-3
    eval_every: int = 20
    eval_batches: int = 2
    sample: int = 200
    proof_steps: int = 10
    tolerance: float = 2e-3
    seed: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            least = {"sample": 0, "proof_steps": 0, "seed": 0}.get(field.name, 1)
            if field.type == "int" and (isinstance(value, bool) or not isinstance(value, int)):
                raise TypeError(f"{field.name} must be an int, got {value!r}")
            if field.type == "int" and value < least:
                raise ValueError(f"{field.name} must be at least {least}, got {value}")
        if not 1 <= self.processes <= 64:
            raise ValueError(f"processes must be from 1 to 64, got {self.processes}")
        if self.batch % self.processes:
            raise ValueError(f"batch must be a multiple of processes={self.processes}, got {self.batch}")


def load_corpus(limit: int = 4_000_000) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The standard library's sources as bytes: (training, validation), uint8; every tenth file validates.

    Raises:
      RuntimeError: this Python comes without its library's sources.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    texts = [path.read_bytes() for path in sorted(folder.glob("*.py"))]
    train = np.frombuffer(b"\n".join(t for i, t in enumerate(texts) if i % 10)[:limit], np.uint8)
    validation = np.frombuffer(b"\n".join(texts[::10])[:limit], np.uint8)
    if min(train.size, 9 * validation.size) < _MIN_CORPUS:
        raise RuntimeError(f"too few Python sources in {folder} to train on: {train.size} bytes")
    return train, validation


def unigram_entropy(data: np.ndarray[Any, Any]) -> float:
    """Nats per byte of the best model that knows the bytes' frequencies only."""
    counts = np.bincount(data, minlength=256).astype(np.float64)
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


def draw_batch(
    data: np.ndarray[Any, Any], config: DemoConfig, purpose: int, step: int
) -> np.ndarray[Any, Any]:
    """uint8 [batch, window + 1], the same in every process: drawn from (seed, purpose, step)."""
    rng = np.random.default_rng((config.seed, purpose, step))
    starts = rng.integers(0, data.size - config.window, size=config.batch)
    rows: np.ndarray[Any, Any] = data[starts[:, None] + np.arange(config.window + 1)]
    return rows


def _emit(event: str, **values: Any) -> None:
    print(EVENT_MARK + json.dumps({"event": event, **values}), flush=True)


def die_with_parent() -> None:
    """Ends this process when the one that started it is gone: its end of our standard input closes."""

    def watch() -> None:
        # os.read, not sys.stdin: a thread inside a buffered reader stops Python from exiting.
        while os.read(0, 1 << 12):
            pass
        os._exit(3)

    threading.Thread(target=watch, daemon=True).start()


def work(config: DemoConfig, rank: int, coordinator: str, *, dense: bool) -> None:
    """The life of one rank, or of the single dense process; reports by events on standard output."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    if not dense:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            coordinator, num_processes=config.processes, process_id=rank, initialization_timeout=60
        )
    import jax.numpy as jnp
    import optax
    from flax import nnx
    from jax.sharding import Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    import pplx_jax
    from pplx_jax.models.byte_lm import ByteLM, ByteLMConfig, generate, loss_fn

    train, validation = load_corpus()
    sizes = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(ByteLMConfig)
        if hasattr(config, field.name)
    }
    model_config = ByteLMConfig(**sizes)
    mesh = Mesh(np.array(jax.devices()), ("ep",))
    ep = None
    if not dense:
        ep = pplx_jax.ExpertParallel(
            mesh,
            "ep",
            num_experts=config.num_experts,
            top_k=config.top_k,
            hidden=config.hidden,
            max_tokens=config.batch // config.processes * config.window,
            dtype=jnp.float32,
            name="demo",
            fabric=config.fabric,
        )
        ep.connect()

    def place(batch: np.ndarray[Any, Any]) -> jax.Array:
        sharding = NamedSharding(mesh, P("ep"))
        return jax.make_array_from_callback(batch.shape, sharding, lambda index: batch[index])

    def create() -> ByteLM:
        return ByteLM(model_config, rngs=nnx.Rngs(config.seed), ep=ep)

    # Parameters and the optimizer's state are born where they belong; the same seed gives the same values.
    graph, abstract = nnx.split(nnx.eval_shape(create))
    placement = nnx.get_named_sharding(abstract, mesh)
    # Random numbers take long to compile and moments to make: don't optimise that program.
    params = jax.jit(
        lambda: nnx.state(create()),
        out_shardings=placement,
        compiler_options={"xla_backend_optimization_level": 0},
    )()
    warmup = max(1, config.steps // 10)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, warmup, max(warmup + 1, config.steps), 0.1 * config.learning_rate
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.01))
    moments = optax.tree_map_params(
        optimizer,
        lambda _, where: where,
        jax.eval_shape(optimizer.init, params),
        placement,
        transform_non_params=lambda _: NamedSharding(mesh, P()),
    )
    opt_state = jax.jit(optimizer.init, out_shardings=moments)(params)

    def train_step(params: Any, opt_state: Any, batch: jax.Array) -> Any:
        def objective(params: Any) -> Any:
            return loss_fn(nnx.merge(graph, params), batch)

        (loss, metrics), gradients = jax.value_and_grad(objective, has_aux=True)(params)
        updates, new_state = optimizer.update(gradients, opt_state, params)
        # A failed exchange poisons its outputs with NaN. The old state is donated, so keeping it must happen
        # here, and on every rank alike: metrics.ok is the minimum over all of them.
        good = (metrics.ok == 1) & jnp.isfinite(loss)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(good, new, old),
            (optax.apply_updates(params, updates), new_state),
            (params, opt_state),
        )
        return params, opt_state, metrics, good

    step_fn = jax.jit(train_step, donate_argnums=(0, 1), out_shardings=(placement, moments, None, None))
    eval_fn = jax.jit(lambda params, batch: loss_fn(nnx.merge(graph, params), batch)[1].nats_per_byte)

    def evaluate(batches: int) -> float:
        return float(
            np.mean([eval_fn(params, place(draw_batch(validation, config, 1, i))) for i in range(batches)])
        )

    count = config.proof_steps if dense else config.steps
    began = None
    for step in range(count):
        params, opt_state, metrics, good = step_fn(
            params, opt_state, place(draw_batch(train, config, 0, step))
        )  # float() waits for the step: many programs in flight can starve each other of threads on CPU.
        loss, balance = float(metrics.nats_per_byte), float(metrics.load_balance_loss)
        if not good:
            if ep is not None:
                ep.check(sync=True)  # raises the exchange's own error, if it was one
            raise FloatingPointError(f"step {step}: the loss is {loss}; the state was kept")
        value = None
        if not dense and (step % config.eval_every == 0 or step == count - 1):
            value = evaluate(config.eval_batches)
        _emit("step", step=step, loss=loss, balance=balance, validation=value)
        if began is None:
            began = time.monotonic()
            print(f"ready after {time.process_time():.1f} s of CPU time")
    seconds = (time.monotonic() - began) / max(1, count - 1) if began is not None else 0.0
    print(f"trained after {time.process_time():.1f} s of CPU time")
    if dense:
        _emit("done", seconds_per_step=seconds)
        return

    final = evaluate(4 * config.eval_batches)
    prompt = np.frombuffer(b"def ", np.uint8)[None].repeat(config.processes, axis=0)
    text = generate(nnx.merge(graph, params), place(prompt), config.sample, key=jax.random.key(config.seed))
    own = np.asarray(text.addressable_shards[0].data, np.uint8)[0].tobytes()
    assert ep is not None
    ep.check(sync=True)
    _emit(
        "done",
        final=final,
        unigram=unigram_entropy(validation),
        text="def " + own.decode("utf-8", "replace"),
        seconds_per_step=seconds,
        parameters=sum(leaf.size for leaf in jax.tree.leaves(params)),
    )
    ep.close()
    jax.distributed.shutdown()
