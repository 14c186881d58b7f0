"""Residual branches in a run of a network: which norm is the last of one."""

from __future__ import annotations

from .calls import SUMS, CallGraph, passes_on

_PASSTHROUGH_FUNCTIONS = {"dropout", "stochastic_depth", "mul", "mul_", "detach", "clone", "alias"}


def ends_branch(run: CallGraph, index: int) -> bool:
    """Whether a norm's output goes straight into a sum whose other side is the branch's own starting point.

    The starting point is an ancestor of the norm, itself or through at most one projection (a pool, a convolution, a
    norm): the projection shortcut ends in a norm too, but what it joins is deeper than itself.
    """
    while True:
        users = [user for user in run.users[index] if not run.calls[user].way]
        if len(users) != 1:
            return False
        user = users[0]
        if run.calls[user].kind == "function" and run.names[user] in SUMS:
            break
        module = run.module(user)
        by_class = module is not None and passes_on(module)
        if not (by_class or (run.calls[user].kind == "function" and run.names[user] in _PASSTHROUGH_FUNCTIONS)):
            return False
        index = user
    others = [source for source in run.calls[user].inputs if source != index]
    return len(others) == 1 and _is_shortcut(run, others[0], index)


def _is_shortcut(run: CallGraph, other: int, branch: int) -> bool:
    depth = _layers_between(run, other, branch)
    if depth is not None:
        return depth > 0
    start, layers = other, 0
    for _ in range(8):
        sources = set(run.calls[start].inputs)
        if len(sources) != 1:
            break
        layers += run.layer_kind(start) is not None
        start = sources.pop()
        depth = _layers_between(run, start, branch)
        if depth is not None:
            return depth > layers
    return False


def _layers_between(run: CallGraph, start: int, end: int) -> int | None:
    """Most convolutions or linear layers on a way from call `start` to call `end`; None if there is no way."""
    best: dict[int, int | None] = {start: 0}

    for index in range(start + 1, end + 1):
        ways = [best.get(source) for source in run.calls[index].inputs]
        known = [w for w in ways if w is not None]
        step = int(run.layer_kind(index) is not None)
        best[index] = max(known) + step if known else None
    return best.get(end)
