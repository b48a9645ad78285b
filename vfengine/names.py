"""The words that users write: stated once, for the library and for a command line without torch."""

AUTO = "auto"  # of a device, a dtype, a precision: what suits the machine

SOLVERS = ("ddim", "ddpm", "dpmsolver", "dpmsolver++", "unipc")
BASE_PATHS = ("stepwise", "clean")  # how the base path is followed: by estimates, or by its end
OUTPUT_TYPES = ("np", "pt", "pil")  # of a pipeline's frames
FILTERS = ("nearest", "lanczos")  # for enlarging frames
OBJECTIVES = ("decomposed", "vdm")  # what a model was trained for; "vdm" is plain video diffusion
PRECISIONS = ("bf16", "fp32")  # of training

# dtypes of networks: their names in torch, by what may be written
DTYPE_NAMES = {
    **{name: name for name in (AUTO, "float32", "bfloat16", "float16")},
    **{"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"},
}
