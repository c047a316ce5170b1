import inspect
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral, Real
from typing import Any, TypeVar

import numpy as np
import torch as th
from stable_baselines3.common.vec_env import VecEnv

ArrayOrTensor = TypeVar("ArrayOrTensor", np.ndarray, th.Tensor)


class NonFiniteError(ValueError):
    """A NaN or an infinity turned up in training, and ``on_nonfinite="raise"`` was asked for."""


def check_that(name: str, value: Any, is_right: bool, expected: str) -> None:
    """
    :param name: Name of the argument
    :param value: Value got
    :param is_right: Whether it is what is expected
    :param expected: What is expected, as it follows "must be"
    :raises ValueError: if it is not
    """
    if not is_right:
        raise ValueError(f"{name} must be {expected}, got {value!r}")


def check_choice(name: str, value: Any, allowed: Sequence[Any]) -> None:
    """
    :param name: Name of the argument
    :param value: Value got
    :param allowed: Values allowed
    :raises ValueError: if the value is not allowed
    """
    # An array compares entry by entry
    is_allowed = not isinstance(value, (np.ndarray, th.Tensor)) and value in allowed
    check_that(name, value, is_allowed, f"one of {', '.join(map(repr, allowed))}")


def check_flag(name: str, value: Any) -> None:
    """
    :param name: Name of the argument
    :param value: Value got
    :raises ValueError: if it is neither True nor False, nor a number that equals one of them
    """
    check_that(name, value, isinstance(value, (Real, np.bool_)) and value in (True, False), "True or False")


def check_number(
    name: str,
    value: Any,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    or_none: bool = False,
    integer: bool = False,
    finite: bool = True,
) -> Any:
    """
    :param name: Name of the argument
    :param value: Value got; one of NumPy's numbers, or an array without axes, will do
    :param at_least: Lowest value allowed; None: no such bound
    :param above: Bound below all values allowed; None: no such bound
    :param at_most: Highest value allowed; None: no such bound
    :param or_none: Whether None is allowed, too
    :param integer: Whether it has to be an integer
    :param finite: Whether it has to be finite
    :return: The value, as one of Python's numbers
    :raises ValueError: if the value is not such a number (True, False and NaN are none)
    """
    if value is None and or_none:
        return None
    number = value.item() if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.ndim == 0) else value
    is_number = isinstance(number, Integral if integer else Real) and not isinstance(number, bool)
    is_finite = isinstance(number, Integral) or (is_number and math.isfinite(number))  # integers may be too large for a float
    in_range = (
        is_number
        and number == number
        and not (  # NaN equals nothing
            (at_least is not None and number < at_least)
            or (above is not None and number <= above)
            or (at_most is not None and number > at_most)
        )
    )
    if in_range and (is_finite or not finite):
        return number
    expected = [] if is_number else ["an integer" if integer else "a number"]
    lowest = at_least if above is None else above
    if at_most is not None and lowest is not None:
        expected.append(f"in {'[' if above is None else '('}{lowest}, {at_most}]")
    elif at_most is not None:
        expected.append(f"at most {at_most}")
    elif lowest is not None:
        expected.append(f"{'at least' if above is None else 'above'} {lowest}")
    if finite and is_number and not is_finite and (at_most is None or lowest is None):
        expected.append("finite")
    raise ValueError(f"{name} must be {' and '.join(expected or ['a number'])}{' or None' if or_none else ''}, got {value!r}")


def check_integer(name: str, value: Any, at_least: int, at_most: int | None = None, or_none: bool = False) -> Any:
    """
    :param name: Name of the argument
    :param value: Value got
    :param at_least: Lowest value allowed
    :param at_most: Highest value allowed; None: no such bound
    :param or_none: Whether None is allowed, too
    :return: The value, as Python's int
    :raises ValueError: if the value is no such integer
    """
    return check_number(name, value, at_least, at_most=at_most, or_none=or_none, integer=True)


def number_of(value: Any) -> Any:
    """
    :param value: A number, or its text (which SB3 takes for some arguments)
    :return: The number; anything else as it is
    """
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def check_number_or_auto(name: str, value: Any, at_least: float | None = None) -> Any:
    """
    :param name: Name of the argument
    :param value: Value got
    :param at_least: Lowest number allowed; None: no such bound
    :return: "auto", or the value as one of Python's numbers
    :raises ValueError: if the value is neither "auto" nor such a number nor the text of one ("0.2")
    """
    if isinstance(value, str) and value == "auto":
        return value
    return check_number(f"{name} (if not 'auto')", number_of(value), at_least)


