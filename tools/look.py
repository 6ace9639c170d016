"""Look into a trained model: `linzoo look MODEL [WEIGHTS] --what cam --images IMAGE... --out cam.png`.

MODEL and WEIGHTS are those of `linzoo export`: a model's name, `local-dir:DIR` of a run's export, or one of our configs
with its checkpoint.

cam: the regions of each image that speak for its top class (Grad-CAM of the last layer; `--class` for another class).
erf: the effective receptive field of the last map's centre: how much each pixel of the images changes it.
features: the maps of all stages; colours are the three principal components of their channels.
orders: the scan orders of the operators over the tokens, each drawn once, from dark to light; step by step if --out
ends in .gif.
states: which tokens reach the middle token through a state: how much each one changes an operator's output there.
attention: where the middle token of each softmax attention looks, averaged over the heads.
dynamics: for each selective scan, the signs of the real parts of the eigenvalues of S_C^T S_B. If all are negative,
tokens of a deep model collapse to 0. If one is positive, they diverge, which is better for a model (arXiv 2410.03292).
`linzoo.backbones.layers.definite_projection` makes all of them positive.
"""

import argparse
import io
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import rich.box
import rich.console
import rich.table
import timm.data
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from linzoo.backbones.layers.dynamics import scans_of, state_eigenvalues
from linzoo.backbones.layers.isotropic import token_place
from linzoo.tools.engine.cli import command
from linzoo.tools.engine.errors import InputError
from linzoo.tools.engine.files import write_atomically
from linzoo.tools.engine.images import read_rgb
from linzoo.tools.export import load

FRAMES = 32  # frames of a GIF


class View(NamedTuple):
    """Result of a look: rows with equal keys, and a line that sums them up."""

    rows: list[dict]
    summary: str


def dynamics(model: nn.Module) -> View:
    """The signs of the eigenvalues of each scan's S_C^T S_B."""
    rows = []
    for name, layer in scans_of(model).items():
        for group, values in enumerate(state_eigenvalues(layer)):
            real = values.real
            kind = "convergent" if (real < 0).all() else "divergent"
            signs = {"positive": int((real > 0).sum()), "negative": int((real < 0).sum())}
            ends = {"smallest": real.min().item(), "largest": real.max().item()}
            rows.append({"layer": name, "scan": group, **signs, **ends, "scenario": kind})
    positive, negative = (sum(row[sign] for row in rows) for sign in ("positive", "negative"))
    convergent = sum(row["scenario"] == "convergent" for row in rows)
    return View(
        rows, f"{positive} positive and {negative} negative eigenvalues; {convergent} of {len(rows)} scans converge"
    )


# What can be shown: functions of a model, which raise ValueError if the model has nothing to show.
LOOKS: dict[str, Callable[[nn.Module], View]] = {"dynamics": dynamics}


class Picture(NamedTuple):
    """One picture of a sheet: pixels, or the steps of a scan over a grid of tokens ``(T, 2)``, as rows and columns."""

    title: str
    pixels: np.ndarray | None = None
    way: np.ndarray | None = None
    heat: np.ndarray | None = None  # drawn over the pixels


def maps_of(model: nn.Module, images: Tensor) -> list[Tensor]:
    """The maps ``(B, C, h, w)`` of a model's stages or blocks; InputError if it has none."""
    if not hasattr(model, "forward_intermediates"):
        raise InputError(f"MODEL {type(model).__name__} gives no maps; expected a backbone, such as vmamba_t")
    return model.forward_intermediates(images, intermediates_only=True)


def as_pixels(image: Tensor) -> np.ndarray:
    """A normalised image ``(3, H, W)`` for viewing, scaled from its darkest to its brightest value."""
    low, high = image.min(), image.max()
    return ((image - low) / (high - low).clamp(min=1e-9)).permute(1, 2, 0).numpy()


