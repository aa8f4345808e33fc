"""Train a LoRA of Wan (diffusers, any size, text to video) under data × sequence parallelism, on your videos.

    $ torchrun --nproc_per_node=2 -m examples.train_wan_lora --sp 2 --steps 5    # a tiny random one, on a CPU too
    $ torchrun --nproc_per_node=8 -m examples.train_wan_lora --model WAN --encode videos/ --data latents/
    $ torchrun --nproc_per_node=8 -m examples.train_wan_lora --model WAN --data latents/ --sp 4 --out cat

WAN: a folder or hub id, say Wan-AI/Wan2.1-T2V-14B-Diffusers. The second makes samples: videos and images with captions in
NAME.txt, cut to --height x --width and --frames. The third writes cat/pytorch_lora_weights.safetensors, which
`load_lora_weights("cat")` reads. The loss curve is the same for every (dp, sp).
Wan 2.2 14B has two models: --part transformer --sigmas 0.875 1, and --part transformer_2 --sigmas 0 0.875.
Needs the extra [pipeline], and peft.
"""

import argparse
import math
import time
from functools import partial
from itertools import count

import torch
from diffusers import WanPipeline, WanTransformer3DModel
from peft import LoraConfig, get_peft_model_state_dict
from torch.utils.data import DataLoader

from comm import ParallelManager
from examples.diffusers_any import parallelise
from examples.wan_samples import Noise, Samples, collate, encode
from sampler import DPSPBatchSampler
from train_min import learning_rate, report

LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
TINY = dict(num_attention_heads=5, attention_head_dim=12, ffn_dim=64, num_layers=2, freq_dim=32)
TINY |= dict(text_dim=32, in_channels=16, out_channels=16)


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("--model", help="folder or hub id of a Wan in the diffusers layout (default: tiny and random)")
    flag("--part", default="transformer", help="which model of it: transformer or transformer_2")
    flag("--encode", help="folder of videos and captions: make the samples of --data, and end")
    flag("--data", help="folder of samples (default: noise)")
    flag("--height", type=int, default=480)
    flag("--width", type=int, default=832)
    flag("--frames", type=int, default=81, help="at most, 4k + 1")
    flag("--rate", type=float, default=16.0, help="frames a second that the model was made for (Wan 2.2 5B: 24)")
    flag("--rank", type=int, default=32, help="of the LoRA; alpha is the same")
    flag("--sp", type=int, default=1, help="ranks that share a sample")
    flag("--dp", type=int, help="data-parallel groups (default: world size / sp)")
    flag("--batch", type=int, default=4, help="samples a step, over all ranks and micro-batches")
    flag("--accumulation", type=int, default=1, help="micro-batches a step")
    flag("--steps", type=int, default=1000)
    flag("--lr", type=float, default=1e-4, help="peak, then a cosine to a tenth")
    flag("--warmup", type=int, default=20, help="steps of linear warm-up")
    flag("--clip", type=float, default=1.0, help="largest global gradient norm")
    flag("--shift", type=float, default=5.0, help="flow shift of the noise levels")
    flag("--sigmas", type=float, nargs=2, default=(0.0, 1.0), help="draw noise levels between these")
    flag("--seed", type=int, default=0)
    flag("--save_every", type=int, default=200, help="steps between saves; one is made at the end")
    flag("--out", default="out-wan", help="folder of the LoRA and log.jsonl")
    flag("--device", choices=("cpu", "cuda"), help="default: cuda if there is a GPU")
    flag("--compile", action="store_true", help="torch.compile both sides of each block's attention")
    return parser.parse_args(argv)


# --------------------------------------------------------------------------------------------------------------------
# the story


