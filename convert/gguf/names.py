"""Names of GGUF's tensors and the published ones that they stand for.

Source: https://github.com/ggml-org/llama.cpp, gguf-py/gguf/tensor_mapping.py and conversion/gemma.py, `Gemma3NModel`:
values are as published, the AltUp projections stacked, and both tables filled up to one length with zeros.
"""

import re

_LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "altup_correct_coef": "altup.correction_coefs",
    "altup_predict_coef": "altup.prediction_coefs",
    "altup_router": "altup.modality_router",
    "altup_router_norm": "altup.router_norm",
    "laurel_l": "laurel.linear_left",
    "laurel_r": "laurel.linear_right",
    "laurel_post_norm": "laurel.post_laurel_norm",
    "inp_gate": "per_layer_input_gate",
    "proj": "per_layer_projection",
    "post_norm": "post_per_layer_input_norm",
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_MODEL = {
    "token_embd": "embed_tokens",
    "per_layer_token_embd": "embed_tokens_per_layer",
    "per_layer_model_proj": "per_layer_model_projection",
    "per_layer_proj_norm": "per_layer_projection_norm",
    "output_norm": "norm",
}
# One tensor for every stream but the active one.
STACKED = {"altup_proj.weight": "altup_projections", "altup_unembd_proj.weight": "altup_unembed_projections"}
PLE = "per_layer_token_embd.weight"
_IN_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.weight")


def text_name(name: str) -> str | None:
    """The name below the language model, of a tensor that is not stacked; None of an unknown one."""
    if found := _IN_LAYER.fullmatch(name):
        if found[2] == "altup_correct_scale":
            return f"layers.{found[1]}.altup.correct_output_scale"
        part = _LAYER.get(found[2])
        return None if part is None else f"layers.{found[1]}.{part}.weight"
    part = _MODEL.get(name.removesuffix(".weight"))
    return None if part is None or not name.endswith(".weight") else f"{part}.weight"
