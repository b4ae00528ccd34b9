"""Train the neural field (nf), the denoising autoencoder (dae) or its control, the plain autoencoder (ae).

    python train.py --model nf                       # built for 2 CPU cores and under 10 minutes; on a GPU: --size full
    python train.py --model dae                      # MNIST, Gaussian noise 0.3;  --model ae: no noise
    python train.py --model dae --noise salt_pepper --noise-param 0.4
    python train.py --model nf --steps 20000         # longer; --resume goes on where a stopped run was
    torchrun --standalone --nproc_per_node=2 train.py --model nf      # several processes share every batch

One loop for all three: take clean images, corrupt them, compare what the model makes of it with the CLEAN images.

    nf     t ~ timesteps, eps ~ N(0, I), x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps at the output pixels
           loss = mean (f(x_t, coords_out, t, coords_in, x_in) - x_0)^2        DDPM, algorithm 1, for x0-prediction
    dae    loss = mean (g(f(corrupt(x))) - x)^2                                Vincent et al. (2008)
    ae     loss = mean (g(f(x)) - x)^2

Whatever is random in step n is drawn from a generator seeded with (seed, n): nothing but the step number is needed to
go on with a stopped run, on a CPU bit for bit. Every process draws it for the whole batch, and takes its own rows.

Below out/MODEL: checkpoint.pt, loss.csv, loss.png, samples.png and results.json.
"""
import argparse
import copy
import csv
import math
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import noise as corruption
from autoencoder import DenoisingAutoencoder
from data import DATASETS, fail, fixed_keys, load_dataset, sparse_split
from nf_denoiser import SIZES, NFDenoiser, power_spectrum
from sample import load_checkpoint, pick_device, report, save_checkpoint, write_json
from schedule import DiffusionSchedule, line_chart

RECIPES = {  # batch size, peak learning rate, decay of the weights' moving average, and how long: steps or epochs
    "nf small": dict(batch_size=32, lr=3e-3, ema=0.998, steps=1250),
    "nf full": dict(batch_size=64, lr=1e-4, ema=0.9999, epochs=100),
    "ae": dict(batch_size=512, lr=6e-3, ema=0.99, epochs=10),
}


def field_problems(images, schedule, keys=None, output_ratio=0.2):
    """Draw what is random in a batch of the neural field: [(arguments of NFDenoiser.forward, clean values), ...].

    images uint8 (B, C, H, W); keys (B, H * W) or None for fresh masks. The first half of the images is at the last
    timestep, where the one-step mean is learned. There outputs say nothing about each other, so that every missing pixel
    is asked. The other half is at all timesteps, for samples, with output_ratio of the pixels jointly denoised.
    """
    keys = torch.rand(len(images), images[0, 0].numel(), device=images.device) if keys is None else keys
    half, last, problems = len(images) // 2, schedule.num_timesteps - 1, []
    for pure, rows, ratio in ((True, slice(half), None), (False, slice(half, None), output_ratio)):
        if len(images[rows]):
            split = sparse_split(images[rows], output_ratio=ratio, keys=keys[rows])
            x_0 = split["output_values"]
            t = torch.randint(last if pure else 0, last + 1, (len(x_0),), device=images.device)
            problems.append((dict(noisy_output_values=schedule.q_sample(x_0, t, torch.randn_like(x_0)), t=t, pure_noise=pure,
                                  **{name: split[name] for name in ("output_coords", "input_coords", "input_values")}), x_0))
    return problems


def autoencoder_problems(images, corrupt):
    """The same for the autoencoders. images uint8 (B, 1, 28, 28); corrupt: clean -> noisy, values in [0, 1]."""
    clean = images.flatten(1).float() / 255
    return [(dict(x=corrupt(clean)), clean)]


def share(problems, rank, world):
    """The rows of `problems` that fall to process `rank` of `world`."""
    return [({name: x[rank::world] if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}, clean[rank::world])
            for inputs, clean in problems]


