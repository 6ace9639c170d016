"""M-VAR and its tokenizer: the authors' values, variants, memory, what the maps see."""

import functools
import json

import pytest
import timm
import torch
import torch.nn.functional as F
from test_dimsum import load
from test_parity import PARITY, error, synth

from linzoo.backbones import list_models
from linzoo.backbones.mvar_tokenizer import refiners

CASES = {path.stem: json.loads(path.read_text()) for path in sorted((PARITY / "generation").glob("mvar*.json"))}


def load_pair(case, tmp_path):
    """Transformer and tokenizer of a case."""
    state = synth.state_dict(case)
    models = []
    for name, prefix, ours in (
        ("mvar_d16", "var.", ("depth", "patch_nums", "V", "Cvae", "num_classes", "attn_l2_norm")),
        ("mvar_tokenizer", "vae.", ("patch_nums", "V", "Cvae", "ch")),
    ):
        part = {key.removeprefix(prefix): x for key, x in state.items() if key.startswith(prefix)}
        kwargs = {key: value for key, value in case["kwargs"].items() if key in ours}
        models.append(load(dict(case, kwargs=kwargs), tmp_path, name, part))
    return models


@pytest.mark.parametrize("name", CASES)
def test_parity(name, tmp_path):
    case = CASES[name]
    model, tokenizer = load_pair(case, tmp_path)
    assert sum(p.numel() for p in model.parameters()) == case["num_params"]
    image, y = (torch.from_numpy(synth.image(i["shape"], i["seed"])) for i in case["inputs"])
    image, y = 0.5 * image, (y.sigmoid() * 10).long()
    found = {}
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda m, args, out, i=i: found.update({f"block{i}": out[0]}))
    model.blocks[0].attn.register_forward_hook(lambda m, args, out: found.update({"attn_block0": out}))
    model.blocks[0].mamba.register_forward_hook(lambda m, args, out: found.update({"mamba_block0": out[0]}))
    with torch.inference_mode():
        found["encoder_f"] = f = tokenizer.encode(image)
        codes = tokenizer.quantize(f)
        found["indices"] = indices = torch.cat(codes.indices, 1)
        found["f_hat"] = codes.f_hat
        found["reconstruction"] = tokenizer.decode(codes.f_hat)
        torch.testing.assert_close(found["reconstruction"], tokenizer(image))
        found["var_input"] = tokenizer.to_inputs(codes.indices)
        found["logits"] = logits = model(y, found["var_input"])
        found["loss"] = F.cross_entropy(logits.mT, indices, reduction="none")
    for out in case["outputs"]:
        if not out["name"].startswith("generated"):  # see tests/generate
            assert error(found[out["name"]], out) <= out.get("tolerance", 2e-4), out["name"]


def test_variants():
    counts = {
        12: 198_435_568,
        16: 464_157_440,
        20: 900_529_136,
        24: 1_550_067_136,
        30: 3_017_065_756,
        32: 3_658_707_968,
    }
    for depth, count in counts.items():
        model = timm.create_model(f"mvar_d{depth}", device="meta")
        assert sum(p.numel() for p in model.parameters()) == count
        plain = timm.create_model(f"mvar_d{depth}", attn_l2_norm=False, device="meta")
        assert count - sum(p.numel() for p in plain.parameters()) == depth**2
    tokenizer = timm.create_model("mvar_tokenizer", device="meta")
    assert sum(p.numel() for p in tokenizer.parameters()) == 108_948_355
    assert {"mvar_d12", "mvar_tokenizer"} < set(list_models(kind="generation"))


def test_refiners():
    """As the published weights take them; ties do not follow a formula."""
    expected = {1: "0", 4: "0123", 5: "01223", 6: "001233", 10: "0011122333", 14: "00011112222333"}
    assert {K: "".join(map(str, refiners(K))) for K in expected} == expected


@pytest.fixture
def tokenizer():
    torch.manual_seed(0)
    made = timm.create_model("mvar_tokenizer", V=24, Cvae=8, ch=32, patch_nums=(1, 2, 3), ch_mult=(1, 2))
    torch.nn.init.normal_(made.quantizer.codes.weight)
    return made


