"""What a user would run instead: the selective scans of other libraries, on the same inputs.

Each is the library's own code, called the way the library calls it. A peer takes the arguments of
``selective_scan`` by name and returns out; one that is not installed is listed as missing.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .op import Op
from .profiling.device import Device
from .selective_scan.problem import Problem

LONGEST_LOOP = 4096  # steps that a Python loop is given: up to a second a call
HELD = 8  # float32 tensors of (batch, dim, length, state) that a peer without a kernel holds for its backward
# The gradient of one step's slice is a tensor of the whole length: a loop's backward costs length squared. Bytes moved.
LARGEST_SWEEP = {"cpu": 3e10, "cuda": 1e13}  # a few seconds


@dataclasses.dataclass(frozen=True)
class Peer:
    """Another implementation of the scan."""

    name: str
    what: str  # what is called, for the report
    package: str  # the distribution it comes from, "" where it is ours
    load: Callable[[Op], Callable[..., Tensor]]  # the scan; ImportError where it is not installed
    loop: int = 0  # float32 tensors of (batch, dim, length) that each iteration of a Python loop over time slices
    loop_states: int = 0  # and of (batch, dim, length, state)
    materialises: bool = False  # holds tensors of (batch, dim, length, state)
    devices: tuple[str, ...] = ("cpu", "cuda")

    def unfit(self, problem: Problem, device: Device) -> str | None:
        """Why this peer is not run on a problem; None if it is."""
        if problem.device not in self.devices:
            return f"does not run on {problem.device}"
        if problem.groups > 1 or problem.sequences or problem.constant_B or problem.constant_C:
            return "takes neither groups, packed sequences nor constant B, C"
        sliced = self.loop + self.loop_states * problem.state
        if sliced and problem.length > LONGEST_LOOP:
            return f"a Python loop over {problem.length} steps would take minutes"
        sweep = 4 * 4 * problem.length * problem.elements * sliced
        if problem.direction == "backward" and sweep > LARGEST_SWEEP[problem.device]:
            return f"its backward would move about {sweep / 1e9:.0f} GB: a full-length gradient for each step's slice"
        needed = HELD * 4 * problem.elements * problem.state
        if self.materialises and device.memory_bytes and needed > 0.7 * device.memory_bytes:
            return f"would hold about {needed / 1e9:.0f} GB of states"
        return None

    @property
    def version(self) -> str:
        """The installed version, or "" where there is none."""
        try:
            return metadata.version(self.package) if self.package else ""
        except metadata.PackageNotFoundError:
            return ""


def _mamba_ssm(op: Op) -> Callable[..., Tensor]:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    def scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, **_: Any) -> Tensor:
        return selective_scan_fn(u, delta, A, B, C, D, z, delta_bias, delta_softplus)

    return scan


def _transformers(op: Op) -> Callable[..., Tensor]:
    from transformers.models.mamba import modeling_mamba

    if not hasattr(modeling_mamba, "mamba_selective_scan"):
        raise ImportError("this version keeps its fallback scan inside its mixer; 5.20 and later have it as a function")
    # the function under its decorators, which would call mamba_ssm where that is installed
    fallback = inspect.unwrap(modeling_mamba.mamba_selective_scan)

    def scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, **_: Any) -> Tensor:
        return fallback(u, delta, A, B.squeeze(1), C.squeeze(1), D, z, delta_bias, delta_softplus).to(u.dtype)

    return scan


def _mambapy(op: Op) -> Callable[..., Tensor]:
    from mambapy.mamba import MambaBlock

    def scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, **_: Any) -> Tensor:
        # its scan wants (batch, length, dim) and leaves bias, softplus and gate to its caller
        delta = delta if delta_bias is None else delta + delta_bias[:, None]
        delta = F.softplus(delta) if delta_softplus else delta
        u, delta, B, C = (t.transpose(1, 2).float().contiguous() for t in (u, delta, B.squeeze(1), C.squeeze(1)))
        y = MambaBlock.selective_scan(None, u, delta, A, B, C, 0.0 if D is None else D).transpose(1, 2)
        return (y if z is None else y * F.silu(z)).to(B.dtype if z is None else z.dtype)

    return scan


def _associative(op: Op) -> Callable[..., Tensor]:
    import torch
    from torch._higher_order_ops import associative_scan

    def combine(earlier, later):
        return earlier[0] * later[0], later[0] * earlier[1] + later[1]

    def whole(u, delta, A, B, C, D, z, delta_bias, delta_softplus, mode):
        delta = delta.float() if delta_bias is None else delta.float() + delta_bias[:, None]
        delta = F.softplus(delta) if delta_softplus else delta
        B, C = (t.squeeze(1).float().transpose(1, 2)[:, None] for t in (B, C))
        decays, inputs = torch.exp(delta[..., None] * A[:, None]), (delta * u)[..., None] * B
        h = associative_scan(combine, (decays, inputs), dim=2, combine_mode=mode)[1]
        y = (h * C).sum(-1)
        y = y if D is None else y + D[:, None] * u
        return (y if z is None else y * F.silu(z)).to(u.dtype)

    compiled = torch.compile(whole)

    def scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, **_: Any) -> Tensor:
        # the mode that makes one kernel needs a GPU and the compiler; on a CPU compiling takes longer than it saves
        run, mode = (compiled, "pointwise") if u.is_cuda else (whole, "generic")
        return run(u, delta, A, B, C, D, z, delta_bias, delta_softplus, mode)

    return scan


def _plain(op: Op) -> Callable[..., Tensor]:
    def scan(**arguments: Any) -> Tensor:
        return op.cases.plain(**arguments)

    return scan


PEERS = (
    Peer("mamba_ssm", "mamba_ssm's CUDA kernels: selective_scan_fn", "mamba-ssm", _mamba_ssm, devices=("cuda",)),
    Peer("mambapy", "mambapy's parallel scan in PyTorch: MambaBlock.selective_scan", "mambapy", _mambapy,
         materialises=True),
    Peer("transformers", "transformers' fallback, a loop in PyTorch: mamba_selective_scan", "transformers",
         _transformers, loop_states=2, materialises=True),
    Peer("associative scan", "torch's associative_scan, under torch.compile on a GPU", "", _associative,
         materialises=True),
    Peer("plain torch", "the textbook loop in PyTorch that errors are compared with", "", _plain, loop=2,
         materialises=True),
)  # fmt: skip
