"""What several runs say together: means, interquartile means and their intervals."""

from collections.abc import Callable

import numpy as np
from scipy import stats

from sb3_mtrl.common.evaluation import wilson_interval


def interquartile_mean(scores: np.ndarray) -> float:
    """
    Mean of the middle half of all scores: a quarter of them, rounded down, is cut off at each end.

    Paper: Deep Reinforcement Learning at the Edge of the Statistical Precipice, https://arxiv.org/abs/2108.13264.

    :param scores: Scores of any shape, at least one
    :return: The interquartile mean; NaN if a score is unknown (NaN)
    :raises ValueError: if there is no score
    """
    values = np.sort(np.asarray(scores, dtype=np.float64), axis=None)
    if len(values) == 0:
        raise ValueError("scores must hold at least one score, got none")
    if np.isnan(values[-1]):  # sorted behind the best scores, it would be cut off
        return float("nan")
    n_cut = len(values) // 4
    return float(values[n_cut : len(values) - n_cut].mean())


def run_bootstrap(
    scores: np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray | float],
    n_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> np.ndarray:
    """
    Interval of a statistic over whole runs: what other seeds would give on the same tasks, where one run learns all tasks.
    Its scores then rise and fall together, so that runs are drawn with all their tasks.

    The standard error comes from resampled runs, with the factor that makes it unbiased for a mean, and the width from
    Student's t with one degree of freedom less than there are runs. For a mean over runs and tasks this is Student's interval
    of the means of the runs, up to the chance of the resampling. Percentiles of the resamples would be much too narrow for few
    runs: in simulations with 3 normal runs 95 % of them hold the true value in three cases of four.

    :param scores: Scores ``(runs, tasks, ...)``
    :param statistic: Function of such an array, e.g. ``interquartile_mean``
    :param n_resamples: Number of resamples, at least 2
    :param confidence: Confidence level, in (0, 1)
    :param seed: Seed of the resampling: equal arguments give equal intervals
    :return: Lower and upper end, shape ``(2, ...)`` with the shape of the statistic; NaN for a single run, which says
        nothing about others, and where the statistic is NaN. The ends may lie outside the range of the scores
    :raises ValueError: if an argument is out of its range
    """
    scores = _check_bootstrap(scores, n_resamples, confidence)
    n_runs = len(scores)
    estimate = np.asarray(statistic(scores))
    if n_runs == 1:
        return np.full((2, *estimate.shape), np.nan)
    generator = np.random.default_rng(seed)
    samples = np.stack([statistic(scores[generator.integers(n_runs, size=n_runs)]) for _ in range(n_resamples)])
    # Resamples spread by (n - 1) / n of the variance between runs
    standard_error = samples.std(axis=0, ddof=1) * np.sqrt(n_runs / (n_runs - 1))
    half_width = stats.t.ppf(0.5 + confidence / 2, n_runs - 1) * standard_error
    return np.stack([estimate - half_width, estimate + half_width])


def stratified_bootstrap(
    scores: np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray | float],
    n_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> np.ndarray:
    """
    Percentile interval of a statistic, from runs that are resampled within each task by itself (stratified).

    This is the interval of rliable's ``get_interval_estimates`` (same paper as ``interquartile_mean``), with a generator
    of its own: equal arguments give equal intervals. It takes every score for a training of its own, as in suites of which
    each task is learned by itself. Where one run learns all tasks, its scores depend on each other, and this interval is too
    narrow, however many runs there are: that is what ``run_bootstrap`` is for.

    :param scores: Scores ``(runs, tasks, ...)``
    :param statistic: Function of such an array, e.g. ``interquartile_mean``
    :param n_resamples: Number of resamples, at least 2
    :param confidence: Confidence level, in (0, 1)
    :param seed: Seed of the resampling
    :return: Lower and upper end, shape ``(2, ...)`` with the shape of the statistic; NaN for a single run, which says
        nothing about others, and where the statistic is NaN
    :raises ValueError: if an argument is out of its range
    """
    scores = _check_bootstrap(scores, n_resamples, confidence)
    n_runs, n_tasks = scores.shape[:2]
    estimate = np.asarray(statistic(scores))
    if n_runs == 1:
        return np.full((2, *estimate.shape), np.nan)
    generator = np.random.default_rng(seed)
    tasks = np.arange(n_tasks)
    samples = [statistic(scores[generator.integers(n_runs, size=(n_runs, n_tasks)), tasks]) for _ in range(n_resamples)]
    tail = (1.0 - confidence) / 2
    ends = np.quantile(np.stack(samples), [tail, 1.0 - tail], axis=0)
    # Resamples may all lack the run with the unknown score
    return np.where(np.isnan(estimate), np.nan, ends)


def _check_bootstrap(scores: np.ndarray, n_resamples: int, confidence: float) -> np.ndarray:
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim < 2 or 0 in scores.shape:
        raise ValueError(f"scores must be an array (runs, tasks, ...) that is not empty, got the shape {scores.shape}")
    if n_resamples < 2:
        raise ValueError(f"n_resamples must be at least 2, got {n_resamples}")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must be in (0, 1), got {confidence}")
    return scores


def success_interval_over_runs(
    success_rates: np.ndarray, n_episodes_per_run: int, confidence: float = 0.95
) -> tuple[float, float]:
    """
    Interval of the mean success rate of several runs, for few runs: Student's t over the runs, and never narrower than
    Wilson's over all episodes (three runs that all reach 100 % have no spread, but were only seen for so many episodes).

    :param success_rates: Success rate of each run ``(runs,)``
    :param n_episodes_per_run: Number of episodes behind each rate, at least 1
    :param confidence: Confidence level, in (0, 1)
    :return: Lower and upper end, in [0, 1]; NaN if a rate is unknown
    :raises ValueError: if an argument is out of its range
    """
    rates = np.asarray(success_rates, dtype=np.float64)
    if rates.ndim != 1 or len(rates) == 0:
        raise ValueError(f"success_rates must be a vector of at least one rate, got the shape {rates.shape}")
    if np.isnan(rates).any():
        return float("nan"), float("nan")
    n_episodes = len(rates) * n_episodes_per_run
    low, high = wilson_interval(float(rates.mean()) * n_episodes, n_episodes, confidence)
    if len(rates) > 1:
        half_width = stats.t.ppf(0.5 + confidence / 2, len(rates) - 1) * rates.std(ddof=1) / np.sqrt(len(rates))
        low, high = min(low, rates.mean() - half_width), max(high, rates.mean() + half_width)
    return max(0.0, float(low)), min(1.0, float(high))
