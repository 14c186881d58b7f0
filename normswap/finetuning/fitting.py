"""A head with as many scores as there are classes."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from ..conversion import record_of
from ..errors import NetworkError, OptionError
from ..heads import Head, resize_head
from ..predictors import find_predictor
from ..values import whole


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
            hint="Build it with the right number of classes, and leave num_classes (--num-classes) out.",
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
        raise OptionError(f"the data has {in_data} classes, more than num_classes={wanted} (--num-classes)")
    head = replace(found, classes=wanted)
    torch.manual_seed(seed)
    resize_head(model, head)
    record = record_of(model)
    if record is not None:  # a new one, so that the caller can put the network back as it was
        model.__dict__["_normswap"] = replace(record, head=head)
    return head
