"""
The tables of measurements in README.md and docs/, made from the committed results: ``python -m benchmarks.report``.

A table stands between ``<!-- NAME: made by python -m benchmarks.report -->`` and ``<!-- end of NAME -->``; NAME is a key of
``TABLES``. ``--check`` changes nothing and ends with exit code 1 where a document says something else than the results.
"""

import argparse
import csv
import json
import re
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from sb3_mtrl.common.results import RunHistory, group_by_method, read_tidy_results
from sb3_mtrl.zoo.algorithms import ALGORITHMS

ROOT = Path(__file__).parent.parent
DOCUMENTS = ("README.md", "docs/learning.md", "docs/speed.md")
LEARNING = ROOT / "benchmarks/learning"
BLOCK = re.compile(
    r"(?P<begin><!-- (?P<name>[\w-]+): made by python -m benchmarks\.report -->\n)"
    r".*?"
    r"(?P<end><!-- end of (?P=name) -->)",
    re.DOTALL,
)
# Evaluations at the end of a training whose mean says more than the last one alone
N_LAST = 5
LEARNERS = {
    "SB3 SAC": "SB3 `SAC`",
    "SBX SAC (JAX)": "SBX `SAC` (JAX)",
    "bare PyTorch loop": "bare PyTorch loop of the same update",
    "its matrix products alone": "its matrix products alone",
    "MTSAC": "**MTSAC**",
    "CMTASAC": "CMTASAC",
    "PaCoSAC": "PaCoSAC, K = 5",
    "PaCoSAC K=20": "PaCoSAC, K = 20",
    "STARSSAC": "STARSSAC",
    "TSACSAC": "TSACSAC",
}
STABILITY_TITLES = {
    "random": "random policy",
    "vanilla": "neither",
    "maskout": "loss maskout",
    "maskout_w_reset": "loss maskout and w-reset",
}


@cache
def speed() -> dict[str, Any]:
    """
    :return: The results of ``make bench``
    """
    return json.loads((ROOT / "benchmarks/speed/results.json").read_text())


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """
    :param header: Titles of the columns
    :param rows: Cells
    :return: A table in Markdown
    """
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def with_quartiles(row: dict[str, Any]) -> str:
    """
    :param row: A row of a table of ``benchmarks.speed``
    :return: The ratio of its speed by the reference's, and the quartiles
    """
    low, high = row["ratio_quartiles"]
    return f"{row['speed_ratio']:.2f} ({low:.2f} to {high:.2f})"


def conditions() -> str:
    """What the sections of the results were measured on, and when."""
    by_conditions: dict[str, list[str]] = {}
    for section, values in speed()["conditions"].items():
        cores = "all" if values["cores_per_learner"] is None else values["cores_per_learner"]
        how = f"{cores} cores for each learner, `{values['clock']}`, at most {values['rounds_at_most']} rounds"
        line = f"`{values['machine']}`; {how}; {values['date']}"
        by_conditions.setdefault(line, []).append(section)
    if len(by_conditions) == 1:
        return f"{next(iter(by_conditions))}\n"
    return "".join(f"* {', '.join(sections)}: {line}\n" for line, sections in by_conditions.items())


def updates() -> str:
    """One update of each learner."""

    def cells(table: dict[str, Any], name: str) -> list[str]:
        row = table[name]
        if "skipped" in row:
            return ["-", "-", "-"]
        ratio = "1" if name == "SB3 SAC" else with_quartiles(row)
        low, high = row["cost_quartiles"]
        cost = "1" if name == "MTSAC" else f"{row['cost']:.2f} ({low:.2f} to {high:.2f})"
        return [f"{row['median_ms']:.0f}", ratio, cost]

    small, large = speed()["update"], speed()["update_50_tasks"]
    titles = ("ms", "speed by SB3's", "in updates of MTSAC")
    header = ["one update, 3 x 400", *(f"T = {n}: {title}" for n in (10, 50) for title in titles)]
    return markdown(header, [[title, *cells(small, name), *cells(large, name)] for name, title in LEARNERS.items()])


