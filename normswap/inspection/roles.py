"""What part of a network a layer belongs to: its backbone, its feature pyramid, or its head. Decided by names alone.

The names are those of torchvision, timm, transformers, detectron2, the OpenMMLab libraries and
segmentation_models_pytorch.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from ..choices import ROLES
from ..errors import OptionError, did_you_mean

PREFIX = "role:"

_BACKBONE = re.compile(r"backbone|bottom_up")
_FPN = re.compile(r"(.+_)?(fpn|neck|pan|bifpn|pafpn)(\d*|_.+)|(lateral|downsample)_convs")
# A network's last convolution before its classifier is called conv_head, its norm norm_head or bn_head: no head yet.
_HEAD = re.compile(
    r"(?!(conv|norm|bn)_head$)(.+_)?heads?|head\d+|rpn|(aux_|auxiliary_)?classifier|fc|aux\d|AuxLogits|decoder"
    r"|proposal_generator|(class|box)_net"
)


def roles_of(paths: Iterable[str]) -> dict[str, str]:
    """The role of each module of a network: `backbone`, `fpn` or `head`.

    paths: the dotted paths of all modules; whether one of them is called a backbone decides about the others.
    The outermost name that is known decides, except that a pyramid inside a backbone is the pyramid, and so are the
    `extra` layers of an SSD's backbone. Where no name is
    known, a module is part of the head if the network has something called a backbone, else it is the backbone.
    """
    paths = list(paths)
    named = any(map(_has_backbone, paths))
    return {path: _role(path, "head" if named else "backbone") for path in paths}


def _has_backbone(path: str) -> bool:
    """A convolutional stem of a vision transformer is called so too, and is not what the rest is the head of."""
    parts = path.split(".")
    return "patch_embed" not in parts and any(map(_BACKBONE.fullmatch, parts))


def _role(path: str, otherwise: str) -> str:
    parts = path.split(".") if path else []
    for place, part in enumerate(parts):
        if _FPN.fullmatch(part):
            return "fpn"
        if _BACKBONE.fullmatch(part):
            return "fpn" if any(map(_FPN.fullmatch, parts[place:])) or "extra" in parts[place:] else "backbone"
        if _HEAD.fullmatch(part):
            return "head"
    return otherwise if path else "backbone"


def role_in(pattern: str) -> str | None:
    """The role that a rule's pattern names, as in `role:head`; None for a pattern over paths.

    Raises OptionError for a role that does not exist.
    """
    if not pattern.startswith(PREFIX):
        return None
    role = pattern[len(PREFIX) :]
    if role not in ROLES:
        raise OptionError(
            f"unknown role {role!r} in {pattern!r}", hint=did_you_mean(role, ROLES) or f"Roles are {', '.join(ROLES)}."
        )
    return role


def counted(roles: Iterable[str]) -> str:
    """`backbone (53), head (8)`: the roles there are, in the order of the network, and how many layers have each."""
    counts = Counter(roles)
    return ", ".join(f"{role} ({counts[role]})" for role in ROLES if counts[role])
