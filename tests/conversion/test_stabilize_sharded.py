"""`stabilized` on a network that FSDP shares out; one process is a group of one, and its parameters are DTensors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Shard

import normswap
from normswap.conversion.stabilize import factors_of
from normswap.demo.digits import split
from normswap.demo.network import Block, pretrained
from normswap.errors import NormswapError, OptionError

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def batch() -> tuple[Tensor, Tensor]:
    part = split()[0]
    return part.images[:8], part.labels[:8]


def converted() -> nn.Module:
    return normswap.convert(pretrained(), "gn", groups=2)


def sharded(network: nn.Module, dim: int = 0) -> nn.Module:
    options = {"mesh": init_device_mesh("cpu", (1,)), "shard_placement_fn": lambda p: Shard(min(dim, p.dim() - 1))}
    for module in network.modules():
        if isinstance(module, Block):
            fully_shard(module, **options)
    return fully_shard(network, **options)


def trained(network: nn.Module, batch: tuple[Tensor, Tensor], looking: bool = False) -> nn.Module:
    """Three steps within the block. looking: evaluate before it."""
    (images, labels), optimizer = batch, torch.optim.SGD(network.parameters(), 0.05, momentum=0.9)
    with torch.set_grad_enabled(not looking):
        network(images)
    with normswap.stabilized(network):
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(network(images), labels).backward()
            optimizer.step()
            with torch.no_grad():
                network(images)
    return network


def values(network: nn.Module) -> dict[str, Tensor]:
    state = network.state_dict()
    return {k: (v.full_tensor() if isinstance(v, DTensor) else v).clone() for k, v in state.items()}


@pytest.mark.parametrize("dim", [0, 1])
def test_a_sharded_network_trains_as_a_whole_one_does(dim: int, batch: tuple[Tensor, Tensor]) -> None:
    """A look without gradients leaves the root's weights gathered; what changes those is lost."""
    expected = trained(converted(), batch).state_dict()
    found = values(trained(sharded(converted(), dim), batch, looking=True))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


def test_gradients_of_shards_have_no_mean(batch: tuple[Tensor, Tensor]) -> None:
    network = sharded(converted())
    with normswap.stabilized(network):
        F.cross_entropy(network(batch[0]), batch[1]).backward()
        for weight in (network.conv.weight, network.blocks[1].conv1.weight):
            assert isinstance(weight.grad, DTensor)
            gradient = weight.grad.full_tensor()
            assert float(gradient.mean((1, 2, 3)).abs().max()) < 1e-5 * float(gradient.abs().max())


def test_factors_are_those_of_the_whole_network() -> None:
    assert factors_of(sharded(converted())) == factors_of(converted()) != {}


def test_a_look_within_the_block_leaves_outputs_and_weights_as_they_were(batch: tuple[Tensor, Tensor]) -> None:
    network = sharded(converted())
    before = values(network)
    with torch.no_grad():
        expected = network(batch[0])
        with normswap.stabilized(network):
            assert not torch.equal(values(network)["conv.weight"], before["conv.weight"])
            torch.testing.assert_close(network(batch[0]), expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(network(batch[0]), expected, rtol=0, atol=0)
    assert all(torch.equal(v, before[k]) for k, v in values(network).items())


def test_a_converted_part_of_a_sharded_whole_is_stabilized(batch: tuple[Tensor, Tensor]) -> None:
    whole = nn.Sequential(converted(), nn.Identity())
    fully_shard(whole, mesh=init_device_mesh("cpu", (1,)))  # holds the part's parameters
    found = values(trained(whole, batch, looking=True))
    expected = trained(converted(), batch).state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(found[f"0.{name}"], value, rtol=1e-5, atol=1e-6)


def test_a_network_in_flat_pieces_is_refused() -> None:
    class Flat(nn.Sequential):
        pass

    Flat.__name__, Flat.__module__ = FullyShardedDataParallel.__name__, FullyShardedDataParallel.__module__
    network = converted()
    with pytest.raises(OptionError, match="flat pieces") as raised, normswap.stabilized(Flat(network)):
        pass
    assert "fully_shard" in str(raised.value.hint)
    assert network.bn.eps == 1e-5


def test_a_sharded_network_is_not_saved_in_part(tmp_path: Path) -> None:
    with pytest.raises(NormswapError, match="shared out") as raised:
        normswap.save(sharded(converted()), tmp_path / "part.safetensors")
    assert "full_state_dict" in str(raised.value.hint)
    assert not list(tmp_path.iterdir())
