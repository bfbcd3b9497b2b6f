"""The engine ``vllm_omni``: vLLM-Omni servers, one image a request.

Protocol as read in vllm-project/vllm-omni at these commits: ``docs/serving/image_generation_api.md`` and
``vllm_omni/entrypoints/openai/protocol/images.py`` (00a3619b), ``vllm_omni/diffusion/lora/manager.py`` (09d1b31e)::

    POST /v1/images/generations   JSON -> {"data": [{"b64_json": PNG}]}; lora: {name, path, scale} holds for the request

``/v1/images/generations`` returns no latents. ``/rollout/generate`` of later commits (528171449) returns those of the
trajectory as handles to shared memory of the server's machine, which a client elsewhere cannot read; it is not used.
x_0 is therefore what the VAE's encoder makes of the 8-bit image, as for stored samples. It differs from the sampler's
latents by the rounding and by what the VAE loses, and there are no steps for a likelihood ratio.

A reply does not name its weights. The request names a LoRA that is read from a folder with the policy's digest as its
name, so that an older policy is not used by mistake. A server that ignores the LoRA would not say so: its first image
with a LoRA that changes something is compared with the image without. Later versions take LoRAs only by names from
their start (``--dynamic-lora``). They are refused as another API.
"""

from __future__ import annotations

import base64
import binascii
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from align.data.latents import Latents
from align.data.media import read_media, to_bytes
from align.rollout.engine import Order, RejectedError, Reply
from align.rollout.lora_folder import PeftFolder
from align.rollout.on_servers import OnServers
from align.rollout.servers import SEEDS, VLLM_OMNI, Server
from alignflow.errors import DataError
from generators.base import Generator
from rewards.serving.dispatch import UnansweredError

if TYPE_CHECKING:
    from align.config.engines import VllmOmniEngine
    from align.config.settings import Config

PNG = b"\x89PNG\r\n\x1a\n"


class VllmOmni(OnServers):
    """Images by vLLM-Omni servers, and their latents by the VAE of this process."""

    def __init__(self, settings: VllmOmniEngine, config: Config, generator: Generator) -> None:
        super().__init__(settings, config, generator, PeftFolder)
        self.latents = Latents(generator, "none", Path())
        self.lock = threading.Lock()

    def draw(self, order: Order, policy: str) -> Reply:
        """One sample."""
        with self.servers.one() as server:
            media = self._image(server, order, policy)
            if self.folder.changes and not server.policy:
                self._compare(server, order, media)
                server.policy = policy
        with self.lock:  # the encoder serves one thread at a time
            latents = self.latents([media.float() / 255])
        calls = self.sampler.steps * (1 if self.sampler.guidance == 1 else 2)
        return Reply(latents.cpu(), media[None], list(order.seeds), policy, calls)

    def verify(self, policy: str) -> None:
        """Nothing to ask: every request names its weights."""

    def _compare(self, server: Server, order: Order, media: Tensor) -> None:
        """The image without the LoRA must be another one."""
        if bool((self._image(server, order, None) == media).all()):
            said = "the image is the same with the policy's LoRA as without: it is ignored, or changes too little"
            raise UnansweredError(f"{server.url}: {said}", again=False)

    def _image(self, server: Server, order: Order, policy: str | None) -> Tensor:
        """uint8 ``[3, H, W]``.

        Args:
            policy: digest of the LoRA; None = without.
        """
        found = server.json("POST", VLLM_OMNI.path, self.settings.timeout, self.request(order, policy))
        try:
            rows = found["data"]
            if not isinstance(rows, list) or len(rows) != 1:
                raise ValueError("it does not hold one image")
            content = base64.b64decode(rows[0]["b64_json"], validate=True)
            if not content.startswith(PNG):
                raise ValueError("the image is not a PNG, whose pixels are exact")
            return to_bytes(read_media(content))
        except (KeyError, TypeError, ValueError, binascii.Error, DataError) as error:
            said = f"{error} is missing" if isinstance(error, KeyError) else error
            raise RejectedError("wrong", f"{server.url}: the reply is not usable: {server.readable(said)}") from None

    def request(self, order: Order, policy: str | None) -> dict[str, Any]:
        """The body of the request for the image of an order; see :meth:`_image`."""
        sampler, (height, width) = self.sampler, self.generator.size
        negative = self.generator.options.negative_prompt
        body = {
            "prompt": order.prompts[0],
            "n": 1,
            "size": f"{width}x{height}",
            "response_format": "b64_json",
            "output_format": "png",
            "num_inference_steps": sampler.steps,
            "guidance_scale": sampler.guidance,
            "seed": order.seeds[0] % SEEDS,
            "generator_device": "cpu",
        }
        body |= {"negative_prompt": negative} if negative and sampler.guidance != 1 else {}
        if policy is not None:
            [path] = self.folder.paths(policy).values()
            body["lora"] = {"name": f"alignflow-{policy[:16]}", "path": path, "scale": 1.0}
        return body | self.settings.request
