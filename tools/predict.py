"""Label images: `python tools/predict.py CONFIG CHECKPOINT IMAGE|FOLDER --out DIR`."""

import json
from pathlib import Path

import matplotlib
from mmengine.config import Config
from mmengine.device import get_device
from PIL import Image

from linzoo.tools.engine.cli import command, config_parser
from linzoo.tools.engine.config import load_config
from linzoo.tools.engine.data import EXTENSIONS
from linzoo.tools.engine.errors import InputError, existing_file
from linzoo.tools.engine.runner import write_atomically
from linzoo.tools.engine.weights import load_weights

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
    from mmpretrain.registry import MODELS

    settings = dict(cfg.model, pretrained=False, distillation="none", data_preprocessor=cfg.get("data_preprocessor"))
    model = MODELS.build(settings)
    classes = load_weights(model.model, checkpoint)
    classes = classes or [str(i) for i in range(model.model.num_classes)]
    model._config = cfg
    inferencer = ImageClassificationInferencer(model, device=get_device(), classes=classes)
    for path in images:
        try:
            with Image.open(path) as image:
                image.load()
        except (OSError, SyntaxError, ValueError) as e:
            raise InputError(f"cannot read image {str(path)!r}; expected a whole image file ({e})") from e
    predictions = []
    for batch in inferencer.preprocess([str(path) for path in images], batch_size):
        predictions += inferencer.forward(batch)
    results = []
    for path, result in zip(images, inferencer.postprocess(predictions, None), strict=True):
        scores = result["pred_scores"]
        top5 = [{"label": classes[i], "confidence": float(scores[i])} for i in scores.argsort()[::-1][:5]]
        results.append(dict(path=str(path), **top5[0], top5=top5))
    return results


def draw_sheet(results: list[dict], file: Path) -> None:
    """A picture of up to 64 images with labels and confidences; red where the image's folder names another class."""
    shown = results[:: -(-len(results) // SHEET)]
    names = {top["label"] for result in results for top in result["top5"]}
    columns = min(8, len(shown))
    rows = -(-len(shown) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(1.5 * columns, 1.75 * rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat:
        axis.axis("off")
    for axis, result in zip(axes.flat, shown, strict=False):
        folder = Path(result["path"]).parent.name
        with Image.open(result["path"]) as image:
            axis.imshow(image.convert("RGB"))
        color = "crimson" if folder in names and folder != result["label"] else "black"
        axis.set_title(f"{result['label']}  {result['confidence']:.0%}", fontsize=10, color=color)
    write_atomically(file, lambda partial: figure.savefig(partial, format="png", dpi=100))
    plt.close(figure)


@command
def main(argv: list[str] | None = None) -> None:
    """Command line of `predict`: writes DIR/predictions.json and the contact sheet DIR/predictions.png."""
    parser = config_parser(__doc__)
    parser.add_argument("checkpoint", help=".pth of train.py, or .safetensors")
    parser.add_argument("image", help="image, or folder of images")
    parser.add_argument("--out", required=True, help="folder for predictions.json and predictions.png")
    args = parser.parse_args(argv)

    cfg = load_config(args.config, args.cfg_options)
    existing_file("checkpoint", args.checkpoint)
    results = predict(cfg, args.checkpoint, find_images(args.image))
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "predictions.json", lambda partial: partial.write_text(json.dumps(results, indent=1)))
    draw_sheet(results, out / "predictions.png")
    print(out / "predictions.json")
    print(out / "predictions.png")


if __name__ == "__main__":
    main()
