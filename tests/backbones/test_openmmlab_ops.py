"""mmcv's operators on torchvision's (and compiled ones, where there are) against their definitions; mmdet's models."""

import importlib
import itertools
import re
import subprocess
import sys
import textwrap
import types

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("mmdet")

from linzoo.backbones import openmmlab_ops  # noqa: E402

SERVE = openmmlab_ops.stand_in()
import mmcv.ops  # noqa: E402
from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction  # noqa: E402

COMPILED = importlib.import_module("mmcv._ext") if SERVE.startswith("mmcv") else None
ON_GPU_ALONE = ("roi_pool", "focal", "ms_deform")
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])]


@pytest.fixture(params=["torchvision"] if COMPILED is None else ["torchvision", "compiled"], autouse=True)
def operators(request, monkeypatch):
    """The module that mmcv calls: the one on torchvision's operators; the compiled one, too, where there is one."""
    module = openmmlab_ops.module("on torchvision's") if request.param == "torchvision" else COMPILED
    device = request.node.callspec.params.get("device", "cpu")
    if module is COMPILED and device == "cpu" and any(name in request.node.name for name in ON_GPU_ALONE):
        pytest.skip("mmcv compiles this operator for CUDA alone")
    for name, user in list(sys.modules.items()):
        if name.startswith("mmcv.ops.") and hasattr(user, "ext_module"):
            monkeypatch.setattr(user, "ext_module", module)
    return module


def close(ours, theirs, tolerance=1e-5):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, check_dtype=False)


def assert_gradients(function, definition, inputs):
    """Value and every gradient of a function against those of its definition, for a gradient of mixed sign."""
    inputs = [x.requires_grad_() for x in inputs]
    ours, theirs = function(*inputs), definition(*inputs)
    close(ours, theirs)
    grad = torch.randn_like(theirs)
    for got, expected in zip(
        torch.autograd.grad(ours, inputs, grad), torch.autograd.grad(theirs, inputs, grad), strict=True
    ):
        close(got, expected, 1e-4)


# --- boxes ----------------------------------------------------------------------------------------------------------


def some_boxes(count=40, device="cpu"):
    torch.manual_seed(0)
    corner, size = torch.rand(count, 2) * 60, torch.rand(count, 2) * 40 + 2
    return torch.cat([corner, corner + size], 1).to(device), torch.rand(count).to(device)


def iou(a, b, offset=0):
    area = lambda box: (box[2] - box[0] + offset) * (box[3] - box[1] + offset)  # noqa: E731
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]) + offset)
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]) + offset)
    return width * height / (area(a) + area(b) - width * height)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("offset", [0, 1])
def test_nms(offset, device):
    boxes, scores = some_boxes(device=device)
    kept = []
    for i in scores.argsort(descending=True).tolist():
        if all(iou(boxes[i].tolist(), boxes[j].tolist(), offset) <= 0.3 for j in kept):
            kept.append(i)
    dets, found = mmcv.ops.nms(boxes, scores, 0.3, offset=offset)
    assert found.tolist() == kept and 5 < len(kept) < 35
    assert dets.equal(torch.cat([boxes, scores[:, None]], 1)[found])
    _, best = mmcv.ops.nms(boxes, scores, 0.3, offset=offset, score_threshold=0.5, max_num=3)
    assert best.tolist() == [i for i in kept if scores[i] > 0.5][:3]
    assert mmcv.ops.nms(boxes[:0], scores[:0], 0.3)[1].tolist() == []


def test_batched_nms_keeps_classes_apart():
    boxes, scores = some_boxes(20)
    labels = torch.arange(20) % 2
    _, found = mmcv.ops.batched_nms(boxes, scores, labels, dict(type="nms", iou_threshold=0.3))
    apart = torch.cat(
        [i[mmcv.ops.nms(boxes[i], scores[i], 0.3)[1]] for i in (torch.arange(0, 20, 2), torch.arange(1, 20, 2))]
    )
    assert sorted(found.tolist()) == sorted(apart.tolist())


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("method", ["naive", "linear", "gaussian"])
def test_soft_nms(method, offset):
    boxes, scores = some_boxes(25)
    left, expected = {i: float(score) for i, score in enumerate(scores)}, []
    while left:
        best = max(left, key=left.get)
        expected.append((best, left.pop(best)))
        for i in list(left):
            shared = iou(boxes[i].tolist(), boxes[best].tolist(), offset)
            if method == "gaussian":
                left[i] *= float(torch.tensor(-(shared**2) / 0.5).exp())
            elif shared >= 0.3:
                left[i] *= 0 if method == "naive" else 1 - shared
            if left[i] < 0.05:
                del left[i]
    dets, found = mmcv.ops.soft_nms(boxes, scores, 0.3, 0.5, 0.05, method, offset)
    assert found.tolist() == [i for i, _ in expected] and len(expected) < 25
    close(dets[:, 4], torch.tensor([score for _, score in expected]))
    assert dets[:, :4].equal(boxes[found])


