"""Selective scan: the public function, its checks, and its registration with torch.

Glossary (the names are the Mamba paper's and mamba-ssm's):

    u      input of the recurrence               batch    independent sequences side by side
    delta  Δ, the step size before its softplus  dim      channels
    A      decay rates, usually negative         length   time steps
    B, C   input and output projections          state    N, states of a channel
    D      skip connection                       groups   dim // groups neighbouring channels share B and C
    z      gate                                  rows     independent sequences: batch entries or packed sequences
    h      the state
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..op import BackendUnavailable, Choice, Op, encode_choice, is_eager, signature
from .plan import (
    DTYPES,
    Backward,
    Flags,
    Forward,
    Tensors,
    allocate,
    as_problem,
    gradient_rooms,
    normal_form,
    output_rooms,
)  # fmt: skip
from .problem import MAX_STATE, Inputs, Kept, Problem, default_checkpoint

OP = Op("selective_scan", package=__name__)
_EAGER = ("cuda", "cpu")  # where a plain tensor is memory that a kernel can be pointed at


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
    config: Any = None,
    deterministic: bool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Selective state-space scan (S6) of Mamba, with gradients for every tensor argument.

    For each channel d and state n, with Δ = softplus(delta + delta_bias) (bias and softplus where asked for):

        h_t = exp(Δ_t A) h_{t-1} + Δ_t u_t B_t,      h_{-1} = initial_state, or 0
        y_t = Σ_n C_t h_t + D u_t
        out_t = y_t silu(z_t)                        where z is given, else y_t

    Source: Gu and Dao, arXiv:2312.00752, Algorithm 2. Argument order is mamba-ssm's.

    Shapes, dtypes:
        u, delta, z        (batch, dim, length), float32, bfloat16 or float16, all the same. Length- or
                           dim-contiguous tensors are used as they lie; other strides, or a delta or z that is
                           contiguous along another axis than u, are copied.
        A                  (dim, state), real, 1 <= state <= 256
        B, C               (batch, state, length) or (batch, groups, state, length), the dtype of u;
                           or constant over time and batch: (dim, state)
        D, delta_bias      (dim,)
        initial_state      (rows, dim, state)
        cu_seqlens         (sequences + 1,) int32 or int64 on the device of u: packed sequences. Then batch is 1 and
                           sequence i is steps cu_seqlens[i] .. cu_seqlens[i+1]; rows = sequences, which may be
                           empty. It must start at 0, end at length and never decrease (not checked on a GPU, which
                           would have to wait for it; there, out-of-range offsets are clamped).
    A, D, delta_bias, initial_state and constant B, C are used in float32; other float types are converted.

    Returns: out, shaped and laid out like u; with ``return_last_state`` also last_state (rows, dim, state) float32,
    the state after each row's last step. Both carry gradients. State and accumulation are float32 whatever the
    dtype of u. No tensor of batch*dim*length*state elements is ever made: when gradients are needed, the state is
    kept every 16 steps (state <= 16) or 64 steps, in float32, and the backward recomputes the rest; besides the
    inputs themselves nothing else is kept.

    backend: "auto", or one of "cuda", "triton", "cpu", "chunked". config: a backend's ``Config`` for the forward,
    or {"forward": Config, "backward": Config}. deterministic: bitwise-repeatable gradients; None follows
    ``torch.use_deterministic_algorithms``. Under autocast, u, delta, z and variable B, C are cast to its dtype.

    Errors: TypeError or ValueError that names the argument, what was expected and what came;
    ``BackendUnavailable`` if the backend asked for cannot run, listing each backend with its reason. Second
    derivatives are not implemented: a RuntimeError where they are asked for.
    """
    tensors = (u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens)
    softplus, last = bool(delta_softplus), bool(return_last_state)
    if u is not None and is_eager() and (seen := signature(tensors)) is not None:
        return _run(seen, tensors, softplus, last, backend, config, deterministic)
    converted, flags = _convert(tensors, softplus, last, backend, config, deterministic)
    out, last_state, *_ = _scan(*converted, *flags)
    return (out, last_state) if last else out


