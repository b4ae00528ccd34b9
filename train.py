"""Train the neural field (nf), the denoising autoencoder (dae), or its control without noise (ae).

    python train.py --model nf                    # 6.5 minutes on 2 CPU cores; a GPU: 20,000 steps
    python train.py --model nf --parts field unet # leave a part of the model out
    python train.py --model dae --noise salt_pepper --noise-param 0.4
    python train.py --model nf --data my_photos   # a folder of your own pictures
    python train.py --model nf --resume           # continue an interrupted run
    python train.py --model nf --bench            # images per second, where the time goes
    torchrun --standalone --nproc_per_node=2 train.py --model nf   # processes share every batch

All three compare a prediction with the CLEAN image:

    nf     x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps at the output pixels
           loss = mean (f(x_t, coords_out, t, coords_in, x_in) - x_0)^2     DDPM, algorithm 1
    dae    loss = mean (g(f(corrupt(x))) - x)^2       autoencoder_loss in autoencoder.py
    ae     loss = mean (g(f(x)) - x)^2

The loop is training_loop: draw a batch, its loss, backward, step. Each step
seeds its random numbers with a function of --seed and its number, so a resumed run repeats an
uninterrupted one, on a CPU bit for bit. Below out/MODEL it writes checkpoint.pt, loss.png,
samples.png and results.json.
"""
import os

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # before torch is imported
import argparse
import math
import signal
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

import sample
from autoencoder import DenoisingAutoencoder, autoencoder_loss, leave_clean
from data import fixed_order, line_chart, load_dataset, off_grid_split, run, sparse_split
from nf_denoiser import PARTS, SIZES, NFDenoiser, nf_loss, pixel_covariance
from noise import NOISES, add_mixed_noise
from sample import between, evaluate_field, load_checkpoint, pick_device, save_checkpoint
from schedule import DiffusionSchedule

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
                x = update / (update.norm() + 1e-7)
                for _ in range(5):  # singular values s -> 3.4445 s - 4.7750 s^3 + 2.0315 s^5
                    square = x @ x.T
                    x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
                scale = max(1, update.shape[0] / update.shape[1]) ** 0.5
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(x.view_as(p), alpha=-group["lr"] * scale)


def make_optimizers(model, args):
    """AdamW; for small and medium fields Muon for the matrices and kernels, AdamW for the rest."""
    muon = args.model == "nf" and args.size != "full"
    others = ("latents", "to_values.weight", "unet.first.weight")  # in- and outputs
    matrices = {name: p for name, p in model.named_parameters()
                if muon and p.dim() > 1 and not name.endswith(others)}
    rest = [p for name, p in model.named_parameters() if name not in matrices]
    optimizers = [Muon(matrices.values(), args.lr)] if matrices else []
    if rest:
        optimizers.append(torch.optim.AdamW(rest, 0.15 * args.lr if muon else args.lr, fused=True,
                                            weight_decay=0.01 if args.model == "nf" else 0.0))
    return optimizers


