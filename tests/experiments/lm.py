# SPDX-License-Identifier: Apache-2.0
"""Runs the sparge-lm program as a user would: python3 lm.py PATH-OF-SPARGE-LM [PATH-OF-SPARGE
[TEST...]]

The models are tiny, made here, of random weights (tiny_model.py); what the program computes is
compared with a forward pass in float64, its tokens with the package tokenizers. With the weights of
SmolLM2 (experiments/lm/get_model.sh; or a path in SPARGE_LM_MODEL) there are some checks more. Ends
with "N passed, M failed", and which of those ran.
"""
import csv
import glob
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import unicodedata

# Many small products: threads that wait for each other are slower than one, and more so on a busy
# machine.
os.environ.update(OPENBLAS_NUM_THREADS="1", OMP_WAIT_POLICY="passive")
import numpy as np
del os.environ["OPENBLAS_NUM_THREADS"]
from safetensors.numpy import load_file
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, trainers

sys.path.append(os.path.join(os.path.dirname(__file__), "../support"))
from counted import check, run_tests
from running import (FILE, FINE, MACHINE, UNFINISHED, UNSUPPORTED, USAGE, at_work, commands_of,
                     ended, explained, full_device, ignored, listing, read, save,
                     save_safetensors, sha256, stopped, watched, write)
from tiny_model import GGML, Model, gguf_bytes, surprise, theirs

PROGRAM = os.path.abspath(sys.argv[1])
SPARGE = os.path.abspath(sys.argv[2]) if len(sys.argv) > 2 else None
lm, fine, wrong, keeps = commands_of(PROGRAM, "sparge-lm")
ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
CAPTURE = os.path.join(ROOT, "experiments", "capture")
TEXT = os.path.join(CAPTURE, "text.txt")
REAL = os.environ.get("SPARGE_LM_MODEL") or os.path.join(ROOT, "build", "models",
                                                         "SmolLM2-135M-Instruct.Q4_1.gguf")

# Of the logits' spread. float32 has 6e-8; a few hundred sums of products and two layers make some
# 1e-6 of it.
EXACT = 2e-5


def logits_of(path, text, *args):
    """The one row of ppl, and the logits."""
    x = fine("ppl", path, text, "--logits", "L.npy", *args)
    return x["rows"][0], np.load("L.npy")


def apart(got, want):
    """Their largest difference, of the spread of what is wanted."""
    return np.abs(got - want).max() / want.std() if got.shape == want.shape else np.inf


def some_tokens(n=300, vocab=600, seed=3, name="t.npy", dtype=np.int32):
    token = np.random.default_rng(seed).integers(0, vocab, n)
    save(name, token.astype(dtype))
    return token


# ---- Tokens ----------------------------------------------------------------------------------

LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s|"
          r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def splitter_of(kind):
    """As the tokenizer.json of such models has it."""
    bytes_of = lambda cut: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut)
    if kind == "gpt-2":
        return bytes_of(True)
    if kind == "smollm":
        return pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True),
             bytes_of(True)])
    cut = pre_tokenizers.Split(Regex(LLAMA3 % {"llama-bpe": "{1,3}", "qwen2": ""}[kind]),
                               "isolated")
    return pre_tokenizers.Sequence([cut, bytes_of(False)])


KINDS = "smollm", "gpt-2", "llama-bpe", "qwen2"


class Bpe:
    """Trained on a text; or of a vocabulary and merges."""
    def __init__(self, text, size=600, kind="smollm", alphabet=True, more=()):
        trained = Tokenizer(models.BPE())
        trained.pre_tokenizer = splitter_of("gpt-2")
        letters = pre_tokenizers.ByteLevel.alphabet() if alphabet else []
        trained.train_from_iterator([text],
                                    trainers.BpeTrainer(vocab_size=size, initial_alphabet=letters,
                                                        show_progress=False,
                                                        special_tokens=["<|end|>"]))
        model = json.loads(trained.to_str())["model"]
        merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
        self.vocab = {
            **model["vocab"], **{token: len(model["vocab"]) + n for n, token in enumerate(more)}
        }
        self.merges = [tuple(m) for m in merges]
        self.at(kind)

    def at(self, kind):
        """The same with another splitter."""
        self.kind = kind
        self.reference = Tokenizer(models.BPE(vocab=self.vocab, merges=self.merges,
                                              ignore_merges=kind == "llama-bpe"))
        self.reference.pre_tokenizer = splitter_of(kind)
        return self

    def encode(self, text):
        return self.reference.encode(text, add_special_tokens=False).ids

    def keys(self, **more):
        return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": self.kind,
                "tokenizer.ggml.tokens": sorted(self.vocab, key=self.vocab.get),
                "tokenizer.ggml.merges": [" ".join(m) for m in self.merges], **more}


def small_bpe(**how):
    with open(TEXT, encoding="utf-8") as f:
        return Bpe(f.read(), **how)


# Where scripts are, and no later version of Unicode than 14 has added anything: PCRE2, tokenizers
# and this Python may each know another one.
RANGES = {
    "ASCII": (0x20, 0x7f), "Latin": (0xc0, 0x250), "Greek": (0x370, 0x400), "Cyrillic":
    (0x400, 0x530), "Hebrew": (0x591, 0x5f5), "Arabic": (0x600, 0x700), "Devanagari":
    (0x900, 0x980), "Bengali": (0x980, 0xa00), "Thai": (0xe01, 0xe5c), "Tibetan": (0xf00, 0xfdb),
    "Georgian": (0x10a0, 0x1100), "Ethiopic": (0x1200, 0x1380), "Khmer": (0x1780, 0x17fa),
    "punctuation": (0x2000, 0x2070), "super": (0x2070, 0x20c1), "letterlike": (0x2100, 0x2190),
    "arrows": (0x2190, 0x2300), "enclosed": (0x2460, 0x2500), "kana": (0x3041, 0x3100), "CJK":
    (0x4e00, 0x9ff0), "Hangul": (0xac00, 0xd7a4), "halves": (0xff01, 0xffef), "Gothic":
    (0x10330, 0x1034b), "maths": (0x1d400, 0x1d800), "emoji": (0x1f300, 0x1f650), "CJK B":
    (0x20000, 0x20100), "combining": (0x300, 0x370), "controls": (0x00, 0x20),
}
SPACES = [
    chr(x) for x in (9, 10, 11, 12, 13, 32, 0x85, 0xa0, 0x1680, 0x180e, *range(0x2000, 0x200c),
                     0x2028, 0x2029, 0x202f, 0x205f, 0x2060, 0x3000, 0xfeff)
]
PIECES = [
    "'s", "'S", "'re", "'LL", "'ſ", "'ſt", "'D", "\r\n", "\n\n", " \n", "\t\t", "   ", "\u200d",
    "👩\u200d🚀", "❤\ufe0f", "e\u0301", "１２３", "٣٤٥", "४२", "Ⅻ",
    "½", "²", "don't", "I'm", "<|end|>",
    "  x", " .", "...\n", "!?\r\n\r\n", "12345", "007", "_", "ß", "ǅ", "ʰ", "ª", "\u0e33", "שׁ",
    "\U000e0001", "\U0001f1e9\U0001f1ea", "Ġ", "K's"
]


def random_text(r, pools):
    parts = []
    for _ in range(r.randint(1, 12)):
        way = r.random()
        if way < 0.3:
            parts += r.choices(r.choice(pools), k=r.randint(1, 8))
        elif way < 0.5:
            parts += r.choices(SPACES, k=r.randint(1, 4))
        elif way < 0.6:
            parts.append(r.choice(r.choice(pools)) * r.randint(2, 40))
        elif way < 0.7:
            parts.append(" " * r.randint(1, 5))
        elif way < 0.8:
            parts += r.choices("0123456789", k=r.randint(1, 9))
        else:
            parts.append(r.choice(PIECES))
    return "".join(parts)


def test_tokens():
    """Random strings of many scripts, and pieces of text, in each splitter."""
    r = random.Random(5)
    pools = [[chr(x) for x in range(*ends) if unicodedata.category(chr(x)) not in ("Cn", "Cs")]
             for ends in RANGES.values()]
    real = read(TEXT)
    texts = [random_text(r, pools) for _ in range(1500)]
    texts += [real[at:at + r.randint(1, 2000)] for at in r.choices(range(len(real)), k=60)]
    texts += [
        x * n for x in ("a", " ", "\n", "=", "é", "漢", "7", "\r\n", " a", "👍", "\u3000", "a1")
        for n in (300, 5000)
    ]
    texts += SPACES + PIECES + [chr(x) for x in range(0x180)
                                ] + [a + b for a in PIECES for b in PIECES[::3]]
    texts = [x for x in texts if x]
    mixed = real + " ".join(random_text(r, pools) for _ in range(3000))
    bpe = Bpe(mixed, size=1500, more=["Ġzebra", "quite", "Ġ" * 130, "=" * 300, "1234"])
    texts += [
        "a zebra", " zebra", "quite", " quite", "zebra", " " * 130 + "a", " " * 131 + "a",
        "x " + "=" * 300, "1234", "a1234"
    ]
    tiny = Model(vocab=len(bpe.vocab), layers=1, dim=32, hidden=32, heads=1, kv_heads=1,
                 head_dim=32)
    names = [write(f"{n:04}.txt", x.encode()) for n, x in enumerate(texts)]
    for kind in KINDS:
        tiny.gguf("m.gguf", bpe.at(kind).keys())
        for first in range(0, len(texts), 64):
            part = slice(first, first + 64)
            got = fine("tokens", "m.gguf", *names[part])["texts"]
            check(len(got) == len(names[part]), kind, "a list for each")
            for x, name, text in zip(got, names[part], texts[part]):
                want = bpe.encode(text)
                check(x["tokens"] == want and x["count"] == len(want) and x["text"] == name,
                      f"{kind}: tokens of {text[:80]!r}",
                      x["tokens"][:40], want[:40])
    got = fine("tokens", "m.gguf", TEXT, "-o", "t.npy")
    explained("tokens", got)
    check(got["texts"][0]["count"] == len(bpe.encode(real)) and "tokens" not in got["texts"][0],
          "-o: no list", got)
    check(
        np.load("t.npy").dtype == np.int32 and np.load("t.npy").tolist() == bpe.encode(real),
        "-o: a .npy")
    check(
        fine("tokens", "m.gguf", "t.npy")["texts"][0]["tokens"] == bpe.encode(real),
        "numbers as they are")
    empty = write("empty.txt", "")  # as every file without a byte
    wrong(FILE, "empty.txt", "tokens", "m.gguf", empty)

    tiny.gguf("b.gguf", bpe.keys(**{"tokenizer.ggml.add_bos_token": True,
                                    "tokenizer.ggml.bos_token_id": np.uint32(5)}))
    check(
        fine("tokens", "b.gguf", names[3])["texts"][0]["tokens"] == [5] + bpe.encode(texts[3]),
        "bos is first")
    tiny.gguf("b.gguf", bpe.keys(**{"tokenizer.ggml.add_bos_token": False,
                                    "tokenizer.ggml.bos_token_id": np.uint32(5)}))
    check(
        fine("tokens", "b.gguf", names[3])["texts"][0]["tokens"] == bpe.encode(texts[3]), "no bos")
    for kind in KINDS:  # what is not said is so in files of Llama 3 alone
        tiny.gguf("b.gguf", bpe.at(kind).keys(**{"tokenizer.ggml.bos_token_id": np.uint32(5)}))
        got = fine("tokens", "b.gguf", names[3])["texts"][0]["tokens"]
        check(got == [5] * (kind == "llama-bpe") + bpe.encode(texts[3]), kind,
              "bos where nothing is said")
    for change, words in [({"tokenizer.ggml.add_bos_token": True}, ["no key", "bos_token_id"]),
                          ({"tokenizer.ggml.bos_token_id":
                            np.uint64(1 << 32)}, ["bos_token_id", "4294967296"]),
                          ({"tokenizer.ggml.bos_token_id":
                            np.uint32(len(bpe.vocab))}, ["token 0", "tiny"])]:
        tiny.gguf("b.gguf", bpe.at("llama-bpe").keys(**change))
        wrong(FILE, words, "tokens", "b.gguf", names[3])


