"""LinFusion: the authors' values, layers and whole UNets; weights in their layout; other sizes; distillation."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

diffusers = pytest.importorskip("diffusers")

from diffusers import DDPMScheduler, UNet2DConditionModel  # noqa: E402
from diffusers.models.attention_processor import Attention  # noqa: E402

from linzoo.generate.linfusion import (  # noqa: E402
    FILE,
    LinearAttention,
    distillation_losses,
    freeze_all_else,
    install,
    linear_attention,
    save,
    self_attentions,
    state_of,
    student_of,
    training_target,
)

PARITY = Path(__file__).parents[1] / "parity"
sys.path.insert(0, str(PARITY))
import synth  # noqa: E402

CASES = {path.stem: json.loads(path.read_text()) for path in sorted((PARITY / "linfusion").glob("*.json"))}
LAYERS = [name for name in CASES if name.startswith("op_")]
UNETS = [name for name in CASES if not name.startswith("op_")]
TINY = CASES["linfusion_unet_tiny"]["kwargs"]["unet"]
TOLERANCE = 2e-5


def assert_same(ours, out):
    assert list(ours.shape) == out["shape"], out["name"]
    where = slice(None) if out["index"] == "all" else out["index"]
    off = (ours.detach().double().flatten()[where] - torch.tensor(out["value"], dtype=torch.float64)).abs().max()
    assert off <= TOLERANCE * out["std"] + 1e-6, (out["name"], off / out["std"])


def read(name):
    case = CASES[name]
    state = {key: torch.from_numpy(value) for key, value in synth.state_dict(case).items()}
    inputs = [torch.from_numpy(synth.image(i["shape"], i["seed"])) for i in case["inputs"]]
    return case, state, inputs, {out["name"]: out for out in case["outputs"]}


def part(state, prefix):
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


@pytest.fixture
def unet():
    return UNet2DConditionModel(**TINY).eval()


def inputs_of(unet, batch=2, size=(16, 16)):
    text = torch.randn(batch, 7, unet.config.cross_attention_dim)
    return torch.randn(batch, 4, *size), torch.randint(0, 1000, (batch,)), text


@pytest.mark.parametrize("name", LAYERS)
def test_layer(name):
    case, state, (x,), outputs = read(name)
    k = case["kwargs"]
    mid = {None: k["dim"], -1: None}.get(k["projection_mid_dim"], k["projection_mid_dim"])
    attn = Attention(
        k["dim"], heads=k["heads"], dim_head=k["dim"] // k["heads"], processor=LinearAttention(k["dim"], mid)
    )
    attn.processor.load_state_dict({key: v for key, v in state.items() if key.startswith(("to_q_.", "to_k_."))})
    attn.load_state_dict({key: v for key, v in state.items() if not key.startswith(("to_q_.", "to_k_."))}, False)
    assert sum(p.numel() for p in attn.parameters()) == case["num_params"]
    assert_same(attn(x), outputs["y"])
    if "q_nonlinear" in outputs:
        assert_same(attn.processor.to_q_(x), outputs["q_nonlinear"])


@pytest.mark.parametrize("name", UNETS)
def test_unet(name):
    """Teacher, student, their attentions and the three losses, at the sizes of the case."""
    case, state, (latents, noise, z, text), outputs = read(name)
    teacher = UNet2DConditionModel(**case["kwargs"]["unet"]).eval()
    teacher.load_state_dict(part(state, "unet."))
    student = student_of(teacher, weights=part(state, "linfusion."))
    assert sum(value.numel() for value in state_of(student).values()) == case["num_params"]
    scheduler = DDPMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type=case["kwargs"]["prediction_type"],
    )
    t = (z.sigmoid() * 1000).long()
    noisy = scheduler.add_noise(latents, noise, t)
    assert_same(noisy, outputs["noisy"])
    target = training_target(scheduler, latents, noise, t)
    losses = distillation_losses(student, teacher, noisy, t, text, target)
    seen = {}
    for model, who in ((teacher, "teacher"), (student, "student")):
        called = []
        for attn in self_attentions(model).values():
            attn.register_forward_hook(lambda module, args, y, called=called: called.append(y))
        with torch.no_grad():
            seen[who] = model(noisy, t, text).sample
        seen |= {f"attn_first_{who}": called[0], f"attn_last_{who}": called[-1]}
    seen["losses"] = torch.stack([losses[key] for key in ("noise", "output", "attention", "loss")])
    for key in outputs.keys() - {"noisy"}:
        assert_same(seen[key], outputs[key])


def test_any_number_of_tokens():
    """The result of tokens that are repeated is that of each once; one token sees itself."""
    q, k, v = torch.rand(3, 2, 5, 8, dtype=torch.float64)
    once = linear_attention(q, k, v)
    twice = linear_attention(*(x.repeat(1, 2, 1) for x in (q, k, v)))
    torch.testing.assert_close(twice, once.repeat(1, 2, 1))
    weight = (q[:, :1] * k[:, :1]).sum(-1, keepdim=True)
    torch.testing.assert_close(linear_attention(q[:, :1], k[:, :1], v[:, :1]), v[:, :1] * weight / (weight + 1e-4))
    expected = (q @ k.mT) / (q @ k.mT).sum(-1, keepdim=True) @ v  # the quadratic form, but for the 1e-4
    torch.testing.assert_close(once, expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("size", [(16, 16), (22, 14), (64, 48)])
def test_sizes_beyond_the_training_resolution(unet, size):
    student = install(unet)
    with torch.no_grad():
        y = student(*inputs_of(student, 1, size)).sample
    assert y.shape == (1, 4, *size) and y.isfinite().all()


@pytest.mark.parametrize("reduction", [1, 4, None])
def test_saved_in_the_authors_layout(unet, tmp_path, reduction):
    student = student_of(unet, reduction=reduction, fresh=True)
    save(student, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    [first, *rest] = config["modules_list"]
    assert first["dim_n"] == 32 and first["heads"] == 4 and len(rest) == 3
    assert first["projection_mid_dim"] == {1: 32, 4: 8, None: -1}[reduction]
    torch.save(state_of(student), tmp_path / "w.pth")
    given = inputs_of(unet)
    for weights in (tmp_path / "out", tmp_path / "out" / FILE, tmp_path / "w.pth", state_of(student)):
        again = install(UNet2DConditionModel(**TINY).eval(), weights)
        frozen = {key: x for key, x in unet.state_dict().items() if ".attn1." not in key}
        again.load_state_dict(frozen, strict=False)
        with torch.no_grad():
            torch.testing.assert_close(again(*given).sample, student(*given).sample)


def test_what_is_shared_and_what_learns(unet):
    before = {key: x.clone() for key, x in unet.state_dict().items()}
    student = student_of(unet)
    learns = {name for name, p in student.named_parameters() if p.requires_grad}
    assert learns and all(".attn1." in name for name in learns)
    of_teacher = dict(unet.named_parameters())
    for name, p in student.named_parameters():
        assert (p is of_teacher.get(name)) == (".attn1." not in name), name
    for name, attn in self_attentions(student).items():  # which begins at the UNet's own projections
        torch.testing.assert_close(attn.to_v.weight, unet.get_submodule(name).to_v.weight)
    given = inputs_of(unet)
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=2e-3, weight_decay=0)
    found = []
    for _ in range(25):
        losses = distillation_losses(student, unet, *given, torch.zeros(2, 4, 16, 16))
        optimizer.zero_grad()
        (losses["output"] + losses["attention"]).backward()
        optimizer.step()
        found.append(losses)
    for key in ("output", "attention"):
        assert found[-1][key] < 0.5 * found[0][key], key
    assert all(torch.equal(x, before[key]) for key, x in unet.state_dict().items())


def test_other_attentions_stay(unet):
    cross = {key: value for key, value in unet.attn_processors.items() if "attn2" in key}
    install(unet)
    assert {key: unet.attn_processors[key] for key in cross} == cross
    with torch.no_grad():  # what is meant for other processors is passed over
        unet(*inputs_of(unet), cross_attention_kwargs={"ip_adapter_masks": None})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    torch.manual_seed(1)
    attn = Attention(64, heads=4, dim_head=16, processor=LinearAttention(64, 64))
    x = torch.randn(1, 4096, 64) * 4
    y = attn(x)
    low = attn.to(dtype)(x.to(dtype))
    assert low.dtype == dtype
    torch.testing.assert_close(low.float(), y, rtol=0.1, atol=0.1 * y.std().item())


def test_bad_input(unet, tmp_path):
    with pytest.raises(ValueError, match="unet: expected a UNet of diffusers, got Linear"):
        install(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"reduction: expected a positive integer or None, got 0"):
        install(unet, reduction=0)
    with pytest.raises(ValueError, match="has AttnProcessor2_0; expected LinearAttention"):
        state_of(unet)
    with pytest.raises(FileNotFoundError, match="nothing': no such file; expected a folder with diffusion_pytorch"):
        install(unet, tmp_path / "nothing")
    (tmp_path / "torn.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="torn.safetensors': cannot be read"):
        install(unet, tmp_path / "torn.safetensors")
    good = state_of(student_of(unet))
    few = {key: x for key, x in good.items() if not key.startswith("3.")}
    save_file(few, tmp_path / "few.safetensors")
    with pytest.raises(ValueError, match=r"few.safetensors': 3 modules, such as '0'; expected 0 to 3, one for each"):
        install(unet, tmp_path / "few.safetensors")
    with pytest.raises(ValueError, match=r"weights: 0.to_v.weight: expected \(32, 32\), got absent"):
        install(unet, {key: x for key, x in good.items() if key != "0.to_v.weight"})
    with pytest.raises(ValueError, match=r"weights: 1.to_k.weight: expected \(32, 32\), got \(8, 8\)"):
        install(unet, good | {"1.to_k.weight": torch.zeros(8, 8)})
    with pytest.raises(ValueError, match=r"weights: 2.extra: expected absent, got \(1,\)"):
        install(unet, good | {"2.extra": torch.zeros(1)})
    with pytest.raises(ValueError, match="scheduler: prediction_type 'sample'; expected 'epsilon' or 'v_prediction'"):
        training_target(DDPMScheduler(prediction_type="sample"), *torch.zeros(2, 1), torch.zeros(1))
    assert not any(isinstance(p, LinearAttention) for p in unet.attn_processors.values())  # nothing half-done
    assert freeze_all_else(unet) is unet