def training_loop(model, optimizers, batch_loss, images, steps, batch_size, seed, warmup, first=0):
    """Train any model: yields (steps done, loss) after each step from `first`.

    images: (N, ...), in a new order in each epoch. batch_loss: indices (batch_size,) of images ->
    loss; its random numbers are torch's own. They and the order are seeded with functions of seed,
    epoch and step, so that a run can be resumed at any step. The learning rate is the one that an
    optimizer was made with, times a linear warm-up over the share `warmup` (0 to 1) of the steps,
    times a half-cosine decay to 0: Loshchilov & Hutter (2017), eq. 5.
    """
    per_epoch = max(1, len(images) // batch_size)
    for step in range(first, steps):
        epoch, place = divmod(step, per_epoch)
        if place == 0 or step == first:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            order = torch.randperm(len(images), generator=generator).to(images.device)
        torch.manual_seed(seed * 1_000_003 + step)
        loss = batch_loss(order[place * batch_size:(place + 1) * batch_size])
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rise = min(1.0, (step + 1) / max(1, warmup * steps))
        rate = rise * 0.5 * (1 + math.cos(math.pi * step / steps))
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = optimizer.defaults["lr"] * rate
            optimizer.step()
        yield step + 1, loss.detach()


def corruption(text):
    """The function(images, generator=None) -> noisy images that a checkpoint's noise stands for.

    text: "clean", "mixed", or a noise of noise.py and its strength, such as "gaussian 0.3".
    """
    if text == "clean":
        return leave_clean
    if text == "mixed":
        return add_mixed_noise
    name, strength = text.split()
    add_noise = NOISES[name][0]

    def corrupt(images, generator=None):
        return add_noise(images, float(strength), generator)
    return corrupt


# --------------------------------------------------------------------------------- command line
RECIPES = {  # --lr is Muon's (AdamW gets 0.15 of it); full and the autoencoders use AdamW alone
    "small": dict(batch_size=32, lr=0.02, steps=1250),
    "medium": dict(batch_size=32, lr=0.02, steps=7000),
    "full": dict(batch_size=64, lr=1e-4, epochs=100),
    "ae": dict(batch_size=512, lr=6e-3, epochs=10),
}
# the flags that a resumed run may change
FREE = {"steps", "epochs", "device", "resume", "evaluate", "bench", "out", "data_dir",
        "noise_param"}  # its value is part of noise


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add, count = parser.add_argument, between(1, 10**7)
    add("--model", choices=["nf", "dae", "ae"], default="nf")
    add("--size", choices=list(SIZES), default="small", help="nf only; default %(default)s")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="nf only")
    add("--num-latents", type=count, help="nf only: so many latents without a place, as in the "
        "paper, instead of one at each input pixel")
    add("--pixels", choices=["grid", "anywhere"], default="grid",
        help="nf only: where the input lies, on the pixel grid or at any coordinates")
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
    add("--lr", type=between(1e-12, 1e99, float), help="peak learning rate")
    add("--seed", type=between(0, 2**31 - 1), default=42)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--resume", action="store_true", help="continue from the checkpoint below --out")
    add("--evaluate", type=count, default=200, help="nf only: images in the closing table")
    add("--bench", action="store_true", help="measure the speed of training instead")
    args = parser.parse_args()
    args.parts = [part for part in PARTS if part in args.parts]
    only = dict(size="nf", parts="nf", masks="nf", pixels="nf", num_latents="nf", beta_schedule="nf", noise="dae")
    for flag, model in only.items():
        if args.model != model and getattr(args, flag) != parser.get_default(flag):
            parser.error(f"--{flag.replace('_', '-')} is for --model {model}")
    if args.device == "cuda" and torch.cuda.is_available():  # torchrun: a GPU for each process
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    args.device = pick_device(args.device)
    recipe = RECIPES[args.size if args.model == "nf" else "ae"]
    args.batch_size = args.batch_size or recipe["batch_size"]
    args.lr = args.lr or recipe["lr"]
    if not args.steps and not args.epochs:
        args.steps, args.epochs = recipe.get("steps"), recipe.get("epochs")
        if args.steps and args.device.type == "cuda":
            args.steps = 20_000
    args.noise = args.noise if args.model == "dae" else "clean"
    if args.noise in NOISES:
        strength = NOISES[args.noise][1] if args.noise_param is None else args.noise_param
        args.noise += f" {strength}"
    elif args.noise_param is not None:
        parser.error("--noise-param is for --model dae with a noise other than mixed")
    return args


def build(args, images):
    """The untrained model and its config. images: uint8 (N, C, H, W), of the training set.

    Raises ValueError for images that an autoencoder cannot take.
    """
    torch.manual_seed(args.seed)
    channels, side = images.shape[1:3]
    if args.model == "nf":
        schedule = DiffusionSchedule(beta_schedule=args.beta_schedule)
        config = dict(SIZES[args.size], parts=args.parts, channels=channels, side=side)
        if args.num_latents:
            config["num_latents"] = args.num_latents
        model = NFDenoiser(schedule.alphas_cumprod, covariance=pixel_covariance(images), **config)
    else:
        if (channels, side) != (1, 28):
            raise ValueError("the autoencoders take 28 x 28 grey images: --data mnist, glyphs or "
                             "a folder of pictures")
        config = dict(input_dim=784, latent_dim=64)
        model = DenoisingAutoencoder(**config)
        model.init_output_bias(images / 255)
    return model.to(args.device), config


def resume(path, settings, model, optimizers, losses):
    """Load a checkpoint into model, optimizers and losses; returns (its step, its tests)."""
    if not path.exists():
        raise ValueError(f"nothing to resume: there is no {path}")
    checkpoint = load_checkpoint(path)[1]
    if "optimizers" not in checkpoint:
        raise ValueError(f"{path} was exported for sampling and cannot be resumed")
    old, step = checkpoint["settings"], checkpoint["step"]
    changed = [f"{key} {old.get(key)} -> {value}" for key, value in settings.items()
               if old.get(key) != value]
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


