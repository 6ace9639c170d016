"""KAT beside its contract: initialisation, and the weights of a ViT."""

import pytest
import timm
import torch

from linzoo.backbones.kat import KAT
from linzoo.backbones.layers import GRKAN, GroupRational

SMALL = dict(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=2, num_classes=5)


def test_weights_of_a_vit_load_and_the_kans_begin_as_swish(tmp_path):
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=5)
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    overlay = dict(file=str(tmp_path / "vit.pth"), num_classes=5)
    model = timm.create_model("kat_tiny_patch16_224", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=5)
    ours = model.state_dict()
    for name, value in vit.state_dict().items():
        torch.testing.assert_close(ours[name], value)
    x = torch.linspace(-3, 3, 48).view(2, 24).repeat(1, 8)
    mlp = model.blocks[0].mlp
    torch.testing.assert_close(mlp.act1(x), x)
    torch.testing.assert_close(mlp.act2(x), torch.nn.functional.silu(x), atol=1e-4, rtol=1e-4)


def test_kans_keep_the_variance():
    torch.manual_seed(0)
    x = torch.randn(4096, 256)
    y = GRKAN(256, 512)(x)
    assert 0.8 < y.var() < 1.25


def test_mimetic_attention():
    """Query and key of a head prefer a token itself; value and projection take away a part of the input."""
    torch.manual_seed(0)
    model = KAT(weight_init="mimetic", **SMALL)
    attn = model.blocks[1].attn
    q, k, v = attn.qkv.weight.view(3, 2, 32, 64)
    for head in range(2):
        product = q[head].t() @ k[head]
        assert product.diagonal().mean() > 5 * product.fill_diagonal_(0).mean().abs()
    # W_v = L and W_proj = R, of full rank.
    assert torch.linalg.matrix_rank(v.reshape(64, 64)) == torch.linalg.matrix_rank(attn.proj.weight) == 64
    assert (attn.qkv.bias == 0).all()
    assert not torch.allclose(KAT(**SMALL).blocks[1].attn.qkv.weight.std(), attn.qkv.weight.std(), rtol=0.1)


def test_bad_init():
    with pytest.raises(ValueError, match="init: expected one of identity, swish, got 'relu'"):
        GroupRational(init="relu")
