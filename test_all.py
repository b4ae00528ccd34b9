"""Evidence that the other files do what they say: python test_all.py (or pytest test_all.py).

Every claim is compared with something this project did not write: closed forms, brute force in
float64, numpy, files built byte by byte. No network. `python test_all.py NAME` runs the tests
whose names contain NAME; --long takes its time (20 kills instead of 2).
"""
import argparse
import ast
import contextlib
import functools
import gzip
import hashlib
import http.client
import importlib
import inspect
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import runpy
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
import types
import unittest.mock
import urllib.request
import warnings
import zlib
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("TEST_CUDA", "")  # exact claims: on the CPU
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps

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
TINY = dict(num_latents=None, latent_dim=32, num_fourier_feats=8, num_blocks=1, num_heads=2,
            dropout=0.5, widths=(8, 8))  # what --size small means within run()


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


def close(a, b, tolerance=1e-6):
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (a, b))
    b = b.expand_as(a) if b.dim() == 0 else b
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def quiet(call, *arguments):
    """The call's result and what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        return call(*arguments), out.getvalue()


def run(module, line):
    """Run a script's main() in this process as a shell would: (exit code, stdout, stderr)."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    argv = [module.__name__ + ".py", *line.split()]
    sizes = {**nf_denoiser.SIZES, "small": TINY}
    with patched(sys, argv=argv, stdout=out, stderr=err), patched(train, SIZES=sizes):
        try:
            data.run(module.main)
        except SystemExit as stop:
            code = stop.code or 0
    if isinstance(code, str):  # Python prints it and exits with 1
        print(code, file=err)
        code = 1
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
    """112 leaves (112, 3072), 384 glyphs (384, 28, 28) and their labels, as numpy arrays."""
    leaves = data.make_leaves(112, 11)[0].flatten(1)
    glyphs, labels = data.make_glyphs(384, 11)
    return leaves.numpy(), glyphs[:, 0].numpy(), labels.numpy()


@contextlib.contextmanager
def tiny_sets(place="data"):
    """A folder with 80 + 32 images in the CIFAR-10 format and 320 + 64 in that of MNIST in it."""
    leaves, images, labels = tiny_images()
    rows = np.pad(leaves, ((0, 0), (1, 0)))  # every label is 0
    names = *(f"data_batch_{i}" for i in range(1, 6)), "test_batch"
    with folder() as root:
        for name, batch in zip(names, np.split(rows, range(16, 96, 16))):
            put(root / place / f"cifar-10-batches-bin/{name}.bin", batch)
        write_mnist(root / place / "MNIST/raw", images[:320], labels[:320], "train")
        write_mnist(root / place / "MNIST/raw", images[320:], labels[320:])
        yield root


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, generator=None, dtype=torch.float64):
    return torch.randn(shape, generator=generator or seeded(), dtype=dtype)


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


def cosine_betas(T, s=0.008):
    """Improved DDPM, eq. 17."""
    u = np.arange(T + 1) / T
    bar = np.cos((u + s) / (1 + s) * math.pi / 2) ** 2
    betas = 1 - bar[1:] / bar[:-1]
    return betas.clip(0.0001, 0.9999)


def test_betas_against_numpy():
    cosine = schedule.cosine_beta_schedule
    linear = schedule.linear_beta_schedule
    for T in (1, 2, 37, 1000, 10_000):
        line = np.linspace(0.1 / T, 20 / T, T)  # at T = 1000 from 0.0001 to 0.02
        close(cosine(T), cosine_betas(T), 1e-11)
        close(linear(T), line.clip(max=0.9999), 1e-11)
    close(cosine(50, s=0.1), cosine_betas(50, s=0.1), 1e-11)
    close(linear(500, 0.1, 0.3), np.linspace(0.2, 0.6, 500), 1e-11)


def test_schedules_refuse_nonsense():
    for make in (schedule.cosine_beta_schedule, schedule.linear_beta_schedule):
        for wrong in (0, -3, 10_001):
            raises(ValueError, lambda: make(wrong), f"got {wrong}")
    for ends in ((0.1, 1), (0, 0.1), (math.nan, 0.1), (0.1, -1), (2, 0.1)):
        said = f"got {ends[0]} to {ends[1]}"
        raises(ValueError, lambda: schedule.linear_beta_schedule(10, *ends), said)
    raises(ValueError, lambda: schedule.DiffusionSchedule(10, "sqrt"), "sqrt")


def test_the_ten_constants_against_numpy():
    s = schedule.DiffusionSchedule()
    betas = cosine_betas(1000)
    bar = np.cumprod(1 - betas)
    prev = np.append(1, bar[:-1])
    posterior = betas * (1 - prev) / (1 - bar)
    expected = dict(
        betas=betas,
        alphas=1 - betas,
        alphas_cumprod=bar,
        alphas_cumprod_prev=prev,
        sqrt_alphas_cumprod=bar**0.5,
        sqrt_one_minus_alphas_cumprod=(1 - bar) ** 0.5,
        sqrt_recip_alphas_cumprod=bar**-0.5,
        sqrt_recipm1_alphas_cumprod=(1 / bar - 1) ** 0.5,
        posterior_variance=posterior,
        posterior_log_variance=np.log(posterior.clip(1e-20)))
    for name, values in expected.items():
        assert np.allclose(getattr(s, name), values, 1e-8, 1e-13), name
    linear = schedule.DiffusionSchedule(50, "linear")
    assert linear.betas.equal(schedule.linear_beta_schedule(50))


def test_to_moves_every_constant_and_mps_gets_float32():
    with patched(torch.Tensor, to=lambda *arguments: arguments[1:]):
        on_mps = vars(schedule.DiffusionSchedule(20).to(torch.device("mps")))
    s = schedule.DiffusionSchedule(20)
    assert s.to(torch.device("meta")) is s
    for name, value in vars(s).items():
        if name != "timesteps":
            assert value.is_meta and value.dtype == torch.float64
            assert on_mps[name] == (torch.device("mps"), torch.float32)


def every_step(s):
    return (
        lambda x_t, x_0, eps, t: s.q_sample(x_0, t, eps),
        lambda x_t, x_0, eps, t: s.predict_eps(x_t, t, x_0),
        lambda x_t, x_0, eps, t: s.ddim_step(x_t, x_0, t, t - 2, 0.7, eps),
        lambda x_t, x_0, eps, t: s.ddpm_step(x_t, x_0, t, eps))


def test_steps_take_any_shape_and_dtype_and_a_timestep_for_each_item():
    t = torch.tensor([3, 50, 99])
    for dtype, shape in (
            (torch.float32, (3,)),
            (torch.float64, (3, 5, 2)),
            (torch.bfloat16, (3, 3, 4, 4))):
        given = normal(3, *shape, dtype=dtype)  # x_t, x_0, eps
        before = given.clone()
        for step in every_step(schedule.DiffusionSchedule(100)):
            together = step(*given, t)
            assert together.dtype == dtype
            assert together.equal(step(*given, t + 0.9))  # rounded down
            for i in range(3):
                alone = step(*given[:, i:i + 1], int(t[i]))
                torch.testing.assert_close(alone, together[i:i + 1])
        assert given.equal(before)


def test_steps_refuse_timesteps_out_of_range():
    s = schedule.DiffusionSchedule(100)
    x = torch.ones(3)
    for step in every_step(s):
        for wrong in (-1, 100):
            raises(IndexError, lambda: step(x, x, x, wrong), f"below 100, got {wrong}")
    for t_next in (-2, 100):
        raises(IndexError, lambda: s.ddim_step(x, x, 5, t_next), "-1 or more", t_next)


def test_q_sample_and_predict_eps_written_out():
    s = schedule.DiffusionSchedule(100)
    t = torch.arange(100)
    bar = s.alphas_cumprod
    x_0, eps = normal(2, 100)
    x_t = bar.sqrt() * x_0 + (1 - bar).sqrt() * eps
    close(s.q_sample(x_0, t, eps), x_t, 1e-12)
    close(s.predict_eps(x_t, t, x_0), eps, 1e-9)


def test_ddpm_step_is_bayes_rule():
    """q(x_{t-1} | x_t, x_0) is q(x_t | x_{t-1}) q(x_{t-1} | x_0): their precisions add up."""
    s = schedule.DiffusionSchedule(50)
    t = torch.arange(1, 50)
    x_t, x_0, eps = normal(3, 49)
    beta = s.betas[1:]
    bar = s.alphas_cumprod[:-1]  # of t - 1
    precision = (1 - beta) / beta + 1 / (1 - bar)
    from_x_t = (1 - beta).sqrt() / beta * x_t
    from_x_0 = bar.sqrt() / (1 - bar) * x_0
    expected = (from_x_t + from_x_0) / precision + eps / precision.sqrt()
    close(s.ddpm_step(x_t, x_0, t, eps), expected, 1e-9)
    close(s.ddpm_step(x_t, x_0, 0, eps[:1]), x_0, 1e-9)  # the last step has no noise


def test_ddim_step_written_out():
    """Eq. 12 and 16 of DDIM, for neighbours and for jumps; timestep -1 is clean data."""
    s = schedule.DiffusionSchedule(100)
    t = torch.tensor([99, 60, 1, 40, 0])
    t_next = torch.tensor([98, 29, 0, -1, -1])
    x_t, x_0, new = normal(3, 5)
    bars = F.pad(s.alphas_cumprod, (0, 1), value=1)  # bars[-1]: clean data
    bar = bars[t]
    bar_next = bars[t_next]
    eps = (x_t - bar.sqrt() * x_0) / (1 - bar).sqrt()
    close(s.ddim_step(x_t, x_0, t, t_next), s.ddim_step(x_t, x_0, t, t_next, 0, new), 0)
    for eta in (0, 0.5, 1):
        ratio = (1 - bar_next) / (1 - bar)
        variance = eta**2 * ratio * (1 - bar / bar_next)
        old = (1 - bar_next - variance).clamp(0).sqrt()
        expected = bar_next.sqrt() * x_0 + old * eps + variance.sqrt() * new
        got = s.ddim_step(x_t, x_0, t, t_next, eta, new)
        close(got, expected, 1e-7)


# -------------------------------------------------------------------------------------- samplers


def test_samplers_recover_a_gaussian():
    """With E[x_0 | x_t] for data ~ N(1.5, 4), N(0, I) must become such data.

    Linear betas that do not grow with 1 / T leave signal in x_T, and end at 1.73, not 2.
    """
    def denoise(x_t, t):
        bar = sched.alphas_cumprod[t[0]]
        gain = 4 * bar.sqrt() / (4 * bar + 1 - bar)
        return 1.5 + gain * (x_t - 1.5 * bar.sqrt())

    x_T = normal(4, 5000)
    for name in ("cosine", "linear"):
        sched = schedule.DiffusionSchedule(100, name)
        for eta in (0, 0.5, 1):
            x_0 = schedule.ddim(denoise, sched, x_T, 100, eta, seeded(1))
            close(x_0.mean(), 1.5, 0.05)
            close(x_0.std(), 2, 0.08)


def record(told):
    """An on_step that keeps what it is told."""
    return lambda *step: told.append(step)


def nine_tenths_plus_t(x_t, t):
    """A denoiser that no sampler can confuse with another one, or t with another t."""
    assert t.dtype == torch.int64 and len(t) == len(x_t)
    return 0.9 * x_t + t.view(-1, 1, 1)


def test_samplers_written_out():
    """Ancestral sampling is DDIM with eta = 1 over all timesteps; DDIM's defaults are 50 and 0."""
    sched = schedule.DiffusionSchedule(51)
    every_t = list(range(50, -1, -1))
    all_but_25 = every_t[:25] + every_t[26:]
    for sampler, options, timesteps, eta in (
            (schedule.ddpm, {}, every_t, 1),
            (schedule.ddim, {}, all_but_25, 0),
            (schedule.ddim, dict(num_steps=3, eta=0.5), [50, 25, 0], 0.5)):
        told = []
        g = seeded()
        x_t = x_T = normal(2, 5, 1)
        got = sampler(nine_tenths_plus_t, sched, x_T, generator=seeded(), on_step=record(told),
                      **options)
        for t, t_next, step in zip(timesteps, [*timesteps[1:], -1], told, strict=True):
            x_0 = 0.9 * x_t + t
            equal(step, (t, x_t, x_0), 1e-6)
            eps = normal(2, 5, 1, generator=g)  # at t = 0 it is multiplied by 0
            x_t = sched.ddim_step(x_t, x_0, t, t_next, eta, eps)
        close(got, x_t, 1e-6)


def test_samplers_keep_no_graph_and_draw_no_noise_that_nobody_needs():
    sched = schedule.DiffusionSchedule(5)
    x_T = torch.ones(2, 3, 1, requires_grad=True)
    with spied(torch, "randn") as draws:
        assert not schedule.ddim(nine_tenths_plus_t, sched, x_T, 5).requires_grad
        assert not draws
        assert not schedule.ddpm(nine_tenths_plus_t, sched, x_T).requires_grad
        assert len(draws) == 4  # none at t = 0


def test_all_that_is_made_is_on_the_device_of_the_arguments():
    images = torch.rand(2, 3, 8, 8).to("meta")  # it stands for a GPU
    x = torch.rand(2, 5, 2).to("meta")
    sched = schedule.DiffusionSchedule(5).to("meta")

    def denoise(x_t, *arguments):
        assert all(x is None or x.is_meta for x in (x_t, *arguments))
        return arguments[0] if x_t is None else x_t

    with spied(torch, "rand") as drawn, spied(torch, "full") as filled:
        for add in SIMPLE:
            assert add(images).is_meta
        schedule.ddim(denoise, sched, x, 2)
        nf_denoiser.one_step_mean(denoise, sched, x, x, x)
        sample.mean_of_windows(denoise, sched, x, x, x)
        assert nf_denoiser.pixel_covariance(images.byte()).is_meta
    for _, options in drawn + filled:
        assert options["device"] == x.device


def test_a_generator_may_be_on_another_device():
    x = torch.empty(2, 3, device="meta", dtype=torch.float64)  # meta stands for a GPU
    with spied(torch, "randn") as draws:
        there = schedule.normal_like(x, seeded())
    assert draws[0][1]["device"] == torch.device("cpu")
    assert there.is_meta and there.shape == (2, 3) and there.dtype == torch.float64


def test_ddim_steps_go_evenly_from_the_last_timestep_to_0():
    sched = schedule.DiffusionSchedule(37)
    x_T = torch.ones(1, 1, 1)
    for n in (1, 2, 5, 8, 30, 37):
        told = []
        schedule.ddim(nine_tenths_plus_t, sched, x_T, n, on_step=record(told))
        timesteps = [step[0] for step in told]
        close(timesteps, np.linspace(36, 0, n), 0.5)
    for n in (-1, 0, 38):
        raises(ValueError, lambda: schedule.ddim(None, sched, x_T, n), f"1 to 37, got {n}")
    for eta in (1.5, -0.1, math.nan):
        raises(ValueError, lambda: schedule.ddim(None, sched, x_T, 5, eta), eta)


def test_the_picture_of_the_schedules():
    for flags, path, T in (
            ("", "out/schedule.png", 1000),
            ("--timesteps 50 --out new", "new/schedule.png", 50)):
        with folder(), spied(data, "line_chart") as charts:
            lines = works(schedule, flags).splitlines()
            (title, curves), _ = charts[0]
            chart = data.line_chart(title, curves)
            assert np.array_equal(pixels_of(path), pixels_of(chart))
        assert title == "alpha_bar_t"
        for name, line in zip(("cosine", "linear"), lines):
            bars = schedule.DiffusionSchedule(T, name).alphas_cumprod.tolist()
            assert curves[name] == (range(T), bars)
            assert line == f"{name}: alpha_bar from {bars[0]:.4f} down to {bars[-1]:.3g}"


# ----------------------------------------------------------------------------------------- noise

SIMPLE = (noise.add_gaussian_noise, noise.add_salt_pepper_noise, noise.add_masking_noise)


def test_the_simple_noises_written_out():
    """Figures rest on these streams: a normal for each value, or a uniform for each pixel.

    In a batch of images a pixel has all channels; elsewhere each value is a pixel.
    """
    for shape, pixels, dtype in (
            ((4, 3, 8, 8), (4, 1, 8, 8), torch.float32),
            ((4, 5, 5), (4, 5, 5), torch.float64),
            ((4, 3, 2, 5, 5), (4, 3, 2, 5, 5), torch.float32)):
        images = torch.rand(shape, dtype=dtype)
        before = images.clone()
        eps = normal(*shape, dtype=dtype)
        u = torch.rand(pixels, generator=seeded())
        each = torch.rand(4, *[1] * (len(shape) - 1))
        for strength in (0, 0.3, 1, each):
            gaussian = (images + strength * eps).clamp(0, 1)
            salt = (u >= strength / 2).to(dtype)
            salt_pepper = torch.where(u < strength, salt, images)
            masking = images * (u >= strength)
            expected = gaussian, salt_pepper, masking
            for add, noisy in zip(SIMPLE, expected):
                assert add(images, strength, seeded()).equal(noisy)
        assert images.equal(before)


def test_mixed_noise_written_out():
    """Each image gets a kind and a strength."""
    for shape, dtype in (
            ((30, 3, 8, 8), torch.float32),
            ((30, 50), torch.float64)):
        images = torch.rand(shape, dtype=dtype)
        one_per_image = 30, *[1] * (len(shape) - 1)
        g = seeded()
        u = torch.rand(one_per_image, generator=g).to(dtype)
        kinds = torch.randint(3, one_per_image, generator=g)
        candidates = torch.stack([
            noise.add_gaussian_noise(images, 0.1 + 0.4 * u, g),
            noise.add_salt_pepper_noise(images, 0.05 + 0.35 * u, g),
            noise.add_masking_noise(images, 0.1 + 0.5 * u, g)])
        expected = candidates[kinds.flatten(), torch.arange(30)]
        assert noise.add_mixed_noise(images, seeded()).equal(expected)


def test_noises_without_a_strength_and_a_generator():
    x = torch.rand(4, 1, 8, 8)
    assert noise.NOISES == dict(
        gaussian=(noise.add_gaussian_noise, 0.3),
        salt_pepper=(noise.add_salt_pepper_noise, 0.2),
        masking=(noise.add_masking_noise, 0.3))
    for add, *strength in (*noise.NOISES.values(), (noise.add_mixed_noise,)):
        expected = add(x, *strength, generator=seeded())
        torch.manual_seed(0)
        assert add(x).equal(expected)


def test_noise_refuses_nonsense():
    x = torch.rand(2, 50)
    integers = (x * 255).int()
    for add, highest in zip(SIMPLE, (1e6, 1, 1)):
        one_of_two = torch.tensor([[0.1], [1.01 * highest]])
        for wrong in (-0.1, math.nan, 1.01 * highest, one_of_two):
            raises(ValueError, lambda: add(x, wrong), f"must be 0 to {highest:g}")
        two = torch.tensor([[-0.1], [0.5]])
        raises(ValueError, lambda: add(x, two), "got -0.1 to 0.5")
        raises(ValueError, lambda: add(integers), "int32")
    raises(ValueError, lambda: noise.add_mixed_noise(integers.byte()), "uint8")


def test_the_picture_of_the_noises():
    """A row for each noise: the clean image, then five strengths with their PSNR below."""
    with folder(), spied(data, "image_grid") as grids:
        works(noise, "--out new")
        (rows,), options = grids[0]
        picture = data.image_grid(rows, **options)
        assert np.array_equal(pixels_of("new/noise.png"), pixels_of(picture))
    assert options["row_labels"] == ["gaussian", "salt_pepper", "masking"]
    for row, captions, add in zip(rows, options["captions"], SIMPLE, strict=True):
        clean = row[0]
        assert captions[0] == "clean" and 0.1 < clean.mean() < 0.3
        for i, strength in enumerate((0.1, 0.2, 0.3, 0.4, 0.5), 1):
            assert row[i].equal(add(clean[None], strength, seeded())[0])
            mse = np.mean((row[i] - clean).numpy() ** 2)
            assert captions[i] == f"{strength}: {-10 * np.log10(mse):.1f} dB"
        assert len(row) == len(captions) == 6


def test_psnr_is_in_decibels():
    close(noise.psnr(0.01), 20, 1e-9)
    close(noise.psnr(4), -6.0206, 1e-4)
    close(noise.psnr(0), 100, 0)


def test_ssim_against_numpy():
    """Wang et al. (2004), eq. 13, in each window of 11 x 11."""
    images = torch.rand(2, 2, 3, 14, 13, generator=seeded())
    windows = images.unfold(3, 11, 1).unfold(4, 11, 1)
    pairs = windows.reshape(2, -1, 121).double().numpy()
    gaussian = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    weights = np.outer(gaussian, gaussian).ravel()
    scores = []
    for p, q in zip(*pairs):
        a, b = np.average([p, q], 1, weights)
        (var_p, covariance), (_, var_q) = np.cov(p, q, ddof=0, aweights=weights)
        luminance = (2 * a * b + 1e-4) / (a**2 + b**2 + 1e-4)
        structure = (2 * covariance + 9e-4) / (var_p + var_q + 9e-4)
        scores.append(luminance * structure)
    expected = np.reshape(scores, (2, -1)).mean(1)
    close(noise.ssim(*images), expected, 1e-9)
    close(noise.ssim(images[0], images[0]), 1, 1e-12)
    # it copies its images to the CPU, where its window is: from this device that fails
    raises(NotImplementedError, lambda: noise.ssim(*images.to("meta")), "copy out of meta")


# ------------------------------------------------------------------------------------------ data


def bytes_(shape, high=256, seed=0):
    return np.random.default_rng(seed).integers(0, high, shape, dtype=np.uint8)


