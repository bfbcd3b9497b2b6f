"""Settings of the models that judge: local, or behind an OpenAI-compatible server. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from alignflow.strict import Address, Seconds, Strict

Needs = Literal["answers", "likelihood", "reply"]
"""Kinds of answer that a question needs: log-probabilities of answers, of a whole text, or a written reply."""


class Local(Strict):
    """A transformers model in this process."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    renamed: ClassVar[dict[str, str]] = {"batch": "chunk"}
    kind: Literal["local"] = Field(
        "local", description="Qwen2-VL, Qwen2.5-VL or Qwen3-VL in this process; differentiable"
    )
    model: str = Field(
        "Qwen/Qwen2.5-VL-7B-Instruct",
        description="shapes (the embedded world's judge), or a folder or hub id with model, tokenizer and image "
        "settings",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field("bfloat16", description="compute dtype of the network")
    attention: Literal["sdpa", "eager"] = Field("sdpa", description="attention implementation in transformers")
    chunk: int = Field(4, ge=1, description="questions per network call")
    pixels: int | None = Field(None, ge=1, description="maximum number of pixels per image; null = the model's default")
    longest: int = Field(16384, ge=1, description="maximum number of tokens per question, including images and reply")
    lora: str | None = Field(None, description="folder of a LoRA written by alignflow reward train; null = none")


class Endpoint(Strict):
    """A model behind an OpenAI-compatible server (vLLM, SGLang, ...)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["endpoint"] = Field(
        "endpoint", description="chat completions of an OpenAI-compatible server; not differentiable"
    )
    url: Address = Field(
        description="base URL including the version, such as http://127.0.0.1:8000/v1; put secrets in token_env"
    )
    model: str = Field(min_length=1, description="model name on the server")
    token_env: str | None = Field(None, description="environment variable with the API key; null = no key")
    top: int = Field(20, ge=2, description="top log-probabilities to request; OpenAI allows at most 20")
    parallel: int = Field(8, ge=1, le=1024, description="concurrent requests")
    timeout: Seconds = Field(120.0, description="seconds per request, including the reply")
    retries: int = Field(4, ge=0, le=1000, description="further attempts after a request without an answer")
    backoff: float = Field(
        1.0, ge=0, le=3600, description="seconds before the second attempt, doubled after each, at most 30"
    )
    extra: dict[str, Any] = Field(
        {}, description="extra fields of the request body, such as {chat_template_kwargs: ...}"
    )


def _judge(data: Any) -> Any:
    """The kind where it is not written: an address is an endpoint's, a name alone is a local model's."""
    if isinstance(data, str):
        return {"kind": "local", "model": data}
    if not isinstance(data, Mapping):
        return data
    found = {"kind": "endpoint" if "url" in data else "local", **data}
    if found["kind"] not in ("local", "endpoint"):
        raise PydanticCustomError(
            "setting", "no such judge {kind}; there are local and endpoint", {"kind": found["kind"]}
        )
    return found


AnyJudge = Annotated[Annotated[Local | Endpoint, Field(discriminator="kind")], BeforeValidator(_judge)]
