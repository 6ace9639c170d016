"""S4D, S4, S4ND and LSSL: linear time-invariant state spaces, computed as long convolutions.

Complex parameters hold (re, im) on their last axis. Tokens and maps are channel-last.
"""

import math

import torch
import torch.nn.functional as F
from timm.models._features_fx import register_notrace_module
from torch import nn

from linzoo.ops import fft_conv, ssm_kernel

from .hippo import diagonal_system, hippo_legs, normal_plus_low_rank, perturb_then_diagonalise

# A, B, P and the steps: learning rate 1e-3 at most, no weight decay.
STATE_SPACE = {"lr": 1e-3, "weight_decay": 0.0}


def as_real(x):
    """Complex to (re, im) on a last axis."""
    return torch.view_as_real(x.resolve_conj())


def log_uniform_(tensor, low, high):
    """Fills with logarithms of step sizes that are log-uniform in [low, high]."""
    return nn.init.uniform_(tensor, math.log(low), math.log(high))


class DiagonalKernel(nn.Module):
    """S4D's convolution kernels (arXiv 2206.11893): `linzoo.ops.ssm_kernel` with its parameters.

    Args:
        dim: Features H.
        d_state: Real states N: N/2 modes, or N with `init` 'ptd'.
        channels: Kernels per feature that share A, B and the steps.
        init: 'lin', 'inv', 'inv2', 'quad', 'real' or 'legs' (`diagonal_system`), or 'ptd'
            (`perturb_then_diagonalise`: all modes, B = V^-1 B_legs, C = C_0 V with a real normal C_0).
        copies: Independent pairs of A and B, a divisor of H; feature h uses pair h modulo copies. None for H.
        discretization: 'zoh' or 'bilinear'.
        dt_min, dt_max: Range of the initial steps, which are log-uniform.
        bandlimit: Modes whose frequency dt |Im A| / 2 pi (at a `rate` of 1) is at least half of this are cut; None for
            none.
        length: Steps of the kernel; None for the length given to `forward`.
    """

    optim_hints = dict.fromkeys(("A_log", "A_imag", "B", "log_dt"), STATE_SPACE)

    def __init__(
        self,
        dim: int,
        d_state: int = 64,
        channels: int = 1,
        init: str = "legs",
        copies: int | None = None,
        discretization: str = "zoh",
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        bandlimit: float | None = None,
        length: int | None = None,
        device=None,
        dtype=None,
    ):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        copies = copies or dim
        if dim % copies:
            raise ValueError(f"copies: expected a divisor of {dim} features, got {copies}")
        self.d_state, self.init, self.discretization = d_state, init, discretization
        self.dt_min, self.dt_max, self.bandlimit, self.length = dt_min, dt_max, bandlimit, length
        modes = d_state if init == "ptd" else d_state // 2
        self.A_log = nn.Parameter(torch.empty(copies, modes, **dd))
        self.A_imag = nn.Parameter(torch.empty(copies, modes, **dd))
        self.B = nn.Parameter(torch.empty(copies, modes, 2, **dd))
        self.C = nn.Parameter(torch.empty(channels, dim, modes, 2, **dd))
        self.log_dt = nn.Parameter(torch.empty(dim, **dd))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        log_uniform_(self.log_dt, self.dt_min, self.dt_max)
        nn.init.normal_(self.C, std=0.5**0.5)
        if self.C.is_meta:
            return
        if self.init == "ptd":
            A, V, _ = perturb_then_diagonalise(self.d_state)
            B = torch.linalg.solve(V, hippo_legs(self.d_state)[1] + 0j)
            rows = torch.randn(*self.C.shape[:-1], dtype=torch.float64, device=self.C.device)
            self.C.copy_(as_real(rows.to(V.dtype) @ V.to(self.C.device)) / 2)  # kernels sum both modes of a pair, twice
        else:
            A, B = diagonal_system(self.init, self.d_state)
        self.A_log.copy_((-A.real).clamp(min=1e-4).log().expand_as(self.A_log))
        self.A_imag.copy_(A.imag.expand_as(self.A_imag))
        self.B.copy_(as_real(B).expand_as(self.B))

    def state_space(self, rate=1.0):
        """A, B, C ``(H, N, 2)`` and dt ``(H,)`` in float32 or more, at a sampling rate of `rate`."""
        A_log, A_imag, B, C, log_dt = (
            t.to(torch.promote_types(t.dtype, torch.float32))
            for t in (self.A_log, self.A_imag, self.B, self.C, self.log_dt)
        )
        repeats = C.shape[1] // A_log.shape[0]
        A = torch.stack([-A_log.exp(), A_imag], -1).repeat(repeats, 1, 1)
        dt = log_dt.exp()
        if self.bandlimit is not None:
            passed = dt[:, None] * A[..., 1].abs() < math.pi * self.bandlimit
            C = C * passed.unsqueeze(-1)
        return A, B.repeat(repeats, 1, 1), C, rate * dt

    def forward(self, length, rate=1.0):
        """The kernels ``(channels, H, length)``; a length given to the constructor takes precedence."""
        A, B, C, dt = self.state_space(rate)
        return ssm_kernel(A, B, C, dt, self.length or length, discretization=self.discretization)


