"""The scan in plain torch operations: any device, any problem, always deterministic.

Time is cut into chunks that advance together: step k of every chunk of every row is one torch operation.

    1. Every chunk runs from a zero state. Its end state E and the log of its decay, A ΣΔ, are all that the chunks
       after it need to know.
    2. The states that enter the chunks follow from carry' = exp(A ΣΔ) carry + E.
    3. Every chunk runs again from its true entering state and writes y.

Running again costs as much as adding C (Π exp(ΔA)) carry to the outputs of the first run would (one exponential for
each state and step) and is exactly the sequential scan within a chunk: nothing overflows that would not overflow
there. The backward does the same in reverse for the adjoint, then recomputes and sums gradients block by block, so
that it holds O(batch*dim*state*(length/chunk + chunk)) numbers.

A chunk is a slot of ``Outputs.states``. Inside, all tensors are float32 and time comes first: (chunk, slots, groups,
state, dim // groups), with 1 for the axes a tensor does not vary along.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from ..problem import Cotangents, Gradients, Inputs, Kept, Outputs, Problem

RANK = 2


@dataclasses.dataclass(frozen=True)
class Config:
    chunk: int = 64  # steps of a chunk; where states are kept, the distance between them is used instead

    def __post_init__(self):
        if self.chunk < 1:
            raise ValueError(f"chunk: expected at least 1 step, got {self.chunk}")


def supports(problem: Problem) -> str | None:
    return "does not keep y for the backward" if problem.keep_y else None


def configs(problem: Problem, device) -> list[Config]:
    if problem.checkpoint:
        return [Config(problem.checkpoint)]
    # Short chunks mean few operations on much memory. A step should fill the machine and stay in its cache.
    elements = (1 << 22) if device.kind == "cuda" else (1 << 17)
    chunks = elements // (problem.rows * problem.dim * problem.state)
    best = 1 << (-(-problem.length // max(chunks, 1)) - 1).bit_length()
    longest = 1 << (problem.length - 1).bit_length()
    sizes = dict.fromkeys(min(max(c, 16), longest) for c in (best, best // 4, best // 2, best * 2, best * 4, longest))
    return [Config(c) for c in sizes]


def valid(problem: Problem, device, config: Config) -> bool:
    if problem.checkpoint:
        return config.chunk == problem.checkpoint
    return config.chunk <= 1 << (problem.length - 1).bit_length()


class _Chunks:
    """Where each time step and each row lie among the chunks. Waits for nothing: offsets are never read back."""

    def __init__(self, problem: Problem, chunk: int, cu_seqlens: Tensor | None, device: torch.device):
        length, rows = problem.length, problem.rows
        self.problem, self.size = problem, chunk
        index = torch.arange(rows, device=device)
        if cu_seqlens is None:
            each = -(-length // chunk)
            self.count = rows * each
            starts, self.first = index * length, index * each
            self.last = self.first + (each - 1)
        else:
            # offsets on a GPU are not validated: bring any into order, so that nothing is written out of bounds
            starts = cu_seqlens[:-1].long().clamp(0, length).cummax(0).values
            starts[:1].zero_()
            self.first = starts // chunk + index
            self.count = length // chunk + rows
            lengths = torch.cat([starts[1:], starts.new_full((1,), length)]) - starts
            self.last = self.first + (lengths - 1).clamp(min=0) // chunk
        time = torch.arange(problem.batch * length, device=device)
        row = torch.searchsorted(starts, time, right=True) - 1
        step = time - starts[row]
        self.position = step % chunk * self.count + self.first[row] + step // chunk
        self.padding: Tensor | None = None  # (chunk, slots, 1, 1, 1): the steps after a row's end
        self.padded_from = chunk
        if cu_seqlens is not None or length % chunk:
            self.padding = torch.ones(chunk * self.count, dtype=torch.bool, device=device)
            self.padding[self.position] = False
            self.padding = self.padding.view(chunk, self.count, 1, 1, 1)
            self.padded_from = 0 if cu_seqlens is not None else length % chunk

    def gather(self, t: Tensor, *shape: int) -> Tensor:
        """(batch, ..., length) as float32 (chunk, slots, *shape), zero after a row's end."""
        by_time = t.movedim(-1, 1).reshape(self.position.numel(), -1).float()
        out = by_time.new_zeros(self.size * self.count, by_time.shape[1])
        out[self.position] = by_time
        return out.view(self.size, self.count, *shape)

    def scatter(self, t: Tensor, *shape: int) -> Tensor:
        """(chunk, slots, ...) back to (batch, *shape, length)."""
        by_time = t.reshape(self.size * self.count, -1)[self.position]
        return by_time.view(self.problem.batch, self.problem.length, *shape).movedim(1, -1)


