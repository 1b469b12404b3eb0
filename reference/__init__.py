"""NumPy float64 references, one file per op, written to be read next to the papers. They import NumPy only."""

from .selective_scan import selective_scan, selective_scan_backward

__all__ = ["selective_scan", "selective_scan_backward"]
