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
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
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
nf_denoiser.SIZES["small"] = dict(num_latents=8, latent_dim=32, num_fourier_feats=8, num_blocks=1,
                                  num_heads=2, dropout=0.5, widths=(8, 8))  # in this process


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


@contextlib.contextmanager
def tiny_sets(place="data"):
    """A folder with 80 + 32 images in the CIFAR-10 format and 320 + 64 in that of MNIST in it."""
    with folder() as root:
        cifar, mnist = root / place / "cifar-10-batches-bin", root / place / "MNIST/raw"
        cifar.mkdir(parents=True)
        mnist.mkdir(parents=True)
        images = data.make_leaves(112, 11)[0].flatten(1).numpy()
        rows = np.concatenate([np.zeros((112, 1), np.uint8), images], 1)
        names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
        for name, part in zip(names, np.split(rows, [16, 32, 48, 64, 80])):
            (cifar / name).write_bytes(part.tobytes())
        images, labels = (x.numpy() for x in data.make_glyphs(384, 11))
        for prefix, part in (("train", slice(320)), ("t10k", slice(320, None))):
            (mnist / f"{prefix}-images-idx3-ubyte").write_bytes(idx(images[part, 0]))
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


# -------------------------------------------------------------------------------------- schedule


def test_schedule_constants_and_timesteps_against_numpy():
    f = lambda t: math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2
    cosine = [min(max(1 - f(t + 1) / f(t), 0.0001), 0.9999) for t in range(1000)]
    for name, make, beta in (
            ("linear", schedule.linear_beta_schedule, np.linspace(0.0001, 0.02, 1000)),
            ("cosine", schedule.cosine_beta_schedule, np.array(cosine))):
        s, bar = schedule.DiffusionSchedule(1000, name), np.cumprod(1 - beta)
        prev = np.append(1, bar[:-1])
        var = beta * (1 - prev) / (1 - bar)
        for key, value in dict(
                betas=beta, alphas=1 - beta, alphas_cumprod=bar, alphas_cumprod_prev=prev,
                sqrt_alphas_cumprod=bar**0.5, sqrt_one_minus_alphas_cumprod=(1 - bar) ** 0.5,
                sqrt_recip_alphas_cumprod=bar**-0.5, posterior_variance=var,
                sqrt_recipm1_alphas_cumprod=(1 / bar - 1) ** 0.5).items():
            assert np.allclose(getattr(s, key), value, 1e-8, 1e-13), key
            assert getattr(s, key).dtype == torch.float64, key
        assert np.allclose(s.posterior_log_variance[1:], np.log(var[1:]), 1e-8)
        assert s.posterior_log_variance.isfinite().all() and len(make(10_000)) == 10_000
        close(make(1000), beta, 1e-12)
        for wrong in (0, -3, 10_001):
            raises(ValueError, lambda: make(wrong), f"got {wrong}")
    assert torch.equal(schedule.DiffusionSchedule(1000).betas, s.betas)  # cosine by default
    raises(ValueError, lambda: schedule.linear_beta_schedule(10, 0.1, 1), 0.1)
    raises(ValueError, lambda: schedule.DiffusionSchedule(10, "sqrt"), "sqrt")
    moved = [v for v in vars(s.to("meta")).values() if isinstance(v, torch.Tensor)]
    assert s.to("meta") is s and len(moved) == 10 and all(v.is_meta for v in moved)
    s = schedule.DiffusionSchedule(37)
    for n in range(1, 38):
        close(s.timesteps(n), np.linspace(36, 0, n), 0.5)
        assert s.timesteps(n).dtype == torch.int64 and (s.timesteps(n).diff() < 0).all()
    for n in (0, 38, -1):
        raises(ValueError, lambda: s.timesteps(n), 37, n)


def test_steps_take_one_timestep_or_one_for_each_item_and_keep_the_dtype():
    s, t = schedule.DiffusionSchedule(100), torch.tensor([3, 50, 99])
    for call in (lambda x, x_0, t, eps: s.q_sample(x_0, t, eps),
                 lambda x, x_0, t, eps: s.predict_eps(x, t, x_0),
                 lambda x, x_0, t, eps: s.ddim_step(x, x_0, t, t - 2, 0.7, eps),
                 lambda x, x_0, t, eps: s.ddpm_step(x, x_0, t, eps)):
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-11)):
            x, x_0, eps = torch.randn(3, 3, 5, 2, generator=seeded(), dtype=dtype)
            batch = call(x, x_0, t, eps)
            one = [call(x[i], x_0[i], int(t[i]), eps[i]) for i in range(3)]
            close(batch, torch.stack(one), tolerance)
            assert batch.dtype == one[0].dtype == dtype
        for wrong in (-1, 100):
            raises(IndexError, lambda: call(x, x_0, wrong, eps), 100)
    raises(IndexError, lambda: s.ddim_step(x, x_0, 5, -2))


def test_ddpm_posterior_against_brute_force_bayes():
    """q(x_{t-1} | x_t, x_0): q(x_t | x_{t-1}) q(x_{t-1} | x_0), integrated on a fine grid."""
    s, betas = schedule.DiffusionSchedule(50), schedule.cosine_beta_schedule(50).numpy()
    bars, grid, one = np.cumprod(1 - betas), np.linspace(-8, 8, 200_001), torch.ones(1).double()
    for t, x_0, x_t in ((1, 0.5, 0.2), (10, -0.8, 1.1), (30, 0.3, -1.7), (48, 0.9, 0.4)):
        p = np.exp(-((x_t - math.sqrt(1 - betas[t]) * grid) ** 2) / (2 * betas[t])
                   - (grid - math.sqrt(bars[t - 1]) * x_0) ** 2 / (2 * (1 - bars[t - 1])))
        mean = (p * grid).sum() / p.sum()
        std = math.sqrt((p * (grid - mean) ** 2).sum() / p.sum())
        for eps in (0, 1):
            close(s.ddpm_step(x_t * one, x_0 * one, t, eps * one), mean + eps * std, 1e-6)
    close(s.ddpm_step(x_t * one, 0.9 * one, 0), 0.9, 1e-9)  # the last step has no noise


