"""An op: its reference, its cases, its backends found by file, and the only dispatch there is.

A backend is a module ``backends/<name>.py`` (a name without an underscore; the ``<name>_*`` files are its own) with

    RANK: int                                  lower is preferred where nothing is tuned
    Config                                     frozen dataclass of the tunables
    supports(problem) -> str | None            None, or why it cannot run, in words a user understands
    configs(problem, device) -> list[Config]   valid candidates, the first a good default
    forward(problem, inputs, outputs, config)
    backward(problem, inputs, kept, cotangents, gradients, config)

and, where deciding what to launch costs more than launching it, also

    prepare_forward(problem, inputs, outputs, config) -> run(inputs, outputs)
    prepare_backward(problem, inputs, kept, cotangents, gradients, config)
        -> run(inputs, kept, cotangents, gradients)

``run`` does what forward or backward does, for any tensors that have the ``signature`` of those it was prepared with,
on any stream, from any thread, with their device current. It is kept for as long as nobody calls ``Op.forget``, so it
must not hold on to a tensor. Preparing compiles what ``run`` launches, and launches nothing: tuning does it ahead.

A backend whose ``configs`` differ between problems of one bucket may have

    valid(problem, device, config) -> bool     whether it can run the problem with this configuration

so that a choice tuned for one of them serves the others; without it, only what ``configs`` lists is taken. It may have

    SIZED: tuple[str, ...]                     fields of Config that depend on how large a problem is

which a choice keeps for the very problem that it was measured on: for others it is the first of their ``configs`` that
agrees with it in all other fields, if there is one. How work is cut into blocks for one size wastes up to half a GPU on
another of the same bucket.

A module that fails to import (its library is not installed) is a backend that cannot run, with that reason.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import pkgutil
import warnings
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .autotune import store
from .profiling.device import Device, describe

ALIGNMENT = 16  # bytes of the widest access of any kernel: what a tensor's address is known by in a signature
PLAIN = (Tensor, torch.nn.Parameter)
MOST_REMEMBERED = 4096  # calls, choices or stored entries; with a new length in every call some are forgotten


class BackendUnavailable(RuntimeError):
    """No backend, or not the one asked for, can run this problem."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which backend runs a problem, with which configuration, and where that choice came from."""

    backend: str
    config: Any
    source: str  # "argument", "tuned", "shipped", "architecture" or "heuristic"
    module: ModuleType = dataclasses.field(repr=False, compare=False)
    note: str = dataclasses.field(default="", compare=False)  # why a choice of a better source was passed over


class Memo(dict[Hashable, Any]):
    """A bounded memo: what would be one too many drops all the others, which are then made anew."""

    def put(self, key: Hashable, value: Any) -> Any:
        """Remember a value, and return it."""
        if len(self) >= MOST_REMEMBERED:
            self.clear()
        self[key] = value
        return value


