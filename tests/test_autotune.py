"""The autotune room, and the verbs that compose it: what tuning learns is right, kept, and never in the way."""

import dataclasses
import json
import multiprocessing
import os
import random
import signal
import time
import warnings

import pytest

from scan_kernels.autotune import search, store, tables, tuner, worker
from scan_kernels.profiling.device import describe
from scan_kernels.profiling.timer import Timing
from scan_kernels.selective_scan import OP
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
    store.table.cache_clear()
    OP.forget()
    yield tmp_path / "cache"
    store.table.cache_clear()
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
    assert set(written["key"]) == {"op", "validity", "device", "problem"}
    assert written["key"]["validity"].keys() == {"schema", "sources", "versions"}
    assert {"torch", "numba", "llvmlite", "nvidia-cuda-nvrtc"} <= set(written["key"]["validity"]["versions"])
    assert written["key"]["device"].keys() == {*store.HARDWARE, "memory_mhz", "driver", "power_w"}
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


HARDWARE = [{"name": "another"}, {"arch": "sm_90"}, {"units": 7}, {"l2_bytes": 1}]
SETTING = [{"memory_mhz": 2619}, {"driver": 580}, {"power_w": 700}]


@pytest.mark.parametrize("change", [*HARDWARE, *SETTING, "sources", "op", "versions", "schema"], ids=str)
def test_a_change_of_any_one_field_misses_and_is_named(change, monkeypatch):
    stored, key = some_key().as_dict(), some_key()
    store.publish(key, CHOICES)
    assert list(store.lookup(key))
    if change in HARDWARE:
        key = some_key(dataclasses.replace(CPU, **change))
    elif change in SETTING:
        monkeypatch.setattr(
            store, "setting", lambda device: dict.fromkeys(("memory_mhz", "driver", "power_w")) | change
        )
    elif change in ("sources", "op"):
        key = dataclasses.replace(key, **{change: "0"})
    elif change == "versions":
        monkeypatch.setattr(store, "versions", lambda: stored["validity"]["versions"] | {"torch": "1.0"})
    else:
        monkeypatch.setattr(store, "SCHEMA", 0)
    assert list(store.lookup(key)) == []
    name = next(iter(change)) if isinstance(change, dict) else "torch" if change == "versions" else change
    ((field, here, there),) = store.differences(key.as_dict(), stored)
    assert field.endswith(name)
    assert here != there


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
    return json.dumps({"key": some_key().as_dict(), "choices": CHOICES} | changes).encode()


CORRUPT = {
    "empty": lambda p: p.write_bytes(b""),
    "truncated": lambda p: p.write_bytes(entry()[:-40]),
    "not text": lambda p: p.write_bytes(bytes(range(256))),
    "not an entry": lambda p: p.write_bytes(b"[1, 2]"),
    "other schema": lambda p: p.write_bytes(entry().replace(b'"schema": 2', b'"schema": 1')),
    "key of a wrong type": lambda p: p.write_bytes(entry(key=[])),
    "part of a key of a wrong type": lambda p: p.write_bytes(entry(key=some_key().as_dict() | {"problem": 3})),
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


@pytest.mark.parametrize("step", ["mkdir", "mkstemp", "replace"])
def test_a_read_only_cache_is_read_all_the_same(step, monkeypatch):
    """Whoever runs the tests may write everywhere: the system's answer is made up."""
    store.publish(some_key(), CHOICES)

    def refuse(*given, **more):
        raise OSError(30, "Read-only file system")

    owner = {"mkdir": store.Path, "mkstemp": store.tempfile, "replace": store.os}[step]
    monkeypatch.setattr(owner, step, refuse)
    with pytest.raises(OSError, match="Read-only file system"):
        store.publish(some_key(), CHOICES[:1])
    assert len(list(store.lookup(some_key()))) == 2
    assert len(list(store.files()[0].parent.iterdir())) == 1


def test_a_disk_that_is_full_leaves_the_old_entry(cache):
    """As the system says it, by a limit on the size of files."""
    resource = pytest.importorskip("resource")
    path = store.publish(some_key(), CHOICES)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            store.publish(some_key(), CHOICES[:1])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert len(list(store.lookup(some_key()))) == 2
    assert list(path.parent.iterdir()) == [path]


def test_what_dead_writers_left_is_swept_up():
    path = store.publish(some_key(), CHOICES)
    old, new = path.with_name(".writing-old"), path.with_name(".writing-new")
    old.touch()
    new.touch()
    os.utime(old, (1, 1))
    store.publish(some_key(), CHOICES)
    assert (old.exists(), new.exists()) == (False, True)
    assert store.clear() == 1
    assert list(path.parent.iterdir()) == []


def _write_forever(seed, said):
    """Publish until killed, and say of every publish that returned how far this writer had come by then."""
    rng = random.Random(seed)
    for count in range(10**9):
        choice = {"backend": "chunked", "config": {"count": count, "padding": "x" * rng.randrange(20_000)}}
        store.publish(some_key(state=rng.randrange(1, 4)), [choice])  # all writers write these
        store.publish(some_key(state=100 + seed), [choice])  # only this one
        os.write(said, f"{seed} {count}\n".encode())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="starting processes by fork is what makes this quick")