class _Scan:
    """The tensors both directions work on."""

    def __init__(self, problem: Problem, i: Inputs, chunk: int):
        self.chunks = _Chunks(problem, chunk, i.cu_seqlens, i.u.device)
        self.groups, self.state, self.inner = problem.groups, problem.state, problem.dim // problem.groups
        self.u = i.u.float()
        raw = i.delta.float()
        self.raw = raw if i.delta_bias is None else raw + i.delta_bias[:, None]
        self.delta = softplus(self.raw) if problem.softplus else self.raw
        self.A = self.states_in(i.A)
        self.B = self.states_in(i.B) if problem.constant_B else self.per_state(i.B)
        self.C = self.states_in(i.C) if problem.constant_C else self.per_state(i.C)
        self.dt = self.per_channel(self.delta)
        self.x = self.per_channel(self.delta * self.u)

    def per_channel(self, t: Tensor) -> Tensor:
        return self.chunks.gather(t, self.groups, 1, self.inner)

    def per_state(self, t: Tensor) -> Tensor:
        return self.chunks.gather(t, self.groups, self.state, 1)

    def states_in(self, t: Tensor) -> Tensor:
        """(..., dim, state) as (..., groups, state, inner): neighbouring channels side by side in memory."""
        return t.unflatten(-2, (self.groups, self.inner)).transpose(-1, -2).contiguous()

    def states_out(self, t: Tensor) -> Tensor:
        return t.transpose(-1, -2).flatten(-3, -2)

    def decay(self, k: int) -> Tensor:
        """exp(Δ A) of step k in every slot; 1 after a row's end, whatever A is."""
        exponent = self.dt[k] * self.A
        if k >= self.chunks.padded_from:
            exponent.masked_fill_(self.chunks.padding[k], 0)  # type: ignore[index]
        return exponent.exp_()

    def at(self, k: int, M: Tensor) -> Tensor:
        """B or C of step k in every slot; 0 after a row's end, even where a constant one is not finite."""
        if M.ndim > self.A.ndim:
            return M[k]
        return M.masked_fill(self.chunks.padding[k], 0) if k >= self.chunks.padded_from else M  # type: ignore[index]

    def entering(self, ends: Tensor, given: Tensor | None, backwards: bool = False) -> Tensor:
        """The state that enters every slot, from every slot's end state; backwards in time for the adjoint.

        ``given`` enters each row, (rows, ...), or zero.
        """
        total, start = self.dt.sum(0), self.chunks.first
        if backwards:
            ends, total, start = ends.flip(0), total.flip(0), self.chunks.count - 1 - self.chunks.last
        x = torch.cat([torch.zeros_like(ends[:1]), ends[:-1]])
        x[start] = 0.0 if given is None else self.states_in(given)
        total = torch.cat([torch.zeros_like(total[:1]), total[:-1]])
        fresh = torch.zeros(self.chunks.count, 1, 1, 1, dtype=torch.bool, device=x.device)
        fresh[start] = True
        _carry(self.A, total, x, fresh)
        return x.flip(0) if backwards else x


def _carry(A: Tensor, total: Tensor, x: Tensor, fresh: Tensor) -> None:
    """In place along the first axis: x[p] += exp(A total[p]) x[p-1], except where fresh[p]. About 2 sqrt(n) steps."""
    n, whole = x.shape[0], 1
    if n > 32:
        width = 1 << (n.bit_length() + 1) // 2  # of a group
        whole = n // width * width
        groups = [t[:whole].unflatten(0, (-1, width)) for t in (total, x, fresh)]
        ends = torch.zeros_like(groups[1][:, 0])
        for p in range(width):
            ends = _advance(A, groups[0][:, p], ends, groups[2][:, p]) + groups[1][:, p]
        _carry(A, groups[0].sum(1), ends, groups[2].any(1))
        state = torch.cat([torch.zeros_like(ends[:1]), ends[:-1]])
        for p in range(width):
            state = groups[1][:, p].add_(_advance(A, groups[0][:, p], state, groups[2][:, p]))
    for p in range(whole, n):
        x[p] += _advance(A, total[p], x[p - 1], fresh[p])


def _advance(A: Tensor, total: Tensor, state: Tensor, fresh: Tensor) -> Tensor:
    """exp(A total) state, 0 where fresh.

    Zero stays zero, as it does one step at a time, where the product of many decays overflows; a NaN among them is in
    the end state already. Half the decay twice, so that a large decay of a small state does not overflow on the way.
    """
    half = (A * (0.5 * total)).exp_()
    return (state * half * half).masked_fill_(fresh | (state == 0), 0)


@torch.no_grad()
def forward(problem: Problem, inputs: Inputs, outputs: Outputs, config: Config) -> None:
    s = _Scan(problem, inputs, problem.checkpoint or config.chunk)
    size, count = s.chunks.size, s.chunks.count
    h = s.A.new_zeros(count, *s.A.shape)
    given = inputs.initial_state
    if count > problem.rows:
        for k in range(size):
            h.mul_(s.decay(k)).addcmul_(s.x[k], s.at(k, s.B))
        h = s.entering(h, given)
    elif given is not None:
        h.copy_(s.states_in(given))
    if outputs.states is not None:
        outputs.states.copy_(s.states_out(h))
    y = torch.empty_like(s.x)
    product = torch.empty_like(h)
    for k in range(size):
        h.mul_(s.decay(k)).addcmul_(s.x[k], s.at(k, s.B))
        torch.mul(h, s.at(k, s.C), out=product)
        torch.sum(product, 2, keepdim=True, out=y[k])
    if outputs.last_state is not None:
        outputs.last_state.copy_(s.states_out(h[s.chunks.last]))
    out = s.chunks.scatter(y, problem.dim)
    if inputs.D is not None:
        out = out + inputs.D[:, None] * s.u
    outputs.out.copy_(out if inputs.z is None else out * silu(inputs.z.float()))


