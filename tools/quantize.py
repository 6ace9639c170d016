"""Quantise a classifier: `linzoo quantize MODEL [CHECKPOINT] --calib DIR --out DIR`.

MODEL is a model's name (`linzoo models`, or timm's), `local-dir:DIR` of a run's export, or one of our configs with its
checkpoint. --calib DIR holds images, in folders or not. Use training images, never those that you compare on.

--method: how channels are prepared for rounding; the model's function stays the same. minmax: not at all. smooth:
SmoothQuant's scales. mambaquant: these scales, rotations in the weights, and a Hadamard matrix before `out_proj`.
repq: one range for all channels after a norm, the best of some quantiles; attention is rounded, its softmax to powers
of the square root of 2. quamba2: scan inputs are sorted, clustered and rounded; Hadamard matrices; 4-bit weights in
groups of 128.
--bits: w8a8 and w4a8 round weights and layer inputs; w8 and w4a16 round only weights.
--rounding: nearest, or gptq for linear maps: their columns in turn, so that outputs stay. The default is nearest, but
gptq for quamba2's 4-bit weights.
Several checkpoints, methods, bits or roundings are compared on --test; nothing is written then.

Arithmetic is simulated in floating point. Norms, dense convolutions and scans (except quamba2's inputs) are not
rounded. `quantized.pth` is a checkpoint of the same model with rounded weights. It also says how inputs are rounded:
`linzoo test` and `predict` do so. Other readers, such as `linzoo export`, take the weights alone, and say so; the last
row of the table shows that case.
"""

import argparse
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast, get_args

import rich.box
import rich.console
import rich.table
import torch
from torch import Tensor, nn

from linzoo.backbones.checkpoints import load_plain
from linzoo.quantization.quantize import METHODS, Quantized, Rounding, quantize
from linzoo.tools.engine.calibration import Prepare, calibration, prepared_by_timm
from linzoo.tools.engine.classifier import Classifier, find_classes
from linzoo.tools.engine.cli import add_cfg_options, command
from linzoo.tools.engine.config import is_config, load_config
from linzoo.tools.engine.errors import InputError, note
from linzoo.tools.engine.files import write_atomically
from linzoo.tools.engine.task import Job, build
from linzoo.tools.engine.weights import load_weights
from linzoo.tools.export import load
from linzoo.tools.outliers import logit_error, spread

BITS = {"w8a8": (8, 8), "w4a8": (4, 8), "w4a16": (4, None), "w8": (8, None)}
ROUNDINGS = get_args(Rounding)
FILE = "quantized.pth"


def open_model(
    name: str, weights: str | None, options: dict | None = None
) -> tuple[nn.Module, Prepare, list[str] | None]:
    """A classifier in eval mode, a function that makes batches of files, and its class names if known.

    Args:
        options: Of --cfg-options, if MODEL is a config.
    """
    if options and not is_config(name):
        raise InputError(f"--cfg-options {' '.join(options)}: MODEL {name!r} is no config; expected none")
    if weights and Path(weights).is_file():
        try:
            content = load_plain(weights)
        except ValueError as e:
            raise InputError(str(e)) from e
        if isinstance(content, Mapping) and "quantization" in content:
            raise InputError(f"CHECKPOINT {weights!r} is quantised already; expected one of floating-point weights")
    if is_config(name):
        cfg = load_config(name, options)
        task = build(cfg)
        if not isinstance(task, Classifier):
            raise InputError(f"MODEL {name!r} trains a {type(task).__name__}; expected a config of a classifier")
        if weights is None:
            raise InputError(f"MODEL {name!r} is a config: CHECKPOINT is missing; expected its checkpoint")
        classes = load_weights(task.model, weights)
        preprocess = task.data_preprocessor.eval()

        def by_config(files: list[Path]) -> list[Tensor]:
            job = Job(cfg, type(task), classes, files, Path(), Path(), argparse.Namespace())
            return [preprocess(batch)["inputs"] for batch in job.batches()]

        return task.model.eval(), by_config, classes
    model, _ = load(name, weights)
    if not getattr(model, "num_classes", 0):
        raise InputError(f"MODEL {name!r} has no classes; expected a classifier")
    return model, prepared_by_timm(model), model.pretrained_cfg.get("label_names")


def labelled(folder: str, model: nn.Module, prepare: Prepare) -> tuple[list[Tensor], Tensor]:
    """Batches of images from a folder of class folders (--test), and the images' classes."""
    found = find_classes(folder)
    if len(found) != model.num_classes:
        raise InputError(f"--test {folder!r} has {len(found)} class folders; expected {model.num_classes}")
    labels = torch.tensor([i for i, files in enumerate(found.values()) for _ in files])
    return prepare([file for files in found.values() for file in files]), labels


def write_checkpoint(file: Path, state: dict[str, Tensor], classes: list[str] | None, **facts: dict) -> None:
    """A checkpoint that `linzoo test`, `predict` and `export` take, with facts about it."""
    meta = {"dataset_meta": {"classes": list(classes)}} if classes else {}
    content = {"state_dict": state, "meta": meta, **facts}
    write_atomically(file, lambda partial: torch.save(content, partial))


@torch.no_grad()
def logits(model: nn.Module, batches: list[Tensor]) -> Tensor:
    """The model's logits ``(images, classes)``."""
    return torch.cat([model(batch) for batch in batches])


def accuracy(found: Tensor, labels: Tensor) -> float:
    """The share of images ``(B, K)`` whose largest logit is that of their class, in percent."""
    return 100 * float((found.argmax(1) == labels).double().mean())


