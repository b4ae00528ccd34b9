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


def test_ratios_that_take_no_pixel_or_too_many_are_refused():
    images = torch.zeros(1, 1, 6, 9)
    for ratios in (
            (0, 0.2), (0.2, 0), (0.6, 0.5), (-0.1, 0.2), (0.0001, 0.2), (0.2, 0.0001),
            (0.2, 1.1), (1, 0), (1, None), (math.nan, 0.2), (0.2, math.inf)):
        raises(ValueError, lambda: data.sparse_split(images, *ratios), *ratios)
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
    assert (part != 0).any(1).sum() == 17  # of 35; the others are grey, 0
    assert torch.equal(sample.assemble(split, split["output_values"]), image)


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
    return images.flatten(1) / 255, labels.long()


def answering(answer):
    """A stand-in for a trained autoencoder, so that the right figures are known."""
    return lambda x: (answer(x), x)


def test_autoencoder_layers_and_first_output():
    torch.manual_seed(0)
    images, model = glyphs(300)[0], autoencoder.DenoisingAutoencoder()
    x, mean = torch.rand(5, 1, 28, 28), images.mean(0)
    with torch.no_grad():
        before = (model(images)[0] - mean).abs().mean()
        model.init_output_bias(images)
        assert (model(images)[0] - mean).abs().mean() < 0.35 * before
        close(model(0 * images[:1])[0][0], mean.clamp(0.01, 0.99), 1e-5)
        # He's weights keep the variance; with torch's own it would be 1/36 after two ReLUs
        hidden = model.encoder[:4](torch.randn(4000, 784)).square().mean()
        assert 0.7 < hidden < 1.4, hidden
        reconstructed, latent = model(x)
    assert reconstructed.shape == x.shape and latent.shape == (5, 64)
    assert torch.equal(model.decode(model.encode(x)), reconstructed.flatten(1))
    flat, weights = x.flatten(1).double(), [p.detach().double() for p in model.parameters()]
    assert [len(w) for w in weights[::2]] == [256, 128, 64, 128, 256, 784]
    for i in range(0, 12, 2):
        flat = flat @ weights[i].T + weights[i + 1]
        flat = flat.sigmoid() if i == 10 else flat.relu() if i != 4 else flat
    close(reconstructed.flatten(1), flat, 1e-5)
    raises(ValueError, lambda: model(torch.rand(2, 3, 32, 32)), 784)


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
    loop = autoencoder.training_loop(model, [optimizer], loss, images, 30, 100, 7, 0.1)
    for i, (step, value) in enumerate(loop):
        assert step == len(seen) == i + 1 and math.isfinite(value)
        rate = 0.4 * min(1, (i + 1) / 3) * 0.5 * (1 + math.cos(math.pi * i / 30))
        close((weights() - before).norm(), rate, 1e-9)
        before = weights()
    epochs = torch.cat(seen).view(10, 300)
    close(epochs.sort()[0], images.expand(10, 300), 0)
    assert not torch.equal(epochs[0], epochs[1])


def test_corruptions_by_description():
    x, g = torch.rand(8, 784), lambda: seeded(1)
    same = lambda text, expected: torch.equal(autoencoder.corrupt(x, text, g()), expected)
    assert same("clean", x) and same("gaussian 0.4", noise.add_gaussian_noise(x, 0.4, g()))
    assert same("salt_pepper 0.1", noise.add_salt_pepper_noise(x, 0.1, g()))
    assert same("mixed", noise.add_mixed_noise(x, g()))
    both = g()
    first = noise.add_masking_noise(x, 0.3, both)
    assert same("masking 0.3 + gaussian 0.2", noise.add_gaussian_noise(first, 0.2, both))
    striped = autoencoder.corrupt(x, "stripes").view(8, 28, 28)
    assert (striped[:, ::4] == 1).all() and torch.equal(striped[:, 1], x.view(8, 28, 28)[:, 1])


