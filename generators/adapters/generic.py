"""Diffusers flow pipelines without an adapter, analysed by recording their calls while they sample.

Recordings of the pipeline's own call (three prompts, two, with guidance) show how its denoiser is called; replaying
every recorded step proves it. Prompts are encoded by running the pipeline up to its network call, media decoded by
running what it does after its last step. A prompt longer than the text encoder reads is cut by the pipeline, which says
so in its log.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

import torch
from torch import Tensor, nn

from alignflow.text import first_line
from generators.base import Conditioning, Generator, GeneratorError, Options
from generators.codec import in_chunks
from generators.watching.arguments import Layout, Plan, layouts, leaves_of, read, same
from generators.watching.recording import Step, Tape, denoiser, recording, stacked

WORDS = ["a", "a b", "a b c"]  # prompts for the recordings
STEPS, MANY = 3, 20
FROM_NOISE = 0.95  # share of the noise levels that a pipeline must go through to start from noise
SCALE = 3.0  # guidance of the guided recording
MEDIA = {"image": "image", "mask": "mask_image"}  # our names of the images a pipeline may take, and its own
DECODED = 4  # media decoded at once
FAILURES = (TypeError, ValueError, RuntimeError, AttributeError, LookupError, ArithmeticError, AssertionError)


@dataclass(frozen=True)
class Place:
    """Rows among a step's network outputs: chunk ``part`` of ``copies`` of call number ``call``."""

    call: int = 0
    copies: int = 1
    part: int = 0

    def of(self, step: Step) -> Tensor:
        """These rows of a recorded step's outputs."""
        output = step.calls[self.call].output
        assert output is not None
        return output.chunk(self.copies)[self.part]


def places(step: Step) -> list[Place]:
    """Every place of a recorded step, conditional rows first where a batch holds both."""
    found = []
    for number, call in enumerate(step.calls):
        copies = 0 if call.output is None else call.output.shape[0] // step.before.shape[0]
        found += [Place(number, copies, part) for part in reversed(range(copies))]
    return found


