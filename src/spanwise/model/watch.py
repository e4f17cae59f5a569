"""What a decoder layer does, seen by running its own forward on drawn input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from spanwise.device.rotary import Angles, Tables, place
from spanwise.model import seams
from spanwise.model.attention import LayerAttention
from spanwise.model.flat import AttentionOptions, FlatLayer, OwnMlp, first_of
from spanwise.model.stage import own_forward

NUM_ROWS = 3
# Of the largest value: what rounding in another order may change.
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}


class NoMatchError(Exception):
    """The layer is none of the arrangements."""


@dataclass(frozen=True)
class LayerParts:
    """What is needed to rebuild a layer: its module, its attention's name in it, and its handler.

    ``head_dim``: of queries, keys and values alike; ``rotated_dim``: of the rotary tables.
    """

    layer: nn.Module
    attention: str
    handler: LayerAttention
    head_dim: int
    rotated_dim: int
    returns_tuple: bool


class _Watch(seams.CacheShape):
    """Stands for cache and attention while a layer shows what it does."""

    def __init__(self, num_kv: int) -> None:
        super().__init__()
        self._num_kv = num_kv
        self.options = AttentionOptions(None, None, None)
        self.given: list[torch.Tensor] = []

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep ``[1, heads, tokens, dim]`` as ``[tokens, heads, dim]``."""
        self.given += [key_states[0].transpose(0, 1), value_states[0].transpose(0, 1)]
        return key_states, value_states

    def place(self, heads: torch.Tensor, angles: Angles | None) -> torch.Tensor:
        """As ``LayerAttention.place``, in a cache of its own."""
        tokens, _, dim = heads.shape
        keys, values = (heads.new_empty(tokens, self._num_kv, dim) for _ in range(2))
        query = place(heads, angles, torch.arange(tokens, device=heads.device), keys, values)
        self.given += [keys, values]
        return query

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """Keep what is given and answer the queries themselves, which serve as any answer would."""
        self.options = AttentionOptions(scaling, softcap, s_aux)
        return self.attend_tokens(query[0].transpose(0, 1), scaling, softcap, s_aux)[None]

    def attend_tokens(self, query: torch.Tensor, *_: Any) -> torch.Tensor:
        """As ``LayerAttention.attend_tokens``."""
        self.given.append(query)
        return query


@dataclass(frozen=True)
class Shown:
    """What a layer's own forward did with drawn input; ``mlp``: what its MLP took and gave."""

    hidden: torch.Tensor
    tables: Tables
    options: AttentionOptions
    given: Sequence[torch.Tensor]
    mlp: tuple[torch.Tensor, torch.Tensor]
    output: torch.Tensor
    num_kv: int

    def is_given_by(self, flat: FlatLayer) -> bool:
        """Whether a flat layer gives the same keys, values, queries and output.

        Its own module in place of a flat MLP is only asked for its input: of two inputs that differ
        by rounding a router may send one elsewhere.
        """
        watch, taken = _Watch(self.num_kv), list[torch.Tensor]()
        flat.attention.handler = watch
        seen = [*self.given, self.output]
        if isinstance(flat.mlp, OwnMlp):
            seen.insert(3, self.mlp[0])

            def repeat(hidden: torch.Tensor) -> torch.Tensor:
                taken.append(hidden[0])
                return self.mlp[1][None]

            flat.mlp.module = repeat
        output = first_of(flat(self.hidden, self.tables))
        pairs = zip([*watch.given, *taken, output], seen, strict=True)
        return all(own.shape == wanted.shape and is_close(own, wanted) for own, wanted in pairs)


def watch_layer(parts: LayerParts, hidden_size: int) -> Shown:
    """Run the layer's own forward. Raises NoMatchError where it attends otherwise, or twice.

    Or where it makes something of positions itself: a scale that grows with them, for one.
    """
    module, mlp = parts.layer.get_submodule(parts.attention), getattr(parts.layer, "mlp", None)
    if not isinstance(mlp, nn.Module):
        raise NoMatchError
    like = next(module.parameters())
    hidden = draw(1, NUM_ROWS, hidden_size, like=like)
    tables = _draw_tables(parts, like)
    num_kv = parts.handler.spec.num_heads
    watch, passed = _Watch(num_kv), list[torch.Tensor]()
    # Rotary tables are the only way in which a flat layer knows positions.
    reached: list[bool] = []
    positions = seams.seen_positions(torch.arange(NUM_ROWS, device=like.device)[None], reached)
    hook = mlp.register_forward_hook(
        lambda _, given, output: passed.extend((given[0][0], first_of(output)[0]))
    )
    seams.set_handler(module, watch)
    try:
        output = own_forward(parts.layer)(
            hidden,
            attention_mask=None,
            position_ids=positions,
            past_key_values=watch,
            use_cache=True,
            position_embeddings=tables,
        )
    except (TypeError, RuntimeError, ValueError, IndexError) as error:  # it wants other arguments
        raise NoMatchError from error
    finally:
        seams.set_handler(module, parts.handler)
        hook.remove()
    if len(watch.given) != 3 or len(passed) != 2 or reached:
        raise NoMatchError
    shown = (hidden, tables, watch.options, watch.given, (passed[0], passed[1]))
    return Shown(*shown, first_of(output), num_kv)


def _draw_tables(parts: LayerParts, like: torch.Tensor) -> Tables:
    angles = draw(1, NUM_ROWS, parts.rotated_dim // 2, like=like).float()
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def draw(*shape: int, like: torch.Tensor) -> torch.Tensor:
    """Normal numbers, the same each time."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(like)


def is_close(own: torch.Tensor, seen: torch.Tensor) -> bool:
    """Whether two results differ by no more than rounding."""
    worst = (own.float() - seen.float()).abs().max()
    return bool(worst <= _TOLERANCE[seen.dtype] * seen.float().abs().max())
