"""Evidence that the other files do what they say: python test_all.py (or pytest test_all.py, if you have it).

Every claim is held against something that this project did not write: closed forms, brute force in float64, numpy,
files built byte by byte. Offline, under three minutes on two cores. `python test_all.py NAME` runs the tests whose
names contain NAME; --long repeats what takes its time (20 kills instead of 2).
"""
import argparse
import contextlib
import gzip
import hashlib
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
import types
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # exact claims are made about the CPU; must stand before torch is imported
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import autoencoder
import data
import nf_denoiser
import noise
import sample
import schedule
import train

HERE = Path(__file__).resolve().parent
LONG = "--long" in sys.argv


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
    a, b = torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64)
    assert a.shape == b.shape or b.dim() == 0 or a.dim() == 0, f"shapes {tuple(a.shape)} and {tuple(b.shape)}"
    worst = (a - b).abs().max().item()
    assert worst <= tolerance, f"differ by {worst:.3g}, more than {tolerance:.3g}"


def run_main(module, line):
    """Run a script's main() in this process as the command line would: (exit code, stdout, stderr)."""
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = [module.__name__ + ".py", *shlex.split(line)]
    code = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                module.main()
            except (ValueError, OSError) as problem:  # as the last lines of every script do
                module.fail(problem)
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        sys.argv = argv
    return code, out.getvalue(), err.getvalue()


def small_sets(root, count=256):
    """Small built-in sets where the loaders look for the big ones, so that tests need not wait for 20,000 images."""
    (root / "built-in").mkdir(parents=True)
    for name, make in (("leaves", data.make_leaves), ("glyphs", data.make_glyphs)):
        for split, seed in (("train", 11), ("test", 12)):
            images, labels = make(count, seed)
            np.savez(root / "built-in" / f"{name}-{split}.npz", images=images.numpy(), labels=labels.numpy())


def tiny_field(channels=3, **options):
    torch.manual_seed(0)
    return nf_denoiser.NFDenoiser(channels, channels, **{**dict(num_latents=8, latent_dim=32, num_fourier_feats=8,
                                  num_blocks=1, num_heads=2, dropout=0.0, widths=(8, 8)), **options}).eval()


def random_problem(batch=2, n_in=30, n_out=20, channels=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(batch, n_out, channels, generator=g), torch.rand(batch, n_out, 2, generator=g),
            torch.randint(0, 1000, (batch,), generator=g), torch.rand(batch, n_in, 2, generator=g),
            torch.rand(batch, n_in, channels, generator=g) * 2 - 1)


# ------------------------------------------------------------------------------------------------------ schedule


def test_cosine_schedule_is_the_papers_formula():
    T, s = 1000, 0.008
    f = lambda t: math.cos((t / T + s) / (1 + s) * math.pi / 2) ** 2
    betas = schedule.cosine_beta_schedule(T)
    for t in (1, 2, 10, 500, 900, 999, 1000):
        close(betas[t - 1], min(max(1 - f(t) / f(t - 1), 0.0001), 0.9999), 1e-12)
    assert betas.min() >= 0.0001 and betas.max() == 0.9999


def test_linear_schedule_and_bad_arguments():
    betas = schedule.linear_beta_schedule(1000)
    close(betas[[0, 999]], [0.0001, 0.02], 1e-12)
    close(betas[1:] - betas[:-1], (0.02 - 0.0001) / 999, 1e-12)
    raises(ValueError, lambda: schedule.linear_beta_schedule(0), "0")
    raises(ValueError, lambda: schedule.DiffusionSchedule(10, "sqrt"), "sqrt")


def test_schedule_constants_against_numpy():
    for name in ("cosine", "linear"):
        s = schedule.DiffusionSchedule(300, name)
        beta = (schedule.cosine_beta_schedule(300) if name == "cosine" else schedule.linear_beta_schedule(300)).numpy()
        bar = np.cumprod(1 - beta)
        prev = np.append(1, bar[:-1])
        expected = dict(betas=beta, alphas=1 - beta, alphas_cumprod=bar, alphas_cumprod_prev=prev, sqrt_alphas_cumprod=bar**0.5,
                        sqrt_one_minus_alphas_cumprod=(1 - bar) ** 0.5, sqrt_recip_alphas_cumprod=bar**-0.5,
                        sqrt_recipm1_alphas_cumprod=(1 / bar - 1) ** 0.5, posterior_variance=beta * (1 - prev) / (1 - bar))
        for key, value in expected.items():
            got = getattr(s, key)
            assert got.dtype == torch.float32, key
            assert np.allclose(got.double().numpy(), value, rtol=1e-6, atol=1e-12), key
        assert np.allclose(s.posterior_log_variance[1:].numpy(), np.log(expected["posterior_variance"][1:]), rtol=1e-5)
        assert torch.isfinite(s.posterior_log_variance).all()


def test_forward_process_moments():
    s, g = schedule.DiffusionSchedule(), torch.Generator().manual_seed(0)
    noise_ = torch.randn(400_000, generator=g)
    for t in (50, 500, 950):
        bar = float(np.prod(1 - schedule.cosine_beta_schedule(1000)[: t + 1].numpy()))
        x_t = s.q_sample(torch.full_like(noise_, 0.7), t, noise_)
        close(x_t.mean(), 0.7 * bar**0.5, 0.006)
        close(x_t.var(), 1 - bar, 0.008)
        close(s.predict_eps(x_t, t, torch.full_like(noise_, 0.7)), noise_, 2e-3)


def test_steps_take_one_timestep_or_one_for_each_item():
    s, g = schedule.DiffusionSchedule(100), torch.Generator().manual_seed(0)
    x, x_0, eps = torch.randn(3, 3, 5, 2, generator=g)
    t = torch.tensor([3, 50, 99])
    for call in (lambda x, x_0, t, eps: s.q_sample(x_0, t, eps), lambda x, x_0, t, eps: s.ddim_step(x, x_0, t, t - 2, 0.7, eps),
                 lambda x, x_0, t, eps: s.ddpm_step(x, x_0, t, eps)):
        batch = call(x, x_0, t, eps)
        for i in range(3):
            close(batch[i], call(x[i], x_0[i], int(t[i]), eps[i]), 1e-6)


def test_ddpm_posterior_against_brute_force_bayes():
    """q(x_{t-1} | x_t, x_0) by numerical integration of q(x_t | x_{t-1}) q(x_{t-1} | x_0) on a fine grid."""
    s, betas = schedule.DiffusionSchedule(50), schedule.cosine_beta_schedule(50).numpy()
    bars = np.cumprod(1 - betas)
    grid = np.linspace(-8, 8, 400_001)
    for t, x_0, x_t in ((1, 0.5, 0.2), (10, -0.8, 1.1), (30, 0.3, -1.7), (48, 0.9, 0.4)):
        log_p = -((x_t - math.sqrt(1 - betas[t]) * grid) ** 2) / (2 * betas[t])
        log_p -= (grid - math.sqrt(bars[t - 1]) * x_0) ** 2 / (2 * (1 - bars[t - 1]))
        p = np.exp(log_p - log_p.max())
        p /= p.sum()
        mean = (p * grid).sum()
        std = math.sqrt((p * (grid - mean) ** 2).sum())
        one = torch.ones(1)
        close(s.ddpm_step(x_t * one, x_0 * one, t, 0 * one), [mean], 2e-5)
        close(s.ddpm_step(x_t * one, x_0 * one, t, one), [mean + std], 4e-5)
    close(s.ddpm_step(x_t * one, 0.9 * one, 0, one), [0.9], 1e-6)  # the last step has no noise


def test_samplers_recover_a_gaussian():
    """With data ~ N(mu, s2) the best x0-prediction is known, so that a right sampler must give back mu and s2."""
    mu, s2, T = 0.4, 0.3, 1000
    sched = schedule.DiffusionSchedule(T)

    def exact(x_t, output_coords, t, input_coords, input_values):
        bar = sched.alphas_cumprod[t].view(-1, 1, 1)
        return mu + s2 * bar.sqrt() / (bar * s2 + 1 - bar) * (x_t - bar.sqrt() * mu)

    coords, given = torch.zeros(4, 5000, 2), (torch.zeros(4, 1, 2), torch.zeros(4, 1, 1))
    g = torch.Generator().manual_seed(0)
    runs = {f"ddim eta {eta}": sample.ddim_sample(exact, sched, coords, *given, num_steps=T, eta=eta, generator=g)
            for eta in (0.0, 0.5, 1.0)}
    runs["ddpm"] = sample.ddpm_sample(exact, sched, coords, *given, generator=g)
    for name, x in runs.items():
        assert abs(x.mean() - mu) < 0.015, f"{name}: mean {x.mean():.4f}, not {mu}"
        assert abs(x.var() - s2) < 0.012, f"{name}: variance {x.var():.4f}, not {s2}"
    few = sample.ddim_sample(exact, sched, coords, *given, num_steps=50, generator=g)
    assert abs(few.mean() - mu) < 0.02 and abs(few.var() - s2) < 0.03


def test_ddim_with_eta_1_on_consecutive_steps_is_ddpm():
    for name in ("cosine", "linear"):
        s, g = schedule.DiffusionSchedule(100, name), torch.Generator().manual_seed(1)
        for t in (0, 1, 2, 40, 98, 99):
            x_t, x_0, eps = torch.randn(3, 50, generator=g)
            close(s.ddim_step(x_t, x_0, t, t - 1, 1.0, eps), s.ddpm_step(x_t, x_0, t, eps), 2e-4)


def test_ddim_steps_end_at_the_prediction_and_keep_the_marginal():
    s, g = schedule.DiffusionSchedule(), torch.Generator().manual_seed(2)
    x_0, eps, new = torch.randn(3, 200_000, generator=g)
    x_t = s.q_sample(x_0, 700, eps)
    close(s.ddim_step(x_t, x_0, 700, -1, 1.0, new), x_0, 1e-6)
    for eta in (0.0, 0.5, 1.0):  # given the true x_0, x_next - sqrt(alpha_bar) x_0 must have variance 1 - alpha_bar
        bar = s.alphas_cumprod[300]
        rest = s.ddim_step(x_t, x_0, 700, 300, eta, new) - bar.sqrt() * x_0
        close(rest.var(), 1 - bar, 0.006)


def test_timesteps():
    s = schedule.DiffusionSchedule(37)
    for n in range(1, 38):
        steps = s.timesteps(n).tolist()
        assert len(set(steps)) == n and steps == sorted(steps, reverse=True) and steps[0] == 36
        assert n == 1 or steps[-1] == 0
    for n in (0, 38, -1):
        raises(ValueError, lambda: s.timesteps(n), 37, n)


# --------------------------------------------------------------------------------------------------------- noise


