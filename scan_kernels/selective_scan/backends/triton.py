"""Triton backend: the selective scan on any GPU that Triton compiles for; on a CPU only in Triton's interpreter."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ...profiling.device import Device
from ..problem import Cotangents, Gradients, Inputs, Kept, Outputs, Problem
from . import triton_kernels as kernels

RANK = 1
SIZED = ("splits",)
INTERPRETED = not isinstance(kernels.forward_kernel, triton.JITFunction)


@dataclasses.dataclass(frozen=True)
class Config:
    """How the kernels cut the work. Dimensions of tiles are powers of two."""

    block_dim: int  # channels of a program's tile
    block_time: int  # time steps of a tile; never more than the checkpoint interval
    num_warps: int  # warps of a program
    splits: int = 1  # pieces of a row's time, run side by side after a pass for the states between them
    part: int = 4  # steps of B and C that a thread holds at once; divides block_time
    stages: int = 1  # tiles whose loads are under way at once; 1: they are not


def supports(problem: Problem) -> str | None:
    """None, or why Triton cannot run the problem here."""
    if problem.device == "cpu" and not INTERPRETED:
        return "needs a CUDA device (on a CPU only in Triton's interpreter: TRITON_INTERPRET=1)"
    if problem.device not in ("cpu", "cuda"):
        return f"needs a CUDA device, not {problem.device!r}"
    return "does not keep y for the backward" if problem.keep_y else None


class _Tile(NamedTuple):
    """A tile before the problem's sizes are known."""

    states: int  # that a thread holds of a step
    steps: int
    fewest: int  # channels, where a group has them and 8 warps can hold them
    part: int
    stages: int


# Best guess first. The forward wants all states of a channel in one thread, so that nothing is summed over lanes. The
# backward holds the states of all steps of a tile; the more channels a program has, the fewer sums for dB and dC leave
# it, and the more warps wait for each other.
_TILES = {
    "forward": [
        _Tile(16, 16, 8, 2, 3),
        _Tile(8, 16, 8, 4, 2),
        _Tile(16, 16, 8, 2, 2),
        _Tile(16, 16, 8, 4, 2),
        _Tile(16, 8, 8, 2, 1),
        _Tile(16, 16, 8, 2, 1),
    ],
    "backward": [
        _Tile(4, 16, 16, 4, 3),
        _Tile(4, 16, 16, 8, 3),
        _Tile(4, 16, 16, 4, 2),
        _Tile(4, 16, 8, 8, 2),
        _Tile(4, 16, 32, 8, 2),
        _Tile(4, 16, 16, 8, 1),
        _Tile(4, 8, 8, 8, 2),
    ],
    # a checkpoint interval holds several tiles: each turn takes all but the first a second time
    "backward, long intervals": [
        _Tile(8, 8, 8, 8, 1),
        _Tile(4, 16, 8, 8, 1),
        _Tile(8, 8, 16, 8, 1),
        _Tile(4, 8, 8, 8, 1),
    ],
}
# Warps that fit a multiprocessor; cost of the pass before that cutting time needs, as a share of the other's.
_RESIDENT = {"forward": 12, "backward": 8}
_FIRST_PASS = {"forward": 0.8, "backward": 0.25}


