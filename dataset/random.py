"""Prompts drawn at random, each of exactly `random_tokens` tokens as the model reads it: template, pictures and text.

The text is made of words that are one token each wherever they stand, so that a server that is sent the text counts the
same. Pictures are smooth noise of `random_picture_size` pixels, with about the bytes of a photograph's JPEG.
Sample i of a seed is always the same; samples of other numbers and seeds share nothing but the template's beginning
(and `random_prefix_tokens` of text, where these are wanted), so that a prefix cache finds nothing in them.
Does not know the model's context: a prompt longer than that is refused where it is asked.
"""

import io
import random
import re
from functools import cached_property, partial
from typing import Any

import numpy as np
from PIL import Image

from dataset.sample import Dataset, Sample
from executor.checkpoint.folder import find_checkpoint, read_json
from executor.errors import UserError
from executor.host.env import REPO_ROOT
from executor.prompt.builder import PromptBuilder
from executor.prompt.options import media_options
from executor.recipe.schema import Recipe
from models.registry import family_runner

NUM_SAMPLES = 100
"""How many there are where data_config.limit does not say it."""
ANSWER_TOKENS = 128
"""Of each answer, where generation_config.max_new_tokens does not say it; end tokens do not end one."""
GRAIN_PX = 8
"""The noise of pictures is drawn in cells of so many pixels and smoothed: noise of single pixels has three times the
bytes, and takes three times as long to decode."""
JPEG_QUALITY = 90
_WORD = re.compile("Ġ[A-Za-z]+")  # a blank before letters, as byte-level vocabularies write it


def load(recipe: Recipe) -> Dataset:
    """`data_config.limit` samples, each drawn when it is asked for. UserError where no text is left beside the template
    and the pictures."""
    folder = find_checkpoint(recipe.model.model_path, recipe.model.hub)
    runner = family_runner(read_json(folder, "config.json"))
    drawn = RandomPrompts(recipe, runner.build_processor(folder, media_options(recipe)))
    drawn.check()
    return Dataset(REPO_ROOT, [partial(drawn.sample, index) for index in range(recipe.data.limit or NUM_SAMPLES)])


class RandomPrompts:
    """What the data set of one recipe is drawn with."""

    def __init__(self, recipe: Recipe, processor: PromptBuilder) -> None:
        self.recipe, self.data, self.processor = recipe, recipe.data, processor
        own = {"max_new_tokens": ANSWER_TOKENS, "ignore_eos": True}
        said = recipe.generation
        self.generation = {name: value for name, value in own.items() if getattr(said, name) is None}

    @cached_property
    def words(self) -> list[str]:
        """Texts that are one token each, in any row of them: a blank and letters, which no rule of the tokenizer joins.

        In the order of their ids. UserError for a vocabulary that has none.
        """
        tokenizer = self.processor.tokenizer
        ids = {f" {word[1:]}": number for word, number in tokenizer.get_vocab().items() if _WORD.fullmatch(word)}
        found = [word for word in sorted(ids, key=ids.get) if len(word) > 2]
        encoded = tokenizer(found, add_special_tokens=False).input_ids if found else []
        words = [word for word, tokens in zip(found, encoded, strict=True) if tokens == [ids[word]]]
        if len(words) < 2:
            raise UserError("data_config.dataset: random draws words of one token, and this vocabulary has none")
        return words

    @cached_property
    def num_words(self) -> int:
        """Words of a sample's text. UserError where the template and the pictures leave no room for one."""
        wanted, one_word = self.data.random_tokens, self._messages(0, 1)
        others = len(self.processor.build(one_word, chat_template_kwargs=self._template_kwargs).token_ids) - 1
        if wanted <= others:
            size = "x".join(map(str, self.data.random_picture_size))
            pictures = f" and {self.data.random_pictures} pictures of {size}" if self.data.random_pictures else ""
            raise UserError(
                f"data_config.random_tokens: got {wanted}; {others} are taken by the chat template{pictures}, so that "
                f"{others + 1} are the fewest"
            )
        return wanted - others

    def check(self) -> None:
        """UserError for what no sample could be: too few tokens, a longer common beginning than there is text."""
        most = self.num_words
        if self.data.random_prefix_tokens > most:
            raise UserError(
                f"data_config.random_prefix_tokens: got {self.data.random_prefix_tokens}; a prompt of "
                f"{self.data.random_tokens} tokens has {most} of text"
            )

    def sample(self, index: int) -> Sample:
        """Sample `index`, of `random_tokens` tokens."""
        messages = self._messages(index, self.num_words)
        self._check_count(messages)
        return Sample(f"random {index}", tuple(messages), generation=self.generation)

    @property
    def _template_kwargs(self) -> dict[str, Any] | None:
        return self.data.chat_template_kwargs or None

    def _messages(self, index: int, num_words: int) -> list[dict[str, Any]]:
        data = self.data
        num_common = min(data.random_prefix_tokens, num_words)
        common = random.Random(f"{data.random_seed} common").choices(self.words, k=num_common)
        own = random.Random(f"{data.random_seed} {index}").choices(self.words, k=num_words - num_common)
        text = {"type": "text", "text": "".join(common + own)}
        pictures = [{"type": "image", "image": self._picture(index, place)} for place in range(data.random_pictures)]
        system = [{"role": "system", "content": data.system_prompt}] if data.system_prompt else []
        return [*system, {"role": "user", "content": [*pictures, text]}]

    def _picture(self, index: int, place: int) -> bytes:
        """The bytes of a JPEG."""
        width, height = self.data.random_picture_size
        noise = np.random.default_rng([self.data.random_seed, index, place])
        cells = noise.integers(0, 256, (-(-height // GRAIN_PX), -(-width // GRAIN_PX), 3), dtype=np.uint8)
        picture = Image.fromarray(cells).resize((width, height), Image.Resampling.BILINEAR)
        content = io.BytesIO()
        picture.save(content, "JPEG", quality=JPEG_QUALITY)
        return content.getvalue()

    def _check_count(self, messages: list[dict[str, Any]]) -> None:
        """The words stayed a token each, side by side. UserError for a tokenizer that joins them, or a template that
        changes the text."""
        text = messages[-1]["content"][-1]["text"]
        found = len(self.processor.tokenizer(text, add_special_tokens=False).input_ids)
        if found != self.num_words:
            raise UserError(
                f"data_config.dataset: random: {self.num_words} words became {found} tokens; this tokenizer joins "
                "words, so that no prompt of an exact length can be drawn for it"
            )
