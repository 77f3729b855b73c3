"""Flax model definitions built on `pplx_jax`; installed as ``pplx_jax.models``."""