def check_kwargs(name: str, kwargs: Any) -> None:
    """
    :param name: Name of the argument
    :param kwargs: Further arguments of something, or None
    :raises ValueError: if it is neither
    """
    is_right = kwargs is None or (isinstance(kwargs, dict) and all(isinstance(key, str) for key in kwargs))
    check_that(name, kwargs, is_right, "a dict from names of arguments to values or None")


def check_widths(name: str, widths: Any) -> None:
    """
    :param name: Name of the argument
    :param widths: Widths of the layers of a network, none for a linear one
    :raises ValueError: if these are no widths
    """
    is_sequence = isinstance(widths, Sequence) and not isinstance(widths, str)
    check_that(name, widths, is_sequence, "a list of layer widths")
    for width in widths:
        check_integer(f"each layer width in {name}", width, 1)


def constructor_arguments(cls: type) -> set[str]:
    """
    :param cls: A class
    :return: Names of the arguments of its constructor and of those of its base classes
    """
    constructors = (ancestor.__init__ for ancestor in cls.__mro__ if "__init__" in vars(ancestor))  # type: ignore[misc]
    return {name for constructor in constructors for name in inspect.signature(constructor).parameters}


def get_num_tasks(env: VecEnv) -> int:
    """
    Number of tasks of a vector environment.

    :param env: The vector environment
    :return: Its ``num_tasks`` attribute; 1 where the sub-environments have none
    :raises ValueError: if the sub-environments disagree, or name fewer than one task
    """
    # Ask first: fetching a missing attribute ends the worker of a SubprocVecEnv
    if not env.has_attr("num_tasks"):
        return 1
    num_tasks = set(env.get_attr("num_tasks"))
    if len(num_tasks) > 1:
        raise ValueError(f"all sub-environments must have the same num_tasks, got {sorted(num_tasks)}")
    (num_tasks_,) = num_tasks
    if num_tasks_ < 1:
        raise ValueError(f"num_tasks of the environment must be at least 1, got {num_tasks_}")
    return int(num_tasks_)


def get_task_names(env: VecEnv) -> tuple[str, ...]:
    """
    Names of the tasks of a vector environment, in the order of the one-hot.

    :param env: The vector environment
    :return: Its ``task_names`` attribute; ``("task-0", ...)`` where the sub-environments have none
    :raises ValueError: if there are not ``num_tasks`` names
    """
    num_tasks = get_num_tasks(env)
    if not env.has_attr("task_names"):
        return tuple(f"task-{task_id}" for task_id in range(num_tasks))
    task_names = tuple(str(name) for name in env.get_attr("task_names", indices=0)[0])
    if len(task_names) != num_tasks:
        raise ValueError(f"task_names of the environment must hold num_tasks={num_tasks} names, got {len(task_names)}")
    return task_names


def split_observation(obs: ArrayOrTensor, num_tasks: int) -> tuple[ArrayOrTensor, ArrayOrTensor]:
    """
    Split an observation into what the environment shows and the task's one-hot.

    :param obs: Observations, shape ``(..., n + num_tasks)``
    :param num_tasks: Length of the one-hot tail
    :return: The base observation ``(..., n)`` and the one-hot ``(..., num_tasks)``, views of ``obs``
    """
    return obs[..., :-num_tasks], obs[..., -num_tasks:]


def task_ids_from_observation(obs: np.ndarray, num_tasks: int) -> np.ndarray:
    """
    Read the task ids from the one-hot tail of observations.

    :param obs: Observations, shape ``(..., n + num_tasks)``
    :param num_tasks: Length of the one-hot tail
    :return: Task ids, shape ``(...)``
    :raises ValueError: if a tail is not a one-hot (as happens when the one-hot was normalised)
    """
    one_hot = split_observation(obs, num_tasks)[1]
    task_ids = one_hot.argmax(axis=-1)
    is_one_hot = (one_hot.max(axis=-1) == 1.0) & (np.count_nonzero(one_hot, axis=-1) == 1)
    if not np.all(is_one_hot):
        bad_tail = one_hot[~is_one_hot].reshape(-1, num_tasks)[0]
        raise ValueError(
            f"the last num_tasks={num_tasks} entries of an observation must be a one-hot of the task, got {bad_tail.tolist()} "
            "(normalised observations? VecTaskNormalize leaves the one-hot alone)"
        )
    return task_ids


def finite_task_ids(obs: np.ndarray, num_tasks: int, fallback: np.ndarray) -> np.ndarray:
    """
    ``task_ids_from_observation`` for observations that may hold NaN and infinities, also in the one-hot.

    :param obs: Observations, shape ``(B, n + num_tasks)``
    :param num_tasks: Length of the one-hot tail
    :param fallback: Task ids ``(B,)`` for rows whose one-hot is not finite
    :return: Task ids ``(B,)``
    :raises ValueError: if a finite tail is not a one-hot
    """
    intact = np.isfinite(split_observation(obs, num_tasks)[1]).all(axis=1)
    if intact.all():
        return task_ids_from_observation(obs, num_tasks)
    task_ids = np.array(fallback, dtype=np.int64)
    task_ids[intact] = task_ids_from_observation(obs[intact], num_tasks)
    return task_ids


