"""What happens to models, with one that holds a group: checkpoints, copies, splits, rematerialisation."""

from __future__ import annotations

import copy
import functools
import pickle
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from moe_layer import INIT, INNER, H, arrays, assert_close, group, make_params, mesh_of

import pplx_jax
from pplx_jax import compat
from pplx_jax.flax import MoE
from pplx_jax.moe import MoEConfig, MoEParams, layout_of, moe

CONFIG = MoEConfig(top_k=2)


def make(ep: Any, seed: int = 0) -> MoE:
    return MoE(H, INNER, 8, 2, rngs=nnx.Rngs(seed), ep=ep, selection_bias=True, kernel_init=INIT)


@nnx.jit
def apply(model: MoE, x: jax.Array) -> jax.Array:
    return model(x)[0]


def tokens() -> jax.Array:
    return jax.random.normal(jax.random.key(1), (8, H))


# ---- checkpoints -------------------------------------------------------------------------------------------


def test_orbax_restores_onto_fewer_ranks(tmp_path: Path) -> None:
    x = tokens()
    with group(mesh_of(ep=4), 8, 2) as ep:
        model = nnx.jit(lambda: make(ep, seed=3))()
        want = jax.device_get(jax.block_until_ready(apply(model, x)))
        saved = nnx.state(model)
        assert saved["experts"]["up"][...].addressable_shards[0].data.shape[0] == 2
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "step", nnx.to_pure_dict(saved))
    with group(mesh_of(ep=2), 8, 2) as ep:
        model = make(ep)  # other values
        state = nnx.state(model)
        everywhere = NamedSharding(ep.mesh, P())

        def target(leaf: Any) -> jax.ShapeDtypeStruct:
            mine = isinstance(leaf.sharding, NamedSharding)
            return jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=leaf.sharding if mine else everywhere
            )

        with ocp.StandardCheckpointer() as checkpointer:
            restored = checkpointer.restore(tmp_path / "step", jax.tree.map(target, nnx.to_pure_dict(state)))
        nnx.replace_by_pure_dict(state, restored)
        nnx.update(model, state)
        up = model.experts.up[...]
        assert up.sharding == NamedSharding(ep.mesh, P("ep", None, None))
        assert up.addressable_shards[0].data.shape[0] == 4
        for before, after in zip(arrays(saved), arrays(nnx.state(model)), strict=True):
            np.testing.assert_array_equal(before, after)
        # A token's rows are summed on two ranks now, not four.
        assert_close(jax.block_until_ready(apply(model, x)), want)
    dense = make(None, seed=3)
    assert_close(want, apply(dense, x))


# ---- copies ------------------------------------------------------------------------------------------------


def test_split_and_merge() -> None:
    x = tokens()
    with group(mesh_of(ep=4), 8, 2) as ep:
        model = make(ep)
        graph, state = nnx.split(model)
        assert hash(graph) == hash(nnx.graphdef(make(ep, seed=1)))
        assert nnx.merge(graph, state).ep is ep

        @jax.jit
        def run(state: Any, x: jax.Array) -> Any:
            return nnx.merge(graph, state)(x)[0]

        y = jax.block_until_ready(run(state, x))
        params, rest = nnx.split(model, nnx.Param, ...)[1:]
        run(nnx.merge_state(params, rest), x)
        assert run._cache_size() == 1
    assert_close(y, apply(make(None), x))


def test_averaged_parameters() -> None:
    x = tokens()
    with group(mesh_of(ep=4), 8, 2) as ep:
        model, other = make(ep), make(ep, seed=1)
        graph, params, rest = nnx.split(model, nnx.Param, ...)

        @jax.jit
        def average(mean: Any, new: Any) -> Any:
            return jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, mean, new)

        mean = average(jax.tree.map(jnp.copy, params), nnx.state(other, nnx.Param))
        assert mean["experts"]["up"][...].sharding.spec[0] == "ep"
        averaged = nnx.merge(graph, mean, rest)
        assert averaged.ep is ep
        got = jax.block_until_ready(apply(averaged, x))
        untouched = jax.block_until_ready(apply(model, x))
    dense = [make(None), make(None, seed=1)]
    want = nnx.merge(
        nnx.graphdef(dense[0]),
        jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, *(nnx.state(m, nnx.Param) for m in dense)),
        nnx.state(dense[0], nnx.Not(nnx.Param)),
    )
    assert_close(got, apply(want, x))
    assert_close(untouched, apply(dense[0], x))


def test_deep_copies_share_the_group_and_nothing_else() -> None:
    x = tokens()
    with group(mesh_of(ep=4), 8, 2) as ep:
        model = make(ep)
        twin = copy.deepcopy(model)
        assert twin.ep is ep
        twin.experts.up[...] = twin.experts.up[...] * 2
        got = [jax.block_until_ready(apply(m, x)) for m in (model, twin)]
    dense = make(None)
    assert_close(got[0], apply(dense, x))
    dense.experts.up[...] = dense.experts.up[...] * 2
    assert_close(got[1], apply(dense, x))