class Op:
    """One op: ``Op("selective_scan", package="scan_kernels.selective_scan")``."""

    def __init__(self, name: str, package: str):
        self.name = name
        self.package = package
        self.calls = Memo()  # prepared calls by signature and flags
        self._resolved = Memo()
        self._stored = Memo()
        # entries that hold for as long as this process lives, by device and bucket: those that tuning handed over, and
        # those of deterministic problems, whose results must not change because somebody tunes meanwhile
        self.settled: dict[Hashable, tuple[store.Entry, ...]] = {}
        # called with (problem, device) before a heuristic is used, to put something better there with ``settle``
        self.on_untuned: Callable[[Any, Device], None] | None = None
        self._untuned_reported: set[tuple[str, str]] = set()

    @property
    def problem_type(self) -> type:
        return importlib.import_module(f"{self.package}.problem").Problem

    @property
    def cases(self) -> ModuleType:
        return importlib.import_module(f"{self.package}.cases")

    @property
    def reference(self) -> Callable:
        return getattr(importlib.import_module("scan_kernels.reference"), self.name)

    @functools.cached_property
    def backends(self) -> dict[str, ModuleType | str]:
        """Every backend by name, best rank first: its module, or the reason it could not be imported."""
        found: dict[str, ModuleType | str] = {}
        folder = importlib.import_module(f"{self.package}.backends")
        for info in pkgutil.iter_modules(folder.__path__):
            if "_" in info.name:
                continue
            try:
                found[info.name] = importlib.import_module(f"{folder.__name__}.{info.name}")
            except ImportError as e:
                found[info.name] = f"not installed ({e})"
        return dict(sorted(found.items(), key=lambda kv: getattr(kv[1], "RANK", 1000)))

    @functools.cached_property
    def sources(self) -> str:
        """Hash of everything that decides what the kernels compute: a tuned choice holds for these sources only."""
        shared = Path(__file__).with_name("cuda_module.py")
        folder = Path(importlib.import_module(f"{self.package}.backends").__path__[0])
        problem = folder.with_name("problem.py")
        return store.hash_sources([folder, *(p for p in (problem, shared) if p.exists())])

    def key(self, problem, device: Device) -> store.Key:
        """What a tuned choice for this problem on this device is stored under."""
        return store.Key(self.name, self.sources, problem.bucket(), device)

    def reasons(self, problem) -> dict[str, str | None]:
        """For each backend: None if it can run the problem, else why not."""
        return {n: b if isinstance(b, str) else b.supports(problem) for n, b in self.backends.items()}

    def backend(self, name: str, problem) -> ModuleType:
        """The backend's module, or BackendUnavailable naming every backend with its reason."""
        module = self.backends.get(name)
        if module is None or isinstance(module, str) or module.supports(problem) is not None:
            raise BackendUnavailable(self._explain(f"backend={name!r} cannot run this problem", problem))
        return module

    def resolve(self, problem, device: torch.device, backend: str = "auto", config: Any = None) -> Choice:
        """Choose backend and configuration. The only dispatch.

        Order: explicit argument, this machine's tuned cache, the table shipped for exactly this device, the table
        for its architecture, the backend's own heuristic. Memoised: a second call is one dict look-up.

        Errors: BackendUnavailable if nothing, or not the backend asked for, can run the problem.
        """
        key = (problem, device, backend, config)
        return self._resolved.get(key) or self._resolved.put(
            key, self._resolve(problem, describe(device), backend, config)
        )

    def prepare(self, direction: str, problem, device: torch.device, choice: str, *tensors: Any) -> Callable[..., None]:
        """Resolve, and prepare the chosen backend's call; choice: of ``encode_choice``. Call with tensors like these.

        Errors: those of ``resolve`` and ``decode_choice``.
        """
        chosen = self.resolve(problem, device, *decode_choice(self, choice, direction))
        if (prepare := getattr(chosen.module, f"prepare_{direction}", None)) is not None:
            return prepare(problem, *tensors, chosen.config)
        run = getattr(chosen.module, direction)
        return lambda *tensors: run(problem, *tensors, chosen.config)

    def forget(self) -> None:
        """Drop memoised choices and the calls prepared with them, so that newly tuned ones are seen."""
        for memo in (self.calls, self._resolved, self._stored):
            memo.clear()

    def settle(self, problem, device: Device, entries: Iterable[store.Entry], always: bool = False) -> bool:
        """Have this process use these entries, best first, for the problem's bucket, whatever is stored.

        False, and nothing done, where a deterministic problem of that bucket has been resolved before; not if
        ``always``, for ranks that must agree.
        """
        key = _bucket(problem, device)
        if problem.deterministic and key in self.settled and not always:
            return False
        self.settled[key] = tuple(entries)
        self.forget()
        return True

    def accept(
        self, problem, device: Device, backend: str, config: dict[str, Any], measured: dict[str, Any] | None = None
    ) -> tuple[Any, str]:
        """(Config, "") if a stored choice can run this very problem; else (None, why not).

        measured: ``key()`` of the problem that the choice was measured on, where that is known.
        """
        module = self.backends.get(backend)
        if not isinstance(module, ModuleType):
            return None, f"{backend}: {module or 'no such backend'}"
        if (reason := module.supports(problem)) is not None:
            return None, f"{backend}: {reason}"
        found = config_from_dict(module.Config, config)
        if found is not None:
            if (sized := getattr(module, "SIZED", ())) and measured != problem.key():
                found = next((c for c in module.configs(problem, device) if _alike(c, found, sized)), None)
                suits = found is not None
            elif hasattr(module, "valid"):
                suits = module.valid(problem, device, found)
            else:
                suits = found in module.configs(problem, device)
            if suits:
                return found, ""
        values = ", ".join(f"{k}={v!r:.20}" for k, v in config.items())
        return None, f"{backend}: no configuration for this problem: {values:.300}"

    def _resolve(self, problem, device: Device, backend: str, config: Any) -> Choice:
        if config is not None:
            name = _owner(config)
            if backend not in ("auto", name):
                got = type(config).__qualname__
                raise TypeError(f"config: expected a Config of backend {backend!r}, got {got} of {name!r}")
            return Choice(name, config, "argument", self.backend(name, problem))
        if backend != "auto":
            self.backend(backend, problem)
        choice, note = self._stored_choice(problem, device, backend)
        if choice is None and backend == "auto" and (tune := self.on_untuned) is not None:
            self.on_untuned = None  # what tuning itself runs is not tuned
            try:
                tune(problem, device)
            finally:
                self.on_untuned = tune
            choice, note = self._stored_choice(problem, device, backend)
        if choice is not None:
            return choice
        for name, reason in self.reasons(problem).items():
            if backend in ("auto", name) and reason is None:
                module = self.backend(name, problem)
                self._report_untuned(problem, device)
                return Choice(name, module.configs(problem, device)[0], "heuristic", module, note)
        raise BackendUnavailable(self._explain("no backend can run this problem", problem))

    def _stored_choice(self, problem, device: Device, backend: str) -> tuple[Choice | None, str]:
        """The first stored choice that can run the problem, if any, and why those before it cannot."""
        passed: list[str] = []
        for entry in self._entries(problem, device):
            if backend in ("auto", entry.backend):
                config, reason = self.accept(problem, device, entry.backend, entry.config, entry.measured)
                if config is not None:
                    module = self.backend(entry.backend, problem)
                    return Choice(entry.backend, config, entry.source, module, "; ".join(passed)), ""
                passed.append(f"{entry.source} choice passed over: {reason}")
        return None, "; ".join(passed)

    def _entries(self, problem, device: Device) -> tuple[store.Entry, ...]:
        """What is stored for the problem's bucket: it holds many problems, and the look-up reads files."""
        key = _bucket(problem, device)
        if (found := self.settled.get(key)) is not None:
            return found
        if (found := self._stored.get(key)) is None:
            found = self._stored.put(key, tuple(store.lookup(self.key(problem, device))))
        if problem.deterministic:
            self.settled[key] = found
        return found

    def _report_untuned(self, problem, device: Device) -> None:
        """Say once per GPU that a heuristic is in use, and what would fix it. Never tune implicitly."""
        if device.kind != "cuda" or (self.name, device.name) in self._untuned_reported:
            return
        self._untuned_reported.add((self.name, device.name))
        warnings.warn(
            f"{self.name} is not tuned for {device.name}; using its heuristic. To tune: scan-kernels tune "
            f"--op {self.name} {self.cases.spelled(problem)}",
            stacklevel=2,
        )

    def _explain(self, headline: str, problem) -> str:
        lines = [f"  {name}: {reason or 'can run it'}" for name, reason in self.reasons(problem).items()]
        return "\n".join([f"{self.name}: {headline}. Backends:", *lines])


