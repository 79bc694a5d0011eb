"""The processor that all families share: a checkpoint folder and a recipe's options in, `Prompt`s out.

A family's `Processor` adds three things: how a video is sampled and sized, which pieces stand for it in the text, and
the M-RoPE positions. Media are opened only after everything that costs less has been checked, and vision code is
imported only then.
Does not know the engine: a prompt longer than the model's context is refused there.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import numpy as np

from executor.checkpoint.folder import read_json
from executor.checkpoint.generation import read_eos_token_ids, read_generation_config
from executor.checkpoint.settings import (
    PixelSettings,
    VideoSettings,
    read_pixel_settings,
    read_video_settings,
)
from executor.errors import UserError
from executor.prompt.admit import admitted, located
from executor.prompt.chat import Chat, Piece
from executor.prompt.digest import make_media_item
from executor.prompt.expand import Fill, VisionTokens, check_media, encode_pieces, expand_media, pieces_text
from executor.prompt.messages import MediaPart, describe, describe_value, normalise_messages
from executor.prompt.options import MAX_PICTURE_PIXELS, MAX_VIDEO_PIXELS, MediaOptions
from executor.prompt.request_options import RequestOptions, read_request_options
from executor.schedule.request import MediaItem, Prompt, Span

logger = logging.getLogger(__name__)

RESIZED_TOKENS = (4, 16384)  # of a picture or frame whose size is named, at least and at most


class PromptBuilder(ABC):
    """Builds prompts for one checkpoint.

    `tokenizer`: transformers' of the folder. `eos_token_ids`: end an answer. `tokens`: ids around media.
    `picture`, `video`: pixel settings, which the encoder needs to normalise and patchify `MediaItem.pixels`.
    `generation_config`: the folder's, {} if it has none. `around_media`: entered while a picture or video is fetched,
    decoded and resized, by whichever thread does it; whoever measures sets it.
    """

    picture_defaults: Mapping[str, Any]  # of the family's transformers classes, for keys a checkpoint leaves out
    video_defaults: Mapping[str, Any]
    sizes_all_frames: bool  # whether pixel bounds of the family's video class are of all frames together, else of one
    box_convention: Literal["absolute", "relative_1000"]  # how answers write places: see executor.media.draw

    def __init__(self, folder: str | Path, options: MediaOptions | None = None) -> None:
        self.folder = Path(folder)
        self.options = options or MediaOptions()
        self.chat = Chat.load(self.folder)
        self.tokenizer = self.chat.tokenizer
        self.config = self.parse_config(read_json(self.folder, "config.json"), f"{self.folder}/config.json")
        self.tokens = VisionTokens.read(vars(self.config), self.tokenizer)
        self.picture: PixelSettings = read_pixel_settings(self.folder, self.picture_defaults)
        self.video: VideoSettings = read_video_settings(self.folder, self.video_defaults)
        for settings in (self.picture, self.video):
            settings.check_against(self.config.vision, self.folder)
        if (self.picture.mean, self.picture.std) != (self.video.mean, self.video.std):
            raise UserError(
                f"'{self.folder}': pictures and videos are normalised differently (mean {self.picture.mean} and "
                f"{self.video.mean}, std {self.picture.std} and {self.video.std}); only one normalisation is supported"
            )
        self._check_options()
        self.eos_token_ids = read_eos_token_ids(self.folder, self.tokenizer, self.config.text.vocab_size)
        self.generation_config = read_generation_config(self.folder)
        self.around_media: Callable[[], AbstractContextManager] = nullcontext

    @property
    def image_token_id(self) -> int:
        return self.tokens.image

    @property
    def video_token_id(self) -> int:
        return self.tokens.video

    @property
    def vision_start_token_id(self) -> int:
        return self.tokens.start

    def build(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        media_options: Mapping[str, Any] | None = None,
    ) -> Prompt:
        """The prompt of OpenAI-like messages. Raises UserError for what cannot be asked as it stands.

        `continue_final_message`: the last message is left open, to be gone on with. `media_options`: of all media that
        say nothing themselves, see executor.prompt.request_options.
        """
        options = read_request_options(media_options)
        normal, parts = normalise_messages(messages)
        pieces = self.chat.render(
            normal,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            template_kwargs=chat_template_kwargs,
            placeholders=self._placeholders(),
        )
        return self._build(pieces, parts, options)

    def _placeholders(self) -> dict[str, str]:
        """A picture and a video as both families' chat templates write them."""
        start, end = self.tokenizer.convert_ids_to_tokens([self.tokens.start, self.tokens.end])
        kinds = {"image": self.tokens.image, "video": self.tokens.video}
        return {kind: start + self.tokenizer.convert_ids_to_tokens(pad) + end for kind, pad in kinds.items()}

    def _check_options(self) -> None:
        """Refuse a recipe's bounds that no picture or video could keep, by their key: once, not in every row."""
        options, picture, video = self.options, self.picture, self.video
        token_px = picture.factor**2
        for name, least, words in (
            ("max_pixels", token_px, "the smallest picture is one token"),
            ("frame_max_pixels", token_px, "the smallest frame is one token"),
            ("video_max_pixels", token_px * video.temporal_patch_size, "the smallest video is one token"),
        ):
            value = getattr(options, name)
            if value is not None and value < least:
                raise UserError(f"data_config.{name}: got {value}; {words} of this checkpoint, {least} pixels")
        if (options.min_pixels or 0) > MAX_PICTURE_PIXELS:
            raise UserError(f"data_config.min_pixels: got {options.min_pixels}, at most {MAX_PICTURE_PIXELS} allowed")
        for least, most, of in (("min_pixels", "max_pixels", picture), ("min_frames", "max_frames", video)):
            given = {name: getattr(options, name) for name in (least, most)}
            if least == "min_frames" and given[least] is None:
                continue  # the checkpoint's gives way to max_frames
            values = {name: value or getattr(of, name) for name, value in given.items()}
            if values[least] > values[most]:
                named, other, relation = (least, most, "above") if given[least] else (most, least, "below")
                whose, advice = "the checkpoint's ", f"set data_config.{other} too"
                if given[other] is not None:
                    whose, advice = "", "lower the one or raise the other"
                raise UserError(
                    f"data_config.{named}: got {values[named]}, {relation} {whose}{other} {values[other]}; {advice}"
                )

    def build_text(
        self,
        text: str,
        media: Sequence[Mapping[str, Any]] = (),
        *,
        media_options: Mapping[str, Any] | None = None,
    ) -> Prompt:
        """The prompt of raw text, without a template: special tokens in it count, and each placeholder
        (`<|image_pad|>`, `<|video_pad|>`) takes the next of `media`, given as parts of a message.

        Without media there is nothing that a placeholder could stand for: it is ordinary text then.
        """
        options = read_request_options(media_options)
        if not isinstance(text, str):
            raise UserError(f"prompt must be a text, got {describe(text)}")
        parts: list[MediaPart] = []
        if media:
            _, parts = normalise_messages([{"role": "user", "content": list(media)}])
        pieces = self.chat.special.split(text)
        if not parts:
            words = {pad: self.tokenizer.convert_ids_to_tokens(pad) for pad in self._pads}
            pieces = [words.get(piece, piece) for piece in pieces]
        return self._build(pieces, parts, options)

    def build_tokens(self, token_ids: Sequence[int]) -> Prompt:
        """The prompt of token ids as they stand. Raises UserError for ids that the model has not, and for those of
        placeholders: there are no media for them."""
        vocab_size = self.config.text.vocab_size
        if not isinstance(token_ids, list | tuple) or not token_ids:
            raise UserError(f"prompt must be a text, or a list of one or more token ids, got {describe(token_ids)}")
        for place, token_id in enumerate(token_ids):
            if not isinstance(token_id, int) or isinstance(token_id, bool) or not 0 <= token_id < vocab_size:
                raise UserError(
                    f"prompt[{place}] is {describe_value(token_id)}; allowed: token ids from 0 to {vocab_size - 1}"
                )
            if token_id in self._pads:
                raise UserError(
                    f"prompt[{place}] is {token_id}, which stands for a picture or video "
                    f"({self.tokenizer.convert_ids_to_tokens(token_id)}); leave it out, or ask with messages"
                )
        positions, delta = self.positions(len(token_ids), (), ())
        text = self.tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return Prompt(list(token_ids), positions, delta, text=text)

    @property
    def _pads(self) -> tuple[int, int]:
        """Ids that stand for what media are."""
        return self.tokens.image, self.tokens.video

    def _build(self, pieces: list[Piece], parts: list[MediaPart], options: RequestOptions) -> Prompt:
        if not pieces:
            raise UserError("the prompt is empty; give it some text")
        check_media(pieces, parts, self.tokens)
        media = tuple(self._open(part, options) for part in admitted(parts, self.options.limits))
        expanded = expand_media(
            pieces, media, self.tokens, self.video_pieces, replace_video_pair=self.replaces_video_pair
        )
        token_ids, spans = encode_pieces(self.tokenizer, expanded)
        positions, delta = self.positions(len(token_ids), spans, media)
        return Prompt(token_ids, positions, delta, media, spans, pieces_text(pieces, self.tokenizer))

    def _open(self, part: MediaPart, said: RequestOptions) -> MediaItem:
        options = self.options.of_request(part.kind, said, sizes_all_frames=self.sizes_all_frames).with_overrides(part)
        with located(part.where), self.around_media():
            return self.open_video(part, options) if part.kind == "video" else self.open_picture(part, options)

    def open_picture(self, part: MediaPart, options: MediaOptions) -> MediaItem:
        """Decode and resize one picture."""
        from executor.media.image import decode_image, resize
        from executor.media.media import MediaLimits, load_media

        limits = options.limits or MediaLimits()
        settings = self.picture
        least, most = options.min_pixels or settings.min_pixels, options.max_pixels or settings.max_pixels
        if least > most and not options.resized:
            raise UserError(f"{part.where}: min_pixels {least} is above max_pixels {most}; set both, or neither")
        opened = load_media(part.source, "image", limits)
        frame = decode_image(opened.content, source=opened.source, limits=limits)
        height, width = self.picture_size(frame.shape[1], frame.shape[2], options)
        _check_resized(part.where, height, width)
        resized = resize(frame[None], height, width)
        return make_media_item("image", resized, settings, source=opened.source, original_hw=tuple(frame.shape[1:]))

    def open_video(self, part: MediaPart, options: MediaOptions) -> MediaItem:
        """Sample, decode and resize one video."""
        from executor.media.media import MediaLimits, load_media
        from executor.media.sampling import Sampling
        from executor.media.video import read_video

        limits = options.limits or MediaLimits()
        settings = self.video
        max_frames = options.max_frames or settings.max_frames
        sampling = Sampling(
            rule=self.sampling_rule(),
            fps=options.fps or settings.fps,
            num_frames=options.num_frames or (None if options.fps else settings.num_frames),
            min_frames=options.min_frames or min(settings.min_frames, max_frames),
            max_frames=max_frames,
            temporal_patch_size=settings.temporal_patch_size,
            start_s=options.start_s,
            end_s=options.end_s,
        )

        def size_of(num_frames: int, height: int, width: int) -> tuple[int, int]:
            if options.resized:
                size = self._resized(options.resized)
            else:
                size = self.frame_size(num_frames, height, width, options)
            _check_resized(part.where, *size, num_frames)
            return size

        opened = load_media(part.source, "video", limits)
        sampled = read_video(
            opened.content,
            sampling,
            source=opened.source,
            limits=limits,
            size_of=size_of,
        )
        for warning in sampled.warnings:
            logger.warning("%s", warning)
        return make_media_item(
            "video",
            sampled.frames,
            settings,
            source=opened.source,
            seconds_per_grid=settings.temporal_patch_size / sampled.sampled_fps,
            timestamps_s=sampled.timestamps_s,
            original_hw=(sampled.height, sampled.width),
            warnings=sampled.warnings,
        )

    def picture_size(self, height: int, width: int, options: MediaOptions) -> tuple[int, int]:
        """What a picture of this size is resized to. Raises UserError for a picture too long for its breadth."""
        from executor.media.image import smart_resize

        if options.resized:
            return self._resized(options.resized)
        least, most = options.min_pixels or self.picture.min_pixels, options.max_pixels or self.picture.max_pixels
        return smart_resize(height, width, self.picture.factor, least, most)

    def _resized(self, wanted: tuple[int, int]) -> tuple[int, int]:
        """A size that a part names, rounded to whole tokens as the official tools do (qwen_vl_utils: 4 to 16384)."""
        from executor.media.image import smart_resize

        token_px = self.picture.factor**2
        least, most = (tokens * token_px for tokens in RESIZED_TOKENS)
        return smart_resize(*wanted, self.picture.factor, least, most)

    @staticmethod
    @abstractmethod
    def parse_config(raw: Mapping[str, Any], file: str) -> Any:
        """The family's `parse` of its config.py."""

    @property
    @abstractmethod
    def replaces_video_pair(self) -> bool:
        """Whether `video_pieces` also stand in for the start and end tokens that the template writes."""

    @abstractmethod
    def sampling_rule(self) -> Callable:
        """The rule of executor.media.sampling by which frames are chosen."""

    @abstractmethod
    def frame_size(self, num_frames: int, height: int, width: int, options: MediaOptions) -> tuple[int, int]:
        """(height, width) that every one of `num_frames` sampled frames is resized to."""

    @abstractmethod
    def video_pieces(self, index: int, item: MediaItem) -> list[Piece | Fill]:
        """What the placeholder of video `index` expands to."""

    @abstractmethod
    def positions(self, num_tokens: int, spans: Sequence[Span], media: Sequence[MediaItem]) -> tuple[np.ndarray, int]:
        """M-RoPE positions [3, T] int64, and the delta of the tokens to come."""


def _check_resized(where: str, height: int, width: int, num_frames: int = 1) -> None:
    """Refuse, before it is allocated, what no context could hold."""
    if height * width > MAX_PICTURE_PIXELS or num_frames * height * width > MAX_VIDEO_PIXELS:
        of_each = f"{num_frames} frames of " if num_frames > 1 else ""
        raise UserError(
            f"{where}: would be resized to {of_each}{width}x{height} pixels; at most {MAX_PICTURE_PIXELS} of a picture "
            f"and {MAX_VIDEO_PIXELS} of a video are allowed: ask for less (min_pixels, max_pixels, fps)"
        )
