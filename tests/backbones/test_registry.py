"""The registry: every model has one kind, every listed family registers, every registered one is listed."""

import pytest

import linzoo.backbones as zoo
from linzoo.tools.engine import TimmModel
from linzoo.tools.engine.task import TASKS


def test_kinds():
    names = [name for kind in zoo.KINDS for name in zoo.list_models(kind=kind)]
    assert sorted(names) == zoo.list_models(kind=None) and len(set(names)) == len(names)
    for kind in zoo.KINDS:
        assert all(zoo.kind_of(name) == kind for name in zoo.list_models(kind=kind))
    assert "convs5_video" in zoo.list_models(kind="video")
    assert zoo.kind_of("resnet50") is zoo.kind_of("no_such_model") is None
    with pytest.raises(ValueError, match="kind: expected one of backbone, .*, got 'backbones'"):
        zoo.list_models(kind="backbones")


def test_every_kind_has_a_task():
    trained = {
        kind for task in TASKS if issubclass(task, TimmModel) or task.__name__ == "DenseTask" for kind in task.kinds
    }
    assert trained == set(zoo.KINDS)


def test_listed_but_not_registered(monkeypatch):
    monkeypatch.setitem(zoo._FAMILIES, "video", ("convs5", "convs6"))
    with pytest.raises(
        RuntimeError, match="lists the family 'convs6', which registers no model; expected `from .convs6"
    ):
        zoo._check_registration()


def test_registered_but_not_listed(monkeypatch):
    monkeypatch.setitem(zoo._FAMILIES, "video", ())
    with pytest.raises(RuntimeError, match="'convs5_video' is registered, but .* does not list its family 'convs5'"):
        zoo._check_registration()
