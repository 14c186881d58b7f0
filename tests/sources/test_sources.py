"""SOURCE: its forms, the factories it may name, and every way in which it cannot be had."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import contents, randomized
from sourced import refused

from normswap.errors import NormswapError
from normswap.sources.resolve import build, build_empty, parse, parse_args
from normswap.sources.spec import KINDS, Source

# --- parse --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "kind", "name", "stem", "shown"),
    [
        ("resnet50", "torchvision", "resnet50", "resnet50", "resnet50"),
        ("timm:resnet18.a1_in1k", "timm", "resnet18.a1_in1k", "resnet18.a1_in1k", "timm:resnet18.a1_in1k"),
        ("hf:microsoft/resnet-18", "hf", "microsoft/resnet-18", "resnet-18", "hf:microsoft/resnet-18"),
        ("hf:./nets/mine/", "hf", "./nets/mine/", "mine", "hf:./nets/mine/"),
        ("package.nets:build", "factory", "package.nets:build", "build", "package.nets:build"),
        ("nets:Net.small", "factory", "nets:Net.small", "Net.small", "nets:Net.small"),
        ("my nets/ü.py:build", "file", "my nets/ü.py:build", "build", "my nets/ü.py:build"),
        ("a:b/nets.py:build", "file", "a:b/nets.py:build", "build", "a:b/nets.py:build"),
    ],
)
def test_a_source_is_told_by_its_form(text: str, kind: str, name: str, stem: str, shown: str) -> None:
    source = parse(text, {"width": 3})
    assert (source.kind, source.name, source.stem, str(source)) == (kind, name, stem, shown)
    assert source.args == {"width": 3}
    assert Source.from_dict(source.to_dict()) == source


@pytest.mark.parametrize(
    ("text", "said", "way"),
    [
        ("resnet5O", "unknown model 'resnet5O'", "Did you mean resnet50"),
        ("ResNet-18", "unknown model 'ResNet-18'", "A source is"),
        ("", "unknown model ''", "A source is"),
        ("timm:", "unknown model 'timm:'", "A source is"),
        ("nets.py", "nets.py names a file but no factory in it", "For example nets.py:build_model"),
        ("weights.pth", "weights.pth does not exist", "A source is"),
        ("nets/mine", "nets/mine does not exist", "A model of the Hugging Face hub is hf:nets/mine\nA source is"),
        ("/nets/mine", "/nets/mine does not exist", "A source is"),
        ("net-gn.safetensors", "net-gn.safetensors does not exist", ""),
        ("https://a.b/c", "'https://a.b/c' is no source", "A source is"),
        ("1abc:build", "'1abc:build' is no source", "A source is"),
    ],
)
def test_what_is_no_source_says_what_one_is(text: str, said: str, way: str) -> None:
    error = refused(parse, text)
    assert error.message == said
    assert way in (error.hint or "")


@pytest.mark.parametrize(
    ("text", "said", "way"),
    [
        (
            "mine.pth",
            "mine.pth holds weights alone, and no network",
            "normswap convert SOURCE --weights mine.pth\nA source",
        ),
        ("hub", "hub holds weights alone", "normswap convert SOURCE --weights hub"),
        ("./hub", "./hub holds weights alone", "normswap convert SOURCE --weights ./hub"),
        ("whole", "whole is a folder, and no source", "If transformers wrote it, it is hf:whole"),
        ("photos", "photos is a folder, and no network", "A source is"),
        ("notes.txt", "notes.txt is a file, and no network", "A source is"),
        ("nine.pth", "nine.pth does not exist", "Did you mean mine.pth?"),
    ],
)
def test_a_file_or_folder_that_is_no_source_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, said: str, way: str
) -> None:
    for folder in ("hub", "whole", "photos"):
        (tmp_path / folder).mkdir()
    for file in ("mine.pth", "hub/model.safetensors", "whole/model.safetensors", "whole/config.json", "notes.txt"):
        (tmp_path / file).touch()
    monkeypatch.chdir(tmp_path)
    error = refused(parse, text)
    assert error.message.startswith(said)
    assert way in (error.hint or "")


def test_arguments_are_literals_where_they_can_be() -> None:
    pairs = ["a=3", "b=0.5", "c=None", "d=(1, 2)", "e=text", "f=a=b", "g='3'", "h=", "i=True"]
    expected = {"a": 3, "b": 0.5, "c": None, "d": (1, 2), "e": "text", "f": "a=b", "g": "3", "h": "", "i": True}
    assert parse_args(pairs) == expected


@pytest.mark.parametrize("pair", ["a", "=3", "a b=3", "1=2", ""])
def test_an_argument_without_a_name_is_refused(pair: str) -> None:
    assert refused(parse_args, [pair]).message == f"args needs KEY=VALUE, got {pair!r}"


# --- torchvision --------------------------------------------------------------------------------------------------


def test_a_factory_that_computes_with_its_parameters_is_built_in_full(tmp_path: Path) -> None:
    model = build_empty(parse(f"{written(tmp_path)}:computes"))
    assert not any(t.is_meta for t in model.state_dict().values())


# --- factories ----------------------------------------------------------------------------------------------------

NETS = '''
import sys
import torch
from torch import nn
from neighbour import WIDTH

calls = []

class Net(nn.Sequential):
    """A convolution and its BN."""

    def __init__(self, width=WIDTH, bias=False):
        super().__init__(nn.Conv2d(3, width, 3, bias=bias), nn.BatchNorm2d(width))

    @classmethod
    def wide(cls):
        return cls(32)

def build_net(width=WIDTH, **kwargs):
    calls.append(width)
    return Net(width, **kwargs)

def computes():
    net = Net()
    net[0].scale = float(net[0].weight.detach().norm())
    return net

def half_computed():
    net = Net()
    net.register_buffer("norm", net[0].weight.detach().norm(), persistent=False)
    return net

def raises(): raise KeyError("no such\\ndata")
def raises_about_metadata(): raise RuntimeError("no metadata")
def number(): return 3
def leaves(): sys.exit(2)
PI = 3.14
'''


def written(folder: Path, text: str = NETS) -> Path:
    (folder / "neighbour.py").write_text("WIDTH = 6\n")
    (folder / "nets.py").write_text(text)
    return folder / "nets.py"


def test_a_factory_in_a_file_is_called_with_its_arguments(tmp_path: Path) -> None:
    path = list(sys.path)
    model, source = build(parse(f"{written(tmp_path)}:build_net", {"width": 5, "bias": True}))
    assert model[0].weight.shape == (5, 3, 3, 3)
    assert model[0].bias is not None
    assert source.runs_code
    assert sys.path == path
    assert build(parse(f"{tmp_path / 'nets.py'}:build_net"))[0][1].num_features == 6
    assert build(parse(f"{tmp_path / 'nets.py'}:Net.wide"))[0][1].num_features == 32


def test_a_factory_in_a_module_is_imported_from_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path)
    (tmp_path / "nets.py").rename(tmp_path / "somenets.py")
    monkeypatch.chdir(tmp_path)
    importlib.invalidate_caches()
    assert build(parse("somenets:build_net"))[0][1].num_features == 6


def test_a_checkpoint_goes_into_a_factorys_network(tmp_path: Path) -> None:
    place = f"{written(tmp_path)}:build_net"
    reference = randomized(build(parse(place))[0])
    torch.save({"state_dict": {f"model.{k}": v for k, v in reference.state_dict().items()}}, tmp_path / "weights")
    model, _ = build(parse(place), str(tmp_path / "weights"))
    assert contents(model) == contents(reference)


def test_values_that_no_state_dict_holds_are_computed_when_a_checkpoint_is_loaded(tmp_path: Path) -> None:
    place = f"{written(tmp_path)}:half_computed"
    torch.save(build(parse(place))[0].state_dict(), tmp_path / "a.pth")
    model, _ = build(parse(place), str(tmp_path / "a.pth"))
    assert not model.norm.is_meta
    assert float(model.norm) > 0


@pytest.mark.parametrize(
    ("name", "args", "said"),
    [
        ("raises", {}, "cannot be built (KeyError: 'no such"),
        ("raises_about_metadata", {}, "cannot be built (RuntimeError: no metadata)"),
        ("build_net", {"depth": 3}, "unexpected keyword argument 'depth')"),
        ("number", {}, "returned int, not a torch.nn.Module"),
        ("leaves", {}, "cannot be built (SystemExit: 2)"),
        ("PI", {}, "is float, not a function or class that makes a model"),
        ("Net.wdie", {}, "has no 'Net.wdie'"),
        ("zzz", {}, "has no 'zzz'"),
    ],
)
@pytest.mark.parametrize("weights", ["DEFAULT", "none", "FILE"])
def test_a_factory_that_makes_no_model_is_one_clear_error(
    tmp_path: Path, name: str, args: dict[str, Any], said: str, weights: str
) -> None:
    if weights == "FILE":
        weights = str(tmp_path / "a.pth")
        torch.save({"w": torch.zeros(1)}, weights)
    error = refused(build, parse(f"{written(tmp_path)}:{name}", args), weights)
    assert said in error.message
    assert str(tmp_path / "nets.py") in error.message
    assert "\n" not in error.message


def test_a_misspelt_factory_is_answered_with_near_matches(tmp_path: Path) -> None:
    assert refused(build, parse(f"{written(tmp_path)}:buildnet")).hint == "Did you mean build_net?"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def f(:", "running {file} failed (SyntaxError:"),
        ("import no_such_module", "running {file} failed (ModuleNotFoundError: No module named 'no_such_module')"),
        ("1 / 0", "running {file} failed (ZeroDivisionError: division by zero)"),
        ("raise SystemExit(3)", "running {file} failed (SystemExit: 3)"),
    ],
)
def test_a_file_that_does_not_run_is_one_clear_error_and_leaves_nothing(tmp_path: Path, text: str, said: str) -> None:
    file = written(tmp_path, text)
    before, path = set(sys.modules), list(sys.path)
    assert refused(build, parse(f"{file}:build")).message.startswith(said.format(file=file))
    assert not [name for name in set(sys.modules) - before if name.startswith("normswap_source_")]
    assert sys.path == path


def test_a_file_that_changes_the_import_path_is_no_problem(tmp_path: Path) -> None:
    file = written(tmp_path, NETS + "\nsys.path.pop(0)\n")
    assert build(parse(f"{file}:build_net"))[0][1].num_features == 6


def test_a_missing_file_folder_or_module_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder.py").mkdir()
    (tmp_path / "not.py").touch()
    (tmp_path / "broken_nets.py").write_text("raise ValueError('not today')")
    monkeypatch.chdir(tmp_path)
    importlib.invalidate_caches()
    missing = refused(build, parse("no.py:build"))
    assert (missing.message, missing.hint) == ("no.py does not exist", "Did you mean not.py?")
    assert refused(build, parse("folder.py:build")).message == "folder.py is not a file"
    assert "module 'no.such' cannot be imported" in refused(build, parse("no.such:build")).message
    failed = refused(build, parse("broken_nets:build")).message
    assert failed == "importing 'broken_nets' failed (ValueError: not today)"


# --- transformers -------------------------------------------------------------------------------------------------


def test_the_kinds_of_sources_are_those_a_manifest_may_name() -> None:
    with pytest.raises(NormswapError, match="unknown kind, 'zip'"):
        Source.from_dict({"kind": "zip", "name": "a"})
    with pytest.raises(NormswapError, match="source cannot be read"):
        Source.from_dict({"kind": "timm"})
    assert KINDS == ("torchvision", "timm", "hf", "factory", "file")
