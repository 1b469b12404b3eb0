"""scan-kernels: fast, tested, auto-tuned selective-scan (Mamba) kernels.

>>> from scan_kernels import selective_scan
"""

from pathlib import Path as _Path

# In a checkout, the rooms autotune, reference and profiling stand beside this folder; once installed, inside it.
if not _Path(__file__).with_name("autotune").is_dir():
    __path__.append(str(_Path(__file__).resolve().parent.parent))

from .mamba import Mamba
from .op import BackendUnavailable, Choice
from .selective_scan import fastest, selective_scan

selective_scan_fn = selective_scan  # mamba-ssm's name for the same function

__all__ = ["BackendUnavailable", "Choice", "Mamba", "fastest", "selective_scan", "selective_scan_fn"]
__version__ = "0.1.0"
