"""Philox, the counter-based generator of NVIDIA's GPUs, and the normal numbers that torch.randn draws with it there."""

import numpy as np

# Multipliers and Weyl increments of Philox4x32: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (SC11).
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
INCREMENTS = (0x9E3779B9, 0xBB67AE85)
LOW = np.uint64(0xFFFFFFFF)

# 2^-32 and 2 pi 2^-32 as cuRAND has them: float32.
PER_UNIT = np.float64(np.float32(2.3283064e-10))
PER_TURN = np.float64(np.float32(2.3283064e-10 * 6.2831855))


def philox4x32(counter: np.ndarray, key: tuple[int, int], rounds: int = 10) -> np.ndarray:
    """Turn counters into random bits.

    Args:
        counter: (4, n) uint32.
        key: two numbers of 32 bits.

    Returns:
        (4, n) uint32.
    """
    a, b, c, d = counter.astype(np.uint64)
    k0, k1 = key
    for _ in range(rounds):
        first, second = a * np.uint64(MULTIPLIERS[0]), c * np.uint64(MULTIPLIERS[1])
        a, b, c, d = (
            (second >> np.uint64(32)) ^ b ^ np.uint64(k0),
            second & LOW,
            (first >> np.uint64(32)) ^ d ^ np.uint64(k1),
            first & LOW,
        )
        k0, k1 = (k0 + INCREMENTS[0]) % 2**32, (k1 + INCREMENTS[1]) % 2**32
    return np.stack([a, b, c, d]).astype(np.uint32)


def cuda_normal(seed: int, draw: int, count: int) -> np.ndarray:
    """Draw what the draw-th torch.randn(count) after torch.cuda.manual_seed(seed) draws on a GPU.

    As A1111 imitates it ("RNG: NV"): a GPU thread for each number, with the thread's number and the draw's in the
    counter and the seed as key, and the first of the two numbers of the Box-Muller transform. It is worked out in
    float64, so that a number differs from the GPU's own by a few of float32's last bits. A GPU with fewer threads than
    `count` (2048 for each multiprocessor, so none below 65536 numbers on 32 of them) gives the numbers beyond to its
    threads again; that is not imitated, as it is not in A1111.

    Args:
        seed: 0 to 2^64 - 1, all bits of it count.
        draw: 0 for the first.

    Returns:
        (count,) float32.
    """
    counter = np.zeros((4, count), dtype=np.uint32)
    counter[0], counter[2] = draw, np.arange(count)
    x, y, _, _ = philox4x32(counter, (seed % 2**32, seed >> 32))
    u, angle = x * PER_UNIT + PER_UNIT / 2, y * PER_TURN + PER_TURN / 2
    return (np.sqrt(-2 * np.log(u)) * np.sin(angle)).astype(np.float32)
