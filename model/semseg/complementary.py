"""Complementary dropout: what one strong view's features lose, the other's keep, doubled.

Yang et al., "UniMatch V2: Pushing the Limit of Semi-Supervised Semantic Segmentation", TPAMI 2025 (arXiv 2410.10777).
"""

from __future__ import annotations

import torch
from torch import Tensor


def complementary_dropout(pairs: int, width: int) -> Tensor:
    """Factors for the `width` channels of `pairs` samples in two views, (2 * pairs, width): 0, 2 or 1; on the CPU.

    The first half is for the first view. A channel is 0 in one view and 2 in the other, either with probability 1/2;
    in floor(pairs / 2) random samples all are 1 in both. Drawn from the CPU's generator, in the release's order.
    """
    # As torch.distributions.Binomial draws; torch.bernoulli would draw others from the same seed.
    shape = {"size": (pairs, width), "device": "cpu", "dtype": torch.float32}
    first = 2 * torch.binomial(torch.full(fill_value=1.0, **shape), torch.full(fill_value=0.5, **shape))
    first[torch.randperm(pairs, device="cpu")[: pairs // 2]] = 1
    return torch.cat([first, 2 - first])


def own_rows(factors: Tensor, share: tuple[int, int], mirrored: bool = False) -> Tensor:
    """The rows that are one process's of factors drawn for all of them, (2 T, ...): of two parts of T samples each.

    `share` = (number of the process, processes). Sample j of a step is process j mod `processes`'s, as in EpochSampler,
    so what a sample loses does not depend on how many processes there are. `mirrored`: in the second half of a batch it
    is the mirror image's, as there where CutMix pastes from the reversed batch.
    """
    rank, processes = share
    if processes == 1:
        return factors
    rows = factors.unflatten(0, (2, -1, processes))
    own = rows[:, :, rank]
    if mirrored:
        half = (own.shape[1] + 1) // 2
        own = torch.cat([own[:, :half], rows[:, half:, processes - 1 - rank]], dim=1)
    return own.flatten(0, 1)


def dropout_factors(comp_drop: bool | Tensor, batch: int, width: int, share: tuple[int, int] = (0, 1)) -> Tensor | None:
    """What a model's argument `comp_drop` stands for: factors (batch, width), or None for False.

    True: drawn for a batch of two views, [s1; s2]; of all processes' samples this one has its `share`, as in own_rows,
    mirrored. Raises ValueError if the batch cannot be halved.
    """
    if isinstance(comp_drop, Tensor):
        return comp_drop
    if not comp_drop:
        return None
    if batch % 2:
        raise ValueError(f"comp_drop: two views of each image needed, got a batch of {batch}")
    return own_rows(complementary_dropout(batch // 2 * share[1], width), share, mirrored=True)
