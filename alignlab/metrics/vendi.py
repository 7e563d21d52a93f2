"""The Vendi score (Friedman and Dieng 2023, arXiv 2210.02410): how many different images there are among
n."""

import torch
from torch import Tensor


def vendi_score(features: Tensor) -> float:
    """exp of the entropy of the eigenvalues of K/n, K the features' cosine similarities: 1 if all agree, n if
    all are orthogonal.

    Args:
        features: [n, d], of any length; each row is brought to length 1.
    """
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    eigenvalues = torch.linalg.svdvals(unit).square() / len(unit)  # those of K/n that are not 0
    return torch.special.entr(eigenvalues).sum().exp().item()
