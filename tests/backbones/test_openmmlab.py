"""The zoo as backbone of OpenMMLab: maps, gradients, freezing, checkpoints, bad input, for every family."""

import subprocess
import sys

import mmseg.models  # noqa: F401
import pytest
import timm
import torch
from mmengine.registry import MODELS
from mmengine.runner.checkpoint import load_state_dict
from safetensors.torch import save_file
from test_contract import few_blocks
from timm.models import model_entrypoint
from torch import nn

from linzoo.backbones import list_models
from linzoo.backbones.openmmlab import LinZooBackbone

SIZE = (64, 96)
TINY = dict(dims=(8, 16, 32, 64), depths=(1, 1, 2, 1))


def first_of_each_class():
    names = list_models() + list_models(kind="adopted") + list_models(kind="pyramid")
    classes = {}
    for name in sorted(names, key=lambda n: model_entrypoint(n).__code__.co_firstlineno):
        classes.setdefault(type(timm.create_model(name, device="meta")), name)
    return sorted(classes.values())


def small(name):
    if name.startswith("efficientvim"):
        return dict(depths=(1, 1, 1))
    return dict(depth=4) if "adapter" in name else few_blocks(name)


def tiny(**kwargs):
    return LinZooBackbone("vmamba_t", dict(TINY), **kwargs)


