"""Sana-Sprint, distilled to few steps: ``SanaSprintPipeline``."""

from __future__ import annotations

import copy
import inspect

from torch import Tensor

from generators.adapters.sana import Sana
from generators.base import GeneratorError


class SanaSprint(Sana):
    """Sana with an embedded guidance scale; its trigonometric flow is mapped to a linear one by rescaling time and x.

    The pipeline puts fresh noise on every ``x0_hat``: sampler ``cps`` at noise level 1 does the same.
    """

    pipeline_class = "SanaSprintPipeline"
    accepts = ("size", "text_length", "embedded_guidance")
    guidance_default = 4.5

    def guidance_input(self, t: Tensor) -> Tensor | None:
        told = super().guidance_input(t)
        return None if told is None else told * self.pipeline.transformer.config.guidance_embeds_scale

    def timestep(self, t: Tensor) -> Tensor:
        return t

    def times(self, steps: int) -> Tensor:
        """The pipeline's angles from max_timesteps to 0, with its intermediate one in two steps, as times."""
        if steps < 1:
            raise GeneratorError(f"{steps} sampling steps: at least 1 is needed")
        defaults = inspect.signature(self.pipeline.__call__).parameters
        between = defaults["intermediate_timesteps"].default if steps == 2 else None
        scheduler = copy.deepcopy(self.pipeline.scheduler)
        scheduler.set_timesteps(steps, max_timesteps=defaults["max_timesteps"].default, intermediate_timesteps=between)
        sine, cosine = scheduler.timesteps.sin(), scheduler.timesteps.cos()
        return (sine / (sine + cosine)).clamp(max=1)  # the first angle is a little beyond a right one
