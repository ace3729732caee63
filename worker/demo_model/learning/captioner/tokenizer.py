"""The captioner's tokenizer: byte-level BPE that keeps case and knows no unknown token.

Every word of the English captions becomes one token; any other text encodes letter by letter.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from worker.demo_model.learning.captioner.captions import PLACES_BEGINNING, places
from worker.demo_model.questions import caption
from worker.demo_model.scenes import make_scene

PAD, START, END = "<pad>", "<s>", "</s>"
MAX_LENGTH = 256
CORPUS_SEED, CORPUS_SCENES = 321, 3000


def train_tokenizer() -> Any:
    """Train the tokenizer; always the same, since the corpus has a fixed seed. Takes a second."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,  # never reached: merging stops when every word is one token
        min_frequency=1,
        show_progress=False,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (START, END)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=START,
        eos_token=END,
        padding_side="right",
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def _corpus() -> Iterator[str]:
    rng = Random(CORPUS_SEED)
    for _ in range(CORPUS_SCENES):
        scene = make_scene(rng)
        yield from (caption(scene), f"{PLACES_BEGINNING} {places(scene)}")
