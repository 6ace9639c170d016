"""Flow matching: paths from noise to data, losses, solvers, guidance.

Ma, Goldstein, Albergo, Boffi, Vanden-Eijnden, Xie, "SiT: Exploring Flow and Diffusion-based Generative Models with
Scalable Interpolant Transformers" - https://arxiv.org/abs/2401.08740

A sample goes from noise x_0 at t = 0 to data x_1 at t = 1: ``x_t = alpha(t) x_1 + sigma(t) x_0``.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["PATHS", "SAMPLERS", "Path", "diffuse", "flow", "guide", "loss", "noise", "score_of", "velocity_of"]

Model = Callable[[Tensor, Tensor], Tensor]  # from x and t to the prediction


class Path(NamedTuple):
    """alpha and sigma at times, and their derivatives."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor

    @property
    def rate(self) -> Tensor:
        """``alpha' / alpha``."""
        return self.d_alpha / self.alpha

    @property
    def diffusion(self) -> Tensor:
        """``(alpha' / alpha) sigma^2 - sigma sigma'``, called d in the losses' weights."""
        return self.rate * self.sigma**2 - self.sigma * self.d_sigma

    def mix(self, data: Tensor, start: Tensor) -> Tensor:
        """x_t between data x_1 and noise x_0."""
        return self.alpha * data + self.sigma * start

    def velocity(self, data: Tensor, start: Tensor) -> Tensor:
        """The derivative of x_t."""
        return self.d_alpha * data + self.d_sigma * start


def linear(t: Tensor) -> Path:
    """alpha = t, sigma = 1 - t."""
    return Path(t, 1 - t, torch.ones_like(t), -torch.ones_like(t))


def gvp(t: Tensor) -> Path:
    """alpha = sin(pi t / 2), sigma = cos(pi t / 2)."""
    quarter = math.pi / 2
    sin, cos = (quarter * t).sin(), (quarter * t).cos()
    return Path(sin, cos, quarter * cos, -quarter * sin)


def vp(t: Tensor) -> Path:
    """alpha = exp(m), m = -(1 - t)^2 19.9 / 4 - (1 - t) / 20, and sigma^2 = 1 - alpha^2: rates from 0.1 to 20."""
    m = -((1 - t) ** 2) * 19.9 / 4 - (1 - t) * 0.05
    half = ((1 - t) * 19.9 + 0.1) / 2
    alpha, sigma = m.exp(), (1 - (2 * m).exp()).sqrt()
    return Path(alpha, sigma, half * alpha, -half * alpha**2 / sigma)


PATHS: dict[str, Callable[[Tensor], Path]] = {"linear": linear, "gvp": gvp, "vp": vp}
PREDICTIONS = ("velocity", "noise", "score")
WEIGHTS = ("none", "velocity", "likelihood")
# Names of solvers, here and in torchdiffeq; those below need no number of steps.
SAMPLERS = {"euler": "euler", "heun": "heun2", "midpoint": "midpoint", "rk4": "rk4", "dopri5": "dopri5"}
ADAPTIVE = ("dopri5",)


