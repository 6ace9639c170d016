"""DiMSUM: the authors' values, variants, orders, what has no influence, guidance."""

import json

import pytest
import timm
import torch
from test_parity import PARITY, error, synth

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
