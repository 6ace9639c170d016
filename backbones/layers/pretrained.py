"""Shared defaults for the families' pretrained configurations."""

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD


def imagenet_cfg(**kwargs):
    """timm's pretrained configuration for an ImageNet-1k model at 224 px, tested on the centre of 256 px.

    `kwargs` add further keys (first_conv, classifier, url, origin_url, paper_ids, license) or replace these.
    """
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "min_input_size": (3, 32, 32),
        "crop_pct": 224 / 256,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        **kwargs,
    }
