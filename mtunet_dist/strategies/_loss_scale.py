"""The loss scale of float16, where ``torch.amp.GradScaler`` cannot look at the gradients itself."""

from __future__ import annotations

import math


class LossScale:
    """``torch.amp.GradScaler``'s rule and its state's form, fed with somebody else's verdict on the gradients.

    While not ``enabled`` the value is 1 and the state empty.
    """

    growth_factor = 2.0
    backoff_factor = 0.5
    growth_interval = 2000

    def __init__(self, *, enabled: bool) -> None:
        self.enabled = enabled
        self.value = 65536.0 if enabled else 1.0
        self.good_steps = 0

    def update(self, *, overflow: bool) -> None:
        """After each step: shrink if its gradients overflowed, else grow after so many good ones."""
        if not self.enabled:
            return
        self.good_steps += 1
        if overflow:
            self.value *= self.backoff_factor
            self.good_steps = 0
        elif self.good_steps == self.growth_interval:
            if math.isfinite(self.value * self.growth_factor):
                self.value *= self.growth_factor
            self.good_steps = 0

    def state_dict(self) -> dict[str, float]:
        """As that of a GradScaler."""
        if not self.enabled:
            return {}
        return {
            "scale": self.value,
            "growth_factor": self.growth_factor,
            "backoff_factor": self.backoff_factor,
            "growth_interval": self.growth_interval,
            "_growth_tracker": self.good_steps,
        }

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore what ``state_dict`` returned."""
        if self.enabled:
            self.value, self.good_steps = state["scale"], int(state["_growth_tracker"])
