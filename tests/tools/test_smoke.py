"""One model of each family learns: few steps of AdamW halve its loss on handwritten digits, or lower that of masks."""

import inspect

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_digits
from timm.models import model_entrypoint
from torch.nn import functional as F

from linzoo.backbones import list_models
from linzoo.tools import make_data
from linzoo.tools.engine.segmenter import dice_loss

# Narrower and shallower than any variant; what a family does not take is left out.
SMALL = dict(
    dims=(32, 64, 128, 256),
    depths=(1, 1, 2, 1),
    modules=(1, 1, 1),
    img_size=32,
    patch_size=8,
    stride=8,
    dim=32,
    depth=4,
    embed_dim=96,
    routes=("h v_flip w2 w7_flip", "h h_flip v v_flip", "v v_flip w2 w2_flip"),
)
SLOW = {"spatialmamba_t"}
# Heads have 64 channels; both token mixers of Vision-RWKV are tried.
WIDER = dict.fromkeys(("plain_attention_s", "vrwkv_t", "vrwkv6_t"), dict(dim=64))
WIDER["rwkvsam_backbone_t"] = dict(dims=(32, 64, 128))
WIDER["s5_pixel_s"] = dict(dim=128, depth=2)  # the second of its family


def first_of_each_family():
    families = {}
    for name in sorted(
        list_models() + list_models(kind="adopted"), key=lambda n: model_entrypoint(n).__code__.co_firstlineno
    ):
        families.setdefault(model_entrypoint(name).__module__, name)
    return [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in sorted({*families.values(), *WIDER})]


@pytest.fixture(scope="module")
def digits():
    """64 digits at 32 px, values in [-1, 1], and their labels."""
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images[:64], dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    images = F.interpolate(images, 32, mode="bicubic").expand(-1, 3, -1, -1)
    return images, torch.tensor(labels[:64])


@pytest.mark.parametrize("name", first_of_each_family())
def test_loss_halves(name, digits):
    kind = type(timm.create_model(name, device="meta"))
    taken = dict(inspect.signature(kind).parameters)
    if "kwargs" in taken:  # passed on to the class it derives from
        taken |= inspect.signature(kind.__base__).parameters
    small = {k: v for k, v in SMALL.items() if k in taken} | WIDER.get(name, {})
    if "embed_dim" in small and isinstance(taken["embed_dim"].default, tuple):  # EfficientViM, of three stages
        small |= dict(embed_dim=(64, 96, 128), depths=(1, 1, 1))
    model = timm.create_model(name, num_classes=10, **small)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for step in range(40):
        images, labels = (part.chunk(2)[step % 2] for part in digits)
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if len(losses) > 2 and max(losses[-2:]) < 0.5 * min(losses[:2]):
            break
    assert max(losses[-2:]) < 0.5 * min(losses[:2]), losses


@pytest.fixture(scope="module")
def inked(tmp_path_factory):
    """64 inked photographs at 64 px, values in [-1, 1], and their masks of 0 and 1."""
    folder = tmp_path_factory.mktemp("data") / "inked"
    make_data.inked(folder)

    def read(name):
        files = sorted((folder / "train" / name).iterdir())[:64]
        return torch.stack([torch.tensor(np.array(Image.open(file)), dtype=torch.float32) for file in files])

    return read("images").permute(0, 3, 1, 2) / 127.5 - 1, read("masks").unsqueeze(1) / 255


@pytest.mark.slow
@pytest.mark.parametrize("name", list_models("*vm_unet", kind="segmentation"))
def test_dice_falls(name, inked):
    small = dict(dims=(32, 64, 128, 256), depths=(1, 1, 1, 1), depths_decoder=(1, 1, 1, 1), drop_path_rate=0.0)
    model = timm.create_model(name, **small)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(60):
        images, masks = (part.chunk(16)[step % 16] for part in inked)
        loss = dice_loss(model(images), masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert max(losses[-2:]) < 0.7 * min(losses[:2]), losses
