"""Real input: what a Mamba layer feeds its scan when it reads the bytes of a text file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .profiling.device import Device
from .selective_scan.cases import Case

LONGEST = 4096  # bytes that are read of the file: one time step each
D_MODEL = {"cpu": 256, "cuda": 768}  # width of the layer: small enough for a CPU; that of mamba-130m


def default_path() -> Path:
    """The README of the checkout this package lies in, or of the current folder, or else this file."""
    here = Path(__file__).resolve()
    readmes = (folder / "README.md" for folder in (here.parent.parent, Path.cwd()))
    return next((path for path in readmes if path.is_file()), here)


class _Recorder(TorchDispatchMode):
    """Keeps the arguments of the last selective scan that runs under it."""

    arguments: dict[str, Any] | None = None

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.scan_kernels.selective_scan.default:
            names = [a.name for a in function._schema.arguments]
            self.arguments = dict(zip(names, args, strict=False)) | (kwargs or {})
        return function(*args, **(kwargs or {}))


def activations(path: Path, device: Device) -> tuple[Case, dict[str, Any]]:
    """The case that a byte-level Mamba layer poses on a file, and its tensors, with random cotangents.

    An embedding of the bytes goes through ``scan_kernels.Mamba`` at its initialisation (fixed seed); u, delta, A, B,
    C, D, z and delta_bias are those its scan receives, with the strides they have there. bfloat16 on a GPU, float32
    on a CPU. Errors: ValueError, in one line, if the file cannot be read or is empty.
    """
    from .mamba import Mamba

    try:
        with path.open("rb") as f:
            data = f.read(LONGEST)
    except OSError as e:
        raise ValueError(f"{path}: {e.strerror or e}") from None
    if not data:
        raise ValueError(f"{path}: the file is empty")
    width, dtype = D_MODEL[device.kind], torch.bfloat16 if device.kind == "cuda" else torch.float32
    with torch.random.fork_rng(devices=[device.index] if device.kind == "cuda" else []), torch.no_grad():
        torch.manual_seed(0)
        embedding = torch.nn.Embedding(256, width, device=device.torch, dtype=dtype)
        layer = Mamba(width, device=device.torch, dtype=dtype)
        tokens = torch.tensor(list(data), device=device.torch)[None]
        with _Recorder() as recorder:
            layer(embedding(tokens))
        seen = recorder.arguments
        if seen is None:
            raise RuntimeError("scan_kernels.Mamba ran without calling the selective scan")
        u, A = seen["u"], seen["A"]
        batch, dim, length = u.shape
        layout = "dim" if u.stride(1) == 1 and dim > 1 and length > 1 else "length"
        cotangents = {"dout": torch.randn_like(u), "dlast_state": torch.randn(batch, *A.shape, device=device.torch)}
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state", "cu_seqlens")
    tensors = {name: seen[name] for name in names} | {"delta_softplus": seen["softplus"]} | cotangents
    kind = str(dtype).removeprefix("torch.")
    case = Case("text", batch, dim, length, A.shape[1], dtype=kind, layout=layout, tags=())
    return case, tensors


def beginning(tensors: dict[str, Any], steps: int) -> dict[str, Any]:
    """The same scan cut after some steps: short enough for a float64 reference, and right since the scan is causal."""
    timed = ("u", "delta", "z", "B", "C", "dout")
    return {k: v[..., :steps] if k in timed else v for k, v in tensors.items()}
