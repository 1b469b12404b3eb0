"""scan-kernels: fast, tested, auto-tuned selective-scan (Mamba) kernels.

>>> from scan_kernels import selective_scan
"""

from .mamba import Mamba
from .op import BackendUnavailable, Choice
from .selective_scan import fastest, selective_scan

selective_scan_fn = selective_scan  # mamba-ssm's name for the same function

__all__ = ["BackendUnavailable", "Choice", "Mamba", "fastest", "selective_scan", "selective_scan_fn"]
__version__ = "0.1.0"
