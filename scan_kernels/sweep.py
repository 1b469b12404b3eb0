"""Sizes in a row: time and memory along one axis, and the picture of the Mamba paper (arXiv:2312.00752, Figure 8).

Both are built up a size at a time, so that what is done is kept when something stops them. An implementation whose call
takes too long, or that fails, is not tried at larger sizes, and its record says so.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import measure
from .measure import Allowance, Runner
from .op import Op
from .profiling import timer
from .profiling.ceilings import ceilings
from .profiling.device import Device

SECONDS = 0.04  # of sampling for a point of a sweep
TOO_LONG = {"cpu": 0.2, "cuda": 0.1}  # seconds of one call after which larger sizes are not tried
USES = ("inference", "backward")


@dataclasses.dataclass(frozen=True)
class Axis:
    """What grows, from which size to which, each a power of two times the one before; the other sizes stay."""

    name: str  # "length", "dim" or "state"
    first: int
    last: int
    batch: int = 1
    dim: int = 0
    length: int = 0
    state: int = 16

    def sizes(self, full: bool) -> list[int]:
        """Every power of two, or every other, the last always among them."""
        found = [self.last]
        while found[-1] > self.first:
            found.append(max(self.first, found[-1] // (2 if full else 4)))
        return found[::-1]

    def case(self, op: Op, size: int, dtype: str) -> Any:
        """The op's Case of that size."""
        sizes = {"batch": self.batch, "dim": self.dim, "length": self.length, "state": self.state, self.name: size}
        return op.cases.Case(f"{self.name}-{size}", **sizes, dtype=dtype, tags=())

    def title(self, dtype: str) -> str:
        """What stays the same, in words."""
        kept = {"batch": self.batch, "dim": self.dim, "length": self.length, "state": self.state}
        return ", ".join([*(f"{k} {v}" for k, v in kept.items() if k != self.name), dtype])


AXES = {
    "cuda": (Axis("length", 512, 1 << 20, dim=1024), Axis("dim", 128, 1 << 17, length=2048),
             Axis("state", 1, 256, dim=2048, length=4096)),
    "cpu": (Axis("length", 512, 1 << 20, dim=16), Axis("dim", 16, 4096, length=512),
            Axis("state", 1, 256, dim=128, length=512)),
}  # fmt: skip
DTYPE = {"cuda": "bfloat16", "cpu": "float32"}


class Patience:
    """Who is still tried: nobody whose last call took too long, or who failed."""

    def __init__(self, most_s: float):
        self.most_s = most_s
        self.why: dict[tuple[str, str], str] = {}

    def note(self, record: dict[str, Any], size: int) -> None:
        """Learn from a record."""
        key = record["runner"], record["use"]
        if record.get("median_s", 0.0) > self.most_s:
            self.why[key] = f"took {record['median_s']:.2g} s at {size}; larger sizes are not tried"
        elif "reason" in record:
            self.why.setdefault(key, record["reason"])


def sweeps(
    op: Op, device: Device, runners: list[Runner], slow_s: float, full: bool, done: list[dict[str, Any]]
) -> Iterator[list[dict[str, Any]]]:
    """Every axis with its points so far, after each point; begins with what is done.

    slow_s: seconds for slow implementations on each axis. full: every power of two, else every other.

    An axis is {axis, title, points}; a point {size, uses, results}, or {size, reason} where its tensors do not fit. A
    result is one of ``measure.results``, or {runner, kind, use: "step", peak_bytes} along the length.
    """
    dtype = DTYPE[device.kind]
    known = {axis["axis"]: axis for axis in done}
    found = [known.get(a.name, {"axis": a.name, "title": a.title(dtype), "points": []}) for a in AXES[device.kind]]
    for axis, record in zip(AXES[device.kind], found, strict=True):
        patience, allowance = Patience(TOO_LONG[device.kind]), Allowance(slow_s)
        measured = {point["size"] for point in record["points"]}
        for point in record["points"]:
            for result in point.get("results", ()):
                patience.note(result, point["size"])
        for size in (s for s in axis.sizes(full) if s not in measured):
            record["points"].append(_point(op, axis, size, device, runners, allowance, patience))
            yield found


