"""The Mamba block: projections, short convolution and selective scan around one residual stream."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..selective_scan import selective_scan
from .short import causal_conv1d, selective_state_update


@dataclasses.dataclass(frozen=True)
class Cache:
    """What a block remembers of the steps it has seen; all zeros before the first.

    It is updated in place, so its addresses stay good for CUDA graphs, and it holds values, not gradients:
    backpropagation through a sequence that is fed in chunks stops at the chunk's beginning.
    """

    conv: Tensor  # (batch, d_inner, d_conv - 1): the convolution's latest inputs, oldest first
    ssm: Tensor  # (batch, d_inner, d_state) float32: the scan's state


class Mamba(nn.Module):
    """Mamba block (Gu and Dao, arXiv:2312.00752, Figure 3), for training, prefill and decoding.

        x, z = in_proj(hidden_states)
        u = silu(conv1d(x))                            causal, depthwise, d_conv taps
        delta, B, C = x_proj(u); delta = dt_proj(delta)
        y = selective_scan(u, delta, -exp(A_log), B, C, D, z), with softplus and dt_proj.bias on delta
        out = out_proj(y)

    Parameters have the names, shapes and initialisation of mamba-ssm's ``Mamba``, whose state dicts load strictly:
    in_proj (2*d_inner, d_model), conv1d (d_inner, 1, d_conv), x_proj (dt_rank + 2*d_state, d_inner),
    dt_proj (d_inner, dt_rank), A_log (d_inner, d_state), D (d_inner,), out_proj (d_model, d_inner); d_inner is
    expand*d_model and dt_rank "auto" is ceil(d_model/16). A_log = log(1..d_state) and D = 1 are float32 whatever
    dtype says and carry ``_no_weight_decay``; softplus(dt_proj.bias), the step size at rest, is drawn
    log-uniformly from dt_min to dt_max, at least dt_init_floor, and carries ``_no_reinit``. dt_proj.weight is
    uniform within ±dt_rank**-0.5*dt_scale (dt_init="random") or that constant ("constant").

    backend: of ``selective_scan``.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        layer_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
    ):
        super().__init__()
        if dt_init not in ("random", "constant"):
            raise ValueError(f"Mamba: dt_init: expected 'random' or 'constant', got {dt_init!r}")
        self.d_model = d_model
        self.d_state = d_state
        self.d_conv = d_conv
        self.expand = expand
        self.d_inner = int(expand * d_model)
        self.dt_rank = math.ceil(d_model / 16) if dt_rank == "auto" else int(dt_rank)
        self.layer_idx = layer_idx
        self.backend = backend

        # modules and random draws come in mamba-ssm's order: the same seed gives the same weights
        new: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias, **new)
        self.conv1d = nn.Conv1d(
            self.d_inner, self.d_inner, d_conv, groups=self.d_inner, padding=d_conv - 1, bias=conv_bias, **new
        )
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False, **new)
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner, bias=True, **new)

        scale = self.dt_rank**-0.5 * dt_scale
        f32: dict[str, Any] = {"device": device, "dtype": torch.float32}
        with torch.no_grad():
            if dt_init == "constant":
                self.dt_proj.weight.fill_(scale)
            else:
                self.dt_proj.weight.uniform_(-scale, scale)
            log_min, log_max = math.log(dt_min), math.log(dt_max)
            dt = torch.exp(torch.rand(self.d_inner, **f32) * (log_max - log_min) + log_min).clamp(min=dt_init_floor)
            self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        self.dt_proj.bias._no_reinit = True  # type: ignore[attr-defined]

        self.A_log = nn.Parameter(torch.log(torch.arange(1, d_state + 1, **f32)).repeat(self.d_inner, 1))
        self.D = nn.Parameter(torch.ones(self.d_inner, **f32))
        for p in (self.A_log, self.D):
            p._no_weight_decay = True  # type: ignore[attr-defined]
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **new)

    def allocate_cache(self, batch: int, dtype: torch.dtype | None = None) -> Cache:
        """An empty cache for ``batch`` sequences. dtype: of its convolution half, by default the weights'."""
        weight = self.in_proj.weight
        return Cache(
            conv=weight.new_zeros(batch, self.d_inner, self.d_conv - 1, dtype=dtype, requires_grad=False),
            ssm=weight.new_zeros(batch, self.d_inner, self.d_state, dtype=torch.float32, requires_grad=False),
        )

    def forward(
        self,
        hidden_states: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """hidden_states (batch, length, d_model) -> (batch, length, d_model).

        cu_seqlens  (sequences + 1,) int32 or int64: packed sequences, as in ``selective_scan``; batch is 1.
        mask        (batch, length), nonzero where a step is real. Padding may stand anywhere: it yields zeros, and
                    every row gives what it would give alone and unpadded. The real steps are packed to do so,
                    which on a GPU waits for the mask's values.
        cache       one row a sequence: read as the steps before the first, then brought up to the last. A prompt
                    may be fed in chunks.

        Errors: ValueError if a shape does not fit; those of ``selective_scan``.
        """
        if hidden_states.ndim != 3 or hidden_states.shape[2] != self.d_model:
            _fail("hidden_states", f"shape (batch, length, d_model={self.d_model})", tuple(hidden_states.shape))
        batch, length, _ = hidden_states.shape
        if mask is not None:
            if cu_seqlens is not None or mask.shape != (batch, length):
                _fail("mask", f"shape {(batch, length)}, without cu_seqlens", tuple(mask.shape))
            mask = mask.bool()
            cu_seqlens = F.pad(mask.sum(1).cumsum(0), (1, 0))
            packed = self.forward(hidden_states[mask][None], cu_seqlens=cu_seqlens, cache=cache)[0]
            return packed.new_zeros(batch, length, self.d_model).index_put((mask,), packed)
        if cu_seqlens is not None and batch != 1:
            _fail("hidden_states", "batch 1 with cu_seqlens", batch)
        rows = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        if cache is not None:
            self._check(cache, rows)

        # every tensor from here to out_proj is dim-contiguous, so the projections and the scan use it as it lies
        x, z = self.in_proj(hidden_states).transpose(1, 2).chunk(2, dim=1)
        u: Any = causal_conv1d(
            x,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            initial_state=None if cache is None else cache.conv,
            cu_seqlens=cu_seqlens,
            activation="silu",
            return_last_state=cache is not None,
        )
        if cache is not None:
            u, conv = u
        delta, B, C = (t.transpose(1, 2) for t in self._selection(u.transpose(1, 2)))
        y: Any = selective_scan(
            u,
            delta,
            self._A(),
            B,
            C,
            self.D,
            z,
            self.dt_proj.bias,
            delta_softplus=True,
            return_last_state=cache is not None,
            # the backward reads the initial state, which by then is overwritten
            initial_state=None if cache is None else cache.ssm.clone() if torch.is_grad_enabled() else cache.ssm,
            cu_seqlens=cu_seqlens,
            backend=self.backend,
        )
        if cache is not None:
            y, ssm = y
            with torch.no_grad():
                cache.conv.copy_(conv)
                cache.ssm.copy_(ssm)
        return self.out_proj(y.transpose(1, 2))

    @torch.no_grad()
    def step(self, hidden_states: Tensor, cache: Cache) -> Tensor:
        """Decode one step: hidden_states (batch, 1, d_model) -> (batch, 1, d_model). Advances the cache; no gradients.

        Errors: ValueError if a shape does not fit.
        """
        if hidden_states.ndim != 3 or hidden_states.shape[1:] != (1, self.d_model):
            _fail("hidden_states", f"shape (batch, 1, d_model={self.d_model})", tuple(hidden_states.shape))
        self._check(cache, hidden_states.shape[0])
        x, z = self.in_proj(hidden_states).transpose(1, 2).chunk(2, dim=1)
        u, conv = causal_conv1d(
            x,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            initial_state=cache.conv,
            activation="silu",
            return_last_state=True,
        )
        cache.conv.copy_(conv)
        delta, B, C = self._selection(u[..., 0])
        y = selective_state_update(
            cache.ssm, u[..., 0], delta, self._A(), B, C, self.D, z[..., 0], self.dt_proj.bias, delta_softplus=True
        )
        return self.out_proj(y[:, None])

    def _A(self) -> Tensor:
        return -torch.exp(self.A_log.float())

    def _selection(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """delta without its bias, B and C, all with u's leading sizes, from u (..., d_inner)."""
        delta, B, C = self.x_proj(u).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        return F.linear(delta, self.dt_proj.weight), B, C

    def _check(self, cache: Cache, rows: int) -> None:
        for name, size in (("conv", self.d_conv - 1), ("ssm", self.d_state)):
            expected, t = (rows, self.d_inner, size), getattr(cache, name)
            if t.shape != expected:
                _fail(f"cache.{name}", f"shape {expected}", tuple(t.shape))


def _fail(name: str, expected: str, got: object) -> NoReturn:
    raise ValueError(f"Mamba: {name}: expected {expected}, got {got}")