def test_eight_writers_killed_at_random_spoil_no_read_and_lose_no_publish():
    some_key().as_dict()  # hashes sources and asks for versions before the fork, so that writers write at once
    context = multiprocessing.get_context("fork")
    rng, reads = random.Random(), 0
    heard, said = os.pipe()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)  # fork beside torch's idle threads
        writers = [context.Process(target=_write_forever, args=(i, said)) for i in range(8)]
        for w in writers:
            w.start()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        deadline = time.monotonic() + 30
        while (alive := [w.pid for w in writers if w.is_alive()]) and time.monotonic() < deadline:
            for state in (1, 2, 3, *range(100, 108)):
                reads += len(list(store.lookup(some_key(state=state))))
            if reads > 300 and rng.random() < 0.2:
                os.kill(rng.choice(alive), signal.SIGKILL)
                time.sleep(0.01)
        for w in writers:
            w.kill()
            w.join()
        os.close(said)
        with os.fdopen(heard) as f:
            published = dict(map(int, line.split()) for line in f)
        assert reads > 300
        assert len(published) == 8
        for seed, count in published.items():
            (entry,) = store.lookup(some_key(state=100 + seed))
            assert entry.config["count"] - count in (0, 1)  # 1: killed between publishing and saying so
    assert len(store.files()) == 11
    assert not [reason for _, reason in store.entries() if isinstance(reason, str)]


def test_differences_go_deep_and_know_what_is_missing():
    a, b = {"x": {"y": 1, "z": [1]}, "w": 2}, {"x": {"y": 2, "z": [1], "v": None}, "u": {"t": 1}}
    assert store.differences(a, b) == [("u", None, {"t": 1}), ("w", 2, None), ("x.y", 1, 2)]


@pytest.mark.parametrize("op", ["../../etc", "", "a/b", 3, "A" * 65])
def test_an_entry_cannot_choose_its_folder(op):
    with pytest.raises(ValueError, match="op"):
        store.keep({"key": some_key().as_dict() | {"op": op}, "choices": CHOICES})
    evil = some_key().as_dict()
    evil["device"] = evil["device"] | {"name": "../../x"}
    assert store.place(evil).parent.name == "x"
    evil["device"]["name"] = ".."
    with pytest.raises(ValueError, match="device"):
        store.place(evil)


@pytest.mark.alone
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
    shipped = some_key().as_dict() | {"validity": {"schema": 2, "sources": "of the release", "versions": {}}} | key
    path.write_text(json.dumps({"entries": [{"key": shipped, "choices": choices}]}))
    store.table.cache_clear()
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


def test_an_architectures_table_is_for_as_many_multiprocessors():
    ship(CPU.arch, CHOICES)
    assert {e.source for e in store.lookup(some_key())} == {"architecture"}
    assert list(store.lookup(some_key(dataclasses.replace(CPU, units=CPU.units + 1)))) == []


