"""The engine ``sglang``: SGLang-diffusion servers, one sample a request.

Protocol as read in sgl-project/sglang, ``python/sglang/multimodal_gen/runtime``, at these commits:
``entrypoints/post_training/rollout_api.py`` 078e5e2a, ``io_struct.py`` 00e1106f, ``weights_api.py`` 0730031c and
``utils.py`` 067e8f42 (tensors as base64; a later version sends raw bytes, and both are read);
``entrypoints/openai/common_api.py`` 0730031c; ``post_training/scheduler_rl_mixin.py`` 1e7c5863 and
``rollout_denoising_mixin.py`` 0470d4fd; ``pipelines_core/lora/pipeline.py`` 013aa626::

    POST /v1/set_lora              lora_nickname, lora_path, target: reads a file and merges it, unless it is in use
    POST /v1/unmerge_lora_weights  restores the weights without a LoRA
    GET  /v1/list_loras            the path of the LoRA in use for each network
    POST /get_weights_checksum     SHA-256 of each network's weights, with what is merged into them
    POST /rollout/generate         JSON -> msgpack [{prompt, seed, generated_output, dit_trajectory, ...}, ...]

Its replies do not name the weights. The LoRA of each policy is therefore a file whose folder is named by the digest:
``list_loras`` says after each sample which one is in use, and the checksum says after each rollout that the weights
are those of its beginning. Both show a server that restarted, and another client that changed the weights.

``num_outputs_per_prompt`` would give samples of the seeds s, s + 1, ...: ours are unrelated, so it is 1.
Initial noise and noise of the steps come from one generator of the seed. They are not those that this program draws.
"""

from __future__ import annotations

import base64
import binascii
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from align.data.media import to_bytes
from align.rollout.engine import Order, RejectedError, Reply
from align.rollout.lora_folder import LoraFolder
from align.rollout.on_servers import OnServers
from align.rollout.paths import arranged
from align.rollout.rollout import OVERFLOW
from align.rollout.servers import SEEDS, SGLANG, Server
from alignflow.errors import TrainingError
from alignflow.extras import optional
from generators.base import Generator
from rewards.serving.dispatch import UnansweredError

if TYPE_CHECKING:
    from align.config.engines import SglangEngine
    from align.config.settings import Config

GRID = 2e-3
"""Largest difference of two times that are called the same; the engine computes them in its own precision."""


