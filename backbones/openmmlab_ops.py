"""mmcv's operators, built on torchvision's, for mmdet when mmcv has none compiled.

mmcv's Python files call a compiled module, `mmcv._ext`, which no wheel contains for most versions of torch.
`stand_in()` replaces it by a module with the operators that mmdet's models train and predict with, on CPU and CUDA.
If mmcv has compiled operators, those are used. An operator that is missing here raises NotImplementedError with its
name.

The functions have the names and arguments of `mmcv._ext`: they write into tensors that mmcv's autograd functions
allocate. Sixteen-bit floats are computed in float32.
"""

import importlib
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

from .layers.vit_adapter import sampled_attention

__all__ = ["stand_in"]

MODULE = "mmcv._ext"
MAJOR = 2  # of mmcv
TINY = torch.finfo(torch.float32).tiny


def _full(*tensors: Tensor) -> list[Tensor]:
    """The tensors in one dtype: float64 if the first has it, else float32."""
    return [x.to(torch.float64 if tensors[0].dtype == torch.float64 else torch.float32) for x in tensors]


def _gradients(function: Callable, inputs: Sequence[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    """Gradients of `function(*inputs)` for the gradient of its output."""
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in inputs]
        return torch.autograd.grad(function(*inputs), inputs, grad)


# --- boxes ----------------------------------------------------------------------------------------------------------


def _grown(boxes: Tensor, offset: int) -> Tensor:
    """Boxes ``(N, 4)`` whose widths are x2 - x1 + `offset`, in float32 or float64."""
    return F.pad(torch.full_like(boxes[:, :2], offset), (2, 0)).add_(boxes) if offset else _full(boxes)[0]


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Indices of the boxes that no better box overlaps by more than the threshold, the best first."""
    return torchvision.ops.nms(*_full(_grown(boxes, offset), scores), iou_threshold)


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Soft-NMS (arXiv 1704.04503): indices in order; writes the boxes with their lowered scores to `dets`.

    If a box overlaps a better one by `iou`, its score is multiplied by 0 (method 0) or ``1 - iou`` (1) from the
    threshold on, or by ``exp(-iou^2 / sigma)`` (2). It is dropped below `min_score`.
    """
    corners, scores = _grown(boxes, offset), scores.clone()
    left, kept = torch.arange(len(boxes)), []
    while len(left):
        best = int(scores[left].argmax())
        i = int(left[best])
        dets[len(kept), :4], dets[len(kept), 4] = boxes[i], scores[i]
        kept.append(i)
        left = torch.cat([left[:best], left[best + 1 :]])
        iou = torchvision.ops.box_iou(corners[i : i + 1], corners[left])[0].to(scores.dtype)
        hard = iou >= iou_threshold
        scores[left] *= (~hard, torch.where(hard, 1 - iou, 1.0), torch.exp(-iou.square() / sigma))[method]
        left = left[scores[left] >= min_score]
    return torch.tensor(kept, dtype=torch.long)


def nms_match(dets: Tensor, iou_threshold: float) -> list[list[int]]:
    """For each kept box of ``(N, 5)``, its index and those of the boxes that it suppresses, the best first."""
    boxes, order, groups = _full(dets[:, :4])[0], dets[:, 4].sort(descending=True).indices, []
    while len(order):
        best, order = order[:1], order[1:]
        suppressed = torchvision.ops.box_iou(boxes[best], boxes[order])[0] >= iou_threshold
        groups.append(torch.cat([best, order[suppressed]]).tolist())
        order = order[~suppressed]
    return groups


# --- regions of interest --------------------------------------------------------------------------------------------


def _aligned(x: Tensor, rois: Tensor, aligned_height, aligned_width, spatial_scale, sampling_ratio, pool_mode, aligned):
    if pool_mode != 1:
        raise NotImplementedError("mmcv's roi_align with pool_mode='max': expected 'avg' without compiled operators")
    size = (aligned_height, aligned_width)
    return torchvision.ops.roi_align(*_full(x, rois), size, spatial_scale, sampling_ratio, aligned)


def roi_align_forward(input: Tensor, rois: Tensor, output: Tensor, argmax_y: Tensor, argmax_x: Tensor, **kwargs):
    """RoIAlign (arXiv 1703.06870): the mean of bilinear samples of each bin."""
    output.copy_(_aligned(input, rois, **kwargs))


def roi_align_backward(
    grad_output: Tensor, rois: Tensor, argmax_y: Tensor, argmax_x: Tensor, grad_input: Tensor, **kwargs
):
    """Gradient of the map, which does not depend on the map."""
    x, grad = _full(grad_input, grad_output)
    grad_input.copy_(_gradients(lambda x: _aligned(x, rois, **kwargs), [x], grad)[0])


def _bins(start: Tensor, end: Tensor, count: int, size: int) -> tuple[list[list[int]], list[list[int]]]:
    """First pixels of the `count` bins of each region, and those after their last, on a map of `size` pixels."""
    step = (end - start)[:, None] / count
    i = torch.arange(count, device=start.device)
    first, last = (i * step + start[:, None]).floor(), ((i + 1) * step + start[:, None]).ceil()
    return first.clamp(0, size).int().tolist(), last.clamp(0, size).int().tolist()


def roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
):
    """RoI pooling as mmcv defines it: the maximum of the pixels that a bin touches.

    A region ends one pixel after its last corner and is cut into bins without rounding. A bin reaches from the floor of
    its start to the ceiling of its end. (torchvision rounds the region.) `argmax` is the pixel's index in the map;
    an empty bin gives 0 and -1.
    """
    output.zero_()
    argmax.fill_(-1)
    height, width = input.shape[2:]
    _, x1, y1, x2, y2 = _full(rois)[0].unbind(1)
    rows = _bins(y1 * spatial_scale, (y2 + 1) * spatial_scale, pooled_height, height)
    columns = _bins(x1 * spatial_scale, (x2 + 1) * spatial_scale, pooled_width, width)
    for n, image in enumerate(rois[:, 0].int().tolist()):
        for i, (top, bottom) in enumerate(zip(rows[0][n], rows[1][n], strict=True)):
            for j, (left, right) in enumerate(zip(columns[0][n], columns[1][n], strict=True)):
                if bottom > top and right > left:
                    output[n, :, i, j], place = input[image, :, top:bottom, left:right].flatten(1).max(1)
                    down, along = place // (right - left), place % (right - left)
                    argmax[n, :, i, j] = (top + down) * width + left + along


