"""Integer arithmetic by libraries: 8-bit weights only (torchao), or 8-bit weights and inputs of every linear map
(torchao PT2E or ONNX Runtime QDQ).

Scans stay in floating point. So does the step size's `dt_weight`, because the scan's operator multiplies by it.
"""

import copy
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.models._features_fx import register_notrace_module
from torch import Tensor, fx, nn

from linzoo.backbones.layers import S6, GroupedLinear

__all__ = ["float_linears", "per_group", "pt2e", "qdq", "weight_only"]

NEEDED = "torchao is missing; pip install 'linzoo[quantize]'"


def _by_group(x: Tensor, weight: Tensor) -> Tensor:
    return torch.stack([F.linear(x[..., g, :], w) for g, w in enumerate(weight)], -2)


class _GroupedLinear(GroupedLinear):
    def forward(self, x):
        return _by_group(x, self.weight)


@register_notrace_module
class _S6(S6):
    def project(self, u):
        return super().project(u) if u.dim() == 3 else _by_group(u, self.x_proj)


def per_group(model: nn.Module) -> nn.Module:
    """A copy in which each group of `GroupedLinear` and `x_proj` is its own linear map, which quantisers can see."""
    model = copy.deepcopy(model).eval()
    kinds = {GroupedLinear: _GroupedLinear, S6: _S6}
    for module in model.modules():
        module.__class__ = kinds.get(type(module), type(module))
    return model


def weight_only(model: nn.Module) -> nn.Module:
    """A copy with 8-bit weights in every `torch.nn.Linear`, one scale per row; inputs stay in floating point.

    Raises:
        ImportError: torchao is missing.
        ValueError: the model has no such layer, or torchao left one unchanged.
    """
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as e:
        raise ImportError(NEEDED) from e
    model = copy.deepcopy(model).eval()
    before = {name: module.weight for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if not before:
        raise ValueError(f"model: expected linear maps, got none in {type(model).__name__}")
    quantize_(model, Int8WeightOnlyConfig(version=2))
    left = [name for name, weight in before.items() if type(model.get_submodule(name).weight) is type(weight)]
    if left:
        raise ValueError(f"model: {len(left)} linear maps keep their weights, such as {left[0]!r}")
    return model


def _linears(graph: fx.GraphModule) -> Iterator[fx.Node]:
    return (node for node in graph.graph.nodes if node.target == torch.ops.aten.linear.default)


def _is_dequantized(node: Any) -> bool:
    return isinstance(node, fx.Node) and str(node.target).startswith("quantized_decomposed.dequantize")


def float_linears(graph: fx.GraphModule) -> list[str]:
    """Node names of the linear maps of an exported graph whose input or weight is not a dequantised integer."""
    return [node.name for node in _linears(graph) if not all(_is_dequantized(x) for x in node.args[:2])]


def _drop_unused(graph: fx.GraphModule) -> None:
    """Removes the float weights that integers replace."""
    used = {node.target for node in graph.graph.nodes if node.op == "get_attr"}
    for name in [name for name, _ in (*graph.named_parameters(), *graph.named_buffers()) if name not in used]:
        owner, _, key = name.rpartition(".")
        delattr(graph.get_submodule(owner), key)


def pt2e(model: nn.Module, images: Sequence[Tensor], reduce_range: bool | None = None) -> fx.GraphModule:
    """The model exported with 8-bit weights and inputs of every linear map, and of the convolutions that X86 supports.

    Weights are symmetric with one scale per row; inputs are affine with one static scale per tensor. `torch.compile`
    under ``torch._inductor.config.freezing`` turns the graph into integer products.

    Args:
        model: A model with one input.
        images: Batches ``(B, C, H, W)`` of one shape to calibrate on; the graph takes only this shape.
        reduce_range: 7 bits for inputs, because 8-bit products overflow 16-bit sums on processors without VNNI. None:
            only if this processor has no VNNI.

    Raises:
        ImportError: torchao is missing.
        ValueError: there are no images, or their shapes differ; a linear map is not quantised.
    """
    try:
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
        from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
            X86InductorQuantizer,
            get_default_x86_inductor_quantization_config,
        )
    except ImportError as e:
        raise ImportError(NEEDED) from e
    shapes = sorted({tuple(batch.shape) for batch in images})
    if len(shapes) != 1:
        raise ValueError(f"images: expected batches of one shape, got {shapes or 'none'}")
    if reduce_range is None:
        reduce_range = not torch.cpu._is_vnni_supported()
    model = per_group(model)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = torch.export.export(model, (images[0],), strict=True).module()
        config = get_default_x86_inductor_quantization_config(reduce_range=reduce_range)
        prepared = prepare_pt2e(graph, X86InductorQuantizer().set_global(config))
        for batch in images:
            prepared(batch)
        converted = convert_pt2e(prepared)
        _drop_unused(converted)
    modules = sum(isinstance(module, nn.Linear) for module in model.modules())
    found, left = len(list(_linears(converted))), float_linears(converted)
    if left or found < modules:
        what = f"{left[0]!r} is not quantised" if left else f"only {found} of them are in the graph"
        raise ValueError(f"model: expected {modules} linear maps with integer inputs, but {what}")
    return converted


def qdq(file: str | Path, images: Sequence[Tensor], out: str | Path) -> int:
    """Write an ONNX file with 8-bit weights and inputs of every linear map and convolution; returns their number.

    The file has QuantizeLinear and DequantizeLinear (QDQ) around them, which runtimes turn into integer products.
    Weights are symmetric with one scale per row; inputs are affine with one static scale per tensor. Products of two
    inputs stay in floating point. Export `per_group` of a model: products of several groups in one are missed.

    Args:
        file: A model with one input.
        images: Batches ``(B, C, H, W)`` to calibrate on.
        out: The file to write.

    Raises:
        ImportError: onnx or onnxruntime is missing.
        ValueError: there are no images; no map has a constant weight, or one is not quantised.
    """
    try:
        import onnx
        import onnxscript.optimizer
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    except ImportError as e:
        raise ImportError(f"{e.name} is missing; pip install 'linzoo[export]'") from e
    if not images:
        raise ValueError("images: expected batches to calibrate on, got none")
    model = onnx.load(str(file))
    onnxscript.optimizer.fold_constants(model, input_size_limit=2**40, output_size_limit=2**40)  # parts of weights
    [entry] = model.graph.input
    varying = {entry.name}
    for node in model.graph.node:
        if varying.intersection(node.input):
            varying.update(node.output)
    products = [node for node in model.graph.node if node.op_type in ("MatMul", "Gemm", "Conv")]
    maps = [node.name for node in products if node.input[1] not in varying]
    if not maps:
        raise ValueError(f"file: expected linear maps or convolutions of constant weights, got none in {str(file)!r}")

    class Batches(CalibrationDataReader):
        def __init__(self):
            self.left = iter(images)

        def get_next(self):
            batch = next(self.left, None)
            return batch if batch is None else {entry.name: batch.numpy()}

    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)  # it asks for a step that torch.onnx files do not need
    try:
        quantize_static(
            model,
            str(out),
            Batches(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_quantize=maps,
        )
    finally:
        logger.setLevel(level)
    graph = onnx.load(str(out), load_external_data=False).graph
    made = {output: node.op_type for node in graph.node for output in node.output}
    quantized = {n.name for n in graph.node if all(made.get(x) == "DequantizeLinear" for x in n.input[:2])}
    if left := [name for name in maps if name not in quantized]:
        raise ValueError(f"file: {len(left)} of {len(maps)} maps are not quantised, such as {left[0]!r}")
    return len(maps)
