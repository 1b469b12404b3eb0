"""One scan, forward or backward, whose metadata has been looked at once: the only implementation of either.

A plan knows how to bring a call's tensors into normal form, what memory to allocate, and the backend's prepared call.
It serves every call with the same ``signature`` and flags as the one it was made for, and holds on to no tensor.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..op import Op
from .problem import Cotangents, Gradients, Inputs, Kept, Outputs, Problem

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
Tensors = Sequence[Any]  # a Tensor or None for each field of ``Inputs``
_NOTHING = contextlib.nullcontext()


# ---- normal form ----------------------------------------------------------------------------------------------------


def layout(u: Tensor) -> str:
    """The axis of u that is walked with stride 1; length where both or neither qualify."""
    return "dim" if u.stride(1) == 1 and u.stride(2) != 1 and u.shape[1] > 1 and u.shape[2] > 1 else "length"


def _along_length(t: Tensor) -> Tensor:
    return t if t.stride(2) == 1 or t.numel() == 0 else t.contiguous()


def _along_dim(t: Tensor) -> Tensor:
    return t if t.stride(1) == 1 or t.numel() == 0 else t.transpose(1, 2).contiguous().transpose(1, 2)


def _projection(t: Tensor) -> Tensor:
    if t.ndim == 3:
        t = t.unsqueeze(1)
    return t.contiguous() if t.ndim == 2 or 1 not in t.stride()[-2:] else t


ALONG = {"length": _along_length, "dim": _along_dim}


def _forms(along: str) -> tuple[Callable[[Tensor], Tensor], ...]:
    """What brings each of the inputs into normal form; it returns a tensor that is in it as it is."""
    special = dict.fromkeys(("u", "delta", "z"), ALONG[along]) | dict.fromkeys(("B", "C"), _projection)
    return tuple(special.get(name, Tensor.contiguous) for name in Inputs._fields)


def normal_form(tensors: Tensors) -> Inputs:
    """The inputs as every backend may rely on them: as they lie where that will do, else copies."""
    forms = zip(_forms(layout(tensors[0])), tensors, strict=True)
    return Inputs._make(None if t is None else form(t) for form, t in forms)


def as_problem(
    direction: str, i: Inputs, softplus: bool, last_state: bool, checkpoint: int, keep_y: bool, deterministic: bool
) -> Problem:
    """The problem that inputs in normal form pose."""
    batch, dim, length = i.u.shape
    return Problem(
        direction=direction,
        batch=batch,
        dim=dim,
        length=length,
        state=i.A.shape[1],
        groups=max(t.shape[1] if t.ndim == 4 else 1 for t in (i.B, i.C)),
        dtype=DTYPES[i.u.dtype],
        layout=layout(i.u),
        device=i.u.device.type,
        sequences=0 if i.cu_seqlens is None else i.cu_seqlens.shape[0] - 1,
        constant_B=i.B.ndim == 2,
        constant_C=i.C.ndim == 2,
        has_D=i.D is not None,
        has_z=i.z is not None,
        has_bias=i.delta_bias is not None,
        softplus=softplus,
        has_initial_state=i.initial_state is not None,
        has_last_state=last_state,
        checkpoint=checkpoint,
        keep_y=keep_y,
        deterministic=deterministic,
    )


# ---- memory ---------------------------------------------------------------------------------------------------------


class Room(NamedTuple):
    """A tensor to be allocated: as wide as u's elements, or float32 as A is; its shape and strides, dense."""

    like_u: bool
    shape: Any
    strides: tuple[int, ...]


def _dense(u: Tensor) -> Room:
    """Shaped and laid out like u, dense whatever the strides of u are."""
    _, dim, length = u.shape
    return Room(True, u.shape, (dim * length, length, 1) if layout(u) == "length" else (length * dim, 1, dim))


def _float32(shape: Sequence[int]) -> Room:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return Room(False, tuple(shape), tuple(reversed(strides)))


def output_rooms(
    u: Tensor, A: Tensor, cu_seqlens: Tensor | None, last_state: bool, checkpoint: int, keep_y: bool
) -> tuple[Room | None, ...]:
    """For each of ``Outputs``; checkpoint: steps between kept states, 0 to keep none; keep_y: y too."""
    (batch, _, length), (dim, state) = u.shape, A.shape
    rows = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    slots = 0
    if checkpoint:
        slots = length // checkpoint + rows if cu_seqlens is not None else rows * (-(-length // checkpoint))
    return (
        _dense(u),
        _float32((rows, dim, state)) if last_state else None,
        _float32((slots, dim, state)) if checkpoint else None,
        _dense(u) if keep_y else None,
    )