def fastest(problem: Problem | dict[str, Any], device: torch.device | str | None = None) -> Choice:
    """The backend and configuration that ``backend="auto"`` would run.

    problem: a ``Problem``, or the arguments of ``selective_scan`` by name ({"u": ..., "delta": ..., ...}).
    device: where it would run; by default the tensors' device, or the current device of ``problem.device``.

    Errors: those of ``selective_scan``.
    """
    if isinstance(problem, dict):
        flags = dict(problem)
        softplus, last = flags.pop("delta_softplus", False), flags.pop("return_last_state", False)
        tensors = [flags.pop(name, None) for name in Inputs._fields]
        if flags:
            _fail(TypeError, "problem", "arguments of selective_scan that decide what runs", sorted(flags))
        _validate(*tensors)
        inputs = normal_form(tensors)
        device = device or inputs.u.device
        problem = as_problem("forward", inputs, bool(softplus), bool(last), 0, False, False)
    if not isinstance(problem, Problem):
        _fail(TypeError, "problem", "a Problem or the arguments of selective_scan by name", type(problem).__name__)
    device = torch.device(device or problem.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BackendUnavailable("selective_scan: this machine has no CUDA device")
    return OP.resolve(problem, device)


# ---- checks ---------------------------------------------------------------------------------------------------------


def _cast(t, dtype):
    return t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t


def _autocast(u: Tensor) -> torch.dtype | None:
    """What autocast makes of u's kind of tensor; None where it is off."""
    device = u.device.type
    # a device without autocast (meta) must not be asked, and is_autocast_available is not traceable before torch 2.12
    enabled = device in ("cuda", "cpu", "xpu", "mps") and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if enabled else None


def _fail(kind: type, name: str, expected: str, got: Any):
    raise kind(f"selective_scan: {name}: expected {expected}, got {got}")


def _configs(backend: Any, config: Any) -> tuple[Any, Any]:
    """The explicit configurations (forward, backward), None where there is none."""
    if not isinstance(backend, str):
        _fail(TypeError, "backend", 'a name, such as "auto"', backend)
    given = config if isinstance(config, dict) else {"forward": config}
    instances = (dataclasses.is_dataclass(c) and not isinstance(c, type) for c in given.values() if c is not None)
    if set(given) - {"forward", "backward"} or not all(instances):
        _fail(TypeError, "config", 'a backend\'s Config or {"forward": Config, "backward": Config}', config)
    return given.get("forward"), given.get("backward")


def _validate(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens) -> None:
    """One clear error for bad input. Looks at shapes, dtypes and devices, never at values on a GPU."""
    given = {
        "u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias,
        "initial_state": initial_state, "cu_seqlens": cu_seqlens,
    }  # fmt: skip
    for name, t in given.items():
        if t is None and name not in ("u", "delta", "A", "B", "C"):
            continue
        if not isinstance(t, Tensor):
            _fail(TypeError, name, "a torch.Tensor", type(t).__name__)
        if t.layout != torch.strided:
            _fail(TypeError, name, "a dense tensor", t.layout)
        if t.device != u.device:
            _fail(ValueError, name, f"a tensor on {u.device}, as u", t.device)
    if u.dtype not in DTYPES:
        _fail(TypeError, "u", "float32, bfloat16 or float16", u.dtype)
    if u.ndim != 3:
        _fail(ValueError, "u", "shape (batch, dim, length)", tuple(u.shape))
    batch, dim, length = u.shape
    for name, t in (("delta", delta), ("z", z)):
        if t is not None and t.shape != u.shape:
            _fail(ValueError, name, f"the shape of u, {tuple(u.shape)}", tuple(t.shape))
    for name, t in (("A", A), ("D", D), ("delta_bias", delta_bias), ("initial_state", initial_state)):
        if t is not None and not t.is_floating_point():
            _fail(TypeError, name, "a real floating-point tensor", t.dtype)
    if A.ndim != 2 or A.shape[0] != dim:
        _fail(ValueError, "A", f"shape (dim={dim}, state)", tuple(A.shape))
    state = A.shape[1]
    if not 1 <= state <= MAX_STATE:
        _fail(ValueError, "A", f"1 to {MAX_STATE} states", state)
    for name, t in (("B", B), ("C", C)):
        if t.ndim == 2:
            if t.shape != A.shape:
                _fail(ValueError, name, f"shape (dim={dim}, state={state}) where constant", tuple(t.shape))
            if not t.is_floating_point():
                _fail(TypeError, name, "a real floating-point tensor", t.dtype)
        elif t.ndim not in (3, 4) or t.shape[0] != batch or t.shape[-2:] != (state, length):
            expected = f"(batch={batch}[, groups], state={state}, length={length}) or (dim={dim}, state={state})"
            _fail(ValueError, name, f"shape {expected}", tuple(t.shape))
        elif t.ndim == 4 and (t.shape[1] < 1 or dim % t.shape[1]):
            _fail(ValueError, name, f"a number of groups that divides dim={dim}", t.shape[1])
    if B.ndim > 2 and C.ndim > 2 and (B.shape[1] if B.ndim == 4 else 1) != (C.shape[1] if C.ndim == 4 else 1):
        _fail(ValueError, "C", f"as many groups as B, {tuple(B.shape)}", tuple(C.shape))
    for name, t in (("delta", delta), ("z", z), ("B", B), ("C", C)):
        if t is not None and t.ndim > 2 and t.dtype != u.dtype:
            _fail(TypeError, name, f"the dtype of u, {u.dtype}", t.dtype)
    for name, t in (("D", D), ("delta_bias", delta_bias)):
        if t is not None and t.shape != (dim,):
            _fail(ValueError, name, f"shape (dim={dim},)", tuple(t.shape))
    rows = batch
    if cu_seqlens is not None:
        if cu_seqlens.dtype not in (torch.int32, torch.int64):
            _fail(TypeError, "cu_seqlens", "int32 or int64", cu_seqlens.dtype)
        if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2:
            _fail(ValueError, "cu_seqlens", "shape (sequences + 1,)", tuple(cu_seqlens.shape))
        if batch != 1:
            _fail(ValueError, "u", "batch 1 with cu_seqlens", batch)
        rows = cu_seqlens.shape[0] - 1
        if not torch.compiler.is_compiling():
            _check_offsets(cu_seqlens, length)
    if initial_state is not None and initial_state.shape != (rows, dim, state):
        _fail(ValueError, "initial_state", f"shape (rows={rows}, dim={dim}, state={state})", tuple(initial_state.shape))


def _check_offsets(cu_seqlens: Tensor, length: int) -> None:
    """The only look at values, and only where it waits for nothing."""
    if cu_seqlens.device.type == "cpu":
        offsets = cu_seqlens.tolist()
        if offsets[0] != 0 or offsets[-1] != length or sorted(offsets) != offsets:
            _fail(ValueError, "cu_seqlens", f"non-decreasing offsets from 0 to length={length}", offsets)


def _convert(
    tensors: Tensors, softplus: bool, last_state: bool, backend: Any, config: Any, deterministic: bool | None
) -> tuple[list[Any], Flags]:
    """Checked arguments in the dtypes that the op takes, and its flags. Autograd sees the conversions."""
    u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens = tensors
    if isinstance(u, Tensor) and (low := _autocast(u)) is not None:
        u, delta, z = (_cast(t, low) for t in (u, delta, z))
        B, C = (t if isinstance(t, Tensor) and t.ndim == 2 else _cast(t, low) for t in (B, C))
    _validate(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens)
    A, D, delta_bias, initial_state = (_cast(t, torch.float32) for t in (A, D, delta_bias, initial_state))
    B, C = (_cast(t, torch.float32) if t.ndim == 2 else t for t in (B, C))
    forward, _ = _configs(backend, config)
    checkpoint = 0
    if _keeps(tensors):
        checkpoint = getattr(forward, "checkpoint", 0) or default_checkpoint(A.shape[1])
    keep_y = checkpoint > 0 and z is not None and bool(getattr(forward, "keep_y", False))
    converted = [u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens]
    flags = Flags(softplus, last_state, checkpoint, keep_y, _repeats(deterministic), _choice(backend, config))
    return converted, flags


def _keeps(tensors: Tensors) -> bool:
    """Whether there may be a backward."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _repeats(deterministic: bool | None) -> bool:
    return torch.are_deterministic_algorithms_enabled() if deterministic is None else bool(deterministic)


def _choice(backend: Any, config: Any) -> str:
    return "" if config is None and backend == "auto" else encode_choice(backend, *_configs(backend, config))


# ---- the eager call -------------------------------------------------------------------------------------------------


class _Call(NamedTuple):
    """What an eager call comes down to: which arguments to convert, and what to run on them."""

    casts: tuple[tuple[int, torch.dtype], ...]
    forward: Forward


def _run(
    seen: tuple, tensors: Tensors, softplus: bool, last_state: bool, backend: Any, config: Any,
    deterministic: bool | None,
) -> Any:  # fmt: skip
    """Run without the dispatcher, which costs more than a small scan; seen: the signature of the tensors.

    All that depends on the arguments' metadata is looked at in the first of equal calls only.
    """
    u: Any = tensors[0]
    keeps, repeats, chosen = _keeps(tensors), _repeats(deterministic), _choice(backend, config)
    key = (seen, softplus, last_state, chosen, repeats, keeps, _autocast(u))
    call = OP.calls.get(key)
    if call is None:
        converted, flags = _convert(tensors, softplus, last_state, backend, config, deterministic)
        pairs = enumerate(zip(tensors, converted, strict=True))
        casts = tuple((k, t.dtype) for k, (given, t) in pairs if t is not None and t is not given)
        tensors, call = converted, OP.calls.put(key, _Call(casts, Forward(OP, converted, flags)))
    else:
        if (cu_seqlens := tensors[9]) is not None:
            _check_offsets(cu_seqlens, u.shape[2])
        if call.casts:
            tensors = list(tensors)
            for k, dtype in call.casts:
                tensors[k] = _cast(tensors[k], dtype)
    if keeps:
        return SelectiveScan.apply(call.forward, *tensors)
    out, last, *_ = call.forward(tensors)
    return (out, last) if last_state else out


class SelectiveScan(torch.autograd.Function):
    """The eager call where gradients are needed; its name is what a result's ``grad_fn`` shows."""

    @staticmethod
    def forward(ctx: Any, plan: Forward, *tensors: Tensor | None) -> Any:
        out, last_state, *kept = plan(tensors)
        ctx.save_for_backward(*kept, *tensors)
        ctx.set_materialize_grads(False)
        ctx.flags = plan.flags
        return out if last_state is None else (out, last_state)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlast_state: Tensor | None = None) -> Any:
        return (None, *_backward(ctx, dout, dlast_state))


