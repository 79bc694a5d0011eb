"""Equal digests mean equal keys and values: ids, positions and embeddings, from the first token on."""

import random

import pytest

from executor.schedule.prefix_cache import BlockDigests
from executor.schedule.request import Prompt, Request, SamplingParams, Span
from tests.schedule.fakes import Truth, media, prompt, request

SIZE = 4


def digests(*segments, stride: int = 1) -> list[bytes]:
    each = request("a", *segments, stride=stride)
    return list(BlockDigests(each, SIZE).extend(each.num_tokens))


def test_only_full_blocks_have_digests():
    assert [len(digests(range(5, 5 + length))) for length in (0, 3, 4, 7, 8, 9)] == [0, 0, 1, 1, 2, 2]


def test_equal_prefixes_are_equal_and_the_chain_separates_the_rest():
    a = digests(range(10, 22))
    b = digests([*range(10, 18), 99, *range(19, 22)])
    assert a[:2] == b[:2] and a[2] != b[2]
    c = digests([99, *range(11, 22)])
    assert not set(a) & set(c), "equal blocks after unequal ones are not equal"
    assert len(set(digests([7] * 40))) == 10, "equal blocks at different places are not equal"


def test_media_of_equal_ids_differ():
    red, blue = media("red", 6), media("blue", 6)
    a, b = digests([5, 6], red, range(8)), digests([5, 6], blue, range(8))
    assert a == digests([5, 6], media("red", 6), range(8))
    assert not set(a) & set(b)
    first, second = digests(red, blue), digests(blue, red)
    assert not set(first) & set(second)
    assert digests(red, red) != digests(red, blue)


def test_which_embeddings_stand_in_a_block_matters():
    """The same media and ids, begun elsewhere in the media, or one token later in the block."""
    item = media("long", 12)
    base = prompt(item)
    later = Prompt(base.token_ids[:8], base.positions[:, :8], 0, (item,), (Span(0, 8, 0, offset=4),))
    sooner = Prompt(base.token_ids[:8], base.positions[:, :8], 0, (item,), (Span(0, 8, 0),))
    shifted = Prompt(base.token_ids[:8], base.positions[:, :8], 0, (item,), (Span(1, 7, 0),))
    found = [
        tuple(BlockDigests(Request("a", each, SamplingParams()), SIZE).extend(8)) for each in (later, sooner, shifted)
    ]
    assert len(set(found)) == 3
    assert found[1] == tuple(digests(item)[:2]), "what comes after a block does not matter to it"


def test_positions_matter():
    video = media("video", 8)
    assert digests([5], video, stride=1)[0] != digests([5], video, stride=2)[0]


def test_digests_do_not_depend_on_when_they_are_asked_for_or_what_was_generated():
    whole = digests(range(10, 30))
    grown = request("a", range(10, 17))
    blocks = BlockDigests(grown, SIZE)
    for num_tokens, token_id in enumerate(range(17, 30), start=7):
        blocks.extend(num_tokens)
        grown.output_token_ids.append(token_id)
    assert blocks.extend(20) == whole


@pytest.mark.parametrize("seed", range(3))
def test_digests_are_equal_exactly_where_the_contents_are(seed):
    """Against the hashes of the fake model, over random prompts that share much."""
    rng = random.Random(seed)
    items = [media(f"m{index}", size) for index, size in enumerate((3, 5, 5, 9))]
    digest_of: dict[int, bytes] = {}
    content_of: dict[bytes, int] = {}
    for _ in range(400):
        segments = [rng.choice(items) if rng.random() < 0.4 else [5] * rng.randint(1, 4) for _ in range(6)]
        each = request("a", *segments, stride=rng.choice((1, 1, 2)))
        truth = Truth(each.prompt).extend(each.prompt.token_ids)
        for index, digest in enumerate(BlockDigests(each, SIZE).extend(each.num_tokens)):
            content = truth[(index + 1) * SIZE - 1]
            assert digest_of.setdefault(content, digest) == digest
            assert content_of.setdefault(digest, content) == content
    assert len(content_of) > 100
