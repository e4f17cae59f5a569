"""What is known of a model before any weight is read."""

from __future__ import annotations

import msgspec

from spanwise.types.cache import LayerCache
from spanwise.types.forward import ForwardFacts, TensorData
from spanwise.types.worker import ModelTask


class ModelSource(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """Which model, and what for.

    Of one that is run by one ``forward``: ``folder`` may be a ``module:factory``; ``in_pieces``:
    it is to be taken apart, by each of ``tp_size`` ranks its share, run on the ``example`` (one
    item's inputs) where one is given.
    """

    folder: str
    dtype: str
    task: ModelTask = "generate"
    in_pieces: bool = False
    tp_size: int = 1
    example: tuple[TensorData, ...] = ()


class ModelFacts(msgspec.Struct, frozen=True, kw_only=True):
    """A model's countable facts; from its config and a build without memory.

    ``layer_bytes[i]`` are the weights of layer i, ``first_bytes``/``last_bytes`` those of what only
    the first stage (embeddings) and only the last stage (final norm, head) hold, all in the dtype
    run. ``num_experts`` is 0 for a dense model. ``max_position`` is the longest sequence the model
    was made for. ``pipeline_refusal`` and ``tensor_refusal`` say, in words, why the model cannot be
    cut that way ("" where it can).

    Of a model that is run by one forward (``forward`` says what it takes), layers are the pieces it
    comes apart into, one where it was not to be; ``layer_costs_s`` is the time each took for the
    example (empty: bytes stand for time).
    """

    architecture: str
    model_type: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    max_position: int
    num_attention_heads: int
    num_kv_heads: int
    intermediate_size: int
    num_experts: int
    tied_embeddings: bool
    layer_bytes: tuple[int, ...]
    first_bytes: int
    last_bytes: int
    layer_caches: tuple[LayerCache, ...]
    recompute_lengths: tuple[int, ...] = ()
    replicated: tuple[str, ...] = ()
    pipeline_refusal: str = ""
    tensor_refusal: str = ""
    dtype: str = "float32"
    layer_costs_s: tuple[float, ...] = ()
    forward: ForwardFacts | None = None
