"""Load GPT-2, OPT and BERT from local Hugging Face folders, and save GPT-2 to one."""

from jaxflat.models.huggingface.folder import (
    Pretrained,
    load_causal,
    load_model,
    read_model,
    save_causal,
)

__all__ = ["Pretrained", "load_causal", "load_model", "read_model", "save_causal"]
