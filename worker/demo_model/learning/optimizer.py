"""Muon for the hidden matrices, AdamW for the rest, one cosine cycle, and a slower vision side."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from worker.demo_model.learning.muon import Muon

VISION_PARTS = ("vision_model", "connector")
MIN_LR_SHARE = 0.02


def one_cycle(fraction: float, warmup: float) -> float:
    """Share of the peak learning rate after `fraction` of the run: linear rise, then half a cosine down to 2 %.

    The one-cycle policy of Smith & Topin 2017 (arXiv:1708.07120), learning rate only.
    """
    fraction = min(1.0, fraction)
    if fraction < warmup:
        return fraction / warmup
    fall = (fraction - warmup) / (1 - warmup)
    return MIN_LR_SHARE + (1 - MIN_LR_SHARE) * 0.5 * (1 + math.cos(math.pi * fall))


class Optimizer:
    """Steps two optimisers as one.

    Muon is meant for matrices between hidden layers, so embeddings, the patch convolution, latents and heads stay
    with AdamW. Its update has AdamW's root mean square, so that one learning rate serves both.
    """

    def __init__(
        self, model: nn.Module, heads: nn.Module, lr: float, *, vision_lr_share: float, trains_text: bool = True
    ) -> None:
        """`vision_lr_share` scales the learning rate of vision tower and connector; without `trains_text` the
        language model is left alone."""
        self._lr = lr
        self._clipped = [w for name, w in model.named_parameters() if trains_text or _is_vision(name)]
        muon, adam = self._groups(model, heads, vision_lr_share, trains_text)
        self._optimizers: list[torch.optim.Optimizer] = [
            Muon(muon, lr, weight_decay=0.05, momentum=0.95),
            torch.optim.AdamW(adam, lr=lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
        ]

    def step(self, loss: torch.Tensor, lr_share: float) -> None:
        """Back-propagate, clip the gradient to norm one, update, and clear the gradients."""
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self._clipped, 1.0)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self._lr * lr_share * group["lr_share"]
            optimizer.step()
            optimizer.zero_grad()

    @staticmethod
    def _groups(
        model: nn.Module, heads: nn.Module, vision_lr_share: float, trains_text: bool
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        not_hidden = _not_hidden(model)
        muon: list[dict[str, Any]] = []
        adam: list[dict[str, Any]] = [{"params": list(heads.parameters()), "lr_share": 1.0}]
        for is_vision, share in ((True, vision_lr_share), (False, 1.0)):
            if not (is_vision or trains_text):
                continue
            weights = [w for name, w in model.named_parameters() if _is_vision(name) == is_vision]
            matrices = [w for w in weights if w.ndim == 2 and id(w) not in not_hidden]
            rest = [w for w in weights if not (w.ndim == 2 and id(w) not in not_hidden)]
            muon.append({"params": matrices, "lr_share": share})
            adam.append({"params": rest, "lr_share": share})
        return muon, adam


def _is_vision(name: str) -> bool:
    return any(part in name for part in VISION_PARTS)


def _not_hidden(model: nn.Module) -> set[int]:
    """Ids of two-dimensional weights that are tables rather than maps between hidden layers."""
    tables = {id(w) for m in model.modules() if isinstance(m, nn.Embedding) for w in m.parameters()}
    named = {id(w) for name, w in model.named_parameters() if "latents" in name or "lm_head" in name}
    return tables | named
