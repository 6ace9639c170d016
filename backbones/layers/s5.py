"""S5 and ConvS5: one diagonal state space for all features, computed by a scan.

Complex parameters hold (re, im) on their last axis.
"""

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from timm.models._features_fx import register_notrace_module
from torch import nn

from linzoo.ops import diagonal_scan

from .hippo import normal_plus_low_rank, perturb_then_diagonalise
from .s4 import STATE_SPACE, as_real, log_uniform_

DISCRETIZATIONS = ("zoh", "bilinear")


def gelu(x):
    """The tanh approximation, which S5 and ConvS5 use."""
    return F.gelu(x, approximate="tanh")


def initial_modes(init, d_state, blocks):
    """Initial modes of S5: `blocks` copies of one block of d_state / blocks real states.

    Args:
        init: 'legs' (HiPPO-N, half of the modes) or 'ptd' (all of them).
        d_state: Real states in total.
        blocks: Number of blocks.

    Returns:
        Lambda ``(P,)``, block-diagonal V ``(d_state, P)`` and its left inverse ``(P, d_state)``.

    Raises:
        ValueError: `init` is unknown, or the blocks do not divide the states.
    """
    if init not in ("legs", "ptd"):
        raise ValueError(f"init: expected 'legs' or 'ptd', got {init!r}")
    if blocks < 1 or d_state % blocks:
        raise ValueError(f"blocks: expected a divisor of {d_state} states, got {blocks}")
    size = d_state // blocks
    if init == "legs":
        Lambda, _, _, V = normal_plus_low_rank("legs", size)
        inverse = V.conj().T.resolve_conj()
    else:
        Lambda, V, _ = perturb_then_diagonalise(size)
        inverse = torch.linalg.inv(V)
    return Lambda.repeat(blocks), torch.block_diag(*[V] * blocks), torch.block_diag(*[inverse] * blocks)


