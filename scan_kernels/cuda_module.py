"""The only caller of CuPy's RawModule: CUDA source and defines -> a kernel, launched on torch's current stream.

CuPy compiles a variant with NVRTC at its first use and keeps the binary in its own cache on disk. ``source`` is pure
text work, so that a machine without a GPU can compile the very same variants.
"""

from __future__ import annotations

import functools
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
        self.fields = tuple(fields)
        self._dtype = np.dtype([(name, np.int64) for name in fields])
        self._compiled: dict[int, Any] = {}
        self._source = (files, dict(fields), dict(defines), name)

    def _function(self, device: int, shared_bytes: int) -> Any:
        if (found := self._compiled.get(device)) is None:
            import cupy

            files, fields, defines, name = self._source
            module = cupy.RawModule(code=source(files, fields, defines), options=OPTIONS)
            found = module.get_function(name)
            if shared_bytes > 48 * 1024:
                found.max_dynamic_shared_size_bytes = shared_bytes
            self._compiled[device] = found
        return found

    def __call__(self, blocks: int, threads: int, shared_bytes: int, values: Mapping[str, int]) -> None:
        """Launch on the current device and torch's current stream. Fields that are not given are 0."""
        device = torch.cuda.current_device()
        function = self._function(device, shared_bytes)
        params = np.array(tuple(values.get(name, 0) for name in self.fields), dtype=self._dtype)
        with _stream(torch.cuda.current_stream(device).cuda_stream, device):
            function((blocks,), (threads,), (params,), shared_mem=shared_bytes)


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
