"""The CUDA kernels through NVRTC, for four generations of GPUs: what a call launches compiles and stays in registers.

Neither a GPU nor a driver is needed. ``cuda.variants`` names the kernels of a call, ptxas says what they take.
"""

from __future__ import annotations

import dataclasses
import io
import os
import re
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest

from scan_kernels.cuda_module import OPTIONS, source
from scan_kernels.profiling.device import Device
from scan_kernels.selective_scan.backends import cuda
from scan_kernels.selective_scan.cases import CASES, Case
from scan_kernels.selective_scan.problem import Problem

core = pytest.importorskip("cuda.core", reason="cuda-core is not installed")

DEVICES = [
    Device("cuda", 0, "A100", "sm_80", 108, 166912, 40 << 20, 80 << 30),
    Device("cuda", 0, "H100", "sm_90", 132, 232448, 50 << 20, 80 << 30),
    Device("cuda", 0, "B200", "sm_100", 148, 232448, 126 << 20, 180 << 30),
    Device("cuda", 0, "RTX 5090", "sm_120", 170, 101376, 96 << 20, 32 << 30),
]
H100 = DEVICES[1]
DIRECTIONS = ("forward", "backward")


# ---- compiling ------------------------------------------------------------------------------------------------------


class Usage(NamedTuple):
    """What a kernel takes, as ptxas reports it: bytes of a thread's stack and of its spills, registers, bytes."""

    stack: int
    stores: int
    loads: int
    registers: int
    shared: int  # static; what a launch asks for comes on top


REPORT = re.compile(
    r"Function properties for (\w+)\s+ptxas[ .:info]+(\d+) bytes stack frame, (\d+) bytes spill stores, "
    r"(\d+) bytes spill loads\s+ptxas info\s*: Used (\d+) registers(?:.*?(\d+) bytes smem)?"
)


def compile_for(arch: str, code: str) -> dict[str, Usage]:
    """Each kernel of a translation unit. CuPy adds -ftz=true to the options of a module."""
    log = io.StringIO()
    standard = dict(o.lstrip("-").split("=") for o in OPTIONS)
    options = core.ProgramOptions(**standard, ftz=True, arch=arch, ptxas_options="-v")
    core.Program(code, "c++", options).compile("cubin", logs=log)
    return {name: Usage(*(int(n or 0) for n in figures)) for name, *figures in REPORT.findall(log.getvalue())}


def spills(usage: Usage) -> bool:
    return max(usage.stack, usage.stores, usage.loads) > 0


PLANTED = {
    "indexed at run time": """
        extern "C" __global__ void planted(float* p, const int* at) {
          float kept[64];
          for (int i = 0; i < 64; i++) kept[i] = p[i];
          for (int i = 0; i < 64; i++) kept[at[i] & 63] += 1.f;
          for (int i = 0; i < 64; i++) p[i] = kept[i];
        }""",
    "too many for the bound": """
        extern "C" __global__ void __launch_bounds__(1024) planted(float* p) {
          float kept[96];
          #pragma unroll
          for (int i = 0; i < 96; i++) kept[i] = p[i * 1024 + threadIdx.x];
          __syncthreads();
          #pragma unroll
          for (int i = 0; i < 96; i++) p[i * 1024 + threadIdx.x] = kept[(i + 7) % 96] - kept[i];
        }""",
}


@pytest.mark.parametrize("device", DEVICES, ids=lambda d: d.arch)
@pytest.mark.parametrize("name", PLANTED)
def test_a_kernel_that_spills_is_caught(name, device):
    usage = compile_for(device.arch, PLANTED[name])["planted"]
    assert spills(usage)
    assert (usage.stores > 0) == (name == "too many for the bound")


def test_a_kernel_that_does_not_spill_is_not_caught():
    code = 'extern "C" __global__ void fine(float* p) { __shared__ float s[24]; s[threadIdx.x] = *p; *p = s[3]; }'
    usage = compile_for("sm_80", code)["fine"]
    assert not spills(usage)
    assert usage.shared == 96
    assert 0 < usage.registers < 40


# ---- what is compiled -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Posed:
    """A problem, and how its tensors lie in memory."""

    case: Case
    aligned: bool = True
    axis: int = 0  # of B and C: 0 length-, 1 state-contiguous
    deterministic: bool = False
    training: bool = True
    keep_y: bool = False
    checkpoint: int = 0  # steps between kept states; 0: the default

    def problem(self, direction: str) -> Problem:
        problem = self.case.problem(direction, "cuda", training=self.training)
        checkpoint = self.checkpoint or problem.checkpoint
        return dataclasses.replace(problem, deterministic=self.deterministic, keep_y=self.keep_y, checkpoint=checkpoint)


def mamba(name: str, **fields) -> Case:
    sizes = {"batch": 8, "dim": 5120, "length": 2048, "dtype": "bfloat16"}
    return Case(name, **sizes | fields)


