"""Names the blocks of a prompt by what is in them, so that prompts that begin alike share them.

A key covers everything before it, so equal keys mean equal prefixes. It is made of what the text decoder gets,
embeddings and positions: words, and images as the vision tower saw them, so other media are another key.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from worker.engine.prefill import Prompt

_VIEWS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
#: Tokens whose fingerprints are made at a time; bounds the memory for their wide integers.
_STRIDE = 512


class PrefixKeys:
    """Makes keys for one engine. Engine thread only.

    An embedding is a vector of thousands of numbers; two random linear sums of its bits, modulo 2⁶⁴, stand for it
    (Carter, Wegman: Universal classes of hash functions, 1979). They are made on the device, only they are copied. The
    weights are drawn anew by every process, so nobody can prepare two images with the same sums.
    """

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(torch.seed())
        self._weights: Tensor | None = None

    def keys(self, prompt: Prompt, block_size: int) -> list[bytes]:
        """Return one key per full block of the prompt."""
        prints = self._fingerprints(prompt.embeds)
        positions = prompt.positions.reshape(-1, prompt.num_tokens).T
        # One copy to the host for everything.
        rows = torch.cat((prints, positions.to(prints)), dim=1).cpu().contiguous().numpy()
        keys: list[bytes] = []
        key = b""
        for start in range(0, prompt.num_tokens - block_size + 1, block_size):
            key = hashlib.blake2b(key + rows[start : start + block_size].tobytes(), digest_size=16).digest()
            keys.append(key)
        return keys

    def _fingerprints(self, embeds: Tensor) -> Tensor:
        """Return two numbers per token, [T, 2]."""
        bits = embeds.contiguous().view(_VIEWS[embeds.dtype])
        if self._weights is None:
            drawn = torch.randint(-(2**63), 2**63 - 1, (2, bits.shape[1]), generator=self._generator)
            self._weights = drawn.to(bits.device)
        weights = self._weights
        pieces = [bits[start : start + _STRIDE] for start in range(0, bits.shape[0], _STRIDE)]
        parts = [torch.stack([(piece.long() * w).sum(-1) for w in weights], dim=1) for piece in pieces]
        return torch.cat(parts)