def test_a_denoiser_beats_its_control_on_noise_and_loses_on_clean_images():
    images, _ = glyphs()
    models, said = quiet(autoencoder.train_models, ["gaussian 0.5", "clean"], images[:384], 1, 40,
                         128)
    test, noisy = images[384:], autoencoder.corrupt(images[384:], "gaussian 0.5")
    (dae,), (ae,) = models.values()
    mse = lambda model, x: F.mse_loss(model(x)[0], test).item()
    constant = F.mse_loss(images[:384].mean(0).expand_as(test), test).item()
    assert mse(dae, noisy) < 0.9 * mse(ae, noisy) and mse(dae, noisy) < constant
    assert mse(ae, test) < mse(dae, test) and said.count("trained on") == 2
    raises(ValueError, lambda: quiet(autoencoder.train_models, ["clean"], images / 0, 1, 1), "rate")
    assert not dae.training and not any(p.requires_grad for p in dae.parameters())


def test_the_cross_test_and_the_passes_by_hand():
    test = glyphs(64)[0]
    half, perfect = answering(lambda x: (x + test) / 2), answering(lambda x: test)
    models = {"a": [half, perfect], "b": [answering(lambda x: x)] * 2}
    figures, grid = autoencoder.cross_test(["clean", "masking 0.3"], models, test, shown=2)
    left = F.mse_loss(noise.add_masking_noise(test, 0.3, seeded()), test).item()
    close(figures["left alone"]["masking 0.3"], [left], 1e-9)
    close(figures["trained on a"]["masking 0.3"], [left / 4, 0], 1e-7)
    close(figures["trained on b"]["masking 0.3"], [left, left], 1e-9)
    close(figures["trained on b"]["clean"], [0, 0], 0)
    truth, given, restored, _ = grid["rows"][1][4:]  # of the second image
    close(truth.flatten(), test[1], 0)
    close(restored, (given + truth) / 2, 1e-6)
    seen = []
    models = {"gaussian 0.3": [half, answering(lambda x: (seen.append(x), test)[1])]}
    figures, grid = autoencoder.progressive(models, test, passes=3)
    still, noisy = "nothing added", "noise 0.1 added"
    first = figures["input"][still][0]
    close(figures["pass 3"][still], [first / 4**3, 0], 1e-7)
    assert figures["pass 1"][noisy][0] > figures["pass 1"][still][0]
    assert not torch.equal(seen[4], seen[5])  # each pass adds noise of its own
    for truth, given, *passes in grid["rows"]:
        assert len(passes) == 3 and not torch.equal(given, passes[0])
    truth, given, restored, *_ = grid["rows"][0]
    close(truth.flatten(), test[0], 0)
    close(restored, (given + truth) / 2, 1e-6)
    assert autoencoder.markdown({"r": {"c": [1.0, 3.0], "d": [5.0]}}) == (
        "|     | c               | d      |\n"
        "| --- | ---             | ---    |\n"
        "| r   | 2.0000 ± 1.4142 | 5.0000 |\n")


def test_linear_classifier_is_the_minimum_of_its_objective():
    g = seeded()
    x, y = torch.randn(60, 5, generator=g) + 3, torch.randint(3, (60,), generator=g)
    z = ((x - x.mean(0)) / x.var(0).mean().sqrt()).double().numpy()
    A = np.vstack([np.column_stack([z, np.ones(60)]), math.sqrt(0.1 * 60) * np.eye(6)])
    w = np.linalg.lstsq(A, np.vstack([np.eye(3)[y], np.zeros((6, 3))]), rcond=None)[0]
    test = torch.randn(500, 5, generator=g) + 3
    logits = np.column_stack([(test - x.mean(0)) / x.var(0).mean().sqrt(), np.ones(500)]) @ w
    found = autoencoder.linear_classifier(x, y, 3)(test).numpy()
    assert (found == logits.argmax(1)).mean() > 0.99