def roi_pool_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax: Tensor,
    grad_input: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
):
    """Each bin's gradient goes to the pixel of its maximum."""
    channels, height, width = grad_input.shape[1:]
    maps = rois[:, :1].long() * channels + torch.arange(channels, device=rois.device)
    places = maps[:, :, None, None] * (height * width) + argmax
    found = argmax >= 0
    grad_input.view(-1).index_add_(0, places[found], grad_output[found])


# --- focal losses ---------------------------------------------------------------------------------------------------


def _sigmoid_focal(x: Tensor, target: Tensor, weight: Tensor, gamma: float, alpha: float) -> Tensor:
    positive = target[:, None] == torch.arange(x.shape[1], device=x.device)
    log_p, log_rest = F.logsigmoid(x), F.logsigmoid(-x)
    hit, miss = alpha * (gamma * log_rest).exp() * log_p, (1 - alpha) * (gamma * log_p).exp() * log_rest
    loss = -torch.where(positive, hit, miss)
    return loss * weight[target][:, None] if len(weight) else loss


def sigmoid_focal_loss_forward(input: Tensor, target: Tensor, weight: Tensor, output: Tensor, **kwargs):
    """Focal loss (arXiv 1708.02002) of each class, ``(N, C)``; a target of C means no class."""
    x, weight = _full(input, weight)
    output.copy_(_sigmoid_focal(x, target, weight, **kwargs))


def sigmoid_focal_loss_backward(input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, **kwargs):
    """Derivative of each loss with respect to its logit."""
    x, weight = _full(input, weight)
    grad_input.copy_(_gradients(lambda x: _sigmoid_focal(x, target, weight, **kwargs), [x], torch.ones_like(x))[0])


def softmax_focal_loss_forward(
    softmax: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
):
    """Focal loss of the target's probability, ``(N,)``; 0 for a target below 0."""
    softmax, weight = _full(softmax, weight)
    label = target.clamp(min=0)
    p = softmax.gather(1, label[:, None])[:, 0]
    loss = -alpha * (1 - p) ** gamma * p.clamp(min=TINY).log()
    output.copy_(torch.where(target >= 0, loss * weight[label] if len(weight) else loss, 0))


