"""RWKV-SAM: the authors' values, what prompts do, masks of images of any size, bad prompts."""

import json

import pytest
import timm
import torch
from test_parity import PARITY, error, synth

from linzoo.backbones.rwkvsam import RWKVSAM

TINY = dict(
    backbone_name="rwkvsam_backbone_t", img_size=64, dim=32, backbone_args=dict(dims=(8, 16, 32), depths=(1, 1, 1, 1))
)
# Authors' parameters that nothing reads: the encoder of masks as prompts, three mask tokens, three scores.
UNUSED = (16 + 4 + 8) + (16 * 4 * 4 + 16 + 32) + (256 * 16 + 256) + 3 * 256 + 3 * 257


@pytest.fixture
def model():
    return RWKVSAM(**TINY).eval()


def test_parity(tmp_path):
    """At the published size: the embedding, the prompts' tokens, the masks and their scores."""
    case = json.loads((PARITY / "sam" / "rwkvsam.json").read_text())
    file = tmp_path / "reference.pth"
    torch.save({k: torch.from_numpy(v) for k, v in synth.state_dict(case).items()}, file)
    overlay = {"file": str(file)}
    model = timm.create_model(case["model"], pretrained=True, pretrained_cfg_overlay=overlay, **case["kwargs"]).eval()
    assert sum(p.numel() for p in model.parameters()) == case["num_params"] - UNUSED
    image, offsets = (torch.from_numpy(synth.image(i["shape"], i["seed"])) for i in case["inputs"])
    points, labels = 512 + 200 * offsets, torch.ones(2, 1)
    with torch.inference_mode():
        maps = model.encode(image)
        masks, scores = model.decode(maps, points, labels)
        tokens = model.prompt_encoder((1024, 1024), points, labels)
    ours = dict(mask_logits=masks[:, None], iou_pred=scores[:, None], image_embedding=maps[2], sparse_prompt=tokens,
                stage0=maps[0], stage1=maps[1])  # fmt: skip
    checked = [out for out in case["outputs"] if out["name"] in ours]
    assert len(checked) == len(ours)
    for out in checked:
        assert error(ours[out["name"]], out) <= case.get("tolerance", 2e-4), out["name"]


def test_segmenters_backbone_loads_as_a_classifier_would(model, tmp_path):
    case = json.loads((PARITY / "cases" / "rwkvsam_backbone_t.json").read_text())
    file = tmp_path / "backbone.pth"
    torch.save({k: torch.from_numpy(v) for k, v in synth.state_dict(case).items()}, file)
    args = dict(pretrained=True, pretrained_cfg_overlay={"file": str(file)})
    whole = RWKVSAM("rwkvsam_backbone_t", 64, backbone_args=args).backbone.state_dict()
    classifier = timm.create_model("rwkvsam_backbone_t", **args).state_dict()
    assert all(torch.equal(value, classifier[key]) for key, value in whole.items())
    assert whole.keys() == {key for key in classifier if not key.startswith("head.")}