def updates_in_short() -> str:
    """One update of 10 tasks for the README."""
    table = speed()["update"]
    groups = [
        ["SB3 SAC"],
        ["SBX SAC (JAX)"],
        ["bare PyTorch loop"],
        ["MTSAC"],
        ["PaCoSAC", "CMTASAC"],
        ["TSACSAC", "STARSSAC"],
    ]
    rows = []
    for group in groups:
        measured = [name for name in group if "skipped" not in table[name]]
        title = " / ".join(name if len(group) > 1 else LEARNERS[name] for name in group)
        times = " / ".join(f"{table[name]['median_ms']:.0f}" for name in measured)
        rows.append([title, times, " / ".join(f"{table[name]['speed_ratio']:.2f}" for name in measured)])
    return markdown(["one update", "ms", "speed by SB3's"], rows)


def loops() -> str:
    """Whole training, with large and with small networks."""
    keys = ("loop", "loop_of_small_networks")
    tables = [speed()[key] for key in keys]
    rows = []
    for name in tables[0]:
        row = [name]
        for table in tables:
            row += [f"{table[name]['median_ms']:.2f}", with_quartiles(table[name])]
        rows.append(row)
    sizes = ("3 x 400, 1280 rows", "2 x 128, 320 rows, one thread")
    titles = ("ms per environment step", "speed by the better of SB3's")
    return markdown(["training on MT10", *(f"{size}: {title}" for size in sizes for title in titles)], rows)


def simulator() -> str:
    """Steps and resets of one environment."""
    results = speed()["simulator"]
    rows = []
    for key in ("step", "reset"):
        for name, row in results[key].items():
            if "skipped" in row:
                rows.append([f"one {key}", name, "-", "-"])
                continue
            low, high = (1e3 * time for time in row["quartiles_ms"])
            ratio = "1" if name == "fast=False" else with_quartiles(row)
            shown = f"{name}, goal seen before" if (key, name) == ("reset", "fast=True") else name
            rows.append([f"one {key}", shown, f"{1e3 * row['median_ms']:.0f} ({low:.0f} to {high:.0f})", ratio])
    return markdown(["MT10", "", "us of CPU time (quartiles)", "speed by Meta-World's own"], rows)


def vec_envs() -> str:
    """Ten sub-environments in each vector environment."""
    table = speed()["simulator"]["vec_env"]["wall"]
    rows = []
    for kind in ("dummy", "subproc", "shared"):
        row = [f'`"{kind}"`']
        for fast in ("fast=False", "fast=True"):
            entry = table[f"{kind}, {fast}"]
            is_reference = (kind, fast) == ("dummy", "fast=False")
            row += [f"{1e3 * entry['median_ms']:.0f}", "1" if is_reference else with_quartiles(entry)]
        rows.append(row)
    header = ["ten sub-environments", "stock: us per step", "speed", "`fast=True`: us per step", "speed"]
    return markdown(header, rows)


def replay() -> str:
    """What a batch costs, and what rows take."""
    results = speed()
    uniform, prioritized, memory = results["replay"], results["prioritized"], results["memory"]

    def ms(row: dict[str, Any]) -> str:
        low, high = row["quartiles_ms"]
        return f"{row['median_ms']:.2f} ({low:.2f} to {high:.2f})"

    rows = [
        ["SB3's `ReplayBuffer`, uniform, 100,000 rows (wall time)", ms(uniform["SB3 ReplayBuffer"])],
        ["`MultiTaskReplayBuffer`, uniform, 100,000 rows (wall time)", ms(uniform["MultiTaskReplayBuffer"])],
        ["`MultiTaskReplayBuffer`, uniform, 10 x 100,000 rows (CPU time)", ms(prioritized["sample, plain"])],
        ["`TaskPrioritizedReplayBuffer`, 10 x 100,000 rows (CPU time)", ms(prioritized["sample, prioritized"])],
        ["the same with `update_priorities` (CPU time)", ms(prioritized["sample + update_priorities"])],
    ]
    text = markdown(["a batch of 1280 rows of 10 tasks", "ms (quartiles)"], rows)
    num_tasks = (1, 10, 50)
    buffers = [
        [f"`{name}`, a million transitions, MB", *(f"{memory[f'{name} T={n}']:.0f}" for n in num_tasks)]
        for name in ("ReplayBuffer", "MultiTaskReplayBuffer")
    ]
    return text + "\n" + markdown(["memory", *(f"T = {n}" for n in num_tasks)], buffers)


