"""The autotune room, and the verbs that compose it: what tuning learns is right, kept, and never in the way."""

import dataclasses
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
import types
import warnings

import pytest
import torch

from scan_kernels import __main__ as command
from scan_kernels.autotune import search, store, tuner
from scan_kernels.cli import tune as verb
from scan_kernels.profiling.device import describe
from scan_kernels.profiling.timer import Timing
from scan_kernels.selective_scan import OP, cases
from scan_kernels.selective_scan.problem import Problem

CPU = describe("cpu")
CHOICES = [
    {"backend": "chunked", "config": {"chunk": 32}, "seconds": 1e-3},
    {"backend": "cpu", "config": {"blocks": 2}, "seconds": 2e-3},
]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache folder of the test's own, no shipped tables, and nothing remembered."""
    monkeypatch.setenv("SCAN_KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(store, "TABLES", tmp_path / "tables")
    monkeypatch.setattr(store, "_reported", set())
    store._table.cache_clear()
    OP.forget()
    yield tmp_path / "cache"
    store._table.cache_clear()
    OP.forget()


def some_problem(**changes):
    sizes = {"direction": "forward", "batch": 2, "dim": 24, "length": 200, "state": 16}
    return Problem(**(sizes | changes))


def some_key(device=CPU, **changes):
    return OP.key(some_problem(**changes), device)


# ---- the store ------------------------------------------------------------------------------------------------------


def test_round_trip(cache):
    key = some_key()
    assert list(store.lookup(key)) == []
    path = store.publish(key, CHOICES, date="today")
    found = list(store.lookup(key))
    assert [(e.backend, e.config, e.source) for e in found] == [
        ("chunked", {"chunk": 32}, "tuned"),
        ("cpu", {"blocks": 2}, "tuned"),
    ]
    written = json.loads(path.read_text())
    assert written["key"] == key.as_dict()
    assert written["date"] == "today"
    assert set(written["key"]) == {"op", "problem", "device", "sources", "versions"}
    assert {"torch", "numba"} <= set(written["key"]["versions"])
    assert store.files() == [path]
    if os.name == "posix":
        assert {p.stat().st_mode & 0o777 for p in (cache, *path.parents[:3])} == {0o700}
        assert path.stat().st_mode & 0o777 == 0o600


def test_a_later_result_replaces_an_earlier_one():
    store.publish(some_key(), CHOICES)
    store.publish(some_key(), CHOICES[1:])
    assert [e.backend for e in store.lookup(some_key())] == ["cpu"]


def test_nothing_is_published_that_could_not_be_read_back():
    for bad in ([], [{"backend": 3, "config": {}}], [{"backend": "cpu", "config": {"x": [1]}}]):
        with pytest.raises(ValueError, match="choice"):
            store.publish(some_key(), bad)
    with pytest.raises(ValueError, match="bytes"):
        store.publish(some_key(), CHOICES, trials="x" * store.MAX_ENTRY)
    assert store.files() == []


def test_neighbours_share_a_bucket_and_others_do_not():
    base = some_problem(batch=4, dim=24, length=200)  # 96 -> 128 rows*dim, 200 -> 256 steps
    same = [{"batch": 2, "dim": 40}, {"batch": 1, "dim": 128}, {"length": 129}, {"length": 256}]
    for change in same:
        assert dataclasses.replace(base, **change).bucket() == base.bucket(), change
    other = [{"batch": 6}, {"dim": 10}, {"length": 257}, {"length": 128}, {"sequences": 4}]
    other += [{"direction": "backward"}, {"state": 15}, {"groups": 2}, {"dtype": "bfloat16"}, {"layout": "dim"}]
    other += [{"device": "cuda"}, {"checkpoint": 16}]
    flags = ("constant_B", "constant_C", "has_D", "has_z", "has_bias", "softplus", "keep_y", "deterministic")
    other += [{f: True} for f in (*flags, "has_initial_state", "has_last_state")]
    paths = [OP.key(dataclasses.replace(base, **change), CPU).path for change in ({}, *other)]
    assert len(set(paths)) == len(paths)
    assert {name for change in other for name in change} == {f.name for f in dataclasses.fields(Problem)}
    json.dumps(base.bucket())


@pytest.mark.parametrize("change", [{"name": "another"}, {"arch": "sm_90"}, {"units": 7}, {"l2_bytes": 1}])
def test_another_device_misses(change):
    store.publish(some_key(), CHOICES)
    assert list(store.lookup(some_key(dataclasses.replace(CPU, **change)))) == []


def test_other_sources_or_versions_miss(monkeypatch):
    key = some_key()
    store.publish(key, CHOICES)
    assert list(store.lookup(dataclasses.replace(key, sources="0" * 32))) == []
    assert list(store.lookup(dataclasses.replace(key, op="another"))) == []
    assert list(store.lookup(key))
    monkeypatch.setattr(store, "versions", lambda: {"torch": "1.0"})
    assert list(store.lookup(key)) == []


def test_the_source_hash_follows_every_kernel_file(tmp_path):
    folder = tmp_path / "backends"
    folder.mkdir()
    (folder / "a.py").write_text("one")
    (folder / "b.cu").write_text("two")
    seen = [store.hash_sources([folder])]
    (folder / "notes.txt").write_text("no kernel")
    assert store.hash_sources([folder]) == seen[0]
    (folder / "b.cu").write_text("two ")
    seen.append(store.hash_sources([folder]))
    (folder / "b.cu").rename(folder / "c.cu")
    seen.append(store.hash_sources([folder]))
    (folder / "d.cuh").write_text("")
    seen.append(store.hash_sources([folder]))
    assert len(set(seen)) == len(seen)


def entry(**changes):
    return json.dumps({"schema": store.SCHEMA, "key": some_key().as_dict(), "choices": CHOICES} | changes).encode()


CORRUPT = {
    "empty": lambda p: p.write_bytes(b""),
    "truncated": lambda p: p.write_bytes(entry()[:-40]),
    "not text": lambda p: p.write_bytes(bytes(range(256))),
    "not an entry": lambda p: p.write_bytes(b"[1, 2]"),
    "other schema": lambda p: p.write_bytes(entry(schema=0)),
    "key of a wrong type": lambda p: p.write_bytes(entry(key=[])),
    "another key": lambda p: p.write_bytes(entry(key=some_key(state=8).as_dict())),
    "choices of a wrong type": lambda p: p.write_bytes(entry(choices={"chunked": 3})),
    "no choices": lambda p: p.write_bytes(entry(choices=[])),
    "backend of a wrong type": lambda p: p.write_bytes(entry(choices=[{"backend": ["cpu"], "config": {}}])),
    "config of a wrong type": lambda p: p.write_bytes(entry(choices=[{"backend": "cpu", "config": {"x": None}}])),
    "not a number": lambda p: p.write_bytes(entry().replace(b"32", b"NaN")),
    "endless number": lambda p: p.write_bytes(entry().replace(b"32", b"9" * 9999)),
    "deep": lambda p: p.write_bytes(b"[" * 100_000),
    "huge": lambda p: p.write_bytes(entry() + b" " * store.MAX_ENTRY),
    "symbolic link": lambda p: (p.with_suffix(".away").write_bytes(entry()), p.symlink_to(p.with_suffix(".away"))),
    "dangling link": lambda p: p.symlink_to(p.with_suffix(".nowhere")),
    "a folder": lambda p: p.mkdir(),
    "a pipe": lambda p: os.mkfifo(p),
}


@pytest.mark.parametrize("kind", CORRUPT)
def test_a_corrupt_entry_warns_once_and_misses(kind):
    path = some_key().path
    path.parent.mkdir(parents=True)
    CORRUPT[kind](path)
    with pytest.warns(UserWarning, match="ignoring a tuned entry") as caught:
        choice = OP.resolve(some_problem(), CPU.torch)
    assert [str(path) in str(w.message) for w in caught] == [True]
    assert choice.source == "heuristic"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(store.lookup(some_key())) == []
    if not path.is_dir():
        store.publish(some_key(), CHOICES)
        assert len(list(store.lookup(some_key()))) == 2


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="files have no owner here")
def test_an_entry_of_another_user_or_without_permission_misses(monkeypatch):
    path = store.publish(some_key(), CHOICES)
    with monkeypatch.context() as m:
        m.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
        with pytest.warns(UserWarning, match="belongs to user"):
            assert list(store.lookup(some_key())) == []

    def refuse(*args):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(store, "_reported", set())
    monkeypatch.setattr(store.os, "open", refuse)
    with pytest.warns(UserWarning, match="Permission denied"):
        assert list(store.lookup(some_key())) == []