def run(model: nn.Module, batches: list[Tensor], method: str, bits: str, rounding: str | None) -> Quantized:
    """`quantize` with the command's words; InputError if the method does not apply."""
    try:
        return quantize(model, batches, METHODS[method], *BITS[bits], cast(Any, rounding))
    except ValueError as e:
        raise InputError(f"--method {method}: {e}") from e


def compares(args: argparse.Namespace, *given: list) -> bool:
    """Whether an argument was given several values; InputError if --out and --test do not fit that."""
    if several := max(map(len, given)) > 1:
        if args.out or not args.test:
            raise InputError(f"--out {args.out}, --test {args.test}: several are compared; expected only --test")
    elif not args.out:
        raise InputError("--out is missing; expected a folder to write to")
    return several


def compare(args: argparse.Namespace) -> None:
    """Prints every method with every number of bits: the mean over the checkpoints, the least and the largest."""
    found: dict[str, list[tuple[float, float]]] = {}
    combined = list(itertools.product(args.bits, args.method, args.rounding))
    checkpoints, skipped, count = args.checkpoint or [None], {}, 0
    for weights in checkpoints:
        model, prepare, _ = open_model(args.model, weights, args.cfg_options)
        batches = calibration(args.calib, args.images, prepare)
        compared, labels = labelled(args.test, model, prepare)
        expected, count = logits(model, compared), len(labels)
        found.setdefault("float", []).append((accuracy(expected, labels), 0.0))
        for bits, method, rounding in combined:
            try:
                if method not in skipped:
                    result = logits(run(model, batches, method, bits, rounding).model, compared)
                    name = f"{bits}, {method}" + (f", {rounding}" if rounding else "")
                    found.setdefault(name, []).append((accuracy(result, labels), logit_error(result, expected)))
            except InputError as e:
                skipped[method] = str(e)
    for line in skipped.values():
        note(line)
    table = rich.table.Table("weights", "accuracy, %", "logit error", box=rich.box.MARKDOWN)
    for name, values in found.items():
        accuracies, errors = zip(*values, strict=True)
        table.add_row(name, spread(accuracies, 2), spread(errors, 3))
    rich.console.Console(highlight=False, width=120).print(table)
    print(f"over {count} images of {args.test}; mean of {len(checkpoints)} checkpoints (least to largest);")
    print("the error is that of logits over their spread between images")


@command
def main(argv: list[str] | None = None) -> None:
    """Command line of `quantize`: writes DIR/quantized.pth, prints float beside quantised results."""
    parser = argparse.ArgumentParser(
        prog="linzoo quantize", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", nargs="*", help="a weights file of any trainer")
    parser.add_argument("--method", nargs="+", choices=METHODS, default=["mambaquant"], help="default: mambaquant")
    parser.add_argument("--bits", nargs="+", choices=BITS, default=["w8a8"], help="default: w8a8")
    parser.add_argument("--rounding", nargs="+", choices=ROUNDINGS, default=[None], help="default: the method's own")
    parser.add_argument("--calib", required=True, metavar="DIR", help="folder of images to calibrate on")
    parser.add_argument("--images", type=int, default=32, metavar="N", help="how many of them; default: 32")
    parser.add_argument("--test", metavar="DIR", help="folder of class folders to test on; default: --calib's images")
    parser.add_argument("--out", metavar="DIR", help="where to write; not if several are compared")
    add_cfg_options(parser)
    args = parser.parse_args(argv)
    if args.images < 2:
        raise InputError(f"--images {args.images}: expected at least 2")
    if compares(args, args.checkpoint, args.method, args.bits, args.rounding):
        compare(args)
        return
    [method], [bits], [rounding], weights = args.method, args.bits, args.rounding, next(iter(args.checkpoint), None)
    model, prepare, classes = open_model(args.model, weights, args.cfg_options)
    batches = calibration(args.calib, args.images, prepare)
    compared, labels = labelled(args.test, model, prepare) if args.test else (batches, None)
    expected = logits(model, compared)
    quantized = run(model, batches, method, bits, rounding)
    if quantized.left:
        note(f"{len(quantized.left)} scans' x_proj read inputs that are not rounded, such as {quantized.left[0]!r}")
    size = sum(x.numel() * x.element_size() for x in model.state_dict().values())
    results = [logits(quantized.model, compared)]
    state = quantized.state_dict()
    model.load_state_dict(state)
    results.append(logits(model, compared))
    file = Path(args.out, FILE)
    facts = {"method": method, "bits": bits, "rounding": rounding or METHODS[method].rounding(BITS[bits][0])}
    facts |= {"images": args.images, "ranges": quantized.ranges, "simulation": quantized.simulation()}
    write_checkpoint(file, state, classes, quantization=facts)
    table = rich.table.Table("weights", "MB", "logit error", "same class, %", box=rich.box.SIMPLE)
    if labels is not None:
        table.add_column("accuracy, %")
    names = ("float", f"{bits}, simulated", "weights alone")
    sizes = (size, quantized.size(), quantized.size())
    for name, found, nbytes in zip(names, [expected, *results], sizes, strict=True):
        same = accuracy(found, expected.argmax(1))
        cells = [name, f"{nbytes / 1e6:.2f}", f"{logit_error(found, expected):.4f}", f"{same:.2f}"]
        if labels is not None:
            cells.append(f"{accuracy(found, labels):.2f}")
        table.add_row(*cells)
    rich.console.Console(highlight=False).print(table)
    where = f"{len(expected)} images of {args.test}" if args.test else f"the {len(expected)} calibration images"
    print(f"over {where}; the error is that of logits over their spread between images; MB as if packed")
    print(file)


if __name__ == "__main__":
    main()
