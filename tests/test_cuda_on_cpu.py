"""The CUDA kernels in the emulator: results against the reference, and no race, without a GPU."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
import torch
from emulator import install

from scan_kernels import check
from scan_kernels.selective_scan import OP
from scan_kernels.selective_scan.backends import cuda
from scan_kernels.selective_scan.backends.cuda import Config
from scan_kernels.selective_scan.cases import Case
from scan_kernels.selective_scan.plan import allocate, gradient_rooms, normal_form, output_rooms
from scan_kernels.selective_scan.problem import Cotangents, Gradients, Inputs, Kept, Outputs

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")

SMALL = Case("emulated", batch=1, dim=24, length=100, initial_state=True)
FORWARD, BACKWARD = Config(4, 1, 16), Config(8, 4, 16, 2, groups=2, relay=1)


def right(case: Case, *configs, **fields) -> bool:
    """Whether one of as many draws as ``check`` grants passes; a sum that all but cancels may fail a right one."""
    return any(wrong(case, *configs, **fields) == [] for _ in range(check.DRAWS))


def wrong(case: Case, forward: Config, backward: Config | None, **fields) -> list[tuple]:
    """What is wrong with the outputs and, with a backward, the gradients."""
    t = case.make("cpu")
    i = normal_form([t[name] for name in Inputs._fields])
    problem = dataclasses.replace(case.problem("backward", "cuda", training=True), has_last_state=True, **fields)
    rooms = output_rooms(i.u, i.A, i.cu_seqlens, True, problem.checkpoint, problem.keep_y)
    outputs = Outputs._make(allocate(i.u, i.A, rooms))
    nan = [o.fill_(torch.nan) for o in outputs if o is not None]
    cuda.forward(dataclasses.replace(problem, direction="forward"), i, outputs, forward)
    found = {"out": outputs.out, "last_state": outputs.last_state}
    if backward:
        made = Gradients._make(allocate(i.u, i.A, gradient_rooms(i)))
        nan += [g.fill_(torch.nan) for g in made if g is not None]
        cotangents = Cotangents(t["dout"], t["dlast_state"])
        cuda.backward(problem, i, Kept(outputs.states, outputs.y), cotangents, made, backward)
        found |= {name: g for name, g in made._asdict().items() if g is not None}
    exact, plain = check.judged(OP, t)
    failed = []
    for name, got in found.items():
        want = exact[name]
        *figures, ok = check.compare(
            want, plain[name].reshape(want.shape), got.double().numpy().reshape(want.shape), check.FLOORS[case.dtype]
        )
        failed += [] if ok else [(name, *figures)]
    return failed


CASES = {
    "forward bf16": (Config(2, 4, 32), None, {"dtype": "bfloat16"}),
    "forward cut": (Config(2, 2, 32, splits=3), None, {"layout": "dim"}),
    "forward by polynomials": (Config(2, 2, 32, polynomial=8), None, {"dtype": "bfloat16", "special": "underflow"}),
    "forward by polynomials, NaN": (Config(2, 2, 32, polynomial=8), None, {"dtype": "float16", "special": "nan_u"}),
    "forward of extreme steps": (
        Config(2, 2, 32, polynomial=16),
        None,
        {"special": "extreme_delta", "dtype": "bfloat16"},
    ),
    "relay bf16": (Config(4, 8, 16, relay=1), None, {"dtype": "bfloat16", "length": 128}),
    "relay of groups": (
        Config(8, 15, 16, groups=5, relay=1),
        None,
        {"dtype": "float16", "layout": "dim", "length": 77},
    ),
    "relay fp32": (Config(4, 6, 16, relay=1), None, {}),
    "relay, packed": (Config(4, 3, 16, relay=1), None, {"lengths": (70, 0, 1, 33), "dtype": "bfloat16"}),
    "forward of 32 lanes": (Config(32, 2, 16, splits=2), None, {"state": 40, "length": 50}),
    "backward of 32 lanes": (
        Config(16, 1, 16),
        Config(32, 2, 4, 2, groups=2, relay=1),
        {"state": 160, "length": 40, "dim": 6},
    ),
    "backward bf16": (FORWARD, BACKWARD, {"dtype": "bfloat16", "length": 67, "dim": 72}),
    "backward fp32": (FORWARD, BACKWARD, {"dim": 40}),
    "backward dim": (FORWARD, BACKWARD, {"dtype": "float16", "layout": "dim", "dim": 40}),
    "backward dim, batches of five and of one": (
        FORWARD,
        dataclasses.replace(BACKWARD, groups=5, splits=2),
        {"dtype": "bfloat16", "layout": "dim", "dim": 72, "length": 70},
    ),
    "backward dim, whole vectors": (
        FORWARD,
        dataclasses.replace(BACKWARD, groups=6),
        {"dtype": "bfloat16", "layout": "dim", "dim": 80, "length": 77},
    ),
    "backward dim, tiles of 8": (
        FORWARD,
        Config(16, 2, 8, relay=1),
        {"layout": "dim", "dim": 40, "length": 70},
    ),
    "backward cut": (FORWARD, dataclasses.replace(BACKWARD, splits=3), {"dtype": "bfloat16", "length": 128}),
    "backward of one warp": (FORWARD, dataclasses.replace(BACKWARD, warps=1, groups=5), {"dtype": "bfloat16"}),
    "backward of idle warps": (
        FORWARD,
        dataclasses.replace(BACKWARD, warps=8, groups=1),
        {"dtype": "bfloat16", "length": 77},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_right_and_without_a_race(name, monkeypatch, tmp_path):
    forward, backward, fields = CASES[name]
    emulator = install(monkeypatch, tmp_path)
    assert right(dataclasses.replace(SMALL, **fields), forward, backward)
    assert emulator.races == 0


@pytest.mark.parametrize("layout", ["length", "dim"])
@pytest.mark.parametrize("length", [1, 2])
def test_rows_too_short_to_average_out_an_error(length, layout, monkeypatch, tmp_path):
    install(monkeypatch, tmp_path)
    case = dataclasses.replace(SMALL, batch=2, dim=40, length=length, dtype="bfloat16", layout=layout)
    assert right(case, FORWARD, BACKWARD)


@pytest.mark.parametrize("fields", [{"keep_y": True}, {"checkpoint": 32}], ids=str)
def test_whatever_the_forward_kept(fields, monkeypatch, tmp_path):
    emulator = install(monkeypatch, tmp_path)
    case = dataclasses.replace(SMALL, dtype="bfloat16", length=96)
    assert right(case, FORWARD, BACKWARD, **fields)
    assert emulator.races == 0


PLANTED = {
    "a relay's own tiles": (
        Config(4, 8, 16, relay=1),
        "copies_wait<2>();\n      __syncwarp();",
        "copies_wait<2>();",
    ),
    "a block's tiles of B and C": (Config(2, 4, 32), "if (BC_TILES > 0 && !RELAY) __syncthreads();", "if (false);"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_missing_barrier_is_found(name, monkeypatch, tmp_path, capfd):
    config, before, after = PLANTED[name]

    def without(code: str) -> str:
        assert before in code
        return code.replace(before, after)

    emulator = install(monkeypatch, tmp_path, change=without)
    wrong(dataclasses.replace(SMALL, dtype="bfloat16"), config, None)
    assert emulator.races > 0
    assert "race: " in capfd.readouterr().err
