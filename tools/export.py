"""Write a model for other programs: `linzoo export MODEL [WEIGHTS] --format onnx --out DIR`.

--format:
onnx: a file that ONNX Runtime and similar engines run without LinZoo or torch.
torch: an archive of torch.export, with our operators.
aoti: a package of AOTInductor for this processor, with our kernels: PyTorch runs it without LinZoo.
qdq: ONNX with 8-bit weights and inputs of linear maps and convolutions, calibrated on the images of `--calib DIR`.

MODEL is a model's name (`linzoo models`, or timm's), `local-dir:DIR` of a run's export, or one of our configs with its
checkpoint as WEIGHTS. The file is compared with the model at the size of the trace and, if axes are dynamic, at another
size. A difference beyond the tolerance ends with status 1. qdq has no tolerance: its error on the calibration images is
printed.
"""

import argparse
import functools
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import rich.box
import rich.console
import rich.table
import timm
import torch
from mmengine.model import revert_sync_batchnorm
from timm.data import resolve_data_config
from torch import Tensor, nn

from linzoo.backbones import kind_of
from linzoo.backbones.layers.s4 import DiagonalKernel, LowRankKernel
from linzoo.backbones.layers.s5 import DiagonalSystem
from linzoo.ops import use_backend
from linzoo.ops.aoti import linked
from linzoo.quantization.integer import per_group, qdq
from linzoo.tools.engine.calibration import calibration, prepared_by_timm
from linzoo.tools.engine.cli import command
from linzoo.tools.engine.config import is_config, load_config, task_of
from linzoo.tools.engine.errors import InputError, did_you_mean, note
from linzoo.tools.engine.files import write_atomically
from linzoo.tools.engine.task import build
from linzoo.tools.engine.weights import create_model, load_weights
from linzoo.tools.outliers import logit_error

AXES = ("batch", "depth", "height", "width")  # depth only for volumes
KINDS = (None, "backbone", "adopted", "pyramid", "segmentation", "restoration", "fixed", "volume")  # take images alone
VOLUME = 64  # default side of exported volumes
SCANS = {"loop": "export", "chunked": "export_chunked"}  # backends, by --scan
COMPLEX = (DiagonalKernel, DiagonalSystem, LowRankKernel)  # ONNX has few operations on their complex numbers
TOLERANCE = 1e-3  # relative to the outputs' standard deviation


def load(name: str, weights: str | None) -> tuple[nn.Module, dict]:
    """A model in eval mode, and timm's data config: `input_size` (C, H, W), `mean` and `std` of its images."""
    if is_config(name):
        cfg = load_config(name)
        if weights is None:
            raise InputError(f"MODEL {name!r} is a config: WEIGHTS is missing; expected its checkpoint")
        task, built = task_of(cfg), revert_sync_batchnorm(build(cfg))
        model = task.exported(built, cfg)
        load_weights(task.weights(built), weights)
    elif ":" in name and not name.startswith("local-dir:"):
        raise InputError(f"MODEL {name!r}: expected a name, local-dir:DIR, or a config")
    else:
        base = name.partition(".")[0]
        if ":" not in name and not timm.is_model(base):
            raise InputError(f"MODEL {name!r}: no such model in timm or LinZoo{did_you_mean(base, timm.list_models())}")
        own = ":" in name or "." in name  # a run's export, or a tag for published weights
        if own and weights:
            raise InputError(f"WEIGHTS {weights!r}: MODEL {name!r} has weights of its own; expected one of the two")
        if not own and weights is None:
            note(f"no WEIGHTS: those of {name!r} are random")
        made = timm.create_model if ":" in name else create_model
        model = made(name, pretrained=True if own else weights or False)
    return model.eval(), resolve_data_config(pretrained_cfg=dict(model.pretrained_cfg))


def to_onnx(
    model: nn.Module, x: Tensor, dynamic: dict, file: Path, scan: str = "loop"
) -> Callable[[Tensor], Sequence[Tensor]]:
    """Write an ONNX file with scans of a form in `SCANS`; returns how ONNX Runtime runs it."""
    import onnxruntime  # noqa: F401  # the optional part `export`: missed before the tracer runs, not after
    from onnxscript import rewriter

    # For each node, the rule for pairs of slices looks at the whole graph: 20 minutes for HRVMamba's.
    rules = tuple(rule for rule in getattr(rewriter, "_DEFAULT_REWRITE_RULES", ()) if rule.name != "SlicesSplit")
    fast = mock.patch.object(rewriter, "_DEFAULT_REWRITE_RULES", rules, create=True)
    with use_backend(SCANS[scan]), torch.no_grad(), fast:
        if any(isinstance(layer, COMPLEX) for layer in model.modules()):
            model = _fold_constants(torch.export.export(model, (x,), dynamic_shapes=(dynamic,)))
        program = torch.onnx.export(model, (x,), dynamic_shapes=(dynamic,), dynamo=True, verbose=False)
    write_atomically(file, lambda partial: program.save(partial))
    return _onnx_runtime(file)


