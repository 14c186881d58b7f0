"""What a plan knows of residual streams: which parameters to centre, and which layers read a norm."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from torch import nn

from ..errors import first_line
from ..inspection.example_inputs import inputs_for
from ..modules.tree import module_at
from ..norms.spec import DoesNotFit
from ..tracing.readers import Reader, readers_of
from ..tracing.stream import Run
from ..tracing.stream_moves import Offence
from .plan import Centred


class Streams:
    """The streams of one network, from one run that is made when it is first asked for."""

    def __init__(self, model: nn.Module, example_inputs: Any) -> None:
        self.model, self.example_inputs = model, example_inputs
        self._centred: dict[str, Centred] = {}

    @cached_property
    def _run(self) -> Run | str:
        """The run, or why there is none."""
        inputs = inputs_for(self.model, self.example_inputs)
        if inputs is None:
            return "no run shows what is written to it; give example inputs"
        try:
            return Run(self.model, inputs)
        except Exception as error:  # whatever the model's forward raises on inputs it was not made for
            return f"the network cannot run ({type(error).__name__}: {first_line(error)})"

    def _known(self) -> Run:
        if isinstance(self._run, str):
            raise DoesNotFit(self._run)
        return self._run

    def centre(self, path: str) -> None:
        """Note what the norm at a path needs centred. Raises DoesNotFit where that cannot be."""
        stream = self._known().stream(path)
        if stream.problem:
            raise DoesNotFit(f"its input cannot be centred: {stream.problem}")
        found = {name: Centred(name, share.dim, share.scales) for name, share in stream.writers.items()}
        for name, each in found.items():
            if self._centred.get(name, each) != each:
                raise DoesNotFit(f"its input cannot be centred: {name} is written to two streams")
            if any(bool((self.model.get_parameter(scale) == 0).any()) for scale in each.scales):
                raise DoesNotFit(f"its input cannot be centred: the layer scale {each.scales[-1]} holds 0")
        self._centred |= found

    def idle(self, channels: int) -> list[str]:
        """Parameters with so many channels that took no part in the run, so that it says nothing of them."""
        run = self._run
        named = self.model.named_parameters()
        return [] if isinstance(run, str) else [n for n, p in named if channels in p.shape and not run.reads(n)]

    def centred(self) -> tuple[Centred, ...]:
        """All that is to be centred."""
        return tuple(self._centred.values())

    def readers(self, path: str) -> tuple[Reader, ...]:
        """The layers that gamma and beta of the norm at a path go into. Raises DoesNotFit where they cannot."""
        try:
            found = readers_of(self._known(), path)
        except Offence as offence:
            raise DoesNotFit(f"{_NOT_READ}: {offence}") from offence
        for reader in found:
            owner, _, leaf = reader.bias.rpartition(".")
            module = module_at(self.model, owner)
            if self._known().reads(reader.bias):
                continue
            if module._parameters.get(leaf) is not None or type(module).forward not in _TAKE_A_BIAS:
                raise DoesNotFit(f"{_NOT_READ}: {owner} ({type(module).__name__}) takes no bias")
        return found


_NOT_READ = "its gamma and beta cannot go into what reads it"
_TAKE_A_BIAS = {cls.forward for cls in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)}
"""What uses a bias that it is given later."""
