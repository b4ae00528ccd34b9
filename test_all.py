"""Evidence that the other files do what they say: python test_all.py (or pytest test_all.py).

Every claim is compared with something this project did not write: closed forms, brute force in
float64, numpy, files built byte by byte. No network. `python test_all.py NAME` runs the tests
whose names contain NAME; --long takes its time (20 kills instead of 2).
"""
import argparse
import contextlib
import functools
import gzip
import hashlib
import http.client
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import traceback
import tracemalloc
import types
import unittest.mock
import urllib.request
import zlib
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("TEST_CUDA", "")  # exact claims: on the CPU
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

import autoencoder
import data
import nf_denoiser
import noise
import sample
import schedule
import train

patched = unittest.mock.patch.multiple  # sets attributes for the length of a `with`
HERE = Path(__file__).resolve().parent
LONG = "--long" in sys.argv
nf_denoiser.SIZES["small"] = dict(  # in this process
    num_latents=None, latent_dim=32, num_fourier_feats=8, num_blocks=1, num_heads=2, dropout=0.5,
    widths=(8, 8))


@contextlib.contextmanager
def folder():
    """A new folder, which is the current one (of data and out, too) for the length of a `with`."""
    with tempfile.TemporaryDirectory() as path, contextlib.chdir(path):
        yield Path(path)


def raises(kind, call, *words):
    """The call must raise `kind`, with every word in the message."""
    with unittest.TestCase().assertRaises(kind) as caught:
        call()
    for word in words:
        assert str(word) in str(caught.exception), f"{word!r} is not in {caught.exception}"


def close(a, b, tolerance):
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (a, b))
    assert a.shape == b.shape or b.dim() == 0, f"shapes {tuple(a.shape)} and {tuple(b.shape)}"
    worst = (a - b).abs().max().item()
    assert worst <= tolerance, f"differ by {worst:.3g}, more than {tolerance:.3g}"


def quiet(call, *arguments):
    """The call's result and what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        return call(*arguments), out.getvalue()


def run(module, line):
    """Run a script's main() in this process as a shell would: (exit code, stdout, stderr)."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with patched(sys, argv=[module.__name__ + ".py", *line.split()], stdout=out, stderr=err):
        try:
            data.run(module.main)
        except SystemExit as stop:
            code = stop.code or 0
    if isinstance(code, str):  # Python prints it and exits with 1
        return 1, out.getvalue(), err.getvalue() + code + "\n"
    return code, out.getvalue(), err.getvalue()


def works(module, line):
    """Run a script, which must end with exit code 0. Returns what it printed."""
    code, out, err = run(module, line)
    assert code == 0, (line, err)
    return out


def refused(module, line, *words):
    """The script must end with exit code 1 and one line that has every word in it."""
    code, _, err = run(module, line)
    assert code == 1 and err.startswith("error: ") and err.count("\n") == 1, (line, err)
    assert all(str(word) in err for word in words), err


@functools.cache
def tiny_images():
    return data.make_leaves(112, 11)[0].flatten(1).numpy(), *data.make_glyphs(384, 11)


@contextlib.contextmanager
def tiny_sets(place="data"):
    """A folder with 80 + 32 images in the CIFAR-10 format and 320 + 64 in that of MNIST in it."""
    with folder() as root:
        cifar, mnist = root / place / "cifar-10-batches-bin", root / place / "MNIST/raw"
        cifar.mkdir(parents=True)
        mnist.mkdir(parents=True)
        images, digits, labels = (np.asarray(x) for x in tiny_images())
        rows = np.concatenate([np.zeros((112, 1), np.uint8), images], 1)
        names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
        for name, part in zip(names, np.split(rows, [16, 32, 48, 64, 80])):
            (cifar / name).write_bytes(part.tobytes())
        for prefix, part in (("train", slice(320)), ("t10k", slice(320, None))):
            (mnist / f"{prefix}-images-idx3-ubyte").write_bytes(idx(digits[part, 0]))
            (mnist / f"{prefix}-labels-idx1-ubyte").write_bytes(idx(labels[part]))
        yield root


def mutated(content, rng):
    """One random accident: bytes changed, cut off, cut out, doubled, or zeros."""
    at, length, kind = int(rng.integers(len(content))), int(rng.integers(1, 400)), rng.integers(5)
    before, after = content[:at], content[at + length:]
    if kind == 0:
        few = min(length % 8 + 1, len(content) - at)
        return before + rng.bytes(few) + content[at + few:]
    return (before, before + after, content[:at + length] + content[at:],
            before + bytes(length) + after)[kind - 1]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@contextlib.contextmanager
def spied(owner, name):
    """A list that gets (arguments, keywords) of each call of owner.name within the `with`."""
    original, calls = getattr(owner, name), []

    def spy(*given, **options):
        calls.append((given, options))
        return original(*given, **options)

    with patched(owner, **{name: spy}):
        yield calls


# -------------------------------------------------------------------------------------- schedule

DDPM_BETAS = np.linspace(0.0001, 0.02, 1000)


def cosine_betas(T, s=0.008):
    """Improved DDPM, eq. 17, one timestep at a time."""
    betas = []
    for t in range(T):
        bar = math.cos((t / T + s) / (1 + s) * math.pi / 2) ** 2
        bar_next = math.cos(((t + 1) / T + s) / (1 + s) * math.pi / 2) ** 2
        beta = 1 - bar_next / bar
        betas.append(min(max(beta, 0.0001), 0.9999))
    return np.array(betas)


def x_t_x_0_and_noise(shape, dtype=torch.float64):
    return torch.randn(3, *shape, generator=seeded(1), dtype=dtype)


def test_cosine_betas_against_numpy():
    for T in (1, 2, 37, 1000, 10_000):
        betas = schedule.cosine_beta_schedule(T)
        assert betas.dtype == torch.float64
        close(betas, cosine_betas(T), 1e-12)
    close(schedule.cosine_beta_schedule(50, s=0.1), cosine_betas(50, s=0.1), 1e-12)


def test_linear_betas_are_scaled_with_T_and_stay_below_1():
    assert schedule.linear_beta_schedule(1000).dtype == torch.float64
    for T, first, last in ((1000, 0.0001, 0.02), (100, 0.001, 0.2), (10_000, 1e-5, 0.002)):
        betas = schedule.linear_beta_schedule(T)
        close(betas, np.linspace(first, last, T), 1e-12)
    betas = schedule.linear_beta_schedule(1000, 0.1, 0.3)
    close(betas, np.linspace(0.1, 0.3, 1000), 1e-12)
    assert schedule.linear_beta_schedule(10).max() == 0.9999


def test_schedules_refuse_nonsense():
    for make in (schedule.cosine_beta_schedule, schedule.linear_beta_schedule):
        for wrong in (0, -3, 10_001):
            raises(ValueError, lambda: make(wrong), f"got {wrong}")
    for ends in ((0.1, 1), (0, 0.1), (math.nan, 0.1)):
        raises(ValueError, lambda: schedule.linear_beta_schedule(10, *ends), ends[0])
    raises(ValueError, lambda: schedule.DiffusionSchedule(10, "sqrt"), "sqrt")


def test_the_ten_constants_against_numpy():
    for name, beta in (("linear", DDPM_BETAS), ("cosine", cosine_betas(1000))):
        s = schedule.DiffusionSchedule(1000, name)
        bar = np.cumprod(1 - beta)
        prev = np.append(1, bar[:-1])
        posterior = beta * (1 - prev) / (1 - bar)
        for constant, expected in (
                (s.betas, beta),
                (s.alphas, 1 - beta),
                (s.alphas_cumprod, bar),
                (s.alphas_cumprod_prev, prev),
                (s.sqrt_alphas_cumprod, np.sqrt(bar)),
                (s.sqrt_one_minus_alphas_cumprod, np.sqrt(1 - bar)),
                (s.sqrt_recip_alphas_cumprod, np.sqrt(1 / bar)),
                (s.sqrt_recipm1_alphas_cumprod, np.sqrt(1 / bar - 1)),
                (s.posterior_variance, posterior),
                (s.posterior_log_variance, np.log(np.maximum(posterior, 1e-20)))):
            assert constant.dtype == torch.float64
            assert np.allclose(constant, expected, 1e-8, 1e-13)


def test_a_thousand_cosine_timesteps_are_the_default():
    s = schedule.DiffusionSchedule()
    assert s.timesteps == 1000
    close(s.betas, cosine_betas(1000), 1e-12)
    assert schedule.DiffusionSchedule(timesteps=37, beta_schedule="linear").timesteps == 37


def test_to_moves_every_constant_and_mps_gets_float32():
    s = schedule.DiffusionSchedule(20)
    moves = []

    def fake_move(self, device, dtype):
        moves.append((device, dtype))
        return self

    with patched(torch.Tensor, to=fake_move):
        assert s.to("mps") is s
    assert len(moves) >= 10 and set(moves) == {("mps", torch.float32)}
    assert s.to(torch.device("meta")) is s
    constants = [v for v in vars(s).values() if isinstance(v, torch.Tensor)]
    assert len(constants) == len(moves)
    for constant in constants:
        assert constant.is_meta and constant.dtype == torch.float64


def test_sampling_timesteps_go_evenly_from_the_last_to_0():
    s = schedule.DiffusionSchedule(37)
    for n in range(1, 38):
        timesteps = s.sampling_timesteps(n)
        assert timesteps.dtype == torch.int64
        close(timesteps, np.linspace(36, 0, n), 0.5)
        assert (timesteps.diff() < 0).all()
    for n in (0, 38, -1):
        raises(ValueError, lambda: s.sampling_timesteps(n), 37, n)


def test_q_sample_and_predict_eps_are_inverse():
    for name in ("cosine", "linear"):
        s = schedule.DiffusionSchedule(100, name)
        _, x_0, eps = x_t_x_0_and_noise((50,))
        for t in (0, 1, 40, 99):
            bar = s.alphas_cumprod[t]
            x_t = s.q_sample(x_0, t, eps)
            close(x_t, bar.sqrt() * x_0 + (1 - bar).sqrt() * eps, 1e-12)
            close(s.predict_eps(x_t, t, x_0), eps, 1e-9)


def every_step(s):
    return (lambda x_t, x_0, t, eps: s.q_sample(x_0, t, eps),
            lambda x_t, x_0, t, eps: s.predict_eps(x_t, t, x_0),
            lambda x_t, x_0, t, eps: s.ddim_step(x_t, x_0, t, t - 2, 0.7, eps),
            lambda x_t, x_0, t, eps: s.ddpm_step(x_t, x_0, t, eps))


def test_each_item_can_have_a_timestep_int_or_float():
    for step in every_step(schedule.DiffusionSchedule(100)):
        for shape in ((3,), (3, 5, 2), (3, 3, 4, 4)):
            items = x_t_x_0_and_noise(shape)
            x_t, x_0, eps = items
            t = torch.tensor([3, 50, 99])
            together = step(x_t, x_0, t, eps)
            assert together.equal(step(x_t, x_0, t.float(), eps))
            assert together.equal(step(x_t, x_0, t + 0.9, eps))  # rounded down
            for i in range(3):
                x_t, x_0, eps = items[:, i:i + 1]
                alone = step(x_t, x_0, int(t[i]), eps)
                close(alone, together[i:i + 1], 1e-11)


def test_steps_keep_the_dtype_and_their_arguments():
    for step in every_step(schedule.DiffusionSchedule(100)):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            arguments = x_t_x_0_and_noise((3, 5), dtype)
            x_t, x_0, eps = arguments.clone()
            for t in (7, torch.tensor([3, 50, 99])):
                assert step(x_t, x_0, t, eps).dtype == dtype
            assert torch.equal(arguments, torch.stack([x_t, x_0, eps]))


def test_steps_refuse_timesteps_out_of_range():
    s = schedule.DiffusionSchedule(100)
    x_t, x_0, eps = x_t_x_0_and_noise((3,))
    for step in every_step(s):
        for wrong in (-1, 100):
            raises(IndexError, lambda: step(x_t, x_0, wrong, eps), 100)
    raises(IndexError, lambda: s.ddim_step(x_t, x_0, 5, -2))


def test_ddpm_posterior_against_brute_force_bayes():
    """q(x_{t-1} | x_t, x_0) is q(x_t | x_{t-1}) q(x_{t-1} | x_0), integrated on a fine grid."""
    s = schedule.DiffusionSchedule(50)
    beta = cosine_betas(50)
    bar = np.cumprod(1 - beta)
    grid = np.linspace(-8, 8, 200_001)  # of x_{t-1}
    one = torch.ones(1).double()
    for t, x_0, x_t in ((1, 0.5, 0.2), (10, -0.8, 1.1), (30, 0.3, -1.7), (48, 0.9, 0.4)):
        forward = (x_t - math.sqrt(1 - beta[t]) * grid) ** 2 / beta[t]
        prior = (grid - math.sqrt(bar[t - 1]) * x_0) ** 2 / (1 - bar[t - 1])
        weights = np.exp(-(forward + prior) / 2)
        weights /= weights.sum()
        mean = (weights * grid).sum()
        std = math.sqrt((weights * (grid - mean) ** 2).sum())
        for eps in (0, 1):
            drawn = s.ddpm_step(x_t * one, x_0 * one, t, eps * one)
            close(drawn, mean + eps * std, 1e-6)
    close(s.ddpm_step(x_t * one, 0.9 * one, 0), 0.9, 1e-9)  # the last step has no noise


def test_ddim_with_eta_1_is_ddpm():
    for name in ("cosine", "linear"):
        s = schedule.DiffusionSchedule(100, name)
        x_t, x_0, eps = x_t_x_0_and_noise((50,))
        for t in (0, 1, 2, 40, 98, 99):
            ddim = s.ddim_step(x_t, x_0, t, t - 1, 1.0, eps)
            close(ddim, s.ddpm_step(x_t, x_0, t, eps), 1e-9)


def test_ddim_step_written_out():
    """Eq. 12 and 16 of DDIM, for neighbours and for jumps; timestep -1 is clean data."""
    s = schedule.DiffusionSchedule(100)
    x_t, x_0, new = x_t_x_0_and_noise((2, 20))
    bars = [*s.alphas_cumprod.tolist(), 1.0]  # bars[-1] is that of clean data
    for t, t_next in ((99, 98), (99, 0), (60, 29), (1, 0), (40, -1), (0, -1)):
        bar, bar_next = bars[t], bars[t_next]
        eps = (x_t - bar**0.5 * x_0) / (1 - bar) ** 0.5
        for eta in (0.0, 0.5, 1.0):
            variance = (1 - bar_next) / (1 - bar) * (1 - bar / bar_next)
            sigma = eta * variance**0.5
            old = max(1 - bar_next - sigma**2, 0) ** 0.5
            expected = bar_next**0.5 * x_0 + old * eps + sigma * new
            got = s.ddim_step(x_t, x_0, t, t_next, eta, new)
            close(got, expected, 1e-9)


def test_in_one_batch_some_items_can_reach_clean_data():
    s = schedule.DiffusionSchedule(100)
    x_t, x_0, new = x_t_x_0_and_noise((2, 20))
    t, t_next = torch.tensor([[5, 60], [-1, 29]])
    together = s.ddim_step(x_t, x_0, t, t_next, 0.5, new)
    close(together[0], x_0[0], 1e-12)
    alone = s.ddim_step(x_t, x_0, 60, 29, 0.5, new)
    close(together[1], alone[1], 1e-9)


def test_every_ddim_step_keeps_the_marginal():
    """Given the true x_0, x_30 has the mean and variance of q(x_30 | x_0), whatever eta is."""
    s = schedule.DiffusionSchedule(100)
    x_0, eps, new = torch.randn(3, 200_000, generator=seeded(2))
    x_t = s.q_sample(x_0, 70, eps)
    bar = s.alphas_cumprod[30]
    for eta in (0.0, 0.5, 1.0):
        for noise in (new, None):
            x_30 = s.ddim_step(x_t, x_0, 70, 30, eta, noise)
            rest = x_30 - bar.sqrt() * x_0
            close(rest.mean(), 0, 0.006)
            close(rest.var(), 1 - bar, 0.006)


def test_a_step_draws_its_own_noise_if_none_is_given():
    s = schedule.DiffusionSchedule(100)
    x_t, x_0, _ = x_t_x_0_and_noise((200_000,), torch.float32)
    variance = s.posterior_variance[70]
    first, second = (s.ddpm_step(x_t, x_0, 70) for _ in range(2))
    close((first - second).var(), 2 * variance, 0.001)
    first, second = (s.ddim_step(x_t, x_0, 70, 69, 0.5) for _ in range(2))
    close((first - second).var(), 2 * 0.25 * variance, 0.001)
    first, second = (s.ddim_step(x_t, x_0, 70, 69) for _ in range(2))  # eta is 0 by default
    assert torch.equal(first, second)


# -------------------------------------------------------------------------------------- samplers


def exact_denoiser(sched, mean, std):
    """E[x_0 | x_t] for data ~ N(mean, std^2)."""
    def denoise(x_t, t):
        bar = sched.alphas_cumprod[t].view(-1, 1).float()
        gain = std**2 * bar.sqrt() / (bar * std**2 + 1 - bar)
        return mean + gain * (x_t - bar.sqrt() * mean)
    return denoise


def samples_of_all_steps(denoise, sched):
    x_T = torch.randn(4, 5000, generator=seeded())
    samples = [schedule.ddpm(denoise, sched, x_T, seeded(1))]
    for eta in (0.0, 0.5, 1.0):
        x_0 = schedule.ddim(denoise, sched, x_T, sched.timesteps, eta, seeded(1))
        samples.append(x_0)
    return samples


def test_samplers_recover_a_gaussian():
    """A right sampler turns an exact denoiser and N(0, I) into the data's mean and spread."""
    sched = schedule.DiffusionSchedule(500)
    denoise = exact_denoiser(sched, mean=0.4, std=0.3**0.5)
    for x_0 in samples_of_all_steps(denoise, sched):
        close(x_0.mean(), 0.4, 0.015)
        close(x_0.var(), 0.3, 0.015)


def test_fifty_steps_are_the_default_and_enough():
    sched = schedule.DiffusionSchedule(500)
    denoise = exact_denoiser(sched, mean=0.4, std=0.3**0.5)
    x_T = torch.randn(20_000, 1, generator=seeded())
    x_0 = schedule.ddim(denoise, sched, x_T)
    assert torch.equal(x_0, schedule.ddim(denoise, sched, x_T, num_steps=50, eta=0.0))
    close(x_0.mean(), 0.4, 0.03)
    close(x_0.var(), 0.3, 0.03)


def test_a_hundred_timesteps_recover_a_wide_gaussian():
    """Linear betas that do not grow with 1 / T leave signal in x_T, and end at 1.73, not 2."""
    for name in ("cosine", "linear"):
        sched = schedule.DiffusionSchedule(100, name)
        denoise = exact_denoiser(sched, mean=1.5, std=2.0)
        for x_0 in samples_of_all_steps(denoise, sched):
            close(x_0.mean(), 1.5, 0.05)
            close(x_0.std(), 2.0, 0.08)


def record(told):
    """An on_step that keeps what it is told."""
    def on_step(*step):
        told.append(step)
    return on_step


def nine_tenths_plus_t(x_t, t):
    """A denoiser that no sampler can confuse with another one, or t with another t."""
    return 0.9 * x_t + t.view(-1, 1, 1)


def test_ddim_written_out():
    sched = schedule.DiffusionSchedule(20)
    x_T = torch.randn(2, 5, 1, generator=seeded(1))
    for eta in (0.0, 0.5):
        told, g, x_t = [], seeded(), x_T
        got = schedule.ddim(nine_tenths_plus_t, sched, x_T, num_steps=4, eta=eta,
                            generator=seeded(), on_step=record(told))
        for t, t_next, step in zip((19, 13, 6, 0), (13, 6, 0, -1), told, strict=True):
            x_0 = 0.9 * x_t + t
            assert step[0] == t
            assert step[1].equal(x_t)
            assert step[2].equal(x_0)
            eps = torch.randn(2, 5, 1, generator=g)
            x_t = sched.ddim_step(x_t, x_0, t, t_next, eta, eps)
        assert got.equal(x_t)


def test_ddpm_written_out():
    sched = schedule.DiffusionSchedule(20)
    x_T = torch.randn(2, 5, 1, generator=seeded(1))
    told, g, x_t = [], seeded(), x_T
    got = schedule.ddpm(nine_tenths_plus_t, sched, x_T, generator=seeded(), on_step=record(told))
    for t, step in zip(range(19, -1, -1), told, strict=True):
        x_0 = 0.9 * x_t + t
        assert step[0] == t
        assert step[1].equal(x_t)
        assert step[2].equal(x_0)
        eps = torch.randn(2, 5, 1, generator=g)  # at t = 0 it is multiplied by 0
        x_t = sched.ddpm_step(x_t, x_0, t, eps)
    assert got.equal(x_t)


def test_samplers_give_one_int64_timestep_for_each_item():
    def denoise(x_t, t):
        assert t.dtype == torch.int64 and t.shape == (3,)
        assert (t == t[0]).all()
        return x_t

    sched = schedule.DiffusionSchedule(5)
    for shape in ((3,), (3, 7, 2), (3, 1, 8, 8)):
        x_T = torch.randn(shape)
        before = x_T.clone()
        for sampler in (schedule.ddim, schedule.ddpm):
            steps = dict(num_steps=5) if sampler is schedule.ddim else {}
            assert sampler(denoise, sched, x_T, **steps).shape == shape
            assert torch.equal(x_T, before)


def test_samples_require_no_grad():
    weight = torch.ones(1, requires_grad=True)
    sched = schedule.DiffusionSchedule(5)
    denoise = lambda x_t, t: weight * x_t
    assert not schedule.ddim(denoise, sched, torch.ones(2, 3), 2).requires_grad
    assert not schedule.ddpm(denoise, sched, torch.ones(2, 3)).requires_grad


def test_no_noise_is_drawn_that_nobody_needs():
    """eta = 0 draws none at all; DDPM none at t = 0."""
    sched = schedule.DiffusionSchedule(5)
    denoise = lambda x_t, t: 0.9 * x_t
    x_T = torch.randn(2, 3)
    g = seeded()
    schedule.ddim(denoise, sched, x_T, 5, 0.0, g)
    assert torch.equal(g.get_state(), seeded().get_state())
    torch.manual_seed(0)
    schedule.ddim(denoise, sched, x_T, 5)
    close(torch.rand(1), torch.rand(1, generator=seeded()), 0)
    expected = seeded()
    for _ in range(4):
        torch.randn(2, 3, generator=expected)
    schedule.ddpm(denoise, sched, x_T, g)
    assert torch.equal(g.get_state(), expected.get_state())


def test_a_generator_may_be_on_another_device():
    x = torch.empty(2, 3, device="meta", dtype=torch.float64)  # meta stands for a GPU
    with unittest.mock.patch("torch.randn", wraps=torch.randn) as drawn:
        noise_there = schedule.normal_like(x, seeded())
    assert drawn.call_args.kwargs["device"] == torch.device("cpu")
    assert noise_there.is_meta
    assert noise_there.shape == (2, 3) and noise_there.dtype == torch.float64


def test_ddim_refuses_nonsense():
    sched = schedule.DiffusionSchedule(20)
    denoise = lambda x_t, t: x_t
    for eta in (1.5, -0.1, math.nan):
        raises(ValueError, lambda: schedule.ddim(denoise, sched, torch.ones(1), 5, eta), eta)
    for num_steps in (0, 21):
        raises(ValueError, lambda: schedule.ddim(denoise, sched, torch.ones(1), num_steps), 20)


def test_the_documents_training_loop_for_schedules():
    """As in the notebook: T is schedule.timesteps, t is float, constants are indexed by hand."""
    sched = schedule.DiffusionSchedule(timesteps=1000, beta_schedule="cosine").to("cpu")
    B = 4
    output_values = torch.rand(B, 204, 3)
    t = torch.randint(0, sched.timesteps, (B,)).float()
    eps = torch.randn_like(output_values)
    sqrt_alpha_t = sched.sqrt_alphas_cumprod[t.long()].view(B, 1, 1)
    sqrt_one_minus_alpha_t = sched.sqrt_one_minus_alphas_cumprod[t.long()].view(B, 1, 1)
    noisy_output = sqrt_alpha_t * output_values + sqrt_one_minus_alpha_t * eps
    close(sched.q_sample(output_values, t, eps), noisy_output, 1e-6)


def test_the_picture_of_the_schedules():
    charts = []

    def line_chart(title, curves):
        charts.append(curves)
        return draw(title, curves)

    draw = data.line_chart
    with folder(), patched(data, line_chart=line_chart):
        printed = works(schedule, "")
        with Image.open("out/schedule.png") as picture:
            assert np.array_equal(picture, draw("alpha_bar_t", charts[0]))
        works(schedule, "--timesteps 50")
        works(schedule, "--out elsewhere")
        assert Path("elsewhere/schedule.png").exists()
    for curves, T in zip(charts, (1000, 50, 1000)):
        for name in ("cosine", "linear"):
            xs, ys = curves[name]
            assert list(xs) == list(range(T))
            bars = schedule.DiffusionSchedule(T, name).alphas_cumprod
            close(ys, bars, 1e-12)
    for name, line in zip(("cosine", "linear"), printed.splitlines()):
        bars = charts[0][name][1]
        assert line.startswith(name)
        assert f"from {bars[0]:.4f} down to {bars[-1]:.3g}" in line


# ----------------------------------------------------------------------------------------- noise

SIMPLE = (noise.add_gaussian_noise, noise.add_salt_pepper_noise, noise.add_masking_noise)
GREY = torch.full((100, 3, 40, 40), 0.5)