def train(args):
    """Build everything and take the steps. Return the ParallelManager."""
    pm = ParallelManager(args.dp, args.sp, args.device)
    pm.check_equal(vars(args), pm.world_group)
    if args.encode:
        return encode(pm, args)
    config = config_of(args)
    data = Samples(args.data, config) if args.data else Noise(config)
    layout = pm.dp_rank, pm.dp_size, args.accumulation
    sampler = DPSPBatchSampler(len(data), args.batch, *layout, args.seed, shapes=data.shapes, names=data.names)
    pm.check_equal(sampler.state_dict(), pm.world_group)
    model = build_model(pm, args)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, args.lr, weight_decay=0.01)
    loader = DataLoader(data, batch_sampler=sampler, collate_fn=partial(collate, args=args))
    stream = (batch for _ in count() for batch in loader)  # each pass is the rest of the sampler's epoch
    for step in range(1, args.steps + 1):
        began = time.perf_counter()
        micro_batches = [next(stream) for _ in range(sampler.micro_batches)]
        loss, norm = train_step(pm, model, optimizer, micro_batches, learning_rate(step, args), args.clip)
        sampler.advance()
        if pm.is_main:
            report(step, loss, norm, time.perf_counter() - began, args)
        if step % args.save_every == 0 or step == args.steps:
            save(pm, model, args.out)
    return pm


def config_of(args):
    """Return the model's config, before its weights are read. ValueError for an image-to-video model."""
    config = WanTransformer3DModel.load_config(args.model, subfolder=args.part) if args.model else TINY
    if config["in_channels"] != config["out_channels"]:
        facts = f"{config['in_channels']} channels in and {config['out_channels']} out"
        raise ValueError(f"{args.model} has {facts}: an image-to-video model, which this does not train")
    return config


def build_model(pm, args):
    """LoRA goes in before the hooks, and these before `shard`: each wraps what it finds."""
    dtype = torch.bfloat16 if pm.device.type == "cuda" else torch.float32
    torch.manual_seed(args.seed)  # all ranks start from the same LoRA
    if args.model:
        model = WanTransformer3DModel.from_pretrained(args.model, subfolder=args.part, dtype=dtype)
    else:
        model = WanTransformer3DModel(**TINY)
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=LAYERS))
    for param in model.parameters():
        param.data = param.data.float() if param.requires_grad else param.data  # masters, beside frozen weights in bf16
    model.enable_gradient_checkpointing()
    parallelise(model, pm.sp_group)
    pm.shard(model, model.blocks)
    for block in model.blocks if args.compile else ():
        block.compile()
    return model


def train_step(pm, model, optimizer, micro_batches, lr, clip):
    """Take one optimizer step under the gradient rule. Return the loss and the gradient norm, equal on all ranks."""
    samples = pm.sum(sum(batch["weight"].sum().item() for batch in micro_batches), pm.dp_group).item()
    loss = 0.0
    for n, batch in enumerate(micro_batches, 1):
        batch = {name: x.to(pm.device) for name, x in batch.items()}
        dtype = model.patch_embedding.weight.dtype  # the LoRA's is another
        inputs = batch["latents"].to(dtype), batch["timestep"], batch["text"].to(dtype)
        velocity = model(*inputs, return_dict=False)[0]
        error = (velocity.float() - batch["target"]).square().flatten(1).mean(1)
        # the outputs are whole: the sp ranks have the same loss, and each answers for its share of it
        local = (error * batch["weight"]).sum() / samples / pm.sp_size
        pm.backward(model, local, last=n == len(micro_batches))
        loss += local.detach()
    loss = pm.sum(loss, pm.world_group).item()
    norm = pm.clip_grad_norm(model, clip)
    for param_group in optimizer.param_groups:
        param_group["lr"] = lr
    pm.step(optimizer, skip=not math.isfinite(loss + norm))
    return loss, norm


def save(pm, model, out):
    """Write what diffusers' `load_lora_weights` reads. Collective: a shard's whole is asked of all ranks."""
    whole = {name: p.full_tensor().cpu() for name, p in model.named_parameters() if p.requires_grad}
    if pm.is_main:
        layers = get_peft_model_state_dict(model, state_dict=whole)
        WanPipeline.save_lora_weights(out, transformer_lora_layers=layers)


if __name__ == "__main__":
    train(parse()).close()
