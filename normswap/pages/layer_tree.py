"""The changed and the kept layers of a plan, by the modules that hold them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from ..display.overview import CARRIED, also_told, target_told
from ..modules.path_ranges import ROOT
from ..planning.plan import Kept, Plan, Step


@dataclass(frozen=True)
class Leaf:
    """One norm. target, becomes: the new norm, without and with its options; empty where it stays, for the reason in
    `note`. style: of `carried`, as in `CARRIED`.
    """

    path: str
    name: str
    was: str
    target: str = ""
    becomes: str = ""
    channels: int | None = None
    carried: str = ""
    style: str = ""
    fed_by: tuple[str, ...] = ()
    note: str = ""


@dataclass
class Node:
    """A module with norms below it; `summary` says what becomes of them."""

    name: str
    children: dict[str, Node] = field(default_factory=dict)
    leaves: list[Leaf] = field(default_factory=list)

    @property
    def summary(self) -> str:
        """`12 bn to gn, 1 kept`."""
        counts = Counter(f"{leaf.was} to {leaf.target}" if leaf.target else "kept" for leaf in self.all())
        return ", ".join(f"{count} {what}" for what, count in counts.items())

    def all(self) -> Iterable[Leaf]:
        """Every norm below."""
        yield from self.leaves
        for child in self.children.values():
            yield from child.all()


def layer_tree(plan: Plan) -> Node:
    """A module that holds a single module and nothing else is told in one line with it."""
    root = Node("network")
    for leaf in [*map(_changed, plan.steps), *map(_kept, plan.kept)]:
        node = root
        for part in leaf.path.split(".")[:-1]:
            node = node.children.setdefault(part, Node(part))
        node.leaves.append(leaf)
    return _shortened(root)


def _shortened(node: Node) -> Node:
    """With what is below it in one line where there is nothing beside that."""
    children = [_shortened(child) for child in node.children.values()]
    for i, child in enumerate(children):
        if len(child.children) == 1 and not child.leaves:
            (only,) = child.children.values()
            children[i] = Node(f"{child.name}.{only.name}", only.children, only.leaves)
    return Node(node.name, {child.name: child for child in children}, node.leaves)


def _changed(step: Step) -> Leaf:
    carried, style = CARRIED[step.transfer]
    return Leaf(
        step.path,
        step.path.rpartition(".")[2] or ROOT,
        step.source,
        step.target,
        target_told([step]),
        step.channels,
        carried + also_told(step),
        style,
        step.producers,
        step.note,
    )


def _kept(kept: Kept) -> Leaf:
    return Leaf(kept.path, kept.path.rpartition(".")[2] or ROOT, kept.norm, note=kept.reason)
