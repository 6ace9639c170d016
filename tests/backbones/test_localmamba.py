"""LocalMamba's routes against their definition: fill up with zeros, walk, scan, walk back, cut off."""

import pytest
import torch
import torch.nn.functional as F

from linzoo.backbones.localmamba import (
    LOCAL_VSSM_S,
    LOCAL_VSSM_T,
    LOCALVIM_T,
    LocalSS2D,
    LocalVimMixer,
    local_orders,
    rotate,
)
from linzoo.ops import causal_conv1d, selective_scan

SIZES = [(5, 9), (7, 4), (8, 6), (1, 1)]
ROUTES = "h_flip v w2_flip w7"


def walk(x, route):
    """The tokens of a map ``(B, H, W, C)`` in a route's order, zeros of its windows among them."""
    B, H, W, C = x.shape
    if route[0] == "w":
        K = int(route[1])
        x = F.pad(x, (0, 0, 0, -W % K, 0, -H % K))
        x = x.unflatten(2, (-1, K)).unflatten(1, (-1, K)).transpose(2, 3)
    elif route[0] == "v":
        x = x.transpose(1, 2)
    x = x.reshape(B, -1, C)
    return x.flip(1) if route.endswith("_flip") else x


def walk_back(y, route, H, W):
    """Undoes `walk`: numbers the map's tokens, walks over the numbers, and looks where each has come to stand."""
    number = torch.arange(1, H * W + 1).view(1, H, W, 1)
    steps = walk(number, route).flatten()
    return y[:, torch.argsort(steps)[-H * W :]]


def s6(module, i, u):
    """Scan i of an `S6` over the sequence u ``(B, T, D)``."""
    dt, B, C = (u @ module.x_proj[i].t()).split([module.dt_rank, module.d_state, module.d_state], dim=-1)
    A = -module.A_log[i : i + 1].exp()
    parts = {"D": module.D[i : i + 1], "dt_weight": module.dt_weight[i : i + 1], "dt_bias": module.dt_bias[i : i + 1]}
    return selective_scan(*(t.unsqueeze(2) for t in (u, dt)), A, *(t.unsqueeze(2) for t in (B, C)), **parts).squeeze(2)


@pytest.mark.parametrize(("H", "W"), SIZES)
@pytest.mark.parametrize("routes", sorted({*LOCALVIM_T, *sum(LOCAL_VSSM_T + LOCAL_VSSM_S, ())}))
def test_orders(H, W, routes):
    orders = local_orders(H, W, routes.split())
    number = torch.arange(1, H * W + 1).view(1, H, W, 1)
    for order, route in zip(orders, routes.split(), strict=True):
        assert torch.equal(order.sort().values.long(), torch.arange(len(order)))
        steps = walk(number, route).flatten()  # 0 for zeros
        numbered = torch.where(order < H * W, order + 1, 0)
        assert torch.equal(numbered[: len(steps)].long(), steps)
        assert not numbered[len(steps) :].any()


@pytest.mark.parametrize(("H", "W"), SIZES)
def test_ss2d(H, W):
    mixer, p = LocalSS2D(8, ROUTES), torch.randn(2, H, W, 16)
    with torch.inference_mode():
        scans = [walk_back(s6(mixer.s6, i, walk(p, r)), r, H, W) for i, r in enumerate(ROUTES.split())]
        expected = sum(mixer.attn(y) for y in scans).view(p.shape)
        torch.testing.assert_close(mixer.scan(p), expected)


@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize(("H", "W"), SIZES)
def test_vim_mixer(H, W, class_token):
    mixer, M = LocalVimMixer(16, ROUTES), H * W
    u, middle = torch.randn(2, M + class_token, 16), M // 2
    with torch.inference_mode():
        x, z = mixer.in_proj(u).chunk(2, dim=-1)
        expected = 0
        for i, route in enumerate(ROUTES.split()):
            token = x[:, middle : middle + class_token]
            tokens = torch.cat([x[:, :middle], x[:, middle + class_token :]], dim=1).unflatten(1, (H, W))
            steps = walk(tokens, route)
            steps = torch.cat([steps[:, :middle], token, steps[:, middle:]], dim=1)
            weight, bias = mixer.conv.weight[i : i + 1], mixer.conv.bias[i : i + 1]
            y = s6(mixer.s6, i, causal_conv1d(steps.unsqueeze(2), weight, bias, activation="silu").squeeze(2))
            token = y[:, middle : middle + class_token]
            y = walk_back(torch.cat([y[:, :middle], y[:, middle + class_token :]], dim=1), route, H, W)
            expected = expected + mixer.attn(torch.cat([y[:, :middle], token, y[:, middle:]], dim=1) * F.silu(z))
        torch.testing.assert_close(mixer(u, (H, W)), mixer.out_proj(expected))


@pytest.mark.parametrize(("base", "grid"), [((14, 14), (14, 14)), ((14, 14), (12, 9)), ((12, 10), (12, 10))])
def test_rotary_tables(base, grid):
    """A step is 1 / 14 of the map that the tables are made for; for others they are interpolated bicubically."""
    row = torch.arange(base[0])[:, None, None] * 14 / base[0] * 10000.0 ** (-torch.arange(2) / 2)
    col = torch.arange(base[1])[None, :, None] * 14 / base[1] * 10000.0 ** (-torch.arange(2) / 2)
    angle = torch.cat([row.expand(*base, 2), col.expand(*base, 2)], -1).repeat_interleave(2, -1)
    cos, sin = (
        F.interpolate(table.permute(2, 0, 1)[None], grid, mode="bicubic", align_corners=False).flatten(2).mT
        for table in (angle.cos(), angle.sin())
    )
    x = torch.randn(2, grid[0] * grid[1], 8)
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(2)
    torch.testing.assert_close(rotate(x, grid, base), x * cos + turned * sin, rtol=1e-5, atol=1e-5)