def put(path, content):
    """Write a file into a folder that need not exist. Returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # writing over a file takes much longer
    path.write_bytes(content)
    return path


def records(count):
    """Records of CIFAR-10, uint8 (count, 3073): the label, then the pixels."""
    return np.hstack([bytes_((count, 1), 10), bytes_((count, 3072))])


def idx(array):
    return np.array([0x800 + array.ndim, *array.shape], ">u4").tobytes() + array.tobytes()


def write_mnist(raw, images=bytes_((6, 28, 28), 5), labels=bytes_(6, 10), prefix="t10k"):
    arrays = {"images-idx3": images, "labels-idx1": labels}
    return [put(raw / f"{prefix}-{name}-ubyte.gz", gzip.compress(idx(array)))
            for name, array in arrays.items()]


def files_in(root):
    return [path for path in root.rglob("*") if not path.is_dir() or path.is_symlink()]


def pixels_of(picture):
    """A Pillow image, or the picture in a file, as integers that may become negative."""
    return np.asarray(picture if isinstance(picture, Image.Image) else Image.open(picture), int)


def save_png(name, *planes):
    """Write one grey plane, or several planes (H, W) or (H, W, C) beside each other, as a PNG."""
    pixels = planes[0] if len(planes) == 1 else np.dstack(planes)
    Image.fromarray(pixels.astype(np.uint8)).save(name)


def test_cifar10_and_mnist_are_read_as_documented_from_where_programs_put_them():
    made, images, labels = records(5), bytes_((6, 28, 28), 5), np.arange(4, 10, dtype=np.uint8)
    batches = {f"data_batch_{i + 1}.bin": record for i, record in enumerate(made)}
    idx_files = {"train-images-idx3-ubyte": gzip.compress(idx(images)),
                 "train-labels.idx1-ubyte": idx(labels)}
    of_cifar10 = ("{}", "cifar-10-batches-bin/{}", "cifar-10-binary/cifar-10-batches-bin/{}",
                  "cifar-10-batches-bin/cifar-10-batches-bin/{}")
    of_mnist = ("MNIST/raw/{}", "MNIST/{}", "raw/{}", "{}", "{}.gz", "data/MNIST/raw/{}",
                "MNIST/raw/{0}/{0}", "{0}/{0}")
    for real, files, places, *right in (
            ("cifar10", batches, of_cifar10, made[:, 1:].reshape(5, 3, 32, 32), made[:, 0]),
            ("mnist", idx_files, of_mnist, images[:, None], labels)):
        for place in places:
            with folder() as root, patched(data, CIFAR10_URLS=[], MNIST_URLS=[]):
                for name, content in files.items():
                    put(root / place.format(name), content)
                name, *got = data.load_dataset("auto", root, True, real)
            assert name == real and got[0].dtype == got[1].dtype == torch.uint8
            for values, right_values in zip(got, right):
                close(values, right_values)


def test_damaged_sets_are_refused_and_auto_does_not_paper_over_it():
    two, images = records(2).tobytes(), bytes_((6, 28, 28), 5)
    plain, packed = idx(images), gzip.compress(idx(images))
    flipped = packed[:900] + b"????" + packed[904:]
    floats = b"\0\0\x0d\x03" + plain[4:]
    inside = (b"", plain[:-1], plain + b"x", floats, plain[:9], idx(images[:0]),
              idx(images[:, 1:]), idx(bytes_(6, 10)))
    with folder() as root:
        images, labels = write_mnist(root)
        for real, path, contents in (
                ("cifar10", root / "test_batch.bin",
                 (b"", two[:-1], two + b"x", b"\n" + two[1:], bytes(3073 * 10_001))),
                ("mnist", labels, [packed]),
                ("mnist", images, (b"", b"none", packed[:-20], flipped,
                                   *map(gzip.compress, inside)))):
            for content in contents:
                put(path, content)
                load = lambda: data.load_dataset("auto", root, False, real)
                raises(ValueError, load, path, "delete it")


def test_cifar10_with_fewer_than_10000_images_is_read_with_a_notice():
    with folder() as root:
        for count, notices in ((10_000, 0), (9_999, 1)):
            put(root / "test_batch.bin", (b"\t" + bytes(3072)) * count)
            (_, labels), said = quiet(data.load_cifar10, root, False)
            assert labels.tolist() == [9] * count
            assert said.count("notice: test_batch.bin") == notices


def test_other_sets_in_the_place_of_mnist_are_refused_as_what_they_are():
    with folder() as root:
        for labels in (bytes_(5, 10), np.full(6, 46, np.uint8), bytes_(697_932, 10)):  # EMNIST's
            write_mnist(root, labels=labels)
            raises(ValueError, lambda: data.load_mnist(root, False), "6 t10k images",
                   f"with {len(labels):,} labels up to {labels.max()} are not MNIST")


@contextlib.contextmanager
def cifar10_archive(name):
    """A folder with an archive that is taken for CIFAR-10's: 2 images in each file."""
    with folder() as root:
        archive, batch = root / name, put(root / "batch", records(2))
        with tarfile.open(archive, "w:gz") as tar:
            for member in ("test_batch.bin", "../../evil.bin", "data_batch_1.bin"):
                tar.add(batch, f"cifar-10-batches-bin/{member}")
        batch.unlink()
        md5 = hashlib.md5(archive.read_bytes()).hexdigest()
        with patched(data, CIFAR10_URLS=[archive.as_uri()], CIFAR10_MD5=md5):
            yield archive


def load_cifar10(place="."):
    return data.load_cifar10(place, False)[0]


MISSING, OTHER = "file:///missing/", (HERE / "README.md").as_uri()  # addresses


def test_cifar10_is_downloaded_from_the_first_right_address_and_unpacked_into_its_folder():
    with cifar10_archive("source") as source:
        with patched(data, CIFAR10_URLS=[MISSING, OTHER, source.as_uri(), OTHER]):
            images, said = quiet(load_cifar10, "a/b")
        lines = [f"downloading {url}" for url in (MISSING, OTHER, source.as_uri())]
        assert len(images) == 2 and said.splitlines()[:3] == lines
        places = {str(path.parent) for path in files_in(Path("."))}
        assert places == {".", "a/b", "a/b/cifar-10-batches-bin"}
        assert "downloading" not in quiet(load_cifar10, "a/b")[1]
        Path("a/b/cifar-10-binary.tar.gz").unlink()  # the training files are there as well
        with patched(data, CIFAR10_URLS=[]):
            assert len(data.read_cifar10_records("a/b", "data_batch_1.bin")) == 2


def test_an_archive_of_cifar10_put_where_the_message_says_is_used_and_kept():
    with cifar10_archive("cifar-10-binary.tar.gz") as archive, patched(data, CIFAR10_URLS=[]):
        content = archive.read_bytes()
        mine = put(Path("cifar-10-batches-bin/data_batch_1.bin"), b"mine")
        assert len(load_cifar10()) == 2
        assert archive.read_bytes() == content and mine.read_bytes() == b"mine"
        shutil.rmtree(mine.parent)
        put(archive, b"another")
        raises(ValueError, load_cifar10, archive.name, "move it away")
        assert archive.read_bytes() == b"another"


def test_a_kill_while_cifar10_is_unpacked_costs_nothing():
    write = Path.write_bytes

    def killed(path, content):
        write(path, content[:3073])  # a whole record
        raise KeyboardInterrupt

    with cifar10_archive("cifar-10-binary.tar.gz"), patched(data, CIFAR10_URLS=[]):
        with patched(Path, write_bytes=killed, unlink=lambda *_, **__: None):
            raises(KeyboardInterrupt, load_cifar10)
        assert len(load_cifar10()) == 2


def test_a_download_that_fails_leaves_nothing_half_done():
    write, breaks_off = Path.write_bytes, unittest.mock.MagicMock()
    breaks_off().__enter__().read.side_effect = http.client.IncompleteRead(b"a")

    def disk_full(path, content):
        write(path, content[:9])
        raise OSError("disk full")

    with cifar10_archive("source") as source:
        for accident, word in ((patched(data, CIFAR10_URLS=[MISSING, OTHER]), "missing"),
                               (patched(data, CIFAR10_URLS=[OTHER, MISSING]), "its MD5 should"),
                               (patched(data, CIFAR10_URLS=[OTHER]), "its MD5 should be"),
                               (patched(urllib.request, urlopen=breaks_off), "IncompleteRead"),
                               (patched(Path, write_bytes=disk_full), "disk full")):
            with accident:
                raises(ConnectionError, load_cifar10, word)
            assert files_in(source.parent) == [source]
    assert breaks_off.call_args.kwargs["timeout"] <= 60


def test_mnist_is_downloaded_and_checked():
    with folder() as root:
        good = write_mnist(root / "good")
        sums = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in good}
        urls = [MISSING, f"{root.as_uri()}/good/"]
        with patched(data, MNIST_MD5=sums, MNIST_URLS=urls):
            _, labels = data.load_mnist(root / "d", False)
        close(labels, bytes_(6, 10))
        assert len(files_in(root / "d")) == 2


def test_without_a_network_auto_falls_back_loudly_and_a_named_set_fails():
    closed = ["https://127.0.0.1:9/"]
    small = dict.fromkeys(data.BUILT_IN, (data.make_glyphs, 4, 2))
    with folder() as root, patched(data, MNIST_URLS=closed, CIFAR10_URLS=closed, BUILT_IN=small):
        os.mkdir("cifar-10-batches-py")  # that of another archive
        for real, stand_in, found in (("mnist", "glyphs", "nothing"),
                                      ("cifar10", "leaves", "cifar-10-batches-py")):
            (name, images, _), said = quiet(data.load_dataset, "auto", root, True, real)
            assert name == stand_in and len(images) == 4 and said.count("***") == 2
            assert f"--data {real} makes this an error" in said
            raises(ConnectionError, lambda: data.load_dataset(real, root, True), stand_in, "127.",
                   f"put this file into {root}", f"found there: {found}")
        raises(ValueError, lambda: data.load_dataset("nonsense", root, True), "nonsense")


def test_built_in_sets_have_other_images_for_the_test_and_the_same_in_every_call():
    assert data.BUILT_IN == {"leaves": (data.make_leaves, 20_480, 1_024),
                             "glyphs": (data.make_glyphs, 20_000, 2_000)}
    for name, (make, *_) in data.BUILT_IN.items():
        with patched(data, BUILT_IN={name: (make, 1_100, 30)}):  # leaves: on two canvases
            _, images, labels = data.load_dataset(name, "", True)
            _, test_images, _ = data.load_dataset(name, "", False)
        assert torch.equal(test_images, make(30, seed=2)[0])
        assert images.dtype == labels.dtype == torch.uint8
        assert len(images) == len(labels) == 1_100 and len(test_images) == 30
        different = {image.numpy().tobytes() for image in [*images, *test_images]}
        assert len(different) > 0.99 * 1_130  # some leaves show one disc alone
        assert labels.any() == (name == "glyphs")


def test_glyphs_are_digits_that_vary_in_place_size_stroke_and_angle():
    with spied(ImageDraw.ImageDraw, "text") as texts, spied(Image.Image, "rotate") as turns:
        images, labels = data.make_glyphs(600, seed=2)
    _, places, digits, _, fonts = zip(*(given for given, _ in texts))
    assert [int(digit) for digit in digits] == labels.tolist()
    close(np.bincount(labels) / 600, [0.1] * 10, 0.04)
    for values, middle, reach in ((places, 14, 2.5), ([given[1] for given, _ in turns], 0, 20)):
        values = np.array(values).T
        close(values.min(-1), middle - reach, reach / 25)
        close(values.max(-1), middle + reach, reach / 25)
    assert {font.size for font in fonts} == set(range(20, 31))
    styles = {(options["anchor"], options["stroke_width"]) for _, options in texts}
    assert styles == {("mm", 0), ("mm", 0.5), ("mm", 1)}
    for image, ((digit, angle, *_), _) in zip(images, turns):
        close(image[0], pixels_of(digit.rotate(angle, Image.BICUBIC)))


@functools.cache
def discs_of_leaves():
    """The discs of one canvas, x, y, r (N,) in pixels and fill (N, 3), and its 1,024 images."""
    with spied(ImageDraw.ImageDraw, "circle") as drawn:
        tiles, _ = data.make_leaves(1024, seed=5)
    _, places, r, fill = zip(*(given for given, _ in drawn))
    x, y = np.array(places).T / 2  # drawn at twice the size
    return x, y, np.array(r) / 2, np.array(fill), tiles.numpy()


def test_leaves_are_discs_of_the_stated_radii_and_colours():
    x, y, r, fill, images = discs_of_leaves()
    gaps = (images == 122).all(1).mean()  # between the discs
    assert 0.001 < gaps < 0.03, gaps
    close([x.min(), x.max(), y.min(), y.max()], [-40, 1064, -40, 1064], 1)
    u = np.sort((3**-2 - r**-2) / (3**-2 - 40**-2))  # the distribution function: uniform if r^-3
    close(u, np.linspace(0, 1, len(u)), 1.63 / len(u) ** 0.5)  # Kolmogorov, 1 %
    close(u[[0, -1]], [0, 1], 0.001)
    assert 3.5 < (math.pi * r**2).sum() / 1104**2 < 6  # each place is painted several times
    differences = fill[:, 0] - fill[:, 2]
    close([*fill.mean(0), fill.std(), differences.std()], [122, 122, 122, 57, 30], 2)


