#!/usr/bin/env bash
# Guess: a GGUF's `rope.scaling.finetuned` says how a model came to its context, as ggml's gguf.md has
# it; set or not, it changes no number where nothing is scaled
# What happens: of architecture granite llama.cpp takes false for "no rotary positions": the same
# weights give other log probabilities, those of a model that does not know the order of its tokens.
# Of architecture llama the key changes nothing
# Seen: xllamacpp 2026.10.11549 (llama.cpp of 2026-10), gguf 0.19.0, on a CPU, 2026-11-30
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
    xllamacpp==2026.10.11549 gguf==0.19.0 numpy==2.4.6 2>"$work/pip.log" || { cat "$work/pip.log"; exit 77; }
cat >"$work/see.py" <<'SEE'
import sys

import gguf
import numpy as np
import xllamacpp


def write(path, architecture, finetuned):
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(8)
    writer.add_logit_scale(1.0)
    if finetuned is not None:
        writer.add_rope_scaling_finetuned(finetuned)
    # A byte's token is one character; which bytes stand for themselves, GPT-2's table says.
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    tokens = [chr(byte if byte in own else next(others)) for byte in range(256)] + ["<end>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 256 + [3])
    writer.add_array("tokenizer.ggml.merges", ["a b"])
    writer.add_eos_token_id(256)
    writer.add_bos_token_id(256)
    random = np.random.default_rng(0)
    shapes = {"token_embd": (257, 32), "output": (257, 32)}
    for layer in range(2):
        rows = {"attn_q": 32, "attn_k": 16, "attn_v": 16, "attn_output": 32, "ffn_gate": 48}
        shapes |= {f"blk.{layer}.{name}": (count, 32) for name, count in rows.items()}
        shapes |= {f"blk.{layer}.ffn_up": (48, 32), f"blk.{layer}.ffn_down": (32, 48)}
        shapes |= dict.fromkeys([f"blk.{layer}.attn_norm", f"blk.{layer}.ffn_norm"], (32,))
    for name, shape in {**shapes, "output_norm": (32,)}.items():
        values = random.normal(0, 0.3, shape).astype(np.float32) + (len(shape) == 1)
        writer.add_tensor(f"{name}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def log_probabilities(path, prompt):
    asked = xllamacpp.CommonParams()
    asked.model.path, asked.n_ctx, asked.n_parallel = path, 64, 1
    asked.warmup = asked.fit_params = False
    answer = xllamacpp.Server(asked).handle_completions(
        {"prompt": prompt, "n_predict": 1, "n_probs": 257, "logit_bias": [[97, 1000.0]]}
    )
    top = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    return np.array([one["logprob"] for one in sorted(top, key=lambda one: one["id"])])


moved = {}
for architecture in ("granite", "llama"):
    found = []
    for finetuned in (None, False, True):
        path = f"{sys.argv[1]}/{architecture}-{finetuned}.gguf"
        write(path, architecture, finetuned)
        found.append([log_probabilities(path, p) for p in ([5, 6, 7, 8], [7, 5, 6, 8])])
    moved[architecture] = np.abs(found[1][0] - found[0][0]).max() > 1e-3
    print(f"{architecture}: finetuned=false moves log probabilities by "
          f"{np.abs(found[1][0] - found[0][0]).max():.2g}, true by "
          f"{np.abs(found[2][0] - found[0][0]).max():.2g}")
raise SystemExit(0 if moved == {"granite": True, "llama": False} else 1)
SEE
mkdir "$work/model"
"$work/venv/bin/python" "$work/see.py" "$work/model" 2>/dev/null
