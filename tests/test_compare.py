"""Comparing reports: what is called faster or slower, and how often it is wrong, on timings with realistic noise."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from scan_kernels import measure
from scan_kernels.__main__ import main
from scan_kernels.profiling import compare, report, timer
from scan_kernels.profiling.compare import AMBIGUOUS, FAST, SAME, SLOW

RUNS, CELLS = 20, 45


def sampled(random, true_s, noise, scatter=0.004, samples=40):
    """The timing of one measurement: an offset of its own, drift, scatter, now and then a sample that took longer."""
    offset = 1 + noise * random.standard_normal()
    drift = 0.5 * noise * random.standard_normal() * np.linspace(-1, 1, samples)
    tail = np.where(random.random(samples) < 0.05, random.exponential(0.05, samples), 0.0)
    times = true_s * offset * (1 + drift + scatter * np.abs(random.standard_normal(samples)) + tail)
    return timer._timing(list(times), "simulated", "enough")


def simulated(random, noise, factor=lambda cell: 1.0, loud=lambda cell: False):
    """A report of ``CELLS`` cells, each measured twice; all of a run share a small offset, as a clock gives them.

    Those that are ``loud`` are another backend's, and ten times as noisy.
    """
    shared = 1 + 0.3 * noise * random.standard_normal()
    cases = []
    for cell in range(CELLS):
        true_s = 1e-4 * 1.2**cell * factor(cell) * shared
        records = [
            {"runner": "chunked" if loud(cell) else "cuda", "kind": "backend", "use": "inference"}
            | dataclasses.asdict(sampled(random, true_s, noise * (10 if loud(cell) else 1))) for _ in range(2)
        ]  # fmt: skip
        cases.append({"name": f"{cell}", "title": f"case {cell}", "results": [measure.merged(*records)]})
    return {"device": {"name": "simulated"}, "date": "2026-11-25", "cases": cases}


def verdicts(random, noise, factor=lambda cell: 1.0):
    return [
        c.verdict for _ in range(RUNS)
        for c in compare.compare(simulated(random, noise), simulated(random, noise, factor))
    ]  # fmt: skip


@pytest.mark.parametrize("noise", [0.0005, 0.002, 0.004, 0.01, 0.05])
def test_equal_code_differs_in_one_cell_of_twenty_at_most(noise):
    found = verdicts(np.random.default_rng(1), noise)
    assert (found.count(FAST) + found.count(SLOW)) / len(found) <= 0.05
    if noise <= 0.004:  # and where it is quiet, that is said
        assert found.count(SAME) / len(found) >= 0.9


@pytest.mark.parametrize("noise", [0.0005, 0.002, 0.004])
@pytest.mark.parametrize("everywhere", [True, False])
def test_a_planted_slowdown_is_found_in_nineteen_cells_of_twenty(noise, everywhere):
    random = np.random.default_rng(2)
    touched = [everywhere or cell % 9 == 0 for cell in range(CELLS)]
    found = verdicts(random, noise, lambda cell: 1.03 if touched[cell] else 1.0)
    slowed = [v for i, v in enumerate(found) if touched[i % CELLS]]
    others = [v for i, v in enumerate(found) if not touched[i % CELLS]]
    assert slowed.count(SLOW) / len(slowed) >= 0.95
    assert not others or others.count(SLOW) / len(others) <= 0.05


def test_a_noisy_backend_is_not_taken_for_as_quiet_as_the_others_nor_they_for_it():
    random, loud, found = np.random.default_rng(6), lambda cell: cell % 4 == 0, {}
    for planted in (1.0, 1.03):
        for _ in range(RUNS):
            runs = [simulated(random, 0.003, lambda cell, by=by: by, loud) for by in (1.0, planted)]
            for c in compare.compare(*runs):
                found.setdefault((c.backend, planted), []).append(c.verdict)
    for backend in ("cuda", "chunked"):
        same = found[backend, 1.0]
        assert (same.count(FAST) + same.count(SLOW)) / len(same) <= 0.05, backend
    assert found["cuda", 1.03].count(SLOW) / len(found["cuda", 1.03]) >= 0.95


def test_a_speed_up_is_found_as_well():
    found = verdicts(np.random.default_rng(3), 0.002, lambda cell: 0.97)
    assert found.count(FAST) / len(found) >= 0.95


def test_on_a_noisy_machine_nothing_is_claimed():
    found = verdicts(np.random.default_rng(4), 0.05, lambda cell: 1.03)
    assert found.count(AMBIGUOUS) / len(found) > 0.8


def pair(**changes):
    """Two reports of one cell, 1 ms each; changes to the second's record."""
    record = {"runner": "cuda", "kind": "backend", "use": "backward", "median_s": 1e-3, "low_s": 0.999e-3,
              "high_s": 1.001e-3, "runs": 30, "error_s": 1e-6, "disturbed": [],
              "passes": [1e-3, 1.0002e-3]}  # fmt: skip
    made = [{"device": {"name": "one"}, "date": "2026", "cases": [{"name": "c", "title": "c", "results": [r]}]}
            for r in (record, record | changes)]  # fmt: skip
    return made