class LowRankKernel(nn.Module):
    """S4's convolution kernels (arXiv 2111.00396), by generating function: the state matrix is diag(A) - P P^*.

    As in the authors' weights, the parameter `C` is that of the truncated generating function, ``C (I - dA^length)`` of
    the true C. A kernel therefore costs only O(N + length). This `C` belongs to one length; `attune` changes it.

    Args:
        dim: Features H.
        d_state: Real states N: N/2 modes.
        channels: Kernels per feature that share everything except C.
        init: 'legs' or 'fourier'.
        copies: Independent sets of A, B and P; None for 1.
        dt_min, dt_max: Range of the initial steps, which are log-uniform.
        length: Steps of the kernel; inputs further back are forgotten.
    """

    optim_hints = dict.fromkeys(("A_log", "A_imag", "B", "P", "log_dt"), STATE_SPACE)

    def __init__(
        self,
        dim: int,
        d_state: int = 64,
        channels: int = 1,
        init: str = "legs",
        copies: int | None = None,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        *,
        length: int,
        device=None,
        dtype=None,
    ):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        copies = copies or 1
        if dim % copies:
            raise ValueError(f"copies: expected a divisor of {dim} features, got {copies}")
        self.d_state, self.init, self.length = d_state, init, length
        self.dt_min, self.dt_max = dt_min, dt_max
        modes = d_state // 2
        self.A_log = nn.Parameter(torch.empty(copies, modes, **dd))
        self.A_imag = nn.Parameter(torch.empty(copies, modes, **dd))
        self.B = nn.Parameter(torch.empty(copies, modes, 2, **dd))
        self.P = nn.Parameter(torch.empty(1, copies, modes, 2, **dd))
        self.C = nn.Parameter(torch.empty(channels, dim, modes, 2, **dd))
        self.log_dt = nn.Parameter(torch.empty(dim, **dd))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        log_uniform_(self.log_dt, self.dt_min, self.dt_max)
        nn.init.normal_(self.C, std=0.5**0.5)
        if self.C.is_meta:
            return
        A, P, B, _ = normal_plus_low_rank(self.init, self.d_state)
        self.A_log.copy_((-A.real).clamp(min=1e-4).log().expand_as(self.A_log))
        self.A_imag.copy_(A.imag.expand_as(self.A_imag))
        self.B.copy_(as_real(B).expand_as(self.B))
        self.P.copy_(as_real(P).expand_as(self.P))
        self.attune(self.length, true_C=True)

    @torch.no_grad()
    def attune(self, length, true_C=False):
        """Changes `C` to that of kernels of another length.

        Args:
            length: Steps.
            true_C: Whether `C` now holds the true C, as after filling it by hand, instead of that of `self.length`.
        """
        A, _, C, P, dt = (t.double() for t in self.state_space())
        A, C, P, half = torch.view_as_complex(A), torch.view_as_complex(C), torch.view_as_complex(P)[0], dt[:, None] / 2
        if not true_C:
            C = self._true_C(A, C, P, half)
        # A row c, applied to states as 2 Re(c x), times (I - half M)^-1 (I + half M), M = diag(A) - P 2 Re(P^* .).
        inverse = 1 / (1 - half * A)
        weight = 1 / (1 + half * 2 * (P.abs().square() * inverse).real.sum(-1, keepdim=True))
        row = C
        for _ in range(length):
            row = row * (1 + half * A) - half * 2 * (row * P).real.sum(-1, keepdim=True) * P.conj()
            passed = half * weight * 2 * (row * P * inverse).real.sum(-1, keepdim=True)
            row = (row - passed * P.conj()) * inverse
        self.C.copy_(torch.view_as_real(C - row))
        self.length = length

    def _true_C(self, A, C, P, half):
        """C over (I - dA^length), in real coordinates (Re x, Im x), where 2 Re(C x) is (2 Re C, -2 Im C) of them."""
        re, im = torch.diag_embed(A.real), torch.diag_embed(A.imag)
        matrix = torch.cat([torch.cat([re, -im], -1), torch.cat([im, re], -1)], -2)
        P = torch.cat([P.real, P.imag], -1)  # P P^* x of both modes of all pairs is P times 2 Re(P^* x)
        half = half[..., None] * (matrix - 2 * P[:, :, None] * P[:, None])
        eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        step = torch.linalg.solve(eye - half, eye + half)
        C = torch.cat([C.real, -C.imag], -1).transpose(0, 1)  # (H, channels, N)
        C = torch.linalg.solve(eye - torch.linalg.matrix_power(step, self.length), C, left=False)
        real, imag = C.transpose(0, 1).chunk(2, -1)
        return torch.complex(real, -imag)

    def state_space(self, rate=1.0):
        """A, B, C, P and dt in float32 or more, repeated for all features, at a sampling rate of `rate`."""
        A_log, A_imag, B, C, P, log_dt = (
            t.to(torch.promote_types(t.dtype, torch.float32))
            for t in (self.A_log, self.A_imag, self.B, self.C, self.P, self.log_dt)
        )
        repeats = C.shape[1] // A_log.shape[0]
        A = torch.stack([-A_log.exp(), A_imag], -1).repeat(repeats, 1, 1)
        return A, B.repeat(repeats, 1, 1), C, P.repeat(1, repeats, 1, 1), rate * log_dt.exp()

    def forward(self, length=None, rate=1.0):
        """The kernels ``(channels, H, self.length / rate)``; the argument `length` is ignored."""
        A, B, C, P, dt = self.state_space(rate)
        return ssm_kernel(A, B, C, dt, round(self.length / rate), P=P, discretization="bilinear")


