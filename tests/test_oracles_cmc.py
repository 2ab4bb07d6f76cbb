"""CMC against the official implementation, in float64."""

import pytest
import torch
from torch import nn

from conftest import close
from sslzoo.memory import Bank
from sslzoo.methods.cmc import CMC


class TwoViews(nn.Module):
    """An encoder in name only: the oracle starts from features."""

    dims = (3, 3)


@pytest.mark.parametrize("softmax", [False, True])
def test_luminance_against_colour_and_back(oracle, monkeypatch, softmax):
    o = oracle(f"cmc_{'softmax' if softmax else 'nce'}")
    n, dim = o["memory_l_init"].shape
    method = CMC(
        TwoViews(),
        size=n,
        dim=dim,
        negatives=int(o["num_negatives"]),
        softmax=softmax,
        temperature=float(o["temperature"]),
        momentum=float(o["momentum"]),
    ).double()
    bank_l, bank_ab = method.banks
    bank_l.slots.copy_(o["memory_l_init"])
    bank_ab.slots.copy_(o["memory_ab_init"])
    for step in range(3):
        monkeypatch.setattr(Bank, "sample", lambda *_, s=step: o[f"step{s}_sample_idx"])
        l, ab = (o[f"step{step}_feat_{view}"].requires_grad_() for view in ("l", "ab"))  # noqa: E741
        close(bank_l.slots, o[f"step{step}_memory_l_before"])
        close(bank_ab.slots, o[f"step{step}_memory_ab_before"])
        loss = method.contrast([l, ab], o[f"step{step}_index"])
        loss.backward()
        with torch.no_grad():
            method.after_step()
        close(loss.detach(), o[f"step{step}_loss"].squeeze())
        close(l.grad, o[f"step{step}_grad_l"])
        close(ab.grad, o[f"step{step}_grad_ab"])
        close(bank_l.slots, o[f"step{step}_memory_l_after"])
        close(bank_ab.slots, o[f"step{step}_memory_ab_after"])
        if not softmax:
            close(method.log_z[0, 1].exp(), o[f"step{step}_Z_l"])
            close(method.log_z[1, 0].exp(), o[f"step{step}_Z_ab"])
