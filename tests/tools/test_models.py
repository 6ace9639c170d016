"""The list of the zoo: measured costs agree with the published ones, and the figures add up."""

import csv
import html.parser
import io
import json
import re
import shutil

import pytest
import torch
from torch import nn

from linzoo.backbones import kind_of, list_models
from linzoo.backbones.published import PUBLISHED
from linzoo.tools import models

TOLERANCE = 0.03
ALL = list_models(kind=None)


def off(measured, published):
    return published is not None and abs(measured - published) > TOLERANCE * published


@pytest.mark.parametrize("name", ALL)
def test_costs_agree_with_the_published_ones(name):
    row, published = models.describe(name), PUBLISHED.get(name)
    assert row["params_m"] > 0
    assert row["gmacs"] is None if kind_of(name) == "occupancy" else row["gmacs"] > 0
    if published:
        assert published.source
        differs = off(row["params_m"], published.params_m) or off(row["gmacs"], published.gmacs)
        assert differs == bool(published.note), (
            f"measured {row['params_m']} M and {row['gmacs']} GMACs, published {published}: "
            "a difference of over 3 % needs a note that says why, a smaller one needs none"
        )


def test_published_names_are_registered():
    assert set(PUBLISHED) <= set(ALL)


def test_known_model():
    """ResNet-18: 11,689,512 parameters and 1.81 GMACs at 224, the figures that everybody prints."""
    params, macs = models.measure("resnet18")
    assert params == 11_689_512
    assert abs(macs - 1.814e9) < 0.002e9


def test_scan_counts_by_its_formula(monkeypatch):
    """Our operators' formulas enter without halving: 9 L D N + L D per scan."""
    from linzoo.ops import selective_scan

    class Scan(nn.Module):
        in_chans = 3

        def forward(self, x):
            tokens = x.flatten(2).transpose(1, 2).unsqueeze(2)  # (1, L, 1, 3)
            A, D, B = tokens.new_ones(1, 3, 2), tokens.new_ones(1, 3), tokens.new_ones(*tokens.shape[:3], 2)
            return selective_scan(tokens, tokens, A, B, B, D)

    monkeypatch.setattr(models, "create", lambda *args, **kwargs: Scan())
    assert models.measure("scan", size=8) == (0, 64 * 3 * (9 * 2 + 1))


def test_fixed_input_size():
    assert models.measure("vit_tiny_patch16_224", 112)[1] < models.measure("vit_tiny_patch16_224", 224)[1]


def test_csv(capsys):
    name = list_models()[0]
    models.main([name, "--csv"])
    (row,) = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert row["name"] == name
    assert float(row["params_m"]) == round(sum(p.numel() for p in model_parameters(name)) / 1e6, 2)


def test_table_names_every_model(capsys):
    models.main(["*_t*"])
    out = capsys.readouterr().out
    assert all(name in out for name in list_models("*_t*"))


def test_dense_models(capsys):
    """Listed like the others, at the size that they are made for; their authors' figures are no top-1."""
    models.main(["*vm_unet", "vm_*", "--csv"])
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["name"] for row in rows] == ["mhs_vm_unet", "vm_unet"]
    assert [(row["params_m"], row["size"], row["top1"], row["license"]) for row in rows] == [
        ("17.26", "256", "", "-"),
        ("27.43", "256", "", "-"),
    ]


