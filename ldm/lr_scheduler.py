"""Learning rates over a training run, as factors for torch's LambdaLR: warm-up, then cosine or line."""

import math
from collections.abc import Sequence

from ldm.errors import UsageError


class LambdaWarmUpCosineScheduler:
    """Warm up along a line, fall along a half cosine, stay at the minimum.

    The values are the rates themselves, so use it with a base learning rate of 1.0.

    Args:
        warm_up_steps: steps from lr_start to lr_max.
        lr_min: rate at max_decay_steps and after.
        lr_max: rate at the end of the warm-up.
        lr_start: rate at step 0.
        max_decay_steps: step at which the cosine ends, above warm_up_steps.
        verbosity_interval: kept for old configurations; nothing is printed.
    """

    def __init__(
        self,
        warm_up_steps: int,
        lr_min: float,
        lr_max: float,
        lr_start: float,
        max_decay_steps: int,
        verbosity_interval: int = 0,
    ):
        if not 0 <= warm_up_steps < max_decay_steps:
            raise UsageError(
                f"warm_up_steps should lie in [0, max_decay_steps), got {warm_up_steps} and {max_decay_steps}"
            )
        self.lr_warm_up_steps = warm_up_steps
        self.lr_start = lr_start
        self.lr_min = lr_min
        self.lr_max = lr_max
        self.lr_max_decay_steps = max_decay_steps
        self.last_lr = 0.0
        self.verbosity_interval = verbosity_interval

    def schedule(self, n: int, **kwargs: object) -> float:
        """Return the rate at step n."""
        if n < self.lr_warm_up_steps:
            self.last_lr = (self.lr_max - self.lr_start) / self.lr_warm_up_steps * n + self.lr_start
        else:
            t = (n - self.lr_warm_up_steps) / (self.lr_max_decay_steps - self.lr_warm_up_steps)
            falling = 0.5 * (1 + math.cos(min(t, 1.0) * math.pi))
            self.last_lr = self.lr_min + (self.lr_max - self.lr_min) * falling
        return self.last_lr

    def __call__(self, n: int, **kwargs: object) -> float:
        return self.schedule(n, **kwargs)


class LambdaWarmUpCosineScheduler2:
    """Repeat warm-up and cosine in cycles, each with its own numbers.

    The values are factors of the base learning rate.

    Args:
        warm_up_steps, f_min, f_max, f_start, cycle_lengths: one number a cycle; lengths in steps. The last
            cycle stays at its end once the run is longer than all of them.
        verbosity_interval: kept for old configurations; nothing is printed.
    """

    def __init__(
        self,
        warm_up_steps: Sequence[int],
        f_min: Sequence[float],
        f_max: Sequence[float],
        f_start: Sequence[float],
        cycle_lengths: Sequence[int],
        verbosity_interval: int = 0,
    ):
        lengths = [len(numbers) for numbers in (warm_up_steps, f_min, f_max, f_start, cycle_lengths)]
        if len(set(lengths)) != 1 or not lengths[0]:
            raise UsageError(
                "warm_up_steps, f_min, f_max, f_start and cycle_lengths need one number a cycle, "
                f"got {', '.join(map(str, lengths))}"
            )
        for warm_up, length in zip(warm_up_steps, cycle_lengths, strict=True):
            if not 0 <= warm_up < length:
                raise UsageError(f"a cycle of {length} steps cannot hold a warm-up of {warm_up}")
        self.lr_warm_up_steps = list(warm_up_steps)
        self.f_start = list(f_start)
        self.f_min = list(f_min)
        self.f_max = list(f_max)
        self.cycle_lengths = list(cycle_lengths)
        self.last_f = 0.0
        self.verbosity_interval = verbosity_interval

    def find_in_cycle(self, n: int) -> tuple[int, int]:
        """Return which cycle step n falls in, and which step of that cycle it is."""
        begin = 0
        for cycle, length in enumerate(self.cycle_lengths):
            if n <= begin + length:
                return cycle, n - begin
            begin += length
        return len(self.cycle_lengths) - 1, self.cycle_lengths[-1]

    def schedule(self, n: int, **kwargs: object) -> float:
        """Return the factor at step n."""
        cycle, n = self.find_in_cycle(n)
        warm_up = self.lr_warm_up_steps[cycle]
        if n < warm_up:
            start = self.f_start[cycle]
            self.last_f = (self.f_max[cycle] - start) / warm_up * n + start
        else:
            self.last_f = self.fall(cycle, n)
        return self.last_f

    def fall(self, cycle: int, n: int) -> float:
        """Return the factor after the warm-up: half a cosine from f_max to f_min."""
        warm_up = self.lr_warm_up_steps[cycle]
        t = min((n - warm_up) / (self.cycle_lengths[cycle] - warm_up), 1.0)
        return self.f_min[cycle] + 0.5 * (self.f_max[cycle] - self.f_min[cycle]) * (1 + math.cos(t * math.pi))

    def __call__(self, n: int, **kwargs: object) -> float:
        return self.schedule(n, **kwargs)


class LambdaLinearScheduler(LambdaWarmUpCosineScheduler2):
    """Warm up, then fall along a line from f_max towards f_min, as v1-inference.yaml asks.

    The line is measured over the whole cycle, warm-up included, so that a factor just after a long warm-up is
    already below f_max: the original's numbers, kept.
    """

    def fall(self, cycle: int, n: int) -> float:
        """Return the factor after the warm-up: f_min + (f_max - f_min) (length - n) / length."""
        length = self.cycle_lengths[cycle]
        return self.f_min[cycle] + (self.f_max[cycle] - self.f_min[cycle]) * (length - n) / length
