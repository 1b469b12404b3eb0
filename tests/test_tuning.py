"""Tuning composed: worker processes, sessions, the verb with all its actions, Python, several ranks."""

import collections
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
import types

import pytest
import torch
from faults import FaultyConfig, faulty, slow_to_compile

from scan_kernels import __main__ as command
from scan_kernels import autotune, trials, tuning
from scan_kernels.autotune import store, tuner
from scan_kernels.autotune.worker import Failed, Lost, NoWorker, Worker
from scan_kernels.cuda_module import Kernel
from scan_kernels.op import BackendUnavailable
from scan_kernels.profiling.device import Device, describe
from scan_kernels.selective_scan import OP, cases, fastest, selective_scan
from scan_kernels.selective_scan.backends import cuda

CPU = describe("cpu")
SHAPE = "1,4,20,2"
CASE = cases.parse(SHAPE, "float32")
ONE = ["tune", "--shapes", SHAPE, "--backend", "chunked", "--budget", "0.3", "--device", "cpu", "--direction"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache folder of the test's own, no shipped tables, nothing remembered, one thread in every process."""
    monkeypatch.setenv("SCAN_KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(store, "TABLES", tmp_path / "tables")
    monkeypatch.setattr(store, "_reported", set())
    store.table.cache_clear()
    yield tmp_path / "cache"
    store.table.cache_clear()


@pytest.fixture
def chunked_only(monkeypatch):
    """No Numba, which would take seconds to load in every process."""
    monkeypatch.setitem(OP.__dict__, "backends", {"chunked": OP.backends["chunked"]})


# ---- a worker --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def echo():
    with Worker("echo:Echo", first=10) as worker:
        yield worker


@pytest.mark.alone
def test_a_worker_answers_and_remembers_until_it_is_lost(echo):
    before = echo.lost
    value = echo.ask("add", 10, value=1)
    assert echo.ask("add", 10, value=5) == value + 5
    with pytest.raises(Failed, match="ValueError: one two"):
        echo.ask("fail", 10)
    assert echo.ask("add", 10, value=0) == value + 5
    for how, said in (("fault", "SIGSEGV"), ("killed", "SIGKILL .out of memory"), ("exit", "exit code 3")):
        with pytest.raises(Lost, match=said):
            echo.ask("misbehave", 10, how=how)
    begin = time.monotonic()
    with pytest.raises(Lost, match=r"hung: no result after 0\.2 s"):
        echo.ask("misbehave", 0.2, how="hang")
    with pytest.raises(Lost, match="RuntimeError: a bad address"):
        echo.ask("ruin", 10)
    assert echo.ask("add", 10, value=2) == 12  # made anew
    assert time.monotonic() - begin < 2.0  # without importing anything again
    assert echo.lost == before + 5


def test_a_worker_that_cannot_start_says_why():
    with Worker("no.such.module:name") as worker, pytest.raises(NoWorker, match="No module named 'no'"):
        worker.ask("anything", 10)


def test_workers_end_with_their_parent():
    program = """
import sys, time
from scan_kernels.autotune.worker import Worker
worker = Worker("echo:Echo", first=0)
worker.post("misbehave", how="hang")
print(worker._process.pid, worker._pid, flush=True)
time.sleep(60)
"""
    environment = os.environ | {"PYTHONPATH": os.path.dirname(__file__)}
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment)
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while alive := [pid for pid in pids if _runs(pid)]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.05)


def _runs(pid):
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# ---- a session -------------------------------------------------------------------------------------------------------


def test_a_candidate_that_is_wrong_or_breaks_its_process_is_a_trial_and_the_right_one_wins(monkeypatch):
    names = ("tail", "hang", "fault", "killed", "memory", "exit", "chatter")
    monkeypatch.setitem(OP.__dict__, "backends", {"faulty": faulty(*names)})
    problem = CASE.used("inference")
    with tuning.Session(OP, CPU, patience=0.5, bench="faults:FaultyBench") as session:
        result = session.tune(problem, tuning.BUDGETS["full"])
        lost = session._worker.lost
        session.publish(problem, result)
        huge = dataclasses.replace(problem, length=1 << 50)  # not even its tensors can be made
        failed = session.tune(huge, 1.0)
        assert failed.winner is None
        assert all("memory" in t.reason for t in failed.trials.values())
        assert session.verify(problem, "faulty", FaultyConfig("tail")).startswith("wrong result: out")
        assert session.verify(problem, "faulty", FaultyConfig()) is None
    reasons = {name[1].fault: trial.reason for name, trial in result.trials.items()}
    assert reasons.pop("none") == reasons.pop("chatter") == ""
    assert {name: reason.partition(":")[0] for name, reason in reasons.items()} == {
        "tail": "wrong result", "hang": "hung", "fault": "died of SIGSEGV",
        "killed": "died of SIGKILL (out of memory?)", "memory": "RuntimeError", "exit": "ended with exit code 3",
    }  # fmt: skip
    assert lost == 4
    assert result.winner == ("faulty", FaultyConfig("chatter"))  # the right one that does not dawdle
    assert result.gain > 1.5
    kept = json.loads(OP.key(problem, CPU).path.read_text())
    assert kept["choices"][0]["config"] == {"fault": "chatter"}
    assert {t.get("reason", "")[:4] for t in kept["trials"]} == {"", "wron", "hung", "died", "Runt", "ende"}
    assert kept["measured"] == problem.key()
    assert {"date", "clocks", "seconds", "default"} <= kept.keys()


