"""Models written for other programs by `linzoo export`."""

import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from mmengine.config import ConfigDict
from mmengine.model import revert_sync_batchnorm
from PIL import Image

from linzoo.backbones.layers.s4 import S4ND
from linzoo.ops import aoti, backend_info, compile_cpu
from linzoo.tools import cli, export
from linzoo.tools.engine.config import load_config
from linzoo.tools.engine.task import build

ROOT = Path(__file__).resolve().parents[2]


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as ended:
        export.main(list(argv))
    assert ended.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("name, size", [("test_byobnet", (64, 96)), ("vssd_m", (64, 64))])
def test_onnx_of_any_size(tmp_path, capsys, name, size):
    """The file that ONNX Runtime reads equals the model at another batch, height and width."""
    onnxruntime = pytest.importorskip("onnxruntime")
    options = ("--size", *map(str, size), "--dynamic", "batch,height,width", "--out", str(tmp_path))
    torch.manual_seed(0)
    weights = tmp_path / "w.pth"
    model = timm.create_model(name).eval()
    torch.save(model.state_dict(), weights)
    export.main([name, str(weights), *options])
    said = capsys.readouterr().out
    assert f"2 x 3 x {size[0]} x {size[1]}" in said and f"3 x 3 x {size[0] + 64} x {size[1] + 64}" in said
    session, x = onnxruntime.InferenceSession(tmp_path / "model.onnx"), torch.randn(1, 3, 128, 96)
    [found] = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.inference_mode():
        torch.testing.assert_close(torch.from_numpy(found), model(x), rtol=1e-3, atol=1e-4)


LAYERS = {
    # kernels of complex numbers, which depend on weights alone; a stem mixes channels per frequency
    "S4ND": lambda: torch.nn.Sequential(S4ND(3, length=16, linear=True, out_channels=5), S4ND(5, length=8)),
    "S5": lambda: timm.create_model("s5_pixel_s", depth=1),
    "S4D": lambda: timm.create_model("s4d_pixel_s", depth=1),
    "Vim": lambda: timm.create_model("vim_t", depth=1, img_size=64),  # a class token in the middle
    "ViM2": lambda: timm.create_model("vim2_t", depths=(1, 1), dims=(32, 64)),
    "LocalVim": lambda: timm.create_model("localvim_t", routes=("h v_flip w7 w7_flip",), img_size=64),  # filled windows
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_onnx_of(tmp_path, name):
    """Where sizes may change, the file is right at another one, which windows and strides do not divide."""
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model, auto = LAYERS[name]().eval(), torch.export.Dim.AUTO
    if name == "S4ND":
        x, other, dynamic = torch.randn(2, 12, 20, 3), torch.randn(3, 20, 9, 3), {0: auto, 1: auto, 2: auto}
    elif name in ("S5", "S4D"):
        x, other, dynamic = torch.randn(2, 3, 32, 32), torch.randn(3, 3, 32, 32), {0: auto}
    else:
        x, other, dynamic = torch.randn(2, 3, 64, 64), torch.randn(3, 3, 80, 144), {0: auto, 2: auto, 3: auto}
    run = export.to_onnx(model, x, dynamic, tmp_path / "model.onnx")
    assert max(export.compare(run, model, images)[0] for images in (x, other)) < export.TOLERANCE


@pytest.mark.slow
def test_archive_of_torch(tmp_path, capsys):
    export.main(["vim_t", "--format", "torch", "--size", "64", "64", "--dynamic", "", "--out", str(tmp_path)])
    program = torch.export.load(tmp_path / "model.pt2")
    assert any(node.target is torch.ops.linzoo.selective_scan.default for node in program.graph.nodes)
    assert "0.0e+00" in capsys.readouterr().out


@pytest.mark.slow
def test_package_runs_without_linzoo(tmp_path, run_alone):
    """An AOTInductor package holds our kernels: another process runs it on another size without importing LinZoo."""
    model = timm.create_model("vim_t", depth=1, img_size=32).eval()
    package = tmp_path / "model_aoti.pt2"
    run = export.to_aoti(model, torch.randn(2, 3, 32, 32), {0: torch.export.Dim.AUTO}, package)
    x = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        expected = model(x)
    for y in (run_alone(package, x), *run(x), run(x.expand(3, -1, -1, -1).contiguous())[0][2:]):
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    for wrong in (torch.randn(3, 3, 32, 64), x.double()):
        with pytest.raises(RuntimeError):
            run(wrong)


@pytest.mark.slow
def test_package_of_complex_states(tmp_path):
    model = timm.create_model("s5_pixel_s", depth=1).eval()
    run = export.to_aoti(model, torch.randn(2, 3, 16, 16), {0: torch.export.Dim.AUTO}, tmp_path / "model_aoti.pt2")
    x = torch.randn(3, 3, 16, 16)
    with torch.inference_mode():
        torch.testing.assert_close(run(x)[0], model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["vrwkv_t", "vrwkv6_t", "vil_t", "vim_t"])
def test_trace_at_the_size_of_the_positions(name):
    """They fit the traced image as they are, and other images resized."""
    model = timm.create_model(name, depth=2, img_size=32, global_pool="avg").eval()
    axes = dict.fromkeys((0, 2, 3), torch.export.Dim.AUTO)
    program = torch.export.export(model, (torch.randn(2, 3, 32, 32),), dynamic_shapes=(axes,)).module()
    for size in ((32, 32), (96, 64)):
        x = torch.randn(3, 3, *size)
        with torch.inference_mode():
            torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-5)


