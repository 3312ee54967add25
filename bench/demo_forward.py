"""A fast training forward for Qwen3-MoE: the Hugging Face model's parameters and mathematics, experts batched."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_ROWS = 128


def norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """RMS norm of float32 x [..., D], handed on in `dtype`."""
    return (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight).to(dtype)


def norm_and_rotate(qk: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """Per-head RMS norm, then rotary embedding; qk [B, S, H, d], weight [H, d], cos and sin [1, S, 1, d]."""
    normed = qk.float()
    normed = normed * torch.rsqrt(normed.pow(2).mean(-1, keepdim=True) + eps) * weight
    half = qk.shape[-1] // 2
    rotated = torch.cat((-normed[..., half:], normed[..., :half]), dim=-1)
    return (normed * cos + rotated * sin).to(qk.dtype)


def swiglu(both: Tensor) -> Tensor:
    gate, up = both.chunk(2, dim=-1)
    return (F.silu(gate.float()) * up.float()).to(both.dtype)


def swiglu_backward(both: Tensor, grad: Tensor) -> Tensor:
    gate, up = both.float().chunk(2, dim=-1)
    grad = grad.float()
    sigmoid = torch.sigmoid(gate)
    d_up = grad * gate * sigmoid
    d_gate = grad * up * sigmoid * (1 + gate * (1 - sigmoid))
    return torch.cat((d_gate, d_up), dim=-1).to(both.dtype)


def scale_rows(x: Tensor, scale: Tensor) -> Tensor:
    """x [N, D], scale [N] -> x * scale row by row."""
    return x * scale.unsqueeze(-1)


def sum_picks(picked: Tensor) -> Tensor:
    """picked [T, K, D] -> [T, D], summed over K in float32."""
    total = picked[:, 0].float()
    for pick in range(1, picked.shape[1]):
        total = total + picked[:, pick].float()
    return total.to(picked.dtype)


def weigh_picks(picked: Tensor, weight: Tensor) -> Tensor:
    """picked [T, K, D], weight [T, K] -> [T, D], the weighted sum over K in float32."""
    total = picked[:, 0].float() * weight[:, 0, None].float()
    for pick in range(1, picked.shape[1]):
        total = total + picked[:, pick].float() * weight[:, pick, None].float()
    return total.to(picked.dtype)


def pick_products(picked: Tensor, grad: Tensor) -> Tensor:
    """picked [T, K, D], grad [T, D] -> [T, K] inner products."""
    return (picked.float() * grad.float().unsqueeze(1)).sum(-1).to(picked.dtype)


def compile_pieces() -> None:
    """Replace the element-wise pieces of this module by compiled ones (needs a C++ compiler); same mathematics."""
    for piece in (norm, norm_and_rotate, swiglu, swiglu_backward, scale_rows, sum_picks, weigh_picks, pick_products):
        globals()[piece.__name__] = torch.compile(piece, dynamic=False)


class AttentionFunction(torch.autograd.Function):
    """Causal attention as plain products over blocks of queries: q (scaled), k, v [N, S, d] -> [N, S, d].

    On one core the fused kernel's backward is several times slower than this; the query blocks skip most of the
    masked part.
    """

    BLOCKS = 4

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        length = q.shape[1]
        step = -(-length // AttentionFunction.BLOCKS)
        out, probs = torch.empty_like(q), []
        for start in range(0, length, step):
            end = min(start + step, length)
            mask = torch.full((end - start, end), float("-inf"), dtype=q.dtype, device=q.device).triu_(start + 1)
            scores = torch.baddbmm(mask, q[:, start:end], k[:, :end].transpose(1, 2))
            probs.append(scores.softmax(-1))
            out[:, start:end] = torch.bmm(probs[-1], v[:, :end])
        ctx.save_for_backward(q, k, v, *probs)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        q, k, v, *probs = ctx.saved_tensors
        grad = grads[0]
        d_q, d_k, d_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        start = 0
        for prob in probs:
            end = prob.shape[2]
            d_prob = torch.bmm(grad[:, start:end], v[:, :end].transpose(1, 2))
            d_scores = torch._softmax_backward_data(d_prob, prob, -1, prob.dtype)
            d_q[:, start:end] = torch.bmm(d_scores, k[:, :end])
            d_k[:, :end] += torch.bmm(d_scores.transpose(1, 2), q[:, start:end])
            d_v[:, :end] += torch.bmm(prob.transpose(1, 2), grad[:, start:end])
            start = end
        return d_q, d_k, d_v


class ExpertsFunction(torch.autograd.Function):
    """Gated expert FFNs as batched products over blocks of rows; no token is ever dropped.

    x [T, D], index [T, K] int64, weight [T, K], gate_up [E, 2F, D], down [E, D, F] -> [T, D], all floats one dtype.
    Rows are sorted by expert and each expert's are padded to whole blocks, so all shapes are fixed however uneven the
    routing is. Every permutation is a gather (also in the backward): scatter-adds are serial on a CPU.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        tokens, picks = index.shape
        experts = gate_up.shape[0]
        flat = index.reshape(-1)
        order = torch.argsort(flat, stable=True)
        counts = torch.bincount(flat, minlength=experts)
        blocks_of_expert = (counts + BLOCK_ROWS - 1) // BLOCK_ROWS
        blocks = -(-flat.numel() // BLOCK_ROWS) + experts
        first_block = blocks_of_expert.cumsum(0) - blocks_of_expert
        expert_of_block = torch.zeros(blocks, dtype=torch.int64, device=x.device)
        used = torch.repeat_interleave(torch.arange(experts, device=x.device), blocks_of_expert)
        expert_of_block[: used.numel()] = used
        expert_of_row = flat[order]
        rank = torch.arange(flat.numel(), device=x.device) - (counts.cumsum(0) - counts)[expert_of_row]
        slot_of_row = first_block[expert_of_row] * BLOCK_ROWS + rank
        token_of_slot = torch.zeros(blocks * BLOCK_ROWS, dtype=torch.int64, device=x.device)
        token_of_slot[slot_of_row] = order // picks
        weight_of_slot = torch.zeros(blocks * BLOCK_ROWS, dtype=x.dtype, device=x.device)
        weight_of_slot[slot_of_row] = weight.reshape(-1)[order]
        slot_of_pick = torch.empty_like(flat)
        slot_of_pick[order] = slot_of_row

        xs = x.index_select(0, token_of_slot).view(blocks, BLOCK_ROWS, -1)
        gate_up = gate_up.index_select(0, expert_of_block)
        down = down.index_select(0, expert_of_block)
        both = torch.bmm(xs, gate_up.transpose(1, 2))
        hidden = swiglu(both)
        ys = torch.bmm(hidden, down.transpose(1, 2)).view(blocks * BLOCK_ROWS, -1)
        picked = ys.index_select(0, slot_of_pick).view(tokens, picks, -1)
        indices = (token_of_slot, weight_of_slot, slot_of_pick, F.one_hot(expert_of_block, experts).to(x.dtype))
        ctx.save_for_backward(xs, both, hidden, picked, gate_up, down, *indices)
        return weigh_picks(picked, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        xs, both, hidden, picked, gate_up, down, token_of_slot, weight_of_slot, slot_of_pick, owner = ctx.saved_tensors
        grad = grads[0].contiguous()
        d_weight = pick_products(picked, grad)
        d_ys = scale_rows(grad.index_select(0, token_of_slot), weight_of_slot).view_as(xs)
        d_down = owner.t() @ torch.bmm(d_ys.transpose(1, 2), hidden).flatten(1)
        d_both = swiglu_backward(both, torch.bmm(d_ys, down))
        d_gate_up = owner.t() @ torch.bmm(d_both.transpose(1, 2), xs).flatten(1)
        d_xs = torch.bmm(d_both, gate_up).view(-1, xs.shape[-1])
        d_x = sum_picks(d_xs.index_select(0, slot_of_pick).view_as(picked))
        return d_x, None, d_weight, d_gate_up.view(-1, *gate_up.shape[1:]), d_down.view(-1, *down.shape[1:])


class FastForward:
    """The training forward over a `Qwen3MoeForCausalLM`; holds no parameters of its own.

    `compute_dtype` is what the matrix products run in (weights are cast on each call, gradients arrive in the
    parameters' own dtype); norms, softmaxes, the router and the residual stream stay in float32.
    """

    def __init__(self, model: Any, compute_dtype: torch.dtype = torch.bfloat16) -> None:
        self.model = model
        self.config = model.config
        self.compute_dtype = compute_dtype

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return norm(x, weight, self.config.rms_norm_eps, self.compute_dtype)

    def _attention(self, x: Tensor, attention: Any, cos: Tensor, sin: Tensor) -> Tensor:
        config, dtype = self.config, self.compute_dtype
        batch, length, _ = x.shape
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        joint = torch.cat((attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight)).to(dtype)
        qkv = F.linear(x, joint).view(batch, length, heads + 2 * kv_heads, config.head_dim)
        qk, v = qkv.split((heads + kv_heads, kv_heads), dim=2)
        scale = torch.cat((attention.q_norm.weight.expand(heads, -1), attention.k_norm.weight.expand(kv_heads, -1)))
        qk = norm_and_rotate(qk, scale, cos, sin, config.rms_norm_eps)
        q, k = qk.transpose(1, 2).split((heads, kv_heads), dim=1)
        repeats = heads // kv_heads
        k = k.repeat_interleave(repeats, dim=1)
        v = v.transpose(1, 2).repeat_interleave(repeats, dim=1)
        mixed = AttentionFunction.apply(*((t.flatten(0, 1)) for t in (q * config.head_dim**-0.5, k, v))).view_as(q)
        return F.linear(mixed.transpose(1, 2).reshape(batch, length, -1), attention.o_proj.weight.to(dtype))

    def _experts(self, x: Tensor, block: Any) -> tuple[Tensor, Tensor, Tensor]:
        config, dtype = self.config, self.compute_dtype
        flat = x.reshape(-1, x.shape[-1])
        probs = F.linear(flat.float(), block.gate.weight).softmax(-1)
        weight, index = probs.topk(config.num_experts_per_tok, dim=-1)
        if config.norm_topk_prob:
            weight = weight / weight.sum(-1, keepdim=True)
        counts = torch.bincount(index.reshape(-1), minlength=config.num_experts)
        share = counts / index.numel()
        balance = config.num_experts * (share * probs.mean(0)).sum()
        gate_up, down = block.experts.gate_up_proj.to(dtype), block.experts.down_proj.to(dtype)
        out = ExpertsFunction.apply(flat, index, weight.to(dtype), gate_up, down)
        return out.view_as(x), balance, counts

    def __call__(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """ids [B, S] -> logits [B, S, V] in the compute dtype, mean balance loss (1 = uniform), picks [layers, E]."""
        base = self.model.model
        x = base.embed_tokens(ids)
        cos, sin = base.rotary_emb(x, torch.arange(ids.shape[1], device=ids.device)[None])
        cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
        balances, counts = [], []
        for layer in base.layers:
            normed = self._norm(x, layer.input_layernorm.weight)
            x = x + self._attention(normed, layer.self_attn, cos, sin)
            normed = self._norm(x, layer.post_attention_layernorm.weight)
            out, balance, count = self._experts(normed, layer.mlp)
            x = x + out
            balances.append(balance)
            counts.append(count)
        normed = self._norm(x, base.norm.weight)
        logits = F.linear(normed, self.model.lm_head.weight.to(self.compute_dtype))
        return logits, torch.stack(balances).mean(), torch.stack(counts)


@torch.no_grad()
def max_difference(model: Any, ids: Tensor) -> float:
    """Largest absolute difference of the fast forward's logits from the model's own, both in float32; ids [B, S]."""
    was_training = model.training
    model.eval()
    own = model(ids, use_cache=False).logits
    fast = FastForward(model, torch.float32)(ids)[0]
    model.train(was_training)
    return float((own - fast).abs().max())
