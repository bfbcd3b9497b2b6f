"""A diffusers pipeline as a velocity field.

One convention for every model: ``t`` in [0, 1] with 1 = noise, ``x_t = (1 - t) x0 + t eps``, ``v = eps - x0``.
Each adapter converts to its pipeline's scale internally; no other code needs to know about it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from generators import codec
from generators.conditioning import Call
from generators.conditioning import Conditioning as Conditioning
from generators.errors import GeneratorError as GeneratorError
from generators.errors import LengthsKnown
from generators.noise import seeded_noise
from generators.settings import Options as Options
from generators.text_cache import TextCache, key_of, text_encoders


class Generator(ABC):
    """Velocity, text encoding and latent coding of one diffusers pipeline.

    A subclass supplies the abstract methods and the class attributes; everything else exists once, here.

    Attributes:
        backbone: the trained module (``pipeline.transformer``, or the experts as one), never wrapped.
        network: what :meth:`velocity` calls; the trainer replaces it by the wrapped (DDP, compiled) backbone.
        network_calls: single-sample network evaluations so far (a batch of N counts N).
        lora_targets: default LoRA target module names.
        text_loras: text encoders whose LoRA the pipeline's ``load_lora_weights`` reads; others are not trained.
        text_targets: default LoRA target module names in them.
        user_attention: ends of the names of attention layers to which attention to a user can be added.
        pipeline_class: name of the diffusers class this adapter reads.
        optional: components that a folder may leave out, because the pipeline samples without them.
        accepts: names of the :class:`Options` that this model supports.
        inputs: names of the media every prompt comes with: ``image``, ``mask``.
        guidance_default: guidance input of a guidance-distilled network unless the config sets another.
        needs_encoders: the text encoders are called for more than prompts and cannot be dropped.
        schedulers: classes that step as we do, of an adapter that does not take its times from ``spaced``.
        resting: accelerate hooks of text encoders that leave the device when they have read.
        users: embeddings of the users of prompts, a row each, where the network attends to them.
        call: the last network call, for modules added to the network; checkpointed blocks need it in the backward pass.
    """

    lora_targets: tuple[str, ...] = ()
    text_loras: tuple[str, ...] = ()
    text_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "out_proj")
    user_attention: tuple[str, ...] = ()
    pipeline_class: str = ""
    optional: tuple[str, ...] = ()
    accepts: tuple[str, ...] = ("size", "negative_prompt")
    inputs: tuple[str, ...] = ()
    guidance_default: float = 1.0
    needs_encoders = False
    schedulers: tuple[str, ...] = ()

    def __init__(self, pipeline: Any, options: Options | None = None) -> None:
        self.pipeline = pipeline
        self.options = options or Options()
        self._check_options()
        self.backbone: nn.Module = self.denoiser()
        self.network: Any = self.backbone
        self.size = self.options.size or self.native_size()
        self.network_calls = 0
        self.call: Call | None = None
        self.users: Callable[[Sequence[Any]], Tensor] | None = None
        self._negative: Conditioning | None = None
        self._dtype: tuple[torch.dtype, torch.dtype] | None = None
        self._texts: TextCache | None = None
        self.resting: list[Any] = []
        for module in self.modules().values():
            module.requires_grad_(False).eval()
        self.check_size()

    def _check_options(self) -> None:
        for option, field in Options.model_fields.items():
            if getattr(self.options, option) != field.default and option not in self.accepts:
                raise GeneratorError(
                    f"generator.{option}: {self.pipeline_class} has none; it has {', '.join(self.accepts)}"
                )
        if self.options.embedded_guidance is not None and not self.distilled:
            raise GeneratorError(
                "generator.embedded_guidance: this network takes no guidance scale; use rollout.sampler.guidance"
            )

    # -- what differs from model to model -----------------------------------------------------------------------

    def denoiser(self) -> nn.Module:
        """The network that is trained."""
        return self.pipeline.transformer

    def native_size(self) -> tuple[int, int]:
        """(height, width) in pixels of the pipeline's samples by default."""
        side = self.pipeline.default_sample_size * self.pipeline.vae_scale_factor
        return side, side

    @abstractmethod
    def encode_text(self, prompts: Sequence[str], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Conditioning from the text, B rows each. Raises GeneratorError for a prompt that is too long.

        ``inputs`` matters only where the text encoder looks at the image as well.
        """

    def encode_inputs(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Conditioning from the media of :attr:`inputs`, ``[B, C, H, W]`` in [0, 1] at :attr:`size`, B rows each."""
        return {}

    def encode_negative(self) -> dict[str, Tensor]:
        """The negative prompt's text, one row; a pipeline that reads it otherwise than a prompt overrides it."""
        return self.encode_text([self.options.negative_prompt], {})

    @abstractmethod
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one sample's latents, ``(C, H, W)`` or ``(C, F, H, W)``, at :attr:`size`."""

    @abstractmethod
    def predict(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """One unguided network call: ``x [N, ...]``, ``t [N]`` in [0, 1], ``cond`` with N rows -> ``v [N, ...]``."""

    @abstractmethod
    def times(self, steps: int) -> Tensor:
        """Time grid ``[steps + 1]``, falling from 1 to 0, as the pipeline's own scheduler spaces it."""

    def decode(self, latents: Tensor) -> Tensor:
        """Latents ``[N, ...]`` -> media ``[N, 3, H, W]`` or ``[N, F, 3, H, W]``, float32 in [0, 1]; keeps the graph."""
        return codec.decode(self.pipeline.vae, latents)

    def encode_media(self, media: Tensor) -> Tensor:
        """Media in [0, 1] -> latents (the mode of the encoder's distribution), inverse of :meth:`decode`."""
        return codec.encode(self.pipeline.vae, media)

    def guide(self, unconditional: Tensor, conditional: Tensor, guidance: float) -> Tensor:
        """Classifier-free guidance of two velocities ``[N, ...]``; a pipeline that rescales overrides it."""
        return unconditional + guidance * (conditional - unconditional)

    # -- what is the same for all of them -----------------------------------------------------------------------

    def size_multiple(self) -> int:
        """Pixels that height and width must be multiples of: the VAE's reduction times the network's patch."""
        return 2 * self.pipeline.vae_scale_factor

    def largest_side(self) -> int | None:
        """Pixels that height and width may have at most; None = no limit."""
        return None

    def check_size(self) -> None:
        """Raise GeneratorError if the model cannot sample at :attr:`size`; a subclass may add limits."""
        unit, largest = self.size_multiple(), self.largest_side()
        if any(side < unit or side % unit or (largest and side > largest) for side in self.size):
            limit = f", at most {largest}" if largest else ""
            raise GeneratorError(
                f"generator.size {list(self.size)}: height and width must be multiples of {unit}{limit}"
            )

    @staticmethod
    def check_length(prompts: Sequence[str], tokenizer: Any, limit: int) -> None:
        """Raise GeneratorError for a prompt of more than ``limit`` tokens, whose end would be lost."""
        for index, prompt in enumerate(prompts):
            count = len(tokenizer(prompt, truncation=False, verbose=False).input_ids)
            if count > limit:
                start = " ".join(prompt.split()[:8])[:60]
                raise GeneratorError(f"prompt {index} ({start!r} ...) has {count} tokens, the model reads {limit}")

    def too_long(self, prompts: Sequence[str]) -> dict[int, str]:
        """Index -> reason of the prompts that are too long for :meth:`encode`; runs only the tokenizers.

        Empty if the adapter has no limit, or if the limit depends on an image.
        """

        def measure(texts: Sequence[str], tokenizer: Any, limit: int) -> None:
            found = {}
            for index, text in enumerate(texts):
                try:
                    type(self).check_length([text], tokenizer, limit)
                except GeneratorError as error:
                    found[index] = str(error).replace("prompt 0", "the prompt", 1)
            raise LengthsKnown(found)

        self.check_length = measure  # type: ignore[method-assign, assignment]  # adapters call it before anything is encoded
        try:
            self.encode_text(prompts, {})
        except LengthsKnown as measured:
            return measured.found
        except (KeyError, IndexError):  # placeholder of an image beside the text
            return {}
        finally:
            del self.check_length
        return {}

    def encode(
        self, prompts: Sequence[str], inputs: Mapping[str, Tensor] | None = None, *, graph: bool = False
    ) -> Conditioning:
        """Prompts and the media they come with -> conditioning with ``B = len(prompts)`` rows.

        Args:
            inputs: name -> ``[B, C, H, W]`` in [0, 1] for every name in :attr:`inputs`.
            graph: keep the gradient to trained text encoders, where gradients are on.

        Raises:
            GeneratorError: a prompt too long, an input missing or of another size.
        """
        given = {name: value.to(self.device) for name, value in (inputs or {}).items() if name in self.inputs}
        for name in self.inputs:
            if name not in given:
                raise GeneratorError(f"{type(self.pipeline).__name__} needs {name!r} with every prompt")
            if given[name].shape[0] != len(prompts) or tuple(given[name].shape[-2:]) != tuple(self.size):
                raise GeneratorError(
                    f"{name}: shape {tuple(given[name].shape)}, need {len(prompts)} of {self.size[0]} x {self.size[1]}"
                )
        text = self.encode_prompts(prompts, given, graph=graph)
        with nullcontext() if graph else torch.no_grad():
            return replace(text, tensors={**text.tensors, **self.encode_inputs(given)})

    def encode_prompts(
        self, prompts: Sequence[str], inputs: Mapping[str, Tensor] | None = None, *, graph: bool = False
    ) -> Conditioning:
        """The text part of :meth:`encode`.

        While a text encoder is trained the negative prompt is encoded with it, by the weights that are in place.
        """
        with nullcontext() if graph else torch.no_grad():
            negative = Conditioning(self.encode_negative()) if self.text_is_trained() else None
            return Conditioning(self._text(prompts, inputs or {}), negative)

    def text_is_trained(self) -> bool:
        """Whether a text encoder has parameters that are trained."""
        encoders = self.part_networks(("text",)).values()
        return any(value.requires_grad for encoder in encoders for value in encoder.parameters())

    def text_changed(self) -> None:
        """Drop the cached outputs of the text encoders after their weights have changed."""
        self._negative = None

    def _text(self, prompts: Sequence[str], given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self._texts is None:
            encoded = self.encode_text(prompts, given)
            self._rest()
            return encoded
        rows = [Conditioning(self._texts.rows(key_of(prompt, given, i))) for i, prompt in enumerate(prompts)]
        return {name: value.to(self.device) for name, value in Conditioning.cat(rows).tensors.items()}

    def _rest(self) -> None:
        for hook in self.resting:
            hook.offload()

    def remember(self, cache: TextCache, prompts: Sequence[str], inputs: Mapping[str, Tensor]) -> None:
        """Put the text conditioning of B prompts into ``cache``; those it holds already are not encoded again."""
        given = {name: value.to(self.device) for name, value in inputs.items() if name in self.inputs}
        keys = [key_of(prompt, given, index) for index, prompt in enumerate(prompts)]
        new = [index for index, key in enumerate(keys) if key not in cache]
        if new:
            with torch.no_grad():
                chosen = {name: value[new] for name, value in given.items()}
                encoded = self.encode_text([prompts[index] for index in new], chosen)
            cache.add([keys[index] for index in new], encoded)
        self._rest()

    def check_droppable(self) -> None:
        """Raise GeneratorError if the text encoders are needed for more than prompts."""
        if self.needs_encoders:
            raise GeneratorError(
                f"memory.cache_prompts: {type(self.pipeline).__name__} has no adapter and runs whole; use none"
            )

    def drop_encoders(self, cache: TextCache) -> None:
        """Take texts only from ``cache`` from now on and release the text encoders, if :meth:`check_droppable`."""
        self.check_droppable()
        if type(self).negative is Generator.negative:
            with torch.no_grad():
                self._negative = Conditioning(self.encode_negative())
            self._rest()
        self._texts, self.resting = cache, []
        self.pipeline.register_modules(**dict.fromkeys(text_encoders(self.pipeline)))

    @property
    def distilled(self) -> bool:
        """Whether the network takes a guidance scale as an input."""
        return bool(self.pipeline.transformer.config.get("guidance_embeds", False))

    def guidance_input(self, t: Tensor) -> Tensor | None:
        """Guidance input ``[N]`` of a guidance-distilled network; None for other networks."""
        scale = self.options.embedded_guidance
        return torch.full_like(t, self.guidance_default if scale is None else scale) if self.distilled else None

    @property
    def device(self) -> torch.device:
        """Device of the backbone."""
        return next(self.backbone.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Compute dtype of the backbone, whatever its class keeps in float32.

        Found once for each dtype of its first parameter, because diffusers looks at every module: 13 ms for a FLUX with
        a LoRA, several times a network call.
        """
        network = self.pipeline.transformer
        first = next(network.parameters()).dtype
        if self._dtype is None or self._dtype[0] != first:
            self._dtype = first, network.dtype
        return self._dtype[1]

    def backbones(self) -> dict[str, nn.Module]:
        """The trained networks by component name; more than one where experts share the time."""
        return {"transformer": self.backbone}

    def part_networks(self, parts: Collection[str]) -> dict[str, nn.Module]:
        """Networks that can be trained, by component name: of the part ``network`` the backbones, of ``text`` the text
        encoders in :attr:`text_loras`."""
        encoders = text_encoders(self.pipeline) if "text" in parts and self.text_loras else {}
        text = {name: encoders[name] for name in self.text_loras if name in encoders}
        return {**(self.backbones() if "network" in parts else {}), **text}

    def idle(self) -> tuple[str, ...]:
        """Starts of the names of modules whose result the network drops: training them changes nothing."""
        return ()

    def modules(self) -> dict[str, nn.Module]:
        """The pipeline's networks by component name."""
        return {name: part for name, part in self.pipeline.components.items() if isinstance(part, nn.Module)}

    def to(self, device: torch.device | str) -> Generator:
        """Move every network of the pipeline."""
        self.pipeline.to(device)
        if self._negative is not None:
            self._negative = Conditioning({name: value.to(device) for name, value in self._negative.tensors.items()})
        return self

    def velocity(self, x: Tensor, t: Tensor | float, cond: Conditioning, guidance: float = 1.0) -> Tensor:
        """Velocity ``v = eps - x0`` at ``x_t``, with classifier-free guidance unless ``guidance == 1``.

        Args:
            x: ``[N, ...]`` float32 latents at time ``t [N]``, or one number.
            cond: N rows.
            guidance: scale ``g`` of ``v_uncond + g (v_cond - v_uncond)``; both halves go through in one call.
        """
        t = torch.as_tensor(t, dtype=torch.float32, device=x.device).expand(x.shape[0])
        if guidance == 1.0:
            self.network_calls += x.shape[0]
            return self._predicted(x, t, cond).float()
        self.network_calls += 2 * x.shape[0]
        both = Conditioning.cat([self.negative(cond), cond])
        unconditional, conditional = self._predicted(torch.cat([x, x]), torch.cat([t, t]), both).float().chunk(2)
        return self.guide(unconditional, conditional, guidance)

    def _predicted(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        self.call = Call(t, cond)
        return self.predict(x, t, cond)

    def negative(self, cond: Conditioning) -> Conditioning:
        """``cond`` with the negative prompt's text, encoded once or with the prompts, instead of its own."""
        if cond.negative is None and self._negative is None:
            with torch.no_grad():
                self._negative = Conditioning(self.encode_negative())
            self._rest()
        found = self._negative if cond.negative is None else cond.negative
        assert found is not None
        rows = torch.zeros(len(cond), dtype=torch.long, device=self.device)
        return Conditioning({**cond.tensors, **found[rows].tensors})

    def noise(self, seeds: Sequence[int]) -> Tensor:
        """Standard normal latents ``[N, ...]``, float32: row i depends on ``seeds[i]`` alone, on no batch or device."""
        return seeded_noise(seeds, self.latent_shape()).to(self.device)

    @contextmanager
    def sized(self, size: tuple[int, int] | None, setting: str = "evaluate.size") -> Iterator[None]:
        """Sample at ``size``, (height, width) in pixels, inside the block; None = at the same. Errors name ``setting``.

        Raises:
            GeneratorError: the model cannot sample at that size.
        """
        before, self.size = self.size, size or self.size
        try:
            try:
                self.check_size()
            except GeneratorError as error:
                raise GeneratorError(str(error).replace("generator.size", setting)) from None
            yield
        finally:
            self.size = before

    @contextmanager
    def trained_by(self, network: Any) -> Iterator[None]:
        """Route :meth:`velocity` through ``network`` (the accelerator-wrapped backbone) inside the block."""
        before, self.network = self.network, network
        try:
            yield
        finally:
            self.network = before