@pytest.mark.alone
def test_what_comes_next_is_compiled_while_a_candidate_is_timed(monkeypatch, tmp_path):
    monkeypatch.setenv("FAULTS_LOG", str(tmp_path))
    monkeypatch.setitem(OP.__dict__, "backends", {"slow": slow_to_compile()})
    problem = CASE.used("inference")
    with tuning.Session(OP, CPU, compilers=2, bench="faults:FaultyBench") as session:
        result = session.tune(problem, tuning.BUDGETS["full"])
    assert {n[1].number: t.reason for n, t in result.trials.items() if t.reason} == {
        3: "compiling: ended with exit code 1"
    }
    log = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    parts = [(int(k), float(a), float(b), pid) for what, k, a, b, pid in log if what == "compiled"]
    compiled = {k: (a, b, pid) for k, a, b, pid in parts}
    ran = [(int(k), float(a), float(b), pid) for what, k, a, b, pid in log if what == "ran"]
    assert compiled.keys() == {0, 1, 2, 4}
    (timing,) = {pid for *_, pid in ran}
    assert timing not in {pid for *_, pid in compiled.values()}  # no candidate waited where it was timed
    # the inputs of the gate and the problem itself take kernels of their own, compiled at the same time
    assert any(k == n and p != q and a < d and c < b for k, a, b, p in parts for n, c, d, q in parts)
    assert sum(k == 0 for k, *_ in parts) == 4
    assert any(begin < b and a < end for k, (begin, end, _) in compiled.items() for n, a, b, _ in ran if n != k)
    assert result.winner[0] == "slow"


def test_a_search_does_not_wait_for_what_an_earlier_one_had_compiled(monkeypatch, tmp_path):
    monkeypatch.setenv("FAULTS_LOG", str(tmp_path))
    monkeypatch.setattr(tuning, "LEFTOVER_S", 0.5)
    endless = ("slow", slow_to_compile().configs(None, None)[-1])  # nothing runs that it waits for
    monkeypatch.setitem(OP.__dict__, "backends", {"slow": slow_to_compile(count=3)})
    with tuning.Session(OP, CPU, compilers=1, bench="faults:FaultyBench") as session:
        tuning._Remote(session, dataclasses.replace(CASE, length=30).used("inference")).expect([endless])
        busy = session._compilers[0].worker._pid
        session.tune(CASE.used("inference"), tuning.BUDGETS["full"])
    log = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    compiled = {pid for what, *_, pid in log if what == "compiled"}
    assert compiled
    assert compiled.isdisjoint({pid for what, *_, pid in log if what == "ran"} | {str(busy)})


def test_what_is_asked_for_is_compiled_next_and_the_rest_after_it():
    busy = types.SimpleNamespace(
        job=("another's", "job", 0), deadline=float("inf"), worker=types.SimpleNamespace(ready=bool)
    )
    session = types.SimpleNamespace(op=OP, _compilers=[busy])
    remote = tuning._Remote(session, CASE.used("inference"), gates=False)
    names = [("a", 0), ("b", 0), ("a", 1), ("a", 2)]
    remote.expect(names)
    remote.expect([("a", 2), ("a", 1)])
    assert [n for n, _ in remote.queue] == [("a", 2), ("a", 1), ("a", 0), ("b", 0)]
    remote.begun[("a", 2)] = {-1}
    remote.compiled[("a", 0)] = None
    remote.queue = remote.queue[1:]
    remote.expect(names)
    assert [n for n, _ in remote.queue][:2] == [("b", 0), ("a", 1)]
    remote.expect([])
    assert not remote.queue


def test_what_would_be_compiled_too_late_is_not_begun(monkeypatch, tmp_path):
    monkeypatch.setenv("FAULTS_LOG", str(tmp_path))
    monkeypatch.setitem(OP.__dict__, "backends", {"slow": slow_to_compile(count=6)})
    with tuning.Session(OP, CPU, compilers=1, bench="faults:FaultyBench") as session:
        for took, budget, unseen in ((100.0, 20.0, 5), (0.1, 20.0, 0), (100.0, tuning.BUDGETS["full"], 0)):
            for in_parts in (True, False):
                session._took["slow", in_parts] = collections.deque([took])
            result = session.tune(CASE.used("inference"), budget)
            assert (result.unseen, len(result.trials)) == (unseen, 6 - unseen)
            assert result.winner is not None
            assert result.seconds < 20.0  # nor does anybody wait for them


