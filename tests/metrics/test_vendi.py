"""The Vendi score counts: copies are one image, orthogonal ones are n, and mixtures lie between."""

import math

import pytest
import torch

from alignlab.metrics.vendi import vendi_score


def test_counts():
    assert vendi_score(torch.ones(7, 5)) == pytest.approx(1)
    assert vendi_score(torch.eye(6)) == pytest.approx(6)
    assert vendi_score(3.7 * torch.eye(6).repeat(4, 1)) == pytest.approx(6)  # copies and lengths do not count


def test_unequal_groups():
    """Shares 3/4 and 1/4 of two orthogonal images: exp of their entropy."""
    features = torch.eye(2)[[0, 0, 0, 1]]
    assert vendi_score(features) == pytest.approx(math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25))))


def test_definition():
    """Equal to the eigenvalues of K/n, for more images than dimensions and for fewer."""
    torch.manual_seed(0)
    for n, d in ((50, 8), (6, 40)):
        x = torch.nn.functional.normalize(torch.randn(n, d).double(), dim=1)
        eigenvalues = torch.linalg.eigvalsh(x @ x.T / n).clamp(min=1e-30)
        assert vendi_score(x) == pytest.approx(math.exp(-(eigenvalues * eigenvalues.log()).sum()), rel=1e-6)
