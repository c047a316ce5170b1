"""An update as a function of tensors that stay where they are, which a CUDA graph can hold and start as a whole."""

import copy
import weakref
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NoReturn

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.save_util import recursive_getattr

from sb3_mtrl.common.callbacks import WResetCallback
from sb3_mtrl.common.utils import constructor_arguments, fuse, is_fused, static_shapes
from sb3_mtrl.mtsac.checks import check_cuda

# Updates before one is recorded: they make the states of the optimisers and whatever libraries set up when first used
N_WARM_UPS = 3
# Kinds of updates that are kept, the last ones made. A training has two at most, each with a pool of GPU memory of its own.
MAX_RECORDINGS = 8
# Of settings that can be compared
PLAIN_TYPES = (bool, int, float, str, tuple, type(None), np.generic)


def check_capturable(model: Any) -> None:
    """
    :param model: An MTSAC with ``cuda_graph=True``
    :raises ValueError: if its updates cannot be recorded as a CUDA graph
    """
    if model.use_sde:
        raise ValueError("cuda_graph must be False with use_sde=True, got True (gSDE checks its distributions on the host)")
    space = model.observation_space
    if not isinstance(space, spaces.Box) or len(space.shape) != 1:
        raise ValueError(f"cuda_graph must be False unless observations are vectors (a 1-D Box), got True with {space}")
    for optimizer in model._stepping_optimizers():
        fuse(optimizer)
        if not is_fused(optimizer):
            raise ValueError(
                f"cuda_graph must be False unless optimizer_class is Adam or AdamW and optimizer_kwargs leave out foreach, "
                f"capturable, differentiable and fused=False, got True with {type(optimizer).__name__}"
            )
    check_cuda("cuda_graph", True, "False", model.device)


class Recording:
    """
    One kind of update: the tensors that it reads and writes and, once it was captured, its graph.

    :param replay_data: A batch of the kind
    :param updates_targets: Whether the target networks follow
    """

    def __init__(self, replay_data: Any, updates_targets: bool):
        self.updates_targets = updates_targets
        tensors = dict(_tensors(replay_data))
        self._inputs = {name: th.empty_like(tensor, memory_format=th.contiguous_format) for name, tensor in tensors.items()}
        fields: dict[str, Any] = {name: tensor for name, tensor in self._inputs.items() if name in replay_data._fields}
        if "extras" in replay_data._fields:
            fields["extras"] = {name: self._inputs[f"extras.{name}"] for name in replay_data.extras}
        self.replay_data = replay_data._replace(**fields)
        self.n_warm_ups = 0
        self.graph: Any = None
        self.draws: dict[WResetCallback, th.Tensor] = {}
        # What an update leaves behind: (T,) bool, tasks dropped; size of each row's TD error; tasks whose vectors were reset
        self.dropped: th.Tensor | None = None
        self.td_error_sizes: th.Tensor | None = None
        self.resets: dict[WResetCallback, th.Tensor] = {}

    @staticmethod
    def kind(replay_data: Any, updates_targets: bool) -> Hashable:
        """
        :param replay_data: A batch
        :param updates_targets: Whether the target networks follow
        :return: What is equal for batches that one recording serves
        """
        return updates_targets, *((name, tensor.shape) for name, tensor in _tensors(replay_data))

    def fill(self, replay_data: Any) -> None:
        """
        :param replay_data: The batch of the next update
        """
        for name, tensor in _tensors(replay_data):
            self._inputs[name].copy_(tensor)