def test_noise_statistics():
    g = torch.Generator().manual_seed(0)
    grey = torch.full((100, 1, 40, 40), 0.5)
    gaussian = noise.add_gaussian_noise(grey, 0.1, g) - grey
    close(gaussian.mean(), 0, 0.001)
    close(gaussian.std(), 0.1, 0.001)
    assert noise.add_gaussian_noise(grey, 2.0, g).min() == 0 and noise.add_gaussian_noise(grey, 2.0, g).max() == 1
    spiced = noise.add_salt_pepper_noise(grey, 0.2, g)
    close(torch.stack([(spiced == v).float().mean() for v in (0, 0.5, 1)]), [0.1, 0.8, 0.1], 0.003)
    masked = noise.add_masking_noise(grey, 0.3, g)
    close(torch.stack([(masked == v).float().mean() for v in (0, 0.5)]), [0.3, 0.7], 0.004)


def test_noise_leaves_its_input_alone_and_obeys_its_seed():
    x = torch.rand(16, 1, 28, 28)
    before = x.clone()
    for add in (noise.add_gaussian_noise, noise.add_salt_pepper_noise, noise.add_masking_noise, noise.add_mixed_noise):
        a, b, c = (add(x, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
        assert torch.equal(x, before) and torch.equal(a, b) and not torch.equal(a, c)
        assert a.shape == x.shape and a.dtype == x.dtype and a.min() >= 0 and a.max() <= 1
    for add in (noise.add_gaussian_noise, noise.add_salt_pepper_noise, noise.add_masking_noise):
        assert torch.equal(add(x, 0.0), x)


def test_noise_on_colour_spoils_whole_pixels():
    x = torch.full((8, 3, 20, 20), 0.5)
    hit = noise.add_masking_noise(x, 0.4) == 0
    assert torch.equal(hit[:, 0], hit[:, 1]) and torch.equal(hit[:, 0], hit[:, 2]) and 0.3 < hit.float().mean() < 0.5


def test_mixed_noise_uses_all_three_kinds():
    x = torch.full((600, 1, 16, 16), 0.5)
    y = noise.add_mixed_noise(x, torch.Generator().manual_seed(0)).flatten(1)
    has = lambda value: (y == value).any(1)
    gaussian, masked = ((y != 0.5).float().mean(1) > 0.9), has(0) & ~has(1)
    spiced = ~gaussian & has(1)
    for kind in (gaussian, masked & ~gaussian, spiced):
        assert 0.26 < kind.float().mean() < 0.41, kind.float().mean()
    strength = (y[masked & ~gaussian] == 0).float().mean(1)
    assert strength.min() < 0.2 and strength.max() > 0.5  # and every image has its own


def test_noise_refuses_nonsense():
    x = torch.rand(2, 1, 4, 4)
    raises(ValueError, lambda: noise.add_gaussian_noise(x, -0.1), "-0.1")
    raises(ValueError, lambda: noise.add_gaussian_noise(x, float("nan")), "nan")
    raises(ValueError, lambda: noise.add_salt_pepper_noise(x, 1.5), "1.5")
    raises(ValueError, lambda: noise.add_masking_noise((x * 255).byte(), 0.3), "uint8")


# ---------------------------------------------------------------------------------------------------------- data


def write_cifar10(root, counts, seed=0):
    rng, folder_ = np.random.default_rng(seed), root / "cifar-10-batches-bin"
    folder_.mkdir(parents=True, exist_ok=True)
    written = {}
    for name, count in counts.items():
        records = rng.integers(0, 256, (count, 3073), dtype=np.uint8)
        records[:, 0] %= 10
        (folder_ / name).write_bytes(records.tobytes())
        written[name] = records
    return written


def idx_bytes(array):
    return struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape) + array.tobytes()


def write_mnist(root, count, prefix="t10k", zipped=True, seed=0):
    rng, folder_ = np.random.default_rng(seed), root / "MNIST" / "raw"
    folder_.mkdir(parents=True, exist_ok=True)
    images, labels = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8), rng.integers(0, 10, count, dtype=np.uint8)
    for name, array in (("images-idx3", images), ("labels-idx1", labels)):
        content = idx_bytes(array)
        path = folder_ / f"{prefix}-{name}-ubyte{'.gz' if zipped else ''}"
        path.write_bytes(gzip.compress(content) if zipped else content)
    return images, labels


def test_cifar10_round_trip():
    with folder() as root, contextlib.redirect_stdout(io.StringIO()) as said:
        batches = {f"data_batch_{i}.bin": 3 for i in range(1, 6)}
        written = write_cifar10(root, {**batches, "test_batch.bin": 7})
        images, labels = data.load_cifar10(root, train=True)
        assert images.shape == (15, 3, 32, 32) and images.dtype == labels.dtype == torch.uint8
        record = written["data_batch_2.bin"][1]  # the fifth image
        assert labels[4] == record[0]
        assert images[4, 1, 5, 9] == record[1 + 1024 + 5 * 32 + 9]  # green, row 5, column 9
        assert len(data.load_cifar10(root, train=False)[0]) == 7
    assert "test_batch.bin: 7 of 10,000 images" in said.getvalue()


def test_cifar10_damage_is_refused():
    with folder() as root:
        path = root / "cifar-10-batches-bin" / "test_batch.bin"
        good = write_cifar10(root, {"test_batch.bin": 4})["test_batch.bin"].tobytes()
        bad_label = bytearray(good)
        bad_label[3073] = 10
        for content in (b"", good[:-1], good + b"x", bytes(bad_label), good[:3073] * 10_001):
            path.write_bytes(content)
            raises(ValueError, lambda: data.load_cifar10(root, train=False), path, "expected", "found", "delete")


def test_mnist_round_trip_zipped_or_not():
    for zipped in (True, False):
        with folder() as root:
            images, labels = write_mnist(root, 5, zipped=zipped)
            got, got_labels = data.load_mnist(root, train=False)
            assert got.shape == (5, 1, 28, 28) and np.array_equal(got[:, 0].numpy(), images)
            assert np.array_equal(got_labels.numpy(), labels) and got.dtype == got_labels.dtype == torch.uint8