def shares(images):
    """How often the values 0, 0.5 and 1 occur."""
    return [(images == value).double().mean() for value in (0, 0.5, 1)]


def test_gaussian_noise_has_the_standard_deviation_asked_for_and_is_clamped():
    added = noise.add_gaussian_noise(GREY, 0.1, seeded()) - GREY
    close(added.mean(), 0, 0.001)
    close(added.std(), 0.1, 0.001)
    clamped = math.erfc(0.25 / math.sqrt(2)) / 2  # how often a normal exceeds 0.25
    strong = noise.add_gaussian_noise(GREY, 2.0, seeded())
    close(shares(strong), [clamped, 0, clamped], 0.004)


def test_salt_and_pepper_and_masking_hit_the_share_of_pixels_asked_for():
    salted = noise.add_salt_pepper_noise(GREY, 0.2, seeded())
    close(shares(salted), [0.1, 0.8, 0.1], 0.004)
    masked = noise.add_masking_noise(GREY, 0.3, seeded())
    close(shares(masked), [0.3, 0.7, 0], 0.004)
    for add in (noise.add_salt_pepper_noise, noise.add_masking_noise):
        assert 0.5 not in add(GREY, 1, seeded())


def test_a_tensor_gives_each_image_a_strength():
    strength = torch.tensor([0.0, 0.2, 1.0]).view(3, 1, 1, 1)
    stds = [0, 0.2, 0.42], [0, 0.224, 0.5], [0, 0.2, 0]
    for add, expected in zip(SIMPLE, stds):
        noisy = add(GREY[:3], strength, seeded())
        close(noisy.std((1, 2, 3)), expected, 0.015)


def test_the_simple_noises_written_out_with_their_defaults():
    """Figures rest on these streams: a normal for each value, or a uniform for each pixel."""
    for dtype in (torch.float32, torch.float64):
        images = torch.rand(4, 3, 8, 8, generator=seeded(1), dtype=dtype)
        eps = torch.randn(4, 3, 8, 8, generator=seeded(), dtype=dtype)
        u = torch.rand(4, 1, 8, 8, generator=seeded()).expand(4, 3, 8, 8)
        gaussian = (images + 0.3 * eps).clamp(0, 1)
        salt_pepper = images.clone()
        salt_pepper[u < 0.2] = 1
        salt_pepper[u < 0.1] = 0
        masking = images * (u >= 0.3)
        for add, expected in zip(SIMPLE, (gaussian, salt_pepper, masking)):
            assert add(images, generator=seeded()).equal(expected)
            torch.manual_seed(0)  # the global generator, if none is given
            assert add(images).equal(expected)


def test_only_in_a_batch_of_images_are_channels_hit_together():
    for add in SIMPLE:
        batch = add(GREY[:8], 0.4, seeded())
        together = torch.equal(batch, batch[:, :1].expand_as(batch))
        assert together == (add != noise.add_gaussian_noise)
        assert batch.unique(dim=0).shape == (8, 3, 40, 40)  # each image has noise of its own
        single = add(GREY[0], 0.4, seeded())
        for dim in range(3):  # without a batch dimension every value is hit on its own
            assert single.unique(dim=dim).shape == (3, 40, 40)


def test_mixed_noise_gives_each_image_a_kind_and_a_strength():
    grey = torch.full((1500, 1, 32, 32), 0.5)
    noisy = noise.add_mixed_noise(grey, seeded()).flatten(1)
    changed = (noisy != 0.5).float().mean(1)
    white = (noisy == 1).float().mean(1)
    deviation = (noisy - 0.5).abs().median(1).values
    gaussian = changed > 0.9
    salt_pepper = ~gaussian & (white > 0)
    masking = ~gaussian & (white == 0)
    level = torch.tensor([0.03, 0.25, 0.5, 0.75, 0.97])
    for chosen, strength, low, high in (
            (gaussian, deviation / 0.67449, 0.1, 0.5),  # the median of |N(0, 1)|
            (salt_pepper, changed, 0.05, 0.4),
            (masking, changed, 0.1, 0.6)):
        close(chosen.float().mean(), 1 / 3, 0.04)
        uniform = low + (high - low) * level
        close(strength[chosen].quantile(level), uniform, 0.035)


def test_mixed_noise_written_out():
    images = torch.rand(30, 3, 8, 8, generator=seeded(1))
    g = seeded()
    u = torch.rand(30, 1, 1, 1, generator=g)
    kinds = torch.randint(3, (30, 1, 1, 1), generator=g)
    candidates = [
        noise.add_gaussian_noise(images, 0.1 + 0.4 * u, g),
        noise.add_salt_pepper_noise(images, 0.05 + 0.35 * u, g),
        noise.add_masking_noise(images, 0.1 + 0.5 * u, g)]
    mixed = noise.add_mixed_noise(images, seeded())
    for i, kind in enumerate(kinds):
        assert torch.equal(mixed[i], candidates[kind][i])


def test_noise_keeps_shape_and_dtype_and_leaves_its_input_alone():
    for x in (torch.rand(16, 1, 28, 28), torch.rand(4, 50).double(), torch.rand(9, 5, 5)):
        before = x.clone()
        for add in (*SIMPLE, noise.add_mixed_noise):
            noisy = add(x, generator=seeded(1))
            assert x.equal(before)
            assert noisy.shape == x.shape
            assert noisy.dtype == x.dtype
            assert 0 <= noisy.min() and noisy.max() <= 1
            assert noisy.equal(add(x, generator=seeded(1)))
            assert not noisy.equal(add(x, generator=seeded(2)))
    for add in SIMPLE:
        assert add(x, 0.0).equal(x)
        assert add(x, 0.0) is not x


def test_noise_refuses_nonsense():
    x = torch.rand(2, 50)
    integers = (x * 255).byte()
    for add, highest in zip(SIMPLE, (1e6, 1, 1)):
        add(x, highest)
        one_of_two = torch.tensor([[0.1], [1.01 * highest]])
        for wrong in (-0.1, math.nan, 1.01 * highest, one_of_two):
            raises(ValueError, lambda: add(x, wrong), "must be 0 to")
        raises(ValueError, lambda: add(integers), "uint8")
    raises(ValueError, lambda: noise.add_mixed_noise(integers), "uint8")
    raises(ValueError, lambda: noise.add_mixed_noise(x[0]), "batch")


def test_the_documents_noise_loop():
    """Its trainer picks a function and a strength by name, and calls noise_fn(images, param)."""
    clean_images = torch.rand(5, 784)
    for noise_type in ("gaussian", "salt_pepper", "masking"):
        noise_fn, noise_param = noise.NOISES[noise_type]
        noisy_images = noise_fn(clean_images, noise_param)
        assert noisy_images.shape == (5, 784)
        by_name = getattr(noise, f"add_{noise_type}_noise")
        assert by_name(clean_images, generator=seeded()).equal(
            noise_fn(clean_images, noise_param, seeded()))


def test_the_picture_of_the_noises():
    """A row for each noise: the clean image, then five strengths with their PSNR below."""
    drawn = []

    def image_grid(rows, column_labels=(), row_labels=(), captions=None, zoom=4):
        drawn.append((rows, row_labels, captions))
        return draw(rows, column_labels, row_labels, captions, zoom)

    draw = data.image_grid
    with folder(), patched(data, image_grid=image_grid):
        works(noise, "")
        rows, labels, captions = drawn[0]
        with Image.open("out/noise.png") as picture:
            assert np.array_equal(picture, draw(rows, (), labels, captions))
        works(noise, "--out elsewhere")
        assert Path("elsewhere/noise.png").read_bytes() == Path("out/noise.png").read_bytes()
    assert labels == ["gaussian", "salt_pepper", "masking"] and len(rows) == 3
    for row, below, add in zip(rows, captions, SIMPLE):
        clean = row[0]
        assert below[0] == "clean" and 0.1 < clean.mean() < 0.3
        strengths = 0.1, 0.2, 0.3, 0.4, 0.5
        for image, text, strength in zip(row[1:], below[1:], strengths, strict=True):
            assert image.equal(add(clean[None], strength, seeded())[0])
            mse = np.mean((image.numpy() - clean.numpy()) ** 2)
            assert text == f"{strength}: {-10 * np.log10(mse):.1f} dB"


def test_psnr_is_in_decibels():
    close(noise.psnr(0.01), 20, 1e-9)
    close(noise.psnr(1.0), 0, 1e-9)
    close(noise.psnr(4.0), -6.0206, 1e-4)
    assert noise.psnr(0) == noise.psnr(1e-12) == 100


def test_ssim_of_images_of_one_colour():
    dark = torch.full((1, 1, 16, 16), 0.3)
    light = torch.full((1, 1, 16, 16), 0.7)
    close(noise.ssim(dark, dark), [1.0], 1e-9)
    luminance = (2 * 0.3 * 0.7 + 1e-4) / (0.3**2 + 0.7**2 + 1e-4)
    close(noise.ssim(dark, light), [luminance], 1e-6)


def ssim_of_one_window(p, q):
    """Wang et al. (2004), eq. 13, for two numpy arrays (11, 11)."""
    distance = np.arange(11) - 5.0
    gaussian = np.exp(-(distance**2) / (2 * 1.5**2))
    weights = np.outer(gaussian, gaussian)
    weights /= weights.sum()
    mean_p = (weights * p).sum()
    mean_q = (weights * q).sum()
    var_p = (weights * (p - mean_p) ** 2).sum()
    var_q = (weights * (q - mean_q) ** 2).sum()
    covariance = (weights * (p - mean_p) * (q - mean_q)).sum()
    luminance = (2 * mean_p * mean_q + 1e-4) / (mean_p**2 + mean_q**2 + 1e-4)
    structure = (2 * covariance + 9e-4) / (var_p + var_q + 9e-4)
    return luminance * structure


def test_ssim_is_the_mean_over_windows_and_channels():
    a, b = torch.rand(2, 2, 3, 14, 13, generator=seeded())
    p, q = a[1].double().numpy(), b[1].double().numpy()
    scores = []
    for channel in range(3):
        for y in range(4):
            for x in range(3):
                window = channel, slice(y, y + 11), slice(x, x + 11)
                scores.append(ssim_of_one_window(p[window], q[window]))
    both = noise.ssim(a, b)
    assert both.shape == (2,)
    close(both[1], np.mean(scores), 1e-9)
    close(noise.ssim(b[:1], a[:1]), both[:1], 1e-12)


def test_ssim_needs_two_batches_of_one_shape_of_at_least_11_by_11():
    noise.ssim(GREY[..., :11, :11], GREY[..., :11, :11])
    for small in (GREY[..., :10, :], GREY[..., :10]):
        raises(ValueError, lambda: noise.ssim(small, small), 11)
    raises(ValueError, lambda: noise.ssim(GREY, GREY[:1]), "one shape")


# ------------------------------------------------------------------------------------------ data


def bytes_(shape, high=256, seed=0):
    return np.random.default_rng(seed).integers(0, high, shape, dtype=np.uint8)


def records(count):
    return np.concatenate([bytes_((count, 1), 10), bytes_((count, 3072))], axis=1).tobytes()


def idx(array):
    return np.array([0x800 + array.ndim, *array.shape], ">u4").tobytes() + array.tobytes()


def write_mnist(raw, images=bytes_((6, 28, 28), 5), labels=bytes_(6, 10), prefix="t10k"):
    raw.mkdir(parents=True, exist_ok=True)
    paths = [raw / f"{prefix}-{name}-ubyte.gz" for name in ("images-idx3", "labels-idx1")]
    for path, array in zip(paths, (images, labels)):
        path.write_bytes(gzip.compress(idx(array)))
    return paths


def files_in(root):
    return [path for path in root.rglob("*") if not path.is_dir() or path.is_symlink()]


def pixels_of(picture):
    """A Pillow image, or the picture in a file, as integers that may become negative."""
    return np.asarray(picture if isinstance(picture, Image.Image) else Image.open(picture), int)


def save_png(name, *planes):
    """Write one grey plane, or several planes (H, W) or (H, W, C) beside each other, as a PNG."""
    pixels = planes[0] if len(planes) == 1 else np.dstack(planes)
    Image.fromarray(pixels.astype(np.uint8)).save(name)


def test_cifar10_is_read_as_documented():
    made = np.frombuffer(records(5), np.uint8).reshape(5, 3073)
    with folder() as root:
        batches = root / "cifar-10-batches-bin"
        batches.mkdir()
        for i, record in enumerate(made):
            (batches / f"data_batch_{i + 1}.bin").write_bytes(record.tobytes())
        (batches / "test_batch.bin").write_bytes(records(2))
        images, labels = data.load_cifar10(root, train=True)
        assert data.load_dataset("auto", root, False)[1].shape == (2, 3, 32, 32)
    assert images.shape == (5, 3, 32, 32) and images.dtype == labels.dtype == torch.uint8
    assert np.array_equal(images.flatten(1), made[:, 1:])
    assert np.array_equal(labels, made[:, 0])


def test_damaged_cifar10_is_refused_and_auto_does_not_paper_over_it():
    path = Path("cifar-10-batches-bin/test_batch.bin")
    label_10, label_9 = (bytes([label]) + records(1)[1:] for label in (10, 9))
    with folder():
        path.parent.mkdir()
        for content in (b"", records(2)[:-1], records(2) + b"x", label_10, records(1) * 10_001):
            path.write_bytes(content)
            raises(ValueError, lambda: data.load_dataset("auto", ".", False), path, "expected")
        path.write_bytes(label_9)
        assert data.load_cifar10(".", False)[1].tolist() == [9]


def test_a_cifar10_file_with_fewer_than_10000_images_is_read_with_a_notice():
    path = Path("cifar-10-batches-bin/test_batch.bin")
    with folder():
        path.parent.mkdir()
        for count, notices in ((10_000, 0), (9_999, 1)):
            path.write_bytes(records(count))
            (images, _), said = quiet(data.load_cifar10, ".", False)
            assert len(images) == count and said.count("notice: test_batch.bin") == notices


def test_mnist_is_read_as_documented_zipped_or_not():
    images, labels = bytes_((6, 28, 28), 5), bytes_(6, 10)
    with folder() as root:
        write_mnist(root / "MNIST/raw", images[:4], labels[:4], "train")
        zipped, _ = write_mnist(root / "MNIST/raw", images, labels)
        for _ in range(2):
            name, got, its_labels = data.load_dataset("auto", root, False, "mnist")
            assert name == "mnist" and np.array_equal(got[:, 0], images)
            assert got.shape == (6, 1, 28, 28) and got.dtype == its_labels.dtype == torch.uint8
            assert np.array_equal(its_labels, labels)
            zipped.unlink(missing_ok=True)
            zipped.with_suffix("").write_bytes(idx(images))  # not zipped
        assert np.array_equal(data.load_mnist(root, True)[1], labels[:4])
        all_of_it = bytes_(60_000)
        zipped.write_bytes(gzip.compress(idx(all_of_it)))
        assert np.array_equal(data.read_idx(zipped, ()), all_of_it)


def test_damaged_mnist_images_are_refused():
    images = bytes_((6, 28, 28), 5)
    plain = idx(images)
    with folder() as root:
        path, _ = write_mnist(root / "MNIST/raw")
        packed = path.read_bytes()
        flipped = packed[:900] + b"????" + packed[904:]
        bomb = gzip.compress(bytes(60_000_000), 1)
        floats = b"\0\0\x0d\x03" + plain[4:]
        inside = (b"", plain[:-1], plain + b"x", floats, plain[:9], idx(images[:0]),
                  idx(images[:, 1:]), idx(bytes_(6, 10)))
        for content in (b"", b"none", packed[:-20], flipped, bomb, *map(gzip.compress, inside)):
            path.write_bytes(content)
            raises(ValueError, lambda: data.load_dataset("auto", root, False, "mnist"), path,
                   "expected")


def test_mnist_labels_are_0_to_9_and_as_many_as_images():
    with folder() as root:
        for labels in (bytes_(5, 10), np.full(6, 10, np.uint8)):
            write_mnist(root / "MNIST/raw", labels=labels)
            raises(ValueError, lambda: data.load_mnist(root, False), "labels", len(labels),
                   labels.max())
        write_mnist(root / "MNIST/raw", labels=np.full(6, 9, np.uint8))
        assert data.load_mnist(root, False)[1].tolist() == [9] * 6


def test_a_file_that_unpacks_to_far_too_much_is_refused_without_unpacking_it():
    with folder() as root:
        path = root / "labels.gz"
        path.write_bytes(gzip.compress(bytes(60_000_000), 1))
        tracemalloc.start()
        raises(ValueError, lambda: data.read_idx(path.with_suffix(""), ()), path)
        assert tracemalloc.get_traced_memory()[1] < 10e6
        tracemalloc.stop()


def test_cifar10_download_is_checked_and_stays_in_its_folder():
    inside = "cifar-10-batches-bin/"
    for evil in ((), ("secret", "../../evil"), ("secret", inside + "../../evil"),
                 ("link", inside + "link")):
        with folder() as root:
            source, load = root / "source", lambda: data.load_cifar10(root / "d" / "d", False)
            (root / "secret").write_bytes(records(3))
            (root / "link").symlink_to(root / "secret")
            with tarfile.open(source, "w:gz") as tar:
                tar.add(root / "secret", inside + "test_batch.bin")
                tar.add(root / evil[0], evil[1]) if evil else None
            md5, before = hashlib.md5(source.read_bytes()).hexdigest(), set(files_in(root))
            with patched(data, CIFAR10_URLS=[source.as_uri()]):
                raises(ConnectionError, load, md5)
                assert set(files_in(root)) == before  # nothing is left
                with patched(data, CIFAR10_MD5=md5), contextlib.suppress(*[Exception] * bool(evil)):
                    assert load()[1].tolist() == bytes_((3, 1), 10)[:, 0].tolist()
            new = set(files_in(root)) - before
            assert all(root / "d" in path.parents and not path.is_symlink() for path in new), new
            assert evil or [path.name for path in new] == ["test_batch.bin"]


@contextlib.contextmanager
def mirrors():
    """Three addresses of MNIST: nothing is there, other files, the right ones. Gives their URLs."""
    with folder() as root:
        good = write_mnist(root / "good")
        write_mnist(root / "bad", bytes_((6, 28, 28), seed=1), bytes_(6, 10, seed=1))
        sums = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in good}
        with patched(data, MNIST_MD5=sums):
            yield [(root / name).as_uri() + "/" for name in ("missing", "bad", "good")]


def load_downloaded(urls):
    with patched(data, MNIST_URLS=urls):
        return quiet(data.load_mnist, Path("d"), False)


def test_mnist_download_takes_the_first_address_with_the_right_content():
    with mirrors() as (missing, bad, good):
        (_, labels), said = load_downloaded([missing, bad, good])
        assert np.array_equal(labels, bytes_(6, 10)) and len(files_in(Path("d"))) == 2
        assert said.count("downloading") == 6
        shutil.rmtree("d")
        _, said = load_downloaded([good, missing])
        assert said.count("downloading") == 2  # each file once
        shutil.rmtree("d")
        raises(ConnectionError, lambda: load_downloaded([missing, bad]), "MD5", "missing")
        assert not files_in(Path("d"))


def test_a_download_that_fails_leaves_nothing_half_done():
    urlopen, write = urllib.request.urlopen, Path.write_bytes

    def breaks_off(url, timeout=math.inf):
        response = urlopen(url, timeout=timeout)
        assert timeout <= 60
        response.read = lambda *_: (_ for _ in ()).throw(http.client.IncompleteRead(b"a"))
        return response

    def disk_full(path, content):
        write(path, content[:9])
        assert path.suffix == ".part"  # named when complete
        raise OSError("disk full")

    with mirrors() as (_, _, good):
        for accident, word in ((patched(urllib.request, urlopen=breaks_off), "IncompleteRead"),
                               (patched(Path, write_bytes=disk_full), "disk full")):
            with accident:
                raises(ConnectionError, lambda: load_downloaded([good]), word)
            assert not files_in(Path("d"))


def test_without_a_network_auto_falls_back_loudly_and_a_named_set_fails():
    closed = ["https://127.0.0.1:9/"]
    small = dict.fromkeys(data.BUILT_IN, (data.make_glyphs, 4, 2))
    with folder() as root, contextlib.redirect_stdout(io.StringIO()) as said, patched(
            data, MNIST_URLS=closed, CIFAR10_URLS=closed, BUILT_IN=small):
        for real, stand_in in (("mnist", "glyphs"), ("cifar10", "leaves")):
            name, images, labels = data.load_dataset("auto", root, True, real=real)
            assert name == stand_in and len(images) == len(labels) == 4
            raises(ConnectionError, lambda: data.load_dataset(real, root, True), stand_in, "127.")
        raises(ValueError, lambda: data.load_dataset("nonsense", root, True), "nonsense")
    assert sum("***" in line for line in said.getvalue().splitlines()) == 4


def different(images):
    """How many of the images are different, as a set of their bytes."""
    return {image.numpy().tobytes() for image in images}


def test_built_in_sets_have_other_images_for_the_test_and_the_same_in_every_call():
    small = dict(leaves=(data.make_leaves, 40, 30), glyphs=(data.make_glyphs, 900, 300))
    with patched(data, BUILT_IN=small):
        for name, (_, train_count, test_count) in small.items():
            _, images, labels = data.load_dataset(name, "", True)
            _, test_images, _ = data.load_dataset(name, "", False)
            _, again, _ = data.load_dataset(name, "", False)
            assert torch.equal(test_images, again)
            assert len(test_images) == test_count
            assert len(different(images)) == len(labels) == train_count
            assert not different(images) & different(test_images)
            assert images.dtype == labels.dtype == torch.uint8
            assert 30 < images.float().std() < 110


def test_the_sizes_of_the_built_in_sets():
    assert data.BUILT_IN["leaves"] == (data.make_leaves, 20_480, 1_024)
    assert data.BUILT_IN["glyphs"] == (data.make_glyphs, 20_000, 2_000)


def test_a_second_canvas_of_leaves_is_another_one():
    images, labels = data.make_leaves(2048, seed=1)
    assert images.shape == (2048, 3, 32, 32) and not labels.any()
    assert len(different(images)) > 2040  # a few show one disc alone
    assert torch.equal(data.make_leaves(3, seed=1)[0], images[:3])


def test_the_mean_of_the_glyphs_with_a_label_looks_like_that_digit():
    images, labels = data.make_glyphs(900, seed=1)
    close(np.bincount(labels) / 900, [0.1] * 10, 0.04)
    font = ImageFont.load_default(24)
    means, upright = [], []
    for digit in range(10):
        mean = images[labels == digit].double().mean(0)
        means.append(mean.flatten().tolist())
        image = Image.new("L", (28, 28))
        ImageDraw.Draw(image).text((14, 14), str(digit), 255, font, anchor="mm")
        upright.append(np.ravel(image))
    like = np.corrcoef(means, upright)[:10, 10:]
    assert (like.argmax(1) == np.arange(10)).sum() >= 8, like.argmax(1)


def test_glyphs_vary_in_place_size_stroke_and_angle():
    with spied(ImageDraw.ImageDraw, "text") as texts, spied(Image.Image, "rotate") as turns:
        _, labels = data.make_glyphs(600, seed=2)
    places, digits, fonts, strokes = [], [], set(), set()
    for (_, place, digit, _, font), options in texts:
        places.append(place)
        digits.append(int(digit))
        fonts.add(font.size)
        strokes.add(options["stroke_width"])
    angles = [angle for (_, angle, _), _ in turns]
    assert digits == labels.tolist()
    close(np.min(places, axis=0), [11.5, 11.5], 0.1)
    close(np.max(places, axis=0), [16.5, 16.5], 0.1)
    close([min(angles), max(angles)], [-20, 20], 0.5)
    assert fonts == set(range(20, 31)) and strokes == {0, 0.5, 1}


def discs_of_leaves():
    """The discs of one canvas, x, y, r (N,) in pixels and fill (N, 3), and its 1,024 images."""
    with spied(ImageDraw.ImageDraw, "ellipse") as drawn:
        tiles, _ = data.make_leaves(1024, seed=5)
    x0, y0, x1, y1 = np.array([box for (_, box), _ in drawn]).T / 2  # drawn at twice the size
    assert np.allclose(y1 - y0, x1 - x0)  # circles
    fill = np.array([options["fill"] for _, options in drawn])
    return (x0 + x1) / 2, (y0 + y1) / 2, (x1 - x0) / 2, fill, tiles.numpy()


def test_leaves_are_discs_of_the_stated_radii_and_colours():
    _, _, r, fill, _ = discs_of_leaves()
    u = np.sort((3**-2 - r**-2) / (3**-2 - 40**-2))  # the distribution function: uniform if r^-3
    assert abs(u - np.linspace(0, 1, len(u))).max() < 1.63 / len(u) ** 0.5  # Kolmogorov, 1 %
    close(u[[0, -1]], [0, 1], 0.001)
    area = (math.pi * r**2).sum()
    assert 3.5 < area / 1104**2 < 6
    close(fill.mean(0), [122] * 3, 2)
    close(fill.std(), 57, 2)
    close((fill[:, 0] - fill[:, 2]).std(), 30, 2)


def test_of_leaves_the_last_disc_over_a_pixel_is_seen():
    x, y, r, fill, tiles = discs_of_leaves()
    shares = []
    for row, column in ((0, 0), (0, 1), (1, 1), (21, 28)):  # of 32 x 32 tiles of 32 x 32 pixels
        px = np.arange(32) + 32 * column + 0.5
        py = np.arange(32)[:, None] + 32 * row + 0.5
        near = np.nonzero(np.hypot(x - px.mean(), y - py.mean()) < r + 23)[0]
        seen = np.zeros((32, 32, 3))
        for i in near:
            inside = np.hypot(px - x[i], py - y[i]) < r[i]
            seen[inside] = fill[i]
        same = tiles[32 * row + column] == seen.transpose(2, 0, 1)
        shares.append(same.mean())
    assert min(shares) > 0.6 and np.mean(shares) < 0.9  # edges are smooth


