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
    "forward of whole vectors": (Config(2, 2, 32), None, {"dtype": "bfloat16", "length": 88}),
    "forward of whole vectors, fp32": (Config(4, 2, 32), None, {"length": 76}),
    "forward of a lane for a channel": (Config(1, 2, 32), None, {"state": 8, "dtype": "bfloat16", "length": 72}),
    "forward of a lane for a channel, unaligned": (Config(1, 1, 32), None, {"state": 3, "length": 61}),
    "forward across channels": (Config(2, 2, 32), None, {"dtype": "float16", "layout": "dim", "length": 77}),
    "forward across channels, no whole vectors": (
        Config(2, 2, 32),
        None,
        {"dim": 20, "dtype": "bfloat16", "layout": "dim", "length": 45},
    ),
    "forward of 16 states a lane": (Config(4, 4, 32), None, {"state": 64, "dtype": "bfloat16", "layout": "dim"}),
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
    "backward of 8 states a lane": (
        Config(16, 2, 16),
        Config(32, 2, 4, 2, groups=2, relay=1),
        {"state": 256, "length": 40, "dim": 6, "dtype": "bfloat16"},
    ),
    "backward of 8 states a lane, 6 of them in the last": (
        Config(32, 2, 32),
        Config(32, 2, 4, 2, groups=2, relay=1),
        {"state": 254, "length": 37, "dim": 3, "layout": "dim"},
    ),
    "backward of 8 states and 4 lanes": (
        Config(4, 2, 16),
        Config(4, 2, 4, 2, groups=2, relay=1),
        {"state": 31, "length": 37, "dim": 20},
    ),
    "backward bf16": (FORWARD, BACKWARD, {"dtype": "bfloat16", "length": 67, "dim": 72}),
    "backward fp32": (FORWARD, dataclasses.replace(BACKWARD, groups=5), {"dim": 40}),
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
        Config(16, 2, 8, groups=2, relay=1),
        {"layout": "dim", "dim": 38, "length": 70},
    ),
    "backward dim fp32, batches of two and of one": (
        FORWARD,
        dataclasses.replace(BACKWARD, groups=3),
        {"layout": "dim", "dim": 28, "length": 83},
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


def test_with_y_kept(monkeypatch, tmp_path):
    emulator = install(monkeypatch, tmp_path)
    case = dataclasses.replace(SMALL, dtype="bfloat16", length=96)
    assert right(case, FORWARD, BACKWARD, keep_y=True)
    assert emulator.races == 0


# a backward's configuration, steps from one kept state to the next, more than its tile's, and the case
FEW_KEPT = {
    "bf16": (BACKWARD, 32, {"dtype": "bfloat16", "length": 97}),
    "fp32": (BACKWARD, 32, {"length": 96}),
    "dim": (BACKWARD, 32, {"dtype": "bfloat16", "layout": "dim", "length": 97, "dim": 40}),
    "fp32 dim, 48": (BACKWARD, 48, {"layout": "dim", "length": 200}),
    "less than a tile": (BACKWARD, 32, {"length": 9, "batch": 2}),
    "cut": (dataclasses.replace(BACKWARD, splits=3), 32, {"length": 197, "dtype": "float16"}),
    "packed": (BACKWARD, 32, {"lengths": (70, 0, 1, 33, 9), "dtype": "bfloat16"}),
    "packed, cut": (dataclasses.replace(BACKWARD, splits=2), 32, {"lengths": (70, 0, 1, 133), "layout": "dim"}),
    "tiles of 8": (dataclasses.replace(BACKWARD, tile=8), 16, {"length": 77}),
    "64 states": (
        Config(32, 2, 16, 2, groups=3, relay=1),
        64,
        {"dtype": "bfloat16", "state": 64, "dim": 6, "length": 200},
    ),
    "64 states fp32": (Config(32, 2, 16, 2, groups=3, relay=1), 64, {"state": 64, "dim": 6, "length": 130}),
    "160 states": (
        Config(32, 2, 4, 2, groups=2, relay=1),
        32,
        {"dtype": "bfloat16", "state": 160, "dim": 6, "length": 77},
    ),
}


@pytest.mark.parametrize("name", FEW_KEPT)
def test_whatever_the_forward_kept(name, monkeypatch, tmp_path):
    config, checkpoint, fields = FEW_KEPT[name]
    emulator = install(monkeypatch, tmp_path)
    case = dataclasses.replace(SMALL, **fields)
    forward = Config(min(32, case.state // 4), 1, 16)
    assert right(case, forward, config, checkpoint=checkpoint)
    assert emulator.races == 0


# how many segments of a row the windows may have, and how many windows that makes
WINDOWS = {
    "of all rows": (2, 4, BACKWARD, {"batch": 2, "length": 97, "dtype": "bfloat16"}, {}),
    "of rows, deterministic": (2, 6, BACKWARD, {"batch": 3, "length": 80, "groups": 2}, {"deterministic": True}),
    "too large for the limit": (
        0,
        6,
        BACKWARD,
        {"batch": 2, "length": 70, "layout": "dim", "dtype": "bfloat16"},
        {"keep_y": True},
    ),
    "cut, deterministic": (
        12,
        3,
        dataclasses.replace(BACKWARD, splits=4, finer=2),
        {"batch": 2, "length": 400, "dtype": "bfloat16", "constant_B": True},
        {"deterministic": True},
    ),
    "constant": (1, 8, BACKWARD, {"batch": 2, "length": 97, "constant_B": True, "constant_C": True}, {}),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_windows_of_a_backward(name, monkeypatch, tmp_path):
    segments, count, config, fields, more = WINDOWS[name]
    emulator = install(monkeypatch, tmp_path)
    case, more = dataclasses.replace(SMALL, **fields), more | {"checkpoint": 32}
    monkeypatch.setattr(cuda, "SCRATCH", segments * 2 * 4 * case.dim * case.state)  # two tiles a segment
    problem = dataclasses.replace(case.problem("backward", "cuda", training=True), **more)
    assert len(cuda._windows(problem, config)) == count
    assert right(case, FORWARD, config, **more)
    assert emulator.races == 0


def test_windows_cover_each_step_once_within_the_limit():
    for batch, dim, state, length in ((8, 5120, 64, 2048), (64, 1536, 256, 500), (1, 2048, 128, 65536), (3, 8, 16, 1)):
        case = Case("windows", batch=batch, dim=dim, state=state, length=length)
        problem = dataclasses.replace(case.problem("backward", "cuda", training=True), checkpoint=64)
        tile = 16 if state <= 64 else 1024 // state
        windows = cuda._windows(problem, Config(32, 4, tile, relay=1))
        assert sum(w.rows * w.steps for w in windows) == batch * length
        for w in windows:
            assert w.step % 64 == 0
            assert w.rows * -(-w.steps // 64) * (64 // tile) * 4 * dim * state <= cuda.SCRATCH
        rows = {w.row: [v for v in windows if v.row == w.row] for w in windows}
        for of_row in rows.values():  # the last steps first, each where the one after it begins
            assert [w.step + w.steps for w in of_row] == [length, *(w.step for w in of_row[:-1])]
            assert of_row[-1].step == 0


PLANTED = {
    "a relay's own tiles": (
        Config(4, 8, 16, relay=1),
        None,
        "copies_wait<2>();\n      __syncwarp();",
        "copies_wait<2>();",
    ),
    "a relay's turn": (Config(4, 8, 16, relay=1), None, "turns.wait(warp, i / TURNS - (turn == 0));", ";"),
    "a block's tiles of B and C": (
        Config(2, 4, 32),
        None,
        "if (BC_TILES > 0 && !RELAY) __syncthreads();",
        "if (false);",
    ),
    "a turn between sweeps": (FORWARD, BACKWARD, "if (LATE) take_turn(), finish_last()", "if (LATE) finish_last()"),
}


def test_turns_may_be_passed_as_the_sanitizer_has_them_passed(monkeypatch, tmp_path):
    emulator = install(monkeypatch, tmp_path, change=lambda code: f"#define TURN_ARRIVALS 32\n{code}")
    assert right(dataclasses.replace(SMALL, dtype="bfloat16"), Config(4, 4, 16, groups=2, relay=1), BACKWARD)
    assert emulator.races == 0


@pytest.mark.parametrize("name", PLANTED)
def test_a_missing_barrier_is_found(name, monkeypatch, tmp_path, capfd):
    forward, backward, before, after = PLANTED[name]
    changed = []

    def without(code: str) -> str:
        changed.append(before in code)
        return code.replace(before, after)

    emulator = install(monkeypatch, tmp_path, change=without)
    wrong(dataclasses.replace(SMALL, dtype="bfloat16"), forward, backward)
    assert any(changed)
    assert emulator.races > 0
    assert "race: " in capfd.readouterr().err