def test_what_nobody_compiles_ahead_has_time_to_be_compiled_when_it_first_runs(monkeypatch):
    monkeypatch.setitem(OP.__dict__, "backends", {"faulty": faulty("slow start")})
    with tuning.Session(OP, CPU, patience=2.0, compilers=1, bench="faults:FaultyBench") as session:
        result = session.tune(CASE.used("inference"), tuning.BUDGETS["full"])
    assert {n[1].fault: t.reason for n, t in result.trials.items()} == {"none": "", "slow start": ""}
    assert result.winner == ("faulty", FaultyConfig("slow start"))


H100 = Device("cuda", 0, "H100", "sm_90", 132, 232448, 50 << 20, 80 << 30)


@pytest.mark.parametrize(
    ("use", "more"),
    [
        ("training", {"length": 2048, "dtype": "bfloat16"}),
        ("inference", {"length": 1001, "layout": "dim"}),
        ("inference", {"length": 9000, "batch": 1, "dim": 40}),
        ("backward", {"length": 512, "groups": 2, "dim": 1536}),
        ("backward", {"length": 600, "sequences": 3, "batch": 1}),
        ("backward", {"length": 2048, "dtype": "bfloat16", "deterministic": True}),
    ],
    ids=str,
)
def test_what_is_compiled_ahead_is_what_is_launched(use, more, monkeypatch):
    """The CUDA backend's kernels by source and defines, seen where CuPy would compile them."""
    seen = set()
    monkeypatch.setattr(Kernel, "function", lambda kernel, device, shared: seen.add(repr(kernel._source)))
    monkeypatch.setattr(cuda, "supports", lambda problem: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d: types.SimpleNamespace(multi_processor_count=132))
    monkeypatch.setitem(OP.__dict__, "backends", {"cuda": cuda})
    sizes = {"batch": 2, "dim": 96} | more
    problem = dataclasses.replace(cases.parse("1,4,20,16", "float32").used(use, "cuda"), **sizes)
    bench = trials.Bench("selective_scan", "cpu")
    for config in cuda.configs(problem, H100)[::2]:
        seen.clear()
        bench.compile(problem.key(), "cuda", dataclasses.asdict(config))
        ahead = set(seen)
        seen.clear()
        for case, posed in [*cases.gates(problem), (cases.posed(problem), problem)]:
            arguments, _ = cases.pose(case.make(seed=1), posed, run=False)
            getattr(cuda, f"prepare_{posed.direction}")(posed, *arguments, config)
        assert seen
        assert seen == ahead, config


def test_at_the_problems_own_size_candidates_must_agree(monkeypatch):
    """A fault that small problems do not show: the gate passes it, the first right candidate's results do not."""
    problem = dataclasses.replace(CASE, length=500).used("inference")
    bench = trials.Bench("selective_scan", "cpu")
    chunked = OP.backends["chunked"]
    real, asked = chunked.forward, {"backend": "chunked", "problem": problem.key()}

    def forward(problem, inputs, outputs, config):
        real(problem, inputs, outputs, config)
        if problem.length == 500 and config.chunk == 32:
            outputs.out[..., 480:] = 0

    monkeypatch.setattr(chunked, "forward", forward)
    assert bench.judge(config={"chunk": 64}, trusted=None, **asked) is None
    asked["trusted"] = "chunked", {"chunk": 64}
    for _ in range(2):
        assert "at the problem's own size" in bench.judge(config={"chunk": 32}, **asked)
        assert bench.judge(config={"chunk": 16}, **asked) is None
        bench = trials.Bench("selective_scan", "cpu")  # as where a worker was lost


def test_a_search_begins_with_what_won_before(monkeypatch, chunked_only):
    session = tuning.Session.__new__(tuning.Session)
    session.op, session.device = OP, CPU
    problem = cases.parse("2,24,4000,16", "float32").used("inference")
    chunked = OP.backends["chunked"]
    sizes = [c.chunk for c in chunked.configs(problem, CPU)]
    winner = ("chunked", chunked.Config(sizes[-2]))
    session._winners = [(problem.bucket(), winner)]
    names, default, keep = session._candidates(problem, None)
    assert names[:2] == [default, winner]
    assert keep == [default]
    stored = {"backend": "chunked", "config": {"chunk": sizes[-1]}}
    store.publish(OP.key(problem, CPU), [stored])
    names, default, keep = session._candidates(problem, None)
    assert names[:3] == [default, ("chunked", chunked.Config(sizes[-1])), winner]
    assert keep == names[:2]
    assert sorted(n[1].chunk for n in names) == sorted(sizes)
    # what another process kept for a longer problem of the kind serves as well
    longer = dataclasses.replace(problem, length=9000)
    store.publish(OP.key(longer, CPU), [stored])
    store.publish(OP.key(dataclasses.replace(longer, state=3), CPU), [{"backend": "chunked", "config": {"chunk": -1}}])
    store.publish(OP.key(dataclasses.replace(longer, state=5), CPU), [{"backend": "gone", "config": {}}])
    found = tuning._earlier_winners(OP, CPU)
    assert sorted(bucket["length"] for bucket, _ in found) == [4096, 16384]
    assert {name for _, name in found} == {("chunked", chunked.Config(sizes[-1]))}


