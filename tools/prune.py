"""Prune a classifier in one shot: `linzoo prune MODEL [CHECKPOINT] --method dimap --ratio 0.5 --out DIR`.

MODEL is a model's name (`linzoo models`, or timm's), `local-dir:DIR` of a run's export, or one of our configs with its
checkpoint. Projections of mixers and MLPs are pruned. Stems, norms, scans, convolutions and heads are not.

--method: magnitude prunes the smallest weights of each layer. dimap (data-independent module-aware) prunes those that
matter least to their layer's energy, with one threshold per kind of layer. channels prunes whole inner channels of each
part of a block, with every weight that reads or writes them; the family must declare them.

`pruned.pth` is a checkpoint of the same model, with zeros: it is no smaller and no faster. `linzoo test`, `predict` and
`export` take it. `linzoo finetune --weights DIR/pruned.pth` keeps the zeros while it trains; so does --epochs N, which
trains by the config MODEL at a tenth of its learning rate, and tests the last epoch on the config's validation data.

Several checkpoints, methods or ratios are compared on --test; nothing is written then.
"""

import argparse
import contextlib
import copy
import itertools
import json
import sys
import tempfile
from pathlib import Path
from typing import cast

import rich.box
import rich.console
import rich.table
from mmengine.config import Config
from torch import nn

from linzoo.quantization.prune import PRUNINGS, Pruning, prune, sparsity
from linzoo.tools import train
from linzoo.tools.engine.cli import add_cfg_options, command
from linzoo.tools.engine.config import TOP_LEVEL, is_config, load_config
from linzoo.tools.engine.errors import InputError
from linzoo.tools.engine.task import without_start
from linzoo.tools.outliers import logit_error, spread
from linzoo.tools.quantize import accuracy, compares, labelled, logits, open_model, write_checkpoint

FILE = "pruned.pth"


def tune(cfg: Config, pruned: Path, epochs: int, work_dir: Path) -> float:
    """Trains a pruned checkpoint by a config, without losing its zeros; returns the top-1 accuracy in percent."""
    cfg.load_from, cfg.model = str(pruned.resolve()), without_start(cfg.model)
    cfg.train_cfg.update(max_epochs=epochs, val_interval=epochs)
    cfg.optim_wrapper.optimizer.lr *= 0.1
    cfg.param_scheduler = [dict(type="CosineAnnealingLR", T_max=epochs, eta_min=0, convert_to_iter_based=True)]
    cfg.custom_hooks = [*cfg.get("custom_hooks", ()), dict(type="SparseHook", checkpoint=cfg.load_from)]
    file = work_dir / "config.py"
    work_dir.mkdir(parents=True, exist_ok=True)
    file.write_text(Config({key: value for key, value in cfg.items() if key in TOP_LEVEL}).pretty_text)
    with contextlib.redirect_stdout(sys.stderr):
        train.main([str(file), "--work-dir", str(work_dir)])
    return json.loads((work_dir / "export/config.json").read_text())["top1"]


def compare(args: argparse.Namespace) -> None:
    """Prints every method at every ratio: the mean over the checkpoints, the least and the largest."""
    found: dict[str, list[tuple[float, ...]]] = {}
    checkpoints, count = args.checkpoint or [None], 0
    for weights in checkpoints:
        model, prepare, classes = open_model(args.model, weights, args.cfg_options)
        compared, labels = labelled(args.test, model, prepare)
        count = len(labels)
        for what in (None, *itertools.product(args.method, args.ratio)):
            pruned = copy.deepcopy(model)
            names = run(pruned, *what) if what else []
            row = [accuracy(logits(pruned, compared), labels)]
            if args.epochs:
                with tempfile.TemporaryDirectory() as folder:
                    file = Path(folder, FILE)
                    write_checkpoint(file, pruned.state_dict(), classes, pruning={"names": names})
                    row.append(tune(load_config(args.model, args.cfg_options), file, args.epochs, Path(folder, "run")))
            found.setdefault("{}, {:g}".format(*what) if what else "all weights", []).append(tuple(row))
    after = [f"after --epochs {args.epochs}"] * bool(args.epochs)
    table = rich.table.Table("method, ratio", "accuracy, %", *after, box=rich.box.MARKDOWN)
    for name, values in found.items():
        table.add_row(name, *(spread(part, 2) for part in zip(*values, strict=True)))
    rich.console.Console(highlight=False, width=120).print(table)
    print(f"over {count} images of {args.test}; mean of {len(checkpoints)} checkpoints (least to largest)")


def run(model: nn.Module, method: str, ratio: float) -> list[str]:
    """`prune` in place; InputError if the method does not apply."""
    try:
        return prune(model, cast(Pruning, method), ratio)
    except ValueError as e:
        raise InputError(f"--method {method}: {e}") from e


@command
def main(argv: list[str] | None = None) -> None:
    """Command line of `prune`: writes DIR/pruned.pth, prints its zeros and, with --test, its accuracy."""
    parser = argparse.ArgumentParser(
        prog="linzoo prune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", nargs="*", help="a weights file of any trainer")
    parser.add_argument("--method", nargs="+", choices=PRUNINGS, default=["dimap"], help="default: dimap")
    parser.add_argument("--ratio", nargs="+", type=float, required=True, metavar="R", help="share to prune, 0 to 1")
    parser.add_argument("--epochs", type=int, default=0, metavar="N", help="train so long afterwards; default: 0")
    parser.add_argument("--test", metavar="DIR", help="folder of class folders to test on")
    parser.add_argument("--out", metavar="DIR", help="where to write; not if several are compared")
    add_cfg_options(parser)
    args = parser.parse_args(argv)
    if wrong := [ratio for ratio in args.ratio if not 0 < ratio < 1]:
        raise InputError(f"--ratio {wrong[0]:g}: expected more than 0 and less than 1")
    if args.epochs and (args.epochs < 0 or not is_config(args.model)):
        raise InputError(f"--epochs {args.epochs}, MODEL {args.model!r}: expected a positive number and a config")
    if compares(args, args.checkpoint, args.method, args.ratio):
        compare(args)
        return
    [method], [ratio], weights = args.method, args.ratio, next(iter(args.checkpoint), None)
    model, prepare, classes = open_model(args.model, weights, args.cfg_options)
    compared, labels = labelled(args.test, model, prepare) if args.test else ([], None)
    expected = logits(model, compared) if compared else None
    facts = {"method": method, "ratio": ratio, "names": run(model, method, ratio)}
    file = Path(args.out, FILE)
    write_checkpoint(file, model.state_dict(), classes, pruning=facts)
    console = rich.console.Console(highlight=False)
    table = rich.table.Table("layers", "weights", "zeros, %", box=rich.box.SIMPLE)
    for kind, (zeros, count) in sparsity(model).items():
        table.add_row(kind, str(count), f"{100 * zeros / count:.2f}")
    console.print(table)
    if expected is not None and labels is not None:
        table = rich.table.Table("weights", "logit error", "accuracy, %", box=rich.box.SIMPLE)
        for name, found in (("before", expected), (FILE, logits(model, compared))):
            table.add_row(name, f"{logit_error(found, expected):.4f}", f"{accuracy(found, labels):.2f}")
        console.print(table)
        print(f"over {len(expected)} images of {args.test}; the error is that of logits over their spread")
    print(file)
    if args.epochs:
        work_dir = Path(args.out, "trained")
        top1 = tune(load_config(args.model, args.cfg_options), file, args.epochs, work_dir)
        print(f"after --epochs {args.epochs}: {top1:.2f} %")
        print(work_dir / "export/model.safetensors")


if __name__ == "__main__":
    main()