def test_a_cache_that_cannot_be_written_is_an_error_to_the_writer_only(cache):
    cache.write_text("a file where the folder should be")
    with pytest.raises(OSError, match=str(cache)):
        store.publish(some_key(), CHOICES)
    with pytest.warns(UserWarning, match="ignoring"):
        assert OP.resolve(some_problem(), CPU.torch).source == "heuristic"


def test_a_failed_write_leaves_the_old_entry_and_no_litter(monkeypatch):
    path = store.publish(some_key(), CHOICES)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        store.publish(some_key(), CHOICES[:1])
    assert len(list(store.lookup(some_key()))) == 2
    assert list(path.parent.iterdir()) == [path]


def _write_forever(seed):
    rng = random.Random(seed)
    while True:
        config = {"chunk": rng.choice([16, 32]), "padding": "x" * rng.randrange(20_000)}
        choice = {"backend": "chunked", "config": config}
        store.publish(some_key(state=rng.randrange(1, 4)), [choice])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="starting processes by fork is what makes this quick")
def test_writers_killed_at_random_never_spoil_a_read():
    some_key().as_dict()  # hashes sources and asks for versions before the fork, so that writers write at once
    context = multiprocessing.get_context("fork")
    rng, reads = random.Random(), 0
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)  # fork beside torch's idle threads
        writers = [context.Process(target=_write_forever, args=(i,)) for i in range(4)]
        for w in writers:
            w.start()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        deadline = time.monotonic() + 20
        while any(w.is_alive() for w in writers) and time.monotonic() < deadline:
            for state in (1, 2, 3):
                reads += len(list(store.lookup(some_key(state=state))))
            if reads > 300 and rng.random() < 0.05:
                os.kill(rng.choice([w.pid for w in writers if w.is_alive()]), signal.SIGKILL)
                time.sleep(0.01)
    for w in writers:
        w.kill()
        w.join()
    assert reads > 300
    assert len(store.files()) == 3
    for path in store.files():
        assert store._check(json.loads(path.read_text()))