class DiagonalSystem(nn.Module):
    """The part of S5 and ConvS5 without projections: Lambda and the step sizes, one per state, and their use."""

    optim_hints = dict.fromkeys(("Lambda_re", "Lambda_im", "log_step"), STATE_SPACE)

    def __init__(self, modes: int, discretization: str, clip: bool, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        if discretization not in DISCRETIZATIONS:
            raise ValueError(f"discretization: expected one of {', '.join(DISCRETIZATIONS)}, got {discretization!r}")
        self.discretization, self.clip = discretization, clip
        self.Lambda_re = nn.Parameter(torch.empty(modes, **dd))
        self.Lambda_im = nn.Parameter(torch.empty(modes, **dd))
        self.log_step = nn.Parameter(torch.empty(modes, **dd))

    def discretise(self, rate=1.0):
        """Gains of the states and of their inputs, complex ``(P,)``, in float32 or more."""
        re, im, log_step = (
            t.to(torch.promote_types(t.dtype, torch.float32)) for t in (self.Lambda_re, self.Lambda_im, self.log_step)
        )
        Lambda, step = torch.complex(re.clamp(max=-1e-4) if self.clip else re, im), rate * log_step.exp()
        if self.discretization == "zoh":
            gain = torch.exp(Lambda * step)
            return gain, torch.complex(gain.real - 1, gain.imag) / Lambda  # AOTInductor knows no complex number less 1
        half = 1 / (1 - step / 2 * Lambda)
        return half * (1 + step / 2 * Lambda), half * step


@register_notrace_module  # FX cannot trace the operator's checks of shapes
class S5(DiagonalSystem):
    """S5 (arXiv 2208.04933): ``x_k = Lb x_{k-1} + Bb u_k;  y_k = 2 Re(C x_k) + D u_k`` on sequences ``(B, L, H)``.

    Args:
        dim: Features H.
        d_state: Real states. There are half as many modes P; with `init` 'ptd' as many, and outputs are not doubled.
        blocks: Number of HiPPO blocks in the initial states.
        init: 'legs' (HiPPO-N) or 'ptd' (`hippo.perturb_then_diagonalise`).
        bidirectional: Adds a second scan from the end; both directions include the step itself.
        discretization: 'zoh' or 'bilinear'.
        clip: Keep the modes' real parts at -1e-4 or less.
        c_init: 'lecun' (normal of std 1 / sqrt(d_state H)), 'truncated' (1 / sqrt(d_state)), both in the coordinates of
            real systems, or 'complex_normal' (variance 1, in those of the modes).
        dt_min, dt_max: Range of the initial steps, which are log-uniform.
    """

    optim_hints = {**DiagonalSystem.optim_hints, "B": STATE_SPACE}

    def __init__(
        self,
        dim: int,
        d_state: int = 64,
        blocks: int = 1,
        init: str = "legs",
        bidirectional: bool = False,
        discretization: str = "zoh",
        clip: bool = True,
        c_init: str = "lecun",
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        device=None,
        dtype=None,
    ):
        dd: dict = {"device": device, "dtype": dtype}
        if c_init not in ("lecun", "truncated", "complex_normal"):
            raise ValueError(f"c_init: expected 'lecun', 'truncated' or 'complex_normal', got {c_init!r}")
        modes = d_state if init == "ptd" else d_state // 2
        super().__init__(modes, discretization, clip, **dd)
        self.d_state, self.blocks, self.init, self.c_init = d_state, blocks, init, c_init
        self.dt_min, self.dt_max, self.bidirectional = dt_min, dt_max, bidirectional
        self.B = nn.Parameter(torch.empty(modes, dim, 2, **dd))
        self.C = nn.Parameter(torch.empty(dim, (1 + bidirectional) * modes, 2, **dd))
        self.D = nn.Parameter(torch.empty(dim, **dd))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        nn.init.normal_(self.D)
        log_uniform_(self.log_step, self.dt_min, self.dt_max)
        nn.init.normal_(self.C, std=0.5**0.5)
        if self.C.is_meta:
            return
        device, dim = self.C.device, len(self.D)
        Lambda, V, inverse = (t.to(device) for t in initial_modes(self.init, self.d_state, self.blocks))
        self.Lambda_re.copy_(Lambda.real)
        self.Lambda_im.copy_(Lambda.imag)
        rows = torch.empty(self.d_state, dim, dtype=torch.float64, device=device)
        trunc_normal_(rows, std=self.d_state**-0.5)
        self.B.copy_(as_real(inverse @ (rows + 0j)))
        if self.c_init == "complex_normal":
            return
        std = (self.d_state * (dim if self.c_init == "lecun" else 1)) ** -0.5
        columns = torch.empty(1 + self.bidirectional, dim, self.d_state, 2, dtype=torch.float64, device=device)
        trunc_normal_(columns, std=std, a=-2 * std, b=2 * std)
        columns = torch.view_as_complex(columns) @ V
        self.C.copy_(as_real(torch.cat(columns.unbind(), -1)))

    def forward(self, u, rate=1.0):
        """``(B, L, H)`` to the same. `rate` multiplies the steps, for inputs with another sampling rate."""
        gain, scale = self.discretise(rate)
        B, C = (
            torch.view_as_complex(t.to(torch.promote_types(t.dtype, torch.float32)).contiguous())
            for t in (self.B, self.C)
        )
        into = as_real(scale.unsqueeze(-1) * B).transpose(1, 2).flatten(0, 1)  # rows re_0, im_0, re_1, ...
        out = as_real(C.conj()).flatten(1)  # Re(C x) = C_re x_re - C_im x_im
        out = out if self.init == "ptd" else 2 * out
        inputs = F.linear(u, into.to(u.dtype)).unflatten(-1, (-1, 2))
        gain = as_real(gain)
        states = [diagonal_scan(gain, inputs)]
        if self.bidirectional:
            states.append(diagonal_scan(gain, inputs, reverse=True))
        y = F.linear(torch.cat(states, -2).flatten(2), out.to(u.dtype))
        return torch.addcmul(y, u, self.D.to(y.dtype)) if y.dtype == u.dtype else y + u * self.D


ACTIVATIONS = ("gelu", "half_glu1", "half_glu2", "full_glu")


class S5Mixer(nn.Module):
    """`S5` and its activation, with g the tanh GELU.

    'gelu': g(y); 'half_glu1': g(y) sigmoid(W g(y)); 'half_glu2': y sigmoid(W g(y));
    'full_glu': (V g(y)) sigmoid(W g(y)).

    Args:
        dim: Features.
        activation: One of these.
        drop: Dropout of g(y) and of the output.
        kwargs: Passed to `S5`.
    """

    def __init__(self, dim: int, activation: str = "half_glu1", drop: float = 0.0, device=None, dtype=None, **kwargs):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        self.activation = activation
        self.ssm = S5(dim, **kwargs, **dd)
        self.gate = nn.Linear(dim, dim, **dd) if activation != "gelu" else None
        self.value = nn.Linear(dim, dim, **dd) if activation == "full_glu" else None
        self.drop = nn.Dropout(drop)

    def forward(self, u, rate=1.0):
        """``(B, L, H)`` to the same."""
        y = self.ssm(u, rate)
        g = self.drop(gelu(y))
        if self.gate is None:
            return g
        value = {"half_glu1": g, "half_glu2": y}.get(self.activation)
        return self.drop((self.value(g) if value is None else value) * self.gate(g).sigmoid())


def he_normal_(tensor, fan_in):
    """Truncated normal of variance 2 / `fan_in`."""
    std = (2 / fan_in) ** 0.5
    return trunc_normal_(tensor, std=std, a=-2 * std, b=2 * std)


@register_notrace_module
class ConvS5(DiagonalSystem):
    """ConvS5 (arXiv 2310.19694): ``x_k = Lb x_{k-1} + Bb * u_k;  y_k = 2 Re(C * x_k)`` on videos ``(T, B, H, W, U)``.

    B and C are convolutions. A state's gain is one complex number for all pixels, so the recurrence is that of S5.

    Args:
        dim: Channels U.
        d_state: Real states; there are half as many modes P.
        blocks: Number of HiPPO blocks in the initial states.
        kernel_size: Side of B's and C's kernels, odd.
        discretization: 'zoh' or 'bilinear'.
        clip: Keep the modes' real parts at -1e-4 or less.
        dt_min, dt_max: Range of the initial steps, which are log-uniform.
    """

    def __init__(
        self,
        dim: int,
        d_state: int = 64,
        blocks: int = 1,
        kernel_size: int = 3,
        discretization: str = "zoh",
        clip: bool = True,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        device=None,
        dtype=None,
    ):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__(d_state // 2, discretization, clip, **dd)
        self.dim, self.d_state, self.blocks, self.kernel_size = dim, d_state, blocks, kernel_size
        self.dt_min, self.dt_max = dt_min, dt_max
        taps = (kernel_size, kernel_size)
        self.B = nn.Parameter(torch.empty(d_state // 2, dim, *taps, 2, **dd))
        self.C = nn.Parameter(torch.empty(dim, d_state // 2, *taps, 2, **dd))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        log_uniform_(self.log_step, self.dt_min, self.dt_max)
        if self.C.is_meta:
            return
        device, taps = self.C.device, self.kernel_size**2
        Lambda, V, inverse = (t.to(device) for t in initial_modes("legs", self.d_state, self.blocks))
        self.Lambda_re.copy_(Lambda.real)
        self.Lambda_im.copy_(Lambda.imag)
        rows = torch.empty(self.d_state, self.dim * taps, dtype=torch.float64, device=device)
        he_normal_(rows, self.dim * taps)
        self.B.copy_(as_real(inverse @ (rows + 0j)).view(self.B.shape))
        columns = torch.empty(self.dim, taps, self.d_state, dtype=torch.float64, device=device)
        he_normal_(columns, self.d_state * taps)
        self.C.copy_(as_real((columns + 0j) @ V).transpose(1, 2).reshape(self.C.shape))

    def forward(self, u, initial=None, rate=1.0):
        """Runs over the frames.

        Args:
            u: Frames ``(T, B, H, W, U)``.
            initial: State before the first frame ``(B, H, W, P, 2)``; None for 0.
            rate: Factor of the steps.

        Returns:
            ``(T, B, H, W, U)`` and the last state ``(B, H, W, P, 2)``.
        """
        gain, scale = self.discretise(rate)
        B, C = (
            torch.view_as_complex(t.to(torch.promote_types(t.dtype, torch.float32)).contiguous())
            for t in (self.B, self.C)
        )
        into = as_real(scale.view(-1, 1, 1, 1) * B).movedim(-1, 1).flatten(0, 1)  # outputs re_0, im_0, re_1, ...
        out = as_real(2 * C.conj()).movedim(-1, 2).flatten(1, 2)
        pad = self.kernel_size // 2
        frames = u.flatten(0, 1).permute(0, 3, 1, 2)
        inputs = F.conv2d(frames, into.to(u.dtype), padding=pad).permute(0, 2, 3, 1)
        inputs = inputs.unflatten(0, u.shape[:2]).unflatten(-1, (-1, 2)).transpose(0, 1)
        states = diagonal_scan(as_real(gain), inputs, initial)  # (B, T, H, W, P, 2)
        maps = states.transpose(0, 1).flatten(0, 1).flatten(-2).permute(0, 3, 1, 2)
        y = F.conv2d(maps, out.to(maps.dtype), padding=pad).permute(0, 2, 3, 1)
        return y.unflatten(0, u.shape[:2]), states[:, -1]


class ConvS5Head(nn.Module):
    """The layers after `ConvS5`'s state space, with g the tanh GELU, on ``(N, H, W, U)``.

    'standard': ``g(GN(y + Conv(u)))``; 'resnet': ``g(y + Conv(g(GN(Conv(g(GN(y)))))))``; 'diag_resnet':
    ``g(y + Conv(g(GN(y))))``; 'half_glu': ``g sigmoid(W g)`` of ``g = g(LN(y))``.

    Args:
        dim: Channels U.
        kind: One of these.
        kernel_size: Side of the convolutions, odd.
        num_groups: Groups of GroupNorm.
    """

    KINDS = {"standard": 1, "resnet": 2, "diag_resnet": 1, "half_glu": 0}  # number of convolutions of each kind

    def __init__(
        self, dim: int, kind: str = "resnet", kernel_size: int = 3, num_groups: int = 32, device=None, dtype=None
    ):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        if kind not in self.KINDS:
            raise ValueError(f"kind: expected one of {', '.join(self.KINDS)}, got {kind!r}")
        self.kind, count = kind, self.KINDS[kind]
        self.conv = nn.ModuleList(nn.Conv2d(dim, dim, kernel_size, padding="same", **dd) for _ in range(count))
        self.norm = nn.ModuleList(nn.GroupNorm(num_groups, dim, eps=1e-6, **dd) for _ in range(count))
        if kind == "half_glu":
            self.norm.append(nn.LayerNorm(dim, eps=1e-6, **dd))
            self.gate = nn.Linear(dim, dim, **dd)

    def forward(self, y, u):
        if self.kind == "half_glu":
            g = gelu(self.norm[0](y))
            return g * self.gate(g).sigmoid()
        y, u = y.permute(0, 3, 1, 2), u.permute(0, 3, 1, 2)
        if self.kind == "standard":
            return gelu(self.norm[0](y + self.conv[0](u))).permute(0, 2, 3, 1)
        h = y
        for norm, conv in zip(self.norm, self.conv, strict=True):
            h = conv(gelu(norm(h)))
        return gelu(y + h).permute(0, 2, 3, 1)


class ConvS5Layer(nn.Module):
    """``[norm], ConvS5 and head, dropout, + u, [norm]`` on videos ``(T, B, H, W, U)``.

    Args:
        dim: Channels U.
        head: `ConvS5Head`'s kind.
        norm: 'pre', 'post' (LayerNorm over channels) or None.
        num_groups: Groups of the head's GroupNorms.
        drop: Dropout.
        kwargs: Passed to `ConvS5`.
    """

    def __init__(
        self,
        dim: int,
        head: str = "resnet",
        norm: str = "post",
        num_groups: int = 32,
        drop: float = 0.0,
        kernel_size: int = 3,
        device=None,
        dtype=None,
        **kwargs,
    ):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        if norm not in ("pre", "post", None):
            raise ValueError(f"norm: expected 'pre', 'post' or None, got {norm!r}")
        self.place = norm
        self.ssm = ConvS5(dim, kernel_size=kernel_size, **kwargs, **dd)
        self.head = ConvS5Head(dim, head, kernel_size, num_groups, **dd)
        self.drop = nn.Dropout(drop)
        self.norm = nn.Identity() if norm is None else nn.LayerNorm(dim, eps=1e-6, **dd)

    def forward(self, u, initial=None, rate=1.0):
        """Frames and the state before them to frames and the last state; see `ConvS5`."""
        x = self.norm(u) if self.place == "pre" else u
        y, state = self.ssm(x, initial, rate)
        y = self.head(y.flatten(0, 1), x.flatten(0, 1)).unflatten(0, u.shape[:2])
        y = u + self.drop(y)
        return (self.norm(y) if self.place == "post" else y), state
