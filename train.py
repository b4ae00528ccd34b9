"""Train the neural field (nf), the denoising autoencoder (dae), or its control without noise (ae).

    python train.py --model nf                    # 11 to 17 minutes, 2 cores; a GPU: 20,000 steps
    python train.py --model nf --parts perceiver  # attention alone, or another choice of parts
    python train.py --model nf --pixels anywhere  # the input lies anywhere, not on the pixel grid
    python train.py --model dae --noise salt_pepper --noise-param 0.4
    python train.py --model nf --data my_photos   # a folder of your own pictures
    python train.py --model nf --resume           # continue an interrupted run
    torchrun --standalone --nproc_per_node=2 train.py --model nf   # processes share every batch

All three compare a prediction with the CLEAN image:

    nf     loss = mean (f(x_t, coords_out, t, coords_in, x_in) - x_0)^2    nf_loss in nf_denoiser.py
    dae    loss = mean (g(f(corrupt(x))) - x)^2                autoencoder_loss in autoencoder.py
    ae     loss = mean (g(f(x)) - x)^2

Each step seeds its random numbers with a function of --seed and its number, so a resumed run
repeats an uninterrupted one, on a CPU bit for bit. Below out/MODEL it writes checkpoint.pt,
loss.png, samples.png and results.json. An older checkpoint.pt becomes checkpoint-old.pt.
"""
import argparse
import math
import os
import signal
import sys
import threading
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import sample  # before torch: it lets the CPU do what a Mac's GPU cannot
import torch
from PIL import Image
from torch import nn

from autoencoder import DenoisingAutoencoder, autoencoder_loss, corrupt, report_autoencoder
from data import (BUILT_IN, fixed_order, line_chart, load_dataset, off_grid_split, run,
                  save_pictures, sparse_split)
from nf_denoiser import PARTS, SIZES, NFDenoiser, nf_loss, pixel_covariance
from noise import NOISES
from schedule import DiffusionSchedule


def field_loss(model, schedule, images, index, args, rows):
    """The loss of a batch: the images `index` of images uint8 (N, C, H, W).

    Half of the batch trains the one-step mean, half the steps of a sampler. A U-Net computes all
    pixels anyway, so the first half may ask it for all that are missing; attention takes longer
    the more are asked. rows: this process's share of each half. Returns a scalar.
    """
    mean_half, sampling_half = index.chunk(2)
    output_ratio = 0.2
    if "unet" in args.parts:
        output_ratio = 0.6 if "perceiver" in args.parts else None
    with mixed_precision(args.device):
        split = draw_split(images, mean_half, output_ratio, args)
        mean = nf_loss(model, schedule, split, pure_noise=True, rows=rows)
        split = draw_split(images, sampling_half, 0.2, args)
        steps = nf_loss(model, schedule, split, pure_noise=False, rows=rows)
    return (mean + steps) / 2


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are made orthogonal. Jordan et al. (2024), kellerjordan.github.io.

    A gradient's largest singular values belong to a few directions that many examples share; a
    step along it hardly moves all others. The nearest orthogonal matrix has the same directions,
    all with singular value 1. An odd polynomial of a matrix acts on its singular values: five
    times s -> 3.4445 s - 4.7750 s^3 + 2.0315 s^5 brings any s in (0, 1] to about 1.
    For weights with two or more dimensions, a convolution kernel as (out, in * 9).
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
                x = update / (update.norm() + 1e-7)
                for _ in range(5):
                    square = x @ x.T
                    x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
                scale = max(1, update.shape[0] / update.shape[1]) ** 0.5
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(x.view_as(p), alpha=-group["lr"] * scale)


def training_loop(task, optimizers, images, args, world=1, first=0):
    """Train: yields (steps done, loss) after each step from `first`.

    Every epoch has a new order of the images. The order and all other random numbers are seeded
    with functions of seed, epoch and step, so that a run can be resumed at any step.
    """
    size, model = args.batch_size, task.model
    per_epoch = len(images) // size
    for step in range(first, args.steps):
        epoch, place = divmod(step, per_epoch)
        if place == 0 or step == first:
            generator = torch.Generator().manual_seed(args.seed * 1_000_003 + epoch)
            order = torch.randperm(len(images), generator=generator).to(images.device)
        torch.manual_seed(args.seed * 1_000_003 + step)
        loss = task.batch_loss(order[place * size:(place + 1) * size])
        model.zero_grad()
        loss.backward()
        loss = loss.detach()
        if world > 1:  # the mean over equal shares of a batch is that of the batch
            gradients = [p.grad for p in model.parameters()]
            for x in [loss, *gradients]:
                torch.distributed.all_reduce(x)
                x /= world
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        # A linear warm-up, times a half-cosine decay to 0. Loshchilov & Hutter (2017), eq. 5
        rate = min(1.0, (step + 1) / max(1, task.warmup * args.steps))
        rate *= 0.5 * (1 + math.cos(math.pi * step / args.steps))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = optimizer.defaults["lr"] * rate
            optimizer.step()
        yield step + 1, loss


