"""HyperNoise: a LoRA learns ReNO's noise optimisation once for many noises and prompts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from align.data.files import new_folder
from align.runs.lock import locked
from align.runs.owned import NOISE, check_out, mark
from align.search.base import Method
from align.search.budget import Cost
from align.search.rows import slices
from alignflow.kinds import problem_at
from alignflow.lazy import lazy

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from align.policy import lora, switching
    from align.search.task import Task
else:
    torch, lora, switching = lazy("torch"), lazy("align.policy.lora"), lazy("align.policy.switching")

NAME = "noise"


class HyperNoise(Method):
    """HyperNoise: a LoRA of the generator, trained with the reward's gradient, shifts the noise (arXiv 2508.09968)

    The noise ``eps`` becomes ``eps + v_lora(eps, 1) - v(eps, 1)``, at first ``eps`` itself; the loss is minus the
    reward plus ``regularise`` times the shift's mean square, its divergence from the normal law. All prompts that are
    searched together teach one LoRA, so that here, unlike elsewhere, a prompt's result depends on its batch.
    """

    gradients = True
    deterministic = True
    amortised = True

    kind: Literal["hyper_noise"] = Field("hyper_noise", description="learned noise shift")
    noises: int = Field(4, ge=1, description="noises per prompt and optimizer step")
    lr: float = Field(2e-5, ge=0, description="AdamW learning rate; 0 = no training, only use the LoRA in folder")
    rank: int = Field(128, ge=1, description="LoRA rank")
    alpha: float = Field(256.0, gt=0, description="LoRA alpha")
    strength: float = Field(1.0, gt=0, description="strength of the reward in the loss")
    regularise: float = Field(0.5, ge=0, description="weight of the shift's mean square in the loss; 0 = none")
    max_norm: float = Field(1.0, gt=0, description="maximum gradient norm over all weights")
    folder: str | None = Field(
        None,
        description="folder of the LoRA: loaded if it exists, saved after every batch of prompts; null = not saved",
    )

    @model_validator(mode="after")
    def _has_something_to_use(self) -> Self:
        if not self.lr and self.folder is None:
            raise problem_at("folder", "name the one that holds the LoRA: with lr 0 none is trained")
        return self

    def search(self, task: Task) -> None:
        """Update after update, each on new noises; without a learning rate samples of shifted noises."""
        shifted = task.cost.sample + 2 * task.cost.velocity
        learned = task.cost.reward_grad_through_ode + 2 * task.cost.velocity + Cost(backward_calls=task.cost.calls)
        shifter = Shifter(task, self)
        optimizer = torch.optim.AdamW(shifter.parameters, lr=self.lr, weight_decay=0.0)
        try:
            for _, count in task.rounds(learned if self.lr else shifted, self.noises):
                if not self.lr:
                    shifter.sample(count)
                    continue
                optimizer.zero_grad()
                shifter.learn(count)
                torch.nn.utils.clip_grad_norm_(shifter.parameters, self.max_norm)
                optimizer.step()
        finally:
            shifter.close()


def holds_lora(folder: Path) -> bool:
    """Whether there is anything in the folder to continue from."""
    return folder.is_file() or (folder.is_dir() and any(folder.iterdir()))


class Shifter:
    """The generator's network with a LoRA that shifts noise and is switched off everywhere else.

    Raises:
        LoraError: the LoRA in the folder is damaged or of another model, or there is none and none is trained.
        RunFolderError: one is to be learned, and the folder holds what no such search wrote.
    """

    def __init__(self, task: Task, settings: HyperNoise) -> None:
        self.task, self.settings, folder = task, settings, settings.folder
        if folder is not None and settings.lr:
            check_out(Path(folder), NOISE, overwrite=True)
        if folder is not None and (holds_lora(Path(folder)) or not settings.lr):
            made = lora.continue_lora(task.generator, folder, NAME)
        else:
            made = lora.add_lora(task.generator, settings.rank, settings.alpha, seed=task.seed, name=NAME)
        self.parameters = [value for _, value in made]
        self.learned = False
        self.silent = [torch.zeros_like(value) for value in self.parameters]

    def shift(self, x: Tensor, row: Tensor) -> Tensor:
        """``[n, ...]`` what is added to noise ``x``, with graph to the parameters where gradients are on."""
        task, t = self.task, self.task.times[0].expand(len(x))

        def velocity() -> Tensor:
            return task.generator.velocity(x, t, task.cond[row], task.sampler.guidance)

        with task.meter.measured("network_calls", row, 2 * task.cost.calls):
            with torch.no_grad(), self.off():
                plain = velocity()
            return velocity() - plain

    def sample(self, count: int) -> None:
        """``count`` samples per prompt from shifted noise."""
        task = self.task
        now = task.begin(count)
        with torch.no_grad():
            chunks = [now[some] for some in slices(len(now), task.chunk)]
            moved = now.moved(torch.cat([chunk.x + self.shift(chunk.x, chunk.row) for chunk in chunks]))
        with self.off():
            samples = task.sample(moved, "sample")
        task.score(samples, alone=True)

    def learn(self, count: int) -> None:
        """Gradient of the loss over ``count`` new noises per prompt; their samples become candidates."""
        task, settings = self.task, self.settings
        now = task.begin(count)
        for chunk in (now[some] for some in slices(len(now), task.decode_chunk)):
            with torch.enable_grad():
                shift = self.shift(chunk.x, chunk.row)
                with self.off():
                    grad = task.reward_grad_through_ode(chunk.moved(chunk.x + shift.detach()))
                gain = (grad * shift).flatten(1).sum(1)
                loss = settings.regularise * shift.square().flatten(1).mean(1) - settings.strength * gain
                with task.meter.measured("backward_calls", chunk.row, task.cost.calls):
                    (loss.sum() / len(now)).backward()
        self.learned = True

    @contextmanager
    def off(self) -> Iterator[None]:
        """Inside, the generator is what it was."""
        kept = [value.data for value in self.parameters]
        self._put(self.silent)
        try:
            yield
        finally:
            self._put(kept)

    def _put(self, data: list[Tensor]) -> None:
        for value, one in zip(self.parameters, data, strict=True):
            value.data = one

    def close(self) -> None:
        """Write what was learned, and leave the generator as it was."""
        if self.learned and self.settings.folder is not None:
            folder = Path(self.settings.folder)
            with locked(folder), new_folder(folder, replaces=True) as staging:
                mark(staging, NOISE)
                lora.save_lora(self.task.generator, staging, NAME)
        switching.drop_lora(self.task.generator, NAME)
