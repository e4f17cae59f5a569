"""The start of an engine that runs a model by one forward an item."""

from __future__ import annotations

import msgspec

from spanwise.engine.launch import AnySupervisor, Launch, Limits, Progress, Wish, devices_for
from spanwise.errors import EngineError, InputError
from spanwise.layout.request import LayoutRequest
from spanwise.model.folder import is_factory, resolve_model
from spanwise.scheduler.forward import ForwardScheduler
from spanwise.scheduler.forward_config import ForwardConfig
from spanwise.scheduler.item import ItemRequest
from spanwise.types.cache import CacheLayout
from spanwise.types.forward import TensorData
from spanwise.types.model import ModelSource

_NO_CACHE = CacheLayout(block_size=1, groups=())
# A batch that is larger goes from stage to stage in pieces.
_MOST_LINK_BYTES = 64 << 20


class ForwardEngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """A model, devices, a layout, and how items are batched.

    ``model``: a folder, a name on the hub, or ``module:factory``. ``example``: one item's inputs,
    where a module says nothing of what it takes.
    """

    model: str
    devices: str | None = None
    layout: LayoutRequest = LayoutRequest()
    dtype: str = "auto"
    max_batch_size: int = 32
    max_delay_s: float = 0.0
    example: tuple[TensorData, ...] = ()

    def __post_init__(self) -> None:
        """Raise InputError for what cannot be."""
        if self.max_batch_size < 1:
            raise InputError(f"max_batch_size must be at least 1, got {self.max_batch_size}")
        if not 0 <= self.max_delay_s < float("inf"):
            raise InputError(f"max_delay must be a number from 0 up, got {self.max_delay_s}")


class ForwardLaunch(Launch[ItemRequest]):
    """One start of a model that is run by one forward an item."""

    def __init__(
        self,
        config: ForwardEngineConfig,
        progress: Progress,
        shared: AnySupervisor | None = None,
    ) -> None:
        """Find the model. Raises InputError."""
        devices = devices_for(config.devices, config.layout)
        degrees = config.layout.degrees(len(devices))
        source = ModelSource(
            folder=config.model if is_factory(config.model) else str(resolve_model(config.model)),
            dtype=config.dtype,
            task="forward",
            in_pieces=degrees.pp > 1,
            tp_size=degrees.tp,
            example=config.example,
        )
        wish = Wish(name=config.model, source=source, devices=devices, layout=config.layout)
        super().__init__(wish, progress, shared)
        self.config = config

    def _load(self) -> None:
        """Ranks decide by what they see; one that saw something else would wait for ever."""
        super()._load()
        for stage in range(self.layout.pp):
            split = {i.replicated for s, i in self.shards.items() if s.pp_rank == stage}
            if len(split) > 1:
                names = ", ".join(sorted(set.symmetric_difference(*map(set, split))))
                raise EngineError(
                    f"the ranks of stage {stage} do not agree on what can be split ({names:.100}); "
                    "use one rank (-tp 1)"
                )

    def _size(self) -> CacheLayout:
        return _NO_CACHE

    def _policy(self) -> ForwardScheduler:
        return ForwardScheduler(
            ForwardConfig(
                max_batch_size=self.config.max_batch_size,
                max_delay_s=self.config.max_delay_s,
                num_stages=self.layout.pp,
                max_in_flight=self.max_in_flight,
            )
        )

    def _limits(self) -> Limits:
        assert self.facts.forward is not None
        carried = max(self.facts.forward.carried_bytes, default=0) * self.config.max_batch_size
        return Limits(
            max_step_tokens=1,
            max_model_len=1,
            link_bytes=min(carried, _MOST_LINK_BYTES),
            token_bytes=0,
        )