def _alike(a: Any, b: Any, sized: tuple[str, ...]) -> bool:
    """Whether two configurations differ at most in these fields."""
    return all(getattr(a, f.name) == getattr(b, f.name) for f in dataclasses.fields(a) if f.name not in sized)


def _bucket(problem, device: Device) -> Hashable:
    return (device, *problem.bucket().items())


def is_eager() -> bool:
    """Whether torch just runs what it is told: nothing traces, compiles, records or transforms it.

    Only then may an op's implementation be called without its registration, which is what those work through.
    """
    # every one of these is a look at a counter or a flag; the first must come first, as torch.compile traces no further
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._is_torch_function_mode_enabled()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    )


def signature(tensors: Iterable[Tensor | None]) -> tuple | None:
    """Everything but the values that a call may depend on: shapes, strides, dtypes, devices, alignments.

    None if there is a tensor that is not plain memory: a subclass, a sparse one, a lazily negated one and the like.
    """
    found: list[tuple | None] = []
    try:
        for t in tensors:
            if t is None:
                found.append(None)
                continue
            if type(t) not in PLAIN or t.is_neg():
                return None
            address = t.data_ptr()
            if not address and t.numel():
                return None
            found.append((t.shape, t.stride(), t.dtype, t.device, address % ALIGNMENT))
    except RuntimeError:
        return None  # without strides or an address
    return tuple(found)


def config_from_dict(config_type: type, values: dict[str, Any]) -> Any:
    """Build a Config from untrusted data: unknown names or wrong types give None, never an exception."""
    fields = {f.name: f for f in dataclasses.fields(config_type)}
    if not isinstance(values, dict) or set(values) - set(fields):
        return None
    try:
        built = config_type(**values)
    except (TypeError, ValueError):
        return None
    # annotations are strings here; a JSON number of the wrong kind must not reach a kernel's defines
    for name, f in fields.items():
        if type(getattr(built, name)).__name__ != str(f.type):
            return None
    return built


def _owner(config: Any) -> str:
    """The backend whose Config that is: the file's name up to an underscore."""
    return type(config).__module__.rpartition(".")[2].partition("_")[0]


def encode_choice(backend: str, forward: Any, backward: Any) -> str:
    """An explicit backend and configurations as the string that travels through the registered torch op.

    A Python literal put together by hand: torch.compile can trace this, and cannot trace the json module.
    """
    parts = [f"'backend': {backend!r}"]
    for direction, config in (("forward", forward), ("backward", backward)):
        if config is not None:
            values = [f"{f.name!r}: {getattr(config, f.name)!r}" for f in dataclasses.fields(config)]
            parts.append(f"{direction!r}: ({_owner(config)!r}, {{{', '.join(values)}}})")
    return "" if parts == ["'backend': 'auto'"] else f"{{{', '.join(parts)}}}"


@functools.lru_cache(maxsize=256)
def decode_choice(op: Op, choice: str, direction: str) -> tuple[str, Any]:
    """The (backend, config) that ``encode_choice`` put into the string, for one direction."""
    if not choice:
        return "auto", None
    pick = ast.literal_eval(choice)
    if direction not in pick:
        return pick["backend"], None
    owner, values = pick[direction]
    module = op.backends.get(owner)
    if not isinstance(module, ModuleType):
        raise TypeError(f"config: expected the Config of a backend that can be imported, got one of {owner!r}")
    return pick["backend"], module.Config(**values)