def test_mnist_damage_is_refused():
    with folder() as root:
        images, labels = write_mnist(root, 6)
        path = root / "MNIST" / "raw" / "t10k-images-idx3-ubyte.gz"
        packed, plain = path.read_bytes(), idx_bytes(images)
        flipped = bytearray(packed)
        flipped[len(packed) // 2] ^= 0xFF
        damaged = [b"", b"no gzip at all", packed[:-20], bytes(flipped), gzip.compress(b""), gzip.compress(plain[:-1]),
                   gzip.compress(plain + b"x"), gzip.compress(b"\x00\x00\x08\x01" + plain[4:]), gzip.compress(plain[:9]),
                   gzip.compress(idx_bytes(images[:, :27])), gzip.compress(b"\0" * 60_000_000)]
        for content in damaged:
            path.write_bytes(content)
            raises(ValueError, lambda: data.load_mnist(root, train=False), path, "expected", "found", "delete")
        path.write_bytes(gzip.compress(idx_bytes(images[:5])))
        raises(ValueError, lambda: data.load_mnist(root, train=False), "5", "6", "labels")


def patched(module, **values):
    """Set attributes of a module for the length of a `with`."""
    @contextlib.contextmanager
    def manager():
        old = {name: getattr(module, name) for name in values}
        for name, value in values.items():
            setattr(module, name, value)
        try:
            yield
        finally:
            for name, value in old.items():
                setattr(module, name, value)
    return manager()


def test_download_takes_only_the_expected_members():
    with folder() as root, contextlib.redirect_stdout(io.StringIO()):
        batch = np.zeros((10_000, 3073), np.uint8).tobytes()
        source = root / "source.tar.gz"
        with tarfile.open(source, "w:gz", compresslevel=1) as tar:
            def add(name, content=batch, **more):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                for key, value in more.items():
                    setattr(info, key, value)
                tar.addfile(info, io.BytesIO(content))
            add("cifar-10-batches-bin/test_batch.bin")
            add("../evil.txt", b"x")
            add("cifar-10-batches-bin/readme.html", b"x")
            add("cifar-10-batches-bin/data_batch_1.bin", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")
            add("cifar-10-batches-bin/data_batch_2.bin", b"too short")
        md5 = hashlib.md5(source.read_bytes()).hexdigest()
        with patched(data, CIFAR10_URLS=[source.as_uri()], CIFAR10_MD5=md5):
            images, labels = data.load_cifar10(root / "data", train=False)
        assert len(images) == 10_000
        files = sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file() or p.is_symlink())
        assert files == ["data/cifar-10-batches-bin/test_batch.bin", "source.tar.gz"], files


def test_download_tries_the_next_address_and_checks_what_it_gets():
    with folder() as root, contextlib.redirect_stdout(io.StringIO()):
        write_mnist(root / "good", 5)
        write_mnist(root / "bad", 5, seed=1)
        raw = [root / name / "MNIST" / "raw" for name in ("missing", "bad", "good")]
        sums = {p.name[:-3]: hashlib.sha256(gzip.decompress(p.read_bytes())).hexdigest() for p in raw[2].iterdir()}
        urls = [r.as_uri() + "/" for r in raw]
        with patched(data, MNIST_URLS=urls, MNIST_SHA256=sums):
            assert len(data.load_mnist(root / "data", train=False)[0]) == 5
        with patched(data, MNIST_URLS=urls[:2], MNIST_SHA256=sums):
            raises(data.Unavailable, lambda: data.load_mnist(root / "data2", train=False), "SHA-256", "missing")
        assert not [p for p in (root / "data2").rglob("*") if p.is_file()]  # nothing half-done is left


def test_without_a_network_auto_falls_back_loudly_and_a_named_set_fails():
    closed = ["https://127.0.0.1:9/"]
    with folder() as root, patched(data, MNIST_URLS=closed, CIFAR10_URLS=closed):
        small_sets(root)
        with contextlib.redirect_stdout(io.StringIO()) as said:
            start = time.time()
            assert data.load_dataset("auto", root, True, real="mnist")[0] == "glyphs"
            assert data.load_dataset("auto", root, True, real="cifar10")[0] == "leaves"
            assert time.time() - start < 10
        assert said.getvalue().count("***") == 4
        raises(data.Unavailable, lambda: data.load_dataset("cifar10", root, True), "leaves", "127.0.0.1")
        (root / "cifar-10-batches-bin").mkdir()
        (root / "cifar-10-batches-bin" / "test_batch.bin").write_bytes(b"damaged")
        raises(ValueError, lambda: data.load_dataset("auto", root, False), "test_batch.bin")  # never papered over


def test_a_connection_that_never_answers_is_given_up():
    import socket
    with socket.socket() as silent, patched(data, NO_NETWORK_SECONDS=1), folder() as root:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        start = time.time()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        raises(data.Unavailable, lambda: data.download([url, url], root / "file", lambda path: None))
        assert time.time() - start < 2.5


def test_built_in_sets():
    for make, shape, classes in ((data.make_leaves, (3, 32, 32), 1), (data.make_glyphs, (1, 28, 28), 10)):
        a, labels = make(300, seed=1)
        b, c = make(300, seed=1)[0], make(300, seed=2)[0]
        assert a.shape == (300, *shape) and a.dtype == labels.dtype == torch.uint8 and labels.unique().numel() == classes
        assert torch.equal(a, b)
        seen = {image.numpy().tobytes() for image in a}
        assert len(seen) > 290 and not seen & {image.numpy().tobytes() for image in c}
        assert 30 < a.float().std() < 110


def test_a_damaged_cache_is_made_again():
    with folder() as root, patched(data, BUILT_IN={"glyphs": (data.make_glyphs, 50, 20)}):
        images = data.load_built_in("glyphs", root, train=False)[0]
        path = root / "built-in" / "glyphs-test.npz"
        for content in (b"", b"junk", path.read_bytes()[:-50], path.read_bytes()[:200]):
            path.write_bytes(content)
            assert torch.equal(data.load_built_in("glyphs", root, train=False)[0], images)
        assert [p.name for p in path.parent.iterdir()] == ["glyphs-test.npz"]


def test_sparse_split():
    images = torch.randint(0, 256, (50, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    s = data.sparse_split(images, generator=torch.Generator().manual_seed(1))
    assert s["input_coords"].shape == s["output_coords"].shape == (50, 204, 2) and s["input_values"].shape == (50, 204, 3)
    for b in range(50):
        chosen = torch.cat([s["input_indices"][b], s["output_indices"][b]]).tolist()
        assert len(set(chosen)) == 408  # never the same pixel twice
    for side in ("input", "output"):
        i = int(s[f"{side}_indices"][7, 13])
        x, y = i % 32, i // 32
        close(s[f"{side}_coords"][7, 13], [x / 31, y / 31], 1e-6)
        close(s[f"{side}_values"][7, 13], images[7, :, y, x].double() / 255 * 2 - 1, 1e-6)
    close((s["full_image"] + 1) / 2 * 255, images.double(), 1e-4)
    often = torch.zeros(1024).scatter_add_(0, s["input_indices"].flatten(), torch.ones(50 * 204)) / 50
    close(often.mean(), 204 / 1024, 1e-6)
    assert often.max() < 0.5 and often.min() > 0.0
    assert data.sparse_split(images, 0.2, None)["output_indices"].shape[1] == 820
    floats = images.float() / 255
    assert torch.equal(data.sparse_split(floats)["full_image"], floats)
    for ratios in ((0, 0.2), (0.2, 0), (0.6, 0.5), (-0.1, 0.2), (0.0001, 0.2), (float("nan"), 0.2), (1.0, 0.2)):
        raises(ValueError, lambda: data.sparse_split(images, *ratios), ratios[0])


def test_fixed_masks_belong_to_the_image_and_fresh_ones_do_not():
    images = torch.randint(0, 256, (300, 1, 28, 28), dtype=torch.uint8)
    split = lambda seed, index: data.sparse_split(images[index], keys=data.fixed_keys(seed, index, 784))["input_indices"]
    everything = split(5, torch.arange(300))
    assert len({tuple(split(seed, torch.arange(1))[0].tolist()) for seed in (0, 1, 7000, 2**31 - 1)}) == 4
    shuffled = torch.randperm(300)
    assert torch.equal(split(5, shuffled), everything[shuffled])  # another batch, another order: the same masks
    assert not torch.equal(split(6, torch.arange(300)), everything)
    assert len({tuple(sorted(row.tolist())) for row in everything}) == 300
    often = torch.zeros(784).scatter_add_(0, everything.flatten(), torch.ones(everything.numel())) / 300
    spread = (often - 156 / 784).pow(2).mean().sqrt()  # binomial: sqrt(0.199 * 0.801 / 300) = 0.023
    assert 0.018 < spread < 0.028, spread
    fresh = [data.sparse_split(images[:2])["input_indices"] for _ in range(2)]
    assert not torch.equal(*fresh)


def test_scatter_and_grid():
    s = data.sparse_split(torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8), 0.25, None)
    image = data.scatter_pixels(s["input_indices"], s["input_values"], (3, 3, 8, 8), -1.0)
    image = data.scatter_pixels(s["output_indices"], s["output_values"], (3, 3, 8, 8), image)
    assert torch.equal(image, s["full_image"])
    tile = torch.zeros(3, 4, 4)
    tile[0, 1, 2] = 1  # one red pixel in row 1, column 2
    grid = np.asarray(data.image_grid([[tile, tile]], zoom=5))
    red = np.argwhere((grid == [255, 0, 0]).all(-1))
    assert len(red) == 50 and red[:, 0].max() - red[:, 0].min() == 4


# ------------------------------------------------------------------------------------------------- neural field


def test_attention_against_a_plain_softmax():
    torch.manual_seed(0)
    layer, x, context = nf_denoiser.Attention(12, 3).double(), torch.randn(2, 5, 12).double(), torch.randn(2, 7, 12).double()
    q, (k, v) = layer.to_q(x), layer.to_kv(context).chunk(2, -1)
    expected = torch.zeros(2, 5, 12, dtype=torch.float64)
    for b in range(2):
        for h in range(3):
            c = slice(4 * h, 4 * h + 4)
            for i in range(5):
                logits = [(q[b, i, c] @ k[b, j, c]).item() / 2 for j in range(7)]
                weights = np.exp(np.array(logits) - max(logits))
                expected[b, i, c] = torch.from_numpy(weights / weights.sum()) @ v[b, :, c]
    close(layer(x, context), layer.to_out(expected), 1e-12)
    some = torch.tensor([True, False, True, True, False, True, False])  # a bias of -infinity takes a part out altogether
    bias = torch.zeros(2, 1, 1, 7).double().masked_fill(~some, -math.inf)
    close(layer(x, context, bias), layer(x, context[:, some]), 1e-12)


def test_fourier_features_and_time_embedding():
    f = nf_denoiser.FourierFeatures(5)
    out = f(torch.tensor([[0.3, 0.9]]))
    for j in range(5):
        angle = 2 * math.pi * (0.3 * f.B[0, j].item() + 0.9 * f.B[1, j].item())
        close(out[0, [j, 5 + j]], [math.sin(angle), math.cos(angle)], 1e-5)
    e = nf_denoiser.SinusoidalTimeEmbedding(8)(torch.tensor([0, 7]))
    close(e[0], [0, 0, 0, 0, 1, 1, 1, 1], 0)
    close(e[1, [0, 4, 1]], [math.sin(7), math.cos(7), math.sin(0.7)], 1e-6)
    raises(ValueError, lambda: nf_denoiser.SinusoidalTimeEmbedding(7), 7)


def test_field_ignores_input_order_and_follows_output_order():
    model, (x, out, t, coords, values) = tiny_field(), random_problem()
    with torch.no_grad():
        base = model(x, out, t, coords, values)
        p, q = torch.randperm(30), torch.randperm(20)
        close(model(x, out, t, coords[:, p], values[:, p]), base, 2e-5)
        close(model(x[:, q], out[:, q], t, coords, values), base[:, q], 2e-5)
    assert base.shape == (2, 20, 3)


def test_field_takes_any_number_of_pixels_channels_and_places():
    with torch.no_grad():
        for channels, n_in, n_out in ((1, 1, 1), (3, 1, 7), (1, 50, 3), (3, 204, 204)):
            x, out, t, coords, values = random_problem(3, n_in, n_out, channels)
            y = tiny_field(channels)(x, out, t, coords, values)
            assert y.shape == (3, n_out, channels) and torch.isfinite(y).all()
        model, (x, out, t, coords, values) = tiny_field(), random_problem()
        for corner in (0.0, 1.0):
            assert torch.isfinite(model(x, torch.full_like(out, corner), t, coords, values)).all()
        raises(ValueError, lambda: model(x, out, t, coords[:, :0], values[:, :0]), "at least one input")
        raises(ValueError, lambda: model(x, out[:, :3], t, coords, values), "matching")
    raises(ValueError, lambda: tiny_field(num_heads=3), 32, 3)


def test_time_marker_and_x_t_reach_the_network():
    """The learned part alone (its answer relative to the Gaussian field's) must feel each of the three."""
    model, (x, out, _, coords, values) = tiny_field(), random_problem()
    torch.nn.init.normal_(model.perceiver.to_values.weight)
    seen = []
    decode = model.perceiver.decode
    model.perceiver.decode = lambda queries, latents: (seen.append((queries, latents)), decode(queries, latents))[1]
    t = torch.tensor([400, 600])
    with torch.no_grad():
        moved = x.clone()
        moved[:, 4] += 1  # the noisy value of one output pixel: its own query must change, and not through the Gaussian field
        for values_ in (x, moved):
            model(values_, out, t, coords, values, pure_noise=True)
        assert (seen[1][0] - seen[0][0])[:, 4].abs().max() > 0.01 and torch.equal(seen[1][0][:, 5:], seen[0][0][:, 5:])
        seen.clear()
        model(x, out, t, coords, values)
        model(moved, out, t, coords, values)
        (q0, l0), (q1, l1) = seen
        assert (q1 - q0)[:, 4].abs().min(dim=0)[0].max() > 0.01 and (l1 - l0).abs().max() > 1e-6
        model.embed_time[0].frequencies[40:] += 0.01  # the slow end of the embedding: not only its first channels count
        model(x, out, t, coords, values)
        assert (seen[-1][1] - l0).abs().max() > 1e-5
        model.marker.data = model.marker.data.flip(0)
        swapped = len(seen)
        model(x, out, t, coords, values)
        assert (seen[swapped][1] - seen[swapped - 1][1]).abs().max() > 1e-5


def test_every_weight_learns():
    model = tiny_field().train()
    x, out, t, coords, values = random_problem()
    model(x, out, t, coords, values).square().mean().backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not still, still


def numpy_covariance(a, b):
    return np.exp(-np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1)) * 31 / 16)


def test_kriging_against_numpy():
    _, out, _, coords, values = random_problem(n_in=60, seed=3)
    got = nf_denoiser.kriging(out, coords, values)
    for b in range(2):
        c, o, v = (a[b].double().numpy() for a in (coords, out, values))
        mean = v.mean(0)
        expected = mean + numpy_covariance(o, c) @ np.linalg.solve(numpy_covariance(c, c) + 1e-3 * np.eye(60), v - mean)
        close(got[b], torch.from_numpy(expected), 2e-4)


