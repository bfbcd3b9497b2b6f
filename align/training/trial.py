"""A first call of rewards that run the user's code, on grey media, before anything is sampled or evaluated."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from align.data.inputs import read_inputs
from align.data.prompts import Prompt
from rewards.base import Reward, RewardSettings
from rewards.checks import exceptions_raised
from rewards.scopes import runs_users_code

if TYPE_CHECKING:
    from align.training.held_out import HeldOut
    from align.training.state import RunState


def try_rewards(state: RunState, held: HeldOut) -> None:
    """Score grey media once by every reward whose settings name the user's code; all processes hear of its errors.

    Left out are rewards that run elsewhere (a pool, a server), a cache, those that learn while the policy does, and
    those that read the prompts' images while unreadable ones are still to be skipped.

    Raises:
        RewardError: the user's code raises an exception or does not return one number per sample; it names the line.
    """
    config = state.config
    online = config.rollout.kind == "online"
    reward, prompts = (state.reward, state.source.prompts) if online else (held.rewards.get("reward"), held.prompts)
    asked: list[tuple[RewardSettings | None, Reward | None, list[Prompt]]] = [(config.reward, reward, prompts)]
    asked += [(one, held.rewards.get(name), held.prompts) for name, one in config.evaluate.rewards.items()]
    tried: set[int] = set()
    for settings, one, texts in asked:
        if settings is None or one is None or one.refresh is not None or not texts or id(one) in tried:
            continue
        tried.add(id(one))
        unread = config.prompts.bad == "skip" and one.wants
        if runs_users_code(settings) and not unread:
            state.processes.settled(partial(_try, state, one, texts[0]))


def _try(state: RunState, reward: Reward, prompt: Prompt) -> None:
    """One call of a reward, with as many samples as it compares, which moves no random numbers of the run."""
    rollout, generator, device = state.config.rollout, state.generator, state.accelerator.device
    count = rollout.group if reward.scope != "sample" and rollout.kind == "online" else 1
    frames: tuple[int, ...] = (generator.frames,) if hasattr(generator, "frames") else ()
    grey = torch.full((count, *frames, 3, *generator.size), 0.5, device=device)
    inputs: dict[str, Any] = read_inputs([prompt] * count, reward.wants, generator.size)
    cards = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(cards), torch.no_grad(), exceptions_raised():
        reward(grey, [prompt.text] * count, torch.zeros(count, dtype=torch.long), inputs)
