"""Fills a model card for the Hugging Face Hub from ours."""

import importlib.resources
import re
from collections.abc import Mapping
from typing import Any

from timm.models import get_pretrained_cfg, model_entrypoint

from . import kind_of

_TASKS = {
    "forecasting": "time-series-forecasting",
    "generation": "unconditional-image-generation",
    "promptable": "mask-generation",
    "restoration": "image-to-image",
    "segmentation": "image-segmentation",
    "video": "video-classification",
    "volume": "image-segmentation",
}
_USAGE = (
    "import timm\nimport linzoo.backbones  # registers the model\n\n"
    'model = timm.create_model("hf-hub:OWNER/NAME", pretrained=True)'
)


def hub_task(name: str) -> str:
    """The Hub's name for the task of a registered model, for `task_name` of `timm.models.push_to_hf_hub`."""
    return _TASKS.get(kind_of(name) or "", "image-classification")


def model_card(name: str, metrics: Mapping[str, float] | None = None, license: str = "unknown") -> dict[str, Any]:
    """The `model_card` argument of `timm.models.push_to_hf_hub`: paper, citation, licences, metrics, how to load it.

    Args:
        name: a registered model of the zoo or of timm.
        metrics: of your weights, by name.
        license: of your weights, a Hub identifier (``apache-2.0``). If you started from published weights, their
            licence binds you; the card names it.

    Raises:
        RuntimeError: there is no such model (timm's error).
    """
    family = model_entrypoint(name).__module__.rpartition(".")[2]
    cfg, text = get_pretrained_cfg(name), _card_of(family)
    papers = [cfg.paper_ids] if isinstance(cfg.paper_ids, str) else list(cfg.paper_ids or ())
    title = re.match(r"# (.*)", text)
    details: dict[str, Any] = {"Model": f"`{name}`" + (f", {title[1]}" if title else "")}
    if papers:
        details["Papers"] = [f"https://arxiv.org/abs/{paper.removeprefix('arXiv:')}" for paper in papers]
    if cfg.license:
        details["Licence of the published weights"] = cfg.license
    if metrics:
        details["Metrics"] = {metric: f"{value:.4g}" for metric, value in metrics.items()}
    card = {
        "license": license,
        "tags": [hub_task(name), "timm", "linzoo"],
        "details": details,
        "usage": f"```python\n{_USAGE}\n```",
    }
    if citations := re.findall(r"```bibtex\n(.*?)\n```", text, re.DOTALL):
        card["citation"] = citations
    return card


def _card_of(family: str) -> str:
    """Our card that covers a family: the one that links its file; empty for timm's families without a card."""
    cards = importlib.resources.files("linzoo").joinpath("model_cards")
    texts = {card.name: card.read_text(encoding="utf-8") for card in cards.iterdir()}
    linking = [text for text in texts.values() if f"(../backbones/{family}.py)" in text]
    return (linking or [texts.get(f"{family}.md", "")])[0]