def test_pickling_refuses_the_group_and_takes_config_and_state() -> None:
    with group(mesh_of(ep=2), 8, 2) as ep:
        model = make(ep)
        for holder in (ep, model):
            with pytest.raises(TypeError, match=r"pickle its \.config"):
                pickle.dumps(holder)
        config, state = pickle.loads(pickle.dumps((ep.config, nnx.to_pure_dict(nnx.state(model)))))
        assert config == ep.config
        twin = pplx_jax.ExpertParallel(ep.mesh, config=config, name=ep.name)
        assert twin == ep
    dense = make(None, seed=1)
    fresh = nnx.state(dense)
    nnx.replace_by_pure_dict(fresh, jax.device_get(state))
    nnx.update(dense, fresh)
    assert_close(apply(dense, tokens()), apply(make(None), tokens()))


# ---- rematerialisation -------------------------------------------------------------------------------------

POLICIES = jax.checkpoint_policies
NAMES = ("moe_dispatched", "moe_combined")


def exchanges(text: str) -> dict[str, int]:
    found = re.findall(r'custom_call_target="(pplx_\w+)"', text)
    return {name: found.count(name) for name in sorted(set(found))}


def loss_of(params: MoEParams, x: jax.Array, ep: Any, policy: Any) -> Any:
    def layer(params: MoEParams, x: jax.Array) -> Any:
        y, aux = moe(params, x, CONFIG, ep=ep)
        return jnp.sin(y), aux.load_balance_loss

    if policy != "none":
        layer = jax.checkpoint(layer, policy=policy)
    y, balance = layer(params, x)
    return (y * jnp.arange(y.size).reshape(y.shape)).sum() + balance


@pytest.mark.parametrize("axes", [{"ep": 4}, {"fsdp": 2, "tp": 2, "ep": 2}])
def test_saved_names_keep_the_backward_pass_from_exchanging_again(axes: dict[str, int]) -> None:
    params = make_params(8, use_bias=True, shared_experts=1)
    x = tokens()
    once = {"pplx_combine": 1, "pplx_combine_transpose": 1, "pplx_dispatch": 1, "pplx_dispatch_transpose": 1}
    # The value as well: without it there is no forward pass whose exchanges could be saved.
    run = jax.jit(jax.value_and_grad(loss_of, argnums=(0, 1)), static_argnums=(2, 3))
    want = run(params, x, None, "none")
    with group(mesh_of(**axes), 8, 2) as ep:
        layout = layout_of(ep, CONFIG, hidden=H, intermediate=INNER, num_experts=8)
        x = jax.device_put(x, NamedSharding(ep.mesh, P(layout.tokens)))
        for policy, expected in (
            ("none", once),
            (POLICIES.save_only_these_names(*NAMES), once),
            (POLICIES.nothing_saveable, {**once, "pplx_dispatch": 2, "pplx_combine": 2}),
        ):
            compiled = run.lower(params, x, ep, policy).compile()
            assert exchanges(compiled.as_text()) == expected
            assert_close(jax.block_until_ready(compiled(params, x)), want, 1e-3)


def test_names_say_what_is_saved(capsys: pytest.CaptureFixture[str]) -> None:
    params = make_params(8)
    with group(mesh_of(fsdp=2, ep=2), 8, 2) as ep:
        saved = {}
        for names in (NAMES, (*NAMES, "moe_gathered")):
            jax.ad_checkpoint.print_saved_residuals(
                functools.partial(loss_of, ep=ep, policy=POLICIES.save_only_these_names(*names)),
                params,
                tokens(),
            )
            saved[names] = capsys.readouterr().out
    plain, gathered = saved.values()
    # Whole matrices (of two ranks' 4 experts, on 2 replicas of the group) are kept only if asked for: else
    # the layer gathers them again from the arguments.
    up, down = f"f32[16,{H},{INNER}]", f"f32[16,{INNER},{H}]"
    assert (gathered.count(up), gathered.count(down)) == (2, 1)
    assert (plain.count(up), plain.count(down)) == (0, 0)
    assert "params.experts.up" in plain


def test_kernels_that_do_not_say_where_they_vary_compile_in_checked_shards() -> None:
    def kernel(x: Any, out: Any) -> None:
        out[...] = x[...] * 2

    def twice(x: jax.Array) -> jax.Array:
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        out: jax.Array = pl.pallas_call(kernel, shape, compiler_params=triton.CompilerParams())(x)
        return out

    mesh = mesh_of(ep=4)
    shard = functools.partial(jax.shard_map, mesh=mesh, in_specs=P("ep"), out_specs=P("ep"))
    x = jax.ShapeDtypeStruct((64, 16), jnp.float32)
    with pytest.raises(ValueError, match="check_vma"):
        jax.jit(shard(twice)).trace(x)
    traced = jax.jit(shard(lambda x: compat.as_unchecked(twice, x))).trace(x)
    assert "pallas_call" in str(traced.jaxpr)
    if jax.__version_info__ < (0, 11):  # later ones lower Pallas kernels only where there is a GPU
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        assert "triton" in text
        assert "all_reduce" not in text