def bench(loop, loss, optimizers, args):
    """Print the speed of a training step, its parts, and its share of the matmul rate.

    loss: a function without arguments, the loss of one batch as the loop computes it.
    """
    def seconds(function):  # Timer warms up, and waits for a GPU
        timer = Timer("f()", globals=dict(f=function), num_threads=torch.get_num_threads())
        return timer.timeit(1).mean

    def product():
        with mixed_precision(args.device):
            return matrix @ matrix

    matrix = torch.rand(2048, 2048, device=args.device)
    work = (lambda: next(loop), loss, lambda: loss().backward(),
            lambda: [optimizer.step() for optimizer in optimizers], product)
    rounds, start = [], time.time()
    while len(rounds) < 8 and time.time() - start < 60:  # in turns: slow spells affect all equally
        rounds.append([seconds(function) for function in work])
    step, forward, both, update, matmul = map(statistics.median, zip(*rounds))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss().backward()
    parts = {"drawing and forward": forward, "backward": both - forward, "optimizers": update,
             "rest": step - both - update}
    print(f"whole step {1e3 * step:.1f} ms, {args.batch_size / step:.1f} images/s: "
          + ", ".join(f"{name} {value / step:.1%}" for name, value in parts.items()))
    flops, rate = counter.get_total_flops(), 2 * 2048**3 / matmul
    print(f"forward and backward {flops / args.batch_size / 1e9:.3f} GFLOP per image, "
          f"{flops / both / rate:.0%} of the matmul rate ({rate / 1e9:.0f} GFLOP/s)")


