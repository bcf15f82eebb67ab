"""Plans: steps, splits and memory as numbers, and every row accounted for on its way to tokens."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from medcot import planning
from medcot.engine.memory import FASTEST, SMALLEST, Keep, Memory, predict_peak_gb, small_pieces
from medcot.errors import DataError, RecipeError
from medcot.recipe import Recipe, load_recipe
from medcot.records import Row
from medcot.shapes import DISTILLS, EMBEDDED_SHAPE

CPU = torch.device("cpu")
LLAMA_8B = DISTILLS["deepseek-ai/DeepSeek-R1-Distill-Llama-8B"]
START = {"prompt": {"style": "short"}, "train": {"max_steps": None, "epochs": 1}}


@pytest.fixture(scope="module")
def tokenizer(tiny_folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_folder)


def _recipe(*overrides: str) -> Recipe:
    return load_recipe(Recipe(), overrides, START)


def _row(length: int) -> Row:
    ids = list(range(length))
    return Row("r", ids, ids, (0, 1), (1, length - 2), (length - 2, length - 1), (length - 1, length))


def _write(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def _raw(question: str = "How much?", reasoning: str = "I count.", response: str = "Two.") -> dict[str, Any]:
    return {"Question": question, "Complex_CoT": reasoning, "Response": response}


# Data -----------------------------------------------------------------------------------------------------------------


def test_facts_of_the_data_have_the_promised_keys(tmp_path, tokenizer):
    recipe = _recipe(f"data={_write(tmp_path, [_raw(), _raw('And now?'), _raw('')])}")
    data = planning.encode_examples(planning.read_examples(recipe), recipe, tokenizer)
    facts = data.facts()
    assert facts.keys() == {
        *("source", "revision", "rows", "tokens", "trained_tokens", "sha256", "rows_sha256", "quarantined")
    }
    assert (facts["rows"], facts["quarantined"]) == (2, 1)
    assert facts["tokens"] == sum(len(row.input_ids) for row in data.rows)
    assert 0 < facts["trained_tokens"] < facts["tokens"]
    whole = load_recipe(recipe, ["train.train_on_prompt=true"])
    everything = planning.encode_examples(planning.read_examples(whole), whole, tokenizer).facts()
    assert everything["trained_tokens"] == everything["tokens"] - 2  # the first token of a row is never predicted


def test_rows_set_aside_keep_their_number_in_the_file(tmp_path, tokenizer):
    rows = [_raw(), _raw(response=" "), _raw(), _raw(reasoning="so. " * 200), {**_raw(), "Question": None}, _raw()]
    recipe = _recipe(f"data={_write(tmp_path, rows)}", "model.max_seq_length=100")
    data = planning.encode_examples(planning.read_examples(recipe), recipe, tokenizer)
    reasons = {item.row_number: item.reason for item in data.quarantined}
    assert reasons.keys() == {2, 4, 5} and len(data.rows) == 3
    assert "limit 100" in reasons[4] and "Response" in reasons[2] and "Question" in reasons[5]


def test_sha256_is_that_of_the_rows_and_follows_them(tmp_path):
    def digest(*overrides: str) -> str:
        return planning.read_examples(_recipe(*overrides)).sha256

    path = _write(tmp_path, [_raw()])
    first = digest(f"data={path}")
    assert first == digest(f"data={path}") and len(first) == 64
    _write(tmp_path, [_raw(response="Three.")])
    assert digest(f"data={path}") != first
    clinic = digest("data=builtin:clinic[:5]")
    assert clinic == digest("data=builtin:clinic[:5]") != digest("data=builtin:clinic[:6]")


def test_the_clinic_makes_as_many_as_asked():
    assert len(planning.read_examples(_recipe("data=builtin:clinic[:7]")).examples) == 7
    assert len(planning.read_examples(_recipe("data=builtin:clinic")).examples) == planning.CLINIC_ROWS


def test_training_and_test_problems_of_the_clinic_differ():
    train = {example.question for example in planning.read_examples(_recipe("data=builtin:clinic")).examples}
    (task,) = planning.load_tasks(_recipe("evaluate=builtin:clinic:40").evaluate)
    test = [problem for _, problem in planning.list_problems([task])]
    assert len(test) == 40 and not train & {problem.question for problem in test}
    assert all(problem.gold and problem.topic for problem in test)


def test_the_form_of_the_answer_is_asked_for_unless_training_teaches_it():
    (task,) = planning.load_tasks(_recipe("evaluate=builtin:clinic:3").evaluate)
    assert all(item.prompt.startswith(item.example.question) and "Final answer" in item.prompt for item in task.items)
    (plain,) = planning.load_tasks(_recipe("evaluate=builtin:clinic:3", "evaluate.ask_form=false").evaluate)
    assert all(item.prompt == item.example.question for item in plain.items)
    assert planning.load_tasks(_recipe("evaluate.source=null").evaluate) == []


def test_an_evaluation_set_that_cannot_be_graded_is_refused():
    with pytest.raises(RecipeError, match=r"evaluate\.source: 'medqaa' is no task.*medqa"):
        planning.load_tasks(_recipe("evaluate=medqaa").evaluate)
    with pytest.raises(RecipeError, match=r"slice.*builtin:clinic:200"):
        planning.load_tasks(_recipe("evaluate=builtin:clinic[:40]").evaluate)


def test_no_problems_at_all_are_refused():
    with pytest.raises(DataError):
        planning.read_examples(_recipe("data=builtin:clinic[:0]"))


# Rows over the limit --------------------------------------------------------------------------------------------------

LONG = _raw(reasoning="First this. " + "Then that. " * 60 + "Last of all.", response="Final answer: 2 mL")


def _encode(folder: Path, tokenizer: PreTrainedTokenizerBase, policy: str, rows: list[dict[str, Any]]) -> Any:
    recipe = _recipe(f"data={_write(folder, rows)}", "model.max_seq_length=150", f"data.over_length={policy}")
    return planning.encode_examples(planning.read_examples(recipe), recipe, tokenizer)


def test_drop_keeps_the_rest_and_lists_the_row(tmp_path, tokenizer):
    data = _encode(tmp_path, tokenizer, "drop", [_raw(), LONG])
    assert len(data.rows) == 1 and [item.row_number for item in data.quarantined] == [2]


def test_error_stops_before_anything_is_trained(tmp_path, tokenizer):
    with pytest.raises(DataError, match="1 of 2 rows are over 150 tokens"):
        _encode(tmp_path, tokenizer, "error", [_raw(), LONG])


def test_truncating_cuts_only_the_middle_of_the_thinking(tmp_path, tokenizer):
    data = _encode(tmp_path, tokenizer, "truncate_think", [_raw(), LONG])
    assert not data.quarantined and any("1 rows had the middle" in sentence for sentence in data.sentences)
    long = data.rows[1]
    text = tokenizer.decode(long.input_ids)
    assert long.num_tokens <= 150
    assert text.startswith("How much?\n<think>First this.") and " … " in text
    assert text.endswith("Last of all.</think>Final answer: 2 mL</s>")
    assert long.input_ids[-1] == long.labels[-1] == tokenizer.eos_token_id


def test_truncating_never_cuts_the_answer(tmp_path, tokenizer):
    data = _encode(tmp_path, tokenizer, "truncate_think", [_raw(), _raw(response="word " * 60)])
    assert len(data.rows) == 1 and [item.row_number for item in data.quarantined] == [2]


def test_no_row_left_is_an_error_that_names_the_length_needed(tmp_path, tokenizer):
    with pytest.raises(DataError, match=r"No row is left of 1.*Set model\.max_seq_length to at least \d+"):
        _encode(tmp_path, tokenizer, "drop", [LONG])


# Plans ----------------------------------------------------------------------------------------------------------------


def _plan(*overrides: str, num_rows: int = 20, length: int = 100, device: torch.device = CPU, fast: bool = True):
    rows = [_row(length)] * num_rows
    return planning.build_plan(_recipe(*overrides), rows, EMBEDDED_SHAPE, "bf16", device, fast=fast)


def test_a_plan_carries_the_recipe_s_numbers():
    plan, _ = _plan(
        "train.learning_rate=1e-3", "train.weight_decay=0.1", "train.schedule=cosine", "train.max_grad_norm=0.5",
        "train.seed=7", "train.save_steps=4", "train.keep_checkpoints=3", "train.logging_steps=2",
    )  # fmt: skip
    assert (plan.learning_rate, plan.weight_decay, plan.schedule) == (1e-3, 0.1, "cosine")
    assert (plan.max_grad_norm, plan.seed, plan.save_steps, plan.keep_checkpoints) == (0.5, 7, 4, 3)
    assert plan.logging_steps == 2 and plan.optimizer == "adamw_torch_fused"


@pytest.mark.parametrize(
    ("overrides", "steps", "warmup"),
    [
        (["train.epochs=1"], 3, 2),  # the last step is never a warm-up
        (["train.epochs=4", "train.warmup=0.25"], 12, 3),
        (["train.epochs=null", "train.max_steps=60"], 60, 5),
        (["train.batch_size=4", "train.warmup=0"], 5, 0),
    ],
)
def test_steps_and_warmup_come_out_of_the_rows(overrides, steps, warmup):
    plan, _ = _plan(*overrides)
    assert (plan.num_steps, plan.warmup_steps) == (steps, warmup)


def test_the_whole_step_is_one_forward_where_memory_allows(monkeypatch):
    monkeypatch.setattr(planning, "free_memory_gb", lambda device: 100.0)
    plan, _ = _plan()
    assert (plan.micro_batch_size, plan.memory) == (8, FASTEST)


def test_short_memory_first_splits_then_forgets(monkeypatch):
    needs = {
        (micro, memory): predict_peak_gb(
            EMBEDDED_SHAPE, "bf16", tokens=1000 * micro, rank=16, memory=memory, on_cpu=True
        )
        for micro in (8, 4, 2, 1)
        for memory in (FASTEST, Memory(Keep.LEAN), Memory(Keep.INPUT), SMALLEST)
    }
    chosen = []
    for free_gb in [needs[8, FASTEST] * 1.01, needs[4, FASTEST] * 1.01, needs[2, FASTEST] * 1.01, 0.1]:
        monkeypatch.setattr(planning, "free_memory_gb", lambda device, gb=free_gb: gb / planning.MEMORY_SHARE)
        plan, predicted_gb = _plan(length=1000)
        chosen.append((plan.micro_batch_size, plan.memory.keep))
        assert predicted_gb == needs[plan.micro_batch_size, plan.memory]
        assert predicted_gb <= free_gb or free_gb == 0.1
    assert chosen[0] == (8, Keep.ALL) and chosen[-1][0] == 1 and chosen[-1][1].recomputes
    assert [rows for rows, _ in chosen] == sorted((rows for rows, _ in chosen), reverse=True)
    assert not any(keep.recomputes for _, keep in chosen[:3])  # a split costs less than computing layers again


def test_what_the_recipe_says_of_splits_and_recomputing_is_kept(monkeypatch):
    monkeypatch.setattr(planning, "free_memory_gb", lambda device: 0.1)
    plan, _ = _plan("train.micro_batch_size=4", "train.gradient_checkpointing='off'")
    assert (plan.micro_batch_size, plan.memory) == (4, FASTEST)
    monkeypatch.setattr(planning, "free_memory_gb", lambda device: 100.0)
    assert _plan("train.gradient_checkpointing='on'")[0].memory == Memory(Keep.INPUT)
    assert _plan("train.gradient_checkpointing=offload")[0].memory.keep is Keep.HOST


def test_a_roomy_card_keeps_4_bit_weights_unpacked_and_the_step_whole(monkeypatch):
    rows = [_row(790)] * 16
    monkeypatch.setattr(planning, "has_flash", lambda device, dtype: True)
    monkeypatch.setattr(planning, "has_triton", lambda device: True)

    def plan_with(free_gb: float, *overrides: str) -> Any:
        monkeypatch.setattr(planning, "free_memory_gb", lambda device: free_gb)
        return planning.build_plan(_recipe(*overrides), rows, LLAMA_8B, "nf4", torch.device("cuda"), fast=True)[0]

    assert (plan_with(139).micro_batch_size, plan_with(139).memory) == (8, Memory(Keep.ALL, unpacked=True))
    assert plan_with(46).memory.keep is Keep.ALL and plan_with(46).micro_batch_size >= 4
    assert not plan_with(22).memory.keep.recomputes and plan_with(22).micro_batch_size < 8
    assert plan_with(9).memory.keep.recomputes
    assert plan_with(139, "train.gradient_checkpointing='on'").memory == Memory(Keep.INPUT)


def test_the_plain_path_is_offered_only_what_it_can_do(monkeypatch):
    """It keeps everything or the layers' inputs: a plan that counts on more would run out of memory."""
    for free_gb in (200, 80, 47, 24, 12):
        monkeypatch.setattr(planning, "free_memory_gb", lambda device, gb=free_gb: gb)
        plan, _ = planning.build_plan(_recipe(), [_row(790)] * 16, LLAMA_8B, "nf4", CPU, fast=False)
        assert plan.memory.keep is not Keep.LEAN and not plan.memory.unpacked
    assert plan.memory.keep.recomputes