def _check(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{name}={value!r}; expected one of {', '.join(known)}")


def path_at(path: str, t: Tensor, like: Tensor | None = None) -> Path:
    """A path at times ``(B,)``, for tensors of the shape of `like`; ValueError if there is no such path."""
    _check("path", path, tuple(PATHS))
    return PATHS[path](t if like is None else t.view(-1, *[1] * (like.dim() - 1)))


def draw_times(count: int, path: str, prediction: str = "velocity", lognormal: bool = False, device=None) -> Tensor:
    """Times to train at ``(count,)``: uniform, or ``sigmoid(N(-0.5, 1))``, away from ends where weights diverge."""
    first, last = (0.0, 1.0) if prediction == "velocity" else (0.0, 1 - 1e-5) if path == "vp" else (1e-3, 1 - 1e-3)
    t = (torch.randn(count, device=device) - 0.5).sigmoid() if lognormal else torch.rand(count, device=device)
    return first + (last - first) * t


def loss(
    predicted: Tensor, data: Tensor, start: Tensor, t: Tensor, path: str = "gvp", prediction: str = "velocity",
    weight: str = "none",
) -> Tensor:  # fmt: skip
    """The loss of each sample ``(B,)``: the mean of w times a squared error.

    With prediction "velocity" the error is ``v - (alpha' x_1 + sigma' x_0)``; with "noise" ``n - x_0``, with "score"
    ``s sigma + x_0``. For the last two, w is 1 ("none"), ``(d / sigma)^2`` ("velocity") or ``d / sigma^2``
    ("likelihood").

    Args:
        predicted: The model's output at ``x_t`` ``(B, ...)``.
        data, start: x_1 and the noise x_0.
        t: Times ``(B,)``.

    Raises:
        ValueError: there is no such path, prediction or weight.
    """
    _check("prediction", prediction, PREDICTIONS)
    _check("weight", weight, WEIGHTS)
    at = path_at(path, t, data)
    if prediction == "velocity":
        return (predicted - at.velocity(data, start)).square().flatten(1).mean(1)
    w = {"none": 1.0, "velocity": (at.diffusion / at.sigma) ** 2, "likelihood": at.diffusion / at.sigma**2}[weight]
    error = predicted - start if prediction == "noise" else predicted * at.sigma + start
    return (w * error.square()).flatten(1).mean(1)


def score_of(predicted: Tensor, x: Tensor, t: Tensor, path: str = "gvp", prediction: str = "velocity") -> Tensor:
    """The score (the gradient of the log-density) at x, from any prediction."""
    at = path_at(path, t, x)
    if prediction == "velocity":
        ratio = at.alpha / at.d_alpha
        return (ratio * predicted - x) / (at.sigma**2 - ratio * at.d_sigma * at.sigma)
    return predicted if prediction == "score" else -predicted / at.sigma


def velocity_of(predicted: Tensor, x: Tensor, t: Tensor, path: str = "gvp", prediction: str = "velocity") -> Tensor:
    """``dx/dt`` at x, from any prediction."""
    if prediction == "velocity":
        return predicted
    at = path_at(path, t, x)
    return at.rate * x + at.diffusion * score_of(predicted, x, t, path, prediction)


def _grid(x: Tensor, first: float, last: float, steps: int) -> Tensor:
    if steps < 1:
        raise ValueError(f"steps={steps}; expected 1 at least")
    return torch.linspace(first, last, steps + 1, device=x.device, dtype=torch.float32)


def flow(
    model: Model, x: Tensor, sampler: str = "dopri5", steps: int = 50, path: str = "gvp", prediction: str = "velocity",
    atol: float = 1e-6, rtol: float = 1e-3,
) -> Tensor:  # fmt: skip
    """Noise to data along ``dx/dt = v(x, t)`` from t = 0 to 1, by torchdiffeq.

    Args:
        model: From x ``(B, ...)`` and t ``(B,)`` to the prediction.
        x: Noise.
        sampler: One of `SAMPLERS`. "dopri5" chooses its steps by the error of the whole batch, so a sample depends on
            the others in it, within the tolerance.
        steps: Number of steps of equal length; "dopri5" chooses its own.
        atol, rtol: Tolerances of "dopri5".

    Raises:
        ValueError: there is no such sampler, or `steps` is not positive.
    """
    from torchdiffeq import odeint

    _check("sampler", sampler, tuple(SAMPLERS))
    grid = _grid(x, 0.0, 1.0, 1 if sampler in ADAPTIVE else steps)
    if prediction != "velocity":
        grid = grid.clamp(1e-3, 1 - 1e-3)

    def derivative(t: Tensor, x: Tensor) -> Tensor:
        t = t.to(x.dtype).expand(len(x))
        return velocity_of(model(x, t), x, t, path, prediction)

    found: Any = odeint(derivative, x, grid, method=SAMPLERS[sampler], atol=atol, rtol=rtol)
    return found[-1]


DIFFUSIONS: dict[str, Callable[[Tensor, Path], Tensor]] = {
    "none": lambda t, at: torch.zeros_like(t),
    "constant": lambda t, at: torch.ones_like(t),
    "sbdm": lambda t, at: 2 * at.diffusion,
    "sigma": lambda t, at: at.sigma,
    "linear": lambda t, at: 1 - t,
    "decreasing": lambda t, at: ((math.pi * t).cos() + 1) ** 2 / 4,
    "increasing": lambda t, at: (math.pi * t).sin() ** 2,
}


def diffuse(
    model: Model, x: Tensor, steps: int = 250, diffusion: str = "sigma", norm: float = 1.0, last: float = 0.04,
    path: str = "gvp", prediction: str = "velocity", draw: Callable[[Tensor], Tensor] = torch.randn_like,
) -> Tensor:  # fmt: skip
    """Noise to data along ``dx = (v + g score) dt + sqrt(2 g) dW``, by Euler and Maruyama.

    Args:
        model, x: As in `flow`.
        steps: Number of steps before the last.
        diffusion: The form of g, one of `DIFFUSIONS`; multiplied by `norm`.
        last: Size of the last step, which takes the mean: no noise is added.
        draw: Returns noise of its argument's shape.

    Raises:
        ValueError: there is no such form, or `steps` is not positive.
    """
    _check("diffusion", diffusion, tuple(DIFFUSIONS))
    first = 1e-3 if diffusion == "sbdm" or prediction != "velocity" else 0.0
    grid = _grid(x, first, 1 - last, steps)

    def drift(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        t = t.to(x.dtype).expand(len(x))
        said, at = model(x, t), path_at(path, t, x)
        g = norm * DIFFUSIONS[diffusion](t.view(-1, *[1] * (x.dim() - 1)), at)
        v = velocity_of(said, x, t, path, prediction)
        return (v if diffusion == "none" else v + g * score_of(said, x, t, path, prediction)), g

    for t, after in zip(grid[:-1], grid[1:], strict=True):
        step = after - t
        v, g = drift(x, t)
        x = x + v * step + (2 * g * step).sqrt() * draw(x)
    return x + drift(x, grid[-1])[0] * last


def guide(
    model: Callable[[Tensor, Tensor, Tensor], Tensor], y: Tensor, null: int, scale: float, power: float | None = None
) -> Model:
    """Classifier-free guidance: ``v_null + s (v_y - v_null)``, both in one batch.

    Args:
        model: From x, t and classes to the prediction.
        y: Classes ``(B,)``.
        null: The class that means no class.
        scale: s; 1 for no guidance.
        power: With a number p, s grows from 1 over time: ``(s - 1) (1 - cos(pi (1 - t)^p)) / 2 + 1``.
    """
    if scale == 1:
        return lambda x, t: model(x, t, y)

    def guided(x: Tensor, t: Tensor) -> Tensor:
        both = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, torch.full_like(y, null)]))
        given, free = both.chunk(2)
        s = scale
        if power is not None:
            s = (scale - 1) * (1 - (math.pi * (1 - t) ** power).cos()) / 2 + 1
            s = s.view(-1, *[1] * (x.dim() - 1))
        return free + s * (given - free)

    return guided


def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One generator per sample, on the CPU. A sample depends only on its seed, on any device and in any batch."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def noise(shape: Sequence[int], sources: Sequence[torch.Generator], device=None) -> Tensor:
    """Normal noise ``(len(sources), *shape)``, each sample from its own generator."""
    return torch.stack([torch.randn(tuple(shape), generator=source) for source in sources]).to(device)
