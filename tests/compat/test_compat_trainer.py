"""The trainer: the command line's losses, whatever the split; honest statistics; callbacks, checkpoints, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import TrainerCallback, TrainingArguments

from medcot import prompt
from medcot.compat import (
    ArgumentError,
    FastLanguageModel,
    NotCoveredError,
    SFTTrainer,
    is_bfloat16_supported,
    train_on_responses_only,
)
from medcot.errors import DataError, OutputError
from tiny_runs import make_rows, read_losses, run_job, write_rows

TEXT = prompt.TUTORIAL_TEMPLATE.replace("{question}", "{}") + "\n{}\n</think>\n{}"


def load(folder: Path, **more: Any) -> tuple[Any, Any]:
    settings: dict[str, Any] = {"max_seq_length": 512, "dtype": torch.float32, "load_in_4bit": False}
    model, tokenizer = FastLanguageModel.from_pretrained(str(folder), **settings | more)
    model = FastLanguageModel.get_peft_model(
        model, r=8, lora_alpha=16, use_gradient_checkpointing="unsloth", random_state=3407
    )
    return model, tokenizer


@pytest.fixture(scope="module")
def wide_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model for rows of 1,024 tokens: the tutorial's template alone has 600 bytes."""
    import shutil

    copied = Path(shutil.copytree(model_folder, tmp_path_factory.mktemp("wide") / "model"))
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))
    return copied


@pytest.fixture
def tuned(model_folder: Path) -> tuple[Any, Any]:
    return load(model_folder)


def texts(tokenizer: Any, count: int = 18) -> list[dict[str, str]]:
    rows = make_rows(count)
    return [{"text": f"{r['Question']}\n{r['Complex_CoT']}\n{r['Response']}" + tokenizer.eos_token} for r in rows]


