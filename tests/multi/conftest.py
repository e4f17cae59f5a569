from __future__ import annotations

from tests.support.engines import models, supervisor

__all__ = ["models", "supervisor"]
