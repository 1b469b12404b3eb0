"""Trials of an op's candidates on a device: what runs in a worker process of tuning, and may be lost with it."""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Callable
from typing import Any

import torch

from . import check, measure
from .gate import Gate
from .profiling import timer
from .profiling.ceilings import ceilings
from .profiling.device import clocks, describe

TIMING = ("median_s", "low_s", "high_s", "runs", "method")  # of a Timing, what tuning uses


class Bench:
    """Judges and times candidates of an op on a device. All that its methods take and return is JSON."""

    def __init__(self, op: str, device: str):
        self.op, self.device = check.find_op(op), describe(device)
        if self.device.kind == "cuda":
            torch.cuda.set_device(self.device.torch)
        self.gate = Gate(self.op, self.device.torch)
        self._problem: Any = None
        self._posed: Any = None
        self._expected: dict[str, torch.Tensor] = {}

    @staticmethod
    def preload() -> None:
        """Import what torch puts off until a first gradient, poisoning or tensor without memory: it takes seconds."""
        importlib.import_module("torch.fx.experimental.symbolic_shapes")
        torch.empty(1, device="meta").normal_()
        with check.poisoned():
            pass

    def compile(self, problem: dict[str, Any], backend: str, config: dict[str, Any], part: int | None = None) -> None:
        """Compile all that judging and timing will launch, as far as is possible without launching.

        part: only what one of the gate's inputs takes, by its number, or with -1 the problem itself.
        """
        module, made, posed = self._candidate(problem, backend, config)
        if (prepare := getattr(module, f"prepare_{posed.direction}", None)) is not None:
            cases = [*self.op.cases.gates(posed), (self.op.cases.posed(posed), posed)]
            for case, each in cases if part is None else [cases[part]]:
                # the very sizes, for Triton's kernels depend on what divides them, but no memory
                arguments, _ = self.op.cases.pose(case.make("meta", seed=0), each, run=False)
                prepare(each, *arguments, made)

    def ready(self, problem: dict[str, Any]) -> None:
        """Make what judging and timing candidates for a problem needs."""
        posed = self.op.problem_type(**problem)
        if posed != self._problem:
            self._problem, self._posed, self._expected = None, None, {}  # free the last one's memory first
            if (other := self.op.cases.opposite(posed)) is not None:
                # its default takes part in judging: nobody's patience is for its compiler
                default = self.op.resolve(other, self.device.torch)
                self.compile(other.key(), default.backend, dataclasses.asdict(default.config))
            self.gate.ready(posed)
            self._posed = self.op.cases.pose(self.op.cases.posed(posed).make(self.device.torch, seed=0), posed)
            self._problem = posed

    def judge(
        self, problem: dict[str, Any], backend: str, config: dict[str, Any], trusted: tuple[str, dict[str, Any]] | None
    ) -> str | None:
        """None, or why the candidate must not win: what the gate says, or that it is wrong at the problem's size.

        There, where float64 would take too long, it must agree with ``trusted``, the first candidate that passed.
        """
        self.ready(problem)
        _, made, posed = self._candidate(problem, backend, config)
        if (reason := self.gate(posed, backend, made)) is not None:
            return reason
        if trusted is not None and not self._expected:
            self._run(trusted[0], self._candidate(problem, *trusted)[1])
            self._expected = {name: t.clone() for name, t in self._posed.results.items()}
        self._run(backend, made)
        if trusted is None:
            return None
        for name, t in self._posed.results.items():
            difference = _distance(t, self._expected[name])
            if not difference <= measure.AGREEMENT[posed.dtype]:
                return f"wrong result: {name} at the problem's own size: {difference:.1e} off"
        return None

    def time(
        self, problem: dict[str, Any], candidates: list[tuple[str, dict[str, Any]]], seconds: float
    ) -> list[dict[str, Any]]:
        """Time candidates in interleaved rounds; those fields of a Timing for each that tuning uses."""
        self.ready(problem)
        # the timer wants strings for names
        calls = {
            str(k): self._call(backend, self._candidate(problem, backend, config)[1])
            for k, (backend, config) in enumerate(candidates)
        }
        timings = timer.compare(calls, self.device, seconds=seconds).values()
        return [{name: getattr(t, name) for name in TIMING} for t in timings]

    def bound(self, problem: dict[str, Any]) -> float:
        """Seconds that the device needs at least."""
        return measure.bounds(self.op.problem_type(**problem), ceilings(self.device))["seconds"]

    def clocks(self) -> dict[str, int]:
        """The device's clocks at this moment, in MHz."""
        return clocks(self.device)

    def ruined(self) -> bool:
        """Whether the device takes no more work from this process, as after a bad address."""
        try:
            self._synchronise()
        except Exception:
            return True
        return False

    def _candidate(self, problem: dict[str, Any], backend: str, config: dict[str, Any]) -> tuple[Any, Any, Any]:
        posed = self.op.problem_type(**problem)
        module = self.op.backend(backend, posed)
        return module, module.Config(**config), posed

    def _call(self, backend: str, config: Any) -> Callable[[], None]:
        run = getattr(self.op.backend(backend, self._problem), self._problem.direction)
        return lambda: run(self._problem, *self._posed.arguments, config)

    def _run(self, backend: str, config: Any) -> None:
        """Fill the results, which start as NaN."""
        for t in self._posed.results.values():
            t.fill_(torch.nan)
        self._call(backend, config)()
        self._synchronise()

    def _synchronise(self) -> None:
        if self.device.kind == "cuda":
            torch.cuda.synchronize(self.device.torch)


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """‖a - b‖ / ‖b‖, in pieces, for the tensors may fill most of the memory; NaN where only one of them is.

    What is NaN in both was not to be written: slots of packed sequences' states that no sequence owns.
    """
    apart = norm = 0.0
    piece = max(1, (1 << 24) * a.shape[-1] // a.numel())
    for x, y in zip(a.split(piece, -1), b.split(piece, -1), strict=True):
        x, y = x.double(), y.double()
        apart += float(torch.where(x.isnan() & y.isnan(), 0.0, x - y).square().sum())
        norm += float(y.nan_to_num(0.0).square().sum())
    return math.sqrt(apart / norm) if norm else math.sqrt(apart)
