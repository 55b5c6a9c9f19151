#!/usr/bin/env bash
# Guess: a token that the mask of a grammar allows can be consumed next
# What happens: where quoted text of a grammar is that of an added token (<tool_call>, added as Qwen's
# tokenizers have it, not even as a special one), the mask allows that token alone, and consume_token
# refuses it; the output has no way on. Only named as a token, <[257]>, it can be passed
# Seen: llguidance 1.9.1, tokenizers 0.23.3, on a CPU, 2026-11-30
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
python=""
for name in python3.13 python3.12 python3.11 "$HOME"/.pyenv/versions/3.*/bin/python; do
    if [ -z "$python" ] && "$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
        python="$name"
    fi
done
[ -n "$python" ] || { echo "no Python 3.11 to 3.13 here"; exit 77; }
"$python" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    llguidance==1.9.1 tokenizers==0.23.3 numpy==2.3.5 2>"$work/pip.log" || { cat "$work/pip.log"; exit 77; }
cat >"$work/see.py" <<'SEE'
import numpy as np
from llguidance import LLMatcher, LLTokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
letters = {byte: chr(byte) for byte in visible}
hidden = [byte for byte in range(256) if byte not in letters]
letters |= {byte: chr(256 + place) for place, byte in enumerate(hidden)}
backend = Tokenizer(models.BPE(vocab={c: byte for byte, c in letters.items()}, merges=[]))
backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
backend.decoder = decoders.ByteLevel()
backend.add_special_tokens([AddedToken("<end>", special=True)])
backend.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
tokenizer = LLTokenizer(backend.to_str(), eos_token=256)


def tried(grammar):
    matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_lark(grammar), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    mask = allocate_token_bitmask(1, tokenizer.vocab_size)
    fill_next_token_bitmask(matcher, mask)
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little")[: tokenizer.vocab_size]
    allowed = np.flatnonzero(bits).tolist()
    taken = matcher.consume_token(257)
    print(f"{grammar}: the mask allows {allowed}, 257 is taken: {taken}")
    return allowed, taken


found = [tried('start: "<tool_call>" "a"'), tried('start: <[257]> "a"')]
raise SystemExit(0 if found == [([257], False), ([257], True)] else 1)
SEE
JAX_PLATFORMS=cpu "$work/venv/bin/python" "$work/see.py"