def test_every_kernel_has_a_function_for_packages():
    for op in compile_cpu.sources():
        if backend_info()[op]["cpu"] is None:
            kernels = compile_cpu.kernels(op)
            assert all(aoti._declaration(kernel) for kernel in kernels)
            assert kernels or op == "depthwise_conv2d"  # which has a kernel for its backward pass alone


DENSE = {
    "seg/upernet_groupmamba_t_scenes": (
        "depths=(1, 1, 1, 1)",
        "decode_head=dict(channels=16), auxiliary_head=dict(channels=16)",
    ),
    "det/retinanet_efficientvim_m4_1x_coco": (
        "depths=(1, 1, 1)",
        "neck=dict(out_channels=16), bbox_head=dict(in_channels=16, feat_channels=16, num_classes=5, stacked_convs=1)",
    ),
}


def dense(name, folder):
    """A config of few blocks and narrow heads, its model, and a checkpoint."""
    blocks, heads = DENSE[name]
    config, weights = folder / "config.py", folder / "w.pth"
    config.write_text(
        f"_base_ = [{str(ROOT / 'configs' / f'{name}.py')!r}]\n"
        f"model = dict(backbone=dict(model_kwargs=dict({blocks}), pretrained=False), {heads})\n"
    )
    torch.manual_seed(0)
    model = revert_sync_batchnorm(build(load_config(str(config)))).eval()
    torch.save(model.state_dict(), weights)
    return model, str(config), str(weights)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["torch", "onnx"])
def test_segmenter_of_mmseg(tmp_path, capsys, form):
    """The file gives the logits that mmseg's `predict` gives, at the images' size."""
    if form == "onnx":
        pytest.importorskip("onnxruntime")
    model, *argv = dense("seg/upernet_groupmamba_t_scenes", tmp_path)
    export.main([*argv, "--format", form, "--size", "96", "128", "--out", str(tmp_path)])
    assert (
        "images: RGB pixels from 0 to 1, less the mean 0.5 0.5 0.5, divided by 0.5 0.5 0.5" in capsys.readouterr().out
    )
    torch.manual_seed(0)
    x = torch.randn(3, 3, 96, 128)
    with torch.inference_mode():
        expected = model.inference(x, [dict(img_shape=(96, 128), ori_shape=(96, 128))] * 3)
    torch.testing.assert_close(_run(tmp_path, x)[0], expected, rtol=1e-3, atol=1e-3 * float(expected.std()))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["torch", "onnx"])
def test_detector_of_one_stage(tmp_path, form):
    """At another size, after NMS the file's boxes and scores are those of mmdet's own."""
    if form == "onnx":
        pytest.importorskip("onnxruntime")
    axes = "batch,height,width"
    model, *argv = dense("det/retinanet_efficientvim_m4_1x_coco", tmp_path)
    export.main([*argv, "--format", form, "--size", "160", "192", "--dynamic", axes, "--out", str(tmp_path)])
    torch.manual_seed(0)
    x = torch.randn(3, 3, 192, 160)
    with torch.inference_mode():
        found = _run(tmp_path, x)
    for i, (boxes, scores) in enumerate(zip(*found, strict=True)):
        least = float(scores.flatten().topk(200).values[-2:].mean())
        box, label = (scores > least).nonzero(as_tuple=True)
        kept = torchvision.ops.batched_nms(boxes[box], scores[box, label], label, 0.5)
        post = dict(score_thr=least, nms_pre=10**6, nms=dict(type="nms", iou_threshold=0.5), max_per_img=10**6)
        meta = dict(img_shape=(192, 160), scale_factor=(1.0, 1.0))
        with torch.inference_mode():
            maps = model(x[i : i + 1], mode="tensor")
            [expected] = model.bbox_head.predict_by_feat(*maps, batch_img_metas=[meta], cfg=ConfigDict(post))
        assert 1 < len(kept) < 199
        torch.testing.assert_close(boxes[box][kept], expected.bboxes, rtol=1e-3, atol=1e-2)
        torch.testing.assert_close(scores[box, label][kept], expected.scores, rtol=1e-3, atol=1e-4)


