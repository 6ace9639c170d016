"""Prune a classifier in one shot: `linzoo prune MODEL [CHECKPOINT] --method dimap --ratio 0.5 --out DIR`.

MODEL is a model's name (`linzoo models`, or timm's), `local-dir:DIR` of a run's export, or one of our configs with its
checkpoint. Projections of mixers and MLPs are pruned. Stems, norms, scans, convolutions and heads are not.

--method: magnitude prunes the smallest weights of each layer. dimap (data-independent module-aware) prunes those that
matter least to their layer's energy, with one threshold per kind of layer. channels prunes whole inner channels of each
part of a block, with every weight that reads or writes them; the family must declare them.

`pruned.pth` is a checkpoint of the same model, with zeros: it is no smaller and no faster. `linzoo test`, `predict` and
`export` take it. `linzoo finetune --weights DIR/pruned.pth` keeps the zeros while it trains.
"""

import argparse
from pathlib import Path

import rich.box
import rich.console
import rich.table

from linzoo.quantization.prune import PRUNINGS, prune, sparsity
from linzoo.tools.engine.cli import command
from linzoo.tools.engine.errors import InputError
from linzoo.tools.outliers import logit_error
from linzoo.tools.quantize import labelled, logits, open_model, write_checkpoint

FILE = "pruned.pth"


@command
def main(argv: list[str] | None = None) -> None:
    """Command line of `prune`: writes DIR/pruned.pth, prints its zeros and, with --test, its accuracy."""
    parser = argparse.ArgumentParser(
        prog="linzoo prune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", nargs="?", help="a weights file of any trainer")
    parser.add_argument("--method", choices=PRUNINGS, default="dimap", help="default: dimap")
    parser.add_argument("--ratio", type=float, required=True, metavar="R", help="share of weights to prune, 0 to 1")
    parser.add_argument("--test", metavar="DIR", help="folder of class folders to test on")
    parser.add_argument("--out", required=True, metavar="DIR")
    args = parser.parse_args(argv)
    if not 0 < args.ratio < 1:
        raise InputError(f"--ratio {args.ratio:g}: expected more than 0 and less than 1")
    model, prepare, classes = open_model(args.model, args.checkpoint)
    compared, labels = labelled(args.test, model, prepare) if args.test else ([], None)
    expected = logits(model, compared) if compared else None
    try:
        names = prune(model, args.method, args.ratio)
    except ValueError as e:
        raise InputError(f"--method {args.method}: {e}") from e
    facts = {"method": args.method, "ratio": args.ratio, "names": names}
    write_checkpoint(Path(args.out, FILE), model.state_dict(), classes, pruning=facts)
    console = rich.console.Console(highlight=False)
    table = rich.table.Table("layers", "weights", "zeros, %", box=rich.box.SIMPLE)
    for kind, (zeros, count) in sparsity(model).items():
        table.add_row(kind, str(count), f"{100 * zeros / count:.2f}")
    console.print(table)
    if expected is not None:
        table = rich.table.Table("weights", "logit error", "accuracy, %", box=rich.box.SIMPLE)
        for name, found in (("before", expected), (FILE, logits(model, compared))):
            accuracy = 100 * (found.argmax(1) == labels).double().mean()
            table.add_row(name, f"{logit_error(found, expected):.4f}", f"{accuracy:.2f}")
        console.print(table)
        print(f"over {len(expected)} images of {args.test}; the error is that of logits over their spread")
    print(Path(args.out, FILE))


if __name__ == "__main__":
    main()