def test_kept_whole():
    """Tokens that were added for users are taken as they are, before all else; those that control
    are text."""
    kept = ["<think>", "</think>", "<tool_call>", "é und ä", "xyzzy ", " ", "\n\n"]
    bpe = small_bpe(more=["<|im_start|>", "<odd>", *kept])
    ids = bpe.vocab
    types = [{"<|im_start|>": 3, "<odd>": 5, **dict.fromkeys(kept, 4)}.get(t, 1)
             for t in sorted(ids, key=ids.get)]
    tiny = Model(vocab=len(ids), layers=1, dim=32, hidden=32, heads=1, kv_heads=1, head_dim=32)
    r = random.Random(8)
    parts = [
        *kept, "<|im_start|>", "<odd>", "<thin", "k>", "a", " word", "é", "  ", "\n", "12", "'s"
    ]
    texts = [
        "<think>", "a<think>b", "<think><think></think>", "it's</think>'s", "<thin<think>k>",
        "aé und äb", "<|im_start|>"
    ]
    texts += ["".join(r.choices(parts, k=r.randint(1, 30))) for _ in range(200)]
    names = [write(f"{n:03}.txt", x.encode()) for n, x in enumerate(texts)]
    for kind in KINDS:
        keys = bpe.at(kind).keys(**{"tokenizer.ggml.token_type": [np.int32(t) for t in types]})
        bpe.reference.add_tokens([AddedToken(t, normalized=False) for t in kept])
        tiny.gguf("m.gguf", keys)
        for first in range(0, len(texts), 64):
            got = fine("tokens", "m.gguf", *names[first:first + 64])["texts"]
            for x, text in zip(got, texts[first:]):
                check(x["tokens"] == bpe.encode(text), f"{kind}: {text!r}", x["tokens"],
                      bpe.encode(text))
    # The longest of them comes first, wherever it stands: so llama.cpp, and not tokenizers.
    bpe = small_bpe(more=["xy", "yzz"])
    ids = bpe.vocab
    types = [np.uint32(4 if t in ("xy", "yzz") else 1) for t in sorted(ids, key=ids.get)]
    tiny.gguf("m.gguf", bpe.keys(**{"tokenizer.ggml.token_type": types}))
    check(fine("tokens", "m.gguf", write("o.txt", "xyzz xy"))["texts"][0]["tokens"] ==
          [*bpe.encode("x"), ids["yzz"], *bpe.encode(" "), ids["xy"]], "the longest first")
    tiny.gguf("m.gguf", bpe.keys(**{"tokenizer.ggml.token_type": types[1:]}))
    wrong(FILE, ["token_type", str(len(ids))], "tokens", "m.gguf", "o.txt")
    tiny.gguf("m.gguf", bpe.keys(**{"tokenizer.ggml.token_type": ["x"] * len(ids)}))
    wrong(FILE, "token_type", "tokens", "m.gguf", "o.txt")


def test_long_words():
    """A word of a megabyte, whose time would be days if it grew with the square."""
    bpe = small_bpe()
    tiny = Model(vocab=len(bpe.vocab), layers=1, dim=32, hidden=32, heads=1, kv_heads=1,
                 head_dim=32)
    r = random.Random(9)
    texts = [
        "".join(r.choices("abcdefghijklmnopqrstuvwxyzABCDEFGH",
                          k=1 << 20)), "".join(r.choices("ACGT", k=1 << 20)), "t" * (1 << 20),
        " " * (1 << 20), "ab" * (1 << 19), "".join(r.choices("=-+*/", k=1 << 19))
    ]
    for n, text in enumerate(texts):
        kind = KINDS[n % len(KINDS)]
        tiny.gguf("m.gguf", bpe.at(kind).keys())
        fine("tokens", "m.gguf", write("w.txt", text), "-o", "w.npy")
        check(np.load("w.npy").tolist() == bpe.encode(text), kind, text[:20])


def test_tokens_wrong():
    bpe = small_bpe(alphabet=False)
    tiny = Model(vocab=600, layers=1, dim=32, hidden=32, heads=1, kv_heads=1, head_dim=32)
    tiny.gguf("m.gguf", bpe.keys())
    write("a.txt", "a line\x07\n")
    wrong(FILE, ["a.txt", "byte 6", "0x07", "no token"], "tokens", "m.gguf", "a.txt")
    write("b.txt", "a\n" + "€")
    wrong(FILE, ["b.txt", "byte 2", "0xe2"], "tokens", "m.gguf", "b.txt")
    good = small_bpe()
    tiny.gguf("m.gguf", good.keys())
    for n, raw in enumerate([b"ab\xff", b"a\xc3", b"\xed\xa0\x80", b"abc\xf8\x88\x80\x80\x80",
                             b"x" * 5000 + b"\xc0\x80"]):
        at = [2, 1, 0, 3, 5000][n]
        for kind in "m.gguf", "q.gguf":
            tiny.gguf("q.gguf", good.at("qwen2").keys())
            wrong(FILE, ["c.txt", f"byte {at}", "UTF-8"], "tokens", kind, write("c.txt", raw))
    write("a.txt", "some text")
    for keys, words in [({}, "no byte-level BPE"),
                        ({**good.keys(), "tokenizer.ggml.pre": "viking"}, ["viking", "smollm"]),
                        ({**good.keys(), "tokenizer.ggml.model":
                          "llama"}, ["kind 'llama'", "byte-level BPE"]),
                        ({k: v for k, v in good.keys().items()
                          if k != "tokenizer.ggml.pre"}, ["tokenizer.ggml.pre", "smollm"]),
                        ({k: v for k, v in good.keys().items()
                          if "merges" not in k}, "no byte-level BPE")]:
        tiny.gguf("m.gguf", keys)
        wrong(UNSUPPORTED, ["tiny", ".npy", *([words] if isinstance(words, str) else words)],
              "tokens", "m.gguf", "a.txt")
        fine("tokens", "m.gguf", save("t.npy", np.arange(5, dtype=np.int32)))
    for merge in "nospace", "x zzzzz", "zzz a", "", " ", "t " + "a" * 2000:
        tiny.gguf("m.gguf", {
            **good.keys(), "tokenizer.ggml.merges":
            good.keys()["tokenizer.ggml.merges"][:3] + [merge]
        })
        wrong(FILE, ["tiny", "merge 3"], "tokens", "m.gguf", "a.txt")
    wrong(USAGE, "a text", "tokens", "m.gguf")
    tiny.gguf("m.gguf", good.keys())
    wrong(USAGE, "one text", "tokens", "m.gguf", "a.txt", "a.txt", "-o", "o.npy")
    wrong(FILE, "nowhere.txt", "tokens", "m.gguf", "nowhere.txt")


# ---- The forward pass ------------------------------------------------------------------------

def agrees(model, path, what, n=300, dtype=np.int32):
    token = some_tokens(n, model.vocab, name="t.npy", dtype=dtype)
    want = model.run(token)[0]
    row, got = logits_of(path, "t.npy", "--attention", "f32")
    check(got.dtype == np.float32 and apart(got, want) < EXACT, f"{what}: logits", apart(got, want))
    check(
        abs(row["perplexity"] / np.exp(surprise(want, token)) - 1) < 1e-5, f"{what}: perplexity",
        row, np.exp(surprise(want, token)))
    check(abs(row["surprise"] / surprise(want, token) / (n - 1) - 1) < 1e-5, f"{what}: surprise")
    check(row["tokens"] == n and row["sparsity"] == 0, f"{what}: dense", row)


MIXED = {
    "attn_q": "Q8_0", "attn_k": "Q4_0", "attn_v": "Q4_1", "attn_output": "F16", "ffn_gate": "BF16",
    "ffn_down": "Q6_K", "output.weight": "Q8_0", "token_embd": "Q4_0"
}


def test_gguf():
    for tied in False, True:
        agrees(m := Model(interleaved=True, tied=tied), m.gguf("m.gguf"), f"llama, tied {tied}")
    for kind in GGML:
        m = Model(seed=7, interleaved=True, usual=kind, dim=256, hidden=256, head_dim=64, layers=1,
                  vocab=520)
        agrees(m, m.gguf("m.gguf"), kind, n=140)
    m = Model(seed=2, interleaved=True, hidden=256, kinds=MIXED, name="mixed")
    agrees(m, m.gguf("m.gguf"), "all types in one file")
    agrees(m, m.gguf("m.gguf", version=2), "version 2")
    for alignment in 1, 8, 4096:
        agrees(m, m.gguf("m.gguf", alignment=alignment), f"alignment {alignment}", dtype=np.int64)
    agrees(m := Model(seed=3, architecture="qwen2", theta=1e6, eps=1e-6), m.gguf("m.gguf"), "qwen2")
    m = Model(seed=4, architecture="qwen2", interleaved=False, tied=True, kinds=MIXED, hidden=256)
    agrees(m, m.gguf("m.gguf"), "qwen2 of blocks")
    divisors = 1 + np.random.default_rng(0).random(8) * 7
    agrees(m := Model(seed=5, interleaved=True, divisors=divisors, theta=5e5), m.gguf("m.gguf"),
           "rope_freqs")
    m = Model(seed=6, interleaved=True, heads=6, kv_heads=3, head_dim=20, layers=3)
    agrees(m, m.gguf("m.gguf"), "heads that are wider than the model")
    m = Model(seed=6, interleaved=True, heads=3, kv_heads=1, dim=60, head_dim=20, hidden=33)
    m.gguf("m.gguf", change={"llama.attention.key_length": None, "some.text": "x" * 3000})
    agrees(m, "m.gguf", "odd sizes, and head_dim from dim")
    m = Model(seed=6, interleaved=True, heads=2, kv_heads=2, head_dim=32)
    agrees(m, m.gguf("m.gguf", change={"llama.attention.head_count_kv": None}),
           "as many key heads as heads")
    m = Model(seed=8, interleaved=True, theta=10000.0, eps=0.5)
    agrees(m, m.gguf("m.gguf", change={"llama.rope.freq_base": None}),
           "theta by default, a large epsilon")
    m.gguf(
        "m.gguf", change={
            "llama.block_count": np.uint64(2), "llama.context_length": np.uint16(300),
            "llama.feed_forward_length": np.int32(96), "llama.attention.head_count": np.uint8(4)
        })
    agrees(m, "m.gguf", "whole numbers of other sizes, and all of the context")
    agrees(m, m.gguf("m.gguf"), "more rows than are held at a time", n=1100)


def test_folder():
    for kind in "F32", "F16", "BF16":
        agrees(m := Model(seed=9, usual=kind), m.folder(kind), f"folder of {kind}")
    agrees(m := Model(seed=10, tied=True), m.folder("tied"), "tied")
    agrees(m := Model(seed=11, architecture="qwen2", theta=1e6), m.folder("qwen2", shards=3),
           "qwen2, in three files")
    m = Model(seed=12, heads=4, kv_heads=4)
    agrees(m, m.folder("d", {"num_key_value_heads": ..., "head_dim": ..., "rope_theta": ...}),
           "what may be missing")
    m = Model(seed=13, theta=250000.0)
    five = {"rope_theta": ..., "rope_parameters": {"rope_theta": 250000.0, "rope_type": "default"}}
    agrees(m, m.folder("five", five), "theta as in transformers 5")
    agrees(m, m.folder("null", {"rope_scaling": None, "head_dim": None}), "null")

    # Llama 3.1: https://github.com/meta-llama/llama-models, apply_scaling, in wavelengths.
    scaling = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=256)
    m = Model(seed=14, theta=5e5, head_dim=32)
    divisor = []
    for frequency in m.theta ** (-np.arange(0, 32, 2) / 32):
        wavelength = 2 * np.pi / frequency
        if wavelength < 256 / 4.0:
            divisor.append(1.0)
        elif wavelength > 256 / 1.0:
            divisor.append(8.0)
        else:
            smooth = (256 / wavelength - 1.0) / (4.0 - 1.0)
            divisor.append(frequency / ((1 - smooth) * frequency / 8.0 + smooth * frequency))
    check(len(set(divisor)) > 3, "all three kinds", divisor)
    m.divisor = np.array(divisor)
    agrees(m, m.folder("l4", {"rope_scaling": {"rope_type": "llama3", **scaling}}),
           "llama3 as in transformers 4")
    agrees(m, m.folder("l3", {"rope_scaling": {"type": "llama3", **scaling}}),
           "llama3, an older key")
    five = {
        "rope_theta": 1.0, "rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **scaling}
    }
    agrees(m, m.folder("l5", five), "llama3 as in transformers 5")
    m = Model(seed=15)
    for name in "folder", "folder/":
        if name == "folder":
            m.folder("folder")
        x = fine("ppl", name, "t.npy", "--attention", "f32")
        check(x["model"]["name"] == "folder", "it is called as its folder is", x["model"])


