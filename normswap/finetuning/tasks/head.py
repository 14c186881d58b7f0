"""A head with as many scores as there are classes."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from ...arguments import whole
from ...conversion.record import attach, record_of
from ...errors import Fix, NetworkError, OptionError, Text
from ...heads.classifier import Head, resize_head
from ...heads.dense import find_predictor
from ...machine.limits import check_memory
from ...modules.tree import module_at


def fitted_predictor(
    model: nn.Module, in_data: int | None, asked: int | None, seed: int, *, whole_network: bool
) -> Head | None:
    """`fitted` for the class scores of torchvision's detectors or, whole_network, segmentation networks.

    None for networks that are none of these. Raises OptionError if they are asked for a new head.
    """
    found = find_predictor(model)
    if found is not None and (found[0] == "") == whole_network:
        return fitted(model, Head(*found), in_data, asked, seed)
    if asked is not None:
        raise NetworkError(
            f"where {type(model).__name__} has its class scores is not known, so it gets no new head",
            hint=Text("Build it with the right number of classes, and leave ", Fix("num_classes"), " out."),
        )
    return None


def fitted(model: nn.Module, found: Head, in_data: int | None, asked: int | None, seed: int) -> Head:
    """The head `found`, or, if it has another number of classes than asked for, a new one in its place, by `seed`.

    in_data: the classes that the data has, None where it does not say; what counts if nothing is asked for.
    Raises OptionError when the data has more than was asked for.
    """
    if asked is not None:
        whole("num_classes", asked, least=2)
    wanted = asked if asked is not None else in_data
    if wanted is None or wanted == found.classes:
        return found
    if in_data is not None and wanted < in_data:
        raise OptionError(Text(f"the data has {in_data} classes, more than ", Fix("num_classes", wanted)))
    _check_memory(model, found, wanted)
    head = replace(found, classes=wanted)
    torch.manual_seed(seed)
    resize_head(model, head)
    record = record_of(model)
    if record is not None:  # a new one, so that the caller can put the network back as it was
        attach(model, replace(record, notes={**record.notes, Head: head}))
    return head


def new_head(model: nn.Module) -> Head | None:
    """The head that fine-tuning has given a converted network; None for its own."""
    record = record_of(model)
    return None if record is None else record.note(Head)


def _check_memory(model: nn.Module, found: Head, wanted: int) -> None:
    """The new layer's weights, their gradients and two moments each are to fit in memory."""
    now = sum(p.numel() * p.element_size() for p in module_at(model, found.path).parameters())
    check_memory(
        4 * now * wanted / max(found.classes, 1),
        f"training a head for {wanted} classes",
        Text("Take fewer with ", Fix("num_classes"), "."),
    )
