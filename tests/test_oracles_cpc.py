"""CPC's InfoNCE against lightning-bolts (unofficial: no official image code exists), in float64."""

import pytest
from torch.nn import functional as F

from conftest import close
from sslzoo.methods.cpc import patch_info_nce


@pytest.mark.parametrize("offset", [1, 2, 3, 4])
def test_info_nce_of_one_offset(oracle, offset):
    o = oracle("cpc_v2_infonce_unofficial")
    z = o["z"].requires_grad_()  # (B, D, G, G), the context being the features themselves
    targets = F.conv2d(z, o["target_weight"], o["target_bias"])
    predictions = F.conv2d(z, o["pred_weight"], o["pred_bias"])
    close(targets.detach(), o["targets"])
    close(predictions.detach(), o["preds"])
    t, p = targets.permute(0, 2, 3, 1), predictions.permute(0, 2, 3, 1)
    loss = patch_info_nce(p[:, :-offset], t, offset, scale=float(o["embed_scale"]), group=len(z))
    loss.backward()
    close(loss.detach(), o[f"offset{offset}_loss"])
    close(z.grad, o[f"offset{offset}_grad_z"])
