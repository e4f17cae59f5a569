"""How much service each tenant has had."""

from __future__ import annotations

from collections.abc import Collection


class Service:
    """One virtual counter of tokens for each tenant, all from 0.

    The virtual token counter of "Fairness in Serving Large Language Models" (Sheng et al., OSDI
    2024), with weight 1 for a token of a prompt and for one generated.
    """

    def __init__(self) -> None:
        self._tokens: dict[str, int] = {}
        self._last = ""

    def of(self, tenant: str) -> int:
        """The tenant's counter."""
        return self._tokens.get(tenant, 0)

    def charge(self, tenant: str, num_tokens: int) -> None:
        """The tenant got service."""
        self._tokens[tenant] = self.of(tenant) + num_tokens

    def admit(self, tenant: str, num_tokens: int) -> None:
        """The tenant got service by being chosen among those that waited."""
        self.charge(tenant, num_tokens)
        self._last = tenant

    def join(self, tenant: str, waiting: Collection[str]) -> None:
        """The tenant, of which nothing waited, waits beside ``waiting`` now.

        Time without demand earns nothing: its counter is lifted to the least of those that wait,
        or, where none does, to that of the tenant chosen last.
        """
        least = min((self.of(other) for other in waiting), default=self.of(self._last))
        self._tokens[tenant] = max(self.of(tenant), least)
