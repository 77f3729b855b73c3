"""The NNX module, dense and over a group, and the byte model made of it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from moe_layer import INIT, INNER, H, arrays, assert_close, group, mesh_of

from pplx_jax.flax import MoE, SelectionBias, moe_layers, name_layers
from pplx_jax.models.byte_lm import ByteLM, ByteLMConfig, generate, loss_fn

# ---- the module --------------------------------------------------------------------------------------------


class Stack(nnx.Module):
    def __init__(self, ep: Any, remat: bool = False, layers: int = 2) -> None:
        rngs = nnx.Rngs(0)
        self.layers = nnx.List(
            [
                MoE(H, INNER, 8, 2, rngs=rngs, ep=ep, selection_bias=True, kernel_init=INIT)
                for _ in range(layers)
            ]
        )
        self.remat = remat
        name_layers(self)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        balance = jnp.float32(0)
        for layer in self.layers:
            call = nnx.remat(lambda layer, x: layer(x)) if self.remat else (lambda layer, x: layer(x))
            y, aux = call(layer, x)
            x, balance = x + y, balance + aux.load_balance_loss
        return x, balance


@nnx.jit
def stack_gradients(model: Stack, x: jax.Array) -> Any:
    def loss(model: Stack) -> jax.Array:
        y, balance = model(x)
        return (y**2).mean() + balance

    return nnx.value_and_grad(loss)(model)


def test_module_in_a_stack_with_and_without_a_group() -> None:
    x = jax.random.normal(jax.random.key(1), (4, 3, H))
    want = arrays(stack_gradients(Stack(None), x))
    with group(mesh_of(ep=4), 8, 2) as ep:
        for remat in (False, True):
            model = nnx.jit(lambda remat=remat: Stack(ep, remat))()
            assert model.layers[0].experts.up[...].sharding.spec[0] == "ep"
            assert_close(arrays(stack_gradients(model, x)), want)
        assert Stack(ep, layers=1).layers[0].experts.up[...].sharding.spec[0] == "ep"  # outside jit as well


def test_module_holds_experts_that_ranks_do_not_divide() -> None:
    with group(mesh_of(ep=4), 6, 2) as ep:
        layer = MoE(H, INNER, 6, 2, rngs=nnx.Rngs(0), ep=ep)
        assert layer.experts.up.shape == (6, H, INNER)
        assert nnx.get_partition_spec(nnx.state(layer))["experts"]["up"].get_value() == P()


def test_sharding_metadata() -> None:
    with group(mesh_of(ep=4), 8, 2) as ep:
        abstract = nnx.eval_shape(lambda: MoE(H, INNER, 8, 2, rngs=nnx.Rngs(0), ep=ep, use_bias=True))
    specs = nnx.get_partition_spec(nnx.state(abstract))
    assert specs["experts"]["up"].get_value() == P("ep", None, None)
    assert specs["experts"]["down_bias"].get_value() == P("ep", None)
    assert specs["router"].get_value() == P()
    later = MoE(H, INNER, 8, 2, rngs=nnx.Rngs(0), expert_sharding="model")  # no mesh yet: an annotation
    assert nnx.get_partition_spec(nnx.state(later))["experts"]["gate"].get_value() == P("model", None, None)


def test_selection_bias_is_state_without_gradient() -> None:
    model = Stack(None)
    layer = model.layers[0]
    before = np.asarray(layer.selection_bias[...])
    loads = jnp.array([3, 0, 9, 1, 1, 1, 1, 0])
    layer.update_selection_bias(loads, speed=0.1)
    assert np.abs(np.asarray(layer.selection_bias[...]) - before).max() == pytest.approx(0.1)
    assert len(arrays(nnx.state(model, SelectionBias))) == 2
    _, gradients = stack_gradients(model, jnp.ones((3, H)))
    assert not arrays(nnx.state(gradients, SelectionBias))
    with pytest.raises(ValueError, match="no selection bias"):
        MoE(H, INNER, 8, 2, rngs=nnx.Rngs(0)).update_selection_bias(loads)


def test_names_follow_the_path() -> None:
    model = ByteLM(ByteLMConfig.tiny(), rngs=nnx.Rngs(0))
    assert [path for path, _ in moe_layers(model)] == ["blocks.0.moe", "blocks.1.moe"]
    assert model.blocks[1].moe.name == "blocks.1.moe"


# ---- the model ---------------------------------------------------------------------------------------------


def test_byte_lm_is_causal_and_generates() -> None:
    config = ByteLMConfig.tiny()
    model = nnx.jit(lambda: ByteLM(config, rngs=nnx.Rngs(0)))()
    call = nnx.jit(lambda model, tokens: model(tokens))
    tokens = jax.random.randint(jax.random.key(0), (2, config.window), 0, 256)
    logits, _ = call(model, tokens)
    changed, _ = call(model, tokens.at[:, 20].set(0))
    assert_close(logits[:, :20], changed[:, :20])
    assert np.abs(logits[:, 20:] - changed[:, 20:]).max() > 1e-3
    loss, metrics = nnx.jit(loss_fn)(model, tokens)
    assert loss > metrics.nats_per_byte > 0
    assert metrics.ok == 1

    prompt = tokens[:, :30].astype(jnp.uint8)
    greedy = generate(model, prompt, 6, key=jax.random.key(1), temperature=0)
    # Past the window the model sees its last bytes only: check each against a plain forward pass.
    sequence = np.asarray(prompt)
    for i in range(6):
        seen = sequence[:, -config.window :]
        padded = np.pad(seen, ((0, 0), (0, config.window - seen.shape[1])))
        logits, _ = call(model, jnp.asarray(padded, tokens.dtype))
        best = np.asarray(jnp.argmax(logits[:, seen.shape[1] - 1], -1)).astype(np.uint8)
        np.testing.assert_array_equal(greedy[:, i], best)
        sequence = np.concatenate([sequence, best[:, None]], axis=1)
    sampled = [generate(model, prompt, 8, key=jax.random.key(k)) for k in (1, 1, 2)]
    np.testing.assert_array_equal(sampled[0], sampled[1])
    assert (np.asarray(sampled[0]) != np.asarray(sampled[2])).any()
    assert generate(model, prompt, 0, key=jax.random.key(0)).shape == (2, 0)


# ---- errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error, match, changes",
    [
        (TypeError, "hidden", {"hidden": 1.5}),
        (ValueError, "intermediate", {"intermediate": 0}),
        (ValueError, "num_experts", {"num_experts": 0}),
        (ValueError, "top_k", {"top_k": 5}),
        (ValueError, "shared_experts", {"shared_experts": -1}),
        (ValueError, "score_fn", {"router": "tanh"}),
        (ValueError, "activation", {"activation": "swish"}),
        (TypeError, "activation", {"activation": 3}),
        (TypeError, "dtype", {"dtype": jnp.int32}),
        (TypeError, "dtype", {"param_dtype": "words"}),
        (TypeError, "data_axes", {"data_axes": "dp"}),
        (TypeError, "name", {"name": 3}),
    ],
)
def test_bad_module_arguments_are_named(error: type[Exception], match: str, changes: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"hidden": H, "intermediate": INNER, "num_experts": 4, "top_k": 2, **changes}
    sizes = [arguments.pop(name) for name in ("hidden", "intermediate", "num_experts", "top_k")]
    with pytest.raises(error, match=match):
        MoE(*sizes, rngs=nnx.Rngs(0), **arguments)


@pytest.mark.parametrize("changes", [{"hidden": 100, "heads": 3}, {"layers": 0}, {"window": "8"}])
def test_bad_model_sizes_are_named(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        ByteLMConfig(**changes)
