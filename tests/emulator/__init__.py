"""The CUDA kernels on a CPU, thread by thread, with a detector of races: what they compute, and whether they may.

``translate`` turns a kernel's source into C++ for device.h; ``install`` puts it where CuPy would be. It knows what
these kernels use, no more, and refuses an instruction that it does not know.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import re
import subprocess
import tempfile
import types
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from scan_kernels import cuda_module
from scan_kernels.cuda_module import Kernel, source

HERE = Path(__file__).parent
SHARED, COMPILERS = tempfile.TemporaryDirectory(), ThreadPoolExecutor()
# what stands for an inline instruction, found by a part of its text; the first that fits
INSTRUCTIONS = {
    "cvt.rn.bf16x2": "r = to_bfloat16(a) | to_bfloat16(b) << 16;",
    "cvt.rn.f16x2": "r = to_float16(a) | to_float16(b) << 16;",
    "cvt.f32.f16": "r = from_float16(v);",
    "ex2.approx": "r = emulated_ex2(x);",
    "rcp.approx": "r = emulated_rcp(x);",
    "mov.s32": "zero = 0;",
    "%%laneid": "lane = threadIdx.x & 31;",
    "setp.eq.s32": "copy_begin(to, from, WIDTH, mine ? WIDTH : 0);",
    "cp.async.commit_group": "copies_close();",
    "cp.async.wait_group": "copies_end(PENDING);",
    "cp.async.c": "copy_begin(to, from, WIDTH, bytes);",
    "red.global": "add_four(to, v);",
    "mbarrier.init": "turn_begin(&barrier);",
    "mbarrier.arrive": "turn_pass(&barrier, ARRIVALS);",
    "_wait.parity": "turn_wait(&barrier, odd);",
    "bar.arrive": "arrive(named[warp], 64, true);",
    "bar.sync": "synchronise(named[warp], 64);",
    '"" :': "",
}
PHRASES = {
    "extern __shared__ __align__(16) float shared[];": "float* const shared = emulated_shared;",
    "extern __shared__ __align__(16) unsigned char memory[];": "auto memory = (unsigned char*)emulated_shared;",
    "__shared__ Task": "static Task",
    "__shared__ Turn": "static Turn",
    "__shared__ i64": "static i64",
    "(u32)__cvta_generic_to_shared(p)": "0",
    "__builtin_assume(__isGlobal(": "(void)((",
}
FLAGS = ["-std=c++17", "-fPIC", "-w", "-fno-strict-aliasing", "-I", str(HERE)]


def translate(code: str, name: str) -> str:
    """C++ that runs the kernel of that name."""

    def instruction(match: re.Match[str]) -> str:
        for part, text in INSTRUCTIONS.items():
            if part in match[0]:
                return text
        raise ValueError(f"emulator: expected one of the instructions that it knows, got {match[0]}")

    code = re.sub(r"asm\s*(?:volatile)?\s*\(.*?\)\s*;", instruction, code, flags=re.S)
    for phrase, text in PHRASES.items():
        code = code.replace(phrase, text)
    return f'#define ENTRY {name}\n#include "device.h"\n#define fmaf __builtin_fmaf\n{code}\n#include "launch.h"\n'


@functools.cache
def _races() -> Path:
    """The detector, which all libraries share."""
    built = Path(SHARED.name, "races.o")
    subprocess.run(["g++", *FLAGS, "-O2", "-c", "-o", built, HERE / "races.cpp"], check=True)
    return built


@functools.lru_cache(maxsize=64)
def _library(folder: Path, code: str) -> Future[ctypes.CDLL]:
    """The library of a kernel. A call prepares all of its kernels before it launches one: they compile side by side."""
    return COMPILERS.submit(_compiled, folder, code, _races())


def _compiled(folder: Path, code: str, races: Path) -> ctypes.CDLL:
    stem = folder / hashlib.sha256(code.encode()).hexdigest()[:16]
    stem.with_suffix(".cpp").write_text(code)
    built = stem.with_suffix(".o"), stem.with_suffix(".so")
    subprocess.run(
        ["g++", *FLAGS, "-O1", "-fsanitize=thread", "-c", "-o", built[0], stem.with_suffix(".cpp")], check=True
    )
    subprocess.run(["g++", "-shared", "-Wl,-Bsymbolic", "-o", built[1], built[0], races], check=True)
    library = ctypes.CDLL(str(built[1]))
    library.races_found.restype = ctypes.c_long
    return library


class Emulator:
    """Runs what the cuda backend launches; ``races`` counts what it found so far."""

    def __init__(self, folder: Path, seed: int, change=lambda code: code):
        self.folder, self.seed, self.change = folder, seed, change
        self.races = 0

    def function(self, kernel: Kernel, _device: int, _shared_bytes: int):
        files, fields, defines, name = kernel._source
        compiling = _library(self.folder, translate(self.change(source(files, fields, defines)), name))

        def launch(grid, block, arguments, shared_mem, stream):
            library = compiling.result()
            before = library.races_found()
            raw = ctypes.create_string_buffer(arguments[0].tobytes())
            library.emulate(raw, grid[0], block[0], shared_mem, self.seed)
            self.races += library.races_found() - before

        return launch


def install(monkeypatch, folder: Path, seed: int = 1, **options) -> Emulator:
    """An emulator where CuPy and the device would be."""
    emulator = Emulator(folder, seed, **options)
    monkeypatch.setattr(Kernel, "function", lambda self, *a: emulator.function(self, *a))
    monkeypatch.setattr(cuda_module, "_stream", lambda pointer, device: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0, raising=False)
    properties = types.SimpleNamespace(multi_processor_count=2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return emulator
