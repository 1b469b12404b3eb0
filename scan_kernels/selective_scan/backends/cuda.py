"""Raw CUDA through CuPy: kernels in cuda_forward.cu and cuda_backward.cu, specialised by defines.

This file chooses the variant, fills its parameters and launches; cuda_configs.py says which configurations there are,
and the top of a kernel's file what it does.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import operator
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ...cuda_module import Kernel, Launch
from ..problem import ITEMSIZE, Cotangents, Gradients, Inputs, Kept, Outputs, Problem
from .cuda_configs import (
    ADJOINT,
    EXPAND,
    LEAVE,
    SCAN,
    Config,
    adjoint_lanes,
    block_count,
    ceil,
    finer_spans,
    forward_config,
    own_channels,
    power_of_two,
    shared_bytes,
    spans,
    unfit,
)
from .cuda_configs import configs as configs
from .cuda_configs import valid as valid

RANK = 0
SIZED = "splits", "finer", "groups"
FOLDER = Path(__file__).parent
FORWARD = FOLDER / "cuda_common.cuh", FOLDER / "cuda_forward.cu"
BACKWARD = FOLDER / "cuda_common.cuh", FOLDER / "cuda_backward.cu"
SCRATCH = 512 << 20  # bytes that the states which enter the tiles of a backward may take; more are made in parts


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


# ---- variants -------------------------------------------------------------------------------------------------------

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
    own = own_channels(problem, config)
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
    if spans(problem, config)[0] == 1:
        return None
    mode, own = LEAVE, config
    if problem.direction == "backward":
        span = finer_spans(problem, config)[1]
        tile = 32 if span % 32 == 0 and problem.state <= 64 else 16
        mode, own = ADJOINT, forward_config(problem, adjoint_lanes(problem, span), 4, tile)
    if problem.dtype != "float32" and ceil(problem.state, own.lanes) >= 4:
        # with less to do beside exponentials than the scan, it gains by this
        own = dataclasses.replace(own, polynomial=max(2, own.polynomial))
    return mode, own


def _expanding(problem: Problem, config: Config) -> Config | None:
    """Config of the pass that makes the states which enter a backward's tiles; None if the forward kept them all."""
    if problem.direction == "forward" or problem.checkpoint == config.tile:
        return None
    lanes = power_of_two(ceil(problem.state, 8))
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
    if wrong := unfit(problem, config):
        raise ValueError(f"config: {wrong}")
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


def _prepare_entering(
    problem: Problem, config: Config, first: Variant, sizes: dict[str, int]
) -> Callable[[Tensor, dict[str, int]], Tensor]:
    """Fill span_end with the state (or adjoint) that enters each span: one state-only pass and `combine`."""
    splits, span, slots = finer_spans(problem, config)
    sizes = sizes | {"splits": splits, "span": span}
    blocks = block_count(problem, first.config)
    threads = problem.rows * problem.dim * problem.state
    leave = first.kernel().prepare(blocks * slots, first.config.threads, first.shared_bytes, sizes | {"blocks": blocks})
    combine = first.kernel("combine").prepare(ceil(threads, 256), 256, 0, sizes)

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
    span = segment * ceil(128, segment - tile)
    blocks, splits = block_count(problem, expand.config), ceil(problem.length, span)
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
    segments = ceil(problem.length, problem.checkpoint)
    most = max(1, SCRATCH // (4 * problem.dim * problem.state * (problem.checkpoint // config.tile)))
    rows = ceil(problem.batch, ceil(problem.batch, most))
    steps = ceil(segments, ceil(segments, most // rows)) * problem.checkpoint
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
    found["kept"] = per_state * ceil(problem.length, steps), per_state, 0
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
    quads = ceil(ceil(problem.state, lanes) * lanes, 4)
    items = problem.batch * problem.groups * problem.length * quads
    sizes = sizes | {"spread_rows": problem.batch * problem.groups}
    write = scan.kernel("spread").prepare(ceil(items, 256), 256, 0, sizes)

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
    splits, span, slots = spans(problem, config)
    blocks = block_count(problem, config)
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
    blocks = block_count(problem, config)
    windows = _windows(problem, config)
    whole = len(windows) == 1
    parts = [problem if whole else dataclasses.replace(problem, batch=w.rows, length=w.steps) for w in windows]
    slots = [spans(part, config)[2] for part in parts]

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
        splits, span, slots = spans(part, config)
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
