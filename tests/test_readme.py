"""The README says what is so: its Python runs, and it names every verb, backend and environment variable."""

import json
import re
from pathlib import Path

import pytest
import torch

from scan_kernels.__main__ import VERBS
from scan_kernels.selective_scan import OP

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def column(header):
    """The first cells of the table whose first header cell is this, without backquotes and options."""
    rows = README.partition(f"\n| {header} |")[2].partition("\n\n")[0].splitlines()[2:]
    return [row.split("|")[1].strip().strip("`").partition(" ")[0] for row in rows]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.split("import ")[-1].split()[0])
def test_python_runs(block, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    torch.manual_seed(0)
    names = {}
    exec(compile(block, "README.md", "exec"), names)
    if "loss" in names:
        assert names["loss"] < 1.0
    else:
        assert names["A"].grad.isfinite().all()
        assert names["A"].grad.abs().sum() > 0


def test_both_examples_were_found():
    assert ["selective_scan(" in block for block in BLOCKS] == [True, False]
    assert ["Mamba(" in block for block in BLOCKS] == [False, True]


def test_verbs_and_backends_are_named():
    assert column("verb") == list(VERBS)
    assert sorted(column("backend")) == sorted(OP.backends)


def test_environment_variables_are_named():
    folders = ("scan_kernels", "autotune", "reference", "profiling")
    sources = [path.read_text(encoding="utf-8") for folder in folders for path in (ROOT / folder).rglob("*.py")]
    used = {name for text in sources for name in re.findall(r"\bSCAN_KERNELS_\w+", text)}
    assert used == set(column("environment variable"))


def test_the_figures_have_their_place():
    assert README.count("<!-- speed:begin -->") == README.count("<!-- speed:end -->") == 1
    assert README.index("<!-- speed:begin -->") < README.index("<!-- speed:end -->")


def test_the_speeds_are_those_of_the_committed_report():
    """Each time in the table of speeds is the report's, to the digits it is given with."""
    made = json.loads((ROOT / "bench_reports" / "nvidia-h200" / "report.json").read_text(encoding="utf-8"))
    shown = README.partition("<!-- speed:begin -->")[2].partition("<!-- speed:end -->")[0]
    rows = re.findall(r"^\| \(([\d, ]+)\) \|(.*)$", shown, re.MULTILINE)
    assert rows
    for sizes, cells in rows:
        (case,) = (c for c in made["cases"] if c["name"] == sizes.replace(", ", "x"))
        measured = {r["use"]: r["median_s"] for r in case["results"] if r["runner"] == "cuda"}
        for use, ms in zip(("inference", "backward"), re.findall(r"([\d.]+) ms", cells), strict=True):
            digits = len(ms.partition(".")[2])
            assert float(ms) == round(1e3 * measured[use], digits), (sizes, use)
