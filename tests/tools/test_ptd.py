"""Perturb-then-diagonalise does what its paper claims: it stands a Fourier mode that throws S4D far off."""

import pytest
import torch

from linzoo.backbones.layers import hippo
from linzoo.tools import ptd


def test_a_fourier_mode_breaks_s4d_but_not_ptd():
    _, _, found = ptd.errors(16, steps=20000)
    for diagonal, perturbed in (("S4D-LegS", "S4-PTD"), ("S5", "S5-PTD")):
        assert found[diagonal][1] > 10 * found[diagonal][0]
        assert found[perturbed][1] < 1.5 * found[perturbed][0]
        assert found[diagonal][1] > 10 * found[perturbed][1]
        assert found[perturbed][0] < 0.5
    assert found["S4D-LegS"] == pytest.approx(found["S5"], rel=1e-6)
    assert found["S4-PTD"] == pytest.approx(found["S5-PTD"], rel=1e-6)


@pytest.mark.parametrize("size", (8, 16))
def test_the_bound_holds(size):
    """For a small E and a C of unit norm the transfer function moves by (2 ln N + 4) |E| at most."""
    A, B, P = hippo.hippo_legs(size)
    _, _, E = hippo.perturb_then_diagonalise(size)
    C = torch.nn.functional.normalize(torch.randn(size, dtype=torch.float64), dim=0)
    omega = torch.logspace(-1, 4, 500, dtype=torch.float64)
    exact = hippo.transfer(A, B, C, omega)
    off = (hippo.transfer(A + 1e-3 * E, B, C, omega) - exact).abs().max()
    norm = torch.linalg.matrix_norm(1e-3 * E, 2)
    assert off <= (2 * torch.log(torch.tensor(size)) + 4) * norm
    spikes = (hippo.transfer(A + torch.outer(P, P), B / 2, C, omega) - exact).abs().max()
    assert spikes > 10 * off


def test_table(capsys):
    ptd.main(["--states", "8"])
    out = capsys.readouterr().out
    assert "S4D-LegS" in out and "S5-PTD" in out
