"""The defaults of a checkpoint's generation config that change greedy text, validated and typed for the engine.

In: a loaded model. Out: `GenerationDefaults`: the fields that `model.generate(do_sample=False)` would apply, and the
names of those that this worker ignores. The end tokens, `eos_token_id`, are always used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, Final

from pydantic import AfterValidator, BeforeValidator, Field, Strict, TypeAdapter, ValidationError
from transformers import GenerationMixin, PreTrainedModel, PreTrainedTokenizerBase

from worker.errors import CannotStart

#: Fields that do not change greedy text, fields that a job sets itself, and fields that modify only such fields.
# fmt: off
_NO_EFFECT: Final = frozenset({
    "max_length", "max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "min_p", "renormalize_logits",
    "use_cache", "cache_implementation", "cache_config", "max_cache_len", "low_memory", "prefill_chunk_size",
    "eos_token_id", "pad_token_id", "bos_token_id", "decoder_start_token_id",
    "output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate",
    "early_stopping", "length_penalty", "diversity_penalty",
    "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold",
    "assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight", "max_matching_ngram_size",
    "speculation_type", "compile_config", "disable_compile", "continuous_batching_config", "transformers_version",
})
# fmt: on
#: Neutral values, other than None, of fields that are not supported.
_NEUTRAL_VALUES: Final[Mapping[str, float]] = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "guidance_scale": 1,
    "penalty_alpha": 0,
    "typical_p": 1,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
    "token_healing": 0,
    "use_mtp": 0,
}


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """Fields of transformers' GenerationConfig, with its meanings; the defaults are neutral.

    A job's own `min_new_tokens`, `repetition_penalty` and `stop` override `min_new_tokens` with `min_length`,
    `repetition_penalty` and `stop_strings`; the others apply to every job.

    min_length: tokens of prompt and answer before an end token may come; counts only without `min_new_tokens`.
    sequence_bias: token ids and what is added to the logit of the last when the others came just before it.
    exponential_decay_length_penalty: tokens after which end tokens become likelier, and the growth per token.
    begin_suppress_tokens: never the first token.
    ignored: names of the fields that are not neutral and not supported.
    """

    min_length: int = 0
    min_new_tokens: int | None = None
    stop_strings: tuple[str, ...] = ()
    repetition_penalty: float = 1.0
    encoder_repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    encoder_no_repeat_ngram_size: int = 0
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    sequence_bias: tuple[tuple[tuple[int, ...], float], ...] = ()
    forced_bos_token_id: tuple[int, ...] = ()
    forced_eos_token_id: tuple[int, ...] = ()
    remove_invalid_values: bool = False
    exponential_decay_length_penalty: tuple[int, float] | None = None
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    ignored: tuple[str, ...] = ()

    @property
    def in_force(self) -> dict[str, object]:
        """The fields that are not neutral, `ignored` left out."""
        values = {each.name: (getattr(self, each.name), each.default) for each in fields(self)}
        return {name: value for name, (value, neutral) in values.items() if value != neutral and name != "ignored"}


#: Without a generation config.
NEUTRAL: Final = GenerationDefaults()


def read_generation_defaults(model: PreTrainedModel) -> GenerationDefaults:
    """Return the defaults of the model's generation config, which transformers has read from the checkpoint.

    Raises CannotStart for a value that is invalid or cannot be satisfied, naming field and value.
    """
    given: dict[str, Any] = {
        name: value
        for name, value in model.generation_config.to_dict().items()
        if value is not None and name not in _NO_EFFECT and not name.startswith("_")
    }
    supported = {} if _delegates(model) else {name: given[name] for name in _TYPES if name in given}
    parsed: dict[str, Any] = {name: _parsed(name, value) for name, value in supported.items()}
    defaults = GenerationDefaults(**parsed)
    _check_forced(defaults, model)
    left = [name for name, value in given.items() if name not in supported and _is_effective(name, value)]
    return replace(defaults, ignored=tuple(sorted(left)))


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end an answer: of the generation config, else the config, else the tokenizer.

    Both configs are those of the model whose `generate` runs. Raises CannotStart for invalid ids.
    """
    owner = model.language_model if _delegates(model) else model
    for source in (owner.generation_config, owner.config, tokenizer):
        found = getattr(source, "eos_token_id", None)
        if found is not None:
            try:
                return list(_END_TOKENS.validate_python(found))
            except ValidationError as error:
                raise CannotStart(
                    f"VISIONQ_MODEL: {type(source).__name__}: eos_token_id: {error.errors()[0]['msg']}, got {found!r}"
                ) from error
    return []


