"""The portable backend: chunks of any length, memory, overflow, and how far a NaN or Inf reaches."""

import random

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from scan_kernels import reference, selective_scan
from scan_kernels.selective_scan.backends import chunked
from scan_kernels.selective_scan.cases import USES, Case, judge, pose

ARGUMENTS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")


@pytest.fixture(autouse=True)
def fresh_random_numbers():
    """Other numbers in every run; a failing test's captured output says how to repeat them."""
    seed = torch.seed()
    random.seed(seed)
    print(f"torch.manual_seed({seed}), random.seed({seed})")


def run(tensors, chunk=None):
    """(out, last_state), with gradients unless a chunk is given."""
    arguments = {k: v for k, v in tensors.items() if k not in ("dout", "dlast_state")}
    config = None if chunk is None else chunked.Config(chunk)
    return selective_scan(**arguments, return_last_state=True, backend="chunked", config=config)


def close(got, exact):
    np.testing.assert_allclose(got.double().numpy(), exact, rtol=0, atol=1e-5 * np.abs(exact).max())


@pytest.mark.parametrize("chunk", [1, 3, 16, 64, 1000])
@pytest.mark.parametrize("lengths", [(), (40, 0, 0, 1, 130, 2, 34)], ids=["rows", "packed"])
@pytest.mark.parametrize("initial_state", [False, True])
def test_every_chunk_length_gives_the_same(chunk, lengths, initial_state):
    """Chunks of one step make hundreds of carries: the combination over chunks goes several levels deep."""
    case = Case("", batch=3, dim=4, length=207, state=3, groups=2, lengths=lengths, initial_state=initial_state)
    tensors = case.make(seed=torch.initial_seed() % 2**63)
    tensors["A"] *= 0.1  # so that a state outlives many chunks
    exact = judge(tensors)
    for got, name in zip(run(tensors, chunk), ("out", "last_state"), strict=True):
        close(got, exact[name])


def test_a_chunk_has_at_least_one_step():
    with pytest.raises(ValueError, match="chunk: expected at least 1 step, got 0"):
        chunked.Config(0)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(result):
            if isinstance(t, torch.Tensor):
                self.elements = max(self.elements, t.numel())
        return result


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("lengths", [(), (700, 0, 1300)], ids=["rows", "packed"])
def test_memory(use, lengths):
    """No tensor is larger than the kept states and the states of one block of chunks together."""
    case = Case("", batch=2, dim=24, length=1000, state=40, lengths=lengths)
    problem = case.used(use)
    arguments, _ = pose(case.make(), problem)
    with Largest() as seen:
        getattr(chunked, problem.direction)(problem, *arguments, chunked.Config(16))
    rows, chunk = problem.rows, problem.checkpoint or 16
    slots = problem.batch * problem.length // chunk + rows
    assert seen.elements <= problem.dim * problem.state * (slots + problem.batch * (chunk + 1))
    assert seen.elements < problem.elements * problem.state / 4


def test_decays_may_overflow_where_the_state_does_not():
    """exp(A ΣΔ) of a chunk is far beyond float32, the states are not: they start at zero, or tiny."""
    u, delta = torch.zeros(1, 2, 96), torch.ones(1, 2, 96)
    B = C = torch.ones(1, 1, 96)
    A = torch.tensor([[6.0], [2.0]])
    u[:, :, 90:] = torch.randn(6)
    initial = torch.tensor([[[0.0], [1e-30]]])
    config = chunked.Config(16)
    out, last = selective_scan(u, delta, A, B, C, return_last_state=True, initial_state=initial, config=config)
    n = [t.double().numpy() for t in (u, delta, A, B, C)]
    exact_out, exact_last = reference.selective_scan(*n, initial_state=initial.double().numpy())
    finite = np.abs(exact_out) < 1e37
    assert finite[0, 0].all()
    np.testing.assert_allclose(out.double().numpy()[finite], exact_out[finite], rtol=1e-4)
    np.testing.assert_allclose(last[0, 0].double().numpy(), exact_last[0, 0], rtol=1e-4)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", [*ARGUMENTS, "dout", "dlast_state"])
@pytest.mark.parametrize("packed", [False, True])
def test_what_is_not_finite_reaches_only_what_depends_on_it(name, value, packed):
    """Chunks end inside rows, rows inside chunks: what fills them up must stay out of every result."""
    lengths = (5, 0, 33, 20) if packed else ()
    constant = random.random() < 0.5
    case = Case("", batch=2, dim=4, length=50, state=3, groups=2, lengths=lengths, initial_state=True,
                constant_B=constant, constant_C=constant)  # fmt: skip
    tensors = case.make(seed=torch.initial_seed() % 2**63)
    poisoned = tensors[name]
    poisoned.view(-1)[random.randrange(poisoned.numel())] = value
    leaves = {k: tensors[k].requires_grad_() for k in ARGUMENTS}
    out, last = run(tensors)
    dout, dlast = tensors["dout"], tensors["dlast_state"]
    gradients = torch.autograd.grad((out, last), list(leaves.values()), (dout, dlast))
    got = {f"d{k}": g for k, g in zip(leaves, gradients, strict=True)}
    got |= {"out": out.detach(), "last_state": last.detach()}
    for tensor, exact in judge(tensors).items():
        x, finite = got[tensor].double().numpy(), np.isfinite(exact)
        assert np.isfinite(x[finite]).all(), tensor
        assert not np.isfinite(x[~finite]).any(), tensor
        if finite.any():
            close(torch.tensor(x[finite]), exact[finite])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("use", USES)
def test_packed_sequences_wait_for_nothing(use):
    """Offsets on a GPU are never read back."""
    case = Case("", dim=64, state=16, lengths=(300, 0, 700), initial_state=True)
    problem = case.used(use, "cuda")
    arguments, _ = pose(case.make("cuda"), problem)

    def call():
        getattr(chunked, problem.direction)(problem, *arguments, chunked.Config(16))

    call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