# ---- the verb --------------------------------------------------------------------------------------------------------


class Played(tuning.Session):
    """A session without processes: candidates take made-up times, and nothing is wrong."""

    verdicts: dict  # backend -> what the gate says of it

    def __init__(self, op, device):
        self.op, self.device, self._winners = op, device, []

    def close(self):
        pass

    def bound(self, problem):
        return 1e-3

    def verify(self, problem, backend, config):
        return self.verdicts.get(backend)

    def tune(self, problem, budget, backends=None, progress=lambda trial: None, finalists_only=False):
        names, default, _ = self._candidates(problem, backends)
        trials = {}
        for k, name in enumerate(names):
            timing = tuner.Timing(2e-3 - 1e-5 * k, 1e-3, 3e-3, 9, "played")
            reason = self.verdicts.get(name[0], "")
            trials[name] = tuner.Trial(name, None if reason else timing, reason, final=not reason)
            progress(trials[name])
        passed = [n for n in names if not trials[n].reason]
        return tuner.Result(trials, passed[-1] if passed else None, default, 1.0)

    @property
    def _worker(self):
        return self

    def ask(self, method, timeout):
        return {"core_mhz": 3000}


@pytest.fixture
def played(monkeypatch, chunked_only):
    monkeypatch.setattr(tuning, "Session", Played)
    monkeypatch.setattr(Played, "verdicts", {}, raising=False)


def said(capsys, *argv, code=0):
    """What a call of the verb printed, as one line."""
    assert command.main(["tune", "--device", "cpu", *argv]) == code
    return " ".join(capsys.readouterr().out.split())


def test_what_is_published_serves_auto_and_each_backend(monkeypatch, capsys):
    monkeypatch.setattr(tuning, "Session", Played)
    monkeypatch.setattr(Played, "verdicts", {}, raising=False)
    said(capsys, "--shapes", SHAPE)
    problem = CASE.used("training")
    for _ in range(2):
        assert OP.resolve(problem, CPU.torch).source == "tuned"
        assert {OP.resolve(problem, CPU.torch, name).source for name in ("cpu", "chunked")} == {"tuned"}
        OP.settled.clear()  # now from the file
        OP.forget()


def test_an_interrupt_keeps_what_is_finished_and_a_second_call_goes_on_there(monkeypatch, played, capsys):
    real, calls = Played.tune, []

    def interrupted(self, problem, *args):
        calls.append(problem)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, problem, *args)

    monkeypatch.setattr(Played, "tune", interrupted)
    argv = ["--shapes", "1,4,20,2", "1,4,20,3", "--direction", "backward"]
    assert "1 of 2 problems stored" in said(capsys, *argv, code=130)
    assert len(store.files()) == 1
    out = said(capsys, *argv)
    assert "1 tuned already" in out
    assert "1 of 1 problems stored" in out
    assert [p.state for p in calls] == [2, 3, 3]
    assert "2 of 2 problems stored" in said(capsys, *argv, "--again")


def test_where_no_process_starts_the_verb_says_so_and_exit_code_1(monkeypatch, played, capsys):
    def fail(self, *given):
        raise NoWorker("a worker process could not be started: no room")

    monkeypatch.setattr(Played, "tune", fail)
    assert "could not be started: no room" in said(capsys, "--shapes", SHAPE, code=1)


def test_what_is_deterministic_is_not_tuned_again(played, capsys):
    argv = ["--shapes", SHAPE, "--direction", "backward", "--set", "deterministic=yes"]
    assert "1 of 1 problems stored" in said(capsys, *argv)
    assert "1 tuned already" in said(capsys, *argv, "--again")


def test_a_default_that_fails_the_gate_is_said_and_exit_code_1(monkeypatch, played, capsys):
    monkeypatch.setattr(Played, "verdicts", {"chunked": "wrong result: dA: error 1"})
    out = said(capsys, "--shapes", SHAPE, "--direction", "backward", code=1)
    assert "the default failed: wrong result: dA" in out
    assert "none passed" in out
    assert re.search(r"rejected: chunked, \d times?: wrong result: dA", out) or "rejected: chunked, 1 time:" in out
    assert store.files() == []


@pytest.mark.filterwarnings("ignore:ignoring a tuned entry")
def test_a_cache_that_cannot_be_written_is_said_once_and_the_process_uses_what_it_found(played, capsys, cache):
    cache.write_text("a file where the folder should be")
    out = said(capsys, "--shapes", SHAPE, code=1)
    assert out.count("not stored, 4 problems: ") == 1
    assert OP.resolve(CASE.used("inference"), CPU.torch).source == "tuned"


