"""What the cards tell a reader to do."""

import re
from pathlib import Path

import pytest
import timm
import torch

import linzoo.backbones  # noqa: F401

CARDS = Path(__file__).resolve().parent.parent / "model_cards"
COMMON = (CARDS / "common.md").read_text()
CODE = re.findall(r"```python\n(.*?)```", COMMON, re.DOTALL)
FIRST = ("groupmamba_t", "vmamba_t", "efficientvmamba_t", "spatialmamba_t", "vssd_m", "local_vssm_t", "vim2_t")


def run(code: str) -> dict:
    names = {"torch": torch}
    exec(code, names)
    return names


def test_counting_flops():
    from linzoo.tools.models import measure

    flops = run(CODE[0])["flops"]
    _, macs = measure("vmamba_t")
    assert macs < flops < 2 * macs


@pytest.mark.parametrize(
    ("name", "layer", "transform"),
    [
        *(
            (name, "stages", "of_a_map")
            for name in (*FIRST, "mambavision_t", "mila_t", "s4nd_convnext_tiny", "rwkvsam_backbone_t")
        ),
        ("hrvmamba_n", "neck", None),
        *((name, "blocks", "of_tokens_around_a_class_token") for name in ("vim_t", "localvim_t_midcls")),
        *((name, "blocks", "of_tokens") for name in ("localvim_t", "plainmamba_l1", "vil_t", "vrwkv_t")),
        *((name, "blocks", "of_tokens_after_a_class_token") for name in ("kat_tiny_patch16_224", "videomamba_t")),
    ],
)
def test_heat_maps(name, layer, transform):
    """Activations and gradients of the layer become maps; a changed patch moves the map where it lies."""
    model, maps = timm.create_model(name, num_classes=3).eval(), []
    target = getattr(model, layer)
    target = target[-1] if layer != "neck" else target
    reshape = run(CODE[1])[transform] if transform else (lambda x: x)
    target.register_forward_hook(lambda module, args, out: maps.append(reshape(out)))
    images = torch.rand(1, 3, 224, 224)
    model(images)[0, 1].backward()
    side = 14 if layer == "blocks" or name.startswith("rwkvsam") else 7
    assert maps[0].dim() == 4 and maps[0].shape[2:] == (side, side)
    row = re.search(rf"^\|[^|]*\| `model\.{layer}.*\| (`{transform}`|none) \|$", COMMON, re.MULTILINE)
    assert row, "the table has the layer and the transform"


def test_every_card_links_what_is_common():
    for card in CARDS.glob("*.md"):
        if card.name not in ("common.md", "plugins.md"):
            assert "(common.md)" in card.read_text(), card.name
