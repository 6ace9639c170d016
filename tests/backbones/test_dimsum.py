"""DiMSUM: the authors' values, variants, orders, what has no influence, guidance."""

import json

import pytest
import timm
import torch
from test_parity import PARITY, error, synth

from linzoo.backbones import list_models
from linzoo.backbones.dimsum import FrequencyHalf, checkpoint_filter_fn, haar_packet

CASES = {path.stem: json.loads(path.read_text()) for path in sorted((PARITY / "generation").glob("dimsum*.json"))}
SIZES = {  # parameters with 1,000 classes and with one, at 256 px
    "dimsum_b_2": (198_547_216, 197_779_216),
    "dimsum_l_2": (459_916_304, 458_892_304),
    "dimsum_l_2_v1": (567_940_112, 566_916_112),
    "dimsum_xl_2": (854_831_248, 853_679_248),
    "dimsum_l_4": (459_818_048, 458_794_048),
}


def load(case, tmp_path, default, state=None):
    """The model of a case with the authors' state dict."""
    file, state = tmp_path / "reference.pth", synth.state_dict(case) if state is None else state
    torch.save({k: torch.from_numpy(v) for k, v in state.items()}, file)
    name = case["model"] if timm.is_model(case["model"]) else default
    kwargs = {key: tuple(v) if isinstance(v, list) else v for key, v in case["kwargs"].items()}
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": str(file)}, **kwargs).eval()


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if "b_2" in n else n for n in CASES])
def test_parity(name, tmp_path):
    case = CASES[name]
    model = load(case, tmp_path, "dimsum_l_2")
    assert sum(p.numel() for p in model.parameters()) == case["num_params"]
    x, t, y = (torch.from_numpy(synth.image(i["shape"], i["seed"])) for i in case["inputs"])
    t, y = t.sigmoid(), (y.sigmoid() * 1001).long()
    found = {}

    def keep(name, pick):
        def hook(module, args, out):
            found.setdefault(name, pick(out))  # of the first call

        return hook

    for i, block in enumerate(model.blocks):
        block.register_forward_hook(keep(f"hidden_block{i}", lambda out: out[0]))
        block.register_forward_hook(keep(f"residual_block{i}", lambda out: out[1]))
    model.shared.register_forward_hook(keep("attn_block_first", lambda out: out))
    with torch.inference_mode():
        found["velocity"] = velocity = model(x, t, y)
        null = model(x, t)
        assert torch.equal(null, model(x, t, torch.full_like(y, model.null_class)))
    found["cfg4"] = null + 4 * (velocity - null)
    for out in case["outputs"]:
        assert error(found[out["name"]], out) <= out.get("tolerance", 2e-4), out["name"]


def small(**kwargs):
    torch.manual_seed(0)
    return timm.create_model("dimsum_b_2", **dict(dict(hidden_size=64, depth=4, img_resolution=16), **kwargs)).eval()


@pytest.fixture
def model():
    """With nothing at its zeros of the start."""
    model = small(num_classes=5)
    for module in (model.modulation, model.head, *(block.modulation for block in model.blocks)):
        torch.nn.init.normal_(module.weight, std=0.1)
    return model


@pytest.mark.parametrize("name", SIZES)
def test_variants(name):
    for options, count in zip(({}, dict(num_classes=1, label_dropout=0.0)), SIZES[name], strict=True):
        made = timm.create_model(name, device="meta", **options)
        assert sum(p.numel() for p in made.parameters()) == count
    if name == "dimsum_l_2":
        made = timm.create_model(name, device="meta", num_classes=1, label_dropout=0, img_resolution=64)
        assert sum(p.numel() for p in made.parameters()) == 459_678_736
    assert name in list_models(kind="generation")


def test_haar_packet():
    """Two levels over all bands, by PyWavelets' single level; back again; every token has all bands."""
    pywt = pytest.importorskip("pywt")
    x = torch.randn(4, 4, dtype=torch.float64)
    packet, bands = haar_packet().double(), []
    for band in level(pywt, x.numpy()):
        bands += level(pywt, band)
    torch.testing.assert_close(packet @ x.flatten() / 4, torch.tensor([float(band[0, 0]) for band in bands]).double())
    torch.testing.assert_close(packet @ packet.t() / 16, torch.eye(16).double())


def level(pywt, x):
    """LL, LH (along the column), HL, HH."""
    low, (column, row, both) = pywt.dwt2(x, "haar")
    return [low, column, row, both]


def test_frequency_half_takes_the_packet_apart_and_back():
    """Without its mixer the half is the identity; to the mixer, token (p1, p2) shows channels k = 16 c + 4 p1 + p2."""
    half = FrequencyHalf(32, 64)
    seen = {}
    torch.nn.init.zeros_(half.mixer.out_proj.weight)
    half.mixer.register_forward_pre_hook(lambda m, args: seen.update(x=args[0]))
    torch.nn.init.zeros_(half.modulation.weight)
    torch.nn.init.zeros_(half.modulation.bias)
    q = torch.randn(2, 12 * 8, 32)
    order = torch.arange(96, dtype=torch.int32)[None]
    with torch.no_grad():
        torch.testing.assert_close(half(q, torch.zeros(2, 64), order, 8), q)
    patch = q.view(2, 12, 8, 32)[:, 4:8, 4:8].flatten(1, 2)  # the patch below the first and right of it
    flat = (haar_packet() / 16 @ patch).flatten(1)
    for p1, p2 in ((0, 0), (1, 2), (3, 3)):
        token = seen["x"].view(2, 12, 8, 32)[:, 4 + p1, 4 + p2]
        torch.testing.assert_close(token, flat[:, 4 * p1 + p2 :: 16])


