"""What can be wrong with a checkpoint, or with how a model is used."""

from __future__ import annotations


class ModelError(ValueError):
    """A configuration, checkpoint, mesh or prompt doesn't fit; the message says which, and what to do."""


class CheckpointError(ModelError):
    """A checkpoint folder is incomplete, corrupt, or holds other tensors than its configuration asks for."""
