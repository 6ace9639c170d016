"""Group-rational KAN (KAT, arXiv 2409.10594): channel mixers whose activations are learned rational functions."""

import math

import torch
from timm.models._features_fx import register_notrace_module
from torch import nn

from linzoo.ops import rational

# Initial coefficients a_0 .. a_5 and b_1 .. b_4, as published (fitted on [-3, 3]).
INITIAL = {
    "identity": ((0, 1, 0, 0, 0, 0), (0, 0, 0, 0)),
    "swish": (
        (
            *(3.054879741161051e-07, 0.5000007853744493, 0.24999783422824703),
            *(0.05326628273219478, 0.005803034571292244, 0.0002751961022402342),
        ),
        (-4.111554955950634e-06, 0.10652899335007572, -1.2690007399796238e-06, 0.0005502331264140556),
    ),
}
GAIN = {"identity": 1.0, "swish": 2.81076}  # Var[x] / E[F(x)^2] for x ~ N(0, 1)


@register_notrace_module  # FX cannot trace the operator's checks of shapes
class GroupRational(nn.Module):
    """`linzoo.ops.rational` with one numerator ``(1, 6)`` and one denominator per group of channels ``(groups, 4)``.

    Args:
        groups: Number of groups; must divide the channels.
        init: The initial function, 'identity' or 'swish'.
    """

    def __init__(self, groups: int = 8, init: str = "swish", device=None, dtype=None):
        super().__init__()
        if init not in INITIAL:
            raise ValueError(f"init: expected one of {', '.join(INITIAL)}, got {init!r}")
        self.init = init
        self.numerator = nn.Parameter(torch.empty(1, 6, device=device, dtype=dtype))
        self.denominator = nn.Parameter(torch.empty(groups, 4, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        for parameter, values in zip((self.numerator, self.denominator), INITIAL[self.init], strict=True):
            parameter.copy_(torch.tensor(values, dtype=torch.float64, device=parameter.device).expand_as(parameter))

    def forward(self, x):
        return rational(x, self.numerator, self.denominator)


class GRKAN(nn.Module):
    """Channel mixer ``fc2(act2(fc1(act1(x))))`` with rational activations, initially identity and swish.

    The linear maps are initialised to keep the variance: weights of variance gain / fan-in.

    Args:
        in_features: Channels.
        hidden_features: Inner width; None for `in_features`.
        out_features: Channels of the output; None for `in_features`.
        groups: Groups of each activation; the greatest common divisor if they do not divide its channels.
        drop: Dropout after each activation.
        act_layer, norm_layer: Ignored. They are arguments of `timm.layers.Mlp`, which this layer replaces.
        bias: Whether the linear maps have biases.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: type[nn.Module] | None = None,
        norm_layer: type[nn.Module] | None = None,
        bias: bool = True,
        drop: float = 0.0,
        groups: int = 8,
        device=None,
        dtype=None,
    ):
        dd: dict = {"device": device, "dtype": dtype}
        super().__init__()
        hidden_features = hidden_features or in_features
        self.act1 = GroupRational(math.gcd(groups, in_features), "identity", **dd)
        self.fc1 = nn.Linear(in_features, hidden_features, bias=bias, **dd)
        self.act2 = GroupRational(math.gcd(groups, hidden_features), "swish", **dd)
        self.fc2 = nn.Linear(hidden_features, out_features or in_features, bias=bias, **dd)
        self.drop = nn.Dropout(drop)
        self.keep_variance()

    def keep_variance(self):
        """Fills the linear maps."""
        for act, fc in ((self.act1, self.fc1), (self.act2, self.fc2)):
            nn.init.normal_(fc.weight, std=(GAIN[act.init] / fc.in_features) ** 0.5)
            if fc.bias is not None:
                nn.init.zeros_(fc.bias)

    def forward(self, x):
        x = self.fc1(self.drop(self.act1(x)))
        return self.fc2(self.drop(self.act2(x)))