NAMES = ("efficientvim_m1", "kat_tiny_patch16_224", "vmamba_t", "vmamba_s", "vm_unet")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of `NAMES`, two of them timed."""
    folder = tmp_path_factory.mktemp("page")
    rows = [
        {"model": "vmamba_t", "size": 224, "images_per_s": 12.34},
        {"model": "vmamba_t", "size": 448, "images_per_s": 3},
    ]
    rows.append({"model": "kat_tiny_patch16_224", "size": 224, "images_per_s": 50})
    facts = {"cpu": "a </script> of a name", "threads": 2, "dtype": "float32", "batch": 2}
    (folder / "speed.json").write_text(json.dumps([{"title": "models", "environment": facts, "rows": rows}]))
    models.main([*NAMES, "--html", str(folder / "zoo.html"), "--benchmark", str(folder / "speed.json")])
    return folder / "zoo.html"


def test_page_holds_the_list(page):
    """One file, well formed, that loads nothing; its figures are those of the list."""
    text, tags, void = page.read_text(), [], {"meta", "input"}

    class Parser(html.parser.HTMLParser):
        def handle_starttag(self, tag, attrs):
            assert not {"src", "href"} & {key for key, _ in attrs}
            tags.append(tag)

        def handle_endtag(self, tag):
            while tags[-1] in void:
                tags.pop()
            assert tags.pop() == tag

    Parser().feed(text)
    assert not tags and not re.search(r"@import|url\(|fetch\(|\bimport\b", text)
    data = json.loads(re.search(r"const \{rows, machine\} = (.*);\n", text).group(1))
    assert "2 threads of a </script> of a name, float32" in data["machine"]
    rows = {row["name"]: row for row in data["rows"]}
    assert set(rows) == set(NAMES) and rows["vm_unet"]["kind"] == "segmentation"
    assert {name: row["images_per_s"] for name, row in rows.items() if row["images_per_s"]} == {
        "vmamba_t": 12.3,
        "kat_tiny_patch16_224": 50,
    }
    assert {**models.describe("vmamba_t"), "kind": "backbone", "images_per_s": 12.3} == rows["vmamba_t"]


def test_page_in_a_browser(page):
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("needs Chromium")
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab, wrong, asked = browser.new_page(), [], []
        tab.on("pageerror", lambda error: wrong.append(error))
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(page.as_uri())

        def dots():
            return {dot.get_attribute("data-name") for dot in tab.query_selector_all("circle")}

        def lines():
            return [line.get_attribute("data-name") for line in tab.query_selector_all("tbody tr")]

        assert dots() == set(NAMES) - {"vm_unet"} and set(lines()) == set(NAMES)
        tab.hover("circle[data-name=vmamba_s]")
        assert "83.6 % top-1" in tab.text_content("#tip") and tab.is_visible("#tip")
        assert tab.get_attribute("tr.on", "data-name") == "vmamba_s"
        tab.click("#families button:has-text('vmamba')")
        assert dots() == {"efficientvim_m1", "kat_tiny_patch16_224"} and "vmamba_t" not in lines()
        tab.dblclick("#families button:has-text('vmamba')")
        assert dots() == {"vmamba_t", "vmamba_s"}
        tab.dblclick("#families button:has-text('vmamba')")
        tab.click("th[data-key=images_per_s]")
        assert lines()[:2] == ["kat_tiny_patch16_224", "vmamba_t"], "those without a figure come last"
        tab.click("th[data-key=images_per_s]")
        assert lines()[:2] == ["vmamba_t", "kat_tiny_patch16_224"]
        tab.select_option("#axis", "images_per_s")
        assert dots() == {"vmamba_t", "kat_tiny_patch16_224"}
        tab.select_option("#kind", "segmentation")
        assert dots() == set() and lines() == ["vm_unet"]
        tab.select_option("#kind", "all")
        tab.fill("#search", "VMAMBA_")
        assert sorted(lines()) == ["vmamba_s", "vmamba_t"]
        assert not wrong and asked == [page.as_uri()]
        browser.close()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--benchmark", "speed.json"], "--benchmark adds to the page of --html FILE"),
        (["--html", "no such/zoo.html"], "--html 'no such/zoo.html': no such folder"),
        (["--html", "zoo.html", "--benchmark", "absent.json"], "--benchmark 'absent.json': "),
        (["--html", "zoo.html", "--benchmark", "ops.json"], "'ops.json': expected what"),
    ],
)
def test_what_the_page_refuses(tmp_path, monkeypatch, capsys, argv, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ops.json").write_text('[{"title": "wkv6", "environment": {}, "rows": []}]')
    with pytest.raises(SystemExit):
        models.main(["vmamba_t", *argv])
    assert said in capsys.readouterr().err and not (tmp_path / "zoo.html").exists()


def test_unknown_filter(capsys):
    with pytest.raises(SystemExit) as error:
        models.main([list_models()[0], "no_such_model*"])
    assert error.value.code == 2
    assert "no_such_model*" in capsys.readouterr().err


def model_parameters(name):
    with torch.device("meta"):
        return list(models.create(name, 224).parameters())