def draw_losses(folder, losses, tests, metric, title):
    """loss.png: the training loss, and the test metric during training."""
    width = max(1, len(losses) // 100)  # each point is the mean of a hundredth of the run
    means = [part.mean().item() for part in losses.split(width) if len(part) == width]
    steps, values, *baseline = zip(*tests)
    curves = {metric: (steps, values)} | {"kriging": (steps, line) for line in baseline}
    picture = Image.new("RGB", (920, 320))
    smooth = range(width, len(losses) + 1, width), means
    picture.paste(line_chart(title, {"training loss": smooth}))
    picture.paste(line_chart(f"{metric} on test images", curves), (460, 0))
    picture.save(folder / "loss.png")
    print(f"picture: {folder / 'loss.png'}")


def main():
    args = parse_arguments()
    torch.set_flush_denormal(True)  # far pixels get attention weights below 1e-38: slow on CPUs
    # torchrun starts `world` processes; this one is `rank`, and `local_rank` on its machine
    rank, world, local_rank = (int(os.environ.get(name, default)) for name, default in
                               (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    divisor = world * (2 if args.model == "nf" else 1)
    if args.batch_size % divisor:
        raise ValueError(f"--batch-size must be a multiple of {divisor}, got {args.batch_size}")
    if args.bench and world > 1:
        raise ValueError("--bench measures one process: leave torchrun out")
    if world > 1:
        torch.distributed.init_process_group("nccl" if args.device.type == "cuda" else "gloo")
    if rank:
        sys.stdout = open(os.devnull, "w")
    if local_rank:  # the first process of a machine fetches the data, the others find it there
        torch.distributed.barrier()
    real = "cifar10" if args.model == "nf" else "mnist"
    args.data, images, _ = load_dataset(args.data, args.data_dir, train=True, real=real)
    _, test_images, _ = load_dataset(args.data, args.data_dir, train=False, real=real)
    if world > 1 and not local_rank:
        torch.distributed.barrier()
    if args.batch_size > len(images):
        raise ValueError(f"--batch-size {args.batch_size} is more than {len(images):,} images")
    images, test_images = images.to(args.device), test_images.to(args.device)
    per_epoch = len(images) // args.batch_size
    if args.steps is None:
        args.steps = args.epochs * per_epoch
    if args.bench:
        args.steps = 10**6  # more than it takes
    model, config = build(args, images)
    optimizers = make_optimizers(model, args)
    if not optimizers:  # --parts field is linear algebra: it has no weights
        if args.bench or args.resume:
            raise ValueError("--parts field has no weights: there is nothing to time or resume")
        args.steps = 0
    for p in model.parameters() if world > 1 else ():  # backward() averages over the processes
        p.register_post_accumulate_grad_hook(
            lambda p: torch.distributed.all_reduce(p.grad.div_(world)))
    schedule = DiffusionSchedule(beta_schedule=args.beta_schedule).to(args.device)
    shard = slice(rank, None, world)
    ratio = None if "unet" in args.parts else 0.2
    corrupt = corruption(args.noise)

    def batch_loss(index):
        """The loss of this process's share of the images `index` (batch_size,)."""
        if args.model != "nf":
            clean = images[index].flatten(1) / 255
            noisy = corrupt(clean)  # of all processes: two draw the same noise as one
            return autoencoder_loss(model, clean[shard], noisy[shard])
        losses = []  # half of the batch trains the one-step mean, half the steps of a sampler
        for half, pure_noise in zip(index.chunk(2), (True, False)):
            order, pixels = None, images[0, 0].numel()
            if args.pixels == "anywhere":
                pixels += 2 * int(pixels * 0.2)
            if args.masks == "fixed":
                order = fixed_order(args.seed, half, pixels)
            make_split = off_grid_split if args.pixels == "anywhere" else sparse_split
            split = make_split(images[half], output_ratio=ratio if pure_noise else 0.2, order=order)
            with mixed_precision(args.device):
                losses.append(nf_loss(model, schedule, split, pure_noise, shard))
        return sum(losses) / 2

    @torch.no_grad()
    def measure():
        """The model's figure on a few test images, and kriging's."""
        if args.model == "nf":
            figures = evaluate_field(model.eval(), schedule, test_images[:100], pixels=args.pixels)
            model.train()
            return [figures[name]["psnr"] for name in ("one-step mean", "kriging")]
        test = test_images[:1000].flatten(1).float() / 255
        noisy = corrupt(test, generator=torch.Generator(test.device).manual_seed(0))
        return [autoencoder_loss(model, test, noisy).item()]

    folder = args.out / args.model
    path = folder / "checkpoint.pt"
    losses = torch.zeros(args.steps, device=args.device)
    settings = {key: value for key, value in vars(args).items() if key not in FREE}
    first, tests = 0, []
    if args.resume:
        first, tests = resume(path, settings, model, optimizers, losses)
    warmup, metric, every = 0.1, "test MSE", per_epoch
    if args.model == "nf":
        warmup, metric, every = 0.02, "one-step PSNR", min(500, max(1, args.steps // 8))
    loop = training_loop(model, optimizers, batch_loss, images, args.steps, args.batch_size,
                         args.seed, warmup, first)
    print(f"{args.model}: {sum(p.numel() for p in model.parameters()):,} parameters | {args.data}: "
          f"{len(images):,} images | {args.device}, processes: {world}, threads: "
          f"{torch.get_num_threads()}, torch {torch.__version__}")
    if args.bench:
        index = torch.arange(args.batch_size, device=args.device)
        return bench(loop, lambda: batch_loss(index), optimizers, args)
    print(f"batches of {args.batch_size}, {args.steps:,} steps, learning rate {args.lr:g}")

    def save(step):
        if rank == 0:
            save_checkpoint(path, dict(
                kind=args.model, config=config, data=args.data, step=step, settings=settings,
                schedule=dict(beta_schedule=args.beta_schedule), model=model.state_dict(),
                optimizers=[optimizer.state_dict() for optimizer in optimizers],
                losses=losses[:step].cpu(), tests=tests))

    stop = []  # Ctrl-C ends the loop after a whole step, a second one at once
    if world == 1:
        signal.signal(signal.SIGINT, lambda *_: sys.exit(130) if stop else stop.append(True))
    if path.exists() and not args.resume:
        print(f"notice: {path} will be replaced; --resume would go on from it")
    folder.mkdir(parents=True, exist_ok=True)
    step, start = first, time.perf_counter()
    for step, loss in loop:
        losses[step - 1] = loss
        rate = (step - first) / (time.perf_counter() - start)
        line = (f"step {step:,} of {args.steps:,}  {rate * args.batch_size:,.0f} images/s  "
                f"{(args.steps - step) / rate:.0f} s left")
        testing = step % every == 0 or step == args.steps
        stopping = bool(stop)
        if testing:
            tests.append([step, *measure()])
            line += f"  {metric} {tests[-1][1]:.4g}"
        if testing or stopping:
            recent = losses[max(0, step - 100):step].mean()  # reading it makes a GPU wait
            if not all(x.isfinite().all() for x in (recent, *model.parameters())):
                raise ValueError(f"the loss or a weight is no longer finite at step {step:,}: use "
                                 f"a lower --lr; {path} is from an earlier step, if there is one")
            save(step)
            print(f"{line}  loss {recent:.5f}", flush=True)
        elif sys.stdout.isatty():
            print(line, end="\x1b[K\r")  # clears the rest of the line
        if stopping:
            break
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if step < args.steps:
        print(f"stopped and saved: {path}. To go on, give the same command with --resume")
        sys.exit(130)
    if not optimizers:
        save(0)
    print(f"trained in {time.perf_counter() - start:.0f} s; checkpoint: {path}")
    if world > 1:
        torch.distributed.destroy_process_group()
    if rank:
        return

    if optimizers:
        draw_losses(folder, losses, tests, metric, f"{args.model} on {args.data}")
    sample.main([str(path), "--evaluate", str(args.evaluate), "--data", args.data, "--data-dir",
                 str(args.data_dir), "--out", str(args.out), "--device", str(args.device),
                 "--json", str(folder / "results.json")])


if __name__ == "__main__":
    run(main)