def test_nms_match():
    boxes, scores = some_boxes(25)
    groups, left = [], scores.argsort(descending=True).tolist()
    while left:
        best, *others = left
        same = [i for i in others if iou(boxes[i].tolist(), boxes[best].tolist()) >= 0.3]
        groups.append([best, *same])
        left = [i for i in others if i not in same]
    found = mmcv.ops.nms_match(torch.cat([boxes, scores[:, None]], 1), 0.3)
    assert [group.tolist() for group in found] == groups and max(map(len, groups)) > 2


# --- regions of interest --------------------------------------------------------------------------------------------


def bilinear(x, rows, columns):
    """Samples of ``(C, H, W)`` at real places; coordinates are cut at the border pixels' centres."""
    height, width = x.shape[1:]
    y, x0 = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
    top, left = y.floor().clamp(max=height - 1).long(), x0.floor().clamp(max=width - 1).long()
    bottom, right = (top + 1).clamp(max=height - 1), (left + 1).clamp(max=width - 1)
    dy, dx = y - top, x0 - left
    upper = x[:, top, left] * (1 - dx) + x[:, top, right] * dx
    lower = x[:, bottom, left] * (1 - dx) + x[:, bottom, right] * dx
    inside = (rows >= -1) & (rows <= height) & (columns >= -1) & (columns <= width)
    return (upper * (1 - dy) + lower * dy) * inside


