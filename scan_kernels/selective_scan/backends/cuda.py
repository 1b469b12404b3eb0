"""Raw CUDA through CuPy: kernels in cuda_forward.cu and cuda_backward.cu, specialised by defines.

This file chooses the variant, fills its parameters and launches; what a kernel does is said at the top of its file.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...cuda_module import Kernel, Launch
from ..problem import ITEMSIZE, Cotangents, Gradients, Inputs, Kept, Outputs, Problem

RANK = 0
SIZED = "splits", "finer", "groups"
FOLDER = Path(__file__).parent
FORWARD = FOLDER / "cuda_common.cuh", FOLDER / "cuda_forward.cu"
BACKWARD = FOLDER / "cuda_common.cuh", FOLDER / "cuda_backward.cu"
SCAN, LEAVE, ADJOINT, EXPAND = 0, 1, 2, 3  # MODE of cuda_forward.cu
MOST_GROUPS = 64  # groups of channels of a block, backward
MOST_SPLITS = 128  # forward: parts of a row's time
SCRATCH = 512 << 20  # bytes that the states which enter the tiles of a backward may take; more are made in parts


@dataclasses.dataclass(frozen=True)
class Config:
    """Tunables of one direction.

    Between forward and backward, 4 state/checkpoint bytes of float32 states are kept for each element of u beyond the
    inputs (4 at 16 states and the default checkpoint of 16; 2 at 32, 1 at 64), and with ``keep_y`` the size of an
    element of u (2, or 4 for float32). More kept is less computed again; the backward takes what the forward kept.
    Where that is fewer states than it has tiles, it makes the others first, in memory that it gives back: 4 state/tile
    bytes for each element of u, done in parts of ``SCRATCH`` bytes (a part is at least a row's steps from one kept
    state to the next, and packed sequences are a single part).
    """

    lanes: int  # lanes of a warp that share a channel, each with state/lanes states; a power of two up to 32
    warps: int  # warps of a block
    tile: int  # time steps of a tile; 4 to 64, a power of two
    blocks: int = 1  # blocks that must fit on a multiprocessor: bounds the registers
    splits: int = 1  # parts of a row's time that run in parallel
    finer: int = 1  # backward: as many times the parts for the pass that finds the adjoints between them
    groups: int = 1  # relay: groups of channels of a block
    relay: int = 0  # 1: warps share a group of channels and take turns in time, as they always do in the backward
    checkpoint: int = 0  # forward: steps between kept states, a multiple of 16; 0: the op's default
    keep_y: bool = False  # forward: keep what z gates, too, which the backward else computes anew
    polynomial: int = 0  # forward, 16-bit data: of 32 exponentials, how many are polynomials instead

    def __post_init__(self) -> None:
        if self.lanes not in (1, 2, 4, 8, 16, 32) or self.tile not in (4, 8, 16, 32, 64):
            raise ValueError(f"config: expected lanes 1..32 and tile 4..64, powers of two, got {self}")
        if not 1 <= self.warps <= 32 or min(self.blocks, self.splits, self.finer, self.groups) < 1:
            raise ValueError(f"config: expected warps 1..32 and positive blocks, splits, finer, groups, got {self}")
        if self.checkpoint % 16:
            raise ValueError(f"config: checkpoint: expected a multiple of 16, got {self.checkpoint}")
        if self.relay not in (0, 1) or (self.groups > 1 and not self.relay):
            raise ValueError(f"config: expected relay 0 or 1, and groups 1 unless it is 1, got {self}")
        if not 0 <= self.polynomial <= 32:
            raise ValueError(f"config: expected polynomial 0..32, got {self}")

    @property
    def threads(self) -> int:
        return self.warps * 32

    @property
    def per_warp(self) -> int:
        """Channels that a warp holds at a time."""
        return 32 // self.lanes

    @property
    def own(self) -> int:
        """Elements of a warp's tile that a lane loads and stores."""
        return max(1, self.per_warp * self.tile // 32)

    @property
    def steps(self) -> int:
        """Backward: steps of a tile that a lane owns of its channel's."""
        return max(1, self.tile // self.lanes)

    @property
    def channels(self) -> int:
        """Channels of a block."""
        return (1 if self.relay else self.warps) * self.per_warp * self.groups


def supports(problem: Problem) -> str | None:
    """None if this backend can run the problem, else why not."""
    if problem.device != "cuda":
        return "needs a CUDA device"
    if importlib.util.find_spec("cupy") is None:
        return "CuPy is not installed: pip install 'scan-kernels[cuda13]' (or cuda12)"
    if not torch.version.cuda:
        return "this torch is not built for CUDA"
    if _capability() < (8, 0):
        return "needs compute capability 8.0 or newer"
    if problem.length >= 2**31 - 64:
        return "length must be below 2^31"
    if problem.dim * problem.state >= 2**28:
        return "dim * state must be below 2^28"
    if problem.checkpoint % 16:
        return f"keeps states every multiple of 16 steps, not every {problem.checkpoint}"
    return None


@functools.cache
def _capability() -> tuple[int, int]:
    return torch.cuda.get_device_capability()


# ---- configurations -------------------------------------------------------------------------------------------------


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def _busy(blocks: int, resident: int) -> float:
    """Share of the places for ``resident`` blocks that are taken until the last of ``blocks`` ends."""
    return blocks / (_ceil(blocks, resident) * resident)


def shared_bytes(problem: Problem, config: Config, mode: int = SCAN) -> int:
    """Shared memory of a block: mirrors the carving at the top of each kernel."""
    per = _ceil(problem.state, config.lanes)
    projection = config.tile * 4 * (_ceil(per * config.lanes, 4) + 1)
    tile = config.per_warp * (config.tile + 4)
    if problem.layout == "dim":
        tile += (config.per_warp // 8 - (config.per_warp >= 8)) * _skew(problem, config)
    raw = 32 * _ceil(config.own * ITEMSIZE[problem.dtype], 4)
    if problem.direction == "forward" or mode != SCAN:
        tiles = (mode != ADJOINT and not problem.constant_B) + (mode in (SCAN, ADJOINT) and not problem.constant_C)
        warp = 2 * tile + (3 + problem.has_z) * raw + 32 * per * (mode == EXPAND)
        if config.relay:
            warp += tiles * projection + 32 * per + 2 * 32 * 6
            return 4 * (config.warps * warp + config.groups * 32 * per)
        return 4 * (2 * tiles * projection + config.warps * warp)
    item, rows, batch = ITEMSIZE[problem.dtype], config.per_warp * config.tile, _batch(problem, config)
    pitch, skew = 4 if config.tile == 4 else config.tile + 4, config.tile if per > 2 else 0
    projection = 4 * per * (config.lanes * pitch + skew)
    copied = 128 * item * _ceil(per * config.lanes * config.tile // 4, 32)
    dim, parts = problem.layout == "dim", 3 + problem.has_z
    lines, line = (config.tile, batch * config.per_warp) if dim else (config.per_warp, config.tile)
    apart = lines // (2 * config.steps) * 16 if dim else 0
    part = _ceil(lines * max(line * item, (line // 2 + 1) * 4 if item == 2 else 0) + apart, 16) * 16
    slot = (0 if dim else parts * part) + config.per_warp * per * config.lanes * 4
    batches = 3 * parts * part + (parts - 1) * (lines * line * item + apart) + 256 * parts if dim else 48
    varying = 2 - problem.constant_B - problem.constant_C

    def room(needed: int | bool, floats: int) -> int:  # an array of as many floats, or of one
        return _ceil(floats if needed else 1, 4) * 16

    group = 128 * (3 * per + 2) + room(True, 2 * config.per_warp)
    group += (2 - varying) * 256 * per + varying * 16
    warp = 2 * (5 + problem.has_z) * rows * 4 + 4 * slot + batches + 512
    warp += varying * (projection + copied) + (2 - varying) * 32
    warp += room(problem.keep_y, 32 * _ceil(config.steps * item, 4))
    return 144 + _ceil(8 * config.groups * config.warps, 16) * 16 + config.groups * group + config.warps * warp


def _own_channels(problem: Problem, config: Config) -> int:
    """Forward: channels that a lane loads and stores of its warp's."""
    item = ITEMSIZE[problem.dtype]
    if problem.layout == "length":
        return 2 if config.per_warp == 32 and config.own * item > 16 else 1
    return min(16 // item, config.per_warp, config.own)


def _skew(problem: Problem, config: Config) -> int:
    """Forward: floats by which every further eight channels of a tile are shifted."""
    return 512 // (config.per_warp * ITEMSIZE[problem.dtype]) if config.per_warp > 8 else 0


def _batch(problem: Problem, config: Config) -> int:
    """Groups of channels of the backward that share lines of channel-contiguous memory."""
    if problem.layout == "length":
        return 1
    return max(2, 32 // (config.per_warp * ITEMSIZE[problem.dtype]))


def valid(problem: Problem, device: Any, config: Config) -> bool:
    per = _ceil(problem.state, config.lanes)
    if problem.direction == "forward":
        if config.tile % 16 or per > 16 or config.own // _own_channels(problem, config) > config.tile:
            return False
        if config.relay:
            shares = config.warps % config.groups == 0 and config.warps >= 2 * config.groups
            if config.tile != 16 or per > 4 or config.warps > 16 or not shares or config.splits > 1:
                return False
        elif _ceil(per * config.lanes, 4) * config.tile > 4 * config.threads:
            return False  # a thread would hold too many of B and C
    elif not config.relay or config.lanes < 4 or per * config.tile > 32 or config.tile > 16:
        return False
    return config.threads <= 1024 and shared_bytes(problem, config) <= device.shared_memory


def configs(problem: Problem, device: Any) -> list[Config]:
    """Valid candidates for this problem, the first a good default."""
    make = _forward_configs if problem.direction == "forward" else _backward_configs
    found = [c for c in dict.fromkeys(make(problem, device)) if valid(problem, device, c)]
    if not found:
        raise ValueError(f"no configuration of the cuda backend fits {problem} on {device.name}")
    return found


def _forward(problem: Problem, lanes: int, warps: int = 4, tile: int = 32, splits: int = 1) -> Config:
    """A forward configuration with as many blocks a multiprocessor as its registers allow without spilling."""
    per = _ceil(problem.state, lanes)
    many = per > 4 and (problem.state > 64 or problem.dtype == "float32") and warps < 8
    if lanes == 1 or (per > 8 and problem.dtype == "float32"):
        warps_held = 8
    else:
        warps_held = 12 if many and per <= 8 else 16 if per > 4 or problem.dtype == "float32" else 20
    return Config(lanes, warps, tile, blocks=max(1, warps_held // warps), splits=splits)


def _relays(problem: Problem, device: Any) -> list[tuple[float, Config]]:
    """Configurations whose warps take turns in time, for problems of too few channels to give each warp its own, best
    first, each with the share of the GPU that it fills."""
    least = max(4, _power_of_two(_ceil(problem.state, 4)))
    found = []
    for lanes, worth in ((least, 1.0), (2 * least, 0.7)):  # more lanes: more to sum
        groups = problem.rows * problem.groups * _ceil(problem.dim // problem.groups, 32 // lanes) if lanes <= 32 else 0
        held = _ceil(groups, device.units)  # groups of channels on a multiprocessor
        # as many warps as registers allow without spilling; a single group is faster with more registers a warp
        warps = 8 if problem.state > 16 else 16 if held > 1 else 12
        if 1 <= held <= warps // 2:
            blocks = 2 - held % 2
            config = Config(lanes, warps // held * held // blocks, 16, blocks, groups=held // blocks, relay=1)
            # of three groups, eight warps leave two without a turn
            found.append((worth * _busy(groups, device.units) * (warps // held * held / warps) ** 2, config))
    return sorted(found, key=lambda f: -f[0])


def _forward_configs(problem: Problem, device: Any) -> list[Config]:
    channels = problem.rows * problem.dim
    most = min(32, _power_of_two(problem.state))
    least = min(most, max(1, _power_of_two(_ceil(problem.state, 8))))
    fewest = 2 if 4 < problem.state <= 8 else least  # a lane alone with a channel takes the registers of two
    longest = max(1, int(_row_length(problem) // 256))
    # enough lanes to keep every scheduler busy: so many warps a multiprocessor, up to so many times the fewest lanes.
    # Many states give a lane so much to do at once that fewer warps suffice, and then sums over lanes cost more.
    busy = 5.5 if problem.state > 64 else 7.5 if problem.state > 16 or problem.layout == "dim" else 9.5
    wanted = busy * device.units * 32
    further = 4 if problem.state <= 32 else 2
    lanes = fewest
    while lanes < min(most, further * least) and channels * lanes < wanted:
        lanes *= 2
    relays = _relays(problem, device) if most >= 4 and lanes > least and longest > 1 else []
    relay_first = [config for share, config in relays if share >= 0.7 and problem.state <= 32]
    splits = 1
    # of many states, B and C of a step are much to stage: the more channels share them, the better
    sizes: tuple[int, ...] = (4, 8, 2) if problem.state <= 32 else (4, 8, 16) if problem.state <= 64 else (8, 16, 4)
    if problem.state > 128:
        sizes = (16, 8, 4)  # of which only 16 warps stage tiles of 32 steps

    def make(lanes: int, warps: int, splits: int = 1) -> Config:
        long = _forward(problem, lanes, warps, 32, splits)
        return long if most > 1 and valid(problem, device, long) else _forward(problem, lanes, warps, 16, splits)

    if channels * lanes < 0.8 * wanted and longest > 1:
        # too few channels even so: cut time, at the cost of a second, state-only pass
        lanes = fewest
        config = make(lanes, sizes[0])
        count = problem.rows * _block_count(problem, config)
        # parts follow one another where the states that enter them are found
        splits = min(longest, MOST_SPLITS, max(1, 2 * device.units * config.blocks // count))
        while lanes < most and channels * lanes * splits < 0.8 * wanted:
            lanes *= 2
    elif problem.state > 64:
        sizes = tuple(sorted(sizes, key=lambda w: _forward_time(problem, make(lanes, w), device.units)))
    elif problem.state > 32:
        wide = [x for x in (least, 2 * least) if _fills(problem, make(x, 16), device.units)]
        lanes, sizes = (wide[0], (16, 8, 4)) if wide else (lanes, sizes)
    first = make(lanes, sizes[0], splits)
    found = [first]
    if problem.state > 32 and problem.dtype != "float32" and splits == 1:
        # twice the states a lane: half of what is loaded of B and C, and fewer sums, but coarser blocks
        broad = [make(least // 2, warps) for warps in ((4,) if problem.state <= 64 else (16, 12))]
        found = sorted([first, *broad], key=lambda config: _forward_time(problem, config, device.units))
    fifth = dataclasses.replace(first, blocks=5)
    slim = problem.state == 16 and problem.dtype != "float32" and problem.layout == "length" and first.blocks == 4
    if slim and 5 * (shared_bytes(problem, fifth) + 1024) <= device.shared_memory + 1024:
        # a fifth block fits, in fewer registers: of use where it makes the waves fuller
        count = problem.rows * _block_count(problem, first) * splits
        better = _busy(count, 5 * device.units) > 0.78 * _busy(count, 4 * device.units)
        found = [fifth, first] if better else [first, fifth]
    for other in dict.fromkeys((lanes, lanes * 2, max(1, lanes // 2), least, most)):
        if not least <= other <= most:
            continue
        for cut in dict.fromkeys((splits, min(longest, 2 * splits), _ceil(splits, 2), 1)):
            found += [make(other, warps, cut) for warps in sizes]
    few = (4, 2, 1) if problem.state <= 32 else sizes
    found += [_forward(problem, x, warps, 16) for x in dict.fromkeys((lanes, most, least)) for warps in few]
    return [*relay_first, *found, *(config for _, config in relays)]


def _fills(problem: Problem, config: Config, units: int) -> bool:
    """Whether blocks leave few multiprocessors without work, at the start and in the end."""
    count = problem.rows * _block_count(problem, config)
    return count >= 0.7 * units and _busy(count, units * config.blocks) >= 0.7


def _forward_time(problem: Problem, config: Config, units: int) -> float:
    """An estimate of a forward's time, in no unit; fitted to 64, 128 and 256 states on an H200."""
    each = _ceil(problem.rows * _block_count(problem, config), units)  # blocks of a multiprocessor, some at a time
    full, rest = divmod(each, config.blocks)

    broad = _ceil(problem.state, config.lanes) > 8
    # with as many states, what a lane's twofold work leaves of the time
    worth = (0.93 if problem.state <= 64 else 0.9 if problem.state <= 128 else 0.68) if broad else 1.0

    def taken(blocks: int) -> float:  # 16 warps keep it busy
        if not blocks:
            return 0.0
        return blocks * config.channels / min(1.0, blocks * config.warps / 16) ** (0.3 if broad else 0.6)

    return (full * taken(config.blocks) + taken(rest)) * (1.2 if config.tile < 32 else 1.0) * worth


def _backward_configs(problem: Problem, device: Any) -> list[Config]:
    lanes = min(32, max(4, _power_of_two(_ceil(problem.state, 2))))
    tile = 32 // max(2, _power_of_two(_ceil(problem.state, lanes)))
    found: list[Cut] = []
    for warps, blocks in ((4, 2), (8, 1), (2, 4), (1, 8)):
        alike: list[Cut] = []
        # whole sectors where channels are contiguous
        unit = _batch(problem, Config(lanes, warps, tile, blocks, relay=1))
        most = _ceil(min(MOST_GROUPS, _ceil(problem.dim // problem.groups, 32 // lanes)), unit) * unit
        for groups in range(unit, most + 1, unit):
            config = Config(lanes, warps, tile, blocks, groups=groups, relay=1)
            fits = (device.shared_memory + 1024) // (shared_bytes(problem, config) + 1024)
            if groups > unit and fits < blocks:
                break
            alike += _backward_splits(problem, config, device.units, max(1, min(blocks, fits)))
        found += sorted(alike, key=lambda cut: cut.time)[:3]
    best = sorted(found, key=lambda cut: cut.time)
    return [dataclasses.replace(cut.config, splits=cut.splits, finer=cut.finer) for cut in best]


class Cut(NamedTuple):
    """A backward configuration, in how many parts its rows' time is done, and an estimate of what it takes."""

    time: float  # in units of what the work would take if nothing held it up
    splits: int
    finer: int
    config: Config  # but for these


def _backward_splits(problem: Problem, config: Config, units: int, fits: int) -> list[Cut]:
    """Time in one part and in as many as fill the places for blocks, ``fits`` on each of ``units`` multiprocessors,
    once or twice."""
    work, resident = problem.rows * _block_count(problem, config), units * fits
    longest = max(1, int(_row_length(problem) // max(64, problem.checkpoint)))
    found = []
    for splits in dict.fromkeys((1, *(max(1, min(longest, waves * resident // work)) for waves in (1, 2)))):
        entering, finer = _entering_time(problem, config.tile, splits, units)
        found.append(Cut(_backward_time(problem, config, splits, units, fits) + entering, splits, finer, config))
    return found


def _row_length(problem: Problem) -> float:
    """Steps of a row, at least 1; of packed ones, on the average."""
    return max(1.0, problem.length / problem.rows if problem.sequences else problem.length)


def _backward_time(problem: Problem, config: Config, splits: int, units: int, fits: int) -> float:
    """Of the backward's scan, an estimate as ``Cut`` has it."""
    span, per_row = max(1, _parts(problem, config.tile, splits)[1]), _row_length(problem)
    parts = max(1.0, per_row / span)
    each = _ceil(_ceil(span, config.tile), config.warps) * config.groups  # items of a warp, which starts behind another
    behind = (each + config.warps - 1) * config.warps * config.tile / (min(span, per_row) * config.groups)
    waiting = max(1.0, config.warps / (3 * config.groups))  # a turn is a part of an item, and most of a tile's overlaps
    waves = math.ceil(problem.rows * _block_count(problem, config) * parts / (units * fits))
    filled = problem.rows * problem.dim * parts / (waves * units * fits * config.channels)
    # with 4 warps at work a multiprocessor does 0.76 of what it does with 8
    thin = max(1.0, 8 * behind / (config.warps * fits)) ** 0.4
    # measured: a tile takes 0.9 items more, and a part begins and ends in the time of 1.3 tiles
    return waiting * thin * (1 + 0.9 / config.groups) / filled + 1.3 * config.tile / span


def _entering_time(problem: Problem, tile: int, splits: int, units: int) -> tuple[float, int]:
    """(time of the pass that finds the adjoints between parts, estimated as above; the ``finer`` of which that is)."""
    splits, span, _ = _parts(problem, tile, splits)
    per_row = _row_length(problem)
    if splits == 1 or span >= per_row:
        return 0.0, 1
    needed = 1 - span / per_row  # nobody asks for what enters a row's last part
    channels = problem.rows * problem.dim * per_row / span * needed

    def time(finer: int) -> float:
        # measured: a start takes the time of 170 steps, and a multiprocessor is busy with 14 warps
        warps = channels * finer * _adjoint_lanes(problem, span // finer) / 32
        return 0.3 * needed * (1 + 170 * finer / span) * max(1.0, 14 * units / warps) ** 0.5

    unit = _lcm_unit(problem, tile)
    return min((time(f), f) for f in (1, 2, 4, 8, 16, 32) if f == 1 or span % (unit * f) == 0)


def _adjoint_lanes(problem: Problem, span: int) -> int:
    """Lanes of a channel in the pass that finds the adjoints between parts of so many steps."""
    share = 1 if problem.state == 1 else 8 if span >= 1024 else 4  # states of a lane
    return min(32, _power_of_two(_ceil(problem.state, share)))


# ---- launching ------------------------------------------------------------------------------------------------------

SIZES = (
    "length", "rows", "dim", "groups", "blocks", "splits", "span", "finer", "wide_offsets", "bc_partial", "spread_rows",
    "row_length",
    *(f"{t}_{axis}" for t in ("u", "delta", "z", "out", "dout", "grad") for axis in ("batch", "dim", "step")),
    *(f"{t}_{axis}" for t in ("B", "C") for axis in ("batch", "group", "state", "step")),
)  # fmt: skip
SCALARS = ("u", "delta", "z", "out", "y", "dout", "du", "ddelta", "dz", "B", "C", "cu_seqlens")
FLOATS = (
    "A", "D", "delta_bias", "initial_state", "last_state", "states", "span_end", "span_time",
    "dA", "dB", "dC", "dD", "ddelta_bias", "dinitial_state", "spread_B", "spread_C",
    "kept",
)  # fmt: skip
FIELDS = dict.fromkeys(SCALARS, "void*") | dict.fromkeys(FLOATS, "float*") | dict.fromkeys(SIZES, "long long")
SUMS = ("dA", "dD", "ddelta_bias", "dB", "dC")  # gradients that many blocks add to
DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2}


def _is_aligned(tensors: list[Tensor], axis: int, width: int) -> bool:
    """Whether runs of ``width`` elements along the axis always start at a multiple of their size."""
    for t in tensors:
        size = t.element_size()
        others = [s for i, s in enumerate(t.stride()) if i != axis % t.ndim and t.shape[i] > 1]
        if t.data_ptr() % (width * size) or any(s % width for s in others):
            return False
    return True


def defines(
    problem: Problem, config: Config, aligned: tuple[bool, bool, bool], axes: tuple[int, int]
) -> dict[str, int]:
    """What a variant is specialised by. aligned: u and its like, B, C. axes: 0 length-, 1 state-contiguous B, C."""
    return {
        "DTYPE": DTYPES[problem.dtype],
        "STATE": problem.state,
        **_tunables(config),
        "DIM_LAYOUT": int(problem.layout == "dim"),
        "ALIGNED": int(aligned[0]),
        "B_ALIGNED": int(aligned[1]),
        "C_ALIGNED": int(aligned[2]),
        "B_AXIS": axes[0],
        "C_AXIS": axes[1],
        "CONST_B": int(problem.constant_B),
        "CONST_C": int(problem.constant_C),
        "HAS_D": int(problem.has_D),
        "HAS_Z": int(problem.has_z),
        "HAS_BIAS": int(problem.has_bias),
        "SOFTPLUS": int(problem.softplus),
        "PACKED": int(problem.sequences > 0),
        "CHECKPOINT": problem.checkpoint,
        "KEEP_Y": int(problem.keep_y),
    }


def _tunables(config: Config) -> dict[str, int]:
    return {
        "LANES": config.lanes,
        "WARPS": config.warps,
        "GROUPS": config.groups,
        "TILE": config.tile,
        "MIN_BLOCKS": config.blocks,
        "POLYNOMIAL": config.polynomial,
        "RELAY": config.relay,
    }


@functools.lru_cache(maxsize=1024)
def _kernel(files: tuple[Path, ...], name: str, items: tuple[tuple[str, int], ...]) -> Kernel:
    return Kernel(files, FIELDS, dict(items), name)


def _own_width(problem: Problem, config: Config) -> int:
    """Elements of a thread's widest single access to u: up to 16 bytes."""
    item = ITEMSIZE[problem.dtype]
    if problem.direction == "backward":
        return 16 // item if problem.layout == "dim" else min(config.tile, 16 // item)
    own = _own_channels(problem, config)
    return own if problem.layout == "dim" else min(config.own // own, 16 // item)


class Variant(NamedTuple):
    """A kernel as a call launches it."""

    files: tuple[Path, ...]
    name: str
    defines: dict[str, int]
    config: Config  # of its blocks
    shared_bytes: int

    def kernel(self, name: str = "") -> Kernel:
        return _kernel(self.files, name or self.name, tuple(sorted(self.defines.items())))


def _entering(problem: Problem, config: Config) -> tuple[int, Config] | None:
    """(mode, config) of the pass that finds what enters each span; None if time is not cut."""
    if _spans(problem, config)[0] == 1:
        return None
    mode, own = LEAVE, config
    if problem.direction == "backward":
        span = _finer_spans(problem, config)[1]
        tile = 32 if span % 32 == 0 and problem.state <= 64 else 16
        mode, own = ADJOINT, _forward(problem, _adjoint_lanes(problem, span), 4, tile)
    if problem.dtype != "float32" and _ceil(problem.state, own.lanes) >= 4:
        # with less to do beside exponentials than the scan, it gains by this
        own = dataclasses.replace(own, polynomial=max(2, own.polynomial))
    return mode, own


def _expanding(problem: Problem, config: Config) -> Config | None:
    """Config of the pass that makes the states which enter a backward's tiles; None if the forward kept them all."""
    if problem.direction == "forward" or problem.checkpoint == config.tile:
        return None
    lanes = _power_of_two(_ceil(problem.state, 8))
    warps, blocks = (4, 5) if problem.state <= 128 else (8, 2)  # without y it takes fewer registers than the forward
    return Config(lanes, warps, 16, blocks)


def variants(
    problem: Problem,
    config: Config,
    aligned: tuple[bool, bool, bool],
    axes: tuple[int, int],
) -> list[Variant]:
    """What a call launches: first, if ``_entering`` says so, a pass over the spans' states, and, if ``_expanding``
    does, one that makes the tiles'; last, the scan itself."""
    base = defines(problem, config, aligned, axes)
    found = []
    if first := _entering(problem, config):
        mode, own = first
        found.append(
            Variant(FORWARD, "scan", base | _tunables(own) | {"MODE": mode}, own, shared_bytes(problem, own, mode))
        )
    if expanding := _expanding(problem, config):
        more = {"MODE": EXPAND, "CHECKPOINT": config.tile, "KEPT": problem.checkpoint}
        shared = shared_bytes(problem, expanding, EXPAND)
        found.append(Variant(FORWARD, "scan", base | _tunables(expanding) | more, expanding, shared))
    if problem.direction == "forward":
        files, name, more = FORWARD, "scan", {"MODE": SCAN}
    else:
        files, name = BACKWARD, "scan_backward"
        more = {"PARTIALS": int(problem.deterministic), "CHECKPOINT": config.tile}
    shared = shared_bytes(problem, config)
    if problem.direction == "backward":
        more["SHARED_BYTES"] = shared
    return [*found, Variant(files, name, base | more, config, shared)]


def _describe(
    problem: Problem, i: Inputs, config: Config, like_u: dict[str, Tensor]
) -> tuple[list[Variant], dict[str, int]]:
    """The kernels of a call and the parameters that they share, but for the pointers: see ``_pointers``."""
    sequence = {"u": i.u, "delta": i.delta, **({"z": i.z} if i.z is not None else {}), **like_u}
    first, expanding = _entering(problem, config), _expanding(problem, config)
    axis, width = (1 if problem.layout == "dim" else 2), _own_width(problem, config)
    for own in ([first[1]] if first else []) + ([expanding] if expanding else []):
        width = max(width, _own_width(problem, own))
    # a block starts at its group's first channel, a packed sequence at any step; both end with a whole vector
    if axis == 1:
        starts = problem.dim // problem.groups % width == 0 and config.channels % width == 0
    else:
        starts = not problem.sequences and problem.length % width == 0
    aligned = [starts and _is_aligned(list(sequence.values()), axis, width)]
    axes = []
    sizes = {"dim": problem.dim, "groups": problem.groups, "row_length": problem.length}
    for name, t in sequence.items():
        key = "grad" if name == "du" else name
        sizes |= {f"{key}_batch": t.stride(0), f"{key}_dim": t.stride(1), f"{key}_step": t.stride(2)}
    for name, t in (("B", i.B), ("C", i.C)):
        state_axis = t.ndim == 4 and t.stride(3) != 1 and t.stride(2) == 1
        axes.append(int(state_axis))
        starts = state_axis or not problem.sequences
        aligned.append(t.ndim == 2 or (starts and _is_aligned([t], 2 if state_axis else 3, 4)))
        if t.ndim == 4:
            sizes |= {f"{name}_{a}": t.stride(k) for k, a in enumerate(("batch", "group", "state", "step"))}
    sizes["wide_offsets"] = int(i.cu_seqlens is not None and i.cu_seqlens.dtype == torch.int64)
    return variants(problem, config, (aligned[0], aligned[1], aligned[2]), (axes[0], axes[1])), sizes


def _extent(problem: Problem) -> dict[str, int]:
    return {"length": problem.length, "rows": problem.rows}


def _pointers(inputs: Inputs, **others: Tensor | None) -> dict[str, int]:
    """Where the tensors of a call begin, by parameter; the inputs' names are their parameters'."""
    found = {name: t.data_ptr() for name, t in zip(Inputs._fields, inputs, strict=True) if t is not None}
    for name, t in others.items():
        if t is not None:
            found[name] = t.data_ptr()
    return found


def _spans(problem: Problem, config: Config) -> tuple[int, int, int]:
    """(splits, span in steps, slots): spans are a whole number of tiles and of kept states."""
    return _parts(problem, config.tile, config.splits, config.finer)


def _parts(problem: Problem, tile: int, splits: int, finer: int = 1) -> tuple[int, int, int]:
    """``_spans``, before there is a Config."""
    unit = max(_lcm_unit(problem, tile), tile) * finer
    longest = problem.length  # of a packed sequence it is not known here: an upper bound
    span = _ceil(_ceil(longest if not problem.sequences else _ceil(longest, problem.rows), splits), unit) * unit
    if splits == 1 or (not problem.sequences and span >= longest):
        return 1, _ceil(longest, unit) * unit, problem.rows
    if problem.sequences:
        return splits, span, problem.length // span + problem.rows
    splits = _ceil(longest, span)
    return splits, span, splits * problem.rows


def _finer_spans(problem: Problem, config: Config) -> tuple[int, int, int]:
    """The same for the pass that finds what enters each span."""
    splits, span, _ = _spans(problem, config)
    finer = span // config.finer
    if problem.sequences:
        return splits * config.finer, finer, problem.length // finer + problem.rows
    return _ceil(problem.length, finer), finer, _ceil(problem.length, finer) * problem.rows


def _lcm_unit(problem: Problem, tile: int) -> int:
    unit = max(problem.checkpoint, 1)
    while unit % tile:
        unit += problem.checkpoint or 1
    return unit


def _block_count(problem: Problem, config: Config) -> int:
    return problem.groups * _ceil(problem.dim // problem.groups, config.channels)


def _prepare_entering(
    problem: Problem, config: Config, first: Variant, sizes: dict[str, int]
) -> Callable[[Tensor, dict[str, int]], Tensor]:
    """Fill span_end with the state (or adjoint) that enters each span: one state-only pass and `combine`."""
    splits, span, slots = _finer_spans(problem, config)
    sizes = sizes | {"splits": splits, "span": span}
    blocks = _block_count(problem, first.config)
    threads = problem.rows * problem.dim * problem.state
    leave = first.kernel().prepare(blocks * slots, first.config.threads, first.shared_bytes, sizes | {"blocks": blocks})
    combine = first.kernel("combine").prepare(_ceil(threads, 256), 256, 0, sizes)

    def enter(like: Tensor, pointers: dict[str, int]) -> Tensor:
        scratch = like.new_empty(slots * problem.dim * (problem.state + 1), dtype=torch.float32)
        pointers["span_end"] = scratch.data_ptr()
        pointers["span_time"] = scratch.data_ptr() + 4 * slots * problem.dim * problem.state
        leave(pointers)
        combine(pointers)
        return scratch

    return enter


def _prepare_expanding(problem: Problem, expand: Variant, sizes: dict[str, int]) -> Launch:
    """Write, from the states that the forward kept, those that enter the tiles of the backward."""
    segment, tile = problem.checkpoint, expand.defines["CHECKPOINT"]
    # a block's start costs about a tile of 16 steps: it gets some eight that it does not skip
    span = segment * _ceil(128, segment - tile)
    blocks, splits = _block_count(problem, expand.config), _ceil(problem.length, span)
    slots = problem.length // span + problem.rows if problem.sequences else splits * problem.rows
    sizes = sizes | {"splits": splits, "span": span, "blocks": blocks}
    return expand.kernel().prepare(blocks * slots, expand.config.threads, expand.shared_bytes, sizes)


class Window(NamedTuple):
    """A part of a backward's rows and of their time."""

    row: int
    rows: int
    step: int
    steps: int


def _windows(problem: Problem, config: Config) -> list[Window]:
    """The parts that a backward is done in: some rows after others, of each the last steps first.

    As few as keep the states that enter tiles within ``SCRATCH`` bytes, or within those of one row from a kept state to
    the next. One part where the forward kept all of these states, and of packed rows, which begin at any step.
    """
    if problem.sequences or not _expanding(problem, config):
        return [Window(0, problem.batch, 0, problem.length)]
    segments = _ceil(problem.length, problem.checkpoint)
    most = max(1, SCRATCH // (4 * problem.dim * problem.state * (problem.checkpoint // config.tile)))
    rows = _ceil(problem.batch, _ceil(problem.batch, most))
    steps = _ceil(segments, _ceil(segments, most // rows)) * problem.checkpoint
    return [
        Window(row, min(rows, problem.batch - row), step, min(steps, problem.length - step))
        for row in range(0, problem.batch, rows)
        for step in reversed(range(0, problem.length, steps))
    ]


def _window_strides(problem: Problem, sizes: dict[str, int], shape: dict[str, int]) -> dict[str, tuple[int, int, int]]:
    """Of each tensor of which a backward's windows have a part, the bytes from a row to the next, from a kept state and
    from a slot of spans. shape: values of a slot's part of the sums that have one."""
    item, per_state = ITEMSIZE[problem.dtype], 4 * problem.dim * problem.state
    like = {name: name for name in ("u", "delta", "z", "dout")} | dict.fromkeys(("du", "ddelta", "dz", "y"), "grad")
    like |= {name: name for name, fixed in (("B", problem.constant_B), ("C", problem.constant_C)) if not fixed}
    steps = problem.checkpoint
    found = {
        name: (item * sizes.get(f"{t}_batch", 0), item * sizes.get(f"{t}_step", 0) * steps, 0)
        for name, t in like.items()
    }
    for name in like.keys() & {"B", "C"}:
        found[f"d{name}"] = 4 * problem.groups * problem.state * problem.length, 4 * steps, 0
    found["kept"] = per_state * _ceil(problem.length, steps), per_state, 0
    found |= dict.fromkeys(("last_state", "dinitial_state"), (per_state, 0, 0))
    return found | {name: (0, 0, 4 * values) for name, values in shape.items()}


def _prepare_spread(
    problem: Problem, scan: Variant, sizes: dict[str, int]
) -> Callable[[Tensor, dict[str, int]], Tensor] | None:
    """Write B and C, where they vary, as a relay's warps copy them; the pointers to them join the others."""
    varying = [name for name, fixed in (("B", problem.constant_B), ("C", problem.constant_C)) if not fixed]
    if not varying:
        return None
    lanes = scan.config.lanes
    quads = _ceil(_ceil(problem.state, lanes) * lanes, 4)
    items = problem.batch * problem.groups * problem.length * quads
    sizes = sizes | {"spread_rows": problem.batch * problem.groups}
    write = scan.kernel("spread").prepare(_ceil(items, 256), 256, 0, sizes)

    def spread(like: Tensor, pointers: dict[str, int]) -> Tensor:
        rows = like.new_empty(len(varying) * 4 * items, dtype=torch.float32)
        for k, name in enumerate(varying):
            pointers[f"spread_{name}"] = rows.data_ptr() + 16 * items * k
        write(pointers)
        return rows

    return spread


def forward(problem: Problem, inputs: Inputs, outputs: Outputs, config: Config) -> None:
    """Run the scan. See the module's kernels; ``Outputs`` says what is written."""
    prepare_forward(problem, inputs, outputs, config)(inputs, outputs)


def prepare_forward(
    problem: Problem, inputs: Inputs, outputs: Outputs, config: Config
) -> Callable[[Inputs, Outputs], None]:
    """``forward`` for all tensors of this signature: kernels, grids and all parameters but pointers are decided."""
    (*first, scan), sizes = _describe(problem, inputs, config, {"out": outputs.out})
    splits, span, slots = _spans(problem, config)
    blocks = _block_count(problem, config)
    sizes |= _extent(problem) | {"splits": splits, "span": span, "blocks": blocks, "finer": 1}
    enter = _prepare_entering(problem, config, first[0], sizes) if first else None
    spread = _prepare_spread(problem, scan, sizes) if config.relay else None
    launch = scan.kernel().prepare(blocks * slots, config.threads, scan.shared_bytes, sizes)

    def run(inputs: Inputs, outputs: Outputs) -> None:
        pointers = _pointers(inputs, out=outputs.out, last_state=outputs.last_state, states=outputs.states, y=outputs.y)
        if spread is not None:
            rows = spread(inputs.u, pointers)  # noqa: F841 - held until the scan is launched
        if enter is not None:
            scratch = enter(inputs.u, pointers)  # noqa: F841 - held until the scan is launched
        launch(pointers)

    return run


def backward(
    problem: Problem, inputs: Inputs, kept: Kept, cotangents: Cotangents, gradients: Gradients, config: Config
) -> None:
    """Fill the gradients. Sums over rows and channels are atomic, or per block and added in order if deterministic."""
    prepare_backward(problem, inputs, kept, cotangents, gradients, config)(inputs, kept, cotangents, gradients)


def prepare_backward(
    problem: Problem, inputs: Inputs, kept: Kept, cotangents: Cotangents, gradients: Gradients, config: Config
) -> Callable[[Inputs, Kept, Cotangents, Gradients], None]:
    """``backward`` for all tensors of this signature, as ``prepare_forward`` has it."""
    (*first, scan), sizes = _describe(problem, inputs, config, {"dout": cotangents.dout, "du": gradients.du})
    passes = {variant.defines["MODE"]: variant for variant in first}
    blocks = _block_count(problem, config)
    windows = _windows(problem, config)
    whole = len(windows) == 1
    parts = [problem if whole else dataclasses.replace(problem, batch=w.rows, length=w.steps) for w in windows]
    slots = [_spans(part, config)[2] for part in parts]

    # where the kernel adds (or, deterministic, stores its part of) each sum
    shapes: dict[str, tuple[int, ...]] = {}
    of_slot: dict[str, int] = {}
    if problem.deterministic:
        for name in SUMS:
            if (total := getattr(gradients, name)) is not None:
                variable = name in ("dB", "dC") and total.ndim == 4
                shapes[name] = (blocks // problem.groups if variable else sum(slots), *total.shape)
                if variable:
                    sizes["bc_partial"] = total.numel()
                else:
                    of_slot[name] = total.numel()

    @functools.cache
    def prepare(part: Problem) -> tuple[Launch | None, Callable[[Tensor, dict[str, int]], Tensor] | None, Launch]:
        splits, span, slots = _spans(part, config)
        own = sizes | _extent(part) | {"splits": splits, "span": span, "blocks": blocks, "finer": config.finer}
        # the adjoint pass walks dout where the forward's walks u
        swapped = {f"u_{axis}": own[f"dout_{axis}"] for axis in ("batch", "dim", "step")}
        expand = _prepare_expanding(part, passes[EXPAND], own) if EXPAND in passes else None
        enter = _prepare_entering(part, config, passes[ADJOINT], own | swapped) if splits > 1 else None
        return expand, enter, scan.kernel().prepare(blocks * slots, config.threads, scan.shared_bytes, own)

    prepared = [prepare(part) for part in parts]
    made = [dataclasses.replace(part, checkpoint=config.tile).checkpoints for part in parts]  # slots of states
    strides = _window_strides(problem, sizes, of_slot)

    def run(inputs: Inputs, kept: Kept, cotangents: Cotangents, gradients: Gradients) -> None:
        u, g = inputs.u, gradients
        pointers = _pointers(
            inputs, states=kept.states, y=kept.y, dout=cotangents.dout, last_state=cotangents.dlast_state, du=g.du,
            ddelta=g.ddelta, dz=g.dz, dinitial_state=g.dinitial_state,
        )  # fmt: skip
        sums = {name: total for name in SUMS if (total := getattr(g, name)) is not None}
        if problem.deterministic:
            # a packed slot that no sequence owns stays zero
            make = u.new_zeros if problem.sequences else u.new_empty
            added = {name: make(shape, dtype=torch.float32) for name, shape in shapes.items()}
        else:
            torch._foreach_zero_(list(sums.values()))
            added = sums
        for name, part in added.items():
            pointers[name] = part.data_ptr()
        if EXPAND in passes:
            states = u.new_empty((max(made), problem.dim, problem.state), dtype=torch.float32)
            pointers |= {"kept": pointers["states"], "states": states.data_ptr()}
        if not whole:
            # the adjoint that leaves a window enters the next; blocks of one may write it while others still read
            handed = u.new_empty((2, windows[0].rows, problem.dim, problem.state), dtype=torch.float32)
        for k, (window, (expand, enter, launch)) in enumerate(zip(windows, prepared, strict=True)):
            at = pointers
            if not whole:
                first = window.row, window.step // problem.checkpoint, sum(slots[:k])
                named = pointers.keys() & strides.keys()
                at = pointers | {n: pointers[n] + sum(map(operator.mul, first, strides[n])) for n in named}
                if window.step + window.steps < problem.length:
                    at["last_state"] = handed[k % 2].data_ptr()
                if window.step > 0:
                    at["dinitial_state"] = handed[(k + 1) % 2].data_ptr()
            if expand is not None:
                expand(at)
            if enter is not None:
                scratch = enter(u, swapped := at | {"u": at["dout"]})  # noqa: F841 - held until the scan is launched
                at["span_end"] = swapped["span_end"]
            launch(at)
        if problem.deterministic:
            for name, part in added.items():
                torch.sum(part, 0, out=sums[name])

    return run