def _delegates(model: PreTrainedModel) -> bool:
    """Whether `generate` delegates to an inner language model with a generation config of its own (BLIP-2)."""
    is_own = type(model).generate is not GenerationMixin.generate
    return is_own and isinstance(getattr(model, "language_model", None), GenerationMixin)


def _is_effective(name: str, value: object) -> bool:
    """Whether an unsupported field has a value that is not neutral."""
    if name in _TYPES:
        return bool(_parsed(name, value) != getattr(NEUTRAL, name))
    return name not in _NEUTRAL_VALUES or value != _NEUTRAL_VALUES[name]


def _parsed(name: str, value: object) -> object:
    try:
        return _TYPES[name].validate_python(value)
    except ValidationError as error:
        raise CannotStart(
            f"VISIONQ_MODEL: generation_config: {name}: {error.errors()[0]['msg']}, got {value!r}; "
            "VISIONQ_GENERATION_CONFIG=off serves the checkpoint without its generation config"
        ) from error


def _check_forced(defaults: GenerationDefaults, model: PreTrainedModel) -> None:
    """Raise CannotStart for a forced token that is beyond the vocabulary or suppressed."""
    vocab_size = getattr(model.config.get_text_config(decoder=True), "vocab_size", None)
    for name in ("forced_bos_token_id", "forced_eos_token_id"):
        beyond = [token for token in getattr(defaults, name) if vocab_size is not None and token >= vocab_size]
        if beyond:
            raise CannotStart(
                f"VISIONQ_MODEL: generation_config: {name}: {beyond[0]} is beyond the model's {vocab_size} tokens; "
                "VISIONQ_GENERATION_CONFIG=off serves the checkpoint without its generation config"
            )
        forced = set(getattr(defaults, name))
        if forced and forced <= set(defaults.suppress_tokens):
            raise CannotStart(
                f"VISIONQ_MODEL: generation_config: {name}: {sorted(forced)} are all in suppress_tokens; "
                "VISIONQ_GENERATION_CONFIG=off serves the checkpoint without its generation config"
            )


def _listed(value: object) -> object:
    return value if isinstance(value, (list, tuple)) else [value]


def _pairs(value: object) -> object:
    """A bias may be a dict with tuples as keys; in JSON it is a list of pairs."""
    return tuple(value.items()) if isinstance(value, dict) else value


def _last_of_each(pairs: tuple[tuple[tuple[int, ...], float], ...]) -> tuple[tuple[tuple[int, ...], float], ...]:
    return tuple(dict(pairs).items())


def _at_least_none(count: int) -> int:
    """A negative count means 0."""
    return max(count, 0)


_Whole = Annotated[int, Strict()]
_Count = Annotated[_Whole, AfterValidator(_at_least_none)]
_Token = Annotated[_Whole, Field(ge=0)]
_Factor = Annotated[float, Strict(), Field(gt=0, allow_inf_nan=False)]
_Tokens = tuple[_Whole, ...]
_Sequence = Annotated[tuple[_Token, ...], Field(min_length=1)]
_Forced = Annotated[tuple[_Token, ...], BeforeValidator(_listed)]

_END_TOKENS: Final[TypeAdapter[tuple[int, ...]]] = TypeAdapter(Annotated[tuple[_Whole, ...], BeforeValidator(_listed)])
_TYPES: Final[Mapping[str, TypeAdapter[Any]]] = {
    "min_length": TypeAdapter(_Count),
    "min_new_tokens": TypeAdapter(_Count),
    "stop_strings": TypeAdapter(
        Annotated[tuple[Annotated[str, Strict(), Field(min_length=1)], ...], BeforeValidator(_listed)]
    ),
    "repetition_penalty": TypeAdapter(_Factor),
    "encoder_repetition_penalty": TypeAdapter(_Factor),
    "no_repeat_ngram_size": TypeAdapter(_Count),
    "encoder_no_repeat_ngram_size": TypeAdapter(_Count),
    "bad_words_ids": TypeAdapter(tuple[_Sequence, ...]),
    "sequence_bias": TypeAdapter(
        Annotated[
            tuple[tuple[_Sequence, Annotated[float, Strict()]], ...],
            BeforeValidator(_pairs),
            AfterValidator(_last_of_each),
        ]
    ),
    "forced_bos_token_id": TypeAdapter(_Forced),
    "forced_eos_token_id": TypeAdapter(_Forced),
    "remove_invalid_values": TypeAdapter(Annotated[bool, Strict()]),
    "exponential_decay_length_penalty": TypeAdapter(tuple[_Whole, _Factor]),
    "suppress_tokens": TypeAdapter(_Tokens),
    "begin_suppress_tokens": TypeAdapter(_Tokens),
}