def test_show_names_the_field_that_differs(played, capsys, monkeypatch):
    said(capsys, "--shapes", SHAPE, "--direction", "backward")
    assert re.search(r"used here .* yes .*1 entries$", said(capsys, "show"))
    assert "is for this problem" in said(capsys, "show", "--shapes", "1,4,19,2", "--direction", "backward")
    out = said(capsys, "show", "--shapes", "1,4,100,2", "--direction", "backward")
    assert "problem.length is 32, here 128" in out
    assert "heuristic" in out
    versions = store.versions()
    for name, value, expected in (
        ("versions", lambda: versions | {"numba": "9"}, "validity.versions.numba is "),
        ("setting", lambda d: {"memory_mhz": None, "driver": None, "power_w": 350}, "device.power_w is None, here 350"),
    ):
        with monkeypatch.context() as m:
            m.setattr(store, name, value)
            assert expected in said(capsys, "show")
    store.files()[0].write_text("{")
    assert "no: Expecting property name" in said(capsys, "show")


def test_diff_export_import_and_clear(played, capsys, tmp_path):
    said(capsys, "--shapes", SHAPE, "--direction", "forward")
    count, file = len(store.files()), tmp_path / "exported.json"
    assert f"{count} entries exported" in said(capsys, "export", str(file))
    assert f"0 differ, {count} alike" in said(capsys, "diff", str(file))
    assert re.search(r"\d differ, \d alike, 0 only here, 0 only there", said(capsys, "diff"))
    assert f"{count} entries removed" in said(capsys, "clear")
    assert f"{count} only there" in said(capsys, "diff", str(file))
    assert f"{count} of {count} entries imported, 0 are no newer" in said(capsys, "import", str(file))
    assert f"0 of {count} entries imported, {count} are no newer" in said(capsys, "import", str(file))
    OP.settled.clear()
    assert OP.resolve(CASE.used("inference"), CPU.torch).source == "tuned"
    content = json.loads(file.read_text())
    found = content["entries"][0]["choices"][0]["config"]
    found["chunk"] = 16 if found["chunk"] != 16 else 32
    content["entries"][1]["key"]["op"] = "../../away"
    file.write_text(json.dumps(content))
    assert "1 differ" in said(capsys, "diff", str(file))
    out = said(capsys, "import", str(file), code=1)
    assert "refused, 1 time: key: expected an op's name, got '../../away'" in out
    for spoilt in ("{", "[]", '{"entries": [3]}'):
        file.write_text(spoilt)
        assert "cannot be read" in said(capsys, "import", str(file), code=1)
    assert "not exported" in said(capsys, "export", str(tmp_path / "no" / "\0"), code=1)


def test_verify_finds_what_is_spoilt_wrong_or_for_another_machine(monkeypatch, played, capsys):
    said(capsys, "--shapes", "1,4,20,2", "1,4,20,3", "--direction", "backward")
    assert "2 entries are right, 0 are not, 0 are for" in said(capsys, "verify")
    first, second = store.files()
    entry = json.loads(first.read_text())
    entry["key"]["device"]["units"] += 1
    store.keep(entry)
    first.write_text("spoilt")
    assert "1 entries are right, 1 are not, 1 are for other" in said(capsys, "verify", code=1)
    first.unlink()
    entry = json.loads(second.read_text())
    store.keep(entry | {"measured": {"length": "x"}})
    assert "not a measured problem" in said(capsys, "verify", code=1)
    store.keep(entry)
    monkeypatch.setattr(Played, "verdicts", {"chunked": "wrong result: dA"})
    assert "chunked: wrong result: dA" in said(capsys, "verify", code=1)


def test_a_table_is_written_with_its_provenance_and_serves_whoever_has_nothing_tuned(played, capsys, tmp_path):
    folder = tmp_path / "tables"
    argv = ["--shapes", SHAPE, "--direction", "forward", "--table", str(folder)]
    assert "entries written to" in said(capsys, *argv)
    path = folder / CPU.slug / "selective_scan.json"
    content = store.read_table(path)
    assert content["provenance"]["clocks"] == {"core_mhz": [3000, 3000]}
    assert {"commit", "device", "validity", "date"} <= content["provenance"].keys()
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?|unknown", content["provenance"]["commit"])
    said(capsys, "clear")
    OP.settled.clear()
    OP.forget()
    problem = CASE.used("inference")
    assert OP.resolve(problem, CPU.torch).source == "shipped"
    assert OP._stored_choice(problem, dataclasses.replace(CPU, units=99), "auto")[0] is None
    # what the table has is not measured again for it, but is where it was not asked for
    assert "0 of 0 problems" in said(capsys, *argv)
    assert "0 of 0 problems" not in said(capsys, *argv[:-2])
    # where one of several candidates was timed, nothing was found out
    for entry in [json.loads(p.read_text()) for p in store.files()]:
        store.keep(entry | {"unseen": 3, "trials": entry["trials"][:1]})
    before = path.read_bytes()
    assert "not for the table" in said(capsys, *argv)
    assert path.read_bytes() == before
    # what it has of other sources is, but after what it lacks
    said(capsys, "clear")
    content = store.read_table(path)
    for entry in content["entries"]:
        entry["key"]["validity"]["sources"] = "older"
    store.write(path, content, store.MAX_TABLE)
    rows = said(capsys, "--shapes", SHAPE, "1,4,20,3", *argv[2:])
    assert 0 <= rows.find("1,4,20,3") < rows.find(SHAPE)
    path.write_text("{")
    with pytest.raises(SystemExit):
        said(capsys, *argv)