def test_verdicts_come_from_the_interval():
    for change, verdict in ((1.0, SAME), (1.03, SLOW), (0.97, FAST), (1.004, SAME), (1.5, SLOW)):
        (cell,) = compare.compare(*pair(median_s=1e-3 * change, passes=[1e-3 * change] * 2))
        assert cell.verdict == verdict, change
        assert cell.low < cell.change < cell.high
        assert cell.change == pytest.approx(change - 1)


def test_a_disturbed_time_or_too_few_samples_tell_nothing():
    (cell,) = compare.compare(*pair(median_s=2e-3, disturbed=["quartiles 12 % apart"]))
    assert cell.verdict == SLOW  # what the interval says already
    (cell,) = compare.compare(*pair(median_s=2e-3, disturbed=["other processes took 50 % of the cores"]))
    assert cell.verdict == AMBIGUOUS
    (cell,) = compare.compare(*pair(median_s=2e-3, disturbed=["throttled: power cap"]))
    assert (cell.verdict, cell.why) == (AMBIGUOUS, "throttled: power cap")
    (cell,) = compare.compare(*pair(median_s=2e-3, runs=1))
    assert cell.verdict == AMBIGUOUS


def test_older_reports_know_less_and_are_ambiguous_sooner():
    old, new = pair()
    for made in (old, new):
        for key in ("passes", "error_s", "disturbed"):
            del made["cases"][0]["results"][0][key]
    (cell,) = compare.compare(old, new)
    assert (cell.verdict, cell.why) == (AMBIGUOUS, "a change of 3 % cannot be ruled out")


@pytest.mark.parametrize("change", [1.0, 1.2])
def test_the_verb_compares_files_and_fails_on_slow(change, tmp_path, capsys):
    paths = []
    for i, made in enumerate(pair(median_s=1e-3 * change)):
        folder = tmp_path / str(i)
        report.save(report.empty() | made, folder)
        paths.append(str(folder / "report.json"))
    assert main(["report", "--compare", *paths]) == (change > 1)
    said = capsys.readouterr().out
    assert ("1 SLOW" in said) == (change > 1)
    assert "backward" in said


def test_reports_of_two_devices_are_not_compared(tmp_path, capsys):
    paths = []
    for i, made in enumerate(pair()):
        report.save(report.empty() | made | {"device": {"name": f"device {i}"}}, tmp_path / str(i))
        paths.append(str(tmp_path / str(i) / "report.json"))
    for arguments in (paths, [*paths, paths[0]]):
        with pytest.raises(SystemExit) as e:
            main(["report", "--compare", *arguments])
        assert e.value.code == 2
        said = capsys.readouterr().err
        assert "--compare" in said
        assert said.count("\n") == 1


def test_the_self_check_tells_equal_code_from_slowed_code(tmp_path, monkeypatch, capsys):
    """With a made-up timer of known noise: what the verb does with a GPU's real one."""
    from scan_kernels.selective_scan import cases

    random, slowed = np.random.default_rng(5), []
    monkeypatch.setattr(cases, "tagged", lambda tag: [cases.Case(str(i), batch=1, dim=4, length=8) for i in range(7)])

    def together(calls, device, *, seconds):
        return {name: sampled(random, 1.03e-3 if call in slowed else 1e-3, 0.002) for name, call in calls.items()}

    def slow(call, median_s, device):
        slowed.append(lambda: call)
        return slowed[-1]

    monkeypatch.setattr(timer, "compare", together)
    monkeypatch.setattr("scan_kernels.cli.report_compare._slowed", slow)
    arguments = ["report", "--self-check", "--device", "cpu", "--out", str(tmp_path)]
    assert main(arguments) == 0
    (file,) = tmp_path.glob("*/self-check.json")
    made = json.loads(file.read_text())
    assert max(made["differ"], made["missed"]) <= 0.05
    assert len(made["cells"]["same"]) == len(made["cells"]["planted"]) == 7 * 3 * 2 * 2
    # a timer that does not see the slowdown fails the check
    slowed.clear()
    monkeypatch.setattr("scan_kernels.cli.report_compare._slowed", lambda call, *_: call)
    assert main(arguments) == 1