def gradient_rooms(tensors: Tensors) -> tuple[Room | None, ...]:
    """For each of ``Gradients``, of inputs that need not be in normal form."""
    u, _, A, B, C, D, z, delta_bias, initial_state, _ = tensors
    dense = _dense(u)
    others = [None if t is None else _float32(t.shape) for t in (A, B, C, D, delta_bias, initial_state)]
    return dense, dense, *others[:4], None if z is None else dense, *others[4:]


def allocate(u: Tensor, A: Tensor, rooms: Sequence[Room | None]) -> list[Any]:
    """Uninitialised memory. Never a view, which autograd would not let anyone change in place."""
    # the quickest of torch's ways to it, by far
    return [r and (u if r.like_u else A).new_empty_strided(r.shape, r.strides) for r in rooms]


# ---- plans ----------------------------------------------------------------------------------------------------------


class Flags(NamedTuple):
    """What a forward is told besides tensors, and then its backward, in the order of the registered op."""

    softplus: bool
    last_state: bool  # forward: return it; backward: its gradient is given
    checkpoint: int  # steps between kept states; 0: there is no backward
    keep_y: bool  # whether y is kept
    deterministic: bool
    choice: str  # of ``encode_choice``


class _Plan:
    """What both directions have in common."""

    direction: str

    def __init__(self, op: Op, tensors: Tensors, flags: Flags):
        inputs = normal_form(tensors)
        forms = _forms(layout(inputs.u))
        pairs = enumerate(zip(tensors, inputs, strict=True))
        self.changes = [(k, forms[k]) for k, (given, normal) in pairs if given is not normal]
        self.op, self.flags = op, flags
        self.problem = as_problem(self.direction, inputs, *flags[:5])
        self.empty = self.problem.elements == 0
        self.run: Callable[..., None] | None = None

    def inputs(self, tensors: Tensors) -> Inputs:
        """``normal_form``, by way of the changes that tensors like these need: usually none."""
        if self.changes:
            tensors = list(tensors)
            for k, form in self.changes:
                tensors[k] = form(tensors[k])
        return Inputs._make(tensors)

    def launch(self, device: torch.device, *tensors: Any) -> None:
        """Run the backend, prepared by the first call, with the tensors' device current."""
        with _on(device):
            if self.run is None:
                self.run = self.op.prepare(self.direction, self.problem, device, self.flags.choice, *tensors)
            self.run(*tensors)


class Forward(_Plan):
    """The forward of tensors like those given."""

    direction = "forward"

    def __init__(self, op: Op, tensors: Tensors, flags: Flags):
        super().__init__(op, tensors, flags)
        i = Inputs._make(tensors)
        self.rooms = output_rooms(i.u, i.A, i.cu_seqlens, flags.last_state, flags.checkpoint, flags.keep_y)

    def __call__(self, tensors: Tensors) -> Outputs:
        """Run. What was not asked for is None."""
        inputs = self.inputs(tensors)
        outputs = Outputs._make(allocate(inputs.u, inputs.A, self.rooms))
        if not self.empty:
            self.launch(inputs.u.device, inputs, outputs)
        elif outputs.last_state is not None:
            _hand_on(inputs.initial_state, outputs.last_state)
        return outputs


class Backward(_Plan):
    """The backward of tensors like those given, dlast_state among them or not."""

    direction = "backward"

    def __init__(self, op: Op, tensors: Tensors, flags: Flags):
        super().__init__(op, tensors, flags)
        self.rooms = gradient_rooms(tensors)
        self.along = ALONG[self.problem.layout]

    def __call__(
        self, dout: Tensor | None, dlast_state: Tensor | None, kept: Kept, tensors: Tensors
    ) -> list[Tensor | None]:
        """Run. For each of ``Gradients``, shaped like what it belongs to; None where that was not given."""
        inputs = self.inputs(tensors)
        found = allocate(inputs.u, inputs.A, self.rooms)
        dA, dB, dC = found[2:5]
        gradients = Gradients._make((*found[:2], dA, _projection(dB), _projection(dC), *found[5:]))
        if not self.empty:
            if dout is None:
                dout = torch.zeros_like(inputs.u)
            cotangents = Cotangents(
                self.along(dout if dout.dtype is inputs.u.dtype else dout.to(inputs.u.dtype)),
                None if dlast_state is None else dlast_state.float().contiguous(),
            )
            self.launch(inputs.u.device, inputs, kept, cotangents, gradients)
            return found
        for g in found:
            if g is not None:
                g.zero_()
        if gradients.dinitial_state is not None:
            _hand_on(dlast_state, gradients.dinitial_state)
        return found


def _hand_on(state: Tensor | None, to: Tensor) -> None:
    """No step lies between the two: the one is the other, or zero."""
    to.zero_() if state is None else to.copy_(state)


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    """Make a CUDA device current while a kernel is launched on it."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    return _NOTHING
