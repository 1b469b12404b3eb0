"""Triton backend: the selective scan on any GPU that Triton compiles for; on a CPU only in Triton's interpreter."""

from __future__ import annotations

import dataclasses

import torch
import triton
from torch import Tensor

from ...profiling.device import Device
from ..problem import Cotangents, Gradients, Inputs, Outputs, Problem
from . import triton_kernels as kernels

RANK = 1
INTERPRETED = not isinstance(kernels.forward_kernel, triton.JITFunction)


@dataclasses.dataclass(frozen=True)
class Config:
    """How the kernels cut the work. Dimensions of tiles are powers of two."""

    block_dim: int  # channels of a program's tile
    block_time: int  # time steps of a tile; never more than the checkpoint interval
    num_warps: int  # warps of a program
    splits: int  # pieces that a row's time is cut into, run side by side after a pass for their states; 1: none


def supports(problem: Problem) -> str | None:
    """None, or why Triton cannot run the problem here."""
    if problem.device == "cpu" and not INTERPRETED:
        return "needs a CUDA device (on a CPU only in Triton's interpreter: TRITON_INTERPRET=1)"
    if problem.device not in ("cpu", "cuda"):
        return f"needs a CUDA device, not {problem.device!r}"
    return None


# (tile elements a thread holds, time steps, fewest channels), best guess first. The backward holds seven tiles at
# once, the forward three, so it takes smaller ones; its sums over channels want many of them in a program.
_TILES = {
    "forward": [(64, 8, 16), (64, 16, 8), (128, 16, 16), (32, 16, 8), (64, 16, 16), (32, 16, 4), (32, 8, 8)],
    "backward": [(32, 8, 8), (32, 8, 16), (32, 8, 32), (32, 16, 4), (16, 16, 8), (16, 8, 8), (16, 8, 16)],
}