def env_memory() -> str:
    """What sub-environments take."""
    memory, numbers = speed()["memory"], (1, 10, 20)
    kinds = [kind for kind in ("dummy", "subproc", "shared") if f"MT10, {kind}, n_envs=1" in memory]
    rows = [[f'`"{kind}"`', *(f"{memory[f'MT10, {kind}, n_envs={n}']:.0f}" for n in numbers)] for kind in kinds]
    return markdown(["MT10, MB with all processes", *(f"{n} sub-environments" for n in numbers)], rows)


def goals() -> str:
    """What was aimed at, and what was reached."""
    results = speed()
    small, large, loop = results["update"], results["update_50_tasks"], results["loop"]
    steps, resets = results["simulator"]["step"], results["simulator"]["reset"]
    no_avx512 = "matrix products alone set the limit (above); needs AVX-512"

    def cost(table: dict[str, Any], name: str) -> str:
        return f"{table[name]['cost']:.2f}"

    def best(start: str) -> str:
        return f"{max(row['speed_ratio'] for name, row in loop.items() if name.startswith(start)):.2f}"

    def microseconds(row: dict[str, Any]) -> str:
        return f"{1e3 * row['median_ms']:.0f} us"

    bf16, vec_env = small["MTSAC bfloat16"], results["simulator"]["vec_env"]["wall"]
    of_bf16 = ("-", bf16["skipped"]) if "skipped" in bf16 else (f"{bf16['speed_ratio']:.2f}", "")
    of_sb3 = min(vec_env[f"{kind}, fast=False"]["median_ms"] for kind in ("dummy", "subproc"))
    of_physics = f"MuJoCo alone takes {microseconds(steps['physics alone'])}; the goal was set where it takes 60"
    rows = [
        ("MTSAC's update, speed by SB3's", "2.3", f"{small['MTSAC']['speed_ratio']:.2f}", no_avx512),
        ('the same with `amp="bf16"`', "3.8", *of_bf16),
        ("a bare loop's update in MTSAC's", "at least 0.9", cost(small, "bare PyTorch loop"), ""),
        ("PaCoSAC, K = 5, in updates of MTSAC", "at most 1.5", cost(small, "PaCoSAC"), ""),
        ("the same with T = 50", "at most 1.7", cost(large, "PaCoSAC"), ""),
        ("PaCoSAC, K = 20, T = 50", "at most 2.3", cost(large, "PaCoSAC K=20"), ""),
        ("CMTASAC", "at most 2", cost(small, "CMTASAC"), ""),
        ("STARSSAC", "at most 2.2", cost(small, "STARSSAC"), ""),
        ("TSACSAC", "at most 2", cost(small, "TSACSAC"), "2.19 times MTSAC's matrix products (counted)"),
        ("a step of MT10, CPU time", "at most 95 us", microseconds(steps["fast=True"]), of_physics),
        ("a reset to a goal seen before, CPU time", "at most 300 us", microseconds(resets["fast=True"]), ""),
        (
            '`"shared"`, speed by the better of SB3\'s vector environments with stock Meta-World',
            "3",
            f"{of_sb3 / vec_env['shared, fast=True']['median_ms']:.2f}",
            "two cores, shared by two workers and the main process",
        ),
        ("training with MTSAC, speed by the better of SB3's loops", "3.5", best("MTSAC"), no_avx512),
        ("training with PaCoSAC", "2", best("PaCoSAC"), no_avx512),
        ("PaCoSAC on MT10 on a GPU like the H200", "1,500 updates/s", "-", "not run on a GPU"),
    ]
    return markdown(["", "goal", "reached", "reason"], rows)


