"""InvaSpread against the official implementation, in float64."""

import pytest
import torch

from conftest import close
from sslzoo.methods.invaspread import invaspread


@pytest.mark.parametrize("case", [0, 1])
def test_batch_criterion(oracle, case):
    o = oracle("invaspread_batch_criterion")
    features = o[f"case{case}_features"].requires_grad_()
    z1, z2 = features.chunk(2)
    loss = invaspread(z1, z2, float(o[f"case{case}_temperature"]), float(o[f"case{case}_neg_m"]))
    loss.backward()
    close(loss.detach(), o[f"case{case}_loss"])
    close(features.grad, o[f"case{case}_grad_features"])
    assert torch.isfinite(features.grad).all()
