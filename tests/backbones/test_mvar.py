"""M-VAR and its tokenizer: the authors' values, variants, memory, what the maps see."""

import json

import pytest
import torch
import torch.nn.functional as F
from test_dimsum import load
from test_parity import PARITY, error, synth

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