def test_regret_is_measured_resumed_and_summed_up(monkeypatch, played, capsys, tmp_path):
    asked = []

    def timed(self, problem, names, seconds):
        asked.append(problem)
        return [tuner.Timing(1.0, 1.0, 1.0, 100, "played") for _ in names]

    monkeypatch.setattr(Played, "time", timed, raising=False)
    file = tmp_path / "regret.json"
    assert "2 of 2 problems measured" in said(capsys, "regret", str(file), "--problems", "2", "--seed", "3")
    out = said(capsys, "regret", str(file), "--problems", "3", "--seed", "3")
    assert len(asked) == len(set(asked)) == 3  # what was measured is not measured again
    assert "tuned 0 % 0 % 3" in out
    records = store.read_records(file)
    assert [set(r) for r in records] == [{"problem", "seconds", "unseen", "times", "choices"}] * 3
    monkeypatch.setattr(Played, "verdicts", {"chunked": "wrong result: out"})
    assert "no candidate passed" in said(capsys, "regret", "--problems", "1", "--seed", "4", code=1)


def test_the_figures_of_regret_are_what_they_are_called():
    from io import StringIO

    from rich.console import Console

    from scan_kernels.cli import regret as figures

    def record(tuned, again, heuristic, best):
        times = {"tuned": tuned, "tuned again": again, "heuristic": heuristic, figures.EXHAUSTIVE: best}
        timings = {n: dataclasses.asdict(tuner.Timing(t, t, t, 100, "")) for n, t in times.items()}
        return {"times": timings, "seconds": {"tuned": 9.0, "tuned again": 3.0, figures.EXHAUSTIVE: 30.0}}

    records = [record(1.02, 1.0, 1.5, 1.0), record(1.0, 1.001, 4.0, 1.0), record(0.5, 0.5, 0.5, 0.55)]
    records[0]["unseen"] = {"tuned": 8, "tuned again": 0, figures.EXHAUSTIVE: 0}
    records[1]["unseen"] = {"tuned": 5, "tuned again": 0, figures.EXHAUSTIVE: 0}
    assert figures.regret(records[0], "tuned") == pytest.approx(0.02)
    assert figures.regret(records[2], figures.EXHAUSTIVE) == pytest.approx(0.1)
    out = StringIO()
    Console(file=out, width=120).print(figures.summary(records))
    said = " ".join(out.getvalue().split())
    assert "tuned 0.67 % 2 % 3" in said
    assert "heuristic 1.2e+02 % 3e+02 % 3" in said
    assert "further apart than the noise 33 %" in said
    assert "(geometric mean, best) 1.81x 4x" in said
    assert "seconds: tuned again 3 3" in said
    assert "unseen: tuned 6.5 8 2" in said  # an older record does not say


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_drawn_problems_repeat_by_seed_and_differ(kind):
    first, again, other = (cases.drawn(40, seed, kind) for seed in (1, 1, 2))
    assert first == again
    assert len({*first}) == 40
    assert len({*first} & {*other}) < 10
    assert {p.direction for p in first} == {"forward", "backward"}
    assert {p.layout for p in first} == {"length", "dim"}
    assert {p.device for p in first} == {kind}
    assert len({p.state for p in first}) >= 4


MODEL_130M = {(1536, 16, "dim"), (1536, 16, "length")}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"d_model": 64, "ssm_cfg": {"d_state": 8, "expand": 3}}, (192, 8)),
        ({"hidden_size": 64, "state_size": 32, "intermediate_size": 100}, (100, 32)),
        ({"d_model": 768}, (1536, 16)),
    ],
)
def test_a_model_is_named_or_read_from_its_config(config, expected, tmp_path):
    import argparse

    from scan_kernels.cli import tune as verb

    def posed(*argv):
        parser = argparse.ArgumentParser()
        verb.add_arguments(parser)
        return [p for _, p in verb.problems(OP, parser.parse_args(argv), CPU)]

    (tmp_path / "config.json").write_text(json.dumps(config))
    for where in (tmp_path, tmp_path / "config.json"):
        found = posed("--model", str(where), "--batch", "2", "--length", "100", "--direction", "backward")
        assert {(p.dim, p.state) for p in found} == {expected}
        assert {p.layout for p in found} == {"dim", "length"}
    for name in ("mamba-130m", "130m"):
        found = posed("--model", name, "--batch", "1", "4", "--length", "512", "2048", "--dtype", "bf16", "fp32")
        assert {(p.dim, p.state, p.layout) for p in found} == MODEL_130M
        assert {p.batch for p in found} == {1, 4}
        assert {p.length for p in found} == {512, 2048}
        assert {p.dtype for p in found} == {"bfloat16", "float32"}
        assert len(found) == 2 * 2 * 2 * 2 * 4
    (given,) = posed(
        "--dim", "64", "--state", "5", "--batch", "3", "--direction", "backward", "--set", "has_z=no", "layout=dim"
    )
    assert (given.batch, given.dim, given.length, given.state, given.has_z, given.layout) == (
        3,
        64,
        2048,
        5,
        False,
        "dim",
    )