def test_orders():
    made = small(img_resolution=(24, 16), hidden_size=32)  # 12 x 8 tokens, windows of 2
    spatial, windows = (torch.stack(orders)[:, 0] for orders in made.orders())
    assert all(sorted(order.tolist()) == list(range(96)) for order in (*spatial, *windows))
    assert spatial[0, :3].tolist() == [0, 1, 2] and spatial[1, :3].tolist() == [95, 94, 93]
    assert spatial[2, :3].tolist() == [0, 8, 16] and spatial[3, :3].tolist() == [95, 87, 79]
    assert windows[0, :6].tolist() == [0, 1, 8, 9, 2, 3] and windows[1, :6].tolist() == [0, 8, 1, 9, 16, 24]


def test_condition_is_dead_and_residual_is_dropped(model):
    x, t, y = torch.randn(2, 4, 16, 16), torch.tensor([0.2, 0.7]), torch.tensor([1, 3])
    with torch.no_grad():
        before = model(x, t, y)
        for block in model.blocks:
            for half in (block.spatial, block.frequency):
                half.cond_proj.weight.fill_(1e6)
        assert torch.equal(model(x, t, y), before)
        assert not torch.allclose(model(x, t.flip(0), y), before) and not torch.allclose(model(x, t, y + 1), before)
        assert torch.equal(model(x, torch.tensor(0.2), y)[:1], model(x, torch.full((2,), 0.2), y)[:1])
        h, r, _ = model.forward_features(x, t, y)
    assert h.shape == r.shape == (2, 64, 64)


def test_every_parameter_learns(model):
    model.train()
    model(torch.randn(2, 4, 16, 16), torch.tensor([0.2, 0.7]), torch.tensor([1, 3])).square().mean().backward()
    silent = {name for name, p in model.named_parameters() if p.grad is None}
    assert {name.split(".")[-2] for name in silent} == {"cond_proj"}


def test_starts_at_zero():
    """The first velocity is 0; halves and the shared block begin with other gates."""
    fresh = small()
    assert (fresh(torch.randn(1, 4, 16, 16), torch.rand(1)) == 0).all()
    assert fresh.blocks[0].spatial.modulation.weight.std() > 0.01 and fresh.shared.modulation.weight.std() > 0.01
    table = fresh.pos_embed[0].view(8, 8, 64)
    assert torch.equal(table[0, :, :32], table[5, :, :32]) and torch.equal(table[:, 0, 32:], table[:, 5, 32:])
    assert table[0, 3, 0].item() == pytest.approx(torch.tensor(3.0).sin().item())
    empty = timm.create_model("dimsum_b_2", hidden_size=32, depth=1, img_resolution=16, device="meta").to_empty(
        device="cpu"
    )
    empty.init_weights()
    assert all(p.isfinite().all() for p in empty.parameters())


def test_files(model, tmp_path):
    """A training file's averages are taken; positions of another size are resized; filters are left out."""
    case = CASES["dimsum_mini"]
    state = {key: torch.from_numpy(value) for key, value in synth.state_dict(case).items()}
    extra = {"blocks.0.freq_mamba.dwt.w_ll": torch.zeros(1), "blocks.0.freq_mamba.idwt.filters": torch.zeros(1)}
    other = {key: value + 1 for key, value in state.items()}
    made = timm.create_model("dimsum_l_2", hidden_size=128, depth=8, img_resolution=24)
    found = checkpoint_filter_fn({"ema": state | extra, "model": other, "args": {}}, made)
    made.load_state_dict(found)
    torch.testing.assert_close(made.head.bias, state["final_layer.linear.bias"])
    table = state["pos_embed"].view(1, 8, 8, 128).permute(0, 3, 1, 2)
    larger = torch.nn.functional.interpolate(table, (12, 12), mode="bicubic", align_corners=False)
    torch.testing.assert_close(made.pos_embed.view(12, 12, 128), larger[0].permute(1, 2, 0))
    again = checkpoint_filter_fn(dict(made.state_dict()), made)
    assert all(torch.equal(value, again[key]) for key, value in made.state_dict().items())


def test_final_norm(model):
    other = small(num_classes=5, use_final_norm=True)
    other.load_state_dict(model.state_dict() | {"final_norm.weight": torch.full((64,), 2.0)})
    x, t = torch.randn(1, 4, 16, 16), torch.rand(1)
    with torch.no_grad():
        h, r, cond = other.forward_features(x, t)
        u = 2 * torch.nn.functional.rms_norm(r + h, (64,), eps=1e-5)
        shift, scale = other.modulation(cond).chunk(2, 1)
        patches = other.head((1 + scale) * other.norm(u) + shift)
        torch.testing.assert_close(other(x, t)[0, :, 2:4, 4:6].permute(1, 2, 0).flatten(), patches[0, 10])


def test_bad_arguments(model):
    x, t = torch.zeros(1, 4, 16, 16), torch.zeros(1)
    for match, call in (
        (r"img_resolution: expected sides that are multiples of 8", lambda: small(img_resolution=12)),
        (r"a height that is one of a quarter of the width, got \(16, 40\)", lambda: small(img_resolution=(16, 40))),
        (r"hidden_size: expected a multiple of 32, got 48", lambda: small(hidden_size=48)),
        (r"x: expected latents \(B, 4, 16, 16\), got \(1, 4, 8, 8\)", lambda: model(x[..., :8, :8], t)),
        (r"y: expected 1 classes", lambda: model(x, t, torch.zeros(2).long())),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            call()
