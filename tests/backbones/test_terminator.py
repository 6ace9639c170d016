"""Terminator: the authors' values, kernels, norms of the batch at hand, losses, Kar3."""

import json

import pytest
import timm
import torch
import torch.nn.functional as F
from test_parity import PARITY, error, synth

from linzoo.backbones import list_models
from linzoo.backbones.terminator import HyperKernel, mixed_norm, tile
from linzoo.tools.engine import Classifier, InputError, Kar3

CASES = {path.stem: json.loads(path.read_text()) for path in sorted((PARITY / "fixed").glob("*.json"))}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return timm.create_model("terminator", img_size=9, num_classes=4).eval()


@pytest.mark.parametrize("name", CASES)
def test_parity(name, tmp_path):
    case, file = CASES[name], tmp_path / "reference.pth"
    torch.save({k: torch.from_numpy(v) for k, v in synth.state_dict(case).items()}, file)
    overlay = {"file": str(file)}
    model = timm.create_model(case["model"], pretrained=True, pretrained_cfg_overlay=overlay, **case["kwargs"]).eval()
    assert sum(p.numel() for p in model.parameters()) == case["num_params"]
    images = [torch.from_numpy(synth.image(i["shape"], i["seed"])) for i in case["inputs"]]
    with torch.inference_mode():
        found = {f"block{i}": y for i, y in enumerate(model.forward_blocks(*images))}
        found |= {f"hk{i}": model.blocks[i].kernel()[None] for i in (0, 4)}
        found["slow_loss"] = torch.stack([model.slow_loss(), model.slow_loss(tiled=True)])
        found["logits"] = model(*images)
    for out in case["outputs"]:
        assert error(found[out["name"]], out) <= out.get("tolerance", 2e-4), out["name"]


def test_variants():
    assert list_models(kind="fixed") == ["terminator"]
    for classes, count in ((10, 1_336_855), (100, 1_362_865)):
        model = timm.create_model("terminator", num_classes=classes, device="meta")
        assert sum(p.numel() for p in model.parameters()) == count
    assert model(torch.empty(1, 3, 32, 32, device="meta")).shape == (1, 100)


def test_kernel_by_hand():
    """A kernel of 2 x 3 positions' corner, without and with what the batch shows."""
    torch.manual_seed(0)
    kernel, context = HyperKernel(2, 3, 4, 1, 2, context=5), torch.randn(2, 5, 6, 6)
    with torch.no_grad():
        kernel.bias.normal_()
        at = torch.tensor([[-1.0, -1], [-1, 0], [-1, 1], [0, -1], [0, 0], [0, 1], [1, -1], [1, 0], [1, 1]])
        h = kernel.filters[1](at).sin() * kernel.linears[0](kernel.filters[0](at).sin()) + kernel.bias
        torch.testing.assert_close(kernel(), kernel.output(h).mT.view(2, 3, 3))
        pooled = F.adaptive_avg_pool2d(context, 3).mean(0).flatten(1).mT
        v = F.gelu(kernel.fc(kernel.reduce(pooled)))
        h = (h + 0.1 * h / h.square().sum(0).sqrt()) * kernel.mix[0](v)
        torch.testing.assert_close(kernel(context), kernel.output(h).mT.view(2, 3, 3))


def test_gradient_passes_the_normalised_half_alone():
    """What makes a state longer in its own direction has no gradient: h / ||h|| stays the same."""
    torch.manual_seed(0)
    kernel, context = HyperKernel(2, 3, 4, 1, 2, context=5).double(), torch.randn(1, 5, 3, 3, dtype=torch.float64)
    longer = torch.ones((), dtype=torch.float64, requires_grad=True)
    kernel.linears[0].register_forward_hook(lambda module, args, y: longer * y)  # the bias is 0
    kernel(context).square().sum().backward()
    assert longer.grad is not None and longer.grad.abs() < 1e-12
    assert kernel.linears[0].weight.grad.abs().max() > 1e-6


def test_norms_take_turns():
    x = torch.randn(4, 24, 5, 5) * torch.arange(1, 5).view(4, 1, 1, 1)
    y = mixed_norm(x).unflatten(1, (12, 2))
    assert (y[:, 1::2].std((3, 4), unbiased=False) - 1).abs().max() < 1e-3  # of each image
    assert (y[:, 0::2].std((0, 3, 4), unbiased=False) - 1).abs().max() < 1e-3  # of the batch
    assert y[0, 0].std() < 0.8 * y[3, 0].std()