def test_a_shipped_table_is_for_exactly_its_device():
    path = ship(CPU.slug, CHOICES, device=some_key(dataclasses.replace(CPU, units=CPU.units + 1)).as_dict()["device"])
    assert list(store.lookup(some_key())) == []
    path.unlink()
    path.parent.rmdir()
    ship(CPU.slug, CHOICES, device=some_key().as_dict()["device"] | {"driver": 1, "power_w": 2})
    assert {e.source for e in store.lookup(some_key())} == {"shipped"}


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
    found = OP.resolve(some_problem(), CPU.torch)
    assert found.source == "heuristic"
    assert "tuned choice passed over" in found.note
    assert choice["backend"] in found.note


def test_a_choice_is_checked_on_the_very_problem_of_a_bucket():
    """129 and 250 steps share a bucket; a chunk of 256 steps suits both, though neither lists the other's choices."""
    long, short = some_problem(length=250), some_problem(length=129)
    assert long.bucket() == short.bucket()
    for size, source in ((256, "tuned"), (512, "heuristic"), (0, "heuristic"), (-4, "heuristic")):
        store.publish(OP.key(long, CPU), [{"backend": "chunked", "config": {"chunk": size}}])
        OP.forget()
        assert OP.resolve(short, CPU.torch, "chunked").source == source
    kept = some_problem(checkpoint=16)
    store.publish(OP.key(kept, CPU), [{"backend": "chunked", "config": {"chunk": 32}}])
    assert OP.resolve(kept, CPU.torch, "chunked").source == "heuristic"


def test_what_is_deterministic_keeps_its_choice_whatever_is_tuned_meanwhile():
    problem, other = some_problem(deterministic=True), some_problem()
    for p in (problem, other):
        assert OP.resolve(p, CPU.torch, "chunked").source == "heuristic"
        store.publish(OP.key(p, CPU), [{"backend": "chunked", "config": {"chunk": 32}}])
    OP.forget()
    assert OP.resolve(problem, CPU.torch, "chunked").source == "heuristic"
    assert OP.resolve(other, CPU.torch, "chunked").source == "tuned"
    assert not OP.settle(problem, CPU, [store.Entry("chunked", {"chunk": 64}, "tuned")])
    assert OP.settle(other, CPU, [store.Entry("chunked", {"chunk": 64}, "tuned")])
    assert OP.resolve(other, CPU.torch, "chunked").config.chunk == 64
    OP.settled.clear()  # as in a new process
    OP.forget()
    assert OP.resolve(problem, CPU.torch, "chunked").source == "tuned"


# ---- making tables ---------------------------------------------------------------------------------------------------


def measured(name, arch, times, **changes):
    """A GPU's entry for a problem, with the times of its candidates by chunk."""
    device = dataclasses.replace(CPU, kind="cuda", name=name, arch=arch)
    trials = [{"backend": "chunked", "config": {"chunk": c}, "seconds": s, "runs": 9} for c, s in times.items()]
    best = min(trials, key=lambda t: t["seconds"])
    key = OP.key(some_problem(device="cuda", **changes), device).as_dict()
    return {
        "key": key, "choices": [best], "trials": [*trials, {"backend": "x", "config": {}, "reason": "no"}],
        "date": "2026-01-01", "clocks": {"sm_mhz": 1980},
    }  # fmt: skip


