"""Sampling of next-scale models: map by map, coarse to fine.

Tian, Jiang, Yuan, Peng, Wang, "Visual Autoregressive Modeling: Scalable Image Generation via Next-Scale Prediction" -
https://arxiv.org/abs/2404.02905
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from linzoo.backbones.mvar import MVAR
from linzoo.backbones.mvar_tokenizer import MVARTokenizer

__all__ = ["Generated", "check_pair", "draw", "generate", "keep_likely"]


class Generated(NamedTuple):
    """Images ``(B, 3, H, W)`` in [0, 1], and the codes of each map ``(B, p_k^2)``."""

    images: Tensor
    indices: list[Tensor]


def check_pair(model: MVAR, tokenizer: MVARTokenizer) -> None:
    """ValueError if a transformer and a tokenizer do not fit."""
    for name in ("V", "Cvae", "patch_nums"):
        ours, theirs = getattr(model, name), getattr(tokenizer, name)
        if ours != theirs:
            raise ValueError(f"tokenizer: expected {name}={ours} as the transformer has, got {name}={theirs}")


def keep_likely(logits: Tensor, top_k: int = 0, top_p: float = 0.0) -> Tensor:
    """Logits ``(..., V)`` with -inf for codes that are not drawn.

    Args:
        top_k: Keep the k likeliest, and all that equal the last of them; 0 keeps all.
        top_p: Of those left, drop the unlikeliest while they have ``1 - top_p`` together at most; 0 drops none. The
            likeliest always stays.
    """
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -torch.inf)
    if top_p > 0:
        ascending, where = logits.sort(dim=-1)
        go = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        go[..., -1] = False
        logits = logits.masked_fill(torch.zeros_like(go).scatter(-1, where, go), -torch.inf)
    return logits


def _exponential(shape: Sequence[int], sources: Sequence[torch.Generator], device) -> Tensor:
    found = [torch.empty(tuple(shape)).exponential_(generator=source) for source in sources]
    return torch.stack(found).to(device)


def draw(logits: Tensor, sources: Sequence[torch.Generator]) -> Tensor:
    """Draws one code per token by its probability: logits ``(B, n, V)`` to ``(B, n)``, a generator per sample."""
    return (logits.softmax(-1) / _exponential(logits.shape[1:], sources, logits.device)).argmax(-1)


@torch.no_grad()
def generate(
    model: MVAR, tokenizer: MVARTokenizer, y: Tensor, sources: Sequence[torch.Generator], guidance: float = 1.5,
    top_k: int = 900, top_p: float = 0.96, smooth: bool = False,
) -> Generated:  # fmt: skip
    """Generates images of given classes.

    The logits of map k, counted from 0, are ``(1 + s) l_y - s l_null`` with ``s = guidance k / (K - 1)``. The blocks
    keep the state of their Mamba-2, so each map is computed once.

    Args:
        y: Classes ``(B,)``.
        sources: A generator for each sample; see `linzoo.generate.flow.generators`.
        guidance: 0 for none. The published FIDs use 1.5, pictures 4.
        top_k, top_p: See `keep_likely`.
        smooth: For pictures: take means of codes, weighted by perturbed logits.

    Raises:
        ValueError: transformer and tokenizer do not fit; a class is out of range; `top_p` is outside [0, 1].
    """
    check_pair(model, tokenizer)
    if y.numel() and not 0 <= int(y.min()) <= int(y.max()) <= model.null_class:
        raise ValueError(f"y: expected classes of 0 to {model.null_class}, got {sorted(set(y.tolist()))}")
    if not 0 <= top_p <= 1 or top_k < 0:
        raise ValueError(f"top_k={top_k}, top_p={top_p}; expected 0 at least, and a share of 1")
    K, both = len(model.patch_nums), torch.cat([y, torch.full_like(y, model.null_class)])
    f_hat, inputs, memories, indices = 0.0, None, None, []
    for k in range(K):
        ratio = k / max(K - 1, 1)
        logits, memories = model.step(both, inputs, k, memories)
        given, free = logits.chunk(2)
        s = guidance * ratio
        logits = keep_likely((1 + s) * given - s * free, top_k, top_p)
        codes = draw(logits, sources)
        indices.append(codes)
        if smooth:
            gumbel = -_exponential(logits.shape[1:], sources, logits.device).log()
            share = ((logits * (1 + ratio) + gumbel) / max(0.27 * (1 - 0.95 * ratio), 0.005)).softmax(-1)
            codes = share @ tokenizer.quantizer.codes.weight
        f_hat = f_hat + tokenizer.enlarge(k, codes)
        if k + 1 < K:
            inputs = tokenizer.shrink(f_hat, k + 1).repeat(2, 1, 1)
    assert isinstance(f_hat, Tensor)
    return Generated((tokenizer.decode(f_hat) + 1) / 2, indices)
