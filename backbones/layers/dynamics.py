"""Refinements of selective scans based on token dynamics (arXiv 2410.03292): signs of the state, sorted tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .s6 import S6

SIGNS = ("positive", "negative", "mixed")


class DefiniteProjection(nn.Module):
    """Maps a raw weight X ``(..., R + 2 N, I)`` of `S6` to one whose ``S_C^T S_B`` has eigenvalues of one sign.

    With U the strictly upper triangle of rows R to R + N of X, plus 1 on the diagonal::

        S_D = X[:R],    S_C = U,    S_B = diag(lambda) U,    l = softplus(X[R + N:, 0])
        lambda = l + threshold (positive),  -l - threshold (negative),  l for half of the rows and -l below (mixed)

    so that ``S_C^T S_B = U^T diag(lambda) U``. Tokens that follow the recurrence through depth collapse to 0 if all
    eigenvalues are negative, and diverge if one is positive. Other entries of X have no effect.
    """

    def __init__(self, rank: int, d_state: int, sign: str = "positive", threshold: float = 0.7):
        super().__init__()
        self.rank, self.d_state, self.sign, self.threshold = rank, d_state, sign, threshold

    def forward(self, raw: Tensor) -> Tensor:
        step, upper, scale = raw.split([self.rank, self.d_state, self.d_state], -2)
        scale = F.softplus(scale[..., :1])
        if self.sign == "mixed":
            up = torch.arange(self.d_state, device=raw.device) < self.d_state // 2
            scale = torch.where(up.unsqueeze(1), scale, -scale)
        else:
            scale = scale + self.threshold if self.sign == "positive" else -scale - self.threshold
        upper = upper.triu(1) + torch.eye(*upper.shape[-2:], dtype=raw.dtype, device=raw.device)
        return torch.cat([step, scale * upper, upper], -2)


def definite_projection(model: nn.Module, sign: str = "positive", threshold: float = 0.7) -> nn.Module:
    """Gives every `S6` of `model` a `DefiniteProjection`; its present weights become the raw ones.

    The state dict then holds ``parametrizations.x_proj.original`` instead of ``x_proj``. For export,
    `torch.nn.utils.parametrize.remove_parametrizations` turns it back into a plain weight.

    Args:
        model: An `S6`, or a model with some, such as VMamba or Vim.
        sign: "positive" excludes the convergent scenario, as the paper proposes; "negative" enforces it; "mixed".
        threshold: Least distance of the eigenvalues' factors from 0.

    Returns:
        `model`.

    Raises:
        ValueError: `model` has no S6; an S6 has more states than channels, or already has a parametrisation; or there
            is no such sign.
    """
    if sign not in SIGNS:
        raise ValueError(f"sign: expected one of {', '.join(SIGNS)}, got {sign!r}")
    layers = scans_of(model)
    for name, layer in layers.items():
        if layer.d_state > layer.x_proj.shape[-1]:
            raise ValueError(
                f"model: {name!r} has {layer.d_state} states and reads {layer.x_proj.shape[-1]} channels; expected "
                "no more states than channels"
            )
        if parametrize.is_parametrized(layer, "x_proj"):
            raise ValueError(f"model: {name!r} has a parametrised x_proj already; expected a plain weight")
    for layer in layers.values():
        projection = DefiniteProjection(layer.dt_rank, layer.d_state, sign, threshold)
        parametrize.register_parametrization(layer, "x_proj", projection)
    return model


def scans_of(model: nn.Module) -> dict[str, S6]:
    """The `S6` layers of a model by name; ValueError if it has none."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, S6)}
    if not layers:
        raise ValueError(
            f"model: {type(model).__name__} has no selective scan (S6); expected a Mamba, such as vmamba_t"
        )
    return layers


@torch.no_grad()
def state_eigenvalues(layer: S6) -> Tensor:
    """The N eigenvalues of ``S_C^T S_B``, of rank N, that are not 0, per group: complex ``(G, N)``, in float64."""
    _, B, C = layer.x_proj.double().split([layer.dt_rank, layer.d_state, layer.d_state], 1)
    return torch.linalg.eigvals(B @ C.mT)


class SoftSort(nn.Module):
    """A soft permutation into increasing order (SoftSort, arXiv 2006.16038).

    ``P_{kl} = softmax_l(-|s_l - s_(k)| / tau)`` for scores s, with s_(k) the k-th smallest. If scores are farther apart
    than `tau`, row k is nearly one-hot at the token of rank k.

    Args:
        tau: Temperature.
        hard: Whether the rows are one-hot, with the gradient of the soft ones.
    """

    def __init__(self, tau: float = 1.0, hard: bool = False):
        super().__init__()
        if not tau > 0:
            raise ValueError(f"tau: expected a positive number, got {tau!r}")
        self.tau, self.hard = tau, hard

    def forward(self, scores: Tensor) -> Tensor:
        """Scores ``(..., L)`` to P ``(..., L, L)``: ``P @ x`` are the tokens x in increasing order."""
        ordered = scores.sort(-1).values.unsqueeze(-1)
        soft = torch.softmax(-(scores.unsqueeze(-2) - ordered).abs() / self.tau, -1)
        if not self.hard:
            return soft
        return F.one_hot(soft.argmax(-1), soft.shape[-1]).to(soft.dtype) + (soft - soft.detach())

    @staticmethod
    def order(scores: Tensor) -> Tensor:
        """The hard permutation as a scan order for `S6` and similar: scores ``(B, G, L)`` to integers ``(B, G, L)``.

        It takes time L log L, without the L x L matrix. The scores get no gradient.
        """
        return scores.argsort(dim=-1, stable=True).int()