def test_tables_are_merged_and_the_fallback_has_the_best_worst_case(tmp_path):
    folder = tmp_path / "tables"
    first = [
        measured("GPU A", "sm_90", {16: 1.0, 32: 1.1, 64: 1.4, 128: 9.0}),
        measured("GPU A", "sm_90", {16: 1.0}, state=8),
    ]
    second = [measured("GPU B", "sm_90", {16: 4.0, 32: 2.2, 64: 2.0, 128: 2.1})]
    tables.write(folder, "selective_scan", first, {"commit": "a"})
    written = tables.write(folder, "selective_scan", second, {"commit": "b"})
    assert [p.relative_to(folder).parts[0] for p in written] == ["gpu-b", "sm_90"]
    read = store.read_table(folder / "gpu-a" / "selective_scan.json")
    assert read["provenance"] == {"commit": "a"}
    assert [len(e["trials"]) for e in read["entries"]] == [3, 1]  # 9.0 is hopeless, and one has no time
    table = store.read_table(folder / "sm_90" / "selective_scan.json")
    assert table["provenance"] == {"commit": "b", "from": ["GPU A", "GPU B"]}
    by_state = {e["key"]["problem"]["state"]: e["choices"][0] for e in table["entries"]}
    # 16 costs twice the best on B and 64 1.4 times on A; 32 at most 1.1 times; 128 is too slow on A to be known
    assert (by_state[16]["config"], by_state[16]["worst"]) == ({"chunk": 32}, 1.1)
    assert by_state[8]["config"] == {"chunk": 16}
    # neither another architecture nor another number of multiprocessors has a say
    other = measured("GPU C", "sm_80", {16: 1.0, 32: 50.0})
    tables.write(folder, "selective_scan", [other], {"commit": "b"})
    small = measured("GPU D", "sm_90", {16: 1.0, 32: 50.0})
    small["key"]["device"]["units"] += 1
    tables.write(folder, "selective_scan", [small], {"commit": "b"})
    entries = store.read_table(folder / "sm_90" / "selective_scan.json")["entries"]
    chosen = {(e["key"]["device"]["units"] - CPU.units, e["key"]["problem"]["state"]): e["choices"][0] for e in entries}
    assert {k: c["config"]["chunk"] for k, c in chosen.items()} == {(0, 16): 32, (0, 8): 16, (1, 16): 16}
    entries = store.read_table(folder / "sm_80" / "selective_scan.json")["entries"]
    assert [(e["from"], e["choices"][0]["config"]) for e in entries] == [(["GPU C"], {"chunk": 16})]
    # measured again: the newer entry takes the older one's place, and the other problem's stays
    tables.write(folder, "selective_scan", [measured("GPU A", "sm_90", {64: 0.5})], {"commit": "c"})
    entries = store.read_table(folder / "gpu-a" / "selective_scan.json")["entries"]
    assert sorted((e["key"]["problem"]["state"], e["choices"][0]["seconds"]) for e in entries) == [(8, 1.0), (16, 0.5)]
    assert oct((folder / "gpu-a" / "selective_scan.json").stat().st_mode)[-3:] == "644"


def test_a_written_table_is_what_dispatch_reads(tmp_path):
    entry = measured(CPU.name, CPU.arch, {16: 1.0})
    entry["key"] = some_key().as_dict()
    tables.write(store.TABLES, "selective_scan", [entry], {})
    assert [e.source for e in store.lookup(some_key())] == ["shipped"]


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
        rounds = play(search.halving(names, 0.1, 1.0, keep=keep, group=lambda n: n[0]), times)
        final = rounds[-1]
        assert final.together
        assert final.seconds == 1.0
        assert len(final.names) <= search.FINALISTS + len(keep)
        if times:
            assert min(times, key=times.get) in final.names
        if keep[0] in times:
            assert keep[0] in final.names
        assert not [r for r in rounds[:-1] if r.together]
        looked = [n for r in rounds[:-1] for n in r.names]
        assert len(looked) <= 2.5 * len(names)


def test_halving_leaves_a_hopeless_group_after_one_look():
    names = [("quick", i) for i in range(5)] + [("slow", i) for i in range(5)]
    times = {n: 100.0 if n[0] == "slow" else 1.0 + n[1] for n in names}
    looked = {n for r in play(search.halving(names, 0.1, 1.0, group=lambda n: n[0]), times) for n in r.names}
    assert looked == {("slow", 0)} | {("quick", i) for i in range(5)}


