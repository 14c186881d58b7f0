"""SOURCE -> network: torchvision's models and their weights."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import contents, randomized, run
from sourced import IMAGE, refused
from torch import nn
from torchvision.models import get_model, get_model_weights
from torchvision.ops import FrozenBatchNorm2d

from normswap.sources.resolve import build, outline, parse
from normswap.sources.spec import Source
from normswap.sources.torchvision import MIRROR


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
