"""A snapshot of the released sizes with random weights, 41 GB: what pipeline timings need where the release is not at hand.

    $ python .ci/real_snapshot.py /data/snapshot     # a GPU with 30 GB; a minute or two

The tokenizers are the tiny snapshot's. The videos are noise, but every stage costs what it costs with the release.
"""

import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "golden"))

import torch  # noqa: E402
from diffusers import (  # noqa: E402
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoTransformer3DModel,
)
from make_snapshot import clip_tokenizer, llama_tokenizer  # noqa: E402
from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel  # noqa: E402

LLAMA = dict(
    vocab_size=128320,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    rope_theta=500000.0,
    max_position_embeddings=8192,
)
CLIP = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, eos_token_id=2)
PARTS = dict(  # the released dtypes
    text_encoder=(torch.float16, lambda: LlamaModel(LlamaConfig(**LLAMA))),
    text_encoder_2=(torch.float16, lambda: CLIPTextModel(CLIPTextConfig(**CLIP))),
    transformer=(torch.bfloat16, HunyuanVideoTransformer3DModel),
    vae=(torch.float16, AutoencoderKLHunyuanVideo),
)


def main(folder):
    llama_tokenizer().save_pretrained(folder / "tokenizer")
    clip_tokenizer().save_pretrained(folder / "tokenizer_2")
    FlowMatchEulerDiscreteScheduler(shift=7.0).save_pretrained(folder / "scheduler")
    for name, (dtype, build) in PARTS.items():
        began = time.time()
        torch.set_default_dtype(dtype)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            part = build()
        torch.set_default_dtype(torch.float32)
        part.to(dtype).save_pretrained(folder / name)
        size = sum(file.stat().st_size for file in (folder / name).iterdir()) / 1e9
        print(f"{name}: {size:.1f} GB in {time.time() - began:.0f} s", flush=True)
        del part
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
