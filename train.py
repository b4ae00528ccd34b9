"""Train the neural field (nf), the denoising autoencoder (dae), or its control without noise (ae).

    python train.py --model nf                        # 2 CPU cores: minutes; a GPU: 20,000 steps
    python train.py --model nf --size medium                # a wider U-Net, for an hour
    python train.py --model nf --parts field unet     # leave a part of the model out
    python train.py --model dae --noise salt_pepper --noise-param 0.4
    python train.py --model nf --data my_photos       # a folder of your own pictures
    python train.py --model nf --resume               # continue an interrupted run
    torchrun --standalone --nproc_per_node=2 train.py --model nf   # processes share every batch
    python train.py --model nf --bench                # images per second, where the time goes

All three compare a prediction with the CLEAN image:

    nf     x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps at the output pixels
           loss = mean (f(x_t, coords_out, t, coords_in, x_in) - x_0)^2     DDPM, algorithm 1
    dae    loss = mean (g(f(corrupt(x))) - x)^2       the loop: train_autoencoder, autoencoder.py
    ae     loss = mean (g(f(x)) - x)^2

Everything random in step n comes from a generator seeded with (seed, n), so a run can be resumed
from the step number alone, on a CPU bit for bit. Below out/MODEL: checkpoint.pt, loss.csv,
loss.png, samples.png and results.json.
"""
import os

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # before torch is imported
import argparse
import csv
import math
import signal
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from autoencoder import (DenoisingAutoencoder, corruption, report_autoencoder, test_error,
                         train_autoencoder, warmup_cosine)
from data import fixed_order, load_dataset, sparse_split
from nf_denoiser import PARTS, SIZES, NFDenoiser, pixel_covariance
from noise import NOISES
from sample import (load_checkpoint, one_step_psnr, pick_device, report_field, save_checkpoint,
                    write_json)
from schedule import DiffusionSchedule, line_chart

# ------------------------------------------------------------------------------- the neural field


def field_loss(model, images, schedule, pure_noise, order=None, rows=slice(None)):
    """DDPM, algorithm 1, for x_0 instead of eps: the loss of one draw of pixels, t and noise.

    images: uint8 (B, C, H, W). pure_noise: all at the last timestep, where the one-step mean is
    learned, and every missing pixel is an output; otherwise t is uniform and a fifth of the
    pixels are outputs. order: (B, H * W) for fixed masks. rows: those of this process.
    """
    split = sparse_split(images, output_ratio=None if pure_noise else 0.2, order=order)
    x_0, T = split["output_values"], schedule.num_timesteps
    t = torch.randint(T - 1 if pure_noise else 0, T, (len(x_0),), device=x_0.device)
    x_t = schedule.q_sample(x_0, t, noise=torch.randn_like(x_0))
    with mixed_precision(images.device):
        x_0_hat = model(x_t[rows], split["output_coords"][rows], t[rows],
                        split["input_coords"][rows], split["input_values"][rows], pure_noise)
    return F.mse_loss(x_0_hat, x_0[rows])


def train_field(model, optimizers, images, schedule, args, first=0, rows=slice(None)):
    """The training loop: yields (steps done, loss) after each of args.steps, from step `first`.

    images: uint8 (N, C, H, W). One half of each batch is at the last timestep, the other at all.
    """
    per_epoch, half = len(images) // args.batch_size, args.batch_size // 2
    for step in range(first, args.steps):
        epoch, place = divmod(step, per_epoch)
        if place == 0 or step == first:
            generator = torch.Generator().manual_seed(args.seed * 1_000_003 + epoch)
            shuffled = torch.randperm(len(images), generator=generator).to(images.device)
        torch.manual_seed(args.seed * 1_000_003 + step)
        index = shuffled[place * args.batch_size:(place + 1) * args.batch_size]
        batch, orders = images[index], (None, None)
        if args.masks == "fixed":
            orders = fixed_order(args.seed, index, images[0, 0].numel()).split(half)
        loss = (field_loss(model, batch[:half], schedule, True, orders[0], rows)
                + field_loss(model, batch[half:], schedule, False, orders[1], rows)) / 2
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            group = optimizer.param_groups[0]
            group["lr"] = group["initial_lr"] * warmup_cosine(step, args.steps, 0.02)
            optimizer.step()
        yield step + 1, loss.detach()


