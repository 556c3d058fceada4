"""What others have measured: bitsandbytes v0.45 with transformers 4.46.3, by their own benchmark.

Seconds of a step with batches of 1, 8 and 32, prompts of 64 tokens and 64 new ones; from
github.com/bitsandbytes-foundation/bitsandbytes, benchmarking/README.md and inference_benchmark.py.
"""

BATCHES = (1, 8, 32)
TOKENS = 64

RECIPES = {
    "plain": ("quantize=none",),
    "NF4": ("quantize=bitsandbytes",),
    "NF4+DQ": ("quantize=bitsandbytes", "quantize.double_quant=true"),
    "INT8": ("quantize=bitsandbytes", "quantize.bits=8", "quantize.outlier_threshold=0"),
    "INT8+Decomp": ("quantize=bitsandbytes", "quantize.bits=8"),
}

SECONDS: dict[tuple[str, str], dict[str, tuple[float | None, ...]]] = {
    ("t4", "qwen2.5-3b"): {
        "plain": (0.0390, 0.0422, 0.0601),
        "NF4": (0.0608, 0.0960, 0.1150),
        "NF4+DQ": (0.0736, 0.1042, 0.1215),
        "INT8": (0.0902, 0.0919, 0.0943),
        "INT8+Decomp": (0.1672, 0.1812, 0.1912),
    },
    ("rtx4090", "llama-3.1-8b"): {
        "plain": (0.0211, 0.0239, 0.0304),
        "NF4": (0.0148, 0.0425, 0.0461),
        "NF4+DQ": (0.0175, 0.0443, 0.0471),
        "INT8": (0.0220, 0.0221, 0.0230),
        "INT8+Decomp": (0.0449, 0.0478, 0.0512),
    },
    ("rtx4090", "qwen2.5-14b"): {
        "NF4": (0.0214, 0.0696, None),
        "NF4+DQ": (0.0256, 0.0719, None),
        "INT8": (0.0326, 0.0325, None),
        "INT8+Decomp": (0.0648, 0.0721, None),
    },
    ("h100", "llama-3.1-8b"): {
        "plain": (0.0244, 0.0255, 0.0261),
        "NF4": (0.0331, 0.0476, 0.0486),
        "NF4+DQ": (0.0411, 0.0566, 0.0577),
        "INT8": (0.0522, 0.0515, 0.0545),
        "INT8+Decomp": (0.0817, 0.0853, 0.0864),
    },
    ("h100", "qwen2.5-32b"): {
        "plain": (0.0508, 0.0525, 0.0547),
        "NF4": (0.0707, 0.1154, 0.1246),
        "NF4+DQ": (0.0860, 0.1209, 0.1298),
        "INT8": (0.1031, 0.1078, 0.1056),
        "INT8+Decomp": (0.1820, 0.1958, 0.2027),
    },
    ("h100", "llama-3.1-70b"): {
        "NF4": (0.0833, 0.2348, 0.2491),
        "NF4+DQ": (0.1052, 0.2423, 0.2580),
        "INT8": (0.1294, 0.1313, 0.1314),
        "INT8+Decomp": (0.1985, 0.2052, 0.2189),
    },
}
"""(target, model) → recipe → seconds of a step for each batch; None where they give none."""