def cam(model: nn.Module, images: Tensor, target: int | None) -> list[Picture]:
    """Grad-CAM (arXiv 1610.02391) of the last stage or block."""
    try:
        from pytorch_grad_cam import GradCAM
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    except ImportError as e:
        raise InputError(f"--what cam needs grad-cam: pip install 'linzoo[look]' ({e})") from e
    given: list[Any] = []
    name = type(model).__name__
    layer = model.neck if hasattr(model, "neck") else model.get_submodule(model.feature_info[-1]["module"])
    hook = layer.register_forward_hook(lambda module, args, out: given.append(out))
    with torch.no_grad():
        maps, y = maps_of(model, images[:1]), model(images)
    hook.remove()
    if not isinstance(y, Tensor) or y.dim() != 2:
        raise InputError(f"--what cam: {name} gives no classes; expected a classifier")
    if not isinstance(given[-1], Tensor):
        raise InputError(f"--what cam: the last stage of {name} gives several tensors; expected one map")
    if target is not None and not 0 <= target < y.shape[1]:
        raise InputError(f"--class {target}; expected a class from 0 to {y.shape[1] - 1} of MODEL")
    classes = y.argmax(1).tolist() if target is None else [target] * len(images)
    grid = maps[-1].shape[2:]

    def reshape(x: Tensor) -> Tensor:
        """A layer's output as maps ``(B, C, h, w)``."""
        if x.dim() == 3:
            x = model.without_token(x) if hasattr(model, "without_token") else x[:, -math.prod(grid) :]
            x = x.unflatten(1, grid)
        return x.permute(0, 3, 1, 2) if x.shape[1:3] == grid else x

    targets = [ClassifierOutputTarget(c) for c in classes]
    with GradCAM(model=model, target_layers=[layer], reshape_transform=reshape) as found:
        heats = found(input_tensor=images, targets=targets)
    return [
        Picture(f"class {c}", as_pixels(image), heat=heat)
        for image, heat, c in zip(images, heats, classes, strict=True)
    ]


