"""A small LoRA on a tiny snapshot, made by peft and saved by diffusers, and what it does to the pipeline's latents.

    $ python make_lora.py snapshot lora [--rank 4] [--alpha 8] [--seed 0]

Writes to the folder `lora`:
    pytorch_lora_weights.safetensors   what `pipe.load_lora_weights("lora")` reads: alpha in the header, as diffusers saves it
    folded.safetensors                 the same LoRA with alpha / rank multiplied into B and no metadata: readable by all
    effect.safetensors                 `noise` and the latents of one fixed call: `without`, `with_lora`, `half` (weight 0.5)
    facts.json                         the call, the key names and shapes, the header's metadata, the sizes of the effect
Both matrices are random and not zero, so that the effect is large.
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import HunyuanVideoPipeline
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

# every linear layer of the blocks but the modulations: 12 of a dual-stream block (q, k, v apart), 5 of a single-stream one
TARGETS = (
    r"transformer_blocks\.\d+\.(attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
    r"|ff\.net\.0\.proj|ff\.net\.2|ff_context\.net\.0\.proj|ff_context\.net\.2)"
    r"|single_transformer_blocks\.\d+\.(attn\.(to_q|to_k|to_v)|proj_mlp|proj_out)"
)
CALL = dict(prompt="a cat walks", height=64, width=96, num_frames=9, num_inference_steps=3, guidance_scale=6.0)
SHAPE = (1, 16, 3, 8, 12)


def latents(pipe):
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    return pipe(**CALL, latents=noise, output_type="latent").frames


def load(snapshot):
    pipe = HunyuanVideoPipeline.from_pretrained(snapshot)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def make_lora(snapshot, folder, rank=4, alpha=8, seed=0):
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pipe = load(snapshot)
    out = dict(noise=torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)), without=latents(pipe))
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=TARGETS, init_lora_weights=False)
    pipe.transformer.add_adapter(config)
    torch.manual_seed(seed)
    for name, parameter in pipe.transformer.named_parameters():
        if "lora_" in name:
            parameter.copy_(torch.randn_like(parameter) / parameter.shape[1] ** 0.5)
    layers = get_peft_model_state_dict(pipe.transformer)
    HunyuanVideoPipeline.save_lora_weights(
        folder,
        transformer_lora_layers=layers,
        transformer_lora_adapter_metadata=config.to_dict() | dict(target_modules=TARGETS),
    )
    out["trained"] = latents(pipe)

    file = folder / "pytorch_lora_weights.safetensors"
    weights = load_file(file)
    folded = {k: v * (alpha / rank) if "lora_B" in k else v for k, v in weights.items()}
    save_file(folded, folder / "folded.safetensors")

    pipe = load(snapshot)
    pipe.load_lora_weights(folder, weight_name=file.name, adapter_name="a")
    out["with_lora"] = latents(pipe)
    pipe.set_adapters(["a"], [0.5])
    out["half"] = latents(pipe)
    pipe = load(snapshot)
    pipe.load_lora_weights(folder, weight_name="folded.safetensors")
    out["folded"] = latents(pipe)

    far = {
        name: (value - out["without"]).abs().max().item()
        for name, value in out.items()
        if name not in ("noise", "without")
    }
    far["folded - with_lora"] = (out["folded"] - out["with_lora"]).abs().max().item()
    far["trained - with_lora"] = (out["trained"] - out["with_lora"]).abs().max().item()
    with safe_open(file, "pt") as handle:
        header = handle.metadata()
    facts = dict(
        call=CALL,
        rank=rank,
        alpha=alpha,
        largest_differences=far,
        metadata_keys=sorted(header),
        adapter_metadata=json.loads(header.get(LORA_ADAPTER_METADATA_KEY, "{}")),
        keys={name: list(value.shape) for name, value in weights.items()},
    )
    (folder / "facts.json").write_text(json.dumps(facts, indent=1))
    save_file({k: v.contiguous() for k, v in out.items()}, folder / "effect.safetensors")
    return facts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("snapshot")
    parser.add_argument("folder")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--alpha", type=float, default=8)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    facts = make_lora(args.snapshot, args.folder, args.rank, args.alpha, args.seed)
    print(f"wrote {args.folder}: {len(facts['keys'])} tensors; largest differences {facts['largest_differences']}")
