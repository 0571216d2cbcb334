"""GGUF files written by the gguf package itself, in every quantisation that is read."""

import gguf
import jax
import numpy as np
import pytest

from jaxml.lm import decoder, tokenizer
from jaxml.lm import gguf as ours
from jaxml.lm.tensors import disassemble, tensor_names
from jaxml.testing import tiny_config

Q = gguf.GGMLQuantizationType
CONFIG = tiny_config(width=256, num_heads=4, num_kv_heads=2, head_dim=64, hidden_dim=256, norm_eps=1e-5)


def interleave(w, head_dim):
    """Halves to pairs side by side: what llama.cpp's converter does to query and key."""
    heads = w.shape[0] // head_dim
    return w.reshape(heads, 2, head_dim // 2, -1).swapaxes(1, 2).reshape(w.shape)


def write(path, params, kind=Q.F32, extra=(), drop=()):
    writer = gguf.GGUFWriter(str(path), "llama")
    c = CONFIG
    writer.add_context_length(c.max_length)
    writer.add_embedding_length(c.width)
    writer.add_block_count(c.num_layers)
    writer.add_feed_forward_length(c.hidden_dim)
    writer.add_head_count(c.num_heads)
    writer.add_head_count_kv(c.num_kv_heads)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_vocab_size(c.vocab_size)
    for key, value in extra:
        writer.add_string(key, value)
    for name, array in disassemble(params, c, "gguf"):
        if name in drop:
            continue
        if name.endswith(("attn_q.weight", "attn_k.weight")):
            array = interleave(array, c.head_dim)
        how = kind if array.ndim == 2 else Q.F32
        if how in (Q.Q4_K, Q.Q6_K):  # the package quantises only the simple kinds: any bytes are valid blocks
            block, size = gguf.GGML_QUANT_SIZES[how]
            data = np.random.default_rng(0).integers(0, 255, (array.shape[0], array.shape[1] // block * size))
            data = data.astype(np.uint8)
            data.reshape(-1, size)[:, -2 if how == Q.Q6_K else 0 :][:, : 2 if how == Q.Q6_K else 4] = 1
            writer.add_tensor(name, data, raw_dtype=how)
        else:
            writer.add_tensor(name, gguf.quants.quantize(array, how), raw_dtype=how)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def params():
    return decoder.init(jax.random.key(0), CONFIG)


@pytest.mark.parametrize(
    "kind, error", [("F32", 0), ("F16", 1e-3), ("BF16", 1e-2), ("Q8_0", 1e-2), ("Q4_0", 0.2), ("Q4_1", 0.2)]
)
def test_reads_back_what_was_written(params, tmp_path, kind, error):
    again, config, _ = ours.read(write(tmp_path / "m.gguf", params, Q[kind]))
    assert config.num_layers == 2 and config.tied_embeddings
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(a, b, atol=error * float(np.abs(b).max()))


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K"])
def test_k_quantised_blocks_become_the_numbers_of_the_gguf_package(params, tmp_path, kind):
    path = write(tmp_path / "m.gguf", params, Q[kind])
    again, _, _ = ours.read(path)
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.1.ffn_down.weight")
    expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    np.testing.assert_array_equal(again["layers"]["down"][1], expected.T)
    assert np.isfinite(expected).all() and np.unique(expected).size > 4


def test_query_and_key_are_put_back_from_pairs_to_halves(params, tmp_path):
    again, _, _ = ours.read(write(tmp_path / "m.gguf", params))
    np.testing.assert_array_equal(again["layers"]["q"], params["layers"]["q"])


def test_what_is_wrong_with_a_file_is_a_sentence(params, tmp_path):
    path = write(tmp_path / "m.gguf", params)
    whole = path.read_bytes()
    for size in (len(whole) - 1000, 2000, 300, 10, 0):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"whole GGUF file|truncated"):
            ours.read(path)
    with pytest.raises(ValueError, match=r"blk\.0\.ffn_up\.weight"):
        ours.read(write(tmp_path / "a.gguf", params, drop=["blk.0.ffn_up.weight"]))
    with pytest.raises(ValueError, match=r"llama\.frobnicate"):
        ours.read(write(tmp_path / "b.gguf", params, extra=[("llama.frobnicate", "x")]))
    with pytest.raises(FileNotFoundError):
        ours.read(tmp_path / "none.gguf")


def test_every_tensor_has_its_own_name():
    names = list(tensor_names(CONFIG, "gguf").values())
    assert len(names) == len(set(names))


def test_smollm2_tokenizes_as_its_authors_say(smollm2):
    t = smollm2.tokenizer
    assert t.encode("What is the capital of France?") == [1780, 314, 260, 3575, 282, 4649, 47]
    for text in ("In 2024, 17 cats!", "naïve café — 東京 🙂", "  spaces\n\n\ttabs", "<|im_start|>user\nhi<|im_end|>"):
        assert t.decode(t.encode(text), skip_special=False) == text
    assert t.encode("<|im_start|>") == [1] and t.encode("123") == t.encode("1") + t.encode("2") + t.encode("3")


def test_a_sentencepiece_vocabulary_merges_by_score():
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    words = ["▁", "a", "b", "c", "ab", "▁ab", "bc"]
    scores = [0.0] * len(pieces) + [-9.0, -9.0, -9.0, -9.0, -1.0, -3.0, -2.0]
    types = [2, 3, 3] + [6] * 256 + [1] * len(words)
    t = tokenizer.from_gguf(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": pieces + words,
            "tokenizer.ggml.scores": scores,
            "tokenizer.ggml.token_type": types,
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
        }
    )
    spell = lambda text: [t.token(i) for i in t.encode(text)]
    assert spell("abc") == ["▁ab", "c"]  # "ab" scores higher than "bc"
    assert spell("bc") == ["▁", "bc"]
    assert t.decode(t.encode("abc é")) == "abc é"  # bytes where there is no piece
    assert t.encode("abc", bos=True)[0] == 1


def test_an_unknown_tokenizer_is_refused_by_name():
    with pytest.raises(ValueError, match="unigram"):
        tokenizer.from_gguf({"tokenizer.ggml.model": "unigram"})
    with pytest.raises(ValueError, match="deepseek-coder"):
        tokenizer.from_gguf(
            {
                "tokenizer.ggml.model": "gpt2",
                "tokenizer.ggml.pre": "deepseek-coder",
                "tokenizer.ggml.tokens": ["a"],
                "tokenizer.ggml.merges": [],
            }
        )
