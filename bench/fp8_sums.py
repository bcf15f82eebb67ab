"""What sums in 14 bits do to 8-bit products, by emulation on a CPU: why ``frozen.LONGEST_FAST_SUM`` is there.

With fast accumulation a Hopper tensor core adds 32 products at a time to a running sum that keeps about 14 bits: what
is below the last bit of the largest of them is cut off, not rounded (DeepSeek-AI 2024, arXiv:2412.19437, section
3.3.2). Here that is done in plain torch for the products of SmolLM2's middle layer and head, with the codes that the
engine would round them to. Two distances are given: of the products themselves, and of their sum over tokens. The
second is the one that training feels: errors that differ from token to token cancel in an adapter's gradient, one that
all tokens share does not. The head's backward product sums over the vocabulary, mostly tiny numbers beside one large
one.

    python bench/fp8_sums.py ROWS.jsonl
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from medcot import model, planning
from medcot.embedded import convert_embedded
from medcot.engine.pointwise import quantise_rows
from medcot.recipe import load_recipe
from results import format_table

AT_ONCE, FRACTION_BITS = 32, 13
TOKENS = slice(100, 148)  # of the first row
COLUMNS = 24  # of each product, drawn: the emulation is slow


def multiply_fast(x_TK: Tensor, w_NK: Tensor) -> Tensor:
    """``x wᵀ``, its sums as a tensor core would make them."""
    total_TN = torch.zeros(len(x_TK), len(w_NK))
    for start in range(0, x_TK.shape[1], AT_ONCE):
        some = slice(start, start + AT_ONCE)
        terms = x_TK[:, None, some] * w_NK[None, :, some]
        largest = torch.maximum(total_TN.abs(), terms.abs().amax(2)).clamp_min(1e-30)
        unit = torch.exp2(torch.floor(torch.log2(largest)) - FRACTION_BITS)
        total_TN = (torch.trunc(total_TN / unit) + torch.trunc(terms / unit[..., None]).sum(2)) * unit
    return total_TN


def off(got: Tensor, wanted: Tensor) -> str:
    """Relative distance, in words."""
    return f"{float((got - wanted).norm() / wanted.norm()):.2%}"


def compare(name: str, x_TK: Tensor, w_NK: Tensor, columns_scale_K: Tensor | None = None) -> list[str]:
    """A row of the table: a product of rounded operands, its sums in full and in 14 bits."""
    codes, scale_T1 = quantise_rows(x_TK, columns_scale_K)
    w_NK = w_NK[torch.randperm(len(w_NK), generator=torch.Generator().manual_seed(0))[:COLUMNS]]
    full_TN = (codes.double() @ w_NK.double().T).float() * scale_T1
    fast_TN = multiply_fast(codes.float(), w_NK) * scale_T1
    return [name, f"{codes.shape[1]:,}", off(fast_TN, full_TN), off(fast_TN.sum(0), full_TN.sum(0))]


def measure(rows: str) -> list[list[str]]:
    """The table: forward and backward products of one layer and of the head, on the first row."""
    source = str(convert_embedded(torch.bfloat16))
    loaded = model.load(source, precision="fp32", max_seq_length=2048, device="cpu")
    recipe = load_recipe("tutorial-8b", [f"model.source={source}", f"data.source={rows}"])
    ids = planning.encode_examples(planning.read_examples(recipe), recipe, loaded.tokenizer).rows[0].input_ids
    ids_1T, causal = torch.tensor(ids)[None], loaded.model
    layer = causal.model.layers[len(causal.model.layers) // 2]
    parts = {"q": layer.self_attn.q_proj, "o": layer.self_attn.o_proj, "gate": layer.mlp.gate_proj}
    parts |= {"up": layer.mlp.up_proj, "down": layer.mlp.down_proj, "head": causal.lm_head}
    inputs, gradients = {}, {}
    for name, part in parts.items():

        def keep(module: object, given: tuple[Tensor], out: Tensor, name: str = name) -> None:
            inputs[name] = given[0].detach()[0, TOKENS]
            out.register_hook(lambda grad: gradients.update({name: grad[0, TOKENS]}))

        part.register_forward_hook(keep)
    embedded = causal.model.embed_tokens(ids_1T).detach().requires_grad_()
    logits = causal(inputs_embeds=embedded).logits[0, :-1]
    torch.nn.functional.cross_entropy(logits, ids_1T[0, 1:], reduction="sum").backward()
    found = []
    for names in (("q",), ("o",), ("gate", "up"), ("down",), ("head",)):
        codes, scale_N1 = quantise_rows(torch.cat([parts[name].weight.detach() for name in names]))
        dy_TN = torch.cat([gradients[name] for name in names], 1)
        label = "/".join(names)
        found.append(compare(f"{label}, forward", inputs[names[0]], codes.float()))
        found.append(compare(f"{label}, backward", dy_TN, codes.float().T.contiguous(), scale_N1[:, 0]))
    return found


def main() -> None:
    """Emulate, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", help="training rows, JSON Lines")
    options = parser.parse_args()
    print(format_table(["product", "numbers added", "off by", "its sum over tokens by"], measure(options.rows)))


if __name__ == "__main__":
    main()