@register_notrace_module  # FX cannot trace kernels, which are as long as the input
class S4ND(nn.Module):
    """Long convolutions along every axis by state-space kernels, and a gated projection (S4ND, arXiv 2210.06583).

    ``y = K * u + D u`` with ``K = k_1 (x) k_2 ...``, a kernel per axis; then, unless `linear`, ``GLU(W GELU(y))``.

    Args:
        dim: Channels H of ``(B, L_1, ..., H)``.
        axes: Axes that the kernels run along.
        kernel: 'diagonal' (S4D) or 'low_rank' (S4).
        d_state: Real states N of each kernel.
        bidirectional: Kernels in both directions: from a token to itself and the ones before, and to the ones after.
        channels: Outputs per input channel, all of them read by the projection.
        rank: Outer products that are averaged.
        linear: Without activation and projection; needs one output per channel.
        out_channels: Makes it a full convolution to this many channels, with a kernel per pair of channels and no D;
            needs `linear`.
        length: Steps of the kernels: a number, or one per axis. None (S4D only) for the input's size.
        drop: Dropout before the projection.
        kernel_args: Further arguments of `DiagonalKernel` or `LowRankKernel`: init, dt_min, dt_max, ...

    Raises:
        ValueError: arguments exclude each other.
    """

    def __init__(
        self,
        dim: int,
        axes: int = 2,
        kernel: str = "low_rank",
        d_state: int = 64,
        bidirectional: bool = True,
        channels: int = 1,
        rank: int = 1,
        linear: bool = False,
        out_channels: int | None = None,
        length: int | None = None,
        drop: float = 0.0,
        device=None,
        dtype=None,
        **kernel_args,
    ):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        kernels = {"diagonal": DiagonalKernel, "low_rank": LowRankKernel}
        if kernel not in kernels:
            raise ValueError(f"kernel: expected one of {', '.join(kernels)}, got {kernel!r}")
        if kernel == "low_rank" and length is None:
            raise ValueError("length: S4's kernels need one, got None")
        if (linear or out_channels) and channels != 1 or (out_channels and not linear):
            raise ValueError("linear, out_channels: expected channels=1, and linear=True beside out_channels")
        self.dim, self.axes, self.channels, self.rank = dim, axes, channels, rank
        self.directions, self.out_channels = 2 if bidirectional else 1, out_channels
        lengths = length if isinstance(length, (tuple, list)) else [length] * axes
        if len(lengths) != axes:
            raise ValueError(f"length: expected a number or {axes} of them, got {length}")
        rows, heads = dim * (out_channels or 1), self.directions * rank * channels
        self.kernel = nn.ModuleList(
            kernels[kernel](rows, d_state, heads, length=l, **kernel_args, **dd) for l in lengths
        )
        self.D = None if out_channels else nn.Parameter(torch.empty(channels, dim, **dd))
        self.drop = nn.Dropout(drop)
        self.out_proj = None if linear else nn.Linear(channels * dim, 2 * dim, **dd)
        self.reset_parameters()

    def reset_parameters(self):
        if self.D is not None:
            nn.init.normal_(self.D)

    def kernels(self, sizes, rate=1.0):
        """The kernels of each axis ``(directions, rank, channels, H, length)`` for inputs of `sizes`."""
        heads = (self.directions, self.rank, self.channels)
        return [kernel(size, rate).unflatten(0, heads) for kernel, size in zip(self.kernel, sizes, strict=True)]

    def convolve(self, u, rate=1.0):
        """``K * u + D u``: ``(B, L_1, ..., channels H)``, one channel's outputs after the other."""
        kernels = self.kernels(u.shape[1:-1], rate)
        outputs = []
        for c in range(self.channels):
            back = None if self.directions == 1 else [k[1, :, c] for k in kernels]
            y = fft_conv(u, [k[0, :, c] for k in kernels], back, out_channels=self.out_channels)
            y = y / self.rank if self.rank > 1 else y
            outputs.append(y if self.D is None else torch.addcmul(y, u, self.D[c].to(u.dtype)))
        return outputs[0] if self.channels == 1 else torch.cat(outputs, -1)

    def forward(self, u, rate=1.0):
        """``(B, L_1, ..., H)`` to the same, or to `out_channels`.

        `rate` multiplies the steps: how much farther apart the samples are than those in training.
        """
        if u.dim() != self.axes + 2 or u.shape[-1] != self.dim:
            raise ValueError(f"u: expected (B, {self.axes} axes, {self.dim}), got {tuple(u.shape)}")
        y = self.convolve(u, rate)
        return y if self.out_proj is None else F.glu(self.out_proj(self.drop(F.gelu(y))))


