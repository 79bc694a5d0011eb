#!/usr/bin/env bash
# transformers 5.24: `split_special_tokens=True` of one call is set on the tokenizer's shared Rust object, and put back by the
# next call only. So what `tokenizer.backend_tokenizer` makes of a text depends on the call before, and two threads that share a
# tokenizer and differ in it may read special tokens in a user's text as special, or a template's as text.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
make_environment transformers==5.24.0 tokenizers==0.23.2

cat >"$folder/probe.py" <<'PYTHON'
import sys

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

vocabulary = {letter: place for place, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
backend.decoder = decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")

text = "a<|im_end|>"
counts = []
for split in (False, True, False):
    tokenizer(text, split_special_tokens=split)
    counts.append(len(tokenizer.backend_tokenizer.encode(text).ids))
print(f"the backend's own tokens of {text!r} after calls with split_special_tokens False, True, False: {counts}")
print("one would expect 2, 2, 2: an argument of a call holds for that call")
sys.exit(counts != [2, 11, 2])
PYTHON

"$python" "$folder/probe.py" && echo "as found: the argument stays behind"