def arguments(folder: Path, **more: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        **{"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 4, "warmup_steps": 2},
        **{"learning_rate": 0.01, "logging_steps": 1, "weight_decay": 0.01, "seed": 3407, "optim": "adamw_8bit"},
        **{"fp16": not is_bfloat16_supported(), "bf16": is_bfloat16_supported(), "report_to": "none"},
    }
    return TrainingArguments(output_dir=str(folder / "outputs"), **settings | more)


def losses_of(trainer: SFTTrainer) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def train(tuned: tuple[Any, Any], folder: Path, dataset: Any = None, **more: Any) -> tuple[SFTTrainer, Any]:
    model, tokenizer = tuned
    trainer = SFTTrainer(
        model=model,
        tokenizer=tokenizer,
        train_dataset=texts(tokenizer) if dataset is None else dataset,
        dataset_text_field="text",
        args=arguments(folder, **more),
    )
    return trainer, trainer.train()


def test_losses_are_those_of_the_command_line(wide_folder: Path, tmp_path: Path) -> None:
    """The same rows, in the tutorial's style, through ``medcot run`` with the tutorial's settings."""
    rows = make_rows()
    recipe = {
        "model": {"source": str(wide_folder), "precision": "fp32", "max_seq_length": 1024},
        "prompt": "tutorial",
        "data": str(write_rows(tmp_path / "rows.jsonl", rows)),
        "lora": {"r": 8, "alpha": 16},
        "train": {"batch_size": 4, "max_steps": 6, "warmup": 2, "learning_rate": 0.01, "logging_steps": 1,
                  "train_on_prompt": True, "schedule": "linear"},
        "ask": {"max_new_tokens": 2},
        "evaluate": {"source": None},
        "tracking": "none",
    }  # fmt: skip
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    run_job(tmp_path / "r.yaml", tmp_path / "run")
    wanted = read_losses(tmp_path / "run")
    model, tokenizer = load(wide_folder, max_seq_length=1024)
    dataset = [
        {"text": TEXT.format(r["Question"], r["Complex_CoT"], r["Response"]) + tokenizer.eos_token} for r in rows
    ]
    trainer, stats = train((model, tokenizer), tmp_path, dataset, max_steps=6)
    assert losses_of(trainer) == wanted
    assert stats.training_loss == pytest.approx(sum(wanted) / 6)


def test_every_split_of_a_step_gives_the_same_losses(model_folder: Path, tmp_path: Path) -> None:
    found = []
    for rows, times in ((2, 2), (4, 1), (1, 4)):
        split = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": times}
        found.append(losses_of(train(load(model_folder), tmp_path, **split)[0]))
    assert found[0] == found[1] == found[2]


def test_a_logged_loss_is_the_mean_of_its_steps(model_folder: Path, tmp_path: Path) -> None:
    every = losses_of(train(load(model_folder), tmp_path, max_steps=6)[0])
    third, stats = train(load(model_folder), tmp_path, max_steps=6, logging_steps=3)
    assert [line["step"] for line in third.state.log_history if "loss" in line] == [3, 6]
    assert losses_of(third) == pytest.approx([sum(every[:3]) / 3, sum(every[3:]) / 3])
    assert stats.training_loss == pytest.approx(sum(every) / 6)
    first, _ = train(load(model_folder), tmp_path, max_steps=6, logging_steps=3, logging_first_step=True)
    assert [line["step"] for line in first.state.log_history if "loss" in line] == [1, 3, 6]


def test_statistics_count_what_happened(tuned: tuple[Any, Any], tmp_path: Path) -> None:
    _, stats = train(tuned, tmp_path, max_steps=5)  # 18 rows: four steps of 4, one of 2
    metrics = stats.metrics
    assert stats.global_step == 5 and metrics["epoch"] == 1.0
    assert metrics["train_samples_per_second"] * metrics["train_runtime"] == pytest.approx(18, rel=0.02)
    assert metrics["train_steps_per_second"] * metrics["train_runtime"] == pytest.approx(5, rel=0.02)


def test_it_trains_again_after_inference(tuned: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = tuned
    trainer, first = train(tuned, tmp_path, max_steps=6)
    FastLanguageModel.for_inference(model)
    inputs = tokenizer(["A patient"], return_tensors="pt").to(model.device)
    assert not model.training and model.generate(**inputs, max_new_tokens=3).shape[1] == inputs.input_ids.shape[1] + 3
    second = trainer.train()
    assert second.training_loss < first.training_loss


def test_epochs_and_a_share_as_warm_up(tuned: tuple[Any, Any], tmp_path: Path) -> None:
    trainer, stats = train(tuned, tmp_path, max_steps=-1, num_train_epochs=2, warmup_steps=0.2)
    assert stats.global_step == 10  # 18 rows by 4, twice
    rates = [line["learning_rate"] for line in trainer.state.log_history if "learning_rate" in line]
    assert rates[0] == 0 and rates[2] == pytest.approx(0.01) and rates[-1] < rates[3]


def test_it_goes_on_from_a_checkpoint(model_folder: Path, tmp_path: Path) -> None:
    whole, _ = train(load(model_folder), tmp_path / "whole", save_steps=2)
    assert (tmp_path / "whole" / "outputs" / "checkpoint-4").is_dir()  # as the tutorial's trainer, at the end
    model, tokenizer = load(model_folder)
    settings = {"model": model, "tokenizer": tokenizer, "train_dataset": texts(tokenizer)}
    rest = SFTTrainer(**settings, args=arguments(tmp_path / "whole"))
    rest.train(resume_from_checkpoint=str(tmp_path / "whole" / "outputs" / "checkpoint-2"))
    assert losses_of(rest) == losses_of(whole)[2:]
    with pytest.raises(OutputError, match="no checkpoint"):
        SFTTrainer(**settings, args=arguments(tmp_path / "none")).train(resume_from_checkpoint=True)


def test_held_out_rows_are_measured_and_change_nothing(model_folder: Path, tmp_path: Path) -> None:
    alone = losses_of(train(load(model_folder), tmp_path)[0])
    model, tokenizer = load(model_folder)
    args = arguments(tmp_path, eval_strategy="steps", eval_steps=2)
    held_out = texts(tokenizer, 4)
    trainer = SFTTrainer(model, args, train_dataset=texts(tokenizer), eval_dataset=held_out, tokenizer=tokenizer)
    trainer.train()
    assert losses_of(trainer) == alone
    measured = [(line["step"], line["eval_loss"]) for line in trainer.state.log_history if "eval_loss" in line]
    assert [step for step, _ in measured] == [0, 2, 4] and measured[-1][1] < measured[0][1]


class Recorder(TrainerCallback):
    def __init__(self, stop_at: int = 10**9) -> None:
        self.events: list[str] = []
        self.stop_at = stop_at

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events.append(f"begin of {state.max_steps}")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events.append(f"step {state.global_step}")
        control.should_training_stop = state.global_step >= self.stop_at

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.events.append("log " + sorted(logs)[-1])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events.append("end")

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        raise AssertionError("it was said that this is not called")


def test_callbacks_are_told_and_may_stop(
    tuned: tuple[Any, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = tuned
    recorder = Recorder(stop_at=2)
    trainer = SFTTrainer(
        model, arguments(tmp_path, logging_steps=2), texts(tokenizer), tokenizer=tokenizer, callbacks=[recorder]
    )
    stats = trainer.train()
    assert stats.global_step == 2
    assert recorder.events[:3] == ["begin of 4", "step 1", "step 2"] and recorder.events[-1] == "end"
    assert "Recorder is not told of on_epoch_end" in capsys.readouterr().out
    assert trainer.train().global_step == 2  # and may be trained again


def test_a_row_that_is_too_long_is_left_out_and_counted(
    tuned: tuple[Any, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = tuned
    rows = [*texts(tokenizer), {"text": "a " * 600 + tokenizer.eos_token}]
    trainer = SFTTrainer(model, arguments(tmp_path), rows, tokenizer=tokenizer, max_seq_length=300)
    assert len(trainer.train_dataset) == 18
    assert "1 of 19 rows are longer than max_seq_length=300" in capsys.readouterr().out
    with pytest.raises(ArgumentError, match="loaded with max_seq_length=512"):
        SFTTrainer(model, arguments(tmp_path), rows, tokenizer=tokenizer, max_seq_length=600)


def test_bos_stands_once_and_eos_at_every_end(tuned: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = tuned
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    plain, ended, begun = {"text": "ab"}, {"text": f"ab{eos}"}, {"text": f"{bos}ab{eos}"}
    for rows in ([plain, ended], [begun, begun]):
        ids = SFTTrainer(model, arguments(tmp_path), rows, tokenizer=tokenizer).train_dataset["input_ids"]
        assert ids[0] == ids[1] and ids[0][-1] == tokenizer.eos_token_id and ids[0].count(tokenizer.eos_token_id) == 1
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    other = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    other.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    for rows in ([plain], [begun]):
        ids = SFTTrainer(model, arguments(tmp_path), rows, tokenizer=other).train_dataset["input_ids"][0]
        assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1


def test_loss_on_responses_only(tuned: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = tuned
    rows = [{"text": f"Q: one A: yes{tokenizer.eos_token}"}, {"text": "Q: two A: no Q: three A: maybe"}]
    trainer = SFTTrainer(model, arguments(tmp_path), rows, tokenizer=tokenizer)
    train_on_responses_only(trainer, instruction_part="Q:", response_part="A:")
    kept = [
        tokenizer.decode([token for token in labels if token != -100]) for labels in trainer.train_dataset["labels"]
    ]
    assert kept == [f" yes{tokenizer.eos_token}", f" no  maybe{tokenizer.eos_token}"]
    with pytest.raises(DataError, match="no text holds 'B:'"):
        train_on_responses_only(trainer, instruction_part="Q:", response_part="B:")


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ({"adam_beta2": 0.95}, "adam_beta2=0.95"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"data_seed": 1}, "data_seed"),
    ],
)
def test_what_would_train_another_model_is_refused(
    tuned: tuple[Any, Any], tmp_path: Path, setting: dict[str, Any], named: str
) -> None:
    model, tokenizer = tuned
    with pytest.raises(NotCoveredError, match=named):
        SFTTrainer(model, arguments(tmp_path, **setting), texts(tokenizer), tokenizer=tokenizer)


def test_what_changes_nothing_is_said_once(
    tuned: tuple[Any, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = tuned
    for _ in range(2):
        SFTTrainer(
            model,
            arguments(tmp_path, dataloader_num_workers=2),
            texts(tokenizer),
            tokenizer=tokenizer,
            packing=True,
            dataset_num_proc=2,
        )
    said = capsys.readouterr().out
    for name in ("dataloader_num_workers", "packing", "dataset_num_proc", "fp16=True is ignored"):
        assert said.count(name) == 1, name


def test_bad_calls_name_the_remedy(tuned: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = tuned
    args, rows = arguments(tmp_path), texts(tokenizer)
    with pytest.raises(DataError, match="no column 'txt'"):
        SFTTrainer(model, args, rows, dataset_text_field="txt")
    with pytest.raises(DataError, match="apply_chat_template"):
        SFTTrainer(model, args, [{"messages": []}])
    with pytest.raises(ArgumentError, match="Did you mean 'packing'"):
        SFTTrainer(model, args, rows, packin=True)
    with pytest.raises(ArgumentError, match="did not load"):
        SFTTrainer(torch.nn.Linear(2, 2), args, rows)
    trainer = SFTTrainer(model, args, rows)
    assert not hasattr(trainer, "evaluate")
    with pytest.raises(ArgumentError, match="eval_dataset"):
        trainer.evaluate()


def test_trls_own_settings_are_read(tuned: tuple[Any, Any], tmp_path: Path) -> None:
    from trl import SFTConfig

    model, tokenizer = tuned
    config = SFTConfig(
        output_dir=str(tmp_path), max_steps=2, max_length=300, dataset_text_field="words", bf16=False, use_cpu=True,
        per_device_train_batch_size=2, report_to="none",
    )  # fmt: skip
    rows = [{"words": row["text"]} for row in texts(tokenizer)] + [{"words": "a " * 400}]
    trainer = SFTTrainer(model=model, processing_class=tokenizer, train_dataset=rows, args=config)
    assert len(trainer.train_dataset) == 18
    assert trainer.train().global_step == 2