class S4D(S4ND):
    """S4D (arXiv 2206.11893) on sequences ``(B, L, H)``: `S4ND` with one axis and diagonal kernels."""

    def __init__(self, dim: int, d_state: int = 64, bidirectional: bool = False, init: str = "legs", **kwargs):
        super().__init__(dim, 1, "diagonal", d_state, bidirectional, init=init, **kwargs)


class S4(S4ND):
    """S4 (arXiv 2111.00396) on sequences ``(B, L, H)``: `S4ND` with one axis and diagonal-plus-low-rank kernels.

    `length` is the number of steps that an output looks back at most.
    """

    def __init__(
        self, dim: int, d_state: int = 64, bidirectional: bool = False, init: str = "legs", *, length: int, **kwargs
    ):
        super().__init__(dim, 1, "low_rank", d_state, bidirectional, init=init, length=length, **kwargs)


PUBLISHED = {"A_real": "A_log", "log_A_real": "A_log", "inv_dt": "log_dt"}  # names of the authors' parameters, and ours


@torch.no_grad()
def load_published(layer, state_dict):
    """Loads a layer's weights from the format of the authors' repository (state-spaces/s4).

    It reads those of their S4D example, of S4's block with diagonal or low-rank kernels, and of S4ND. Their kernels
    store -Im A, except the example's. C belongs to the length in `l_kernel`, or is the true C if that is 0.

    Args:
        layer: `S4ND`, `S4D` or `S4` of the same sizes.
        state_dict: ``{name: tensor}`` of the authors' layer.

    Raises:
        RuntimeError: names or shapes do not fit.
    """
    ours, lengths = {}, {}
    example = any(name.endswith("log_A_real") for name in state_dict)
    for name, value in state_dict.items():
        name = name.removeprefix("layer.")
        *path, leaf = name.split(".")
        if path[:1] == ["output_linear"]:
            ours[f"out_proj.{leaf}"] = value.flatten(1) if leaf == "weight" else value
        elif path[:1] != ["kernel"]:
            ours[name] = value.view(-1, layer.dim) if leaf == "D" else value
        else:
            axis = path[1] if len(path) > 1 else "0"
            if leaf == "l_kernel":
                lengths[int(axis)] = int(value)
                continue
            kernel = layer.kernel[int(axis)]
            leaf = PUBLISHED.get(leaf, leaf)
            value = -value if leaf == "A_imag" and not example else value
            ours[f"kernel.{axis}.{leaf}"] = value.reshape(getattr(kernel, leaf).shape)
    for axis, kernel in enumerate(layer.kernel):
        if f"kernel.{axis}.B" not in ours:  # it is 1 in the example
            ours[f"kernel.{axis}.B"] = torch.stack([torch.ones_like(kernel.A_log), torch.zeros_like(kernel.A_log)], -1)
    layer.load_state_dict(ours)
    for axis, length in lengths.items():
        kernel = layer.kernel[axis]
        if isinstance(kernel, LowRankKernel):
            wanted, kernel.length = kernel.length, length or kernel.length
            kernel.attune(wanted, true_C=length == 0)


