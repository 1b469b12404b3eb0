"""What stands around the scan, ours and other libraries': the Mamba block, the short convolution, a single step.

Every implementation gets the same weights and inputs, and no time if its result is far from ours.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import measure
from .mamba import Mamba
from .mamba.short import causal_conv1d, selective_state_update
from .profiling import timer
from .profiling.device import Device

# of the block: batch, length, d_model; a single step is taken by as many sequences as STEPS says
SIZES = {"cpu": (1, 256, 128), "cuda": (4, 2048, 2560)}
STEPS = {"cpu": 4, "cuda": 64}
STATE, TAPS = 16, 4


@dataclasses.dataclass(frozen=True)
class Setting:
    """The weights and inputs that all implementations of a part get."""

    device: Device
    block: Mamba  # ours, float32
    x: Tensor  # (batch, length, d_model)
    u: Tensor  # (batch, d_inner, length), channel-contiguous, as the block's projection leaves it to the convolution
    step: dict[str, Tensor]  # arguments of a single step but its state

    @functools.cached_property
    def state(self) -> Tensor:
        """The state before a single step."""
        batch, dim = self.step["u"].shape
        return torch.ones(batch, dim, STATE, device=self.device.torch)


def setting(device: Device) -> Setting:
    """Random weights and inputs."""
    batch, length, width = SIZES[device.kind]
    block = Mamba(width, STATE, TAPS, device=device.torch)
    new: dict[str, Any] = {"device": device.torch}
    dtype = torch.bfloat16 if device.kind == "cuda" else torch.float32
    rows, dim = STEPS[device.kind], block.d_inner
    step = {name: torch.randn(rows, dim, **new).to(dtype) for name in ("u", "delta", "z")}
    step |= {name: torch.randn(rows, STATE, **new).to(dtype) for name in ("B", "C")}
    step |= {"A": -torch.rand(dim, STATE, **new), "D": torch.randn(dim, **new), "bias": torch.randn(dim, **new)}
    u = torch.randn(batch, length, dim, **new).to(dtype).transpose(1, 2)
    return Setting(device, block, torch.randn(batch, length, width, **new), u, step)


Make = Callable[[Setting], tuple[Callable[[], Any], list[Tensor]]]  # a call, and what there are gradients of


def _block(load: Callable[[Mamba], nn.Module], s: Setting):
    """A library's block with our weights, under autocast on a GPU."""
    made = load(s.block).to(s.device.torch)
    if made is not s.block:
        made.load_state_dict(s.block.state_dict())
    x = s.x.detach().clone().requires_grad_()

    def run() -> Tensor:
        with torch.autocast(s.device.kind, torch.bfloat16, enabled=s.device.kind == "cuda"):
            found = made(x)
        return found[0] if isinstance(found, tuple) else found

    return run, [x, *made.parameters()]


def _block_of_mamba_ssm(ours: Mamba) -> nn.Module:
    from mamba_ssm import Mamba as Theirs

    return Theirs(ours.d_model, ours.d_state, ours.d_conv)


def _block_of_mambapy(ours: Mamba) -> nn.Module:
    from mambapy.mamba import MambaBlock, MambaConfig

    return MambaBlock(MambaConfig(ours.d_model, 1, d_state=ours.d_state, d_conv=ours.d_conv))


def _block_of_transformers(ours: Mamba) -> nn.Module:
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    config = MambaConfig(hidden_size=ours.d_model, state_size=ours.d_state, conv_kernel=ours.d_conv, expand=2)
    return MambaMixer(config, layer_idx=0)


def _block_of_fla(ours: Mamba) -> nn.Module:
    from fla.layers.mamba import Mamba as Theirs

    return Theirs(ours.d_model, ours.d_state, ours.d_conv, intermediate_size=ours.d_inner, layer_idx=0)


def _weights(s: Setting) -> tuple[Tensor, Tensor, Tensor]:
    """The convolution's input, weight and bias, as leaves of their own."""
    conv = dict(s.block.conv1d.named_parameters())
    found = (s.u, conv["weight"].squeeze(1).to(s.u.dtype), conv["bias"].to(s.u.dtype))
    u, weight, bias = (t.detach().clone().requires_grad_() for t in found)
    return u, weight, bias


def _conv_ours(s: Setting):
    u, weight, bias = _weights(s)
    return lambda: causal_conv1d(u, weight, bias, activation="silu"), [u, weight, bias]


