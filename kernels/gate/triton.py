"""The gate in Triton: one pass over the logits, one pass back, the same bits every run.

A program takes tiles of tokens of one sequence. Counts and sums over tokens leave it as partial sums, which a second
kernel adds up in a fixed order. Probability (and bias) and column are packed into one integer whose order is theirs, so
a choice is one maximum, and ties go to the lower expert by themselves.

Shape letters: B sequences, S positions, E experts, K top-k, P programs a sequence, N domains, M the most
experts of a domain, V vocabulary.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..compile_case import CompileCase
from ..triton import offset

MOST_EXPERTS = 4096  # a token's probabilities lie in the registers of one program
MOST_CHOICES = 16
_LOWEST = tl.constexpr(-(1 << 63))


@triton.jit
def _keys(score, column, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """Integers ordered as `score`, then by the lower column; NaN above all, columns from E on below all."""
    bits = score.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = (ordered.to(tl.int64) << 32) | (BLOCK_E - 1 - column)[None, :].to(tl.int64)
    return tl.where((column < E)[None, :], key, _LOWEST)


@triton.jit
def _forward(
    logits, bias, expert, weight, lse, count_part, prob_part, z_part, S, P,
    E: tl.constexpr, K: tl.constexpr, HAS_BIAS: tl.constexpr, RENORMALIZE: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    part, sequence = (row % P).to(tl.int32), row // P
    column, choice = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    count_E = tl.zeros([BLOCK_E], tl.int32)
    prob_E = tl.zeros([BLOCK_E], tl.float32)
    z_S = tl.zeros([BLOCK_S], tl.float32)
    for step in range(STEPS):
        place = (part * STEPS + step) * BLOCK_S + tl.arange(0, BLOCK_S)
        inside = place < S
        token = offset(sequence, S) + place
        mask = inside[:, None] & (column < E)[None, :]
        logit = tl.load(logits + token[:, None] * E + column[None, :], mask=mask, other=0.0)
        logit = tl.where((column < E)[None, :], logit, float("-inf"))
        largest = tl.max(logit, 1)
        exponential = tl.exp(logit - largest[:, None])
        total = tl.sum(exponential, 1)
        prob = exponential / total[:, None]
        log_sum = largest + tl.log(total)
        tl.store(lse + token, log_sum, mask=inside)
        prob_E += tl.sum(tl.where(inside[:, None], prob, 0.0), 0)
        z_S += tl.where(inside, log_sum * log_sum, 0.0)
        if HAS_BIAS:
            prob += tl.load(bias + column, mask=column < E, other=0.0)[None, :]
        key = _keys(prob, column, E, BLOCK_E)
        if K == 2:  # the two weights are sigmoids of the difference: no tile of choices
            best = tl.max(key, 1)
            key = tl.where(key == best[:, None], _LOWEST, key)
            second = tl.max(key, 1)
            key = tl.where(key == second[:, None], _LOWEST, key)
            first_id = BLOCK_E - 1 - (best & 0xFFFFFFFF)
            second_id = BLOCK_E - 1 - (second & 0xFFFFFFFF)
            first_logit = tl.load(logits + token * E + first_id, mask=inside, other=0.0)
            second_logit = tl.load(logits + token * E + second_id, mask=inside, other=0.0)
            if RENORMALIZE:
                first_weight = 1 / (1 + tl.exp(second_logit - first_logit))
                second_weight = 1 / (1 + tl.exp(first_logit - second_logit))
            else:
                first_weight, second_weight = tl.exp(first_logit - log_sum), tl.exp(second_logit - log_sum)
            tl.store(expert + token * 2, first_id, mask=inside)
            tl.store(expert + token * 2 + 1, second_id, mask=inside)
            tl.store(weight + token * 2, first_weight, mask=inside)
            tl.store(weight + token * 2 + 1, second_weight, mask=inside)
        else:
            chosen = tl.zeros([BLOCK_S, BLOCK_K], tl.int64)
            for k in tl.static_range(K):
                best = tl.max(key, 1)
                key = tl.where(key == best[:, None], _LOWEST, key)
                chosen = tl.where((choice == k)[None, :], (BLOCK_E - 1 - (best & 0xFFFFFFFF))[:, None], chosen)
            mask = inside[:, None] & (choice < K)[None, :]
            chosen_logit = tl.load(logits + token[:, None] * E + chosen, mask=mask, other=0.0)
            if RENORMALIZE:
                chosen_logit = tl.where((choice < K)[None, :], chosen_logit, float("-inf"))
                share = tl.exp(chosen_logit - tl.max(chosen_logit, 1)[:, None])
                share /= tl.sum(share, 1)[:, None]
            else:
                share = tl.exp(chosen_logit - log_sum[:, None])
            to = token[:, None] * K + choice[None, :]
            tl.store(expert + to, chosen, mask=mask)
            tl.store(weight + to, share, mask=mask)
        taken = (key == _LOWEST) & inside[:, None]
        count_E += tl.sum(taken.to(tl.int32), 0)
    tl.store(count_part + row * E + column, count_E, mask=column < E)
    tl.store(prob_part + row * E + column, prob_E, mask=column < E)
    tl.store(z_part + row, tl.sum(z_S, 0))


@triton.jit
def _add_up(
    count_part, prob_part, z_part, count, prob, z, P,
    E: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    sequence, column = tl.program_id(0), tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    count_PE = tl.zeros([BLOCK_P, BLOCK_E], tl.int32)
    prob_PE = tl.zeros([BLOCK_P, BLOCK_E], tl.float32)
    z_P = tl.zeros([BLOCK_P], tl.float32)
    for begin in range(0, P, BLOCK_P):
        part = begin + tl.arange(0, BLOCK_P)
        row = offset(sequence, P) + part
        mask = (part < P)[:, None] & (column < E)[None, :]
        count_PE += tl.load(count_part + row[:, None] * E + column[None, :], mask=mask, other=0)
        prob_PE += tl.load(prob_part + row[:, None] * E + column[None, :], mask=mask, other=0.0)
        z_P += tl.load(z_part + row, mask=part < P, other=0.0)
    to = offset(sequence, E) + column
    tl.store(count + to, tl.sum(count_PE, 0).to(tl.int64), mask=column < E)
    tl.store(prob + to, tl.sum(prob_PE, 0), mask=column < E)
    if tl.program_id(1) == 0:
        tl.store(z + sequence, tl.sum(z_P, 0))


@triton.jit
def _backward(
    logits, lse, expert, weight, grad_weight, grad_prob, grad_z, grad_logits, S, P,
    E: tl.constexpr, K: tl.constexpr, RENORMALIZE: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    sequence, column = tl.program_id(0) // P, tl.arange(0, BLOCK_E)
    place = tl.program_id(0) % P * BLOCK_S + tl.arange(0, BLOCK_S)
    inside = place < S
    token = offset(sequence, S) + place
    mask = inside[:, None] & (column < E)[None, :]
    at = token[:, None] * E + column[None, :]
    log_sum = tl.load(lse + token, mask=inside, other=0.0)
    prob = tl.exp(tl.load(logits + at, mask=mask, other=float("-inf")) - log_sum[:, None])
    # `inner` is d/d prob (back through the softmax); `direct` comes on top in the chosen columns, one choice in each.
    inner = tl.load(grad_prob + offset(sequence, E) + column, mask=column < E, other=0.0)[None, :]
    mean = tl.zeros([BLOCK_S], tl.float32)
    if RENORMALIZE:
        for k in range(K):
            share = tl.load(weight + token * K + k, mask=inside, other=0.0)
            mean += share * tl.load(grad_weight + token * K + k, mask=inside, other=0.0)
    direct = tl.zeros([BLOCK_S, BLOCK_E], tl.float32)
    for k in range(K):
        chosen = tl.load(expert + token * K + k, mask=inside, other=0)
        grad = tl.load(grad_weight + token * K + k, mask=inside, other=0.0)
        if RENORMALIZE:
            grad = tl.load(weight + token * K + k, mask=inside, other=0.0) * (grad - mean)
        direct = tl.where(column[None, :] == chosen[:, None], grad[:, None], direct)
    if RENORMALIZE:
        mean_inner = tl.sum(inner * prob, 1)
    else:
        direct *= prob
        mean_inner = tl.sum(inner * prob + direct, 1)
    grad_log_sum = 2 * log_sum * tl.load(grad_z + sequence)
    tl.store(grad_logits + at, prob * (inner - mean_inner[:, None] + grad_log_sum[:, None]) + direct, mask=mask)


@triton.jit
def _look_up(
    token, domain, table, sets, expert, count, S, P, V, M,
    E: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    sequence, column = tl.program_id(0) // P, tl.arange(0, BLOCK_E)
    place = tl.program_id(0) % P * BLOCK_S + tl.arange(0, BLOCK_S)
    inside = place < S
    at = offset(sequence, S) + place
    group = tl.load(domain + sequence)
    position = tl.load(table + offset(group, V) + tl.load(token + at, mask=inside, other=0), mask=inside, other=0)
    chosen = tl.load(sets + offset(group, M) + position, mask=inside, other=0)
    tl.store(expert + at, chosen, mask=inside)
    # Sums of integers are the same in any order, so these may be atomic.
    count_E = tl.histogram(chosen.to(tl.int32), BLOCK_E, mask=inside).to(tl.int64)
    tl.atomic_add(count + offset(sequence, E) + column, count_E, mask=(column < E) & (count_E > 0))


def _blocks(E: int, device: torch.device) -> dict[str, int]:
    """Tokens and columns of a tile: a token, or 2048 elements, whose keys stay in the registers of four warps."""
    block_E = max(triton.next_power_of_2(E), 2)
    block_S = min(max(2048 // block_E, 1), 32) if device.type == "cuda" else 8
    return {"BLOCK_S": block_S, "BLOCK_E": block_E}


def _choices(K: int) -> int:
    return max(triton.next_power_of_2(K), 2)


_MOST_STEPS = 8  # tiles of a program: with up to 128 experts its partial sums are a sixtieth of its logits' bytes
_BLOCK_P = 32


@torch.library.custom_op("sigmoe::gate", mutates_args=())
def gate_forward(
    logits_BSE: Tensor, bias_E: Tensor | None, top_k: int, renormalize: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return `Gate`'s five tensors and lse_BS; fp32 logits, fp32 bias."""
    logits_BSE, bias_E = logits_BSE.contiguous(), None if bias_E is None else bias_E.contiguous()
    expert_BSK, weight_BSK, count_BE, prob_BE, z_B, lse_BS = _empty(logits_BSE, bias_E, top_k, renormalize)
    B, S, E = logits_BSE.shape
    if B * S == 0:
        return expert_BSK, weight_BSK, count_BE.zero_(), prob_BE.zero_(), z_B.zero_(), lse_BS
    blocks = _blocks(E, logits_BSE.device)
    most_steps, block_P = (_MOST_STEPS, _BLOCK_P) if logits_BSE.is_cuda else (2, 2)
    steps = min(triton.next_power_of_2(triton.cdiv(S, blocks["BLOCK_S"])), most_steps)
    P = triton.cdiv(S, blocks["BLOCK_S"] * steps)
    count_part = logits_BSE.new_empty(B, P, E, dtype=torch.int32)
    prob_part, z_part = logits_BSE.new_empty(B, P, E), logits_BSE.new_empty(B, P)
    _forward[(B * P,)](
        logits_BSE, bias_E, expert_BSK, weight_BSK, lse_BS, count_part, prob_part, z_part, S, P,
        E=E, K=top_k, HAS_BIAS=bias_E is not None, RENORMALIZE=renormalize, BLOCK_K=_choices(top_k), STEPS=steps,
        **blocks,
    )  # fmt: skip
    grid = (B, triton.cdiv(E, 32))
    _add_up[grid](count_part, prob_part, z_part, count_BE, prob_BE, z_B, P, E=E, BLOCK_P=block_P, BLOCK_E=32)
    return expert_BSK, weight_BSK, count_BE, prob_BE, z_B, lse_BS