def run_costs() -> str:
    """Hours that trainings of the papers' length take, from the speeds of updates and of the whole loop."""
    results = speed()
    small, large = results["update"], results["update_50_tasks"]
    # Of a step of the environment all but its tenth of an update
    others = results["loop"]["MTSAC, shared"]["median_ms"] - small["MTSAC"]["median_ms"] / 10
    rows = []
    for name in ("MTSAC", "PaCoSAC", "CMTASAC", "TSACSAC", "STARSSAC"):
        mt10 = 2e7 * (small[name]["median_ms"] / 10 + others)
        mt50 = 1e8 * (large[name]["median_ms"] / 50 + others)
        rows.append([name, *(f"{milliseconds / 3.6e6:.0f}" for milliseconds in (mt10, mt50))])
    return markdown(["hours", "MT10, 2e7 steps, 1280 rows", "MT50, 1e8 steps, 6400 rows"], rows)


def over_seeds(values: np.ndarray, form: str) -> str:
    """
    :param values: A number of each seed
    :param form: How to show one
    :return: Their mean, with the lowest and highest where these differ
    """
    low, mean, high = (format(value, form) for value in (values.min(), values.mean(), values.max()))
    return mean if low == high else f"{mean} ({low} to {high})"


def grid_runs(preset: str, table: str = "") -> dict[str, list[RunHistory]]:
    """
    :param preset: Name of the grid in ``presets.yml``
    :param table: Which table of it, ``<preset><table>.csv``
    :return: Runs of the methods, the random policy first
    """
    groups = group_by_method(read_tidy_results(LEARNING / f"{preset}{table}.csv"))
    methods = yaml.safe_load((LEARNING / "presets.yml").read_text())[preset]["methods"]
    return {method: groups[method] for method in ("random", *methods) if method in groups}