@pytest.mark.parametrize("name", first_of_each_class())
def test_maps_and_gradients(name):
    """Levels of the strides it says, and no parameter without a gradient whatever the levels: DDP asks for that."""
    levels = 3 if name.startswith("efficientvim") else 4
    for out_indices, out_norm in ((tuple(range(levels)), True), ((levels - 1, 1), False), ((0,), False)):
        backbone = LinZooBackbone(name, small(name), out_indices=out_indices, out_norm=out_norm).train()
        maps = backbone(torch.randn(2, 3, *SIZE))
        assert isinstance(maps, tuple) and all(y.isfinite().all() for y in maps)
        assert [tuple(y.shape) for y in maps] == [
            (2, channels, *(-(-side // stride) for side in SIZE))
            for channels, stride in zip(backbone.channels, backbone.strides, strict=True)
        ]
        sum(y.sum() for y in maps).backward()
        trained = {n: p for n, p in backbone.named_parameters() if p.requires_grad}
        assert [n for n, p in trained.items() if p.grad is None] == []
        assert len(backbone.norms) == (len(out_indices) if out_norm else 0)
        assert backbone.strides == [(4 if levels == 4 else 16) * 2**i for i in out_indices]


@pytest.mark.parametrize("name", ("groupmamba_t", "vmamba_t", "vssd_m"))
def test_maps_are_those_of_features_only(name):
    torch.manual_seed(1)
    backbone = LinZooBackbone(name, small(name)).eval()
    net = timm.create_model(name, features_only=True, **small(name)).eval()
    state = {key: value for key, value in backbone.model.state_dict().items() if key in net.model.state_dict()}
    assert state.keys() == net.model.state_dict().keys()
    net.model.load_state_dict(state)
    x = torch.randn(1, 3, *SIZE)
    for ours, theirs in zip(backbone(x), net(x), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_order_of_levels_and_subsets():
    backbone = tiny().eval()
    x = torch.randn(1, 3, 64, 64)
    maps = backbone(x)
    for out_indices in ((3, 0), (2,), (1, 2)):
        subset = tiny(out_indices=out_indices).eval()
        ours = backbone.model.state_dict()
        subset.model.load_state_dict({key: ours[key] for key in subset.model.state_dict()})
        for i, y in zip(out_indices, subset(x), strict=True):
            torch.testing.assert_close(y, maps[i])


def test_out_norm_is_over_channels():
    backbone = tiny(out_norm=True).eval()
    for y in backbone(torch.randn(1, 3, 64, 64)):
        assert y.mean(1).abs().max() < 1e-5
        torch.testing.assert_close(y.var(1, correction=0), torch.ones_like(y[:, 0]), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", ("vmamba_t", "vim_t", "vssd_m", "vrwkv_t_adapter_seg"))
def test_frozen_stages(name):
    """Frozen parts need no gradient and stay in eval mode, their BatchNorms' statistics with them; the rest trains."""
    for frozen in range(-1, 5):
        backbone = LinZooBackbone(name, small(name), frozen_stages=frozen, drop_path_rate=0.2, out_norm=True).train()
        fixed = {n for n, p in backbone.named_parameters() if not p.requires_grad}
        assert fixed == backbone.frozen
        assert bool(fixed) == (frozen >= 0)
        model = backbone.model
        blocks = model.stages if hasattr(model, "stages") else getattr(model, "backbone", model).blocks
        assert len(blocks) == 4
        for i, block in enumerate(blocks):
            assert all(p.requires_grad == (i >= frozen) for p in block.parameters())
            assert all(m.training == (i >= frozen) for m in block.modules())
        sum(y.sum() for y in backbone(torch.randn(2, 3, 64, 64))).backward()
        assert all((p.grad is None) == (n in fixed) for n, p in backbone.named_parameters())


def test_batchnorm_statistics():
    """Frozen: only those of the frozen stages stay. `norm_eval`: all stay, and the parameters still learn."""
    x = torch.randn(2, 3, 64, 64)

    def moved(**kwargs):
        backbone = LinZooBackbone("vssd_m", few_blocks("vssd_m"), **kwargs).train()
        before = {n: b.clone() for n, b in backbone.named_buffers() if "running" in n}
        sum(y.sum() for y in backbone(x)).backward()
        assert len(before) > 4
        return {n.split(".")[1] + n.split(".")[2] for n, b in before.items() if not b.equal(backbone.get_buffer(n))}

    assert {name[:4] for name in moved()} == {"stem", "stag"}
    assert "stem" not in {name[:4] for name in moved(frozen_stages=0)}
    assert moved(norm_eval=True) == set()
    assert all(p.requires_grad for p in LinZooBackbone("vssd_m", few_blocks("vssd_m"), norm_eval=True).parameters())


def test_checkpointing_changes_nothing_but_memory():
    x = torch.randn(1, 3, 64, 64)
    plain, saving = tiny(out_norm=True), tiny(out_norm=True, with_cp=True)
    saving.load_state_dict(plain.state_dict())
    for backbone in (plain, saving):
        sum(y.square().sum() for y in backbone.train()(x)).backward()
    assert saving.model.stages[0].grad_checkpointing and not plain.model.stages[0].grad_checkpointing
    for (name, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


def test_drop_path_rate_reaches_the_blocks():
    rates = [m.drop_prob for m in tiny(drop_path_rate=0.3).modules() if type(m).__name__ == "DropPath"]
    assert max(rates) == pytest.approx(0.3)


@pytest.mark.parametrize("scope", ("mmseg", "mmpretrain"))
def test_built_from_a_config(scope):
    """By name in any of the toolkits' registries, whose `init_weights` leaves what was loaded as it is."""
    import importlib

    models = importlib.import_module(f"{scope}.registry").MODELS
    backbone = models.build(dict(type="LinZooBackbone", model_name="vmamba_t", model_kwargs=dict(TINY)))
    before = {name: p.clone() for name, p in backbone.named_parameters()}
    backbone.init_weights()
    assert all(p.equal(before[name]) for name, p in backbone.named_parameters())
    assert MODELS.get("LinZooBackbone") is LinZooBackbone


def test_importing_the_zoo_needs_no_mmengine():
    code = "import sys; sys.modules['mmengine'] = None; import linzoo.backbones as b; print(len(b.list_models()))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(out) > 40


# --- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.fixture
def classifier():
    return timm.create_model("vmamba_t", num_classes=10, **TINY)


@pytest.mark.parametrize("kind", ("safetensors", "timm", "mmengine", "segmenter", "authors'"))
def test_pretrained_file(kind, classifier, tmp_path):
    """What `tools/train.py` writes of a classifier, what a segmenter's run writes, and the authors' own layout."""
    state = classifier.state_dict()
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pth")
    if kind == "safetensors":
        save_file(state, path)
    elif kind == "timm":
        torch.save(state, path)
    elif kind == "mmengine":
        torch.save({"state_dict": state, "meta": {"epoch": 3}}, path)
    elif kind == "segmenter":
        whole = {f"backbone.model.{key}": value for key, value in state.items()}
        torch.save({"state_dict": whole | {"decode_head.conv_seg.weight": torch.zeros(2)}}, path)
    else:
        torch.save({"model": {authors_name(key): value for key, value in state.items()}}, path)
    backbone = tiny(pretrained=str(path))
    for key, value in backbone.model.state_dict().items():
        torch.testing.assert_close(value, state[key], msg=key)


def authors_name(key):
    """VMamba's own name of one of our parameters."""
    parts = key.split(".")
    if parts[0] == "stem":
        return f"patch_embed.{dict(conv1=0, norm1=2, conv2=5, norm2=7)[parts[1]]}.{parts[2]}"
    if parts[0] in ("norm", "head"):
        return "classifier." + key.replace("fc.", "")
    if parts[2] == "downsample":
        return f"layers.{int(parts[1]) - 1}.downsample.{dict(conv=1, norm=3)[parts[3]]}.{parts[4]}"
    key = key.replace("stages.", "layers.").replace(".norm1.", ".norm.").replace(".mixer.conv.", ".mixer.conv2d.")
    s6 = {"x_proj": "x_proj_weight", "dt_weight": "dt_projs_weight", "dt_bias": "dt_projs_bias", "A_log": "A_logs"}
    for ours, theirs in {**s6, "D": "Ds"}.items():
        key = key.replace(f".mixer.s6.{ours}", f".op.{theirs}")
    return key.replace(".mixer.", ".op.")


def test_authors_segmenter_loads(classifier):
    """A state dict with the authors' keys around their backbone, as mmengine loads it into a segmenter."""
    segmenter = nn.Module()
    segmenter.backbone = tiny(out_norm=True)
    segmenter.decode_head = nn.Linear(2, 3)
    torch.manual_seed(2)
    state = {f"backbone.{authors_name(k)}": torch.randn_like(v) for k, v in classifier.state_dict().items()
             if not k.startswith(("norm.", "head."))}  # fmt: skip
    assert "backbone.layers.0.blocks.0.op.A_logs" in state and "backbone.patch_embed.0.weight" in state
    for i, dim in enumerate(TINY["dims"]):
        state |= {f"backbone.outnorm{i}.weight": torch.randn(dim), f"backbone.outnorm{i}.bias": torch.randn(dim)}
    state |= {"decode_head.weight": torch.randn(3, 2), "decode_head.bias": torch.randn(3)}
    load_state_dict(segmenter, dict(state), strict=True)
    torch.testing.assert_close(segmenter.backbone.norms["2"].bias, state["backbone.outnorm2.bias"])
    for key, value in segmenter.backbone.model.state_dict().items():
        torch.testing.assert_close(value, state[f"backbone.{authors_name(key)}"].reshape(value.shape), msg=key)
    torch.testing.assert_close(segmenter.decode_head.weight, state["decode_head.weight"])
    assert not any(segmenter.load_state_dict(segmenter.state_dict()))


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        (dict(out_indices=(0, 4)), r"out_indices: expected different levels from 0 to 3 of 'vmamba_t', got \(0, 4\)"),
        (dict(out_indices=(-1,)), "out_indices"),
        (dict(out_indices=()), "out_indices"),
        (dict(out_indices=(1, 1)), "out_indices"),
        (dict(frozen_stages=5), "frozen_stages: expected -1 to 4 for 'vmamba_t', got 5"),
    ],
)
def test_argument_out_of_range(kwargs, said):
    with pytest.raises(ValueError, match=said):
        tiny(**kwargs)


def test_unknown_model_and_keyword():
    with pytest.raises(ValueError, match="model_name: expected a model of timm or LinZoo, got 'vmamba_tt'"):
        LinZooBackbone("vmamba_tt")
    with pytest.raises(TypeError, match="dimss"):
        LinZooBackbone("vmamba_t", dict(dimss=1))


def test_checkpoint_of_another_model(classifier, tmp_path):
    save_file(classifier.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"does not fit 'vmamba_t_v0'.*tensors differ, such as 'stem"):
        LinZooBackbone("vmamba_t_v0", dict(TINY), pretrained=str(tmp_path / "w.safetensors"))
    with pytest.raises(ValueError, match=r"does not fit 'vmamba_t'.*\(4, 3, 3, 3\), model \(8, 3, 3, 3\)\)"):
        LinZooBackbone("vmamba_t", dict(TINY, dims=(16, 32, 64, 128)), pretrained=str(tmp_path / "w.safetensors"))
    with pytest.raises(FileNotFoundError, match="no such file"):
        tiny(pretrained=str(tmp_path / "absent.pth"))


# --- another toolkit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ("groupmamba_t", "vmamba_t", "vssd_m"))
def test_encoder_of_segmentation_models(name):
    """segmentation_models_pytorch takes any of timm's models as encoder `tu-<name>`: maps, masks, gradients."""
    toolkit = pytest.importorskip("segmentation_models_pytorch")
    unet = toolkit.Unet(f"tu-{name}", encoder_weights=None, classes=3, **few_blocks(name))
    masks = unet(torch.randn(2, 3, *SIZE))
    assert masks.shape == (2, 3, *SIZE)
    masks.square().mean().backward()
    assert [n for n, p in unet.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("name", ("vim_t", "vrwkv_t", "kat_tiny_patch16_224"))
def test_vit_encoder_of_segmentation_models(name):
    """Models of one stride are encoders of its DPT; its pyramids' decoders refuse them as they refuse timm's ViTs."""
    toolkit = pytest.importorskip("segmentation_models_pytorch")
    dpt = toolkit.DPT(f"tu-{name}", encoder_weights=None, classes=3)
    assert dpt(torch.randn(2, 3, 64, 64)).shape == (2, 3, 64, 64)
    with pytest.raises(ValueError, match="Unsupported model downsampling pattern"):
        toolkit.Unet(f"tu-{name}", encoder_weights=None, classes=3)
