"""RWKV's token and channel mixers for images, as defined in Vision-RWKV (arXiv 2403.02308)."""

import math

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerScale
from timm.models._features_fx import register_notrace_function, register_notrace_module
from torch import nn

from linzoo.ops import bi_wkv, scan_order, wkv6, wkv7, wkv7_state


@register_notrace_function  # FX cannot trace what depends on the map's size
def q_shift(x, grid, heads=1):
    """Quad-directional token shift (eq. 9): a quarter of the channels from each neighbour.

    In order: the left, right, upper and lower neighbour. The paper lists the vertical ones first; the published weights
    use this order.

    Args:
        x: Tokens ``(B, H * W, C)`` in raster order.
        grid: ``(H, W)``.
        heads: Each head's C / heads channels are cut into quarters.

    Returns:
        ``(B, H * W, C)``, with 0 for neighbours beyond the border.
    """
    x = x.unflatten(1, grid).unflatten(-1, (heads, -1))
    width = x.shape[-1]
    left, right, above, below = x.tensor_split([width // 4, width // 2, width * 3 // 4], -1)
    # Negative padding crops. A slice would leave a traced program in doubt whether the map has a second row.
    shifted = [
        F.pad(left, (0, 0, 0, 0, 1, -1)),
        F.pad(right, (0, 0, 0, 0, -1, 1)),
        F.pad(above, (0, 0, 0, 0, 0, 0, 1, -1)),
        F.pad(below, (0, 0, 0, 0, 0, 0, -1, 1)),
    ]
    return torch.cat(shifted, -1).flatten(-2).flatten(1, 2)


def channel_ramp(dim, device=None):
    """``c / C`` for the channels c = 0 .. C - 1."""
    return torch.arange(dim, dtype=torch.float32, device=device) / dim


def decay_ramp(dim, low, high, layer, layers, device=None):
    """RWKV's initial decays ``(dim,)``: from `low` to `high` over the channels, with more curvature in later layers."""
    ramp = torch.arange(dim, dtype=torch.float32, device=device) / max(dim - 1, 1)
    return low + (high - low) * ramp ** (0.7 + 1.3 * layer / max(layers - 1, 1))


def zigzag(count, device=None):
    """-1, 0 and 1 in turns, starting with the second: RWKV's small differences between initial bonuses."""
    return (torch.arange(count, device=device) + 1) % 3 - 1.0


@register_notrace_module  # FX cannot trace scan orders, which depend on the map's size
class SpatialMix(nn.Module):
    """Vision-RWKV's token mixer (section 3.2): ``W_o (sigmoid(r) * BiWKV(k, v))``.

    Keys, values and receptances are linear maps of ``z mu + shift(z) (1 - mu)``, each with its own mu. Decay and bonus
    are divided by the number of tokens. See `linzoo.ops.bi_wkv`.

    Args:
        dim: Channels C.
        layer, layers: Index of the block and number of blocks; the initial values depend on them.
        passes: How often BiWKV is applied, alternating raster and column order (2 or more: Restore-RWKV's Re-WKV), with
            decay and bonus ``(passes, C)``.
        out_norm: Whether a LayerNorm follows BiWKV (the authors' `key_norm`).
    """

    def __init__(
        self,
        dim: int,
        layer: int = 0,
        layers: int = 12,
        passes: int = 1,
        out_norm: bool = False,
        device=None,
        dtype=None,
    ):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.layer, self.layers = layer, layers
        self.mix = nn.Parameter(torch.empty(3, dim, **dd))  # of k, v, r
        self.decay = nn.Parameter(torch.empty(passes, dim, **dd))
        self.bonus = nn.Parameter(torch.empty(passes, dim, **dd))
        self.key = nn.Linear(dim, dim, bias=False, **dd)
        self.value = nn.Linear(dim, dim, bias=False, **dd)
        self.receptance = nn.Linear(dim, dim, bias=False, **dd)
        self.out_norm = nn.LayerNorm(dim, eps=1e-5, **dd) if out_norm else nn.Identity()
        self.output = nn.Linear(dim, dim, bias=False, **dd)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        """The authors' "fancy" values: decays of both signs, less shift in later layers; v's mu exceeds 1 there."""
        dim, device = self.mix.shape[1], self.mix.device
        near = channel_ramp(dim, device) ** (1 - self.layer / self.layers)
        later = self.layer / max(self.layers - 1, 1)
        self.mix.copy_(torch.stack([near, near + 0.3 * later, near.sqrt()]))
        self.decay.copy_(decay_ramp(dim, -5, 3, self.layer, self.layers, device).expand_as(self.decay))
        self.bonus.copy_((math.log(0.3) + 0.5 * zigzag(dim, device)).expand_as(self.bonus))

    def forward(self, x, grid):
        """Tokens ``(B, H * W, C)`` and their grid ``(H, W)``."""
        shifted = q_shift(x, grid)
        k, v, r = (shifted + (x - shifted) * mu for mu in self.mix)
        y = self.wkv(self.key(k), self.value(v), grid)
        return self.output(torch.sigmoid(self.receptance(r)) * self.out_norm(y))

    def wkv(self, k, v, grid):
        """The passes of BiWKV over keys and values in raster order."""
        for i, (decay, bonus) in enumerate(zip(self.decay, self.bonus, strict=True)):
            order = scan_order.column(*grid, device=k.device) if i % 2 else None
            v = bi_wkv(k, v, decay, bonus, order=order, divide_by_length=True)
        return v


class StateMixer(nn.Module):
    """A mixer of H heads of 64 channels whose scans, in both directions, may start from learnt states `time_state`; see
    `linzoo.backbones.layers.state_tuning`.
    """

    head_dim = 64

    def __init__(self, dim: int):
        super().__init__()
        if dim % self.head_dim:
            raise ValueError(f"dim: expected a multiple of {self.head_dim}, got {dim}")
        self.heads = dim // self.head_dim
        self.register_parameter("time_state", None)

    @property
    def state_shape(self):
        """Shape of the state before the first token and of that after the last one."""
        return 2, self.heads, self.head_dim, self.head_dim

    def add_state(self):
        """Gives the scans initial states of 0, in float32 whatever the weights' dtype."""
        self.time_state = nn.Parameter(torch.zeros(self.state_shape, device=self.mix.device))


@register_notrace_module  # FX cannot trace the operator's checks of shapes
class SpatialMix6(StateMixer):
    """RWKV-6's token mixer (arXiv 2404.05892, section 4), with shift and scans in both directions of an image.

    With ``d = shift(z) - z``, the inputs of decay, key, value, receptance and gate are ``z + d (mix_j + lora_j)``, with
    ``lora_j = tanh((z + d mix_x) W_1)_j W_2j``. Then::

        w = decay + tanh(z_w D_1) D_2;   y = wkv6(r, k, v, w, bonus);   W_o (GroupNorm(y) * SiLU(g))

    Args:
        dim: Channels; each head has 64 of them.
        layer, layers: As in `SpatialMix`.
        mix_rank, decay_rank: Rank of lora, and rank of the part of the decay that depends on the token.
    """

    def __init__(
        self,
        dim: int,
        layer: int = 0,
        layers: int = 12,
        mix_rank: int = 32,
        decay_rank: int = 64,
        device=None,
        dtype=None,
    ):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__(dim)
        self.layer, self.layers = layer, layers
        self.mix_x = nn.Parameter(torch.empty(1, dim, **dd))
        self.mix = nn.Parameter(torch.empty(5, dim, **dd))  # of w, k, v, r, g
        self.mix_w1 = nn.Parameter(torch.empty(dim, 5 * mix_rank, **dd))
        self.mix_w2 = nn.Parameter(torch.empty(5, mix_rank, dim, **dd))
        self.decay = nn.Parameter(torch.empty(1, dim, **dd))
        self.decay_w1 = nn.Parameter(torch.empty(dim, decay_rank, **dd))
        self.decay_w2 = nn.Parameter(torch.empty(decay_rank, dim, **dd))
        self.bonus = nn.Parameter(torch.empty(self.heads, self.head_dim, **dd))
        self.key = nn.Linear(dim, dim, bias=False, **dd)
        self.value = nn.Linear(dim, dim, bias=False, **dd)
        self.receptance = nn.Linear(dim, dim, bias=False, **dd)
        self.gate = nn.Linear(dim, dim, bias=False, **dd)
        self.norm = nn.GroupNorm(self.heads, dim, eps=1e-5, **dd)
        self.output = nn.Linear(dim, dim, bias=False, **dd)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        dim, device = self.mix.shape[1], self.mix.device
        later = self.layer / max(self.layers - 1, 1)
        near = channel_ramp(dim, device) ** (1 - self.layer / self.layers)
        far = 1 - near
        self.mix_x.copy_(far.unsqueeze(0))
        self.mix.copy_(torch.stack([far, far, far - 0.3 * later, 1 - near.sqrt(), 1 - near.sqrt()]))
        for weight in (self.mix_w1, self.mix_w2, self.decay_w1, self.decay_w2):
            nn.init.uniform_(weight, -1e-4, 1e-4)
        self.decay.copy_(decay_ramp(dim, -6, -1, self.layer, self.layers, device).unsqueeze(0))
        ramp = torch.arange(dim, dtype=torch.float32, device=device) / (dim - 1)
        self.bonus.copy_((later * (1 - ramp) + 0.1 * zigzag(dim, device)).view_as(self.bonus))

    def forward(self, z, grid):
        """Tokens ``(B, H * W, C)`` and their grid ``(H, W)``."""
        d = q_shift(z, grid, self.heads) - z
        low = torch.tanh((z + d * self.mix_x) @ self.mix_w1).unflatten(-1, (5, -1)).unbind(-2)
        w, k, v, r, g = (z + d * (mix + x @ up) for mix, x, up in zip(self.mix, low, self.mix_w2.unbind(), strict=True))
        w = self.decay + torch.tanh(w @ self.decay_w1) @ self.decay_w2
        heads = [x.unflatten(-1, (self.heads, -1)) for x in (self.receptance(r), self.key(k), self.value(v), w)]
        y = wkv6(*heads, self.bonus, initial=self.time_state).flatten(-2)
        y = self.norm(y.flatten(0, 1).to(self.norm.weight.dtype)).unflatten(0, y.shape[:2])
        return self.output(y * F.silu(self.gate(g)))


@register_notrace_module  # FX cannot trace the operator's checks of shapes
class SpatialMix7(StateMixer):
    """RWKV-7's token mixer (arXiv 2503.14456, section 4), with shift and scans in both directions of an image.

    No vision model of RWKV-7 is published: shift and directions are as in `SpatialMix6`. With ``d = shift(z) - z``, the
    inputs are ``z + d mix_j``; `lora` is a product of two narrow matrices::

        r, k, v = W_r z_r, W_k z_k, W_v z_v;    a = sigmoid(rate + lora_a(z_a));    g = lora_g(z_g), sigmoid inside
        w = -softplus(-(decay + lora_w(z_w))) - 1/2, tanh inside: a step keeps exp(-exp(w)) > exp(-exp(-1/2))
        e = k removal / |k removal| in each head;    k <- k (1 + (a - 1) write)
        y = GroupNorm(both directions' wkv7(r, w, k, v, -e, a e)) + (r . bonus k) v;    W_o (y g)

    In the language model later layers mix in the first layer's values. This is left out, because a mixer sees only its
    own layer.

    Args:
        dim: Channels; each head has 64 of them.
        layer, layers: As in `SpatialMix`.
    """

    def __init__(
        self,
        dim: int,
        layer: int = 0,
        layers: int = 12,
        device=None,
        dtype=None,
    ):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__(dim)
        self.layer, self.layers = layer, layers
        rank = max(32, round(1.8 * dim**0.5 / 32) * 32)  # ranks of the language models at this width
        gate_rank = max(32, round(0.6 * dim**0.8 / 32) * 32)
        self.mix = nn.Parameter(torch.empty(6, dim, **dd))  # of r, w, k, v, a, g
        for name, inner in (("decay", rank), ("rate", rank), ("gate", gate_rank)):
            self.register_parameter(f"{name}_down", nn.Parameter(torch.empty(dim, inner, **dd)))
            self.register_parameter(f"{name}_up", nn.Parameter(torch.empty(inner, dim, **dd)))
        self.decay = nn.Parameter(torch.empty(dim, **dd))
        self.rate = nn.Parameter(torch.empty(dim, **dd))
        self.removal = nn.Parameter(torch.empty(dim, **dd))
        self.write = nn.Parameter(torch.empty(dim, **dd))
        self.bonus = nn.Parameter(torch.empty(self.heads, self.head_dim, **dd))
        self.receptance = nn.Linear(dim, dim, bias=False, **dd)
        self.key = nn.Linear(dim, dim, bias=False, **dd)
        self.value = nn.Linear(dim, dim, bias=False, **dd)
        self.norm = nn.GroupNorm(self.heads, dim, eps=1e-5 * self.head_dim, **dd)
        self.output = nn.Linear(dim, dim, bias=False, **dd)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        """Decays from slow to fast over the channels; decay, rate and gate do not depend on the token yet."""
        dim, device = self.mix.shape[1], self.mix.device
        ramp = channel_ramp(dim, device)
        near, later = 1 - self.layer / self.layers, self.layer / max(self.layers - 1, 1)
        key, value = ramp ** (0.9 * near) + 0.4 * later, ramp ** (0.4 * near) + 0.6 * later
        flat = torch.ones_like(ramp)
        self.mix.copy_(torch.stack([1 - ramp ** (0.2 * near), 0.9 * flat, 1 - key, 1 - value, 0.9 * flat, 0.2 * flat]))
        for name in ("decay", "rate", "gate"):
            nn.init.zeros_(getattr(self, f"{name}_down"))
            nn.init.orthogonal_(getattr(self, f"{name}_up"), gain=0.1)
        self.decay.copy_(decay_ramp(dim, -6.5, -1.5, self.layer, self.layers, device))
        nn.init.zeros_(self.rate)
        nn.init.constant_(self.removal, 0.85)
        nn.init.ones_(self.write)
        nn.init.zeros_(self.bonus)
        for linear, scale in ((self.receptance, 0.5), (self.key, 0.05), (self.value, 0.5)):
            nn.init.uniform_(linear.weight, -scale * dim**-0.5, scale * dim**-0.5)

    def forward(self, z, grid):
        """Tokens ``(B, H * W, C)`` and their grid ``(H, W)``."""
        d = q_shift(z, grid, self.heads) - z
        r, w, k, v, a, g = (z + d * mix for mix in self.mix)
        w = self.decay + torch.tanh(w @ self.decay_down) @ self.decay_up
        a = torch.sigmoid(self.rate + a @ self.rate_down @ self.rate_up)
        g = torch.sigmoid(g @ self.gate_down) @ self.gate_up
        r, k, v = self.receptance(r), self.key(k), self.value(v)
        erased = k * self.removal
        k = k * (1 + (a - 1) * self.write)
        w = -F.softplus(-w) - 0.5
        r, w, k, v, a, erased = (x.unflatten(-1, (self.heads, -1)) for x in (r, w, k, v, a, erased))
        erased = F.normalize(erased, dim=-1)
        back = torch.arange(z.shape[1] - 1, -1, -1, dtype=torch.int32, device=z.device)
        inputs = r, w, k, v, -erased, a * erased
        if self.time_state is None:
            y = wkv7(*inputs) + wkv7(*inputs, order=back)
        else:
            first, last = self.time_state
            y = wkv7_state(*inputs, first)[0] + wkv7_state(*inputs, last, order=back)[0]
        y = y.flatten(-2)
        y = self.norm(y.flatten(0, 1).to(self.norm.weight.dtype)).unflatten(0, y.shape[:2])
        own = (r * k * self.bonus).sum(-1, keepdim=True) * v
        return self.output((y + own.flatten(-2)) * g)


class ChannelMix(nn.Module):
    """Vision-RWKV's channel mixer: ``sigmoid(W_r z_r) * W_v relu(W_k z_k)^2`` with z as in `SpatialMix`.

    Args:
        dim: Channels C.
        hidden: Inner width; None for ``4 C``.
        layer, layers: As in `SpatialMix`.
        heads: Heads of the shift.
        hidden_norm: Whether a LayerNorm follows the square (the authors' `key_norm`).
    """

    def __init__(
        self,
        dim: int,
        hidden: int | None = None,
        layer: int = 0,
        layers: int = 12,
        heads: int = 1,
        hidden_norm: bool = False,
        device=None,
        dtype=None,
    ):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        hidden = hidden or 4 * dim
        self.layer, self.layers, self.heads = layer, layers, heads
        self.mix = nn.Parameter(torch.empty(2, dim, **dd))  # of k, r
        self.key = nn.Linear(dim, hidden, bias=False, **dd)
        self.hidden_norm = nn.LayerNorm(hidden, eps=1e-5, **dd) if hidden_norm else nn.Identity()
        self.value = nn.Linear(hidden, dim, bias=False, **dd)
        self.receptance = nn.Linear(dim, dim, bias=False, **dd)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        near = channel_ramp(self.mix.shape[1], self.mix.device) ** (1 - self.layer / self.layers)
        self.mix.copy_(near.expand_as(self.mix))

    def forward(self, x, grid):
        """Tokens ``(B, H * W, C)`` and their grid ``(H, W)``."""
        shifted = q_shift(x, grid, self.heads)
        k, r = (shifted + (x - shifted) * self.mix[i] for i in range(2))
        hidden = self.hidden_norm(F.relu(self.key(k)).square())
        return torch.sigmoid(self.receptance(r)) * self.value(hidden)


class RWKVBlock(nn.Module):
    """A token mixer and a channel mixer with residuals: ``x += s Mixer(LN(x))``, or ``x += s LN(Mixer(x))``.

    Args:
        dim: Channels.
        mixer, mlp: Modules of tokens ``(B, H * W, C)`` and their grid.
        first_norm: Whether the residual stream is first replaced by its LayerNorm (RWKV's ln0).
        post_norm: Normalise the outputs of the mixers instead of their inputs.
        init_values: Initial layer scales s; None for none.
        eps: Of the LayerNorms.
        drop_path: Stochastic depth.
    """

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        mlp: nn.Module,
        first_norm: bool = False,
        post_norm: bool = False,
        init_values: float | None = None,
        eps: float = 1e-5,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.post_norm = post_norm
        self.norm0 = nn.LayerNorm(dim, eps=eps, **dd) if first_norm else nn.Identity()
        self.norm1 = nn.LayerNorm(dim, eps=eps, **dd)
        self.mixer = mixer
        self.ls1 = nn.Identity() if init_values is None else LayerScale(dim, init_values, **dd)
        self.norm2 = nn.LayerNorm(dim, eps=eps, **dd)
        self.mlp = mlp
        self.ls2 = nn.Identity() if init_values is None else LayerScale(dim, init_values, **dd)
        self.drop_path = DropPath(drop_path)

    def forward(self, x, grid):
        x = self.norm0(x)
        for mixer, norm, scale in ((self.mixer, self.norm1, self.ls1), (self.mlp, self.norm2, self.ls2)):
            y = norm(mixer(x, grid)) if self.post_norm else mixer(norm(x), grid)
            x = x + self.drop_path(scale(y))
        return x


# The authors' names for a block's parts, and ours.
RWKV_NAMES = [
    (r"\.ln([012])\.", r".norm\1."),
    (r"\.gamma([12])$", r".ls\1.gamma"),
    (r"\.att\.key_norm\.", ".mixer.out_norm."),
    (r"\.ffn\.key_norm\.", ".mlp.hidden_norm."),
    (r"\.att\.", ".mixer."),
    (r"\.ffn\.", ".mlp."),
    (r"\.spatial_decay$", ".decay"),
    (r"\.spatial_first$", ".bonus"),
]


def stack_mixes(state_dict, names):
    """Replaces ``{prefix}.{name}``, for all `names`, by one tensor ``{prefix}.mix`` ``(len(names), C)``."""
    prefixes = [key.removesuffix(names[0]) for key in state_dict if key.endswith(f".{names[0]}")]
    for prefix in prefixes:
        if all(prefix + name in state_dict for name in names):
            rows = [state_dict.pop(prefix + name).reshape(-1) for name in names]
            state_dict[f"{prefix}mix"] = torch.stack(rows)
    return state_dict
