"""Verification: the target reads each row's newest token and the drafted ones behind it in one
pass, and what its sampling parameters accept is kept, with one token more.

Nothing of it changes what the target says: at temperature 0, and for drafts that nothing was drawn
for, tokens are those of plain decoding; otherwise their distribution is (see accept.py). On the
device alone, without a branch on a tensor: it can be captured.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from gptfast.runner import ModelRunner
from gptfast.sampling import Plan
from gptfast.speculation.accept import accept_by_rejection, accept_equal


class Verifier:
    """The target's side of a round, over the rows of its runner."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner

    def __call__(
        self, drafted: Tensor, distributions: Tensor | None, plan: Plan
    ) -> tuple[Tensor, Tensor]:
        """drafted [B, k], -1 for none, and the distributions [B, k, V] that they were drawn from,
        or None -> packed [B, 1 + k + 1]: the number of new tokens of each row, 0 where it is idle,
        then these; and logits [B, k + 1, V]. Rows advance by their new tokens, up to their limit.
        """
        runner, spare = self._runner, self._runner.cache.max_seq_len
        last = runner.positions  # [B, 1]
        active = last < spare
        steps = torch.arange(drafted.size(1) + 1, device=drafted.device)
        tokens = torch.cat((runner.tokens, drafted.clamp(min=0)), dim=1)
        places = torch.where(active, last + steps, spare).clamp(max=spare)
        runner.cache.lengths.add_(active[:, 0])
        logits, best = runner.main(tokens, places, runner.needs_logits(plan))
        new, num_accepted = self._chosen(drafted, distributions, logits, best, plan)
        # A plain step that was under way may have gone beyond the limit.
        room = (runner.limits - (last + 1)).clamp(min=0)
        count = torch.where(active, torch.minimum(num_accepted.unsqueeze(1) + 1, room), 0)  # [B, 1]
        self._keep(new, count, plan)
        return torch.cat((count, new), dim=1), logits

    def _chosen(
        self,
        drafted: Tensor,
        distributions: Tensor | None,
        logits: Tensor,
        best: Tensor | None,
        plan: Plan,
    ) -> tuple[Tensor, Tensor]:
        """New tokens [B, k + 1], and how many of them [B] are drafted ones that are accepted."""
        runner, state = self._runner, self._runner.sampling
        if distributions is not None:

            def odds(x: Tensor, _: Tensor) -> Tensor:
                return runner.probabilities(x.clone(), plan)

            each = self._at_each_place(drafted, logits, plan, odds)
            places = runner.positions + torch.arange(1, 1 + logits.size(1), device=logits.device)
            return accept_by_rejection(drafted, distributions, each, state.seed, places)
        if plan == "greedy" and best is not None:
            return best, accept_equal(drafted, best)

        def token(x: Tensor, positions: Tensor) -> Tensor:
            # A view of such a base, as a plain step passes it: one graph for both.
            return runner.draw(x.unsqueeze(1).clone()[:, 0], state, positions, plan)

        new = self._at_each_place(drafted, logits, plan, token)
        return new, accept_equal(drafted, new)

    def _at_each_place(
        self,
        drafted: Tensor,
        logits: Tensor,
        plan: Plan,
        choose: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        """`choose` of the logits [B, V] of each place, and the positions [B] of what it chooses,
        stacked [B, k + 1, ...]; the drafted tokens before a place stand in the output meanwhile.
        """
        state, last = self._runner.sampling, self._runner.positions[:, 0]
        tokens, once = drafted.clamp(min=0), torch.ones_like(last)  # behind a -1 nothing matters
        chosen = []
        for step in range(logits.size(1)):
            if plan == "full" and step > 0:
                state.count(tokens[:, step - 1], once)
            chosen.append(choose(logits[:, step], last + (1 + step)))
        if plan == "full":
            for step in range(drafted.size(1)):
                state.count(tokens[:, step], -once)
        return torch.stack(chosen, dim=1)

    def _keep(self, new: Tensor, count: Tensor, plan: Plan) -> None:
        """The first count [B, 1] of the new tokens [B, k + 1] become part of their rows."""
        runner = self._runner
        if plan == "full":
            for step in range(new.size(1)):
                runner.sampling.count(new[:, step], (step < count)[:, 0])
        # In these, entry `count` + 1 is the newest token now, and entry `count` the one before it.
        row = torch.cat((runner.previous, runner.tokens, new), dim=1)
        runner.previous.copy_(row.gather(1, count))
        runner.tokens.copy_(row.gather(1, count + 1))
        # The newest token is counted by the step that reads it.
        runner.cache.lengths.add_((count - 1).clamp(min=0)[:, 0])
        runner.positions.add_(count)