@gate_forward.register_fake
def _empty(
    logits_BSE: Tensor, bias_E: Tensor | None, top_k: int, renormalize: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    B, S, E = logits_BSE.shape
    new = logits_BSE.new_empty
    sums = new(B, E, dtype=torch.int64), new(B, E), new(B)
    return new(B, S, top_k, dtype=torch.int64), new(B, S, top_k), *sums, new(B, S)


@torch.library.custom_op("sigmoe::gate_backward", mutates_args=())
def gate_backward(
    logits_BSE: Tensor,
    lse_BS: Tensor,
    expert_BSK: Tensor,
    weight_BSK: Tensor,
    grad_weight_BSK: Tensor,
    grad_prob_BE: Tensor,
    grad_z_B: Tensor,
    renormalize: bool,
) -> Tensor:
    """Return the gradient of the logits."""
    logits_BSE, grad_weight_BSK = logits_BSE.contiguous(), grad_weight_BSK.contiguous()
    grad_BSE = torch.empty_like(logits_BSE)
    (B, S, E), K = logits_BSE.shape, expert_BSK.shape[-1]
    if B * S == 0:
        return grad_BSE
    blocks = _blocks(E, logits_BSE.device)
    P = triton.cdiv(S, blocks["BLOCK_S"])
    _backward[(B * P,)](
        logits_BSE, lse_BS, expert_BSK, weight_BSK, grad_weight_BSK, grad_prob_BE.contiguous(), grad_z_B.contiguous(),
        grad_BSE, S, P, E=E, K=K, RENORMALIZE=renormalize, **blocks,
    )  # fmt: skip
    return grad_BSE


@gate_backward.register_fake
def _empty_like(logits_BSE: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(logits_BSE, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    expert_BSK, weight_BSK, _, _, _, lse_BS = output
    ctx.save_for_backward(inputs[0], lse_BS, expert_BSK, weight_BSK)
    ctx.renormalize = inputs[3]
    ctx.mark_non_differentiable(lse_BS)


def _differentiate(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
    _, grad_weight_BSK, _, grad_prob_BE, grad_z_B, _ = grads
    grad = gate_backward(*ctx.saved_tensors, grad_weight_BSK, grad_prob_BE, grad_z_B, ctx.renormalize)
    return grad, None, None, None


gate_forward.register_autograd(_differentiate, setup_context=_save)


@torch.library.custom_op("sigmoe::table_gate", mutates_args=())
def table_gate_forward(
    token_BS: Tensor, domain_B: Tensor, table_NV: Tensor, sets_NM: Tensor, num_experts: int
) -> tuple[Tensor, Tensor]:
    """Return expert_BS and count_BE of experts that a table gives."""
    (B, S), V, M = token_BS.shape, table_NV.shape[1], sets_NM.shape[1]
    expert_BS = token_BS.new_empty(B, S)
    count_BE = token_BS.new_zeros(B, num_experts)
    if B * S:
        block_S = 1024 if token_BS.is_cuda else 16
        P = triton.cdiv(S, block_S)
        _look_up[(B * P,)](
            token_BS.contiguous(), domain_B.contiguous(), table_NV.contiguous(), sets_NM.contiguous(), expert_BS,
            count_BE, S, P, V, M, E=num_experts, BLOCK_S=block_S, BLOCK_E=max(triton.next_power_of_2(num_experts), 2),
        )  # fmt: skip
    return expert_BS, count_BE


@table_gate_forward.register_fake
def _empty_choices(
    token_BS: Tensor, domain_B: Tensor, table_NV: Tensor, sets_NM: Tensor, num_experts: int
) -> tuple[Tensor, Tensor]:
    return token_BS.new_empty(token_BS.shape), token_BS.new_empty(token_BS.shape[0], num_experts)


def compile_cases() -> Iterator[CompileCase]:
    """Yield the gate's kernels at the numbers of experts and choices of published models."""
    cuda = torch.device("cuda")
    forward = dict.fromkeys("logits bias weight lse prob_part z_part".split(), "*fp32") | {"S": "i32:16", "P": "i32"}
    forward |= {"expert": "*i64", "count_part": "*i32"}
    backward = dict.fromkeys("logits lse weight grad_weight grad_prob grad_z grad_logits".split(), "*fp32")
    backward |= {"expert": "*i64", "S": "i32:16", "P": "i32"}
    for E, K, has_bias in ((8, 2, False), (32, 2, True), (128, 8, True), (512, 16, False), (MOST_EXPERTS, 1, False)):
        name = f"E {E}, K {K}" + (", bias" if has_bias else "")
        common: dict[str, object] = {"E": E, "K": K, "RENORMALIZE": True, **_blocks(E, cuda)}
        constants = common | {"HAS_BIAS": has_bias, "BLOCK_K": _choices(K), "STEPS": _MOST_STEPS}
        signature = dict(forward)
        if not has_bias:
            del signature["bias"]
            constants |= {"bias": None}
        yield CompileCase(name=f"gate forward {name}", kernel=_forward, signature=signature, constants=constants)
        yield CompileCase(name=f"gate backward {name}", kernel=_backward, signature=backward, constants=common)
    sums = {"count_part": "*i32", "prob_part": "*fp32", "z_part": "*fp32", "count": "*i64", "prob": "*fp32"}
    constants = {"E": 128, "BLOCK_P": _BLOCK_P, "BLOCK_E": 32}
    yield CompileCase(
        name="gate sums", kernel=_add_up, signature=sums | {"z": "*fp32", "P": "i32"}, constants=constants
    )
    table = dict.fromkeys("token domain sets expert count".split(), "*i64") | {"table": "*i32"}
    table |= {"S": "i32:16", "P": "i32", "V": "i32:16", "M": "i32"}
    constants = {"E": 128, "BLOCK_S": 1024, "BLOCK_E": 128}
    yield CompileCase(name="gate table", kernel=_look_up, signature=table, constants=constants)