def test_of_leaves_the_last_disc_over_a_pixel_is_seen():
    *discs, tiles = discs_of_leaves()
    x, y, r, fill = (values[::-1] for values in discs)
    same = []
    for row, column in np.random.default_rng(0).integers(1024, size=(300, 2)):
        last = np.argmax(np.hypot(x - column - 0.5, y - row - 0.5) < r)
        tile = tiles[row // 32 * 32 + column // 32]
        same.append((tile[:, row % 32, column % 32] == fill[last]).all())
    assert 0.6 < np.mean(same) < 0.9  # edges are smooth


def test_pictures_are_turned_upright():
    with folder():
        for turn in range(1, 9):
            exif = Image.Exif()
            exif[0x0112] = turn
            for name, shape in (("photo.png", (20, 32, 3)), ("scan.tif", (20, 32))):
                picture = Image.fromarray(bytes_(shape))
                picture.save(name, exif=exif)
                picture.getexif()[0x0112] = turn
                upright = ImageOps.exif_transpose(picture).convert("RGB")
                close(pixels_of(data.open_picture(name))[..., :3], pixels_of(upright))


def read_square(name, channels=3):
    """The middle 32 x 32 pixels of a picture of at least that size, (32, 32, C)."""
    square = data.square_picture(data.open_picture(name), channels, 32)
    return square.permute(1, 2, 0).numpy()


def test_pictures_of_every_kind_are_read():
    square = bytes_((32, 32, 3))
    visible = square[..., :1] > 127
    sprite = np.dstack([square, 255 * visible]).astype(np.uint8)
    plain = Image.fromarray(square)
    grey = (square @ [0.299, 0.587, 0.114])[..., None]
    deep = np.arange(1024, dtype=np.uint16).reshape(32, 32) * 64
    sixteen = Image.fromarray(deep), deep[..., None] / 257
    with folder():
        for name, image, right in (
                ("rgb.tif", plain, square),
                ("rgba.png", Image.fromarray(sprite), np.where(visible, square, 255)),
                ("cmyk.tif", plain.convert("CMYK"), square),
                ("palette.tif", plain.quantize(16), pixels_of(plain.quantize(16).convert("RGB"))),
                ("grey.tif", plain, grey),
                ("grey.png", plain.convert("LA"), grey),
                ("bits.png", Image.fromarray(visible[..., 0]), visible * 255),
                ("16.tif", *sixteen),
                ("16.png", *sixteen),
                ("16.pgm", *sixteen)):
            image.save(name)
            pixels, said = quiet(read_square, name, right.shape[2])
            close(pixels, right, 1)
            notice = f"notice: {name}: 16 bits become 8, of which the brightest is 255 of 255\n"
            assert said == notice * name.startswith("16")


def test_tiff_files_say_which_number_is_white():
    white = np.full((32, 32), 65535)
    with folder():
        for name, kind in (("32.tif", np.int32), ("float.tif", np.float32)):
            Image.fromarray(white.astype(kind)).save(name)
            raises(ValueError, lambda: data.open_picture(name), name, "which number is white")
        Image.fromarray(white.astype(np.uint16)).save("12.tif")
        content = Path("12.tif").read_bytes()
        put(Path("12.tif"), content.replace(b"\2\1\3\0\1\0\0\0\x10", b"\2\1\3\0\1\0\0\0\x0c"))
        close(quiet(read_square, "12.tif")[0], 255)  # 4,095 is white


def test_16_bits_with_a_transparent_colour():
    grey = np.arange(24, dtype=np.uint16).reshape(4, 6) * 1000
    colour = bytes.fromhex(  # a PNG of two pixels: IHDR, tRNS with the second one's colour, IDAT
        "89504e470d0a1a0a0000000d49484452000000020000000110020000002bd0349e"
        "0000000674524e53c350ea601b58fc5adc60"
        "000000154944415418d363607ec17e817bc7e1805709d2110022970556e05df8a6"
        "0000000049454e44ae426082")
    with folder():
        Image.fromarray(grey).save("grey.png", transparency=8000)
        Path("colour.png").write_bytes(colour)
        for name, hole in (("grey.png", [1, 2]), ("colour.png", [0, 1])):
            (image, given, *_), said = quiet(data.load_picture, name, 3)
            assert (~given).nonzero().tolist() == [hole] and "16 bits" in said
    close(image[:, 0].T, np.array([[1000, 2000, 3000], [50000, 60000, 7000]]) / 257, 1)


def test_of_several_frames_the_first_is_taken_with_a_notice():
    red, blue = (Image.new("RGB", (32, 32), colour) for colour in ("red", "blue"))
    with folder():
        for name in ("a.gif", "a.png", "a.webp", "a.tif", "phone.mpo"):
            red.save(name, save_all=True, append_images=[blue], lossless=True)
            pixels, said = quiet(read_square, name)
            close(pixels[0, 0], [255, 0, 0], 1)
            assert (f"{name} has 2 frames" in said) == bool(said) == name.startswith("a")
        red.save("still.gif")
        assert not quiet(read_square, "still.gif")[1]


def test_a_picture_is_reduced_to_its_middle_square():
    stripes = np.repeat(np.uint8([0, 100, 200]), 32)[None].repeat(32, 0)
    with folder():
        for picture in (stripes, stripes.T):
            save_png("stripes.png", picture)
            close(read_square("stripes.png")[4:-4, 4:-4], 100)
        save_png("fine.png", bytes_((256, 256)))
        assert read_square("fine.png").std() < 20  # averaged; if picked: 74
    for size in ((1, 1), (20_000, 3), (3, 20_000), (33, 31)):
        small = data.square_picture(Image.new("RGBA", size), 3, 8)
        assert small.shape == (3, 8, 8) and small.dtype == torch.uint8


def test_what_is_no_picture_is_refused_by_name():
    with folder(), warnings.catch_warnings(action="error"):
        for name, content, word in (("text.png", b"no picture", "identify"),
                                    ("huge.pgm", b"P5 20000 15001 255\n", "300 megapixels"),
                                    ("cut.pgm", b"P5 20000 5000 255\n", "truncated")):
            Path(name).write_bytes(content)
            refusal = f"cannot use {name} as a picture"
            raises(ValueError, lambda: data.open_picture(name), refusal, word)
        for name in ("missing.png", "."):
            raises(ValueError, lambda: data.open_picture(name), f"cannot use {name} as")


def test_a_folder_of_pictures_is_split_by_their_names():
    names = [f"{'sub/' * (i % 2)}{i}.PNG" for i in range(199)]
    names.append(os.fsdecode(b"\xc3\xa4\xff.png"))  # no UTF-8
    order = sorted(range(200), key=lambda i: zlib.crc32(os.fsencode(names[i])))
    with folder():
        os.makedirs("a/sub")
        for i, name in enumerate(names):
            Image.new("RGB", (9, 5), (i, 7, 255 - i)).save(f"a/{name}")
        for name in ("notes.txt", "sub/broken.png"):
            Path("a", name).write_bytes(b"x")
        for place, train, right in (("a", True, order[20:]), ("b", False, order[:20])):
            os.rename("a", place)
            (name, images, labels), said = quiet(data.load_dataset, place, "", train)
            assert name == place and images.shape == (len(right), 3, 32, 32)
            assert said.count("\n") == said.count("2 of 202") == (not train)
            assert images[:, :, 0, 0].tolist() == [[i, 7, 255 - i] for i in right]
            assert labels.tolist() == [i < 199 and i % 2 for i in right]  # in sub or not


def test_the_labels_of_a_folder_are_the_same_in_both_parts():
    alone = max(range(30), key=lambda i: zlib.crc32(f"a/{i}.png".encode()))  # in training
    with folder():
        for name in (f"a/{alone}", *(f"b/{i}" for i in range(20))):
            os.makedirs(os.path.dirname(name), exist_ok=True)
            Image.new("L", (5, 5)).save(f"{name}.png")
        for train, expected in ((True, [0] + 18 * [1]), (False, [1, 1])):
            labels = data.load_dataset(".", "", train)[2]
            assert sorted(labels.tolist()) == expected


def test_a_folder_needs_20_pictures_and_links_to_them_are_followed():
    with folder():
        for place in ("photos", "elsewhere"):
            os.mkdir(place)
            for i in range(10):
                Image.new("I;16", (5, 5)).save(f"{place}/{i}.png")  # no notice for each
        Path("photos/note.txt").write_bytes(b"text")
        raises(ValueError, lambda: data.load_dataset("photos", "", True), "holds 10 ", "20 are")
        os.unlink("photos/note.txt")
        os.symlink("../elsewhere", "photos/link")
        os.symlink("..", "elsewhere/circle")  # photos/link/circle is the folder around both
        os.symlink("nowhere", "photos/broken")  # no file
        frames = [Image.new("L", (5, 5), level) for level in (0, 99)]
        frames[0].save("photos/0.png", "GIF", save_all=True, append_images=frames[1:])
        for train, count in ((True, 18), (False, 2)):
            (_, images, _), said = quiet(data.load_dataset, "photos", "", train, "mnist")
            assert images.shape == (count, 1, 28, 28) and not said


def test_large_jpeg_files_of_a_folder_are_read_at_a_reduced_size():
    with folder(), spied(data, "square_picture") as squares:
        for i in range(20):
            Image.new("RGB", (600, 400), "red").save(f"{i}.jpg")
        _, images, _ = data.load_dataset(".", "", False)
    assert {given[0].size for given, _ in squares} == {(150, 100)}  # at least 64
    close(images[0, :, 16, 16], [255, 0, 0], 1)


def test_sparse_split_against_numpy():
    for height, width in ((6, 9), (1, 54), (54, 1)):
        images = bytes_((40, 3, height, width))
        pixels = images.reshape(40, 3, 54) / 127.5 - 1
        order = torch.rand(40, 54, generator=seeded()).round(decimals=1)
        ranks = order.numpy().argsort(1, stable=True)  # of equal ones the first
        split = data.sparse_split(torch.from_numpy(images), 0.25, 0.4, order=order)
        close(split["full_image"].flatten(2), pixels)
        for name, index in (("input", ranks[:, :13]), ("output", ranks[:, 13:34])):
            coords, values = split[f"{name}_coords"], split[f"{name}_values"]
            close(split[f"{name}_indices"], index)  # never the same pixel twice
            close(coords[..., 0], np.linspace(0, 1, width)[index % width])
            close(coords[..., 1], np.linspace(0, 1, height)[index // width])
            close(values.mT, np.take_along_axis(pixels, index[:, None], 2))
            assert values.dtype == coords.dtype == torch.float32


def test_splits_draw_pixels_and_places_with_their_generator():
    images = torch.rand(60, 1, 32, 32, generator=seeded()) * 2 - 1
    for split in (data.sparse_split, data.off_grid_split):
        a, b, c = (split(images, generator=seeded(seed)) for seed in (1, 1, 2))
        assert torch.equal(a["full_image"], images)
        assert a["input_coords"].shape == a["output_coords"].shape == (60, 204, 2)
        for name in ("input_coords", "output_indices"):
            assert torch.equal(a[name], b[name]) and not torch.equal(a[name], c[name])
        for places in a["input_coords"].unbind(2):
            close([places.min(), places.mean(), places.max()], [0, 0.5, 1], 0.01)
    assert data.sparse_split(images, 0.2, None)["output_indices"].shape == (60, 820)


def test_an_off_grid_split_reads_its_input_bilinearly_and_its_output_on_the_grid():
    images = torch.from_numpy(bytes_((4, 3, 6, 9)))
    order = torch.rand(4, 54 + 2 * 13, generator=seeded())  # of 54 pixels; 13 places (x, y)
    places = order[:, 54:].view(4, 13, 2)
    column, row = (places * torch.tensor([8, 5])).round().unbind(2)
    W = np.stack([bilinear_weights(place, width=9, height=6) for place in places])
    on_grid = data.sparse_split(images, 0.25, None, order=order[:, :54])
    for output_ratio, count in ((0.4, 21), (None, 54)):
        split = data.off_grid_split(images, 0.25, output_ratio, order=order)
        close(split["input_coords"], places)
        close(split["input_indices"], row * 9 + column)
        close(split["input_values"], W @ on_grid["full_image"].flatten(2).mT.numpy(), 1e-5)
        double = data.off_grid_split(split["full_image"].double(), 0.25, 0.4, order=order)
        close(double["input_values"], split["input_values"])
        for name in ("indices", "coords", "values"):  # what sparse_split takes, then what it gives
            everywhere = torch.cat([on_grid[f"output_{name}"], on_grid[f"input_{name}"]], 1)
            assert torch.equal(split[f"output_{name}"], everywhere[:, :count])


def test_ratios_that_take_no_pixel_or_too_many_are_refused():
    images = torch.zeros(1, 1, 6, 9)
    ratios = [(0.6, 0.5), (1, None)]
    for odd in (0, -0.1, 0.0001, 1, math.nan, math.inf):
        ratios += [(odd, 0.2), (0.2, odd)]
    for split, pair in itertools.product((data.sparse_split, data.off_grid_split), ratios):
        raises(ValueError, lambda: split(images, *pair), *pair)
    assert data.sparse_split(images, 0.5, 0.5)["output_indices"].shape == (1, 27)


def test_fixed_order_is_a_function_of_seed_image_and_pixel():
    for seed in (0, 1, 2**32 - 1):
        order = data.fixed_order(seed, torch.tensor([299, 7]), 784)
        right = [np.random.default_rng((seed, image)).random(784) for image in (299, 7)]
        close(order, np.stack(right))
        assert order.dtype == torch.float32


def test_assemble_puts_pixels_back_into_their_rows_and_columns():
    image = torch.rand(1, 3, 5, 7, generator=seeded())
    split = data.sparse_split(image, 0.5, None, generator=seeded())
    whole = sample.assemble(split, split["output_values"])
    close(2 * whole - 1, image)
    part = sample.assemble(split)
    assert (part == whole).sum() == 3 * 17
    assert (part == 0.5).sum() == 3 * 18  # grey


def drawn(draw, *given, **options):
    """The picture that a function draws, and the texts in it: [(text, (x, y))]."""
    with spied(ImageDraw.ImageDraw, "text") as texts:
        picture = draw(*given, **options)
    return picture, [(text, place) for (_, place, text, *_), _ in texts]


def find(picture, image):
    """The only place (x, y) of an image (C, H, W) in [0, 1], each pixel 3 x 3 pixels large."""
    levels = (255 * image.clamp(0, 1)).round().expand(3, -1, -1)
    tile = np.kron(levels, np.ones((1, 3, 3)))
    pixels = pixels_of(picture).transpose(2, 0, 1)
    windows, = np.lib.stride_tricks.sliding_window_view(pixels, tile.shape)
    (y, x), = np.argwhere((windows == tile).all((2, 3, 4)))
    return x, y


def test_a_grid_shows_images_in_their_places_beside_their_labels():
    one, two, grey = torch.rand(3, 3, 5, 7, generator=seeded()) * 3 - 1  # beyond [0, 1]
    columns, rows = ["column 1", "column 2"], ["a long name of row 1", "row 2"]
    captions = [["of one"], ["of two", "of grey"]]
    for labels in ((), (columns, rows, captions)):
        grid, texts = drawn(data.image_grid, [[one], [two, grey[:1]]], *labels, zoom=3)
        left, top = find(grid, one)
        right, bottom = find(grid, grey[:1])
        assert find(grid, two) == (left, bottom)
        assert right > left + 21 and bottom > top + 15
    assert dict(texts) == {
        "column 1": (left + 10.5, 5),
        "column 2": (right + 10.5, 5),
        "a long name of row 1": (6, top + 7.5),
        "row 2": (6, bottom + 7.5),
        "of one": (left + 10.5, top + 17),
        "of two": (left + 10.5, bottom + 17),
        "of grey": (right + 10.5, bottom + 17)}
    assert top > 5 + 13 and bottom > top + 17 + 13  # texts are 13 pixels high
    assert left > 6 + ImageFont.load_default(13).getlength(rows[0])


def test_a_caption_is_centred_below_its_image_and_a_pixel_is_four_wide():
    with spied(ImageDraw.ImageDraw, "text") as texts:
        grid = data.image_grid([[torch.zeros(1, 8, 8)]], captions=[["ab"]])
        data.image_grid([[torch.zeros(1, 8, 8)]], ["column"], ["row"])
    (_, place, text, *_), _ = texts[0]
    assert (place, text) == ((12 + 16, 6 + 32 + 2), "ab")
    assert [given[-1] for given, _ in texts] == ["ma", "ma", "lm"]  # caption, column, row
    assert grid.size == (12 + 32 + 6, 6 + 32 + 24)


def test_heat_is_black_red_yellow_white():
    error = torch.linspace(-0.6, 0.6, 25).view(1, 1, 25)
    right = [np.interp(abs(error[0]), [start / 6, (start + 1) / 6], [0, 1]) for start in range(3)]
    close(data.heat(error), np.array(right))
    channels = torch.cat([2 * error, -4 * error, 0 * error])
    close(data.heat(channels, limit=1.0), np.array(right))


COLOURS = (31, 111, 180), (209, 72, 31)  # of the first two curves of a chart


def test_the_curves_of_a_chart_are_where_the_numbers_on_its_axes_say():
    curves = {"one": ([0, 50, 100], [0, 2.5, 10]), "two": ([25, 100], [7.5, 5])}
    picture, texts = drawn(data.line_chart, "a title", curves)
    chart, at = pixels_of(picture), dict(texts)
    assert at["0"][0] < at["100"][0] - 200 and at["10.0"][1] < at["0.0"][1] - 200
    assert at["a title"][0] < at["two"][0] - 50 < at["one"][0] - 100
    for (label, points), colour in zip(curves.items(), COLOURS):
        right, top = at[label]
        places = [chart[top:top + 14, right - 20:right]]
        for x, y in zip(*points):
            column, row = int(at[f"{x}"][0]), int(at[f"{y:.1f}"][1])
            places.append(chart[row - 1:row + 2, column - 1:column + 2])
        for near in places:
            assert (near == colour).all(2).any()


def test_the_numbers_on_an_axis_are_right_and_distinct():
    for ends in ((20.9, 21), (0, 1), (70, 7000), (-0.3, 0.1), (-1e-4, 1e-4), (1e5, 1e5 + 1)):
        _, texts = drawn(data.line_chart, "", {"": (ends, ends)})
        numbers = {float(text) for text, _ in texts if text}
        close(sorted(numbers), np.linspace(*ends, 5), 0.02 * np.ptp(ends))


def test_a_chart_of_a_single_point_shows_a_dot():
    chart, texts = drawn(data.line_chart, "", {"": ([7], [7])})
    assert 20 < (pixels_of(chart) == COLOURS[0]).all(2).sum() < 60
    assert {*dict(texts)} == {"", "7.00", "7.25", "7.50", "7.75", "8.00"}


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
        load = functools.partial(data.load_picture, "photo.png")
        image, given, has_truth, _ = load(3)
        grey, more, *_ = load(1, input_ratio=0.75)
        assert torch.equal(load(3)[1], given) and not torch.equal(load(3, seed=1)[1], given)
    assert has_truth and given.sum() == 0.2 * 5400 and more.sum() == 0.75 * 5400
    assert given[:30].sum() > 300 and given[:, :45].sum() > 300
    assert np.array_equal(image, photo.transpose(2, 0, 1))
    close(grey[0], photo @ [0.299, 0.587, 0.114], 1)


def test_transparent_pixels_are_missing_and_so_are_marked_ones_of_a_mask():
    photo, hole = photograph()
    bar = 255 * (np.arange(90) > 70) + 0 * hole
    with folder():
        save_png("photo.png", photo)
        save_png("holes.png", photo, np.where(hole, 127, 128))
        save_png("bar.png", bar)
        for name, mask, missing in (("holes.png", None, hole), ("photo.png", "bar.png", bar),
                                    ("holes.png", "bar.png", hole + bar)):
            image, given, has_truth, _ = data.load_picture(name, 3, mask)
            assert not has_truth and np.array_equal(given, missing == 0), name
            assert np.array_equal(image[:, given], photo[missing == 0].T)


def marked(image, name="mask.png", **options):
    """Which pixels a mask marks, bool (H, W). image: an array (H, W), or a Pillow image."""
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    image.save(name, **options)
    return np.asarray(data.read_mask(name, image.size)) == 255


def test_a_mask_marks_what_it_touches():
    _, hole = photograph()
    levels = np.arange(256, dtype=np.uint8)[None]
    with folder():
        assert np.array_equal(marked(levels), levels >= 16)  # the rim of a stroke
        for low, high in ((0, 1), (0, 255), (3, 4), (200, 201)):
            assert np.array_equal(marked(np.where(hole, high, low).astype(np.uint8)), hole > 0)
        assert np.array_equal(marked(np.uint16(hole > 0)), hole > 0)
        assert marked(np.full((2, 2), 255, np.uint8)).all()


def test_transparent_pixels_of_a_mask_are_not_marked():
    photo, (_, hole) = bytes_((60, 90, 3)), photograph()
    black, left = 0 * hole, np.where(np.arange(90) < 40, hole, 0)
    with folder():
        for planes, missing in (((~black, hole), hole),
                                ((black + 76, black, black, hole), hole),  # red
                                ((hole, left), left),
                                ((photo, ~hole), hole)):
            found, said = quiet(marked, np.dstack(planes))
            assert np.array_equal(found, missing > 0)
            assert ("mask.png is a photograph" in said) == (planes[0] is photo)


def text_and_lines(colour, fontmode):
    image = Image.new("RGB", (200, 90))
    draw = ImageDraw.Draw(image)
    draw.fontmode = fontmode
    draw.text((5, 5), "a mask\nof text", colour, ImageFont.load_default(30))
    for i in range(5):
        draw.line((110, 10 * i, 190, 10 + 16 * i), colour, width=i + 1)
    return image


def test_of_a_jpeg_mask_the_noise_is_not_marked_and_soft_edges_are():
    hard = text_and_lines("white", "1")
    soft = text_and_lines("white", "L")
    red = text_and_lines("red", "1")
    with folder():
        for quality in (60, 65, 75, 80, 85, 90, 95):
            found = marked(hard, "mask.jpg", quality=quality)
            assert np.array_equal(found, marked(hard)), quality
            found = marked(soft, "mask.jpg", quality=quality)
            level = pixels_of(soft)[..., 0]
            assert not found[level == 0].any() and found[level > 550 - 5.5 * quality].all()
        assert marked(red, "mask.jpg", quality=75)[marked(hard)].mean() > 0.99
        for quality in (10, 20, 25, 30):  # where noise may be as high as half of the strokes
            found = marked(hard, "mask.jpg", quality=quality)
            assert found[marked(hard)].mean() > 0.97 and found[~marked(hard)].mean() < 0.01


def test_masks_that_cannot_be_used_are_refused():
    photo, hole = photograph()
    with folder():
        save_png("photo.png", photo)
        save_png("small.png", hole[:50])
        save_png("dot.png", 0 * hole[:1, :1])
        save_png("black.png", 0 * hole)
        save_png("dark.png", np.arange(5400).reshape(60, 90) % 16)
        for mask, *words in (("small.png", "same size", "it has (90, 50)", "not (90, 60)"),
                             ("dot.png", "same size", "(1, 1)"), ("none.png", "none.png"),
                             ("black.png", "no pixel is missing", "black.png", "up to 0", 16),
                             ("dark.png", "dark.png", "up to 15", 16)):
            raises(ValueError, lambda: data.load_picture("photo.png", 3, mask), *words)


def test_a_result_keeps_colour_profile_and_resolution():
    picture = Image.fromarray(photograph()[0])
    colour, ink, grey = (bytes(16) + space + bytes(99) for space in (b"RGB ", b"CMYK", b"GRAY"))
    with folder() as place:
        for mode, profile, kept_in in (("RGB", colour, "RGB"), ("L", grey, "L"),
                                       ("I;16", grey, "L"), ("CMYK", ink, None),
                                       ("RGB", grey, None)):
            picture.convert(mode).save("photo.tif", icc_profile=profile, dpi=(300, 300))
            (*_, info), _ = quiet(data.load_picture, "photo.tif", 3)
            result = Image.new("L" if kept_in == "RGB" else "RGB", (2, 2))
            quiet(functools.partial(data.save_pictures, **info), place, {"result.png": result})
            with Image.open("result.png") as saved:
                assert saved.info.get("icc_profile") == (profile if kept_in else None)
                assert saved.mode == (kept_in or "RGB")
                close(saved.info["dpi"], (300, 300), 0.1)
        picture.save("plain.tif")
        picture.save("odd.tif", dpi=(300, 300))
        content = Path("odd.tif").read_bytes()
        Path("odd.tif").write_bytes(content.replace(b"\x2c\1\0\0\1\0\0\0", bytes(8)))  # 0 / 0
        picture.save("fine.tif", dpi=(1e6, 1e6))
        for name in ("plain.tif", "odd.tif", "fine.tif"):
            assert data.load_picture(name, 3)[3] == {}


def test_pictures_are_saved_all_or_none():
    place = Path("a/b")

    def save(level, *names):
        picture = Image.new("L", (2, 2), level)
        return quiet(data.save_pictures, place, dict.fromkeys(names, picture))[1]

    with folder():
        with spied(tempfile, "TemporaryDirectory") as temporary:
            said = save(1, "one.png", "two.png")
        assert temporary == [((), {"dir": place})]  # another file system needs a copy
        assert said == f"picture: {place}/one.png\npicture: {place}/two.png\n"
        os.mkdir(place / "folder.png")
        for bad in ("two.odd", "folder.png"):
            raises(ValueError, lambda: save(2, "one.png", bad))
            assert pixels_of(place / "one.png").max() == 1
        full = unittest.mock.Mock(side_effect=OSError)
        with patched(data, print=full, create=True):
            raises(OSError, lambda: save(3, "one.png", "two.png"))
        assert {pixels_of(path).max() for path in files_in(place)} == {3}
        assert len(files_in(place)) == 2


def test_the_limit_that_other_programs_have_in_pillow_stays():
    with folder(), patched(Image, MAX_IMAGE_PIXELS=10):
        save_png("photo.png", photograph()[0])
        data.open_picture("photo.png")
        raises(ValueError, lambda: data.open_picture("none.png"))
        assert Image.MAX_IMAGE_PIXELS == 10


def test_without_the_binary_version_of_cifar10_the_python_version_is_named():
    for name, is_it in (("cifar-10-batches-py", True), ("cifar-10-python.tar.gz", True),
                        ("data_batch_1", True), ("test_batch.bin.gz", False)):
        with folder(), patched(data, CIFAR10_URLS=[]):
            os.mkdir("data")
            Path("data", name).touch()
            refused(data, "--data cifar10", "cifar-10-binary.tar.gz", f"found there: {name}")
            said = run(data, "--data cifar10")[2]
            assert ("is the Python version" in said) == is_it


def test_an_older_python_is_told_what_it_needs():
    with patched(sys, version_info=(3, 10, 9)):
        refused(schedule, "", "Python 3.11 or later")
    for path in HERE.glob("*.py"):  # syntax of 3.11, a[*b] and except*, would fail first
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            indices = getattr(getattr(node, "slice", None), "elts", [])
            assert not any(isinstance(index, ast.Starred) for index in indices), path
            assert not isinstance(node, ast.TryStar), path


def test_the_addresses_of_data_sets_are_on_https_and_those_of_mnist_are_folders():
    addresses = data.MNIST_URLS + data.CIFAR10_URLS
    assert len(addresses) == 3 and all(url.rfind("https://") == 0 for url in addresses)
    assert all(url.endswith("/") for url in data.MNIST_URLS)


def test_the_checksum_of_cifar10_is_that_of_its_binary_version():
    assert data.CIFAR10_MD5 == "c32a1d4ab5d03f1284b67883e8d87530"  # www.cs.toronto.edu/~kriz


def test_expected_errors_end_in_one_line():
    def fails(accident):
        main = unittest.mock.Mock(side_effect=accident)
        return run(types.SimpleNamespace(main=main, __name__="a"), "")

    for kind in (ValueError, OSError, ConnectionError, torch.linalg.LinAlgError):
        assert fails(kind("it is odd")) == (1, "", "error: it is odd\n")
    assert fails(KeyboardInterrupt()) == (130, "", "")
    gpu = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    for accident in (gpu, lambda: torch.zeros(2**50)):
        assert fails(accident) == (1, "", "error: out of memory: use a smaller --batch-size, "
                                          "--samples or --scale\n")
    raises(RuntimeError, lambda: fails(RuntimeError("a mistake")), "a mistake")


def test_printing_never_ends_a_program():
    readable, writable = os.pipe()
    os.close(readable)
    closed, terminals = io.StringIO(), []
    closed.close()
    ascii_only = io.TextIOWrapper(io.BytesIO(), "ascii")

    def main():
        print("± é")
        sys.stdout.flush()
        terminals.append(sys.stdout.isatty())

    for stream in (None, closed, open(writable, "w"), open("/dev/full", "w"), ascii_only):
        with patched(sys, stdout=stream):
            data.run(main)
    assert terminals == [False] * 5
    assert ascii_only.buffer.getvalue() == b"? ?\n"
    with patched(sys, stdout=io.StringIO()) as stream:
        for _ in range(2):  # as two cells of a notebook do
            data.run(main)
        assert sys.stdout.stream.stream.getvalue() == "± é\n" * 2


def test_data_py_works_alone_and_a_pipe_that_closes_early_ends_it_quietly():
    with tiny_sets():
        shutil.copy(HERE / "data.py", ".")
        line = f"set -o pipefail; {sys.executable} data.py --data mnist | true"
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
        assert done.returncode == 0 and not done.stderr, done
        assert len(np.unique(pixels_of("out/data.png"))) > 10


def test_data_py_shows_images_and_their_sparse_pixels():
    with tiny_sets("sets"), spied(data, "image_grid") as grids:
        images = data.load_mnist("sets", False)[0][:8]
        out = works(data, "--data mnist --data-dir sets --out there")
        assert "mnist: 64 test images (1, 28, 28)" in out and "there/data.png" in out
        ((whole, *parts), *_), options = grids[0]
        assert options["row_labels"] == ["image", "input", "output"]
        close(torch.stack(whole), images / 255)
        torch.manual_seed(0)
        split = data.sparse_split(images)
        for part, name in zip(parts, ("input", "output")):
            mask = torch.zeros(8, 784).scatter(1, split[f"{name}_indices"], 1)
            sparse = torch.where(mask.view_as(images) == 1, images / 255, 0.5)  # grey elsewhere
            close(torch.stack(part), sparse)


def mutated(content, rng):
    """One random accident: bytes changed, cut off, cut out, doubled, or zeros."""
    at, length = rng.integers(len(content)), rng.integers(1, 400)
    hit, after = content[at:at + length], content[at + length:]
    ends = rng.bytes(8) + hit[8:] + after, b"", after, hit + hit + after, bytes(len(hit)) + after
    return content[:at] + ends[rng.integers(5)]


def test_hundreds_of_damaged_files():
    """Every one is loaded as something valid or refused in one line: no other exception."""
    rng, model = np.random.default_rng(0), tiny_field(**TINY, side=8)
    with folder() as root, patched(data, CIFAR10_URLS=[], MNIST_URLS=[]):
        mnist, _ = write_mnist(root)
        cifar = put(root / "test_batch.bin", records(6))
        photo, saved = root / "photo.png", root / "checkpoint.pt"
        save_png(photo, bytes_((40, 40, 3)))
        torch.save(dict(kind="nf", step=1, data="leaves", schedule={}, settings={},
                        config=dict(TINY, side=8), model=model.state_dict()), saved)

        def load_weights():
            weights = sample.load_checkpoint(saved)[0].state_dict()
            return torch.cat([value.flatten() for value in weights.values()])

        for path, load in (
                (mnist, lambda: data.load_mnist(root, False)[0][0]),
                (cifar, lambda: load_cifar10(root)[0]),
                (photo, lambda: data.square_picture(data.open_picture(photo), 3, 32)),
                (saved, load_weights)):
            good, right, refusals = path.read_bytes(), load(), 0
            for _ in range(200):
                put(path, mutated(good, rng))
                try:
                    loaded = load()
                    assert loaded.shape == right.shape
                    assert path != saved or torch.equal(loaded, right)
                except (ValueError, ConnectionError) as problem:
                    assert str(problem) and "\n" not in str(problem), problem
                    refusals += 1
            assert refusals > 20, path


BLOCKED = dict.fromkeys(("autoencoder", "nf_denoiser", "noise", "sample", "schedule", "train"))


def test_files_that_work_alone_or_with_data_py():
    for name in ("noise", "schedule", "nf_denoiser", "autoencoder"):
        main = functools.partial(runpy.run_path, f"{name}.py", run_name="__main__")
        with (folder(), unittest.mock.patch.dict(sys.modules, BLOCKED),  # None: not to be found
              patched(data, run=lambda main: main())):
            shutil.copy(HERE / f"{name}.py", ".")
            code, out, err = run(types.SimpleNamespace(main=main, __name__=name), "")
            assert code == 0 and out and not err, (name, out, err)
            assert os.path.exists("out") == (name in ("noise", "schedule"))


def test_noise_and_schedule_need_no_other_file():
    x = torch.rand(2, 3, 16, 16, generator=seeded())
    for name, use in (("noise", "ssim(x, add_mixed_noise(x))"),
                      ("schedule", "ddim(lambda x, t: x, DiffusionSchedule(9, 'linear'), x, 3, 1)"),
                      ("schedule", "ddpm(lambda x, t: x, DiffusionSchedule(9, 'linear'), x)")):
        with unittest.mock.patch.dict(sys.modules, BLOCKED, data=None):
            eval(use, runpy.run_path(HERE / f"{name}.py"), {"x": x})


# --------------------------------------------------------------------------------- neural field


def tiny_field(parts=nf_denoiser.PARTS, channels=3, **options):
    torch.manual_seed(0)
    sizes = dict(
        side=16, widths=(8, 4, 8), num_fourier_feats=8,
        num_latents=None, latent_dim=16, num_blocks=2, num_heads=2)
    bars = schedule.DiffusionSchedule().alphas_cumprod
    model = nf_denoiser.NFDenoiser(bars, channels, parts, **sizes | options)
    return model.eval()


def random_problem(n_in=30, channels=3):
    """Arguments of NFDenoiser.forward: n_in and 20 different pixels of two images."""
    torch.manual_seed(1)
    line = torch.linspace(0, 1, 16)
    pixels = torch.cartesian_prod(line, line)
    coords = pixels[torch.rand(2, 256).argsort(1)]
    x_t = torch.randn(2, 20, channels)
    input_values = torch.rand(2, n_in, channels) * 2 - 1
    t = torch.tensor([100, 600])
    return x_t, coords[:, -20:], t, coords[:, :n_in], input_values


def test_fourier_features_written_out():
    """Under bf16, too: it does not round angles."""
    features = nf_denoiser.FourierFeatures(10_000)
    close(features.B.std(), 2, 0.1)  # cycles per side of the image
    close(nf_denoiser.FourierFeatures(10_000, scale=5).B.std(), 5, 0.2)
    x = 0.3 * features.B[0]
    y = 0.9 * features.B[1]
    angle = 2 * math.pi * (x + y)
    expected = torch.cat([angle.sin(), angle.cos()])
    with torch.autocast("cpu", torch.bfloat16):
        got = features(torch.tensor([[0.3, 0.9]]))
    close(got[0], expected, 1e-4)


def test_time_embedding_written_out():
    angles = 7 * np.array([1, 0.1, 0.01, 0.001])
    expected = np.append(np.sin(angles), np.cos(angles))
    embed = nf_denoiser.SinusoidalTimeEmbedding(8)
    close(embed(torch.tensor([7]))[0], expected, 1e-6)


# Attention: y_i = sum_j w_ij v_j, where the weights w_i of query i are a softmax over its logits


def normal64(*shape):
    return torch.randn(shape, dtype=torch.float64)


def attention_by_hand(attention, x, context, coords, context_coords, log_w):
    """Two heads of 12 numbers. One query and one key at a time."""
    wavelengths = torch.from_numpy(np.geomspace(0.08, 1.3, 3))
    y = []
    for i in range(len(x)):
        total = total_weight = 0
        for j in range(len(context)):
            q = attention.to_q(x[i]).view(2, 12)
            k = attention.to_k(context[j]).view(2, 12)
            v = attention.to_v(context[j]).view(2, 12)
            falls = log_w[j]
            if attention.log_reach is not None:
                apart = coords[i] - context_coords[j]
                # pairs of numbers turn by angles that grow with x, then others with y
                turn = torch.outer(apart, 2 * math.pi / wavelengths).flatten()
                turned = torch.view_as_complex(q.view(2, 6, 2)) * torch.exp(1j * turn)
                q = torch.view_as_real(turned).view(2, 12)
                reach = attention.log_reach.exp()
                falls = log_w[j] - apart @ apart / (2 * reach**2)
            logits = (q * k).sum(1) / math.sqrt(12) + falls  # of both heads
            weights = torch.exp(logits)[:, None]
            total = total + weights * v
            total_weight = total_weight + weights
        y.append(total / total_weight)
    return attention.to_out(torch.stack(y).flatten(1))


def test_attention_is_a_double_loop():
    for placed, tolerance in ((False, 1e-12), (True, 1e-5)):
        torch.manual_seed(0)
        attention = nf_denoiser.Attention(24, 2, placed)
        attention.double().requires_grad_(False)
        x = normal64(5, 24)
        context = normal64(7, 24)
        log_w = normal64(7)
        coords = 0.05 * normal64(12, 2)
        problem = x, context, coords[:5], coords[5:], log_w
        expected = attention_by_hand(attention, *problem)
        got = attention(*(tensor[None] for tensor in problem))
        close(got[0], expected, tolerance)


def test_while_to_q_is_zero_placed_attention_is_kernel_regression():
    """Means with Gaussian weights, of 0.7 to 4 pixels. Nadaraya (1964), Watson (1964)."""
    attention = nf_denoiser.Attention(16, 4, placed=True)
    torch.nn.init.zeros_(attention.to_q.weight)
    asked = torch.rand(1, 50, 2)
    places = torch.rand(1, 300, 2)
    context = torch.randn(1, 300, 16)
    values = attention.to_v(context).split(4, 2)  # a part for each head
    means = []
    for pixels, part in zip((0.7, 1.251, 2.237, 4), values):
        distance = 31 * torch.cdist(asked, places) / pixels
        weights = torch.exp(-distance**2 / 2)
        total = weights.sum(2, keepdim=True)
        means.append(weights @ part / total)
    expected = attention.to_out(torch.cat(means, 2))
    for bf16, tolerance in ((False, 0.003), (True, 0.02)):  # it does not round distances
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            got = attention(context[:, :50], context, asked, places)
        close(got, expected, tolerance)


# Perceiver IO: inputs -> latents -> answers to queries


def large_answers(model):
    """Weights of the last layers start small; large ones show what they multiply."""
    for name, weight in model.named_parameters():
        if name.endswith("to_values.weight"):
            close(weight.std(), 0.01, 0.005)
            torch.nn.init.normal_(weight)
    return model


# Posterior mean of a Gaussian random field: C W^T (W C W^T + D)^-1 y


def bilinear_weights(coords, width, height):
    """W (N, height * width): W @ image.flatten() reads the image at N places in [0, 1]^2."""
    pixels = np.argwhere(np.ones((height, width)))[:, ::-1]  # (x, y) of each
    places = np.asarray(coords) * [width - 1, height - 1]
    apart = abs(places[:, None] - pixels)
    return np.maximum(0, 1 - apart).prod(2)


def numpy_posterior(C, W, y, D):
    """Rasmussen & Williams, eq. 2.25: values y = W image + noise, of variances D."""
    K = W @ C @ W.T + np.diag(D)
    weights = np.linalg.solve(K, y)
    return C @ W.T @ weights


def places_of_17_by_17(steps):
    """50 multiples of 1 / steps: a power of 2, so that these floats are exact."""
    places = torch.randint(steps + 1, (50, 2), generator=seeded())
    places[0] = places[1] = steps  # one place, the last corner, among the input twice,
    places[40] = places[2]         # one in input and output,
    places[41] = places[42]        # one twice among the output
    return places / steps


def test_kriging_and_the_gaussian_field_are_the_textbook_posterior():
    """Of 30 clean values, less their mean, and of these and 20 noisy ones; on the grid and off."""
    A = np.random.default_rng(0).normal(size=(289, 400))
    C = A @ A.T / 400  # a covariance of no special form
    y = 0.4 * normal64(50, 3)
    y_in, y_t = y[None].split([30, 20], 1)
    noise_variance = torch.full((1, 1, 1), 0.8)
    field = nf_denoiser.GaussianField(torch.from_numpy(C))
    for steps in (16, 1024):
        places = places_of_17_by_17(steps)
        coords, out = places[None].split([30, 20], 1)
        image, y_out, variances = field(coords, y_in, out, y_t, noise_variance)
        kriged = sample.kriging(out, coords, y_in + 5, field.covariance)
        W = bilinear_weights(places, 17, 17)
        W_in = W[:30]
        W_out = W[30:]
        K = W_in @ C @ W_in.T + 1e-3 * np.eye(30)
        for c, values in enumerate(y.T.numpy()):
            clean = values[:30]
            # the most likely scale, as if two more values of variance 0.05 had been seen
            quadratic = clean @ np.linalg.solve(K, clean)
            variance = (quadratic + 2 * 0.05) / 32
            close(variances[0, 0, c], variance, 1e-9)
            D = np.repeat([1e-3, 0.8 / variance], [30, 20])  # in units of the variance
            expected = numpy_posterior(C, W, values, D)
            close(image[0, c].flatten(), expected, 1e-6)
            close(y_out[0, :, c], W_out @ expected, 1e-5)
            mean = clean.mean()
            expected = numpy_posterior(C, W_in, clean - mean, D[:30])
            close(kriged[0, :, c], 5 + mean + W_out @ expected, 1e-5)


def test_exponential_covariance_against_numpy():
    places = np.argwhere(np.ones((5, 5))) / 4
    distance = np.linalg.norm(places[:, None] - places, axis=2)
    default = nf_denoiser.exponential_covariance(5)
    close(default, np.exp(-distance * 31 / 16), 1e-6)
    close(nf_denoiser.exponential_covariance(5, length=2), np.exp(-distance / 2), 1e-6)


def test_pixel_covariance_written_out():
    images = torch.randint(256, (1100, 3, 8, 8), dtype=torch.uint8)
    x = images.double() / 127.5 - 1
    with_mirrored = torch.cat([x, x.flip(3)])
    vectors = with_mirrored.view(-1, 64)
    # and as if 300 others and their mirror images had been seen
    C = vectors.T @ vectors + 600 * nf_denoiser.exponential_covariance(8).double()
    expected = C / C.diag().mean()
    close(nf_denoiser.pixel_covariance(images), expected, 1e-5)


def test_from_few_pictures_the_covariance_is_about_as_good_as_the_textbooks():
    images = data.make_leaves(70, 5)[0]
    sched = schedule.DiffusionSchedule()
    covariance = nf_denoiser.pixel_covariance(images[:20])
    model = tiny_field(("gaussian",), side=32, covariance=covariance)
    table = sample.evaluate_field(model, sched, images[20:])
    assert table["one-step mean"]["psnr"] > table["kriging"]["psnr"] - 0.1, table


def test_a_covariance_that_is_none_is_refused():
    model = tiny_field(("gaussian",), covariance=1 - 2 * torch.eye(256))
    raises(torch.linalg.LinAlgError, lambda: model(*random_problem()))


def test_a_field_of_equal_pictures_knows_them():
    """Their covariance alone could not be inverted."""
    images = data.make_leaves(1, 0)[0].expand(20, -1, -1, -1)
    covariance = nf_denoiser.pixel_covariance(images)
    model = tiny_field(("gaussian",), side=32, covariance=covariance)
    for input_ratio in (0.2, 0.4, 0.79):
        split = data.sparse_split(images[:4], input_ratio)
        known = split["input_coords"], split["input_values"]
        got = model(split["output_values"], split["output_coords"], torch.zeros(4), *known)
        close(got, split["output_values"], 0.03)


def test_independent_pixels_are_a_field_with_the_identity_as_covariance():
    x_t, out, _, coords, values = random_problem()
    pixels = nf_denoiser.IndependentPixels(side=16)
    field = nf_denoiser.GaussianField(torch.eye(256))
    field.jitter = 0
    noise_variance = torch.tensor([0.1, 9.0])[:, None, None]
    problem = coords, values, out, x_t, noise_variance
    for a, b in zip(pixels(*problem), field(*problem)):  # image, values at the outputs, variance
        close(a, b, 1e-5)


# The model by hand: mean + y_out + std * (unet + perceiver)


def plane(coords, value):
    """The value at the pixels nearest to coords, else 0."""
    image = torch.zeros(1, 1, 16, 16).double()
    column, row = (15 * coords[0]).round().long().unbind(1)
    image[..., row, column] = value
    return image


def unet_by_hand(net, x, level=0):
    """All below a level happens at half its resolution."""
    x = x + net.before[level](x.relu())
    if level == 2:
        return x + net.bottom(x.relu())
    half = net.down[level](x.relu())
    half = unet_by_hand(net, half, level + 1)
    half = net.up[level](half.relu())
    x = x + F.interpolate(half, scale_factor=2)
    return x + net.after[level](x.relu())


def block_by_hand(block, x, x_coords, context, *others):
    y = block.norm_x(x)
    x = x + block.attention(y, context, x_coords, *others)
    return x + block.mlp(block.norm_mlp(x))


def perceiver_by_hand(net, inputs, coords, queries, asked, log_w):
    x = inputs = net.embed_inputs(inputs)  # a latent starts as its pixel
    queries = net.embed_queries(queries)
    context = net.encoder.norm_context(torch.cat([inputs, queries], 1))
    places = torch.cat([coords, asked], 1)
    log_w = log_w * (torch.arange(places.shape[1]) >= inputs.shape[1])
    if net.latents is not None:  # free ones, as in the paper
        x = net.latents[None]
    x = block_by_hand(net.encoder, x, coords, context, places, log_w)
    for block in net.processor:
        x = block_by_hand(block, x, coords, block.norm_x(x), coords)
    latents = net.decoder.norm_context(x)
    x = block_by_hand(net.decoder, queries, asked, latents, coords)
    return net.to_values(net.norm_out(x))


def model_by_hand(model, x_t, out, t, coords, values):
    """What NFDenoiser.forward answers for one image."""
    out = out.clamp(0, 1)
    coords = coords.clamp(0, 1)
    bar = schedule.DiffusionSchedule().alphas_cumprod[t].view(1, 1, 1)
    colours = torch.ones(1, 1).double()
    if values.shape[2] == 3:  # brightness, red against blue, green against both; of length 1
        colours = torch.tensor([[1, 1, 1], [1, 0, -2], [1, -1, 1]]).double()
        colours /= torch.tensor([3, 2, 6]).sqrt()
    x_in = values @ colours
    mean = x_in.mean(1, keepdim=True)
    y_in = x_in - mean
    y_t = x_t @ colours / bar.sqrt() - mean
    noise_variance = 1 / bar - 1
    y_image, y_out, variance = model.posterior(coords, y_in, out, y_t, noise_variance)
    contrast = variance.sqrt()
    answer = 0
    features = []
    if model.unet:
        picture = y_image / contrast.mT[..., None]
        signal = bar.sqrt().expand(1, 1, 16, 16)
        planes = [picture, plane(coords, 1), plane(out, bar), signal]
        first = model.unet.first(torch.cat(planes, 1))
        image = unet_by_hand(model.unet, first)
        W = torch.from_numpy(bilinear_weights(out[0], 16, 16))
        features = [(W @ image.flatten(2).mT).relu()]
        answer = model.unet_to_values(features[0])
    if model.perceiver:
        time = model.embed_time(t)[None]
        inputs = [
            model.fourier(coords),
            y_in / contrast,
            time.expand(1, y_in.shape[1], 64)]
        queries = [
            model.fourier(out),
            y_out / contrast,
            time.expand(1, 20, 64),
            *features]
        inputs = torch.cat(inputs, 2)
        queries = torch.cat(queries, 2)
        log_w = bar[0].log()
        answer = answer + perceiver_by_hand(
            model.perceiver, inputs, coords, queries, out, log_w)
    unexplained = model.posterior.unexplained * variance
    std = (1 / unexplained + 1 / noise_variance) ** -0.5
    return (mean + y_out + std * answer) @ colours.T


def combinations_of_parts():
    for count in (1, 2, 3):
        yield from itertools.combinations(nf_denoiser.PARTS, count)


def every_model():
    """All parts; placed latents and free ones; a channel or three; pixels beside the grid."""
    for parts in combinations_of_parts():
        for channels, n_in, offset, num_latents in (
                (1, 2, 0, 4),
                (3, 30, 0.4 / 15, None),
                (3, 30, -0.4 / 15, None)):  # the nearest pixels stay the same
            model = tiny_field(parts, channels, num_latents=num_latents)
            x_t, out, t, coords, values = random_problem(n_in, channels)
            out[:, 1] = out[:, 0]  # one place twice
            problem = x_t, out + offset, t + 0.9, coords + offset, values
            yield large_answers(model).double(), [x.double() for x in problem]


def test_every_model_written_out():
    """The second of two images must have the answer that it has alone. t is rounded down."""
    for model, problem in every_model():
        got = model(*problem)[1:]
        x_t, out, t, *known = (x[1:] for x in problem)
        expected = model_by_hand(model, x_t, out, t.long(), *known)
        close(got, expected, 1e-4)
        weights = list(model.parameters())
        assert got.requires_grad == bool(weights)
        if weights:
            first = torch.autograd.grad(got.sum(), weights)
            second = torch.autograd.grad(expected.sum(), weights)
            assert all(gradient.any() for gradient in first)
            torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)


def test_what_a_model_is_made_of():
    for parts in combinations_of_parts():
        model = tiny_field(parts)
        assert bool(model.unet) == ("unet" in parts)
        assert bool(model.perceiver) == ("perceiver" in parts)
        expected = 0.36
        if "gaussian" in parts:
            expected = 0.07
            K = nf_denoiser.exponential_covariance(16)
            assert torch.equal(model.posterior.covariance, K)
        assert model.posterior.unexplained == expected
    double = tiny_field(covariance=K.double())  # as numpy computes it
    close(double(*random_problem()), tiny_field(covariance=K)(*random_problem()), 0)
    for num_latents in (None, 4):
        for module in tiny_field(num_latents=num_latents).modules():
            if isinstance(module, nf_denoiser.Attention):
                assert (module.log_reach is None) == (num_latents == 4)


# What every model does


def test_bf16_autocast_stays_close():
    """The Gaussian field's linear algebra is not rounded at all."""
    for parts in combinations_of_parts():
        model = tiny_field(parts)
        exact = model(*random_problem())
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model(*random_problem())
        assert rounded.dtype == torch.float32
        close(rounded, exact, 0 if parts == ("gaussian",) else 0.01)


def test_at_the_last_timestep_x_t_does_not_matter():
    for parts in combinations_of_parts():
        model = large_answers(tiny_field(parts))
        x_t, out, _, *given = random_problem()
        last = torch.tensor([999, 999])
        expected = model(None, out, last, *given)
        for noisy in (x_t, -3 * x_t):
            close(model(noisy, out, last, *given), expected, 5e-3)


def test_what_a_macs_gpu_cannot_do_is_left_to_the_cpu():
    assert os.environ["PYTORCH_ENABLE_MPS_FALLBACK"] == "1"


def test_every_device_type_that_torch_has():
    model = large_answers(tiny_field())
    problem = random_problem()
    expected = model(*problem)
    for device in ("cpu", "cuda", "mps"):
        if getattr(torch, device).is_available():
            got = model.to(device)(*(x.to(device) for x in problem))
            assert got.device.type == device
            close(got.cpu(), expected, 1e-3)


def test_no_tensor_is_left_on_the_cpu():
    model = tiny_field(("unet", "perceiver")).to("meta")  # it stands for a GPU
    problem = [x.to("meta") for x in random_problem()]
    with patched(torch, autocast=lambda *_, **options: contextlib.nullcontext()):
        assert model(*problem).is_meta


def test_wrong_shapes_get_one_ValueError():
    """Each argument, shortened along each of its dimensions, or flat."""
    model = tiny_field()
    problem = random_problem()
    for i, x in enumerate(problem):
        for dim, size in enumerate(x.shape):
            for wrong in (x.narrow(dim, 0, size - 1), x.flatten()[1:]):
                arguments = list(problem)
                arguments[i] = wrong
                raises(ValueError, lambda: model(*arguments), "need the shapes", tuple(wrong.shape))
    raises(ValueError, lambda: model(*random_problem(n_in=0)), "at least one input pixel")
    assert model(*random_problem(n_in=1)).isfinite().all()
    doubles = [x.double() for x in problem]  # as numpy has them
    close(model(*doubles), model(*problem).double(), 1e-5)


def test_sizes_and_parts_that_cannot_be_are_refused():
    for parts in ((), "unet", ("gaussian", "nose")):
        raises(ValueError, lambda: tiny_field(parts), "gaussian, unet, perceiver")
    raises(ValueError, lambda: tiny_field(side=34), 4, 34)  # the U-Net cannot halve it
    tiny_field(("gaussian", "perceiver"), side=34)
    tiny_field(side=28)


def test_the_full_size_has_the_perceiver_of_the_document():
    bars = schedule.DiffusionSchedule().alphas_cumprod
    by_default = nf_denoiser.NFDenoiser(bars)
    full = nf_denoiser.NFDenoiser(bars, **nf_denoiser.SIZES["full"])
    assert repr(full) == repr(by_default)
    net = full.perceiver
    assert net.latents.shape == (512, 512) and len(net.processor) == 6
    assert net.encoder.attention.num_heads == 8
    close(net.latents.std(), 0.02, 0.001)
    dropout = [module.p for module in net.modules() if isinstance(module, torch.nn.Dropout)]
    assert dropout == 8 * [0.1]  # in the encoder, six blocks and the decoder
    assert full.fourier.B.shape == (2, 256)


def test_without_sizes_a_model_is_the_full_one():
    full = nf_denoiser.SIZES["full"]
    for owner in (nf_denoiser.NFDenoiser, nf_denoiser.PerceiverIO):
        for name, parameter in inspect.signature(owner).parameters.items():
            assert parameter.default == full.get(name, parameter.default), name


def test_medium_is_the_shipped_model_and_small_has_no_dropout():
    shipped = sample.load_checkpoint(sample.SHIPPED)[1]["config"]
    medium = nf_denoiser.SIZES["medium"]
    for key, value in medium.items():
        assert shipped[key] == value, key
    assert medium["dropout"] == nf_denoiser.SIZES["small"]["dropout"] == 0


def test_nf_denoiser_prints_the_parameters_of_each_part():
    printed = works(nf_denoiser, "")
    for name, config in nf_denoiser.SIZES.items():
        model = nf_denoiser.NFDenoiser(torch.ones(9), **config)
        _, section = printed.split(f"{name}:")
        for part, module in (("", model), ("unet", model.unet), ("perceiver", model.perceiver)):
            count = sum(weight.numel() for weight in module.parameters())
            assert re.search(rf"{part} *{count:,}\b", section)


# ------------------------------------------------------------------ loss, samplers, evaluation


def where(split):
    return split["output_coords"], split["input_coords"], split["input_values"]


def test_the_loss_written_out():
    """DDPM, algorithm 1, for x_0 instead of eps; t = T - 1 trains the one-step mean.

    Each of several processes draws t and eps for all images, and uses those of its rows.
    """
    model = tiny_field()
    sched = schedule.DiffusionSchedule()
    split = data.sparse_split(data.make_leaves(4, 0)[0])
    x_0 = split["output_values"]
    rows = slice(1, 4, 2)
    for pure_noise in (False, True):
        torch.manual_seed(5)
        loss = nf_denoiser.nf_loss(model, sched, split, pure_noise, rows)
        torch.manual_seed(5)
        if pure_noise:
            t = torch.tensor([999, 999])
            x_t = None
        else:
            t = torch.randint(0, 1000, (4,))
            x_t = sched.q_sample(x_0, t, torch.randn(x_0.shape))
            t = t[rows]
            x_t = x_t[rows]
        out, coords, values = (x[rows] for x in where(split))
        x_0_hat = model(x_t, out, t, coords, values)
        error = x_0_hat - x_0[rows]
        close(loss, error.square().mean(), 1e-5)


def test_the_documents_training_and_sampling():
    """As in the notebook, with the float timesteps and the names that it uses."""
    model = tiny_field()
    sched = schedule.DiffusionSchedule(timesteps=1000)
    split = data.sparse_split(data.make_leaves(4, 0)[0], 0.1, 0.1)
    output_coords, input_coords, input_values = where(split)
    output_values = split["output_values"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    B = len(output_values)
    for step in range(12):
        torch.manual_seed(5)  # the same draw again, so that losses can be compared
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
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0], losses
    samples = nf_denoiser.ddim_sample(tiny_field(), sched, output_coords, input_coords,
                                      input_values, num_steps=5, eta=0.0, device="cpu")
    assert F.mse_loss(samples, output_values) < 0.5 * output_values.square().mean()


def test_the_one_step_mean_averages_the_image_and_its_mirror_image():
    sched = schedule.DiffusionSchedule(20)
    weight = torch.ones(1, requires_grad=True)

    def model(x_t, out, t, coords, values):
        assert x_t is None and t.tolist() == [19]
        return weight * (out**2 + coords**3 + values)

    out, coords, values = torch.tensor([[0.2, 0.7], [0.6, 0.3], [5, 6]])[:, None, None]
    got = nf_denoiser.one_step_mean(model, sched, out, coords, values)
    x = (0.2**2 + 0.8**2 + 0.6**3 + 0.4**3) / 2
    y = 0.7**2 + 0.3**3
    close(got[0, 0], [x + 5, y + 6], 1e-6)
    assert not got.requires_grad


def test_ddim_sample_starts_from_noise_at_the_output_pixels():
    """Otherwise, and in its defaults, it is schedule.ddim."""
    sched = schedule.DiffusionSchedule(100)
    places = torch.rand(2, 5, 2), torch.rand(2, 3, 2), torch.rand(2, 3, 1)

    def model(x_t, output_coords, t, *known):
        assert (output_coords, *known) == places
        return nine_tenths_plus_t(x_t, t)

    for options in (dict(num_steps=4, eta=0.5), {}):
        g = seeded()
        x_T = torch.randn(2, 5, 1, generator=g)  # a number for each output pixel and channel
        expected = schedule.ddim(nine_tenths_plus_t, sched, x_T, generator=g, **options)
        got = nf_denoiser.ddim_sample(model, sched, *places, generator=seeded(), **options)
        assert torch.equal(got, expected)


def leaves(count, side=32):
    """The upper left corners of a few images: uint8 (count, 3, side, side)."""
    images = torch.from_numpy(tiny_images()[0][:count])
    return images.view(-1, 3, 32, 32)[:, :, :side, :side].clone()


def test_nearest_and_inverse_distance_by_hand():
    coords = torch.rand(1, 30, 2)
    values = torch.rand(1, 30, 3)
    out = torch.cat([torch.rand(1, 50, 2), coords], 1)  # the inputs themselves, too
    distance = (out[0, :, None] - coords).norm(dim=2)
    expected = values[:, distance.argmin(1)]
    close(sample.nearest(out, coords, values), expected, 0)
    weights = 1 / distance.clamp(min=1e-6) ** 4
    expected = weights @ values / weights.sum(1, keepdim=True)
    close(sample.inverse_distance(out, coords, values), expected, 1e-3)


def drawing(model, sched, seed=0, **options):
    """draw(output_coords, input_coords, input_values, on_step=None)."""
    g = seeded(seed)
    return functools.partial(nf_denoiser.ddim_sample, model, sched, generator=g, **options)


# Stand-ins for a model and a sampler, whose answers are partly out of [-1, 1]


def shepard_model(x_t, output_coords, t, *known):
    return 1.5 * sample.inverse_distance(output_coords, *known)


def shepard_draw(*where):
    return 2 * sample.inverse_distance(*where)


def test_what_each_method_answers():
    """The rest of a sample is the mean, given the input and the pixels that were drawn."""
    split, _ = sample.split_images(leaves(2), torch.arange(2))
    out, *known = where(split)
    sched = schedule.DiffusionSchedule(20)
    K = nf_denoiser.exponential_covariance(32)
    expected = {
        "one-step mean": shepard_model(None, out, None, *known),
        "kriging": sample.kriging(out, *known, K),
        "inverse distance": sample.inverse_distance(out, *known),
        "nearest": sample.nearest(out, *known)}
    answers = sample.reconstruct(shepard_model, sched, split)
    assert list(answers) == list(expected)
    for n_drawn in (204, 820):
        drawn, rest = out.split([n_drawn, 820 - n_drawn], 1)
        values = shepard_draw(drawn, *known).clamp(-1, 1)
        then_known = torch.cat([known[0], drawn], 1), torch.cat([known[1], values], 1)
        mean = shepard_model(None, rest, None, *then_known)
        expected["sample"] = torch.cat([values, mean], 1)
        answers = sample.reconstruct(shepard_model, sched, split, shepard_draw, n_drawn)
        for method in expected:
            close(answers[method], expected[method].clamp(-1, 1), 1e-4)


def test_every_row_of_the_table_worked_out_again():
    """Of 51 pixels of an image or, with full, of all that are missing."""
    images = leaves(5, 16)
    sched = schedule.DiffusionSchedule(20)
    for options in (dict(seed=3), dict(full=True), dict(pixels="anywhere", input_ratio=0.3)):
        table = sample.evaluate_field(
            shepard_model, sched, images, shepard_draw, batch=2, **options)
        split, n_out = sample.split_images(images, torch.arange(5), **options)
        answers = sample.reconstruct(shepard_model, sched, split, shepard_draw, n_out)
        assert list(table) == list(answers)
        for method, values in answers.items():
            error = (values - split["output_values"])[:, :n_out] / 2
            mse = error.double().square().mean()
            image = sample.assemble(split, values)
            similarity = noise.ssim(image, split["full_image"] / 2 + 0.5)
            row = table[method]
            close(row["mse"], mse, 1e-6)
            close(row["mae"], error.abs().mean(), 1e-6)
            close(row["psnr"], -10 * mse.log10(), 1e-4)
            close(row["ssim"], similarity.mean(), 1e-5)


def test_a_split_of_images_has_the_input_where_it_is_wanted():
    images = leaves(3)
    indices = torch.tensor([7, 0, 2])
    for ratio, full, pixels, n_out in (
            (0.2, False, "grid", 204),
            (0.9, False, "grid", 103),
            (0.05, True, "grid", 973),
            (0.05, False, "anywhere", 204),
            (0.05, True, "anywhere", 1024)):
        split, count = sample.split_images(images, indices, 5, ratio, full, pixels)
        numbers, make_split = 1024, data.sparse_split
        if pixels == "anywhere":
            numbers, make_split = 1024 + 2 * 51, data.off_grid_split
        order = data.fixed_order(5, indices, numbers)
        equal(split, make_split(images, ratio, None, order=order))
        assert count == n_out


def test_the_whole_image_keeps_its_input_pixels():
    images = leaves(3)
    split, _ = sample.split_images(images, torch.arange(3))
    values = torch.full((3, 100, 3), 0.5)
    for count, whole in (
            (0, sample.assemble(split)),
            (100, sample.assemble(split, values))):
        for i, image in enumerate(whole):
            truth = images[i].flatten(1)
            pixels = image.flatten(1)
            inputs = split["input_indices"][i]
            outputs = split["output_indices"][i]
            close(pixels[:, inputs], truth[:, inputs] / 255, 1e-6)
            assert (pixels[:, outputs[:count]] == 0.75).all()
            close(pixels[:, outputs[count:]], 0.5, 0)  # grey


def test_covered_counts_the_middle_ranks():
    samples = torch.arange(1.0, 33)[:, None]
    truth = torch.arange(0.5, 33)  # has all ranks from 0 to 32
    hits = sample.covered(samples, truth)
    close(hits[2:31], 1, 0)
    assert hits.sum() == 29
    alike = torch.ones(4, 1)
    truth = torch.tensor([1.0, 1.1])  # a sample equal to the truth is not beside it
    assert sample.covered(alike, truth).tolist() == [1, 0]


def test_the_figures_of_samples_are_those_of_the_measured_pixels():
    sched = schedule.DiffusionSchedule(20)
    options = dict(seed=3, input_ratio=0.5)
    values = torch.rand(2, 4, 51, 3) * 2 - 1  # four samples of either image
    given = iter(values)
    figures, rows = sample.evaluate_samples(
        shepard_model, sched, leaves(2, 16), lambda *_: next(given), 4, **options)
    split, _ = sample.split_images(leaves(2, 16), torch.arange(2), **options)
    truth = split["output_values"][:, :51]
    below = (values < truth[:, None]).sum(1)
    covered = (below > 0) & (below < 4)
    spread = values.std(1) / 2
    mse = (values.mean(1) - truth).square().mean() / 4
    close(figures["coverage"], covered.double().mean(), 1e-6)
    close(figures["spread"], spread.mean(), 1e-6)
    close(figures["psnr_mean"], -10 * mse.log10(), 1e-3)
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
    generator = seeded()
    for part in label.split(" + "):
        name, *strength = part.split()
        if name == "stripes":
            images = torch.where(torch.arange(28)[:, None] % 4 == 0, 1.0, images)
        elif name != "clean":
            add_noise = getattr(noise, f"add_{name}_noise")
            images = add_noise(images, *map(float, strength), generator)
    return images


def test_the_autoencoder_is_six_matrix_products():
    model, x = autoencoder.DenoisingAutoencoder(), torch.rand(5, 1, 28, 28)
    layers = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    assert [len(layer.weight) for layer in layers] == [256, 128, 64, 128, 256, 784]
    with torch.no_grad():
        reconstructed, latent = model(x)
        expected = x.flatten(1)
        for i, layer in enumerate(layers):
            expected = expected @ layer.weight.T + layer.bias
            if i == 2:  # no ReLU
                close(latent, expected, 1e-5)
            elif i < 5:
                expected = expected.relu()
        close(model.decode(latent), expected.sigmoid(), 1e-5)
        close(reconstructed, expected.sigmoid().view_as(x), 1e-5)
        loss = autoencoder.autoencoder_loss(model, x.sqrt(), x)  # against the clean images
        close(loss, (reconstructed - x.sqrt()).square().mean(), 1e-6)
    raises(ValueError, lambda: model.init_output_bias(torch.rand(2, 3, 32, 32)), 784, 3072)
    small = autoencoder.DenoisingAutoencoder(input_dim=100, latent_dim=7)
    assert [x.shape for x in small(torch.rand(5, 10, 10))] == [(5, 10, 10), (5, 7)]
    count = sum(p.numel() for p in model.parameters())
    assert f"{count:,} parameters" in works(autoencoder, "")


def test_the_untrained_output_is_the_mean_image():
    torch.manual_seed(0)
    images, model = glyphs(300)[0], autoencoder.DenoisingAutoencoder()
    mean = images.mean(0)
    with torch.no_grad():
        before = (model(images)[0] - mean).abs().mean()
        model.init_output_bias(images)
        after = (model(images)[0] - mean).abs().mean()
        close(model(0 * images)[0][0], mean.clamp(0.01, 0.99), 1e-5)
        hidden = model.encoder[:4](torch.randn(4000, 784)).square().mean()
    assert after < 0.35 * before
    close(model.decoder[-2].weight.std(), math.sqrt(2 / (256 + 784)), 0.001)
    assert 0.7 < hidden < 1.4, hidden  # with torch's own weights 1/36, after two ReLUs


def test_every_label_corrupts_as_it_says():
    x = glyphs(50)[0]
    labels = {"gaussian 0.5 + masking 0.3", "salt_pepper 0.1"}
    for lists in (autoencoder.TRAINED_ON, autoencoder.TESTED_ON):
        labels.update(*lists.values())
    for label in labels:
        noisy = lab_corruption(label, x)
        close(autoencoder.corrupt(x, label, seeded()), noisy, 0)
        assert (label == "clean") == noisy.equal(x), label
    torch.manual_seed(0)  # without a generator: torch's own random numbers
    close(autoencoder.corrupt(x, "masking 0.3"), lab_corruption("masking 0.3", x), 0)


def test_a_denoiser_beats_its_control_on_noise_and_loses_on_clean_images():
    images, test = glyphs(400)[0].split([320, 80])
    models, _ = quiet(autoencoder.train_models, ["gaussian 0.5", "clean"], images, 0, 14, 64)
    table, _ = autoencoder.cross_test(models, ["gaussian 0.5", "clean"], test)
    (dae_noisy, dae), (ae_noisy, ae), _ = (row.values() for row in table.values())
    constant = F.mse_loss(images.mean(0).expand_as(test), test)
    assert dae_noisy < min(constant, 0.9 * ae_noisy) and ae < dae


def test_the_plain_loop_trains_what_train_py_trains():
    """The same weights, bit for bit; 20 steps, so that 2 warm up, and 20 images left out."""
    with without_reports():
        images = data.load_mnist("data", True)[0] / 255
        for label, flags in (("clean", "ae"), ("gaussian 0.3", "dae"),
                             ("mixed", "dae --noise mixed"),
                             ("masking 0.3", "dae --noise masking")):
            models, said = quiet(autoencoder.train_models, [label], images, 1, 4, 60)
            works(train, f"--data mnist --epochs 4 --batch-size 60 --seed 1 --model {flags}")
            got, model = checkpoint_of(f"out/{flags.split()[0]}"), models[label]
            equal(got["model"], model.state_dict())
            assert not model.training and not any(p.requires_grad for p in model.parameters())
            assert got["settings"]["noise"] == label
            last = f"20 steps, last loss {got['losses'][-1]:.4f}\n"
            assert said == f"trained on {label}, seed 1: {last}"
        before = model.encoder[0].weight.clone()
        quiet(autoencoder.train_autoencoder, model, images, torch.clone, 1)  # trained further
        assert not model.encoder[0].weight.equal(before)


def test_the_lesson_of_the_autoencoder_needs_only_torch():
    alone, corrupt = {"__name__": "alone"}, lambda x: x * (torch.rand(x.shape) > 0.3)
    others = dict.fromkeys(("data", "noise", "schedule", "nf_denoiser", "sample", "train"))
    with unittest.mock.patch.dict(sys.modules, others):  # importing these fails
        exec((HERE / "autoencoder.py").read_text("utf-8"), alone)
        images, model = torch.rand(500, 1).expand(500, 784), alone["DenoisingAutoencoder"]()
        before = alone["autoencoder_loss"](model, images, corrupt(images))
        learn = functools.partial(alone["train_autoencoder"], model)
        assert learn(images, corrupt, epochs=20, batch_size=100) is model
        assert alone["autoencoder_loss"](model, images, corrupt(images)) < 0.2 * before
        model.requires_grad_(True)
        raises(ValueError, lambda: learn(images / 0, corrupt), "learning rate")


def test_the_cross_test_by_hand():
    test = glyphs(64)[0]
    models = {"a": answering(lambda x: (x + test) / 2), "b": answering(lambda x: test)}
    labels = ["clean", "stripes", "masking 0.3"]
    with spied(data, "image_grid") as grids:
        table, _ = autoencoder.cross_test(models, labels, test, count=2)
    ((rows, columns, row_labels), _), = grids
    assert row_labels == labels
    assert columns == ["truth", "input", "a", "b"] * 2
    assert list(table) == ["trained on a", "trained on b", "left alone"]
    for label, row in zip(labels, rows, strict=True):
        noisy = lab_corruption(label, test)
        left = F.mse_loss(noisy, test)
        figures = torch.tensor([row[label] for row in table.values()])
        close(figures, torch.stack([left / 4, 0 * left, left]), 1e-7)
        second = [test[1], noisy[1], (noisy[1] + test[1]) / 2, test[1]]
        close(torch.stack(row[4:]), torch.stack(second), 1e-6)


def test_the_passes_by_hand():
    """The output is fed back as it is, then with noise, of its own for each pass and seed."""
    test, inputs = glyphs(64)[0], []
    half = answering(lambda x: (inputs.append(x), (x + test) / 2)[1])
    noisy = lab_corruption("gaussian 0.5 + masking 0.3", test)
    for seed in (3, 4):
        with spied(data, "image_grid") as grids:
            table, _ = autoencoder.progressive(half, test, seed, passes=2)
        ((rows, columns, labels), _), = grids
        assert columns == ["truth", "input", "pass 1", "pass 2"] == ["truth", *table]
        generator = seeded(seed)
        expected = {"nothing added": lambda x: x,
                    "noise 0.1 added": lambda x: noise.add_gaussian_noise(x, 0.1, generator)}
        for row, (label, add_noise) in zip(rows, expected.items(), strict=True):
            outputs = [noisy]
            for _ in range(2):
                x = add_noise(outputs[-1])
                close(inputs.pop(0), x, 1e-6)
                outputs.append((x + test) / 2)
            figures = [F.mse_loss(x, test).item() for x in outputs]
            close([row[label] for row in table.values()], figures, 1e-6)
            close(torch.stack(row), torch.stack([x[0] for x in (test, *outputs)]), 1e-6)
        assert labels == list(expected)
    table, _ = autoencoder.progressive(half, test, 0)
    assert list(table)[-1] == "pass 10"


def test_markdown_has_means_and_deviations_over_seeds():
    table = lambda c: {"r": {"c": c, "d": 5.0}}
    assert autoencoder.markdown([table(1.0), table(3.0)]) == (
        "|     | c               | d      |\n"
        "| --- | ---             | ---    |\n"
        "| r   | 2.0000 ± 1.4142 | 5.0000 |\n")
    assert autoencoder.markdown([table(1.0)]).endswith("| r   | 1.0000 | 5.0000 |\n")


def test_linear_classifier_is_the_minimum_of_its_objective():
    """Ridge regression as least squares with six more rows, in numpy."""
    spread = torch.tensor([10, 1, 1, 0.1, 0.01])  # one scale for all, so the last hardly counts
    x, *others = spread * torch.randn(3, 60, 5, generator=seeded()) + 3
    y = torch.randint(3, (60,), generator=seeded())
    scaled = [(z - x.mean(0)) / x.var(0).mean().sqrt() for z in (x, *others)]
    A, *rows = (np.column_stack([z, np.ones(60)]) for z in scaled)
    A = np.vstack([A, math.sqrt(0.1 * 60) * np.eye(6)])
    one_hot = np.vstack([np.eye(3)[y], np.zeros((6, 3))])
    w = np.linalg.lstsq(A, one_hot, rcond=None)[0]
    for found, B in zip(autoencoder.linear_classifier(x, y, *others), rows, strict=True):
        assert (found.numpy() == (B @ w).argmax(1)).mean() > 0.97


def test_features_by_hand():
    images, labels = glyphs(400)
    (train_, test), (y, y_test) = images.split([300, 100]), labels.split([300, 100])
    model = autoencoder.DenoisingAutoencoder().requires_grad_(False)
    table, _ = autoencoder.features({"clean": model}, test, y_test, train_, y, 5)
    order = torch.randperm(300, generator=seeded(5))
    for row, encode in {"trained on clean": model.encode, "pixels": torch.nn.Flatten()}.items():
        z, *others = map(encode, (train_, test, lab_corruption("gaussian 0.3", test)))
        expected = {"mean absolute correlation": autoencoder.mean_correlation(others[0])}
        for few in (order[:100], order):
            classes = autoencoder.linear_classifier(z[few], y[few], *others)
            for name, found in zip(("clean", "noisy"), classes):
                expected[f"{len(few)} labels, {name}"] = (found == y_test).float().mean().item()
        assert list(table[row]) == list(expected)
        close(list(table[row].values()), list(expected.values()), 0.011)
    _, few_clean, _, clean, noisy = expected.values()
    assert clean > few_clean > 0.3 and clean > noisy
    many, _ = autoencoder.features({"clean": model}, test, y_test, train_.repeat(4, 1, 1, 1),
                                   y.repeat(4), 5)
    counts = [name.split()[0] for name in many["pixels"] if "clean" in name]
    assert counts == ["100", "1,000", "1,200"]


def test_mean_correlation_against_numpy():
    z, mean = torch.randn(200, 5, generator=seeded()).cumsum(1), autoencoder.mean_correlation
    expected = np.abs(np.corrcoef(z.numpy().T))[np.triu_indices(5, 1)].mean()
    constant = torch.linspace(0.1, 0.9, 9).expand(200, 9)
    close(mean(z), expected, 1e-5)
    close(mean(z * torch.tensor([1, -1, 1, -1, 1])), expected, 1e-5)  # signs do not count
    close(mean(torch.cat([z, constant], 1)), expected, 1e-5)
    assert math.isnan(mean(torch.cat([z[:, :1], constant], 1)))


def test_filters_are_those_of_the_most_active_units():
    test, model = glyphs(100)[0], autoencoder.DenoisingAutoencoder().requires_grad_(False)
    layer = model.encoder[0]
    active = layer(test.flatten(1)).relu().std(0).argsort(descending=True)
    weights = layer.weight[active[:16]]
    weights /= weights.abs().amax(1, keepdim=True)
    with spied(data, "image_grid") as grids:
        autoencoder.filters({"clean": model}, test)
    ((rows,), options), = grids
    assert options["row_labels"] == ["trained on clean"]
    close(torch.stack(rows[0]).flatten(1), 0.5 + 0.5 * weights, 1e-5)


def test_the_documents_trainer():
    """A notebook's loop: batches of (images, labels), noise_fn(clean_images, noise_param)."""
    torch.manual_seed(0)
    dataset = torch.utils.data.TensorDataset(*glyphs(256))
    loader = torch.utils.data.DataLoader(dataset, 64, shuffle=True)
    model, losses = autoencoder.DenoisingAutoencoder(784, 64), []
    optimizer = torch.optim.Adam(model.parameters(), lr=0.001)
    for epoch in range(5):
        for batch, _ in loader:
            clean_images = batch.view(batch.size(0), -1)
            noisy_images = noise.add_salt_pepper_noise(clean_images, 0.2)
            optimizer.zero_grad()
            reconstructed, latent = model(noisy_images)
            loss = torch.nn.MSELoss()(reconstructed, clean_images)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert sum(losses[-4:]) < 0.6 * sum(losses[:4]), losses


def test_what_each_flag_of_the_lab_changes_and_what_an_interruption_leaves():
    train_models = autoencoder.train_models

    def lab(flags, place="out"):
        out = works(autoencoder, f"--exercise progressive {flags}")
        text = (Path(place) / "lab.md").read_text("utf-8")
        assert text in out
        return text

    def interrupt(labels, images, seed, *others):
        if seed == 1:
            raise KeyboardInterrupt
        return train_models(labels, images, seed, *others)

    with tiny_sets():
        with spied(autoencoder, "train_models") as trainings:
            first = lab("")  # 320 images, fewer than a batch
        assert [given[2:] for given, _ in trainings] == [(seed, 10, 512) for seed in range(3)]
        assert "--exercise progressive --data mnist --epochs 10 --seeds 3`" in first
        assert sorted(os.listdir("out")) == ["autoencoder-progressive.png", "lab.md"]
        texts = [first, *map(lab, ("--epochs 1", "--seeds 1", "--seeds 1 --batch-size 160"))]
        assert len({text.split("\n", 1)[1] for text in texts}) == 4  # each changes the figures
        with patched(autoencoder, train_models=interrupt):
            code, out, _ = run(autoencoder, "--exercise progressive")
        assert code == 130 and "1 of 3" in out
        assert Path("out/lab.md").read_text("utf-8") == texts[2]  # that of --seeds 1
        os.makedirs("blocked/lab.md")
        with spied(autoencoder, "train_models") as trainings:
            refused(autoencoder, "--exercise progressive --out blocked", "lab.md is a folder")
        assert not trainings
        os.rename("data", "elsewhere")
        flags = "--seeds 1 --batch-size 160 --data-dir elsewhere --data mnist --out some/where"
        assert lab(flags, "some/where") == texts[3]


def test_the_lab_falls_back_to_built_in_images_once():
    small = dict.fromkeys(data.BUILT_IN, (data.make_glyphs, 40, 2))
    with folder(), patched(data, MNIST_URLS=["https://127.0.0.1:9/"], BUILT_IN=small):
        out = works(autoencoder, "--exercise progressive --seeds 1 --epochs 1")
        assert "--data glyphs" in out and out.count("USING THE BUILT-IN SET 'glyphs'") == 1


def test_the_labels_of_a_folder_are_its_subfolders():
    images, digits = data.make_glyphs(60, seed=3)

    def table_of(place):
        out = works(autoencoder, f"--exercise features --epochs 1 --seeds 1 --data {place}")
        return out, Path("out/lab.md").read_text("utf-8")

    with folder():
        os.mkdir("plain")
        os.mkdir("alike")
        for i, (image, digit) in enumerate(zip(images, digits.tolist())):
            place = f"sorted/{'ab'[digit % 2]}/{digit}"
            os.makedirs(place, exist_ok=True)
            save_png(f"{place}/{i}.png", image[0].numpy())
            save_png(f"plain/{i}.png", image[0].numpy())
            save_png(f"alike/{i}.png", images[0, 0].numpy())
        Path("plain/notes.txt").touch()
        for part in (True, False):
            _, found, labels = data.load_dataset("sorted", "", part, "mnist")
            same = (images == found[:, None]).all((2, 3, 4)).int()
            assert torch.equal(digits[same.argmax(1)] % 2, labels)
        out, table = table_of("sorted")
        assert "notice" not in out and "| 54 labels, clean |" in table
        out, table = table_of("plain")
        assert out.count("notice: plain has no subfolders") == out.count("1 of 61 files") == 1
        assert "mean absolute correlation" in table and "labels" not in table
        assert "| nan" not in table
        alike = os.fsdecode(b"alike\xff")  # no UTF-8
        os.rename("alike", alike)
        table = table_of(alike)[1]
        assert "| nan" in table and "nan: no two features vary" in table


def test_the_report_on_one_autoencoder():
    labels = ["clean", "gaussian 0.3", "salt_pepper 0.2", "masking 0.3"]
    model = answering(torch.sqrt)
    for count, shown in ((60, 4), (2, 2)):  # images, and how many of them are drawn
        images = data.make_glyphs(count, 3)[0]
        expected, drawn = autoencoder.cross_test({"mixed": model}, labels, images / 255, shown)
        with folder() as place:
            report, said = quiet(autoencoder.report_autoencoder, model, images, place, "mixed")
            assert np.array_equal(pixels_of("samples.png"), pixels_of(drawn))
        assert report == expected
        assert f"test MSE, {count} images\n{autoencoder.markdown([report])}" in said


def test_the_lab_writes_the_tables_and_pictures_of_its_exercises():
    noises = ["gaussian 0.3", "salt_pepper 0.2", "masking 0.3"]
    levels = [f"gaussian 0.{i}" for i in range(1, 6)]
    unknown = ["masking 0.3 + gaussian 0.3", "gaussian 0.3 + salt_pepper 0.2", "stripes"]
    pair, of_seed = ["clean", "gaussian 0.3"], []
    train_models = autoencoder.train_models

    def record(*arguments):
        of_seed.append(train_models(*arguments))
        return of_seed[-1]

    def result(name, seed):
        labels, tests = exercises[name]
        models = {label: of_seed[seed][label] for label in labels}
        if name == "features":
            return autoencoder.features(models, test, y_test, images, y.long(), seed)
        if name == "progressive":
            return autoencoder.progressive(models["gaussian 0.3"], test, seed)
        return autoencoder.cross_test(models, tests, test)

    exercises = {
        "compare": (pair, ["clean", *noises]), "levels": (levels, levels),
        "types": (noises, noises), "blind": (["mixed", *noises], noises + unknown),
        "features": (pair, None), "progressive": (pair, None)}
    with tiny_sets(), patched(autoencoder, train_models=record):
        works(autoencoder, "--exercise all --out lab --epochs 1 --batch-size 160 --seeds 2")
        (images, y), (test, y_test) = (data.load_mnist("data", part) for part in (True, False))
        images, test = images / 255, test / 255
        first, *sections = Path("lab/lab.md").read_text("utf-8").split("\n## ")
        assert "--exercise all --data mnist --epochs 1 --seeds 2" in first
        for name, section in zip(exercises, sections, strict=True):
            tables, (picture, _) = zip(result(name, 0), result(name, 1))
            assert section == f"{name}\n\n{autoencoder.markdown(tables)}"
            drawn = pixels_of(f"lab/autoencoder-{name}.png")
            assert np.array_equal(drawn, pixels_of(picture)), name


# --------------------------------------------------------------------------------------- training


def checkpoint_of(place):
    return torch.load(f"{place}/checkpoint.pt", weights_only=True)


@contextlib.contextmanager
def without_reports():
    """tiny_sets, but train.py measures little, which takes most of a short run."""
    figures = {"one-step mean": {"psnr": 20.0}, "kriging": {"psnr": 19.0}}
    nothing = unittest.mock.Mock(return_value={})
    measure = unittest.mock.Mock(return_value=figures)
    with (tiny_sets() as root, patched(train, report_autoencoder=nothing),
          patched(sample, report_field=nothing, evaluate_field=measure)):
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
    model, images, seen = torch.nn.Linear(1, 1, bias=False).double(), torch.arange(300), []
    optimizer = torch.optim.SGD(model.parameters(), 0.4)

    def loss(index):
        close(torch.rand(1), torch.rand(1, generator=seeded(7 * 1_000_003 + len(seen))), 0)
        seen.append(images[index])
        return 1e4 * model.weight.sum()  # an enormous gradient

    task = types.SimpleNamespace(model=model, batch_loss=loss, warmup=0.1)
    args = types.SimpleNamespace(batch_size=100, steps=30, seed=7)
    steps = train.training_loop(task, [optimizer], images, args)
    for i in range(30):
        before = model.weight.item()
        step, value = next(steps)
        assert step == len(seen) == i + 1 and value == 1e4 * before
        rate = 0.4 * min(1, (i + 1) / 3) * 0.5 * (1 + math.cos(math.pi * i / 30))
        close(before - model.weight.item(), rate, 1e-9)
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


def half_batch_loss(model, sched, images, index, pure):
    """The loss of half a batch by hand; pure: of pure noise, with 614 outputs, otherwise 204."""
    order = torch.rand(len(index), 1024)
    split = data.sparse_split(images[index], output_ratio=0.6 if pure else 0.2, order=order)
    t = torch.randint(999 if pure else 0, 1000, (len(index),))
    x_0, x_t = split["output_values"], None
    if not pure:
        bar = sched.alphas_cumprod[t].float()[:, None, None]
        x_t = bar.sqrt() * x_0 + (1 - bar).sqrt() * torch.randn(x_0.shape)
    x_0_hat = model(x_t, split["output_coords"], t, split["input_coords"], split["input_values"])
    return ((x_0_hat - x_0) ** 2).mean()


def test_three_steps_of_the_field_written_out():
    """Batches of 8 of 16 images, so the third step begins a new epoch."""
    images, sched = data.make_leaves(16, 3)[0], schedule.DiffusionSchedule()
    order = torch.cat([torch.randperm(16, generator=seeded(42_000_126 + i)) for i in range(2)])
    with without_reports(), patched(data, load_cifar10=lambda *_: (images, None)):
        got = trained("nf", "--steps 3 --batch-size 8")
    torch.manual_seed(42)
    model = nf_denoiser.NFDenoiser(sched.alphas_cumprod, **TINY,
                                   covariance=nf_denoiser.pixel_covariance(images))
    start = {name: p.clone() for name, p in model.state_dict().items()}
    muon, rest = {}, {}
    for name, p in model.named_parameters():
        small = name.endswith(("latents", "to_values.weight", "unet.first.weight"))
        (rest if small or p.dim() == 1 else muon)[name] = p
    adamw = torch.optim.AdamW(rest.values(), 1.0, weight_decay=0.01)
    for step in range(3):
        torch.manual_seed(42_000_126 + step)
        first, second = order[8 * step:8 * step + 8].chunk(2)
        loss = half_batch_loss(model, sched, images, first, pure=True) / 2
        loss = loss + half_batch_loss(model, sched, images, second, pure=False) / 2
        close(got["losses"][step], loss.detach(), 2e-5)
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rate = 0.5 * (1 + math.cos(math.pi * step / 3))
        adamw.param_groups[0]["lr"] = 0.15 * 0.02 * rate
        adamw.step()
        for p in muon.values():
            orthogonal_update(p, 0.02 * rate)
    for group in (muon, rest):
        moved = sum((p - start[name]).abs().sum() for name, p in group.items())
        apart = sum((p - got["model"][name]).abs().sum() for name, p in group.items())
        assert apart < 0.03 * moved, (apart, moved)
    assert {o["param_groups"][0]["weight_decay"] for o in got["optimizers"]} == {0.01}
    full = types.SimpleNamespace(model="nf", size="full", lr=1e-4)  # AdamW alone
    assert [type(o) for o in train.make_optimizers(model, full)] == [torch.optim.AdamW]


def test_the_printed_loss_is_the_mean_of_the_last_hundred_steps():
    with without_reports(), spied(train, "line_chart") as charts:
        out = works(train, "--model dae --data mnist --batch-size 64 --steps 200")
        losses = checkpoint_of("out/dae")["losses"]
    assert re.search(r"step 200 of 200 .*  0 s left", out)
    printed = re.findall(r"step (\d+) of 200 .* loss ([\d.]+)", out)
    assert len(printed) == 40  # after each epoch of 5 steps
    (xs, ys), = charts[0][0][1].values()  # of loss.png: means of two steps
    assert list(xs) == list(range(2, 201, 2))
    close(ys, losses.view(100, 2).mean(1), 1e-6)
    for step, loss in printed:
        close(float(loss), losses[max(0, int(step) - 100):int(step)].mean(), 6e-6)


def test_what_each_flag_changes():
    def bias(model, flags):
        return trained(model, f"--steps 2 --batch-size 64 {flags}")["model"]["decoder.0.bias"]

    with without_reports():
        dae = bias("dae", "")
        for flag in ("--noise salt_pepper", "--noise-param 0.6", "--seed 7", "--lr 0.001",
                     "--batch-size 32"):
            assert not torch.equal(dae, bias("dae", flag)), flag
        for name, strength in (("gaussian", 0.3), ("salt_pepper", 0.2), ("masking", 0.3)):
            by_default = bias("dae", f"--noise {name}")
            assert torch.equal(by_default, bias("dae", f"--noise {name} --noise-param {strength}"))
        assert torch.equal(dae, bias("dae", "--noise gaussian"))
        assert torch.equal(bias("ae", ""), bias("dae", "--noise-param 0"))
        for name, parts in (("cosine", "unet perceiver"), ("linear", "gaussian")):
            got = trained("nf", f"--steps 1 --batch-size 2 --beta-schedule {name} --parts {parts}")
            sched = schedule.DiffusionSchedule(1000, name)
            close(got["model"]["alphas_cumprod"], sched.alphas_cumprod, 1e-6)
            assert schedule.DiffusionSchedule(**got["schedule"]).betas.equal(sched.betas)
            assert got["config"]["parts"] == parts.split()
            net = sample.load_checkpoint("out/nf/checkpoint.pt")[0]
            independent = isinstance(net.posterior, nf_denoiser.IndependentPixels)
            assert independent == ("gaussian" not in parts) and not net.training
        assert got["step"] == 0 and len(got["losses"]) == 0  # nothing to train
        trained("nf", "--batch-size 2 --beta-schedule linear --parts gaussian --resume")
        with spied(train, "off_grid_split") as splits:
            got = trained("nf", "--steps 1 --batch-size 2 --pixels anywhere --num-latents 3")
        assert len(splits) == 2 and len(got["model"]["perceiver.latents"]) == 3
        with patched(data, load_cifar10=lambda *_: data.make_leaves(202, 3)):
            works(train, "--data cifar10 --steps 1 --batch-size 2 --parts unet")
        assert len(sample.report_field.call_args.args[2]) == 200  # if --evaluate says nothing


def test_the_closing_table_is_about_test_images():
    report = unittest.mock.Mock(return_value={"kriging": {"psnr": 21.0}})
    leaves = data.make_leaves(8, 3)
    with (tiny_sets(), patched(data, load_cifar10=lambda *_: leaves),
          patched(sample, report_field=report), patched(train, report_autoencoder=report)):
        for model, name in (("nf", "cifar10"), ("dae", "mnist")):
            with spied(train, "line_chart") as charts:
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
                noisy = noise.add_gaussian_noise(images / 255, 0.3, seeded())
                figures = [F.mse_loss(net(noisy)[0], images / 255).item()]
            close(got["tests"][-1], [2, *figures], 1e-3 if model == "nf" else 1e-6)
            ((_, curves), _) = charts[1]
            last = {name: values[-1] for name, (_, values) in curves.items()}
            names = ("one-step PSNR", "kriging") if model == "nf" else ("test MSE",)
            assert last == dict(zip(names, got["tests"][-1][1:]))
            with Image.open(f"out/{model}/loss.png") as image:
                assert image.size == (920, 320)
                for place in (0, 460):  # two charts
                    colours = image.crop((place, 0, place + 460, 320)).getcolors(10_000)
                    assert len(colours) > 5 and max(colours)[1] == (255, 255, 255)


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
    model = tiny_field(("unet",), side=16, widths=(16, 24))

    def gain(model):
        table = sample.evaluate_field(model.eval(), sched, test)
        return table["one-step mean"]["psnr"] - table["kriging"]["psnr"]

    gained = gain(tiny_field(("gaussian",), side=16, covariance=covariance))
    assert gained > 0.6, gained
    args = types.SimpleNamespace(model="nf", size="small", lr=0.02, batch_size=8, steps=100, seed=0,
                                 parts=["unet"], pixels="grid")
    task = types.SimpleNamespace(model=model, warmup=0.02, batch_loss=lambda index: (
        train.field_loss(model.train(), sched, images, index, args)))
    before = gain(model)
    list(train.training_loop(task, train.make_optimizers(model, args), images, args))
    gained = gain(model) - before
    assert gained > 1.1, gained


def interrupted(line, number, when):
    """Run train.py, which gets a signal as soon as when(checkpoint) is true: as run()."""
    save = sample.save_checkpoint

    def save_and_interrupt(path, checkpoint, set_aside):
        save(path, checkpoint, set_aside)
        if when(checkpoint):
            signal.raise_signal(number)

    with patched(sample, save_checkpoint=save_and_interrupt):
        return run(train, line)


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped():
    with without_reports():
        for model, number, flags in (
                ("dae", signal.SIGTERM, "--data mnist --batch-size 160 --noise mixed --steps 8"),
                ("ae", signal.SIGINT, "--data mnist --batch-size 160 --steps 6"),
                ("nf", signal.SIGINT, "--data cifar10 --batch-size 2 --steps 4")):
            line = f"--model {model} {flags} --out"
            handler = signal.getsignal(number)
            works(train, f"{line} whole")
            for stop, resume in ((2, ""), (4, "--resume")):
                code, out, _ = interrupted(f"{line} parts {resume}", number,
                                           lambda saved: saved["step"] == stop)
                assert code == 128 + number and "stopped and saved" in out and "--resume" in out
                last = min(stop + 1, int(flags.split("--steps ")[1][0]))
                assert checkpoint_of(f"parts/{model}")["step"] == last  # one more step, then saved
            works(train, f"{line} parts --resume")
            equal(checkpoint_of(f"whole/{model}"), checkpoint_of(f"parts/{model}"))
            assert signal.getsignal(number) == handler
        for flag in ("--lr 0.5", "--parts unet", "--data leaves"):
            with patched(data, BUILT_IN={"leaves": (data.make_leaves, 80, 2)}):
                refused(train, f"{line} parts --resume {flag}", "was trained on cifar10", "->")
        works(train, f"{line} parts --resume --steps 5")
        refused(train, f"{line} parts --resume", "5 steps", "--steps")
        shutil.copy("parts/dae/checkpoint.pt", "parts/ae")
        refused(train, "--model ae --data mnist --resume --steps 50 --batch-size 160 --out parts",
                "model dae -> ae")


def test_pictures_that_are_missing_are_written_by_resuming():
    def fail(*_):
        raise ValueError("no table")

    line = "--model ae --data mnist --batch-size 160 --steps 2"
    term = lambda *_: signal.raise_signal(signal.SIGTERM)
    ctrl_c = lambda *_: signal.raise_signal(signal.SIGINT)
    with tiny_sets():
        for report, code in ((term, 143), (ctrl_c, 130), (fail, 1)):
            shutil.rmtree("out", ignore_errors=True)
            with patched(train, report_autoencoder=report):
                got, out, _ = run(train, line)
            assert got == code and "out/ae/checkpoint.pt is complete: " in out
            assert sorted(os.listdir("out/ae")) == ["checkpoint.pt", "loss.png"]
            saved = checkpoint_of("out/ae")
            works(train, f"{line} --resume")
            equal(checkpoint_of("out/ae"), saved)
            assert {"results.json", "samples.png"} < set(os.listdir("out/ae"))


def test_more_epochs_go_on_at_the_speed_of_now():
    with without_reports():
        line = "--model ae --data mnist --batch-size 160 --out"
        works(train, f"{line} new --epochs 1")
        clock = itertools.count()
        with patched(time, perf_counter=lambda: next(clock)):
            out = works(train, f"{line} new --epochs 2 --resume")
        assert checkpoint_of("new/ae")["step"] == 4
        assert trained("nf", "--epochs 1 --batch-size 40 --parts unet")["step"] == 2
        assert re.search("step 4 of 4  160 images/s", out), out


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
    line = "--model ae --data mnist --batch-size 160 --steps 4 --seed"
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
        refused(train, f"{line} 3 --lr 1e30", "finite")
        refused(sample, f"{new} --export ./out/../{new}", "--export")
        assert new.read_bytes() == second and old.read_bytes() == first
        assert sorted(os.listdir("out/ae")) == [
            "checkpoint-old.pt", "checkpoint.pt", "loss.png", "results.json"]
        works(train, f"{line} 2 --resume --steps 5")
        assert old.read_bytes() == first


def test_a_folder_is_known_by_the_pictures_in_it():
    images = leaves(3)
    other = images.clone()
    other[2, 2, 15, 15] ^= 1
    assert sample.checksum(images) != sample.checksum(other)
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
        Path("file").touch()
        Path("there").mkdir()
        os.symlink("/proc/self", "there/ae")  # where root, too, can make no files
        places = {"file": "file/ae", "there": "there/ae/checkpoint.pt", "/proc/no": "/proc/no"}
        for name in ("checkpoint.pt", "checkpoint-old.pt", "loss.png", "samples.png",
                     "results.json"):
            Path(name, "ae", name).mkdir(parents=True)
            places[name] = f"{name}/ae/{name} is a folder"
        for place, named in places.items():
            refused(train, f"--model ae --data mnist --out {place}", named)
        refused(train, "--model ae --data nowhere --out new", "nowhere")
        assert not loops and not Path("new/ae").exists()


def started(line, **environment):
    """train.py in a process of its own, on one thread: a fork, so torch need not be imported."""
    def main():
        os.environ.update(environment)
        torch.set_num_threads(1)
        if environment:
            importlib.reload(train)  # it reads them when it is imported
        if train.RANK == 1:
            train.load_dataset = None  # only the first process reads the data
        code, out, err = run(train, line)
        with open("log", "a") as log:
            log.write(out + err)
        os._exit(code)

    process = multiprocessing.get_context("fork").Process(target=main)
    process.start()
    return process


def ended(*processes, code=0):
    for process in processes:
        process.join(200)
        assert process.exitcode == code, Path("log").read_text()


def test_kill_9_at_any_moment_loses_nothing():
    """A run that saves every step is killed again and again: the file on disk always loads."""
    rng, kills = np.random.default_rng(0), 20 if LONG else 2
    path, resume = Path("parts/dae/checkpoint.pt"), ""
    flags = f"--model dae --data mnist --batch-size 320 --steps {25 * kills} --out"
    with without_reports():
        ended(started(f"{flags} whole"))
        for _ in range(kills):
            process = started(f"{flags} parts {resume}")
            before = path.exists() and path.stat().st_mtime_ns
            while process.is_alive() and (path.exists() and path.stat().st_mtime_ns) == before:
                time.sleep(0.005)  # until this process has saved something
            time.sleep(rng.uniform(0, 0.15))
            process.kill()
            ended(process, code=-signal.SIGKILL)
            assert 1 <= sample.load_checkpoint(path)[1]["step"] < 25 * kills
            resume = "--resume"
        ended(started(f"{flags} parts --resume"))
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
    no_dropout = unittest.mock.patch.dict(TINY, dropout=0.0)
    with without_reports(), no_dropout:
        for model, flags in (("nf", "--data cifar10 --batch-size 4"),
                             ("dae", "--data mnist --batch-size 8 --noise mixed")):
            line = f"--model {model} {flags} --evaluate 1 --steps 1 --out"
            works(train, f"{line} one")
            ended(*start_two(f"{line} two"))
            one, two = checkpoint_of(f"one/{model}"), checkpoint_of(f"two/{model}")
            # after one step momentum is the gradient, and exp_avg a tenth of it
            assert sum(len(optimizer["state"]) for optimizer in one["optimizers"]) >= 12
            torch.testing.assert_close(one["optimizers"], two["optimizers"], rtol=0, atol=2e-5)
            close(one["losses"], two["losses"], 1e-6)  # the mean over processes
        assert Path("log").read_text().count("trained in") == 2  # the second one prints nothing
        ended(*start_two(f"{line} one --steps 2 --resume"))
        assert checkpoint_of("one/dae")["step"] == 2
        with patched(train, WORLD=3):
            refused(train, f"{line} one --batch-size 10", "multiple of 3")
            refused(train, "--batch-size 9", "multiple of 6")


def test_a_signal_to_one_of_two_processes_ends_both_after_the_same_step():
    line = "--model ae --data mnist --batch-size 320 --steps 9999"
    with without_reports():
        processes = start_two(line)
        while not Path("out/ae/checkpoint.pt").exists():
            time.sleep(0.01)
        processes[1].terminate()
        ended(*processes, code=143)
        step = checkpoint_of("out/ae")["step"]
        ended(*start_two(f"{line} --resume --steps {step}"))


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
        with patched(noise, NOISES=nan):
            refused(train, f"{line} 4 --resume", "finite")
        assert path.read_bytes() == before and not list(path.parent.glob("*.part"))
        refused(train, f"{line} 1 --lr 1e30 --out wild", "finite", "lower --lr")  # only weights
        figures = {name: {"psnr": math.nan} for name in ("one-step mean", "kriging")}
        with patched(sample, evaluate_field=lambda *_, **__: figures):
            refused(train, "--data cifar10 --batch-size 2 --steps 1 --out wild", "test figure")
        assert not list(Path("wild").rglob("*.pt"))
        works(train, f"{line} 4 --resume")


# ----------------------------------------------------------------------------- using the programs


def save_field(path="m.pt", seed=0, channels=3, side=32, data_name="cifar10",
               parts=nf_denoiser.PARTS, **settings):
    """A checkpoint of an untrained field with 20 timesteps: (model, schedule)."""
    torch.manual_seed(seed)
    sched = schedule.DiffusionSchedule(20)
    config = dict(TINY, channels=channels, side=side, parts=parts)
    model = nf_denoiser.NFDenoiser(sched.alphas_cumprod, **config).eval()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sample.save_checkpoint(Path(path), dict(
        kind="nf", config=config, settings=settings, schedule=dict(timesteps=20), data=data_name,
        step=7, model=model.state_dict(), optimizers=[]))
    return model, sched


@contextlib.contextmanager
def a_field_and_test_images(**settings):
    """In a new folder with the checkpoint m.pt, of images of 16 x 16: (model, schedule, images).

    They are the test images of "leaves". No other set can be loaded.
    """
    def make(count, seed):
        return leaves(count, 16), None

    with folder(), patched(data, CIFAR10_URLS=[], BUILT_IN={"leaves": (make, 4, 8)}):
        yield *save_field(side=16, data_name="leaves", **settings), leaves(8, 16)


def figures_of(flags):
    """{method: figures} that sample.py writes for m.pt and two test images, and what it prints."""
    out = works(sample, f"m.pt --evaluate 2 --json f.json {flags}")
    return json.loads(Path("f.json").read_text())["methods"], out


@contextlib.contextmanager
def without_measuring():
    """sample.py reports nothing; a list gets the (images, folder, name) that it would report."""
    reports = []

    def note(model, schedule, *what, **options):
        reports.append(what[:3])
        return {}

    with patched(sample, report_field=note, report_picture=note):
        yield reports


def test_each_flag_changes_the_table_as_it_says():
    three = dict(num_steps=3)
    with a_field_and_test_images() as (*field, images):
        for flags, sampling, options in (
                ("--steps 3", three, {}),
                ("--steps 4", dict(num_steps=4), {}),
                ("--steps 3 --eta 0.5", dict(num_steps=3, eta=0.5), {}),
                ("--steps 20 --eta 1", dict(num_steps=20, eta=1), {}),
                ("--steps 3 --seed 4", three, dict(seed=4)),
                ("--steps 3 --input-ratio 0.5", three, dict(input_ratio=0.5)),
                ("--steps 3 --full", three, dict(full=True)),
                ("--steps 3 --pixels anywhere", three, dict(pixels="anywhere"))):
            got, out = figures_of(flags)
            seed = options.get("seed", 0)
            draw = drawing(*field, seed, **sampling)
            equal(got, sample.evaluate_field(*field, images[:2], draw, **options), 1e-5)
            assert re.search(r"\n +MSE +MAE +PSNR dB +SSIM\n", out)
            for method, row in got.items():  # the table says the same
                line = (f"{method} +{row['mse']:.5f} +{row['mae']:.5f} +{row['psnr']:.2f} +"
                        f"{row['ssim']:.4f}\n")
                assert re.search(line, out), (flags, out)
            n_in = int(256 * options.get("input_ratio", 0.2))
            n_out = 205 if "full" in options else 51
            title = (f"leaves: 2 images, {n_in} pixels given, {n_out} measured, sample in "
                     f"{sampling['num_steps']} steps, mask seed {seed}\n")
            assert title in out, out
        refused(sample, "m.pt", "1 to 20, got 50")  # the default of --steps


def test_a_model_trained_off_the_grid_is_measured_off_the_grid():
    with a_field_and_test_images(pixels="anywhere"):
        anywhere, _ = figures_of("--steps 2")
        equal(anywhere, figures_of("--steps 2 --pixels anywhere")[0])
        assert anywhere["nearest"] != figures_of("--steps 2 --pixels grid")[0]["nearest"]


def test_how_many_images_are_measured():
    assert sample.parse_arguments(["--evaluate"]).evaluate == 1000
    with a_field_and_test_images(), without_measuring() as reports:
        for flags, count in (("", 6), ("--evaluate 5", 5), ("--evaluate", 8)):
            out = works(sample, f"m.pt --json there/f.json {flags}")
            assert len(reports.pop()[0]) == count
            expected = dict(checkpoint="m.pt", data="leaves", images=count, seed=0, methods={})
            assert json.loads(Path("there/f.json").read_text()) == expected
        assert out.startswith("m.pt: nf, 7 steps on leaves\n") and "s on cpu" in out


@functools.cache
def pictures():
    """What one run of sample.py draws, from what, and what it prints."""
    with a_field_and_test_images() as (*field, images), spied(sample, "image_grid") as drawn:
        figures, out = figures_of("--steps 4 --eta 1 --samples 2 --scale 3 --gif --evaluate 7")
        for name, (given, options) in zip(("samples", "spread", "scale"), drawn):
            expected = data.image_grid(*given, **options)
            assert np.array_equal(pixels_of(f"out/nf/{name}.png"), pixels_of(expected))
        gif = Path("out/nf/denoising.gif").read_bytes()
    return drawn, field, images / 255, figures["samples"], out, gif


def columns(rows, labels, *expected):
    """The columns of a picture, which must be as expected: pairs (label, images)."""
    assert labels == [label for label, _ in expected]
    for (label, images), column in zip(expected, zip(*rows)):
        close(torch.stack(column), images, 1e-4)


def test_the_pictures_are_about_the_first_six_images():
    (((rows, labels), options), *_), field, images, *_ = pictures()
    images = images[:6]
    split, n_out = sample.split_images(leaves(6, 16), torch.arange(6))
    draw = drawing(*field, num_steps=4, eta=1)
    sample.evaluate_field(*field, leaves(7, 16), draw)  # takes its noise first
    answers = sample.reconstruct(*field, split, draw, n_out)
    shown = {method: sample.assemble(split, answers[method])
             for method in ("kriging", "one-step mean", "sample")}
    errors = [data.heat(error) for error in shown["one-step mean"] - images]
    columns(rows, labels, ("input pixels", sample.assemble(split)), *shown.items(),
            ("truth", images), ("error of mean", torch.stack(errors)))
    for i, caption in enumerate(options["captions"]):
        mses = [(answer[i] - images[i]).square().mean().item() for answer in shown.values()]
        decibels = [f"{-10 * math.log10(mse):.1f} dB" for mse in mses]
        assert caption == ["", *decibels, "", "white: 0.5"]


def test_the_picture_of_several_samples():
    (_, ((rows, labels), _), *_), _, images, figures, out, _ = pictures()
    assert (f"2 samples per image: {figures['coverage']:.1%} of the true values in the "
            f"central 90%, standard deviation {figures['spread']:.4f}, PSNR of their mean "
            f"{figures['psnr_mean']:.2f} dB") in out
    images = images[:4]
    one, two, *_ = (torch.stack(column) for column in zip(*rows))
    mean = (one + two) / 2
    std = [data.heat(image, 0.25) for image in (one - two) / 2**0.5]
    errors = [data.heat(image, 0.25) for image in mean - images]
    columns(rows, labels, ("sample 1", one), ("sample 2", two), ("mean", mean), ("truth", images),
            ("std. deviation", torch.stack(std)), ("error of mean", torch.stack(errors)))
    assert not torch.equal(one, two)


def test_the_picture_of_a_fine_grid():
    (_, _, ((rows, labels), options), *_), field, images, *_ = pictures()
    split, _ = sample.split_images(leaves(6, 16), torch.arange(6))
    line = torch.linspace(0, 1, 48)
    y, x = torch.meshgrid(line, line, indexing="ij")
    coords = torch.stack([x, y], -1).view(1, -1, 2).expand(6, -1, -1)
    fine = nf_denoiser.one_step_mean(*field, coords, *where(split)[1:])
    columns(rows, labels, ("input pixels", sample.assemble(split)),
            ("model x3", fine.mT.view(6, 3, 48, 48) / 2 + 0.5), ("truth", images[:6]))
    assert options["zoom"] % 3 == 0  # no fine pixel is left out
    assert sample.draw_fine(*field, split, 7).width > 3 * 7 * 16


def test_the_animation_shows_every_step_from_noise_to_image():
    (((rows, _), _), _, _, *steps), _, _, *_, content = pictures()
    with Image.open(io.BytesIO(content)) as gif:
        first = gif.info["duration"]
        gif.seek(gif.n_frames - 1)
        assert gif.n_frames >= 4 and gif.info["loop"] == 0
        assert gif.info["duration"] > 1000 > 200 > first  # the end stays
    times = [time for (_, (time,), _), _ in steps]
    assert times == ["t = 19", "t = 13", "t = 6", *["t = 0"] * 11]
    split, n_out = sample.split_images(leaves(3, 16), torch.arange(3))
    drawn = split["output_indices"][:, None, :n_out].expand(-1, 3, -1)

    def values(images):
        return torch.stack(list(images)).flatten(2).gather(2, drawn)

    ((noisy, _), _, names), _ = steps[0]
    assert names == ["x_t", "prediction"]
    assert abs(values(noisy).std() - 0.5) < 0.05  # N(0, 1) of the range from -1 to 1
    ((_, predicted), *_), _ = steps[-1]
    close(values(predicted).clamp(0, 1), values(row[3] for row in rows[:3]), 0.02)


def test_a_long_animation_shows_some_of_the_steps():
    split, _ = sample.split_images(leaves(1), torch.arange(1))
    frames = [(t, *torch.rand(2, 1, 204, 3)) for t in range(1000)]
    with folder(), spied(sample, "image_grid") as drawn:
        quiet(sample.animate, split, frames, "a.gif")
    times = [int(labels[0].removeprefix("t = ")) for (_, labels, _), _ in drawn]
    assert 25 <= len(set(times)) <= 51 and np.diff(times).max() < 50


def test_the_newest_checkpoint_is_sampled_or_the_shipped_one_which_needs_no_network():
    with a_field_and_test_images(), without_measuring() as reports:
        for path, age in (("run/nf/new/checkpoint.pt", 0), ("run/checkpoint.pt", 100),
                          ("else/checkpoint.pt", -100), ("assets/shipped.pt", 0)):
            save_field(path, side=16)
            os.utime(path, (time.time() - age,) * 2)
        shipped = Path("assets/shipped.pt").resolve()
        with patched(sample, SHIPPED=shipped):
            for line, used in (
                    ("--out run --data leaves", "run/nf/new/checkpoint.pt"),
                    ("--out run --data leaves run/checkpoint.pt", "run/checkpoint.pt"),
                    ("--out run --image photo.png", shipped),
                    ("--out empty", shipped),
                    ("assets/../assets/shipped.pt", "assets/../assets/shipped.pt")):
                assert works(sample, line).startswith(f"{used}: nf"), line
            assert [place for _, place, _ in reports] == [
                Path(place, "nf") for place in ("run", "run", "run", "empty", "out")]
            refused(sample, "assets/shipped.pt --data cifar10", "cannot fetch")
            refused(sample, "run/checkpoint.pt", "cannot fetch")


def test_other_data_than_the_model_was_trained_on():
    with tiny_sets("sets"), patched(data, BUILT_IN={"leaves": (data.make_leaves, 4, 2)}):
        save_field()
        save_field("grey.pt", channels=1, side=28, data_name="auto")
        with without_measuring() as reports:
            works(sample, "m.pt --data leaves")
            works(sample, "m.pt --data-dir sets")
        assert [(len(images), name) for images, _, name in reports] == [
            (2, "leaves"), (6, "cifar10")]
        refused(sample, "m.pt --data mnist --data-dir sets", "m.pt takes images of 3 x 32 x 32",
                "(1, 28, 28)")
        assert "mnist: 6 images" in works(sample, "grey.pt --steps 1 --data-dir sets --gif")


def test_an_exported_model_has_half_precision_and_the_same_answers():
    with a_field_and_test_images() as (model, _, _):
        assert "exported: half.pt" in works(sample, "m.pt --export half.pt")
        assert not Path("out").exists()
        before, _ = figures_of("--steps 2")
        Path("half.pt").replace("m.pt")
        equal(figures_of("--steps 2")[0], before, 0.02)
        loaded, checkpoint = sample.load_checkpoint("m.pt")
        assert set(checkpoint) == {*sample.KEYS, "model"} and checkpoint["step"] == 7
        assert not loaded.training
        equal(loaded.state_dict(), model.state_dict(), 2e-3)
        half = {name: p.detach().half() for name, p in model.named_parameters()}
        equal(checkpoint["model"], model.state_dict() | half)
        meta, _ = sample.load_checkpoint("m.pt", "meta")  # it stands for a GPU
        assert {p.device.type for p in meta.parameters()} == {"meta"}
    with tiny_sets():
        save_field()
        works(sample, "m.pt --export out/nf/checkpoint.pt")
        refused(train, "--data cifar10 --batch-size 2 --resume", "exported")


def test_a_place_that_cannot_be_written_is_noticed_before_measuring():
    with a_field_and_test_images(), without_measuring() as reports:
        os.mkdir("place")
        before = Path("m.pt").read_bytes()
        for flag in ("--json", "--export"):
            for place in ("place", "m.pt/below", "m.pt", "./place/../m.pt"):
                refused(sample, f"m.pt {flag} {place}")
        os.mkfifo("fifo")
        os.makedirs("out/nf/samples.png")
        for line, word in (("--json fifo", "fifo is a folder or a device"),
                           ("--image a.png", "samples.png is a folder")):
            refused(sample, f"m.pt {line}", word)
        assert not reports and Path("m.pt").read_bytes() == before
        for name, stays in (("place", True), ("new", False)):  # what was there, empty, stays there
            data.check_place(Path(name, "f.json"))
            assert Path(name).exists() == stays


def test_a_kill_while_figures_are_written_leaves_the_old_ones():
    write = Path.write_bytes

    def killed(path, content):
        write(path, content[:9])
        raise KeyboardInterrupt

    with folder() as root:
        path = root / "f.json"
        quiet(sample.write_json, path, "m.pt", "leaves", {})
        before = path.read_bytes()
        with patched(Path, write_bytes=killed):
            raises(KeyboardInterrupt, lambda: sample.write_json(path, "m.pt", "mnist", {}))
        assert path.read_bytes() == before and files_in(root) == [path]


def test_an_autoencoders_checkpoint_is_measured_by_its_own_report():
    with tiny_sets():
        model = autoencoder.DenoisingAutoencoder()
        sample.save_checkpoint(Path("m.pt"), dict(
            kind="dae", config=dict(input_dim=784, latent_dim=64), schedule={}, data="mnist",
            settings=dict(noise="gaussian 0.3"), step=1, model=model.state_dict()))
        images = data.load_mnist("data", False)[0]
        for flags, count in (("", 2), ("--evaluate", 64)):
            got, _ = figures_of(f"--out there {flags}")
            expected, _ = quiet(autoencoder.report_autoencoder, model, images[:count],
                                Path("there/dae"), "gaussian 0.3")
            equal(got, expected, 1e-6)
        report = unittest.mock.Mock(return_value={})
        with patched(sample, report_autoencoder=report):
            works(sample, "m.pt")
        assert len(report.call_args.args[1]) == len(images)  # by default all
        for flags in ("--steps 2 | --full | --gif | --scale 2 | --samples 2 | --eta 1 | --seed 1 | "
                      "--pixels grid | --image a.png | --input-ratio 0.5"
                      ).split(" | "):
            refused(sample, f"m.pt {flags}", "m.pt is an autoencoder")


def test_main_takes_a_list_and_works_in_a_thread():
    with a_field_and_test_images(), spied(torch, "set_flush_denormal") as fast:
        with patched(sys, argv=["notebook", "--nonsense"]):
            line = ["m.pt", "--steps", "1", "--evaluate", "1", "--out", "a"]
            thread = threading.Thread(target=quiet, args=(sample.main, line))
            thread.start()
            thread.join()
            assert sys.argv == ["notebook", "--nonsense"]
        assert Path("a/nf/samples.png").exists()
        assert fast == [((True,), {})]


def mean_of_given(output_coords, input_coords, input_values):
    """An answer for restore: one value for a window."""
    return input_values.mean(1, keepdim=True).expand(-1, output_coords.shape[1], -1)


def test_windows_are_blended_with_sin_squared():
    image = torch.rand(3, 32, 48, generator=seeded())
    known = (torch.arange(32) % 2 == 0)[:, None].expand(32, 48)  # as many in both windows
    left, right = (image[:, ::2, x:x + 32].mean(dim=(1, 2)) for x in (0, 16))
    weight = torch.sin(math.pi * (torch.arange(32) + 0.5) / 32) ** 2
    share = weight[:16] / (weight[:16] + weight[16:])  # of the right one, where both are
    share = torch.cat([torch.zeros(16), share, torch.ones(16)])
    before = image.clone()
    got = sample.restore_windows(image, known, mean_of_given, 32)
    assert image.equal(before)
    close(got[:, 31], torch.lerp(left[:, None], right[:, None], share), 1e-5)


def test_windows_cover_pictures_of_any_size():
    for height, width, side in ((1, 2, 32), (20, 70, 32), (33, 31, 32), (64, 48, 32), (9, 30, 8)):
        image = torch.rand(1, height, width, generator=seeded()) * 2 - 1
        known = torch.rand(height, width, generator=seeded(1)) < 0.3
        known[0, :2] = torch.tensor([True, False])
        got = sample.restore_windows(image, known, lambda *given: 2 + mean_of_given(*given), side)
        assert torch.equal(got[:, known], image[:, known])  # the given pixels stay
        close(got[:, ~known], 1.0, 1e-6)  # clamped


def test_windows_beyond_the_edge_see_a_mirrored_picture():
    for length, *lines in (
            (6, [0, 1, 2, 3], [2, 3, 4, 5]),
            (7, [0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 6]),
            (3, [0, 1, 2, 2]),
            (2, [0, 1, 1, 0])):
        assert sample.window_lines(length, 4).tolist() == lines


def test_windows_of_a_batch_have_almost_as_many_given_pixels():
    """Those with fewer repeat theirs."""
    counts = torch.arange(1, 1024)
    batches = list(sample.split_by_counts(counts, counts))
    assert torch.cat(batches).sort().values.equal(counts)
    for batch in batches:
        assert len(batch) <= 16 and batch.max() < 1.031 * batch.min()
    given = torch.tensor([[0, 1, 1, 0, 1], [0, 0, 0, 1, 0]]).bool()
    assert sample.repeat_to_equal_counts(given).tolist() == [[1, 2, 4], [3, 3, 3]]


def test_the_precision_matrix_gives_the_posterior_of_the_gaussian_field():
    coords = sample.grid_coords(32)[None]
    y = torch.randn(1, 1024, 3, generator=seeded())
    K = nf_denoiser.exponential_covariance(32)
    order = torch.randperm(1024, generator=seeded())
    batch = torch.stack([order[:1000], order[torch.arange(1000) % 600]])  # 600, some of them twice
    precise = sample.PrecisionField(K)
    got = precise(coords[0, batch], y[0, batch], coords.expand(2, -1, -1))
    for i, n_in in enumerate((1000, 600)):
        inputs = order[:n_in]
        expected = nf_denoiser.GaussianField(K)(coords[:, inputs], y[:, inputs], coords)
        for ours, theirs in zip(got, expected):
            close(ours[i], theirs[0], 1e-3)


def test_only_windows_whose_answer_is_used_are_computed():
    """At half the size those that touch the depth of a hole: a line of 4 pixels has none."""
    known, steps = torch.ones(64, 512, dtype=torch.bool), []
    known[:, 100:104] = False  # in 3 x 2 windows
    known[20:32, 400:412] = False  # in 2 x 2, at half the size 1 x 2, at a quarter 1 x 2
    sample.restore(torch.rand(3, 64, 512), known, mean_of_given,
                   on_step=lambda *step: steps.append(step))
    assert [windows for done, windows in steps if done == 0] == [10, 2, 2]
    wanted = torch.zeros(64, 512, dtype=torch.bool)
    wanted[:, 500:] = True
    one = torch.zeros(64, 512, dtype=torch.bool)
    one[0, 0] = True  # far from all that is wanted: filled on the way there
    filled = sample.restore(torch.ones(3, 64, 512), one, mean_of_given, wanted=wanted)
    close(filled[:, wanted], 1)


def test_a_large_hole_is_filled_from_its_rim():
    known, counts, steps = torch.ones(128, 128, dtype=torch.bool), [], []
    known[20:110, 20:110] = False
    image = torch.where(known, 0.25, -9.0).expand(3, -1, -1)

    def answer(output_coords, input_coords, input_values):
        counts.append(input_values.shape[1])
        assert (input_values > -1).all()  # nothing of the hole
        return mean_of_given(output_coords, input_coords, input_values)

    on_step = lambda done, windows: steps.append(windows - done)
    got = sample.restore_windows(image, known, answer, 32, on_step)
    close(got, torch.full((3, 128, 128), 0.25), 1e-5)
    assert min(counts) >= 200, counts
    assert steps == sorted(steps, reverse=True) and 0 < steps[-1] <= 16, steps
    close(sample.restore(image, known, answer), got, 1e-5)
    raises(ValueError, lambda: sample.restore(image, known & False, answer), "no pixel")


def test_the_depth_of_a_hole_is_restored_at_half_the_size():
    image = 0.4 + 0.01 * torch.rand(1, 64, 65, generator=seeded())
    known, sizes = torch.ones(64, 65, dtype=torch.bool), []
    known[20:32, 21:33] = False

    def one_value_a_size(image, input_mask, *_):
        sizes.append((image[0], input_mask))
        return torch.where(input_mask, image, 0.8 if len(sizes) == 1 else 0.4)

    with patched(sample, restore_windows=one_value_a_size):
        got = sample.restore(image, known, None)
    row = got[0, 26, 21:27].tolist()  # from the rim to the middle of the hole
    close(row, [0.8, 0.8, 0.667, 0.533, 0.4, 0.4], 0.01)
    assert torch.equal(got[:, known], image[:, known])
    half, mask = sizes[1]
    assert half.shape == (32, 33) and (~mask).sum() == 6 * 5  # those with none of four given
    close(half[5, 5], image[0, 10:12, 10:12].mean(), 1e-6)
    close(half[12, 10], image[0, 24:26, 20].mean(), 1e-6)  # the given two of four


def test_the_progress_tells_method_windows_and_time_left():
    for seconds, minutes in ((10, "9"), (2, "2"), (1.5, None)):
        terminal, clock = io.StringIO(), itertools.count(0, seconds)
        terminal.isatty = lambda: True
        show = sample.show_progress("kriging")
        with patched(sys, stdout=terminal), patched(time, time=lambda: next(clock)):
            for done in range(0, 80, 16):
                show(done, 960)
            said = terminal.getvalue()
            for done in (0, 16):  # half the size: the clock starts again
                show(done, 32)
        assert terminal.getvalue().endswith(f"16 of 32 windows, {seconds:.0f} s left\x1b[K\r")
        assert said.count("minutes\n") == bool(minutes), said
        assert not minutes or f"kriging: 960 windows, about {minutes} minutes\n" in said
        assert f"kriging: 64 of 960 windows, {56 * seconds:.0f} s left" in said.split("\n")[-1]


def restored(flags, name="photo"):
    """What sample.py prints for m.pt and a photograph, and NAME-restored.png."""
    return works(sample, f"m.pt --image {flags}"), pixels_of(f"out/nf/{name}-restored.png")


def test_a_field_without_the_gaussian_part_restores_and_the_resolution_is_kept():
    with folder():
        save_field(parts=("unet",))
        Image.fromarray(photograph()[0]).save("photo.png", dpi=(300, 300))
        restored("photo.png")
        with Image.open("out/nf/photo-restored.png") as picture:
            close(picture.info["dpi"], (300, 300), 0.1)


def test_in_every_other_window_x_and_y_change_places():
    model = tiny_field()
    sched = schedule.DiffusionSchedule()
    _, out, _, coords, values = random_problem()
    got = sample.mean_of_windows(model, sched, out, coords, values)
    first = model(None, out[:1], torch.tensor([999]), coords[:1], values[:1])
    close(got[:1], first, 1e-5)
    (x, y), (x_in, y_in) = out[1].T, coords[1].T
    swapped = torch.stack([y, x], -1)[None], torch.stack([y_in, x_in], -1)[None]
    second = model(None, swapped[0], torch.tensor([999]), swapped[1], values[1:])
    close(got[1:], second, 1e-5)
    assert not got.requires_grad


def test_a_photograph_is_restored_by_the_one_step_mean():
    photo, _ = photograph()
    with folder(), spied(sample, "image_grid") as drawn:
        model, sched = save_field()
        save_png("photo.png", photo)
        out, image = restored("photo.png --input-ratio 0.3 --seed 2 --json f.json")
        ((rows, labels), options), = drawn
        assert options["zoom"] == 256 // 90  # the longer side of the photograph
        comparison = data.image_grid(rows, labels, **options)
        assert np.array_equal(pixels_of("out/nf/photo-comparison.png"), pixels_of(comparison))
        figures = json.loads(Path("f.json").read_text())
        pixels, known, *_ = data.load_picture("photo.png", 3, None, 0.3, 2)
    given = data.to_signed(pixels) * known
    K = nf_denoiser.exponential_covariance(32)
    model.posterior = sample.PrecisionField(model.posterior.covariance)
    expected = [("given", data.to_unit(given)[None])]
    for name, answer, *more in (
            ("nearest", sample.nearest),
            ("kriging", sample.kriging, K),
            ("one-step mean", sample.mean_of_windows)):
        before = (model, sched) if name == "one-step mean" else ()
        filled = sample.restore(given, known, lambda *where: answer(*before, *where, *more))
        shown = data.to_unit(filled)
        mse = (shown - pixels / 255)[:, ~known].square().mean()
        decibels = f"{name:14}{-10 * mse.log10():6.2f} dB"
        assert f"{decibels}\n" in out
        close(figures["methods"][name]["psnr"], -10 * mse.log10(), 1e-3)
        expected.append((decibels, shown[None]))
    columns(rows, labels, *expected, ("truth", pixels[None] / 255))
    close(image.transpose(2, 0, 1), 255 * shown.clamp(0, 1), 0.51)
    assert abs(image - photo)[~known].max() > 5  # restored, not copied
    assert np.array_equal(image[known], photo[known])  # the given pixels, bit by bit
    assert figures["data"] == "photo.png" and figures["images"] == 1
    assert "3,780 of 5,400 pixels (70.0%) were hidden" in out, out


def test_the_truth_under_a_mask_is_not_used():
    photo, hole = photograph()
    with folder(), spied(sample, "image_grid") as drawn:
        save_field()
        save_png("mask.png", hole)
        save_png("holes.png", photo, 255 - hole)
        save_png("photo.png", np.where(hole[..., None] > 0, 7, photo))
        out, image = restored("holes.png", "holes")
        assert "dB" not in out and np.array_equal(image[hole == 0], photo[hole == 0])
        assert np.array_equal(image, restored("photo.png --mask mask.png")[1])
        assert abs(image - photo)[20:30, 30:40].max() < 60
    for ((row,), labels), _ in drawn:  # the model alone
        assert labels == ["given", "one-step mean"] and len(row) == 2
    assert out.split("\n")[1:4] == [
        "picture: out/nf/holes-restored.png", "picture: out/nf/holes-comparison.png",
        "300 of 5,400 pixels (5.6%) were missing and are restored; the others are unchanged"]


def test_results_of_another_picture_are_not_replaced():
    with folder():
        save_field()
        os.mkdir("other")
        contents = {}
        for i, name in enumerate(("photo.png", "photo.bmp", "other/photo.png", "photo.png")):
            save_png(name, bytes_((8, 8, 3), seed=i))
            works(sample, f"m.pt --image {name}")
            old, contents = contents, {path: path.read_bytes() for path in files_in(Path("out"))}
            replaced = sorted(path.name for path in old if old[path] != contents[path])
            assert len(contents) == 2 * min(3, i + 1)
            assert replaced == ["photo-comparison.png", "photo-restored.png"] * (i == 3), name
        Path("out/nf/b-restored.png").write_bytes(b"somebody's")
        os.rename("photo.bmp", "b.bmp")
        works(sample, "m.pt --image b.bmp")
        assert Path("out/nf/b-restored.png").read_bytes() == b"somebody's"
        with contextlib.chdir("other"):
            works(sample, "../m.pt --image photo.png --out ../out")
        path = Path("out/nf/photo-restored.png").resolve()
        assert path.read_bytes() == contents[Path("out/nf/photo-restored.png")]


def test_grey_photographs_stay_grey_and_large_ones_large():
    grey, wide = bytes_((28, 28)), bytes_((40, 2001, 3))
    with folder():
        save_field(channels=1, path="grey.pt", side=28)
        save_field()
        save_png("grey.png", grey)
        save_png("photo.png", wide)
        save_png("mask.png", 255 * (np.arange(40 * 2001).reshape(40, 2001) == 5000))
        for model in ("m.pt", "grey.pt"):
            works(sample, f"{model} --image grey.png")
            image = pixels_of("out/nf/grey-restored.png")
            assert image.shape == (28, 28) and (image == grey).mean() >= 0.19
        _, image = restored("photo.png --mask mask.png")
        assert image.shape == wide.shape and (image != wide).any(2).sum() <= 1
        height, width, _ = pixels_of("out/nf/photo-comparison.png").shape
        assert width < 2 * 700  # for the eye a third of its size, with all rows
        assert height == 24 + math.ceil(40 / 3) + 6


def test_the_middle_of_a_photograph_is_sampled():
    with folder(), spied(sample, "image_grid") as drawn:
        save_field()
        save_png("photo.png", photograph()[0])
        out = works(sample, "m.pt --image photo.png --size 32 --steps 2 --samples 2 --gif")
        square = data.square_picture(data.open_picture("photo.png"), 3, 32)
        assert "photo.png: 1 images, 204 pixels given" in out
        assert not Path("out/nf/photo-restored.png").exists()
        refused(sample, "m.pt --image photo.png --size 33", "3 x 32 x 32", "(3, 33, 33)")
    close(drawn[0][0][0][0][4], square / 255, 1e-6)


def test_transparent_pixels_of_a_sampled_picture_are_neither_given_nor_measured():
    """They are grey in all images that are compared, so that no figure counts them."""
    alpha = np.repeat([127, 255], 512).reshape(32, 32)
    colours = bytes_((32, 32, 3))
    with folder(), spied(sample, "image_grid") as drawn:
        save_field()
        save_png("sprite.png", colours, alpha)
        line = "m.pt --image sprite.png --size 32 --steps 2"
        for flags, measured in (("", 204), ("--full", 512 - 204)):
            assert f"204 pixels given, {measured} measured" in works(sample, f"{line} {flags}")
        refused(sample, f"{line} --pixels anywhere", "512", "transparent")
        alpha[:26] = 0  # 192 pixels are left, fewer than are given
        save_png("sprite.png", colours, alpha)
        refused(sample, line, "832", "transparent")
    for (((*images, _),), _), _ in drawn:
        images = torch.stack(images)
        close(images[:, :, :16], 0.5, 0)
        close(images[-1, :, 16:], colours[16:].transpose(2, 0, 1) / 255, 1e-6)


def test_photographs_that_cannot_be_restored_leave_the_last_result():
    photo, hole = photograph()
    with folder():
        save_field()
        for name, planes in dict(photo=photo, dot=photo[:1, :1], nothing=np.zeros((50, 50, 4)),
                                 black=0 * hole).items():
            save_png(f"{name}.png", planes)
        _, before = restored("photo.png")
        Path("cut.png").write_bytes(Path("photo.png").read_bytes()[:90])
        for flags, word in (
                ("photo.png --mask dot.png", "same size"),
                ("photo.png --mask black.png", "no pixel is missing"),
                ("cut.png", "cut.png"),
                ("nothing.png", "no pixel"),
                ("none.png", "none.png"),
                (".", "picture"),
                ("dot.png", "no pixel of the")):
            refused(sample, f"m.pt --image {flags}", word)
        Path("out/nf/photo-comparison.png").unlink()
        os.mkdir("out/nf/photo-comparison.png")  # cannot be replaced
        refused(sample, "m.pt --image photo.png --seed 3")
        assert np.array_equal(pixels_of("out/nf/photo-restored.png"), before)


def test_both_pictures_of_a_photograph_are_written_or_none():
    class Full(io.StringIO):
        def write(self, text):
            super().write(text)
            if stop in self.getvalue():
                raise OSError("no space left")

    with folder():
        save_field()
        save_png("photo.png", bytes_((8, 8, 3)))
        for stop, written in (("dB", 0), ("picture:", 2), ("hidden", 2)):
            shutil.rmtree("out", ignore_errors=True)
            with patched(sys, stdout=Full()):
                raises(OSError, lambda: sample.main(["m.pt", "--image", "photo.png"]), "space")
            assert len(files_in(Path("out"))) == written, stop


def test_the_shipped_model_is_better_than_kriging():
    model, checkpoint = sample.load_checkpoint(sample.SHIPPED)
    sched = schedule.DiffusionSchedule(**checkpoint["schedule"])
    table = sample.evaluate_field(model, sched, leaves(24))
    assert table["one-step mean"]["psnr"] > table["kriging"]["psnr"] + 0.2, table
    assert sample.SHIPPED.stat().st_size < 8_000_000


def test_a_folder_of_pictures_trains_both_models_on_every_device():
    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.mps.is_available()
    with folder():
        os.mkdir("photos")
        for i, image in enumerate(leaves(30)):
            data.to_picture(image / 255).save(f"photos/{i}.png")
        for device, (model, size) in itertools.product(devices, (("nf", 4), ("dae", 8))):
            out = works(train, f"--model {model} --data photos --steps 1 --batch-size {size} "
                               f"--evaluate 1 --device {device}")
            assert "photos" in out and f"| {device}, processes: 1, threads: " in out
            line = f"out/{model}/checkpoint.pt --evaluate 1 --device {device}"
            line += " --steps 2" if model == "nf" else ""
            assert "notice" not in works(sample, line)
        os.unlink("photos/7.png")
        assert f"notice: {Path('photos').resolve()} has other pictures" in works(sample, line)
        older = checkpoint_of("out/dae")
        del older["settings"]["test_images"]  # before there were checksums
        torch.save(older, "older.pt")
        assert "has other pictures" in works(sample, "older.pt --evaluate 1")
        for place in ("photos", Path("photos").resolve()):
            assert "notice" not in works(sample, f"{line} --data {place}")
        for i in range(20, 30):
            os.unlink(f"photos/{i}.png")
        data.to_picture(leaves(1)[0] / 255).save("photos/7.png")
        works(train, "--parts gaussian --data photos")  # 20 pictures, fewer than a batch
        refused(train, "--parts unet --data photos", "--batch-size 32 is more than 18 images")


def test_bad_input_gets_one_line_and_an_exit_code():
    class Evil:  # code in a checkpoint, which must not run
        def __reduce__(self):
            return os.mkdir, ("evil",)

    with tiny_sets():
        for name in ("junk.pt", "photo.png"):
            Path(name).write_bytes(b"junk")
        Path("empty.pt").write_bytes(b"")
        shipped = torch.load(sample.SHIPPED)
        for name, content in dict(
                odd={"kind": "nf"}, list=[1, 2], evil={"kind": "nf", "config": Evil()},
                alien=shipped | {"kind": "../alien"}, alien2=shipped | {"schedule": None}).items():
            torch.save(content, f"{name}.pt")
        raises(FileNotFoundError, lambda: sample.load_checkpoint("none.pt"), "none.pt")
        for name in ("junk", "empty", "odd", "list", "evil", "alien", "alien2", "none"):
            refused(sample, f"{name}.pt", f"{name}.pt")
        assert not Path("evil").exists()
        for module, lines in (  # exit code 1: one line, "error: ..."
                (train, """--model dae --data cifar10 --batch-size 8: 784
                    --batch-size 990 --data cifar10: --batch-size 990
                    --batch-size 3 --data cifar10: multiple of 2
                    --resume --data cifar10: No such file or directory: 'out/nf/checkpoint.pt'
                    --device warp: --device warp
                    --data imagenet: imagenet
                    --model dae --noise masking --noise-param 7 --data mnist --batch-size 8: got 7
                    --model dae --noise-param nan --data mnist --batch-size 8: got nan
                    --parts gaussian --resume --data cifar10: out/nf/checkpoint.pt"""),
                (sample, f"""--device warp: --device warp
                    --device meta: --device meta
                    {sample.SHIPPED} --image photo.png: photo.png
                    {sample.SHIPPED} --data mnist: (1, 28, 28)"""),
                (autoencoder, "--exercise types --data cifar10: 784"),
                (data, "--data nowhere: nowhere"),
                (schedule, "--timesteps 0: got 0\n--timesteps 10000000000: got 10000000000")):
            for line in lines.split("\n"):
                refused(module, *line.split(": ", 1))
        with patched(sample, SHIPPED=Path("none.pt")):
            refused(sample, "", "no checkpoint below out:", "train.py")
        for module, lines in (  # exit code 2, from argparse
                (sample, "--eta 2 | --eta -1 | --eta nan | --scale 0 | --scale 17 | --seed -1 | "
                         "--evaluate 0 | --samples 1 | --steps 0 | --steps 1001 | "
                         "--input-ratio 1.1 | --input-ratio nan | "
                         "--size 32 | --size 65 | --mask x.png | --pixels odd | "
                         "--image x.png --gif | --image x.png --size 32 --mask x.png | "
                         "--image x.png --steps 5 | --image x.png --pixels grid | "
                         "--image x.png --mask x.png --full | --image x.png --input-ratio 1.5 | "
                         "--image x.png --evaluate | --image x.png --data mnist | "
                         "--image x.png --mask x.png --seed 1 | --export x.pt --evaluate | "
                         "--image x.png --mask x.png --input-ratio 0.3 | --export x.pt --gif | "
                         "--export x.pt --json x.json | --export x.pt --image x.png"),
                (train, "--model nope | --steps 0 | --steps -1 | --steps x | --epochs 0 | --lr 0 | "
                        "--lr nan | --steps 5 --epochs 5 | --seed -1 | --parts nose | --parts | "
                        "--batch-size 0 | --evaluate 0 | --size huge | --noise fog | "
                        "--model dae --noise mixed --noise-param 1 | --noise masking | "
                        "--model dae --noise mixed --noise-param 0 | "
                        "--model ae --noise masking | --model dae --parts unet | "
                        "--parts unet --num-latents 9 | --lr 1e39 | "
                        "--model dae --beta-schedule linear | --model ae --pixels anywhere | "
                        "--steps 99999999999 | --model ae --size full | "
                        "--model ae --noise-param 1"),
                (autoencoder, "--seeds 0 | --epochs 0 | --batch-size 0 | --exercise nope"),
                (noise, "--nope"),
                (sample, "--seed x | --seed 99999999999999999999")):
            for line in lines.split(" | "):
                code, _, err = run(module, line)
                assert code == 2 and "error: " in err.splitlines()[-1], (module, line, err)
        assert "must be between 0 and 1, got 2" in run(sample, "--eta 2")[2]
    process = subprocess.run([sys.executable, HERE / "sample.py", "none.pt"],
                             capture_output=True, text=True)
    assert process.returncode == 1 and process.stderr.count("\n") == 1, process.stderr
    assert process.stderr.startswith("error: ")


def test_help_shows_the_docstring_as_it_is():
    for module in (data, noise, schedule, autoencoder, sample, train):
        assert module.__doc__.strip() in works(module, "--help")


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
