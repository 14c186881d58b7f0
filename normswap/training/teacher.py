"""The network a converted one learns from, and the modes in which the two run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

from ..conversion.record import check_order, record_of
from ..conversion.revert import revert
from ..errors import Fix, NetworkError, OptionError, RevertError, Text
from ..modules.restore import evaluating, undisturbed
from ..modules.tree import copied


def original_of(model: nn.Module, reference: nn.Module | None) -> nn.Module:
    """The caller's reference, or the network that `model` was converted from, rebuilt.

    Raises OptionError for a reference that shares parameters with the model or was converted from a network such as
    it, or none for a model that normswap did not convert, and RevertError when the original cannot be rebuilt.
    """
    if reference is not None:
        own = set(model.parameters())
        if reference is model or any(p in own for p in reference.parameters()):
            raise OptionError(
                "the reference shares parameters with the model, so training would change it as well",
                hint=Text("Pass the original network, or leave ", Fix("reference"), " out and it is rebuilt."),
            )
        check_order(model, reference)
        return reference
    record = record_of(model)
    if record is None:
        raise NetworkError(
            "this model was not made by normswap.convert or normswap.load, so its original is not known",
            hint=Text("Pass the original network as ", Fix("reference"), "."),
        )
    try:
        return revert(copied(model))
    except RevertError as error:
        trained = any(entry.trains for entry in record.history)
        reason = "the network was trained since its conversion" if trained else error.message
        raise RevertError(
            f"the original network cannot be rebuilt: {reason}",
            hint=Text("Pass the original network as ", Fix("reference"), "."),
        ) from error


@contextmanager
def side_by_side(teacher: nn.Module, student: nn.Module) -> Iterator[None]:
    """Both networks in eval mode; what forward passes leave behind on them, and random state, is undone.

    The student's recurrent layers alone are in train mode, without their dropout: cuDNN gives no gradients otherwise.
    """
    with ExitStack() as stack:
        for network in (teacher, student):
            stack.enter_context(undisturbed(network))
            stack.enter_context(evaluating(network))
        stack.enter_context(_recurrent_training(student))
        yield


@contextmanager
def _recurrent_training(model: nn.Module) -> Iterator[None]:
    layers = [m for m in nn.Module.modules(model) if isinstance(m, nn.RNNBase)]
    before = [(m, m.training, m.dropout) for m in layers]
    try:
        for m in layers:
            m.training, m.dropout = True, 0.0
        yield
    finally:
        for m, training, dropout in before:
            m.training, m.dropout = training, dropout