def test_gaussian_field_against_the_textbook_posterior():
    """E[x_0 | x_in, x_t] by one dense solve with all observations, in numpy and float64."""
    x_t, out, _, coords, values = random_problem(n_in=40, n_out=25, seed=4)
    bars = torch.tensor([0.9, 0.05])
    field = nf_denoiser.GaussianField(coords.double(), values.double(), out.double())
    w_in, w_out = field.condition(x_t.double(), bars.double())
    field.prepare()
    for once, each in zip(field.condition(x_t.double(), bars.double()), (w_in, w_out)):
        close(once, each, 1e-8)  # a sampler's shortcut gives the same
    for b in range(2):
        c, o, v, x = (a[b].double().numpy() for a in (coords, out, values, x_t))
        bar, m = bars[b].double().item(), v.mean(0)
        y = np.linalg.solve(numpy_covariance(c, c) + 1e-3 * np.eye(40), v - m)
        both = np.concatenate([c, o])
        for channel in range(3):  # each has a variance of its own, and so a noise of its own
            variance = (((v - m) * y).sum(0)[channel] + 2 * 0.05) / 42
            K = numpy_covariance(both, both) + np.diag(np.r_[np.full(40, 1e-3), np.full(25, (1 - bar) / bar / variance)])
            weights = np.linalg.solve(K, np.concatenate([v - m, x / bar**0.5 - m])[:, channel])
            close(torch.cat([w_in, w_out], 1)[b, :, channel], torch.from_numpy(weights), 1e-7)


def numpy_waves(coords, side=32):
    """All cosine waves at coords (N, 2) in [0, 1], written out: (N, side, side), first axis up and down."""
    position, k = coords * (side - 1) + 0.5, np.arange(side)
    norm = np.where(k == 0, 1 / side, 2 / side) ** 0.5
    x, y = (norm * np.cos(np.pi * position[:, i, None] * k / side) for i in (0, 1))
    return y[:, :, None] * x[:, None, :]


def test_the_measured_field_against_numpy():
    """Power spectrum, covariance (on the lattice and off it), and the mean at any place, from the formula of the waves."""
    rng, side = np.random.default_rng(0), 32
    deviation = 40 / (1 + np.add.outer(np.arange(side), np.arange(side)))
    grid = np.stack(np.meshgrid(np.arange(side), np.arange(side)), -1).reshape(-1, 2) / (side - 1)
    drawn = np.einsum("pyx,nyx->np", numpy_waves(grid), rng.normal(0, 1, (2000, side, side)) * deviation)
    images = torch.from_numpy((drawn * 8 + 127.5).clip(0, 255).astype(np.uint8)).view(2000, 1, side, side)
    spectrum = nf_denoiser.power_spectrum(images)
    expected = deviation**2 / (deviation**2).mean()
    ratio = (spectrum.numpy() / expected)[:8, :8]  # further out the rounding to bytes counts
    assert 0.85 < ratio.min() and ratio.max() < 1.15 and abs(ratio.mean() - 1) < 0.05, (ratio.min(), ratio.max())
    close(spectrum.mean(), 1, 1e-5)
    model = tiny_field(spectrum=spectrum)
    a, b = torch.from_numpy(grid[[3, 700, 1023]]).float()[None], torch.rand(1, 5, 2, generator=torch.Generator().manual_seed(1))
    covariance = lambda p, q: np.einsum("pyx,yx,qyx->pq", numpy_waves(p), spectrum.double().numpy(), numpy_waves(q))
    for p, q in ((a, a), (a, b), (b, b)):
        close(model.covariance(p, q)[0], torch.from_numpy(covariance(p[0].double().numpy(), q[0].double().numpy())), 2e-4)
    weights = torch.randn(1, 3, 2)
    close(model.at(model.waves(model.axes(a), weights), model.axes(b)), model.covariance(b, a) @ weights, 1e-3)
    again = tiny_field()
    again.load_state_dict(model.state_dict())  # the table follows the spectrum that is loaded
    assert torch.equal(again.table, model.table) and not torch.equal(again.table, tiny_field().table)
    close(model.table.diagonal().mean(), 1, 1e-4)  # variance 1, on average over the image


def test_perceiver_alone():
    torch.manual_seed(0)
    net = nf_denoiser.PerceiverIO(3, 2, num_latents=4, latent_dim=16, num_fourier_feats=8, num_blocks=2, num_heads=2).eval()
    _, out, _, coords, values = random_problem()
    p = torch.randperm(30)
    with torch.no_grad():
        y = net(coords, values, out)
        assert y.shape == (2, 20, 2) and y.std() > 0.01
        close(net(coords[:, p], values[:, p], out), y, 1e-5)   # the input is a set
        close(net(coords, values, out[:, 5:6]), y[:, 5:6], 1e-5)  # and every query is answered on its own
        assert (net(coords, values + 1, out) - y).abs().max() > 1e-4


def test_occupancy_is_shared_between_lattice_points():
    model = tiny_field()
    pixels = torch.tensor([[[31.0, 0.0], [3.0, 7.0], [3.0, 7.0], [31.0, 31.0], [10.25, 5.5]]])
    image = model.occupancy(pixels / 31)[0, 0]
    close(image.sum(), 5, 1e-4)
    for (x, y), share in (((31, 0), 1), ((3, 7), 2), ((31, 31), 1), ((10, 5), 0.375), ((11, 5), 0.125), ((10, 6), 0.375), ((11, 6), 0.125)):
        close(image[y, x], share, 1e-4)


def test_pure_noise_says_nothing_and_asking_for_more_changes_nothing():
    """At the last timestep the shortcut equals the long way, and the answer at a pixel depends on no other output."""
    model, (x, out, t, coords, values) = tiny_field(), random_problem()
    torch.nn.init.normal_(model.perceiver.to_values.weight)
    last = torch.full_like(t, 999)
    with torch.no_grad():
        short = model(x, out, last, coords, values, pure_noise=True)
        close(model(x, out, last, coords, values), short, 2e-3)
        close(model(x[:, :3], out[:, :3], last, coords, values, pure_noise=True), short[:, :3], 1e-5)
        once = model.prepare(out, coords, values)
        for step in (0, 300, 999):
            close(model(x, out, last * 0 + step, coords, values, prepared=once), model(x, out, last * 0 + step, coords, values), 2e-3)
    raises(ValueError, lambda: model(x, out, last, coords, values, prepared=once), "no gradients")
    raises(ValueError, lambda: tiny_field(side=33), 33)


def test_input_pixels_survive_sampling_bit_for_bit():
    images = data.make_leaves(3, seed=6)[0]
    keys = data.fixed_keys(0, torch.arange(3), 1024)
    split, outputs, answers = sample.reconstruct(tiny_field(), schedule.DiffusionSchedule(), images, keys, num_steps=3)
    for values in answers.values():
        image = sample.whole(split, values)
        chosen = split["input_indices"][:, None].expand(-1, 3, -1)
        assert torch.equal(image.flatten(2).gather(2, chosen), split["full_image"].flatten(2).gather(2, chosen))
    assert outputs == 204 and len(answers["sample"][0]) == 820


# ------------------------------------------------------------------------------------- metrics and alternatives


def test_psnr_and_ssim():
    close(sample.psnr(0.01), 20, 1e-9)
    assert sample.psnr(0) == math.inf and math.isnan(sample.psnr(math.nan))
    a, b = torch.full((1, 1, 16, 16), 0.3), torch.full((1, 1, 16, 16), 0.7)
    close(sample.ssim(a, a), [1.0], 1e-5)
    close(sample.ssim(a, b), [(2 * 0.3 * 0.7 + 1e-4) / (0.09 + 0.49 + 1e-4)], 1e-4)
    x, y = torch.rand(2, 2, 3, 14, 13, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    w = np.array([[math.exp(-((i - 5) ** 2 + (j - 5) ** 2) / 4.5) for j in range(11)] for i in range(11)])
    w /= w.sum()
    scores = []
    for c in range(3):
        for i in range(4):
            for j in range(3):
                p, q = x[1, c, i:i + 11, j:j + 11].numpy(), y[1, c, i:i + 11, j:j + 11].numpy()
                mp, mq = (w * p).sum(), (w * q).sum()
                vp, vq, cov = (w * (p - mp) ** 2).sum(), (w * (q - mq) ** 2).sum(), (w * (p - mp) * (q - mq)).sum()
                scores.append((2 * mp * mq + 1e-4) * (2 * cov + 9e-4) / ((mp**2 + mq**2 + 1e-4) * (vp + vq + 9e-4)))
    close(sample.ssim(x, y)[1], np.mean(scores), 1e-7)
    raises(ValueError, lambda: sample.ssim(a[..., :10], b[..., :10]), 11)


def test_nearest_and_inverse_distance():
    coords, values = torch.tensor([[[0.0, 0.0], [1.0, 0.0]]]), torch.tensor([[[1.0], [3.0]]])
    ask = torch.tensor([[[0.2, 0.0], [0.9, 0.1], [0.5, 0.7]]])
    close(sample.nearest_pixel(ask, coords, values), [[[1.0], [3.0], [1.0]]], 0)
    got = sample.inverse_distance(ask, coords, values, power=2)
    close(got[0, 0], [(1 / 0.04 + 3 / 0.64) / (1 / 0.04 + 1 / 0.64)], 1e-5)
    close(got[0, 2], [2.0], 1e-5)


def test_evaluation_adds_up():
    """The figures of the table, worked out again from the answers, image by image."""
    images, model, sched = data.make_leaves(5, seed=7)[0], tiny_field(), schedule.DiffusionSchedule(20)
    model.alphas_cumprod = sched.alphas_cumprod
    table = sample.evaluate_field(model, sched, images, seed=3, batch=2, num_steps=2)
    keys = data.fixed_keys(3, torch.arange(5), 1024)
    split = data.sparse_split(images, 0.2, 0.2, keys=keys)
    mse = []
    for b in range(5):
        answer = nf_denoiser.kriging(split["output_coords"][b:b + 1], split["input_coords"][b:b + 1], split["input_values"][b:b + 1])
        error = (answer.clamp(-1, 1) - split["output_values"][b:b + 1]).numpy() / 2
        mse.append((error**2).mean())
    close(table["kriging"]["mse"], np.mean(mse), 1e-6)
    close(table["kriging"]["psnr"], -10 * np.log10(np.mean(mse)), 1e-3)
    assert set(table) == {"one_step_mean", "sample", "nearest", "inverse_distance", "kriging"}
    assert table["nearest"]["mse"] > table["kriging"]["mse"]


# -------------------------------------------------------------------------------------------------- autoencoder


def test_autoencoder_layers_and_ranges():
    model = autoencoder.DenoisingAutoencoder()
    widths = [layer.out_features for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    assert widths == [256, 128, 64, 128, 256, 784]
    x = torch.rand(5, 1, 28, 28)
    reconstructed, latent = model(x)
    assert reconstructed.shape == x.shape and latent.shape == (5, 64)
    assert reconstructed.min() > 0 and reconstructed.max() < 1
    assert torch.equal(model.decode(model.encode(x)), reconstructed.flatten(1))
    flat = x.flatten(1).double()
    weights = [p.detach().double() for p in model.parameters()]
    for i in range(0, 12, 2):
        flat = flat @ weights[i].T + weights[i + 1]
        flat = flat.sigmoid() if i == 10 else flat.relu() if i != 4 else flat
    close(reconstructed.flatten(1), flat, 1e-5)
    raises(ValueError, lambda: model(torch.rand(2, 3, 32, 32)), 784)


# ------------------------------------------------------------------------------------------ autoencoder lab


def tiny_lab(**options):
    """What autoencoder.main() builds, on a few glyphs; options replace parts of it."""
    images, labels = data.make_glyphs(512, 11)
    x, y = images.flatten(1) / 255, labels.long()
    noises = {name: add for name, (add, _) in noise.NOISES.items()}
    noises["clean"] = noises["stripes"] = lambda images, *_: images
    lab = dict(seeds=1, noises=noises, image_grid=data.image_grid, heat=sample.heat, line_chart=schedule.line_chart,
               images=x[:384], labels=y[:384], test_images=x[384:], test_labels=y[384:])
    return types.SimpleNamespace(**{**lab, **options})


class Answer(torch.nn.Module):
    """A stand-in for a trained autoencoder: forward(x) -> (answer(x), latent), so that the right figures are known."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, x):
        return self.answer(x), x


def quiet(call, *arguments):
    """The call's result and what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        return call(*arguments), out.getvalue()


def test_train_autoencoder_learns_to_denoise_and_the_seed_decides_all():
    lab = tiny_lab()
    train = lambda corrupt, seed, epochs=40: autoencoder.train_autoencoder(lab.images, corrupt, epochs, seed, batch_size=128)
    spoil = lambda x, generator: noise.add_gaussian_noise(x, 0.5, generator)
    one, same, other = train(spoil, 0, 2), train(spoil, 0, 2), train(spoil, 1, 2)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters()))
    assert not torch.equal(one.encoder[0].weight, other.encoder[0].weight)
    dae, ae = train(spoil, 0), train(lambda x, generator: x, 0)
    assert not dae.training and not any(p.requires_grad for p in dae.parameters())
    noisy = noise.add_gaussian_noise(lab.test_images, 0.5, torch.Generator().manual_seed(5))
    mse = lambda model, x: F.mse_loss(model(x)[0], lab.test_images).item()
    mean_image = F.mse_loss(lab.images.mean(0).expand_as(lab.test_images), lab.test_images).item()
    assert mse(dae, noisy) < 0.9 * mse(ae, noisy) and mse(dae, noisy) < mean_image < F.mse_loss(noisy, lab.test_images).item()
    assert mse(ae, lab.test_images) < mse(dae, lab.test_images)
    # The loss is against the clean image: where every input is grey, the best answer is the mean image, not grey.
    grey = train(lambda x, generator: 0 * x + 0.5, 0, 20)
    assert (grey(lab.images[:1] * 0 + 0.5)[0][0] - lab.images.mean(0)).abs().mean() < 0.2 * lab.images.mean()