class StaticUpdate:
    """
    Makes the updates of a model whose tensors all stay where they are: the batch is copied to where the last one was, and
    learning rates are tensors. On a GPU the first updates of a kind run as they are, the next one is captured as a CUDA graph,
    and from then on that graph is started. Elsewhere the same function runs uncaptured.

    What the function cannot do comes before or after it, on the host: draws of a w-reset's own generator, the priorities of a
    prioritized buffer, and ``after_update`` of other guards. (Their ``drop_tasks`` is part of what is captured: it has to
    decide on the device, and anew each time.)

    :param model: An MTSAC, which is not kept alive by this
    """

    def __init__(self, model: Any):
        self._model = weakref.ref(model)  # a cycle would keep the memory of the graphs until Python looks for cycles
        self._stream: Any = None
        self._recordings: dict[Hashable, Recording] = {}
        # Of each group of each optimiser: its learning rate on the device, and the number that this tensor holds
        self._rates: list[tuple[th.Tensor, float]] = []
        # What the recordings were last made with, and the tensors of the networks, which take their time to collect
        self._network_tensors: list[th.Tensor] = []
        self._made_with: tuple[list[Any], list[Any]] | None = None
        # Why no update can be made any more
        self._failure: str | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "StaticUpdate":
        """Graphs cannot be copied, and hold the tensors of this model: the copy's are recorded anew."""
        return type(self)(copy.deepcopy(self.model, memo))

    @property
    def model(self) -> Any:
        """The model that this updates."""
        return self._model()

    @property
    def captures(self) -> bool:
        """Whether updates are captured."""
        return self.model.device.type == "cuda"

    # ---------------------------------------------------------- what is captured

    def start(self) -> None:
        """
        Forget the recordings if anything has changed that they hold, by reference or by value; called before some updates.
        This goes through all tensors each time: nothing tells that someone has replaced one.

        :raises RuntimeError: if an update before could not be captured
        """
        if self._failure is not None:
            raise RuntimeError(self._failure)
        if self._made_with is None:
            return
        objects, values = self._holdings()
        if values == self._made_with[1] and list(map(id, objects)) == list(map(id, self._made_with[0])):
            return
        self._recordings.clear()
        self._rates.clear()
        self._made_with = None

    def _remember_holdings(self) -> None:
        self._network_tensors = [*self.model.policy.parameters(), *self.model.policy.buffers()]
        self._made_with = self._holdings()

    def _holdings(self) -> tuple[list[Any], list[Any]]:
        """Objects, and addresses and settings, that a captured update is made of."""
        model = self.model
        optimizers = model._stepping_optimizers()
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        states = [state for optimizer in optimizers for state in optimizer.state.values()]
        tensors = [*self._network_tensors, *model._train_sums.values(), model._nonfinite_tasks]
        tensors += [tensor for group in groups for tensor in group["params"]]
        tensors += [tensor for state in states for tensor in state.values()]
        variables = [(name, recursive_getattr(model, name)) for name in model._get_torch_save_params()[1]]
        variables += [variable for guard in model.update_guards for variable in getattr(guard, "__dict__", {}).items()]
        tensors += [value for name, value in variables if isinstance(value, th.Tensor) and self._can_be_held(name, value)]
        settings = [setting for group in groups for name, setting in group.items() if name not in ("params", "lr")]
        for owner in (model, *model.update_guards):
            settings += [getattr(owner, name, None) for name in _argument_names(type(owner))]  # type: ignore[arg-type]
        plain = [setting for setting in settings if isinstance(setting, PLAIN_TYPES)]
        # The buffer says how errors are measured. Its rows are no part of a graph, and are not to be kept for it.
        objects = [model.policy, *optimizers, *model.update_guards, weakref.ref(model.replay_buffer)]
        return objects, [*(tensor.data_ptr() for tensor in tensors), *plain]

    def _can_be_held(self, name: str, tensor: th.Tensor) -> bool:
        """Whether an update may use the tensor of this name; one of the host may be a new one after each update."""
        return tensor.device.type == self.model.device.type and not name.endswith("generator_state")

    def _run(self, recording: Recording, capturable: bool = False) -> None:
        """The function that is captured: no shape and no branch depends on what the tensors hold."""
        model = self.model
        recording.resets.clear()
        with static_shapes(), self._rates_on_device(capturable):
            recording.dropped = model._make_update(recording.replay_data, recording.updates_targets)
            assert recording.dropped is not None
            recording.td_error_sizes = None if model._pass_priorities is None else model._pass_priorities[1]
            for guard in filter(_is_split, model.update_guards):
                recording.resets[guard] = guard.reset_vectors(recording.dropped, recording.draws[guard])

    @contextmanager
    def _rates_on_device(self, capturable: bool) -> Iterator[None]:
        """What a captured step needs of an optimiser; it is taken back, so that it is neither saved nor scheduled."""
        groups = self._groups()
        before = [(group["lr"], group.get("capturable")) for group in groups]
        for group, (rate, _) in zip(groups, self._rates, strict=True):
            group["lr"], group["capturable"] = rate, capturable
        try:
            yield
        finally:
            for group, (number, was_capturable) in zip(groups, before, strict=True):
                group["lr"], group["capturable"] = number, was_capturable

    def _groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.model._stepping_optimizers() for group in optimizer.param_groups]

    # ------------------------------------------------------------------- updates

    def __call__(self, replay_data: Any, updates_targets: bool) -> None:
        """
        One update.

        :param replay_data: The batch
        :param updates_targets: Whether the target networks follow
        """
        model = self.model
        recording = self._recording(replay_data, updates_targets)
        recording.fill(replay_data)
        for guard in filter(_is_split, model.update_guards):
            self._set_draws(recording, guard)
        model._upload_host_values()
        self._set_rates()
        self._execute(recording)
        model._pass_priorities = None
        if recording.td_error_sizes is not None:
            model._pass_priorities = replay_data.indices, recording.td_error_sizes
        model._finish_update()
        for guard in model.update_guards:
            if guard in recording.resets:
                guard.tell_buffer(recording.resets[guard])
            else:
                guard.after_update(recording.dropped)

    def _recording(self, replay_data: Any, updates_targets: bool) -> Recording:
        kind = Recording.kind(replay_data, updates_targets)
        if kind not in self._recordings or self._recordings[kind].graph is None:
            self.start()  # as what is remembered after this update would hide a change from the graphs of other kinds
        recording = self._recordings.pop(kind, None) or Recording(replay_data, updates_targets)
        self._recordings[kind] = recording  # the last one used comes last
        if len(self._recordings) > MAX_RECORDINGS:
            del self._recordings[next(iter(self._recordings))]
        return recording

    @staticmethod
    def _set_draws(recording: Recording, guard: WResetCallback) -> None:
        draws = guard.draw()
        if guard in recording.draws:
            recording.draws[guard].copy_(draws)
        else:
            recording.draws[guard] = draws

    def _set_rates(self) -> None:
        groups = self._groups()
        if not self._rates:
            self._rates = [(th.zeros((), device=self.model.device), 0.0) for _ in groups]
        for index, (group, (rate, value)) in enumerate(zip(groups, self._rates, strict=True)):
            if group["lr"] != value:
                rate.fill_(group["lr"])
                self._rates[index] = rate, group["lr"]

    def _execute(self, recording: Recording) -> None:
        if not self.captures:
            self._run(recording)
            return
        if recording.graph is None and recording.n_warm_ups < N_WARM_UPS:
            self._warm_up(recording)
            self._remember_holdings()  # what is made only now must not be gone when the next update is captured
            return
        if recording.graph is None:
            recording.graph = self._capture(recording)
            self._remember_holdings()
        recording.graph.replay()

    def _warm_up(self, recording: Recording) -> None:
        """An update on another stream, as it is going to be captured."""
        recording.n_warm_ups += 1
        if self._stream is None:
            self._stream = th.cuda.Stream(self.model.device)
        current = th.cuda.current_stream(self.model.device)
        self._stream.wait_stream(current)
        with th.cuda.stream(self._stream):
            self._run(recording)
        current.wait_stream(self._stream)

    def _capture(self, recording: Recording) -> Any:
        """
        The update as a graph; capturing makes none.

        :raises RuntimeError: if something in it cannot be captured
        """
        for optimizer in self.model._stepping_optimizers():
            optimizer.zero_grad()  # gradients have to be in the memory of the graph
        graph = th.cuda.CUDAGraph()
        with th.cuda.device(self.model.device):
            current = th.cuda.current_stream()
            try:
                # A stream of this device, which PyTorch's own is not if it captured on another one before
                with th.cuda.graph(graph, stream=self._stream):
                    self._run(recording, capturable=True)
            except th.OutOfMemoryError:
                raise  # the capture was ended, and a smaller batch may do
            except RuntimeError as error:
                self._refuse(error)
            finally:
                th.cuda.set_stream(current)  # else it stays that of a capture that could not be ended
        return graph

    def _refuse(self, error: RuntimeError) -> NoReturn:
        """
        :param error: What was raised out of a capture. To end one that has failed fails, too: then this is the error that is
            raised, and the reason its context
        :raises RuntimeError: always; ``OutOfMemoryError`` if this is the reason
        """
        reason = error.__context__ or error
        self._failure = (
            "the capture of an update as a CUDA graph failed before, which can leave PyTorch unable to go on: start a new "
            f"process, with cuda_graph=False if the reason remains ({type(reason).__name__}: {reason})"
        )
        if isinstance(reason, th.OutOfMemoryError):
            raise reason from None
        raise RuntimeError(
            "the update cannot be captured as a CUDA graph (does a guard, features extractor or layer of your own look at "
            "values, or bring some from the host?); in a new process, cuda_graph=False runs it as it is: "
            f"{type(reason).__name__}: {reason}"
        ) from reason


def _tensors(replay_data: Any) -> Iterator[tuple[str, th.Tensor]]:
    """Name and value of each tensor of a batch."""
    for name, value in replay_data._asdict().items():
        if isinstance(value, th.Tensor):
            yield name, value
        elif isinstance(value, dict):
            yield from ((f"{name}.{key}", tensor) for key, tensor in value.items())


def _is_split(guard: Any) -> bool:
    """Whether what a guard does after an update is divided in parts for the device and for the host."""
    return isinstance(guard, WResetCallback) and type(guard).after_update is WResetCallback.after_update


@cache
def _argument_names(cls: type) -> list[str]:
    return sorted(constructor_arguments(cls))
