"""Distillation against the official implementations, in float64."""

import pytest
import torch

from conftest import close
from sslzoo.downstream.distill import Contrast, kd_loss, soft_loss
from sslzoo.memory import Bank


@pytest.mark.parametrize("loss", [soft_loss, kd_loss])
@pytest.mark.parametrize("case", [0, 1, 2])
def test_simclr_v2_loss_and_hintons_up_to_the_teachers_entropy(oracle, case, loss):
    o = oracle("simclrv2_distillation_loss")
    student, teacher = o[f"case{case}_student_logits"].requires_grad_(), o[f"case{case}_teacher_logits"]
    temperature = float(o[f"case{case}_temperature"])
    value = loss(student, teacher, temperature)
    value.backward()
    if loss is kd_loss:
        value = value + soft_loss(teacher, teacher, temperature)
    close(value.detach(), o[f"case{case}_loss"], rtol=1e-6, atol=1e-6)
    close(student.grad, o[f"case{case}_grad_student_logits"], rtol=1e-6, atol=1e-6)


def test_crd_loss_gradients_and_banks(oracle, monkeypatch):
    o = oracle("crd_loss")
    n, dim = o["memory_v1_init"].shape
    dims = o["embed_s_weight"].shape[1], o["embed_t_weight"].shape[1]
    crd = Contrast(*dims, n, dim, 12, float(o["temperature"]), float(o["momentum"])).double()
    with torch.no_grad():
        for side, embed in (("s", crd.embed_s[0]), ("t", crd.embed_t[0])):
            embed.weight.copy_(o[f"embed_{side}_weight"])
            embed.bias.copy_(o[f"embed_{side}_bias"])
    crd.bank_s.slots.copy_(o["memory_v1_init"])
    crd.bank_t.slots.copy_(o["memory_v2_init"])
    for step in range(2):
        monkeypatch.setattr(Bank, "sample", lambda *_, s=step: o[f"step{s}_sample_idx"])
        h_s, h_t = (o[f"step{step}_feat_{side}"].requires_grad_() for side in "st")
        crd.zero_grad()
        loss = crd(h_s, h_t, o[f"step{step}_index"])
        loss.backward()
        crd.update()
        close(loss.detach(), o[f"step{step}_loss"].squeeze())
        close(h_s.grad, o[f"step{step}_grad_feat_s"])
        close(h_t.grad, o[f"step{step}_grad_feat_t"])
        close(crd.embed_s[0].weight.grad, o[f"step{step}_grad_embed_s_weight"])
        close(crd.bank_s.slots, o[f"step{step}_memory_v1_after"])
        close(crd.bank_t.slots, o[f"step{step}_memory_v2_after"])
        close(crd.log_z.exp(), torch.stack([o[f"step{step}_Z_v1"], o[f"step{step}_Z_v2"]]))