class Sglang(OnServers):
    """Samples by SGLang-diffusion servers; a server without the newest weights receives them first."""

    def __init__(self, settings: SglangEngine, config: Config, generator: Generator) -> None:
        self.msgpack = optional("msgpack", "rollout.engine 'sglang'", TrainingError)
        super().__init__(settings, config, generator, LoraFolder)
        self.modules = list(generator.backbones())
        self.times = generator.times(self.sampler.steps).cpu().double()

    def draw(self, order: Order, policy: str) -> Reply:
        """One sample."""
        with self.servers.one() as server:
            self._give(server, policy)
            body = self.request(order)
            kind, content = server.call("POST", SGLANG.path, self.settings.timeout, body)
            used = self._used(server)
        if used != policy:
            server.policy = ""
        return self.reply(order, server, kind, content, used)

    def verify(self, policy: str) -> None:
        """Compare the checksum of each server with that of when it took the policy."""
        for server in self.servers.all if self.settings.checksum else ():
            if server.policy != policy:
                continue
            found, server.policy = self._checksum(server), ""
            if found != server.checksum:
                server.changed = True
                raise RejectedError("stale", f"{server.url}: the weights changed while it sampled")
            server.policy = policy

    # -- weights ------------------------------------------------------------------------------------------------------

    def _give(self, server: Server, policy: str) -> None:
        """Have the server take the policy, unless it has."""
        with server.lock:
            if server.policy == policy:
                return
            paths = self.folder.paths(policy)
            body = {
                "lora_nickname": [f"alignflow-{module}" for module in paths],
                "lora_path": list(paths.values()),
                "target": list(paths),
                "strength": 1.0,
                "merge_mode": "merge",
            }
            if len(paths) == 1:
                body |= {name: body[name][0] for name in ("lora_nickname", "lora_path", "target")}  # type: ignore[index]
            if server.changed:  # the path is in use, so that setting it again would do nothing
                server.call("POST", "/v1/unmerge_lora_weights", self.settings.timeout, {"target": "all"})
                server.changed = False
            server.call("POST", "/v1/set_lora", self.settings.timeout, body)
            if self._used(server) != policy:
                raise UnansweredError(f"{server.url} accepted the policy's LoRA, but does not list it as active")
            if self.settings.checksum:
                self._compare(server)
            server.policy = policy

    def _compare(self, server: Server) -> None:
        """Note the weights with the policy; a LoRA that changes something must change them."""
        server.checksum = self._checksum(server)
        if not self.folder.changes:
            server.plain = server.checksum
        elif server.checksum == server.plain:
            said = "the policy's LoRA does not change its weights: its layers have other names, or LoRAs are disabled"
            raise UnansweredError(f"{server.url}: {said}", again=False)

    def _used(self, server: Server) -> str:
        """Digest of the policy that the server uses; empty where it is none of ours."""
        active = server.json("GET", "/v1/list_loras", self.settings.timeout).get("active")
        return self.folder.policy_of({module: _path(active, module) for module in self.modules})

    def _checksum(self, server: Server) -> str:
        body = {"module_names": self.modules}
        found = server.json("POST", "/get_weights_checksum", self.settings.timeout, body)
        sums = [found.get(module) for module in self.modules]
        if not all(isinstance(one, str) and len(one) == 64 for one in sums):
            said = server.readable(found.get("error") or f"it has no network {' and '.join(self.modules)}")
            raise UnansweredError(f"{server.url}: no checksum of its weights: {said}", again=False)
        return " ".join(map(str, sums))

    # -- samples ------------------------------------------------------------------------------------------------------

    def request(self, order: Order) -> dict[str, Any]:
        """The body of the request for the sample of an order."""
        sampler, (height, width) = self.sampler, self.generator.size
        frames, negative = getattr(self.generator, "frames", None), self.generator.options.negative_prompt
        body = {
            "prompt": order.prompts[0],
            "seed": order.seeds[0] % SEEDS,
            "generator_device": "cpu",  # the same noise on every card
            "width": width,
            "height": height,
            "num_inference_steps": sampler.steps,
            "num_outputs_per_prompt": 1,
            "guidance_scale": sampler.guidance,
            "rollout": True,
            "rollout_sde_type": self.settings.samplers[sampler.kind],
            "rollout_noise_level": sampler.noise_level or 0.0,
            "rollout_log_prob_no_const": True,  # not read; without it the engine refuses steps without noise
            "rollout_debug_mode": False,
            "rollout_return_denoising_env": False,
            "rollout_return_dit_trajectory": True,
            "rollout_sde_step_indices": list(order.steps or ()),
            "rollout_return_step_indices": self._returned(order),
            "suppress_logs": True,
        }
        body |= {} if frames is None else {"num_frames": frames}
        body |= {"negative_prompt": negative} if negative and sampler.guidance != 1 else {}
        return body | self.settings.request

    def _returned(self, order: Order) -> list[int]:
        """Indices of the latents that are asked for: those of the steps, and the last, which is the sample."""
        return sorted({*order.boundaries, self.sampler.steps})

    def reply(self, order: Order, server: Server, kind: str, content: bytes, used: str) -> Reply:
        """The sample of a reply.

        Args:
            kind: its content type.
            used: digest of the policy that made it.

        Raises:
            RejectedError: it is damaged, of another sample, or of another protocol.
        """
        try:
            row = self._row(kind, content)
            if row.get("prompt") != order.prompts[0]:
                raise ValueError("it is the sample of another prompt")
            path = row["dit_trajectory"]
            self._check_grid(path)
            indices, latents = self._returned(order), tensor(path["latents"]).float()
            if latents.shape[0] != len(indices):
                raise ValueError(f"it holds the latents of {latents.shape[0]} steps, not of {indices}")
            latents = torch.stack([arranged(one, self.generator.latent_shape()) for one in latents])
            media, lost = media_of(tensor(row["generated_output"]), getattr(self.generator, "frames", None))
        except (KeyError, TypeError, ValueError, SafetensorError, RecursionError) as error:
            said = f"{error} is missing" if isinstance(error, KeyError) else error
            raise RejectedError("wrong", f"{server.url}: the reply is not usable: {server.readable(said)}") from None
        states = latents[[indices.index(index) for index in order.boundaries]][None] if order.keep else None
        seeds = [order.seeds[0] if row.get("seed") == order.seeds[0] % SEEDS else -1]
        calls = self.sampler.steps * (1 if self.sampler.guidance == 1 else 2)
        return Reply(latents[-1:], media[None], seeds, used, calls, {0: OVERFLOW} if lost else {}, states)

    def _row(self, kind: str, content: bytes) -> dict[str, Any]:
        """The one sample of the body."""
        if not kind.startswith(SGLANG.replies):
            raise ValueError(f"it is {kind or 'of no type'} and not {SGLANG.replies}, so the server is another version")
        rows = self.msgpack.unpackb(content, raw=False)
        if not isinstance(rows, list) or len(rows) != 1 or not isinstance(rows[0], dict):
            raise ValueError("it does not hold one sample")
        return rows[0]

    def _check_grid(self, path: dict[str, Any]) -> None:
        sigmas = tensor(path["sigmas"]).double()
        if sigmas.shape != self.times.shape or bool((sigmas - self.times).abs().max() > GRID):
            theirs, ours = ([round(float(one), 3) for one in grid[:4]] for grid in (sigmas.flatten(), self.times))
            said = f"its times {theirs} ... are not the generator's {ours} ..."
            raise ValueError(f"{said}: the server has another shift, or other steps")