def test_an_untrained_autoencoder_starts_at_the_mean_image():
    torch.manual_seed(0)
    images = data.make_glyphs(300, 3)[0] / 255
    model, mean = autoencoder.DenoisingAutoencoder(), images.flatten(1).mean(0)
    with torch.no_grad():
        off = lambda: (model(images)[0].flatten(1) - mean).abs().mean()
        before = off()
        model.start_at(images)
        assert off() < 0.35 * before, (before, off())
        zero = model(0 * images[:1])[0].flatten()  # nothing but the last bias is left of a network of zeros
        close(zero, mean.clamp(0.01, 0.99), 1e-5)
        # He's weights keep the size of a signal on its way through ReLUs: with torch's own it would be 1/36 after two of them.
        hidden = model.encoder[:4](torch.randn(4000, 784)).square().mean()
        assert 0.7 < hidden < 1.4, hidden
    fresh = [p.clone() for p in model.parameters()]
    again = autoencoder.train_autoencoder(images.flatten(1), lambda c, g: c, 1, 0, lr=1e-12)
    close(again.decoder[-2].bias, model.decoder[-2].bias, 1e-5)  # and training begins there
    assert not torch.equal(again.encoder[0].weight, fresh[0])  # with weights of its own seed


def test_learning_rate():
    """Up in a straight line, then half a cosine down to 1%, by the formula."""
    rate = lambda step: train.learning_rate(step, 1000, 0.5, 40)
    close([rate(0), rate(19), rate(39), rate(40)], [0.5 / 40, 0.25, 0.5, 0.5], 1e-12)
    close([rate(520), rate(1000)], [0.5 * 0.505, 0.005], 1e-12)
    assert all(rate(i + 1) < rate(i) for i in range(40, 1000))


def test_train_autoencoder_asks_for_fresh_noise_and_visits_every_image_once():
    x = torch.arange(300.0)[:, None].expand(300, 784) / 300
    seen, ticks = [], []

    def corrupt(clean, generator):
        seen.append((clean[:, 0].clone(), torch.rand(1, generator=generator).item()))
        return clean

    autoencoder.train_autoencoder(x, corrupt, 3, 0, batch_size=100, on_epoch=lambda: ticks.append(len(seen)))
    assert ticks == [3, 6, 9] and len({draw for _, draw in seen}) == 9
    for epoch in range(3):
        close(torch.cat([batch for batch, _ in seen[3 * epoch:3 * epoch + 3]]).sort()[0], x[:, 0], 0)
    assert not torch.equal(seen[0][0], seen[3][0])
    for strength in (-0.1, float("nan")):
        raises(ValueError, lambda: autoencoder.train_autoencoder(x, lambda c, g: noise.add_gaussian_noise(c, strength, g), 1, 0), "noise_factor")
    for add in (noise.add_masking_noise, noise.add_salt_pepper_noise):
        for strength in (-0.1, 1.1):
            raises(ValueError, lambda: autoencoder.train_autoencoder(x, lambda c, g: add(c, strength, g), 1, 0), "between 0 and 1")
    raises(ValueError, lambda: autoencoder.train_autoencoder(x, lambda c, g: c * float("nan"), 1, 0), "finite")


def test_the_table_is_numpys_mean_and_standard_deviation():
    rng = np.random.default_rng(0)
    figures = rng.random((2, 3, 4))
    figures[1] *= 50
    said, out = quiet(autoencoder.table, "heading", ["a", "b"], ["x", "y", "z"], torch.from_numpy(figures))
    for i, row in enumerate("ab"):
        for j, column in enumerate("xyz"):
            mean, std = figures[i, j].mean(), figures[i, j].std(ddof=1)
            close([said[row][column]["mean"], said[row][column]["std"]], [mean, std], 1e-12)
            digits = 5 if mean < 1 else 2
            assert f"{mean:.{digits}f} ±{std:.{digits}f}" in out
    one = quiet(autoencoder.table, "heading", ["a"], ["x"], torch.ones(1, 1, 1))[0]
    assert one["a"]["x"] == dict(mean=1.0, std=0.0, seeds=[1.0])


def test_linear_classifier_is_the_minimum_of_its_objective():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 5, generator=g) + 3, torch.randint(3, (60,), generator=g)
    # Plain gradient descent in float64 on the same objective, written out in numpy.
    z = ((x - x.mean(0)) / x.var(0).mean().sqrt()).double().numpy()
    w, b, one_hot = np.zeros((5, 3)), np.zeros(3), np.eye(3)[y]
    for _ in range(4000):
        p = np.exp(z @ w + b)
        p = (p / p.sum(1, keepdims=True) - one_hot) / len(z)
        w, b = w - 0.5 * (z.T @ p + w / len(z)), b - 0.5 * p.sum(0)
    test = torch.randn(500, 5, generator=g) + 3
    expected = (((test - x.mean(0)) / x.var(0).mean().sqrt()).double().numpy() @ w + b).argmax(1)
    assert (autoencoder.linear_classifier(x, y, 3)(test).numpy() == expected).mean() > 0.99
    separable = torch.eye(3)[y] + 0.01 * torch.randn(60, 3, generator=g)
    assert (autoencoder.linear_classifier(separable, y, 3)(separable) == y).all()


def test_the_lab_s_sentences_follow_from_the_figures():
    lab = tiny_lab()
    truth, grey = Answer(lambda x: lab.test_images[:len(x)]), Answer(lambda x: torch.full_like(x, 0.5))
    leave, (gaussian, salt_pepper, masking) = Answer(lambda x: x), autoencoder.SPECIALISTS
    # compare: whoever answers the truth wins everywhere.
    for plain, denoising, loser in ((grey, truth, "plain"), (truth, grey, "denoising")):
        lab.models = {autoencoder.CLEAN: [plain], autoencoder.DAE: [denoising]}
        (said, _, sentences), _ = quiet(autoencoder.compare, lab)
        assert f"The {loser} autoencoder is better on nothing." in sentences and "1 of 1 seeds" in " ".join(sentences)
        close(said["clean"][f"MSE {'AE' if loser == 'plain' else 'DAE'}"]["mean"], (lab.test_images - 0.5).square().mean(), 1e-6)
    # What "left alone" says is known in closed form: E (y - x)^2 = p x^2 for masking, p / 2 (x^2 + (1 - x)^2) for the other.
    x = lab.test_images
    close(said["masking 0.3"]["MSE before"]["mean"], 0.3 * x.square().mean(), 2e-3)
    close(said["salt pepper 0.2"]["MSE before"]["mean"], 0.1 * (x.square() + (1 - x).square()).mean(), 4e-3)
    # types: a model that answers the truth is the best for every noise, and transfers best.
    lab.models = {gaussian: [grey], salt_pepper: [leave], masking: [Answer(lambda x: lab.test_images + 0.01)]}
    (said, _, sentences), _ = quiet(autoencoder.matrix, lab, autoencoder.SPECIALISTS)
    assert "in 1 of 3 cases; for gaussian 0.3 it is masking 0.3; for salt pepper 0.2 it is masking 0.3." in sentences[0]
    assert "masking 0.3 does best, on average 0% above" in sentences[1]
    assert said["left alone"] == said["trained on salt pepper 0.2"]
    # levels: does the one trained on heavy noise clean light noise?
    for heavy, verdict in ((truth, "cleans"), (grey, "does not clean")):
        lab.models = {kind: [Answer(lambda x: lab.test_images + 0.01)] for kind in autoencoder.LEVELS[:4]} | {autoencoder.LEVELS[4]: [heavy]}
        sentences = quiet(autoencoder.levels, lab)[0][2]
        assert f"Training on gaussian 0.5 {verdict} gaussian 0.1" in sentences[2], sentences
    # progressive: half way to the truth with each pass, or half way to grey.
    for goal, verdict in ((lab.test_images, "helps: best after 10"), (torch.full_like(lab.test_images, 0.5), "does not help: best after ")):
        lab.models = {autoencoder.DAE: [Answer(lambda x: (x + goal) / 2)]}
        said, _, sentences = quiet(autoencoder.progressive, lab)[0]
        assert sentences[0].startswith(f"Iteration {verdict}"), sentences
        assert "does not help" in sentences[1]  # noise is never wanted by a straight line
        if verdict.startswith("helps"):
            close(said["pass 3"]["nothing added"]["mean"], said["input"]["nothing added"]["mean"] / 4**3, 1e-7)
    # blind: universal only if it is as good as the best everywhere and better than nothing.
    lab.noises["stripes"] = lambda images, *_: 1 - images
    for model, verdict in ((truth, "Yes: it improves 6 of 6 inputs, and on 6"), (leave, "No: it improves 0 of 6 inputs, and on 0")):
        lab.models = {autoencoder.MIXED: [model], **{kind: [Answer(lambda x: lab.test_images + 0.01)] for kind in autoencoder.SPECIALISTS}}
        assert verdict in quiet(autoencoder.blind, lab)[0][2][1]


