"""SOURCE -> network: every kind, its weights, and every way in which it cannot be had."""

from __future__ import annotations

import hashlib
import importlib
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import contents, randomized, run
from torch import nn
from torchvision.models import get_model, get_model_weights
from torchvision.ops import FrozenBatchNorm2d

from normswap.errors import NormswapError, OptionError, SourceError, WeightsError
from normswap.sources import _offline
from normswap.sources.resolve import build, build_empty, outline, parse, parse_args
from normswap.sources.spec import KINDS, Source
from normswap.sources.torchvision import MIRROR

IMAGE = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def refused(call: Any, *args: Any, **kwargs: Any) -> NormswapError:
    with pytest.raises((OptionError, SourceError, WeightsError)) as caught:
        call(*args, **kwargs)
    return caught.value


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
        ("weights.pth", "unknown model 'weights.pth'", "normswap convert SOURCE --weights weights.pth"),
        ("net-gn.safetensors", "net-gn.safetensors does not exist", ""),
        ("https://a.b/c", "'https://a.b/c' is no source", "A source is"),
        ("1abc:build", "'1abc:build' is no source", "A source is"),
    ],
)
def test_what_is_no_source_says_what_one_is(text: str, said: str, way: str) -> None:
    error = refused(parse, text)
    assert error.message == said
    assert way in (error.hint or "")


def test_arguments_are_literals_where_they_can_be() -> None:
    pairs = ["a=3", "b=0.5", "c=None", "d=(1, 2)", "e=text", "f=a=b", "g='3'", "h=", "i=True"]
    expected = {"a": 3, "b": 0.5, "c": None, "d": (1, 2), "e": "text", "f": "a=b", "g": "3", "h": "", "i": True}
    assert parse_args(pairs) == expected


@pytest.mark.parametrize("pair", ["a", "=3", "a b=3", "1=2", ""])
def test_an_argument_without_a_name_is_refused(pair: str) -> None:
    assert refused(parse_args, [pair]).message == f"args needs KEY=VALUE, got {pair!r}"


# --- torchvision --------------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty TORCH_HOME; no mirror."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delenv(MIRROR, raising=False)
    return tmp_path / "torch" / "hub" / "checkpoints"


def publish(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, state: dict[str, Any], **meta: Any) -> Any:
    """Put a checkpoint into `folder` under a name with its hash, and let the default weights of `name` point to it."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / "made.pth")
    digest = hashlib.sha256((folder / "made.pth").read_bytes()).hexdigest()[:8]
    file = (folder / "made.pth").rename(folder / f"{name}-{digest}.pth")
    entry = get_model_weights(name).DEFAULT
    monkeypatch.setattr(type(entry), "url", property(lambda self: f"https://nowhere.invalid/models/{file.name}"))
    return entry, file


def test_none_builds_random_weights_of_the_architecture() -> None:
    model, source = build(parse("resnet18", {"num_classes": 7}), "none")
    assert type(model) is type(get_model("resnet18", weights=None))
    assert model.fc.weight.shape == (7, 512)
    assert not any(t.is_meta for t in model.state_dict().values())
    assert source == Source("torchvision", "resnet18", {"num_classes": 7})


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_checkpoint_file_goes_into_a_torchvision_model(tmp_path: Path, suffix: str) -> None:
    reference = randomized(get_model("mobilenet_v3_small", weights=None, num_classes=5))
    file = tmp_path / f"a.{suffix}"
    if suffix == "pth":
        torch.save({"model": nn.DataParallel(reference).state_dict()}, file)
    else:
        from safetensors.torch import save_file

        save_file(reference.state_dict(), file)
    model, _ = build(parse("mobilenet_v3_small", {"num_classes": 5}), str(file))
    assert contents(model) == contents(reference)
    torch.testing.assert_close(run(model, IMAGE), run(reference, IMAGE))


def test_a_checkpoint_of_another_network_lists_what_does_not_fit(tmp_path: Path) -> None:
    torch.save(get_model("resnet18", weights=None, num_classes=5).state_dict(), tmp_path / "a.pth")
    error = refused(build, parse("resnet18"), str(tmp_path / "a.pth"))
    assert error.message.splitlines() == [
        f"{tmp_path / 'a.pth'} does not fit ResNet:",
        "  2 mis-shaped:",
        "    fc.weight: (5, 512) in the file, (1000, 512) in the model",
        "    fc.bias: (5,) in the file, (1000,) in the model",
    ]
    assert 'args={"num_classes": 10}' in error.hint


@pytest.mark.parametrize("weights", ["DEFAULT", "IMAGENET1K_V1"])
def test_named_weights_come_from_a_mirror_once_and_their_hash_is_checked(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: str
) -> None:
    reference = randomized(get_model("resnet18", weights=None))
    entry, file = publish(tmp_path / "mirror", monkeypatch, "resnet18", reference.state_dict())
    monkeypatch.setenv(MIRROR, (tmp_path / "mirror").as_uri() + "/")
    model, source = build(parse("resnet18"), weights, progress=False)
    assert contents(model) == contents(reference)
    assert source.variant == entry.name == "IMAGENET1K_V1"
    assert (home / file.name).read_bytes() == file.read_bytes()
    file.unlink()
    again, _ = build(parse("resnet18"), weights, progress=False)
    assert contents(again) == contents(reference)


def test_a_file_that_does_not_have_the_hash_of_its_name_is_refused(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, file = publish(tmp_path, monkeypatch, "resnet18", get_model("resnet18", weights=None).state_dict())
    file.write_bytes(file.read_bytes() + b"\0")
    monkeypatch.setenv(MIRROR, tmp_path.as_uri())
    error = refused(build, parse("resnet18"), progress=False)
    assert "cannot be downloaded" in error.message
    assert "invalid hash value" in error.message
    assert not (home / file.name).exists()
    assert list(home.iterdir()) == []


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """A loopback web server over `tmp_path / "www"`; its URL."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

    (tmp_path / "www").mkdir()
    with HTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path / "www"))) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()
        thread.join()