def _fold_constants(program: torch.export.ExportedProgram) -> torch.fx.GraphModule:
    """The program as a module in which whatever the inputs do not reach is a constant.

    So kernels and gains that layers compute of weights, in complex numbers, need not be written.
    """
    module, constants = program.module(), {}
    nodes = list(module.graph.nodes)
    for node in nodes:
        if node.op == "get_attr":
            value = functools.reduce(getattr, node.target.split("."), module)
            if isinstance(value, Tensor):
                constants[node] = value
        elif node.op == "call_function" and all(x in constants for x in node.all_input_nodes):
            if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
                continue
            args, named = torch.fx.node.map_arg((node.args, node.kwargs), constants.get)
            constants[node] = node.target(*args, **named)
    for node in nodes:
        if isinstance(constants.get(node), Tensor) and any(user not in constants for user in node.users):
            module.register_buffer(name := f"folded_{node.name}", constants[node])
            with module.graph.inserting_before(node):
                read = module.graph.get_attr(name)
            node.replace_all_uses_with(read, delete_user_cb=lambda user: user not in constants)
    for node in reversed(nodes):
        if node in constants and not node.users:
            module.graph.erase_node(node)
    module.recompile()
    module.training = False  # of a program's module, `eval` is forbidden
    return module


def _onnx_runtime(file: Path) -> Callable[[Tensor], Sequence[Tensor]]:
    """How ONNX Runtime runs a file, on as many threads as torch."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file, options)
    [entry] = session.get_inputs()
    return lambda x: [torch.from_numpy(y) for y in session.run(None, {entry.name: x.numpy()})]


def to_torch(model: nn.Module, x: Tensor, dynamic: dict, file: Path) -> Callable[[Tensor], Sequence[Tensor]]:
    """Write a torch.export archive, which keeps our operators; returns how torch runs it."""
    program = torch.export.export(model, (x,), dynamic_shapes=(dynamic,))

    def write(partial: Path) -> None:
        with open(partial, "wb") as archive:
            torch.export.save(program, archive)

    write_atomically(file, write)
    made = torch.export.load(str(file)).module()
    return lambda x: _as_list(made(x))


def to_aoti(model: nn.Module, x: Tensor, dynamic: dict, file: Path) -> Callable[[Tensor], Sequence[Tensor]]:
    """Write an AOTInductor package, which holds our kernels; returns how torch runs it."""
    from torch._inductor import aoti_compile_and_package, aoti_load_package

    with use_backend("aoti"), torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=(dynamic,))
    with linked(program) as configs, TemporaryDirectory() as folder:
        package = aoti_compile_and_package(program, package_path=f"{folder}/{file.name}", inductor_configs=configs)
        write_atomically(file, lambda partial: shutil.copyfile(package, partial))
    made = aoti_load_package(str(file))
    return lambda x: _as_list(made(x))


def to_qdq(model: nn.Module, batches: list[Tensor], dynamic: dict, file: Path) -> Callable[[Tensor], Sequence[Tensor]]:
    """Write an 8-bit ONNX file, calibrated on batches ``(B, C, H, W)``; returns how ONNX Runtime runs it."""
    with TemporaryDirectory() as folder:
        plain = Path(folder, file.name)
        to_onnx(per_group(model), batches[0][:2], dynamic, plain)
        write_atomically(file, lambda partial: qdq(plain, batches, partial))
    return _onnx_runtime(file)


def _as_list(y: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [y] if isinstance(y, Tensor) else list(y)


FORMATS: dict[str, tuple[Callable, str]] = {
    "onnx": (to_onnx, "model.onnx"),
    "torch": (to_torch, "model.pt2"),
    "aoti": (to_aoti, "model_aoti.pt2"),
    "qdq": (to_qdq, "model_int8.onnx"),
}


def compare(run: Callable, model: nn.Module, x: Tensor) -> tuple[float, float, float]:
    """Largest error over the standard deviation of each output; seconds taken by the file and by the model."""
    with torch.inference_mode():
        run(x)
        model(x)
        begin = time.perf_counter()
        expected = _as_list(model(x))
        middle = time.perf_counter()
        found = run(x)
        end = time.perf_counter()
    errors = [float((a - b).abs().max() / b.std().clamp(min=1e-12)) for a, b in zip(found, expected, strict=True)]
    return max(errors), end - middle, middle - begin


@command
def main(argv: list[str] | None = None) -> None:
    """Command line of `export`. Wrong input ends with a line on stderr and status 2, a wrong file with status 1."""
    parser = argparse.ArgumentParser(
        prog="linzoo export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("weights", metavar="WEIGHTS", nargs="?", help="a weights file of any trainer")
    parser.add_argument("--format", choices=FORMATS, default="onnx")
    parser.add_argument(
        "--size", type=int, nargs="+", metavar="N", help="H W, or D H W for volumes; default: the model's own"
    )
    parser.add_argument(
        "--dynamic", default="batch", help="dynamic axes, from batch,depth,height,width; default: batch"
    )
    parser.add_argument("--scan", choices=SCANS, default="loop", help="onnx: form of scans; chunked: for a fixed size")
    parser.add_argument("--calib", metavar="DIR", help="qdq: folder of images to calibrate on")
    parser.add_argument("--images", type=int, default=32, metavar="N", help="qdq: how many of them; default: 32")
    parser.add_argument("--out", required=True, help="folder")
    args = parser.parse_args(argv)
    integers = args.format == "qdq"
    if integers != (args.calib is not None):
        raise InputError(f"--calib {args.calib}: expected a folder with --format qdq, and with it alone")
    if args.images < 2:
        raise InputError(f"--images {args.images}: expected at least 2")
    model, data = load(args.model, args.weights)
    channels, *own = data["input_size"]
    kind = kind_of(model.pretrained_cfg["architecture"])
    if kind not in KINDS:
        raise InputError(f"MODEL {args.model!r} is of kind {kind!r}; expected one that takes images or volumes alone")
    if kind == "volume":
        if integers:
            raise InputError(f"MODEL {args.model!r} takes volumes; expected one of images for --format qdq")
        channels, own = model.in_chans, [VOLUME] * 3
    axes = {"batch": 0} | {axis: 2 + i for i, axis in enumerate(AXES[-len(own) :])}
    asked = [axis for axis in args.dynamic.split(",") if axis]
    if unknown := sorted(set(asked) - set(axes)):
        raise InputError(f"--dynamic {args.dynamic}: unknown axis {unknown[0]!r}; expected some of {','.join(axes)}")
    size = args.size or own
    if len(size) != len(own) or min(size) < 1:
        raise InputError(f"--size {' '.join(map(str, size))}: expected {len(own)} positive numbers")
    if args.scan == "chunked" and (args.format != "onnx" or set(asked) - {"batch"}):
        raise InputError("--scan chunked: expected --format onnx, with --dynamic batch or none, as the size is fixed")
    fixed = model.pretrained_cfg.get("fixed_input_size")
    if fixed and (size != own or {"height", "width"} & set(asked)):
        raise InputError(
            f"MODEL {args.model!r} takes {own[0]} x {own[1]} alone; expected that --size, and --dynamic batch"
        )
    x = torch.randn(2, channels, *size)
    try:
        with torch.inference_mode():
            model(x)
    except (RuntimeError, ValueError, AssertionError) as e:
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise InputError(f"--size {' '.join(map(str, size))}: MODEL {args.model!r} does not take it ({reason})") from e
    batches = calibration(args.calib, args.images, prepared_by_timm(model, size)) if integers else []
    x = batches[0][:2] if batches else x
    hint = "; try --dynamic batch" if set(asked) - {"batch"} else ""
    write, file_name = FORMATS[args.format]
    file = Path(args.out, file_name)
    begin = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            form = {"scan": args.scan} if args.format == "onnx" else {}
            run = write(model, batches or x, {axes[axis]: torch.export.Dim.AUTO for axis in asked}, file, **form)
    except ImportError as e:
        raise InputError(f"--format {args.format} needs the export part: `pip install 'linzoo[export]'` ({e})") from e
    except Exception as e:  # a tracer may raise anything
        reason = (str(e).strip().splitlines() or [""])[0]
        raise InputError(
            f"MODEL {args.model!r} cannot be written as {args.format}: {type(e).__name__}: {reason}{hint}"
        ) from e
    seconds = time.perf_counter() - begin
    table = rich.table.Table("images", "max error / std", "file, s", "model, s", box=rich.box.SIMPLE)
    other = [3 if "batch" in asked else 2, channels]
    other += [side + 64 if axis in asked else side for axis, side in zip(AXES[-len(size) :], size, strict=True)]
    wrong = []
    for images in [x, torch.randn(other)] if asked else [x]:
        try:
            error, theirs, ours = compare(run, model, images)
        except Exception as e:  # the runtime may raise anything
            raise InputError(
                f"{str(file)!r} does not run on {tuple(images.shape)}, which --dynamic {args.dynamic} asks for: "
                f"{(str(e).strip().splitlines() or [type(e).__name__])[0]}{hint}"
            ) from e
        table.add_row(" x ".join(map(str, images.shape)), f"{error:.1e}", f"{theirs:.3f}", f"{ours:.3f}")
        wrong += [error] if not (integers or error <= TOLERANCE) else []
    rich.console.Console(highlight=False).print(table)
    if integers:
        with torch.inference_mode():
            found, expected = (torch.cat([_as_list(f(b))[0] for b in batches]) for f in (run, model))
        same = f", same class {100 * (found.argmax(1) == expected.argmax(1)).double().mean():.1f} %"
        print(f"over {len(found)} calibration images: error {logit_error(found, expected):.3f} of their spread", end="")
        print(same if found.dim() == 2 else "")
    if kind != "volume":
        mean, std = (" ".join(f"{x:.4g}" for x in data[key]) for key in ("mean", "std"))
        order = model.pretrained_cfg.get("order", "RGB")
        print(f"images: {order} pixels from 0 to 1, less the mean {mean}, divided by {std}")
    print(f"{file}: written in {seconds:.0f} s" + ("" if integers else f"; tolerance {TOLERANCE:g}"))
    if wrong:
        print(f"error: {str(file)!r} is off by {max(wrong):.1e} of the outputs' deviation", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