def test_pictures_are_turned_upright():
    wide = bytes_((20, 32, 3))
    across = wide.transpose(1, 0, 2)
    upright = {1: wide, 2: wide[:, ::-1], 3: wide[::-1, ::-1], 4: wide[::-1],
               5: across, 6: across[:, ::-1], 7: across[::-1, ::-1], 8: across[::-1]}
    with folder():
        for turn, right in upright.items():
            exif = Image.Exif()
            exif[0x0112] = turn
            Image.fromarray(wide).save("photo.png", exif=exif)
            assert np.array_equal(data.open_picture("photo.png"), right), turn


def test_pictures_of_every_kind_are_read():
    square = bytes_((32, 32, 3))
    plain = Image.fromarray(square)
    grey = (square @ [0.299, 0.587, 0.114])[..., None]
    palette = plain.quantize(16)
    colours = np.reshape(palette.getpalette(), (-1, 3))[np.asarray(palette)]
    deep = np.arange(1024, dtype=np.uint16).reshape(32, 32) * 64
    shades = np.dstack([deep / 257] * 3)
    sixteen = Image.fromarray(deep)
    bits = deep > 32767
    with folder():
        for name, image, right in (
                ("rgb.tif", plain, square),
                ("rgba.tif", plain.convert("RGBA"), square),
                ("cmyk.tif", plain.convert("CMYK"), square),
                ("palette.tif", palette, colours),
                ("grey.tif", plain, grey),
                ("grey.png", plain.convert("LA"), grey),
                ("bits.png", Image.fromarray(bits), np.dstack([bits * 255] * 3)),
                ("16.tif", sixteen, shades),
                ("16.png", sixteen, shades),
                ("16.pgm", sixteen, shades),
                ("32.tif", Image.fromarray(deep.astype(np.int32)), shades)):
            image.save(name)
            got = data.square_picture(data.open_picture(name), right.shape[2], 32)
            close(got, right.transpose(2, 0, 1), 1)


def test_a_picture_is_reduced_to_its_middle_square():
    stripes = np.repeat(np.uint8([0, 100, 200]), 32)[None].repeat(32, 0)
    for picture in (stripes, stripes.T):
        got = data.square_picture(Image.fromarray(picture), 1, 32)
        close(got[:, 4:-4, 4:-4], 100, 0)
    fine = Image.fromarray(bytes_((256, 256)))
    small = data.square_picture(fine, 1, 32)
    assert small.float().std() < 20  # averaged; if picked: 74


def test_a_square_of_a_picture_of_any_size():
    for mode in ("RGB", "L", "RGBA", "P", "I;16"):
        for size in ((1, 1), (20_000, 3), (3, 20_000), (33, 31)):
            small = data.square_picture(Image.new(mode, size), 3, 8)
            assert small.shape == (3, 8, 8)
            assert small.dtype == torch.uint8


def test_what_is_no_picture_is_refused_by_name():
    with folder():
        Path("text.png").write_bytes(b"no picture")
        save_png("whole.png", bytes_((50, 50)))
        Path("cut.png").write_bytes(Path("whole.png").read_bytes()[:900])
        Image.fromarray(np.full((40, 40), 0.5, np.float32)).save("float.tif")
        for name in ("text.png", "cut.png", "float.tif", "missing.png", "."):
            raises(ValueError, lambda: data.open_picture(name), f"cannot use {name} as a picture")
        with patched(Image, MAX_IMAGE_PIXELS=500):  # Pillow refuses twice as many
            raises(ValueError, lambda: data.open_picture("whole.png"), "whole.png", "bomb")


def test_a_folder_of_pictures_is_split_by_their_names():
    names = [f"{'sub/' * (i % 2)}{i}.PNG" for i in range(199)]
    names += [os.fsdecode("ä".encode() + b"\xff.png")]  # no UTF-8
    keys = [zlib.crc32(name.encode(errors="surrogateescape")) for name in names]
    in_test = sorted(sorted(range(200), key=keys.__getitem__)[:20])
    in_training = sorted(set(range(200)) - set(in_test))
    with folder():
        os.makedirs("a/sub")
        for i, name in enumerate(names):
            Image.new("RGB", (9, 5), (i, 7, 255 - i)).save("a/" + name)
        for name in ("notes.txt", "sub/broken.png"):
            Path("a", name).write_text("x")
        for place, train, right in (("a", True, in_training), ("a", False, in_test),
                                    ("b", False, in_test)):
            Path("a").rename(place)
            (name, images, labels), said = quiet(data.load_dataset, place, "", train)
            assert said.count("\n") == 1 and "2 of 202" in said
            assert name == place and images.shape == (len(labels), 3, 32, 32)
            red, green, blue = images[:, :, 0, 0].int().T
            assert sorted(red.tolist()) == right and not labels.any()
            assert (green == 7).all() and (red + blue == 255).all()
            Path(place).rename("a")
        grey = quiet(data.load_dataset, "a", "", True, "mnist")[0][1]
        assert grey.shape == (180, 1, 28, 28) and grey.dtype == torch.uint8


def test_a_folder_needs_20_pictures():
    with folder():
        for i in range(20):
            save_png(f"{i}.png", np.full((5, 5), i))
        assert [len(data.load_dataset(".", "", train)[1]) for train in (True, False)] == [18, 2]
        Path("7.png").unlink()
        raises(ValueError, lambda: data.load_dataset(".", "", True), "19", "20")


def test_the_two_ranges_of_values():
    levels = torch.arange(256, dtype=torch.uint8)
    unit = torch.linspace(0, 1, 256)
    signed = torch.linspace(-1, 1, 256)
    close(data.to_signed(levels), signed, 1e-6)
    close(data.to_signed(unit), signed, 1e-6)
    close(data.to_unit(signed), unit, 1e-6)
    assert data.to_signed(levels).dtype == torch.float32


def test_sparse_split_against_numpy():
    images = torch.from_numpy(bytes_((40, 3, 6, 9)))
    order = torch.rand(40, 54, generator=seeded())
    split = data.sparse_split(images, 0.25, 0.4, order=order)
    pixels = images.numpy().reshape(40, 3, 54) / 127.5 - 1
    close(split["full_image"].flatten(2), pixels, 1e-6)
    ranks = order.numpy().argsort(1)
    for name, index in (("input", ranks[:, :13]), ("output", ranks[:, 13:34])):
        coords, values = split[f"{name}_coords"], split[f"{name}_values"]
        assert np.array_equal(split[f"{name}_indices"], index)
        close(coords[..., 0], index % 9 / 8, 1e-6)
        close(coords[..., 1], index // 9 / 5, 1e-6)
        close(values.mT, np.take_along_axis(pixels, index[:, None], 2), 1e-6)
        assert values.dtype == coords.dtype == torch.float32


def test_sparse_split_draws_pixels_with_its_generator():
    images = torch.rand(60, 1, 32, 32, generator=seeded()) * 2 - 1
    split, again, other = (data.sparse_split(images, generator=seeded(i)) for i in (1, 1, 2))
    assert torch.equal(split["full_image"], images)
    assert torch.equal(split["output_indices"], again["output_indices"])
    assert not torch.equal(split["input_indices"], other["input_indices"])
    assert split["input_coords"].shape == (60, 204, 2)
    chosen = torch.cat([split["input_indices"], split["output_indices"]], 1)
    for row in chosen.tolist():
        assert len(set(row)) == 408  # never the same pixel twice
    split = data.sparse_split(images, 0.2, None)
    assert split["output_indices"].shape == (60, 820)


def test_sparse_split_of_narrow_images_and_of_equal_orders():
    for shape in ((1, 1, 1, 5), (1, 1, 5, 1)):
        split = data.sparse_split(torch.rand(shape), 0.4, None, order=torch.zeros(1, 5))
        assert split["input_indices"].tolist() == [[0, 1]]  # of equal ones the first
        coords = torch.cat([split["input_coords"], split["output_coords"]], 1)
        close(coords.sum(2), [[0, 0.25, 0.5, 0.75, 1]], 1e-6)


def off_grid_problem():
    """Images of 9 columns and 6 rows, and numbers for their 54 pixels and for 13 places (x, y)."""
    images = torch.from_numpy(bytes_((4, 3, 6, 9)))
    return images, torch.rand(4, 54 + 2 * 13, generator=seeded())


def test_input_off_the_grid_is_read_bilinearly_at_random_places():
    images, order = off_grid_problem()
    split = data.off_grid_split(images, 0.25, 0.4, order=order)
    places = order[:, 54:].view(4, 13, 2)
    assert torch.equal(split["input_coords"], places)
    plain = images.flatten(2).double().numpy() / 127.5 - 1
    close(split["full_image"].flatten(2), plain, 1e-6)
    for b in range(4):
        W = bilinear_weights(places[b], width=9, height=6)
        close(split["input_values"][b], W @ plain[b].T, 1e-5)
        nearest = places[b] * torch.tensor([8, 5])
        column, row = nearest.round().long().unbind(1)
        assert torch.equal(split["input_indices"][b], row * 9 + column)


def test_output_of_an_off_grid_split_is_on_the_grid():
    """First the pixels that sparse_split would take, then those that it would give."""
    images, order = off_grid_problem()
    on_grid = data.sparse_split(images, 0.25, 0.4, order=order[:, :54])
    split = data.off_grid_split(images, 0.25, 0.4, order=order)
    for name in ("output_indices", "output_coords", "output_values"):
        assert torch.equal(split[name], on_grid[name])
    on_grid = data.sparse_split(images, 0.25, None, order=order[:, :54])
    split = data.off_grid_split(images, 0.25, None, order=order)
    for name in ("indices", "coords", "values"):
        everywhere = on_grid[f"output_{name}"], on_grid[f"input_{name}"]
        assert torch.equal(split[f"output_{name}"], torch.cat(everywhere, 1))


def test_off_grid_split_draws_places_with_its_generator():
    images = torch.rand(60, 1, 32, 32, generator=seeded()) * 2 - 1
    a, b, c = (data.off_grid_split(images, generator=seeded(seed)) for seed in (1, 1, 2))
    assert a["input_coords"].shape == a["output_coords"].shape == (60, 204, 2)
    for name in ("input_coords", "output_indices"):
        assert torch.equal(a[name], b[name]) and not torch.equal(a[name], c[name])
    x, y = a["input_coords"].unbind(2)
    for places in (x, y):
        assert 0 <= places.min() < 0.001 and 0.999 < places.max() <= 1
        close(places.mean(), 0.5, 0.01)


def test_ratios_that_take_no_pixel_or_too_many_are_refused():
    images = torch.zeros(1, 1, 6, 9)
    for ratios in (
            (0, 0.2), (0.2, 0), (0.6, 0.5), (-0.1, 0.2), (0.0001, 0.2), (0.2, 0.0001),
            (0.2, 1.1), (1, 0), (1, None), (math.nan, 0.2), (0.2, math.inf)):
        raises(ValueError, lambda: data.sparse_split(images, *ratios), *ratios)
        raises(ValueError, lambda: data.off_grid_split(images, *ratios), *ratios)
    split = data.sparse_split(images, 0.5, 0.5)
    assert split["output_indices"].shape == (1, 27)


def test_fixed_order_is_a_function_of_seed_image_and_pixel():
    for seed in (0, 1, 2**32 - 1):
        order = data.fixed_order(seed, torch.tensor([299, 0, 7]), 784)
        assert order.dtype == torch.float32
        for row, image in zip(order, (299, 0, 7)):
            rng = np.random.default_rng((seed, image))
            close(row, rng.random(784), 1e-7)


def test_a_red_pixel_stays_in_its_row_and_column():
    image = torch.zeros(1, 3, 5, 7)
    image[0, 2] = 1
    image[0, :, 1, 4] = torch.tensor([1.0, 0, 0])  # red in row 1, column 4
    split = data.sparse_split(image, 0.5, None, generator=seeded())
    part = sample.assemble(split)
    assert (part != 0.5).any(1).sum() == 17  # of 35; the others are grey
    assert torch.equal(data.to_signed(sample.assemble(split, split["output_values"])), image)


def box(picture, colour):
    """Where a picture has this colour: the columns and rows [left, top, right, bottom]."""
    rows, columns = np.nonzero((pixels_of(picture) == colour).all(2))
    return np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])


def test_a_grid_shows_each_image_in_its_place():
    blue = torch.tensor([-3.0, 0, 9])[:, None, None].repeat(1, 5, 7)  # beyond [0, 1]
    blue[:, 1, 4] = torch.tensor([1.0, 0, 0])  # a red pixel
    green = torch.tensor([0.0, 1, 0])[:, None, None].expand(3, 5, 7)
    grey = torch.full((1, 5, 7), 0.5)
    labels = dict(column_labels="ab", row_labels=["one", "two"], captions=[["x", "y"]] * 2)
    for options in ({}, labels):
        grid = data.image_grid([[blue, green], [grey, blue]], zoom=3, **options)
        left, top, right, bottom = box(grid, (0, 0, 255))  # of both blue images
        assert left + 42 <= right and top + 30 <= bottom
        close(box(grid, (255, 0, 0)), [left + 12, top + 3, right - 21 + 15, bottom - 15 + 6], 0)
        close(box(grid, (0, 255, 0)), [right - 21, top, right, top + 15], 0)
        assert (pixels_of(grid)[bottom - 15:bottom, left:left + 21] == 128).all()


