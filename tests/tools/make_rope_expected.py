#!/usr/bin/env python3
"""Write tests/rope_expected.h: rotary tables as transformers computes them.

usage: make_rope_expected.py > tests/rope_expected.h          (needs torch and transformers 5)
"""
import json, warnings
import torch, transformers
from transformers.models.mixtral.modeling_mixtral import MixtralRotaryEmbedding
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRotaryEmbedding

warnings.filterwarnings("ignore"); transformers.logging.set_verbosity_error()
POSITIONS = [0, 1, 7, 100, 1023, 2047, 8191, 40000]
BASE = dict(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2, max_position_embeddings=2048)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=512)
CASES = {  # name: (family, keys beside BASE)
    "default": ("mixtral", {}),
    "default_theta_top": ("qwen3_moe", dict(rope_theta=5e6, head_dim=32)),
    "theta_inside": ("qwen3_moe", dict(head_dim=32, rope_parameters=dict(rope_type="default", rope_theta=12345.0))),
    "linear": ("qwen3_moe", dict(rope_theta=1e4, head_dim=16, rope_scaling=dict(type="linear", factor=2.5))),
    "dynamic": ("mixtral", dict(rope_theta=1e4, head_dim=16, rope_scaling=dict(rope_type="dynamic", factor=3.0))),
    "yarn": ("qwen3_moe", dict(rope_theta=1e4, head_dim=32, rope_scaling=YARN)),
    "yarn_qwen3": ("qwen3_moe", dict(rope_theta=1e6, head_dim=128, max_position_embeddings=40960, rope_scaling=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32768))),
    "yarn_no_truncate": ("qwen3_moe", dict(rope_theta=1e4, head_dim=32, rope_scaling=dict(YARN, truncate=False))),
    "yarn_betas": ("qwen3_moe", dict(rope_theta=1e4, head_dim=32, rope_scaling=dict(YARN, beta_fast=8, beta_slow=0.5))),
    "yarn_attention": ("qwen3_moe", dict(rope_theta=1e4, head_dim=32, rope_scaling=dict(YARN, attention_factor=0.7))),
    "yarn_mscale": ("qwen3_moe", dict(rope_theta=1e4, head_dim=32, rope_scaling=dict(YARN, mscale=1.0, mscale_all_dim=0.707))),
    "yarn_mscale_half": ("qwen3_moe", dict(rope_theta=1e4, head_dim=32, rope_scaling=dict(YARN, mscale=1.0))),
    "yarn_no_original": ("qwen3_moe", dict(rope_theta=1e4, head_dim=32, rope_scaling=dict(rope_type="yarn", factor=2.0))),
    "yarn_no_factor": ("qwen3_moe", dict(rope_theta=1e4, head_dim=32, rope_scaling=dict(rope_type="yarn", factor=None, original_max_position_embeddings=256))),
    "yarn_outer_original": ("qwen3_moe", dict(rope_theta=1e4, head_dim=32, original_max_position_embeddings=300, rope_scaling=YARN)),
    "yarn_v5": ("mixtral", dict(rope_parameters=dict(YARN, rope_theta=2e5), head_dim=32)),
    "llama3": ("mixtral", dict(rope_theta=5e5, head_dim=64, max_position_embeddings=131072, rope_scaling=dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192))),
    "llama3_small": ("mixtral", dict(rope_theta=1e4, head_dim=32, rope_scaling=dict(rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=8.0, original_max_position_embeddings=256))),
}
CLASSES = {"mixtral": (transformers.MixtralConfig, MixtralRotaryEmbedding), "qwen3_moe": (transformers.Qwen3MoeConfig, Qwen3MoeRotaryEmbedding)}

print(f"/* Made by tests/tools/make_rope_expected.py with transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}: do not edit.\n"
      " * For each position the first ROPE_SHOWN cosines, spread over the table's width, then the sines. */")
print("#define ROPE_SHOWN 6\n")
print(f"static const int rope_positions[] = {{{', '.join(map(str, POSITIONS))}}};\n")
print("static const struct {\n    const char *name, *config;\n    int columns[ROPE_SHOWN];\n    float values[8][2 * ROPE_SHOWN];\n} rope_cases[] = {")
for name, (family, extra) in CASES.items():
    kw = {**BASE, **extra}
    text = json.dumps({"model_type": family, **kw})
    config_class, rope_class = CLASSES[family]
    config = config_class(**json.loads(json.dumps(kw)))
    rope = rope_class(config)
    half = rope.inv_freq.numel()
    columns = [round(i * (half - 1) / 5) for i in range(6)]
    quoted = text.replace('"', '\\"')
    print(f'    {{"{name}",\n     "{quoted}",\n     {{{", ".join(map(str, columns))}}},\n     {{')
    for p in POSITIONS:
        if name == "dynamic" and p >= 2048: p = 2047   # beyond it the tables would change
        cos, sin = rope(torch.zeros(1, 1, dtype=torch.float32), torch.tensor([[p]]))
        row = [cos[0, 0, c].item() for c in columns] + [sin[0, 0, c].item() for c in columns]
        print("         {" + ", ".join(f"{v:.9e}f" for v in row) + "},")
    print("     }},")
print("};")