def _run(folder, x):
    if (file := folder / "model.pt2").exists():
        y = torch.export.load(file).module()(x)
        return [y] if isinstance(y, torch.Tensor) else y
    session = pytest.importorskip("onnxruntime").InferenceSession(folder / "model.onnx")
    return [torch.from_numpy(y) for y in session.run(None, {session.get_inputs()[0].name: x.numpy()})]


@pytest.mark.slow
def test_integers(tmp_path, capsys):
    """The error is that of --calib's images."""
    pytest.importorskip("onnxruntime")
    rng = np.random.default_rng(0)
    for i in range(6):
        pixels = np.kron(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8), np.ones((12, 12, 1), np.uint8))
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    options = ("--format", "qdq", "--calib", str(tmp_path), "--out", str(tmp_path / "out"))
    export.main(["test_vit2", *options, "--images", "6"])
    said = capsys.readouterr().out
    error = float(re.search(r"over 6 calibration images: error ([0-9.]+) of their spread, same class", said)[1])
    assert 0 < error < 0.5
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["model_int8.onnx"]
    assert "holds 6 images; expected 32" in refused(capsys, "test_vit2", *options)
    assert "'segmamba' takes volumes" in refused(capsys, "segmamba", *options)


def test_a_wrong_file_is_said(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(export.FORMATS, "torch", (lambda *args: lambda x: [torch.zeros(len(x), 1000)], "model.pt2"))
    with pytest.raises(SystemExit) as ended:
        export.main(["test_byobnet", "--format", "torch", "--size", "32", "32", "--out", str(tmp_path)])
    assert ended.value.code == 1 and "is off by" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv, said",
    [
        (["vssd"], "MODEL 'vssd': no such model in timm or LinZoo (did you mean 'vssd_"),
        (["test_byobnet", "--dynamic", "depth"], "unknown axis 'depth'; expected some of batch,height,width"),
        (["test_byobnet", "--size", "0", "32"], "--size 0 32: expected 2 positive numbers"),
        (["test_vit", "--size", "33", "33"], "MODEL 'test_vit' takes 160 x 160 alone"),
        (["test_byobnet", "absent.pth"], "absent.pth"),
        (["vim2_t.untrained"], "no weights of 'vim2_t.untrained' are published"),
        (["test_byobnet", "--format", "qdq"], "--calib None: expected a folder with --format qdq"),
        (["test_byobnet", "--calib", "."], "--calib .: expected a folder with --format qdq, and with it alone"),
        (["test_byobnet", "--scan", "chunked", "--dynamic", "batch,height"], "--scan chunked: expected --format onnx"),
        (["vfimamba"], "MODEL 'vfimamba' is of kind 'interpolation'; expected one that takes images or volumes alone"),
        (["rwkvsam"], "MODEL 'rwkvsam' is of kind 'promptable'; expected one that takes images or volumes alone"),
        (
            ["det/mask-rcnn_groupmamba_t_scenes", "w.pth"],
            "'MaskRCNN' cannot be exported; expected a detector of one stage",
        ),
        (["cls/groupmamba_t_digits"], "is a config: WEIGHTS is missing; expected its checkpoint"),
    ],
)
def test_what_is_refused(tmp_path, capsys, argv, said):
    assert said in refused(capsys, *argv, "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_command_line(capsys):
    """Every command says what it is, in the list and by itself."""
    assert cli.main(["--help"]) == 0
    listed = capsys.readouterr().out
    assert all(f"  {name} " in listed for name in cli.COMMANDS)
    assert cli.main(["completion", "bash"]) == 0
    assert "finetune" in capsys.readouterr().out
    assert cli.main(["finetun"]) == 2
    with pytest.raises(SystemExit, match="0"):
        cli.main(["make-data", "--help"])
    for name in ("export", "finetune", "build"):
        with pytest.raises(SystemExit) as ended:
            cli.main([name, "--help"])
        assert ended.value.code == 0 and "usage:" in capsys.readouterr().out
