"""Embeddings stay while somebody reads them, and after that as long as there is room."""

from executor.schedule.encoder_cache import EncoderCache, MediaReads
from executor.schedule.request import Prompt, Request, SamplingParams, Span
from tests.schedule.fakes import media, request

A, B, C, HUGE = media("a", 4), media("b", 4), media("c", 4), media("huge", 25)


def take(cache: EncoderCache, request_id: str, *items, may_exceed: bool = False) -> bool:
    return cache.take(request_id, tuple(enumerate(items)), may_exceed=may_exceed)


def test_equal_media_are_encoded_once():
    cache = EncoderCache(8)
    assert take(cache, "x", A) and take(cache, "y", A, B)
    assert cache.drain() == ((A, B), ())
    assert cache.num_tokens == 8
    cache.check({("x", 0, b"a"), ("y", 0, b"a"), ("y", 1, b"b")})
    assert take(cache, "z", B) and cache.drain() == ((), ())


def test_what_nobody_reads_makes_room_oldest_first():
    cache = EncoderCache(8)
    assert take(cache, "x", A) and take(cache, "y", B) and not take(cache, "z", C)
    cache.drain()
    cache.give_back("y", 0, B.digest)
    cache.give_back("x", 0, A.digest)
    assert cache.drain() == ((), ()), "kept while there is room"
    assert take(cache, "z", C)
    assert cache.drain() == ((C,), (b"b",))
    cache.check({("z", 0, b"c")})


def test_all_or_none():
    cache = EncoderCache(8)
    assert not take(cache, "x", A, B, C)
    assert cache.drain() == ((), ()) and cache.num_tokens == 0


def test_what_was_to_be_dropped_is_kept_when_it_is_wanted_again_in_time():
    cache = EncoderCache(4)
    take(cache, "x", A)
    cache.drain()
    cache.give_back("x", 0, A.digest)
    assert take(cache, "y", B)
    cache.give_back("y", 0, B.digest)
    assert take(cache, "z", A)
    assert cache.drain() == ((), ()), "neither was B encoded nor A dropped"
    cache.check({("z", 0, b"a")})


def test_more_than_fits_is_for_one_request_alone():
    cache = EncoderCache(8)
    assert take(cache, "x", A) and take(cache, "y", B)
    cache.drain()
    cache.give_back("y", 0, B.digest)
    assert not take(cache, "z", HUGE) and not take(cache, "z", HUGE, may_exceed=True)
    cache.give_back("x", 0, A.digest)
    assert not take(cache, "z", HUGE)
    assert take(cache, "z", HUGE, may_exceed=True)
    assert cache.drain() == ((HUGE,), (b"b", b"a"))
    assert not take(cache, "x", A, may_exceed=True)
    assert take(cache, "x", HUGE), "what is there costs nothing"
    cache.check({("z", 0, b"huge"), ("x", 0, b"huge")})
    cache.give_back("z", 0, HUGE.digest)
    cache.give_back("x", 0, HUGE.digest)
    assert cache.drain() == ((), (b"huge",)) and cache.num_tokens == 0


def test_reads_end_before_what_has_no_room():
    cache = EncoderCache(8)
    reads = MediaReads(request("x", [5, 5], A, [6], B, C), cache)
    assert reads.take(0, 2, False, True) == 2 and cache.num_tokens == 0
    assert reads.take(0, 15, False, True) == 11, "up to C"
    assert reads.take(3, 9, False, False) == 8, "what is held can be read without taking more"
    reads.give_back(5)
    assert reads.check(5) == {("x", 1, b"b"), ("x", 0, b"a")}
    reads.give_back(6)
    assert reads.check(6) == {("x", 1, b"b")}
    assert reads.take(6, 9, True, True) == 9 and reads.check(6) == {("x", 1, b"b"), ("x", 2, b"c")}


def test_frames_of_a_video_are_held_until_the_last_is_read():
    cache = EncoderCache(8)
    video = media("video", 8)
    spans = (Span(3, 4, 0), Span(9, 4, 0, offset=4))
    prompt = Prompt([5] * 14, request("y", [5] * 14).prompt.positions, 0, (video,), spans)
    reads = MediaReads(Request("x", prompt, SamplingParams()), cache)
    assert reads.take(0, 8, False, True) == 8
    reads.give_back(8)
    assert reads.check(8) == {("x", 1, b"video")} and not take(cache, "z", A), "between two frames"
    assert reads.take(8, 6, False, False) == 6
    reads.give_back(14)
    assert reads.check(14) == set() and take(cache, "z", A)
