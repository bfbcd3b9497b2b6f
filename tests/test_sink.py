"""The EMA sink beside its closed form, and the cache beside full attention."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from align.maths.sink import EMASink, ema


def chunks(count: int, size: int = 2, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    source = torch.Generator().manual_seed(seed)
    draw = torch.randn(count, 2, 3, 4, size, 5, generator=source, dtype=torch.double)  # batch 3, heads 4, dimension 5
    return [(keys, values) for keys, values in draw]


def test_the_average_of_what_left() -> None:
    """alpha 0.9 from 10 over 1, 2, 3: 0.9^3 10 + 0.1 (0.81 + 0.9 2 + 3) = 7.851."""
    sink = torch.tensor([[10.0]])
    for value in (1.0, 2.0, 3.0):
        sink = ema(sink, torch.tensor([[value]]), 0.9)
    assert float(sink) == pytest.approx(7.851)


def test_the_cache_of_a_long_video_is_its_closed_form() -> None:
    """The sink is ``alpha^n`` of the first chunk that left and ``(1 - alpha) alpha^k`` of each after it."""
    given, alpha, window = chunks(9), 0.7, 3
    cache = EMASink.empty(given[0][0], 2, window, alpha)
    for number, (keys, values) in enumerate(given, 1):
        cache = cache.add(keys, values)
        assert cache.keys.shape[-2] == cache.values.shape[-2] == 2 * min(number, window + 1)
    left = [keys for keys, _ in given[: 9 - window]]
    after = len(left) - 1
    wanted = alpha**after * left[0] + sum((1 - alpha) * alpha ** (after - n) * left[n] for n in range(1, after + 1))
    torch.testing.assert_close(cache.keys[..., :2, :], wanted)
    torch.testing.assert_close(cache.keys[..., 2:, :], torch.cat([keys for keys, _ in given[-window:]], -2))
    torch.testing.assert_close(cache.values[..., 2:, :], torch.cat([values for _, values in given[-window:]], -2))


def test_nothing_is_lost_while_the_window_has_room() -> None:
    """Chunk by chunk as with attention that is causal between chunks and full inside one."""
    given = chunks(4)
    cache, size = EMASink.empty(given[0][0], 2), 2
    keys, values = (torch.cat([pair[n] for pair in given], -2) for n in (0, 1))
    queries = torch.randn(keys.shape, generator=torch.Generator().manual_seed(9), dtype=torch.double)
    number = torch.arange(8) // size
    scores = (queries @ keys.transpose(-1, -2) / 5**0.5).masked_fill(number[:, None] < number, -torch.inf)
    whole = scores.softmax(-1) @ values
    for n, pair in enumerate(given):
        cache = cache.add(*pair)
        some = slice(n * size, (n + 1) * size)
        torch.testing.assert_close(cache.attend(queries[..., some, :]), whole[..., some, :])


def test_a_sink_of_alpha_one_is_the_first_chunk_for_good() -> None:
    given = chunks(7)
    cache = EMASink.empty(given[0][0], 2, alpha=1.0)
    for pair in given:
        cache = cache.add(*pair)
    assert torch.equal(cache.keys[..., :2, :], given[0][0])


def test_wrong_sizes_are_said() -> None:
    one = chunks(1)[0]
    with pytest.raises(ValueError, match=r"alpha in \[0, 1\]; given 2, 3, 1.5"):
        EMASink.empty(one[0], 2, alpha=1.5)
    with pytest.raises(ValueError, match="a chunk has 3 tokens, given 2 keys, 2 values"):
        EMASink.empty(one[0], 3).add(*one)
