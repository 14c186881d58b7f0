"""Choose which channels share a group, so that what each group's mean and power do from sample to sample cancels.

`balance` chooses signs and sizes for the channels of a group; which channels are in it is free too, where their order
can be changed without changing the function (see `permuting`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_ROUNDS = 4  # swaps for each channel, at most
_AMONG = 128  # channels that are compared at a time, each with each; of more, so many are drawn again and again
_LEAST = 1e-4  # of the whole: below this a swap is not worth its change


@dataclass
class _Pull:
    """One sum of squares over groups, `sum_g |sum_(c in g) s_c x_c|^2`, as covariances `cov (C, C)` and signs.

    at_group: of each channel with each group's sum, `(C, groups)`. signed: whether signs are free; else they are 1.
    """

    cov: Tensor
    sign: Tensor
    signed: bool
    at_group: Tensor

    @classmethod
    def of(cls, rows: Tensor, member: Tensor, groups: int, signed: bool, weight: float) -> _Pull:
        cov = weight * (rows.mT @ rows)
        sign = torch.ones_like(cov[0])
        return cls(cov, sign, signed, torch.zeros(len(cov), groups).to(cov)).summed(member)

    def summed(self, member: Tensor) -> _Pull:
        """With each group's sum as its members say; the signs by one greedy pass of flips."""
        groups = self.at_group.shape[1]
        one_hot = torch.nn.functional.one_hot(member, groups).to(self.cov)
        self.at_group = self.cov @ (one_hot * self.sign[:, None])
        if self.signed:
            for _ in range(4 * len(member)):
                own = self.at_group.gather(1, member[:, None]).squeeze(1)
                gain = (self.sign * own - self.cov.diagonal()).view(-1)
                best = int(gain.argmax())
                if gain[best] <= 1e-9 * self.cov.diagonal().sum():
                    break
                self.sign[best] *= -1
                self.at_group[:, member[best]] += 2 * self.sign[best] * self.cov[:, best]
        return self

    def total(self, member: Tensor) -> float:
        own = self.at_group.gather(1, member[:, None]).squeeze(1)
        return float((self.sign * own).sum())

    def change(self, among: Tensor, member: Tensor) -> Tensor:
        """By how much the sum changes where two of these channels change places, a square, with the best signs."""
        at_group, sign, group = self.at_group[among], self.sign[among], member[among]
        own = sign * at_group.gather(1, group[:, None]).squeeze(1)
        stays = self.cov.diagonal()[among] - own
        # What d meets in the group of c, once c has left it: (c, d).
        meets = at_group.mT[group] - sign[:, None] * self.cov[among][:, among]
        moved = -meets.abs() if self.signed else meets
        return 2 * (stays[:, None] + stays[None, :] + moved + moved.mT)

    def swap(self, c: int, d: int, member: Tensor) -> None:
        """Let c and d change places; `member` is still as it was."""
        g, h = int(member[c]), int(member[d])
        in_g = self.at_group[d, g] - self.sign[c] * self.cov[c, d]
        in_h = self.at_group[c, h] - self.sign[d] * self.cov[c, d]
        new_c, new_d = (
            torch.where(p > 0, -1.0, 1.0).to(p) if self.signed else torch.ones_like(p) for p in (in_h, in_g)
        )
        self.at_group[:, g] += new_d * self.cov[:, d] - self.sign[c] * self.cov[:, c]
        self.at_group[:, h] += new_c * self.cov[:, c] - self.sign[d] * self.cov[:, d]
        self.sign[c], self.sign[d] = new_c, new_d


def regrouped(spreads: Sequence[tuple[Tensor, Tensor]], groups: int, eps: float) -> Tensor:
    """An order of the channels, `(C,)` int64: group g consists of the entries from g C / groups on.

    spreads: for each norm that sees the channels, means and squares `(N, C)` float64 of the samples, centred.
    Minimises `sum_g var(sum_c s_c m_c) + var(sum_c q_c) / (2 + 2 eps)^2` over equal groups and signs, m being the means
    and q the squares, by exchanging the two channels that gain most, while any pair does: to first order, what the
    group's mean and its variance add to the output's error.
    """
    power = (2 + 2 * eps) ** -2
    channels = spreads[0][0].shape[1]
    member = torch.arange(channels, device=spreads[0][0].device) * groups // channels
    pulls = []
    for means, squares in spreads:
        pulls.append(_Pull.of(means, member, groups, True, 1.0))
        if power:
            pulls.append(_Pull.of(squares - squares.mean(0), member, groups, False, power))
    least = _LEAST / channels * sum(p.total(member) for p in pulls)
    drawing = torch.Generator().manual_seed(0)
    for _ in range(_ROUNDS * channels if channels <= _AMONG else channels // groups):
        among = torch.randperm(channels, generator=drawing)[:_AMONG].sort().values.to(member.device)
        if not _swapped(pulls, among, member, least) and channels <= _AMONG:
            break
    return member.argsort(stable=True)


def _swapped(pulls: Sequence[_Pull], among: Tensor, member: Tensor, least: float) -> bool:
    """Exchange the pairs that gain most, each group taking part in one at most. Returns whether there was any."""
    change = torch.stack([p.change(among, member) for p in pulls]).sum(0)
    change = change.masked_fill(member[among][:, None] == member[among][None, :], 0.0)
    done: set[int] = set()
    for at in change.view(-1).argsort()[: 8 * pulls[0].at_group.shape[1]].tolist():
        i, j = divmod(at, len(among))
        if float(change[i, j]) >= -least:
            break
        c, d = int(among[i]), int(among[j])
        pair = {int(member[c]), int(member[d])}
        if done.isdisjoint(pair):
            done |= pair
            for pull in pulls:
                pull.swap(c, d, member)
            member[[c, d]] = member[[d, c]]
    return bool(done)
