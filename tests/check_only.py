"""What `make test` leaves to `make check`: tests that take long (by `--durations=0`), whose kind a shorter one shows.

Others carry the mark `check` where they stand.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

ENGINE: Final = "tests/unit/worker/engine/"
UNIT: Final = "tests/unit/"

#: By test: of which parameters `make test` runs it all the same.
CHECK_ONLY: Final[Mapping[str, tuple[str, ...]]] = {
    ENGINE + "test_parity.py::test_every_one_of_24_mixed_jobs_equals_sequential_generate": (
        "idefics2-slots", "idefics2-paged", "idefics2-paged-whole", "idefics2-paged-ahead", "git-slots", "gemma3-paged",
    ),
    ENGINE + "test_parity.py::test_requests_that_are_sent_back_go_on_where_they_were": ("idefics2-window-True",),
    ENGINE + "test_handed.py::test_the_engine_hands_a_model_what_generate_hands_it": ("idefics2-paged", "git-slots"),
    ENGINE + "test_memory.py::test_nan_that_a_request_leaves_does_not_reach_the_next": ("idefics2-window-paged",),
    ENGINE + "test_memory.py::test_rows_that_cannot_be_sampled_together_are_sampled_alone": ("False-True-paged",),
    ENGINE + "test_memory.py::test_a_prompt_that_does_not_fit_fails_alone": ("None",),
    ENGINE + "test_fuzz.py::test_whatever_happens_texts_hold_and_nothing_leaks": ("paged-few-blocks",),
    ENGINE + "test_paged.py::test_a_prompt_of_6000_tokens_never_exceeds_the_budget_and_stalls_nobody": (),
    ENGINE + "test_paged.py::test_two_engines_in_one_process_do_not_disturb_each_other": (),
    ENGINE + "test_cuda_graphs.py::test_an_engine_that_replays_and_runs_ahead_answers_as_generate_does": ("idefics2",),
    ENGINE + "test_cuda_graphs.py::test_recorded_steps_give_the_logits_of_plain_ones": ("idefics2-window",),
    UNIT + "worker/prompting/test_captioners.py::"
    "test_concurrent_captions_equal_sequential_generate_with_and_without_a_text": ("git",),
    UNIT + "worker/prompting/test_prepare.py::test_32_threads_prepare_what_one_thread_prepares": ("idefics2",),
    UNIT + "worker/media/test_metadata.py::test_a_jpeg_cut_anywhere_is_corrupt_or_every_pixel_is_right": ("coarse",),
    UNIT + "worker/media/test_decoders.py::test_a_crash_that_may_be_an_earlier_files_is_tried_again": (),
    UNIT + "worker/lifecycle/test_watchdog.py::"
    "test_a_known_fault_that_the_watchdog_reports_later_leaves_the_last_resort_in_place": (),
    UNIT + "worker/bench/test_engine_bench.py::test_the_command_writes_what_it_prints": (),
    UNIT + "worker/bench/test_engine_bench.py::test_the_peer_answers_alike_and_leaves_the_model_as_it_was": (),
    UNIT + "worker/bench/test_engine_bench.py::test_the_processors_of_true_sizes_fit_models_of_their_shape": (
        "idefics2-512x8-random",
    ),
    UNIT + "worker/bench/test_api_bench.py::test_the_bench_of_the_gateway_measures_all_its_rows": (),
    UNIT + "worker/demo_model/test_learning.py::test_continuing_from_the_shipped_checkpoint_keeps_what_it_knows": (),
    UNIT + "worker/demo_model/test_learning.py::test_a_few_steps_of_either_phase_lower_its_loss": (),
    UNIT + "worker/demo_model/test_learning.py::test_training_the_tokenizer_gives_the_shipped_one": (),
    UNIT + "api_stub/test_follow.py::test_a_redis_that_never_answers_is_unavailable_within_five_seconds": ("Client",),
    "tests/property/test_entries.py::test_twenty_thousand_odd_entries_have_one_end_each": (),
    UNIT + "api_stub/test_verdicts.py::test_an_error_means_the_same_outside_and_inside_scripts": (),
    UNIT + "worker/test_worker_settings.py::test_a_context_too_small_for_one_prompt_refuses_to_start": (),
    UNIT + "worker/test_worker_settings.py::test_a_model_that_is_not_there_refuses_to_start": (),
    "tests/integration/test_s3_checkpoint.py::test_workers_that_start_together_download_once": (),
    "tests/integration/test_s3_checkpoint.py::test_a_worker_killed_in_the_middle_leaves_no_lock_and_no_folder": (),
    "tests/integration/test_media_fetch.py::test_storage_that_trickles_is_a_fault_and_leaves_no_thread_behind": (),
    "tests/gateway/test_hardening.py::test_nothing_secret_is_in_the_log": (),
    "tests/gateway/test_hardening.py::test_thousands_of_visits_leave_nothing": (),
    "tests/gateway/test_hardening.py::test_a_body_that_trickles_for_ever_is_ended": (),
    "tests/gateway/test_model_names.py::test_a_completion_waits_for_its_turn_as_long_as_a_worker_is_there": (),
    "tests/gateway/test_remote_media.py::test_a_host_that_takes_too_long_is_left": (),
    "tests/property/test_ledger_states.py::test_any_order_of_calls_keeps_the_ledgers_promises": (),
}  # fmt: skip

#: Files of which `make test` runs nothing: many processes, many seconds of waiting, or every page and manifest.
CHECK_ONLY_FILES: Final[frozenset[str]] = frozenset(
    f"tests/{folder}/test_{name}.py"
    for folder, names in {
        "compat": ("ledgers", "recorded"),
        "e2e": (
            "black_hole", "captioners", "generation_config", "hostile_media", "hostile_messages", "how_it_works",
            "junk_in_the_broker", "links", "operations", "outage", "paused_queue", "redis_users", "refusals",
            "supervisor", "training", "unanswered_doorbells", "up",
        ),
        "gateway": (
            "abandoned", "lost_redis", "openai_batches", "playground", "process", "proxies", "webhooks",
        ),
        "integration": (
            "celery_events", "compose_worker", "failover", "hostile_media", "killed_training", "out_of_memory",
            "sick_worker", "tls",
        ),
        "structure": ("compose", "deploy", "distributions", "docs", "model_memory"),
        "unit/api_stub": ("devstack_stack",),
        "unit/worker/engine": ("generation_defaults", "more_families", "proof"),
        "unit/worker/models": ("adapters", "quantization", "templates", "whole_checkpoints"),
        "unit/worker/prompting": ("pixels",),
        "unit/worker/training": ("run",),
    }.items()
    for name in names
)  # fmt: skip


def is_check_only(node_id: str) -> bool:
    """Whether `make test` leaves a collected test out."""
    test, _, parameters = node_id.partition("[")
    if test.partition("::")[0] in CHECK_ONLY_FILES:
        return True
    kept = CHECK_ONLY.get(test)
    return kept is not None and parameters.removesuffix("]") not in kept
