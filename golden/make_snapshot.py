"""A complete HunyuanVideo snapshot in the diffusers layout, a few MB, random weights, nothing downloaded.

    $ python make_snapshot.py snapshot                            # HunyuanVideoPipeline
    $ python make_snapshot.py snapshot --kind i2v_token_replace   # HunyuanVideoImageToVideoPipeline
    $ python make_snapshot.py snapshot --kind i2v_latent_concat --seed 1

Every component is the real class at a tiny size. The LLaMA tokenizer is byte-level BPE with LLaMA-3's splitting rule, trained
on the prompt templates so that each of their words is one token: the templates' heads are then 95 (text) and 103 (image)
tokens, as with the released tokenizer, and the pipelines' fixed crops fall where they should. Other words become several
tokens. Real sizes of what tests depend on: 576 image tokens (24 x 24 patches), 256 text tokens, 77 CLIP tokens, 16 latent
channels, compression 4 x 8 x 8, scaling 0.476986, shift 7.
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoImageToVideoPipeline,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from diffusers.pipelines.hunyuan_video import pipeline_hunyuan_video, pipeline_hunyuan_video_image2video
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

KINDS = ("t2v", "i2v_token_replace", "i2v_latent_concat")
TEXT_DIM, POOLED_DIM = 32, 24
MARKS = "<|begin_of_text|> <|end_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|> <image> <pad>".split()
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)


def llama_tokenizer():
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLIT), "isolated"), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    templates = [
        p.DEFAULT_PROMPT_TEMPLATE["template"] for p in (pipeline_hunyuan_video, pipeline_hunyuan_video_image2video)
    ]
    trainer = trainers.BpeTrainer(
        vocab_size=4096, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=MARKS, show_progress=False
    )
    for mark in MARKS:
        templates = [text.replace(mark, " ") for text in templates]
    templates += ["system\n\n", "user\n\n", "assistant\n\n"]
    tokenizer.train_from_iterator(templates * 2, trainer)
    begin = [("<|begin_of_text|>", tokenizer.token_to_id("<|begin_of_text|>"))]
    tokenizer.post_processor = processors.TemplateProcessing(single="<|begin_of_text|> $A", special_tokens=begin)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin_of_text|>",
        eos_token="<|end_of_text|>",
        pad_token="<pad>",
        padding_side="right",
        model_max_length=8192,
    )


def clip_tokenizer():
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [
        *letters,
        *(x + "</w>" for x in letters),
        "<|startoftext|>",
        "<|endoftext|>",
    ]  # the end mark has the highest id
    return CLIPTokenizer(vocab={name: i for i, name in enumerate(names)}, merges=[], model_max_length=77)


def transformer(kind):
    return HunyuanVideoTransformer3DModel(
        in_channels=33 if kind == "i2v_latent_concat" else 16,
        out_channels=16,
        num_attention_heads=6,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=2,
        guidance_embeds=kind != "i2v_latent_concat",
        text_embed_dim=TEXT_DIM,
        pooled_projection_dim=POOLED_DIM,
        rope_axes_dim=(4, 6, 6),
        image_condition_type=None if kind == "t2v" else kind.removeprefix("i2v_"),
    )


def components(kind):
    tokenizer, tokenizer_2 = llama_tokenizer(), clip_tokenizer()
    small = dict(hidden_size=TEXT_DIM, intermediate_size=64, num_attention_heads=4, initializer_range=0.3)
    ids = dict(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    llama = LlamaConfig(
        vocab_size=len(tokenizer),
        num_hidden_layers=5,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        **small,
        **ids,
    )
    clip = CLIPTextConfig(
        vocab_size=len(tokenizer_2), num_hidden_layers=2, **small | dict(hidden_size=POOLED_DIM),
        bos_token_id=0, eos_token_id=2, pad_token_id=1,  # as in old CLIP-L configs: pooled at the highest id
    )  # fmt: skip
    parts = dict(
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        text_encoder_2=CLIPTextModel(clip),
        transformer=transformer(kind),
        vae=AutoencoderKLHunyuanVideo(block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
    )
    if kind == "t2v":
        return HunyuanVideoPipeline, parts | dict(text_encoder=LlamaModel(llama))
    vision = CLIPVisionConfig(image_size=48, patch_size=2, num_hidden_layers=3, **small)
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    ids = dict(image_token_index=image_id, pad_token_id=tokenizer.pad_token_id)
    config = LlavaConfig(vision_config=vision, text_config=llama, **ids)
    from transformers import CLIPImageProcessor  # warns where torchvision is missing, and works

    image_processor = CLIPImageProcessor(size=dict(shortest_edge=48), crop_size=dict(height=48, width=48))
    parts |= dict(text_encoder=LlavaForConditionalGeneration(config), image_processor=image_processor)
    return HunyuanVideoImageToVideoPipeline, parts


@torch.no_grad()
def make_snapshot(folder, kind="t2v", seed=0):
    """Write the snapshot and give back the pipeline. The same seed gives the same weights."""
    torch.manual_seed(seed)
    pipeline, parts = components(kind)
    for part in parts.values():
        for parameter in part.parameters() if isinstance(part, torch.nn.Module) else ():
            if parameter.dim() < 2:  # norms and biases too: nothing may be left at one or zero, where mistakes hide
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    pipe = pipeline(**parts)
    pipe.save_pretrained(folder)
    index = Path(folder) / "model_index.json"
    known_everywhere = dict(tokenizer=["transformers", "PreTrainedTokenizerFast"])
    index.write_text(json.dumps(json.loads(index.read_text()) | known_everywhere, indent=2))
    return pipe


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--kind", choices=KINDS, default="t2v")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    make_snapshot(args.folder, args.kind, args.seed)
    print(f"wrote {args.folder}: {args.kind}, seed {args.seed}")