def restore_generator(generator: th.Generator, state: th.Tensor) -> None:
    """
    Set the state of a generator. One of a generator of another device does not fit; this one goes on from its own seed then,
    and a warning says so.

    :param generator: The generator
    :param state: What ``get_state`` of another generator returned, on any device
    """
    if state.numel() != generator.get_state().numel():
        warnings.warn(
            "a random generator starts anew from its seed: its saved state is one of a generator of another device",
            stacklevel=3,
        )
        return
    generator.set_state(state.cpu())


def polyak_update_(params: Iterable[th.Tensor], target_params: Iterable[th.Tensor], tau: float) -> None:
    """
    SB3's ``polyak_update`` in two kernels for all tensors: ``target = (1 - tau) target + tau param``.

    :param params: Parameters to follow
    :param target_params: Parameters that follow, changed in place
    :param tau: Soft update coefficient, 1 copies
    """
    sources, targets = list(params), list(target_params)
    if not sources:
        return
    with th.no_grad():
        th._foreach_mul_(targets, 1 - tau)
        th._foreach_add_(targets, sources, alpha=tau)


def have_finite_gradients(optimizer: th.optim.Optimizer) -> th.Tensor | None:
    """
    :param optimizer: The optimiser
    :return: Bool scalar on the device, whether all gradients of its parameters are finite; None if there are none
    """
    gradients = [param.grad for group in optimizer.param_groups for param in group["params"] if param.grad is not None]
    if not gradients:
        return None
    if gradients[0].is_cuda:
        return th.stack(th._foreach_norm(gradients, float("inf"))).isfinite().all()  # one kernel for all of them
    # A sum is finite only if all its terms are, and is the fastest pass there is on a CPU
    return th.stack([gradient.sum() for gradient in gradients]).isfinite().all()


def are_within(tensors: Iterable[th.Tensor], bound: float) -> bool:
    """
    :param tensors: Tensors on the CPU
    :param bound: A positive number
    :return: Whether the absolute values of all entries are below the bound; False for NaN
    """
    for tensor in tensors:
        low, high = tensor.aminmax()
        if not (-bound < low.item() and high.item() < bound):
            return False
    return True


def is_fused(optimizer: th.optim.Optimizer) -> bool:
    """
    :param optimizer: The optimiser
    :return: Whether all its steps are fused; its groups count, as they follow a state that is loaded
    """
    return all(group.get("fused") for group in optimizer.param_groups)


def fuse(optimizer: th.optim.Optimizer) -> None:
    """
    Let an Adam optimiser step in one kernel, which on a GPU can leave a step out without a synchronisation. One that was told
    how to step, or any other optimiser, stays as it is.

    :param optimizer: The optimiser, changed in place
    """
    is_adam = isinstance(optimizer, (th.optim.Adam, th.optim.AdamW))
    if not is_adam or is_fused(optimizer) or optimizer.defaults["fused"] is False:
        return
    if any(optimizer.defaults[name] for name in ("foreach", "capturable", "differentiable")):
        return
    for group in optimizer.param_groups:
        group["fused"] = True
        for param in group["params"]:
            # Counted on the device then
            if "step" in optimizer.state.get(param, {}):
                optimizer.state[param]["step"] = optimizer.state[param]["step"].to(param.device, th.float32)


_static_shapes = False


@contextmanager
def static_shapes() -> Iterator[None]:
    """
    Within it all devices are treated as a GPU is whose updates are captured: no shape and no branch depends on values there.
    """
    global _static_shapes
    before, _static_shapes = _static_shapes, True
    try:
        yield
    finally:
        _static_shapes = before


def needs_static_shapes(tensor: th.Tensor) -> bool:
    """
    :param tensor: A tensor
    :return: Whether shapes and branches must not depend on its values: to look at them would mean to wait for a GPU
    """
    return tensor.is_cuda or _static_shapes


def step_unless(optimizer: th.optim.Optimizer, skip: th.Tensor | None) -> None:
    """
    Step an optimiser, or leave parameters and moments untouched.

    :param optimizer: The optimiser
    :param skip: Bool scalar on the device, None: step. A fused optimiser decides there, without a synchronisation.
    """
    if skip is None:
        optimizer.step()
    elif is_fused(optimizer):
        # What torch.amp.GradScaler does to skip a step
        optimizer.grad_scale, optimizer.found_inf = None, skip.float()  # type: ignore[attr-defined]
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
    elif not skip:
        optimizer.step()
