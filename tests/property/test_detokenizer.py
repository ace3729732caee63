"""Whatever the tokens: the pieces of text join to what `tokenizer.decode` makes of all of them at once."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, StopStringCriteria

from worker.engine.detokenizer import DetokenizerFactory, TextDelta

TRAINING = ["The circle is red. Two cats, don't they sleep? Größe, naïve, 日本語, 👩‍👩‍👧 and 🎉🎉 twice."] * 3
SPECIALS = ["<pad>", "</s>", "<unk>", "<image>", "<end_of_utterance>"]
#: Python's white space, minus what no tokenizer here can spell apart from text.
TEXTS = st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from("aé日🎉👩\u200d\n  \ufffd")), max_size=40)


@cache
def byte_level() -> PreTrainedTokenizerFast:
    """GPT-2's kind, of LLaVA-Qwen, Idefics3, SmolVLM and Qwen-VL."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TRAINING,
        trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", additional_special_tokens=SPECIALS[2:]
    )
    fast.add_tokens(["plain added", "größer"])
    return fast


@cache
def byte_fallback() -> PreTrainedTokenizerFast:
    """SentencePiece's kind, of Idefics2 and Gemma: a marker for spaces, bytes for rare characters."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    every_byte = [f"<0x{byte:02X}>" for byte in range(256)]
    letters = [*sorted(set("".join(TRAINING)) - {" ", "🎉", "日"}), "▁"]
    vocabulary = {token: i for i, token in enumerate([*SPECIALS, *every_byte, *letters])}
    tokenizer.model = models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=SPECIALS[3:],
    )  # fmt: skip


@cache
def word_piece() -> PreTrainedTokenizerFast:
    """BERT's kind, of GIT and BLIP: joins word parts and tidies spaces."""
    words = ["[UNK]", "[PAD]", "a", "red", "circle", "##s", "##ing", "sleep", ".", ",", "don", "'", "t", "!"]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]")


@cache
def factory(name: str) -> DetokenizerFactory:
    return DetokenizerFactory(TOKENIZERS[name]())


TOKENIZERS = {"byte_level": byte_level, "byte_fallback": byte_fallback, "word_piece": word_piece}


def pieces(
    name: str, token_ids: list[int], stop: tuple[str, ...] = (), *, keeps_leading_space: bool = False
) -> list[TextDelta]:
    """Feed the tokens one by one, as the engine does for a request that ends by length."""
    detokenizer = factory(name).make(stop, keeps_leading_space=keeps_leading_space)
    told: list[TextDelta] = []
    for number, token_id in enumerate(token_ids, start=1):
        delta = detokenizer.push(token_id, is_last=number == len(token_ids))
        if delta is not None:
            told.append(delta)
            if delta.is_stopped:
                break
    return told


def cut(text: str, stop: tuple[str, ...]) -> str:
    """Cut a whole text at the stop string that is complete first; where several are, at the one that began first."""
    for end in range(len(text) + 1):
        begun = [end - len(each) for each in stop if text[:end].endswith(each)]
        if begun:
            return text[: min(begun)]
    return text


@pytest.mark.parametrize("keeps_leading_space", [False, True])
@given(data=st.data())
def test_random_byte_level_tokens_join_to_decode(data: st.DataObject, keeps_leading_space: bool) -> None:
    tokenizer = byte_level()
    token_ids = data.draw(st.lists(st.integers(0, len(tokenizer) + 2), min_size=1, max_size=40))
    expected = tokenizer.decode(token_ids, skip_special_tokens=True)
    told = pieces("byte_level", token_ids, keeps_leading_space=keeps_leading_space)
    assert "".join(delta.text for delta in told) == (expected if keeps_leading_space else expected.lstrip())
    assert sum(delta.num_tokens for delta in told) == len(token_ids)


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback"])
@given(text=TEXTS.filter(bool))
def test_no_piece_of_a_real_text_has_half_a_character(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]()
    text = text.replace("\ufffd", "?")
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    told = pieces(name, token_ids)
    expected = tokenizer.decode(token_ids, skip_special_tokens=True).lstrip()
    assert "\ufffd" not in "".join(delta.text for delta in told)
    assert "".join(delta.text for delta in told) == expected
    assert [delta.offset for delta in told] == [
        sum(len(before.text) for before in told[:number]) for number in range(len(told))
    ]


