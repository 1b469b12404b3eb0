"""The gate itself: what it accepts, what it refuses, and what it draws again."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from scan_kernels import check

OP = check.find_op("selective_scan")
CASE = next(c for c in OP.cases.CASES if c.name == "float32")


def planted(monkeypatch, change):
    """Let every backend's results pass through ``change(results, number of the draw)``."""
    honest, draws = OP.cases.candidate, []

    def candidate(*arguments, **options):
        draws.append(None)
        return change(honest(*arguments, **options), len(draws))

    monkeypatch.setattr(OP.cases, "candidate", candidate)
    return draws


def scaled(tensor, share):
    """``tensor`` with an error of ``share`` times what the gate allows, spread over all elements alike."""

    def change(results, draw):
        allowed = 2e-7 * 2 + check.FLOORS["float32"]
        factor = share(draw) * allowed if callable(share) else share * allowed
        return results | {tensor: results[tensor].double() * (1 + factor)}

    return change


def test_an_honest_backend_passes():
    rows = check.run_case(OP, CASE, "cpu", ["chunked", "cuda"])
    assert {r.backend for r in rows} == {"chunked"}
    assert all(r.ok for r in rows)
    assert {"out", "last_state", "du", "ddelta", "dA", "dB", "dC", "dD", "dz", "ddelta_bias"} == {
        r.tensor for r in rows
    }


@pytest.mark.parametrize("tensor", ["out", "last_state", "dA", "dB", "ddelta_bias"])
def test_a_wrong_result_fails_at_once(monkeypatch, tensor):
    draws = planted(monkeypatch, lambda results, _: results | {tensor: results[tensor] * 1.001})
    rows = check.run_case(OP, CASE, "cpu", ["chunked"])
    assert [r.tensor for r in rows if not r.ok] == [tensor]
    assert len(draws) == 1


def test_one_wrong_row_fails(monkeypatch):
    def change(results, _):
        results["out"][1, 3] *= 1.0001
        return results

    planted(monkeypatch, change)
    (failed,) = (r for r in check.run_case(OP, CASE, "cpu", ["chunked"]) if not r.ok)
    assert failed.tensor == "out"
    assert failed.worst_row > check.NEAR


def test_what_was_not_written_fails_and_is_not_drawn_again(monkeypatch):
    def change(results, _):
        results["du"][0, 0, 0] = torch.nan
        return results

    draws = planted(monkeypatch, change)
    (failed,) = (r for r in check.run_case(OP, CASE, "cpu", ["chunked"]) if not r.ok)
    assert failed.tensor == "du"
    assert failed.error == np.inf
    assert len(draws) == 1


def test_a_near_miss_is_drawn_again_and_says_so(monkeypatch):
    draws = planted(monkeypatch, scaled("last_state", lambda draw: 1.6 if draw == 1 else 0.0))
    rows = check.run_case(OP, CASE, "cpu", ["chunked"])
    assert all(r.ok for r in rows)
    assert len(draws) == 2
    assert all("draw 2" in r.reason for r in rows)


def test_a_miss_in_every_draw_fails(monkeypatch):
    draws = planted(monkeypatch, scaled("last_state", 1.6))
    rows = check.run_case(OP, CASE, "cpu", ["chunked"])
    assert any(not r.ok for r in rows)
    assert len(draws) == check.DRAWS


def test_a_backend_that_raises_fails_with_its_reason(monkeypatch):
    def change(results, _):
        raise RuntimeError("the kernel is gone")

    planted(monkeypatch, change)
    (row,) = check.run_case(OP, CASE, "cpu", ["chunked"])
    assert not row.ok
    assert "the kernel is gone" in row.reason


def test_poison_is_nan_and_ends_with_its_context():
    with check.poisoned():
        assert torch.empty(7).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_record_holds_every_row(tmp_path):
    rows = check.run_case(OP, CASE, "cpu", ["chunked"])
    path = check.write_record(rows, {}, ["selective_scan"], torch.device("cpu"), tmp_path)
    record = json.loads(path.read_text())
    assert len(record["rows"]) == len(rows) == record["passed"]
    assert record["sources"] == {"selective_scan": OP.sources}
    assert list(path.parent.iterdir()) == [path]


def test_cases_side_by_side_give_the_rows_of_one_after_the_other(monkeypatch):
    op = check.find_op("selective_scan")
    few = [c for c in op.cases.CASES if "ci" in c.tags][:3]

    def rows(workers):
        monkeypatch.setattr(check, "_workers", lambda device: workers)
        return dict(check._side_by_side(op, few, torch.device("cpu"), ["chunked"]))

    alone, together = rows(1), rows(2)
    assert all(r.ok for found in together.values() for r in found)
    assert {n: [r.tensor for r in found] for n, found in together.items()} == {
        n: [r.tensor for r in found] for n, found in alone.items()
    }
