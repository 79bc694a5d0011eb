"""Text in pieces equals text decoded at once, whatever the pieces, and stops where a stop string is complete."""

import random

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from executor.engine.detokenize import Detokenizer
from executor.errors import UserError
from executor.schedule.request import SamplingParams

CORPUS = [
    "The red circle is left of the blue square. How many triangles are there? Three, I think.\n\n",
    "图片里有三个红色的圆形和一个蓝色的方块。左边是什么？左边是一个绿色的三角形。",
    "Ça va très bien, merci — l'été à la plage; une façade, œuvre.",
    '{"bbox_2d": [12, 34, 56, 78], "label": "circle"}',
    "👩‍👩‍👧 🙂🙃 🇨🇳 e\u0301 한국어 العربية हिन्दी",
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    )
    core.add_special_tokens(["<|im_end|>", "<|image_pad|>"])
    core.add_tokens([AddedToken("<tool_call>"), AddedToken("two words"), AddedToken("中文 added"), AddedToken("naïve")])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", clean_up_tokenization_spaces=False)


def whole(tokenizer, token_ids: list[int], skip_special_tokens: bool = True) -> str:
    return tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)


def in_pieces(detokenizer: Detokenizer, token_ids: list[int], sizes: random.Random | None = None) -> list[str]:
    deltas = []
    while token_ids:
        size = sizes.randint(0, 4) if sizes else 1
        deltas.append(detokenizer.push(token_ids[:size]))
        token_ids = token_ids[size:]
    return [*deltas, detokenizer.finish()]


@pytest.mark.parametrize("skip_special_tokens", [True, False])
@pytest.mark.parametrize("seed", range(40))
def test_random_tokens_equal_decoding_at_once(tokenizer, seed, skip_special_tokens):
    rng = random.Random(seed)
    # Beyond the vocabulary: logits may be wider. Low ids are single bytes: mostly broken characters.
    token_ids = [rng.randrange(256) if rng.random() < 0.5 else rng.randrange(len(tokenizer) + 5) for _ in range(60)]
    expected = whole(tokenizer, token_ids, skip_special_tokens)
    for sizes in (None, rng):
        detokenizer = Detokenizer(tokenizer, SamplingParams(skip_special_tokens=skip_special_tokens))
        deltas = in_pieces(detokenizer, token_ids, sizes)
        assert "".join(deltas) == detokenizer.text == expected
        assert not detokenizer.stopped


@pytest.mark.parametrize("text", CORPUS)
def test_no_delta_ends_inside_a_character(tokenizer, text):
    bytewise = [tokenizer.convert_tokens_to_ids(character) for character in byte_characters(text)]
    for token_ids in (tokenizer.encode(text), bytewise):
        detokenizer = Detokenizer(tokenizer, SamplingParams())
        deltas = [detokenizer.push([token_id]) for token_id in token_ids]
        assert "".join(deltas) == text, "nothing is held back when all characters are complete"
        assert not any("\ufffd" in delta for delta in deltas)
        assert detokenizer.finish() == ""


def byte_characters(text: str) -> list[str]:
    pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return [character for piece, _ in pre_tokenizer.pre_tokenize_str(text) for character in piece]


def test_an_incomplete_character_is_flushed_at_the_end(tokenizer):
    token_ids = [tokenizer.convert_tokens_to_ids(character) for character in byte_characters("a🙂")][:-1]
    detokenizer = Detokenizer(tokenizer, SamplingParams())
    assert [detokenizer.push([token_id]) for token_id in token_ids] == ["a", "", "", ""]
    assert detokenizer.finish() == "\ufffd"
    assert detokenizer.text == whole(tokenizer, token_ids)


def test_special_tokens_inside_a_character_do_not_break_it(tokenizer):
    first, *rest = [tokenizer.convert_tokens_to_ids(character) for character in byte_characters("中")]
    token_ids = [first, tokenizer.eos_token_id, *rest]
    detokenizer = Detokenizer(tokenizer, SamplingParams())
    assert "".join(in_pieces(detokenizer, token_ids)) == "中" == whole(tokenizer, token_ids)


def cut(text: str, stops: tuple[str, ...], num_exempt: int = 0, *, keep: bool = False) -> tuple[str, str | None]:
    """Character by character: the definition of where a text stops."""
    for end in range(num_exempt + 1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            stop = max(complete, key=len)
            return text[: end if keep else end - len(stop)], stop
    return text, None


@pytest.mark.parametrize("seed", range(150))
def test_stop_strings_are_found_wherever_tokens_begin_and_end(tokenizer, seed):
    rng = random.Random(seed)
    text = "".join(rng.choice(["ab", "a", "b", "ba", "红色", "红", "🙂", " the", "\n", "two words"]) for _ in range(25))
    stops = []
    for _ in range(rng.randint(1, 3)):
        start = rng.randrange(len(text))
        stops.append(text[start : start + rng.randint(1, 6)] + rng.choice(["", "", "a", "🙃"]))
    token_ids = tokenizer.encode(text)
    keep, min_new_tokens = rng.random() < 0.3, rng.choice([0, 0, 5, 10])
    # Characters that are complete with the tokens of the minimum: no stop string ends among them.
    num_exempt = len(whole(tokenizer, token_ids[:min_new_tokens]).rstrip("\ufffd"))
    expected, stop = cut(whole(tokenizer, token_ids), tuple(stops), num_exempt, keep=keep)
    params = SamplingParams(stop=stops, include_stop_str_in_output=keep, min_new_tokens=min_new_tokens)
    for sizes in (None, rng):
        detokenizer = Detokenizer(tokenizer, params)
        deltas = in_pieces(detokenizer, token_ids, sizes)
        assert "".join(deltas) == detokenizer.text == expected
        assert detokenizer.stop_string == stop


def test_a_beginning_of_a_stop_string_is_held_back_and_released(tokenizer):
    ids = {character: tokenizer.convert_tokens_to_ids(character) for character in "abcd"}
    detokenizer = Detokenizer(tokenizer, SamplingParams(stop=("abc", "bd")))
    assert [detokenizer.push([ids[c]]) for c in "caab"] == ["c", "", "a", ""]
    assert detokenizer.push([ids["d"]]) == "a"
    assert detokenizer.stopped and detokenizer.stop_string == "bd"
    assert detokenizer.push([ids["c"]]) == "" == detokenizer.finish()
    assert detokenizer.text == "caa"


def test_other_tokenizers_are_refused():
    core = Tokenizer(models.BPE())
    core.decoder = decoders.Metaspace()
    with pytest.raises(UserError, match="Metaspace.*only ByteLevel"):
        Detokenizer(PreTrainedTokenizerFast(tokenizer_object=core), SamplingParams())


def test_cost_of_a_token_does_not_grow(tokenizer):
    detokenizer = Detokenizer(tokenizer, SamplingParams(stop=("never", "there")))
    lengths = []
    first_byte = tokenizer.convert_tokens_to_ids(byte_characters("中")[0])
    for _ in range(3000):
        detokenizer.push([first_byte])
        lengths.append(len(detokenizer._held) + len(detokenizer._characters.getstate()[0]))
    assert max(lengths) <= len("never") + 3
    detokenizer.finish()
    assert detokenizer.text == whole(tokenizer, [first_byte] * 3000)