class Generic(Generator):
    """A pipeline with one denoiser, a flow-matching scheduler, and plain classifier-free guidance or none.

    Raises:
        GeneratorError: the pipeline cannot be run or understood; the message lists the attempts.
    """

    pipeline_class = "DiffusionPipeline"
    accepts = ("size", "frames", "text_length", "embedded_guidance", "negative_prompt")
    needs_encoders = True  # media come out of whole runs
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")

    def __init__(self, pipeline: Any, options: Options | None = None) -> None:
        self.named = type(pipeline).__name__
        self.parameters = inspect.signature(type(pipeline).__call__).parameters
        self.inputs = self._media(inspect.Parameter.empty)
        super().__init__(pipeline, options)
        self._learn()

    def denoiser(self) -> nn.Module:
        return denoiser(self.pipeline)

    def _check_options(self) -> None:
        for option, name in (("size", "height"), ("frames", "num_frames"), ("text_length", "max_sequence_length")):
            if getattr(self.options, option) is not None and name not in self.parameters:
                raise GeneratorError(f"generator.{option}: {self.named} takes no {name}")
        if self.inputs and self.options.size is None:
            raise GeneratorError(f"generator.size is needed: {self.named} takes images, which need a size")

    def _media(self, *defaults: Any) -> tuple[str, ...]:
        """The images the pipeline takes, only those with one of ``defaults`` if any are given."""
        known = {name: self.parameters[own] for name, own in MEDIA.items() if own in self.parameters}
        return tuple(name for name, value in known.items() if not defaults or value.default in defaults)

    def _images(self, count: int) -> dict[str, Tensor]:
        """Images to continue with where only the calls matter."""
        source = torch.Generator().manual_seed(0)
        shapes = {name: (count, 1 if name == "mask" else 3, *self.size) for name in self.inputs}
        return {name: torch.rand(shape, generator=source).to(self.device) for name, shape in shapes.items()}

    # -- how the pipeline is run ---------------------------------------------------------------------------------

    def _run(self, prompts: Sequence[str], inputs: Mapping[str, Tensor], steps: int, guidance: float, out: str) -> Any:
        """The pipeline's own call, without the ``no_grad`` around it; its first result.

        Raises:
            GeneratorError: it fails; the message gives the reason.
        """
        height, width = self.options.size or (None, None)
        wanted = {
            "height": height,
            "width": width,
            "num_frames": self.options.frames,
            "max_sequence_length": self.options.text_length,
            "guidance_scale": self.options.embedded_guidance,
            self.dial: self.unguided if guidance == 1 else guidance,
            "negative_prompt": [self.options.negative_prompt] * len(prompts) if guidance != 1 else None,
            "generator": [torch.Generator().manual_seed(i) for i in range(len(prompts))],
            "use_resolution_binning": False,  # these three generate another size than requested
            "_auto_resize": False,
            "max_area": height and width and height * width,
        }
        told: dict[str, Any] = {
            name: value for name, value in wanted.items() if value is not None and name in self.parameters
        }
        call = getattr(type(self.pipeline).__call__, "__wrapped__", type(self.pipeline).__call__)
        told |= {MEDIA[name]: value for name, value in inputs.items()}
        told |= {"num_inference_steps": steps, "output_type": out, "return_dict": False}
        guider: Any = getattr(self.pipeline, "guider", None)  # where it is a component, no argument turns guidance off
        silenced = guider is not None and guidance == 1 and guider._enabled
        try:
            if silenced:
                guider.disable()
            return call(self.pipeline, prompt=list(prompts), **told)[0]
        except GeneratorError:
            raise
        except FAILURES as error:
            raise GeneratorError(
                f"{self.named}: its own call with {len(prompts)} prompts and {steps} steps fails, "
                f"{type(error).__name__}: {first_line(error)}"
            ) from error
        finally:
            if silenced:
                guider.enable()

    def _tape(
        self, prompts: Sequence[str], inputs: Mapping[str, Tensor], guidance: float, steps: int = STEPS, **how: Any
    ) -> Tape:
        """Record a run of the pipeline; ``how`` goes to :func:`~generators.watching.recording.recording`."""
        with torch.no_grad(), recording(self.pipeline, **how) as tape:
            self._run(prompts, inputs, steps, guidance, "latent")
        return tape

    # -- analysis of the recordings ------------------------------------------------------------------------------

    def _learn(self) -> None:
        self.dial = "true_cfg_scale" if "true_cfg_scale" in self.parameters else "guidance_scale"
        self.unguided = 1.0
        self.unconditional: Place | None = None
        self.keeps_norm = False
        self._grids: dict[int, Tensor] = {}
        inputs = self._images(3)
        try:
            self._read(inputs)
        except GeneratorError:  # an image with a default may be needed all the same
            self.inputs = self._media()
            if self.inputs in ((), tuple(inputs)) or self.options.size is None:
                raise
            inputs = self._images(3)
            self._read(inputs)
        guided = self._tape(WORDS, inputs, SCALE)
        if len(places(guided.steps[0])) > 1:
            if self.dial == "guidance_scale" and self.options.embedded_guidance is not None:
                raise GeneratorError(
                    f"generator.embedded_guidance: the guidance of {self.named} is classifier-free; use "
                    "rollout.sampler.guidance"
                )
            self._find_unconditional(guided.steps, inputs)
        elif self.dial == "guidance_scale" and self.dial in self.parameters:  # an input of the network, then
            given = self.options.embedded_guidance
            self.unguided = self.parameters[self.dial].default if given is None else given
            self._read(inputs)
        elif self.options.embedded_guidance is not None and "guidance_scale" not in self.parameters:
            raise GeneratorError(f"generator.embedded_guidance: {self.named} takes no guidance_scale")
        self.times(MANY)  # begins with noise also where three steps are too few to leave any out
        height, width = self.decode(guided.steps[-1].after[:1]).shape[-2:]
        self.size = (height, width)

    def _read(self, inputs: Mapping[str, Tensor]) -> None:
        """Learns how the denoiser is called without guidance and proves it; some count none as 1, some as 0."""
        counts = (1.0, 0.0) if self.unguided == 1 and self.dial in self.parameters else (self.unguided,)
        failed: list[GeneratorError] = []
        for self.unguided in counts:
            try:
                return self._understand(inputs)
            except GeneratorError as error:
                failed.append(error)
        self.unguided = counts[0]
        raise failed[0]

    def _understand(self, inputs: Mapping[str, Tensor]) -> None:
        steps = self._tape(WORDS, inputs, 1.0).steps
        fewer = self._tape(WORDS[:2], {n: v[:2] for n, v in inputs.items()}, 1.0, stop_after=1).calls
        if len(steps) < 2 or not all(step.calls for step in steps):
            raise GeneratorError(f"{self.named} makes no network call between its scheduler's steps")
        levels = [step.sigma for step in steps] + [steps[-1].next_sigma]
        if min(levels) < 0 or max(levels) > 1 + 1e-5:
            raise GeneratorError(
                f"{type(self.pipeline.scheduler).__name__} has noise levels from {min(levels):.3g} to "
                f"{max(levels):.3g}, but those of a flow are in [0, 1]; a flow-matching scheduler is needed, or "
                "an adapter"
            )
        self._check_states(steps)
        state = steps[0].before.float()
        if (state.mean().abs() + (state.std() - 1).abs()) * state.numel() ** 0.5 > 10:
            raise GeneratorError(
                f"{self.named} starts from mean {state.mean():.2f} and spread {state.std():.2f}, not from standard "
                "normal noise; write an adapter"
            )
        self.rising = steps[0].sigma < steps[-1].next_sigma
        self.shape, self.outputs = tuple(state.shape[1:]), steps[0].calls[0].output
        self.sign = self._flow_sign(steps[0])
        self.plan: Plan = read(steps, fewer[0], [self._time(step.sigma) for step in steps])
        self.conditional, self.flip, self.layout = self._answer(steps)
        self._replay(steps, inputs, 1.0)

    def _check_states(self, steps: Sequence[Step]) -> None:
        """Raise GeneratorError for a pipeline that begins with an image, or alters its state between two steps."""
        first, last = steps[0].sigma, steps[-1].next_sigma
        if abs(first - last) < FROM_NOISE:
            raise GeneratorError(
                f"{self.named} begins at noise level {max(first, 1 - first):.2f}, from a noised image; write an adapter"
            )
        for number, (one, two) in enumerate(pairwise(steps)):
            tolerance = 1e-5 if two.before.dtype == torch.float32 else 3e-2
            if not same(two.before, one.after, tolerance):
                raise GeneratorError(
                    f"{self.named} alters its state between steps {number} and {number + 1}; write an adapter"
                )

    def _time(self, sigma: float) -> float:
        """Time of a scheduler's noise level; some count it backwards."""
        return 1.0 - sigma if self.rising else sigma

    def _flow_sign(self, step: Step) -> float:
        """+1 or -1 if the first step is Euler's, state + dt * velocity; otherwise it is not a flow."""
        moved, dt = step.after.float() - step.before.float(), self._time(step.next_sigma) - self._time(step.sigma)
        for sign in (1.0, -1.0):
            if same(moved, sign * dt * step.output.float(), 1e-3 if step.after.dtype == torch.float32 else 3e-2):
                return sign
        raise GeneratorError(
            f"{type(self.pipeline.scheduler).__name__} does not step along a flow, state + dt * velocity (tried both "
            f"signs); {self.named} needs a flow-matching scheduler, or an adapter"
        )

    def _answer(self, steps: Sequence[Step]) -> tuple[Place, float, Layout]:
        """Place of the scheduler's velocity in the network's outputs, and its sign."""
        for place in places(steps[0]):
            for layout in layouts(place.of(steps[0]), steps[0].before):
                for flip in (1.0, -1.0):
                    if all(same(flip * layout.take(place.of(s), s.before.shape), s.output, 1e-4) for s in steps):
                        return place, flip, layout
        shapes = [tuple(call.output.shape) for call in steps[0].calls if call.output is not None]
        raise GeneratorError(
            f"{self.named}: the scheduler's input, {tuple(steps[0].output.shape)}, is not part of the network's "
            f"outputs {shapes}; tried every order of dimensions, the first and the last of each, both signs"
        )

    def _find_unconditional(self, steps: Sequence[Step], inputs: Mapping[str, Tensor]) -> None:
        """Tries every pair of places as conditional and unconditional; where none fits, guidance stays off.

        Some pipelines count ``c + s (c - u)``, one more than ``u + g (c - u)``; some keep the conditional's norm.
        """
        alone, found = self.conditional, places(steps[0])
        for conditional, unconditional, scale, keeps in product(found, found, (SCALE, SCALE + 1), (False, True)):
            if conditional != unconditional:
                self.conditional, self.unconditional, self.keeps_norm = conditional, unconditional, keeps
                try:
                    self._replay(steps, inputs, scale)
                except GeneratorError:
                    continue
                return
        self.conditional, self.unconditional, self.keeps_norm = alone, None, False

    def _replay(self, steps: Sequence[Step], inputs: Mapping[str, Tensor], guidance: float) -> None:
        """Raises GeneratorError where our velocity at a recorded state is not the recorded one."""
        cond = self.encode(WORDS, inputs)
        tolerance = 1e-4 if self.dtype == torch.float32 else 3e-2
        for number, step in enumerate(steps):
            time = torch.tensor(self._time(step.sigma), device=step.before.device)
            try:
                with torch.no_grad():
                    v = self.velocity(step.before.float(), time, cond, guidance)
            except GeneratorError:
                raise
            except FAILURES as error:
                why = f"{type(error).__name__}: {first_line(error)}"
                raise GeneratorError(f"{self.named}: replaying step {number} fails, {why}; write an adapter") from error
            wanted = self.sign * step.output.float()
            if not same(v, wanted, tolerance):
                raise GeneratorError(
                    f"{self.named}: replaying step {number} gives another velocity, off by up to "
                    f"{float((v - wanted).abs().max()):.2g}; write an adapter"
                )

    # -- the generator -------------------------------------------------------------------------------------------

    def native_size(self) -> tuple[int, int]:
        return 0, 0  # until something was sampled

    def check_size(self) -> None:
        """The pipeline itself refuses sizes that it cannot generate."""

    def encode_text(self, prompts: Sequence[str], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        wanted = {"": self.conditional} | ({"negative ": self.unconditional} if self.unconditional else {})
        last = max(place.call for place in wanted.values())
        guidance = SCALE if self.unconditional else 1.0
        tape = self._tape(prompts, inputs, guidance, stop_after=last + 1, stub=self._silence)
        shape = (len(prompts), *self.shape)
        return {
            prefix + name: rows
            for prefix, place in wanted.items()
            for name, rows in self.plan.conditioning(tape.calls[place.call], shape, place.copies, place.part).items()
        }

    def _silence(self, arguments: dict[str, Any]) -> Tensor:
        """Zeros in the shape of the network's output."""
        state = stacked(leaves_of(arguments)[1][next(iter(self.plan.state))])
        assert self.outputs is not None
        return state.new_zeros(state.shape[0], *self.outputs.shape[1:], dtype=self.outputs.dtype)

    def negative(self, cond: Conditioning) -> Conditioning:
        if self.unconditional is None:
            raise GeneratorError(
                f"guidance: no two of the outputs of {self.named} make u + g (c - u); use guidance 1, "
                "or generator.embedded_guidance where the network takes a scale"
            )
        rows = {n: v for n, v in cond.tensors.items() if not n.startswith("negative ")}
        return Conditioning({**cond.tensors, **{name: cond.tensors[f"negative {name}"] for name in rows}})

    def guide(self, unconditional: Tensor, conditional: Tensor, guidance: float) -> Tensor:
        guided = super().guide(unconditional, conditional, guidance)
        if not self.keeps_norm:
            return guided
        # the norm of every vector along the last dimension: of a token, if the state is packed
        return guided * (conditional.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))

    def latent_shape(self) -> tuple[int, ...]:
        return self.shape

    def predict(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        arguments = self.plan.arguments(x, t, cond.tensors)
        output = stacked(self.network(**arguments)[0])
        return self.sign * self.flip * self.layout.take(output, x.shape)

    def times(self, steps: int) -> Tensor:
        if steps not in self._grids:
            tape = self._tape(WORDS[:1], self._images(1), 1.0, steps, stub=self._silence)
            sigmas, first = tape.sigmas, tape.steps[0].sigma
            assert sigmas is not None
            if abs(first - float(sigmas[0])) > 1e-3:
                raise GeneratorError(
                    f"{self.named} begins {steps} steps at noise level {first:.2f}, with a noised image; "
                    "write an adapter"
                )
            self._grids[steps] = 1 - sigmas if self.rising else sigmas
        return self._grids[steps]

    def decode(self, latents: Tensor) -> Tensor:
        return in_chunks(self._finish, latents, DECODED)

    def _finish(self, latents: Tensor) -> Tensor:
        """Media of at most :data:`DECODED` latents: what the pipeline does after its last step."""
        count = len(latents)
        with recording(self.pipeline, forced=latents, stub=self._silence):
            return self._run(WORDS[:1] * count, self._images(count), STEPS, 1.0, "pt").float().clamp(0, 1)

    def encode_media(self, media: Tensor) -> Tensor:
        raise GeneratorError(f"generator.kind generic cannot encode media for {self.named}: pairs need an adapter")
