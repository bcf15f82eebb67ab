"""Other people's training loops: what they call is fast, equal to the plain model, and left alone where it must be."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bare_trainer import NUM_STEPS, SETTINGS, PlainLogProbs, build_on, count, train_bare
from medcot.engine import accelerate, engine_of, explain, release
from medcot.engine.forward import Declined, FastForward, find_rows
from medcot.engine.memory import Keep
from tiny_models import MIXED_WINDOWS, VOCAB, attach, build_base, build_model, distance, gradients, pair, relative

FP32 = 1e-5
one_of_each = pytest.mark.parametrize(
    ("family", "sizes"),
    [("llama", {}), ("mistral", {}), ("qwen2", MIXED_WINDOWS), ("qwen3", {})],
    ids=["llama", "mistral", "qwen2", "qwen3"],
)


@pytest.fixture(autouse=True)
def no_unexpected_warning() -> Iterator[None]:
    """A slower path announces itself; no test here takes one without saying so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="an accelerated model runs its plain forward")
        yield


def training_pair(model: Any) -> tuple[Any, Any]:
    fast, plain = pair(model)
    return fast.train(), plain.train()


def rectangle(lengths: list[int], *, left: bool = False) -> dict[str, Tensor]:
    """A padded batch, of which the first third of each row carries no loss."""
    generator = torch.Generator().manual_seed(4)
    longest = max(lengths)
    ids = torch.randint(3, VOCAB, (len(lengths), longest), generator=generator)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, -100)
    for row, length in enumerate(lengths):
        real = slice(longest - length, longest) if left else slice(0, length)
        mask[row, real] = 1
        trained = slice(real.stop - length + max(1, length // 3), real.stop)
        labels[row, trained] = ids[row, trained]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def packed(lengths: list[int]) -> dict[str, Any]:
    batch = rectangle([sum(lengths)])
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    labels = batch["labels"].masked_fill(positions == 0, -100)
    return {"input_ids": batch["input_ids"], "labels": labels, "position_ids": positions, "use_cache": False}


def without_mask() -> dict[str, Any]:
    batch = rectangle([21, 21])
    del batch["attention_mask"]
    return batch


def embedded(model: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """The same batch as embeddings, which want a gradient."""
    table = model.get_input_embeddings()
    leaf = table.weight.detach()[batch["input_ids"]].requires_grad_()
    return {name: value for name, value in batch.items() if name != "input_ids"} | {"inputs_embeds": leaf}


BATCHES: dict[str, Callable[[], dict[str, Any]]] = {
    "right-padded": lambda: rectangle([23, 1, 40, 9]),
    "left-padded": lambda: rectangle([23, 1, 40, 9], left=True),
    "full": lambda: rectangle([16, 16, 16]),
    "no mask": without_mask,
    "an empty row": lambda: rectangle([12, 0, 5]),
    "mask and positions": lambda: (
        rectangle([9, 14], left=True) | {"position_ids": torch.arange(14).repeat(2, 1).sub(5).clamp(min=0)}
    ),
    "padding-free": lambda: packed([5, 1, 30, 7]),
    "padding-free in two": lambda: (
        without_mask() | {"use_cache": False, "position_ids": torch.tensor([[*range(21)], [*range(8), *range(13)]])}
    ),
    "flash arguments": lambda: (
        packed([5, 6])
        | {
            "cu_seq_lens_q": torch.tensor([0, 5, 11], dtype=torch.int32),
            "cu_seq_lens_k": torch.tensor([0, 5, 11], dtype=torch.int32),
            "max_length_q": 6,
            "max_length_k": 6,
        }
    ),
    "the step's token count": lambda: rectangle([8, 11]) | {"num_items_in_batch": 50},
}


def assert_same(fast: Any, plain: Any, batch: dict[str, Any], tolerance: float = FP32) -> None:
    got, wanted = fast(**batch), plain(**batch)
    mask = batch.get("attention_mask")
    real = torch.ones(wanted.logits.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
    assert got.logits.dtype == wanted.logits.dtype and got.past_key_values is None
    assert relative(got.logits[real], wanted.logits[real]) < tolerance
    assert got.loss.item() == pytest.approx(wanted.loss.item(), rel=tolerance)
    got.loss.backward()
    wanted.loss.backward()
    got_gradients, wanted_gradients = gradients(fast), gradients(plain)
    assert distance(got_gradients, wanted_gradients) < tolerance
    assert max(relative(got_gradients[name], wanted_gradients[name]) for name in wanted_gradients) < tolerance


@one_of_each
@pytest.mark.parametrize("batch", BATCHES)
def test_logits_loss_and_gradients(
    family: str, sizes: dict[str, Any], batch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast, plain = training_pair(build_model(family, **sizes))
    kept = count(fast, monkeypatch)
    assert_same(fast, plain, BATCHES[batch]())
    assert kept == [Keep.ALL]


def test_padding_comes_back_as_zeros() -> None:
    fast, _ = training_pair(build_model("llama"))
    batch = rectangle([4, 9])
    hidden = fast.get_base_model().model(batch["input_ids"], batch["attention_mask"]).last_hidden_state
    assert hidden.shape == (2, 9, 64)
    assert not hidden[0, 4:].any() and hidden[0, :4].all() and hidden[1].all()


def test_embeddings_get_their_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, plain = training_pair(build_model("llama"))
    kept = count(fast, monkeypatch)
    batch, twin = (embedded(plain, rectangle([9, 14])) for _ in range(2))
    before = batch["inputs_embeds"].detach().clone()
    got, wanted = fast(**batch), plain(**twin)
    assert got.loss.item() == pytest.approx(wanted.loss.item(), rel=FP32)
    got.loss.backward()
    wanted.loss.backward()
    assert relative(batch["inputs_embeds"].grad, twin["inputs_embeds"].grad) < FP32
    assert distance(gradients(fast), gradients(plain)) < FP32
    assert torch.equal(batch["inputs_embeds"].detach(), before) and kept == [Keep.ALL]


@pytest.mark.parametrize("reentrant", [True, False])
def test_the_switch_for_gradient_checkpointing(reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    fast, plain = training_pair(build_model("qwen3"))
    kept = count(fast, monkeypatch)
    for model in (fast, plain):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    assert_same(fast, plain, rectangle([23, 1, 40, 9]))
    fast.gradient_checkpointing_disable()
    fast(**rectangle([5]))
    assert kept == [Keep.INPUT, Keep.ALL]


def test_hooks_on_the_embedding_see_the_rectangle() -> None:
    """As the trainer's NEFTune noise does, which asks for the length of a row."""
    fast, plain = training_pair(build_model("llama"))
    for model in (fast, plain):
        model.get_input_embeddings().register_forward_hook(lambda module, args, output: output * output.size(2) ** 0.1)
    assert_same(fast, plain, rectangle([9, 14]))


@pytest.mark.parametrize("inside", [True, False], ids=["backward inside", "backward after"])
def test_autocast(inside: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model("llama", torch.bfloat16)
    fast, plain = training_pair(model)
    exact = copy.deepcopy(plain).float()
    kept = count(fast, monkeypatch)
    batch = rectangle([23, 1, 40, 9])
    exact(**batch).loss.backward()
    wanted = gradients(exact)
    off = []
    for one in (fast, plain):
        with torch.autocast("cpu", torch.bfloat16):
            output = one(**batch)
            if inside:
                output.loss.backward()
        if not inside:
            output.loss.backward()
        assert output.logits.dtype == torch.bfloat16
        off.append(distance(gradients(one), wanted))
    assert kept == [Keep.ALL]
    assert off[0] < 1.5 * off[1] < 0.05


# --- what stays plain, without a word ---------------------------------------------------------------------------------


def test_evaluation_is_the_models_own(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, plain = pair(build_model("llama"))
    kept = count(fast, monkeypatch)
    batch = rectangle([9, 14])
    for model in (fast, plain):
        model.eval()
    assert torch.equal(fast(**batch).logits, plain(**batch).logits)
    with torch.no_grad():
        assert torch.equal(fast(**batch).logits, plain(**batch).logits)
    assert not kept


@pytest.mark.parametrize("training", [True, False])
def test_generation_is_the_models_own(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model("llama").train(training)
    batch = rectangle([9, 14], left=True)
    del batch["labels"]
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "use_cache": True}
    before = model.generate(**batch, **options)
    accelerate(model)
    kept = count(model, monkeypatch)
    assert torch.equal(model.generate(**batch, **options), before)
    assert model(**batch, use_cache=True).past_key_values.get_seq_length() == 14
    assert not kept


def test_training_mode_without_gradients_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that log-probabilities before a step come from the layers that the step trains."""
    fast, plain = training_pair(build_model("llama"))
    kept = count(fast, monkeypatch)
    batch = rectangle([9, 14])
    with torch.no_grad():
        assert relative(fast(**batch).loss, plain(**batch).loss) < FP32
    with fast.disable_adapter(), plain.disable_adapter():
        assert relative(fast(**batch).loss, plain(**batch).loss) < FP32
    assert len(kept) == 2


# --- what stays plain, and says so ------------------------------------------------------------------------------------


def holes() -> dict[str, Any]:
    batch = rectangle([9, 14])
    batch["attention_mask"][1, 5] = 0
    return batch


def four_axes() -> dict[str, Any]:
    return without_mask() | {"attention_mask": torch.ones(21, 21).tril().bool().expand(2, 1, -1, -1)}


DECLINED: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "hidden states": (lambda: rectangle([9]) | {"output_hidden_states": True}, "the option output_hidden_states"),
    "an unknown option": (lambda: rectangle([9]) | {"shift": 3}, "the option shift"),
    "a mask with holes": (holes, "mask has holes"),
    "a mask of four axes": (four_axes, "not one of real and padding tokens"),
    "restarts beside a cache": (lambda: packed([5, 6]) | {"use_cache": None}, "unless use_cache=False"),
    "rows that disagree": (
        lambda: packed([5, 6]) | {"cu_seq_lens_q": torch.tensor([0, 6, 11], dtype=torch.int32)},
        "disagree about where rows begin",
    ),
}


@pytest.mark.parametrize("case", DECLINED)
def test_what_the_engine_cannot_answer_is_announced_once(case: str) -> None:
    build, words = DECLINED[case]
    fast, plain = training_pair(build_model("llama"))
    with pytest.warns(UserWarning, match=f"which is slower: .*{words}"):
        got = fast(**build())
    wanted = plain(**build())
    assert torch.equal(got.logits, wanted.logits)
    assert (got.hidden_states is None) == (wanted.hidden_states is None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast(**build())


def test_autocast_over_float32_weights_is_autocasts() -> None:
    fast, plain = training_pair(build_model("llama"))
    batch = rectangle([9, 14])
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.warns(UserWarning, match="its weights are float32"):
            got = fast(**batch).logits
        assert torch.equal(got, plain(**batch).logits)


def test_a_hook_inside_the_layers_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, _ = training_pair(build_model("llama"))
    kept, seen = count(fast, monkeypatch), []
    handle = fast.get_base_model().model.layers[1].mlp.up_proj.register_forward_hook(lambda *args: seen.append(1))
    with pytest.warns(UserWarning, match="layers.1.mlp.up_proj has a hook"):
        fast(**rectangle([9]))
    assert seen and not kept
    handle.remove()
    fast(**rectangle([9]))
    assert len(seen) == 1 and len(kept) == 1


def test_transformers_own_hooks_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, _ = training_pair(build_model("llama"))
    kept = count(fast, monkeypatch)
    fast.eval()(**rectangle([9]), output_hidden_states=True)
    fast.train()(**rectangle([9]))
    assert len(kept) == 1


def test_a_norm_unfrozen_later_is_trained() -> None:
    fast, plain = training_pair(build_model("llama"))
    for model in (fast, plain):
        model.get_base_model().model.layers[0].input_layernorm.requires_grad_(True)
    with pytest.warns(UserWarning, match="layer 0: its norms are being trained"):
        assert_plain(fast, plain)


def assert_plain(fast: Any, plain: Any) -> None:
    batch = rectangle([9, 14])
    got, wanted = fast(**batch), plain(**batch)
    assert torch.equal(got.logits, wanted.logits)
    got.loss.backward()
    wanted.loss.backward()
    assert distance(gradients(fast), gradients(plain)) == 0


# --- a model that changes, is copied, released, forgotten -------------------------------------------------------------


def test_a_model_cast_later_is_fast_in_its_new_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, plain = training_pair(build_model("llama", torch.bfloat16))
    kept = count(fast, monkeypatch)
    fast, plain = fast.float(), plain.float()
    assert_same(fast, plain, rectangle([9, 14]))
    assert len(kept) == 1
    with pytest.warns(UserWarning, match="16 or 32 bit, and its weights are float64"):
        assert_plain(fast.double(), plain.double())


def test_adapters_attached_later_are_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    """As TRL does that is given ``peft_config``."""
    base = build_base("qwen2")
    plain = attach(copy.deepcopy(base)).train()
    accelerate(base)
    kept = count(base, monkeypatch)
    assert_same(attach(base).train(), plain, rectangle([9, 14]))
    assert len(kept) == 1


def test_another_adapter_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import LoraConfig

    fast, plain = training_pair(build_model("llama"))
    kept = count(fast, monkeypatch)
    for model in (fast, plain):
        torch.manual_seed(0)
        model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        model.set_adapter("second")
    with pytest.warns(UserWarning, match="different LoRA scales"):
        assert_plain(fast, plain)
    assert not kept
    for model in (fast, plain):
        model.set_adapter("default")
        model.delete_adapter("second")
    assert_same(fast, plain, rectangle([9, 14]))
    assert len(kept) == 1


def test_a_copy_is_plain_and_its_own() -> None:
    fast, plain = training_pair(build_model("llama"))
    batch = rectangle([9, 14])
    copied = copy.deepcopy(fast)
    assert engine_of(copied) is None and not explain(copied).fast and explain(fast).fast
    with torch.no_grad():
        for parameter in fast.parameters():
            parameter.zero_()
    assert torch.equal(copied(**batch).logits, plain(**batch).logits)
    assert accelerate(copied).fast
    assert_same(copied, plain, batch)


def test_pickles(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, plain = training_pair(build_model("llama"))
    batch = rectangle([9, 14])
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    for opened in (torch.load(file, weights_only=False), pickle.loads(pickle.dumps(fast))):
        assert engine_of(opened) is None
        assert torch.equal(opened(**batch).logits, plain(**batch).logits)


def test_release_restores() -> None:
    fast, plain = training_pair(build_model("llama"))
    decoder = fast.get_base_model().model
    assert isinstance(decoder.forward, FastForward)
    assert "forward" not in vars(type(decoder)) or type(decoder).forward is not decoder.forward
    release(fast)
    assert "forward" not in vars(decoder)
    assert_plain(fast, plain)


def test_a_forward_that_was_there_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model("llama")
    decoder, calls = model.get_base_model().model, []
    usual = decoder.forward

    def own(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return usual(*args, **kwargs)

    decoder.forward = own
    accelerate(model)
    model(**rectangle([9]))  # evaluation
    assert calls
    release(model)
    assert decoder.forward is own


def test_a_model_turned_away_later_gets_its_forward_back() -> None:
    model = build_model("llama")
    accelerate(model)
    model.get_base_model().lm_head.requires_grad_(True)
    assert not accelerate(model).fast
    assert "forward" not in vars(model.get_base_model().model)


def test_a_forgotten_model_is_freed_at_once() -> None:
    model = build_model("llama").train()
    accelerate(model)
    model(**rectangle([9])).loss.backward()
    gone = weakref.ref(model.get_base_model().model)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


def test_the_base_outlives_its_engine() -> None:
    model = build_model("llama").train()
    accelerate(model)
    base = model.get_base_model()
    del model
    with pytest.warns(UserWarning, match="is gone"):
        base(**rectangle([9]))


def test_the_classes_stay_as_they_were() -> None:
    model = build_model("llama")
    decoder = type(model.get_base_model().model)
    before = dict(vars(decoder))
    accelerate(model)
    assert dict(vars(decoder)) == before


# --- rows -------------------------------------------------------------------------------------------------------------


def test_rows_of_a_mask() -> None:
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0], [0, 1, 1, 0]])
    rows = find_rows((4, 4), {"attention_mask": mask}, cached=True)
    assert rows.slots_T is not None and rows.positions_T is not None
    assert rows.lengths == [2, 1, 2]
    assert rows.slots_T.tolist() == [0, 1, 7, 13, 14] and rows.positions_T.tolist() == [0, 1, 3, 1, 2]
    with pytest.raises(Declined, match="every token"):
        find_rows((1, 2), {"attention_mask": torch.zeros(1, 2)}, cached=True)


def test_rows_of_positions() -> None:
    positions = torch.tensor([[3, 4, 0, 1, 2, 0]])
    assert find_rows((1, 6), {"position_ids": positions}, cached=False).lengths == [2, 3, 1]
    assert find_rows((2, 6), {"position_ids": torch.arange(6)[None]}, cached=True).lengths == [6, 6]
    # Beside a mask, positions only turn the heads.
    masked = {"position_ids": positions, "attention_mask": torch.ones(1, 6)}
    assert find_rows((1, 6), masked, cached=False).lengths == [6]


# --- TRL's trainer ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", SETTINGS)
def test_a_bare_trainer(case: str, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of TRL, its loss kernel alone is replaced; ``tests/gpu`` runs it as it is."""
    monkeypatch.setattr("trl.trainer.utils._ChunkedLogProbFunction", PlainLogProbs)
    settings, keep = SETTINGS[case]
    fast, plain = pair(build_on(model_folder, torch.float32))
    kept = count(fast, monkeypatch)
    on_cpu = {"use_cpu": True, "bf16": False, **settings}
    wanted = train_bare(plain, model_folder, tmp_path / "plain", **on_cpu)
    got = train_bare(fast, model_folder, tmp_path / "fast", **on_cpu)
    assert len(got) == NUM_STEPS and set(kept) == {keep}
    assert len(kept) == 2 * NUM_STEPS or (case == "packed" and len(kept) >= NUM_STEPS)  # few rows when packed
    assert got == pytest.approx(wanted, rel=1e-4)
    assert got[-1] < got[0]
