"""M-RoPE positions of a prompt: text advances three rows alike, pictures and videos spread over them.

Legend: T prompt tokens, t/h/w a grid in merged tokens (time, height, width).
"""

from collections.abc import Sequence

import numpy as np

from executor.schedule.request import Span


def place_spans(
    num_tokens: int, spans: Sequence[Span], grids: Sequence[tuple[np.ndarray, int, int]]
) -> tuple[np.ndarray, int]:
    """M-RoPE positions [3, T] int64 and `position_delta` of a prompt of `num_tokens` with `spans`.

    grids[i] = (temporal positions [t], h, w) of span i, local to its start. Text advances all three rows alike; a
    span's height and width rows count from the position it starts at; whatever follows resumes at the span's
    greatest position + 1, in whichever row that is.
    """
    positions = np.broadcast_to(np.arange(num_tokens, dtype=np.int64), (3, num_tokens)).copy()
    shift = 0  # of text: position - index
    done = 0
    for span, (times, h, w) in zip(spans, grids, strict=True):
        assert span.num_tokens == len(times) * h * w and span.start >= done
        positions[:, done : span.start] += shift
        base = span.start + shift
        done = span.start + span.num_tokens
        block = positions[:, span.start : done].reshape(3, len(times), h, w)
        block[0] = base + times[:, None, None]
        block[1] = base + np.arange(h)[:, None]
        block[2] = base + np.arange(w)
        positions[:, span.start : done] = block.reshape(3, -1)
        shift = base + max(int(times[-1]), h - 1, w - 1) + 1 - done
    positions[:, done:] += shift
    return positions, shift