def configs(problem: Problem, device: Device) -> list[Config]:
    """Candidates, the first a good default."""
    channels = triton.next_power_of_2(problem.dim // problem.groups)
    if device.kind == "cpu":
        small = Config(min(32, channels), 16, 1)
        return [small, dataclasses.replace(small, block_time=4, part=2), dataclasses.replace(small, splits=3)]
    long = problem.direction == "backward" and problem.checkpoint > 16
    tiles = _TILES["backward, long intervals" if long else problem.direction]
    if problem.direction == "backward" and problem.layout == "dim":
        tiles = sorted(tiles, key=lambda tile: -tile.part)  # on an H200 0.93 times as long by parts of 8 as of 4
    if problem.direction == "backward" and problem.deterministic:
        tiles = sorted(tiles, key=lambda tile: -tile.fewest)  # each block of channels keeps its own part of dB and dC
    found = [_config(problem, device, tile, channels) for tile in tiles]
    pieces = [s for s in (1, 2, 4, 8, 16, 32, 64) if s <= _most_pieces(problem)]
    found += [dataclasses.replace(found[0], splits=s) for s in pieces]
    return list(dict.fromkeys(found))[:16]


def _config(problem: Problem, device: Device, tile: _Tile, channels: int) -> Config:
    """The tile in whole warps."""
    BN = triton.next_power_of_2(problem.state)
    a_warp = 32 * tile.states  # states that it holds of a step
    BD = min(max(a_warp // BN, min(tile.fewest, 8 * a_warp // BN)), 512 // tile.steps, channels)
    warps = min(8, max(1, BN * BD // a_warp))
    programs = problem.rows * problem.groups * triton.cdiv(problem.dim // problem.groups, BD)
    return Config(BD, tile.steps, warps, _splits(problem, device, programs, warps), tile.part, tile.stages)


def _most_pieces(problem: Problem) -> int:
    """At least 256 steps a piece; packed rows are not cut."""
    return 1 if problem.sequences else min(64, max(1, problem.length // 256))


def _splits(problem: Problem, device: Device, programs: int, warps: int) -> int:
    """The fewest pieces of time that finish within 3 % of the soonest. A multiprocessor takes w + 4 units of time for
    w warps: one a scheduler keep it half busy, three a scheduler three quarters; fewer than four are done no sooner."""
    resident, first_pass = _RESIDENT[problem.direction], _FIRST_PASS[problem.direction]

    def time(pieces: int) -> float:
        turns, rest = divmod(triton.cdiv(programs * pieces, device.units) * warps, resident)
        once = turns * (resident + 4) + (max(rest, 4) + 4 if rest else 0)
        return once / pieces * (1 + first_pass * (1 - 1 / pieces))

    times = {pieces: time(pieces) for pieces in range(1, _most_pieces(problem) + 1)}
    return next(pieces for pieces, t in times.items() if t <= 1.03 * min(times.values()))


def _tiling(problem: Problem, config: Config) -> dict[str, int | bool]:
    """What every kernel is specialised by."""
    K = problem.checkpoint
    BT = min(config.block_time, triton.next_power_of_2(K or problem.length))
    BN = triton.next_power_of_2(problem.state)
    return {
        "BT": BT,
        "BN": BN,
        "BD": config.block_dim,
        "K": K,
        "TILES": triton.cdiv(K, BT) if K else 1,
        "TIME_CONTIGUOUS": problem.layout == "length",
        "PACKED": problem.sequences > 0,
        "SOFTPLUS": problem.softplus,
        "PART": min(config.part, BT),
        "LANES": min(BN, max(1, 32 * config.num_warps // config.block_dim)),
        "STAGES": config.stages,
        "num_warps": config.num_warps,
    }


def _pieces(problem: Problem, config: Config) -> tuple[int, int]:
    """(pieces, steps of a piece): whole checkpoint intervals, so that a kept state always enters a tile."""
    if problem.sequences:
        return 1, problem.length
    unit = math.lcm(problem.checkpoint or 1, 16)  # 16: a piece's vectors are aligned if its row's are
    span = triton.cdiv(triton.cdiv(problem.length, config.splits), unit) * unit
    return triton.cdiv(problem.length, span), span


def _strides(problem: Problem, *tensors: Tensor | None) -> list[int | None]:
    """Of each tensor like u: the strides of its batch axis and of the axis that has not stride 1."""
    line = 1 if problem.layout == "length" else 2
    return [s for t in tensors for s in ((None, None) if t is None else (t.stride(0), t.stride(line)))]


def _projection(M: Tensor) -> list[int | None]:
    """Strides of B or C; None where it is constant."""
    return [None] * 4 if M.ndim == 2 else list(M.stride())


def _run(kernel: Any, grid: tuple[int], *arguments: Any, **options: Any) -> None:
    kernel[grid](*arguments, **options)


def _compile(kernel: Any, grid: tuple[int], *arguments: Any, **options: Any) -> None:
    """What the launch needs, which Triton keeps on disk, but no launch."""
    if not INTERPRETED:
        kernel.warmup(*arguments, grid=grid, **options)


def prepare_forward(
    problem: Problem, inputs: Inputs, outputs: Outputs, config: Config
) -> Callable[[Inputs, Outputs], None]:
    """``forward`` for all tensors of this signature, its kernels compiled."""
    forward(problem, inputs, outputs, config, _compile)
    return lambda inputs, outputs: forward(problem, inputs, outputs, config)


def prepare_backward(
    problem: Problem, inputs: Inputs, kept: Kept, cotangents: Cotangents, gradients: Gradients, config: Config
) -> Callable[[Inputs, Kept, Cotangents, Gradients], None]:
    """``backward`` for all tensors of this signature, its kernels compiled."""
    backward(problem, inputs, kept, cotangents, gradients, config, _compile)
    return lambda inputs, kept, cotangents, gradients: backward(problem, inputs, kept, cotangents, gradients, config)


def forward(
    problem: Problem, inputs: Inputs, outputs: Outputs, config: Config, launch: Callable[..., None] = _run
) -> None:
    """Run the scan, or with ``launch=_compile`` have its kernels compiled."""
    u, delta, A, B, C, D, z, bias, initial, cu = inputs
    tiling = _tiling(problem, config)
    pieces, span = _pieces(problem, config)
    blocks = triton.cdiv(problem.dim // problem.groups, config.block_dim)
    sizes = (problem.dim, problem.state, problem.length, problem.groups, blocks, pieces, span)
    strides = (*_strides(problem, u, delta, z, outputs.out), *_projection(B), *_projection(C))
    entering, steps = _carries(A, problem.rows, pieces) if pieces > 1 else (None, None)

    def scan(only_state: bool, states: Tensor | None) -> None:
        grid = (problem.rows * (pieces - only_state) * problem.groups * blocks,)
        launch(
            kernels.forward_kernel, grid,
            u, delta, A, B, C, D, z, bias, initial, cu, outputs.out, outputs.last_state, states, entering, steps,
            *sizes, *strides, **tiling, SPLIT=pieces > 1 and not only_state, ONLY_STATE=only_state,
        )  # fmt: skip

    if pieces > 1:
        scan(True, None)
        _combine(launch, problem, A, initial, entering, steps, pieces, reverse=False)
    scan(False, outputs.states)


def backward(
    problem: Problem, inputs: Inputs, kept: Kept, cotangents: Cotangents, gradients: Gradients, config: Config,
    launch: Callable[..., None] = _run,
) -> None:  # fmt: skip
    """Fill the gradients, or with ``launch=_compile`` have the kernels compiled that do."""
    u, delta, A, B, C, D, z, bias, _, cu = inputs
    dout, dlast = cotangents
    tiling = _tiling(problem, config)
    pieces, span = _pieces(problem, config)
    blocks = triton.cdiv(problem.dim // problem.groups, config.block_dim)
    grid = (problem.rows * pieces * problem.groups * blocks,)
    sizes = (problem.dim, problem.state, problem.length, problem.groups, blocks, pieces, span)
    if tiling["TILES"] > 1:
        tiling["STAGES"] = 1  # a load under way early would miss the state that is kept in between
    entering = None
    if pieces > 1:
        entering, steps = _carries(A, problem.rows, pieces)
        launch(
            kernels.adjoint_kernel, (problem.rows * (pieces - 1) * problem.groups * blocks,),
            delta, A, C, z, bias, dout, entering, steps, *sizes,
            *_strides(problem, delta, z, dout), *_projection(C),
            **{k: v for k, v in tiling.items() if k not in ("K", "TILES", "PACKED", "LANES")},
        )  # fmt: skip
        _combine(launch, problem, A, dlast, entering, steps, pieces, reverse=True)

    within = A.new_empty(problem.rows, pieces, tiling["TILES"], *A.shape) if tiling["TILES"] > 1 else None
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
    launch(
        kernels.backward_kernel, grid,
        u, delta, A, B, C, D, z, bias, cu, kept.states, within, dout, dlast, entering,
        gradients.du, gradients.ddelta, targets["dA"], targets["dB"], targets["dC"], targets["dD"], gradients.dz,
        targets["ddelta_bias"], gradients.dinitial_state,
        *sizes, *_strides(problem, u, delta, z, dout, gradients.du, gradients.ddelta, gradients.dz),
        *_projection(B), *_projection(C),
        problem.batch * problem.groups * problem.state * problem.length if problem.deterministic else 0,
        problem.dim if problem.deterministic else 0,
        **tiling,
        ATOMIC_BLOCKS=atomic and blocks > 1, ATOMIC_ROWS=atomic and problem.rows * pieces > 1,
    )  # fmt: skip
    for name, part in parts.items():
        torch.sum(part, 0, out=getattr(gradients, name))


def _carries(A: Tensor, rows: int, pieces: int) -> tuple[Tensor, Tensor]:
    """Scratch: the state that enters each piece, and the sum of its step sizes."""
    dim, state = A.shape
    return A.new_empty(rows, pieces, dim, state), A.new_empty(rows, pieces, dim)


def _combine(launch: Callable[..., None], problem: Problem, A, edge, carry, steps, pieces: int, reverse: bool) -> None:
    BN = triton.next_power_of_2(problem.state)
    BD = max(1, 512 // BN)
    launch(
        kernels.combine_kernel, (problem.rows * triton.cdiv(problem.dim, BD),), A, edge, carry, steps, problem.dim,
        problem.state, pieces, BN=BN, BD=BD, REVERSE=reverse, num_warps=4,
    )  # fmt: skip
