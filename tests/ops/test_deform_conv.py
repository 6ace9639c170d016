"""deform_conv: the definition by hand, torchvision's, the CPU kernel against the reference, and gradcheck."""

import itertools
import math

import pytest
import torch
from torch.autograd import gradcheck
from torchvision.ops import deform_conv2d

from linzoo.ops import deform_conv, use_backend

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
OPTIONS = (
    dict(),
    dict(stride=2, padding=0),
    dict(padding=2, dilation=2, offset_scale=0.5),
    dict(stride=3, padding=4, dilation=3, offset_scale=1.5),
)


def make_inputs(B=2, H=7, W=9, G=3, D=5, K=3, dtype=torch.float64, spread=1.5, stride=1, padding=1, dilation=1, **_):
    torch.manual_seed(0)
    size = [(n + 2 * padding - dilation * (K - 1) - 1) // stride + 1 for n in (H, W)]
    x = torch.randn(B, H, W, G * D, dtype=torch.float64)
    # Never on the border between two pixels, where slopes jump, and exact in every dtype.
    offset = (spread * torch.randn(B, *size, G, K * K, 2, dtype=torch.float64)).floor()
    offset += torch.randint_like(offset, 1, 4) / 4
    weight = torch.randn(B, *size, G, K * K, dtype=torch.float64)
    return [t.to(dtype).requires_grad_() for t in (x, offset, weight)]


def results(inputs, backend, **options):
    with use_backend(backend):
        y = deform_conv(*inputs, **options)
        torch.manual_seed(1)
        return [y, *torch.autograd.grad(y, inputs, torch.randn_like(y))]


def by_hand(x, offset, weight, stride=1, padding=1, dilation=1, offset_scale=1.0):
    """The docstring's equations, one number at a time."""
    B, H, W, C = x.shape
    _, rows, columns, G, taps = weight.shape
    K = math.isqrt(taps)
    m = dilation * (K - 1) // 2
    y = torch.zeros(B, rows, columns, C, dtype=x.dtype)
    for b, r, c, g, i, j in itertools.product(*map(range, (B, rows, columns, G, K, K))):
        k, group = K * i + j, slice(g * C // G, (g + 1) * C // G)
        X = c * stride - padding + m + offset_scale * (i * dilation - m + offset[b, r, c, g, k, 0].item())
        Y = r * stride - padding + m + offset_scale * (j * dilation - m + offset[b, r, c, g, k, 1].item())
        for px, py in itertools.product((math.floor(X), math.floor(X) + 1), (math.floor(Y), math.floor(Y) + 1)):
            if 0 <= px < W and 0 <= py < H:
                share = (1 - abs(X - px)) * (1 - abs(Y - py)) * weight[b, r, c, g, k]
                y[b, r, c, group] += share * x[b, py, px, group]
    return y


@pytest.mark.parametrize("backend", ("cpu", "reference"))
@pytest.mark.parametrize("options", OPTIONS)
def test_definition(options, backend):
    inputs = [t.detach() for t in make_inputs(H=5, W=6, G=2, D=2, **options)]
    with use_backend(backend):
        torch.testing.assert_close(deform_conv(*inputs, **options), by_hand(*inputs, **options))


def test_equals_torchvision():
    """torchvision's modulated deformable convolution counts taps by row, y first, and mixes channels by a matrix."""
    x, offset, weight = make_inputs(G=3, D=4)
    B, rows, columns, G, taps = weight.shape
    by_row = torch.arange(taps).view(3, 3).t().flatten()
    theirs = deform_conv2d(
        x.permute(0, 3, 1, 2),
        offset[:, :, :, :, by_row].flip(-1).permute(0, 3, 4, 5, 1, 2).reshape(B, -1, rows, columns),
        torch.ones(12, 1, 3, 3, dtype=x.dtype),
        padding=1,
        mask=weight[:, :, :, :, by_row].permute(0, 3, 4, 1, 2).reshape(B, -1, rows, columns),
    )
    torch.testing.assert_close(deform_conv(x, offset, weight), theirs.permute(0, 2, 3, 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("sizes", (dict(), dict(B=1, G=1, D=37), dict(G=8, D=16, H=4, W=3), dict(K=1), dict(K=5, H=11)))
def test_cpu_equals_reference(dtype, options, sizes):
    if sizes.get("H", 7) + 2 * options.get("padding", 1) <= options.get("dilation", 1) * (sizes.get("K", 3) - 1):
        pytest.skip("the map is smaller than the window")
    inputs = make_inputs(dtype=dtype, **sizes, **options)
    ours, expected = results(inputs, "cpu", **options), results(inputs, "reference", **options)
    for name, got, want in zip(["y", "x", "offset", "weight"], ours, expected, strict=True):
        assert got.dtype == want.dtype == dtype and got.shape == want.shape
        assert (got.double() - want.double()).abs().max() <= TOLERANCE[dtype] * want.double().abs().max(), name


def test_slices_of_one_projection():
    x, _, _ = make_inputs(G=3)
    packed = torch.randn(2, 7, 9, 88, dtype=x.dtype, requires_grad=True)  # 7 channels more than 3 groups use
    parts = packed[..., :81].unflatten(-1, (3, 27))
    offset, weight = parts[..., :18].unflatten(-1, (9, 2)), parts[..., 18:]
    for backend in ("cpu", "reference"):
        with use_backend(backend):
            torch.testing.assert_close(
                deform_conv(x, offset, weight), deform_conv(x, *map(torch.clone, (offset, weight)))
            )
    turned = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (x, offset, weight)]
    strided = weight.mT.contiguous().mT
    torch.testing.assert_close(deform_conv(*turned[:2], strided), deform_conv(x, offset, weight))


@pytest.mark.parametrize("backend", ("cpu", "reference"))
def test_points_outside_and_nan(backend):
    x, offset, weight = (t.detach() for t in make_inputs())
    x[:, 0, 0] = float("nan")
    with use_backend(backend):
        assert deform_conv(x, 0 * offset, weight)[:, 2:, 2:].isfinite().all()  # points beyond the border read nothing
        offset[...], x[:, 0, 0] = 1e30, 0
        offset[:, :, :, 1] = float("nan")
        offset[:, :, :, 2] = -float("inf")
        assert (deform_conv(x, offset, weight) == 0).all()
        inputs = [t.requires_grad_() for t in (x, offset, weight)]
        gradients = torch.autograd.grad(deform_conv(*inputs).sum(), inputs)
        assert all((g == 0).all() for g in gradients)


@pytest.mark.parametrize("backend", ("cpu", "reference"))
@pytest.mark.parametrize("options", OPTIONS[:3])
def test_gradcheck(backend, options):
    with use_backend(backend):
        inputs = make_inputs(B=1, H=5, W=4, G=2, D=2, **options)
        assert gradcheck(lambda *t: deform_conv(*t, **options), inputs)


def test_opcheck():
    inputs = make_inputs(dtype=torch.float32)
    torch.library.opcheck(torch.ops.linzoo.deform_conv.default, (*inputs, 1, 1, 1, 1.0))
    detached = [t.detach() for t in inputs]
    dy = torch.randn_like(detached[0])
    torch.library.opcheck(torch.ops.linzoo.deform_conv_backward.default, (dy, *detached, 1, 1, 1, 1.0))


def test_results_do_not_depend_on_threads():
    inputs, threads = make_inputs(B=1, H=33, W=20, G=2, D=20, dtype=torch.float32), torch.get_num_threads()
    try:
        runs = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            runs.append(results(inputs, "cpu"))
    finally:
        torch.set_num_threads(threads)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_empty_batch():
    for got, expected in zip(*(results(make_inputs(B=0), backend) for backend in ("cpu", "reference")), strict=True):
        assert got.shape == expected.shape


def test_compile_export_and_autocast():
    inputs = make_inputs(dtype=torch.float32)
    expected = deform_conv(*inputs)
    torch.testing.assert_close(torch.compile(deform_conv, fullgraph=True, backend="aot_eager")(*inputs), expected)
    with use_backend("export"):
        torch.testing.assert_close(deform_conv(*inputs), expected, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert deform_conv(inputs[0].bfloat16(), *inputs[1:]).dtype == torch.bfloat16


def test_bad_arguments():
    x, offset, weight = make_inputs()
    with pytest.raises(ValueError, match=r"x: expected \(B, H, W, C\), got \(7, 9, 15\)"):
        deform_conv(x[0], offset, weight)
    with pytest.raises(ValueError, match="offset: expected K x K taps, got 8"):
        deform_conv(x, offset[..., :8, :], weight[..., :8])
    with pytest.raises(ValueError, match="3 groups do not divide the 14 channels"):
        deform_conv(x[..., :14], offset, weight)
    with pytest.raises(ValueError, match=r"weight: expected .* = \(2, 7, 9, 3, 9\)"):
        deform_conv(x, offset, weight[:1])
    with pytest.raises(ValueError, match=r"offset: expected \(B, 4, 5, G, K K, 2\)"):
        deform_conv(x, offset, weight, stride=2)
    with pytest.raises(ValueError, match="smaller than the window"):
        deform_conv(x, offset, weight, dilation=9)
    with pytest.raises(ValueError, match="stride, dilation, padding: .* got 0"):
        deform_conv(x, offset, weight, stride=0)
    with pytest.raises(TypeError, match="offset: .*int64"):
        deform_conv(x, offset.long(), weight)
    with pytest.raises(ValueError, match="weight: expected on cpu as x, got meta"):
        deform_conv(x, offset, weight.to("meta"))