LONG = {"batch": 1, "dim": 1024, "length": 65536}  # too few channels to fill a GPU: time is cut, or shared by a relay
PLAIN = dict.fromkeys(("D", "z", "bias", "softplus"), False)
# every configuration on an H100, two elsewhere
MAIN = [Posed(mamba("main")), Posed(mamba("main dim", layout="dim"))]
# two configurations on every device: nothing kept for a backward; passes that find what enters a span
CUT = [
    Posed(mamba("inference"), training=False),
    Posed(mamba("long", **LONG)),
    Posed(mamba("a group for several warps", batch=2, dim=1536)),
    Posed(mamba("long misaligned", dtype="float32", **LONG), aligned=False),
    Posed(mamba("long deterministic", dtype="float16", layout="dim", **LONG), deterministic=True),
    # 16 states a lane, in as many registers as there are
    Posed(mamba("many states", state=256)),
    Posed(mamba("many states, dim", state=256, layout="dim", dtype="float16")),
    Posed(mamba("64 states, misaligned dim", state=64, layout="dim"), aligned=False, training=False),
    Posed(mamba("128 states, dim", state=128, layout="dim")),
    # an odd number of states, which are copied one by one
    Posed(mamba("127 states, misaligned", state=127), aligned=False),
    Posed(mamba("127 states, misaligned dim, fp32", state=127, layout="dim", dtype="float32", z=False), aligned=False),
]
# two configurations on one device each
OTHERS = [
    Posed(mamba("fp32", dtype="float32")),
    Posed(mamba("fp32 dim", dtype="float32", layout="dim")),
    Posed(mamba("fp16", dtype="float16")),
    Posed(mamba("long dim", layout="dim", **LONG)),
    Posed(mamba("long fp32", dtype="float32", **LONG)),
    *(
        Posed(mamba(f"{n} states {dtype}{layout[:3]}", state=n, dtype=dtype, layout=layout))
        for n, dtype, layout in (
            (1, "bfloat16", "length"), (1, "float32", "dim"), (2, "float32", "dim"), (2, "bfloat16", "length"),
            (3, "bfloat16", "dim"), (3, "float32", "length"),
            (8, "bfloat16", "length"), (8, "float32", "dim"), (32, "bfloat16", "length"), (32, "float32", "dim"),
            (40, "bfloat16", "dim"), (40, "float32", "length"), (64, "bfloat16", "length"), (64, "float32", "dim"),
            (100, "float16", "length"), (128, "bfloat16", "length"), (128, "float32", "length"),
            (256, "bfloat16", "dim"), (256, "float32", "length"),
        )
    ),
    *(Posed(mamba(f"long {n} states", state=n, **LONG)) for n in (1, 3, 40, 64, 256)),
    Posed(mamba("no flags", **PLAIN)),
    Posed(mamba("no flags fp32", dtype="float32", layout="dim", **PLAIN)),
    Posed(mamba("constant B", constant_B=True)),
    Posed(mamba("constant C", constant_C=True, layout="dim")),
    Posed(mamba("constant B, C", constant_B=True, constant_C=True, dtype="float32")),
    Posed(mamba("constant B, C of 64 states", constant_B=True, constant_C=True, state=64)),
    Posed(mamba("packed", lengths=(2048, 1, 0, 8192, 700), initial_state=True)),
    Posed(mamba("packed dim", lengths=(40000, 1, 0, 8192, 700), dim=512, layout="dim", initial_state=True)),
    Posed(mamba("misaligned"), aligned=False),
    Posed(mamba("misaligned dim", layout="dim", groups=4), aligned=False, axis=1),
    Posed(mamba("misaligned fp32", dtype="float32"), aligned=False),
    Posed(mamba("state-contiguous", layout="dim"), axis=1),
    Posed(mamba("state-contiguous fp32, 64 states", dtype="float32", state=64), axis=1),
    Posed(mamba("deterministic"), deterministic=True),
    Posed(mamba("deterministic 64 states", dtype="float32", state=64), deterministic=True),
    Posed(mamba("keeps y"), keep_y=True),
    Posed(mamba("keeps y, dim", layout="dim"), keep_y=True),
    Posed(mamba("keeps y, fp32, 24 states", dtype="float32", state=24), keep_y=True),
    Posed(mamba("keeps half"), checkpoint=32),
    Posed(mamba("keeps half, dim", layout="dim", dtype="float16"), checkpoint=32),
    Posed(mamba("keeps half, fp32", dtype="float32"), checkpoint=32),
    Posed(mamba("keeps half, packed", lengths=(2048, 1, 0, 8192, 700)), checkpoint=32),
    Posed(mamba("keeps a quarter, constant B, C", constant_B=True, constant_C=True), checkpoint=64),
    Posed(mamba("few channels", batch=2, dim=12, length=67, dtype="float32")),
]  # fmt: skip


class Compiled(NamedTuple):
    """A kernel for a device."""

    variant: cuda.Variant
    device: Device

    @property
    def key(self) -> tuple:
        return self.device.arch, self.variant.files, tuple(sorted(self.variant.defines.items()))