def test_the_command_that_an_untuned_gpu_suggests_tunes_that_problem():
    import argparse
    import shlex

    from scan_kernels.cli import tune as verb

    kinds = [{}, {"layout": "dim", "has_z": False}, {"groups": 2, "deterministic": True, "dtype": "float16"}]
    kinds += [{"sequences": 3, "batch": 1, "has_initial_state": True}]
    for kind in kinds:
        for use in cases.USES:
            problem = dataclasses.replace(CASE.used(use), **kind)
            parser = argparse.ArgumentParser()
            verb.add_arguments(parser)
            found = verb.problems(OP, parser.parse_args(shlex.split(cases.spelled(problem))), CPU)
            assert problem in [p for _, p in found], (problem, found)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], "VERB"),
        (["nope"], "nope"),
        (["tune", "--shapes", "1,2,3"], "batch,dim,length,state"),
        (["tune", "--shapes", "1,2,3,0"], "sizes from 1"),
        (["tune", "--shapes", "1,2,3,4,int8"], "bf16"),
        (["tune", "--op", "nope"], "--op"),
        (["tune", "--backend", "nope"], "--backend"),
        (["tune", "--device", "tpu"], "--device"),
        (["tune", "--budget", "0"], "--budget"),
        (["tune", "--budget", "soon"], "--budget"),
        (["tune", "--budget", "nan"], "--budget"),
        (["tune", "--direction", "up"], "--direction"),
        (["tune", "--model", "mamba-9t"], "mamba-130m"),
        (["tune", "--model", __file__], "config.json"),
        (["tune", "--model", "130m", "--state", "0"], "--state"),
        (["tune", "--model", "130m", "--dtype", "int8"], "--dtype"),
        (["tune", "--model", "130m", "--shapes", SHAPE], "--shapes"),
        (["tune", "--batch", "4"], "--model"),
        (["tune", "--set", "color=red"], "--set"),
        (["tune", "--set", "layout=round"], "--set"),
        (["tune", "--set", "has_z=maybe"], "--set"),
        (["tune", "--shapes", SHAPE, "--set", "groups=3"], "groups"),
        (["tune", "explode"], "explode"),
        (["tune", "export"], "FILE"),
        (["tune", "regret", "--problems", "0"], "--problems"),
        (["tune", "regret", __file__], "regret: "),
        (["tune", "show", "file"], "FILE"),
        (["info", "--device", "meta"], "--device"),
        (["check", "--backend", "nope"], "--backend"),
    ],
)
def test_a_bad_argument_is_one_line_and_exit_code_2(argv, expected, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(argv)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1


def run(*argv, **environment):
    done = subprocess.run(
        [sys.executable, *argv], capture_output=True, text=True, env=os.environ | environment, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_ctrl_c_keeps_what_is_finished_for_other_processes_and_leaves_none_behind():
    shapes = [f"1,8,33,{state}" for state in range(4, 34)]
    program = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start without it
from scan_kernels.__main__ import main
from scan_kernels.selective_scan import OP
OP.__dict__["backends"] = {"chunked": OP.backends["chunked"]}  # no Numba, which would take seconds to load
sys.exit(main(sys.argv[1:]))
"""
    argv = ["tune", "--shapes", *shapes, "--budget", "0.5", "--device", "cpu"]
    tuned = subprocess.Popen([sys.executable, "-c", program, *argv], stdout=subprocess.PIPE, text=True)
    while len(store.files()) < 3:
        assert tuned.poll() is None
        time.sleep(0.05)
    with open(f"/proc/{tuned.pid}/task/{tuned.pid}/children") as f:
        (nursery,) = f.read().split()
    tuned.send_signal(signal.SIGINT)
    out, _ = tuned.communicate(timeout=30)
    assert tuned.returncode == 130
    assert "of 120 problems stored" in out
    assert "interrupted" in out
    assert not _runs(int(nursery))
    program = """
import sys
from scan_kernels.autotune import store
from scan_kernels.profiling.device import describe
heavy = {"triton", "cupy", "numba"} - set(sys.modules)
list(store.lookup(store.Key("op", "sources", {"a": 1}, describe("cpu"))))
assert not heavy & set(sys.modules), "a look-up imported a compiler"
import torch
from scan_kernels import fastest
from scan_kernels.selective_scan.cases import parse
print(fastest(parse("1,8,33,4", "float32").used("training"), "cpu").source)
tensors = parse("1,8,40,4", "float32").make()  # in the same bucket
tensors = {k: v for k, v in tensors.items() if k not in ("dout", "dlast_state")}
print(fastest(tensors).source)
print(fastest(parse("1,8,65,4", "float32").used("training"), "cpu").source)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["tuned", "tuned", "heuristic"], done.stderr


# ---- from Python -----------------------------------------------------------------------------------------------------


def test_python_tunes_one_problem_and_uses_it(played):
    problem = CASE.used("training")
    choice = autotune.tune(problem, budget=0.5)
    assert choice.source == "tuned"
    assert fastest(problem) == choice
    assert len(store.files()) == 1


def test_python_says_what_is_wrong(chunked_only):
    problem = CASE.used("inference")
    with pytest.raises(TypeError, match=r"problem: expected an op's Problem, got dict"):
        autotune.tune({})
    for bad in ("soon", 0, -1, float("nan"), None):
        with pytest.raises(ValueError, match=r"budget: expected quick, full or seconds above 0"):
            autotune.tune(problem, budget=bad)
        with pytest.raises(ValueError, match="budget"), autotune.on_first_use(bad):
            pass
    with pytest.raises(BackendUnavailable, match="no backend can run this problem"):
        autotune.tune(dataclasses.replace(problem, keep_y=True, checkpoint=16))
    with pytest.raises(AttributeError, match="nothing"):
        autotune.nothing  # noqa: B018


def test_python_raises_where_every_candidate_was_rejected(monkeypatch, played):
    monkeypatch.setattr(Played, "verdicts", {"chunked": "wrong result: out"})
    with pytest.raises(RuntimeError, match="no candidate passed the gate: chunked: wrong result: out"):
        autotune.tune(CASE.used("inference"), 0.3)


@pytest.mark.filterwarnings("ignore:ignoring a tuned entry")
def test_python_uses_what_it_found_where_it_cannot_be_stored(played, cache):
    cache.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="what tuning found cannot be stored"):
        assert autotune.tune(CASE.used("inference"), 0.3).source == "tuned"


def test_on_first_use_tunes_each_problem_once_and_only_there(monkeypatch, chunked_only):
    tuned = []

    def tune(problem, budget, device):
        tuned.append(problem)
        assert OP.on_untuned is None  # what tuning runs is not tuned
        if problem.state == 3:
            raise RuntimeError("no luck")
        OP.settle(problem, CPU, [store.Entry("chunked", {"chunk": 16}, "tuned")])

    monkeypatch.setattr(tuning, "tune", tune)

    def scan(state, **options):
        t = cases.parse(f"1,4,40,{state}", "float32").make()
        given = {k: v for k, v in t.items() if k not in ("dout", "dlast_state")}
        given["A"].requires_grad_()
        selective_scan(**given, **options).sum().backward()

    scan(2)
    assert tuned == []
    with autotune.on_first_use(1.0):
        for _ in range(2):
            scan(2)
        assert [p.direction for p in tuned] == ["forward", "backward"]
        scan(4, backend="chunked")
        assert len(tuned) == 2
        with pytest.warns(UserWarning, match="tuning failed, the heuristic runs: RuntimeError: no luck"):
            scan(3)
        assert len(tuned) == 4
    scan(5)
    assert len(tuned) == 4
    assert OP.on_untuned is None


RANKS = '''
import sys
import torch
import torch.distributed as dist
from scan_kernels import autotune, tuning
from scan_kernels.autotune import store
from scan_kernels.selective_scan import OP, cases
rank, where = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{where}", rank=rank, world_size=2)
OP.__dict__["backends"] = {"chunked": OP.backends["chunked"]}
def tuned(op, problem, device, seconds):
    """As if this had been found: nobody would take it by chance."""
    assert rank == 0
    if problem.state == 4:
        return 1 / 0
    found = [{"backend": "chunked", "config": {"chunk": 4}, "seconds": 1.0}]
    op.settle(problem, device, [store.Entry("chunked", {"chunk": 4}, "tuned")])
    return found

tuning._tuned = tuned
one, two, three = (cases.parse(f"1,4,20,{n}", "float32").used("inference") for n in (2, 3, 4))

def resolved(problem):
    found = OP.resolve(problem, torch.device("cpu"))
    print(found.source, found.config)

autotune.tune(one, 0.3)
resolved(one)
with autotune.on_first_use(0.3):
    resolved(two)
try:
    autotune.tune(three, 0.3)
except RuntimeError as e:
    print(e)
resolved(three)
dist.destroy_process_group()
'''


def test_two_ranks_take_the_choice_of_rank_0(tmp_path):
    """Each with a cache of its own, as on two machines."""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANKS, str(rank), str(tmp_path / "meet")],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | {"SCAN_KERNELS_CACHE": str(tmp_path / f"cache-{rank}")},
        )
        for rank in range(2)
    ]  # fmt: skip
    outs = [process.communicate(timeout=120) for process in ranks]
    assert [p.returncode for p in ranks] == [0, 0], outs
    for out, _ in outs:
        one, two, failed, three = out.splitlines()
        assert one == two == "tuned Config(chunk=4)"
        assert failed == "tuning failed on rank 0: ZeroDivisionError: division by zero"
        assert three.startswith("heuristic")


def test_info_names_the_device_the_backends_and_why(capsys):
    assert command.main(["info", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    for expected in (CPU.name, "torch", "chunked", "cuda", "heuristic: not tuned", "0 tuned entries"):
        assert expected in out