def mixed_precision(device):
    """bfloat16 autocast where a GPU has it in hardware."""
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are made orthogonal. Jordan et al. (2024), kellerjordan.github.io.

    For weights with two or more dimensions, a convolution kernel as (out, in * 9). Five steps of
    a Newton-Schulz iteration bring the singular values of the update near 1. (torch.optim.Muon
    takes no convolutions and iterates in bfloat16, which most CPUs emulate.)
    """

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.01):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.mul_(group["momentum"]).add_(p.grad)
                update = (p.grad + group["momentum"] * momentum).flatten(1)  # Nesterov
                tall = update.shape[0] > update.shape[1]
                x = update.T if tall else update
                x = x / (x.norm() + 1e-7)
                for _ in range(5):
                    square = x @ x.T
                    x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
                scale = max(1, update.shape[0] / update.shape[1]) ** 0.5
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_((x.T if tall else x).reshape(p.shape), alpha=-group["lr"] * scale)


def make_optimizers(model, args):
    """AdamW; for small and medium fields Muon for the matrices and kernels, AdamW for the rest."""
    muon = args.model == "nf" and args.size != "full"
    others = ("latents", "marker", "to_values.weight", "unet.first.weight")  # in- and outputs
    matrices, rest = [], []
    for name, p in model.named_parameters():
        is_matrix = muon and p.dim() > 1 and not name.endswith(others)
        (matrices if is_matrix else rest).append(p)
    adam_lr = 0.15 * args.lr if muon else args.lr
    decay = 0.01 if args.model == "nf" else 0.0
    optimizers = [Muon(matrices, args.lr)] if matrices else []
    if rest:
        optimizers.append(torch.optim.AdamW(rest, adam_lr, weight_decay=decay, fused=True))
    for optimizer in optimizers:
        optimizer.param_groups[0]["initial_lr"] = optimizer.param_groups[0]["lr"]
    return optimizers


# --------------------------------------------------------------------------------- command line

RECIPES = {  # --lr is Muon's (AdamW gets 0.15 of it); full and the autoencoders have AdamW alone
    "small": dict(batch_size=32, lr=0.02, steps=1250),
    "medium": dict(batch_size=32, lr=0.02, steps=4000),
    "full": dict(batch_size=64, lr=1e-4, epochs=100),
    "ae": dict(batch_size=512, lr=6e-3, epochs=10),
}


def positive(text):
    if int(text) < 1 or int(text) > 10**7:
        raise argparse.ArgumentTypeError(f"must be between 1 and 10,000,000, got {text}")
    return int(text)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", choices=["nf", "dae", "ae"], default="nf")
    add("--size", choices=list(SIZES), default="small", help="nf only")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="nf only")
    add("--masks", choices=["fresh", "fixed"], default="fresh",
        help="nf only; fixed: each image keeps its mask")
    add("--beta-schedule", choices=["cosine", "linear"], default="cosine", help="of nf")
    add("--timesteps", type=positive, default=1000, help="nf only: T, length of the diffusion")
    add("--noise", choices=[*NOISES, "mixed"], default="gaussian", help="dae only")
    add("--noise-param", type=float, help="dae only (default 0.3, salt_pepper 0.2)")
    add("--data", default="auto",
        help="auto, cifar10, mnist, leaves, glyphs or a folder of pictures")
    add("--data-dir", type=Path, default=Path("data"), help="where data sets are")
    add("--out", type=Path, default=Path("out"), help="folder for everything that is written")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=positive, help="how many batches to train on")
    length.add_argument("--epochs", type=positive, help="or how many times through the data")
    add("--batch-size", type=positive)
    add("--lr", type=float, help="peak learning rate")
    add("--seed", type=int, default=42)
    cuda = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # under torchrun a GPU for each process
    add("--device", default=cuda if torch.cuda.is_available() else "cpu")
    add("--resume", action="store_true", help="go on from the checkpoint below --out")
    add("--save-every", type=positive, default=500, help="steps between checkpoints")
    add("--evaluate", type=positive, default=200, help="nf only: images in the closing table")
    add("--bench", action="store_true", help="measure the speed of training instead")
    args = parser.parse_args()
    args.device = pick_device(args.device)
    recipe = dict(RECIPES[args.size if args.model == "nf" else "ae"])
    if args.size != "full" and args.model == "nf" and args.device.type == "cuda":
        recipe["steps"] = 20_000
    if args.steps or args.epochs:
        recipe |= dict(steps=args.steps, epochs=args.epochs)
    for name in ("batch_size", "lr", "steps", "epochs"):
        if getattr(args, name) is None:
            setattr(args, name, recipe.get(name))
    if args.noise_param is not None and (args.model != "dae" or args.noise == "mixed"):
        parser.error("--noise-param is for --model dae with a noise other than mixed")
    if args.model != "dae":
        args.noise_text = "clean"
    elif args.noise == "mixed":
        args.noise_text = "mixed"
    else:
        strength = NOISES[args.noise][1] if args.noise_param is None else args.noise_param
        args.noise_text = f"{args.noise} {strength}"
    if not 0 < args.lr < math.inf or not 0 <= args.seed < 2**31:
        parser.error("--lr must be above 0 and --seed between 0 and 2147483647")
    return args


def build(args, images):
    """Model, schedule (None for autoencoders) and the settings that a resumed run must share."""
    torch.manual_seed(args.seed)
    settings = dict(model=args.model, batch_size=args.batch_size, lr=args.lr, seed=args.seed)
    channels, side = images.shape[1:3]
    if args.model != "nf":
        if (channels, side) != (1, 28):
            raise ValueError("the autoencoders take 28 x 28 grey images: --data mnist, glyphs or "
                             "a folder of pictures")
        config, schedule = dict(input_dim=784, latent_dim=64), None
        model = DenoisingAutoencoder(**config)
        model.init_output_bias(images / 255)
        settings |= dict(noise=args.noise_text)
    else:
        schedule = DiffusionSchedule(args.timesteps, args.beta_schedule)
        if schedule.alphas_cumprod[-1] > 1e-3:
            raise ValueError(f"{args.timesteps} timesteps of the {args.beta_schedule} schedule do "
                             f"not end in pure noise: use more, or the cosine schedule")
        config = dict(SIZES[args.size], parts=args.parts, input_channels=channels,
                      output_channels=channels, side=side)
        model = NFDenoiser(schedule.alphas_cumprod, **config, covariance=pixel_covariance(images))
        schedule.to(args.device)
        settings |= dict(masks=args.masks, timesteps=args.timesteps,
                         beta_schedule=args.beta_schedule)
    return model.to(args.device), schedule, config, settings


def bench(loop, loss, model, optimizers, args):
    """Print images per second of the loop's own steps, their parts, the share of the matmul rate.

    loss: a function without arguments, the loss of one batch as the loop computes it.
    """
    def seconds(work):  # median, of GPUs synchronised
        timer = Timer("work()", globals=dict(work=work), num_threads=torch.get_num_threads())
        return timer.blocked_autorange(min_run_time=0.5).median

    def both():
        model.zero_grad()
        loss().backward()

    next(loop)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        both()
    whole, forward, forward_backward = (seconds(f) for f in (lambda: next(loop), loss, both))
    parts = dict(forward=forward, backward=forward_backward - forward,
                 optimiser=seconds(lambda: [optimizer.step() for optimizer in optimizers]))
    parts["data and the rest"] = whole - sum(parts.values())
    matrix, flops = torch.rand(2048, 2048, device=args.device), counter.get_total_flops()
    with mixed_precision(args.device):
        rate = 2 * 2048**3 / seconds(lambda: matrix @ matrix)
    print(f"whole step {1e3 * whole:.1f} ms, {args.batch_size / whole:.1f} images/s: "
          + ", ".join(f"{name} {value / whole:.1%}" for name, value in parts.items()))
    print(f"forward and backward {flops / args.batch_size / 1e9:.3f} GFLOP per image, "
          f"{flops / forward_backward / rate:.0%} of the matmul rate ({rate / 1e9:.0f} GFLOP/s)")


def resume(path, model, optimizers, losses, settings):
    """Load a checkpoint into model, optimizers and losses; returns (its step, its tests)."""
    if not path.exists():
        raise ValueError(f"nothing to resume: there is no {path}")
    checkpoint = load_checkpoint(path)[1]
    if "optimizers" not in checkpoint:
        raise ValueError(f"{path} was exported for sampling and cannot be resumed")
    old = checkpoint["settings"]
    changed = [f"{key} {old.get(key)} -> {settings.get(key)}" for key in old | settings
               if old.get(key) != settings.get(key)]
    if changed:
        raise ValueError(f"{path} was trained with other settings ({', '.join(changed)}): use "
                         f"those, or another --out")
    step = checkpoint["step"]
    if step >= len(losses):
        raise ValueError(f"{path} has already done {step:,} steps: --steps must be more")
    model.load_state_dict(checkpoint["model"])
    for optimizer, state in zip(optimizers, checkpoint["optimizers"]):
        optimizer.load_state_dict(state)
    losses[:step] = checkpoint["losses"].to(losses.device)
    return step, checkpoint["tests"]


def finish(args, model, schedule, losses, tests, tests_name, images, name):
    """Loss curve, table of results and pictures below out/MODEL."""
    folder = args.out / args.model
    if losses:
        draw_losses(folder, losses, tests, tests_name, f"{args.model} on {name}")
    if args.model == "nf":
        results = report_field(model, schedule, images[:args.evaluate], folder, name,
                               num_steps=min(50, args.timesteps))
    else:
        results = report_autoencoder(model, images, folder, name)
    write_json(folder / "results.json", dict(data=name, methods=results))


def draw_losses(folder, losses, tests, tests_name, title):
    """loss.csv, and loss.png: the training loss and the test metric during training."""
    with open(folder / "loss.csv", "w", newline="") as file:
        csv.writer(file).writerows([("step", "loss"), *enumerate(losses, 1)])
    width = max(1, len(losses) // 100)  # each point is the mean of a hundredth of the run
    ends = range(width, len(losses) + 1, width)
    smooth = ends, [sum(losses[end - width:end]) / width for end in ends]
    steps, values, *baseline = zip(*tests)
    curves = {tests_name: (steps, values)} | {"kriging": (steps, line) for line in baseline}
    charts = [line_chart(f"{title}: training loss", {"loss": smooth}, log_y=True),
              line_chart(f"{tests_name} on test images", curves)]
    picture = Image.new("RGB", (920, 320))
    for i, chart in enumerate(charts):
        picture.paste(chart, (460 * i, 0))
    picture.save(folder / "loss.png")
    print(f"loss: {folder / 'loss.png'}, {folder / 'loss.csv'}")


def main():
    args = parse_arguments()
    # torchrun sets these: this process is `rank` of `world`, and `local` on its machine
    rank, world, local = (int(os.environ.get(name, default)) for name, default in
                          (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if world > 1:
        if args.device.type == "cuda":
            torch.cuda.set_device(args.device)
        torch.distributed.init_process_group("nccl" if args.device.type == "cuda" else "gloo")
        if rank:
            sys.stdout = open(os.devnull, "w")
    rows_each = world * (2 if args.model == "nf" else 1)
    if args.batch_size % rows_each:
        raise ValueError(f"--batch-size must be a multiple of {rows_each}, got {args.batch_size}")

    # The first process of a machine fetches the data, the others find it there.
    if world > 1 and local:
        torch.distributed.barrier()
    real = "cifar10" if args.model == "nf" else "mnist"
    name, images, _ = load_dataset(args.data, args.data_dir, train=True, real=real)
    _, test_images, _ = load_dataset(name, args.data_dir, train=False, real=real)
    if world > 1 and not local:
        torch.distributed.barrier()
    images, test_images = images.to(args.device), test_images.to(args.device)
    if args.batch_size > len(images):
        raise ValueError(f"--batch-size {args.batch_size} is more than {len(images):,} images")
    args.steps = args.steps or args.epochs * (len(images) // args.batch_size)
    model, schedule, config, settings = build(args, images)
    if not list(model.parameters()):
        args.steps = 0  # --parts field: linear algebra, nothing to train
    optimizers = make_optimizers(model, args)
    settings |= dict(data=name, **config)
    folder = args.out / args.model
    path, first = folder / "checkpoint.pt", 0
    losses, tests = torch.zeros(args.steps, device=args.device), []
    if args.resume:
        first, tests = resume(path, model, optimizers, losses, settings)
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{args.model}: {sum(p.numel() for p in model.parameters()):,} parameters | {name}: "
          f"{len(images):,} images | batch {args.batch_size}, {args.steps:,} steps, lr {args.lr:g}"
          f" | {args.device}, {torch.get_num_threads()} threads, torch {torch.__version__}")

    # The loop itself is train_field or train_autoencoder.
    trained, shard = model, slice(rank, None, world)
    if world > 1 and args.steps:  # averages the gradients of all processes during backward()
        trained = DistributedDataParallel(model, broadcast_buffers=False)
    if args.bench:
        args.steps = 10**7 if args.steps else 0
    if args.model == "nf":
        loop = train_field(trained, optimizers, images, schedule, args, first, shard)
        measure = lambda: one_step_psnr(model, schedule, test_images[:100])
        every, tests_name = max(1, args.steps // 8), "one-step PSNR"
    else:
        corrupt = corruption(args.noise_text)
        loop = train_autoencoder(trained, optimizers[0], images.flatten(1).float() / 255, corrupt,
                                 args.steps, args.batch_size, args.lr, args.seed, first, shard)
        measure = lambda: [test_error(model, test_images[:1000], corrupt)]
        every, tests_name = max(1, len(images) // args.batch_size), "test MSE"
    if args.bench:
        if args.steps == 0:
            raise ValueError("--parts field has no weights: there is nothing to time")
        if args.model == "nf":
            half = images[:args.batch_size // 2]
            loss = lambda: (field_loss(model, half, schedule, True)
                            + field_loss(model, half, schedule, False)) / 2
        else:
            clean = images[:args.batch_size].flatten(1).float() / 255
            loss = lambda: F.mse_loss(model(clean)[0], clean)
        return bench(loop, loss, model, optimizers, args)

    def save(step):
        if rank == 0:
            save_checkpoint(path, dict(
                kind=args.model, config=config, data=name, step=step, settings=settings,
                schedule=dict(timesteps=args.timesteps, beta_schedule=args.beta_schedule),
                model=model.state_dict(), losses=losses[:step].cpu(), tests=tests,
                optimizers=[optimizer.state_dict() for optimizer in optimizers]))

    stop = []  # Ctrl-C stops after the current step, so that what is saved is whole
    if world == 1:
        signal.signal(signal.SIGINT, lambda *_: stop.append(1) if not stop else sys.exit(130))
    start = shown = time.time()
    for step, loss in loop:
        losses[step - 1] = loss
        stopping = bool(stop)  # read once: a signal may come at any line
        last = step == args.steps or stopping
        saving = last or step % args.save_every == 0
        if step % every == 0 or step == args.steps:
            tests.append([step, *measure()])
        # reading the loss makes a GPU wait, so it is done now and then only
        if saving or time.time() - shown > (0.5 if sys.stdout.isatty() else 15):
            recent, shown = losses[max(0, step - 100):step].mean().item(), time.time()
            finite = all(bool(p.isfinite().all()) for p in model.parameters())
            if not (finite and math.isfinite(recent)):
                raise ValueError(f"the loss or a weight is no longer finite at step {step:,}: use "
                                 f"a lower --lr; {path} is from an earlier step, if there is one")
            rate = (step - first) / (shown - start)
            measured = f"{tests_name} {tests[-1][1]:.4g}  " if tests else ""
            line = (f"step {step:,} of {args.steps:,}  loss {recent:.5f}  {measured}"
                    f"{rate * args.batch_size:,.0f} images/s  "
                    f"{(args.steps - step) / rate:.0f} s left")
            print(f"\r{line:90}" if sys.stdout.isatty() else line,
                  end="\n" if last or not sys.stdout.isatty() else "", flush=True)
        if saving:
            save(step)
        if stopping and step < args.steps:
            print(f"stopped and saved: {path}. To go on, give the same command with --resume")
            sys.exit(130)
    if args.steps == 0:
        save(0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    print(f"trained in {time.time() - start:.0f} s; checkpoint: {path}")
    if world > 1:
        torch.distributed.destroy_process_group()
    if rank == 0:
        finish(args, model.eval(), schedule, losses.tolist(), tests, tests_name, test_images,
               name)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as problem:
        sys.exit(f"error: {problem}")
    except torch.OutOfMemoryError:
        sys.exit("error: out of memory: use a smaller --batch-size")
    except torch.linalg.LinAlgError as problem:  # the covariance of too few images
        sys.exit(f"error: {problem}")
    except KeyboardInterrupt:
        sys.exit(130)
