"""Label, segment or restore images, or find objects: `python tools/predict.py CONFIG CHECKPOINT IMAGE --out DIR`."""

import json
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.device import get_device
from mmengine.registry import MODELS, DefaultScope
from PIL import Image
from torch.nn import functional as F

from linzoo.tools.engine.cli import command, config_parser
from linzoo.tools.engine.config import load_config, without_start
from linzoo.tools.engine.data import EXTENSIONS
from linzoo.tools.engine.dense import predict_dense
from linzoo.tools.engine.errors import InputError, existing_file
from linzoo.tools.engine.restorer import RANGES, read_image, restore_tiled
from linzoo.tools.engine.runner import write_atomically
from linzoo.tools.engine.weights import load_parts, load_weights

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

SHEET = 64


def find_images(path: str) -> list[Path]:
    """The image at `path`, or every image below the folder `path`, sorted."""
    if not Path(path).exists():
        raise InputError(f"image {path!r}: no such file or folder; expected an image or a folder of images")
    if Path(path).is_file():
        return [Path(path)]
    images = sorted(p for p in Path(path).rglob("*") if p.suffix.lower() in EXTENSIONS)
    if not images:
        raise InputError(f"image folder {path!r} holds no image; expected files ending in {', '.join(EXTENSIONS)}")
    return images


def check_readable(images: list[Path]) -> None:
    """InputError for the first image that cannot be read whole."""
    for path in images:
        try:
            with Image.open(path) as image:
                image.load()
        except (OSError, SyntaxError, ValueError) as e:
            raise InputError(f"cannot read image {str(path)!r}; expected a whole image file ({e})") from e


def build(cfg: Config) -> torch.nn.Module:
    """The model of a training config, with nothing to start or learn from loaded."""
    with DefaultScope.overwrite_default_scope(cfg.get("default_scope")):
        return MODELS.build({"data_preprocessor": cfg.get("data_preprocessor"), **without_start(cfg.model)})


def predict(cfg: Config, checkpoint: str, images: list[Path], batch_size: int = 32) -> list[dict]:
    """Label images with a model.

    Args:
        cfg: training config; its test pipeline prepares the images.
        checkpoint: .pth of train.py, or .safetensors.
        images: paths.
        batch_size: images a forward pass takes.

    Returns:
        for each image its path, label, confidence (softmax) and the five likeliest labels with their confidences.
    """
    from mmpretrain.apis import ImageClassificationInferencer

    model = build(cfg)
    classes = load_weights(model.model, checkpoint)
    classes = classes or [str(i) for i in range(model.model.num_classes)]
    model._config = cfg
    inferencer = ImageClassificationInferencer(model, device=get_device(), classes=classes)
    check_readable(images)
    predictions = []
    for batch in inferencer.preprocess([str(path) for path in images], batch_size):
        predictions += inferencer.forward(batch)
    results = []
    for path, result in zip(images, inferencer.postprocess(predictions, None), strict=True):
        scores = result["pred_scores"]
        top5 = [{"label": classes[i], "confidence": float(scores[i])} for i in scores.argsort()[::-1][:5]]
        results.append(dict(path=str(path), **top5[0], top5=top5))
    return results


def predict_masks(cfg: Config, checkpoint: str, images: list[Path], batch_size: int = 32) -> list[np.ndarray]:
    """Find masks with a model.

    Args:
        cfg: training config; its test pipeline, but for the true masks, prepares the images.
        checkpoint: .pth of train.py, or .safetensors.
        images: paths.
        batch_size: images a forward pass takes.

    Returns:
        for each image its mask (H, W) of 0 and 255, as large as the image: where the probability, interpolated from
        the model's map, is at least 0.5.
    """
    model = build(cfg)
    load_weights(model.model, checkpoint)
    model.to(get_device()).eval()
    check_readable(images)
    with DefaultScope.overwrite_default_scope(cfg.get("default_scope")):
        pipeline = Compose([step for step in cfg.test_dataloader.dataset.pipeline if step.type != "LoadMask"])
    masks = []
    for start in range(0, len(images), batch_size):
        batch = [_prepare(pipeline, path) for path in images[start : start + batch_size]]
        with torch.inference_mode():
            for sample in model.test_step(pseudo_collate(batch)):
                p = F.interpolate(sample.seg_logits.data.sigmoid()[None], sample.ori_shape, mode="bilinear")
                masks.append((p[0, 0] >= 0.5).to("cpu", torch.uint8).numpy() * 255)
    return masks


