"""Run a network and leave no trace: training flags, device, attributes, buffers, random state."""

from __future__ import annotations

import operator
import random
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import OptionError, first_line
from ..machine.devices import device_of
from .attributes import _slots_of, kept_by


@contextmanager
def evaluating(model: nn.Module, training: bool = False) -> Iterator[None]:
    """Run with every module in eval (or train) mode; each module's own flag is restored."""
    flags = [(module, module.training) for module in nn.Module.modules(model) if module.training != training]
    for module, _ in flags:
        module.training = training
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


@contextmanager
def moved(model: nn.Module, device: torch.device | str | None) -> Iterator[None]:
    """The model on a device; afterwards the same tensors hold the same storage as before."""
    if device is None:
        yield
        return
    tensors = [*model.parameters(), *model.buffers()]
    before = [tensor.data for tensor in tensors]
    try:
        place = device_of(device)
        try:
            for tensor in tensors:
                tensor.data = tensor.data.to(place)
        except (RuntimeError, AssertionError) as error:
            raise OptionError(f"device {str(device)!r} cannot be used: {first_line(error)}") from error
        yield
    finally:
        for tensor, data in zip(tensors, before, strict=True):
            tensor.data = data


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Undo what a forward pass leaves behind: attributes and hooks of the modules, buffers, random states.

    Lists, dicts, sets and objects among the attributes get their members back, buffers changed in place their values,
    and so do weights that a layer keeps below a `max_norm`, as embeddings do; the random states are those of torch,
    Python and NumPy.
    """
    values = [(b, b._version, b.clone()) for b in model.buffers() if not b.is_inference()]
    limited = [(w, w.data, w.data.clone()) for w in _limited(model)]
    with torch.random.fork_rng(devices=_cuda_devices(model)), _other_random_states(), attributes_restored(model):
        try:
            yield
        finally:
            for buffer, version, value in values:
                if buffer._version != version:
                    buffer.data.copy_(value)
            for weight, data, value in limited:
                if weight.device == data.device:  # a forward may have put other storage in
                    weight.data = data
                weight.data.copy_(value)


def _is_limited(layer: nn.Module) -> bool:
    named = [value for name, value in vars(layer).items() if "maxnorm" in name.replace("_", "").lower()]
    return any(value is not None for value in (getattr(layer, "max_norm", None), *named))


def _limited(model: nn.Module) -> list[nn.Parameter]:
    """The weights that a forward pass rewrites: those of embeddings, and layers like them, with a `max_norm`.

    Layers of others call it `maxnorm`, `_max_norm_val` (braindecode) and the like.
    """
    layers = [layer for layer in nn.Module.modules(model) if _is_limited(layer)]
    found = {id(w): w for layer in layers for w in layer._parameters.values() if w is not None}
    return [weight for weight in found.values() if not weight.is_inference()]


@contextmanager
def trial_run(model: nn.Module, beside: Iterable[nn.Module] = ()) -> Iterator[None]:
    """For a forward pass to look at: in eval mode, without gradients, detectors on small images; leaves no trace.

    beside: modules outside of the model that run too.
    """
    with ExitStack() as stack, evaluating(model), undisturbed(model), torch.no_grad():
        for module in beside:
            stack.enter_context(evaluating(module))
        if is_detector(model):
            _shrink_images(model)
        yield


def is_detector(model: nn.Module) -> bool:
    """Whether a network has torchvision's detection interface: it takes lists of images, which it resizes itself."""
    return type(getattr(model, "transform", None)).__name__ == "GeneralizedRCNNTransform"


_SIDE = 160


def _shrink_images(detector: Any) -> None:
    """Let it work on small images, where it would enlarge them to 800 pixels and more."""
    transform = detector.transform
    if not transform.fixed_size:
        transform.min_size = tuple(min(side, _SIDE) for side in transform.min_size)
        transform.max_size = min(transform.max_size, 2 * _SIDE)


@contextmanager
def _other_random_states() -> Iterator[None]:
    numpy = sys.modules.get("numpy")
    before = random.getstate(), numpy.random.get_state() if numpy else None
    try:
        yield
    finally:
        random.setstate(before[0])
        if numpy:
            numpy.random.set_state(before[1])


def seed_everything(model: nn.Module) -> None:
    """Set the random states of torch, on the model's device too, of Python and of NumPy; for use in `undisturbed`."""
    torch.default_generator.manual_seed(0)
    for device in _cuda_devices(model):
        torch.cuda.default_generators[device].manual_seed(0)
    random.seed(0)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(0)


@contextmanager
def attributes_restored(model: nn.Module) -> Iterator[None]:
    """Put the modules' attributes and hooks back as they were, lists, dicts and sets with their members."""
    containers = list(_containers(model))
    before = [dict(c) if isinstance(c, dict) else list(c) for c in containers]
    slots = [(value, _slots_of(value)) for value in kept_by(model) if _slots_of(value)]
    try:
        yield
    finally:
        for container, members in zip(containers, before, strict=True):
            _restore(container, members)
        for value, slot_values in slots:
            for name in _slots_of(value).keys() - slot_values.keys():
                object.__delattr__(value, name)
            for name, member in slot_values.items():
                object.__setattr__(value, name, member)


@contextmanager
def restored_on_error(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Put the modules back as they were, with their attributes, if the block fails. Yields what calls that off."""
    containers = list(_containers(model))
    before = [dict(c) if isinstance(c, dict) else list(c) for c in containers]
    wanted = True

    def keep() -> None:
        nonlocal wanted
        wanted = False

    try:
        yield keep
    except BaseException:
        if wanted:
            for container, members in zip(containers, before, strict=True):
                _restore(container, members)
        raise


_TABLES = [name for name, value in nn.Module().__dict__.items() if isinstance(value, dict)]
Container = list[Any] | dict[Any, Any] | set[Any] | deque[Any]


def _containers(model: nn.Module) -> Iterator[Container]:
    """The modules' own tables, and every list, dict and set among their attributes, nested ones included.

    So are the tables of hooks, which a forward may register, and of objects of the network's own, a cache, say.
    """
    for module in nn.Module.modules(model):
        yield module.__dict__
        if not isinstance(module, torch.jit.ScriptModule):  # whose tables are views of what was compiled
            yield from [module.__dict__[name] for name in _TABLES if name in module.__dict__]
    yield from (v for v in kept_by(model) if isinstance(v, (list, dict, set, deque)))


def _restore(container: Container, before: dict[Any, Any] | list[Any]) -> None:
    if isinstance(container, dict) and isinstance(before, dict):
        if container.keys() != before.keys() or not _identical(container.values(), before.values()):
            container.clear()
            container.update(before)
    elif len(container) != len(before) or not _identical(container, before):
        container.clear()
        if isinstance(container, (list, deque)):
            container.extend(before)
        else:
            container.update(before)


def _identical(now: Iterable[Any], before: Iterable[Any]) -> bool:
    """Whether all members are the same objects; nobody's `__eq__` is asked, because a tensor's is no yes or no."""
    return all(map(operator.is_, now, before))


def _cuda_devices(model: nn.Module) -> list[int]:
    first = next(model.parameters(), None)
    return [first.device.index or 0] if first is not None and first.device.type == "cuda" else []
