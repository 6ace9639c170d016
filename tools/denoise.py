"""Train a light Restore-RWKV to remove noise, and compare it on held-out photographs. `make denoise` runs this."""

import argparse
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from mmengine.device import get_device
from skimage.restoration import denoise_nl_means, denoise_tv_chambolle

from linzoo.tools import train
from linzoo.tools.engine import PairedImages, RestorationMetric
from linzoo.tools.engine.config import load_config
from linzoo.tools.engine.files import write_atomically
from linzoo.tools.engine.task import build
from linzoo.tools.engine.weights import load_weights

CONFIG = str(Path(__file__).resolve().parent.parent / "configs/restore/restore_rwkv_light_noisy.py")
WORK_DIR = Path("work_dirs/denoise")
SIGMA = 25 / 255


def total_variation(noisy: np.ndarray, weight: float) -> np.ndarray:
    """Chambolle's total-variation denoising of an image (H, W)."""
    return denoise_tv_chambolle(noisy, weight=weight)


def non_local_means(noisy: np.ndarray, strength: float) -> np.ndarray:
    """Non-local means of an image (H, W), given the noise's sigma."""
    return denoise_nl_means(noisy, patch_size=5, patch_distance=6, h=strength * SIGMA, sigma=SIGMA, fast_mode=True)


CLASSICAL = {
    "total variation": (total_variation, (0.06, 0.08, 0.1, 0.12, 0.15)),
    "non-local means": (non_local_means, (0.4, 0.6, 0.8, 1.0)),
}


def compare(restored: list[torch.Tensor], pairs: list[dict]) -> tuple[dict, dict]:
    """PSNR and SSIM of every method, and each method's result for every image.

    The classical methods use the best of a few parameters, chosen on the very images that they are tested on.

    Args:
        restored: the model's images (1, H, W).
        pairs: the noisy images and their targets.
    """
    metric = RestorationMetric()

    def score(images: list[torch.Tensor]) -> dict[str, float]:
        measured = [metric.measure(image, pair["targets"]) for image, pair in zip(images, pairs, strict=True)]
        return metric.compute_metrics(measured)

    images = {"noisy": [pair["inputs"] for pair in pairs], "Restore-RWKV, light": restored}
    for name, (method, parameters) in CLASSICAL.items():
        tries = []
        for parameter in parameters:
            tries.append([torch.from_numpy(method(x[0].numpy(), parameter)).float()[None] for x in images["noisy"]])
        images[name] = max(tries, key=lambda outputs: score(outputs)["PSNR"])
    return {name: score(outputs) for name, outputs in images.items()}, images


def draw(images: dict, pairs: list[dict], scores: dict, file: Path) -> None:
    """Draws some images, each noisy, restored by every method, and clean."""
    rows = range(0, len(pairs), max(len(pairs) // 4, 1))
    columns = {**images, "clean": [pair["targets"] for pair in pairs]}
    figure = Figure(figsize=(2.2 * len(columns), 2.3 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    for line, row in zip(axes, rows, strict=True):
        for axis, (name, outputs) in zip(line, columns.items(), strict=True):
            axis.imshow(outputs[row][0].clamp(0, 1), cmap="gray", vmin=0, vmax=1)
            axis.axis("off")
            if row == 0:
                axis.set_title(f"{name}\n{scores[name]['PSNR']:.2f} dB" if name in scores else name, fontsize=10)
    write_atomically(file, lambda partial: figure.savefig(partial, format="png", dpi=110))


def main(argv: list[str] | None = None) -> None:
    """Command line of `denoise`. An interrupted run continues; a finished one only compares."""
    argparse.ArgumentParser(description=__doc__).parse_args(argv)
    train.main([CONFIG, "--work-dir", str(WORK_DIR), "--resume"])
    cfg = load_config(CONFIG, None)
    model = build(cfg)
    load_weights(model.model, str(WORK_DIR / "export/model.safetensors"))
    model.to(get_device()).eval()
    data = PairedImages(cfg.val_dataloader.dataset.data_root, cfg.val_dataloader.dataset.data_prefix)
    pairs = [data[i] for i in range(len(data))]
    with torch.inference_mode():
        restored = [model.model(pair["inputs"][None].to(get_device()))[0].cpu() for pair in pairs]
    scores, images = compare(restored, pairs)
    draw(images, pairs, scores, WORK_DIR / "denoised.png")
    for name, score in scores.items():
        gain = score["PSNR"] - scores["noisy"]["PSNR"]
        print(f"{name:20s} PSNR {score['PSNR']:5.2f} dB ({gain:+.2f})  SSIM {score['SSIM']:.3f}")
    print(f"picture:   {WORK_DIR / 'denoised.png'}")
    print(f"Remove {WORK_DIR} to train again.")


if __name__ == "__main__":
    main()
