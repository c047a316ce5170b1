import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule

from sb3_mtrl.common.utils import split_observation
from sb3_mtrl.mtsac.policies import MTSACActor, MTSACCritic, MTSACPolicy
from sb3_mtrl.pacosac.policies import PaCoPolicy

# Last layer of a new action-correction policy, relative to SB3's: it starts near a zero edit, apart from its noise
EDITOR_OUTPUT_SCALE = 0.01


def edit_actions(proposals: th.Tensor, edits: th.Tensor) -> th.Tensor:
    """
    ``a = clip(a_hat + 2 da)``: every action can be reached from every proposal, and a zero edit changes nothing.

    :param proposals: Actions that the shared policy proposes, a_hat in [-1, 1], ``(B, n_actions)``
    :param edits: Outputs of the action-correction policy, da in [-1, 1], ``(B, n_actions)``
    :return: The actions to execute ``(B, n_actions)``; no gradient where they are clipped
    """
    return (proposals + 2 * edits).clamp(-1, 1)


def attach_proposals(obs: th.Tensor, proposals: th.Tensor, num_tasks: int) -> th.Tensor:
    """
    What the action-correction policy observes: an ordinary multi-task observation that holds the proposal, too.

    :param obs: Observations ``(B, n + T)``, or ``(G, b, n + T)`` in groups (``B = G b``); ``(B, n)`` with one task
    :param proposals: a_hat ``(B, n_actions)``
    :param num_tasks: Number of tasks T
    :return: ``(..., n + n_actions + T)``, the one-hot still at the end; ``(B, n + n_actions)`` with one task
    """
    proposals = proposals.view(*obs.shape[:-1], -1)
    if num_tasks == 1:
        return th.cat([obs, proposals], dim=-1)
    base, one_hot = split_observation(obs, num_tasks)
    return th.cat([base, proposals, one_hot], dim=-1)


class TSACPolicy(MTSACPolicy):
    """
    Policy of TSAC: a shared policy (``actor``) that proposes an action, an action-correction policy (``editor``) that sees
    the proposal and edits it, and twin critics for each of the two rewards, ``critic`` (dense) and ``sparse_critic``.

    After the published description of https://arxiv.org/abs/2404.05950, see ``TSACSAC`` for what it leaves open. The
    parameters are those of ``MTSACPolicy``; they count for all networks.

    :raises ValueError: for a bad argument
    """

    editor: MTSACActor
    sparse_critic: MTSACCritic
    sparse_critic_target: MTSACCritic

    def _build(self, lr_schedule: Schedule) -> None:
        if self.actor_kwargs["use_sde"]:
            raise ValueError("use_sde must be False, got True (the standard deviation of TSAC's edits depends on the state)")
        super()._build(lr_schedule)
        self.editor = self.make_editor()
        self.editor.optimizer = self.optimizer_class(self.editor.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)  # type: ignore[call-arg]
        self.sparse_critic = self.make_sparse_critic()
        self.sparse_critic_target = self.make_sparse_critic()
        self.sparse_critic_target.load_state_dict(self.sparse_critic.state_dict())
        self.sparse_critic.optimizer = self.optimizer_class(
            self.sparse_critic.parameters(),
            lr=lr_schedule(1),  # type: ignore[call-arg]
            **self.optimizer_kwargs,
        )
        self.sparse_critic_target.set_training_mode(False)

    def make_editor(self) -> MTSACActor:
        """
        :return: A new action-correction policy, on observations as ``attach_proposals`` makes them
        """
        kwargs = self._network_kwargs(
            {**self.actor_kwargs, "observation_space": self._editor_observation_space()}, None, self.observe_task
        )
        editor = MTSACActor(**kwargs, n_heads=self.n_heads, observe_task=self.observe_task, log_std_bounds=self.log_std_bounds)
        with th.no_grad():
            for head in (editor.mu, editor.log_std):
                for parameter in head.parameters():  # type: ignore[union-attr]
                    parameter.mul_(EDITOR_OUTPUT_SCALE)
        return editor.to(self.device)

    def _editor_observation_space(self) -> spaces.Box:
        space = self.observation_space
        if not isinstance(space, spaces.Box) or len(space.shape) != 1:
            raise ValueError(f"observation_space must be a Box of vectors, got {space}")
        n_base = space.shape[0] - (self.num_tasks if self.num_tasks > 1 else 0)
        ones = np.ones(get_action_dim(self.action_space), dtype=np.float32)
        low, high = space.low.astype(np.float32), space.high.astype(np.float32)
        return spaces.Box(np.insert(low, n_base, -ones), np.insert(high, n_base, ones), dtype=np.float32)

    def make_sparse_critic(self) -> MTSACCritic:
        """
        :return: New critics for the sparse reward: ordinary ones, with a features extractor of their own
        """
        kwargs = self._network_kwargs({**self.critic_kwargs, "share_features_extractor": False}, None, self.observe_task)
        return MTSACCritic(**kwargs, n_heads=self.n_heads, observe_task=self.observe_task).to(self.device)

    def sample_edits(self, obs: th.Tensor, proposals: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        :param obs: Observations, see ``attach_proposals``
        :param proposals: a_hat ``(B, n_actions)``
        :return: Edits da ~ pi_psi(. | o, a_hat) ``(B, n_actions)`` and their log probabilities ``(B,)``
        """
        return self.editor.action_log_prob(attach_proposals(obs, proposals, self.num_tasks))

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        assert isinstance(observation, th.Tensor)
        proposals = self.actor(observation, deterministic)
        edits = self.editor(attach_proposals(observation, proposals, self.num_tasks), deterministic)
        return edit_actions(proposals, edits)

    def set_training_mode(self, mode: bool) -> None:
        """
        :param mode: Whether the networks are about to be trained; target networks never are
        """
        super().set_training_mode(mode)
        self.editor.set_training_mode(mode)
        self.sparse_critic.set_training_mode(mode)


class PaCoTSACPolicy(TSACPolicy, PaCoPolicy):
    """
    Policy of TSAC on PaCo's body: the shared policy and the dense critics are PaCo's, composed by one W (``structure`` says
    which of them). The action-correction policy and the sparse critics are ordinary networks that observe the one-hot.

    The parameters are those of ``PaCoPolicy``.

    :raises ValueError: for a bad argument
    """


MlpPolicy = TSACPolicy

# base -> policy
POLICIES: dict[str, type[TSACPolicy]] = {"mtsac": TSACPolicy, "paco": PaCoTSACPolicy}