def test_a_look_up_is_quick():
    store.publish(some_key(), CHOICES)
    key, times = some_key(), []
    for _ in range(50):
        begin = time.perf_counter()
        assert len(list(store.lookup(key))) == 2
        times.append(time.perf_counter() - begin)
    assert min(times) < 1e-3


# ---- shipped tables and dispatch ------------------------------------------------------------------------------------


def ship(folder, choices, **key):
    path = store.TABLES / folder / "selective_scan.json"
    path.parent.mkdir(parents=True)
    shipped = some_key().as_dict() | {"sources": "of the release", "versions": {}} | key
    path.write_text(json.dumps({"entries": [{"schema": store.SCHEMA, "key": shipped, "choices": choices}]}))
    store._table.cache_clear()
    return path


def test_the_order_is_tuned_shipped_architecture_heuristic():
    problem = some_problem(length=4000)
    sizes = [c.chunk for c in OP.backends["chunked"].configs(problem, CPU)]
    assert len(sizes) >= 4

    def only(size):
        return [{"backend": "chunked", "config": {"chunk": size}}]

    def now():
        OP.forget()
        choice = OP.resolve(problem, CPU.torch, "chunked")
        return choice.source, choice.config.chunk

    bucket = problem.bucket()
    assert now() == ("heuristic", sizes[0])
    ship(CPU.arch, only(sizes[1]), problem=bucket)
    assert now() == ("architecture", sizes[1])
    ship(CPU.slug, only(sizes[2]), problem=bucket)
    assert now() == ("shipped", sizes[2])
    store.publish(OP.key(problem, CPU), only(sizes[3]))
    assert now() == ("tuned", sizes[3])