def _conv_of_causal_conv1d(s: Setting):
    from causal_conv1d import causal_conv1d_fn

    u, weight, bias = _weights(s)
    return lambda: causal_conv1d_fn(u, weight, bias, activation="silu"), [u, weight, bias]


def _conv_of_torch(s: Setting):
    u, weight, bias = _weights(s)

    def run() -> Tensor:
        return F.silu(F.conv1d(F.pad(u, (TAPS - 1, 0)), weight[:, None], bias, groups=u.shape[1]))

    return run, [u, weight, bias]


def _step_ours(s: Setting):
    t, state = s.step, s.state.clone()

    def run() -> Tensor:
        return selective_state_update(
            state, t["u"], t["delta"], t["A"], t["B"], t["C"], t["D"], t["z"], t["bias"], delta_softplus=True
        )

    return run, []


def _step_of_mamba_ssm(s: Setting):
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update as theirs

    t, state = s.step, s.state.clone()

    def run() -> Tensor:
        return theirs(state, t["u"], t["delta"], t["A"], t["B"], t["C"], t["D"], t["z"], t["bias"], dt_softplus=True)

    return run, []


# part -> who computes it, ours first; a part without gradients has no backward
PARTS: dict[str, dict[str, Make]] = {
    "block": {
        "scan-kernels": functools.partial(_block, lambda ours: ours),
        "mamba_ssm": functools.partial(_block, _block_of_mamba_ssm),
        "transformers": functools.partial(_block, _block_of_transformers),
        "fla": functools.partial(_block, _block_of_fla),
        "mambapy": functools.partial(_block, _block_of_mambapy),
    },
    "convolution": {"scan-kernels": _conv_ours, "causal_conv1d": _conv_of_causal_conv1d, "torch": _conv_of_torch},
    "step": {"scan-kernels": _step_ours, "mamba_ssm": _step_of_mamba_ssm},
}


def titles(device: Device) -> dict[str, str]:
    """Part -> what is timed, in words."""
    batch, length, width = SIZES[device.kind]
    kind = "float32 weights, bfloat16 autocast" if device.kind == "cuda" else "float32"
    short = "bfloat16" if device.kind == "cuda" else "float32"
    return {
        "block": f"Mamba block, batch {batch}, length {length}, d_model {width}, {kind}",
        "convolution": f"causal convolution of {TAPS} taps with SiLU, {batch} x {2 * width} x {length}, {short}",
        "step": f"state update of one step, {STEPS[device.kind]} x {2 * width}, {STATE} states, {short}",
    }


def results(device: Device, seconds: float) -> Iterator[dict[str, Any]]:
    """Each part as {part, title, results}, as it is done; a result {runner, kind, use} with a timing or a reason.

    Uses are ``inference`` and, where there are gradients, ``step``: forward and backward. seconds: of sampling.
    """
    with torch.random.fork_rng(devices=[device.index] if device.kind == "cuda" else []):
        torch.manual_seed(0)
        made = setting(device)
    dtype = "bfloat16" if device.kind == "cuda" else "float32"
    for part, title in titles(device).items():
        found: list[dict[str, Any]] = []
        right: Tensor | None = None
        for name, make in PARTS[part].items():
            record: dict[str, Any] = {"runner": name, "kind": "backend" if name == "scan-kernels" else "peer"}
            try:
                run, leaves = make(made)
                with torch.no_grad():
                    out = run().float()
                right = out if right is None else right
                apart = float((out - right).norm() / right.norm())
                if not apart <= measure.AGREEMENT[dtype]:
                    raise ArithmeticError(f"is {apart:.1e} from ours in norm")
                record["difference"] = apart
                for use in ("inference", "step")[: 2 if leaves else 1]:
                    timing = timer.measure(_call(run, leaves, out, use), device, seconds=seconds)
                    found.append(record | {"use": use} | dataclasses.asdict(timing))
            except ImportError as e:
                found.append(record | {"use": "inference", "reason": f"not installed ({e})"})
            except Exception as e:
                found.append(record | {"use": "inference", "reason": measure.words(e)})
            if device.kind == "cuda":
                torch.cuda.empty_cache()
        yield {"part": part, "title": title, "results": found}


def _call(run: Callable[[], Any], leaves: list[Tensor], out: Tensor, use: str) -> Callable[[], Any]:
    if use == "step":

        def step() -> Any:
            made = run()
            # what a library keeps and does not use has no gradient
            return torch.autograd.grad(made, leaves, out.to(made.dtype), allow_unused=True)

        return step

    def inference() -> Any:
        with torch.no_grad():
            return run()

    return inference
