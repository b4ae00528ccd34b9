"""Train the neural field (nf), the denoising autoencoder (dae), or its control without noise (ae).

    python train.py --model nf                    # minutes on 2 CPU cores; a GPU: 20,000 steps
    python train.py --model nf --parts field unet # leave a part of the model out
    python train.py --model dae --noise salt_pepper --noise-param 0.4
    python train.py --model nf --data my_photos   # a folder of your own pictures
    python train.py --model nf --resume           # continue an interrupted run
    python train.py --model nf --bench            # images per second, where the time goes
    torchrun --standalone --nproc_per_node=2 train.py --model nf   # processes share every batch

All three compare a prediction with the CLEAN image:

    nf     x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps at the output pixels
           loss = mean (f(x_t, coords_out, t, coords_in, x_in) - x_0)^2     DDPM, algorithm 1
    dae    loss = mean (g(f(corrupt(x))) - x)^2       the loop: train_autoencoder, autoencoder.py
    ae     loss = mean (g(f(x)) - x)^2

The seed of step n is a function of --seed and n, so a run is resumed from its step number, on a
CPU bit for bit. Below out/MODEL: checkpoint.pt, loss.csv, loss.png, samples.png, results.json.
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

from autoencoder import (DenoisingAutoencoder, batches, corruption, report_autoencoder,
                         test_error, train_autoencoder, warmup_cosine)
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
    for step, index in batches(images, args.batch_size, args.steps, args.seed, first):
        torch.manual_seed(args.seed * 1_000_003 + step)
        losses = []
        for half, pure_noise in zip(index.chunk(2), (True, False)):
            order = None
            if args.masks == "fixed":
                order = fixed_order(args.seed, half, images[0, 0].numel())
            losses.append(field_loss(model, images[half], schedule, pure_noise, order, rows))
        loss = sum(losses) / 2
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
    a Newton-Schulz iteration, in float32, bring the singular values of the update near 1.
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
    matrices = {name: p for name, p in model.named_parameters()
                if muon and p.dim() > 1 and not name.endswith(others)}
    rest = [p for name, p in model.named_parameters() if name not in matrices]
    optimizers = [Muon(matrices.values(), args.lr)] if matrices else []
    if rest:
        optimizers.append(torch.optim.AdamW(rest, 0.15 * args.lr if muon else args.lr, fused=True,
                                            weight_decay=0.01 if args.model == "nf" else 0.0))
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
    if not 1 <= int(text) <= 10**7:
        raise argparse.ArgumentTypeError(f"must be between 1 and 10,000,000, got {text}")
    return int(text)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", choices=["nf", "dae", "ae"], default="nf")
    add("--size", choices=list(SIZES), default="small", help="nf only")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="nf only")
    add("--masks", choices=["fresh", "fixed"], default="fresh", help="nf only; of each image")
    add("--beta-schedule", choices=["cosine", "linear"], default="cosine", help="of nf")
    add("--timesteps", type=positive, default=1000, help="nf only: T, length of the diffusion")
    add("--noise", choices=[*NOISES, "mixed"], default="gaussian", help="dae only")
    add("--noise-param", type=float, help="dae only (default 0.3, salt_pepper 0.2)")
    add("--data", default="auto", help="auto, cifar10, mnist, leaves, glyphs or your own folder")
    add("--data-dir", type=Path, default=Path("data"), help="where data sets are")
    add("--out", type=Path, default=Path("out"), help="folder for everything that is written")
    add("--steps", type=positive, help="how many batches to train on")
    add("--epochs", type=positive, help="or how many times through the data")
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
    if args.steps and args.epochs:
        parser.error("give --steps or --epochs, not both")
    args.device = pick_device(args.device)
    recipe = dict(RECIPES[args.size if args.model == "nf" else "ae"])
    if "steps" in recipe and args.device.type == "cuda":
        recipe["steps"] = 20_000
    if args.epochs:
        recipe["steps"] = None
    for name, value in recipe.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.noise_text = args.noise if args.model == "dae" else "clean"
    if args.noise_text in NOISES:
        strength = NOISES[args.noise][1] if args.noise_param is None else args.noise_param
        args.noise_text += f" {strength}"
    elif args.noise_param is not None:
        parser.error("--noise-param is for --model dae with a noise other than mixed")
    if not 0 < args.lr < math.inf or not 0 <= args.seed < 2**31:
        parser.error("--lr must be above 0 and --seed between 0 and 2147483647")
    return args


def build(args, images, name):
    """Model, schedule (None for autoencoders), config, and what a resumed run must share."""
    torch.manual_seed(args.seed)
    channels, side = images.shape[1:3]
    if args.model == "nf":
        schedule = DiffusionSchedule(args.timesteps, args.beta_schedule)
        if schedule.alphas_cumprod[-1] > 1e-3:
            raise ValueError(f"{args.timesteps} timesteps of the {args.beta_schedule} schedule do "
                             f"not end in pure noise: use more, or the cosine schedule")
        config = dict(SIZES[args.size], parts=args.parts, input_channels=channels,
                      output_channels=channels, side=side)
        model = NFDenoiser(schedule.alphas_cumprod, **config, covariance=pixel_covariance(images))
        schedule.to(args.device)
        own = dict(masks=args.masks, timesteps=args.timesteps, beta_schedule=args.beta_schedule)
    else:
        if (channels, side) != (1, 28):
            raise ValueError("the autoencoders take 28 x 28 grey images: --data mnist, glyphs or "
                             "a folder of pictures")
        schedule, config = None, dict(input_dim=784, latent_dim=64)
        model = DenoisingAutoencoder(**config)
        model.init_output_bias(images / 255)
        own = dict(noise=args.noise_text)
    settings = dict(model=args.model, batch_size=args.batch_size, lr=args.lr, seed=args.seed,
                    data=name, **own, **config)
    return model.to(args.device), schedule, config, settings


def resume(path, model, optimizers, losses, settings):
    """Load a checkpoint into model, optimizers and losses; returns (its step, its tests)."""
    if not path.exists():
        raise ValueError(f"nothing to resume: there is no {path}")
    checkpoint = load_checkpoint(path)[1]
    if "optimizers" not in checkpoint:
        raise ValueError(f"{path} was exported for sampling and cannot be resumed")
    old, step = checkpoint["settings"], checkpoint["step"]
    pairs = {key: (old.get(key), settings.get(key)) for key in old | settings}
    changed = [f"{key} {a} -> {b}" for key, (a, b) in pairs.items() if a != b]
    if changed:
        raise ValueError(f"{path} was trained with other settings ({', '.join(changed)}): use "
                         f"those, or another --out")
    if step >= len(losses):
        raise ValueError(f"{path} has already done {step:,} steps: --steps must be more")
    model.load_state_dict(checkpoint["model"])
    for optimizer, state in zip(optimizers, checkpoint["optimizers"]):
        optimizer.load_state_dict(state)
    losses[:step] = checkpoint["losses"].to(losses.device)
    return step, checkpoint["tests"]


def bench(loop, loss, model, optimizers, args):
    """Print images per second of the loop's own steps, their parts, the share of the matmul rate.

    loss: a function without arguments, the loss of one batch as the loop computes it.
    """
    def forward_backward():
        model.zero_grad()
        loss().backward()

    def seconds(work):  # median, of GPUs synchronised
        timer = Timer("work()", globals=dict(work=work), num_threads=torch.get_num_threads())
        return timer.blocked_autorange(min_run_time=0.5).median

    next(loop)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        forward_backward()
    whole, forward, both = (seconds(f) for f in (lambda: next(loop), loss, forward_backward))
    parts = dict(forward=forward, backward=both - forward,
                 optimiser=seconds(lambda: [optimizer.step() for optimizer in optimizers]))
    parts["data and the rest"] = whole - sum(parts.values())
    print(f"whole step {1e3 * whole:.1f} ms, {args.batch_size / whole:.1f} images/s: "
          + ", ".join(f"{name} {value / whole:.1%}" for name, value in parts.items()))
    matrix, flops = torch.rand(2048, 2048, device=args.device), counter.get_total_flops()
    with mixed_precision(args.device):
        rate = 2 * 2048**3 / seconds(lambda: matrix @ matrix)
    print(f"forward and backward {flops / args.batch_size / 1e9:.3f} GFLOP per image, "
          f"{flops / both / rate:.0%} of the matmul rate ({rate / 1e9:.0f} GFLOP/s)")


def draw_losses(folder, losses, tests, metric, title):
    """loss.csv, and loss.png: the training loss and the test metric during training."""
    with open(folder / "loss.csv", "w", newline="") as file:
        csv.writer(file).writerows([("step", "loss"), *enumerate(losses.tolist(), 1)])
    width = max(1, len(losses) // 100)  # each point is the mean of a hundredth of the run
    means = [part.mean().item() for part in losses.split(width) if len(part) == width]
    smooth = range(width, len(losses) + 1, width), means
    steps, values, *baseline = zip(*tests)
    curves = {metric: (steps, values)} | {"kriging": (steps, line) for line in baseline}
    picture = Image.new("RGB", (920, 320))
    picture.paste(line_chart(f"{title}: training loss", {"loss": smooth}, log_y=True), (0, 0))
    picture.paste(line_chart(f"{metric} on test images", curves), (460, 0))
    picture.save(folder / "loss.png")
    print(f"loss: {folder / 'loss.png'}, {folder / 'loss.csv'}")


def main():
    args = parse_arguments()
    # torchrun starts `world` processes; this one is `rank`, and `local_rank` on its machine
    rank, world, local_rank = (int(os.environ.get(name, default)) for name, default in
                               (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if world > 1:
        if args.device.type == "cuda":
            torch.cuda.set_device(args.device)
        torch.distributed.init_process_group("nccl" if args.device.type == "cuda" else "gloo")
    if rank:
        sys.stdout = open(os.devnull, "w")
    divisor = world * (2 if args.model == "nf" else 1)
    if args.batch_size % divisor:
        raise ValueError(f"--batch-size must be a multiple of {divisor}, got {args.batch_size}")

    if local_rank:  # the first process of a machine fetches the data, the others find it there
        torch.distributed.barrier()
    real = "cifar10" if args.model == "nf" else "mnist"
    name, images, _ = load_dataset(args.data, args.data_dir, train=True, real=real)
    _, test_images, _ = load_dataset(name, args.data_dir, train=False, real=real)
    if world > 1 and not local_rank:
        torch.distributed.barrier()
    if args.batch_size > len(images):
        raise ValueError(f"--batch-size {args.batch_size} is more than {len(images):,} images")
    images, test_images = images.to(args.device), test_images.to(args.device)
    per_epoch = len(images) // args.batch_size
    args.steps = 10**6 if args.bench else args.steps or args.epochs * per_epoch
    model, schedule, config, settings = build(args, images, name)
    optimizers = make_optimizers(model, args)
    if not optimizers:  # --parts field is linear algebra: it has no weights
        args.steps = 0
        if args.bench:
            raise ValueError("--parts field has no weights: there is nothing to time")
    folder = args.out / args.model
    path, first = folder / "checkpoint.pt", 0
    losses, tests = torch.zeros(args.steps, device=args.device), []
    if args.resume:
        first, tests = resume(path, model, optimizers, losses, settings)
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{args.model}: {sum(p.numel() for p in model.parameters()):,} parameters | {name}: "
          f"{len(images):,} images | batch {args.batch_size}, {args.steps:,} steps, lr {args.lr:g}"
          f" | {args.device}, {torch.get_num_threads()} threads, torch {torch.__version__}")

    trained, shard = model, slice(rank, None, world)
    if world > 1 and optimizers:  # averages the gradients of all processes during backward()
        trained = DistributedDataParallel(model, broadcast_buffers=False)
    if args.model == "nf":
        loop = train_field(trained, optimizers, images, schedule, args, first, shard)
        loss = lambda: sum(field_loss(model, images[:args.batch_size // 2], schedule, pure_noise)
                           for pure_noise in (True, False)) / 2
        measure = lambda: one_step_psnr(model, schedule, test_images[:100])
        every, metric = max(1, args.steps // 8), "one-step PSNR"
    else:
        corrupt, clean = corruption(args.noise_text), images.flatten(1).float() / 255
        loop = train_autoencoder(trained, optimizers[0], clean, corrupt, args.steps,
                                 args.batch_size, args.lr, args.seed, first, shard)
        batch = clean[:args.batch_size]
        loss = lambda: F.mse_loss(model(batch)[0], batch)
        measure = lambda: [test_error(model, test_images[:1000], args.noise_text)]
        every, metric = per_epoch, "test MSE"
    if args.bench:
        return bench(loop, loss, model, optimizers, args)

    def save(step):
        if rank == 0:
            save_checkpoint(path, dict(
                kind=args.model, config=config, data=name, step=step, settings=settings,
                schedule=dict(timesteps=args.timesteps, beta_schedule=args.beta_schedule),
                model=model.state_dict(), losses=losses[:step].cpu(), tests=tests,
                optimizers=[optimizer.state_dict() for optimizer in optimizers]))

    stop = []  # Ctrl-C ends the loop after a whole step, a second one at once
    if world == 1:
        signal.signal(signal.SIGINT, lambda *_: sys.exit(130) if stop else stop.append(True))
    step, start, shown, terminal = first, time.time(), time.time(), sys.stdout.isatty()
    for step, loss in loop:
        losses[step - 1] = loss
        last = step == args.steps or bool(stop)
        saving = last or step % args.save_every == 0
        if step % every == 0 or step == args.steps:
            tests.append([step, *measure()])
        # reading the loss makes a GPU wait, so it is done now and then only
        if saving or time.time() - shown > (0.5 if terminal else 15):
            recent, shown = losses[max(0, step - 100):step].mean(), time.time()
            if not all(x.isfinite().all() for x in (recent, *model.parameters())):
                raise ValueError(f"the loss or a weight is no longer finite at step {step:,}: use "
                                 f"a lower --lr; {path} is from an earlier step, if there is one")
            rate = (step - first) / (shown - start)
            measured = f"{metric} {tests[-1][1]:.4g}  " if tests else ""
            line = (f"step {step:,} of {args.steps:,}  loss {recent:.5f}  {measured}"
                    f"{rate * args.batch_size:,.0f} images/s  "
                    f"{(args.steps - step) / rate:.0f} s left")
            print(line.ljust(90) if terminal else line, flush=True,
                  end="\r" if terminal and not last else "\n")
        if saving:
            save(step)
        if last:
            break
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if step < args.steps:
        print(f"stopped and saved: {path}. To go on, give the same command with --resume")
        sys.exit(130)
    if not optimizers:
        save(0)
    print(f"trained in {time.time() - start:.0f} s; checkpoint: {path}")
    if world > 1:
        torch.distributed.destroy_process_group()
    if rank:
        return

    if optimizers:
        draw_losses(folder, losses, tests, metric, f"{args.model} on {name}")
    if args.model == "nf":
        results = report_field(model.eval(), schedule, test_images[:args.evaluate], folder, name,
                               num_steps=min(50, args.timesteps))
    else:
        results = report_autoencoder(model.eval(), test_images, folder, name)
    write_json(folder / "results.json", dict(data=name, methods=results))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, torch.linalg.LinAlgError) as problem:
        sys.exit(f"error: {problem}")
    except torch.OutOfMemoryError:
        sys.exit("error: out of memory: use a smaller --batch-size")
    except KeyboardInterrupt:
        sys.exit(130)
