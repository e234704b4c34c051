"""What stands in for CUDA graphs in tests of recordings, where there is no GPU."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastbert.graphs.inference import Graphed
from fastbert.graphs.training import GraphedStep


class RerunCalls:
    """Stands in for CUDA graphs of inference: runs again what was recorded.

    Like graphs, all recordings leave their results in the same memory, poisoned before, and read the parameters where
    they were: that they are still alive and still there is checked.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.memory = torch.empty(0, device=device)
        self.sizes: list[int] = []
        self.before_replay: Callable[[], None] = lambda: None
        self.model: nn.Module | None = None

    def record(self, run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        first = run()
        self.sizes.append(first.shape[1])
        if self.memory.numel() < first.numel() or self.memory.dtype != first.dtype:
            self.memory = first.new_empty(first.numel())
        output = self.memory[: first.numel()].view(first.shape)
        assert self.model is not None
        read = [(weakref.ref(p), p.data_ptr()) for p in self.model.parameters()]

        def replay() -> torch.Tensor:
            for parameter, address in read:
                there = parameter()
                assert there is not None
                assert there.data_ptr() == address
            self.memory.fill_(float("nan"))
            self.before_replay()
            return output.copy_(run())

        return replay

    def follow(self) -> None: ...

    def forget(self) -> None: ...


def rerun_calls(model: nn.Module, tokens: tuple[int, ...] = (16, 40, 64), max_sequences: int = 6) -> Graphed:
    made = Graphed(model, tokens, max_sequences, RerunCalls)
    made._recorder.model = getattr(model, "base_model", model)
    return made


class Fixed(TorchDispatchMode):
    """Refuses what no graph can hold: results whose shape depends on values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert torch.Tag.dynamic_output_shape not in func.tags, func
        return func(*args, **kwargs or {})


class RerunSteps:
    """Stands in for CUDA graphs of training steps: runs again what was recorded, with the hyperparameters of then, and
    without what others do when the optimizer is called.

    Like graphs, all recordings leave their loss in the same memory, and read and write parameters, learning rates and
    the optimizer's state where they were: that they are still there is checked.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.memory = torch.zeros((), device=device)
        self.before_replay: Callable[[], None] = lambda: None
        self.optimizer: Any = None

    def _held(self) -> list[int]:
        groups = self.optimizer.param_groups
        tensors = [x for group in groups for x in (group["lr"], *group["params"])]
        return [x.data_ptr() for x in tensors + [x for own in self.optimizer.state.values() for x in own.values()]]

    def record(self, run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        held = self._held()
        then = [dict(group) for group in self.optimizer.param_groups]

        def replay() -> torch.Tensor:
            assert self._held() == held
            self.memory.fill_(float("nan"))
            self.before_replay()
            own, now = vars(self.optimizer), dict(vars(self.optimizer))
            own.pop("step", None)
            own["param_groups"] = then
            try:
                with Fixed():
                    return self.memory.copy_(run())
            finally:
                own.update(now)

        return replay

    def follow(self) -> None: ...

    def forget(self) -> None: ...


def rerun_steps(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tokens: tuple[int, ...] = (16, 40),
    max_sequences: int = 5,
    max_grad_norm: float | None = None,
) -> GraphedStep:
    step = GraphedStep(model, optimizer, tokens, max_sequences, max_grad_norm, RerunSteps)
    step._recorder.optimizer = optimizer  # type: ignore[attr-defined]
    return step
