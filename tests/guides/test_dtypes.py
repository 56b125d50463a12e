"""Data of another dtype than the encoder's."""

import pytest
import torch
from torch import nn

from pyrovae.guides import AmortizedMeanField, AmortizedStructured
from pyrovae.models import GaussianVAE, HierarchicalVAE

X = torch.tensor([[0, 1, 1, 0], [1, 0, 1, 1]])


def guides():
    flat = GaussianVAE(4, 2, (3,)).float()
    tower = HierarchicalVAE(4, [("bernoulli", 3), ("normal", 2)], hidden=3).float()
    return {
        "its own encoder": AmortizedMeanField(flat),
        "another": AmortizedMeanField(flat, nn.Linear(4, 4, dtype=torch.float32)),
        "structured": AmortizedStructured(tower),
        "structured, others": AmortizedStructured(
            tower, {"h1": nn.Linear(4, 3, dtype=torch.float32), "h2": nn.Linear(3, 4, dtype=torch.float32)}
        ),
    }


@pytest.mark.parametrize("name", guides())
def test_other_dtypes_are_told(name):
    guide = guides()[name]
    guide(X.float())
    with pytest.raises(ValueError, match=r"expected data of torch.float32.*got torch.float64.*x.to\(torch.float32\)"):
        guide(X.double())
    if "other" in name:  # `mirror()` subtracts a floating mean from bytes
        with pytest.raises(ValueError, match=r"got torch.uint8.*divide bytes by 255"):
            guide(X.to(torch.uint8))


def test_at_construction_with_an_example():
    flat = GaussianVAE(4, 2, (3,)).float()
    with pytest.raises(ValueError, match=r"got torch.float64"):
        AmortizedMeanField(flat, nn.Linear(4, 4, dtype=torch.float32), example=(X.double(),))


def test_encoders_that_convert_and_errors_of_their_own():
    class Converts(nn.Linear):
        def forward(self, x):
            return super().forward(x.float())

    class Fails(nn.Linear):
        def forward(self, x):
            raise RuntimeError("mine")

    flat = GaussianVAE(4, 2, (3,)).float()
    guide = AmortizedMeanField(flat, Converts(4, 4, dtype=torch.float32))
    assert guide(X.double())["z"].dtype == torch.float32
    with pytest.raises(RuntimeError, match="mine"):
        AmortizedMeanField(flat, Fails(4, 4, dtype=torch.float32))(X.float())
