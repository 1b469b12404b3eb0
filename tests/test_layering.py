"""Who may import whom: every arrow between our modules runs the right way, and every package is shipped."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BUILD = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]

# Room: what of ours its modules may import. The longest room that a module lies in counts; OP stands for each op's
# folder (one with backends/); "room:name" is one name of a room's __init__ and nothing else.
EVERYTHING = ("",)
RULES = {
    "reference": ("reference",),
    "profiling": ("profiling",),
    "profiling.ceilings": ("profiling", "cuda_module"),  # the one GPU kernel that is no op's
    "autotune": ("autotune", "profiling", "tuning"),  # never an op; its __init__ alone hands on what tuning composes
    "autotune.search": (),
    "autotune.store": ("profiling.device", "profiling.files"),
    "autotune.tables": ("autotune",),
    "autotune.tuner": ("autotune", "profiling"),
    "autotune.worker": (),
    "cuda_module": (),
    "op": ("autotune.store", "profiling.device"),
    "OP": ("op", "OP.problem", "OP.plan"),
    "OP.problem": (),
    "OP.plan": ("op", "OP.problem"),
    "OP.cases": ("OP", "reference"),
    "OP.backends": ("OP.backends", "OP.problem", "cuda_module", "profiling.device"),  # configs() is handed a Device
    "mamba": ("mamba", "OP:OP"),
    # what measures and judges the library, which the library itself never imports
    "check": ("op", "reference", "profiling"),
    "peers": ("op", "profiling.device", "OP.problem"),
    "measure": ("op", "peers", "profiling"),
    "gate": ("op", "check"),
    "trials": ("check", "measure", "gate", "profiling"),  # a worker process; tuning knows it by name
    "tuning": ("op", "check", "autotune", "profiling"),
    "sweep": ("op", "measure", "profiling"),
    "counters": ("measure",),
    "parts": ("mamba", "measure", "profiling"),
    "text": ("profiling.device", "OP.cases", "mamba"),
    "cli": EVERYTHING,
    "__main__": EVERYTHING,
    "": ("op", "OP", "mamba"),  # the public names
}


def modules():
    """Every module of ours by dotted name: its file."""
    found = {}
    for package, folder in BUILD["package-dir"].items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *(p for p in parts if p != "__init__")])] = path
    return found


def imports(source, module, is_package, known):
    """What a module's source imports: "a.b" for a module, "a.b:name" for a name in one of ours."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                above = parents[: len(parents) - node.level + is_package]
                base = ".".join([*above, *([base] if base else [])])
            for alias in node.names:
                deeper = f"{base}.{alias.name}"
                yield deeper if deeper in known else f"{base}:{alias.name}" if base in known else base


def short(name):
    """A module's name within scan_kernels, "" for the package itself."""
    return name.removeprefix("scan_kernels").removeprefix(".")


def within(name, room):
    return room == "" or name == room or name.startswith((room + ".", room + ":"))


def rules(ops):
    """RULES with OP written out for every op."""
    written = {}
    for room, allowed in RULES.items():
        for op in ops if room.startswith("OP") else [""]:
            targets = [t.replace("OP", o) for t in allowed for o in ([op] if op else ops if "OP" in t else [""])]
            written[room.replace("OP", op)] = targets
    return written


def violations(module, source, is_package, known, ops):
    """The imports of a module that its room does not allow, in words."""
    table, name = rules(ops), short(module)
    inside = [room for room in table if room and within(name, room)]
    room = max(inside, key=len) if inside else "" if name == "" else None
    for target in imports(source, module, is_package, known):
        top = target.partition(".")[0].partition(":")[0]
        if top == "scan_kernels":
            if room is None:
                yield f"{module} lies in no room that RULES knows"
            elif not any(within(short(target), allowed) for allowed in table[room]):
                yield f"{module} imports {target}; {room or 'the package'} may import {table[room]}"
        elif top == "cupy" and name != "cuda_module":
            yield f"{module} imports {target}; only cuda_module may"


def found_ops(known):
    return sorted(short(m).removesuffix(".backends") for m in known if m.endswith(".backends"))


