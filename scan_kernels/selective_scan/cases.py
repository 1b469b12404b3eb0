"""Named selective-scan problems that tests, check, tuner and report all read, and how each is run and judged.

Tags: ``ci`` small, for every machine; ``gpu`` larger, for a GPU; ``bench-gpu``, ``bench-cpu`` what speed is reported
on; ``tune-gpu``, ``tune-cpu`` what ``tune`` tunes by default; ``tune-table`` what the tables that are shipped hold;
``tune-small`` what it tries itself out on.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference import selective_scan as float64_scan
from ..reference import selective_scan_backward as float64_backward
from . import OP, selective_scan
from .plan import allocate, gradient_rooms, normal_form, output_rooms
from .problem import MAX_STATE, Cotangents, Gradients, Inputs, Kept, Outputs, Problem, default_checkpoint

Tensors = dict[str, Any]
# how a scan is used, and the direction it runs in: each is a problem of its own
USES = {"inference": "forward", "prefill": "forward", "training": "forward", "backward": "backward"}
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
ARGUMENTS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
SUMS = ("dA", "dB", "dC", "dD", "ddelta_bias")  # added up in any order, unless the problem is deterministic


@dataclasses.dataclass(frozen=True)
class Case:
    """A problem with a name, and how its tensors are drawn."""

    name: str
    batch: int = 2
    dim: int = 12
    length: int = 67
    state: int = 16
    groups: int = 1
    dtype: str = "float32"
    layout: str = "length"
    constant_B: bool = False
    constant_C: bool = False
    D: bool = True
    z: bool = True
    bias: bool = True
    softplus: bool = True
    initial_state: bool = False
    lengths: tuple[int, ...] = ()  # packed sequences; length is then their sum and batch 1
    offset: int = 0  # elements by which u, delta, z, B, C are shifted off their allocation's start
    pitch: int = 0  # elements of NaN between rows of u, delta, z, B, C and dout, times 1, 2, ...: no two strides agree
    special: str = ""  # "", or how the values are made hard: see ``make``
    tags: tuple[str, ...] = ("ci",)

    def problem(self, direction: str = "forward", device: str = "cpu", training: bool = False) -> Problem:
        """The Problem this case poses; training: the state is kept for a backward."""
        return Problem(
            direction=direction, batch=1 if self.lengths else self.batch, dim=self.dim,
            length=sum(self.lengths) or self.length, state=self.state, groups=self.groups, dtype=self.dtype,
            layout=self.layout, device=device, sequences=len(self.lengths), constant_B=self.constant_B,
            constant_C=self.constant_C, has_D=self.D, has_z=self.z, has_bias=self.bias, softplus=self.softplus,
            has_initial_state=self.initial_state,
            checkpoint=default_checkpoint(self.state) if training or direction == "backward" else 0,
        )  # fmt: skip

    def used(self, use: str, device: str = "cpu") -> Problem:
        """The Problem of one of ``USES``."""
        problem = self.problem(USES[use], device, training=use == "training")
        return dataclasses.replace(problem, has_last_state=use == "prefill")

    def gates(self) -> list[Case]:
        """Small cases of the same kind, on which a candidate for this one is judged. None has its sizes.

        Of odd length over several tiles, with rows at odd distances; of a length that any tile divides, its rows at
        even ones; and with steps so small and so large that states stand still or vanish.
        """
        cut = dataclasses.replace(self, batch=2, dim=self.groups * -(-40 // self.groups), offset=0, tags=())
        kinds: list[tuple[int, tuple[int, ...], dict[str, Any]]] = [
            (337, (101, 0, 1, 235), {"name": "odd length", "pitch": 3}),
            (256, (128, 0, 64, 64), {"name": "even length", "pitch": 16}),
            (208, (97, 0, 111), {"name": "extreme steps", "special": "extreme_delta"}),
        ]
        return [
            dataclasses.replace(cut, length=length, lengths=self.lengths and lengths, **more)
            for length, lengths, more in kinds
        ]

    def make(self, device: torch.device | str = "cpu", seed: int | None = None) -> Tensors:
        """Fresh random arguments of ``selective_scan`` by name, with ``dout`` and ``dlast_state``.

        Values are those of a Mamba layer at initialisation: A = -(1 .. N) with noise, Δ between 0.001 and 0.1. On the
        device "meta" the tensors have no values and take no memory, but lie alike.
        """
        device = torch.device(device)
        distances = itertools.count(self.pitch, self.pitch)
        generator = torch.Generator("cpu" if device.type == "meta" else device)
        generator.manual_seed(torch.seed() % 2**63 if seed is None else seed)
        dtype = getattr(torch, self.dtype)
        batch, length = (1, sum(self.lengths)) if self.lengths else (self.batch, self.length)
        dim, state = self.dim, self.state
        rows = len(self.lengths) or batch

        def normal(*shape):
            return torch.randn(shape, generator=generator, device=device)

        def uniform(low, high, *shape):
            return torch.rand(shape, generator=generator, device=device) * (high - low) + low

        def stored(t: Tensor) -> Tensor:
            """t in the case's dtype, its storage shifted by ``offset`` elements, its rows that of ``pitch`` apart."""
            gap = next(distances)
            if not (self.offset or gap):
                return t.to(dtype)
            *outer, row = t.shape
            room = torch.full((self.offset + math.prod(outer) * (row + gap),), torch.nan, dtype=dtype, device=device)
            return room[self.offset :].view(*outer, row + gap)[..., :row].copy_(t)

        def sequence(t: Tensor) -> Tensor:
            """(batch, dim, length) in the case's layout."""
            return stored(t) if self.layout == "length" else stored(t.transpose(1, 2).contiguous()).transpose(1, 2)

        dt = torch.exp(uniform(np.log(1e-3), np.log(0.1), dim, 1))
        raw = torch.log(torch.expm1(dt)) if self.softplus else dt
        A = -torch.arange(1, state + 1, device=device).float().expand(dim, state) * (1 + 0.1 * normal(dim, state))
        delta = 0.5 * normal(batch, dim, length) if self.softplus else dt * uniform(0, 1, batch, dim, length)
        if not self.bias:
            delta = delta + raw
        u, z = normal(batch, dim, length), normal(batch, dim, length)
        B, C = (
            normal(dim, state) if constant else normal(batch, self.groups, state, length)
            for constant in (self.constant_B, self.constant_C)
        )
        if self.special == "zero_A":
            A = torch.zeros_like(A)
        elif self.special == "growing":
            A = -A / state
        elif self.special == "underflow":
            # every other state: if all vanished, the largest decay's last bit would be all of an error
            A[:, ::2] *= 1e4
        elif self.special == "extreme_delta":
            delta = uniform(-90 if self.softplus else 0, 60, batch, dim, length)
        elif self.special == "nan_u":
            u[-1, dim // 2, length // 2] = torch.nan
        elif self.special == "inf_delta":
            delta[0, 1, length // 3] = torch.inf
        elif self.special == "nan_B":
            B[-1, 0, state // 2, length // 2] = torch.nan
        elif self.special == "inf_z":
            z[0, 0, length // 2] = torch.inf
        tensors = {
            "u": sequence(u), "delta": sequence(delta), "A": A.contiguous(),
            "B": B if self.constant_B else stored(B), "C": C if self.constant_C else stored(C),
            "D": normal(dim) if self.D else None, "z": sequence(z) if self.z else None,
            "delta_bias": raw.flatten().contiguous() if self.bias else None,
            "initial_state": normal(rows, dim, state) if self.initial_state else None,
            "delta_softplus": self.softplus, "cu_seqlens": None,
            "dout": sequence(normal(batch, dim, length)), "dlast_state": normal(rows, dim, state),
        }  # fmt: skip
        if self.lengths:
            offsets = np.concatenate([[0], np.cumsum(self.lengths)])
            tensors["cu_seqlens"] = torch.tensor(offsets, dtype=torch.int32, device=device)
        return tensors


def judge(tensors: Tensors) -> dict[str, np.ndarray]:
    """Outputs and gradients of the float64 reference, named as ``candidate`` names them."""
    t = {k: v.detach().to("cpu", torch.float64).numpy() if isinstance(v, Tensor) else v for k, v in tensors.items()}
    dout, dlast = t.pop("dout"), t.pop("dlast_state")
    out, last = float64_scan(**t)
    gradients = float64_backward(dout, dlast, **t)
    return {"out": out, "last_state": last, **{f"d{k}": v for k, v in gradients.items()}}


def candidate(tensors: Tensors, backend: str, config: Any = None, deterministic: bool = False) -> dict[str, Tensor]:
    """Outputs and gradients of one backend through the public function."""
    return _run(tensors, selective_scan, backend=backend, config=config, deterministic=deterministic)


def posed(problem: Problem) -> Case:
    """A case that poses the problem; packed sequences as equal as can be."""
    p = problem
    each, more = divmod(p.length, p.sequences or 1)
    return Case(
        f"{p.batch}x{p.dim}x{p.length}", batch=p.batch, dim=p.dim, length=p.length, state=p.state, groups=p.groups,
        dtype=p.dtype, layout=p.layout, constant_B=p.constant_B, constant_C=p.constant_C, D=p.has_D, z=p.has_z,
        bias=p.has_bias, softplus=p.softplus, initial_state=p.has_initial_state,
        lengths=tuple(each + (k < more) for k in range(p.sequences)), tags=(),
    )  # fmt: skip


def gates(problem: Problem) -> list[tuple[Case, Problem]]:
    """Small problems of the same kind, on which a candidate for this one is judged: see ``Case.gates``."""
    last = problem.has_last_state or problem.checkpoint > 0
    return [
        (case, dataclasses.replace(
            problem, batch=1 if case.lengths else case.batch, dim=case.dim, length=case.length,
            sequences=len(case.lengths), has_last_state=last,
        ))
        for case in posed(problem).gates()
    ]  # fmt: skip


def opposite(problem: Problem) -> Problem | None:
    """The problem whose kernels take part in judging this one's: of the other direction, if there is one."""
    other = "backward" if problem.direction == "forward" else "forward"
    return dataclasses.replace(problem, direction=other) if problem.checkpoint else None


class Posed(NamedTuple):
    """A problem's tensors as a backend gets them."""

    arguments: tuple[Any, ...]  # of the backend's forward or backward, between problem and config
    results: dict[str, Tensor]  # what it fills, by name


def pose(tensors: Tensors, problem: Problem, allocate: Callable = allocate, run: bool = True) -> Posed:
    """Lay a problem out for a backend, in memory of ``allocate``.

    What a backward gets from its forward is made by the default; not if it is not to ``run``.
    """
    i = normal_form([tensors[name] for name in Inputs._fields])
    last = problem.has_last_state
    rooms = output_rooms(i.u, i.A, i.cu_seqlens, last, problem.checkpoint, problem.keep_y)
    outputs = Outputs._make(allocate(i.u, i.A, rooms))
    if problem.direction == "forward":
        return Posed((i, outputs), _present(outputs))
    if run:
        forward = dataclasses.replace(problem, direction="forward")
        chosen = OP.resolve(forward, i.u.device)
        chosen.module.forward(forward, i, outputs, chosen.config)
    return _backward(tensors, problem, i, outputs, allocate)


def _backward(tensors: Tensors, problem: Problem, i: Inputs, outputs: Outputs, allocate: Callable) -> Posed:
    assert outputs.states is not None
    cotangents = Cotangents(tensors["dout"], tensors["dlast_state"] if problem.has_last_state else None)
    gradients = Gradients._make(allocate(i.u, i.A, gradient_rooms(i)))
    return Posed((i, Kept(outputs.states, outputs.y), cotangents, gradients), _present(gradients))


def _present(made: Any) -> dict[str, Tensor]:
    return {name: t for name, t in made._asdict().items() if t is not None}


def outcome(
    tensors: Tensors, problem: Problem, backend: str, config: Any, allocate: Callable = allocate
) -> dict[str, Tensor]:
    """All that a backend fills in the problem's direction. A forward that keeps something for a backward is judged by
    the gradients, too, that the default makes of it.
    """
    arguments, found = pose(tensors, problem, allocate)
    i, *made = arguments
    getattr(OP.backends[backend], problem.direction)(problem, *arguments, config)
    if problem.direction == "forward" and problem.checkpoint:
        backward = dataclasses.replace(problem, direction="backward")
        given, gradients = _backward(tensors, backward, i, made[0], allocate)
        chosen = OP.resolve(backward, tensors["u"].device)
        chosen.module.backward(backward, *given, chosen.config)
        found |= gradients
    return found


def parse(text: str, dtype: str) -> Case:
    """A Mamba layer's scan from "batch,dim,length,state[,dtype]"; ValueError that says what was expected."""
    parts = [p.strip() for p in text.split(",")]
    kind = DTYPES.get(parts[4], parts[4]) if len(parts) == 5 else dtype
    sizes = [int(p) for p in parts[:4] if p.isdecimal()]
    known = len(parts) in (4, 5) and len(sizes) == 4 and kind in DTYPES.values()
    if not known or min(sizes) < 1 or sizes[3] > MAX_STATE:
        expected = f"batch,dim,length,state[,{'|'.join(DTYPES)}] with sizes from 1 and at most {MAX_STATE} states"
        raise ValueError(f"expected the name of a case, or {expected}; got {text!r}")
    batch, dim, length, state = sizes
    return Case(text, batch=batch, dim=dim, length=length, state=state, dtype=kind, tags=())


# what ``drawn`` draws from, on a GPU and on a CPU: channels, batch sizes, most steps, most elements
DRAWN = {
    "cuda": ((1536, 2048, 3072, 4096, 5120), (1, 1, 2, 3, 4, 8, 16, 64), 1 << 17, 1 << 27),
    "cpu": ((64, 192, 512, 768, 1536), (1, 2, 3), 1 << 11, 1 << 20),
}
STATES = (8, 16, 16, 16, 32, 64, 128, 256)


def drawn(count: int, seed: int, device: str) -> list[Problem]:
    """Different problems of Mamba layers, drawn at random: the same for the same seed."""
    draw = random.Random(seed)
    dims, batches, longest, most = DRAWN[device]
    found: dict[Problem, None] = {}
    while len(found) < count:
        dim, batch = draw.choice(dims), draw.choice(batches)
        length = round(2 ** draw.uniform(6, math.log2(longest)))
        if draw.random() < 0.7:
            length = max(64, length // 64 * 64)
        use, dtype = draw.choice(list(USES)), draw.choice(("bfloat16", "bfloat16", "float16", "float32"))
        state, layout = draw.choice(STATES), draw.choice(("length", "dim"))
        if batch * dim * length * max(1, state // 16) <= most:
            case = Case("", batch=batch, dim=dim, length=length, state=state, dtype=dtype, layout=layout)
            found[case.used(use, device)] = None
    return list(found)


# what a shape leaves open: the fields of a Problem that a user may set for tuning
SETTINGS = (
    "groups", "layout", "sequences", "constant_B", "constant_C", "has_D", "has_z", "has_bias", "softplus",
    "has_initial_state", "deterministic",
)  # fmt: skip
WORDS = {"yes": True, "no": False}


def setting(text: str) -> tuple[str, Any]:
    """(field, value) from "field=value"; ValueError that says what was expected."""
    name, _, value = text.partition("=")
    if name not in SETTINGS:
        raise ValueError(f"expected one of {', '.join(SETTINGS)}, and =value; got {text!r}")
    if name == "layout":
        if value not in ("length", "dim"):
            raise ValueError(f"expected layout=length or layout=dim, got {text!r}")
        return name, value
    if name in ("groups", "sequences"):
        if not value.isdecimal() or int(value) < (name == "groups"):
            raise ValueError(f"expected a whole number, got {text!r}")
        return name, int(value)
    if value not in WORDS:
        raise ValueError(f"expected {name}=yes or {name}=no, got {text!r}")
    return name, WORDS[value]


def adapted(problem: Problem, settings: dict[str, Any]) -> Problem:
    """The problem with some fields set; ValueError where they do not go together."""
    made = dataclasses.replace(problem, **settings)
    if made.dim % made.groups:
        raise ValueError(f"expected groups that divide dim={made.dim}, got {made.groups}")
    if made.sequences:
        made = dataclasses.replace(made, batch=1, length=problem.batch * problem.length)
    return made


def spelled(problem: Problem) -> str:
    """The options of ``scan-kernels tune`` that tune this problem."""
    short = {long: name for name, long in DTYPES.items()}[problem.dtype]
    usual = Case("").problem(problem.direction)
    words = {value: word for word, value in WORDS.items()}
    settings = [
        f"{name}={words[value] if isinstance(value, bool) else value}"
        for name in SETTINGS
        if (value := getattr(problem, name)) != getattr(usual, name)
    ]
    shape = f"--shapes {problem.batch},{problem.dim},{problem.length},{problem.state},{short}"
    return " ".join([shape, f"--direction {problem.direction}", *(["--set", *settings] if settings else [])])


def baseline(tensors: Tensors) -> dict[str, Tensor]:
    """Outputs and gradients of ``plain``: what accuracy and speed are compared with."""
    return _run(tensors, plain)


def _run(tensors: Tensors, function, **options) -> dict[str, Tensor]:
    given = dict(tensors)
    dout, dlast = given.pop("dout"), given.pop("dlast_state")
    leaves = {k: given[k].detach().requires_grad_() for k in ARGUMENTS if given[k] is not None}
    out, last = function(**{**given, **leaves}, return_last_state=True, **options)
    gradients = torch.autograd.grad((out, last), list(leaves.values()), (dout, dlast))
    found = {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return {"out": out.detach(), "last_state": last.detach()} | found


def plain(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False, *,
    initial_state=None, cu_seqlens=None,
):  # fmt: skip
    """The textbook loop in PyTorch: float32 state, everything else rounded to the dtype of u; gradients by autograd.

    Same arguments and result as ``selective_scan``. This is what a user would write, and the yardstick of the
    error allowance; it materialises (batch, dim, length, state) through autograd and is slow.
    """
    dtype, dim, length = u.dtype, u.shape[1], u.shape[2]
    x, dt = u.float(), delta.float()
    if delta_bias is not None:
        dt = dt + delta_bias[:, None]
    if delta_softplus:
        dt = F.softplus(dt)

    def steps(M: Tensor) -> list[Tensor]:
        """M at every step, broadcastable to (batch, dim, state); by one unbind, for slices make autograd quadratic."""
        if M.ndim == 2:
            return [M] * length
        groups = M.unsqueeze(1) if M.ndim == 3 else M
        return [m.float().repeat_interleave(dim // m.shape[1], dim=1) for m in groups.unbind(3)]

    xs, dts, Bs, Cs = x.unbind(2), dt.unbind(2), steps(B), steps(C)
    offsets = [0, length] if cu_seqlens is None else cu_seqlens.tolist()
    ys, lasts = [], []
    for i, (start, stop) in enumerate(itertools.pairwise(offsets)):
        h = x.new_zeros(x.shape[0], dim, A.shape[1])
        if initial_state is not None:
            h = initial_state if cu_seqlens is None else initial_state[i : i + 1]
        for t in range(start, stop):
            h = torch.exp(dts[t][..., None] * A) * h + (dts[t] * xs[t])[..., None] * Bs[t]
            ys.append((h * Cs[t]).sum(-1))
        lasts.append(h)
    y = torch.stack(ys, dim=2) if ys else torch.zeros_like(x)
    if D is not None:
        y = y + D[:, None] * x
    if z is not None:
        y = y * F.silu(z)
    out = y.to(dtype)
    return (out, torch.cat(lasts)) if return_last_state else out


def _ci() -> list[Case]:
    flags = ("D", "z", "bias", "softplus")

    def given(bits: int) -> dict[str, Any]:
        return {f: bool(bits >> i & 1) for i, f in enumerate(flags)}

    cases = [Case(f"{dtype}", dtype=dtype) for dtype in ("float32", "bfloat16", "float16")]
    cases += [
        Case("flags-" + ("".join(f[0] for f in flags if given(bits)[f]) or "none"), length=33, dim=5, **given(bits))
        for bits in range(15)
    ]
    cases += [Case(f"state-{n}", state=n, length=41, dim=5, dtype=t)
              for n, t in ((1, "float32"), (3, "bfloat16"), (8, "float32"), (24, "float16"), (32, "float32"),
                           (40, "bfloat16"), (64, "float32"), (100, "float32"), (128, "bfloat16"),
                           (256, "float32"))]  # fmt: skip
    cases += [Case(f"length-{n}", length=n, dim=9, dtype=t, layout=layout)
              for n, t, layout in ((1, "float32", "length"), (2, "bfloat16", "dim"), (16, "float32", "length"),
                                   (64, "bfloat16", "length"), (127, "float32", "dim"), (211, "bfloat16", "length"),
                                   (307, "float32", "length"))]  # fmt: skip
    return [
        *cases,
        Case("dim-contiguous", layout="dim", dim=24),
        Case("dim-contiguous-bf16", layout="dim", dim=72, dtype="bfloat16"),
        Case("dim-1", dim=1),
        Case("state-1-dim", state=1, layout="dim", length=53),
        Case("dim-130", dim=130, length=50, dtype="bfloat16"),
        Case("groups", groups=3, length=50),
        Case("groups-dim", groups=4, layout="dim", dtype="bfloat16"),
        Case("constant-B", constant_B=True),
        Case("constant-C", constant_C=True, dtype="bfloat16"),
        Case("constant-BC", constant_B=True, constant_C=True, layout="dim"),
        Case("initial-state", initial_state=True),
        Case("initial-state-dim-bf16", initial_state=True, layout="dim", dtype="bfloat16", state=9),
        Case("packed", lengths=(31, 0, 1, 64, 17), initial_state=True),
        Case("packed-dim-bf16", lengths=(5, 130, 0, 0, 3, 33), layout="dim", dtype="bfloat16", dim=20),
        Case("packed-length-bf16", lengths=(5, 130, 12, 33), dtype="bfloat16", dim=20, initial_state=True),
        Case("packed-one", lengths=(70,), groups=2),
        Case("misaligned", offset=1, dtype="bfloat16", length=64),
        Case("misaligned-dim", offset=3, layout="dim", dtype="bfloat16", dim=16),
        Case("misaligned-fp32", offset=1, length=64),
        Case("zero-A", special="zero_A"),
        Case("growing", special="growing", length=130),
        Case("underflow", special="underflow", initial_state=True),
        Case("extreme-delta", special="extreme_delta", bias=False),
        Case("extreme-delta-bf16", special="extreme_delta", dtype="bfloat16"),
        Case("nan-u", special="nan_u"),
        Case("nan-u-bf16", special="nan_u", dtype="bfloat16", layout="dim", dim=40),
        Case("nan-B", special="nan_B", groups=2, dtype="bfloat16"),
        Case("inf-delta", special="inf_delta"),
        Case("inf-z", special="inf_z", dtype="float16"),
    ]


def _gpu() -> list[Case]:
    cases = [
        Case("mamba-bf16", dim=1536, length=513, dtype="bfloat16"),
        Case("mamba-aligned-bf16", dim=768, length=1024, dtype="bfloat16"),
        Case("mamba-dim-bf16", dim=768, length=1024, dtype="bfloat16", layout="dim"),
        Case("mamba-fp32", dim=256, length=512),
        Case("mamba-fp16", dim=256, length=512, dtype="float16"),
        Case("long-row", batch=1, dim=32, length=9000, dtype="bfloat16"),
        Case("long-row-dim", batch=1, dim=40, length=6001, layout="dim", initial_state=True),
        Case("long-packed", dim=64, lengths=(1, 3000, 0, 777, 2048, 5), dtype="bfloat16", initial_state=True),
        Case("long-packed-dim", dim=64, lengths=(1500, 8, 1027), dtype="bfloat16", layout="dim"),
        Case("wide-state", dim=64, length=300, state=128, dtype="bfloat16"),
        Case("wide-state-256", batch=1, dim=32, length=2100, state=256, dtype="bfloat16"),
        Case("groups-8", dim=512, length=300, groups=8, dtype="bfloat16"),
        Case("many-rows", batch=70, dim=48, length=19, dtype="bfloat16"),
    ]
    return [dataclasses.replace(c, tags=("gpu",)) for c in cases]


def _bench() -> list[Case]:
    gpu = [(8, 5120, 2048), (64, 1536, 512), (1, 5120, 4096), (1, 2048, 65536), (1, 1024, 524288)]
    named = [
        Case(f"{b}x{d}x{n}", batch=b, dim=d, length=n, dtype="bfloat16", tags=("bench-gpu", "tune-gpu", "tune-table"))
        for b, d, n in gpu
    ]
    models = [(1, 1536, 2048), (16, 1536, 2048), (1, 5120, 2048), (4, 5120, 2048), (1, 1536, 16384)]
    named += [
        Case(f"{b}x{d}x{n}", batch=b, dim=d, length=n, dtype="bfloat16", tags=("tune-gpu", "tune-table"))
        for b, d, n in models
    ]
    # one layer alone and a batch that fills a GPU, for what the shapes above are not
    few, many = (1, 1536, 4096), (8, 2048, 2048)
    others: list[dict[str, Any]] = [
        *({"dtype": t} for t in ("float16", "float32")),
        {"layout": "dim"},
        *({"state": n} for n in (8, 32, 64, 128, 256)),
        *({"state": n, "dtype": t} for t in ("float16", "float32") for n in (8, 32, 64, 128, 256)),
    ]
    named += [
        Case("-".join((f"{b}x{d}x{n}", *map(str, other.values()))), batch=b, dim=d, length=n,
             **{"dtype": "bfloat16"} | other, tags=("tune-table",))
        for other in others for b, d, n in (few, many)
    ]  # fmt: skip
    return [
        *named,
        Case("1x1536x2048-fp32", batch=1, dim=1536, length=2048, tags=("bench-cpu", "tune-cpu")),
        Case("2x24x200-fp32", dim=24, length=200, tags=("tune-small",)),
        Case("4x768x512-fp32", batch=4, dim=768, length=512, tags=("bench-cpu", "tune-cpu")),
        Case("1x256x16384-fp32", batch=1, dim=256, length=16384, tags=("bench-cpu", "tune-cpu")),
    ]


CASES: tuple[Case, ...] = (*_ci(), *_gpu(), *_bench())


def tagged(tag: str) -> list[Case]:
    """The cases that carry a tag, in order."""
    return [c for c in CASES if tag in c.tags]
