"""README, cards and configs against the registry: every card is linked, every variant has configs or a reason."""

import fnmatch
import re
from pathlib import Path

import pytest
import timm

from linzoo.backbones import list_models

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
CARDS = {path.stem: path.read_text() for path in (ROOT / "model_cards").glob("*.md")}
BACKBONES = [name for kind in ("backbone", "adopted", "pyramid") for name in list_models(kind=kind)]
# The card of a family that shares one.
SHARED_CARDS = {
    "s4nd": "s4",
    "convs5": "s4",
    "videomamba_video": "videomamba",
    "vrwkv_adapter": "vrwkv",
    "mvar_tokenizer": "mvar",
    "rwkvsam_backbone": "rwkvsam",
}
SHARED_CARDS |= {"mambair_v2": "mambair", "mambair_opensr": "mambair", "umamba_3d": "umamba"}

PIXELS = "a classifier of pixel sequences: it has no maps"
MAPS = "it gives maps and no classes"
COMPARED = "it is there to compare mixers on one task; one config trains each"
NO_DENSE = "the authors publish no results of this task"
ONE_SIZE = "the authors publish dense results of other sizes; their config with this name trains it"
# Why a variant has no config of a task: {task: {wildcard: reason}}; the first that fits counts.
WITHOUT = {
    "cls": {
        "plain_*": COMPARED,
        "vrwkv_*_adapter_*": MAPS,
        "rwkvsam_backbone_l": "the paper names it and gives no recipe",
        "vim_b": "the authors publish no recipe of it",
    },
    "seg": {
        "s[45]d_pixel_*": PIXELS,
        "s5_pixel_*": PIXELS,
        "*_adapter_det": "the adapter of detection",
        "videomamba_*": NO_DENSE,
        "plain_*": COMPARED,
        "*": ONE_SIZE,
    },
    "det": {
        "s[45]d_pixel_*": PIXELS,
        "s5_pixel_*": PIXELS,
        "*_adapter_seg": "the adapter of segmentation",
        "videomamba_*": NO_DENSE,
        "vil_*": NO_DENSE,
        "plain_*": COMPARED,
        "*": ONE_SIZE,
    },
}


def configured(task):
    """Names of the models that the configs of a task train."""
    text = "\n".join(path.read_text() for path in (ROOT / "configs" / task).glob("*.py"))
    return set(re.findall(r'model_name="([\w.]+)"', text))


@pytest.mark.parametrize("task", WITHOUT)
def test_every_variant_has_a_config_or_a_reason(task):
    names = configured(task)
    for name in BACKBONES:
        if name not in names:
            assert any(fnmatch.fnmatch(name, pattern) for pattern in WITHOUT[task]), f"{name}: no config in {task}"
    for pattern in WITHOUT[task]:
        assert pattern == "*" or any(fnmatch.fnmatch(n, pattern) and n not in names for n in BACKBONES), pattern


@pytest.mark.parametrize("task", ("seg", "det"))
def test_every_family_has_a_dense_config(task):
    """A whole family without one needs a reason of its own."""
    names = configured(task)
    for name in BACKBONES:
        family = timm.model_entrypoint(name).__module__
        kin = [other for other in BACKBONES if timm.model_entrypoint(other).__module__ == family]
        reasons = [r for p, r in WITHOUT[task].items() if fnmatch.fnmatch(name, p) and p != "*"]
        assert reasons or names.intersection(kin), f"{family}: no variant has a config in {task}"


def test_every_card_is_linked_from_readme():
    missing = [name for name in CARDS if f"(model_cards/{name}.md)" not in README]
    assert not missing


@pytest.mark.parametrize("name", list_models(kind=None))
def test_every_model_stands_in_its_card(name):
    family = timm.model_entrypoint(name).__module__.rpartition(".")[2]
    card = CARDS[SHARED_CARDS.get(family, family)]
    braces = re.findall(r"`([\w{},]*\{[\w{},]*)`", card)  # `vrwkv_{t,s}_adapter` stands for two names
    patterns = [stem.replace("{", "(").replace("}", ")").replace(",", "|") for stem in braces]
    assert name in card or any(re.fullmatch(p, name) for p in patterns), f"{name} is not in the card of {family}"


def test_links_lead_somewhere():
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "model_cards").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text()):
            if "://" not in target:
                assert (path.parent / target).exists(), f"{path.name}: {target}"