@pytest.mark.parametrize("strategy", ["exhaustive", "sampled", "halving"])
def test_every_strategy_ends_with_the_best_and_what_is_kept_against_each_other(strategy):
    names, keep = list(range(40)), [7, 31]
    times = {n: 1.0 + abs(n - 20) / 50 for n in names}
    options = {"count": 40} if strategy == "sampled" else {}
    *looks, final = play(getattr(search, strategy)(names, 0.1, 1.0, keep=keep, **options), times)
    assert final == search.Round([7, 19, 20, 21, 31], 1.0, together=True)
    assert {n for r in looks for n in r.names} == set(names)
    few = play(getattr(search, strategy)([1, 2], 0.1, 1.0, keep=[1], **options), times)
    assert few == [search.Round([1, 2], 1.0, together=True)]


def test_a_sample_holds_what_is_kept_and_its_size():
    look, final = play(
        search.sampled(range(100), 0.1, 1.0, count=10, seed=3, keep=[42]), dict.fromkeys(range(100), 1.0)
    )
    assert len(look.names) == 10
    assert 42 in look.names
    assert 42 in final.names


def test_what_won_before_and_its_neighbours_come_first():
    names = [(a, b) for a in range(3) for b in range(3)]
    apart = lambda x, y: sum(p != q for p, q in zip(x, y, strict=True))  # noqa: E731
    ordered = search.nearest(names, [(2, 1)], apart)
    assert ordered[0] == (2, 1)
    assert {apart(n, (2, 1)) for n in ordered[1:5]} == {1}
    assert search.nearest(names, [], apart) == names


# ---- the tuner -------------------------------------------------------------------------------------------------------


class Playback:
    """A runner whose candidates take the given times, with some noise; a string is why the gate refuses one."""

    def __init__(self, times, spread=0.01, runs=100, fails=(), lost=(), cost=0.0):
        self.times, self.spread, self.runs, self.cost = times, spread, runs, cost
        self.fails, self.lost = set(fails), set(lost)
        self.expected, self.asked = [], []
        self.compiled_at = {}  # by when, if not from the start

    def expect(self, names):
        self.expected.append(list(names))

    def next(self, names, patience):
        name = min(names, key=lambda n: self.compiled_at.get(n, 0.0))
        return name if self.compiled_at.get(name, 0.0) <= patience else None

    def judge(self, name):
        time.sleep(self.cost)
        if name in self.lost:
            raise worker.Lost("died of SIGSEGV")
        return self.times[name] if isinstance(self.times[name], str) else None

    def time(self, names, seconds):
        self.asked.append(list(names))
        if bad := self.fails & set(names):
            raise worker.Failed(f"RuntimeError: {bad}")
        ts = [self.times[n] for n in names]
        return [Timing(t, t * (1 - self.spread / 2), t * (1 + self.spread / 2), self.runs, "played") for t in ts]


def tune(runner, strategy=None, **options):
    names = list(runner.times)
    return tuner.tune(runner, strategy or search.exhaustive(names, 0.1, 1.0, keep=names[:1]), names[0], **options)


def test_finalists_alone_are_judged_where_that_is_asked_for_and_a_wrong_one_never_wins():
    class Quick(Playback):  # what is wrong takes time, too, and the least
        def time(self, names, seconds):
            self.asked.append(list(names))
            return [
                Timing(t, t, t, self.runs, "played") for t in (float(str(self.times[n]).split()[-1]) for n in names)
            ]

        def judge(self, name):
            self.judged.append(name)
            return super().judge(name)

    runner = Quick(
        {"default": 4.0, "wrong": "wrong result: out 0.5", "good": 1.0, **{f"slow {k}": 2.0 + k for k in range(5)}}
    )
    runner.judged = []
    result = tune(runner, finalists_only=True)
    assert result.winner == "good"
    assert sorted(runner.judged) == ["default", "good", "slow 0", "wrong"]
    assert result.trials["wrong"].reason == "wrong result: out 0.5"
    assert "wrong" not in runner.asked[-1]


