"""What tuning learnt: one JSON entry per key, and the look-up that dispatch asks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any


@dataclasses.dataclass(frozen=True)
class Entry:
    """A stored choice."""

    backend: str
    config: dict[str, Any]
    source: str  # "tuned", "shipped" or "architecture"


def lookup(op: str, problem: Any, device: Any) -> Iterator[Entry]:
    """Stored choices for a problem, best source first: this machine's cache, shipped for the device, for its arch."""
    yield from ()