def test_every_ddim_step_keeps_the_marginal_and_eta_1_is_ddpm():
    for name in ("cosine", "linear"):
        s = schedule.DiffusionSchedule(100, name)
        x_t, x_0, eps = torch.randn(3, 50, generator=seeded(1), dtype=torch.float64)
        for t in (0, 1, 2, 40, 98, 99):
            close(s.ddim_step(x_t, x_0, t, t - 1, 1.0, eps), s.ddpm_step(x_t, x_0, t, eps), 1e-9)
            noisy, still = (s.ddim_step(x_t, x_0, t, t - 1, 0.5, k * eps) for k in (1, 0))
            close(noisy - still, 0.5 * s.posterior_variance[t].sqrt() * eps, 1e-9)
            jump, still = (s.ddim_step(x_t, x_0, t, t // 2 - 1, 0.5, k * eps) for k in (1, 0))
            bars = s.alphas_cumprod[t], s.alphas_cumprod_prev[t // 2]
            sigma = 0.5 * ((1 - bars[1]) / (1 - bars[0]) * (1 - bars[0] / bars[1])).sqrt()  # eq. 16
            close(jump - still, sigma * eps, 1e-9)
            bar = s.alphas_cumprod[t]
            close(s.q_sample(x_0, t, eps), bar**0.5 * x_0 + (1 - bar) ** 0.5 * eps, 1e-12)
            close(s.predict_eps(s.q_sample(x_0, t, eps), t, x_0), eps, 1e-9)
    x_0, eps, new = torch.randn(3, 200_000, generator=seeded(2))
    x_t, bar = s.q_sample(x_0, 70, eps), s.alphas_cumprod[30]
    for eta in (0.0, 0.5, 1.0):  # given the true x_0: mean and variance of q(x_30 | x_0)
        step, drawn = s.ddim_step(x_t, x_0, 70, 30, eta, new), s.ddim_step(x_t, x_0, 70, 30, eta)
        for rest in (step - bar.sqrt() * x_0, drawn - bar.sqrt() * x_0):
            close(rest.var(), 1 - bar, 0.006)
        assert torch.equal(step, drawn) == (eta == 0)
        close(s.ddim_step(x_t, x_0, 70, -1, eta, new), x_0, 1e-6)
    draws = [s.ddpm_step(x_t, x_0, 70) for _ in range(2)]
    close((draws[0] - draws[1]).var(), 2 * s.posterior_variance[70], 0.001)


# ----------------------------------------------------------------------------------------- noise

SIMPLE = (noise.add_gaussian_noise, noise.add_salt_pepper_noise, noise.add_masking_noise)


def test_noise_statistics():
    g, grey = seeded(), torch.full((100, 3, 40, 40), 0.5)
    share = lambda y: [(y == value).double().mean() for value in (0, 0.5, 1)]
    gaussian = noise.add_gaussian_noise(grey, 0.1, g) - grey
    close(gaussian.mean(), 0, 0.001)
    close(gaussian.std(), 0.1, 0.001)
    half = math.erfc(0.25 / math.sqrt(2)) / 2  # how often a normal exceeds 0.25: clamped to 1
    close(share(noise.add_gaussian_noise(grey, 2.0, g)), [half, 0, half], 0.004)
    close(share(noise.add_salt_pepper_noise(grey, 0.2, g)), [0.1, 0.8, 0.1], 0.004)
    close(share(noise.add_masking_noise(grey, 0.3, g)), [0.3, 0.7, 0], 0.004)
    each = torch.tensor([0.0, 0.2, 1.0]).view(3, 1, 1, 1)  # a strength for each image
    for add, right in zip(SIMPLE, ([0, 0.2, 0.42], [0, 0.224, 0.5], [0, 0.2, 0])):
        close(add(grey[:3], each, g).std((1, 2, 3)), right, 0.015)
    for add, (_, strength) in zip(SIMPLE, noise.NOISES.values()):
        assert torch.equal(add(grey, generator=seeded()), add(grey, strength, seeded()))
        y, single = add(grey, 0.4, seeded()), add(grey[0], 0.4, seeded())
        same = torch.equal(y, y[:, :1].expand_as(y))  # a pixel's channels are spoilt together
        assert same == (add != SIMPLE[0]) and not torch.equal(y[0], y[1])
        for dim in range(3):  # in any other shape every value is spoilt on its own
            assert single.unique(dim=dim).shape == (3, 40, 40)


def test_mixed_noise_gives_each_image_a_kind_and_a_strength():
    y = noise.add_mixed_noise(torch.full((1500, 1, 32, 32), 0.5), seeded()).flatten(1)
    hit, salt = (y != 0.5).float().mean(1), (y == 1).float().mean(1)
    spread = (y - 0.5).abs().median(1).values / 0.67449  # of a normal; the clamp does not reach it
    gaussian, level = hit > 0.9, torch.tensor([0.03, 0.25, 0.5, 0.75, 0.97])
    for chosen, strength, low, high in ((gaussian, spread, 0.1, 0.5),
                                        (~gaussian & (salt > 0), hit, 0.05, 0.4),
                                        (~gaussian & (salt == 0), hit, 0.1, 0.6)):
        close(chosen.double().mean(), 1 / 3, 0.04)  # and the quantiles of a uniform distribution:
        close(strength[chosen].quantile(level), low + (high - low) * level, 0.035)


def test_noise_leaves_its_input_alone_obeys_its_seed_and_refuses_nonsense():
    for x in (torch.rand(16, 1, 28, 28), torch.rand(4, 50).double()):
        before = x.clone()
        for add in (*SIMPLE, noise.add_mixed_noise):
            a, b, c = (add(x, generator=seeded(seed)) for seed in (1, 1, 2))
            assert torch.equal(x, before) and torch.equal(a, b) and not torch.equal(a, c)
            assert a.shape == x.shape and a.dtype == x.dtype and a.min() >= 0 and a.max() <= 1
            raises(ValueError, lambda: add((x * 255).byte()), "uint8")
    for add, high in zip(SIMPLE, (math.inf, 1.5, 1.01)):
        assert torch.equal(add(x, 0.0), x)
        for wrong in (-0.1, math.nan, high, torch.tensor(-0.1)):
            raises(ValueError, lambda: add(x, wrong), "must be 0 to")
    raises(ValueError, lambda: noise.add_mixed_noise(x[0]), "batch")


# ------------------------------------------------------------------------------------------ data


def bytes_(shape, high=256, seed=0):
    return np.random.default_rng(seed).integers(0, high, shape, dtype=np.uint8)


def records(count):
    return np.concatenate([bytes_((count, 1), 10), bytes_((count, 3072))], axis=1).tobytes()


def idx(array):
    return np.array([0x800 + array.ndim, *array.shape], ">u4").tobytes() + array.tobytes()


def write_mnist(raw, images=bytes_((6, 28, 28), 5), labels=bytes_(6, 10)):
    raw.mkdir(parents=True, exist_ok=True)
    paths = [raw / f"t10k-{name}-ubyte.gz" for name in ("images-idx3", "labels-idx1")]
    for path, array in zip(paths, (images, labels)):
        path.write_bytes(gzip.compress(idx(array)))
    return paths


def files_in(root):
    return [path for path in root.rglob("*") if not path.is_dir() or path.is_symlink()]


def test_cifar10_is_read_as_documented_and_damage_is_refused():
    with folder() as root:
        batches = root / "cifar-10-batches-bin"
        batches.mkdir()
        for i, path in enumerate([*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]):
            (batches / path).write_bytes(records(5)[i * 3073:][:3073] or records(2))
        made, path = np.frombuffer(records(5), np.uint8).reshape(5, 3073), batches / path
        images, labels = data.load_cifar10(root, train=True)
        assert np.array_equal(labels, made[:, 0]) and images.dtype == labels.dtype == torch.uint8
        assert images.shape == (5, 3, 32, 32) and np.array_equal(images.flatten(1), made[:, 1:])
        assert data.load_dataset("auto", root, False)[1].shape == (2, 3, 32, 32)
        for content in (b"", records(2)[:-1], records(2) + b"x", b"\x0a" + records(1)[1:],
                        records(1) * 10_001):
            path.write_bytes(content)  # "auto" does not paper over it
            raises(ValueError, lambda: data.load_dataset("auto", root, False), path, "expected")


def test_mnist_is_read_as_documented_and_damage_is_refused():
    bomb = gzip.compress(bytes(60_000_000), 1)
    with folder() as root:
        load, raw = lambda: data.load_dataset("auto", root, False, "mnist"), root / "MNIST" / "raw"
        image_file, label_file = write_mnist(raw)
        images, packed = bytes_((6, 28, 28), 5), image_file.read_bytes()
        plain = idx(images)
        flipped = packed[:900] + b"????" + packed[904:]
        for content in (b"", b"none", packed[:-20], flipped, bomb, *map(
                gzip.compress, (b"", plain[:-1], plain + b"x", b"\0\0\x0d\x03" + plain[4:],
                                plain[:9], idx(images[:0]), idx(images[:, 1:])))):
            image_file.write_bytes(content)
            raises(ValueError, load, image_file, "expected")
        for labels in (bytes_(5, 10), np.full(6, 10, np.uint8)):
            write_mnist(raw, labels=labels)
            raises(ValueError, load, "labels", len(labels), labels.max())
        label_file.write_bytes(bomb)
        image_file.unlink()
        image_file.with_suffix("").write_bytes(plain)  # not zipped
        tracemalloc.start()
        raises(ValueError, lambda: data.read_idx(label_file.with_suffix(""), ()), label_file)
        assert tracemalloc.get_traced_memory()[1] < 10e6  # refused without unpacking it
        tracemalloc.stop()
        label_file.write_bytes(gzip.compress(idx(bytes_(6, 10))))
        name, got, labels = load()
        assert name == "mnist" and got.shape == (6, 1, 28, 28) and np.array_equal(got[:, 0], images)
        assert np.array_equal(labels, bytes_(6, 10)) and got.dtype == labels.dtype == torch.uint8


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


def test_mnist_download_is_checked_and_leaves_nothing_half_done():
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

    with folder() as root:
        load = lambda: data.load_mnist(root / "d", train=False)
        sums = {path.name: hashlib.md5(path.read_bytes()).hexdigest()
                for path in write_mnist(root / "good")}
        write_mnist(root / "bad", bytes_((6, 28, 28), seed=1), bytes_(6, 10, seed=1))
        urls = [(root / name).as_uri() + "/" for name in ("missing", "bad", "good")]
        for some, accident, words in (
                (urls[2:], patched(urllib.request, urlopen=breaks_off), ["IncompleteRead"]),
                (urls[2:], patched(Path, write_bytes=disk_full), ["disk full"]),
                (urls[:2], contextlib.nullcontext(), ["MD5", "missing"])):
            with patched(data, MNIST_URLS=some, MNIST_MD5=sums), accident:
                raises(ConnectionError, load, *words)
            assert not files_in(root / "d")
        with patched(data, MNIST_URLS=urls, MNIST_MD5=sums):
            assert np.array_equal(load()[1], bytes_(6, 10)) and len(files_in(root / "d")) == 2


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


def test_built_in_sets():
    for name, make, *counts in (("leaves", data.make_leaves, 40, 30),
                                ("glyphs", data.make_glyphs, 900, 300)):
        with patched(data, BUILT_IN={name: (make, *counts)}):
            (_, a, labels), (_, b, _) = (data.load_dataset(name, "", t) for t in (True, False))
        seen, others = ({image.numpy().tobytes() for image in images} for images in (a, b))
        assert (len(seen), len(b)) == tuple(counts) and not seen & others  # all different
        assert a.dtype == labels.dtype == torch.uint8 and 30 < a.float().std() < 110
    with patched(data, BUILT_IN={name: (make, *counts)}):
        assert torch.equal(data.load_dataset(name, "", False)[1], b)  # the same in every call
    means = np.stack([a[labels == digit].double().mean(0).numpy().ravel() for digit in range(10)])
    upright = [Image.new("L", (28, 28)) for _ in range(10)]  # which the means are most like
    for digit, image in enumerate(upright):
        font = ImageFont.load_default(24)
        ImageDraw.Draw(image).text((14, 14), str(digit), 255, font, anchor="mm")
    like = np.corrcoef(means, np.stack(upright).reshape(10, -1))[:10, 10:]
    assert (like.argmax(1) == np.arange(10)).sum() >= 8, like.argmax(1)


def test_leaves_are_discs_of_the_stated_radii_and_tiles_are_cut_from_their_canvas():
    drawn, ellipse = [], ImageDraw.ImageDraw.ellipse

    def record(self, box, fill):
        drawn.append((*box, *fill, self.im.size[0]))
        ellipse(self, box, fill)
    with patched(ImageDraw.ImageDraw, ellipse=record):
        tiles = data.make_leaves(1024, seed=5)[0]  # 32 x 32 tiles of 32 x 32 pixels
    (x0, y0, x1, y1), fill = np.array(drawn).T[:4] * 1024 / drawn[0][-1], np.array(drawn)[:, 4:7]
    x, y, r = (x0 + x1) / 2, (y0 + y1) / 2, (x1 - x0) / 2
    u = np.sort((3**-2 - r**-2) / (3**-2 - 40**-2))  # the distribution function: uniform if r^-3
    assert abs(u - np.linspace(0, 1, len(u))).max() < 1.63 / len(u) ** 0.5  # Kolmogorov, 1 %
    close(u[[0, -1]], [0, 1], 0.001)
    assert np.allclose(y1 - y0, x1 - x0) and 3.5 < (math.pi * r**2).sum() / 1104**2 < 6
    for row, column in ((0, 0), (0, 1), (1, 1), (21, 28)):  # the last disc over a pixel is seen
        px, py = np.meshgrid(np.arange(32) + 32 * column + 0.5, np.arange(32) + 32 * row + 0.5)
        near = np.nonzero(np.hypot(x - px.mean(), y - py.mean()) < r + 23)[0]
        over = np.hypot(px[..., None] - x[near], py[..., None] - y[near]) < r[near]
        top = fill[near[over.shape[2] - 1 - over[..., ::-1].argmax(2)]].transpose(2, 0, 1)
        assert (tiles[32 * row + column].numpy() == top).mean() > 0.6


def test_pictures_of_every_kind_are_read_and_squared():
    with folder() as root:
        path, wide, square = root / "photo.tif", bytes_((20, 32, 3)), bytes_((32, 32, 3))
        for turn, right in ((2, np.fliplr(wide)), (3, np.rot90(wide, 2)), (6, np.rot90(wide, -1))):
            exif = Image.Exif()
            exif[0x0112] = turn
            Image.fromarray(wide).save(path.with_suffix(".png"), exif=exif)
            assert np.array_equal(data.open_picture(path.with_suffix(".png")), right), turn
        deep, plain = np.arange(1024, dtype=np.uint16).reshape(32, 32) * 64, Image.fromarray(square)
        palette, grey = plain.quantize(16), (square @ [0.299, 0.587, 0.114])[..., None]
        colours = np.reshape(palette.getpalette(), (-1, 3))[np.asarray(palette)]
        for image, right in ((plain, square), (plain.convert("RGBA"), square), (palette, colours),
                             (plain.convert("CMYK"), square), (plain, grey),
                             (Image.fromarray(deep), np.dstack([deep / 257] * 3))):
            image.save(path)
            got = data.square_picture(data.open_picture(path), right.shape[2], 32)
            close(got, right.transpose(2, 0, 1), 1)
        stripes = np.repeat(np.arange(3, dtype=np.uint8) * 100, 32)[None].repeat(32, 0)
        for side in (stripes, stripes.T):  # the middle is 100
            close(data.square_picture(Image.fromarray(side), 1, 32)[:, 4:-4, 4:-4], 100, 0)
        fine = Image.fromarray(bytes_((256, 256)))
        assert data.square_picture(fine, 1, 32).float().std() < 20  # averaged; if picked: 74
        for mode in ("RGB", "L", "RGBA", "P", "I;16"):
            for size in ((1, 1), (20_000, 3), (3, 20_000), (33, 31)):
                Image.new(mode, size).save(path)
                assert len(data.square_picture(data.open_picture(path), 3, 32)) == 3
        with patched(Image, MAX_IMAGE_PIXELS=500):  # Pillow refuses twice as many
            raises(ValueError, lambda: data.open_picture(path), path, "bomb")
        path.write_bytes(b"no picture")
        raises(ValueError, lambda: data.open_picture(path), path)


def test_a_folder_of_pictures_is_split_by_their_names():
    with folder() as root:
        names = [f"{'sub/' * (i % 2)}{i}.png" for i in range(200)]
        in_test = sorted(sorted(range(200), key=lambda i: zlib.crc32(names[i].encode()))[:20])
        (root / "a" / "sub").mkdir(parents=True)
        for i, name in enumerate(names):
            Image.new("RGB", (9, 5), (i, 7, 255 - i)).save(root / "a" / name)
        for name in ("notes.txt", "sub/broken.png"):
            (root / "a" / name).write_text("x")
        for place, for_training in (("a", True), ("a", False), ("b", False)):
            (root / "a").rename(root / place)
            with contextlib.redirect_stdout(io.StringIO()) as said:
                name, images, labels = data.load_dataset(str(root / place), root, for_training)
            assert said.getvalue().count("\n") == 1 and "2 of 202" in said.getvalue()
            assert name == str(root / place) and images.shape == (len(labels), 3, 32, 32)
            right = sorted(set(range(200)) - set(in_test)) if for_training else in_test
            assert sorted(images[:, 0, 0, 0].tolist()) == right
        grey = data.load_dataset(str(root / "b"), root, True, real="mnist")[1]
        assert grey.shape == (200 - len(in_test), 1, 28, 28) and grey.dtype == torch.uint8
        for name in names[20:]:
            (root / "b" / name).unlink()
        assert len(data.load_dataset(str(root / "b"), root, False)[1]) == 2
        (root / "b" / names[0]).unlink()
        raises(ValueError, lambda: data.load_dataset(str(root / "b"), root, True), "19", "20")


def test_sparse_split_against_numpy():
    images, order = torch.from_numpy(bytes_((40, 3, 6, 9))), torch.rand(40, 54, generator=seeded())
    s, ranks = data.sparse_split(images, 0.25, 0.4, order=order), order.numpy().argsort(1)
    plain = images.numpy().reshape(40, 3, 54) / 127.5 - 1
    for side, index in (("input", ranks[:, :13]), ("output", ranks[:, 13:34])):
        assert np.array_equal(s[f"{side}_indices"], index)
        close(s[f"{side}_coords"], np.stack([index % 9 / 8, index // 9 / 5], -1), 1e-6)
        values = np.take_along_axis(plain, index[:, None], 2).transpose(0, 2, 1)
        close(s[f"{side}_values"], values, 1e-6)
    close(s["full_image"].flatten(2), plain, 1e-6)
    big = torch.rand(60, 1, 32, 32, generator=seeded())
    a, b, c = (data.sparse_split(big, generator=seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(a["full_image"], big) and a["input_coords"].shape == (60, 204, 2)
    assert torch.equal(a["output_indices"], b["output_indices"])
    assert not torch.equal(a["input_indices"], c["input_indices"])
    chosen = torch.cat([a["input_indices"], a["output_indices"]], 1)
    assert all(len(set(row)) == 408 for row in chosen.tolist())  # never the same pixel twice
    assert data.sparse_split(big, 0.2, None)["output_indices"].shape == (60, 820)
    for ratios in ((0, 0.2), (0.2, 0), (0.6, 0.5), (-0.1, 0.2), (0.0001, 0.2), (0.2, 1.1), (1, 0),
                   (math.nan, 0.2), (0.2, math.inf)):
        raises(ValueError, lambda: data.sparse_split(images, *ratios), ratios[0])


def test_fixed_order_is_a_function_of_seed_image_and_pixel():
    for seed in (0, 1, 2**32 - 1):
        rows = [np.random.default_rng((seed, image)).random(784) for image in (299, 0, 7)]
        order = data.fixed_order(seed, torch.tensor([299, 0, 7]), 784)
        close(order, np.stack(rows), 1e-7)
        assert order.dtype == torch.float32


def test_a_red_pixel_stays_in_its_row_and_column():
    image = torch.zeros(1, 3, 5, 7)
    image[0, 2], image[0, :, 1, 4] = 1, torch.tensor([1.0, 0, 0])  # red in row 1, column 4
    s = data.sparse_split(image, 0.5, None, generator=seeded())
    part = sample.assemble(s)
    assert torch.equal(sample.assemble(s, s["output_values"]), image)
    assert (part != 0).any(1).sum() == 17  # of 35; the others are grey, 0
    green, grey = torch.tensor([0.0, 9, 0])[:, None, None].repeat(1, 5, 7), image[0, :1] * 0 + 0.5
    labels = dict(column_labels="ab", row_labels=["one", "two"], captions=[["x", "y"]] * 2)
    for more in ({}, labels):
        grid = np.asarray(data.image_grid([[image[0], green], [grey, image[0]]], zoom=3, **more))
        where = lambda *rgb: [(i.min(), i.max() + 1) for i in np.nonzero((grid == rgb).all(-1))]
        (top, bottom), (left, right) = where(0, 0, 255)  # of the whole grid
        assert where(255, 0, 0) == [(top + 3, bottom - 15 + 6), (left + 12, right - 21 + 15)]
        assert where(0, 255, 0) == [(top, top + 15), (right - 21, right)]
        assert (grid[bottom - 15:bottom, left:left + 21] == 128).all() and left + 42 <= right


def test_heat_is_black_red_yellow_white():
    error = torch.tensor([0, 1 / 6, -1 / 3, 0.5, -0.75, 1 / 12])[None, None]  # of the limit 0.5
    right = torch.tensor([[0, 1, 1, 1, 1, 0.5], [0, 0, 1, 1, 1, 0], [0, 0, 0, 1, 1, 0]])[:, None]
    close(data.heat(error), right, 1e-6)
    close(data.heat(torch.cat([2 * error, -4 * error, 0 * error]), limit=1.0), right, 1e-6)


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
            return [loaded["perceiver.latents"]], torch.zeros(1)

        for path, good, load, shape, least in (
                (zipped, zipped.read_bytes(), data.load_mnist, (1, 28, 28), 20),
                (plain, idx(bytes_((6, 28, 28))), data.load_mnist, (1, 28, 28), 20),
                (cifar, records(6), data.load_cifar10, (3, 32, 32), 20),
                (photo, photo.read_bytes(), load_photo, (3, 32, 32), 20),
                (saved, saved.read_bytes(), load_weights, (8, 32), 100)):
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


def test_files_that_work_alone():
    for line in ("noise.py", "schedule.py", "data.py --data glyphs", "nf_denoiser.py",
                 "autoencoder.py"):
        with folder():
            file, *flags = line.split()
            shutil.copy(HERE / file, ".")
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
    """x_t, output coordinates, t, input coordinates and values; all pixels on the 32 x 32 grid."""
    g = torch.Generator().manual_seed(seed)
    pixels = torch.rand(batch, 1024, generator=g).argsort(1)[:, :n_in + n_out]
    coords = torch.stack([pixels % 32, pixels // 32], -1) / 31
    return (torch.randn(batch, n_out, channels, generator=g), coords[:, n_in:],
            torch.randint(0, 1000, (batch,), generator=g), coords[:, :n_in],
            torch.rand(batch, n_in, channels, generator=g) * 2 - 1)


def test_fourier_features_and_time_embedding():
    features = nf_denoiser.FourierFeatures(5)
    angle = 2 * math.pi * (0.3 * features.B[0] + 0.9 * features.B[1])
    close(features(torch.tensor([0.3, 0.9])), torch.cat([angle.sin(), angle.cos()]), 1e-5)
    close(nf_denoiser.FourierFeatures(20_000).B.std(), 4, 0.1)
    embedding = nf_denoiser.SinusoidalTimeEmbedding(8)(torch.tensor([0, 7]))
    close(embedding[0], [0, 0, 0, 0, 1, 1, 1, 1], 0)
    close(embedding[1, [0, 4, 1]], [math.sin(7), math.cos(7), math.sin(0.7)], 1e-6)
    raises(ValueError, lambda: nf_denoiser.SinusoidalTimeEmbedding(7), 7)


def test_perceiver_written_out():
    """Attention is a softmax over the context, for each head; blocks add to what they are given."""
    torch.manual_seed(0)
    net = nf_denoiser.PerceiverIO(5, 6, 2, num_latents=4, latent_dim=16, num_blocks=2,
                                  num_heads=2).double().eval()

    def block(parts, x, context=None, bias=0):
        y, attention = parts.norm_x(x), parts.attention
        context = y if context is None else parts.norm_context(context)
        q, (k, v) = attention.to_q(y), attention.to_kv(context).chunk(2, -1)
        q, k, v = (z.unflatten(2, (2, 8)) for z in (q, k, v))  # two heads of eight numbers
        weights = (torch.einsum("bihd,bjhd->bhij", q, k) / 8**0.5 + bias).softmax(-1)
        x = x + attention.to_out(torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2))
        return x + parts.mlp(parts.norm_mlp(x))

    inputs, queries = torch.randn(2, 30, 5).double(), torch.randn(2, 20, 6).double()
    tokens, asking = net.embed_inputs(inputs), net.embed_queries(queries)
    bias = torch.tensor([-0.5, -3.0]).double().view(2, 1, 1)
    logits = torch.cat([torch.zeros(2, 1, 30), bias.expand(2, 1, 20)], 2)[:, None]
    # with a bias the latents read the queries, too
    for given, read, added in ((None, tokens, 0), (bias, torch.cat([tokens, asking], 1), logits)):
        x = block(net.encoder, net.latents.expand(2, -1, -1), read, added)
        for parts in net.processor:
            x = block(parts, x)
        expected = net.to_values(net.norm_out(block(net.decoder, asking, x)))
        close(net(inputs, queries, given), expected, 1e-12)
    raises(ValueError, lambda: nf_denoiser.PerceiverIO(5, 6, 2, latent_dim=32, num_heads=3), 32, 3)


def test_unet_written_out():
    torch.manual_seed(0)
    net, x = nf_denoiser.UNet(3, (4, 6, 8)).double(), torch.randn(2, 3, 8, 12).double()
    conv = lambda layer, x, **options: F.conv2d(x, layer.weight, layer.bias, **options)
    levels = [conv(net.first, x, padding=1)]
    for i in range(3):
        if i > 0:
            levels.append(conv(net.down[i - 1], levels[-1].relu(), padding=1, stride=2))
        levels[i] = levels[i] + conv(net.before[i], levels[i].relu(), padding=1)
    y = levels[2] + conv(net.bottom, levels[2].relu(), padding=1)
    for i in (1, 0):
        y = levels[i] + conv(net.up[i], y.relu()).repeat_interleave(2, 2).repeat_interleave(2, 3)
        y = y + conv(net.after[i], y.relu(), padding=1)
    close(net(x), y, 1e-12)


def numpy_field(K, inputs, x_in, outputs=None, x_t=None, bar=None):
    """Posterior mean image of one channel by a single dense solve over all observations."""
    n, mean = len(inputs), x_in.mean()
    y = np.linalg.solve(K[np.ix_(inputs, inputs)] + 1e-3 * np.eye(n), x_in - mean)
    variance = ((x_in - mean) @ y + 2 * 0.05) / (n + 2)
    seen, noise, value = inputs, np.full(n, 1e-3), x_in - mean
    if outputs is not None:
        seen = np.concatenate([inputs, outputs])
        noise = np.concatenate([noise, np.full(len(outputs), (1 - bar) / bar / variance)])
        value = np.concatenate([value, x_t / bar**0.5 - mean])
    weights = np.linalg.solve(K[np.ix_(seen, seen)] + np.diag(noise), value)
    return mean + K[:, seen] @ weights, variance


def test_gaussian_field_is_the_textbook_posterior():
    rng, side = np.random.default_rng(0), 12
    grid = np.stack(np.meshgrid(np.arange(side), np.arange(side)), -1).reshape(-1, 2) / (side - 1)
    distance = np.sqrt(((grid[:, None] - grid[None]) ** 2).sum(-1))
    K = np.exp(-distance / (16 / 31))
    close(nf_denoiser.exponential_covariance(side), K, 1e-6)
    field = nf_denoiser.GaussianField(torch.from_numpy(K))
    pixels = np.stack([rng.permutation(side**2)[:50] for _ in range(2)])
    pixels[0, 1], pixels[0, 31], pixels[1, 40] = pixels[0, 0], pixels[0, 30], pixels[1, 3]  # twice
    x_in, x_t = rng.normal(0, 0.4, (2, 30, 3)), rng.normal(0, 1, (2, 20, 3))
    inputs, outputs = torch.from_numpy(pixels[:, :30]), torch.from_numpy(pixels[:, 30:])
    bars = torch.tensor([0.9, 0.05]).double()
    clean, variance = field(inputs, torch.from_numpy(x_in))
    noisy, _ = field(inputs, torch.from_numpy(x_in), outputs, torch.from_numpy(x_t),
                     bars[:, None, None])
    for b in range(2):
        for c in range(3):
            expected, s2 = numpy_field(K, pixels[b, :30], x_in[b, :, c])
            close(clean[b, c], expected, 1e-9)
            close(variance[b, 0, c], s2, 1e-9)
            expected, _ = numpy_field(K, pixels[b, :30], x_in[b, :, c], pixels[b, 30:],
                                      x_t[b, :, c], bars[b].item())
            close(noisy[b, c], expected, 1e-7)


def test_pixel_covariance_is_numpys():
    images = data.make_leaves(1100, 3)[0][:, :, :8, :8].contiguous()
    x = images.double().numpy().reshape(3300, 64) / 127.5 - 1
    K = x.T @ x
    mirror = np.arange(64).reshape(8, 8)[:, ::-1].reshape(-1)
    K = K + K[mirror][:, mirror]
    close(nf_denoiser.pixel_covariance(images), K / np.diag(K).mean(), 1e-5)


def test_forward_by_hand():
    """What the networks are given, and mean + std * answer; pixels on the grid and beside it."""
    x_t, out, _, coords, values = random_problem(seed=1)
    t, offset = torch.tensor([100, 600]), torch.zeros(20, 1)
    offset[10:] = 0.4 / 31  # still nearest to the same pixel
    at = [(c * 31).round().long() @ torch.tensor([1, 32]) for c in (coords, out)]
    out, coords = out + offset, coords + 0.4 / 31
    assert out.max() > 1 and coords.max() > 1  # beyond the edge, so they are clamped
    bar = schedule.DiffusionSchedule().alphas_cumprod[t].float()[:, None, None]
    hand = np.array([[1, 1, 1], [1, 0, -1], [1, -2, 1]]) / np.sqrt([[3], [2], [6]])
    plane = lambda where, x: torch.zeros(2, x.shape[2], 1024).scatter(
        2, where[:, None].expand(-1, x.shape[2], -1), x.mT)
    read = lambda image: F.grid_sample(image, 2 * out.clamp(0, 1)[:, :, None] - 1,
                                       align_corners=True)[..., 0].mT
    for parts in (nf_denoiser.PARTS, ("unet", "perceiver")):
        model, seen = tiny_field(parts), []
        for layer in (model.unet_to_values, model.perceiver.to_values):
            torch.nn.init.normal_(layer.weight)
        for network in (model.unet, model.perceiver):
            network.register_forward_pre_hook(lambda _, given: seen.append(given))
        x_in, noisy = values @ model.colours, x_t @ model.colours
        close(model.colours, hand.T, 1e-6)
        with torch.no_grad():
            got = model(x_t, out, t, coords, values)
            (image,), (inputs, queries, bias) = seen
            if model.field:
                assert torch.equal(model.field.covariance, nf_denoiser.exponential_covariance(32))
                mean, variance = model.field(at[0], x_in, at[1], noisy, bar)
                picture, residual = mean - x_in.mean(1)[..., None], 0.07 * variance
                K, one = model.field.covariance.double().numpy(), lambda x: x[0, :, 0].numpy()
                close(mean[0, 0], numpy_field(K, at[0][0], one(x_in), at[1][0], one(noisy),
                                              bar[0].item())[0], 2e-3)
            else:  # the mean colour and one constant scale; the U-Net sees the pixels themselves
                mean = x_in.mean(1)[..., None].expand(2, 3, 1024)
                variance = residual = torch.full((2, 1, 3), 0.25)
                picture = plane(at[0], x_in) + plane(at[1], bar.sqrt() * noisy)
            close(image[:, :3].flatten(2), picture / variance.sqrt().mT, 1e-5)
            masks = plane(at[0], torch.ones(2, 30, 1)), plane(at[1], bar.expand(2, 20, 1))
            close(image[:, 3:5].flatten(2), torch.cat(masks, 1), 1e-6)
            close(image[:, 5], bar.sqrt().expand(2, 32, 32), 1e-6)
            features, time_ = read(model.unet(image)).relu(), model.embed_time(t)[:, None]
            close(inputs, torch.cat([model.fourier(coords.clamp(0, 1)), x_in,
                                     time_.expand(2, 30, 64)], 2), 1e-6)
            close(queries, torch.cat([model.fourier(out.clamp(0, 1)), bar.sqrt() * noisy,
                                      time_.expand(2, 20, 64), features], 2), 1e-5)
            close(bias, bar.log(), 1e-6)
            answer = model.unet_to_values(features) + model.perceiver(inputs, queries, bias)
        std = (residual * (1 - bar) / (bar * residual + 1 - bar)).sqrt()
        there = read(mean.unflatten(2, (32, 32)))
        exact = mean.gather(2, at[1][:, None].expand(2, 3, 20)).mT
        close(there[:, :10], exact[:, :10], 1e-5)  # the corners of the image are at 0 and 1
        close(got, (there + std * answer) @ model.colours.T, 1e-5)


def test_every_combination_of_parts_runs_and_every_weight_learns():
    x_t, out, t, coords, values = random_problem()
    names = nf_denoiser.PARTS
    for parts in [c for n in (1, 2, 3) for c in itertools.combinations(names, n)]:
        for channels in (1, 3):
            model = tiny_field(parts, channels, num_blocks=2).train()
            given = x_t[..., :channels], out, t, coords, values[..., :channels]
            y = model(*given)
            assert y.shape == (2, 20, channels) and torch.isfinite(y).all(), parts
            present = [name for name in names if getattr(model, name) is not None]
            assert present == [name for name in names if name in parts]
            if parts != ("field",):
                y.square().mean().backward()
                still = [name for name, p in model.named_parameters()
                         if p.grad is None or not p.grad.abs().max() > 0]
                assert not still, (parts, still)
            again = model.eval()(*given)
            assert torch.equal(y, again) == ("perceiver" not in parts)  # dropout
            with torch.autocast("cpu", torch.bfloat16):
                rounded = model(*given)
            assert rounded.dtype == torch.float32
            close(rounded, again, 0 if parts == ("field",) else 0.02)  # linear algebra is exact
    for bad in ((), ("field", "nose"), "field"):
        raises(ValueError, lambda: tiny_field(bad), "parts")
    raises(ValueError, lambda: tiny_field(side=33), 33)


def test_any_number_of_pixels_and_at_the_last_timestep_x_t_does_not_matter():
    model = tiny_field()
    torch.nn.init.normal_(model.perceiver.to_values.weight)
    with torch.no_grad():
        for n_in, n_out in ((1, 1), (1, 7), (50, 3), (204, 204), (30, 20)):
            x_t, out, t, coords, values = random_problem(3, n_in, n_out)
            y = model(x_t, out, t, coords, values)
            assert y.shape == (3, n_out, 3) and torch.isfinite(y).all()
        raises(ValueError, lambda: model(x_t, out, t, coords[:, :0], values[:, :0]), "at least one")
        raises(ValueError, lambda: model(x_t, out[:, :3], t, coords, values), "shapes")
        last = torch.full_like(t, 999)
        short = model(None, out, last, coords, values)
        close(model(x_t, out, last, coords, values), short, 2e-3)
        close(model(-3 * x_t, out, last, coords, values), short, 4e-3)
        close(model(None, out[:, :3], last, coords, values), short[:, :3], 1e-4)
        assert (model(x_t, out, last // 3, coords, values) - short).abs().max() > 0.05


# ------------------------------------------------------------------ samplers, metrics, evaluation


def test_samplers_recover_a_gaussian():
    """For data ~ N(mu, s2) the best x0-prediction is known; a right sampler returns mu and s2."""
    mu, s2, T = 0.4, 0.3, 500
    sched, g = schedule.DiffusionSchedule(T), torch.Generator().manual_seed(0)

    def exact(x_t, output_coords, t, input_coords, input_values):
        bar = sched.alphas_cumprod[t].view(-1, 1, 1).float()
        return mu + s2 * bar.sqrt() / (bar * s2 + 1 - bar) * (x_t - bar.sqrt() * mu)

    where = torch.zeros(4, 5000, 2), torch.zeros(4, 1, 2), torch.zeros(4, 1, 1)
    runs = {eta: schedule.ddim_sample(exact, sched, *where, num_steps=T, eta=eta, generator=g)
            for eta in (0.0, 0.5, 1.0)}
    runs["ddpm"] = schedule.ddpm_sample(exact, sched, *where, generator=g)
    runs["50 steps"] = schedule.ddim_sample(exact, sched, *where, num_steps=50, generator=g)
    for name, x in runs.items():
        loose = 2 if name == "50 steps" else 1
        assert abs(x.mean() - mu) < 0.015 * loose, f"{name}: mean {x.mean():.4f}, not {mu}"
        assert abs(x.var() - s2) < 0.015 * loose, f"{name}: variance {x.var():.4f}, not {s2}"
    raises(ValueError, lambda: schedule.ddim_sample(exact, sched, *where, eta=1.5), 1.5)


def test_samplers_written_out():
    """Both loops by hand: a timestep, then a step to the next lower one with noise of its own."""
    sched, asked, told = schedule.DiffusionSchedule(20), [], []
    where = torch.rand(2, 5, 2), torch.rand(2, 3, 2), torch.rand(2, 3, 1)

    def model(x_t, *given):
        asked.append(given)
        return 0.9 * x_t

    for steps, eta in ((4, 0.0), (4, 0.5), (20, 1.0), (20, "ddpm")):
        asked.clear()
        told.clear()
        draw, options = schedule.ddpm_sample, {}
        if eta != "ddpm":
            draw, options = schedule.ddim_sample, dict(num_steps=steps, eta=eta)
        got = draw(model, sched, *where, generator=seeded(), on_step=lambda *step:
                   told.append(step), **options)
        timesteps, g = sched.timesteps(steps).tolist(), seeded()
        assert len(told) == len(asked) == steps
        x_t = torch.randn(2, 5, 1, generator=g)
        for i, (t, t_next) in enumerate(zip(timesteps, [*timesteps[1:], -1])):
            assert told[i][0] == t and torch.equal(told[i][1], x_t)
            assert torch.equal(told[i][2], 0.9 * x_t) and asked[i][1].tolist() == [t, t]
            assert [asked[i][j] is x for j, x in zip((0, 2, 3), where)] == [True] * 3
            eps = torch.randn(2, 5, 1, generator=g)
            x_t = (sched.ddpm_step(x_t, 0.9 * x_t, t, eps) if eta == "ddpm" else
                   sched.ddim_step(x_t, 0.9 * x_t, t, t_next, eta, eps))
        assert torch.equal(got, x_t)


def test_psnr_and_ssim():
    close(sample.psnr(0.01), 20, 1e-9)
    assert sample.psnr(0) == 100
    a, b = torch.full((1, 1, 16, 16), 0.3), torch.full((1, 1, 16, 16), 0.7)
    close(sample.ssim(a, a), [1.0], 1e-9)
    close(sample.ssim(a, b), [(2 * 0.3 * 0.7 + 1e-4) / (0.09 + 0.49 + 1e-4)], 1e-6)
    x, y = torch.rand(2, 2, 3, 14, 13, generator=seeded()).double()
    w = np.exp(-((np.arange(11) - 5.0) ** 2) / 4.5)
    w = w[:, None] * w / w.sum() ** 2
    windows = np.lib.stride_tricks.sliding_window_view
    p, q = (windows(z[1].numpy(), (11, 11), (1, 2)) for z in (x, y))
    mean = lambda z: (w * z).sum((-1, -2))  # of each window
    mp, mq = mean(p), mean(q)
    vp, vq, cov = mean(p * p) - mp**2, mean(q * q) - mq**2, mean(p * q) - mp * mq
    scores = (2 * mp * mq + 1e-4) * (2 * cov + 9e-4) / ((mp**2 + mq**2 + 1e-4) * (vp + vq + 9e-4))
    close(sample.ssim(x, y)[1], scores.mean(), 1e-9)
    raises(ValueError, lambda: sample.ssim(a[..., :10], b[..., :10]), 11)


def test_classical_methods():
    coords, values = torch.tensor([[[0.0, 0.0], [1.0, 0.0]]]), torch.tensor([[[1.0], [3.0]]])
    query = torch.tensor([[[0.2, 0.0], [0.9, 0.1], [0.5, 0.7]]])
    split = dict(output_coords=query, input_coords=coords, input_values=values)
    close(sample.nearest(split), [[[1.0], [3.0], [1.0]]], 0)
    got = sample.inverse_distance(split, power=2)
    close(got[0, 0], [(1 / 0.04 + 3 / 0.64) / (1 / 0.04 + 1 / 0.64)], 1e-5)
    close(got[0, 2], [2.0], 1e-5)
    split["output_coords"] = torch.cat([query, coords], 1)
    got = sample.inverse_distance(split)  # power 4
    close(got[0, [0, 3, 4], 0], [(256 + 3) / (256 + 1), 1, 3], 1e-5)
    split = data.sparse_split(data.make_leaves(1, 3)[0], 0.1, None)
    K = nf_denoiser.exponential_covariance(32).double().numpy()
    x_in = split["input_values"][0, :, 1].double().numpy()
    image, _ = numpy_field(K, split["input_indices"][0].numpy(), x_in)
    close(sample.kriging(split)[0, :, 1], image[split["output_indices"][0].numpy()], 1e-3)


def sampler(sched, seed=0, **options):
    g = seeded(seed)
    return functools.partial(schedule.ddim_sample, schedule=sched, generator=g, **options)


def test_every_column_of_the_table_worked_out_again():
    images, sched, asked = data.make_leaves(5, 7)[0], schedule.DiffusionSchedule(20), []
    answer = lambda coords: torch.cat([coords, coords[..., :1]], 2) * 3 - 1  # partly above 1

    def spy(*given):
        asked.append(given)
        return answer(given[1])

    draw = sampler(sched, num_steps=2)
    table = sample.evaluate_field(spy, sched, images, draw, seed=3, batch=2)
    assert list(table) == ["one-step mean", "sample", "kriging", "inverse distance", "nearest"]
    split = data.sparse_split(images, 0.2, None, order=data.fixed_order(3, torch.arange(5), 1024))
    coords, places, truth = split["output_coords"], split["output_indices"], split["full_image"]
    plain, mirrored = answer(coords), coords * torch.tensor([-1.0, 1]) + torch.tensor([1.0, 0])
    mean = (plain + answer(mirrored)) / 2
    answers = {"one-step mean": mean, "sample": torch.cat([plain[:, :204], mean[:, 204:]], 1),
               "kriging": sample.kriging(split), "nearest": sample.nearest(split),
               "inverse distance": sample.inverse_distance(split)}
    for name, values in answers.items():
        index = places[:, None].expand(-1, 3, -1)
        image = truth.flatten(2).scatter(2, index, values.clamp(-1, 1).mT).view_as(truth)
        measured = places[:, None, :204].expand(-1, 3, -1)
        error = (image - truth).flatten(2).gather(2, measured).double() / 2
        row = table[name]
        close(row["mse"], error.square().mean(), 1e-6)
        close(row["mae"], error.abs().mean(), 1e-6)
        close(row["psnr"], -10 * error.square().mean().log10(), 1e-3)
        close(row["ssim"], sample.ssim(image / 2 + 0.5, truth / 2 + 0.5).mean(), 1e-5)
    # The input pixels are given as they are, and the rest of the image sees the sample.
    asked.clear()
    split = sample.split_images(images, torch.arange(5), 3)
    image = sample.reconstruct(spy, sched, split, draw)["sample"]
    given = split["input_values"]
    assert split["n_out"] == 204 and all(torch.equal(c[4][:, :204], given) for c in asked)
    rest = asked[4]
    assert [call[0] is None for call in asked] == [1, 1, 0, 0, 1, 1] and (rest[2] == 19).all()
    assert rest[1].shape[1] == 616 and rest[3].shape[1] == 408
    close(rest[4][:, 204:], answer(coords[:, :204]).clamp(-1, 1), 1e-6)
    chosen = split["input_indices"][:, None].expand(-1, 3, -1)
    assert torch.equal(image.flatten(2).gather(2, chosen), truth.flatten(2).gather(2, chosen))
    asked.clear()
    split = sample.split_images(images, torch.arange(5), 3, full=True)
    sample.reconstruct(spy, sched, split, functools.partial(schedule.ddpm_sample, schedule=sched))
    assert split["n_out"] == 820 and len(asked) == 2 + 20  # all timesteps, all pixels
    assert "sample" not in sample.reconstruct(spy, sched, split)


def test_coverage_of_an_exact_sampler():
    """With an exact model of data ~ N(0, s2) samples and truth are alike."""
    sched, s2 = schedule.DiffusionSchedule(), 0.09

    def exact(x_t, output_coords, t, input_coords, input_values):
        bar = sched.alphas_cumprod[t].view(-1, 1, 1).float()
        x_t = torch.zeros(*output_coords.shape[:2], 3) if x_t is None else x_t
        return s2 * bar.sqrt() / (bar * s2 + 1 - bar) * x_t

    images = torch.randn(6, 3, 32, 32, generator=seeded()) * s2**0.5
    evaluate = lambda model, *given, **more: sample.evaluate_samples(model, sched, *given, **more)
    figures, rows = evaluate(exact, images, sampler(sched, num_steps=200), 32)
    assert abs(figures["coverage"] - 29 / 33) < 0.02, figures  # 29 of the 33 ranks are inside
    assert abs(figures["spread"] - 0.15) < 0.005, figures
    close(figures["psnr_mean"], -10 * math.log10(0.15**2 * 33 / 32), 0.2)
    assert len(rows) == 4
    model = lambda *given: exact(*given) * (1 + 1e-4 * given[3].shape[1])  # sees the input
    few = [evaluate(model, images[:1], sampler(sched, num_steps=5), 4, input_ratio=ratio)
           for ratio in (0.2, 0.1)]
    assert few[0][0]["spread"] != few[1][0]["spread"]
    white = lambda x_t, coords, *_: torch.full((*coords.shape[:2], 3), 2.0)
    figures, _ = evaluate(white, 0 * images + 1, sampler(sched, num_steps=2), 4)
    assert figures["coverage"] == 1  # samples that equal the truth are not beside it
    grey = lambda x_t, coords, *_: torch.zeros(*coords.shape[:2], 3)
    figures, _ = evaluate(grey, images, sampler(sched, num_steps=2), 4)
    assert figures["spread"] < 1e-6 and figures["coverage"] < 0.1


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


def test_the_training_loop_by_hand():
    """Seeds, the order of the images, warming up and a cosine, gradients clipped to a norm of 1."""
    model, images, seen = torch.nn.Linear(1, 1).double(), torch.arange(300), []
    optimizer = torch.optim.SGD(model.parameters(), 0.4)
    weights = lambda: torch.nn.utils.parameters_to_vector(model.parameters()).detach()

    def loss(index):
        seen.append(images[index])
        close(torch.rand(1), torch.rand(1, generator=seeded(7 * 1_000_003 + len(seen) - 1)), 0)
        return 1e4 * model(torch.ones(1).double()).sum()  # an enormous gradient

    before = weights()
    loop = train.training_loop(model, [optimizer], loss, images, 30, 100, 7, 0.1)
    for i, (step, value) in enumerate(loop):
        assert step == len(seen) == i + 1 and math.isfinite(value)
        rate = 0.4 * min(1, (i + 1) / 3) * 0.5 * (1 + math.cos(math.pi * i / 30))
        close((weights() - before).norm(), rate, 1e-9)
        before = weights()
    epochs = torch.cat(seen).view(10, 300)
    close(epochs.sort()[0], images.expand(10, 300), 0)
    assert not torch.equal(epochs[0], epochs[1])


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


def test_the_pictures_show_what_their_labels_say():
    grids = []

    def grid(rows, *labels, **more):
        grids.append(rows)
        return data.image_grid(rows, *labels, **more)

    images, sched = data.make_leaves(2, 3)[0], schedule.DiffusionSchedule(20)
    model = lambda x_t, coords, *_: torch.rand(*coords.shape[:2], 3) * 2 - 1
    with folder() as root, patched(sample, image_grid=grid):
        args = sample.parse_arguments(["--samples", "2", "--gif"])
        sample.report_field(model, sched, images, root, "leaves", sampler(sched, num_steps=2),
                            args)
    given, krige, mean, drawn, truth, error = grids[0][1]
    close(truth, images[1] / 255, 1e-6)
    close(error, data.heat(mean - truth), 1e-5)
    one, two, mean, truth, std, error = grids[1][1]
    close(mean, (one + two) / 2, 1e-5)
    close(std, data.heat(torch.stack([one, two]).std(0), 0.25), 1e-4)
    close(error, data.heat(mean - truth, 0.25), 1e-4)
    x_t, x_0 = (torch.stack(row) for row in grids[2])
    assert (x_t == 1).float().mean() > 0.01 > (x_0 == 1).float().mean()  # noise is clamped


# --------------------------------------------------------------------------------------- training


def checkpoint_of(place):
    return torch.load(f"{place}/checkpoint.pt", weights_only=True)


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


def test_three_steps_of_the_denoising_autoencoder_written_out():
    with tiny_sets():
        got = trained("dae", "--steps 3 --batch-size 64")
        images = data.load_mnist("data", True)[0].flatten(1).float() / 255
        torch.manual_seed(42)
        model = autoencoder.DenoisingAutoencoder()
        model.init_output_bias(images)
        optimizer = torch.optim.AdamW(model.parameters(), 1.0, weight_decay=0.0)
        order = torch.randperm(len(images), generator=seeded(42_000_126))
        for step in range(3):
            clean = images[order[64 * step:64 * step + 64]]
            eps = torch.randn(64, 784, generator=seeded(42_000_126 + step))
            loss = ((model((clean + 0.3 * eps).clamp(0, 1))[0] - clean) ** 2).mean()
            close(got["losses"][step], loss.detach(), 1e-6)
            optimizer.zero_grad()
            loss.backward()
            optimizer.param_groups[0]["lr"] = 0.006 * 0.5 * (1 + math.cos(math.pi * step / 3))
            optimizer.step()
        # Adam divides a gradient by its own size: where that is almost 0, rounding decides.
        errors = torch.cat([(got["model"][name] - value).abs().flatten()
                            for name, value in model.state_dict().items()])
        assert (errors > 1e-4).float().mean() < 1e-3 and errors.max() < 0.01, errors.max()


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


def test_three_steps_of_the_field_written_out():
    """Batches of 40 of 80 images, so the third step begins a new epoch."""
    with tiny_sets():
        images, sched = data.load_cifar10("data", True)[0], schedule.DiffusionSchedule()
        order = torch.cat([torch.randperm(80, generator=seeded(42_000_126 + i)) for i in range(2)])
        for masks in ("fresh", "fixed"):
            got = trained("nf", f"--steps 3 --batch-size 40 --masks {masks}")
            torch.manual_seed(42)
            covariance = nf_denoiser.pixel_covariance(images)
            model = nf_denoiser.NFDenoiser(sched.alphas_cumprod, covariance=covariance,
                                           **nf_denoiser.SIZES["small"])
            close(got["model"]["field.covariance"], covariance, 1e-6)
            named = dict(model.named_parameters())
            start = {name: p.detach().clone() for name, p in named.items()}
            small = ("latents", "to_values.weight", "unet.first.weight")
            muon = [p for name, p in named.items() if p.dim() > 1 and not name.endswith(small)]
            rest = [p for p in named.values() if not any(p is q for q in muon)]
            adamw = torch.optim.AdamW(rest, 1.0, weight_decay=0.01)
            for step in range(3):
                torch.manual_seed(42_000_126 + step)
                losses = []
                for place, pure in ((40 * step, True), (40 * step + 20, False)):
                    index = order[place:place + 20]
                    values = images[index].flatten(2).mT / 127.5 - 1
                    drawn = (torch.rand(20, 1024) if masks == "fresh"
                             else data.fixed_order(42, index, 1024)).argsort(1)
                    chosen = drawn[:, :204], drawn[:, 204:1024 if pure else 408]
                    coords = [torch.stack([i % 32, i // 32], -1) / 31 for i in chosen]
                    x_in, x_0 = (values.gather(1, i[..., None].expand(-1, -1, 3)) for i in chosen)
                    t = torch.randint(999 if pure else 0, 1000, (20,))
                    bar = sched.alphas_cumprod[t].float()[:, None, None]
                    x_t = bar.sqrt() * x_0 + (1 - bar).sqrt() * torch.randn(x_0.shape)
                    x_0_hat = model(None if pure else x_t, coords[1], t, coords[0], x_in)
                    losses.append(((x_0_hat - x_0) ** 2).mean())
                loss = sum(losses) / 2
                close(got["losses"][step], loss.detach(), 2e-5)
                model.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                rate = 0.5 * (1 + math.cos(math.pi * step / 3))
                adamw.param_groups[0]["lr"] = 0.15 * 0.02 * rate
                adamw.step()
                for p in muon:
                    orthogonal_update(p, 0.02 * rate)
            for group in ([name for name in start if start[name].dim() > 1], list(start)):
                moved = sum((named[name] - start[name]).abs().sum() for name in group)
                apart = sum((named[name] - got["model"][name]).abs().sum() for name in group)
                assert apart < 0.03 * moved, (apart, moved)
        assert got["step"] == 3 and got["data"] == "cifar10"
        assert {o["param_groups"][0]["weight_decay"] for o in got["optimizers"]} == {0.01}
        full = types.SimpleNamespace(model="nf", size="full", lr=1e-4)  # AdamW alone
        assert [type(o) for o in train.make_optimizers(model, full)] == [torch.optim.AdamW]


def test_the_flags_of_train():
    with tiny_sets():
        weights = lambda model, flags: trained(
            model, f"--steps 2 --batch-size 64 {flags}")["model"]["decoder.0.weight"]
        dae, ae = weights("dae", ""), weights("ae", "")
        runs = [dae, ae, *(weights("dae", flag) for flag in (
            "--noise masking", "--noise salt_pepper", "--noise mixed", "--noise-param 0.6",
            "--seed 7", "--lr 0.001", "--batch-size 32"))]
        for a, b in itertools.combinations(runs, 2):
            assert not torch.equal(a, b)
        assert torch.equal(dae, weights("dae", "--noise gaussian --noise-param 0.3"))
        assert torch.equal(ae, weights("dae", "--noise-param 0"))
        for name in ("cosine", "linear"):
            got = trained("nf", f"--steps 1 --batch-size 2 --beta-schedule {name}")
            sched = schedule.DiffusionSchedule(1000, name)
            close(got["model"]["alphas_cumprod"], sched.alphas_cumprod, 1e-6)
            assert schedule.DiffusionSchedule(**got["schedule"]).betas.equal(sched.betas)
        got = trained("nf", "--steps 1 --batch-size 2 --parts unet perceiver")
        assert got["config"]["parts"] == ["unet", "perceiver"]
        net = sample.load_checkpoint("out/nf/checkpoint.pt")[0]
        assert net.field is None and not net.training
        got = trained("nf", "--parts field")
        assert got["step"] == 0 and len(got["losses"]) == 0


def test_the_closing_table_is_about_test_images():
    with tiny_sets():
        for model, name in (("nf", "cifar10"), ("dae", "mnist")):
            got = trained(model, "--steps 2 --batch-size 8 --evaluate 5")
            results = json.loads(Path(f"out/{model}/results.json").read_text())["methods"]
            net = sample.load_checkpoint(f"out/{model}/checkpoint.pt")[0]
            images, sched = data.load_dataset(name, "data", False)[1], schedule.DiffusionSchedule()
            if model == "nf":
                expected = sample.evaluate_field(net, sched, images[:5], sampler(sched))
                few = sample.evaluate_field(net, sched, images[:100])
                figures = [few[method]["psnr"] for method in ("one-step mean", "kriging")]
            else:
                texts = ["clean", "gaussian 0.3", "salt_pepper 0.2", "masking 0.3"]
                clean = images / 255
                with torch.no_grad():
                    expected, _ = autoencoder.cross_test({"gaussian 0.3": net}, texts, clean)
                figures = [expected["trained on gaussian 0.3"]["gaussian 0.3"]]
            equal(results, expected, 1e-5 if model == "nf" else 1e-6)
            close(got["tests"][-1], [2, *figures], 1e-3 if model == "nf" else 1e-6)
            for picture in ("loss.png", "samples.png"):
                with Image.open(f"out/{model}/{picture}") as image:
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

    field, krige = one_step(tiny_field(("field",), side=16, covariance=covariance))
    assert field > krige + 0.6, (field, krige)
    args = types.SimpleNamespace(model="nf", size="small", lr=0.02)
    model = tiny_field(("unet",), side=16, widths=(16, 24))
    split = data.sparse_split(test, order=data.fixed_order(0, torch.arange(100), 256))
    eps = torch.randn(split["output_values"].shape, generator=torch.Generator().manual_seed(0))
    x_t, where = sched.q_sample(split["output_values"], 400, eps), torch.full((100,), 400)

    def figures():
        with torch.no_grad():
            x_0 = model(x_t, split["output_coords"], where, split["input_coords"],
                        split["input_values"])
        mse = ((x_0 - split["output_values"]) / 2).square().mean().item()
        return np.array([one_step(model)[0], sample.psnr(mse)])

    before, optimizers = figures(), train.make_optimizers(model, args)
    loss = lambda index: sum(train.field_loss(model.train(), images[half], sched, pure_noise) / 2
                             for half, pure_noise in zip(index.chunk(2), (True, False)))
    for _ in train.training_loop(model, optimizers, loss, images, 150, 8, 0, 0.02):
        pass
    model.eval()
    gained = figures() - before
    assert (gained > 1.1).all(), gained


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped():
    with tiny_sets():
        for model, flags in (("dae", "--data mnist --batch-size 160 --noise mixed --steps 12"),
                             ("ae", "--data mnist --batch-size 160 --steps 6"),
                             ("nf", "--data cifar10 --batch-size 4 --steps 6 --masks fixed")):
            line = f"--model {model} --evaluate 1 {flags} --out"
            works(train, f"{line} whole")
            save = sample.save_checkpoint

            def interrupt(path, checkpoint):
                save(path, checkpoint)
                if checkpoint["step"] == 2:
                    signal.raise_signal(signal.SIGINT)  # Ctrl-C: one more step, then stop

            with patched(train, save_checkpoint=interrupt):
                code, out, err = run(train, f"{line} parts")
            assert code == 130 and "--resume" in out, err
            assert checkpoint_of(f"parts/{model}")["step"] == 3
            works(train, f"{line} parts --resume")
            equal(checkpoint_of(f"whole/{model}"), checkpoint_of(f"parts/{model}"))
            other = ("masks", "fresh") if model == "nf" else ("data", "glyphs")
            for flag, value in (("lr", 0.5), other):
                refused(train, f"{line} parts --resume --{flag} {value}", flag, value)
            works(train, f"{line} parts --resume --steps 13")
        shutil.copy("parts/dae/checkpoint.pt", "parts/ae")
        refused(train, "--model ae --data mnist --resume --steps 50 --batch-size 160 --out parts",
                "model dae -> ae")


def start_training(flags, *before):
    """train.py in a process of its own, on one thread; its output goes to the file log."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    command = [sys.executable, *before, str(HERE / "train.py"), *flags.split()]
    with open("log", "a") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment,
                                start_new_session=True)


def test_kill_9_at_any_moment_loses_nothing():
    """A run that saves every step is killed again and again: the file on disk always loads."""
    rng, kills = np.random.default_rng(0), 20 if LONG else 2
    with tiny_sets():
        flags = f"--model dae --data mnist --batch-size 320 --steps {40 * kills} --out"
        assert start_training(f"{flags} whole").wait(200) == 0
        path, resume, killed = Path("parts/dae/checkpoint.pt"), "", 0
        saved_at = lambda: path.exists() and path.stat().st_mtime_ns
        while killed < kills:
            before = saved_at()
            process = start_training(f"{flags} parts {resume}")
            while process.poll() is None and saved_at() == before:
                time.sleep(0.005)  # until this process has saved something
            time.sleep(rng.uniform(0, 0.15))
            process.kill()
            code = process.wait()
            assert code in (0, -signal.SIGKILL), Path("log").read_text()
            if code == 0:
                break  # it was done before the signal
            killed, resume = killed + 1, "--resume"
            assert sample.load_checkpoint(path)[1]["step"] >= 1
        assert killed >= min(kills, 2)
        if checkpoint_of("parts/dae")["step"] < 40 * kills:
            again = start_training(f"{flags} parts --resume")
            assert again.wait(200) == 0, Path("log").read_text()
        equal(checkpoint_of("whole/dae"), checkpoint_of("parts/dae"))
        assert not list(Path("parts").rglob("*.part"))


def test_two_processes_train_as_one():
    torchrun = "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"
    with tiny_sets():
        flags = "--model nf --data cifar10 --batch-size 4 --evaluate 1 --out"
        for name, before in (("one", ()), ("two", torchrun)):
            process = start_training(f"{flags} {name} --steps 1", *before)
            assert process.wait(200) == 0, Path("log").read_text()
        said = Path("log").read_text()
        assert said.count("trained in") == said.count("one-step mean") == 2, said  # rank 0 alone
        one, two = (checkpoint_of(f"{name}/nf")["optimizers"] for name in ("one", "two"))
        assert sum(len(optimizer["state"]) for optimizer in one) > 40
        # after one step momentum is the gradient, and exp_avg a tenth of it
        torch.testing.assert_close(one, two, rtol=0, atol=2e-5)
        # what one process began two go on with; killing one of them ends the job, not with 0
        process = start_training(f"{flags} one --steps 100 --resume", *torchrun)
        while checkpoint_of("one/nf")["step"] == 1 and process.poll() is None:
            time.sleep(0.1)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        assert process.wait(100) != 0
        assert sample.load_checkpoint("one/nf/checkpoint.pt")[1]["step"] >= 2
        with patched(os, environ={**os.environ, "WORLD_SIZE": "3", "RANK": "0"}):
            refused(train, f"{flags} one --steps 1", "multiple of 6")
            refused(train, "--model nf --batch-size 6 --bench", "torchrun")


def test_two_processes_corrupt_as_one():
    torchrun = "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"
    flags = "--model dae --data mnist --noise mixed --batch-size 8 --steps 1 --out"
    with tiny_sets():
        works(train, f"{flags} one")
        process = start_training(f"{flags} two", *torchrun)
        assert process.wait(200) == 0, Path("log").read_text()
        one, two = (checkpoint_of(f"{name}/dae")["optimizers"] for name in ("one", "two"))
        # after one step exp_avg is a tenth of the gradient
        torch.testing.assert_close(one, two, rtol=0, atol=1e-6)


def test_a_full_disk_or_a_loss_that_is_not_finite_spares_the_checkpoint():
    import resource
    with tiny_sets():
        line = "--model dae --data mnist --batch-size 64 --steps"
        works(train, f"{line} 2")
        path = Path("out/dae/checkpoint.pt")
        before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
        try:
            refused(train, f"{line} 4 --resume")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert path.read_bytes() == before
        assert [p.name for p in path.parent.glob("checkpoint*")] == ["checkpoint.pt"]
        refused(train, f"{line} 4 --out /proc/nowhere")
        with patched(train, NOISES={**noise.NOISES, "gaussian": (lambda x, *_: x * math.nan, 0.3)}):
            refused(train, f"{line} 4 --resume", "finite")
        assert path.read_bytes() == before
        refused(train, f"{line} 1 --lr 1e39 --out wild", "finite")  # only the weights
        assert not list(Path("wild").rglob("*.pt"))
        works(train, f"{line} 4 --resume")


def test_bench_prints_its_measurements():
    with tiny_sets():
        for model, name in (("nf", "cifar10"), ("ae", "mnist")):
            out = works(train, f"--model {model} --data {name} --batch-size 4 --bench")
            shares = [float(x) for x in re.findall(r"(-?\d+\.\d)%", out)]
            assert len(shares) == 4 and abs(sum(shares) - 100) < 0.3, out
            assert "of the matmul rate" in out and not Path("out").exists()
    flop = float(re.search(r"([\d.]+) GFLOP", out)[1])
    close(flop, 1e-9 * (6 * 483_328 - 2 * 784 * 256), 0.6e-3)  # no gradient of the input


# ----------------------------------------------------------------------------- using the programs


def test_the_newest_checkpoint_is_sampled_and_flags_change_the_picture():
    with tiny_sets("sets"):
        for name, seed, age in (("old", 1, 100), ("new", 2, 0)):
            works(train, f"--data cifar10 --data-dir sets --steps 1 --batch-size 2 --evaluate 1 "
                         f"--seed {seed} --out run/{name}")
            path = Path(f"run/{name}/nf/checkpoint.pt")
            os.utime(path, (time.time() - age, time.time() - age))
        line = "--data-dir sets --out run --steps 3"
        out = works(sample, f"{line} --json f.json --evaluate 40")
        assert "new/nf/checkpoint.pt" in out, out
        figures = json.loads(Path("f.json").read_text())
        assert figures["data"] == "cifar10" and figures["images"] == 32  # all of the test set

        def picture(flags):
            works(sample, f"{line} {flags}")
            return Path("run/nf/samples.png").read_bytes()

        base = picture("")
        assert picture("") == base
        for flags in ("--seed 1", "--eta 1", "--steps 2", "--full", "--input-ratio 0.9",
                      "run/old/nf/checkpoint.pt"):
            assert picture(flags) != base, flags
        out = works(sample, f"{line} --gif --scale 2 --samples 3 --evaluate 2")
        assert "central 90%" in out and " 2 images" in out, out
        works(sample, f"{line} --export m.pt")
        with Image.open("run/nf/denoising.gif") as gif:
            assert gif.n_frames >= 3
        for name in ("spread", "scale"):
            assert Image.open(f"run/nf/{name}.png").size[0] > 100
        whole, half = (sample.load_checkpoint(p)[0].state_dict() for p in (path, "m.pt"))
        equal(half, whole, 2e-3)
        assert torch.equal(whole["field.covariance"], half["field.covariance"])
        assert torch.load("m.pt")["model"]["perceiver.latents"].dtype == torch.float16
        shutil.copy("m.pt", path)
        refused(train, "--data cifar10 --data-dir sets --batch-size 2 --resume --out run/new",
                "exported")


def test_a_fine_grid_is_not_transposed():
    split = data.sparse_split(data.make_leaves(1, 3)[0])
    ramp = lambda *_, output_coords, **more: 2 * output_coords[..., :1].expand(-1, -1, 3) - 1
    with patched(sample, one_step_mean=ramp, image_grid=lambda rows, *_, **more: rows):
        ((given, fine, smooth),) = sample.draw_fine(None, None, split, 2)
    close(fine, torch.linspace(0, 1, 64).expand(3, 64, 64), 1e-6)  # dark left, bright right


def test_windows_are_blended_and_holes_filled_from_the_rim():
    g = seeded()
    # One window is the answer itself. Of two windows side by side, sin^2 of the first falls where
    # that of the second rises.
    image, known = torch.rand(3, 32, 48, generator=g), torch.rand(32, 48, generator=g) < 0.3
    ramp = torch.sin(math.pi * (torch.arange(32) + 0.5) / 32) ** 2
    total, weight = torch.zeros(3, 32, 48), torch.zeros(48)
    for x in (0, 16):
        window, given = image[:, :, x:x + 32], known[:, x:x + 32]
        split = data.sparse_split(window[None], given.sum().item() / 1024 + 1e-4, None,
                                  order=1 - given.flatten()[None].float())
        alone = sample.assemble(split, sample.kriging(split))[0]
        close(sample.restore(window, given, sample.kriging), alone, 1e-6)
        total[:, :, x:x + 32] += ramp * alone
        weight[x:x + 32] += ramp
    close(sample.restore(image, known, sample.kriging), total / weight, 1e-5)
    # Sizes that no number of windows fits; given pixels stay.
    for height, width in ((1, 2), (20, 70), (33, 31)):
        image = torch.rand(1, height, width, generator=g)
        known = torch.rand(height, width, generator=g) < 0.3
        known[0, 0], known[0, 1] = True, False
        got = sample.restore(image, known, lambda s: s["output_values"] * 0 + 0.5)
        assert torch.equal(got[:, known], image[:, known])
        close(got[:, ~known], 0.5, 1e-6)
    # A hole larger than two windows: the first answers come from windows that reach its rim, and
    # the next pass is given what they restored. No window without a given pixel is asked.
    known, counts = torch.ones(128, 128, dtype=torch.bool), []
    known[20:110, 20:110] = False
    image = torch.where(known, 0.25, -9.0).expand(3, -1, -1)

    def mean_of_given(split):
        counts.append(split["input_values"].shape[1])
        assert (split["input_values"] > -1).all()
        return split["input_values"].mean(1, keepdim=True).expand_as(split["output_values"])

    close(sample.restore(image, known, mean_of_given), torch.full((3, 128, 128), 0.25), 1e-5)
    assert min(counts) >= 200, counts
    raises(ValueError, lambda: sample.restore(image, known & False, mean_of_given), "no pixel")


def test_a_photograph_of_your_own():
    photo, mask = np.zeros((60, 90, 3), np.uint8), np.zeros((60, 90), np.uint8)
    photo[:, :45] = 255, 200, 40
    mask[20:30, 30:60] = 255
    some = np.where(np.arange(90) < 40, 255 - mask, 255)  # a part of the mask is transparent
    grey = data.make_glyphs(1, 0)[0][0, 0].numpy()
    command = f"{sample.SHIPPED} --image"

    def restored(flags):
        out = works(sample, f"{command} {flags}")
        return out, np.asarray(Image.open("out/nf/restored.png")).astype(int)

    with folder():
        for name, pixels in dict(
                photo=photo, mask=mask, grey=grey, holes=np.dstack([photo, 255 - mask]),
                some=np.dstack([photo, some]), a=np.where(mask[..., None] > 0, 7, photo),
                black=0 * mask, dot=photo[:1, :1], nothing=np.zeros((50, 50, 4)),
                wide=np.zeros((40, 1500, 3))).items():
            Image.fromarray(pixels.astype(np.uint8)).save(f"{name}.png")
        Path("cut.png").write_bytes(Path("holes.png").read_bytes()[:90])
        Image.fromarray(np.full((40, 40), 0.5, np.float32)).save("float.tif")

        out, image = restored("photo.png --input-ratio 0.5")
        assert image.shape == (60, 90, 3) and out.count(" dB") == 3
        assert abs(image - photo)[:, :35].max() < 40 and image[:, -35:].max() < 40
        assert (image == photo).all(2).mean() >= 0.5  # the given ones, bit by bit
        assert (image == restored("photo.png --input-ratio 0.5")[1]).all()  # the seed is fixed
        # Transparent pixels are missing, and so are white ones of a mask: same result.
        out, image = restored("holes.png")
        assert " dB" not in out and (image == photo)[mask == 0].all()
        assert (image == restored("a.png --mask mask.png")[1]).all()
        assert (image == restored("some.png --mask mask.png")[1]).all()  # either will do
        assert abs(image - photo)[20:30, 30:40].max() < 60  # 7 was not used
        # Grey stays grey; every second pixel of an enlarged picture is the picture.
        out, image = restored("grey.png --upscale 2")
        assert image.shape == (56, 56) and (image[::2, ::2] == grey).all()
        out, image = restored("wide.png")
        assert "reduced" in out and image.shape == (27, 1024, 3)[:image.ndim]
        out, image = restored("wide.png --upscale 2")
        assert "512" in out and image.shape == (28, 1024, 3)[:image.ndim]
        out = works(sample, "--image photo.png --size 32 --steps 2 --samples 2 --gif")
        assert " 1 images" in out and Path("out/nf/spread.png").exists()
        before = Path("out/nf/restored.png").read_bytes()
        for flags, word in (
                ("a.png --mask dot.png", "same size"), ("a.png --mask wide.png", "same size"),
                ("nothing.png", "no pixel"), ("cut.png", "cut.png"), ("none.png", "none.png"),
                ("a.png --mask mask.png --full", "--size"), (".", "picture"),
                ("a.png --input-ratio 1.5", "--input-ratio"), ("dot.png", "no pixel of the"),
                ("photo.png --mask black.png", "no pixel is missing"), ("float.tif", "floating"),
                ("a.png --steps 5", "--size"), ("a.png --size 33", "33"),
                ("a.png --sampler ddim --steps 1001", "1000")):
            code, out, err = run(sample, f"{command} {flags}")
            assert code and word in err and "Trace" not in err, (flags, err)
        assert Path("out/nf/restored.png").read_bytes() == before
        Path("out/nf/comparison.png").unlink()
        Path("out/nf/comparison.png").mkdir()  # cannot be replaced
        os.mkdir("out/nf/.comparison.png")
        refused(sample, f"{command} grey.png")
        assert Path("out/nf/restored.png").read_bytes() == before


def test_the_shipped_model_is_better_than_kriging():
    model, checkpoint = sample.load_checkpoint(sample.SHIPPED)
    sched = schedule.DiffusionSchedule(**checkpoint["schedule"])
    table = sample.evaluate_field(model, sched, data.make_leaves(24, seed=9)[0])
    assert table["one-step mean"]["psnr"] > table["kriging"]["psnr"] + 0.2, table
    assert sample.SHIPPED.stat().st_size < 6_000_000


def test_a_folder_of_pictures_trains_both_models_on_every_device():
    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.mps.is_available()
    with folder():
        os.mkdir("photos")
        for i, image in enumerate(data.make_leaves(30, 5)[0]):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(f"photos/{i}.png")
        for device, (model, size) in itertools.product(devices, (("nf", 4), ("dae", 8))):
            out = works(train, f"--model {model} --data photos --steps 1 --batch-size {size} "
                               f"--evaluate 2 --device {device}")
            assert "photos" in out and f"| {device}" in out
            line = f"out/{model}/checkpoint.pt --evaluate 1 --device {device}"
            works(sample, line)
            if model == "dae":
                refused(sample, f"{line} --steps 2", "autoencoder")


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
                (train, "--parts field --bench --data cifar10"),
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
                          "--input-ratio nan", "--size 32", "--mask x.png", "--upscale 2",
                          "--upscale 0", "--image x.png --gif",
                          "--image x.png --size 32 --upscale 2")),
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
    text, parse = (HERE / "README.md").read_text(), argparse.ArgumentParser.parse_args
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
    blocks = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
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
