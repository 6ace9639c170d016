"""`linzoo look`: dynamics, heat maps, receptive fields, features, orders, states, attention; refusals are one line."""

import inspect
import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from test_bad_input import refused
from torch.nn.utils import parametrize

import linzoo.backbones  # noqa: F401
from linzoo.backbones.layers import definite_projection
from linzoo.backbones.layers.dynamics import scans_of
from linzoo.tools import look


@pytest.mark.parametrize("sign", ["positive", "negative", "mixed"])
def test_dynamics_of_a_file(sign, tmp_path, capsys):
    """A model whose projections were of one sign has eigenvalues of that sign; half of each where they were mixed."""
    model = definite_projection(timm.create_model("mambavision_t"), sign)
    scans = scans_of(model)
    for layer in scans.values():
        parametrize.remove_parametrizations(layer, "x_proj")
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    look.main(["mambavision_t", str(tmp_path / "w.safetensors"), "--what", "dynamics", "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert [row["layer"] for row in rows] == list(scans)
    expected = {"positive": (8, 0), "negative": (0, 8), "mixed": (4, 4)}[sign]
    for row in rows:
        assert (row["positive"], row["negative"]) == expected
        assert row["scenario"] == ("convergent" if sign == "negative" else "divergent")
        assert row["smallest"] <= row["largest"]
    look.main(["mambavision_t", str(tmp_path / "w.safetensors"), "--what", "dynamics"])
    said = capsys.readouterr().out
    summed = f"{expected[0] * len(rows)} positive and {expected[1] * len(rows)} negative eigenvalues"
    assert summed in said and all(name in said for name in scans)


def test_scans_of_several_routes(capsys):
    look.main(["tsm2", "--what", "dynamics", "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert [row["scan"] for row in rows] == [0, 0, 1] * 2


@pytest.fixture
def image(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (80, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    return str(tmp_path / "image.png")


SMALL = ("vmamba_t", "kat_tiny_patch16_224", "vim_t", "videomamba_t", "vrwkv_t", "hrvmamba_n")


@pytest.mark.parametrize("name", SMALL)
def test_heat_of_every_layout(name):
    """Maps of channels last and first, tokens with a class token in the middle, in front and without: the map's place
    is the image's. A layer that sees only a corner has its heat there.
    """
    pytest.importorskip("pytorch_grad_cam")
    few = {key: value for key, value in dict(depths=(1, 1, 1, 1), depth=2).items() if key in signature(name)}
    model = timm.create_model(name, num_classes=4, **few).eval()
    layer = model.neck if hasattr(model, "neck") else model.get_submodule(model.feature_info[-1]["module"])
    with torch.no_grad():
        grid = look.maps_of(model, torch.rand(1, 3, 224, 224))[-1].shape

    def corner(module, args, y):
        """Leaves the upper left place alone."""
        keep = torch.zeros(grid[2:])
        keep[0, 0] = 1
        if y.dim() == 4:
            return y * (keep.unsqueeze(-1) if y.shape[1:3] == grid[2:] else keep)
        keep, extra = keep.flatten(), y.shape[1] - keep.numel()
        if extra:
            place = y.shape[1] // 2 if name == "vim_t" else 0
            keep = torch.cat([keep[:place], torch.ones(1), keep[place:]])
        return y * keep.unsqueeze(-1)

    layer.register_forward_hook(corner)
    [picture] = look.cam(model, torch.rand(1, 3, 224, 224), 1)
    assert picture.heat.shape == (224, 224) and picture.title == "class 1"
    heat = picture.heat
    assert heat[150:, 150:].max() <= 1e-6


def signature(name):
    return inspect.signature(type(timm.create_model(name, device="meta"))).parameters


def test_receptive_field_of_a_convolution():
    """A pixel that the centre does not see has no part in it."""

    class Stride(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 4, 3, stride=2, padding=1)

        def forward_intermediates(self, x, intermediates_only):
            return [self.conv(x)]

    [picture] = look.erf(Stride(), torch.rand(2, 3, 32, 32), None)
    assert set(zip(*np.nonzero(picture.pixels), strict=True)) == {(i, j) for i in (15, 16, 17) for j in (15, 16, 17)}


def test_orders_are_those_of_the_operators():
    """VMamba's four ways over each map; Vim's two, whose class token is left out."""
    small = dict(dims=(16, 16, 16, 16)) if "dims" in signature("vmamba_t") else {}
    pictures = look.orders(
        timm.create_model("vmamba_t", depths=(1, 1, 1, 1), **small).eval(), torch.rand(1, 3, 64, 64), None
    )
    assert [p.title for p in pictures] == [f"selective_scan, {n} x {n}" for n in (16, 8, 4, 2) for _ in range(4)]
    ways = [p.way.tolist() for p in pictures[-4:]]
    rows = [[0, 0], [0, 1], [1, 0], [1, 1]]
    columns = [[0, 0], [1, 0], [0, 1], [1, 1]]
    assert sorted(ways) == sorted([rows, columns, rows[::-1], columns[::-1]])
    pictures = look.orders(timm.create_model("vim_t", depth=1, img_size=48).eval(), torch.rand(1, 3, 48, 48), None)
    found = [p for p in pictures if p.title.startswith("selective_scan")]
    assert [p.way[:4].tolist() for p in found] == [[[0, 0], [0, 1], [0, 2], [1, 0]], [[2, 2], [2, 1], [2, 0], [1, 2]]]


def test_states_reach_what_a_scan_has_seen():
    """A layer of mLSTM sees the tokens before the middle; WKV sees all, VMamba's routes, too."""

    def reached(name, **kwargs):
        model = timm.create_model(name, num_classes=0, **kwargs).eval()
        pictures = look.states(model, torch.rand(1, 3, 64, 64), None)
        assert all(p.pixels.min() >= 0 and p.pixels.max() == 1 for p in pictures)
        return pictures

    [picture] = reached("plain_mlstm_t", depth=1, img_size=64)
    assert picture.title == "mlstm, 4 x 4"
    assert (picture.pixels.ravel() > 0).tolist() == [i <= 2 * 4 + 2 for i in range(16)]
    assert (reached("vrwkv_t", depth=1, img_size=64)[0].pixels > 0).all()
    pictures = reached("vmamba_t", depths=(1, 1, 1, 1))
    assert [p.pixels.shape for p in pictures] == [(16, 16), (8, 8), (4, 4), (2, 2)]
    assert all((p.pixels > 0).all() for p in pictures)


def test_attention_of_the_middle():
    """Means of the heads' softmax, as the layer itself has it without the fused kernel; the class token is left out."""
    model = timm.create_model("kat_tiny_patch16_224", depth=2, img_size=64).eval()
    kept = []
    layer = model.blocks[1].attn
    layer.fused_attn = False
    layer.attn_drop.register_forward_hook(lambda module, args, out: kept.append(args[0]))
    with torch.no_grad():
        model(x := torch.rand(1, 3, 64, 64))
    layer.fused_attn = True
    pictures = look.attention(model, x, None)
    assert [p.title for p in pictures] == ["attention, 4 x 4"] * 2
    expected = kept[0][0].mean(0)[1 + 2 * 4 + 2, 1:].view(4, 4)
    np.testing.assert_allclose(pictures[1].pixels, expected.detach().numpy(), rtol=1e-4)
    window = timm.create_model("mambavision_t", depths=(1, 1, 2, 2)).eval()
    found = [p.title for p in look.attention(window, torch.rand(1, 3, 224, 224), None)]
    assert found == ["attention, 14 x 14", "attention, 7 x 7"]


def test_moving_orders(image, tmp_path):
    """The last frame is the still picture's; the ones before show a part of it."""
    look.main(["plain_ss2d_t", "--what", "orders", "--images", image, "--out", str(tmp_path / "way.gif")])
    with Image.open(tmp_path / "way.gif") as gif:
        assert gif.n_frames == look.FRAMES
        ink = []
        for i in (0, look.FRAMES // 2, look.FRAMES - 1):
            gif.seek(i)
            ink.append(int((np.asarray(gif.convert("L")) < 200).sum()))
    assert ink[0] < ink[1] < ink[2]


@pytest.mark.parametrize("what", ("erf", "features", "orders", "states"))
def test_pictures(what, image, tmp_path, capsys):
    out = tmp_path / "out.png"
    look.main(["efficientvmamba_t", "--what", what, "--images", image, "--out", str(out)])
    assert str(out) in capsys.readouterr().out
    with Image.open(out) as picture:
        assert picture.format == "PNG" and np.asarray(picture.convert("L")).std() > 1


def test_pictures_that_cannot_be(image, capsys, tmp_path):
    out = tmp_path / "out.png"

    def said(*argv):
        return refused(capsys, look.main, *argv, "--out", out)

    assert "--what erf: --images is missing" in said("vmamba_t", "--what", "erf")
    assert "walks along no order" in said("kat_tiny_patch16_224", "--what", "orders", "--images", image)
    assert "has no softmax attention" in said("vmamba_t", "--what", "attention", "--images", image)
    assert "carries no state" in said("kat_tiny_patch16_224", "--what", "states", "--images", image)
    gif = ["--images", image, "--out", tmp_path / "out.gif"]
    assert "expected .png; orders alone move" in refused(capsys, look.main, "vmamba_t", "--what", "erf", *gif)
    assert "gives no maps" in said("terminator", "--what", "features", "--images", image)
    assert "cannot read image 'none.png'" in said("vmamba_t", "--what", "erf", "--images", "none.png")
    pytest.importorskip("pytorch_grad_cam")
    assert "--class 1000; expected a class from 0 to 999" in said(
        "kat_tiny_patch16_224", "--what", "cam", "--class", 1000, "--images", image
    )
    assert "EfficientViM gives several tensors" in said("efficientvim_m1", "--what", "cam", "--images", image)
    assert "RGT gives no classes" in said("rgt_s_x2", "--what", "cam", "--images", image)
    assert not out.exists()


def test_bad_input(capsys):
    assert "has no selective scan (S6)" in refused(capsys, look.main, "kat_tiny_patch16_224", "--what", "dynamics")
    assert "no such model" in refused(capsys, look.main, "vmamba_x", "--what", "dynamics")
    assert "checkpoint 'no.pth'" in refused(capsys, look.main, "vim_t", "no.pth", "--what", "dynamics")
    with pytest.raises(SystemExit):
        look.main(["vim_t"])
    assert "--what" in capsys.readouterr().err
