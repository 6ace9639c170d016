"""Every operator inside a function that `torch.compile` turns into C++: values and gradients are eager's."""

import pytest
import torch
from test_derivatives import CASES

pytestmark = pytest.mark.filterwarnings("ignore:linzoo.ops.* runs on its slow PyTorch reference")


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_inductor(name):
    run, inputs = CASES[name]()
    names, tensors = list(inputs), [x.float().requires_grad_() for x in inputs.values()]

    def fused(first, *rest):  # code of inductor's own stands before and behind the operator
        return torch.tanh(run(**dict(zip(names, (first * 1.5, *rest), strict=True))))

    torch.compiler.reset()
    compiled = torch.compile(fused, fullgraph=True)
    results = [(y, torch.autograd.grad(y.square().sum(), tensors)) for y in (compiled(*tensors), fused(*tensors))]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