def test_every_exercise_runs_at_a_tiny_size():
    with folder() as root:
        small_sets(root / "data")
        line = f"--data glyphs --data-dir {root}/data --out {root}/out --json {root}/f.json --epochs 10 --batch-size 32 --seeds 2 --exercise"
        code, out, err = run_main(autoencoder, f"{line} all")
        assert code == 0 and "9 models x 2 seeds" in out, err
        results = json.loads((root / "f.json").read_text())["exercises"]
        assert list(results) == ["compare", "levels", "types", "features", "progressive", "blind"]
        for name, result in results.items():
            with Image.open(root / "out" / f"autoencoder-{name}.png") as picture:
                assert min(picture.size) > 300 and picture.getextrema() == ((0, 255),) * 3
            assert all(sentence in out for sentence in result["conclusions"])
            for row in result["figures"].values():
                for cell in row.values():
                    assert len(cell["seeds"]) == 2 and np.isfinite(cell["seeds"]).all()
        figures = {name: result["figures"] for name, result in results.items()}
        # 80 steps say more about heavily spoilt images than the mean image does, from which they start; and the same model
        # has the same error wherever it is asked.
        levels, types, compare = figures["levels"], figures["types"], figures["compare"]
        images, test_images = (data.load_built_in("glyphs", root / "data", train)[0] / 255 for train in (True, False))
        constant = (test_images - images.mean(0)).square().mean().item()
        assert levels["trained on gaussian 0.5"]["on gaussian 0.5"]["mean"] < 0.95 * constant, (levels, constant)
        assert (levels["trained on gaussian 0.3"]["on gaussian 0.3"] == types["trained on gaussian 0.3"]["on gaussian 0.3"]
                == compare["gaussian 0.3"]["MSE DAE"] == figures["blind"]["gaussian 0.3"]["gaussian 0.3"])
        # Noise makes reading digits harder, labels easier; three labels in ten digits would be chance.
        pixels = {column: cell["mean"] for column, cell in figures["features"]["pixels"].items()}
        assert pixels["256 clean"] > pixels["100 clean"] > 20 and pixels["256 clean"] > pixels["256 noisy"], pixels
        assert 0 < figures["features"]["AE"]["mean |r|"]["mean"] < 100
        # One exercise alone trains only what it needs, and finds the same.
        code, out, err = run_main(autoencoder, f"{line} compare")
        assert code == 0 and "2 models x 2 seeds" in out, err
        assert json.loads((root / "f.json").read_text())["exercises"] == {"compare": results["compare"]}


def test_the_lab_refuses_bad_input_in_one_line():
    with folder() as root:
        small_sets(root / "data", 16)
        raw = root / "bad" / "MNIST" / "raw"
        raw.mkdir(parents=True)
        for name in ("images-idx3", "labels-idx1"):
            (raw / f"train-{name}-ubyte").write_bytes(b"no numbers")
        (root / "file").write_text("not a folder")
        good = f"--exercise compare --epochs 1 --seeds 1 --data glyphs --data-dir {root}/data --out {root}/out"
        for flags in ("--exercise nope", "--seeds 0", "--epochs 0", "--epochs x", "--data cifar10", "--data leaves", "--data imagenet",
                      f"--data mnist --data-dir {root}/bad", f"--out {root}/file"):
            code, out, err = run_main(autoencoder, f"{good} {flags}")
            assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, (flags, code, err)
        assert run_main(autoencoder, good)[0] == 0  # so it was the flags


# ---------------------------------------------------------------------------------------------- whole programs


def test_library_files_work_alone():
    commands = {"noise.py": "", "schedule.py": "", "data.py": "--data glyphs", "nf_denoiser.py": "", "autoencoder.py": ""}
    with folder() as root:
        running = []
        for name, flags in commands.items():
            place = root / name[:-3]
            place.mkdir()
            shutil.copy(HERE / name, place)
            if name == "data.py":
                small_sets(place / "data")
            running.append((name, subprocess.Popen([sys.executable, name, *flags.split()], cwd=place, text=True,
                                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT)))
        for name, process in running:
            said = process.communicate(timeout=100)[0]
            assert process.returncode == 0 and said.strip(), f"{name}: {said}"
            for path in re.findall(r"picture: (\S+)", said):
                with Image.open(root / name[:-3] / path) as picture:
                    assert min(picture.size) > 100


def test_training_lowers_the_loss_and_leaves_its_files():
    with folder() as root:
        small_sets(root / "data")
        for model, flags in (("nf", "--steps 128 --batch-size 8 --evaluate 4 --lr 0.006 --masks fixed"), ("dae", "--epochs 30 --batch-size 128"), ("ae", "--epochs 30 --batch-size 128")):
            line = f"--model {model} --data {'leaves' if model == 'nf' else 'glyphs'} --data-dir {root}/data --out {root}/out {flags}"
            code, out, err = run_main(train, line)
            assert code == 0, err
            rows = (root / "out" / model / "loss.csv").read_text().split()[1:]
            losses = [float(row.split(",")[1]) for row in rows]
            assert model == "nf" or losses[0] < 0.15, losses[0]  # begins at the mean image; grey would be at about 0.25
            part = len(losses) // (2 if model == "nf" else 3)  # for nf: the first and last two times through the data
            first, last = np.mean(losses[:part]), np.mean(losses[-part:])
            assert last < first * (0.97 if model == "nf" else 0.8), f"{model}: {first:.4f} -> {last:.4f}"
            results = json.loads((root / "out" / model / "results.json").read_text())
            key = "one_step_mean" if model == "nf" else "gaussian"
            assert key in results["methods"] and "PSNR" in out
            for name in ("loss.png", "samples.png"):
                with Image.open(root / "out" / model / name) as picture:
                    assert picture.getextrema() != ((255, 255),) * 3
            assert (root / "out" / model / "checkpoint.pt").stat().st_size > 1000


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped():
    with folder() as root:
        small_sets(root / "data")
        for model, flags in (("dae", "--data glyphs --batch-size 128 --noise mixed --steps 30"), ("ae", "--data glyphs --batch-size 128 --steps 9"), ("nf", "--data leaves --batch-size 4 --steps 6 --masks fixed --evaluate 2")):
            line = f"--model {model} --data-dir {root}/data --save-every 2 {flags} --out {root}"
            assert run_main(train, line + "/whole")[0] == 0
            save = train.save_checkpoint

            def interrupt(path, checkpoint):
                save(path, checkpoint)
                if checkpoint["step"] == 2:
                    signal.raise_signal(signal.SIGINT)  # Ctrl-C while the second step is saved: one more, and stop

            with patched(train, save_checkpoint=interrupt):
                code, out, err = run_main(train, line + "/parts")
            assert code == 130 and "--resume" in out, err
            assert torch.load(root / "parts" / model / "checkpoint.pt", weights_only=True)["step"] == 3
            code, out, err = run_main(train, line + "/parts --resume")
            assert code == 0, err
            a, b = (torch.load(root / part / model / "checkpoint.pt", weights_only=True) for part in ("whole", "parts"))
            for key in ("model", "ema", "optimizer"):
                x, y = ({str(k): v for k, v in flat(c[key])} for c in (a, b))
                assert x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x), key
            assert torch.equal(a["losses"], b["losses"]) and a["step"] == b["step"]
            code, out, err = run_main(train, line + "/parts --resume --lr 0.5 --save-every 7")
            assert code == 2 and "lr" in err and "0.5" in err
            code, out, err = run_main(train, line + "/parts --resume --save-every 7 --steps " + str(b["step"] + 1))
            assert code == 0, err  # what may change
        for other in ("nf", "ae"):  # a checkpoint of another model
            shutil.copy(root / "parts" / "dae" / "checkpoint.pt", root / "parts" / other)
            code, out, err = run_main(train, f"--model {other} --data-dir {root}/data --data {'leaves' if other == 'nf' else 'glyphs'} "
                                             f"--batch-size 4 --steps 50 --out {root}/parts --resume")
            assert code == 2 and f"model dae -> {other}" in err and err.count("\n") == 1, err


def flat(tree, path=()):
    """Everything in nested dicts and lists that is a tensor or a number: ((path), tensor) pairs."""
    if isinstance(tree, (dict, list, tuple)):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from flat(value, (*path, key))
    elif isinstance(tree, (torch.Tensor, float, int)):
        yield path, torch.as_tensor(tree)


