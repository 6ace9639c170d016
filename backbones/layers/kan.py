"""KANs with a learned function on every edge, and the channel mixers by name.

Kolmogorov-Arnold networks (arXiv 2404.19756) put a function of one variable between every input and every output; it is
linear in its coefficients. `GRKAN` shares its functions among channels instead, and costs as much as an MLP.
"""

from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import nn

from .grkan import GRKAN


def b_splines(x, grid, order, low=-1.0, high=1.0):
    """The B-splines of `order` on `grid` equal intervals of [low, high]: ``(..., grid + order)``, summing to 1 there.

    They are 0 from a distance of `order` intervals outside.
    """
    t = (x.unsqueeze(-1) - low) * (grid / (high - low)) + order  # in units of intervals, from the first knot
    u = t - torch.arange(grid + 2 * order, dtype=t.dtype, device=t.device)  # from each spline's first knot
    basis = ((u >= 0) & (u < 1)).to(t.dtype)
    for degree in range(1, order + 1):  # Cox and de Boor's recursion on equal knots
        u = u[..., :-1]
        basis = (u * basis[..., :-1] + (degree + 1 - u) * basis[..., 1:]) / degree
    return basis


class BSplineLinear(nn.Module):
    """``y_o = sum_i w_oi SiLU(x_i) + sum_ig c_oig B_g(x_i)``: KAN's layer (arXiv 2404.19756, eq. 2.10).

    Args:
        in_features: Inputs.
        out_features: Outputs.
        grid: Intervals of [-1, 1]; outside, only the first sum remains.
        order: Degree of the splines.
    """

    def __init__(self, in_features: int, out_features: int, grid: int = 5, order: int = 3, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.grid, self.order = grid, order
        self.base = nn.Linear(in_features, out_features, bias=False, **dd)
        self.spline = nn.Parameter(torch.empty(out_features, in_features, grid + order, **dd))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.kaiming_uniform_(self.base.weight, nonlinearity="linear")
        nn.init.normal_(self.spline, std=0.1 * self.base.in_features**-0.5)

    def forward(self, x):
        basis = b_splines(x.to(torch.promote_types(x.dtype, torch.float32)), self.grid, self.order)
        return self.base(F.silu(x)) + F.linear(basis.flatten(-2).to(x.dtype), self.spline.flatten(1))


class FourierLinear(nn.Module):
    """``y_o = b_o + sum_ig a_oig cos(g x_i) + b_oig sin(g x_i)`` for g = 1 .. grid: the layer of the Fourier KAN.

    Args:
        in_features: Inputs.
        out_features: Outputs.
        grid: Frequencies.
    """

    def __init__(self, in_features: int, out_features: int, grid: int = 5, device=None, dtype=None):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, 2, grid, **dd))
        self.bias = nn.Parameter(torch.empty(out_features, **dd))
        self.reset_parameters()

    def reset_parameters(self):
        """Starts with smooth functions: amplitudes fall with the frequency; the variance is that of the inputs."""
        frequencies = torch.arange(1, self.weight.shape[-1] + 1, device=self.weight.device)
        nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)
        with torch.no_grad():
            self.weight.div_(frequencies)
        nn.init.zeros_(self.bias)

    def forward(self, x):
        frequencies = torch.arange(1, self.weight.shape[-1] + 1, device=x.device)
        angles = x.to(torch.promote_types(x.dtype, torch.float32)).unsqueeze(-1) * frequencies
        basis = torch.stack([angles.cos(), angles.sin()], -2).to(x.dtype)
        return F.linear(basis.flatten(-3), self.weight.flatten(1), self.bias)


class KAN(nn.Module):
    """Two layers of functions on edges, ``fc2(fc1(x))``, as a replacement for `timm.layers.Mlp`.

    With a grid of 5, an edge has 9 (B-splines) or 10 (Fourier) coefficients instead of a linear map's one.

    Args:
        in_features: Channels.
        hidden_features: Inner width; None for `in_features`.
        out_features: Channels of the output; None for `in_features`.
        layer: 'bspline' or 'fourier'.
        grid: Intervals or frequencies.
        drop: Dropout after each layer.
        act_layer, norm_layer, bias: Ignored: they are arguments of `timm.layers.Mlp`.
    """

    LAYERS = {"bspline": BSplineLinear, "fourier": FourierLinear}

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: type[nn.Module] | None = None,
        norm_layer: type[nn.Module] | None = None,
        bias: bool = True,
        drop: float = 0.0,
        layer: str = "bspline",
        grid: int = 5,
        device=None,
        dtype=None,
    ):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        if layer not in self.LAYERS:
            raise ValueError(f"layer: expected one of {', '.join(self.LAYERS)}, got {layer!r}")
        hidden_features = hidden_features or in_features
        self.fc1 = self.LAYERS[layer](in_features, hidden_features, grid=grid, **dd)
        self.fc2 = self.LAYERS[layer](hidden_features, out_features or in_features, grid=grid, **dd)
        self.drop = nn.Dropout(drop)

    def forward(self, x):
        return self.drop(self.fc2(self.drop(self.fc1(x))))


CHANNEL_MIXERS = {
    "mlp": Mlp,
    "grkan": GRKAN,
    "bspline_kan": partial(KAN, layer="bspline"),
    "fourier_kan": partial(KAN, layer="fourier"),
}


def channel_mixer(name):
    """The channel mixer `name`: mlp, grkan, bspline_kan or fourier_kan. All take the arguments of `timm.layers.Mlp`.

    Raises:
        ValueError: there is none with that name.
    """
    if name not in CHANNEL_MIXERS:
        raise ValueError(f"mlp: expected one of {', '.join(CHANNEL_MIXERS)}, got {name!r}")
    return CHANNEL_MIXERS[name]
