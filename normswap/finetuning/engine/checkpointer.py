"""What a run keeps: its state, from which it goes on, and the network as it is and at its best."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from ...checkpoint.saving import save
from ...conversion.history import FineTuned
from ...conversion.record import record_of
from ...conversion.stabilize import factors_in, rescale
from ...training.run_state import load_state, save_state
from ...training.snapshot import Snapshot
from ...training.updates import Updates
from ..output.layout import BEST, LAST, STATE
from ..settings import Settings, refuse


@dataclass
class RunState:
    """Where a run stands.

    best, best_at: the best validation figure, and its step; what training began with counts. best_loss: the
    validation loss then, which decides between equals. before: the figures of step 0. figures: the last ones; window:
    first and last of the steps that those of training are over; validated_at: the step of those of validation.
    waited: how many validations in a row had no better figure. partial: what was summed up since the last look.
    entry: what the network's history says of the run so far.
    """

    best: float | None = None
    best_at: int | None = None
    best_loss: float | None = None
    before: dict[str, float] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)
    window: tuple[int, int] | None = None
    validated_at: int | None = None
    waited: int = 0
    partial: dict[str, Any] | None = None
    entry: dict[str, Any] | None = None


class Checkpointer:
    """Writes a run's state and networks into its folder; without a folder, the network's tensors stay in memory.

    folder: None to write nothing. main: whether this is the process that writes; all of them read. flags:
    `requires_grad` of all parameters, as the files are to have it. saved: the step of the last state.
    """

    def __init__(
        self,
        folder: Path | None,
        settings: Settings,
        model: nn.Module,
        average: AveragedModel | None,
        updates: Updates,
        flags: Mapping[str, bool],
        *,
        main: bool,
    ) -> None:
        self.folder, self.settings, self.model, self.average = folder, settings, model, average
        self.updates, self.main, self._flags = updates, main, flags
        self.saved: int | None = None
        self._memory = Snapshot(lambda: {**dict(model.named_parameters()), **dict(model.named_buffers())})

    @property
    def network(self) -> nn.Module:
        """What is validated, saved and returned: the averaged network, where there is one."""
        found: nn.Module = self.model if self.average is None else self.average.module
        return found

    def keep(self, standing: RunState, measured: int | None) -> None:
        """Write the state of the run, and the network as it is. measured: see `Engine`. Raises OutputError."""
        self._remember(standing)
        if self.folder is None:
            self._memory.take(self.updates.step)
        elif self.main:
            save_state(self.folder / STATE, asdict(self.settings), self._state(standing, measured))
            self._save(self.folder / LAST)
        self.saved = self.updates.step

    def keep_best(self, standing: RunState) -> None:
        """Write the network as the best so far. Raises OutputError."""
        if self.folder is not None and self.main:
            self._remember(standing)
            self._save(self.folder / BEST)

    def restore(self) -> tuple[RunState, int | None] | None:
        """Put everything where the last state has it, and give what `keep` got; without a folder only the network.

        Raises CheckpointError for a file that is damaged or of another network, and OptionError for other settings.
        """
        if self.folder is None:
            self._memory.put_back()
            return None
        path, settings = self.folder / STATE, self.settings
        state = load_state(
            path, asdict(settings), self.model.state_dict(), lambda was: refuse(path, was["settings"], settings)
        )
        self.model.load_state_dict(state["parameters"])
        self.updates.restore(state)
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        for network in (self.model, *([] if self.average is None else [self.average.module])):
            rescale(network, dict(factors_in(network)), back=True, values=False)
            rescale(network, state["factors"], values=False)
        self.saved = state["step"]
        standing = dict(state["standing"])
        due = standing.pop("pending", False)  # as files of before have it
        return RunState(**standing), state.get("looked", None if due else self.saved)

    def told(self) -> str:
        """What is left after a failure."""
        if self.saved is None:
            return "nothing has changed yet"
        if self.folder is not None:
            return f"the last good checkpoint is {self.folder / STATE}, of step {self.saved}"
        return "the network is as it was before" if self.saved == 0 else f"the network is that of step {self.saved}"

    def _state(self, standing: RunState, measured: int | None) -> dict[str, Any]:
        return {
            **self.updates.state(),
            "parameters": _cpu(self.model.state_dict()),
            "average": None if self.average is None else _cpu(self.average.state_dict()),
            "looked": measured,
            "factors": dict(factors_in(self.model)),
            "standing": {f.name: getattr(standing, f.name) for f in fields(standing)},
        }

    def _save(self, path: Path) -> None:
        network = self.network
        training = {n: p.requires_grad for n, p in network.named_parameters()}
        _set_flags(network, self._flags)
        try:
            save(network, path, overwrite=True)
        finally:
            _set_flags(network, training)

    def _remember(self, standing: RunState) -> None:
        """Note in the networks' history what was done so far, in place of what an earlier checkpoint noted."""
        settings = self.settings
        if self.updates.step == 0:
            return
        entry = FineTuned(
            self.updates.step,
            settings.steps,
            settings.train,
            settings.lr,
            settings.optimizer,
            settings.global_batch,
            settings.seed,
            dict(standing.figures),
        )
        for network in dict.fromkeys((self.model, self.network)):
            record = record_of(network)
            if record is not None:
                if [last.to_dict() for last in record.history[-1:]] == [standing.entry]:
                    record.history.pop()
                record.history.append(entry)
        standing.entry = entry.to_dict()


def _cpu(state: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v.detach().cpu() if isinstance(v, torch.Tensor) else v for k, v in state.items()}


def _set_flags(model: nn.Module, flags: Mapping[str, bool]) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(flags[name])
