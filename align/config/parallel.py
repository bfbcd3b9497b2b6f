"""Settings of the division of a run among processes, beyond that of its prompts. No torch."""

from __future__ import annotations

from pydantic import Field

from alignflow.settings import Settings


class Parallel(Settings):
    """Division of a run among processes, beside its prompts, described in docs/nodes.md."""

    context: int = Field(
        1,
        ge=1,
        le=1024,
        description="processes that compute every sample together, each a part of its tokens (context parallelism), "
        "for long videos; 1 = every process computes whole samples",
    )
    replicas: int = Field(
        1,
        ge=1,
        le=65_536,
        description="copies of a network that the launch shards (FSDP2): each is spread over an equal part of the "
        "processes, such as those of one machine (HSDP); 1 = one copy over all processes",
    )
