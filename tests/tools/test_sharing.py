"""Models as the Hugging Face Hub has them, without the Hub: folders that timm and transformers load."""

import json
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from timm.models import push_to_hf_hub
from timm.models._hub import generate_readme

from linzoo.backbones import list_models
from linzoo.backbones.model_card import hub_task, model_card
from linzoo.tools.engine import Classifier

LABELS = ["cat", "dog", "eel"]


@pytest.fixture
def exported(tmp_path):
    """A classifier and the folder that a run exports."""
    trained = Classifier("plain_ss2d_t", num_classes=3, depth=2, dim=64, img_size=64)
    trained.eval()
    data = {"input_size": (3, 64, 64), "mean": (0.5,) * 3, "std": (0.25,) * 3, "crop_pct": 1.0}
    trained.export(tmp_path / "export", data, label_names=LABELS, config="mine.py", top1=91.25)
    return trained.model, tmp_path / "export"


def test_timm_loads_the_folder(exported):
    model, folder = exported
    again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    x = torch.rand(2, 3, 64, 64)
    assert torch.equal(model(x), again(x))
    assert again.pretrained_cfg["label_names"] == LABELS
    other = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=7)
    assert other.num_classes == 7 and torch.equal(other.patch_embed.weight, model.patch_embed.weight)


def test_transformers_loads_the_folder(exported):
    transformers = pytest.importorskip("transformers")
    model, folder = exported
    again = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    x = torch.rand(2, 3, 64, 64)
    assert isinstance(again, transformers.TimmWrapperForImageClassification)
    torch.testing.assert_close(again(pixel_values=x).logits, model(x))
    assert again.config.id2label == dict(enumerate(LABELS))
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    pixels = processor(Image.new("RGB", (80, 80), (255, 0, 0)), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 64, 64)
    assert pixels[0].amax((1, 2)).tolist() == [2, -2, -2], "(1 - mean) / std"
    again.save_pretrained(folder / "again")
    reloaded = transformers.AutoModelForImageClassification.from_pretrained(folder / "again").eval()
    torch.testing.assert_close(reloaded(pixel_values=x).logits, model(x))


def test_card_of_an_export(exported):
    text = (exported[1] / "README.md").read_text()
    assert text.startswith("---\ntags:\n- image-classification\n- timm\n- linzoo\n")
    for part in ("license: unknown", "top1: 91.25", "arxiv.org/abs/2010.11929", "import linzoo.backbones"):
        assert part in text


@pytest.mark.parametrize("name", list_models(kind=None))
def test_card_of_every_model(name):
    """Ours give the family's title and citation; the licence of published weights is named and not claimed."""
    card = model_card(name, {"PSNR": 31.23456}, license="mit")
    text = generate_readme(card, name, hub_task(name))
    assert "license: mit" in text and "PSNR: 31.23" in text and f"`{name}`, " in text
    published = timm.models.get_pretrained_cfg(name).license
    assert not published or f"**Licence of the published weights:** {published}" in text
    assert ("## Citation\n```bibtex\n@" in text) == ("citation" in card)


def test_cards_have_the_citation_of_the_family():
    assert "liu2024vmamba" in model_card("vmamba_t")["citation"][0]
    assert model_card("vrwkv_t_adapter_seg")["citation"] == model_card("vrwkv_t")["citation"]
    assert "citation" not in model_card("resnet18") and hub_task("restore_rwkv") == "image-to-image"


def test_push(exported, monkeypatch):
    """What `push_to_hf_hub` would upload, with the Hub's API in its place."""
    sent = {}

    class Hub:
        def __init__(self, **kwargs):
            pass

        def create_repo(self, repo_id, **kwargs):
            return type("Url", (), {"repo_id": repo_id})

        def file_exists(self, **kwargs):
            return False

        def upload_folder(self, folder_path, **kwargs):
            sent.update({file.name: file.read_bytes() for file in Path(folder_path).iterdir()})

    monkeypatch.setattr("timm.models._hub.HfApi", Hub)
    push_to_hf_hub(exported[0], "me/mine", model_card=model_card("plain_ss2d_t"), task_name=hub_task("plain_ss2d_t"))
    assert {"README.md", "config.json", "model.safetensors"} <= set(sent)
    assert "Model card for mine" in sent["README.md"].decode() and json.loads(sent["config.json"])["num_classes"] == 3