@pytest.mark.parametrize("size", [(64, 64), (40, 97), (150, 33)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_predict(model, size, dtype):
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    points, labels = [[[5, 7], [20.5, 30]], [[1, 2], [0, 0]]], [[1, 0], [1, -1]]
    x = image if dtype == torch.uint8 else image / 255
    masks, scores, logits = model.predict(x, points, labels)
    assert masks.shape == logits.shape == (2, *size)
    assert masks.dtype == torch.bool
    assert scores.shape == (2,)
    assert logits.isfinite().all()
    assert torch.equal(masks, logits > 0)
    box = [[3, 4, 30, 25.0]]
    assert model.predict(x, boxes=box).masks.shape == (1, *size)
    both = model.predict(x, points[:1], labels[:1], box)
    assert not torch.equal(both.logits, model.predict(x, boxes=box).logits)
    if dtype == torch.float32:
        torch.testing.assert_close(logits, model.predict(image, points, labels).logits, rtol=1e-3, atol=1e-4)


def test_encoded_once(model):
    """An image that is asked several times need not be encoded anew."""
    image, box = torch.rand(3, 40, 60), [[3, 4, 30, 25.0]]
    encoded = model.encode_image(image)
    assert torch.equal(model.predict(encoded, boxes=box).logits, model.predict(image, boxes=box).logits)
    with pytest.raises(ValueError, match="boxes: expected .* a part of the image of 60 x 40"):
        model.predict(encoded, boxes=[[70, 0, 80, 1]])


def test_unasked(model):
    """Without prompts a mask an image, each of its own image."""
    x = torch.randn(2, 3, 64, 32)
    with torch.inference_mode():
        masks, scores = model(x)
        assert masks.shape == (2, 16, 8)
        assert scores.shape == (2,)
        torch.testing.assert_close(model(x[1:])[0], masks[1:], rtol=1e-4, atol=1e-5)


def test_init_weights_after_to_empty():
    model = RWKVSAM(**TINY, device="meta").to_empty(device="cpu")
    model.init_weights()
    assert all(t.isfinite().all() for t in model.state_dict().values())
    assert model.eval()(torch.rand(1, 3, 64, 64), boxes=torch.tensor([[0, 0, 9, 9.0]]))[0].isfinite().all()


def test_registered():
    model = timm.create_model("rwkvsam", **TINY)
    assert isinstance(model, RWKVSAM)
    x = torch.rand(1, 3, 64, 64)
    for ours, backbone in zip(
        model.forward_intermediates(x)[1], model.backbone.forward_intermediates(x)[1], strict=True
    ):
        assert torch.equal(ours, backbone)
    assert model.no_weight_decay() <= {name for name, _ in model.named_parameters()}
    with pytest.raises(ValueError, match="in_chans: .* expected 3"):
        timm.create_model("rwkvsam", in_chans=1, **TINY)


def test_prompts_are_read_one_by_one(model):
    """A prompt's mask depends on it alone, on its label, and not on padding beside it."""
    image = torch.rand(3, 64, 48)
    points, labels = torch.rand(3, 2, 2) * 40, torch.tensor([[1, 0], [1, 1], [0, 1]])
    together = model.predict(image, points, labels).logits
    for i in range(3):
        alone = model.predict(image, points[i : i + 1], labels[i : i + 1]).logits
        torch.testing.assert_close(alone[0], together[i], rtol=1e-4, atol=1e-5)
    turned = model.predict(image, points, 1 - labels).logits
    assert all((turned - together).abs().amax((1, 2)) > 1e-3)
    of_object = model.predict(image, points, torch.ones(3, 2)).logits
    assert torch.equal(model.predict(image, points).logits, of_object), "the default"
    swapped = model.predict(image, points.flip(1), labels.flip(1)).logits
    torch.testing.assert_close(swapped, together, rtol=1e-4, atol=1e-4)


def test_several_images(model):
    images, boxes = torch.randn(2, 3, 64, 32), torch.tensor([[0, 0, 9, 9], [4, 5, 20, 40], [1, 1, 31, 63.0]])
    index = torch.tensor([1, 0, 1])
    with torch.inference_mode():
        masks, scores = model(images, boxes=boxes, index=index)
        assert masks.shape == (3, 16, 8)
        for i, image in enumerate(index):
            alone, score = model(images[image : image + 1], boxes=boxes[i : i + 1])
            torch.testing.assert_close(alone[0], masks[i], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(score[0], scores[i], rtol=1e-4, atol=1e-5)
        with pytest.raises(ValueError, match="index: expected with 2 images, got None"):
            model(images, boxes=boxes)
        with pytest.raises(ValueError, match="images: expected .* multiples of 16"):
            model(images[..., :30], boxes=boxes, index=index)


BAD = {
    "points, boxes: expected at least one": dict(),
    "points: expected with labels, got None": dict(labels=[[1]], boxes=[[1, 1, 2, 2]]),
    r"points: expected \(N, P, 2\), got \(1, 2\)": dict(points=[[1, 1]], labels=[[1]]),
    r"labels: expected \(1, 1\), got \(1, 2\)": dict(points=[[[1, 1]]], labels=[[1, 1]]),
    r"labels: expected 1 .* got 3": dict(points=[[[1, 1]]], labels=[[3]]),
    r"points: expected x in 0 .. 48 and y in 0 .. 32, got \[10.0, 40.0\]": dict(points=[[[10, 40]]], labels=[[1]]),
    "points: expected finite numbers, got nan": dict(points=[[[float("nan"), 0]]], labels=[[1]]),
    r"points: expected at least one a prompt": dict(points=torch.zeros(1, 0, 2), labels=torch.zeros(1, 0)),
    "labels: expected a point with label 0 or 1": dict(points=[[[1, 1]]], labels=[[-1]]),
    r"boxes: expected \(N, 4\), got \(4,\)": dict(boxes=[0, 0, 1, 1]),
    r"boxes: expected \(2, 4\), got \(1, 4\)": dict(points=[[[1, 1]]] * 2, labels=[[1]] * 2, boxes=[[0, 0, 1, 1]]),
    r"boxes: expected x0 < x1, .* got \[9.0, 0.0, 1.0, 1.0\]": dict(boxes=[[9, 0, 1, 1]]),
    r"boxes: expected .* a part of the image of 48 x 32": dict(boxes=[[60, 0, 70, 1]]),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_prompts(model, message):
    with pytest.raises(ValueError, match=message):
        model.predict(torch.rand(3, 32, 48), **BAD[message])


def test_bad_images_and_arguments(model):
    for image, message in [
        (torch.rand(1, 3, 8, 8), r"image: expected a tensor \(3, H, W\), got \(1, 3, 8, 8\)"),
        ([[0]], "image: expected a tensor .* got list"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), "image: expected uint8 or floats in 0 .. 1, got torch.int64"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.predict(image, boxes=[[0, 0, 4, 4]])
    with pytest.raises(ValueError, match="dim: expected a multiple of 16, got 40"):
        RWKVSAM(**{**TINY, "dim": 40})
    for size in (60, (64, 48)):
        with pytest.raises(ValueError, match="img_size: expected a multiple of 16, the side of a square, got"):
            RWKVSAM(**{**TINY, "img_size": size})
    with pytest.raises(ValueError, match="backbone_name: expected features of strides 4, 8 and 16"):
        RWKVSAM("vrwkv_t", 64)


def test_every_parameter_learns(model):
    """From points and boxes together; with gradient checkpointing the gradients are the same."""
    images, index = torch.randn(2, 3, 64, 64), torch.tensor([0, 1, 1])
    points, labels = torch.rand(3, 2, 2) * 60, torch.tensor([[1, 0], [1, -1], [0, 1]])
    boxes = torch.tensor([[0, 0, 9, 9], [4, 5, 20, 40], [1, 1, 31, 63.0]])

    def gradients():
        model.zero_grad()
        for prompts in ((points, labels), (points, labels, boxes)):
            masks, scores = model(images, *prompts, index=index)
            (masks.square().mean() + scores.square().mean()).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    model.train()
    plain = gradients()
    assert plain.keys() == {n for n, _ in model.named_parameters()}
    assert all(g.isfinite().all() for g in plain.values())
    model.backbone.set_grad_checkpointing(True)
    torch.testing.assert_close(gradients(), plain, rtol=1e-3, atol=1e-4)


def test_learns_one_mask(model):
    """A few steps on one image make the mask of a box that of its object."""
    target = torch.zeros(1, 16, 16)
    target[:, 4:12, 2:9] = 1
    image = torch.nn.functional.interpolate(target[None], scale_factor=4).expand(-1, 3, -1, -1)
    box = torch.tensor([[8, 16, 36, 48.0]])
    optimizer = torch.optim.AdamW(model.train().parameters(), 3e-3)
    for _ in range(40):
        loss = torch.nn.functional.binary_cross_entropy_with_logits(model(image, boxes=box)[0], target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    predicted = model.eval()(image, boxes=box)[0] > 0
    assert (predicted & (target > 0)).sum() / (predicted | (target > 0)).sum() > 0.9


def test_precision(model):
    image, box = torch.rand(3, 64, 64), [[4, 4, 40, 50]]
    exact = model.predict(image, boxes=box).logits
    with torch.autocast("cpu", torch.bfloat16):
        low = model.predict(image, boxes=box).logits
    assert torch.cosine_similarity(low.flatten(), exact.flatten(), dim=0) > 0.99


def test_compile_and_export(model):
    x, boxes = torch.randn(1, 3, 64, 64), torch.tensor([[4, 4, 40, 50.0]])
    with torch.inference_mode():
        masks, scores = model(x, boxes=boxes)
    program = torch.export.export(model, (x,), {"boxes": boxes}).module()
    torch.testing.assert_close(program(x, boxes=boxes), (masks, scores), rtol=1e-4, atol=1e-5)
    with torch.inference_mode():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x, boxes=boxes), (masks, scores), rtol=1e-4, atol=1e-5)
