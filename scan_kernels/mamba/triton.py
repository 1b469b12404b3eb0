"""How the block's Triton kernels are launched; imported only where they run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from . import triton_kernels as kernels

if tuple(int(v) for v in triton.__version__.split(".")[:2]) < (3, 4):
    raise ImportError("the kernels need Triton 3.4: 3.3 fails an assertion, which ends the process")

INTERPRETED = not isinstance(kernels.update_kernel, triton.JITFunction)


class Tile(NamedTuple):
    """How a convolution is cut. Powers of two."""

    channels: int  # of a program; 128 a warp, 4 a lane
    steps: int  # of a tile; as many as one step looks back on, where those are more
    span: int  # most steps of a program: what it reads of its neighbours, and its sums, are to be small beside it
    warps: int
    stages: int  # tiles whose loads are under way at once


TILES = {"forward": Tile(128, 8, 128, 1, 2), "backward": Tile(256, 4, 256, 2, 3)}
ENOUGH = 2048  # programs that keep a GPU busy; until there are so many, they span fewer steps


class StateTile(NamedTuple):
    """How the update is cut."""

    states: int  # of a program, of all its channels
    warps: int


UPDATE = StateTile(512, 1)


Launch = Callable[..., None]


def _run(kernel: Any, grid: tuple[int], x: Tensor, *arguments: Any, **options: Any) -> None:
    with torch.cuda.device_of(x):
        kernel[grid](x, *arguments, **options)


def _dense(t: Any) -> Any:
    """t with its last axis contiguous; where it is, as it lies."""
    return t if t is None or t.stride(-1) == 1 else t.contiguous()


def _cut(
    tile: Tile, batch: int, rows: int, dim: int, width: int, past: int, silu: bool
) -> tuple[tuple[int], int, int, dict[str, Any]]:
    """(grid, steps of a piece, pieces, what the kernel is compiled for)."""
    blocks = triton.cdiv(dim, tile.channels)
    steps = max(tile.steps, triton.next_power_of_2(width - 1))
    span = triton.next_power_of_2(max(1, batch * rows * blocks // ENOUGH))
    span = max(min(span, tile.span), steps)
    pieces = triton.cdiv(rows, span)
    compiled = {
        "WIDTH": width, "TAPS": triton.next_power_of_2(width), "PAST": past, "SILU": silu, "BT": steps,
        "BD": tile.channels, "STAGES": tile.stages, "num_warps": tile.warps,
    }  # fmt: skip
    return (batch * pieces * blocks,), span, pieces, compiled


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, past: int, silu: bool, launch: Launch = _run) -> Tensor:
    """``plain.convolve`` on dim-contiguous memory."""
    batch, rows, dim = x.shape
    width = weight.shape[1]
    outputs = rows + past - (width - 1)
    out = x.new_empty(batch, outputs, dim)
    if out.numel():
        grid, span, pieces, compiled = _cut(TILES["forward"], batch, outputs, dim, width, past, silu)
        x = _dense(x)
        launch(
            kernels.convolution_kernel, grid, x, weight.contiguous(), _dense(bias), out, rows, outputs, dim, span,
            pieces, x.stride(0), x.stride(1), **compiled,
        )  # fmt: skip
    return out


def convolve_backward(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, past: int, silu: bool, launch: Launch = _run
) -> tuple[Tensor, Tensor]:
    """(dx, sums (width + 1, dim) float32): the gradient of each tap, and last that of the bias."""
    batch, rows, dim = x.shape
    width = weight.shape[1]
    outputs = rows + past - (width - 1)
    grid, span, pieces, compiled = _cut(TILES["backward"], batch, rows, dim, width, past, silu)
    dx = x.new_empty(batch, rows, dim)
    sums = x.new_empty(batch * pieces, width + 1, dim, dtype=torch.float32)
    if dx.numel():
        x, dout = _dense(x), _dense(dout)
        launch(
            kernels.convolution_backward_kernel, grid, x, weight.contiguous(), _dense(bias), dout, dx, sums,
            rows, outputs, dim, span, pieces, x.stride(0), x.stride(1), dout.stride(0), dout.stride(1),
            SUMS=triton.next_power_of_2(width + 1), **compiled,
        )  # fmt: skip
    return dx, sums.sum(0)


def update(
    state: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, softplus: bool, launch: Launch = _run,
) -> Tensor:  # fmt: skip
    """``plain.update``."""
    batch, dim, states = state.shape
    out = u.new_empty(batch, dim)
    if state.numel():
        u, delta, A, B, C, D, z, delta_bias = (_dense(t) for t in (u, delta, A, B, C, D, z, delta_bias))
        BN = triton.next_power_of_2(states)
        BD = max(1, UPDATE.states // BN)
        launch(
            kernels.update_kernel, (batch * triton.cdiv(dim, BD),), state, u, delta, A, B, C, D, z, delta_bias, out,
            dim, states, *state.stride(), u.stride(0), delta.stride(0), A.stride(0), B.stride(0), C.stride(0),
            None if z is None else z.stride(0), SOFTPLUS=softplus, BN=BN, BD=BD, num_warps=UPDATE.warps,
        )  # fmt: skip
    return out