class Objective(torch.nn.Module):
    """Mean squared error of a model's answers to problems; a module, because DistributedDataParallel wants one."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, problems):
        answers = [self.model(**inputs) for inputs, _ in problems]
        answers = [answer[0] if isinstance(answer, tuple) else answer for answer in answers]  # the autoencoder's latents
        total = sum(len(clean) for _, clean in problems)
        return sum(F.mse_loss(x, clean) * len(clean) / total for x, (_, clean) in zip(answers, problems))


def draw_output_ratio(lot):
    """The share of pixels to denoise together: a fifth, now and then up to all that are missing, as in whole images."""
    return lot.choice([0.2, 0.2, 0.2, lot.uniform(0.2, 0.8)])


def learning_rate(step, steps, peak, warmup):
    """Straight up over the first `warmup` steps, then half a cosine down to 1% of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))))


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["nf", "dae", "ae"], default="nf")
    parser.add_argument("--size", choices=["auto", "small", "full"], default="auto", help="of nf; auto: full on CUDA")
    parser.add_argument("--data", choices=DATASETS, default="auto")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="where data sets are, or are put")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for everything that is written")
    parser.add_argument("--noise", choices=[*corruption.NOISES, "mixed"], help="for dae (default gaussian)")
    parser.add_argument("--noise-param", type=float, help="its strength (default 0.3, salt_pepper 0.2)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="how many batches to train on")
    length.add_argument("--epochs", type=int, help="or how many times through the data")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--lr", type=float, help="peak learning rate")
    parser.add_argument("--ema", type=float, help="decay of the moving average of the weights")
    parser.add_argument("--masks", choices=["fresh", "fixed"], help="of nf: new ones (default), or one an image")
    parser.add_argument("--beta-schedule", choices=["cosine", "linear"], help="of nf (default cosine)")
    parser.add_argument("--timesteps", type=int, help="of nf: T, the length of the diffusion (default 1000)")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint below --out")
    parser.add_argument("--save-every", type=int, default=500, help="steps between checkpoints")
    parser.add_argument("--evaluate", type=int, default=200, help="test images in the closing table of nf")
    parser.error = fail
    args = parser.parse_args()
    if args.device.startswith("cuda") and "LOCAL_RANK" in os.environ:
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"  # under torchrun, a GPU for each process
    args.device = pick_device(args.device)
    for flag, value in (("--size", args.size if args.size != "auto" else None), ("--masks", args.masks),
                        ("--beta-schedule", args.beta_schedule), ("--timesteps", args.timesteps)):
        if args.model != "nf" and value is not None:
            raise ValueError(f"{flag} is for --model nf; {args.model} has no use for it")
    args.masks, args.beta_schedule = args.masks or "fresh", args.beta_schedule or "cosine"
    args.timesteps = 1000 if args.timesteps is None else args.timesteps
    if args.size == "auto":
        args.size = "full" if args.device.type == "cuda" else "small"
    recipe = RECIPES[f"nf {args.size}" if args.model == "nf" else "ae"]
    for name in ("batch_size", "lr", "ema"):
        if getattr(args, name) is None:
            setattr(args, name, recipe[name])
    if args.steps is None and args.epochs is None:
        args.steps, args.epochs = recipe.get("steps"), recipe.get("epochs")
    if args.noise and args.model != "dae":
        raise ValueError(f"--noise is for --model dae; {args.model} has no use for it")
    args.noise = args.noise or ("gaussian" if args.model == "dae" else "none")
    if args.noise_param is not None and (args.model != "dae" or args.noise == "mixed"):
        raise ValueError("--noise-param is for --model dae with --noise gaussian, salt_pepper or masking")
    if args.noise_param is None and args.noise in corruption.NOISES:
        args.noise_param = corruption.NOISES[args.noise][1]
    for flag in ("batch_size", "steps", "epochs", "timesteps", "save_every", "evaluate"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise ValueError(f"--{flag.replace('_', '-')} must be at least 1, got {getattr(args, flag)}")
    if not 0 <= args.seed < 2**31:
        raise ValueError(f"--seed must be between 0 and 2147483647, got {args.seed}")
    if not 0 < args.lr < math.inf or not 0 <= args.ema < 1:
        raise ValueError(f"--lr must be above 0 and --ema between 0 and 1, got {args.lr} and {args.ema}")
    return args


def main():
    args = parse_arguments()
    # Under torchrun each process is `rank` of `world`, with a GPU of its own where there are GPUs; alone, it is 0 of 1.
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device, folder = args.device, args.out / args.model
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if rank:
            sys.stdout = open(os.devnull, "w")  # one process speaks for all
    parts = world * (2 if args.model == "nf" else 1)
    if args.batch_size % parts:
        raise ValueError(f"--batch-size must be a multiple of {parts}, got {args.batch_size}: every process takes the same "
                         f"number of rows, and of nf one half of them is at the last timestep")
    path = folder / "checkpoint.pt"

    # Data: the whole training set as one uint8 tensor on the device; a batch is an index into it.
    real = "cifar10" if args.model == "nf" else "mnist"
    for turn in (True, False):  # the first process of a machine fetches what is missing, the others find it there
        if turn == (int(os.environ.get("LOCAL_RANK", 0)) == 0):
            name, images, _ = load_dataset(args.data, args.data_dir, train=True, real=real)
            test_images = load_dataset(name, args.data_dir, train=False)[1]  # now, so that nothing is missing in the end
        if world > 1:
            torch.distributed.barrier()
    images = images.to(device)
    if args.batch_size > len(images):
        raise ValueError(f"--batch-size {args.batch_size} is more than the {len(images):,} images of {name}")
    per_epoch = len(images) // args.batch_size
    steps = args.steps or args.epochs * per_epoch
    if steps > 10**7:
        raise ValueError(f"{steps:,} steps are more than this is made for (10,000,000)")

    # Model, its moving average, optimiser.
    torch.manual_seed(args.seed)
    channels, side = images.shape[1], images.shape[2]
    schedule, settings = DiffusionSchedule(args.timesteps, args.beta_schedule), {}
    if args.model == "nf":
        if schedule.alphas_cumprod[-1] > 1e-3:
            raise ValueError(f"{args.timesteps} timesteps of the {args.beta_schedule} schedule do not end in pure noise "
                             f"(alpha_bar = {schedule.alphas_cumprod[-1]:.3g}): take more of them, or the cosine schedule")
        config = dict(SIZES[args.size], input_channels=channels, output_channels=channels, side=side)
        model = NFDenoiser(**config, alphas_cumprod=schedule.alphas_cumprod, spectrum=power_spectrum(images).cpu())
        settings = dict(timesteps=args.timesteps, beta_schedule=args.beta_schedule)
    else:
        if images[0].numel() != 784:
            raise ValueError(f"the autoencoders take 28 x 28 grey images: --data mnist or glyphs, not {name}")
        config = dict(input_dim=784, latent_dim=64)
        model = DenoisingAutoencoder(**config)
        model.start_at(images / 255)
    model.to(device)
    schedule.to(device)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    weight_decay = 0.01 if args.model == "nf" else 0.0
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=weight_decay, fused=True)
    losses, first = torch.zeros(steps, device=device), 0
    warmup = max(1, min(100, steps // 50) if args.model == "nf" else steps // 10)
    # What a resumed run must share with the run it goes on with.
    identity = dict(model=args.model, data=name, noise=args.noise, noise_param=args.noise_param, batch_size=args.batch_size,
                    lr=args.lr, ema=args.ema, masks=args.masks, seed=args.seed, **config, **settings)
    if args.resume:
        if not path.exists():
            raise ValueError(f"nothing to resume: there is no {path}")
        _, checkpoint = load_checkpoint(path, device)
        if "optimizer" not in checkpoint:
            raise ValueError(f"{path} was exported for sampling: it cannot be resumed")
        changed = [f"{key} {checkpoint.get('identity', {}).get(key)} -> {value}" for key, value in identity.items()
                   if checkpoint.get("identity", {}).get(key) != value]
        if changed:
            raise ValueError(f"{path} was trained with other settings ({', '.join(changed)}): use those, or another --out")
        model.load_state_dict(checkpoint["model"])
        ema.load_state_dict(checkpoint["ema"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        first = checkpoint["step"]
        if first >= steps:
            raise ValueError(f"{path} has already done {first:,} steps: --steps must be more to go on")
        losses[:first] = checkpoint["losses"].to(device)
    folder.mkdir(parents=True, exist_ok=True)
    if args.noise == "mixed":
        corrupt = corruption.add_mixed_noise
    elif args.noise == "none":
        corrupt = lambda clean: clean
    else:
        corrupt = lambda clean: corruption.NOISES[args.noise][0](clean, args.noise_param)
    objective = Objective(torch.compile(model) if args.compile else model)
    if world > 1:  # backward() then averages the gradients over all processes
        objective = torch.nn.parallel.DistributedDataParallel(objective, [device] if device.type == "cuda" else None,
                                                              broadcast_buffers=False)  # they are constants
    count = sum(p.numel() for p in model.parameters())
    print(f"{args.model} {args.size if args.model == 'nf' else ''} {count:,} parameters | "
          f"{name} {len(images):,} images | batch {args.batch_size}, {steps:,} steps, lr {args.lr:g} | {device}, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}")

    def save(step):
        if rank == 0:
            save_checkpoint(path, dict(kind=args.model, config=config, schedule=settings, data=name, step=step,
                                       identity=identity, model=model.state_dict(), ema=ema.state_dict(),
                                       optimizer=optimizer.state_dict(), losses=losses[:step].cpu()))

    # (torch.manual_seed would do, but it seeds every kind of device there may be, which costs half a millisecond.)
    reseed = torch.cuda.manual_seed if device.type == "cuda" else torch.default_generator.manual_seed
    averages, weights = list(ema.parameters()), list(model.parameters())
    stop = []  # Ctrl-C asks for a stop after the step in hand, so that what is saved is whole
    if world == 1:  # several processes would have to agree on a step: Ctrl-C then ends them at once
        signal.signal(signal.SIGINT, lambda *_: stop.append(True) if not stop else sys.exit(130))
    start = shown = time.time()
    for step in range(first, steps):
        epoch, place = divmod(step, per_epoch)
        if place == 0 or step == first:
            generator = torch.Generator().manual_seed(args.seed * 1_000_003 + epoch)
            order = torch.randperm(len(images), generator=generator).to(device)
        reseed(args.seed * 1_000_003 + step)
        index = order[place * args.batch_size:(place + 1) * args.batch_size]
        batch = images.index_select(0, index)

        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, args.lr, warmup)
        if args.model == "nf":
            keys = fixed_keys(args.seed, index, side * side) if args.masks == "fixed" else None
            problems = field_problems(batch, schedule, keys, draw_output_ratio(random.Random(args.seed * 1_000_003 + step)))
        else:
            problems = autoencoder_problems(batch, corrupt)
        if world > 1:
            reseed(args.seed * 1_000_003 + step + 1 + rank)  # for dropout: other rows, other neurons
        with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
            loss = objective(share(problems, rank, world))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        with torch.no_grad():  # ema += (1 - decay) (model - ema), with a shorter memory at the very beginning
            decay = min(args.ema, (1 + step) / (10 + step))
            torch._foreach_lerp_(averages, weights, 1 - decay)
        losses[step] = loss.detach()  # of this process's rows

        # Reading a loss makes a GPU wait for it: now and then is enough.
        done, now = step + 1, time.time()
        stopping = bool(stop)
        last = done == steps or stopping
        if last or done % args.save_every == 0 or now - shown > (0.5 if sys.stdout.isatty() else 15):
            recent = losses[max(0, done - 100):done].mean().item()
            if not (math.isfinite(recent) and all(w.sum().isfinite() for w in weights)):
                print(end="\n" if sys.stdout.isatty() else "")
                kept = f"the checkpoint of an earlier step is in {path}" if path.exists() else "nothing was saved"
                raise ValueError(f"the loss or a weight is no longer finite at step {done:,}: try a lower --lr; {kept}")
            rate = (done - first) / (now - start)
            line = (f"step {done:,} of {steps:,}  loss {recent:.5f}  {rate * args.batch_size:,.0f} images/s  "
                    f"{(steps - done) / rate:.0f} s left")
            print(f"{chr(13)}{line:79}" if sys.stdout.isatty() else line,
                  end="\n" if last or not sys.stdout.isatty() else "", flush=True)
            shown = now
            if last or done % args.save_every == 0:
                save(done)
        if stopping:
            print(f"stopped and saved: {path}. To go on, give the same command with --resume added")
            raise SystemExit(130)

    signal.signal(signal.SIGINT, signal.default_int_handler)
    print(f"trained in {time.time() - start:.0f} s; checkpoint: {path}")
    if world > 1:
        torch.distributed.destroy_process_group()
    if rank == 0:
        finish(args, ema, settings, losses.tolist(), test_images, folder, name)


def finish(args, ema, settings, losses, images, folder, name):
    """Loss curve, table of results and pictures."""
    with open(folder / "loss.csv", "w", newline="") as file:
        csv.writer(file).writerows([("step", "loss"), *((i + 1, f"{loss:.6g}") for i, loss in enumerate(losses))])
    width = max(1, len(losses) // 100)  # the mean of every hundredth of the run
    starts = range(0, len(losses) - width + 1, width)
    smooth = [sum(losses[i:i + width]) / width for i in starts]
    chart = line_chart(f"{args.model} on {name}: training loss", {"loss": ([i + width for i in starts], smooth)}, log_y=True)
    chart.save(folder / "loss.png")
    print(f"loss curve: {folder / 'loss.png'}, {folder / 'loss.csv'}")

    if args.model == "nf":
        images = images[:args.evaluate]
    options = argparse.Namespace(seed=0, input_ratio=[0.2], full=False, sampler="ddim", steps=min(50, args.timesteps),
                                 eta=0.0, samples=None, scale=1, gif=False)
    checkpoint = dict(kind=args.model, schedule=settings)
    results = report(ema, checkpoint, images.to(args.device), folder, options, name)
    write_json(folder / "results.json", dict(data=name, images=len(images), methods=results))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as problem:
        if os.environ.get("RANK", "0") != "0":
            raise SystemExit(2)  # the first process says it
        fail(problem)
    except KeyboardInterrupt:
        raise SystemExit(130)
