"""What a selective scan is asked to do: its sizes and flags, and what it costs.

A ``Problem`` is everything that decides which kernel runs. ``Inputs``, ``Outputs``, ``Cotangents`` and
``Gradients`` are the tensors that go with it, in the normal form that every backend may rely on.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from torch import Tensor

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
MAX_STATE = 256


@dataclasses.dataclass(frozen=True)
class Problem:
    """One selective scan, forward or backward. Hashable: it is the key of every look-up."""

    direction: str  # "forward" or "backward"
    batch: int
    dim: int
    length: int  # time steps of a row; of all packed sequences together when sequences > 0
    state: int  # N, states of a channel
    groups: int = 1  # dim // groups neighbouring channels share one row of B and C
    dtype: str = "float32"  # of u, delta, z, out and of B and C where they vary with time
    layout: str = "length"  # the axis of u, delta, z, out with stride 1: "length" or "dim"
    device: str = "cpu"  # torch device type
    sequences: int = 0  # packed sequences; 0: not packed
    constant_B: bool = False  # B is (dim, state), the same at every step
    constant_C: bool = False
    has_D: bool = False
    has_z: bool = False
    has_bias: bool = False
    softplus: bool = False
    has_initial_state: bool = False
    has_last_state: bool = False  # forward: write it; backward: its cotangent is given
    checkpoint: int = 0  # keep the state that enters every checkpoint-th step; 0: keep none
    keep_y: bool = False  # keep what z gates, too; else a backward computes it anew
    deterministic: bool = False

    @property
    def rows(self) -> int:
        """Independent sequences: packed ones, or batch entries."""
        return self.sequences or self.batch

    @property
    def elements(self) -> int:
        """batch * dim * length: the unit in which speed is counted."""
        return self.batch * self.dim * self.length

    @property
    def checkpoints(self) -> int:
        """Slots of the states tensor.

        Row r of an unpacked problem owns slots r*ceil(length/K) .. ; packed sequence i, which starts at step s,
        owns the ceil(len/K) slots from s//K + i on (never overlapping, computable without a prefix sum).
        """
        if not self.checkpoint:
            return 0
        if self.sequences:
            return self.length // self.checkpoint + self.sequences
        return self.batch * -(-self.length // self.checkpoint)

    def key(self) -> dict[str, object]:
        """Every field by name."""
        return dict(vars(self))

    def bucket(self) -> dict[str, object]:
        """What a tuned choice is stored under: rows*dim and length rounded up to powers of two, all else exact."""
        rounded = {"rows*dim": _power_of_two(self.rows * self.dim), "length": _power_of_two(self.length)}
        exact = {k: v for k, v in self.key().items() if k not in ("batch", "dim", "length", "sequences")}
        return exact | rounded | {"packed": self.sequences > 0}

    def bytes(self) -> int:
        """Fewest bytes that must move through device memory: each input read once, each output written once."""
        item, n = ITEMSIZE[self.dtype], self.elements
        variable = (not self.constant_B) + (not self.constant_C)
        bc = self.batch * self.groups * self.state * self.length * item * variable
        params = 4 * self.dim * (self.state * (3 - variable) + self.has_D + self.has_bias)
        states = 4 * self.dim * self.state * (self.checkpoints + self.rows * self.has_initial_state)
        last = 4 * self.dim * self.state * self.rows * self.has_last_state + n * item * self.keep_y
        if self.direction == "forward":
            return n * item * (3 + self.has_z) + bc + params + states + last
        # u, delta, dout, (z) read; du, ddelta, (dz) written; B, C read and their gradients written
        return n * item * (5 + 2 * self.has_z) + 2 * (bc + params) + states + last

    def exps(self) -> int:
        """Exponentials and their kin (ex2, lg2, rcp: the special-function unit) of the recurrence as written.

        One for each state and step; softplus costs 2 (forward) or 3 (with its derivative), the gate costs 2.
        """
        softplus = (2 if self.direction == "forward" else 3) * self.softplus
        return self.elements * (self.state + softplus + 2 * self.has_z)

    def flops(self) -> int:
        """Multiplications and additions (an FMA counts 2).

        Forward, a state and step: dt*A, dt*u*B, a*h + ., C*h: 6. Backward: the forward again without C*h (4), then
        G = C*dy + g, dB, dC, G*B, g = a*G, g*h, A*., dA: 15, with C*h once more for dz: 21.
        """
        per_state = 6 if self.direction == "forward" else (21 if self.has_z else 19)
        per_element = 3 + 2 * self.has_D + 2 * self.has_z
        return self.elements * (self.state * per_state + per_element * (1 if self.direction == "forward" else 3))

    def issues(self) -> int:
        """Instructions that a lane issues for the recurrence as written: no addresses, no loops, no sums over lanes.

        Forward, a state and step: Δ*A, its exponential, Δu*B, h, y: 5. Backward: all but y again (4), then G, dB, dC,
        the sums of G*B, g, two for dΔ, dA: 12, with y for dz: 13. Each element: u, Δ in, Δu, out, and what D (1),
        delta_bias (1), softplus (6) and the gate (5) take; backward twice that. Tensor cores, which could take over
        products and sums, are not counted on.
        """
        forward = self.direction == "forward"
        per_state = 5 if forward else 12 + self.has_z
        per_element = 4 + self.has_D + self.has_bias + 6 * self.softplus + 5 * self.has_z
        return self.elements * (self.state * per_state + per_element * (1 if forward else 2))

    def shared(self) -> int:
        """Bytes of B and C that lanes read from shared memory as float32, where a lane has one channel.

        Backward, as much again is added up for their gradients. A lane with more channels needs less.
        """
        variable = (not self.constant_B) + (not self.constant_C)
        return self.elements * self.state * 4 * variable * (1 if self.direction == "forward" else 2)

    def shuffles(self) -> int:
        """Exchanges between lanes, where a lane has one channel: one for each term of dB and dC. Forward none."""
        variable = (not self.constant_B) + (not self.constant_C)
        return 0 if self.direction == "forward" else self.elements * self.state * variable

    def launches(self) -> int:
        """Kernels that must be launched, at least."""
        return 1


class Inputs(NamedTuple):
    """Normal form of the inputs, as every backend receives them.

    u, delta, z: (batch, dim, length), ``problem.dtype``; the axis ``problem.layout`` has stride 1, the others any.
    A: (dim, state) float32. B, C: (batch, groups, state, length) ``problem.dtype``, length or state with stride 1,
    or constant (dim, state) float32. D, delta_bias: (dim,) float32. initial_state: (rows, dim, state) float32.
    cu_seqlens: (sequences + 1,) int32 or int64. All but u, delta, z and variable B, C are contiguous. Every size but
    a packed sequence's own length is at least 1. Storage may start at any element: nothing promises alignment.
    """

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    delta_bias: Tensor | None
    initial_state: Tensor | None
    cu_seqlens: Tensor | None


class Outputs(NamedTuple):
    """What a forward fills, completely: it gets uninitialised memory.

    out: like u. last_state: (rows, dim, state) float32 if ``problem.has_last_state``.
    states: (problem.checkpoints, dim, state) float32 if ``problem.checkpoint``: the state that enters step
    k*checkpoint of its row, initial_state (or zero) for k = 0; packed slots that no sequence owns stay unwritten.
    y: like out, if ``problem.keep_y``: C h + D u, which silu(z) multiplies.
    """

    out: Tensor
    last_state: Tensor | None
    states: Tensor | None
    y: Tensor | None = None


class Kept(NamedTuple):
    """What a forward kept for its backward: the last two of ``Outputs``."""

    states: Tensor
    y: Tensor | None = None


class Cotangents(NamedTuple):
    """Gradients of the loss with respect to the outputs: dout like u (same layout), dlast_state float32 or None."""

    dout: Tensor
    dlast_state: Tensor | None


class Gradients(NamedTuple):
    """What a backward fills, completely: it gets uninitialised memory.

    du, ddelta, dz: like u. dA, dB, dC, dD, ddelta_bias, dinitial_state: float32, contiguous, the shape of what they
    belong to (dB, dC variable: (batch, groups, state, length)). None where the problem has no such input.
    """

    du: Tensor
    ddelta: Tensor
    dA: Tensor
    dB: Tensor
    dC: Tensor
    dD: Tensor | None
    dz: Tensor | None
    ddelta_bias: Tensor | None
    dinitial_state: Tensor | None


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def default_checkpoint(state: int) -> int:
    """Steps between kept states where nobody chose: 16 for small states, 64 from 32 on.

    A kept state costs 4*state/checkpoint bytes an element: 4 at state 16, 4 at 64, 16 at 256.
    """
    return 16 if state <= 16 else 64