def grid_costs(preset: str) -> list[dict[str, str]]:
    """
    :param preset: Name of the grid
    :return: The rows of ``<preset>_runs.csv``
    """
    with (LEARNING / f"{preset}_runs.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def method_title(method: str) -> str:
    return "random policy" if method == "random" else ALGORITHMS[method].algorithm_class.__name__


def cpu_suite() -> str:
    """Success rates of the final policies on all goals, and how many runs are finished."""
    finals, curves = grid_runs("cpu_suite", "_final"), grid_runs("cpu_suite")
    rows = []
    for method, runs in finals.items():
        rates = np.array([run.success_rates[-1] for run in runs])  # (runs, T)
        cells = [over_seeds(column, ".0%") for column in [*rates.T, rates.mean(axis=1)]]
        finished = {run.seed for run in runs}
        last = [run.success_rates[-N_LAST:].mean() for run in curves.get(method, []) if run.seed in finished]
        n_seeds = "" if method == "random" else str(len(runs))
        rows.append([method_title(method), n_seeds, *cells, over_seeds(np.array(last), ".0%") if last else ""])
    tasks = [task.removesuffix("-v3") for task in finals["random"][0].task_names]
    return markdown(["success: mean (seeds: lowest to highest)", "seeds", *tasks, "mean", f"last {N_LAST} evaluations"], rows)


def cpu_suite_returns() -> str:
    """Mean returns at the end of the training, over several policies."""
    finals, curves = grid_runs("cpu_suite", "_final"), grid_runs("cpu_suite")
    rows = [["random policy", *(f"{value:.0f}" for value in finals["random"][0].mean_returns[-1])]]
    for method, runs in curves.items():
        returns = np.array([run.mean_returns[-N_LAST:].mean(axis=0) for run in runs])  # (runs, T)
        rows.append([method_title(method), *(over_seeds(column, ".0f") for column in returns.T)])
    tasks = [task.removesuffix("-v3") for task in finals["random"][0].task_names]
    return markdown([f"return, mean of the last {N_LAST} evaluations: mean (seeds: lowest to highest)", *tasks], rows)


def cpu_suite_runs() -> str:
    """Time of each run, and what its guards did."""
    cells = []
    for row in grid_costs("cpu_suite"):
        minutes = f"{float(row['seconds']) / 60:.0f}"
        cells.append([method_title(row["method"]), row["seed"], minutes, row["dropped_updates"], row["w_resets"]])
    return markdown(["run", "seed", "minutes", "dropped updates", "w-resets"], cells)


def stability() -> str:
    """Exploding losses: what the guards did, and what was learned with them."""
    finals, curves, costs = grid_runs("stability", "_final"), grid_runs("stability"), grid_costs("stability")
    rows = []
    for method, runs in finals.items():
        scores = [np.array([run.success_rates[-1].mean() for run in runs])]
        if method in curves:
            scores += [
                np.array([run.scores(metric)[-N_LAST:].mean() for run in curves[method]]) for metric in ("success", "return")
            ]
        counts = [
            ", ".join(row[name] or "-" for row in sorted(costs, key=lambda row: int(row["seed"])) if row["method"] == method)
            for name in ("dropped_updates", "w_resets")
        ]
        shown = [over_seeds(values, form) for values, form in zip(scores, (".0%", ".0%", ".0f"), strict=False)]
        n_seeds = "" if method == "random" else str(len(runs))
        rows.append([STABILITY_TITLES[method], n_seeds, *shown, *[""] * (3 - len(shown)), *counts])
    last = f"last {N_LAST} evaluations"
    header = ["mean of the 4 tasks: mean (seeds: lowest to highest)", "seeds", "success, final policy", f"success, {last}"]
    return markdown([*header, f"return, {last}", "dropped updates, by seed", "w-resets, by seed"], rows)


def bf16() -> str:
    """Learning with and without bfloat16."""
    rows = []
    for method, runs in sorted(group_by_method(read_tidy_results(LEARNING / "bf16.csv")).items()):
        cells = []
        for metric, form in (("success", ".0%"), ("return", ".0f")):
            scores = np.array([run.scores(metric).mean(axis=1) for run in runs])  # (runs, E)
            cells += [over_seeds(scores[:, -1], form), over_seeds(scores.mean(axis=1), form)]
        rows.append([method, str(len(runs)), *cells])
    header = [f"{metric} {when}" for metric in ("success", "return") for when in ("at the end", "over all evaluations")]
    return markdown(["mean of the 4 tasks: mean (lowest to highest seed)", "seeds", *header], rows)


TABLES: dict[str, Callable[[], str]] = {
    "conditions": conditions,
    "updates": updates,
    "updates-in-short": updates_in_short,
    "loops": loops,
    "simulator": simulator,
    "vec-envs": vec_envs,
    "replay": replay,
    "env-memory": env_memory,
    "goals": goals,
    "run-costs": run_costs,
    "cpu-suite": cpu_suite,
    "cpu-suite-returns": cpu_suite_returns,
    "cpu-suite-runs": cpu_suite_runs,
    "stability": stability,
    "bf16": bf16,
}


def refresh(text: str) -> str:
    """
    :param text: A document
    :return: The document with the tables that the results give
    :raises ValueError: if a block is not closed, or named as no table is
    """
    names = re.findall(r"<!-- ([\w-]+): made by ", text)
    found = [match["name"] for match in BLOCK.finditer(text)]
    if names != found or set(names) - set(TABLES):
        raise ValueError(f"blocks must be closed and named after {', '.join(TABLES)}, got {', '.join(names)}")
    return BLOCK.sub(lambda match: f"{match['begin']}\n{TABLES[match['name']]()}\n{match['end']}", text)


def main(arguments: Sequence[str] | None = None) -> None:
    """
    :param arguments: Command line, ``sys.argv`` if None
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing")
    args = parser.parse_args(arguments)
    stale = []
    for name in DOCUMENTS:
        text = (ROOT / name).read_text(encoding="utf-8")
        fresh = refresh(text)
        if fresh != text:
            stale.append(name)
            if not args.check:
                (ROOT / name).write_text(fresh, encoding="utf-8")
    print(f"{'stale' if args.check else 'rewritten'}: {', '.join(stale) or 'none'}")
    if args.check and stale:
        sys.exit(1)


if __name__ == "__main__":
    main()