def test_a_mirror_may_be_a_web_server(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: str) -> None:
    reference = get_model("mobilenet_v3_small", weights=None)
    _, file = publish(tmp_path / "www", monkeypatch, "mobilenet_v3_small", reference.state_dict())
    monkeypatch.setenv(MIRROR, server)
    model, _ = build(parse("mobilenet_v3_small"), progress=False)
    assert contents(model) == contents(reference)
    (home / file.name).unlink()
    file.unlink()
    error = refused(build, parse("mobilenet_v3_small"), progress=False)
    assert f"{server}/{file.name}" in error.message
    assert "404" in error.message


@pytest.mark.parametrize("mirror", ["file:///no/such/folder", "/no/such/folder", "http://127.0.0.1:9"])
def test_without_a_network_the_message_names_what_was_tried_and_the_ways_out(
    home: Path, monkeypatch: pytest.MonkeyPatch, mirror: str
) -> None:
    monkeypatch.setenv(MIRROR, mirror)
    error = refused(build, parse("resnet18"), "IMAGENET1K_V1", progress=False)
    name = "resnet18-f37072fd.pth"
    url = mirror if "://" in mirror else f"file://{mirror}"
    assert error.message.startswith(f"the weights of resnet18 cannot be downloaded: {url}/{name} into {home / name} (")
    assert "\n" not in error.message
    assert error.hint == ('Ways out: weights="FILE" with a checkpoint you have, or weights="none" for random weights.')
    assert not home.exists() or list(home.iterdir()) == []


def test_a_cache_folder_that_cannot_be_made_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "taken").touch()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "taken"))
    assert "cannot be downloaded" in refused(build, parse("resnet18"), progress=False).message


def test_unknown_weights_are_answered_with_what_there_is() -> None:
    error = refused(build, parse("resnet50"), "IMAGENET1K_V3")
    assert error.message == "resnet50 has no weights named 'IMAGENET1K_V3'; it has IMAGENET1K_V1, IMAGENET1K_V2"
    assert error.hint.startswith("Did you mean IMAGENET1K_V")


