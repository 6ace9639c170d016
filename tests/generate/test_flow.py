"""Flow matching: the published values of paths, losses, scores and solvers; guidance; noise."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "backbones"))
from test_parity import PARITY, error, synth  # noqa: E402

pytest.importorskip("torchdiffeq")
from linzoo.generate import flow  # noqa: E402

CASE = json.loads((PARITY / "generation/op_flow_transport.json").read_text())
SHAPE = CASE["inputs"][0]["shape"]


def field(x, t):
    """The case's velocity."""
    t = t.view(-1, 1, 1, 1)
    return (2 * x + 3 * t).sin() - 0.5 * x * (1 - t)


@pytest.fixture
def inputs():
    data, start, predicted, t = (torch.from_numpy(synth.image(i["shape"], i["seed"])) for i in CASE["inputs"])
    return data, start, predicted, t.sigmoid()


def test_parity(inputs):
    data, start, predicted, t = inputs
    found = {}
    kinds = [("velocity", "none"), *((p, w) for p in ("noise", "score") for w in flow.WEIGHTS)]
    for name, path in (("Linear", "linear"), ("GVP", "gvp"), ("VP", "vp")):
        at = flow.path_at(path, t, data)
        found[f"xt_{name}"], found[f"ut_{name}"] = at.mix(data, start), at.velocity(data, start)
        losses = [flow.loss(predicted, data, start, t, path, *kind) for kind in kinds]
        found[f"loss_{name}"] = torch.stack(losses, 1)
        found[f"score_{name}"] = flow.score_of(predicted, found[f"xt_{name}"], t, path)
    for sampler, steps in (("euler", 8), ("midpoint", 4), ("rk4", 4), ("dopri5", 5)):
        found[f"ode_{sampler}"] = flow.flow(field, start, sampler, steps)
    found["sde_euler_no_noise"] = flow.diffuse(field, start, 11, "none")
    for out in CASE["outputs"]:
        assert error(found[out["name"]], out) <= out.get("tolerance", 2e-4), out["name"]


def test_derivatives(inputs):
    """Of all paths, by autograd; each begins in noise and ends in data."""
    for path in flow.PATHS:
        t = torch.linspace(0.01, 0.99, 9, dtype=torch.float64, requires_grad=True)
        at = flow.path_at(path, t)
        for value, derivative in ((at.alpha, at.d_alpha), (at.sigma, at.d_sigma)):
            torch.testing.assert_close(torch.autograd.grad(value.sum(), t, retain_graph=True)[0], derivative)
        start, end = flow.path_at(path, torch.tensor([0.0, 1.0]))[:2]
        assert start[1] == pytest.approx(1) and start[0] < 0.01 and end[0] > 0.99 and end[1] < 1e-3


def test_predictions_agree(inputs):
    """Noise, score and velocity of one sample say the same score and velocity."""
    data, start, _, t = inputs
    for path in flow.PATHS:
        at = flow.path_at(path, t.double(), data)
        x = at.mix(data, start)
        said = {"velocity": at.velocity(data, start), "noise": start.double(), "score": -start / at.sigma}
        for prediction, value in said.items():
            assert flow.loss(value, data, start, t.double(), path, prediction).max() < 1e-12
            args = (value, x, t.double(), path, prediction)
            torch.testing.assert_close(flow.velocity_of(*args), said["velocity"])
            torch.testing.assert_close(flow.score_of(*args), said["score"])


def test_orders_of_convergence():
    """Halving the step halves Euler's error and quarters Heun's."""
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = flow.flow(field, x, "dopri5", atol=1e-10, rtol=1e-10)
    for sampler, ratio in (("euler", 2), ("heun", 4), ("midpoint", 4), ("rk4", 16)):
        errors = [(flow.flow(field, x, sampler, n) - exact).abs().mean() for n in (16, 32)]
        assert 0.7 * ratio < errors[0] / errors[1] < 1.4 * ratio, sampler


def test_gaussian_data():
    """With the exact score of Gaussian data, flow and diffusion end in the data's mean and spread."""
    mean, std = 1.5, 0.5

    def velocity(x, t):
        at = flow.path_at("linear", t, x)
        variance = (at.alpha * std) ** 2 + at.sigma**2
        return at.d_alpha * mean + (at.d_alpha * at.alpha * std**2 + at.d_sigma * at.sigma) / variance * (
            x - at.alpha * mean
        )

    source = torch.Generator().manual_seed(0)
    x = torch.randn(20000, 1, generator=source)
    draw = lambda x: torch.randn(x.shape, generator=source)  # noqa: E731
    for found in (
        flow.flow(velocity, x, "heun", 40, "linear"),
        flow.diffuse(velocity, x, 200, "sigma", path="linear", draw=draw),
        flow.diffuse(velocity, x, 200, "linear", 0.5, path="linear", draw=draw),
    ):
        assert found.mean() == pytest.approx(mean, abs=0.02) and found.std() == pytest.approx(std, abs=0.03)


def test_guidance():
    def model(x, t, y):
        return x * y.view(-1, 1) + t.view(-1, 1)

    x, t, y = torch.ones(2, 3), torch.tensor([0.2, 0.4]), torch.tensor([1, 2])
    given, free = model(x, t, y), model(x, t, y * 0 + 7)
    torch.testing.assert_close(flow.guide(model, y, 7, 3.0)(x, t), free + 3 * (given - free))
    torch.testing.assert_close(flow.guide(model, y, 7, 1.0)(x, t), given)
    s = flow.guide(model, y, 7, 3.0, power=2.0)
    grown = 1 + (1 - torch.cos(torch.pi * (1 - t) ** 2)).view(-1, 1)
    torch.testing.assert_close(s(x, t), free + grown * (given - free))


def test_noise_is_of_each_seed():
    both = flow.noise((2, 3), flow.generators([4, 5]))
    assert torch.equal(both[1:], flow.noise((2, 3), flow.generators([5])))
    assert not torch.equal(both[0], both[1])


def test_times():
    for path, prediction, low, high in (
        ("gvp", "velocity", 0, 1),
        ("gvp", "noise", 1e-3, 0.999),
        ("vp", "score", 0, 1),
    ):
        t = flow.draw_times(1000, path, prediction)
        assert low <= t.min() < 0.02 and 0.98 < t.max() <= high
    assert flow.draw_times(4000, "gvp", lognormal=True).median() == pytest.approx(0.3775, abs=0.03)


def test_bad_arguments(inputs):
    data, start, predicted, t = inputs
    for match, call in (
        (r"path='cosine'; expected one of linear, gvp, vp", lambda: flow.path_at("cosine", t)),
        (
            r"sampler='ddim'; expected one of euler, heun, midpoint, rk4, dopri5",
            lambda: flow.flow(field, start, "ddim"),
        ),
        (r"steps=0; expected 1 at least", lambda: flow.flow(field, start, "euler", 0)),
        (r"prediction='x'; expected", lambda: flow.loss(predicted, data, start, t, prediction="x")),
        (r"weight='x'; expected", lambda: flow.loss(predicted, data, start, t, prediction="noise", weight="x")),
        (r"diffusion='x'; expected one of none", lambda: flow.diffuse(field, start, 3, "x")),
    ):
        with pytest.raises(ValueError, match=match):
            call()