def test_a_shipped_table_is_for_exactly_its_device():
    ship(CPU.slug, CHOICES, device=some_key(dataclasses.replace(CPU, units=CPU.units + 1)).as_dict()["device"])
    assert list(store.lookup(some_key())) == []


def test_a_corrupt_shipped_table_warns_once_and_misses():
    path = ship(CPU.slug, CHOICES)
    path.write_text(path.read_text()[:-9])
    with pytest.warns(UserWarning, match="ignoring") as caught:
        assert list(store.lookup(some_key())) + list(store.lookup(some_key(state=8))) == []
    assert len(caught) == 1


@pytest.mark.parametrize(
    "choice",
    [
        {"backend": "chunked", "config": {"chunk": 7919}},  # not a candidate
        {"backend": "chunked", "config": {"chunk": "64"}},
        {"backend": "chunked", "config": {"chunk": 64.0}},
        {"backend": "chunked", "config": {"chunk": 64, "more": 1}},
        {"backend": "../chunked", "config": {"chunk": 64}},
        {"backend": "cuda", "config": {}},
    ],
)
def test_a_stored_choice_that_does_not_suit_the_problem_is_passed_over(choice):
    store.publish(some_key(), [choice])
    assert OP.resolve(some_problem(), CPU.torch).source == "heuristic"


# ---- search ---------------------------------------------------------------------------------------------------------


def play(strategy, times):
    """Run a strategy on known times (missing: the candidate fails). Returns its rounds."""
    rounds, request = [], next(strategy, None)
    while request is not None:
        rounds.append(request)
        assert len(rounds) < 50
        try:
            request = strategy.send({n: times[n] for n in request.names if n in times})
        except StopIteration:
            request = None
    return rounds


def test_halving_finds_the_best_and_keeps_what_it_must():
    for seed in range(200):
        rng = random.Random(seed)
        names = [(group, i) for group in "abc"[: rng.randint(1, 3)] for i in range(rng.randint(1, 20))]
        times = {n: rng.uniform(1, 3) for n in names if rng.random() < 0.9}
        keep = names[:1]
        rounds = play(search.halving(names, 1.0, keep=keep, group=lambda n: n[0]), times)
        final = rounds[-1]
        assert final.together
        assert len(final.names) <= search.FINALISTS + len(keep)
        if times:
            assert min(times, key=times.get) in final.names
        if keep[0] in times:
            assert keep[0] in final.names
        assert sum(r.seconds * len(r.names) for r in rounds) < 2.0
        assert not [r for r in rounds[:-1] if r.together]


def test_halving_leaves_a_hopeless_group_after_one_look():
    names = [("slow", i) for i in range(5)] + [("quick", i) for i in range(5)]
    times = {n: 100.0 if n[0] == "slow" else 1.0 + n[1] for n in names}
    looked = {n for r in play(search.halving(names, 1.0, group=lambda n: n[0]), times) for n in r.names}
    assert looked == {("slow", 0)} | {("quick", i) for i in range(5)}


def test_sampled_and_exhaustive():
    (everything,) = play(search.exhaustive("abc", 3.0), {})
    assert everything == search.Round(["a", "b", "c"], 1.0, together=True)
    (some,) = play(search.sampled(range(100), 1.0, count=10, seed=3, keep=[42]), {})
    assert len(some.names) == 10
    assert 42 in some.names


# ---- the tuner ------------------------------------------------------------------------------------------------------


def spin(seconds):
    def run():
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass

    return run


def test_a_wrong_and_a_raising_candidate_are_trials_with_a_reason_and_never_win():
    ran = []

    def explode():
        raise MemoryError("no room\nfor this")

    def judge(name):
        if name == "gate raises":
            raise ZeroDivisionError("in the gate")
        return "wrong result: out" if name == "wrong" else None

    candidates = {
        "default": spin(4e-4),
        "wrong": lambda: ran.append("wrong"),
        "raises": explode,
        "gate raises": lambda: ran.append("gate raises"),
        "good": spin(1e-4),
    }
    strategy = search.exhaustive(list(candidates), 0.2)
    result = tuner.tune(candidates, judge, CPU, strategy, "default")
    assert result.winner == "good"
    assert result.gain > 2
    reasons = {n: t.reason for n, t in result.trials.items() if t.timing is None}
    assert reasons == {
        "wrong": "wrong result: out",
        "raises": "MemoryError: no room for this",
        "gate raises": "ZeroDivisionError: in the gate",
    }
    assert ran == []


