"""
``python -m sb3_mtrl.record``: one video of a trained agent, a grid with a cell for each task.

    MUJOCO_GL=egl python -m sb3_mtrl.record --algo pacosac --env MetaWorld-MT10-v3 -f logs/ -o mt10.mp4

Each cell plays one episode with deterministic actions, on the first of the task's goals, and stands still when it is over. Its
title names the task, and the step at which it was solved. The agent is found as ``rl_zoo3.enjoy`` finds it.

Without a display, MuJoCo renders in software: ``MUJOCO_GL=egl`` (Debian packages libegl1 and libgl1-mesa-dri; the default) or
``MUJOCO_GL=osmesa`` (libosmesa6). That takes 0.1 to 0.4 s for a cell of a frame, so only every fourth step is shown
unless ``--every`` says otherwise.

The file's ending chooses the format: ``.mp4`` or ``.gif``. The package's extra ``video`` is needed.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.type_aliases import PolicyPredictor
from stable_baselines3.common.vec_env import VecEnv, is_vecenv_wrapped

from sb3_mtrl.common.callbacks import DEFAULT_EVAL_SEED
from sb3_mtrl.common.utils import get_num_tasks, get_task_names
from sb3_mtrl.common.vec_env import VecTaskAssignment
from sb3_mtrl.zoo.runs import TrainedRun, add_run_arguments, find_runs

FORMATS = (".mp4", ".gif")
TITLE_COLOURS = {True: (24, 130, 60), False: (60, 60, 60)}
DEFAULT_FPS = 30


def play_cells(
    model: PolicyPredictor, env: VecEnv, every: int = 1, seed: int = DEFAULT_EVAL_SEED
) -> Iterator[tuple[list[np.ndarray], list[int | None], int]]:
    """
    Play one episode in each sub-environment, and show it.

    :param model: The policy; its recurrent state is kept
    :param env: Vector environment whose ``render_mode`` is "rgb_array"
    :param every: Show every so many steps, and the last one
    :param seed: Seed of the environment
    :return: Again and again: a frame ``(height, width, 3)`` of each sub-environment (its last one if its episode is over),
        the step at which each was first solved (None: not yet), and the step of the frame
    """
    env.seed(seed)
    obs: Any = env.reset()
    states, starts = None, np.ones(env.num_envs, dtype=bool)
    playing = np.ones(env.num_envs, dtype=bool)
    solved: list[int | None] = [None] * env.num_envs
    frames = _render(env)
    step = 0
    yield frames, list(solved), step
    while playing.any():
        actions, states = model.predict(obs, state=states, episode_start=starts, deterministic=True)
        # An environment that is over has begun its next episode before it could be rendered: what is seen last is the state
        # before the last step
        obs, _, starts, infos = env.step(actions)
        step += 1
        for index in np.flatnonzero(playing):
            if solved[index] is None and infos[index].get("is_success"):
                solved[index] = step
        playing &= ~starts
        if step % every == 0 or not playing.any():
            if playing.any():
                frames = [new if is_on else old for new, old, is_on in zip(_render(env), frames, playing, strict=True)]
            yield frames, list(solved), step


def _render(env: VecEnv) -> list[np.ndarray]:
    frames = [frame for frame in env.get_images() if frame is not None]
    if len(frames) != env.num_envs:
        raise ValueError("the environment must render in the mode 'rgb_array'")
    return frames


def draw_grid(
    frames: Sequence[np.ndarray], titles: Sequence[str], is_solved: Sequence[bool], cell_size: int, n_columns: int
) -> np.ndarray:
    """
    :param frames: A frame ``(height, width, 3)`` for each cell
    :param titles: A title for each cell
    :param is_solved: Whether the title of a cell is green
    :param cell_size: Width and height of a cell's picture in pixels; the title stands above it
    :param n_columns: Number of cells in a row
    :return: The grid ``(height, width, 3)``, uint8; empty cells are black
    """
    from PIL import Image, ImageDraw, ImageFont

    title_height = 2 * max(cell_size // 20, 8)
    font = ImageFont.load_default(title_height * 0.6)
    n_rows = -(-len(frames) // n_columns)
    grid = Image.new("RGB", (n_columns * cell_size, n_rows * (cell_size + title_height)))
    draw = ImageDraw.Draw(grid)
    for index, (frame, title, solved) in enumerate(zip(frames, titles, is_solved, strict=True)):
        left, top = index % n_columns * cell_size, index // n_columns * (cell_size + title_height)
        draw.rectangle((left, top, left + cell_size - 1, top + title_height - 1), fill=TITLE_COLOURS[solved])
        draw.text((left + 4, top + title_height / 2), title, fill="white", font=font, anchor="lm")
        picture = Image.fromarray(frame)
        if picture.size != (cell_size, cell_size):
            picture = picture.resize((cell_size, cell_size))
        grid.paste(picture, (left, top + title_height))
    return np.asarray(grid)


def record_run(
    run: TrainedRun,
    path: Path,
    cell_size: int = 240,
    n_columns: int | None = None,
    every: int = 4,
    fps: float | None = None,
    camera: str | None = "corner2",
    env_kwargs: dict[str, Any] | None = None,
    device: str = "auto",
) -> dict[str, bool]:
    """
    Write a video of a trained agent.

    :param run: The agent
    :param path: The file; its ending is one of ``FORMATS``
    :param cell_size: Width and height of a cell in pixels, even
    :param n_columns: Cells in a row; None: as near to a square as possible
    :param every: Show every so many steps
    :param fps: Frames per second; None: real time, as the environment's ``render_fps`` tells it
    :param camera: One of Meta-World's cameras; None: a free camera
    :param env_kwargs: Arguments of the environment, over those of the training
    :param device: PyTorch device
    :return: Whether each task was solved
    :raises ImportError: if the package's extra ``video`` is not installed
    :raises ValueError: if the environment has several tasks and cannot be told which one to play
    """
    try:
        import imageio.v2 as imageio
    except ImportError as error:
        raise ImportError("videos need imageio and its ffmpeg plugin: pip install sb3-mtrl[video]") from error
    kwargs = {**(env_kwargs or {}), "render_mode": "rgb_array"}
    goal_list = run.goal_list_kwargs(kwargs)
    if goal_list:
        kwargs.update(goal_list, camera_name=camera, render_size=cell_size)
    env = run.make_env(kwargs)
    try:
        if get_num_tasks(env) > 1 and not is_vecenv_wrapped(env, VecTaskAssignment):
            raise ValueError(
                "the environment must have the method set_tasks(task_ids) for each cell to play a task of its own, "
                f"{run.env_id} has not"
            )
        model = run.load_model(device)
        task_names = get_task_names(env)
        n_columns = n_columns or int(np.ceil(np.sqrt(env.num_envs)))
        fps = fps or env.get_attr("metadata", indices=0)[0].get("render_fps", DEFAULT_FPS) / every
        options: dict[str, Any] = (
            {"duration": 1000 / fps, "loop": 0} if path.suffix == ".gif" else {"fps": fps, "macro_block_size": 2}
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        solved: list[int | None] = []
        writer: Any
        with imageio.get_writer(path, **options) as writer:
            for frames, solved, step in play_cells(model, env, every):
                titles = [_title(name, at, step) for name, at in zip(task_names, solved, strict=True)]
                grid = draw_grid(frames, titles, [at is not None for at in solved], cell_size, n_columns)
                writer.append_data(grid)
        return {name: at is not None for name, at in zip(task_names, solved, strict=True)}
    finally:
        env.close()


def _title(task_name: str, solved_at: int | None, step: int) -> str:
    return f"{task_name}: step {step}" if solved_at is None else f"{task_name}: solved at {solved_at}"


def main(arguments: Sequence[str] | None = None) -> None:
    """
    :param arguments: Command line, ``sys.argv`` if None
    """
    parser = argparse.ArgumentParser(
        prog="python -m sb3_mtrl.record", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_run_arguments(parser)
    parser.add_argument("--exp-id", type=int, default=0, help="experiment (default: 0, the latest)")
    parser.add_argument("-o", "--output", type=Path, help="file, .mp4 or .gif (default: beside the model)")
    parser.add_argument("--cell-size", type=int, default=240, help="pixels, even (default: %(default)s)")
    parser.add_argument("--columns", type=int, help="cells in a row (default: as near to a square as possible)")
    parser.add_argument("--every", type=int, default=4, help="show every so many steps (default: %(default)s)")
    parser.add_argument("--fps", type=float, help="frames per second (default: real time)")
    parser.add_argument("--camera", default="corner2", help="one of Meta-World's cameras (default: %(default)s)")
    args = parser.parse_args(arguments)
    for name in ("columns", "every", "fps"):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            parser.error(f"argument --{name}: must be above 0, got {getattr(args, name)}")
    if args.cell_size < 16 or args.cell_size % 2:
        parser.error(f"argument --cell-size: must be an even number of at least 16, got {args.cell_size}")
    (run,) = find_runs(parser, args, [args.exp_id])
    output = args.output or run.model_path.with_suffix(".mp4")
    if output.suffix not in FORMATS:
        parser.error(f"argument --output: must end with {' or '.join(FORMATS)}, got {output}")
    if sys.platform == "linux" and not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")
    print(f"Loading {run.model_path}")
    try:
        solved = record_run(
            run, output, args.cell_size, args.columns, args.every, args.fps, args.camera, args.env_kwargs, args.device
        )
    except (ImportError, ValueError) as error:
        parser.error(str(error))
    print(f"Solved: {', '.join(name for name, is_solved in solved.items() if is_solved) or 'none'}")
    print(f"Written: {output}")


if __name__ == "__main__":
    main()