def kernels(posed: Posed, direction: str, device: Device, first: int | None) -> list[Compiled]:
    """Every kernel of the ``first`` configurations, which differ in more than how often time is cut."""
    problem, found = posed.problem(direction), {}
    taken = set()
    for config in cuda.configs(problem, device):
        taken.add(dataclasses.replace(config, splits=min(config.splits, 2)))
        if first and len(taken) > first:
            break
        for variant in cuda.variants(problem, config, (posed.aligned,) * 3, (posed.axis,) * 2):
            kernel = Compiled(variant, device)
            found[kernel.key] = kernel
    return list(found.values())


WANTED = {
    f"{H100.arch}-{posed.case.name}-{direction}": kernels(posed, direction, H100, None)
    for posed in MAIN
    for direction in DIRECTIONS
} | {
    f"{device.arch}-{posed.case.name}-{direction}": kernels(posed, direction, device, 2)
    for turn, posed in enumerate(MAIN + CUT + OTHERS)
    for shift, direction in enumerate(DIRECTIONS)
    for device in DEVICES
    if (posed in MAIN and device is not H100)
    or posed in CUT
    or (posed in OTHERS and device is DEVICES[(turn + shift) % len(DEVICES)])
}


@pytest.fixture(scope="module")
def compiled(request):
    """key -> future of the usages of the kernels that the selected tests ask for, a thread of NVRTC on each core."""
    names = [
        i.callspec.params["name"] for i in request.session.items if i.originalname == test_stays_in_registers.__name__
    ]
    asked = {kernel.key: kernel for name in names for kernel in WANTED[name]}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {
            key: pool.submit(compile_for, key[0], source(k.variant.files, cuda.FIELDS, k.variant.defines))
            for key, k in asked.items()
        }
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("name", WANTED)
def test_stays_in_registers(name, compiled):
    failures = []
    for kernel in WANTED[name]:
        variant, config = kernel.variant, kernel.variant.config
        usages = compiled[kernel.key].result()
        usage = usages[variant.name]
        if any(spills(u) for u in usages.values()):
            failures.append(f"spills: {usages}, {variant}")
        if usage.registers * config.threads * config.blocks > 65536:
            failures.append(f"{config.blocks} blocks do not fit: {usage}, {variant}")
        if usage.shared + variant.shared_bytes > kernel.device.shared_memory:
            failures.append(f"too much shared memory: {usage}, {variant}")
    assert not failures, "\n".join(failures)


def test_every_kind_of_kernel_is_compiled():
    seen: dict[str, dict[str, set[int]]] = {device.arch: {} for device in DEVICES}
    late = set()  # where a group has several warps
    for kernel in (k for kernels in WANTED.values() for k in kernels):
        if kernel.variant.name == "scan_backward" and kernel.variant.config.groups < kernel.variant.config.warps:
            late.add(kernel.device.arch)
        for name, value in kernel.variant.defines.items():
            seen[kernel.device.arch].setdefault(name, set()).add(value)
    for arch in seen:
        assert seen[arch]["MODE"] == {cuda.SCAN, cuda.LEAVE, cuda.ADJOINT, cuda.EXPAND}
        assert seen[arch]["DTYPE"] == set(cuda.DTYPES.values())
        for name in ("PARTIALS", "DIM_LAYOUT", "ALIGNED", "B_ALIGNED"):
            assert seen[arch][name] == {0, 1}, (arch, name)
        assert arch in late
    values = {name: set().union(*(s.get(name, set()) for s in seen.values())) for name in seen[H100.arch]}
    assert values["LANES"] >= {1, 2, 4, 8, 16, 32}
    assert values["TILE"] >= {4, 8, 16, 32}
    assert values["CHECKPOINT"] >= {0, 16, 64}
    flags = "RELAY B_AXIS C_AXIS CONST_B CONST_C HAS_D HAS_Z HAS_BIAS SOFTPLUS PACKED"
    assert all(values[name] == {0, 1} for name in flags.split())


@pytest.mark.parametrize("device", DEVICES, ids=lambda d: d.arch)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_every_case_has_configurations_and_each_fits_in_shared_memory(direction, device):
    for posed in [*(Posed(case, deterministic=d) for case in CASES for d in (False, True)), *MAIN, *CUT, *OTHERS]:
        problem = posed.problem(direction)
        found = cuda.configs(problem, device)
        assert len(set(found)) == len(found) > 0, posed
        for config in found:
            for variant in cuda.variants(problem, config, (True, True, True), (0, 0)):
                assert variant.shared_bytes <= device.shared_memory, (posed, config)


def test_a_device_too_small_for_any_configuration_is_named():
    tiny = dataclasses.replace(H100, name="tiny", shared_memory=1024)
    with pytest.raises(ValueError, match=r"no configuration of the cuda backend fits .* on tiny"):
        cuda.configs(MAIN[0].problem("backward"), tiny)