def _backward(ctx: Any, dout: Tensor | None, dlast_state: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients of ``Inputs``, whichever way the forward went."""
    flags: Flags = ctx.flags
    if not flags.checkpoint:
        raise RuntimeError(
            "scan_kernels::selective_scan was called with checkpoint=0, which keeps nothing for a backward"
        )
    states, y, *tensors = ctx.saved_tensors
    if not flags.keep_y:
        y = None
    if dlast_state is not None and dlast_state.numel() == 0:
        dlast_state = None
    if flags.last_state != (dlast_state is not None):
        flags = flags._replace(last_state=dlast_state is not None)
    # hooks may have put other tensors in the place of those saved, so they are looked at anew
    seen = signature((dout, dlast_state, states, y, *tensors)) if is_eager() else None
    if seen is None or torch.is_grad_enabled():  # the latter: a second derivative may be asked for, which must fail
        softplus, _, *others = flags
        found = _scan_backward(dout, dlast_state, states, y, *tensors, softplus, *others)
        found = [None if t is None else g for g, t in zip(found, tensors[:-1], strict=True)]
    else:
        found = _plan(Backward, seen, tensors, flags)(dout, dlast_state, Kept(states, y), tensors)
    du, ddelta, dA, dB, dC, *others = found
    return (du, ddelta, dA, dB.to(tensors[3].dtype), dC.to(tensors[4].dtype), *others, None)


def _plan(kind: type, seen: tuple | None, tensors: Tensors, flags: Flags) -> Any:
    """The Forward or Backward for such tensors, remembered where they have a signature."""
    if seen is None:
        return kind(OP, tensors, flags)
    key = (kind, seen, flags)
    return OP.calls.get(key) or OP.calls.put(key, kind(OP, tensors, flags))


# ---- the registered op ----------------------------------------------------------------------------------------------


def _present(results: Iterable[Tensor | None], like: Tensor) -> Any:
    """A schema knows no optional results: an empty tensor for what is not there."""
    return tuple(like.new_empty(0) if t is None else t for t in results)


@torch.library.custom_op("scan_kernels::selective_scan", mutates_args=())
def _scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    softplus: bool,
    last_state: bool,
    checkpoint: int,
    keep_y: bool,
    deterministic: bool,
    choice: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Forward. Returns (out, last_state or empty, states and y kept for the backward or empty)."""
    tensors = (u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens)
    flags = Flags(softplus, last_state, checkpoint, keep_y, deterministic, choice)
    return _present(_plan(Forward, signature(tensors), tensors, flags)(tensors), A)


@_scan.register_fake
def _(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, softplus, last_state, checkpoint, keep_y, deterministic, choice):  # fmt: skip  # noqa: E501
    return _present(allocate(u, A, output_rooms(u, A, cu_seqlens, last_state, checkpoint, keep_y)), A)


@torch.library.custom_op("scan_kernels::selective_scan_backward", mutates_args=())
def _scan_backward(
    dout: Tensor | None,
    dlast_state: Tensor | None,
    states: Tensor,
    y: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    softplus: bool,
    checkpoint: int,
    keep_y: bool,
    deterministic: bool,
    choice: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients in the order of ``Gradients``; an empty tensor stands for an input that was not given."""
    tensors = (u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens)
    flags = Flags(softplus, dlast_state is not None, checkpoint, keep_y, deterministic, choice)
    plan = _plan(Backward, signature((dout, dlast_state, states, y, *tensors)), tensors, flags)
    return _present(plan(dout, dlast_state, Kept(states, y), tensors), A)


@_scan_backward.register_fake
def _(dout, dlast_state, states, y, u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, softplus, checkpoint, keep_y, deterministic, choice):  # fmt: skip  # noqa: E501
    tensors = (u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens)
    return _present(allocate(u, A, gradient_rooms(tensors)), A)


def _setup_context(ctx, inputs, output):
    tensors, ctx.flags = inputs[:10], Flags(*inputs[10:])
    ctx.save_for_backward(*output[2:], *tensors)
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


def _registered_backward(ctx, dout, dlast_state, *_):
    return (*_backward(ctx, dout, dlast_state), *(None for _ in Flags._fields))


def _second(ctx, *_):
    raise RuntimeError("selective_scan: second derivatives (the gradient of its gradient) are not implemented")


_scan.register_autograd(_registered_backward, setup_context=_setup_context)
_scan_backward.register_autograd(_second)
