"""Next-scale sampling: the authors' images, memory, filters, seeds, bad pairs."""

import sys
from pathlib import Path

import pytest
import timm
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "backbones"))
from test_mvar import CASES, load_pair  # noqa: E402
from test_parity import error, synth  # noqa: E402

from linzoo.generate.flow import generators  # noqa: E402
from linzoo.generate.next_scale import draw, generate, keep_likely  # noqa: E402

SMALL = dict(depth=2, patch_nums=(1, 2, 3), V=24, Cvae=8, num_classes=5)


@pytest.fixture
def pair():
    torch.manual_seed(0)
    model = timm.create_model("mvar_d12", **SMALL).eval()
    for p in model.parameters():  # the start keeps gates and logits near zero
        torch.nn.init.normal_(p, std=0.2)
    tokenizer = timm.create_model("mvar_tokenizer", V=24, Cvae=8, ch=32, patch_nums=(1, 2, 3), ch_mult=(1, 1)).eval()
    torch.nn.init.normal_(tokenizer.quantizer.codes.weight)
    return model, tokenizer


@pytest.mark.parametrize("name", CASES)
def test_parity(name, tmp_path):
    case = CASES[name]
    model, tokenizer = load_pair(case, tmp_path)
    y = (torch.from_numpy(synth.image(case["inputs"][1]["shape"], case["inputs"][1]["seed"])).sigmoid() * 10).long()
    made = generate(model, tokenizer, y, generators(range(len(y))), guidance=1.5, top_k=1, top_p=0.0)
    found = {"generated_indices": torch.cat(made.indices, 1), "generated": made.images}
    for out in case["outputs"]:
        if out["name"] in found:
            assert error(found[out["name"]], out) <= out.get("tolerance", 2e-4), out["name"]


def test_memory_is_exact(pair):
    """Map by map, the logits are those of teacher forcing; what is remembered does not grow."""
    model, tokenizer = pair
    y, image = torch.tensor([1, 4]), torch.rand(2, 3, 6, 6) * 2 - 1
    with torch.no_grad():
        inputs = tokenizer.to_inputs(tokenizer.quantize(tokenizer.encode(image)).indices)
        whole = model(y, inputs).split(model.lengths, 1)
        memories, sizes, parts = None, [], [None, *inputs.split(model.lengths[1:], 1)]
        for k, part in enumerate(parts):
            logits, memories = model.step(y, part, k, memories)
            torch.testing.assert_close(logits, whole[k], rtol=1e-4, atol=1e-5)
            sizes.append(sum(x.numel() for memory in memories for x in memory))
    assert len(set(sizes)) == 1


def test_no_map_sees_a_finer_one(pair):
    """Each logit depends on its own map and the coarser ones alone, on all of them."""
    model, _ = pair
    inputs = torch.randn(1, sum(model.lengths[1:]), 8, requires_grad=True)
    logits = model(torch.tensor([2]), inputs).split(model.lengths, 1)
    for k in range(3):
        grad = torch.autograd.grad(logits[k][0, 0].sum(), inputs, retain_graph=True, allow_unused=True)[0]
        seen = torch.zeros(inputs.shape[1], dtype=torch.bool) if grad is None else grad[0].abs().sum(1) > 0
        assert seen.tolist() == [i < sum(model.lengths[1 : k + 1]) for i in range(inputs.shape[1])]


def test_seeds(pair):
    """A sample depends on its seed and class alone; another seed gives another one."""
    args = dict(guidance=2.0, top_k=20, top_p=0.9)
    both = generate(*pair, torch.tensor([3, 1]), generators([5, 6]), **args)
    again = generate(*pair, torch.tensor([3, 1]), generators([5, 6]), **args)
    assert torch.equal(both.images, again.images)
    alone = generate(*pair, torch.tensor([1]), generators([6]), **args)
    assert torch.equal(torch.cat(both.indices, 1)[1:], torch.cat(alone.indices, 1))
    other = generate(*pair, torch.tensor([1]), generators([7]), **args)
    assert not torch.equal(torch.cat(other.indices, 1), torch.cat(alone.indices, 1))
    assert both.images.shape == (2, 3, 6, 6) and 0 <= both.images.min() <= both.images.max() <= 1
    smooth = generate(*pair, torch.tensor([3, 1]), generators([5, 6]), smooth=True, **args)
    assert smooth.images.isfinite().all() and not torch.equal(smooth.images, both.images)


def test_filters():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()[None]
    assert keep_likely(logits, top_k=2).isfinite().tolist() == [[True, True, False, False]]
    assert keep_likely(logits, top_p=0.9).isfinite().tolist() == [[True, True, True, False]]
    assert keep_likely(logits, top_p=0.4).isfinite().tolist() == [[True, False, False, False]]
    assert torch.equal(keep_likely(logits), logits)
    assert keep_likely(logits, 2, 0.7).isfinite().tolist() == [[True, True, False, False]]  # of what top_k left


def test_draw():
    """As often as the probabilities say."""
    logits = torch.tensor([0.5, 0.3, 0.2]).log().expand(1, 20000, 3)
    share = draw(logits, generators([0])).flatten().bincount() / 20000
    torch.testing.assert_close(share, torch.tensor([0.5, 0.3, 0.2]), atol=0.015, rtol=0)


def test_bad_arguments(pair):
    model, tokenizer = pair
    sources = generators([0])
    with pytest.raises(ValueError, match=r"y: expected classes of 0 to 5, got \[6\]"):
        generate(model, tokenizer, torch.tensor([6]), sources)
    with pytest.raises(ValueError, match="top_k=3, top_p=1.5; expected 0 at least, and a share of 1"):
        generate(model, tokenizer, torch.tensor([1]), sources, top_k=3, top_p=1.5)
    other = timm.create_model("mvar_tokenizer", V=16, Cvae=8, ch=32, patch_nums=(1, 2, 3), ch_mult=(1, 1))
    with pytest.raises(ValueError, match="tokenizer: expected V=24 as the transformer has, got V=16"):
        generate(model, other, torch.tensor([1]), sources)
