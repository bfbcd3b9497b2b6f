"""A judge behind an OpenAI-compatible server: chat completions, images as PNG in base64."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from rewards.base import RewardError, resolved
from rewards.judges.asking import Question, Replies
from rewards.judges.models import Endpoint, Needs
from rewards.judges.replies import spellings
from rewards.serving.dispatch import Dispatcher, UnansweredError
from rewards.serving.fetch import fetch, open_session, readable

NO_LOG_PROBABILITIES = (
    "returns no log-probabilities, which this reward needs; vLLM, SGLang and a local judge do. rubric, think_score, "
    "unified_reward, video_judge and deeptrace need none"
)
NO_PROMPT_LOG_PROBABILITIES = "returns no prompt_logprobs, which this reward needs; vLLM and a local judge do"


class EndpointJudge:
    """A server that answers one question per request, several requests at a time."""

    differentiable = False

    def __init__(self, settings: Endpoint) -> None:
        self.settings, self.extra = settings, resolved(settings.extra, "judge.extra")
        self.url = resolved(settings.url, "judge.url").rstrip("/") + "/chat/completions"
        self.session = open_session(self.url, settings.parallel, settings.token_env)

    def fingerprint(self) -> str:
        """Nothing: a server does not say what weights it has."""
        return ""

    def ready(self, needs: Needs, answers: Sequence[Sequence[str]]) -> None:
        """One small request of the kind that will be made.

        Raises:
            RewardError: no answer to it, or one without what is needed.
        """
        grey = Question((torch.full((3, 56, 56), 0.5), "Is this picture gray? Answer yes or no."))
        tries: dict[str, Callable[[Question], Any]] = {
            "answers": self._listed,
            "likelihood": lambda asked: self._likelihood(asked, "yes"),
            "reply": lambda asked: self._choice(asked, max_tokens=1),
        }
        (found,) = self._each([grey], tries[needs])
        if isinstance(found, _Failure):
            raise RewardError(found.why)

    def answers(self, questions: Sequence[Question], answers: Sequence[Sequence[str]]) -> Replies:
        """See :class:`rewards.judges.asking.Judge`; an answer that is not listed counts with the most it may have."""
        known = [spellings(words) for words in answers]

        def ask(asked: Question) -> list[float]:
            text, listed = self._listed(asked)
            found = among(listed, known)
            if found is None:
                names = "/".join(words[0] for words in answers)
                raise UnansweredError(
                    f"none of {names} among the {len(listed)} likeliest tokens; the judge's reply begins {text[:80]!r}",
                    again=False,
                )
            return found

        return _tensor(self._each(questions, ask), len(answers))

    def likelihoods(self, questions: Sequence[Question], replies: Sequence[str]) -> Replies:
        """See :class:`rewards.judges.asking.Judge`; by vLLM's ``prompt_logprobs``, in two requests."""
        pairs = list(zip(questions, replies, strict=True))
        return _tensor(self._each(pairs, lambda pair: self._likelihood(*pair)), 2)

    def write(self, questions: Sequence[Question], longest: int) -> Replies:
        """See :class:`rewards.judges.asking.Judge`."""
        return self._written([(asked, {}) for asked in questions], longest)

    def sample(self, questions: Sequence[Question], longest: int, temperature: float, seeds: Sequence[int]) -> Replies:
        """Replies sampled at a temperature, each with its own seed, where the server heeds seeds."""
        options = [{"temperature": temperature, "seed": seed % 2**31} for seed in seeds]
        return self._written(list(zip(questions, options, strict=True)), longest)

    def _written(self, asked: Sequence[tuple[Question, dict[str, Any]]], longest: int) -> Replies:
        def ask(one: tuple[Question, dict[str, Any]]) -> str:
            said = self._choice(one[0], max_tokens=longest, **one[1])["message"].get("content")
            if not isinstance(said, str) or not said.strip():
                raise UnansweredError("the judge's reply is empty", again=False)
            return said

        found = self._each(asked, ask)
        texts = [None if isinstance(one, _Failure) else one for one in found]
        return Replies(texts, _reasons(found))

    def _each(self, items: Sequence[Any], ask: Callable[[Any], Any]) -> list[Any]:
        made = self.settings
        give_up = lambda _, why: _Failure(readable(self.session, why))  # noqa: E731
        return Dispatcher(ask, made.parallel, made.retries, made.backoff).each(items, give_up)

    def _listed(self, question: Question) -> tuple[str, list[tuple[str, float]]]:
        """The first token of the reply, and (token, log-probability) of the likeliest."""
        choice = self._choice(question, max_tokens=1, logprobs=True, top_logprobs=self.settings.top)
        try:
            first = choice["logprobs"]["content"][0]
            listed = [(str(one["token"]), float(one["logprob"])) for one in first["top_logprobs"]]
            text = str(first["token"])
        except (KeyError, IndexError, TypeError, ValueError):
            listed, text = [], ""
        listed = [(token, value) for token, value in listed if math.isfinite(value)]
        if not listed:
            raise UnansweredError(f"{self.url} {NO_LOG_PROBABILITIES}", again=False)
        return text, listed

    def _likelihood(self, question: Question, reply: str) -> list[float]:
        asked = [_message(question)]
        before = self._post(messages=asked, max_tokens=1)
        told = [*asked, {"role": "assistant", "content": reply}]
        whole = self._post(
            messages=told, max_tokens=1, prompt_logprobs=0, add_generation_prompt=False, continue_final_message=True
        )
        try:
            start, tokens = int(before["usage"]["prompt_tokens"]), whole["prompt_logprobs"]
            theirs = [float(one["logprob"]) for entry in tokens[start:] for one in entry.values()]
            whole_number = len(theirs) == len(tokens) - start > 0
        except (KeyError, TypeError, ValueError, AttributeError):
            whole_number = False
        if not whole_number:
            raise UnansweredError(f"{self.url} {NO_PROMPT_LOG_PROBABILITIES}", again=False)
        return [sum(theirs), float(len(theirs))]

    def _choice(self, question: Question, **options: Any) -> dict[str, Any]:
        reply = self._post(messages=[_message(question)], **options)
        try:
            choice = reply["choices"][0]
            good = isinstance(choice["message"], dict)
        except (KeyError, IndexError, TypeError):
            good = False
        if not good:
            raise UnansweredError(f"{self.url}: the reply is not a chat completion")
        return choice

    def _post(self, **body: Any) -> dict[str, Any]:
        """The JSON of a good reply.

        Raises:
            UnansweredError: there is none; with the server's own words.
        """
        made = self.settings
        body = {"model": made.model, "temperature": 0, **body, **self.extra}
        reply, content = fetch(self.session, "POST", self.url, made.timeout, json=body)
        status = reply.status_code
        try:
            said = json.loads(content)
        except (ValueError, RecursionError):
            said = None
        if status != 200:
            error = said.get("error", said) if isinstance(said, dict) else None
            words = error.get("message") if isinstance(error, dict) else error
            hint = "; set judge.token_env to the variable that holds the key" if status in (401, 403) else ""
            why = f"{self.url}: HTTP status {status}" + (f", {str(words)[:200]}" if words else "") + hint
            after = reply.headers.get("Retry-After", "")
            seconds = float(after) if after.isascii() and after.isdigit() else 0.0
            raise UnansweredError(readable(self.session, why), status in (408, 429) or status >= 500, seconds)
        if not isinstance(said, dict):
            raise UnansweredError(f"{self.url}: the reply is damaged, not JSON: {content[:80]!r}")
        return said