def erf(model: nn.Module, images: Tensor, target: int | None) -> list[Picture]:
    """The effective receptive field (arXiv 1701.04128): the mean over images of ``|d sum_c y_c(centre) / d pixel|``.

    The fourth root of the values, scaled to 0 to 1, is drawn, as is usual: far pixels would be too faint.
    """
    images = images.requires_grad_(True)
    last = maps_of(model, images)[-1]
    (grad,) = torch.autograd.grad(last[:, :, last.shape[2] // 2, last.shape[3] // 2].sum(), images)
    field = grad.abs().sum(1).mean(0)
    field = (field / field.max().clamp(min=1e-30)).numpy()
    share = float((field > 0.01).mean())
    return [Picture(f"{share:.0%} of the pixels above 1 % of the largest", field**0.25)]


def features(model: nn.Module, images: Tensor, target: int | None) -> list[Picture]:
    """Each map's three principal components over its positions, as red, green and blue."""
    pictures = []
    with torch.no_grad():
        maps = maps_of(model, images)
    for i, image in enumerate(images):
        pictures.append(Picture("image", as_pixels(image)))
        for j, y in enumerate(maps):
            places = y[i].flatten(1).T.double()
            places = places - places.mean(0)
            axes = torch.linalg.svd(places, full_matrices=False).Vh[:3]
            colours = (places @ axes.T).T.unflatten(1, y.shape[2:])
            colours = torch.cat([colours, colours.new_zeros(3 - len(colours), *y.shape[2:])])
            pictures.append(Picture(f"map {j}, {y.shape[2]} x {y.shape[3]}", as_pixels(colours)))
    return pictures


class Ways(TorchDispatchMode):
    """Records LinZoo's operators: each scan order by name and number of tokens, and the last call of each."""

    def __init__(self):
        super().__init__()
        self.found: dict[tuple[str, int, bytes], Tensor] = {}
        self.calls: dict[tuple[str, int], tuple[Any, dict[str, Any]]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "linzoo":
            names = [a.name for a in func._schema.arguments]
            named = dict(zip(names, args, strict=False)) | (kwargs or {})
            length = next(x for x in args if isinstance(x, Tensor)).shape[1]
            self.calls[func._opname, length] = func, named
            if isinstance(order := named.get("order"), Tensor):
                groups = func._opname in ("selective_scan", "causal_conv1d")  # each group has its own order
                first = order[0] if order.dim() == 2 + groups else order
                for way in first.reshape(-1, order.shape[-1]).cpu():
                    self.found[func._opname, length, way.numpy().tobytes()] = way
        return func(*args, **(kwargs or {}))


class Queries(TorchFunctionMode):
    """Records the queries and keys ``(B, heads, N, d)``, and the scale, of each softmax attention."""

    def __init__(self):
        super().__init__()
        self.found: list[tuple[Tensor, Tensor, float]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is nn.functional.scaled_dot_product_attention:
            q, k = (kwargs[key] if key in kwargs else args[i] for i, key in enumerate(("query", "key")))
            if not kwargs.get("is_causal") and kwargs.get("attn_mask") is None:
                self.found.append((q, k, kwargs.get("scale") or q.shape[-1] ** -0.5))
        return func(*args, **kwargs)


class TokenMap(NamedTuple):
    """A map as a sequence of tokens: which of them lie on it, row by row; a class token does not."""

    height: int
    width: int
    tokens: list[int]


def token_maps(model: nn.Module, images: Tensor, recorder: Ways | Queries) -> dict[int, TokenMap]:
    """The maps of the first image, by the length of their sequences, after a pass under a recorder."""
    with torch.no_grad():
        found = maps_of(model, images[:1])
        with recorder:
            model(images[:1])
    token, maps = getattr(model, "cls_token", None) is not None, {}
    for height, width in (y.shape[2:] for y in found):
        length = height * width + token
        place = token_place(length, getattr(model, "token_first", True)) if token else None
        maps[length] = TokenMap(height, width, [i for i in range(length) if i != place])
    return maps


def orders(model: nn.Module, images: Tensor, target: int | None) -> list[Picture]:
    """The scan orders of the first image over token maps, without class tokens; other steps are left out."""
    maps, pictures = token_maps(model, images, ways := Ways()), []
    for (name, length, _), way in ways.found.items():
        if length in maps:
            height, width, tokens = maps[length]
            place = {token: i for i, token in enumerate(tokens)}
            steps = np.array([divmod(place[token], width) for token in way.tolist() if token in place])
            pictures.append(Picture(f"{name}, {height} x {width}", way=steps))
    if not pictures:
        raise InputError(f"--what orders: {type(model).__name__} walks along no order over a map of tokens")
    return pictures


def states(model: nn.Module, images: Tensor, target: int | None) -> list[Picture]:
    """For each operator's last call ``|d sum_c y_c(middle) / d x(token)|``, summed over the channels of its values x.

    The middle's own part is cut to the largest of the others; the fourth root of values from 0 to 1 is drawn. Effects
    of tokens on decays and gates do not count. Tokens lie as the operator gets them: ViL reverses every second layer's.
    """
    maps, pictures = token_maps(model, images, ways := Ways()), []
    for (name, length), (func, named) in ways.calls.items():
        values = next((key for key in ("v", "u") if isinstance(named.get(key), Tensor)), "")
        if not values or length not in maps:
            continue
        height, width, tokens = maps[length]
        x = named[values].detach().requires_grad_(True)
        given = func(**(named | {values: x}))
        y = given[0] if isinstance(given, (tuple, list)) else given
        middle = height // 2 * width + width // 2
        (grad,) = torch.autograd.grad(y[0, tokens[middle]].sum(), x)
        reach = grad[0, tokens].abs().flatten(1).sum(1)
        others = torch.cat([reach[:middle], reach[middle + 1 :]]).max()
        reach = (reach / others.clamp(min=1e-30)).clamp(max=1).view(height, width).numpy()
        pictures.append(Picture(f"{name}, {height} x {width}", reach**0.25))
    if not pictures:
        raise InputError(f"--what states: {type(model).__name__} carries no state over a map of tokens")
    return pictures


def attention(model: nn.Module, images: Tensor, target: int | None) -> list[Picture]:
    """``mean over heads of softmax(scale q(middle) k^T)`` of each layer, over the tokens of its map.

    Window attention is drawn if one window covers the map. Causal and masked attention is left out.
    """
    maps, pictures = token_maps(model, images, queries := Queries()), []
    for q, k, scale in queries.found:
        length = q.shape[-2]
        if q.dim() != 4 or len(q) != 1 or k.shape[-2] != length or length not in maps:
            continue
        height, width, tokens = maps[length]
        middle = tokens[height // 2 * width + width // 2]
        weights = (q[0, :, middle, None] @ k[0].transpose(-2, -1) * scale).float().softmax(-1).mean(0)[0, tokens]
        pictures.append(Picture(f"attention, {height} x {width}", weights.view(height, width).numpy()))
    if not pictures:
        raise InputError(f"--what attention: {type(model).__name__} has no softmax attention over a map of tokens")
    return pictures


PICTURES: dict[str, Callable[[nn.Module, Tensor, int | None], list[Picture]]] = {
    "cam": cam,
    "erf": erf,
    "features": features,
    "orders": orders,
    "states": states,
    "attention": attention,
}


def draw(pictures: list[Picture], file: Path) -> None:
    """All pictures side by side, eight per row; as a GIF, the scan orders step by step."""
    if file.suffix.lower() != ".gif":
        write_atomically(file, lambda partial: _sheet(pictures).savefig(partial, format="png", dpi=120))
        return
    frames = []
    for i in range(1, FRAMES + 1):
        cut = [p if p.way is None else p._replace(way=p.way[: -(-len(p.way) * i // FRAMES)]) for p in pictures]
        with io.BytesIO() as memory:
            _sheet(cut, pictures).savefig(memory, format="png", dpi=80)
            frames.append(Image.open(memory).convert("P", palette=Image.Palette.ADAPTIVE))
    times = [80] * (FRAMES - 1) + [1500]
    write_atomically(
        file, lambda p: frames[0].save(p, "GIF", save_all=True, append_images=frames[1:], duration=times, loop=0)
    )


def _sheet(pictures: list[Picture], whole: list[Picture] | None = None) -> Figure:
    """The pictures on one figure; `whole` has the complete orders when `pictures` show only their beginnings."""
    columns = min(8, len(pictures))
    rows = -(-len(pictures) // columns)
    figure = Figure(figsize=(2.2 * columns, 2.4 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes:
        axis.axis("off")
    for axis, picture, all_of_it in zip(axes, pictures, whole or pictures, strict=False):
        axis.set_title(picture.title, fontsize=7)
        if picture.pixels is not None:
            axis.imshow(picture.pixels, cmap="magma" if picture.pixels.ndim == 2 else None)
        if picture.heat is not None:
            axis.imshow(picture.heat, cmap="jet", alpha=0.45)
        if picture.way is not None and all_of_it.way is not None:
            steps = len(all_of_it.way)
            low, high = all_of_it.way.min(0) - 0.5, all_of_it.way.max(0) + 0.5
            axis.plot(*picture.way.T[::-1], color="0.7", linewidth=0.6)
            axis.scatter(
                *picture.way.T[::-1], c=np.arange(len(picture.way)), cmap="viridis", s=6, vmin=0, vmax=steps - 1
            )
            axis.set(aspect="equal", xlim=(low[1], high[1]), ylim=(high[0], low[0]))
    return figure


def read_images(files: list[str], model: nn.Module) -> Tensor:
    """Image files, prepared as in the model's training ``(B, C, H, W)``."""
    settings: Any = timm.data.resolve_data_config(pretrained_cfg=dict(model.pretrained_cfg))
    transform: Any = timm.data.create_transform(**settings)
    return torch.stack([transform(Image.fromarray(read_rgb(file))) for file in files])


@command
def main(argv: list[str] | None = None) -> None:
    """Command line of `look`. Wrong input ends with one line on stderr and status 2."""
    parser = argparse.ArgumentParser(
        prog="linzoo look", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("weights", metavar="WEIGHTS", nargs="?", help="a weights file of any trainer")
    parser.add_argument("--what", choices=[*PICTURES, *LOOKS], required=True)
    parser.add_argument("--images", nargs="+", metavar="IMAGE", help="image files; only `dynamics` needs none")
    parser.add_argument(
        "--class", type=int, dest="target", metavar="N", help="class for cam; default: the model's top class"
    )
    parser.add_argument("--out", help="PNG file, for orders also GIF; default: look_<what>.png")
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of the table")
    args = parser.parse_args(argv)
    if args.what in PICTURES and not args.images:
        raise InputError(f"--what {args.what}: --images is missing; expected image files")
    if str(args.out).lower().endswith(".gif") and args.what != "orders":
        raise InputError(f"--out {args.out!r} with --what {args.what}: expected .png; orders alone move")
    model, _ = load(args.model, args.weights)
    if args.what in PICTURES:
        out = Path(args.out or f"look_{args.what}.png")
        draw(PICTURES[args.what](model, read_images(args.images, model), args.target), out)
        print(out)
        return
    try:
        rows, summary = LOOKS[args.what](model)
    except ValueError as e:  # the model has nothing to show
        raise InputError(f"--what {args.what}: {e}") from e
    if args.json:
        print(json.dumps(rows))
        return
    table = rich.table.Table(box=rich.box.SIMPLE)
    for key, value in rows[0].items():
        table.add_column(key, justify="left" if isinstance(value, str) else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    width = None if sys.stdout.isatty() else 160
    rich.console.Console(highlight=False, width=width).print(table)
    print(summary)


if __name__ == "__main__":
    main()