def start_training(root, flags, *before):
    """train.py in a process of its own, on one thread; its output goes to root/log."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    with open(root / "log", "a") as log:
        return subprocess.Popen([sys.executable, *before, str(HERE / "train.py"), "--data-dir", f"{root}/data", *flags.split()],
                                stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True)


def test_kill_9_at_any_moment_loses_nothing():
    """A run that saves every step is killed again and again: what is on disk always loads, and the end is the same."""
    rng, kills = np.random.default_rng(int(time.time())), 20 if LONG else 2
    with folder() as root:
        small_sets(root / "data")
        flags = f"--model dae --data glyphs --batch-size 128 --save-every 1 --steps {20 * kills} --out {root}"
        assert start_training(root, flags + "/whole").wait(200) == 0
        path, resume, killed = root / "parts" / "dae" / "checkpoint.pt", "", 0
        while killed < kills:
            process, seen = start_training(root, f"{flags}/parts {resume}"), path.stat().st_mtime_ns if path.exists() else None
            while process.poll() is None and (not path.exists() or path.stat().st_mtime_ns == seen):
                time.sleep(0.005)  # until this process has saved something
            time.sleep(rng.uniform(0, 0.15))
            process.kill()
            code = process.wait()
            assert code in (0, -signal.SIGKILL), (root / "log").read_text()
            if code == 0:
                break  # it was too fast for us, and is done
            killed, resume = killed + 1, "--resume"
            assert sample.load_checkpoint(path)[1]["step"] >= 1
        assert killed >= min(kills, 5)
        if torch.load(path, weights_only=True)["step"] < 20 * kills:
            assert start_training(root, f"{flags}/parts --resume").wait(200) == 0, (root / "log").read_text()
        a, b = (torch.load(root / part / "dae" / "checkpoint.pt", weights_only=True) for part in ("whole", "parts"))
        assert all(torch.equal(x, y) for (_, x), (_, y) in zip(flat(a), flat(b), strict=True)), "another end"
        assert not list((root / "parts").rglob("*.part"))


def test_a_full_disk_or_a_read_only_folder_spares_the_checkpoint():
    import resource
    with folder() as root:
        small_sets(root / "data")
        line = f"--model dae --data glyphs --batch-size 128 --data-dir {root}/data --out {root}/out --save-every 1 --steps"
        assert run_main(train, f"{line} 2")[0] == 0
        path = root / "out" / "dae" / "checkpoint.pt"
        before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
        try:
            code, out, err = run_main(train, f"{line} 4 --resume")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
        assert path.read_bytes() == before and [p.name for p in path.parent.glob("checkpoint*")] == ["checkpoint.pt"]
        assert run_main(train, f"{line} 4 --resume")[0] == 0  # with room on the disk it goes on
        (root / "locked").mkdir(mode=0o500)
        for place in ("/proc/nowhere", root / "locked") if os.geteuid() else ("/proc/nowhere",):  # root may write anywhere else
            code, out, err = run_main(train, f"{line} 4 --out {place}")
            assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, err


def test_the_benchmarks_print_what_they_measure():
    calls = []

    def pretend(works, *_):  # one round of each, the first said to take a second, the next two, ...
        calls.append([work() for work in works])
        return list(range(1, len(works) + 1))

    with patched(nf_denoiser, seconds=pretend), patched(torch, compile=lambda model: model):
        code, out, err = run_main(nf_denoiser, "--bench --size small --batch-size 2 --device cpu --compile")
        assert code == 0 and "forward + backward" in out, err
        flop = [float(x) for x in re.findall(r"([\d.]+) GFLOP an image", out)]
        assert 2.5 < flop[1] / flop[0] < 3.2, flop  # forward, and twice as much backward
        # matmul 1, forward 2, matmul 3, forward + backward 4, four whole steps 5, drawing 6, optimiser 7; plain 1, sampling 2
        for said in ("matmul 9 GFLOP/s", "2000.0 ms     1.00 images/s", "4000.0 ms     0.50 images/s", "1250.0 ms     1.60 images/s",
                     "0.50 times as fast, DDIM 0.50 times", "noise 480.0%, optimiser and average 560.0%", "for 1 images: 2.0 plain"):
            assert said in out, (said, out)
        code, out, err = run_main(autoencoder, "--bench --batch-size 8")
    for said in ("(17 GFLOP/s)", "2000.00 ms          4 images/s", "3000.00 ms          3 images/s",
                 "4000.00 ms          2 images/s; data and noise 125%, optimiser 150%"):
        assert code == 0 and said in out, (said, out, err)
    assert calls[-1][4][0].shape == calls[-1][4][1].shape == (8, 784)  # what the autoencoder's `draw` draws
    slow, fast = nf_denoiser.seconds([lambda: time.sleep(0.03), lambda: time.sleep(0.01)], torch.device("cpu"), 0.1)
    assert 0.03 <= slow < 0.2 and 0.01 <= fast < slow, (slow, fast)


def test_two_processes_train_as_one():
    """torchrun: the same gradient as one process, rows that are nobody else's, and checkpoints that fit both."""
    problems = [(dict(x=torch.arange(12), t=7), torch.arange(12))]
    parts = [train.share(problems, rank, 3)[0][0]["x"].tolist() for rank in range(3)]
    assert sorted(sum(parts, [])) == list(range(12)) and {len(p) for p in parts} == {4}
    torchrun = "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"
    with folder() as root:
        small_sets(root / "data")
        flags = f"--model nf --data leaves --batch-size 8 --evaluate 2 --out {root}"
        for name, before in (("one", ()), ("two", torchrun)):
            assert start_training(root, f"{flags}/{name} --steps 1", *before).wait(200) == 0, (root / "log").read_text()
        said = (root / "log").read_text()
        assert said.count("step 1 of 1 ") == said.count("trained in") == said.count("one step mean") == 2, said  # rank 0 alone
        one, two = (torch.load(root / name / "nf" / "checkpoint.pt", weights_only=True) for name in ("one", "two"))
        for i, state in one["optimizer"]["state"].items():  # after one step the moving average is a tenth of the gradient
            close(10 * state["exp_avg"], 10 * two["optimizer"]["state"][i]["exp_avg"], 1e-5)
            assert state["exp_avg"].abs().max() > 0
        # Two more steps: what one process began two go on with, and the other way round.
        for name, before in (("one", torchrun), ("two", ())):
            assert start_training(root, f"{flags}/{name} --steps 3 --resume", *before).wait(200) == 0, (root / "log").read_text()
        one, two = (torch.load(root / name / "nf" / "checkpoint.pt", weights_only=True) for name in ("one", "two"))
        assert one["step"] == two["step"] == 3
        for i, state in one["optimizer"]["state"].items():
            difference = (state["exp_avg"] - two["optimizer"]["state"][i]["exp_avg"]).norm() / state["exp_avg"].norm()
            assert difference < 0.05, (i, difference)  # other rounding, the same path
        # A worker dies: the whole job ends, not with 0, and the checkpoint can be read.
        path = root / "three" / "nf" / "checkpoint.pt"
        process = start_training(root, f"{flags}/three --steps 5000 --save-every 1", *torchrun)
        while not path.exists() and process.poll() is None:
            time.sleep(0.1)
        children = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and parent(p) == process.pid]
        os.kill(children[-1], signal.SIGKILL)
        assert process.wait(100) != 0
        assert sample.load_checkpoint(path)[1]["step"] >= 1
        code, out, err = run_main(train, f"{flags} --data-dir {root}/data --batch-size 8 --steps 1")
        assert code == 0, err
        with patched(os, environ={**os.environ, "WORLD_SIZE": "3", "RANK": "0"}), \
                patched(torch.distributed, init_process_group=lambda *_: None):
            code, out, err = run_main(train, f"{flags} --data-dir {root}/data --steps 1")
        assert code == 2 and "multiple of 6" in err, err


def parent(process):
    try:
        return int((process / "stat").read_text().rsplit(")", 1)[1].split()[1])
    except (OSError, IndexError):
        return 0


def mutated(content, rng):
    """One random accident: bytes changed, cut off, cut out, doubled, or zeros."""
    at, length = int(rng.integers(len(content))), int(rng.integers(1, 400))
    kind = rng.integers(5)
    if kind == 0:
        middle = bytes(rng.integers(0, 256, min(length % 8 + 1, len(content) - at), dtype=np.uint8))
        return content[:at] + middle + content[at + len(middle):]
    return (content[:at], content[:at] + content[at + length:], content[:at + length] + content[at:],
            content[:at] + bytes(length) + content[at + length:])[kind - 1]


def test_a_thousand_damaged_files():
    """Every one is loaded as what it is, or refused in one line: no other exception, no hang, no wrong weights."""
    rng, outcomes = np.random.default_rng(0), {}
    with folder() as root, contextlib.redirect_stdout(io.StringIO()), patched(data, CIFAR10_URLS=[], MNIST_URLS=[]):
        labels = rng.integers(0, 10, (20, 1), dtype=np.uint8)
        records = np.concatenate([labels, rng.integers(0, 256, (20, 3072), dtype=np.uint8)], 1).tobytes()
        idx = [struct.pack(">IIII", 0x803, 20, 28, 28) + bytes(20 * 784), struct.pack(">II", 0x801, 20) + bytes(20)]
        cifar, mnist = root / "cifar-10-batches-bin" / "test_batch.bin", root / "MNIST" / "raw"
        cifar.parent.mkdir()
        mnist.mkdir(parents=True)
        model = tiny_field()
        torch.save(dict(kind="nf", step=1, data="leaves", schedule={}, ema=model.state_dict(), config=dict(
            input_channels=3, output_channels=3, side=32, num_latents=8, latent_dim=32, num_fourier_feats=8, num_blocks=1, num_heads=2, dropout=0.0, widths=(8, 8))), root / "good.pt")
        picture = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(picture, "PNG")
        originals = dict(cifar=records, idx=idx[0], gzip=gzip.compress(idx[0]), checkpoint=(root / "good.pt").read_bytes(),
                         photo=picture.getvalue())

        def load(kind, content):
            if kind == "cifar":
                cifar.write_bytes(content)
                images, labels = data.load_cifar10(root, train=False)
                assert images.shape[1:] == (3, 32, 32) and len(images) == len(labels) and labels.max() < 10
            elif kind in ("idx", "gzip"):
                (mnist / "t10k-images-idx3-ubyte").unlink(missing_ok=True)
                (mnist / f"t10k-images-idx3-ubyte{'.gz' * (kind == 'gzip')}").write_bytes(content)
                (mnist / "t10k-labels-idx1-ubyte").write_bytes(idx[1])
                assert data.load_mnist(root, train=False)[0].shape == (20, 1, 28, 28)
            elif kind == "checkpoint":
                (root / "bad.pt").write_bytes(content)
                loaded = sample.load_checkpoint(root / "bad.pt")[0].state_dict()
                assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())
            else:
                (root / "photo.png").write_bytes(content)
                assert sample.load_photo(root / "photo.png", 32, 3).shape == (1, 3, 32, 32)

        for kind, original in originals.items():
            load(kind, original)
            for i in range(200):
                content = mutated(original, rng)
                try:
                    load(kind, content)
                    outcome = "loaded"
                except (ValueError, data.Unavailable) as problem:
                    assert str(problem) and "\n" not in str(problem), problem
                    outcome = "refused"
                outcomes[kind, outcome] = outcomes.get((kind, outcome), 0) + 1
    assert sum(outcomes.values()) == 1000 and all(outcomes.get((kind, "refused"), 0) > 20 for kind in originals), outcomes


def test_odd_pictures():
    with folder() as root:
        for size in ((1, 1), (20_000, 3), (3, 20_000), (33, 31)):
            for mode in ("RGB", "L", "RGBA", "P", "I;16"):
                Image.new(mode, size).save(root / "photo.png")
                assert sample.load_photo(root / "photo.png", 32, 3).shape == (1, 3, 32, 32)
        import zlib
        chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        bomb = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(bytes(10**6)))
        (root / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bomb + chunk(b"IEND", b""))
        raises(ValueError, lambda: sample.load_photo(root / "bomb.png", 32, 3), "bomb.png")


def test_a_loss_that_is_not_finite_stops_the_run_and_spares_the_checkpoint():
    with folder() as root:
        small_sets(root / "data")
        line = f"--model dae --data glyphs --batch-size 128 --data-dir {root}/data --out {root} --save-every 1 --steps 9"
        good = train.autoencoder_problems
        calls = []

        def spoilt(*arguments):
            calls.append(1)
            return [(inputs, clean * (math.nan if len(calls) == 4 else 1)) for inputs, clean in good(*arguments)]

        with patched(train, autoencoder_problems=spoilt):
            code, out, err = run_main(train, line)
        assert code == 2 and "finite at step 4" in err and err.count("\n") == 1, err
        checkpoint = sample.load_checkpoint(root / "dae" / "checkpoint.pt")[1]
        assert checkpoint["step"] == 3 and all(v.isfinite().all() for v in checkpoint["model"].values())
        assert run_main(train, line + " --resume")[0] == 0