class _Failure:
    """A question that was given up."""

    def __init__(self, why: str) -> None:
        self.why = why


def among(listed: Sequence[tuple[str, float]], answers: Sequence[Sequence[str]]) -> list[float] | None:
    """Log-probability of each of K answers in a list of the likeliest tokens; None if none is there.

    An answer's spellings are summed. One that is not listed is given the most it can have: the least that is listed,
    or its share of what the list leaves over, whichever is smaller.
    """
    sums = [
        sum(math.exp(value) for token, value in listed if token.replace("Ġ", " ").replace("▁", " ") in spelt)
        for spelt in answers
    ]
    if not any(sums):
        return None
    unlisted = sum(1 for value in sums if not value)
    left = max(1 - sum(math.exp(value) for _, value in listed), 1e-9)
    bound = min(math.exp(min(value for _, value in listed)), left / max(unlisted, 1))
    return [math.log(value or bound) for value in sums]


def _message(question: Question) -> dict[str, Any]:
    return {
        "role": "user",
        "content": [
            {"type": "text", "text": part}
            if isinstance(part, str)
            else {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{_png(part)}"}}
            for part in question.content
        ],
    }


def _png(image: Tensor) -> str:
    pixels = (image.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def _tensor(found: Sequence[Any], width: int) -> Replies:
    rows = [[math.nan] * width if isinstance(one, _Failure) else one for one in found]
    return Replies(torch.tensor(rows).view(len(found), width), _reasons(found))


def _reasons(found: Sequence[Any]) -> dict[int, str]:
    return {i: one.why for i, one in enumerate(found) if isinstance(one, _Failure)}