def test_codes_by_hand(tokenizer):
    """The nearest code of what is left, map by map, at its size."""
    f = torch.randn(2, 8, 3, 3)
    with torch.no_grad():
        found, rest = tokenizer.quantize(f), f
        for k, side in enumerate((1, 2, 3)):
            z = F.adaptive_avg_pool2d(rest, side).flatten(2).mT
            expected = torch.cdist(z, tokenizer.quantizer.codes.weight[None]).argmin(2)
            assert torch.equal(found.indices[k], expected)
            rest = rest - tokenizer.enlarge(k, expected)
        torch.testing.assert_close(found.f_hat, f - rest)


def test_tokenizer_learns(tokenizer):
    """Every parameter has a gradient, the encoder's from the image, too; straight through, f_hat passes as f."""
    image = torch.rand(4, 3, 6, 6) * 2 - 1
    losses = tokenizer.losses(image)
    assert set(losses) == {"loss_image", "loss_codes"}
    by_image = torch.autograd.grad(losses["loss_image"], tokenizer.encoder.stem.weight, retain_graph=True)[0]
    assert by_image.abs().sum() > 0
    sum(losses.values()).backward()
    used = {n for n, p in tokenizer.named_parameters() if p.grad is None}
    assert used == {f"quantizer.refine.1.{part}" for part in ("weight", "bias")}  # of three maps none takes it
    optimizer = torch.optim.Adam(tokenizer.parameters(), 1e-3)
    first = sum(x.item() for x in losses.values())
    for _ in range(40):
        optimizer.zero_grad()
        sum(tokenizer.losses(image).values()).backward()
        optimizer.step()
    assert sum(x.item() for x in tokenizer.losses(image).values()) < 0.5 * first


def test_start():
    """As published: gates of attention and Mamba-2 near 0, those of the MLP halved; a head near 0; sharpness 4."""
    torch.manual_seed(0)
    model = timm.create_model("mvar_d12", depth=2, num_classes=5)
    std = (1 / (3 * 128)) ** 0.5
    weight = model.blocks[0].modulation.weight.chunk(9)
    assert weight[1].std() < 1.1e-3 * std < 0.4 * std < weight[2].std() < 0.5 * std
    assert model.head.weight.std() < 0.022 * std and model.blocks[0].modulation.bias.abs().max() == 0
    assert model.blocks[0].attn.log_scale.exp().mean().item() == pytest.approx(4)
    assert model.blocks[0].mamba.A_log.exp().min() >= 1 and model.blocks[0].mamba.A_log.exp().max() <= 16
    rates = [timm.create_model("mvar_d12", device="meta").blocks[i].drop_path.drop_prob for i in (0, 11)]
    assert rates == pytest.approx([0, 0.05])
    empty = timm.create_model("mvar_d12", depth=1, device="meta").to_empty(device="cpu")
    empty.init_weights()
    assert all(p.isfinite().all() for p in empty.parameters())


def test_sharpness_is_bounded():
    from linzoo.backbones.mvar import MapAttention

    attention, x = MapAttention(64), torch.randn(1, 5, 64)
    with torch.no_grad():
        attention.log_scale.fill_(20.0)
        high = attention(x, [2, 3])
        attention.log_scale.fill_(4.6051702)
        torch.testing.assert_close(attention(x, [2, 3]), high)


def test_bad_arguments(tokenizer):
    make, y = functools.partial(timm.create_model, "mvar_d12", depth=1, num_classes=5), torch.zeros(1).long()
    model = make(patch_nums=(1, 2))
    for match, call in (
        (r"patch_nums: expected sides that grow from 1 at least, got \(2, 2\)", lambda: make(patch_nums=(2, 2))),
        (r"inputs: expected \(1, 4, 32\), got \(1, 5, 32\)", lambda: model(y, torch.zeros(1, 5, 32))),
        (r"ch: expected a multiple of 32, got 40", lambda: timm.create_model("mvar_tokenizer", ch=40)),
        (r"V, Cvae: expected 1 at least, got 0 and 32", lambda: timm.create_model("mvar_tokenizer", V=0)),
        (r"image: expected \(B, 3, 6, 6\), got \(1, 3, 8, 8\)", lambda: tokenizer(torch.zeros(1, 3, 8, 8))),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            call()
