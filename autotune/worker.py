"""A process for what may hang, fault or fill the memory: it costs only itself, and the next one starts at once.

A ``Worker`` is two processes. The nursery imports what is needed, and touches no device. What works is forked from it;
when that dies or is killed, the nursery says how and forks another, in milliseconds instead of the seconds that
imports take. Requests and replies are lines of JSON: whatever a broken worker sends is data.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

START_S = 120.0  # until the first worker is there: imports, on a machine that is busy
POLL_MS = 50  # how often a nursery looks whether its parent lives


class Failed(RuntimeError):
    """What was asked raised an exception; the worker is alive."""


class Lost(RuntimeError):
    """The worker died, or hung and was killed; another has taken its place and knows nothing of earlier requests."""


class NoWorker(RuntimeError):
    """The process that workers come from does not start, or is gone."""


class Worker:
    """Methods of an object, called in another process.

    target: "module:name" of a callable that takes ``arguments``, JSON values, and returns the object. It is made at
    the first request, and again in a worker that takes a lost one's place. Requests must be JSON, and so must
    results be. One request at a time: ``post`` and ``receive``, or both as ``ask``. Where the object has a method
    ``ruined``, it is asked after an exception: if so, the worker is of no more use, and gives way to another.
    preload: first call the callable's ``preload``, once for all workers: for imports that would come late.
    """

    def __init__(self, target: str, preload: bool = False, **arguments: Any):
        self.lost = 0  # workers so far
        self._pid = 0
        self._buffer = b""
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the worker
        # this file by itself: the package would import torch, which not everything that is served needs
        boot = [sys.executable, __file__, *map(json.dumps, (sys.path, target, preload, arguments))]
        # a session of its own: Ctrl-C is for the parent, which closes its workers. What asks torch for a GPU while
        # it is imported must not start the driver, which no fork survives.
        self._process = subprocess.Popen(
            boot, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, bufsize=0, start_new_session=True,
            env=os.environ | {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"},
        )  # fmt: skip

    def ask(self, method: str, timeout: float, **arguments: Any) -> Any:
        """Call a method and wait for its result.

        timeout: seconds after which it counts as hung. Errors: Failed if it raised; Lost if the worker is no more;
        NoWorker if there is none.
        """
        self.post(method, **arguments)
        return self.receive(timeout)

    def start(self) -> None:
        """Wait until there is a worker. Errors: NoWorker where there is none in ``START_S`` seconds."""
        deadline = time.monotonic() + START_S
        while not self._pid:
            if (said := self._line(deadline)) is None:
                raise NoWorker(f"a worker process did not start in {START_S:.0f} s")
            self._pid = said.get("pid", 0)

    def post(self, method: str, **arguments: Any) -> None:
        """Send a request."""
        self.start()
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the reply says that it is lost
            _write(self._process.stdin.fileno(), {"method": method, "arguments": arguments})

    def ready(self) -> bool:
        """Whether ``receive`` would not wait."""
        return b"\n" in self._buffer or bool(select.select([self._process.stdout.fileno()], [], [], 0)[0])  # type: ignore[union-attr]

    def receive(self, timeout: float) -> Any:
        """The result of the last request. Errors: those of ``ask``."""
        deadline = time.monotonic() + timeout
        while (said := self._line(deadline)) is not None:
            if "lost" in said:
                self._pid, self.lost = 0, self.lost + 1
                raise Lost(_death(said["lost"]))
            if said.get("ruined"):
                self._bury()
                raise Lost(said["error"])
            if "error" in said:
                raise Failed(said["error"])
            if "value" in said:
                return said["value"]
        self.kill()
        self._bury()
        raise Lost(f"hung: no result after {timeout:.3g} s")

    def kill(self) -> None:
        """End what works, whatever it is doing: ``receive`` will raise Lost, and another takes its place."""
        if self._pid:
            with contextlib.suppress(ProcessLookupError):  # it died just now
                os.kill(self._pid, signal.SIGKILL)

    def close(self) -> None:
        """End both processes, whatever they are doing."""
        with contextlib.suppress(OSError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._said):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _bury(self) -> None:
        """Wait for the word that the worker is gone."""
        deadline = time.monotonic() + START_S
        while (said := self._line(deadline)) is not None and "lost" not in said:
            pass
        self._pid, self.lost = 0, self.lost + 1

    def _line(self, deadline: float) -> dict[str, Any] | None:
        """The next thing said, None at the deadline. A line that a dying worker cut off is passed over."""
        assert self._process.stdout is not None
        while True:
            line, newline, rest = self._buffer.partition(b"\n")
            if newline:
                self._buffer = rest
                with contextlib.suppress(ValueError):
                    if isinstance(said := json.loads(line), dict):
                        return said
                continue
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._process.stdout], [], [], left)[0]:
                return None
            if not (more := os.read(self._process.stdout.fileno(), 1 << 16)):
                raise NoWorker(f"a worker process could not be started: {self._last_words()}")
            self._buffer += more

    def _last_words(self) -> str:
        self._said.seek(0)
        lines = self._said.read()[-4096:].decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"exit code {self._process.wait()}"


def said(e: BaseException) -> str:
    """An exception in one line."""
    return f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"


def _death(status: int) -> str:
    """How a process ended, from what waitpid says."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        name = next((s.name for s in signal.Signals if s == number), f"signal {number}")
        return f"died of {name}" + " (out of memory?)" * (number == signal.SIGKILL)
    return f"ended with exit code {os.WEXITSTATUS(status)}"


