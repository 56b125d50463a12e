"""The step of torch's fused Adam and AdamW without the bookkeeping around it, which takes as long as a small net's step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks


class _Fused(torch.optim.Optimizer):
    """Goes to torch's fused kernel at once where nothing stands in the way; bit for bit the same."""

    kernel: Callable[..., Any]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step by the gradients in `.grad`."""
        if closure is not None or not self._plain():
            return super().step(closure)
        found = [self._gathered(group) for group in self.param_groups]
        if any(gathered is None for gathered in found):
            return super().step()
        with torch.no_grad():
            for group, gathered in zip(self.param_groups, found, strict=True):
                if not gathered:
                    continue
                leaves, gradients, means, squares, counts = gathered
                torch._foreach_add_(counts, 1)
                type(self).kernel(
                    leaves,
                    gradients,
                    means,
                    squares,
                    [],
                    counts,
                    lr=group["lr"],
                    beta1=group["betas"][0],
                    beta2=group["betas"][1],
                    weight_decay=group["weight_decay"],
                    eps=group["eps"],
                    amsgrad=False,
                    maximize=group["maximize"],
                )
        return None

    def _plain(self) -> bool:
        """Whether no hook waits for a step, and no flag decides whether one is taken."""
        hooks = (self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks)
        skips = getattr(self, "found_inf", None) is not None or getattr(self, "grad_scale", None) is not None
        return not (skips or any(hooks) or _global_optimizer_pre_hooks or _global_optimizer_post_hooks)

    def _gathered(self, group: dict[str, Any]) -> list[list[Tensor]] | None:
        """What the kernel takes of a group, nothing where there are no gradients; None for what is torch's to sort out."""
        numbers = (group["lr"], *group["betas"])
        if not group["fused"] or group["amsgrad"] or any(isinstance(number, Tensor) for number in numbers):
            return None
        leaves = [leaf for leaf in group["params"] if leaf.grad is not None]
        states = [self.state[leaf] for leaf in leaves]
        if len({(leaf.dtype, leaf.device) for leaf in leaves}) > 1 or not all(states):
            return None
        if any(leaf.is_complex() or leaf.grad.is_sparse for leaf in leaves):  # type: ignore[union-attr]
            return None
        moments = [[state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step")]
        return [leaves, [leaf.grad for leaf in leaves], *moments] if leaves else []  # type: ignore[list-item]


class FusedAdam(_Fused, torch.optim.Adam):
    """Adam."""

    kernel = torch._fused_adam_


class FusedAdamW(_Fused, torch.optim.AdamW):
    """AdamW, whose weight decay is no part of the gradient."""

    kernel = torch._fused_adamw_
