"""Configurations of the CUDA backend: what may be chosen, what fits, and which come first without tuning."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

from ..problem import ITEMSIZE, Problem

SCAN, LEAVE, ADJOINT, EXPAND = 0, 1, 2, 3  # MODE of cuda_forward.cu
MOST_GROUPS = 64  # groups of channels of a block, backward
MOST_SPLITS = 128  # forward: parts of a row's time


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


def ceil(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


# ---- how a problem's channels and time are cut ----------------------------------------------------------------------


def spans(problem: Problem, config: Config) -> tuple[int, int, int]:
    """(splits, span in steps, slots): spans are a whole number of tiles and of kept states."""
    return _parts(problem, config.tile, config.splits, config.finer)


def _parts(problem: Problem, tile: int, splits: int, finer: int = 1) -> tuple[int, int, int]:
    """``spans``, before there is a Config."""
    unit = max(_lcm_unit(problem, tile), tile) * finer
    longest = problem.length  # of a packed sequence it is not known here: an upper bound
    span = ceil(ceil(longest if not problem.sequences else ceil(longest, problem.rows), splits), unit) * unit
    if splits == 1 or (not problem.sequences and span >= longest):
        return 1, ceil(longest, unit) * unit, problem.rows
    if problem.sequences:
        return splits, span, problem.length // span + problem.rows
    splits = ceil(longest, span)
    return splits, span, splits * problem.rows


def finer_spans(problem: Problem, config: Config) -> tuple[int, int, int]:
    """The same for the pass that finds what enters each span."""
    splits, span, _ = spans(problem, config)
    finer = span // config.finer
    if problem.sequences:
        return splits * config.finer, finer, problem.length // finer + problem.rows
    return ceil(problem.length, finer), finer, ceil(problem.length, finer) * problem.rows


def _lcm_unit(problem: Problem, tile: int) -> int:
    unit = max(problem.checkpoint, 1)
    while unit % tile:
        unit += problem.checkpoint or 1
    return unit


def block_count(problem: Problem, config: Config) -> int:
    return problem.groups * ceil(problem.dim // problem.groups, config.channels)


def _row_length(problem: Problem) -> float:
    """Steps of a row, at least 1; of packed ones, on the average."""
    return max(1.0, problem.length / problem.rows if problem.sequences else problem.length)


# ---- what fits ------------------------------------------------------------------------------------------------------


def shared_bytes(problem: Problem, config: Config, mode: int = SCAN) -> int:
    """Shared memory of a block: mirrors the carving at the top of each kernel."""
    per = ceil(problem.state, config.lanes)
    projection = config.tile * 4 * (ceil(per * config.lanes, 4) + 1)
    tile = config.per_warp * (config.tile + 4)
    if problem.layout == "dim":
        tile += max(0, config.per_warp // 8 - 1) * (512 // (config.per_warp * ITEMSIZE[problem.dtype]))
    raw = 32 * ceil(config.own * ITEMSIZE[problem.dtype], 4)
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
    copied = 128 * item * ceil(per * config.lanes * config.tile // 4, 32)
    dim, parts = problem.layout == "dim", 3 + problem.has_z
    lines, line = (config.tile, batch * config.per_warp) if dim else (config.per_warp, config.tile)
    apart = lines // (2 * config.steps) * 16 if dim else 0
    part = ceil(lines * max(line * item, (line // 2 + 1) * 4 if item == 2 else 0) + apart, 16) * 16
    slot = (0 if dim else parts * part) + config.per_warp * per * config.lanes * 4
    batches = 3 * parts * part + (parts - 1) * (lines * line * item + apart) + 256 * (parts + 1) if dim else 48
    varying = 2 - problem.constant_B - problem.constant_C

    def room(needed: int | bool, floats: int) -> int:  # an array of as many floats, or of one
        return ceil(floats if needed else 1, 4) * 16

    group = 128 * (3 * per + 2) + room(True, 2 * config.per_warp)
    group += (2 - varying) * 256 * per + varying * 16
    warp = 2 * (5 + problem.has_z) * rows * 4 + 4 * slot + batches + 512
    warp += varying * (projection + copied) + (2 - varying) * 32
    warp += room(problem.keep_y, 32 * ceil(config.steps * item, 4))
    turns = ceil(8 * config.groups * config.warps + 4 * config.warps, 16) * 16 + 16
    return 144 + turns + config.groups * group + config.warps * warp


def own_channels(problem: Problem, config: Config) -> int:
    """Forward: channels that a lane loads and stores of its warp's."""
    item = ITEMSIZE[problem.dtype]
    if problem.layout == "length":
        return 2 if config.per_warp == 32 and config.own * item > 16 else 1
    return min(16 // item, config.per_warp, config.own)


def _batch(problem: Problem, config: Config) -> int:
    """Groups of channels of the backward that share lines of channel-contiguous memory."""
    if problem.layout == "length":
        return 1
    return max(2, (32 if config.lanes < 32 else 16) // (config.per_warp * ITEMSIZE[problem.dtype]))


def unfit(problem: Problem, config: Config) -> str | None:
    """What is wrong with the configuration, of which no kernel can be made for the problem: what the kernels assert; or
    None."""
    per = ceil(problem.state, config.lanes)
    if problem.direction == "forward":
        if config.tile % 16:
            return f"forward: expected a tile of 16, 32 or 64 steps, got {config.tile}"
        if config.own // own_channels(problem, config) > config.tile:
            return f"forward: expected more than {config.lanes} lanes for tiles of {config.tile} steps"
        if not config.relay:
            return None
        if config.tile != 16 or per > 4 or config.splits > 1:
            return "forward, relay=1: expected tile=16, splits=1 and lanes for at most 4 states each"
        if config.warps % config.groups or config.warps < 2 * config.groups:
            return f"forward, relay=1: expected warps a multiple of groups, at least twice, got {config.warps}"
        return None
    if not config.relay or config.lanes < 4:
        return "backward: expected relay=1 and at least 4 lanes"
    if per * config.tile > 32 or config.tile > 16:
        return f"backward: expected a tile of 4 to 16 steps, and of at most 32 for all states of a lane, {per} here"
    if problem.layout == "dim" and config.groups < 2:
        return "backward, channel-contiguous: expected at least 2 groups, as a batch of them follows another"
    return None


def valid(problem: Problem, device: Any, config: Config) -> bool:
    """Whether the configuration can run on the device, in registers."""
    if unfit(problem, config) or shared_bytes(problem, config) > device.shared_memory:
        return False
    if problem.direction == "backward":
        return True
    per = ceil(problem.state, config.lanes)
    if per > 16 or (config.relay and config.warps > 16):
        return False
    # else a thread would hold too many of B and C
    return config.relay == 1 or ceil(per * config.lanes, 4) * config.tile <= 4 * config.threads


# ---- candidates, the first a good default ---------------------------------------------------------------------------


def configs(problem: Problem, device: Any) -> list[Config]:
    """Valid candidates for this problem, the first a good default."""
    make = _forward_configs if problem.direction == "forward" else _backward_configs
    found = [c for c in dict.fromkeys(make(problem, device)) if valid(problem, device, c)]
    if not found:
        raise ValueError(f"no configuration of the cuda backend fits {problem} on {device.name}")
    return found


def _busy(blocks: int, resident: int) -> float:
    """Share of the places for ``resident`` blocks that are taken until the last of ``blocks`` ends."""
    return blocks / (ceil(blocks, resident) * resident)


def forward_config(problem: Problem, lanes: int, warps: int = 4, tile: int = 32, splits: int = 1) -> Config:
    """A forward configuration with as many blocks a multiprocessor as its registers allow without spilling."""
    per = ceil(problem.state, lanes)
    many = per > 4 and (problem.state > 64 or problem.dtype == "float32") and warps < 8
    if lanes == 1 or (per > 8 and problem.dtype == "float32"):
        warps_held = 8
    else:
        warps_held = 12 if many and per <= 8 else 16 if per > 4 or problem.dtype == "float32" else 20
    return Config(lanes, warps, tile, blocks=max(1, warps_held // warps), splits=splits)


def _relays(problem: Problem, device: Any) -> list[tuple[float, Config]]:
    """Configurations whose warps take turns in time, for problems of too few channels to give each warp its own, best
    first, each with the share of the GPU that it fills."""
    least = max(4, power_of_two(ceil(problem.state, 4)))
    found = []
    for lanes, worth in ((least, 1.0), (2 * least, 0.7)):  # more lanes: more to sum
        groups = problem.rows * problem.groups * ceil(problem.dim // problem.groups, 32 // lanes) if lanes <= 32 else 0
        held = ceil(groups, device.units)  # groups of channels on a multiprocessor
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
    most = min(32, power_of_two(problem.state))
    least = min(most, max(1, power_of_two(ceil(problem.state, 8))))
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
    if problem.state > 224 and problem.dtype != "float32":
        sizes = (16,)  # 8 warps spill where states are kept, and were never the fastest

    def make(lanes: int, warps: int, splits: int = 1) -> Config:
        long = forward_config(problem, lanes, warps, 32, splits)
        return long if most > 1 and valid(problem, device, long) else forward_config(problem, lanes, warps, 16, splits)

    # exact exponentials make the second pass dearer, and many states leave it more of them
    enough = (0.7 if problem.dtype == "float32" and problem.state > 32 else 0.8) * wanted
    if channels * lanes < enough and longest > 1:
        # too few channels even so: cut time, at the cost of a second, state-only pass
        lanes = fewest
        config = make(lanes, sizes[0])
        count = problem.rows * block_count(problem, config)
        # parts follow one another where the states that enter them are found
        splits = min(longest, MOST_SPLITS, max(1, 2 * device.units * config.blocks // count))
        while lanes < most and channels * lanes * splits < enough:
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
        count = problem.rows * block_count(problem, first) * splits
        better = _busy(count, 5 * device.units) > 0.78 * _busy(count, 4 * device.units)
        found = [fifth, first] if better else [first, fifth]
    for other in dict.fromkeys((lanes, lanes * 2, max(1, lanes // 2), least, most)):
        if not least <= other <= most:
            continue
        for cut in dict.fromkeys((splits, min(longest, 2 * splits), ceil(splits, 2), 1)):
            found += [make(other, warps, cut) for warps in sizes]
    few = (4, 2, 1) if problem.state <= 32 else sizes
    found += [forward_config(problem, x, warps, 16) for x in dict.fromkeys((lanes, most, least)) for warps in few]
    return [*relay_first, *found, *(config for _, config in relays)]


def _fills(problem: Problem, config: Config, units: int) -> bool:
    """Whether blocks leave few multiprocessors without work, at the start and in the end."""
    count = problem.rows * block_count(problem, config)
    return count >= 0.7 * units and _busy(count, units * config.blocks) >= 0.7


def _forward_time(problem: Problem, config: Config, units: int) -> float:
    """An estimate of a forward's time, in no unit; fitted to 64, 128 and 256 states on an H200."""
    each = ceil(problem.rows * block_count(problem, config), units)  # blocks of a multiprocessor, some at a time
    full, rest = divmod(each, config.blocks)

    broad = ceil(problem.state, config.lanes) > 8
    # with as many states, what a lane's twofold work leaves of the time
    worth = (0.93 if problem.state <= 64 else 0.9 if problem.state <= 128 else 0.68) if broad else 1.0

    def taken(blocks: int) -> float:  # 16 warps keep it busy
        if not blocks:
            return 0.0
        return blocks * config.channels / min(1.0, blocks * config.warps / 16) ** (0.3 if broad else 0.6)

    return (full * taken(config.blocks) + taken(rest)) * (1.2 if config.tile < 32 else 1.0) * worth


def _backward_configs(problem: Problem, device: Any) -> list[Config]:
    lanes = min(32, max(4, power_of_two(ceil(problem.state, 2))))
    tile = 32 // max(2, power_of_two(ceil(problem.state, lanes)))
    found: list[Cut] = []
    for warps, blocks in ((4, 2), (8, 1), (2, 4), (1, 8)):
        alike: list[Cut] = []
        # whole pieces of 16 bytes where channels are contiguous
        unit = max(2, 16 // ITEMSIZE[problem.dtype] * lanes // 32) if problem.layout == "dim" else 1
        most = ceil(min(MOST_GROUPS, ceil(problem.dim // problem.groups, 32 // lanes)), unit) * unit
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
    work, resident = problem.rows * block_count(problem, config), units * fits
    longest = max(1, int(_row_length(problem) // max(64, problem.checkpoint)))
    found = []
    for splits in dict.fromkeys((1, *(max(1, min(longest, waves * resident // work)) for waves in (1, 2)))):
        entering, finer = _entering_time(problem, config.tile, splits, units)
        found.append(Cut(_backward_time(problem, config, splits, units, fits) + entering, splits, finer, config))
    return found


def _backward_time(problem: Problem, config: Config, splits: int, units: int, fits: int) -> float:
    """Of the backward's scan, an estimate as ``Cut`` has it."""
    span, per_row = max(1, _parts(problem, config.tile, splits)[1]), _row_length(problem)
    parts = max(1.0, per_row / span)
    each = ceil(ceil(span, config.tile), config.warps) * config.groups  # items of a warp, which starts behind another
    behind = (each + config.warps - 1) * config.warps * config.tile / (min(span, per_row) * config.groups)
    waiting = max(1.0, config.warps / (3 * config.groups))  # a turn is a part of an item, and most of a tile's overlaps
    waves = math.ceil(problem.rows * block_count(problem, config) * parts / (units * fits))
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
        warps = channels * finer * adjoint_lanes(problem, span // finer) / 32
        return 0.3 * needed * (1 + 170 * finer / span) * max(1.0, 14 * units / warps) ** 0.5

    unit = _lcm_unit(problem, tile)
    return min((time(f), f) for f in (1, 2, 4, 8, 16, 32) if f == 1 or span % (unit * f) == 0)


def adjoint_lanes(problem: Problem, span: int) -> int:
    """Lanes of a channel in the pass that finds the adjoints between parts of so many steps."""
    share = 1 if problem.state == 1 else 8 if span >= 1024 else 4  # states of a lane
    return min(32, power_of_two(ceil(problem.state, share)))