def test_a_candidate_that_fails_late_costs_only_itself():
    calls = []

    def late():
        calls.append(1)
        if len(calls) > 3:
            raise RuntimeError("out of memory")

    candidates = {"default": spin(1e-4), "late": late, "good": spin(2e-5)}
    result = tuner.tune(candidates, lambda n: None, CPU, search.exhaustive(list(candidates), 0.2), "default")
    assert result.winner == "good"
    assert result.trials["late"].reason == "RuntimeError: out of memory"


def test_a_slow_backend_costs_two_calls():
    calls = []

    def slow():
        calls.append(1)
        spin(0.15)()

    candidates = {("quick", i): spin(1e-4) for i in range(4)} | {("slow", i): slow for i in range(4)}
    strategy = search.halving(list(candidates), 0.1, group=lambda n: n[0])
    result = tuner.tune(candidates, lambda n: None, CPU, strategy, ("quick", 0))
    assert len(calls) == 2
    assert result.winner[0] == "quick"
    assert "slower" in result.trials["slow", 0].reason


@pytest.mark.parametrize(("fastest", "winner"), [((0.90, 0.95, 0.99), "new"), ((0.90, 0.95, 1.00), "default")])
def test_the_default_stays_unless_the_gap_exceeds_the_noise(monkeypatch, fastest, winner):
    def compare(fns, device, *, seconds):
        quartiles = [(1.0, 1.05, 1.1), fastest]
        return {n: Timing(q[1], q[0], q[2], 9, "made up") for n, q in zip(fns, quartiles, strict=True)}

    monkeypatch.setattr(tuner.timer, "compare", compare)
    candidates = {"default": lambda: None, "new": lambda: None}
    result = tuner.tune(candidates, lambda n: None, CPU, search.exhaustive(list(candidates), 1.0), "default")
    assert result.winner == winner


def test_nothing_wins_where_nothing_passes():
    result = tuner.tune({"a": lambda: None}, lambda n: "no", CPU, search.exhaustive(["a"], 1.0), "a")
    assert result.winner is None


# ---- the composition ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class FaultyConfig:
    fault: str = "none"


FaultyConfig.__module__ = "scan_kernels.selective_scan.backends.faulty"


def faulty_backend():
    """The chunked backend with planted faults: quick because it leaves work out."""
    chunked = OP.backends["chunked"]
    module = types.ModuleType(FaultyConfig.__module__)
    module.RANK, module.Config = 999, FaultyConfig
    module.supports = lambda problem: None
    module.configs = lambda problem, device: [
        FaultyConfig(f) for f in ("none", "tail", "unwritten", "states", "row", "dA")
    ]

    def good(problem):
        return chunked.configs(problem, CPU)[0]

    def forward(problem, inputs, outputs, config):
        chunked.forward(problem, inputs, outputs, good(problem))
        if config.fault == "tail":
            outputs.out[..., -1] = 0
        if config.fault == "unwritten":
            outputs.out[..., 5] = torch.empty_like(outputs.out[..., 5])
        if config.fault == "states" and outputs.states is not None:
            outputs.states[1] = 0
        if config.fault == "row":
            outputs.out[1, 3] *= 1.01

    def backward(problem, inputs, states, cotangents, gradients, config):
        chunked.backward(problem, inputs, states, cotangents, gradients, good(problem))
        if config.fault == "dA":
            gradients.dA[0] = 0

    module.forward, module.backward = forward, backward
    return module


def run_tune(use, backends, budget=0.02):
    case = cases.parse("2,8,65,4", "float32")
    problem = case.used(use)
    gate = verb.Gate(OP, CPU)
    line = verb._Line("", lambda text: None)
    result = verb.tune_problem(OP, case, use, problem, case.make(), CPU, backends, budget, gate, line)
    return problem, result


