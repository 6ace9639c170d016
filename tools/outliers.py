"""Quantisation methods side by side, on a Vim with outliers planted in its channels.

The weights are random. Some rows are enlarged, and the weights that read them are reduced: in each block 6 of the
gate's rows (x40) and 2 of the step sizes' narrow vector (x20). 4 rows of the patch embedding are enlarged too (x40).
These outliers depend on the token, because constant ones would not tell methods apart. Scikit-learn's handwritten
digits at 224 px calibrate (4) and test (8) it. Layer inputs have 8 bits.

The error is that of the logits, divided by their spread between images. At 1 the model says nothing about the image.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence

import rich.box
import rich.console
import rich.table
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linzoo.quantization.quantize import hadamard_online, hadamard_only, mambaquant, minmax, quantize, smooth
from linzoo.tools.engine.cli import command
from linzoo.tools.engine.errors import InputError
from linzoo.tools.engine.weights import create_model

METHODS = {
    "naive": minmax,
    "Hadamard in the weights": hadamard_only,
    "Hadamard, online too": hadamard_online,
    "smooth": smooth,
    "smooth, KLT and online Hadamard": mambaquant,
}
CALIBRATION, TEST = 4, 8  # images


@torch.no_grad()
def plant(model: nn.Module, seed: int) -> None:
    """Outliers in the channels of a Vim, in place."""
    generator = torch.Generator().manual_seed(seed)

    def some(count: int, size: int) -> Tensor:
        return torch.randperm(size, generator=generator)[:count]

    model.get_parameter("patch_embed.weight")[some(4, model.num_features)] *= 40
    for block in model.blocks:
        mixer = block.mixer
        inner, rank = mixer.s6.dim, mixer.s6.dt_rank
        gates = some(6, inner)
        mixer.in_proj.weight[inner + gates] *= 40
        mixer.out_proj.weight[:, gates] /= 40
        steps = some(2, rank)
        mixer.s6.x_proj[:, steps] *= 20
        mixer.s6.dt_weight[:, :, steps] /= 20


def digits(count: int, size: int, seed: int) -> Tensor:
    """Some of scikit-learn's handwritten digits ``(count, 3, size, size)``, from -1 to 1."""
    from sklearn.datasets import load_digits

    images = torch.from_numpy(load_digits().images).float().div(8).sub(1)
    chosen = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:count]]
    return F.interpolate(chosen.unsqueeze(1), size=(size, size), mode="bicubic").clamp(-1, 1).expand(-1, 3, -1, -1)


def logit_error(found: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference, divided by that of the spread between images, for logits ``(B, K)``."""
    spread = (expected - expected.mean(0)).square().mean().sqrt()
    return float((found - expected).square().mean().sqrt() / spread)


def spread(values: Sequence[float], digits: int) -> str:
    """The mean, and if there are several values the least and the largest in brackets."""
    mean, *ends = (f"{x:.{digits}f}" for x in (statistics.mean(values), min(values), max(values)))
    return f"{mean} ({' to '.join(ends)})" if len(values) > 1 else mean


@torch.no_grad()
def errors(seed: int, weight_bits: int, model_name: str = "vim_t", size: int = 224, **kwargs) -> dict[str, float]:
    """The error of every method, for one seed of weights, outliers and images.

    Args:
        weight_bits: 8 or 4; layer inputs have 8.
        kwargs: Passed to the model.
    """
    torch.manual_seed(seed)
    model = create_model(model_name, **kwargs).eval()
    plant(model, seed)
    images = digits(CALIBRATION + TEST, size, seed)
    calibration, test = images[:CALIBRATION], images[CALIBRATION:]
    expected = model(test)
    found = {name: quantize(model, [calibration], method, weight_bits) for name, method in METHODS.items()}
    return {name: logit_error(quantized.model(test), expected) for name, quantized in found.items()}


@command
def main(argv: list[str] | None = None) -> None:
    """Command line of `outliers`."""
    parser = argparse.ArgumentParser(
        prog="linzoo outliers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5, help="number of models, each with its own outliers and images")
    parser.add_argument("--weight-bits", type=int, nargs="+", choices=(4, 8), default=[8, 4])
    parser.add_argument("--json", action="store_true", help="print the errors of every seed")
    args = parser.parse_args(argv)
    if args.seeds < 1:
        raise InputError(f"--seeds {args.seeds}: expected at least 1")
    begin = time.perf_counter()
    rows = {
        f"W{bits}A8": [errors(seed, bits) for seed in range(args.seeds)] for bits in dict.fromkeys(args.weight_bits)
    }
    if args.json:
        print(json.dumps(rows))
        return
    table = rich.table.Table("method", *rows, box=rich.box.SIMPLE)
    for name in METHODS:
        table.add_row(name, *(spread([row[name] for row in found], 3) for found in rows.values()))
    rich.console.Console(highlight=False).print(table)
    print(f"error of logits over their spread between images, mean (least to largest) of {args.seeds} seeds; ", end="")
    print(f"{time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