@register_notrace_module
class LSSL(nn.Module):
    """Linear state-space layer (arXiv 2110.13985): a dense state matrix, HiPPO-LegS, shared by all features.

    ``x_k = dA_h x_{k-1} + dB_h u_k; y = C x + D u`` discretised bilinearly with a step per feature, computed as a
    convolution with the Krylov matrix (dB, dA dB, ...); then GELU and a linear map of all outputs of all features.

    Args:
        dim: Features H of ``(B, L, H)``.
        d_state: N.
        channels: M, outputs per feature.
        learn: Train A, B and the steps, too ("LSSL"); otherwise they keep their initial values ("LSSL-fixed"). The
            published layer learns A within a structured class; here A is dense.
        dt_min, dt_max: Range of the initial steps, which are log-uniform.
        drop: Dropout before the projection.
    """

    optim_hints = {
        "A": {"lr": 1e-4, "weight_decay": 0.0},
        "B": {"lr": 1e-4, "weight_decay": 0.0},
        "log_dt": {"lr": 1e-3, "weight_decay": 0.0},
    }

    def __init__(
        self,
        dim: int,
        d_state: int = 64,
        channels: int = 1,
        learn: bool = False,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        drop: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.dt_min, self.dt_max = dt_min, dt_max
        state_space = {"A": (d_state, d_state), "B": (d_state,), "log_dt": (dim,)}
        for name, shape in state_space.items():
            if learn:
                self.register_parameter(name, nn.Parameter(torch.empty(shape, **dd)))
            else:
                self.register_buffer(name, torch.empty(shape, **dd))
        self.C = nn.Parameter(torch.empty(dim, channels, d_state, **dd))
        self.D = nn.Parameter(torch.empty(dim, channels, **dd))
        self.drop = nn.Dropout(drop)
        self.out_proj = nn.Linear(dim * channels, dim, **dd)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        A, B, _ = hippo_legs(self.A.shape[0])
        self.A.copy_(A)
        self.B.copy_(B)
        log_uniform_(self.log_dt, self.dt_min, self.dt_max)
        nn.init.normal_(self.C)
        nn.init.normal_(self.D)

    def kernel(self, length, rate=1.0):
        """``K_l = C dA^l dB``: ``(M, H, length)``."""
        A, B, C, log_dt = (
            t.to(torch.promote_types(t.dtype, torch.float32)) for t in (self.A, self.B, self.C, self.log_dt)
        )
        dt = rate * log_dt.exp()[:, None, None]
        eye = torch.eye(len(A), dtype=A.dtype, device=A.device)
        step = torch.linalg.solve(eye - dt / 2 * A, eye + dt / 2 * A)  # (H, N, N)
        krylov = torch.linalg.solve(eye - dt / 2 * A, dt * B.unsqueeze(-1))  # (H, N, 1)
        while krylov.shape[-1] < length:  # (B, dA B), (.., dA^2 B, dA^3 B), ...
            krylov = torch.cat([krylov, step @ krylov], -1)
            step = step @ step
        return torch.einsum("hmn,hnl->mhl", C, krylov[..., :length])

    def forward(self, u, rate=1.0):
        """``(B, L, H)`` to the same. `rate` multiplies the steps, for inputs with another sampling rate."""
        kernels, D = self.kernel(u.shape[1], rate), self.D.to(u.dtype)
        y = torch.stack([torch.addcmul(fft_conv(u, k), u, D[:, m]) for m, k in enumerate(kernels)], -1)
        return self.out_proj(self.drop(F.gelu(y)).flatten(2))