@given(token_ids=st.lists(st.integers(0, 13), min_size=1, max_size=20))
def test_word_pieces_join_to_decode(token_ids: list[int]) -> None:
    expected = word_piece().decode(token_ids, skip_special_tokens=True).lstrip()
    assert "".join(delta.text for delta in pieces("word_piece", token_ids)) == expected


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback"])
@given(
    text=st.text("ab\n é", min_size=1, max_size=30),
    stops=st.lists(st.text("ab\n é", min_size=1, max_size=4), max_size=4),
)
def test_text_is_cut_at_the_first_stop_string(name: str, text: str, stops: list[str]) -> None:
    tokenizer, stop = TOKENIZERS[name](), tuple(stops)
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    told = pieces(name, token_ids, stop)
    expected = tokenizer.decode(token_ids, skip_special_tokens=True).lstrip()
    assert "".join(delta.text for delta in told) == cut(expected, stop)
    assert bool(told and told[-1].is_stopped) == any(each in expected for each in stop)


@pytest.mark.parametrize("name", ["byte_fallback", "word_piece"])
@given(token_ids=st.lists(st.integers(0, 500), min_size=1, max_size=200))
def test_a_window_never_grows(name: str, token_ids: list[int]) -> None:
    """Time stays proportional to the tokens, for nonsense too."""
    stream = factory(name).make((), keeps_leading_space=True)._stream
    for token_id in token_ids:
        stream.push(token_id)
        assert len(stream._window) <= 8


def test_a_special_token_never_reaches_the_reader() -> None:
    for name in ("byte_level", "byte_fallback"):
        ids = TOKENIZERS[name]().encode("Assistant<end_of_utterance>\nUser", add_special_tokens=False)
        assert "<end_of_utterance>" not in "".join(delta.text for delta in pieces(name, ids))


CHECKPOINT_TEXTS = ("The circle is red. Two cats, don't they sleep", " twice  twice", "a red, red circle")


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback"])
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_checkpoints_stop_string_stops_where_generate_does(name: str, data: st.DataObject) -> None:
    """Special tokens, the space before the first word and the end of the prompt are looked at; none is shown."""
    tokenizer = TOKENIZERS[name]()
    words = [token for text in CHECKPOINT_TEXTS for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    start = data.draw(st.integers(0, len(words) - 12))
    some = st.sampled_from([*words, *tokenizer.all_special_ids])
    token_ids = [data.draw(st.one_of(st.just(token), some)) for token in words[start : start + 12]]
    prompt, answer = token_ids[:4], token_ids[4:]
    raw = tokenizer.decode(token_ids)
    at = data.draw(st.integers(0, len(raw) - 1))
    stop = raw[at : at + data.draw(st.integers(1, 5))]

    criteria = StopStringCriteria(tokenizer, [stop])
    ends = (end for end in range(1, len(answer) + 1) if criteria(torch.tensor([prompt + answer[:end]]), None).any())
    expected = next(ends, len(answer))
    keeps_leading_space = data.draw(st.booleans())
    detokenizer = DetokenizerFactory(tokenizer, (stop,)).make(
        None, keeps_leading_space=keeps_leading_space, prompt_ids=prompt
    )
    text, num_read = "", 0
    for num_read, token_id in enumerate(answer, start=1):
        delta = detokenizer.push(token_id, is_last=num_read == len(answer))
        text += delta.text if delta is not None else ""
        if delta is not None and delta.is_stopped:
            break
    else:
        delta = None
    assert num_read == expected
    whole = tokenizer.decode(answer[:expected], skip_special_tokens=True)
    whole = whole if keeps_leading_space else whole.lstrip()
    assert text == whole if delta is None else whole.startswith(text)
