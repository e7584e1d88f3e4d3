"""Mixture of experts: a router that chooses for every token, and gated MLPs that only the chosen
tokens go through.

Letters: N tokens, E experts, A active ones of a token, P = N * A pairs of token and expert.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptfast.config import ExpertsConfig, ModelConfig
from gptfast.layers import GatedMLP, gated
from gptfast.parallel import ALONE, Group
from quantize.grouped import GroupedLinear


class Experts(nn.Module):
    """The MLP of a block in a mixture of experts, its shared expert included. In a group of several
    ranks, its part of the sum that comes out: some hidden units of every expert, or all of some.
    """

    def __init__(self, config: ModelConfig, group: Group = ALONE) -> None:
        super().__init__()
        assert config.experts is not None
        facts = config.experts
        self.router = Router(config.dim, facts)
        every = range(facts.num_experts)
        self.here = group.share(facts.num_experts) if group.by_expert else every
        dim, hidden, num_here = config.dim, facts.hidden_dim, len(self.here)
        self.expert_gate_up = GroupedLinear(num_here, dim, 2 * hidden, facts.bias)
        self.expert_down = GroupedLinear(num_here, hidden, dim, facts.bias)
        self.activation, self.limit = config.activation, config.swiglu_limit
        shared = facts.shared_hidden_dim
        self.shared = GatedMLP(config, shared) if shared else None
        self.shared_gate = nn.Linear(config.dim, 1, bias=False) if facts.shared_gate else None

    def forward(self, x: Tensor, is_padding: Tensor | None = None) -> Tensor:
        """x [B, T, dim], is_padding [B, T] -> [B, T, dim]. Padding goes to no expert, so that idle
        rows read no weights; nor does what others' experts are for.
        """
        flat = x.flatten(0, -2)  # [N, dim]
        weights, chosen = self.router(flat)  # [N, A]
        nowhere = None if is_padding is None else is_padding.reshape(-1, 1)
        if len(self.here) < self.router.facts.num_experts:
            elsewhere = (chosen < self.here.start) | (chosen >= self.here.stop)
            nowhere = elsewhere if nowhere is None else nowhere | elsewhere
            chosen = chosen - self.here.start
        if nowhere is not None:
            chosen = chosen.masked_fill(nowhere, self.expert_gate_up.num_groups)
        groups, order = chosen.flatten().sort(stable=True)  # pairs, by expert [P]
        experts = torch.arange(self.expert_gate_up.num_groups, device=x.device)
        ends = torch.searchsorted(groups, experts, right=True)
        hidden = self.expert_gate_up(flat[order // chosen.size(1)], ends)
        gate, up = hidden.chunk(2, dim=-1)
        hidden = gated(gate, up, self.activation, self.limit)
        # Back to the order of tokens: each sums its own pairs, alone as in a batch.
        y = self.expert_down(hidden, ends)  # [P, dim]
        pairs = torch.empty_like(y).index_copy(0, order, y).unflatten(0, chosen.shape)
        if nowhere is not None:
            pairs = pairs.masked_fill(nowhere.unsqueeze(-1), 0)
        y = (pairs * weights.unsqueeze(-1).to(x.dtype)).sum(1)
        if self.shared is not None:
            shared = self.shared(flat)
            if self.shared_gate is not None:
                shared = self.shared_gate(flat).sigmoid() * shared
            y = y + shared
        return y.view(x.shape)


class Router(nn.Module):
    """Chooses experts, by the rules of `ExpertsConfig`, in float32."""

    def __init__(self, dim: int, facts: ExpertsConfig) -> None:
        super().__init__()
        self.facts = facts
        self.weight = nn.Parameter(torch.empty(facts.num_experts, dim))
        self.bias = nn.Parameter(torch.zeros(facts.num_experts)) if facts.router_bias else None
        correction = torch.zeros(facts.num_experts) if facts.correction_bias else None
        self.correction = nn.Parameter(correction) if correction is not None else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [N, dim] -> weights [N, A] float32, experts [N, A]."""
        facts = self.facts
        bias = None if self.bias is None else self.bias.float()
        scores = F.linear(x.float(), self.weight.float(), bias)  # [N, E]
        scores = scores.softmax(-1) if facts.score == "softmax" else scores.sigmoid()
        candidates = scores if self.correction is None else scores + self.correction.float()
        if facts.num_groups > 1:
            candidates = self._limited(candidates)
        chosen = candidates.topk(facts.num_active, dim=-1).indices
        weights = scores.gather(1, chosen)
        if facts.normalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * facts.scale, chosen

    def _limited(self, scores: Tensor) -> Tensor:
        """Scores [N, E] with those outside the best groups at -inf."""
        facts = self.facts
        groups = scores.unflatten(-1, (facts.num_groups, -1))  # [N, groups, E / groups]
        num_best = 1 if facts.group_score == "best" else min(2, groups.size(-1))
        totals = groups.topk(num_best, dim=-1).values.sum(-1)
        best = totals.topk(facts.num_active_groups, dim=-1).indices
        outside = torch.ones_like(totals, dtype=torch.bool).scatter(1, best, False)
        return groups.masked_fill(outside.unsqueeze(-1), -torch.inf).flatten(1)
