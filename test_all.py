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
import shlex
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

HERE = Path(__file__).resolve().parent
LONG = "--long" in sys.argv
nf_denoiser.SIZES["small"] = dict(num_latents=8, latent_dim=32, num_fourier_feats=8, num_blocks=1,
                                  num_heads=2, dropout=0.0, widths=(8, 8))  # in this process


@contextlib.contextmanager
def folder():
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


def raises(kind, call, *words):
    """The call must raise `kind`, with every word in the message."""
    try:
        call()
    except kind as problem:
        for word in words:
            assert str(word) in str(problem), f"{word!r} is not in {str(problem)!r}"
        return
    raise AssertionError(f"no {kind.__name__} was raised")


def close(a, b, tolerance):
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (a, b))
    assert a.shape == b.shape or b.dim() == 0, f"shapes {tuple(a.shape)} and {tuple(b.shape)}"
    worst = (a - b).abs().max().item()
    assert worst <= tolerance, f"differ by {worst:.3g}, more than {tolerance:.3g}"


@contextlib.contextmanager
def patched(module, **values):
    """Set attributes of a module for the length of a `with`."""
    old = {name: getattr(module, name) for name in values}
    try:
        for name, value in values.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in old.items():
            setattr(module, name, value)


def quiet(call, *arguments):
    """The call's result and what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        return call(*arguments), out.getvalue()


def run(module, line):
    """Run a script's main() in this process as a shell would: (exit code, stdout, stderr)."""
    out, err, argv, code = io.StringIO(), io.StringIO(), sys.argv, 0
    sys.argv = [module.__name__ + ".py", *shlex.split(line)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            module.main()
    except (ValueError, OSError) as problem:  # as the last lines of each script do
        code = 1
        err.write(f"error: {problem}\n")
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        sys.argv = argv
    return code, out.getvalue(), err.getvalue()


def tiny_sets(root):
    """80 + 32 images in the CIFAR-10 format, 320 + 64 in that of MNIST, made by code."""
    images = data.make_leaves(112, 11)[0].flatten(1).numpy()
    records = np.concatenate([np.zeros((112, 1), np.uint8), images], 1)
    (root / "cifar-10-batches-bin").mkdir(parents=True)
    for i in range(5):
        batch = records[16 * i:16 * i + 16]
        (root / f"cifar-10-batches-bin/data_batch_{i + 1}.bin").write_bytes(batch.tobytes())
    (root / "cifar-10-batches-bin/test_batch.bin").write_bytes(records[80:].tobytes())
    images, labels = (x.numpy() for x in data.make_glyphs(384, 11))
    (root / "MNIST/raw").mkdir(parents=True)
    for prefix, part in (("train", slice(320)), ("t10k", slice(320, None))):
        for name, array in (("images-idx3", images[part, 0]), ("labels-idx1", labels[part])):
            (root / f"MNIST/raw/{prefix}-{name}-ubyte").write_bytes(idx(array))


def mutated(content, rng):
    """One random accident: bytes changed, cut off, cut out, doubled, or zeros."""
    at, length = int(rng.integers(len(content))), int(rng.integers(1, 400))
    kind = rng.integers(5)
    if kind == 0:
        length = min(length % 8 + 1, len(content) - at)
        return content[:at] + rng.bytes(length) + content[at + length:]
    return (content[:at], content[:at] + content[at + length:],
            content[:at + length] + content[at:],
            content[:at] + bytes(length) + content[at + length:])[kind - 1]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def works_alone(file, *flags):
    def test():
        with folder() as root:
            shutil.copy(HERE / file, root)
            line = [sys.executable, file, "--out", "pictures", *flags]
            done = subprocess.run(line, cwd=root, capture_output=True, text=True, timeout=100)
            assert done.returncode == 0 and done.stdout.strip() and not done.stderr, done
            with Image.open(next((root / "pictures").iterdir())) as picture:
                assert min(picture.size) > 100 and len(np.unique(picture)) > 10
    return test


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
        assert images[4, 1, 5, 9] == made[4, 1 + 1024 + 5 * 32 + 9]  # green, row 5, column 9
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
                raises(data.Unavailable, load, md5)
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
                raises(data.Unavailable, load, *words)
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
            raises(data.Unavailable, lambda: data.load_dataset(real, root, True), stand_in, "127.")
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
    for ratios in ((0, 0.2), (0.2, 0), (0.6, 0.5), (-0.1, 0.2), (0.0001, 0.2), (math.nan, 0.2)):
        raises(ValueError, lambda: data.sparse_split(images, *ratios), ratios[0])


def test_fixed_order_is_a_function_of_seed_image_and_pixel():
    orders = [data.fixed_order(seed, torch.arange(300), 784) for seed in (0, 1, 6, 2**32 - 1)]
    few = torch.randperm(300, generator=seeded())[:100]
    assert torch.equal(data.fixed_order(1, few, 784), orders[1][few])  # another batch and order
    assert torch.equal(data.fixed_order(1, few[:1], 784)[0], orders[1][few[0]])
    rows = torch.cat(orders)
    uniform = torch.linspace(0, 1, rows.numel())
    close(rows.flatten().sort().values, uniform, 1.63 / len(uniform) ** 0.5)  # Kolmogorov, 1 %
    others = torch.corrcoef(rows) - torch.eye(len(rows))  # of seeds and images: 1 / sqrt(784)
    assert others.abs().max() < 0.2 and abs(others.std() - 784**-0.5) < 0.001
    assert abs(torch.corrcoef(rows[:, ::56].T) - torch.eye(14)).max() < 0.15  # of pixels


def test_a_red_pixel_stays_in_its_row_and_column():
    image = torch.zeros(1, 3, 5, 7)
    image[0, 2], image[0, :, 1, 4] = 1, torch.tensor([1.0, 0, 0])  # red in row 1, column 4
    s = data.sparse_split(image, 0.5, None, generator=seeded())
    part = data.scatter_pixels(s["input_indices"], s["input_values"], image.shape, -1.0)
    both = data.scatter_pixels(s["output_indices"], s["output_values"], image.shape, part)
    assert torch.equal(both, image) and (part == -1).double().mean() == 18 / 35
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


def test_eight_hundred_damaged_files():
    """Every one is loaded as something valid or refused in one line: no other exception."""
    rng, picture = np.random.default_rng(0), io.BytesIO()
    Image.fromarray(bytes_((40, 40, 3))).save(picture, "PNG")
    with folder() as root, patched(data, CIFAR10_URLS=[], MNIST_URLS=[]):
        zipped, _ = write_mnist(root / "MNIST" / "raw")
        photo, cifar = root / "photo.png", root / "cifar-10-batches-bin" / "test_batch.bin"
        cifar.parent.mkdir()
        for path, good, load, shape in (
                (zipped, zipped.read_bytes(), data.load_mnist, (1, 28, 28)),
                (zipped.with_suffix(""), idx(bytes_((6, 28, 28))), data.load_mnist, (1, 28, 28)),
                (cifar, records(6), data.load_cifar10, (3, 32, 32)),
                (photo, picture.getvalue(), lambda *_: ([data.square_picture(
                    data.open_picture(photo), 3, 32)], torch.zeros(1)), (3, 32, 32))):
            refused = 0
            for i in range(201):
                path.write_bytes(mutated(good, rng) if i else good)
                try:
                    images, labels = load(root, False)
                    assert images[0].shape == shape and len(images) == len(labels) > 0
                    assert labels.max() < 10
                except (ValueError, data.Unavailable) as problem:
                    assert i and str(problem) and "\n" not in str(problem), problem
                    refused += 1
            assert 20 < refused <= 200, (path, refused)


test_noise_works_alone = works_alone("noise.py")
test_schedule_works_alone = works_alone("schedule.py")
test_data_works_alone = works_alone("data.py", "--data", "glyphs")


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


def test_attention_is_a_softmax_over_the_context():
    torch.manual_seed(0)
    layer = nf_denoiser.Attention(12, 3).double()
    x, context = torch.randn(2, 5, 12).double(), torch.randn(2, 7, 12).double()
    q, (k, v) = layer.to_q(x), layer.to_kv(context).chunk(2, -1)
    expected = torch.zeros(2, 5, 12).double()
    for b in range(2):
        for h in range(3):
            c = slice(4 * h, 4 * h + 4)
            logits = (q[b, :, c] @ k[b, :, c].T / 2).detach().numpy()
            weights = np.exp(logits - logits.max(1, keepdims=True))
            weights /= weights.sum(1, keepdims=True)
            expected[b, :, c] = torch.from_numpy(weights) @ v[b, :, c]
    close(layer(x, context), layer.to_out(expected), 1e-12)
    some = torch.tensor([True, False, True, True, False, True, False])
    bias = torch.zeros(2, 1, 1, 7).double().masked_fill(~some, -math.inf)
    close(layer(x, context, bias), layer(x, context[:, some]), 1e-12)


def test_fourier_features_and_time_embedding():
    features = nf_denoiser.FourierFeatures(5)
    out = features(torch.tensor([[0.3, 0.9]]))
    for j in range(5):
        angle = 2 * math.pi * (0.3 * features.B[0, j].item() + 0.9 * features.B[1, j].item())
        close(out[0, [j, 5 + j]], [math.sin(angle), math.cos(angle)], 1e-5)
    close(nf_denoiser.FourierFeatures(20_000).B.std(), 4, 0.1)
    embedding = nf_denoiser.SinusoidalTimeEmbedding(8)(torch.tensor([0, 7]))
    close(embedding[0], [0, 0, 0, 0, 1, 1, 1, 1], 0)
    close(embedding[1, [0, 4, 1]], [math.sin(7), math.cos(7), math.sin(0.7)], 1e-6)
    raises(ValueError, lambda: nf_denoiser.SinusoidalTimeEmbedding(7), 7)


def test_perceiver_reads_a_set_and_answers_each_query_alone():
    torch.manual_seed(0)
    net = nf_denoiser.PerceiverIO(5, 6, 2, num_latents=4, latent_dim=16, num_blocks=2,
                                  num_heads=2).eval()
    inputs, queries, p = torch.randn(2, 30, 5), torch.randn(2, 20, 6), torch.randperm(30)
    bias = torch.tensor([-0.5, -3.0]).view(2, 1, 1)
    with torch.no_grad():
        y = net(inputs, queries)
        assert y.shape == (2, 20, 2) and y.std() > 0.01
        close(net(inputs[:, p], queries), y, 1e-5)
        close(net(inputs, queries[:, 5:6]), y[:, 5:6], 1e-5)
        assert (net(inputs + 1, queries) - y).abs().max() > 1e-4
        # with a bias the latents read the queries, too, and less so the lower it is
        seen, encode = [], net.encoder.forward
        net.encoder.forward = lambda *given: (seen.append(given), encode(*given))[1]
        close(net(inputs, queries, torch.full((2, 1, 1), -1e4)), y, 1e-5)
        assert (net(inputs, queries, bias) - y).abs().max() > 1e-4
        (_, tokens, logits), embedded = seen[1], net.embed_queries(queries)
        close(tokens, torch.cat([net.embed_inputs(inputs), embedded], 1), 1e-6)
        close(logits[:, 0, 0], torch.cat([torch.zeros(2, 30), bias[:, 0].expand(2, 20)], 1), 0)
        block = net.processor[0]  # residual: without its two updates a block returns its input
        for layer in (block.attention.to_out, block.mlp[2]):
            torch.nn.init.zeros_(layer.weight), torch.nn.init.zeros_(layer.bias)
        x = torch.randn(1, 4, 16)
        assert torch.equal(block(x), x)
    raises(ValueError, lambda: nf_denoiser.PerceiverIO(5, 6, 2, latent_dim=32, num_heads=3), 32, 3)


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


def test_forward_is_mean_plus_std_times_answer():
    """The formula by hand at t = 100, with networks that answer 1: scale, colours and reading."""
    x_t, out, _, coords, values = random_problem(1)
    model = tiny_field(("field", "unet"))
    torch.nn.init.zeros_(model.unet_to_values.weight)
    torch.nn.init.ones_(model.unet_to_values.bias)
    bar = schedule.DiffusionSchedule().alphas_cumprod[100].item()
    K = nf_denoiser.exponential_covariance(32).double().numpy()
    index = lambda c: (c[0] * 31).round().long() @ torch.tensor([1, 32])
    basis = np.array([[1, 1, 1], [1, 0, -1], [1, -2, 1]]) / np.sqrt([[3], [2], [6]])
    rotate = lambda v: v[0].double().numpy() @ basis.T
    answer, variances = np.empty((20, 3)), []
    for c in range(3):
        image, variance = numpy_field(K, index(coords).numpy(), rotate(values)[:, c],
                                      index(out).numpy(), rotate(x_t)[:, c], bar)
        answer[:, c] = image[index(out).numpy()]
        variances.append(variance)
    v = 0.07 * np.array(variances)
    answer += np.sqrt(v * (1 - bar) / (bar * v + 1 - bar))
    t = torch.tensor([100])
    with torch.no_grad():
        got = model(x_t, out, t, coords, values)
    close(got[0], answer @ basis, 2e-3)
    # without a field: the mean colour, and one constant scale
    model = tiny_field(("unet",))
    torch.nn.init.zeros_(model.unet_to_values.weight)
    torch.nn.init.zeros_(model.unet_to_values.bias)
    with torch.no_grad():
        close(model(x_t, out, t, coords, values), values.mean(1, keepdim=True).expand(1, 20, 3),
              1e-5)


def test_the_field_is_read_between_its_pixels():
    """Bilinear interpolation with corners at 0 and 1: a horizontal ramp is read back as a ramp."""
    x = torch.arange(1024) % 32 / 31
    coords = torch.stack([x, torch.arange(1024) // 32 / 31], -1)[None]
    query = torch.rand(1, 200, 2, generator=torch.Generator().manual_seed(0))
    model, last = tiny_field(("field",)), torch.tensor([999])
    values = x.view(1, 1024, 1).expand(1, 1024, 3)
    with torch.no_grad():
        got = model(None, query, last, coords[:, ::3], values[:, ::3])
        close(got, query[..., :1].expand(1, 200, 3), 0.05)
        outside = model(None, query + 5, last, coords[:, ::3], values[:, ::3])
        assert (outside - 1).abs().max() < 0.05  # clamped to the corner


def test_what_the_networks_are_given():
    """The vectors of the Perceiver and the planes of the U-Net, worked out by hand."""
    model, (x_t, out, t, coords, values) = tiny_field(), random_problem(seed=1)
    seen = []
    attend, unet = model.perceiver.forward, model.unet.forward
    model.perceiver.forward = lambda *given: (seen.append(given), attend(*given))[1]
    model.unet.forward = lambda image: (seen.append(image), unet(image))[1]
    bar, colours = model.alphas_cumprod[t][:, None, None], model.colours
    with torch.no_grad():
        model(x_t, out, t, coords, values)
        image, (inputs, queries, bias) = seen
        time_ = model.embed_time(t)[:, None].expand(-1, 30, -1)
        close(inputs, torch.cat([model.fourier(coords), values @ colours, time_], 2), 1e-6)
        features = F.grid_sample(unet(image), 2 * out[:, :, None] - 1, align_corners=True)
        features = features[..., 0].mT.relu()
        close(queries, torch.cat([model.fourier(out), bar.sqrt() * x_t @ colours, time_[:, :20],
                                  features], 2), 1e-5)
        close(bias, bar.log(), 1e-6)
        at = [(c * 31).round().long() @ torch.tensor([1, 32]) for c in (coords, out)]
        mean, variance = model.field(at[0], values @ colours, at[1], x_t @ colours, bar)
        centred = mean - (values @ colours).mean(1)[..., None]
        close(image[:, :3].flatten(2), centred / variance.sqrt().mT, 1e-4)
        masks = torch.zeros(2, 2, 1024)
        masks[:, 0].scatter_(1, at[0], 1), masks[:, 1].scatter_(1, at[1], bar[..., 0].repeat(1, 20))
        close(image[:, 3:5].flatten(2), masks, 1e-6)
        close(image[:, 5], bar.sqrt().expand(2, 32, 32), 1e-6)
        # without the field the U-Net sees the pixels themselves
        model = tiny_field(("unet",))
        unet, seen = model.unet.forward, []
        model.unet.forward = lambda image: (seen.append(image), unet(image))[1]
        model(x_t, out, t, coords, values)
        at = (coords[0, 7] * 31).round().long()
        close(seen[0][0, :3, at[1], at[0]], 2 * values[0, 7] @ colours, 1e-5)
        at = (out[1, 4] * 31).round().long()
        close(seen[0][1, :3, at[1], at[0]], 2 * bar[1].sqrt()[0] * x_t[1, 4] @ colours, 1e-5)


def test_every_combination_of_parts_runs_and_every_weight_learns():
    x_t, out, t, coords, values = random_problem()
    names = nf_denoiser.PARTS
    for parts in [c for n in (1, 2, 3) for c in itertools.combinations(names, n)]:
        for channels in (1, 3):
            model = tiny_field(parts, channels, num_blocks=2, dropout=0.5).train()
            y = model(x_t[..., :channels], out, t, coords, values[..., :channels])
            assert y.shape == (2, 20, channels) and torch.isfinite(y).all(), parts
            present = [name for name in names if getattr(model, name) is not None]
            assert present == [name for name in names if name in parts]
            if parts != ("field",):
                y.square().mean().backward()
                still = [name for name, p in model.named_parameters()
                         if p.grad is None or not p.grad.abs().max() > 0]
                assert not still, (parts, still)
            again = model.eval()(x_t[..., :channels], out, t, coords, values[..., :channels])
            assert torch.equal(y, again) == ("perceiver" not in parts)  # dropout
    for bad in ((), ("field", "nose"), "field"):
        raises(ValueError, lambda: tiny_field(bad), "parts")
    raises(ValueError, lambda: tiny_field(side=33), 33)


def test_autocast_leaves_the_linear_algebra_in_float32():
    x_t, out, t, coords, values = random_problem()
    for parts, tolerance in ((("field",), 0), (nf_denoiser.PARTS, 0.02)):
        model = tiny_field(parts)
        with torch.no_grad():
            expected = model(x_t, out, t, coords, values)
            with torch.autocast("cpu", torch.bfloat16):
                got = model(x_t, out, t, coords, values)
        assert got.dtype == torch.float32
        close(got, expected, tolerance)


def test_the_field_is_a_set_function():
    model, (x_t, out, t, coords, values) = tiny_field(), random_problem()
    with torch.no_grad():
        base, p, q = model(x_t, out, t, coords, values), torch.randperm(30), torch.randperm(20)
        close(model(x_t, out, t, coords[:, p], values[:, p]), base, 2e-4)
        close(model(x_t[:, q], out[:, q], t, coords, values), base[:, q], 2e-4)
        assert (model(x_t + 0.5, out, t // 2, coords, values) - base).abs().max() > 0.01
        for n_in, n_out in ((1, 1), (1, 7), (50, 3), (204, 204)):
            x_t, out, t, coords, values = random_problem(3, n_in, n_out)
            y = model(x_t, out, t, coords, values)
            assert y.shape == (3, n_out, 3) and torch.isfinite(y).all()
        raises(ValueError, lambda: model(x_t, out, t, coords[:, :0], values[:, :0]), "at least one")
        raises(ValueError, lambda: model(x_t, out[:, :3], t, coords, values), "shapes")


def test_at_the_last_timestep_x_t_does_not_matter():
    model, (x_t, out, t, coords, values) = tiny_field(), random_problem()
    torch.nn.init.normal_(model.perceiver.to_values.weight)
    last = torch.full_like(t, 999)
    with torch.no_grad():
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


def test_samplers_visit_the_timesteps_and_obey_eta_and_seed():
    sched, seen = schedule.DiffusionSchedule(20), []

    def model(x_t, output_coords, t, input_coords, input_values):
        seen.append((t.tolist(), output_coords, input_values))
        return 0.9 * x_t

    where = torch.rand(2, 5, 2), torch.rand(2, 3, 2), torch.rand(2, 3, 1)
    draw = lambda seed=0, **more: schedule.ddim_sample(
        model, sched, *where, generator=torch.Generator().manual_seed(seed), **more)
    a = draw(num_steps=4)
    assert [t for t, _, _ in seen] == [[t, t] for t in sched.timesteps(4).tolist()]
    assert all(c is where[0] and v is where[2] for _, c, v in seen) and a.shape == (2, 5, 1)
    assert torch.equal(a, draw(num_steps=4)) and not torch.equal(a, draw(1, num_steps=4))
    assert not torch.equal(a, draw(num_steps=4, eta=1.0))
    steps = []
    schedule.ddpm_sample(model, sched, *where, on_step=lambda *step: steps.append(step))
    assert [t for t, _, _ in steps] == list(range(19, -1, -1))
    assert all(torch.equal(x_0, 0.9 * x_t) for _, x_t, x_0 in steps)  # x_t and its prediction


def test_psnr_and_ssim():
    close(sample.psnr(0.01), 20, 1e-9)
    assert sample.psnr(0) == 100
    a, b = torch.full((1, 1, 16, 16), 0.3), torch.full((1, 1, 16, 16), 0.7)
    close(sample.ssim(a, a), [1.0], 1e-9)
    close(sample.ssim(a, b), [(2 * 0.3 * 0.7 + 1e-4) / (0.09 + 0.49 + 1e-4)], 1e-6)
    x, y = torch.rand(2, 2, 3, 14, 13, generator=torch.Generator().manual_seed(0)).double()
    w = np.exp(-((np.arange(11) - 5.0) ** 2) / 4.5)
    w = w[:, None] * w / w.sum() ** 2
    scores = []
    for c, i, j in itertools.product(range(3), range(4), range(3)):
        p, q = x[1, c, i:i + 11, j:j + 11].numpy(), y[1, c, i:i + 11, j:j + 11].numpy()
        mp, mq = (w * p).sum(), (w * q).sum()
        vp, vq = (w * (p - mp) ** 2).sum(), (w * (q - mq) ** 2).sum()
        cov = (w * (p - mp) * (q - mq)).sum()
        scores.append((2 * mp * mq + 1e-4) * (2 * cov + 9e-4)
                      / ((mp**2 + mq**2 + 1e-4) * (vp + vq + 9e-4)))
    close(sample.ssim(x, y)[1], np.mean(scores), 1e-9)
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
    grid = np.stack(np.divmod(np.arange(1024), 32)[::-1], 1) / 31
    K = np.exp(-np.sqrt(((grid[:, None] - grid[None]) ** 2).sum(-1)) * 31 / 16)
    x_in = split["input_values"][0, :, 1].double().numpy()
    image, _ = numpy_field(K, split["input_indices"][0].numpy(), x_in)
    close(sample.kriging(split)[0, :, 1], image[split["output_indices"][0].numpy()], 1e-3)


class Spy(torch.nn.Module):
    """A model that answers `answer(output_coords)`, and remembers what it was given."""

    def __init__(self, answer):
        super().__init__()
        self.answer, self.given = answer, []

    def forward(self, x_t, output_coords, t, input_coords, input_values):
        self.given.append((x_t, output_coords, t, input_coords, input_values))
        return self.answer(output_coords)


def sampler(sched, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return functools.partial(schedule.ddim_sample, schedule=sched, generator=generator, **options)


def test_every_column_of_the_table_worked_out_again():
    images, sched = data.make_leaves(5, 7)[0], schedule.DiffusionSchedule(20)
    spy = Spy(lambda coords: torch.cat([coords, coords[..., :1]], 2) * 3 - 1)  # partly above 1
    draw = sampler(sched, num_steps=2)
    table = sample.evaluate_field(spy, sched, images, draw, seed=3, batch=2)
    assert list(table) == ["one-step mean", "sample", "kriging", "inverse distance", "nearest"]
    split = data.sparse_split(images, 0.2, None, order=data.fixed_order(3, torch.arange(5), 1024))
    plain = spy.answer(split["output_coords"])
    mean = (plain + spy.answer((split["output_coords"] * torch.tensor([-1.0, 1])
                                + torch.tensor([1.0, 0])))) / 2  # of the image and its mirror image
    answers = {"one-step mean": mean, "sample": torch.cat([plain[:, :204], mean[:, 204:]], 1),
               "kriging": sample.kriging(split), "nearest": sample.nearest(split),
               "inverse distance": sample.inverse_distance(split)}
    for name, values in answers.items():
        guess = (values.clamp(-1, 1).numpy() + 1) / 2
        truth = (split["output_values"].numpy() + 1) / 2
        error = (guess - truth)[:, :204]
        row = table[name]
        close(row["mse"], (error**2).mean(), 1e-6)
        close(row["mae"], np.abs(error).mean(), 1e-6)
        close(row["psnr"], -10 * np.log10((error**2).mean()), 1e-3)
        whole = (split["full_image"] + 1) / 2
        filled = whole.flatten(2).clone()
        for b in range(5):
            filled[b][:, split["output_indices"][b]] = torch.from_numpy(guess[b]).float().T
        close(row["ssim"], sample.ssim(filled.view_as(whole), whole).mean(), 1e-5)
    # The input pixels are given as they are, and the rest of the image sees the sample.
    spy.given.clear()
    split = sample.split_images(images, torch.arange(5), 3)
    image = sample.reconstruct(spy, sched, split, draw)["sample"]
    given, truth = split["input_values"], split["full_image"]
    assert split["n_out"] == 204 and all(torch.equal(c[4][:, :204], given) for c in spy.given)
    rest = spy.given[4]
    assert [call[0] is None for call in spy.given] == [1, 1, 0, 0, 1, 1] and (rest[2] == 19).all()
    assert rest[1].shape[1] == 616 and rest[3].shape[1] == 408
    close(rest[4][:, 204:], spy.answer(split["output_coords"][:, :204]).clamp(-1, 1), 1e-6)
    chosen = split["input_indices"][:, None].expand(-1, 3, -1)
    assert torch.equal(image.flatten(2).gather(2, chosen), truth.flatten(2).gather(2, chosen))
    spy.given.clear()
    split = sample.split_images(images, torch.arange(5), 3, full=True)
    sample.reconstruct(spy, sched, split, functools.partial(schedule.ddpm_sample, schedule=sched))
    assert split["n_out"] == 820 and len(spy.given) == 2 + 20  # all timesteps, all pixels
    assert "sample" not in sample.reconstruct(spy, sched, split)


def test_coverage_of_an_exact_sampler():
    """With an exact model of data ~ N(0, s2) samples and truth are alike."""
    sched, s2 = schedule.DiffusionSchedule(), 0.09

    def exact(x_t, output_coords, t, input_coords, input_values):
        bar = sched.alphas_cumprod[t].view(-1, 1, 1).float()
        x_t = torch.zeros(*output_coords.shape[:2], 3) if x_t is None else x_t
        return s2 * bar.sqrt() / (bar * s2 + 1 - bar) * x_t

    images = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * s2**0.5
    evaluate = lambda model, *given, **more: sample.evaluate_samples(model, sched, *given, **more)
    figures, rows = evaluate(exact, images, sampler(sched, num_steps=200), 32)
    assert abs(figures["coverage"] - 29 / 33) < 0.02, figures  # 29 of the 33 ranks are inside
    assert abs(figures["spread"] - 0.15) < 0.005, figures
    close(figures["psnr_mean"], -10 * math.log10(0.15**2 * 33 / 32), 0.2)
    assert len(rows) == 4
    model = lambda *given: exact(*given) * (1 + 1e-4 * given[3].shape[1])  # sees the input
    few = [evaluate(model, images[:1], sampler(sched, seed, num_steps=5, eta=eta), 4,
                    input_ratio=ratio)[0]["spread"]
           for seed, eta, ratio in ((0, 0, 0.2), (1, 0, 0.2), (0, 1, 0.2), (0, 0, 0.1))]
    assert len(set(few)) == 4, few
    white = Spy(lambda coords: torch.full((*coords.shape[:2], 3), 2.0))
    figures, _ = evaluate(white, 0 * images + 1, sampler(sched, num_steps=2), 4)
    assert figures["coverage"] == 1  # samples that equal the truth are not beside it
    grey = Spy(lambda coords: torch.zeros(*coords.shape[:2], 3))
    figures, _ = evaluate(grey, images, sampler(sched, num_steps=2), 4)
    assert figures["spread"] < 1e-6 and figures["coverage"] < 0.1


# ------------------------------------------------------------------------------------ autoencoder


def glyphs(count=512):
    images, labels = data.make_glyphs(count, 11)
    return images.flatten(1) / 255, labels.long()


class Answer(torch.nn.Module):
    """A stand-in for a trained autoencoder, so that the right figures are known."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, x):
        return self.answer(x), x


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


def test_autoencoder_training_sees_fresh_noise_and_every_image_once_an_epoch():
    images, seen, rates = torch.arange(300.0)[:, None].expand(300, 784) / 300, [], []
    model = autoencoder.DenoisingAutoencoder()
    optimizer = torch.optim.AdamW(model.parameters(), 0.4)

    def corrupt(clean, text):
        seen.append((clean[:, 0].clone(), torch.rand(1).item()))
        return clean

    loss = lambda index: autoencoder.autoencoder_loss(model, images[index], "clean")
    loop = autoencoder.training_loop(model, [optimizer], loss, images, 30, 100, 0, 0.1)
    with patched(autoencoder, corrupt=corrupt):
        for i, (step, value) in enumerate(loop, 1):
            rates.append(optimizer.param_groups[0]["lr"])
            assert step == i and len(seen) == i and math.isfinite(value)
    # a tenth of the steps up, times half a cosine down
    cosine = [0.5 * (1 + math.cos(math.pi * i / 30)) for i in range(30)]
    close(rates, [0.4 * c * min(1, (i + 1) / 3) for i, c in enumerate(cosine)], 1e-12)
    assert autoencoder.warmup_cosine(1000, 1000, 0.1) == 0
    assert len({draw for _, draw in seen}) == 30
    for epoch in range(10):
        images_of_epoch = torch.cat([batch for batch, _ in seen[3 * epoch:3 * epoch + 3]])
        close(images_of_epoch.sort()[0], images[:, 0], 0)
    assert not torch.equal(seen[0][0], seen[3][0])


def test_corruptions_by_description():
    x, g = torch.rand(8, 784), lambda: torch.Generator().manual_seed(1)
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
    half = Answer(lambda x: (x + test) / 2)
    models = {"a": [half, Answer(lambda x: test)], "b": [Answer(lambda x: x)] * 2}
    figures, grid = autoencoder.cross_test(["clean", "masking 0.3"], models, test)
    left = F.mse_loss(noise.add_masking_noise(test, 0.3, seeded()), test).item()
    close(figures["left alone"]["masking 0.3"], [left], 1e-9)
    close(figures["trained on a"]["masking 0.3"], [left / 4, 0], 1e-7)
    close(figures["trained on b"]["masking 0.3"], [left, left], 1e-9)
    close(figures["trained on b"]["clean"], [0, 0], 0)
    truth, given, restored, _ = grid["rows"][1]
    close(truth.flatten(), test[0], 0)
    close(restored, (given + truth) / 2, 1e-6)
    seen = []
    models = {"gaussian 0.3": [half, Answer(lambda x: (seen.append(x), test)[1])]}
    figures, grid = autoencoder.progressive(models, test, passes=3)
    still, noisy = "nothing added", "noise 0.1 added"
    first = figures["input"][still][0]
    close(figures["pass 3"][still], [first / 4**3, 0], 1e-7)
    assert figures["pass 1"][noisy][0] > figures["pass 1"][still][0]
    assert not torch.equal(seen[4], seen[5])  # each pass adds noise of its own
    for _, given, *passes in grid["rows"]:
        assert len(passes) == 3 and not torch.equal(given, passes[0])
    close(grid["rows"][0][2], (grid["rows"][0][1] + truth) / 2, 1e-6)
    table = autoencoder.markdown({"r": {"c": [1.0, 3.0], "d": [5.0]}})
    assert table.splitlines()[2] == "| r   | 2.0000 ± 1.4142 | 5.0000 |"


def test_linear_classifier_is_the_minimum_of_its_objective():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 5, generator=g) + 3, torch.randint(3, (60,), generator=g)
    z = ((x - x.mean(0)) / x.var(0).mean().sqrt()).double().numpy()
    A = np.vstack([np.column_stack([z, np.ones(60)]), math.sqrt(0.01 * 60) * np.eye(6)])
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
    shown = grid["rows"][0][1][0, :28, 29:57]
    close(shown, (0.5 + 0.5 * weight / weight.abs().max()).view(28, 28), 1e-5)
    pixels, clean = figures["pixels"], figures["trained on clean"]
    r = r[~np.eye(64, dtype=bool)]
    close(clean["mean absolute correlation"], [r.mean()] * 3, 1e-4)
    assert len(set(pixels["100 labels, clean"])) > 1  # each seed has a subset of its own
    assert clean == figures["trained on gaussian 0.3"]  # one model
    assert pixels["300 labels, clean"][0] > pixels["100 labels, clean"][0] > 0.3
    assert pixels["300 labels, clean"][0] > pixels["300 labels, noisy"][0]


def test_the_lab_runs_and_writes_what_it_prints():
    with folder() as root:
        tiny_sets(root)
        code, out, err = run(autoencoder, f"--data mnist --data-dir {root} --out {root}/out --json "
                                          f"{root}/f.json --epochs 2 "
                                          f"--batch-size 128 --seeds 2 --exercise all")
        assert code == 0 and out.count("trained on gaussian 0.3, seed") == 2, err
        results = json.loads((root / "f.json").read_text())
        first, *sections = (root / "out/lab.md").read_text("utf-8").split("\n## ")
        assert "--exercise all --data mnist --epochs 2 --seeds 2" in first
        names = ["compare", "levels", "types", "blind", "features", "progressive"]
        for name, section in zip(names, sections, strict=True):
            with Image.open(root / "out" / f"autoencoder-{name}.png") as picture:
                assert min(picture.size) > 150 and picture.getextrema() != ((255, 255),) * 3
            lines = section.splitlines()
            assert lines[0] == name and section.strip() in out
            cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]
            assert cells[0][1:] == list(next(iter(results[name].values())))
            assert cells[2:] == [[row, *(f"{np.mean(x):.4f} ± {np.std(x, ddof=1):.4f}"
                                         if len(x) > 1 else f"{x[0]:.4f}" for x in each.values())]
                                 for row, each in results[name].items()]
        same = [results[name]["trained on gaussian 0.3"]["gaussian 0.3"]
                for name in ("compare", "levels", "types", "blind")]
        assert same == same[:1] * 4
        test = data.load_mnist(root, False)[0].flatten(1).float() / 255
        left = F.mse_loss(noise.add_masking_noise(test, 0.3, seeded()), test)
        close(results["types"]["left alone"]["masking 0.3"][0], left, 1e-6)
        # what train.py trains is the same model, bit for bit
        code, out, err = run(train, f"--model dae --seed 1 --epochs 2 --batch-size 128 --data "
                                    f"mnist --data-dir {root} --out {root}")
        images = data.load_mnist(root, True)[0].flatten(1).float() / 255
        models, _ = quiet(autoencoder.train_models, ["gaussian 0.3"], images, 2, 2, 128)
        trained = sample.load_checkpoint(root / "dae" / "checkpoint.pt")[0]
        for a, b in zip(models["gaussian 0.3"][1].parameters(), trained.parameters()):
            assert torch.equal(a, b)


def test_the_pictures_show_what_their_labels_say():
    grids, draw = [], data.image_grid

    def grid(rows, *labels, **more):
        grids.append((rows, labels))
        return draw(rows, *labels, **more)

    images, sched = data.make_leaves(2, 3)[0], schedule.DiffusionSchedule(20)
    spy = Spy(lambda coords: torch.rand(*coords.shape[:2], 3) * 2 - 1)
    with folder() as root, patched(sample, image_grid=grid):
        sample.report_field(spy, sched, images, root, "leaves", sampler(sched, num_steps=2),
                            samples=2, gif=True)
    given, krige, mean, drawn, truth, error = grids[0][0][1]
    close(truth, images[1] / 255, 1e-6)
    close(error, data.heat(mean - truth), 1e-5)
    one, two, mean, truth, std, error = grids[1][0][1]
    close(mean, (one + two) / 2, 1e-5)
    close(std, data.heat(torch.stack([one, two]).std(0), 0.25), 1e-4)
    close(error, data.heat(mean - truth, 0.25), 1e-4)
    x_t, x_0 = (torch.stack(row) for row in grids[2][0])
    assert (x_t == 1).float().mean() > 0.01 > (x_0 == 1).float().mean()  # noise is clamped
    grids.clear()
    with folder() as root, patched(data, image_grid=grid):
        quiet(autoencoder.report_autoencoder, Answer(lambda x: x / 2), data.make_glyphs(9, 0)[0],
              root, "clean")
    for row in grids[0][0]:
        for truth, noisy, restored in zip(row[::3], row[1::3], row[2::3]):
            close(restored, noisy / 2, 1e-6)
    assert len(row) == 12 and not torch.equal(truth, noisy) and not torch.equal(row[0], row[3])


# --------------------------------------------------------------------------------------- training


def checkpoint_of(path):
    return torch.load(path / "checkpoint.pt", weights_only=True)


def refused(line, *words):
    """train.py must end with exit code 1 and one line that has every word in it."""
    code, _, err = run(train, line)
    assert code == 1 and err.startswith("error: ") and err.count("\n") == 1, err
    assert all(str(word) in err for word in words), err


def trained(root, line):
    """Run train.py in this process; returns its checkpoint. The default seed is 42."""
    code, out, err = run(train, f"--data-dir {root} --out {root}/out {line}")
    assert code == 0, err
    return checkpoint_of(root / "out" / re.findall(r"--model (\w+)", line)[-1])


def test_three_steps_of_the_denoising_autoencoder_written_out():
    with folder() as root:
        tiny_sets(root)
        got = trained(root, "--model dae --data mnist --steps 3 --batch-size 64")
        images = data.load_mnist(root, True)[0].flatten(1).float() / 255
        torch.manual_seed(42)
        model = autoencoder.DenoisingAutoencoder()
        model.init_output_bias(images)
        optimizer = torch.optim.AdamW(model.parameters(), 1.0, weight_decay=0.0)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(42_000_126))
        for step in range(3):
            clean = images[order[64 * step:64 * step + 64]]
            g = torch.Generator().manual_seed(42_000_126 + step)
            noisy = (clean + 0.3 * torch.randn(64, 784, generator=g)).clamp(0, 1)
            loss = ((model(noisy)[0] - clean) ** 2).mean()
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
    with folder() as root:
        tiny_sets(root)
        got = trained(root, "--model nf --data cifar10 --steps 3 --batch-size 4 --evaluate 2")
        images, sched = data.load_cifar10(root, True)[0], schedule.DiffusionSchedule()
        torch.manual_seed(42)
        model = nf_denoiser.NFDenoiser(sched.alphas_cumprod, **nf_denoiser.SIZES["small"],
                                       covariance=nf_denoiser.pixel_covariance(images))
        named = dict(model.named_parameters())
        small = ("latents", "to_values.weight", "unet.first.weight")
        muon = [p for name, p in named.items() if p.dim() > 1 and not name.endswith(small)]
        rest = [p for p in named.values() if not any(p is q for q in muon)]
        adamw = torch.optim.AdamW(rest, 1.0, weight_decay=0.01)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(42_000_126))
        for step in range(3):
            torch.manual_seed(42_000_126 + step)
            losses = []
            for place, pure in ((4 * step, True), (4 * step + 2, False)):
                values = images[order[place:place + 2]].flatten(2).mT / 127.5 - 1
                pixels = torch.rand(2, 1024).argsort(1)
                chosen = pixels[:, :204], pixels[:, 204:1024 if pure else 408]
                coords = [torch.stack([i % 32, i // 32], -1) / 31 for i in chosen]
                x_in, x_0 = (values.gather(1, i[..., None].expand(-1, -1, 3)) for i in chosen)
                t = torch.randint(999 if pure else 0, 1000, (2,))
                bar = sched.alphas_cumprod[t].float()[:, None, None]
                x_t = bar.sqrt() * x_0 + (1 - bar).sqrt() * torch.randn(x_0.shape)
                x_0_hat = model(None if pure else x_t, coords[1], t, coords[0], x_in)
                losses.append(((x_0_hat - x_0) ** 2).mean())
            loss = sum(losses) / 2
            close(got["losses"][step], loss.detach(), 2e-5)
            model.zero_grad()
            loss.backward()
            norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
            for p in model.parameters():
                p.grad *= min(1.0, 1 / norm.item())
            rate = 0.5 * (1 + math.cos(math.pi * step / 3))
            adamw.param_groups[0]["lr"] = 0.15 * 0.02 * rate
            adamw.step()
            for p in muon:
                orthogonal_update(p, 0.02 * rate)
        assert got["step"] == 3 and got["data"] == "cifar10"
        assert {o["param_groups"][0]["weight_decay"] for o in got["optimizers"]} == {0.01}
        full = types.SimpleNamespace(model="nf", size="full", lr=1e-4)  # AdamW alone
        assert [type(o) for o in train.make_optimizers(model, full)] == [torch.optim.AdamW]
        torch.manual_seed(42)
        start = nf_denoiser.NFDenoiser(sched.alphas_cumprod, **nf_denoiser.SIZES["small"])
        for group in ([p for p in named if named[p].dim() > 1], list(named)):
            moved = sum((named[name] - dict(start.named_parameters())[name]).abs().sum()
                        for name in group)
            apart = sum((named[name] - got["model"][name]).abs().sum() for name in group)
            assert apart < 0.03 * moved, (apart, moved)


def test_gradients_are_clipped():
    sched, model = schedule.DiffusionSchedule(), tiny_field(("unet",))
    with torch.no_grad():
        model.unet_to_values.weight.mul_(1e4)  # an enormous gradient
    optimizer, images = torch.optim.SGD(model.parameters(), 1.0), data.make_leaves(8, 0)[0]
    loss = lambda index: train.field_loss(model, images[index], sched, False)
    before = [p.clone() for p in model.parameters()]
    next(autoencoder.training_loop(model, [optimizer], loss, images, 200, 4, 0, 0.02))
    moved = torch.stack([(p - q).norm() for p, q in zip(model.parameters(), before)]).norm()
    close(moved, 0.25, 0.0025)


def test_each_flag_of_the_autoencoders_changes_the_result():
    with folder() as root:
        tiny_sets(root)
        base = "--model dae --data mnist --steps 2 --batch-size 64"
        weights = lambda line: trained(root, line)["model"]["decoder.0.weight"]
        runs = [weights(f"{base} {flag}") for flag in (
            "", "--noise masking", "--noise salt_pepper", "--noise mixed", "--noise-param 0.6",
            "--seed 7", "--lr 0.001", "--batch-size 32", "--model ae")]
        assert torch.equal(weights(base), runs[0])
        assert torch.equal(weights(f"{base} --noise gaussian --noise-param 0.3"), runs[0])
        assert torch.equal(weights(f"{base} --noise-param 0"), runs[-1])
        for a, b in itertools.combinations(runs, 2):
            assert not torch.equal(a, b)


def test_what_a_batch_of_the_field_is_made_of():
    """Half at the last timestep with all missing pixels, half at all timesteps; masks."""
    calls, forward = [], nf_denoiser.NFDenoiser.forward

    def spy(self, x_t, output_coords, t, input_coords, input_values):
        calls.append((t, output_coords.shape[1], input_coords, input_values, x_t is None,
                      self.training))
        return forward(self, x_t, output_coords, t, input_coords, input_values)

    with folder() as root, patched(nf_denoiser.NFDenoiser, forward=spy):
        tiny_sets(root)
        base = "--model nf --data cifar10 --batch-size 16 --evaluate 1"
        for masks in ("fixed", "fresh"):
            calls.clear()
            trained(root, f"{base} --epochs 2 --masks {masks}")
            steps = [call for call in calls if call[5]]
            assert len(steps) == 20
            for t, n_out, coords, values, pure, _ in steps[::2]:
                assert pure and n_out == 820 and (t == 999).all() and len(t) == 8
            later = torch.cat([t for t, *_ in steps[1::2]])
            assert all(n_out == 204 and not pure for _, n_out, _, _, pure, _ in steps[1::2])
            assert later.min() < 200 and later.max() > 800 and len(later.unique()) > 50
            first, again = (torch.cat([c[2] for c in steps[i:i + 10]]) for i in (0, 10))
            assert not torch.equal(first, again)  # the epochs have orders of their own
            chosen = {}
            for t, _, coords, values, *_ in steps:
                for image, mask in zip(values, coords):
                    chosen.setdefault(tuple(mask[:3].flatten().tolist()), []).append(image)
            order = data.fixed_order(42, torch.arange(80), 1024)
            fixed = data.sparse_split(torch.zeros(80, 3, 32, 32), order=order)["input_coords"]
            same = set(chosen) == {tuple(mask[:3].flatten().tolist()) for mask in fixed}
            assert same == (masks == "fixed")
            assert len(chosen) == (80 if masks == "fixed" else 160), (masks, len(chosen))


def test_the_checkpoint_has_the_constants_of_the_run():
    with folder() as root:
        tiny_sets(root)
        base = "--model nf --data cifar10 --steps 1 --batch-size 2 --evaluate 1"
        images = data.load_cifar10(root, True)[0]
        for flags, sched in (("", schedule.DiffusionSchedule()),
                             ("--beta-schedule linear",
                              schedule.DiffusionSchedule(1000, "linear"))):
            got = trained(root, f"{base} {flags}")
            close(got["model"]["alphas_cumprod"], sched.alphas_cumprod, 1e-6)
            close(got["model"]["field.covariance"], nf_denoiser.pixel_covariance(images), 1e-6)
            assert schedule.DiffusionSchedule(**got["schedule"]).betas.equal(sched.betas)
        got = trained(root, f"{base} --parts unet perceiver")
        assert got["config"]["parts"] == ["unet", "perceiver"]
        net = sample.load_checkpoint(root / "out/nf/checkpoint.pt")[0]
        assert net.field is None and not net.training
        field = trained(root, "--model nf --data cifar10 --parts field --evaluate 2")
        assert field["step"] == 0 and len(field["losses"]) == 0


def test_the_closing_table_is_about_test_images():
    with folder() as root:
        tiny_sets(root)
        for model in ("nf", "dae"):
            name = "cifar10" if model == "nf" else "mnist"
            trained(root, f"--model {model} --data {name} --steps 2 --batch-size 8 --evaluate 5")
            place = root / "out" / model
            results = json.loads((place / "results.json").read_text())["methods"]
            net, got = sample.load_checkpoint(place / "checkpoint.pt")
            if model == "nf":
                images = data.load_cifar10(root, False)[0]
                sched = schedule.DiffusionSchedule()
                expected = sample.evaluate_field(net, sched, images[:5], sampler(sched))
                for method, row in expected.items():
                    close([results[method][key] for key in row], list(row.values()), 1e-5)
                few = sample.evaluate_field(net, sched, images[:100])
                close(got["tests"][1], [2, *(few[name]["psnr"] for name in
                                             ("one-step mean", "kriging"))], 1e-3)  # [0]: of step 1
            else:
                clean = data.load_mnist(root, False)[0].flatten(1).float() / 255
                add = {"clean": lambda x, generator: x, "gaussian 0.3": noise.add_gaussian_noise,
                       "salt_pepper 0.2": noise.add_salt_pepper_noise,
                       "masking 0.3": noise.add_masking_noise}
                for text, corrupt in add.items():
                    noisy = corrupt(clean, generator=seeded())
                    with torch.no_grad():
                        mse = F.mse_loss(net(noisy)[0], clean).item()
                    close(results["left alone"][text], [F.mse_loss(noisy, clean)], 1e-6)
                    close(results["trained on gaussian 0.3"][text], [mse], 1e-6)
                close(got["tests"][-1], [2, *results["trained on gaussian 0.3"]["gaussian 0.3"]],
                      1e-6)
            for picture in ("loss.png", "samples.png"):
                with Image.open(place / picture) as image:
                    assert image.getextrema() != ((255, 255),) * 3


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
    with folder() as root:
        tiny_sets(root)
        for model, flags in (("dae", "--data mnist --batch-size 160 --noise mixed --steps 12"),
                             ("ae", "--data mnist --batch-size 160 --steps 6"),
                             ("nf", "--data cifar10 --batch-size 4 --steps 6 --masks fixed")):
            line = f"--model {model} --data-dir {root} --evaluate 1 {flags} --out {root}"
            assert run(train, f"{line}/whole")[0] == 0
            save = sample.save_checkpoint

            def interrupt(path, checkpoint):
                save(path, checkpoint)
                if checkpoint["step"] == 2:
                    signal.raise_signal(signal.SIGINT)  # Ctrl-C: one more step, then stop

            with patched(train, save_checkpoint=interrupt):
                code, out, err = run(train, f"{line}/parts")
            assert code == 130 and "--resume" in out, err
            assert checkpoint_of(root / "parts" / model)["step"] == 3
            code, out, err = run(train, f"{line}/parts --resume")
            assert code == 0, err
            a, b = (checkpoint_of(root / part / model) for part in ("whole", "parts"))
            for key in ("model", "optimizers", "losses", "step", "tests"):
                x, y = dict(leaves(a[key])), dict(leaves(b[key]))
                assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x), key
            other = ("masks", "fresh") if model == "nf" else ("data", "glyphs")
            for flag, value in (("lr", 0.5), other):
                refused(f"{line}/parts --resume --{flag} {value}", flag, value)
            assert run(train, f"{line}/parts --resume --steps 13")[0] == 0
        shutil.copy(root / "parts/dae/checkpoint.pt", root / "parts/ae")
        refused(f"--model ae --data mnist --data-dir {root} --resume --steps 50 --batch-size 160 "
                f"--out {root}/parts", "model dae -> ae")


def leaves(tree, path=()):
    """(path, tensor) of everything in nested dicts and lists that is a tensor or a number."""
    if isinstance(tree, (dict, list, tuple)):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from leaves(value, (*path, key))
    elif isinstance(tree, (torch.Tensor, float, int)):
        yield path, torch.as_tensor(tree)


def start_training(root, flags, *before):
    """train.py in a process of its own, on one thread; its output goes to root/log."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    command = [sys.executable, *before, str(HERE / "train.py"), "--data-dir", str(root)]
    with open(root / "log", "a") as log:
        return subprocess.Popen([*command, *flags.split()], stdout=log, stderr=subprocess.STDOUT,
                                env=environment, start_new_session=True)


def test_kill_9_at_any_moment_loses_nothing():
    """A run that saves every step is killed again and again: the file on disk always loads."""
    rng, kills = np.random.default_rng(0), 20 if LONG else 2
    with folder() as root:
        tiny_sets(root)
        flags = f"--model dae --data mnist --batch-size 320 --steps {40 * kills} --out {root}"
        assert start_training(root, f"{flags}/whole").wait(200) == 0
        path, resume, killed = root / "parts/dae/checkpoint.pt", "", 0
        while killed < kills:
            seen = path.stat().st_mtime_ns if path.exists() else None
            process = start_training(root, f"{flags}/parts {resume}")
            while process.poll() is None and (not path.exists()
                                              or path.stat().st_mtime_ns == seen):
                time.sleep(0.005)  # until this process has saved something
            time.sleep(rng.uniform(0, 0.15))
            process.kill()
            code = process.wait()
            assert code in (0, -signal.SIGKILL), (root / "log").read_text()
            if code == 0:
                break  # it was done before the signal
            killed, resume = killed + 1, "--resume"
            assert sample.load_checkpoint(path)[1]["step"] >= 1
        assert killed >= min(kills, 2)
        if checkpoint_of(path.parent)["step"] < 40 * kills:
            again = start_training(root, f"{flags}/parts --resume")
            assert again.wait(200) == 0, (root / "log").read_text()
        a, b = (dict(leaves(checkpoint_of(root / part / "dae"))) for part in ("whole", "parts"))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
        assert not list((root / "parts").rglob("*.part"))


def test_two_processes_train_as_one():
    torchrun = "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"
    with folder() as root:
        tiny_sets(root)
        flags = f"--model nf --data cifar10 --batch-size 4 --evaluate 1 --out {root}"
        for name, before in (("one", ()), ("two", torchrun)):
            process = start_training(root, f"{flags}/{name} --steps 1", *before)
            assert process.wait(200) == 0, (root / "log").read_text()
        said = (root / "log").read_text()
        assert said.count("trained in") == said.count("one-step mean") == 2, said  # rank 0 alone
        one, two = (dict(leaves(checkpoint_of(root / name / "nf")["optimizers"]))
                    for name in ("one", "two"))
        moved = [key for key in one if key[-1] in ("momentum", "exp_avg") and one[key].dim()]
        assert len(moved) > 40
        for key in moved:  # after one step these are the gradient and a tenth of it
            close(one[key], two[key], 2e-5)
        # what one process began two go on with; killing one of them ends the job, not with 0
        path = root / "one/nf/checkpoint.pt"
        process = start_training(root, f"{flags}/one --steps 500 --resume",
                                 *torchrun)
        while checkpoint_of(path.parent)["step"] == 1 and process.poll() is None:
            time.sleep(0.1)
        children = [int(p.name) for p in Path("/proc").iterdir()
                    if p.name.isdigit() and parent(p) == process.pid]
        os.kill(children[-1], signal.SIGKILL)
        assert process.wait(100) != 0
        assert sample.load_checkpoint(path)[1]["step"] >= 2
        with patched(os, environ={**os.environ, "WORLD_SIZE": "3", "RANK": "0"}), \
                patched(torch.distributed, init_process_group=lambda *_: None):
            refused(f"{flags} --data-dir {root} --steps 1", "multiple of 6")


def parent(process):
    try:
        return int((process / "stat").read_text().rsplit(")", 1)[1].split()[1])
    except (OSError, IndexError):
        return 0


def test_a_full_disk_or_a_loss_that_is_not_finite_spares_the_checkpoint():
    import resource
    with folder() as root:
        tiny_sets(root)
        line = f"--data mnist --data-dir {root} --out {root}/out --model dae --batch-size 64 --steps"
        assert run(train, f"{line} 2")[0] == 0
        path = root / "out/dae/checkpoint.pt"
        before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
        try:
            refused(f"{line} 4 --resume")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert path.read_bytes() == before
        assert [p.name for p in path.parent.glob("checkpoint*")] == ["checkpoint.pt"]
        refused(f"{line} 4 --out /proc/nowhere")
        with patched(noise, NOISES={**noise.NOISES, "gaussian": (lambda x, *_: x * math.nan, 0.3)}):
            refused(f"{line} 4 --resume", "finite")
        assert path.read_bytes() == before
        refused(f"{line} 1 --lr 1e39 --out {root}/wild", "finite")  # only the weights
        assert not list((root / "wild").rglob("*.pt"))
        assert run(train, f"{line} 4 --resume")[0] == 0


def test_bench_prints_its_measurements():
    with folder() as root:
        tiny_sets(root)
        for model, name in (("nf", "cifar10"), ("ae", "mnist")):
            code, out, err = run(train, f"--model {model} --data {name} --data-dir {root} "
                                        f"--batch-size 4 --bench --out {root}/out")
            assert code == 0, err
            shares = [float(x) for x in re.findall(r"(-?\d+\.\d)%", out)]
            assert len(shares) == 4 and abs(sum(shares) - 100) < 0.3, out
            assert "of the matmul rate" in out
    flop = float(re.search(r"([\d.]+) GFLOP", out)[1])
    close(flop, 1e-9 * (6 * 483_328 - 2 * 784 * 256), 0.6e-3)  # no gradient of the input
    assert not (root / "out" / "ae").exists()


# ----------------------------------------------------------------------------- using the programs


def test_the_newest_checkpoint_is_sampled_and_flags_change_the_picture():
    with folder() as root:
        tiny_sets(root)
        for name, seed, age in (("old", 1, 100), ("new", 2, 0)):
            run(train, f"--model nf --data cifar10 --data-dir {root} --steps 1 --batch-size 2 "
                       f"--evaluate 1 --seed {seed} --out {root}/run/{name}")
            path = root / "run" / name / "nf/checkpoint.pt"
            os.utime(path, (time.time() - age, time.time() - age))
        line = f"--data-dir {root} --out {root}/run --steps 3"
        code, out, err = run(sample, f"{line} --json {root}/f.json --evaluate 40")
        assert code == 0 and "new/nf/checkpoint.pt" in out, (out, err)
        figures = json.loads((root / "f.json").read_text())
        assert figures["data"] == "cifar10" and figures["images"] == 32  # all of the test set
        picture = lambda flags: (run(sample, f"{line} {flags}"),
                                 (root / "run/nf/samples.png").read_bytes())[1]
        base = picture("")
        assert picture("") == base
        for flags in ("--seed 1", "--eta 1", "--steps 2", "--full", "--input-ratio 0.9",
                      f"{root}/run/old/nf/checkpoint.pt"):
            assert picture(flags) != base, flags
        code, out, err = run(sample, f"{line} --gif --scale 2 --samples 3 --evaluate 2")
        assert code == 0 and "central 90%" in out and " 2 images" in out, err
        assert run(sample, f"{line} --export {root}/m.pt")[0] == 0
        with Image.open(root / "run/nf/denoising.gif") as gif:
            assert gif.n_frames >= 3
        for name in ("spread", "scale"):
            assert Image.open(root / "run/nf" / f"{name}.png").size[0] > 100
        whole, half = (sample.load_checkpoint(p)[0].state_dict()
                       for p in (root / "run/new/nf/checkpoint.pt", root / "m.pt"))
        for name, value in whole.items():
            close(half[name], value, 2e-3)
        assert torch.equal(whole["field.covariance"], half["field.covariance"])
        assert torch.load(root / "m.pt")["model"]["perceiver.latents"].dtype == torch.float16
        (root / "again/nf").mkdir(parents=True)
        shutil.copy(root / "m.pt", root / "again/nf/checkpoint.pt")
        code, out, err = run(train, f"--data cifar10 --data-dir {root} --batch-size 2 --resume "
                                    f"--out {root}/again")
        assert code == 1 and "exported" in err, err


def test_a_fine_grid_is_not_transposed():
    split = data.sparse_split(data.make_leaves(1, 3)[0])
    ramp = lambda *_, output_coords, **more: 2 * output_coords[..., :1].expand(-1, -1, 3) - 1
    with patched(sample, one_step_mean=ramp):  # dark left, bright right
        picture = sample.draw_fine(None, None, split, 2)
    pixels = np.asarray(picture.convert("L")).astype(float)
    field = pixels[30:200, 12 + 198:12 + 198 + 192]
    assert field[:, 8:20].mean() < 40 and field[:, -30:-10].mean() > 210, field.mean(0)
    assert field.std(0).mean() < 20


def test_windows_are_blended_and_holes_filled_from_the_rim():
    g = torch.Generator().manual_seed(0)
    # Two windows side by side: sin^2 of the first falls where that of the second rises.
    image, known, seen = torch.zeros(1, 32, 48), torch.rand(32, 48, generator=g) < 0.2, []

    def answer(split):  # windows in the order of their number of given pixels
        seen.append(split)
        return torch.full((len(split["full_image"]), split["output_coords"].shape[1], 1),
                          len(seen) / 4)

    got = sample.restore(image, known, answer)
    first = known[:, :32].sum() < known[:, 16:].sum()
    left, right = (0.25, 0.5) if first else (0.5, 0.25)
    column = np.arange(48)
    weight_left = np.where(column < 32, np.sin(np.pi * (column + 0.5) / 32) ** 2, 0)
    weight_right = np.where(column > 15, np.sin(np.pi * (column - 16 + 0.5) / 32) ** 2, 0)
    mean = (left * weight_left + right * weight_right) / (weight_left + weight_right)
    expected = torch.where(known, 0.0, torch.from_numpy(mean).float())
    close(got[0], expected, 1e-5)
    assert sorted(s["input_coords"].shape[1] for s in seen) == sorted(
        [int(known[:, :32].sum()), int(known[:, 16:].sum())])
    # One window is the answer itself; sizes that no number of windows fits; given pixels stay.
    image = torch.rand(3, 32, 32, generator=g)
    known = torch.rand(32, 32, generator=g) < 0.3
    split = data.sparse_split(image[None], int(known.sum()) / 1024 + 1e-4, None,
                              order=1 - known.flatten()[None].float())
    close(sample.restore(image, known, sample.kriging),
          sample.assemble(split, sample.kriging(split))[0], 1e-6)
    for height, width in ((1, 2), (20, 70), (33, 31)):
        image = torch.rand(3, height, width, generator=g)
        known = torch.rand(height, width, generator=g) < 0.3
        known[0, 0], known[0, 1] = True, False
        got = sample.restore(image, known, lambda s: s["output_values"] * 0 + 0.5)
        assert torch.equal(got[:, known], image[:, known])
        close(got[:, ~known], 0.5 * torch.ones(3, int((~known).sum())), 1e-6)
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
    with folder() as root:
        photo = np.zeros((60, 90, 3), np.uint8)
        photo[:, :45] = 255, 200, 40
        exif = Image.Exif()
        exif[0x0112] = 6  # to be shown turned right by 90 degrees: the left half comes to the top
        Image.fromarray(photo).save(root / "photo.jpg", exif=exif, quality=100, subsampling=0)

        def restored(flags):
            code, out, err = run(sample, f"{sample.SHIPPED} --out {root}/out --image "
                                         f"{root}/{flags}")
            assert code == 0, err
            return out, np.asarray(Image.open(root / "out/nf/restored.png")).astype(int)

        out, image = restored("photo.jpg --input-ratio 0.5")
        assert image.shape == (90, 60, 3) and out.count(" dB") == 3
        assert abs(image[:35] - (255, 200, 40)).max() < 40 and image[-35:].max() < 40
        truth = data.open_picture(root / "photo.jpg")
        assert (image == np.asarray(truth)).all(2).mean() > 0.5  # the given ones, bit by bit
        assert (image == restored("photo.jpg --input-ratio 0.5")[1]).all()  # the seed is fixed
        # Transparent pixels are missing, and so are white ones of a mask: same result.
        mask = np.zeros((60, 90), np.uint8)
        mask[20:30, 30:60] = 255
        Image.fromarray(mask).save(root / "mask.png")
        Image.fromarray(np.dstack([photo, 255 - mask])).save(root / "holes.png")
        Image.fromarray(np.where(mask[..., None] > 0, 7, photo).astype("u1")).save(root / "a.png")
        some = np.where(np.arange(90) < 40, 255 - mask, 255).astype("u1")  # a part is transparent
        Image.fromarray(np.dstack([photo, some])).save(root / "some.png")
        out, image = restored("holes.png")
        assert " dB" not in out and (image == photo)[mask == 0].all()
        assert (image == restored(f"a.png --mask {root}/mask.png")[1]).all()
        assert (image == restored(f"some.png --mask {root}/mask.png")[1]).all()  # either will do
        assert abs(image - photo)[20:30, 30:40].max() < 60  # 7 was not used
        # Grey stays grey; every second pixel of an enlarged picture is the picture.
        grey = data.make_glyphs(1, 0)[0][0, 0].numpy()
        Image.fromarray(grey).save(root / "grey.png")
        out, image = restored("grey.png --upscale 2")
        assert image.shape == (56, 56) and (image[::2, ::2] == grey).all()
        Image.new("RGB", (1500, 40)).save(root / "wide.png")
        out, image = restored("wide.png")
        assert "reduced" in out and image.shape == (27, 1024, 3)[:image.ndim]
        out, image = restored("wide.png --upscale 2")
        assert "512" in out and image.shape == (28, 1024, 3)[:image.ndim]
        code, out, err = run(sample, f"--image {root}/photo.jpg --size 32 --steps 2 --samples 2 "
                                     f"--gif --out {root}/out")
        assert code == 0 and " 1 images" in out and (root / "out/nf/spread.png").exists(), err
        Image.new("RGB", (1, 1)).save(root / "dot.png")
        Image.new("RGBA", (50, 50)).save(root / "nothing.png")
        (root / "cut.png").write_bytes((root / "holes.png").read_bytes()[:90])
        Image.fromarray(np.full((40, 40), 0.5, np.float32)).save(root / "float.tif")
        Image.new("L", (60, 90)).save(root / "black.png")
        before = (root / "out/nf/restored.png").read_bytes()
        for flags, *words in (
                ("a.png --mask MASK/dot.png", "same size"), ("nothing.png", "no pixel"),
                ("a.png --mask MASK/wide.png", "same size"), ("cut.png", "cut.png"),
                ("a.png --mask MASK/mask.png --full", "--size"), (".", "picture"),
                ("a.png --input-ratio 1.5", "--input-ratio"), ("none.png", "none.png"),
                ("photo.jpg --mask MASK/black.png", "no pixel is missing"),
                ("dot.png", "no pixel of the"), ("float.tif", "floating"),
                ("a.png --steps 5", "--size"), ("a.png --size 33", "33"),
                ("a.png --sampler ddim --steps 1001", "1000")):
            flags = flags.replace("MASK", str(root))
            code, out, err = run(sample, f"{sample.SHIPPED} --out {root}/out --image "
                                         f"{root}/{flags}")
            assert code and all(word in err for word in words) and "Trace" not in err, (flags, err)
        assert (root / "out/nf/restored.png").read_bytes() == before
        (root / "out/nf/comparison.png").unlink()
        (root / "out/nf/comparison.png").mkdir()  # cannot be replaced
        os.mkdir(root / "out/nf/.comparison.png")
        code, out, err = run(sample, f"{sample.SHIPPED} --out {root}/out --image {root}/grey.png")
        assert code == 1 and "error: " in err
        assert (root / "out/nf/restored.png").read_bytes() == before


def test_the_shipped_model_is_better_than_kriging():
    model, checkpoint = sample.load_checkpoint(sample.SHIPPED)
    sched = schedule.DiffusionSchedule(**checkpoint["schedule"])
    table = sample.evaluate_field(model, sched, data.make_leaves(24, seed=9)[0])
    assert table["one-step mean"]["psnr"] > table["kriging"]["psnr"] + 0.2, table
    assert sample.SHIPPED.stat().st_size < 6_000_000


def test_a_folder_of_pictures_trains_both_models():
    with folder() as root:
        (root / "photos").mkdir()
        for i, image in enumerate(data.make_leaves(30, 5)[0]):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(root / f"photos/{i}.png")
        for model, size in (("nf", 2), ("dae", 8)):
            code, out, err = run(train, f"--model {model} --data {root}/photos --steps 1 "
                                        f"--batch-size {size} --evaluate 1 --out {root}/out")
            assert code == 0 and "photos" in out, err
        code, out, err = run(sample, f"{root}/out/nf/checkpoint.pt --steps 2 --evaluate 1 "
                                     f"--out {root}/out")
        assert code == 0, err


def test_bad_input_gets_one_line_and_an_exit_code():
    with folder() as root:
        tiny_sets(root)
        (root / "junk.pt").write_bytes(b"junk")
        (root / "empty.pt").write_bytes(b"")
        (root / "photo.png").write_bytes(b"no picture")
        torch.save({"kind": "nf"}, root / "odd.pt")
        torch.save([1, 2], root / "list.pt")
        alien = torch.load(sample.SHIPPED, weights_only=True) | {"kind": "../alien"}
        torch.save(alien, root / "alien.pt")
        c, d = "--data cifar10", f"--data-dir {root} --out {root}/out"
        shipped = str(sample.SHIPPED)
        refused = [  # exit code 1: one line, "error: ..."
            (train, f"--model dae {c} {d}"), (train, f"--batch-size 990 {c} {d}"),
            (train, f"--batch-size 3 {c} {d}"), (train, f"--resume {c} {d}"),
            (train, f"--device warp {d}"), (train, f"--data imagenet {d}"),
            (train, f"--model dae --noise masking --noise-param 7 --data mnist {d}"),
            (train, f"--model dae --noise-param nan --data mnist {d}"),
            (sample, f"{root}/junk.pt {d}"), (sample, f"{root}/empty.pt {d}"),
            (sample, f"{root}/odd.pt {d}"), (sample, f"{root}/list.pt {d}"),
            (sample, f"{root}/alien.pt {d}"),
            (sample, f"{root}/none.pt {d}"), (sample, f"--device warp {d}"),
            (sample, f"--device meta {d}"), (train, f"--parts field --bench {c} {d}"),
            (sample, f"{shipped} --image {root}/photo.png {d}"),
            (sample, f"{shipped} --data mnist {d}"),
            (autoencoder, f"--exercise types {c} {d}"), (data, f"--data nowhere {d}"),
            (schedule, "--timesteps 0"), (schedule, "--timesteps 10000000000")]
        wrong = [  # exit code 2, from argparse
            *((train, flag) for flag in (
                "--model nope", "--steps 0", "--steps -1", "--steps x", "--epochs 0", "--lr nan",
                "--lr 0", "--steps 5 --epochs 5", "--seed -1", "--parts nose", "--parts",
                "--batch-size 0", "--evaluate 0",
                "--size huge", "--model dae --noise mixed --noise-param 1", "--noise masking",
                "--model ae --noise masking", "--model dae --parts unet", "--model ae --size full",
                "--model ae --noise-param 1", "--steps 99999999999",
                "--noise fog", "--masks odd")),
            *((sample, flag) for flag in (
                "--eta 2", "--eta nan", "--scale 0", "--scale 17", "--seed -1", "--evaluate 0",
                "--samples 1", "--sampler ddpm --eta 1", "--sampler ddpm --steps 5",
                "--steps 1001", "--input-ratio 1.1", "--input-ratio nan", "--size 32",
                "--mask x.png", "--upscale 2", "--upscale 0", "--image x.png --gif",
                "--image x.png --size 32 --upscale 2")),
            (autoencoder, "--seeds 0"), (autoencoder, "--epochs 0"), (noise, "--nope"),
            (autoencoder, "--exercise nope"), (data, "--seed x")]
        for expected, lines in ((1, refused), (2, wrong)):
            for module, line in lines:
                code, out, err = run(module, line)
                last = err.strip().split("\n")[-1]
                assert code == expected, (module.__name__, line, code, out, err)
                assert "error: " in last and (expected == 2 or err.count("\n") == 1), (line, err)
        with patched(sample, SHIPPED=root / "none.pt"):
            code, out, err = run(sample, d)
        assert code == 1 and "train.py" in err
        process = subprocess.run([sys.executable, HERE / "sample.py", root / "junk.pt"],
                                 capture_output=True, text=True)
        assert process.returncode == 1 and process.stderr.count("\n") == 1, process.stderr
        assert process.stderr.startswith("error: ")


def test_a_checkpoint_cannot_run_code():
    with folder() as root:
        class Evil:
            def __reduce__(self):
                return os.mkdir, (str(root / "evil"),)

        torch.save({"kind": "nf", "config": Evil()}, root / "evil.pt")
        raises(ValueError, lambda: sample.load_checkpoint(root / "evil.pt"), "evil.pt")
        assert not (root / "evil").exists()


def test_two_hundred_damaged_checkpoints():
    """Each is refused in one line, or loads with exactly the weights that were saved."""
    rng, refused = np.random.default_rng(0), 0
    model = tiny_field(side=8)
    config = dict(nf_denoiser.SIZES["small"], parts=list(nf_denoiser.PARTS), channels=3, side=8)
    with folder() as root:
        path = root / "checkpoint.pt"
        torch.save(dict(kind="nf", step=1, data="leaves", schedule={}, settings={}, config=config,
                        model=model.state_dict()), path)
        original = path.read_bytes()
        for i in range(201):
            path.write_bytes(mutated(original, rng) if i else original)
            try:
                loaded = sample.load_checkpoint(path)[0].state_dict()
                for name, value in model.state_dict().items():
                    assert torch.equal(loaded[name], value), name
            except ValueError as problem:
                assert "\n" not in str(problem) and i > 0
                refused += 1
    assert refused > 100, refused


def test_every_device_trains_samples_and_evaluates():
    kinds = ["cpu"] + ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.mps.is_available()
    with folder() as root:
        tiny_sets(root)
        for device in kinds:
            for model, name in (("nf", "cifar10"), ("dae", "mnist")):
                code, out, err = run(train, f"--model {model} --data {name} --data-dir {root} "
                                            f"--steps 1 --batch-size 4 --evaluate 2 --out "
                                            f"{root}/{device} --device {device}")
                assert code == 0 and f"| {device}" in out, err


def test_the_readmes_commands_parse():
    text = (HERE / "README.md").read_text()
    commands = re.findall(r"(?:python|torchrun[^\n`#|]*?) (\w+)\.py([^\n`#|&)]*)", text)
    assert len(commands) >= 10
    modules = {m.__name__: m for m in (autoencoder, data, nf_denoiser, noise, sample, schedule,
                                       train)}

    class Parsed(Exception):
        pass

    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, *args, **kwargs):
        parse(self, *args, **kwargs)
        raise Parsed

    with patched(argparse.ArgumentParser, parse_args=parse_and_stop):
        for name, flags in commands:
            if name in modules:
                try:
                    code, _, err = run(modules[name], flags.strip().rstrip(".,;:"))
                    raise AssertionError(f"python {name}.py{flags}: {err}")
                except Parsed:
                    pass


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
    assert denoiser["loss"] < 0.15 and denoiser["latents"].shape == (64, 64)
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
