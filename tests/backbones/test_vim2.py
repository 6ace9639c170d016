"""ViM2 has no published implementation to be compared with: what its parts must satisfy."""

import pytest
import torch

from linzoo.backbones.vim2 import ChannelMixer, ChannelScan, TokenMixer, ViM2, WeightedAverage

SMALL = dict(dims=(16, 32, 64, 128), depths=(1, 2, 3, 1), num_classes=7)


def scan_by_hand(scan, v):
    """The channel scan's recurrence, channel by channel, for a map (B, H, W, C)."""
    cells = torch.nn.functional.adaptive_avg_pool2d(v.permute(0, 3, 1, 2), scan.grid).flatten(2)  # (B, C, P)
    total = torch.zeros_like(v)
    rows = torch.arange(scan.grid**2)
    columns = rows.view(scan.grid, scan.grid).t().flatten()
    for k, order in enumerate((rows, columns, rows.flip(0), columns.flip(0))):
        h = v.new_zeros(*v.shape[:3], scan.d_state)
        for c in range(v.shape[-1]):
            r, B, C = (cells[:, c, order] @ scan.x_proj[k].t()).split([1, scan.d_state, scan.d_state], -1)
            delta = torch.nn.functional.softplus(r + scan.dt_bias[k])  # (B, 1)
            decay = torch.exp(-delta * scan.A_log[k].exp())[:, None, None]
            h = decay * h + (delta * B)[:, None, None] * v[..., c, None]
            total[..., c] += (h * C[:, None, None]).sum(-1) + scan.D[k] * v[..., c]
    return total


@pytest.mark.parametrize("size", ((7, 7), (5, 9)))
def test_channel_scan_is_the_recurrence(size):
    scan = ChannelScan(d_state=4).double()
    v = torch.randn(2, *size, 6, dtype=torch.float64)
    torch.testing.assert_close(scan(v), scan_by_hand(scan, v))


def test_channel_mixer_sees_the_order_of_channels_but_not_of_images():
    mixer, x = ChannelMixer(12), torch.randn(3, 7, 7, 12)
    y = mixer(x)
    torch.testing.assert_close(mixer(x[[2, 0, 1]]), y[[2, 0, 1]])
    torch.testing.assert_close(mixer(x[:1]), y[:1])
    assert not torch.allclose(mixer.scan(x.flip(-1)).flip(-1), mixer.scan(x), atol=1e-3)


def test_token_mixer_turned_by_half_a_turn():
    """Routes 0 and 2, 1 and 3 exchange their parameters; the convolution's kernel turns with the map."""
    mixer = TokenMixer(8, ratio=1.0, d_state=4).double()
    turned = TokenMixer(8, ratio=1.0, d_state=4).double()
    state = {k: v[[2, 3, 0, 1]] if ".s6." in f".{k}" else v for k, v in mixer.state_dict().items()}
    state["conv.weight"] = state["conv.weight"].flip(2, 3)
    turned.load_state_dict(state)
    x = torch.randn(2, 5, 6, 8, dtype=torch.float64)
    torch.testing.assert_close(turned(x.flip(1, 2)), mixer(x).flip(1, 2))


def test_token_mixer_selects_by_its_input():
    """With D = 0, no output remains where nothing is scanned or where B and C are 0."""
    mixer, x = TokenMixer(8, d_state=4), torch.randn(1, 5, 6, 8)
    torch.nn.init.zeros_(mixer.s6.D)
    assert mixer.s6.x_proj.shape == (4, 1 + 2 * 4, 8), "B, C and the step read the block's 8 channels"
    torch.nn.init.zeros_(mixer.conv.bias)
    mixer.in_proj.weight.data[:16] = 0  # nothing scanned
    assert not mixer(x).any()
    torch.nn.init.zeros_(mixer.s6.x_proj)  # B = C = 0
    torch.nn.init.normal_(mixer.in_proj.weight)
    assert not mixer(x).any()


def test_averages_begin_as_residuals():
    """Every mixer reads the stage's input plus all outputs before it."""
    model = ViM2(**SMALL).eval()
    x = model.stem(torch.randn(1, 3, 64, 64))
    for stage in model.stages:
        residual = x = stage.downsample(x)
        for block in stage.blocks:
            for norm, mixer in zip(block.token_norms, block.token_mixers, strict=True):
                residual = residual + mixer(norm(residual))
            residual = residual + block.channel_mixer(block.channel_norm(residual))
        plain = residual
        x = stage(x if isinstance(stage.downsample, torch.nn.Identity) else _undo(stage, x))
        torch.testing.assert_close(x, plain, rtol=1e-4, atol=1e-4)


def _undo(stage, downsampled):
    """An input that the stage's downsampling turns into `downsampled`: the downsampling is taken out."""
    stage.downsample = torch.nn.Identity()
    return downsampled


@pytest.mark.parametrize("token_mixers", [1, 2])
def test_every_weight_of_the_averages_learns(token_mixers):
    """L (2 L + 3) weights in L blocks of one token mixer each, and those of what leaves the stage."""
    model = ViM2(token_mixers=token_mixers, **SMALL)
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    averages = [m for m in model.modules() if isinstance(m, WeightedAverage)]
    scalars = sum(m.tokens.numel() + m.channels.numel() for m in averages)
    stages = [1, 2, 3, 1]
    if token_mixers == 1:
        assert scalars == sum(n * (2 * n + 3) + 2 * (n + 1) for n in stages)
    for m in averages:
        if len(m.tokens) == 1:  # the norm behind it takes away the scale of the stage's input
            continue
        assert (m.tokens.grad != 0).all() and (m.channels.grad != 0).all()


def test_plain_residuals_have_nothing_to_learn_in_the_averages():
    model = ViM2(averaging=False, **SMALL)
    averages = [m for m in model.modules() if isinstance(m, WeightedAverage)]
    assert not any(p.requires_grad for m in averages for p in m.parameters())
