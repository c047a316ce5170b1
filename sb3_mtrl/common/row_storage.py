"""Where the rows of a replay buffer lie: in main memory, or as a tensor on a device."""

from typing import Any

import numpy as np
import torch as th

from sb3_mtrl.common.utils import check_that

# Rows that wait on the host at most. They are copied sooner if a batch is to be drawn.
MAX_STAGED_ROWS = 1024


def check_storage_device(name: str, device: Any) -> th.device | None:
    """
    :param name: Name of the argument
    :param device: Value got
    :return: The device; None as it is
    :raises ValueError: if it is no device that rows can be kept on, or there is no such device
    """
    if device is None:
        return None
    expected = "None, 'cpu', 'cuda' or one of its devices ('cuda:0')"
    check_that(name, device, isinstance(device, (str, th.device)), expected)
    try:
        parsed = th.device(device)
    except RuntimeError as error:
        raise ValueError(f"{name} must be {expected}, got {device!r}") from error
    check_that(name, device, parsed.type in ("cpu", "cuda"), expected)
    if parsed.type == "cuda" and not th.cuda.is_available():
        raise ValueError(f"{name} must be None or 'cpu' where PyTorch finds no CUDA device, got {device!r}")
    return parsed


class HostRows:
    """
    Rows in main memory, as a NumPy array that the system gives pages to when they are first written.

    :param n_rows: Number of rows
    :param width: Width of a row
    """

    def __init__(self, n_rows: int, width: int):
        self.rows = np.zeros((n_rows, width), dtype=np.float32)

    @property
    def host_bytes(self) -> int:
        """Main memory that all rows take."""
        return self.rows.nbytes

    def write(self, places: np.ndarray, rows: np.ndarray) -> None:
        """
        :param places: Where the rows go ``(n,)``; of several rows for one place the last one stays
        :param rows: The rows ``(n, width)``
        """
        self.rows[places] = rows

    def read(self, start: int, stop: int) -> np.ndarray:
        """
        :param start: First place
        :param stop: Past the last place
        :return: The rows in these places ``(stop - start, width)``, not to be written to
        """
        return self.rows[start:stop]

    def put(self, start: int, rows: np.ndarray) -> None:
        """
        :param start: Where the first row goes
        :param rows: Rows for successive places ``(n, width)``
        """
        self.rows[start : start + len(rows)] = rows


class DeviceRows:
    """
    Rows as a tensor on a device. What is written waits on the host until enough has come together, or until it is read.

    :param n_rows: Number of rows
    :param width: Width of a row
    :param device: The device
    """

    host_bytes = 0

    def __init__(self, n_rows: int, width: int, device: th.device):
        self.device = device
        self._rows = th.zeros(n_rows, width, device=device)
        self._staged: list[tuple[np.ndarray, np.ndarray]] = []
        self._n_staged = 0

    @property
    def rows(self) -> th.Tensor:
        """All rows ``(n_rows, width)``."""
        self.flush()
        return self._rows

    def write(self, places: np.ndarray, rows: np.ndarray) -> None:
        """
        :param places: Where the rows go ``(n,)``; of several rows for one place the last one stays
        :param rows: The rows ``(n, width)``, which must not change any more
        """
        self._staged.append((places, rows))
        self._n_staged += len(places)
        if self._n_staged >= MAX_STAGED_ROWS:
            self.flush()

    def flush(self) -> None:
        """
        Copy to the device what waits on the host.
        """
        if not self._staged:
            return
        places, rows = (np.concatenate(parts) for parts in zip(*self._staged, strict=True))
        self._staged.clear()
        self._n_staged = 0
        # The device writes in any order, so that each place may come only once: its last row
        places, last = np.unique(places[::-1], return_index=True)
        self._rows.index_copy_(0, self.upload(places), self.upload(rows[::-1][last]))

    def upload(self, values: np.ndarray) -> th.Tensor:
        """
        :param values: An array, which must not change any more
        :return: The same on the device
        """
        return th.from_numpy(values).to(self.device, non_blocking=True)

    def take(self, places: th.Tensor) -> th.Tensor:
        """
        :param places: Places on the device ``(n,)``
        :return: Copies of the rows in them ``(n, width)``
        """
        return self.rows.index_select(0, places)

    def read(self, start: int, stop: int) -> np.ndarray:
        """
        :param start: First place
        :param stop: Past the last place
        :return: Copies of the rows in these places ``(stop - start, width)``
        """
        return self.rows[start:stop].cpu().numpy()

    def put(self, start: int, rows: np.ndarray) -> None:
        """
        :param start: Where the first row goes
        :param rows: Rows for successive places ``(n, width)``
        """
        self.rows[start : start + len(rows)].copy_(th.from_numpy(rows))


class DeviceCopy:
    """
    A small array on a device, copied there only when it has changed.

    :param device: The device
    """

    def __init__(self, device: th.device):
        self.device = device
        self._values: np.ndarray | None = None
        self._tensor = th.empty(0)

    def of(self, values: np.ndarray) -> th.Tensor:
        """
        :param values: The array as it is now
        :return: The same on the device
        """
        if self._values is None or not np.array_equal(self._values, values):
            self._values = values.copy()
            self._tensor = th.from_numpy(self._values).to(self.device, non_blocking=True)
        return self._tensor
