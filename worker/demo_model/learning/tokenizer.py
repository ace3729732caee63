"""The tokenizer: byte-level BPE over the question templates, lower-casing.

Every word of the templates becomes one token; any other text a user types still encodes, byte by byte.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from worker.demo_model.learning.conversations import clip_conversation, image_conversation, images_conversation

IMAGE_TOKEN = "<image>"
IMAGE_SEPARATOR = "<fake_token_around_image>"
END_OF_TURN = "<end_of_utterance>"

MAX_LENGTH = 2048
CORPUS_SEED, CORPUS_ROUNDS = 123, 3000


def train_tokenizer() -> Any:
    """Train the tokenizer; always the same, since the corpus has a fixed seed. Takes a few seconds."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,  # never reached: merging stops when every word of the templates is one token
        min_frequency=1,
        show_progress=False,
        special_tokens=["<pad>", "<s>", "<unk>", END_OF_TURN, IMAGE_SEPARATOR, IMAGE_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        unk_token="<unk>",
        eos_token=END_OF_TURN,
        additional_special_tokens=[IMAGE_SEPARATOR, IMAGE_TOKEN],
        padding_side="left",
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def _corpus() -> Iterator[str]:
    rng = Random(CORPUS_SEED)
    for _ in range(CORPUS_ROUNDS):
        for talk in (image_conversation, images_conversation, clip_conversation):
            for turn in talk(rng):
                yield (
                    f"User: {turn.question.text}\nAssistant: {turn.question.answer}\n"
                    "System: hello, please show me an image who are you?"
                )