def predict_parts(cfg: Config, checkpoint: str, images: list[Path], folder: Path, out: Path, threshold: float) -> list:
    """`predict_dense` with the model of a config of mmseg or mmdet and the weights of a checkpoint."""
    model = build(cfg)
    load_parts(model, checkpoint)
    model.to(get_device()).eval()
    check_readable(images)
    return predict_dense(cfg, model, images, folder, out, threshold)


def _prepare(pipeline: Compose, path: Path) -> dict:
    try:
        return pipeline({"img_path": str(path)})
    except AssertionError as e:  # Rerange, on an image of a single value
        raise InputError(f"image {str(path)!r} cannot be prepared; expected one that is not blank") from e


def write_masks(masks: list[np.ndarray], images: list[Path], folder: Path, out: Path) -> list[dict]:
    """Write masks as PNG files below `out/masks`, named and placed as their images below `folder`.

    Returns:
        for each image its path, its mask's path and the mask's share of its pixels.
    """
    files = [out / "masks" / image.relative_to(folder).with_suffix(".png") for image in images]
    owners = dict(zip(files, images, strict=True))
    if len(owners) < len(images):
        twin = next(image for file, image in zip(files, images, strict=True) if owners[file] != image)
        raise InputError(f"image {str(twin)!r}: another one has its name; expected one image a name")
    results = []
    for mask, image, file in zip(masks, images, files, strict=True):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, lambda partial, mask=mask: Image.fromarray(mask).save(partial, format="png"))
        results.append({"path": str(image), "mask": str(file), "share": float((mask > 0).mean())})
    return results


def restore(cfg: Config, checkpoint: str, images: list[Path], folder: Path, out: Path, tile: int, overlap: int) -> list:
    """Restore images with a model, and write them below `out/restored`, named and placed as below `folder`.

    Images of 8 or 16 bits become PNG files of as many, float32 images TIFF files. Each is written whole or not at all.

    Args:
        cfg: training config.
        checkpoint: .pth of train.py, or .safetensors.
        images: paths.
        tile, overlap: of `restore_tiled`.

    Returns:
        for each image its path and the restored one's.
    """
    model = build(cfg)
    load_weights(model.model, checkpoint)
    model.to(get_device()).eval()
    results = []
    for path in images:
        image = read_image(path, model.model.in_chans)
        with torch.inference_mode():
            restored = restore_tiled(model.model, image.to(get_device()), tile, overlap).cpu()
        with Image.open(path) as file:
            dtype = np.asarray(file).dtype
        whole = RANGES.get(dtype, 65535 if dtype.kind in "iu" else 0)  # 0: floats
        pixels = restored.permute(1, 2, 0).squeeze(-1).numpy()
        if whole:
            pixels = (pixels.clip(0, 1) * whole).round().astype(np.uint8 if whole == 255 else np.uint16)
        kind = "png" if whole else "tiff"
        target = out / "restored" / path.relative_to(folder).with_suffix(f".{kind}")
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(target, lambda partial, p=pixels, k=kind: Image.fromarray(p).save(partial, format=k))
        results.append({"path": str(path), "restored": str(target)})
    return results


