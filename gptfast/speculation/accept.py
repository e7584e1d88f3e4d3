"""Which drafted tokens stay, and which token follows them: the rule that makes speculation exact.

Knows token ids, distributions and random bits; knows nothing of models or requests. Row by row,
without a branch on a tensor or a host sync: one graph for each number k of drafted tokens.
"""

import torch
from torch import Tensor

from gptfast.sampling import draw, uniform

# `purpose` of the uniforms at one place of the text, beside sampling.PURPOSE_SAMPLE = 0. A place
# that was drafted in vain is drafted again with the same bits; nothing had been decided by them.
PURPOSE_DRAFT = 1
PURPOSE_ACCEPT = 2
PURPOSE_RESIDUAL = 3


def accept_equal(drafted: Tensor, sampled: Tensor) -> Tensor:
    """How many of the leading drafted [B, k] equal sampled [B, k+1] -> num_accepted [B].

    `sampled[b, j]` is what plain decoding draws behind the first j drafted tokens, with its own
    random bits. So the new text, `sampled[b, : num_accepted[b] + 1]`, is that of plain decoding. A
    drafted -1 stands for none and equals nothing.

    For greedy rows and for drafts that are not drawn (q is 1 at the drafted token). For those it is
    the rejection rule: a draw from p is the drafted token x with probability p(x) = p(x) / q(x),
    and otherwise a draw from p without x, which is the residual max(0, p - q).
    """
    equal = drafted == sampled[:, :-1]
    return equal.to(torch.int64).cumprod(-1).sum(-1)


def accept_by_rejection(
    drafted: Tensor, draft_probs: Tensor, target_probs: Tensor, seed: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """Leviathan et al. (2211.17192), Chen et al. (2302.01318): drafted [B, k] (k >= 1), drawn from
    draft_probs q [B, k, V], target_probs p [B, k+1, V] (float32), seed [B], and positions [B, k+1]
    of the new tokens in the text -> tokens [B, k+1], num_accepted [B].

    `tokens[b, : num_accepted[b] + 1]` is distributed as draws from p; what lies behind is a valid
    id and means nothing. Token x stays with probability min(1, p(x) / q(x)). The first that does
    not is replaced by a draw from max(0, p - q); if all stay, a draw from the last p follows. A
    drafted -1 stands for none: it never stays, and its q counts as zero.
    """
    k = drafted.shape[1]
    rows = torch.arange(drafted.shape[0], device=drafted.device)
    is_drafted = drafted >= 0
    ids = drafted.clamp(min=0)

    p = target_probs[:, :k].gather(-1, ids[..., None])[..., 0]  # [B, k]
    q = draft_probs.gather(-1, ids[..., None])[..., 0]
    u = uniform(seed[:, None], positions[:, :k], PURPOSE_ACCEPT)
    stays = (u.double() * q.double() < p.double()) & is_drafted  # exact: q = p always stays
    num_accepted = stays.to(torch.int64).cumprod(-1).sum(-1)

    place = num_accepted.clamp(max=k - 1)
    rejected = (num_accepted < k) & is_drafted[rows, place]
    p_last = target_probs[rows, num_accepted]  # [B, V]
    q_last = torch.where(rejected[:, None], draft_probs[rows, place], 0)
    residual = (p_last - q_last).clamp(min=0)
    # p and q that differ by rounding alone may leave nothing.
    odds = torch.where(residual.sum(-1, keepdim=True) > 0, residual, p_last)
    last = draw(odds, uniform(seed, positions[rows, num_accepted], PURPOSE_RESIDUAL))

    is_kept = torch.arange(k + 1, device=drafted.device) < num_accepted[:, None]
    tokens = torch.where(is_kept, torch.cat([ids, last[:, None]], -1), last[:, None])
    return tokens, num_accepted
