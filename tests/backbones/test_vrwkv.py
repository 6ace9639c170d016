"""Vision-RWKV's layers, its checkpoint's names, and ViT-Adapter around it."""

import json
import re

import pytest
import timm
import torch
from test_parity import PARITY, error, synth
from torch.nn import functional as F

from linzoo.backbones.layers import RWKVBlock, SpatialMix, q_shift, vit_adapter
from linzoo.backbones.layers.vit_adapter import MSDeformAttention, ViTAdapter, deformable_attention, pixel_centres
from linzoo.backbones.vrwkv import VRWKV, VRWKV6
from linzoo.backbones.vrwkv import checkpoint_filter_fn as convert
from linzoo.backbones.vrwkv_adapter import VRWKVAdapter
from linzoo.backbones.vrwkv_adapter import checkpoint_filter_fn as convert_adapter
from linzoo.ops import bi_wkv

CASES = sorted((PARITY / "maps").glob("*.json"))


@pytest.mark.parametrize("heads", (1, 2))
def test_q_shift_takes_quarters_from_the_four_neighbours(heads):
    x = torch.randn(2, 3, 5, 8)
    y = q_shift(x.flatten(1, 2), (3, 5), heads).unflatten(1, (3, 5))
    padded = F.pad(x, (0, 0, 1, 1, 1, 1))
    quarter = 8 // heads // 4
    for channel in range(8):
        dy, dx = [(0, -1), (0, 1), (-1, 0), (1, 0)][channel % (8 // heads) // quarter]
        expected = padded[:, 1 + dy : 4 + dy, 1 + dx : 6 + dx, channel]
        assert torch.equal(y[..., channel], expected), channel


def test_spatial_mix_by_hand():
    """A second pass walks the columns over what the first one gave, with the same keys."""
    mix, grid = SpatialMix(8, layer=3, layers=6, passes=2).double(), (3, 4)
    x = torch.randn(2, 12, 8, dtype=torch.float64)
    shifted = q_shift(x, grid)
    k, v, r = (
        linear(x * mu + shifted * (1 - mu))
        for linear, mu in zip((mix.key, mix.value, mix.receptance), mix.mix, strict=True)
    )

    def turned(tokens, shape):
        return tokens.unflatten(1, shape).transpose(1, 2).flatten(1, 2)

    first = bi_wkv(k, v, mix.decay[0] / 12, mix.bonus[0] / 12)
    second = bi_wkv(turned(k, grid), turned(first, grid), mix.decay[1] / 12, mix.bonus[1] / 12)
    expected = mix.output(torch.sigmoid(r) * turned(second, grid[::-1]))
    torch.testing.assert_close(mix(x, grid), expected)


def test_initial_values():
    """The authors' "fancy" ones: decays rise from -5 to 3 over the channels, the first block shifts most."""
    first, last = (SpatialMix(64, layer, 12).requires_grad_(False) for layer in (0, 11))
    assert first.decay[0, [0, -1]].tolist() == pytest.approx([-5, 3])
    torch.testing.assert_close(first.mix[0], torch.arange(64) / 64)
    torch.testing.assert_close(last.decay[0, 21], torch.tensor(-5 + 8 * (21 / 63) ** 2.0))
    torch.testing.assert_close(last.mix[1], (torch.arange(64) / 64) ** (1 / 12) + 0.3)
    assert sorted(set(first.bonus[0].tolist())) == pytest.approx([-1.70397, -1.20397, -0.70397], abs=1e-4)


def test_post_norm_block():
    class Double(torch.nn.Module):
        def forward(self, x, grid):
            return 2 * x

    x = torch.randn(2, 6, 16)
    block = RWKVBlock(16, Double(), Double(), first_norm=True, post_norm=True, init_values=0.5)
    x0 = F.layer_norm(x, (16,))
    x1 = x0 + 0.5 * F.layer_norm(2 * x0, (16,))
    torch.testing.assert_close(block(x, (2, 3)), x1 + 0.5 * F.layer_norm(2 * x1, (16,)))


def authors_names(model):
    """Our state dict of a large model under the names of the authors' training code."""
    out = {}
    for key, value in model.state_dict().items():
        match = re.fullmatch(r"blocks\.(\d+)\.(\w+)\.(.*)", key)
        if match is None:
            key = re.sub(r"^norm\.", "ln1.", key.replace("patch_embed.", "patch_embed.projection."))
            key = key if key.startswith(("pre_head", "head")) else f"backbone.{key}"
            out[key.replace("pre_head.0", "head.0").replace("head.w", "head.2.w").replace("head.b", "head.2.b")] = value
            continue
        prefix, part, rest = f"backbone.layers.{match[1]}.", match[2], match[3]
        if part in ("mixer", "mlp"):
            prefix += "att." if part == "mixer" else "ffn."
            if rest == "mix":
                for name, row in zip("kvr" if part == "mixer" else "kr", value, strict=True):
                    out[f"{prefix}spatial_mix_{name}"] = row.view(1, 1, -1)
                continue
            rest = {"decay": "spatial_decay", "bonus": "spatial_first"}.get(rest, rest)
            value = value.squeeze(0) if rest.startswith("spatial_") else value
            out[prefix + rest.replace("out_norm", "key_norm").replace("hidden_norm", "key_norm")] = value
        elif part.startswith("ls"):
            out[f"{prefix}gamma{part[-1]}"] = value
        else:
            out[f"{prefix}ln{part[-1]}.{rest}"] = value
    return out


def test_names_of_the_large_models_checkpoint():
    args = dict(img_size=64, dim=32, depth=2, post_norm=True, init_values=1e-5, inner_norm=True, head_hidden=48)
    model = VRWKV(**args)
    published = authors_names(model)
    for key in ("head.0.weight", "head.2.bias", "backbone.ln1.weight", "backbone.layers.0.ln0.bias"):
        assert key in published
    for key in ("att.key_norm.weight", "ffn.key_norm.bias", "gamma1", "att.spatial_mix_v", "ffn.spatial_mix_r"):
        assert f"backbone.layers.1.{key}" in published
    assert not [key for key in published if "mixer" in key or "mlp" in key]
    ours, got = model.state_dict(), convert({"model": published}, model)
    assert ours.keys() == got.keys()
    assert all(torch.equal(ours[key], got[key]) for key in ours)


def test_positions_of_another_size_are_interpolated():
    small, large = VRWKV(img_size=64, dim=32, depth=1).eval(), VRWKV(img_size=(96, 128), dim=32, depth=1).eval()
    torch.nn.init.normal_(small.pos_embed)
    large.load_state_dict(convert(small.state_dict(), large))
    x = torch.randn(1, 3, 96, 128)
    with torch.no_grad():
        torch.testing.assert_close(small(x), large(x))


def test_wrong_widths():
    with pytest.raises(ValueError, match="dim: expected a multiple of 64, got 96"):
        VRWKV6(dim=96)
    with pytest.raises(ValueError, match="inner_norm: "):
        VRWKV6(inner_norm=True)


# --- ViT-Adapter ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CASES, ids=[p.stem for p in CASES])
def test_parity_of_maps(path, tmp_path):
    case = json.loads(path.read_text())
    file = tmp_path / "reference.pth"
    torch.save({k: torch.from_numpy(v) for k, v in synth.state_dict(case).items()}, file)
    overlay = {"file": str(file)}
    model = timm.create_model(case["model"], pretrained=True, pretrained_cfg_overlay=overlay, **case["kwargs"]).eval()
    assert sum(p.numel() for p in model.parameters()) == case["num_params"]
    with torch.inference_mode():
        maps = model(*(torch.from_numpy(synth.image(i["shape"], i["seed"])) for i in case["inputs"]))
    for y, out in zip(maps, case["outputs"], strict=True):
        assert error(y, out) <= 2e-4, out["name"]


def small_adapter(**kwargs):
    return VRWKVAdapter(**dict(img_size=64, dim=32, depth=4, init_values=1.0, heads=4) | kwargs)


@pytest.mark.parametrize("own_tokens", (False, True))
def test_adapter_trains_at_any_size(own_tokens):
    model = small_adapter(own_tokens=own_tokens, drop_path_rate=0.1)
    for size in ((64, 96), (50, 70)):
        maps = model(torch.randn(2, 3, *size))
        assert [tuple(y.shape) for y in maps] == [(2, 32, -(-size[0] // s), -(-size[1] // s)) for s in (4, 8, 16, 32)]
    model.set_grad_checkpointing()
    sum(y.square().mean() for y in model(torch.randn(2, 3, 64, 64))).backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not missing


def test_detection_adds_the_last_tokens_to_all_levels():
    torch.manual_seed(0)
    model = small_adapter(own_tokens=False).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        last, first = model(x)[3], model(x)[0]
        model.own_tokens = True
        assert torch.equal(model(x)[3], last) and not torch.equal(model(x)[0], first)


def test_adapter_begins_from_a_classifier(tmp_path):
    """The backbone is the classifier's; layer scales that it has not, and the adapter, begin anew."""
    sizes = dict(img_size=64, dim=32, depth=4)
    classifier = VRWKV(**sizes)
    torch.nn.init.normal_(classifier.pos_embed)
    path = tmp_path / "classifier.pth"
    torch.save(classifier.state_dict(), path)
    model = timm.create_model(
        "vrwkv_t_adapter_seg", pretrained=True, pretrained_cfg_overlay={"file": str(path)}, heads=4, **sizes
    )
    ours, theirs = model.state_dict(), classifier.state_dict()
    shared = [key for key in theirs if not key.startswith(("norm.", "head."))]
    assert all(torch.equal(ours[f"backbone.{key}"], theirs[key]) for key in shared)
    assert (ours["backbone.blocks.3.ls1.gamma"] == 1).all()


def test_adapter_from_a_segmenters_checkpoint():
    """Its keys begin with backbone., beside the head's, which are left out."""
    case = json.loads(CASES[0].read_text())
    state = {k: torch.from_numpy(v) for k, v in synth.state_dict(case).items()}
    model = timm.create_model(case["model"], device="meta")
    whole = {f"backbone.{k}": v for k, v in state.items()} | {"decode_head.conv_seg.weight": torch.zeros(1)}
    ours = convert_adapter({"state_dict": whole}, model)
    assert ours.keys() == model.state_dict().keys() == convert_adapter(state, model).keys()


def test_adapter_after_to_empty():
    model = VRWKVAdapter(img_size=64, dim=32, depth=4, heads=4, device="meta").to_empty(device="cpu")
    model.init_weights()
    assert all(t.isfinite().all() for t in model.state_dict().values())
    attention = model.interactions[0].injector.attn
    fresh = MSDeformAttention(32, 3, 4)
    assert torch.equal(attention.sampling_offsets.bias, fresh.sampling_offsets.bias)
    assert (attention.sampling_offsets.weight == 0).all()


def test_features_only_takes_levels():
    model = timm.create_model("vrwkv_t_adapter_det", features_only=True, out_indices=(1, 3), depth=4, device="meta")
    assert model.feature_info.reduction() == [8, 32]
    assert [y.shape[2] for y in model(torch.randn(1, 3, 64, 64, device="meta"))] == [8, 2]


def test_deformable_attention_by_hand():
    """At pixel centres it reads pixels, between them the mean of its neighbours, outside of the map nothing."""
    shapes = [(2, 3), (1, 2)]
    value = torch.randn(1, 8, 1, 5)
    centres = pixel_centres(shapes)
    torch.testing.assert_close(centres[4], torch.tensor([0.5, 0.75]))
    locations = torch.zeros(1, 2, 1, 2, 2, 2)
    locations[0, 0, 0, 0] = torch.stack([centres[4], (centres[0] + centres[1]) / 2])
    locations[0, 0, 0, 1] = torch.stack([centres[7], torch.tensor([3.0, 0.5])])
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 2, 2).expand(1, 2, 1, 2, 2)
    y = deformable_attention(value, shapes, locations, weights)
    pixels = value[0, :, 0]
    torch.testing.assert_close(y[0, 0], pixels[4] + (pixels[0] + pixels[1]) + 3 * pixels[7])


def test_compiled_attention_is_asked_for_on_cuda_alone(monkeypatch):
    monkeypatch.setattr(vit_adapter, "compiled_attention", lambda: pytest.fail("called for a CPU tensor"))
    attention = MSDeformAttention(8, 1, 2)
    assert attention(torch.randn(1, 6, 8), pixel_centres([(2, 3)]), torch.randn(1, 6, 8), [(2, 3)]).shape == (1, 6, 8)


def test_bad_adapters():
    with pytest.raises(ValueError, match="backbone: expected a depth that is a multiple of 4, .* got depth 3"):
        ViTAdapter(VRWKV(img_size=64, dim=32, depth=3))
    with pytest.raises(ValueError, match="heads: expected a divisor of 32"):
        small_adapter(heads=5)
    with pytest.raises(ValueError, match="output_fmt: expected 'NCHW', got 'NHWC'"):
        small_adapter().forward_intermediates(torch.randn(1, 3, 32, 32), output_fmt="NHWC")


def test_plain_pyramid():
    """Without adapter: the four maps of `features_only`, rescaled by mmsegmentation's neck."""
    necks = pytest.importorskip("mmseg.models.necks")
    model = timm.create_model("vrwkv_t", features_only=True, dim=32)
    neck = necks.Feature2Pyramid(32, rescales=[4, 2, 1, 0.5], norm_cfg=dict(type="BN"))
    maps = neck(model(torch.randn(2, 3, 64, 96)))
    assert [tuple(y.shape[2:]) for y in maps] == [(16, 24), (8, 12), (4, 6), (2, 3)]