def draw_restored(results: list[dict], file: Path) -> None:
    """A contact sheet of up to 8 images beside their restored ones."""
    shown = results[:: -(-len(results) // 8)]
    figure, axes = plt.subplots(len(shown), 2, figsize=(6, 3 * len(shown)), squeeze=False, layout="constrained")
    for line, result in zip(axes, shown, strict=True):
        for axis, key in zip(line, ("path", "restored"), strict=True):
            axis.axis("off")
            with Image.open(result[key]) as image:
                axis.imshow(np.asarray(image), cmap="gray")
    axes[0][0].set_title("before")
    axes[0][1].set_title("after")
    write_atomically(file, lambda partial: figure.savefig(partial, format="png", dpi=100))
    plt.close(figure)


def draw_labels(results: list[dict], file: Path) -> None:
    """A contact sheet with labels and confidences; red where the image's folder names another class."""
    names = {top["label"] for result in results for top in result["top5"]}

    def draw(axis, result):
        folder = Path(result["path"]).parent.name
        color = "crimson" if folder in names and folder != result["label"] else "black"
        axis.set_title(f"{result['label']}  {result['confidence']:.0%}", fontsize=10, color=color)

    _draw_sheet(results, file, draw)


def draw_drawn(results: list[dict], file: Path) -> None:
    """A contact sheet of the pictures of what was found."""
    _draw_sheet([dict(path=result["drawn"]) for result in results], file, lambda axis, result: None)


def draw_outlines(results: list[dict], file: Path) -> None:
    """A contact sheet with the outline of each image's mask and its share of the image."""

    def draw(axis, result):
        with Image.open(result["mask"]) as mask:
            inside = np.pad(np.asarray(mask) > 0, 1)  # an outline closes at the image's edge
        if inside.any():
            height, width = inside.shape
            axis.contour(range(-1, width - 1), range(-1, height - 1), inside, [0.5], colors="cyan", linewidths=1)
        axis.set_title(f"{result['share']:.1%}", fontsize=10)

    _draw_sheet(results, file, draw)


def _draw_sheet(results: list[dict], file: Path, draw: Callable) -> None:
    """A picture of up to 64 images; `draw(axis, result)` adds what was found in one."""
    shown = results[:: -(-len(results) // SHEET)]
    columns = min(8, len(shown))
    rows = -(-len(shown) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(1.5 * columns, 1.75 * rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat:
        axis.axis("off")
    for axis, result in zip(axes.flat, shown, strict=False):
        with Image.open(result["path"]) as image:
            axis.imshow(image.convert("RGB"))
        draw(axis, result)
    write_atomically(file, lambda partial: figure.savefig(partial, format="png", dpi=100))
    plt.close(figure)


@command
def main(argv: list[str] | None = None) -> None:
    """Command line of `predict`: writes predictions.json, a contact sheet predictions.png, masks or images to DIR."""
    parser = config_parser(__doc__)
    parser.add_argument("checkpoint", help=".pth of train.py, or .safetensors")
    parser.add_argument("image", help="image, or folder of images")
    parser.add_argument("--out", required=True, help="folder for predictions.json, predictions.png, masks and images")
    parser.add_argument("--tile", type=int, default=256, help="side of the tiles in which images are restored")
    parser.add_argument("--threshold", type=float, default=0.5, help="score under which objects are left out")
    parser.add_argument("--overlap", type=int, default=32, help="by how much those tiles overlap")
    args = parser.parse_args(argv)

    cfg = load_config(args.config, args.cfg_options)
    existing_file("checkpoint", args.checkpoint)
    images, out = find_images(args.image), Path(args.out)
    folder = Path(args.image) if Path(args.image).is_dir() else Path(args.image).parent
    if cfg.model.type == "SceneCompleter":
        raise InputError(f"model_name={cfg.model.model_name!r} takes voxels, not images; expected a model of images")
    if cfg.model.type == "PromptSegmenter":
        raise InputError(f"model_name={cfg.model.model_name!r} needs points or boxes; expected its predict() in Python")
    if hasattr(cfg.model, "backbone"):
        results, draw_sheet = predict_parts(cfg, args.checkpoint, images, folder, out, args.threshold), draw_drawn
    elif cfg.model.type == "Restorer":
        results, draw_sheet = restore(cfg, args.checkpoint, images, folder, out, args.tile, args.overlap), draw_restored
    elif cfg.model.type == "Segmenter":
        masks = predict_masks(cfg, args.checkpoint, images)
        results, draw_sheet = write_masks(masks, images, folder, out), draw_outlines
    else:
        results, draw_sheet = predict(cfg, args.checkpoint, images), draw_labels
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "predictions.json", lambda partial: partial.write_text(json.dumps(results, indent=1)))
    draw_sheet(results, out / "predictions.png")
    print(out / "predictions.json")
    print(out / "predictions.png")


if __name__ == "__main__":
    main()
