"""Levels drawn by their losses: unbiased, alike in all processes, and the same after a resumption."""

import math
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ldm.errors import MismatchError, NumericError, UsageError
from ldm.models.diffusion.resample import (
    LossSecondMomentResampler,
    UniformSampler,
    create_named_schedule_sampler,
)

CHAIN = SimpleNamespace(num_timesteps=7)
SIZE = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5, 0.25, 0.0])  # root mean square loss of each level


def warm(history=3, **options):
    """A sampler with full histories: sizes times a pattern of mean square 1, after losses that fall out."""
    sampler = LossSecondMomentResampler(CHAIN, history_per_term=history, **options)
    pattern = [100.0, 0.0, math.sqrt(1.5), -math.sqrt(1.5)]
    for factor in pattern:
        sampler.update_with_local_losses(torch.arange(7), factor * SIZE)
    return sampler


def test_names_lead_to_samplers():
    assert type(create_named_schedule_sampler("uniform", CHAIN)) is UniformSampler
    made = create_named_schedule_sampler("loss-second-moment", CHAIN)
    assert type(made) is LossSecondMomentResampler
    assert (made.history_per_term, made.uniform_prob) == (10, 0.001)
    with pytest.raises(UsageError, match="'loss' is unknown; choose one of uniform, loss-second-moment"):
        create_named_schedule_sampler("loss", CHAIN)


def test_uniform_levels_are_numpy_s_and_weigh_1():
    np.random.seed(3)
    levels, weights = UniformSampler(CHAIN).sample(11, "cpu")
    np.random.seed(3)
    assert levels.tolist() == np.random.choice(7, size=(11,), p=np.full(7, 1 / 7)).tolist()
    assert levels.dtype == torch.int64 and weights.dtype == torch.float32
    torch.testing.assert_close(weights, torch.ones(11), rtol=0, atol=1e-6)


def test_levels_are_alike_until_every_history_is_full():
    sampler = LossSecondMomentResampler(CHAIN, history_per_term=2)
    sampler.update_with_local_losses(torch.arange(7), SIZE)
    sampler.update_with_local_losses(torch.arange(6), SIZE[:6])
    assert sampler.weights().tolist() == [1.0] * 7
    sampler.update_with_local_losses(torch.tensor([6]), torch.tensor([3.0]))
    assert np.ptp(sampler.weights()) > 0.1


def test_levels_are_drawn_by_the_root_mean_square_of_their_last_losses():
    """p ~ sqrt(E[L^2]) (Improved DDPM, Eq. 18), less the share that is uniform."""
    got = warm(uniform_prob=0.07).weights()
    want = 0.93 * (SIZE / SIZE.sum()).double().numpy() + 0.01
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-7)
    np.testing.assert_allclose(got.sum(), 1, rtol=0, atol=1e-12)


def test_weighted_losses_have_the_mean_of_uniform_levels():
    """Unbiased: each level's weight is the inverse of how much more often it comes."""
    sampler = warm(uniform_prob=0.07)
    p = sampler.weights()
    np.random.seed(0)
    levels, weights = sampler.sample(20_000, "cpu")
    assert set(levels.tolist()) == set(range(7))
    # Exactly: sum over levels of p * weight * loss is the mean of the losses, whatever they are.
    by_level = np.array([weights[levels == t].double().mean().item() for t in range(7)])
    np.testing.assert_allclose(p * by_level, np.full(7, 1 / 7), rtol=1e-6, atol=0)
    # And as often as p says: five standard deviations of a count.
    counts = np.bincount(levels.numpy(), minlength=7)
    assert (np.abs(counts - 20_000 * p) < 5 * np.sqrt(20_000 * p)).all()
    loss = torch.tensor([3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0])
    drawn = weights * loss[levels]
    assert abs(drawn.mean() - loss.mean()) < 5 * drawn.std() / math.sqrt(20_000)


def test_no_losses_at_all_leave_levels_alike():
    sampler = LossSecondMomentResampler(CHAIN, history_per_term=1)
    sampler.update_with_local_losses(torch.arange(7), torch.zeros(7, requires_grad=True))
    assert sampler.weights().tolist() == [1.0] * 7


def train(sampler, steps):
    """Stand in for training: losses that depend on level and step."""
    seen = []
    for step in steps:
        levels, weights = sampler.sample(5, "cpu")
        sampler.update_with_local_losses(levels, 1 + levels.float() + 0.1 * step)
        seen += [levels.tolist(), weights.tolist()]
    return seen