def test_every_arrow_runs_the_right_way():
    known = modules()
    ops = found_ops(known)
    assert "selective_scan" in ops
    wrong = [
        text
        for module, path in known.items()
        for text in violations(module, path.read_text(encoding="utf-8"), path.name == "__init__.py", known, ops)
    ]
    assert not wrong, "\n".join(wrong)


def test_every_module_has_a_room():
    known = modules()
    rooms = rules(found_ops(known))
    homeless = [m for m in known if short(m) and not any(room and within(short(m), room) for room in rooms)]
    assert not homeless, f"say in RULES what they may import: {homeless}"


def test_the_reference_needs_numpy_only():
    known = modules()
    for module, path in known.items():
        if within(short(module), "reference"):
            targets = imports(path.read_text("utf-8"), module, path.name == "__init__.py", known)
            tops = {t.partition(".")[0].partition(":")[0] for t in targets}
            assert tops <= {"__future__", "numpy", "scan_kernels"}, module


def test_every_package_is_shipped():
    packages = {m for m, path in modules().items() if path.name == "__init__.py"}
    assert packages == set(BUILD["packages"])


def test_a_checkout_imports_as_it_lies():
    """Where a copy is installed, the checkout that stands in the current folder wins, and must be whole."""
    code = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
        "import scan_kernels.autotune.store, scan_kernels.profiling.device, scan_kernels.reference as found\n"
        "print(found.__file__)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()) == ROOT / "reference" / "__init__.py"


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("scan_kernels.reference.selective_scan", "from ..op import Op"),
        ("scan_kernels.profiling.device", "import scan_kernels.op"),
        ("scan_kernels.profiling.device", "from .. import autotune"),
        ("scan_kernels.autotune.tuner", "from ..selective_scan.problem import Problem"),
        ("scan_kernels.autotune.tuner", "from scan_kernels import selective_scan"),
        ("scan_kernels.autotune.store", "from .. import tuning"),
        ("scan_kernels.tuning", "from .selective_scan import OP"),
        ("scan_kernels.op", "from .autotune import tuner"),
        ("scan_kernels.op", "from .selective_scan import OP"),
        ("scan_kernels.op", "def f():\n    from .profiling import timer"),
        ("scan_kernels.selective_scan.problem", "from . import OP"),
        ("scan_kernels.selective_scan.problem", "from ..op import Op"),
        ("scan_kernels.selective_scan", "from .backends import chunked"),
        ("scan_kernels.selective_scan", "from . import cases"),
        ("scan_kernels.selective_scan", "from ..mamba import Mamba"),
        ("scan_kernels.selective_scan.backends.cpu", "from .. import selective_scan"),
        ("scan_kernels.selective_scan.backends.cpu", "from ...op import Op"),
        ("scan_kernels.selective_scan.backends.cpu", "import cupy"),
        ("scan_kernels.mamba.block", "from ..selective_scan.problem import Problem"),
        ("scan_kernels.mamba.block", "from ..selective_scan import OP"),
        ("scan_kernels.check", "from .autotune import store"),
        ("scan_kernels", "from . import check"),
        ("scan_kernels.newcomer", "from . import op"),
    ],
)
def test_a_planted_arrow_is_found(module, source):
    known = modules()
    is_package = module in known and known[module].name == "__init__.py"
    assert list(violations(module, source, is_package, known, found_ops(known)))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("scan_kernels.selective_scan", "from ..op import Op\nfrom .problem import Problem"),
        (
            "scan_kernels.selective_scan.backends.cpu",
            "from ..problem import Problem\nfrom . import chunked",
        ),
        ("scan_kernels.mamba.block", "from ..selective_scan import selective_scan"),
        ("scan_kernels.op", "from .autotune import store\nimport json"),
        ("scan_kernels.__main__", "from .autotune import tuner\nfrom . import check"),
    ],
)
def test_a_right_arrow_passes(module, source):
    known = modules()
    is_package = known[module].name == "__init__.py"
    assert not list(violations(module, source, is_package, known, found_ops(known)))
