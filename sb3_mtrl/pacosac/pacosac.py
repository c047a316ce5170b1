import math
from typing import Any, ClassVar, TypeVar

import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule

from sb3_mtrl.common.callbacks import SIMPLEX_DRAWS, LossMaskoutCallback, WResetCallback
from sb3_mtrl.common.torch_layers import W_INITS
from sb3_mtrl.common.utils import check_choice, check_flag, check_integer, check_number
from sb3_mtrl.mtsac.checks import check_policy
from sb3_mtrl.mtsac.mtsac import MTSAC
from sb3_mtrl.pacosac.policies import STRUCTURES, CnnPolicy, MlpPolicy, MultiInputPolicy, PaCoActor, PaCoPolicy

SelfPaCoSAC = TypeVar("SelfPaCoSAC", bound="PaCoSAC")


class PaCoSAC(MTSAC):
    """
    Parameter-Compositional Multi-Task Reinforcement Learning (PaCo) with SAC.

    Paper: https://arxiv.org/abs/2210.11653 (NeurIPS 2022). The parameters of task t are ``theta_t = sum_k w_tk phi_k``: K
    parameter sets phi_k that all tasks share, and one compositional vector w_t per task. A task whose loss explodes is masked
    out of the update (loss maskout) and its w_t restarts as a random mixture of the others' (w-reset).

    Where the paper and its authors' code leave room, the defaults are the code's: one joint update of actor, critics, W and
    temperatures, W shared with the target critics (which use the current one), all parameter sets equal at the start, warm-up
    with the initial policy, temperatures within [e^-10, 1]. The target entropy "auto" is ``n_actions * ln 0.2``.

    The parameters not listed are those of ``MTSAC``.

    :param policy: The policy model to use (MlpPolicy, CnnPolicy, ...)
    :param env: The environment to learn from (if registered in Gym, can be str)
    :param n_param_sets: Number of parameter sets K
    :param w_init: Start of W: "normal" (the authors' code), "onehot" (K = T, table 3 of the paper), "simplex" (Dirichlet(1,
        ..., 1) rows) or "uniform" (rows of U(0, 1) divided by their sum)
    :param structure: "ac_shared": actor and critics are compositional and share W; "actor_only": the critics are ordinary;
        "output_only": only the actor's output layer is compositional
    :param w_learning_rate: Learning rate of W; None: ``learning_rate`` and its schedule
    :param maskout_threshold: Loss above which a task is masked out of an update (with V2 rewards of 0 to 10 per step; it
        scales with the square of the reward); None: never, and then no w-reset either
    :param w_reset: Whether the vector of a masked task is reset
    :param w_reset_simplex: How the mixture is drawn: "dirichlet", uniform on the simplex as in the paper, or "l1_uniform",
        uniform numbers divided by their sum as in the authors' code
    :param on_nonfinite: As in ``MTSAC``; "mask", which belongs to loss maskout, by default
    :param w_reset_moments: Also forget the optimiser's moments of a vector that is reset (the authors' code does not)
    :raises ValueError: for a bad argument, or an environment that does not fit it
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }
    policy: PaCoPolicy
    actor: PaCoActor
    _ent_coef_adam_eps: ClassVar[float] = 1e-7

    def __init__(
        self,
        policy: str | type[PaCoPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 3e-4,
        buffer_size: int = 1_000_000,  # 1e6
        learning_starts: int = 100,
        batch_size: int | None = None,
        tau: float = 0.005,
        gamma: float = 0.99,
        train_freq: int | tuple[int, str] = 1,
        gradient_steps: int = 1,
        action_noise: ActionNoise | None = None,
        replay_buffer_class: type[ReplayBuffer] | None = None,
        replay_buffer_kwargs: dict[str, Any] | None = None,
        optimize_memory_usage: bool = False,
        n_steps: int = 1,
        ent_coef: str | float = "auto",
        target_update_interval: int = 1,
        target_entropy: str | float = "auto",
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        use_sde_at_warmup: bool = False,
        num_tasks: int | None = None,
        optimizer_order: str = "joint",
        warmup_actions: str = "policy",
        ent_coef_learning_rate: float | None = 1e-4,
        min_ent_coef: float | None = math.exp(-10),
        max_ent_coef: float | None = 1.0,
        max_grad_norm: float | None = None,
        n_param_sets: int = 5,
        w_init: str = "normal",
        structure: str = "ac_shared",
        w_learning_rate: float | None = None,
        maskout_threshold: float | None = 3000.0,
        w_reset: bool = True,
        w_reset_simplex: str = "dirichlet",
        w_reset_moments: bool = False,
        cpu_tuning: bool = True,
        amp: str = "none",
        overlap: bool = False,
        on_nonfinite: str = "mask",
        replay_device: str = "cpu",
        cuda_graph: bool = False,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
    ):
        check_policy(policy, PaCoPolicy, self.policy_aliases)
        n_param_sets = check_integer("n_param_sets", n_param_sets, 1)
        check_choice("w_init", w_init, W_INITS)
        check_choice("structure", structure, STRUCTURES)
        w_learning_rate = check_number("w_learning_rate", w_learning_rate, 0, or_none=True)
        maskout_threshold = check_number("maskout_threshold", maskout_threshold, 0, or_none=True, finite=False)
        check_flag("w_reset", w_reset)
        check_choice("w_reset_simplex", w_reset_simplex, SIMPLEX_DRAWS)
        check_flag("w_reset_moments", w_reset_moments)
        super().__init__(
            policy,
            env,
            learning_rate,
            buffer_size,
            learning_starts,
            batch_size,
            tau,
            gamma,
            train_freq,
            gradient_steps,
            action_noise,
            replay_buffer_class,
            replay_buffer_kwargs,
            optimize_memory_usage,
            n_steps,
            ent_coef,
            target_update_interval,
            target_entropy,
            use_sde,
            sde_sample_freq,
            use_sde_at_warmup,
            num_tasks,
            optimizer_order=optimizer_order,
            warmup_actions=warmup_actions,
            ent_coef_learning_rate=ent_coef_learning_rate,
            min_ent_coef=min_ent_coef,
            max_ent_coef=max_ent_coef,
            max_grad_norm=max_grad_norm,
            cpu_tuning=cpu_tuning,
            amp=amp,
            overlap=overlap,
            on_nonfinite=on_nonfinite,
            replay_device=replay_device,
            cuda_graph=cuda_graph,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            seed=seed,
            device=device,
            _init_setup_model=False,
        )
        self.n_param_sets = n_param_sets
        self.w_init = w_init
        self.structure = structure
        self.w_learning_rate = w_learning_rate
        self.maskout_threshold = maskout_threshold
        self.w_reset = w_reset
        self.w_reset_simplex = w_reset_simplex
        self.w_reset_moments = w_reset_moments

        if _init_setup_model:
            self._setup_model()

    def _setup_model(self) -> None:
        guards: list[LossMaskoutCallback | WResetCallback] = []
        if self.maskout_threshold is not None:
            # In sequential order the actor loss is not known before the critic step
            guards.append(
                LossMaskoutCallback(self.maskout_threshold, "total" if self.optimizer_order == "joint" else "critic")
            )
        if self.maskout_threshold is not None and self.w_reset:
            guards.append(WResetCallback(self.w_reset_simplex, self.w_reset_moments))
        if self.target_entropy == "auto":
            self.target_entropy = get_action_dim(self.action_space) * math.log(0.2)
        super()._setup_model()
        for guard in guards:
            guard.init_callback(self)

    def _policy_settings(self) -> dict[str, Any]:
        settings = super()._policy_settings()
        del settings["n_heads"]
        settings.update(
            n_param_sets=self.n_param_sets,
            w_init=self.w_init,
            structure=self.structure,
            w_learning_rate=self.w_learning_rate,
        )
        return settings

    @property
    def w_reset_callback(self) -> WResetCallback | None:
        """The w-reset that watches the updates, None without."""
        return next((guard for guard in self.update_guards if isinstance(guard, WResetCallback)), None)

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        state_dicts, variables = super()._get_torch_save_params()
        if self.w_reset_callback is not None:
            variables = [*variables, "w_reset_callback.resets", "w_reset_callback.generator_state"]
        return state_dicts, variables

    def learn(
        self: SelfPaCoSAC,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 4,
        tb_log_name: str = "PaCoSAC",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfPaCoSAC:
        return super().learn(
            total_timesteps=total_timesteps,
            callback=callback,
            log_interval=log_interval,
            tb_log_name=tb_log_name,
            reset_num_timesteps=reset_num_timesteps,
            progress_bar=progress_bar,
        )