def test_other_schedules_can_be_trained_and_sampled():
    with folder() as root:
        small_sets(root / "data", 32)
        place = f"--data-dir {root}/data --out {root}"
        code, out, err = run_main(train, f"--data leaves --timesteps 20 --steps 2 --batch-size 4 --evaluate 2 {place}")
        assert code == 0 and "ddim 20 steps" in out, err
        code, out, err = run_main(sample, f"--sampler ddpm {place} --evaluate 2")
        assert code == 0 and "ddpm 20 steps" in out, err


def test_the_same_seed_gives_the_same_picture_in_a_new_process():
    with folder() as root:
        small_sets(root / "data", 16)
        model, sched = tiny_field(), schedule.DiffusionSchedule()
        config = dict(input_channels=3, output_channels=3, num_latents=8, latent_dim=32, num_fourier_feats=8, num_blocks=1,
                      num_heads=2, dropout=0.0, widths=(8, 8), side=32)
        state = model.state_dict()
        (root / "out" / "nf").mkdir(parents=True)
        train.save_checkpoint(root / "out" / "nf" / "checkpoint.pt", dict(
            kind="nf", config=config, data="leaves", step=1, schedule=dict(timesteps=1000, beta_schedule="cosine"), ema=state))
        pictures = []
        for seed in (1, 1, 2):
            flags = f"--steps 3 --seed {seed} --data-dir {root}/data --out {root}/out --json {root}/f.json --gif --scale 2".split()
            done = subprocess.run([sys.executable, HERE / "sample.py", *flags], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            pictures.append((root / "out" / "nf" / "samples.png").read_bytes())
        assert pictures[0] == pictures[1] != pictures[2]
        figures = json.loads((root / "f.json").read_text())
        assert figures["data"] == "leaves" and figures["images"] == 6 and "kriging" in figures["methods"]
        Image.new("RGB", (50, 90), "red").save(root / "photo.jpg")
        code, out, err = run_main(sample, f"--image {root}/photo.jpg --full --steps 2 --out {root}/out --export {root}/m.pt")
        assert code == 0 and "820 output" in out, err
        before, after = (sample.load_checkpoint(path)[0].state_dict() for path in (root / "out" / "nf" / "checkpoint.pt", root / "m.pt"))
        assert max((before[name] - after[name]).abs().max() for name in before) < 1e-3 and not torch.equal(
            before["perceiver.latents"], after["perceiver.latents"]) and torch.equal(before["alphas_cumprod"], after["alphas_cumprod"])
        (root / "again" / "nf").mkdir(parents=True)
        shutil.copy(root / "m.pt", root / "again" / "nf" / "checkpoint.pt")
        code, out, err = run_main(train, f"--data leaves --data-dir {root}/data --batch-size 4 --resume --out {root}/again")
        assert code == 2 and "exported" in err, err
        for flag in ("--input-ratio 0", "--input-ratio 1", "--input-ratio nan", "--input-ratio 0.9", "--input-ratio 0.2 -1", "--steps 0",
                     "--steps 1001", "--samples 1", "--evaluate 0", "--evaluate 17", "--scale 17", "--scale x", "--seed -1", "--eta nan"):
            code, out, err = run_main(sample, f"{root}/m.pt --data-dir {root}/data --out {root}/out {flag}")
            assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, (flag, code, err)
        with patched(sample, SHIPPED=root / "m.pt"):  # a model that comes with the code is used where there is no other
            code, out, err = run_main(sample, f"--image {root}/photo.jpg --full --steps 2 --out {root}/elsewhere")
        assert code == 0 and "m.pt" in out, err
        alike = [(root / place / "nf" / "samples.png").read_bytes() for place in ("out", "elsewhere")]
        assert alike[0] == alike[1]


def test_the_shipped_model_is_better_than_kriging():
    """Trained on photographs, asked about images it has never seen the like of: dead leaves."""
    model, checkpoint = sample.load_checkpoint(sample.SHIPPED)
    sched = schedule.DiffusionSchedule(**checkpoint["schedule"])
    table = sample.evaluate_field(model, sched, data.make_leaves(24, seed=9)[0], num_steps=10)
    assert table["one_step_mean"]["psnr"] > table["kriging"]["psnr"] + 0.2 > table["nearest"]["psnr"] + 0.2, table
    assert sample.SHIPPED.stat().st_size < 2_000_000


def test_samples_spread_is_measured_right():
    """With an exact model of data ~ N(0, s2) that no input tells anything about, samples and truth are alike."""
    sched, s2 = schedule.DiffusionSchedule(), 0.09

    def exact(x_t, output_coords, t, input_coords, input_values):
        bar = sched.alphas_cumprod[t].view(-1, 1, 1)
        return s2 * bar.sqrt() / (bar * s2 + 1 - bar) * x_t

    images = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * s2**0.5
    figures = sample.evaluate_samples(exact, sched, images, 32, num_steps=200)
    # The truth's rank among 32 samples is one of 33, all equally likely, and 2 to 30 lie within the central 90%.
    assert abs(figures["coverage"] - 29 / 33) < 0.02, figures
    # In [0, 1] units the standard deviation is 0.15; a N(0, s^2) forecast of itself has the CRPS s / sqrt(pi).
    assert abs(figures["spread"] - 0.15) < 0.005 and abs(figures["crps"] - 0.15 / math.pi**0.5 * 33 / 32) < 0.003, figures
    close(figures["psnr_mean"], -10 * math.log10(0.15**2 * 33 / 32), 0.2)
    certain = sample.evaluate_samples(lambda x, *rest: 0 * x, sched, images, 4, num_steps=2)
    assert certain["spread"] < 1e-6 and certain["coverage"] < 0.1
    close(certain["crps"], (images.abs().mean() / 2).item(), 0.01)


def test_bad_input_gets_one_line_and_exit_code_2():
    with folder() as root:
        small_sets(root / "data", 16)
        (root / "junk.pt").write_bytes(b"junk")
        (root / "empty.pt").write_bytes(b"")
        (root / "photo.png").write_bytes(b"no picture")
        torch.save({"kind": "nf"}, root / "odd.pt")
        torch.save([1, 2], root / "list.pt")
        d = f"--data-dir {root}/data --out {root}/out"
        for module, line in ((train, f"--model dae --data leaves {d}"), (train, f"--model nope {d}"), (train, f"--steps 0 {d}"),
                             (train, f"--lr 0 --data leaves {d}"), (train, f"--lr nan --data leaves {d}"), (train, f"--batch-size 999 --data leaves {d}"),
                             (train, f"--resume --data leaves {d}"), (train, f"--model dae --data glyphs --noise-param 7 --noise masking {d}"),
                             (train, f"--timesteps 0 {d}"), (train, f"--device warp {d}"), (nf_denoiser, "--device warp"),
                             (train, f"--steps 5 --epochs 5 {d}"), (train, f"--data leaves --beta-schedule linear --timesteps 50 {d}"),
                             (sample, f"--device warp {d}"),
                             (train, f"--model ae --noise-param 0.2 {d}"), (train, f"--model nf --noise masking {d}"), (train, f"--seed -1 {d}"), (train, f"--ema 1.5 {d}"),
                             (sample, f"{root}/junk.pt {d}"), (sample, f"{root}/empty.pt {d}"), (sample, f"{root}/odd.pt {d}"),
                             (sample, f"{root}/list.pt {d}"), (sample, f"{root}/none.pt {d}"), (sample, d),
                             (sample, f"--eta 2 {d}"), (sample, f"--scale 0 {d}"), (sample, f"--sampler ddpm --steps 5 {d}"),
                             (sample, f"--evaluate -3 {d}"), (schedule, f"--timesteps 0 --out {root}"), (noise, "--nope"),
                             (data, "--data imagenet"), (nf_denoiser, "--size huge"), (autoencoder, "--batch-size 0"),
                             *((train, f"--data leaves {flag} {d}") for flag in (
                                 "--steps -1", "--steps x", "--steps 1.5", "--epochs 0", "--batch-size 0", "--batch-size 3", "--save-every 0",
                                 "--evaluate 0", "--timesteps -5", "--timesteps 10000000000", "--lr inf", "--lr -1", "--ema nan",
                                 "--ema 1", "--seed 99999999999999999999", "--model dae --size small", "--model ae --masks fixed",
                                 "--model ae --timesteps 50", "--steps 99999999999", "--batch-size 1", "--model dae --data glyphs --noise-param nan", "--model dae --noise mixed --noise-param 1")),
                             (noise, "--seed -1"), (noise, "--seed 99999999999999999999"), (data, f"--data leaves --seed -1 {d}"),
                             (schedule, "--timesteps 10000000000"), (nf_denoiser, "--bench --batch-size 1")):
            with patched(sample, SHIPPED=root / "none.pt"):
                code, out, err = run_main(module, line)
            assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, (module.__name__, line, code, err)
        raises(ValueError, lambda: sample.load_photo(root / "photo.png", 32, 3), "photo.png")


def test_a_checkpoint_cannot_run_code():
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(Path(tempfile.gettempdir()) / "nf-denoiser-evil"),))

    with folder() as root:
        torch.save({"kind": "nf", "config": Evil()}, root / "evil.pt")
        raises(ValueError, lambda: sample.load_checkpoint(root / "evil.pt"), "evil.pt")
        assert not (Path(tempfile.gettempdir()) / "nf-denoiser-evil").exists()


def test_the_readmes_commands_parse():
    commands = re.findall(r"python (\w+)\.py([^\n`#|&]*)", (HERE / "README.md").read_text())
    assert len(commands) >= 10
    parse = argparse.ArgumentParser.parse_args

    class Parsed(Exception):
        pass

    def parse_and_stop(self, *args, **kwargs):
        parse(self, *args, **kwargs)
        raise Parsed

    modules = {m.__name__: m for m in (autoencoder, data, nf_denoiser, noise, sample, schedule, train)}
    with patched(argparse.ArgumentParser, parse_args=parse_and_stop):
        for name, flags in commands:
            if name in modules:
                try:
                    code, _, err = run_main(modules[name], flags.strip().rstrip(".,;:)"))
                    raise AssertionError(f"python {name}.py{flags}: {err}")
                except Parsed:
                    pass


def main():
    wanted = ([word for word in sys.argv[1:] if word != "--long"] or [""])[0]
    passed = failed = 0
    start = time.time()
    for name, test in list(globals().items()):
        if name.startswith("test_") and callable(test) and wanted in name:
            began = time.time()
            try:
                test()
                passed += 1
                print(f"ok    {name} ({time.time() - began:.1f} s)", flush=True)
            except Exception:
                failed += 1
                print(f"FAIL  {name}\n{traceback.format_exc()}", flush=True)
    print(f"{time.time() - start:.0f} s")
    print(f"{passed} passed, {failed} failed")
    sys.exit(1 if failed or not passed else 0)


if __name__ == "__main__":
    main()