def test_attentions():
    m = Model(seed=20, interleaved=True)
    m.gguf("m.gguf")
    token = some_tokens(600)
    want = m.run(token)[0]
    dense, exact = logits_of("m.gguf", "t.npy", "--attention", "f32")
    row, int8 = logits_of("m.gguf", "t.npy", "--attention", "int8")
    check(EXACT < apart(int8, want) < 0.3, "int8 is near", apart(int8, want))
    check(
        abs(row["perplexity"] / dense["perplexity"] - 1) < 0.01 and row["sparsity"] == 0,
        "perplexity of int8", row)
    row, all_ = logits_of("m.gguf", "t.npy", "--attention", "sparse", "--tau", 1)
    check(
        apart(all_, int8) < EXACT and row["sparsity"] == 0, "tau 1: all is kept", row,
        apart(all_, int8))
    row, some = logits_of("m.gguf", "t.npy", "--attention", "sparse", "--tau", 0.6, "--theta", -1)
    check(0.1 < row["sparsity"] < 0.9 and row["sparsity"] == row["sparsity_qk"], "sparse", row)
    check(
        abs(np.mean(row["layers_sparsity"]) - row["sparsity"]) < 1e-5 and
        len(row["layers_sparsity"]) == 2, "of layers", row)
    check(apart(int8, want) < apart(some, want) < 5, "sparse is further off", apart(some, want))
    row, less = logits_of("m.gguf", "t.npy", "--attention", "sparse", "--tau", 0.6, "--theta", -1,
                          "--lambda", -0.1)
    check(row["sparsity"] > row["sparsity_qk"] and (less != some).any(), "lambda", row)

    x = fine("ppl", "m.gguf", "t.npy", "--attention",
             "dense,spargeattn:tau=0.6,theta=-1,int8,window:sink=0,window=100,f32")["rows"]
    check([r["attention"] for r in x] == ["dense", "spargeattn:tau=0.6,theta=-1", "int8",
                                          "window:sink=0,window=100", "f32"], "methods", x)
    check(x[0]["surprise"] == x[2]["surprise"] and x[1]["sparsity"] > 0.1, "as they are", x)
    for name, same in ("dense", int8), ("spargeattn:tau=0.6,theta=-1", some):
        check((logits_of("m.gguf", "t.npy", "--attention", name)[1] == same).all(), name)
    near = Model(seed=20, interleaved=True, window=100)
    row, got = logits_of("m.gguf", "t.npy", "--attention", "window:sink=0,window=100", "--qk-dtype",
                         "f32", "--pv-dtype", "f32")
    check(apart(got, near.run(token)[0]) < EXACT, "a window", apart(got, near.run(token)[0]))
    for name, words in [("spars", ["int8", "'spars'", "did you mean"]),
                        ("window:window=1,sinc=2", ["'sinc'", "did you mean 'sink'"]),
                        ("window:window=0", ["[1, "])]:
        wrong(USAGE, words, "ppl", "m.gguf", "t.npy", "--attention", name)

    # Gates: without a threshold all is kept; each layer has its own.
    shape, r = (4, 48, 16), np.random.default_rng(3)
    def gates(*layers):
        save_safetensors("g.safetensors", **{
            f"model.layers.{n}.self_attn.attn_gate.mask_linear_k.weight": ("F32", x)
            for n, x in enumerate(layers)})
        return "--gate", "g.safetensors", "--attention", "seer:threshold=0.2"
    flat, other = np.zeros(shape), r.standard_normal(shape)
    some = [logits_of("m.gguf", "t.npy", *gates(*x))
            for x in ((flat, flat), (other, flat), (flat, other))]
    check(len({x.tobytes() for _, x in some}) == 3, "each layer has its gate")
    check(some[0][0]["attention_sha256"] != some[1][0]["attention_sha256"] and
          some[2][0]["attention_sha256"] == sha256("g.safetensors"), "its hash", some[2][0])
    check(some[1][0]["layers_sparsity"][1] == some[0][0]["layers_sparsity"][1], "and no other")
    every = logits_of("m.gguf", "t.npy", *gates(other, other)[:2], "--attention",
                      "seer:threshold=0", "--qk-dtype", "f32", "--pv-dtype", "f32")[1]
    check(apart(every, want) < EXACT, "threshold 0", apart(every, want))
    wrong(FILE, ["g.safetensors", "layers.1"], "ppl", "m.gguf", "t.npy", *gates(flat))
    wrong(FILE, ["g.safetensors", "(4, 47, 16)"], "ppl", "m.gguf", "t.npy",
          *gates(flat, flat[:, 1:]))
    wrong(USAGE, ["--gate", "--attention seer"], "ppl", "m.gguf", "t.npy", "--gate",
          "g.safetensors")
    keeps("g.safetensors", USAGE, "is an input", "ppl", "m.gguf", "t.npy", *gates(flat, flat), "-o",
          "g.safetensors")
    Model(seed=5, interleaved=True, divisors=np.full(8, 2.0)).gguf("scaled.gguf")
    wrong(UNSUPPORTED, ["g.safetensors", "scaled"], "ppl", "scaled.gguf", "t.npy",
          *gates(flat, flat))

    blocks = 5, 10
    for layers in 1, 2:
        save("ones.npy", np.ones((layers, 4, *blocks), bool))
        row, got = logits_of("m.gguf", "t.npy", "--attention", "ones.npy")
        check(apart(got, int8) < EXACT and row["sparsity"] == 0, "a mask of ones", row)
        check(row["attention"] == "ones.npy" and row["attention_sha256"] == sha256("ones.npy"),
              "its hash", row)
    save("odd, name.npy", token.astype(np.int32))
    x = fine("ppl", "m.gguf", "odd, name.npy", "--attention", "f32,int8", "--attention", "sparse",
             "--length", "300,600", "--csv", "c.csv")
    explained("sparge-lm ppl", x)
    check(x["options"]["theta"] == 0.6 and x["options"]["topk"] is x["options"]["lambda"] is None,
          "as typed, or off", x)
    check([(r["tokens"], r["attention"]) for r in x["rows"]] ==
          [(k, a) for k in (300, 600) for a in ("f32", "int8", "sparse")], "the grid", x["rows"])
    half = m.run(token[:300])[0]
    check(
        abs(x["rows"][0]["perplexity"] / np.exp(surprise(half, token[:300])) - 1) < 1e-5,
        "the first 300")
    groups = {(g["attention"], g["tokens"]): g for g in x["summary"]}
    check(
        len(groups) == 6 and groups["f32", 600]["perplexity"] == x["rows"][3]["perplexity"],
        "summary", x["summary"])
    with open("c.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    check(len(rows) == 6 and list(rows[0]) == list(x["rows"][0]), "--csv", rows[:1])
    for got, row in zip(rows, x["rows"]):
        check(
            all((got[k] == row[k]) if isinstance(row[k], str) else json.loads(got[k]) == row[k]
                for k in row), "a line", got, row)

    save("u.npy", token[100:401].astype(np.int32))
    x = fine("ppl", "m.gguf", "t.npy", "u.npy", "--attention", "f32")
    one, two = (r["surprise"] for r in x["rows"])
    check([s["count"] for s in x["summary"]] == [1, 1], "each length is a group", x["summary"])
    x = fine("ppl", "m.gguf", "t.npy", "u.npy", "--attention", "f32", "--length", 301)
    one, two = (r["surprise"] for r in x["rows"])
    check(
        abs(x["summary"][0]["perplexity"] / np.exp((one + two) / 600) - 1) < 1e-6 and
        x["summary"][0]["count"] == 2, "over texts", x["summary"])
    usual = fine("ppl", "m.gguf", "t.npy")
    check([r["attention"] for r in usual["rows"]] == ["f32", "sparse"], "the usual attentions")
    bq = fine("ppl", "m.gguf", "t.npy", "--attention", "sparse", "--block-q", 64, "--block-k", 32,
              "--tau", 0.5, "--theta", -1)
    check(bq["rows"][0]["sparsity"] > 0.1 and bq["options"]["block_q"] == 64, "blocks",
          bq["options"])
    check(bq["options"]["causal"] == "end", "a model is causal, and the settings say so",
          bq["options"])


def test_kl():
    """How far from dense attention in f32, out of the logits of both; and the pairs of a window."""
    Model(seed=20, interleaved=True).gguf("m.gguf")
    some_tokens(600)
    names = ["f32", "int8", "spargeattn:tau=0.6,theta=-1", "window:sink=0,window=100"]
    logs = []
    for name in names:
        logits = logits_of("m.gguf", "t.npy", "--attention", name)[1][:-1].astype(np.float64)
        logs.append(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
    x = fine("ppl", "m.gguf", "t.npy", "--kl", "--attention", ",".join(names), "-o", "kl.json")
    explained("sparge-lm ppl", x)
    for row, log in zip(x["rows"], logs):
        want = (np.exp(logs[0]) * (logs[0] - log)).sum(-1).mean()
        check(abs(row["kl"] - want) < 1e-5 * want + 1e-9, row["attention"], row, want)
    check(x["rows"][0]["kl"] == 0 < x["rows"][1]["kl"] < x["rows"][2]["kl"], "in order", x["rows"])
    check([g["kl"] for g in x["summary"]] == [row["kl"] for row in x["rows"]], "a mean of one", x)
    check(fine("ppl", "m.gguf", "t.npy", "--kl", "--attention", ",".join(names), "-o",
               "kl.json") == x, "nothing is run again")
    wrong(FILE, "of other settings", "ppl", "m.gguf", "t.npy", "-o", "kl.json")
    seen = np.minimum(np.arange(600) + 1, 100).sum() / np.arange(601).sum()
    check([row["density_tokens"] for row in x["rows"]][::3] == [1.0, float(f"{seen:.6g}")],
          "pairs of a window", seen, x["rows"])


def test_cuda():
    """On a device, where there is one, what the host gives."""
    _, sparge_fine, _, _ = commands_of(SPARGE, "sparge")
    if not sparge_fine("info", "--json")["backends"]["cuda"]["available"]:
        print("skipped: cuda is not on this machine, or not in this build")
        return
    m = Model(seed=21, interleaved=True, heads=2, kv_heads=1, head_dim=64)
    m.gguf("m.gguf")
    some_tokens(200)
    for attention, near in ("f32", 1e-4), ("int8", 0.1), ("sparse", 0.3):
        args = [
            "--attention", attention,
            *(["--tau", 0.6, "--theta", -1] if attention == "sparse" else [])
        ]
        (host, want), (device, got) = (logits_of("m.gguf", "t.npy", "--backend", x, *args)
                                       for x in ("cpu", "cuda"))
        check(apart(got, want) < near, f"{attention} on cuda", apart(got, want))
        for key in "sparsity", "sparsity_qk":
            check(
                abs(device[key] - host[key]) < 0.1, f"{attention} on cuda: {key}", device[key],
                host[key])


def test_bos():
    """A text has the token that the model wants first."""
    bpe = small_bpe()
    m = Model(seed=21, interleaved=True)
    m.gguf(
        "m.gguf",
        bpe.keys(
            **{"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": np.uint32(0)}))
    text = read(TEXT)[:900]
    write("a.txt", text)
    token = np.array([0] + bpe.encode(text))
    row, got = logits_of("m.gguf", "a.txt", "--attention", "f32")
    check(row["tokens"] == len(token) and apart(got, m.run(token)[0]) < EXACT, "a text", row)
    check(
        row["text"] == "a.txt" and row["text_sha256"] == hashlib.sha256(text.encode()).hexdigest(),
        "its name", row)


# ---- Capture, and what reads it --------------------------------------------------------------

def test_capture():
    m = Model(seed=30, interleaved=True, heads=6, kv_heads=3, layers=3)
    m.gguf("m.gguf")
    token = some_tokens(600)
    seen = m.run(token)[1]
    x = fine("capture", "m.gguf", "t.npy", "-o", "all")
    explained("sparge-lm capture", x)
    check(x == dict(folder="all", files=3, tokens=600, nonfinite=0), "what it says", x)
    check(
        sorted(os.listdir("all")) == [
            "layer00.safetensors", "layer01.safetensors", "layer02.safetensors", "manifest.json"
        ], "its files", os.listdir("all"))
    def compare(folder, layers, groups):
        manifest = json.loads(read(f"{folder}/manifest.json"))
        check([f["layer"] for f in manifest["files"]] == layers, folder, "layers",
              manifest["files"])
        for entry, layer in zip(manifest["files"], layers):
            file = f"{folder}/{entry['file']}"
            got = load_file(file)
            heads = [2 * g + n for g in groups for n in (0, 1)]
            check(entry["query_heads"] == heads and entry["kv_heads"] == groups, folder, "heads",
                  entry)
            check(entry["sha256"] == sha256(file), folder, "sha256")
            for name, want, chosen in zip("qkv", seen[layer], (heads, groups, groups)):
                want = want[chosen][None]
                off = np.abs(got[name].astype(np.float64) -
                             want) if got[name].shape == want.shape else np.inf
                check(got[name].dtype == np.float16 and
                      (off <= np.abs(want) * 2.0**-11 + 1e-5 * np.abs(want).max()).all(),
                      f"{folder} layer {layer} {name}", got[name].shape, np.max(off))
        return manifest
    manifest = compare("all", [0, 1, 2], [0, 1, 2])
    check([
        manifest[k]
        for k in "model n_layers n_heads n_kv_heads head_dim tokens causal sample".split()
    ] == ["tiny", 3, 6, 3, 16, 600, True, "t.npy"], "manifest", manifest)
    fine("capture", "m.gguf", "t.npy", "-o", "some", "--layers", "2,0", "--groups", "1,2")
    compare("some", [0, 2], [1, 2])
    fine("capture", "m.gguf", "t.npy", "-o", "some", "--layers", "1", "--groups",
         "0")  # over what is there
    compare("some", [1], [0])
    seen = [[x[:, :200] for x in layer] for layer in seen]
    fine("capture", "m.gguf", "t.npy", "-o", "short", "--length", 200, "--model", "other")
    check(compare("short", [0, 1, 2], [0, 1, 2])["model"] == "other", "--model")

    wrong(USAGE, ["--layers", "3 layers"], "capture", "m.gguf", "t.npy", "-o", "no", "--layers", 3)
    wrong(USAGE, ["--groups", "3 key heads"], "capture", "m.gguf", "t.npy", "-o", "no", "--groups",
          "0,3")
    wrong(USAGE, "-o", "capture", "m.gguf", "t.npy")
    wrong(USAGE, "one text", "capture", "m.gguf", "t.npy", "t.npy", "-o", "no")
    wrong(USAGE, "one --length", "capture", "m.gguf", "t.npy", "--length", "20,30", "-o", "no")
    wrong(USAGE, "one --attention", "capture", "m.gguf", "t.npy", "--attention", "f32,int8", "-o",
          "no")
    wrong(FILE, "nowhere", "capture", "m.gguf", "t.npy", "-o", "nowhere/no")
    wrong(FILE, ["t.npy", "600", "601"], "capture", "m.gguf", "t.npy", "--length", 601, "-o", "no")
    write("file", "")
    wrong(FILE, "file", "capture", "m.gguf", "t.npy", "-o", "file")

    long_model(seed=31).gguf("long.gguf")
    save("u.npy", np.resize(token, LONG[0]))
    code, out, err = stopped([PROGRAM, "capture", "long.gguf", "u.npy", "-o", "half"],
                             signal.SIGINT, has(2, "half/manifest.json", "files"))
    files = json.loads(read("half/manifest.json"))["files"]
    check(
        code == UNFINISHED and err.count("\n") == 1 and "manifest.json" in err and
        2 <= len(files) < 300, "interrupted", code, err, len(files))
    check(sorted(os.listdir("half")) == [*(f["file"] for f in files), "manifest.json"] and
          all(f["sha256"] == sha256(f"half/{f['file']}") for f in files),
          "what is there is listed")

    if not SPARGE:
        print("skipped: what sparge makes of a capture (its path is the second argument)")
        return
    _, sparge, _, _ = commands_of(SPARGE, "sparge")
    how = "--tau", 0.6, "--theta", -1
    fine("capture", "m.gguf", "t.npy", "-o", "sparse", "--attention", "sparse", *how)
    for layer in range(3):
        x = sparge("run", f"sparse/layer{layer:02}.safetensors", "--causal", *how, "--mask-out",
                   f"m{layer}.npy")
        check(x["heads"] == 6 and x["kv_heads"] == 3 and x["q_len"] == 600, "sparge run takes it",
              x)
    save("mask.npy", np.concatenate([np.load(f"m{layer}.npy") for layer in range(3)]))
    one = logits_of("m.gguf", "t.npy", "--attention", "sparse", *how)
    two = logits_of("m.gguf", "t.npy", "--attention", "mask.npy")
    check(
        one[0]["layers_sparsity"] == two[0]["layers_sparsity"] and
        min(one[0]["layers_sparsity"]) > 0.05, "a mask that was predicted", one[0], two[0])
    check(apart(two[1], one[1]) < EXACT, "gives what predicting it gives", apart(two[1], one[1]))
    save("one.npy", np.load("m0.npy"))
    x = fine("ppl", "m.gguf", "t.npy", "--attention", "one.npy")["rows"][0]
    check(x["layers_sparsity"] == [one[0]["layers_sparsity"][0]] * 3, "a mask for all layers")

    x = sparge("tune", "all", "-o", "P.json", "--causal", "--sink")
    check(os.path.exists("P.json"), "sparge tune takes it", x)
    x = fine("ppl", "m.gguf", "t.npy", "--attention", "f32,P.json", "--sink")
    dense, tuned = x["rows"]
    check(abs(tuned["perplexity"] / dense["perplexity"] - 1) < 0.2, "tuned thresholds", x["rows"])
    heads = json.loads(read("P.json"))
    check(heads["model"] == "tiny" and heads["weights_sha256"] == sha256("m.gguf"),
          "for which weights", heads["model"])
    again = fine("ppl", "m.gguf", "t.npy", "--attention", "P.json")["rows"][0]
    check(again["perplexity"] == tuned["perplexity"], "the options that they were tuned with",
          again, tuned)
    again = fine("ppl", "m.gguf", "t.npy", "--attention", "P.json", "--model", "mine")["rows"][0]
    check(again["perplexity"] == tuned["perplexity"], "another name for the same weights", again,
          tuned)
    for other in "0" * 64, None:
        write("other.json", json.dumps({**heads, "weights_sha256": other}))
        fine("ppl", "m.gguf", "t.npy", "--attention", "other.json")
        wrong(FILE, ["other.json", "'tiny'", "'mine'"], "ppl", "m.gguf", "t.npy", "--attention",
              "other.json", "--model", "mine")
    wrong(FILE, ["P.json", "128", "64"], "ppl", "m.gguf", "t.npy", "--attention", "P.json",
          "--sink", "--block-q", 64)
    # Each head has its own: other ones for one head of one layer change that layer and no earlier
    # one.
    base = dict(dense=False, theta=-1.0, tau=1.0, topk=None, **{"lambda": None})
    def thresholds(name, **changed):
        heads_ = [
            dict(layer=n, head=h, **{**base, **(changed if (n, h) == (1, 4) else {})})
            for n in range(3) for h in range(6)
        ]
        write(name, json.dumps({**heads, "heads": heads_}))
        return fine("ppl", "m.gguf", "t.npy", "--attention", name,
                    "--sink")["rows"][0]["layers_sparsity"]
    check(thresholds("A.json") == [0, 0, 0], "tau 1 in all heads")
    got = thresholds("B.json", tau=0.0)
    check(got[0] == 0 == got[2] and 0.02 < got[1] < 0.25, "tau 0 in one head", got)
    by_mass = [dict(layer=n, head=h, **{**base, "tau": None, "min_mass": 1.5})
               for n in range(3) for h in range(6)]
    write("C.json", json.dumps({**heads, "cell": 8, "heads": by_mass}))
    x = fine("ppl", "m.gguf", "t.npy", "--attention", "sparse,C.json", "--sink", "--theta", -1,
             "--min-mass", 1.5, "--cell", 8)
    one, two = x["rows"]
    check(one["perplexity"] == two["perplexity"] and
          0.05 < one["sparsity"] == two["sparsity"] and x["options"]["cell"] == 8 and
          x["options"]["min_mass"] == 1.5 and x["options"]["tau"] is None, "min_mass by cells", x)
    wrong(FILE, ["C.json", "cell 8, not 16"], "ppl", "m.gguf", "t.npy", "--attention", "C.json",
          "--cell", 16)
    write("short.json", json.dumps({**heads, "heads": heads["heads"][:-1]}))
    wrong(FILE, ["short.json", "layer 2 head 5"], "ppl", "m.gguf", "t.npy", "--attention",
          "short.json", "--sink")


# ---- Needles ---------------------------------------------------------------------------------

def number(seed, n, digits):
    """splitmix64, as needle.c says."""
    mask, low = 2**64 - 1, 10**(digits - 1)
    x = (seed * 0xd1342543de82ef95 + (n + 1) * 0x9e3779b97f4a7c15) & mask
    x = ((x ^ x >> 30) * 0xbf58476d1ce4e5b9) & mask
    x = ((x ^ x >> 27) * 0x94d049bb133111eb) & mask
    return str(low + (x ^ x >> 31) % (9 * low))



def haystack(bpe, text, tokens, depth, depths, n, needles, digits, seed, needle, question, lead=()):
    value = number(seed, n, digits)
    key, ask, answer = (bpe.encode(x) for x in (needle.replace("{}", value), question, " " + value))
    hay = tokens - len(lead) - len(key) - len(ask) - len(answer)
    start = (len(text) - hay) * n // needles if needles > 1 else 0
    text = text[start:start + hay]
    place = hay * depth // (depths - 1) if depths > 1 else hay // 2
    spelling = {number: token for token, number in bpe.vocab.items()}
    line = next(
        (x for x in range(place, max(place - 128, 0), -1) if spelling[text[x - 1]].endswith("Ċ")),
        place)
    return np.array([*lead, *text[:line], *key, *text[line:], *ask, *answer]), len(answer), value


def test_needle():
    bpe = small_bpe(size=500)
    bos = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": np.uint32(0)}
    text = bpe.encode(read(TEXT))
    likely = [bpe.vocab[x] for x in "Ġ123456789"]
    # The digits and the space are far above all other tokens, so that some answers come out right
    # by chance.
    m = Model(seed=40, interleaved=True, vocab=len(bpe.vocab), context=2000)
    output = 1e-3 * np.random.default_rng(1).standard_normal((m.vocab, m.dim))
    output[likely] = np.random.default_rng(2).standard_normal((len(likely), m.dim))
    m.replace("output.weight", output)
    for keys, lead in ({}, []), (bos, [0]):
        m.gguf("m.gguf", bpe.keys(**keys))
        how = [
            "--depths", 3, "--needles", 9, "--digits", 2, "--seed", 7, "--length", "130,200",
            "--attention", "f32"
        ]
        x = fine("needle", "m.gguf", TEXT, *how)
        explained("needle", x)
        same = fine("needle", "m.gguf", TEXT, *how)
        def timeless(rows):
            return [{k: v for k, v in row.items() if "seconds" not in k} for row in rows]
        check(timeless(x["rows"]) == timeless(same["rows"]), "the same numbers twice")
        grid = [(tokens, depth, n) for tokens in (130, 200) for depth in range(3) for n in range(9)]
        check(len(x["rows"]) == len(grid), "the grid", len(x["rows"]))
        total, margins = 0, []
        for row, (tokens, depth, n) in zip(x["rows"], grid):
            token, answer, value = haystack(bpe, text, tokens, depth, 3, n, 9, 2, 7, x["needle"],
                                            x["question"], lead)
            check(len(token) == tokens, "as long as asked", len(token))
            logits = m.run(token)[0][tokens - answer - 1:-1]
            right = int((logits.argmax(1) == token[-answer:]).sum())
            best = np.sort(logits, 1)
            margins.append((best[:, -1] - best[:, -2]).min())
            check((row["tokens"], row["depth"], row["needle"],
                   row["number"]) == (tokens, depth / 2, n, value), "the place", row)
            check(row["tokens_right"] == right and row["tokens_of_answer"] == answer == 3 and
                  row["right"] == (right == answer), "the answer", row, right)
            total += right
        check(
            min(margins) > 1e-4 and total > 8,
            "no answer is a matter of rounding, and some are right", min(margins), total)
        group = x["summary"][1]
        part = [r for r in x["rows"] if r["tokens"] == 200]
        shares = [sum(r[key] for r in part) for key in ("right", "tokens_right")]
        check([group[k] for k in ("tokens", "count", "right", "tokens_right")] ==
              [200, 27, round(shares[0] / 27, 6), round(shares[1] / 81, 6)], "summary", group)
    def one_place(*args):
        return fine("needle", "m.gguf", TEXT, "--depths", 1, "--needle", " key {}", "--question",
                    "\nand which key is", *args)["rows"]

    got = [
        (r["depth"], r["number"], r["attention"])
        for r in one_place("--needles", 1, "--length", 150, "--seed", 8, "--attention", "int8,f32")
    ]
    check(got == [(0.5, number(8, 0, 5), a) for a in ("int8", "f32")], "one place", got)

    # What follows a token is known, whatever came before it: a space follows "is", a 7 the space,
    # and 7 any digit.
    m = Model(seed=41, interleaved=True, vocab=len(bpe.vocab), layers=1)
    for name in "blk.0.attn_output.weight", "blk.0.ffn_down.weight":
        m.replace(name, np.zeros_like(m.w[name]))
    output = np.zeros((m.vocab, m.dim))
    last = bpe.encode("\nand which key is")[-1]
    unit = lambda t: m.w["token_embd.weight"][t] * m.w["output_norm.weight"]
    output[bpe.vocab["Ġ"]] = unit(last)
    output[bpe.vocab["7"]] = unit(bpe.vocab["Ġ"]) + sum(unit(bpe.vocab[x]) for x in "0123456789")
    m.replace("output.weight", output)
    m.gguf("m.gguf", bpe.keys())
    rows = one_place("--needles", 100, "--digits", 1, "--length", 100, "--attention", "f32")
    check(
        all(r["tokens_right"] == 1 + r["right"] and r["right"] == (r["number"] == "7")
            for r in rows), "right where it is 7", rows)
    check(3 < sum(r["right"] for r in rows) < 30, "some are", rows)
    rows = one_place("--needles", 50, "--digits", 2, "--length", 100, "--attention", "f32")
    check(
        all(r["tokens_right"] == 1 + r["number"].count("7") and r["right"] == (r["number"] == "77")
            for r in rows), "of two digits", rows)

    wrong(USAGE, "--length", "needle", "m.gguf", TEXT)
    wrong(USAGE, "one text", "needle", "m.gguf", TEXT, TEXT, "--length", 100)
    wrong(USAGE, "{}", "needle", "m.gguf", TEXT, "--length", 100, "--needle", "nothing")
    wrong(USAGE, "--depths", "needle", "m.gguf", TEXT, "--length", 100, "--depths", 0)
    wrong(USAGE, "--digits", "needle", "m.gguf", TEXT, "--length", 100, "--digits", 19)
    wrong(FILE, "text.txt", "needle", "m.gguf", TEXT, "--length", 30)
    wrong(FILE, ["text.txt", "200000"], "needle", "m.gguf", TEXT, "--length", 200000)
    fine("tokens", "m.gguf", TEXT, "-o", "t.npy")
    a, b = (fine("needle", "m.gguf", t, "--length", 100, "--attention", "f32")["rows"]
            for t in (TEXT, "t.npy"))
    check([r["tokens_right"] for r in a] == [r["tokens_right"] for r in b], "text in numbers")
    m.folder("folder")
    wrong(UNSUPPORTED, "BPE", "needle", "folder", "t.npy", "--length", 100)


def test_vocabularies():
    """The embedding has other rows than there are tokens."""
    bpe = small_bpe(size=500)
    few = Model(seed=42, vocab=300, interleaved=True)
    few.gguf("few.gguf", bpe.keys())
    wrong(FILE, ["text.txt", "0 to 299", "tiny"], "ppl", "few.gguf", TEXT, "--length", 100)
    save("t.npy", np.random.default_rng(1).integers(0, 300, 400).astype(np.int32))
    wrong(FILE, ["needle", "299"], "needle", "few.gguf", "t.npy", "--length", 100)
    many = Model(seed=43, vocab=9000, interleaved=True)
    many.gguf("many.gguf", bpe.keys())
    save("t.npy", np.random.default_rng(1).integers(8000, 9000, 400).astype(np.int32))
    x = fine("needle", "many.gguf", "t.npy", "--length", 100, "--attention", "f32")
    check(len(x["rows"]) == 20, "numbers without a spelling", len(x["rows"]))


# ---- Time, and results that grow -------------------------------------------------------------

def test_time():
    m = Model(seed=50, interleaved=True)
    m.gguf("m.gguf")
    some_tokens(400)
    x = fine("time", "m.gguf", "t.npy", "--length", "100,400", "--repeat", 3, "--csv", "c.csv",
             "-o", "R.json")
    explained("time", x)
    check([(r["tokens"], r["turn"], r["attention"]) for r in x["rows"]] == [
        (k, n, a) for k in (100, 400) for n in range(3) for a in ("f32", "sparse")
    ], "by turns", x["rows"])
    check(all(0 < r["seconds_attention"] < r["seconds"] for r in x["rows"]), "seconds")
    for g in x["summary"]:
        part = [
            r for r in x["rows"] if (r["tokens"], r["attention"]) == (g["tokens"], g["attention"])
        ]
        for key in "seconds", "seconds_attention":
            check(abs(g[key] - np.median([r[key] for r in part])) < 1e-6, "the median", g, key)
        check(
            abs(g["share"] * g["seconds"] - g["seconds_attention"]) < 1e-5 * g["seconds"] + 1e-9,
            "share", g)
    with open("c.csv", newline="") as f:
        check(len(list(csv.reader(f))) == 13, "--csv")
    check(json.loads(read("R.json"))["rows"] == x["rows"], "-o")
    x = fine("time", "m.gguf", "t.npy", "--repeat", 1, "--attention", "f32")
    check([r["tokens"] for r in x["rows"]] == [400], "all of the text")
    wrong(USAGE, "one text", "time", "m.gguf")
    wrong(USAGE, "--repeat", "time", "m.gguf", "t.npy", "--repeat", 0)
    # A file that was made longer by hand.
    more = json.loads(read("R.json"))
    more["rows"] = [{**r, "turn": r["turn"] + 3 * n} for n in range(1200) for r in more["rows"]]
    write("R.json", json.dumps(more))
    x = fine("time", "m.gguf", "t.npy", "--length", "100,400", "-o", "R.json")
    check([g["count"] for g in x["summary"]] == [3600] * 4, "many rows", x.get("summary"))


def has(count, name="R.json", key="rows"):
    """For `stopped`: so many of them are in this file."""
    def begun(_):
        try:
            return len(json.loads(read(name))[key]) >= count
        except (FileNotFoundError, ValueError):
            return False
    return begun


def long_model(**how):
    """Of many layers. At the lengths of LONG a run of it takes minutes on any machine, and a layer,
    within which no signal is heeded, a moment."""
    return Model(interleaved=True, layers=300, dim=32, hidden=32, heads=2, kv_heads=1,
                 context=1 << 20, **how)


LONG = list(range(20000, 20012))


def rows_of(name="R.json"):
    return json.loads(read(name))["rows"]


def test_resume():
    bpe = small_bpe()
    long_model(seed=60).gguf("m.gguf", bpe.keys())
    write("text.txt", read(TEXT) * (3 * LONG[-1] // len(bpe.encode(read(TEXT))) + 1))
    for command, more, lengths, each in [("ppl", [], [100, 120, 140, 160], 2),
                                         ("time", ["--repeat", 2], [100, 120], 4),
                                         ("needle", ["--depths", 2, "--needles", 2], [300,
                                                                                      320], 8)]:
        def args_of(lengths):
            return [
                command, "m.gguf", "text.txt", "--length", ",".join(map(str, lengths)), *more, "-o",
                "R.json"
            ]

        ends = [(signal.SIGINT, UNFINISHED), (signal.SIGTERM, UNFINISHED),
                (signal.SIGKILL, -signal.SIGKILL)]
        for n, (end, code) in enumerate(
                ends[:len(lengths) - 1]):  # in the middle of a long one, after some short ones
            count = (n + 1) * each
            got, out, err = stopped([PROGRAM, *args_of(lengths[:n + 1] + LONG)], end, has(count))
            rows = rows_of()
            check(got == code and len(rows) == count and out == "", command, end, got, err,
                  len(rows))
            if code == UNFINISHED:
                check(err.startswith("sparge-lm: R.json: interrupted") and err.count("\n") == 1 and
                      f" {count} rows" in err, command, "one line", err)
                check(not [n for n in listing() if "tmp" in n], "nothing else", listing())
        args, count = args_of(lengths), len(lengths) * each
        x = fine(*args)
        check(
            len(x["rows"]) == count and x["rows"][:len(rows)] == rows and rows_of() == x["rows"],
            command, "goes on", len(x["rows"]))
        again = fine(*args, "--csv", "c.csv")
        check(again == x, command, "all is there")
        with open("c.csv", newline="") as f:
            table = list(csv.DictReader(f))
        check(
            len(table) == count and
            [int(r["tokens"]) for r in table] == [r["tokens"] for r in x["rows"]], "--csv")
        keeps("R.json", FILE, ["R.json", "other settings"], *args, "--tau", 0.5)
        keeps("R.json", FILE, ["R.json", "other settings"], *args, "--block-q", 64)
        keeps("R.json", FILE, ["R.json", "other settings"], *args, "--model", "mine")
        other = "time" if command == "ppl" else "ppl"
        keeps("R.json", FILE, ["R.json", "other settings"], other, *args[1:5], "-o", "R.json")
        if command == "ppl":
            fresh = fine(*args[:-2], "--attention", "f32", "--length", 100)
            check(fresh["rows"][0]["surprise"] == x["rows"][0]["surprise"], "as in one go")
        if command == "needle":
            keeps("R.json", FILE, "other settings", *args, "--seed", 2)
            keeps("R.json", FILE, "other settings", *args, "--question", "what?")
        os.remove("R.json")
        for name in listing():
            if "tmp" in name:
                os.remove(name)
    args, seen = ["ppl", "m.gguf", "text.txt", "--length", f"100,{LONG[0]}", "-o", "R.json"], []
    stopped([PROGRAM, *args], signal.SIGTERM, lambda child: has(2)
            (child) and not seen.append(ignored(child)),
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    check(seen == [[signal.SIGINT]], "an interrupt that was ignored when it began stays so", seen)
    code, seen, after, last = watched([PROGRAM, "ppl", "m.gguf", "text.txt", "--length", LONG[0]])
    check("s left" in seen, "progress on a terminal", seen)
    check(code == UNFINISHED and "-o FILE" in last and last.count("\n") == 1, "without -o", code,
          last)


def test_resume_once_more():
    """A row is there once; and what is no file of rows is left alone."""
    m = Model(seed=61, interleaved=True)
    m.gguf("m.gguf")
    token = some_tokens(300)
    args = ["ppl", "m.gguf", "t.npy", "--attention", "f32", "-o", "R.json"]
    one = fine(*args)
    check(fine(*args) == one, "the same again")
    keeps("R.json", USAGE, ["--logits", "-o", "exclude"], *args, "--logits", "L.npy")
    x = fine(*args[:3], "--attention", "f32,int8", "-o", "R.json")
    check([r["attention"] for r in x["rows"]] == ["f32", "int8"] and x["rows"][0] == one["rows"][0],
          "one attention more")
    save("t.npy", token[::-1].astype(np.int32))
    x = fine(*args)
    check(len(x["rows"]) == 3, "another text of that name", x["rows"])
    for content in "", "{", "[]", "3", '{"rows": 5}', "{}", read("t.npy", "rb"):
        write("X.json", content)
        keeps("X.json", FILE, "X.json", *args[:-1], "X.json")


def test_other_weights():
    """Weights are known by what is in their files, and not by a name and a size."""
    some_tokens(100)
    for kind in "gguf", "folder":
        for n, name in enumerate("AB"):
            os.makedirs(f"{kind}/{name}")
            m = Model(seed=n, interleaved=kind == "gguf")
            m.gguf(f"{kind}/{name}/model.gguf") if kind == "gguf" else m.folder(
                f"{kind}/{name}/model")
        a, b = (f"{kind}/{name}/model{'.gguf' if kind == 'gguf' else ''}" for name in "AB")
        args = ["t.npy", "--attention", "f32", "-o", f"{kind}.json"]
        x, y = fine("ppl", a, *args), fine("ppl", b, *args[:-2])
        check(x["rows"][0]["surprise"] != y["rows"][0]["surprise"], "they differ")
        keeps(f"{kind}.json", FILE, [f"{kind}.json", "other settings"], "ppl", b, *args)
        check(fine("ppl", a, *args) == x, "the same again")
    check(
        x["model"]["sha256"] == hashlib.sha256(
            read(f"{a}/config.json", "rb") + read(f"{a}/model.safetensors", "rb")).hexdigest(),
        "of all files")
    config = json.loads(read(f"{a}/config.json"))
    write(f"{a}/config.json", json.dumps({**config, "rms_norm_eps": 0.1}))
    keeps("folder.json", FILE, "other settings", "ppl", a, *args)


def test_weights_that_change():
    """A file that is cut, or written over, while the model runs."""
    m = long_model(seed=62)
    m.gguf("m.gguf")
    m.folder("m")
    save("t.npy", np.zeros(LONG[-1], np.int32))
    whole = read("m.gguf", "rb")
    def cut(name):
        os.truncate(name, 1000)
    def rewrite(name):
        with open(name, "r+b") as f:
            f.write(whole[:100])

    for model, name, harm in [("m.gguf", "m.gguf", cut), ("m", "m/model.safetensors", cut),
                              ("m", "m/config.json", rewrite), ("m.gguf", "m.gguf", rewrite)]:
        write("m.gguf", whole)
        if model == "m" and harm == rewrite:
            shutil.rmtree("m")
            m.folder("m")
        lengths = ",".join(map(str, [50, *LONG]))
        child = at_work([PROGRAM, "ppl", model, "t.npy", "--length", lengths, "-o", "R.json"],
                        has(2))
        harm(name)
        code, out, err = ended(child)
        check(
            code == FILE and out == "" and err.count("\n") == 1 and name in err and
            "changed" in err, model, code, err)
        os.remove("R.json")


def test_nonfinite():
    """A result that is not a number is null, and so is what is summed up over it; and that is
    said."""
    bpe = small_bpe()
    m = Model(seed=63, interleaved=True)
    x = m.w["token_embd.weight"].copy()
    x[7] = np.nan  # from this token on
    m.replace("token_embd.weight", x)
    m.gguf("odd.gguf", bpe.keys())
    token = np.random.default_rng(0).integers(10, 600, 100).astype(np.int32)
    save("fine.npy", token)
    token[50] = 7
    save("odd.npy", token)
    args = ["ppl", "odd.gguf", "fine.npy", "odd.npy", "--attention", "f32"]
    says = ["tiny", "1 of 2 results are null"]
    one = fine("ppl", "odd.gguf", "fine.npy", "--attention", "f32")["rows"][0]
    for _ in range(2):  # the second time they are read
        x = fine(*args, "-o", "R.json", "--csv", "R.csv", says=says)
        check([r["perplexity"] for r in x["rows"]] == [one["perplexity"], None] and
              x["rows"][1]["surprise"] is None and x["summary"][0]["perplexity"] is None and
              x["summary"][0]["count"] == 2, "perplexity", x)
        with open("R.csv", newline="") as f:
            check([r["perplexity"] for r in csv.DictReader(f)][1] == "null", "in the table")
    rows = json.loads(read("R.json"))
    rows["rows"][0]["sparsity"], rows["rows"][1]["surprise"] = None, one["surprise"]
    write("R.json", json.dumps(rows))
    x = fine(*args, "-o", "R.json", says=["2 of 2"])["summary"][0]
    check(x["sparsity"] is None and x["sparsity_qk"] == 0 and x["perplexity"] is not None, "means",
          x)

    times = ["time", "odd.gguf", "fine.npy", "--attention", "f32", "--repeat", 3, "-o", "T.json"]
    fine(*times)
    rows = json.loads(read("T.json"))
    rows["rows"][1]["seconds"] = None
    write("T.json", json.dumps(rows))
    x = fine(*times, says=["1 of 3"])["summary"][0]
    check(x["seconds"] is None and x["share"] is None and x["seconds_attention"] > 0, "medians", x)

    args = [
        "needle", "odd.gguf", TEXT, "--length", 200, "--depths", 2, "--needles", 1, "--attention",
        "f32"
    ]
    x = fine(*args)
    check(x["summary"][0]["right"] is not None, "needles", x["summary"])
    m.replace("output_norm.weight", np.full(64, np.inf))
    m.gguf("odd.gguf", bpe.keys())
    x = fine(*args, says=["2 of 2"])
    check(
        all(r["right"] is None and r["tokens_right"] is None for r in x["rows"]) and
        x["summary"][0]["right"] is None and x["summary"][0]["tokens_right"] is None,
        "no needle is found nor lost", x)


def test_capture_nonfinite():
    m = Model(seed=64, interleaved=True, layers=4)
    x = m.w["blk.1.attn_v.weight"].copy()
    x[3] = np.nan
    m.replace("blk.1.attn_v.weight", x)
    m.gguf("m.gguf")
    some_tokens(60)
    x = fine("capture", "m.gguf", "t.npy", "-o", "c", says=["c: ", "not finite", "manifest.json"])
    manifest = json.loads(read("c/manifest.json"))
    counts = [
        sum(int((~np.isfinite(t)).sum()) for t in load_file(f"c/{f['file']}").values())
        for f in manifest["files"]
    ]
    check(
        counts[0] == 0 and counts[1] == 60 and min(counts[2:]) > 60 and
        x["nonfinite"] == sum(counts) and [f["nonfinite"] for f in manifest["files"]] == counts,
        "counted", counts, x, manifest["files"])

    m = Model(seed=65, interleaved=True, layers=4)
    for name, rows, by in [("blk.1.attn_v", slice(0, 16), 1e-9), ("blk.2.attn_q", slice(0,
                                                                                        64), 1e6)]:
        x = m.w[f"{name}.weight"].copy(
        )  # (of q the rows are in another order, and all of them are multiplied)
        x[rows] *= by
        m.w[f"{name}.weight"] = x.astype(np.float32)
        m.raw[f"{name}.weight"] = "F32", x.shape, (
            np.frombuffer(m.raw[f"{name}.weight"][2], "<f4").reshape(x.shape) *
            np.where(np.arange(len(x))[:, None] < rows.stop, by, 1)).astype("<f4").tobytes()
    m.gguf("m.gguf")
    seen = m.run(np.load("t.npy"))[1]
    check(fine("capture", "m.gguf", "t.npy", "-o", "d")["nonfinite"] == 0, "all finite")
    for f, want in zip(json.loads(read("d/manifest.json"))["files"], seen):
        got = load_file(f"d/{f['file']}")
        small = f["layer"] in (0, 3)
        check(
            f["dtype"] == ("float16" if small else "float32") and
            all(str(t.dtype) == f["dtype"] for t in got.values()), "as wide as it must be", f)
        for name, x in zip("qkv", want):
            lost = np.abs(got[name][0] - x).sum((1, 2)) / np.abs(x).sum((1, 2))
            check((lost < 2.0**-11 + 1e-5).all(), f["file"], name, lost)


# ---- What can go wrong -----------------------------------------------------------------------

def test_cut_short():
    """A GGUF file that ends anywhere."""
    m = Model(vocab=12, layers=1, dim=32, hidden=32, heads=1, kv_heads=1, head_dim=32, tied=True,
              usual="Q4_0", interleaved=True)
    keys = {**m.keys(), "tokenizer.ggml.tokens": ["a", "b", "ab"], "tokenizer.ggml.merges": ["a b"]}
    whole = gguf_bytes(keys, m.raw)
    save("t.npy", np.arange(12, dtype=np.int32))
    write("cut.gguf", whole)
    fine("tokens", "cut.gguf", "t.npy")
    tables = whole.index(
        b"blk.0.ffn_down.weight")  # the first of them; the data begin some 600 bytes later
    cuts = sorted({*range(0, 40), *range(40, tables, 11), *range(tables, tables + 700, 5),
                   *range(tables + 700, len(whole), 41),
                   *range(len(whole) - 40, len(whole))})
    for at in cuts:
        write("cut.gguf", whole[:at])
        wrong(FILE, "cut.gguf", "tokens", "cut.gguf", "t.npy")
    for n in range(300):  # and one with a byte that is another one
        r = random.Random(n)
        at = r.randrange(tables + 700)
        write("bad.gguf", whole[:at] + bytes([r.randrange(256)]) + whole[at + 1:])
        code, out, err = lm("ppl", "bad.gguf", "t.npy", "--attention", "f32")
        lines = code != FINE or json.loads(
            out)["rows"][0]["perplexity"] is None  # of weights that are not finite
        check(code in (FINE, FILE, UNSUPPORTED, MACHINE) and err.count("\n") == lines, f"byte {at}",
              n, code, err)


def test_gguf_wrong():
    m = Model(interleaved=True, layers=2, vocab=50)
    raw, keys = m.raw, m.keys()
    save("t.npy", np.arange(40, dtype=np.int32))
    def bad(code, words, tensors=None, change=None, **how):
        m.raw = {k: v for k, v in {**raw, **(tensors or {})}.items() if v is not None}
        m.gguf("bad.gguf", change=change, **how)
        wrong(code, words, "ppl", "bad.gguf", "t.npy")
    m.gguf("bad.gguf")
    fine("ppl", "bad.gguf", "t.npy")
    wrong(FILE, "nowhere.gguf", "ppl", "nowhere.gguf", "t.npy")
    wrong(FILE, ["t.npy", "no GGUF"], "ppl", "t.npy", "t.npy")
    wrong(FILE, "empty", "ppl", write("empty", ""), "t.npy")
    os.mkdir("folder")
    wrong(FILE, "config.json", "ppl", "folder", "t.npy")
    bad(FILE, "no GGUF", magic=b"GGML")
    for version in 0, 1, 4:
        bad(FILE, ["version", str(version), "2 and 3"], version=version)
    for version in 2, 3:
        bad(UNSUPPORTED, "big-endian", version=version << 24)
    for kind, name in {
            6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 12: "Q4_K", 13: "Q5_K", 15: "Q8_K", 16:
            "IQ2_XXS", 23: "IQ4_XS", 24: "I8", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39:
            "MXFP4", 40: "NVFP4", 4: "no name", 99: "no name", 1 << 31: "no name"
    }.items():
        bad(UNSUPPORTED, ["blk.1.attn_k.weight", f"type {kind}, ", name, "Q8_0"],
            {"blk.1.attn_k.weight": (kind, (32, 64), bytes(32 * 64 * 4))})
    for name in raw:
        if name != "output.weight":
            bad(FILE, ["tiny", f"no tensor '{name}'"], {name: None})
    for name, shape in [("output.weight", (49, 64)), ("output_norm.weight", (63, )),
                        ("output_norm.weight", (2, 64)), ("blk.0.attn_q.weight", (32, 64)),
                        ("blk.1.ffn_down.weight", (96, 64)), ("token_embd.weight", (50, 65)),
                        ("blk.1.attn_norm.weight", (64, 1))]:
        bad(FILE, ["tiny", name, "it must be"], {name: ("F32", shape, bytes(4 * np.prod(shape)))})
    bad(FILE, ["tiny", "output_norm.weight", "is 1 x 1, it must be"],
        {"output_norm.weight": ("F32", (), bytes(4))})
    for shape in (2, 25, 64), (0, 64):
        bad(FILE, ["token_embd.weight", "no vector and no matrix"],
            {"token_embd.weight": ("F32", shape, bytes(4 * int(np.prod(shape))))})
    bad(FILE, ["token_embd.weight", "whole blocks"],
        {"token_embd.weight": ("Q8_0", (50, 33), bytes(5000))})
    bad(FILE, "table of tensors", {"more": ("F32", (1, 1, 1, 1, 1), bytes(4))})
    bad(FILE, ["rope_freqs.weight", "8 elements"], {"rope_freqs.weight": ("F32", (9,), bytes(36))})
    bad(FILE, "rope frequencies", {"rope_freqs.weight": ("F32", (8,), bytes(32))})
    a = "llama."
    for change, code, words in [
        ({"general.architecture": "gemma"}, UNSUPPORTED, ["gemma", "llama and qwen2"]),
        ({"general.architecture": "a\nb" * 900}, UNSUPPORTED, "llama and qwen2"),
        ({"general.architecture": np.uint32(4)}, UNSUPPORTED, "llama and qwen2"),
        ({"general.architecture": None}, UNSUPPORTED, "llama and qwen2"),
        ({a + "rope.dimension_count": np.uint32(8)}, UNSUPPORTED, ["turns 8 of the 16"]),
        ({a + "attention.head_count_kv": np.uint32(3)}, FILE, "no multiple"),
        ({a + "attention.head_count": np.uint32(0)}, FILE, ["0 heads", "1 to"]),
        ({a + "attention.head_count": np.float32(4)}, FILE, ["head_count", "whole number"]),
        ({a + "attention.head_count": np.int32(-4)}, FILE, ["-4 heads", "1 to"]),
        ({a + "attention.head_count": np.uint64(2**64 - 1)}, FILE, ["heads", "1 to"]),
        ({a + "attention.key_length": np.uint32(15)}, FILE, "odd"),
        ({a + "attention.key_length": np.uint32(512)}, FILE, ["512 channels a head", "256"]),
        ({a + "attention.layer_norm_rms_epsilon": np.float32(-1)}, FILE, "epsilon"),
        ({a + "attention.layer_norm_rms_epsilon": np.float32("nan")}, FILE, "epsilon"),
        ({a + "attention.layer_norm_rms_epsilon":
          np.float64(1e-5)}, FILE, ["rms_epsilon", "float32"]),
        ({a + "rope.freq_base": np.float32(0)}, FILE, "theta"),
        ({a + "rope.freq_base": np.float32("nan")}, FILE, "theta"),
        ({a + "block_count": np.uint32(1 << 20)}, FILE, ["1048576 layers", "4096"]),
        ({a + "block_count": np.uint32(3)}, FILE, ["tiny", "blk.2.attn_norm.weight"]),
        ({a + "embedding_length": None}, FILE, ["no key", "llama.embedding_length"]),
        ({a + "context_length": None}, FILE, ["no key", "llama.context_length"]),
        ({a + "context_length": np.uint32(0)}, FILE, "context"),
        ({"general.alignment": np.uint32(0)}, FILE, "general.alignment"),
        ({"general.alignment": np.uint32(1 << 20)}, FILE, "general.alignment"),
        ({"general.alignment": "x"}, FILE, "general.alignment")
    ]:
        bad(code, words, change=change)
    m.raw = raw
    head = gguf_bytes(keys, raw)
    write("bad.gguf", head.replace(b"blk.1.attn_k.weight", b"blk.1.attn_v.weight"))
    wrong(FILE, ["bad.gguf", "two tensors", "blk.1.attn_v.weight"], "ppl", "bad.gguf", "t.npy")
    for at, many, word in [(8, 1 << 40, "too many"), (8, 1 << 16, "ends within"),
                           (16, 1 << 40, "too many"), (16, 60000, "ends within")]:
        write("bad.gguf", head[:at] + struct.pack("<Q", many) + head[at + 8:])
        wrong(FILE, ["bad.gguf", word], "ppl", "bad.gguf", "t.npy")
    # Names that are no UTF-8, or cut within a character, are shown as they can be.
    for name in "é" * 200, "a" + "é" * 200, b"caf\xe9", "two\nlines", "":
        m.gguf("named.gguf", change={"general.name": name})
        x = fine("ppl", "named.gguf", "t.npy", "--attention", "f32")
        check(
            isinstance(x["model"]["name"], str) if "model" in x else False, "its name", name,
            x.get("model"))


def test_gguf_not_computed():
    """What no forward pass here computes is refused by its name; what changes nothing is not."""
    m = Model(interleaved=True, layers=2, vocab=50)
    raw = dict(m.raw)
    save("t.npy", np.arange(40, dtype=np.int32))
    a, small = "llama.", ("F32", (16,), bytes(64))
    for key, value in [("rope.scale_linear", np.float32(4)), ("rope.scaling.factor", np.float32(4)),
                       ("rope.scaling.type", "yarn"), ("rope.scaling.type", "linear"),
                       ("rope.scaling.type", np.uint8(1)),
                       ("rope.scaling.attn_factor", np.float32(1.5)),
                       ("rope.scaling.yarn_log_multiplier", np.float32(1)),
                       ("rope.freq_base_swa", np.float32(1)),
                       ("rope.dimension_sections", [np.int32(4)] * 4),
                       ("attention.scale", np.float32(0.5)),
                       ("attention.sliding_window", np.uint32(16)),
                       ("attention.max_alibi_bias", np.float32(8)),
                       ("attention.clamp_kqv", np.float32(8)), ("attention.causal", False),
                       ("attn_logit_softcapping", np.float32(50)),
                       ("final_logit_softcapping", np.float32(30)),
                       ("logit_scale", np.float32(0.1)), ("embedding_scale", np.float32(12)),
                       ("residual_scale", np.float64(0.2)), ("expert_count", np.uint32(8)),
                       ("attention.layer_norm_epsilon", np.float32(1e-5)),
                       ("whatever.comes", "next")]:
        m.gguf("bad.gguf", change={a + key: value})
        wrong(UNSUPPORTED, ["bad.gguf", f"'{a}{key}'"], "ppl", "bad.gguf", "t.npy")
    for change, words in [({a + "attention.value_length":
                            np.uint32(8)}, ["values of 8 channels", "16"]),
                          ({"general.type": "adapter"}, "'adapter'"),
                          ({"general.type": "mmproj"}, "'mmproj'"),
                          ({"split.count": np.uint16(2), "split.no":
                            np.uint16(0)}, ["split.count", "merge"])]:
        m.gguf("bad.gguf", change=change)
        wrong(UNSUPPORTED, ["bad.gguf", *([words] if isinstance(words, str) else words)], "ppl",
              "bad.gguf", "t.npy")
    write(
        "bad.gguf",
        gguf_bytes({"split.count": np.uint16(2), "split.no": np.uint16(1)},
                   {"output_norm.weight": small}))
    wrong(UNSUPPORTED, "split.count", "ppl", "bad.gguf", "t.npy")
    for name in ("blk.0.attn_q_norm.weight", "blk.1.attn_k_norm.weight", "blk.0.attn_q.bias",
                 "blk.1.attn_v.bias", "blk.0.attn_output.bias", "blk.0.ffn_up.bias", "output.bias",
                 "blk.0.attn_q.weight.lora_a", "blk.0.attn_q.scale",
                 "blk.0.post_attention_norm.weight", "blk.0.attn_sinks.weight",
                 "blk.2.attn_norm.weight", "rope_factors_long.weight", "position_embd.weight",
                 "mm.0.weight"):
        m.raw = {**raw, name: small}
        m.gguf("bad.gguf")
        wrong(UNSUPPORTED, ["tiny", f"'{name}'"], "ppl", "bad.gguf", "t.npy")
    m.raw = raw
    agrees(
        m,
        m.gguf(
            "m.gguf", change={
                a + "rope.scale_linear": np.float32(1), a + "rope.scaling.factor": np.float32(1),
                a + "rope.scaling.type": "none", a + "rope.scaling.original_context_length":
                np.uint32(64), a + "vocab_size": np.uint32(50), a + "attention.value_length":
                np.uint32(16), a + "tensor_data_layout": "Meta AI original pth", a + "expert_count":
                np.uint32(0), "general.type": "model", "split.count": np.uint16(1), "lots.of.text":
                "x" * (3 << 20), "lists": [[np.uint8(1)], [np.uint8(2)] * 9], "deep": [[["x", "y"],
                                                                                        []]]
            }), "keys that change nothing, long ones and lists of lists", n=40)
    deep = np.uint8(1)
    for _ in range(100):
        deep = [deep]
    whole = m.gguf("bad.gguf", change={"a.key": deep})
    wrong(FILE, ["'a.key'", "a type that is not known"], "ppl", whole, "t.npy")
    whole = gguf_bytes({**m.keys(), "a.key": np.uint32(5)}, raw)
    at = whole.index(b"a.key") + 5
    write("bad.gguf", whole[:at] + struct.pack("<I", 77) + whole[at + 4:])
    wrong(FILE, ["'a.key'", "a type that is not known"], "ppl", "bad.gguf", "t.npy")


def test_folder_not_computed():
    m = Model(vocab=50)
    save("t.npy", np.arange(40, dtype=np.int32))
    count = iter(range(1000))
    def bad(code, words, change=None):
        wrong(code, words, "ppl", m.folder(f"bad{next(count)}", change), "t.npy")
    raw = dict(m.raw)
    for key, value in [("partial_rotary_factor", 0.5), ("rope_interleaved", True),
                       ("rotary_pct", 0.25), ("attention_multiplier", 0.1),
                       ("embedding_multiplier", 12), ("logit_scale", 0.1), ("logits_scaling", 8.0),
                       ("attn_logit_softcapping", 50.0), ("query_pre_attn_scalar", 256),
                       ("use_qk_norm", True), ("alibi", True), ("clip_qkv", 8),
                       ("num_local_experts", 8), ("sliding_window", 32),
                       ("quantization_config", {"bits": 4}), ("position_embedding_type", "alibi")]:
        bad(UNSUPPORTED, ["config.json", f"'{key}'"], {key: value})
    for method in "gptq", "awq", "bitsandbytes", "fp8":
        bad(UNSUPPORTED, ["'quantization_config'", method],
            {"quantization_config": {"quant_method": method}})
    bad(
        UNSUPPORTED, "partial_rotary_factor", {
            "rope_theta": ..., "rope_parameters":
            {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.5}
        })
    bad(
        UNSUPPORTED, ["rope_parameters", "rope_scaling", "differ"], {
            "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}, "rope_scaling":
            {"type": "linear", "factor": 2}
        })
    bad(UNSUPPORTED, "sliding_attention", {"layer_types": ["full_attention", "sliding_attention"]})
    for name in ("model.layers.0.self_attn.q_norm.weight", "model.layers.1.self_attn.k_norm.weight",
                 "model.layers.0.self_attn.sinks", "model.layers.0.self_attn.q_proj.lora_A.weight",
                 "model.layers.0.post_feedforward_layernorm.weight",
                 "model.layers.0.mlp.gate_proj.bias", "model.embed_positions.weight",
                 "lm_head.bias", "base_model.model.model.norm.weight"):
        path = m.folder(f"bad{next(count)}")
        tensors = {theirs(k): v for k, v in raw.items()}
        save_safetensors(f"{path}/model.safetensors", **tensors,
                         **{name: ("F32", (16, ), bytes(64))})
        wrong(UNSUPPORTED, ["model.safetensors", f"'{name}'"], "ppl", path, "t.npy")
    # as GGUF has them
    for name in "model.layers.0.self_attn.q_proj.bias", "model.layers.2.input_layernorm.weight":
        path = m.folder(f"bad{next(count)}")
        save_safetensors(f"{path}/model.safetensors", **tensors,
                         **{name: ("F32", (16, ), bytes(64))})
        wrong(UNSUPPORTED, ["blk.", "reads"], "ppl", path, "t.npy")
    path = m.folder("adapted")
    write(f"{path}/adapter_config.json", "{}")
    wrong(UNSUPPORTED, ["adapter_config.json", "merge"], "ppl", path, "t.npy")
    bad(UNSUPPORTED, ["tie_word_embeddings", "lm_head.weight"], {"tie_word_embeddings": True})
    tied = Model(tied=True, vocab=50)
    tied.raw["output.weight"] = tied.raw["token_embd.weight"]
    agrees(tied, tied.folder("both"), "tied, and there twice", n=40)
    for number, change in enumerate([{
            "partial_rotary_factor": 1.0, "rope_interleaved": False, "sliding_window": None,
            "num_local_experts": 1, "quantization_config": None, "attention_bias": False,
            "pretraining_tp": 1, "torch_dtype": "float32"
    }, {"rope_parameters": {"rope_type": "default"}, "rope_scaling":
            None}, {"layer_types": ["full_attention"] * 2
                    }, {"sliding_window": 32, "use_sliding_window": False, "max_window_layers":
                        1}]):
        agrees(m, m.folder(f"idle{number}", change), f"what changes nothing: {change}", n=40)
    m = Model(architecture="qwen2", vocab=50)
    agrees(m, m.folder("qwen2", {"sliding_window": 32}), "a window that Qwen2 does not use unasked",
           n=40)


def test_folder_wrong():
    m = Model(vocab=50)
    save("t.npy", np.arange(40, dtype=np.int32))
    count = iter(range(1000))
    def bad(code, words, change=None, **how):
        path = m.folder(f"bad{next(count)}", change, **how)
        wrong(code, words, "ppl", path, "t.npy")
        return path
    for change, code, words in [
        ({"model_type": "mistral"}, UNSUPPORTED, ["config.json", "mistral", "llama and qwen2"]),
        ({"model_type": ...}, UNSUPPORTED, "llama and qwen2"),
        ({"hidden_act": "gelu"}, UNSUPPORTED, "gelu"),
        ({"use_sliding_window": True}, UNSUPPORTED, "use_sliding_window"),
        ({"attention_bias": True}, UNSUPPORTED, "attention_bias"),
        ({"mlp_bias": True}, UNSUPPORTED, "mlp_bias"),
        ({"rope_scaling": {"rope_type": "yarn", "factor":
                           4.0}}, UNSUPPORTED, ["rope scaling", "yarn"]),
        ({"rope_scaling": {"type": "linear", "factor":
                           4.0}}, UNSUPPORTED, ["rope scaling", "linear"]),
        ({"rope_scaling": {}}, UNSUPPORTED, "rope scaling"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, UNSUPPORTED, "dynamic"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, FILE, "low_freq_factor"),
        ({
            "rope_scaling": {
                "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor":
                1.0, "original_max_position_embeddings": 512
            }
        }, FILE, "no sense"), ({"rope_theta": "much"}, FILE, "rope_theta"),
        ({"rope_theta": -1.0}, FILE, "theta"),
        ({"hidden_size": ...}, FILE, ["config.json", "hidden_size"]),
        ({"hidden_size": 64.0}, FILE, "hidden_size"), ({"num_hidden_layers":
                                                        -1}, FILE, "-1 layers"),
        ({"num_hidden_layers": 0}, FILE, "0 layers"),
        ({"num_attention_heads": 3}, FILE, "no multiple"),
        ({"num_key_value_heads": 0}, FILE, "key heads"),
        ({"rms_norm_eps": None}, FILE, "rms_norm_eps"), ({"head_dim": 0}, FILE, "channels a head"),
        ({"head_dim": 32}, FILE, ["blk.0.attn_q.weight", "128 x 64"]),
        ({"intermediate_size": 97}, FILE, "ffn_gate")
    ]:
        bad(code, words, change)
    path = m.folder("cut")
    for text in "", "{", "[1]", '{"a": 1, "a": 2}', "\xff":
        write(f"{path}/config.json", text)
        wrong(FILE, "cut/config.json", "ppl", path, "t.npy")
    os.remove(f"{path}/config.json")
    wrong(FILE, "cut/config.json", "ppl", path, "t.npy")
    path = m.folder("weights")
    whole = read(f"{path}/model.safetensors", "rb")
    for at in 0, 4, 100, 3000, len(whole) - 1, len(whole) // 2:
        write(f"{path}/model.safetensors", whole[:at])
        wrong(FILE, "model.safetensors", "ppl", path, "t.npy")
    os.remove(f"{path}/model.safetensors")
    wrong(FILE, "model.safetensors", "ppl", path, "t.npy")
    names = {"model.layers.0.self_attn.q_proj.weight": ("I8", (64, 64), bytes(4096))}
    save_safetensors(f"{path}/model.safetensors", **names)
    wrong(FILE, ["model.safetensors", "q_proj", "dtype"], "ppl", path, "t.npy")
    raw = m.raw
    for name in "blk.1.ffn_up.weight", "output.weight":
        m.raw = {k: v for k, v in raw.items() if k != name}
        bad(FILE, ["no tensor", name])
    bad(FILE, ["lm_head.weight", "tie_word_embeddings"], {"tie_word_embeddings": ...})
    bad(FILE, ["lm_head.weight", "tie_word_embeddings"], {"tie_word_embeddings": None})
    m.raw = {**raw, "output_norm.weight": ("F32", (1, 1, 64), bytes(256))}
    bad(FILE, ["model.norm.weight", "no vector and no matrix"])
    m.raw = raw
    path = m.folder("shards", shards=2)
    index = f"{path}/model.safetensors.index.json"
    good = json.loads(read(index))
    for value, words in [("nowhere.safetensors", "nowhere.safetensors"), (5, "is in no file"),
                         ("../x.safetensors", "is in no file"),
                         ("/etc/passwd", "is in no file")]:
        write(index, json.dumps({"weight_map": {**good["weight_map"], "model.norm.weight": value}}))
        wrong(FILE, words, "ppl", path, "t.npy")
    for text in "", "{}", '{"weight_map": 4}', '{"weight_map": {}}':
        write(index, text)
        wrong(FILE, ["index.json"] if "{}}" not in text else "token_embd", "ppl", path, "t.npy")


def test_texts_wrong():
    m = Model(interleaved=True, context=300, vocab=50)
    m.gguf("m.gguf", small_bpe(size=300).keys())
    m.gguf("m.gguf")
    save("t.npy", np.arange(40, dtype=np.int32))
    for x, words in [(np.arange(60), ["token 50", "0 to 49", "tiny"]),
                     (np.array([3, -1], np.int32), ["token 1", "0 to 49"]),
                     (np.array([3, 2**40]), "token 1"), (np.array([2**31, 1]), "token 0"),
                     (np.arange(9.0), "int32 or int64"), (np.arange(8).reshape(2, 4), "one axis"),
                     (np.array(5), "one axis"), (np.arange(5, dtype=np.uint8), "int32 or int64"),
                     (np.zeros(0, np.int32), "nothing to predict"),
                     (np.array([1]), "nothing to predict")]:
        wrong(FILE, ["x.npy", *([words] if isinstance(words, str) else words)], "ppl", "m.gguf",
              save("x.npy", x))
    fine("ppl", "m.gguf", save("x.npy", np.arange(40)[None]), "--attention", "f32")
    fine("ppl", "m.gguf", save("x.npy", np.asfortranarray(np.arange(40)[None])), "--attention",
         "f32")
    write("x.npy", read("t.npy", "rb")[:-3])
    wrong(FILE, "x.npy", "ppl", "m.gguf", "x.npy")
    wrong(FILE, "nowhere.npy", "ppl", "m.gguf", "nowhere.npy")
    wrong(FILE, ["t.npy", "40", "41"], "ppl", "m.gguf", "t.npy", "--length", 41)
    save("long.npy", np.zeros(400, np.int32))
    for args in [], ["--length", 301], ["--length", "5,301"]:
        wrong(FILE, ["long.npy", "300", "--length"], "ppl", "m.gguf", "long.npy", *args)
    fine("ppl", "m.gguf", "long.npy", "--length", 300)
    fine("ppl", "m.gguf", "t.npy", "--length", 2)
    full = Model(interleaved=True, vocab=600)
    full.gguf("full.gguf", small_bpe().keys())
    wrong(FILE, ["e.txt", "empty"], "ppl", "full.gguf", write("e.txt", ""))
    wrong(FILE, ["e.txt", "UTF-8"], "ppl", "full.gguf", write("e.txt", b"\xfe"))
    wrong(FILE, ["e.txt"], "ppl", "full.gguf", write("e.txt", "words"), "--length", 100)
    name = b"caf\xe9.txt"
    shutil.copy(TEXT, name)
    wrong(FILE, "UTF-8", "ppl", "full.gguf", name, "--length", 100)
    wrong(FILE, "UTF-8", "needle", "full.gguf", name, "--length", 100)
    wrong(FILE, "UTF-8", "capture", "full.gguf", name, "--length", 100, "-o", "no")
    wrong(FILE, "UTF-8", "ppl", "full.gguf", TEXT, "--length", 100, "--model", b"caf\xe9")


def test_usage():
    m = Model(interleaved=True, vocab=50)
    m.gguf("m.gguf")
    save("t.npy", np.arange(40, dtype=np.int32))
    wrong(USAGE, "command is missing")
    for name, meant in dict(pp="ppl", needles="needle", tiem="time", capture_="capture",
                            token="tokens").items():
        wrong(USAGE, f"did you mean '{meant}'", name)
    for args, words in [(["--bogus"], "--bogus"), (["--lenght", 5], "did you mean --length"),
                        (["--length", 1], ["--length", "[2, "]), (["--length", "5,x"], "'x'"),
                        (["--length", ""], "--length"), (["--length", "5,"], "--length"),
                        (["--length", ",".join(["5"] * 17)], "more than 16"),
                        (["--attention", "densa"], ["'dense'", "f32, int8, sparse"]),
                        (["--attention", "f32,f32"], ["f32", "twice"]),
                        (["--attention", "f32", "--attention", "f32"], "twice"),
                        (["--attention", ""], "--attention"),
                        (["--attention", "f32,,sparse"], "--attention"),
                        (["--attention", ",".join(f"{n}.npy" for n in range(17))], "more than 16"),
                        (["--causal"], ["--causal", "leave them out"]),
                        (["--softmax-scale", 1], "leave them out"), (["--layout", "nhd"],
                                                                     "leave them out"),
                        (["--rules", "paper"], "--rules"), (["--tau", 2], "--tau"),
                        (["--logits", "L.npy"], "one --attention"),
                        (["t.npy", "--attention", "f32", "--logits", "L.npy"], "one text"),
                        (["--attention", "f32", "--length", "5,6", "--logits",
                          "L.npy"], "one --length")]:
        wrong(USAGE, words, "ppl", "m.gguf", "t.npy", *args)
    wrong(USAGE, "a model", "ppl")
    wrong(USAGE, "a text", "ppl", "m.gguf")
    wrong(USAGE, "too many", "ppl", "m.gguf", *["t.npy"] * 65)
    fine("ppl", "m.gguf", *["t.npy"] * 64, "--attention", "f32", "--length", 5)
    for name in "nowhere.npy", "nowhere.json":
        wrong(FILE, name, "ppl", "m.gguf", "t.npy", "--attention", name)
    write("bad.json", "{")
    wrong(FILE, "bad.json", "ppl", "m.gguf", "t.npy", "--attention", "bad.json")
    for shape, dtype, words in [((2, 4, 1), bool, "(2, 4, 1)"),
                                ((3, 4, 1, 1), bool, "(3, 4, 1, 1)"),
                                ((2, 3, 1, 1), bool, "4 heads"),
                                ((2, 4, 1, 1), np.float32, "u8 or bool"),
                                ((2, 4, 1, 2), bool, "2 key blocks"),
                                ((2, 4, 2, 1), np.uint8, "2 query blocks")]:
        wrong(FILE, ["mask.npy", words], "ppl", "m.gguf", "t.npy", "--attention",
              save("mask.npy", np.ones(shape, dtype)))
    save("a.npy", np.ones((1, 4, 1, 1), bool))
    # What is read must not be written over.
    for command, more in ("ppl", ["--length", 20]), ("time", ["--repeat", 1]):
        for output in (["-o", "t.npy"], ["--csv", "t.npy"], ["-o", "m.gguf"], ["--csv", "./m.gguf"],
                       ["--attention", "a.npy", "--csv", "a.npy"]):
            keeps(output[-1], USAGE, [output[-1], "is an input"], command, "m.gguf", "t.npy", *more,
                  *output)
    keeps("t.npy", USAGE, "is an input", "ppl", "m.gguf", "t.npy", "--attention", "f32", "--logits",
          "t.npy")
    one = ["--attention", "f32", "--logits", "same"]
    for args in ["-o", "same", "--csv", "same"], [*one, "--csv", "same"]:
        wrong(USAGE, "the same file", "ppl", "m.gguf", "t.npy", *args)
    keeps("t.npy", USAGE, "is an input", "tokens", "m.gguf", "t.npy", "-o", "t.npy")
    for option in (["--tau", 0.5], ["--kernel", 3], ["--attention",
                                                   "f32"], ["--length",
                                                            5], ["--csv", "x"], ["--threads", 1]):
        wrong(USAGE, ["unknown option", option[0]], "tokens", "m.gguf", "t.npy", *option)
    wrong(USAGE, "a model", "tokens")
    check("attention" not in lm("tokens", "--help")[1] and "--output" in lm("tokens", "--help")[1],
          "options of tokens")
    for option in (["--tau", 0.5], ["--theta", 0.1], ["--topk", 0.5], ["--min-mass", 0.5],
                   ["--cell", 8], ["--lambda", -3]):
        for attention in "f32", "int8,f32":
            wrong(USAGE, [option[0], "--attention sparse"], "ppl", "m.gguf", "t.npy", "--attention",
                  attention, *option)
        wrong(USAGE, [option[0], "--attention sparse"], "capture", "m.gguf", "t.npy", "-o", "no",
              *option)
        fine("ppl", "m.gguf", "t.npy", *option)
        fine("ppl", "m.gguf", "t.npy", "--attention", "f32,sparse", *option)
    fine("ppl", "m.gguf", "t.npy", "--attention", save("a.npy", np.ones((1, 4, 1, 1), bool)),
         "--lambda", -3)
    for args in ["--help"], ["--version"
                             ], *([n, "--help"]
                                  for n in ("ppl", "needle", "time", "capture", "tokens")):
        code, out, err = lm(*args)
        check(code == FINE and err == "" and "sparge-lm" in out, args, code, err)
    out = lm("ppl", "--help")[1]
    check(
        out.index("What is run:") < out.index("--length=") < out.index("What is kept:") <
        out.index("--tau="), "under their headings")


def test_writing():
    m = Model(interleaved=True)
    m.gguf("m.gguf")
    some_tokens(300)
    run = ["ppl", "m.gguf", "t.npy", "--attention", "f32"]
    for option in "-o", "--csv", "--logits":
        wrong(FILE, "nowhere", *run, option, "nowhere/x")
        os.makedirs("folder", exist_ok=True)
        wrong(FILE, ["folder", "directory"], *run, option, "folder")
    wrong(FILE, "nowhere", "tokens", "m.gguf", "t.npy", "-o", "nowhere/x.npy")
    device = full_device()
    if device:
        for option in "--csv", "--logits":
            wrong(FILE, "No space left", *run, option, device)
        wrong(FILE, "No space left", "tokens", "m.gguf", "t.npy", "-o", device)
        for args in run, ["tokens", "m.gguf", "t.npy"], ["time", "m.gguf",
                                                         "t.npy"], ["--help"], ["ppl", "--help"]:
            with open(device, "w") as full:
                wrong(FILE, ["standard output", "No space left"], *args, stdout=full)
    # (of a file: clang's OpenMP makes one of 1 KB when it starts, and ends the program if it
    # cannot)
    small = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    many = [*run[:3], "--length", ",".join(str(n) for n in range(10, 26))]
    wrong(FILE, "too large", *many, "--csv", "x", preexec_fn=small)
    wrong(FILE, "too large", *run, "--logits", "x", preexec_fn=small)
    code, out, err = lm(*many, "-o", "R.json", preexec_fn=small)
    check(
        code == FILE and "R.json" in err and "too large" in err and err.count("\n") == 1 and
        out == "", "-o", code, err)
    check(0 < len(json.loads(read("R.json"))["rows"]) < 32, "the rows that fit")
    check(len(fine(*many, "-o", "R.json")["rows"]) == 32, "and with more room it goes on")
    wrong(FILE, "standard output", *run, preexec_fn=lambda: os.close(1))


def test_memory():
    """Address space for the program, and little more."""
    m = Model(interleaved=True, vocab=40000, dim=256, context=1 << 24)
    size = os.path.getsize(m.gguf("m.gguf"))
    save("t.npy", np.zeros(1 << 20, np.int32))
    tight = lambda bytes_: lambda: resource.setrlimit(resource.RLIMIT_AS, (bytes_, bytes_))
    if lm("--version", preexec_fn=tight(512 << 20))[0] != FINE:
        print("skipped: out of memory (a sanitizer takes more)")
        return
    need = next(x for x in range(10 << 20, 512 << 20, 4 << 20)
                if lm("--version", preexec_fn=tight(x))[0] == FINE)
    one = dict(os.environ, OMP_NUM_THREADS="1",
               OPENBLAS_NUM_THREADS="1")  # a thread's stack takes some of it
    Model(interleaved=True).gguf("small.gguf")
    codes = []
    for more in range(0, 80 << 20, 1 << 20):  # wherever it ends, in our code or a library's
        code, out, err = lm("ppl", "small.gguf", "t.npy", "--attention", "f32", "--length", 100,
                            env=one, preexec_fn=tight(need + more))
        check(
            code == FINE and err == "" or
            code == MACHINE and err.count("\n") == 1 and "memory" in err and out == "",
            "all or a line", more, code, err)
        codes.append(code)
    check({FINE, MACHINE} <= set(codes), "little and enough", codes)

    def small_for_threads():
        resource.setrlimit(resource.RLIMIT_STACK, (8 << 20, 8 << 20))  # of a thread, too
        tight(1 << 30)()

    wrong(MACHINE, ["threads is 1000", "start"], "ppl", "small.gguf", "t.npy", "--length", 100,
          "--threads", 1000, preexec_fn=small_for_threads)

    # JSON, of many numbers to be written, or of many rows to be read: all of it or a line.
    save("many.npy", np.zeros(200_000, np.int32))
    resumed = ["ppl", "small.gguf", "t.npy", "--attention", "f32", "--length", 100, "-o", "R.json"]
    fine(*resumed)
    rows = json.loads(read("R.json"))
    rows["rows"] += [{**rows["rows"][0], "text": str(n)} for n in range(10_000)]
    write("many.json", json.dumps(rows))
    for args, many in (["tokens", "small.gguf", "many.npy"], 200_000), (resumed, 10_001):
        codes = []
        for more in range(0, 96 << 20, 3 << 20):
            shutil.copy("many.json", "R.json")
            code, out, err = lm(*args, env=one, preexec_fn=tight(need + more))
            there = json.loads(out) if code == FINE and out else {}
            there = there.get("rows") or (there.get("texts") or [{}])[0].get("tokens", [])
            check(
                code == FINE and len(there) == many or
                code == MACHINE and err.count("\n") == 1 and "memory" in err and out == "", args[0],
                "all or a line", more, code, err, len(there))
            check(json.loads(read("R.json")) == rows or code == FINE, "rows that are there stay")
            codes.append(code)
        check({FINE, MACHINE} <= set(codes), args[0], "little and enough", codes)
    wrong(MACHINE, ["m.gguf", "memory"], "ppl", "m.gguf", "t.npy", "--length", 100,
          preexec_fn=tight(need + size // 2), env=one)
    wrong(MACHINE, ["tokens need", "shorter"], "ppl", "m.gguf", "t.npy", "--attention", "f32",
          "--length", 1 << 18, preexec_fn=tight(need + size + (400 << 20)), env=one)
    wrong(MACHINE, "memory", "ppl", "m.gguf", "t.npy", "--attention", "f32", "--length", 1 << 20,
          preexec_fn=tight(need + size + (500 << 20)), env=one)


# ---- The real model --------------------------------------------------------------------------

ran = []


def test_real_model():
    if not os.path.exists(REAL):
        return
    manifest = json.loads(read(os.path.join(CAPTURE, "smollm2-135m", "manifest.json")))
    length = manifest["tokens"]
    fine("tokens", REAL, TEXT, "-o", "t.npy")
    token = np.load("t.npy")[:length].astype("<i4")
    if check(hashlib.sha256(token.tobytes()).hexdigest() == manifest["token_ids_int32_le_sha256"],
             "tokens of SmolLM2", token[:20]):
        ran.append("tokens")
    row = fine("ppl", REAL, TEXT, "--length", length, "--attention", "f32")["rows"][0]
    if check(f"{row['perplexity']:.4g}" == f"{manifest['perplexity']:.4g}", "perplexity of SmolLM2",
             row, manifest["perplexity"]):
        ran.append("perplexity")
    fine("capture", REAL, TEXT, "--length", length, "--layers", 6, "--groups", 2, "-o", "c")
    got = load_file("c/layer06.safetensors")
    want = load_file(os.path.join(CAPTURE, "smollm2-135m", "layer06_group2.safetensors"))
    off = {
        n: np.abs(got[n].astype(np.float64) - want[n]).max() /
        np.abs(want[n].astype(np.float64)).max() for n in "qkv"
    }
    if check(max(off.values()) < 2e-3, "q, k and v of SmolLM2", off):
        ran.append("capture")
    # The line of README.md, but for its length.
    committed = os.path.join(ROOT, "experiments", "tune", "model_worst.json")
    row = fine("ppl", REAL, TEXT, "--length", 256, "--attention", committed)["rows"][0]
    if check(row["attention"] == "model_worst.json" and row["sparsity"] > 0, "committed thresholds",
             row):
        ran.append("thresholds")


def test_committed_thresholds():
    """They say that they are for the weights that get_model.sh fetches, so that its name does not
    matter."""
    experiments = os.path.join(ROOT, "experiments")
    manifest = json.loads(
        read(os.path.join(experiments, "capture", "smollm2-135m", "manifest.json")))
    check(manifest["gguf_sha256"] in read(os.path.join(experiments, "capture", "model.py")),
          "what is fetched", manifest)
    names = [
        name for name in glob.glob(os.path.join(experiments, "*", "*.json"))
        if '"sparge_params"' in read(name)
    ]
    of_model = [p for p in map(json.loads, map(read, names)) if p["model"] == manifest["model"]]
    check(
        len(of_model) >= 8 and {p["weights_sha256"] for p in of_model} == {manifest["gguf_sha256"]},
        "whose", names)


def what_ran():
    return "; the real model: " + ("not here"
                                   if not os.path.exists(REAL) else ", ".join(ran) or "not run")


run_tests(globals(), sys.argv[3:], "sparge-lm-", what_ran)
