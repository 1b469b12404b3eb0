"""Auto-tuning: search strategies, the tuner, the processes it uses and the store of what it found. They know no op.

``tune`` and ``on_first_use`` are what users call; ``scan_kernels/tuning.py``, which knows the ops, has them.
"""

from typing import Any

__all__ = ["on_first_use", "tune"]


def __getattr__(name: str) -> Any:
    # late, for the ops themselves import the store
    if name in __all__:
        from scan_kernels import tuning

        return getattr(tuning, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