def test_outputs_depend_on_the_batch(model):
    x = torch.randn(3, 3, 9, 9)
    with torch.inference_mode():
        assert not torch.allclose(model(x)[:1], model(x[:1]), atol=1e-3)
        assert model(x[:1]).shape == (1, 4)
        torch.testing.assert_close(model.forward_head(model.forward_features(x)), model(x))


def test_tile():
    x = torch.arange(2.0).view(1, 2, 1, 1)
    assert tile(x, 6).flatten().tolist() == [0, 1, 0, 1, 0, 1]


def test_slow_loss_by_hand(model):
    with torch.no_grad():
        kernels = [block.kernel() for block in model.blocks]
        sums = [kernel.sum(0) for kernel in kernels]
        expected = sum((sums[i] - sums[j]).square().mean() for i in range(5) for j in range(i))
        torch.testing.assert_close(model.slow_loss(), expected)
        pairs = ((i, j) for i in range(5) for j in range(i))
        tiled = sum(
            (kernels[i] - kernels[j].repeat(len(kernels[i]) // len(kernels[j]), 1, 1)).square().mean() for i, j in pairs
        )
        torch.testing.assert_close(model.slow_loss(tiled=True), tiled)


def test_every_parameter_learns(model):
    losses = model.train().auxiliary_losses()
    loss = F.cross_entropy(model(torch.randn(3, 3, 9, 9)), torch.tensor([0, 1, 2])) + sum(losses.values())
    loss.backward()
    assert {n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()} == set()


def test_init_weights_after_to_empty():
    empty = timm.create_model("terminator", img_size=8, device="meta").to_empty(device="cpu")
    empty.init_weights()
    assert all(t.isfinite().all() for t in empty.state_dict().values())
    first = timm.create_model("terminator", img_size=8)
    for (name, ours), theirs in zip(empty.named_parameters(), first.parameters(), strict=True):
        if ours.numel() > 200:  # of one distribution
            assert 0.5 < ours.std() / theirs.std().clamp(min=1e-9) < 2 or ours.std() == theirs.std() == 0, name
    assert empty.eval()(torch.randn(2, 3, 8, 8)).isfinite().all()


def test_kar3_by_hand():
    p = torch.nn.Parameter(torch.tensor([1.0, -1.0, 0.0]))
    optimizer = Kar3([p], lr=0.1, betas=(0.5, 0.9))
    for gradient, expected in (
        ([2.0, -3.0, 0.0], [0.9, -0.9, 0.0]),  # averages are 0 at first
        ([-0.1, -3.0, 0.0], [0.8, -0.6, 0.0]),  # m_1 = 1 and m_2 = 0.2 outvote a small turn
        ([-9.0, 0.0, 0.0], [0.7, -0.4, 0.0]),
    ):
        p.grad = torch.tensor(gradient)
        optimizer.step()
        torch.testing.assert_close(p.data, torch.tensor(expected))
    state = optimizer.state_dict()
    other = Kar3([torch.nn.Parameter(p.data.clone())], lr=0.1)
    other.load_state_dict(state)
    assert [len(s["averages"]) for s in other.state.values()] == [2]
    with pytest.raises(InputError, match=r"betas=\(0.5, 1\); expected a rate of 0 at least"):
        Kar3([p], betas=(0.5, 1))


def test_auxiliary_losses_of_a_classifier():
    from mmpretrain.structures import DataSample

    samples = [DataSample().set_gt_label(i) for i in (0, 1)]
    settings = dict(num_classes=2, img_size=8)
    task = Classifier("terminator", auxiliary=dict(slow=0.5), **settings)
    losses = task(torch.randn(2, 3, 8, 8), samples, mode="loss")
    assert set(losses) == {"loss", "loss_slow"}
    torch.testing.assert_close(losses["loss_slow"], 0.5 * task.model.slow_loss())
    with pytest.raises(InputError, match="auxiliary={'slow': 1.0}: model_name='vssd_m' has no such losses"):
        Classifier("vssd_m", num_classes=2, auxiliary=dict(slow=1.0))


def test_bad_arguments(model):
    with pytest.raises(ValueError, match=r"x: expected \(B, 3, 9, 9\), got \(2, 3, 9, 12\)"):
        model(torch.randn(2, 3, 9, 12))
    with pytest.raises(ValueError, match=r"img_size: expected one side of square images, got \(8, 12\)"):
        timm.create_model("terminator", img_size=(8, 12))


@pytest.mark.slow
def test_export(model):
    x = torch.randn(2, 3, 9, 9)
    program = torch.export.export(model, (x,)).module()
    with torch.inference_mode():
        torch.testing.assert_close(program(x), model(x), rtol=1e-3, atol=1e-4)
