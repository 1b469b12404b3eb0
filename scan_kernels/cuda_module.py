"""The only caller of CuPy's RawModule: CUDA source and defines -> a kernel, launched on torch's current stream.

CuPy compiles a variant with NVRTC at its first use and keeps the binary in its own cache on disk. ``source`` is pure
text work, so that a machine without a GPU can compile the very same variants.
"""

from __future__ import annotations

import functools
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

OPTIONS = ("-std=c++17",)


def source(files: tuple[Path, ...], fields: Mapping[str, str], defines: Mapping[str, int]) -> str:
    """One translation unit: defines, ``struct Params`` with the given fields (name -> C type), then the files."""
    lines = [f"#define {name} {value}" for name, value in sorted(defines.items())]
    lines.append("struct Params {")
    lines += [f"  {kind} {name};" for name, kind in fields.items()]
    lines.append("};")
    return "\n".join(lines) + "\n" + "\n".join(read(f) for f in files)


@functools.cache
def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


class Kernel:
    """A compiled ``__global__`` function that takes one ``struct Params`` whose fields are all 8 bytes wide."""

    def __init__(self, files: tuple[Path, ...], fields: Mapping[str, str], defines: Mapping[str, int], name: str):
        self.slots = {name: slot for slot, name in enumerate(fields)}
        self._compiled: dict[int, Any] = {}
        self._source = (files, dict(fields), dict(defines), name)

    def function(self, device: int, shared_bytes: int) -> Any:
        """CuPy's function for the device, which is current; compiled once."""
        if (found := self._compiled.get(device)) is None:
            import cupy

            files, fields, defines, name = self._source
            module = cupy.RawModule(code=source(files, fields, defines), options=OPTIONS)
            raw = module.get_function(name)
            most = cupy.cuda.Device(device).attributes["MaxSharedMemoryPerBlockOptin"]
            if shared_bytes > most:
                raise ValueError(f"config: expected at most {most} bytes of shared memory a block, got {shared_bytes}")
            if shared_bytes > 40 * 1024:  # up to 48 KB, static shared memory included, need no leave
                raw.max_dynamic_shared_size_bytes = shared_bytes
            # not the RawKernel, which looks up the device and this in every call
            found = self._compiled[device] = raw.kernel
        return found

    def prepare(self, blocks: int, threads: int, shared_bytes: int, values: Mapping[str, int]) -> Launch:
        """A launch on the current device. Fields that are not given, such as pointers, are 0."""
        device = torch.cuda.current_device()
        return Launch(self.function(device, shared_bytes), device, blocks, threads, shared_bytes, self.slots, values)


class Launch:
    """A kernel with all that it takes to launch it but pointers. Calls may come from several threads at once."""

    def __init__(
        self, function: Any, device: int, blocks: int, threads: int, shared_bytes: int, slots: Mapping[str, int],
        values: Mapping[str, int],
    ):  # fmt: skip
        self._function, self._device, self._slots = function, device, slots
        self._shape = (blocks,), (threads,)
        self._shared_bytes = shared_bytes
        self._params = array("q", [values.get(name, 0) for name in slots])
        # a struct by value, as CuPy takes it. One opaque field: it would describe each field of another in every call
        self._struct = np.dtype((np.void, 8 * len(slots)))

    def __call__(self, pointers: Mapping[str, int]) -> None:
        """Launch on torch's current stream of the device, which must be current; pointers: by their field's name."""
        params, slots = self._params[:], self._slots
        for name, pointer in pointers.items():
            params[slots[name]] = pointer
        stream = _stream(torch._C._cuda_getCurrentRawStream(self._device), self._device)
        self._function(*self._shape, (np.frombuffer(params, self._struct),), self._shared_bytes, stream)


class _TorchStream:
    """A CUDA stream of torch, as CuPy's protocol for foreign streams wants it."""

    def __init__(self, pointer: int):
        self.pointer = pointer

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.pointer


@functools.lru_cache(maxsize=64)
def _stream(pointer: int, device: int) -> Any:
    import cupy

    if hasattr(cupy.cuda.Stream, "from_external"):
        return cupy.cuda.Stream.from_external(_TorchStream(pointer))
    return cupy.cuda.ExternalStream(pointer, device)
