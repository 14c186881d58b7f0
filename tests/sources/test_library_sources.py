"""SOURCE -> network: models of timm and transformers."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import contents, randomized, run
from sourced import IMAGE, refused
from torch import nn

from normswap.sources import _offline
from normswap.sources.resolve import build, build_empty, outline, parse
from normswap.sources.spec import Source

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