def test_a_resumed_run_is_the_same_run(tmp_path):
    np.random.seed(1)
    sampler = LossSecondMomentResampler(CHAIN, history_per_term=3)
    train(sampler, range(40))
    torch.save(sampler.state_dict(), tmp_path / "sampler.pt")
    generator = np.random.get_state()
    going_on = train(sampler, range(40, 60))

    resumed = LossSecondMomentResampler(CHAIN, history_per_term=3)
    resumed.load_state_dict(torch.load(tmp_path / "sampler.pt", weights_only=True))
    np.random.set_state(generator)
    assert train(resumed, range(40, 60)) == going_on
    fresh = LossSecondMomentResampler(CHAIN, history_per_term=3)
    np.random.set_state(generator)
    assert train(fresh, range(40, 60)) != going_on


def test_a_state_is_a_copy():
    sampler = warm()
    before = sampler.weights()
    state = sampler.state_dict()
    other = LossSecondMomentResampler(CHAIN, history_per_term=3)
    other.load_state_dict(state)
    other.update_with_local_losses(torch.tensor([6]), torch.tensor([50.0]))
    assert np.array_equal(sampler.weights(), before) and not np.array_equal(other.weights(), before)
    sampler.update_with_local_losses(torch.tensor([6]), torch.tensor([50.0]))
    assert state["loss_history"][6].tolist() == [0.0, 0.0, 0.0]


def test_states_of_other_samplers_are_refused():
    state = warm().state_dict()
    with pytest.raises(MismatchError, match=r"\(7, 10\).*, got a state of .*\(7, 3\)"):
        LossSecondMomentResampler(CHAIN).load_state_dict(state)
    with pytest.raises(MismatchError, match=r"got a state of \{\}"):
        LossSecondMomentResampler(CHAIN).load_state_dict({})
    with pytest.raises(MismatchError, match="UniformSampler keeps no state, got loss_history, loss_counts"):
        UniformSampler(CHAIN).load_state_dict(state)
    uniform = UniformSampler(CHAIN)
    uniform.load_state_dict(uniform.state_dict())
    assert uniform.weights().tolist() == [1.0] * 7


def test_bad_losses_are_refused_before_they_spoil_the_draws():
    sampler = warm()
    before = sampler.weights()
    for levels, losses, error, message in (
        ([7], [1.0], UsageError, "levels should be from 0 to 6, got 7"),
        ([-1], [1.0], UsageError, "levels should be from 0 to 6, got -1"),
        ([3], [math.nan], NumericError, "takes finite numbers, got nan at level 3"),
        ([3, 4], [1.0], UsageError, r"as many losses, got shapes \(2,\) and \(1,\)"),
        ([[3, 4]], [[1.0, 2.0]], UsageError, r"got shapes \(1, 2\) and \(1, 2\)"),
    ):
        with pytest.raises(error, match=message):
            sampler.update_with_local_losses(torch.tensor(levels), torch.tensor(losses))
    assert np.array_equal(sampler.weights(), before)


def process(rank, folder):
    """One of two processes: batches of unlike sizes, then what the sampler has learnt."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    sampler = LossSecondMomentResampler(CHAIN, history_per_term=2)
    levels = torch.tensor([0, 1, 2, 3, 4, 5, 6, 3]) if rank == 0 else torch.tensor([6, 3, 0])
    for step in range(3):
        sampler.update_with_local_losses(levels, levels + 1.0 + 10 * rank + 100 * step)
    np.save(f"{folder}/{rank}.npy", sampler._loss_history)
    dist.destroy_process_group()


def test_all_processes_learn_from_all_losses_in_one_order(tmp_path):
    mp.start_processes(process, args=(str(tmp_path),), nprocs=2, start_method="fork")
    histories = [np.load(tmp_path / f"{rank}.npy") for rank in range(2)]
    assert np.array_equal(*histories)
    # Alone, with the first process's batch before the second's.
    alone = LossSecondMomentResampler(CHAIN, history_per_term=2)
    for step in range(3):
        for rank, levels in ((0, [0, 1, 2, 3, 4, 5, 6, 3]), (1, [6, 3, 0])):
            t = torch.tensor(levels)
            alone.update_with_local_losses(t, t + 1.0 + 10 * rank + 100 * step)
    assert np.array_equal(alone._loss_history, histories[0])
    assert alone._loss_history[3].tolist() == [204.0, 214.0]