def test_what_is_compiled_first_is_looked_at_first():
    runner = Playback({k: 1.0 + k for k in range(8)})
    runner.compiled_at = {1: 9.0, 2: 5.0, 5: 7.0}
    tune(runner)
    assert [n for (n,) in runner.asked[:-1]] == [0, 3, 4, 6, 7, 2, 5, 1]


def test_what_is_not_compiled_in_time_is_unseen_and_nobody_waits_for_it():
    runner = Playback({k: 8.0 - k for k in range(8)})
    runner.compiled_at = dict.fromkeys((3, 6, 7), 1e9)
    result = tune(runner, budget=60.0)
    assert (result.unseen, result.winner) == (3, 5)
    assert result.trials.keys() == {0, 1, 2, 4, 5}


def test_a_wrong_and_a_lost_candidate_are_trials_with_a_reason_and_never_win():
    runner = Playback({"default": 4.0, "wrong": "wrong result: out", "lost": 0.1, "good": 1.0}, lost=["lost"])
    result = tune(runner)
    assert result.winner == "good"
    assert result.gain == 4.0
    reasons = {n: t.reason for n, t in result.trials.items() if t.timing is None}
    assert reasons == {"wrong": "wrong result: out", "lost": "died of SIGSEGV"}
    assert not [names for names in runner.asked if {"wrong", "lost"} & set(names)]


def test_a_candidate_that_fails_only_in_the_final_costs_only_itself():
    result = tune(Playback({"default": 2.0, "late": 0.5, "good": 1.0}, fails=["late"]))
    assert result.winner == "good"
    assert result.trials["late"].reason == "RuntimeError: {'late'}"
    assert [t.final for t in result.trials.values() if t.timing] == [True, True]


def test_what_fails_only_together_is_timed_alone():
    class Crowded(Playback):
        def time(self, names, seconds):
            if len(names) > 1:
                raise worker.Failed("OutOfMemoryError")
            return super().time(names, seconds)

    assert tune(Crowded({"default": 2.0, "good": 1.0})).winner == "good"


@pytest.mark.parametrize(
    ("gap", "spread", "runs", "winner"),
    [(0.10, 0.01, 100, "new"), (0.10, 1.0, 100, "default"), (0.10, 1.0, 10_000, "new"), (0.008, 0.0, 10**6, "default")],
)
def test_the_default_stays_unless_the_gap_exceeds_the_noise(gap, spread, runs, winner):
    assert tune(Playback({"default": 1.0, "new": 1.0 - gap}, spread, runs)).winner == winner


def test_two_timings_of_one_thing_seldom_lie_further_apart_than_their_noise():
    rng, apart = random.Random(1), 0
    for _ in range(400):
        pair = []
        for _ in range(2):
            s = sorted(rng.gauss(1.0, 0.1) for _ in range(101))
            pair.append(Timing(s[50], s[25], s[75], 101, ""))
        apart += abs(pair[0].median_s - pair[1].median_s) > sum(map(tuner.noise, pair))
    assert 0.01 <= apart / 400 <= 0.08


@pytest.mark.alone
def test_a_budget_ends_the_looks_and_never_the_final():
    names = list(range(100))
    runner = Playback({n: 1.0 + n / 100 for n in reversed(names)}, cost=0.01)  # the best comes last
    begin = time.perf_counter()
    result = tune(runner, search.halving(list(runner.times), 0.1, 1.0, keep=[99]), budget=0.2)
    assert time.perf_counter() - begin < 1.0
    assert result.unseen > 50
    assert len(result.trials) + result.unseen == 100
    assert result.trials[99].final
    assert sum(t.final for t in result.trials.values()) == 4
    assert result.winner == min(n for n, t in result.trials.items() if t.timing)


def test_the_runner_is_told_what_comes():
    runner = Playback({n: 1.0 + n for n in range(9)})
    tune(runner)
    assert runner.expected[0] == list(range(9))
    assert runner.expected[-1] == []


def test_nothing_wins_where_nothing_passes():
    assert tune(Playback({"a": "no"})).winner is None
