"""The GPU benches on the CPU: what they reckon from times, names and curves, and a small run of each."""

from __future__ import annotations

import importlib
import json
import math
import shutil
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(scope="module")
def load_bench():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCH)
        yield importlib.import_module


@pytest.fixture(scope="module")
def long_folder(tiny_folder, tmp_path_factory) -> str:
    """The tiny model, allowed rows as long as the tutorial's recipe allows."""
    folder = tmp_path_factory.mktemp("long") / "model"
    shutil.copytree(tiny_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    return str(folder)


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_case_is_one_line_for_each_number_of_rows(load_bench, long_folder, rows_file, tmp_path, monkeypatch):
    bench, path = load_bench("gpu_sft"), tmp_path / "lines.jsonl"
    monkeypatch.setitem(bench.CASES, "small", bench.Case("best-bf16", "bf16", (2, 3), split=None))
    arguments = ["--case", "small", "--trained-only", "--steps", "3", "--warmup", "2", "--json", str(path)]
    monkeypatch.setattr("sys.argv", ["gpu_sft.py", long_folder, str(rows_file), *arguments])
    bench.main()
    two, three = lines_of(path)
    assert (two["rows"], three["rows"]) == (2, 3)
    for line in (two, three):
        assert line["figure"] == "best-bf16" and line["system"] == "medcot" and line["unit"] == "tokens/s"
        assert line["labels"] == bench.TRAINED and 0 < line["trained_tokens_s"] < line["value"]
        assert line["value"] == pytest.approx(line["tokens_a_step"] / line["step_s"], rel=0.01)
        assert line["peak_gib"] > 0 and line["machine"] and line["versions"] and line["date"]
    assert two["first_step_s"] > two["load_s"] > 0 and "first_step_s" not in three


def test_a_case_that_does_not_fit_says_so(load_bench, monkeypatch):
    import torch

    bench = load_bench("gpu_sft")

    def fail(*arguments):
        try:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        except torch.OutOfMemoryError as error:
            raise RuntimeError("the step does not fit") from error

    monkeypatch.setattr(bench, "measure", fail)
    held = SimpleNamespace(tuned=SimpleNamespace(zero_grad=lambda set_to_none: None, modules=list), load_s=1.0)
    options = Namespace(model="m", rows="r", steps=4, warmup=2)
    line = bench.run_case("best-nf4", 20, held, bench.WHOLE, options, first=True)
    assert line["value"] is None and line["error"] == "out of memory: the step does not fit"
    monkeypatch.setattr(bench, "measure", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bench.run_case("best-nf4", 20, held, bench.WHOLE, options, first=True)


def _precisions() -> list[str]:
    from medcot.recipe import Precision

    return [precision.value for precision in Precision]


def test_every_case_makes_a_recipe(load_bench):
    bench, table = load_bench("gpu_sft"), load_bench("gpu_table")
    for case in bench.CASES.values():
        assert case.fp8 is not None or case.figure in {goal.key for goal in table.GOALS}
        if case.precision in _precisions():
            for rows in case.rows:
                recipe = bench.build_recipe("m", "r", case, rows, 24, 8, bench.WHOLE)
                assert recipe.train.batch_size == rows and recipe.train.train_on_prompt
                assert recipe.train.micro_batch_size == (case.split or rows)
                assert recipe.train.gradient_checkpointing.value == case.checkpointing


def test_ceiling_counts_the_products(load_bench):
    import torch

    from medcot.shapes import Shape

    ceiling = load_bench("gpu_ceiling")
    shape = Shape(2, 16, 24, 4, 2, 4, 50, 10_000, 512)
    products = ceiling.Products(shape, 10, fp8=False, device=torch.device("cpu"))
    weights = 2 * (32 * 16 + 16 * 16 + 48 * 16 + 16 * 24) + 50 * 16
    assert products.flops == 2 * 2 * 10 * weights  # forward and backward, two operations a product
    lines = list(ceiling.ceilings(shape, 10, 0.05, torch.device("cpu")))
    assert [line["figure"] for line in lines] == ["ceiling-bf16", "ceiling-bf16-recompute"]
    whole, recompute = (line["value"] for line in lines)
    assert 0 < recompute < whole


def test_process_age_grows(load_bench):
    common = load_bench("gpu_common")
    first = common.seconds_since_start()
    assert 0 < first <= common.seconds_since_start() < 24 * 3600


def test_context_search_reports_every_length(load_bench, long_folder, tmp_path, monkeypatch, capsys):
    bench, path = load_bench("gpu_context"), tmp_path / "lines.jsonl"
    monkeypatch.setattr(bench, "LAST_ID", 200)  # the tiny vocabulary
    arguments = ["64", "14.5", "--search", "48,96", "--precision", "bf16", "--json", str(path)]
    monkeypatch.setattr("sys.argv", ["gpu_context.py", long_folder, *arguments])
    bench.main()
    found = lines_of(path)
    assert [line["value"] for line in found] == [48, 64, 96] and all(line["fits"] for line in found)
    assert capsys.readouterr().out.splitlines()[-1] == "longest that fits in 14.5 GiB: 96 tokens"


def test_curves_of_one_pair(load_bench, long_folder, rows_file, tmp_path, monkeypatch):
    bench, out = load_bench("gpu_curves"), tmp_path / "curves"
    arguments = ["--model", long_folder, "--pairs", "bf16", "--steps", "3", "--batch-size", "2", "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["gpu_curves.py", str(rows_file), *arguments])
    bench.main()
    kept = json.loads(out.with_suffix(".json").read_text())
    assert set(kept["curves"]) == {"bf16 plain", "bf16 accelerated"}
    assert all(len(losses) == 3 for losses in kept["curves"].values())
    assert kept["comparisons"]["bf16"]["within"]
    assert out.with_suffix(".png").stat().st_size > 10_000


def test_differences_of_curves(load_bench):
    bench = load_bench("gpu_curves")
    reference = [4.0 - 0.1 * step for step in range(10)]
    losses = [loss * (1.015 if step == 3 else 1.0) for step, loss in enumerate(reference)]
    figures = bench.compare(losses, reference, 0.01)
    assert figures["max"] == pytest.approx(0.015) and figures["mean"] == pytest.approx(0.0015)
    assert figures["smoothed_max"] < 0.004
    assert figures["within"] is False and figures["within_smoothed"] is True
    assert bench.compare(losses, reference, None)["within"] is None
    assert math.isclose(bench.smooth(reference)[0], sum(reference[:5]) / 5)
    with pytest.raises(AssertionError):
        bench.compare(losses[:-1], reference, None)


KERNELS = {
    "nvjet_sm90_tst_256x128_64x4_2x1_v_bz_coopA_TNN": "products, 16-bit",
    "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NNT": "products, 16-bit",
    "nvjet_tst_192x48_64x8_1x1_h_bz_TNT": "products, thin (LoRA)",
    "nvjet_sm90_tst_64x128_64x8_1x1_h_bz_splitK_TNT": "products, thin (LoRA)",
    "nvjet_sm90_qqtst_128x256_128x4_1x2_h_bz_coopA_TNT": "products, FP8",
    "void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal<cutlass::float_e4m3_t>>": "products, FP8",
    "ampere_bf16_s16816gemm_bf16_128x64_ldg8_f2f_stages_32x6_nn": "products, thin (LoRA)",
    "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128>>": "attention, forward",
    "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<x>": "attention, backward",
    "void pytorch_flash::flash_bwd_convert_dq_kernel<x>": "attention, backward",
    "void kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8, 2>": "NF4 unpacking",
    "unpack_nf4_kernel": "NF4 unpacking",
    "quantise_rows_kernel": "FP8 quantising",
    "add_norm_kernel": "norm",
    "norm_grad_kernel": "norm",
    "rotate_back_kernel": "rotary",
    "swiglu_grad_kernel": "SwiGLU",
    "attend_kernel": "attention, forward",
    "query_grad_kernel": "attention, backward",
    "key_grad_kernel": "attention, backward",
    "thin_gradients_kernel": "products, thin (LoRA)",
    "thin_sum_kernel": "products, thin (LoRA)",
    "cross_entropy_kernel": "loss",
    "void kOptimizerStatic8bit2StateBlockwise<float, 1, 256, 1>": "optimizer, clipping",
    "void at::native::multi_tensor_apply_kernel<at::native::LpNormFunctor<float>>": "optimizer, clipping",
    "Memcpy DtoH (Device -> Pinned)": "memory copies and fills",
    "Memset (Device)": "memory copies and fills",
    "void at::native::index_elementwise_kernel<128, 4>": "gathers, embedding",
    "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor>": "casts, sums, elementwise",
    "something_new": "other",
}


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernels_name_tells_its_kind(load_bench, name):
    assert load_bench("gpu_profile").classify(name) == KERNELS[name]


def test_busy_time_counts_overlap_once(load_bench):
    bench = load_bench("gpu_profile")
    kernels = [bench.Kernel("a", 0, 10), bench.Kernel("b", 5, 12), bench.Kernel("c", 6, 8), bench.Kernel("a", 20, 30)]
    assert bench.busy_us(kernels) == 22
    text, figures = bench.describe(kernels, seconds=44e-6, top=2)
    assert figures["busy"] == 0.5 and figures["launches"] == round(4 / bench.STEPS)
    assert "| a " in text and "| c " in text


def test_profile_of_a_case(load_bench, long_folder, rows_file, monkeypatch, capsys):
    bench = load_bench("gpu_profile")
    arguments = ["--case", "best-bf16", "--batch-size", "2", "--top", "3"]
    monkeypatch.setattr("sys.argv", ["gpu_profile.py", long_folder, str(rows_file), *arguments])
    bench.main()
    printed = capsys.readouterr().out
    assert "launches a step" in printed and "kernel (all kernels)" in printed