def _point(
    op: Op, axis: Axis, size: int, device: Device, runners: list[Runner], allowance: Allowance, patience: Patience
) -> dict[str, Any]:  # fmt: skip
    case = axis.case(op, size, DTYPE[device.kind])
    point: dict[str, Any] = {"size": size}
    point["uses"] = {use: measure.bounds(case.used(use, device.kind), ceilings(device)) for use in USES}
    point["results"] = []
    try:
        tensors = case.make(device.torch)
    except torch.OutOfMemoryError:
        return {"size": size, "reason": "its tensors do not fit in memory"}
    for use in USES:
        tried = [dataclasses.replace(r, unfit=_patient(r, use, patience)) for r in runners]
        for record in measure.results(op, case, tensors, tried, device, SECONDS, (use,), allowance):
            patience.note(record, size)
            point["results"].append(record)
    if axis.name == "length":
        for r in runners:
            record = {"runner": r.name, "kind": r.kind, "use": "step"}
            # only who has just been timed: the others take too long, or do not fit
            if not any("median_s" in p for p in point["results"] if p["runner"] == r.name and p["use"] == "backward"):
                continue
            try:
                taken = measure.peak(measure.call(r.scan, tensors, op.cases.ARGUMENTS, "step"), device)
            except Exception as e:
                record["reason"] = measure.words(e)
            else:
                if taken is not None:
                    record["peak_bytes"] = taken
            point["results"].append(record)
    return point


def _patient(runner: Runner, use: str, patience: Patience) -> Callable[[Any], str | None]:
    return lambda problem: patience.why.get((runner.name, use)) or runner.unfit(problem)


# ---- Figure 8 --------------------------------------------------------------------------------------------------------

HEAD = 64  # channels of a head of attention
FIGURE = {"cuda": Axis("length", 512, 1 << 20, dim=1024), "cpu": Axis("length", 512, 1 << 14, dim=64)}
FIGURE_TOO_LONG = {"cpu": 0.5, "cuda": 1.5}
FIGURE_USES = ("inference", "step")
# the paper's is written in PyTorch; what torch.compile writes anew for each length would take most of the time
FIGURE_PEERS = ("mamba_ssm", "mambapy", "plain torch")
OPERATIONS = {
    "attention": "torch's scaled_dot_product_attention, causal, heads of 64; FlashAttention on a GPU",
    "convolution": "as long as the sequence, by torch's FFT in float32",
}


def figure8(
    op: Op, device: Device, runners: list[Runner], done: list[dict[str, Any]]
) -> Iterator[list[dict[str, Any]]]:
    """The points so far, after each length: {size, results}, as in ``sweeps``, for the scans and for other operations.

    Every scan gets the same tensors; attention and convolution get as many elements of the same dtype.
    Uses are ``inference`` and ``step``. Errors: RuntimeError if attention or convolution computes something else.
    """
    axis, points = FIGURE[device.kind], list(done)
    patience = Patience(FIGURE_TOO_LONG[device.kind])
    _check_operations(device)
    for point in points:
        for result in point["results"]:
            patience.note(result, point["size"])
    for size in (s for s in axis.sizes(full=True) if s not in {p["size"] for p in points}):
        case = axis.case(op, size, DTYPE[device.kind])
        results: list[dict[str, Any]] = []
        for use in FIGURE_USES:
            tried = [dataclasses.replace(r, unfit=_patient(r, use, patience)) for r in runners]
            # its own tensors, for they take half of the memory at the longest
            try:
                tensors = case.make(device.torch)
                results += _scans(op, case, tensors, tried, device, use)
                del tensors
            except torch.OutOfMemoryError:
                why = "its tensors do not fit in memory"
                results += [{"runner": r.name, "kind": r.kind, "use": use, "reason": why} for r in runners]
            for name in OPERATIONS:
                known = patience.why.get((name, use))
                reason, timing = (known, None) if known else _operation(name, case, device, use)
                record = {"runner": name, "kind": "operation", "use": use}
                results.append(record | ({"reason": reason} if timing is None else dataclasses.asdict(timing)))
        for record in results:
            patience.note(record, size)
        points.append({"size": size, "results": results})
        yield points