def _write(pipe: int, content: dict[str, Any], begin: bytes = b"") -> None:
    left = begin + json.dumps(content).encode() + b"\n"
    while left:
        left = left[os.write(pipe, left) :]


# ---- in the other process --------------------------------------------------------------------------------------------


def nursery(path: list[str], target: str, preload: bool, arguments: dict[str, Any]) -> None:
    """Fork a worker, and another whenever one is lost, until the parent is gone."""
    import resource
    import warnings

    sys.path[:] = path
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    # what libraries print must not get between the replies
    requests, replies = os.dup(0), os.dup(1)
    os.dup2(2, 1)
    module, _, name = target.partition(":")
    make = getattr(importlib.import_module(module), name)
    if preload:
        make.preload()
    lifeline = select.poll()
    lifeline.register(requests, 0)  # a hang-up is always told
    while True:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # libraries' idle threads, which a fork leaves behind
            pid = os.fork()
        if pid == 0:
            try:
                _work(make, arguments, requests, replies)
            finally:
                os._exit(0)
        while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
            if lifeline.poll(POLL_MS):
                os.kill(pid, signal.SIGKILL)
                os._exit(0)
        # what was sent to it and not read is nobody's: the parent sends no more until it is told
        while select.select([requests], [], [], 0)[0]:
            if not os.read(requests, 1 << 16):
                os._exit(0)
        _write(replies, {"lost": ended[1]}, begin=b"\n")


def _work(make: Any, arguments: dict[str, Any], requests: int, replies: int) -> None:
    """Serve requests until there are no more."""
    _write(replies, {"pid": os.getpid()})
    made: Any = None
    while line := _read_line(requests):
        request = json.loads(line)
        try:
            made = make(**arguments) if made is None else made
            reply = {"value": getattr(made, request["method"])(**request["arguments"])}
        except Exception as e:
            reply = {"error": said(e), "ruined": hasattr(made, "ruined") and made.ruined()}
        _write(replies, reply)
        if reply.get("ruined"):
            return


def _read_line(pipe: int) -> bytes:
    """Unbuffered: what is not read yet is the next worker's."""
    line = b""
    while not line.endswith(b"\n"):
        if not (more := os.read(pipe, 1 << 16)):
            return b""
        line += more
    return line


if __name__ == "__main__":
    nursery(*map(json.loads, sys.argv[1:]))
