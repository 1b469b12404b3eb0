"""Whether a candidate is right: asked before anybody asks how fast it is.

On small problems of its kind (``cases.gates``), twice each, a candidate must

    agree with the float64 reference, as ``check`` has it, from outputs and scratch memory filled with NaN;
    write nothing outside its outputs, which lie between guard bands, and leave its inputs as they were;
    give the same bits again: all of them where the problem is deterministic, else all but sums that may be added up
    in any order.

Inputs lie between bands of NaN, too, so that what is read beside them shows in the results.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import check
from .op import ALIGNMENT, Op

GUARD = 1 << 16  # bytes on either side of a tensor: some tiles or rows of any kernel
FILL = 0xFF  # of guards and outputs: NaN in every float type, and an index that is out of range in every integer type


class Fence:
    """Memory whose surroundings are watched."""

    def __init__(self) -> None:
        self._rooms: list[
            tuple[Tensor, int, int, tuple[int, ...]]
        ] = []  # all bytes, the tensor's first and last, shape
        self._copies: list[tuple[str, Tensor, Tensor]] = []  # name, all bytes, and what they must still be

    def empty(self, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype, device: Any, shift: int = 0):
        """A tensor full of NaN; shift: bytes by which its address misses a multiple of the guard's alignment."""
        size = dtype.itemsize * (1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))) if all(shape) else 0
        begin, end = GUARD + shift, GUARD + shift + size
        room = torch.full((end + GUARD,), FILL, dtype=torch.uint8, device=device)
        self._rooms.append((room, begin, end, tuple(shape)))
        return room[begin:end].view(dtype).as_strided(tuple(shape), tuple(strides))

    def copy(self, t: Tensor, name: str) -> Tensor:
        """A copy, not to be written to, that lies as ``t`` does: the same strides, and NaN between its rows."""
        made = self.empty(t.shape, t.stride(), t.dtype, t.device, t.data_ptr() % ALIGNMENT).copy_(t)
        room, *_ = self._rooms.pop()
        self._copies.append((name, room, room.clone()))
        return made

    def allocate(self, u: Tensor, A: Tensor, rooms: Sequence[Any]) -> list[Any]:
        """What ``plan.allocate`` does, within guards."""
        return [r and self.empty(r.shape, r.strides, u.dtype if r.like_u else torch.float32, u.device) for r in rooms]

    def broken(self) -> str | None:
        """None, or where something was written that is not a tensor's."""
        for room, begin, end, shape in self._rooms:
            for side, band in (("before", room[:begin]), ("behind", room[end:])):
                if touched := int((band != FILL).sum()):
                    return f"writes outside its memory: {touched} bytes {side} a tensor of shape {shape}"
        changed = next((name for name, room, before in self._copies if not torch.equal(room, before)), None)
        return f"writes to its input {changed}" if changed else None


class Gate:
    """Judges candidates of one op on one device; what is the same for all of them is computed once."""

    def __init__(self, op: Op, where: torch.device):
        self.op, self.where = op, where
        self._judged: dict[Any, tuple] = {}
        self._verdicts: dict[tuple, str | None] = {}

    def __call__(self, problem: Any, backend: str, config: Any) -> str | None:
        """None, or what is wrong with the candidate for problems of this kind. Errors: whatever it raises."""
        for case, small in self.op.cases.gates(problem):
            key = case, small, backend, config
            if key not in self._verdicts:
                self._verdicts[key] = self._judge(case, small, backend, config)
            if (verdict := self._verdicts[key]) is not None:
                return verdict
        return None

    def ready(self, problem: Any) -> None:
        """Compute what judging candidates for this problem needs."""
        for case, _ in self.op.cases.gates(problem):
            self._expected(case, 0)

    def _judge(self, case: Any, problem: Any, backend: str, config: Any) -> str | None:
        for draw in range(check.DRAWS):
            given, exact, plain = self._expected(case, draw)
            (first, wrong), (second, wrong_again) = (self._run(given, problem, backend, config) for _ in range(2))
            if wrong := wrong or wrong_again:
                return f"{wrong}, in {case.name}"
            for name in self._repeatable(problem, first):
                if not torch.equal(_bits(first[name]), _bits(second[name])):
                    return f"does not repeat: {name} of two runs differs, in {case.name}"
            verdict, near = None, True
            for name in exact.keys() & first.keys():
                for run in (first, second):
                    got = run[name].double().cpu().numpy()
                    error, allowance, share, ok = check.compare(exact[name], plain[name], got, check.FLOORS[case.dtype])
                    if not ok:
                        near &= max(share, error / allowance) < check.NEAR
                        said = f"error {error:.1e}, allowed {allowance:.1e}"
                        if error <= allowance:
                            said = f"a row has {share:.1f} times the error allowed"
                        verdict = verdict or f"wrong result: {name}: {said}, in {case.name}"
            if verdict is None or not near:
                return verdict
        return verdict

    def _run(
        self, given: dict[str, Any], problem: Any, backend: str, config: Any
    ) -> tuple[dict[str, Tensor], str | None]:
        """What one run gives, and what it did that it must not."""
        fence = Fence()
        tensors = {k: fence.copy(v, k) if isinstance(v, Tensor) else v for k, v in given.items()}
        with check.poisoned():
            found = self.op.cases.outcome(tensors, problem, backend, config, fence.allocate)
        if self.where.type == "cuda":
            torch.cuda.synchronize(self.where)
        return found, fence.broken()

    def _expected(self, case: Any, draw: int) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, np.ndarray]]:
        """(tensors, float64 results, results of plain PyTorch) of one of the case's draws: the same in any process."""
        key = case, draw
        if key not in self._judged:
            tensors = case.make(self.where, seed=draw)
            self._judged[key] = (tensors, *check.judged(self.op, tensors))
        return self._judged[key]

    def _repeatable(self, problem: Any, names: Any) -> list[str]:
        return [n for n in names if problem.deterministic or n not in self.op.cases.SUMS]


def _bits(t: Tensor) -> Tensor:
    """A tensor's bits, in which NaN equals itself."""
    kinds = {2: torch.int16, 4: torch.int32}
    with contextlib.suppress(KeyError):
        return t.contiguous().view(kinds[t.element_size()])
    return t
