"""Use FlashAttention-4, the extra [fast]: `model.attention = attention_kernel("fa4")`. On Hopper it makes a forward at 119k
tokens 1.15 times as fast as cuDNN. It runs on Blackwell too, but cuDNN is faster there.
"""

import contextlib
import importlib.util
import warnings

import torch

from hunyuan_sp import KEPT, sdpa

FA4_DTYPES = (torch.bfloat16, torch.float16)


def fa4(q, k, v):
    """Attend by FlashAttention-4: q, k, v [B, L, H, D] -> [B, L, H, D], in bfloat16 or float16."""
    if q.dtype not in FA4_DTYPES:
        raise ValueError(f"attention fa4 computes in bfloat16 or float16, the model is in {str(q.dtype)[6:]}")
    return _fa4(q, k, v)[0]


# An operator of its own, so that checkpointing can keep its output: (out [B, L, H, D], log-sum-exp [B, H, L]). It calls the
# package's kernels itself: torch's activate_flash_attention_impl("FA4") expects two results, but 4.0.0b36 returns five
@torch.library.custom_op("hunyuan_sp::fa4", mutates_args=())
def _fa4(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from flash_attn.cute.interface import _flash_attn_fwd

    return _flash_attn_fwd(q, k, v, return_lse=True)[:2]


def _fa4_backward(ctx, grad, _):
    from flash_attn.cute.interface import _flash_attn_bwd

    q, k, v, out, lse = ctx.saved_tensors
    return _flash_attn_bwd(q, k, v, out, grad.contiguous(), lse)[:3]


_fa4.register_autograd(_fa4_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, *output))


def fastest_kernel(device):
    """Return "fa4" on Hopper, where it is faster, if the extra [fast] is installed; else "sdpa"."""
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    if hopper and importlib.util.find_spec("flash_attn"):
        with contextlib.suppress(ValueError):  # an older flash_attn, without FlashAttention-4
            attention_kernel("fa4")
            return "fa4"
    return "sdpa"


def attention_kernel(name):
    """Return the function called "sdpa" or "fa4". ValueError if it can't run here."""
    if name == "sdpa":
        return sdpa
    if name != "fa4":
        raise ValueError(f"attention {name!r} is neither sdpa nor fa4")
    warnings.filterwarnings("ignore", module="cutlass|flash_attn|quack|tvm_ffi")  # its compiler has many
    try:
        import flash_attn.cute.interface  # noqa: F401
    except ImportError as error:
        raise ValueError(f"attention fa4 needs FlashAttention-4, pip install --pre flash-attn-4 ({error})") from None
    gpu = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
    if gpu[0] not in (9, 10):
        found = f"this one has {gpu[0]}.{gpu[1]}" if gpu[0] else "there is none here"
        raise ValueError(f"attention fa4 needs a GPU of compute capability 9 or 10, {found}")
    return fa4


KEPT.append(torch.ops.hunyuan_sp.fa4.default)