def softmax_focal_loss_backward(
    softmax: Tensor, target: Tensor, weight: Tensor, buff: Tensor, grad_input: Tensor, gamma: float, alpha: float
):
    """Derivative with respect to the logits: p d/dp of the loss, p the target's probability, times d/dx log p."""
    softmax, weight = _full(softmax, weight)
    label = target.clamp(min=0)
    p = softmax.gather(1, label[:, None])
    rest = (1 - p).clamp(min=TINY)
    slope = alpha * (gamma * rest ** (gamma - 1) * p * p.clamp(min=TINY).log() - rest**gamma)
    slope = torch.where(target[:, None] >= 0, slope * weight[label][:, None] if len(weight) else slope, 0)
    grad_input.copy_(slope * (F.one_hot(label, softmax.shape[1]) - softmax))


# --- deformable convolution and attention ---------------------------------------------------------------------------


def deform_conv_forward(
    input: Tensor, weight: Tensor, offset: Tensor, output: Tensor, columns: Tensor, ones: Tensor, **kwargs
):
    """Deformable convolution (arXiv 1703.06211)."""
    output.copy_(_deformed(kwargs)(*_full(input, weight, offset)))


def _deformed(kwargs: dict) -> Callable[..., Tensor]:
    """Deformable convolution of (map, weight, offset) with mmcv's settings; groups follow from the shapes."""
    settings = [(kwargs[f"{name}H"], kwargs[f"{name}W"]) for name in ("d", "pad", "dilation")]
    return lambda x, weight, offset: torchvision.ops.deform_conv2d(x, offset, weight, None, *settings)


def deform_conv_backward_input(
    input: Tensor,
    offset: Tensor,
    gradOutput: Tensor,
    gradInput: Tensor,
    gradOffset: Tensor,
    weight: Tensor,
    columns: Tensor,
    **kwargs,
):
    """Gradients of the map and of the offsets."""
    x, weight, offset, grad = _full(input, weight, offset, gradOutput)
    convolve = _deformed(kwargs)
    found = _gradients(lambda x, offset: convolve(x, weight, offset), [x, offset], grad)
    gradInput.copy_(found[0])
    gradOffset.copy_(found[1])


def deform_conv_backward_parameters(
    input: Tensor,
    offset: Tensor,
    gradOutput: Tensor,
    gradWeight: Tensor,
    columns: Tensor,
    ones: Tensor,
    scale: float,
    **kwargs,
):
    """Adds `scale` times the gradient of the weights."""
    x, weight, offset, grad = _full(input, gradWeight, offset, gradOutput)
    convolve = _deformed(kwargs)
    gradWeight.add_(_gradients(lambda weight: convolve(x, weight, offset), [weight], grad)[0], alpha=scale)


def _modulated(kwargs: dict) -> Callable[..., Tensor]:
    """Modulated deformable convolution of (map, weight, offset, mask, bias) with mmcv's settings."""
    settings = [(kwargs[f"{name}_h"], kwargs[f"{name}_w"]) for name in ("stride", "pad", "dilation")]

    def convolve(x, weight, offset, mask, bias=None):
        return torchvision.ops.deform_conv2d(x, offset, weight, bias, *settings, mask)

    return convolve


def modulated_deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    columns: Tensor,
    with_bias: bool,
    **kwargs,
):
    """Modulated deformable convolution (arXiv 1811.11168)."""
    inputs = _full(input, weight, offset, mask, *([bias] if with_bias else []))
    output.copy_(_modulated(kwargs)(*inputs))


def modulated_deform_conv_backward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    columns: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad_output: Tensor,
    with_bias: bool,
    **kwargs,
):
    """Gradients of all tensors."""
    grad, *inputs = _full(grad_output, input, weight, offset, mask, *([bias] if with_bias else []))
    outputs = (grad_input, grad_weight, grad_offset, grad_mask, grad_bias)
    for output, found in zip(outputs, _gradients(_modulated(kwargs), inputs, grad), strict=False):
        output.copy_(found)


def _attended(shapes: Tensor) -> Callable[..., Tensor]:
    sizes = [tuple(shape) for shape in shapes.tolist()]
    return lambda value, locations, weights: sampled_attention(value, sizes, locations, weights)


def ms_deform_attn_forward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """Multi-scale deformable attention (arXiv 2010.04159)."""
    inputs = _full(value, sampling_locations, attention_weights)
    return _attended(value_spatial_shapes)(*inputs).to(value.dtype)