def _path(active: Any, module: str) -> Any:
    """Path of the LoRA in use for a network, as ``/v1/list_loras`` says it."""
    rows = active.get(module) if isinstance(active, dict) else None
    return rows[0].get("path") if isinstance(rows, list) and len(rows) == 1 and isinstance(rows[0], dict) else None


def tensor(value: Any) -> Tensor:
    """A tensor of a reply: safetensors bytes, or base64 of them, beside the shape and dtype that they must have.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(value, dict) or value.get("__tensor__") is not True:
        raise ValueError("a tensor is missing")
    data = value.get("data")
    try:
        raw = base64.b64decode(data, validate=True) if isinstance(data, str) else data
    except binascii.Error:
        raise ValueError("a tensor is damaged") from None
    if not isinstance(raw, bytes):
        raise ValueError("a tensor has no data")
    found = load(raw)["t"]
    if [*found.shape] != value.get("shape") or str(found.dtype) != value.get("dtype"):
        said = f"a tensor is {found.dtype} {[*found.shape]}"
        raise ValueError(f"{said} and is said to be {value.get('dtype')} {value.get('shape')}")
    return found


def media_of(value: Tensor, frames: int | None) -> tuple[Tensor, bool]:
    """An image or video in any order of the engine's pipelines -> uint8, and whether it holds NaN or infinity.

    Args:
        value: ``[3, H, W]``, ``[H, W, 3]``, ``[3, F, H, W]`` or ``[F, H, W, 3]``, uint8 or in [0, 1].
        frames: of a video; None = an image.

    Returns:
        ``[3, H, W]``, or ``[F, 3, H, W]`` of a video.

    Raises:
        ValueError: another shape, or values outside [0, 1].
    """
    if value.ndim not in (3, 4) or 3 not in (value.shape[0], value.shape[-1]):
        raise ValueError(f"the image or video has the shape {[*value.shape]}")
    value = value if value.shape[0] == 3 else value.movedim(-1, 0)
    value = value[:, None] if value.ndim == 3 else value  # [3, F, H, W]
    if frames is None and value.shape[1] != 1:
        raise ValueError(f"it holds {value.shape[1]} frames and not an image")
    value = value.movedim(0, 1) if frames is not None else value[:, 0]
    if value.dtype == torch.uint8:
        return value.contiguous(), False
    value = value.float()
    lost = not bool(value.isfinite().all())
    value = value.nan_to_num()
    if float(value.min()) < -0.01 or float(value.max()) > 1.01:
        raise ValueError(f"pixels are in [{float(value.min()):.2f}, {float(value.max()):.2f}], not in [0, 1]")
    return to_bytes(value).contiguous(), lost