def test_published_weights_with_arguments_that_do_not_go_with_them_are_refused(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(tmp_path, monkeypatch, "resnet18", get_model("resnet18", weights=None).state_dict())
    monkeypatch.setenv(MIRROR, tmp_path.as_uri())
    error = refused(build, parse("resnet18", {"num_classes": 3}), progress=False)
    assert "num_classes" in error.message
    assert "args=" in error.hint


def test_published_weights_with_nan_are_refused_unless_allowed(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = get_model("resnet18", weights=None).state_dict()
    state["fc.bias"][3] = torch.nan
    publish(tmp_path, monkeypatch, "resnet18", state)
    monkeypatch.setenv(MIRROR, tmp_path.as_uri())
    assert "fc.bias" in refused(build, parse("resnet18"), progress=False).message
    model, _ = build(parse("resnet18"), progress=False, allow_nonfinite=True)
    assert model.fc.bias.isnan().sum() == 1


def stand_ins(model: nn.Module) -> dict[str, torch.Tensor]:
    """A state dict without counters that takes no room: the i-th tensor holds i in each place."""
    tensors = [(k, t) for k, t in model.state_dict().items() if "num_batches" not in k]
    return {k: torch.tensor([float(i)]).expand(t.shape) for i, (k, t) in enumerate(tensors)}


def assert_holds(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    own = {k: t for k, t in model.state_dict().items() if "num_batches" not in k}
    assert {k: t.shape for k, t in own.items()} == {k: t.shape for k, t in state.items()}
    assert all(torch.equal(own[k].flatten()[-1], t.flatten()[0]) for k, t in state.items())


def test_a_published_file_given_by_path_is_built_as_its_weights_want(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = stand_ins(outline(parse("densenet121"))[0])
    old = {k.replace("norm1", "norm.1").replace("conv2", "conv.2"): v for k, v in state.items()}
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    entry, file = publish(tmp_path, monkeypatch, "densenet121", old)
    model, source = build(parse("densenet121"), str(file))
    assert_holds(model, state)
    assert source.variant == outline(parse("densenet121"), str(file))[1].variant == entry.name


DETECTOR = "fasterrcnn_resnet50_fpn"


def test_a_detectors_named_weights_give_it_frozen_norms_of_eps_0_and_its_values(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = stand_ins(outline(parse(DETECTOR))[0])
    entry, _ = publish(tmp_path, monkeypatch, DETECTOR, state)
    monkeypatch.setenv(MIRROR, str(tmp_path))
    model, source = build(parse(DETECTOR), progress=False)
    assert source.variant == entry.name == "COCO_V1"
    frozen = [m for m in model.modules() if isinstance(m, FrozenBatchNorm2d)]
    assert len(frozen) == 53
    assert {m.eps for m in frozen} == {0.0}
    assert_holds(model, state)


def test_the_outline_of_a_detector_is_what_its_named_weights_make_of_it_without_values(home: Path) -> None:
    plain, _ = outline(parse(DETECTOR))
    norms = [m for m in plain.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 53
    model, source = outline(parse(DETECTOR), "COCO_V1")
    frozen = [m for m in model.modules() if isinstance(m, FrozenBatchNorm2d)]
    assert len(frozen) == 53
    assert {m.eps for m in frozen} == {0.0}
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert all(p.is_meta for p in model.parameters())
    assert model.roi_heads.box_predictor.cls_score.out_features == 91
    assert source.variant == "COCO_V1"
    assert not home.exists()


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


@pytest.fixture(autouse=True)
def _own_modules() -> Iterator[None]:
    before, path = set(sys.modules), list(sys.path)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - before:
        if name.startswith(("neighbour", "normswap_source_", "somenets", "broken")):
            del sys.modules[name]


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
    (tmp_path / "broken_nets.py").write_text("raise ValueError('not today')")
    monkeypatch.chdir(tmp_path)
    importlib.invalidate_caches()
    assert refused(build, parse("no.py:build")).message == "no.py does not exist"
    assert refused(build, parse("folder.py:build")).message == "folder.py is not a file"
    assert "module 'no.such' cannot be imported" in refused(build, parse("no.such:build")).message
    failed = refused(build, parse("broken_nets:build")).message
    assert failed == "importing 'broken_nets' failed (ValueError: not today)"


# --- timm ---------------------------------------------------------------------------------------------------------


def test_a_timm_model_is_built_with_arguments_and_takes_a_checkpoint(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    reference = randomized(timm.create_model("resnet10t", num_classes=4))
    torch.save(reference.state_dict(), tmp_path / "a.pth")
    model, source = build(parse("timm:resnet10t", {"num_classes": 4}), str(tmp_path / "a.pth"))
    assert contents(model) == contents(reference)
    torch.testing.assert_close(run(model, IMAGE), run(reference, IMAGE))
    assert source == Source("timm", "resnet10t", {"num_classes": 4})


def test_a_misspelt_timm_model_is_answered_with_near_matches() -> None:
    pytest.importorskip("timm")
    for weights in ("none", "DEFAULT"):
        error = refused(build, parse("timm:resnet18dd"), weights)
        assert error.message == "timm has no model 'resnet18dd'"
        assert "resnet18d" in error.hint


def test_unknown_timm_weights_are_answered_with_the_tags_there_are() -> None:
    pytest.importorskip("timm")
    message = refused(build, parse("timm:resnet18"), "a9_in1k").message
    assert message.startswith("timm's resnet18 has no weights named 'a9_in1k'; it has ")
    assert "a1_in1k" in message


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No name resolves, and the hub's cache is empty; huggingface_hub's own switch is put back afterwards."""

    def unresolved(*args: Any) -> Any:
        raise OSError(-2, "Name or service not known")

    constants = importlib.import_module("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(_offline, "socket", SimpleNamespace(getaddrinfo=unresolved))


@pytest.mark.filterwarnings("ignore")  # the hub's own
def test_timm_weights_without_a_network_name_the_ways_out(offline: None) -> None:
    pytest.importorskip("timm")
    error = refused(build, parse("timm:resnet18"), "a1_in1k")
    assert error.message.startswith(
        "the weights of timm:resnet18.a1_in1k cannot be downloaded: its pretrained weights from the Hugging Face hub ("
    )
    assert 'weights="none"' in error.hint


# --- transformers -------------------------------------------------------------------------------------------------


def hf_models() -> dict[str, Any]:
    """Small networks of the image families, DETR with its frozen BN among them."""
    t = pytest.importorskip("transformers")
    small = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 12}
    backbone = t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], out_features=["stage2"])
    detr = t.DetrConfig(
        use_timm_backbone=False,
        backbone_config=backbone,
        use_pretrained_backbone=False,
        backbone=None,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        num_queries=3,
        num_labels=3,
    )
    return {
        "resnet": lambda: t.ResNetForImageClassification(t.ResNetConfig(layer_type="basic", **small)),
        "regnet": lambda: t.RegNetModel(t.RegNetConfig(groups_width=8, **small)),
        "mobilenet": lambda: t.MobileNetV2Model(t.MobileNetV2Config(depth_multiplier=0.25)),
        "detr": lambda: t.DetrForObjectDetection(detr),
    }


@pytest.fixture(params=["resnet", "regnet", "mobilenet", "detr"])
def hf_folder(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[nn.Module, str]:
    model = randomized(hf_models()[request.param]())
    model.save_pretrained(tmp_path / "net")
    return model, f"hf:{tmp_path / 'net'}"


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_transformers_model_is_read_from_a_folder(hf_folder: tuple[nn.Module, str]) -> None:
    reference, text = hf_folder
    model, source = build(parse(text))
    assert type(model) is type(reference)
    assert contents(model) == contents(reference)
    image = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(run(model, image), run(reference, image))
    assert source.config["class"] == type(reference).__name__


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_transformers_architecture_is_rebuilt_from_its_source_without_the_folder(
    hf_folder: tuple[nn.Module, str],
) -> None:
    import json
    import shutil

    reference, text = hf_folder
    _, source = outline(parse(text))
    shutil.rmtree(text.removeprefix("hf:"))
    source = Source.from_dict(json.loads(json.dumps(source.to_dict())))
    model = build_empty(source)
    assert {k: v.shape for k, v in model.state_dict().items()} == {
        k: v.shape for k, v in reference.state_dict().items()
    }
    assert repr(model) == repr(reference)


@pytest.mark.filterwarnings("ignore")  # the hub's own
def test_a_transformers_id_without_a_network_names_what_was_tried_and_the_ways_out(offline: None) -> None:
    pytest.importorskip("transformers")
    for weights in ("none", "DEFAULT"):
        error = refused(build, parse("hf:nobody/nothing"), weights)
        assert error.message.startswith("the configuration of hf:nobody/nothing cannot be read (")
        assert "hf:FOLDER with a copy of the model" in error.hint


def test_transformers_models_have_no_named_weights() -> None:
    pytest.importorskip("transformers")
    assert "got 'V1'" in refused(build, parse("hf:nobody/nothing"), "V1").message


def test_a_class_that_transformers_does_not_have_is_one_clear_error() -> None:
    pytest.importorskip("transformers")
    source = Source("hf", "own/net", config={"class": "OwnNet", "model_type": "resnet"})
    assert "is a OwnNet, which transformers" in refused(build, source, "none").message
    assert "is a OwnNet, which transformers" in refused(build, source, "DEFAULT").message


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_a_library_that_is_not_installed_is_named_with_the_command_to_install_it(
    monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    error = refused(build, parse({"timm": "timm:resnet18", "transformers": "hf:a/b"}[library]), "none")
    assert error.message == f"{library} is not installed"
    assert error.hint == f'pip install "normswap[{library}]"'


def test_the_kinds_of_sources_are_those_a_manifest_may_name() -> None:
    with pytest.raises(NormswapError, match="unknown kind, 'zip'"):
        Source.from_dict({"kind": "zip", "name": "a"})
    with pytest.raises(NormswapError, match="source cannot be read"):
        Source.from_dict({"kind": "timm"})
    assert KINDS == ("torchvision", "timm", "hf", "factory", "file")