def test_small_pieces_follow_the_length_of_a_row():
    tiles = [small_pieces(tokens).tile_tokens for tokens in (10, 1900, 20_000, 56_000, 10**6)]
    assert tiles == [1024, 1024, 1024, 1664, 2048]
    assert small_pieces(1900).one_weight and not small_pieces(56_000).one_weight


def test_a_split_only_takes_divisors(monkeypatch):
    monkeypatch.setattr(planning, "free_memory_gb", lambda device: 0.1)
    assert _plan("train.batch_size=7")[0].micro_batch_size == 1
    with pytest.raises(RecipeError, match=r"micro_batch_size=3 does not divide train\.batch_size=8.*\[1, 2, 4, 8\]"):
        _plan("train.micro_batch_size=3")


def test_a_forward_is_as_long_as_random_rows_are_likely_to_be():
    assert planning.estimate_tokens([100] * 16, 8) == 800
    lengths = [10] * 8 + [190] * 8
    assert 800 < planning.estimate_tokens(lengths, 8) <= 8 * 190
    assert planning.estimate_tokens([10] * 15 + [190], 8) <= 7 * 10 + 190  # never more than the longest rows have
    assert planning.estimate_tokens([500], 1) == 500


def test_disk_is_counted_for_checkpoints_adapter_and_merged_weights():
    adapter = 4 * 41_943_040  # Llama 8B, rank 16, seven projections, float32

    def bytes_of(*overrides: str) -> int:
        return planning.estimate_disk_bytes(_recipe(*overrides), LLAMA_8B)

    assert bytes_of() == adapter
    assert bytes_of("train.save_steps=5", "train.keep_checkpoints=1") == adapter * (1 + 2 * 3)
    assert bytes_of("save.merged=true") == adapter + 2 * LLAMA_8B.num_params