def test_labels_and_captions_stand_beside_what_they_name():
    red, green, blue = torch.eye(3)[:, :, None, None].expand(3, 3, 8, 9)  # 32 x 36 at zoom 4
    columns = ["column 1", "column 2"]
    rows = ["a long name of row 1", "row 2"]
    captions = [["of red", "of green"], ["of blue"]]
    with spied(ImageDraw.ImageDraw, "text") as texts:
        grid = data.image_grid([[red, green], [blue]], columns, rows, captions)
    at = {given[2]: given[1] for given, _ in texts}
    boxes = [box(grid, colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    for (left, top, right, bottom), caption in zip(boxes, ("of red", "of green", "of blue")):
        assert (right - left, bottom - top) == (36, 32)
        close(at[caption], [(left + right) / 2, bottom + 2], 0)
    for (left, top, right, _), column in zip(boxes, columns):
        x, y = at[column]
        assert x == (left + right) / 2 and y + 13 < top
    font = ImageFont.load_default(13)
    for (left, top, _, bottom), row in zip(boxes[::2], rows):
        x, y = at[row]
        assert y == (top + bottom) / 2 and x + font.getlength(row) < left


def test_heat_is_black_red_yellow_white():
    error = torch.tensor([0, 1 / 6, -1 / 3, 0.5, -0.75, 1 / 12])  # of the limit 0.5
    red = [0, 1, 1, 1, 1, 0.5]
    green = [0, 0, 1, 1, 1, 0]
    blue = [0, 0, 0, 1, 1, 0]
    colours = torch.tensor([red, green, blue])[:, None]
    close(data.heat(error.view(1, 1, 6)), colours, 1e-6)
    channels = torch.stack([2 * error, -4 * error, 0 * error])[:, None]
    close(data.heat(channels, limit=1.0), colours, 1e-6)


BLUE, ORANGE = (31, 111, 180), (209, 72, 31)  # the colours of the first two curves


def curve_rows(chart, colour):
    """The row of a curve of this colour at the left edge, the middle and the right edge."""
    rows, columns = np.nonzero((pixels_of(chart) == colour).all(2))
    below_labels = rows > 25
    return [rows[below_labels & (columns == column)].mean() for column in (64, 249, 432)]


def test_a_chart_is_not_upside_down():
    rising = [0, 50, 100], [0, 2, 10]
    falling = [0, 50, 100], [10, 8, 0]
    chart = data.line_chart("a title", {"up": rising, "down": falling})
    first, middle, last = curve_rows(chart, BLUE)
    height = first - last
    assert height > 200
    close(first - middle, 0.2 * height, 5)
    down_first, down_middle, down_last = curve_rows(chart, ORANGE)
    close([down_first, down_last], [last, first], 5)
    close(down_last - down_middle, 0.8 * height, 5)


def test_all_curves_of_a_chart_share_its_axes():
    chart = data.line_chart("", {"": ([50, 100], [0, 5]), "long": ([0, 100], [0, 10])})
    left, top, _, _ = box(chart, BLUE)
    assert 240 < left < 260 and 150 < top < 170  # from the middle, and half as high


def test_a_curve_of_one_point_is_a_dot():
    chart = pixels_of(data.line_chart("", {"": ([3], [7])}))
    assert 20 < (chart == BLUE).all(2).sum() < 60


def axes(xs, ys):
    """Draw a curve; {place: number} along the horizontal and the vertical axis."""
    with spied(ImageDraw.ImageDraw, "text") as texts:
        data.line_chart("", {"": (xs, ys)})
    across, up = {}, {}
    for (_, (x, y), text, *_), _ in texts:
        if y > 290 and text:
            across[x] = float(text)
        elif x < 60:
            up[y] = float(text)
    return across, up


def test_the_numbers_on_the_axes_are_where_they_say():
    chart = pixels_of(data.line_chart("", {"": (range(5), range(5))}))
    across, up = axes(range(5), range(5))
    assert list(across.values()) == list(up.values()) == [0, 1, 2, 3, 4]
    for x, y in zip(across, up):  # the curve meets both
        near = chart[int(y) - 1:int(y) + 2, int(x)]
        assert (near == BLUE).all(1).any()


def test_the_numbers_on_an_axis_are_right_and_distinct():
    for low, high in ((20.9, 21), (0, 1), (70, 7000), (-0.3, 0.1), (-1e-4, 1e-4), (1e5, 1e5 + 1)):
        across, up = axes([low, high], [2 * high, 2 * low])
        right = np.linspace(low, high, 5)
        close(list(across.values()), right, 0.02 * (high - low))
        close(list(up.values()), 2 * right, 0.04 * (high - low))
    across, up = axes([3], [7])  # a single point
    assert list(up.values()) == [7, 7.25, 7.5, 7.75, 8]


def test_the_labels_of_curves_have_their_colours():
    with spied(ImageDraw.ImageDraw, "text") as texts:
        chart = data.line_chart("a title", {"one": ([0, 1], [0, 0]), "two": ([0, 1], [1, 1])})
    at = {given[2]: given[1] for given, _ in texts}
    assert at["a title"][0] < at["two"][0] - 50 < at["one"][0] - 100
    for label, colour in (("one", BLUE), ("two", ORANGE)):
        x, y = at[label]  # the right end of its text
        text = pixels_of(chart)[y:y + 14, x - 20:x]
        assert (text == colour).all(2).any()
    assert curve_rows(chart, BLUE)[1] > curve_rows(chart, ORANGE)[1] + 200


def photograph():
    """A picture (60, 90, 3) of two colours, and a hole (60, 90), 255 in its middle."""
    photo, hole = np.zeros((60, 90, 3), np.uint8), np.zeros((60, 90), np.uint8)
    photo[:, :45] = 255, 200, 40
    hole[20:30, 30:60] = 255
    return photo, hole


def test_of_a_complete_picture_a_share_of_the_pixels_is_given_at_random():
    photo, _ = photograph()
    with folder():
        save_png("photo.png", photo)
        image, given, has_truth = data.load_picture("photo.png", 3)
        assert has_truth and given.sum() == 0.2 * 60 * 90 and given.dtype == torch.bool
        assert image.dtype == torch.uint8 and np.array_equal(image, photo.transpose(2, 0, 1))
        assert given[:30].sum() > 300 and given[:, :45].sum() > 300
        load = lambda **options: data.load_picture("photo.png", 3, **options)[1]
        assert torch.equal(load(seed=0), given) and not torch.equal(load(seed=1), given)
        assert load(input_ratio=0.75).sum() == 0.75 * 60 * 90
        grey, _, _ = data.load_picture("photo.png", 1)
        close(grey[0], photo @ [0.299, 0.587, 0.114], 1)


def test_transparent_pixels_are_missing_and_so_are_white_ones_of_a_mask():
    photo, hole = photograph()
    left, bar = np.arange(90) < 40, np.zeros((60, 90))
    bar[:, 70:75] = 128
    with folder():
        save_png("holes.png", photo, np.where(hole, 127, 128))
        save_png("photo.png", photo)
        save_png("mask.png", np.where(hole, 128, 127))
        save_png("half.png", photo, 255 - hole * left)
        save_png("bar.png", bar)
        for name, mask, missing in (("holes.png", None, hole > 0),
                                    ("photo.png", "mask.png", hole > 0),
                                    ("half.png", "mask.png", hole > 0),
                                    ("holes.png", "bar.png", (hole > 0) | (bar > 0))):
            image, given, has_truth = data.load_picture(name, 3, mask)
            assert not has_truth and np.array_equal(given, ~missing), name
            assert np.array_equal(image[:, given], photo[~missing].T)


def test_a_picture_and_its_mask_are_both_turned_upright():
    photo, hole = photograph()
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    with folder():
        for name, pixels in (("photo.png", photo), ("mask.png", hole)):
            Image.fromarray(pixels[::-1, ::-1]).save(name, exif=exif)
        image, given, _ = data.load_picture("photo.png", 3, "mask.png")
    assert np.array_equal(image[0, 0], photo[0, :, 0] * given[0].numpy())
    assert np.array_equal(given, hole == 0)


def test_a_large_picture_is_reduced_to_1024_pixels():
    noisy = bytes_((40, 1025)) // 2 * 2
    hole = np.arange(1025) % 50 < 25
    with folder():
        save_png("complete.png", noisy.T)
        save_png("holes.png", *[noisy] * 3, 255 * np.broadcast_to(~hole, noisy.shape))
        save_png("limit.png", noisy[:, 1:])
        (image, _, _), said = quiet(data.load_picture, "complete.png", 1)
        assert image.shape == (1, 1024, 40) and "complete.png is reduced to 1024" in said
        assert (image % 2).any()  # averaged
        (image, given, _), _ = quiet(data.load_picture, "holes.png", 1)
        assert not (image % 2).any()  # next to holes the nearest pixel
        close(given.double().mean(), 0.5, 0.02)
        (image, _, _), said = quiet(data.load_picture, "limit.png", 1)
        assert image.shape == (1, 40, 1024) and not said


def test_pictures_that_cannot_be_restored_are_refused():
    photo, hole = photograph()
    with folder():
        save_png("photo.png", photo)
        save_png("small.png", hole[:50])
        save_png("black.png", 0 * hole)
        for mask, words in (("small.png", ["same size", "(90, 50)", "(90, 60)"]),
                            ("black.png", ["no pixel is missing"]), ("none.png", ["none.png"])):
            raises(ValueError, lambda: data.load_picture("photo.png", 3, mask), *words)


def test_pictures_are_saved_all_or_none():
    one, two = (Image.new("L", (2, 2), value) for value in (1, 2))
    with folder():
        place = Path("a/b")
        _, said = quiet(data.save_pictures, place, {"one.png": one, "two.png": two})
        assert [pixels_of(place / f"{n}.png").max() for n in ("one", "two")] == [1, 2]
        assert said == f"picture: {place}/one.png\npicture: {place}/two.png\n"
        assert len(files_in(place)) == 2
        raises(ValueError, lambda: data.save_pictures(place, {"one.png": two, "two.odd": one}))
        assert pixels_of(place / "one.png").max() == 1


def test_expected_errors_end_in_one_line():
    def fails(problem):
        def main():
            raise problem
        return run(types.SimpleNamespace(main=main, __name__="a"), "")

    for problem in (ValueError("it is odd"), OSError("it is odd"), ConnectionError("it is odd"),
                    torch.linalg.LinAlgError("it is odd")):
        assert fails(problem) == (1, "", "error: it is odd\n")
    assert fails(KeyboardInterrupt()) == (130, "", "")
    gpu = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    assert "--batch-size" in fails(gpu)[2]
    too_much = types.SimpleNamespace(main=lambda: torch.zeros(2**50), __name__="a")
    refused(too_much, "", "out of memory")
    raises(RuntimeError, lambda: fails(RuntimeError("a mistake")), "a mistake")


def test_printing_never_ends_a_program():
    def main():
        print("± é")
        sys.stdout.flush()
        assert not sys.stdout.isatty()
        Path("results").touch()

    readable, writable = os.pipe()
    os.close(readable)
    closed_early, closed = open(writable, "w"), io.StringIO()
    closed.close()
    ascii_only = io.TextIOWrapper(io.BytesIO(), "ascii")
    for stream in (None, closed, closed_early, open("/dev/full", "w"), ascii_only):
        with folder(), patched(sys, stdout=stream):
            data.run(main)
            assert os.path.exists("results")
    assert ascii_only.buffer.getvalue() == b"? ?\n"


def test_a_pipe_that_closes_early_ends_a_program_quietly():
    with folder():
        line = f"set -o pipefail; {sys.executable} {HERE}/data.py --data glyphs | true"
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
        assert done.returncode == 0 and not done.stderr, done
        assert Path("out/data.png").exists()


def test_data_py_shows_images_and_their_sparse_pixels():
    with tiny_sets("sets"), spied(data, "image_grid") as drawn:
        out = works(data, "--data mnist --data-dir sets --out there")
        assert "mnist: 64 test images (1, 28, 28)" in out and "there/data.png" in out
        ((rows, *_), options), = drawn
        picture = Path("there/data.png").read_bytes()
        images = data.load_mnist("sets", False)[0][:8]
        for flags, same in (("--seed 0", True), ("--seed 1", False)):
            works(data, f"--data mnist --data-dir sets {flags}")
            assert (Path("out/data.png").read_bytes() == picture) == same
        assert "glyphs: 2,000" in works(data, "--data glyphs")
    assert options["row_labels"] == ["image", "input", "output"]
    whole, *parts = (torch.stack(row) for row in rows)
    close(whole, images / 255, 1e-6)
    torch.manual_seed(0)
    split = data.sparse_split(images)
    for part, name in zip(parts, ("input", "output")):
        mask = torch.zeros(8, 784).scatter(1, split[f"{name}_indices"], 1).view(8, 1, 28, 28)
        close(part, torch.where(mask == 1, whole, 0.5), 1e-6)  # grey elsewhere


def test_a_thousand_damaged_files():
    """Every one is loaded as something valid or refused in one line: no other exception."""
    rng, model = np.random.default_rng(0), tiny_field(side=8)
    with folder() as root, patched(data, CIFAR10_URLS=[], MNIST_URLS=[]):
        zipped, _ = write_mnist(root / "MNIST" / "raw")
        photo, cifar = root / "photo.png", root / "cifar-10-batches-bin" / "test_batch.bin"
        plain, saved = zipped.with_suffix(""), root / "checkpoint.pt"
        cifar.parent.mkdir()
        Image.fromarray(bytes_((40, 40, 3))).save(photo)
        torch.save(dict(kind="nf", step=1, data="leaves", schedule={}, settings={},
                        config=dict(nf_denoiser.SIZES["small"], side=8),
                        model=model.state_dict()), saved)

        def load_photo(*_):
            return [data.square_picture(data.open_picture(photo), 3, 32)], torch.zeros(1)

        def load_weights(*_):  # a checkpoint that loads has exactly the weights that were saved
            loaded = sample.load_checkpoint(saved)[0].state_dict()
            for name, value in model.state_dict().items():
                assert torch.equal(loaded[name], value), name
            return [loaded["perceiver.embed_inputs.bias"]], torch.zeros(1)

        for path, good, load, shape, least in (
                (zipped, zipped.read_bytes(), data.load_mnist, (1, 28, 28), 20),
                (plain, idx(bytes_((6, 28, 28))), data.load_mnist, (1, 28, 28), 20),
                (cifar, records(6), data.load_cifar10, (3, 32, 32), 20),
                (photo, photo.read_bytes(), load_photo, (3, 32, 32), 20),
                (saved, saved.read_bytes(), load_weights, (32,), 100)):
            refusals = 0
            for i in range(201):
                path.write_bytes(mutated(good, rng) if i else good)
                try:
                    images, labels = load(root, False)
                    assert images[0].shape == shape and len(images) == len(labels) > 0
                    assert labels.max() < 10
                except (ValueError, ConnectionError) as problem:
                    assert i and str(problem) and "\n" not in str(problem), problem
                    refusals += 1
            assert least < refusals <= 200, (path, refusals)


def test_noise_and_schedule_can_be_imported_alone():
    use = ("import torch, noise, schedule\n"
           "x = torch.rand(2, 3, 16, 16)\n"
           "noise.ssim(x, noise.add_mixed_noise(x))\n"
           "s = schedule.DiffusionSchedule(9, 'linear')\n"
           "schedule.ddim(lambda x, t: x, s, x, 3, 0.5)\n"
           "schedule.ddpm(lambda x, t: x, s, x)\n")
    with folder():
        for file in ("noise.py", "schedule.py"):
            shutil.copy(HERE / file, ".")
        done = subprocess.run([sys.executable, "-c", use], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_files_that_work_alone():
    for line in ("noise.py", "schedule.py", "data.py --data glyphs", "nf_denoiser.py",
                 "autoencoder.py"):
        with folder():
            file, *flags = line.split()
            for needed in {file, "data.py"}:  # which draws the pictures
                shutil.copy(HERE / needed, ".")
            done = subprocess.run([sys.executable, file, *flags], capture_output=True, text=True,
                                  timeout=100)
            assert done.returncode == 0 and done.stdout.strip() and not done.stderr, done
            if file in ("nf_denoiser.py", "autoencoder.py"):
                assert "parameters" in done.stdout and not Path("out").exists()
                continue
            with Image.open(next(Path("out").iterdir())) as picture:
                assert min(picture.size) > 100 and len(np.unique(picture)) > 10


# --------------------------------------------------------------------------------- neural field


def tiny_field(parts=nf_denoiser.PARTS, channels=3, seed=0, **options):
    torch.manual_seed(seed)
    options = nf_denoiser.SIZES["small"] | options
    bars = schedule.DiffusionSchedule().alphas_cumprod
    return nf_denoiser.NFDenoiser(bars, channels, parts, **options).eval()


def random_problem(batch=2, n_in=30, n_out=20, channels=3, seed=0):
    """Arguments of NFDenoiser.forward: different pixels of a 32 x 32 grid, each t another."""
    g = seeded(seed)
    order = torch.rand(batch, 1024, generator=g).argsort(1)
    pixels = order[:, :n_in + n_out]
    coords = torch.stack([pixels % 32, pixels // 32], -1) / 31
    input_coords, output_coords = coords.split([n_in, n_out], dim=1)
    x_t = torch.randn(batch, n_out, channels, generator=g)
    t = torch.randint(1000, (batch,), generator=g)
    input_values = torch.rand(batch, n_in, channels, generator=g) * 2 - 1
    return x_t, output_coords, t, input_coords, input_values


def test_fourier_features_written_out():
    features = nf_denoiser.FourierFeatures(5)
    x, y = 0.3, 0.9
    angle = 2 * math.pi * (x * features.B[0] + y * features.B[1])
    expected = torch.cat([angle.sin(), angle.cos()])
    close(features(torch.tensor([x, y])), expected, 1e-5)


def test_fourier_frequencies_have_the_standard_deviation_asked_for():
    default = nf_denoiser.FourierFeatures(20_000)
    close(default.B.std(), 2, 0.05)  # cycles per image side
    finer = nf_denoiser.FourierFeatures(20_000, scale=7)
    close(finer.B.std(), 7, 0.2)


def test_bf16_does_not_round_fourier_angles():
    features = nf_denoiser.FourierFeatures(100)
    coords = torch.rand(50, 2)
    with torch.autocast("cpu", torch.bfloat16):
        inside = features(coords)
    close(inside, features(coords), 1e-6)


def test_time_embedding_written_out():
    embed = nf_denoiser.SinusoidalTimeEmbedding(8)
    angles = 7 * np.array([1, 0.1, 0.01, 0.001])
    expected = np.concatenate([np.sin(angles), np.cos(angles)])
    close(embed(torch.tensor([0, 7]))[1], expected, 1e-6)
    raises(ValueError, lambda: nf_denoiser.SinusoidalTimeEmbedding(7), 7)


# Attention: y_i = sum_j w_ij v_j, where the weights w_i of query i are a softmax over its logits


def normal64(*shape):
    return torch.randn(shape, dtype=torch.float64)


def attention_problem(placed):
    """Two heads of 12 numbers; 5 vectors attend to 7."""
    torch.manual_seed(0)
    attention = nf_denoiser.Attention(24, 2, placed)
    attention.double().requires_grad_(False)
    x, context = normal64(1, 5, 24), normal64(1, 7, 24)
    x_coords = 0.3 + 0.03 * normal64(1, 5, 2)
    context_coords = 0.3 + 0.03 * normal64(1, 7, 2)
    return attention, x, context, x_coords, context_coords, normal64(1, 7)


def attention_by_hand(attention, x, context, logit):
    """One query, head and key at a time. logit(head, i, j, q_i, k_j) is a number."""
    heads = attention.num_heads, -1
    q = attention.to_q(x[0]).unflatten(1, heads)        # (N, heads, d)
    k = attention.to_k(context[0]).unflatten(1, heads)  # (M, heads, d)
    v = attention.to_v(context[0]).unflatten(1, heads)
    y = torch.zeros_like(q)
    for i, head in np.ndindex(*q.shape[:2]):
        weights = []
        for j in range(len(k)):
            weight = math.exp(logit(head, i, j, q[i, head], k[j, head]))
            weights.append(weight)
        for j, weight in enumerate(weights):
            y[i, head] += weight / sum(weights) * v[j, head]
    return attention.to_out(y.flatten(1))[None]


def test_attention_is_a_softmax_over_the_context():
    attention, x, context, _, _, log_w = attention_problem(placed=False)

    def logit(head, i, j, q, k):
        return q @ k / math.sqrt(12) + log_w[0, j]

    expected = attention_by_hand(attention, x, context, logit)
    close(attention(x, context, log_w=log_w), expected, 1e-12)


def rotated(vector, place):
    """Rotary embedding: complex numbers that turn, one half with x and the other with y."""
    real, imaginary = vector[0::2], vector[1::2]
    wavelengths = torch.from_numpy(np.geomspace(0.08, 1.3, 3))
    angles = torch.outer(place, 2 * math.pi / wavelengths)
    return (real + 1j * imaginary) * torch.exp(1j * angles.flatten())


def test_logits_of_placed_attention_fall_with_squared_distance():
    attention, x, context, x_coords, context_coords, log_w = attention_problem(placed=True)
    attention.log_reach.copy_(torch.tensor([0.03, 0.06]).log())

    def logit(head, i, j, q, k):
        p_i, p_j = x_coords[0, i], context_coords[0, j]
        alike = torch.vdot(rotated(k, p_j), rotated(q, p_i)).real / math.sqrt(12)
        distance = math.dist(p_i, p_j)
        reach = [0.03, 0.06][head]
        return alike - distance**2 / (2 * reach**2) + log_w[0, j]

    got = attention(x, context, x_coords, context_coords, log_w)
    close(got, attention_by_hand(attention, x, context, logit), 1e-5)


def test_without_log_w_all_weights_are_multiplied_by_1():
    for placed in (False, True):
        attention, *problem, log_w = attention_problem(placed)
        close(attention(*problem), attention(*problem, 0 * log_w), 1e-12)


def kernel_regression(asked, places, values, reach):
    """A mean of the values with Gaussian weights. Nadaraya (1964), Watson (1964)."""
    squared = torch.cdist(asked, places) ** 2
    weights = torch.exp(-squared / (2 * reach**2))
    return weights @ values / weights.sum(2, keepdim=True)


def test_while_to_q_is_zero_placed_attention_is_kernel_regression():
    attention = nf_denoiser.Attention(16, 4, placed=True)
    torch.nn.init.zeros_(attention.to_q.weight)
    torch.nn.init.eye_(attention.to_v.weight)
    torch.nn.init.eye_(attention.to_out.weight)
    torch.nn.init.zeros_(attention.to_out.bias)
    asked, places = torch.rand(1, 50, 2), torch.rand(1, 300, 2)
    values = torch.randn(1, 300, 16)
    expected = []
    for reach, part in zip((0.7, 1.251, 2.237, 4), values.chunk(4, 2)):  # a part for each head
        expected.append(kernel_regression(asked, places, part, reach / 31))
    expected = torch.cat(expected, 2)
    x = torch.randn(1, 50, 16)
    close(attention(x, values, asked, places), expected, 0.01)
    with torch.autocast("cpu", torch.bfloat16):  # rounds values, not distances
        close(attention(x, values, asked, places), expected, 0.04)


def test_attention_refuses_vectors_that_cannot_be_split():
    raises(ValueError, lambda: nf_denoiser.Attention(32, 3), 32, 3)
    nf_denoiser.Attention(24, 4)
    raises(ValueError, lambda: nf_denoiser.Attention(24, 4, placed=True), 24, 16)


# Perceiver IO: inputs -> latents -> answers to queries


def small_perceiver(num_latents):
    torch.manual_seed(0)
    net = nf_denoiser.PerceiverIO(input_dim=5, query_dim=6, output_dim=2, num_latents=num_latents,
                                  latent_dim=16, num_blocks=2, num_heads=2)
    return net.double().eval()


def perceiver_problem():
    """inputs, input_coords, queries, query_coords, log_w, for two images."""
    torch.manual_seed(1)
    shapes = (2, 30, 5), (2, 30, 2), (2, 20, 6), (2, 20, 2), (2, 1)
    return [torch.rand(shape).double() for shape in shapes]


def block_by_hand(block, x, x_coords, context, context_coords, log_w=None):
    y = block.attention(block.norm_x(x), context, x_coords, context_coords, log_w)
    x = x + y
    return x + block.mlp(block.norm_mlp(x))


def perceiver_by_hand(net, inputs, input_coords, queries, query_coords, log_w):
    inputs = net.embed_inputs(inputs)
    queries = net.embed_queries(queries)
    context = net.encoder.norm_context(torch.cat([inputs, queries], 1))
    context_coords = torch.cat([input_coords, query_coords], 1)
    log_w = torch.cat([torch.zeros(2, 30), log_w.expand(2, 20)], 1)
    x, x_coords = inputs, input_coords  # a latent starts as its pixel
    if net.latents is not None:
        x, x_coords = net.latents.expand(2, -1, -1), None
    x = block_by_hand(net.encoder, x, x_coords, context, context_coords, log_w)
    for block in net.processor:
        x = block_by_hand(block, x, x_coords, block.norm_x(x), x_coords)
    latents = net.decoder.norm_context(x)
    x = block_by_hand(net.decoder, queries, query_coords, latents, x_coords)
    return net.to_values(net.norm_out(x))


def test_perceiver_written_out():
    """Placed latents, and free ones as in the paper; answers and gradients."""
    for num_latents in (None, 4):
        net = small_perceiver(num_latents)
        problem, weights = perceiver_problem(), list(net.parameters())
        got, expected = net(*problem), perceiver_by_hand(net, *problem)
        close(got, expected, 1e-12)
        got = torch.autograd.grad(got.sum(), weights)
        expected = torch.autograd.grad(expected.sum(), weights)
        for a, b in zip(got, expected):
            close(a, b, 1e-9)


def test_without_log_w_latents_do_not_read_the_queries():
    for num_latents in (None, 4):
        net = small_perceiver(num_latents)
        *problem, log_w = perceiver_problem()
        close(net(*problem), perceiver_by_hand(net, *problem, log_w - 1e9), 1e-12)


def test_every_attention_of_a_placed_perceiver_is_placed_and_no_other():
    for num_latents in (None, 4):
        placed = []
        for module in small_perceiver(num_latents).modules():
            if isinstance(module, nf_denoiser.Attention):
                placed.append(module.log_reach is not None)
        assert placed == [num_latents is None] * 4  # encoder, two blocks, decoder


def test_free_latents_do_not_use_coordinates():
    net = small_perceiver(num_latents=4)
    inputs, input_coords, queries, query_coords, log_w = perceiver_problem()
    expected = net(inputs, input_coords, queries, query_coords, log_w)
    got = net(inputs, 1 - input_coords, queries, query_coords**2, log_w)
    assert torch.equal(got, expected)


def test_the_order_of_the_input_does_not_matter():
    for num_latents in (None, 4):
        net = small_perceiver(num_latents)
        inputs, input_coords, *others = perceiver_problem()
        expected = net(inputs, input_coords, *others)
        order = torch.randperm(30)
        close(net(inputs[:, order], input_coords[:, order], *others), expected, 1e-12)


def test_a_placed_perceiver_sees_differences_of_coordinates_alone():
    """Coordinates themselves are in the Fourier features, which stay the same here."""
    net = small_perceiver(num_latents=None)
    inputs, input_coords, queries, query_coords, log_w = perceiver_problem()
    expected = net(inputs, input_coords, queries, query_coords, log_w)
    shift = torch.tensor([0.2, -0.1])
    got = net(inputs, input_coords + shift, queries, query_coords + shift, log_w)
    close(got, expected, 1e-10)
    got = net(inputs, input_coords + shift, queries, query_coords, log_w)
    assert (got - expected).abs().max() > 0.1


def large_answers(model):
    """Weights of the last layers start small; large ones show what they multiply."""
    for name, module in model.named_modules():
        if name.endswith("to_values"):
            torch.nn.init.normal_(module.weight)
    return model


def test_a_placed_perceiver_takes_coordinates_as_they_are():
    model = large_answers(tiny_field(("perceiver",)))
    model.fourier.B.zero_()  # leaves what attention does
    x_t, _, t, _, values = random_problem()
    out, coords = torch.rand(2, 20, 2), torch.rand(2, 30, 2)
    rounded_out, rounded_coords = (31 * out).round() / 31, (31 * coords).round() / 31
    exact = model(x_t, out, t, coords, values)
    for got in (model(x_t, rounded_out, t, coords, values),
                model(x_t, out, t, rounded_coords, values)):
        assert (got - exact).abs().max() > 0.01


def test_unet_written_out():
    torch.manual_seed(0)
    net = nf_denoiser.UNet(3, widths=(4, 6, 8)).double()
    x = normal64(2, 3, 8, 12)

    def conv(layer, x, stride=1, padding=1):
        return F.conv2d(x, layer.weight, layer.bias, stride, padding)

    def up(layer, x):
        x = conv(layer, x.relu(), padding=0)  # 1 x 1
        x = x.repeat_interleave(2, dim=2)
        return x.repeat_interleave(2, dim=3)

    full = conv(net.first, x)
    full = full + conv(net.before[0], full.relu())
    half = conv(net.down[0], full.relu(), stride=2)
    half = half + conv(net.before[1], half.relu())
    quarter = conv(net.down[1], half.relu(), stride=2)
    quarter = quarter + conv(net.before[2], quarter.relu())
    y = quarter + conv(net.bottom, quarter.relu())
    y = half + up(net.up[1], y)
    y = y + conv(net.after[1], y.relu())
    y = full + up(net.up[0], y)
    y = y + conv(net.after[0], y.relu())
    close(net(x), y, 1e-12)


# Posterior mean of a Gaussian random field: C W^T (W C W^T + D)^-1 y


def bilinear_weights(coords, width, height):
    """W (N, height * width): W @ image.flatten() reads the image at N places in [0, 1]^2."""
    size = np.array([width - 1, height - 1])
    x, y = np.split(np.asarray(coords) * size, 2, axis=1)
    along_x = np.maximum(0, 1 - abs(x - np.arange(width)))   # (N, width)
    along_y = np.maximum(0, 1 - abs(y - np.arange(height)))  # (N, height)
    W = along_y[:, :, None] * along_x[:, None]
    return W.reshape(len(W), -1)


def test_independent_pixels_off_the_grid_do_not_add_up():
    """An input and a noisy output with the same nearest pixel: either is shown, not their sum."""
    prior = nf_denoiser.IndependentPixels(8)
    coords, value = torch.tensor([[[3.2, 5.1]]]) / 7, torch.full((1, 1, 1), 0.5)
    noise_variance = torch.full((1, 1, 1), 1e-6)
    image, y_out, _ = prior(coords, value, coords + 0.01, value, noise_variance)
    close(y_out, value, 1e-4)
    close(image[0, 0, 5, 3], 0.5, 1e-4)
    assert (image != 0).sum() == 1


def test_coordinates_with_too_few_dimensions_get_one_error():
    model = tiny_field()
    x_t, out, t, coords, values = random_problem()
    for bad in ((x_t, out[0], t, coords, values), (x_t, out, t, coords[0, 0], values)):
        raises(ValueError, lambda: model(*bad), "need the shapes")


def numpy_posterior(C, W, y, D):
    """Rasmussen & Williams, eq. 2.25: values y = W image + noise, of variances D."""
    K = W @ C @ W.T + np.diag(D)
    return C @ W.T @ np.linalg.solve(K, y)


def numpy_variance(C, W, y):
    """The most likely scale of C, as if two more values of variance 0.05 had been seen."""
    K = W @ C @ W.T + 1e-3 * np.eye(len(y))
    squares = y @ np.linalg.solve(K, y) + 2 * 0.05
    return squares / (len(y) + 2)


def places_of_17_by_17(steps):
    """50 multiples of 1 / steps: a power of 2, so that these floats are exact."""
    places = torch.randint(steps + 1, (50, 2), generator=seeded())
    places[0] = steps        # the last corner
    places[1] = places[0]    # one place among the input twice,
    places[40] = places[2]   # one in input and output,
    places[41] = places[42]  # one twice among the output
    return places / steps


def field_against_numpy(places):
    """The first 30 values are clean, the last 20 noisy; three channels."""
    rng = np.random.default_rng(0)
    A = rng.normal(size=(289, 400))
    C = A @ A.T / 400  # a covariance of no special form
    y = rng.normal(0, 0.4, (50, 3))
    noise_variance = torch.full((1, 1, 1), 0.8, dtype=torch.float64)
    field = nf_denoiser.GaussianField(torch.from_numpy(C))
    y_in, y_t = torch.from_numpy(y)[None].split([30, 20], dim=1)
    where = places[None, :30], y_in, places[None, 30:]
    clean = field(*where)
    noisy = field(*where, y_t, noise_variance)
    W = bilinear_weights(places, 17, 17)
    for c in range(3):
        variance = numpy_variance(C, W[:30], y[:30, c])
        D = np.full(50, 1e-3)       # in units of the variance
        D[30:] = 0.8 / variance
        for n, (image, y_out, got_variance) in ((30, clean), (50, noisy)):
            expected = numpy_posterior(C, W[:n], y[:n, c], D[:n])
            close(image[0, c].flatten(), expected, 1e-9)
            close(y_out[0, :, c], W[30:] @ expected, 1e-5)
            close(got_variance[0, 0, c], variance, 1e-9)


def test_on_the_grid_the_gaussian_field_is_the_textbook_posterior():
    field_against_numpy(places_of_17_by_17(steps=16))


def test_off_the_grid_the_gaussian_field_is_read_bilinearly():
    field_against_numpy(places_of_17_by_17(steps=1024))


def test_exponential_covariance_against_numpy():
    line = np.arange(5) / 4
    x, y = np.meshgrid(line, line)
    x, y = x.ravel(), y.ravel()
    distance = np.hypot(x[:, None] - x, y[:, None] - y)
    default = nf_denoiser.exponential_covariance(5)
    close(default, np.exp(-distance * 31 / 16), 1e-6)
    longer = nf_denoiser.exponential_covariance(5, length=2)
    close(longer, np.exp(-distance / 2), 1e-6)


def test_pixel_covariance_against_numpy():
    leaves, _ = data.make_leaves(1100, 3)
    images = leaves[..., :8, :8].contiguous()
    x = images.double().numpy() / 127.5 - 1
    with_mirrored = np.concatenate([x, x[..., ::-1]])
    vectors = with_mirrored.reshape(-1, 64)
    C = vectors.T @ vectors
    close(nf_denoiser.pixel_covariance(images), C / np.diag(C).mean(), 1e-5)


def test_a_covariance_that_is_none_is_refused():
    for covariance in (-torch.eye(1024), 1 - 2 * torch.eye(1024)):
        model = tiny_field(("gaussian",), covariance=covariance)
        raises(torch.linalg.LinAlgError, lambda: model(*random_problem()))


def test_independent_pixels_are_a_field_with_the_identity_as_covariance():
    x_t, out, _, coords, values = random_problem()
    pixels = nf_denoiser.IndependentPixels(side=32)
    field = nf_denoiser.GaussianField(torch.eye(1024))
    field.jitter = 0
    noise_variance = torch.tensor([0.1, 9.0])[:, None, None]
    for noisy in ((), (x_t, noise_variance)):
        got = pixels(coords, values, out, *noisy)
        expected = field(coords, values, out, *noisy)
        for a, b in zip(got, expected):  # image, values at the outputs, variance
            close(a, b, 1e-5)


def test_without_measurements_the_field_has_the_exponential_covariance():
    expected = nf_denoiser.exponential_covariance(32)
    assert torch.equal(tiny_field(("gaussian",)).prior.covariance, expected)
    assert isinstance(tiny_field(("unet",)).prior, nf_denoiser.IndependentPixels)


# The model by hand: mean + y_out + std * (unet + perceiver), for pixels on the grid and beside it

OFFSETS = 0, 0.4 / 31, -0.4 / 31  # the nearest pixel stays the same
FORWARD_CASES = list(itertools.product((nf_denoiser.PARTS, ("unet", "perceiver")), OFFSETS))


def forward_by_hand(parts, offset):
    """What the model answered and what its networks were given, and all that comes before them."""
    model, given = large_answers(tiny_field(parts)), {}
    for network in (model.unet, model.perceiver):
        network.register_forward_pre_hook(lambda module, inputs: given.update({module: inputs}))
    x_t, out, _, coords, values = random_problem(seed=1)
    t = torch.tensor([100, 600])
    with torch.no_grad():
        x_0_hat = model(x_t, out + offset, t, coords + offset, values)
    image, = given[model.unet]
    out, coords = (out + offset).clamp(0, 1), (coords + offset).clamp(0, 1)
    bar = schedule.DiffusionSchedule().alphas_cumprod[t].float()[:, None, None]
    # brightness, red against blue, green against both; the columns have length 1
    colours = torch.tensor([[1, 1, 1], [1, 0, -2], [1, -1, 1]]) / torch.tensor([3, 2, 6]).sqrt()
    x_in = values @ colours
    mean = x_in.mean(1, keepdim=True)
    y_in = x_in - mean
    y_t = x_t @ colours / bar.sqrt() - mean
    noise_variance = 1 / bar - 1
    y_image, y_out, variance = model.prior(coords, y_in, out, y_t, noise_variance)
    contrast = variance.sqrt()
    return types.SimpleNamespace(**locals())  # by these names


def features_by_hand(h):
    """The U-Net's image, read bilinearly at the output coordinates."""
    image = h.model.unet(h.image).flatten(2)
    W = np.stack([bilinear_weights(coords, 32, 32) for coords in h.out])
    features = torch.from_numpy(W).float() @ image.mT
    return features.relu()


def plane(coords, values):
    """Two images with a value at the pixels nearest to coords, else 0."""
    image = torch.zeros(2, 32, 32)
    for b in range(2):
        column, row = (31 * coords[b]).round().long().unbind(1)
        image[b, row, column] = values[b]
    return image


def test_what_the_unet_is_given():
    for case in FORWARD_CASES:
        h = forward_by_hand(*case)
        scale = h.contrast.view(2, 3, 1, 1)
        close(h.image[:, :3], h.y_image / scale, 1e-4)
        where_in, where_out, signal = h.image[:, 3:].unbind(1)
        close(where_in, plane(h.coords, [1, 1]), 0)
        close(where_out, plane(h.out, h.bar.flatten()), 1e-6)
        close(signal, h.bar.sqrt().expand(2, 32, 32), 1e-6)


def test_what_the_perceiver_is_given():
    for case in FORWARD_CASES:
        h = forward_by_hand(*case)
        inputs, input_coords, queries, query_coords, log_w = h.given[h.model.perceiver]
        time = h.model.embed_time(h.t)[:, None]
        expected = [h.model.fourier(h.coords), h.y_in / h.contrast, time.expand(2, 30, 64)]
        close(inputs, torch.cat(expected, 2), 1e-4)
        expected = [h.model.fourier(h.out), h.y_out / h.contrast, time.expand(2, 20, 64),
                    features_by_hand(h)]
        close(queries, torch.cat(expected, 2), 1e-4)
        assert torch.equal(input_coords, h.coords)
        assert torch.equal(query_coords, h.out)
        close(log_w, h.bar[:, 0].log(), 1e-6)


def test_x_0_hat_is_the_mean_and_networks_times_std():
    for case in FORWARD_CASES:
        h = forward_by_hand(*case)
        unexplained = h.variance * (0.07 if "gaussian" in h.parts else 0.36)
        std = (1 / unexplained + 1 / h.noise_variance) ** -0.5
        answer = h.model.unet_to_values(features_by_hand(h))
        answer = answer + h.model.perceiver(*h.given[h.model.perceiver])
        x_0_hat = h.mean + h.y_out + std * answer
        close(h.x_0_hat, x_0_hat @ h.colours.T, 1e-4)


# What every model does


def combinations_of_parts():
    for count in (1, 2, 3):
        yield from itertools.combinations(nf_denoiser.PARTS, count)


def test_every_combination_of_parts_answers_for_every_output_pixel():
    for parts in combinations_of_parts():
        for channels in (1, 3):
            model = tiny_field(parts, channels)
            x_0_hat = model(*random_problem(channels=channels))
            assert x_0_hat.shape == (2, 20, channels) and x_0_hat.isfinite().all()
            assert (model.unet is not None) == ("unet" in parts)
            assert (model.perceiver is not None) == ("perceiver" in parts)


def test_every_weight_learns():
    for parts in combinations_of_parts():
        for num_latents in (None, 8):
            model = tiny_field(parts, num_latents=num_latents, num_blocks=2)
            x_0_hat = model(*random_problem())
            if parts == ("gaussian",):
                assert not x_0_hat.requires_grad and not list(model.parameters())
                continue
            x_0_hat.square().mean().backward()
            for name, weight in model.named_parameters():
                assert weight.grad.abs().max() > 0, (parts, name)


def test_the_weights_of_the_last_layers_start_small():
    model = tiny_field()
    for layer in (model.unet_to_values, model.perceiver.to_values):
        close(layer.weight.std(), 0.01, 0.005)


def test_only_the_perceiver_has_dropout():
    for parts in combinations_of_parts():
        model = tiny_field(parts, dropout=0.5)
        in_training = model.train()(*random_problem())
        evaluated = model.eval()(*random_problem())
        assert torch.equal(in_training, evaluated) == ("perceiver" not in parts)


def test_bf16_autocast_stays_close():
    """The Gaussian field's linear algebra is not rounded at all."""
    for parts in combinations_of_parts():
        model = tiny_field(parts)
        exact = model(*random_problem())
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model(*random_problem())
        assert rounded.dtype == torch.float32
        close(rounded, exact, 0 if parts == ("gaussian",) else 0.01)


def test_t_may_be_float():
    """As in the document. It is rounded down."""
    model = large_answers(tiny_field())
    x_t, out, t, coords, values = random_problem()
    expected = model(x_t, out, t, coords, values)
    for same in (t.float(), t + 0.9):
        assert torch.equal(model(x_t, out, same, coords, values), expected)


def test_at_the_last_timestep_x_t_does_not_matter():
    for parts in combinations_of_parts():
        model = large_answers(tiny_field(parts))
        x_t, out, t, *given = random_problem()
        last = torch.full_like(t, 999)
        pure_noise = model(None, out, last, *given)
        for noise_ in (x_t, -3 * x_t):
            close(model(noise_, out, last, *given), pure_noise, 5e-3)
        early = model(x_t, out, last // 3, *given)
        assert (early - pure_noise).abs().max() > 0.05


def test_images_of_a_batch_do_not_mix():
    model = large_answers(tiny_field())
    problem = random_problem(batch=3)
    alone = [x[1:2] for x in problem]
    close(model(*alone), model(*problem)[1:2], 1e-4)


def test_from_pure_noise_output_pixels_do_not_mix():
    """The U-Net sees which pixels are asked, so this is about the other parts."""
    model = large_answers(tiny_field(("gaussian", "perceiver")))
    _, out, t, *given = random_problem()
    together = model(None, out, t, *given)
    close(model(None, out[:, :3], t, *given), together[:, :3], 1e-4)


def test_any_number_of_pixels_anywhere():
    model = tiny_field()
    for n_in, n_out in ((1, 1), (1, 7), (50, 3), (204, 204)):
        x_t, out, t, coords, values = random_problem(3, n_in, n_out)
        off_grid = coords**2
        for places in (coords, off_grid):
            x_0_hat = model(x_t, out, t, places, values)
            assert x_0_hat.shape == (3, n_out, 3) and x_0_hat.isfinite().all()


def test_wrong_shapes_get_one_ValueError():
    """Each argument, shortened along each of its dimensions."""
    model = tiny_field()
    problem = random_problem()
    for i, x in enumerate(problem):
        for dim, size in enumerate(x.shape):
            wrong = list(problem)
            wrong[i] = x.narrow(dim, 0, size - 1)
            raises(ValueError, lambda: model(*wrong), "shapes")
    x_t, out, t, coords, values = problem
    raises(ValueError, lambda: model(x_t, out, t, coords[:, :0], values[:, :0]), "at least one")
    raises(ValueError, lambda: model(None, out[:1], t, coords, values), "shapes")


def test_unknown_parts_and_odd_sides_are_refused():
    for parts in ((), ("gaussian", "nose"), "unet"):
        raises(ValueError, lambda: tiny_field(parts), "gaussian, unet, perceiver")
    raises(ValueError, lambda: tiny_field(side=33), 2, 33)  # the U-Net cannot halve it
    tiny_field(("gaussian", "perceiver"), side=33)


def test_the_full_size_has_the_perceiver_of_the_document():
    bars = schedule.DiffusionSchedule().alphas_cumprod
    by_default = nf_denoiser.NFDenoiser(bars)
    assert by_default.perceiver.latents.shape == (512, 512)
    assert len(by_default.perceiver.processor) == 6
    assert by_default.perceiver.encoder.attention.num_heads == 8
    assert by_default.perceiver.encoder.mlp[-1].p == 0.1
    assert by_default.fourier.B.shape == (2, 256)
    full = nf_denoiser.NFDenoiser(bars, **nf_denoiser.SIZES["full"])
    assert repr(full) == repr(by_default)


def test_nf_denoiser_prints_the_parameters_of_each_part():
    with folder() as root:
        printed = works(nf_denoiser, "").replace(",", "")
        assert not files_in(root)
    for name, config in nf_denoiser.SIZES.items():
        model = nf_denoiser.NFDenoiser(torch.ones(9), **config)
        count = lambda module: sum(weight.numel() for weight in module.parameters())
        section = printed.split(f"{name}: ")[1].splitlines()
        assert section[0].startswith(f"{count(model)} parameters")
        figures = dict(line.split() for line in section[1:7])
        assert int(figures["unet"]) == count(model.unet)
        assert int(figures["perceiver"]) == count(model.perceiver)


# ------------------------------------------------------------------ loss, samplers, evaluation


def a_split(batch=4):
    images, _ = data.make_leaves(batch, 0)
    return data.sparse_split(images, generator=seeded())


def error_of(model, split, x_t, t):
    """The mean squared error of x_0_hat."""
    x_0_hat = model(x_t, split["output_coords"], t, split["input_coords"], split["input_values"])
    return (x_0_hat - split["output_values"]).square().mean()


def test_loss_of_a_random_timestep_written_out():
    """DDPM, algorithm 1, for x_0 instead of eps."""
    model, split, sched = tiny_field(), a_split(), schedule.DiffusionSchedule()
    x_0 = split["output_values"]
    torch.manual_seed(5)
    loss = nf_denoiser.nf_loss(model, sched, split, pure_noise=False)
    torch.manual_seed(5)
    t = torch.randint(0, 1000, (4,))
    eps = torch.randn(x_0.shape)
    alpha_bar = sched.alphas_cumprod[t].float()[:, None, None]
    x_t = alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * eps
    close(loss, error_of(model, split, x_t, t), 1e-5)


def test_loss_of_pure_noise_written_out():
    """t = T - 1, where x_t is not even made. This trains the one-step mean."""
    model, split, sched = tiny_field(), a_split(), schedule.DiffusionSchedule(50)
    loss = nf_denoiser.nf_loss(model, sched, split, pure_noise=True)
    t = torch.full((4,), 49)
    close(loss, error_of(model, split, None, t), 1e-6)


def test_losses_of_shares_of_a_batch_average_to_its_loss():
    """Each of several processes draws t and noise for all rows, and uses its own."""
    model, split, sched = tiny_field(), a_split(), schedule.DiffusionSchedule()

    def loss(rows, pure_noise):
        torch.manual_seed(5)
        return nf_denoiser.nf_loss(model, sched, split, pure_noise, rows)

    for pure_noise in (True, False):
        first, second = loss(slice(0, 2), pure_noise), loss(slice(2, 4), pure_noise)
        close((first + second) / 2, loss(slice(None), pure_noise), 1e-5)
        assert abs(first - second) > 1e-4


def test_the_documents_training_loop():
    """As in the notebook, with the float timesteps and the names that it uses."""
    model = tiny_field(("unet", "perceiver"))
    sched = schedule.DiffusionSchedule(timesteps=1000)
    split = a_split(8)
    output_coords, output_values = split["output_coords"], split["output_values"]
    input_coords, input_values = split["input_coords"], split["input_values"]

    def loss_of_one_draw():
        torch.manual_seed(5)
        return nf_denoiser.nf_loss(model.eval(), sched, split, pure_noise=False).item()

    before = loss_of_one_draw()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    B = len(output_values)
    for step in range(12):
        t = torch.randint(0, sched.timesteps, (B,)).float()
        noise = torch.randn_like(output_values)
        sqrt_alpha_t = sched.sqrt_alphas_cumprod[t.long()].view(B, 1, 1)
        sqrt_one_minus_alpha_t = sched.sqrt_one_minus_alphas_cumprod[t.long()].view(B, 1, 1)
        noisy_output = sqrt_alpha_t * output_values + sqrt_one_minus_alpha_t * noise
        predicted = model(noisy_output, output_coords, t, input_coords, input_values)
        loss = F.mse_loss(predicted, output_values)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = loss_of_one_draw()
    assert after < 0.9 * before, (before, after)


def test_the_documents_sampling():
    split = a_split()
    sched = schedule.DiffusionSchedule()
    output_coords = split["output_coords"]
    input_coords, input_values = split["input_coords"], split["input_values"]
    samples = nf_denoiser.ddim_sample(tiny_field(), sched, output_coords, input_coords,
                                      input_values, num_steps=5, eta=0.0)
    error = samples - split["output_values"]
    assert error.square().mean() < 0.5 * split["output_values"].square().mean()


def test_the_one_step_mean_averages_the_image_and_its_mirror_image():
    sched = schedule.DiffusionSchedule(20)
    out, coords, values = torch.rand(2, 5, 2), torch.rand(2, 3, 2), torch.rand(2, 3, 1)
    calls, weight = [], torch.ones(1, requires_grad=True)

    def model(*given):
        calls.append(given)
        output_coords = given[1]
        return weight * output_coords**2

    mean = nf_denoiser.one_step_mean(model, sched, out, coords, values)
    mirror = lambda places: torch.stack([1 - places[..., 0], places[..., 1]], 2)
    close(mean, (out**2 + mirror(out) ** 2) / 2, 1e-6)
    assert not mean.requires_grad
    plain, mirrored = calls
    assert torch.equal(plain[3], coords) and torch.equal(mirrored[3], mirror(coords))
    for x_t, _, t, _, input_values in calls:
        assert x_t is None and t.tolist() == [19, 19] and input_values is values


def model_and_where():
    """A model that answers 0.9 x_t + t where it is to be asked, and these output and inputs."""
    where = torch.rand(2, 5, 2), torch.rand(2, 3, 2), torch.rand(2, 3, 1)

    def model(x_t, output_coords, t, input_coords, input_values):
        given = output_coords, input_coords, input_values
        assert all(a is b for a, b in zip(given, where))
        return nine_tenths_plus_t(x_t, t)

    return model, where


def test_ddim_sample_starts_from_noise_at_the_output_pixels():
    sched = schedule.DiffusionSchedule(20)
    model, where = model_and_where()
    g, told = seeded(), []
    x_T = torch.randn(2, 5, 1, generator=g)  # a number for each output pixel and channel
    expected = schedule.ddim(nine_tenths_plus_t, sched, x_T, 4, 0.5, g)
    got = nf_denoiser.ddim_sample(model, sched, *where, num_steps=4, eta=0.5, generator=seeded(),
                                  on_step=record(told))
    assert torch.equal(got, expected) and len(told) == 4


def test_ddim_sample_takes_50_steps_without_new_noise_by_default():
    sched = schedule.DiffusionSchedule(100)
    model, where = model_and_where()
    torch.manual_seed(0)
    got = nf_denoiser.ddim_sample(model, sched, *where)
    torch.manual_seed(0)
    x_T = torch.randn(2, 5, 1)
    expected = schedule.ddim(nine_tenths_plus_t, sched, x_T, num_steps=50, eta=0)
    assert torch.equal(got, expected)


def test_ddpm_sample_takes_all_steps():
    sched = schedule.DiffusionSchedule(20)
    model, where = model_and_where()
    g, told = seeded(), []
    x_T = torch.randn(2, 5, 1, generator=g)
    expected = schedule.ddpm(nine_tenths_plus_t, sched, x_T, generator=g)
    got = nf_denoiser.ddpm_sample(model, sched, *where, generator=seeded(), on_step=record(told))
    assert torch.equal(got, expected) and len(told) == 20


def test_nearest_and_inverse_distance_by_hand():
    coords, values = torch.tensor([[[0.0, 0.0], [1.0, 0.0]]]), torch.tensor([[[1.0], [3.0]]])
    query = torch.tensor([[[0.2, 0.0], [0.9, 0.1], [0.5, 0.7]]])
    close(sample.nearest(query, coords, values), [[[1.0], [3.0], [1.0]]], 0)
    got = sample.inverse_distance(query, coords, values, power=2)
    close(got[0, 0], [(1 / 0.04 + 3 / 0.64) / (1 / 0.04 + 1 / 0.64)], 1e-5)
    close(got[0, 2], [2.0], 1e-5)
    query[:, 1:] = coords  # the inputs themselves
    got = sample.inverse_distance(query, coords, values)  # power 4
    close(got[0, :, 0], [(256 + 3) / (256 + 1), 1, 3], 1e-5)


def test_kriging_against_numpy():
    for side in (32, 8):
        images = data.make_leaves(1, 3)[0][..., :side, :side]
        split = data.sparse_split(images, 0.1, None)
        K = nf_denoiser.exponential_covariance(side)
        where = split["output_coords"], split["input_coords"], split["input_values"]
        W = bilinear_weights(split["input_coords"][0], side, side)
        outputs = split["output_indices"][0].numpy()
        for c in range(3):
            x_in = split["input_values"][0, :, c].double().numpy()
            noise_ = np.full(len(x_in), 1e-3)
            image = numpy_posterior(K.double().numpy(), W, x_in - x_in.mean(), noise_) + x_in.mean()
            close(sample.kriging(*where, K)[0, :, c], image[outputs], 1e-3)


def drawing(model, sched, seed=0, **options):
    """draw(output_coords, input_coords, input_values, on_step=None) by DDIM."""
    generator = seeded(seed)

    def draw(*where, on_step=None):
        return nf_denoiser.ddim_sample(model, sched, *where, generator=generator, on_step=on_step,
                                       **options)
    return draw


def where(split):
    return split["output_coords"], split["input_coords"], split["input_values"]


def coordinates_as_colours(x_t, output_coords, *_):
    """A stand-in for a model, whose answers are partly above 1."""
    return torch.cat([output_coords, output_coords[..., :1]], 2) * 3 - 1


def test_every_row_of_the_table_worked_out_again():
    images, sched, answer = data.make_leaves(5, 7)[0], schedule.DiffusionSchedule(20), \
        coordinates_as_colours
    draw = drawing(answer, sched, num_steps=2)
    table = sample.evaluate_field(answer, sched, images, draw, seed=3, batch=2)
    assert list(table) == ["one-step mean", "sample", "kriging", "inverse distance", "nearest"]
    split = data.sparse_split(images, 0.2, None, order=data.fixed_order(3, torch.arange(5), 1024))
    coords, places, truth = split["output_coords"], split["output_indices"], split["full_image"]
    mirrored = coords * torch.tensor([-1.0, 1]) + torch.tensor([1.0, 0])
    plain = answer(None, coords)
    mean = (plain + answer(None, mirrored)) / 2
    K = nf_denoiser.exponential_covariance(32)
    answers = {"one-step mean": mean, "sample": torch.cat([plain[:, :204], mean[:, 204:]], 1),
               "kriging": sample.kriging(*where(split), K),
               "nearest": sample.nearest(*where(split)),
               "inverse distance": sample.inverse_distance(*where(split))}
    for name, values in answers.items():
        index = places[:, None].expand(-1, 3, -1)
        image = truth.flatten(2).scatter(2, index, values.clamp(-1, 1).mT).view_as(truth)
        measured = index[:, :, :204]
        error = (image - truth).flatten(2).gather(2, measured).double() / 2
        close(table[name]["mse"], error.square().mean(), 1e-6)
        close(table[name]["mae"], error.abs().mean(), 1e-6)
        close(table[name]["psnr"], -10 * error.square().mean().log10(), 1e-3)
        close(table[name]["ssim"], noise.ssim(image / 2 + 0.5, truth / 2 + 0.5).mean(), 1e-5)


def test_without_a_sampler_there_is_no_row_of_samples():
    images, sched = data.make_leaves(2, 7)[0], schedule.DiffusionSchedule(20)
    table = sample.evaluate_field(coordinates_as_colours, sched, images)
    assert list(table) == ["one-step mean", "kriging", "inverse distance", "nearest"]


def test_images_of_one_batch_or_several_have_the_same_figures():
    images, sched = data.make_leaves(5, 7)[0], schedule.DiffusionSchedule(20)
    for options in ({}, dict(pixels="anywhere", full=True)):
        tables = []
        for batch in (2, 25):
            tables.append(sample.evaluate_field(coordinates_as_colours, sched, images, batch=batch,
                                                **options))
        equal(*tables, 1e-5)


def recorded_questions(draws, n_drawn, **options):
    """What a model is asked while a split of 5 images is reconstructed: (split, answers, asked)."""
    images, sched, asked = data.make_leaves(5, 7)[0], schedule.DiffusionSchedule(20), []

    def model(*given):
        asked.append(given)
        return coordinates_as_colours(*given)

    split, n_out = sample.split_images(images, torch.arange(5), 3, **options)
    assert n_out == n_drawn
    return split, sample.reconstruct(model, sched, split, draws(model, sched), n_out), asked


def test_the_rest_of_the_image_is_the_mean_given_the_input_and_the_sample():
    draws = lambda model, sched: drawing(model, sched, num_steps=2)
    split, answers, asked = recorded_questions(draws, 204)
    assert [x_t is None for x_t, *_ in asked] == [1, 1, 0, 0, 1, 1]
    for _, _, _, input_coords, input_values in asked:
        assert torch.equal(input_values[:, :204], split["input_values"])
    for x_t, coords, *_ in asked[2:4]:  # the steps of the sampler
        assert x_t.shape[1] == 204 and torch.equal(coords, split["output_coords"][:, :204])
    _, coords, t, input_coords, input_values = asked[4]
    assert (t == 19).all() and torch.equal(coords, split["output_coords"][:, 204:])
    assert torch.equal(input_coords[:, 204:], split["output_coords"][:, :204])
    sampled = coordinates_as_colours(None, split["output_coords"][:, :204]).clamp(-1, 1)
    close(input_values[:, 204:], sampled, 1e-6)
    close(answers["sample"][:, :204], sampled, 1e-6)


def test_full_draws_all_missing_pixels_jointly():
    def draws(model, sched):
        return lambda *where: nf_denoiser.ddpm_sample(model, sched, *where)

    split, answers, asked = recorded_questions(draws, 820, full=True)
    assert len(asked) == 2 + 20  # the mean and its mirror image, all timesteps
    assert all(call[1].shape[1] == 820 for call in asked)


def test_a_split_of_images_has_the_input_where_it_is_wanted():
    images = data.make_leaves(3, 7)[0]
    indices = torch.tensor([7, 0, 2])
    for ratio, n_in, n_out in ((0.2, 204, 204), (0.05, 51, 204), (0.9, 921, 103)):
        split, count = sample.split_images(images, indices, 5, ratio)
        order = data.fixed_order(5, indices, 1024)
        assert torch.equal(split["input_indices"], order.argsort(1)[:, :n_in]) and count == n_out
        split, count = sample.split_images(images, indices, 5, ratio, pixels="anywhere")
        order = data.fixed_order(5, indices, 1024 + 2 * n_in)
        expected = data.off_grid_split(images, ratio, None, order=order)
        assert all(torch.equal(split[key], value) for key, value in expected.items())
        assert count == 204 and split["output_coords"].shape[1] == 1024
        _, count = sample.split_images(images, indices, 5, ratio, True, "anywhere")
        assert count == 1024


def test_the_whole_image_keeps_its_input_pixels():
    split, _ = sample.split_images(data.make_leaves(3, 7)[0], torch.arange(3))
    truth = data.to_unit(split["full_image"])
    values = torch.full_like(split["output_values"], 0.5)
    for count, image in ((0, sample.assemble(split)), (820, sample.assemble(split, values)),
                         (100, sample.assemble(split, values[:, :100]))):
        for i in range(3):
            inputs, outputs = (split[f"{name}_indices"][i] for name in ("input", "output"))
            flat = image[i].flatten(1)
            assert torch.equal(flat[:, inputs], truth[i].flatten(1)[:, inputs])
            assert (flat[:, outputs[:count]] == 0.75).all()
            assert (flat[:, outputs[count:]] == 0.5).all()  # grey


def test_covered_counts_the_middle_ranks():
    samples = torch.arange(1.0, 21)[:, None]  # 1 to 20
    truth = torch.tensor([0.5, 1.5, 2, 10.5, 19, 19.5, 20.5])
    assert sample.covered(samples, truth).tolist() == [0, 1, 1, 1, 1, 1, 0]
    one = torch.ones(4, 1)
    assert sample.covered(one, torch.tensor([1.0])) == 1  # equal to the truth is not beside it
    assert sample.covered(one, torch.tensor([1.1])) == 0


def exact_model(sched, variance):
    """The exact denoiser of pixels that are independent, N(0, variance)."""
    def model(x_t, output_coords, t, input_coords, input_values):
        if x_t is None:
            return torch.zeros(*output_coords.shape[:2], 3)
        bar = sched.alphas_cumprod[t].view(-1, 1, 1).float()
        return variance * bar.sqrt() / (bar * variance + 1 - bar) * x_t
    return model


def test_coverage_of_an_exact_sampler():
    sched = schedule.DiffusionSchedule()
    model = exact_model(sched, 0.09)
    images = 0.3 * torch.randn(4, 3, 32, 32, generator=seeded())
    draw = drawing(model, sched, num_steps=200)
    figures, _ = sample.evaluate_samples(model, sched, images, draw, 32)
    assert abs(figures["coverage"] - 29 / 33) < 0.02, figures  # 29 of the 33 ranks are inside
    assert abs(figures["spread"] - 0.15) < 0.005, figures
    close(figures["psnr_mean"], -10 * math.log10(0.15**2 * 33 / 32), 0.2)


def test_the_figures_of_samples_are_those_of_the_measured_pixels():
    images, sched = data.make_leaves(2, 7)[0], schedule.DiffusionSchedule(20)
    for full, n_out in ((False, 204), (True, 512)):
        values = torch.rand(2, 4, 512, 3, generator=seeded()) * 2 - 1
        given = iter(values)
        draw = lambda coords, *_: next(given)[:, :coords.shape[1]]
        got, rows = sample.evaluate_samples(coordinates_as_colours, sched, images, draw, 4, seed=3,
                                            input_ratio=0.5, full=full)
        split, _ = sample.split_images(images, torch.arange(2), 3, 0.5)
        truth = data.to_unit(split["output_values"])[:, None, :n_out]
        samples = data.to_unit(values)[:, :, :n_out]  # (images, samples, N, C)
        below = (samples < truth).sum(1)
        close(got["coverage"], ((below > 0) & (below < 4)).double().mean(), 1e-6)
        close(got["spread"], samples.std(1).mean(), 1e-6)
        mse = (samples.mean(1) - truth[:, 0]).square().mean()
        close(got["psnr_mean"], -10 * mse.log10(), 1e-3)
        assert len(rows) == 2


# ------------------------------------------------------------------------------------ autoencoder


def glyphs(count=512):
    images, labels = data.make_glyphs(count, 11)
    return images / 255, labels.long()


def answering(answer):
    """A stand-in for a trained autoencoder, so that the right figures are known."""
    return lambda x: (answer(x), x)


def lab_corruption(label, images):
    """What a label of the lab says, with the noise of seed 0."""
    noises = {"gaussian": noise.add_gaussian_noise, "masking": noise.add_masking_noise,
              "salt_pepper": noise.add_salt_pepper_noise}
    generator = seeded()
    if label == "stripes":
        rows = torch.arange(28)[:, None]
        return torch.where(rows % 4 == 0, 1.0, images)
    if label == "clean":
        return images
    for part in label.split(" + "):
        name, strength = part.split()
        images = noises[name](images, float(strength), generator)
    return images


@contextlib.contextmanager
def recorded_grids():
    """A list of (rows, column labels, row labels, picture) of every image_grid drawn meanwhile."""
    grids, draw = [], data.image_grid

    def image_grid(rows, column_labels=(), row_labels=(), **more):
        picture = draw(rows, column_labels, row_labels, **more)
        grids.append((rows, list(column_labels), list(row_labels), picture))
        return picture

    with patched(data, image_grid=image_grid):
        yield grids


@contextlib.contextmanager
def recorded_models():
    """A list of the models of each seed, {label: model}, trained meanwhile."""
    models, train_models = [], autoencoder.train_models

    def record(*arguments, **more):
        models.append(train_models(*arguments, **more))
        return models[-1]

    with patched(autoencoder, train_models=record):
        yield models


def test_the_autoencoder_is_six_matrix_products():
    model, x = autoencoder.DenoisingAutoencoder(), torch.rand(5, 1, 28, 28)
    with torch.no_grad():
        reconstructed, latent = model(x)
        decoded = model.decode(model.encode(x))
    assert reconstructed.shape == x.shape
    assert latent.shape == (5, 64)
    assert torch.equal(decoded, reconstructed.flatten(1))
    layers = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    assert [len(layer.weight) for layer in layers] == [256, 128, 64, 128, 256, 784]
    expected = x.flatten(1).double()
    for i, layer in enumerate(layers):
        expected = expected @ layer.weight.detach().double().T + layer.bias.detach()
        if i == 5:
            expected = expected.sigmoid()
        elif i != 2:  # the latent layer has no ReLU
            expected = expected.relu()
    close(reconstructed.flatten(1), expected, 1e-5)
    raises(ValueError, lambda: model(torch.rand(2, 3, 32, 32)), 784)


def test_the_untrained_output_is_the_mean_image():
    torch.manual_seed(0)
    images, model = glyphs(300)[0], autoencoder.DenoisingAutoencoder()
    mean = images.mean(0)
    with torch.no_grad():
        before = (model(images)[0] - mean).abs().mean()
        model.init_output_bias(images)
        after = (model(images)[0] - mean).abs().mean()
        first = model(0 * images[:1])[0][0]
    assert after < 0.35 * before
    close(first, mean.clamp(0.01, 0.99), 1e-5)


def test_initial_weights_keep_the_mean_square():
    torch.manual_seed(0)
    model = autoencoder.DenoisingAutoencoder()
    hidden = model.encoder[:4](torch.randn(4000, 784)).square().mean()
    assert 0.7 < hidden < 1.4, hidden  # with torch's own weights 1/36, after two ReLUs


def test_every_corruption_does_what_its_label_says():
    x = glyphs(50)[0]
    corruptions = autoencoder.lab_corruptions()
    wanted = {label for on in (autoencoder.TRAINED_ON, autoencoder.TESTED_ON)
              for labels in on.values() for label in labels}
    assert wanted <= set(corruptions)
    close(corruptions["mixed"](x, generator=seeded()), noise.add_mixed_noise(x, seeded()), 0)
    for label, corrupt in corruptions.items():
        if label != "mixed":
            close(corrupt(x, generator=seeded()), lab_corruption(label, x), 0)
            assert label == "clean" or not corrupt(x).equal(x), label


def test_the_noise_of_a_checkpoint_as_a_function():
    x = glyphs(50)[0]
    close(train.corruption("clean")(x), x, 0)
    noisy = train.corruption("mixed")(x, generator=seeded())
    close(noisy, noise.add_mixed_noise(x, seeded()), 0)
    for label in ("gaussian 0.4", "salt_pepper 0.1", "masking 0.7"):
        corrupt = train.corruption(label)
        close(corrupt(x, generator=seeded()), lab_corruption(label, x), 0)
        torch.manual_seed(0)  # without a generator: torch's own random numbers
        close(corrupt(x), lab_corruption(label, x), 0)


def test_the_loss_is_against_the_clean_images():
    clean, noisy = torch.rand(2, 6, 784).unbind(0)
    model = autoencoder.DenoisingAutoencoder()
    loss = autoencoder.autoencoder_loss(model, clean, noisy)
    expected = (model(noisy)[0] - clean).double().square().mean()
    close(loss.detach(), expected.detach(), 1e-6)
    assert loss.requires_grad


def test_a_denoiser_beats_its_control_on_noise_and_loses_on_clean_images():
    images, test = glyphs()[0].split([384, 128])
    noisy = lab_corruption("gaussian 0.5", test)
    labels = ["gaussian 0.5", "clean"]
    models, said = quiet(autoencoder.train_models, labels, images, 0, 40, 128)
    dae, ae = models["gaussian 0.5"], models["clean"]

    def mse(model, x):
        return F.mse_loss(model(x)[0], test).item()

    constant = F.mse_loss(images.mean(0).expand_as(test), test).item()
    assert mse(dae, noisy) < 0.9 * mse(ae, noisy)
    assert mse(dae, noisy) < constant
    assert mse(ae, test) < mse(dae, test)
    assert said.count("trained on") == 2
    assert not dae.training
    assert not any(p.requires_grad for p in dae.parameters())


def test_a_training_that_diverges_says_so():
    images = glyphs(64)[0] / 0
    model = autoencoder.DenoisingAutoencoder()
    raises(ValueError, lambda: autoencoder.train_autoencoder(model, images, lambda x: x), "rate")


def test_the_plain_loop_draws_every_image_once_in_an_epoch():
    """100 images in batches of 32: 3 in an epoch, 4 images left out; new noise for each batch."""
    images, drawn, numbers = torch.rand(100, 784), [], []

    def corrupt(clean):
        drawn.append(clean)
        numbers.append(torch.rand(1).item())
        return clean

    model = autoencoder.DenoisingAutoencoder()
    same, said = quiet(autoencoder.train_autoencoder, model, images, corrupt, 2, 32)
    assert same is model and said.startswith("6 steps, last loss 0.")
    assert [len(batch) for batch in drawn] == [32] * 6
    assert len(set(numbers)) == 6
    first, second = torch.cat(drawn[:3]), torch.cat(drawn[3:])
    assert len(first.unique(dim=0)) == len(second.unique(dim=0)) == 96
    assert not first.equal(second)


def test_the_plain_loop_trains_what_train_py_trains():
    """The same weights, bit for bit; 40 steps, so that 4 warm up."""
    flags = "--epochs 8 --batch-size 64 --seed 1"
    with tiny_sets():
        images = data.load_mnist("data", True)[0] / 255
        for label, named in (("clean", "ae"), ("mixed", "dae --noise mixed"),
                             ("gaussian 0.3", "dae"), ("masking 0.3", "dae --noise masking")):
            models, said = quiet(autoencoder.train_models, [label], images, 1, 8, 64)
            assert said.startswith(f"trained on {label}, seed 1: 40 steps")
            works(train, f"--model {named} --data mnist {flags}")
            got = checkpoint_of(f"out/{named.split()[0]}")
            equal(got["model"], models[label].state_dict())
            assert said.endswith(f"last loss {got['losses'][-1]:.4f}\n")
            assert got["settings"]["noise"] == label


def test_fewer_images_than_a_batch():
    """300 images with the defaults: 10 epochs, batches of 512, learning rate 0.006, seed 0."""
    images, weights = glyphs(300)[0], []
    for arguments in ((), (10, 300, 0.006, 0)):
        torch.manual_seed(0)
        model = autoencoder.DenoisingAutoencoder()
        quiet(autoencoder.train_autoencoder, model, images, torch.sqrt, *arguments)
        weights.append(model.state_dict())
    equal(*weights)


ALONE = """
import torch
from autoencoder import DenoisingAutoencoder, autoencoder_loss, train_autoencoder

def corrupt(images):
    return torch.where(torch.rand(images.shape) < 0.3, 0.0, images)

torch.manual_seed(0)
images = torch.rand(500, 1).expand(500, 784)
model = DenoisingAutoencoder()
before = autoencoder_loss(model, images, corrupt(images))
train_autoencoder(model, images, corrupt, epochs=20, batch_size=100)
after = autoencoder_loss(model, images, corrupt(images))
assert after < 0.2 * before, (before, after)
"""


def test_the_lesson_of_the_autoencoder_needs_only_torch():
    with folder():
        shutil.copy(HERE / "autoencoder.py", ".")
        done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True)
        assert done.returncode == 0 and "100 steps" in done.stdout, done
        assert "Error" not in done.stderr


def test_the_cross_test_by_hand():
    test = glyphs(64)[0]
    models = {"a": answering(lambda x: (x + test) / 2), "b": answering(lambda x: test)}
    labels = ["clean", "stripes", "masking 0.3"]
    with recorded_grids() as grids:
        table, picture = autoencoder.cross_test(models, labels, test, count=2)
    (rows, columns, row_labels, drawn), = grids
    assert picture is drawn and row_labels == labels
    assert columns == ["truth", "input", "a", "b"] * 2
    for label, row in zip(labels, rows, strict=True):
        noisy = lab_corruption(label, test)
        left = F.mse_loss(noisy, test)
        close(table["left alone"][label], left, 1e-9)
        close(table["trained on a"][label], left / 4, 1e-7)
        close(table["trained on b"][label], 0, 0)
        truth, given, half, perfect = row[4:]  # of the second image
        close(truth, test[1], 0)
        close(given, noisy[1], 0)
        close(half, (given + truth) / 2, 1e-6)
        close(perfect, truth, 0)


def test_the_passes_by_hand():
    test, seen = glyphs(64)[0], []
    half = answering(lambda x: (x + test) / 2)
    perfect = answering(lambda x: (seen.append(x), test)[1])
    with recorded_grids() as grids:
        table, _ = autoencoder.progressive(half, test, 0, passes=3)
        best, _ = autoencoder.progressive(perfect, test, 0, passes=3)
    still, noisy = "nothing added", "noise 0.1 added"
    first = table["input"][still]
    close(first, F.mse_loss(lab_corruption("gaussian 0.5 + masking 0.3", test), test), 1e-7)
    close(table["pass 1"][still], first / 4, 1e-7)
    close(table["pass 3"][still], first / 4**3, 1e-7)
    assert best["pass 3"][still] == 0
    assert table["pass 1"][noisy] > table["pass 1"][still]
    assert not torch.equal(seen[4], seen[5])  # each pass adds noise of its own
    (rows, columns, labels, _), _ = grids
    assert columns == ["truth", "input", "pass 1", "pass 2", "pass 3"]
    assert labels == list(table["input"]) == [still, noisy]
    for truth, given, *passes in rows:
        assert len(passes) == 3 and not torch.equal(given, passes[0])
    truth, given, restored, *_ = rows[0]
    close(truth, test[0], 0)
    close(restored, (given + truth) / 2, 1e-6)


def test_each_seed_adds_noise_of_its_own_to_the_passes():
    test, inputs = glyphs(8)[0], []
    model = answering(lambda x: (inputs.append(x), x)[1])
    for seed in (3, 4):
        autoencoder.progressive(model, test, seed, passes=1)
    clean_3, noisy_3, clean_4, noisy_4 = inputs
    close(clean_3, clean_4, 0)
    close(noisy_3, noise.add_gaussian_noise(clean_3, 0.1, seeded(3)), 0)
    close(noisy_4, noise.add_gaussian_noise(clean_3, 0.1, seeded(4)), 0)


def test_markdown_has_means_and_deviations_over_seeds():
    table = lambda c: {"r": {"c": c, "d": 5.0}}
    assert autoencoder.markdown([table(1.0), table(3.0)]) == (
        "|     | c               | d      |\n"
        "| --- | ---             | ---    |\n"
        "| r   | 2.0000 ± 1.4142 | 5.0000 |\n")
    assert autoencoder.markdown([table(1.0)]).endswith("| r   | 1.0000 | 5.0000 |\n")


def test_linear_classifier_is_the_minimum_of_its_objective():
    """Ridge regression as least squares with six more rows, in numpy."""
    generator = seeded()
    x = torch.randn(60, 5, generator=generator) + 3
    y = torch.randint(3, (60,), generator=generator)
    test = torch.randn(500, 5, generator=generator) + 3
    mean, scale = x.mean(0), x.var(0).mean().sqrt()

    def add_one(x):
        z = ((x - mean) / scale).double().numpy()
        return np.column_stack([z, np.ones(len(z))])

    penalty = math.sqrt(0.1 * 60) * np.eye(6)
    A = np.vstack([add_one(x), penalty])
    one_hot = np.vstack([np.eye(3)[y], np.zeros((6, 3))])
    w = np.linalg.lstsq(A, one_hot, rcond=None)[0]
    expected = (add_one(test) @ w).argmax(1)
    found = autoencoder.linear_classifier(x, y, 3)(test).numpy()
    assert (found == expected).mean() > 0.99


def test_features_by_hand():
    images, labels = glyphs(400)
    (train_, test), (y, y_test) = images.split([300, 100]), labels.split([300, 100])
    noisy = lab_corruption("gaussian 0.3", test)
    models = {"clean": autoencoder.DenoisingAutoencoder(),
              "gaussian 0.3": autoencoder.DenoisingAutoencoder()}
    with torch.no_grad():
        table, _ = autoencoder.features(models, test, y_test, train_, y, 5)
        encoders = {f"trained on {label}": model.encode for label, model in models.items()}
        for row, encode in (encoders | {"pixels": lambda x: x.flatten(1)}).items():
            z, z_test, z_noisy = encode(train_), encode(test), encode(noisy)
            correlation = autoencoder.mean_correlation(z_test)
            close(table[row]["mean absolute correlation"], correlation, 1e-6)
            order = torch.randperm(300, generator=seeded(5))
            for count in (100, 300):
                few = order[:count]
                classify = autoencoder.linear_classifier(z[few], y[few])
                for name, x in (("clean", z_test), ("noisy", z_noisy)):
                    accuracy = (classify(x) == y_test).double().mean()
                    close(table[row][f"{count} labels, {name}"], accuracy, 0.011)
    pixels = table["pixels"]
    assert len(pixels) == 5 and pixels["300 labels, clean"] > pixels["100 labels, clean"] > 0.3
    assert pixels["300 labels, clean"] > pixels["300 labels, noisy"]
    assert table["trained on clean"] != table["trained on gaussian 0.3"]


def test_mean_correlation_against_numpy():
    mixing = torch.randn(5, 5, generator=seeded(1))
    z = torch.randn(200, 5, generator=seeded()) @ mixing
    r = np.abs(np.corrcoef(z.numpy().T))
    expected = r[~np.eye(5, dtype=bool)].mean()
    close(autoencoder.mean_correlation(z), expected, 1e-5)
    with_constant = torch.cat([z, torch.ones(200, 1)], 1)
    close(autoencoder.mean_correlation(with_constant), expected, 1e-5)


def test_filters_are_those_of_the_most_active_units():
    test, model = glyphs(100)[0], autoencoder.DenoisingAutoencoder().requires_grad_(False)
    layer = model.encoder[0]
    layer.weight[:100] *= 5  # far more active
    with recorded_grids() as grids:
        autoencoder.filters({"clean": model}, test)
    (rows, _, labels, _), = grids
    assert labels == ["trained on clean"] and len(rows[0]) == 16
    active = layer(test.flatten(1)).relu().std(0).argsort(descending=True)
    assert (active[:16] < 100).all()
    weight = layer.weight[active[1]]
    close(rows[0][1].flatten(), 0.5 + 0.5 * weight / weight.abs().max(), 1e-5)


def test_autoencoder_alone_counts_its_parameters():
    layers = [784, 256, 128, 64, 128, 256, 784]
    count = sum(a * b + b for a, b in zip(layers, layers[1:]))
    out = works(autoencoder, "")
    assert f"{count:,} parameters" in out
    assert out.count("Linear(") == 6


def test_the_documents_trainer():
    """A notebook's loop: a DataLoader of (images, labels), noise_fn(clean_images, noise_param)."""
    images, labels = glyphs(256)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(images.view(-1, 1, 28, 28), labels), 64, shuffle=True)
    for noise_fn, noise_param in ((noise.add_gaussian_noise, 0.3),
                                  (noise.add_salt_pepper_noise, 0.2),
                                  (noise.add_masking_noise, 0.3)):
        torch.manual_seed(0)
        model = autoencoder.DenoisingAutoencoder(784, 64)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.001)
        epochs = []
        for epoch in range(6):
            model.train()
            total_loss = 0.0
            for batch, _ in loader:
                clean_images = batch.view(batch.size(0), -1)
                noisy_images = noise_fn(clean_images, noise_param)
                optimizer.zero_grad()
                reconstructed, latent = model(noisy_images)
                assert latent.shape == (len(batch), 64)
                loss = torch.nn.MSELoss()(reconstructed, clean_images)
                loss.backward()
                optimizer.step()
                total_loss += loss.item()
            epochs.append(total_loss / len(loader))
        assert epochs[-1] < 0.6 * epochs[0], epochs


def test_what_each_flag_of_the_lab_changes():
    with tiny_sets("data"):
        line = "--exercise progressive"
        out = works(autoencoder, line)  # 320 images, fewer than a batch of 512
        assert out.count("trained on gaussian 0.3, seed") == 3
        first = Path("out/lab.md").read_text("utf-8")
        assert first.startswith(f"`python autoencoder.py {line} --data mnist --epochs 10 "
                                "--seeds 3`")
        assert sorted(os.listdir("out")) == ["autoencoder-progressive.png", "lab.md"]
        works(autoencoder, f"{line} --out some/where")
        assert Path("some/where/lab.md").read_text("utf-8") == first
        tables = {first.split("\n", 1)[1]}
        for flag in ("--epochs 2", "--seeds 1", "--batch-size 160"):
            works(autoencoder, f"{line} {flag}")
            tables.add(Path("out/lab.md").read_text("utf-8").split("\n", 1)[1])
        assert len(tables) == 4  # each changes the figures
        os.rename("data", "elsewhere")
        works(autoencoder, f"{line} --data-dir elsewhere --data mnist")
        assert Path("out/lab.md").read_text("utf-8") == first


def test_the_report_on_one_autoencoder():
    images = data.make_glyphs(60, 3)[0]
    model = answering(torch.sqrt)
    labels = ["clean", "gaussian 0.3", "salt_pepper 0.2", "masking 0.3"]
    expected, drawn = autoencoder.cross_test({"mixed": model}, labels, images / 255, count=4)
    with folder() as root:
        path = root / "new/folder/samples.png"
        table, said = quiet(autoencoder.report_autoencoder, model, images, path.parent, "mixed")
        with Image.open(path) as picture:
            assert np.array_equal(picture, drawn)
    assert table == expected
    assert said == (f"test MSE, 60 images\n{autoencoder.markdown([table])}picture: {path}\n")


def test_the_report_on_fewer_images_than_it_shows():
    test, model = data.make_glyphs(2, 3)[0], autoencoder.DenoisingAutoencoder()
    with folder() as root, recorded_grids() as grids:
        quiet(autoencoder.report_autoencoder, model, test, root, "clean")
    assert grids[0][1] == ["truth", "input", "clean"] * 2


def test_the_lab_writes_the_tables_and_pictures_of_its_exercises():
    noises = ["gaussian 0.3", "salt_pepper 0.2", "masking 0.3"]
    levels = [f"gaussian 0.{i}" for i in range(1, 6)]
    unknown = ["masking 0.3 + gaussian 0.3", "gaussian 0.3 + salt_pepper 0.2", "stripes"]
    pair, seeds = ["clean", "gaussian 0.3"], (0, 1)
    with tiny_sets("sets"), recorded_models() as models:
        out = works(autoencoder, "--data mnist --data-dir sets --out lab --epochs 2 "
                                 "--batch-size 128 --seeds 2 --exercise all")
        train_, y = data.load_mnist("sets", True)
        test, y_test = data.load_mnist("sets", False)
        train_, test, y = train_ / 255, test / 255, y.long()

        def trained(seed, labels):
            return {label: models[seed][label] for label in labels}

        def cross(trained_on, tested_on):
            return [autoencoder.cross_test(trained(seed, trained_on), tested_on, test)
                    for seed in seeds]

        expected = {
            "compare": cross(pair, ["clean", *noises]),
            "levels": cross(levels, levels),
            "types": cross(noises, noises),
            "blind": cross(["mixed", *noises], noises + unknown),
            "features": [autoencoder.features(trained(seed, pair), test, y_test, train_, y, seed)
                         for seed in seeds],
            "progressive": [autoencoder.progressive(models[seed]["gaussian 0.3"], test, seed)
                            for seed in seeds]}
        first, *sections = Path("lab/lab.md").read_text("utf-8").split("\n## ")
        assert "--exercise all --data mnist --epochs 2 --seeds 2" in first
        for (name, runs), section in zip(expected.items(), sections, strict=True):
            tables, pictures = zip(*runs)
            assert section == f"{name}\n\n{autoencoder.markdown(tables)}"
            assert section.strip() in out
            with Image.open(f"lab/autoencoder-{name}.png") as picture:
                assert np.array_equal(picture, pictures[0]), name
    assert out.count("trained on gaussian 0.3, seed") == 2


# --------------------------------------------------------------------------------------- training


def checkpoint_of(place):
    return torch.load(f"{place}/checkpoint.pt", weights_only=True)


@contextlib.contextmanager
def without_reports():
    """tiny_sets, but train.py measures and draws nothing, which takes most of a short run."""
    figures = {"one-step mean": {"psnr": 20.0}, "kriging": {"psnr": 19.0}}

    def nothing(*_, **__):
        return {}

    with (tiny_sets() as root, patched(train, report_autoencoder=nothing, draw_losses=nothing),
          patched(sample, report_field=nothing, evaluate_field=lambda *_, **__: figures)):
        yield root


def trained(model, flags):
    """Run train.py in this process; returns its checkpoint. The default seed is 42."""
    name = "cifar10" if model == "nf" else "mnist"
    works(train, f"--model {model} --data {name} --evaluate 2 {flags}")
    return checkpoint_of(f"out/{model}")


def equal(a, b, tolerance=0):
    """Two nested dicts must be the same, their tensors and numbers within the tolerance."""
    for key in set(a) & set(sample.KEYS):  # of a checkpoint: these hold words, too
        assert a.pop(key) == b.pop(key), key
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def test_the_training_loop_by_hand():
    """Seeds, the order of the images, warming up and a cosine, gradients clipped to a norm of 1."""
    model, images, seen = torch.nn.Linear(1, 1).double(), torch.arange(300), []
    optimizer = torch.optim.SGD(model.parameters(), 0.4)

    def weights():
        return torch.nn.utils.parameters_to_vector(model.parameters()).detach()

    def loss(index):
        seen.append(images[index])
        seed = 7 * 1_000_003 + len(seen) - 1
        close(torch.rand(1), torch.rand(1, generator=seeded(seed)), 0)
        return 1e4 * model(torch.ones(1).double()).sum()  # an enormous gradient

    task = types.SimpleNamespace(model=model, batch_loss=loss, warmup=0.1)
    args = types.SimpleNamespace(batch_size=100, steps=30, seed=7)
    before = weights()
    for i, (step, value) in enumerate(train.training_loop(task, [optimizer], images, args)):
        assert step == len(seen) == i + 1 and math.isfinite(value)
        rate = 0.4 * min(1, (i + 1) / 3) * 0.5 * (1 + math.cos(math.pi * i / 30))
        close((weights() - before).norm(), rate, 1e-9)
        before = weights()
    epochs = torch.cat(seen).view(10, 300)
    close(epochs.sort()[0], images.expand(10, 300), 0)
    assert not torch.equal(epochs[0], epochs[1])


def orthogonal_update(p, lr):
    """Muon's update of one weight by its definition: a polynomial of the singular values."""
    gradient, shape = p.grad.double().flatten(1), p.shape
    p.momentum = 0.95 * getattr(p, "momentum", 0) + gradient
    u, s, v = torch.linalg.svd(gradient + 0.95 * p.momentum, full_matrices=False)
    s = s / s.norm()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    rows, columns = gradient.shape
    update = (u * s) @ v * max(1, rows / columns) ** 0.5
    p.data = (p.data * (1 - 0.01 * lr) - lr * update.reshape(shape)).float()


def half_batch_loss(model, sched, images, index, masks, pure):
    """The loss of half a batch by hand; pure: of pure noise, with 409 outputs, otherwise 204."""
    values = images[index].flatten(2).mT / 127.5 - 1
    order = data.fixed_order(42, index, 1024)
    if masks == "fresh":
        order = torch.rand(len(index), 1024)
    order = order.argsort(1)
    chosen = order[:, :204], order[:, 204:613 if pure else 408]
    coords = [torch.stack([i % 32, i // 32], -1) / 31 for i in chosen]
    x_in, x_0 = (values.gather(1, i[..., None].expand(-1, -1, 3)) for i in chosen)
    t = torch.randint(999 if pure else 0, 1000, (len(index),))
    x_t = None
    if not pure:
        bar = sched.alphas_cumprod[t].float()[:, None, None]
        x_t = bar.sqrt() * x_0 + (1 - bar).sqrt() * torch.randn(x_0.shape)
    return ((model(x_t, coords[1], t, coords[0], x_in) - x_0) ** 2).mean()


def test_three_steps_of_the_field_written_out():
    """Batches of 8 of 16 images, so the third step begins a new epoch."""
    images, sched = data.make_leaves(16, 3)[0], schedule.DiffusionSchedule()
    order = torch.cat([torch.randperm(16, generator=seeded(42_000_126 + i)) for i in range(2)])
    for masks, steps in (("fresh", 3), ("fixed", 1)):
        with without_reports(), patched(data, load_cifar10=lambda *_: (images, None)):
            got = trained("nf", f"--steps {steps} --batch-size 8 --masks {masks}")
        torch.manual_seed(42)
        model = nf_denoiser.NFDenoiser(sched.alphas_cumprod, **nf_denoiser.SIZES["small"],
                                       covariance=nf_denoiser.pixel_covariance(images))
        start = {name: p.clone() for name, p in model.state_dict().items()}
        muon, rest = {}, {}
        for name, p in model.named_parameters():
            small = name.endswith(("latents", "to_values.weight", "unet.first.weight"))
            (rest if small or p.dim() == 1 else muon)[name] = p
        adamw = torch.optim.AdamW(rest.values(), 1.0, weight_decay=0.01)
        for step in range(steps):
            torch.manual_seed(42_000_126 + step)
            first, second = order[8 * step:8 * step + 8].chunk(2)
            loss = half_batch_loss(model, sched, images, first, masks, pure=True) / 2
            loss = loss + half_batch_loss(model, sched, images, second, masks, pure=False) / 2
            close(got["losses"][step], loss.detach(), 2e-5)
            model.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            rate = 0.5 * (1 + math.cos(math.pi * step / steps))
            adamw.param_groups[0]["lr"] = 0.15 * 0.02 * rate
            adamw.step()
            for p in muon.values():
                orthogonal_update(p, 0.02 * rate)
        for group in (muon, rest):
            moved = sum((p - start[name]).abs().sum() for name, p in group.items())
            apart = sum((p - got["model"][name]).abs().sum() for name, p in group.items())
            assert apart < 0.03 * moved, (apart, moved)
    assert got["step"] == 1 and got["data"] == "cifar10"
    assert {o["param_groups"][0]["weight_decay"] for o in got["optimizers"]} == {0.01}
    full = types.SimpleNamespace(model="nf", size="full", lr=1e-4)  # AdamW alone
    assert [type(o) for o in train.make_optimizers(model, full)] == [torch.optim.AdamW]


def test_each_flag_changes_the_training_of_an_autoencoder():
    def bias(model, flags):
        return trained(model, f"--steps 2 --batch-size 64 {flags}")["model"]["decoder.0.bias"]

    with without_reports():
        dae, ae = bias("dae", ""), bias("ae", "")
        for flag in ("--noise salt_pepper", "--noise-param 0.6", "--seed 7", "--lr 0.001",
                     "--batch-size 32"):
            assert not torch.equal(dae, bias("dae", flag)), flag
        assert torch.equal(dae, bias("dae", "--noise gaussian --noise-param 0.3"))
        assert torch.equal(ae, bias("dae", "--noise-param 0"))


def test_the_flags_of_the_field():
    line = "--steps 1 --batch-size 2"
    with without_reports():
        for name in ("cosine", "linear"):
            got = trained("nf", f"{line} --beta-schedule {name}")
            sched = schedule.DiffusionSchedule(1000, name)
            close(got["model"]["alphas_cumprod"], sched.alphas_cumprod, 1e-6)
            assert schedule.DiffusionSchedule(**got["schedule"]).betas.equal(sched.betas)
        got = trained("nf", f"{line} --parts unet perceiver")
        assert got["config"]["parts"] == ["unet", "perceiver"]
        net = sample.load_checkpoint("out/nf/checkpoint.pt")[0]
        assert isinstance(net.prior, nf_denoiser.IndependentPixels) and not net.training
        got = trained("nf", "--parts gaussian")
        assert got["step"] == 0 and len(got["losses"]) == 0


def test_the_closing_table_is_about_test_images():
    report = unittest.mock.Mock(return_value={"kriging": {"psnr": 21.0}})
    leaves = data.make_leaves(8, 3)
    with (tiny_sets(), patched(data, load_cifar10=lambda *_: leaves),
          patched(sample, report_field=report), patched(train, report_autoencoder=report)):
        for model, name in (("nf", "cifar10"), ("dae", "mnist")):
            got = trained(model, "--steps 2 --batch-size 8 --evaluate 5")
            images = data.load_dataset(name, "data", False)[1]
            shown, = (x for x in report.call_args.args if isinstance(x, torch.Tensor))
            assert shown.equal(images[:5])
            results = json.loads(Path(f"out/{model}/results.json").read_text())
            assert results["methods"] == report.return_value and results["data"] == name
            net, _ = sample.load_checkpoint(f"out/{model}/checkpoint.pt")
            if model == "nf":
                table = sample.evaluate_field(net, schedule.DiffusionSchedule(), images)
                figures = [table[method]["psnr"] for method in ("one-step mean", "kriging")]
            else:
                clean = images.flatten(1) / 255
                noisy = noise.add_gaussian_noise(clean, 0.3, seeded())
                figures = [F.mse_loss(net(noisy)[0], clean).item()]
            close(got["tests"][-1], [2, *figures], 1e-3 if model == "nf" else 1e-6)
            with Image.open(f"out/{model}/loss.png") as image:
                assert image.size[0] > 740 and image.getextrema() != ((255, 255),) * 3


def edges(count, seed):
    """Two colours and a straight edge between them: 16 x 16 images that no Gaussian field knows."""
    rng = np.random.default_rng(seed)
    left, right = rng.integers(0, 256, (2, count, 3, 1, 1))
    angle = rng.uniform(0, 2 * np.pi, (count, 1, 1, 1))
    offset = rng.uniform(-4, 4, (count, 1, 1, 1))
    x = np.arange(16) - 7.5
    images = np.where(x * np.cos(angle) + x[:, None] * np.sin(angle) < offset, left, right)
    return torch.from_numpy(images.astype(np.uint8))


def test_seconds_of_training_pay():
    """Quality: what the measured covariance and a short training of a tiny U-Net must reach."""
    images, test, sched = edges(2000, 0), edges(100, 1), schedule.DiffusionSchedule()
    covariance = nf_denoiser.pixel_covariance(images)

    def one_step(model):
        table = sample.evaluate_field(model.eval(), sched, test)
        return [table[name]["psnr"] for name in ("one-step mean", "kriging")]

    gaussian, krige = one_step(tiny_field(("gaussian",), side=16, covariance=covariance))
    assert gaussian > krige + 0.6, (gaussian, krige)
    model = tiny_field(("unet",), side=16, widths=(16, 24))
    split = data.sparse_split(test, order=data.fixed_order(0, torch.arange(100), 256))
    x_0 = split["output_values"]
    x_t = sched.q_sample(x_0, 400, torch.randn(x_0.shape, generator=seeded()))
    t = torch.full((100,), 400)

    def figures():
        with torch.no_grad():
            x_0_hat = model(x_t, split["output_coords"], t, split["input_coords"],
                            split["input_values"])
        mse = ((x_0_hat - x_0) / 2).square().mean().item()
        return np.array([one_step(model)[0], noise.psnr(mse)])

    args = types.SimpleNamespace(
        model="nf", size="small", lr=0.02, batch_size=8, steps=150, seed=0, masks="fresh",
        parts=["unet"], pixels="grid", device=torch.device("cpu"))
    task = types.SimpleNamespace(model=model, warmup=0.02, batch_loss=lambda index: (
        train.field_loss(model, sched, images, index, args, slice(None))))
    before = figures()
    model.train()
    optimizers = train.make_optimizers(model, args)
    for _ in train.training_loop(task, optimizers, images, args):
        pass
    model.eval()
    gained = figures() - before
    assert (gained > 1.1).all(), gained


def interrupted(line, number, when):
    """Run train.py, which gets a signal as soon as when(checkpoint) is true: as run()."""
    save = sample.save_checkpoint

    def save_and_interrupt(path, checkpoint):
        save(path, checkpoint)
        if when(checkpoint):
            signal.raise_signal(number)

    with patched(sample, save_checkpoint=save_and_interrupt):
        return run(train, line)


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped():
    with without_reports():
        for model, number, flags in (
                ("dae", signal.SIGTERM, "--data mnist --batch-size 160 --noise mixed --steps 12"),
                ("ae", signal.SIGINT, "--data mnist --batch-size 160 --steps 6"),
                ("nf", signal.SIGINT, "--data cifar10 --batch-size 2 --steps 4 --masks fixed")):
            line = f"--model {model} {flags} --out"
            works(train, f"{line} whole")
            code, out, _ = interrupted(f"{line} parts", number, lambda saved: saved["step"] == 2)
            assert code == 128 + number and "--resume" in out
            assert checkpoint_of(f"parts/{model}")["step"] == 3  # one more step, then saved
            works(train, f"{line} parts --resume")
            equal(checkpoint_of(f"whole/{model}"), checkpoint_of(f"parts/{model}"))
            assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)
        for flag in ("--lr 0.5", "--masks fresh", "--data leaves"):
            with patched(data, BUILT_IN={"leaves": (data.make_leaves, 80, 2)}):
                refused(train, f"{line} parts --resume {flag}", "was trained on cifar10", "->")
        works(train, f"{line} parts --resume --steps 5")
        shutil.copy("parts/dae/checkpoint.pt", "parts/ae")
        refused(train, "--model ae --data mnist --resume --steps 50 --batch-size 160 --out parts",
                "model dae -> ae")


def test_a_second_signal_ends_a_run_at_once():
    def impatient(_):
        signal.raise_signal(signal.SIGTERM)  # the first one
        return True

    with without_reports():
        line = "--model ae --data mnist --batch-size 320 --steps 9"
        code, out, _ = interrupted(line, signal.SIGTERM, impatient)
        assert code == 143 and "stopped" not in out
        assert checkpoint_of("out/ae")["step"] == 1


def test_a_new_run_keeps_the_checkpoint_of_the_last_one():
    line = "--model ae --data mnist --batch-size 160 --steps 2 --seed"
    new, old = Path("out/ae/checkpoint.pt"), Path("out/ae/checkpoint-old.pt")

    def interrupt(*tensors):
        signal.raise_signal(signal.SIGINT)
        return autoencoder.autoencoder_loss(*tensors)

    with without_reports():
        with patched(train, autoencoder_loss=interrupt):  # in step 1, before the first report
            assert run(train, f"{line} 1")[0] == 130 and new.exists()
        works(train, f"{line} 1 --resume")
        first = new.read_bytes()
        assert str(old) in works(train, f"{line} 2")
        second = new.read_bytes()
        assert old.read_bytes() == first != second
        with patched(train, autoencoder_loss=interrupt):
            assert "not saved" in run(train, f"{line} 3")[1]
        refused(train, f"{line} 3 --lr 1e39", "finite")
        refused(sample, f"{new} --export ./out/../{new}", "--export")
        assert new.read_bytes() == second and old.read_bytes() == first
        assert {path.name for path in new.parent.iterdir()} == {
            "checkpoint.pt", "checkpoint-old.pt", "results.json"}
        works(train, f"{line} 2 --resume --steps 3")
        assert old.read_bytes() == first


def test_a_folder_is_known_by_the_pictures_in_it():
    line = "--model dae --batch-size 8 --steps"
    with folder() as root:
        os.mkdir("ph")
        for i, image in enumerate(data.make_glyphs(30, 5)[0]):
            save_png(f"ph/{i}.png", image[0].numpy())
        works(train, f"{line} 1 --data ph")
        works(train, f"{line} 2 --data ./ph --resume")
        shutil.move("ph", "there")
        refused(sample, "out/dae/checkpoint.pt", "trained on pictures in", root.resolve() / "ph")
        works(sample, "out/dae/checkpoint.pt --data there")
        works(train, f"{line} 3 --data {root}/there --resume")
        with contextlib.chdir("there"):
            assert "3 images" in works(sample, "../out/dae/checkpoint.pt --out ..")
        shutil.copy("there/0.png", "there/new.png")
        refused(train, f"{line} 4 --data there --resume", "images 27 with", "-> 28 with")


def test_a_place_that_cannot_be_written_is_noticed_before_training():
    with without_reports(), spied(train, "training_loop") as loops:
        Path("out/ae/checkpoint.pt").mkdir(parents=True)
        Path("file").touch()
        Path("there").mkdir()
        os.symlink("/proc/self", "there/ae")  # where root, too, can make no files
        for place, named in (("out", "out/ae/checkpoint.pt is a folder"), ("file", "file/ae"),
                             ("there", "there/ae/checkpoint.pt"), ("/proc/nowhere", "/nowhere")):
            refused(train, f"--model ae --data mnist --out {place}", named)
    assert not loops


def started(line, **environment):
    """train.py in a process of its own, on one thread: a fork, so torch need not be imported."""
    def main():
        os.environ.update(environment)
        torch.set_num_threads(1)
        if environment.get("RANK") == "1":
            train.load_dataset = None  # only the first process reads the data
        code, out, err = run(train, line)
        with open("log", "a") as log:
            log.write(out + err)
        os._exit(code)

    process = multiprocessing.get_context("fork").Process(target=main)
    process.start()
    return process


def finished(*processes):
    for process in processes:
        process.join(200)
        assert process.exitcode == 0, Path("log").read_text()


def test_kill_9_at_any_moment_loses_nothing():
    """A run that saves every step is killed again and again: the file on disk always loads."""
    rng, kills = np.random.default_rng(0), 20 if LONG else 2
    path, resume = Path("parts/dae/checkpoint.pt"), ""
    flags = f"--model dae --data mnist --batch-size 320 --steps {25 * kills} --out"
    with without_reports():
        finished(started(f"{flags} whole"))
        for _ in range(kills):
            process = started(f"{flags} parts {resume}")
            before = path.exists() and path.stat().st_mtime_ns
            while process.is_alive() and (path.exists() and path.stat().st_mtime_ns) == before:
                time.sleep(0.005)  # until this process has saved something
            time.sleep(rng.uniform(0, 0.15))
            process.kill()
            process.join()
            assert process.exitcode == -signal.SIGKILL, Path("log").read_text()
            assert 1 <= sample.load_checkpoint(path)[1]["step"] < 25 * kills
            resume = "--resume"
        finished(started(f"{flags} parts --resume"))
        equal(checkpoint_of("whole/dae"), checkpoint_of("parts/dae"))
        assert not list(Path("parts").rglob("*.part"))


def start_two(line):
    """train.py in two processes, with the environment that torchrun would give them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    return [started(line, RANK=rank, LOCAL_RANK=rank, **place) for rank in ("0", "1")]


def test_two_processes_train_as_one():
    flags = "--model nf --data cifar10 --batch-size 4 --evaluate 1 --steps 1 --out"
    no_dropout = unittest.mock.patch.dict(nf_denoiser.SIZES["small"], dropout=0.0)
    with without_reports(), no_dropout:
        finished(started(f"{flags} one"))
        finished(*start_two(f"{flags} two"))
        assert Path("log").read_text().count("trained in") == 2  # the second one prints nothing
        one, two = checkpoint_of("one/nf"), checkpoint_of("two/nf")
        assert sum(len(optimizer["state"]) for optimizer in one["optimizers"]) > 20
        # after one step momentum is the gradient, and exp_avg a tenth of it
        torch.testing.assert_close(one["optimizers"], two["optimizers"], rtol=0, atol=2e-5)
        close(one["losses"], two["losses"], 1e-6)  # the mean over processes
        finished(*start_two(f"{flags} one --steps 2 --resume"))
        assert checkpoint_of("one/nf")["step"] == 2
        with patched(os, environ={**os.environ, "WORLD_SIZE": "3", "RANK": "0"}):
            refused(train, f"{flags} one --steps 1", "multiple of 6")


def test_torchrun_trains_as_one_process():
    flags = "--model dae --data mnist --noise mixed --batch-size 8 --steps 1 --out"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                "--nproc_per_node=2", HERE / "train.py", *flags.split(), "two"]
    with tiny_sets():
        works(train, f"{flags} one")
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(torchrun, capture_output=True, text=True, env=environment)
        assert done.returncode == 0 and done.stdout.count("trained in") == 1, done
        one, two = checkpoint_of("one/dae"), checkpoint_of("two/dae")
        # after one step exp_avg is a tenth of the gradient
        torch.testing.assert_close(one["optimizers"], two["optimizers"], rtol=0, atol=1e-6)
        close(one["losses"], two["losses"], 1e-6)


def test_a_full_disk_or_a_loss_that_is_not_finite_spares_the_checkpoint():
    import resource
    line, path = "--model dae --data mnist --batch-size 64 --steps", Path("out/dae/checkpoint.pt")
    nan = {**noise.NOISES, "gaussian": (lambda x, *_: x * math.nan, 0.3)}
    with without_reports():
        works(train, f"{line} 2")
        before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
        try:
            refused(train, f"{line} 4 --resume")
            refused(train, f"{line} 4")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert path.read_bytes() == before
        assert not list(path.parent.glob("*.part"))
        with patched(train, NOISES=nan):
            refused(train, f"{line} 4 --resume", "finite")
        assert path.read_bytes() == before
        refused(train, f"{line} 1 --lr 1e39 --out wild", "finite")  # only the weights
        assert not list(Path("wild").rglob("*.pt"))
        works(train, f"{line} 4 --resume")


# ----------------------------------------------------------------------------- using the programs


def save_field(path="m.pt", seed=0, channels=3, side=32, data_name="cifar10", **settings):
    """A checkpoint of an untrained field with 20 timesteps: (model, schedule)."""
    torch.manual_seed(seed)
    sched = schedule.DiffusionSchedule(20)
    config = dict(nf_denoiser.SIZES["small"], channels=channels, side=side)
    model = nf_denoiser.NFDenoiser(sched.alphas_cumprod, **config).eval()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sample.save_checkpoint(Path(path), dict(
        kind="nf", config=config, settings=settings, schedule=dict(timesteps=20), data=data_name,
        step=7, model=model.state_dict(), optimizers=[]))
    return model, sched


@contextlib.contextmanager
def a_field_and_test_images(**settings):
    """In a new folder with tiny data sets and the checkpoint m.pt: (model, schedule, images)."""
    with tiny_sets():
        yield *save_field(**settings), data.load_cifar10("data", False)[0]


def figures_of(flags):
    """{method: figures} that sample.py writes for m.pt and two test images, and what it prints."""
    out = works(sample, f"m.pt --evaluate 2 --json f.json {flags}")
    return json.loads(Path("f.json").read_text())["methods"], out


def test_each_flag_changes_the_table_as_it_says():
    with a_field_and_test_images() as (model, sched, images):
        for flags, steps, eta, options in (
                ("--steps 3", 3, 0, {}), ("--steps 4", 4, 0, {}),
                ("--steps 3 --sampler ddim", 3, 0, {}), ("--steps 3 --eta 0.5", 3, 0.5, {}),
                ("--steps 3 --seed 4", 3, 0, dict(seed=4)),
                ("--steps 3 --input-ratio 0.5", 3, 0, dict(input_ratio=0.5)),
                ("--steps 3 --full", 3, 0, dict(full=True)),
                ("--steps 3 --pixels grid", 3, 0, dict(pixels="grid")),
                ("--steps 3 --pixels anywhere", 3, 0, dict(pixels="anywhere"))):
            got, out = figures_of(flags)
            draw = drawing(model, sched, options.get("seed", 0), num_steps=steps, eta=eta)
            expected = sample.evaluate_field(model, sched, images[:2], draw, **options)
            equal(got, expected, 1e-5)
            for method, row in expected.items():  # the table says the same
                figures = (f"{row['mse']:.5f}", f"{row['mae']:.5f}", f"{row['psnr']:.2f}",
                           f"{row['ssim']:.4f}")
                assert re.search(f"{method} +{' +'.join(figures)}\n", out), (flags, out)
            n_in = 512 if "ratio" in flags else 204
            n_out = 820 if "full" in flags else 204
            title = (f"cifar10: 2 images, {n_in} pixels given, {n_out} measured, sample in {steps} "
                     f"steps, mask seed {options.get('seed', 0)}\n")
            assert title in out, out


def test_ddpm_takes_all_timesteps_and_fifty_ddim_steps_are_the_default():
    with a_field_and_test_images() as (model, sched, images):
        got, out = figures_of("--sampler ddpm")
        g = seeded()
        draw = lambda *where: nf_denoiser.ddpm_sample(model, sched, *where, generator=g)
        equal(got, sample.evaluate_field(model, sched, images[:2], draw), 1e-5)
        assert "sample in 20 steps" in out
        refused(sample, "m.pt", "1 to 20, got 50")
    with tiny_sets(), spied(sample, "ddim_sample") as calls:
        works(sample, f"{sample.SHIPPED} --data cifar10 --evaluate 1")
        assert {given[5] for given, _ in calls} == {50}


def test_a_model_trained_off_the_grid_is_measured_off_the_grid():
    with a_field_and_test_images(pixels="anywhere"):
        anywhere, _ = figures_of("--steps 2")
        equal(anywhere, figures_of("--steps 2 --pixels anywhere")[0])
        assert anywhere["nearest"] != figures_of("--steps 2 --pixels grid")[0]["nearest"]


def test_how_many_images_are_measured():
    with a_field_and_test_images():
        for flags, count in (("", 6), ("--evaluate 5", 5), ("--evaluate", 32)):
            out = works(sample, f"m.pt --steps 1 --json there/f.json {flags}")
            got = json.loads(Path("there/f.json").read_text())
            assert got["images"] == count and f"cifar10: {count} images" in out
        assert got["checkpoint"] == "m.pt" and got["data"] == "cifar10" and got["seed"] == 0
        assert "m.pt: nf, 7 steps on cifar10" in out and "s on cpu" in out


def test_the_pictures_are_about_the_first_six_images():
    with a_field_and_test_images() as (model, sched, images), spied(sample, "image_grid") as drawn:
        works(sample, "m.pt --steps 2 --evaluate 8 --out there")
        ((rows, labels), options), = drawn
        expected = data.image_grid(rows, labels, **options)
        assert np.array_equal(pixels_of("there/nf/samples.png"), pixels_of(expected))
        split, _ = sample.split_images(images[:6], torch.arange(6))
        draw = drawing(model, sched, num_steps=2)
        sample.evaluate_field(model, sched, images[:8], draw)  # takes its noise first
        answers = sample.reconstruct(model, sched, split, draw, 204)
    columns = [torch.stack(column) for column in zip(*rows)]
    given, krige, mean, drawn, truth, error = columns
    assert labels == ["input pixels", "kriging", "one-step mean", "sample", "truth",
                      "error of mean"]
    close(given, sample.assemble(split), 0)
    close(truth, images[:6] / 255, 1e-6)
    for shown, method in zip((krige, mean, drawn), labels[1:4]):
        close(shown, sample.assemble(split, answers[method]), 1e-5)
    for i in range(6):
        close(error[i], data.heat(mean[i] - truth[i]), 1e-5)
        mses = [(shown[i] - truth[i]).square().mean().item() for shown in (krige, mean, drawn)]
        decibels = [f"{-10 * math.log10(mse):.1f} dB" for mse in mses]
        assert options["captions"][i] == ["", *decibels, "", "white: 0.5"]


def test_the_picture_of_several_samples():
    with a_field_and_test_images(), spied(sample, "image_grid") as drawn:
        got, out = figures_of("--steps 2 --eta 1 --samples 2 --evaluate 5 --input-ratio 0.1")
        _, ((rows, labels), options) = drawn
        figures = got["samples"]
        assert f"2 samples per image: {figures['coverage']:.1%} of" in out
        assert f"deviation {figures['spread']:.4f}, PSNR of their mean " \
            f"{figures['psnr_mean']:.2f} dB" in out
        expected = data.image_grid(rows, labels, **options)
        assert np.array_equal(pixels_of("out/nf/spread.png"), pixels_of(expected))
        images = data.load_cifar10("data", False)[0]
    assert labels == ["sample 1", "sample 2", "mean", "truth", "std. deviation", "error of mean"]
    assert len(rows) == 4
    for i, (one, two, mean, truth, std, error) in enumerate(rows):
        close(truth, images[i] / 255, 1e-6)
        close(mean, (one + two) / 2, 1e-5)
        close(std, data.heat((one - two) / 2**0.5, 0.25), 1e-4)
        close(error, data.heat(mean - truth, 0.25), 1e-4)
        assert not torch.equal(one, two)


def test_the_picture_of_a_fine_grid():
    with a_field_and_test_images() as (model, sched, images), spied(sample, "image_grid") as drawn:
        figures_of("--steps 2 --scale 3 --evaluate 2")
        _, ((rows, labels), options) = drawn
        expected = pixels_of(data.image_grid(rows, labels, **options))
        assert np.array_equal(pixels_of("out/nf/scale.png"), expected)
    assert labels == ["input pixels", "model x3", "truth"]
    split, _ = sample.split_images(images[:2], torch.arange(2))
    y, x = torch.meshgrid(torch.linspace(0, 1, 96), torch.linspace(0, 1, 96), indexing="ij")
    coords = torch.stack([x, y], -1).view(1, -1, 2).expand(2, -1, -1)
    fine = nf_denoiser.one_step_mean(model, sched, coords, *where(split)[1:])
    for i, (given, shown, truth) in enumerate(rows):
        close(given, sample.assemble(split)[i], 0)
        close(shown, fine[i].mT.view(3, 96, 96) / 2 + 0.5, 1e-5)
        close(truth, images[i] / 255, 1e-6)
    assert options["zoom"] % 3 == 0 and expected.shape[1] >= 3 * 96  # no fine pixel is left out


def test_a_fine_grid_is_not_transposed():
    ramp = lambda model, sched, coords, *_: 2 * coords[..., :1].expand(-1, -1, 3) - 1
    split = data.sparse_split(data.make_leaves(1, 3)[0])
    with patched(sample, one_step_mean=ramp, image_grid=lambda rows, *_, **more: rows):
        ((_, fine, _),) = sample.draw_fine(None, None, split, 2)
    close(fine, torch.linspace(0, 1, 64).expand(3, 64, 64), 1e-6)  # dark left, bright right


def test_the_animation_shows_every_step_from_noise_to_image():
    with a_field_and_test_images(), spied(sample, "image_grid") as drawn:
        figures_of("--steps 4 --gif --evaluate 5")
        with Image.open("out/nf/denoising.gif") as gif:
            assert gif.n_frames >= 4 and gif.info["loop"] == 0
            times = []
            for i in range(gif.n_frames):
                gif.seek(i)
                times.append(gif.info["duration"])
        assert times[-1] > 1000 > 200 > times[0]  # the end stays
        images = data.load_cifar10("data", False)[0]
    ((shown, *_), _), *steps = drawn
    split, _ = sample.split_images(images[:5], torch.arange(5))
    assert [labels for (_, labels, _), _ in steps[:5]] == [["t = 19"], ["t = 13"], ["t = 6"],
                                                           ["t = 0"], ["t = 0"]]
    outputs = split["output_indices"][:3, None, :204].expand(-1, 3, -1)
    for (rows, _, names), _ in steps:
        assert names == ["x_t", "prediction"] and [len(row) for row in rows] == [3, 3]
    (noisy, _), *_ = steps[0][0]
    values = noisy.flatten(2).gather(2, outputs)
    assert abs(values.std() - 0.5) < 0.05  # N(0, 1) of the range from -1 to 1
    shown = shown[0][3][None]  # the sample of the first image
    (_, predicted), *_ = steps[-1][0]
    at = outputs[:1]
    close(predicted[:1].clamp(0, 1).flatten(2).gather(2, at), shown.flatten(2).gather(2, at), 0.02)


def test_a_long_animation_shows_some_of_the_steps():
    split, _ = sample.split_images(data.make_leaves(1, 3)[0], torch.arange(1))
    frames = [(t, *torch.rand(2, 1, 204, 3)) for t in range(1000)]
    with folder(), spied(sample, "image_grid") as drawn:
        quiet(sample.animate, split, frames, "a.gif")
    assert 25 <= len({labels[0] for (_, labels, _), _ in drawn}) <= 51


def test_the_newest_checkpoint_is_sampled():
    with a_field_and_test_images():
        for name, age in (("run/new", 0), ("run/old", 100), ("else/newer", -100)):
            save_field(f"{name}/nf/checkpoint.pt")
            os.utime(f"{name}/nf/checkpoint.pt", (time.time() - age,) * 2)
        line = "--steps 1 --evaluate 1"
        assert works(sample, f"{line} --out run").startswith("run/new/nf/checkpoint.pt: nf")
        assert works(sample, f"run/old/nf/checkpoint.pt {line}").startswith("run/old/nf")
        assert Path("out/nf/samples.png").exists() and Path("run/nf/samples.png").exists()
        with patched(sample, SHIPPED=Path("m.pt").resolve()), patched(
                data, CIFAR10_URLS=[], BUILT_IN={"leaves": (data.make_leaves, 4, 2)}):
            assert f"{Path('m.pt').resolve()}: nf" in works(sample, f"{line} --out empty")
            save_png("photo.png", photograph()[0])
            out = works(sample, "--image photo.png --out run")
            assert f"{Path('m.pt').resolve()}: nf" in out  # a photograph gets the shipped model


def test_the_shipped_model_works_without_a_network_however_its_path_is_written():
    with folder() as root, patched(data, CIFAR10_URLS=["https://127.0.0.1:9/"],
                                   BUILT_IN={"leaves": (data.make_leaves, 4, 2)}):
        os.mkdir("assets")
        save_field("assets/shipped.pt")
        save_field("other.pt")
        with patched(sample, SHIPPED=root.resolve() / "assets" / "shipped.pt"):
            for path in ("", "assets/shipped.pt", "./assets/../assets/shipped.pt",
                         root.resolve() / "assets" / "shipped.pt"):
                out = works(sample, f"{path} --steps 1")
                assert "NO CIFAR10" in out and "leaves: 2 images" in out
            refused(sample, "assets/shipped.pt --steps 1 --data cifar10", "cannot fetch")
        refused(sample, "other.pt --steps 1", "cannot fetch")


def test_other_data_than_the_model_was_trained_on():
    with tiny_sets("sets"), patched(data, BUILT_IN={"leaves": (data.make_leaves, 4, 2)}):
        save_field()
        assert "leaves: 2 images" in works(sample, "m.pt --steps 1 --data leaves")
        assert "cifar10: 6 images" in works(sample, "m.pt --steps 1 --data-dir sets")
        refused(sample, "m.pt --data mnist --data-dir sets", "m.pt takes images of 3 x 32 x 32",
                "(1, 28, 28)")
        save_field("grey.pt", channels=1, side=28, data_name="auto")
        assert "mnist: 6 images" in works(sample, "grey.pt --steps 1 --data-dir sets --gif")


def test_an_exported_model_has_half_precision_and_the_same_answers():
    with a_field_and_test_images() as (model, _, _):
        out = works(sample, "m.pt --export half.pt")
        assert "exported: half.pt" in out and not Path("out").exists()
        got, _ = figures_of("--steps 2 --seed 1")
        Path("half.pt").replace("m.pt")
        equal(figures_of("--steps 2 --seed 1")[0], got, 0.02)
        loaded, checkpoint = sample.load_checkpoint("m.pt")
        equal(loaded.state_dict(), model.state_dict(), 2e-3)
        parameters = dict(model.named_parameters())
        for name, value in torch.load("m.pt")["model"].items():
            half = name in parameters
            assert value.dtype == (torch.float16 if half else torch.float32), name
            assert half or value.equal(model.state_dict()[name])
        assert set(checkpoint) == {*sample.KEYS, "model"}
        Path("run/nf").mkdir(parents=True)
        shutil.copy("m.pt", "run/nf/checkpoint.pt")
        refused(train, "--data cifar10 --batch-size 2 --resume --out run", "exported")


def test_a_loaded_model_is_ready_to_be_used():
    with folder():
        model, _ = save_field()
        loaded, checkpoint = sample.load_checkpoint("m.pt")
        assert not loaded.training and checkpoint["step"] == 7
        equal(loaded.state_dict(), model.state_dict())
        meta, _ = sample.load_checkpoint("m.pt", "meta")  # it stands for a GPU
        assert {p.device.type for p in meta.parameters()} == {"meta"}


def test_an_autoencoders_checkpoint_is_measured_by_its_own_report():
    with tiny_sets():
        model = autoencoder.DenoisingAutoencoder()
        sample.save_checkpoint(Path("m.pt"), dict(
            kind="dae", config=dict(input_dim=784, latent_dim=64), schedule={}, data="mnist",
            settings=dict(noise="gaussian 0.3"), step=1, model=model.state_dict()))
        got, out = figures_of("--out there")  # --evaluate 2
        images = data.load_mnist("data", False)[0]
        expected, _ = quiet(autoencoder.report_autoencoder, model, images[:2], Path("a"),
                            "gaussian 0.3")
        equal(got, expected, 1e-6)
        assert Path("there/dae/samples.png").exists() and "2 images" in out
        assert "64 images" in works(sample, "m.pt")
        for flags in ("--steps 2", "--full", "--gif", "--scale 2", "--samples 2", "--eta 1",
                      "--sampler ddpm", "--pixels grid", "--image a.png", "--seed 1",
                      "--input-ratio 0.5"):
            refused(sample, f"m.pt {flags}", "m.pt is an autoencoder")


def test_main_takes_a_list_and_works_in_a_thread():
    with a_field_and_test_images(), spied(torch, "set_flush_denormal") as fast:
        before = sys.argv
        with patched(sys, argv=["notebook", "--nonsense"]):
            line = ["m.pt", "--steps", "1", "--evaluate", "1", "--out", "a"]
            thread = threading.Thread(target=quiet, args=(sample.main, line))
            thread.start()
            thread.join()
            assert sys.argv == ["notebook", "--nonsense"]
        assert Path("a/nf/samples.png").exists() and sys.argv is before
        assert fast == [((True,), {})]


def test_numbers_between_two_limits():
    whole, real = sample.between(1, 16), sample.between(0, 1, float)
    assert [whole(text) for text in ("1", "7", "16")] == [1, 7, 16] and type(whole("1")) is int
    assert [real(text) for text in ("0", "0.5", "1")] == [0, 0.5, 1] and type(real("1")) is float
    for parse, text in ((whole, "0"), (whole, "17"), (real, "-0.1"), (real, "nan")):
        raises(argparse.ArgumentTypeError, lambda: parse(text), "between", text)
    raises(ValueError, lambda: whole("x"))


def test_windows_are_blended_with_sin_squared():
    image, known = torch.rand(3, 32, 48, generator=seeded()), torch.zeros(32, 48, dtype=bool)
    known[torch.rand(32, 48, generator=seeded(1)) < 0.3] = True
    ramp = torch.sin(math.pi * (torch.arange(32) + 0.5) / 32) ** 2
    total, weight = torch.zeros(3, 32, 48), torch.zeros(48)
    for x in (0, 16):
        window, given = image[:, :, x:x + 32], known[:, x:x + 32]
        inputs, outputs = given.flatten().nonzero()[:, 0], (~given).flatten().nonzero()[:, 0]
        pixels = window.flatten(1).mT.clone()
        coords = torch.stack([torch.arange(1024) % 32, torch.arange(1024) // 32], -1) / 31
        problem = coords[outputs][None], coords[inputs][None], pixels[inputs][None]
        pixels[outputs] = sample.inverse_distance(*problem)[0]
        alone = pixels.mT.view(3, 32, 32)
        close(sample.restore(window, given, sample.inverse_distance), alone, 1e-3)
        total[:, :, x:x + 32] += ramp * alone
        weight[x:x + 32] += ramp
    close(sample.restore(image, known, sample.inverse_distance), total / weight, 1e-3)


def test_windows_cover_pictures_of_any_size():
    answer = lambda out, coords, values: torch.full((1, out.shape[1], values.shape[2]), 2.0)
    for height, width, side in ((1, 2, 32), (20, 70, 32), (33, 31, 32), (64, 48, 32), (9, 30, 8)):
        image = torch.rand(1, height, width, generator=seeded()) * 2 - 1
        known = torch.rand(height, width, generator=seeded(1)) < 0.3
        known[0, 0], known[0, 1] = True, False
        got = sample.restore(image, known, answer, side)
        assert torch.equal(got[:, known], image[:, known])  # the given pixels stay
        close(got[:, ~known], 1.0, 1e-6)  # clamped


def test_windows_beyond_the_edge_see_a_mirrored_picture():
    windows = sample.overlapping_windows(6, 9, 4).view(-1, 4, 4)
    assert len(windows) == 2 * 4 and windows[0, 1].tolist() == [9, 10, 11, 12]
    assert windows[3, 0].tolist() == [6, 7, 8, 8] and windows[-1, -1].tolist() == [51, 52, 53, 53]
    small = sample.overlapping_windows(2, 3, 4).view(4, 4)
    assert small.tolist() == [[0, 1, 2, 2], [3, 4, 5, 5], [3, 4, 5, 5], [0, 1, 2, 2]]


def test_a_large_hole_is_filled_from_its_rim():
    known, counts = torch.ones(128, 128, dtype=torch.bool), []
    known[20:110, 20:110] = False
    image = torch.where(known, 0.25, -9.0).expand(3, -1, -1)

    def mean_of_given(output_coords, input_coords, input_values):
        counts.append(input_values.shape[1])
        assert (input_values > -1).all()  # nothing of the hole
        return input_values.mean(1, keepdim=True).expand(-1, output_coords.shape[1], -1)

    close(sample.restore(image, known, mean_of_given), torch.full((3, 128, 128), 0.25), 1e-5)
    assert min(counts) >= 200 and min(counts[:8]) >= 200, counts
    raises(ValueError, lambda: sample.restore(image, known & False, mean_of_given), "no pixel")


def restored(flags):
    """What sample.py prints for m.pt and a photograph, and restored.png."""
    return works(sample, f"m.pt --image {flags}"), pixels_of("out/nf/restored.png")


def test_a_photograph_is_restored_by_the_one_step_mean():
    photo, _ = photograph()
    with folder(), spied(sample, "image_grid") as drawn:
        model, sched = save_field()
        save_png("photo.png", photo)
        out, image = restored("photo.png --input-ratio 0.3 --seed 2 --json f.json")
        ((rows, labels), options), = drawn
        expected = data.image_grid(rows, labels, **options)
        assert np.array_equal(pixels_of("out/nf/comparison.png"), pixels_of(expected))
        got = json.loads(Path("f.json").read_text())
        pixels, known, _ = data.load_picture("photo.png", 3, None, 0.3, 2)
    truth = pixels / 255
    mean = lambda *given: nf_denoiser.one_step_mean(model, sched, *given)
    K = nf_denoiser.exponential_covariance(32)
    answers = dict(nearest=sample.nearest, kriging=lambda *given: sample.kriging(*given, K))
    answers["one-step mean"] = mean
    (given, *images, last), = rows
    close(given, torch.where(known, truth, 0.5), 1e-6)
    close(last, truth, 1e-6)
    assert "1,620 of 5,400 pixels given" in out
    for (name, answer), shown, label in zip(answers.items(), images, labels[1:]):
        close(shown, data.to_unit(sample.restore(data.to_signed(pixels) * known, known, answer)),
              1e-5)
        decibels = -10 * (shown - truth)[:, ~known].square().mean().log10().item()
        close(got["methods"][name]["psnr"], decibels, 1e-3)
        assert name in label and f"{decibels:.2f} dB" in label
        assert re.search(f"{name} +{decibels:.2f} dB\n", out)
    close(image.transpose(2, 0, 1), 255 * images[2].clamp(0, 1), 0.51)
    assert abs(image - photo)[~known].max() > 5  # restored, not copied
    assert np.array_equal(image[known], photo[known])  # the given pixels, bit by bit
    assert labels[0] == "given" and labels[-1] == "truth"
    assert got["data"] == "photo.png" and got["images"] == 1 and len(got["methods"]) == 3


def test_the_truth_under_a_mask_is_not_used():
    photo, hole = photograph()
    with folder(), spied(sample, "image_grid") as drawn:
        save_field()
        save_png("mask.png", hole)
        save_png("holes.png", photo, 255 - hole)
        save_png("photo.png", photo)
        save_png("seven.png", np.where(hole[..., None] > 0, 7, photo))
        out, image = restored("holes.png")
        assert "dB" not in out and np.array_equal(image[hole == 0], photo[hole == 0])
        for name in ("photo.png", "seven.png"):
            assert np.array_equal(image, restored(f"{name} --mask mask.png")[1])
        assert abs(image - photo)[20:30, 30:40].max() < 60
    for ((row,), labels), _ in drawn:
        assert labels == ["given", "nearest", "kriging", "one-step mean"] and len(row) == 4


def test_grey_photographs_stay_grey_and_large_ones_are_reduced():
    grey = data.make_glyphs(1, 0)[0][0, 0].numpy()
    with folder():
        save_field(channels=1, path="grey.pt", side=28)
        save_field()
        save_png("grey.png", grey)
        save_png("wide.png", np.zeros((40, 1500, 3)))
        for model in ("m.pt", "grey.pt"):
            works(sample, f"{model} --image grey.png")
            with Image.open("out/nf/restored.png") as picture:
                assert picture.mode == "L" and picture.size == (28, 28)
                assert (pixels_of(picture) == grey).mean() >= 0.2
        out, image = restored("wide.png")
        assert "reduced" in out and image.shape == (27, 1024)


def test_the_middle_of_a_photograph_is_sampled():
    photo, _ = photograph()
    with folder(), spied(sample, "image_grid") as drawn:
        save_field()
        save_png("photo.png", photo)
        out = works(sample, "m.pt --image photo.png --size 32 --steps 2 --samples 2 --gif")
        square = data.square_picture(data.open_picture("photo.png"), 3, 32)
        assert "photo.png: 1 images, 204 pixels given" in out
        assert not Path("out/nf/restored.png").exists()
        refused(sample, "m.pt --image photo.png --size 33", "3 x 32 x 32", "(3, 33, 33)")
    close(drawn[0][0][0][0][4], square / 255, 1e-6)


def test_photographs_that_cannot_be_restored_leave_the_last_result():
    photo, hole = photograph()
    with folder():
        save_field()
        save_png("photo.png", photo)
        save_png("dot.png", photo[:1, :1])
        save_png("nothing.png", np.zeros((50, 50, 4)))
        save_png("black.png", 0 * hole)
        restored("photo.png")
        before = Path("out/nf/restored.png").read_bytes()
        Path("cut.png").write_bytes(Path("photo.png").read_bytes()[:90])
        for flags, word in (("photo.png --mask dot.png", "same size"), ("cut.png", "cut.png"),
                            ("nothing.png", "no pixel"), ("none.png", "none.png"),
                            (".", "picture"), ("dot.png", "no pixel of the"),
                            ("photo.png --mask black.png", "no pixel is missing")):
            refused(sample, f"m.pt --image {flags}", word)
        Path("out/nf/comparison.png").unlink()
        os.mkdir("out/nf/comparison.png")  # cannot be replaced
        os.mkdir("out/nf/.comparison.png")
        refused(sample, "m.pt --image dot.png --input-ratio 0.5")
        refused(sample, "m.pt --image photo.png --seed 3")
        assert Path("out/nf/restored.png").read_bytes() == before


def test_the_shipped_model_is_better_than_kriging():
    model, checkpoint = sample.load_checkpoint(sample.SHIPPED)
    sched = schedule.DiffusionSchedule(**checkpoint["schedule"])
    table = sample.evaluate_field(model, sched, data.make_leaves(24, seed=9)[0])
    assert table["one-step mean"]["psnr"] > table["kriging"]["psnr"] + 0.2, table
    assert sample.SHIPPED.stat().st_size < 8_000_000


def test_a_folder_of_pictures_trains_both_models_on_every_device():
    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.mps.is_available()
    with folder():
        os.mkdir("photos")
        for i, image in enumerate(data.make_leaves(30, 5)[0]):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(f"photos/{i}.png")
        for device, (model, size) in itertools.product(devices, (("nf", 4), ("dae", 8))):
            out = works(train, f"--model {model} --data photos --steps 1 --batch-size {size} "
                               f"--evaluate 1 --device {device}")
            assert "photos" in out and f"| {device}" in out
            flags = "--steps 2" if model == "nf" else ""
            works(sample, f"out/{model}/checkpoint.pt --evaluate 1 --device {device} {flags}")


def test_bad_input_gets_one_line_and_an_exit_code():
    class Evil:  # code in a checkpoint, which must not run
        def __reduce__(self):
            return os.mkdir, ("evil",)

    with tiny_sets():
        for name in ("junk.pt", "photo.png"):
            Path(name).write_bytes(b"junk")
        Path("empty.pt").write_bytes(b"")
        torch.save({"kind": "nf"}, "odd.pt")
        torch.save([1, 2], "list.pt")
        torch.save({"kind": "nf", "config": Evil()}, "evil.pt")
        torch.save(torch.load(sample.SHIPPED) | {"kind": "../alien"}, "alien.pt")
        torch.save(torch.load(sample.SHIPPED) | {"schedule": None}, "alien2.pt")
        for module, line, *words in (  # exit code 1: one line, "error: ..."
                (train, "--model dae --data cifar10"), (train, "--batch-size 990 --data cifar10"),
                (train, "--batch-size 3 --data cifar10"), (train, "--resume --data cifar10"),
                (train, "--device warp"), (train, "--data imagenet"),
                (train, "--model dae --noise masking --noise-param 7 --data mnist"),
                (train, "--model dae --noise-param nan --data mnist"),
                (train, "--parts gaussian --resume --data cifar10"),
                *((sample, name, name) for name in (
                    "junk.pt", "empty.pt", "odd.pt", "list.pt", "evil.pt", "alien.pt", "alien2.pt",
                    "none.pt")),
                (sample, "--device warp"), (sample, "--device meta"),
                (sample, f"{sample.SHIPPED} --image photo.png"),
                (sample, f"{sample.SHIPPED} --data mnist"),
                (autoencoder, "--exercise types --data cifar10"), (data, "--data nowhere"),
                (schedule, "--timesteps 0"), (schedule, "--timesteps 10000000000")):
            refused(module, line, *words)
        assert not Path("evil").exists()
        with patched(sample, SHIPPED=Path("none.pt")):
            refused(sample, "", "train.py")
        for module, lines in (  # exit code 2, from argparse
                (train, ("--model nope", "--steps 0", "--steps -1", "--steps x", "--epochs 0",
                         "--lr nan", "--lr 0", "--steps 5 --epochs 5", "--seed -1", "--parts nose",
                         "--parts", "--batch-size 0", "--evaluate 0", "--size huge",
                         "--model dae --noise mixed --noise-param 1", "--noise masking",
                         "--model ae --noise masking", "--model dae --parts unet",
                         "--model ae --size full", "--model ae --noise-param 1",
                         "--steps 99999999999", "--noise fog", "--masks odd")),
                (sample, ("--eta 2", "--eta nan", "--scale 0", "--scale 17", "--seed -1",
                          "--evaluate 0", "--samples 1", "--sampler ddpm --eta 1",
                          "--sampler ddpm --steps 5", "--steps 1001", "--input-ratio 1.1",
                          "--input-ratio nan", "--size 32", "--mask x.png",
                          "--image x.png --gif", "--image x.png --size 32 --mask x.png",
                          "--image x.png --steps 5", "--image x.png --pixels grid",
                          "--image x.png --mask x.png --full", "--sampler odd", "--pixels odd",
                          "--image x.png --input-ratio 1.5", "--size 65", "--eta -1",
                          "--image x.png --evaluate", "--image x.png --data mnist")),
                (autoencoder, ("--seeds 0", "--epochs 0", "--exercise nope")),
                (noise, ("--nope",)), (data, ("--seed x",))):
            for line in lines:
                code, _, err = run(module, line)
                assert code == 2 and "error: " in err.splitlines()[-1], (module, line, err)
        process = subprocess.run([sys.executable, HERE / "sample.py", "junk.pt"],
                                 capture_output=True, text=True)
        assert process.returncode == 1 and process.stderr.count("\n") == 1, process.stderr
        assert process.stderr.startswith("error: ")


def test_the_readmes_commands_parse():
    text, parse = (HERE / "README.md").read_text("utf-8"), argparse.ArgumentParser.parse_args
    commands = re.findall(r"(?:python|torchrun[^\n`#|]*?) (\w+)\.py([^\n`#|&)]*)", text)
    assert len(commands) >= 10

    def parse_and_stop(self, argv=None):
        parse(self, argv)
        raise ValueError("parsed")

    with patched(argparse.ArgumentParser, parse_args=parse_and_stop):
        for name, flags in commands:
            if name in globals():  # test_all.py is not
                refused(globals()[name], flags.strip().rstrip(".,;:"), "parsed")


def test_the_readmes_code_blocks_run():
    blocks = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text("utf-8"), re.DOTALL)
    field, denoiser = {}, {}
    exec(blocks[0], field)
    for values in (field["mean"], field["sample"]):
        assert values.shape == (1, 100, 3) and values.isfinite().all()
    # the colours of the block are linear in the coordinates, so what they should be is known
    x, y = field["output_coords"].unbind(-1)
    assert (field["mean"] - (torch.stack([x, y, x], -1) * 2 - 1)).abs().mean() < 0.1
    exec(blocks[1], denoiser)
    images, denoised = denoiser["images"], denoiser["denoised"]
    noisy = noise.add_gaussian_noise(images, 0.3)
    assert F.mse_loss(denoised, images) < 0.5 * F.mse_loss(noisy, images)
    assert denoised.shape == images.shape and denoiser["latents"].shape == (len(images), 64)
    assert len(blocks) == 2


def main():
    if not __debug__:
        sys.exit("error: python -O leaves every assert out: nothing would be tested")
    wanted = ([word for word in sys.argv[1:] if word != "--long"] or [""])[0]
    passed, failed, start = 0, 0, time.time()
    for name, test in list(globals().items()):
        if name.startswith("test_") and callable(test) and wanted in name:
            began = time.time()
            try:
                quiet(test)
                passed += 1
                print(f"ok    {name} ({time.time() - began:.1f} s)", flush=True)
            except Exception:
                failed += 1
                print(f"FAIL  {name}\n{traceback.format_exc()}", flush=True)
    print(f"{time.time() - start:.0f} s\n{passed} passed, {failed} failed")
    sys.exit(1 if failed or not passed else 0)


if __name__ == "__main__":
    main()