def roi_align(x, rois, size, scale, ratio, aligned):
    out = []
    for image, *corners in rois.tolist():
        x1, y1, x2, y2 = (corner * scale - 0.5 * aligned for corner in corners)
        width, height = x2 - x1, y2 - y1
        if not aligned:
            width, height = max(width, 1.0), max(height, 1.0)
        across, down = (ratio or -int(-side // count) for side, count in ((width, size[1]), (height, size[0])))
        step = lambda start, side, count, n: start + side / count * (torch.arange(count * n) + 0.5) / n  # noqa: E731
        rows, columns = torch.meshgrid(
            step(y1, height, size[0], down).to(x), step(x1, width, size[1], across).to(x), indexing="ij"
        )
        out.append(F.avg_pool2d(bilinear(x[int(image)], rows, columns), (down, across)))
    return torch.stack(out)


ROIS = torch.tensor([[0, 3.0, 4, 40, 50], [1, -6, 2, 30, 18], [1, 20, 30, 26, 34], [0, 50, 40, 90, 70]])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("ratio", [0, 2])
def test_roi_align(ratio, aligned, device):
    torch.manual_seed(0)
    x, rois = torch.randn(2, 3, 14, 20, device=device), ROIS.to(device)
    assert_gradients(
        lambda x: mmcv.ops.roi_align(x, rois, (3, 4), 0.25, ratio, "avg", aligned),
        lambda x: roi_align(x, rois, (3, 4), 0.25, ratio, aligned),
        [x],
    )
    assert mmcv.ops.RoIAlign(7, 0.25)(x, rois[:0]).shape == (0, 3, 7, 7)


@pytest.mark.parametrize("device", DEVICES)
def test_roi_pool(device):
    """The maximum of the pixels that a bin touches; a region ends one pixel after its last corner."""

    def definition(x):
        out = x.new_zeros(len(rois), 3, 3, 4)
        for n, (image, x1, y1, x2, y2) in enumerate(rois.tolist()):
            for i, j in itertools.product(range(3), range(4)):
                edges = lambda a, b, k, count: torch.tensor([a + (b - a) * k / count, a + (b - a) * (k + 1) / count])  # noqa: E731
                rows, columns = edges(y1 / 4, (y2 + 1) / 4, i, 3), edges(x1 / 4, (x2 + 1) / 4, j, 4)
                top, left = int(rows[0].floor().clamp(0, 14)), int(columns[0].floor().clamp(0, 20))
                bottom, right = int(rows[1].ceil().clamp(0, 14)), int(columns[1].ceil().clamp(0, 20))
                if bottom > top and right > left:
                    out[n, :, i, j] = x[int(image), :, top:bottom, left:right].amax((1, 2))
        return out

    torch.manual_seed(0)
    rois = torch.cat([ROIS, torch.tensor([[0, 200.0, 200, 220, 220]])]).to(device)
    assert_gradients(
        lambda x: mmcv.ops.roi_pool(x, rois, (3, 4), 0.25), definition, [torch.randn(2, 3, 14, 20, device=device)]
    )


# --- focal losses ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("gamma", [2.0, 1.5, 0.0])
def test_sigmoid_focal_loss(gamma, weighted, device):
    torch.manual_seed(0)
    logits, target = torch.randn(12, 5, device=device) * 3, torch.randint(5 if weighted else 6, (12,), device=device)
    weight = torch.rand(5, device=device) if weighted else None

    def definition(x):
        p, hit = x.sigmoid(), F.one_hot(target, 6)[:, :5].bool()
        loss = torch.where(hit, -0.25 * (1 - p) ** gamma * p.log(), -0.75 * p**gamma * (1 - p).log())
        return (loss * weight[target][:, None] if weighted else loss).sum() / 12

    assert_gradients(
        lambda x: mmcv.ops.sigmoid_focal_loss(x, target, gamma, 0.25, weight, "mean"), definition, [logits]
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("gamma", [2.0, 0.5, 0.0])
def test_softmax_focal_loss(gamma, weighted, device):
    torch.manual_seed(0)
    logits, target = torch.randn(12, 5, device=device) * 3, torch.randint(5, (12,), device=device)
    weight = torch.rand(5, device=device) if weighted else None

    def definition(x):
        p = x.softmax(1).gather(1, target[:, None])[:, 0]
        loss = -0.25 * (1 - p) ** gamma * p.log()
        return (loss * weight[target] if weighted else loss).sum() / 12

    assert_gradients(
        lambda x: mmcv.ops.softmax_focal_loss(x, target, gamma, 0.25, weight, "mean"), definition, [logits]
    )


def test_focal_loss_of_sure_logits():
    """Where the target's probability is 1 in float32, the loss is 0 and its gradient finite."""
    logits = torch.tensor([[60.0, -60.0]], requires_grad=True)
    for loss in (mmcv.ops.sigmoid_focal_loss, mmcv.ops.softmax_focal_loss):
        for gamma in (0.0, 0.5, 2.0):
            value = loss(logits, torch.tensor([0]), gamma, 0.25, None, "sum")
            [grad] = torch.autograd.grad(value, logits)
            assert value.abs() < 1e-20 and grad.isfinite().all()


# --- deformable convolution and attention ---------------------------------------------------------------------------


def deformed(x, offset, weight, mask, stride, padding, dilation, groups):
    """Sum over taps of weight times the map sampled at the tap's place plus its offset; 0 outside."""
    b, _, height, width = x.shape
    out_h, out_w = offset.shape[2:]
    taps = list(itertools.product(range(weight.shape[2]), range(weight.shape[3])))
    deform_groups = offset.shape[1] // (2 * len(taps))
    offset = offset.view(b, deform_groups, len(taps), 2, out_h, out_w)
    columns = []
    for k, (i, j) in enumerate(taps):
        rows = torch.arange(out_h).to(x)[:, None] * stride - padding + i * dilation
        along = torch.arange(out_w).to(x) * stride - padding + j * dilation
        y, x_ = rows + offset[:, :, k, 0], along + offset[:, :, k, 1]
        grid = torch.stack([(2 * x_ + 1) / width - 1, (2 * y + 1) / height - 1], -1).flatten(0, 1)
        maps = x.unflatten(1, (deform_groups, -1)).flatten(0, 1)
        sampled = F.grid_sample(maps, grid, align_corners=False).unflatten(0, (b, -1)).flatten(1, 2)
        if mask is not None:
            part = mask.view(b, deform_groups, 1, len(taps), out_h, out_w)[:, :, :, k]
            sampled = (sampled.unflatten(1, (deform_groups, -1)) * part).flatten(1, 2)
        columns.append(sampled)
    columns = torch.stack(columns, 2).unflatten(1, (groups, -1))  # (B, groups, C / groups, taps, H, W)
    kernel = weight.unflatten(0, (groups, -1)).flatten(3)
    return torch.einsum("bgcthw,goct->bgohw", columns, kernel).flatten(1, 2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("stride", "padding", "dilation", "groups", "deform_groups"), [(1, 1, 1, 1, 1), (2, 2, 2, 2, 2)]
)
def test_deform_conv(stride, padding, dilation, groups, deform_groups, device):
    torch.manual_seed(0)
    side = [(n + 2 * padding - 2 * dilation - 1) // stride + 1 for n in (7, 9)]
    x, weight = torch.randn(2, 4, 7, 9, device=device), torch.randn(6, 4 // groups, 3, 3, device=device) * 0.3
    offset = torch.randn(2, deform_groups * 18, *side, device=device)
    settings = (stride, padding, dilation, groups, deform_groups)
    assert_gradients(
        lambda x, offset, weight: mmcv.ops.deform_conv2d(x, offset, weight, *settings),
        lambda x, offset, weight: deformed(x, offset, weight, None, *settings[:4]),
        [x, offset, weight],
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(
    ("stride", "padding", "dilation", "groups", "deform_groups"), [(1, 1, 1, 1, 1), (2, 2, 2, 2, 2)]
)
def test_modulated_deform_conv(stride, padding, dilation, groups, deform_groups, with_bias, device):
    torch.manual_seed(0)
    side = [(n + 2 * padding - 2 * dilation - 1) // stride + 1 for n in (7, 9)]
    x, weight = torch.randn(2, 4, 7, 9, device=device), torch.randn(6, 4 // groups, 3, 3, device=device) * 0.3
    offset, mask = (torch.randn(2, deform_groups * n, *side, device=device) for n in (18, 9))
    settings = (stride, padding, dilation, groups)
    assert_gradients(
        lambda x, offset, mask, weight, bias=None: mmcv.ops.modulated_deform_conv2d(
            x, offset, mask, weight, bias, *settings, deform_groups
        ),
        lambda x, offset, mask, weight, *bias: (
            deformed(x, offset, weight, mask, *settings) + (bias[0][:, None, None] if bias else 0)
        ),
        [x, offset, mask, weight] + [torch.randn(6, device=device)] * with_bias,
    )


@pytest.mark.parametrize("device", DEVICES)
def test_ms_deform_attn(device):
    torch.manual_seed(0)
    shapes = torch.tensor([[5, 7], [3, 4]], device=device)
    value, weights = torch.randn(2, 47, 2, 3, device=device), torch.rand(2, 6, 2, 2, 4, device=device)
    locations = torch.rand(2, 6, 2, 2, 4, 2, device=device) * 1.4 - 0.2

    def definition(value, locations, weights):
        out = torch.zeros(2, 6, 2, 3, device=device)
        for b, q, h, l, p in itertools.product(*map(range, weights.shape)):
            height, width = shapes[l].tolist()
            level = F.pad(value[b, 35 * l : 35 + 12 * l, h].T.unflatten(1, (height, width)), (1, 1, 1, 1))
            x, y = locations[b, q, h, l, p] * torch.tensor([width, height], device=device) + 0.5  # of the padded map
            inside = 0 < x < width + 1 and 0 < y < height + 1
            sample = bilinear(level, y[None], x[None])[:, 0] if inside else torch.zeros(3, device=device)
            out[b, q, h] = out[b, q, h] + weights[b, q, h, l, p] * sample
        return out.flatten(2)

    assert_gradients(
        lambda *x: MultiScaleDeformableAttnFunction.apply(
            x[0], shapes, torch.tensor([0, 35], device=device), *x[1:], 64
        ),
        definition,
        [value, locations, weights],
    )


def test_bfloat16_and_autocast(operators):
    """Features in bfloat16, as under autocast, give bfloat16 and nearly the values of float32."""
    if operators is COMPILED:
        pytest.skip("mmcv's compiled operators have no bfloat16")
    torch.manual_seed(0)
    x, rois = torch.randn(2, 4, 14, 20), ROIS
    conv = mmcv.ops.ModulatedDeformConv2dPack(4, 6, 3, padding=1)
    torch.nn.init.normal_(conv.conv_offset.weight)
    exact = conv(x), mmcv.ops.roi_align(x, rois, 3, 0.25)
    with torch.autocast("cpu", torch.bfloat16):
        features = x.bfloat16().requires_grad_()
        found = conv(features), mmcv.ops.roi_align(features, rois.bfloat16(), 3, 0.25)
        for ours, theirs in zip(found, exact, strict=True):
            assert ours.dtype == torch.bfloat16
            close(ours.float(), theirs, 0.2)
            ours.float().sum().backward()
        boxes, scores = some_boxes()
        assert mmcv.ops.nms(boxes.bfloat16(), scores.bfloat16(), 0.3)[0].dtype == torch.bfloat16
    assert features.grad.isfinite().all() and conv.weight.grad.dtype == torch.float32


# --- bad input ------------------------------------------------------------------------------------------------------


def test_missing_operator(operators):
    if operators is COMPILED:
        pytest.skip("compiled operators are all there")
    boxes = torch.rand(3, 5)
    with pytest.raises(NotImplementedError, match="^mmcv's operator 'box_iou_rotated' needs an mmcv with compiled .*$"):
        mmcv.ops.box_iou_rotated(boxes, boxes)
    with pytest.raises(NotImplementedError, match="pool_mode='max'"):
        mmcv.ops.roi_align(torch.rand(1, 1, 4, 4), torch.tensor([[0, 0.0, 0, 2, 2]]), 2, 1.0, 2, "max")


def package(monkeypatch, **attributes):
    """Puts another package in mmcv's place."""
    for name in [name for name in sys.modules if name == "mmcv" or name.startswith("mmcv.")]:
        monkeypatch.delitem(sys.modules, name)
    other = types.ModuleType("mmcv")
    other.__spec__ = importlib.machinery.ModuleSpec("mmcv", None, is_package=True)
    vars(other).update(__path__=[], **attributes)
    monkeypatch.setitem(sys.modules, "mmcv", other)


def test_mmcv_that_does_not_fit(monkeypatch):
    """Another major version, half an installation, compiled operators that do not load."""
    package(monkeypatch, __version__="1.7.2")
    with pytest.raises(ImportError, match="^mmcv 1.7.2 is installed; expected version 2"):
        openmmlab_ops.stand_in()
    package(monkeypatch)
    with pytest.raises(ImportError, match="^mmcv is installed in part .*__version__.*--force-reinstall"):
        openmmlab_ops.stand_in()
    package(monkeypatch, __version__="2.9.9")

    def broken(name):
        if name == openmmlab_ops.MODULE and name not in sys.modules:
            raise ImportError("undefined symbol: _ZN3c10\nand more")
        return sys.modules.get(name)

    monkeypatch.setattr(openmmlab_ops.importlib, "import_module", broken)
    said = openmmlab_ops.stand_in()
    assert re.fullmatch(r"torchvision \S+'s, as those of mmcv 2.9.9 do not load: undefined symbol: _ZN3c10", said)
    assert openmmlab_ops.stand_in() == said
    monkeypatch.delitem(sys.modules, openmmlab_ops.MODULE)


def test_torchvision_without_operators(monkeypatch):
    package(monkeypatch, __version__="2.9.9")
    monkeypatch.setattr(openmmlab_ops.torch.ops, "torchvision", object())
    with pytest.raises(ImportError, match="^torchvision .* has no compiled operators, and mmcv 2.9.9 .*; install the"):
        openmmlab_ops.stand_in()


def test_mmseg_imported_first():
    """Modules that were loaded without operators get them: mmseg imports half of mmdet on its own."""
    script = """
        import sys
        sys.modules["transformers"] = None  # mmpretrain, which mmdet imports, fails beside new ones
        import mmseg.models
        from mmdet.models.dense_heads import rpn_head, vfnet_head
        from mmdet.models.losses import focal_loss
        from mmdet.structures.bbox import bbox_overlaps
        import linzoo.backbones.openmmlab, mmcv.ops
        from mmdet.structures import bbox
        assert rpn_head.batched_nms is mmcv.ops.batched_nms
        assert vfnet_head.DeformConv2d is mmcv.ops.DeformConv2d
        assert focal_loss._sigmoid_focal_loss is mmseg.models.losses.focal_loss._sigmoid_focal_loss
        assert focal_loss._sigmoid_focal_loss is mmcv.ops.sigmoid_focal_loss
        assert mmseg.models.decode_heads.point_head.point_sample is mmcv.ops.point_sample
        assert bbox.bbox_overlaps is bbox_overlaps is not mmcv.ops.bbox_overlaps  # mmdet's own of that name
    """
    subprocess.run([sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)], check=True)