@torch.no_grad()
def backward(
    problem: Problem, inputs: Inputs, kept: Kept, cotangents: Cotangents, gradients: Gradients, config: Config
) -> None:
    s = _Scan(problem, inputs, problem.checkpoint)
    size, count = s.chunks.size, s.chunks.count
    dout = cotangents.dout.float()
    grad_y = dout if inputs.z is None else dout * silu(inputs.z.float())
    dy = s.per_channel(grad_y)

    g = s.A.new_zeros(count, *s.A.shape)
    given = cotangents.dlast_state
    if count > problem.rows:
        for k in reversed(range(size)):
            g.addcmul_(dy[k], s.at(k, s.C)).mul_(s.decay(k))
        g = s.entering(g, given, backwards=True)
    elif given is not None:
        g.copy_(s.states_in(given))

    dx, ddt, y = torch.empty_like(s.x), torch.empty_like(s.x), torch.empty_like(s.x)
    dA = torch.zeros_like(s.A)
    dB = torch.zeros_like(s.B)
    dC = torch.zeros_like(s.C)
    # the states of every step are held for one block of slots at a time, about as many numbers as ``states`` has
    block = max(problem.batch, math.ceil(count / size))
    for first in range(0, count, block):
        slots = slice(first, min(first + block, count))
        dt_, x_, dy_ = s.dt[:, slots], s.x[:, slots], dy[:, slots]
        B_ = s.B if problem.constant_B else s.B[:, slots]
        C_ = s.C if problem.constant_C else s.C[:, slots]
        padding = None if s.chunks.padding is None else s.chunks.padding[:, slots]

        a = dt_ * s.A
        if padding is not None:
            a.masked_fill_(padding, 0)
        a.exp_()
        h = torch.cat([s.states_in(kept.states[slots])[None], x_ * B_])  # entering steps 0 .. size
        for k in range(size):
            h[k + 1].addcmul_(a[k], h[k])
        G = dy_ * C_
        if padding is not None:
            G.masked_fill_(padding, 0)
        G[-1] += g[slots]
        for k in reversed(range(1, size)):
            G[k - 1].addcmul_(a[k], G[k])
        g[slots] = a[0] * G[0]

        def total(product: Tensor, padding: Tensor | None = padding) -> Tensor:
            """Sum over time. After a row's end a state may be infinite, and 0 * Inf is not 0."""
            return (product if padding is None else product.masked_fill_(padding, 0)).sum((0, 1))

        product = torch.mul(h[1:], dy_)
        if problem.constant_C:
            dC += total(product)
        else:
            dC[:, slots] = product.sum(4, keepdim=True)
        if inputs.z is not None:
            y[:, slots] = torch.mul(h[1:], C_, out=product).sum(3, keepdim=True)
        torch.mul(G, x_, out=product)
        if problem.constant_B:
            dB += total(product)
        else:
            dB[:, slots] = product.sum(4, keepdim=True)
        dx[:, slots] = torch.mul(G, B_, out=product).sum(3, keepdim=True)
        through = G.mul_(a).mul_(h[:-1])
        ddt[:, slots] = torch.mul(through, s.A, out=product).sum(3, keepdim=True)
        dA += total(torch.mul(through, dt_, out=product))

    gradients.dA.copy_(s.states_out(dA))
    for gradient, found, constant in (
        (gradients.dB, dB, problem.constant_B),
        (gradients.dC, dC, problem.constant_C),
    ):
        gradient.copy_(s.states_out(found) if constant else s.chunks.scatter(found, s.groups, s.state))
    if gradients.dinitial_state is not None:
        gradients.dinitial_state.copy_(s.states_out(g[s.chunks.first]))
    du = s.chunks.scatter(dx, problem.dim)
    ddelta = s.chunks.scatter(ddt, problem.dim) + s.u * du
    if problem.softplus:
        ddelta *= s.raw.sigmoid()
    gradients.ddelta.copy_(ddelta)
    if gradients.ddelta_bias is not None:
        gradients.ddelta_bias.copy_(ddelta.sum((0, 2)))
    du *= s.delta
    if inputs.D is not None:
        du += inputs.D[:, None] * grad_y
    gradients.du.copy_(du)
    if gradients.dD is not None:
        gradients.dD.copy_((grad_y * s.u).sum((0, 2)))
    if gradients.dz is not None and inputs.z is not None:
        out = s.chunks.scatter(y, problem.dim)
        if inputs.D is not None:
            out = out + inputs.D[:, None] * s.u
        z = inputs.z.float()
        gradients.dz.copy_(dout * out * (z.sigmoid() * (1 + z * (-z).sigmoid())))