def ms_deform_attn_backward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    im2col_step: int,
):
    """Gradients of the values, the sampling locations and the weights."""
    *inputs, grad = _full(value, sampling_locations, attention_weights, grad_output)
    outputs = (grad_value, grad_sampling_loc, grad_attn_weight)
    for output, found in zip(outputs, _gradients(_attended(value_spatial_shapes), inputs, grad), strict=True):
        output.copy_(found)


# --- the stand-in ---------------------------------------------------------------------------------------------------

OPERATORS = (
    *(nms, softnms, nms_match),
    *(roi_align_forward, roi_align_backward, roi_pool_forward, roi_pool_backward),
    *(sigmoid_focal_loss_forward, sigmoid_focal_loss_backward),
    *(softmax_focal_loss_forward, softmax_focal_loss_backward),
    *(deform_conv_forward, deform_conv_backward_input, deform_conv_backward_parameters),
    *(modulated_deform_conv_forward, modulated_deform_conv_backward),
    *(ms_deform_attn_forward, ms_deform_attn_backward),
)


class MissingOperator(NotImplementedError):
    """An mmcv operator that neither this module nor torchvision provides."""


def _missing(name: str) -> Callable:
    """A placeholder for an operator of `mmcv._ext` that this module lacks; Python's own names are absent."""
    if name.startswith("__"):
        raise AttributeError(name)

    def operator(*args, **kwargs):
        raise MissingOperator(f"mmcv's operator {name!r} needs an mmcv with compiled operators; torchvision has none")

    return operator


def module(doc: str) -> types.ModuleType:
    """The module that replaces `mmcv._ext`."""
    made = types.ModuleType(MODULE, doc)
    made.__spec__ = importlib.machinery.ModuleSpec(MODULE, None)
    vars(made).update({operator.__name__: operator for operator in OPERATORS}, __getattr__=_missing)
    return made


def _refuses(found: Any) -> bool:
    """Whether this is mmdet's and mmseg's placeholder for an operator that they could not import."""
    code = getattr(found.__init__ if isinstance(found, type) else found, "__code__", None)
    return any("requires mmcv to be compiled" in str(constant) for constant in getattr(code, "co_consts", ()))


def _hand_over() -> None:
    """Gives the operators to modules of mmdet and mmseg that were imported without them."""
    early = [(name, module) for name, module in sys.modules.items() if name.split(".")[0] in ("mmdet", "mmseg")]
    if not early:
        return
    operators = importlib.import_module("mmcv.ops")
    for name, module in early:
        for attribute, found in list(vars(module).items()):
            operator = getattr(operators, attribute.removeprefix("_"), None)
            if operator and (_refuses(found) or found is None and name.startswith("mmseg.")):
                setattr(module, attribute, operator)


def stand_in() -> str | None:
    """Makes mmcv use torchvision's operators if it has none that load.

    Call it before mmseg is imported, because those of mmseg's heads that derive from mmdet's need the operators then.
    Other modules of mmseg and mmdet that are already loaded receive them.

    Returns:
        Which operators are used and why; None if mmcv is not installed.

    Raises:
        ImportError: mmcv has another major version or is only partly installed; torchvision lacks its operators.
    """
    if importlib.util.find_spec("mmcv") is None:
        return None
    try:
        version = importlib.import_module("mmcv").__version__
    except (ImportError, AttributeError) as e:
        repair = "`pip install --force-reinstall --no-deps onedl-mmcv` repairs it"
        raise ImportError(f"mmcv is installed in part ({e}); {repair}") from e
    if version.partition(".")[0] != str(MAJOR):
        raise ImportError(f"mmcv {version} is installed; expected version {MAJOR}: `pip install 'onedl-mmcv>=2.3.6'`")
    try:
        found = importlib.import_module(MODULE)
        return f"mmcv {version}'s, compiled" if hasattr(found, "__file__") else found.__doc__
    except ModuleNotFoundError:
        reason = f"mmcv {version} has none compiled"
    except ImportError as e:
        reason = f"those of mmcv {version} do not load: {str(e).splitlines()[0]}"
    if not hasattr(torch.ops.torchvision, "roi_align"):
        raise ImportError(
            f"torchvision {torchvision.__version__} has no compiled operators, and {reason}; "
            f"install the torchvision that belongs to torch {torch.__version__}"
        )
    sys.modules[MODULE] = module(f"torchvision {torchvision.__version__}'s, as {reason}")
    _hand_over()
    return sys.modules[MODULE].__doc__
