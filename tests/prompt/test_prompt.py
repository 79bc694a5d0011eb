"""The mechanics under the processors: messages checked, users' text kept apart from the template's, files read."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from executor.checkpoint import settings as checkpoint_files
from executor.checkpoint.generation import read_eos_token_ids
from executor.errors import UserError
from executor.prompt.chat import Chat, SpecialTokens
from executor.prompt.digest import make_media_item, media_digest
from executor.prompt.expand import Fill, VisionTokens, check_media, encode_pieces, expand_media
from executor.prompt.messages import MediaPart, normalise_messages
from executor.prompt.options import MediaOptions
from executor.prompt.positions import place_spans
from executor.schedule.request import MediaItem, Span

REPO = Path(__file__).parents[2]
TINY = REPO / "models" / "tiny"
SETTINGS = checkpoint_files.PixelSettings(16, 2, 2, (0.5,) * 3, (0.5,) * 3, 1024, 4096)


@pytest.fixture(scope="module")
def chat():
    return Chat.load(TINY / "qwen3_vl")


@pytest.fixture(scope="module")
def plain():
    """The same tokenizer without its special tokens: what ordinary text is."""
    content = json.loads((TINY / "qwen3_vl" / "tokenizer.json").read_text())
    content["added_tokens"] = [token for token in content["added_tokens"] if not token["special"]]
    return Tokenizer.from_str(json.dumps(content))


def folder_copy(tmp_path, family, *, without=()):
    folder = tmp_path / family
    folder.mkdir()
    for file in (TINY / family).iterdir():
        if file.suffix in (".json", ".jinja", ".txt") and file.name not in without:
            shutil.copy(file, folder)
    return folder


# Messages


def test_every_way_to_name_a_media_part():
    content = [
        {"type": "image", "image": "a.png"},
        {"image": "b.png", "max_pixels": 5000},
        {"type": "image_url", "image_url": {"url": "c.png"}},
        {"image_url": "d.png"},
        {"type": "video", "video": "e.mp4", "fps": 1.5, "max_frames": 8},
        {"video_url": {"url": "f.mp4"}},
        {"type": "image", "url": "g.png"},
        {"type": "video", "path": Path("h.mp4")},
        {"text": "what?"},
    ]
    normal, media = normalise_messages([{"role": "user", "content": content}])
    assert [str(part.source)[0] for part in media] == list("abcdefgh")
    assert [part.kind for part in media] == ["image"] * 4 + ["video"] * 2 + ["image", "video"]
    assert media[1].overrides == {"max_pixels": 5000} and media[4].overrides == {"fps": 1.5, "max_frames": 8}
    assert [part["type"] for part in normal[0]["content"]] == [part.kind for part in media] + ["text"]
    assert "a.png" not in str(normal)
    options = MediaOptions(fps=2.0, max_pixels=7).with_overrides(media[4])
    assert (options.fps, options.max_frames, options.max_pixels) == (1.5, 8, 7)


def test_messages_are_not_changed_in_place():
    message = {"role": "user", "content": [{"text": "<|im_end|>"}, {"image": "a.png"}]}
    normalise_messages([message])
    assert message == {"role": "user", "content": [{"text": "<|im_end|>"}, {"image": "a.png"}]}


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "non-empty list"),
        ("hello", "non-empty list"),
        (["hello"], r"messages\[0\] must be an object"),
        ([{"role": "usr", "content": "x"}], "unknown role 'usr'.*did you mean 'user'.*allowed: system"),
        ([{"content": "x"}], "unknown role None"),
        ([{"role": "user"}], r"messages\[0\].content must be a string or a list of parts, got null"),
        ([{"role": "user", "content": 3}], "got 3"),
        ([{"role": "user", "content": [7]}], r"content\[0\] must be an object"),
        ([{"role": "user", "content": [{"type": "imge", "image": "a"}]}], "'imge'.*did you mean 'image'"),
        ([{"role": "user", "content": [{"words": "a"}]}], "no type"),
        ([{"role": "user", "content": [{"type": "text", "text": 3}]}], "text must be a string"),
        ([{"role": "user", "content": [{"type": "text", "txt": "a"}]}], "unknown key 'txt'.*did you mean 'text'"),
        ([{"role": "user", "content": [{"type": "image"}]}], "the image is missing"),
        ([{"role": "user", "content": [{"type": "image", "image": ""}]}], "image is empty"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"link": "a"}}]}], "unknown key 'link'"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "is empty"),
        ([{"role": "user", "content": [{"video": "a", "fps": 0}]}], "fps must be a number from 0.001 to 10000, got 0"),
        ([{"role": "user", "content": [{"image": "a", "fps": 1}]}], "unknown key 'fps'"),
    ],
)
def test_wrong_messages(messages, says):
    with pytest.raises(UserError, match=says):
        normalise_messages(messages)


def test_fps_and_num_frames_exclude_each_other():
    with pytest.raises(UserError, match="exclude each other"):
        normalise_messages([{"role": "user", "content": [{"video": "a.mp4", "fps": 1, "num_frames": 4}]}])
    # What a part says replaces the other of the two where the recipe has it.
    part = MediaPart("video", "a.mp4", "messages[0].content[0]", {"fps": 1})
    assert MediaOptions(num_frames=4).with_overrides(part).num_frames is None


# Special tokens in users' text


def specials_of(chat, token_ids):
    return [token for token in token_ids if token in chat.special.ids.values()]


def token_ids_of(chat, messages, **kwargs):
    return encode_pieces(chat.tokenizer, chat.render(messages, **kwargs))[0]


FRAGMENTS = [
    *("<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|endoftext|>"),
    *("<|im_", "start|>", "<", "<|", "|>", "<<|im_start|>", "<|im_<|im_end|>start|>", "<|vision_pad|"),
    *(
        " a",
        "colour",
        "\n",
        "\n\n",
        "  ",
        "0.3 seconds",
        "é",
        "日本",
        "🙂",
        "\U000f0000",
        "\U000f0001",
        "<think>",
        "'s",
    ),
]


def random_text(choose):
    return "".join(choose.choice(FRAGMENTS) for _ in range(choose.randint(0, 8)))


def test_a_user_cannot_write_special_tokens(chat, plain):
    choose = random.Random(0)
    harmless = [{"role": "user", "content": [{"type": "text", "text": "x"}]}, {"role": "assistant", "content": "x"}]
    frame = specials_of(chat, token_ids_of(chat, harmless))
    for _ in range(300):
        parts = [{"type": "text", "text": random_text(choose)} for _ in range(choose.randint(1, 3))]
        messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": random_text(choose)}]
        token_ids = token_ids_of(chat, messages)
        assert specials_of(chat, token_ids) == frame
        words = "".join(part["text"] for part in parts)
        assert chat.tokenizer.decode(token_ids) == (
            f"<|im_start|>user\n{words}<|im_end|>\n"
            f"<|im_start|>assistant\n{messages[1]['content']}<|im_end|>\n<|im_start|>assistant\n"
        )
        run = chat.tokenizer.convert_ids_to_tokens(token_ids[1 : token_ids.index(frame[1])])
        assert run == plain.encode(f"user\n{words}").tokens


def test_text_without_special_tokens_is_tokenized_as_a_whole(chat):
    choose = random.Random(1)
    for _ in range(300):
        words = random_text(choose)
        if any(token in words for token in chat.special.ids):
            continue
        messages = [{"role": "user", "content": words}]
        whole = chat.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert token_ids_of(chat, messages) == whole


def test_special_tokens_in_tools_and_calls(chat):
    call = {"type": "function", "function": {"name": "f<|im_end|>", "arguments": {"<|im_start|>": "<|image_pad|>"}}}
    messages = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "</tool_response><|im_end|>"},
    ]
    tool = {"type": "function", "function": {"name": "f", "description": "<|im_end|>", "parameters": {}}}
    text = chat.tokenizer.decode(token_ids_of(chat, messages, tools=[tool]))
    assert text.count("<|im_end|>") == 3 + 4 and '{"<|im_start|>": "<|image_pad|>"}' in text
    starts = chat.special.ids["<|im_start|>"], chat.special.ids["<|im_end|>"]
    specials = specials_of(chat, token_ids_of(chat, messages, tools=[tool]))
    assert specials == [*starts] * 4 + [starts[0]]


def test_the_template_still_sees_the_users_text():
    """Only the first character of a special token is hidden from it, so its own searches work."""
    special = SpecialTokens({"<|a|>": 1})
    stand_ins = special.stand_ins("x</think>y<|a|>")
    marked = special.mark("x</think>y<|a|>", stand_ins)
    assert marked.startswith("x</think>y") and marked.endswith("|a|>") and "<|a|>" not in marked
    assert special.split(marked + "<|a|>", stand_ins) == ["x</think>y<|a|>", 1]
    assert special.stand_ins("nothing to hide <", "b") is not None  # could become one beside another string
    assert special.stand_ins("nothing to hide < at all") is None


def test_what_a_template_cannot_render(chat):
    with pytest.raises(UserError, match="chat_template_kwargs may not set 'tokenize'"):
        chat.render([{"role": "user", "content": "x"}], template_kwargs={"tokenize": True})
    refusing = Chat(chat.tokenizer, "{{ raise_exception('only one user message') }}")
    with pytest.raises(UserError, match="only one user message"):
        refusing.render([{"role": "user", "content": "x"}])
    tool = {"type": "function", "function": {"name": "look"}}
    with pytest.raises(UserError, match="1 tools were given, but this checkpoint's chat template takes none"):
        Chat.load(TINY / "qwen2_5_vl").render([{"role": "user", "content": "x"}], tools=[tool])
    with pytest.raises(UserError, match=r"tools\[0\] must be a JSON schema"):
        chat.render([{"role": "user", "content": "x"}], tools=["look"])


# Placeholders and spans

TOKENS = VisionTokens(image=1, video=2, start=3, end=4)


def item(kind, grid):
    return MediaItem(kind, b"", None, grid, grid[0] * grid[1] * grid[2] // 4)


def frames(index, media):
    return ["<0.0 seconds>", 3, Fill(index, media.num_tokens, 2), 4]


def test_a_video_takes_the_place_of_its_pair():
    pieces = ["a", 3, 2, 4, "b", 2, 4]
    media = [item("video", (1, 2, 2)), item("video", (1, 2, 4))]
    first, second = frames(0, media[0]), frames(1, media[1])
    expanded = expand_media(pieces, media, TOKENS, frames, replace_video_pair=True)
    assert expanded == ["a", *first, "b", *second, 4]  # the second has no pair to replace
    expanded = expand_media(pieces, media, TOKENS, frames, replace_video_pair=False)
    assert expanded == ["a", 3, *first, 4, "b", *second, 4]


def test_neighbouring_texts_are_tokenized_together(chat, plain):
    token_ids, spans = encode_pieces(chat.tokenizer, ["Look:", "<0.3 seconds>", 495, Fill(0, 3, 499), 496, "Look:"])
    text = plain.encode("Look:<0.3 seconds>").ids
    assert token_ids == [*text, 495, 499, 499, 499, 496, *plain.encode("Look:").ids]
    assert spans == (Span(len(text) + 1, 3, 0, 0),)


@pytest.mark.parametrize(
    ("pieces", "kinds", "says"),
    [
        (["a"], ["image"], "1 pictures and videos are given, but the prompt has 0 placeholders; the chat template"),
        (["a", 1, 1], ["image"], "has 2 placeholders; give one picture"),
        (["a", 1, 2], ["video", "image"], "asks for image, video in this order, but video, image are given"),
    ],
)
def test_placeholders_and_media_must_agree(pieces, kinds, says):
    parts = [MediaPart(kind, "a", "messages[0].content[0]") for kind in kinds]
    with pytest.raises(UserError, match=says):
        check_media(pieces, parts, TOKENS)


def test_place_spans_of_nothing_but_text():
    positions, delta = place_spans(5, (), ())
    np.testing.assert_array_equal(positions, np.tile(np.arange(5), (3, 1)))
    assert delta == 0


# Media items


def test_equal_pixels_have_equal_digests_and_others_not():
    pixels = torch.randint(0, 256, (2, 3, 32, 64), dtype=torch.uint8)
    grid = (1, 2, 4)
    base = media_digest("video", pixels, grid, SETTINGS)
    assert base == media_digest("video", pixels.clone(), grid, SETTINGS) and len(base) == 16
    strided = pixels.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert base == media_digest("video", strided, grid, SETTINGS)
    changed = pixels.clone()
    changed[1, 2, 31, 63] ^= 1
    others = [
        media_digest("video", changed, grid, SETTINGS),
        media_digest("image", pixels, grid, SETTINGS),
        media_digest("video", pixels, grid, SETTINGS, 1.0),
        media_digest("video", pixels.view(2, 3, 64, 32), (1, 4, 2), SETTINGS),
        media_digest("video", pixels, grid, checkpoint_files.PixelSettings(16, 2, 2, (0.4,) * 3, (0.5,) * 3, 0, 0)),
    ]
    assert len({base, *others}) == 6


def test_media_items_count_their_tokens_and_fill_the_last_patch():
    clip = make_media_item(
        "video", torch.zeros(3, 3, 32, 96, dtype=torch.uint8), SETTINGS, timestamps_s=(0.0, 0.5, 1.0)
    )
    assert clip.pixels.shape[0] == 4 and clip.grid_thw == (2, 2, 6) and clip.num_tokens == 6
    assert clip.timestamps_s == (0.0, 0.5, 1.0)
    picture = make_media_item("image", torch.zeros(1, 3, 32, 96, dtype=torch.uint8), SETTINGS)
    assert picture.pixels.shape[0] == 1 and picture.grid_thw == (1, 2, 6) and picture.num_tokens == 3


# Checkpoint folders


def test_tokenizer_from_vocabulary_and_merges(tmp_path, chat):
    folder = folder_copy(tmp_path, "qwen3_vl", without=("tokenizer.json",))
    pair = checkpoint_files.load_tokenizer(folder)
    text = "How many circles?\n<|im_start|> <tool_call>  é日本 12's"
    assert pair(text)["input_ids"] == chat.tokenizer(text)["input_ids"]
    assert SpecialTokens.of(pair).ids == chat.special.ids


def test_chat_template_where_checkpoints_keep_it(tmp_path, chat):
    folder = folder_copy(tmp_path, "qwen3_vl")
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "from json"}))
    assert checkpoint_files.load_chat_template(folder, chat.tokenizer) == chat.template
    (folder / "chat_template.jinja").unlink()
    assert checkpoint_files.load_chat_template(folder, chat.tokenizer) == "from json"
    (folder / "chat_template.json").unlink()
    bare = checkpoint_files.load_tokenizer(folder)
    bare.chat_template = None
    with pytest.raises(UserError, match="has no chat template: neither chat_template.jinja"):
        checkpoint_files.load_chat_template(folder, bare)
    bare.chat_template = {"default": "named", "tool_use": "other"}
    assert checkpoint_files.load_chat_template(folder, bare) == "named"


@pytest.mark.parametrize(
    ("generation", "config", "wanted"),
    [
        ({"eos_token_id": [7, 8]}, {"eos_token_id": 3}, (7, 8)),
        ({"eos_token_id": 7}, {}, (7,)),
        ({}, {"eos_token_id": 3}, (3,)),
        (None, {"text_config": {"eos_token_id": 4}}, (4,)),
        (None, {}, (488,)),
        ({"eos_token_id": 0}, {"eos_token_id": 3}, (0,)),
    ],
)
def test_eos_token_ids(tmp_path, chat, generation, config, wanted):
    (tmp_path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert read_eos_token_ids(tmp_path, chat.tokenizer, 512) == wanted


def test_incomplete_folders(tmp_path):
    with pytest.raises(UserError, match="is not a folder"):
        checkpoint_files.load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(UserError, match="has no tokenizer: neither tokenizer.json nor vocab.json"):
        checkpoint_files.load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="has no preprocessor_config.json"):
        checkpoint_files.read_pixel_settings(tmp_path, {})
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        checkpoint_files.read_pixel_settings(tmp_path, {})
    (tmp_path / "preprocessor_config.json").write_text("[]")
    with pytest.raises(UserError, match="must hold a JSON object, got list"):
        checkpoint_files.read_pixel_settings(tmp_path, {})


def test_token_ids_of_another_checkpoint(chat):
    with pytest.raises(UserError, match="image_token_id=151655, which is no special token"):
        VisionTokens.read({"image_token_id": 151655}, chat.tokenizer)


def test_text_alone_loads_no_vision_code():
    code = (
        "import sys; from models.qwen3_vl.processor import Processor as A;"
        "from models.qwen2_5_vl.processor import Processor as B;"
        "A('models/tiny/qwen3_vl').build([{'role': 'user', 'content': 'Hello'}]);"
        "B('models/tiny/qwen2_5_vl').build_text('Hello');"
        "print([name for name in sys.modules if name.startswith(('executor.media', 'av', 'torchvision', 'PIL.Jpeg'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
