"""Everything that one training run consists of, built from its config."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from accelerate.utils import set_seed

from align.config.needs import followed
from align.data.files import new_folder
from align.policy.build import add_trained, build_generator, build_rewards, build_roles, contexts, sampling_kinds
from align.policy.written import writer
from align.rollout.bench import Bench
from align.rollout.schedule import Drawing
from align.rollout.scoring import check_gradient
from align.rollout.sources import OnlineSource, StoredSource
from align.runs.processes import Processes
from align.runs.run_folder import RunFolder, flatten
from align.runs.timing import Phases
from align.training.learner import build_learners
from align.training.learning import Learning
from align.training.missing import Missing
from align.training.sharding import spread
from alignflow.errors import TrainingError
from generators.compiled import compile_networks
from rewards.base import wanted
from rewards.scopes import known_scope

if TYPE_CHECKING:
    from align.config.settings import Config


class RunState:
    """Networks, learners, reward, prompts and counters of one run, and the files it writes.

    Attributes:
        role: the role that is evaluated and exported.
        seconds: time of the steps so far, over all parts of a resumed run.
        calls_before: network calls of all processes in earlier parts.
        threads_before: CPU threads of the part before, if there was one.

    Raises:
        AlignflowError: model, prompts, reward and recipe cannot be built, or do not go together.
    """

    def __init__(self, config: Config, run: RunFolder, accelerator: Accelerator) -> None:
        self.config, self.run, self.accelerator = config, run, accelerator
        self.recipe = config.recipe
        set_seed(config.seed)
        self.generator = build_generator(
            config.generator, config.memory, accelerator.device,
            training=True, optimizer=config.train.optimizer, kinds=sampling_kinds(config),
        )  # fmt: skip
        add_trained(config, self.generator)
        options = config.train
        if options.gradient_checkpointing:
            for network in self.generator.backbones().values():
                network.enable_gradient_checkpointing()  # type: ignore[operator]
        compile_networks(self.generator.backbones().values(), config.memory.compile)
        self.processes = Processes(accelerator, config.parallel.context)
        self.share = self.processes.share
        spread(config, self.generator, self.processes)
        # not wrapped for several processes: their gradients are added up by hand, once an update, or by the shards
        where = False if config.memory.swap_blocks else None  # swapped blocks stay on the CPU
        self.network = accelerator.prepare_model(self.generator.backbone, where, evaluation_mode=True)
        self.generator.network = self.network
        self.learners = build_learners(config, build_roles(config, self.generator), self.processes)
        self.roles = self.learners["policy"].roles
        self.reward = build_rewards(
            {"reward": config.reward}, accelerator.device, config.memory, learning="reward", followed=followed(config)
        ).get("reward")
        self.refreshed = self.reward.refresh if self.reward else None
        self.samples_in_loss = "reward_gradient" in self.recipe.needs
        self._check_reward()
        self.bench = Bench(
            self.generator, {name: one.roles for name, one in self.learners.items()}, accelerator.autocast, self.reward,
            contexts(config, self.generator), self.processes.agreed,
        )  # fmt: skip
        self.learning = Learning(config, self.learners, self.bench, self.processes)
        online = config.rollout.kind == "online"
        scored = wanted({"reward": self.reward}) if online and self.reward else ()
        self.source = (OnlineSource if online else StoredSource)(
            config, self.generator, self.share, self.recipe.needs, tuple(dict.fromkeys((*scored, *self.recipe.wants())))
        )
        self.missing = Missing(self.reward.name if self.reward else "", options.unscored)
        self.phases = Phases()
        self.drawing = Drawing(config, self.source, self.reward, self.bench, self.phases, self.processes)
        self.seconds, self.calls_before = 0.0, 0
        self.threads_before: int | None = None
        self.role = config.evaluate.role if config.train.ema else "policy"

    def _check_reward(self) -> None:
        """Raise RewardError or TrainingError if recipe or rollout cannot use the built reward."""
        if self.samples_in_loss and self.reward is not None:
            assert self.config.reward is not None
            check_gradient(self.recipe.kind, self.reward, known_scope(self.config.reward))
        if self.refreshed is not None and "ahead" in self.roles:
            raise TrainingError(
                "rollout.overlap: 'next' scores a rollout while the reward is trained on the one before it; use "
                "'chunks'"
            )

    def calls(self) -> int:
        """Network calls of all processes since the run began."""
        return self.calls_before + round(self.processes.sums({"calls": self.generator.network_calls})["calls"])

    def export(self, folder: Path | None) -> None:
        """Files for other programs: the evaluated role's LoRA or gate, or its whole networks.

        Where weights are sharded every process must call it; those that do not write give no folder.
        """
        from align.policy.shards import bare

        with self.roles.use(self.role):
            if self.config.policy.kind != "full":
                write = writer(self.config, self.generator)
                if folder is not None:
                    write(folder)
                return
            for name, network in self.generator.backbones().items():
                found = bare(network)
                if folder is not None:
                    with new_folder(folder / name, replaces=True) as staging:
                        found.save_pretrained(staging)  # type: ignore[operator]

    def log(self, row: dict[str, Any]) -> None:
        """Write a row to ``metrics.jsonl`` and to the trackers."""
        self.run.log(row)
        if self.config.trackers:
            numbers = {key: value for key, value in flatten(row).items() if isinstance(value, int | float)}
            self.accelerator.log({f"{row['event']}/{key}": value for key, value in numbers.items()}, step=row["step"])