# ======================= below: models, optimizers, the run with its checkpoints, command line
def nf_task(args, images, test_images, rows):
    """The field's model, losses and figures. images, test_images: uint8 (N, C, H, W)."""
    channels, side = images.shape[1:3]
    schedule = DiffusionSchedule(beta_schedule=args.beta_schedule)
    config = dict(SIZES[args.size], parts=args.parts, channels=channels, side=side)
    if args.num_latents:
        config["num_latents"] = args.num_latents
    model = NFDenoiser(schedule.alphas_cumprod, covariance=pixel_covariance(images), **config)
    model, schedule = model.to(args.device), schedule.to(args.device)

    def batch_loss(index):
        return field_loss(model, schedule, images, index, args, rows)

    def measure():
        """One-step PSNR of the model and of kriging on a few test images."""
        figures = sample.evaluate_field(model.eval(), schedule, test_images[:100],
                                        pixels=args.pixels)
        model.train()
        return [figures["one-step mean"]["psnr"], figures["kriging"]["psnr"]]

    def report(folder):
        return sample.report_field(model.eval(), schedule, test_images[:args.evaluate or 200],
                                   folder, args.data, pixels=args.pixels)

    return SimpleNamespace(model=model, config=config, batch_loss=batch_loss, measure=measure,
                           report=report, metric="one-step PSNR", warmup=0.02,
                           every=min(500, max(1, args.steps // 8)))


def autoencoder_task(args, images, test_images, rows):
    """The autoencoders, as nf_task. Raises ValueError for images that they cannot take."""
    if images.shape[1:] != (1, 28, 28):
        raise ValueError("the autoencoders take 28 x 28 grey images: --data mnist, glyphs or "
                         "a folder of pictures")
    config = dict(input_dim=784, latent_dim=64)
    model = DenoisingAutoencoder(**config)
    model.init_output_bias(images / 255)
    model = model.to(args.device)

    def batch_loss(index):
        clean = images[index].flatten(1) / 255
        noisy = corrupt(clean, args.noise)  # of all processes: two draw the same noise as one
        return autoencoder_loss(model, clean[rows], noisy[rows])

    @torch.no_grad()
    def measure():
        test = test_images[:1000].flatten(1) / 255
        noisy = corrupt(test, args.noise, torch.Generator(test.device).manual_seed(0))
        return [autoencoder_loss(model, test, noisy).item()]

    def report(folder):
        return report_autoencoder(model, test_images[:args.evaluate], folder, args.noise)

    return SimpleNamespace(model=model, config=config, batch_loss=batch_loss, measure=measure,
                           report=report, metric="test MSE", warmup=0.1,
                           every=len(images) // args.batch_size)


def draw_split(images, index, output_ratio, args):
    """Input and output pixels of the images `index`, new ones or, with --masks fixed, always the
    same ones for an image."""
    order, pixels = None, images[0, 0].numel()
    if args.pixels == "anywhere":
        pixels += 2 * int(0.2 * pixels)  # and two coordinates for each input
    if args.masks == "fixed":
        order = fixed_order(args.seed, index, pixels)
    make_split = off_grid_split if args.pixels == "anywhere" else sparse_split
    return make_split(images[index], output_ratio=output_ratio, order=order)


def mixed_precision(device):
    """bfloat16 autocast where a GPU has it in hardware."""
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)


def make_optimizers(model, args):
    """AdamW; for small and medium fields Muon for the matrices and kernels, AdamW for the rest.

    Muon's steps have a fixed size, AdamW's shrink with noisy gradients, so their learning rates are
    not comparable: 0.15 of --lr was the best ratio of a few. Latents, the first convolution and the
    output layers stay with AdamW.
    """
    muon = args.model == "nf" and args.size != "full"
    others = ("latents", "to_values.weight", "unet.first.weight")
    matrices, rest = [], []
    for name, p in model.named_parameters():
        is_matrix = muon and p.dim() > 1 and not name.endswith(others)
        (matrices if is_matrix else rest).append(p)
    optimizers = []
    if matrices:
        optimizers.append(Muon(matrices, args.lr))
    if rest:
        lr = 0.15 * args.lr if muon else args.lr
        decay = 0.01 if args.model == "nf" else 0.0
        optimizers.append(torch.optim.AdamW(rest, lr, weight_decay=decay, fused=True))
    return optimizers


def train(task, optimizers, images, args, path, rank, world):
    """Run the loop; test, save and print now and then. Returns (losses, tests).

    Ctrl-C and SIGTERM end it after a whole step, saved; a second one at once. Raises ValueError,
    and saves nothing, if the loss or a weight is not finite.
    """
    losses = torch.zeros(args.steps, device=args.device)
    settings = {key: value for key, value in vars(args).items() if key not in FREE}
    first, tests, ours = 0, [], args.resume  # ours: what is at path is of this run
    old = path.with_name("checkpoint-old.pt")
    if args.resume:
        first, tests = resume(path, settings, task.model, optimizers, losses)
    elif path.exists():
        print(f"notice: {path} will become {old}; --resume would go on from it")

    def save(step):
        nonlocal ours
        set_aside = old if path.exists() and not ours else None
        ours = True
        sample.save_checkpoint(path, dict(
            kind=args.model, config=task.config, data=args.data, step=step, settings=settings,
            schedule=dict(beta_schedule=args.beta_schedule), model=task.model.state_dict(),
            optimizers=[optimizer.state_dict() for optimizer in optimizers],
            losses=losses[:step].cpu(), tests=tests), set_aside)

    signals = []
    watch_for_signals(signals, world)
    step, start = first, time.perf_counter()
    try:
        for step, loss in training_loop(task, optimizers, images, args, world, first):
            losses[step - 1] = loss
            rate = (step - first) / (time.perf_counter() - start)
            line = (f"step {step:,} of {args.steps:,}  {rate * args.batch_size:,.0f} images/s  "
                    f"{(args.steps - step) / rate:.0f} s left")
            stopping = bool(signals)
            reporting = step % task.every == 0 or step == args.steps
            if reporting:
                tests.append([step, *task.measure()])
                line += f"  {task.metric} {tests[-1][1]:.4g}"
            if reporting or (stopping and (ours or not path.exists())):
                recent = losses[max(0, step - 100):step].mean()  # reading it makes a GPU wait
                check_finite(task.model, recent, step, path)
                if rank == 0:
                    save(step)
                print(f"{line}  loss {recent:.5f}", flush=True)
            elif sys.stdout.isatty():
                print(line, end="\x1b[K\r")  # clears the rest of the line
            if stopping:
                break
    finally:
        watch_for_signals(None, world)
    if step < args.steps:
        saved = f"saved: {path}. To go on, give the same command with --resume"
        print("stopped and", saved if ours else f"not saved: {path} is another run's")
        sys.exit(128 + signals[0])
    if not optimizers and rank == 0:
        save(0)
    print(f"trained in {time.perf_counter() - start:.0f} s; checkpoint: {path}")
    return losses, tests


def watch_for_signals(signals, world):
    """Ctrl-C and SIGTERM are appended to the list, a second one exits; None: as Python has it.

    Only the main thread may set signals, and torchrun sends its own to several processes.
    """
    if world > 1 or threading.current_thread() is not threading.main_thread():
        return

    def note(number, frame):
        if signals:
            sys.exit(128 + number)
        signals.append(number)

    signal.signal(signal.SIGINT, signal.default_int_handler if signals is None else note)
    signal.signal(signal.SIGTERM, signal.SIG_DFL if signals is None else note)


def check_finite(model, loss, step, path):
    if not all(x.isfinite().all() for x in (loss, *model.parameters())):
        raise ValueError(f"the loss or a weight is no longer finite at step {step:,}: use a lower "
                         f"--lr; {path} is from an earlier step, if there is one")


def resume(path, settings, model, optimizers, losses):
    """Load a checkpoint into model, optimizers and losses; returns (its step, its tests)."""
    _, checkpoint = sample.load_checkpoint(path)
    if "optimizers" not in checkpoint:
        raise ValueError(f"{path} was exported for sampling and cannot be resumed")
    old, step = checkpoint["settings"], checkpoint["step"]
    changed = [f"{key} {old.get(key)} -> {value}" for key, value in settings.items()
               if old.get(key) != value]
    if changed:
        raise ValueError(f"{path} was trained on {checkpoint['data']} and with other settings "
                         f"({', '.join(changed)}): use those, or another --out")
    if step >= len(losses):
        raise ValueError(f"{path} has already done {step:,} steps: --steps must be more")
    model.load_state_dict(checkpoint["model"])
    for optimizer, state in zip(optimizers, checkpoint["optimizers"]):
        optimizer.load_state_dict(state)
    losses[:step] = checkpoint["losses"].to(losses.device)
    return step, checkpoint["tests"]


def draw_losses(folder, losses, tests, metric, title):
    """loss.png: the training loss, and the test metric during training."""
    width = max(1, len(losses) // 100)  # each point is the mean of a hundredth of the run
    means = [part.mean().item() for part in losses.split(width) if len(part) == width]
    smooth = range(width, len(losses) + 1, width), means
    steps, values, *kriging = zip(*tests)
    curves = {metric: (steps, values)}
    if kriging:
        curves["kriging"] = steps, kriging[0]
    picture = Image.new("RGB", (920, 320))
    picture.paste(line_chart(title, {"training loss": smooth}))
    picture.paste(line_chart(f"{metric} on test images", curves), (460, 0))
    save_pictures(folder, {"loss.png": picture})


RECIPES = {  # --lr is Muon's (AdamW gets 0.15 of it); full and the autoencoders use AdamW alone
    "small": dict(batch_size=32, lr=0.02, steps=1250),
    "medium": dict(batch_size=32, lr=0.02, steps=7000),
    "full": dict(batch_size=64, lr=1e-4, epochs=100),
    "ae": dict(batch_size=512, lr=6e-3, epochs=10),
}
ONLY_FOR = dict(size="nf", parts="nf", num_latents="nf", pixels="nf", masks="nf",
                beta_schedule="nf", noise="dae")
# the flags that a resumed run may change; noise_param is part of noise, data compared as images
FREE = {"steps", "epochs", "device", "resume", "evaluate", "out", "data", "data_dir",
        "noise_param"}


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add, count = parser.add_argument, sample.between(1, 10**7)
    add("--model", choices=["nf", "dae", "ae"], default="nf")
    add("--size", choices=list(SIZES), default="small", help="nf only; default %(default)s")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="nf only")
    add("--num-latents", type=count, help="nf only: so many latents without a place, as in the "
        "paper, instead of one at each input pixel")
    add("--pixels", choices=["grid", "anywhere"], default="grid",
        help="nf only: where the input lies, on the pixel grid or anywhere")
    add("--masks", choices=["fresh", "fixed"], default="fresh", help="nf only; fixed: per image")
    add("--beta-schedule", choices=["cosine", "linear"], default="cosine", help="nf only")
    add("--noise", choices=[*NOISES, "mixed"], default="gaussian", help="dae only")
    add("--noise-param", type=float, help="dae only (default 0.3, salt_pepper 0.2)")
    add("--data", default="auto", help="auto, cifar10, mnist, leaves, glyphs or your own folder")
    add("--data-dir", type=Path, default=Path("data"), help="folder of the data sets")
    add("--out", type=Path, default=Path("out"), help="folder for everything that is written")
    length = parser.add_mutually_exclusive_group().add_argument
    length("--steps", type=count, help="how many batches to train on")
    length("--epochs", type=count, help="or how many times through the data")
    add("--batch-size", type=count)
    add("--lr", type=sample.between(1e-12, 1e99, float), help="peak learning rate")
    add("--seed", type=sample.between(0, 2**31 - 1), default=42)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--resume", action="store_true", help="continue from the checkpoint below --out")
    add("--evaluate", type=count, help="test images in the closing table (nf: 200, others: all)")
    args = parser.parse_args(argv)
    args.parts = [part for part in PARTS if part in args.parts]
    for flag, model in ONLY_FOR.items():
        if args.model != model and getattr(args, flag) != parser.get_default(flag):
            parser.error(f"--{flag.replace('_', '-')} is for --model {model}")
    if args.noise_param is not None and (args.model != "dae" or args.noise == "mixed"):
        parser.error("--noise-param is for --model dae with a noise other than mixed")
    return args


def apply_recipe(args):
    """Fill in what the flags left open: batch size, learning rate, length, the noise's strength."""
    recipe = RECIPES[args.size if args.model == "nf" else "ae"]
    args.batch_size = args.batch_size or recipe["batch_size"]
    args.lr = args.lr or recipe["lr"]
    if not args.steps and not args.epochs:
        args.steps, args.epochs = recipe.get("steps"), recipe.get("epochs")
        if args.steps and args.device.type == "cuda":
            args.steps = 20_000
    if args.model != "dae":
        args.noise = "clean"
    elif args.noise != "mixed":
        strength = args.noise_param
        if strength is None:
            strength = NOISES[args.noise][1]
        args.noise += f" {strength}"


def start_processes(args):
    """Join the processes that torchrun started: (number of this one, how many there are)."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    multiple = world * (2 if args.model == "nf" else 1)  # each half of a batch is shared
    if args.batch_size % multiple:
        raise ValueError(f"--batch-size must be a multiple of {multiple}, got {args.batch_size}")
    if world > 1:
        torch.distributed.init_process_group("nccl" if args.device.type == "cuda" else "gloo")
    if rank > 0:
        sys.stdout = open(os.devnull, "w")
    return rank, world


def load_images(args, rank, world):
    """Training and test images, uint8 (N, C, H, W). Sets args.data to the set that was loaded.

    The first process sends them to all others. args.images, a checksum, is what a resumed run
    compares: a folder may have been moved, or have got new pictures.
    """
    loaded = [None, None, None]
    if rank == 0:
        real = "cifar10" if args.model == "nf" else "mnist"
        name, images, _ = load_dataset(args.data, args.data_dir, train=True, real=real)
        _, test_images, _ = load_dataset(name, args.data_dir, train=False, real=real)
        if name not in ("cifar10", "mnist", *BUILT_IN):
            name = str(Path(name).resolve())  # found again from any directory
        loaded = [name, images, test_images]
    if world > 1:
        torch.distributed.broadcast_object_list(loaded)
    args.data, images, test_images = loaded
    checksum = 0
    for part in (images, test_images):
        checksum = zlib.crc32(part.contiguous().numpy(), checksum)
    args.images = f"{len(images):,} with checksum {checksum:08x}"
    if args.batch_size > len(images):
        raise ValueError(f"--batch-size {args.batch_size} is more than {len(images):,} images")
    return images.to(args.device), test_images.to(args.device)


def main(argv=None):
    args = parse_arguments(argv)
    torch.set_flush_denormal(True)  # weights of far pixels are below 1e-38, and CPUs slow at that
    if args.device == "cuda" and torch.cuda.is_available():  # torchrun: a GPU for each process
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    args.device = sample.pick_device(args.device)
    apply_recipe(args)
    rank, world = start_processes(args)
    path = args.out / args.model / "checkpoint.pt"
    if rank == 0:
        sample.check_place(path)
    images, test_images = load_images(args, rank, world)
    if args.steps is None:
        args.steps = args.epochs * (len(images) // args.batch_size)

    torch.manual_seed(args.seed)
    make_task = nf_task if args.model == "nf" else autoencoder_task
    task = make_task(args, images, test_images, rows=slice(rank, None, world))
    optimizers = make_optimizers(task.model, args)
    if not optimizers:
        args.steps = 0  # --parts gaussian is linear algebra: it has no weights
    print(f"{args.model}: {sum(p.numel() for p in task.model.parameters()):,} parameters | "
          f"{args.data}: {len(images):,} images | {args.device}, processes: {world}, threads: "
          f"{torch.get_num_threads()}, torch {torch.__version__}")
    print(f"batches of {args.batch_size}, {args.steps:,} steps, learning rate {args.lr:g}")

    losses, tests = train(task, optimizers, images, args, path, rank, world)
    if world > 1:
        torch.distributed.destroy_process_group()
    if rank == 0:
        if tests:
            title = f"{args.model} on {Path(args.data).name}"
            draw_losses(path.parent, losses, tests, task.metric, title)
        figures = task.report(path.parent)
        sample.write_json(path.with_name("results.json"), path, args.data, figures)


if __name__ == "__main__":
    run(main)
