"""EfficientViM, which timm has: the authors' files load into timm's models, and the folded copy computes the same.

Their values are parity cases like the other families' (`test_parity.py`).
"""

import timm
import torch

from linzoo.backbones import list_models
from linzoo.backbones.layers import fuse_for_inference


def test_the_names_are_timms():
    names = list_models("efficientvim_m?", kind="adopted")
    assert names == [f"efficientvim_m{i}" for i in (1, 2, 3, 4)]
    assert {timm.model_entrypoint(name).__module__ for name in names} == {"timm.models.efficientvim"}
    assert not set(names) & set(list_models())


def published(model):
    """The weights of a timm model as the authors' training code saves them: their LayerNorms hold broadcast shapes."""
    state = {name: t.clone() for name, t in model.state_dict().items()}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.LayerNorm):
            shape = (1, -1, 1, 1) if name == "norm.3" else (1, -1, 1)
            state |= {f"{name}.{p}": state[f"{name}.{p}"].reshape(shape) for p in ("weight", "bias")}
    worse = {name: torch.zeros_like(t) for name, t in state.items()}
    return {"model": worse, "model_ema": state, "epoch": 299}


def test_published_files_load(tmp_path):
    """The averaged weights are taken; a distilled file fits the plain model, too."""
    torch.manual_seed(0)
    distilled = timm.create_model("efficientvim_m1_dist").eval()
    path, x = tmp_path / "efficientvim_m1.pth", torch.randn(2, 3, 96, 64)
    torch.save(published(distilled), path)
    overlay = {"file": str(path)}
    loaded = timm.create_model("efficientvim_m1_dist", pretrained=True, pretrained_cfg_overlay=overlay).eval()
    plain = timm.create_model("efficientvim_m1", pretrained=True, pretrained_cfg_overlay=overlay).eval()
    with torch.inference_mode():
        assert torch.equal(loaded(x), distilled(x))
        assert torch.equal(plain.forward_intermediates(x)[1][-1], distilled.forward_intermediates(x)[1][-1])


def test_fuse_for_inference():
    torch.manual_seed(0)
    model = timm.create_model("efficientvim_m1").eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "norm" in name and tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5)
        x = torch.randn(2, 3, 96, 64)
        fused, y = fuse_for_inference(model), model(x)
        assert (fused(x) - y).abs().max() <= 1e-4 * y.std()
    assert not [m for m in fused.modules() if isinstance(m, torch.nn.BatchNorm2d)]
