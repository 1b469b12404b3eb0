"""An op: its reference, its cases, its backends found by file, and the only dispatch there is.

A backend is a module ``backends/<name>.py`` (a name without an underscore; ``<name>_*`` files hold its kernels) with

    RANK: int                                  lower is preferred where nothing is tuned
    Config                                     frozen dataclass of the tunables
    supports(problem) -> str | None            None, or why it cannot run, in words a user understands
    configs(problem, device) -> list[Config]   valid candidates, the first a good default
    forward(problem, inputs, outputs, config)
    backward(problem, inputs, states, cotangents, gradients, config)

A module that fails to import (its library is not installed) is a backend that cannot run, with that reason.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import pkgutil
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from .autotune import store
from .profiling.device import Device, describe


class BackendUnavailable(RuntimeError):
    """No backend, or not the one asked for, can run this problem."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which backend runs a problem, with which configuration, and where that choice came from."""

    backend: str
    config: Any
    source: str  # "argument", "tuned", "shipped", "architecture" or "heuristic"
    module: ModuleType = dataclasses.field(repr=False, compare=False)


class Op:
    """One op: ``Op("selective_scan", package="scan_kernels.selective_scan")``."""

    def __init__(self, name: str, package: str):
        self.name = name
        self.package = package
        self._resolved: dict[tuple, Choice] = {}
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
        return store.hash_sources([folder, *([shared] if shared.exists() else [])])

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
        memo = (problem, device, backend, config)
        if (choice := self._resolved.get(memo)) is None:
            choice = self._resolved[memo] = self._resolve(problem, describe(device), backend, config)
        return choice

    def forget(self) -> None:
        """Drop memoised choices, so that newly tuned ones are seen."""
        self._resolved.clear()

    def _resolve(self, problem, device: Device, backend: str, config: Any) -> Choice:
        if config is not None:
            name = type(config).__module__.rpartition(".")[2]
            if backend not in ("auto", name):
                got = type(config).__qualname__
                raise TypeError(f"config: expected a Config of backend {backend!r}, got {got} of {name!r}")
            return Choice(name, config, "argument", self.backend(name, problem))
        if backend != "auto":
            self.backend(backend, problem)
        reasons = self.reasons(problem)
        for entry in store.lookup(self.key(problem, device)):
            if backend not in ("auto", entry.backend) or reasons.get(entry.backend, "unknown") is not None:
                continue
            module = self.backend(entry.backend, problem)
            if (found := config_from_dict(module.Config, entry.config)) in module.configs(problem, device):
                return Choice(entry.backend, found, entry.source, module)
        for name, reason in reasons.items():
            if backend in ("auto", name) and reason is None:
                module = self.backend(name, problem)
                self._report_untuned(problem, device)
                return Choice(name, module.configs(problem, device)[0], "heuristic", module)
        raise BackendUnavailable(self._explain("no backend can run this problem", problem))

    def _report_untuned(self, problem, device: Device) -> None:
        """Say once per GPU that a heuristic is in use, and what would fix it. Never tune implicitly."""
        if device.kind != "cuda" or (self.name, device.name) in self._untuned_reported:
            return
        self._untuned_reported.add((self.name, device.name))
        warnings.warn(
            f"{self.name} is not tuned for {device.name}; using its heuristic. "
            f"To tune: scan-kernels tune --op {self.name}",
            stacklevel=2,
        )

    def _explain(self, headline: str, problem) -> str:
        lines = [f"  {name}: {reason or 'can run it'}" for name, reason in self.reasons(problem).items()]
        return "\n".join([f"{self.name}: {headline}. Backends:", *lines])


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


def encode_choice(backend: str, forward: Any, backward: Any) -> str:
    """An explicit backend and configurations as the string that travels through the registered torch op.

    A Python literal put together by hand: torch.compile can trace this, and cannot trace the json module.
    """
    parts = [f"'backend': {backend!r}"]
    for direction, config in (("forward", forward), ("backward", backward)):
        if config is not None:
            values = [f"{f.name!r}: {getattr(config, f.name)!r}" for f in dataclasses.fields(config)]
            owner = type(config).__module__.rpartition(".")[2]
            parts.append(f"{direction!r}: ({owner!r}, {{{', '.join(values)}}})")
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