@pytest.mark.parametrize(
    ("use", "caught"),
    [
        ("inference", {"tail", "unwritten", "row"}),
        ("training", {"tail", "unwritten", "row", "states"}),
        ("backward", {"dA"}),
    ],
)
def test_the_gate_refuses_planted_faults(monkeypatch, use, caught):
    backends = {"chunked": OP.backends["chunked"], "faulty": faulty_backend()}
    monkeypatch.setitem(OP.__dict__, "backends", backends)
    gate, case = verb.Gate(OP, CPU), cases.parse("2,8,65,4", "float32")
    problem = case.used(use)
    verdicts = {c.fault: gate(case, use, "faulty", c) for c in backends["faulty"].configs(problem, CPU)}
    assert {fault for fault, reason in verdicts.items() if reason} == caught
    assert all("wrong result" in verdicts[fault] for fault in caught)


def test_what_is_published_serves_auto_and_each_backend():
    problem, result = run_tune("inference", None, budget=0.1)
    verb.publish(OP, problem, CPU, result)
    OP.forget()
    auto = OP.resolve(problem, CPU.torch)
    assert (auto.backend, auto.config) == result.winner
    assert auto.source == "tuned"
    assert OP.resolve(problem, CPU.torch, "chunked").source == "tuned"


def test_an_interrupt_keeps_what_is_finished(monkeypatch, capsys):
    real, calls = verb.tune_problem, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(verb, "tune_problem", interrupted)
    argv = ["tune", "--shapes", "1,4,20,2", "1,4,20,3", "--backend", "chunked", "--budget", "0.02", "--device", "cpu"]
    assert command.main([*argv, "--direction", "backward"]) == 130
    assert len(store.files()) == 1
    assert "1 of 2 problems stored" in capsys.readouterr().out


def test_a_default_that_fails_the_gate_is_said_and_what_is_right_is_kept(monkeypatch, capsys):
    argv = ["tune", "--shapes", "1,4,20,2", "--budget", "0.02", "--device", "cpu", "--direction", "backward"]
    chunked, faulty = OP.backends["chunked"], faulty_backend()
    monkeypatch.setitem(OP.__dict__, "backends", {"chunked": chunked})
    assert command.main(argv) == 0
    faulty.configs = lambda problem, device: [FaultyConfig("dA")]
    monkeypatch.setitem(OP.__dict__, "backends", {"faulty": faulty, "chunked": chunked})
    assert command.main(argv) == 1
    assert "the default failed: wrong result: dA" in capsys.readouterr().out
    (kept,) = [json.loads(p.read_text())["choices"] for p in store.files()]
    assert [c["backend"] for c in kept] == ["chunked"]


def test_a_full_disk_is_said_and_fails_the_verb(monkeypatch, capsys):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "publish", full)
    argv = ["tune", "--shapes", "1,4,20,2", "--backend", "chunked", "--budget", "0.02", "--device", "cpu"]
    assert command.main([*argv, "--direction", "backward"]) == 1
    assert "No space left on device" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "said"),
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
        (["tune", "--direction", "up"], "--direction"),
        (["info", "--device", "meta"], "--device"),
        (["check", "--backend", "nope"], "--backend"),
    ],
)
def test_a_bad_argument_is_one_line_and_exit_code_2(argv, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(argv)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def run(*argv, codes=(0,)):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *argv], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode in codes, done.stdout + done.stderr
    return done.stdout


def test_a_second_process_runs_what_the_first_one_tuned():
    options = ["--shapes", "1,8,33,4", "--budget", "0.05", "--direction", "forward", "--device", "cpu"]
    # 1: the gate drew an input on which a default is wrong; what is right is stored all the same
    said = run("-m", "scan_kernels", "tune", *options, codes=(0, 1))
    assert "3 of 3 problems stored" in said
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
    assert run("-c", program).split() == ["tuned", "tuned", "heuristic"]


def test_info_names_the_device_the_backends_and_why():
    said = run("-m", "scan_kernels", "info", "--device", "cpu")
    for expected in (CPU.name, "torch", "chunked", "cuda", "heuristic: not tuned", "0 tuned entries"):
        assert expected in said