def _scans(op: Op, case: Any, tensors: dict[str, Any], runners: list[Runner], device: Device, use: str):
    if use == "inference":  # where results are held against each other
        return list(measure.results(op, case, tensors, runners, device, SECONDS, (use,)))
    backward = case.used("backward", device.kind)
    found = []
    for r in runners:
        record: dict[str, Any] = {"runner": r.name, "kind": r.kind, "use": use}
        if why := r.unfit(backward):
            found.append(record | {"reason": why})
            continue
        try:
            call = measure.call(r.scan, tensors, op.cases.ARGUMENTS, use)
            found.append(record | dataclasses.asdict(timer.measure(call, device, seconds=SECONDS)))
        except Exception as e:
            found.append(record | {"reason": measure.words(e)})
        if device.kind == "cuda":
            torch.cuda.empty_cache()
    return found


def _operation(name: str, case: Any, device: Device, use: str) -> tuple[str, Any]:
    """("", its timing) of attention or convolution, or (why there is none, None)."""
    make = {"attention": attention, "convolution": convolution}[name]
    try:
        run, leaves = make(case.batch, case.dim, case.length, getattr(torch, case.dtype), device)
        call: Callable[[], Any] = run
        if use == "step":
            dout = torch.ones_like(run())
            for leaf in leaves:
                leaf.requires_grad_()
            call = lambda: torch.autograd.grad(run(), leaves, dout)  # noqa: E731
        return "", timer.measure(call, device, seconds=SECONDS)
    except Exception as e:
        return measure.words(e), None
    finally:
        if device.kind == "cuda":
            torch.cuda.empty_cache()


Operation = tuple[Callable[[], Tensor], list[Tensor]]  # a call, and the tensors it takes


def attention(batch: int, dim: int, length: int, dtype: torch.dtype, device: Device) -> Operation:
    """Causal attention over (batch, dim / HEAD, length, HEAD), by FlashAttention where that is to be had."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    shape = batch, dim // HEAD, length, HEAD
    q, k, v = (torch.randn(shape, dtype=dtype, device=device.torch) for _ in range(3))

    def run() -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if device.kind == "cuda" else contextlib.nullcontext():
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return run, [q, k, v]


def convolution(batch: int, dim: int, length: int, dtype: torch.dtype, device: Device) -> Operation:
    """A causal convolution of (batch, dim, length) with (dim, length), each channel with its own, by FFT."""
    u = torch.randn(batch, dim, length, dtype=dtype, device=device.torch)
    kernel = torch.randn(dim, length, device=device.torch) / length**0.5

    def run() -> Tensor:
        spectrum = torch.fft.rfft(u.float(), n=2 * length) * torch.fft.rfft(kernel, n=2 * length)
        return torch.fft.irfft(spectrum, n=2 * length)[..., :length].to(u.dtype)

    return run, [u, kernel]


def _check_operations(device: Device) -> None:
    """Hold both against what they are by definition, before they are timed."""
    dtype, length = getattr(torch, DTYPE[device.kind]), 200
    run, (q, k, v) = attention(1, 2 * HEAD, length, dtype, device)
    scores = (q.double() @ k.double().transpose(-1, -2)) / HEAD**0.5
    later = torch.ones(length, length, dtype=torch.bool, device=device.torch).triu(1)
    exact = {"attention": (run(), scores.masked_fill(later, -torch.inf).softmax(-1) @ v.double())}
    run, (u, kernel) = convolution(1, 4, length, dtype, device)
    lags = torch.arange(length, device=device.torch)[:, None] - torch.arange(length, device=device.torch)
    matrix = kernel.double()[:, lags.clamp(min=0)] * (lags >= 0)
    exact["convolution"] = run(), torch.einsum("dts,bds->bdt", matrix, u.double())
    for name, (got, right) in exact.items():
        error = float((got.double() - right).norm() / right.norm())
        if not error <= measure.AGREEMENT[DTYPE[device.kind]]:
            raise RuntimeError(f"{name} is off by {error:.1e} in norm: it cannot be compared with")