def test_features_by_hand():
    images, labels = glyphs(400)
    model = autoencoder.DenoisingAutoencoder()
    model.encoder[0].weight.data[:100] *= 5  # far more active
    models = {"clean": [model] * 3, "gaussian 0.3": [model] * 3}
    train_, test, y, y_test = images[:300], images[300:], labels[:300], labels[300:]
    with torch.no_grad():
        figures, grid = autoencoder.features(models, test, y_test, train_, y)
        r = np.abs(np.corrcoef(model.encode(test).numpy().T))
        layer = model.encoder[0]
        active = layer(test).relu().std(0).argsort(descending=True)
        weight = layer.weight[active[1]]
    close(grid["rows"][1][1], (0.5 + 0.5 * weight / weight.abs().max()).view(1, 28, 28), 1e-5)
    pixels, clean = figures["pixels"], figures["trained on clean"]
    r = r[~np.eye(64, dtype=bool)]
    close(clean["mean absolute correlation"], [r.mean()] * 3, 1e-4)
    assert len(set(pixels["100 labels, clean"])) > 1  # each seed has a subset of its own
    assert clean == figures["trained on gaussian 0.3"]  # one model
    assert pixels["300 labels, clean"][0] > pixels["100 labels, clean"][0] > 0.3
    assert pixels["300 labels, clean"][0] > pixels["300 labels, noisy"][0]


def test_the_lab_runs_and_writes_what_it_prints():
    with tiny_sets("sets"):
        out = works(autoencoder, "--data mnist --data-dir sets --out lab --json f.json --epochs 2 "
                                 "--batch-size 128 --seeds 2 --exercise all")
        assert out.count("trained on gaussian 0.3, seed") == 2
        results = json.loads(Path("f.json").read_text())
        first, *sections = Path("lab/lab.md").read_text("utf-8").split("\n## ")
        assert "--exercise all --data mnist --epochs 2 --seeds 2" in first
        names = ["compare", "levels", "types", "blind", "features", "progressive"]
        for name, section in zip(names, sections, strict=True):
            with Image.open(f"lab/autoencoder-{name}.png") as picture:
                assert min(picture.size) > 150 and picture.getextrema() != ((255, 255),) * 3
            assert section == f"{name}\n\n{autoencoder.markdown(results[name])}"
            assert section.strip() in out
        same = [results[name]["trained on gaussian 0.3"]["gaussian 0.3"]
                for name in ("compare", "levels", "types", "blind")]
        assert same == same[:1] * 4
        test = data.load_mnist("sets", False)[0].flatten(1).float() / 255
        left = F.mse_loss(noise.add_masking_noise(test, 0.3, seeded()), test)
        close(results["types"]["left alone"]["masking 0.3"][0], left, 1e-6)
        # what train.py trains is the same model, bit for bit
        got = trained("dae", "--data-dir sets --seed 1 --epochs 2 --batch-size 128")
        images = data.load_mnist("sets", True)[0].flatten(1).float() / 255
        models, _ = quiet(autoencoder.train_models, ["gaussian 0.3"], images, 2, 2, 128)
        model = models["gaussian 0.3"][1]
        equal(got["model"], model.state_dict())


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
                clean = images.flatten(1).float() / 255
                with torch.no_grad():
                    expected, _ = autoencoder.cross_test(texts, {"gaussian 0.3": [net]}, clean)
                figures = expected["trained on gaussian 0.3"]["gaussian 0.3"]
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
    for _ in autoencoder.training_loop(model, optimizers, loss, images, 150, 8, 0, 0.02):
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
        with patched(noise, NOISES={**noise.NOISES, "gaussian": (lambda x, *_: x * math.nan, 0.3)}):
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
        out, image = restored("grey.png")  # grey stays grey
        assert image.shape == (28, 28) and (image == grey).mean() >= 0.2
        out, image = restored("wide.png")
        assert "reduced" in out and image.shape == (27, 1024, 3)[:image.ndim]
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
                          "--input-ratio nan", "--size 32", "--mask x.png",
                          "--image x.png --gif", "--image x.png --size 32 --mask x.png")),
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
