"""The tokenizer and chat template that a GGUF file describes in its metadata, as a tokenizer.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from mpcinfer.errors import InputError, UnsupportedError
from mpcinfer.models.vocabulary import Vocabulary

if TYPE_CHECKING:
    from mpcinfer.models.gguf import Metadata

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # types of tokens
# tokens that end an answer, whatever the file says
_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<|end|>")

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
# how a text is cut into words before pairs are merged, by tokenizer.ggml.pre
_WORDS: Mapping[str, tuple[str, ...]] = {
    "gpt-2": (_GPT2,),
    "llama-bpe": (_LLAMA3,),
    "qwen2": (_LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"),),
    "smollm": (r"\p{N}", _GPT2),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
}
_ALSO = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2", "starcoder": "smollm"} | {
    "refact": "smollm",
    "phi-2": "gpt-2",
}


def vocabulary(metadata: Metadata, size: int) -> Vocabulary | None:
    """What `metadata` says of texts, None if it says nothing; `size` is how many embeddings there are.

    InputError for what contradicts itself, UnsupportedError for other kinds of tokenizers.
    """
    kind = metadata.get("tokenizer.ggml.model", str, None)
    if kind is None:
        return None
    tokens = _texts(metadata, "tokens")
    ids = {token: i for i, token in enumerate(tokens)}
    if len(ids) != len(tokens) or len(tokens) > size:
        raise InputError(f"the GGUF file names {len(tokens)} tokens, {len(ids)} of them different, and embeds {size}")
    if kind == "gpt2":
        found, begins = _byte_level(metadata, ids), _words(metadata) == "llama-bpe"
    elif kind == "llama":
        found, begins = _sentence_piece(metadata, ids), True
    else:
        raise UnsupportedError(f"tokenizer.ggml.model {kind!r} is not supported, only gpt2 and llama")
    types = metadata.get("tokenizer.ggml.token_type", list, [])
    for special, wanted in ((True, (_CONTROL, _UNKNOWN)), (False, (_USER_DEFINED,))):
        added = [AddedToken(t, normalized=False, special=special) for t, of in zip(tokens, types) if of in wanted]  # noqa: B905
        found.add_tokens(added)
    bos, eos = (_token(metadata, f"{name}_token_id", tokens) for name in ("bos", "eos"))
    before = [bos] if bos and metadata.get("tokenizer.ggml.add_bos_token", bool, begins) else []
    after = [eos] if eos and metadata.get("tokenizer.ggml.add_eos_token", bool, False) else []
    if before or after:
        found.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after], special_tokens=[(token, ids[token]) for token in {*before, *after}]
        )
    ends = {eos, *(_token(metadata, f"{name}_token_id", tokens) for name in ("eot", "eom")), *_ENDS}
    template = metadata.get("tokenizer.chat_template", str, "")
    return Vocabulary(found.to_str(), template, bos, eos, tuple(sorted(ids[end] for end in ends if end in ids)))


def _texts(metadata: Metadata, name: str) -> list[str]:
    found: list[str] = metadata.get(f"tokenizer.ggml.{name}", list)
    if not found or not all(type(each) is str for each in found):
        raise InputError(f"tokenizer.ggml.{name} in the GGUF file's metadata should list texts")
    return found


def _token(metadata: Metadata, name: str, tokens: Sequence[str]) -> str:
    """The token whose id the metadata gives, "" if it gives none."""
    number: int | None = metadata.get(f"tokenizer.ggml.{name}", int, None)
    if number is None or number == 0xFFFFFFFF:
        return ""
    if not 0 <= number < len(tokens):
        raise InputError(f"tokenizer.ggml.{name} in the GGUF file's metadata is no token's id")
    return tokens[number]


def _words(metadata: Metadata) -> str:
    name: str = metadata.get("tokenizer.ggml.pre", str, "default")
    name = _ALSO.get(name, name)
    if name not in _WORDS:
        known = ", ".join(sorted({*_WORDS, *_ALSO}))
        raise UnsupportedError(f"tokenizer.ggml.pre {name!r} is not supported. Supported: {known}")
    return name


def _byte_level(metadata: Metadata, ids: dict[str, int]) -> tokenizers.Tokenizer:
    """Pairs of bytes, and of what came of them, are merged in the order of a list, within words."""
    words = _words(metadata)
    merges = []
    for line in _texts(metadata, "merges"):
        left, _, right = line.partition(" ")
        if not {left, right, left + right} <= ids.keys():
            raise InputError("tokenizer.ggml.merges in the GGUF file's metadata merges what are no tokens")
        merges.append((left, right))
    found = tokenizers.Tokenizer(models.BPE(ids, merges, ignore_merges=words == "llama-bpe"))
    if words == "qwen2":
        found.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in _WORDS[words]]
    spelt = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    found.pre_tokenizer = pre_tokenizers.Sequence([*splits, spelt])
    found.decoder = decoders.ByteLevel()
    return found


def _sentence_piece(metadata: Metadata, ids: dict[str, int]) -> tokenizers.Tokenizer:
    """Of all pairs in a text that make a token, the one of the highest score is merged first; bytes are a fall-back."""
    scores = metadata.get("tokenizer.ggml.scores", list)
    if len(scores) != len(ids):
        raise InputError("tokenizer.ggml.scores in the GGUF file's metadata should have one score for each token")
    ranked: list[tuple[float, int, int, str, str]] = []
    for token, i in ids.items():
        for at in range(1, len(token)):
            left, right = token[:at], token[at:]
            if left in ids and right in ids:
                ranked.append((-scores[i], ids[left], ids[right], left, right))
    unknown = _token(metadata, "unknown_token_id", list(ids)) or None
    model = models.BPE(
        ids, [(x[3], x[4]) for x in sorted(ranked)], unk_token=unknown, fuse_unk=True, byte_fallback=True
    )
    found = tokenizers.Tokenizer(model)
    spaces: list[normalizers.Normalizer] = [normalizers.Replace(" ", "▁")]
    back: list[decoders.Decoder] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.get("tokenizer.ggml.add_space_prefix", bool, True):
        spaces.insert(0, normalizers.Prepend("▁"))
        back.append(decoders.Strip(" ", 1, 0))
    found.normalizer = normalizers.Sequence(spaces)
    found.decoder = decoders.Sequence(back)
    return found
