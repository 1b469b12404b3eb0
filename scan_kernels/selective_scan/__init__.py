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

import contextlib
import dataclasses
from typing import Any

import torch
from torch import Tensor

from ..op import BackendUnavailable, Choice, Op, decode_choice, encode_choice
from .problem import MAX_STATE, Cotangents, Gradients, Inputs, Outputs, Problem, default_checkpoint

OP = Op("selective_scan", package=__name__)
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


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
    if isinstance(u, Tensor) and _autocast(u.device.type):
        low = torch.get_autocast_dtype(u.device.type)
        u, delta, z = (_cast(t, low) for t in (u, delta, z))
        B, C = (t if isinstance(t, Tensor) and t.ndim == 2 else _cast(t, low) for t in (B, C))
    _validate(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens)
    A, D, delta_bias, initial_state = (_cast(t, torch.float32) for t in (A, D, delta_bias, initial_state))
    B, C = (t.float() if t.ndim == 2 else t.unsqueeze(1) if t.ndim == 3 else t for t in (B, C))
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    tensors = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    forward, backward = _configs(backend, config)
    checkpoint = (getattr(forward, "checkpoint", 0) or default_checkpoint(A.shape[1])) if keep else 0
    choice = "" if backend == "auto" and config is None else encode_choice(backend, forward, backward)
    out, last_state, _ = _scan(
        *tensors, cu_seqlens, bool(delta_softplus), bool(return_last_state), checkpoint, bool(deterministic), choice
    )
    return (out, last_state) if return_last_state else out


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
        inputs = _normal_form(*tensors)
        device = device or inputs.u.device
        problem = _problem("forward", inputs, bool(softplus), bool(last), 0, False)
    if not isinstance(problem, Problem):
        _fail(TypeError, "problem", "a Problem or the arguments of selective_scan by name", type(problem).__name__)
    device = torch.device(device or problem.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BackendUnavailable("selective_scan: this machine has no CUDA device")
    return OP.resolve(problem, device)


# ---- checks ---------------------------------------------------------------------------------------------------------


def _cast(t, dtype):
    return t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t


def _autocast(device: str) -> bool:
    # a device without autocast (meta) must not be asked, and is_autocast_available is not traceable before torch 2.12
    return device in ("cuda", "cpu", "xpu", "mps") and torch.is_autocast_enabled(device)


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
        if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
            offsets = cu_seqlens.tolist()
            if offsets[0] != 0 or offsets[-1] != length or sorted(offsets) != offsets:
                _fail(ValueError, "cu_seqlens", f"non-decreasing offsets from 0 to length={length}", offsets)
    if initial_state is not None and initial_state.shape != (rows, dim, state):
        _fail(ValueError, "initial_state", f"shape (rows={rows}, dim={dim}, state={state})", tuple(initial_state.shape))


# ---- the registered op ----------------------------------------------------------------------------------------------


def _layout(u: Tensor) -> str:
    """The axis of u that is walked with stride 1; length where both or neither qualify."""
    return "dim" if u.stride(1) == 1 and u.stride(2) != 1 and u.shape[1] > 1 and u.shape[2] > 1 else "length"


def _as_layout(t: Tensor | None, layout: str) -> Any:
    """t with stride 1 along the layout's axis: itself where it lies so, else a copy."""
    if t is None:
        return None
    axis = 2 if layout == "length" else 1
    if t.stride(axis) == 1 or t.numel() == 0:
        return t
    return t.contiguous() if layout == "length" else t.transpose(1, 2).contiguous().transpose(1, 2)


def _normal_form(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens) -> Inputs:
    layout = _layout(u)
    u, delta, z = (_as_layout(t, layout) for t in (u, delta, z))
    A, D, delta_bias, initial_state, cu_seqlens = (
        None if t is None else t.contiguous() for t in (A, D, delta_bias, initial_state, cu_seqlens)
    )
    B, C = (t.unsqueeze(1) if t.ndim == 3 else t for t in (B, C))
    B, C = (t.contiguous() if t.ndim == 2 or 1 not in t.stride()[-2:] else t for t in (B, C))
    return Inputs(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens)


def _problem(direction, i: Inputs, softplus, last_state, checkpoint, deterministic) -> Problem:
    batch, dim, length = i.u.shape
    return Problem(
        direction=direction,
        batch=batch,
        dim=dim,
        length=length,
        state=i.A.shape[1],
        groups=max(t.shape[1] if t.ndim == 4 else 1 for t in (i.B, i.C)),
        dtype=DTYPES[i.u.dtype],
        layout=_layout(i.u),
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
        deterministic=deterministic,
    )


def _rows(u: Tensor, cu_seqlens: Tensor | None):
    return u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _empty(u: Tensor) -> Tensor:
    """Uninitialised memory of the shape and layout of u, dense whatever the strides of u are."""
    if _layout(u) == "length":
        return u.new_empty(u.shape)
    batch, dim, length = u.shape
    return u.new_empty((batch, length, dim)).transpose(1, 2)


def _allocate(u, A, cu_seqlens, last_state, checkpoint) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised outputs; an empty tensor for what is not asked for: a schema knows no optional outputs."""
    rows, (dim, state) = _rows(u, cu_seqlens), A.shape
    slots = 0
    if checkpoint:
        length = u.shape[2]
        slots = length // checkpoint + rows if cu_seqlens is not None else rows * (-(-length // checkpoint))
    f32 = {"dtype": torch.float32, "device": u.device}
    return (
        _empty(u),
        torch.empty((rows, dim, state) if last_state else (0,), **f32),
        torch.empty((slots, dim, state) if checkpoint else (0,), **f32),
    )


def _on(device: torch.device):
    """Make a CUDA device current while a kernel is launched on it."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    return contextlib.nullcontext()


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
    deterministic: bool,
    choice: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Forward. Returns (out, last_state or empty, states kept for the backward or empty)."""
    inputs = _normal_form(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens)
    out, last, states = _allocate(u, A, cu_seqlens, last_state, checkpoint)
    if u.numel() == 0:
        if last_state:
            last.zero_() if initial_state is None else last.copy_(initial_state)
        return out, last, states
    problem = _problem("forward", inputs, softplus, last_state, checkpoint, deterministic)
    chosen = OP.resolve(problem, u.device, *decode_choice(OP, choice, "forward"))
    outputs = Outputs(out, last if last_state else None, states if checkpoint else None)
    with _on(u.device):
        chosen.module.forward(problem, inputs, outputs, chosen.config)
    return out, last, states


@_scan.register_fake
def _(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, softplus, last_state, checkpoint, deterministic, choice):  # fmt: skip  # noqa: E501
    return _allocate(u, A, cu_seqlens, last_state, checkpoint)


def _allocate_gradients(u, A, B, C, D, z, delta_bias, initial_state) -> Gradients:
    def f32(t):
        return None if t is None else torch.empty(t.shape, dtype=torch.float32, device=t.device)

    return Gradients(
        _empty(u), _empty(u), f32(A), f32(B), f32(C), f32(D),
        None if z is None else _empty(u), f32(delta_bias), f32(initial_state),
    )  # fmt: skip


def _present(gradients: Gradients, like: Tensor) -> Any:
    return tuple(like.new_empty(0) if g is None else g for g in gradients)


@torch.library.custom_op("scan_kernels::selective_scan_backward", mutates_args=())
def _scan_backward(
    dout: Tensor | None,
    dlast_state: Tensor | None,
    states: Tensor,
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
    deterministic: bool,
    choice: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients in the order of ``Gradients``; an empty tensor stands for an input that was not given."""
    inputs = _normal_form(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens)
    gradients = _allocate_gradients(u, A, B, C, D, z, delta_bias, initial_state)
    if u.numel() == 0:
        for g in gradients:
            if g is not None:
                g.zero_()
        if gradients.dinitial_state is not None and dlast_state is not None:
            gradients.dinitial_state.copy_(dlast_state)
        return _present(gradients, u)
    problem = _problem("backward", inputs, softplus, dlast_state is not None, checkpoint, deterministic)
    dout = torch.zeros_like(inputs.u) if dout is None else _as_layout(dout.to(u.dtype), problem.layout)
    dlast_state = None if dlast_state is None else dlast_state.float().contiguous()
    chosen = OP.resolve(problem, u.device, *decode_choice(OP, choice, "backward"))
    with _on(u.device):
        chosen.module.backward(problem, inputs, states, Cotangents(dout, dlast_state), gradients, chosen.config)
    return _present(gradients, u)


@_scan_backward.register_fake
def _(dout, dlast_state, states, u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, softplus, checkpoint, deterministic, choice):  # fmt: skip  # noqa: E501
    return _present(_allocate_gradients(u, A, B, C, D, z, delta_bias, initial_state), u)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.softplus, _, ctx.checkpoint, ctx.deterministic, ctx.choice = inputs
    ctx.save_for_backward(output[2], *tensors)
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, dlast_state, _):
    if not ctx.checkpoint:
        raise RuntimeError(
            "scan_kernels::selective_scan was called with checkpoint=0, which keeps nothing for a backward"
        )
    states, u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens = ctx.saved_tensors
    if dlast_state is not None and dlast_state.numel() == 0:
        dlast_state = None
    grads = _scan_backward(
        dout, dlast_state, states, u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens,
        ctx.softplus, ctx.checkpoint, ctx.deterministic, ctx.choice,
    )  # fmt: skip
    g = Gradients(*grads)
    return (
        g.du, g.ddelta, g.dA, g.dB.to(B.dtype), g.dC.to(C.dtype),
        None if D is None else g.dD, None if z is None else g.dz, None if delta_bias is None else g.ddelta_bias,
        None if initial_state is None else g.dinitial_state, None, None, None, None, None, None,
    )  # fmt: skip


def _second(ctx, *_):
    raise RuntimeError("selective_scan: second derivatives (the gradient of its gradient) are not implemented")


_scan.register_autograd(_backward, setup_context=_setup_context)
_scan_backward.register_autograd(_second)