def configs(problem: Problem, device: Device) -> list[Config]:
    """Candidates, the first a good default."""
    channels = triton.next_power_of_2(problem.dim // problem.groups)
    if device.kind == "cpu":
        small = Config(min(32, channels), 16, 1, 1)
        return [small, dataclasses.replace(small, block_time=4), dataclasses.replace(small, splits=3)]
    tiles = _TILES[problem.direction]
    if problem.direction == "backward" and problem.deterministic:
        tiles = sorted(tiles, key=lambda tile: -tile[2])  # each block of channels keeps its own part of dB and dC
    found = [_config(problem, device, *tile, channels) for tile in tiles]
    pieces = [s for s in (1, 2, 4, 8, 16, 32) if problem.length >= 256 * s and not problem.sequences]
    found += [dataclasses.replace(c, splits=s) for c in found[:2] for s in pieces]
    return list(dict.fromkeys(found))[:16]


def _config(problem: Problem, device: Device, per_thread: int, BT: int, BD: int, channels: int) -> Config:
    """A tile of at least BD channels that fills whole warps, with time inside a thread."""
    BN = triton.next_power_of_2(problem.state)
    BD = min(max(BD, 32 * per_thread // (BT * BN)), 64)
    while BD > 1 and 8 * 32 * per_thread < BT * BN * BD:
        BD //= 2
    BD = min(BD, channels)
    warps = min(8, max(1, BT * BN * BD // (32 * per_thread)))
    blocks = triton.cdiv(problem.dim // problem.groups, BD)
    running = problem.rows * problem.groups * blocks * warps
    return Config(BD, BT, warps, _splits(problem, device, running))


def _splits(problem: Problem, device: Device, warps: int) -> int:
    """Pieces of time that bring the GPU to about 8 warps a multiprocessor, each at least 256 steps; packed rows: 1."""
    if problem.sequences or warps * 4 > 8 * device.units:
        return 1  # cutting costs a second pass: measured on an H100, it pays from four times the warps on
    return triton.next_power_of_2(max(1, min(8 * device.units // warps, problem.length // 256)))


def _tiling(problem: Problem, config: Config) -> dict[str, int | bool]:
    """What every kernel is specialised by."""
    K = problem.checkpoint
    BT = min(config.block_time, triton.next_power_of_2(K or problem.length))
    return {
        "BT": BT,
        "BN": triton.next_power_of_2(problem.state),
        "BD": config.block_dim,
        "K": K,
        "TILES": triton.cdiv(K, BT) if K else 1,
        "TIME_CONTIGUOUS": problem.layout == "length",
        "PACKED": problem.sequences > 0,
        "SOFTPLUS": problem.softplus,
        "num_warps": config.num_warps,
    }


def _pieces(problem: Problem, config: Config) -> tuple[int, int]:
    """(pieces, steps of a piece): whole checkpoint intervals, so that a kept state always enters a tile."""
    if problem.sequences:
        return 1, problem.length
    unit = problem.checkpoint or 1
    span = triton.cdiv(triton.cdiv(problem.length, config.splits), unit) * unit
    return triton.cdiv(problem.length, span), span


def _strides(problem: Problem, *tensors: Tensor | None) -> list[int | None]:
    """Of each tensor like u: the strides of its batch axis and of the axis that has not stride 1."""
    line = 1 if problem.layout == "length" else 2
    return [s for t in tensors for s in ((None, None) if t is None else (t.stride(0), t.stride(line)))]


def _projection(M: Tensor) -> list[int | None]:
    """Strides of B or C; None where it is constant."""
    return [None] * 4 if M.ndim == 2 else list(M.stride())


def forward(problem: Problem, inputs: Inputs, outputs: Outputs, config: Config) -> None:
    u, delta, A, B, C, D, z, bias, initial, cu = inputs
    tiling = _tiling(problem, config)
    pieces, span = _pieces(problem, config)
    blocks = triton.cdiv(problem.dim // problem.groups, config.block_dim)
    grid = (problem.rows * pieces * problem.groups * blocks,)
    sizes = (problem.dim, problem.state, problem.length, problem.groups, blocks, pieces, span)
    strides = (*_strides(problem, u, delta, z, outputs.out), *_projection(B), *_projection(C))
    entering, steps = _carries(A, problem.rows, pieces) if pieces > 1 else (None, None)

    def launch(only_state: bool, states: Tensor | None) -> None:
        kernels.forward_kernel[grid](
            u, delta, A, B, C, D, z, bias, initial, cu, outputs.out, outputs.last_state, states, entering, steps,
            *sizes, *strides, **tiling, SPLIT=pieces > 1 and not only_state, ONLY_STATE=only_state,
        )  # fmt: skip

    if pieces > 1:
        launch(True, None)
        _combine(problem, A, initial, entering, steps, pieces, reverse=False)
    launch(False, outputs.states)


def backward(
    problem: Problem, inputs: Inputs, states: Tensor, cotangents: Cotangents, gradients: Gradients, config: Config
) -> None:
    u, delta, A, B, C, D, z, bias, _, cu = inputs
    dout, dlast = cotangents
    tiling = _tiling(problem, config)
    pieces, span = _pieces(problem, config)
    blocks = triton.cdiv(problem.dim // problem.groups, config.block_dim)
    grid = (problem.rows * pieces * problem.groups * blocks,)
    sizes = (problem.dim, problem.state, problem.length, problem.groups, blocks, pieces, span)
    entering = None
    if pieces > 1:
        entering, steps = _carries(A, problem.rows, pieces)
        kernels.adjoint_kernel[grid](
            delta, A, C, z, bias, dout, entering, steps, *sizes,
            *_strides(problem, delta, z, dout), *_projection(C),
            **{k: v for k, v in tiling.items() if k not in ("K", "TILES", "PACKED")},
        )  # fmt: skip
        _combine(problem, A, dlast, entering, steps, pieces, reverse=True)

    kept = A.new_empty(problem.rows, pieces, tiling["TILES"], *A.shape) if tiling["TILES"] > 1 else None
    # sums over several programs: atomic additions, or, where order matters, parts that torch adds up
    shared = {"dB": problem.constant_B, "dC": problem.constant_C, "dA": True, "dD": True, "ddelta_bias": True}
    targets, parts = {}, {}
    for name, by_row in shared.items():
        gradient = getattr(gradients, name)
        count = problem.rows * pieces if by_row else blocks
        if gradient is not None and count > 1 and problem.deterministic:
            # offsets of packed sequences need not cover all steps
            parts[name] = gradient.new_zeros((count, *gradient.shape))
        elif gradient is not None and count > 1:
            gradient.zero_()
        targets[name] = parts.get(name, gradient)
    atomic = not problem.deterministic
    kernels.backward_kernel[grid](
        u, delta, A, B, C, D, z, bias, cu, states, kept, dout, dlast, entering,
        gradients.du, gradients.ddelta, targets["dA"], targets["dB"], targets["dC"], targets["dD"], gradients.dz,
        targets["ddelta_bias"], gradients.dinitial_state,
        *sizes, *_strides(problem, u, delta, z, dout, gradients.du, gradients.ddelta, gradients.dz),
        *_projection(B), *_projection(C),
        problem.batch * problem.groups * problem.state * problem.length if problem.deterministic else 0,
        problem.dim if problem.deterministic else 0,
        **tiling, HALVINGS=config.block_dim.bit_length() - 1,
        ATOMIC_BLOCKS=atomic and blocks > 1, ATOMIC_ROWS=atomic and problem.rows * pieces > 1,
    )  # fmt: skip
    for name, part in parts.items():
        torch.sum(part, 0, out=getattr(gradients, name))


def _carries(A: Tensor, rows: int, pieces: int) -> tuple[Tensor, Tensor]:
    """Scratch: the state that enters each piece, and the sum of its step sizes."""
    dim, state = A.shape
    return A.new_empty(rows, pieces, dim, state), A.new_empty(rows, pieces, dim)


def _combine(problem: Problem, A, edge, carry, steps, pieces: int, reverse: bool) -> None:
    BN = triton.next_power_of_2(problem.state)
    BD = max(1, 512 // BN)
    kernels.combine_kernel[(problem.rows * triton.cdiv(problem.dim, BD),)](
        A, edge, carry, steps, problem.dim, problem.state, pieces, BN=BN, BD=BD, REVERSE=reverse, num_warps=4
    )
