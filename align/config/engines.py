"""Settings of engines that generate the samples of a rollout elsewhere. No torch."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from align.config import registry
from align.config.sampling import Sampler
from alignflow.settings import Problems, Settings
from alignflow.strict import Address, Seconds, Word
from alignflow.words import listing
from rewards.serving.crew import Workers


class PoolEngine(Workers):
    """Copies of the generator in Ray actors, on this machine or across a cluster.

    Workers on other machines need the same packages and the files that the config names.
    """

    returns_steps: ClassVar[bool] = True
    """Whether it returns the latents before and after each stochastic step."""
    kind: Literal["pool"] = Field("pool", description="copies of the generator in Ray actors")

    def problems(self, sampler: Sampler, same_noise: bool, generator: str) -> Problems:
        """Settings of the run that this engine cannot follow: none, it runs the same sampler."""
        return []


class HttpEngine(Settings):
    """Servers of one model over HTTP, and the folder through which they get the policy's LoRA."""

    samplers: ClassVar[dict[str, str]]
    """Kind of our sampler -> its name there."""
    url: Address | Annotated[list[Address], Field(min_length=1)] = Field(
        description="address of the server, such as http://127.0.0.1:30000, or a list of servers of the same model; "
        "put secrets in token_env"
    )
    token_env: str | None = Field(None, description="environment variable with the bearer token; null = no token")
    folder: Word = Field(description="folder that this machine writes the policy's LoRA into and the servers read")
    folder_there: Word | None = Field(
        None, description="path of that folder on the servers, where they mount it elsewhere; null = the same path"
    )
    parallel: int = Field(1, ge=1, le=256, description="concurrent requests per server")
    timeout: Seconds = Field(600.0, description="seconds per sample or update of the weights, including the reply")
    start_timeout: Seconds = Field(
        5.0, description="seconds for a server to describe its API, at check and at the start of a run"
    )
    retries: int = Field(5, ge=0, le=1000, description="further attempts for samples that got no usable reply")
    backoff: float = Field(
        1.0, ge=0, le=3600, description="seconds before the second attempt, doubled after each, at most 30"
    )
    request: dict[str, Any] = Field(
        {}, description="fields that are added to every request, or replace those of the config: {true_cfg_scale: 4}"
    )

    @property
    def urls(self) -> list[str]:
        """The servers."""
        return [self.url] if isinstance(self.url, str) else self.url

    def problems(self, sampler: Sampler, same_noise: bool, generator: str) -> Problems:
        """Settings of the run that this engine cannot follow."""
        found: Problems = []
        if sampler.kind not in self.samplers:
            said = f"{self.kind} has no sampler {sampler.kind}"  # type: ignore[attr-defined]
            found.append(("rollout.sampler.kind", f"{said}: use one of {listing(self.samplers)}"))
        if same_noise:
            said = "the engine derives the initial noise and that of the steps from one seed"
            found.append(("rollout.same_noise", f"{said}, so samples cannot share the initial noise alone: use false"))
        return found


class SglangEngine(HttpEngine):
    """SGLang-diffusion servers with the post-training API, ``sglang serve --model-path ...``.

    They return latents, images or videos, and the latents around the sampler's steps. Their LoRA is merged into the
    weights, which rounds it to the precision of the weights.
    """

    returns_steps: ClassVar[bool] = True
    samplers: ClassVar = {"ode": "ode", "flow_sde": "sde", "cps": "cps"}
    kind: Literal["sglang"] = Field("sglang", description="SGLang-diffusion servers")
    checksum: bool = Field(
        True,
        description="compare the SHA-256 of a server's weights before and after each rollout, seconds for a large "
        "network; false = only the name of the LoRA that is merged, after every sample",
    )


class VllmOmniEngine(HttpEngine):
    """vLLM-Omni servers, ``vllm serve MODEL --omni``, which return images alone.

    An image becomes x_0 by the VAE's encoder here: the latents of the sampler are lost, and with them what 8 bits and
    the VAE cannot carry. The LoRA is named in every request.
    """

    returns_steps: ClassVar[bool] = False
    samplers: ClassVar = {"ode": "ode"}
    kind: Literal["vllm_omni"] = Field("vllm_omni", description="vLLM-Omni servers, which return images alone")

    def problems(self, sampler: Sampler, same_noise: bool, generator: str) -> Problems:
        """Settings of the run that this engine cannot follow."""
        found = super().problems(sampler, same_noise, generator)
        if registry.makes_videos(generator):
            said = f"{generator} makes videos, and {self.kind} is used for images alone"
            found.append(("rollout.engine.kind", f"{said}: use pool or sglang"))
        if sampler.steps > MOST_STEPS:
            found.append(("rollout.sampler.steps", f"is at most {MOST_STEPS} with {self.kind}"))
        if not 0 <= sampler.guidance <= MOST_GUIDANCE:
            found.append(("rollout.sampler.guidance", f"is 0 to {MOST_GUIDANCE} with {self.kind}"))
        return found


MOST_STEPS, MOST_GUIDANCE = 200, 20
"""Bounds of vLLM-Omni's requests."""
ENGINES = {"pool": PoolEngine, "sglang": SglangEngine, "vllm_omni": VllmOmniEngine}
"""Kind -> settings."""
