"""A gradient penalty through whole models: second derivatives, forward mode, and gradients of single images."""

import pytest
import timm
import torch
from torch.func import functional_call, grad, jvp, vmap

import linzoo.backbones  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore:linzoo.ops.* runs on its slow PyTorch reference")
MODELS = {
    "groupmamba_t": dict(depths=(1, 1, 1, 1)),
    "vim_t": dict(depth=2, img_size=64),
    "vmamba_t": dict(depths=(1, 1, 1, 1)),
}


def model_and_image(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, **MODELS[name]).double().eval()
    return model, torch.randn(1, 3, 64, 64, dtype=torch.float64)


@pytest.mark.parametrize("name", MODELS)
def test_gradient_penalty_equals_finite_differences(name):
    """The slope of ``|d logit / d image|^2`` along a direction of the image, and forward mode of the logit."""
    model, image = model_and_image(name)
    direction, h = torch.randn_like(image), 1e-5

    def logit(x):
        return model(x)[:, 0].sum()

    def penalty(x):
        x = x.detach().requires_grad_()
        (g,) = torch.autograd.grad(logit(x), x, create_graph=True)
        return g.square().sum(), x

    value, x = penalty(image)
    (slope,) = torch.autograd.grad(value, x)
    ours = (slope * direction).sum()
    expected = (penalty(image + h * direction)[0] - penalty(image - h * direction)[0]) / (2 * h)
    torch.testing.assert_close(ours, expected.detach(), rtol=1e-6, atol=0)

    (g,) = torch.autograd.grad(logit(x), x)
    forward = jvp(logit, (image,), (direction,))[1]
    torch.testing.assert_close(forward, (g * direction).sum(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_single_images(name):
    model, _ = model_and_image(name)
    images, weights = torch.randn(2, 3, 64, 64, dtype=torch.float64), dict(model.named_parameters())

    def loss(weights, image):
        return functional_call(model, weights, (image[None],)).square().sum()

    ours = vmap(grad(loss), (None, 0))(weights, images)
    for i, image in enumerate(images):
        expected = torch.autograd.grad(loss(weights, image), list(weights.values()), allow_unused=True)
        for (key, a), b in zip(ours.items(), expected, strict=True):
            torch.testing.assert_close(
                a[i], torch.zeros_like(a[i]) if b is None else b, msg=lambda m, key=key: f"{key}: {m}"
            )