@pytest.mark.parametrize(("steps", "rows"), [(3, 12), (5, 18), (6, 22), (7, 26), (12, 44)])
def test_tokens_of_a_run_follow_its_steps(steps, rows):
    # 18 rows in steps of 4: an epoch is 4 + 4 + 4 + 4 + 2. Steps past it start the next epoch.
    plan = SimpleNamespace(num_steps=steps, batch_size=4)
    assert planning.tokens_of_run([_row(10)] * 18, plan) == 10 * rows


def test_free_memory_of_this_machine_is_plausible():
    assert 0.1 < planning.free_memory_gb(CPU) < 2**14


def test_answers_are_taken_as_many_at_a_time_as_the_cache_has_room_for(monkeypatch):
    monkeypatch.setattr(planning, "free_memory_gb", lambda device: 4.0)
    wide = planning.fit_answers(100, EMBEDDED_SHAPE, "nf4", 100, CPU)
    narrow = planning.fit_answers(100, EMBEDDED_SHAPE, "nf4", 20_000, CPU)
    assert wide == 100 and 1 <= narrow < 100
    monkeypatch.setattr(planning, "free_memory_gb", lambda device: 0.01)
    assert planning.fit_answers(100, EMBEDDED_SHAPE, "nf4", 100, CPU) == 1  # one at a time is always tried
