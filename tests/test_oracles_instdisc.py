"""InstDisc against two official implementations, in float64."""

import pytest
import torch

from conftest import Tiny, close
from sslzoo.memory import Bank
from sslzoo.methods.instdisc import InstDisc


def run(o, monkeypatch, steps: int, memory_after: str, check_scores=None, **options) -> InstDisc:
    """Train the bank on the oracle's features; compare losses, gradients and rows."""
    n, dim = o["memory_init"].shape
    method = InstDisc(
        Tiny(), size=n, dim=dim, temperature=float(o["temperature"]), momentum=float(o["momentum"]), **options
    ).double()
    method.bank.slots.copy_(o["memory_init"])
    for step in range(steps):
        monkeypatch.setattr(Bank, "sample", lambda *_, s=step: o[f"step{s}_sample_idx"])
        f = o[f"step{step}_feature"].requires_grad_()
        close(method.bank.slots, o[f"step{step}_memory_before"])
        loss = method.contrast(f, o[f"step{step}_index"])
        loss.backward()
        with torch.no_grad():
            method.after_step()
        close(loss.detach(), o[f"step{step}_loss"].squeeze())
        close(f.grad, o[f"step{step}_grad_feature"])
        close(method.bank.slots, o[f"step{step}_{memory_after}"])
        if check_scores:
            close(method.log_z.exp(), o[f"step{step}_Z"])
    return method


def test_nce_of_the_official_code(oracle, monkeypatch):
    run(oracle("instdisc_nce"), monkeypatch, 3, "memory_after_backward", check_scores=True, negatives=12)


def test_exact_softmax_of_the_official_code(oracle, monkeypatch):
    run(oracle("instdisc_full_softmax"), monkeypatch, 2, "memory_after", negatives=0)


@pytest.mark.parametrize("softmax", [False, True])
def test_as_the_authors_of_cmc_wrote_it(oracle, monkeypatch, softmax):
    o = oracle(f"cmc_repo_insdis_{'softmax' if softmax else 'nce'}")
    run(o, monkeypatch, 2, "memory_after", check_scores=not softmax, negatives=12, softmax=softmax)
