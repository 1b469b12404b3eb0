"""The Mamba block, for training, prefill and decoding.

A byte-level model, trained for a few steps:

>>> import torch
>>> from scan_kernels import Mamba
>>> text = torch.tensor(list(b"the quick brown fox jumps over the lazy dog. " * 8))
>>> model = torch.nn.Sequential(torch.nn.Embedding(256, 64), Mamba(64), torch.nn.Linear(64, 256))
>>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
>>> for _ in range(30):
...     loss = torch.nn.functional.cross_entropy(model(text[None, :-1])[0], text[1:])
...     optimizer.zero_grad()
...     loss.backward()
...     optimizer.step()
>>> print("learned" if loss < 0.5 else f"loss {loss:.2f}")
learned

Its next bytes: the prompt in one call, which fills the cache, then step by step.

>>> embed, mamba, head = model
>>> cache = mamba.allocate_cache(batch=1)
>>> out = mamba(embed(text[None, :20]), cache=cache)
>>> said = []
>>> for _ in range(25):
...     said.append(head(out[:, -1]).argmax(-1))
...     out = mamba.step(embed(said[-1][:, None]), cache)
>>> bytes(torch.cat(said).tolist())
b'jumps over the lazy dog. '
"""

from .block import Cache, Mamba

__all__ = ["Cache", "Mamba"]
