"""From rendered pieces and opened media to a `Prompt`: placeholders expanded, tokens, spans, M-RoPE positions, digests.

The mechanics that all families share. What a family decides comes as an argument: the pieces that stand for a video,
the local positions of a span. Importing this module, and building a prompt of text alone, loads no vision code.
Legend: T prompt tokens, P patches, t/h/w a grid in merged tokens (time, height, width).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from executor.errors import UserError
from executor.prompt.chat import Piece
from executor.prompt.messages import MediaPart
from executor.schedule.request import MediaItem, Span


@dataclass(frozen=True)
class Fill:
    """A run of placeholder tokens for embeddings `offset...` of media `media_index`."""

    media_index: int
    num_tokens: int
    token_id: int
    offset: int = 0


@dataclass(frozen=True)
class VisionTokens:
    """Special token ids around media, from config.json."""

    image: int
    video: int
    start: int
    end: int

    @classmethod
    def read(cls, config: Mapping[str, Any], tokenizer: Any) -> "VisionTokens":
        """Raises UserError when config.json lacks one or the tokenizer does not know it as a special token."""
        special = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
        ids = []
        for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
            ids.append(config.get(name))
            if ids[-1] not in special:
                raise UserError(
                    f"config.json says {name}={ids[-1]}, which is no special token of this checkpoint's tokenizer; "
                    "config and tokenizer must come from the same checkpoint"
                )
        return cls(*ids)


def expand_media(
    pieces: Sequence[Piece],
    media: Sequence[MediaItem],
    tokens: VisionTokens,
    video_pieces: Callable[[int, MediaItem], list[Piece | Fill]],
    *,
    replace_video_pair: bool,
) -> list[Piece | Fill]:
    """Replace each placeholder by its run, in order of appearance.

    A picture is one `Fill`; a video is `video_pieces(index, item)`, which with `replace_video_pair` also takes the
    place of the start and end tokens around the placeholder. Placeholders must have been checked (`check_media`).
    """
    expanded: list[Piece | Fill] = []
    index = 0
    skip_end = False
    for position, piece in enumerate(pieces):
        if skip_end:
            skip_end = False
        elif piece == tokens.image:
            expanded.append(Fill(index, media[index].num_tokens, tokens.image))
            index += 1
        elif piece == tokens.video:
            after = pieces[position + 1] if position + 1 < len(pieces) else None
            if replace_video_pair and expanded and expanded[-1] == tokens.start and after == tokens.end:
                expanded.pop()
                skip_end = True
            expanded.extend(video_pieces(index, media[index]))
            index += 1
        else:
            expanded.append(piece)
    assert index == len(media)
    return expanded


def check_media(pieces: Iterable[Piece], parts: Sequence[MediaPart], tokens: VisionTokens) -> None:
    """Raise UserError unless the rendered text has a placeholder for every picture and video, in the same order."""
    kinds = {tokens.image: "image", tokens.video: "video"}
    placeholders = [kinds[piece] for piece in pieces if piece in kinds]
    given = [part.kind for part in parts]
    if placeholders == given:
        return
    if len(placeholders) == len(given):
        raise UserError(
            f"the prompt asks for {', '.join(placeholders)} in this order, but {', '.join(given)} are given"
        )
    advice = (
        "the chat template leaves some out (Qwen3-VL's takes none in system and assistant messages): "
        "put them into user messages"
        if len(placeholders) < len(given)
        else "give one picture or video for each placeholder"
    )
    raise UserError(
        f"{len(given)} pictures and videos are given, but the prompt has {len(placeholders)} placeholders; {advice}"
    )


def encode_pieces(tokenizer: Any, pieces: Sequence[Piece | Fill]) -> tuple[list[int], tuple[Span, ...]]:
    """Token ids and spans of expanded pieces.

    Neighbouring texts are joined before they are tokenized. The result equals tokenizing the whole text at once,
    because a tokenizer, too, first takes its special tokens out; but here a special token in a text is text.
    """
    runs: list[Piece | Fill] = []
    for piece in pieces:
        if isinstance(piece, str) and runs and isinstance(runs[-1], str):
            runs[-1] += piece
        else:
            runs.append(piece)
    texts = list(dict.fromkeys(run for run in runs if isinstance(run, str)))
    ids_of: dict[str, list[int]] = {}
    if texts:
        encoded = tokenizer(
            texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
        )
        ids_of = dict(zip(texts, encoded["input_ids"], strict=True))
    token_ids: list[int] = []
    spans = []
    for run in runs:
        if isinstance(run, str):
            token_ids += ids_of[run]
        elif isinstance(run, Fill):
            spans.append(Span(len(token_ids), run.num_tokens, run.media_index, run.offset))
            token_ids += [run.token_id] * run.num_tokens
        else:
            token_ids.append(run)
    return token_ids, tuple(spans)


def pieces_text(pieces: Sequence[Piece], tokenizer: Any) -> str:
    """The rendered text, media as single placeholders."""
    return "".join(piece if isinstance(piece, str) else tokenizer.convert_ids_to_tokens(piece) for piece in pieces)
